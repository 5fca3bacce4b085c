"""How single layers are timed: one thread's processor time, interleaved with what they are compared with."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import nn

LEAST_SECONDS = 0.01  # of one timing

Layer = Callable[[torch.Tensor], torch.Tensor]


class Timed(NamedTuple):
    """Seconds of the base, one for every timing, and of every other layer the ratios to it, one for every round."""

    base: list[float]
    ratios: dict[str, list[float]]


def seconds_of(layer: Layer, x: torch.Tensor, repeats: int) -> float:
    start = time.thread_time()
    for _ in range(repeats):
        layer(x)
    return (time.thread_time() - start) / repeats


@torch.inference_mode()
def interleaved(base: Layer, others: Mapping[str, Layer], x: torch.Tensor, rounds: int) -> Timed:
    """Time every other layer between two timings of the base, round after round."""

    def repeats_of(layer: Layer) -> int:
        layer(x)
        return max(1, int(LEAST_SECONDS / seconds_of(layer, x, 3)))

    often, times = repeats_of(base), {name: repeats_of(layer) for name, layer in others.items()}
    timed = Timed([], {name: [] for name in others})
    for _ in range(rounds):
        for name, layer in others.items():
            before = seconds_of(base, x, often)
            changed = seconds_of(layer, x, times[name])
            after = seconds_of(base, x, often)
            timed.base.append(before)
            timed.ratios[name].append(2 * changed / (before + after))
    return timed


@torch.inference_mode()
def bfloat16_slowdown(rounds: int = 5) -> float:
    """Return the time of a product in bfloat16 over that in float32."""
    x, weight = torch.randn(64, 576), torch.randn(576, 576)
    seconds: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    for _ in range(rounds):
        for dtype, taken in seconds.items():
            x_TN, W_ON = x.to(dtype), weight.to(dtype)
            start = time.thread_time()
            nn.functional.linear(x_TN, W_ON)
            taken.append(time.thread_time() - start)
    return statistics.median(seconds[torch.bfloat16]) / statistics.median(seconds[torch.float32])
