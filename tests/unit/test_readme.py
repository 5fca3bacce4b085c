"""The example of the README, on a tiny model (the slow tier runs it as it stands), links, and what the site has."""

import re
from pathlib import Path
from pydoc_data import topics

import pytest
from tiny_models import TINY_MODELS
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import pared

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def test_the_example_of_the_readme_runs(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    model = TINY_MODELS["llama"]()
    model.config.max_position_embeddings = 1024
    model.save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert "embedded:smollm2-135m" in example
    monkeypatch.setattr(topics, "topics", {f"{number:02}": "w1 w2 w3 w4 w5 w6 w7 " * 250 for number in range(12)})
    monkeypatch.chdir(tmp_path)
    exec(example.replace("embedded:smollm2-135m", str(tmp_path / "tiny")), {"__name__": "__main__"})
    assert "perplexity" in capsys.readouterr().out
    AutoModelForCausalLM.from_pretrained("smaller")


def _anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_to_a_page_and_a_heading(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in _anchors(target), link


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert pages <= set(re.findall(r"\]\(([\w-]+\.md)", index))


def test_the_site_has_every_page() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}
    assert sorted(re.findall(r": ([\w/-]+\.md)$", nav, flags=re.MULTILINE)) == sorted(
        [*pages, "CHANGELOG.md", "CONTRIBUTING.md"]
    )


def test_the_page_of_the_api_has_every_name() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    listed = re.findall(r"^::: (pared[\w.]+)\.(\w+)$", page, flags=re.MULTILINE)
    inherited = {base.__name__ for base in pared.Compressed.__mro__ if base.__module__ == "pared.engine.result"}
    assert sorted(name for _, name in listed) == sorted(inherited | set(pared.__all__) - {"__version__"})
    for module, name in listed:
        source = (ROOT / "src" / module.replace(".", "/")).with_suffix(".py").read_text(encoding="utf-8")
        assert re.search(rf"^(def|class) {name}\b", source, flags=re.MULTILINE), (module, name)
