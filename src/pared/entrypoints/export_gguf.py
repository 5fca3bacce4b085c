"""From any model to a GGUF file, which llama.cpp and what is built on it read."""

import logging
import math
from collections import Counter
from pathlib import Path

import torch
from transformers import PreTrainedModel

from pared.checkpoint.load import load, read_config, require_recorded
from pared.checkpoint.plain import NARROW
from pared.checkpoint.portable import module_map
from pared.entrypoints.export import is_narrow, make_dense, require_whole_bits
from pared.entrypoints.publish import Written
from pared.errors import ParedError
from pared.io.inputs import inputs_of
from pared.io.output_file import require_free_file, staged_file
from pared.io.record import MANIFEST
from pared.models.source import ModelSource, find_model
from pared.modules.opened import experts_map
from pared.names import called
from pared.serving.gguf.description import Description, can_be_of_any_widths, described, require_covered
from pared.serving.gguf.file import BLOCK, compare, indivisible, is_gguf, size_of, write_gguf
from pared.serving.gguf.types import TYPES
from pared.serving.gguf.vocabulary import vocabulary_of

log = logging.getLogger(__name__)

OF_DTYPES = {one.dtype: name for name, one in TYPES.items() if one.dtype}  # where no type is asked for
HEADER = 16 * 2**20  # bytes that the vocabulary and names take at most, about


def export_gguf(name: str, out: Path, quantize: str = "auto", overwrite: bool = False) -> Written:
    """Write a model as a GGUF file, with its tokenizer and chat template, and compare the file with the model.

    Layers that lost channels or heads stay as they are: of one width everywhere in the model's own architecture of
    llama.cpp, of widths of their own in ``deci``. Factors are multiplied out and zeros written out; a note says how
    many numbers that adds.

    Args:
        name: of a model, dense or compressed.
        out: the file to make.
        quantize: ``f32``, ``f16``, ``bf16`` or ``q8_0``; ``auto`` keeps the dtype that the model has, float64 aside.
        overwrite: whether a GGUF file there may be replaced.

    Raises:
        ParedError: not a model, or one that no architecture of llama.cpp computes; a tokenizer that it does not have;
            the output is taken or is the model itself, the disk is full, or the file does not hold the model's
            numbers; nothing was written.
    """
    inputs = inputs_of({"model": name})
    require_free_file(out, overwrite, is_gguf, inputs)
    source = find_model(name)
    require_covered(getattr(read_config(name), "architectures", None), name)
    if quantize == "auto":
        _type_of(source.declared_dtype(), name)
    inputs = [*inputs, Path(source.location)]
    require_free_file(out, overwrite, is_gguf, inputs)
    model = load(name)
    require_whole_bits(model, name, "a .gguf file", f" with {called('quantize', 'q8_0')}")
    if (Path(source.location) / MANIFEST).is_file():
        require_recorded(Path(source.location))
    kind = quantize if quantize != "auto" else _type_of(model.dtype, name)
    description = _described(model, source)
    vocabulary = vocabulary_of(source.tokenizer(), description.rows, name)
    _tell_of_float16(description, kind)
    with staged_file(out, overwrite, is_gguf, size_of(description, kind) + HEADER, inputs) as file:
        write_gguf(file, description, vocabulary, _published_name(name), kind)
        try:
            off = compare(file, description, vocabulary, kind)
        except ValueError as error:
            raise ParedError(f"the file cannot be read back ({error})") from error
        size = file.stat().st_size
    return Written(size, off)


def _type_of(dtype: torch.dtype, name: str) -> str:
    """Return the type that a file stores where none is asked for.

    Raises:
        ParedError: no type is the dtype of the model; says which to ask for.
    """
    told = str(dtype).removeprefix("torch.")
    if told not in OF_DTYPES:
        raise ParedError(f"model {name!r} is stored in {told}, which no .gguf file is; {called('quantize', 'f32')} "
                         f"rounds it least, and {', '.join([*TYPES][1:])} make a smaller file")  # fmt: skip
    return OF_DTYPES[told]


def _described(model: PreTrainedModel, source: ModelSource) -> Description:
    """Describe a model, after what its file cannot hold was made dense; says what that adds."""
    entries = module_map(model)
    stored = _parameters(model)
    added: Counter[str] = Counter()
    narrow = any(map(is_narrow, entries.values()))
    if experts_map(model) or (narrow and not can_be_of_any_widths(model)):
        make_dense(model)
        added = Counter(entry["kind"] for entry in entries.values())
    else:
        added = Counter(entry["kind"] for entry in entries.values() if entry["kind"] not in NARROW)
    description = described(model, source.name)
    written = sum(math.prod(tensor.shape) for tensor in description.tensors)
    if added:
        told = ", ".join(f"{count} {kind}" for kind, count in sorted(added.items()))
        log.warning("a .gguf file of this model has no form for %s layers: they are written dense, and the file holds "
                    "%s numbers in place of %s", told, f"{written:,}", f"{stored:,}")  # fmt: skip
    return description


def _parameters(model: PreTrainedModel) -> int:
    """Return how many numbers a model stores; of sparse layers those that are no zeros of their pattern."""
    entries = module_map(model).values()
    zeros = sum(e["in_features"] * e["out_features"] - e["stored"] for e in entries if e["kind"] == "sparse")
    return sum(parameter.numel() for parameter in model.parameters()) - zeros


def _tell_of_float16(description: Description, kind: str) -> None:
    """Say which matrices q8_0 cannot store."""
    if wider := indivisible(description, kind):
        first = f"{wider[0].name}: {wider[0].shape[1]}"
        log.warning("%s matrices are stored as f16, as their rows are no multiple of %s numbers (%s); compress with %s "
                    "for smaller ones", len(wider), BLOCK, first, called("multiple_of", str(BLOCK)))  # fmt: skip


def _published_name(name: str) -> str:
    """Return the last part of a model's name: where it lies on this machine is told to nobody."""
    return Path(name.rpartition(":")[2]).name.removesuffix(".gguf")
