"""Statistics on disk: collected once, solved for as many methods and budgets as one likes."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pared.calibration.forward import BlockStatistics
from pared.calibration.statistics import Statistic, statistic_kind
from pared.errors import ParedError
from pared.io.files import appearing
from pared.io.fingerprint import require_same

# 1 held values, which nothing can be added to; 2 not what they were collected of; 3 no fourth moments; 4 no parts
VERSION = 5
FILES = "block-*.safetensors"
DRAWN = {"labels_per_token": 1, "gradient_clip": 0.0}  # of gradients that were saved before either was told


@dataclass(frozen=True)
class SavedStatistic:
    """A statistic in a file, which is read when it is asked for and not kept: a handle is all that is in memory.

    Attributes:
        name: of the statistic.
        tokens: how many tokens it saw.
        features: that it was made for.
        file: of its block.
        key: what its tensors are called there, up to the last ``/``; the same for all sites that share it.
    """

    name: str
    tokens: int
    features: int
    file: Path
    key: str

    @property
    def value(self) -> torch.Tensor:
        """The statistic, float64; read again every time."""
        return self.load().value

    @property
    def shrinkage(self) -> float:
        """How far the value is to be drawn towards equal energies, where the statistic tells that; else 0."""
        return float(getattr(self.load(), "shrinkage", 0.0))

    def load(self, device: torch.device | None = None) -> Statistic:
        """Return the accumulator as it was when it was saved: it can be updated and merged, to the same bits.

        Args:
            device: where it continues to accumulate; the CPU if none is given.

        Raises:
            ParedError: the file is gone or damaged.
        """
        statistic = statistic_kind(self.name).accumulator(self.features, device or torch.device("cpu"))
        with _opened(self.file) as tensors:
            prefix = f"{self.key}/"
            names = [name for name in tensors.keys() if name.startswith(prefix)]  # noqa: SIM118 - not a mapping
            statistic.load_state_dict({name.removeprefix(prefix): tensors.get_tensor(name) for name in names})
        return statistic


def begin(folder: Path, source: Mapping[str, Any]) -> None:
    """Make room for statistics in a folder: those of the same source go, and so do files of another version.

    Args:
        folder: need not be there.
        source: what will be collected of, as every block is to be saved with it.

    Raises:
        ParedError: it holds statistics of something else.
    """
    files = sorted(folder.glob(FILES))
    for file in files:
        try:
            about = _about(file)
        except ParedError:
            continue  # damaged, or of another version: nothing can be done with it
        require_same(
            about["source"],
            source,
            f"{folder} holds statistics of something else",
            "give another folder, or remove this one",
        )
    for file in files:
        file.unlink()


def require_fits(blocks: Iterable[BlockStatistics], source: Mapping[str, Any]) -> None:
    """Refuse saved statistics that were collected of something else, or that lack a block.

    Args:
        blocks: as :func:`saved_blocks` yields them; none is held.
        source: what they are needed of; ``blocks`` among it, how many there are. What only one of the two says
            something of, such as a loss, is not compared.

    Raises:
        ParedError: spells out what differs, or names the block.
    """
    count, seen = source["blocks"], 0
    for block in blocks:
        told = {**(DRAWN if "loss" in block.source else {}), **block.source}
        there = {name: told[name] for name in source if name in told}
        now = {name: value for name, value in source.items() if name in there}
        advice = "collect statistics of this model on these tokens"
        require_same(there, now, "the collected statistics are of something else", advice)
        if block.index != seen:
            break
        seen += 1
    else:
        if seen == count:
            return
    lacking = f"lack block {seen}" if seen < count else f"hold more than the {count} blocks of the model"
    raise ParedError(f"the collected statistics {lacking}; collect them again")


def save_block(folder: Path, block: BlockStatistics) -> Path:
    """Write the statistics of one block to a file of its own; what sites share is written once.

    The file appears when it is complete and on the disk, so that an interrupted pass leaves only whole files.

    Args:
        folder: made if it is not there.
        block: with accumulators, and with its source.

    Returns:
        The file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    keys: dict[int, str] = {}  # of a statistic that several sites share: that of the first of them
    entries: dict[str, dict[str, dict[str, Any]]] = {}
    for site, own in block.statistics.items():
        for name, found in own.items():
            key = keys.setdefault(id(found), f"{site}/{name}")
            statistic = found.load() if isinstance(found, SavedStatistic) else cast(Statistic, found)
            if key == f"{site}/{name}":
                tensors |= {f"{key}/{part}": tensor.cpu() for part, tensor in statistic.state_dict().items()}
            entry = {"key": key, "tokens": statistic.tokens, "features": statistic.features}
            entries.setdefault(site, {})[name] = entry
    about = {"version": VERSION, "index": block.index, "influence": block.influence, "entries": entries}
    about["source"] = dict(block.source)
    file = folder / f"block-{block.index:05}.safetensors"
    _write(file, tensors, about)
    return file


def saved_blocks(folder: Path) -> Iterator[BlockStatistics]:
    """Yield the blocks of a folder in order; their statistics are read one by one, when their value is asked for.

    Raises:
        ParedError: there are none, or a file is damaged or of another version.
    """
    files = sorted(folder.glob(FILES))
    if not files:
        raise ParedError(f"{folder} holds no saved statistics; collect them first")
    yield from map(saved_block, files)


def saved_block(file: Path) -> BlockStatistics:
    """Return what a file holds of a block; its statistics are read one by one, when their value is asked for.

    Raises:
        ParedError: it is damaged or of another version.
    """
    about = _about(file)
    handles: dict[str, SavedStatistic] = {}
    statistics: dict[str, dict[str, SavedStatistic]] = {}
    for site, own in about["entries"].items():
        for name, entry in own.items():
            handle = handles.setdefault(entry["key"], SavedStatistic(name, **entry, file=file))
            statistics.setdefault(site, {})[name] = handle
    return BlockStatistics(about["index"], statistics, about["influence"], about["source"])


def _about(file: Path) -> dict[str, Any]:
    """Return what a file says of the block in it.

    Raises:
        ParedError: it is damaged, or of another version.
    """
    with _opened(file) as tensors:
        about: dict[str, Any] = json.loads((tensors.metadata() or {}).get("block", "{}"))
    if about.get("version") != VERSION:
        raise ParedError(f"{file} was not written by this version of pared; collect the statistics again")
    return about


def _write(place: Path, tensors: Mapping[str, torch.Tensor], about: Mapping[str, object]) -> None:
    with appearing(place) as partial:
        save_file(dict(tensors), partial, metadata={"block": json.dumps(about)})


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """Open a file of tensors.

    Raises:
        ParedError: it is gone or damaged.
    """
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise ParedError(f"{file} cannot be read ({error}); collect the statistics again") from None
