"""The operations of every kind on random numbers, as this machine is measured with."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from pared.calibration.statistics.features import Energy
from pared.calibration.statistics.gradients import Fisher
from pared.calibration.statistics.gram import Cross, Gram
from pared.engine.cost.traced import Call, TensorLike
from pared.lowrank.decomposition import Factors
from pared.lowrank.eigen import eigh
from pared.lowrank.pivot import pivot
from pared.modules import SparseLinear
from pared.operations import Operation
from pared.sparsity import masks
from pared.sparsity.pattern import Unstructured
from pared.sparsity.sparsegpt import FactorisedHessian
from pared.widths import remove_channels

SLOWEST = 0.3  # seconds of an operation that is not repeated
# Largest operations that are measured as they are, in flops, or in bytes where there is no arithmetic.
LIMITS = {
    "product": 1e10, "attention": 4e9, "attention back": 4e9, "stream": 2**28, "eigh": 7.8e10, "plain eigh": 7.8e10,
    "eigenvalues": 1.2e10, "cholesky": 3e9, "channels": 1e10, "triangular": 4e9, "solve": 8e9, "pivot": 1e10,
    "gram": 1e10, "cross": 1e10,
    "energy": 2**27, "fisher": 1e10, "mirror": 2**28, "select": 2**26, "pack": 2**26, "sweep": 1e10, "read": 2**26,
    "write": 2**26,
}  # fmt: skip
RANDOM = 2**22  # different random numbers; more are repeated


def prepared(operation: Operation, device: torch.device) -> Callable[[], Any]:
    """Return what does an operation once, on numbers that are there already."""
    return _PREPARE[operation.kind](operation, device)


def _random(*shape: int, dtype: torch.dtype = torch.float64, device: torch.device) -> torch.Tensor:
    count = 1
    for size in shape:
        count *= size
    numbers = torch.randn(min(count, RANDOM), dtype=torch.float32).to(dtype)
    return numbers.repeat(-(-count // max(len(numbers), 1)))[:count].view(shape).to(device)


def _dtype(operation: Operation) -> torch.dtype:
    found: torch.dtype = getattr(torch, operation.dtype)
    return found


def _product(operation: Operation, device: torch.device) -> Callable[[], Any]:
    (m, k, n), dtype = operation.sizes, _dtype(operation)
    left, right = _random(m, k, dtype=dtype, device=device), _random(n, k, dtype=dtype, device=device)
    return lambda: left @ right.T


def _attention(operation: Operation, device: torch.device) -> Callable[[], Any]:
    q, k, v = (_random(*operation.sizes, dtype=_dtype(operation), device=device) for _ in range(3))
    return lambda: functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def _attention_back(operation: Operation, device: torch.device) -> Callable[[], Any]:
    q, k, v = (_random(*operation.sizes, dtype=_dtype(operation), device=device).requires_grad_() for _ in range(3))
    with torch.enable_grad():
        output = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return lambda: torch.autograd.grad(output, (q, k, v), torch.ones_like(output), retain_graph=True)


def _call(operation: Operation, device: torch.device) -> Callable[[], Any]:
    """Make a call that was traced again."""
    call: Call = operation.call
    name, _, overload = call.name.partition(".")
    function = getattr(getattr(torch.ops.aten, name), overload or "default")
    args = tuple(_value(one, device) for one in call.args)
    kwargs = {key: _keyword(key, value, device) for key, value in call.kwargs}
    return lambda: function(*args, **kwargs)


def _value(described: Any, device: torch.device) -> Any:
    if isinstance(described, TensorLike):
        dtype: torch.dtype = getattr(torch, described.dtype)
        last = sum((size - 1) * stride for size, stride in zip(described.shape, described.strides, strict=True))
        if dtype.is_floating_point:
            base = _random(last + 1, dtype=dtype, device=device).abs()  # roots and powers are of what is positive
        else:
            base = torch.zeros(last + 1, dtype=dtype, device=device)
        return base.as_strided(described.shape, described.strides)
    if isinstance(described, tuple):
        return [_value(one, device) for one in described]
    return described


def _keyword(name: str, value: Any, device: torch.device) -> Any:
    if name == "device":
        return device
    if isinstance(value, str) and value.startswith("torch."):
        return getattr(torch, value.removeprefix("torch."))
    return _value(value, device)


def _stream(operation: Operation, device: torch.device) -> Callable[[], Any]:
    """Read half of the numbers and write the other half."""
    dtype = getattr(torch, operation.dtype) if operation.dtype != "bytes" else torch.uint8
    source = torch.ones(max(operation.sizes[0] // 2, 1), dtype=dtype, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _square(width: int, device: torch.device) -> torch.Tensor:
    """Return a Gram of full rank, its spectrum falling as those of activations do."""
    x = _random(width + 8, width, dtype=torch.float32, device=device)
    x = x * torch.linspace(1, 0.01, width, device=device)
    return (x.T @ x).double() + 1e-3 * torch.eye(width, dtype=torch.float64, device=device)


def _eigh(operation: Operation, device: torch.device) -> Callable[[], Any]:
    gram = _square(operation.sizes[0], device)
    solver = {"eigh": eigh, "plain eigh": torch.linalg.eigh, "eigenvalues": torch.linalg.eigvalsh}[operation.kind]
    return lambda: solver(gram)


def _cholesky(operation: Operation, device: torch.device) -> Callable[[], Any]:
    gram = _square(operation.sizes[0], device)
    return lambda: torch.linalg.cholesky_ex(gram)


def _channels(operation: Operation, device: torch.device) -> Callable[[], Any]:
    out, width, least = operation.sizes
    weight, gram = _random(out, width, device=device), _square(width, device)
    energies = torch.ones(out, dtype=torch.float64, device=device)
    return lambda: remove_channels(weight, gram, energies, least=min(least, width - 1))


def _triangular(operation: Operation, device: torch.device) -> Callable[[], Any]:
    width, sides = operation.sizes
    factor = torch.linalg.cholesky_ex(_square(width, device)).L
    right = _random(width, sides, device=device)
    return lambda: torch.linalg.solve_triangular(factor, right, upper=False)


def _solve(operation: Operation, device: torch.device) -> Callable[[], Any]:
    width, sides = operation.sizes
    gram, right = _square(width, device), _random(sides, width, device=device)
    return lambda: torch.linalg.solve(gram, right, left=False)


def _pivot(operation: Operation, device: torch.device) -> Callable[[], Any]:
    rank, width, out = operation.sizes
    rank = min(rank, width - 1, out)
    factors = Factors(torch.randn(rank, width, device=device).double(), torch.randn(out, rank, device=device).double())
    return lambda: pivot(factors)


def _gram(operation: Operation, device: torch.device) -> Callable[[], Any]:
    (tokens, features), dtype = operation.sizes, _dtype(operation)
    x, statistic = _random(tokens, features, dtype=dtype, device=device), Gram(features, device)
    return lambda: statistic.update(x)


def _cross(operation: Operation, device: torch.device) -> Callable[[], Any]:
    (tokens, features), dtype = operation.sizes, _dtype(operation)
    x, statistic = _random(tokens, features, dtype=dtype, device=device), Cross(features, device)
    return lambda: statistic.update(x, x)


def _energy(operation: Operation, device: torch.device) -> Callable[[], Any]:
    (tokens, features), dtype = operation.sizes, _dtype(operation)
    x, statistic = _random(tokens, features, dtype=dtype, device=device), Energy(features, device)
    return lambda: statistic.update(x)


def _fisher(operation: Operation, device: torch.device) -> Callable[[], Any]:
    (examples, tokens, width, out), dtype = operation.sizes, _dtype(operation)
    x = _random(examples, tokens, width, dtype=dtype, device=device)
    g, statistic = _random(examples, tokens, out, dtype=dtype, device=device), Fisher(width, device)
    return lambda: statistic.update(x, g)


def _mirror(operation: Operation, device: torch.device) -> Callable[[], Any]:
    statistic = Gram(operation.sizes[0], device)
    return lambda: statistic.value


def _select(operation: Operation, device: torch.device) -> Callable[[], Any]:
    """Score a weight and choose what is kept of every group."""
    weight = _random(*operation.sizes, dtype=torch.float32, device=device)
    energy = weight[0].double().square()
    return lambda: masks.apply(weight, masks.per_row(weight.double().abs() * energy.sqrt(), Unstructured(0.5)))


def _pack(operation: Operation, device: torch.device) -> Callable[[], Any]:
    weight = _random(*operation.sizes, dtype=torch.bfloat16, device=device)
    mask = weight > 0
    weight = weight.masked_fill(~mask, 0)
    return lambda: SparseLinear.of(weight, mask, None)


def _sweep(operation: Operation, device: torch.device) -> Callable[[], Any]:
    out, width, block = operation.sizes
    factor = torch.linalg.cholesky_ex(_square(width, device)).L.T.contiguous()
    solution = FactorisedHessian(_random(out, width, dtype=torch.float32, device=device), factor, block)
    keep = torch.ones(out, block, dtype=torch.bool, device=device)
    keep[:, ::2] = False
    return lambda: solution.pruned(lambda scores, _: keep[:, : scores.shape[1]], block)


def _write(operation: Operation, _: torch.device) -> Callable[[], Any]:
    content = os.urandom(max(operation.sizes[0], 1))

    def write() -> None:
        with tempfile.TemporaryDirectory() as folder, (Path(folder) / "written").open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    return write


def _read(operation: Operation, _: torch.device) -> Callable[[], Any]:
    """Read what has just been written, which comes out of the system's cache: a cold disk is slower."""
    content = os.urandom(max(operation.sizes[0], 1))
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        kept = os.dup(file.fileno())
    return lambda: os.pread(kept, len(content), 0)


_PREPARE: dict[str, Callable[[Operation, torch.device], Callable[[], Any]]] = {
    "product": _product,
    "attention": _attention,
    "attention back": _attention_back,
    "call": _call,
    "stream": _stream,
    "eigh": _eigh,
    "plain eigh": _eigh,
    "eigenvalues": _eigh,
    "cholesky": _cholesky,
    "channels": _channels,
    "triangular": _triangular,
    "solve": _solve,
    "pivot": _pivot,
    "gram": _gram,
    "cross": _cross,
    "energy": _energy,
    "fisher": _fisher,
    "mirror": _mirror,
    "select": _select,
    "pack": _pack,
    "sweep": _sweep,
    "read": _read,
    "write": _write,
}
