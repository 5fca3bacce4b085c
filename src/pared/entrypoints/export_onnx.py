"""From any language model to an ONNX graph with its cache, which onnxruntime runs."""

import copy
from pathlib import Path

from pared.checkpoint.load import load, require_recorded
from pared.checkpoint.save import save_beside
from pared.checkpoint.seal import seal_plain
from pared.entrypoints.export import require_whole_bits
from pared.entrypoints.publish import Written
from pared.errors import ParedError
from pared.io.apart import require_apart
from pared.io.inputs import inputs_of
from pared.io.output_dir import require_free, staged
from pared.io.record import MANIFEST
from pared.models.source import find_model
from pared.modules.opened import experts_map
from pared.names import called
from pared.serving.onnx import compare, exported, require_exporter


def export_onnx(name: str, out: Path, overwrite: bool = False) -> Written:
    """Write a model as a folder with an ONNX graph in float32, its cache as inputs and outputs, and the tokenizer.

    Factors, pivots and narrow layers stay what they are; zeros are written out. The folder is run in onnxruntime beside
    the model, token by token.

    Args:
        name: of a model, dense or compressed.
        out: the folder to make.
        overwrite: whether a folder there that pared wrote may be replaced.

    Raises:
        ParedError: not a language model, a package is missing, it cannot be traced, the output is taken or is the
            model itself, the disk is full, or the graph does not answer as the model; nothing was written.
    """
    require_exporter()
    inputs = inputs_of({"model": name})
    require_free(out, overwrite, inputs)
    source = find_model(name, "float32")
    beside = [Path(source.location)]
    require_apart(out, [*beside, *inputs])
    model = load(name, "float32")
    require_whole_bits(model, name, "an ONNX graph")
    if opened := experts_map(model):
        raise ParedError(
            f"model {name!r}: the experts of {min(opened)} are compressed one by one, and which of them run depends on "
            f"the text, which no graph has a form for; {called('to', 'dense')} puts them together again"
        )
    if (beside[0] / MANIFEST).is_file():
        require_recorded(beside[0])
    needed = sum(parameter.numel() * parameter.itemsize for parameter in model.parameters())
    graph = exported(model, name)
    graph.config = copy.deepcopy(model.config)
    for attribute in ("quantization_config", "auto_map"):  # the graph needs nothing of pared
        graph.config.__dict__.pop(attribute, None)
    with staged(out, overwrite, needed, [*inputs, *beside]) as staging:
        graph.save_pretrained(staging)
        del graph
        save_beside(source.tokenizer(), staging, source)
        off = compare(staging, model, name)
        size = sum(file.stat().st_size for file in staging.glob("model.onnx*"))
        seal_plain(staging, inputs)
    return Written(size, off)
