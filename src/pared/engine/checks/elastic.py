"""Which models a folder of every size is made of: those in the memory of one process, with layers of their own."""

from collections.abc import Collection

from pared.errors import ParedError
from pared.names import called


def require_elastic(opened: Collection[object], streamed: bool, processes: int) -> None:
    """Refuse a model that no folder of every size is made of.

    Args:
        opened: mixtures whose experts are to be opened.
        streamed: whether blocks are read one by one.
        processes: that compress together.

    Raises:
        ParedError: says why, and what to do.
    """
    if opened:
        raise ParedError("elastic does not cut experts of mixtures, which are layers of their own only where one of "
                         f"them is smaller; leave them out ({called('skip', '*experts*')})")  # fmt: skip
    if streamed:
        raise ParedError("elastic keeps the factors of all sizes in memory, got a model that is read block by block; "
                         f"keep it in memory ({called('stream', 'off')})")  # fmt: skip
    if processes > 1:
        raise ParedError(f"elastic is made by one process, got {processes}; start one")
