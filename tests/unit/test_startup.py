"""What is told or refused without torch, and what ``import pared`` does to transformers."""

import ast
import importlib
import json
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest
import typer

import pared
from pared.allocation import ALLOCATORS
from pared.allocation.dsa import names, operators
from pared.checkpoint import format
from pared.cli.commands import COMMANDS, LazyCommands
from pared.importing import when_imported
from pared.lazy import deferred
from pared.lowrank import METHODS
from pared.schema import manifest
from pared.schema.recipe import Sampling
from pared.sparsity import METHODS as PRUNING_METHODS
from pared.sparsity import sparsegpt
from pared.training import METHODS as TRAINING_METHODS
from pared.training.early import TRACKERS, require_trackers

SOURCE = Path(pared.__file__).parent
LAZY = sorted(path for path in SOURCE.rglob("__init__.py") if "lazy_package(" in path.read_text(encoding="utf-8"))


def package_of(path: Path) -> str:
    return ".".join(("pared", *path.parent.relative_to(SOURCE).parts))


# Lazy packages.


@pytest.mark.parametrize("path", LAZY, ids=package_of)
def test_a_lazy_package_has_what_type_checkers_are_told(path: Path) -> None:
    package = importlib.import_module(package_of(path))
    tree = ast.parse(path.read_text(encoding="utf-8"))
    (checked,) = (node for node in tree.body if isinstance(node, ast.If))
    told = {
        alias.name: node.module for node in checked.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert package.__dict__["_homes"] == told
    assert set(package.__all__) == set(told)
    assert set(told) <= set(dir(package))
    for name, home in told.items():
        assert getattr(package, name) is getattr(importlib.import_module(str(home)), name)


def test_a_part_of_the_package_was_not_there_until_something_had_imported_it() -> None:
    """Regression: ``import pared; pared.training`` was an AttributeError until the first ``pared.load``."""
    code = "import sys, pared; print(pared.schema.plan.__name__, pared.io.__name__, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "pared.schema.plan pared.io False\n", done.stderr


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    for package, name in ((pared, "compres"), (pared, "cli.main"), (pared.report, "figure")):
        with pytest.raises(AttributeError, match=f"has no attribute '{name}'"):
            getattr(package, name)
    with pytest.raises(AttributeError, match="has no attribute 'compres'"):
        pared.compres  # noqa: B018
    assert not hasattr(pared, "__wrapped__")


def test_every_declaration_names_a_function_there_is() -> None:
    every = [*METHODS.values(), *PRUNING_METHODS.values(), *sum(ALLOCATORS.values(), ()), *TRAINING_METHODS.values()]
    paths = {value.path for entry in every for value in vars(entry).values() if hasattr(value, "path")}
    assert len(paths) > 20
    for path in paths:
        module, _, name = path.partition(":")
        assert callable(getattr(importlib.import_module(module), name)), path


def test_a_deferred_function_is_the_function() -> None:
    join = deferred("os.path:join")
    assert join("a", "b") == str(Path("a", "b"))
    assert join.__name__ == "join"


def test_the_manifest_has_the_version_of_the_format() -> None:
    assert manifest.FORMAT_VERSION == format.FORMAT_VERSION


def test_programs_are_read_by_the_names_that_there_are() -> None:
    assert (tuple(operators.PRE), tuple(operators.REDUCE), tuple(operators.POST)) == (
        names.PRE,
        names.REDUCE,
        names.POST,
    )


def test_declared_defaults_are_those_of_the_mathematics() -> None:
    assert PRUNING_METHODS["sparsegpt"].config.defaults() == {"block": sparsegpt.BLOCK, "damping": sparsegpt.DAMPING}


def test_the_trackers_are_those_of_transformers() -> None:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert set(TRACKERS) == set(INTEGRATION_TO_CALLBACK)


def test_a_tracker_that_is_not_installed_is_told_before_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TRACKERS, "wandb", ("no_such_module", "nor_such_a_module"))
    with pytest.raises(pared.ParedError, match="tracker 'wandb': its package is not installed; pip install no_such_mo"):
        require_trackers(["wandb"])
    monkeypatch.setitem(TRACKERS, "wandb", ("no_such_module", "json"))
    require_trackers(["wandb"])


# Commands.


def test_every_way_to_sample_is_in_the_help() -> None:
    (option,) = (
        one for one in LazyCommands(name="pared").get_command(None, "compress").params if one.name == "sampling"
    )
    assert all(way in str(option.help) for way in get_args(Sampling))


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_of_commands_tells_what_their_own_help_does(name: str) -> None:
    command = LazyCommands(name="pared").get_command(None, name)
    assert command.name == name
    assert (command.help or "").split("\n\n")[0].replace("\n", " ") == COMMANDS[name][1]
    assert isinstance(command, (typer.core.TyperCommand, typer.core.TyperGroup))


