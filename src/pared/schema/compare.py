"""Models side by side: what each takes, what it is worth, how fast it is, what it says."""

from collections.abc import Callable, Iterator

from pydantic import Field

from pared.memory import format_size
from pared.schema.base import Strict
from pared.tables import Shown, Table


class ComparedModel(Strict):
    """One model of a comparison.

    Attributes:
        name: the last part of its name.
        made: how, in a few words; ``dense`` of one that was not compressed.
        target_parameters: of the modules that were compressed; None of a dense model.
        model_parameters: of the whole model, tied ones counted once.
        bytes_on_disk: of the weights.
        perplexity: recorded or measured; None where it is not known.
        perplexity_before: of the dense model it was made of, on the same text.
        measured_on: which text, windows and digest; none where perplexity is not known.
        tasks: figures of results that lie beside it, by task and metric.
        speed: tokens per second of results that lie beside it, by case.
        faster: by case, how many times as fast it was as what it was timed against, and would be ideally.
        generations: what it continues each prompt with.
    """

    name: str
    made: str
    target_parameters: int | None = None
    model_parameters: int
    bytes_on_disk: int
    perplexity: float | None = None
    perplexity_before: float | None = None
    measured_on: str | None = None
    tasks: dict[str, float] = Field(default={})
    speed: dict[str, float] = Field(default={})
    faster: dict[str, tuple[float, float]] = Field(default={})
    generations: tuple[str, ...] = ()


class ComparedModels(Shown, Strict):
    """A comparison.

    Attributes:
        models: in the order in which they were named.
        prompts: that were continued.
        new_tokens: how many were generated of each, greedily.
        notes: what there is to say besides.
    """

    models: tuple[ComparedModel, ...]
    prompts: tuple[str, ...] = ()
    new_tokens: int = 0
    notes: tuple[str, ...] = ()

    def table(self) -> Table:
        """Return a row for every figure, a column for every model."""
        rows = [row for row in self._rows() if any(row[1:])]
        return Table("", ("", *(one.name for one in self.models)), rows, self.notes)

    def tables(self) -> Iterator[Table]:
        """Yield the figures, then for every prompt what each model says."""
        yield self.table()
        for place, prompt in enumerate(self.prompts):
            rows = [(one.name, one.generations[place]) for one in self.models if len(one.generations) > place]
            yield Table(f"{prompt} ...", ("", f"{self.new_tokens} tokens, greedily"), rows, align="l")

    def as_markdown(self) -> str:
        """Return all tables in Markdown."""
        return "\n\n".join(table.as_markdown() for table in self.tables()) + "\n"

    def _rows(self) -> Iterator[tuple[str, ...]]:
        def row(what: str, told: Callable[[ComparedModel], str]) -> tuple[str, ...]:
            return (what, *map(told, self.models))

        yield row("made by", lambda one: one.made)
        yield row("target parameters", lambda one: _number(one.target_parameters))
        yield row("whole-model parameters", lambda one: f"{one.model_parameters:,}")
        yield row("weights on disk", lambda one: format_size(one.bytes_on_disk))
        yield row("perplexity", lambda one: "" if one.perplexity is None else f"{one.perplexity:,.2f}")
        yield row("times the dense model's", _ratio)
        yield row("measured on", lambda one: one.measured_on or "")
        for name in dict.fromkeys(name for one in self.models for name in one.tasks):
            yield row(name, lambda one, name=name: f"{one.tasks[name]:.4f}" if name in one.tasks else "")  # type: ignore[misc]
        for name in dict.fromkeys(name for one in self.models for name in one.speed):
            yield row(f"{name}, tokens/s",
                      lambda one, name=name: f"{one.speed[name]:,.1f}" if name in one.speed else "")  # type: ignore[misc] # fmt: skip


def _number(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _ratio(one: ComparedModel) -> str:
    known = one.perplexity is not None and one.perplexity_before
    return f"x{one.perplexity / one.perplexity_before:.3g}" if known else ""  # type: ignore[operator]
