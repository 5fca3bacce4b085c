"""What runs on a GPU gives what it gives on a CPU, to a tolerance that is stated; a tiny random model of each kind.

The reference is always computed on the CPU, by the same functions.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TINY_MODELS
from tiny_tokenizer import tiny_tokenizer
from transformers import PreTrainedModel

import pared
from pared.calibration.statistics import STATISTICS, statistic_kind
from pared.calibration.statistics.gram import Gram
from pared.engine.cost.measured import Measured
from pared.lowrank.decomposition import Factors
from pared.lowrank.eigen import eigh
from pared.lowrank.pivot import pivot, unpivot
from pared.modules import SparseLinear
from pared.modules.sparse import NMGroups
from pared.operations import KINDS, Operation
from pared.sparsity import NM, Unstructured, magnitude, sparsegpt

pytestmark = pytest.mark.gpu
NEAR = 1e-3  # of the largest logit: float32 sums in another order, through a decomposition
WORDS = " ".join(f"w{(7 * place * place + 3 * place) % 64}" for place in range(1500))
TEXT: dict[str, Any] = {"samples": 8, "length": 32, "evaluation": None}
CASES: dict[str, dict[str, Any]] = {
    "svd": {"method": "svd", "keep": 0.6},
    "fwsvd": {"method": "fwsvd", "keep": 0.6},
    "asvd": {"method": "asvd", "keep": 0.6},
    "svd-llm": {"method": "svd-llm", "keep": 0.6},
    "basis-sharing, refit": {"method": "basis-sharing", "keep": 0.5, "options": {"sharing": "all"}},
    "loss-optimal": {"method": "loss-optimal", "keep": 0.8, "allocation": "uniform"},
    "loss-optimal, sequential": {"method": "loss-optimal", "keep": 0.5, "allocation": "uniform"},
    "loss-optimal, factors": {"method": "loss-optimal", "keep": 0.6, "storage": "factors", "allocation": "uniform"},
    "magnitude": {"method": "magnitude", "sparsity": 0.5},
    "wanda": {"method": "wanda", "sparsity": 0.5},
    "sparsegpt": {"method": "sparsegpt", "sparsity": 0.5},
    "wanda, 2:4": {"method": "wanda", "pattern": "2:4"},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    TINY_MODELS["llama"]().save_pretrained(folder / "llama")
    tiny_tokenizer(64).save_pretrained(folder / "llama")
    (folder / "words.txt").write_text(WORDS)
    return folder


def compressed(place: Path, where: torch.device, fields: Mapping[str, Any], **more: Any) -> Any:
    asked = {"data": f"file:{place / 'words.txt'}", **TEXT, **fields, **more}
    return pared.compress(place / "llama", device=str(where), **asked)


def logits(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.arange(48).remainder(64).view(2, 24).to(model.device)
    with torch.no_grad():
        return model(input_ids=ids).logits.cpu()


def near(found: torch.Tensor, expected: torch.Tensor, tolerance: float = NEAR) -> bool:
    return float((found.cpu().double() - expected.double()).abs().max()) <= tolerance * float(expected.abs().max())


@pytest.mark.parametrize("case", CASES)
def test_a_compression_is_that_of_the_cpu(case: str, place: Path, device: torch.device) -> None:
    here, there = (compressed(place, where, CASES[case]) for where in (torch.device("cpu"), device))
    assert there.model.device.type == device.type
    assert [(site.name, type(site.decision)) for site in there.plan.sites] == [
        (site.name, type(site.decision)) for site in here.plan.sites
    ]
    assert near(logits(there.model), logits(here.model))


@pytest.mark.parametrize("case", ["svd-llm", "basis-sharing, refit", "loss-optimal, sequential", "wanda", "sparsegpt"])
def test_a_streamed_compression_is_that_in_memory(case: str, place: Path, device: torch.device, tmp_path: Path) -> None:
    whole = compressed(place, device, CASES[case])
    compressed(place, device, CASES[case], stream="on").save(tmp_path / "streamed")
    again = pared.load(tmp_path / "streamed").to(device)
    assert near(logits(again), logits(whole.model), 1e-5)


@pytest.mark.parametrize("case", ["svd-llm", "loss-optimal", "basis-sharing, refit", "wanda", "wanda, 2:4"])
def test_every_way_of_storing_generates_what_it_does_on_the_cpu(
    case: str, place: Path, device: torch.device, tmp_path: Path
) -> None:
    manifest = compressed(place, device, CASES[case]).save(tmp_path / "small")
    assert manifest is not None
    assert pared.verify(tmp_path / "small") is not None
    model = pared.load(tmp_path / "small").eval()
    ids = torch.arange(3, 11).view(1, 8)
    told = {}
    for where in (torch.device("cpu"), device):
        model.to(where)
        told[where.type] = model.generate(ids.to(where), max_new_tokens=12, do_sample=False, eos_token_id=None).cpu()
    assert torch.equal(told["cpu"], told[device.type])


def test_perplexity_is_that_of_the_cpu(place: Path, device: torch.device) -> None:
    asked: Any = {"perplexity": f"file:{place / 'words.txt'}", "length": 32, "windows": 4}
    here, there = (pared.evaluate(place / "llama", device=str(where), **asked) for where in ("cpu", device))
    assert there.figures["perplexity"] == pytest.approx(here.figures["perplexity"], rel=1e-4)


def test_a_half_precision_model_is_calibrated_and_compressed(place: Path, device: torch.device) -> None:
    for case in ("svd-llm", "loss-optimal", "wanda"):
        made = compressed(place, device, CASES[case], dtype="bfloat16")
        assert made.model.dtype == torch.bfloat16
        assert bool(logits(made.model).isfinite().all())


@pytest.mark.parametrize("name", sorted(STATISTICS))
def test_every_statistic_is_that_of_the_cpu(name: str, device: torch.device) -> None:
    kind, x_BTN, g_BTO = statistic_kind(name), torch.randn(2, 40, 24), torch.randn(2, 40, 16)
    found = []
    for where in (torch.device("cpu"), device):
        one = kind.accumulator(kind.features(16, 24), where)
        first = g_BTO if kind.of == "output" else x_BTN
        second = x_BTN.flip(1) if kind.of == "input_pair" else g_BTO
        one.update(first.to(where), second.to(where))
        found.append(one.value.cpu())
    assert near(found[1], found[0], 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_half_precision_numbers_lose_nothing(dtype: torch.dtype, device: torch.device) -> None:
    x_TN = torch.randn(512, 300).to(dtype)
    gram = Gram(300, device)
    gram.update(x_TN.to(device))
    assert near(gram.value, x_TN.double().T @ x_TN.double(), 1e-5)  # rounded products miss by 1e-3


def test_eigenvectors_are_those_of_the_whole_matrix(device: torch.device) -> None:
    x_TN = torch.randn(400, 256) * torch.logspace(0, -3, 256)
    C_NN = (x_TN.T @ x_TN).double().to(device)
    e_N, U_NN = eigh(C_NN, width=64)
    exact_N = torch.linalg.eigvalsh(C_NN)
    assert float((e_N[:128].sum() - exact_N[:128].sum()).abs()) <= 1e-6 * float(exact_N.sum())
    assert near(U_NN.T @ U_NN, torch.eye(256, dtype=torch.float64), 1e-5)


def test_pivots_give_the_weight_back(device: torch.device) -> None:
    factors = Factors(*(torch.randn(shape, dtype=torch.float64, device=device) for shape in ((12, 40), (30, 12))))
    stored = pivot(factors)
    assert float(stored.C_KR.abs().max()) <= 1.05 + 1e-6
    again = unpivot(stored.pivots_K, stored.W_OK, stored.C_KR)
    assert near(again.up @ again.down, (factors.up @ factors.down).cpu(), 1e-9)


@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.9), NM(2, 4), NM(4, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sparse_layer_is_packed_unpacked_and_multiplied(
    pattern: Any, dtype: torch.dtype, device: torch.device
) -> None:
    pruned = magnitude.prune(torch.randn(48, 64).to(dtype), pattern)
    groups = NMGroups(pattern.kept, pattern.group) if isinstance(pattern, NM) else None
    layer = SparseLinear.of(pruned.weight.to(device), pruned.mask.to(device), None, groups)
    assert torch.equal(layer.weight.cpu(), pruned.weight)
    assert torch.equal(layer.mask.cpu(), pruned.mask)
    x = torch.randn(5, 64).to(dtype)
    assert near(
        layer(x.to(device)).detach(), (x.double() @ pruned.weight.double().T), 2e-2 if dtype == torch.bfloat16 else 1e-5
    )


def test_sparsegpt_prunes_as_on_the_cpu(device: torch.device) -> None:
    W_ON, x_TN = torch.randn(24, 40), torch.randn(200, 40, dtype=torch.float64)
    here, there = (
        sparsegpt.prune(W_ON.to(where), (x_TN.T @ x_TN).to(where), Unstructured(0.5), block=8)
        for where in (torch.device("cpu"), device)
    )
    assert torch.equal(here.mask, there.mask.cpu())
    assert near(there.weight, here.weight, 1e-5)


def test_a_folder_is_trained(place: Path, device: torch.device, tmp_path: Path) -> None:
    compressed(place, device, CASES["svd-llm"]).save(tmp_path / "small")
    for method in ("lora", "distill"):
        made = pared.tune(
            tmp_path / "small", method=method, data=(f"file:{place}/words.txt",), length=16, windows=8, validation=2,
            batch=4, evaluation=None, device=str(device), out=tmp_path / method,
        )  # fmt: skip
        assert made.manifest.training[0].stages[0]["steps"] > 0


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"call", "read", "write"}))
def test_every_kind_of_operation_is_measured_there(kind: str, device: torch.device) -> None:
    sizes = {"product": (8, 8, 8), "attention": (1, 2, 8, 8), "attention back": (1, 2, 8, 8), "triangular": (8, 3),
             "solve": (8, 3), "pivot": (4, 8, 8), "gram": (16, 8), "cross": (16, 8), "energy": (16, 8),
             "fisher": (2, 4, 8, 8), "select": (4, 8), "pack": (8, 8), "sweep": (8, 8, 4)}  # fmt: skip
    operation = Operation(kind, sizes.get(kind, (64,)), "float32")
    assert Measured(str(device), fresh=True).seconds(operation) > 0
