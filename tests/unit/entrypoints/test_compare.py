"""Models side by side, and a page on folders: what is recorded is shown, escaped, and nothing is fetched."""

import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, cast

import pytest
from typer.testing import CliRunner

import pared
from pared import ParedError
from pared.cli.commands import app
from pared.schema.explore import Exploration, ExploreConfig, Point
from pared.tables import Table

VOID = {"meta", "br", "hr", "img", "input", "link"}
CHROMIUM = next((found for name in ("chromium", "chromium-browser") if (found := shutil.which(name))), None)


@pytest.fixture(scope="module")
def folders(place: Path) -> list[Path]:
    """Two compressions of a tiny model, with results beside the first."""
    text = f"file:{place / 'words.txt'}"
    shared: dict[str, Any] = {"model": str(place / "llama"), "calibration": {"text": text, "samples": 4, "length": 16},
                              "evaluation": {"text": text, "length": 16, "windows": 2}}  # fmt: skip
    made = []
    for name, fields in (
        ("small", {"method": "svd", "keep": 0.6}),
        ("zeros", {"method": "magnitude", "sparsity": 0.5}),
    ):
        pared.run(pared.Recipe.of({**shared, **fields, "out": str(place / name)}))
        made.append(place / name)
    timed = {"case": {"kind": "decode", "batch": 1, "length": 8, "new": 4}, "tokens_per_second": [120.0, 100.0],
             "ratios": [1.1, 1.2, 1.3], "ideal": 1.5}  # fmt: skip
    (place / "small.bench.json").write_text(json.dumps({"timed": [timed]}))
    (place / "small.eval.json").write_text(
        json.dumps({"tasks": [{"task": "arc <easy>", "metrics": {"accuracy": 0.5}}]})
    )
    return made


@pytest.fixture(scope="module")
def page(folders: list[Path], place: Path) -> str:
    pytest.importorskip("matplotlib")
    point = Point(structure="ranks", keep=0.6, target_parameters=60, model_parameters=160, bytes_on_disk=640, speed=1.2,
                  loss=0.2, perplexity=12.0)  # fmt: skip
    dense = point.model_copy(update={"structure": "dense", "keep": 1.0, "model_parameters": 200, "bytes_on_disk": 800,
                                     "loss": 0.0, "perplexity": 10.0})  # fmt: skip
    explored = Exploration(model="llama", recipe=pared.Recipe(), config=ExploreConfig(), dense=dense, points=(point,))
    (place / "small.explore.json").write_text(explored.model_dump_json())
    out = pared.report(folders, place / "page.html", prompts=["w1 w2 <b>"], new_tokens=3)
    return out.read_text(encoding="utf-8")


def test_what_folders_record_stands_side_by_side(folders: list[Path], place: Path) -> None:
    found = pared.compare([place / "llama", *folders], prompts=[])
    dense, small, zeros = found.models
    manifest = pared.Manifest.read(folders[0])
    assert (dense.made, small.made, zeros.made) == ("dense", "svd keep 0.6", "magnitude sparsity 0.5")
    assert dense.model_parameters == manifest.plan.before.model_parameters
    assert small.model_parameters == manifest.plan.after.model_parameters
    assert small.perplexity == manifest.perplexity_after
    assert small.bytes_on_disk == manifest.bytes_on_disk
    assert small.tasks == {"arc <easy>: accuracy": 0.5}
    assert small.speed == {"decode 1 x 8 + 4": 120.0}
    assert small.faster == {"decode 1 x 8 + 4": (1.2, 1.5)}
    assert not zeros.tasks


def test_every_model_continues_every_prompt(folders: list[Path]) -> None:
    found = pared.compare(folders, prompts=["w1 w2", "w3"], new_tokens=3)
    assert [len(one.generations) for one in found.models] == [2, 2]
    assert "3 tokens, greedily" in found.as_markdown()


