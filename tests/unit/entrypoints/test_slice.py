"""One folder, every size: a slice is what a compression to that size makes of the same statistics."""

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import TINY_MODELS, VOCAB
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import pared
from pared import ParedError, Recipe
from pared.engine.elastic import cut
from pared.engine.spec import resolve
from pared.modules import LowRankLinear
from pared.schema.elastic import FACTORS_FILE
from pared.schema.manifest import Manifest
from pared.schema.plan import Dense, LowRank, Shared
from unit.checkpoint.test_checkpoint import logits
from unit.cli.test_commands import pared as command
from unit.cli.test_commands import refused
from unit.entrypoints.compression.test_resume import killed_after

LARGEST = 0.9
KEEPS = (0.85, 0.7, 0.65, 0.5, 0.35)
TOKENS = torch.randint(0, VOCAB, (2, 16), generator=torch.Generator().manual_seed(1))
# What --elastic stands for where a recipe leaves it open.
NESTED = {"structures": "ranks", "storage": "factors", "statistics": "once", "refit": "off"}
METHODS: dict[str, dict[str, Any]] = {
    "svd": {"method": "svd"},
    "fwsvd": {"method": "fwsvd"},
    "asvd": {"method": "asvd"},
    "svd-llm": {"method": "svd-llm"},
    "svd-llm-v2": {"method": "svd-llm-v2"},
    "effective-rank": {"method": "svd-llm", "allocation": "effective-rank"},
    "basis-sharing": {"method": "basis-sharing", "options": {"sharing": "all"}},
    "loss-optimal": {"method": "loss-optimal"},
    "loss-optimal, shared": {"method": "loss-optimal", "options": {"group_size": 2, "sharing": "all"}},
    "gpt2": {"method": "loss-optimal"},
}
SELDOM = ("svd", "fwsvd", "asvd", "svd-llm-v2", "effective-rank", "loss-optimal, shared", "gpt2")


