"""A folder of the cache is made once, whole, whoever needs it."""

import threading
from pathlib import Path

import pytest

from pared import ParedError
from pared.models.twin import made_once


def test_of_several_that_need_a_folder_one_makes_it_and_the_others_wait(tmp_path: Path) -> None:
    place, made, found = tmp_path / "models" / "one", list[Path](), list[Path]()
    begun, may_end = threading.Event(), threading.Event()

    def make(folder: Path) -> None:
        made.append(folder)
        begun.set()
        may_end.wait(10)
        (folder / "config.json").write_text("{}")

    threads = [threading.Thread(target=lambda: found.append(made_once(place, 1, make))) for _ in range(3)]
    threads[0].start()
    assert begun.wait(10)
    for thread in threads[1:]:
        thread.start()
    may_end.set()
    for thread in threads:
        thread.join(10)
    assert len(made) == 1
    assert found == [place] * 3
    assert [path.name for path in tmp_path.rglob("*")] == ["models", "one", "config.json"]


def test_what_fails_to_be_made_leaves_nothing_and_lets_the_next_one_try(tmp_path: Path) -> None:
    place = tmp_path / "models" / "one"

    def fail(folder: Path) -> None:
        (folder / "half").write_text("")
        raise ParedError("no weights")

    with pytest.raises(ParedError, match="no weights"):
        made_once(place, 1, fail)
    assert list((tmp_path / "models").iterdir()) == []
    assert made_once(place, 1, lambda _: None) == place


def test_a_cache_without_room_is_reported_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(ParedError, match=r"not enough disk for .*one: 1,"):
        made_once(tmp_path / "one", 10**15, lambda _: pytest.fail("made"))
