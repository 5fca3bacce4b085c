"""A model with its cache as one ONNX graph, by the exporter of transformers, and what it answers in onnxruntime.

The graph takes the tokens behind those that are cached, their positions and the cache, and gives logits and the longer
cache: all of a prompt with an empty cache, then one token or several at a time. Factors, pivots and narrow layers are
nodes of the graph as they are modules of the model.
"""

import contextlib
import importlib.util
import io
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from pared.errors import ParedError
from pared.models.architecture import first_line

PROMPT, STEPS = 12, 12  # tokens that the check reads at once, and then one by one
TOLERANCE = 1e-3  # of the largest logit: other kernels round differently
NEEDED = ("onnx", "onnxscript", "onnxruntime")


def require_exporter() -> None:
    """Refuse to begin where what exports, or what checks, is not installed.

    Raises:
        ParedError: says what to install.
    """
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise ParedError(f"an ONNX export needs {' and '.join(missing)}; install with: pip install {' '.join(NEEDED)}")
    if importlib.util.find_spec("transformers.exporters") is None:
        raise ParedError("an ONNX export needs transformers.exporters, which transformers 5.23 has; install that")


@torch.no_grad()
def exported(model: PreTrainedModel, name: str) -> Any:
    """Return the graph of a language model, an ``ExportedModel`` of transformers with one component.

    Args:
        model: float32, in evaluation mode.
        name: of it, for messages.

    Raises:
        ParedError: it writes no text, or it cannot be traced.
    """
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter
    from transformers.exporters.utils import decompose_for_generation

    if not model.can_generate() or model.config.is_encoder_decoder:
        raise ParedError(f"model {name!r} is no decoder that writes text, expected one for an ONNX graph with a cache")
    tokens = _tokens(model, 2)
    asked = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what torch and onnxscript will change
            # The second of two stages reads several tokens behind a cache, which may be empty: it does for both.
            one, inputs = decompose_for_generation(model, asked, multi_token_decode=True)["decode"]
            made = OnnxExporter().export(one, inputs, OnnxConfig(dynamic=True))
    except Exception as error:  # torch, onnxscript and transformers each raise their own
        raise ParedError(f"model {name!r} cannot be exported to ONNX ({first_line(error)})") from error
    for graph in made.program.graphs():
        for node in graph:
            node.metadata_props.clear()  # lines of code with the paths of this machine
    return made


@torch.no_grad()
def compare(folder: Path, model: PreTrainedModel, name: str) -> float:
    """Run a folder in onnxruntime beside the model, token by token with their caches.

    Args:
        folder: that holds the graph.
        model: that it was made of.
        name: of it, for messages.

    Returns:
        The largest difference of a logit at any step, relative to the largest logit.

    Raises:
        ParedError: it differs by more than kernels can make.
    """
    from transformers.exporters.base import ExportedModel

    runner = ExportedModel.from_pretrained(folder, local_files_only=True)
    tokens, positions = _tokens(model, 1), torch.arange(PROMPT).unsqueeze(0)
    theirs, ours, worst = empty_cache(model), None, 0.0
    for _ in range(1 + STEPS):
        expected = model(tokens, past_key_values=ours, use_cache=True)
        found = runner(input_ids=tokens, position_ids=positions, past_key_values=theirs)
        ours, theirs = expected.past_key_values, found.past_key_values
        off = (found.logits - expected.logits).abs().max() / expected.logits.abs().max()
        if not off <= TOLERANCE:
            raise ParedError(f"model {name!r}: the ONNX graph does not answer as the model: logits differ by "
                             f"{float(off):.2g} of the largest, expected {TOLERANCE:g} at most")  # fmt: skip
        worst = max(worst, float(off))
        tokens, positions = expected.logits[:, -1:].argmax(-1), positions[:, -1:] + 1
    return worst


def _tokens(model: PreTrainedModel, rows: int) -> torch.Tensor:
    """Return fixed tokens ``(rows, PROMPT)``."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return (torch.arange(rows * PROMPT) * 7919 % vocabulary).view(rows, PROMPT)


def empty_cache(model: PreTrainedModel) -> DynamicCache:
    """Return a cache of no token, of the heads that every layer has."""
    filled = model(_tokens(model, 1), use_cache=True).past_key_values
    return DynamicCache(ddp_cache_data=[(one.keys[:, :, :0], one.values[:, :, :0]) for one in filled.layers])
