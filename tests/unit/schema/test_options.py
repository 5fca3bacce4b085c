"""Typed options: what is taken and refused, for every method and allocator, and what is told."""

import subprocess
import sys
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, field_validator

from pared.allocation import ALLOCATORS, Allocator
from pared.allocation.options import Owl
from pared.arguments import recipe_from
from pared.engine import resolve
from pared.errors import ParedError
from pared.lowrank.registry import BasisSharing, LossOptimal, LowRankMethod
from pared.methods import METHODS
from pared.schema.evaluate import EvaluationConfig
from pared.schema.options import Options, read_options
from pared.schema.recipe import Recipe
from pared.schema.training import TrainingConfig
from pared.sparsity.registry import PruningMethod, SparseGpt, Wanda
from pared.training import METHODS as TRAININGS
from pared.training import TuningMethod
from pared.training.options import Lora


class Some(Options):
    whole: Annotated[int, Field(ge=1, description="1 or more things")] = 1
    real: Annotated[float, Field(description="any number")] = 0.5
    kind: Literal["left", "right"] = "left"
    flag: bool = False
    word: str = "x"

    @field_validator("word")
    @classmethod
    def _no_blank(cls, value: str) -> str:
        if " " in value:
            raise ValueError(f"one word, got {value!r}")
        return value


CONFIGS = {
    **{f"training method {name}": method.config for name, method in TRAININGS.items()},
    **{f"method {name}": method.config for name, method in METHODS.items()},
    **{
        f"{'/'.join(one.families)} allocation {one.name}": one.config
        for several in ALLOCATORS.values()
        for one in several
    },
}


@pytest.mark.parametrize("owner", CONFIGS)
def test_every_option_has_a_default_that_is_taken_and_is_told_of(owner: str) -> None:
    config = CONFIGS[owner]
    made = read_options(config, {}, owner)
    assert made.model_dump() == config.defaults()
    assert read_options(config, config.defaults(), owner) == made
    for name, field in config.model_fields.items():
        assert type(field.default) in (bool, int, float, str), name
        assert field.description, name


def test_no_two_methods_and_no_two_allocators_have_the_same_options() -> None:
    """The type of a config selects what it is for."""
    assert len(set(CONFIGS.values())) == len(CONFIGS)


