"""Data sets of the Hub, read by the datasets library."""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from pared.data.files import require_characters
from pared.errors import ParedError, UnreachableError


@dataclass(frozen=True)
class HubSet:
    """A split of a data set on the Hub.

    Attributes:
        repository: such as ``openai/gsm8k``.
        config: of the repository, if it has several; those that are read one after the other.
        split: of that.
        file: of the repository, where a single one is read.
    """

    repository: str
    config: str | tuple[str, ...] | None = None
    split: str = "train"
    file: str | None = None

    def __str__(self) -> str:
        config = "" if self.config is None else f"[{', '.join(self._configs)}]"  # type: ignore[arg-type]
        part = f"split {self.split!r}" if self.file is None else self.file
        return f"Hub data set {self.repository}{config}, {part}"

    @property
    def _configs(self) -> tuple[str | None, ...]:
        return self.config if isinstance(self.config, tuple) else (self.config,)

    def rows(self, *fields: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield each row, one at least, behind the words that say which it is.

        Args:
            fields: that a row must have.

        Raises:
            ParedError: the datasets library is not installed, the data set cannot be read or has no rows, or a row has
                not the fields; names the row.
        """
        number = 0
        for number, row in enumerate(chain.from_iterable(self._read()), 1):
            missing = [field for field in fields if row.get(field) is None]
            if missing:
                raise ParedError(f"{self}, row {number}: expected {', '.join(fields)}; {missing[0]} is missing, got "
                                 f"{', '.join(sorted(row))}")  # fmt: skip
            for field in fields:
                require_characters(f"{self}, row {number}", row[field])
            yield f"{self}, row {number}", row
        if not number:
            raise ParedError(f"{self} has no rows")

    def table(self) -> Sequence[Mapping[str, Any]]:
        """Return the rows, one at least, each read when it is asked for.

        Raises:
            ParedError: as :meth:`rows`.
        """
        (found,) = self._read()
        if not len(found):
            raise ParedError(f"{self} has no rows")
        return found

    def _read(self) -> list[Sequence[Mapping[str, Any]]]:
        """Return the rows of every configuration."""
        if importlib.util.find_spec("datasets") is None:
            raise UnreachableError(
                f"{self} is read by the package datasets; install it with: pip install datasets, or name a folder of "
                "local copies in PARED_DATA"
            )
        import datasets

        files = {self.split: self.file} if self.file else None
        try:
            return [
                datasets.load_dataset(self.repository, config, split=self.split, data_files=files)
                for config in self._configs
            ]
        except Exception as error:  # datasets and huggingface_hub raise many kinds
            raise unreadable(self, error) from None


def unreadable(what: object, error: Exception) -> UnreachableError:
    """Return the error of data on the Hub that cannot be read."""
    return UnreachableError(
        f"{what}: cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:160]}); if this machine is "
        "offline, name a folder of local copies in PARED_DATA (docs/evaluation.md says what belongs there)"
    )
