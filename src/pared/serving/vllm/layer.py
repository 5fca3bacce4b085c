"""A linear layer of an inference engine, made of modules of a checkpoint that are stored in different ways.

Every module has matrices of its own, which an engine multiplies by with kernels of its own. What a rank does not hold
is cut away as the tensors arrive. A module knows which of them have not arrived, and does not compute without them.

Legend of the shape suffixes: O outputs, N inputs, K rank, B rows of the batch.
"""

from collections.abc import Callable, MutableMapping, Sequence

import torch
from torch import nn

from pared.serving.vllm.layout import DENSE, NARROW, Member, Split, UnsupportedError
from pared.serving.vllm.narrowing import Arrangement

Bases = MutableMapping[tuple[str, str, range], "Matrix"]


class Matrix(nn.Module):
    """A weight ``(out, in)`` and perhaps a bias ``(out,)``: a layer, as an engine's own method for dense ones takes it.

    Attributes:
        prepared: whether the engine has done what it does to weights after it read them; a shared one once.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, outputs: int, inputs: int, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=dtype), requires_grad=False)
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(outputs, dtype=dtype), requires_grad=False) if bias else None
        )
        self.prepared = False


Multiply = Callable[[Matrix, torch.Tensor, bool], torch.Tensor]  # by a matrix, with its bias or without


class MemberLayer(nn.Module):
    """What one rank holds of one module of a checkpoint.

    Args:
        member: which module, and how it is stored.
        arranged: what the rank holds of the layer that it is a part of.
        bias: whether it has a bias.
        dtype: of the weights.
        bases: the shared bases that were made before, to which this adds its own.

    Attributes:
        up: the weight, or of factors the one that makes the outputs.
        down: of factors the other; None where there is none.
        order: of pivots, the inputs in the order in which they are stored, int32 ``(in,)``.
        waiting: the tensors that have not arrived, by their names behind the module's.

    Raises:
        UnsupportedError: the module does not fit the layer, or is of a kind that cannot be served.
    """

    order: torch.Tensor | None
    pick: torch.Tensor | None
    spread: torch.Tensor | None

    def __init__(self, member: Member, arranged: Arrangement, bias: bool, dtype: torch.dtype, bases: Bases) -> None:
        super().__init__()
        self.member, cut = member, arranged.cut
        self.rows, places = _rows(member, cut, arranged.outputs)
        self.width = sum(len(cut.outputs[one]) for one in member.segments)
        self._index("spread", places if len(places) < self.width else None)
        inputs = arranged.inputs
        self.columns = list(cut.inputs) if inputs is None else _held(inputs, cut.inputs)
        self._index("pick", None if inputs is None else [inputs[one] - cut.inputs.start for one in self.columns])
        stored = cut.columns if inputs is None else len(inputs)
        if not self.rows or not self.columns:
            raise UnsupportedError(f"{member.name}: a rank has none of the heads that are left; take fewer ranks")
        self.shapes = _shapes(member, _stored_rows(member, cut, arranged.outputs), stored)
        if bias:
            self.shapes["bias"] = self.shapes.get("up.weight", self.shapes.get("weight", ()))[:1]
        self.waiting = set(self.shapes)
        self.whole = len(self.columns) == stored
        self._make(bias, dtype, bases, cut.inputs)

    def _index(self, name: str, places: Sequence[int] | None) -> None:
        index = None if places is None else torch.tensor(places, dtype=torch.int64)
        self.register_buffer(name, index, persistent=False)

    def _make(self, bias: bool, dtype: torch.dtype, bases: Bases, inputs: range) -> None:
        kind, N = self.member.kind, len(self.columns)
        self.down: Matrix | None = None
        self.register_buffer("order", None, persistent=False)
        self._apart: dict[str, torch.Tensor] = {}  # of a pivoted module that is cut by columns
        if "up.weight" not in self.shapes:
            self.up = Matrix(len(self.rows), N, bias, dtype)
            return
        K = self.shapes["up.weight"][1]
        self.up = Matrix(len(self.rows), K, bias, dtype)
        if kind == "pivoted" and self.whole:
            self.order = torch.empty(N, dtype=torch.int32)
            N -= K
        if N:
            key = (self.member.basis, kind, inputs)
            if key not in bases:
                bases[key] = Matrix(K, N, False, dtype)
            self.down = bases[key]

    @torch.no_grad()
    def load(self, name: str, tensor: torch.Tensor) -> None:
        """Take the part that this rank holds of a tensor.

        Args:
            name: of the tensor, behind the module's.
            tensor: as it is stored.

        Raises:
            UnsupportedError: the module has no such tensor, or it is of another shape.
        """
        full = self.shapes.get(name)
        if name != "weight" or self.member.kind not in (DENSE, *NARROW):
            tensor = _as_stored(tensor, full)
        if full is None or tuple(tensor.shape) != full:
            raise UnsupportedError(
                f"{self.member.name}: {name} {tuple(tensor.shape)} was read, expected {full or 'none'}"
            )
        if name == "weight":
            self.up.weight.copy_(_chosen(_chosen(tensor, 0, self.rows), 1, self.columns))
        elif name == "bias" and self.up.bias is not None:
            self.up.bias.copy_(_chosen(tensor, 0, self.rows))
        elif name == "up.weight":
            self.up.weight.copy_(_chosen(tensor, 0, self.rows))
        elif self.member.kind == "pivoted":
            self._load_pivoted(name, tensor)
        elif self.down is not None:
            self.down.weight.copy_(_chosen(tensor, 1, self.columns))
        self.waiting.discard(name)

    def _load_pivoted(self, name: str, tensor: torch.Tensor) -> None:
        if name == "order" and sorted(tensor.tolist()) != list(range(len(tensor))):
            raise UnsupportedError(f"{self.member.name}: order is not a permutation; the folder is damaged")
        if self.order is not None:
            (self.order if name == "order" or self.down is None else self.down.weight).copy_(tensor)
            return
        # A rank of a row-parallel layer has some of the pivots: what it holds is one of two factors.
        self._apart[name] = tensor.cpu()
        if self.down is not None and self._apart.keys() >= self.shapes.keys() & {"down.weight", "order"}:
            identity_KK = torch.eye(self.down.weight.shape[0], dtype=self.down.weight.dtype, device="cpu")
            rest = [self._apart["down.weight"].to(identity_KK)] if "down.weight" in self._apart else []
            down_KN = torch.cat([identity_KK, *rest], 1)[:, self._apart["order"].argsort()]
            self.down.weight.copy_(_chosen(down_KN, 1, self.columns))
            self._apart.clear()

    def finish(self, prepare: Callable[[Matrix], None]) -> None:
        """Let the engine prepare the matrices, once all is there.

        Raises:
            UnsupportedError: a tensor has not arrived: it would be what lay in memory.
        """
        if self.waiting:
            raise UnsupportedError(
                f"{self.member.name}: {', '.join(sorted(self.waiting))} was not read; its values would be random. Load "
                "the folder's files as they are (vLLM's load_format auto)"
            )
        for matrix in (self.down, self.up):
            if matrix is not None and not matrix.prepared:
                prepare(matrix)
                matrix.prepared = True

    def reduced(self, x_BN: torch.Tensor, multiply: Multiply) -> torch.Tensor:
        """Return what ``up`` is multiplied by: the inputs, or of factors their coefficients ``(batch, rank)``."""
        if self.pick is not None:
            x_BN = x_BN.index_select(-1, self.pick)
        if self.order is None:
            return x_BN if self.down is None else multiply(self.down, x_BN, False)
        K = self.shapes["up.weight"][1]
        ordered_BN = x_BN.index_select(-1, self.order)
        if self.down is None:
            return ordered_BN
        return ordered_BN[..., :K] + multiply(self.down, ordered_BN[..., K:].contiguous(), False)

    def outputs(self, reduced: torch.Tensor, multiply: Multiply, bias: bool) -> torch.Tensor:
        """Return the outputs ``(batch, out)``, with zeros where a head is gone."""
        y_BO = multiply(self.up, reduced, bias)
        if self.spread is None:
            return y_BO
        return y_BO.new_zeros(*y_BO.shape[:-1], self.width).index_copy(-1, self.spread, y_BO)


class FusedLayer(nn.Module):
    """The modules of one layer, side by side.

    Args:
        members: in the order of the layer's outputs.
    """

    def __init__(self, members: Sequence[MemberLayer]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x_BN: torch.Tensor, multiply: Multiply, bias: bool) -> torch.Tensor:
        """Map ``(batch, in)`` to ``(batch, out)``; a basis that modules share is multiplied by once.

        Args:
            x_BN: inputs, those of this rank.
            multiply: by a matrix, as the engine does.
            bias: whether to add it, which one rank of a row-parallel layer does.
        """
        made: dict[str, torch.Tensor] = {}
        parts: list[torch.Tensor] = []
        for layer in self.members:
            assert isinstance(layer, MemberLayer)
            reduced = made.get(layer.member.basis)
            if reduced is None:
                reduced = layer.reduced(x_BN, multiply)
            if layer.member.basis:
                made[layer.member.basis] = reduced
            parts.append(layer.outputs(reduced, multiply, bias))
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _rows(member: Member, cut: Split, outputs: dict[int, list[int]]) -> tuple[list[int], list[int]]:
    """Return the rows that a rank holds of a stored weight, and where they stand among the outputs it makes."""
    rows: list[int] = []
    places: list[int] = []
    stored = made = 0
    for one in member.segments:
        held, kept = cut.outputs[one], outputs.get(one, range(cut.sizes[one]))
        mine = _held(kept, held)
        rows += [stored + row for row in mine]
        places += [made + kept[row] - held.start for row in mine]
        stored, made = stored + len(kept), made + len(held)
    return rows, places


def _stored_rows(member: Member, cut: Split, outputs: dict[int, list[int]]) -> int:
    return sum(len(outputs.get(one, range(cut.sizes[one]))) for one in member.segments)


def _held(places: Sequence[int], held: range) -> list[int]:
    """Return which of these places are a rank's, as numbers of the list."""
    return [number for number, place in enumerate(places) if place in held]


