"""What a budget is spread over: single weights, and groups of weights that are factorised as one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from pared.schema.bits import Form
from pared.schema.plan import Decision, LowRank, pivoted_rank_for, rank_for
from pared.schema.width import Width

if TYPE_CHECKING:
    import torch

    from pared.allocation.dsa import ScoreHistogram
    from pared.structure.groups import ChannelGroup
    from pared.structure.model import Site

Structures = Literal["ranks", "widths", "mixed"]
Costs = Mapping[str, "torch.Tensor"]  # unit name -> what leaving out each direction costs, falling
Trial = Callable[[Mapping[str, Decision]], float]


@dataclass(frozen=True)
class Unit:
    """What gets one decision: a site; several stacked to one tall weight ``(Σ out, in)``; or those of a block.

    Stacked sites get one basis and all have the same ``in_features``; those of a block get one sparsity.

    Attributes:
        members: the sites, in the model's order.
    """

    members: "tuple[Site, ...]"

    @property
    def name(self) -> str:
        """That of the first member, which owns the basis."""
        return self.members[0].name

    @property
    def kind(self) -> str:
        """What such a layer is usually called, to print."""
        return self.members[0].kind

    @property
    def role(self) -> tuple[str, int]:
        """What is the same for the layers of one kind in every block, whatever they are called."""
        return self.members[0].role

    @property
    def block(self) -> int:
        """Index of the first block."""
        return self.members[0].block

    @property
    def out_features(self) -> int:
        """Rows of the stacked weight."""
        return sum(site.out_features for site in self.members)

    @property
    def in_features(self) -> int:
        """Its columns."""
        return self.members[0].in_features

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """``(out, in)`` of every member."""
        return tuple((site.out_features, site.in_features) for site in self.members)

    @property
    def parameters(self) -> int:
        """Weight parameters of the dense members."""
        return sum(m * n for m, n in self.shapes)

    @property
    def idle(self) -> bool:
        """Whether a member never ran in the probe pass, so that nothing can be said about its inputs."""
        return any(site.idle for site in self.members)


@dataclass(frozen=True)
class Budget:
    """How much may stay, and what a rank costs.

    Attributes:
        keep: fraction of the covered parameters that stays.
        pivoted: low-rank results are stored by pivots, ``rank²`` parameters fewer.
        rank_fraction: a budget of ranks in place of parameters, for the allocation of that name.
        sparsity: a budget of zeros: the fraction of the covered parameters that becomes zero.
        structures: what may be decided: ranks of weights, widths of channel groups, or either.
        multiple_of: what widths of MLPs are multiples of.
        form: in how few bits everything is stored; none as the model has it.
        itemsize: bytes of a number, where ``keep`` is of the bytes of the weights and their bits are decided too; 0
            where it is of their parameters.
    """

    keep: float
    pivoted: bool = False
    rank_fraction: float | None = None
    sparsity: float | None = None
    structures: Structures = "ranks"
    multiple_of: int = 1
    form: Form | None = None
    itemsize: int = 0

    @property
    def of_bytes(self) -> bool:
        """Whether it is one of bytes."""
        return self.itemsize > 0

    @property
    def noun(self) -> str:
        """What it counts."""
        return "bytes" if self.of_bytes else "parameters"

    def size(self, parameters: int) -> int:
        """Return what so many parameters count that are stored as the model has them."""
        return parameters * (self.itemsize or 1)

    def low_rank(self, rank: int) -> LowRank:
        """Return the decision for a rank, in this budget's storage."""
        return LowRank(rank=rank, pivoted=self.pivoted)

    def cost(self, unit: Unit, rank: int) -> int:
        """Return the parameters a unit of this rank stores."""
        return rank * (unit.out_features + unit.in_features) - (rank**2 if self.pivoted else 0)

    def rank(self, unit: Unit, keep: float | None = None) -> int:
        """Return the largest rank that fits a fraction (this budget's if none) of a unit's parameters; may be 0."""
        share = self.keep if keep is None else keep
        shape = (unit.out_features, unit.in_features)
        return (
            pivoted_rank_for(int(share * unit.parameters + 1e-9), *shape) if self.pivoted else rank_for(share, *shape)
        )

    def most_rank(self, unit: Unit) -> int:
        """Return the largest rank that stores fewer parameters than the dense weight; may be 0."""
        m, n = unit.out_features, unit.in_features
        if self.pivoted:
            return min(m, n) - 1  # k (m + n) - k² is m n at k = min(m, n) and rises up to there
        return min((m * n - 1) // (m + n), m, n)


@dataclass(frozen=True)
class Channels:
    """What is known of a channel group, whose sites are units of their own too.

    Attributes:
        group: the sites, and how their inputs and outputs belong together.
        cost: what every input of the site that reads the channels costs to leave out, those of a channel side by side,
            in the order in which the channels stay: keeping k costs the sum of the squares behind them, as of a
            spectrum; none before it is measured.
        shifts: whether a bias of the site that reads the channels makes up for those that go.
        energies: of every layer that makes the channels, the weighted energy of each of them, in the order in which
            they stay; empty where what is left of the layers may have no rank.
    """

    group: "ChannelGroup"
    cost: "torch.Tensor | None" = None
    shifts: bool = False
    energies: "Mapping[str, torch.Tensor]" = field(default_factory=dict)

    def widths(self, multiple_of: int) -> range:
        """Return the widths that there may be, below that of the dense model; of heads every number from 1."""
        step = 1 if self.group.unit == "head" else multiple_of
        return range(step, self.group.channels, step)

    def decisions(self, width: int) -> dict[str, Width]:
        """Return the decision of every site of the group at a width."""
        group = self.group
        shared = {"group": group.name, "width": width, "channels": group.channels, "unit": group.unit}
        made = {one.site.name: Width(side="out", rows=one.rows, has_bias=one.site.has_bias, **shared)
                for one in group.producers}  # fmt: skip
        adds = self.shifts and not group.consumer.has_bias
        return {group.name: Width(side="in", rows=group.inputs, adds_bias=adds, **shared), **made}


@dataclass(frozen=True)
class Evidence:
    """What an allocator may know besides shapes; it declares what it requires. Units are named by their first.

    One type serves every family: what is known of ranks and of zeros are fields like any other, filled where they are
    required.

    Attributes:
        cost: of every unit that is not idle, what leaving out each direction costs, falling; per token, wherever that
            depends on a text.
        influence: for every block, ShortGPT's Block Influence, 1 - the mean cosine of what it reads and outputs.
        trial: the perplexity, on tokens kept apart from the calibration windows, of the model with these decisions and
            everything else dense.
        key: digest of all that a trial depends on but the decisions; none if results must not outlive this process.
        notes: what was decided by a rule where nothing is known, by site, or ``allocation``; allocators add to it.
        scores: of every unit, Wanda's scores of all its weights, ``|W_ij| √E[x_j²]``, from the dense model; per token.
        losses: of every unit, the expected loss of pruning each of its weights, ``½ w² E[x²] E[g²]``, nats a token.
        rounding: of every unit, by form of few bits what rounding costs: of the weight itself, then of its factors of
            rank 1, 2, ...; in the unit of ``cost``'s squares, where the budget is one of bytes.
        channels: the channel groups, by the name of the site that reads them, where the budget lets widths be decided.
        alphas: of every unit, the mean exponent of the tails of its weights' spectra; NaN where none of them has one.
    """

    cost: Costs = field(default_factory=dict)
    influence: Mapping[int, float] = field(default_factory=dict)
    trial: Trial | None = None
    key: str | None = None
    notes: dict[str, str] = field(default_factory=dict)
    scores: "Mapping[str, ScoreHistogram]" = field(default_factory=dict)
    losses: "Mapping[str, ScoreHistogram]" = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    channels: Mapping[str, Channels] = field(default_factory=dict)
    rounding: "Mapping[str, Mapping[Form, torch.Tensor]]" = field(default_factory=dict)

    def groups(self, budget: Budget) -> Mapping[str, Channels]:
        """Return the channel groups that a budget lets be decided."""
        return {} if budget.structures == "ranks" else self.channels
