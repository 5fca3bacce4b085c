"""What a model is worth, dense or compressed."""

from pared.evaluation.classification import Score, classify
from pared.evaluation.generation import greedy
from pared.evaluation.perplexity import Perplexity, perplexity

__all__ = ["Perplexity", "Score", "classify", "greedy", "perplexity"]
