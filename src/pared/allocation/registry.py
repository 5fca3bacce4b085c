"""The allocators by name: how ranks are spread over weights, and how zeros are over blocks or sites."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pared.allocation.dsa.presets import DEFAULT_OF_RANKS, DEFAULT_OF_ZEROS, PACKAGED
from pared.allocation.ranks.rank_fraction import rank_fraction
from pared.allocation.units import Budget, Evidence, Unit
from pared.errors import ParedError
from pared.lazy import deferred
from pared.names import require_known
from pared.schema.plan import Decision

if TYPE_CHECKING:
    import torch

    from pared.allocation.dsa import ScoreHistogram


Allocate = Callable[[Sequence[Unit], Budget, Evidence], dict[str, Decision]]


@dataclass(frozen=True)
class Allocator:
    """A way to spread a budget.

    Attributes:
        name: what a recipe calls it.
        summary: what it does, in a line.
        allocate: from units, a budget and the evidence to decisions by unit.
        needs: fields of the evidence it reads; shapes are enough if there are none.
        options: names and default values.
    """

    name: str
    summary: str
    allocate: Allocate
    needs: frozenset[str] = frozenset({"spectra"})
    options: Mapping[str, bool | int | float | str] = field(default_factory=dict)


def _rank_fraction(units: Sequence[Unit], budget: Budget, _: Evidence) -> dict[str, Decision]:
    if budget.rank_fraction is None:
        raise ParedError("allocation rank-fraction needs the fraction; give rank_fraction (--rank-fraction) instead")
    return rank_fraction(units, budget.rank_fraction, budget.pivoted)


def _in(module: str) -> Allocate:
    """Return the allocator of a module, which has its name."""
    return deferred(f"pared.allocation.ranks.{module}:{module}")


ALLOCATORS = {
    allocator.name: allocator
    for allocator in (
        Allocator("uniform", "the same fraction of every weight", _in("uniform"), frozenset()),
        Allocator("rank-fraction", "FWSVD's budget, the same fraction of every rank", _rank_fraction, frozenset()),
        Allocator(
            "loss",
            "the least sum of losses over all weights, dense ones included",
            _in("loss"),
        ),
        Allocator(
            "effective-rank",
            "D-Rank: by effective rank, with a share of q and k moved to v",
            _in("effective_rank"),
        ),
        Allocator(
            "swift",
            "Swift-SVD: by loss and influence of the block, eleven mixtures tried on a text",
            _in("swift"),
            frozenset({"spectra", "influence", "trial"}),
        ),
        Allocator(
            "sensitivity",
            "ASVD: every weight at six sizes, by the perplexity each leaves; many evaluations, kept on disk",
            _in("sensitivity"),
            frozenset({"spectra", "trial"}),
        ),
        Allocator(
            "dsa",
            "a DSA program over the spectra of a block: its text, FOUND.json of a search, or a packaged one",
            deferred("pared.allocation.ranks.dsa:dsa"),
            frozenset({"spectra", "options"}),
            {"program": DEFAULT_OF_RANKS, "score_tokens": 0},
        ),
        Allocator(
            "svd-llm-v2",
            "within a kind, less is taken where uniform ranks lose more",
            _in("svd_llm_v2"),
        ),
    )
}


def allocator_of(name: str) -> Allocator:
    """Return the allocator of a name.

    Raises:
        ParedError: there is none.
    """
    require_known("allocation", name, ALLOCATORS)
    return ALLOCATORS[name]


Shape = tuple[int, int]
GRANULARITIES = ("block", "site")


@dataclass(frozen=True)
class LayerEvidence:
    """What is known of every unit, a block or a site, in the model's order; an allocator declares what it needs.

    Attributes:
        shapes: ``(out, in)`` of its weights.
        scores: Wanda's scores of all its weights, ``|W_ij| √E[x_j²]``, from the dense model; per token of the text.
        losses: the expected loss of letting each of its weights go, ``½ w² E[x²] E[g²]``, nats a token.
        alphas: the mean exponent of the tails of its weights' spectra; NaN where none of them has one.
        unread: numbers of units that no token of the text reached; they are in none of the other fields.
        notes: what was decided by a rule where nothing is known, by site, or ``allocation``; allocators add to it.
    """

    shapes: Sequence[Sequence[Shape]]
    scores: "Sequence[ScoreHistogram]" = ()
    losses: "Sequence[ScoreHistogram]" = ()
    alphas: Sequence[float] = ()
    unread: frozenset[int] = frozenset()
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def parameters(self) -> "torch.Tensor":
        """How many weights every unit has, float64 ``(L,)``."""
        import torch

        return torch.tensor([sum(m * n for m, n in unit) for unit in self.shapes], dtype=torch.float64)


LayerAllocate = Callable[[LayerEvidence, float, Mapping[str, Any]], "torch.Tensor"]


@dataclass(frozen=True)
class LayerAllocator:
    """A way to spread zeros over a model.

    Attributes:
        name: what a recipe calls it.
        summary: what it does, in a line.
        allocate: from evidence, a target and the options to sparsities ``(L,)`` whose mean is the target.
        needs: fields of the evidence it reads beside the shapes.
        options: names and default values. Every allocator has ``granularity``, what a unit is, and ``by_parameters``,
            whether the mean is over parameters, which makes the size exact, or over units, as in the papers.
    """

    name: str
    summary: str
    allocate: LayerAllocate
    needs: frozenset[str] = frozenset()
    options: Mapping[str, bool | int | float | str] = field(default_factory=dict)


UNIT: dict[str, bool | int | float | str] = {"granularity": "block", "by_parameters": True}
LAYER_ALLOCATORS = {
    allocator.name: allocator
    for allocator in (
        LayerAllocator(
            "uniform",
            "the same sparsity everywhere",
            deferred("pared.allocation.layer_rules:by_uniform"),
            options=UNIT,
        ),
        LayerAllocator(
            "global",
            "one threshold over Wanda's scores of the whole model",
            deferred("pared.allocation.layer_rules:by_threshold"),
            frozenset({"scores"}),
            {**UNIT, "granularity": "site"},
        ),
        LayerAllocator(
            "er",
            "Erdős-Rényi: small and flat weights stay denser",
            deferred("pared.allocation.layer_rules:by_er"),
            options={**UNIT, "granularity": "site"},
        ),
        LayerAllocator(
            "er-plus",
            "er with the last weight dense",
            deferred("pared.allocation.layer_rules:by_er_plus"),
            options={**UNIT, "granularity": "site"},
        ),
        LayerAllocator(
            "owl",
            "OWL: blocks with many outlying scores are pruned less",
            deferred("pared.allocation.layer_rules:by_owl"),
            frozenset({"scores"}),
            {**UNIT, "multiple": 5.0, "width": 0.08},
        ),
        LayerAllocator(
            "alphapruning",
            "AlphaPruning: heavy-tailed spectra are pruned less; needs no data",
            deferred("pared.allocation.layer_rules:by_alphapruning"),
            frozenset({"alphas"}),
            {**UNIT, "epsilon": 0.3, "tail": "xmin_mid"},
        ),
        LayerAllocator(
            "dsa",
            f"a DSA program over Wanda's scores: its text, FOUND.json of a search, or one of {', '.join(PACKAGED)}",
            deferred("pared.allocation.layer_rules:by_dsa"),
            frozenset({"scores"}),
            {**UNIT, "program": DEFAULT_OF_ZEROS, "score_tokens": 0, "legacy_nan_to_zero": False},
        ),
        LayerAllocator(
            "loss",
            "ours: the least sum of expected losses, one threshold in nats; needs a backward pass",
            deferred("pared.allocation.layer_rules:by_loss"),
            frozenset({"losses"}),
            {**UNIT, "granularity": "site", "most": 0.95},
        ),
    )
}


def layer_allocator_of(name: str) -> LayerAllocator:
    """Return the allocator of zeros of a name.

    Raises:
        ParedError: there is none.
    """
    require_known("allocation of zeros", name, LAYER_ALLOCATORS)
    return LAYER_ALLOCATORS[name]
