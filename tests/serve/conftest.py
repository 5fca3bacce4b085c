"""Engines are installed apart (``make serve-test``); what is not there is skipped, with the reason."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from llama_cpp import ENGINE, Engine


@pytest.fixture(scope="session")
def llama_cpp() -> Iterator[Engine]:
    """llama.cpp, by node-llama-cpp."""
    if shutil.which("node") is None or not (ENGINE / "node_modules" / "node-llama-cpp").is_dir():
        pytest.skip(f"node-llama-cpp is not in {ENGINE}; make serve-test installs it")
    with Engine() as engine:
        yield engine
