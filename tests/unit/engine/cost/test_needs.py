"""What a compression needs is told from shapes, and in proportion to what it holds."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import TINY_MODELS

from pared.engine.allocate import anatomy_of
from pared.engine.cost.needs import Needs, needs_of
from pared.engine.cost.sizes import Tokens
from pared.engine.spec import resolve
from pared.errors import ParedError
from pared.io.output_dir import RESERVE
from pared.memory import Available
from pared.schema.recipe import Recipe
from pared.structure.probe import probe_shapes

BLOCKS, WIDTH, INNER, VOCABULARY = 6, 64, 160, 1000
TOKENS = Tokens(windows=32, length=128, batch=4)
BLOCK = (4 * WIDTH**2 + 3 * WIDTH * INNER + 2 * WIDTH) * 2  # bytes


@pytest.fixture(scope="module")
def model() -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=BLOCKS,
        num_attention_heads=4, dtype="bfloat16",
    )  # fmt: skip
    with torch.device("meta"):
        return transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)


def needs(model: transformers.PreTrainedModel, tokens: Tokens = TOKENS, streamed: bool = True, **fields: Any) -> Needs:
    recipe = Recipe(
        **{"method": "svd-llm"} | {name: value for name, value in fields.items() if name not in ("limit", "output")}
    )
    anatomy = probe_shapes(model, anatomy_of(model, recipe))
    return needs_of(model, anatomy, resolve(recipe), tokens, streamed=streamed, itemsize=2,
                    output_bytes=fields.get("output", 1000), activation_memory=fields.get("limit"))  # fmt: skip


def test_weights_are_those_outside_and_one_block_or_a_group(model: transformers.PreTrainedModel) -> None:
    outside = (2 * VOCABULARY * WIDTH + WIDTH) * 2
    assert needs(model).memory["outside of the blocks"] == 2 * WIDTH  # a norm
    assert needs(model).memory["blocks"] == BLOCK
    assert needs(model, method="basis-sharing", options={"group_size": 3}).memory["blocks"] == 3 * BLOCK
    assert needs(model, streamed=False).memory["the model"] == outside + BLOCKS * BLOCK


def test_hidden_states_go_to_the_disk_beyond_their_limit(model: transformers.PreTrainedModel) -> None:
    one = TOKENS.windows * TOKENS.length * WIDTH * 2
    assert needs(model).memory["hidden states"] == one
    found = needs(model, limit=1000)
    assert (found.memory["hidden states"], found.disk["activations"]) == (1000, one - 1000)
    longer = replace(TOKENS, windows=2 * TOKENS.windows)
    assert needs(model, longer).memory["hidden states"] == 2 * one
    # A backward pass reads what every block reads.
    assert needs(model, method="loss-optimal").memory["hidden states"] >= BLOCKS * one


def test_statistics_are_of_one_block_unless_gradients_wait(model: transformers.PreTrainedModel) -> None:
    diagonal = needs(model, method="loss-optimal", options={"output_weighting": "diagonal"}).memory["statistics"]
    full = needs(model, method="loss-optimal", options={"output_weighting": "full"}).memory["statistics"]
    assert needs(model, method="svd").memory.get("statistics", 0) == 0
    assert needs(model, method="wanda", sparsity=0.5).memory["statistics"] < diagonal < full


def test_one_gram_at_a_time_is_solved_where_those_of_a_block_are_on_the_disk(
    model: transformers.PreTrainedModel,
) -> None:
    """The bound of a streamed compression does not ask for more than a block's statistics, however it is solved."""
    full = {"method": "loss-optimal", "options": {"output_weighting": "full"}, "keep": 0.8}
    few = Tokens(windows=32, length=8, batch=1)
    found, whole = needs(model, few, limit=1000, **full), needs(model, few, streamed=False, **full)
    assert found.memory.get("solving", 0) < whole.memory["solving"]
    assert found.disk["statistics"] == found.memory["statistics"] == whole.memory["statistics"]
    outside = (2 * VOCABULARY * WIDTH + WIDTH) * 2
    assert found.bound == outside + 3 * BLOCK + found.memory["statistics"] + 1000 + 2**30
    assert whole.bound == 0


