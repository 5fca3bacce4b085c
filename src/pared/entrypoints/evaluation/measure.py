"""Perplexity before and after: measured by one protocol, and recorded with what it was measured on."""

from dataclasses import dataclass
from typing import cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pared.calibration.spool import ActivationMemory
from pared.calibration.staged import Blocks
from pared.data.windows import Windows
from pared.evaluation import perplexity
from pared.progress import Progress, Stopwatch
from pared.schema.manifest import Measured
from pared.schema.recipe import Bos


@dataclass(frozen=True)
class PerplexityOn:
    """What perplexity is measured on, and how.

    Attributes:
        windows: the text, cut.
        tokenizer: of the model.
        bos: where a beginning-of-sequence token is put.
        device: where the model is moved to and runs.
        watch: seconds by stage.
        progress: what reports progress.
        memory: what hidden states share where a model's blocks are not in memory.
    """

    windows: Windows
    tokenizer: PreTrainedTokenizerBase
    bos: Bos
    device: torch.device | str
    watch: Stopwatch
    progress: Progress
    memory: ActivationMemory | None = None

    def before(self, model: PreTrainedModel, store: Blocks | None = None) -> float:
        """Measure the model as it was; its store, where its blocks are not in memory."""
        return self._measure(model, "before", store)

    def after(self, model: PreTrainedModel, store: Blocks | None = None) -> float:
        """Measure what became of it; its store, where its blocks are not in memory."""
        return self._measure(model, "after", store)

    def _measure(self, model: PreTrainedModel, when: str, store: Blocks | None) -> float:
        if store is None:
            model.to(self.device)
        with (
            self.watch(f"perplexity {when}"),
            self.progress.stage(f"perplexity {when}", len(self.windows.tokens), "window") as advance,
        ):
            return perplexity(
                model, self.tokenizer, self.windows, self.bos, advance, store=store, memory=self.memory
            ).value

    def record(self, learned_from: float) -> Measured:
        """Return what a manifest records of the text.

        Args:
            learned_from: the share of it that was calibrated or trained on.
        """
        return cast("Measured", {**self.windows.describe(), "bos": self.bos, "learned_from": learned_from})
