import errno
import hashlib
import os
import shutil
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from safetensors import SafetensorError
from tiny_models import TINY_MODELS
from transformers import PreTrainedTokenizerFast

import pared
import pared.io.files as files_module
import pared.io.output_dir as staging_module
from pared import ParedError, Recipe
from pared.io.leftovers import this_machine
from pared.io.output_dir import RESERVE, staged
from pared.io.record import write_sums
from pared.schema.manifest import Manifest

# What the safetensors of this environment says on a full disk; it is not an OSError.
RUST_SAYS = "Error while serializing: I/O error: No space left on device (os error 28)"
FULL = [OSError(errno.ENOSPC, "No space left on device"), SafetensorError(RUST_SAYS)]


def contents(place: Path) -> dict[str, str]:
    return {str(path.relative_to(place)): path.read_text() for path in place.rglob("*") if path.is_file()}


def break_off(out: Path, error: BaseException) -> None:
    with staged(out, overwrite=True) as staging:
        (staging / "config.json").write_text("half")
        raise error


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An output folder that is there already."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "config.json").write_text("old")
    write_sums(folder)
    return folder


SUMS = f"{hashlib.sha256(b'old').hexdigest()}  config.json\n"
OLD = {"config.json": "old", "SHA256SUMS": SUMS}


def in_place(files: dict[str, str]) -> dict[str, str]:
    return {f"out/{name}": content for name, content in files.items()}


def test_the_folder_appears_whole(tmp_path: Path) -> None:
    with staged(tmp_path / "deep" / "out") as staging:
        (staging / "config.json").write_text("new")
        assert not (tmp_path / "deep" / "out").exists()
    assert contents(tmp_path) == {"deep/out/config.json": "new"}


