"""The embedded real model, compressed once for the whole tier, on few tokens; on many in the slow tier."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from real_model import FEW, MODEL, Corpus, Scale
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import pared
from pared.entrypoints.compression.result import Outcome
from pared.models.source import find_model


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.real)


@pytest.fixture(scope="module")
def corpus() -> Iterator[Corpus]:
    patch = pytest.MonkeyPatch()
    patch.delenv("PARED_CACHE", raising=False)  # the converted model is kept between runs
    named = os.environ.get("PARED_DATA")
    yield Corpus("wikitext2:train", "wikitext2:test") if named else Corpus("embedded", "embedded")
    patch.undo()


@pytest.fixture(scope="module")
def dense(corpus: Corpus) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    source = find_model(MODEL)
    return source.load(), source.tokenizer()


@pytest.fixture(scope="module")
def scale(request: pytest.FixtureRequest) -> Scale:
    """Few tokens, unless a test asks for the tokens of the published figures."""
    return getattr(request, "param", FEW)


@pytest.fixture(scope="module")
def compressed(corpus: Corpus, scale: Scale, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    recipe = pared.Recipe(
        model=MODEL,
        method="svd-llm",
        keep=0.8,
        calibration=pared.Calibration(text=corpus.calibration, samples=scale.samples, length=scale.length),
        evaluation=pared.Evaluation(text=corpus.evaluation, length=scale.length, windows=4),
        out=str(tmp_path_factory.mktemp("real") / "smol"),
    )
    return pared.run(recipe)
