"""Of which models no folder of every size is made."""

import pytest

from pared import ParedError
from pared.engine.checks.elastic import require_elastic


@pytest.mark.parametrize(
    ("opened", "streamed", "processes", "message"),
    [
        (("mlp.experts",), False, 1, r"does not cut experts of mixtures, .* \(skip=\*experts\*\)"),
        ((), True, 1, r"got a model that is read block by block; .* \(stream=off\)"),
        ((), False, 2, "is made by one process, got 2"),
    ],
)
def test_each_is_refused_with_what_to_do(opened: tuple[str, ...], streamed: bool, processes: int, message: str) -> None:
    with pytest.raises(ParedError, match=message):
        require_elastic(opened, streamed, processes)


def test_a_model_in_the_memory_of_one_process_is_not() -> None:
    require_elastic((), False, 1)
