"""``pared methods``: what can be asked for."""

from rich.table import Table

from pared.allocation import ALLOCATORS
from pared.allocation.registry import LAYER_ALLOCATORS
from pared.cli.console import out
from pared.engine import EVERY_METHOD
from pared.training import METHODS


def methods() -> None:
    """List the methods, where each comes from and what it needs."""
    table = Table(header_style="bold")
    for column in ("method", "what it does", "needs", "options", "allocation", "paper"):
        table.add_column(column, overflow="fold")
    for method in EVERY_METHOD.values():
        options = "\n".join(f"{name}={value}" for name, value in method.options.items())
        needs = "calibration text" if method.calibrated else "no data"
        table.add_row(method.name, method.summary, needs, options, method.allocation, method.paper)
    out.print(table)
    print_training()
    for allocator in ALLOCATORS.values():
        options = "".join(f" ({name}={value})" for name, value in allocator.options.items())
        out.print(f"allocation {allocator.name}: {allocator.summary}{options}")
    for zeros in LAYER_ALLOCATORS.values():
        options = ", ".join(f"{name}={value}" for name, value in zeros.options.items())
        out.print(f"allocation of zeros {zeros.name}: {zeros.summary} ({options})")


def print_training() -> None:
    """List what `pared tune` trains with."""
    for method in METHODS.values():
        options = "".join(f", {name}={value}" for name, value in method.options.items())
        out.print(
            f"training {method.name}: {method.summary} (learning rate {method.learning_rate:g}{options}; "
            f"{method.paper})"
        )
