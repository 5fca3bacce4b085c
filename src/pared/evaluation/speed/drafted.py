"""Speculative decoding: a small model proposes tokens, its parent checks them in one pass.

The parent's greedy text stays as it is (Leviathan et al., 2023): a proposal counts only where it is the token that the
parent itself would have written. Generation is that of transformers (``assistant_model``).
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from pared.checkpoint.verify import TOLERANCE
from pared.errors import ParedError
from pared.evaluation.speed.worker import describe


@dataclass(frozen=True)
class DraftRun:
    """One prompt, continued by the parent alone and with the draft.

    Attributes:
        alone_seconds: of the parent alone, the prompt included.
        drafted_seconds: with the draft.
        passes: of the parent over what was proposed; each writes one token more than it accepts.
        proposed: tokens of the draft.
        accepted: those of them that the parent took.
        equal_tokens: how many tokens the two continuations have in common before they part.
        gap: between the logits of the two tokens at which they part, relative to the largest; 0 where they do not.
    """

    alone_seconds: float
    drafted_seconds: float
    passes: int
    proposed: int
    accepted: int
    equal_tokens: int
    gap: float


@dataclass(frozen=True)
class Drafted:
    """What a draft is worth.

    Attributes:
        new: tokens that were written behind every prompt.
        draft_tokens: proposed before every pass of the parent.
        cost: of a pass of the draft, by what is multiplied for a token, relative to the parent's.
        runs: one for every prompt.
    """

    new: int
    draft_tokens: int
    cost: float
    runs: tuple[DraftRun, ...]

    @property
    def acceptance(self) -> float:
        """The share of the proposed tokens that the parent took."""
        return sum(run.accepted for run in self.runs) / max(1, sum(run.proposed for run in self.runs))

    @property
    def tokens_per_pass(self) -> float:
        """Tokens that a pass of the parent writes; 1 without a draft."""
        return self.new * len(self.runs) / sum(run.passes for run in self.runs)

    @property
    def ratios(self) -> tuple[float, ...]:
        """How many times as fast the parent is with the draft as alone, by prompt."""
        return tuple(run.alone_seconds / run.drafted_seconds for run in self.runs)

    @property
    def ideal(self) -> float:
        """The same if a pass over several tokens cost what one over a single token does, and nothing else did."""
        passes = sum(run.passes for run in self.runs)
        return self.new * len(self.runs) / (passes + self.cost * sum(run.proposed for run in self.runs))

    @property
    def equal_prompts(self) -> int:
        """How many prompts have the same continuation with and without the draft."""
        return sum(run.equal_tokens == self.new for run in self.runs)

    def tokens_per_second(self) -> tuple[float, float]:
        """Return the medians of the parent alone and with the draft."""
        alone = statistics.median(self.new / run.alone_seconds for run in self.runs)
        return alone, statistics.median(self.new / run.drafted_seconds for run in self.runs)


@torch.inference_mode()
def drafted(
    parent: PreTrainedModel,
    draft: PreTrainedModel,
    prompts: torch.Tensor,
    new: int,
    draft_tokens: int,
    clock: Callable[[], float] = time.perf_counter,
    on_run: Callable[[], None] = lambda: None,
) -> Drafted:
    """Continue prompts greedily with the parent alone and with a draft, in turns, and compare what is written.

    Args:
        parent: whose text it is; unchanged.
        draft: a causal language model of the same vocabulary, on the same device; unchanged.
        prompts: tokens ``(prompts, length)``; the first is run once more before, unmeasured.
        new: tokens to write behind each.
        draft_tokens: proposed before every pass of the parent.
        clock: seconds.
        on_run: called after every prompt.

    Raises:
        ParedError: with the draft the parent writes other tokens, and not by rounding.
    """
    # No end of the text: it would end some runs early, and runs are compared.
    greedy = GenerationConfig(do_sample=False, max_new_tokens=new, pad_token_id=0)
    proposing = GenerationConfig(
        num_assistant_tokens=draft_tokens, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0
    )

    def continued(ids: torch.Tensor, **helped: Any) -> tuple[float, list[int]]:
        _wait(ids.device)
        start = clock()
        answer = parent.generate(ids, attention_mask=torch.ones_like(ids), **helped)
        _wait(ids.device)
        return clock() - start, answer[0, ids.shape[1] :].tolist()

    runs: list[DraftRun] = []
    with _generating(parent, greedy), _generating(draft, proposing):
        continued(prompts[:1], assistant_model=draft)
        for number, prompt in enumerate(prompts):
            ids = prompt[None]
            alone, expected = continued(ids)
            with _counting(parent) as lengths:
                helped, found = continued(ids, assistant_model=draft)
            passes, proposed = len(lengths), lengths[0] - ids.shape[1] + sum(lengths[1:]) - (len(lengths) - 1)
            equal, gap = _parting(parent, ids, expected, found, number)
            runs.append(DraftRun(alone, helped, passes, proposed, new - passes, equal, gap))
            on_run()
    cost = describe(draft, "")["multiplied"] / describe(parent, "")["multiplied"]
    return Drafted(new, draft_tokens, cost, tuple(runs))


@contextmanager
def _generating(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Have a model generate as one configuration says, whatever its own folder does."""
    before, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = before


@contextmanager
def _counting(parent: PreTrainedModel) -> Iterator[list[int]]:
    """Give a list of how many tokens the parent was given, pass by pass."""
    lengths: list[int] = []

    def note(_: Any, __: Any, given: dict[str, Any]) -> None:
        lengths.append(given["input_ids"].shape[1])

    handle = parent.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield lengths
    finally:
        handle.remove()


def _parting(
    parent: PreTrainedModel, ids: torch.Tensor, expected: list[int], found: list[int], number: int
) -> tuple[int, float]:
    """Return how many tokens are the same, and by how much the parent prefers its own behind them.

    Raises:
        ParedError: by more than rounding is: a pass over several tokens does not compute what passes over one do.
    """
    equal = next((place for place, pair in enumerate(zip(expected, found, strict=True)) if pair[0] != pair[1]), None)
    if equal is None:
        return len(expected), 0.0
    read = torch.cat([ids, ids.new_tensor([expected[:equal]])], 1)
    logits = parent(input_ids=read, use_cache=False).logits[0, -1].float()
    gap = float((logits[expected[equal]] - logits[found[equal]]).abs() / logits.abs().max())
    if not gap <= TOLERANCE.get(parent.dtype, max(TOLERANCE.values())):
        raise ParedError(
            f"prompt {number}: with the draft the model writes {found[equal]} as token {equal + 1}, expected "
            f"{expected[equal]}; its logits are {gap:.2g} of the largest apart, which is no rounding: its code "
            "does not compute several tokens at a time as it does one, and it cannot be used with a draft"
        )
    return equal, gap


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
