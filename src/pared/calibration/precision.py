"""What the blocks compute in, and products of half-precision inputs that lose nothing."""

import functools
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pared.hardware import DTYPES, dtype_of
from pared.names import require_known

HALF = (torch.bfloat16, torch.float16)
VARIABLE = "PARED_COMPUTE_DTYPE"


def choose_dtype(asked: str, model_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return what the blocks compute in: what was asked or, for ``auto``, the faster honest choice.

    ``auto`` keeps a half-precision model as it is; a float32 model runs in bfloat16 where this machine multiplies
    matrices clearly faster in it (measured once a process, a few milliseconds), and in float32 elsewhere. The
    environment variable ``PARED_COMPUTE_DTYPE`` settles what a float32 model runs in without measuring, so that one
    recipe does the same on every machine.

    Raises:
        ParedError: not a dtype, in ``asked`` or in the variable.
    """
    if (chosen := dtype_of(asked)) is not None:
        return chosen
    if model_dtype in HALF:
        return model_dtype
    if settled := os.environ.get(VARIABLE):
        require_known(f"dtype in the environment variable {VARIABLE}", settled, DTYPES)
        found: torch.dtype = getattr(torch, settled)
        return found
    return torch.bfloat16 if _bfloat16_is_faster(device) else model_dtype


@contextmanager
def exact_products(dtype: torch.dtype) -> Iterator[None]:
    """Let float32 products of values that came from ``dtype`` use the fast units that multiply those exactly.

    A bfloat16 value has 8 significant bits, so rounding it to bfloat16 (CPU) or TF32 (CUDA) inside a float32 matrix
    product changes nothing, and the sum is still accumulated in float32. float16 (11 bits) is exact in TF32 only.
    Any other input is multiplied in full float32, also after ``torch.set_float32_matmul_precision("medium")``.
    """
    knobs: list[tuple[object, str]] = []
    cpu = getattr(torch.backends.mkldnn, "matmul", None)
    if cpu is not None and hasattr(cpu, "fp32_precision"):
        knobs.append((cpu, "bf16" if dtype == torch.bfloat16 else "ieee"))
    cuda = getattr(torch.backends.cuda, "matmul", None)
    if torch.cuda.is_available() and hasattr(cuda, "fp32_precision"):
        knobs.append((cuda, "tf32" if dtype in HALF else "ieee"))
    before = [(knob, knob.fp32_precision) for knob, _ in knobs]  # type: ignore[attr-defined]
    try:
        for knob, value in knobs:
            knob.fp32_precision = value  # type: ignore[attr-defined]
        yield
    finally:
        for knob, value in before:
            knob.fp32_precision = value  # type: ignore[attr-defined]


@functools.cache
def _bfloat16_is_faster(device: torch.device) -> bool:
    return _seconds(torch.float32, device) > 1.3 * _seconds(torch.bfloat16, device)


def _seconds(dtype: torch.dtype, device: torch.device) -> float:
    x = torch.ones(512, 512, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        x @ x
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best
