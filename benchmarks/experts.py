"""Which experts go: by the expected loss, by REAP's score, by how many tokens they are given, or at random.

    PARED_DATA=/path/to/data python benchmarks/experts.py           # trains small mixtures first; one line a cell
    python benchmarks/experts.py --show                              # the table only

No trained mixture was at hand, so small ones are trained here on bytes of WikiText-2 and C4, a few minutes each:
Qwen3-MoE with 16 experts of which a byte is given to 2, once with normalised weights of the picked experts and once
without. They are no language models; what is compared is how scores choose, and how near the loss that is told comes to
the measured.
"""

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

import pared
from pared.calibration.statistics.experts import EXPERTS
from pared.data import find_text
from pared.data.windows import cut
from pared.engine import Observer, resolve
from pared.engine.families.experts import ExpertWork
from pared.engine.install import keep_experts
from pared.evaluation.perplexity import perplexity
from pared.models.resized import take_numbers
from pared.structure import find_anatomy
from pared.structure.store import ResidentBlocks
from pared.widths.experts import Experts, by_loss, by_reap
from record import RESULTS, append, read, table

LINES = RESULTS / "experts.jsonl"
TRAIN, TEXTS = ("wikitext2:train", "c4:train"), {"WikiText-2": "wikitext2:test", "C4": "c4:validation"}
KEEPS, ORDERS, SEEDS = (0.75, 0.5, 0.25), ("loss", "reap", "tokens", "random"), 3
LENGTH, BATCH, COUNT, WINDOWS = 128, 16, 16, 64
SIZES = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 4,
         "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 4, "num_experts": COUNT,
         "num_experts_per_tok": 2,
         "max_position_embeddings": 512, "vocab_size": 256, "router_aux_loss_coef": 0.01}  # fmt: skip


def of_bytes() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inside = Tokenizer(models.BPE(vocab={one: place for place, one in enumerate(alphabet)}, merges=[]))
    inside.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inside.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inside)


def trained(folder: Path, normalised: bool, seed: int, steps: int) -> None:
    """Train one mixture, unless it is there."""
    if (folder / "config.json").exists():
        return
    torch.manual_seed(seed)
    tokenizer = of_bytes()
    parts = [cut(find_text(name), tokenizer, LENGTH, None).tokens for name in TRAIN]
    windows = torch.cat(parts)
    config = Qwen3MoeConfig(**SIZES, norm_topk_prob=normalised, output_router_logits=True)
    model = Qwen3MoeForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    began = time.time()
    for step in range(steps):
        rate = min(1.0, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = 3e-3 * rate
        batch = windows[torch.randint(len(windows), (BATCH,))]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"{folder.name} step {step}: {float(loss.detach()):.3f} ({time.time() - began:.0f} s)", flush=True)
    model.config.output_router_logits = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def measured(folder: Path, normalised: bool, seed: int) -> Iterator[dict[str, Any]]:
    """Yield a row for the whole model, and one for every number of experts, order and draw."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), of_bytes()
    tests = {name: cut(find_text(text), tokenizer, LENGTH, WINDOWS) for name, text in TEXTS.items()}
    common = {"normalised": normalised, "seed": seed}

    def nats(of: Any) -> dict[str, float]:
        return {name: math.log(perplexity(of, tokenizer, windows).value) for name, windows in tests.items()}

    yield {**common, "order": "whole", "keep": 1.0, "nats": nats(model)}
    calibration = pared.Calibration(text=TRAIN[0], samples=256, length=LENGTH, batch=8, dtype="float32")
    spec = resolve(pared.Recipe(structures="experts", keep=0.5, calibration=calibration))
    observer = Observer(ResidentBlocks(model, find_anatomy(model)), tokenizer, spec)
    observer.probe(find_anatomy(model))
    observer.read()
    ExpertWork(observer, spec)  # finds and proves them
    found: dict[str, Any] = {}
    observer.backward(observer.capture(), frozenset(), lambda block: found.update(block.statistics))
    for order in ORDERS:
        for draw in range(SEEDS if order == "random" else 1):
            generator = torch.Generator().manual_seed(draw)
            chosen = {}
            for name, own in found.items():
                statistic = own[EXPERTS]
                if order == "loss":
                    chosen[name] = by_loss(statistic.value)
                elif order == "reap":
                    chosen[name] = by_reap(statistic.weighted, statistic.picks)
                else:
                    score = statistic.picks if order == "tokens" else torch.rand(COUNT, generator=generator)
                    chosen[name] = Experts(score.argsort(descending=True, stable=True))
            for keep in KEEPS:
                smaller, count = AutoModelForCausalLM.from_pretrained(folder), int(COUNT * keep)
                for mixture in observer.anatomy.mixtures:
                    keep_experts(smaller, mixture, chosen[mixture.name].kept(count))
                smaller.config.num_experts = count
                take_numbers(smaller, COUNT, count)
                told = sum(_told(found[name][EXPERTS].value, one.kept(count)) for name, one in chosen.items())
                yield {**common, "order": order, "draw": draw, "keep": keep, "told": told, "nats": nats(smaller)}


def _told(M_EE: torch.Tensor, kept_K: torch.Tensor) -> float:
    """Return what the loss is expected to grow by where some experts stay, whichever score chose them."""
    gone_E = torch.ones(len(M_EE), dtype=torch.bool)
    gone_E[kept_K] = False
    return 0.5 * float(M_EE[gone_E][:, gone_E].sum())


def show() -> None:
    """Print the table of all lines, means over models and draws of what the loss grows by."""
    rows = read(LINES)
    whole = {(row["normalised"], row["seed"]): row["nats"] for row in rows if row["order"] == "whole"}
    cells = []
    for normalised in (True, False):
        for keep in KEEPS:
            for order in ORDERS:
                own = [r for r in rows if (r["normalised"], r["keep"], r["order"]) == (normalised, keep, order)]
                if not own:
                    continue
                grown = {t: [r["nats"][t] - whole[normalised, r["seed"]][t] for r in own] for t in TEXTS}
                told = sum(r["told"] for r in own) / len(own)
                means = [f"{sum(one) / len(one):.3f}" for one in grown.values()]
                cells.append(("yes" if normalised else "no", f"{keep:g}", order, len(own), f"{told:.3f}", *means))
    print(table(("weights normalised", "keep", "order", "models", "told", *TEXTS), cells))


def main() -> None:
    """Train, measure, and show."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--show", action="store_true")
    parser.add_argument("--models", default="/tmp/pared-mixtures", type=Path)
    parser.add_argument("--steps", default=500, type=int)
    parser.add_argument("--seeds", default=2, type=int)
    asked = parser.parse_args()
    if not asked.show:
        for seed in range(asked.seeds):
            for normalised in (True, False):
                folder = asked.models / f"{'normalised' if normalised else 'plain'}-{seed}"
                trained(folder, normalised, seed, asked.steps)
                for row in measured(folder, normalised, seed):
                    append(LINES, {**row, "steps": asked.steps})
    show()


if __name__ == "__main__":
    main()
