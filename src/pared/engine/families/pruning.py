"""The sparse family at work: collect what the allocation needs, decide the zeros, prune block by block."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from pared.allocation import Evidence, Unit
from pared.allocation.dsa import ScoreHistogram
from pared.allocation.options import AlphaPruning
from pared.allocation.sparsity import eigenvalues, hill_alpha
from pared.calibration import BlockStatistics, StatisticView, backward_data_fraction, per_token, statistic_kind
from pared.engine.allocate import plan_zeros
from pared.engine.blocks import Visit, visit_blocks
from pared.engine.checks.enough import why_dense
from pared.engine.observe import Observer
from pared.engine.result import CompressedBlocks
from pared.engine.spec import PassSpec, SparseSpec
from pared.engine.state.records import is_done
from pared.errors import ParedError
from pared.modules import NMGroups, SparseLinear, inherit_requires_grad, replace_module
from pared.schema.plan import NM, Dense, Plan, SitePlan, Sparse
from pared.sparsity import Pattern, Unstructured, pattern, wanda
from pared.sparsity.registry import energy
from pared.structure import bias_of, weight_of

Pruned = tuple[SparseLinear, str]
GRADIENTS = frozenset({"output_gradient_diagonal"})  # what the loss makes of a weight's outputs


class SparseWork:
    """One pruning under way.

    What an allocator needs of the dense model is collected in a pass of its own, in histograms whose size does not
    depend on the model's. Then every block is observed, pruned, and run again, so that the next one reads what the
    pruned one outputs. Memory besides the model: one block in the computing dtype, its statistics, two sets of hidden
    states.

    Attributes:
        passes: what :meth:`run` is to be given, in order.
        evidence: what the allocation needs, once it is there.
    """

    def __init__(self, observer: Observer, spec: SparseSpec, evidence: Evidence | None = None) -> None:
        """Start.

        Args:
            observer: that has probed the model, and read the tokens if there are any.
            spec: the resolved compression.
            evidence: what the allocation needs, in place of a pass for it.
        """
        self._observer, self._spec, self.evidence = observer, spec, evidence or Evidence()
        self._model, self._anatomy = observer.model, observer.anatomy
        self._units = self._split()
        self._plan: Plan | None = None
        self._pruned: dict[str, SitePlan] = {}
        self._values: list[tuple[StatisticView, torch.Tensor]] = []  # of the last site
        self._fallbacks: dict[str, str] = {}
        self._starved: dict[str, str] = {}  # sites that the dense model gives too few tokens, and why they stay dense
        self.passes = tuple(step for step in spec.passes() if step.action != "evidence" or evidence is None)

    def __enter__(self) -> "SparseWork":
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is kept."""

    def run(self, step: PassSpec) -> None:
        """Do one step, or what an earlier process left of it.

        Raises:
            ParedError: no token reached any site, or a weight or its statistics do not allow what is asked.
        """
        if step.action == "evidence":
            if not self._observer.records.has_plan:
                self.collect(step)
        elif step.action == "allocate":
            self._plan = self._observer.records.plan(lambda _: self.allocate(), self._fallbacks)
        else:
            self._prune(step)

    def report(self, result: CompressedBlocks) -> Iterator[str]:
        """Fill in the record of what was done, and yield what a user should read of it."""
        assert self._plan is not None
        sites = tuple(self._pruned[site.name] for site in self._plan.sites)
        result.plan = self._plan.model_copy(update={"sites": sites})
        result.fallbacks |= self._fallbacks
        found = [1 - site.after / site.before for site in sites]
        yield (
            f"sparsity {1 - result.plan.achieved_keep:.4f} of the target weights, {min(found):.3f} to "
            f"{max(found):.3f} a site"
        )

    def collect(self, step: PassSpec) -> None:
        """Collect what the allocator requires of the dense model: of its weights, or of what runs."""
        observer = self._observer
        if step.runs == "nothing":
            with observer.watch("spectra"):
                self.evidence = replace(self.evidence, alphas=self._alphas())
        elif step.runs == "backward":
            share = backward_data_fraction(GRADIENTS)
            visit, found = self._histograms(self._losses, share)
            observer.backward(observer.capture(), GRADIENTS | {"energy"}, visit, share)
            self.evidence = replace(self.evidence, losses=_reached(found))
        else:
            visit, found = self._histograms(self._scores)
            observer.forward(observer.capture(), energy, visit, step, name="scores of the dense model")
            self.evidence = replace(self.evidence, scores=_reached(found))

    def _histograms(
        self, of_site: Callable[[str, Mapping[str, StatisticView]], torch.Tensor], share: float = 1.0
    ) -> tuple[Visit, dict[str, ScoreHistogram]]:
        """Return a visit that takes in a number for every weight, and the histograms of units that it fills.

        A site whose expert is given too few tokens stays dense, and has no part in what is decided of the others.
        """
        unit_of = {site.name: unit.name for unit in self._units for site in unit.members}
        found = {unit.name: ScoreHistogram() for unit in self._units}
        for_gram = any(statistic_kind(name).gram for name in self._spec.requires([(1, 1)]))

        def visit(block: BlockStatistics) -> None:
            with self._observer.watch("allocate"):
                for name, own in block.statistics.items():
                    if name not in unit_of or not own["energy"].tokens:  # without any gradient a weight costs nothing
                        continue
                    if why := why_dense(self._model, name, {"energy": own["energy"]}, for_gram, share):
                        self._starved[name] = why
                    else:
                        found[unit_of[name]].update(of_site(name, own))

        return visit, found

    def _split(self) -> list[Unit]:
        """Return the sites that get one sparsity: those of a block, or each its own."""
        sites = [site for site in self._anatomy.sites if not site.idle]
        if self._spec.granularity == "site":
            return [Unit((site,)) for site in sites]
        blocks = sorted({site.block for site in sites})
        return [Unit(tuple(site for site in sites if site.block == block)) for block in blocks]

    def _alphas(self) -> dict[str, float]:
        """Return the mean exponent of the tails of every unit's spectra, of those that have one; NaN if none has."""
        config, notes = self._spec.allocation_config, self.evidence.notes
        tail = config.tail if isinstance(config, AlphaPruning) else AlphaPruning().tail
        found: dict[str, float] = {}

        def tail_of(name: str) -> tuple[float | None, str]:
            try:
                return hill_alpha(eigenvalues(self._weight(name)), tail), ""
            except ParedError as undefined:  # a zero weight, one of rank 1, a single row
                return None, f"{undefined}: left out of its unit's mean; a unit of none takes that of the others"

        def visit(block: BlockStatistics) -> None:
            sites = [site.name for site in self._anatomy.sites_of(block.index) if not site.idle]
            for name, (alpha, note) in zip(sites, self._observer.processes.each(sites, tail_of), strict=True):
                if alpha is not None:
                    found[name] = alpha
                else:
                    notes[name] = note

        visit_blocks(self._observer.store, visit)
        known = {unit.name: [found[one.name] for one in unit.members if one.name in found] for unit in self._units}
        return {name: sum(own) / len(own) if own else math.nan for name, own in known.items()}

    def _scores(self, name: str, own: Mapping[str, StatisticView]) -> torch.Tensor:
        """Return Wanda's score of every weight of a site, per token of the text, ``(out, in)``."""
        return wanda.scores(self._weight(name), per_token("energy", own["energy"], self._observer.tokens))

    def _losses(self, name: str, own: Mapping[str, StatisticView]) -> torch.Tensor:
        """Return ``½ w² E[x²] E[g²]`` for every weight of a site, in nats a token, ``(out, in)``."""
        input_energy_N = per_token("energy", own["energy"], self._observer.backward_tokens)
        output_energy_O = own["output_gradient_diagonal"].value
        return 0.5 * self._weight(name).double().square() * input_energy_N * output_energy_O[:, None]

    def allocate(self) -> Plan:
        """Decide every site, from the evidence."""
        spec, (units, evidence) = self._spec, self._decidable()
        with self._observer.watch("allocate"):
            wished = spec.allocator.allocate(units, spec.budget, evidence, spec.allocation_config)
            decided = {site.name for unit in units for site in unit.members}
            unread = {site.name for unit in self._units for site in unit.members} - decided
            anatomy, itemsize = self._anatomy.with_idle(unread), self._model.dtype.itemsize
            plan = plan_zeros(anatomy, spec, units, wished, itemsize, self._starved)
        self._fallbacks |= evidence.notes
        return plan

    def _decidable(self) -> tuple[list[Unit], Evidence]:
        """Return the units that something is known of, without sites that stay dense, and the evidence by their names.

        A unit is called after its first site, which may be one that stays dense.
        """
        scores: dict[str, ScoreHistogram] = {}
        losses: dict[str, ScoreHistogram] = {}
        evidence, units = self.evidence, list[Unit]()
        read = [(own, renamed) for own, renamed in ((evidence.scores, scores), (evidence.losses, losses)) if own]
        for unit in self._units:
            left = tuple(site for site in unit.members if site.name not in self._starved)
            if left and all(unit.name in own for own, _ in read):
                units.append(Unit(left))
                for own, renamed in read:
                    renamed[units[-1].name] = own[unit.name]
        return units, replace(evidence, scores=scores, losses=losses)

    def _prune(self, step: PassSpec) -> None:
        """Prune block by block, each behind the blocks that are pruned already if the method reads anything."""
        assert self._plan is not None
        kept = self._observer.records.of_pass(step, self.passes.index(step) + 1, self._tables)
        if kept is not None:
            found = kept.found()
            self._pruned |= {name: SitePlan.model_validate(one) for name, one in found.get("pruned", {}).items()}
            self._fallbacks |= found.get("fallbacks", {})
        planned: dict[int, list[SitePlan]] = {}
        for site in self._plan.sites:
            planned.setdefault(site.block, []).append(site)

        def visit(block: BlockStatistics) -> None:
            with self._observer.watch("solve"):
                sites = planned.get(block.index, ())
                pruned = self._observer.processes.each(
                    sites, lambda site: self._solve(site, block.statistics.get(site.name, {}))
                )
                for site, new in pruned:
                    self._pruned[site.name] = site
                    if new is not None:
                        self._put(site.name, *new)
                self._values.clear()

        if step.runs == "nothing":
            self._observer.without_data(visit, changes=True, kept=kept)
        elif not is_done(kept):
            inputs = self._observer.capture()
            self._observer.forward(inputs, self._spec.requires, visit, step, name="collect and prune", kept=kept)

    def _tables(self) -> dict[str, dict[str, Any]]:
        pruned = {name: site.model_dump(mode="json") for name, site in self._pruned.items()}
        return {"pruned": pruned, "fallbacks": dict(self._fallbacks)}

    def _solve(self, site: SitePlan, statistics: Mapping[str, StatisticView]) -> tuple[SitePlan, Pruned | None]:
        """Return what became of one site, and what takes its place with the rule where its statistics say nothing."""
        method, config = self._spec.method, self._spec.config
        if isinstance(site.decision, Dense):
            return site, None
        if self._spec.walked and (why := why_dense(self._model, site.name, statistics)):
            return site.model_copy(update={"decision": Dense(reason=why)}), None
        zeros, groups = _zeros(site)
        W_ON, old = self._weight(site.name), self._model.get_submodule(site.name)
        values = self._values_of(statistics, W_ON.device)
        try:
            pruned = method.pruned(W_ON, zeros, values, config)
            new = SparseLinear.of(pruned.weight, pruned.mask, bias_of(old), groups)
        except (ValueError, RuntimeError) as error:
            raise ParedError(f"site {site.name}: {error}") from error
        inherit_requires_grad(new, old)
        fallback = method.fallback(values)
        if groups is None:
            site = site.model_copy(update={"decision": site.decision.model_copy(update={"stored": new.stored})})
        return site, (new, fallback)

    def _put(self, name: str, new: SparseLinear, fallback: str) -> None:
        """Put what this process or another has pruned in its place."""
        replace_module(self._model, name, new.to(self._weight(name).device))
        if fallback:
            self._fallbacks[name] = fallback

    def _values_of(self, statistics: Mapping[str, StatisticView], device: torch.device) -> dict[str, torch.Tensor]:
        """Return statistics as tensors: the same ones for sites in a row that read one input, which factor it once."""
        if [id(one) for one, _ in self._values] != [id(one) for one in statistics.values()]:
            self._values.clear()  # before there are others
            self._values += [(one, one.value.to(device)) for one in statistics.values()]
        return dict(zip(statistics, (value for _, value in self._values), strict=True))

    def _weight(self, name: str) -> torch.Tensor:
        """Return the weight of a site ``(out, in)``."""
        return weight_of(self._model.get_submodule(name)).detach()


def _reached(found: Mapping[str, ScoreHistogram]) -> dict[str, ScoreHistogram]:
    """Return the histograms of the units that a token reached.

    Raises:
        ParedError: there is none.
    """
    reached = {name: one for name, one in found.items() if one.moments.count}
    if not reached:
        raise ParedError("no token of the calibration text reached any site; name another text")
    return reached


def _zeros(site: SitePlan) -> tuple[Pattern, NMGroups | None]:
    decision = site.decision
    if isinstance(decision, NM):
        return pattern.NM(decision.kept, decision.group), NMGroups(decision.kept, decision.group)
    assert isinstance(decision, Sparse)
    return Unstructured(decision.sparsity), None
