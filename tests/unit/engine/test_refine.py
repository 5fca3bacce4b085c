"""Training every compressed block towards what the dense one outputs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, REPEATED, TINY_MODELS, VOCAB
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import pared
from pared import ParedError, Recipe
from pared.calibration import DenseReference, capture, propagate_reference
from pared.calibration.norms import gains_of_next
from pared.data.windows import Windows, digest_of
from pared.engine.refine import BlockTraining, trained_names
from pared.engine.spec import resolve
from pared.modules import LowRankLinear, SparseLinear
from pared.modules.narrow import narrowed
from pared.progress import Silent
from pared.schema.recipe import Refinement
from pared.structure import find_anatomy, probe

Compress = Callable[..., pared.Compressed]
TRAINED = {"lr": 1e-3, "batch": 4}


def windows(count: int = 64) -> Windows:
    tokens = torch.randint(3, VOCAB, (count, 16), generator=torch.Generator().manual_seed(1))
    return Windows(tokens, digest_of(tokens), "random", "made here", stand_in=True)


@pytest.fixture
def compress(tokenizer: PreTrainedTokenizerFast) -> Compress:
    def with_recipe(model: PreTrainedModel | str, count: int = 64, **fields: Any) -> pared.Compressed:
        made = TINY_MODELS[model]() if isinstance(model, str) else model
        given = {"refine": TRAINED, "calibration": {"dtype": "float32"}, **fields}
        return pared.compress(made, tokenizer, Recipe.model_validate(given), windows=windows(count))

    return with_recipe


def parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("family", ["bert", "gemma3", "gpt2", "llama", "qwen2_moe"])
def test_no_block_is_worse_than_it_began_and_some_are_better(family: str, compress: Compress) -> None:
    without = compress(family, method="svd-llm", keep=0.6, refine=None)
    result = compress(family, method="svd-llm", keep=0.6)
    refined = result.refined
    assert [one.name.rpartition(".")[2] for one in refined] == [str(index) for index in range(len(refined))]
    assert all(one.after <= one.before for one in refined)
    assert all((one.epochs > 0) == (one.after < one.before) for one in refined)
    assert min(one.after / one.before for one in refined) < 0.95
    assert parameters(result.model) == parameters(without.model)
    assert result.plan == without.plan
    assert without.refined == ()


def test_a_rate_that_is_too_high_for_a_block_is_lowered(compress: Compress, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: of a model of half a billion parameters no block was improved, after an hour and without a word."""
    asked: dict[str, Any] = {"method": "svd-llm", "keep": 0.6, "refine": {"lr": 1.0, "batch": 4}}
    assert any(one.after < one.before for one in compress("llama", **asked).refined)
    monkeypatch.setattr("pared.engine.refine.TRIES", 1)
    assert not any(one.epochs for one in compress("llama", **asked).refined)


