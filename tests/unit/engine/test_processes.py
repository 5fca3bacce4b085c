"""One compression by several processes: what one process makes, to rounding, and the same bits in all of them."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_ranks
from tiny_models import MIXTURES, TINY_MODELS, VOCAB
from torch import distributed

import pared
from pared.data.windows import Windows, digest_of
from pared.engine import compress_blocks, resolve
from pared.engine.state.run_state import CompressionRun
from pared.processes import ALONE, Processes

# Sums over windows are taken in another order: 1e-15 of a float64 sum, then the rounding of float32 weights, which the
# sequential methods carry on from block to block.
TOLERANCE = 1e-5
SEQUENTIAL = {"statistics": "sequential", "refit": "off"}

# name -> (family, windows, the fields of the recipe)
CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "svd-llm": ("llama", 8, {"method": "svd-llm", "keep": 0.7}),
    "data-free": ("llama", 8, {"method": "svd", "keep": 0.7}),
    "tied": ("qwen3", 8, {"method": "svd-llm-v2", "keep": 0.7}),
    "groups and refit": (
        "llama",
        8,
        {
            "method": "basis-sharing",
            "keep": 0.6,
            "refit": "update",
            "options": {"sharing": "all", "group_size": 2},
        },
    ),
    "refit in sequence": ("llama", 8, {"method": "svd-llm", "keep": 0.6, "refit": "sequential", "dense_path": 0.25}),
    "refit behind a dense block": ("gpt2", 8, {"method": "svd-llm", "keep": 0.6, "refit": "sequential-dense-block"}),
    "loss-optimal": ("llama", 8, {"method": "loss-optimal", "keep": 0.7, "statistics": "once"}),
    "widths": ("gpt2", 8, {"method": "loss-optimal", "keep": 0.7, "structures": "widths", "multiple_of": 4}),
    "heads": (
        "opt",
        8,
        {"method": "loss-optimal", "keep": 0.6, "structures": "widths", "multiple_of": 4, "heads": "on"},
    ),
    "a bias for channels": ("llama", 8, {"method": "flap", "keep": 0.7, "multiple_of": 4}),
    "gradients of weights": ("opt", 8, {"method": "llm-pruner", "keep": 0.7, "multiple_of": 4}),
    "mixed in sequence": ("llama", 8, {"method": "loss-optimal", "keep": 0.6, "structures": "mixed", "multiple_of": 4}),
    "loss-optimal in sequence": ("llama", 8, {"method": "loss-optimal", "keep": 0.7, **SEQUENTIAL, "dense_path": 0.3}),
    "examples in groups": (
        "llama",
        10,
        {"method": "fwsvd", "keep": 0.7, "options": {"fisher_batch": 3, "loss": "sampled"}},
    ),
    "experts": ("qwen2_moe", 8, {"method": "svd-llm", "keep": 0.7, **SEQUENTIAL}),
    "experts one by one": ("mixtral", 24, {"method": "svd-llm", "keep": 0.7}),
    "experts taken out": ("mixtral", 8, {"structures": "experts", "keep": 0.7}),
    "influence": ("llama", 8, {"method": "swift-svd", "keep": 0.7}),
    "trials": ("llama", 8, {"method": "svd", "keep": 0.7, "allocation": "sensitivity"}),
    "owl": ("llama", 8, {"method": "wanda", "sparsity": 0.5, "allocation": "owl"}),
    "tails": ("llama", 8, {"method": "magnitude", "sparsity": 0.5, "allocation": "alphapruning"}),
    "refined": ("llama", 8, {"method": "svd", "keep": 0.7, "refine": {"batch": 2, "lr": 1e-3}}),
    "sparsegpt": ("llama", 8, {"method": "sparsegpt", "pattern": "2:4"}),
    "fewer batches than processes": ("llama", 2, {"method": "loss-optimal", "keep": 0.7, "statistics": "once"}),
}


def windows(count: int) -> Windows:
    """Return windows of random tokens, the last of which repeats the first, as labels are drawn once for both."""
    tokens = torch.randint(3, VOCAB, (count, 12), generator=torch.Generator().manual_seed(count))
    tokens[-1] = tokens[0]
    return Windows(tokens, digest_of(tokens), "random", "made here", stand_in=True)


def trial(model: torch.nn.Module) -> Callable[[Windows], float]:
    def measure(on: Windows) -> float:
        with torch.no_grad():
            return float(model(input_ids=on.tokens, labels=on.tokens).loss)

    return measure


def compressed(name: str, processes: Processes, state: CompressionRun | None = None) -> dict[str, Any]:
    family, count, fields = CASES[name]
    torch.manual_seed(0)
    model = (TINY_MODELS | MIXTURES)[family]()
    calibration = {"samples": count, "length": 12, "batch": 2, "dtype": "float32"}
    recipe = pared.Recipe.model_validate({"calibration": calibration, "evaluation": None, **fields})
    on = trial(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pared.engine.families.trials.trial_windows", lambda *_: windows(4))
        result = compress_blocks(
            model,
            None,  # type: ignore[arg-type] # texts are cut already
            resolve(recipe),
            windows=windows(count),
            trial=lambda cut: on(cut) if processes.is_first else pytest.fail("the first process alone measures"),
            processes=processes,
            state=state,
        )
    own = dict(model.named_parameters())  # of experts a site is a parameter
    found = {s.name: own[s.name] if s.name in own else model.get_submodule(s.name).weight for s in result.plan.sites}
    sites = {name: weight.detach().clone() for name, weight in found.items()}
    plan = result.plan.model_dump(mode="json")
    told = [result.damping, result.fallbacks, [one.name for one in result.sharing], result.calibration]
    return {"weights": sites, "state": digest(model), "plan": plan, "told": told}


def digest(model: torch.nn.Module) -> str:
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def compress_all(rank: int, place: Path) -> None:
    processes = Processes(rank, distributed.get_world_size())
    torch.save({name: compressed(name, processes) for name in CASES}, place / f"rank-{rank}")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PARED_CACHE", str(tmp_path_factory.mktemp("cache")))  # of trials
        return {name: compressed(name, ALONE) for name in CASES}


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    place = tmp_path_factory.mktemp("ranks")
    run_ranks(request.param, compress_all, place)
    return [torch.load(place / f"rank-{rank}", weights_only=False) for rank in range(request.param)]


@pytest.mark.parametrize("name", CASES)
def test_every_process_ends_with_the_same_bits_and_the_same_plan(name: str, ranks: list[dict[str, Any]]) -> None:
    for other in ranks[1:]:
        assert other[name]["state"] == ranks[0][name]["state"]
        assert other[name]["plan"] == ranks[0][name]["plan"]
        assert other[name]["told"] == ranks[0][name]["told"]


@pytest.mark.parametrize("name", CASES)
def test_several_processes_make_what_one_makes(
    name: str, ranks: list[dict[str, Any]], alone: dict[str, dict[str, Any]]
) -> None:
    one, found = alone[name], ranks[0][name]
    assert [site["decision"] for site in found["plan"]["sites"]] == [site["decision"] for site in one["plan"]["sites"]]
    assert found["told"][1:] == one["told"][1:]
    assert found["told"][0] == pytest.approx(one["told"][0])
    for site, weight in one["weights"].items():
        difference = float((found["weights"][site] - weight).norm() / weight.norm())
        assert difference <= TOLERANCE, (site, difference)
