"""The backward pass, piece by piece: blocks forward, the head, and blocks back, with one block's graph at a time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pared.calibration.activations import BlockInputs, drop_padding
from pared.calibration.experts import ExpertTap
from pared.calibration.forward import cast_block, is_finite_hidden, require_finite_hidden
from pared.calibration.head import through_head
from pared.calibration.labels import Labels
from pared.calibration.spool import HiddenStates
from pared.calibration.statistics import Statistic
from pared.calibration.statistics.experts import EXPERTS, ExpertLoss
from pared.errors import ParedError
from pared.structure.mixture import Placed
from pared.structure.model import Anatomy, Site
from pared.structure.probe import BlockCall, evaluating, hooks
from pared.structure.state import KeptState

Wants = Mapping[str, Mapping[str, Statistic]]


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Ask for no gradient of a weight and for no dropout; put every flag back afterwards."""
    asked = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.requires_grad_(False)
        with evaluating(model):
            yield
    finally:
        for parameter, requires_grad in asked:
            parameter.requires_grad_(requires_grad)


@dataclass
class Trail:
    """What the runs of the blocks read in some batches, on the way back from the last to the first.

    Attributes:
        inputs: of the batches; the calls of their blocks.
        reads: what every run of a block reads, by run and by batch; a block that runs several times has as many runs.
        gradients: of the loss with respect to what the last run that is left outputs, by batch: those of every draw
            of labels, one after the other, ``(draws · windows, tokens, width)``.
    """

    inputs: BlockInputs
    reads: list[HiddenStates] = field(default_factory=list)
    gradients: HiddenStates = field(default_factory=HiddenStates)

    def __post_init__(self) -> None:
        self.gradients = HiddenStates(memory=self.inputs.hidden.memory)

    def runs_of(self, index: int) -> list[int]:
        """Return the numbers of a block's runs, in order."""
        calls = self.inputs.calls[0] if self.inputs.calls else []  # none, where other processes have all batches
        return [run for run, call in enumerate(calls) if call.block == index]


@torch.no_grad()
def record(block: nn.Module, index: int, anatomy: Anatomy, trail: Trail) -> None:
    """Let one block run over all batches of a trail, and keep what each of its runs reads.

    Args:
        block: in any dtype.
        index: of the block.
        anatomy: after the probe pass.
        trail: ``inputs.hidden`` is what the block reads before, what it outputs afterwards.

    Raises:
        ParedError: what it outputs is NaN or infinite; names the block.
    """
    inputs = trail.inputs
    worker = cast_block(block, inputs.dtype, inputs.device)
    state = KeptState([worker])
    for run in trail.runs_of(index):
        trail.reads.append(HiddenStates(memory=inputs.hidden.memory))
        for batch, calls in enumerate(inputs.calls):
            trail.reads[run].append_from(inputs.hidden, batch)
            # A block may change its input in place.
            hidden = calls[run].run(worker, inputs.hidden[batch].clone())
            state.restore()
            require_finite_hidden(anatomy, index, is_finite_hidden(hidden))
            inputs.hidden[batch] = hidden


def from_head(
    model: PreTrainedModel,
    anatomy: Anatomy,
    trail: Trail,
    tokens: torch.Tensor,
    first_window: int,
    labels: Sequence[Labels],
    clip: float = 0.0,
) -> None:
    """Begin the way back: the gradient of the summed loss with respect to what the last block outputs.

    Args:
        model: whose head and loss these are.
        anatomy: of it.
        trail: after the last block ran forward; it is given its ``gradients``.
        tokens: the windows of its batches ``(windows, length)``.
        first_window: number of the first of them, on which sampled labels depend.
        labels: where the labels come from, of every draw.
        clip: as for :func:`pared.calibration.head.clipped`.

    Raises:
        ParedError: the model has no head that predicts classes, or the labels do not fit.
    """
    inputs, window = trail.inputs, first_window
    parts = torch.split(tokens, [shape[0] for shape in inputs.hidden.shapes])
    for batch, part in enumerate(parts):
        calls, beside, hidden = inputs.calls[batch], inputs.beside[batch], inputs.hidden[batch]
        trail.gradients.append(through_head(model, anatomy, calls, hidden, part, beside, window, labels, clip))
        window += len(part)


def back(
    block: nn.Module,
    index: int,
    anatomy: Anatomy,
    trail: Trail,
    wants: Wants,
    on_batch: Callable[[], None] = lambda: None,
) -> None:
    """Send the gradients of a trail back through one block, and update the statistics of its sites on the way.

    Args:
        block: in any dtype.
        index: of the block.
        anatomy: after the probe pass.
        trail: its last run is the last of this block; its gradients become those of what the block reads.
        wants: accumulators by the name of a site, or of a mixture of experts, and statistic name, updated in place. One
            that no token of a batch reached (an expert) keeps its count.
        on_batch: called after every batch.

    Raises:
        ParedError: a gradient is NaN or infinite (names the site), or examples cannot be told apart where a statistic
            needs that.
    """
    inputs = trail.inputs
    worker = cast_block(block, inputs.dtype, inputs.device)
    state, runs = KeptState([worker]), trail.runs_of(index)
    for batch in range(len(inputs.calls)):
        seen = [(inputs.calls[batch][run], trail.reads[run][batch]) for run in reversed(runs)]
        trail.gradients[batch] = _back(
            worker, anatomy, index, seen, trail.gradients[batch], wants, inputs.mask(batch), state
        )
        on_batch()
    if runs:
        del trail.reads[runs[0] :]


