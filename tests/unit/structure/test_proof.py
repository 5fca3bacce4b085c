"""A layer is covered if it computes ``x Wᵀ + b``, whatever class it is of; what a user set on it stays."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from passes import plan_of
from tiny_models import TINY_MODELS
from torch import nn
from torch.nn.utils import prune
from transformers import PreTrainedModel
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.llama4.modeling_llama4 import Llama4Router
from transformers.pytorch_utils import Conv1D

import pared
from pared import ParedError, Recipe
from pared.structure import find_anatomy, probe
from pared.structure.probe import probe_shapes
from pared.structure.proof import fault_of_call

TARGET = "model.layers.1.mlp.up_proj"
METHODS: list[dict[str, Any]] = [
    {"method": "svd", "keep": 0.6},
    {"method": "svd-llm", "keep": 0.6},
    {"method": "svd-llm", "keep": 0.6, "storage": "pivoted"},
    {"method": "basis-sharing", "keep": 0.6, "options": {"sharing": "all"}},
    {"method": "wanda", "sparsity": 0.5},
    {"method": "magnitude", "sparsity": 0.5},
]


@pytest.fixture
def compress(calibration: pared.Calibration, tokenizer: Any) -> Callable[..., Any]:
    return lambda model, **recipe: pared.compress(model, tokenizer, Recipe(calibration=calibration, **recipe))


class Scaled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 1.01


class Activated(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).relu()


class Learned(nn.Linear):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.full((self.out_features,), 1.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.gain


class Ternary(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.sign() * self.weight.abs().mean(), self.bias)


class NotANumber(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * float("nan")


class Pair(nn.Linear):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x), None


class ScaledConv(Conv1D):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Written(nn.Linear):
    """The same product in other words."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.einsum("...n,on->...o", x, self.weight)
        return y if self.bias is None else y + self.bias


class Named(nn.Linear):
    """No forward of its own."""


def with_layer(new: nn.Module) -> PreTrainedModel:
    """Return a Llama with a layer of another class, of the same weight."""
    model = TINY_MODELS["llama"]()
    old = model.get_submodule(TARGET)
    with torch.no_grad():
        new.weight.copy_(old.weight.T if isinstance(new, Conv1D) else old.weight)
        if new.bias is not None:
            new.bias.zero_()
    model.set_submodule(TARGET, new.eval())
    return model


def reasons(model: PreTrainedModel) -> dict[str, str]:
    return {weight.name: weight.reason for weight in probe(model, find_anatomy(model))[0].uncovered}


@pytest.mark.parametrize("kind", [Scaled, Activated, Learned, Ternary, NotANumber])
def test_a_subclass_with_mathematics_of_its_own_is_not_covered(kind: type[nn.Linear]) -> None:
    model = with_layer(kind(32, 48, bias=False))
    found = {weight.name: weight.reason for weight in find_anatomy(model).uncovered}
    assert next(iter(found)) == f"{TARGET}.weight"
    assert "its output is not x Wᵀ + b (difference" in found[f"{TARGET}.weight"]
    assert found == reasons(model)


@pytest.mark.parametrize("recipe", METHODS, ids=lambda recipe: "-".join(map(str, recipe.values())))
def test_what_is_no_linear_layer_is_left_as_it_is(compress: Callable[..., Any], recipe: dict[str, Any]) -> None:
    """A scaled layer was replaced by a plain one, and the logits were wrong without a word."""
    model = with_layer(Scaled(32, 48, bias=False))
    old = model.get_submodule(TARGET)
    plan = compress(model, **recipe).plan
    assert model.get_submodule(TARGET) is old
    assert TARGET not in {site.name for site in plan.sites}
    assert [weight.name for weight in plan.uncovered] == [f"{TARGET}.weight"]


def test_plan_and_compression_agree_on_what_is_covered(compress: Callable[..., Any]) -> None:
    for kind in (Scaled, Written, FalconLinear):
        model = with_layer(kind(32, 48, bias=False))
        recipe = Recipe(method="svd", keep=0.6)
        planned = plan_of(model.to("meta"), recipe, 4)
        found = compress(with_layer(kind(32, 48, bias=False)), method="svd", keep=0.6).plan
        assert [site.name for site in planned.sites] == [site.name for site in found.sites]
        assert planned.uncovered == found.uncovered


@pytest.mark.parametrize("kind", [FalconLinear, Written, Named])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_true_linear_subclass_stays_covered(kind: type[nn.Linear], dtype: torch.dtype) -> None:
    for bias in (False, True):
        model = with_layer(kind(32, 48, bias=bias)).to(dtype)
        assert reasons(model) == {}


