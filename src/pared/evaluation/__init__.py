"""What a model is worth, dense or compressed."""

from pared.evaluation.perplexity import Perplexity, perplexity

__all__ = ["Perplexity", "perplexity"]
