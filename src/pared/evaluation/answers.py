"""The answer in what a model wrote, and whether it is the right one. Text in and out."""

import re
from fractions import Fraction

NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?|-?\.\d+")
MARKED = re.compile(r"####\s*(-?\$?[\d.,]*\d)")


def last_number(text: str) -> str | None:
    """Return the last number of a text without separators and units, None if there is none."""
    found = NUMBER.findall(text)
    return _plain(found[-1]) if found else None


def marked_number(text: str) -> str | None:
    """Return the number behind the first ``####``, as GSM8K marks its answers, None if there is none."""
    found = MARKED.search(text)
    return _plain(found.group(1)) if found else None


def same_number(one: str | None, other: str | None) -> bool:
    """Whether two numbers are equal: ``18``, ``18.0`` and ``18.00`` are."""
    if one is None or other is None:
        return False
    try:
        return Fraction(one) == Fraction(other)
    except (ValueError, ZeroDivisionError):
        return one == other


def boxed(text: str) -> str | None:
    r"""Return what stands in the last ``\boxed{...}`` or ``\fbox{...}``, braces matched; None if there is none."""
    start = max(text.rfind(r"\boxed"), text.rfind(r"\fbox"))
    if start < 0:
        return None
    rest = text[start:].partition("ed" if text.startswith(r"\boxed", start) else "box")[2]
    if rest.startswith(" "):  # \boxed 5
        return rest[1:].partition("$")[0].strip() or None
    if not rest.startswith("{"):
        return None
    depth = 0
    for place, sign in enumerate(rest):
        depth += (sign == "{") - (sign == "}")
        if depth == 0:
            return rest[1:place]
    return None


def same_expression(one: str | None, other: str | None) -> bool:
    """Whether two answers of MATH are equal once they are written one way: not algebra, only notation."""
    if one is None or other is None:
        return False
    first, second = normalised(one), normalised(other)
    return first == second or same_number(_value(first), _value(second))


def normalised(answer: str) -> str:
    r"""Return an answer written one way: no spaces, units, dollar signs; ``\frac`` with braces."""
    text = answer.strip().rstrip(".")
    text = re.sub(r"\\text\{\s*([^{}]*?)\s*\}", r"\1", text) if re.fullmatch(r"\\text\{[^{}]*\}", text) else text
    text = re.sub(r"\\(?:text|mbox|mathrm)\{[^{}]*\}\s*(?:\^\{?\d\}?)?$", "", text)  # a unit at the end
    for old, new in (
        (r"\left", ""), (r"\right", ""), (r"\!", ""), (r"\,", ""), (r"\;", ""), (r"\ ", ""), (r"\$", ""), ("$", ""),
        (r"\%", ""), ("%", ""), (r"^\circ", ""), (r"^{\circ}", ""), ("dfrac", "frac"), ("tfrac", "frac"), (r"\\%", ""),
    ):  # fmt: skip
        text = text.replace(old, new)
    text = re.sub(r"(?<=\d),(?=\d{3}(?:\D|$))", "", text)
    text = re.sub(r"^[a-zA-Z]\s*=\s*", "", text)
    text = "".join(text.split())
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac(\d)\{", r"\\frac{\1}{", text)
    text = re.sub(r"\\sqrt(\w)", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<![\d.])\.(?=\d)", "0.", text)
    whole = re.fullmatch(r"(-?\d+)/(\d+)", text)
    return rf"\frac{{{whole[1]}}}{{{whole[2]}}}" if whole else text


def _value(text: str) -> str | None:
    """Return a normalised answer as a number or a fraction of two, None if it is neither."""
    fraction = re.fullmatch(r"(-?)\\frac\{(-?\d+)\}\{(\d+)\}", text)
    if fraction:
        return f"{fraction[1]}{fraction[2]}/{fraction[3]}"
    return text if re.fullmatch(r"-?\d+(?:\.\d+)?", text) else None


def _plain(number: str) -> str:
    return number.replace(",", "").replace("$", "").rstrip(".")
