"""Which experts of a mixture stay: by the loss that taking them out is expected to cost, or by REAP's score.

With M the second moments of what taking out each expert changes the loss by, to first order and token by token, the
experts R cost ``½ Σ_ij∈R M_ij`` nats a token: the loss is taken to be quadratic, its curvature that of Fisher
information, and changes of several experts to add up. They go one by one, each the cheapest once those before it are
gone.

REAP (Lasby et al., 2025, arXiv 2510.13999) takes out the experts of the least mean, over the tokens that an expert is
given, of the norm of what it makes of one times the router's weight. What that costs it does not say.

Legend of the shape suffixes: E experts.
"""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class MixtureMoments:
    """What was seen of the experts of one mixture.

    Attributes:
        M_EE: second moments per token of the change of the loss that taking out each makes ``(E, E)``; zeros where no
            gradients were there.
        weighted_E: the summed norms of what every expert makes of its tokens, each times the router's weight.
        picks_E: how many tokens each is given.
    """

    M_EE: torch.Tensor
    weighted_E: torch.Tensor
    picks_E: torch.Tensor


@dataclass(frozen=True)
class Experts:
    """Experts in the order in which they stay, the last to go first.

    Attributes:
        order_E: their numbers, int64.
        losses_E: what keeping so many costs, at the number of those that stay minus 1; nats a token, float64. None
            where the score does not say.
    """

    order_E: torch.Tensor
    losses_E: torch.Tensor | None = None

    def kept(self, count: int) -> torch.Tensor:
        """Return the numbers of so many that stay, rising."""
        return self.order_E[:count].sort().values

    def loss(self, count: int) -> float:
        """Return what keeping so many is expected to cost, in nats a token; NaN where that is not known."""
        return math.nan if self.losses_E is None else float(self.losses_E[count - 1])


def by_loss(M_EE: torch.Tensor) -> Experts:
    """Order experts by what each adds to the loss when those before it are gone.

    Args:
        M_EE: second moments per token of the change that taking out each expert makes ``(E, E)``.
    """
    M_EE = M_EE.double()
    gone_E = torch.zeros(len(M_EE), dtype=torch.bool, device=M_EE.device)
    found: list[int] = []
    for _ in range(len(M_EE)):
        added_E = 0.5 * M_EE.diagonal() + M_EE[:, gone_E].sum(dim=1)
        found.append(int(added_E.masked_fill(gone_E, torch.inf).argmin()))
        gone_E[found[-1]] = True
    order_E = torch.tensor(found[::-1], device=M_EE.device)
    ordered = M_EE[order_E][:, order_E].flip(0, 1).cumsum(0).cumsum(1).diagonal()  # of the last 1, 2, ...
    losses_E = 0.5 * torch.cat([ordered.flip(0)[1:], ordered.new_zeros(1)])
    return Experts(order_E, losses_E.clamp(min=0))


def by_reap(weighted_E: torch.Tensor, picks_E: torch.Tensor) -> Experts:
    """Order experts by REAP's score.

    Args:
        weighted_E: the summed norms of what every expert makes of its tokens, each times the router's weight.
        picks_E: how many tokens each is given; one that is given none goes first.
    """
    score_E = weighted_E.double() / picks_E.clamp(min=1)
    return Experts(score_E.argsort(descending=True, stable=True))
