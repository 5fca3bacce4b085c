"""What the bases of a weight are: its singular vectors, as in Basel, or the directions of its outputs (ours).

Singular vectors order what a weight can output; the directions of its outputs, those of ``W G^½`` as in SVD-LLM, what
it does output on the data, so that the bases that are dropped first are those the task uses least.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from pared.calibration import BlockStatistics, capture
from pared.engine.blocks import run_blocks
from pared.lowrank import whitening
from pared.structure import find_anatomy, probe, weight_of
from pared.structure.store import ResidentBlocks
from pared.training.dataset import collate
from pared.training.method import Context

ROWS, BATCH = 128, 8  # of the training data that outputs are seen on, and at a time


class Bases(NamedTuple):
    """``W = U diag(c) V``, float64: ``U (out, R)``, what each is worth ``c (R,)``, falling, and ``V (R, in)``."""

    U_OR: torch.Tensor
    c_R: torch.Tensor
    V_RN: torch.Tensor

    @property
    def any(self) -> bool:
        """Whether one is worth anything in float32, which coefficients are held in; of a zero weight none is."""
        return float(self.c_R.sum()) > torch.finfo(torch.float32).tiny


def bases_of_weight(weight_ON: torch.Tensor) -> Bases:
    """Return singular vectors and values."""
    return Bases(*torch.linalg.svd(weight_ON.detach().double(), full_matrices=False))


def bases_of_outputs(weight_ON: torch.Tensor, gram_NN: torch.Tensor) -> Bases:
    """Return the directions of outputs, and what each holds of their energy.

    Args:
        weight_ON: the weight ``(out, in)``.
        gram_NN: of its inputs, ``Σ xᵀx`` ``(in, in)``, any scale.

    Returns:
        With U orthonormal and ``V = diag(1/c) Uᵀ W``; c is scaled to the mean of the singular values, so that it learns
        as fast.
    """
    found = whitening.decompose(weight_ON.detach(), gram_NN)
    count = min(weight_ON.shape)
    c_R = found.singular_values_R[:count].clamp(min=0)
    factors = found.factors(count)
    c_R = c_R * (torch.linalg.svdvals(weight_ON.detach().double()).mean() / c_R.mean())
    return Bases(factors.up, c_R, factors.down / c_R.clamp(min=1e-12)[:, None])


def decomposed(context: Context, names: Sequence[str], kind: str, visit: Callable[[str, Bases], None]) -> None:
    """Visit every layer with its bases, block after block; a visit may replace the layer.

    Args:
        context: of the stage; its model is dense.
        names: of the layers.
        kind: one of ``options.BASES``.
        visit: is given the name of a layer, and its bases.

    Raises:
        ParedError: an activation is NaN or infinite.
    """
    model = context.model
    if kind == "weight":
        for name in names:
            visit(name, bases_of_weight(weight_of(model.get_submodule(name))))
        return
    anatomy, calls = probe(model, find_anatomy(model))
    train = context.examples.train
    rows = collate(train[:: max(1, len(train) // ROWS)][:ROWS])
    beside = {name: value for name, value in rows.items() if name in ("attention_mask", "token_type_ids")}
    inputs = capture(model, anatomy, rows["input_ids"], BATCH, calls, context.precision, context.device, beside)
    wanted = set(names)

    def visit_block(block: BlockStatistics) -> None:
        for name in (site.name for site in anatomy.sites_of(block.index) if site.name in wanted):
            weight_ON, gram = weight_of(model.get_submodule(name)), block.statistics.get(name, {}).get("gram")
            seen = gram is not None and gram.tokens
            visit(name, bases_of_outputs(weight_ON, gram.value) if gram and seen else bases_of_weight(weight_ON))

    run_blocks(ResidentBlocks(model, anatomy), anatomy, inputs, lambda _: frozenset({"gram"}), visit_block)
