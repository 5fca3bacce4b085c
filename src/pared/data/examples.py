"""Labelled examples, as all that reads them agrees on."""

from dataclasses import dataclass

Label = int | float | str


@dataclass(frozen=True)
class Example:
    """One labelled example.

    Attributes:
        texts: one text or a pair; of a token classification the words.
        label: of the whole example, or one a word.
    """

    texts: tuple[str, ...]
    label: Label | tuple[Label, ...]

    @property
    def by_word(self) -> bool:
        """Whether every word has a label."""
        return isinstance(self.label, tuple)


@dataclass(frozen=True)
class Examples:
    """Labelled examples by name.

    Attributes:
        name: what the user called them.
        rows: all with one label, or all with one a word.
        origin: the file or the data set on the Hub that they were read from.
        classes: the order the data set itself gives its classes, for a model that has no names for its own.
    """

    name: str
    rows: tuple[Example, ...]
    origin: str
    classes: tuple[str, ...] = ()

    @property
    def by_word(self) -> bool:
        """Whether every word has a label."""
        return self.rows[0].by_word
