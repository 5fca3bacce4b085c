"""Writing a GGUF file, tensor by tensor, and reading it back to compare."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_VERSION, GGUFWriter, LlamaFileType, quant_shape_to_byte_shape, quantize
from gguf import GGMLQuantizationType as Kind

from pared.errors import ParedError
from pared.io.guarded import brief
from pared.models.gguf_header import MAGIC, Header, read_header
from pared.models.gguf_weights import dequantised_tensor
from pared.serving.gguf.description import Description, GgufTensor
from pared.serving.gguf.types import TYPES
from pared.serving.gguf.vocabulary import Vocabulary

BLOCK = 32  # numbers of a row that q8_0 stores with one scale
LARGEST = float(torch.finfo(torch.float16).max)
HALF_ROUNDING, HALF_SMALLEST = 2.0**-11, 2.0**-25  # of float16: of a normal number, and of one too small to be normal


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF files do."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def type_of(tensor: GgufTensor, kind: str) -> Kind:
    """Return the type that a tensor is stored in: vectors as float32, rows that q8_0 cannot divide as float16."""
    if len(tensor.shape) == 1:
        return Kind.F32
    chosen = Kind[TYPES[kind].kind]
    return Kind.F16 if chosen is Kind.Q8_0 and tensor.shape[-1] % BLOCK else chosen


def indivisible(description: Description, kind: str) -> list[GgufTensor]:
    """Return the matrices that are stored as float16, as q8_0 cannot divide their rows."""
    if Kind[TYPES[kind].kind] is not Kind.Q8_0:
        return []
    return [tensor for tensor in description.tensors if type_of(tensor, kind) is Kind.F16]


def size_of(description: Description, kind: str) -> int:
    """Return the bytes that the tensors take."""
    return sum(math.prod(_bytes_of(one, type_of(one, kind))) for one in description.tensors)


def write_gguf(path: Path, description: Description, vocabulary: Vocabulary, name: str, kind: str) -> None:
    """Write a model; memory: one tensor beside the model.

    Args:
        path: of the file.
        description: of the model.
        vocabulary: of its tokenizer.
        name: that the file says the model has.
        kind: a key of :data:`TYPES`.

    Raises:
        ParedError: a weight is too large for float16.
        OSError: it cannot be written.
    """
    writer = GGUFWriter(path, description.architecture)
    try:
        _add_fields(writer, _fields(description, vocabulary), name, kind)
        for tensor in description.tensors:
            stored = _bytes_of(tensor, type_of(tensor, kind))
            writer.add_tensor_info(tensor.name, stored, np.dtype(np.uint8), math.prod(stored), type_of(tensor, kind))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in description.tensors:
            writer.write_tensor_data(_stored(tensor, type_of(tensor, kind)))
    finally:
        writer.close()


def _add_fields(writer: GGUFWriter, fields: Mapping[str, object], name: str, kind: str) -> None:
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(LlamaFileType[TYPES[kind].file_type])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    by_type: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
        list: writer.add_array,
    }  # fmt: skip
    for key, value in fields.items():
        by_type[type(value)](key, value)


def _fields(description: Description, vocabulary: Vocabulary) -> dict[str, object]:
    """Return what a file says of a model and of its tokenizer."""
    numbers = {f"{description.architecture}.{key}": value for key, value in description.fields.items()}
    return {**numbers, **vocabulary.fields()}


def _bytes_of(tensor: GgufTensor, kind: Kind) -> tuple[int, ...]:
    """Return the shape of a tensor in bytes."""
    return tuple(quant_shape_to_byte_shape(tensor.shape, kind))


def _stored(tensor: GgufTensor, kind: Kind) -> Any:
    """Return the bytes of a tensor.

    Raises:
        ParedError: a number in it is too large for float16.
    """
    values = tensor.values().contiguous().cpu().numpy()
    if kind is Kind.F16 and (largest := float(np.abs(values).max())) > LARGEST:
        raise ParedError(f"{tensor.name}: a weight of {largest:.3g} is too large for float16; store bf16 or f32")
    return quantize(values, kind).view(np.uint8)


def compare(path: Path, description: Description, vocabulary: Vocabulary, kind: str) -> float:
    """Read a file back and compare its fields, its whole vocabulary and every number with the model.

    Args:
        path: of the file.
        description: that it was written of.
        vocabulary: that it was written of.
        kind: that it was written in.

    Returns:
        The largest difference of a weight from the model's, relative to the largest of its tensor.

    Raises:
        ParedError: it holds something else than what was written, beyond the rounding of its type.
    """
    header = read_header(path, whole=True)
    _require_fields(header, description, vocabulary)
    worst = 0.0
    for tensor in description.tensors:
        packed = header.tensors.get(tensor.name)
        if packed is None or packed.shape != tensor.shape or packed.kind != int(type_of(tensor, kind)):
            raise ParedError(f"the file read back has {tensor.name} as {packed}, expected the shape {tensor.shape}")
        values = tensor.values().cpu()
        off = (torch.from_numpy(dequantised_tensor(path, packed)) - values).abs_()
        if bool((off > _allowed(values, type_of(tensor, kind))).any()) or not bool(off.isfinite().all()):
            raise ParedError(f"the file read back has other numbers in {tensor.name}: they differ by "
                             f"{float(off.max()):.3g}")  # fmt: skip
        worst = max(worst, float(off.max()) / (float(values.abs().max()) or 1.0))
    return worst


def _require_fields(header: Header, description: Description, vocabulary: Vocabulary) -> None:
    """Refuse a header that says something else than what was written.

    Raises:
        ParedError: names the field, and the first place of a list.
    """
    expected = {"general.architecture": description.architecture, **_fields(description, vocabulary)}
    for key in expected | dict.fromkeys(key for key in header.fields if key.startswith("tokenizer.")):
        found, wanted = header.fields.get(key), expected.get(key)
        if isinstance(wanted, float):
            wanted = float(np.float32(wanted))
        if found == wanted:
            continue
        if isinstance(found, list) and isinstance(wanted, list):
            if len(found) != len(wanted):
                raise ParedError(f"the file read back lists {len(found)} values of {key}, expected {len(wanted)}")
            place = next(place for place, (one, other) in enumerate(zip(found, wanted, strict=True)) if one != other)
            key, found, wanted = f"{key}[{place}]", found[place], wanted[place]
        raise ParedError(f"the file read back says {key} is {brief(found)}, expected {brief(wanted)}")
    if len(header.tensors) != len(description.tensors):
        raise ParedError(f"the file read back has {len(header.tensors)} tensors, expected {len(description.tensors)}")


def _allowed(values: torch.Tensor, kind: Kind) -> torch.Tensor:
    """Return how far every number may be off by the rounding of a type."""
    if kind is Kind.F32:
        return torch.zeros(())
    if kind is Kind.F16:
        return (values.half().float() - values).abs()
    if kind is Kind.BF16:
        return (values.bfloat16().float() - values).abs()
    steps = values.reshape(-1, BLOCK).abs().amax(1, keepdim=True) / 127
    allowed = steps * (0.5 + 128 * HALF_ROUNDING) + 128 * HALF_SMALLEST
    return allowed.expand(-1, BLOCK).reshape(values.shape)
