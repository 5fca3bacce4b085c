"""Statistics that wait for a later pass, or for their turn; on the disk where memory may not hold those of all."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from pared.calibration import BlockStatistics, StatisticView, save_block, saved_block
from pared.calibration.spool import ActivationMemory
from pared.memory import give_back


class StatisticsSpool:
    """Keeps statistics by site and name.

    Args:
        memory: what hidden states share; gives the folder.
        on_disk: whether statistics wait on the disk.
    """

    def __init__(self, memory: ActivationMemory, on_disk: bool) -> None:
        self._memory, self._on_disk = memory, on_disk
        self._kept: dict[str, dict[str, StatisticView]] = {}

    def __len__(self) -> int:
        """Of how many sites there are statistics."""
        return len(self._kept)

    def of(self, site: str) -> Mapping[str, StatisticView]:
        """Return what was kept of a site, by name."""
        return self._kept.get(site, {})

    def keep(self, block: BlockStatistics, names: frozenset[str], stored: bool = False) -> None:
        """Keep statistics of a block.

        Args:
            block: whose statistics are kept.
            names: of them.
            stored: whether they are kept elsewhere already, and can be read again.
        """
        found = replace(block, statistics=_only(block.statistics, names))
        if self._on_disk and not stored:
            found = saved_block(save_block(self._memory.folder / "statistics", found))
        self._kept |= _only(found.statistics, names)

    def drop_all_but(self, names: frozenset[str]) -> None:
        """Keep these statistics alone; none of any site where there are no names."""
        self._kept = _only(self._kept, names) if names else {}

    @contextmanager
    def set_aside(self, block: BlockStatistics) -> Iterator[BlockStatistics]:
        """Have the statistics of a block on the disk while it is solved, where those of all do not wait in memory.

        Both Grams of its sites would lie beside the square of one, which solving works in.
        """
        if not self._on_disk:
            yield block
            return
        file = save_block(self._memory.folder / "block", block)
        for site in [*block.statistics]:
            block.take(site)
        give_back()
        yield saved_block(file)
        file.unlink(missing_ok=True)


def _only(
    statistics: Mapping[str, Mapping[str, StatisticView]], names: frozenset[str]
) -> dict[str, dict[str, StatisticView]]:
    return {site: {name: own[name] for name in names if name in own} for site, own in statistics.items()}
