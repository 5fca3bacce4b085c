"""One model at every budget: all is decomposed once, and each budget is an allocation of what was found."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pared.allocation.sparsity.loss import pruning_loss
from pared.allocation.units import Structures
from pared.data.windows import Windows
from pared.engine.allocate import Allocated, anatomy_of
from pared.engine.checks.weights import require_finite_weights
from pared.engine.cost.beside import pays
from pared.engine.families.low_rank import LowRankWork
from pared.engine.families.pruning import SparseWork
from pared.engine.install import unchanged
from pared.engine.observe import Observer
from pared.engine.spec import CompressionSpec, LowRankSpec, SparseSpec
from pared.engine.targets.opening import experts_opened
from pared.modules.narrow import COUNTS
from pared.progress import Progress
from pared.schema.plan import Sparse
from pared.structure.probe import evaluating
from pared.structure.store import ResidentBlocks


class Curve(Protocol):
    """Every budget of one kind of structure."""

    def decide(self, keep: float) -> Allocated:
        """Spread a budget.

        Args:
            keep: the fraction of the target parameters that stays, in (0, 1).

        Raises:
            ParedError: it cannot be met.
        """

    def installed(self, allocated: Allocated) -> AbstractContextManager[None]:
        """Have what was decided in the model for the length of a ``with`` block; the same bits afterwards."""


@contextmanager
def explored(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    specs: Mapping[str, CompressionSpec],
    windows: Windows,
    progress: Progress,
) -> Iterator[Mapping[str, Curve]]:
    """Decompose a model once, and yield the curve of every structure that it has; a ``with`` block.

    Decompositions lie on the disk meanwhile, and the model is the same bits afterwards.

    Args:
        model: dense, in memory.
        tokenizer: of the model.
        specs: of every structure, as :func:`require_explorable` gives them.
        windows: calibration tokens.
        progress: what reports progress.

    Raises:
        ParedError: anything in the model or the text that does not work.
    """
    with evaluating(model), torch.inference_mode(False), ExitStack() as stack:
        first = next(iter(specs.values()))
        stack.enter_context(experts_opened(model, first))
        anatomy = anatomy_of(model, first.recipe)
        require_finite_weights(model, anatomy)

        def observer(spec: CompressionSpec) -> Observer:
            made = Observer(ResidentBlocks(model, anatomy), tokenizer, spec, progress)
            made.probe(anatomy)
            made.beside = pays(made)
            made.read(windows)
            return made

        curves: dict[str, Curve] = {}
        low_rank = {name: spec for name, spec in specs.items() if isinstance(spec, LowRankSpec)}
        if low_rank:
            spec = _widest(low_rank)
            watching = observer(spec)
            work = stack.enter_context(LowRankWork(watching, spec))
            work.run(spec.passes(ranks_known=False)[0])
            found = {name: LowRankCurve(model, own, work) for name, own in low_rank.items()}
            curves |= {name: one for name, one in found.items() if name == "ranks" or one.has_channels}
        if "zeros" in specs:
            sparse = specs["zeros"]
            assert isinstance(sparse, SparseSpec)
            curves["zeros"] = ZerosCurve(observer(sparse), sparse)
        yield {name: curves[name] for name in specs if name in curves}


def _widest(specs: Mapping[str, LowRankSpec]) -> LowRankSpec:
    """Return a spec whose one pass finds what all of them decide from."""
    one = next(iter(specs.values()))
    only: Structures = one.budget.structures if len(specs) == 1 else "mixed"
    one = specs.get(only, one)
    heads = "on" if any(spec.structures != "ranks" and spec.heads for spec in specs.values()) else "auto"
    recipe = one.recipe.model_copy(update={"heads": heads}) if only != "ranks" else one.recipe
    return replace(one.with_structures(only), recipe=recipe, statistics="once")


class LowRankCurve:
    """Ranks, widths or both. Satisfies :class:`Curve`.

    Attributes:
        budgets: what is known of every unit, and how a budget is spread over them.
    """

    def __init__(self, model: PreTrainedModel, spec: LowRankSpec, work: LowRankWork) -> None:
        """Take what a work has solved; a spec without heads is given none of them."""
        self._model, self._work = model, work
        found = work.budgets(spec)
        known = found.evidence.channels
        channels = {name: one for name, one in known.items() if spec.heads or one.group.unit != "head"}
        self.budgets = replace(found, evidence=replace(found.evidence, channels=channels))

    @property
    def has_channels(self) -> bool:
        """Whether there are widths to decide."""
        return bool(self.budgets.evidence.channels)

    def decide(self, keep: float) -> Allocated:
        """Spread a budget."""
        return self.budgets.decide(keep)

    @contextmanager
    def installed(self, allocated: Allocated) -> Iterator[None]:
        """Have factors and narrower layers in the model."""
        put, sites = self._work.installer(allocated.plan), self.budgets.anatomy.sites
        blocks = sorted({site.block for site in sites})
        with unchanged(self._model, [site.name for site in sites]), self._same_counts():
            for index in blocks:
                put(index)
            yield

    @contextmanager
    def _same_counts(self) -> Iterator[None]:
        """Have modules count their heads as before, after a ``with`` block."""
        groups = [one.group for one in self.budgets.evidence.channels.values()]
        names = {count.module for group in groups for count in group.counts}
        counted = {count.attribute for group in groups for count in group.counts} | {COUNTS}
        modules = [vars(self._model.get_submodule(name)) for name in names]
        before = [{key: value for key, value in own.items() if key in counted} for own in modules]
        try:
            yield
        finally:
            for own, kept in zip(modules, before, strict=True):
                for key in counted & own.keys():
                    del own[key]
                own.update(kept)


class ZerosCurve:
    """Zeros anywhere. Satisfies :class:`Curve`; its predictions are of zeros alone, without what makes up for them."""

    def __init__(self, observer: Observer, spec: SparseSpec) -> None:
        """Collect what each weight is expected to cost.

        Args:
            observer: that has probed the model, and read the tokens.
            spec: of the pruner, at any sparsity.
        """
        self._observer, self._spec = observer, spec
        work = SparseWork(observer, spec)
        for step in work.passes:
            if step.action == "evidence":
                work.run(step)
        self._evidence = work.evidence

    def decide(self, keep: float) -> Allocated:
        """Spread a budget."""
        plan = self._at(1 - keep).allocate()
        decided = {site.name: site.decision for site in plan.sites}
        losses = ((losses, decided[name]) for name, losses in self._evidence.losses.items())
        return Allocated(plan, sum(pruning_loss(one, zeros.sparsity) for one, zeros in losses
                                   if isinstance(zeros, Sparse)))  # fmt: skip

    @contextmanager
    def installed(self, allocated: Allocated) -> Iterator[None]:
        """Prune the model block by block, as a compression does."""
        with unchanged(self._observer.model, [site.name for site in self._observer.anatomy.sites]):
            work = self._at(1 - allocated.plan.keep)
            for step in work.passes:
                work.run(step)
            yield

    def _at(self, sparsity: float) -> SparseWork:
        return SparseWork(self._observer, replace(self._spec, sparsity=sparsity), self._evidence)
