"""What programs read and candidates are made of: collected once, kept beside the journal for a search that resumes."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from pared.calibration import BlockStatistics, per_token
from pared.engine.observe import Observer
from pared.engine.spec import PassSpec
from pared.errors import ParedError
from pared.io.files import appearing
from pared.sparsity.registry import energy

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
        with appearing(path) as partial:
            save_file(tensors, partial)
            partial.chmod(0o644)  # safetensors writes files that only their owner can read
    try:
        return load_file(path)
    except Exception as error:  # safetensors raises its own
        raise ParedError(f"evidence {path}: not readable ({error}); remove it, and it is collected again") from None


def energies(observer: Observer) -> Tensors:
    """Return E[x²] of every input feature, by site, of the dense model; sites that no token reached are left out.

    Args:
        observer: that has probed the dense model, and read the tokens.
    """
    found: Tensors = {}

    def visit(block: BlockStatistics) -> None:
        for name, own in block.statistics.items():
            if own["energy"].tokens:
                found[name] = per_token("energy", own["energy"], observer.tokens)

    step = PassSpec("evidence", "forward")
    observer.forward(observer.capture(), energy, visit, step, name="scores of the dense model")
    return found
