"""Well-known rows: a file under ``PARED_DATA``, or the Hub where that names no folder."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pared.data.files import data_file, data_folder, read_rows
from pared.data.hub import HubSet


@dataclass(frozen=True)
class DataSet:
    """Rows that lie in a folder of the user's, or on the Hub.

    Attributes:
        file: of JSON lines, under ``PARED_DATA``.
        hub: where they are read if that names no folder.
        fields: that a row there must have, for it to be converted.
        converted: from a row there to one as in the file.
    """

    file: str
    hub: HubSet
    fields: tuple[str, ...] = ()
    converted: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict

    def origin(self, what: str) -> str:
        """Say where the rows are from.

        Args:
            what: is read, for messages.

        Raises:
            ParedError: the folder has no such file.
        """
        return str(self.hub) if data_folder() is None else str(data_file(self.file, what))

    def rows(self, what: str) -> Iterator[tuple[str, Any]]:
        """Yield each row behind the words that say which it is.

        Args:
            what: is read, for messages.

        Raises:
            ParedError: it cannot be read, or a row is not JSON; names the file and the row.
        """
        if data_folder() is None:
            for which, row in self.hub.rows(*self.fields):
                yield which, self.converted(row)
            return
        path = data_file(self.file, what)
        for number, row in read_rows(path):
            yield f"{path}, row {number}", row


GSM8K_TRAIN = DataSet("math/gsm8k_train.jsonl.gz", HubSet("openai/gsm8k", "main", "train"))
GSM8K_TEST = DataSet("math/gsm8k_test.jsonl", HubSet("openai/gsm8k", "main", "test"))
MATH500 = DataSet("math/math500.jsonl", HubSet("HuggingFaceH4/MATH-500", split="test"))
MBPP = DataSet("code/mbpp.jsonl", HubSet("google-research-datasets/mbpp", "full", "train+test+prompt"))
ALPACA = DataSet("instruct/alpaca_random_9k.jsonl.gz", HubSet("tatsu-lab/alpaca"))
ALPACA_CLEANED = DataSet("instruct/alpaca_cleaned.jsonl.gz", HubSet("yahma/alpaca-cleaned"))