@pytest.fixture(scope="module")
def elastic(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast, text_file: Path) -> Any:
    """Return what makes the folder of a case, once, and what compresses to one size."""
    place = tmp_path_factory.mktemp("elastic")
    calibration = {"text": f"file:{text_file}", "samples": 8, "length": 16, "batch": 4, "dtype": "float32"}

    def compressed(case: str, keep: float, **more: Any) -> pared.Compressed:
        model = TINY_MODELS[case if case in TINY_MODELS else "llama"]()
        fields = {**METHODS[case], "calibration": calibration, "evaluation": None, "keep": keep, **more}
        return pared.compress(model, tokenizer, fields)

    @cache
    def folder(case: str) -> Path:
        return compressed(case, LARGEST, elastic=True).save(place / case.replace(", ", "-")).folder

    folder.compressed = compressed  # type: ignore[attr-defined]
    return folder


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return what every layer multiplies with; of factors their product, whose signs may differ."""
    return {
        name: module.up.weight @ module.down.weight if isinstance(module, LowRankLinear) else module.weight
        for name, module in model.named_modules()
        if isinstance(module, LowRankLinear) or (hasattr(module, "weight") and not name.endswith((".up", ".down")))
    }


@pytest.mark.parametrize(
    ("case", "keeps"),
    [
        *(
            pytest.param(case, (0.7, 0.4), id=case, marks=pytest.mark.slow if case in SELDOM else ())
            for case in METHODS
        ),
        *(pytest.param(case, KEEPS, id=f"{case}, five", marks=pytest.mark.slow) for case in METHODS),
    ],
)
def test_a_slice_is_what_a_compression_to_its_size_makes(case: str, keeps: tuple[float, ...], elastic: Any) -> None:
    folder = elastic(case)
    for keep in keeps:
        apart = elastic.compressed(case, keep, **NESTED)
        model = pared.load(folder, keep=keep)
        found, expected = weights(model), weights(apart.model)
        assert found.keys() == expected.keys()
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight, atol=1e-6, rtol=1e-6, msg=f"{keep} {name}")
        largest = Manifest.read(folder)
        assert largest.elastic is not None
        stored = {name.removesuffix(".spectrum"): tensor for name, tensor in load_file(folder / FACTORS_FILE).items()
                  if name.endswith(".spectrum")}  # fmt: skip
        decided = cut(largest.elastic, largest.plan, stored, keep)
        assert decided.plan == apart.plan, keep
        assert not decided.short


def test_cases_have_what_they_are_there_for(elastic: Any) -> None:
    def kinds(case: str, keep: float) -> set[type]:
        model = pared.load(elastic(case), keep=keep)
        shared = getattr(model.config.quantization_config, "shared", {})
        return {type(one) for one in model.modules()} | ({Shared} if shared else set())

    dense = {type(site.decision) for site in Manifest.read(elastic("loss-optimal")).plan.sites}
    assert dense == {LowRank, Dense}, "a smaller size takes factors of what the largest has dense"
    assert Shared in kinds("basis-sharing", 0.7)
    assert Shared in kinds("loss-optimal, shared", 0.4)
    assert Shared not in kinds("loss-optimal", 0.4)


def test_the_folder_as_it_is_is_the_largest_size(elastic: Any) -> None:
    folder = elastic("loss-optimal")
    apart = elastic.compressed("loss-optimal", LARGEST, **NESTED)
    manifest = Manifest.read(folder)
    assert manifest.plan == apart.plan
    assert manifest.elastic is not None
    assert manifest.elastic.most == LARGEST
    assert manifest.elastic.bytes == sum(
        one.numel() * one.element_size() for one in load_file(folder / FACTORS_FILE).values()
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits(model), logits(apart.model), atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(pared.load(folder, keep=LARGEST)), logits(model))
    assert pared.verify(folder) < 1e-5


def test_sizes_fall_and_losses_rise(elastic: Any) -> None:
    found = Manifest.read(elastic("loss-optimal")).elastic
    assert found is not None
    sizes = found.sizes
    assert [one.keep for one in sizes] == sorted((one.keep for one in sizes), reverse=True)
    assert {0.01 * round(100 * keep) for keep in KEEPS} <= {0.01 * round(100 * one.keep) for one in sizes}
    losses = [one.loss for one in sizes]
    assert losses == sorted(losses)
    shared = Manifest.read(elastic("loss-optimal, shared")).elastic
    assert shared is not None
    assert [one.loss for one in shared.sizes] == sorted(one.loss for one in shared.sizes), "shared bases lose too"
    assert Manifest.read(elastic("svd")).elastic.sizes[0].loss is None, "errors of weights are no nats"  # type: ignore[union-attr]


def test_factors_below_the_largest_size_are_not_stored_twice(elastic: Any) -> None:
    tensors = load_file(elastic("svd") / FACTORS_FILE)
    assert all(name.endswith(".spectrum") for name in tensors), "uniform ranks only fall"


def test_a_slice_is_a_folder_as_any_other(elastic: Any, tmp_path: Path) -> None:
    folder = elastic("loss-optimal")
    code, told, err = command("slice", folder, "--keep", 0.65, "--out", tmp_path / "cut", "--json", tmp_path / "c.json")
    assert code == 0, err
    assert "target parameters" in told
    made, before = Manifest.read(tmp_path / "cut"), Manifest.read(folder)
    assert made.elastic is None
    assert made.perplexity_after is None
    assert json.loads((tmp_path / "c.json").read_text())["plan"]["keep"] == 0.65
    assert not (tmp_path / "cut" / "elastic").exists()
    assert made.bytes_on_disk == (tmp_path / "cut" / "model.safetensors").stat().st_size
    assert made.plan.after.covered_parameters <= 0.65 * before.plan.before.covered_parameters
    assert pared.verify(tmp_path / "cut") < 1e-5
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    assert sum(one.numel() for one in model.parameters()) == made.plan.after.model_parameters
    assert torch.equal(logits(model), logits(pared.load(folder, keep=0.65)))
    apart = elastic.compressed("loss-optimal", 0.65, **{name: getattr(made.recipe, name) for name in NESTED})
    assert made.recipe.keep == 0.65
    assert apart.plan == made.plan, "its recipe makes it again"


def test_a_loaded_size_describes_itself_when_it_is_saved(elastic: Any, tmp_path: Path) -> None:
    model = pared.load(elastic("basis-sharing"), keep=0.5)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_a_size_between_hundredths_keeps_its_budget(elastic: Any) -> None:
    manifest, folder = Manifest.read(elastic("loss-optimal")), elastic("loss-optimal")
    sizes = [pared.load(folder, keep=keep).num_parameters() for keep in (0.7071, 0.7, 0.6999)]
    assert sizes == sorted(sizes, reverse=True)
    budget = manifest.plan.before.model_parameters - (1 - 0.7071) * manifest.plan.before.covered_parameters
    assert sizes[0] <= budget


def test_what_is_converted_holds_one_size(elastic: Any, tmp_path: Path) -> None:
    made = pared.convert(elastic("svd"), tmp_path / "pivoted")
    assert made.elastic is None
    with pytest.raises(ParedError, match=r"pivoted holds one size; a compression with elastic=True"):
        pared.slice(tmp_path / "pivoted", tmp_path / "no", keep=0.5)
    with pytest.raises(ParedError, match="holds one size"):
        pared.load(tmp_path / "pivoted", keep=0.5)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (0.95, r"holds sizes from keep 0\.\d+ to 0\.9, got keep 0\.95"),
        (0, "got keep 0;"),
        ("half", "got keep half;"),
        (0.0001, "does not buy one rank"),
    ],
)
def test_a_size_that_is_not_there_is_refused(keep: float, message: str, elastic: Any, tmp_path: Path) -> None:
    with pytest.raises(ParedError, match=message):
        pared.slice(elastic("loss-optimal"), tmp_path / "no", keep=keep)
    assert not (tmp_path / "no").exists()
    if keep == 0.95:
        refused(command("slice", elastic("loss-optimal"), "--keep", keep, "--out", tmp_path / "no"), "got keep 0.95")


def test_a_folder_of_every_size_is_replaced_like_any_other(elastic: Any, tmp_path: Path) -> None:
    shutil.copytree(elastic("svd"), tmp_path / "copy")
    made = pared.slice(elastic("svd"), tmp_path / "copy", keep=0.5, overwrite=True)
    assert {path.name for path in made.folder.iterdir()} == {path.name for path in elastic("svd").iterdir()} - {
        "elastic"
    }
    assert "largest of many sizes" in (elastic("svd") / "README.md").read_text()
    assert "largest of many sizes" not in (made.folder / "README.md").read_text()


def test_damaged_factors_are_noticed(elastic: Any, tmp_path: Path) -> None:
    shutil.copytree(elastic("loss-optimal"), tmp_path / "copy")
    path = tmp_path / "copy" / FACTORS_FILE
    needed = pared.slice(tmp_path / "copy", tmp_path / "whole", keep=0.35).manifest.plan
    ranked = {site.name for site in needed.sites if isinstance(site.decision, LowRank)}
    tensors = load_file(path)
    lost = next(name for name in tensors if name.endswith(".down") and name.removesuffix(".down") in ranked)
    save_file({name: one for name, one in tensors.items() if name != lost}, path)
    with pytest.raises(ParedError, match="is not what was written"):
        pared.slice(tmp_path / "copy", tmp_path / "no", keep=0.35)
    with pytest.raises(ParedError, match="holds factors of rank 0; it is damaged"):
        pared.load(tmp_path / "copy", keep=0.35)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ParedError, match="unreadable or truncated"):
        pared.load(tmp_path / "copy", keep=0.35)


@pytest.mark.slow
def test_a_killed_compression_resumes_to_the_very_same_factors(
    text_file: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    TINY_MODELS["llama"]().save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    calibration = {"text": f"file:{text_file}", "samples": 6, "length": 16, "batch": 2, "dtype": "float32"}
    fields = {"model": str(tmp_path / "dense"), "keep": LARGEST, "elastic": True, "evaluation": None}
    whole, killed = (Recipe.of({**fields, "calibration": calibration, "out": str(tmp_path / name)}) for name in "wk")
    pared.run(whole)
    assert killed_after(6, killed)  # three blocks are solved, all is decided, and one or two are replaced
    pared.run(killed, resume=True)
    assert (tmp_path / "k" / FACTORS_FILE).read_bytes() == (tmp_path / "w" / FACTORS_FILE).read_bytes()
    assert Manifest.read(tmp_path / "k").elastic == Manifest.read(tmp_path / "w").elastic


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"structures": "mixed"}, "got structures mixed: .* take structures=ranks"),
        ({"storage": "pivoted"}, "got storage pivoted: every rank has pivots of its own"),
        ({"statistics": "sequential"}, "got statistics sequential: they are of one size; take statistics=once"),
        ({"refit": "update"}, "got refit update: it is of one size"),
        ({"refine": {}}, "got refine: it is of one size"),
        ({"quantize": "int8"}, "got quantize int8: rounding is of one size"),
        ({"keep_bytes": 0.4}, r"got keep bytes 0\.4: sizes are fractions of the target parameters"),
        ({"rank_fraction": 0.4}, r"got rank fraction 0\.4: sizes are fractions"),
        ({"method": "swift-svd"}, "got allocation swift: it needs influence and trial, .* take allocation=loss"),
        ({"method": "flap"}, "got structures widths"),
        ({"method": "wanda", "sparsity": 0.5}, "does not take elastic"),
        ({"method": "reap"}, "structures experts does not take elastic"),
    ],
)
def test_what_has_no_sizes_that_lie_in_one_another_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ParedError, match=message):
        resolve(Recipe.of({"elastic": True, **fields}))


@pytest.mark.parametrize("keep", [0.9, 0.5])
def test_what_is_left_open_is_what_sizes_lie_in_one_another_by(keep: float) -> None:
    spec = resolve(Recipe(elastic=True, keep=keep))
    found = {**spec.describe(), "structures": spec.structures}  # type: ignore[union-attr]
    assert {name: found[name] for name in NESTED} == NESTED
    assert resolve(Recipe(elastic=True, keep=keep, method="basis-sharing")).refit == "off"  # type: ignore[union-attr]
