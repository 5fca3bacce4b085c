"""What the blocks and the head of a model compute, traced on the meta device: every call, with no value.

Legend of the shape suffixes: B windows, T tokens, H the width.
"""

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

from pared.errors import ParedError
from pared.operations import Operation
from pared.structure import Anatomy
from pared.structure.calls import BlockCall
from pared.structure.probe import call_model, evaluating, hooks

NUMBERS = 2**22  # at most in a tensor of tokens that is traced: longer texts are traced on fewer tokens, and scaled
FREE = {"detach", "t", "view", "_unsafe_view", "transpose", "expand", "unsqueeze", "squeeze", "slice", "permute",
        "select", "alias", "empty_like", "unbind", "split", "chunk", "as_strided", "unfold", "lift_fresh", "reshape",
        "empty", "embedding", "split_with_sizes", "arange", "zeros", "full", "new_empty", "new_zeros"}  # fmt: skip
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "matmul", "linear"}


class TensorLike(NamedTuple):
    """What is known of a tensor of a call that was traced.

    Attributes:
        shape: of it.
        strides: of it.
        dtype: its name.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str


class Call(NamedTuple):
    """A call that was traced, by which it can be made again on numbers.

    Attributes:
        name: of the operator: ``silu.default``.
        args: of it, tensors as :class:`TensorLike`.
        kwargs: of it, by name.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Trace:
    """The operations of one pass of one batch through something; tokens are those of the batch.

    Attributes:
        forward: of a forward pass.
        back: of recomputing it and sending a gradient back to what it reads.
    """

    forward: tuple[Operation, ...]
    back: tuple[Operation, ...] = ()


@dataclass(frozen=True)
class ModelTrace:
    """What a model computes on one batch.

    Attributes:
        blocks: of every block, by its index.
        head: of all around the blocks.
    """

    blocks: Sequence[Trace]
    head: Trace


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Takes down what is called. Attention is taken down as one operation, whatever it is made of."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[Operation] = []
        self.muted = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if not self.muted:
            self.found += _operations(func, args, kwargs or {}, output)
        return output


