"""The vLLM plugin: quantisation method ``pared``.

vLLM calls :func:`register` in each of its processes, as an entry point of the group ``vllm.general_plugins``. What is
not about vLLM's own classes is in the modules beside this one.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from vllm.config import ModelConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    LinearMethodBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.utils import WeightsMapper, is_pp_missing_parameter

from pared.checkpoint.format import QUANT_METHOD, ParedConfig
from pared.serving.vllm.layer import Bases, FusedLayer, Matrix, MemberLayer
from pared.serving.vllm.layout import (
    DOWN,
    INSTEAD,
    Entry,
    Member,
    Style,
    UnsupportedError,
    members_of,
    require_no_experts,
)
from pared.serving.vllm.narrowing import Heads, Narrowed, Shape, arrange
from pared.serving.vllm.stream import for_engine

# The classes whose weights are cut as this plugin knows; a subclass may cut them in its own way.
STYLES: dict[type[LinearBase], Style] = {
    ReplicatedLinear: "replicated",
    ColumnParallelLinear: "column",
    MergedColumnParallelLinear: "column",
    QKVParallelLinear: "column",
    RowParallelLinear: "row",
}
SHARDS = {"q": 0, "k": 1, "v": 2}
PATCHED = "pared_reads"  # attribute of the function that reads weights, once it is ours


def register() -> None:
    """Teach vLLM the format; nothing happens if that was done in this process."""
    if not hasattr(DefaultModelLoader.get_all_weights, PATCHED):
        register_quantization_config(QUANT_METHOD)(ParedVllmConfig)
        DefaultModelLoader.get_all_weights = _reading_ours(DefaultModelLoader.get_all_weights)


class ParedVllmConfig(QuantizationConfig):
    """The map of a folder, and what the layers of one model have in common.

    Attributes:
        told: the map, with the names of the checkpoint.
        modules: its entries, by the names of vLLM's model.
        shared: its shared tensors, by those names.
        claimed: the modules that a layer of the model was made for.
        bases: the shared bases that were made so far.
        narrowed: layers that lost outputs, before the one that reads them is made.
        narrow_parents: the modules that have a narrow layer other than an attention's.
    """

    def __init__(self, told: ParedConfig) -> None:
        super().__init__()
        self.told = told
        self.modules: dict[str, Entry] = dict(told.modules)
        self.shared: dict[str, str] = dict(told.shared)
        self.renamed: Callable[[str], str] = str
        self.claimed: set[str] = set()
        self.bases: Bases = {}
        self.narrowed: Narrowed = {}
        self.narrow_parents: set[str] = set()

    def get_name(self) -> str:
        """Return ``pared``."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Return the dtypes that a model may be served in."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return 0: any device, as the matrices are multiplied as dense ones are."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return no file: the map is in ``config.json``."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ParedVllmConfig":
        """Read the map.

        Raises:
            ValueError: it is of a newer version, or malformed, or has experts that are layers of their own.
        """
        told = ParedConfig(**config)
        require_no_experts(told.experts)
        return cls(told)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Take the names that vLLM's model gives to the modules."""

        def rename(name: str) -> str:
            return hf_to_vllm_mapper.map_name(name) or name

        before = self.renamed
        self.renamed = lambda name: rename(before(name))
        self.modules = {self.renamed(name): entry for name, entry in self.told.modules.items()}
        self.shared = {self._tensor(alias): self._tensor(owner) for alias, owner in self.told.shared.items()}

    def _tensor(self, name: str) -> str:
        return self.renamed(name.removesuffix(DOWN)) + DOWN

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return what makes and runs a linear layer: ours where the map changes a module of it.

        Raises:
            UnsupportedError: it is of a class that is not known.
        """
        if not isinstance(layer, LinearBase):
            return None
        sizes = getattr(layer, "output_sizes", [0])
        members = members_of(prefix, len(sizes), self.packed_modules_mapping, self.modules, self.shared)
        if not members:
            return UnquantizedLinearMethod()
        if type(layer) not in STYLES:
            raise UnsupportedError(f"{members[0].name}: layers of {type(layer).__name__} cannot be served compressed; "
                                   f"{INSTEAD}")  # fmt: skip
        self.claimed.update(member.name for member in members)
        return ParedLinearMethod(self, prefix, members)

    def check(self, model: nn.Module) -> None:
        """Refuse a model that has no layer for a module of the map, or one that lost channels without its reader.

        Raises:
            UnsupportedError: that is so.
        """
        for name in self.modules:
            if name not in self.claimed and not is_pp_missing_parameter(name + DOWN, model):
                raise UnsupportedError(f"{name}: {type(model).__name__} of this vLLM has no layer for it that can be "
                                       f"compressed; {INSTEAD}")  # fmt: skip
        for parent in self.narrowed:
            raise UnsupportedError(f"{parent}: one of its layers lost channels, and none that reads them was found")
        for parent in self.narrow_parents:
            if any(isinstance(child, AttentionLayerBase) for child in model.get_submodule(parent).children()):
                raise UnsupportedError(
                    f"{parent}: it lost heads, and its queries, keys and values are no layer of vLLM's"
                )


class Slot(nn.Module):
    """Where vLLM looks for a tensor of two factors by name: ``weight`` of ``down`` or ``up``."""


class ParedLinearMethod(LinearMethodBase):
    """Makes, fills and runs one layer that has compressed modules.

    Args:
        config: of the model.
        prefix: the layer's full name.
        members: the modules that it is made of.
    """

    def __init__(self, config: ParedVllmConfig, prefix: str, members: list[Member]) -> None:
        self.config, self.prefix, self.members = config, prefix, members
        self.dense = UnquantizedLinearMethod()
        self.made: list[MemberLayer] = []  # no part of the model before all is read

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,  # noqa: ARG002 - computed from what lost channels too
        output_partition_sizes: list[int],  # noqa: ARG002
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,  # noqa: ARG002
    ) -> None:
        """Make room for the tensors of every module, and put slots where vLLM looks for them by name.

        Raises:
            UnsupportedError: a module does not fit the layer.
        """
        shape = _shape(layer, input_size, output_size)
        parent = self.prefix.rpartition(".")[0]
        arranged = arrange(self.prefix, self.members, shape, self.config.narrowed)
        if isinstance(self.config.narrowed.get(parent), int):
            self.config.narrow_parents.add(parent)
        _resize(layer, arranged.cut.sizes, arranged.cut.columns, shape)
        for member in self.members:
            if member.entry and member.entry["bias"] != layer.has_bias:
                raise UnsupportedError(f"{member.name}: bias is {member.entry['bias']} in the map, {layer.has_bias} in "
                                       f"{type(layer).__name__}")  # fmt: skip
        if layer.has_bias and layer.skip_bias_add:
            raise UnsupportedError(
                f"{self.members[0].name}: its bias is added outside of the layer, which is not supported"
            )
        self.made = [
            MemberLayer(member, arranged, layer.has_bias, params_dtype, self.config.bases) for member in self.members
        ]
        for name in sorted({name for one in self.made for name in one.shapes} - {"bias"}):
            _add_slot(layer, name, functools.partial(self._read, name), params_dtype)
        layer.weight_loader = functools.partial(self._read, "bias")  # which LinearBase gives to the bias that it makes

    def _read(self, name: str, _: nn.Parameter, tensor: torch.Tensor, shard: str | int | None = None) -> None:
        """Take a tensor of the module that vLLM calls this shard; it has none where a layer is not fused."""
        place = SHARDS.get(shard, -1) if isinstance(shard, str) else shard
        if place is None and len(self.made) == 1:
            place = 0
        if not isinstance(place, int) or not 0 <= place < len(self.made):
            raise UnsupportedError(f"{self.prefix}: {name} is of shard {shard!r}, expected one of "
                                   f"{[one.member.name for one in self.made]}")  # fmt: skip
        self.made[place].load(name, tensor)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Put the modules in the place of the slots.

        Raises:
            UnsupportedError: a tensor was not read.
        """
        for one in self.made:
            one.finish(self.dense.process_weights_after_loading)
        for name in {name.partition(".")[0] for one in self.made for name in one.shapes} - {"bias"}:
            delattr(layer, name)
        if layer.bias is not None:
            layer.bias.data = layer.bias.data.new_empty(0)  # the modules have theirs; that it is there tells to add it
        layer.modules_of_pared = FusedLayer(self.made)
        self.made = []

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Map ``(batch, in)`` to ``(batch, out)``; the bias is that of the modules, and added where vLLM passes one."""
        y: torch.Tensor = layer.modules_of_pared(x, self._multiply, bias is not None)
        return y

    def _multiply(self, matrix: Matrix, x: torch.Tensor, bias: bool) -> torch.Tensor:
        y: torch.Tensor = self.dense.apply(matrix, x, matrix.bias if bias else None)
        return y


def _shape(layer: Any, inputs: int, outputs: int) -> Shape:
    """Return a layer as vLLM has made it from the configuration."""
    style = STYLES[type(layer)]
    ranks, rank = (1, 0) if style == "replicated" else (layer.tp_size, layer.tp_rank)
    if not isinstance(layer, QKVParallelLinear):
        return Shape(style, inputs, tuple(getattr(layer, "output_sizes", [outputs])), ranks, rank)
    size = layer.head_size
    if layer.v_head_size != size:
        raise UnsupportedError(f"{layer.prefix}: heads of values are {layer.v_head_size} wide, those of keys {size}")
    heads = Heads(layer.total_num_heads, layer.total_num_kv_heads, size)
    sizes = (heads.queries * size, heads.keys * size, heads.keys * size)
    return Shape(style, inputs, sizes, ranks, rank, heads)


def _resize(layer: Any, sizes: tuple[int, ...], inputs: int, shape: Shape) -> None:
    """Tell a layer that lost channels how wide it is, which the bias that it makes and its readers go by."""
    if sizes != shape.sizes:
        each = [size // shape.ranks for size in sizes]
        layer.output_size, layer.output_partition_sizes = sum(sizes), each
        layer.output_size_per_partition = sum(each)
        if hasattr(layer, "output_sizes"):
            layer.output_sizes = list(sizes)
    if inputs != shape.inputs:
        layer.input_size, layer.input_size_per_partition = inputs, inputs // shape.ranks


def _add_slot(layer: nn.Module, name: str, load: Callable[..., None], dtype: torch.dtype) -> None:
    """Put an empty parameter where vLLM looks for a tensor; models that reorder rows ask it which side they are."""
    factor, _, leaf = name.rpartition(".")
    place = layer
    if factor:
        place = getattr(layer, factor, None) or Slot()
        setattr(layer, factor, place)
    empty = nn.Parameter(torch.empty(0, dtype=torch.int32 if leaf == "order" else dtype), requires_grad=False)
    empty.weight_loader = load  # type: ignore[attr-defined]
    if name in ("weight", "up.weight"):
        empty.output_dim = 0  # type: ignore[attr-defined]
    place.register_parameter(leaf, empty)


Reader = Callable[[DefaultModelLoader, ModelConfig, nn.Module], Iterator[tuple[str, torch.Tensor]]]


def _reading_ours(read: Reader) -> Reader:
    """Return vLLM's own reading of a folder, with the tensors of ours as its models take them.

    vLLM has no hook between the files and the code of a model, and some of that code reorders what it reads by name.
    """

    @functools.wraps(read)
    def get_all_weights(
        self: DefaultModelLoader, model_config: ModelConfig, model: nn.Module
    ) -> Iterator[tuple[str, torch.Tensor]]:
        tensors = read(self, model_config, model)
        if model_config.quantization != QUANT_METHOD:
            return tensors
        methods = (getattr(module, "quant_method", None) for module in model.modules())
        config = next((one.config for one in methods if isinstance(one, ParedLinearMethod)), None)
        if config is None:
            raise UnsupportedError(f"{type(model).__name__} of this vLLM has no layer for any module of the folder's "
                                   f"map; {INSTEAD}")  # fmt: skip
        config.check(model)
        if self.enable_weights_track is None:
            self.enable_weights_track = True  # every other weight must be read too, as vLLM asks of a dense model
        return for_engine(tensors, config.told.modules, config.told.shared)

    setattr(get_all_weights, PATCHED, True)
    return get_all_weights
