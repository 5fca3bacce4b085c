"""Two processes that hold their parts of every parameter (FSDP) train what one process with twice the rows trains."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TINY_MODELS
from torch import nn
from transformers import PreTrainedTokenizerFast

import pared
from pared import ParedError, tune
from pared.checkpoint import load, verify
from pared.schema.manifest import Manifest
from pared.schema.training import TrainingConfig
from pared.training.callbacks import Watch
from pared.training.distributed import TrainingProcesses, units

KINDS: dict[str, dict[str, Any]] = {
    "factors": {"method": "svd-llm", "storage": "factors", "keep": 0.6},
    "shared": {"method": "basis-sharing", "options": {"sharing": "all"}, "keep": 0.7},
    "sparse": {"method": "wanda", "sparsity": 0.5},
}
TRAININGS: dict[str, dict[str, Any]] = {
    "full": {"model": "factors", "method": "full", "evaluate_every": 2, "patience": 3, "learning_rate": 1e-2},
    "stopping": {"model": "factors", "method": "full", "evaluate_every": 2, "patience": 1, "learning_rate": 1e-2},
    "shared": {"model": "shared", "method": "full", "learning_rate": 1e-2, "gradient_checkpointing": True},
    "distill": {"model": "factors", "method": "distill", "learning_rate": 1e-2, "accumulation": 2},
    "lora": {"model": "factors", "method": "lora", "learning_rate": 1e-2},
    "basel": {"model": "dense", "method": "basel", "learning_rate": 1e-3, "tokens": 768, "options": {
        "prunes": 3, "new": 2, "pruning_epochs": 1.0, "post_epochs": 1.0, "keep": 0.5, "coefficient_rate": 3.0}},
    "no new bases": {"model": "dense", "method": "basel", "learning_rate": 1e-3, "options": {
        "prunes": 2, "new": 0, "post_epochs": 0.0}},
    "lora of pruned": {"model": "sparse", "method": "lora", "learning_rate": 1e-2},
    "pruned": {"model": "sparse", "method": "full"},
    "fisher": {"model": "dense", "method": "basel", "options": {"prunes": 1, "new": 2, "importance": "fisher"}},
}  # fmt: skip
REFUSED = ("pruned", "fisher")
KILLED = ("full", "basel")  # and once more, stopped by a crash after four steps
# What both processes run: every training one after the other.
SCRIPT = """
import gc, json, os, sys, torch
import pared.training.callbacks as watch
from pared import ParedError
from pared import tune
from pared.training.distributed import gathered as whole, is_sharded
from pared.schema.training import TrainingConfig

torch.set_num_threads(int(os.environ["PARED_TEST_THREADS"]))
gc.freeze()
step = watch.Watch.on_step_end

def weigh(self, args, state, control, **more):
    grads = [whole(p.grad) for p in more["model"].parameters() if p.grad is not None]
    norms.setdefault(name, []).append(float(torch.stack([g.norm() for g in grads]).norm()))

def look(self, args, state, control, **more):
    held = [p.to_local() if is_sharded(p) else p for p in more["model"].parameters()]
    whole = sum(p.numel() for p in more["model"].parameters())
    shares[name] = sum(p.numel() for p in held) / whole
    if stops and state.global_step == 4:
        raise InterruptedError
    return step(self, args, state, control, **more)

watch.Watch.on_step_end, watch.Watch.on_pre_optimizer_step = look, weigh
shares, norms = {}, {}
for name, case in json.loads(open(sys.argv[1]).read()).items():
    stops = name.startswith("killed")
    try:
        tune(TrainingConfig.of(case))
    except InterruptedError:
        stops = False
        tune(TrainingConfig.of(case), resume=True)
    except ParedError as error:
        if int(os.environ["RANK"]) == 0:
            open(case["out"] + ".refused", "w").write(str(error))