class _Attention(TorchFunctionMode):
    """Takes attention down as one operation, forward and back."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") != "scaled_dot_product_attention":
            return func(*args, **(kwargs or {}))
        return _AttentionFunction.apply(self.recorder, *args[:3])  # type: ignore[no-untyped-call]


class _AttentionFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recorder: _Recorder, q: Any, k: Any, v: Any) -> Any:
        ctx.recorder = recorder
        ctx.save_for_backward(q, k, v)
        sizes = (int(q.shape[0]), int(q.shape[1]), int(q.shape[2]), int(q.shape[3]))
        if not recorder.muted:
            recorder.found.append(Operation("attention", sizes, _name(q.dtype)))
        return q.new_empty((*q.shape[:-1], v.shape[-1]))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:  # noqa: ARG004 - their shapes are known
        q, k, v = ctx.saved_tensors
        sizes = (int(q.shape[0]), int(q.shape[1]), int(q.shape[2]), int(q.shape[3]))
        ctx.recorder.found.append(Operation("attention back", sizes, _name(q.dtype)))
        return None, torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


@contextmanager
def _recording() -> Iterator[_Recorder]:
    recorder = _Recorder()
    with _Attention(recorder), recorder:
        yield recorder


def trace(
    model: PreTrainedModel, anatomy: Anatomy, batch: int, length: int, dtype: torch.dtype, back: bool = False
) -> ModelTrace:
    """Trace what a model computes on a batch of windows.

    Args:
        model: on the meta device.
        anatomy: of it.
        batch: windows.
        length: tokens of each.
        dtype: what blocks compute in.
        back: whether to trace the way back, too.

    Raises:
        ParedError: it does not run on shapes alone, as where a router looks at values.
    """
    widest = max(max(site.out_features, site.in_features) for site in anatomy.sites)
    tokens = min(length, max(32, NUMBERS // widest))
    windows = max(1, min(batch, NUMBERS // widest // tokens))
    scale = batch * length / (windows * tokens)
    calls, head = _run(model, anatomy, windows, tokens)
    kinds: dict[Any, Trace] = {}
    blocks = []
    for block, call in zip(anatomy.blocks(model), calls, strict=True):
        kind = type(block), tuple((name, tuple(p.shape)) for name, p in block.named_parameters()), _shapes(call)
        if kind not in kinds:
            found = _of_block(block, call, dtype, back)
            kinds[kind] = Trace(*(_scaled(part, batch, length, scale) for part in (found.forward, found.back)))
        blocks.append(kinds[kind])
    del calls
    return ModelTrace(blocks, Trace(*(_scaled(part, batch, length, scale) for part in (head, _of_head(head)))))


def _of_head(forward: Sequence[Operation]) -> list[Operation]:
    """Return what a gradient takes through the head: forward, and as many products again."""
    return [*forward, *(one for one in forward if one.kind == "product")]


def _run(
    model: PreTrainedModel, anatomy: Anatomy, windows: int, tokens: int
) -> tuple[list[BlockCall], list[Operation]]:
    """Run a model on shapes; return how its blocks are called first, and what is computed around them."""
    ids_BT = torch.zeros(windows, tokens, dtype=torch.long, device="meta")
    whole = torch.zeros(1, 1, tokens, tokens, device="meta", dtype=model.dtype)
    blocks = anatomy.blocks(model)
    tries: tuple[dict[str, torch.Tensor], ...] = ({}, {"attention_mask": whole})
    for beside in tries:
        calls: dict[int, BlockCall] = {}
        with (
            _recording() as recorder,
            evaluating(model),
            hooks(_hooks(blocks, anatomy, calls, recorder)),
            suppress(ParedError, NotImplementedError),
            torch.no_grad(),
        ):
            call_model(model, ids_BT, beside)
        if len(calls) == len(blocks) and not recorder.muted:
            return [calls[index] for index in range(len(blocks))], recorder.found
    raise ParedError(f"{type(model).__name__} does not run on shapes alone, so its time is not predicted")


def _hooks(
    blocks: Sequence[nn.Module], anatomy: Anatomy, calls: dict[int, BlockCall], recorder: _Recorder
) -> Iterator[Any]:
    for index, block in enumerate(blocks):

        def enter(_: nn.Module, args: Any, kwargs: Any, index: int = index) -> None:
            calls.setdefault(index, BlockCall.seen(args, kwargs, anatomy.block_name(index), index))
            recorder.muted += 1

        def leave(*_: Any) -> None:
            recorder.muted -= 1

        yield block.register_forward_pre_hook(enter, with_kwargs=True)
        yield block.register_forward_hook(leave)


def _of_block(block: nn.Module, call: BlockCall, dtype: torch.dtype, back: bool) -> Trace:
    worker = copy.deepcopy(block).to(dtype).requires_grad_(False)
    worker.eval()

    def cast(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    call = replace(
        call, args=tree_map_only(torch.Tensor, cast, call.args), kwargs=tree_map_only(torch.Tensor, cast, call.kwargs)
    )
    hidden_BTH = cast(call.hidden.detach())
    with torch.no_grad(), _recording() as forward:
        call.run(worker, hidden_BTH)
    if not back:
        return Trace(tuple(forward.found))
    with torch.enable_grad(), _recording() as both:
        leaf_BTH = hidden_BTH.clone().requires_grad_()
        output_BTH = call.run(worker, leaf_BTH)
        torch.autograd.grad(output_BTH, leaf_BTH, torch.empty_like(output_BTH))
    return Trace(tuple(forward.found), tuple(both.found))


def _shapes(call: BlockCall) -> Any:
    """Return what tells calls apart that compute other things: which arguments there are, and their shapes."""
    return tuple(tuple(tensor.shape) for tensor in call.tensors()), tuple(call.hidden.shape)


def _operations(func: Any, args: Any, kwargs: Any, output: Any) -> Iterator[Operation]:
    """Yield what one call computes."""
    name = func.overloadpacket.__name__
    tensors = [one for one in _flat((args, kwargs)) if isinstance(one, torch.Tensor)]
    if name in FREE or not tensors:
        return
    if name in PRODUCTS:
        left, right = [one for one in tensors if one.ndim >= 2][-2:]
        sizes = int(left.shape[-2]), int(left.shape[-1]), int(right.shape[-1])
        yield Operation("product", sizes, _name(left.dtype), times=float(left.shape[:-2].numel()))
        return
    outputs = [one for one in _flat(output) if isinstance(one, torch.Tensor)]
    numbers = sum(one.numel() for one in (*tensors, *outputs))
    made = Call(
        str(func).removeprefix("aten."), _described(args), tuple((key, _described(one)) for key, one in kwargs.items())
    )
    yield Operation("call", (numbers,), _name((outputs or tensors)[0].dtype), call=made)


def _flat(tree: Any) -> list[Any]:
    return torch.utils._pytree.tree_leaves(tree)


def _described(tree: Any) -> Any:
    """Return arguments as data that can be compared and hashed."""
    if isinstance(tree, torch.Tensor):
        return TensorLike(tuple(map(int, tree.shape)), tuple(map(int, tree.stride())), _name(tree.dtype))
    if isinstance(tree, (list, tuple)):
        return tuple(map(_described, tree))
    return str(tree) if isinstance(tree, (torch.dtype, torch.device, torch.layout, torch.memory_format)) else tree


def _scaled(found: Sequence[Operation], batch: int, length: int, scale: float) -> tuple[Operation, ...]:
    """Return operations of the whole batch from those of its first tokens, each once with how often."""
    counted: Counter[Operation] = Counter()
    for one in found:
        times = one.times
        if one.kind == "call":
            times *= scale
        elif one.kind.startswith("attention"):
            _, heads, _, width = one.sizes
            one = replace(one, sizes=(batch, heads, length, width))
        else:
            m, k, n = one.sizes
            one = replace(one, sizes=(max(1, round(m * scale)), k, n))
        counted[replace(one, times=1.0)] += times  # type: ignore[assignment]
    return tuple(replace(one, times=float(times)) for one, times in counted.items())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
