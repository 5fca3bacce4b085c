"""What taking an expert out does to the loss: sums over tokens, of a backward pass.

Legend: T tokens, E experts of one mixture.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch

from pared.calibration.statistics.base import Summed

EXPERTS = "experts"  # name of the statistic


class ExpertLoss(Summed):
    """Second moments, over tokens, of the change of the loss that taking out each expert makes, ``(E, E)``, float64.

    With ``u_j = gᵀ(y_j - y)``, ``y`` what the experts make of a token, ``y_j`` what they make of it where the router
    does not know expert j, and ``g`` the gradient of the loss with respect to it, the loss is expected to grow by
    ``½ E[(Σ_R u_j)²]`` where the experts R go: its curvature is that of Fisher information, labels sampled from the
    model's own predictions.

    Attributes:
        weighted: for every expert the sum of the norms of what it makes of the tokens it is given, each times the
            router's weight: over ``picks`` it is REAP's score (arXiv 2510.13999); float64.
        picks: how many tokens it is given.
    """

    beside: ClassVar[Mapping[str, str]] = {"weighted": "norms of experts", "picks": "tokens of experts"}

    def __init__(self, experts: int, device: torch.device) -> None:
        super().__init__(experts, (experts, experts), device, "output_grad")
        self.weighted, self.picks = (torch.zeros(experts, dtype=torch.float64, device=device) for _ in range(2))

    def update(self, x: torch.Tensor, grad: torch.Tensor | None = None) -> None:
        """Add one batch.

        Args:
            x: ``u`` of every token and expert ``(T, E)``; of several draws of labels side by side, ``(T, D · E)``, of
                which a token adds the mean.
            grad: the norm of what an expert makes of a token, times its weight ``(T, E)``; NaN where it is not picked.
        """
        assert grad is not None
        norm_TE = grad.double()
        u_RE = x.double().reshape(-1, norm_TE.shape[1])  # a row for every draw
        self._sum += u_RE.T @ u_RE * (len(norm_TE) / max(len(u_RE), 1))
        self.weighted += norm_TE.nansum(dim=0)
        self.picks += (~norm_TE.isnan()).sum(dim=0)
        self.tokens += len(norm_TE)

    @property
    def value(self) -> torch.Tensor:
        """The second moments per token."""
        return self._sum / max(self.tokens, 1)

    def finite(self) -> bool:
        """Whether everything seen so far was a finite number."""
        return super().finite() and bool(self.weighted.isfinite().all())
