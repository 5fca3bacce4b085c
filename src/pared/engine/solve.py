"""Decomposes weights as statistics come in, and puts factors in place once their ranks are known."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from pared.allocation import Unit
from pared.calibration import CROSS, BlockStatistics, StatisticView
from pared.engine.grouping import Comparison, compare
from pared.engine.install import made, put, unchanged
from pared.engine.method_statistics import MethodStatistics
from pared.engine.moments import Moments, StatisticsOfSite, dense_target, moments
from pared.engine.observe import Observer
from pared.engine.pass_record import Record
from pared.engine.run_state import CompressionRun
from pared.engine.solutions import DecompositionStore
from pared.engine.spec import LowRankSpec, PassSpec, Runs
from pared.errors import ParedError
from pared.lowrank import Decomposition
from pared.lowrank.sharing import stacked
from pared.memory import give_back
from pared.names import called
from pared.processes import ALONE, Processes
from pared.schema.plan import Decision, Dense, LowRank, Plan, Shared
from pared.structure import Site, weight_of
from pared.structure.store import BlockStore, LazyBlocks, ResidentBlocks

Installed = tuple[list[str], list[nn.Module]]  # names of layers, and what is put in their places


@dataclass
class Found:
    """What came of one unit, as it is sent to the other processes.

    Attributes:
        owner: rank of the process that decomposed it.
        units: what it was taken as, in order: itself, or its members apart.
        spectra: of those that were decomposed without a plan.
        installed: what takes the place of its layers, if the plan is known.
        comparison: of its members together and apart, if there was one.
        damping: as those of :class:`Solver`, of this unit; as are the others below.
        shrinkage: as those of the solver.
        fallbacks: as those of the solver.
        unreached: as those of the solver.
        untargeted: as those of the solver.
        missed: whether it could not be taken.
    """

    owner: int = 0
    units: list[Unit] = field(default_factory=list)
    spectra: dict[str, torch.Tensor] = field(default_factory=dict)
    installed: list[Installed] = field(default_factory=list)
    comparison: Comparison | None = None
    damping: dict[str, float] = field(default_factory=dict)
    shrinkage: dict[str, dict[str, float]] = field(default_factory=dict)
    fallbacks: dict[str, str] = field(default_factory=dict)
    unreached: set[str] = field(default_factory=set)
    untargeted: set[str] = field(default_factory=set)
    missed: bool = False


class Solver:
    """One low-rank method at work on one model. A context manager: what it keeps on disk is gone at its end.

    Attributes:
        units: what was decomposed without a plan: sites alone, and groups where a shared basis pays.
        comparisons: of every group that was compared.
        damping: sites whose statistics were rank-deficient, with the relative damping used.
        shrinkage: how far the statistics of every site were shrunk, by site and statistic.
        fallbacks: units whose statistics say nothing, with what stood in for them.
        unreached: sites that no calibration token reached; they stay dense.
        missed: units of a plan that could not be taken, as a member was not reached.
        untargeted: sites of a dense path that are sent other tokens than in the dense model, and so have no targets.
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
        self._owners: dict[str, int] = {}  # rank of the process that keeps the decomposition, by unit
        self._model, self._tokens, self._keep_dense = model, tokens, keep_dense
        self._spec, self._method, self._budget = spec, spec.method, spec.budget
        self._targets: dict[str, torch.Tensor] = {}
        self._rows: dict[str, tuple[str, slice]] = {}  # where the dense weights are that were kept, by site
        self._planned = None if plan is None else _planned(plan)
        self._stack = ExitStack()
        out = spec.recipe.out
        self._store = self._stack.enter_context(DecompositionStore(None if out is None else Path(out), run, prefix))
        self._known = len(self._store.files)  # files that were told of in `written`, or passed in
        self._kept_by_first = processes.agreed(run is not None)
        self._waiting = list(candidates)
        self._held: dict[str, StatisticsOfSite] = {}
        self._values: dict[tuple[int, str], tuple[StatisticView, Moments]] = {}  # of the last unit's statistics
        self._order = _order(candidates)
        self.units: list[Unit] = []
        self.comparisons: list[Comparison] = []
        self.damping: dict[str, float] = {}
        self.shrinkage: dict[str, dict[str, float]] = {}
        self.fallbacks: dict[str, str] = {}
        self.unreached: set[str] = set()
        self.missed: list[Unit] = []
        self._told_missed = 0
        self.untargeted: set[str] = set()

    def __enter__(self) -> "Solver":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def dense_path(self) -> float:
        """The share of the dense model's outputs in targets."""
        return self._spec.dense_path

    @property
    def spectra(self) -> Mapping[str, torch.Tensor]:
        """For every unit taken so far without a plan, what leaving out each direction costs."""
        return self._store.spectra

    def visit(self, block: BlockStatistics) -> None:
        """Take every unit whose members' statistics are all there with those of this block, which are used up."""
        own = {site.name for unit in self._waiting for site in unit.members if site.block == block.index}
        self._held |= {name: block.take(name) for name in own}
        ready = [unit for unit in self._waiting if all(site.name in self._held for site in unit.members)]
        self._waiting = [unit for unit in self._waiting if unit not in ready]

        def solve(unit: Unit) -> Found:
            found = self.take(unit, {site.name: self._held.pop(site.name) for site in unit.members})
            give_back()  # the next one is of other sizes
            return found

        for unit, found in zip(ready, self._processes.each(ready, solve), strict=True):
            self.accept(unit, found)
        self._hand_over()
        for unit in ready:
            for site in unit.members:
                self._held.pop(site.name, None)  # of what another process has solved
        self._values.clear()

    def _hand_over(self) -> None:
        """Let the first process keep what the others have decomposed, if its state is to outlive it."""
        if self._processes.count == 1 or not self._kept_by_first:
            return
        new = [] if self._processes.is_first else [*self._store.files][self._known :]
        self._known += len(new)
        for copies in self._processes.to_first([(name, self._store.copy(name)) for name in new]):
            for name, copy in copies:
                self._store.write(name, copy)

    def tables(self) -> dict[str, dict[str, Any]]:
        """Return what was found so far, as JSON has it, each by the name of a unit or site."""
        units = {unit.name: [site.name for site in unit.members] for unit in self.units}
        return {
            "units": units,
            "files": {name: file.name for name, file in self._store.files.items()},
            "comparisons": {one.name: asdict(one) for one in self.comparisons},
            "damping": dict(self.damping),
            "shrinkage": dict(self.shrinkage),
            "fallbacks": dict(self.fallbacks),
            "unreached": dict.fromkeys(sorted(self.unreached), True),
            "missed": {unit.name: True for unit in self.missed},
            "untargeted": dict.fromkeys(sorted(self.untargeted), True),
        }

    def written(self) -> list[Path]:
        """Return the files of decompositions that were written since this was last asked."""
        new = list(self._store.files.values())[self._known :]
        self._known += len(new)
        return new

    def take_up(self, record: Record) -> None:
        """Go on behind the blocks that an earlier process finished.

        Raises:
            ParedError: a file of it is missing or damaged.
        """
        found, files = defaultdict(dict, record.found()), record.files()
        sites = {site.name: site for unit in self._waiting for site in unit.members}
        units = {unit.name: unit for unit in self._waiting}
        self._waiting = [unit for unit in self._waiting if not all(record.holds(site.block) for site in unit.members)]
        self.units += [Unit(tuple(sites[name] for name in members)) for members in found["units"].values()]
        for unit in self.units:
            if unit.name in found["files"]:
                if self._processes.is_first:
                    self._store.take_up(unit.name, files[found["files"][unit.name]])
                self._note_rows(unit)
                self._owners[unit.name] = 0
        for name, spectrum_R in self._processes.agreed(self._store.spectra).items():
            self._store.note(name, spectrum_R)
        self._known = len(self._store.files)
        for one in found["comparisons"].values():
            told: Any = {name: tuple(value) if isinstance(value, list) else value for name, value in one.items()}
            self.comparisons.append(Comparison(**told))
        self.damping |= found["damping"]
        self.shrinkage |= found["shrinkage"]
        self.fallbacks |= found["fallbacks"]
        self.unreached |= found["unreached"].keys()
        self.untargeted |= found["untargeted"].keys()
        self.missed += [units[name] for name in found["missed"]]
        self._told_missed = len(self.missed)

    def in_order(self) -> None:
        """Put what was found in the model's order, in whichever order the blocks were visited."""

        def place(name: str) -> int:
            return self._order.get(name, len(self._order))

        self.units.sort(key=lambda unit: place(unit.name))
        self.comparisons.sort(key=lambda one: place(one.name))
        self.damping = {name: self.damping[name] for name in sorted(self.damping, key=place)}
        self.shrinkage = {name: self.shrinkage[name] for name in sorted(self.shrinkage, key=place)}
        self.fallbacks = {name: self.fallbacks[name] for name in sorted(self.fallbacks, key=place)}

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
        self._targets.clear()
        there = {id(one) for own in statistics.values() for one in own.values()}
        self._values = {key: kept for key, kept in self._values.items() if key[0] in there}
        for site in unit.members:
            own = statistics.pop(site.name, {})
            if not site.idle and any(one.tokens == 0 for name, one in own.items() if name != CROSS):
                told.unreached.add(site.name)
            elif not site.idle and (self._planned is None or unit.name in self._planned):
                values[site.name] = self._values_of(site, own, statistics.values(), told)
                self._aim(site, own, told)
            del own
        if self._planned is not None and unit.name in self._planned and len(values) < len(unit.members):
            told.missed = True
            return told
        together = len(unit.members) > 1 and len(values) == len(unit.members)
        if together and self._planned is not None:
            self._keep(unit, self._decompose(unit, values, told), told)
            return told
        members = [Unit((site,)) for site in unit.members]
        found = {one.name: self._decompose(one, values, told) for one in members if one.name in values}
        shared = self._group(unit, found, values, told) if together else None
        if shared is not None:
            self._keep(unit, shared, told)
            return told
        for one in members:
            if one.name in found:
                self._keep(one, found[one.name], told)
            elif self._planned is None:
                told.units.append(one)
        return told

    def accept(self, unit: Unit, found: Found) -> None:
        """Take up what this process or another has found of a unit."""
        self.unreached |= found.unreached
        self.untargeted |= found.untargeted
        self.damping |= found.damping
        self.shrinkage |= found.shrinkage
        self.fallbacks |= found.fallbacks
        if found.comparison is not None:
            self.comparisons.append(found.comparison)
        if found.missed:
            self.missed.append(unit)
        for one in found.units:
            self.units.append(one)
            self._owners[one.name] = found.owner
            self._note_rows(one)
        for name, spectrum_R in found.spectra.items():
            self._store.note(name, spectrum_R)
        for names, modules in found.installed:
            self._put(names, modules)

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
            told.shrinkage[site.name] = amounts
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
        new, self._told_missed = self.missed[self._told_missed :], len(self.missed)
        return new

    def installer(self, plan: Plan) -> Callable[[int], None]:
        """Return what puts the factors of all kept units in place whose last block is that of an index."""
        decided = self.decided(plan)
        last = {unit.name: max(site.block for site in unit.members) for unit, _ in decided}

        def install(index: int) -> None:
            self.install([(unit, decision) for unit, decision in decided if last[unit.name] == index])

        return install

    def decided(self, plan: Plan) -> list[tuple[Unit, LowRank]]:
        """Return the kept units that a plan gives a rank, with it."""
        planned = _planned(plan)
        return [
            (unit, planned[unit.name])
            for unit in self.units
            if unit.name in planned and unit.name in self._store.spectra
        ]

    def install(self, chosen: Sequence[tuple[Unit, LowRank]]) -> None:
        """Put the factors of kept units in place, each made by the process that keeps the decomposition."""

        def make(one: tuple[Unit, LowRank]) -> Installed:
            unit, decision = one
            made_of_it = self._made(unit, self._store.get(unit.name, self._weight(unit)), decision)
            give_back()
            return made_of_it

        for names, modules in self._processes.each(chosen, make, lambda one: self.owner(one[0].name)):
            self._put(names, modules)

    def owner(self, unit: str) -> int:
        """Return the rank of the process that keeps the decomposition of a unit, and its dense weight."""
        return self._owners[unit]

    def owner_of_site(self, site: str) -> int:
        """Return the rank of the process that keeps the dense weight of a site."""
        return self.owner(self._rows[site][0])

    def dense_weight(self, site: str) -> torch.Tensor:
        """Return the dense weight ``(out, in)`` of a member of a unit kept here; no more of the unit is read."""
        return self._store.weight(*self._rows[site])

    @contextmanager
    def installed(self, decisions: Mapping[str, Decision], store: BlockStore | None = None) -> Iterator[None]:
        """Have these decisions, by unit, in the model for the length of a ``with`` block; the rest is as it was.

        Args:
            decisions: by unit.
            store: of the model, where its blocks are not in memory: they are changed as they are read.

        Raises:
            ParedError: they are read one by one, and a decision is of several blocks.
        """
        chosen = [(unit, decisions.get(unit.name)) for unit in self.units]
        taken = [(unit, decision) for unit, decision in chosen if isinstance(decision, LowRank)]
        if store is not None and not isinstance(store, ResidentBlocks):
            with cast("LazyBlocks", store).patched(self._changes(taken)):
                yield
            return
        with unchanged(self._model, [site.name for unit, _ in taken for site in unit.members]):
            self.install(taken)
            yield

    def _changes(self, taken: Sequence[tuple[Unit, LowRank]]) -> Callable[[int], None]:
        """Return what installs decisions in a block, by its index."""
        of_block: dict[int, list[tuple[Unit, LowRank]]] = {}
        for unit, decision in taken:
            if len({site.block for site in unit.members}) > 1:
                raise ParedError(
                    f"unit {unit.name} shares a basis over several blocks, which cannot be tried on a model that is "
                    "read block by block; take sharing=none, another allocation, or keep it in memory "
                    f"({called('stream', 'off')})"
                )
            of_block.setdefault(unit.members[0].block, []).append((unit, decision))

        def change(index: int) -> None:
            self.install(of_block.get(index, ()))

        return change

    def _aim(self, site: Site, own: StatisticsOfSite, told: Found) -> None:
        """Set what is decomposed in place of the dense weight, if the dense model ran alongside."""
        found = dense_target(self._spec, self._dense(site), own)
        if found.lacking:
            told.untargeted.add(site.name)
        if found.W_ON is not None:
            self._targets[site.name] = found.W_ON

    def _dense(self, site: Site) -> torch.Tensor:
        return weight_of(self._model.get_submodule(site.name)).detach()

    def _decompose(self, unit: Unit, values: Mapping[str, Mapping[str, torch.Tensor]], told: Found) -> Decomposition:
        """Decompose one site, or a group as one."""
        own = [values[site.name] for site in unit.members]
        weights = [self._targets.get(site.name, self._dense(site)) for site in unit.members]
        found = _decompose(self._spec, unit.name, weights, own)
        if found.damping:
            told.damping[unit.name] = found.damping
        if found.fallback or not bool(found.singular_values_R.any()):
            told.fallbacks[unit.name] = found.fallback or "its weight is zero: every rank is exact, at no cost"
        return found

    def _group(
        self,
        unit: Unit,
        found: Mapping[str, Decomposition],
        values: Mapping[str, Mapping[str, torch.Tensor]],
        told: Found,
    ) -> Decomposition | None:
        """Return the decomposition of a group as one if sharing a basis pays."""
        name = self._method.input_gram
        if any(name not in value for value in values.values()):
            return None  # where the Gram of the outputs is cheaper, that of the input is not there to compare with
        group = self._decompose(unit, values, told)
        compared = compare(
            unit,
            group,
            [found[site.name] for site in unit.members],
            [values[site.name][name] for site in unit.members],
            self._budget,
            always=self._spec.sharing != "measured",
        )
        told.comparison = compared
        return group if compared is not None and compared.pays else None

    def _keep(self, unit: Unit, found: Decomposition, told: Found) -> None:
        if self._planned is None:
            told.units.append(unit)
            self._store.put(unit.name, found, self._weight(unit) if self._keep_dense else None)
            told.spectra[unit.name] = self._store.spectra[unit.name]
        else:
            told.installed.append(self._made(unit, found, self._planned[unit.name]))

    def _made(self, unit: Unit, found: Decomposition, decision: LowRank) -> Installed:
        """Return the names of a unit's layers, and what takes their places."""
        names = [site.name for site in unit.members]
        return names, list(made(self._model, names, found.factors(decision.rank), decision.pivoted))

    def _put(self, names: Sequence[str], modules: Sequence[nn.Module]) -> None:
        """Put what this process or another has made in the place of layers, where those are."""
        for name, module in zip(names, modules, strict=True):
            module.to(next(self._model.get_submodule(name).parameters()).device)
        put(self._model, names, modules)

    def _note_rows(self, unit: Unit) -> None:
        """Note where in the file of a unit the rows of every member are."""
        start = 0
        for site in unit.members:
            self._rows[site.name] = unit.name, slice(start, start + site.out_features)
            start += site.out_features

    def _weight(self, unit: Unit) -> torch.Tensor:
        return stacked([self._dense(site) for site in unit.members])


