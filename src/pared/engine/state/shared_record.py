"""The record of a pass over blocks by several processes, which the first of them keeps."""

from pathlib import Path

import torch
from torch import nn

from pared.engine.state.pass_record import Held, PassRecord, Tables
from pared.modules import Changed, replace_module, replace_parameter, share
from pared.modules.shared import DOWN
from pared.processes import Processes
from pared.structure import Anatomy
from pared.structure.store import BlockStore


class SharedRecord(Held):
    """Tells all processes what the record of the first says, and hands them the blocks that it restores.

    Satisfies :class:`pared.engine.state.pass_record.Record`. All processes ask the same in the same order.

    Args:
        own: the record, in the first process; none in the others.
        processes: of the job.
        store: that changed blocks are committed to.
        anatomy: of the model.
        changes: whether the pass changes blocks.
    """

    def __init__(
        self, own: PassRecord | None, processes: Processes, store: BlockStore, anatomy: Anatomy, changes: bool
    ) -> None:
        self._own, self._processes, self._anatomy, self._changes = own, processes, anatomy, changes
        told = None if own is None else ({i for i in range(len(store)) if own.holds(i)}, own.found())
        held, self._found = processes.broadcast(told)
        super().__init__(store, held)

    def found(self) -> Tables:
        """Return what visits of earlier processes found of the blocks that they finished."""
        found: Tables = self._found
        return found

    def files(self) -> dict[str, Path]:
        """Return the files of the blocks that earlier processes finished, which only the first process has."""
        return {} if self._own is None else self._own.files()

    def restore(self, index: int) -> None:
        """Put what became of a finished block in its place in all processes, if it was changed."""
        if self._own is not None:
            self._own.restore(index)
        if not self._changes:
            return
        model, own = self._store.model, self._own is not None
        self._store.load(index)
        layers, rest = self._processes.broadcast(self._stored(index) if own else None)
        if own:
            self._store.release(index)
            return
        for name, layer in layers.items():
            replace_module(model, name, layer)
            owner = getattr(layer, "shares", None)
            if owner is not None and owner != name + DOWN:
                share(layer, model.get_submodule(owner.removesuffix(DOWN)), owner)
        for name, values in rest.items():
            replace_parameter(model, name, values)
        self._store.commit(index)

    def _stored(self, index: int) -> tuple[dict[str, nn.Module], dict[str, torch.Tensor]]:
        """Return the changed layers of a block, and what a training may have changed of what is left dense."""
        layers: dict[str, nn.Module] = {}
        sites = self._anatomy.sites_of(index)
        for site in sites:
            layer = self._store.model.get_submodule(site.name)
            if isinstance(layer, Changed):
                layers[site.name] = layer
        changed = tuple(f"{name}." for name in layers)
        dense = tuple(f"{site.name}." for site in sites if site.name not in layers)
        block = self._anatomy.blocks(self._store.model)[index]
        parameters = block.named_parameters(prefix=self._anatomy.block_name(index))
        return layers, {
            name: parameter.detach()
            for name, parameter in parameters
            if not name.startswith(changed) and (parameter.ndim == 1 or name.startswith(dense))
        }

    def finish(self, index: int) -> None:
        """Have it on the disk that a block is finished, once it is committed.

        Raises:
            ParedError: the disk is full.
        """
        if self._own is not None:
            self._own.finish(index)
