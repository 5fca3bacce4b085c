"""What installed packages add: found by name, imported when asked for, refused in one line."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from plugin_package import install, installed

from pared.allocation import ALLOCATORS, Allocator, Budget, Evidence, Unit, allocator_of, allocators_for
from pared.errors import ParedError
from pared.lowrank import LowRankMethod
from pared.methods import METHODS, method_of
from pared.plugins import PluginError
from pared.schema.options import NoOptions, Options
from pared.schema.plan import Dense
from pared.sparsity.registry import Wanda
from pared.structure.model import Site

GOOD = """
    import pared.lowrank.registry as registry
    from pared.lowrank import LowRankMethod
    from pared.schema.options import Options


    class Copy(Options):
        '''Options of the method copy.'''


    COPY = LowRankMethod(
        name="copy", paper="none", summary="svd by another name", config=Copy, solve=registry.METHODS["svd"].solve
    )
"""
NAMED = {"pared.methods": {"copy": "good:COPY"}}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose packages are installed; what is written to it before the first look is found."""
    folder = tmp_path / "packages"
    folder.mkdir()
    with installed(folder, monkeypatch):
        yield folder


def test_a_method_of_a_package_is_found_by_its_name_and_imported_when_it_is_asked_for(place: Path) -> None:
    install(place, "good", GOOD, NAMED)
    assert "copy" in METHODS
    assert "good" not in sys.modules
    assert METHODS["svd"].name == "svd"
    assert "good" not in sys.modules
    method = METHODS.find("copy")
    assert method.summary == "svd by another name"
    assert METHODS.package_of("copy") == "good 1.0"
    assert METHODS.package_of("svd") == ""
    assert method_of(method.config()) is method
    assert list(METHODS)[-1] == "copy"


def test_the_type_of_options_selects_the_method() -> None:
    assert method_of(Wanda(variant=True)) is METHODS["wanda"]
    with pytest.raises(ParedError, match="NoOptions holds the options of no method"):
        method_of(NoOptions())


def test_an_unknown_name_offers_those_of_packages_too(place: Path) -> None:
    install(place, "good", GOOD, NAMED)
    with pytest.raises(ParedError, match="unknown method 'copi'; did you mean 'copy'"):
        METHODS.find("copi")


