"""Decomposes weights as statistics come in, and puts factors in place once their ranks are known."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import nn

from pared.allocation import Budget, Unit
from pared.calibration import CROSS, Collected, cross_of, per_token
from pared.engine.grouping import Comparison, compare
from pared.engine.install import install_group
from pared.engine.solutions import DecompositionStore
from pared.errors import ParedError
from pared.lowrank import Decomposition, LowRankMethod
from pared.lowrank.dense_path import target
from pared.lowrank.sharing import stacked
from pared.modules import replace_module
from pared.schema.plan import Decision, Dense, LowRank, Plan, Shared
from pared.structure import Site, weight_of

StatisticsOfSite = Mapping[str, Collected]


class Solver:
    """One method at work on one model. A context manager: what it keeps on disk is gone at its end.

    Attributes:
        units: what was decomposed without a plan: sites alone, and groups where a shared basis pays.
        comparisons: of every group that was compared.
        damping: sites whose statistics were rank-deficient, with the relative damping used.
        fallbacks: units whose statistics say nothing, with what stood in for them.
        unreached: sites that no calibration token reached; they stay dense.
        missed: units of a plan that could not be taken, as a member was not reached.
        untargeted: sites of a dense path that are sent other tokens than in the dense model, and so have no targets.
    """

    def __init__(
        self,
        model: nn.Module,
        method: LowRankMethod,
        options: Mapping[str, object],
        budget: Budget,
        plan: Plan | None,
        keep_dense: bool = False,
        dense_path: float = 0.0,
        tokens: int = 0,
        beside: Path | None = None,
    ) -> None:
        """Start.

        Args:
            model: changed in place.
            method: how a weight is decomposed.
            options: of the method, complete.
            budget: at which sharing is compared.
            plan: the ranks; none if they depend on what is found, which is then kept until ``finish``.
            keep_dense: keep the dense weights too, for a refit.
            dense_path: share of what the dense model puts out in what is decomposed, where statistics tell of both.
            tokens: of the text, which costs are averaged over; those that reach a site where they are not known.
            beside: the output that temporary files lie beside.
        """
        self._model, self._method, self._options, self._budget = model, method, options, budget
        self._keep_dense, self._dense_path, self._tokens = keep_dense, dense_path, tokens
        self._targets: dict[str, torch.Tensor] = {}
        self._rows: dict[str, tuple[str, slice]] = {}  # where the dense weights are that were kept, by site
        self._planned = None if plan is None else _planned(plan)
        self._stack = ExitStack()
        self._store = self._stack.enter_context(DecompositionStore(beside))
        self.units: list[Unit] = []
        self.comparisons: list[Comparison] = []
        self.damping: dict[str, float] = {}
        self.fallbacks: dict[str, str] = {}
        self.unreached: set[str] = set()
        self.missed: list[Unit] = []
        self.untargeted: set[str] = set()

    def __enter__(self) -> "Solver":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def spectra(self) -> Mapping[str, torch.Tensor]:
        """For every unit taken so far without a plan, what leaving out each direction costs."""
        return self._store.spectra

    def take(self, unit: Unit, statistics: Mapping[str, StatisticsOfSite]) -> None:
        """Decompose a unit; put its factors in place if the plan is known, keep the decomposition if not.

        A group whose members lose less apart is taken apart.

        Args:
            unit: a site, or a group that may share a basis.
            statistics: of every member, by site and statistic.

        Raises:
            ParedError: its statistics or its weight do not allow it; names the site.
        """
        values: dict[str, dict[str, torch.Tensor]] = {}
        self._targets.clear()
        for site in unit.members:
            own = statistics.get(site.name, {})
            if not site.idle and any(one.tokens == 0 for name, one in own.items() if name != CROSS):
                self.unreached.add(site.name)
            elif not site.idle and (self._planned is None or unit.name in self._planned):
                values[site.name] = {key: per_token(key, one, self._tokens) for key, one in own.items() if key != CROSS}
                self._aim(site, own)
        if self._planned is not None and unit.name in self._planned and len(values) < len(unit.members):
            self.missed.append(unit)
            return
        together = len(unit.members) > 1 and len(values) == len(unit.members)
        if together and self._planned is not None:
            self._keep(unit, self._decompose(unit, values))
            return
        members = [Unit((site,)) for site in unit.members]
        found = {one.name: self._decompose(one, values) for one in members if one.name in values}
        shared = self._group(unit, found, values) if together else None
        if shared is not None:
            self._keep(unit, shared)
            return
        for one in members:
            if one.name in found:
                self._keep(one, found[one.name])
            elif self._planned is None:
                self.units.append(one)

    def finish(self, plan: Plan) -> None:
        """Put the factors of everything that was kept in place."""
        for unit, decision in self.decided(plan):
            self.install(unit, decision)

    def decided(self, plan: Plan) -> list[tuple[Unit, LowRank]]:
        """Return the kept units that a plan gives a rank, with it."""
        planned = _planned(plan)
        return [
            (unit, planned[unit.name])
            for unit in self.units
            if unit.name in planned and unit.name in self._store.spectra
        ]

    def install(self, unit: Unit, decision: LowRank) -> None:
        """Put the factors of one kept unit in place."""
        found = self._store.get(unit.name, self._weight(unit))
        install_group(self._model, [site.name for site in unit.members], found.factors(decision.rank), decision.pivoted)

    def dense_weight(self, site: str) -> torch.Tensor:
        """Return the dense weight ``(out, in)`` of a member of a kept unit; no more of the unit is read."""
        return self._store.weight(*self._rows[site])

    @contextmanager
    def installed(self, decisions: Mapping[str, Decision]) -> Iterator[None]:
        """Have these decisions, by unit, in the model for the length of a ``with`` block; the rest is as it was."""
        chosen = [(unit, decisions.get(unit.name)) for unit in self.units]
        taken = [(unit, decision) for unit, decision in chosen if isinstance(decision, LowRank)]
        before = {site.name: self._model.get_submodule(site.name) for unit, _ in taken for site in unit.members}
        try:
            for unit, decision in taken:
                self.install(unit, decision)
            yield
        finally:
            for name, module in before.items():
                replace_module(self._model, name, module)

    def _aim(self, site: Site, own: StatisticsOfSite) -> None:
        """Set what is decomposed in place of the dense weight, if the dense model went beside."""
        cross = cross_of(own, self._method.input_gram)
        if cross is None:
            if CROSS in own:  # it is sent other tokens behind the compressed prefix: the dense model has no targets
                self.untargeted.add(site.name)
            return
        name = self._method.input_gram
        gram_NN = per_token(name, own[name])  # of the tokens that reached it, as the cross Gram is
        W_ON = self._dense(site).to(gram_NN.device)
        self._targets[site.name] = target(W_ON, gram_NN, cross.value, self._dense_path)

    def _dense(self, site: Site) -> torch.Tensor:
        return weight_of(self._model.get_submodule(site.name)).detach()

    def _decompose(self, unit: Unit, values: Mapping[str, Mapping[str, torch.Tensor]]) -> Decomposition:
        """Decompose one site, or a group as one."""
        own = [values[site.name] for site in unit.members]
        weights = [self._targets.get(site.name, self._dense(site)) for site in unit.members]
        weights = [
            weight.to(next(iter(value.values()), weight).device) for weight, value in zip(weights, own, strict=True)
        ]
        try:
            if len(weights) == 1:
                found = self._method.decompose(weights[0], own[0], self._options)
            else:
                assert self._method.group_rule is not None
                found = self._method.group_rule(weights, own, self._options)
        except KeyError as missing:  # of statistics that were saved for another method
            raise ParedError(
                f"site {unit.name}: method {self._method.name} needs the statistic {missing}; those given hold "
                f"{', '.join(sorted(own[0])) or 'none'}"
            ) from missing
        except (ValueError, RuntimeError) as error:
            raise ParedError(f"site {unit.name}: {error}") from error
        if found.damping:
            self.damping[unit.name] = found.damping
        if found.fallback or not bool(found.singular_values_R.any()):
            self.fallbacks[unit.name] = found.fallback or "its weight is zero: every rank is exact, at no cost"
        return found

    def _group(
        self, unit: Unit, found: Mapping[str, Decomposition], values: Mapping[str, Mapping[str, torch.Tensor]]
    ) -> Decomposition | None:
        """Return the decomposition of a group as one if sharing a basis pays."""
        name = self._method.input_gram
        if any(name not in value for value in values.values()):
            return None  # where the Gram of the outputs is cheaper, that of the input is not there to compare with
        group = self._decompose(unit, values)
        compared = compare(
            unit,
            group,
            [found[site.name] for site in unit.members],
            [values[site.name][name] for site in unit.members],
            self._budget,
            always=self._options["sharing"] != "measured",
        )
        if compared is not None:
            self.comparisons.append(compared)
        return group if compared is not None and compared.pays else None

    def _keep(self, unit: Unit, found: Decomposition) -> None:
        if self._planned is None:
            self.units.append(unit)
            self._store.put(unit.name, found, self._weight(unit) if self._keep_dense else None)
            start = 0
            for site in unit.members:
                self._rows[site.name] = unit.name, slice(start, start + site.out_features)
                start += site.out_features
        else:
            decision = self._planned[unit.name]
            names = [site.name for site in unit.members]
            install_group(self._model, names, found.factors(decision.rank), decision.pivoted)

    def _weight(self, unit: Unit) -> torch.Tensor:
        return stacked([self._dense(site) for site in unit.members])


def without(plan: Plan, unreached: set[str]) -> Plan:
    """Return a plan in which the sites that no calibration token reached stay dense."""
    dense = Dense(reason="no calibration token reached it")
    sites = (site.model_copy(update={"decision": dense}) if site.name in unreached else site for site in plan.sites)
    return plan.model_copy(update={"sites": tuple(sites)})


def _planned(plan: Plan) -> dict[str, LowRank]:
    """Return the ranks of a plan by unit: a shared basis's by the name of its owner."""
    ranks: dict[str, LowRank] = {}
    for site in plan.sites:
        decision = site.decision
        if isinstance(decision, Shared) and decision.owner == site.name:
            ranks[site.name] = LowRank(rank=decision.rank, pivoted=decision.pivoted)
        elif isinstance(decision, LowRank):
            ranks[site.name] = decision
    return ranks
