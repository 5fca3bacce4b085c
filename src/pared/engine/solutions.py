"""Decompositions on disk, until the plan is known: memory stays that of one site."""

from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pared.io.leftovers import scratch
from pared.lowrank import Decomposition


class DecompositionStore:
    """Keeps every site's decomposition in a temporary folder and its spectrum in memory.

    Directions are kept in float32, which is what weights are stored in at best; what makes them of the weight in
    float64, as it may divide by little. The weight itself is not kept, as it is still in the model. A context manager:
    the folder is gone at its end, and what a killed process left of one goes when the next is made.

    Args:
        beside: the output that the folder lies beside; without one it lies in the user's cache folder.

    Attributes:
        spectra: for every site, what leaving out each direction costs, float64.
    """

    def __init__(self, beside: Path | None = None) -> None:
        self._stack = ExitStack()
        self._folder = self._stack.enter_context(scratch(beside))
        self._numbers: dict[str, int] = {}
        self._damping: dict[str, float] = {}
        self.spectra: dict[str, torch.Tensor] = {}

    def __enter__(self) -> "DecompositionStore":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def put(self, name: str, found: Decomposition, weight: torch.Tensor | None = None) -> None:
        """Keep the decomposition of a unit, and its dense weight if one is given."""
        self._numbers[name] = len(self._numbers)
        self._damping[name] = found.damping
        self.spectra[name] = found.singular_values_R.cpu()
        tensors = {}
        if found.U_OR is not None:
            tensors["U_OR"] = found.U_OR.float().contiguous()
        if found.T_NR is not None:
            tensors["T_NR"] = found.T_NR.contiguous()
        if found.L_OO is not None:
            tensors["L_OO"] = found.L_OO.contiguous()
        if weight is not None:
            tensors["weight"] = weight.contiguous()
        save_file(tensors, self._file(name))

    def get(self, name: str, W_ON: torch.Tensor) -> Decomposition:
        """Return the decomposition of a site.

        Args:
            name: of the site.
            W_ON: its weight, as it was when it was decomposed.
        """
        kept = load_file(self._file(name), device=str(W_ON.device))
        fields = {key: kept[key].double() for key in ("U_OR", "T_NR", "L_OO") if key in kept}
        return Decomposition(W_ON.double(), self.spectra[name].to(W_ON.device), damping=self._damping[name], **fields)

    def weight(self, name: str, rows: slice) -> torch.Tensor:
        """Return rows of the dense weight that was kept of a unit; only those are read."""
        with safe_open(self._file(name), framework="pt") as tensors:
            return tensors.get_slice("weight")[rows]

    def _file(self, name: str) -> Path:
        return self._folder / f"{self._numbers[name]}.safetensors"
