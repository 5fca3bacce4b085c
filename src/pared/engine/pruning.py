"""The sparse family at work: collect what the allocation needs, decide the zeros, prune block by block."""

import math
from collections.abc import Iterator, Mapping

import torch

from pared.allocation.dsa import ScoreHistogram
from pared.allocation.registry import LayerEvidence
from pared.allocation.sparsity import eigenvalues, hill_alpha
from pared.calibration import BlockStatistics, Collected, backward_data_fraction, per_token
from pared.engine.allocate import plan_zeros
from pared.engine.blocks import visit_blocks
from pared.engine.observe import Observer
from pared.engine.result import Compressed
from pared.engine.spec import PassSpec, SparseSpec
from pared.errors import ParedError
from pared.modules import NMGroups, SparseLinear, inherit_requires_grad, replace_module
from pared.schema.plan import NM, Dense, Plan, SitePlan, Sparse
from pared.sparsity import Pattern, Unstructured, pattern, wanda
from pared.sparsity.registry import energy
from pared.structure import Site, bias_of, weight_of

GRADIENTS = frozenset({"output_gradient_diagonal"})  # what the loss makes of a weight's outputs


class SparseWork:
    """One pruning under way.

    What an allocator needs of the dense model is collected in a pass of its own, in histograms whose size does not
    depend on the model's. Then every block is observed, pruned, and run again, so that the next one reads what the
    pruned one puts out. Memory beside the model: one block in the computing dtype, its statistics, two sets of hidden
    states.

    Attributes:
        passes: what :meth:`run` is to be given, in order.
        evidence: what the allocation needs, once it is there.
    """

    def __init__(self, observer: Observer, spec: SparseSpec, evidence: LayerEvidence | None = None) -> None:
        """Start.

        Args:
            observer: that has probed the model, and read the tokens if there are any.
            spec: everything that is settled.
            evidence: what the allocation needs, in place of a pass for it.
        """
        self._observer, self._spec, self.evidence = observer, spec, evidence
        self._model, self._anatomy = observer.model, observer.anatomy
        self._units = self._split()
        self._plan: Plan | None = None
        self._pruned: dict[str, SitePlan] = {}
        self._fallbacks: dict[str, str] = {}
        self.passes = tuple(step for step in spec.passes() if step.action != "evidence" or evidence is None)

    def __enter__(self) -> "SparseWork":
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is kept."""

    def run(self, step: PassSpec) -> None:
        """Do one step.

        Raises:
            ParedError: no token reached any site, or a weight or its statistics do not allow what is asked.
        """
        if step.action == "evidence":
            self.collect(step)
        elif step.action == "allocate":
            self._allocate()
        else:
            self._prune(step)

    def report(self, result: Compressed) -> Iterator[str]:
        """Fill in the record of what was done, and yield what a user should read of it."""
        assert self._plan is not None
        sites = tuple(self._pruned[site.name] for site in self._plan.sites)
        result.plan = self._plan.model_copy(update={"sites": sites})
        result.fallbacks |= self._fallbacks
        found = [1 - site.after / site.before for site in sites]
        yield (
            f"sparsity {1 - result.plan.achieved_keep:.4f} of the covered weights, {min(found):.3f} to "
            f"{max(found):.3f} a site"
        )

    def collect(self, step: PassSpec) -> None:
        """Collect what the allocator needs of the dense model."""
        needs, observer = self._spec.allocator.needs, self._observer
        shapes = [[(site.out_features, site.in_features) for site in unit] for unit in self._units]
        unit_of = {site.name: number for number, unit in enumerate(self._units) for site in unit}
        if "alphas" in needs:
            with observer.watch("spectra"):
                self.evidence = self._spectra(shapes)
            return
        histograms = [ScoreHistogram() for _ in self._units]

        def visit(block: BlockStatistics) -> None:
            with observer.watch("allocate"):
                for name, own in block.statistics.items():
                    if name in unit_of and own["energy"].tokens:  # without any gradient a weight costs nothing
                        found = self._losses(name, own) if "losses" in needs else self._scores(name, own)
                        histograms[unit_of[name]].update(found)

        inputs = observer.capture()
        if "losses" in needs:
            share = backward_data_fraction(GRADIENTS)
            observer.backward(inputs, GRADIENTS | {"energy"}, visit, share)
        else:
            observer.forward(inputs, energy, visit, step, name="scores of the dense model")
        self.evidence = _read(shapes, histograms, "losses" if "losses" in needs else "scores")

    def _split(self) -> list[list[Site]]:
        """Return the sites that get one sparsity: those of a block, or each its own."""
        sites = [site for site in self._anatomy.sites if not site.idle]
        if self._spec.granularity == "site":
            return [[site] for site in sites]
        blocks = sorted({site.block for site in sites})
        return [[site for site in sites if site.block == block] for block in blocks]

    def _spectra(self, shapes: list[list[tuple[int, int]]]) -> LayerEvidence:
        """Return the mean exponent of the tails of every unit's spectra, of those that have one; NaN if none has."""
        tail, notes = self._spec.allocation_options["tail"], dict[str, str]()
        if tail not in ("xmin_mid", "xmin_peak"):
            raise ParedError(f"option tail: expected xmin_mid or xmin_peak, found {tail!r}")
        found: dict[str, float] = {}

        def visit(block: BlockStatistics) -> None:
            for site in self._anatomy.sites_of(block.index):
                if not site.idle:
                    try:
                        found[site.name] = hill_alpha(eigenvalues(self._weight(site.name)), tail)
                    except ParedError as undefined:  # a zero weight, one of rank 1, a single row
                        notes[site.name] = (
                            f"{undefined}: left out of its unit's mean; a unit of none takes that of the others"
                        )

        visit_blocks(self._observer.store, visit)
        known = [[found[site.name] for site in unit if site.name in found] for unit in self._units]
        alphas = [sum(own) / len(own) if own else math.nan for own in known]
        return LayerEvidence(shapes, alphas=alphas, notes=notes)

    def _scores(self, name: str, own: Mapping[str, Collected]) -> torch.Tensor:
        """Return Wanda's score of every weight of a site, per token of the text, ``(out, in)``."""
        return wanda.scores(self._weight(name), per_token("energy", own["energy"], self._observer.tokens))

    def _losses(self, name: str, own: Mapping[str, Collected]) -> torch.Tensor:
        """Return ``½ w² E[x²] E[g²]`` for every weight of a site, in nats a token, ``(out, in)``."""
        input_energy_N = per_token("energy", own["energy"], self._observer.backward_tokens)
        output_energy_O = own["output_gradient_diagonal"].value
        return 0.5 * self._weight(name).double().square() * input_energy_N * output_energy_O[:, None]

    def _allocate(self) -> None:
        """Decide every site."""
        spec = self._spec
        shapes = [[(site.out_features, site.in_features) for site in unit] for unit in self._units]
        evidence = self.evidence or LayerEvidence(shapes)
        with self._observer.watch("allocate"):
            sparsities_L = spec.allocator.allocate(evidence, spec.sparsity, spec.allocation_options)
            unread = {site.name for number in evidence.unread for site in self._units[number]}
            units = [unit for number, unit in enumerate(self._units) if number not in evidence.unread]
            anatomy, itemsize = self._anatomy.with_idle(unread), self._model.dtype.itemsize
            self._plan = plan_zeros(anatomy, spec, units, sparsities_L, itemsize)
        self._fallbacks |= evidence.notes

    def _prune(self, step: PassSpec) -> None:
        """Prune block by block, each behind the blocks that are pruned already if the method reads anything."""
        assert self._plan is not None
        planned: dict[int, list[SitePlan]] = {}
        for site in self._plan.sites:
            planned.setdefault(site.block, []).append(site)

        def visit(block: BlockStatistics) -> None:
            with self._observer.watch("solve"):
                for site in planned.get(block.index, ()):
                    self._pruned[site.name] = self._solve(site, block.statistics.get(site.name, {}))

        if step.runs == "nothing":
            self._observer.without_data(visit, changes=True)
        else:
            inputs = self._observer.capture()
            self._observer.forward(inputs, self._spec.method.needs, visit, step, name="collect and prune")

    def _solve(self, site: SitePlan, statistics: Mapping[str, Collected]) -> SitePlan:
        """Prune one site; return what became of it, and note by which rule where its statistics say nothing."""
        method = self._spec.method
        if isinstance(site.decision, Dense):
            return site
        if method.calibrated and not all(one.tokens for one in statistics.values()):
            return site.model_copy(update={"decision": Dense(reason="no calibration token reached it")})
        zeros, groups = _zeros(site)
        W_ON, old = self._weight(site.name), self._model.get_submodule(site.name)
        values = {name: one.value.to(W_ON.device) for name, one in statistics.items()}
        try:
            pruned = method.prune(W_ON, zeros, values, self._spec.options)
            new = SparseLinear.of(pruned.weight, pruned.mask, bias_of(old), groups)
        except (ValueError, RuntimeError) as error:
            raise ParedError(f"site {site.name}: {error}") from error
        inherit_requires_grad(new, old)
        replace_module(self._model, site.name, new)
        if fallback := method.fallback(values):
            self._fallbacks[site.name] = fallback
        if groups is not None:
            return site
        return site.model_copy(update={"decision": site.decision.model_copy(update={"stored": new.stored})})

    def _weight(self, name: str) -> torch.Tensor:
        """Return the weight of a site ``(out, in)``."""
        return weight_of(self._model.get_submodule(name)).detach()


def _read(shapes: list[list[tuple[int, int]]], histograms: list[ScoreHistogram], name: str) -> LayerEvidence:
    """Return what was collected of the units that a token reached, and which were not."""
    unread = frozenset(number for number, one in enumerate(histograms) if not one.moments.count)
    if len(unread) == len(shapes):
        raise ParedError("no token of the calibration text reached any site; name another text")
    kept = [number for number in range(len(shapes)) if number not in unread]
    found = {name: [histograms[number] for number in kept]}
    return LayerEvidence([shapes[number] for number in kept], unread=unread, **found)  # type: ignore[arg-type]


def _zeros(site: SitePlan) -> tuple[Pattern, NMGroups | None]:
    decision = site.decision
    if isinstance(decision, NM):
        return pattern.NM(decision.kept, decision.group), NMGroups(decision.kept, decision.group)
    assert isinstance(decision, Sparse)
    return Unstructured(decision.sparsity), None