def test_a_head_takes_the_logits_of_a_part_of_the_tokens(
    model: transformers.PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    long, scalar = (
        Tokens(windows=4, length=4000, batch=1),
        {"method": "loss-optimal", "options": {"output_weighting": "scalar"}},
    )
    whole = needs(model, long, **scalar).memory["logits of a window"]
    monkeypatch.setattr("pared.engine.cost.needs.LOGITS", 1000 * VOCABULARY)
    assert needs(model, long, **scalar).memory.get("logits of a window", 0) < whole / 3


def test_embeddings_are_there_when_blocks_are_not(model: transformers.PreTrainedModel) -> None:
    tokens = Tokens(windows=1, length=4, batch=1)
    found = needs(model, tokens, method="magnitude", sparsity=0.5).memory
    assert found["embeddings and head"] == 2 * VOCABULARY * WIDTH * 2
    assert "solving" not in found
    assert "embeddings and head" not in needs(model, tokens, method="svd-llm").memory  # solving takes more, later


def test_decompositions_wait_on_the_disk_where_ranks_depend_on_them(model: transformers.PreTrainedModel) -> None:
    assert "decompositions" not in needs(model).disk
    assert needs(model, method="loss-optimal").disk["decompositions"] > 0
    assert needs(model).disk["the output"] == 1000


def test_what_orders_channels_by_a_score_needs_no_square(model: transformers.PreTrainedModel) -> None:
    ours, flap, leverage = (
        needs(model, method=name, structures="widths") for name in ("loss-optimal", "flap", "modegpt")
    )
    assert flap.memory_bytes < leverage.memory_bytes < ours.memory_bytes
    assert "orders of channels" not in flap.disk
    assert leverage.disk["orders of channels"] == ours.disk["orders of channels"] > 0


def test_finished_blocks_lie_beside_the_output(model: transformers.PreTrainedModel) -> None:
    outside = (2 * VOCABULARY * WIDTH + WIDTH) * 2
    output = outside + 5000

    def finished(streamed: bool, **fields: Any) -> int:
        return needs(model, streamed=streamed, output=output, **fields).disk.get("finished blocks", 0)

    once = {"method": "svd-llm", "statistics": "once", "refit": "off"}
    assert finished(True, **once) == 0  # they become the output's
    assert finished(False, **once) == 5000
    shared = {"method": "basis-sharing", "refit": "update"}
    assert finished(True, **shared) == 5000
    assert finished(False, **shared) == 10000


def test_what_a_resumed_run_has_written_is_not_needed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pared.engine.cost.needs.free_space", lambda _: RESERVE + 400)
    found = Needs({}, {"the output": 1000})
    found.require_disk(tmp_path, there=600)
    with pytest.raises(ParedError, match="not enough disk"):
        found.require_disk(tmp_path, there=599)


def test_hidden_states_are_of_every_run_of_a_block_that_runs_several_times() -> None:
    with torch.device("meta"):
        model = TINY_MODELS["llama"]()
    one = needs(model, method="loss-optimal").memory["hidden states"]
    model.config.num_hidden_layers *= 2  # as ALBERT's groups
    assert needs(model, method="loss-optimal").memory["hidden states"] > 1.5 * one


def test_gradients_of_all_blocks_wait_on_the_disk_where_the_model_is_streamed(
    model: transformers.PreTrainedModel,
) -> None:
    asked = {"method": "loss-optimal", "statistics": "sequential"}
    of_all = needs(model, streamed=False, limit=1000, **asked).memory["statistics"]
    of_one = needs(model, streamed=True, limit=1000, **asked).memory["statistics"]
    assert of_one < of_all


def test_a_refusal_says_what_takes_most_and_what_would_take_less(model: transformers.PreTrainedModel) -> None:
    found = Needs({"hidden states": 3 * 2**30, "blocks": 2**20}, {})
    assert found.too_much(None) == found.too_much(Available(4 * 2**30, "a limit")) == ""
    told = found.too_much(Available(2**30, "a limit"))
    assert told.startswith("about 3.0 GiB of memory needed (hidden states 3.0 GiB, blocks 1.0 MiB), 1.0 GiB left by a")
    assert "activation_memory" in told


def test_gradients_of_every_draw_of_labels_are_held_where_sites_read_them(model: transformers.PreTrainedModel) -> None:
    def held(draws: int) -> int:
        found = needs(model, long, method="loss-optimal", keep=0.8, options={"labels_per_token": draws})
        return found.memory["a batch in a block"]

    long = replace(TOKENS, batch=32)
    outputs = 4 * WIDTH + 2 * INNER + WIDTH  # of a block's sites
    assert held(3) - held(2) == held(2) - held(1) == 32 * TOKENS.length * 2 * 2 * outputs
