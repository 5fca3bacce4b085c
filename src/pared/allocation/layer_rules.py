"""Allocators of zeros: from units, a budget, evidence and options to the sparsity of every unit."""

import logging
import math
from collections.abc import Sequence

import torch

from pared.allocation.dsa import DEFAULT_OF_ZEROS, as_scores, evaluate_program, named
from pared.allocation.options import AlphaPruning, DsaZeros, Er, Global, LossZeros, Owl, UnitOptions
from pared.allocation.sparsity import alphapruning, er, global_threshold, least_loss, outlier_ratio, owl, uniform
from pared.allocation.units import Budget, Evidence, Unit
from pared.errors import ParedError
from pared.schema.plan import Decision, Sparse

log = logging.getLogger(__name__)

Decisions = dict[str, Decision]
Units = Sequence[Unit]


def by_uniform(units: Units, budget: Budget, _: Evidence, __: UnitOptions) -> Decisions:
    """Give every unit the same sparsity."""
    return _decisions(units, uniform(len(units), _target(budget)))


def by_threshold(units: Units, budget: Budget, evidence: Evidence, options: Global) -> Decisions:
    """Prune below one score."""
    scores = [evidence.scores[unit.name] for unit in units]
    return _decisions(units, global_threshold(scores, _target(budget), by_parameters=options.by_parameters))


def by_er(units: Units, budget: Budget, _: Evidence, options: Er) -> Decisions:
    """Erdős-Rényi densities."""
    return _by_er(units, budget, options, plus=False)


def by_er_plus(units: Units, budget: Budget, _: Evidence, options: Er) -> Decisions:
    """Erdős-Rényi densities, the last weight dense."""
    return _by_er(units, budget, options, plus=True)


def by_owl(units: Units, budget: Budget, evidence: Evidence, options: Owl) -> Decisions:
    """OWL, from the shares of outlying scores."""
    ratios_L = torch.tensor([outlier_ratio(evidence.scores[unit.name], options.multiple) for unit in units])
    return _decisions(units, owl(ratios_L, _target(budget), options.width, _weights(units, options)))


def by_alphapruning(units: Units, budget: Budget, evidence: Evidence, options: AlphaPruning) -> Decisions:
    """AlphaPruning, from the exponents of spectra."""
    alphas_L = torch.tensor([evidence.alphas[unit.name] for unit in units], dtype=torch.float64)
    known_L = alphas_L.isfinite()
    middle = alphas_L[known_L].mean() if bool(known_L.any()) else alphas_L.new_ones(())
    alphas_L = torch.where(known_L, alphas_L, middle)  # nothing is known of its spectra: as the others on average
    return _decisions(units, alphapruning(alphas_L, _target(budget), options.epsilon, _weights(units, options)))


def by_dsa(units: Units, budget: Budget, evidence: Evidence, options: DsaZeros) -> Decisions:
    """A DSA program, over the scores.

    Raises:
        ParedError: a program that is not the default is rejected; says why.
    """
    program, tokens = named(options.program)
    root = math.sqrt(options.score_tokens or tokens)
    scores = [as_scores(evidence.scores[unit.name]).scaled(root) for unit in units]
    legacy, weights_L = options.legacy_nan_to_zero, _weights(units, options)
    verdict = evaluate_program(program, scores, _target(budget), weights_L, legacy_nan_to_zero=legacy)
    if verdict.sparsities_L is not None:
        return _decisions(units, verdict.sparsities_L)
    if options.program == DEFAULT_OF_ZEROS:
        log.warning("allocation dsa: %s; every unit gets the same sparsity", verdict.reasons[0])
        evidence.notes["allocation"] = f"{verdict.reasons[0]}: every unit gets the same sparsity"
        return _decisions(units, uniform(len(units), _target(budget)))
    raise ParedError(f"allocation dsa: {'; '.join(verdict.reasons)}")


def by_loss(units: Units, budget: Budget, evidence: Evidence, options: LossZeros) -> Decisions:
    """The least sum of losses."""
    losses, target = [evidence.losses[unit.name] for unit in units], _target(budget)
    most = max(options.most, target)
    return _decisions(units, least_loss(losses, target, by_parameters=options.by_parameters, most=most))


def _by_er(units: Units, budget: Budget, options: Er, plus: bool) -> Decisions:
    shapes = [unit.shapes[0] for unit in units]
    return _decisions(units, er(shapes, _target(budget), plus=plus, by_parameters=options.by_parameters))


def _target(budget: Budget) -> float:
    assert budget.sparsity is not None, "a budget of zeros"
    return budget.sparsity


def _weights(units: Units, options: UnitOptions) -> torch.Tensor | None:
    """Return what units weigh in the mean, float64 ``(L,)``; none if all weigh the same."""
    return torch.tensor([unit.parameters for unit in units], dtype=torch.float64) if options.by_parameters else None


def _decisions(units: Units, sparsities_L: torch.Tensor) -> Decisions:
    return {unit.name: Sparse(sparsity=sparsity) for unit, sparsity in zip(units, sparsities_L.tolist(), strict=True)}
