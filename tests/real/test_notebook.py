"""The notebook of examples/ runs, and what is committed of it shows what it came to."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "tour.ipynb"


def code_cells() -> list[dict[str, Any]]:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def plain(cell: dict[str, Any]) -> str:
    """Return the code of a cell without what only a notebook understands."""
    return re.sub(
        r"^(\s*)%pip .*", r"\1raise AssertionError('pared is installed')", "".join(cell["source"]), flags=re.M
    )


def test_the_notebook_that_is_committed_was_run_from_top_to_bottom_without_an_error() -> None:
    cells = code_cells()
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    shown = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in shown if output["output_type"] == "error"]
    assert sum("image/png" in output.get("data", {}) for output in shown) == 2
    assert sum("text/html" in output.get("data", {}) for output in shown) >= 4
    assert str(Path.home()) not in json.dumps(shown)


@pytest.mark.slow
def test_every_cell_of_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.delenv("PARED_CACHE")  # the converted model is kept between runs
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    names: dict[str, Any] = {}
    for cell in code_cells():
        exec(compile(plain(cell), "tour.ipynb", "exec"), names)
    assert names["outcome"].manifest.perplexity_after < 2 * names["outcome"].manifest.perplexity_before
    assert names["explored"].points
