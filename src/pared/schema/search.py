"""What the user asked for of a search: how it evolves programs, and what they are measured on."""

from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field, ValidationInfo, field_validator

from pared.errors import ParedError
from pared.schema.base import Config, Whole
from pared.schema.command_line import Option

Strategy = Literal["evolution", "random"]
LEAST = {"iterations": 0, "population": 2, "top": 2, "workers": 1, "windows": 1, "final_windows": 1}


class SearchConfig(Config):
    """How a search goes: its evolution, and what candidates are measured on."""

    NOUN: ClassVar[str] = "search"
    iterations: Annotated[Whole, Field(strict=True), Option()] = 1000
    """Candidates after the first population."""
    population: Annotated[Whole, Field(strict=True), Option()] = 20
    """Programs that may become parents: random ones at first; afterwards a result is inserted and the worst dropped."""
    sample_ratio: Annotated[float, Option()] = 0.9
    """Part of the population that parents are looked for in."""
    top: Annotated[Whole, Field(strict=True), Option()] = 5
    """The best of that part, among which two parents are drawn; so many are measured on the full split at last."""
    seed: Annotated[Whole, Field(strict=True), Option()] = 0
    """Seed of all randomness of the search."""
    strategy: Annotated[Strategy, Option()] = "evolution"
    """evolution, or random programs all along, to compare with."""
    workers: Annotated[Whole, Field(strict=True), Option()] = 1
    """Candidates measured at a time; the last workers - 1 before a candidate are unknown to it."""
    windows: Annotated[Whole, Field(strict=True), Option()] = 8
    """Windows of the search split that every candidate is measured on."""
    length: Annotated[Annotated[Whole, Field(ge=2, strict=True)] | None, Option(default="1024")] = None
    """Tokens in a window, of calibration too where the recipe says nothing; the default is less where the model or the
    text allows less."""
    final_windows: Annotated[Annotated[Whole, Field(strict=True)] | None, Option(default="all")] = None
    """Windows of the search split that the best are measured on at last."""
    halving: Annotated[bool, Option()] = False
    """Measure on a quarter of the windows, half of them, then all, and stop candidates that are behind."""

    @field_validator("strategy", mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        if value not in get_args(Strategy):
            raise ParedError(f"strategy of a search: expected {' or '.join(get_args(Strategy))}, got {value!r}")
        return value

    @field_validator(*LEAST)
    @classmethod
    def _enough(cls, value: int | None, info: ValidationInfo) -> int | None:
        least = LEAST[str(info.field_name)]
        if value is not None and value < least:
            raise ParedError(f"{info.field_name} of a search: expected {least} or more, got {value}")
        return value

    @field_validator("sample_ratio")
    @classmethod
    def _a_fraction(cls, value: float) -> float:
        if not 0 < value <= 1:
            raise ParedError(f"sample ratio of a search: expected a fraction in (0, 1], got {value}")
        return value

    @property
    def total(self) -> int:
        """Candidates in all."""
        return self.population + self.iterations

    @property
    def rungs(self) -> int:
        """Steps in which a candidate is measured; it may be stopped after any but the last."""
        return 3 if self.halving else 1
