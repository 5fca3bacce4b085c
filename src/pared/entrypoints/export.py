"""From any model to what needs nothing of pared: a plain dense folder, or a GGUF file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from pared.arguments import folder_from, name_from
from pared.checkpoint.load import load, require_recorded
from pared.checkpoint.loader import tie
from pared.checkpoint.portable import DYNAMIC, is_portable, module_map, own_class, own_code
from pared.checkpoint.verify import take_fingerprint, with_layers
from pared.entrypoints.checks import require_export
from pared.entrypoints.publish import Publication, ResidentSaver, Written
from pared.errors import ParedError
from pared.io.apart import require_apart
from pared.io.inputs import inputs_of
from pared.io.output_dir import require_free
from pared.io.record import MANIFEST
from pared.models.source import find_model
from pared.models.trust import trusting
from pared.modules import NarrowConv1D, SparseLinear, replace_module
from pared.modules.narrow import counts_of, forget_counts, set_counts, widen_
from pared.modules.opened import close, open_by_layout, opened_experts
from pared.names import called
from pared.structure import bias_of


def export_dense(name: str, out: Path, dtype: str = "auto", overwrite: bool = False) -> Written:
    """Write any model that has a name as a plain dense folder: factors multiplied out, zeros written out.

    The folder is loaded again and must answer as the model it was made of.

    Args:
        name: of a model, dense or compressed.
        out: the folder to make.
        dtype: to store; ``auto`` keeps what is stored, and makes bfloat16 of a quantised ``.gguf`` file.
        overwrite: whether a folder there may be replaced.

    Raises:
        ParedError: not a model, the output is taken or is the model itself, the disk is full, or the new folder does
            not answer as the model; nothing was written.
    """
    inputs = inputs_of({"model": name})
    require_free(out, overwrite, inputs)  # before a .gguf file is converted
    source = find_model(name, dtype)
    beside = [Path(source.location)]
    require_apart(out, [*beside, *inputs])
    model = load(name, dtype)  # says more of what is damaged than a digest
    if (Path(source.location) / MANIFEST).is_file():
        require_recorded(Path(source.location))  # else what is damaged would be listed as whole
    fingerprint, entries = take_fingerprint(model), module_map(model)
    make_dense(model)
    widened = [name for name in fingerprint.layers if is_narrow(entries[name])]
    fingerprint = with_layers(fingerprint, model, widened)
    needed = sum(p.numel() * p.itemsize for p in model.parameters())
    saver = ResidentSaver(model, source.tokenizer(), source, fingerprint)
    del model
    return Publication(out, name, overwrite, needed, inputs, beside).publish_plain(saver)


def export(
    model: str | Path,
    out: str | Path,
    dtype: str = "auto",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    to: str = "dense",
    quantize: str = "auto",
) -> Written:
    """Write any model that has a name as a plain dense folder, a GGUF file or an ONNX graph; none needs pared.

    Factors are multiplied out, but for ONNX, and zeros written out. What is written is read again: a folder must answer
    as the model it was made of, and a GGUF file hold its numbers.

    Args:
        model: by name, dense or compressed.
        out: the folder to make, or the ``.gguf`` file.
        dtype: that a folder stores; ``auto`` keeps what is stored, and makes bfloat16 of a quantised ``.gguf`` file.
        overwrite: whether a folder there that pared wrote, or a GGUF file, may be replaced.
        trust_remote_code: whether code that lies beside the model may run.
        to: ``dense``, ``gguf`` or ``onnx``.
        quantize: what a GGUF file stores: ``f32``, ``f16``, ``bf16`` or ``q8_0``; ``auto`` the dtype of the model.

    Raises:
        ParedError: not a model, the output is taken or is the model itself, the disk is full, the new folder does not
            answer as the model, or llama.cpp has no architecture for the model; nothing was written.

    Example:
        >>> pared.export("smaller", "plain").bytes_on_disk  # doctest: +SKIP
        >>> pared.export("smaller", "smaller.gguf", to="gguf", quantize="q8_0").bytes_on_disk  # doctest: +SKIP
    """
    function = "pared.export"
    name, out = name_from(model, function), folder_from(out, function)
    with trusting(trust_remote_code):
        require_export(name, out, to, dtype, quantize)
        return export_as(to, name, out, dtype, quantize, overwrite)


def export_as(to: str, name: str, out: Path, dtype: str, quantize: str, overwrite: bool) -> Written:
    """Write a model in one of the forms; see :func:`export`, which checks first what was asked for.

    Raises:
        ParedError: as :func:`export` says.
    """
    if to == "dense":
        return export_dense(name, out, dtype, overwrite)
    if to == "onnx":
        from pared.entrypoints.export_onnx import export_onnx  # needs the onnx packages

        return export_onnx(name, out, overwrite)
    from pared.entrypoints.export_gguf import export_gguf  # needs the gguf package

    return export_gguf(name, out, quantize, overwrite)


def require_whole_bits(model: PreTrainedModel, name: str, form: str, instead: str = "") -> None:
    """Refuse a model some of whose weights are stored in few bits, which another format would store in many again.

    Args:
        model: to be exported.
        name: of it, for messages.
        form: of the export.
        instead: what else to do.

    Raises:
        ParedError: names the first layer.
    """
    for layer, entry in module_map(model).items():
        if entry.get("bits"):
            raise ParedError(
                f"model {name!r}: {layer} is stored in {entry['bits']} bits, which {form} cannot take over; "
                f"{called('to', 'dense')} writes it in the model's dtype, or export the folder of before{instead}"
            )


def is_narrow(entry: Mapping[str, Any]) -> bool:
    """Whether an entry of a map is of a layer that lost inputs or outputs."""
    return entry["kind"].startswith("narrow") or bool(entry.get("narrow"))


@torch.no_grad()
def make_dense(model: PreTrainedModel) -> PreTrainedModel:
    """Make every compressed module the linear layer it stands for, in place: multiplied out, or with its zeros.

    Experts that are layers of their own are put together again, as the architecture holds them.

    Raises:
        ParedError: a layer has a bias that the architecture has no place for.
    """
    compressed = {name: model.get_submodule(name) for name in module_map(model)}
    counts = counts_of(model)
    _forget_compression(model)
    tie(model, {})
    with torch.device("meta"):
        skeleton = type(model)._from_config(model.config)  # knows which modules are Linear and which Conv1D
    opened = opened_experts(model)
    for name, experts in opened.items():
        open_by_layout(skeleton, name, experts.layout)
    for name, module in compressed.items():
        if isinstance(module, SparseLinear):
            module.unpack_()
        weight, bias = cast("torch.Tensor", module.weight), cast("torch.Tensor | None", module.bias)
        dense = skeleton.get_submodule(name).to_empty(device=weight.device).to(weight.dtype)
        if bias is not None and bias_of(dense) is None:
            raise ParedError(f"{name} has a bias, which {type(model).__name__} has no place for, and cannot be "
                             "written as a plain layer; keep the folder as it is")  # fmt: skip
        widen_(dense, weight.T if isinstance(module, NarrowConv1D) else weight, bias, getattr(module, "parts", 1))
        replace_module(model, name, dense)
    for name, numbers in counts.items():
        set_counts(model.get_submodule(name), {key: vars(skeleton.get_submodule(name))[key] for key in numbers})
    forget_counts(model)
    for name in opened:
        close(model, name)
    return model


def _forget_compression(model: PreTrainedModel) -> None:
    own, refs = own_code(model), dict(getattr(model.config, "auto_map", None) or {})
    for owner, attributes in (
        (model.config, ("quantization_config", "auto_map")),
        (model, ("hf_quantizer", "quantization_method", "is_quantized")),
    ):
        for attribute in attributes:
            if attribute in owner.__dict__:
                delattr(owner, attribute)
    if is_portable(type(model)):
        model.__class__ = own_class(type(model))
    # What came with the model's own folder is saved by transformers again, as it was before.
    for auto, ref in refs.items():
        cls = own.get(str(ref).rpartition(".")[2])
        if cls is not None and cls.__module__.startswith(DYNAMIC):
            file = cls.__module__.rpartition(".")[2]
            model.config.auto_map = {**(getattr(model.config, "auto_map", None) or {}), auto: f"{file}.{cls.__name__}"}
            if cls is type(model):
                cls.register_for_auto_class(auto)
