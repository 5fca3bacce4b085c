"""Perplexity against numbers worked out by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from tiny_tokenizer import tiny_tokenizer
from torch import nn
from transformers import PretrainedConfig

import pared
from pared.data.windows import Windows, digest_of
from pared.errors import ParedError
from pared.evaluation import perplexity
from pared.evaluation.perplexity import PIECE, summed_nats, with_bos

VOCAB = 64
BOS = 1


class Bigram(nn.Module):
    """A language model whose next-token logits depend on the current token alone; remembers what it was given."""

    def __init__(self, logits_VV: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Embedding.from_pretrained(logits_VV)
        self.config = PretrainedConfig(vocab_size=VOCAB, max_position_embeddings=64)
        self.seen: list[list[int]] = []
        self.was_training: list[bool] = []

    def get_input_embeddings(self) -> nn.Module:
        return self.logits

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        assert not use_cache
        self.seen.extend(input_ids.tolist())
        self.was_training.append(self.training)
        return SimpleNamespace(logits=self.logits(input_ids))


Bigram.__name__ = "LlamaForCausalLM"  # perplexity asks for a causal language model, by the name of its class


def windows_of(rows: list[list[int]]) -> Windows:
    tokens = torch.tensor(rows)
    return Windows(tokens, digest_of(tokens), "made up", "this test", False)


def counting(next_probability: float) -> Bigram:
    """After token t comes t + 1 with this probability; all else is equally likely."""
    rest = (1 - next_probability) / (VOCAB - 1)
    probabilities = torch.full((VOCAB, VOCAB), rest)
    probabilities[torch.arange(VOCAB), (torch.arange(VOCAB) + 1) % VOCAB] = next_probability
    return Bigram(probabilities.log())


TOKENIZER = tiny_tokenizer(VOCAB)
COUNT = windows_of([[10, 11, 12, 13], [20, 21, 22, 23], [30, 31, 32, 34]])


def test_uniform_logits_give_the_vocabulary_size():
    found = perplexity(Bigram(torch.zeros(VOCAB, VOCAB)), TOKENIZER, COUNT)
    assert found.value == pytest.approx(VOCAB, rel=1e-6)
    assert found.predicted == 9
    assert found.nats == pytest.approx(9 * math.log(VOCAB), rel=1e-6)


def test_perplexity_is_the_exponential_of_the_mean_over_tokens():
    found = perplexity(counting(0.5), TOKENIZER, COUNT)
    nats = -8 * math.log(0.5) - math.log(0.5 / 63)  # eight steps by one, and 32 -> 34
    assert found.nats == pytest.approx(nats, rel=1e-6)
    assert found.value == pytest.approx(math.exp(nats / 9), rel=1e-6)


def test_window_boundaries_are_not_crossed():
    joined = windows_of([[10, 11, 12, 13, 14, 15]])
    apart = windows_of([[10, 11, 12], [13, 14, 15]])
    broken = windows_of([[10, 11, 12], [50, 51, 52]])
    model = counting(0.5)
    assert perplexity(model, TOKENIZER, joined).predicted == 5
    assert perplexity(model, TOKENIZER, apart).predicted == 4
    assert perplexity(model, TOKENIZER, broken).value == pytest.approx(2, rel=1e-6)


def test_each_window_is_read_on_its_own_and_in_order():
    model, done = counting(0.5), []
    perplexity(model, TOKENIZER, COUNT, on_window=lambda: done.append(len(model.seen)))
    assert model.seen == COUNT.tokens.tolist()
    assert done == [1, 2, 3]


def test_without_bos_the_tokens_are_those_of_the_text():
    assert torch.equal(with_bos(COUNT, TOKENIZER, "none"), COUNT.tokens)


def test_bos_of_every_window_takes_the_place_of_its_last_token():
    model = counting(0.5)
    found = perplexity(model, TOKENIZER, COUNT, bos="window")
    assert model.seen == [[BOS, 10, 11, 12], [BOS, 20, 21, 22], [BOS, 30, 31, 32]]
    assert found.nats == pytest.approx(-6 * math.log(0.5) - 3 * math.log(0.5 / 63), rel=1e-6)
    assert found.predicted == 9
    assert found.windows["bos"] == "window"


def test_bos_of_the_text_stands_before_the_first_window_only():
    model = counting(0.5)
    found = perplexity(model, TOKENIZER, COUNT, bos="text")
    assert model.seen == [[BOS, 10, 11, 12], [20, 21, 22, 23], [30, 31, 32, 34]]
    assert found.nats == pytest.approx(-7 * math.log(0.5) - 2 * math.log(0.5 / 63), rel=1e-6)


def test_bos_leaves_the_windows_themselves_alone():
    before = COUNT.tokens.clone()
    with_bos(COUNT, TOKENIZER, "window")
    assert torch.equal(COUNT.tokens, before)


def test_bos_of_a_tokenizer_without_one_is_refused():
    tokenizer = tiny_tokenizer(VOCAB)
    tokenizer.bos_token = None
    model = counting(0.5)
    with pytest.raises(ParedError, match="bos 'text' for text 'made up': this tokenizer has no beginning-of-sequence"):
        perplexity(model, tokenizer, COUNT, bos="text")
    assert model.seen == []
    assert perplexity(model, tokenizer, COUNT, bos="none").predicted == 9


def test_perplexity_says_what_it_was_measured_on():
    found = perplexity(counting(0.5), TOKENIZER, COUNT)
    assert found.windows == {
        "text": "made up", "origin": "this test", "stand_in": False, "windows": 3, "length": 4,
        "digest": COUNT.digest, "bos": "none",
    }  # fmt: skip


def test_half_precision_logits_are_summed_in_float32():
    found = perplexity(Bigram(torch.zeros(VOCAB, VOCAB, dtype=torch.bfloat16)), TOKENIZER, COUNT)
    assert found.value == pytest.approx(VOCAB, rel=1e-6)


def test_loss_that_is_not_a_number_names_the_window():
    logits = torch.zeros(VOCAB, VOCAB)
    logits[21] = math.nan
    with pytest.raises(ParedError, match="window 1 of text 'made up': the loss is nan"):
        perplexity(Bigram(logits), TOKENIZER, COUNT)


def test_astronomical_perplexity_is_infinite_not_an_error():
    logits = torch.zeros(VOCAB, VOCAB)
    logits[:, 63] = 1000
    found = perplexity(Bigram(logits), TOKENIZER, COUNT)
    assert found.value == math.inf
    assert found.nats == pytest.approx(9000, rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_model_is_measured_in_evaluation_mode_and_left_as_it_was(training: bool):
    model = counting(0.5).train(training)
    perplexity(model, TOKENIZER, COUNT)
    assert model.was_training == [False] * 3
    assert model.training is training


def test_broken_model_is_left_in_training_mode_too():
    """An error in the middle once left the caller's model in evaluation mode."""
    model = Bigram(torch.full((VOCAB, VOCAB), math.nan)).train()
    with pytest.raises(ParedError):
        perplexity(model, TOKENIZER, COUNT)
    assert model.training


