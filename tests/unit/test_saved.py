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
from pared.engine.progress import Silent

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

    recipe = pared.Recipe(keep=0.7, calibration=calibration)
    with pytest.raises(KeyboardInterrupt):
        collect(TINY_MODELS["llama"](), tokenizer, recipe, frozenset({"gram"}), tmp_path / "half", Stopped())
    blocks = list(saved_blocks(tmp_path / "half"))
    assert 0 < len(blocks) < 3
    assert all(own["gram"].value.isfinite().all() for block in blocks for own in block.statistics.values())


def test_a_folder_without_statistics_is_named(tmp_path: Path) -> None:
    with pytest.raises(ParedError, match=r"nothing.* holds no saved statistics"):
        next(saved_blocks(tmp_path / "nothing"))
