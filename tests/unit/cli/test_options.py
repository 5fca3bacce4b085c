"""One declaration of an option makes the command's option, the key of the file and the row of the documentation."""

import re
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

import pared
from pared import ParedError
from pared.cli.commands import COMMANDS, LazyCommands
from pared.cli.from_schema import Change, Fields, Given, schema_options
from pared.cli.reference import BLOCK, MODELS, renewed
from pared.schema.base import Config
from pared.schema.command_line import declared
from pared.schema.evaluate import EvaluationConfig
from pared.schema.recipe import Recipe, Refinement
from pared.schema.search import SearchConfig
from pared.schema.training import TrainingConfig

FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*[a-z](?![\w])")  # those of papers have an underscore
OF_OTHERS = {
    "install.md": {"--no-deps", "--rm", "--user", "--build-arg"},  # pip, docker
    "tutorial.md": {"--no-deps"},  # pip
    "how-it-works.md": {"--cpu", "--nproc-per-node"},  # launchers
    "format.md": {"--check"},  # sha256sum
    "tune.md": {"--long", "--nproc-per-node"},  # a benchmark, torchrun
    "evaluation.md": {"--new-eval"},  # a paper's code
    "low_rank.md": {"--delta"},  # a paper's code
    "serving.md": {"--load-format", "--model"},  # vLLM
}
DOCS = Path(__file__).parents[3] / "docs"
# Every option of a compression with what the recipe then holds.
GIVEN: dict[str, tuple[str, Any]] = {
    "model": ("a/b", "a/b"),
    "--preset": ("svd-llm-paper", "svd-llm-paper"),
    "--method": ("svd-llm", "svd-llm"),
    "--keep": ("0.7", 0.7),
    "--skip": ("*.0.*", ("*.0.*",)),
    "--blocks": ("vision.layers", "vision.layers"),
    "--allocation": ("uniform", "uniform"),
    "--allocation-option": ("program=x", {"program": "x"}),
    "--storage": ("pivoted", "pivoted"),
    "--statistics": ("once", "once"),
    "--refit": ("off", "off"),
    "--dense-path": ("0.25", 0.25),
    "--refine-epochs": ("3", 3),
    "--refine-lr": ("1e-3", 1e-3),
    "--refine-batch": ("2", 2),
    "--refine-loss": ("plain", "plain"),
    "--option": ("group_size=2", {"group_size": 2}),
    "--calibrate-on": ("chat", "chat"),
    "--data": ("alpaca", "alpaca"),
    "--samples": ("5", 5),
    "--length": ("64", 64),
    "--seed": ("3", 3),
    "--sampling": ("shuffled", "shuffled"),
    "--calibration-dtype": ("float32", "float32"),
    "--eval": ("embedded", "embedded"),
    "--eval-length": ("65", 65),
    "--eval-windows": ("7", 7),
    "--dtype": ("float16", "float16"),
    "--device": ("cuda", "cuda"),
    "--stream": ("on", "on"),
    "--activation-memory": ("2GiB", "2GiB"),
    "--out": ("there", "there"),
    "--structures": ("mixed", "mixed"),
    "--multiple-of": ("32", 32),
    "--heads": ("on", "on"),
    "--quantize": ("int4", "int4"),
    "--rounding": ("nearest", "nearest"),
}
OTHER_BUDGETS = {
    "--keep-bytes",
    "--target-bytes",
    "--rank-fraction",
    "--sparsity",
    "--pattern",
}  # one at a time goes with a recipe
SWITCHES = {"--refine", "--elastic"}  # take no value


def asked(marker: Fields, *words: str) -> Any:
    """Return what a command of these options is given."""
    found: list[Any] = []

    @schema_options
    def command(given: Annotated[Given[Any], marker]) -> None:
        found.append(given.merged())

    app = typer.Typer(add_completion=False)
    app.command()(command)
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return found[0]


def value_of(config: Config, key: str) -> Any:
    found: Any = config
    for part in key.split("."):
        found = getattr(found, part)
    return found


def test_every_option_of_a_recipe_arrives_at_its_field() -> None:
    words = [word for flag, (text, _) in GIVEN.items() for word in ([flag, text] if flag != "model" else [text])]
    recipe = asked(Fields(Recipe), *words)
    options = {one.flag: one.key for one in declared(Recipe) if one.option is not None}
    assert options.keys() == GIVEN.keys() | OTHER_BUDGETS | SWITCHES
    for flag, (_, expected) in GIVEN.items():
        assert value_of(recipe, options[flag]) == expected, flag
    budgets = {"--keep-bytes": "0.3", "--target-bytes": "120MB", "--rank-fraction": "0.3", "--sparsity": "0.5",
               "--pattern": "2:4"}  # fmt: skip
    for flag, text in budgets.items():
        assert str(value_of(asked(Fields(Recipe), flag, text), options[flag])) == text


