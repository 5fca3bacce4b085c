"""Text from a language model: many prompts at a time, stopped where a task says."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from pared.data.lengths import positions_of
from pared.errors import ParedError
from pared.evaluation.batch_size import BatchSize

# The likeliest token each time, whatever the model's own generation settings are.
GREEDY: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
PRIME = 1_000_003  # that seeds of prompts and samples are apart
TINY = 1e-30


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: 0 takes the likeliest token each time.
        top_p: the share of probability that is drawn from; 1 is all of it.
        samples: continuations of every prompt.
        seed: of the draws; each sample of each prompt has draws of its own, in whatever batch it is.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    samples: int = 1
    seed: int = 0


def greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, tokens: int) -> str:
    """Return what a causal language model says after a prompt, taking the likeliest token each time."""
    ((text,),) = complete(model, tokenizer, [prompt], tokens)
    return text


@torch.no_grad()
def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    tokens: int,
    stop: Sequence[str] = (),
    sampling: Sampling | None = None,
    batch: int | BatchSize = 8,
    on_prompt: Callable[[], None] = lambda: None,
) -> list[list[str]]:
    """Continue prompts, with the cache of keys and values, padded on the left.

    Args:
        model: a causal language model, dense or compressed; unchanged.
        tokenizer: of the model; unchanged.
        prompts: as they are, no special tokens but those the tokenizer adds itself.
        tokens: the most new tokens.
        stop: strings at which a continuation ends; neither they nor what follows is returned.
        sampling: how tokens are chosen; the likeliest by default.
        batch: prompts at a time; those of like length are taken together.
        on_prompt: called for every prompt that is continued.

    Returns:
        For every prompt its continuations.

    Raises:
        ParedError: a model that has no generation config or cannot write, a prompt and its continuation that are more
            than it has positions, or a setting out of range.
    """
    sampling = sampling or Sampling()
    require_possible(sampling, tokens)
    if not model.can_generate():
        raise ParedError(f"{type(model).__name__} has no head for the next token; expected a causal language model")
    if model.generation_config is None:
        raise ParedError(f"{type(model).__name__} has no generation config; give it one: model.generation_config = "
                         "GenerationConfig.from_model_config(model.config)")  # fmt: skip
    with padding_left(tokenizer):
        encoded = [tokenizer(prompt, verbose=False)["input_ids"] for prompt in prompts]
        _require_room(model, encoded, tokens)
        order = sorted(range(len(prompts)), key=lambda index: len(encoded[index]))
        found: dict[int, list[str]] = {}
        size = BatchSize.of(batch)
        size.fit(model, max(map(len, encoded), default=0) + tokens, sampling.samples)

        def written(chosen: Sequence[int]) -> list[str]:
            inputs = tokenizer.pad({"input_ids": [encoded[index] for index in chosen]}, return_tensors="pt")
            return _continued(model, tokenizer, inputs, chosen, tokens, tuple(stop), sampling)

        for chosen, texts in size.over(order, written):
            for place, index in enumerate(chosen):
                own = texts[place * sampling.samples : (place + 1) * sampling.samples]
                found[index] = [cut_at(text, stop) for text in own]
                on_prompt()
    return [found[index] for index in range(len(prompts))]


def cut_at(text: str, stop: Sequence[str]) -> str:
    """Return a text up to the first of some strings."""
    places = [place for string in stop if (place := text.find(string)) >= 0]
    return text[: min(places, default=len(text))]


def _continued(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Any,
    prompts: Sequence[int],
    tokens: int,
    stop: tuple[str, ...],
    sampling: Sampling,
) -> list[str]:
    more: dict[str, Any] = {}
    if sampling.temperature > 0:
        more = {"logits_processor": LogitsProcessorList([_Drawn(sampling, prompts)])}
        for name, tensor in inputs.items():
            inputs[name] = tensor.repeat_interleave(sampling.samples, dim=0)
    asked = inputs["input_ids"].shape[1]
    ended = {"stopping_criteria": StoppingCriteriaList([_Stopped(tokenizer, stop, asked)])} if stop else {}
    was_training = model.training
    output = model.eval().generate(
        **inputs.to(model.get_input_embeddings().weight.device),
        max_new_tokens=tokens,
        pad_token_id=tokenizer.pad_token_id,
        **GREEDY,
        **more,
        **ended,
    )
    model.train(was_training)
    texts: list[str] = tokenizer.batch_decode(output[:, asked:], skip_special_tokens=True)
    return texts


class _Drawn(LogitsProcessor):
    """Makes the likeliest token one that is drawn, for every row from a generator of its own.

    The largest of logits with Gumbel noise is a draw from their softmax (Gumbel, 1954): what a row draws is then the
    same in every batch, where a generator for all would give it other numbers.
    """

    def __init__(self, sampling: Sampling, prompts: Sequence[int]) -> None:
        self.sampling = sampling
        self.generators = [
            torch.Generator().manual_seed(((sampling.seed * PRIME + index) * PRIME + sample) % 2**63)
            for index in prompts
            for sample in range(sampling.samples)
        ]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        del input_ids
        logits_BV = scores.float() / self.sampling.temperature
        if self.sampling.top_p < 1:
            ordered_BV, places_BV = logits_BV.sort(dim=-1, descending=True)
            shares_BV = ordered_BV.softmax(dim=-1)
            left_out_BV = shares_BV.cumsum(dim=-1) - shares_BV >= self.sampling.top_p  # never the likeliest
            logits_BV = logits_BV.masked_fill(left_out_BV.gather(1, places_BV.argsort(dim=-1)), -torch.inf)
        uniform_BV = torch.stack([torch.rand(logits_BV.shape[1], generator=own) for own in self.generators])
        noise_BV = -(-uniform_BV.clamp_min(TINY).log()).clamp_min(TINY).log()
        return logits_BV + noise_BV.to(logits_BV.device)


class _Stopped(StoppingCriteria):
    """Whether a continuation holds a stop string; the library's own criterion fails for some tokenizers."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...], asked: int) -> None:
        self.tokenizer, self.stop, self.asked = tokenizer, stop, asked
        self.tail = max(map(len, stop)) + 4  # tokens: one has a character at least, but for halves of a character

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        del scores
        new = input_ids[:, self.asked :][:, -self.tail :]
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        held = [any(string in text for string in self.stop) for text in texts]
        return torch.tensor(held, device=input_ids.device)


