"""A recipe says what was wrong in it, and comes back from YAML as it went in."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from pared.cli.from_schema import merge
from pared.errors import ParedError
from pared.names import match
from pared.schema.plan import Plan
from pared.schema.presets import Setting
from pared.schema.recipe import Calibration, Evaluation, Recipe
from pared.schema.training import TrainingConfig

FULL = Recipe(
    model="org/name",
    method="svd",
    keep=0.65,
    skip=("*.0.*", "*q_proj"),
    calibration=Calibration(text="file:a b.txt", samples=3, length=17, seed=5, sampling="random-offset", batch=2),
    evaluation=Evaluation(text="c4:validation", length=33, windows=None, bos="window"),
    dtype="bfloat16",
    device="cuda:1",
    out="out dir",
)


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(content: str | bytes) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


@pytest.mark.parametrize("recipe", [Recipe(), FULL, Recipe(evaluation=None)], ids=["default", "full", "no evaluation"])
def test_recipe_survives_yaml(recipe: Recipe, write: Any):
    assert Recipe.load(write(yaml.safe_dump(recipe.model_dump(mode="json")))) == recipe


def test_recipe_survives_json(write: Any):
    assert Recipe.load(write(FULL.model_dump_json())) == FULL
    assert Recipe.model_validate_json(FULL.model_dump_json()) == FULL


def test_short_recipe_gets_the_defaults(write: Any):
    recipe = Recipe.load(write("keep: 0.5\ncalibration: {samples: 2}\n"))
    assert recipe == Recipe(keep=0.5, calibration=Calibration(samples=2))
    assert recipe.calibration.length == 2048


def test_recipe_cannot_be_changed_by_accident():
    with pytest.raises(ParedError, match=r"frozen and keep stays 0\.8; make another"):
        Recipe().keep = 0.5  # type: ignore[misc]
    with pytest.raises(ParedError, match="no 'kep'; did you mean 'keep'"):
        Recipe().kep = 0.5  # type: ignore[attr-defined]


def test_a_copy_is_checked_like_a_recipe():
    recipe = Recipe(keep=0.5).model_copy(update={"method": "svd"})
    assert (recipe.keep, recipe.method, recipe.model_fields_set) == (0.5, "svd", {"keep", "method"})
    with pytest.raises(ParedError, match="unknown key 'kep'; did you mean 'keep'"):
        recipe.model_copy(update={"kep": 0.4})
    with pytest.raises(ParedError, match="got 80"):
        recipe.model_copy(update={"keep": 80})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Recipe(kep=0.5), "unknown key 'kep'; did you mean 'keep'"),
        (lambda: Recipe(calibration={"smaples": 3}), "unknown key 'calibration.smaples'; did you mean 'samples'"),
        (lambda: Calibration(smaples=3), "Calibration: unknown key 'smaples'; did you mean 'samples'"),
        (lambda: Evaluation(windws=3), "Evaluation: unknown key 'windws'; did you mean 'windows'"),
        (lambda: TrainingConfig(mehod="lora"), "did you mean 'method'"),
        (lambda: Plan(kep=0.5), "Plan: "),
        (lambda: Recipe({"method": "svd"}), "takes named fields, such as Recipe(model=...); got {'method': 'svd'}"),
        (lambda: Recipe(skip="*.0.*"), "skip: expected a list of strings, such as ['*.0.*']; got '*.0.*'"),
        (lambda: TrainingConfig(data="embedded"), "data: expected a list of strings, such as ['embedded']"),
        (lambda: Recipe(calibration="c4:train"), "calibration: expected a mapping of its fields (text, samples"),
        (lambda: Recipe(evaluation="c4:train"), "evaluation: expected a mapping of its fields (text, length"),
        (lambda: Recipe(keep=80), "got 80"),
        (lambda: Recipe(method=None), "method: "),
        (lambda: Calibration(samples="8"), "samples: "),
        (lambda: Recipe.of("svd"), "expected a mapping of its fields"),
        (lambda: Recipe.of(None), "expected a mapping of its fields"),
        (lambda: Recipe.load(None), "expected the path of a file, got None"),
    ],
)
def test_what_is_wrong_in_python_is_told_as_on_the_command_line(make: Any, message: str):
    with pytest.raises(ParedError) as error:
        make()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_what_python_calls_otherwise_is_taken():
    recipe = Recipe(
        model=Path("/m"),
        out=Path("o"),
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
        calibration=Calibration(text=Path("a.txt"), samples=np.int64(3)),
    )
    assert (recipe.model, recipe.out, recipe.device, recipe.dtype) == ("/m", "o", "cpu", "bfloat16")
    assert recipe.calibration == Calibration(text="file:a.txt", samples=3)
    assert TrainingConfig(data=(Path("a.txt"), "embedded")).data == ("file:a.txt", "embedded")
    assert Recipe.of(recipe) is recipe


@pytest.mark.parametrize(
    ("fields", "key", "nearest"),
    [
        ({"kep": 0.5}, "kep", "keep"),
        ({"methd": "svd"}, "methd", "method"),
        ({"calibration": {"sampels": 3}}, "calibration.sampels", "samples"),
        ({"calibration": {"sampling_": "consecutive"}}, "calibration.sampling_", "sampling"),
        ({"evaluation": {"windws": 3}}, "evaluation.windws", "windows"),
    ],
)
def test_unknown_key_is_quoted_with_the_nearest_valid_one(fields: dict[str, Any], key: str, nearest: str):
    with pytest.raises(ParedError) as told:
        Recipe.of(fields)
    assert f"unknown key '{key}'; did you mean '{nearest}'?" in str(told.value)
    assert "\n" not in str(told.value)


def test_unknown_key_unlike_any_other_lists_the_valid_ones_of_its_section():
    with pytest.raises(ParedError, match=r"unknown key 'calibration\.xyzzy'; Valid: batch, dtype, length, samples"):
        Recipe.of({"calibration": {"xyzzy": 1}})


@pytest.mark.parametrize("keep", [0, 0.0, -0.2, 1.0001, 20, 80, float("nan"), float("inf"), True])
def test_keep_outside_0_to_1_says_what_keep_means(keep: float):
    with pytest.raises(ParedError, match=r"keep is the fraction that stays, in \(0, 1\], so that 0.8 removes 20%"):
        Recipe.of({"keep": keep})


@pytest.mark.parametrize("keep", ["80%", "20", "-1", None, [0.8]])
def test_keep_that_is_no_fraction_is_refused(keep: object):
    with pytest.raises(ParedError, match=r"keep(:| is the fraction that stays).*got"):
        Recipe.of({"keep": keep})


@pytest.mark.parametrize("keep", [1, 1.0, 1e-9, 0.8])
def test_every_fraction_up_to_1_is_a_keep(keep: float):
    assert Recipe.of({"keep": keep}).keep == keep


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"calibration": {"samples": 0}}, "calibration.samples"),
        ({"calibration": {"length": 1}}, "calibration.length"),
        ({"calibration": {"batch": -1}}, "calibration.batch"),
        ({"calibration": {"sampling": "random"}}, "calibration.sampling"),
        ({"calibration": {"dtype": "int8"}}, "calibration.dtype"),
        ({"calibration": None}, "calibration"),
        ({"evaluation": {"length": 1}}, "evaluation.length"),
        ({"evaluation": {"windows": 0}}, "evaluation.windows"),
        ({"evaluation": {"bos": "always"}}, "evaluation.bos"),
        ({"version": 2}, "version"),
        ({"dtype": "fp16"}, "dtype"),
        ({"skip": "*q_proj"}, "skip"),
    ],
)
def test_value_out_of_range_names_its_key_and_what_was_found(fields: dict[str, Any], where: str):
    with pytest.raises(ParedError) as told:
        Recipe.of(fields)
    assert str(told.value).startswith(f"recipe: {where}: ")
    value = fields[where.split(".")[0]]
    found = value[where.split(".")[1]] if "." in where else value
    assert f"got {found!r}" in str(told.value)


@pytest.mark.parametrize(
    ("content", "found"), [("- keep\n- 0.8\n", "list"), ("", "NoneType"), ("42", "int"), ("keep 0.8", "str")]
)
def test_yaml_that_is_not_a_mapping_is_refused(write: Any, content: str, found: str):
    path = write(content)
    with pytest.raises(ParedError) as told:
        Recipe.load(path)
    assert str(told.value) == f"recipe {path}: expected a mapping of keys, got {found}"


@pytest.mark.parametrize(
    "content",
    ["keep: [0.8", "a: b: c", "\tkeep: 0.8", b"\xff\xfe\xfa", "x: !!python/object/apply:os.getcwd []", "a: \x00"],
    ids=["open bracket", "two colons", "tab", "not UTF-8", "a Python object", "NUL"],
)
def test_broken_yaml_names_the_file_in_one_line(write: Any, content: str | bytes):
    path = write(content)
    with pytest.raises(ParedError) as told:
        Recipe.load(path)
    assert str(told.value).startswith(f"recipe {path}: not readable as YAML: ")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("content", ["out: 2026-02-30", "calibration: {seed: 0x_}"], ids=["date", "number"])
def test_impossible_date_or_number_is_a_recipe_error(write: Any, content: str):
    """YAML takes these for a date and a number, and its loader raised a bare ValueError."""
    path = write(content)
    with pytest.raises(ParedError, match="not readable as YAML"):
        Recipe.load(path)


def test_missing_recipe_names_the_file(tmp_path: Path):
    with pytest.raises(ParedError, match=r"recipe .*nothing\.yaml: No such file"):
        Recipe.load(tmp_path / "nothing.yaml")


def test_folder_is_not_a_recipe(tmp_path: Path):
    with pytest.raises(ParedError, match="Is a directory"):
        Recipe.load(tmp_path)


def test_mistake_in_a_file_names_the_file(write: Any):
    path = write("keep: 80\n")
    with pytest.raises(ParedError) as told:
        Recipe.load(path)
    assert str(told.value).startswith(f"recipe {path}: ")


def test_demo_recipe_of_the_package_is_valid():
    recipe = Recipe.of({"preset": "demo"})
    assert recipe.model == "embedded:smollm2-135m"


def test_options_win_over_the_file_and_the_rest_of_it_stays(write: Any):
    path = write(yaml.safe_dump(FULL.model_dump(mode="json")))
    recipe = merge(Recipe, path, {"keep": 0.9, "calibration.samples": 8, "evaluation.length": 64, "out": Path("else")})
    assert recipe.keep == 0.9
    assert recipe.out == "else"
    assert recipe.calibration == FULL.calibration.model_copy(update={"samples": 8})
    assert recipe.evaluation == FULL.evaluation.model_copy(update={"length": 64})  # type: ignore[union-attr]
    assert recipe.skip == FULL.skip


def test_options_that_were_not_given_change_nothing(write: Any):
    path = write(yaml.safe_dump(FULL.model_dump(mode="json")))
    assert merge(Recipe, path, {"keep": None, "skip": [], "calibration.samples": None, "evaluation.text": None}) == FULL
    assert merge(Recipe, None, {"keep": None, "skip": None}) == Recipe()


def test_options_alone_make_a_recipe():
    recipe = merge(Recipe, None, {"model": "a/b", "skip": ["*q_proj"], "calibration.seed": 0, "keep": 0.5})
    assert recipe == Recipe(model="a/b", skip=("*q_proj",), keep=0.5)


def test_eval_none_measures_nothing(write: Any):
    assert merge(Recipe, None, {"evaluation.text": "none"}).evaluation is None
    assert merge(Recipe, write("evaluation: {length: 99}"), {"evaluation.text": "none"}).evaluation is None


def test_eval_none_with_a_length_is_a_contradiction():
    with pytest.raises(ParedError, match="--eval none measures nothing"):
        merge(Recipe, None, {"evaluation.text": "none", "evaluation.length": 5})


def test_evaluation_option_revives_an_evaluation_that_the_file_switched_off(write: Any):
    path = write("evaluation: null\n")
    assert merge(Recipe, path, {}).evaluation is None
    assert merge(Recipe, path, {"evaluation.text": "alpaca"}).evaluation == Evaluation(text="alpaca")


def test_wrong_option_says_that_it_came_from_the_options(write: Any):
    with pytest.raises(ParedError, match=r"^options: keep is the fraction"):
        merge(Recipe, None, {"keep": 80})
    path = write("keep: 0.8\n")
    with pytest.raises(ParedError, match=r"with options: calibration\.samples: "):
        merge(Recipe, path, {"calibration.samples": 0})


def test_a_percentage_is_offered_as_a_fraction() -> None:
    with pytest.raises(ParedError, match=r"got 80; did you mean 0\.8\?"):
        Recipe.of({"method": "svd", "keep": 80})
    with pytest.raises(ParedError, match=r"got 0$"):
        Recipe.of({"method": "svd", "keep": 0})


def test_a_pattern_that_matches_nothing_is_told_that_the_list_goes_on() -> None:
    names = [f"model.layers.{block}.self_attn.{name}" for block in range(10) for name in ("q_proj", "k_proj")]
    with pytest.raises(ParedError, match=r"did you mean '\*q_proj'\? Sites: model\.layers\.0\..* and 8 more"):
        match(["*.q_prj"], names)


@pytest.mark.parametrize(
    ("kind", "fields", "told"),
    [
        (Recipe, {"pattern": "x"}, "pattern is N:M, such as 2:4: of every M consecutive inputs N stay; got 'x'"),
        (Recipe, {"options": {"a": [1]}}, "options.a: expected a truth value, a finite number or a text; got [1]"),
        (
            Recipe,
            {"calibration": {"samples": 0}},
            "calibration.samples: expected a number greater than or equal to 1; got 0",
        ),
        (Recipe, {"out": ""}, "out: expected the name of a folder; got ''"),
        (Recipe, {"blocks": 1}, "blocks: expected a valid string; got 1"),
        (Setting, {"says": 1}, "expected a value of where, got none"),
        (Setting, {"says": 1, "wher": ""}, "unknown key 'wher'; did you mean 'where'? Valid: says, where"),
    ],
)
def test_what_is_wrong_is_told_in_words_of_ours(kind: Any, fields: dict[str, Any], told: str) -> None:
    """Regression: a regular expression, ``options.a.bool``, and ``Field required`` of a misspelt key."""
    with pytest.raises(ParedError) as error:
        kind(**fields)
    assert str(error.value) == f"{kind.__name__}: {told}"
