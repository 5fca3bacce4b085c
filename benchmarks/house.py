"""What the rebuilt house looks like from outside: lines, files, functions, arrows between packages; before and after.

    python benchmarks/house.py --before 8fef189    # counts two commits, renders docs/results/house.md

Static counts of the source alone; nothing is imported or run.
"""

import argparse
import ast
import io
import statistics
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from record import RESULTS, ROOT, provenance, table

PAGE = RESULTS / "house.md"


def source_of(commit: str, folder: Path) -> Path:
    """Unpack the package of a commit."""
    packed = subprocess.run(["git", "archive", commit, "src/pared"], cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(folder, filter="data")
    return folder / "src" / "pared"


def package_of(module: str) -> str:
    """Return the package of a module, or the module where it lies at the root."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "pared"


def counts(source: Path) -> dict[str, Any]:
    """Count what a reader sees of a source tree."""
    files = {path: path.read_text(encoding="utf-8") for path in sorted(source.rglob("*.py"))}
    trees = {path: ast.parse(text) for path, text in files.items()}
    lines = sorted(len(text.splitlines()) for text in files.values())
    arrows, functions, recipes = set[tuple[str, str]](), list[int](), 0
    for path, tree in trees.items():
        own = package_of(".".join(("pared", *path.relative_to(source).with_suffix("").parts)))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pared"):
                names = [node.module] if node.module != "pared" else [f"pared.{alias.name}" for alias in node.names]
                arrows |= {(own, package_of(str(name))) for name in names} - {(own, own)}
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                functions.append((node.end_lineno or node.lineno) - node.lineno + 1)
                given = [one.arg for one in (*node.args.args, *node.args.kwonlyargs)]
                in_engine = "engine" in path.relative_to(source).parts
                recipes += in_engine and "recipe" in given
    both = {(a, b) for a, b in arrows if (b, a) in arrows}
    return {
        "lines": sum(lines),
        "files": len(lines),
        "file, median / p90 / max": f"{statistics.median(lines):.0f} / {lines[int(0.9 * len(lines))]} / {lines[-1]}",
        "files over 300 lines": sum(one > 300 for one in lines),
        "functions over 50 lines": sum(one > 50 for one in functions),
        "functions over 70 lines": sum(one > 70 for one in functions),
        "modules at the root": sum(path.parent == source for path in files),
        "packages": sum(path.is_dir() and (path / "__init__.py").exists() for path in source.iterdir()),
        "arrows between packages": len(arrows),
        "arrows in both directions": len(both) // 2,
        "functions of engine that are given a recipe": recipes,
    }


def main() -> None:
    """Count both commits, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", required=True)
    parser.add_argument("--after", default="HEAD")
    asked = parser.parse_args()
    found = []
    for commit in (asked.before, asked.after):
        with tempfile.TemporaryDirectory() as folder:
            found.append(counts(source_of(commit, Path(folder))))
    before, after = found
    commit = provenance()["commit"]
    rows = [(name, before[name], after[name]) for name in before]
    head = (
        f"# The source, before and after it was rebuilt\n\nMade by `python benchmarks/house.py --before {asked.before}`"
    )
    PAGE.write_text(f"{head} at {commit}.\n\n{table(('', asked.before, commit), rows)}\n", encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
