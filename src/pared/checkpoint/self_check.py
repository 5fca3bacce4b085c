"""The check of what was just written: if it fails, the fault is pared's, and is reported so that it can be fixed."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel

from pared.checkpoint.load import load
from pared.checkpoint.streamed import StreamedBlocks
from pared.checkpoint.verify import compare, open_whole, require_tensors, stored_tensors
from pared.environment import versions
from pared.errors import DamagedError, ParedError
from pared.schema.manifest import Fingerprint


@contextmanager
def our_own(folder: Path, source: str) -> Iterator[None]:
    """Report what is wrong with a folder that was just written as a fault of pared: it cannot be fetched again.

    Args:
        folder: the new one, not yet in its place.
        source: the name of what it was made from.

    Raises:
        ParedError: anything was; says where, that the source is as it was, and what to report.
    """
    try:
        yield
    except ParedError as error:
        what = error.what if isinstance(error, DamagedError) else str(error)
        for name in (f"model {str(folder)!r}", str(folder)):
            what = what.replace(name, "the new folder")
        told = ", ".join(f"{name} {version}" for name, version in versions().items())
        raise ParedError(
            f"the self-check of what was made of {source} failed: {what.removeprefix('self-check failed: ')}. {source} "
            "is as it was, and nothing was written to the output. This is a fault of pared or of the model's own code, "
            f"not of your files: report this line with the recipe and the model's config.json ({told})"
        ) from error


def written(folder: Path, source: str) -> int:
    """Check that the files hold every tensor of the map; return their bytes.

    Raises:
        ParedError: as :func:`our_own`.
    """
    with our_own(folder, source):
        return require_tensors(folder)


def reloaded(folder: Path, fingerprint: Fingerprint, source: str) -> tuple[PreTrainedModel, float]:
    """Load what was written and compare it with what was in memory.

    Returns:
        The model, and the largest difference relative to the largest output.

    Raises:
        ParedError: as :func:`our_own`.
    """
    with our_own(folder, source):
        model = load(folder)
        try:
            return model, compare(model, fingerprint)
        except DamagedError as error:
            raise DamagedError(f"{error.what}; {_loaded_otherwise(model, folder)}", "") from error


def reopened(folder: Path, fingerprint: Fingerprint, source: str) -> tuple[StreamedBlocks, float]:
    """Open what was written block by block, and compare it with the model that it was written of.

    Returns:
        The model's blocks, and the largest difference relative to the largest output.

    Raises:
        ParedError: as :func:`our_own`.
    """
    with our_own(folder, source):
        store = open_whole(folder)
        return store, compare(store.model, fingerprint, store)


@torch.no_grad()
def _loaded_otherwise(model: PreTrainedModel, folder: Path) -> str:
    """Say which tensor in memory is not the one in the files, if one is."""
    state = model.state_dict()
    for name, stored in stored_tensors(sorted(folder.glob("*.safetensors"))).items():
        if name in state and not state[name].is_meta:
            values = stored.read()
            if not torch.equal(state[name].cpu(), values.to(state[name].dtype)):
                return f"the first tensor in memory that differs from what is stored is {name} of {stored.file.name}"
    return "every tensor is loaded as it is stored, so a layer computes something other than it did in memory"
