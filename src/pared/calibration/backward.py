"""The backward pass: the gradient of a loss at every site, with the graph of one block alive at a time."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pared.calibration.activations import BlockInputs, real_rows, replaced_forwards
from pared.calibration.forward import require_finite_hidden, worker_of
from pared.calibration.gradient_statistics import GradientStatistic, OfInput
from pared.calibration.labels import Labels, logit_gradient
from pared.errors import ParedError
from pared.structure.model import Anatomy, Site
from pared.structure.probe import BlockCall, call_model, evaluating, hooks
from pared.structure.state import KeptState

Wants = Mapping[str, Mapping[str, GradientStatistic]]


def backward(
    model: PreTrainedModel,
    anatomy: Anatomy,
    inputs: BlockInputs,
    tokens: torch.Tensor,
    wants: Wants,
    labels: Labels,
    on_batch: Callable[[], None] = lambda: None,
) -> None:
    """Fill accumulators with the gradient of the summed loss at the outputs of the sites.

    Every batch goes forward through the blocks, which leaves the input of each; through the model's own code around
    them, window by window, for the loss; and back, block by block, each recomputed from its input. Weights are given
    no gradient. A block that runs several times in a pass is gone back through as often; its statistics are over all
    runs together, and the gradient of an example is the sum over them, as that of a shared weight is. Memory: the
    blocks in the computing dtype if the model is stored in another, the inputs of all blocks for one batch, the graph
    of one block, the logits of one window.

    Args:
        model: unchanged afterwards, also its ``requires_grad`` and ``training`` flags.
        anatomy: after the probe pass.
        inputs: captured inputs of ``tokens``; not changed, so this goes before a walk, which overwrites them. Tokens
            that their attention mask leaves out are in no statistic and have no label.
        tokens: the windows ``(windows, length)``.
        wants: accumulators by site name and statistic name, updated in place. One that no token of a batch reached
            (an expert) keeps its count.
        labels: where the labels come from.
        on_batch: called after every block of every batch went back.

    Raises:
        ParedError: a gradient is NaN or infinite (names the site), the model has no head that predicts classes, the
            labels do not fit, or examples cannot be told apart where a statistic needs that.
    """
    if unknown := sorted(wants.keys() - {site.name for site in anatomy.sites}):
        raise ParedError(f"gradients are wanted of {unknown[0]}, which is not a site of {type(model).__name__}")
    window = 0
    with _frozen(model):
        workers = [worker_of(block, inputs.dtype, inputs.device) for block in anatomy.blocks(model)]
        states = [KeptState([worker]) for worker in workers]
        parts = torch.split(tokens, [len(hidden) for hidden in inputs.hidden])
        for batch, (hidden, calls, part) in enumerate(zip(inputs.hidden, inputs.calls, parts, strict=True)):
            trail = _forward(workers, anatomy, calls, hidden, states)
            more, mask = inputs.beside[batch], inputs.mask(batch)
            gradient = _through_head(model, anatomy, calls, trail.pop(), part, more, window, labels)
            for index in reversed(range(len(workers))):
                runs = [(call, trail.pop()) for call in reversed(inputs.calls_of(batch, index))]
                gradient = _back(workers[index], anatomy, index, runs, gradient, wants, mask, states[index])
                on_batch()
            window += len(part)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Ask for no gradient of a weight and for no dropout; put every flag back afterwards."""
    asked = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.requires_grad_(False)
        with evaluating(model):
            yield
    finally:
        for parameter, requires_grad in asked:
            parameter.requires_grad_(requires_grad)


@torch.no_grad()
def _forward(
    workers: list[nn.Module], anatomy: Anatomy, calls: list[BlockCall], hidden: torch.Tensor, states: list[KeptState]
) -> list[torch.Tensor]:
    """Return what every run of a block reads, and what the last one puts out."""
    trail = [hidden]
    for call in calls:
        trail.append(call.run(workers[call.block], trail[-1].clone()))  # a block may change its input in place
        states[call.block].restore()
        require_finite_hidden(anatomy, call.block, trail[-1])
    return trail


