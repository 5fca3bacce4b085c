"""Decomposes sites as the walk hands them over, and puts their factors in place once their ranks are known."""

from collections.abc import Mapping
from contextlib import ExitStack

import torch
from torch import nn

from pared.anatomy import Site, weight_of
from pared.calibration import GradientStatistic, Statistic
from pared.engine.install import install
from pared.engine.store import DecompositionStore
from pared.errors import ParedError
from pared.lowrank import Decomposition, LowRankMethod
from pared.plan import Dense, LowRank, Plan


class Solver:
    """One method at work on one model. A context manager: what it keeps on disk is gone at its end.

    Attributes:
        damping: sites whose statistics were rank-deficient, with the relative damping used.
        unreached: sites that no calibration token reached; they stay dense.
    """

    def __init__(
        self, model: nn.Module, method: LowRankMethod, options: Mapping[str, object], plan: Plan | None
    ) -> None:
        """Start.

        Args:
            model: changed in place.
            method: how a site is decomposed.
            options: of the method, complete.
            plan: the ranks; none if they depend on the spectra, which ``spectra`` then collects.
        """
        self._model, self._method, self._options = model, method, options
        self._planned = None if plan is None else _planned(plan)
        self._stack = ExitStack()
        self._store = self._stack.enter_context(DecompositionStore())
        self.damping: dict[str, float] = {}
        self.unreached: set[str] = set()

    def __enter__(self) -> "Solver":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def spectra(self) -> Mapping[str, torch.Tensor]:
        """For every site taken so far without a plan, what leaving out each direction costs."""
        return self._store.spectra

    def take(self, site: Site, statistics: Mapping[str, Statistic | GradientStatistic]) -> None:
        """Decompose a site; put its factors in place if the plan is known, keep the decomposition if not.

        Raises:
            ParedError: its statistics or its weight do not allow it; names the site.
        """
        if site.idle or (self._planned is not None and site.name not in self._planned):
            return
        if any(statistic.tokens == 0 for statistic in statistics.values()):
            self.unreached.add(site.name)
            return
        values = {name: statistic.value for name, statistic in statistics.items()}
        weight = self._weight(site.name)
        try:
            found = self._method.decompose(weight.to(next(iter(values.values()), weight).device), values, self._options)
        except (ValueError, RuntimeError) as error:
            raise ParedError(f"site {site.name}: {error}") from error
        if found.damping:
            self.damping[site.name] = found.damping
        if self._planned is None:
            self._store.put(site.name, found)
        else:
            self._install(site.name, found, self._planned[site.name])

    def finish(self, plan: Plan) -> None:
        """Put the factors of every site that was kept in place."""
        for name, decision in _planned(plan).items():
            if name in self._store.spectra:
                self._install(name, self._store.get(name, self._weight(name)), decision)

    def _weight(self, name: str) -> torch.Tensor:
        return weight_of(self._model.get_submodule(name)).detach()

    def _install(self, name: str, found: Decomposition, decision: LowRank) -> None:
        install(self._model, name, found.factors(decision.rank), decision.pivoted)


def without(plan: Plan, unreached: set[str]) -> Plan:
    """Return a plan in which the sites that no calibration token reached stay dense."""
    dense = Dense(reason="no calibration token reached it")
    sites = (site.model_copy(update={"decision": dense}) if site.name in unreached else site for site in plan.sites)
    return plan.model_copy(update={"sites": tuple(sites)})


def _planned(plan: Plan) -> dict[str, LowRank]:
    return {site.name: site.decision for site in plan.sites if isinstance(site.decision, LowRank)}