open(f"{sys.argv[1]}-{os.environ['RANK']}", "w").write(json.dumps([shares, norms]))
"""


@pytest.fixture(scope="module")
def models(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast, calibration: pared.Calibration
) -> Path:
    """The dense model and what is made of it."""
    place = tmp_path_factory.mktemp("models")
    TINY_MODELS["llama"]().save_pretrained(place / "dense")
    tokenizer.save_pretrained(place / "dense")
    for kind, recipe in KINDS.items():
        pared.run(pared.Recipe.model_validate({"calibration": calibration, "model": str(place / "dense"),
                                               "out": str(place / kind), "evaluation": None, **recipe}))  # fmt: skip
    return place


def settings(models: Path, out: Path, text_file: Path, name: str) -> dict[str, Any]:
    case = {"length": 16, "validation": 4, "batch": 2, "tokens": 4 * 16 * 6, "checkpoint_every": 2,
            "data": [f"file:{text_file}"], "evaluation": None, **TRAININGS[name]}  # fmt: skip
    return {**case, "model": str(models / case["model"]), "out": str(out)}


@pytest.fixture(scope="module")
def together(models: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every training by two processes that Accelerate's launcher started for FSDP."""
    place = tmp_path_factory.mktemp("together")
    cases = {name: settings(models, place / name, text_file, name) for name in TRAININGS}
    cases |= {f"killed {name}": {**cases[name], "out": str(place / f"killed-{name}")} for name in KILLED}
    (place / "cases.json").write_text(json.dumps(cases))
    (place / "script.py").write_text(SCRIPT)
    launch = ["-m", "accelerate.commands.launch", "--use_fsdp", "--fsdp_version", "2", "--num_processes", "2",
              "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
              str(place / "script.py"), str(place / "cases.json")]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ["PARED_TEST_THREADS"], "PYTHONFAULTHANDLER": "1"}
    result = subprocess.run([sys.executable, *launch], capture_output=True, text=True, env=environment, check=False)
    _, _, crash = result.stderr.partition("Fatal Python error")  # where a process was when a signal ended it
    assert result.returncode == 0, crash[:4000] or result.stderr[-4000:]
    return place


@pytest.mark.parametrize("name", [name for name in TRAININGS if name not in REFUSED])
def test_shards_train_as_the_whole_does(
    models: Path, together: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    norms: list[float] = []

    def weigh(*_: Any, **more: Any) -> None:
        norms.append(
            float(torch.stack([p.grad.norm() for p in more["model"].parameters() if p.grad is not None]).norm())
        )

    monkeypatch.setattr(Watch, "on_pre_optimizer_step", weigh)
    alone = settings(models, tmp_path / "one", text_file, name)
    tune(TrainingConfig.of({**alone, "accumulation": 2 * alone.get("accumulation", 1)}))
    assert json.loads((together / "cases.json-0").read_text())[1][name] == pytest.approx(norms, rel=0.02)
    two, one = (Manifest.read(path).training[-1].stages for path in (together / name, tmp_path / "one"))
    assert [stage["steps"] for stage in two] == [stage["steps"] for stage in one]
    for ours, theirs in zip(two, one, strict=True):
        for (_, loss), (_, expected) in zip(ours["validation"], theirs["validation"], strict=True):
            assert loss == pytest.approx(expected, rel=1e-3)
    folders = (together / name, tmp_path / "one", models / TRAININGS[name]["model"])
    tokens = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours_BTV, theirs_BTV, before_BTV = (load(path)(tokens).logits for path in folders)
    assert float((ours_BTV - theirs_BTV).norm()) <= 0.02 * float((theirs_BTV - before_BTV).norm())
    assert verify(together / name) <= 1e-6


def test_each_process_holds_half_of_the_parameters(together: Path) -> None:
    for rank in (0, 1):
        shares, _ = json.loads((together / f"cases.json-{rank}").read_text())
        assert set(shares) == {*TRAININGS, *(f"killed {name}" for name in KILLED)} - set(REFUSED)
        assert all(share == pytest.approx(0.5, abs=0.02) for share in shares.values()), shares


@pytest.mark.parametrize("name", KILLED)
def test_shards_go_on_after_a_crash_and_end_the_same(together: Path, name: str) -> None:
    killed, whole = (load(together / folder).state_dict() for folder in (f"killed-{name}", name))
    assert all(torch.equal(killed[name], whole[name]) for name in whole)


@pytest.mark.parametrize(
    ("name", "message"), [("pruned", "zeros are kept in whole"), ("fisher", "takes gradients by itself")]
)
def test_what_needs_whole_weights_says_so(together: Path, name: str, message: str) -> None:
    assert message in (together / f"{name}.refused").read_text()
    assert not (together / name).exists()


def test_blocks_that_share_a_parameter_are_gathered_together_with_those_between() -> None:
    blocks = [nn.Linear(2, 2) for _ in range(5)]
    blocks[3].weight = blocks[1].weight
    assert [len(unit) for unit in units(blocks)] == [1, 3, 1]


@pytest.mark.parametrize("name", ["FSDP_OFFLOAD_PARAMS", "ACCELERATE_USE_DEEPSPEED"])
def test_what_a_launcher_asks_for_and_is_not_known_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "true")
    with pytest.raises(ParedError, match=f"does not know what {name} asks for"):
        TrainingProcesses("cpu")
