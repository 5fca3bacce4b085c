"""What an examination found, line by line."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pared.tables import Shown, Table

State = Literal["ok", "note", "absent", "wrong"]
MARKS: dict[State, str] = {"ok": "ok", "note": "note", "absent": "-", "wrong": "WRONG"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: it is.
        state: ``wrong`` for what makes a model load wrongly or not at all, ``note`` for what is good to know,
            ``absent`` for what is not installed and not needed.
        found: in a sentence.
        advice: what to do, if anything.
    """

    what: str
    state: State
    found: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.found}; {self.advice}" if self.advice else self.found


@dataclass(frozen=True, repr=False)
class Diagnosis(Shown):
    """What this environment can do, and how it would load a folder.

    Attributes:
        machine: findings on the environment.
        folder: as it was named; none if the environment alone was examined.
        loading: findings on the folder.
    """

    machine: tuple[Finding, ...]
    folder: str | None = None
    loading: tuple[Finding, ...] = ()

    @property
    def wrong(self) -> tuple[Finding, ...]:
        """The findings that keep the folder from being loaded right; without a folder, pared from running."""
        return tuple(one for one in (*self.machine, *self.loading) if one.state == "wrong")

    @property
    def verdict(self) -> str:
        """Whether the folder loads right here, in a line; without a folder, whether pared runs here."""
        if self.folder is None:
            return f"pared does not run here: {self.wrong[0]}" if self.wrong else "pared runs here"
        if not self.wrong:
            return f"{self.folder} loads right here; `pared verify` compares what it answers with what was recorded"
        return f"{self.folder} would load wrongly here, or not at all: {len(self.wrong)} of the above is wrong"

    def tables(self) -> Iterator[Table]:
        """Yield the environment, then the folder; the verdict is below the last."""
        lines = () if self.folder is not None else (self.verdict,)
        yield _table("this environment", self.machine, lines)
        if self.folder is not None:
            yield _table(self.folder, self.loading, (self.verdict,))

    def table(self) -> Table:
        """Return everything as one table."""
        return _table(self.folder or "this environment", (*self.machine, *self.loading), (self.verdict,))

    def describe(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        found = {name: [asdict(one) for one in getattr(self, name)] for name in ("machine", "loading")}
        return {"folder": self.folder, "loads_wrongly": bool(self.wrong), "verdict": self.verdict, **found}


def _table(title: str, findings: tuple[Finding, ...], lines: tuple[str, ...]) -> Table:
    rows = [(one.what, MARKS[one.state], str(one)) for one in findings]
    return Table(title, ("what", "", "found"), rows, lines, align="l")
