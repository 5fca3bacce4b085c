"""How far input Grams are to be shrunk, and how many tokens they take: layer by layer, on text not calibrated on.

    PARED_DATA=/path/to/data python benchmarks/shrinkage.py            # one JSON line a layer and form
    python benchmarks/shrinkage.py --show                              # the tables only

A layer's weight is given a low rank, or loses channels, by the Gram of a few windows of WikiText-2, shrunk by one of
``AMOUNTS``; what is measured is the error of its outputs on other windows of WikiText-2 and on C4, as a share of their
energy. Rules are told the same windows: ``auto`` is the product's, ``tokens`` Ledoit and Wolf's with tokens as
observations, ``windows`` with windows, ``correlations`` with windows in units of every input's energy in all of them,
and ``halves`` takes the amount that is best where one half of the windows decides and the other half prices. Outputs
are not weighted.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch

import pared
from pared.calibration.statistics.gram import GradientGram, MeanGram
from pared.data import find_text
from pared.data.windows import cut
from pared.lowrank import loss_optimal
from pared.lowrank.shrinkage import shrunk
from pared.schema.plan import rank_for
from pared.widths import remove_channels
from record import RESULTS, append, read, table

LINES = RESULTS / "shrinkage.jsonl"
TEXT, ELSEWHERE = "wikitext2:train", {"WikiText-2": "wikitext2:test", "C4": "c4:validation"}
AMOUNTS = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
RULES = ("auto", "tokens", "windows", "correlations", "halves")
COUNTS = (2, 4, 8, 16)  # windows, of which so many tell how an error grows with few
KEEP, LENGTH, HELD_OUT = 0.8, 512, 8
SITES = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
Grams = list[torch.Tensor]  # a window each, float32, per token
Weights = Callable[[torch.Tensor], torch.Tensor]  # from a Gram to what takes the place of the weight


def collected(
    model: Any, tokenizer: Any, source: str, count: int, blocks: list[int]
) -> tuple[dict[str, Grams], dict[str, tuple[MeanGram, GradientGram]]]:
    """Return the Gram of what the layers of some blocks read: of each of some windows, and the product's of all."""
    tokens = cut(find_text(source), tokenizer, LENGTH, count).tokens
    by_window: dict[str, Grams] = {}
    together: dict[str, tuple[MeanGram, GradientGram]] = {}

    def watch(name: str) -> Callable[..., None]:
        def note(_: Any, args: tuple[torch.Tensor, ...]) -> None:
            x_TN = args[0].reshape(-1, args[0].shape[-1]).float()
            by_window.setdefault(name, []).append(x_TN.T @ x_TN / len(x_TN))
            if name not in together:  # the second knows the rule by tokens
                together[name] = MeanGram(x_TN.shape[1], x_TN.device), GradientGram(x_TN.shape[1], x_TN.device)
            for gram in together[name]:
                gram.update(x_TN)

        return note

    names = [f"model.layers.{block}.{site}" for block in blocks for site in SITES]
    handles = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in names]
    with torch.no_grad():
        for row in tokens:
            model.model(row[None])
    for handle in handles:
        handle.remove()
    return by_window, together


def least_error(observations: Grams) -> float:
    """Return Ledoit and Wolf's amount for the mean of some matrices, each one observation."""
    count, mean = len(observations), torch.stack([one.double() for one in observations]).mean(dim=0)
    spread = sum(float((one.double() - mean).square().sum()) for one in observations) / (count * (count - 1))
    equal = mean.diagonal().mean()
    distance = float(mean.square().sum() - len(mean) * equal**2)
    return min(1.0, spread / distance)


def correlations(grams: Grams) -> Grams:
    """Return Grams in units of the mean energy of every input."""
    scale = torch.stack([one.diagonal() for one in grams]).mean(dim=0).clamp(min=1e-30).rsqrt()
    return [scale[:, None] * one * scale for one in grams]


def mean(grams: Grams) -> torch.Tensor:
    """Return the mean of Grams, float64."""
    return torch.stack([one.double() for one in grams]).mean(dim=0)


def forms(weight: torch.Tensor, site: str) -> Iterator[tuple[str, Weights]]:
    """Yield how a weight is made smaller."""
    rank = rank_for(KEEP, *weight.shape)

    def low_rank(gram: torch.Tensor) -> torch.Tensor:
        factors = loss_optimal.decompose(weight, gram, torch.ones(())).factors(rank)
        return factors.up @ factors.down

    def narrower(gram: torch.Tensor) -> torch.Tensor:
        gram = gram + loss_optimal.DAMPING * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        width = int(KEEP * weight.shape[1])
        channels = remove_channels(weight, gram, torch.ones(len(weight), dtype=torch.float64), least=width)
        changed = torch.zeros_like(weight)
        changed[:, channels.kept(width)] = channels.weight(width)
        return changed

    yield "rank", low_rank
    if site.endswith("down_proj"):
        yield "width", narrower


