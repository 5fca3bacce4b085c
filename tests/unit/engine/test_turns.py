"""Blocks that are visited beside the run of the next one: the same bits, the same errors, the same order."""

import threading
import time
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from tiers import crossed
from tiny_models import TINY_MODELS
from transformers import PreTrainedTokenizerFast

import pared
from pared import ParedError
from pared.calibration import BlockStatistics
from pared.engine.solve import Solver
from pared.engine.turns import Beside, in_turn
from pared.lowrank import METHODS
from pared.progress import Stopwatch

CASES: list[dict[str, Any]] = [
    *({"method": name} for name in sorted(METHODS)),
    {"method": "svd-llm", "allocation": "loss"},
    {"method": "basis-sharing", "options": {"group_size": 2}},
    {"method": "loss-optimal", "options": {"output_weighting": "diagonal"}, "structures": "mixed"},
    {"method": "loss-optimal", "options": {"output_weighting": "full"}},
    {"method": "flap", "multiple_of": 1, "keep": 0.8},
]


def beside(monkeypatch: pytest.MonkeyPatch, whether: bool) -> None:
    monkeypatch.setattr("pared.engine.compress.pays", lambda _: whether)


def compressed(
    tokenizer: PreTrainedTokenizerFast, calibration: pared.Calibration, family: str = "llama", **fields: Any
) -> pared.Compressed:
    recipe = pared.Recipe.model_validate({"keep": 0.6, "calibration": calibration, **fields})
    return pared.compress(TINY_MODELS[family](), tokenizer, recipe)


@pytest.mark.parametrize(("case", "family"), crossed(range(len(CASES)), ["llama", "gpt2", "qwen2_moe"]))
def test_visits_beside_the_next_block_leave_the_same_bits_and_the_same_plan(
    case: int,
    family: str,
    tokenizer: PreTrainedTokenizerFast,
    calibration: pared.Calibration,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if family == "qwen2_moe":  # an expert of fewer tokens than inputs would stay dense
        calibration = calibration.model_copy(update={"samples": 24, "batch": 1})
    found = []
    for whether in (False, True):
        beside(monkeypatch, whether)
        found.append(compressed(tokenizer, calibration, family, **CASES[case]))
    in_order, parallel = found
    assert in_order.plan == parallel.plan
    assert in_order.damping == parallel.damping
    before, after = in_order.model.state_dict(), parallel.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_block_is_decomposed_by_another_thread_one_at_a_time_and_in_order(
    tokenizer: PreTrainedTokenizerFast, calibration: pared.Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, under_way, visit = list[tuple[int, int]](), list[int](), Solver.visit

    def watched(solver: Solver, block: BlockStatistics) -> None:
        assert not under_way
        under_way.append(block.index)
        seen.append((block.index, threading.get_ident()))
        time.sleep(0.02)
        visit(solver, block)
        under_way.pop()

    monkeypatch.setattr(Solver, "visit", watched)
    beside(monkeypatch, True)
    compressed(tokenizer, calibration, method="svd-llm")
    indices, threads = zip(*seen, strict=True)
    assert indices == tuple(range(len(indices)))
    assert len(indices) > 1
    assert len(set(threads)) == 1
    assert threading.get_ident() not in threads


@pytest.mark.parametrize("method", ["svd-llm", "loss-optimal"])
def test_what_a_visit_raises_beside_a_block_ends_the_compression(
    method: str, tokenizer: PreTrainedTokenizerFast, calibration: pared.Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: Solver, block: BlockStatistics) -> None:
        raise ParedError(f"block {block.index} cannot be decomposed")

    monkeypatch.setattr(Solver, "visit", fails)
    beside(monkeypatch, True)
    first = "block 0" if method == "svd-llm" else "block [0-9]+"
    with pytest.raises(ParedError, match=f"{first} cannot be decomposed"):
        compressed(tokenizer, calibration, method=method)
    assert not any(thread.name.startswith("beside") for thread in threading.enumerate())


def test_an_earlier_blocks_error_is_told_before_that_of_the_block_that_ran_beside_it() -> None:
    def fails() -> None:
        time.sleep(0.05)
        raise ParedError("of the task")

    def run() -> None:
        with Beside(nullcontext) as turn:
            turn(fails)
            raise ParedError("of the caller, later")

    with pytest.raises(ParedError, match="of the task"):
        run()


def test_a_task_waits_for_the_one_before() -> None:
    done = list[int]()

    def slowly(number: int) -> None:
        time.sleep(0.05 / (number + 1))
        done.append(number)

    with Beside(nullcontext) as turn:
        for number in range(4):
            turn(lambda number=number: slowly(number))  # type: ignore[misc]
            assert len(done) >= number
    assert done == [0, 1, 2, 3]


@pytest.mark.parametrize("enabled", [False, True])
def test_a_task_computes_as_its_caller_would(enabled: bool) -> None:
    found = list[tuple[bool, int]]()
    with torch.set_grad_enabled(enabled):
        for turn in (in_turn, Beside(nullcontext)):
            with turn if isinstance(turn, Beside) else nullcontext():
                turn(lambda: found.append((torch.is_grad_enabled(), torch.get_num_threads())))
    assert found[0] == found[1] == (enabled, torch.get_num_threads())


def test_stages_add_up_to_the_time_that_passed_whatever_other_threads_do() -> None:
    watch = Stopwatch()
    with watch("walk"), Beside(lambda: watch("solve")) as turn:

        def task() -> None:
            with watch("solve"):
                time.sleep(0.1)

        turn(task)
        time.sleep(0.06)
    assert watch.seconds["walk"] >= 0.06
    assert 0 < watch.seconds["solve"] < 0.06  # what was left to wait for


def test_seconds_so_far_hold_the_open_stage_and_change_nothing() -> None:
    now = [0.0]
    watch = Stopwatch(lambda: now[0])
    with watch("walk"):
        now[0] = 2.0
        assert watch.so_far() == {"walk": 2.0}
        assert watch.seconds == {}
        now[0] = 3.0
    assert watch.seconds == {"walk": 3.0}
