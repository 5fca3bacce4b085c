"""Which parts of a compressed model there are to train."""

from collections.abc import Iterator
from typing import get_args

from torch import nn

from pared.errors import ParedError
from pared.modules import Changed, SparseLinear, bits_of
from pared.names import called
from pared.schema.manifest import Manifest
from pared.schema.width import Width

COMPRESSED = get_args(Changed)


def compressed_layers(model: nn.Module) -> dict[str, Changed]:
    """Return the modules that stand where linear layers stood, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, COMPRESSED)}


def changed_layers(model: nn.Module, manifest: Manifest | None) -> dict[str, nn.Module]:
    """Return the layers that are not what they were in the dense model, by name.

    Args:
        model: of a folder that pared made.
        manifest: of that folder; a model of uniform widths has plain layers, and it says which of them are narrower.
            One that lost experts has none that is not what it was.
    """
    found: dict[str, nn.Module] = dict(compressed_layers(model))
    if found or manifest is None:
        return found
    decided = {site.name: site.decision for site in manifest.plan.sites}
    narrower = [name for name, one in decided.items() if isinstance(one, Width) and one.unit != "expert"]
    return {name: model.get_submodule(name) for name in narrower}


def norms(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the normalisations: modules whose own parameters are all vectors, and that are no linear layer's bias."""
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if own and all(parameter.ndim == 1 for parameter in own):
            yield module


def unpack(model: nn.Module) -> None:
    """Give every sparse layer its dense weight, which is what trains.

    Raises:
        ParedError: a layer is stored in few bits, and has no weight to train.
    """
    for name, layer in compressed_layers(model).items():
        if bits := bits_of(layer):
            raise ParedError(f"{name} is stored in {bits} bits and cannot be trained; train the folder of before "
                             f"and store what comes of it with {called('quantize')} of convert")  # fmt: skip
        if isinstance(layer, SparseLinear):
            layer.unpack_()
