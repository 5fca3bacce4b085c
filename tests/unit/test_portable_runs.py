"""What ``make test-portable`` takes for passed already."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location("portable_runs", Path(__file__).parents[1] / "portable.py")
assert SPEC is not None
assert SPEC.loader is not None
portable = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(portable)


def test_what_passed_on_another_processor_or_package_counts_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    known = portable.digest_of(["tests/unit"])
    assert portable.digest_of(["tests/unit"]) == known
    assert portable.digest_of(["tests/real"]) != known
    for place, value in ((portable, "_processor"), (portable.importlib.metadata, "distributions")):
        with monkeypatch.context() as patch:
            patch.setattr(place, value, list)
            assert portable.digest_of(["tests/unit"]) != known, value
    with monkeypatch.context() as patch:
        patch.setattr(sys, "version", "another")
        assert portable.digest_of(["tests/unit"]) != known


@pytest.mark.parametrize("content", ["", "{", "[]", '{"plain-1": 3}', '{"plain-1": {"files": "x"}}', "\\0"])
def test_a_torn_memory_is_an_empty_one(content: str, tmp_path: Path) -> None:
    memory = tmp_path / "passed.json"
    assert portable.remembered(memory, "x") == {}
    memory.write_text(content)
    assert portable.remembered(memory, "x") == {}


def test_what_passed_of_the_same_run_is_remembered(tmp_path: Path) -> None:
    memory = tmp_path / "passed.json"
    memory.write_text(json.dumps({"plain-1": {"ran": "x"}, "plain-2": {"ran": "y"}}))
    assert portable.remembered(memory, "x") == {"plain-1": {"ran": "x"}}