WITHOUT_TORCH = """
import sys
from typer.testing import CliRunner
import pared
from pared.cli.commands import app

for words, code, told in {cases!r}:
    result = CliRunner().invoke(app, words)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, (words, result.exit_code, result.output)
    assert told in result.output, (words, told, result.output)
    complaints = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(complaints) <= 1, (words, result.stderr)
    loaded = sorted({{"torch", "transformers", "numpy", "datasets"}} & set(sys.modules))
    assert not loaded, (words, loaded)
"""
COMPRESS = ["compress", "MODEL", "--out", "new"]
ZEROS = [*COMPRESS, "--sparsity", "0.5", "--allocation", "dsa", "--allocation-option"]
CASES: list[tuple[list[str], int, str]] = [
    (["--version"], 0, "pared "),
    (["--help"], 0, "compress"),
    (["methods"], 0, "svd-llm"),
    (["presets"], 0, "basis-sharing-paper"),
    *([([*name.split(), "--help"], 0, "--help") for name in [*COMMANDS, "diagnose rank-groups"]]),
    (["compres"], 2, "Did you mean 'compress'"),
    (["compress", "--metod", "svd"], 2, "--method"),
    (["verify", "no/such/folder"], 2, "no such folder"),
    (["info", "no/such/folder"], 2, "no such folder"),
    (["doctor", "no/such/folder"], 2, "no such folder"),
    (["push", "no/such/folder", "owner/name"], 2, "no such folder"),
    (["push", "no/such/folder", "name"], 2, "owner/name"),
    *(
        [command.split(), 2, told]
        for command, told in {
            "eval ./no --perplexity embedded": "no such folder",
            "eval MODEL --perplexity wikitxt2:test": "did you mean 'wikitext2:test'?",
            "eval MODEL --tasks arc_esy": "did you mean 'arc_easy'?",
            "eval MODEL --perplexity embedded --protocol svdllm": "did you mean 'svd-llm'?",
            "eval MODEL --perplexity embedded --device gpu": "device 'gpu' cannot be used",
            "tune ./no --out new": "no such folder",
            "tune MODEL --out new --method distil": "did you mean 'distill'?",
            "tune MODEL --out new --option tex=0.5": "did you mean 'text'?",
            "tune MODEL --out new --template alpca": "did you mean 'alpaca'?",
            "tune MODEL --out taken": "is there already",
            "tune MODEL --out new --method basel --option importance=fischer": "option importance: expected one of",
            "tune MODEL --out new --option temperature=0": "option temperature: expected more than 0, got 0",
            "tune MODEL --out new --method full --option train=factor": "option train: expected one of factors",
            "tune MODEL --out new --method lora --option order=both": "option order: expected one of together",
            "tune MODEL --out new --method lora --option targets=up": "factor=up",
            "tune MODEL --out new --data instruct:alpca": "did you mean 'alpaca'?",
            "tune MODEL --out new --data instruct:no.jsonl": "file no.jsonl: No such file",
            "tune MODEL --out new --data glue:colaa:train": "did you mean 'cola'?",
            "tune MODEL --out new --data glue:cola:trian": "did you mean 'train'?",
            "tune MODEL --out new --data glue:cola": "did you mean 'glue:cola:train'?",
            "tune MODEL --out new --report-to wandbb": "did you mean 'wandb'?",
            "tune --out new": "no model is named; method distill trains a folder that pared made",
            "tune --out new --method basel": "no model is named; method basel trains a dense model",
            "eval MODEL --perplexity embedded --bos txet": "did you mean 'text'?",
            "eval MODEL --examples glue:colaa:dev": "did you mean 'cola'?",
            "eval MODEL --examples file:no.jsonl": "file no.jsonl: No such file",
            "eval MODEL --fine-tune glue:colaa": "did you mean 'cola'?",
            "eval MODEL --fine-tune glue:cola,cola": "unknown task 'cola' for an encoder",
            "eval MODEL --fine-tune ,": "--fine-tune names no task",
            "eval MODEL --vqa nofile.jsonl": "file of questions nofile.jsonl: No such file",
            "bench ./no": "no such folder",
            "export ./no --out new": "no such folder",
            "convert ./no --out new": "no such folder",
            "search ./no --method wanda --sparsity 0.5 --out new": "no such folder",
            "search MODEL --pruner wanda --sparsity 0.5 --out new": "--pruner is --method now",
            "search MODEL --sparsity 0.5 --out new": "name what to search for",
            "search MODEL --method wand --sparsity 0.5 --out new": "did you mean 'wanda'?",
            "diagnose rank-groups ./no": "no such folder",
            "diagnose rank-groups MODEL --method wanda": "a low-rank method is needed here",
        }.items()
    ),
    # What a recipe alone shows to be wrong, or the disk.
    ([*COMPRESS, "--method", "svd-lm"], 2, "unknown method 'svd-lm'; did you mean 'svd-llm'?"),
    ([*COMPRESS, "--keep", "1.0"], 2, "keep 1 keeps everything"),
    (["plan", "MODEL", "--keep", "1"], 2, "keep 1 keeps everything"),
    ([*COMPRESS, "--keep", "0"], 2, "got 0"),
    ([*COMPRESS, "--keep", "20"], 2, "got 20"),
    ([*COMPRESS, "--pattern", "4:2"], 2, "pattern 4:2 keeps 4 of every 2; did you mean 2:4?"),
    ([*COMPRESS, "--method", "wanda", "--pattern", "0:4"], 2, "pattern 0:4"),
    ([*COMPRESS, "--pattern", "4:4"], 2, "pattern 4:4 keeps everything"),
    ([*COMPRESS, "--sparsity", "0"], 2, "sparsity 0 makes nothing zero"),
    ([*COMPRESS, "--keep", "0.8", "--sparsity", "0.5"], 2, "keep 0.8 and sparsity 0.5 are two budgets; give one"),
    ([*COMPRESS, "--keep", "0.8", "--rank-fraction", "0.3"], 2, "are two budgets; give one"),
    ([*COMPRESS, "--method", "wanda"], 2, "method wanda prunes: name a sparsity"),
    ([*COMPRESS, "--method", "wanda", "--keep", "0.5"], 2, "method wanda does not take keep"),
    ([*COMPRESS, "--method", "svd", "--sparsity", "0.5"], 2, "method svd does not take sparsity"),
    ([*COMPRESS, "--allocation", "los"], 2, "unknown allocation 'los'; did you mean 'loss'?"),
    ([*COMPRESS, "--sparsity", "0.5", "--allocation", "swift"], 2, "unknown allocation of zeros 'swift'"),
    ([*COMPRESS, "--option", "grup_size=2"], 2, "did you mean 'group_size'?"),
    ([*COMPRESS, "--option", "group_size"], 2, "--option 'group_size': expected NAME=VALUE"),
    ([*COMPRESS, "--allocation-option", "foo"], 2, "--allocation-option 'foo': expected NAME=VALUE"),
    ([*COMPRESS, "--option", "group_size=two"], 2, "expected int, got 'two'"),
    ([*COMPRESS, "--option", "loss=sampld"], 2, "got 'sampld'"),
    ([*COMPRESS, "--allocation-option", "program=x"], 2, "allocation loss has no option 'program'"),
    ([*ZEROS, "program=dsa-redme"], 2, "did you mean 'dsa-readme'?"),
    ([*ZEROS, "program=W:(ABS)-(MEEN)-(EXP)-(8)"], 2, "did you mean 'MEAN'?"),
    ([*ZEROS, "program=no.json"], 2, "no.json"),
    ([*COMPRESS, "--device", "cuad"], 2, "did you mean 'cuda'?"),
    ([*COMPRESS, "--dtype", "float31"], 2, "float31"),
    (["compress", "embedded:smollm2-135m"], 2, "no output folder is named"),
    (["compress", "--out", "new"], 2, "no model is named"),
    (["compress", "embedded:smolm2-135m", "--out", "new"], 2, "did you mean 'smollm2-135m'?"),
    (["compress", "./no/such/model", "--out", "new"], 2, "no such folder"),
    (["compress", "no.gguf", "--out", "new"], 2, "no such GGUF file"),
    (["compress", "MODEL", "--out", "taken"], 2, "is there already"),
    ([*COMPRESS, "--method", "svd", "--data", "wikitxt2:train"], 2, "wikitxt2:train"),
    ([*COMPRESS, "--eval", "file:no.txt"], 2, "no.txt"),
    (["compress", "t5", "--out", "new"], 2, "encoder-decoder"),
    (["plan", "t5"], 2, "encoder-decoder"),
    (["compress", "quantised", "--out", "new"], 2, "is quantised (gptq)"),
    (["plan", "small"], 2, "already compressed by pared"),
]


