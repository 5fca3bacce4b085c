"""Data sets of the Hub, read by the datasets library."""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pared.errors import ParedError


@dataclass(frozen=True)
class HubSet:
    """A split of a data set on the Hub.

    Attributes:
        repository: such as ``openai/gsm8k``.
        config: of the repository, if it has several.
        split: of that.
        file: of the repository, where a single one is read.
    """

    repository: str
    config: str | None = None
    split: str = "train"
    file: str | None = None

    def __str__(self) -> str:
        config = "" if self.config is None else f"[{self.config}]"
        return f"Hub data set {self.repository}{config}, split {self.split!r}"

    def rows(self) -> Sequence[Mapping[str, Any]]:
        """Read the rows, one at least.

        Raises:
            ParedError: the datasets library is not installed, the data set cannot be read, or has no rows.
        """
        if importlib.util.find_spec("datasets") is None:
            raise ParedError(
                f"{self.repository} is read from the Hub and needs the package datasets; install it with: "
                "pip install datasets, or name a folder of local copies in PARED_DATA"
            )
        import datasets

        files = {self.split: self.file} if self.file else None
        try:
            rows: Sequence[Mapping[str, Any]] = datasets.load_dataset(
                self.repository, self.config, split=self.split, data_files=files
            )
            empty = not len(rows)
        except Exception as error:  # datasets and huggingface_hub raise many kinds
            raise unreadable(self, error) from None
        if empty:
            raise ParedError(f"{self} has no rows")
        return rows


def unreadable(what: object, error: Exception) -> ParedError:
    """Return the error of data on the Hub that cannot be read."""
    return ParedError(
        f"{what}: cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:160]}); "
        "offline, name a folder of local copies in PARED_DATA (docs/evaluation.md tells what lies there) or a file of "
        "your own"
    )