def _shapes(member: Member, M: int, N: int) -> dict[str, tuple[int, ...]]:
    """Return the stored tensors of a module, as they are on all ranks, by name.

    Raises:
        UnsupportedError: the map says otherwise, or the kind is none of these.
    """
    kind, entry = member.kind, member.entry
    if kind == DENSE:
        return {"weight": (M, N)}
    told = (entry["out_features"], entry["in_features"])
    if told != (M, N):
        raise UnsupportedError(f"{member.name}: {told[0]} x {told[1]} in the map, {M} x {N} in the engine's layer")
    if kind in NARROW or kind == "sparse":
        return {"weight": (M, N)}
    if kind == "low_rank":
        return {"down.weight": (entry["rank"], N), "up.weight": (M, entry["rank"])}
    if kind == "pivoted":
        K = entry["rank"]
        return {**({"down.weight": (K, N - K)} if N > K else {}), "up.weight": (M, K), "order": (N,)}
    raise UnsupportedError(f"{member.name}: kind {kind!r} cannot be served; pared export --to dense makes it dense")


def _as_stored(tensor: torch.Tensor, shape: tuple[int, ...] | None) -> torch.Tensor:
    """Return a tensor as the file has it: a model that transposes every weight of its own hands on a view."""
    if tensor.ndim != 2 or (tensor.is_contiguous() and tuple(tensor.shape) == shape):
        return tensor
    return tensor.t() if tensor.t().is_contiguous() else tensor


def _chosen(tensor: torch.Tensor, side: int, places: list[int]) -> torch.Tensor:
    """Return rows or columns; a view where all of them are asked for, or neighbours."""
    if places and places == list(range(places[0], places[0] + len(places))):
        return tensor.narrow(side, places[0], len(places))
    return tensor.index_select(side, torch.tensor(places, dtype=torch.int64, device=tensor.device))
