"""What a pruning method makes of a weight once, and every budget is read off: ranked scores, or a factorised Hessian.

Legend of the shape suffixes: O outputs, N inputs; G the weights that compete, along the last dimension; X all others.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from pared.sparsity import masks
from pared.sparsity.masks import Pruned
from pared.sparsity.pattern import NM, Pattern, Unstructured

Rivals = Literal["matrix", "row", "share"]


class PruningSolution(Protocol):
    """A weight that can be pruned to any pattern."""

    def realize(self, pattern: Pattern) -> Pruned:
        """Prune the weight.

        Raises:
            ValueError: the pattern does not fit the weight.
        """
        ...


@dataclass(frozen=True)
class RankedWeights:
    """A weight with a score for each of its entries: the smallest go, what is kept stays bit for bit.

    Attributes:
        W_ON: the weight ``(out, in)``, any floating dtype.
        scores_ON: what orders its entries ``(out, in)``, float64; the earlier of equal ones goes first.
        rivals: which weights compete where zeros may be anywhere: those of the ``matrix``, of each ``row``, or those of
            all rows, each of which gives up the same ``share`` of its scores. With N:M those of each group do.
        cost_ON: what pruning each entry costs, if that is not what orders them.
    """

    W_ON: torch.Tensor
    scores_ON: torch.Tensor
    rivals: Rivals = "row"
    cost_ON: torch.Tensor | None = None

    @property
    def cost(self) -> torch.Tensor:
        """What pruning each entry costs ``(out, in)``, float64: sorted, the cost curve of the weight."""
        return self.scores_ON if self.cost_ON is None else self.cost_ON

    def realize(self, pattern: Pattern) -> Pruned:
        """Prune the weight.

        Raises:
            ValueError: a score is not finite, the inputs do not fit the pattern, or N:M is asked of weights that
                compete by their share of a row.
        """
        if not isinstance(pattern, NM):
            return masks.apply(self.W_ON, _UNSTRUCTURED[self.rivals](self.scores_ON, pattern))
        if self.rivals == "share":
            raise ValueError(
                f"pattern {pattern}: the variant chooses how many weights an output keeps, which N:M fixes"
            )
        return masks.apply(self.W_ON, masks.per_group(self.scores_ON, pattern))

    def ordered(self) -> "OrderedWeights":
        """Return the same with the order worked out: a little slower once, and then a comparison for every budget.

        Raises:
            ValueError: weights compete by their share of a row.
        """
        if self.rivals == "share":
            raise ValueError("weights that compete by their share of a row have no order of their own")
        scores_XG = self.scores_ON.reshape(1, -1) if self.rivals == "matrix" else self.scores_ON
        rivals = scores_XG.shape[1]
        kind = torch.int16 if rivals < 2**15 else torch.int32
        places_XG = torch.arange(rivals, dtype=kind, device=scores_XG.device).expand_as(scores_XG)
        order_XG = torch.empty_like(scores_XG, dtype=kind).scatter_(1, scores_XG.argsort(dim=1, stable=True), places_XG)
        return OrderedWeights(self.W_ON, order_XG.view(self.W_ON.shape), rivals)


@dataclass(frozen=True)
class OrderedWeights:
    """One weight's entries in the order in which they go.

    Attributes:
        W_ON: the weight ``(out, in)``.
        order_ON: how many entries go before each, among those it competes with: its row, or the matrix; the smallest
            integer type that holds it.
        rivals: how many compete.
    """

    W_ON: torch.Tensor
    order_ON: torch.Tensor
    rivals: int

    def without(self, zeros: int) -> torch.Tensor:
        """Return the weight with so many zeros among those that compete, ``(out, in)``."""
        return self.W_ON.masked_fill(self.order_ON < zeros, 0)

    def realize(self, pattern: Pattern) -> Pruned:
        """Prune the weight, as the :class:`RankedWeights` it was made from.

        Raises:
            ValueError: the inputs do not fit the pattern.
        """
        if isinstance(pattern, NM):
            return masks.apply(self.W_ON, masks.per_group(self.order_ON.double(), pattern))
        return masks.apply(self.W_ON, self.order_ON >= pattern.zeros(self.rivals))


_UNSTRUCTURED: dict[str, Callable[[torch.Tensor, Unstructured], torch.Tensor]] = {
    "matrix": masks.per_matrix,
    "row": masks.per_row,
    "share": masks.by_share,
}
