"""Experts that are open in one form of a model and lie in tensors of all in another: its checkpoint, or an export."""

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from pared.modules.opened import Layout, OpenedExperts, empty_out, put_back
from pared.structure.opening import Openable, layout_of, open_experts


class OpenedBlocks:
    """Which mixtures of a model that is read block by block were opened after its checkpoint was.

    Args:
        model: parameters of its blocks are on the meta device.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.found: list[Openable] = []

    def open(self, found: Sequence[Openable]) -> None:
        """Open mixtures, in place."""
        open_experts(self._model, found)
        self.found += found

    @contextmanager
    def closed(self, index: int) -> Iterator[None]:
        """Have the mixtures of a block as the checkpoint has them for the length of a ``with`` block.

        What is read into them inside are the numbers of the experts afterwards, each with memory of its own.
        """
        own = [one for one in self.found if one.block == index]
        opened = [self._model.get_submodule(one.name) for one in own]
        for one in own:
            put_back(self._model, one.name)
        try:
            yield
            for module in opened:
                assert isinstance(module, OpenedExperts)
                take(module)
        finally:
            for one, module in zip(own, opened, strict=True):
                assert isinstance(module, OpenedExperts)
                empty_out(module.fused, module.layout)
                parent, _, leaf = one.name.rpartition(".")
                setattr(self._model.get_submodule(parent), leaf, module)


def take(opened: OpenedExperts) -> None:
    """Give experts the numbers of the module that stood there."""
    filled = OpenedExperts(opened.fused, opened.layout, views=True)
    for old, new in zip(opened.modules(), filled.modules(), strict=True):
        for name, parameter in new._parameters.items():
            if parameter is not None:
                values = parameter.detach().clone(memory_format=torch.contiguous_format)
                old._parameters[name] = nn.Parameter(values, requires_grad=parameter.requires_grad)


def layer_of(model: nn.Module, name: str) -> nn.Module | None:
    """Return the layer of a name, or none if there is no such layer.

    Where experts lie in tensors of all, the layer of one of them is made of views of these.

    Args:
        model: whose experts may be open or not.
        name: of a layer, as in the model with its experts open.
    """
    with contextlib.suppress(AttributeError):
        return model.get_submodule(name)
    path, _, inside = name.rpartition(".")[0].rpartition(".")
    with contextlib.suppress(AttributeError):
        fused = model.get_submodule(path)
        if isinstance(layout := layout_of(fused), Layout):
            opened = OpenedExperts(fused, layout, views=True)
            return opened.get_submodule(f"{inside}.{name.rpartition('.')[2]}")
    return None