@contextmanager
def padding_left(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Let a tokenizer pad on the left, with the end of text where it has no padding."""
    side, token = tokenizer.padding_side, tokenizer.pad_token
    if token is None and tokenizer.eos_token is None:
        raise ParedError("this tokenizer has neither padding nor an end of text; give it a padding token")
    try:
        tokenizer.padding_side = "left"
        if token is None:
            tokenizer.pad_token = tokenizer.eos_token
        yield
    finally:
        tokenizer.padding_side, tokenizer.pad_token = side, token


def room(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> int | None:
    """Return the tokens a model can write behind the longest of some prompts; None if it has no limit."""
    config = getattr(model, "config", None)  # what writes need not be a model of transformers
    positions = None if config is None else positions_of(config)
    if positions is None:
        return None
    return positions - max((len(tokenizer(prompt, verbose=False)["input_ids"]) for prompt in prompts), default=0)


def _require_room(model: PreTrainedModel, encoded: Sequence[Sequence[int]], tokens: int) -> None:
    positions = positions_of(model.config)
    for index, ids in enumerate(encoded):
        if not len(ids):
            raise ParedError(f"prompt {index + 1} has no tokens")
        if positions is not None and len(ids) + tokens > positions:
            raise ParedError(
                f"prompt {index + 1} has {len(ids)} tokens; with {tokens} new ones that is more than the {positions} "
                "positions of this model: use fewer shots or fewer new tokens"
            )


def require_possible(sampling: Sampling, tokens: int) -> None:
    """Refuse what cannot be drawn.

    Raises:
        ParedError: no samples, no tokens, a temperature or share out of range, or many samples of one likeliest text.
    """
    if tokens < 1 or sampling.samples < 1:
        raise ParedError(f"{sampling.samples} samples of {tokens} new tokens: expected at least 1 of each")
    if sampling.temperature < 0 or not 0 < sampling.top_p <= 1:
        raise ParedError(f"temperature {sampling.temperature:g} and top_p {sampling.top_p:g}: expected 0 or more, and "
                         "above 0 and at most 1")  # fmt: skip
    if sampling.samples > 1 and sampling.temperature == 0:
        raise ParedError(f"{sampling.samples} samples at temperature 0 would all be the same; give a temperature")
