"""A linear layer as a weighted sum of its bases, while Basel learns what they are worth."""

import torch
from torch import nn
from torch.nn import functional

from pared.training.basel.bases import Bases, bases_of_weight
from pared.training.distributed import gathered

NEGLIGIBLE = 1e-3  # times the mean singular value: bases below are not taken up


class BasisLinear(nn.Module):
    """``y = x Wᵀ + b`` with ``W = U diag(w² · mask) Vᵀ + U_new V_new``.

    U and V are frozen, the importance of every basis (w) is learned, and a few new bases are learned whole,
    from the first step. A dropped basis has no gradient and does not come back.

    Args:
        weight_ON: the weight ``(out, in)``.
        bias_O: its bias, trained.
        new: number of new bases.
        dtype: what U and V are held in.
        generator: draws the new bases.
        bases: of the weight; its singular vectors and values if not given.

    Attributes:
        U: ``(out, K)`` buffer, the bases that are left, at first the R worth more than 1e-3 of the mean.
        V: ``(K, in)`` buffer.
        left: which of the R those are, int64 ``(K,)`` buffer.
        w: ``(R,)`` float32; the coefficient of a basis is its square, so never negative.
        mask: bool ``(R,)``, True for bases that are left.
        mass: float32 buffer, the share of the bases' worth that prunes have left: the product over all of them.
        U_new: ``(out, new)`` float32, zeros at first.
        V_new: ``(new, in)`` float32, drawn from N(0, 1 / new).
    """

    U: torch.Tensor
    V: torch.Tensor
    left: torch.Tensor
    mask: torch.Tensor
    mass: torch.Tensor

    def __init__(
        self,
        weight_ON: torch.Tensor,
        bias_O: torch.Tensor | None,
        new: int,
        dtype: torch.dtype,
        generator: torch.Generator | None = None,
        bases: Bases | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_ON.shape
        place = weight_ON.device
        U_OR, c_R, V_RN = bases or bases_of_weight(weight_ON)
        count = int((c_R / c_R.mean() > NEGLIGIBLE).sum())
        self.register_buffer("U", U_OR[:, :count].to(dtype).contiguous(), persistent=False)
        self.register_buffer("V", V_RN[:count].to(dtype).contiguous(), persistent=False)
        self.register_buffer("left", torch.arange(count, device=place), persistent=False)
        self.register_buffer("mask", torch.ones(count, dtype=torch.bool, device=place))
        self.register_buffer("mass", torch.ones((), device=place))
        self.w = nn.Parameter(c_R[:count].sqrt().float())
        drawn = torch.randn(new, self.in_features, generator=generator).to(place)
        self.U_new = nn.Parameter(torch.zeros(self.out_features, new, device=place), requires_grad=new > 0)
        self.V_new = nn.Parameter(drawn / max(1, new) ** 0.5, requires_grad=new > 0)
        self.bias = None if bias_O is None else nn.Parameter(bias_O.detach().float().clone())

    @property
    def coefficients(self) -> torch.Tensor:
        """What every basis is worth, 0 for those that were dropped, ``(R,)`` float32, detached."""
        return gathered(self.w.detach()).square() * self.mask

    @property
    def rank(self) -> int:
        """The most the weight's rank can be: bases left and new ones."""
        return int(self.mask.sum()) + self.U_new.shape[1]

    def keep_(self, mask_R: torch.Tensor) -> None:
        """Drop every basis for which the mask is False; none comes back."""
        self.mask &= mask_R

    def effective_weight(self) -> torch.Tensor:
        """Return the weight ``(out, in)`` as it is now, float32, detached."""
        self._let_go()
        with torch.no_grad():
            return self._sum_of_bases() + self.U_new.float() @ self.V_new.float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(..., in)`` to ``(..., out)`` by whichever order of products is fewer operations."""
        self._let_go()
        tokens, kept = x.numel() // self.in_features, len(self.left)
        m, n = self.out_features, self.in_features
        if kept * m * n + tokens * m * n <= tokens * kept * (m + n):
            y = functional.linear(x, self._sum_of_bases().to(x.dtype), self._bias(x))
        else:
            inner = functional.linear(x, self.V.to(x.dtype)) * self._worth().to(x.dtype)
            y = functional.linear(inner, self.U.to(x.dtype), self._bias(x))
        return y + functional.linear(functional.linear(x, self.V_new.to(x.dtype)), self.U_new.to(x.dtype))

    def _sum_of_bases(self) -> torch.Tensor:
        """Return ``U diag(w²) Vᵀ`` in float32, also where products are made in less: the weight is rounded once."""
        with torch.autocast(self.U.device.type, enabled=False):
            return (self.U.float() * self._worth()) @ self.V.float()

    def _worth(self) -> torch.Tensor:
        return self.w.index_select(0, self.left).square()

    def _bias(self, x: torch.Tensor) -> torch.Tensor | None:
        return None if self.bias is None else self.bias.to(x.dtype)

    def _let_go(self) -> None:
        """Release the bases that were dropped since the last look, here or by a mask put back from a file."""
        stays_K = self.mask[self.left]
        if not bool(stays_K.all()):
            self.U, self.V = self.U[:, stays_K].contiguous(), self.V[stays_K].contiguous()
            self.left = self.left[stays_K]

    def extra_repr(self) -> str:
        """Return the shape for printing."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bases={int(self.mask.sum())}, "
            f"new={self.U_new.shape[1]}"
        )
