"""The tests of a GPU use the tiny models of the unit tests; ``PARED_GPU_DEVICE=cpu`` runs them without one."""

import os

import pytest
import torch

DEVICE = os.environ.get("PARED_GPU_DEVICE", "cuda")
MISSING = "" if torch.device(DEVICE).type != "cuda" or torch.cuda.is_available() else "no CUDA device is there"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in item.keywords and MISSING:
            item.add_marker(pytest.mark.skip(reason=MISSING))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device(DEVICE)
