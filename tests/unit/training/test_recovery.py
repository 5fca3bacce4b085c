"""Compressed models are trained: what trains, what stays, and what a killed training leaves behind."""

import errno
import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from processes import PATIENCE, kill_when, start
from tiers import crossed
from tiny_models import TINY_MODELS
from torch import nn
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import pared
from pared import ParedError, tune
from pared.checkpoint import load, verify
from pared.cli.commands import app
from pared.io.journal import sealed
from pared.modules import SparseLinear
from pared.schema.manifest import Manifest
from pared.schema.training import TrainingConfig
from pared.training import METHODS
from pared.training.dataset import collate
from pared.training.distill import distillation_loss, divergence, share_frozen
from pared.training.distributed import TrainingProcesses
from pared.training.run_dir import TrainingRun
from pared.training.trainable import compressed_layers

KINDS: dict[str, dict[str, Any]] = {
    "factors": {"method": "svd-llm", "storage": "factors", "keep": 0.6},
    "pivoted": {"method": "svd-llm", "storage": "pivoted", "keep": 0.6},
    "shared": {"method": "basis-sharing", "options": {"sharing": "all"}, "keep": 0.7},
    "sparse": {"method": "wanda", "sparsity": 0.5},
    "2:4": {"method": "wanda", "pattern": "2:4"},
}
Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast, calibration: pared.Calibration
) -> Folder:
    """A compressed folder of every kind, with its dense parent beside it."""
    place = tmp_path_factory.mktemp("recovery")
    dense = TINY_MODELS["llama"]()
    dense.save_pretrained(place / "dense")
    tokenizer.save_pretrained(place / "dense")
    made: dict[str, Path] = {}

    def of(kind: str) -> Path:
        if kind not in made:
            made[kind] = place / kind.replace(":", "-")
            evaluation = {"text": calibration.text, "length": 16, "windows": 4}
            recipe = {"calibration": calibration, "model": str(place / "dense"), "out": str(made[kind]),
                      "evaluation": evaluation, **KINDS[kind]}  # fmt: skip
            pared.run(pared.Recipe.model_validate(recipe))
        return made[kind]

    return of


def asked(folder: Path, out: Path, text_file: Path, **more: Any) -> TrainingConfig:
    return TrainingConfig.of({
        "model": str(folder), "out": str(out), "data": [f"file:{text_file}"], "length": 16, "validation": 4,
        "batch": 4, "tokens": 4 * 16 * 6, "learning_rate": 1e-2, **more,
    })  # fmt: skip


def parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


# The loss of distillation.


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_divergence_and_its_gradient_are_those_of_torch(temperature: float) -> None:
    student = torch.randn(150, 37, dtype=torch.float64).float().requires_grad_()
    teacher = torch.randn(150, 37) * 3
    expected = nn.functional.kl_div(
        (student / temperature).log_softmax(-1), (teacher / temperature).softmax(-1), reduction="batchmean"
    ) * temperature**2  # fmt: skip
    (wanted,) = torch.autograd.grad(expected, student)
    found = divergence(student, teacher, temperature)
    (gradient,) = torch.autograd.grad(found * 1.0, student)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-7)


def test_divergence_of_a_model_from_itself_is_zero_and_so_is_its_gradient() -> None:
    logits = torch.randn(10, 7, requires_grad=True)
    loss = divergence(logits, logits.detach())
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)
    assert float(logits.grad.abs().max()) < 1e-7


def test_logits_of_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected \(tokens, vocabulary\) of both"):
        divergence(torch.zeros(2, 3), torch.zeros(3, 2))


def test_padding_does_not_teach() -> None:
    teacher, student = TINY_MODELS["llama"](), TINY_MODELS["llama"]()
    with torch.no_grad():
        student.model.layers[0].mlp.up_proj.weight.mul_(0.5)
    loss = distillation_loss(teacher, {"temperature": 1.0, "text": 0.0, "hidden": 0.0})
    long, short = (_row(count) for count in (9, 5))
    padded = collate([long, {**short, "attention_mask": torch.ones(5, dtype=torch.int64)}])
    expected = (
        9 * float(loss(student, collate([long])).detach()) + 5 * float(loss(student, collate([short])).detach())
    ) / 14
    assert float(loss(student, padded).detach()) == pytest.approx(expected, rel=1e-4)


