"""Passes over the blocks of a model, as tests want them: what was visited as a list."""

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from pared.calibration import BlockInputs, BlockStatistics, DenseReference, Labels, Wants
from pared.engine.allocate import plan_from_shapes
from pared.engine.blocks import Needs, run_blocks, run_blocks_backward
from pared.engine.spec import resolve
from pared.schema.plan import Plan
from pared.schema.recipe import Recipe
from pared.structure import Anatomy
from pared.structure.store import ResidentBlocks

# Options of `loss-optimal`: its statistics as they are, of which identities are.
UNSHRUNK = {"input_shrinkage": 0, "output_shrinkage": 0}


def walk(
    model: PreTrainedModel,
    anatomy: Anatomy,
    inputs: BlockInputs,
    needs: Needs,
    on_batch: Callable[[], None] = lambda: None,
    *,
    visit: Callable[[BlockStatistics], None] = lambda _: None,
    influence: bool = False,
    sequential: bool = False,
    dense: DenseReference | None = None,
) -> list[BlockStatistics]:
    """Run every block over all batches; return what was known of each when it was visited."""
    found: list[BlockStatistics] = []

    def keep(block: BlockStatistics) -> None:
        found.append(block)
        visit(block)

    run_blocks(
        ResidentBlocks(model, anatomy),
        anatomy,
        inputs,
        needs,
        keep,
        hand_on="compressed" if sequential else "dense",
        reference=dense,
        influence=influence,
        on_batch=on_batch,
    )
    return found


def backward(
    model: PreTrainedModel,
    anatomy: Anatomy,
    inputs: BlockInputs,
    tokens: torch.Tensor,
    wants: Wants,
    labels: Labels | Sequence[Labels],
    on_batch: Callable[[], None] = lambda: None,
    batches: int | None = None,
    clip: float = 0.0,
) -> None:
    """Fill accumulators of the whole model, by site name and statistic name."""

    def of_block(index: int) -> Wants:
        return {site.name: wants[site.name] for site in anatomy.sites_of(index) if site.name in wants}

    store, every = ResidentBlocks(model, anatomy), labels if isinstance(labels, Sequence) else [labels]
    run_blocks_backward(
        store, anatomy, inputs, tokens, every, of_block, lambda _: None, clip=clip, batches=batches, on_batch=on_batch
    )


def plan_of(model: PreTrainedModel, recipe: Recipe, bytes_per_parameter: int | None = None) -> Plan:
    """Return what a recipe decides from shapes alone."""
    return plan_from_shapes(model, resolve(recipe), bytes_per_parameter)
