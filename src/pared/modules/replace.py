from torch import nn


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put a module where another stands, in its mode (training or evaluation).

    Args:
        model: the whole model.
        name: full name of the module that goes.
        new: the module that comes.
    """
    parent, _, leaf = name.rpartition(".")
    old = model.get_submodule(name)
    setattr(model.get_submodule(parent), leaf, new.train(old.training))
