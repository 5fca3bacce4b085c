"""What every test shares: one thread (unless PARED_TEST_THREADS says more), no network, a cache of its own."""

import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["PARED_CACHE"] = tempfile.mkdtemp(prefix="pared-tests-cache-")
# What float32 models are multiplied in is measured elsewhere; a test must not hang on the units of a processor.
os.environ["PARED_COMPUTE_DTYPE"] = "float32"
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="pared-tests-modules-")

import gc
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import pared

torch.set_num_threads(int(os.environ.setdefault("PARED_TEST_THREADS", "1")))

# The longest files, longest first: they begin before others, so that two workers end at about the same time.
LONGEST = ("test_pipeline.py", "test_distributed.py", "test_recovery.py", "test_basel.py", "test_training.py")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


@pytest.fixture(scope="session", autouse=True)
def _folders_of_the_session() -> Iterator[None]:
    yield
    shutil.rmtree(os.environ["PARED_CACHE"], ignore_errors=True)
    shutil.rmtree(os.environ["HF_MODULES_CACHE"], ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def _collections_leave_out_what_is_imported() -> None:
    """Of torch and transformers there are half a million objects, and every training collects garbage three times."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    """What is written is flushed to the disk for the case of a power cut, which no test makes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of the vocabulary of the tiny models."""
    from tiny_tokenizer import tiny_tokenizer

    return tiny_tokenizer(64)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of 1,000 random words of that tokenizer."""
    words = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(f"w{words.randrange(64)}" for _ in range(1000)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder with a dense model, ``llama``, and a text, ``words.txt``; no output may tell the folder's own name.

    A module that needs more has a ``place`` of its own, which adds to this one.
    """
    from tiny_models import TINY_MODELS

    folder = tmp_path_factory.mktemp("secret-user")
    TINY_MODELS["llama"]().save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")
    (folder / "words.txt").write_text(" ".join(f"w{number % 61 + 3}" for number in range(2000)))
    return folder


@pytest.fixture(scope="session")
def calibration(text_file: Path) -> pared.Calibration:
    """Few, short float32 windows of that text, in batches of uneven size."""
    return pared.Calibration(text=f"file:{text_file}", samples=7, length=16, batch=3, dtype="float32")
