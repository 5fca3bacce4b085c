"""As many rows at a time as memory holds, and the same results whatever that is."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from tiny_models import TINY_MODELS
from transformers import PreTrainedTokenizerFast

from pared import ParedError
from pared.data.windows import Windows
from pared.evaluation import batch_size as module
from pared.evaluation.batch_size import MOST, BatchSize, row_bytes
from pared.evaluation.classification import predictions
from pared.evaluation.generation import Sampling, _Drawn, complete
from pared.memory import Available
from pared.schema.evaluate import EvaluationConfig

PROMPTS = ["w3 w4 w5 w6 w7", "w8", "w9 w10 w11", "w12 w13", "w14 w15 w16 w17", "w18 w19 w20", "w21"]
LACKING = "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"


def up_to(most: int, done: list[int]) -> Callable[[Sequence[int]], list[int]]:
    """Return work that lacks memory for more rows."""

    def work(rows: Sequence[int]) -> list[int]:
        if len(rows) > most:
            raise RuntimeError(LACKING)
        done.extend(rows)
        return [10 * row for row in rows]

    return work


@pytest.mark.parametrize("most", [1, 5, 40, 100])
def test_a_batch_is_halved_until_memory_holds_it_and_every_row_is_done_once(most: int) -> None:
    done: list[int] = []
    size = BatchSize("auto")
    found = [one for _, results in size.over(range(100), up_to(most, done)) for one in results]
    assert sorted(done) == list(range(100))
    assert done[0] == 99  # the longest first: what fits it fits all
    assert found == [10 * row for row in done]
    assert size.now == {1: 1, 5: 4, 40: 32, 100: MOST}[most]


def test_a_size_that_is_given_is_kept_to() -> None:
    done: list[int] = []
    size = BatchSize(3)
    assert [list(rows) for rows, _ in size.over(range(7), up_to(3, done))] == [[0, 1, 2], [3, 4, 5], [6]]
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        list(size.over(range(7), up_to(2, done)))
    assert BatchSize.of(size) is size


def test_what_is_no_lack_of_memory_and_a_row_that_does_not_fit_are_raised() -> None:
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        list(BatchSize("auto").over(range(4), up_to(0, [])))

    def wrong(_: Sequence[int]) -> None:
        raise ValueError("a mistake")

    size = BatchSize("auto")
    with pytest.raises(ValueError, match="a mistake"):
        list(size.over(range(4), wrong))
    assert size.now == 4  # of four rows, and not halved


def test_shapes_say_what_to_begin_with(monkeypatch: pytest.MonkeyPatch) -> None:
    model = TINY_MODELS["llama"]()
    need = row_bytes(model, 32)
    monkeypatch.setattr(module, "available_memory", lambda: Available(20 * need, "this test"))
    found, given = BatchSize("auto"), BatchSize(50)
    for size in (found, given):
        size.fit(model, 32)
    assert (found.now, given.now) == (10, 50)
    found.fit(model, 8)
    assert found.now == 10  # it is never raised: memory was not enough once
    found.fit(model, 32, samples=4)
    assert found.now == 2
    found.fit(model, 10_000)
    assert found.now == 1
    monkeypatch.setattr(module, "available_memory", lambda: None)
    free = BatchSize("auto")
    free.fit(model, 32)
    assert free.now == MOST


def test_a_row_needs_its_logits_its_cache_and_its_scores_of_attention() -> None:
    model = TINY_MODELS["llama"]()
    config, tokens = model.config, 64
    logits = tokens * config.vocab_size * (4 + 4 + 4)
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * tokens * 4
    scores = config.num_attention_heads * tokens**2 * 4
    assert logits + cache + scores < row_bytes(model, tokens) < 4 * (logits + cache + scores)
    assert row_bytes(model, 2 * tokens) > 2 * row_bytes(model, tokens)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.9, top_p=0.8, samples=3, seed=5)])
def test_what_is_written_does_not_depend_on_the_batch(sampling: Sampling, tokenizer: PreTrainedTokenizerFast) -> None:
    model = TINY_MODELS["llama"]()
    alone = complete(model, tokenizer, PROMPTS, 8, sampling=sampling, batch=1)
    assert len({text for texts in alone for text in texts}) > len(PROMPTS) // 2
    for batch in (2, 3, 8, BatchSize("auto")):
        assert complete(model, tokenizer, PROMPTS, 8, sampling=sampling, batch=batch) == alone


def test_a_model_that_lacks_memory_writes_the_same_in_smaller_batches(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = TINY_MODELS["llama"]()
    alone, generate, sizes = complete(model, tokenizer, PROMPTS, 4, batch=1), model.generate, list[int]()

    def lacking(*, input_ids: torch.Tensor, **more: Any) -> torch.Tensor:
        sizes.append(len(input_ids))
        if len(input_ids) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(input_ids=input_ids, **more)

    monkeypatch.setattr(model, "generate", lacking)
    size, prompts = BatchSize("auto"), list[None]()
    assert complete(model, tokenizer, PROMPTS, 4, batch=size, on_prompt=lambda: prompts.append(None)) == alone
    assert size.now == 2
    assert len(prompts) == len(PROMPTS)
    assert sizes == [7, 4, 2, 2, 2, 1]
    with pytest.raises(torch.OutOfMemoryError):
        complete(model, tokenizer, PROMPTS, 4, batch=8)


def test_labels_do_not_depend_on_the_batch() -> None:
    model = _classifier()
    random = torch.Generator().manual_seed(0)
    tokens, lengths = torch.randint(3, 60, (9, 12), generator=random), torch.randint(2, 13, (9,), generator=random)
    mask = (torch.arange(12) < lengths[:, None]).long()
    windows = Windows(tokens * mask, "", "these", "this test", False, mask, torch.zeros(9, dtype=torch.int64))
    alone = predictions(model, windows, lambda: None, 1)
    for batch in (2, 4, 9, BatchSize("auto")):
        assert torch.equal(predictions(model, windows, lambda: None, batch), alone)


def _classifier() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                        intermediate_size=48, num_labels=3)  # fmt: skip
    return BertForSequenceClassification(config).eval()


def test_draws_are_those_of_the_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    draw = _Drawn(Sampling(temperature=0.7, samples=5_000, seed=1), [4])
    counts = torch.bincount(draw(torch.empty(0), logits.expand(5_000, 4)).argmax(dim=-1), minlength=4)
    expected = 5_000 * (logits / 0.7).softmax(dim=-1)
    assert float(((counts - expected) ** 2 / expected).sum()) < 20  # chi-squared of 3 degrees: p 0.0002


def test_a_share_of_probability_leaves_out_the_rest_and_never_the_likeliest() -> None:
    logits = torch.tensor([[2.0, 0.0, 1.0, -3.0]]).repeat(500, 1)
    for top_p, kept in ((0.01, {0}), (0.7, {0, 2}), (1.0, {0, 1, 2, 3})):
        draw = _Drawn(Sampling(temperature=1.0, top_p=top_p, samples=500), [0])
        assert set(draw(torch.empty(0), logits).argmax(dim=-1).tolist()) == kept


@pytest.mark.parametrize(("given", "batch"), [("auto", "auto"), ("16", 16), (1, 1), (None, None)])
def test_a_batch_size_is_a_number_or_found(given: Any, batch: Any) -> None:
    assert EvaluationConfig(tasks="gsm8k", batch_size=given).batch_size == batch


@pytest.mark.parametrize("given", ["0", 0, -1, "many", 1.5, True])
def test_another_batch_size_is_refused(given: Any) -> None:
    with pytest.raises(ParedError, match="batch_size: expected a whole number from 1, or auto; got"):
        EvaluationConfig(tasks="gsm8k", batch_size=given)


def test_perplexity_has_windows_one_at_a_time() -> None:
    with pytest.raises(ParedError, match="perplexity reads no batch_size"):
        EvaluationConfig(perplexity="embedded", batch_size=4)
