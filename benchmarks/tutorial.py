"""How long docs/tutorial.md takes: its blocks run, in order, from a clone in an empty environment.

    python benchmarks/tutorial.py               # clones what is committed, runs everything, renders the page
    python benchmarks/tutorial.py --render      # renders the page only

One JSON line a run. The shell has an empty home and nothing of this environment but the path of its Python and where
pip looks for packages, which are fetched anew.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from grid import signature
from record import RESULTS, ROOT, Line, append, read, table

LINES, PAGE = RESULTS / "tutorial.jsonl", RESULTS / "tutorial.md"
TUTORIAL = ROOT / "docs" / "tutorial.md"
ALLOWED = 600  # seconds
OTHER_WAY = "pip install"  # a block that begins so is for an environment of one's own
HEADING, FENCE = re.compile(r"## (\d+\. .*)"), re.compile(r"```(\w*)")
MARK = "seconds-after"


def sections(text: str) -> dict[str, list[str]]:
    """Return the lines of shell that every numbered section of the page has."""
    found: dict[str, list[str]] = {}
    block: list[str] | None = None
    kind = ""
    for line in text.splitlines():
        if (heading := HEADING.fullmatch(line)) is not None:
            found[heading[1]] = []
        elif block is None and (fence := FENCE.fullmatch(line)) is not None:
            block, kind = [], fence[1]
        elif block is not None and line == "```":
            if kind == "python":
                block = ["python - <<'CODE'", *block, "CODE"]
            if kind in ("", "python") and not block[0].startswith(OTHER_WAY):
                found[list(found)[-1]] += block
            block = None
        elif block is not None:
            block.append(line)
    return found


def run(place: Path) -> Line:
    """Run the page in a folder, and return how long every section took.

    Raises:
        ValueError: a command failed; with the end of what it printed.
    """
    script, wanted = ["set -e", f"cd {place}"], sections(TUTORIAL.read_text(encoding="utf-8"))
    for name, lines in wanted.items():
        script += [*lines, f"echo; echo '{MARK}' $(date +%s.%N) '{name}'"]
    shell = "\n".join(script).replace("git clone URL", f"git clone --quiet {ROOT}")
    (home := place / "home").mkdir()
    path = os.pathsep.join([str(Path(sys.base_prefix) / "bin"), "/usr/local/bin", "/usr/bin", "/bin"])
    start, load = time.time(), os.getloadavg()[0]
    environment = {"HOME": str(home), "PATH": path}
    if (settings := Path("~/.config/pip/pip.conf").expanduser()).is_file():
        environment["PIP_CONFIG_FILE"] = str(settings)
    done = subprocess.run(["bash", "-c", shell], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, check=False)  # fmt: skip
    print(done.stdout)
    if done.returncode:
        raise ValueError(f"a command of {TUTORIAL} failed: {done.stdout[-2000:]}")
    seconds: dict[str, float] = {}
    for stamp, name in re.findall(rf"^{MARK} (\S+) (.*)$", done.stdout, flags=re.M):
        seconds[name] = float(stamp) - start - sum(seconds.values())
    if list(seconds) != list(wanted):
        raise ValueError(f"not every section of {TUTORIAL} was timed: {', '.join(seconds)}")
    return {"seconds": seconds, "cores": os.cpu_count(), "load_before": load}


def render(lines: list[Line]) -> str:
    """Return the page."""
    last = lines[-1]
    rows = [(name, f"{seconds:,.0f}") for name, seconds in last["seconds"].items()]
    total = sum(last["seconds"].values())
    return "\n".join([
        "# The ten minutes, timed",
        "",
        "Made by `python benchmarks/tutorial.py`; raw figures in [tutorial.jsonl](tutorial.jsonl). Do not edit.",
        "",
        "Every command of [ten minutes](../tutorial.md) in order, from `git clone` (of a folder) to the report, on "
        f"{last['cores']} cores in an empty home: {total:,.0f} seconds, "
        f"{'within' if total <= ALLOWED else 'more than'} {ALLOWED}. "
        f"Load average before: {last['load_before']:.1f}.",
        "",
        table(("section", "seconds"), rows),
        "",
        signature([last]),
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--render", action="store_true")
    if not parser.parse_args().render:
        with tempfile.TemporaryDirectory() as place:
            append(LINES, run(Path(place)))
    PAGE.write_text(render(read(LINES)), encoding="utf-8")


if __name__ == "__main__":
    main()
