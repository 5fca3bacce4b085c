"""``pared methods``: what can be asked for."""

from pared.cli.console import out, print_result
from pared.entrypoints import catalog
from pared.entrypoints.catalog import Listed
from pared.tables import Table

SPREADS = {"low_rank": "allocation", "sparse": "allocation of zeros"}


def methods() -> None:
    """List the methods, where each comes from and what it needs."""
    rows = []
    for method in catalog.methods():
        needs = "calibration text" if method.calibrated else "no data"
        options = "\n".join(map(str, method.options))
        summary = method.summary + _added(method)
        rows.append((method.name, summary, needs, options, method.allocation, method.paper))
    columns = ("method", "what it does", "needs", "options", "allocation", "paper")
    print_result(Table("", columns, rows, align="l"))
    print_training()
    for allocator in catalog.allocators():
        options = f" ({', '.join(map(str, allocator.options))})" if allocator.options else ""
        for family in allocator.families:
            out.print(f"{SPREADS[family]} {allocator.name}: {allocator.summary}{options}{_added(allocator)}")


def print_training() -> None:
    """List what `pared tune` trains with."""
    for method in catalog.trainings():
        options = "".join(f", {option}" for option in method.options)
        rate = method.figures["learning rate"]
        out.print(f"training {method.name}: {method.summary} (learning rate {rate:g}{options}; {method.paper})")


def _added(listed: Listed) -> str:
    return f" (added by {listed.package})" if listed.package else ""
