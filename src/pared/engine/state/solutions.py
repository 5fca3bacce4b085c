"""Decompositions on disk, until the plan is known: memory stays that of one site."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from pared.engine.state.run_state import CompressionRun
from pared.io.guarded import parse_json
from pared.io.run_dir import RunDirectory
from pared.lowrank import Decomposition
from pared.schema.bits import FORMS, Form

KEPT = ("U_OR", "T_NR", "L_OO", "weighted_ON")  # of a decomposition, where it has them


class Copy(NamedTuple):
    """What a store keeps of a unit: a file of tensors and a number."""

    tensors: dict[str, torch.Tensor]
    damping: float


Prices = Mapping[Form, torch.Tensor]  # by form, as :func:`pared.quantization.pricing.prices` gives them
ROUNDING = "rounding_"  # what the tensors of prices are called, before the form


def _prices_in(tensors: Mapping[str, torch.Tensor]) -> Prices:
    return {form: tensors[ROUNDING + form] for form in FORMS if ROUNDING + form in tensors}


class DecompositionStore:
    """Keeps every site's decomposition in a file and its spectrum in memory.

    Directions are kept in float32, which is what weights are stored in at best; what makes them of the weight in
    float64, as it may divide by little. The weight itself is not kept, as it is still in the model. A context manager:
    files that belong to no run are gone at its end, and what a killed process left of them goes when the next is made.

    Args:
        beside: the output that the files lie beside; without one they lie in the user's cache folder.
        run: that the files belong to, in place of a folder of their own.
        prefix: of their names.

    Attributes:
        spectra: for every site, what leaving out each direction costs, float64.
        rounding: for every site whose bits are decided, what rounding costs, by form.
        files: of every site.
    """

    def __init__(self, beside: Path | None = None, run: CompressionRun | None = None, prefix: str = "pass-1") -> None:
        self._stack = ExitStack()
        self._run = run or CompressionRun(self._stack.enter_context(RunDirectory.temporary(beside)))
        self._prefix = prefix
        self._damping: dict[str, float] = {}
        self.spectra: dict[str, torch.Tensor] = {}
        self.rounding: dict[str, Prices] = {}
        self.files: dict[str, Path] = {}
        self._new: list[str] = []  # units whose files `new` has not told of

    def __enter__(self) -> "DecompositionStore":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def put(
        self, name: str, found: Decomposition, weight: torch.Tensor | None = None, prices: Prices | None = None
    ) -> None:
        """Keep the decomposition of a unit, its dense weight if one is given, and what rounding it costs."""
        self.note(name, found.singular_values_R.cpu(), prices)
        tensors = {"spectrum": self.spectra[name]}
        tensors |= {f"{ROUNDING}{form}": price_K.cpu() for form, price_K in (prices or {}).items()}
        if found.U_OR is not None:
            tensors["U_OR"] = found.U_OR.float()
        if found.T_NR is not None:
            tensors["T_NR"] = found.T_NR
        if found.L_OO is not None:
            tensors["L_OO"] = found.L_OO
        if found.weighted_ON is not None:
            tensors["weighted_ON"] = found.weighted_ON
        if weight is not None:
            tensors["weight"] = weight
        self.write(name, Copy(tensors, found.damping))

    def write(self, name: str, kept: "Copy") -> None:
        """Keep what :meth:`copy` gave in another process."""
        self._damping[name] = kept.damping
        self.note(name, kept.tensors["spectrum"], _prices_in(kept.tensors))
        file = f"{self._prefix}-unit-{len(self.files):05}.safetensors"
        self.files[name] = self._run.write(file, kept.tensors, {"damping": kept.damping})
        self._new.append(name)

    def new(self) -> list[str]:
        """Return the names of the units whose files were written here since this was last asked."""
        new, self._new = self._new, []
        return new

    def copy(self, name: str) -> "Copy":
        """Return what was kept of a unit, for another process."""
        return Copy(load_file(self.files[name]), self._damping[name])

    def take_up(self, name: str, file: Path) -> None:
        """Take the file of a unit that an earlier process has written."""
        with safe_open(file, framework="pt") as tensors:
            self._damping[name] = parse_json(tensors.metadata()["pared"], str(file))["damping"]
            rounding = {key: tensors.get_tensor(key) for key in tensors.keys() if key.startswith(ROUNDING)}  # noqa: SIM118 - not a mapping
            self.note(name, tensors.get_tensor("spectrum"), _prices_in(rounding))
        self.files[name] = file

    def note(self, name: str, spectrum_R: torch.Tensor, prices: Prices | None = None) -> None:
        """Keep the spectrum of a unit, and what rounding it costs, whose decomposition another process may have."""
        self.spectra[name] = spectrum_R
        if prices:
            self.rounding[name] = prices

    def get(self, name: str, W_ON: torch.Tensor) -> Decomposition:
        """Return the decomposition of a site.

        Args:
            name: of the site.
            W_ON: its weight, as it was when it was decomposed.
        """
        kept = load_file(self.files[name], device=str(W_ON.device))
        fields = {key: kept[key].double() for key in KEPT if key in kept}
        return Decomposition(W_ON.double(), self.spectra[name].to(W_ON.device), damping=self._damping[name], **fields)

    def weight(self, name: str, rows: slice) -> torch.Tensor:
        """Return rows of the dense weight that was kept of a unit; only those are read."""
        with safe_open(self.files[name], framework="pt") as tensors:
            return tensors.get_slice("weight")[rows]

    def tensor(self, name: str, kept: str) -> torch.Tensor:
        """Return one of the tensors that were kept of a unit."""
        with safe_open(self.files[name], framework="pt") as tensors:
            return tensors.get_tensor(kept)
