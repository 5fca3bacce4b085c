"""Mixtures of experts at work: what each expert is worth, how many stay, and the model without the others.

Every mixture keeps as many, so that what is left is the model's own architecture with a smaller number in its
configuration.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from pared.calibration import BlockStatistics
from pared.calibration.statistics.experts import EXPERTS, ExpertLoss
from pared.engine.blocks import visit_blocks
from pared.engine.install import keep_experts
from pared.engine.observe import Observer
from pared.engine.result import CompressedBlocks
from pared.engine.spec import ExpertSpec, PassSpec
from pared.engine.state.records import is_done
from pared.engine.statistics.of_method import Saved
from pared.engine.targets.expert_plan import count_of, expert_plan, no_mixtures
from pared.errors import ParedError
from pared.models.resized import Sizes, set_sizes, sizes_with_fewer, take_numbers
from pared.schema.plan import Plan
from pared.structure.experts import proved
from pared.structure.groups import RefusedError
from pared.structure.mixture import Mixture, mixtures_by_shape
from pared.widths import Experts, MixtureMoments

Orders = dict[str, dict[str, list[float]]]  # by mixture: "order", "losses" and "picks" of its experts


class ExpertWork:
    """One compression that takes experts out.

    Attributes:
        passes: what :meth:`run` is to be given, in order.
    """

    def __init__(self, observer: Observer, spec: ExpertSpec, saved: Saved | None = None) -> None:
        """Start.

        Args:
            observer: that has probed the model, and read the tokens.
            spec: the resolved compression.
            saved: must be none.

        Raises:
            ParedError: there are statistics that were saved, which tell nothing of experts; or no experts can be taken
                out, too few would stay, or the architecture has no number of them; says why.
        """
        if saved is not None:
            raise ParedError("collected statistics are of layers, and structures experts reads none of them; leave out "
                             "collected")  # fmt: skip
        self._observer, self._spec, self._model = observer, spec, observer.model
        self.passes = spec.passes()
        with observer.watch("probe"):
            mixtures = _proved(observer)
        self._count = count_of(mixtures, spec.recipe.keep)
        self._before = mixtures[0].experts
        self._sizes = _sizes(self._model, mixtures, self._count)
        observer.anatomy = self._anatomy = replace(observer.anatomy, mixtures=tuple(mixtures))
        self._orders: Orders = {}
        self._plan: Plan | None = None

    def __enter__(self) -> "ExpertWork":
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is kept."""

    def run(self, step: PassSpec) -> None:
        """Do one step, or what an earlier process left of it.

        Raises:
            ParedError: what experts output is not finite.
        """
        if step.action == "solve":
            self._solve(step)
        elif step.action == "allocate":
            self._plan = self._observer.records.plan(lambda _: self._decide(), {})
        else:
            self._install()

    def report(self, result: CompressedBlocks) -> Iterator[str]:
        """Fill in the record of what was done, and yield what a user should read of it."""
        assert self._plan is not None
        result.plan = self._plan
        losses = [one["losses"][self._count - 1] for one in self._orders.values() if one["losses"]]
        told = (
            f"; what each costs adds up to {sum(losses):.4g} nats a token, too little where many go" if losses else ""
        )
        idle = sum(not picks for one in self._orders.values() for picks in one["picks"])
        yield (
            f"{self._count} of {self._before} experts stay in each of {len(self._orders)} layers, chosen by "
            f"{self._spec.method.name}{told}"
        )
        if idle:
            yield f"{idle} experts of all layers are given no token of the calibration text"

    def _solve(self, step: PassSpec) -> None:
        """Order the experts of every mixture by what the loss makes of them."""
        records, observer = self._observer.records, self._observer
        kept = records.of_pass(step, self.passes.index(step) + 1, lambda: {EXPERTS: dict(self._orders)})
        if kept is not None:
            self._orders |= kept.found().get(EXPERTS, {})
        if is_done(kept):
            return

        def visit(block: BlockStatistics) -> None:
            with observer.watch("solve"):
                for mixture in self._anatomy.mixtures_of(block.index):
                    self._orders[mixture.name] = self._ordered(block.statistics[mixture.name][EXPERTS])

        inputs = observer.capture()
        if step.runs == "backward":
            observer.backward(inputs, frozenset(), visit, kept=kept)
        else:
            observer.forward(inputs, lambda _: frozenset(), visit, step, kept=kept)

    def _ordered(self, found: Any) -> dict[str, list[float]]:
        assert isinstance(found, ExpertLoss)
        rule = self._spec.method.experts
        assert rule is not None, "a method without was refused"
        experts: Experts = rule(MixtureMoments(found.value, found.weighted, found.picks), self._spec.config)
        return {
            "order": experts.order_E.tolist(),
            "losses": [] if experts.losses_E is None else experts.losses_E.tolist(),
            "picks": found.picks.long().tolist(),
        }

    def _decide(self) -> Plan:
        kept = {name: sorted(map(int, one["order"][: self._count])) for name, one in self._orders.items()}
        itemsize = self._model.dtype.itemsize
        return expert_plan(self._anatomy, self._anatomy.mixtures, self._count, self._spec.recipe.keep, itemsize, kept)

    def _install(self) -> None:
        """Take the others out; a process that resumes does so again, as it solves nothing."""
        assert self._plan is not None

        def visit(block: BlockStatistics) -> None:
            for mixture in self._anatomy.mixtures_of(block.index):
                order = self._orders[mixture.name]["order"][: self._count]
                keep_experts(self._model, mixture, torch.tensor(sorted(map(int, order))))

        visit_blocks(self._observer.store, visit, changes=True)
        set_sizes(self._model.config, self._sizes)
        take_numbers(self._model, self._before, self._count)


def _proved(observer: Observer) -> list[Mixture]:
    """Return the mixtures of a model, each proved on its block.

    Raises:
        ParedError: there is none, or one of them cannot lose experts.
    """
    anatomy, store = observer.anatomy, observer.store
    candidates = mixtures_by_shape(anatomy.blocks(store.model), anatomy)
    if not candidates:
        raise ParedError(no_mixtures(store.model))
    calls = {call.block: call for call in reversed(observer.calls)}
    found: list[Mixture] = []
    for candidate in candidates:
        index = candidate.block
        block = store.load(index)
        try:
            if index not in calls:
                raise RefusedError("its block was not called")
            found.append(proved(candidate, block, anatomy.block_name(index), calls[index]))
        except RefusedError as why:
            raise ParedError(f"structures experts: {candidate.name}: {why}; take ranks or widths") from None
        finally:
            store.release(index)
    return found


def _sizes(model: PreTrainedModel, mixtures: Sequence[Mixture], count: int) -> Sizes:
    """Return the fields of the configuration that say how many experts there are, with the new number.

    Raises:
        ParedError: there are none.
    """
    found = sizes_with_fewer(model, {stack.name: count for one in mixtures for stack in one.stacks})
    if found is None:
        raise ParedError(
            f"structures experts: the configuration of {type(model).__name__} has no number of experts that could be a "
            "smaller one; take ranks or widths"
        )
    return found
