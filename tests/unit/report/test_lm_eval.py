"""Results in the harness's layout are read by the harness."""

from typing import Any

import pytest

from pared.report.lm_eval import in_lm_eval_layout

ROWS = [{"row": 0}]
TASK = {"task": "arc_easy", "metrics": {"acc": 0.5}, "errors": {"acc": 0.1}, "rows": 4, "shots": 2, "answers": ROWS}
GROUP = {
    "task": "mmlu", "metrics": {"acc": 0.25}, "errors": {"acc": 0.0}, "rows": 8, "shots": 0,
    "answers": [{"task": "law", "metrics": {"acc": 0.5}, "errors": {"acc": 0.2}, "by_row": {}}],
}  # fmt: skip
TEXT = {"text": "wikitext2:test", "perplexity": 12.5, "windows": 3, "dtype": "torch.float32"}
FIGURES: dict[str, Any] = {"model": "a/b", "dtype": "torch.float32", "limit": None, "tasks": [TASK, GROUP]}


def test_every_figure_is_where_the_harness_has_it() -> None:
    found = in_lm_eval_layout({**FIGURES, "perplexity": 12.5, "perplexity_on": TEXT})
    assert found["results"]["arc_easy"] == {"sample_len": 4, "acc,none": 0.5, "acc_stderr,none": 0.1}
    assert found["results"]["law"]["acc,none"] == 0.5
    assert found["groups"]["mmlu"]["acc,none"] == 0.25
    assert found["group_subtasks"]["mmlu"] == ["law"]
    assert found["results"]["wikitext2:test"]["perplexity,none"] == 12.5
    assert found["higher_is_better"]["wikitext2:test"] == {"perplexity": False}
    assert found["n-shot"] == {"arc_easy": 2, "mmlu": 0}
    assert found["model_name_sanitized"] == "a__b"
    assert in_lm_eval_layout({"model": "m", **TEXT})["results"].keys() == {"wikitext2:test"}


def test_the_harness_knows_every_key_and_makes_its_table_of_them() -> None:
    schema, utils = pytest.importorskip("lm_eval.result_schema"), pytest.importorskip("lm_eval.utils")
    found = in_lm_eval_layout({**FIGURES, "perplexity": 12.5, "perplexity_on": TEXT})
    assert set(found) <= set(schema.EvalResults.__annotations__)
    assert set(found["config"]) <= set(schema._EvalConfig.__annotations__)
    table = utils.make_table(found)
    assert "|arc_easy" in table
    assert "12.5" in table
    assert "mmlu" in utils.make_table(found, "groups")
