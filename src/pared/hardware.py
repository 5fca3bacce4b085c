"""Dtypes and devices by the names users type."""

from typing import TYPE_CHECKING

from pared.errors import ParedError
from pared.names import did_you_mean, require_known

if TYPE_CHECKING:  # names can be checked without it
    import torch

DTYPES = ("float32", "bfloat16", "float16")
DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu", "npu", "xla", "mtia")


def dtype_of(name: "str | torch.dtype") -> "torch.dtype | None":
    """Return the dtype of a name, None for ``auto``.

    Raises:
        ParedError: not a dtype a model is stored or computed in.
    """
    if name == "auto":
        return None
    told = name if isinstance(name, str) or type(name).__name__ != "dtype" else str(name).removeprefix("torch.")
    require_dtype(told)
    import torch

    found: torch.dtype = getattr(torch, str(told))
    return found


def require_dtype(name: object) -> None:
    """Refuse the name of a dtype that no model is stored or computed in.

    Raises:
        ParedError: names the nearest there is.
    """
    if not isinstance(name, str):
        raise ParedError(f"dtype: expected one of auto, {', '.join(DTYPES)}, found {name!r}")
    require_known("dtype", name, ["auto", *DTYPES])


def require_device(name: str) -> None:
    """Refuse what is no name of a device, whatever this machine has.

    Raises:
        ParedError: names the nearest there is.
    """
    kind, colon, index = name.partition(":")
    if kind not in DEVICES or (colon and not index.isdigit()):
        raise ParedError(f"device {name!r} cannot be used: {did_you_mean(kind, DEVICES)}, with :0, :1, ... behind it "
                         "where there are several; if in doubt use cpu")  # fmt: skip


def device_of(name: str) -> "torch.device":
    """Return the device of a name.

    Raises:
        ParedError: torch does not know it, or this machine does not have it.
    """
    import torch

    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it holds no values")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ParedError(f"device {name!r} cannot be used here ({str(error).splitlines()[0]}); use cpu") from None
    return device
