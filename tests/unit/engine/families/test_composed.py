"""MLPs that lose channels and whose layers have ranks besides: what is stored, saved, streamed and trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from passes import UNSHRUNK
from tiny_models import TINY_MODELS
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import pared
from pared.data.windows import Windows, digest_of
from pared.engine.families.widths import ChannelSolver
from pared.modules import PivotedLinear
from pared.schema.width import Width, channels_of
from pared.structure.groups import ChannelGroup

TOKENS = torch.randint(1, 64, (8, 24), generator=torch.Generator().manual_seed(3))
WINDOWS = Windows(TOKENS, digest_of(TOKENS), "words", "a test", stand_in=True)


@pytest.fixture
def compress(tokenizer: PreTrainedTokenizerFast, calibration: pared.Calibration) -> Callable[..., Any]:
    def made(family: str = "llama", **fields: Any) -> Any:
        asked = {"keep": 0.5, "structures": "mixed", "multiple_of": 4, "statistics": "once", "heads": "off"}
        asked |= {"evaluation": None, "calibration": calibration, "options": UNSHRUNK}
        if "model" in fields:
            return pared.run(pared.Recipe(**{**asked, **fields}))
        return pared.compress(TINY_MODELS[family](), tokenizer, windows=WINDOWS, **{**asked, **fields})

    return made


def composed(result: Any) -> dict[str, Width]:
    decided = {site.name: site.decision for site in result.plan.sites}
    return {name: one for name, one in decided.items() if isinstance(one, Width) and one.rank is not None}


@pytest.mark.parametrize("statistics", ["once", "sequential"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_narrower_layer_with_a_rank_is_stored_as_planned(family: str, statistics: str, compress: Callable[..., Any]):
    result = compress(family, statistics=statistics)
    found = composed(result)
    assert {one.side for one in found.values()} == {"in", "out"}
    for site in result.plan.sites:
        if site.name in found:
            layer = result.model.get_submodule(site.name)
            assert type(layer) is PivotedLinear
            assert (layer.out_features, layer.in_features) == found[site.name].shape(
                site.out_features, site.in_features
            )
            assert layer.rank == found[site.name].rank
    assert sum(one.numel() for one in result.model.parameters()) == result.plan.after.model_parameters
    assert result.plan.achieved_keep <= 0.5
    assert result.model(TOKENS).logits.isfinite().all()


def test_it_is_the_low_rank_weight_fitted_to_the_channels_that_stay(
    compress: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    """The weights before channels go are factors of the whole layers; rows of them stay, and ``down`` makes up."""
    before: dict[str, torch.Tensor] = {}
    put = ChannelSolver._put

    def kept(self: ChannelSolver, group: ChannelGroup, made: Any) -> None:
        before.update({one.name: self._model.get_submodule(one.name).weight.detach().double() for one in group.sites})
        put(self, group, made)

    monkeypatch.setattr(ChannelSolver, "_put", kept)
    result = compress()
    dense = TINY_MODELS["llama"]()
    for name, decision in composed(result).items():
        stored = result.model.get_submodule(name).weight.detach().double()
        there = channels_of(next(s.decision.kept for s in result.plan.sites if s.name == decision.group) or "")
        if decision.side == "out":
            assert torch.allclose(stored, before[name][there], atol=1e-5)
            continue
        seen: list[torch.Tensor] = []
        handle = dense.get_submodule(name).register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(args[0].detach().flatten(0, 1).double())
        )
        with torch.no_grad():
            dense(TOKENS)
        handle.remove()
        A_NN = seen[0].T @ seen[0] / len(seen[0])
        A_NN.diagonal().add_(1e-4 * A_NN.diagonal().mean())
        expected = before[name] @ A_NN[:, there] @ torch.linalg.inv(A_NN[there][:, there])
        assert (stored - expected).norm() < 1e-3 * expected.norm()


def test_a_folder_of_it_loads_anywhere_and_is_the_same_streamed(
    compress: Callable[..., Any], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
):
    TINY_MODELS["llama"]().save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    outputs = []
    for stream in ("off", "on"):
        outcome = compress(model=str(tmp_path / "dense"), out=str(tmp_path / stream), stream=stream)
        assert composed(outcome.manifest)
        assert pared.verify(tmp_path / stream) == 0
        outputs.append(AutoModelForCausalLM.from_pretrained(tmp_path / stream)(TOKENS).logits)
    assert torch.equal(*outputs)
    pared.export(tmp_path / "on", tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert torch.allclose(plain(TOKENS).logits, outputs[0], atol=1e-4)


def test_fused_gate_and_up_are_given_no_rank_besides(compress: Callable[..., Any]):
    result = compress("phi3")
    assert any(isinstance(site.decision, Width) for site in result.plan.sites)
    assert not composed(result)


def test_behind_compressed_blocks_what_is_left_is_decomposed_anew(compress: Callable[..., Any]):
    """Of the same plan, the factors of the weight that is left lose no more than rows of those of the whole."""
    dense = TINY_MODELS["llama"]()
    errors = []
    with torch.no_grad():
        target = dense(TOKENS).logits
        for statistics in ("once", "sequential"):
            result = compress(statistics=statistics, keep=0.4)
            assert composed(result)
            errors.append(float((result.model(TOKENS).logits - target).square().mean()))
    assert errors[1] < errors[0]
