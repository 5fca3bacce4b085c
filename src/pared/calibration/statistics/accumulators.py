"""Empty accumulators for the sites of a block or of a whole model."""

from collections.abc import Callable, Collection, Iterable, Sequence

import torch

from pared.calibration.statistics.base import Statistic
from pared.calibration.statistics.experts import EXPERTS, ExpertLoss
from pared.calibration.statistics.registry import statistic_kind
from pared.structure.mixture import Mixture
from pared.structure.model import Site

Shapes = Sequence[tuple[int, int]]
OF_INPUT = ("input", "input_pair")  # the same for all sites that read one tensor


def accumulators(
    sites: Iterable[Site], needs: Callable[[Shapes], Collection[str]], device: torch.device
) -> dict[str, dict[str, Statistic]]:
    """Make empty accumulators for every site that a token may reach; by site and name of the statistic.

    Sites that read one tensor share what is collected of it, and stand together.

    Args:
        sites: after the probe pass.
        needs: names of statistics, from the shapes ``(out, in)`` of the sites that read one tensor.
        device: where they add up.
    """
    readers: dict[str, list[Site]] = {}
    for site in sites:
        if not site.idle:
            readers.setdefault(site.reads, []).append(site)
    made: dict[str, dict[str, Statistic]] = {}
    for together in readers.values():
        names = sorted(needs([(site.out_features, site.in_features) for site in together]))
        shared: dict[str, Statistic] = {}
        for site in together:
            own = made[site.name] = dict(shared)
            for name in names:
                kind = statistic_kind(name)
                if name not in own:
                    own[name] = kind.accumulator(kind.features(site.out_features, site.in_features), device)
                if kind.of in OF_INPUT:
                    shared[name] = own[name]
    return made


def gradient_accumulators(
    sites: Sequence[Site], names: Collection[str], device: torch.device
) -> dict[str, dict[str, Statistic]]:
    """Make empty accumulators of the same statistics for all sites, in their order.

    Grams and full output gradients are squares, every other statistic of a backward pass is a vector.

    Args:
        sites: after the probe pass, which those it did not reach get none of.
        names: of statistics.
        device: where they add up.
    """
    made = accumulators(sites, lambda _: names, device)
    return {site.name: made[site.name] for site in sites if site.name in made}


def expert_accumulators(mixtures: Sequence[Mixture], device: torch.device) -> dict[str, dict[str, Statistic]]:
    """Make empty accumulators of what taking experts out does, by mixture and name of the statistic.

    Args:
        mixtures: of a block.
        device: where they add up.
    """
    return {one.name: {EXPERTS: ExpertLoss(one.experts, device)} for one in mixtures}
