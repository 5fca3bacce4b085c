"""Run the unit tier as other processors would: under three instruction sets, with one thread and with two.

``make test-portable [ARGS="tests/unit/io/test_output_dir.py"]``. What a leg prints goes to ``.portable/LEG.log``. A leg
that fails does not end the others. Called again on the same files, packages and processor, what passed is not run again
(``--again`` does).
``--leg=plain-1`` runs that one alone.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".portable"
# What oneDNN, ATen and MKL each take for the best that the processor has; MKL multiplies most of float32.
INSTRUCTIONS = {
    "plain": {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "machine": {},
}
THREADS = (1, 2)


def main(words: list[str]) -> int:
    again, only = "--again" in words, {word.removeprefix("--leg=") for word in words if word.startswith("--leg=")}
    asked = [word for word in words if word != "--again" and not word.startswith("--leg=")] or ["tests/unit"]
    FOLDER.mkdir(exist_ok=True)
    memory = FOLDER / "passed.json"
    ran = digest_of(asked)
    passed = {} if again else remembered(memory, ran)
    table, failed = [], False
    for name, variables in INSTRUCTIONS.items():
        for threads in THREADS:
            leg = f"{name}-{threads}"
            if only and leg not in only:
                continue
            line = passed.get(leg)
            if line is None:
                print(f"{leg} ...", flush=True)
                line = {"ran": ran, **_run(leg, variables, threads, asked)}
            if line["result"] == "passed":
                passed[leg] = line
                memory.write_text(json.dumps(passed))
            failed |= line["result"] != "passed"
            table.append((name, threads, line))
    print(f"{'instructions':14}{'threads':>8}{'tests':>8}{'failed':>8}{'skipped':>8}{'seconds':>9}  result")
    for name, threads, line in table:
        print(f"{name:14}{threads:8}{line['tests']:8}{line['failed']:8}{line['skipped']:8}{line['seconds']:9.0f}  "
              f"{line['result']}")  # fmt: skip
    return int(failed)


def _run(leg: str, variables: dict[str, str], threads: int, asked: list[str]) -> dict[str, object]:
    """Run one leg."""
    workers = min(4, os.cpu_count() or 1)
    clean = {
        name: value for name, value in os.environ.items() if name not in {*INSTRUCTIONS["plain"], "PYTEST_ADDOPTS"}
    }
    count = str(threads)  # threads that wait by spinning take the processors from those that work
    environment = {**clean, **variables, "PARED_TEST_THREADS": count, "OMP_NUM_THREADS": count,
                   "MKL_NUM_THREADS": count, "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}  # fmt: skip
    told = FOLDER / f"{leg}.xml"
    told.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "--numprocesses", str(workers), "--dist", "loadscope",
               "--no-loadscope-reorder", f"--junitxml={told}", *asked]  # fmt: skip
    started = time.monotonic()
    with (FOLDER / f"{leg}.log").open("w", encoding="utf-8") as log:
        code = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log, check=False).returncode
    counts = ElementTree.parse(told).getroot()[0].attrib if told.exists() else {}
    failed = int(counts.get("failures", 0)) + int(counts.get("errors", 0))
    result = "passed" if code == 0 else f"failed, see {(FOLDER / leg).relative_to(ROOT)}.log"
    return {"tests": int(counts.get("tests", 0)), "failed": failed, "skipped": int(counts.get("skipped", 0)),
            "seconds": time.monotonic() - started, "result": result}  # fmt: skip


def remembered(memory: Path, ran: str) -> dict[str, dict[str, Any]]:
    """Return what passed of the same run by leg; nothing where the file is missing, torn or of another layout."""
    try:
        return {leg: line for leg, line in json.loads(memory.read_text(encoding="utf-8")).items() if line["ran"] == ran}
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return {}


def surroundings() -> list[object]:
    """Return what results may hang on beside the files: Python, every package that is installed, the processor."""
    packages = sorted((one.name, one.version) for one in importlib.metadata.distributions())
    return [sys.version, packages, platform.machine(), _processor()]


def _processor() -> list[str]:
    """Return the model and the instructions of the processor, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return [platform.processor()]
    return sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})


def digest_of(asked: list[str]) -> str:
    """Return a digest of what is run, of all that git tracks or would, and of what it runs on."""
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                            capture_output=True, check=True).stdout  # fmt: skip
    digest = hashlib.sha256(json.dumps([asked, surroundings()]).encode())
    for name in sorted(filter(None, listed.split(b"\0"))):
        path = ROOT / os.fsdecode(name)
        if path.is_file():
            digest.update(name + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
