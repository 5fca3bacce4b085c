"""Targets that the dense model sets for what is behind a compressed prefix."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from passes import walk
from tiers import crossed
from tiny_models import FAMILIES, TINY_MODELS, VOCAB
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import pared
from pared import ParedError
from pared.allocation import Unit
from pared.calibration import DenseReference, capture
from pared.calibration.statistics import Cross
from pared.engine import refit as refit_stage
from pared.engine.solve import Found, Solver
from pared.engine.windows import calibration_windows
from pared.lowrank import Factors, whitening
from pared.lowrank.dense_path import mixed_cross, target
from pared.lowrank.registry import mean_gram
from pared.lowrank.sharing import refit
from pared.modules import LowRankLinear
from pared.schema.plan import Dense
from pared.structure import Anatomy, find_anatomy, probe, weight_of

CPU = torch.device("cpu")
TOKENS = torch.randint(0, VOCAB, (5, 12), generator=torch.Generator().manual_seed(0))


def inputs_and_weight(tokens: int = 200) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    X = torch.randn(tokens, 12, generator=generator, dtype=torch.float64)
    noise = torch.randn(tokens, 12, generator=generator, dtype=torch.float64)
    return X, X + 0.5 * noise, torch.randn(8, 12, generator=generator, dtype=torch.float64)


# The mathematics.


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_the_target_is_the_least_squares_fit_of_mixed_outputs(share: float) -> None:
    X, seen, W = inputs_and_weight()
    wanted = ((1 - share) * seen + share * X) @ W.T
    expected = torch.linalg.lstsq(seen, wanted).solution.T
    found = target(W, seen.T @ seen / len(X), X.T @ seen / len(X), share)
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)  # but for the damping


def test_without_a_share_the_target_is_the_dense_weight() -> None:
    X, seen, W = inputs_and_weight()
    assert torch.equal(target(W, seen.T @ seen, X.T @ seen, 0.0), W)


def test_a_prefix_that_changes_nothing_leaves_the_target_at_the_dense_weight() -> None:
    X, _, W = inputs_and_weight()
    assert torch.equal(target(W, X.T @ X, X.T @ X, 1.0), W)


def test_directions_no_input_reaches_keep_their_weights() -> None:
    X, seen, W = inputs_and_weight()
    X[:, 4:], seen[:, 4:] = 0, 0
    found = target(W, seen.T @ seen, X.T @ seen, 1.0)
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found[:, 4:], W[:, 4:])
    assert not torch.allclose(found[:, :4], W[:, :4], atol=1e-2)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_refit_comes_closer_to_mixed_outputs_than_any_other_up(share: float) -> None:
    X, seen, W = inputs_and_weight()
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    factors = Factors(down=Vh[:5], up=U[:, :5] * S[:5])
    gram, cross = seen.T @ seen, X.T @ seen
    up = refit(W, factors, gram, mixed_cross(gram, cross, share))
    wanted = ((1 - share) * seen + share * X) @ W.T
    best = torch.linalg.lstsq(seen @ factors.down.T, wanted).solution.T
    torch.testing.assert_close(up, best, atol=1e-4, rtol=1e-4)


# The walk.


def walk_beside(family: str) -> tuple[dict[str, Cross], dict[str, torch.Tensor]]:
    """Return the cross Grams of a changed model beside the one it came from: walked, and of two real passes."""
    dense = routed_llama() if family == "routed" else TINY_MODELS[family]()
    changed = copy.deepcopy(dense)
    anatomy, calls = probe(changed, find_anatomy(changed))
    with torch.no_grad():
        for site in anatomy.sites:
            weight_of(changed.get_submodule(site.name)).mul_(0.7)
    inputs = capture(changed, anatomy, TOKENS, 2, calls, torch.float32, CPU)
    path = DenseReference([hidden.clone() for hidden in inputs.hidden], anatomy.blocks(dense).__getitem__)
    walked = {
        name: own["cross"]
        for block in walk(changed, anatomy, inputs, mean_gram, dense=path)
        for name, own in block.statistics.items()
    }
    seen: list[dict[str, torch.Tensor]] = [{}, {}]
    for model, reads in zip((dense, changed), seen, strict=True):
        for site in anatomy.sites:

            def hook(_: object, args: tuple[torch.Tensor, ...], name: str = site.name, reads: dict = reads) -> None:
                reads[name] = args[0].flatten(0, -2).double()

            model.get_submodule(site.name).register_forward_pre_hook(hook)
        with torch.no_grad():
            model(input_ids=TOKENS)
    real = {name: seen[0][name].T @ seen[1][name] / len(seen[0][name]) for name in seen[0]}
    return walked, real


@pytest.mark.parametrize("family", FAMILIES)
def test_the_walk_sees_what_two_real_passes_see(family: str) -> None:
    walked, real = walk_beside(family)
    for name, cross in real.items():
        torch.testing.assert_close(walked[name].value, cross, atol=1e-4, rtol=1e-4)


class Experts(nn.Module):
    """Two experts that read every token, each in an order of the tokens' own values."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        made = torch.zeros_like(rows)
        for expert in self.experts:
            order = rows[:, 0].argsort()
            made[order] = made[order] + expert(rows[order])
        return made.view_as(x)


