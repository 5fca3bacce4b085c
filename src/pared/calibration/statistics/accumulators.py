"""Empty accumulators for the sites of a block or of a whole model."""

from collections.abc import Callable, Collection, Iterable, Sequence

import torch

from pared.calibration.statistics.base import Statistic
from pared.calibration.statistics.registry import statistic_kind
from pared.structure.model import Anatomy, Site

Shapes = Sequence[tuple[int, int]]
OF_INPUT = ("input", "input_pair")  # the same for all sites that read one tensor


def accumulators(
    sites: Iterable[Site], needs: Callable[[Shapes], Collection[str]], device: torch.device
) -> dict[str, dict[str, Statistic]]:
    """Make empty accumulators for every site that a token may reach; by site and name of the statistic.

    Sites that read one tensor share what is collected of it.

    Args:
        sites: after the probe pass.
        needs: names of statistics, from the shapes ``(out, in)`` of the sites that read one tensor.
        device: where they add up.
    """
    found = [site for site in sites if not site.idle]
    readers: dict[str, list[Site]] = {}
    for site in found:
        readers.setdefault(site.reads, []).append(site)
    wanted = {reads: sorted(needs([(s.out_features, s.in_features) for s in own])) for reads, own in readers.items()}
    shared: dict[tuple[str, str], Statistic] = {}

    def make(site: Site, name: str) -> Statistic:
        kind = statistic_kind(name)
        if kind.of in OF_INPUT and (site.reads, name) in shared:
            return shared[site.reads, name]
        made = kind.accumulator(kind.features(site.out_features, site.in_features), device)
        return shared.setdefault((site.reads, name), made) if kind.of in OF_INPUT else made

    return {site.name: {name: make(site, name) for name in wanted[site.reads]} for site in found}


def gradient_accumulators(
    anatomy: Anatomy, names: Collection[str], device: torch.device
) -> dict[str, dict[str, Statistic]]:
    """Make empty accumulators of these statistics for every site the probe pass reached.

    The Grams and full output gradients of the whole model are held at once; every other statistic is a vector.
    """
    return accumulators(anatomy.sites, lambda _: names, device)
