"""What runs in the passes of a compression: blocks forward and back, and the statistics that are collected."""

import functools
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from pared.calibration.statistics import CROSS, backward_data_fraction, statistic_kind
from pared.engine.cost.channels import groups_by_shape, narrow
from pared.engine.cost.sizes import Tokens
from pared.engine.cost.traced import ModelTrace, Trace, trace
from pared.engine.spec import CompressionSpec, LowRankSpec, PassSpec, SparseSpec
from pared.operations import Operation, product
from pared.schema.plan import LowRank, Plan, Shared
from pared.schema.width import Width
from pared.structure import Anatomy, Site
from pared.structure.groups import ChannelGroup

Shapes = Sequence[tuple[int, int]]
Names = Callable[[Shapes], Collection[str]]


@dataclass(frozen=True)
class Work:
    """What a compression is to do.

    Attributes:
        model: on the meta device, in the dtype it is loaded in.
        anatomy: of it, with what its sites read.
        spec: of the compression.
        plan: made from shapes.
        tokens: that are calibrated on; none where nothing is.
        evaluated: what perplexity is measured on; none where it is not.
        dtype: name of what blocks compute in.
        resident: whether the blocks are in memory all the time.
    """

    model: PreTrainedModel
    anatomy: Anatomy
    spec: CompressionSpec
    plan: Plan
    tokens: Tokens | None
    evaluated: Tokens | None
    dtype: str
    resident: bool = True

    @property
    def model_dtype(self) -> str:
        """The name of the dtype that the model is loaded in."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def vocabulary(self) -> int:
        """How many logits a token has."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @functools.cached_property
    def channels(self) -> tuple[ChannelGroup, ...]:
        """The channel groups, by shape, where widths are decided."""
        return groups_by_shape(self.anatomy, self.spec)

    def readers(self, index: int) -> list[list[Site]]:
        """Return the sites of a block by what they read."""
        found: dict[str, list[Site]] = {}
        for site in self.anatomy.sites_of(index):
            if not site.idle:
                found.setdefault(site.reads, []).append(site)
        return list(found.values())


class Passes:
    """The passes over the blocks of one compression, on its tokens.

    Args:
        work: what is done, with tokens.

    Raises:
        ParedError: the model does not run on shapes alone.
    """

    def __init__(self, work: Work) -> None:
        assert work.tokens is not None
        self._work, self._spec, self._tokens = work, work.spec, work.tokens
        self._planned = {site.name: site for site in work.plan.sites}
        self._batch = min(work.tokens.batch, work.tokens.windows)
        gradients = any(step.runs.startswith("backward") for step in work.spec.passes())
        dtype = getattr(torch, work.dtype)
        self._traced: ModelTrace = trace(work.model, work.anatomy, self._batch, work.tokens.length, dtype, gradients)

    def forward(self, step: PassSpec) -> list[Operation]:
        """Return a pass forward, as :func:`pared.engine.blocks.run_blocks` goes."""
        batches, behind = math.ceil(self._tokens.windows / self._batch), step.hand_on == "compressed"
        group = 1 if step.action == "refit" and behind else self._spec.group_size
        names, last, found = self._names(step), len(self._traced.blocks) - 1, list[Operation]()
        for index, block in enumerate(self._traced.blocks):
            observed = self._left_early(index, block) if behind else block.forward
            if step.action == "refit":
                observed = compressed(self._work, index, observed)
            found += _times(observed, batches)
            # A group is closed by its last block, behind which all of it run again.
            closes = (index + 1) % group == 0 or index == last
            if behind:
                again = index % group + 1 if closes else 1
                found += _times(compressed(self._work, index, block.forward), batches * again)
            if step.reference:
                found += _times(block.forward, batches)
            found += _times(self._statistics(index, names, step.reference), batches)
            found += self._cast(index)
        return found

    def backward(self, step: PassSpec) -> list[Operation]:
        """Return a pass forward that keeps what blocks read, the head, and the way back."""
        spec = self._spec
        names = frozenset({"output_gradient_diagonal"}) if isinstance(spec, SparseSpec) else spec.gradients
        share = spec.gradient_share if isinstance(spec, LowRankSpec) else backward_data_fraction(names)
        batches = math.ceil(share * math.ceil(self._tokens.windows / self._batch))
        if isinstance(spec, SparseSpec):
            names |= {"energy"}
        elif step.runs == "backward" or (step.hand_on == "dense" and share == 1):
            names |= spec.requires([(1, 1)])
        found: list[Operation] = []
        for index, block in enumerate(self._traced.blocks):
            found += _times([*block.forward, *block.back], batches)
            found += _times(_again(block), batches * (spec.labels_per_token - 1))
            found += _times(self._statistics(index, lambda _: names, draws=spec.labels_per_token), batches)
            found += _times(self._cast(index), 2)
        logits = self._batch * self._tokens.length * self._work.vocabulary
        # Probabilities, the labels drawn from them, and the gradient of the logits.
        head = self._traced.head
        found += _times([*head.back, Operation("stream", (10 * logits,), "float32")], batches)
        found += _times([*_again(head), Operation("stream", (10 * logits,), "float32")],
                        batches * (spec.labels_per_token - 1))  # fmt: skip
        return found

    def _names(self, step: PassSpec) -> Names:
        """Return the statistics that the forward part of a step collects."""
        spec = self._spec
        if step.action == "evidence":
            return lambda _: {"energy"}
        if step.action == "refit":
            return lambda _: {"mean_gram"}
        if isinstance(spec, LowRankSpec) and step.reference:  # targets are made from the inputs of both paths
            gram = spec.method.input_gram
            return lambda shapes: spec.requires(shapes) - {"output_gram"} | {gram}
        if step.runs == "backward, then forward" and spec.gradients and step.hand_on == "dense":
            # Collected on the way back, where all windows go there.
            return spec.requires if isinstance(spec, LowRankSpec) and spec.gradient_share < 1 else lambda _: ()
        return spec.requires

    def _cast(self, index: int) -> list[Operation]:
        """Return what a copy of a block in another dtype takes."""
        if self._work.model_dtype == self._work.dtype:
            return []
        numbers = sum(one.numel() for one in self._work.anatomy.blocks(self._work.model)[index].parameters())
        return [Operation("stream", (2 * numbers,), self._work.dtype)]

    def _left_early(self, index: int, block: Trace) -> Sequence[Operation]:
        """Return what of a block runs where it is left as soon as its last site has read: all but that."""
        last = self._work.anatomy.sites_of(index)[-1:]
        return _without(block.forward, Counter((_rows(block.forward), one.in_features, one.out_features)
                                               for one in last))  # fmt: skip

    def _statistics(self, index: int, names: Names, cross: bool = False, draws: int = 1) -> list[Operation]:
        """Return one batch's updates of what is collected in a block, of so many gradients a token."""
        rows, dtype, found = self._batch * self._tokens.length, self._work.dtype, list[Operation]()
        for together in self._work.readers(index):
            shapes = [(site.out_features, site.in_features) for site in together]
            for name in sorted({*names(shapes), *({CROSS} if cross else ())}):
                of = statistic_kind(name).of
                if of == "weight_grad":
                    per_batch = (self._batch, self._tokens.length)
                    found += [Operation("fisher", (*per_batch, width, out), dtype) for out, width in shapes]
                    continue
                outputs = of in ("output", "output_grad")
                features = [out for out, _ in shapes] if outputs else [shapes[0][1]]
                seen = rows * draws if of == "output_grad" else rows
                found += [Operation(update_kind(name), (seen, one), dtype) for one in features]
        return found


