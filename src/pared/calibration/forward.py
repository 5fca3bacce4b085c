"""One block over all batches: what it outputs, and statistics of what its sites read and output on the way."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from pared.calibration.activations import BlockInputs, drop_padding
from pared.calibration.early_exit import Enough, LastRead
from pared.calibration.experts import ExpertTap
from pared.calibration.spool import HiddenStates
from pared.calibration.statistics import CROSS, Shapes, Statistic, StatisticView, accumulators
from pared.calibration.statistics.experts import EXPERTS, ExpertLoss
from pared.errors import ParedError
from pared.structure.linear import bias_of, weight_of
from pared.structure.mixture import Placed
from pared.structure.model import Anatomy, Site
from pared.structure.probe import hooks
from pared.structure.state import KeptState, copy_block

BySite = Mapping[str, Mapping[str, Statistic]]


@dataclass(frozen=True)
class BlockStatistics:
    """What is known of one block after it has run over all batches.

    Attributes:
        index: of the block.
        statistics: ``statistics[site name][statistic name]``; sites that read one tensor share one.
        influence: ShortGPT's Block Influence, 1 - the mean cosine of what the block reads and outputs, if asked for;
            the mean over its runs.
        source: of saved ones what they were collected of, by name; empty for what was not saved.
    """

    index: int
    statistics: Mapping[str, Mapping[str, StatisticView]]
    influence: float | None = None
    source: Mapping[str, Any] = field(default_factory=dict)

    def take(self, site: str) -> Mapping[str, StatisticView]:
        """Return the statistics of a site, and hold them no longer, so that each goes when it was used."""
        held = self.statistics
        return held.pop(site, {}) if isinstance(held, dict) else held.get(site, {})


@dataclass(frozen=True)
class DenseReference:
    """The dense model, run alongside a compressed one on the same tokens.

    Attributes:
        hidden: what its next block reads, by batch; overwritten.
        block: gives the dense block of an index when its turn comes; it may be the very block that is observed.
    """

    hidden: HiddenStates | list[torch.Tensor]
    block: Callable[[int], nn.Module]


def observe(
    block: nn.Module,
    index: int,
    anatomy: Anatomy,
    inputs: BlockInputs,
    needs: Callable[[Shapes], frozenset[str]],
    *,
    reference: DenseReference | None = None,
    influence: bool = False,
    early_exit: bool = False,
    on_batch: Callable[[], None] = lambda: None,
) -> BlockStatistics:
    """Run one block over all batches and collect statistics of what its sites read and output.

    A block that runs several times in a pass does so here, and its statistics are over all runs together. Whatever it
    keeps between calls is put back before every one. Memory: one block in the computing dtype, its inputs, and its
    statistics; with a reference, the dense block too.

    Args:
        block: in any dtype; a copy in that of the inputs runs if it is another.
        index: of the block.
        anatomy: after the probe pass.
        inputs: what the block reads; afterwards what it outputs, unless it was left early.
        needs: names of the statistics to collect, from the shapes ``(out, in)`` of the sites that read one tensor.
        reference: the dense model, if it runs alongside; every site then has the statistic ``cross`` too, of what it
            reads on both paths.
        influence: measure how much the block changes the hidden states.
        early_exit: leave the block as soon as the last site has read; what the block would output is then not known.
        on_batch: called after every batch.

    Raises:
        ParedError: an activation is NaN or infinite; names the site.
    """
    worker = cast_block(block, inputs.dtype, inputs.device)
    pair = frozenset() if reference is None else frozenset({CROSS})
    statistics = accumulators(anatomy.sites_of(index), lambda shapes: needs(shapes) | pair, inputs.device)
    running = _BatchState(reference)
    if early_exit and not influence:
        running.last = LastRead(sum(_is_collected(s, statistics.get(s.name, {})) for s in anatomy.sites_of(index)))
    if reference is not None:
        running.beside = copy_block(reference.block(index)).to(device=inputs.device, dtype=inputs.dtype)
    mixtures = anatomy.mixtures_of(index)
    of_experts = {one.name: ExpertLoss(one.experts, inputs.device) for one in mixtures}
    placed = (Placed(one, worker, anatomy.block_name(index)) for one in mixtures)
    experts = [ExpertTap(one, of_experts[one.mixture.name], draws=0) for one in placed]

    def end_of_batch() -> None:
        for tap in experts:
            tap.finish(running.mask_BT)
        on_batch()

    with (
        hooks(_tap(worker, anatomy, index, statistics, running)),
        hooks(hook for tap in experts for hook in tap.hooked()),
    ):
        cosines = _run_block(worker, index, inputs, running, end_of_batch, influence)
    _require_finite(anatomy, index, statistics, running)
    statistics |= {name: {EXPERTS: one} for name, one in of_experts.items()}
    return BlockStatistics(index, statistics, 1 - sum(cosines) / len(cosines) if cosines else None)


def propagate(block: nn.Module, index: int, anatomy: Anatomy, inputs: BlockInputs) -> None:
    """Let one block run over all batches: ``inputs`` are what it reads before, what it outputs afterwards.

    Raises:
        ParedError: what it outputs is NaN or infinite; names the block.
    """
    running = _BatchState()
    _run_block(cast_block(block, inputs.dtype, inputs.device), index, inputs, running)
    _require_finite(anatomy, index, {}, running)


def propagate_reference(index: int, inputs: BlockInputs, reference: DenseReference) -> None:
    """Let the dense block of an index run over all batches, alone: the hidden states of the reference are its own."""
    beside = copy_block(reference.block(index)).to(device=inputs.device, dtype=inputs.dtype)
    _run_block(beside, index, replace(inputs, hidden=reference.hidden), _BatchState())  # type: ignore[arg-type]


@dataclass
class _BatchState:
    """The batch that runs.

    Attributes:
        path: the dense path, if there is one.
        last: ends the batch at the last read, where nothing of what the block outputs is used.
        beside: its block.
        mask_BT: which tokens of the batch are no padding; none if all are.
        shape: of the batch, ``(windows, tokens)``.
        reads: what the sites of the dense block have read of this batch, by the site that reads first.
        finite: whether all that was output so far is finite.
    """

    path: DenseReference | None = None
    last: "LastRead | None" = None
    beside: nn.Module | None = None
    mask_BT: torch.Tensor | None = None
    shape: tuple[int, ...] = ()
    reads: dict[str, torch.Tensor] = field(default_factory=dict)
    finite: bool = True


@torch.no_grad()
def _run_block(
    worker: nn.Module,
    index: int,
    inputs: BlockInputs,
    running: _BatchState,
    on_batch: Callable[[], None] = lambda: None,
    influence: bool = False,
) -> list[float]:
    """Run a block over every batch; return the mean cosine of what each run reads and outputs, if asked for."""
    cosines: list[float] = []
    state = KeptState([worker] if running.beside is None else [worker, running.beside])
    for number in range(len(inputs.calls)):
        running.mask_BT = mask_BT = inputs.mask(number)
        hidden = read = inputs.hidden[number]  # which may lie on the disk
        running.shape = tuple(hidden.shape[:2])
        for call in inputs.calls_of(number, index):
            if running.path is not None and running.beside is not None:
                running.reads.clear()
                running.path.hidden[number] = call.run(running.beside, running.path.hidden[number])
            before = hidden.clone() if influence else None  # a block may change its input in place
            with suppress(Enough):
                hidden = call.run(worker, hidden)
                running.finite = running.finite and is_finite_hidden(hidden)
            state.restore()
            if before is not None:
                cosine_BT = functional.cosine_similarity(before.float(), hidden.float(), dim=-1)
                cosines.append(float((cosine_BT if mask_BT is None else cosine_BT[mask_BT]).mean()))
        if hidden is not read:
            inputs.hidden[number] = hidden
        if running.last is not None:
            running.last.known = True
        on_batch()
    return cosines


def cast_block(block: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Return the block itself if it already computes in this dtype and place, else a copy that does."""
    if all(p.dtype == dtype and p.device == device for p in block.parameters()):
        return block
    return copy_block(block).to(device=device, dtype=dtype)


