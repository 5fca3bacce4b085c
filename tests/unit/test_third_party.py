"""A package of somebody else's adds a low-rank method, a pruner and two allocators, and pared's engine knows none."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from plugin_package import install, installed
from tiny_models import TINY_MODELS
from tiny_tokenizer import tiny_tokenizer
from typer.testing import CliRunner

import pared
from pared.cli import console
from pared.cli.commands import app
from pared.lowrank import LowRankMethod
from pared.methods import METHODS
from pared.schema.options import Options
from pared.sparsity import PruningMethod

CODE = """
    from typing import Annotated, Literal

    import torch
    from pydantic import Field

    from pared.allocation import Allocator, UnitOptions
    from pared.lowrank import LowRankMethod, svd
    from pared.lowrank.decomposition import from_input_scale
    from pared.schema.options import Options
    from pared.schema.plan import Sparse
    from pared.sparsity import PruningMethod, RankedWeights


    class Energetic(Options):
        '''Options of energetic-svd.'''

        power: Annotated[float, Field(ge=0, le=1, description="0 to 1, the power of an input's energy")] = 0.5


    def by_energy(weights, statistics, options):
        (W_ON,), (own,) = weights, statistics
        scale_N = own["energy"].double().clamp(min=1e-12) ** (options.power / 2)
        return from_input_scale(W_ON.double(), scale_N)


    ENERGETIC = LowRankMethod(
        name="energetic-svd",
        paper="a test",
        summary="an SVD weighted by the energy of inputs",
        config=Energetic,
        requires=lambda shapes, options: frozenset({"energy"} if options.power else ()),
        solve=lambda weights, statistics, options: (
            by_energy(weights, statistics, options) if options.power else svd.decompose(weights[0])
        ),
        allocation="ramp",
    )


    class Lottery(Options):
        '''Options of lottery.'''

        seed: Annotated[int, Field(ge=0, description="a seed, 0 or more")] = 0
        rivals: Literal["matrix", "row"] = "matrix"


    def draw(weights, statistics, options):
        (W_ON,) = weights
        generator = torch.Generator().manual_seed(options.seed)
        scores_ON = torch.rand(W_ON.shape, generator=generator, dtype=torch.float64)
        return RankedWeights(W_ON, scores_ON, options.rivals)


    LOTTERY = PruningMethod(
        name="lottery", paper="a test", summary="weights drawn by lot go", config=Lottery, solve=draw
    )


    class RampRanks(Options):
        '''Options of ramp for ranks.'''

        slope: Annotated[float, Field(ge=0, lt=1, description="from 0 to below 1")] = 0.2


    def ramp_ranks(units, budget, evidence, options):
        last = max(unit.block for unit in units)
        keeps = {unit.name: budget.keep * (1 - options.slope * unit.block / last) for unit in units}
        return {unit.name: budget.low_rank(max(1, budget.rank(unit, keeps[unit.name]))) for unit in units}


    class RampZeros(UnitOptions):
        '''Options of ramp for zeros.'''

        slope: Annotated[float, Field(ge=0, lt=1, description="from 0 to below 1")] = 0.2


    def ramp_zeros(units, budget, evidence, options):
        assert set(evidence.scores) == {unit.name for unit in units}
        step = options.slope / (len(units) - 1)
        return {unit.name: Sparse(sparsity=budget.sparsity + step * (place - (len(units) - 1) / 2))
                for place, unit in enumerate(units)}


    RAMP = (
        Allocator("ramp", "later blocks keep less", frozenset({"low_rank"}), RampRanks, ramp_ranks),
        Allocator("ramp", "later blocks lose more", frozenset({"sparse"}), RampZeros, ramp_zeros,
                  frozenset({"scores"})),
    )
