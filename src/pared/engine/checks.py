"""What must hold of a model's weights before any of them is touched."""

from transformers import PreTrainedModel

from pared.anatomy import Anatomy, weight_of
from pared.checkpoint.finite import is_finite
from pared.errors import ParedError


def require_finite_weights(model: PreTrainedModel, anatomy: Anatomy) -> None:
    """Refuse a model whose sites hold anything but finite floating point numbers in memory.

    Raises:
        ParedError: names the site.
    """
    for site in anatomy.sites:
        weight = weight_of(model.get_submodule(site.name))
        if weight.is_meta:
            raise ParedError(f"site {site.name} is on the meta device (offloaded); load the model without offloading")
        if not weight.is_floating_point():
            raise ParedError(f"site {site.name} holds {weight.dtype}; pared needs floating point weights")
        if not is_finite(weight):
            raise ParedError(f"site {site.name} has NaN or infinity in its weight; the checkpoint is damaged")
