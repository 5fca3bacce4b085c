"""The file that a folder of every size has beside its largest: spectra, and the factors of what that stores dense."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pared.errors import DamagedError
from pared.lowrank import Factors
from pared.schema.elastic import FACTORS_FILE, Elastic


def write_elastic(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write spectra and factors, as :class:`pared.schema.elastic.Elastic` names them."""
    path = folder / FACTORS_FILE
    path.parent.mkdir()
    save_file(dict(tensors), path, {"format": "pt"})


class StoredFactors:
    """The tensors of a folder of every size, each read when it is asked for.

    Args:
        folder: that is one.
        elastic: what it says of its sizes.
    """

    def __init__(self, folder: Path, elastic: Elastic) -> None:
        self._path, self._elastic = folder / FACTORS_FILE, elastic

    def spectra(self) -> dict[str, torch.Tensor]:
        """Return what leaving out each direction costs, of every unit with a rank, float64 ``(R,)``.

        Raises:
            ParedError: the file is missing or damaged.
        """
        names = {unit.name: f"{unit.name}.spectrum" for unit in self._elastic.units}
        found = self._read(list(names.values()))
        lacking = [unit.name for unit in self._elastic.units if unit.rank and names[unit.name] not in found]
        if lacking:
            raise DamagedError(f"{self._path} has no spectrum of {lacking[0]}", "fetch or make the folder again")
        return {name: found[tensor] for name, tensor in names.items() if tensor in found}

    def more(self, unit: str) -> Factors | None:
        """Return the factors of a unit that the largest size does not have; None if there are none.

        Raises:
            ParedError: the file is missing or damaged.
        """
        found = self._read([f"{unit}.down", f"{unit}.up"])
        return Factors(found[f"{unit}.down"], found[f"{unit}.up"]) if len(found) == 2 else None

    def _read(self, names: list[str]) -> dict[str, torch.Tensor]:
        try:
            with safe_open(self._path, framework="pt") as tensors:
                there = set(tensors.keys())
                return {name: tensors.get_tensor(name) for name in names if name in there}
        except (SafetensorError, OSError) as error:
            raise DamagedError(f"{self._path}: unreadable or truncated ({error})", "fetch or make it again") from None
