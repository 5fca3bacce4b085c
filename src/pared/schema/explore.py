"""What the user asked for of an exploration, and what came of it: one model at every budget."""

import math
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator
from typing_extensions import Self

from pared.memory import format_size, parse_size
from pared.names import called, require_known
from pared.schema.base import Config, Size, Strict, Whole
from pared.schema.command_line import Option
from pared.schema.evaluate import Names
from pared.schema.recipe import Recipe
from pared.tables import Shown, Table

STRUCTURES = ("ranks", "widths", "mixed", "zeros")
TARGETS = ("max_perplexity_ratio", "target_bytes", "target_speed")


def _numbers(value: Any) -> Any:
    """Return numbers that stand between commas, in one text or several."""
    pieces = [value] if isinstance(value, (str, int, float)) else value
    return tuple(one for piece in pieces for one in (piece.split(",") if isinstance(piece, str) else (piece,)))


Fractions = Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], BeforeValidator(_numbers), Field(min_length=1)]


class ExploreConfig(Config):
    """Which budgets of which structures are explored, what is measured, and what is looked for."""

    NOUN: ClassVar[str] = "exploration"
    structures: Annotated[Names, Option(default=", ".join(STRUCTURES))] = STRUCTURES
    """What is made smaller, with commas: ranks, widths, mixed, zeros; those that a model has not are left out."""
    keep: Annotated[Fractions, Option(default="0.95 to 0.4 in steps of 0.05")] = tuple(
        round(0.95 - step / 20, 2) for step in range(12)
    )
    """Budgets, with commas: fractions of the parameters of the target modules that stay."""
    pruner: Annotated[str, Option()] = "sparsegpt"
    """The method of zeros."""
    measure: Annotated[Whole, Field(ge=0, strict=True), Option()] = 0
    """Budgets of every structure at which perplexity is measured, from the largest to the least, evenly; 0 predicts
    alone."""
    max_perplexity_ratio: Annotated[Annotated[float, Field(gt=1)] | None, Option()] = None
    """Pick the smallest model whose perplexity is at most so many times the dense model's."""
    target_bytes: Annotated[Size | None, Option()] = None
    """Pick the model of the least loss whose weights are at most so large: 300MB."""
    target_speed: Annotated[Annotated[float, Field(gt=1)] | None, Option()] = None
    """Pick the model of the least loss that is so many times as fast, ideally: by the numbers a token is multiplied
    with."""

    @field_validator("structures")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            require_known("structure", name, STRUCTURES)
        if not value:
            raise ValueError(f"structures: expected some of {', '.join(STRUCTURES)}, got none")
        return value

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        given = [called(name, str(getattr(self, name))) for name in TARGETS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{given[0]} and {given[1]} each pick a budget; give one")
        return self

    @property
    def bytes(self) -> int | None:
        """The bytes that are looked for."""
        return None if self.target_bytes is None else parse_size(self.target_bytes, "target_bytes")


class Point(Strict):
    """One budget of one structure.

    Attributes:
        structure: ``ranks``, ``widths``, ``mixed`` or ``zeros``; ``dense`` of the model itself.
        keep: the fraction of the target modules' parameters that was asked for.
        target_parameters: that stay.
        model_parameters: of the whole model.
        bytes_on_disk: of the weights, with the indices of pivots and zeros.
        speed: times as fast as the dense model, ideally: by the parameters that a token is multiplied with. Zeros make
            no kernel of ours faster: 1.
        loss: what is predicted to be added to the loss, nats a token.
        perplexity: measured; None where it was not.
    """

    structure: Literal["dense", "ranks", "widths", "mixed", "zeros"]
    keep: float
    target_parameters: int
    model_parameters: int
    bytes_on_disk: int
    speed: float
    loss: float
    perplexity: float | None = None


class Exploration(Shown, Strict):
    """One model at every budget.

    Attributes:
        format_version: of this record.
        model: its name.
        recipe: what was decomposed, and on what; its budget is not read.
        config: what was explored.
        calibration: what was calibrated on.
        evaluation: what perplexity was measured on; none if it was not.
        dense: the model itself.
        points: by structure, from the largest budget to the least.
        knees: by structure, the budget at which the predicted curve bends most, the dense model its end.
        measured_knees: the same of the measured one, where enough was measured.
        pick: what was looked for; none where nothing was.
        picked: the recipe that compresses to it.
        notes: what there is to say besides.
        seconds: by stage.
        versions: of the software.
        machine: where it ran.
    """

    format_version: Literal[1] = 1
    model: str
    recipe: Recipe
    config: ExploreConfig
    calibration: dict[str, Any] | None = None
    evaluation: dict[str, Any] | None = None
    dense: Point
    points: tuple[Point, ...]
    knees: dict[str, float] = Field(default={})
    measured_knees: dict[str, float] = Field(default={})
    pick: Point | None = None
    picked: Recipe | None = None
    notes: tuple[str, ...] = ()
    seconds: dict[str, float] = Field(default={})
    versions: dict[str, str] = Field(default={})
    machine: dict[str, str] = Field(default={})

    def curve(self, structure: str) -> list[Point]:
        """Return the points of one structure, from the largest budget to the least."""
        return [point for point in self.points if point.structure == structure]

    def measured_loss(self, point: Point) -> float | None:
        """Return what a point was measured to add to the loss, nats a token: the logarithm of the perplexities."""
        before, after = self.dense.perplexity, point.perplexity
        return None if before is None or after is None else math.log(after / before)

    def table(self) -> Table:
        """Return the points, with the knees marked."""
        measured = any(point.perplexity is not None for point in self.points)
        columns = (
            "structure",
            "keep",
            "parameters",
            "size",
            "speed",
            "predicted",
            *(("measured",) if measured else ()),
        )
        rows = [self._row(point, measured) for point in self.points]
        return Table(self.model, columns, rows, tuple(self._remarks()), align="lr")

    def _row(self, point: Point, measured: bool) -> tuple[str, ...]:
        knee = " knee" if self.knees.get(point.structure) == point.keep else ""
        loss = self.measured_loss(point)
        told = ("" if loss is None else f"x{math.exp(loss):.3g}",) if measured else ()
        predicted = "" if point.loss > 99 else f"x{math.exp(point.loss):.3g}"
        return (f"{point.structure}{knee}", f"{point.keep:g}", _counted(point.model_parameters),
                format_size(point.bytes_on_disk), f"x{point.speed:.2f}", predicted, *told)  # fmt: skip

    def _remarks(self) -> Iterator[str]:
        dense = self.dense
        yield (f"dense: {_counted(dense.model_parameters)} parameters, {format_size(dense.bytes_on_disk)}"
               + (f", perplexity {dense.perplexity:,.2f}" if dense.perplexity is not None else ""))  # fmt: skip
        yield "predicted and measured: perplexity as a multiple of the dense model's; speed is ideal"
        if self.evaluation is not None:
            on = self.evaluation
            yield f"measured on {on['text']}: {on['windows']} windows of {on['length']} tokens"
        yield from self.notes
        if self.pick is not None and self.picked is not None:
            point, loss = self.pick, self.measured_loss(self.pick)
            how = f"predicted x{math.exp(point.loss):.3g}" if loss is None else f"measured x{math.exp(loss):.3g}"
            yield (f"picked: {point.structure} at keep {point.keep:.4g}, {format_size(point.bytes_on_disk)}, "
                   f"ideal speed x{point.speed:.2f}, {how}")  # fmt: skip


def _counted(parameters: int) -> str:
    return f"{parameters / 1e6:,.1f} M" if parameters >= 1e6 else f"{parameters:,}"
