"""From a checked folder to a repository of the Hub."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pared.errors import ParedError
from pared.io.files import path_of
from pared.io.record import MANIFEST, SUMS, recorded, require_own_sum, require_whole
from pared.memory import format_size
from pared.models.architecture import first_line
from pared.models.published import REPOSITORY
from pared.names import called
from pared.tables import Shown, Table

OF_THE_HUB = ".gitattributes"  # which it adds to every repository
NAMED = 3  # as many of many are named


@dataclass(frozen=True, repr=False)
class Pushed(Shown):
    """What was uploaded, or would be.

    Attributes:
        folder: that was pushed.
        repository: it went to.
        sizes: bytes of every file, by name.
        there: files that were there already, with the same content.
        private: whether a repository that is made is private.
        dry: whether nothing was uploaded.
        url: of the commit; empty where nothing was uploaded.
    """

    folder: str
    repository: str
    sizes: Mapping[str, int]
    there: tuple[str, ...] = ()
    private: bool = False
    dry: bool = False
    url: str = ""

    def table(self) -> Table:
        """Return the files with their sizes, and where they went."""
        rows = [(name, format_size(size), "there already" if name in self.there else "") for name, size in
                sorted(self.sizes.items())]  # fmt: skip
        total = sum(size for name, size in self.sizes.items() if name not in self.there)
        kept = "private" if self.private else "public"
        line = f"nothing was uploaded: {format_size(total)} would go to {self.repository} ({kept} where it is made)"
        lines = (line,) if self.dry else (f"{format_size(total)} uploaded: {self.url}",)
        return Table(f"{self.folder} -> {self.repository}", ("file", "size", ""), rows, lines, align="lrl")

    def describe(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {"folder": self.folder, "repository": self.repository, "files": dict(self.sizes), "dry_run": self.dry,
                "there": list(self.there), "private": self.private, "url": self.url}  # fmt: skip


def push(
    folder: str | Path,
    repository: str,
    private: bool = False,
    dry_run: bool = False,
    overwrite: bool = False,
    api: Any = None,
) -> Pushed:
    """Check a folder and upload the files that it lists, and no others.

    Args:
        folder: that pared made, with or without a manifest.
        repository: its id on the Hub, ``owner/name``; it is made where there is none.
        private: whether it is made private; of one that is there nothing changes.
        dry_run: check, and upload nothing; the Hub is not asked.
        overwrite: whether files of the repository that differ may be replaced, and others removed.
        api: a ``huggingface_hub.HfApi``; by default one with the token of the user.

    Raises:
        ParedError: the folder is not as it was written, no token is known, the Hub refuses, or the repository holds
            something else.
    """
    path = path_of(folder)
    if not REPOSITORY.fullmatch(repository):
        raise ParedError(f"repository {repository[:100]!r}: expected the id of a model on the Hub, owner/name")
    sizes = {name: (path / name).stat().st_size for name in checked_files(path)}
    if dry_run:
        return Pushed(str(folder), repository, sizes, private=private, dry=True)
    if api is None:
        from huggingface_hub import HfApi

        api = HfApi(library_name="pared")
    _require_token(api)
    there = _there(api, repository)
    same = tuple(name for name in sizes if name in there and _is_same(path / name, there[name]))
    others = sorted(there.keys() - set(same) - {OF_THE_HUB})
    if others and not overwrite:
        raise ParedError(f"{repository} is there and holds something else: {_some(others)}; take another name, or give "
                         f"{called('overwrite', 'True')} to replace it")  # fmt: skip
    return Pushed(
        str(folder), repository, sizes, same, private, url=_upload(api, path, repository, private, sizes, others)
    )


def checked_files(folder: Path) -> list[str]:
    """Return the files that a folder lists, after the check that ``pared verify`` makes.

    Raises:
        ParedError: it is no folder that pared made, or not as it was written.
    """
    if not folder.is_dir():
        what = "a file, expected a folder that pared made" if folder.is_file() else "no such folder"
        raise ParedError(f"{folder}: {what}")
    manifest, files = folder / MANIFEST, recorded(folder)
    if files is None:
        raise ParedError(f"{folder} does not list its files with their SHA-256, in {MANIFEST} or {SUMS}: it is not "
                         "known what is to be uploaded; make it with pared compress, tune or export")  # fmt: skip
    if manifest.is_file():
        require_own_sum(manifest)
        from pared.checkpoint.verify import verify

        verify(folder)
    else:
        require_whole(folder, files)
    return sorted([*files, manifest.name if manifest.is_file() else SUMS])


def _require_token(api: Any) -> None:
    from huggingface_hub.errors import LocalTokenNotFoundError

    try:
        api.whoami()
    except LocalTokenNotFoundError:
        raise ParedError("no token of the Hub is known here: log in with hf auth login, or set HF_TOKEN; "
                         f"{called('dry_run', 'True')} needs none") from None  # fmt: skip
    except Exception as error:  # httpx and huggingface_hub raise many kinds
        raise ParedError(f"the Hub does not take the token that is known here ({first_line(error)}); log in again with "
                         "hf auth login, or set HF_TOKEN to one that may write") from None  # fmt: skip


def _there(api: Any, repository: str) -> dict[str, Any]:
    """Return the files of a repository by name, none where there is no such repository."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        found = api.list_repo_tree(repository, recursive=True)
        return {one.path: one for one in found if hasattr(one, "blob_id")}
    except RepositoryNotFoundError:
        return {}
    except Exception as error:  # as above
        raise ParedError(f"{repository} cannot be read ({first_line(error)})") from None


def _is_same(file: Path, there: Any) -> bool:
    """Whether a file of a repository has the content of a local one, by its SHA-256 or the hash that git has of it."""
    if there.size != file.stat().st_size:
        return False
    large = getattr(there, "lfs", None)
    if large is not None:
        from pared.io.digests import sha256_of

        return bool(large.sha256 == sha256_of(file))
    content = file.read_bytes()
    return bool(there.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest())


def _upload(api: Any, folder: Path, repository: str, private: bool, sizes: Mapping[str, int], others: list[str]) -> str:
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=str(folder),
            allow_patterns=list(_literally(sizes)),
            delete_patterns=list(_literally(others)) or None,
            commit_message="Upload a folder made by pared",
        )
    except Exception as error:  # httpx and huggingface_hub raise many kinds
        raise ParedError(f"{repository}: the upload failed ({first_line(error)}); the same command continues it, "
                         "if the token may write there") from None  # fmt: skip
    return str(getattr(commit, "commit_url", commit))


def _literally(names: Any) -> Iterator[str]:
    """Yield names as patterns that match nothing else."""
    for name in names:
        yield "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more files" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more}"
