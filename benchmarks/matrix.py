"""What transformers, torch, PEFT, TRL and torchao do with a folder of every storage: each cell is run.

    python benchmarks/matrix.py [--consumers NAME ...] [--storages NAME ...] [--again]

Tiny random Llamas of three blocks, of which every linear layer is stored in one way, are saved, loaded by
`from_pretrained` and given to a consumer; what comes of it is compared with what the folder answers in transformers. A
cell that was run is not run again, unless it is asked for. TRL and torchao are no dependencies of the project: put them
where this Python finds them (`pip install --no-deps --target FOLDER trl torchao`, PYTHONPATH=FOLDER).
"""

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

import pared
from matrix_page import render
from pared.checkpoint import mark
from record import RESULTS, append, read
from serving_folders import STORAGES, VOCABULARY, tiny

PLACE = RESULTS / "matrix.jsonl"
STORED = ("dense", "factors", "pivoted", "shared", "shared, pivoted", "sparse", "2:4", "widths", "heads", "every kind")
TOKENS = torch.randint(3, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(1))
ROWS = [{"input_ids": row, "labels": row} for row in TOKENS.repeat(4, 1)]
NEW = 16  # tokens that are generated
TARGETS = ["q_proj", "v_proj"]


class Cell:
    """A folder of one storage, and what it answers.

    Attributes:
        folder: of it.
        place: an empty folder for what a consumer writes.
    """

    def __init__(self, folder: Path, place: Path) -> None:
        self.folder, self.place = folder, place

    def load(self, **more: Any) -> Any:
        """Load it anew."""
        return AutoModelForCausalLM.from_pretrained(self.folder, **more).eval()

    def difference(self, found: torch.Tensor, expected: torch.Tensor | None = None) -> float:
        """Return the largest difference of logits from those of the folder, relative to the largest of these."""
        expected = logits(self.load()) if expected is None else expected
        return float((found - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Return the logits of the fixed tokens."""
    return model(input_ids=TOKENS, use_cache=False).logits.float()


def greedy(model: Any, **more: Any) -> torch.Tensor:
    """Return the likeliest continuation of the first row."""
    return model.generate(TOKENS[:1], max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0, **more)


def torch_export(cell: Cell) -> float:
    program = torch.export.export(cell.load(), (), {"input_ids": TOKENS, "use_cache": False}, strict=False)
    return cell.difference(program.module()(input_ids=TOKENS, use_cache=False).logits.detach())


def torch_compile(cell: Cell) -> float:
    torch._dynamo.reset()
    return cell.difference(logits(torch.compile(cell.load(), fullgraph=True, backend="aot_eager")))


def static_cache(cell: Cell) -> float:
    model = cell.load()
    same = greedy(model, cache_implementation="static", disable_compile=True) == greedy(model)
    return float(not bool(same.all()))


def disk_offload(cell: Cell) -> float:
    parts = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    parts |= {f"model.layers.{number}": "disk" for number in range(3)}
    return cell.difference(logits(cell.load(device_map=parts, offload_folder=str(cell.place))))


def assistant(cell: Cell) -> float:
    dense = tiny("llama")
    model = cell.load()
    drafted = greedy(dense, assistant_model=model) == greedy(dense)
    drafting = greedy(model, assistant_model=dense) == greedy(model)
    return float(not bool(drafted.all() and drafting.all()))


def trainer(model: Any, place: Path, **more: Any) -> transformers.Trainer:
    """Return a Trainer of three steps."""
    arguments = transformers.TrainingArguments(
        output_dir=str(place / "run"), max_steps=3, learning_rate=1e-2, weight_decay=0.1, report_to=[], use_cpu=True,
        per_device_train_batch_size=2, disable_tqdm=True, save_strategy="no", logging_strategy="no",
    )  # fmt: skip
    return transformers.Trainer(model=model, args=arguments, train_dataset=ROWS, **more)


def full_training(cell: Cell) -> float:
    trained = trainer(cell.load(), cell.place)
    trained.train()
    trained.save_model(str(cell.place / "trained"))
    model: Any = trained.model
    assert cell.difference(logits(model.eval())) > 1e-3, "nothing was learned"
    return cell.difference(logits(AutoModelForCausalLM.from_pretrained(cell.place / "trained").eval()), logits(model))


def lora(cell: Cell) -> float:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(cell.load(), LoraConfig(r=2, target_modules=TARGETS, task_type="CAUSAL_LM"))
    trainer(model, cell.place).train()
    return _merged(cell, model)


def sft(cell: Cell) -> float:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(
        output_dir=str(cell.place / "run"), max_steps=3, learning_rate=1e-2, report_to=[], use_cpu=True, bf16=False,
        per_device_train_batch_size=2, disable_tqdm=True, save_strategy="no", logging_strategy="no", max_length=16,
        dataset_kwargs={"skip_prepare_dataset": True}, gradient_checkpointing=False,
    )  # fmt: skip
    rows = Dataset.from_list([{"input_ids": row.tolist()} for row in TOKENS.repeat(4, 1)])
    trained = SFTTrainer(
        model=cell.load(), args=arguments, train_dataset=rows, processing_class=_tokenizer(),
        peft_config=LoraConfig(r=2, target_modules=TARGETS, task_type="CAUSAL_LM"),
    )  # fmt: skip
    trained.train()
    return _merged(cell, trained.model)


def _merged(cell: Cell, adapted: Any) -> float:
    """Merge adapters, save, load; against the adapted model, or the merged one where zeros are kept."""
    before = logits(adapted.eval())
    assert cell.difference(before) > 1e-4, "nothing was learned"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        merged = adapted.merge_and_unload()
    masked = any("what it adds where weights are zero is lost" in str(one.message) for one in told)
    merged.save_pretrained(cell.place / "merged")
    again = logits(AutoModelForCausalLM.from_pretrained(cell.place / "merged").eval())
    return cell.difference(again, logits(merged) if masked else before)


def torchao_int8(cell: Cell) -> float:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = cell.load()
    quantize_(model, Int8WeightOnlyConfig())
    return cell.difference(logits(model))


def torchao_shares(cell: Cell) -> float:
    """Whether bases that were one tensor are so still; 0 where they are."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = cell.load()
    before = _bases(model)
    quantize_(model, Int8WeightOnlyConfig())
    return float(_bases(model) - before)


def torchao_save(cell: Cell) -> float:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = cell.load()
    quantize_(model, Int8WeightOnlyConfig())
    model.save_pretrained(cell.place / "int8")
    return cell.difference(logits(AutoModelForCausalLM.from_pretrained(cell.place / "int8").eval()), logits(model))


def _bases(model: Any) -> int:
    """Return how many different tensors the layers named `down` hold."""
    return len({id(module.weight) for name, module in model.named_modules() if name.endswith(".down")})


def _tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {f"w{number}": number for number in range(VOCABULARY)}
    core = Tokenizer(WordLevel(words, unk_token="w0"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="w0", eos_token="w2")


# name -> (what runs it, the package it needs besides those of pared)
CONSUMERS: dict[str, tuple[Callable[[Cell], float], str | None]] = {
    "torch.export": (torch_export, None),
    "torch.compile, fullgraph (aot_eager)": (torch_compile, None),
    "static cache": (static_cache, None),
    "disk offload": (disk_offload, None),
    "assistant of the dense model, and the other way": (assistant, None),
    "Trainer: all weights, save, load": (full_training, None),
    "Trainer: LoRA on q_proj and v_proj, merge, save, load": (lora, "peft"),
    "TRL's SFTTrainer: the same": (sft, "trl"),
    "torchao int8 after loading": (torchao_int8, "torchao"),
    "torchao int8: shared bases stay shared": (torchao_shares, "torchao"),
    "torchao int8: save, load": (torchao_save, "torchao"),
}


def made(storage: str, folder: Path) -> Path:
    """Save a tiny model of a storage."""
    model: PreTrainedModel = tiny("llama")
    STORAGES[storage](model)
    if storage != "dense":
        mark(model)
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    return folder


def run(consumer: str, storage: str) -> dict[str, Any]:
    """Run a cell and return its line."""
    function, package = CONSUMERS[consumer]
    line: dict[str, Any] = {"consumer": consumer, "storage": storage, "pared": pared.__version__}
    if package is not None:
        try:
            line["package"] = f"{package} {version(package)}"
        except PackageNotFoundError:
            return {**line, "found": "not installed"}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cell = Cell(made(storage, Path(place) / "folder"), Path(place))
        try:
            line |= {"found": "ran", "difference": function(cell)}
        except Exception as error:  # whatever a consumer raises is what is found
            line |= {"found": "failed", "message": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    return {**line, "seconds": round(time.perf_counter() - start, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--consumers", nargs="*", default=list(CONSUMERS))
    parser.add_argument("--storages", nargs="*", default=list(STORED))
    parser.add_argument("--again", action="store_true", help="run cells that were run")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    done = {(line["consumer"], line["storage"]) for line in read(PLACE) if line["found"] != "not installed"}
    for storage in asked.storages:
        for consumer in asked.consumers:
            if asked.again or (consumer, storage) not in done:
                line = run(consumer, storage)
                append(PLACE, line)
                print(line, flush=True)
    PLACE.with_suffix(".md").write_text(render(read(PLACE), list(CONSUMERS), list(STORED)), encoding="utf-8")


if __name__ == "__main__":
    main()
