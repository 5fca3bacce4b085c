"""What the matrices of a GGUF file may be stored as; imports nothing, as options are checked before anything else."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StoredType:
    """A type, by the names that the gguf package has.

    Attributes:
        kind: of a tensor, in ``GGMLQuantizationType``.
        file_type: of the file, in ``LlamaFileType``.
        dtype: whose numbers it holds as they are; none where it rounds all of them.
    """

    kind: str
    file_type: str
    dtype: str | None


# what a user names
TYPES = {
    "f32": StoredType("F32", "ALL_F32", "float32"),
    "f16": StoredType("F16", "MOSTLY_F16", "float16"),
    "bf16": StoredType("BF16", "MOSTLY_BF16", "bfloat16"),
    "q8_0": StoredType("Q8_0", "MOSTLY_Q8_0", None),
}