def test_markdown_has_one_line_for_every_row() -> None:
    table = Table("title", ("a", "b"), [("x|y", "1\n2")], ["below"])
    assert table.as_markdown() == "**title**\n\n| a | b |\n|---|---:|\n| x\\|y | 1 2 |\n\nbelow"


def test_the_command_writes_markdown_html_and_json(folders: list[Path], tmp_path: Path) -> None:
    words = ["compare", *map(str, folders), "--new-tokens", "0", "--markdown", str(tmp_path / "a.md"), "--html",
             str(tmp_path / "a.html"), "--json", str(tmp_path / "a.json")]  # fmt: skip
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "svd keep 0.6" in (tmp_path / "a.md").read_text(encoding="utf-8")
    assert "arc &lt;easy&gt;" in (tmp_path / "a.html").read_text(encoding="utf-8")
    assert len(json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["models"]) == 2


def test_a_page_has_every_section_and_escapes_what_users_wrote(page: str) -> None:
    for heading in ("Figures", "Quality against size", "Sizes three ways", "What stays, block by block",
                    "Predicted against measured loss", "Speed against ideal", "Generations side by side",
                    "Protocol and provenance"):  # fmt: skip
        assert heading in page
    assert "pared compress" in page
    assert "<b>" not in page.partition("<main")[2]
    assert "arc <easy>" not in page


def test_a_page_needs_no_network_and_no_script(page: str) -> None:
    without_names = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert not re.search(r"https?://|<script|<link|@import|url\((?!#)", without_names)


