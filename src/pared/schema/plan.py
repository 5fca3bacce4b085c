"""The decision for every site, as data, and what it costs.

A plan is the only thing allocation produces and the only thing solvers, format, report and a dry run read.
"""

import math
from collections import Counter
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from pared.schema.base import Strict
from pared.schema.bits import InFewBits
from pared.schema.width import INDEX_BYTES, Width
from pared.tables import Row, Shown, Table

SHOWN = 16  # kinds of layers that a plan shows; with ranks of their own there are as many as layers


class Dense(InFewBits):
    """The weight stays as it is, but for its bits; ``reason`` says why."""

    kind: Literal["dense"] = "dense"
    reason: str

    def parameters(self, out_features: int, in_features: int) -> int:
        """Stored weight parameters of a site of this shape."""
        return out_features * in_features

    def matrices(self, out_features: int, in_features: int) -> list[tuple[int, int]]:
        """The weight."""
        return [(out_features, in_features)]


class LowRank(InFewBits):
    """Two factors, ``up (out, rank)`` and ``down (rank, in)``, stand in for the weight.

    Attributes:
        rank: of the weight.
        pivoted: stored as ``rank`` of its columns and the others' coefficients, without loss, ``rank²`` parameters
            fewer.
    """

    kind: Literal["low_rank"] = "low_rank"
    rank: Annotated[int, Field(ge=1)]
    pivoted: bool = False

    def parameters(self, out_features: int, in_features: int) -> int:
        """Stored weight parameters of a site of this shape; the indices of pivoted storage are not parameters."""
        return self.rank * (out_features + in_features) - (self.rank**2 if self.pivoted else 0)

    def matrices(self, out_features: int, in_features: int) -> list[tuple[int, int]]:
        """Both factors."""
        return [(self.rank, in_features), (out_features, self.rank)]

    @model_validator(mode="after")
    def _is_storable(self) -> "LowRank":
        if self.pivoted and self.quantized:
            raise ValueError(f"pivots are not stored as {self.quantized}: coefficients do not bear the rounding")
        return self

    def __str__(self) -> str:
        return f"rank {self.rank}{', pivoted' if self.pivoted else ''}{self.form}"

    def index_bytes(self, out_features: int, in_features: int) -> int:  # noqa: ARG002 - as every decision
        """Bytes stored besides the parameters: the order of the inputs, if pivoted."""
        return INDEX_BYTES * in_features if self.pivoted else 0


class Shared(Strict):
    """One basis, ``down (rank, in)``, for the same weight of several blocks; every site has its own ``up (out, rank)``.

    Attributes:
        rank: of the sites' weights stacked to one.
        owner: name of the site that the stored basis belongs to, the first of the group.
        pivoted: the basis is stored by its pivots, ``rank²`` parameters fewer.
    """

    kind: Literal["shared"] = "shared"
    rank: Annotated[int, Field(ge=1)]
    owner: str
    pivoted: bool = False

    def parameters(self, out_features: int, in_features: int) -> int:  # noqa: ARG002 - as every decision
        """Stored weight parameters of one site without the basis, which is the owner's."""
        return self.rank * out_features

    def index_bytes(self, out_features: int, in_features: int) -> int:  # noqa: ARG002 - as every decision
        """Bytes stored besides the parameters: every site's copy of the order of the inputs, if pivoted."""
        return INDEX_BYTES * in_features if self.pivoted else 0

    def basis_parameters(self, in_features: int) -> int:
        """Stored parameters of the basis."""
        return self.rank * (in_features - (self.rank if self.pivoted else 0))

    def __str__(self) -> str:
        return f"rank {self.rank}{', pivoted' if self.pivoted else ''}, basis of {self.owner}"


