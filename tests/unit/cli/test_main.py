"""What the command line does before anything else."""

import gc
from collections.abc import Callable

import pytest

import pared.cli.main


def test_no_garbage_is_collected_while_libraries_are_imported_and_it_is_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waiting: dict[str, Callable[[object], None]] = {}
    monkeypatch.setattr(pared.cli.main, "when_imported", waiting.__setitem__)
    try:
        pared.cli.main.import_without_collecting()
        assert not gc.isenabled()
        waiting["transformers.modeling_utils"](None)
        assert gc.isenabled()
        assert gc.get_freeze_count() > 0
    finally:
        gc.enable()
        gc.unfreeze()