def test_a_page_is_whole_names_each_anchor_once_and_describes_every_figure(page: str) -> None:
    class Reader(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.open: list[str] = []
            self.ids: list[str] = []
            self.targets: list[str] = []
            self.figures: list[dict[str, str | None]] = []

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            told = dict(attrs)
            self.ids += [told["id"]] if told.get("id") else []
            self.targets += [
                href[1:] for key in ("href", "xlink:href") if (href := told.get(key) or "").startswith("#")
            ]
            self.targets += [told["aria-labelledby"]] if told.get("aria-labelledby") else []
            self.figures += [told] if tag == "svg" else []
            if tag not in VOID:
                self.open.append(tag)

        def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.handle_starttag(tag, attrs)
            if tag not in VOID:
                self.open.pop()

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag

    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    assert len(reader.ids) == len(set(reader.ids))
    assert set(reader.targets) <= set(reader.ids)
    assert len(reader.figures) == 4
    assert all(one.get("role") == "img" and one.get("aria-labelledby") for one in reader.figures)


def test_a_page_is_replaced_only_where_that_is_said(
    page: str, folders: list[Path], place: Path, tmp_path: Path
) -> None:
    with pytest.raises(ParedError, match="overwrite"):
        pared.report(folders, place / "page.html", prompts=[])
    (tmp_path / "notes.html").write_text("my notes")
    with pytest.raises(ParedError, match=r"no \.html file"):
        pared.report(folders, tmp_path / "notes.html", prompts=[], overwrite=True)


def test_a_folder_that_pared_did_not_make_is_refused(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ParedError, match=r"has no pared\.json"):
        pared.report([place / "llama"], tmp_path / "page.html")


# In a browser.

PROBE = """<script>
const shown = (one) => one.getClientRects().length > 0;
const box = (one) => one.getBoundingClientRect();
const numbers = (colour) => (colour.match(/[\\d.]+/g) || []).map(Number);
const over = ([r, g, b, a = 1], under) => [r, g, b].map((one, i) => one * a + under[i] * (1 - a));
const behind = (one) => one === null ? numbers(getComputedStyle(document.body).backgroundColor).slice(0, 3)
  : over(numbers(getComputedStyle(one).backgroundColor), behind(one.parentElement));
const light = (colour) => colour.map((one) => one / 255)
  .map((one) => one <= 0.03928 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4)
  .reduce((sum, one, i) => sum + one * [0.2126, 0.7152, 0.0722][i], 0);
const contrast = (first, second) => {
  const [high, low] = [light(first), light(second)].sort((a, b) => b - a);
  return (high + 0.05) / (low + 0.05);
};
const seen = {width: document.documentElement.scrollWidth, overlaps: [], drawn: [], faint: [], unreachable: []};
for (const figure of document.querySelectorAll("svg")) {
  const words = [...figure.querySelectorAll("text")].filter((one) => one.textContent.trim());
  const marks = [...figure.querySelectorAll("use")].filter((one) => !one.closest("[id*=tick_]"));
  const meet = (a, b) => {
    const [x, y] = [box(a), box(b)];
    const wide = Math.min(x.right, y.right) - Math.max(x.left, y.left);
    const high = Math.min(x.bottom, y.bottom) - Math.max(x.top, y.top);
    if (wide > 1 && high > 1) seen.overlaps.push([a.textContent.trim() || a.outerHTML, b.textContent.trim()]);
  };
  words.forEach((a, i) => words.slice(i + 1).forEach((b) => meet(a, b)));
  marks.filter(shown).forEach((a) => words.forEach((b) => meet(a, b)));
  const frame = box(figure);
  const inside = (one) => box(one).left >= frame.left && box(one).right <= frame.right && box(one).top >= frame.top;
  seen.drawn.push(words.length > 2 && marks.filter((one) => shown(one) && inside(one)).length);
}
for (const one of document.querySelectorAll("body *")) {
  const own = [...one.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
  if (!own || !shown(one) || one.matches("script, title")) continue;
  const style = getComputedStyle(one), colour = one.closest("svg") ? style.fill : style.color;
  const ratio = contrast(numbers(colour).slice(0, 3), behind(one.closest("svg") ? one.closest("figure") : one));
  if (ratio < 4.5) seen.faint.push([one.textContent.slice(0, 30), colour, ratio.toFixed(2)]);
}
for (const one of document.querySelectorAll("a, summary, .wide, pre"))
  if (shown(one) && one.tabIndex < 0) seen.unreachable.push(one.outerHTML.slice(0, 60));
parent.postMessage(JSON.stringify(seen), "*");
</script>"""
DARK, LIGHT = 0, 1  # a headless Chromium's preferredColorScheme


def opened(page: str, folder: Path, width: int, scheme: int) -> dict[str, Any]:
    """Return what a page looks like in a window: in a frame of the page's width, as no window is less than 500 wide."""
    (folder / "page.html").write_text(page.replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    (folder / "frame.html").write_text(
        "<title></title><script>onmessage = (told) => { document.title = told.data }</script>"
        f"<iframe src=page.html width={width} height=900 style='border: 0'></iframe>"
    )
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,1000",
               "--allow-file-access-from-files", f"--blink-settings=preferredColorScheme={scheme}",
               "--virtual-time-budget=5000", "--dump-dom", (folder / "frame.html").as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert found is not None
    return cast(dict[str, Any], json.loads(unescape(found[1])))


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, which opens the page (apt install chromium)")
@pytest.mark.parametrize("scheme", [DARK, LIGHT])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_page_can_be_read_on_every_screen(page: str, width: int, scheme: int, tmp_path: Path) -> None:
    seen = opened(page, tmp_path, width, scheme)
    assert seen["width"] <= width
    assert seen["overlaps"] == []
    assert seen["faint"] == []
    assert seen["unreachable"] == []
    assert len(seen["drawn"]) == 4
    assert all(seen["drawn"]), "a figure without a point in it"


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, which opens the page (apt install chromium)")
def test_a_page_is_printed(page: str, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    printed = tmp_path / "page.pdf"
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--print-to-pdf={printed}",
               (tmp_path / "page.html").as_uri()]  # fmt: skip
    subprocess.run(command, capture_output=True, timeout=120, check=True)
    assert printed.read_bytes().startswith(b"%PDF")
    assert printed.stat().st_size > 20_000