def _through_head(
    model: PreTrainedModel,
    anatomy: Anatomy,
    calls: list[BlockCall],
    hidden_BTH: torch.Tensor,
    tokens_BT: torch.Tensor,
    beside: Mapping[str, torch.Tensor],
    window: int,
    labels: Labels,
) -> torch.Tensor:
    """Return the gradient of the loss with respect to the last block's output, one window at a time."""
    blocks = anatomy.blocks(model)
    leaf, ran = hidden_BTH[:0], 0

    def stub(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal ran
            ran += 1
            own = BlockCall.seen(args, kwargs, anatomy.block_name(index), index).hidden
            return calls[ran - 1].answer(leaf.to(own) if ran == len(calls) else own)

        return forward

    gradients: list[torch.Tensor] = []
    with torch.enable_grad(), replaced_forwards(blocks, stub):
        for offset, tokens_T in enumerate(tokens_BT):
            leaf, ran = hidden_BTH[offset : offset + 1].detach().requires_grad_(), 0
            more = {name: tensor[offset : offset + 1] for name, tensor in beside.items()}
            logits = getattr(call_model(model, tokens_T.unsqueeze(0), more), "logits", None)
            if logits is None:
                raise ParedError(
                    f"{type(model).__name__} puts out no logits, and gradients need a language-model or "
                    "classification head; take a method that needs none: svd-llm, basis-sharing, wanda"
                )
            mask = more.get("attention_mask")
            gradient = logit_gradient(
                logits, window + offset, tokens_T, labels, None if mask is None else mask[0].bool()
            )
            gradients += torch.autograd.grad(logits, leaf, gradient)
    return torch.cat(gradients)


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
    """Recompute the runs of a block, the last one first, and send a gradient of its output back to its input.

    The sites are told on the way.
    """
    shape = runs[0][1].shape
    taps = [_Tap(site, wants[site.name], shape, mask) for site in anatomy.sites_of(index) if site.name in wants]
    for call, hidden in runs:
        leaf = hidden.detach().requires_grad_()
        with torch.enable_grad(), hooks(_hooked(worker, anatomy, taps)):
            output = call.run(worker, leaf.clone())  # a leaf must not be changed in place
            (gradient,) = torch.autograd.grad(output, leaf, gradient)
        state.restore()
    for tap in reversed(taps):  # the one nearest to the loss is where it began
        tap.finish()
    return gradient


def _hooked(worker: nn.Module, anatomy: Anatomy, taps: list["_Tap"]) -> Iterator[Any]:
    for tap in taps:
        yield worker.get_submodule(anatomy.path_in_block(tap.site)).register_forward_hook(tap.read)


class _Tap:
    """Hands the accumulators of one site what it reads and the gradient of what it puts out."""

    def __init__(
        self,
        site: Site,
        wanted: Mapping[str, GradientStatistic],
        shape: torch.Size,
        mask_BT: torch.Tensor | None,
    ) -> None:
        self.site, self.mask_BT = site, mask_BT
        # What is collected of an input is shared by the sites that read it; only the first of them updates it.
        first = site.reads == site.name
        self.statistics = [statistic for statistic in wanted.values() if first or not isinstance(statistic, OfInput)]
        self.by_example = any(statistic.by_example for statistic in self.statistics)
        self.examples, self.length = shape[:2]
        self.calls: list[tuple[torch.Tensor, torch.Tensor]] = []  # kept until all are there, where examples are told

    def read(self, _: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        """Keep what the site reads until the gradient of its output comes by; a forward hook."""
        x = args[0].detach()
        version = x._version
        examples = self._examples(x.numel() // x.shape[-1])

        def receive(g: torch.Tensor) -> None:
            if x._version != version:
                raise ParedError(f"site {self.site.name}: its input is changed in place after it was read")
            x_BTN, g_BTO = (tensor.reshape(examples, -1, tensor.shape[-1]) for tensor in (x, g.detach()))
            self._update(x_BTN, g_BTO, self.mask_BT, by_example=False)
            if self.by_example:
                self.calls.append((x_BTN, g_BTO))

        if output.requires_grad:
            output.register_hook(receive)  # type: ignore[no-untyped-call]

    def _update(self, x_BTN: torch.Tensor, g_BTO: torch.Tensor, mask_BT: torch.Tensor | None, by_example: bool) -> None:
        """Hand on what is no padding: example by example where they are told apart, else as one."""
        statistics = [statistic for statistic in self.statistics if statistic.by_example == by_example]
        if mask_BT is None or not statistics:
            for statistic in statistics:
                statistic.update(x_BTN, g_BTO)
            return
        x_1RN, g_1RO = (real_rows(tensor, mask_BT, self.site.name) for tensor in (x_BTN, g_BTO))
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
        """Hand on what was kept: of one example all calls together, whose gradients add up.

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