@pytest.mark.parametrize("owner", CONFIGS)
def test_a_value_of_another_type_is_refused_and_a_whole_number_is_a_number(owner: str) -> None:
    """As before options were typed: what is given is not converted."""
    config = CONFIGS[owner]
    for name, default in config.defaults().items():
        other: dict[type, list[Any]] = {
            bool: [1, 0.0, "true"],
            int: [True, 1.0, "1"],
            float: [True, "0.5"],
            str: [1, True],
        }
        kind = float if default == "auto" else type(default)  # a number, or found by a rule
        for value in other[kind]:
            with pytest.raises(ParedError, match=rf"^{owner}: option {name}: expected .*, got {value!r}$"):
                read_options(config, {name: value}, owner)
        if kind is float:
            whole = int(name in ("temperature", "keep_ratio", "pruning_epochs", "coefficient_rate", "ridge"))
            assert getattr(read_options(config, {name: whole}, owner), name) == whole


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"whole": 0}, "method m: option whole: expected 1 or more things, got 0"),
        ({"whole": "two"}, "method m: option whole: expected int, got 'two'"),
        ({"kind": "lft"}, "method m: option kind: expected one of left, right, got 'lft'"),
        ({"word": "a b"}, "method m: option word: one word, got 'a b'"),
        ({"wohle": 2}, "method m has no option 'wohle'; did you mean 'whole'? Valid: flag, kind, real, whole, word"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(given: dict[str, object], told: str) -> None:
    with pytest.raises(ParedError) as error:
        read_options(Some, given, "method m")
    assert str(error.value) == told


def test_what_has_no_options_says_so() -> None:
    with pytest.raises(ParedError, match=r"^method svd has no option 'alpha'; it has none$"):
        read_options(METHODS["svd"].config, {"alpha": 0.5}, "method svd")


def test_options_are_declared_without_torch_and_built_when_they_are_used() -> None:
    code = (
        "import sys\n"
        "from pared.allocation import ALLOCATORS\n"
        "from pared.methods import METHODS\n"
        "config = METHODS['wanda'].config\n"
        "assert not config.__pydantic_complete__\n"
        "assert config(variant=True).variant and config.__pydantic_complete__\n"
        "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_type_of_options_selects_the_method_and_the_allocation_of_a_recipe() -> None:
    recipe = Recipe(method=Wanda(variant=True), allocation=Owl(width=0.1), sparsity=0.5)
    assert (recipe.method, recipe.options) == ("wanda", {"variant": True})
    assert (recipe.allocation, recipe.allocation_options) == ("owl", {"width": 0.1})
    assert Recipe.of(recipe.model_dump()) == recipe, "plain values, as in a file"
    assert Recipe(method=LossOptimal(), keep=0.7) == Recipe(method="loss-optimal", keep=0.7)
    spec = resolve(recipe)
    assert spec.config == Wanda(variant=True)
    assert spec.allocation_config == Owl(width=0.1)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"method": Some()}, "Some holds the options of no method"),
        ({"method": Wanda(variant=True), "options": {"variant": False}}, "method Wanda brings its options; leave out"),
    ],
)
def test_options_that_select_nothing_or_are_given_twice_are_refused(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(ParedError, match=told):
        Recipe(sparsity=0.5, **fields)


@pytest.mark.parametrize(
    "code",
    [
        "from pared.allocation.options import Owl; pared.Recipe(sparsity=.5, allocation=Owl())",
        "from pared.sparsity.registry import Wanda; pared.Recipe(sparsity=.5, method=Wanda())",
        "from pared.training.options import Lora; pared.TrainingConfig(method=Lora(rank=4))",
    ],
)
def test_typed_options_are_taken_whatever_was_imported_before(code: str) -> None:
    """Regression: those of allocations only after something had imported their registry."""
    done = subprocess.run([sys.executable, "-c", f"import pared; {code}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_type_of_options_selects_the_method_of_a_training() -> None:
    assert TrainingConfig(method=Lora(rank=4)) == TrainingConfig(method="lora", options={"rank": 4})  # type: ignore


@pytest.mark.parametrize(
    ("kind", "fields", "told"),
    [
        (Recipe, {"method": Owl()}, "Owl holds the options of no method; they are those of allocation owl"),
        (Recipe, {"allocation": SparseGpt()}, "SparseGpt holds the options of no allocation; they are those of method"),
        (Recipe, {"method": Lora()}, "Lora holds the options of no method; they are those of training method lora"),
        (TrainingConfig, {"method": Wanda()}, "Wanda holds the options of no training method; they are those of met"),
    ],
)
def test_options_of_something_else_are_refused(kind: Any, fields: dict[str, Any], told: str) -> None:
    """Regression: the name of an allocation stood in the place of a method's."""
    with pytest.raises(ParedError, match=told):
        kind(**fields)
    with pytest.raises(ParedError, match=told):
        kind().model_copy(update=fields)


def test_typed_options_replace_those_that_they_are_laid_over() -> None:
    """Regression: refused as options given twice, beside a recipe and beside a preset."""
    below = Recipe(method="basis-sharing", options={"group_size": 4, "sharing": "all"})
    for made in (
        recipe_from(below, {"method": BasisSharing(group_size=3)}, "f"),
        below.model_copy(update={"method": BasisSharing(group_size=3)}),
    ):
        assert (made.method, made.options) == ("basis-sharing", {"group_size": 3})
    made = Recipe(preset="basis-sharing-paper", method=BasisSharing(group_size=3))  # type: ignore[arg-type]
    assert (made.method, made.options) == ("basis-sharing", {"group_size": 3, "sharing": "paper"})


def test_options_go_with_their_method() -> None:
    """Regression: svd was refused for the options of what it replaced."""
    below = {"method": "basis-sharing", "options": {"group_size": 4}}
    assert recipe_from(Recipe.of(below), {"method": "svd"}, "f").options == {}
    assert recipe_from(Recipe.of(below), {"method": "basis-sharing", "keep": 0.5}, "f").options == {"group_size": 4}


def test_a_method_that_a_budget_implies_goes_with_it() -> None:
    """Regression: it counted as asked for, and pruned to a budget of ranks."""
    assert recipe_from(Recipe(sparsity=0.5), {"keep": 0.8}, "f").method == "loss-optimal"
    assert Recipe(sparsity=0.5).model_copy(update={"keep": 0.8}).method == "loss-optimal"
    assert recipe_from(Recipe(keep=0.8), {"sparsity": 0.5}, "f").method == "sparsegpt"
    assert "method" not in Recipe(sparsity=0.5).model_fields_set


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_number_that_is_none_is_no_option_and_no_setting(value: float) -> None:
    """Regression: taken; an infinite number of epochs was an OverflowError."""
    for owner, config in CONFIGS.items():
        for name, default in config.defaults().items():
            if isinstance(default, float):
                with pytest.raises(ParedError, match=rf"option {name}: expected "):
                    read_options(config, {name: value}, owner)
    for name in ("epochs", "learning_rate", "warmup", "clip", "weight_decay"):
        with pytest.raises(ParedError, match=f"{name}: .*; got {value}"):
            TrainingConfig.of({name: value})
    for name in ("epochs", "learning_rate", "temperature"):
        with pytest.raises(ParedError, match=f"{name}: .*; got {value}"):
            EvaluationConfig.of({"tasks": "arc_easy", name: value})
    with pytest.raises(
        ParedError, match=f"options.power: expected a truth value, a finite number or a text; got {value}"
    ):
        Recipe(options={"power": value})


class Bare(Options):
    needed: int


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (3, "'x': expected a subclass of pared.schema.options.Options as config, got 3"),
        (Bare, "'x': its option needed has no default"),
        (METHODS["svd"].config, "'x': its options are those of method svd; give it a type of its own"),
        (Owl, "'x': its options are those of allocation owl; give it a type of its own"),
    ],
)
def test_what_declares_options_that_cannot_be_its_own_is_refused(config: Any, told: str) -> None:
    """Regression: an AttributeError, or taken, and the options selected another."""
    refused = [
        lambda: LowRankMethod("x", "", "", config, solve=METHODS["svd"].solve),  # type: ignore[arg-type]
        lambda: PruningMethod("x", "", "", config, solve=METHODS["wanda"].solve),  # type: ignore[arg-type]
        lambda: Allocator("x", "", frozenset({"sparse"}), config, lambda *_: {}),
        lambda: TuningMethod("x", "", "", lambda _: (), 1.0, config),
    ]
    for make in refused:
        with pytest.raises(ParedError) as error:
            make()
        assert told in str(error.value)
