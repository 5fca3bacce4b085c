"""The pass: blocks one after the other on captured inputs, statistics handed on as each block is done."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pared.anatomy.probe import hooks
from pared.anatomy.structure import Anatomy
from pared.calibration.capture import BlockInputs
from pared.calibration.statistics import STATISTICS, Statistic
from pared.errors import ParedError

StatisticsOfSite = dict[str, Statistic]


@dataclass(frozen=True)
class WalkedBlock:
    """One block after its pass: ``statistics[site name][statistic name]``; sites that read one tensor share one."""

    index: int
    statistics: dict[str, StatisticsOfSite]


def walk(
    blocks: list[nn.Module],
    anatomy: Anatomy,
    inputs: BlockInputs,
    needs: frozenset[str],
    dtype: torch.dtype,
    device: torch.device,
    on_batch: Callable[[], None] = lambda: None,
) -> Iterator[WalkedBlock]:
    """Run every block once over all batches and yield its statistics before the next block starts.

    The caller may replace or free a block as soon as it is yielded. Memory: one block in the computing dtype, its
    inputs, and its statistics.

    Args:
        blocks: the blocks, in order.
        anatomy: after the probe pass.
        inputs: captured inputs; overwritten.
        needs: names of the statistics to collect.
        dtype: what the blocks compute in.
        device: where.
        on_batch: called after every batch of every block.

    Raises:
        ParedError: an activation is NaN or infinite; names the site.
    """
    for index, block in enumerate(blocks):
        worker = _worker(block, dtype, device)
        statistics = _accumulators(anatomy, index, needs, device)
        with hooks(_tap(worker, anatomy, index, statistics)):
            _run_block(worker, index, inputs, on_batch)
        _require_finite(anatomy, index, statistics, inputs)
        yield WalkedBlock(
            index, {site.name: statistics[site.reads] for site in anatomy.sites_of(index) if not site.idle}
        )


@torch.no_grad()
def _run_block(worker: nn.Module, index: int, inputs: BlockInputs, on_batch: Callable[[], None]) -> None:
    for number, calls in enumerate(inputs.calls):
        inputs.hidden[number] = calls[index].run(worker, inputs.hidden[number])
        on_batch()


def _worker(block: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Return the block itself if it already computes in this dtype and place, else a copy that does."""
    if all(p.dtype == dtype and p.device == device for p in block.parameters()):
        return block
    return copy.deepcopy(block).to(device=device, dtype=dtype)


def _accumulators(
    anatomy: Anatomy, index: int, needs: frozenset[str], device: torch.device
) -> dict[str, StatisticsOfSite]:
    groups = {site.reads: site.in_features for site in anatomy.sites_of(index) if not site.idle}
    return {
        reads: {name: STATISTICS[name](features, device) for name in sorted(needs)}
        for reads, features in groups.items()
    }


def _tap(worker: nn.Module, anatomy: Anatomy, index: int, statistics: dict[str, StatisticsOfSite]) -> Iterator[Any]:
    """Hook one site of every group that reads the same tensor."""
    for site in anatomy.sites_of(index):
        if site.name in statistics:

            def hook(_: nn.Module, args: tuple[Any, ...], reads: str = site.name) -> None:
                for accumulator in statistics[reads].values():
                    accumulator.update(args[0])

            yield worker.get_submodule(anatomy.path_in_block(site)).register_forward_pre_hook(hook)


def _require_finite(anatomy: Anatomy, index: int, statistics: dict[str, StatisticsOfSite], inputs: BlockInputs) -> None:
    for site in anatomy.sites_of(index):
        if not all(accumulator.finite() for accumulator in statistics.get(site.name, {}).values()):
            raise ParedError(
                f"site {site.name} reads NaN or infinity; check the weights before it, or calibrate in float32"
            )
    if not all(bool(hidden.isfinite().all()) for hidden in inputs.hidden):
        raise ParedError(
            f"block {anatomy.block_name(index)} puts out NaN or infinity; check its weights, or calibrate in float32"
        )