def _back(
    worker: nn.Module,
    anatomy: Anatomy,
    index: int,
    runs: list[tuple[BlockCall, torch.Tensor]],
    gradient: torch.Tensor,
    wants: Wants,
    mask: torch.Tensor | None,
    state: KeptState,
) -> torch.Tensor:
    """Recompute the runs of a block, the last one first, and send gradients of its output back to its input.

    The statistics of the sites are updated on the way. Of several draws of labels every run is recomputed once.
    """
    shape = runs[0][1].shape
    draws = torch.split(gradient, shape[0])
    taps = [
        _GradientHook(site, wants[site.name], shape, mask, len(draws))
        for site in anatomy.sites_of(index)
        if site.name in wants
    ]
    experts = [
        ExpertTap(Placed(one, worker, anatomy.block_name(index)), statistic, len(draws))
        for one in anatomy.mixtures_of(index)
        if isinstance(statistic := wants.get(one.name, {}).get(EXPERTS), ExpertLoss)
    ]
    for call, hidden in runs:
        leaf = hidden.detach().requires_grad_()
        with torch.enable_grad(), hooks(_hooked(worker, anatomy, taps, experts)):
            output = call.run(worker, leaf.clone())  # a leaf must not be changed in place
            draws = tuple(
                torch.autograd.grad(output, leaf, one, retain_graph=number < len(draws) - 1)[0]
                for number, one in enumerate(draws)
            )
        state.restore()
    for tap in reversed(taps):  # the one nearest to the loss is where it began
        tap.finish()
    for mixture in experts:
        mixture.finish(mask)
    return torch.cat(draws) if len(draws) > 1 else draws[0]


def _hooked(
    worker: nn.Module, anatomy: Anatomy, taps: list["_GradientHook"], experts: list[ExpertTap]
) -> Iterator[Any]:
    for tap in taps:
        yield worker.get_submodule(anatomy.path_in_block(tap.site)).register_forward_hook(tap.read)
    for mixture in experts:
        yield from mixture.hooked()


class _GradientHook:
    """Hands the accumulators of one site what it reads and the gradient of what it outputs."""

    def __init__(
        self,
        site: Site,
        wanted: Mapping[str, Statistic],
        shape: torch.Size,
        mask_BT: torch.Tensor | None,
        draws: int,
    ) -> None:
        self.site, self.mask_BT, self.draws = site, mask_BT, draws
        # What is collected of an input is shared by the sites that read it; only the first of them updates it.
        first = site.reads == site.name
        self.statistics = [statistic for statistic in wanted.values() if first or statistic.of != "input"]
        self.by_example = any(statistic.by_example for statistic in self.statistics)
        self.examples, self.length = shape[:2]
        self.calls: list[tuple[torch.Tensor, torch.Tensor]] = []  # kept until all are there, where examples are told

    def read(self, _: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        """Keep what the site reads until the gradient of its output comes by; a forward hook."""
        x = args[0].detach()
        version = x._version
        examples = self._examples(x.numel() // x.shape[-1])
        drawn: list[torch.Tensor] = []  # what labels of every draw make of the output

        def receive(g: torch.Tensor) -> None:
            if x._version != version:
                raise ParedError(f"site {self.site.name}: its input is changed in place after it was read")
            drawn.append(g.detach())
            if len(drawn) < self.draws:
                return
            x_BTN = x.reshape(examples, -1, x.shape[-1])
            together = drawn[0] if self.draws == 1 else torch.cat([one.reshape(-1, one.shape[-1]) for one in drawn], -1)
            g_BTO = together.reshape(examples, -1, together.shape[-1])  # draws side by side
            self._update(x_BTN, g_BTO, self.mask_BT, by_example=False)
            if self.by_example:
                self.calls.append((x_BTN, g_BTO))

        if output.requires_grad:
            output.register_hook(receive)  # type: ignore[no-untyped-call]

    def _update(self, x_BTN: torch.Tensor, g_BTO: torch.Tensor, mask_BT: torch.Tensor | None, by_example: bool) -> None:
        """Pass on what is no padding: example by example where they are told apart, else as one."""
        statistics = [statistic for statistic in self.statistics if statistic.by_example == by_example]
        if mask_BT is None or not statistics:
            for statistic in statistics:
                statistic.update(x_BTN, g_BTO)
            return
        x_1RN, g_1RO = (drop_padding(tensor, mask_BT, self.site.name) for tensor in (x_BTN, g_BTO))
        lengths = mask_BT.sum(dim=1).tolist()
        parts = lengths if by_example else [sum(lengths)]
        for x, g in zip(torch.split(x_1RN, parts, 1), torch.split(g_1RO, parts, 1), strict=True):
            for statistic in statistics:
                statistic.update(x, g)

    def _examples(self, rows: int) -> int:
        """Return the examples that rows, which may be flattened, belong to; 1 if some are missing (routed tokens)."""
        if rows == self.examples * self.length:
            return self.examples
        if self.by_example and self.examples > 1:
            raise ParedError(
                f"site {self.site.name} reads {rows} rows of {self.examples} windows of {self.length} tokens, so its "
                "examples cannot be told apart; use a calibration batch of 1"
            )
        return 1

    def finish(self) -> None:
        """Pass on what was kept: of one example all calls together, whose gradients add up.

        Raises:
            ParedError: a gradient, or an input, was NaN or infinite.
        """
        if self.calls:
            x_BTN, g_BTO = (torch.cat(tensors, dim=1) for tensors in zip(*self.calls, strict=True))
            mask_BT = None if self.mask_BT is None else self.mask_BT.repeat(1, len(self.calls))
            self._update(x_BTN, g_BTO, mask_BT, by_example=True)
        if not all(statistic.finite() for statistic in self.statistics):
            raise ParedError(
                f"site {self.site.name}: its input or the gradient of its output is NaN or infinite; check the weights "
                "around it, or calibrate in float32"
            )
