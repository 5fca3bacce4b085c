"""What to calibrate on, by what a model is used for: a text that is like it, and the windows that are taken of it."""

from dataclasses import dataclass
from typing import Any

from pared.data.corpora import CORPORA
from pared.data.files import data_folder
from pared.schema.fields import plain
from pared.schema.recipe import Recipe, Sampling, Use


@dataclass(frozen=True)
class UsePreset:
    """The calibration of a use.

    Attributes:
        text: a corpus by name.
        local: what is read where ``PARED_DATA`` names a folder without that corpus; none where that is an error.
        sampling: which windows: of documents that are longer than a window those of many.
    """

    text: str
    local: str | None = None
    sampling: Sampling = "shuffled"

    def resolve(self) -> dict[str, Any]:
        """Return the fields of a calibration that this stands for on this machine."""
        elsewhere = self.local is not None and data_folder() is not None and not CORPORA[self.text].is_there
        return {"text": self.local if elsewhere else self.text, "sampling": self.sampling}


USES: dict[Use, UsePreset] = {
    "code": UsePreset("codeparrot:train", local="stdlib:train"),
    "math": UsePreset("gsm8k:train"),
    "chat": UsePreset("ultrachat:train", local="alpaca:chat"),
    "general": UsePreset("c4:train"),
}


def with_use(recipe: Recipe) -> Recipe:
    """Return a recipe that names the text which its ``calibrate_on`` stands for; what it says of its own wins.

    A recipe that has been through here stays what it is, wherever it is read again.
    """
    if recipe.calibrate_on is None:
        return recipe
    section = {**USES[recipe.calibrate_on].resolve(), **plain(recipe.calibration)}
    return recipe if section == plain(recipe.calibration) else recipe.model_copy(update={"calibration": section})


def use_in_words(recipe: Recipe) -> str:
    """Return what a recipe's ``calibrate_on`` stands for, once :func:`with_use` has resolved it; empty without one."""
    if recipe.calibrate_on is None:
        return ""
    preset, asked = USES[recipe.calibrate_on], recipe.calibration
    instead = f", which stands in for {preset.text} here" if asked.text == preset.local else ""
    return f"{recipe.calibrate_on} ({asked.sampling} windows of {asked.text}{instead})"
