"""A page on folders that pared made, from what they record and from results that lie beside them."""

import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from pared.arguments import folder_from, name_from
from pared.entrypoints.compare import NEW_TOKENS, PROMPTS, compare, results_beside
from pared.errors import ParedError
from pared.io.files import path_of
from pared.io.output_file import require_free_file, staged_file
from pared.notebook import watcher_of
from pared.progress import Progress
from pared.report.folders import report_page
from pared.report.plots import require_plotting
from pared.schema.explore import Exploration
from pared.schema.manifest import Manifest


def report(
    folders: Sequence[str | Path],
    out: str | Path = "report.html",
    prompts: Sequence[str] = PROMPTS,
    new_tokens: int = NEW_TOKENS,
    overwrite: bool = False,
    progress: Progress | bool | None = None,
    trust_remote_code: bool = False,
    device: str = "auto",
) -> Path:
    """Write one page on folders that pared made: a single file that needs no network.

    It shows quality against size, the three sizes, what stays of every layer, predicted against measured loss of
    explorations, speed against ideal, protocol and provenance, generations side by side, and the commands that make all
    of it again. What is not known is left out: results of ``pared explore --json``, ``pared bench --against --json``
    and ``pared eval --json`` are read where they lie beside a folder and begin with its name and a point.

    Args:
        folders: that pared made.
        out: the file to make.
        prompts: that every causal language model continues; none loads no weight.
        new_tokens: of each.
        overwrite: whether a page that is there may be replaced.
        progress: what reports progress, or whether bars are shown; by default in a notebook only.
        trust_remote_code: whether code that lies beside the weights may run.
        device: where the models run.

    Returns:
        The file.

    Raises:
        ParedError: a folder without a manifest, a file that cannot be written, or matplotlib is not installed.

    Example:
        >>> pared.report(["smaller", "smallest"], "report.html")  # doctest: +SKIP
    """
    function = "pared.report"
    if isinstance(folders, (str, Path)) or not folders:
        raise ParedError(f"{function} takes a list of folders, such as ['smaller']; got {folders!r}")
    names, page = [name_from(one, function) for one in folders], folder_from(out, function)
    require_plotting(function)
    manifests = {name: Manifest.read(path_of(name)) for name in names}
    require_free_file(page, overwrite, _is_page, [path_of(name) for name in names])
    compared = compare(names, prompts, new_tokens, watcher_of(progress, function), trust_remote_code, device)
    titles = dict(zip(names, (one.name for one in compared.models), strict=True))
    command = shlex.join(["pared", "report", *(Path(name).name for name in names), "--out", page.name])
    text = report_page(_named(manifests, titles), compared, _explored(names), command)
    with staged_file(page, overwrite, _is_page) as staged:
        staged.write_text(text, encoding="utf-8")
    return page


def _named(manifests: Mapping[str, Manifest], titles: Mapping[str, str]) -> dict[str, Manifest]:
    return {titles[name]: manifest for name, manifest in manifests.items()}


def _explored(names: Sequence[str]) -> list[Exploration]:
    """Return the explorations that lie beside folders, each once, by the last part of their models' names."""
    found: dict[str, Exploration] = {}
    for name in names:
        for file, fields in results_beside(path_of(name)):
            if "points" in fields:
                one = Exploration.model_validate(fields)
                found[str(file)] = one.model_copy(update={"model": Path(one.model).name})
    return list(found.values())


def _is_page(path: Path) -> bool:
    """Whether a file is a page, which alone may be replaced."""
    with suppress(OSError):
        return path.suffix in (".html", ".htm") and path.read_bytes()[:15].lower() == b"<!doctype html>"
    return False