def test_a_refinement_that_made_nothing_better_says_so(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pared.engine.refine.SLOWER", 1.0)
    recipe = Recipe(method="svd-llm", keep=0.6, refine=Refinement(lr=1.0), calibration={"dtype": "float32"})
    told: list[str] = []

    class Noting(Silent):
        def note(self, text: str) -> None:
            told.append(text)

    model = TINY_MODELS["llama"]()
    result = pared.compress(model, tokenizer, recipe, windows=windows(), progress=Noting())
    assert not any(one.epochs for one in result.refined)
    assert any("refining made no block better" in text for text in told)


@pytest.mark.parametrize("family", REPEATED)
def test_a_block_that_runs_several_times_is_trained_through_all_of_its_runs(family: str, compress: Compress) -> None:
    refined = compress(REPEATED[family](), method="svd", keep=0.6, refine={"lr": 1e-4}).refined
    assert all(one.after <= one.before for one in refined)
    assert refined[0].after < refined[0].before


def test_training_again_from_what_came_out_begins_where_it_ended(
    compress: Compress, tokenizer: PreTrainedTokenizerFast
) -> None:
    """What is recorded as the error after is that of the weights in the model, which a second look finds."""
    result = compress("llama", method="svd-llm", keep=0.6)
    dense, model = TINY_MODELS["llama"](), result.model
    anatomy, calls = probe(dense, find_anatomy(dense))
    held = windows().tokens.view(16, 4, 16)[[7, 15]].flatten(0, 1)
    ours = capture(model, anatomy, held, 8, calls, torch.float32, torch.device("cpu"))
    theirs = capture(dense, anatomy, held, 8, calls, torch.float32, torch.device("cpu"))
    gains = gains_of_next(dense, anatomy, theirs, lambda index: dense.model.layers[index])
    own, target = ours.hidden[0], theirs.hidden[0]
    for index, one in enumerate(result.refined):
        (call,) = ours.calls_of(0, index)
        with torch.no_grad():
            own = call.run(model.model.layers[index], own)
            target = call.run(dense.model.layers[index], target)
        weights = gains[index].square() / gains[index].square().mean()
        error = (weights * (own - target).square()).mean(-1) / target.square().mean(-1)
        assert float(error.mean()) == pytest.approx(one.after, rel=1e-4)


@pytest.mark.parametrize("fields", [{"sparsity": 0.5}, {"pattern": "2:4"}], ids=["unstructured", "N:M"])
def test_zeros_stay_zeros_and_no_stored_weight_is_lost(fields: dict[str, Any], compress: Compress) -> None:
    without = compress("llama", method="wanda", refine=None, **fields)
    result = compress("llama", method="wanda", **fields)
    changed = 0
    for name, module in result.model.named_modules():
        if isinstance(module, SparseLinear):
            before = without.model.get_submodule(name)
            if ".layers.0." in name:  # what later blocks read, and so which weights are pruned, is the same
                assert torch.equal(module.mask, before.mask)
            assert not module.weight[~module.mask].any()
            changed += not torch.equal(module.weight, before.weight)
            module.state_dict()  # refuses weights outside of the mask
    assert changed
    assert any(one.after < one.before for one in result.refined)


def test_a_data_free_method_can_be_refined(compress: Compress) -> None:
    refined = compress("llama", method="svd", keep=0.6).refined
    assert any(one.after < one.before for one in refined)


def test_a_block_that_is_dense_has_no_error_and_does_not_move(compress: Compress) -> None:
    """Only the last block is compressed: the ones before are the dense model's, to the bit."""
    model, dense = TINY_MODELS["llama"](), TINY_MODELS["llama"]()
    result = compress(model, method="svd-llm", keep=0.6, skip=["model.layers.[01].*"])
    first, second, last = result.refined
    assert (first.before, first.epochs, second.before, second.epochs) == (0, 0, 0, 0)
    assert last.after < last.before
    for index in range(2):
        for name, parameter in dense.model.layers[index].named_parameters():
            assert torch.equal(model.model.layers[index].get_parameter(name), parameter)


def test_what_is_skipped_and_what_lies_outside_of_the_blocks_is_not_trained(compress: Compress) -> None:
    model, dense = TINY_MODELS["llama"](), TINY_MODELS["llama"]()
    compress(model, method="svd-llm", keep=0.6, skip=["*.o_proj"])
    now = dict(model.named_parameters())
    for name, parameter in dense.named_parameters():
        if "o_proj" in name or ".layers." not in name:
            assert torch.equal(now[name], parameter), name
    trained = "model.layers.1.input_layernorm.weight"
    assert not torch.equal(now[trained], dense.get_parameter(trained))


def test_a_shared_basis_stays_as_its_group_has_it_and_coefficients_are_trained(compress: Compress) -> None:
    group = {"group_size": 3, "sharing": "all"}
    without = compress("llama", method="basis-sharing", keep=0.5, options=group, refine=None)
    result = compress("llama", method="basis-sharing", keep=0.5, options=group)
    shared = 0
    for name, module in result.model.named_modules():
        if isinstance(module, LowRankLinear) and module.shares is not None:
            before = without.model.get_submodule(name)
            assert torch.equal(module.down.weight, before.down.weight)
            assert not torch.equal(module.up.weight, before.up.weight)
            assert module.down.weight is result.model.get_parameter(module.shares)
            shared += 1
    assert shared > 3
    assert all(one.after < one.before for one in result.refined)


def test_layers_that_lost_channels_are_trained_at_the_size_they_have() -> None:
    dense, model = TINY_MODELS["llama"](), TINY_MODELS["llama"]()
    anatomy, calls = probe(dense, find_anatomy(dense))
    inputs = capture(dense, anatomy, windows().tokens, 4, calls, torch.float32, torch.device("cpu"))
    reference = DenseReference(inputs.hidden.clone(), lambda index: dense.model.layers[index])
    propagate_reference(0, inputs, reference)
    block = model.model.layers[0]
    for name in ("gate_proj", "up_proj", "down_proj"):
        old = block.mlp.get_submodule(name)
        W_ON = old.weight[:, :24] if name == "down_proj" else old.weight[:24]
        setattr(block.mlp, name, narrowed(old, W_ON, None))
    names = trained_names(block, anatomy, 0, model)
    config = Refinement(lr=1e-3)
    training = BlockTraining(block, names, 0, inputs, reference.hidden, torch.ones(32), config, seed=0)
    state, refined = training.run("model.layers.0")
    assert refined.after < refined.before
    assert state["mlp.down_proj.weight"].shape == (32, 24)
    assert {name: tensor.shape for name, tensor in state.items()} == {
        name: parameter.shape for name, parameter in block.named_parameters()
    }


def test_a_model_in_half_precision_is_judged_as_it_is_stored(compress: Compress) -> None:
    """Steps that rounding undoes are no improvement; what is kept is measured after it was rounded."""
    model = TINY_MODELS["llama"]().to(torch.bfloat16)
    refined = compress(model, method="svd-llm", keep=0.6).refined
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert all(one.after <= one.before for one in refined)
    assert any(one.epochs for one in refined)
    tiny = compress(TINY_MODELS["llama"]().to(torch.bfloat16), method="svd-llm", keep=0.6, refine={"lr": 1e-12})
    assert [one.epochs for one in tiny.refined] == [0, 0, 0]


def test_padded_windows_are_trained_on_their_tokens_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    recipe = Recipe(method="svd", keep=0.6, refine=TRAINED, calibration={"dtype": "float32"})
    made = windows()
    mask = torch.ones_like(made.tokens)
    mask[:, 10:] = 0
    found = []
    for filler in (0, 5):
        tokens = made.tokens.masked_fill(mask == 0, filler)
        padded = Windows(tokens, digest_of(tokens), "random", "made here", True, mask)
        found.append(pared.compress(TINY_MODELS["llama"](), tokenizer, recipe, windows=padded).refined)
    assert found[0] == found[1]
    assert found[0][0].epochs


def test_the_order_of_batches_depends_on_the_seed_and_on_nothing_else(compress: Compress) -> None:
    def refined(seed: int) -> Any:
        calibration = {"dtype": "float32", "seed": seed}
        return compress("qwen2", count=16, method="svd", keep=0.6, calibration=calibration).refined

    assert refined(3) == refined(3)
    assert refined(3) != refined(4)


def test_products_of_half_precision_serve_the_steps_alone(compress: Compress) -> None:
    """What is held out is measured in float32: at first it is what a training in float32 begins with."""
    whole, half = (
        compress("llama", method="svd", keep=0.6, calibration={"dtype": dtype}).refined
        for dtype in ("float32", "bfloat16")
    )
    assert half[0].before == whole[0].before
    assert half[0].after != whole[0].after
    assert half[0].after == pytest.approx(whole[0].after, rel=0.02)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_weights_of_features_are_those_of_the_norm_behind(family: str) -> None:
    model = TINY_MODELS[family]()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and name.endswith("weight"):
            torch.nn.init.uniform_(parameter, 0.5, 2.0)
    anatomy, calls = probe(model, find_anatomy(model))
    inputs = capture(model, anatomy, windows().tokens, 4, calls, torch.float32, torch.device("cpu"))
    gains = gains_of_next(model, anatomy, inputs, lambda index: anatomy.blocks(model)[index])
    named = {"gpt2": ("ln_1", "transformer.ln_f"), "opt": ("self_attn_layer_norm", "model.decoder.final_layer_norm")}
    first, last = named.get(
        family, ("input_layernorm", "gpt_neox.final_layer_norm" if family == "gpt_neox" else "model.norm")
    )
    for index, gain in enumerate(gains):
        if family == "bert":  # a block ends with its norm: all features count alike
            assert torch.equal(gain, torch.ones(32))
            continue
        behind = index + 1 < len(gains)
        norm = anatomy.blocks(model)[index + 1].get_submodule(first) if behind else model.get_submodule(last)
        weight = norm.weight.detach() + (1 if family == "gemma3" else 0)
        if family == "gpt_neox" and behind:  # attention and MLP read the hidden states side by side
            other = anatomy.blocks(model)[index + 1].get_submodule("post_attention_layernorm").weight.detach()
            weight = (weight.square() + other.square()).sqrt()
        torch.testing.assert_close(gain, weight, rtol=1e-3, atol=1e-4)


def test_one_window_alone_is_refused_before_anything_is_changed(compress: Compress) -> None:
    model, dense = TINY_MODELS["llama"](), TINY_MODELS["llama"]()
    with pytest.raises(ParedError, match=r"refine=True trains on some windows .* gives 1: raise samples"):
        compress(model, count=1, method="svd-llm", keep=0.6)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in dense.state_dict().items())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epochs": 0}, "refine.epochs: expected a number greater than or equal to 1; got 0"),
        ({"lr": 0.0}, "refine.lr: expected a number greater than 0; got 0.0"),
        ({"batch": 0}, "refine.batch: expected a number greater than or equal to 1; got 0"),
        ({"loss": "mse"}, "refine.loss: expected 'next-norm' or 'plain'; got 'mse'"),
        ({"rate": 1}, "unknown key 'refine.rate'"),
        (3, "refine: expected a mapping of its fields"),
    ],
)
def test_an_option_out_of_range_is_one_clear_error(given: object, message: str) -> None:
    with pytest.raises(ParedError, match=message.replace(".", r"\.")):
        Recipe(refine=given)


def test_refine_is_true_false_or_what_is_given_of_it() -> None:
    assert Recipe().refine is None
    assert Recipe(refine=False).refine is None
    assert Recipe(refine=True).refine == Recipe(refine={}).refine
    assert Recipe(refine={"epochs": 5}).refine.epochs == 5
    assert Recipe.of(Recipe(refine=True).model_dump()).refine == Recipe(refine=True).refine


def test_the_passes_say_that_blocks_are_trained_last() -> None:
    for fields in ({"keep": 0.6}, {"sparsity": 0.5, "method": "magnitude"}, {"keep": 0.8, "method": "svd"}):
        spec = resolve(Recipe(refine=True, **fields))
        assert spec.calibrated
        assert str(spec.passes()[-1]) == (
            "refine (forward, behind the compressed blocks, with the dense model as reference)"
        )


def test_the_manifest_records_every_block(tmp_path: Path, compress: Compress) -> None:
    result = compress("llama", method="svd-llm", keep=0.6)
    manifest = result.save(tmp_path / "refined").manifest
    assert manifest.refined == result.refined
    assert pared.Manifest.read(tmp_path / "refined").recipe.refine.epochs == 2
    assert any(line.startswith("refined: ") for line in result.table().lines)
