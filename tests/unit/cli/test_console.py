"""What a command says when it cannot go on."""

from collections.abc import Callable

import pytest
import torch

from pared.cli.console import errors


def take_all_memory() -> None:
    torch.empty(2**60, dtype=torch.uint8)  # a RuntimeError, on a CPU


def lack_memory_of_a_device() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 16 GiB")


@pytest.mark.parametrize("work", [take_all_memory, lack_memory_of_a_device])
def test_a_lack_of_memory_is_one_line_that_says_what_is_left_and_what_helps(
    work: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end, errors("finished blocks are kept"):
        work()
    told = capsys.readouterr().err
    assert end.value.code == 2
    assert told.startswith("error: out of memory (")
    assert "; finished blocks are kept; " in told
    assert "--stream on" in told


def test_python_s_own_lack_of_memory_is_told_too(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), errors():
        raise MemoryError
    assert capsys.readouterr().err.startswith("error: out of memory (MemoryError); no partial output is left; ")


def test_an_error_of_the_library_itself_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="shapes"), errors():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
