"""Statistics collected once give what a pass of their own would have given."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tiny_models import TINY_MODELS
from transformers import PreTrainedTokenizerFast

import pared
from pared import ParedError
from pared.calibration import saved_blocks
from pared.engine import collect, compress
from pared.engine.observe import Passes
from pared.progress import Silent
from pared.structure import find_anatomy, probe

TOKENS = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("method", "names"),
    [
        ("svd-llm", {"gram"}),
        ("asvd", {"magnitude", "gram"}),
        ("basis-sharing", {"gram"}),
        ("fwsvd", {"fisher", "gram"}),
        ("loss-optimal", {"mean_gram", "output_gradient_full"}),
    ],
)
def test_saved_statistics_give_what_a_pass_gives(
    method: str, names: set[str], tokenizer: PreTrainedTokenizerFast, calibration: pared.Calibration, tmp_path: Path
) -> None:
    recipe = pared.Recipe(method=method, keep=0.7, calibration=calibration)
    collect(TINY_MODELS["llama"](), tokenizer, recipe, frozenset(names), tmp_path / "statistics")
    logits = []
    for collected in (None, lambda: saved_blocks(tmp_path / "statistics")):
        model = TINY_MODELS["llama"]()
        plan = compress(model, tokenizer, recipe, collected=collected).plan
        with torch.no_grad():
            logits.append((plan, model(input_ids=TOKENS).logits))
    assert logits[0][0] == logits[1][0]
    torch.testing.assert_close(logits[0][1], logits[1][1], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("weighting", "felt"), [("full", 8), ("diagonal", 2), ("scalar", 2)])
def test_a_diagonal_is_felt_on_a_quarter_of_the_windows_and_all_are_read(
    weighting: str, felt: int, tokenizer: PreTrainedTokenizerFast, calibration: pared.Calibration
) -> None:
    model = TINY_MODELS["llama"]()
    asked = calibration.model_copy(update={"samples": 8, "batch": 1})
    recipe = pared.Recipe(method="loss-optimal", options={"output_weighting": weighting}, calibration=asked)
    passes = Passes(model, tokenizer, recipe, Silent())
    anatomy, calls = probe(model, find_anatomy(model))
    windows = passes.windows()
    inputs = passes.capture(anatomy, calls, windows)
    blocks = list(passes.statistics(anatomy, inputs, windows))
    assert len(blocks) == 3
    for own in (own for block in blocks for own in block.statistics.values()):
        assert own["mean_gram"].tokens == 8 * asked.length
        assert own[f"output_gradient_{weighting}"].tokens == felt * asked.length


def test_an_interrupted_pass_leaves_whole_files_only(
    tokenizer: PreTrainedTokenizerFast, calibration: pared.Calibration, tmp_path: Path
) -> None:
    class Stopped(Silent):
        @contextmanager
        def stage(self, name: str, total: int, unit: str) -> Iterator[Callable[[], None]]:  # noqa: ARG002
            steps = itertools.count(1)

            def advance() -> None:
                if next(steps) > total // 2:
                    raise KeyboardInterrupt

            yield advance

    recipe = pared.Recipe(method="svd-llm", keep=0.7, calibration=calibration)
    with pytest.raises(KeyboardInterrupt):
        collect(TINY_MODELS["llama"](), tokenizer, recipe, frozenset({"gram"}), tmp_path / "half", Stopped())
    blocks = list(saved_blocks(tmp_path / "half"))
    assert 0 < len(blocks) < 3
    assert all(own["gram"].value.isfinite().all() for block in blocks for own in block.statistics.values())


def test_a_folder_without_statistics_is_named(tmp_path: Path) -> None:
    with pytest.raises(ParedError, match=r"nothing.* holds no saved statistics"):
        next(saved_blocks(tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("method", "names", "told"),
    [
        ("svd-llm", {"grams"}, "unknown statistic 'grams'; did you mean 'gram'"),
        ("svd-llm", {"fisher"}, "method svd-llm has no option loss.*fwsvd or loss-optimal"),
        ("svd", {"output_gradient_full"}, "method svd has no option loss"),
        ("fwsvd", {"fisher:0"}, "unknown statistic 'fisher:0'"),
        ("fwsvd", {"fisher:two"}, "unknown statistic 'fisher:two'"),
        ("fwsvd", {"gram:2"}, "unknown statistic 'gram:2'"),
        ("fwsvd", {"cross"}, "unknown statistic 'cross'"),
        ("fwsvd", {"fisher", "output_gram"}, "output_gram is of what sites put out; collect it apart"),
        ("svd-llm", set(), "expected a set of names"),
        ("svd-llm", "gram", "expected a set of names, got 'gram'"),
    ],
)
def test_collecting_what_does_not_exist_is_one_error(
    method: str,
    names: set[str] | str,
    told: str,
    tokenizer: PreTrainedTokenizerFast,
    calibration: pared.Calibration,
    tmp_path: Path,
) -> None:
    """Regression: a KeyError."""
    asked = names if isinstance(names, str) else frozenset(names)
    recipe = pared.Recipe(method=method, calibration=calibration)
    with pytest.raises(ParedError, match=told):
        collect(TINY_MODELS["llama"](), tokenizer, recipe, asked, tmp_path)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_statistics_that_were_saved_for_another_method_are_named(
    tokenizer: PreTrainedTokenizerFast, calibration: pared.Calibration, tmp_path: Path
) -> None:
    """Regression: a KeyError."""
    recipe = pared.Recipe(method="svd-llm", keep=0.7, calibration=calibration)
    collect(TINY_MODELS["llama"](), tokenizer, recipe, frozenset({"magnitude"}), tmp_path)
    with pytest.raises(
        ParedError, match="method svd-llm needs the statistic 'output_gram'; those given hold magnitude"
    ):
        compress(TINY_MODELS["llama"](), tokenizer, recipe, collected=lambda: saved_blocks(tmp_path))
