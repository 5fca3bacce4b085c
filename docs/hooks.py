"""What the site does to pages that are also read in the repository (``mkdocs.yml``)."""

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = ("CHANGELOG.md", "CONTRIBUTING.md")  # of the root, which are pages of the site too
LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!https?://|#|mailto:)([^)\s#]+)(#[^)\s]*)?\)")
CODE = re.compile(r"(^```.*?^```[^\n]*$|`[^`\n]+`(?!\]))", re.DOTALL | re.MULTILINE)
ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):<code>~?([^<]+)</code>")  # of docstrings
DOCTEST = re.compile(r" *(?:<span class=\"c1\">)?# doctest: \+SKIP(?:</span>)?")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie outside of ``docs/``."""
    for name in PAGES:
        files.append(File.generated(config, name, content=(ROOT / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Lead links out of ``docs/`` to the repository, if ``repo_url`` says where it is; else leave their text alone."""
    name = page.file.src_uri
    folder = ROOT if name in PAGES else (DOCS / name).parent

    def led(link: re.Match[str]) -> str:
        text, place, anchor = link[1], link[2], link[3] or ""
        target = Path(os.path.normpath(folder / place))
        if target.is_relative_to(DOCS) and not target.is_dir():
            site = target.relative_to(DOCS)
        elif target.parent == ROOT and target.name in PAGES:
            site = Path(target.name)
        elif config.repo_url:
            kind = "tree" if target.is_dir() else "blob"
            return f"[{text}]({config.repo_url.rstrip('/')}/{kind}/main/{target.relative_to(ROOT).as_posix()}{anchor})"
        else:
            return text
        return f"[{text}]({os.path.relpath(site, Path(name).parent).replace(os.sep, '/')}{anchor})"

    parts = CODE.split(markdown)
    return "".join(part if CODE.fullmatch(part) else LINK.sub(led, part) for part in parts)


def on_page_content(html: str, **_: Any) -> str:
    """Take out of docstrings what is meant for other readers: roles of Sphinx, and what doctest is told."""
    return DOCTEST.sub("", ROLE.sub(r"<code>\1</code>", html))
