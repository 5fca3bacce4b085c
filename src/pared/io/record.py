"""Which files of a folder pared wrote, with the SHA-256 of each.

``pared.json`` lists them; a plain folder, which has none, lists them in ``SHA256SUMS``, as ``sha256sum --check`` reads
it. So a damaged copy is told from a whole one, and a folder is only replaced where nothing of a user's goes with it.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pared.errors import ParedError
from pared.io.digests import file_digest, sha256_of
from pared.io.files import files_under, write_whole
from pared.io.guarded import MOST_BYTES, read_bytes, read_json

MANIFEST, SUMS = "pared.json", "SHA256SUMS"
SHA256 = re.compile(r"[0-9a-f]{64}")
SUM = re.compile(r"(?P<sum>[0-9a-f]{64}) [ *](?P<name>.+)")  # as sha256sum writes it, in text or binary mode
# What pared and transformers called their files before folders told which files are theirs.
USUAL = re.compile(
    r"README\.md|modeling_pared\.py|(generation_)?config\.json|model(-\d{5}-of-\d{5})?\.safetensors"
    r"|model\.safetensors\.index\.json|tokenizer(_config)?\.json|tokenizer\.model|special_tokens_map\.json"
    r"|added_tokens\.json|vocab\.(json|txt)|merges\.txt|chat_template\.(jinja|json)"
    r"|(processor|preprocessor|video_preprocessor)_config\.json"
)


def hashes_of(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file under a folder by its name there, read now, without the lists themselves.

    Links are followed: the folders of a download cache or of a version control for data hold little else.

    Raises:
        OSError: a file cannot be read.
    """
    names = sorted(name for name in files_under(folder) if name not in (MANIFEST, SUMS))
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(lambda name: sha256_of(folder / name), names), strict=True))


def write_sums(folder: Path) -> None:
    """List the files of a folder that has no manifest."""
    write_whole(folder / SUMS, "".join(f"{found}  {name}\n" for name, found in hashes_of(folder).items()))


def recorded(folder: Path) -> dict[str, str] | None:
    """Return the files that a folder says pared wrote, by name, with their SHA-256; None where it does not say.

    Raises:
        ParedError: the list is damaged.
    """
    path = folder / _list_of(folder)
    if not os.path.lexists(path):
        return None
    if path.name == MANIFEST:
        fields = read_json(path, "manifest")
        told: Any = fields.get("files", {}) if isinstance(fields, dict) else None
    else:
        content = read_bytes(path, "list of files", MOST_BYTES).decode("utf-8", "surrogateescape")
        lines = [SUM.fullmatch(line) for line in content.split("\n")[: -1 if content.endswith("\n") else None]]
        told = {line["name"]: line["sum"] for line in lines if line} if all(lines) else None
    if not isinstance(told, dict) or not all(isinstance(one, str) and SHA256.fullmatch(one) for one in told.values()):
        raise ParedError(
            f"{path} is damaged: it does not list files with their SHA-256; fetch or make the folder again"
        )
    return told or None


def foreign(folder: Path, thorough: bool = True) -> str | None:
    """Return what in a folder pared did not write, or not as it is now; None if a folder is pared's own.

    Args:
        folder: that is there.
        thorough: whether to look into files too, not only at their names.
    """
    try:
        known = recorded(folder)
        old = known is None and _is_of_before_lists(folder / MANIFEST)
        if thorough and known is not None and (folder / MANIFEST).is_file():
            require_own_sum(folder / MANIFEST)
    except ParedError:
        return f"{_list_of(folder)} (damaged, or changed since pared wrote it)"
    if not old and not _is_of_model(folder, known):
        return f"no list of files that pared wrote ({MANIFEST} or {SUMS})"
    known = known or {}
    folders = {parent.as_posix() for name in known for parent in Path(name).parents}
    for name, kind in _entries(folder):
        if name in (MANIFEST, SUMS) and kind == "file":
            continue
        if kind == "folder" and name in folders:
            continue
        usual = old and kind == "file" and USUAL.fullmatch(name)
        if not usual and (kind != "file" or name not in known):
            return f"{name} ({'a file' if kind == 'file' else f'a {kind}'} that pared did not write)"
        if thorough and name in known and file_digest(folder / name) != known[name]:
            return f"{name} (changed since pared wrote it)"
    return None


def _list_of(folder: Path) -> str:
    """Return what lists the files of a folder, or would."""
    return MANIFEST if os.path.lexists(folder / MANIFEST) else SUMS


def _is_of_model(folder: Path, known: Mapping[str, str] | None) -> bool:
    """Whether a list is of a model that pared wrote: others too leave a ``SHA256SUMS``, in folders of anything."""
    return known is not None and (_list_of(folder) == MANIFEST or "config.json" in known)


def _is_of_before_lists(manifest: Path) -> bool:
    """Whether a manifest is whole, and of before there were lists and checksums.

    Raises:
        ParedError: it is damaged.
    """
    if not os.path.lexists(manifest):
        return False
    fields = read_json(manifest, "manifest")
    return isinstance(fields, dict) and "format_version" in fields and not fields.keys() & {"files", "checksum"}


def checksum(fields: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a manifest as plain data, but for the checksum in it."""
    others = {name: value for name, value in fields.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()


def require_own_sum(manifest: Path) -> None:
    """Check the checksum that a manifest has of itself; those of before there was one have none.

    Raises:
        ParedError: it is damaged, or was edited.
    """
    fields = read_json(manifest, "manifest")
    if not isinstance(fields, dict) or not (fields.get("files") or fields.get("checksum")):
        return
    if fields.get("checksum") != checksum(fields):
        raise ParedError(
            f"{manifest} is not what was written: its checksum does not match; fetch or make the folder again, or, if "
            f"the change is yours and meant, take it over with: pared verify {manifest.parent} --record"
        )


def require_whole(folder: Path, files: Mapping[str, str]) -> None:
    """Check the bytes of every listed file.

    Raises:
        ParedError: one is missing, unreadable or not what was written; names it.
    """
    listed = _list_of(folder)
    take_over = f"take it over with: pared verify {folder} --record" if listed == MANIFEST else (
        f"remove {SUMS}, or list the file there again, as sha256sum does")  # fmt: skip

    def found(name: str) -> str:
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ParedError(f"{folder / listed}: {name!r} is listed and does not lie in the folder; it is damaged")
        try:
            if not path.is_file():
                raise ParedError(f"{path} is missing, and {listed} lists it; fetch or make the folder again")
            return sha256_of(path)
        except OSError as error:
            raise ParedError(
                f"{path}: unreadable ({error.strerror or error}); fetch or make the folder again"
            ) from None

    names = sorted(files)
    with ThreadPoolExecutor() as pool:
        for name, digest in zip(names, pool.map(found, names), strict=True):
            if digest != files[name]:
                raise ParedError(
                    f"{folder / name} is not what was written: its SHA-256 begins with {digest[:12]}, that in "
                    f"{listed} with {files[name][:12]}; fetch or make the folder again, or, if the change "
                    f"is yours and meant, {take_over}"
                )


def _entries(folder: Path, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the name under a folder and the kind of everything in it."""
    with os.scandir(folder) as found:
        for entry in sorted(found, key=lambda one: one.name):
            name, mode = prefix + entry.name, entry.stat(follow_symlinks=False).st_mode
            if stat.S_ISDIR(mode):
                yield name, "folder"
                yield from _entries(Path(entry.path), f"{name}/")
            else:
                yield name, "file" if stat.S_ISREG(mode) else "link" if stat.S_ISLNK(mode) else "special file"
