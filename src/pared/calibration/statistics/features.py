"""Statistics of single features: one number each."""

import torch

from pared.calibration.statistics.base import SUM_ROWS, Moments, Of, Summed, norm, squares


class Energy(Moments):
    """The energy ``Σ x²`` of every feature over tokens, ``(features,)``, float64, not normalised.

    Attributes:
        of: ``input`` or ``output_grad``: which tensor's features.
        features: of that tensor.
        tokens: how many tokens were seen.
    """

    def __init__(self, features: int, device: torch.device, of: Of = "input") -> None:
        super().__init__(features, (features,), device, of)

    def update(self, x: torch.Tensor, grad: torch.Tensor | None = None) -> None:  # noqa: ARG002 - the protocol's
        """Add one batch ``(..., features)``, summed in float32."""
        x_TN = x.reshape(-1, x.shape[-1])
        self.tokens += x_TN.shape[0]
        for rows_TN in torch.split(x_TN, SUM_ROWS):
            squares_TN, energy_N = squares(rows_TN)
            self._sum += energy_N
            self.fourth += norm(squares_TN).square()

    def update_drawn(self, x_TDN: torch.Tensor) -> None:
        """Add tokens of several draws each, ``(T, D, features)``: the mean over its draws is what a token adds."""
        self.tokens += len(x_TDN)
        draws = x_TDN.shape[1]
        for rows_TDN in torch.split(x_TDN, max(SUM_ROWS // draws, 1)):
            squares_RN, energy_N = squares(rows_TDN.flatten(0, 1))
            self._sum += energy_N / draws
            self.fourth += norm(squares_RN.reshape(-1, draws, self.features).mean(dim=1)).square()

    def _sum_of_squares(self) -> torch.Tensor:
        return self._sum.square().sum()

    def _trace(self) -> torch.Tensor:
        return self._sum.sum()


class Mean(Summed):
    """The mean of every feature over tokens, ``(features,)`` float64.

    Attributes:
        of: ``input``.
        features: that the site reads.
        tokens: how many tokens were seen.
    """

    def __init__(self, features: int, device: torch.device) -> None:
        super().__init__(features, (features,), device, "input")

    def update(self, x: torch.Tensor, grad: torch.Tensor | None = None) -> None:  # noqa: ARG002 - the protocol's
        """Add one batch ``(..., features)``, summed in float32."""
        x_TN = x.reshape(-1, x.shape[-1])
        self.tokens += x_TN.shape[0]
        for rows_TN in torch.split(x_TN, SUM_ROWS):
            self._sum += rows_TN.float().sum(dim=0)

    @property
    def value(self) -> torch.Tensor:
        """The mean over tokens ``(features,)``."""
        return self._sum / max(self.tokens, 1)


class Magnitude(Mean):
    """The mean magnitude of every feature over tokens, ``(features,)`` float64 (ASVD)."""

    def update(self, x: torch.Tensor, grad: torch.Tensor | None = None) -> None:
        """Add one batch ``(..., features)``."""
        super().update(x.abs(), grad)


class Variance(Summed):
    """The variance of every feature over tokens, ``(features,)`` float64 (FLAP).

    Held are the sums of a feature and of its square. Their difference is as exact as float32 sums of 256 squares are:
    to about 1e-7 of the mean square.

    Attributes:
        of: ``input``.
        features: that the site reads.
        tokens: how many tokens were seen.
    """

    def __init__(self, features: int, device: torch.device) -> None:
        super().__init__(features, (2, features), device, "input")

    def update(self, x: torch.Tensor, grad: torch.Tensor | None = None) -> None:  # noqa: ARG002 - the protocol's
        """Add one batch ``(..., features)``, summed in float32."""
        x_TN = x.reshape(-1, x.shape[-1])
        self.tokens += x_TN.shape[0]
        for rows_TN in torch.split(x_TN, SUM_ROWS):
            self._sum[0] += rows_TN.float().sum(dim=0)
            self._sum[1] += squares(rows_TN)[1]

    @property
    def value(self) -> torch.Tensor:
        """The variance about the mean over tokens ``(features,)``, at least 0."""
        mean_N, square_N = self._sum / max(self.tokens, 1)
        return (square_N - mean_N.square()).clamp(min=0)
