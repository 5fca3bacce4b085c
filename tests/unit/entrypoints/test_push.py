"""`pared push`, with a Hub of its own: only what was checked goes there, and nothing is replaced unasked."""

import hashlib
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import LocalTokenNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects

import pared
from pared import ParedError, Recipe
from pared.entrypoints.push import push

REPOSITORY = "someone/smaller"


class NotThereError(RepositoryNotFoundError):
    """What the Hub's library raises, without the answer of a server."""

    def __init__(self) -> None:
        Exception.__init__(self, "404")


class Hub:
    """What `HfApi` does, of one repository in memory: bytes of files by name, None where it is not there."""

    def __init__(self, files: dict[str, bytes] | None = None, token: bool = True, large: tuple[str, ...] = ()) -> None:
        self.files, self.token, self.large = files, token, large
        self.private: bool | None = None
        self.commits = 0

    def whoami(self) -> dict[str, str]:
        if not self.token:
            raise LocalTokenNotFoundError("Token is required")
        return {"name": "someone"}

    def list_repo_tree(self, _: str, recursive: bool) -> list[Any]:
        assert recursive
        if self.files is None:
            raise NotThereError
        return [self._told(name, raw) for name, raw in self.files.items()]

    def _told(self, name: str, raw: bytes) -> SimpleNamespace:
        sha1 = hashlib.sha1(b"blob %d\0" % len(raw) + raw).hexdigest()
        large = SimpleNamespace(sha256=hashlib.sha256(raw).hexdigest()) if name in self.large else None
        return SimpleNamespace(path=name, size=len(raw), blob_id=sha1, lfs=large)

    def create_repo(self, _: str, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        if self.files is None:
            self.files, self.private = {".gitattributes": b"* lfs"}, private

    def upload_folder(
        self, repo_id: str, folder_path: str, allow_patterns: list[str], delete_patterns: list[str] | None,
        **_: str,
    ) -> SimpleNamespace:  # fmt: skip
        assert self.files is not None
        self.commits += 1
        every = [path.relative_to(folder_path).as_posix() for path in Path(folder_path).rglob("*") if path.is_file()]
        for name in filter_repo_objects(list(self.files), allow_patterns=delete_patterns) if delete_patterns else ():
            del self.files[name]
        for name in filter_repo_objects(every, allow_patterns=allow_patterns):
            self.files[name] = (Path(folder_path) / name).read_bytes()
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo_id}/commit/1")


@pytest.fixture(scope="module")
def made(place: Path) -> Path:
    pared.run(Recipe(model=str(place / "llama"), method="svd", keep=0.6, evaluation=None, out=str(place / "made")))
    return place / "made"


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_all_files_that_are_listed_are_uploaded_and_no_others(made: Path, tmp_path: Path) -> None:
    folder, hub = shutil.copytree(made, tmp_path / "made"), Hub()
    (folder / ".env").write_text("TOKEN=secret")
    pushed = push(folder, REPOSITORY, private=True, api=hub)
    assert hub.files is not None
    assert hub.files.keys() - {".gitattributes"} == content(made).keys()
    assert hub.private is True
    assert pushed.url in repr(pushed)


def test_a_dry_run_asks_nobody_and_tells_sizes(made: Path) -> None:
    pushed = push(made, REPOSITORY, dry_run=True, api=None)
    assert dict(pushed.sizes) == {name: len(raw) for name, raw in content(made).items()}
    assert "nothing was uploaded" in repr(pushed)


def test_a_folder_that_changed_is_not_uploaded(made: Path, tmp_path: Path) -> None:
    folder, hub = shutil.copytree(made, tmp_path / "made"), Hub()
    (folder / "README.md").write_text("mine")
    with pytest.raises(ParedError, match=r"README\.md is not what was written"):
        push(folder, REPOSITORY, api=hub)
    assert hub.files is None


def test_without_a_token_it_is_said_how_to_get_one(made: Path) -> None:
    with pytest.raises(ParedError, match="hf auth login"):
        push(made, REPOSITORY, api=Hub(token=False))


def test_a_repository_with_other_content_is_kept(made: Path) -> None:
    hub = Hub({"README.md": b"of another model", ".gitattributes": b""})
    with pytest.raises(ParedError, match=r"holds something else: README\.md"):
        push(made, REPOSITORY, api=hub)
    assert hub.commits == 0
    push(made, REPOSITORY, overwrite=True, api=hub)
    assert hub.files is not None
    assert hub.files["README.md"] == (made / "README.md").read_bytes()


def test_what_is_replaced_leaves_nothing_of_before(made: Path) -> None:
    hub = Hub({"model-00001-of-00002.safetensors": b"old", "odd[1]*.txt": b"odd"})
    push(made, REPOSITORY, overwrite=True, api=hub)
    assert hub.files is not None
    assert hub.files.keys() == content(made).keys()


def test_an_upload_that_was_cut_off_is_continued(made: Path) -> None:
    part = {name: raw for name, raw in content(made).items() if name in ("config.json", "model.safetensors")}
    hub = Hub(part, large=("model.safetensors",))
    assert set(push(made, REPOSITORY, api=hub).there) == {"config.json", "model.safetensors"}
    assert hub.files == content(made)


@pytest.mark.parametrize("name", ["smaller", "a/b/c", "/tmp/x", "a b/c", ""])
def test_what_is_no_repository_is_refused_before_anything_is_read(name: str, tmp_path: Path) -> None:
    with pytest.raises(ParedError, match="owner/name"):
        push(tmp_path / "none", name)


def test_a_folder_without_a_list_is_refused(place: Path) -> None:
    with pytest.raises(ParedError, match="does not list its files"):
        push(place / "llama", REPOSITORY, dry_run=True)
