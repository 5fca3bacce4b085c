"""Models are timed in turns, each in its own process; what is ideal is counted, not timed."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import TINY_MODELS
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import pared.evaluation.speed
from pared import ParedError
from pared.checkpoint import mark, save
from pared.cli.commands import app
from pared.evaluation.speed import PRESETS, Case, Settings, Timed, bench, parse_case, preset
from pared.evaluation.speed.bench import Bench, _Worker
from pared.evaluation.speed.worker import describe, run
from unit.checkpoint.test_shared import Q, put_low_rank

FEW = Settings((Case("prefill", 2, 8), Case("decode", 1, 4, 5), Case("forward", 3, 6)), repeats=2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> tuple[Path, Path]:
    place = tmp_path_factory.mktemp("speed")
    dense, low = TINY_MODELS["llama"](), TINY_MODELS["llama"]()
    put_low_rank(low, list(Q), 4)
    mark(low)
    for model, name in ((dense, "dense"), (low, "low")):
        save(model, tokenizer, place / name)
    return place / "low", place / "dense"


@pytest.mark.parametrize(
    ("text", "case"),
    [
        ("prefill:4x512", Case("prefill", 4, 512)),
        ("decode:1x64+32", Case("decode", 1, 64, 32)),
        ("forward:512x32", Case("forward", 512, 32)),
    ],
)
def test_cases_are_written_in_one_word(text: str, case: Case) -> None:
    assert parse_case(text) == case
    assert Settings.of_json(json.loads(json.dumps(Settings((case,)).to_json()))) == Settings((case,))


@pytest.mark.parametrize("text", ["", "prefill", "prefill:4", "prefill:0x3", "decode:1x64", "prefill:1x2+3", "x:1x2"])
def test_what_is_no_case_is_refused(text: str) -> None:
    with pytest.raises(ParedError, match="expected prefill:BATCHxLENGTH"):
        parse_case(text)


def test_tokens_are_those_a_run_makes() -> None:
    assert [case.tokens for case in FEW.cases] == [16, 5, 18]
    assert Case("decode", 8, 64, 32).tokens == 256


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_decoding_with_the_cache_makes_the_tokens_of_generate(family: str) -> None:
    model = TINY_MODELS[family]().eval()
    ids = torch.randint(3, 64, (2, 5))
    seen: list[torch.Tensor] = []
    model.register_forward_hook(lambda _, __, output: seen.append(output.logits[:, -1].argmax(-1)))
    found = run(model, Case("decode", 2, 5, 6), ids)
    assert found["seconds"] > 0
    assert found["first_token"] > 0
    written = torch.stack(seen, dim=1)[:, :6]
    model._forward_hooks.clear()
    model.generation_config.eos_token_id = None
    expected = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[:, 5:]
    assert torch.equal(written, expected)


def test_what_is_multiplied_is_counted_once() -> None:
    untied, tied = TINY_MODELS["llama"](), TINY_MODELS["qwen3"]()
    total = sum(p.numel() for p in untied.parameters())
    assert describe(untied, "x")["multiplied"] == total - untied.get_input_embeddings().weight.numel()
    assert describe(tied, "x")["multiplied"] == sum(p.numel() for p in tied.parameters())


def test_a_basis_that_layers_share_is_multiplied_by_each_of_them() -> None:
    alone, shared = TINY_MODELS["llama"](), TINY_MODELS["llama"]()
    for name in Q:
        put_low_rank(alone, [name], 4)
    put_low_rank(shared, Q, 4)
    assert describe(shared, "x")["parameters"] < describe(alone, "x")["parameters"]
    assert describe(shared, "x")["multiplied"] == describe(alone, "x")["multiplied"]


@pytest.fixture(scope="module")
def benched(folders: tuple[Path, Path]) -> tuple[Bench, int]:
    """Two folders timed, and how many runs were told of."""
    runs = []
    return bench([str(folder) for folder in folders], FEW, lambda: runs.append(1)), len(runs)


def test_two_models_are_timed_in_turns(benched: tuple[Bench, int]) -> None:
    result, runs = benched
    assert runs == 2 * 2 * 3
    low, dense = result.models
    assert low["parameters"] < dense["parameters"]
    assert low["bytes_on_disk"] < dense["bytes_on_disk"]
    for timed, case in zip(result.timed, FEW.cases, strict=True):
        assert timed.case == case
        assert [len(own) for own in timed.seconds] == [2, 2]
        assert all(second > 0 for own in timed.seconds for second in own)
        assert timed.ideal == pytest.approx(dense["multiplied"] / low["multiplied"])
        assert bool(timed.first_token[0]) == (case.kind == "decode")
        assert low["memory"]["peak"] >= low["memory"]["resident"] > 0


@pytest.mark.parametrize("known", [True, False])
def test_memory_in_use_is_that_after_the_first_run_when_weights_have_been_read(
    known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = iter([(50, 60), (70, 90)])

    def told(_: _Worker) -> dict[str, dict[str, int]]:
        return {"memory": dict(zip(("resident", "peak"), next(seen), strict=True)) if known else {}}

    monkeypatch.setattr(_Worker, "_answer", told)
    worker = _Worker.__new__(_Worker)
    worker._ran, worker.about = False, {"memory": {"resident": 10, "peak": 20} if known else {}}
    worker._process = SimpleNamespace(stdin=io.StringIO())
    worker.run(0)
    worker.run(0)
    assert worker.about["memory"] == ({"resident": 50, "peak": 90} if known else {})  # some systems tell none


def test_ratios_are_those_within_pairs() -> None:
    timed = Timed(FEW.cases[0], ((1.0, 2.0, 4.0), (2.0, 3.0, 4.0)), ((), ()), 1.5)
    assert timed.ratios == (2.0, 1.5, 1.0)
    assert timed.tokens_per_second(0) == 8.0


def test_the_command_prints_and_writes(
    folders: tuple[Path, Path], benched: tuple[Bench, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def measured(names: list[str], settings: Settings, on_run: object) -> Bench:
        asked.extend((names, settings.cases, settings.repeats))
        return benched[0]

    monkeypatch.setattr(pared.evaluation.speed, "bench", measured)
    arguments = ["bench", str(folders[0]), "--against", str(folders[1]), "--case", "decode:1x4+3", "--repeats", "1",
                 "--json", str(tmp_path / "bench.json")]  # fmt: skip
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert asked == [[str(folder) for folder in folders], (Case("decode", 1, 4, 3),), 1]
    assert "tokens/s" in result.output
    told = json.loads((tmp_path / "bench.json").read_text())
    assert len(told["timed"][0]["ratios"]) == 2
    assert told["models"][0]["name"] == str(folders[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--case", "prefill:1x500"], "has 128 positions; use a shorter one"),
        (["--preset", "basell"], "unknown preset 'basell'; did you mean 'basel'"),
        (["--repeats", "0"], "0 repeats on 1 threads: expected at least 1 of each"),
        (["--case", "prefill:1x4", "--against", "/nowhere"], "/nowhere"),
        (["--dtype", "float12"], "unknown dtype 'float12'"),
    ],
)
def test_what_cannot_be_timed_is_refused(folders: tuple[Path, Path], arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["bench", str(folders[0]), *arguments])
    assert result.exit_code == 2
    assert message in result.output.replace("\n", " ")


def test_a_process_that_dies_is_told_of(folders: tuple[Path, Path], tmp_path: Path) -> None:
    import shutil

    shutil.copytree(folders[1], tmp_path / "broken")
    file = next((tmp_path / "broken").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ParedError, match="broken"):
        bench([str(tmp_path / "broken")], FEW)
    assert preset("basis-sharing") == PRESETS["basis-sharing"]
