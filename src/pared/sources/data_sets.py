"""Well-known rows: a file under ``PARED_DATA``, or the Hub where that names no folder."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pared.sources.files import data_file, read_rows
from pared.sources.hub import HubSet


def is_local() -> bool:
    """Whether well-known data are read from a folder, the one that ``PARED_DATA`` names, and not from the Hub."""
    return bool(os.environ.get("PARED_DATA"))


@dataclass(frozen=True)
class DataSet:
    """Rows that lie in a folder of the user's, or on the Hub.

    Attributes:
        file: of JSON lines, under ``PARED_DATA``.
        hub: where they are read if that names no folder.
        converted: from a row there to one as in the file.
    """

    file: str
    hub: HubSet
    converted: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict

    def origin(self, what: str) -> str:
        """Say where the rows are from.

        Args:
            what: is read, for messages.

        Raises:
            ParedError: the folder has no such file.
        """
        return str(data_file(self.file, what)) if is_local() else str(self.hub)

    def rows(self, what: str) -> Iterator[tuple[str, Any]]:
        """Yield each row behind the words that say which it is.

        Args:
            what: is read, for messages.

        Raises:
            ParedError: it cannot be read, or a row is not JSON; names the file and the row.
        """
        if not is_local():
            for number, row in enumerate(self.hub.rows(), 1):
                yield f"{self.hub}, row {number}", self.converted(row)
            return
        path = data_file(self.file, what)
        for number, row in read_rows(path):
            yield f"{path}, row {number}", row
