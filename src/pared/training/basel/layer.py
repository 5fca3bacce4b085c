"""A linear layer as a weighted sum of its bases, while Basel learns what they are worth."""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

NEGLIGIBLE = 1e-3  # times the mean singular value: bases below are not taken up


class _Left(NamedTuple):
    """The bases a mask leaves."""

    mask_R: torch.Tensor
    left_K: torch.Tensor
    U_OK: torch.Tensor
    V_KN: torch.Tensor


class BasisLinear(nn.Module):
    """``y = x Wᵀ + b`` with ``W = U diag(w² · mask) Vᵀ + U_new V_new``.

    U and V are frozen, what every basis is worth (w) is learned, and a few new bases beside them are learned whole,
    from the first step. A dropped basis has no gradient and does not come back.

    Args:
        weight_ON: the weight ``(out, in)``, decomposed in float64.
        bias_O: its bias, trained.
        new: number of new bases.
        dtype: what U and V are held in.
        generator: draws the new bases.

    Attributes:
        U: ``(out, R)`` buffer, R the bases above 1e-3 of the mean singular value; orthonormal up to rounding.
        V: ``(R, in)`` buffer.
        w: ``(R,)`` float32; the coefficient of a basis is its square, so never negative.
        mask: bool ``(R,)``, True for bases that are left.
        U_new: ``(out, new)`` float32, zeros at first.
        V_new: ``(new, in)`` float32, drawn from N(0, 1 / new).
    """

    U: torch.Tensor
    V: torch.Tensor
    mask: torch.Tensor

    def __init__(
        self,
        weight_ON: torch.Tensor,
        bias_O: torch.Tensor | None,
        new: int,
        dtype: torch.dtype,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_ON.shape
        place = weight_ON.device
        U_OR, s_R, V_RN = torch.linalg.svd(weight_ON.detach().double(), full_matrices=False)
        count = int((s_R / s_R.mean() > NEGLIGIBLE).sum())
        self.register_buffer("U", U_OR[:, :count].to(dtype).contiguous(), persistent=False)
        self.register_buffer("V", V_RN[:count].to(dtype).contiguous(), persistent=False)
        self.register_buffer("mask", torch.ones(count, dtype=torch.bool, device=place))
        self.w = nn.Parameter(s_R[:count].sqrt().float())
        drawn = torch.randn(new, self.in_features, generator=generator).to(place)
        self.U_new = nn.Parameter(torch.zeros(self.out_features, new, device=place))
        self.V_new = nn.Parameter(drawn / max(1, new) ** 0.5)
        self.bias = None if bias_O is None else nn.Parameter(bias_O.detach().float().clone())
        self._left: _Left | None = None

    @property
    def coefficients(self) -> torch.Tensor:
        """What every basis is worth, 0 for those that were dropped, ``(R,)`` float32, detached."""
        return self.w.detach().square() * self.mask

    @property
    def rank(self) -> int:
        """The most the weight's rank can be: bases left and new ones."""
        return int(self.mask.sum()) + self.U_new.shape[1]

    def keep_(self, mask_R: torch.Tensor) -> None:
        """Drop every basis for which the mask is False; none comes back."""
        self.mask &= mask_R

    def effective_weight(self) -> torch.Tensor:
        """Return the weight ``(out, in)`` as it is now, float32, detached."""
        with torch.no_grad():
            W_ON = (self.U.float() * self.coefficients) @ self.V.float()
            return W_ON + self.U_new.float() @ self.V_new.float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(..., in)`` to ``(..., out)`` by whichever order of products is fewer operations."""
        left_K, U_OK, V_KN = self._bases()
        worth_K = self.w.index_select(0, left_K).square()
        tokens, kept = x.numel() // self.in_features, len(left_K)
        m, n = self.out_features, self.in_features
        if kept * m * n + tokens * m * n <= tokens * kept * (m + n):
            # The weight is made in float32 from bases that may be held in less: a product of such would be rounded.
            W_ON = (U_OK.float() * worth_K) @ V_KN.float()
            y = functional.linear(x, W_ON.to(x.dtype), self._bias(x))
        else:
            inner = functional.linear(x, V_KN.to(x.dtype)) * worth_K.to(x.dtype)
            y = functional.linear(inner, U_OK.to(x.dtype), self._bias(x))
        return y + functional.linear(functional.linear(x, self.V_new.to(x.dtype)), self.U_new.to(x.dtype))

    def _bias(self, x: torch.Tensor) -> torch.Tensor | None:
        return None if self.bias is None else self.bias.to(x.dtype)

    def _bases(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the places of the bases that are left, and those, gathered once after every change of the mask."""
        if self._left is None or not torch.equal(self._left.mask_R, self.mask):
            left_K = self.mask.nonzero().flatten()
            whole = len(left_K) == len(self.mask)
            U_OK, V_KN = (self.U, self.V) if whole else (self.U[:, left_K].contiguous(), self.V[left_K])
            self._left = _Left(self.mask.clone(), left_K, U_OK, V_KN)
        return self._left.left_K, self._left.U_OK, self._left.V_KN

    def extra_repr(self) -> str:
        """Return the shape for printing."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bases={int(self.mask.sum())}, "
            f"new={self.U_new.shape[1]}"
        )
