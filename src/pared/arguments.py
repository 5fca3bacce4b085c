"""What Python callers pass: a loaded model, its tokenizer, a recipe, a name; anything else is reported in one line."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pared.errors import ParedError
from pared.io.files import path_of
from pared.names import with_article
from pared.schema.base import Config
from pared.schema.fields import plain
from pared.schema.recipe import Recipe

Asked = TypeVar("Asked", bound=Config)
# Fields of a calibration that Python calls may give besides those of the recipe.
OF_CALIBRATION = {"data": "text", "samples": "samples", "length": "length", "seed": "seed", "sampling": "sampling"}


def require_model(model: object, function: str) -> None:
    """Refuse what is no loaded model.

    Args:
        model: what was passed in; a model with PEFT adapters is one.
        function: that it was handed to, for messages.

    Raises:
        ParedError: says how to load a model by its name.
    """
    if isinstance(model, PreTrainedModel) or (hasattr(model, "config") and not isinstance(model, type)):
        return
    if isinstance(model, (str, os.PathLike)):
        raise ParedError(
            f"{function} takes a loaded model, got the name {os.fspath(model)!r}; load it first: "
            f"pared.load({os.fspath(model)!r})"
        )
    if isinstance(model, PreTrainedTokenizerBase):
        raise ParedError(f"{function} takes a loaded model first and its tokenizer second; got the tokenizer first")
    raise ParedError(f"{function} takes a loaded model of transformers, got {kind_of(model)}; pared.load(NAME) gives "
                     "one")  # fmt: skip


def require_tokenizer(tokenizer: object, function: str) -> None:
    """Refuse what does not turn text into tokens.

    Args:
        tokenizer: what was passed in.
        function: that it was handed to, for messages.

    Raises:
        ParedError: says how to load a tokenizer by the name of its model.
    """
    if isinstance(tokenizer, (str, os.PathLike)):
        raise ParedError(
            f"{function} takes a loaded tokenizer, got the name {os.fspath(tokenizer)!r}; load it first: "
            f"pared.load_tokenizer({os.fspath(tokenizer)!r})"
        )
    if isinstance(tokenizer, PreTrainedModel) or not callable(tokenizer):
        raise ParedError(
            f"{function} needs the model's tokenizer to read text, got {kind_of(tokenizer)}; "
            "pared.load_tokenizer(NAME) gives one"
        )


def refuse_tokenizer(tokenizer: object, function: str) -> None:
    """Refuse a tokenizer that is passed in with a model by name, which has its own.

    Raises:
        ParedError: there is one.
    """
    if tokenizer is not None:
        raise ParedError(f"{function} loads the tokenizer of a model by name with it; leave out tokenizer, got "
                         f"{kind_of(tokenizer)}")  # fmt: skip


def asked_from(kind: type[Asked], value: Any, function: str) -> Asked:
    """Return what users write of a kind; a mapping is read as one.

    Args:
        kind: ``Recipe``, ``TrainingConfig``, or another.
        value: what was passed in.
        function: that it was handed to, for messages.

    Raises:
        ParedError: neither, or a mapping that is none.
    """
    if isinstance(value, kind):
        return value
    what = kind.__name__
    if isinstance(value, Mapping):
        return kind.of(value, origin=f"the {kind.NOUN} of {function}")
    raise ParedError(f"{function} takes {with_article(what)}, got {kind_of(value)}; such as {_example(kind, value)}")


def config_from(kind: type[Asked], config: Any, fields: Mapping[str, Any], function: str) -> Asked:
    """Return what users write of a kind with fields laid over it, as options are over a file.

    Args:
        kind: ``Recipe``, ``TrainingConfig``, or another.
        config: one, a mapping, or none for the defaults.
        fields: of it.
        function: that both were handed to, for messages.

    Raises:
        ParedError: something else, an unknown field or a value out of range.
    """
    if config is None:
        return kind.of(dict(fields), origin=function)
    below = asked_from(kind, config, function)
    if not fields:
        return below
    fields = kind.plain(fields)
    given = {name: getattr(below, name) for name in below.model_fields_set}
    return kind.of({**below.left_beside(given, fields), **fields}, origin=function)


def recipe_from(recipe: Any, fields: Mapping[str, Any], function: str) -> Recipe:
    """Return a recipe with fields laid over it; see :func:`config_from`.

    Args:
        recipe: one, a mapping, or none for the defaults.
        fields: of a recipe; of its calibration too, by ``data``, ``samples``, ``length``, ``seed`` and ``sampling``.
        function: that both were handed to, for messages.

    Raises:
        ParedError: no recipe, an unknown field or a value out of range.
    """
    above = {name: value for name, value in fields.items() if name not in OF_CALIBRATION}
    cut = {OF_CALIBRATION[name]: value for name, value in fields.items() if name in OF_CALIBRATION}
    if cut:
        below = Recipe() if recipe is None else asked_from(Recipe, recipe, function)
        under = below.left_beside({"calibration": below.calibration}, above)
        section = plain(above.get("calibration", under["calibration"]))
        above["calibration"] = {**section, **cut} if isinstance(section, Mapping) else section
    return config_from(Recipe, recipe, above, function)


EXAMPLES = {"Recipe": "method='loss-optimal', keep=0.8", "TrainingConfig": "model='small', out='trained'"}


def _example(kind: type[Config], found: object) -> str:
    """Return what may have been meant."""
    name = kind.__name__
    if not isinstance(found, (str, os.PathLike)):
        return f"{name}({EXAMPLES.get(name, '')})"
    word = os.fspath(found)
    meant = f"Recipe(method={word!r})" if kind is Recipe else f"{name}({EXAMPLES.get(name, '')})"
    return f"{meant}, or {name}.load(PATH) for a file"


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
    raise ParedError(f"{function} takes a name: embedded:smollm2-135m, a folder or a Hub id; got {kind_of(name)}")


def folder_from(folder: object, function: str) -> Path:
    """Return the folder that an output is to be written to, with ``~`` written out.

    Args:
        folder: a string or a path.
        function: that it was handed to, for messages.

    Raises:
        ParedError: neither.
    """
    if isinstance(folder, (str, os.PathLike)) and os.fspath(folder):
        return path_of(os.fsdecode(folder))
    raise ParedError(f"{function} takes the folder to write, a string or a path; got {kind_of(folder)}")


def kind_of(value: object) -> str:
    """Return what was passed in, in words."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return repr(value) if value is None or isinstance(value, (str, int, float)) else with_article(type(value).__name__)
