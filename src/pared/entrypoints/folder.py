"""Questions to an existing folder: whether it is whole, what it holds, how its model continues a prompt."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from pared.errors import ParedError
from pared.memory import Stream
from pared.schema.elastic import require_size
from pared.schema.manifest import Manifest


def verify(folder: Path, take_over: bool = False, stream: Stream = "auto") -> float:
    """Check a folder that pared made, refused at once if it is none.

    Args:
        folder: that pared made.
        take_over: record its files as they are now, before they are checked.
        stream: whether the model is read block by block.

    Returns:
        The largest difference from the recorded outputs, relative to the largest output.

    Raises:
        ParedError: anything is missing, damaged or different.
    """
    Manifest.read(folder)  # before anything that takes long to import
    from pared.checkpoint import record
    from pared.checkpoint import verify as check

    if take_over:
        record(folder)
    return check(folder, stream=stream)


def require_elastic(folder: Path, keep: float) -> None:
    """Refuse a folder of one size, and a size that a folder does not hold, before anything that takes long is imported.

    Raises:
        ParedError: says which sizes there are.
    """
    require_size(Manifest.read(folder).elastic, str(folder), keep)


def require_compressed(folder: Path) -> int:
    """Return the bytes of weights in a folder whose weights are not plain.

    Raises:
        ParedError: there is no such folder, or its weights are plain already.
    """
    if not folder.is_dir():
        what = "a file, expected a folder that pared made" if folder.is_file() else "no such folder"
        raise ParedError(f"{folder}: {what}")
    from pared.checkpoint import is_compressed, read_config, require_tensors

    if not is_compressed(read_config(str(folder))):
        raise ParedError(f"{folder} has nothing to convert: its weights are plain already")
    return require_tensors(folder)


def continuations(names: Sequence[str], prompt: str, tokens: int) -> Iterator[str]:
    """Yield how each of some models continues a prompt, with the tokenizer of the first.

    Args:
        names: of the models.
        prompt: the text before.
        tokens: how many follow, the likeliest each time.
    """
    from pared.checkpoint import load, load_tokenizer
    from pared.evaluation import greedy

    tokenizer = load_tokenizer(names[0])
    for name in names:
        yield greedy(load(name), tokenizer, prompt, tokens)
