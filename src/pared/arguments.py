"""What Python callers hand over: a loaded model, its tokenizer, a recipe, a name; anything else is told in one line."""

import os
from collections.abc import Mapping
from typing import Any, TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pared.errors import ParedError
from pared.schema.recipe import Recipe
from pared.schema.training import TrainingConfig

Asked = TypeVar("Asked", Recipe, TrainingConfig)


def require_model(model: object, function: str) -> None:
    """Refuse what is no loaded model.

    Args:
        model: what was handed over; a model with PEFT adapters is one.
        function: that it was handed to, for messages.

    Raises:
        ParedError: says how to load a model by its name.
    """
    if isinstance(model, PreTrainedModel) or (hasattr(model, "config") and not isinstance(model, type)):
        return
    if isinstance(model, (str, os.PathLike)):
        raise ParedError(
            f"{function} takes a loaded model, found the name {os.fspath(model)!r}; load it first: "
            f"pared.load({os.fspath(model)!r})"
        )
    if isinstance(model, PreTrainedTokenizerBase):
        raise ParedError(f"{function} takes a loaded model first and its tokenizer second; found the tokenizer first")
    raise ParedError(f"{function} takes a loaded model of transformers, found {_kind(model)}; pared.load(NAME) gives "
                     "one")  # fmt: skip


def require_tokenizer(tokenizer: object, function: str) -> None:
    """Refuse what does not turn text into tokens.

    Args:
        tokenizer: what was handed over.
        function: that it was handed to, for messages.

    Raises:
        ParedError: says how to load a tokenizer by the name of its model.
    """
    if isinstance(tokenizer, (str, os.PathLike)):
        raise ParedError(
            f"{function} takes a loaded tokenizer, found the name {os.fspath(tokenizer)!r}; load it first: "
            f"pared.load_tokenizer({os.fspath(tokenizer)!r})"
        )
    if isinstance(tokenizer, PreTrainedModel) or not callable(tokenizer):
        raise ParedError(
            f"{function} needs the model's tokenizer to read text, found {_kind(tokenizer)}; "
            "pared.load_tokenizer(NAME) gives one"
        )


def asked_from(kind: type[Asked], value: Any, function: str) -> Asked:
    """Return a recipe or a tuning; a mapping is read as one.

    Args:
        kind: ``Recipe`` or ``TrainingConfig``.
        value: what was handed over.
        function: that it was handed to, for messages.

    Raises:
        ParedError: neither, or a mapping that is none.
    """
    if isinstance(value, kind):
        return value
    what = kind.__name__
    if isinstance(value, Mapping):
        return kind.of(value, origin=f"the {kind.NOUN} of {function}")
    raise ParedError(f"{function} takes a {what}, found {_kind(value)}; such as {_example(kind, value)}")


def _example(kind: type, found: object) -> str:
    """Return what may have been meant."""
    if not isinstance(found, (str, os.PathLike)):
        return (
            "Recipe(method='loss-optimal', keep=0.8)"
            if kind is Recipe
            else "TrainingConfig(model='small', out='trained')"
        )
    name = os.fspath(found)
    meant = f"Recipe(method={name!r})" if kind is Recipe else f"TrainingConfig(model={name!r}, out='trained')"
    return f"{meant}, or {kind.__name__}.load(PATH) for a file"


def name_from(name: object, function: str) -> str:
    """Return the name of a model.

    Args:
        name: a string or a path.
        function: that it was handed to, for messages.

    Raises:
        ParedError: neither.
    """
    if isinstance(name, (str, os.PathLike)):
        found = os.fspath(name)
        return found if isinstance(found, str) else os.fsdecode(found)
    raise ParedError(f"{function} takes a name: embedded:smollm2-135m, a folder or a Hub id; found {_kind(name)}")


def _kind(value: object) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return repr(value) if value is None or isinstance(value, (str, int, float)) else f"a {type(value).__name__}"
