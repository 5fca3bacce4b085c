"""Where pared runs: dtypes and devices by the names users type, versions, this machine, and its memory."""

import functools
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from pared.errors import ParedError
from pared.names import did_you_mean, require_known

if TYPE_CHECKING:  # names can be checked without it
    import torch

__version__ = version("pared")

DTYPES = ("float32", "bfloat16", "float16")
DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu", "npu", "xla", "mtia")
VARIABLE = "PARED_COMPUTE_DTYPE"  # settles what float32 models are computed in


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
        raise ParedError(f"dtype: expected one of auto, {', '.join(DTYPES)}, got {name!r}")
    require_known("dtype", name, ["auto", *DTYPES])


def require_device(name: str) -> None:
    """Refuse what is no name of a device, whatever this machine has.

    Raises:
        ParedError: names the nearest there is.
    """
    kind, colon, index = name.partition(":")
    if name != "auto" and (kind not in DEVICES or (colon and not index.isdigit())):
        raise ParedError(f"device {name!r} cannot be used: {did_you_mean(kind, DEVICES)}, with :0, :1, ... behind it "
                         "where there are several; if in doubt use cpu")  # fmt: skip


def device_of(name: str) -> "torch.device":
    """Return the device of a name; ``auto`` is the GPU where there is one (CUDA), and the CPU elsewhere.

    A process that a launcher started with others on its machine takes the GPU of its own number. Apple's (``mps``) has
    no float64, which statistics are added up in, and is never taken unasked.

    Raises:
        ParedError: torch does not know it, or this machine does not have it.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and os.environ.get("LOCAL_RANK", "").isdigit():
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it holds no values")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ParedError(f"device {name!r} cannot be used here ({str(error).splitlines()[0]}); use cpu") from None
    return device


def choose_dtype(asked: str, model_dtype: "torch.dtype", device: "torch.device") -> "torch.dtype":
    """Return what the blocks compute in: what was asked or, for ``auto``, the faster exact choice.

    ``auto`` keeps a half-precision model as it is; a float32 model runs in bfloat16 where this machine multiplies
    matrices clearly faster in it (measured once a process, a few milliseconds), and in float32 elsewhere. The
    environment variable ``PARED_COMPUTE_DTYPE`` settles what a float32 model runs in without measuring, so that one
    recipe does the same on every machine.

    Raises:
        ParedError: not a dtype, in ``asked`` or in the variable.
    """
    import torch

    if (chosen := dtype_of(asked)) is not None:
        return chosen
    if model_dtype in (torch.bfloat16, torch.float16):
        return model_dtype
    if settled := os.environ.get(VARIABLE):
        require_known(f"dtype in the environment variable {VARIABLE}", settled, DTYPES)
        found: torch.dtype = getattr(torch, settled)
        return found
    return torch.bfloat16 if _bfloat16_is_faster(device) else model_dtype


@functools.cache
def _bfloat16_is_faster(device: "torch.device") -> bool:
    import torch

    return _seconds(torch.float32, device) > 1.3 * _seconds(torch.bfloat16, device)


def _seconds(dtype: "torch.dtype", device: "torch.device") -> float:
    import torch

    x = torch.ones(512, 512, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        x @ x
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def versions() -> dict[str, str]:
    """Return the versions a result depends on."""
    return {
        "pared": version("pared"),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "python": platform.python_version(),
    }


def machine() -> dict[str, str]:
    """Return what this machine is, as far as results depend on it."""
    import torch

    gpu = {"cuda": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {"platform": platform.platform(), "threads": str(torch.get_num_threads()), **gpu}


def processors() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def resident_memory_bytes() -> int:
    """Return the resident memory of this process now; 0 where the system does not say (without ``/proc``)."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


def peak_memory_bytes() -> int:
    """Return the highest resident memory of this process so far; with CUDA, the highest allocated memory."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would also count what the parent held when it started this process
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
