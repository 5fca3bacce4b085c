"""Whether a block is solved beside the run of the next one: only time and memory depend on it."""

from pared.engine.cost.sizes import beside_bytes
from pared.engine.observe import Observer
from pared.environment import device_of, processors
from pared.memory import available_memory
from pared.structure.store import ResidentBlocks


def pays(observer: Observer) -> bool:
    """Whether blocks are to be visited beside the run of the next ones.

    That takes a second processor, blocks that are in memory all the time, and room for the statistics of two blocks
    while one is solved. Several processes tell each other what they found, in turn; a GPU runs one thing at a time.

    Args:
        observer: that has probed the model.
    """
    at_hand = isinstance(observer.store, ResidentBlocks) and device_of(observer.spec.recipe.device).type == "cpu"
    if observer.processes.count > 1 or not at_hand or processors() < 2:
        return False
    available = available_memory()
    return available is None or available.bytes >= 2 * beside_bytes(observer.anatomy, observer.spec)
