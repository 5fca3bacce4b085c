"""A sparse weight in few bytes: what is kept, and where it stands.

Anywhere: the kept weights, row by row, and a mask of one bit a weight. N:M: N weights of every group, and the place of
each inside its group in ``⌈log₂ M⌉`` bits, or the mask where that is fewer bits (4:8 has 12 of places and 8 of a mask).
Half of a bfloat16 weight is at most 0.5625 of its bytes any way. Bits fill bytes from the lowest up, and the last byte
is filled with zeros.

What is kept comes back bit for bit, -0.0 and NaN too; everything else as 0.0. Reading checks that the parts fit each
other and the shape, so that cut or foreign bytes are an error and not a weight.

Legend of the shape suffixes: O outputs, N inputs, K the weights that are stored, P packed bytes.
"""

import math
from typing import NamedTuple, Protocol

import numpy as np
import torch

LARGEST_GROUP = 256
LINE = 64  # bytes; torch begins its tensors at multiples of it, and the last digits of products go by where they begin
WHOLE, CHUNK = 2**23, 2**16  # weights that are unpacked as a whole, and so many at a time if there are more
# Weights are moved as integers of their size: torch rewrites the bits of a bfloat16 NaN on the way.
AS_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Groups(Protocol):
    """N:M: at most ``kept`` weights are stored of every ``group`` consecutive inputs of an output."""

    @property
    def kept(self) -> int:
        """N."""

    @property
    def group(self) -> int:
        """M."""


class Packed(NamedTuple):
    """The parts of a sparse weight.

    Attributes:
        values: the stored weights in their own dtype, ``(kept,)``, or for N:M ``(out, in / M · N)``.
        bits: where they stand, uint8 ``(bytes,)``.
    """

    values: torch.Tensor
    bits: torch.Tensor


