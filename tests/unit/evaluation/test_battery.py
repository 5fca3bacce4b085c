"""What every kind of checkpoint must stand: reload, adapters, half precision, the evaluation harness, another save."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tiny_models import TINY_MODELS
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from pared.checkpoint import mark, module_map, require_tensors, save
from pared.engine.install import install_group
from pared.lowrank import Factors
from pared.modules import LowRankLinear, PivotedLinear
from pared.structure import weight_of
from unit.checkpoint.test_checkpoint import TOKENS, logits
from unit.checkpoint.test_shared import GATE, Q, adapted, put_low_rank

PAIRS = [Q[:2], GATE]
SITES = [f"model.layers.{block}.{site}" for block in range(3)
         for site in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")]  # fmt: skip


def put_pivoted(model: PreTrainedModel, names: tuple[str, ...], rank: int) -> None:
    stacked = torch.cat([weight_of(model.get_submodule(name)).detach() for name in names])
    u, s, v = torch.linalg.svd(stacked, full_matrices=False)
    install_group(model, names, Factors(down=v[:rank], up=u[:, :rank] * s[:rank]), pivoted=True)


def two_factors(model: PreTrainedModel) -> None:
    for site in SITES:
        put_low_rank(model, [site], 12)


def shared(model: PreTrainedModel) -> None:
    for pair in PAIRS:
        put_low_rank(model, pair, 12)


def pivoted(model: PreTrainedModel) -> None:
    for site in SITES:
        put_pivoted(model, (site,), 12)
    put_pivoted(model, ("model.layers.0.mlp.up_proj",), 32)  # every column a pivot: no `down`


def shared_and_pivoted(model: PreTrainedModel) -> None:
    for pair in PAIRS:
        put_pivoted(model, pair, 12)


def mixed(model: PreTrainedModel) -> None:
    """Of each kind something, one of them with a group in which ranks and blocks differ; most stays dense."""
    put_low_rank(model, Q, 12)
    put_low_rank(model, ["model.layers.2.mlp.down_proj"], 7)
    put_pivoted(model, ("model.layers.0.mlp.down_proj",), 9)
    put_pivoted(model, GATE, 20)


KINDS: dict[str, Callable[[PreTrainedModel], None]] = {
    "two factors": two_factors,
    "shared": shared,
    "pivoted": pivoted,
    "shared and pivoted": shared_and_pivoted,
    "mixed": mixed,
}
SHARING = ["shared", "shared and pivoted", "mixed"]


class Made(NamedTuple):
    kind: str
    folder: Path
    model: PreTrainedModel
    logits: torch.Tensor

    def load(self, **options: Any) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self.folder, **options)


@pytest.fixture(scope="module")
def made_of(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Callable[[str], Made]:
    """The checkpoint of a kind, the model it was saved from and what that answered; made once."""
    made: dict[str, Made] = {}

    def checkpoint(kind: str) -> Made:
        if kind not in made:
            model = TINY_MODELS["llama"]()
            KINDS[kind](model)
            mark(model)
            folder = tmp_path_factory.mktemp(kind.replace(" ", "-"))
            save(model, tokenizer, folder)
            made[kind] = Made(kind, folder, model, logits(model))
        return made[kind]

    return checkpoint


@pytest.fixture(params=KINDS)
def made(request: pytest.FixtureRequest, made_of: Callable[[str], Made]) -> Made:
    return made_of(request.param)


@pytest.fixture(params=["shared", "shared and pivoted", "mixed"])
def sharing(request: pytest.FixtureRequest, made_of: Callable[[str], Made]) -> Made:
    return made_of(request.param)


def states(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal_states(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
        assert found[name].dtype == tensor.dtype, name


def test_the_kinds_are_what_their_names_say(made_of: Callable[[str], Made]) -> None:
    for kind in KINDS:
        model = made_of(kind).model
        kinds = {type(module) for module in model.modules()} & {LowRankLinear, PivotedLinear}
        assert (LowRankLinear in kinds) == (kind in ("two factors", "shared", "mixed"))
        assert (PivotedLinear in kinds) == (kind in ("pivoted", "shared and pivoted", "mixed"))
        assert bool(model.config.quantization_config.shared) == (kind in SHARING)
        assert not torch.allclose(logits(TINY_MODELS["llama"]()), made_of(kind).logits, atol=1e-2)


def test_it_loads_as_the_very_model_that_was_saved(made: Made) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(made.folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_equal_states(states(model), states(made.model))
    assert module_map(model) == module_map(made.model)
    assert (logits(model) - made.logits).abs().max() == 0.0


def test_it_is_saved_again_byte_for_byte(made: Made, tmp_path: Path) -> None:
    made.load().save_pretrained(tmp_path)
    for name in ("config.json", "modeling_pared.py", "model.safetensors"):
        assert (tmp_path / name).read_bytes() == (made.folder / name).read_bytes()


def test_the_files_hold_every_number_once(made: Made) -> None:
    numbers = sum(parameter.nbytes for parameter in made.model.parameters())
    numbers += sum(4 * module.order.numel() for module in made.model.modules() if isinstance(module, PivotedLinear))
    assert 0 < require_tensors(made.folder) - numbers < 10_000  # the header


def test_lora_on_up_trains_a_step_merges_exactly_and_is_saved(made: Made, tmp_path: Path) -> None:
    model = adapted(made.load(), ["up"])
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == len(module_map(made.model))
    base = {name: tensor for name, tensor in states(model).items() if "lora_" not in name}
    start = logits(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loss = model(input_ids=TOKENS, labels=TOKENS).loss
    assert loss.isfinite()
    loss.backward()
    optimizer.step()
    assert_equal_states({name: tensor for name, tensor in states(model).items() if "lora_" not in name}, base)
    trained = logits(model)
    assert not torch.allclose(trained, start, atol=1e-3)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), trained, atol=1e-5, rtol=1e-5)
    assert merged.config.quantization_config.modules == module_map(merged) == module_map(made.model)
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(merged))
    require_tensors(tmp_path)


def test_lora_into_a_shared_basis_is_not_merged(sharing: Made) -> None:
    before = states(sharing.model)
    aliases = sharing.model.config.quantization_config.shared
    for alias, owner in aliases.items():
        base = sharing.load()
        model = adapted(base, [alias.removesuffix(".weight"), owner.removesuffix(".weight")])
        answer = logits(model)
        assert not torch.allclose(answer, sharing.logits, atol=1e-3)
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(ValueError, match=r"on a shared `down` cannot be merged.*train one that targets `up`"):
                merge()
        assert torch.equal(logits(model), answer)
        assert_equal_states(states(model.unload()), before)


def test_lora_on_a_basis_that_is_not_shared_merges_exactly(made: Made) -> None:
    shared_ = made.model.config.quantization_config.shared
    used = {*shared_, *shared_.values()}
    names = [name for name in states(made.model) if name.endswith(".down.weight") and name not in used]
    if made.kind in ("shared", "shared and pivoted"):
        assert not names
        return
    model = adapted(made.load(), [name.removesuffix(".weight") for name in names])
    answer = logits(model)
    assert not torch.allclose(answer, made.logits, atol=1e-3)
    torch.testing.assert_close(logits(model.merge_and_unload()), answer, atol=1e-5, rtol=1e-5)


def test_bfloat16_is_saved_and_comes_back(made: Made, tmp_path: Path) -> None:
    model = made.load(dtype=torch.bfloat16)
    expected = logits(model)
    assert (expected.float() - made.logits).norm() < 0.05 * made.logits.norm()
    assert_equal_states(states(made.load().to(torch.bfloat16)), states(model))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}
    assert {module.order.dtype for module in again.modules() if isinstance(module, PivotedLinear)} <= {torch.int32}
    assert_equal_states(states(again), states(model))
    assert torch.equal(logits(again), expected)
    assert require_tensors(tmp_path) < require_tensors(made.folder)


def test_lm_eval_scores_as_the_model_does(made: Made, tokenizer: PreTrainedTokenizerFast) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    pairs = [("w5 w6 w7", " w8 w9"), ("w10 w11", " w12")]
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=index) for index, pair in enumerate(pairs)
    ]
    harness = HFLM(pretrained=str(made.folder), device="cpu", batch_size=1, dtype="float32")
    scores = harness.loglikelihood(requests, disable_tqdm=True)
    for (context, continuation), (score, _) in zip(pairs, scores, strict=True):
        start, whole = (tokenizer(text)["input_ids"] for text in (context, context + continuation))
        with torch.no_grad():
            logs = made.model(torch.tensor([whole])).logits[0].log_softmax(-1)
        ours = sum(float(logs[place - 1, whole[place]]) for place in range(len(start), len(whole)))
        assert len(whole) - len(start) == len(continuation.split())
        assert score == pytest.approx(ours, abs=1e-4)