def compressed(work: Work, index: int, forward: Sequence[Operation]) -> list[Operation]:
    """Return what a block computes with what takes the place of its layers, by the plan."""
    planned = {site.name: site.decision for site in work.plan.sites if site.block == index}
    rows, gone, more = _rows(forward), Counter[tuple[int, ...]](), list[Operation]()
    there = {one.sizes: one for one in forward if one.kind == "product"}
    for site in work.anatomy.sites_of(index):
        decision, sizes = planned[site.name], (rows, site.in_features, site.out_features)
        if not isinstance(decision, (LowRank, Shared, Width)) or sizes not in there:
            continue
        gone[sizes] += 1
        dtype = there[sizes].dtype
        if isinstance(decision, Width):
            more.append(narrow(sizes, decision, dtype))
            continue
        rank = decision.rank
        read = site.in_features - (rank if decision.pivoted else 0)
        more += [product(rows, read, rank, dtype), product(rows, rank, site.out_features, dtype)]
        if decision.pivoted:  # inputs are put in order
            more.append(Operation("stream", (2 * rows * site.in_features,), dtype))
    return [*_without(forward, gone), *more]


def update_kind(name: str) -> str:
    """Return the kind of operation that an update of a statistic is."""
    if name == CROSS:
        return "cross"
    return "gram" if "gram" in name or name == "output_gradient_full" else "energy"


def _rows(forward: Sequence[Operation]) -> int:
    return max((one.sizes[0] for one in forward if one.kind == "product"), default=0)


def _times(operations: Sequence[Operation], times: float) -> list[Operation]:
    return [replace(one, times=one.times * times) for one in operations]


def _again(one: Trace) -> list[Operation]:
    """Return what one more gradient takes on its way back: what is recomputed is there already."""
    recomputed = Counter[tuple[int, ...]]()
    for done in one.forward:
        if done.kind == "product":
            recomputed[done.sizes] += round(done.times)
    return _without(one.back, recomputed)


def _without(found: Sequence[Operation], gone: Mapping[tuple[int, ...], int]) -> list[Operation]:
    """Return operations without some products, by their sizes."""
    left, kept = Counter(gone), list[Operation]()
    for one in found:
        taken = min(float(left[one.sizes]), one.times) if one.kind == "product" else 0.0
        left[one.sizes] -= round(taken)
        if one.times > taken:
            kept.append(replace(one, times=one.times - taken))
    return kept