@pytest.mark.parametrize("mask", [0o077, 0o027, 0o002])
def test_an_output_has_the_permissions_that_the_user_gives_to_new_files(tmp_path: Path, mask: int) -> None:
    """Regression: under a mask of 077 everybody could read the model."""
    before = os.umask(mask)
    try:
        with staged(tmp_path / "out") as staging:
            (staging / "deep").mkdir()
            for name in ("config.json", "deep/weights"):
                (staging / name).write_text("new")
                (staging / name).chmod(0o600)  # as safetensors does
    finally:
        os.umask(before)
    for path in (tmp_path / "out", *(tmp_path / "out").rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~mask, path


@pytest.mark.parametrize("told", ["kernel", "nobody"])
def test_reading_the_mask_of_permissions_in_threads_leaves_it_as_it_is(
    monkeypatch: pytest.MonkeyPatch, told: str
) -> None:
    """Regression: two threads that set it to read it could leave it at 022 for good."""
    files_module._mask_by_setting.cache_clear()
    if told == "nobody":
        monkeypatch.setattr(Path, "read_text", lambda *_, **__: "")
    before = os.umask(0o027)
    try:
        with ThreadPoolExecutor(8) as pool:
            found = set(pool.map(lambda _: files_module.new_mode(), range(500)))
        assert found == {0o640}
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
        files_module._mask_by_setting.cache_clear()


def test_overwrite_replaces_the_whole_folder(out: Path, tmp_path: Path) -> None:
    with staged(out, overwrite=True) as staging:
        (staging / "weights").write_text("new")
        assert contents(out) == OLD
    assert contents(tmp_path) == {"out/weights": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_is_free(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with staged(tmp_path / "out") as staging:
        (staging / "config.json").write_text("new")
    assert contents(tmp_path) == {"out/config.json": "new"}


def test_a_folder_that_is_there_is_refused_unasked(out: Path, tmp_path: Path) -> None:
    with pytest.raises(ParedError, match=r"out is there already; name another or pass overwrite=True"), staged(out):
        pytest.fail("the body ran")
    assert contents(tmp_path) == in_place(OLD)


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_file_is_never_replaced(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ParedError, match=r"out is a file; name a folder"), staged(tmp_path / "out", overwrite):
        pytest.fail("the body ran")
    assert contents(tmp_path) == {"out": "mine"}


def test_an_output_below_a_file_is_refused(tmp_path: Path) -> None:
    """Regression: mkdir's own NotADirectoryError came out, after the work was done."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ParedError, match="file is not a folder that can be written to"), staged(tmp_path / "file/a/b"):
        pytest.fail("the body ran")


def test_an_output_where_nothing_may_be_written_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != tmp_path)
    recipe = Recipe(model="/nowhere", out=str(tmp_path / "out"), method="svd")
    with pytest.raises(ParedError, match="is not a folder that can be written to"):
        pared.run(recipe)


@pytest.mark.parametrize("error", [RuntimeError("broken"), ParedError("wrong"), KeyboardInterrupt(), SystemExit(1)])
@pytest.mark.parametrize("there", [True, False])
def test_an_error_inside_leaves_nothing_and_touches_nothing(tmp_path: Path, error: BaseException, there: bool) -> None:
    out = tmp_path / "out"
    if there:
        out.mkdir()
        (out / "config.json").write_text("old")
        write_sums(out)
    before = contents(tmp_path)
    with pytest.raises(type(error)):
        break_off(out, error)
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if there else [])


@pytest.mark.parametrize(
    ("error", "told"), [(OSError("stale handle"), ParedError), (KeyboardInterrupt(), KeyboardInterrupt)]
)
@pytest.mark.parametrize("renamed", [0, 1])
def test_an_interrupted_replacement_puts_the_old_folder_back(
    out: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    told: type[BaseException],
    renamed: int,
) -> None:
    """Regression: Ctrl-C between the two renames deleted the old folder and the new one."""
    rename = Path.rename
    calls: list[Path] = []

    def interrupted(self: Path, target: Path) -> Path:
        calls.append(self)
        if len(calls) == renamed + 1:
            raise error
        return rename(self, target)

    monkeypatch.setattr(staging_module, "exchange", lambda *_: False)  # as on systems that cannot
    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(told), staged(out, overwrite=True) as staging:
        (staging / "config.json").write_text("new")
    assert contents(out) == OLD
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", FULL, ids=["python", "safetensors"])
def test_a_disk_that_fills_up_is_told_in_one_line(out: Path, tmp_path: Path, error: Exception) -> None:
    with pytest.raises(ParedError, match=r"disk filled up while writing .*out"):
        break_off(out, error)
    assert contents(tmp_path) == in_place(OLD)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_other_errors_of_the_system_are_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ParedError, match=r"writing .*out failed \(.*stale handle\)"), staged(tmp_path / "out"):
        raise OSError(errno.ESTALE, "stale handle")


def short_of_disk(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10 * RESERVE, 0, free))


def test_too_little_disk_is_refused_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short_of_disk(monkeypatch, RESERVE + 99)
    with pytest.raises(ParedError, match=f"{RESERVE + 100:,} bytes needed, {RESERVE + 99:,} free"):  # noqa: SIM117
        with staged(tmp_path / "deep" / "out", needed=100):
            pytest.fail("the body ran")
    assert list(tmp_path.iterdir()) == []
    with staged(tmp_path / "out", needed=99):
        pass


# Whole jobs.


@pytest.fixture
def job(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Recipe:
    TINY_MODELS["llama"]().save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    out = tmp_path / "jobs" / "out"
    return Recipe(model=str(tmp_path / "dense"), out=str(out), method="svd", keep=0.6, evaluation=None)


def test_a_job_makes_a_folder_that_passes_its_check(job: Recipe, tmp_path: Path) -> None:
    outcome = pared.run(job)
    assert [path.name for path in (tmp_path / "jobs").iterdir()] == ["out"]
    assert outcome.manifest == Manifest.read(tmp_path / "jobs" / "out")
    assert outcome.manifest.self_check <= 1e-6
    assert outcome.manifest.recipe == job.model_copy(update={"model": "dense", "out": "out"})
    assert pared.verify(outcome.folder) <= 1e-6


def test_the_manifest_counts_the_parameters_of_the_stored_weights(job: Recipe) -> None:
    outcome = pared.run(job)
    stored = safetensors.torch.load_file(outcome.folder / "model.safetensors")
    assert sum(tensor.numel() for tensor in stored.values()) == outcome.manifest.plan.after.model_parameters
    assert outcome.manifest.bytes_on_disk == (outcome.folder / "model.safetensors").stat().st_size


def test_a_job_replaces_a_folder_only_when_asked(job: Recipe) -> None:
    first = pared.run(job)
    with pytest.raises(ParedError, match="is there already"):
        pared.run(job)
    again = pared.run(job.model_copy(update={"keep": 0.8}), overwrite=True)
    assert again.folder == first.folder
    assert Manifest.read(first.folder).recipe.keep == 0.8


def test_a_job_is_refused_before_it_reads_weights_if_the_disk_is_too_small(
    job: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dense" / "model.safetensors").unlink()
    short_of_disk(monkeypatch, 10)
    with pytest.raises(ParedError, match=r"not enough disk for .*jobs/out: .* 10 free; nothing was written"):
        pared.run(job)
    assert not (tmp_path / "jobs").exists()


@pytest.mark.parametrize("error", FULL, ids=["python", "safetensors"])
def test_a_job_on_a_disk_that_fills_up_leaves_no_folder(
    job: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fills_up(_: Any, path: Path, **__: Any) -> None:
        Path(path).write_bytes(b"half")
        raise error

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", fills_up)
    with pytest.raises(ParedError, match="the disk filled up while writing"):
        pared.run(job)
    assert [path.name for path in (tmp_path / "jobs").iterdir()] == [".out.compress"]  # what --resume continues from


def test_a_job_whose_folder_does_not_answer_alike_leaves_none(
    job: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = safetensors.torch.save_file

    def garbled(tensors: dict[str, Any], path: Path, **fields: Any) -> None:
        write({name: tensor * 1.1 for name, tensor in tensors.items()}, path, **fields)

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", garbled)
    with pytest.raises(ParedError, match=r"the self-check of what was made of \S+ failed"):
        pared.run(job)
    assert [path.name for path in (tmp_path / "jobs").iterdir()] == [".out.compress"]  # what --resume continues from


def test_a_folder_that_is_no_model_is_never_replaced(tmp_path: Path) -> None:
    """Regression: --overwrite deleted whatever it was pointed at."""
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "thesis.txt").write_text("precious")
    with pytest.raises(ParedError, match="not all in it is pared's"), staged(tmp_path / "documents", overwrite=True):
        pytest.fail("the body ran")
    assert contents(tmp_path) == {"documents/thesis.txt": "precious"}


def test_a_folder_that_appeared_meanwhile_is_kept(tmp_path: Path) -> None:
    """Regression: the later of two jobs with one output deleted what the earlier had made."""
    faster = tmp_path / "faster"
    faster.mkdir()
    (faster / "config.json").write_text("early")
    with pytest.raises(ParedError, match="there already"), staged(tmp_path / "out"):
        shutil.copytree(faster, tmp_path / "out")
    assert contents(tmp_path / "out") == {"config.json": "early"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["faster", "out"]


def test_the_folder_one_works_in_and_links_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "link").symlink_to(tmp_path / "here")
    worked_in, too_long = "is a folder you work in", "a name of 300 bytes"
    places = {
        Path("."): worked_in, tmp_path: worked_in, Path("/"): worked_in, tmp_path / "link": worked_in,
        Path("../here"): worked_in, tmp_path / "link" / "..": worked_in, Path("~").expanduser(): worked_in,
        tmp_path / ("x" * 300): too_long,
    }  # fmt: skip
    for place, told in places.items():
        with pytest.raises(ParedError, match=rf"^output .*{told}"), staged(place, overwrite=True):
            pytest.fail("the body ran")
    (tmp_path / "elsewhere").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ParedError, match="is a link; name a folder"), staged(tmp_path / "elsewhere", overwrite=True):
        pytest.fail("the body ran")
    (tmp_path / "elsewhere").unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "link"]


def test_what_a_killed_process_left_is_swept(tmp_path: Path) -> None:
    """Regression: SIGKILL left half a model beside the output for ever."""
    dead = 2**22 + 1  # above the largest process id of Linux
    machine = this_machine()
    (tmp_path / f".out.staging-{machine}-{dead}-abc").mkdir()
    (tmp_path / f".out.staging-{machine}-{os.getpid()}-abc").mkdir()
    (tmp_path / f".other.staging-{machine}-{dead}-abc").mkdir()
    with staged(tmp_path / "out"):
        pass
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [f".other.staging-{machine}-{dead}-abc", f".out.staging-{machine}-{os.getpid()}-abc", "out"]
