"""A model that a Python caller has loaded, where one by name is read."""

import copy
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from pared.errors import ParedError
from pared.io.digests import model_digest

_NAME = "_pared_name"  # of an attribute of the module, which nothing saves


def loaded_as(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """Have a model know the name that it was loaded by, where its configuration knows a folder of the cache alone."""
    setattr(model, _NAME, name)
    return model


def name_of(model: PreTrainedModel) -> str:
    """Return the name a model was loaded by, by pared or by transformers; empty for one that was made in memory."""
    return str(getattr(model, _NAME, None) or model.config.name_or_path or "")


@dataclass(frozen=True)
class LoadedModel:
    """What :class:`pared.models.source.ModelSource` gives for a named model, for one in memory.

    Attributes:
        model: in memory; it is returned as it is.
        its_tokenizer: of it.
    """

    model: PreTrainedModel
    its_tokenizer: PreTrainedTokenizerBase

    @property
    def location(self) -> str:
        """Where it says it was loaded from; empty for a model that was made in memory."""
        return str(self.model.config.name_or_path or "")

    @property
    def name(self) -> str:
        """The name it was loaded by, or its class."""
        return name_of(self.model) or type(self.model).__name__

    def config(self) -> PretrainedConfig:
        """Return its configuration, which names its class even where it was never saved."""
        config = copy.copy(self.model.config)
        config.architectures = [type(self.model).__name__]
        return config

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return its tokenizer."""
        return self.its_tokenizer

    def digest(self) -> str:
        """Return what distinguishes its weights and its configuration from every other's."""
        return model_digest(self.model)

    def load(self, dtype: str | torch.dtype = "auto") -> PreTrainedModel:
        """Return the model.

        Raises:
            ParedError: in another dtype than it has.
        """
        if dtype not in ("auto", self.model.dtype, str(self.model.dtype).removeprefix("torch.")):
            raise ParedError(f"{self.name} is loaded as {self.model.dtype}; load it as {dtype} to measure that")
        return self.model
