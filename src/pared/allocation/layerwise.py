"""How sparse each block or site becomes, by name: what every allocator of zeros needs, and what it is given."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pared.allocation.program import DEFAULT_OF_ZEROS, PACKAGED, ScoreHistogram, as_scores, judge, named
from pared.allocation.sparsity import alphapruning, er, least_loss, one_threshold, outlier_ratio, owl, uniform
from pared.errors import ParedError
from pared.names import require_known

log = logging.getLogger(__name__)

Shape = tuple[int, int]
GRANULARITIES = ("block", "site")


@dataclass(frozen=True)
class LayerEvidence:
    """What is known of every unit, a block or a site, in the model's order; an allocator declares what it needs.

    Attributes:
        shapes: ``(out, in)`` of its weights.
        scores: Wanda's scores of all its weights, ``|W_ij| √E[x_j²]``, from the dense model; per token of the text.
        losses: the expected loss of letting each of its weights go, ``½ w² E[x²] E[g²]``, nats a token.
        alphas: the mean exponent of the tails of its weights' spectra.
    """

    shapes: Sequence[Sequence[Shape]]
    scores: Sequence[ScoreHistogram] = ()
    losses: Sequence[ScoreHistogram] = ()
    alphas: Sequence[float] = ()

    @property
    def parameters(self) -> torch.Tensor:
        """How many weights every unit has, float64 ``(L,)``."""
        return torch.tensor([sum(m * n for m, n in unit) for unit in self.shapes], dtype=torch.float64)


Allocate = Callable[[LayerEvidence, float, Mapping[str, Any]], torch.Tensor]


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
    allocate: Allocate
    needs: frozenset[str] = frozenset()
    options: Mapping[str, bool | int | float | str] = field(default_factory=dict)


def _weights(evidence: LayerEvidence, options: Mapping[str, Any]) -> torch.Tensor | None:
    return evidence.parameters if options["by_parameters"] else None


def _er(evidence: LayerEvidence, sparsity: float, options: Mapping[str, Any], plus: bool) -> torch.Tensor:
    if options["granularity"] != "site":
        raise ParedError("the densities of er and er-plus are those of single weights; granularity can only be site")
    shapes = [unit[0] for unit in evidence.shapes]
    return er(shapes, sparsity, plus=plus, by_parameters=options["by_parameters"])


def _owl(evidence: LayerEvidence, sparsity: float, options: Mapping[str, Any]) -> torch.Tensor:
    ratios_L = torch.tensor([outlier_ratio(scores, options["multiple"]) for scores in evidence.scores])
    return owl(ratios_L, sparsity, options["width"], _weights(evidence, options))


def _alphapruning(evidence: LayerEvidence, sparsity: float, options: Mapping[str, Any]) -> torch.Tensor:
    return alphapruning(torch.tensor(evidence.alphas), sparsity, options["epsilon"], _weights(evidence, options))


def _dsa(evidence: LayerEvidence, sparsity: float, options: Mapping[str, Any]) -> torch.Tensor:
    legacy = options["legacy_nan_to_zero"]
    program, tokens = named(options["program"])
    scores = [as_scores(one).scaled(math.sqrt(options["score_tokens"] or tokens)) for one in evidence.scores]
    verdict = judge(program, scores, sparsity, _weights(evidence, options), legacy_nan_to_zero=legacy)
    if verdict.sparsities_L is not None:
        return verdict.sparsities_L
    if options["program"] == DEFAULT_OF_ZEROS:
        log.warning("allocation dsa: %s; every unit gets the same sparsity", verdict.reasons[0])
        return uniform(len(scores), sparsity)
    raise ParedError(f"allocation dsa: {'; '.join(verdict.reasons)}")


def _loss(evidence: LayerEvidence, sparsity: float, options: Mapping[str, Any]) -> torch.Tensor:
    return least_loss(
        evidence.losses, sparsity, by_parameters=options["by_parameters"], most=max(options["most"], sparsity)
    )


UNIT: dict[str, bool | int | float | str] = {"granularity": "block", "by_parameters": True}
LAYER_ALLOCATORS = {
    allocator.name: allocator
    for allocator in (
        LayerAllocator(
            "uniform",
            "the same sparsity everywhere",
            lambda evidence, sparsity, _: uniform(len(evidence.shapes), sparsity),
            options=UNIT,
        ),
        LayerAllocator(
            "global",
            "one threshold over Wanda's scores of the whole model",
            lambda evidence, sparsity, options: one_threshold(
                evidence.scores, sparsity, by_parameters=options["by_parameters"]
            ),
            frozenset({"scores"}),
            {**UNIT, "granularity": "site"},
        ),
        LayerAllocator(
            "er",
            "Erdős-Rényi: small and flat weights stay denser",
            lambda evidence, sparsity, options: _er(evidence, sparsity, options, plus=False),
            options={**UNIT, "granularity": "site"},
        ),
        LayerAllocator(
            "er-plus",
            "er with the last weight dense",
            lambda evidence, sparsity, options: _er(evidence, sparsity, options, plus=True),
            options={**UNIT, "granularity": "site"},
        ),
        LayerAllocator(
            "owl",
            "OWL: blocks with many outlying scores are pruned less",
            _owl,
            frozenset({"scores"}),
            {**UNIT, "multiple": 5.0, "width": 0.08},
        ),
        LayerAllocator(
            "alphapruning",
            "AlphaPruning: heavy-tailed spectra are pruned less; needs no data",
            _alphapruning,
            frozenset({"alphas"}),
            {**UNIT, "epsilon": 0.3, "tail": "xmin_mid"},
        ),
        LayerAllocator(
            "dsa",
            f"a DSA program over Wanda's scores: its text, FOUND.json of a search, or one of {', '.join(PACKAGED)}",
            _dsa,
            frozenset({"scores"}),
            {**UNIT, "program": DEFAULT_OF_ZEROS, "score_tokens": 0, "legacy_nan_to_zero": False},
        ),
        LayerAllocator(
            "loss",
            "ours: the least sum of expected losses, one threshold in nats; needs a backward pass",
            _loss,
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
