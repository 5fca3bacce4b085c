# ruff: noqa: ARG005 - a wrong call need not use what a right one would
"""Python callers who hand over the wrong thing are told in one line, as on the command line."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import cpu_offload, disk_offload, dispatch_model
from tiny_models import TINY_MODELS
from transformers import PreTrainedTokenizerFast

import pared
from pared import ParedError, tune


@pytest.fixture(scope="module")
def model() -> transformers.PreTrainedModel:
    return TINY_MODELS["llama"]()


def on_meta() -> transformers.PreTrainedModel:
    with torch.device("meta"):
        return transformers.LlamaForCausalLM._from_config(TINY_MODELS["llama"]().config)


def quantised() -> transformers.PreTrainedModel:
    model = TINY_MODELS["llama"]()
    model.config.quantization_config = {"quant_method": "gptq"}
    return model


SVD_LLM = pared.Recipe(method="svd-llm", keep=0.6)
WRONG: dict[str, tuple[Any, str]] = {
    "a name": (lambda m, t: ("gpt2", t, SVD_LLM), "model 'gpt2': no such folder"),
    "a path": (lambda m, t: (Path("gpt2"), t, SVD_LLM), "model 'gpt2': no such folder"),
    "none": (lambda m, t: (None, t, SVD_LLM), "takes a loaded model of transformers, got None"),
    "a class": (lambda m, t: (type(m), t, SVD_LLM), "got the class LlamaForCausalLM"),
    "a module": (lambda m, t: (torch.nn.Linear(3, 3), t, SVD_LLM), "got a Linear"),
    "swapped": (lambda m, t: (t, m, SVD_LLM), "model first and its tokenizer second"),
    "on meta": (lambda m, t: (on_meta(), t, pared.Recipe(method="svd")), "meta device"),
    "quantised": (lambda m, t: (quantised(), t, SVD_LLM), r"is quantised \(gptq\)"),
    "no tokenizer": (lambda m, t: (m, None, SVD_LLM), "needs the model's tokenizer to read text, got None"),
    "its name": (lambda m, t: (m, "gpt2", SVD_LLM), r"takes a loaded tokenizer.*pared\.load_tokenizer\('gpt2'\)"),
    "model twice": (lambda m, t: (m, m, SVD_LLM), "needs the model's tokenizer"),
    "a number": (lambda m, t: (m, t, 0.8), "takes a Recipe, got 0.8"),
    "a method": (lambda m, t: (m, t, "svd"), r"takes a Recipe, got 'svd'; such as Recipe\(method='svd'\)"),
    "a misspelt mapping": (lambda m, t: (m, t, {"kep": 0.5}), "unknown key 'kep'; did you mean 'keep'"),
    "a device": (lambda m, t: (m, t, pared.Recipe(method="svd", device="gpu")), "device 'gpu' cannot be used"),
    "progress": (lambda m, t: (m, t, SVD_LLM, print), "takes an object .* as progress"),
    "windows": (lambda m, t: (m, t, SVD_LLM, None, torch.zeros(2, 8)), "windows as .* got a Tensor"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_compress_tells_what_it_was_given(
    wrong: str, model: transformers.PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    arguments, message = WRONG[wrong]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ParedError, match=message):
        pared.compress(*arguments(model, tokenizer))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_offloaded_model_is_refused_with_what_reads_it_and_a_dispatched_one_is_compressed_as_any(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    for offloaded in (
        cpu_offload(TINY_MODELS["llama"](), execution_device=torch.device("cpu")),
        disk_offload(TINY_MODELS["llama"](), str(tmp_path), execution_device=torch.device("cpu")),
    ):
        with pytest.raises(ParedError, match=r"offloaded by device_map.*give the model by name.*stream=on"):
            pared.compress(offloaded, tokenizer, method="svd", keep=0.6)
    plain = TINY_MODELS["llama"]()
    places = {name: "cpu" for name, _ in plain.named_modules() if name.count(".") in (1, 2) or name == "lm_head"}
    text: dict[str, Any] = {"data": ["w3 w4 w5 w6 w7 " * 40], "samples": 2, "length": 16}
    text["calibration"] = pared.Calibration(dtype="float32")
    dispatched = dispatch_model(TINY_MODELS["llama"](), places, main_device="cpu", force_hooks=True)
    for model in (plain, dispatched):
        pared.compress(model, tokenizer, method="svd-llm", keep=0.6, **text)
    one, other = plain.state_dict(), dispatched.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_loaded_model_stays_where_it_is_and_its_manifest_says_where(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a device named a model on one was computed on the CPU, or would be moved to a GPU."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)  # which auto takes, for a model by name
    result = pared.compress(TINY_MODELS["llama"](), tokenizer, method="svd", keep=0.6)
    monkeypatch.undo()
    assert result.recipe.device == "auto"
    assert result.model.device == torch.device("cpu")
    assert result.save(tmp_path / "out").manifest.settled["device"] == "cpu"


def test_a_mapping_is_a_recipe_and_a_data_free_method_needs_no_tokenizer() -> None:
    result = pared.compress(TINY_MODELS["llama"](), None, {"method": "svd", "keep": 0.5})  # type: ignore[arg-type]
    assert result.recipe == pared.Recipe(method="svd", keep=0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, t: pared.run("gpt2"), r"takes a Recipe, got 'gpt2'"),
        (lambda m, t: pared.run({"modl": "x"}), "did you mean 'model'"),
        (lambda m, t: tune({"modl": "x"}), "the tuning of pared.tune: .* did you mean 'model'"),
        (lambda m, t: tune("x"), "no output folder is named"),
        (lambda m, t: tune("x", out="y", methd="lora"), "pared.tune: unknown key 'methd'; did you mean 'method'"),
        (
            lambda m, t: tune(3),
            r"takes a TrainingConfig, got 3; such as TrainingConfig\(model='small', out='trained'\)",
        ),
        (lambda m, t: tune(None), r"pared.tune takes a TrainingConfig, got None; such as TrainingConfig\("),
        (lambda m, t: tune(pared.Recipe()), "takes a TrainingConfig, got a Recipe"),
        (lambda m, t: tune({"model": "x"}, trust_remote_code=True), "no output folder is named"),
        (lambda m, t: pared.plan(None), "pared.plan takes a loaded model of transformers, got None"),
        (lambda m, t: pared.plan("no/such/model"), "no/such/model"),
        (lambda m, t: pared.plan(m, kep=0.5), "pared.plan: unknown key 'kep'; did you mean 'keep'"),
        (lambda m, t: pared.plan(m, keep=1), "keep 1 keeps everything"),
        (lambda m, t: pared.plan(quantised()), r"is quantised \(gptq\)"),
        (lambda m, t: pared.search(m, "out"), "pared.search needs the model's tokenizer"),
        (lambda m, t: pared.search(m, None, t), "pared.search takes the folder to write, .* got None"),
        (lambda m, t: pared.search(m, "out", t, populaton=3), "unknown key 'populaton'; did you mean"),
        (lambda m, t: pared.search(m, "out", t, population=1), "population of a search: expected 2 or more, got 1"),
        (lambda m, t: pared.search(m, "out", t, method="svd-lm"), "did you mean 'svd-llm'"),
        (lambda m, t: pared.export(m, "out"), "pared.export takes a name"),
        (lambda m, t: pared.export("./no", "out"), "no such folder"),
        (lambda m, t: pared.export("./no", None), "pared.export takes the folder to write"),
        (lambda m, t: pared.convert(m, "out"), "pared.convert takes a name"),
        (lambda m, t: pared.convert("./no", "out"), "no: no such folder"),
        (lambda m, t: pared.convert("./no", "out", "yes"), "expected pivoted True or False, got 'yes'"),
        (
            lambda m, t: pared.collect_statistics(m, t, "out", "gram"),
            r"statistics in a list, .* got 'gram'",
        ),
        (lambda m, t: pared.collect_statistics(m, t, "out", ["grm"]), "did you mean 'gram'"),
        (lambda m, t: pared.collect_statistics(m, None, "out", ["gram"]), "needs the model's tokenizer"),
        (lambda m, t: pared.load(None), "pared.load takes a name"),
        (lambda m, t: pared.load(m), "got a LlamaForCausalLM"),
        (lambda m, t: pared.load("embedded:smollm2-135m", 16), "dtype: expected one of auto"),
        (lambda m, t: pared.load_tokenizer(None), "takes a name"),
        (lambda m, t: pared.verify(m), "pared.verify takes a name"),
        (lambda m, t: pared.perplexity("gpt2", t), "got the name 'gpt2'"),
        (lambda m, t: pared.perplexity(m, None), "needs the model's tokenizer"),
        (lambda m, t: pared.perplexity(m, t, None), "text: "),
        (lambda m, t: pared.perplexity(m, t, ["a b", 3]), "pared.perplexity: data, row 1: .* got int"),
        (lambda m, t: pared.perplexity(m, t, []), "pared.perplexity: data has no text"),
        (lambda m, t: pared.evaluate(m, t), "pass one thing to measure"),
        (lambda m, t: pared.evaluate(m, perplexity="embedded"), "pared.evaluate needs the model's tokenizer"),
        (lambda m, t: pared.evaluate(m, t, perplexity="embeded"), "did you mean 'embedded'"),
        (lambda m, t: pared.evaluate(m, t, perplexity="embedded", shots=3), "perplexity reads no shots"),
        (lambda m, t: pared.evaluate(m, t, perplexity="embedded", dtype="bfloat16"), "is loaded as torch.float32"),
        (lambda m, t: pared.evaluate(m, t, fine_tune="glue:cola"), "give the model by name"),
        (lambda m, t: pared.evaluate("./no", perplexity="embedded"), "no such folder"),
        (lambda m, t: pared.perplexity(m, t, length="16"), "length: "),
        (lambda m, t: pared.perplexity(m, t, length=16.5), "length: "),
        (lambda m, t: pared.perplexity(m, t, length=16, windows="all"), "windows: "),
        (lambda m, t: pared.perplexity(m, t, length=16, windows=0), "windows: "),
        (lambda m, t: pared.perplexity(m, t, length=16, bos="yes"), "bos: "),
        (lambda m, t: pared.perplexity(on_meta(), t, length=16, windows=1), "meta device"),
    ],
)
def test_everything_public_tells_what_it_was_given(
    call: Any, message: str, model: transformers.PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ParedError, match=message) as error:
        call(model, tokenizer)
    assert "\n" not in str(error.value)


def test_a_model_in_training_mode_is_compressed_and_trains_on(tokenizer: PreTrainedTokenizerFast) -> None:
    model = TINY_MODELS["llama"]().train()
    pared.compress(model, tokenizer, pared.Recipe(method="svd", keep=0.5))
    assert model.training
