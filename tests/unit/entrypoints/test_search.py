"""A whole search on a tiny model: truly measured, put back, resumed, refused."""

import json
import math
import os
import signal
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from passes import plan_of
from processes import kill_when
from tiny_models import TINY_MODELS
from tiny_tokenizer import tiny_tokenizer
from typer.testing import CliRunner

from pared import ParedError, Recipe, compress, perplexity
from pared.allocation.dsa import parse
from pared.cli.commands import app
from pared.data.texts import find_text
from pared.data.windows import cut
from pared.engine.spec import resolve
from pared.entrypoints.search import search
from pared.schema.search import SearchConfig
from pared.search.data_split import require_training, search_texts
from pared.search.evolution import Candidate, Measured
from pared.search.journal import SearchJournal
from pared.search.objective import Measure, successive_halving_splits
from pared.search.pool import Processes, Queue
from pared.search.zeros import ZerosTrial
from pared.sparsity import METHODS, RankedWeights, Unstructured
from pared.structure import find_anatomy, probe, weight_of

CONFIG = SearchConfig(iterations=8, population=4, top=2, windows=4, length=16, final_windows=6)
PROGRAM = parse("W:(ABSLOG)-(VAR)-(ATAN)-(9)")


@pytest.fixture
def recipe(text_file: Path) -> Any:
    def of(method: str = "wanda", **fields: Any) -> Recipe:
        calibration = {"text": f"file:{text_file}", "samples": 5, "length": 16, "batch": 2, "dtype": "float32"}
        budget = {} if {"keep", "sparsity", "rank_fraction"} & fields.keys() else {"sparsity": 0.6}
        return Recipe.of({"method": method, "calibration": calibration, **budget, **fields})

    return of


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def trial_of(family: str = "llama", pruner: str = "wanda", sparsity: float = 0.6) -> ZerosTrial:
    model = TINY_MODELS[family]()
    anatomy, _ = probe(model, find_anatomy(model))
    random = torch.Generator().manual_seed(0)
    energies = {site.name: torch.rand(site.in_features, generator=random).double() for site in anatomy.sites}
    return ZerosTrial(model, anatomy, energies, METHODS[pruner], METHODS[pruner].config(), sparsity)


@pytest.mark.parametrize("pruner", ["wanda", "magnitude"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.71])
def test_the_zeros_of_an_order_are_those_of_the_pruner(pruner: str, sparsity: float) -> None:
    model = TINY_MODELS["llama"]()
    site = find_anatomy(model).sites[4]
    W_ON = weight_of(model.get_submodule(site.name)).detach().clone()
    W_ON[:, 3] = W_ON[:, 4]  # equal scores: the earlier goes first
    W_ON[2] = 0.5
    energy_N = torch.ones(W_ON.shape[1], dtype=torch.float64)
    solution = METHODS[pruner].solve([W_ON], [{"energy": energy_N}], METHODS[pruner].config())
    assert isinstance(solution, RankedWeights)
    ordered, pattern = solution.ordered(), Unstructured(sparsity)
    expected = METHODS[pruner].prune(W_ON, pattern, {"energy": energy_N})
    assert torch.equal(ordered.without(pattern.zeros(ordered.rivals)), expected.weight)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_allocation_is_in_the_model_and_gone_again_bit_by_bit(family: str) -> None:
    trial = trial_of(family)
    before = state(trial.model)
    allocation = trial.allocate(PROGRAM)
    assert allocation is not None
    sparsities = list(trial.shares(PROGRAM).values())
    assert max(sparsities) - min(sparsities) == pytest.approx(0.18)
    with trial.installed(allocation):
        zeros = total = 0
        for site in find_anatomy(trial.model).sites:
            W_ON = weight_of(trial.model.get_submodule(site.name))
            share = float((W_ON == 0).float().mean())
            assert share == pytest.approx(sparsities[site.block], abs=1 / site.in_features)
            zeros, total = zeros + int((W_ON == 0).sum()), total + W_ON.numel()
        assert zeros / total == pytest.approx(0.6, abs=0.02)
    assert same(trial.model, before)
    with pytest.raises(KeyboardInterrupt), trial.installed(allocation):
        raise KeyboardInterrupt
    assert same(trial.model, before)