def error(changed: torch.Tensor, weight: torch.Tensor, gram: torch.Tensor) -> float:
    """Return the error of the outputs as a share of their energy."""
    apart = changed - weight
    return float(((apart @ gram) * apart).sum() / ((weight @ gram) * weight).sum())


def measure(weight: torch.Tensor, make: Weights, own: Grams, others: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return the errors of every amount and of few windows, and what every rule says."""
    whole, halves = mean(own), (mean(own[::2]), mean(own[1::2]))
    errors: dict[str, list[float]] = {text: [] for text in others}
    crossed = []
    for amount in AMOUNTS:
        changed = make(shrunk(whole, amount))
        for text, gram in others.items():
            errors[text].append(error(changed, weight, gram))
        folds = [(make(shrunk(one, amount)), other) for one, other in (halves, halves[::-1])]
        crossed.append(sum(error(changed, weight, other) for changed, other in folds) / 2)
    few = []
    for count in COUNTS:
        gram = mean(own[:count])
        changed = make(gram)
        held_out = error(changed, weight, others["WikiText-2"])
        few.append({"tokens": count * LENGTH, "own": error(changed, weight, gram), "held_out": held_out})
    said = {"windows": least_error(own), "correlations": least_error(correlations(own))}
    said["halves"] = AMOUNTS[min(range(len(AMOUNTS)), key=crossed.__getitem__)]
    return {"errors": errors, "crossed": crossed, "few": few, "rules": said}


def run(model_name: str, blocks: list[int]) -> None:
    """Measure the layers of some blocks."""
    model, tokenizer = pared.load(model_name, "float32"), pared.load_tokenizer(model_name)
    model.model.layers = model.model.layers[: max(blocks) + 1]
    others = {text: collected(model, tokenizer, source, HELD_OUT, blocks)[0] for text, source in ELSEWHERE.items()}
    own, together = collected(model, tokenizer, TEXT, max(COUNTS), blocks)
    for block, site in itertools.product(blocks, SITES):
        name = f"model.layers.{block}.{site}"
        weight = model.get_submodule(name).weight.detach().double()
        elsewhere = {text: mean(found[name]) for text, found in others.items()}
        for form, make in forms(weight, site):
            row = {"model": model_name, "layer": name, "form": form, "inputs": weight.shape[1], "amounts": AMOUNTS}
            found = measure(weight, make, own[name], elsewhere)
            by_parts, by_tokens = together[name]
            found["rules"] |= {"auto": by_parts.shrinkage, "tokens": by_tokens.shrinkage}
            append(LINES, row | found)
            print(name, form, {rule: round(amount, 4) for rule, amount in found["rules"].items()}, flush=True)


def show(lines: list[dict[str, Any]]) -> str:
    """Return the tables: what every amount and rule gives on text not calibrated on, and errors by tokens an input."""

    def gain(line: dict[str, Any], text: str, amount: float) -> float:
        """Return an error as a multiple of that without shrinkage, between the amounts that were tried."""
        errors, tried = line["errors"][text], line["amounts"]
        above = next((place for place, one in enumerate(tried) if one >= amount), len(tried) - 1)
        below = max(above - 1, 0)
        share = (amount - tried[below]) / (tried[above] - tried[below]) if above > below else 0.0
        return (errors[below] + share * (errors[above] - errors[below])) / errors[0]

    rows = []
    for form in ("rank", "width"):
        own = [line for line in lines if line["form"] == form]
        known = [rule for rule in RULES if all(rule in line["rules"] for line in own)]
        for rule in (*map(str, AMOUNTS[1:]), *known):
            told = [float(rule) if rule[0].isdigit() else line["rules"][rule] for line in own]
            cells = [sum(gain(line, text, one) for line, one in zip(own, told, strict=True)) / len(own)
                     for text in ELSEWHERE]  # fmt: skip
            rows.append((form, rule, f"{min(told):.4f} to {max(told):.4f}", *(f"{cell:.3f}" for cell in cells)))
    first = table(("what is made smaller", "amount or rule", "amounts", *ELSEWHERE), rows)
    ratios: dict[float, list[float]] = {}
    for line in lines:
        for one in line["few"]:
            ratios.setdefault(one["tokens"] / line["inputs"], []).append(one["held_out"] / one["own"])
    by_tokens = [
        (f"{each:.2f}", len(found), f"{sum(found) / len(found):.2f}", f"{(1 - 1 / each) ** -2:.2f}" if each > 1 else "")
        for each, found in sorted(ratios.items())
    ]
    return "\n\n".join([first, table(("tokens an input", "layers", "held out / own", "(1 - n/T)^-2"), by_tokens)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded:smollm2-135m")
    parser.add_argument("--blocks", nargs="+", type=int, default=[1, 4, 7])
    parser.add_argument("--show", action="store_true", help="only print the tables")
    given = parser.parse_args()
    if not given.show:
        run(given.model, given.blocks)
    print(show(read(LINES)))


if __name__ == "__main__":
    main()
