"""The low-rank family at work: decompose, decide the ranks, install factors, refit them."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from pared.allocation import Evidence, Unit
from pared.calibration import BlockStatistics
from pared.engine.allocate import Budgets, budget_of, make_plan
from pared.engine.blocks import visit_blocks
from pared.engine.checks.enough import dense_for_want_of_tokens
from pared.engine.elastic import ElasticFactors, collect
from pared.engine.families.trials import Trial, with_trials
from pared.engine.families.widths import ChannelSolver, channels_to_take_out, widths_of, with_kept
from pared.engine.observe import Observer
from pared.engine.refit import Refit, dense_blocks
from pared.engine.result import CompressedBlocks
from pared.engine.solve import Solver, without
from pared.engine.spec import LowRankSpec, PassSpec
from pared.engine.state.records import Order, is_done
from pared.engine.state.solutions import DecompositionStore
from pared.engine.statistics.of_method import MethodStatistics, Saved
from pared.engine.targets.grouping import candidate_units, told
from pared.errors import ParedError
from pared.lowrank.registry import mean_gram
from pared.modules.opened import opened_experts
from pared.names import called
from pared.schema.plan import Decision, Plan
from pared.structure import Anatomy


class LowRankWork:
    """One low-rank compression under way. A context manager: what it keeps on disk is gone at its end.

    Attributes:
        passes: what :meth:`run` is to be given, in order.
    """

    def __init__(
        self, observer: Observer, spec: LowRankSpec, trial: Trial | None = None, saved: Saved | None = None
    ) -> None:
        """Start.

        Args:
            observer: that has probed the model, and read the tokens if there are any.
            spec: the resolved compression.
            trial: for an allocation that tries what it proposes.
            saved: statistics that were saved, in place of the first pass over the dense model.

        Raises:
            ParedError: those are of another model or other tokens, or no channels can be taken out.
        """
        self._observer, self._spec, self._trial = observer, spec, trial
        self._model, self._anatomy = observer.model, observer.anatomy
        self._statistics = MethodStatistics(observer, spec, saved)
        self._units = [Unit((site,)) for site in self._anatomy.sites]
        if spec.method.shares:
            self._units = candidate_units(self._anatomy, spec.group_size, spec.sharing)
        grouped = any(len(unit.members) > 1 for unit in self._units)
        self._groups = channels_to_take_out(observer, spec) if spec.structures != "ranks" else ()
        if spec.structures == "widths":
            self._units = []  # no rank is decided
        # What the probe's few tokens did not reach the text may not reach either, or give too few tokens, as it may any
        # expert; the others then pay for it.
        reached = all(site.seen for site in self._anatomy.sites) and not opened_experts(self._model)
        open_ended = spec.calibrated and not reached
        self.passes = spec.passes(ranks_known=not (spec.solves_first or grouped or open_ended))
        self._stack = ExitStack()
        self._solver: Solver | None = None
        self._channels: ChannelSolver | None = None
        self._plan: Plan | None = None
        self._influence: dict[int, float] = {}

    def __enter__(self) -> "LowRankWork":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self, step: PassSpec) -> None:
        """Do one step, or what an earlier process left of it.

        Raises:
            ParedError: a weight or its statistics do not allow it, or the budget buys too little.
        """
        if step.action == "allocate":
            self._plan = self._observer.records.plan(self._allocate, self._fallbacks, self._try)
        elif step.action == "install":
            self._install(step)
        elif step.action == "refit":
            self._refit(step)
        elif self._solver is None:
            self._solve(step)
        else:
            self._solve_again(step)

    def report(self, result: CompressedBlocks) -> Iterator[str]:
        """Fill in the record of what was done, and yield what a user should read of it."""
        solver, ordered = self._solved, self._ordered.found
        result.plan = with_kept(self.plan, ordered.kept)
        result.damping = solver.found.damping | {
            name: amount for name, amount in ordered.damping.items() if name not in solver.found.damping
        }
        result.sharing = solver.comparisons
        result.shrinkage = solver.found.shrinkage
        result.fallbacks |= solver.found.fallbacks | ordered.fallbacks
        yield from told(result.sharing)

    @property
    def plan(self) -> Plan:
        """What was decided, but for sites that no token reached, or too few."""
        return without(self._decided, self._unreached)

    @property
    def _unreached(self) -> dict[str, str]:
        return self._solved.found.unreached | self._ordered.found.unreached

    @property
    def _solved(self) -> Solver:
        assert self._solver is not None, "nothing was solved"
        return self._solver

    @property
    def _ordered(self) -> ChannelSolver:
        assert self._channels is not None, "nothing was ordered"
        return self._channels

    @property
    def _decided(self) -> Plan:
        assert self._plan is not None, "nothing was decided"
        return self._plan

    def _new_solver(self, step: PassSpec, units: list[Unit]) -> Solver:
        solver = Solver(
            self._model,
            self._spec,
            units,
            self._plan,
            keep_dense=self._spec.elastic or (self._spec.refit != "off" and self._solver is None),
            tokens=self._observer.tokens,
            run=self._observer.state,
            prefix=f"pass-{self._number(step)}",
            processes=self._observer.processes,
        )
        return self._stack.enter_context(solver)

    def _new_channels(self, step: PassSpec) -> ChannelSolver:
        observer, out = self._observer, self._spec.recipe.out
        beside, prefix = None if out is None else Path(out), f"pass-{self._number(step)}-channels"
        return ChannelSolver(
            self._model,
            self._spec,
            self._groups,
            self._plan,
            store=self._stack.enter_context(DecompositionStore(beside, observer.state, prefix)),
            tokens=observer.tokens,
            processes=observer.processes,
        )

    def _number(self, step: PassSpec) -> int:
        return self.passes.index(step) + 1

    def _solve(self, step: PassSpec) -> None:
        """Decompose everything; put it in place if the ranks are known."""
        self._solver = solver = self._new_solver(step, self._units)
        self._channels = channels = self._new_channels(step)
        kept = self._observer.records.of_pass(
            step, self._number(step), self._tables, lambda: [*solver.ledger.written(), *channels.ledger.written()]
        )
        if kept is not None:
            solver.take_up(kept)
            channels.ledger.take_up(kept)
            influence = kept.found().get("influence", {})
            self._influence |= {int(index): value for index, value in influence.items()}

        def visit(block: BlockStatistics) -> None:
            if block.influence is not None:
                self._influence[block.index] = block.influence
            with self._observer.watch("solve"):
                channels.visit(block)  # which leaves the statistics, and the other visit uses them up
                solver.visit(block)

        self._statistics.run(step, visit, influence=self._spec.influence and step.hand_on == "dense", kept=kept)
        solver.in_order()

    def _tables(self) -> dict[str, dict[str, Any]]:
        return (
            self._solved.ledger.tables()
            | self._ordered.ledger.tables()
            | {"influence": {str(index): one for index, one in self._influence.items()}}
        )

    def _solve_again(self, step: PassSpec) -> None:
        """Decompose behind the compressed prefix, and put it in place; what cannot be is as it was decomposed first."""
        first, second = self._solved, self._new_solver(step, list(self._solved.kept))
        ordered, narrowed = self._ordered, self._new_channels(step)
        kept = self._observer.records.of_pass(
            step, self._number(step), lambda: second.ledger.tables() | narrowed.ledger.tables()
        )
        if kept is not None:
            second.take_up(kept)
            narrowed.ledger.take_up(kept)

        def visit(block: BlockStatistics) -> None:
            with self._observer.watch("solve"):
                of_channels = narrowed.of(block)
                second.visit(block)
                narrowed.visit(of_channels)
                left = narrowed.not_reached(ordered.in_block(block.index, self._decided))
                names = {site.name for group in left for site in group.sites}
                missed = [*second.take_missed(), *(unit for unit in first.kept if unit.name in names)]
                first.kept.install([(unit, decisions[unit.name]) for unit in missed if unit.name in decisions])
                narrowed.take_over(ordered, left)

        decisions = {unit.name: decision for unit, decision in first.kept.decided(self._decided)}
        self._statistics.run(step, visit, kept=kept)
        second.in_order()
        first.found.take_results(second.found)
        ordered.found.take_results(narrowed.found)
        self._tell(second.found.missed, second.found.untargeted | narrowed.found.untargeted)

    def _tell(self, missed: Collection[str], untargeted: Collection[str]) -> None:
        """Tell which units, and which sites, were not decomposed behind the compressed blocks as was asked."""
        note = self._observer.progress.note
        if missed:
            note(
                f"{len(missed)} units are not reached behind the compressed blocks and are decomposed by the dense "
                f"model's statistics, the first is {min(missed)}"
            )
        if untargeted:
            note(
                f"{len(untargeted)} sites read other tokens than in the dense model and are given no targets of "
                f"its path, the first is {min(untargeted)}"
            )

    @property
    def _fallbacks(self) -> dict[str, str]:
        return {} if self._solver is None else self._solver.found.fallbacks | self._ordered.found.fallbacks

    def evidence(self) -> tuple[Anatomy, list[Unit], Evidence]:
        """Return the sites, what can be decided, and what is known of it once all is solved, for any budget."""
        solved, kept = self._solved.found, self._solved.kept
        anatomy = self._anatomy.with_idle(set(solved.unreached))
        idle = {site.name for site in anatomy.sites if site.idle}
        widths_alone = self._spec.structures == "widths"
        decided = [Unit((site,)) for site in anatomy.sites] if widths_alone else list(kept)
        units = [Unit(tuple(replace(s, idle=s.name in idle) for s in unit.members)) for unit in decided]
        channels = self._ordered.candidates()
        return (
            anatomy,
            units,
            Evidence(kept.spectra, self._influence, notes=solved.fallbacks, channels=channels, rounding=kept.rounding),
        )

    def budgets(self, spec: LowRankSpec) -> Budgets:
        """Return every budget of what was solved, as a spec spreads it."""
        anatomy, units, evidence = self.evidence()
        itemsize = self._model.dtype.itemsize
        return Budgets(anatomy, units, evidence, spec.allocator, spec.allocation_config, spec.budget, itemsize)

    def elastic(self) -> ElasticFactors:
        """Return what smaller sizes are made of, once all is decided."""
        with self._observer.watch("allocate"):
            return collect(self.budgets(self._spec), self.plan, self._solved.kept, self._observer.progress)

    def _allocate(self, order: Order) -> Plan:
        """Decide every site, from what was found if anything was; trials are ordered of all processes."""
        spec, itemsize = self._spec, self._model.dtype.itemsize
        config, budget = spec.allocation_config, budget_of(self._spec, self._anatomy, self._model.dtype.itemsize)
        if self._solver is None:
            return make_plan(self._anatomy, spec.allocator, budget, itemsize, config=config)
        anatomy, units, evidence = self.evidence()
        if spec.tries:
            evidence = with_trials(evidence, self._observer, spec, self._solved.kept, self._trial, order)
        with self._observer.watch("allocate"):
            try:
                return make_plan(anatomy, spec.allocator, budget, itemsize, units, evidence, config)
            except ParedError as error:
                if not (dense := dense_for_want_of_tokens(self._unreached.values())):
                    raise
                told = "; ".join(f"{count} layers stay dense, as {said}" for said, count in dense.items())
                raise ParedError(f"{error}; {told}: calibrate on more text ({called('samples')})") from error

    def _try(self, decisions: Mapping[str, Decision]) -> None:
        """Take part in a trial of the first process, which measures."""
        with self._solved.kept.installed(decisions):
            pass

    def _install(self, step: PassSpec) -> None:
        """Put in place what was decomposed, and make narrower what was ordered."""
        narrowed, plan = self._ordered.found.kept, self._decided
        kept = self._observer.records.of_pass(step, self._number(step), lambda: {"channels_kept": dict(narrowed)})
        if kept is not None:
            narrowed.update(kept.found().get("channels_kept", {}))
        install = self.installer(plan)

        def visit(block: BlockStatistics) -> None:
            install(block.index)

        store, group = self._observer.store, self._spec.group_size
        with self._observer.watch("solve"):
            visit_blocks(store, visit, changes=True, group=group, kept=kept)

    def installer(self, plan: Plan) -> Callable[[int], None]:
        """Return what puts in place, by the index of a block, what was decomposed and ordered, as a plan says."""
        install, channels, widths = self._solved.kept.installer(plan), self._ordered, widths_of(plan)

        def put(index: int) -> None:
            install(index)
            channels.install(channels.in_block(index, plan), widths)

        return put

    def _refit(self, step: PassSpec) -> None:
        """Fit every ``up`` to the inputs that the compressed model really has."""
        observer, units, plan = self._observer, self._solved.kept, self._decided
        processes = observer.processes
        together = self._spec.refit == "update"
        refit = Refit(self._model, units, plan, together, self._spec.dense_path, processes)
        kept = observer.records.of_pass(step, self._number(step))
        if kept is not None:
            refit.take_up(kept)
        if is_done(kept):
            return
        inputs = observer.capture()
        dense_block = dense_blocks(self._model, self._anatomy, units, plan, processes)

        def visit(block: BlockStatistics) -> None:
            with observer.watch("refit"):
                refit.visit(block)

        reference = observer.reference(inputs, dense_block) if step.reference else None
        observed = dense_block if self._spec.refit == "sequential-dense-block" else None
        observer.forward(inputs, mean_gram, visit, step, reference, name="refit", observed=observed, kept=kept)