class Sparse(Strict):
    """Some weights are zero, anywhere in the matrix, and are not stored.

    Attributes:
        sparsity: the fraction of zeros that was asked for.
        stored: how many weights are stored; none before the weight is pruned, which counts as whole zeros of a row.
    """

    kind: Literal["sparse"] = "sparse"
    sparsity: Annotated[float, Field(ge=0, lt=1)]
    stored: int | None = None

    def parameters(self, out_features: int, in_features: int) -> int:
        """Stored weights of a site of this shape; where they stand is not parameters."""
        zeros_of_a_row = math.floor(in_features * (self.sparsity + 1e-12))
        return out_features * (in_features - zeros_of_a_row) if self.stored is None else self.stored

    def index_bytes(self, out_features: int, in_features: int) -> int:
        """Bytes stored besides the parameters: one bit for every weight."""
        return -(-out_features * in_features // 8)

    def __str__(self) -> str:
        return f"sparsity {self.sparsity:.4g}"


class NM(Strict):
    """At most N of every M consecutive inputs of an output are stored.

    Attributes:
        kept: N.
        group: M.
    """

    kind: Literal["n_m"] = "n_m"
    kept: Annotated[int, Field(ge=1)]
    group: Annotated[int, Field(ge=1)]

    def parameters(self, out_features: int, in_features: int) -> int:
        """Stored weights of a site of this shape."""
        return out_features * in_features // self.group * self.kept

    def index_bytes(self, out_features: int, in_features: int) -> int:
        """Bytes stored besides the parameters: places of stored weights in their groups, or a mask if that is less."""
        bits = min(self.kept * (self.group - 1).bit_length(), self.group)
        return -(-out_features * in_features // self.group * bits // 8)

    def __str__(self) -> str:
        return f"pattern {self.kept}:{self.group}"


Decision = Annotated[Dense | LowRank | Shared | Sparse | NM | Width, Field(discriminator="kind")]


def rank_for(keep: float, out_features: int, in_features: int) -> int:
    """Return ``floor(keep · m · n / (m + n))``, the largest rank whose factors fit the budget; may be 0."""
    # A budget computed as a ratio can land a hair under the integer it stands for (0.8·…/… = 229.99999).
    return math.floor(keep * out_features * in_features / (out_features + in_features) + 1e-9)


def pivoted_rank_for(budget: int, out_features: int, in_features: int) -> int:
    """Return the largest rank whose pivoted storage fits a budget of numbers; may be 0.

    ``k (m + n) - k² + k <= q``, the k indices counted as numbers too (PIFA, arXiv 2501.19090):
    ``k = int((m + n + 1 - sqrt((m + n + 1)² - 4 q)) / 2)``, in integers.

    Args:
        budget: numbers that may be stored.
        out_features: rows m of the weight.
        in_features: columns n of the weight.
    """
    width, most = out_features + in_features + 1, min(out_features, in_features)
    budget = min(budget, most * (width - most))
    rank = (width - math.isqrt(width**2 - 4 * budget)) // 2
    if rank * (width - rank) > budget:  # the root was rounded down
        rank -= 1
    return rank


class SitePlan(Strict):
    """One site, its shape ``(out, in)`` and what is decided for it."""

    name: str
    kind: str
    block: NonNegativeInt
    out_features: PositiveInt
    in_features: PositiveInt
    decision: Decision

    @model_validator(mode="after")
    def _rank_exists(self) -> "SitePlan":
        if isinstance(self.decision, Width) and not self.decision.fits(self.out_features, self.in_features):
            raise ValueError(
                f"{self.name}: {self.decision} does not fit a {self.out_features} x {self.in_features} weight"
            )
        if not isinstance(self.decision, (LowRank, Shared)):
            return self
        # The group of a shared basis has more rows than this site.
        shared = isinstance(self.decision, Shared)
        most = self.in_features if shared else min(self.out_features, self.in_features)
        if self.decision.rank > most:
            raise ValueError(f"{self.name}: rank {self.decision.rank}, but a {self.out_features} x {self.in_features} "
                             f"weight has at most {most}")  # fmt: skip
        return self

    def describe(self) -> str:
        """Return kind, shape and decision in words."""
        decision = self.decision
        text = f"dense{decision.form} ({decision.reason})" if isinstance(decision, Dense) else str(decision)
        return f"{self.kind} {self.out_features} x {self.in_features}: {text}"

    @property
    def before(self) -> int:
        """Weight parameters of the dense site."""
        return self.out_features * self.in_features

    @property
    def after(self) -> int:
        """Weight parameters after the decision; a shared basis counts with its owner."""
        own = self.decision.parameters(self.out_features, self.in_features)
        if isinstance(self.decision, Shared) and self.decision.owner == self.name:
            own += self.decision.basis_parameters(self.in_features)
        return own

    @property
    def biases_removed(self) -> int:
        """Numbers that the site's bias loses, which count as none of its weight parameters; of a new bias negative."""
        if not isinstance(self.decision, Width):
            return 0
        return self.decision.biases_removed - (self.out_features if self.decision.adds_bias else 0)

    @property
    def index_bytes(self) -> int:
        """Bytes the decision stores besides parameters."""
        return 0 if isinstance(self.decision, Dense) else self.decision.index_bytes(self.out_features, self.in_features)

    def bytes_saved(self, itemsize: int) -> int:
        """Return how many bytes fewer its parameters are than ``itemsize`` bytes each, as they are in few bits."""
        if not isinstance(self.decision, InFewBits) or self.decision.quantized is None:
            return 0
        stored = self.decision.stored_bytes(self.out_features, self.in_features, itemsize)
        return self.after * itemsize - stored

    def stored_bytes(self, itemsize: int) -> int:
        """Return the bytes of its weight after the decision, biases aside."""
        return self.after * itemsize + self.index_bytes - self.bytes_saved(itemsize)


class Uncovered(Strict):
    """A weight inside the blocks that no method is applied to, and why."""

    name: str
    shape: tuple[NonNegativeInt, ...]
    parameters: NonNegativeInt
    reason: str


class Sizes(Strict):
    """The three sizes that are always reported together."""

    covered_parameters: int
    model_parameters: int
    bytes_on_disk: int


# Why sites of a kind can have more than their share of a budget.
ROUNDED: dict[type, str] = {
    Sparse: "every row keeps a whole number of weights",
    NM: "every group keeps a whole number of weights",
    LowRank: "a rank is a whole number, and at least 1",
    Shared: "a rank is a whole number, and at least 1",
    Width: "a width is a whole number of channels, heads or experts, and at least 1",
}


class Plan(Shown, Strict):
    """Every site's decision, what is not covered, and the sizes before and after.

    Attributes:
        keep: the fraction of the target modules' parameters that was requested to stay.
        sites: the covered sites, in the model's order.
        uncovered: weights inside the blocks that were left alone.
        model_parameters: parameters of the whole dense model; tied ones counted once.
        bytes_per_parameter: of the dtype the model is saved in.
        keep_bytes: the fraction of the target modules' bytes that was requested to stay, where the budget was one of
            bytes; ``keep`` is then what came of it.
    """

    keep: float
    sites: Annotated[tuple[SitePlan, ...], Field(min_length=1)]
    uncovered: tuple[Uncovered, ...] = ()
    model_parameters: PositiveInt
    bytes_per_parameter: PositiveInt
    keep_bytes: float | None = None

    @property
    def before(self) -> Sizes:
        """Sizes of the dense model; bytes are those of the weights alone."""
        return self._sizes(sum(site.before for site in self.sites), 0)

    @property
    def after(self) -> Sizes:
        """Sizes after every decision; bytes are those of the weights alone."""
        removed = sum(site.before - site.after + site.biases_removed for site in self.sites)
        sizes = self._sizes(sum(site.after for site in self.sites), removed)
        more = sum(site.index_bytes - site.bytes_saved(self.bytes_per_parameter) for site in self.sites)
        return sizes.model_copy(update={"bytes_on_disk": sizes.bytes_on_disk + more})

    @property
    def achieved_keep(self) -> float:
        """Fraction of the target modules' parameters that stays."""
        return self.after.covered_parameters / self.before.covered_parameters

    @property
    def uncovered_share(self) -> float:
        """Share of the weights inside the blocks that no method is applied to."""
        left = sum(weight.parameters for weight in self.uncovered)
        return left / max(left + self.before.covered_parameters, 1)

    @property
    def budget(self) -> str:
        """The budget in words, of what is decided: a pattern, zeros, or what stays."""
        decided = [site.decision for site in self.sites]
        patterns = {f"{one.kept}:{one.group}" for one in decided if isinstance(one, NM)}
        if len(patterns) == 1:
            return f"pattern {patterns.pop()}"
        if self.keep_bytes is not None:
            return f"keep bytes {self.keep_bytes:g}"
        zeros = patterns or any(isinstance(one, Sparse) for one in decided)
        return f"sparsity {1 - self.keep:g}" if zeros else f"keep {self.keep:g}"

    @property
    def shortfall(self) -> int:
        """Parameters above the budget, by sites that had to stay dense or by rounding; 0 when the budget is met."""
        # 0.29 of 100 parameters are 28.999999999999996 in binary: that budget is 29.
        budget = math.floor(self.keep * self.before.covered_parameters * (1 + 1e-12))
        return max(0, self.after.covered_parameters - budget)

    @property
    def missed(self) -> str | None:
        """By how much the budget is missed and why, in words; None when it is met, as one of bytes always is."""
        if not self.shortfall or self.keep_bytes is not None:
            return None
        dense = [site for site in self.sites if isinstance(site.decision, Dense)]
        beyond = sum(site.before for site in dense) * (1 - self.keep)  # what the dense ones have more than their share
        why = [f"{len(dense)} sites stay dense, the first is {dense[0].name}"] if dense else []
        if self.shortfall > beyond:
            kinds = {type(site.decision) for site in self.sites}
            why += [text for kind, text in ROUNDED.items() if kind in kinds]
        share = self.shortfall / self.before.covered_parameters
        return (f"the budget is missed by {self.shortfall:,} parameters, {share:.2%} of the target modules'"
                f"{': ' + ', and '.join(why) if why else ''}")  # fmt: skip

    def sizes(self, bytes_before: int | None = None, bytes_after: int | None = None) -> list[Row]:
        """Return the three sizes as rows: covered parameters, whole-model parameters, bytes on disk.

        Args:
            bytes_before: of the dense weights as they are stored; by default by their number.
            bytes_after: of the written weights; by default by their number.
        """
        before, after = self.before, self.after
        compared = {
            "target parameters": (before.covered_parameters, after.covered_parameters),
            "whole-model parameters": (before.model_parameters, after.model_parameters),
            "bytes on disk": (
                before.bytes_on_disk if bytes_before is None else bytes_before,
                after.bytes_on_disk if bytes_after is None else bytes_after,
            ),
        }
        return [Row(what, f"{old:,}", f"{new:,}", f"{new / old:.1%}") for what, (old, new) in compared.items()]

    def kinds(self) -> list[str]:
        """Return a line for every kind of layer and what is decided for it, with how many there are of it."""
        counted = Counter(site.describe() for site in self.sites)
        return [f"{count:5} x {text}" for text, count in sorted(counted.items())]

    def table(self) -> Table:
        """Return the sizes, and below them what is decided, for every kind of layer."""
        kinds = self.kinds()
        more = [f"      and {len(kinds) - SHOWN:,} more" for _ in kinds[SHOWN : SHOWN + 1]]
        left = f"not targeted: {len(self.uncovered):,} weights, {self.uncovered_share:.1%} of those inside the blocks"
        lines = [*kinds[:SHOWN], *more, *([left] if self.uncovered else []), *([self.missed] if self.missed else [])]
        return Table.comparison(f"plan, {self.budget}", self.sizes(), lines)

    def _sizes(self, covered: int, removed: int) -> Sizes:
        whole = self.model_parameters - removed
        return Sizes(covered_parameters=covered, model_parameters=whole, bytes_on_disk=whole * self.bytes_per_parameter)
