"""How results are shown: text and HTML, with nothing in it taken for markup."""

from pared.tables import Table


def test_what_is_shown_in_html_is_escaped() -> None:
    html = Table("<a>", ("x", "y"), [("<b>", "&")], ["<script>"]).as_html()
    assert "<a>" not in html
    assert "<script>" not in html
    assert "&lt;b&gt;" in html
    assert "&amp;" in html


def test_square_brackets_are_no_markup() -> None:
    text = Table("[bold]title", ("x", "y"), [("[red]a", "b")], ["[blue]line"]).as_text()
    assert all(one in text for one in ("[bold]title", "[red]a", "[blue]line"))