BROKEN = {
    "ends the process when it is imported": ("import sys\nsys.exit(3)", "SystemExit: 3; update or uninstall"),
    "complains in several lines": ("raise RuntimeError('one\\ntwo')", "RuntimeError: one two; update or uninstall"),
    "raises when it is imported": ("import no_such_module_at_all", "ModuleNotFoundError: No module named 'no_such"),
    "has no such object": ("", "AttributeError: module 'broken' has no attribute 'THING'"),
    "is something else": ("THING = 3", "expected a LowRankMethod or a PruningMethod, got 3"),
    "is a class": (
        "import pared.lowrank\nTHING = pared.lowrank.LowRankMethod",
        "got <class ",
    ),
    "has another name": (GOOD + "\n    THING = COPY", "it calls itself 'copy'; the two names must be one"),
    "has the options of another": (
        "import dataclasses, pared.methods\nTHING = dataclasses.replace(pared.methods.METHODS['svd'], name='broken')",
        "its options are those of method svd; give it a type of its own",
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_package_is_told_of_when_it_is_asked_for_and_harms_nothing_else(
    how: str, place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    code, told = BROKEN[how]
    install(place, "broken", code, {"pared.methods": {"broken": "broken:THING"}})
    install(place, "good", GOOD, NAMED)
    with pytest.raises(PluginError, match=r"method 'broken' of broken 1\.0 \(broken:THING\)") as error:
        METHODS.find("broken")
    assert told in str(error.value)
    assert "\n" not in str(error.value)
    with caplog.at_level(logging.WARNING):
        found, again = METHODS.available(), METHODS.available()
    assert "broken" not in found
    assert {"copy", "svd", "wanda"} <= found.keys() == again.keys()
    assert [record.getMessage() for record in caplog.records] == [str(error.value)], "each is logged once"


def test_a_name_that_is_taken_is_refused(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    install(place, "taker", GOOD, {"pared.methods": {"svd": "taker:COPY"}})
    assert METHODS.find("svd").paper == "Eckart and Young, 1936"
    assert "method 'svd' of taker 1.0 is not used: pared has one of that name; rename it" in caplog.text
    install(place, "one", GOOD, {"pared.methods": {"copy": "one:COPY"}})
    install(place, "two", GOOD, {"pared.methods": {"copy": "two:COPY"}})
    METHODS.refresh()
    with pytest.raises(PluginError, match=r"method 'copy' is added by several packages: \w+ 1\.0, \w+ 1\.0; uninstall"):
        METHODS.find("copy")


def test_what_is_registered_by_hand_is_there_until_it_is_taken_away() -> None:
    class Own(Options):
        pass

    own = LowRankMethod(name="own", paper="", summary="", config=Own, solve=METHODS["svd"].solve)  # type: ignore
    with pytest.raises(ParedError, match="method 'svd' is there already"):
        METHODS.register("svd", own)
    with pytest.raises(ParedError, match="method 'mine': it calls itself 'own'"):
        METHODS.register("mine", own)
    METHODS.register("own", own)
    try:
        assert METHODS.find("own") is own
    finally:
        METHODS.unregister("own")
    assert "own" not in METHODS


@pytest.mark.parametrize("name", ["svd", "nothing"])
def test_only_what_was_registered_by_hand_can_be_taken_away(name: str) -> None:
    """Regression: a built-in method was gone for good, and an unknown one a KeyError."""
    with pytest.raises(ParedError, match=f"method '{name}' .*; only what was registered by hand can be taken away"):
        METHODS.unregister(name)
    assert METHODS.find("svd").name == "svd"


def test_a_package_whose_name_is_taken_is_told_of_where_it_is_asked_for_alone(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Regression: every command that opened the registry warned."""
    install(place, "taker", GOOD, {"pared.methods": {"wanda": "taker:COPY"}})
    assert METHODS.find("svd").name == "svd"
    assert "wanda" in METHODS
    assert list(METHODS).count("wanda") == 1
    assert len(METHODS) == len(list(METHODS))
    assert METHODS.package_of("wanda") == ""
    assert not caplog.records
    METHODS.available()
    assert "method 'wanda' of taker 1.0 is not used" in caplog.text


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (None, "allocation odd gives None; expected a mapping from the name of every unit to its decision"),
        (
            {"no": Dense(reason="it is")},
            "allocation odd decides for 'no', which is no unit; expected 1 names, such as a",
        ),
        ({}, "allocation odd decides None for a; expected LowRank or Dense"),
    ],
)
def test_a_rule_that_gives_something_else_is_told_of(given: object, told: str) -> None:
    """Regression: an AttributeError, and decisions for what is not there were dropped."""

    class Odd(Options):
        pass

    units = [Unit((Site("a", 0, "", 4, 4, False, "a", owner="a"),))]
    odd = Allocator("odd", "", frozenset({"low_rank"}), Odd, lambda *_: given)  # type: ignore[arg-type,return-value]
    with pytest.raises(ParedError) as error:
        odd.allocate(units, Budget(keep=0.5), Evidence())
    assert str(error.value) == told


ALLOCATOR = """
    from pared.allocation import Allocator, UnitOptions
    from pared.schema.options import Options


    class Ranks(Options):
        pass


    class Zeros(UnitOptions):
        pass


    def rule(units, budget, evidence, options):
        return {{}}


    BOTH = [
        Allocator("both", "ranks", frozenset({{"low_rank"}}), Ranks, rule),
        Allocator("both", "zeros", frozenset({{"sparse"}}), Zeros, rule),
    ]
    WRONG = Allocator("both", "", frozenset({families}), {config}, rule, frozenset({requires}))
"""


def test_an_allocator_of_a_package_may_serve_both_families_by_one_name(place: Path) -> None:
    code = ALLOCATOR.format(families='["sparse"]', config="Zeros", requires="[]")
    install(place, "spread", code, {"pared.allocators": {"both": "spread:BOTH"}})
    assert allocator_of("both", "low_rank").summary == "ranks"
    assert allocator_of("both", "sparse").summary == "zeros"
    assert {"both", "loss"} <= allocators_for("low_rank").keys()
    assert len(ALLOCATORS["loss"]) == 2


@pytest.mark.parametrize(
    ("families", "config", "requires", "told"),
    [
        ('["dense"]', "Ranks", "[]", r"families \['dense'\]: expected some of low_rank, sparse"),
        ('["sparse"]', "Ranks", "[]", "expected a subclass of pared.allocation.options.UnitOptions as config"),
        ('["low_rank"]', "Ranks", '["costs"]', "requires costs: expected some of cost, influence, trial"),
    ],
)
def test_an_allocator_that_does_not_fit_is_refused(
    families: str, config: str, requires: str, told: str, place: Path
) -> None:
    code = ALLOCATOR.format(families=families, config=config, requires=requires)
    install(place, "spread", code, {"pared.allocators": {"both": "spread:WRONG"}})
    with pytest.raises(PluginError, match=told):
        allocator_of("both", "low_rank")


def test_help_and_the_list_of_methods_stand_a_broken_package(tmp_path: Path) -> None:
    named = {"pared.methods": {"broken": "broken:X"}, "pared.allocators": {"spread": "broken:X"}}
    place = install(tmp_path / "p", "broken", "raise OSError('no')", named)
    install(place, "good", GOOD, NAMED)
    env = {**os.environ, "COLUMNS": "400", "PYTHONPATH": os.pathsep.join([str(place), *sys.path])}
    for words in (["--help"], ["compress", "--help"], ["methods"]):
        done = subprocess.run([sys.executable, "-m", "pared.cli.main", *words], capture_output=True, text=True, env=env,
                              check=False)  # fmt: skip
        assert done.returncode == 0, done.stderr
        if words != ["methods"]:
            assert done.stderr == ""
    assert "svd by another name (added by good 1.0)" in done.stdout
    complaints = done.stderr.splitlines()
    told = [line.removeprefix("note: ").partition(" of broken")[0] for line in complaints]
    assert told == ["method 'broken'", "allocation 'spread'"]
    assert all("cannot be imported: OSError: no" in line for line in complaints)
