"""Statistics on disk: collected once, solved for as many methods and budgets as one likes."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pared.calibration.forward import WalkedBlock
from pared.errors import ParedError


@dataclass(frozen=True)
class SavedStatistic:
    """A statistic as it was when it was saved.

    Attributes:
        tokens: how many tokens it saw.
        value: the statistic, float64.
    """

    tokens: int
    value: torch.Tensor


def save_blocks(folder: Path, blocks: Iterable[WalkedBlock]) -> None:
    """Write the statistics of blocks as they come, one file a block; what sites share is written once.

    A file appears when its block is complete, so that an interrupted pass leaves only whole files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for block in blocks:
        tensors: dict[str, torch.Tensor] = {}
        first: dict[int, str] = {}  # a statistic that several sites share -> the key it is written under
        entries: dict[str, dict[str, list[object]]] = {}
        for site, own in block.statistics.items():
            for name, statistic in own.items():
                key = first.setdefault(id(statistic), f"{site}/{name}")
                if key not in tensors:
                    tensors[key] = statistic.value.contiguous()
                entries.setdefault(site, {})[name] = [key, statistic.tokens]
        about = {"index": block.index, "influence": block.influence, "entries": entries}
        place = folder / f"block-{block.index:05}.safetensors"
        save_file(tensors, place.with_suffix(".part"), metadata={"block": json.dumps(about)})
        place.with_suffix(".part").rename(place)


def saved_blocks(folder: Path) -> Iterator[WalkedBlock]:
    """Yield the blocks of a folder in order, one in memory at a time.

    Raises:
        ParedError: there are none.
    """
    files = sorted(folder.glob("block-*.safetensors"))
    if not files:
        raise ParedError(f"{folder} holds no saved statistics; collect them first")
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            about = json.loads(tensors.metadata()["block"])
            values = {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118 - not a mapping
        statistics = {
            site: {name: SavedStatistic(tokens, values[key]) for name, (key, tokens) in own.items()}
            for site, own in about["entries"].items()
        }
        yield WalkedBlock(about["index"], statistics, about["influence"])