def routed_llama() -> PreTrainedModel:
    model = TINY_MODELS["llama"]()
    torch.manual_seed(0)
    for layer in model.model.layers:
        layer.mlp = Experts(model.config.hidden_size)
    return model


def test_rows_in_another_order_are_not_compared() -> None:
    """An expert that is sent every token is sent them in another order behind a compressed prefix."""
    walked, _ = walk_beside("routed")
    assert {name: cross.tokens for name, cross in walked.items() if "experts" in name} == {
        f"model.layers.{layer}.mlp.experts.{expert}": 0 for layer in range(3) for expert in range(2)
    }
    assert all(cross.tokens == TOKENS.numel() for name, cross in walked.items() if "experts" not in name)


def test_crosses_add_up() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(2, 5, 3, generator=generator) for _ in range(4)]
    whole, other = Cross(3, CPU), Cross(3, CPU)
    whole.update(parts[0], parts[1])
    other.update(parts[2], parts[3])
    whole.merge(other)
    x, own = (torch.cat([parts[k], parts[k + 2]]).flatten(0, 1).double() for k in (0, 1))
    assert whole.tokens == 20
    torch.testing.assert_close(whole.value, x.T @ own / 20, atol=1e-6, rtol=1e-6)


# The pipeline.


def reads(model: PreTrainedModel, names: list[str], tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    seen: dict[str, torch.Tensor] = {}
    for name in names:
        hook = lambda _, args, name=name: seen.__setitem__(name, args[0].flatten(0, -2).double())  # noqa: E731
        model.get_submodule(name).register_forward_pre_hook(hook)
    with torch.no_grad():
        model(input_ids=tokens)
    return seen


Compress = Callable[..., pared.Compressed]


@pytest.fixture
def compress(tokenizer: PreTrainedTokenizerFast, calibration: pared.Calibration) -> Compress:
    def with_recipe(family: str, **fields: object) -> pared.Compressed:
        recipe = pared.Recipe.model_validate({"method": "svd-llm", "keep": 0.6, "calibration": calibration, **fields})
        return pared.compress(TINY_MODELS[family](), tokenizer, recipe)

    return with_recipe


def logits(result: pared.Compressed) -> torch.Tensor:
    with torch.no_grad():
        return result.model(input_ids=TOKENS).logits.double()


STAGES = {
    "update": {"refit": "update"},
    "sequential refit": {"refit": "sequential"},
    "sequential statistics": {"statistics": "sequential", "refit": "off"},
}


@pytest.mark.parametrize(
    ("method", "family", "stage"),
    crossed(["svd-llm", "asvd", "basis-sharing", "loss-optimal"], ["llama", "gpt2", "opt", "bert"], list(STAGES)),
)
def test_targets_of_the_dense_path_change_the_factors_and_nothing_else(
    method: str, family: str, stage: str, compress: Compress
) -> None:
    asked = {"method": method, "structures": "ranks", **STAGES[stage]}  # which channels stay depends on targets too
    own, mixed = (compress(family, dense_path=share, **asked) for share in (0, 0.5))
    assert own.plan == mixed.plan
    assert bool(logits(mixed).isfinite().all())
    assert not torch.equal(logits(own), logits(mixed))


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
@pytest.mark.parametrize(("family", "site"), [("llama", "self_attn.q_proj"), ("gpt2", "attn.c_attn"), ("bert", "q")])
def test_sequential_statistics_decompose_the_target_of_what_is_really_read(
    family: str, site: str, share: float, compress: Compress, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Of the last block, whose first layer reads what all compressed blocks before it put out."""
    dense = TINY_MODELS[family]()
    fields = {"method": "svd-llm", "statistics": "sequential", "refit": "off", "dense_path": share}
    result = compress(family, **fields)
    windows = calibration_windows(result.recipe, tokenizer, dense.config, causal=family != "bert").tokens
    planned = next(s for s in reversed(result.plan.sites) if site in s.name and (family != "bert" or s.kind == "q"))
    X, seen = (reads(model, [planned.name], windows)[planned.name] for model in (dense, result.model))
    gram, cross = seen.T @ seen, X.T @ seen
    W = weight_of(dense.get_submodule(planned.name)).detach().double()
    expected = whitening.decompose(target(W, gram, cross, share), gram).factors(planned.decision.rank)
    found = result.model.get_submodule(planned.name).weight.detach().double()
    torch.testing.assert_close(found, expected.up @ expected.down, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_statistics_behind_groups_are_those_behind_the_compressed_blocks(
    size: int, compress: Compress, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the first block behind a complete group reads is what the finished model reads there."""
    seen: dict[str, torch.Tensor] = {}
    real = Solver.take

    def take(self: Solver, unit: Unit, statistics: dict) -> Found:
        seen.update({name: own["gram"].value / own["gram"].tokens for name, own in statistics.items() if "gram" in own})
        return real(self, unit, statistics)

    monkeypatch.setattr(Solver, "take", take)
    options = {"sharing": "all", "group_size": size}
    fields = {"method": "basis-sharing", "options": options, "statistics": "sequential", "refit": "off"}
    result = compress("llama", **fields)
    windows = calibration_windows(result.recipe, tokenizer, result.model.config, causal=True).tokens
    for block in range(0, 3, size):
        name = f"model.layers.{block}.self_attn.q_proj"
        X = reads(result.model, [name], windows)[name]
        torch.testing.assert_close(seen[name], X.T @ X / len(X), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
@pytest.mark.parametrize(
    ("family", "fields"),
    [("llama", {"method": "basis-sharing", "options": {"sharing": "all"}}), ("gpt2", {}), ("opt", {}), ("bert", {})],
)
def test_the_dense_path_of_a_refit_is_the_dense_model(
    family: str, fields: dict[str, object], storage: str, compress: Compress, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, checked = TINY_MODELS[family](), []

    def dense_blocks(model: nn.Module, anatomy: Anatomy, *rest: object) -> Callable[[int], nn.Module]:
        block_of = refit_stage.dense_blocks(model, anatomy, *rest)  # type: ignore[arg-type]
        for site in anatomy.sites:
            made = block_of(site.block).get_submodule(anatomy.path_in_block(site))
            torch.testing.assert_close(weight_of(made), weight_of(dense.get_submodule(site.name)))
            checked.append(site.name)
        return block_of

    monkeypatch.setattr("pared.engine.families.low_rank.dense_blocks", dense_blocks)
    result = compress(family, storage=storage, refit="update", dense_path=0.5, **fields)
    assert len(checked) == len(result.plan.sites)
    sites = tuple(site.name for site in result.plan.sites)
    after = dict(result.model.named_parameters())
    for name, parameter in dense.named_parameters():
        if not name.startswith(sites):
            assert torch.equal(after[name], parameter)  # norms, embeddings, whatever else there is


@pytest.mark.parametrize("stage", list(STAGES.values())[1:], ids=["refit", "statistics"])
def test_the_first_block_has_the_same_targets_on_both_paths(stage: dict[str, str], compress: Compress) -> None:
    own, mixed = (compress("llama", method="svd-llm", dense_path=share, **stage) for share in (0, 1))
    first = "model.layers.0.self_attn.q_proj"
    torch.testing.assert_close(
        *(result.model.get_submodule(first).weight for result in (own, mixed)), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_refit_on_both_paths_brings_every_site_nearer_to_what_the_dense_model_puts_out(
    family: str, storage: str, compress: Compress, tokenizer: PreTrainedTokenizerFast
) -> None:
    dense = TINY_MODELS[family]()
    off, own, both = (
        compress(family, storage=storage, refit=refit, dense_path=share)
        for refit, share in (("off", 0), ("update", 0), ("update", 1))
    )
    windows = calibration_windows(off.recipe, tokenizer, dense.config, causal=True).tokens
    names = [site.name for site in off.plan.sites]
    X, seen = reads(dense, names, windows), reads(off.model, names, windows)
    nearer = 0
    for name in names:
        expected = X[name] @ weight_of(dense.get_submodule(name)).detach().double().T
        left = [
            float((seen[name] @ result.model.get_submodule(name).weight.detach().double().T - expected).norm())
            for result in (own, both)
        ]
        assert left[1] <= left[0] * (1 + 1e-5)
        nearer += left[1] < left[0] * 0.999
    assert nearer > len(names) // 2


class Sparse(nn.Module):
    """Three experts, of which every token goes to the one of its own size."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        choice = (rows[:, :3] * rows.new_tensor([1.0, 1.0, 0.05])).argmax(dim=1)  # the last is hardly ever chosen
        made = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            made[choice == number] = expert(rows[choice == number])
        return made.view_as(x)


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "loss-optimal", "options": {"output_weighting": "none"}},
        {"method": "svd-llm", "allocation": "svd-llm-v2", "refit": "sequential"},
        {"method": "basis-sharing", "options": {"sharing": "all", "group_size": 3}, "refit": "off"},
    ],
    ids=["loss-optimal", "refit", "groups"],
)
def test_what_only_the_dense_model_reaches_is_compressed_by_the_dense_models_statistics(
    fields: dict[str, object], tokenizer: PreTrainedTokenizerFast, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second pass may send an expert no token that the first one sent some."""
    real, passes = Solver.take, [0]

    def take(self: Solver, unit: Unit, statistics: dict) -> Found:
        planned = self._planned is not None
        for site in unit.members:
            if planned and site.name.endswith("layers.1.mlp.experts.0"):
                passes[0] += 1
                own = statistics[site.name]
                statistics[site.name] = {name: copy.copy(one) for name, one in own.items()}
                for one in statistics[site.name].values():
                    if hasattr(one, "_upper_NN"):
                        one.tokens = 0
        return real(self, unit, statistics)

    monkeypatch.setattr(Solver, "take", take)
    model = TINY_MODELS["llama"]()
    torch.manual_seed(0)
    for layer in model.model.layers:
        layer.mlp = Sparse(model.config.hidden_size)
    calibration = pared.Calibration(text=f"file:{text_file}", samples=4, length=16, dtype="float32")
    recipe = pared.Recipe.model_validate(
        {"keep": 0.5, "statistics": "sequential", "calibration": calibration, **fields}
    )
    result = pared.compress(model, tokenizer, recipe)
    assert passes[0]
    for site in result.plan.sites:
        module = result.model.get_submodule(site.name)
        assert isinstance(site.decision, Dense) == isinstance(module, nn.Linear), site.name
    assert bool(logits(result).isfinite().all())


@pytest.mark.parametrize("value", [1.5, -0.1, float("nan"), True, "half", "2"])
def test_what_is_no_share_is_refused(value: object) -> None:
    with pytest.raises(ParedError, match="dense_path is a share, 0 to 1, or auto; got"):
        pared.Recipe.of({"dense_path": value})


@pytest.mark.parametrize("fields", [{"method": "svd-llm"}, {"method": "fwsvd", "statistics": "sequential"}])
def test_a_share_of_no_targets_is_refused(fields: dict[str, object], compress: Compress) -> None:
    with pytest.raises(ParedError, match=r"dense_path 0\.5 needs targets"):
        compress("llama", dense_path=0.5, **fields)


def test_a_refit_brings_dense_weights_to_where_the_grams_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense weights wait on disk and come back on the CPU, whatever the model is on."""
    devices: set[str] = set()

    def spy(W: torch.Tensor, factors: Factors, gram: torch.Tensor, cross: torch.Tensor) -> torch.Tensor:
        devices.update(tensor.device.type for tensor in (W, *factors, gram, cross))
        return torch.ones(4, 2)

    monkeypatch.setattr("pared.engine.refit.refit", spy)
    gram = torch.eye(6, device="meta")
    refit_stage.fitted(nn.Sequential(LowRankLinear(6, 4, 2, bias=False)), "0", torch.ones(4, 6), gram, gram)
    assert devices == {"meta"}