def test_magnitude_finds_the_perplexity_that_compress_has(
    recipe: Any, tokenizer: Any, tmp_path: Path, text_file: Path
) -> None:
    """Magnitude's zeros depend on nothing that pruning changes, so that a candidate is the compressed model itself."""
    model = TINY_MODELS["llama"]()
    before = state(model)
    found = search(model, tokenizer, recipe("magnitude"), CONFIG, tmp_path / "s")
    assert same(model, before)
    calibration, held_out = search_texts(f"file:{text_file}")
    windows = cut(calibration, tokenizer, 16, 5)
    asked = recipe("magnitude", allocation="dsa",
                   allocation_options={"program": str(tmp_path / "s" / "FOUND.json")})  # fmt: skip
    assert resolve(asked).allocation_config.program == found.program, "the record holds the program, not a file"
    compress(model, tokenizer, asked, windows=windows)
    (tmp_path / "rest.txt").write_text(held_out.joined)
    here = perplexity(model, tokenizer, f"file:{tmp_path / 'rest.txt'}", length=16, windows=6).value
    assert here == pytest.approx(found.told["perplexity"]["full"], rel=1e-5)


@pytest.mark.parametrize("method", ["svd-llm", "loss-optimal"])
def test_ranks_are_searched_for_alike_and_are_what_compress_makes_of_the_program(
    method: str, recipe: Any, tokenizer: Any, tmp_path: Path, text_file: Path
) -> None:
    model = TINY_MODELS["llama"]()
    before = state(model)
    fields = {"keep": 0.6, "refit": "off", "statistics": "once"}
    found = search(model, tokenizer, recipe(method, **fields), CONFIG, tmp_path / "s")
    assert same(model, before)
    trace = found.told["trace"]
    assert len(trace) == 12
    assert trace[-1] < trace[0]
    calibration, held_out = search_texts(f"file:{text_file}")
    options = {"program": str(tmp_path / "s" / "FOUND.json")}
    asked = recipe(method, allocation="dsa", allocation_options=options, **fields)
    plan = compress(model, tokenizer, asked, windows=cut(calibration, tokenizer, 16, 5)).plan
    assert 0.55 < plan.achieved_keep <= 0.6
    (tmp_path / "rest.txt").write_text(held_out.joined)
    here = perplexity(model, tokenizer, f"file:{tmp_path / 'rest.txt'}", length=16, windows=6).value
    assert here == pytest.approx(found.told["perplexity"]["full"], rel=1e-3)


class Told:
    """Keeps the stages that were opened, with their steps, and the notes."""

    def __init__(self) -> None:
        self.stages: dict[str, list[int]] = {}
        self.notes: list[str] = []

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Any:  # noqa: ARG002 - the protocol's
        done = self.stages[name] = [0, total]

        def advance(told: str = "", recalled: bool = False) -> None:
            done[0] += 1

        yield advance

    def note(self, message: str) -> None:
        self.notes.append(message)


def test_what_follows_the_last_candidate_is_told_window_by_window(recipe: Any, tokenizer: Any, tmp_path: Path) -> None:
    """Regression: a search was silent while it measured what the best is compared with on the full split."""
    told = Told()
    config = CONFIG.model_copy(update={"iterations": 0, "final_windows": None})
    search(TINY_MODELS["llama"](), tokenizer, recipe(), config, tmp_path / "s", told)
    assert {done == total for done, total in told.stages.values()} == {True}
    assert told.stages["dense on the windows of the search"] == [4, 4]
    windows = told.stages["dense on the full split"][1]
    assert told.stages["uniform on the full split"] == [windows, windows]
    assert any(f"the full split, {windows} windows each" in note for note in told.notes)


def test_a_journal_whose_dense_model_has_no_values_is_told(recipe: Any, tokenizer: Any, tmp_path: Path) -> None:
    """Regression: IndexError; a measurement of a worker that died has none."""
    model = TINY_MODELS["llama"]()
    search(model, tokenizer, recipe(), CONFIG, tmp_path / "a")
    path = tmp_path / "a" / "journal.jsonl"
    first = json.loads(path.read_bytes().partition(b"\n")[0])
    del first["check"]
    rows = [first, {"name": "dense", "program": "dense", "values": []}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ParedError, match="the dense model has no perplexity"):
        search(model, tokenizer, recipe(), CONFIG, tmp_path / "a")