def fresh(script: str, place: Path | None = None) -> None:
    """Run a script in a process that has imported nothing."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=place)
    assert done.returncode == 0, done.stderr


def test_what_needs_no_torch_imports_none(tmp_path: Path) -> None:
    """In one process, as each would take longer to start than all of them to answer."""
    configs: dict[str, dict[str, object]] = {
        "MODEL": {},
        "taken": {},
        "t5": {"is_encoder_decoder": True},
        "quantised": {"quantization_config": {"quant_method": "gptq"}},
        "small": {"quantization_config": {"quant_method": "pared"}},
    }
    for name, fields in configs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "llama", **fields}))
    fresh(WITHOUT_TORCH.format(cases=CASES), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(configs)


INTERRUPTED = """
import os, signal, sys
from pared.cli.main import main

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it starts in the background ignore it

class Signal:
    def find_spec(self, name, *_):
        if name == {module!r}:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.{signal})

sys.meta_path.insert(0, Signal())
sys.argv = ["pared", *{words!r}]
main()
"""


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
@pytest.mark.parametrize(
    ("module", "words", "told"),
    [
        ("typer", ["--version"], "interrupted"),
        ("pared.cli.methods", ["methods"], ""),
        ("torch", ["compress", "MODEL", "--out", "new"], "interrupted"),
    ],
)
def test_a_signal_while_importing_ends_with_its_exit_code_and_no_traceback(
    name: str, code: int, module: str, words: list[str], told: str, tmp_path: Path
) -> None:
    (tmp_path / "MODEL").mkdir()
    (tmp_path / "MODEL" / "config.json").write_text('{"model_type": "llama"}')
    script = INTERRUPTED.format(module=module, words=words, signal=name)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert told in done.stderr


def test_nothing_slow_is_imported_before_signals_are_handled() -> None:
    fresh("import sys, pared.cli.main\nassert not {'typer', 'click', 'rich', 'pydantic', 'yaml'} & set(sys.modules)")


# Registration with transformers; that it works with `pared` imported first is tested with the folders.


@pytest.mark.parametrize("before", ["transformers", "transformers.quantizers"])
def test_transformers_learns_the_format_where_it_is_imported_first(before: str) -> None:
    fresh(
        f"import sys, {before}\n"
        "import pared\n"
        "from transformers import AutoModelForCausalLM\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING\n"
        "assert AUTO_QUANTIZER_MAPPING['pared'].__module__ == 'pared.checkpoint.loader'\n"
        # Here too: a function goes before the submodule that is called as it is, whatever was imported first.
        "import pared.checkpoint.verify, pared.evaluation.perplexity\n"
        "from pared.checkpoint import verify\n"
        "assert callable(verify) and callable(pared.checkpoint.verify) and callable(pared.evaluation.perplexity)\n"
    )


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Name a module that was never imported."""
    name = "imported_in_a_test_only"
    (tmp_path / f"{name}.py").write_text("import time\ntime.sleep(0.05)\nready = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    sys.modules.pop(name, None)


def test_what_waits_for_a_module_runs_once_after_it(module: str) -> None:
    seen: list[bool] = []

    def then(imported: ModuleType) -> None:
        seen.append(imported.ready)

    when_imported(module, then)
    when_imported(module, then)
    assert seen == []
    made = importlib.import_module(module)
    assert seen == [True]
    assert made.__spec__ is not None
    assert type(made.__spec__.loader).__name__ == type(made.__loader__).__name__ == "SourceFileLoader"
    importlib.reload(made)
    assert seen == [True]


def test_what_waits_for_a_module_that_is_there_runs_at_once(module: str) -> None:
    importlib.import_module(module)
    seen: list[str] = []
    when_imported(module, lambda imported: seen.append(imported.__name__))
    assert seen == [module]


def test_what_waits_for_a_module_sees_it_whole_whichever_thread_imports_it(module: str) -> None:
    seen: list[bool] = []
    importer = threading.Thread(target=importlib.import_module, args=(module,))
    importer.start()
    while module not in sys.modules:
        assert importer.is_alive()
    when_imported(module, lambda imported: seen.append(imported.ready))
    importer.join()
    importlib.import_module(module)
    assert seen == [True]


def test_a_failure_of_ours_does_not_break_the_import_of_another_library(module: str) -> None:
    def then(_: ModuleType) -> None:
        raise RuntimeError("ours")

    when_imported(module, then)
    with pytest.warns(UserWarning, match=rf"{module}: pared could not set itself up \(RuntimeError\('ours'\)\)"):
        importlib.import_module(module)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importlib.import_module(module)
