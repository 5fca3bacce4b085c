"""``pared methods``: what can be asked for."""

from rich.table import Table

from pared.cli.console import out
from pared.lowrank import METHODS


def methods() -> None:
    """List the methods, where each comes from and what it needs."""
    table = Table(header_style="bold")
    for column in ("method", "what it minimises", "needs", "paper"):
        table.add_column(column)
    for method in METHODS.values():
        table.add_row(method.name, method.summary, "calibration text" if method.calibrated else "no data", method.paper)
    out.print(table)