def test_the_text_may_have_a_share_of_the_loss() -> None:
    teacher, student = TINY_MODELS["llama"](), TINY_MODELS["llama"]()
    with torch.no_grad():
        student.model.layers[0].mlp.up_proj.weight.mul_(0.5)
    batch = collate([_row(9)])
    losses = [
        distillation_loss(teacher, {"temperature": 1.0, "text": text, "hidden": 0.0}) for text in (0.0, 0.25, 1.0)
    ]
    found = [float(loss(student, batch).detach()) for loss in losses]
    assert found[2] == pytest.approx(float(student(**batch).loss.detach()), rel=1e-5)
    assert found[1] == pytest.approx(0.75 * found[0] + 0.25 * found[2], rel=1e-5)


def test_hidden_states_of_the_teacher_are_wanted_too_where_that_is_asked_for() -> None:
    teacher, student = TINY_MODELS["llama"](), TINY_MODELS["llama"]()
    batch = collate([_row(9)])
    itself = distillation_loss(teacher, {"temperature": 1.0, "text": 0.0, "hidden": 1.0})(teacher, batch)
    assert float(itself.detach()) == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        student.model.layers[0].mlp.up_proj.weight.mul_(0.5)
    plain, more = (
        float(distillation_loss(teacher, {"temperature": 1.0, "text": 0.0, "hidden": hidden})(student, batch).detach())
        for hidden in (0.0, 1.0)
    )
    assert more > plain


def test_an_encoder_is_taught_the_classes_of_its_teacher() -> None:
    teacher, student = TINY_MODELS["bert"](), TINY_MODELS["bert"]()
    batch = {"input_ids": torch.randint(3, 64, (3, 9)), "attention_mask": torch.ones(3, 9, dtype=torch.int64),
             "labels": torch.tensor([0, 1, 2])}  # fmt: skip
    loss = distillation_loss(teacher, {"temperature": 2.0, "text": 0.0, "hidden": 0.5})
    assert float(loss(teacher, batch).detach()) == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        student.classifier.weight.mul_(2)
    assert float(loss(student, batch).detach()) > 0


def _row(count: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 64, (count,))
    return {"input_ids": ids, "labels": ids}


def test_a_score_is_taught_by_its_distance() -> None:
    config = transformers.BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                     intermediate_size=32, num_labels=1)  # fmt: skip
    teacher, student = (transformers.BertForSequenceClassification(config) for _ in range(2))
    batch = {"input_ids": torch.randint(0, 64, (3, 5)), "labels": torch.zeros(3)}
    options = {"temperature": 1.0, "hidden": 0.0, "text": 0.0}
    loss = distillation_loss(teacher.eval(), options)(student.eval(), batch)
    with torch.no_grad():
        apart = [model(input_ids=batch["input_ids"]).logits for model in (teacher, student)]
    torch.testing.assert_close(loss, (apart[0] - apart[1]).square().mean())
    assert loss > 0
    loss.backward()
    assert student.classifier.weight.grad is not None


def test_teacher_and_student_hold_one_embedding(folder: Folder) -> None:
    student, teacher = load(folder("factors")), load(folder("factors").parent / "dense")
    student.requires_grad_(False)
    for layer in compressed_layers(student).values():
        layer.requires_grad_(True)
    saved = share_frozen(student, teacher)
    assert saved >= student.get_input_embeddings().weight.numel() * 4
    assert student.get_input_embeddings().weight.data_ptr() == teacher.get_input_embeddings().weight.data_ptr()


def test_rows_are_as_long_as_they_are_and_padded_only_within_their_batch(tokenizer: PreTrainedTokenizerFast) -> None:
    from pared.data.encoding import cut_examples
    from pared.data.examples import Example, Examples
    from pared.training.dataset import rows_of

    texts = ("w3 w4", "w5 w6 w7 w8 w9", "w3")
    examples = Examples("some", tuple(Example((text,), 1) for text in texts), "here")
    rows = rows_of(cut_examples(examples, tokenizer, TINY_MODELS["bert"]().config, 32, None))
    lengths = [len(row["input_ids"]) for row in rows]
    assert lengths[0] - lengths[2] == 1
    assert lengths[1] - lengths[2] == 4
    batch = collate([rows[0], rows[2]])
    assert batch["input_ids"].shape == (2, lengths[0])
    assert batch["attention_mask"].sum(dim=1).tolist() == [lengths[0], lengths[2]]
    assert batch["labels"].tolist() == [1, 1]


