"""Targets that the dense model sets for what is behind a compressed prefix."""

import copy
from collections.abc import Callable

import pytest
import torch
from tiny_models import FAMILIES, TINY_MODELS, VOCAB
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import pared
from pared import ParedError
from pared.anatomy import find_anatomy, probe, weight_of
from pared.calibration import DensePath, capture, walk
from pared.calibration.statistics import Cross
from pared.engine.asked import calibration_windows
from pared.lowrank import Factors
from pared.lowrank.dense_path import mixed_cross, target
from pared.lowrank.methods import mean_gram
from pared.lowrank.sharing import refit

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


def walk_beside(family: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the cross Grams of a changed model beside the one it came from: walked, and of two real passes."""
    dense = TINY_MODELS[family]()
    changed = copy.deepcopy(dense)
    anatomy, calls = probe(changed, find_anatomy(changed))
    with torch.no_grad():
        for site in anatomy.sites:
            weight_of(changed.get_submodule(site.name)).mul_(0.7)
    inputs = capture(changed, anatomy, TOKENS, 2, calls, torch.float32, CPU)
    path = DensePath([hidden.clone() for hidden in inputs.hidden], anatomy.blocks(dense).__getitem__)
    walked = {
        name: own["cross"].value
        for block in walk(anatomy.blocks(changed), anatomy, inputs, mean_gram, dense=path)
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
        torch.testing.assert_close(walked[name], cross, atol=1e-4, rtol=1e-4)


def test_rows_of_other_tokens_are_not_compared() -> None:
    cross = Cross(3, CPU)
    cross.update(torch.ones(1, 4, 3), torch.ones(1, 5, 3))
    cross.update(None, torch.ones(1, 5, 3))
    assert cross.tokens == 0
    cross.update(torch.ones(1, 5, 3), 2 * torch.ones(1, 5, 3))
    assert cross.tokens == 5
    assert torch.equal(cross.value, torch.full((3, 3), 2.0, dtype=torch.float64))


# The road.

Compress = Callable[..., pared.Compressed]


@pytest.fixture
def compress(tokenizer: PreTrainedTokenizerFast, calibration: pared.Calibration) -> Compress:
    def with_recipe(family: str, **fields: object) -> pared.Compressed:
        recipe = pared.Recipe.model_validate({"keep": 0.6, "calibration": calibration, **fields})
        return pared.compress(TINY_MODELS[family](), tokenizer, recipe)

    return with_recipe


def logits(result: pared.Compressed) -> torch.Tensor:
    with torch.no_grad():
        return result.model(input_ids=TOKENS).logits.double()


STAGES = [{"refit": "update"}, {"refit": "sequential"}, {"statistics": "sequential", "refit": "off"}]


@pytest.mark.parametrize("stage", STAGES, ids=["update", "sequential refit", "sequential statistics"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bert"])
@pytest.mark.parametrize("method", ["svd-llm", "asvd", "basis-sharing", "loss-optimal"])
def test_targets_of_the_dense_path_change_the_factors_and_nothing_else(
    method: str, family: str, stage: dict[str, str], compress: Compress
) -> None:
    own, mixed = (compress(family, method=method, dense_path=share, **stage) for share in (0, 0.5))
    assert own.plan == mixed.plan
    assert bool(logits(mixed).isfinite().all())
    assert not torch.equal(logits(own), logits(mixed))


@pytest.mark.parametrize("stage", STAGES[1:], ids=["refit", "statistics"])
def test_the_first_block_has_the_same_targets_on_both_paths(stage: dict[str, str], compress: Compress) -> None:
    own, mixed = (compress("llama", method="svd-llm", dense_path=share, **stage) for share in (0, 1))
    first = "model.layers.0.self_attn.q_proj"
    torch.testing.assert_close(
        *(result.model.get_submodule(first).weight for result in (own, mixed)), atol=1e-4, rtol=1e-4
    )


def reads(model: PreTrainedModel, names: list[str], tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    seen: dict[str, torch.Tensor] = {}
    for name in names:
        hook = lambda _, args, name=name: seen.__setitem__(name, args[0].flatten(0, -2).double())  # noqa: E731
        model.get_submodule(name).register_forward_pre_hook(hook)
    with torch.no_grad():
        model(input_ids=tokens)
    return seen


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


def test_a_share_above_one_is_refused() -> None:
    with pytest.raises(ParedError, match="dense_path"):
        pared.Recipe.of({"dense_path": 1.5})