def without(plan: Plan, unreached: set[str]) -> Plan:
    """Return a plan in which the sites that no calibration token reached stay dense."""
    dense = Dense(reason="no calibration token reached it")
    sites = (site.model_copy(update={"decision": dense}) if site.name in unreached else site for site in plan.sites)
    return plan.model_copy(update={"sites": tuple(sites)})


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
                take(site.name, _decompose(spec, site.name, [weight], [values]))

    MethodStatistics(observer, spec).run(PassSpec("solve", runs), visit)


def _decompose(
    spec: LowRankSpec, name: str, weights: Sequence[torch.Tensor], values: Sequence[Mapping[str, torch.Tensor]]
) -> Decomposition:
    """Decompose one weight, or several as one; a name for the error."""
    method = spec.method
    weights = [weight.to(next(iter(own.values()), weight).device) for weight, own in zip(weights, values, strict=True)]
    try:
        found = method.solve(weights, values, spec.config)
    except KeyError as missing:  # of statistics that were saved for another method
        raise ParedError(
            f"site {name}: method {method.name} needs the statistic {missing}; those given hold "
            f"{', '.join(sorted(values[0])) or 'none'}"
        ) from missing
    except (ValueError, RuntimeError) as error:
        raise ParedError(f"site {name}: {error}") from error
    if not isinstance(found, Decomposition):
        raise ParedError(f"site {name}: method {method.name} gives a {type(found).__name__}, expected a Decomposition")
    return found


def _order(candidates: Sequence[Unit]) -> dict[str, int]:
    """Return the place of every site: those of the blocks in order, a group's with its last block."""
    by_block = sorted(candidates, key=lambda unit: max(site.block for site in unit.members))
    return {site.name: place for place, site in enumerate(site for unit in by_block for site in unit.members)}


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
