"""``pared methods``: what can be asked for."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated, Any

import typer

from pared.cli.console import JsonFile, errors, out, print_result, write_json
from pared.entrypoints import catalog
from pared.entrypoints.catalog import Listed
from pared.names import require_known
from pared.tables import Table

SPREADS = {"low_rank": "allocation", "sparse": "allocation of zeros"}


def methods(
    name: Annotated[
        str | None,
        typer.Argument(help="Describe this method, allocation or training, with its options.", show_default=False),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """List the methods, where each comes from and what it needs."""
    with errors():
        if name is not None:
            print_one(name)
            write_json(json_file, as_json(name))
            return
        rows = [(method.name, _described(method)) for method in catalog.methods()]
        print_result(Table("", ("method", "what it does, what it needs and takes, where it is from"), rows, align="l"))
        print_training()
        for allocator in catalog.allocators():
            options = f" ({', '.join(map(str, allocator.options))})" if allocator.options else ""
            for family in allocator.families:
                out.print(f"{SPREADS[family]} {allocator.name}: {allocator.summary}{options}{_added(allocator)}")
        write_json(json_file, as_json(None))


def as_json(name: str | None) -> dict[str, Any]:
    """Return methods, allocations and trainings with their options, all there are or those of a name."""
    listed = {"methods": catalog.methods(), "allocations": catalog.allocators(), "trainings": catalog.trainings()}
    return {what: [asdict(one) for one in every if name in (None, one.name)] for what, every in listed.items()}


def print_one(name: str) -> None:
    """Print all that has a name, with every option.

    Raises:
        ParedError: nothing has it.
    """
    every = list(_every())
    require_known("method, allocation or training", name, {listed.name for _, listed in every})
    for what, listed in every:
        if listed.name == name:
            paper = f" ({listed.paper})" if listed.paper else ""
            out.print(f"{what} {name}: {listed.summary}{paper}{_added(listed)}")
            rows = [(one.name, str(one.default), ", ".join(one.choices), one.about) for one in listed.options]
            if rows:
                print_result(Table("", ("option", "default", "one of", "what"), rows, align="l"))


def print_training() -> None:
    """List what `pared tune` trains with."""
    for method in catalog.trainings():
        options = "".join(f", {option}" for option in method.options)
        rate = method.figures["learning rate"]
        out.print(f"training {method.name}: {method.summary} (learning rate {rate:g}{options}; {method.paper})")


def _every() -> Iterator[tuple[str, Listed]]:
    """Yield all there is, and what it is."""
    yield from (("method", one) for one in catalog.methods())
    yield from (("training", one) for one in catalog.trainings())
    yield from ((SPREADS[family], one) for one in catalog.allocators() for family in one.families)


def _described(method: Listed) -> str:
    """Return all but the name, in lines that a narrow terminal can break between words."""
    needs = "needs calibration text" if method.calibrated else "needs no data"
    options = f"; options {', '.join(map(str, method.options))}" if method.options else ""
    return f"{method.summary}{_added(method)}\n{needs}; allocation {method.allocation}{options}\n{method.paper}"


def _added(listed: Listed) -> str:
    return f" (added by {listed.package})" if listed.package else ""
