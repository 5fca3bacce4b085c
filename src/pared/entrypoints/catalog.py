"""What can be asked for: methods, allocators and trainings, as data for `pared methods` and the docs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from pared.allocation import ALLOCATORS
from pared.methods import FAMILIES, METHODS
from pared.schema.options import Options
from pared.training import METHODS as TRAININGS


@dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
        name: as in ``--option NAME=VALUE``.
        default: its value unless another is given.
        choices: all values it may have, if they can be listed.
        about: what it is for.
    """

    name: str
    default: bool | int | float | str
    choices: tuple[str, ...] = ()
    about: str = ""

    def __str__(self) -> str:
        return f"{self.name}={self.default}"


@dataclass(frozen=True)
class Listed:
    """A method, an allocator or a training.

    Attributes:
        name: what a recipe calls it.
        summary: what it does, in a line.
        families: ``low_rank`` or ``sparse``; none for a training.
        options: it has.
        paper: where it comes from; empty for an allocator.
        calibrated: whether it needs calibration text, by default.
        allocation: of a method, how the budget is spread unless a recipe says otherwise.
        package: that adds it, with its version; empty for what is built in.
        figures: others, by name.
    """

    name: str
    summary: str
    families: tuple[str, ...] = ()
    options: tuple[Option, ...] = ()
    paper: str = ""
    calibrated: bool = False
    allocation: str = ""
    package: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)


def methods() -> list[Listed]:
    """Return the methods, those of installed packages too; one that cannot be used is logged and left out."""
    return [
        Listed(
            name=name,
            summary=method.summary,
            families=(method.family,),
            options=options_in(method.config),
            paper=method.paper,
            calibrated=bool(method.requires([(1, 1)], method.config()) | method.gradients(method.config())),
            allocation=method.allocation,
            package=METHODS.package_of(name),
        )
        for name, method in METHODS.available().items()
    ]


def allocators() -> list[Listed]:
    """Return the allocators, of ranks first; as :func:`methods`."""
    found = [
        Listed(
            name=name,
            summary=one.summary,
            families=tuple(family for family in FAMILIES if family in one.families),
            options=options_in(one.config),
            calibrated=bool(one.requires - {"alphas"}),
            package=ALLOCATORS.package_of(name),
        )
        for name, allocators in ALLOCATORS.available().items()
        for one in allocators
    ]
    return sorted(found, key=lambda one: FAMILIES.index(one.families[0]))


def trainings() -> list[Listed]:
    """Return what `pared tune` trains with."""
    return [
        Listed(
            name=method.name,
            summary=method.summary,
            options=options_in(method.config),
            paper=method.paper,
            figures={"learning rate": method.learning_rate},
        )
        for method in TRAININGS.values()
    ]


def options_in(config: type[Options]) -> tuple[Option, ...]:
    """Return the options that a type holds."""
    found: list[Option] = []
    for name, one in config.model_fields.items():
        annotation: Any = one.annotation
        choices = tuple(map(str, get_args(annotation)))
        found.append(Option(name, one.default, choices, one.description or ""))
    return tuple(found)
