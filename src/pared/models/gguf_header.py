"""The header of a GGUF file: its fields and what its tensors are and where, without the vocabulary or a weight.

The gguf package reads a vocabulary of 150,000 tokens element by element, which takes longer than everything else that a
dry run does. Here a field is skipped by its length. Layout: github.com/ggml-org/ggml, docs/gguf.md.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAGIC = b"GGUF"
VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
# type -> how struct reads it
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
LONGEST = 1024  # elements of an array that is kept; a vocabulary has more
VOCABULARY = "tokenizer.ggml.tokens"
MOST = 1_000_000  # fields and tensors of a file; more is no header
ALIGNMENT = 32  # of the tensors, where a file says none
# type of a tensor -> dtype; every other type packs several numbers in a block
FLOATING = {0: "float32", 1: "float16", 30: "bfloat16", 28: "float64"}


@dataclass(frozen=True)
class PackedTensor:
    """A tensor of a file.

    Attributes:
        shape: rows first: ``(out, in)``.
        kind: number of its type.
        start: of its first byte in the file.
    """

    shape: tuple[int, ...]
    kind: int
    start: int


@dataclass(frozen=True)
class Header:
    """What a GGUF file says before its weights.

    Attributes:
        fields: values by key; of arrays that are too long to keep (the vocabulary) only the length is in ``lengths``.
        raw: the bytes of each of these fields, as they are in the file.
        lengths: of all arrays, by key.
        tensors: by name, in the order of the file.
        order: ``<`` or ``>``, in which bytes of numbers are.
        version: of the file's layout.
    """

    fields: dict[str, Any]
    raw: dict[str, bytes]
    lengths: dict[str, int]
    tensors: dict[str, PackedTensor]
    order: str
    version: int

    @property
    def dtype(self) -> str:
        """Name of the dtype that its weights are read in: the file's own, bfloat16 where they are quantised.

        Rounding to bfloat16 moves a weight by 0.2% of it at most, less than the types that are in use have moved it.
        """
        kinds = {tensor.kind for tensor in self.tensors.values()}
        if not kinds <= FLOATING.keys():
            return "bfloat16"
        found = {FLOATING[kind] for kind in kinds}  # norms are float32 beside any weights
        return next((dtype for dtype in ("bfloat16", "float16") if dtype in found), "float32")

    @property
    def parameters(self) -> int:
        """How many numbers its tensors have."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    def without_weights(self) -> bytes:
        """Return a GGUF file of the same fields and tensor names, every tensor of one number, that readers can open."""
        kept, count = b"".join(self.raw.values()), len(self.raw)
        sized = f"{self.fields.get('general.architecture')}.vocab_size"
        if VOCABULARY in self.lengths and sized not in self.fields:
            kept, count = kept + self._text(sized) + self._pack("II", 4, self.lengths[VOCABULARY]), count + 1
        names = b"".join(self._text(name) + self._pack("IQIQ", 1, 1, 0, 0) for name in self.tensors)
        start = MAGIC + self._pack("IQQ", self.version, len(self.tensors), count) + kept + names
        return start + bytes(-len(start) % self.alignment + self.alignment)

    @property
    def alignment(self) -> int:
        """Of the first byte of every tensor."""
        return int(self.fields.get("general.alignment", ALIGNMENT))

    def _text(self, text: str) -> bytes:
        encoded = text.encode()
        return self._pack("Q", len(encoded)) + encoded

    def _pack(self, kinds: str, *numbers: int) -> bytes:
        return struct.pack(self.order + kinds, *numbers)


def read_header(path: Path, whole: bool = False) -> Header:
    """Read the header of a GGUF file.

    Args:
        path: of the file.
        whole: whether long arrays are kept too, the vocabulary.

    Raises:
        ValueError: it is no GGUF file of a version known here, or ends within its header.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        try:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise ValueError("the file is empty") from None
        with content:
            try:
                return _Reader(content, len(content) if whole else LONGEST).header()
            except (struct.error, IndexError, UnicodeDecodeError) as error:
                raise ValueError(f"the file ends within its header, or it is damaged ({error})") from None


class _Reader:
    """Reads on from where it stands."""

    def __init__(self, content: mmap.mmap, longest: int) -> None:
        self.content, self.at, self.longest = content, 8, longest
        if content[:4] != MAGIC:
            raise ValueError(f"it begins with {content[:4]!r}, expected {MAGIC!r}")
        self.order = "<" if content[4:6] != b"\0\0" else ">"
        (self.version,) = struct.unpack(self.order + "I", content[4:8])
        if self.version not in VERSIONS:
            raise ValueError(f"it is of version {self.version}, expected one of {VERSIONS}")

    def header(self) -> Header:
        tensors, fields = self.numbers("QQ")
        if max(tensors, fields) > MOST:
            raise ValueError(f"it claims {fields:,} fields and {tensors:,} tensors")
        header = Header({}, {}, {}, {}, self.order, self.version)
        for _ in range(fields):
            start, key = self.at, self.text()
            (kind,) = self.numbers("I")
            value = self.value(kind, key, header.lengths)
            if value is not None:
                header.fields[key], header.raw[key] = value, self.content[start : self.at]
        found: list[tuple[str, tuple[int, ...], int, int]] = []
        for _ in range(tensors):
            name = self.text()
            (axes,) = self.numbers("I")
            shape = tuple(reversed(self.numbers("Q" * min(axes, 8))))
            found.append((name, shape, *self.numbers("IQ")))
        if header.alignment < 1:
            raise ValueError(f"general.alignment is {header.alignment}")
        begin = self.at + -self.at % header.alignment
        header.tensors.update({name: PackedTensor(shape, kind, begin + start) for name, shape, kind, start in found})
        return header

    def numbers(self, kinds: str) -> tuple[Any, ...]:
        size = struct.calcsize(self.order + kinds)
        found = struct.unpack_from(self.order + kinds, self.content, self.at)
        self.at += size
        return found

    def text(self) -> str:
        (length,) = self.numbers("Q")
        if length > len(self.content) - self.at:
            raise IndexError(f"a text of {length:,} bytes")
        self.at += length
        return self.content[self.at - length : self.at].decode()

    def value(self, kind: int, key: str, lengths: dict[str, int]) -> Any:
        """Return a value, None for an array that is too long to keep."""
        if kind == STRING:
            return self.text()
        if kind in SCALARS:
            return self.numbers(SCALARS[kind])[0]
        if kind != ARRAY:
            raise ValueError(f"field {key} is of the unknown type {kind}")
        of, count = self.numbers("IQ")
        lengths[key] = count
        if count > len(self.content) - self.at or of not in (*SCALARS, STRING):
            raise IndexError(f"field {key} is an array of {count:,}")
        if count <= self.longest:
            return [self.value(of, key, lengths) for _ in range(count)]
        if of == STRING:
            self.skip_texts(count)
        else:
            self.at += count * struct.calcsize(self.order + SCALARS[of])
        return None

    def skip_texts(self, count: int) -> None:
        unpack, content, at = struct.Struct(self.order + "Q").unpack_from, self.content, self.at
        for _ in range(count):
            at += 8 + unpack(content, at)[0]
        self.at = at
