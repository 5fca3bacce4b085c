"""From a program and the scores of every block to sparsities, and whether the answer may be used at all."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pared.allocation.dsa import rounding
from pared.allocation.dsa.grammar import Program
from pared.allocation.dsa.names import Sign
from pared.allocation.dsa.operators import POST, PRE, REDUCE
from pared.allocation.dsa.scores import ScoreHistogram, Scores, as_scores
from pared.allocation.sparsity_budget import SAME, require_sparsity, same, shares, spread
from pared.errors import ParedError

ROUNDING = 0.01  # share of the differences between blocks that rounding may decide
KEY_DIGITS = 9  # allocations that agree to so many decimals are one


@dataclass(frozen=True, eq=False)
class ProgramResult:
    """What became of a program.

    Attributes:
        program: what was judged.
        importance_L: its number for every block; None if one is undefined.
        sparsities_L: of every block; None if the program is rejected.
        reasons: why it is rejected, for a journal; empty if it is valid.
        notes: what a reader should know of a valid one.
    """

    program: Program
    importance_L: torch.Tensor | None = None
    sparsities_L: torch.Tensor | None = None
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def valid(self) -> bool:
        """Whether the sparsities may be used."""
        return not self.reasons


def importance(
    program: Program,
    scores_by_block: Sequence[Scores | ScoreHistogram | torch.Tensor],
    *,
    legacy_nan_to_zero: bool = False,
    legacy_inf_to_minus_one: bool = False,
) -> torch.Tensor:
    """Return a program's number for every block, float64 ``(L,)`` on the CPU.

    Args:
        program: what to evaluate.
        scores_by_block: the scores of all weights of each block, as a histogram or as they are.
        legacy_nan_to_zero: take a number that is undefined at the end as 0.0, as the released code does.
        legacy_inf_to_minus_one: take an infinite one as -1, as the released code does. With either, only the end is
            looked at; without them an operator that leaves the finite numbers on the way is an error.

    Raises:
        ParedError: there are no blocks, or a number is not finite; says of which block and by which operator.
    """
    return _evaluated(program, scores_by_block, legacy_nan_to_zero, legacy_inf_to_minus_one)[0]


def _evaluated(
    program: Program,
    scores_by_block: Sequence[Scores | ScoreHistogram | torch.Tensor],
    nan_to_zero: bool,
    inf_to_minus_one: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a program's number for every block, and how far rounding may have moved it, both ``(L,)``."""
    shares(len(scores_by_block), None)
    legacy = nan_to_zero or inf_to_minus_one
    reduced, bounds = [], []
    for block, found in enumerate(scores_by_block):
        scores = as_scores(found)
        x_N, w_N = scores.values_N, scores.weights_N
        e_N = rounding.UNIT * x_N.abs()
        for name in program.pre:
            y_N = PRE[name].apply(x_N, w_N)
            _require_finite(program, name, y_N, block, legacy)
            x_N, e_N = y_N, rounding.of_vector(name, x_N, w_N, e_N, y_N)
        y = REDUCE[program.reduce].apply(x_N, w_N)
        _require_finite(program, program.reduce, y, block, legacy)
        bounds.append(rounding.of_reduction(program.reduce, x_N, w_N, e_N, y).cpu())
        reduced.append(y.cpu())
    y_L, e_L = torch.stack(reduced), torch.stack(bounds)
    for name in program.post:
        x_L, y_L = y_L, POST[name].apply(y_L)
        e_L = rounding.of_scalars(name, x_L, e_L, y_L)
        for block, y in enumerate(y_L):
            _require_finite(program, name, y, block, legacy)
    for undefined, replaced_L, value in ((nan_to_zero, y_L.isnan(), 0.0), (inf_to_minus_one, y_L.isinf(), -1.0)):
        if undefined:
            y_L, e_L = torch.where(replaced_L, value, y_L), torch.where(replaced_L, 0.0, e_L)
    for block, y in enumerate(y_L):
        _require_finite(program, "the end", y, block, False)
    return y_L, e_L


