"""What programs read and candidates are made of: collected once, kept beside the journal for a search that resumes."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pared.calibration import per_token
from pared.data.windows import Windows
from pared.engine.observe import Passes
from pared.errors import ParedError
from pared.progress import Progress
from pared.schema.recipe import Recipe
from pared.sparsity.registry import energy
from pared.structure import Anatomy
from pared.structure.probe import BlockCall

FILE = "evidence.safetensors"

Tensors = dict[str, torch.Tensor]


def kept(folder: Path, collect: Callable[[], Tensors]) -> Tensors:
    """Return what was collected before, or collect it and keep it.

    Programs of a resumed search must read the very numbers of the one that was stopped, on whatever machine.

    Args:
        folder: of the search.
        collect: makes it.

    Raises:
        ParedError: the file is damaged.
    """
    path = folder / FILE
    if not path.exists():
        tensors = {name: tensor.contiguous().cpu() for name, tensor in collect().items()}
        partial = path.with_suffix(".partial")
        save_file(tensors, partial)
        partial.chmod(0o644)  # safetensors writes files that only their owner can read
        partial.replace(path)
    try:
        return load_file(path)
    except Exception as error:  # safetensors raises its own
        raise ParedError(f"evidence {path}: not readable ({error}); remove it, and it is collected again") from None


def energies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    anatomy: Anatomy,
    calls: list[BlockCall],
    windows: Windows,
    progress: Progress,
) -> Tensors:
    """Return E[x²] of every input feature, by site, of the dense model; sites that no token reached are left out.

    Args:
        model: dense.
        tokenizer: of the model.
        recipe: of a pruner.
        anatomy: after the probe pass.
        calls: of the probe pass.
        windows: what is calibrated on.
        progress: who watches.
    """
    passes = Passes(model, tokenizer, recipe, progress)
    inputs = passes.capture(anatomy, calls, windows)
    found: Tensors = {}
    for walked in passes.walk(anatomy, inputs, energy, name="scores of the dense model"):
        for name, own in walked.statistics.items():
            if own["energy"].tokens:
                found[name] = per_token("energy", own["energy"], passes.tokens)
    return found
