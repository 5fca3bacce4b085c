"""Putting a module where another stands, with what users have set on the one that goes."""

import torch
from torch import nn

# Hooks that a user may have registered on a layer, and their flags. Handles of them keep working: the dictionaries
# themselves move on.
_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
)


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put a module where another stands, in its mode (training or evaluation) and with its hooks.

    Args:
        model: the whole model.
        name: full name of the module that goes.
        new: the module that comes.
    """
    parent, _, leaf = name.rpartition(".")
    old = model.get_submodule(name)
    if any(getattr(old, hooks) for hooks in _HOOKS):
        for hooks in (*_HOOKS, "_is_full_backward_hook"):
            setattr(new, hooks, getattr(old, hooks))
    setattr(model.get_submodule(parent), leaf, new.train(old.training))


@torch.no_grad()
def replace_parameter(root: nn.Module, name: str, values: torch.Tensor) -> None:
    """Put a new parameter of these values where another stands; that one stays as it is, for whatever else has it.

    Args:
        root: a module.
        name: of the parameter in it.
        values: of its shape; they are brought to its dtype and device.
    """
    path, _, leaf = name.rpartition(".")
    old = root.get_parameter(name)
    new = nn.Parameter(values.to(old.device, old.dtype), requires_grad=old.requires_grad)
    root.get_submodule(path)._parameters[leaf] = new


def inherit_requires_grad(new: nn.Module, old: nn.Module) -> None:
    """Let a layer be trained where the one it replaces was: what is frozen stays frozen.

    Args:
        new: its bias is set as the old one's, every other parameter as the old weight.
        old: a linear layer, dense or low-rank.
    """
    for parameter in new.parameters():
        parameter.requires_grad_(_requires_grad(old))
    bias, old_bias = getattr(new, "bias", None), getattr(old, "bias", None)
    if isinstance(bias, nn.Parameter) and old_bias is not None:
        bias.requires_grad_(old_bias.requires_grad)


def _requires_grad(layer: nn.Module) -> bool:
    up = getattr(layer, "up", layer)  # of a layer that is factorised already
    return bool(up.weight.requires_grad)
