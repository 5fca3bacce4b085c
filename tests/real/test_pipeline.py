"""The whole pipeline on a real model: what a newcomer types first must hold."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from real_model import MANY, MODEL, ROOT, Corpus, Scale
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

import pared
from pared.data.texts import find_text
from pared.entrypoints.compression.result import Outcome

Dense = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def test_dense_perplexity_equals_an_independent_computation(
    compressed: Outcome, dense: Dense, corpus: Corpus, scale: Scale
) -> None:
    model, tokenizer = dense
    text = find_text(corpus.evaluation, evaluation=True).joined
    tokens = tokenizer(text[:40_000], return_tensors="pt")["input_ids"][0, : 4 * scale.length].view(4, scale.length)
    with torch.no_grad():
        losses = [float(model(row[None], labels=row[None]).loss) for row in tokens]  # transformers' own shift and mean
    assert compressed.manifest.perplexity_before == pytest.approx(math.exp(sum(losses) / 4), rel=1e-4)


def test_svd_llm_keeps_the_language_at_keep_08(compressed: Outcome) -> None:
    before, after = compressed.manifest.perplexity_before, compressed.manifest.perplexity_after
    assert before is not None
    assert after is not None
    assert before < after < 10 * before


@pytest.mark.slow
@pytest.mark.parametrize("scale", [MANY], indirect=True)
def test_the_published_perplexities_are_met(compressed: Outcome, corpus: Corpus) -> None:
    before, after = compressed.manifest.perplexity_before, compressed.manifest.perplexity_after
    if corpus.evaluation == "wikitext2:test":
        assert before == pytest.approx(23.083, abs=0.01)  # by a loop over transformers' logits alone
        assert 60 < after < 140  # few windows: 99.9 where it was written
    else:
        assert 2 < before < 100
        assert before < after < 10 * before


def test_the_three_sizes_are_those_of_the_files(compressed: Outcome) -> None:
    manifest = compressed.manifest
    assert manifest.plan.before.covered_parameters == 106_168_320
    assert 0.79 < manifest.plan.achieved_keep <= 0.8
    assert manifest.plan.shortfall == 0
    assert 0 <= manifest.bytes_on_disk - manifest.plan.after.bytes_on_disk < 200_000  # headers of safetensors
    assert manifest.self_check <= 1e-5


@pytest.mark.slow
def test_plain_svd_destroys_the_model(dense: Dense, corpus: Corpus) -> None:
    _, tokenizer = dense
    model = AutoModelForCausalLM.from_pretrained(pared.models.source.find_model(MODEL).location)
    first_three = pared.Recipe(method="svd", keep=0.8, skip=["*.layers.1?.*", "*.layers.2?.*", "*.layers.[3-9].*"])
    pared.compress(model, tokenizer, first_three)
    assert pared.perplexity(model, tokenizer, corpus.evaluation, length=256, windows=1).value > 5_000


def test_lm_eval_loads_the_folder_and_scores_as_the_model_does(compressed: Outcome, dense: Dense) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(pretrained=str(compressed.folder), device="cpu", batch_size=1, dtype="float32")
    pair = ("The capital of France is", " Paris")
    request = Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0)
    score, _ = harness.loglikelihood([request], disable_tqdm=True)[0]

    _, tokenizer = dense
    model = pared.load(str(compressed.folder))
    context, whole = (tokenizer(part)["input_ids"] for part in (pair[0], "".join(pair)))
    with torch.no_grad():
        logs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    ours = sum(float(logs[i - 1, whole[i]]) for i in range(len(context), len(whole)))
    assert score == pytest.approx(ours, abs=1e-3)


def test_bfloat16_load_is_worth_nearly_the_same(compressed: Outcome, dense: Dense, corpus: Corpus) -> None:
    """On few tokens: a processor without bfloat16 products takes a hundred times as long for them."""
    _, tokenizer = dense
    values = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = pared.load(str(compressed.folder), dtype=str(dtype).removeprefix("torch."))
        assert model.dtype == dtype
        values[dtype] = pared.perplexity(model, tokenizer, corpus.evaluation, length=128, windows=2).value
    assert values[torch.bfloat16] == pytest.approx(values[torch.float32], rel=0.05)


@pytest.mark.slow
def test_the_example_of_the_readme_runs(tmp_path: Path, corpus: Corpus) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert blocks
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}  # other tests have the other core
    done = subprocess.run(
        [sys.executable, "-c", blocks[0]], cwd=tmp_path, env=alone, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "perplexity" in done.stdout.lower()