def test_the_same_search_writes_the_same_bytes_and_another_is_refused(
    recipe: Any, tokenizer: Any, tmp_path: Path
) -> None:
    model = TINY_MODELS["llama"]()
    a, b = (search(model, tokenizer, recipe(), CONFIG, tmp_path / name) for name in "ab")
    journals = [(tmp_path / name / "journal.jsonl").read_bytes() for name in "ab"]
    assert journals[0] == journals[1]
    assert a.told == b.told
    assert a.told["trace"] == sorted(a.told["trace"], reverse=True)
    assert a.told["perplexity"]["full"] == min(one["full"] for one in a.told["best"])
    again = search(model, tokenizer, recipe(), CONFIG, tmp_path / "a")
    assert again.told == a.told
    assert (tmp_path / "a" / "journal.jsonl").read_bytes() == journals[0]
    for asked, config, told in (
        (recipe(sparsity=0.5), CONFIG, "sparsity: 0.6 there, 0.5 now"),
        (recipe(), CONFIG.model_copy(update={"seed": 1}), "search seed: 0 there, 1 now"),
        (recipe(), CONFIG.model_copy(update={"windows": 3}), r"[( ]windows: 4 there, 3 now"),
        (recipe("magnitude"), CONFIG, "method: 'wanda' there, 'magnitude' now"),
    ):
        with pytest.raises(ParedError, match=told):
            search(model, tokenizer, asked, config, tmp_path / "a")


@pytest.mark.parametrize("kept", [1, 4, 9, 17])
def test_a_journal_cut_anywhere_is_gone_on_with_to_the_same_end(
    kept: int, recipe: Any, tokenizer: Any, tmp_path: Path
) -> None:
    model = TINY_MODELS["llama"]()
    config = CONFIG.model_copy(update={"halving": True})
    whole = search(model, tokenizer, recipe(), config, tmp_path / "a")
    journal = tmp_path / "a" / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:kept]) + lines[kept][:11])  # and a torn line
    again = search(model, tokenizer, recipe(), config, tmp_path / "a")
    assert journal.read_bytes() == b"".join(lines)
    assert again.told == whole.told


def test_a_damaged_or_busy_journal_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with SearchJournal(path, {"x": 1}) as journal:
        journal.put("candidate 0", "W", Measured((math.inf,), "overflow"))
        with pytest.raises(ParedError, match="another search is writing it"):
            SearchJournal(path, {"x": 1})
    with SearchJournal(path, {"x": 1}) as journal:
        assert journal.get("candidate 0", "W") == Measured((math.inf,), "overflow")
        with pytest.raises(ParedError, match="candidate 0 is W, and this search would measure V"):
            journal.get("candidate 0", "V")
    whole = path.read_bytes()
    for content, told in ((whole + b"{]\n", "line 3: not a line of a search"), (b'{"a": 1}\n', "first line is not")):
        path.write_bytes(content)
        with pytest.raises(ParedError, match=told):
            SearchJournal(path, {"x": 1})


