"""What must hold of a model's weights before any of them is touched."""

from transformers import PreTrainedModel

from pared.errors import ParedError
from pared.names import called
from pared.structure import Anatomy, weight_of
from pared.structure.finite import is_finite

# Forward and backward hooks move to what replaces a layer; these are about the names and shapes of its tensors.
_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def require_finite_weights(model: PreTrainedModel, anatomy: Anatomy, streamed: bool = False) -> None:
    """Refuse a model whose sites hold anything but finite numbers in memory, or hooks that cannot stay.

    Args:
        model: dense.
        anatomy: of it.
        streamed: whether its blocks are read one by one, and checked as they are.

    Raises:
        ParedError: names the site.
    """
    for site in anatomy.sites:
        layer = model.get_submodule(site.name)
        if any(getattr(layer, hooks, None) for hooks in _STATE_HOOKS):
            raise ParedError(f"site {site.name} has a hook on its state dict, which changes its form; remove the hook")
        weight = weight_of(layer)
        if weight.is_meta and streamed:
            continue
        if weight.is_meta:
            raise ParedError(f"site {site.name} is on the meta device (offloaded by device_map, or without "
                             "values); give the model by name, which is read block by block where memory does not hold "
                             f"it ({called('stream', 'on')}), or load it without offloading")  # fmt: skip
        if not is_finite(weight):
            raise ParedError(f"site {site.name} has NaN or infinity in its weight; the checkpoint is damaged")
