"""A method's decomposition of one weight, of several as one, or of every site of a model alone."""

from collections.abc import Callable, Collection, Mapping, Sequence

import torch

from pared.calibration import BlockStatistics
from pared.engine.observe import Observer
from pared.engine.spec import LowRankSpec, PassSpec, Runs
from pared.engine.statistics.moments import moments
from pared.engine.statistics.of_method import MethodStatistics
from pared.errors import ParedError
from pared.lowrank import Decomposition
from pared.structure import weight_of


def decompose(
    spec: LowRankSpec,
    name: str,
    weights: Sequence[torch.Tensor],
    values: Sequence[Mapping[str, torch.Tensor]],
    *,
    losses_only: bool = False,
) -> Decomposition:
    """Decompose one weight, or several as one.

    Args:
        spec: whose method it is.
        name: of the site, or of the first of several, for an error.
        weights: each ``(out, in)``, all of one width.
        values: the statistics of each, by name.
        losses_only: directions are not asked for, and not found where that takes less.

    Raises:
        ParedError: these do not allow it, or the method lowers no rank.
    """
    method = spec.method
    weights = [weight.to(next(iter(own.values()), weight).device) for weight, own in zip(weights, values, strict=True)]
    solve = method.losses if losses_only and method.losses else method.require_solve()
    try:
        found = solve(weights, values, spec.config)
    except KeyError as missing:
        raise lacking(method.name, name, missing, values[0]) from missing
    except (ValueError, RuntimeError) as error:
        raise ParedError(f"site {name}: {error}") from error
    if not isinstance(found, Decomposition):
        raise ParedError(f"site {name}: method {method.name} gives a {type(found).__name__}, expected a Decomposition")
    return found


def lacking(method: str, name: str, missing: KeyError, given: Collection[str]) -> ParedError:
    """Return the error of a site whose statistics were saved for another method.

    Args:
        method: that needs them.
        name: of the site.
        missing: names the statistic.
        given: names of those there are.
    """
    there = ", ".join(sorted(given)) or "none"
    return ParedError(f"site {name}: method {method} needs the statistic {missing}; those given hold {there}")


def decompose_sites(observer: Observer, runs: Runs, take: Callable[[str, Decomposition], None]) -> None:
    """Decompose the weight of every site alone, in the model as it is; sites of which nothing is known are left out.

    Args:
        observer: of a low-rank spec, that has probed the model and read the tokens it needs.
        runs: what has to run for it.
        take: is given the name of each site and its decomposition, as they come.

    Raises:
        ParedError: statistics or a weight do not allow it; names the site.
    """
    spec = observer.spec
    assert isinstance(spec, LowRankSpec)

    def visit(block: BlockStatistics) -> None:
        for site in observer.anatomy.sites_of(block.index):
            own = block.statistics.get(site.name, {})
            if not site.idle and all(one.tokens for one in own.values()):
                values = {name: moments(spec, name, one, observer.tokens).value for name, one in own.items()}
                weight = weight_of(observer.model.get_submodule(site.name)).detach()
                take(site.name, decompose(spec, site.name, [weight], [values]))

    MethodStatistics(observer, spec).run(PassSpec("solve", runs), visit)
