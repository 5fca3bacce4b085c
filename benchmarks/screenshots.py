"""Pictures of the report that `pared report` writes, as a browser shows it: docs/screenshots.

    python benchmarks/screenshots.py            # compresses the embedded model three ways, where it is not, and draws
    python benchmarks/screenshots.py --again    # compresses anew

Needs Chromium (apt install chromium) and matplotlib. Folders lie in the user's cache.
"""

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pared
from models import PLACE
from record import ROOT

MODEL = "embedded:smollm2-135m"
CALIBRATION = {"text": "wikitext2:train", "samples": 16, "length": 512}
EVALUATION = {"text": "wikitext2:test", "length": 512, "windows": 4}
FOLDERS: dict[str, dict[str, Any]] = {
    "svd-llm-0.8": {"method": "svd-llm", "keep": 0.8},
    "mixed-0.8": {"method": "loss-optimal", "structures": "mixed", "keep": 0.8,
                  "options": {"output_weighting": "diagonal"}},
    "wanda-0.5": {"method": "wanda", "sparsity": 0.5},
}  # fmt: skip
WIDTHS, SCHEMES = {"wide": 1280, "narrow": 390}, {"dark": 0, "light": 1}
HEIGHT = 1500
PLACE_OF_PICTURES = ROOT / "docs" / "screenshots"


def folders(again: bool) -> list[Path]:
    """Return the folders that the page is on, made where they are not there."""
    made = []
    for name, fields in FOLDERS.items():
        out = PLACE / "screenshots" / name
        if again or not (out / "pared.json").exists():
            recipe = {"model": MODEL, "calibration": CALIBRATION, "evaluation": EVALUATION, "out": str(out), **fields}
            pared.run(pared.Recipe.of(recipe), overwrite=again)
        made.append(out)
    explored = PLACE / "screenshots" / "svd-llm-0.8.explore.json"
    if again or not explored.exists():
        found = pared.explore(
            MODEL, structures=["ranks", "widths", "mixed"], measure=3, calibration=CALIBRATION, evaluation=EVALUATION,
            options={"output_weighting": "diagonal"},
        )  # fmt: skip
        explored.write_text(found.model_dump_json(), encoding="utf-8")
    return made


def photograph(page: Path, to: Path, width: int, scheme: int) -> None:
    """Write what a browser shows of a page, in a frame of a width, as no window is narrower than 500."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        raise SystemExit("no chromium: apt install chromium")
    frame = page.with_name("frame.html")
    frame.write_text(
        "<style>body { margin: 0 } iframe { border: 0; display: block }</style>"
        f"<iframe src={page.name} width={width} height={HEIGHT} scrolling=no></iframe>"
    )
    subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--screenshot={to}",
         f"--window-size={width},{HEIGHT}", "--virtual-time-budget=5000", "--allow-file-access-from-files",
         f"--blink-settings=preferredColorScheme={scheme}", frame.as_uri()],
        check=True, capture_output=True,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="compress anew")
    asked = parser.parse_args()
    made = folders(asked.again)
    PLACE_OF_PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        page = pared.report(made, Path(folder) / "page.html", prompts=["The capital of France is"], new_tokens=24)
        for size, width in WIDTHS.items():
            for name, scheme in SCHEMES.items():
                photograph(page, PLACE_OF_PICTURES / f"report-{size}-{name}.png", width, scheme)


if __name__ == "__main__":
    main()