def test_conv1d_subclasses_are_tried_too() -> None:
    model = TINY_MODELS["gpt2"]()
    old = model.transformer.h[0].mlp.c_fc
    new = ScaledConv(old.nf, old.nx)
    new.load_state_dict(old.state_dict())
    model.transformer.h[0].mlp.c_fc = new
    assert list(reasons(model)) == ["transformer.h.0.mlp.c_fc.weight"]


def test_a_layer_that_puts_out_a_pair_is_not_covered() -> None:
    model = with_layer(Pair(32, 48, bias=False))
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)[0])
    assert "outputs a tuple" in reasons(model)[f"{TARGET}.weight"]


def test_llama_4s_router_is_not_covered() -> None:
    class Config:
        hidden_size, num_local_experts, num_experts_per_tok = 32, 4, 1

    router = Llama4Router(Config())
    model = TINY_MODELS["llama"]()
    model.model.layers[0].mlp.router = router
    found = {weight.name: weight.reason for weight in find_anatomy(model).uncovered}
    assert list(found) == ["model.layers.0.mlp.router.weight"]


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("wrap", ["weight_norm", "old weight_norm", "spectral_norm", "prune"])
def test_a_weight_that_is_computed_is_not_covered(wrap: str) -> None:
    model = TINY_MODELS["llama"]()
    layer = model.get_submodule(TARGET)
    {
        "weight_norm": torch.nn.utils.parametrizations.weight_norm,
        "old weight_norm": torch.nn.utils.weight_norm,
        "spectral_norm": torch.nn.utils.parametrizations.spectral_norm,
        "prune": lambda module: prune.l1_unstructured(module, "weight", 0.5),
    }[wrap](layer)
    found = reasons(model)
    assert found
    assert all(name.startswith(TARGET) and "computed from other tensors" in why for name, why in found.items())


def test_an_overridden_forward_of_one_layer_is_seen() -> None:
    model = TINY_MODELS["llama"]()
    layer = model.get_submodule(TARGET)
    layer.forward = lambda x: nn.functional.linear(x, layer.weight).tanh()
    assert "difference" in reasons(model)[TARGET]
    layer.forward = lambda x: nn.functional.linear(x, layer.weight)
    assert reasons(model) == {}


def test_a_hook_that_changes_the_output_is_seen_and_one_that_looks_is_kept(compress: Callable[..., Any]) -> None:
    model = TINY_MODELS["llama"]()
    model.get_submodule(TARGET).register_forward_hook(lambda _, __, output: output * 2)
    assert "difference" in reasons(model)[TARGET]
    for recipe in METHODS:
        model, seen = TINY_MODELS["llama"](), []
        layer = model.get_submodule(TARGET)
        handle = layer.register_forward_hook(lambda _, args, __, seen=seen: seen.append(args[0].shape))
        layer.register_forward_pre_hook(lambda _, args: (args[0] * 0.5,))
        compress(model, **recipe)
        new, x = model.get_submodule(TARGET), torch.randn(5, 32)
        assert new is not layer
        seen.clear()
        torch.testing.assert_close(new(x), 0.5 * x @ new.weight.T, atol=1e-5, rtol=1e-4)
        assert len(seen) == 1
        handle.remove()
        model(input_ids=torch.arange(8)[None])
        assert len(seen) == 1


def test_a_hook_on_a_state_dict_is_refused(compress: Callable[..., Any]) -> None:
    model = TINY_MODELS["llama"]()
    model.get_submodule(TARGET).register_state_dict_post_hook(lambda *_: None)
    with pytest.raises(ParedError, match=rf"site {TARGET} has a hook on its state dict"):
        compress(model, method="svd", keep=0.6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [1.02, 0.98])
