"""One model, pruned in place: probe, look, allocate, then block by block collect and prune."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pared.allocation.dsa import ScoreHistogram
from pared.allocation.registry import LayerEvidence
from pared.allocation.sparsity import eigenvalues, hill_alpha
from pared.calibration import Collected, WalkedBlock, per_token, share_felt
from pared.data.windows import Windows, require_fits
from pared.engine.checks import require_finite_weights
from pared.engine.observe import Passes
from pared.engine.result import Compressed, remarks, stacks
from pared.engine.spec import anatomy_of, calibrates, layer_allocation_of, options_of, pruner_of
from pared.engine.zeros import plan_zeros, target_of
from pared.errors import ParedError
from pared.modules import NMGroups, SparseLinear, inherit_requires_grad, replace_module
from pared.progress import Progress, Silent, Stopwatch
from pared.schema.plan import NM, Dense, Plan, SitePlan, Sparse
from pared.schema.recipe import Recipe
from pared.sparsity import Pattern, Unstructured, pattern, wanda
from pared.sparsity.registry import energy
from pared.structure import Anatomy, Site, bias_of, probe, weight_of
from pared.structure.probe import BlockCall


def prune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    progress: Progress,
    windows: Windows | None = None,
    evidence: LayerEvidence | None = None,
) -> Compressed:
    """Prune a loaded model, in place, block by block.

    What an allocator needs of the dense model is collected in a pass of its own, in histograms whose size does not
    depend on the model's. Then every block is walked, pruned, and run again, so that the next one reads what the pruned
    one puts out. Memory beside the model: one block in the computing dtype, its statistics, two sets of hidden states.

    Args:
        model: dense, in evaluation mode.
        tokenizer: of the model.
        recipe: of a pruning method.
        progress: who watches.
        windows: calibration tokens already cut, in place of the recipe's text.
        evidence: what :func:`look` found for this allocation on these windows, in place of a pass over them.

    Raises:
        ParedError: anything in the model, the recipe or the text that does not work.
    """
    return _Pruning(model, tokenizer, recipe, progress).run(windows, evidence)


def look(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    progress: Progress | None = None,
    windows: Windows | None = None,
) -> LayerEvidence:
    """Collect what a recipe's allocation needs of the dense model; it serves every sparsity and every pruner.

    Args:
        model: dense, in evaluation mode; not changed.
        tokenizer: of the model.
        recipe: of a pruning method; its allocation, ``granularity`` and calibration are read.
        progress: who watches; nobody by default.
        windows: calibration tokens already cut, in place of the recipe's text.

    Raises:
        ParedError: anything in the model, the recipe or the text that does not work.
    """
    pruning = _Pruning(model, tokenizer, recipe, progress or Silent())
    anatomy, calls = pruning.probe()
    return pruning.look(anatomy, calls, pruning.units(anatomy), pruning.text(windows, Compressed(model, recipe)))


@dataclass
class _Pruning:
    """One pruning under way."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    recipe: Recipe
    progress: Progress
    watch: Stopwatch = field(default_factory=Stopwatch)

    def __post_init__(self) -> None:
        self.method, self.options = pruner_of(self.recipe), options_of(self.recipe)
        self.allocator, self.spread = layer_allocation_of(self.recipe)
        self.passes = Passes(self.model, self.tokenizer, self.recipe, self.progress, watch=self.watch)

    def run(self, windows: Windows | None, evidence: LayerEvidence | None) -> Compressed:
        """Probe, look, allocate, prune."""
        result = Compressed(self.model, self.recipe)
        anatomy, calls = self.probe()
        windows = self.text(windows, result)
        units = self.units(anatomy)
        evidence = evidence or self.look(anatomy, calls, units, windows)
        with self.watch("allocate"):
            sparsities_L = self.allocator.allocate(evidence, target_of(self.recipe), self.spread)
            unread = {site.name for number in evidence.unread for site in units[number]}
            units = [unit for number, unit in enumerate(units) if number not in evidence.unread]
            plan = plan_zeros(anatomy.with_idle(unread), self.recipe, units, sparsities_L, self.model.dtype.itemsize)
            result.fallbacks |= evidence.notes
        decided: dict[str, SitePlan] = {}
        for walked in self.walk(anatomy, calls, windows, result):
            with self.watch("solve"):
                for site in [site for site in plan.sites if site.block == walked.index]:
                    decided[site.name] = self.solve(site, walked.statistics.get(site.name, {}), result.fallbacks)
        result.plan = plan.model_copy(update={"sites": tuple(decided[site.name] for site in plan.sites)})
        for line in (*self.told(result.plan), *stacks(anatomy), *remarks(result.plan, result.fallbacks)):
            self.progress.note(line)
        result.seconds = self.watch.seconds
        return result

    def probe(self) -> tuple[Anatomy, list[BlockCall]]:
        """Find the sites, and which of them run."""
        with self.watch("probe"):
            anatomy = anatomy_of(self.model, self.recipe)
            require_finite_weights(self.model, anatomy)
            return probe(self.model, anatomy, read=self.reads)

    @property
    def reads(self) -> bool:
        """Whether anything of what the sites read is needed."""
        return calibrates(self.recipe)

    def text(self, windows: Windows | None, result: Compressed) -> Windows | None:
        """Cut the calibration text, if anything is to be read."""
        if not self.reads:
            return windows
        with self.watch("text"):
            windows = windows or self.passes.windows()
            require_fits(self.model.config, windows)
        result.calibration = windows.describe()
        return windows

    def units(self, anatomy: Anatomy) -> list[list[Site]]:
        """Return the sites that get one sparsity: those of a block, or each its own."""
        sites = [site for site in anatomy.sites if not site.idle]
        if self.spread["granularity"] == "site":
            return [[site] for site in sites]
        blocks = sorted({site.block for site in sites})
        return [[site for site in sites if site.block == block] for block in blocks]

    def look(
        self, anatomy: Anatomy, calls: list[BlockCall], units: list[list[Site]], windows: Windows | None
    ) -> LayerEvidence:
        """Collect what the allocator needs of the dense model."""
        shapes = [[(site.out_features, site.in_features) for site in unit] for unit in units]
        unit_of = {site.name: number for number, unit in enumerate(units) for site in unit}
        if "alphas" in self.allocator.needs:
            with self.watch("spectra"):
                notes: dict[str, str] = {}
                return LayerEvidence(shapes, alphas=[self.alpha(unit, notes) for unit in units], notes=notes)
        if not self.allocator.needs:
            return LayerEvidence(shapes)
        assert windows is not None
        inputs = self.passes.capture(anatomy, calls, windows)
        histograms = [ScoreHistogram() for _ in units]
        if "losses" in self.allocator.needs:
            felt_names = frozenset({"output_gradient_diagonal"})
            share = share_felt(felt_names)
            felt = self.passes.feel(anatomy, inputs, windows, felt_names | {"energy"}, share=share)
            with self.watch("allocate"):
                for name, number in unit_of.items():
                    if felt[name]["energy"].tokens:  # without any gradient it costs nothing
                        histograms[number].update(self.losses(name, felt[name]))
            return self.read(shapes, histograms, "losses")
        for walked in self.passes.walk(anatomy, inputs, energy, name="scores of the dense model"):
            with self.watch("allocate"):
                for name, own in walked.statistics.items():
                    if name in unit_of and own["energy"].tokens:
                        histograms[unit_of[name]].update(wanda.scores(self.weight(name), self.per_token(own)))
        return self.read(shapes, histograms, "scores")

    def read(self, shapes: list[list[tuple[int, int]]], histograms: list[ScoreHistogram], name: str) -> LayerEvidence:
        """Return what was collected of the units that a token reached, and which were not."""
        unread = frozenset(number for number, one in enumerate(histograms) if not one.moments.count)
        if len(unread) == len(shapes):
            raise ParedError("no token of the calibration text reached any site; name another text")
        kept = [number for number in range(len(shapes)) if number not in unread]
        found = {name: [histograms[number] for number in kept]}
        return LayerEvidence([shapes[number] for number in kept], unread=unread, **found)  # type: ignore[arg-type]

    def alpha(self, unit: list[Site], notes: dict[str, str]) -> float:
        """Return the mean exponent of the tails of a unit's spectra, of those that have one; NaN if none has."""
        tail = self.spread["tail"]
        if tail not in ("xmin_mid", "xmin_peak"):
            raise ParedError(f"option tail: expected xmin_mid or xmin_peak, found {tail!r}")
        found = []
        for site in unit:
            try:
                found.append(hill_alpha(eigenvalues(self.weight(site.name)), tail))
            except ParedError as undefined:  # a zero weight, one of rank 1, a single row
                notes[site.name] = f"{undefined}: left out of its unit's mean; a unit of none takes that of the others"
        return sum(found) / len(found) if found else math.nan

    def per_token(self, own: Mapping[str, Collected]) -> torch.Tensor:
        """Return ``E[x²]`` of every input feature over the tokens of the text, ``(in,)``."""
        return per_token("energy", own["energy"], self.passes.tokens)

    def losses(self, name: str, felt: Mapping[str, Collected]) -> torch.Tensor:
        """Return ``½ w² E[x²] E[g²]`` for every weight of a site, in nats a token, ``(out, in)``."""
        input_energy_N = per_token("energy", felt["energy"], self.passes.felt_tokens)
        output_energy_O = felt["output_gradient_diagonal"].value
        return 0.5 * self.weight(name).double().square() * input_energy_N * output_energy_O[:, None]

    def walk(
        self, anatomy: Anatomy, calls: list[BlockCall], windows: Windows | None, result: Compressed
    ) -> Iterator[WalkedBlock]:
        """Yield every block with what the method needs, behind the blocks that were pruned."""
        if not self.method.calibrated:
            yield from self.passes.without_data(anatomy)
            return
        assert windows is not None
        inputs = self.passes.capture(anatomy, calls, windows)
        result.calibration = {**windows.describe(), "dtype": str(inputs.dtype)}
        yield from self.passes.walk(anatomy, inputs, self.method.needs, behind=True, name="collect and prune")

    def solve(self, site: SitePlan, statistics: Mapping[str, Collected], fallbacks: dict[str, str]) -> SitePlan:
        """Prune one site; return what became of it, and note by which rule where its statistics say nothing."""
        if isinstance(site.decision, Dense):
            return site
        if self.method.calibrated and not all(one.tokens for one in statistics.values()):
            return site.model_copy(update={"decision": Dense(reason="no calibration token reached it")})
        zeros, groups = _zeros(site)
        W_ON, old = self.weight(site.name), self.model.get_submodule(site.name)
        values = {name: one.value.to(W_ON.device) for name, one in statistics.items()}
        try:
            pruned = self.method.prune(W_ON, zeros, values, self.options)
            new = SparseLinear.of(pruned.weight, pruned.mask, bias_of(old), groups)
        except (ValueError, RuntimeError) as error:
            raise ParedError(f"site {site.name}: {error}") from error
        inherit_requires_grad(new, old)
        replace_module(self.model, site.name, new)
        if fallback := self.method.fallback(values):
            fallbacks[site.name] = fallback
        if groups is not None:
            return site
        return site.model_copy(update={"decision": site.decision.model_copy(update={"stored": new.stored})})

    def weight(self, name: str) -> torch.Tensor:
        """Return the weight of a site ``(out, in)``."""
        return weight_of(self.model.get_submodule(name)).detach()

    def told(self, plan: Plan) -> Iterator[str]:
        """Say how sparse the model became, and how widely that is spread."""
        found = [1 - site.after / site.before for site in plan.sites]
        yield (
            f"sparsity {1 - plan.achieved_keep:.4f} of the covered weights, {min(found):.3f} to {max(found):.3f} a site"
        )


def _zeros(site: SitePlan) -> tuple[Pattern, NMGroups | None]:
    decision = site.decision
    if isinstance(decision, NM):
        return pattern.NM(decision.kept, decision.group), NMGroups(decision.kept, decision.group)
    assert isinstance(decision, Sparse)
    return Unstructured(decision.sparsity), None
