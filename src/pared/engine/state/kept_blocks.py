"""A model in memory whose changed blocks are kept in files too, so that another process can resume with them."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from pared.engine.state.run_state import CompressionRun
from pared.errors import ParedError
from pared.io.guarded import parse_json
from pared.modules import (
    Changed,
    LowRankLinear,
    PivotedLinear,
    SparseLinear,
    inherit_requires_grad,
    replace_module,
    replace_parameter,
    share,
)
from pared.modules.narrow import counts_of, set_counts
from pared.modules.shared import DOWN
from pared.structure import Anatomy, weight_of
from pared.structure.store import DenseBlocks, ResidentBlocks, block_file

KINDS: dict[str, type[Changed]] = {cls.__name__: cls for cls in get_args(Changed)}


class KeptBlocks(ResidentBlocks):
    """Writes what stands where linear layers stood when a block is committed, and what of the rest was replaced.

    The rest of a block changes only where it is trained, which needs what :meth:`dense` gives.

    Args:
        model: in memory, dense.
        anatomy: of it.
        run: that the files belong to.
    """

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, run: CompressionRun) -> None:
        super().__init__(model, anatomy)
        self._anatomy, self._run = anatomy, run
        self._dense: DenseBlocks | None = None

    def dense(self) -> DenseBlocks:
        """Return what hands out the blocks as they are now, and compare with those from now on."""
        self._dense = super().dense()
        return self._dense

    def commit(self, index: int) -> None:
        """Write a block's changed layers; it stays in memory.

        Raises:
            ParedError: they cannot be written, as the disk is full.
        """
        tensors: dict[str, torch.Tensor] = {}
        layers: dict[str, dict[str, Any]] = {}
        for site in self._anatomy.sites_of(index):
            layer = self.model.get_submodule(site.name)
            if not isinstance(layer, Changed):
                continue
            owner = getattr(layer, "shares", None)
            shares = None if owner == site.name + DOWN else owner
            layers[site.name] = {"kind": type(layer).__name__, "entry": layer.entry(), "shares": shares}
            state = {f"{site.name}.{name}": tensor for name, tensor in layer.state_dict().items()}
            tensors |= {name: one for name, one in state.items() if not (shares and name == site.name + DOWN)}
        rest = {f"{self._anatomy.block_name(index)}.{name}": one for name, one in self._replaced(index, layers)}
        tensors |= {name: one.detach() for name, one in rest.items()}
        heads = counts_of(self.load(index), self._anatomy.block_name(index))
        notes = {"layers": layers, "rest": list(rest), "heads": heads}
        self.files[index] = self._run.write(block_file(self.passed, index), tensors, notes)

    def _replaced(self, index: int, layers: Mapping[str, Any]) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters of a block, outside of changed layers, that others have been put in the place of."""
        if self._dense is None:
            return
        before = dict(self._dense(index).named_parameters())
        inside = tuple(f"{name}." for name in layers)
        for name, parameter in self.load(index).named_parameters():
            whole = f"{self._anatomy.block_name(index)}.{name}"
            if not whole.startswith(inside) and before[name] is not parameter:
                yield name, parameter

    def adopt(self, index: int, file: Path) -> None:
        """Put the layers that a file holds in their places.

        Raises:
            ParedError: it holds something else.
        """
        if self.files[index] == file:  # layers made anew would no longer be those whose basis others share
            return
        try:
            with safe_open(file, framework="pt") as kept:
                notes = parse_json(kept.metadata()["pared"], str(file))
                layers = notes["layers"]
                tensors = {name: kept.get_tensor(name) for name in kept.keys()}  # noqa: SIM118 - not a mapping
            for name, told in layers.items():
                prefix = f"{name}."
                own = {key.removeprefix(prefix): one for key, one in tensors.items() if key.startswith(prefix)}
                self._put(name, told, own)
            for name in notes.get("rest", ()):
                replace_parameter(self.model, name, tensors[name])
            for name, counts in notes.get("heads", {}).items():
                set_counts(self.model.get_submodule(name), counts)
        except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise ParedError(
                f"{file} does not hold block {index} of this model ({error}); remove {self._run.folder} to start over"
            ) from None
        self.files[index] = file

    def _put(self, name: str, told: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        old = self.model.get_submodule(name)
        weight = old.up.weight if isinstance(old, (LowRankLinear, PivotedLinear)) else weight_of(old)
        new: nn.Module = KINDS[told["kind"]](**told["entry"], device=weight.device, dtype=weight.dtype)
        new.load_state_dict(tensors, strict=not told["shares"])
        if isinstance(new, SparseLinear):
            new.unpack_()
        inherit_requires_grad(new, old)
        if told["shares"]:
            share(new, self.model.get_submodule(told["shares"].removesuffix(DOWN)), told["shares"])
        replace_module(self.model, name, new)
