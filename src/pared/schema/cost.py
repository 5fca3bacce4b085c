"""What a compression is predicted to cost: seconds by stage, bytes of memory and disk."""

from typing import Annotated

from pydantic import Field

from pared.memory import format_size
from pared.schema.base import Strict
from pared.schema.plan import Plan
from pared.tables import Shown, Table


class Cost(Shown, Strict):
    """A prediction, from shapes and a machine.

    Attributes:
        machine: what it is for.
        computed: whether times are from published figures, on a machine that nothing was measured on.
        seconds: by stage, as in the manifest of a compression.
        memory: bytes needed at once, by what for.
        disk: bytes beside the output, and of it.
        streamed: whether the model is read block by block.
        unpredicted: stages that are not predicted, and why.
        notes: what it rests on.
    """

    machine: str
    computed: bool
    seconds: dict[str, Annotated[float, Field(ge=0)]]
    memory: dict[str, int]
    disk: dict[str, int]
    streamed: bool
    unpredicted: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def total(self) -> float:
        """Seconds of all stages that are predicted."""
        return sum(self.seconds.values())

    def table(self) -> Table:
        """Return stages with their times, then what takes memory and disk."""
        rows = [(stage, format_seconds(taken)) for stage, taken in self.seconds.items()]
        rows.append(("together", format_seconds(self.total)))
        for what, parts in (("memory", self.memory), ("disk", self.disk)):
            largest = ", ".join(name for name, _ in sorted(parts.items(), key=lambda part: -part[1])[:2])
            rows.append((f"{what}: {largest}" if parts else what, format_size(sum(parts.values()))))
        how = "computed from published figures" if self.computed else "measured"
        lines = [f"{self.machine}, {how}", *self.notes, *(f"not predicted: {one}" for one in self.unpredicted)]
        return Table("predicted cost" + (", block by block" if self.streamed else ""), ("stage", ""), rows, lines)


class CostedPlan(Plan):
    """A plan, and what it is predicted to cost.

    Attributes:
        cost: the prediction.
    """

    cost: Cost

    def table(self) -> Table:
        """Return the table of the plan, with the predicted times below it."""
        table = super().table()
        told = self.cost.table()
        lines = [*table.lines, told.title, *(f"  {name}: {value}" for name, value in told.rows), *told.lines]
        return Table(table.title, table.columns, table.rows, lines, table.align, table.faint_from)


def format_seconds(seconds: float) -> str:
    """Return a time as people read it: ``0.4 s``, ``12 min``, ``3.5 h``."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:,.1f} h"
