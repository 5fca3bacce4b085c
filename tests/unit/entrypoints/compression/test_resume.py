"""``pared compress --resume``: whatever ended a process, the next one ends with the bytes of one that nothing ended."""

import errno
import json
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import forked
from safetensors.torch import load_file, save_file
from tiers import some
from tiny_models import MIXTURES, TINY_MODELS
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import pared
from pared import Calibration, ParedError, Recipe
from pared.cli.commands import app
from pared.engine.cost.needs import Needs
from pared.engine.ranks.kept_units import KeptUnits
from pared.engine.state import run_state
from pared.io.run_dir import RunDirectory, entries_of, run_folder

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")

SHARED = {"group_size": 2, "sharing": "all"}
CASES: dict[str, dict[str, Any]] = {
    "svd-llm": {"method": "svd-llm", "keep": 0.7, "statistics": "sequential", "refit": "sequential"},
    "basis-sharing": {"method": "basis-sharing", "keep": 0.5, "options": SHARED, "refit": "update"},
    "loss-optimal": {"method": "loss-optimal", "keep": 0.7, "statistics": "once"},
    "loss-optimal sequential": {"method": "loss-optimal", "keep": 0.7, "statistics": "sequential"},
    "widths": {"method": "loss-optimal", "keep": 0.7, "structures": "widths", "multiple_of": 4, "statistics": "once"},
    "mixed": {"method": "loss-optimal", "keep": 0.6, "structures": "mixed", "multiple_of": 4},
    "dense path": {"method": "svd-llm", "keep": 0.7, "statistics": "sequential", "dense_path": 0.3},
    "shared bases refitted": {
        "method": "basis-sharing",
        "keep": 0.5,
        "options": SHARED,
        "statistics": "sequential",
        "refit": "sequential",
    },
    "experts": {"model": "mixtral", "structures": "experts", "keep": 0.7},
    "wanda": {"method": "wanda", "sparsity": 0.5, "allocation": "owl"},
    "sparsegpt": {"method": "sparsegpt", "sparsity": 0.5},
}
# In every run; all others are slow.
IN_MEMORY = ["svd-llm", "loss-optimal", "widths", "dense path", "experts", "wanda"]
STREAMED = ["basis-sharing", "mixed", "sparsegpt"]
# Of a manifest, what no two runs share.
OF_THE_RUN = {"seconds", "peak_memory_bytes", "memory_bound_bytes", "resumed", "files", "checksum"}


def recipe_of(case: str, place: Path, out: Path, **more: Any) -> Recipe:
    calibration = Calibration(text=f"file:{place}/words.txt", samples=6, length=16, batch=2, dtype="float32")
    fixed = {"out": str(out), "evaluation": None, "calibration": calibration}
    return Recipe(**{**fixed, **CASES[case], "model": str(place / CASES[case].get("model", "llama")), **more})


