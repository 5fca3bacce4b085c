"""The format on disk: saving, loading through transformers, and the check after a save."""

from typing import TYPE_CHECKING

from pared.lazy import lazy_package

if TYPE_CHECKING:
    from pared.checkpoint.load import is_compressed, load, load_tokenizer, read_config
    from pared.checkpoint.portable import module_map
    from pared.checkpoint.save import mark, save
    from pared.checkpoint.seal import record
    from pared.checkpoint.verify import compare, require_tensors, take_fingerprint, verify

__all__ = [
    "compare",
    "is_compressed",
    "load",
    "load_tokenizer",
    "mark",
    "module_map",
    "read_config",
    "record",
    "require_tensors",
    "save",
    "take_fingerprint",
    "verify",
]

lazy_package(
    __name__,
    {
        "pared.checkpoint.load": ["is_compressed", "load", "load_tokenizer", "read_config"],
        "pared.checkpoint.portable": ["module_map"],
        "pared.checkpoint.save": ["mark", "save"],
        "pared.checkpoint.seal": ["record"],
        "pared.checkpoint.verify": ["compare", "require_tensors", "take_fingerprint", "verify"],
    },
)