# Every method on every kind.


@pytest.mark.parametrize(
    ("method", "kind"), crossed([name for name, method in METHODS.items() if not method.compresses], list(KINDS))
)
def test_every_method_trains_every_kind_of_folder(
    folder: Folder, tmp_path: Path, text_file: Path, method: str, kind: str
) -> None:
    before = load(folder(kind))
    made = tune(asked(folder(kind), tmp_path / "out", text_file, method=method))
    after = load(tmp_path / "out")
    assert verify(tmp_path / "out") <= 1e-6
    assert before.config.quantization_config.modules == after.config.quantization_config.modules
    changed = {name for name, value in parameters(after).items() if not torch.equal(value, parameters(before)[name])}
    assert changed
    frozen = [name for name in changed if "embed" in name or "lm_head" in name]
    assert not frozen
    training = made.manifest.training[-1]
    assert training.stages[0]["steps"] == 6
    assert math.isfinite(training.perplexity_before)
    assert training.perplexity_after != training.perplexity_before
    assert made.manifest.perplexity_after == training.perplexity_after
    assert not list(tmp_path.glob(".out*"))
    for name, layer in compressed_layers(after).items():
        if isinstance(layer, SparseLinear):
            assert torch.equal(layer.mask, before.get_submodule(name).mask)


def test_distillation_brings_the_student_nearer_to_its_teacher(folder: Folder, tmp_path: Path, text_file: Path) -> None:
    options = {"text": 0.0}  # the teacher alone
    made = tune(
        asked(folder("factors"), tmp_path / "out", text_file, method="distill", options=options, tokens=4 * 16 * 60)
    )
    first, last = made.manifest.training[-1].stages[0]["loss"]
    assert last < 0.7 * first
    ids = torch.randint(3, 64, (4, 16))
    with torch.no_grad():
        dense, old, new = (
            load(path)(ids).logits.log_softmax(-1)
            for path in (folder("factors").parent / "dense", folder("factors"), tmp_path / "out")
        )
    apart = [float(nn.functional.kl_div(one, dense, log_target=True, reduction="sum")) for one in (old, new)]
    assert apart[1] < apart[0]


@pytest.mark.parametrize("kind", ["factors", "shared", "sparse"])
def test_distillation_through_adapters_moves_what_adapters_move_and_nears_the_teacher(
    folder: Folder, tmp_path: Path, text_file: Path, kind: str
) -> None:
    before = load(folder(kind))
    made = tune(asked(folder(kind), tmp_path / "out", text_file, method="distill", options={"adapters": 4},
                      tokens=4 * 16 * 30))  # fmt: skip
    after = load(made.folder)
    changed = {name for name, value in parameters(after).items() if not torch.equal(value, parameters(before)[name])}
    layers = compressed_layers(before)
    assert changed == {f"{name}.values" if kind == "sparse" else f"{name}.up.weight" for name in layers}
    assert before.config.quantization_config.modules == after.config.quantization_config.modules
    first, last = made.manifest.training[-1].stages[0]["loss"]
    assert last < first


def test_a_shared_basis_is_one_tensor_still_and_no_adapter_touched_it(
    folder: Folder, tmp_path: Path, text_file: Path
) -> None:
    before, made = load(folder("shared")), tune(asked(folder("shared"), tmp_path / "out", text_file, method="lora"))
    after = load(made.folder)
    for name, layer in compressed_layers(after).items():
        if layer.shares is not None:
            assert layer.down.weight is after.get_parameter(layer.shares)
            assert torch.equal(layer.down.weight, before.get_submodule(name).down.weight)
            assert not torch.equal(layer.up.weight, before.get_submodule(name).up.weight)


@pytest.mark.parametrize(
    ("part", "moves"), [("factors", set()), ("factors+norms", {"norm"}), ("all", {"norm", "embed"})]
)
def test_what_trains_is_what_was_asked_for(
    folder: Folder, tmp_path: Path, text_file: Path, part: str, moves: set[str]
) -> None:
    before = parameters(load(folder("factors")))
    made = tune(asked(folder("factors"), tmp_path / "out", text_file, method="full", options={"train": part}))
    after = parameters(load(made.folder))
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert {name for name in changed if "norm" in name} == {name for name in after if "norm" in name and moves}
    assert bool([name for name in changed if "embed" in name]) == ("embed" in moves)
    assert all(name in changed for name in after if name.endswith((".up.weight", ".down.weight")))


