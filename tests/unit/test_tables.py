"""How results are shown: text and HTML, with nothing in it taken for markup."""

import pytest

from pared.tables import Table


def test_what_is_shown_in_html_is_escaped() -> None:
    html = Table("<a>", ("x", "y"), [("<b>", "&")], ["<script>"]).as_html()
    assert "<a>" not in html
    assert "<script>" not in html
    assert "&lt;b&gt;" in html
    assert "&amp;" in html


def test_the_names_of_rows_are_not_broken_on_a_narrow_terminal() -> None:
    """Regression: q_proj ended as q_pro and j, on a line of its own."""
    name = "model.layers.10.self_attn.q_proj"
    text = Table("", ("site", "decision", "why"), [(name, "rank 317, pivoted", "some words " * 9)], align="l").as_text(
        80
    )
    assert name in text
    assert all(len(line) <= 80 for line in text.split("\n"))


def test_square_brackets_are_no_markup() -> None:
    text = Table("[bold]title", ("x", "y"), [("[red]a", "b")], ["[blue]line"]).as_text()
    assert all(one in text for one in ("[bold]title", "[red]a", "[blue]line"))


def test_the_text_of_a_table_shows_nothing_by_itself_in_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: a notebook showed every result twice, as rich displays what is captured where it finds a kernel."""
    from rich import console, jupyter

    displayed: list[object] = []
    monkeypatch.setattr(console, "_is_jupyter", lambda: True)
    monkeypatch.setattr(jupyter, "display", lambda *shown: displayed.append(shown))
    assert "1 | 2" in Table("title", ("a", "b"), [("1", "2")], ["below"]).as_text().replace("│", "|")
    assert displayed == []