"""


class Wrong(Options):
    """Options of a method that is none."""


ENTRIES = {
    "pared.methods": {"energetic-svd": "somebodys:ENERGETIC", "lottery": "somebodys:LOTTERY"},
    "pared.allocators": {"ramp": "somebodys:RAMP"},
}


@pytest.fixture(scope="module", autouse=True)
def _package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    place = install(tmp_path_factory.mktemp("site") / "packages", "somebodys", CODE, ENTRIES)
    with pytest.MonkeyPatch.context() as patch, installed(place, patch):
        yield


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense") / "tiny"
    TINY_MODELS["llama"]().save_pretrained(folder)
    tiny_tokenizer(64).save_pretrained(folder)
    return folder


def run(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "400"})


def compress(dense: Path, text: Path, out: Path, *more: object) -> dict[str, Any]:
    data = ("--data", f"file:{text}", "--samples", 4, "--length", 16)
    evaluation = ("--eval", f"file:{text}", "--eval-length", 16, "--eval-windows", 2)
    result = run("compress", dense, *data, *evaluation, "--out", out, *more)
    assert result.exit_code == 0, result.stderr
    assert run("verify", out).exit_code == 0
    return json.loads((out / "pared.json").read_text())


def refused(dense: Path, *more: object) -> str:
    result = run("compress", dense, "--out", "never", *more)
    assert result.exit_code == 2, result.stderr
    (complaint,) = (line for line in result.stderr.splitlines() if line.startswith("error: "))
    return str(complaint)


def test_they_are_listed_with_their_options_and_the_package_that_adds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console.out, "_width", 400)  # the console has that of whoever imported it first
    told = run("methods").stdout
    for line in (
        "an SVD weighted by the energy of inputs (added by somebodys 1.0)",
        "weights drawn by lot go (added by somebodys 1.0)",
        "allocation ramp: later blocks keep less (slope=0.2) (added by somebodys 1.0)",
        "allocation of zeros ramp: later blocks lose more (granularity=block, by_parameters=True, slope=0.2) (added by",
    ):
        assert line in told, told
    assert "power=0.5" in told
    assert "seed=0" in told


def test_one_is_told_of_with_what_its_options_are_for() -> None:
    told = run("methods", "energetic-svd").stdout
    assert "method energetic-svd: an SVD weighted by the energy of inputs (a test) (added by somebodys 1.0)" in told
    assert "0 to 1, the power of an input's energy" in told
    both = run("methods", "ramp").stdout
    assert "allocation ramp: " in both
    assert "allocation of zeros ramp: " in both
    assert "block, site" in both
    result = run("methods", "rampp")
    assert result.exit_code == 2
    assert "unknown method, allocation or training 'rampp'; did you mean 'ramp'?" in result.stderr


@pytest.mark.parametrize(
    ("method", "told"),
    [
        (LowRankMethod("wrong", "", "", Wrong, lambda *_: None), "method wrong gives a NoneType, expected a Decomposi"),
        (PruningMethod("wrong", "", "", Wrong, lambda *_: None), "method wrong gives a NoneType, expected what realiz"),
        (LowRankMethod("wrong", "", "", Wrong, METHODS["svd"].solve, lambda *_: frozenset({"gramm"})),
         "unknown statistic 'gramm'; did you mean 'gram'?"),
    ],
)  # fmt: skip
def test_a_method_that_gives_or_wants_what_is_not_there_is_told_of(method: Any, told: str, tokenizer: Any) -> None:
    METHODS.register("wrong", method)
    budget = {"keep": 0.6} if method.family == "low_rank" else {"sparsity": 0.5}
    try:
        with pytest.raises(pared.ParedError, match=re.escape(told)):
            pared.compress(TINY_MODELS["llama"](), tokenizer, pared.Recipe(method="wrong", **budget))
    finally:
        METHODS.unregister("wrong")


def test_a_low_rank_method_and_its_allocator_compress_a_model(dense: Path, text_file: Path, tmp_path: Path) -> None:
    first = compress(dense, text_file, tmp_path / "a", "--method", "energetic-svd", "--keep", 0.6)
    assert first["settled"]["allocation"] == "ramp"
    assert first["settled"]["slope"] == 0.2
    assert first["calibration"]["windows"] == 4
    ranks = [site["decision"]["rank"] for site in first["plan"]["sites"] if site["kind"] == "gate"]
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[0] > ranks[-1]
    options = ("--option", "power=0", "--allocation-option", "slope=0")
    plain = compress(dense, text_file, tmp_path / "b", "--method", "energetic-svd", "--keep", 0.6, *options)
    svd = compress(dense, text_file, tmp_path / "c", "--method", "svd", "--keep", 0.6)
    assert plain["plan"] == svd["plan"]
    ours, theirs = (pared.load(tmp_path / name).state_dict() for name in "bc")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_pruner_and_its_allocator_prune_a_model(dense: Path, text_file: Path, tmp_path: Path) -> None:
    words = ("--method", "lottery", "--sparsity", 0.5, "--allocation", "ramp", "--allocation-option", "slope=0.4")
    told = compress(dense, text_file, tmp_path / "a", *words, "--option", "seed=3", "--option", "rivals=row")
    sparsities = [site["decision"]["sparsity"] for site in told["plan"]["sites"] if site["kind"] == "gate"]
    assert sparsities[0] == pytest.approx(0.3)
    assert sparsities[-1] == pytest.approx(0.7)
    assert told["recipe"]["options"] == {"seed": 3, "rivals": "row"}
    half = compress(dense, text_file, tmp_path / "b", "--method", "lottery", "--pattern", "2:4")
    assert {site["decision"]["kind"] for site in half["plan"]["sites"]} == {"n_m"}


def test_an_allocator_of_theirs_goes_with_a_method_of_pareds(dense: Path, text_file: Path, tmp_path: Path) -> None:
    told = compress(dense, text_file, tmp_path / "a", "--method", "wanda", "--sparsity", 0.5, "--allocation", "ramp")
    assert told["settled"]["allocation"] == "ramp"
    search = run("plan", dense, "--method", "svd-llm", "--keep", 0.7, "--allocation", "ramp")
    assert search.exit_code == 0, search.stderr


def test_a_pruner_of_theirs_that_ranks_weights_can_be_searched_with(
    dense: Path, text_file: Path, tmp_path: Path
) -> None:
    windows = (
        "--samples 4 --windows 2 --length 16 --final-windows 2 --iterations 4 --population 4 --top 2 --sparsity 0.5"
    )
    data = ("--data", f"file:{text_file}", "--out", tmp_path / "s")
    done = run("search", dense, "--method", "lottery", *windows.split(), *data)
    assert done.exit_code == 0, done.stderr
    found = json.loads((tmp_path / "s" / "FOUND.json").read_text())
    assert found["method"] == "lottery"
    assert found["settings"]["options"] == {"seed": 0, "rivals": "matrix"}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--method energetic-svd --keep 0.6 --option power=2", "option power: expected 0 to 1, the power of"),
        ("--method energetic-svd --keep 0.6 --option pwoer=1", "method energetic-svd has no option 'pwoer'; did you"),
        ("--method lottery --sparsity 0.5 --option rivals=all", "option rivals: expected one of matrix, row, got"),
        ("--method lottery --keep 0.5", "method lottery does not take keep"),
        ("--method lotery --sparsity 0.5", "unknown method 'lotery'; did you mean 'lottery'?"),
        ("--method svd --allocation rmap", "unknown allocation 'rmap'; did you mean 'ramp'?"),
        ("--method svd --allocation ramp --allocation-option slope=1", "option slope: expected from 0 to below 1"),
    ],
)
def test_their_options_are_refused_as_pareds_are(words: str, told: str, dense: Path) -> None:
    assert told in refused(dense, *words.split())
    assert not Path("never").exists()


def test_what_the_page_on_methods_says_works_as_it_stands(
    dense: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL))
    (named,) = re.findall(r'"pared.methods"\]\n(\S+) = "(\S+)"', page)
    entries = {"pared.methods": dict([named]), "pared.allocators": {"tilt": "my_package:TILT"}}
    with installed(install(tmp_path / "packages", "my_package", code, entries), monkeypatch):
        for number, words in enumerate(("--method energy-svd --option power=0.3 --keep 0.8",
                                        "--method wanda --sparsity 0.5 --allocation tilt")):  # fmt: skip
            compress(dense, text_file, tmp_path / str(number), *words.split())


def test_the_engine_names_no_method() -> None:
    """If adding a method touches the engine, the engine is wrong."""
    assert "somebodys" in sys.modules
    source = Path(pared.__file__).parent / "engine"
    names = ("svd-llm", "loss-optimal", "basis-sharing", "fwsvd", "sparsegpt", "magnitude")
    texts = {path.name: path.read_text() for path in source.glob("*.py")}
    assert [(path, name) for path, text in texts.items() for name in names if f'"{name}"' in text] == []
