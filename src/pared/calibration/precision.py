"""What the blocks compute in, and products of half-precision inputs that lose nothing."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

HALF = (torch.bfloat16, torch.float16)


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