def test_adapters_one_factor_after_the_other_change_both(folder: Folder, tmp_path: Path, text_file: Path) -> None:
    options = {"order": "sequential"}
    before = load(folder("factors"))
    made = tune(asked(folder("factors"), tmp_path / "out", text_file, method="lora", options=options))
    assert [stage["name"] for stage in made.manifest.training[-1].stages] == ["lora up", "lora down"]
    assert [stage["steps"] for stage in made.manifest.training[-1].stages] == [3, 3]
    after = load(made.folder)
    for name, layer in compressed_layers(after).items():
        old = before.get_submodule(name)
        assert not torch.equal(layer.down.weight, old.down.weight)
        assert not torch.equal(layer.up.weight, old.up.weight)


def test_trainings_of_a_folder_are_a_chain(folder: Folder, tmp_path: Path, text_file: Path) -> None:
    tune(asked(folder("factors"), tmp_path / "one", text_file, method="distill"))
    made = tune(asked(tmp_path / "one", tmp_path / "two", text_file, method="lora"))
    chain = made.manifest.training
    assert [entry.tuning.method for entry in chain] == ["distill", "lora"]
    assert chain[1].parent["name"] == "one"
    assert chain[1].perplexity_before == chain[0].perplexity_after
    assert "distill" in (tmp_path / "two" / "README.md").read_text()
    told = CliRunner().invoke(app, ["info", str(tmp_path / "two")]).output
    assert told.index("trained by distill") < told.index("trained by lora")


# How long, how often, what is best.


def test_patience_keeps_the_best_state(folder: Folder, tmp_path: Path, text_file: Path) -> None:
    made = tune(asked(
        folder("factors"), tmp_path / "out", text_file, method="full", learning_rate=0.3, tokens=4 * 16 * 40,
        evaluate_every=2, patience=3,
    ))  # fmt: skip
    (stage,) = made.manifest.training[-1].stages
    losses = [loss for _, loss in stage["validation"]]
    assert stage["steps"] < 40
    assert losses.index(min(losses)) == len(losses) - 4
    rows = [row[None] for row in _validation_rows(text_file, tmp_path)]
    model = load(tmp_path / "out")
    with torch.no_grad():
        again = sum(float(model(input_ids=row, labels=row).loss) for row in rows) / len(rows)
    assert again == pytest.approx(min(losses), rel=1e-3)


def test_a_training_that_makes_it_worse_says_so(folder: Folder, tmp_path: Path, text_file: Path) -> None:
    """Regression: a rate that was too high for a model handed back a worse one, without a word."""
    told = {}
    for rate in (1.0, 1e-3):
        made = tune(asked(folder("factors"), tmp_path / f"{rate}", text_file, method="full", learning_rate=rate))
        (stage,) = made.manifest.training[-1].stages
        (first, before), (_, after) = stage["validation"][0], stage["validation"][-1]
        assert first == 0
        told[after > before] = " ".join(stage["notes"])
    assert "the loss on rows never trained on rose from" in told[True]
    assert told[False] == ""


