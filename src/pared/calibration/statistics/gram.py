"""Grams: sums of products of every pair of features, of one tensor or of what a site reads on two paths."""

from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch

from pared.calibration.precision import exact_products
from pared.calibration.statistics.base import PRODUCT_ROWS, SUM_ROWS, Moments, Of, StatisticView, Summed, norm, squares

# Columns of one panel of a product, of which only panels on and above the diagonal are computed. Measured on one thread
# without matrix units at 576 to 3,072 features: 128 and 192 are fastest, a single panel takes 1.3 to 1.9 times as long.
PANEL = 192
STRIP = 64  # rows of what is held: from the diagonal to the right, so that about half of a square is


class Gram(Summed):
    """The Gram ``G = Σ xᵀx`` over tokens, ``(features, features)``, not normalised.

    One batch is multiplied in float32 (exactly, for half-precision inputs, with float32 accumulation) and added to a
    float64 total. Only the upper panels are computed, and only strips of 64 rows from the diagonal to the right are
    held, one after the other in one tensor; ``value`` mirrors them.

    Attributes:
        of: ``input``, ``output`` or ``output_grad``: which tensor it is the Gram of.
        features: of that tensor.
        tokens: how many tokens were seen.
        dtype: what the last batch came in; none before the first.
    """

    def __init__(self, features: int, device: torch.device, of: Of = "input") -> None:
        self.dtype: torch.dtype | None = None
        held = sum(min(STRIP, features - start) * (features - start) for start in range(0, features, STRIP))
        super().__init__(features, (held,), device, of)

    def update(self, x: torch.Tensor, grad: torch.Tensor | None = None) -> None:  # noqa: ARG002 - the protocol's
        """Add one batch ``(..., features)``."""
        x_TN = x.reshape(-1, x.shape[-1])
        self.tokens += x_TN.shape[0]
        self.dtype = x.dtype
        with exact_products(x.dtype):
            for rows_TN in torch.split(x_TN, PRODUCT_ROWS):
                self._add(rows_TN.float())

    def _add(self, x_TN: torch.Tensor) -> None:
        """Add some rows, float32."""
        strips = self._strips()
        for _, product_PN in _panels(x_TN):
            _add_panel(strips, product_PN)

    def _strips(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the first row of every strip and the strip, ``(rows, features from the diagonal to the right)``."""
        held = 0
        for start in range(0, self.features, STRIP):
            width = self.features - start
            size = min(STRIP, width) * width
            yield start, self._sum[held : held + size].view(-1, width)
            held += size

    @property
    def value(self) -> torch.Tensor:
        """The Gram ``(features, features)``, float64, symmetric to the last bit."""
        value_NN = self._sum.new_empty(self.features, self.features)
        for start, strip in self._strips():
            stop = start + len(strip)
            corner = strip[:, : len(strip)]
            value_NN[start:stop, start:] = strip
            value_NN[start:, start:stop] = strip.T
            value_NN[start:stop, start:stop] = corner.triu() + corner.triu(1).T
        return value_NN

    def finite(self) -> bool:
        """Whether everything seen so far was a finite number: a sum of squares keeps every NaN and infinity."""
        squares = [strip.diagonal() for _, strip in self._strips()]
        return not squares or bool(torch.cat(squares).isfinite().all())


def _panels(x_TN: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the first row of every panel of ``xᵀx`` and the panel, from the diagonal to the right."""
    for start in range(0, x_TN.shape[1], PANEL):
        x_TP, rest_TN = x_TN[:, start : start + PANEL], x_TN[:, start:]
        product_PN = x_TP.T @ rest_TN
        if not bool(product_PN.diagonal().isfinite().all()):  # squares of finite numbers may leave float32
            product_PN = x_TP.double().T @ rest_TN.double()
        yield start, product_PN


def _add_panel(strips: Iterator[tuple[int, torch.Tensor]], product_PN: torch.Tensor) -> None:
    """Add a panel to the next of the strips, which are as many as it is made of."""
    for offset in range(0, len(product_PN), STRIP):
        _, strip = next(strips)
        strip += product_PN[offset : offset + STRIP, offset:]


def _inverse_roots(energy_N: torch.Tensor) -> torch.Tensor:
    """Return ``1/√e``, and 0 for what has no energy."""
    return torch.where(energy_N > 0, energy_N, torch.inf).rsqrt()


def correlation_shrinkage(square: float, inputs: int, observed: torch.Tensor, tokens: int) -> float:
    """Return how far correlations are to be drawn towards none, 0 to 1: by how they differ between parts of a text.

    Ledoit and Wolf's least error, as Schäfer and Strimmer have it for correlations (Statistical Applications in
    Genetics and Molecular Biology 4, 2005): their summed variance over their squares. A part of the text is one
    observation, since its tokens depend on each other. Of fewer than two parts nothing is known or shrunk.

    Args:
        square: squared Frobenius norm of the correlations R of the whole text, diagonal included.
        inputs: that are not always zero.
        observed: as of :class:`MeanGram`.
        tokens: of all parts.
    """
    squares, weights = (float(one) / max(tokens, 1) ** 2 for one in observed)  # Σ w² ‖R_b‖² and Σ w², w = T_b / T
    variance, distance = squares - weights * square, square - inputs
    if not (0 < weights < 1 and variance > 0 and distance > 0):
        return 0.0
    return min(1.0, variance / (1 - weights) / distance)


class MeanGram(Gram):
    """The Gram of inputs per token, ``E[xᵀx]``: losses weighted by it do not depend on how much text there was.

    Beside it are two numbers, which say how far correlations differ from one part of the text to another.

    Attributes:
        observed: of parts of the text, T neighbouring tokens each, the sum of ``T² ‖R‖²`` with R their correlations,
            and that of ``T²``; ``(2,)``, float64.
    """

    beside: ClassVar[Mapping[str, str]] = {"observed": "parts of the text"}

    def __init__(self, features: int, device: torch.device) -> None:
        super().__init__(features, device)
        self.observed = torch.zeros(2, dtype=torch.float64, device=device)

    @property
    def shrinkage(self) -> float:
        """How far it is to be drawn towards equal energies, 0 to 1, by :func:`correlation_shrinkage`.

        Tokens of a text depend on each other, and energies of inputs differ by orders of magnitude.
        """
        return correlation_shrinkage(*self._correlations(), self.observed, self.tokens)

    def _correlations(self) -> tuple[float, int]:
        """Return the squared Frobenius norm of the correlations, and how many inputs are not always zero."""
        scale_N = _inverse_roots(torch.cat([strip.diagonal() for _, strip in self._strips()]))
        total = 0.0
        for start, strip in self._strips():
            scaled = strip * scale_N[start : start + len(strip), None] * scale_N[start:]
            total += float(2 * scaled.triu(1).square().sum() + scaled.diagonal().square().sum())
        return total, int(scale_N.count_nonzero())

    def _add(self, x_TN: torch.Tensor) -> None:
        energy_N = torch.stack([squares(rows_RN)[1].double() for rows_RN in torch.split(x_TN, SUM_ROWS)]).sum(dim=0)
        scale_N, total = _inverse_roots(energy_N).float(), self.observed.new_zeros(())
        strips = self._strips()
        for start, product_PN in _panels(x_TN):
            _add_panel(strips, product_PN)
            product_PN *= scale_N[start : start + PANEL, None] * scale_N[start:]
            inside, beside = product_PN[:, : len(product_PN)], product_PN[:, len(product_PN) :]
            total += norm(inside).square() + 2 * norm(beside).square()
        self.observed += len(x_TN) ** 2 * torch.stack((total, torch.ones_like(total)))

    @property
    def value(self) -> torch.Tensor:
        """The Gram over the number of tokens ``(features, features)``."""
        return super().value.div_(max(self.tokens, 1))


class GradientGram(Gram, Moments):
    """The Gram of output gradients, and the fourth moment that says how well it is known."""

    beside: ClassVar[Mapping[str, str]] = Moments.beside

    def __init__(self, features: int, device: torch.device) -> None:
        super().__init__(features, device, "output_grad")

    def _add(self, x_TN: torch.Tensor) -> None:
        super()._add(x_TN)
        self.fourth += norm(x_TN, dim=-1).pow(4).sum()

    def update_drawn(self, x_TDN: torch.Tensor) -> None:
        """Add tokens of several draws each, ``(T, D, features)``: the mean over its draws is what a token adds."""
        self.tokens += len(x_TDN)
        self.dtype = x_TDN.dtype
        draws = x_TDN.shape[1]
        with exact_products(torch.float32):
            for rows in torch.split(x_TDN, max(PRODUCT_ROWS // draws, 1)):
                rows_TDN = rows.float() * draws**-0.5
                super()._add(rows_TDN.flatten(0, 1))
                self.fourth += norm(rows_TDN @ rows_TDN.mT).square()

    def _sum_of_squares(self) -> torch.Tensor:
        upper = [2 * strip.triu(1).square().sum() + strip.diagonal().square().sum() for _, strip in self._strips()]
        return torch.stack(upper).sum()

    def _trace(self) -> torch.Tensor:
        return torch.cat([strip.diagonal() for _, strip in self._strips()]).sum()


CROSS = "cross"  # the name of the statistic below, which a pass over two paths adds to those that are asked for


class Cross(Summed):
    """What a site reads on two paths, ``E[xᵀx']`` per token, ``(features, features)``, float64.

    Of the dense path ``x`` and of the compressed one ``x'``, the same tokens in both. Where a batch sends a site other
    tokens on the two paths (a routed expert) nothing is added, and ``tokens`` falls behind those of a Gram.

    Attributes:
        of: ``input_pair``.
        features: that the site reads.
        tokens: how many tokens were seen.
    """

    def __init__(self, features: int, device: torch.device) -> None:
        super().__init__(features, (features, features), device, "input_pair")

    def update(self, dense: torch.Tensor, own: torch.Tensor | None = None) -> None:
        """Add one batch of both, ``(..., features)``, row by row the same tokens."""
        assert own is not None
        x_TN, own_TN = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (dense, own))
        self.tokens += len(own_TN)
        with exact_products(own.dtype):
            for x_RN, own_RN in zip(torch.split(x_TN, PRODUCT_ROWS), torch.split(own_TN, PRODUCT_ROWS), strict=True):
                self._sum += x_RN.float().T @ own_RN.float()

    @property
    def value(self) -> torch.Tensor:
        """The mean over tokens ``(features, features)``."""
        return self._sum / max(self.tokens, 1)


def cross_of(own: Mapping[str, StatisticView], gram: str) -> StatisticView | None:
    """Return what a site reads on two paths, if that is of the same tokens as its Gram of this name."""
    cross = own.get(CROSS)
    return cross if cross is not None and gram in own and cross.tokens == own[gram].tokens else None