@pytest.fixture(scope="module")
def place(place: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """The folder of every module, with a mixture of experts."""
    MIXTURES["mixtral"]().save_pretrained(place / "mixtral")
    tokenizer.save_pretrained(place / "mixtral")
    return place


@pytest.fixture(scope="module")
def whole(place: Path) -> Callable[[str], Path]:
    """The folder that a case comes to where nothing ends it."""

    def made(case: str) -> Path:
        out = place / "whole" / case
        if not out.exists():
            pared.run(recipe_of(case, place, out))
        return out

    return made


def content(folder: Path) -> dict[str, Any]:
    """The bytes of every file; of the manifest and the card what two runs share."""
    found: dict[str, Any] = {path.name: path.read_bytes() for path in folder.iterdir()}
    manifest = json.loads(found["pared.json"])
    found["pared.json"] = {name: value for name, value in manifest.items() if name not in OF_THE_RUN}
    found.pop("README.md")
    return found


def require_same(folder: Path, other: Path) -> None:
    one, two = content(folder), content(other)
    for found in (one, two):
        found["pared.json"]["recipe"].pop("out", None)
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []


def in_a_process(work: Callable[[], object]) -> bool:
    """Do something in a process of its own; whether it was killed."""
    code = forked(work)
    assert code in (0, -signal.SIGKILL)
    return code != 0


def killed_after(lines: int, recipe: Recipe, resume: bool = False) -> bool:
    """Run a recipe in a process that is killed as soon as so many lines are on the disk; whether it was."""

    def work() -> None:
        record, left = run_state.CompressionRun.record, lines

        def and_die(self: Any, *arguments: Any, **more: Any) -> None:
            nonlocal left
            record(self, *arguments, **more)
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

        run_state.CompressionRun.record = and_die  # type: ignore[method-assign]
        pared.run(recipe, resume=resume)

    return in_a_process(work)


def killed_within(seconds: float, recipe: Recipe) -> bool:
    """Run a recipe, resuming, in a process that is killed at some moment; whether it was still at work."""

    def work() -> None:
        timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
        pared.run(recipe, resume=True)

    return in_a_process(work)


@pytest.mark.parametrize("case", some(IN_MEMORY, CASES))
def test_a_killed_compression_goes_on_to_the_very_same_bytes(
    case: str, place: Path, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = recipe_of(case, place, tmp_path / "out")
    assert killed_after(2, recipe)
    assert [path.name for path in tmp_path.iterdir()] == [".out.compress"]
    outcome = pared.run(recipe, resume=True)
    require_same(outcome.folder, whole(case))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert pared.verify(outcome.folder) == 0.0


def test_a_compression_killed_at_every_block_goes_on_to_the_very_same_bytes(
    place: Path, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe, kills = recipe_of("svd-llm", place, tmp_path / "out"), 0
    while killed_after(1, recipe, resume=True):
        kills += 1
    assert kills == 9  # three passes over three blocks
    require_same(tmp_path / "out", whole("svd-llm"))


@pytest.mark.parametrize("stream", ["off", "on"])
def test_blocks_whose_shared_basis_was_refitted_with_its_owner_are_gone_on_from(
    stream: str, place: Path, tmp_path: Path
) -> None:
    whole, recipe = (recipe_of("shared bases refitted", place, tmp_path / name, stream=stream) for name in "wo")
    pared.run(whole)
    assert killed_after(7, recipe)  # two passes over three blocks, and the owner's block of the refit
    pared.run(recipe, resume=True)
    require_same(tmp_path / "o", tmp_path / "w")


@pytest.mark.parametrize("case", some(STREAMED, CASES))
def test_a_killed_compression_that_is_streamed_goes_on_to_the_very_same_bytes(
    case: str, place: Path, tmp_path: Path
) -> None:
    pared.run(recipe_of(case, place, tmp_path / "whole", stream="on"))
    recipe, kills = recipe_of(case, place, tmp_path / "out", stream="on", activation_memory="5KB"), 0
    while killed_after(2, recipe, resume=True):
        kills += 1
    assert kills >= 1
    for folder in (tmp_path / "out", tmp_path / "whole"):
        manifest = json.loads((folder / "pared.json").read_text())
        manifest["recipe"].pop("activation_memory", None)
        (folder / "pared.json").write_text(json.dumps(manifest))
    require_same(tmp_path / "out", tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.slow
def test_fifty_kills_at_random_moments_lead_to_the_very_same_bytes(
    place: Path, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    draws, kills, ends = random.Random(0), 0, 0
    while kills < 50:
        case, streamed = list(CASES)[ends % len(CASES)], "on" if ends % 4 == 3 else "off"
        out = tmp_path / str(ends) / "out"
        recipe = recipe_of(case, place, out, stream=streamed)
        begun = time.monotonic()
        assert not in_a_process(lambda: pared.run(recipe))  # noqa: B023 - called at once
        longest = time.monotonic() - begun  # here and now, on a machine that may be busy
        expected = content(out)
        shutil.rmtree(out)
        while killed_within(draws.uniform(0, 1.1) * longest, recipe):
            kills += 1
        ends += 1
        assert content(out) == expected
        assert (
            streamed == "on"
            or out.joinpath("model.safetensors").read_bytes() == whole(case).joinpath("model.safetensors").read_bytes()
        )
        assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert ends >= 2


# The command line.


def command(place: Path, out: Path, *more: str) -> Any:
    return CliRunner().invoke(app, [
        "compress", str(place / "llama"), "--method", "sparsegpt", "--sparsity", "0.5", "--out", str(out),
        "--data", f"file:{place}/words.txt", "--samples", "6", "--length", "16", *more,
    ])  # fmt: skip


def test_the_command_says_what_it_resumes_and_what_to_do_when_it_is_interrupted(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = run_state.CompressionRun.record

    def interrupted(self: Any, *arguments: Any, **more: Any) -> None:
        record(self, *arguments, **more)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(run_state.CompressionRun, "record", interrupted)
        result = command(place, tmp_path / "out")
    assert result.exit_code == 130
    told = " ".join(result.output.split())
    assert f"what is finished is kept in {tmp_path}/.out.compress" in told
    assert "--resume continues after the last finished block" in told
    refused = command(place, tmp_path / "out")
    assert refused.exit_code == 2
    assert "--resume continues it, --restart removes it" in " ".join(refused.output.split())
    result = command(place, tmp_path / "out", "--resume")
    assert result.exit_code == 0, result.output
    assert "resuming the compression that" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_killed_run_is_refused_unless_it_is_said_what_becomes_of_it_and_there_need_be_none(
    place: Path, whole: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = recipe_of("sparsegpt", place, tmp_path / "out")
    assert killed_after(2, recipe)
    before = held(run_folder(tmp_path / "out", "compress"))
    with pytest.raises(ParedError, match="of these very settings: resume=True continues it, resume=False"):
        pared.run(recipe)
    with pytest.raises(ParedError, match=r"with other settings \(sparsity: .* there, 0.7 now"):
        pared.run(recipe.model_copy(update={"sparsity": 0.7}))
    assert held(run_folder(tmp_path / "out", "compress")) == before
    pared.run(recipe, resume=False)
    assert "this one starts over" in caplog.text
    require_same(tmp_path / "out", whole("sparsegpt"))
    pared.run(recipe, overwrite=True, resume=True)
    require_same(tmp_path / "out", whole("sparsegpt"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# Foreign, damaged, full.


def held(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_state_of_another_compression_is_refused_with_what_differs(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of("sparsegpt", place, tmp_path / "out")
    assert killed_after(2, recipe)
    state = run_folder(tmp_path / "out", "compress")
    before = held(state)
    other_text = tmp_path / "text" / "words.txt"
    other_text.parent.mkdir()
    other_text.write_text(" ".join(f"w{number % 7}" for number in range(2000)))
    other = recipe.calibration.model_copy(update={"text": f"file:{other_text}"})
    for changed, told in (
        (recipe.model_copy(update={"sparsity": 0.6}), r"\(sparsity: 0\.5 there, 0\.6 now"),
        (recipe.model_copy(update={"calibration": other}), "calibration tokens: '[0-9a-f]{12}…' there"),
        (recipe.model_copy(update={"dtype": "bfloat16"}), "dtype: 'auto' there, 'bfloat16' now"),
    ):
        with pytest.raises(ParedError, match=told):
            pared.run(changed, resume=True)
        assert held(state) == before
    with monkeypatch.context() as patched:
        patched.setattr("pared.entrypoints.compression.resume.versions", lambda: {"torch": "1.0"})
        with pytest.raises(ParedError, match=r"versions\.torch: '.*' there, '1\.0' now"):
            pared.run(recipe, resume=True)
    (place / "other").mkdir(exist_ok=True)
    for path in (place / "llama").iterdir():
        (place / "other" / path.name).write_bytes(path.read_bytes())
    weights = bytearray((place / "other" / "model.safetensors").read_bytes())
    weights[-2] ^= 1
    (place / "other" / "model.safetensors").write_bytes(weights)
    with pytest.raises(ParedError, match=r"model: '[0-9a-f]{12}…' there"):
        pared.run(recipe.model_copy(update={"model": str(place / "other")}), resume=True)
    assert held(state) == before
    pared.run(recipe.model_copy(update={"model": str(place / "llama" / ".." / "llama")}), resume=True)


@pytest.mark.parametrize("damage", ["journal", "emptied", "file", "missing", "settings", "a digit"])
def test_a_damaged_state_is_told_and_stays(damage: str, place: Path, tmp_path: Path) -> None:
    recipe = recipe_of("sparsegpt", place, tmp_path / "out")
    assert killed_after(2, recipe)
    state = run_folder(tmp_path / "out", "compress")
    (block,) = state.glob("*-block-00001.safetensors")
    file, told = {
        "journal": (state / "journal.jsonl", r"journal\.jsonl, line 3: not a line of a compress run"),
        "emptied": (state / "journal.jsonl", r"journal\.jsonl, which tells what .* is, is empty or missing"),
        "file": (block, r"block-00001\.safetensors is damaged"),
        "missing": (block, r"block-00001\.safetensors is missing"),
        "a digit": (state / "settings.json", r"settings\.json: not what was written"),
        "settings": (state / "settings.json", r"settings\.json: not what was written"),
    }[damage]
    whole = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        changed = {
            "journal": whole.replace(b"float32", b"float16"),
            "file": whole[:-1] + bytes([whole[-1] ^ 1]),
            "emptied": b"",
            "a digit": whole.replace(b'"sparsity": 0.5', b'"sparsity": 0.4'),
            "settings": whole[1:],
        }
        file.write_bytes(changed[damage])
    before = held(state)
    with pytest.raises(ParedError, match=told):
        pared.run(recipe, resume=True)
    assert held(state) == before
    file.write_bytes(whole)  # and what was restored is gone on from
    pared.run(recipe, resume=True)


def test_a_disk_that_fills_up_at_any_block_costs_nothing_that_was_done(
    place: Path, whole: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, save = recipe_of("wanda", place, tmp_path / "out"), run_state.save_file

    def full(*arguments: Any) -> None:
        if "block-00001" in str(arguments[1]):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(run_state, "save_file", full)
        with pytest.raises(ParedError, match=r"not enough disk for .*block-00001.*bytes needed, [\d,]+ free.*resume"):
            pared.run(recipe)
    outcome = pared.run(recipe, resume=True)
    require_same(outcome.folder, whole("wanda"))


def test_a_run_that_was_killed_before_it_removed_its_state_is_done(
    place: Path, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = recipe_of("wanda", place, tmp_path / "out")

    def work() -> None:
        RunDirectory.finish = lambda _: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
        pared.run(recipe)

    assert in_a_process(work)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.compress", "out"]
    made = content(tmp_path / "out")
    with pytest.raises(ParedError, match="there already"):
        pared.run(recipe.model_copy(update={"sparsity": 0.6}), resume=True)
    outcome = pared.run(recipe, resume=True)
    assert outcome.folder == tmp_path / "out"
    assert outcome.manifest == pared.Manifest.read(tmp_path / "out")
    assert content(tmp_path / "out") == made
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_command_resumes_what_was_killed_before_it_removed_its_state_and_says_when_nothing_is_left_to_do(
    place: Path, tmp_path: Path
) -> None:
    """Regression: both were told to pass --overwrite, as the command looked at the output first."""
    recipe = recipe_of("wanda", place, tmp_path / "out")
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe.model_dump(mode="json")))

    def work() -> None:
        RunDirectory.finish = lambda _: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
        pared.run(recipe)

    assert in_a_process(work)
    made = content(tmp_path / "out")
    command = ["compress", "--recipe", str(file), "--resume"]
    first = CliRunner().invoke(app, command)
    assert first.exit_code == 0, first.output
    assert not (tmp_path / ".out.compress").exists()
    second = CliRunner().invoke(app, command)
    assert second.exit_code == 0, "a job that starts itself again until it is done would never end"
    assert "is finished, by this very recipe: nothing was left to do" in second.output
    other = CliRunner().invoke(app, [*command, "--sparsity", "0.25"])
    assert other.exit_code == 2
    assert (
        "is finished, by another recipe, of other files or versions, and there is nothing to resume; name"
        in other.output
    )
    assert content(tmp_path / "out") == made


def test_what_was_killed_when_it_was_about_to_remove_its_state_leaves_nothing_when_it_is_resumed(
    place: Path, tmp_path: Path
) -> None:
    """Regression: the empty folder that the state was to be moved to stayed beside the output."""
    recipe = recipe_of("wanda", place, tmp_path / "out")

    def work() -> None:
        rename = Path.rename

        def and_die(self: Path, target: Any) -> Path:
            if self.name.endswith(".compress"):
                os.kill(os.getpid(), signal.SIGKILL)
            return rename(self, target)

        Path.rename = and_die  # type: ignore[method-assign]
        pared.run(recipe)

    assert in_a_process(work)
    assert len(list(tmp_path.iterdir())) == 3
    pared.run(recipe, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("other", ["another model", "other weights", "another text"])
def test_an_output_of_other_files_under_the_same_names_is_not_called_finished(
    other: str, place: Path, tmp_path: Path
) -> None:
    """Regression: names were compared without what lies there, and a folder of another model was handed back."""
    for folder in ("a", "b"):
        shutil.copytree(place / "llama", tmp_path / folder / "llama")
        shutil.copy(place / "words.txt", tmp_path / folder)
    recipe = recipe_of("wanda", tmp_path / "a", tmp_path / "out")
    made = pared.run(recipe)
    assert pared.run(recipe, resume=True).manifest == made.manifest
    asked = recipe_of("wanda", tmp_path / ("b" if other == "another model" else "a"), tmp_path / "out")
    if other == "another text":
        with (tmp_path / "a" / "words.txt").open("a") as text:
            text.write(" more")
    else:
        weights = Path(str(asked.model)) / "model.safetensors"
        save_file({name: one * 1.5 for name, one in load_file(weights).items()}, weights, {"format": "pt"})
    with pytest.raises(ParedError, match="is finished, by another recipe, of other files or versions"):
        pared.run(asked, resume=True)


def test_what_was_killed_while_it_removed_its_state_leaves_nothing_when_it_is_resumed(
    place: Path, tmp_path: Path
) -> None:
    """Regression: half of a state stayed beside a finished output, as that was refused before anything was tidied."""
    recipe = recipe_of("wanda", place, tmp_path / "out")

    def work() -> None:
        shutil.rmtree = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
        pared.run(recipe)

    assert in_a_process(work)
    assert len(list(tmp_path.iterdir())) == 2
    pared.run(recipe, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("before", ["off", "on"])
def test_memory_that_is_free_now_does_not_decide_how_a_run_is_resumed(
    before: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of("wanda", place, tmp_path / "out", stream="auto")

    def measured(streamed: bool) -> None:
        monkeypatch.setattr(
            Needs, "too_much", lambda self, _: "more" if streamed and "the model" in self.memory else ""
        )

    measured(before == "on")
    assert killed_after(2, recipe)
    measured(before == "off")
    pared.run(recipe, resume=True)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == (1 if before == "off" else 4)


def test_the_manifest_counts_the_time_of_every_process(place: Path, tmp_path: Path) -> None:
    recipe = recipe_of("wanda", place, tmp_path / "out")
    assert killed_after(1, recipe)
    assert killed_after(1, recipe, resume=True)
    entries = entries_of(run_folder(tmp_path / "out", "compress"), "compress")
    earlier = {entry["spent"]["process"]: entry["spent"] for entry in entries}
    assert sorted(earlier) == [1, 2]
    manifest = pared.run(recipe, resume=True).manifest
    assert manifest.resumed == 2
    assert manifest.seconds["load"] > sum(one["seconds"]["load"] for one in earlier.values()) > 0
    assert manifest.peak_memory_bytes >= max(one["peak"] for one in earlier.values())


def test_installed_blocks_are_not_made_again(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of("loss-optimal", place, tmp_path / "out")
    assert killed_after(5, recipe)  # three that were solved, two that were put in place
    made, install = [], KeptUnits.install
    monkeypatch.setattr(KeptUnits, "install", lambda self, chosen: (made.append(len(chosen)), install(self, chosen)))
    pared.run(recipe, resume=True)
    assert len(made) == 1


@pytest.mark.parametrize("stream", ["off", "on"])
def test_a_weight_file_that_vanished_is_told_and_what_is_done_is_kept(
    stream: str, place: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    TINY_MODELS["llama"]().save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    tokenizer.save_pretrained(tmp_path / "shards")
    recipe = recipe_of("sparsegpt", place, tmp_path / "jobs" / "out", model=str(tmp_path / "shards"), stream=stream)
    assert killed_after(2, recipe)
    state = run_folder(tmp_path / "jobs" / "out", "compress")
    before, (*_, shard) = held(state), sorted((tmp_path / "shards").glob("*.safetensors"))
    shard.rename(tmp_path / "away")
    with pytest.raises(ParedError, match=shard.name):
        pared.run(recipe, resume=True)
    assert held(state) == before
    (tmp_path / "away").rename(shard)
    pared.run(recipe, resume=True)
    assert [path.name for path in state.parent.iterdir()] == ["out"]
