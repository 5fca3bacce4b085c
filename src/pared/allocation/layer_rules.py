"""From evidence, a target and an allocation's options to sparsities: what the declarations in ``registry`` name."""

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch

from pared.allocation.dsa import DEFAULT_OF_ZEROS, as_scores, judge, named
from pared.allocation.registry import LayerEvidence
from pared.allocation.sparsity import alphapruning, er, least_loss, one_threshold, outlier_ratio, owl, uniform
from pared.errors import ParedError

log = logging.getLogger(__name__)


def by_uniform(evidence: LayerEvidence, sparsity: float, _: Mapping[str, Any]) -> torch.Tensor:
    """Give every unit the same sparsity."""
    return uniform(len(evidence.shapes), sparsity)


def by_threshold(evidence: LayerEvidence, sparsity: float, options: Mapping[str, Any]) -> torch.Tensor:
    """Prune below one score."""
    return one_threshold(evidence.scores, sparsity, by_parameters=options["by_parameters"])


def _weights(evidence: LayerEvidence, options: Mapping[str, Any]) -> torch.Tensor | None:
    return evidence.parameters if options["by_parameters"] else None


def _er(evidence: LayerEvidence, sparsity: float, options: Mapping[str, Any], plus: bool) -> torch.Tensor:
    if options["granularity"] != "site":
        raise ParedError("the densities of er and er-plus are those of single weights; granularity can only be site")
    shapes = [unit[0] for unit in evidence.shapes]
    return er(shapes, sparsity, plus=plus, by_parameters=options["by_parameters"])


def by_owl(evidence: LayerEvidence, sparsity: float, options: Mapping[str, Any]) -> torch.Tensor:
    """OWL, from the shares of outlying scores."""
    ratios_L = torch.tensor([outlier_ratio(scores, options["multiple"]) for scores in evidence.scores])
    return owl(ratios_L, sparsity, options["width"], _weights(evidence, options))


def by_alphapruning(evidence: LayerEvidence, sparsity: float, options: Mapping[str, Any]) -> torch.Tensor:
    """AlphaPruning, from the exponents of spectra."""
    alphas_L = torch.tensor(evidence.alphas, dtype=torch.float64)
    known_L = alphas_L.isfinite()
    middle = alphas_L[known_L].mean() if bool(known_L.any()) else alphas_L.new_ones(())
    alphas_L = torch.where(known_L, alphas_L, middle)  # nothing is known of its spectra: as the others on average
    return alphapruning(alphas_L, sparsity, options["epsilon"], _weights(evidence, options))


def by_er(evidence: LayerEvidence, sparsity: float, options: Mapping[str, Any]) -> torch.Tensor:
    """Erdős-Rényi densities."""
    return _er(evidence, sparsity, options, plus=False)


def by_er_plus(evidence: LayerEvidence, sparsity: float, options: Mapping[str, Any]) -> torch.Tensor:
    """Erdős-Rényi densities, the last weight dense."""
    return _er(evidence, sparsity, options, plus=True)


def by_dsa(evidence: LayerEvidence, sparsity: float, options: Mapping[str, Any]) -> torch.Tensor:
    """A DSA program, over the scores."""
    legacy = options["legacy_nan_to_zero"]
    program, tokens = named(options["program"])
    scores = [as_scores(one).scaled(math.sqrt(options["score_tokens"] or tokens)) for one in evidence.scores]
    verdict = judge(program, scores, sparsity, _weights(evidence, options), legacy_nan_to_zero=legacy)
    if verdict.sparsities_L is not None:
        return verdict.sparsities_L
    if options["program"] == DEFAULT_OF_ZEROS:
        log.warning("allocation dsa: %s; every unit gets the same sparsity", verdict.reasons[0])
        evidence.notes["allocation"] = f"{verdict.reasons[0]}: every unit gets the same sparsity"
        return uniform(len(scores), sparsity)
    raise ParedError(f"allocation dsa: {'; '.join(verdict.reasons)}")


def by_loss(evidence: LayerEvidence, sparsity: float, options: Mapping[str, Any]) -> torch.Tensor:
    """The least sum of losses."""
    return least_loss(
        evidence.losses, sparsity, by_parameters=options["by_parameters"], most=max(options["most"], sparsity)
    )