def test_patience_keeps_what_training_began_with_where_nothing_is_better(
    folder: Folder, tmp_path: Path, text_file: Path
) -> None:
    made = tune(asked(
        folder("factors"), tmp_path / "out", text_file, method="full", learning_rate=1.0, tokens=4 * 16 * 20,
        evaluate_every=1, patience=3, warmup=0.0,
    ))  # fmt: skip
    (stage,) = made.manifest.training[-1].stages
    assert min(stage["validation"], key=lambda one: one[1])[0] == 0
    before, after = (parameters(load(path)) for path in (folder("factors"), tmp_path / "out"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def _validation_rows(text_file: Path, tmp_path: Path) -> list[torch.Tensor]:
    from pared.checkpoint import load_tokenizer
    from pared.training.dataset import find_rows

    asked_of = TrainingConfig.of({"data": [f"file:{text_file}"], "length": 16, "validation": 4})
    found = find_rows(asked_of, load_tokenizer(tmp_path / "out"), load(tmp_path / "out").config, True)
    assert len(found.validation) == 4
    return [row["input_ids"] for row in found.validation]


def test_epochs_and_tokens_are_counted_in_steps(folder: Folder, tmp_path: Path, text_file: Path) -> None:
    rows = 1000 // 16 - 4
    made = tune(asked(
        folder("factors"), tmp_path / "out", text_file, method="lora", tokens=None, epochs=0.5, accumulation=2
    ))  # fmt: skip
    (stage,) = made.manifest.training[-1].stages
    assert stage["steps"] == math.ceil(0.5 * math.ceil(rows / 8))
    assert stage["tokens"] == stage["steps"] * 8 * 16


# Crashes.


def test_a_training_killed_at_any_step_goes_on_and_ends_the_same(
    folder: Folder, tmp_path: Path, text_file: Path
) -> None:
    settings = {"method": "distill", "tokens": 4 * 16 * 30, "checkpoint_every": 5, "evaluate_every": 5}
    tune(asked(folder("factors"), tmp_path / "whole", text_file, **settings))
    arguments = ["tune", str(folder("factors")), "--out", str(tmp_path / "killed"), "--data", f"file:{text_file}",
                 "--length", "16", "--validation", "4", "--batch", "4", "--tokens", str(4 * 16 * 30),
                 "--learning-rate", "0.01", "--method", "distill", "--checkpoint-every", "5",
                 "--evaluate-every", "5"]  # fmt: skip
    state = tmp_path / ".killed.training" / "state-1"
    kill_when(arguments, lambda: any(state.glob("checkpoint-*/WHOLE")))
    assert not (tmp_path / "killed").exists()
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 2
    assert "--resume continues it, --restart removes it" in " ".join(refused.output.split())
    result = CliRunner().invoke(app, [*arguments, "--resume"])
    assert result.exit_code == 0, result.output
    resumed, whole = (Manifest.read(tmp_path / name).training[-1] for name in ("killed", "whole"))
    assert "resuming the training" in result.output
    assert "trained; the folder is written, reloaded and compared" in result.output  # long, and was silent
    assert resumed.stages[0]["validation"] == whole.stages[0]["validation"]
    mine, theirs = parameters(load(tmp_path / "killed")), parameters(load(tmp_path / "whole"))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_another_training_of_the_same_output_is_refused_and_nothing_is_lost(
    folder: Folder, tmp_path: Path, text_file: Path
) -> None:
    work = tmp_path / ".out.training"
    work.mkdir()
    content, _ = sealed({"seed": 7})
    (work / "settings.json").write_bytes(content)
    with pytest.raises(ParedError, match=r"holds an unfinished run with other settings \(.* and \d+ more\)"):
        tune(asked(folder("factors"), tmp_path / "out", text_file), resume=True)
    assert (work / "settings.json").read_bytes() == content


def test_a_checkpoint_that_was_not_written_to_its_end_is_not_gone_on_from(tmp_path: Path) -> None:
    with TrainingRun.beside(tmp_path / "out", {}, TrainingProcesses("cpu")) as run:
        for step, whole in ((5, True), (10, True), (15, False)):
            (run.state(1) / f"checkpoint-{step}").mkdir(parents=True)
            if whole:
                (run.state(1) / f"checkpoint-{step}" / "WHOLE").touch()
        assert run.last_checkpoint(1).name == "checkpoint-10"


def test_two_trainings_of_one_output_at_a_time_are_refused(tmp_path: Path) -> None:
    with (
        TrainingRun.beside(tmp_path / "out", {}, TrainingProcesses("cpu")),
        pytest.raises(ParedError, match="another process is at work on this output"),
        TrainingRun.beside(tmp_path / "out", {}, TrainingProcesses("cpu")),
    ):
        pass


def test_a_loss_that_is_no_number_is_an_error_that_names_the_step(
    folder: Folder, tmp_path: Path, text_file: Path
) -> None:
    with pytest.raises(ParedError, match=r"the loss is nan at step \d+; train with a smaller learning rate"):
        tune(asked(folder("factors"), tmp_path / "out", text_file, method="full", learning_rate=1e30, clip=1e30))
    assert not (tmp_path / "out").exists()


def test_a_crash_after_the_last_step_trains_no_step_more(
    folder: Folder, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"method": "full", "checkpoint_every": 3}
    whole = tune(asked(folder("factors"), tmp_path / "whole", text_file, **settings))
    again = asked(folder("factors"), tmp_path / "again", text_file, **settings)
    with monkeypatch.context() as broken:
        broken.setattr("pared.entrypoints.train.save", _no_space)
        with pytest.raises(ParedError, match="the disk filled up"):
            tune(again)
    resumed = tune(again, resume=True)
    assert resumed.manifest.training[-1].stages == whole.manifest.training[-1].stages
    mine, theirs = (parameters(load(tmp_path / name)) for name in ("again", "whole"))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def _no_space(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# Several processes.


def by_two(arguments: list[str], place: Path) -> str:
    """Let two processes do this that are told of each other as torchrun tells its processes; what both print."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    told = [place / f"told-{rank}" for rank in (0, 1)]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    both = [start(arguments, told[rank], {**world, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in (0, 1)]
    for process, path in zip(both, told, strict=True):
        process.join(PATIENCE)
        assert process.exitcode == 0, path.read_text()[-2000:]
    return "".join(path.read_text() for path in told)


def by_torchrun(arguments: list[str], place: Path) -> str:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
              "-m", "pared.cli.main"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ["PARED_TEST_THREADS"]}
    result = subprocess.run([*launch, *arguments], capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.mark.parametrize("launch", [by_two, pytest.param(by_torchrun, marks=pytest.mark.slow)])
def test_two_processes_train_as_one_with_twice_the_rows(
    folder: Folder, tmp_path: Path, text_file: Path, launch: Callable[[list[str], Path], str]
) -> None:
    settings = {"method": "full", "evaluate_every": 2, "patience": 3}
    tune(asked(folder("factors"), tmp_path / "one", text_file, **settings, accumulation=2))
    arguments = ["tune", str(folder("factors")), "--out", str(tmp_path / "two"), "--data", f"file:{text_file}",
                 "--length", "16", "--validation", "4", "--batch", "4", "--tokens", str(4 * 16 * 6),
                 "--learning-rate", "0.01", "--method", "full", "--evaluate-every", "2", "--patience", "3"]  # fmt: skip
    assert launch(arguments, tmp_path).count("folder: ") == 1
    two = Manifest.read(tmp_path / "two").training[-1].stages[0]
    one = Manifest.read(tmp_path / "one").training[-1].stages[0]
    assert two["steps"] == one["steps"] == 3
    assert two["tokens"] == one["tokens"]
    assert [step for step, _ in two["validation"]] == [step for step, _ in one["validation"]]
    for (_, loss), (_, expected) in zip(two["validation"], one["validation"], strict=True):
        assert loss == pytest.approx(expected, rel=1e-4)
    before, ours, theirs = (parameters(load(path)) for path in (folder("factors"), tmp_path / "two", tmp_path / "one"))
    for name in ours:
        moved = float((theirs[name].float() - before[name].float()).norm())
        assert float((ours[name].float() - theirs[name].float()).norm()) <= 0.05 * moved + 1e-6, name
    assert verify(tmp_path / "two") <= 1e-6
    assert not list(tmp_path.glob(".two*"))


# What is multiplied in, what is measured.


@pytest.mark.parametrize("method", ["full", "distill", "lora"])
@pytest.mark.parametrize("precision", ["auto", "float32", "bfloat16"])
def test_a_bfloat16_folder_trains_in_every_precision(
    folder: Folder, tmp_path: Path, text_file: Path, method: str, precision: str
) -> None:
    from pared.checkpoint import load_tokenizer, mark, save
    from pared.checkpoint.seal import record

    model = load(folder("factors")).to(torch.bfloat16)
    mark(model)
    save(model, load_tokenizer(folder("factors")), tmp_path / "half")
    Manifest.read(folder("factors")).write(tmp_path / "half")
    record(tmp_path / "half")
    made = tune(asked(tmp_path / "half", tmp_path / "out", text_file, method=method, precision=precision, tokens=128))
    assert load(made.folder).dtype == torch.bfloat16
    expected = "bfloat16" if precision == "auto" else precision
    assert made.manifest.training[-1].settled["precision"] == expected


@pytest.mark.parametrize("method", ["full", "lora"])
def test_activations_computed_again_change_nothing(
    folder: Folder, tmp_path: Path, text_file: Path, method: str
) -> None:
    made = [
        load(tune(asked(folder("factors"), tmp_path / str(again), text_file, method=method,
                        gradient_checkpointing=again)).folder).state_dict()
        for again in (False, True)
    ]  # fmt: skip
    assert all(torch.allclose(made[0][name], made[1][name], atol=1e-6) for name in made[0])


def test_float16_is_not_trained_in() -> None:
    from pared.training.precision import training_precision

    cpu = torch.device("cpu")
    assert training_precision("auto", torch.float16, cpu) == torch.bfloat16
    with pytest.raises(ParedError, match="use bfloat16 or float32"):
        training_precision("float16", torch.float32, cpu)


def test_options_of_evaluation_hold_for_the_text_of_the_parent_too(
    folder: Folder, tmp_path: Path, text_file: Path
) -> None:
    evaluation = {"length": 8, "windows": 9}
    made = tune(asked(folder("factors"), tmp_path / "out", text_file, tokens=128, evaluation=evaluation))
    on = made.manifest.training[-1].evaluation
    assert (on["length"], on["windows"], on["text"]) == (8, 9, "file:words.txt")
    assert made.manifest.perplexity_after is None  # the parent was measured on other windows


def test_a_tracker_that_is_not_here_is_refused_before_anything_is_read(tmp_path: Path, text_file: Path) -> None:
    with pytest.raises(ParedError, match="unknown tracker 'tensorbord'; did you mean 'tensorboard'"):
        tune(asked(tmp_path / "nowhere", tmp_path / "out", text_file, report_to=["tensorbord"]))


# Bad input.


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "lorra"}, "unknown training method 'lorra'; did you mean 'lora'"),
        ({"options": {"temprature": 2.0}}, "training method distill has no option 'temprature'"),
        ({"options": {"temperature": 0.0}}, "option temperature: expected more than 0, got 0.0"),
        ({"options": {"text": 1.5}}, "option text: expected a share, 0 to 1, got 1.5"),
        ({"options": {"adapters": -1}}, "option adapters: expected a rank, or 0 for none, got -1"),
        ({"method": "lora", "options": {"factor": "left"}}, "option factor: expected one of up, down, both"),
        ({"method": "lora", "options": {"targets": "up"}}, "is option factor: factor=up"),
        ({"method": "lora", "options": {"dropout": 1.0}}, "option dropout: expected a share, 0 to below 1, got 1.0"),
        ({"method": "lora", "warmup": 1.5}, "a whole number of steps from 1; got 1.5"),
        ({"method": "full", "options": {"train": "none"}}, "option train: expected one of factors, factors+norms, all"),
        ({"length": 100, "validation": 10}, "nothing is left to train on"),
        ({"options": {"teacher": "/nowhere"}}, "teacher '/nowhere'"),
        ({"model": "/nowhere"}, "model '/nowhere': no such folder"),
    ],
)
def test_what_cannot_be_is_refused(
    folder: Folder, tmp_path: Path, text_file: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ParedError) as error:
        tune(asked(folder("factors"), tmp_path / "out", text_file, **fields))
    assert message in str(error.value)
    assert not list(tmp_path.glob("*out*"))  # nor a folder that would refuse the corrected command


def test_a_dense_model_is_refused_and_told_what_to_do(folder: Folder, tmp_path: Path, text_file: Path) -> None:
    dense = folder("factors").parent / "dense"
    with pytest.raises(ParedError, match="dense is a dense model, and this method trains a folder that pared made"):
        tune(asked(dense, tmp_path / "out", text_file, method="lora"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lenght": 4}, "unknown key 'lenght'; did you mean 'length'"),
        ({"tokens": 5, "epochs": 2.0}, "tokens 5 and epochs 2 are two lengths; give one"),
        ({"patience": 2}, "say how often to measure with evaluate_every"),
        ({"evaluate_every": 2, "validation": 0}, "measures on the validation part, and validation is 0"),
        ({"data": []}, "data names nothing to train on"),
        ({"evaluation": {"txt": "x"}}, "unknown key 'evaluation.txt'"),
    ],
)
def test_a_tuning_that_cannot_be_is_told_in_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ParedError) as error:
        TrainingConfig.of(fields)
    assert message in str(error.value)
