"""What a person looks at, made from results as data."""

from pared.report.card import model_card
from pared.report.table import comparison

__all__ = ["comparison", "model_card"]
