"""How many problems are solved if k programs may be tried for each (Chen et al., 2021, arXiv 2107.03374)."""

import math
from collections.abc import Sequence


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Return the chance that one of k of the samples is right, ``1 - C(n - c, k) / C(n, k)``: unbiased.

    Args:
        samples: n, drawn for a problem.
        right: c, of them that pass.
        k: that may be tried, at most n.

    Raises:
        ValueError: k or the number of right ones is not between its limits.
    """
    if not 1 <= k <= samples or not 0 <= right <= samples:
        raise ValueError(f"pass@{k} of {samples} samples, {right} of them right: expected 1 to {samples} tries")
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def mean_pass_at_k(counts: Sequence[tuple[int, int]], k: int) -> float:
    """Return the mean over problems, each given as (samples, right)."""
    return sum(pass_at_k(samples, right, k) for samples, right in counts) / len(counts)
