"""NaN and infinity in weights: a damaged download shows there, in rows that no check by answers may read."""

import torch
from torch import nn

from pared.errors import DamagedError


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a floating point tensor holds numbers only; one pass without a copy, at the speed of memory."""
    if not tensor.numel():
        return True
    least, most = (tensor.float() if tensor.itemsize < 2 else tensor).detach().aminmax()  # a NaN makes both NaN
    return bool(least.isfinite() & most.isfinite())


def require_finite(model: nn.Module, name: str, prefix: str = "") -> None:
    """Check that no parameter holds NaN or infinity; buffers may, as masks do.

    Args:
        model: loaded, or a part of it.
        name: of the model, for the message.
        prefix: name of the part.

    Raises:
        ParedError: one does; names the first and how many numbers of it are affected.
    """
    for tensor, values in model.named_parameters(prefix=prefix):
        if values.is_meta or not values.is_floating_point() or is_finite(values):
            continue
        wrong = int((~values.float().isfinite()).sum())
        raise DamagedError(
            f"model {name!r}: {tensor} holds NaN or infinity in {wrong:,} of {values.numel():,} values, as "
            f"{values.dtype}",
            "the checkpoint is damaged: fetch it again; or its values are too large for that dtype: load it in float32",
        )
