"""Dtypes and devices by the names users type."""

import torch

from pared.errors import ParedError
from pared.names import require_known

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_of(name: str | torch.dtype) -> torch.dtype | None:
    """Return the dtype of a name, None for ``auto``.

    Raises:
        ParedError: not a dtype a model is stored or computed in.
    """
    if name == "auto":
        return None
    if isinstance(name, torch.dtype):
        name = str(name).removeprefix("torch.")
    if not isinstance(name, str):
        raise ParedError(f"dtype: expected one of auto, {', '.join(DTYPES)}, found {name!r}")
    require_known("dtype", name, ["auto", *DTYPES])
    return DTYPES[name]


def device_of(name: str) -> torch.device:
    """Return the device of a name.

    Raises:
        ParedError: torch does not know it, or this machine does not have it.
    """
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it holds no values")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ParedError(f"device {name!r} cannot be used here ({str(error).splitlines()[0]}); use cpu") from None
    return device