def test_a_section_that_is_not_there_by_default_is_turned_on_and_off(tmp_path: Path) -> None:
    marker = Fields(Recipe, file="A file.")
    assert asked(marker).refine is None
    assert asked(marker, "--refine").refine == Refinement()
    assert asked(marker, "--refine-epochs", "3").refine == asked(marker, "--refine", "--refine-epochs", "3").refine
    file = tmp_path / "recipe.yaml"
    for said in ("true", "{epochs: 5}"):
        file.write_text(f"refine: {said}\n")
        before = ["--recipe", str(file)]
        epochs = 5 if "5" in said else 2
        assert asked(marker, *before, "--refine").refine == Refinement(epochs=epochs)
        assert asked(marker, *before, "--refine-batch", "1").refine == Refinement(epochs=epochs, batch=1)
        assert asked(marker, *before, "--no-refine").refine is None
    with pytest.raises(ParedError, match=r"--no-refine and an option of refine \(epochs 3\) are given; leave one"):
        asked(marker, "--no-refine", "--refine-epochs", "3")


def test_nothing_given_is_the_default_of_every_field() -> None:
    for model in (Recipe, TrainingConfig, SearchConfig):
        found = asked(Fields(model))
        assert found == model()
        assert found.model_fields_set == set()


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_every_field_says_what_it_means_and_no_flag_is_taken_twice(model: type[Config]) -> None:
    fields = list(declared(model))
    assert [one.key for one in fields if not one.text.endswith(".")] == []
    flags = [one.flag for one in fields if one.option is not None]
    assert len(flags) == len(set(flags))
    assert set(flags) - {"model"} == {flag for flag in flags if flag.startswith("--")}
    for one in fields:
        told = [choice in one.help for choice in one.choices if choice != "auto"]
        assert len(told) < 2 or all(told), one.key


def test_a_flag_that_a_file_sets_can_be_taken_back(tmp_path: Path) -> None:
    file = tmp_path / "tune.yaml"
    file.write_text("gradient_checkpointing: true\nepochs: 2\n")
    marker = Fields(TrainingConfig, file="A file.")
    assert asked(marker, "--recipe", str(file)).gradient_checkpointing
    assert not asked(marker, "--recipe", str(file), "--no-gradient-checkpointing").gradient_checkpointing
    assert asked(marker, "--recipe", str(file), "--tokens", "100").epochs is None  # one length in place of another


def test_a_command_takes_what_it_names_with_its_own_default() -> None:
    marker = Fields(Recipe, ("model", "calibration"), changed={"calibration.samples": Change(value=64)})
    assert [one.key for one, _ in marker.options()][:2] == ["model", "calibration.text"]
    assert asked(marker).calibration.samples == 64
    assert asked(marker, "--samples", "9").calibration.samples == 9
    with pytest.raises(AssertionError, match="No such option"):
        asked(marker, "--keep", "0.5")


def test_a_pair_without_a_value_is_told_with_its_option() -> None:
    with pytest.raises(ParedError, match="--allocation-option 'program': expected NAME=VALUE"):
        asked(Fields(Recipe), "--allocation-option", "program")


@pytest.mark.parametrize("name", ["options.md"])
def test_the_tables_of_options_are_those_that_are_declared(name: str) -> None:
    """Made anew by: python -m pared.cli.reference docs/options.md."""
    page = (DOCS / name).read_text(encoding="utf-8")
    assert {found[1] for found in BLOCK.findall(page)} == set(MODELS)
    assert renewed(page) == page


def test_help_in_python_lists_the_fields() -> None:
    told = pared.Recipe.__doc__ or ""
    assert "Attributes:\n    preset: A protocol by name" in told
    assert all(f"    {name}: " in told for name in Recipe.model_fields)


def test_a_measure_refuses_what_it_does_not_read() -> None:
    """Regression: `pared eval --tasks arc_easy --protocol wanda` left the protocol out without a word."""
    for fields, told in (
        ({"tasks": "arc_easy", "protocol": "wanda"}, "tasks reads no protocol"),
        ({"perplexity": "embedded", "protocol": "wanda", "length": 5}, "perplexity protocol reads no length"),
        ({"perplexity": "embedded", "allow_code_execution": True}, "perplexity reads no allow_code_execution"),
        ({"fine_tune": " , "}, "fine_tune names no task"),
        ({}, "pass one thing to measure: perplexity, examples"),
    ):
        with pytest.raises(ParedError, match=told):
            EvaluationConfig.of(fields)
    assert EvaluationConfig(tasks="gsm8k, mbpp,gsm8k").tasks == ("gsm8k", "mbpp")  # type: ignore[arg-type]


def flags_of(command: Any) -> set[str]:
    inner = [flag for one in getattr(command, "commands", {}).values() for flag in flags_of(one)]
    return {*inner, *(flag for one in command.params for flag in (*one.opts, *one.secondary_opts)), "--help"}


def test_every_option_that_the_pages_name_is_one() -> None:
    known = {flag for name in COMMANDS for flag in flags_of(LazyCommands(name="pared").get_command(None, name))}
    known |= {"--version", "--verbose"}
    pages = [DOCS.parent / "README.md", *(page for page in DOCS.glob("*.md") if page.name != "presets.md")]
    named = {(page.name, flag) for page in pages for flag in FLAG.findall(page.read_text(encoding="utf-8"))}
    assert len(named) > 50
    strange = sorted((page, flag) for page, flag in named if flag not in known | OF_OTHERS.get(page, set()))
    assert not strange, strange


def test_every_choice_is_listed_in_one_form() -> None:
    """Regression: where the text named the choices in passing, they were not listed."""
    choices = [one for one in declared(Recipe) if one.option is not None and len(one.choices) > 1]
    assert {"storage", "statistics", "refit", "calibration.sampling"} <= {one.key for one in choices}
    assert all(" One of " in one.help for one in choices)
