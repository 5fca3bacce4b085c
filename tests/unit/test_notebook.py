"""Who watches where nobody was named."""

from typing import Any

import pytest
from tiny_models import TINY_MODELS

import pared
from pared import notebook as watching


class Kernel:
    config = ("IPKernelApp",)


@pytest.mark.parametrize(
    ("progress", "notebook", "bars"),
    [(None, False, False), (None, True, True), (True, False, True), (False, True, False)],
)
def test_bars_are_shown_in_a_notebook_or_where_they_are_asked_for(
    progress: bool | None, notebook: bool, bars: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    class IPython:
        @staticmethod
        def get_ipython() -> Any:
            return Kernel() if notebook else None

    monkeypatch.setitem(watching.sys.modules, "IPython", IPython)  # type: ignore[arg-type]
    pared.compress(TINY_MODELS["llama"](), None, method="svd", keep=0.5, progress=progress)
    written = capsys.readouterr()
    assert ("solve" in written.err) == bars
    assert written.out == ""
