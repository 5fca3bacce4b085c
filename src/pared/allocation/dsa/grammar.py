"""Programs as text, ``W:(P1,P2)-(R)-(T1,T2)-(spread)-(sign)``: the grammar of DSA with a sign and a spread that count.

Up to two functions of a vector, exactly one reduction, up to two functions of a scalar, applied from left to right;
``spread`` is 100 λ; ``sign`` is PRUNE (a high value gets a high sparsity, what the released code does, and the default,
so that published programs mean what they meant) or KEEP (a high value gets a low one). The last two slots may be left
out. L. Li et al., "Discovering Sparsity Allocation for Layer-wise Pruning of Large Language Models", NeurIPS 2024; the
released code reads the spread and then ignores it.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast, get_args

from pared.allocation.dsa.names import MATRIX_ONLY, POST, PRE, REDUCE, Sign
from pared.errors import ParedError
from pared.names import did_you_mean, require_known

SPREADS = range(1, 51)
SIGNS = get_args(Sign)
EXAMPLE = "W:(ABSLOG)-(VAR)-(ATAN)-(7)-(PRUNE)"
SLOTS: Mapping[str, Iterable[str]] = {"pre": PRE, "reduce": REDUCE, "post": POST}
LIMIT = 2  # operators in the slots before and after the reduction


@dataclass(frozen=True)
class Program:
    """A function from scores to one number, and how numbers become sparsities; what is ill-typed cannot be built.

    Attributes:
        pre: names of up to two functions of a vector.
        reduce: name of the reduction.
        post: names of up to two functions of a scalar.
        spread: 100 λ, 1 to 50; sparsities differ by up to 2 λ.
        sign: whether a high value is pruned more, or kept.
    """

    pre: tuple[str, ...]
    reduce: str
    post: tuple[str, ...]
    spread: int = 8
    sign: Sign = "prune"

    def __post_init__(self) -> None:
        for slot, names in (("pre", self.pre), ("post", self.post)):
            if len(names) > LIMIT:
                raise ParedError(f"slot {slot!r} of a program holds up to {LIMIT} operators; got {', '.join(names)}")
            for name in names:
                _require(name, slot)
        if not self.reduce:
            raise ParedError(f"a program needs one reduction, the slot is empty; {did_you_mean('', REDUCE)}")
        _require(self.reduce, "reduce")
        if not isinstance(self.spread, int) or self.spread not in SPREADS:
            raise ParedError(
                f"the spread of a program is 100 lambda, a whole number from {SPREADS[0]} to {SPREADS[-1]}; "
                f"got {self.spread!r}"
            )
        require_known("sign of a program", self.sign, SIGNS)

    @property
    def width(self) -> float:
        """λ."""
        return self.spread / 100

    def __str__(self) -> str:
        """Return the text; the sign is left out where it is the default."""
        sign = "" if self.sign == "prune" else f"-({self.sign.upper()})"
        return f"W:({','.join(self.pre)})-({self.reduce})-({','.join(self.post)})-({self.spread}){sign}"


def parse(text: str) -> Program:
    """Read a program; white space and case do not matter.

    Raises:
        ParedError: the text is no program; says which part, and what was expected.
    """
    bare = re.sub(r"\s+", "", text).upper()
    if not bare.startswith("W:"):
        raise ParedError(f"a program begins with 'W:', as in {EXAMPLE}; got {text!r}")
    if not re.fullmatch(r"\([^()]*\)(-\([^()]*\)){2,4}", bare[2:]):
        raise ParedError(
            f"a program is three to five slots in parentheses joined by '-', as in {EXAMPLE}; got {text!r}"
        )
    slots = [slot.split(",") if slot else [] for slot in re.findall(r"\(([^()]*)\)", bare)]
    pre, reduce, post, *rest = slots
    if len(reduce) > 1:
        raise ParedError(f"slot 'reduce' of a program holds one operator; got {', '.join(reduce)}")
    spread = ",".join(rest[0]) if rest else "8"
    if not re.fullmatch(r"\d{1,9}", spread, re.ASCII):
        raise ParedError(
            f"the spread of a program is 100 lambda, a whole number from {SPREADS[0]} to {SPREADS[-1]}; got {spread!r}"
        )
    sign = ",".join(rest[1]).lower() if len(rest) > 1 else "prune"
    return Program(tuple(pre), reduce[0] if reduce else "", tuple(post), int(spread), cast(Sign, sign))


def _require(name: str, slot: str) -> None:
    """Check that an operator stands in a slot it belongs in."""
    if name in SLOTS[slot]:
        return
    if name in MATRIX_ONLY:
        raise ParedError(
            f"operator {name!r} needs a matrix; a program reads a vector. {did_you_mean(name, SLOTS[slot])}"
        )
    others = [other for other, names in SLOTS.items() if name in names]
    if others:
        raise ParedError(
            f"operator {name!r} belongs in slot {' or '.join(map(repr, others))}, not in {slot!r}; "
            f"{did_you_mean(name, SLOTS[slot])}"
        )
    raise ParedError(f"unknown operator {name!r} in slot {slot!r}; {did_you_mean(name, SLOTS[slot])}")