def _tap(worker: nn.Module, anatomy: Anatomy, index: int, statistics: BySite, running: _BatchState) -> Iterator[Any]:
    """Hook the outputs of every site, and the input of one site of every group that reads the same tensor."""
    for site in anatomy.sites_of(index):
        path = anatomy.path_in_block(site)
        own = statistics.get(site.name, {})
        for statistic in own.values():
            module = worker.get_submodule(path)
            if statistic.of == "input_pair":
                if site.reads == site.name and running.beside is not None:
                    flat = not _may_be_routed(anatomy, site)
                    beside = running.beside.get_submodule(path)
                    yield beside.register_forward_pre_hook(_dense_hook(running, site.name, flat))
                    yield module.register_forward_pre_hook(_cross_hook(statistic, running, site.name, flat))
            elif statistic.of == "output":
                yield module.register_forward_hook(_output_hook(statistic, running, site.name))
            elif site.reads == site.name:
                yield module.register_forward_pre_hook(_input_hook(statistic, running, site.name))
        if running.last is not None and _is_collected(site, own):
            yield _tap_last(worker.get_submodule(path), site, own, running, running.last)


def _of_output(own: Mapping[str, Statistic]) -> bool:
    return any(statistic.of == "output" for statistic in own.values())


def _is_collected(site: Site, own: Mapping[str, Statistic]) -> bool:
    """Whether anything is collected at a call of this site itself."""
    return bool(own) and (_of_output(own) or site.reads == site.name)


