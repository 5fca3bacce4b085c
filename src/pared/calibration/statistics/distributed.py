"""Statistics of many sites added up over the ranks of a process group, each of which saw a part of the text."""

from collections.abc import Iterator, Mapping

from torch import distributed
from torch.distributed import ProcessGroup

from pared.calibration.statistics.base import Statistic
from pared.calibration.statistics.sums import is_distributed
from pared.errors import ParedError


def all_reduce(statistics: Mapping[str, Mapping[str, Statistic]], group: ProcessGroup | None = None) -> None:
    """Add up the statistics of many sites over ranks, after a check that all ranks hold the same ones.

    A statistic that several sites share is added up once. Afterwards every rank holds, bit for bit the same, what one
    process would that saw all of the text, but for the order of float64 additions. Each rank adds its part once: what
    is seen after this must go to empty accumulators.

    Args:
        statistics: by site and name; those of a block, say. All ranks call this, with the same sites and names, also
            those on which no token reached a site.
        group: of processes; the default one if none is given. Without processes nothing is done.

    Raises:
        ParedError: ranks hold other statistics than the first one; on all of them.
    """
    if not is_distributed():
        return
    _require_same({name: signature for name, signature, _ in _each(statistics)}, group)
    for _, _, statistic in _each(statistics):
        if statistic is not None:
            statistic.all_reduce(group)


def _each(statistics: Mapping[str, Mapping[str, Statistic]]) -> Iterator[tuple[str, str, Statistic | None]]:
    """Yield statistics by name, with their signature; without the statistic, where a site shares that of another."""
    owners: dict[int, str] = {}
    for site in sorted(statistics):
        for name, statistic in sorted(statistics[site].items()):
            here = f"{site}: {name}"
            owner = owners.setdefault(id(statistic), here)
            if owner == here:
                yield here, statistic.signature, statistic
            else:
                yield here, f"that of {owner}", None


def _require_same(own: dict[str, str], group: ProcessGroup | None) -> None:
    held: list[dict[str, str]] = [{}] * distributed.get_world_size(group)
    distributed.all_gather_object(held, own, group=group)
    for rank, other in enumerate(held):
        differing = sorted(name for name in {*held[0], *other} if held[0].get(name) != other.get(name))
        if differing:
            here, there = (found.get(differing[0], "nothing") for found in (held[0], other))
            raise ParedError(
                f"ranks collect different statistics: {differing[0]} is {here} on rank 0 and {there} on rank {rank}, "
                f"and {len(differing) - 1} more differ; start every rank with the same model and recipe"
            )
