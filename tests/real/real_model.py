"""The real model of this tier and the texts it is measured on."""

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODEL = "embedded:smollm2-135m"


@dataclass(frozen=True)
class Scale:
    """How much is calibrated on: windows, and their tokens (of four windows of evaluation too)."""

    samples: int
    length: int


FEW, MANY = Scale(4, 256), Scale(16, 1024)


@dataclass(frozen=True)
class Corpus:
    """The texts of this run: WikiText-2 where ``PARED_DATA`` names a folder, else the embedded text."""

    calibration: str
    evaluation: str
