"""One low-rank method at work on one model: every unit is decomposed once all its statistics are there."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn

from pared.allocation import Unit
from pared.calibration import CROSS, BlockStatistics, StatisticView
from pared.engine.checks.enough import why_dense
from pared.engine.quantize import prices_of
from pared.engine.ranks.decompose import decompose
from pared.engine.ranks.kept_units import Installed, KeptUnits, factors_made, put_there, ranks_of
from pared.engine.spec import LowRankSpec
from pared.engine.state.ledger import Findings, Ledger
from pared.engine.state.pass_record import Record
from pared.engine.state.run_state import CompressionRun
from pared.engine.state.solutions import DecompositionStore, Prices
from pared.engine.statistics.moments import Moments, StatisticsOfSite, dense_target, moments
from pared.engine.targets.grouping import Comparison, compare
from pared.lowrank import Decomposition
from pared.memory import give_back
from pared.processes import ALONE, Processes
from pared.schema.plan import Dense, Plan, SitePlan
from pared.structure import Site, weight_of


@dataclass
class Found:
    """What came of one unit, as it is sent to the other processes.

    Attributes:
        owner: rank of the process that decomposed it.
        findings: of it; its units are what it was taken as: itself, or its members apart.
        spectra: of those that were decomposed without a plan.
        rounding: of those whose bits are decided, what rounding costs.
        installed: what takes the place of its layers, if the plan is known.
    """

    owner: int = 0
    findings: Findings = field(default_factory=Findings)
    spectra: dict[str, torch.Tensor] = field(default_factory=dict)
    rounding: dict[str, Prices] = field(default_factory=dict)
    installed: list[Installed] = field(default_factory=list)


class Solver:
    """One low-rank method at work on one model. A context manager: what it keeps on disk is gone at its end.

    Attributes:
        ledger: what was found, for the record of a pass.
        kept: what was decomposed without a plan.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: LowRankSpec,
        candidates: Sequence[Unit],
        plan: Plan | None = None,
        *,
        keep_dense: bool = False,
        tokens: int = 0,
        run: CompressionRun | None = None,
        prefix: str = "pass-1",
        processes: Processes = ALONE,
    ) -> None:
        """Start.

        Args:
            model: changed in place.
            spec: says how a weight is decomposed, and at which budget sharing is compared.
            candidates: what may be decomposed, in the model's order: sites, and groups that may share a basis.
            plan: the ranks; none if they depend on what is found, which is then kept until they are known.
            keep_dense: keep the dense weights too, for a refit.
            tokens: of the text, which costs are averaged over; those that reach a site where they are not known.
            run: that keeps what must outlive the process; without one all goes at the end.
            prefix: of the names of files.
            processes: that solve together: each takes some of the units, keeps their decompositions, and tells the
                others what it found.
        """
        self._processes = processes
        self._model, self._tokens = model, tokens
        self._spec, self._method, self._budget = spec, spec.method, spec.budget
        self._weights: dict[str, torch.Tensor] = {}  # of the unit that is taken
        self._planned = None if plan is None else ranks_of(plan)
        self._stack = ExitStack()
        out = spec.recipe.out
        store = self._stack.enter_context(DecompositionStore(None if out is None else Path(out), run, prefix))
        self.ledger = Ledger(store, processes)
        sites = {site.name: site for unit in candidates for site in unit.members}
        self.kept = KeptUnits(model, self.ledger, sites, processes, keep_dense)
        self._first_keeps_all = processes.count > 1 and processes.agreed(run is not None)
        self._candidates = {unit.name: unit for unit in candidates}
        self._waiting = list(candidates)
        self._held: dict[str, StatisticsOfSite] = {}
        self._values: dict[tuple[int, str], tuple[StatisticView, Moments]] = {}  # of the last unit's statistics
        self._order = _order(candidates)
        self._told_missed = 0

    def __enter__(self) -> "Solver":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def found(self) -> Findings:
        """What was found so far."""
        return self.ledger.found

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        """Of every group that was compared."""
        return tuple(Comparison.of(fields) for fields in self.found.comparisons.values())

    def visit(self, block: BlockStatistics) -> None:
        """Take every unit whose members' statistics are all there with those of this block, which are used up."""
        own = {site.name for unit in self._waiting for site in unit.members if site.block == block.index}
        self._held |= {name: block.take(name) for name in own}
        ready = [unit for unit in self._waiting if all(site.name in self._held for site in unit.members)]
        self._waiting = [unit for unit in self._waiting if unit not in ready]

        def solve(unit: Unit) -> Found:
            found = self.take(unit, {site.name: self._held.pop(site.name) for site in unit.members})
            self._weights.clear()
            give_back()  # the next one is of other sizes
            return found

        for found in self._processes.each(ready, solve):
            self.accept(found)
        if self._first_keeps_all:
            self.kept.hand_over()
        for unit in ready:
            for site in unit.members:
                self._held.pop(site.name, None)  # of what another process has solved
        self._values.clear()

    def take_up(self, record: Record) -> None:
        """Go on behind the blocks that an earlier process finished.

        Raises:
            ParedError: a file of it is missing or damaged.
        """
        self._waiting = [unit for unit in self._waiting if not all(record.holds(site.block) for site in unit.members)]
        self.kept.take_up(record)
        self._told_missed = len(self.found.missed)

    def in_order(self) -> None:
        """Put what was found in the model's order, in whichever order the blocks were visited."""
        self.found.sort(self._order)

    def take(self, unit: Unit, statistics: dict[str, StatisticsOfSite]) -> Found:
        """Decompose a unit; make its factors if the plan is known, keep the decomposition if not.

        A group whose members lose less apart is taken apart.

        Args:
            unit: a site, or a group that may share a basis.
            statistics: of every member, by site and statistic; taken out of the dictionary one by one, so that no Gram
                is held twice.

        Returns:
            What came of it, for :meth:`accept`.

        Raises:
            ParedError: its statistics or its weight do not allow it; names the site.
        """
        told = Found(self._processes.rank)
        values: dict[str, dict[str, torch.Tensor]] = {}
        there = {id(one) for own in statistics.values() for one in own.values()}
        self._values = {key: kept for key, kept in self._values.items() if key[0] in there}
        for site in unit.members:
            own = statistics.pop(site.name, {})
            if not site.idle and (why := why_dense(self._model, site.name, own)):
                told.findings.unreached[site.name] = why
            elif not site.idle and (self._planned is None or unit.name in self._planned):
                values[site.name] = self._values_of(site, own, statistics.values(), told)
                self._aim(site, own, told)
            del own
        if self._planned is not None and unit.name in self._planned and len(values) < len(unit.members):
            told.findings.missed[unit.name] = True
            return told
        together = len(unit.members) > 1 and len(values) == len(unit.members)
        if together and self._planned is not None:
            self._keep(unit, self._decompose(unit, values, told), values, told)
            return told
        shared, apart = self._group(unit, values, told) if together else (None, {})
        if shared is not None:
            self._keep(unit, shared, values, told)
        else:
            self._keep_apart(unit, apart, values, told)
        return told

    def accept(self, found: Found) -> None:
        """Take up what this process or another has found of a unit."""
        self.found.add(found.findings.tables())
        for members in found.findings.units.values():
            self.kept.note(members, found.owner)
        for name, spectrum_R in found.spectra.items():
            self.ledger.store.note(name, spectrum_R, found.rounding.get(name))
        for names, modules in found.installed:
            put_there(self._model, names, modules)

    def _values_of(
        self, site: Site, own: StatisticsOfSite, others: Collection[StatisticsOfSite], told: Found
    ) -> dict[str, torch.Tensor]:
        """Return the statistics of a site as the method reads them, and note how far they were shrunk.

        Args:
            site: of the model.
            own: statistics of it.
            others: those of the other sites of the unit.
            told: takes the note.
        """
        found = {name: self._moments(name, one, others) for name, one in own.items() if name != CROSS}
        if amounts := {name: one.shrinkage for name, one in found.items() if one.shrinkage}:
            told.findings.shrinkage[site.name] = amounts
        return {name: one.value for name, one in found.items()}

    def _moments(self, name: str, collected: StatisticView, others: Collection[StatisticsOfSite]) -> Moments:
        """Return a statistic per token: one tensor for all units in a row that read one input, which factor it once.

        It is kept where others, or units to come, hold the statistic too.
        """
        key = id(collected), name
        if key in self._values:
            return self._values[key][1]
        found = moments(self._spec, name, collected, self._tokens)
        if any(one is collected for held in (*others, *self._held.values()) for one in held.values()):
            self._values[key] = collected, found
        return found

    def take_missed(self) -> list[Unit]:
        """Return the units of the plan that could not be taken since this was last asked."""
        new, self._told_missed = [*self.found.missed][self._told_missed :], len(self.found.missed)
        return [self._candidates[name] for name in new]

    def _aim(self, site: Site, own: StatisticsOfSite, told: Found) -> None:
        """Set what is decomposed in place of the dense weight, if the dense model ran alongside."""
        found = dense_target(self._spec, self._dense(site), own)
        if found.lacking:
            told.findings.untargeted[site.name] = True
        if found.W_ON is not None:
            self._weights[site.name] = found.W_ON.double()

    def _dense(self, site: Site) -> torch.Tensor:
        return weight_of(self._model.get_submodule(site.name)).detach()

    def _decompose(
        self,
        unit: Unit,
        values: Mapping[str, Mapping[str, torch.Tensor]],
        told: Found,
        *,
        losses_only: bool = False,
    ) -> Decomposition:
        """Decompose one site, or a group as one."""
        own = [values[site.name] for site in unit.members]
        weights = [self._weight(site) for site in unit.members]
        found = decompose(self._spec, unit.name, weights, own, losses_only=losses_only)
        if found.damping:
            told.findings.damping[unit.name] = found.damping
        if found.fallback or not bool(found.singular_values_R.any()):
            told.findings.fallbacks[unit.name] = found.fallback or "its weight is zero: every rank is exact, at no cost"
        return found

    def _weight(self, site: Site) -> torch.Tensor:
        """Return what is decomposed of a site, float64: one tensor for it alone and as one of its group."""
        if site.name not in self._weights:
            self._weights[site.name] = self._dense(site).double()
        return self._weights[site.name]

    def _group(
        self,
        unit: Unit,
        values: Mapping[str, Mapping[str, torch.Tensor]],
        told: Found,
    ) -> tuple[Decomposition | None, dict[str, Decomposition]]:
        """Return the decomposition of a group as one if sharing a basis pays, and what its members lose alone.

        Those of the members may be without directions.
        """
        name = self._method.input_gram
        if any(name not in value for value in values.values()):
            return None, {}  # where the Gram of the outputs is cheaper, that of the input is not there to compare with
        alone = (Unit((site,)) for site in unit.members)
        apart = {one.name: self._decompose(one, values, told, losses_only=True) for one in alone}
        group = self._decompose(unit, values, told)
        compared = compare(
            unit,
            group,
            list(apart.values()),
            [values[site.name][name] for site in unit.members],
            self._budget,
            always=self._spec.sharing != "measured",
        )
        if compared is not None:
            told.findings.comparisons[unit.name] = asdict(compared)
        return (group if compared is not None and compared.pays else None), apart

    def _keep_apart(
        self,
        unit: Unit,
        found: Mapping[str, Decomposition],
        values: Mapping[str, Mapping[str, torch.Tensor]],
        told: Found,
    ) -> None:
        """Take every member of a unit alone, decomposed again where what was found of it has no directions."""
        for one in (Unit((site,)) for site in unit.members):
            if one.name in values:
                own = found.get(one.name)
                self._keep(one, own if own and own.directed else self._decompose(one, values, told), values, told)
            elif self._planned is None:
                told.findings.units[one.name] = [one.name]

    def _keep(
        self, unit: Unit, found: Decomposition, values: Mapping[str, Mapping[str, torch.Tensor]], told: Found
    ) -> None:
        if self._planned is None:
            told.findings.units[unit.name] = [site.name for site in unit.members]
            if self._spec.recipe.of_bytes:
                dense = self._dense(unit.members[0])
                told.rounding[unit.name] = prices_of(self._spec, unit, dense, found, values[unit.name])
            told.spectra[unit.name] = self.kept.keep(unit, found, told.rounding.get(unit.name, {}))
        else:
            told.installed.append(factors_made(self._model, unit, found, self._planned[unit.name]))


def without(plan: Plan, unreached: Mapping[str, str]) -> Plan:
    """Return a plan in which the sites that no calibration token reached, or too few, stay dense; it says why."""

    def told(site: SitePlan) -> SitePlan:
        why = unreached.get(site.name)
        return site if why is None else site.model_copy(update={"decision": Dense(reason=why)})

    return plan.model_copy(update={"sites": tuple(map(told, plan.sites))})


def _order(candidates: Sequence[Unit]) -> dict[str, int]:
    """Return the place of every site: those of the blocks in order, a group's with its last block."""
    by_block = sorted(candidates, key=lambda unit: max(site.block for site in unit.members))
    return {site.name: place for place, site in enumerate(site for unit in by_block for site in unit.members)}