def test_a_layer_that_is_two_percent_off_is_seen_in_every_dtype(dtype: torch.dtype, factor: float) -> None:
    """Of a bfloat16 model it was covered: the tolerance was that of a product in another order of bfloat16 sums."""
    model = TINY_MODELS["llama"]().to(dtype)
    layer = model.get_submodule(TARGET)
    own = layer.forward
    layer.forward = lambda x: own(x) * factor
    assert "difference" in reasons(model)[TARGET]
    layer.forward = lambda x: own(x.clone())
    assert reasons(model) == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_layer_whose_terms_cancel_stays_covered_in_half_precision(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = Written(64, 48)
    with torch.no_grad():
        half = torch.randn(48, 32, generator=generator)
        layer.weight.copy_(torch.cat([half, -half], dim=1) + 1e-2 * torch.randn(48, 64, generator=generator))
        layer.bias.copy_(10 * torch.randn(48, generator=generator))
        x = torch.randn(1, 8, 32, generator=generator).repeat(1, 1, 2).to(dtype)
        layer.to(dtype)
        assert fault_of_call(layer, (x,), {}, layer(x)) is None


class OnlyHalf(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != torch.bfloat16:
            raise TypeError("the kernel takes bfloat16")
        return nn.functional.linear(x, self.weight, self.bias)


class ToHalf(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x.bfloat16(), self.weight.bfloat16())


class Elsewhere(nn.Linear):
    """Runs nowhere but in a model."""

    ready = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not Elsewhere.ready:
            raise RuntimeError("no such device")
        return nn.functional.linear(x, self.weight, self.bias)


class ElsewhereScaled(Elsewhere):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 1.5


@pytest.mark.parametrize("kind", [OnlyHalf, ToHalf])
def test_a_class_that_takes_one_dtype_is_judged_in_it(kind: type[nn.Linear]) -> None:
    """It was listed as not covered, as its stand-in was always of float32."""
    model = with_layer(kind(32, 48, bias=False)).bfloat16()
    assert reasons(model) == {}
    assert find_anatomy(model.to("meta")).uncovered == ()


def test_a_class_that_no_stand_in_of_runs_is_judged_by_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model, scaled = (with_layer(kind(32, 48, bias=False)) for kind in (Elsewhere, ElsewhereScaled))
    anatomies = [find_anatomy(one) for one in (model, scaled)]
    monkeypatch.setattr(Elsewhere, "ready", True)
    assert probe(model, anatomies[0])[0].uncovered == ()
    assert "difference" in probe(scaled, anatomies[1])[0].uncovered[0].reason


class WithoutBias(nn.Linear):
    """Its bias is added elsewhere."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight)


@pytest.mark.parametrize("biased", [0, 1])
def test_layers_of_one_class_with_and_without_bias_are_judged_apart(biased: int) -> None:
    model = TINY_MODELS["llama"]()
    for index in (0, 1):
        model.model.layers[index].self_attn.o_proj = WithoutBias(32, 32, bias=index == biased)
    found = [weight.name for weight in find_anatomy(model).uncovered]
    assert found == [f"model.layers.{biased}.self_attn.o_proj.weight"]


class Logging(nn.Linear):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[Any] = []
        self.by_shape: dict[Any, int] = {}
        self.count = torch.zeros(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x.shape)
        self.by_shape[x.shape] = 1
        self.count += 1
        return nn.functional.linear(x, self.weight, self.bias)


def test_looking_for_sites_changes_nothing_that_a_layer_holds() -> None:
    model = with_layer(Logging(32, 48, bias=False))
    assert find_anatomy(model).uncovered == ()
    layer = model.get_submodule(TARGET)
    assert (layer.seen, layer.by_shape, float(layer.count)) == ([], {}, 0)


class ByBuffer(nn.Linear):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


@pytest.mark.parametrize(("kind", "name"), [(ByBuffer, "scale"), (Learned, "gain")])
def test_a_class_that_computes_with_further_tensors_is_refused_by_their_names(kind: type[nn.Linear], name: str) -> None:
    """With a scale of 1 it is linear, and the reason said that its output is not the product."""
    reason = reasons(with_layer(kind(32, 48, bias=False)))[f"{TARGET}.weight"]
    assert reason.endswith(f" for every value of its further tensors ({name})")


class InFloat32(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x.float(), self.weight.float())


class Grouped(nn.Linear):
    """Two halves of the input, each by the weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x.unflatten(-1, (2, -1)), self.weight).flatten(-2)


def test_a_layer_that_computes_in_another_dtype_is_not_covered() -> None:
    model = with_layer(InFloat32(32, 48, bias=False))
    assert reasons(model) == {}
    model = TINY_MODELS["llama"]().bfloat16()
    layer = InFloat32(32, 48, bias=False).bfloat16()
    mlp = model.model.layers[1].mlp
    mlp.up_proj = layer
    mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x).to(x.dtype))
    assert "in torch.float32, not" in reasons(model)[TARGET]
    mlp.up_proj = layer.float()
    mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x).to(x.dtype))
    assert "it reads (1, 8, 32) in torch.bfloat16, not" in reasons(model)[TARGET]


def test_a_grouped_layer_is_not_covered() -> None:
    model = TINY_MODELS["llama"]()
    layer = Grouped(16, 24, bias=False)
    model.model.layers[1].mlp.up_proj = layer
    model(input_ids=torch.arange(8)[None])
    assert list(reasons(model)) == [TARGET]
    model.to("meta")
    assert [weight.name for weight in probe_shapes(model, find_anatomy(model)).uncovered] == [TARGET]


def test_a_weight_shared_with_an_embedding_is_refused(compress: Callable[..., Any]) -> None:
    model = TINY_MODELS["llama"]()
    model.model.layers[0].self_attn.q_proj.weight = nn.Parameter(torch.randn(32, 32) * 0.2)
    model.model.extra = nn.Embedding(32, 32)
    model.model.extra.weight = model.model.layers[0].self_attn.q_proj.weight
    with pytest.raises(ParedError, match=r"q_proj and model\.extra are tied to one weight"):
        compress(model, method="svd", keep=0.6)