def _tap_last(module: nn.Module, site: Site, own: Mapping[str, Statistic], running: _BatchState, last: LastRead) -> Any:
    """Hook the moment when everything of a site's call is collected."""

    def hook(_: nn.Module, args: tuple[torch.Tensor, ...], *__: Any) -> None:
        last.collected(site.name, _of_the_batch(args[0], running, flat=True))

    return module.register_forward_hook(hook) if _of_output(own) else module.register_forward_pre_hook(hook)


def _may_be_routed(anatomy: Anatomy, site: Site) -> bool:
    """Whether a site may be one of several experts, which are sent their tokens in any order."""
    alike = [layer for layer in anatomy.layers if layer.block == site.block and layer.role == site.role]
    return len(alike) > 1 or any(part.isdigit() for part in anatomy.path_in_block(site).split("."))


def _input_hook(statistic: Statistic, running: _BatchState, site: str) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        statistic.update(drop_padding(args[0], running.mask_BT, site))

    return hook


def _dense_hook(running: _BatchState, site: str, flat: bool) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if _of_the_batch(args[0], running, flat):
            running.reads[site] = drop_padding(args[0], running.mask_BT, site)

    return hook


def _cross_hook(statistic: Statistic, running: _BatchState, site: str, flat: bool) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if _of_the_batch(args[0], running, flat) and site in running.reads:
            statistic.update(running.reads.pop(site), drop_padding(args[0], running.mask_BT, site))

    return hook


def _of_the_batch(x: torch.Tensor, running: _BatchState, flat: bool) -> bool:
    """Whether a site reads one row for every token of the batch, in its order; ``flat``, if the rows may be flat."""
    shape = tuple(x.shape[:-1])
    return shape == running.shape or (flat and shape == (math.prod(running.shape),))


def _output_hook(statistic: Statistic, running: _BatchState, site: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        # Taking a large bias off a rounded output would leave little but the rounding: multiply again without it.
        seen = output if bias_of(module) is None else args[0] @ weight_of(module).T
        statistic.update(drop_padding(seen, running.mask_BT, site))

    return hook


def _require_finite(anatomy: Anatomy, index: int, statistics: BySite, running: _BatchState) -> None:
    for site in anatomy.sites_of(index):
        for statistic in statistics.get(site.name, {}).values():
            if not statistic.finite():
                what = "outputs" if statistic.of == "output" else "reads"
                raise ParedError(
                    f"site {site.name} {what} NaN or infinity; check the weights before it, or calibrate in float32"
                )
    require_finite_hidden(anatomy, index, running.finite)


def is_finite_hidden(hidden: torch.Tensor) -> bool:
    """Whether hidden states hold finite numbers alone."""
    return bool(hidden.sum(dtype=torch.float32).isfinite())


def require_finite_hidden(anatomy: Anatomy, index: int, finite: bool) -> None:
    """Raise a ParedError that names the block if the hidden states it outputs are not finite."""
    if not finite:
        raise ParedError(
            f"block {anatomy.block_name(index)} outputs NaN or infinity; check its weights, or calibrate in float32"
        )
