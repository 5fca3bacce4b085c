"""The real model of this tier and the texts it is measured on."""

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODEL = "embedded:smollm2-135m"


@dataclass(frozen=True)
class Corpus:
    """The texts of this run: WikiText-2 where its files are, else the embedded text."""

    calibration: str
    evaluation: str