def test_a_search_never_sees_what_results_are_reported_on(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("wikitext2:test", "wikitext2:validation", "c4:validation", "embedded:eval", "x/y[z]:test:text",
                 "x/y:train[:9%]+test:text"):  # fmt: skip
        with pytest.raises(ParedError, match="results are reported on"):
            require_training(name)
    (tmp_path / "lm").mkdir()
    (tmp_path / "lm" / "wikitext2_raw_test.txt").write_text("a b c")
    monkeypatch.setenv("PARED_DATA", str(tmp_path))
    with pytest.raises(ParedError, match="results are reported on"):
        require_training(f"file:{tmp_path}/lm/../lm/wikitext2_raw_test.txt")
    for name in ("wikitext2:train", "c4:train", "embedded", "alpaca", f"file:{text_file}", "x/y:train:text"):
        require_training(name)


@pytest.mark.parametrize("name", ["embedded", "file"])
def test_the_search_part_is_the_last_fifth_and_shares_nothing_with_the_rest(name: str, text_file: Path) -> None:
    name = f"file:{text_file}" if name == "file" else name
    whole = find_text(name)
    first, last = search_texts(name)
    share = len(last.joined) / len(whole.joined)
    assert 0.1 < share < 0.22, "whole documents, and one of the embedded text is 8% of it"
    if len(whole.documents) > 1:
        assert (*first.documents, *last.documents) == whole.documents
    else:
        assert f"{first.joined} {last.joined}" == whole.joined
    assert first.name.endswith("[:80%]")
    assert last.name.endswith("[80%:]")


def test_steps_of_halving_are_all_windows_and_a_candidate_stops_where_it_is_behind(
    text_file: Path, tokenizer: Any
) -> None:
    windows = cut(find_text(f"file:{text_file}"), tokenizer, 16, 9)
    steps = successive_halving_splits(windows, halving=True)
    assert [len(step.tokens) for step in steps] == [2, 2, 5]
    assert torch.equal(torch.cat([step.tokens for step in steps]), windows.tokens)
    trial = trial_of()
    measure, once = (Measure(trial, tokenizer, parts, windows) for parts in (steps, [windows]))
    allocation = trial.uniform()
    values = measure(Candidate(0, PROGRAM, allocation, (math.inf, math.inf))).values
    assert values[-1] == pytest.approx(once(Candidate(0, PROGRAM, allocation)).values[0], rel=1e-6)
    assert measure(Candidate(0, PROGRAM, allocation, (values[0], values[1] - 1e-9))).values == values[:2]
    with pytest.raises(ParedError, match="at least 4 windows, got 3"):
        successive_halving_splits(replace(windows, tokens=windows.tokens[:3]), halving=True)


def test_what_cannot_be_searched_for_is_refused(recipe: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = TINY_MODELS["llama"]()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    for asked, config, out, told in (
        (recipe("sparsegpt"), CONFIG, "a", "sparsegpt changes the weights it keeps"),
        (recipe(allocation="owl"), CONFIG, "a", "got allocation 'owl'"),
        (recipe(options={"variant": True}), CONFIG, "a", "search without it"),
        (recipe("basis-sharing", keep=0.8), CONFIG, "a", "search with svd-llm"),
        (recipe("svd-llm", rank_fraction=0.3), CONFIG, "a", "rank_fraction fixes"),
        (recipe("loss-optimal", keep=0.8, multiple_of=32), CONFIG, "a", "multiple_of 32 is of widths"),
        (recipe("loss-optimal", keep=0.8, heads="on"), CONFIG, "a", "heads are taken out with widths"),
        (recipe("flap", keep=0.8), CONFIG, "a", "a search finds ranks, got structures widths"),
        (recipe("reap", keep=0.8), CONFIG, "a", "a search finds ranks or zeros, got structures experts"),
        (recipe(), CONFIG, "full", "holds something other than a search"),
        (recipe(), SearchConfig(windows=5000, length=16), "a", "fewer than the 5000 requested"),
    ):
        with pytest.raises(ParedError, match=told):
            search(model, tokenizer, asked, config, tmp_path / out)
        assert not (tmp_path / "a").exists(), "nothing was written"
    with pytest.raises(ParedError, match="not a causal language model"):
        search(TINY_MODELS["bert"](), tokenizer, recipe(), CONFIG, tmp_path / "b")


def test_a_program_file_that_is_none_is_refused(recipe: Any, tmp_path: Path) -> None:
    for content, told in ((None, "No such file"), ("{", "not JSON"), ("[]", "expected an object with a 'program'")):
        path = tmp_path / "f.json"
        if content is not None:
            path.write_text(content)
        with pytest.raises(ParedError, match=told):
            resolve(recipe(allocation="dsa", allocation_options={"program": str(path)}))


def test_a_program_that_does_not_exist_is_refused_before_anything_is_read(recipe: Any) -> None:
    asked = recipe("svd-llm", keep=0.8, allocation="dsa", allocation_options={"program": "dsa-redme"})
    with pytest.raises(ParedError, match="did you mean 'dsa-readme'"):
        plan_of(TINY_MODELS["llama"](), asked)
    with pytest.raises(ParedError, match="score_tokens: expected a number of tokens"):
        resolve(recipe(allocation="dsa", allocation_options={"score_tokens": -1}))
    with pytest.raises(ParedError, match="allocation uniform has no option 'program'; it has none"):
        plan_of(TINY_MODELS["llama"](), recipe("svd-llm", keep=0.8, allocation_options={"program": "x"}))


class Slow:
    """Counts letters; the worker of candidate 3 dies, the first time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, candidate: Candidate) -> Measured:
        killed = self.folder / "killed"
        if candidate.number == 3 and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return Measured((float(len(str(candidate.program))),))

    def final(self, candidate: Candidate) -> Measured:
        raise ParedError(f"on purpose {candidate.number}")


def test_a_worker_that_dies_costs_only_its_candidate(tmp_path: Path) -> None:
    candidates = [Candidate(number, PROGRAM, ()) for number in range(7)]
    with Processes(Slow(tmp_path), 2) as pool:
        for candidate in candidates:
            pool.submit(candidate)
        found = dict(pool.next() for _ in candidates)
        assert (tmp_path / "killed").exists()
        assert found == {number: Measured((float(len(str(PROGRAM))),)) for number in range(7)}
        pool.submit(candidates[0], final=True)
        with pytest.raises(ParedError, match="on purpose"):
            pool.next()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pool.pids)


def test_a_candidate_that_costs_three_workers_is_given_up_unless_none_ever_worked() -> None:
    queue, task = Queue(), (Candidate(5, PROGRAM, ()), False)
    for _ in range(2):
        assert queue.died(task) is None
        assert queue.waiting.popleft() == task
    with pytest.raises(ParedError, match="3 workers died at their first candidate"):
        queue.died(task)
    queue.took((Candidate(0, PROGRAM, ()), False), Measured((1.0,)))
    assert queue.died(task) == (5, Measured((), "3 workers died while measuring it"))


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    TINY_MODELS["llama"]().save_pretrained(tmp_path / "tiny")
    tiny_tokenizer(64).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def words(tiny: Path, text_file: Path, out: Path, *more: str, iterations: int = 8) -> list[str]:
    return ["search", str(tiny), "--method", "wanda", "--sparsity", "0.6", "--data", f"file:{text_file}", "--samples",
            "5", "--length", "16", "--windows", "4", "--final-windows", "6", "--population", "4", "--top", "2",
            "--iterations", str(iterations), "--calibration-dtype", "float32", "--out", str(out), *more]  # fmt: skip


def test_the_command_finds_tells_and_draws(tiny: Path, text_file: Path, tmp_path: Path) -> None:
    run = CliRunner()
    result = run.invoke(app, words(tiny, text_file, tmp_path / "r", "--strategy", "random"))
    assert result.exit_code == 0, result.stderr
    result = run.invoke(app, words(tiny, text_file, tmp_path / "e", "--against", str(tmp_path / "r"), "--json",
                                   str(tmp_path / "told.json")))  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert "--allocation dsa --allocation-option program=" in result.stdout
    assert (tmp_path / "e" / "trace.png").stat().st_size > 1000
    told = json.loads((tmp_path / "e" / "FOUND.json").read_text())
    assert told["program"] == json.loads((tmp_path / "told.json").read_text())["program"]
    assert len(told["trace"]) == 12
    result = run.invoke(app, words(tiny, text_file, tmp_path / "n", "--data", "wikitext2:test"))
    assert result.exit_code == 2
    assert "results are reported on" in result.stderr
    assert not (tmp_path / "n").exists()
    result = run.invoke(app, words(tiny, text_file, tmp_path / "n", "--method", "svd-llm"))
    assert "method svd-llm does not take sparsity" in result.stderr


@pytest.mark.slow
def test_a_killed_search_goes_on_to_the_very_journal_of_one_that_was_not(
    tiny: Path, text_file: Path, tmp_path: Path
) -> None:
    whole = CliRunner().invoke(app, words(tiny, text_file, tmp_path / "whole", "--workers", "2", iterations=60))
    assert whole.exit_code == 0, whole.stderr
    command = words(tiny, text_file, tmp_path / "cut", "--workers", "2", iterations=60)
    journal = tmp_path / "cut" / "journal.jsonl"
    kill_when(command, lambda: journal.exists() and journal.read_bytes().count(b"\n") >= 20)
    assert journal.read_bytes().count(b"\n") < (tmp_path / "whole" / "journal.jsonl").read_bytes().count(b"\n")
    before = journal.read_bytes()
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 2
    assert "unfinished search of these very settings: --resume continues it, --restart removes it" in " ".join(
        refused.stderr.split()
    )
    assert journal.read_bytes() == before
    again = CliRunner().invoke(app, [*command, "--resume"])
    assert again.exit_code == 0, again.stderr
    assert "resumes from there" in again.stderr
    assert journal.read_bytes() == (tmp_path / "whole" / "journal.jsonl").read_bytes()
    assert json.loads((tmp_path / "cut" / "FOUND.json").read_text()) == json.loads(
        (tmp_path / "whole" / "FOUND.json").read_text()
    )
