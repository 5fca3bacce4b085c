"""The last step of every folder that is written: no private path in it, and every file listed with its SHA-256."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pared.errors import ParedError
from pared.io.files import write_whole
from pared.io.inputs import inputs_of, remember, told_apart, without_places
from pared.io.record import hashes_of, write_sums
from pared.schema.manifest import Manifest

Card = Callable[[Manifest, str, Mapping[str, Any]], str]
Published = Mapping[str, tuple[Path, str]]


def seal(folder: Path, manifest: Manifest, name: str, read: Iterable[Path], card: Card) -> Manifest:
    """Write the manifest and the card of a folder whose other files are all there.

    Args:
        folder: where.
        manifest: of it, with names as the user gave them.
        name: that the folder will have.
        read: local files and folders it was made of; they are recorded by name and SHA-256.
        card: returns the text of ``README.md``.

    Returns:
        The manifest as it was written.

    Raises:
        ParedError: something that was read is not readable any more.
    """
    try:
        published = told_apart(read)
    except OSError as error:
        raise ParedError(f"{error.filename}: {error.strerror or error}; it was read to make the output") from None
    remember(published)
    fields = without_places(manifest.model_dump(mode="json"), published)
    for asked in (fields["recipe"], *(entry["tuning"] for entry in fields["training"])):
        asked["out"] = asked["out"] and Path(asked["out"]).name
    fields["inputs"] = {**fields["inputs"], **{last: digest for last, (_, digest) in published.items()}}
    told = Manifest.model_validate(fields)
    _clean_configurations(folder, published)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "README.md").write_text(card(told, name, config), encoding="utf-8")
    return told.model_copy(update={"files": hashes_of(folder)}).write(folder)


def seal_plain(folder: Path, read: Iterable[Path]) -> None:
    """List the files of a folder that has no manifest, cleaned of the paths of what it was made of."""
    _clean_configurations(folder, told_apart(read))
    write_sums(folder)


def _clean_configurations(folder: Path, published: Published) -> None:
    """Take private paths out of configurations; vocabularies and templates, which may hold anything, stay."""
    for path in folder.rglob("*config.json"):
        found = json.loads(path.read_text(encoding="utf-8"))
        clean = _cleaned(found, published)
        if clean != found:
            write_whole(path, json.dumps(clean, indent=2, ensure_ascii=False) + "\n")


def _cleaned(found: Any, published: Published) -> Any:
    """Return a configuration without places, but for chat templates and added tokens, which are no paths."""
    if not isinstance(found, dict):
        return found
    kept = {key: value for key, value in found.items() if key in ("chat_template", "added_tokens_decoder")}
    return {**found, **without_places({key: one for key, one in found.items() if key not in kept}, published)}


def record(folder: Path) -> Manifest:
    """Take over a folder's files as they are now: list them again with their SHA-256.

    Raises:
        ParedError: it has no manifest.
    """
    return Manifest.read(folder).model_copy(update={"files": hashes_of(folder)}).write(folder)


def published_recipe(recipe: Any) -> tuple[Any, dict[str, str]]:
    """Return a recipe, and the SHA-256 of the local files and folders it names, as a manifest records them.

    Raises:
        OSError: one of these cannot be read.
    """
    fields = recipe.model_dump(mode="json")
    published = told_apart(inputs_of(fields))
    clean = without_places(fields, published)
    clean["out"] = clean["out"] and Path(clean["out"]).name
    return type(recipe).model_validate(clean), {last: digest for last, (_, digest) in published.items()}