def packed_bytes(shape: tuple[int, int], groups: Groups | None = None) -> int:
    """Return how many bytes the bits of a weight ``(out, in)`` are."""
    if groups is None or _has_mask(groups):
        return -(-math.prod(shape) // 8)
    return -(-math.prod(shape) // groups.group * groups.kept * _width(groups) // 8)


def pack_mask(mask: torch.Tensor) -> torch.Tensor:
    """Return the bits of a boolean mask of any shape, uint8 ``(⌈numel / 8⌉,)``.

    Raises:
        ValueError: it is not boolean.
    """
    if mask.dtype != torch.bool:
        raise ValueError(f"mask of {mask.dtype}: expected booleans")
    flat = mask.flatten()
    if flat.device.type == "cpu":
        return torch.from_numpy(np.packbits(flat.numpy(), bitorder="little"))
    bits_P8 = torch.nn.functional.pad(flat.to(torch.uint8), (0, -flat.numel() % 8)).view(-1, 8)
    return (bits_P8 << torch.arange(8, dtype=torch.uint8, device=flat.device)).sum(dim=1, dtype=torch.uint8)


def unpack_mask(bits_P: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return the mask of this shape.

    Raises:
        ValueError: the bits are not uint8 or not as many as the shape has, the filling is not zero, or a size is
            negative.
    """
    _check_bits(bits_P, shape)
    return _flags(bits_P)[: math.prod(shape)].view(shape)


def pack(W_ON: torch.Tensor, mask_ON: torch.Tensor) -> Packed:
    """Pack a weight with unstructured zeros.

    Args:
        W_ON: the weight ``(out, in)``, any dtype.
        mask_ON: True where a weight is stored, be it zero or not.

    Raises:
        ValueError: the mask is not boolean, of another shape, or False where the weight is not zero.
    """
    return Packed(stored_values(W_ON, mask_ON), pack_mask(mask_ON))


def stored_values(W_ON: torch.Tensor, mask_ON: torch.Tensor) -> torch.Tensor:
    """Return the values of :func:`pack` alone, for bits that are known."""
    _check_zeros(W_ON, mask_ON)
    return _chosen(_raw(W_ON), mask_ON).view(W_ON.dtype)


def lost_weights(W_ON: torch.Tensor, mask_ON: torch.Tensor) -> int:
    """Count the weights that are not zero and outside of the mask: what packing would lose."""
    nonzero_ON = W_ON.detach() != 0
    return int((nonzero_ON & ~mask_ON).count_nonzero())


def unpack(values_K: torch.Tensor, bits_P: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Return the weight ``(out, in)`` that :func:`pack` has packed.

    Raises:
        ValueError: values, bits and shape do not fit each other.
    """
    _check_bits(bits_P, shape)
    if bits_P.device.type == "cpu" and values_K.ndim == 1:
        W = _filled(_raw(values_K), bits_P.contiguous().numpy(), math.prod(shape))
        if W is not None:
            return W.view(shape).view(values_K.dtype)
    positions_K = _positions(bits_P)
    if values_K.shape != positions_K.shape:
        raise ValueError(f"values {tuple(values_K.shape)} for a mask that keeps {len(positions_K)}")
    return _spread(values_K, positions_K, shape)


def _filled(raw_K: torch.Tensor, bits: "np.ndarray[tuple[int], np.dtype[np.uint8]]", count: int) -> torch.Tensor | None:
    """Return so many integers, these where a bit is set; None if there are not as many of them as of such bits.

    Positions are found of a part at a time, so that they and what they fill stay in the cache.
    """
    values, start = raw_K.numpy(), 0
    size = count * values.itemsize
    pages = np.zeros(size + LINE - 1, np.uint8)  # of zeros, that are first touched when they are filled
    W = pages[-pages.ctypes.data % LINE :][:size].view(values.dtype)
    at_once = CHUNK if count > WHOLE else max(count, 1)
    for first in range(0, count, at_once):
        part = W[first : first + at_once]
        flags = np.unpackbits(bits[first // 8 : -(-(first + len(part)) // 8)], bitorder="little")
        positions = np.flatnonzero(flags.view(bool))
        stop = start + len(positions)
        if stop > len(values):
            return None
        part[positions] = values[start:stop]
        start = stop
    return torch.from_numpy(W) if start == len(values) else None


def pack_nm(W_ON: torch.Tensor, mask_ON: torch.Tensor, groups: Groups) -> Packed:
    """Pack a weight with at most N stored of every M; groups that keep fewer are filled up with zeros.

    Args:
        W_ON: the weight ``(out, in)``, any dtype.
        mask_ON: True where a weight is stored, be it zero or not.
        groups: N:M, M at most 256.

    Raises:
        ValueError: as :func:`pack`, a group keeps more than N, or groups do not fill the inputs or are too large.
    """
    _check_zeros(W_ON, mask_ON)
    _check_nm(W_ON.shape, groups)
    in_groups = (len(W_ON), W_ON.shape[1] // groups.group, groups.group)
    mask_OGM = mask_ON.reshape(in_groups)
    if bool((mask_OGM.sum(dim=2) > groups.kept).any()):
        raise ValueError(
            f"a group of {groups.group} inputs keeps more than the {groups.kept} of pattern {_named(groups)}"
        )
    # The kept ones first, then others that fill up; what is taken, back in rising order.
    order_OGM = mask_OGM.to(torch.uint8).sort(dim=2, descending=True, stable=True).indices
    places_OGK = order_OGM[..., : groups.kept].sort(dim=2).values
    values_OGK = _raw(W_ON).masked_fill(~mask_ON, 0).reshape(in_groups).gather(2, places_OGK)
    if _has_mask(groups):
        bits_P = pack_mask(torch.zeros_like(mask_OGM).scatter_(2, places_OGK, True))
        return Packed(values_OGK.flatten(1).view(W_ON.dtype), bits_P)
    bits_OGKB = places_OGK.unsqueeze(-1) >> torch.arange(_width(groups), device=W_ON.device) & 1
    return Packed(values_OGK.flatten(1).view(W_ON.dtype), pack_mask(bits_OGKB.bool()))


def unpack_nm(values_OK: torch.Tensor, bits_P: torch.Tensor, shape: tuple[int, int], groups: Groups) -> torch.Tensor:
    """Return the weight ``(out, in)`` that :func:`pack_nm` has packed.

    Raises:
        ValueError: values, bits, shape and groups do not fit each other.
    """
    _check_nm(shape, groups)
    out_features, count = shape[0], shape[1] // groups.group
    if values_OK.shape != (out_features, count * groups.kept):
        raise ValueError(f"values {tuple(values_OK.shape)} of a weight {tuple(shape)} with pattern {_named(groups)}: "
                         f"expected {(out_features, count * groups.kept)}")  # fmt: skip
    firsts_X = torch.arange(0, math.prod(shape), groups.group, device=bits_P.device)
    if _has_mask(groups):
        _check_bits(bits_P, shape)
        positions_K = _positions(bits_P)
        if len(positions_K) != values_OK.numel() or not _fill(positions_K.view(-1, groups.kept), firsts_X, groups):
            raise ValueError(f"a group of {groups.group} inputs has another number of bits than {groups.kept}: these "
                             f"are not the bits of a weight {tuple(shape)} with pattern {_named(groups)}")  # fmt: skip
    else:
        positions_K = (_places_of(bits_P, shape, groups) + firsts_X[:, None]).flatten()
    return _spread(values_OK.flatten(), positions_K, shape)


def _places_of(bits_P: torch.Tensor, shape: tuple[int, int], groups: Groups) -> torch.Tensor:
    """Return the places in every group, uint8 ``(out · in / M, N)``.

    Raises:
        ValueError: they do not rise within a group, or leave it.
    """
    count, width = math.prod(shape) // groups.group, _width(groups)
    _check_bits(bits_P, (count, groups.kept, width))
    if width and 8 % width == 0:  # all places of a byte are looked up at a time, as one integer
        a_byte = _of_every_byte(width, bits_P.device).view(AS_INTEGERS[8 // width]).flatten()
        places_XK = a_byte[bits_P.int()].view(torch.uint8)[: count * groups.kept].view(count, groups.kept)
    else:
        bits_XKB = _flags(bits_P)[: count * groups.kept * width].view(torch.uint8).view(count, groups.kept, width)
        places_XK = torch.zeros(count, groups.kept, dtype=torch.uint8, device=bits_P.device)
        for place, bit_XK in enumerate(bits_XKB.unbind(dim=2)):
            places_XK |= bit_XK << place
    rising = bool((places_XK[:, 1:] > places_XK[:, :-1]).all())
    if not rising or bool((places_XK[:, -1:] > groups.group - 1).any()):
        raise ValueError(f"places in groups of {groups.group} inputs are not rising: these are not the bits of a "
                         f"weight {tuple(shape)} with pattern {_named(groups)}")  # fmt: skip
    return places_XK


def _fill(positions_XK: torch.Tensor, firsts_X: torch.Tensor, groups: Groups) -> bool:
    """Whether rising positions are N of every group: it is enough to look at the first and the last of each."""
    within = (positions_XK[:, 0] >= firsts_X) & (positions_XK[:, -1] < firsts_X + groups.group)
    return bool(within.all())


def _spread(values_K: torch.Tensor, positions_K: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Return a weight of this shape with these values at these positions, and 0 elsewhere."""
    W = _raw(values_K).new_zeros(math.prod(shape))
    return W.scatter_(0, positions_K, _raw(values_K)).view(shape).view(values_K.dtype)


def _flags(bits_P: torch.Tensor) -> torch.Tensor:
    """Return every bit as a boolean, ``(8 P,)``."""
    if bits_P.device.type == "cpu":
        return torch.from_numpy(np.unpackbits(bits_P.contiguous().numpy(), bitorder="little")).view(torch.bool)
    return _of_every_byte(1, bits_P.device)[bits_P.int()].flatten().bool()


def _positions(bits_P: torch.Tensor) -> torch.Tensor:
    """Return where bits are set, rising, int64; NumPy finds them eight times as fast as torch on a CPU."""
    flags = _flags(bits_P)
    return torch.from_numpy(np.flatnonzero(flags.numpy())) if flags.device.type == "cpu" else flags.nonzero().flatten()


def _chosen(raw_ON: torch.Tensor, mask_ON: torch.Tensor) -> torch.Tensor:
    """Return the integers where the mask is True, in order; NumPy gathers them faster than torch on a CPU."""
    return torch.from_numpy(raw_ON.numpy()[mask_ON.numpy()]) if raw_ON.device.type == "cpu" else raw_ON[mask_ON]


def _raw(values: torch.Tensor) -> torch.Tensor:
    return values.detach().view(AS_INTEGERS[values.element_size()])


def _of_every_byte(width: int, device: torch.device) -> torch.Tensor:
    """Return the numbers of so many bits, 1, 2, 4 or 8, that every byte is made of, uint8 ``(256, 8 / width)``."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=device)
    return torch.arange(256, dtype=torch.uint8, device=device)[:, None] >> shifts & (1 << width) - 1


def _width(groups: Groups) -> int:
    """Return the bits of a place in a group."""
    return (groups.group - 1).bit_length()


def _has_mask(groups: Groups) -> bool:
    """Whether a mask of a group is fewer bits than the places in it."""
    return groups.kept * _width(groups) > groups.group


def _check_bits(bits_P: torch.Tensor, shape: tuple[int, ...]) -> None:
    count = math.prod(shape)
    if min(shape, default=0) < 0:
        raise ValueError(f"shape {tuple(shape)}: expected sizes of 0 and more")
    if bits_P.dtype != torch.uint8 or bits_P.shape != (-(-count // 8),):
        raise ValueError(f"bits {bits_P.dtype} {tuple(bits_P.shape)} of a mask {tuple(shape)}: expected uint8 "
                         f"({-(-count // 8)},)")  # fmt: skip
    if count % 8 and int(bits_P[-1]) >> count % 8:
        raise ValueError(f"bits beyond the {count} of a mask {tuple(shape)} are set: these are not its bits")


def _check_zeros(W_ON: torch.Tensor, mask_ON: torch.Tensor) -> None:
    if mask_ON.dtype != torch.bool or W_ON.ndim != 2 or mask_ON.shape != W_ON.shape:
        raise ValueError(f"mask {mask_ON.dtype} {tuple(mask_ON.shape)} of a weight {tuple(W_ON.shape)}: expected "
                         "booleans and the same (out, in)")  # fmt: skip
    if lost := lost_weights(W_ON, mask_ON):
        raise ValueError(f"{lost} weights that are not zero are outside of the mask; prune the weight first")


def _check_nm(shape: tuple[int, ...], groups: Groups) -> None:
    if groups.group > LARGEST_GROUP:
        raise ValueError(f"pattern {_named(groups)}: groups of at most {LARGEST_GROUP} inputs can be stored")
    if shape[1] % groups.group:
        raise ValueError(f"pattern {_named(groups)} on {shape[1]} inputs: expected a multiple of {groups.group}")


def _named(groups: Groups) -> str:
    return f"{groups.kept}:{groups.group}"