def test_python_api_cuts_the_text_and_measures_it(tmp_path):
    path = tmp_path / "count.txt"
    path.write_text(" ".join(f"w{index % VOCAB}" for index in range(41)), encoding="utf-8")
    found = pared.perplexity(counting(0.25), TOKENIZER, f"file:{path}", length=8, windows=3)
    assert found.value == pytest.approx(4, rel=1e-6)
    assert found.predicted == 21
    assert found.windows["origin"] == str(path)
    everything = pared.perplexity(counting(0.25), TOKENIZER, f"file:{path}", length=8, windows=None)
    assert everything.predicted == 35


@pytest.mark.parametrize(("length", "windows"), [(1, 3), (0, 3), (-4, 3), (8, 0), (8, -1)])
def test_windows_that_predict_nothing_are_refused(tmp_path, length: int, windows: int):
    """``length=1`` once ended in a division by zero, and ``windows=0`` measured the whole text."""
    path = tmp_path / "count.txt"
    path.write_text(" ".join(["w3"] * 40), encoding="utf-8")
    with pytest.raises(ParedError, match="greater than or equal to"):
        pared.perplexity(counting(0.25), TOKENIZER, f"file:{path}", length=length, windows=windows)


@pytest.mark.parametrize("length", [1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 5])
def test_nats_summed_piece_by_piece_are_those_of_all_tokens(length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    logits_TV = torch.randn(length, VOCAB, generator=generator)
    aims_T = torch.randint(VOCAB, (length,), generator=generator)
    log_probabilities_TV = logits_TV.double().log_softmax(dim=-1)
    expected = -float(log_probabilities_TV[torch.arange(length), aims_T].sum())
    assert summed_nats(logits_TV, aims_T) == pytest.approx(expected, rel=1e-6)
