"""What is timed: shapes, repeats, and where. Data only, as it travels between processes."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from pared.errors import ParedError
from pared.names import require_known


@dataclass(frozen=True)
class Case:
    """One thing to time.

    Attributes:
        kind: ``prefill``, the pass over whole prompts with the logits of their last tokens; ``decode``, one token after
            the other behind a prompt, with the cache of keys and values; ``forward``, a pass over whole sequences with
            all logits and without a cache.
        batch: sequences at a time.
        length: tokens of each prompt or sequence.
        new: tokens that are decoded.
    """

    kind: str
    batch: int
    length: int
    new: int = 0

    @property
    def tokens(self) -> int:
        """Tokens that a run makes or reads."""
        return self.batch * (self.new if self.kind == "decode" else self.length)

    def __str__(self) -> str:
        after = f" + {self.new}" if self.new else ""
        return f"{self.kind} {self.batch} x {self.length}{after}"


@dataclass(frozen=True)
class Settings:
    """How is timed.

    Attributes:
        cases: what.
        repeats: of every case and model, in turns.
        threads: of a CPU.
        dtype: what the models are loaded in; ``auto`` keeps what is stored.
        device: where they run.
        seed: of the random tokens.
    """

    cases: tuple[Case, ...]
    repeats: int = 5
    threads: int = 1
    dtype: str = "auto"
    device: str = "cpu"
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the settings as JSON has them."""
        return asdict(self)

    @classmethod
    def of_json(cls, fields: dict[str, Any]) -> "Settings":
        """Return the settings that :meth:`to_json` has written."""
        return replace(cls(**fields), cases=tuple(Case(**case) for case in fields["cases"]))


# Basis Sharing: forward passes of 512 x 32 tokens without a cache. Basel: answers behind prompts as long as GSM8K's
# questions, about 60 tokens; one at a time and many.
PRESETS: dict[str, tuple[Case, ...]] = {
    "default": (Case("prefill", 1, 128), Case("prefill", 4, 512), Case("decode", 1, 64, 32), Case("decode", 8, 64, 32)),
    "basis-sharing": (Case("forward", 512, 32),),
    "basel": (Case("decode", 1, 64, 128), Case("decode", 16, 64, 128)),
    "draft": (Case("decode", 1, 64, 64),),
}


def require_draftable(cases: tuple[Case, ...]) -> None:
    """Check that cases are of texts that a draft can help with.

    Raises:
        ParedError: one is no decoding, or of several prompts at a time, which transformers takes no draft for.
    """
    for case in cases:
        if case.kind != "decode" or case.batch != 1:
            raise ParedError(
                f"case {case}: a draft proposes tokens of one text at a time; expected decode:1xLENGTH+NEW"
            )


def preset(name: str) -> tuple[Case, ...]:
    """Return the cases of a preset.

    Raises:
        ParedError: there is none of that name.
    """
    require_known("preset", name, PRESETS)
    return PRESETS[name]


def parse_case(text: str) -> Case:
    """Return the case that ``prefill:4x512``, ``decode:1x64+32`` or ``forward:512x32`` stands for.

    Raises:
        ParedError: it is none.
    """
    kind, _, shape = text.partition(":")
    shape, _, new = shape.partition("+")
    batch, _, length = shape.partition("x")
    numbers = (batch, length, *([new] if kind == "decode" else []))
    if kind not in ("prefill", "decode", "forward") or not all(number.isdigit() and int(number) for number in numbers) \
            or (new and kind != "decode"):  # fmt: skip
        raise ParedError(f"case {text!r}: expected prefill:BATCHxLENGTH, decode:BATCHxLENGTH+NEW or "
                         "forward:BATCHxLENGTH")  # fmt: skip
    return Case(kind, int(batch), int(length), int(new or 0))