def sparsities(
    importance_L: torch.Tensor, sparsity: float, width: float, sign: Sign, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Return ``s_l = S ± 2λ (a_l - mean a)`` with ``a`` the importance moved and stretched to [0, 1] (section 3).

    Args:
        importance_L: one number for every block ``(L,)``.
        sparsity: the mean S.
        width: λ.
        sign: ``prune`` gives a high number a high sparsity, as the released code does; ``keep`` a low one.
        weights: parameters of the blocks ``(L,)``; every block counts the same if none.

    Raises:
        ParedError: the numbers are constant or not finite, or the target is out of range.
    """
    if constant := _constant(importance_L):
        raise ParedError(constant)
    return spread(importance_L, sparsity, width, sign, weights)


def evaluate_program(
    program: Program,
    scores_by_block: Sequence[Scores | ScoreHistogram | torch.Tensor],
    sparsity: float,
    weights: torch.Tensor | None = None,
    *,
    legacy_nan_to_zero: bool = False,
    legacy_inf_to_minus_one: bool = False,
) -> ProgramResult:
    """Return the sparsities of a program, or why it is rejected before anything is pruned.

    Rejected are numbers that are not finite, numbers that are the same for all blocks (a range of at most
    1e-8 of their size, where the paper's check would be absolute) or differ by little more than the rounding of what
    they were made from, and sparsities outside [0, 1) or of another mean.

    Args:
        program: what to judge.
        scores_by_block: as in :func:`importance`.
        sparsity: the mean.
        weights: as in :func:`sparsities`.
        legacy_nan_to_zero: as in :func:`importance`.
        legacy_inf_to_minus_one: as in :func:`importance`.

    Raises:
        ParedError: the target or the weights are out of range, or there are no blocks: not the program's fault.
    """
    blocks = [as_scores(found) for found in scores_by_block]
    shares(len(blocks), weights)
    require_sparsity(sparsity)
    try:
        importance_L, bound_L = _evaluated(program, blocks, legacy_nan_to_zero, legacy_inf_to_minus_one)
    except ParedError as undefined:
        return ProgramResult(program, reasons=(str(undefined),))
    if constant := _constant(importance_L) or _rounding(importance_L, bound_L):
        return ProgramResult(program, importance_L, reasons=(constant,))
    found_L = sparsities(importance_L, sparsity, program.width, program.sign, weights)
    reasons = validation_errors(found_L, sparsity, weights)
    if reasons:
        return ProgramResult(program, importance_L, reasons=reasons)
    reached = float(found_L.max() - found_L.min())
    notes: tuple[str, ...] = ()
    if reached < 2 * program.width - 1e-9:
        notes = (f"a limit of [0, 1) cut the spread of sparsities from {2 * program.width:g} to {reached:.4g}",)
    return ProgramResult(program, importance_L, found_L, notes=notes)


def validation_errors(
    sparsities_L: torch.Tensor, sparsity: float, weights: torch.Tensor | None = None
) -> tuple[str, ...]:
    """Return what is wrong with sparsities: outside [0, 1), or of another mean by more than 1e-6."""
    found = []
    for block, s in enumerate(sparsities_L.tolist()):
        if not 0 <= s < 1:
            found.append(f"the sparsity of block {block} is {s:g}; expected a number in [0, 1)")
    mean = float(shares(len(sparsities_L), weights) @ sparsities_L.double())
    if not abs(mean - sparsity) <= 1e-6:
        found.append(f"the mean sparsity is {mean:g}; expected {sparsity:g}")
    return tuple(found)


def allocation_key(sparsities_L: torch.Tensor) -> tuple[int, ...]:
    """Return what two allocations have in common if they are one, so that a search evaluates it once."""
    return tuple(round(s * 10**KEY_DIGITS) for s in sparsities_L.tolist())


def _constant(importance_L: torch.Tensor) -> str:
    """Return why an importance tells no block from another; empty if it does."""
    if not same(importance_L):
        return ""
    low, high = float(importance_L.min()), float(importance_L.max())
    return (
        f"the importance is the same for all {len(importance_L)} blocks, {low:.9g} to {high:.9g}; "
        f"a range above {SAME:g} of its size is needed to tell them apart"
    )


def _rounding(importance_L: torch.Tensor, bound_L: torch.Tensor) -> str:
    """Return why an importance is one of rounding, where all that was computed cancels; empty if it is not."""
    width, bound = float(importance_L.max() - importance_L.min()), float(bound_L.max())
    if bound <= ROUNDING * width:  # false for NaN too
        return ""
    return (
        f"the importance differs by {width:.3g} between {len(importance_L)} blocks, and the rounding of what it is "
        f"made from may move it by {bound:.3g}: nothing but cancellation is left to tell them apart"
    )


def _require_finite(program: Program, name: str, x: torch.Tensor, block: int, legacy: bool) -> None:
    if legacy or bool(x.isfinite().all()):
        return
    what = "undefined" if bool(x.isnan().any()) else "infinite"
    raise ParedError(f"program {program}: {name} of block {block} is {what}")