def test_one_layer_under_two_names_is_refused(compress: Callable[..., Any]) -> None:
    model = TINY_MODELS["llama"]()
    attention = model.model.layers[0].self_attn
    attention.alias = attention.q_proj
    with pytest.raises(ParedError, match=r"tied to one weight"):
        compress(model, method="svd-llm", keep=0.6)


def test_a_layer_called_by_keyword_is_not_covered() -> None:
    model = TINY_MODELS["llama"]()
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(input=x))
    assert reasons(model)[TARGET] == "it is not called with its input alone"


@pytest.mark.parametrize("recipe", METHODS, ids=lambda recipe: "-".join(map(str, recipe.values())))
def test_what_is_frozen_stays_frozen(compress: Callable[..., Any], recipe: dict[str, Any]) -> None:
    model = TINY_MODELS["qwen2"]()
    for index, layer in enumerate(model.model.layers):
        layer.requires_grad_(index == 1)
    model.model.layers[1].self_attn.q_proj.bias.requires_grad_(False)
    compress(model, **recipe)
    for name, parameter in model.model.layers.named_parameters():
        frozen = name.startswith("0.") or name in ("1.self_attn.q_proj.bias", "1.self_attn.q_proj.up.bias")
        assert parameter.requires_grad != frozen or name.endswith("down.weight"), name
    for module in model.modules():
        down = getattr(module, "down", None)
        if down is not None and getattr(module, "shares", None):
            assert not down.weight.requires_grad  # one of its two layers was frozen


@pytest.mark.parametrize("recipe", METHODS, ids=lambda recipe: "-".join(map(str, recipe.values())))
def test_every_module_keeps_its_mode(compress: Callable[..., Any], recipe: dict[str, Any]) -> None:
    model = TINY_MODELS["llama"]().train()
    model.model.layers[0].mlp.eval()
    compress(model, **recipe)
    for name, module in model.named_modules():
        assert module.training != name.startswith("model.layers.0.mlp"), name


class Wrapped(torch.Tensor):
    """A tensor subclass, as quantisers make them."""


@pytest.mark.parametrize("method", [{"method": "svd", "keep": 0.8}, {"method": "wanda", "sparsity": 0.5}])
@pytest.mark.parametrize(
    ("weight", "said"),
    [
        (lambda w: nn.Parameter((w * 10).to(torch.int8), requires_grad=False), r"torch\.int8"),
        (lambda w: nn.Parameter((w * 10).to(torch.uint8), requires_grad=False), r"torch\.uint8"),
        (lambda w: nn.Parameter(w.to(torch.float8_e4m3fn), requires_grad=False), r"float8_e4m3fn"),
        (lambda w: nn.Parameter(w.to(torch.complex64)), r"complex64"),
        (lambda w: nn.Parameter(w.as_subclass(Wrapped)), r"test_proof\.Wrapped"),
    ],
)
def test_weights_that_are_quantised_in_memory_are_refused_by_what_they_are(
    compress: Callable[..., Any], method: dict[str, Any], weight: Callable[..., Any], said: str
) -> None:
    model = TINY_MODELS["llama"]()
    layer = model.get_submodule(TARGET)
    layer.weight = weight(layer.weight.detach())
    with pytest.raises(ParedError, match=rf"site {TARGET} holds .*{said}.*without quantisation"):
        compress(model, **method)


def test_layers_of_another_library_that_hold_integers_are_named(compress: Callable[..., Any]) -> None:
    class Packed(nn.Module):
        def __init__(self, layer: nn.Linear) -> None:
            super().__init__()
            self.register_buffer("qweight", (layer.weight.detach() * 10).to(torch.int8))
            self.gain = nn.Parameter(torch.ones(1, layer.in_features))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * self.gain) @ self.qweight.to(x).T

    model = TINY_MODELS["llama"]()
    for name, module in list(model.model.layers.named_modules()):
        if isinstance(module, nn.Linear):
            model.model.layers.set_submodule(name, Packed(module))
    with pytest.raises(ParedError, match=r"no linear layer inside the 3 blocks.*qweight \(32, 32\) of torch\.int8"):
        compress(model, method="svd", keep=0.8)


def test_a_model_quantised_by_torch_itself_is_named(compress: Callable[..., Any]) -> None:
    class Linear(nn.Module):
        """As torch.ao.nn.quantized.dynamic.Linear, which has no parameters."""

    Linear.__module__ = "torch.ao.nn.quantized.dynamic.modules.linear"
    model = TINY_MODELS["llama"]()
    for name, module in list(model.model.layers.named_modules()):
        if isinstance(module, nn.Linear):
            model.model.layers.set_submodule(name, Linear())
    with pytest.raises(ParedError, match=r"q_proj is a torch\.ao\.nn\.quantized\.dynamic.*without quantisation"):
        compress(model, method="svd", keep=0.8)
