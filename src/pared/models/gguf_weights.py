"""The tensors of a GGUF file by the names of a model, dequantised block by block.

Names and layouts are mapped by transformers, which has two ways: renamings and conversions, as of other checkpoints,
for some architectures; tables of the gguf package and a function per architecture for the others. Both work on the
whole file there; here they are given one block at a time. The file is read and not mapped: mapped pages would count as
memory.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from gguf import GGMLQuantizationType, dequantize, quant_shape_to_byte_shape
from torch import nn
from transformers import GgufConfig, PretrainedConfig, PreTrainedModel
from transformers.integrations.gguf import is_gguf_arch_supported, load_gguf_state_dict
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
    load_gguf_checkpoint,
)
from transformers.quantizers.auto import get_hf_quantizer

from pared.models.gguf import slim
from pared.models.gguf_header import Header, PackedTensor
from pared.models.weights import WeightNames

PANEL = 2**24  # numbers that are dequantised at a time where they can be
BLOCK = re.compile(r"(?:\w+\.)?blk\.\d+\.")


def dequantised(gguf: Path, header: Header, kind: Any, config: PretrainedConfig) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the tensors of a GGUF file by the names that ``from_pretrained`` knows, those of a block together.

    Args:
        gguf: the file.
        header: of it.
        kind: the class of its model.
        config: of the model, whose dtype they get.

    Raises:
        ValueError: the file is truncated, or of the other order of bytes.
        NotImplementedError: a type of tensor that cannot be dequantised, or an unknown architecture.
    """
    if header.order != "<":
        raise ValueError("its numbers are big-endian; convert it with gguf-convert-endian of the gguf package")
    with init_empty_weights(include_buffers=False):
        model = kind._from_config(config, dtype=config.dtype)
    made = _renamed if is_gguf_arch_supported(header.fields["general.architecture"]) else _processed
    for group in made(gguf, header, model, _groups(header)):
        yield {name: tensor.to(config.dtype) for name, tensor in group.items()}


def _groups(header: Header) -> list[list[str]]:
    """Return the names of the tensors, those of one block together and others by themselves."""
    groups: dict[str, list[str]] = {}
    for name in header.tensors:
        block = BLOCK.match(name)
        groups.setdefault(block.group() if block else name, []).append(name)
    return list(groups.values())


def _processed(
    gguf: Path, header: Header, model: PreTrainedModel, groups: list[list[str]]
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the tensors of an architecture that the gguf package has names for."""
    with slim(gguf) as folder:
        parsed = load_gguf_checkpoint(folder / gguf.name)
    kind = TENSOR_PROCESSORS.get(header.fields["general.architecture"], TensorProcessor)
    processor = kind(config=parsed["config"])
    names = get_gguf_hf_weights_map(_Names(model), processor)
    for group in groups:
        made = parsed["tensors"] = dict[str, torch.Tensor]()  # some experts are put together there
        for name in group:
            packed = header.tensors[name]
            process = functools.partial(
                processor.process, name=name, tensor_key_mapping=names, parsed_parameters=parsed
            )
            if len(group) == 1 and len(packed.shape) > 1 and (place := _unchanged(process, packed, names)) is not None:
                made[place] = _in_panels(gguf, packed, model.dtype)
                continue
            result = process(dequantised_tensor(gguf, packed))
            if result.name in names:
                made[names[result.name]] = torch.from_numpy(np.ascontiguousarray(result.weights)).to(model.dtype)
            del result
        yield made


def _unchanged(process: Callable[[Any], Any], packed: PackedTensor, names: dict[str, str]) -> str | None:
    """Return the name in the model of a tensor that is taken as it is, found out on zeros that take no memory."""
    zeros = np.broadcast_to(np.float32(0), packed.shape)
    result = process(zeros)
    return names.get(result.name) if result.weights is zeros else None


def _in_panels(gguf: Path, packed: PackedTensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor whose rows are dequantised a panel at a time: embeddings are the largest of a model."""
    values = torch.empty(packed.shape, dtype=dtype)
    rows = max(1, PANEL // max(1, math.prod(packed.shape[1:])))
    for first in range(0, packed.shape[0], rows):
        panel = slice(first, first + rows)
        values[panel] = torch.from_numpy(dequantised_tensor(gguf, packed, panel))
    return values


class _Names:
    """What :func:`get_gguf_hf_weights_map` reads of a model, without what is inside of lists of blocks.

    It would look for the names of every module there, in a table of all blocks that it makes anew for each.
    """

    def __init__(self, module: nn.Module) -> None:
        self.config = getattr(module, "config", None)
        self.state_dict = module.state_dict
        self._children = [(name, one) for name, one in module.named_children() if not isinstance(one, nn.ModuleList)]

    def named_children(self) -> list[tuple[str, "_Names"]]:
        """Return the modules inside that are no lists, by name."""
        return [(name, _Names(child)) for name, child in self._children]


def dequantised_tensor(gguf: Path, packed: PackedTensor, rows: slice = slice(None)) -> Any:
    """Return the values of a tensor, or of some of its rows, as an array of float32."""
    kind = GGMLQuantizationType(packed.kind)
    count, *inner = quant_shape_to_byte_shape(packed.shape, kind)
    first, last, _ = rows.indices(count) if len(packed.shape) > 1 else (0, count, 1)
    size = math.prod(inner)
    raw = np.fromfile(gguf, dtype=np.uint8, count=(last - first) * size, offset=packed.start + first * size)
    if raw.size < (last - first) * size:
        raise ValueError("it ends within a tensor")
    return dequantize(raw.reshape(last - first, *inner), kind)


def _renamed(
    gguf: Path, header: Header, model: PreTrainedModel, groups: list[list[str]]
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the tensors of an architecture that transformers has renamings and conversions for."""
    del header
    config = GgufConfig(dequantize=True)
    quantizer, _, _ = get_hf_quantizer(model.config, config, None, True, {}, gguf_file=str(gguf))
    quantizer.read_header(str(gguf))
    quantizer.update_dtype(model.dtype)
    quantizer.preprocess_model(model=model, dtype=model.dtype, device_map=None, checkpoint_files=[str(gguf)])
    names, tensors = WeightNames(model, model.dtype, quantizer, str(gguf)), load_gguf_state_dict(quantizer.header)
    for group in groups:
        yield names.converted({name: tensors[name] for name in group})
