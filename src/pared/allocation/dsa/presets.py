"""The programs that DSA's authors published, what is known to be wrong with each, and those that our search led to.

L. Li et al., "Discovering Sparsity Allocation for Layer-wise Pruning of Large Language Models", NeurIPS 2024.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pared.names import require_known

if TYPE_CHECKING:
    from pared.allocation.dsa.grammar import Program

SCORE_TOKENS = 2048  # of one sample: Wanda's code, which DSA's is built on, sums within samples and takes their mean
DEFAULT_OF_ZEROS, DEFAULT_OF_RANKS = "log-spread", "spectral-entropy"


@dataclass(frozen=True)
class Packaged:
    """A program by name.

    Attributes:
        name: what a recipe calls it.
        text: of the program.
        provenance: where it is printed, and what was claimed for it there.
        remark: what to know before using it.
        tokens: over how many tokens the norms in its scores are summed.
    """

    name: str
    text: str
    provenance: str
    remark: str
    tokens: int = SCORE_TOKENS

    @property
    def program(self) -> "Program":
        """The program."""
        from pared.allocation.dsa.grammar import parse

        return parse(self.text)


PACKAGED = {
    packaged.name: packaged
    for packaged in (
        Packaged(
            "dsa-readme",
            "W:(ABSLOG)-(VAR)-(ATAN,ASIN)-(7)",
            "README of lliai/DSA, the command for 70% sparsity with Wanda scores",
            "The variance of the log-scores, which no scale changes. asin(atan(v)) is undefined above v = tan 1 = "
            "1.557; Gaussian weights alone give 1.234. The released code turns what is undefined into 0, the smallest "
            "number, so that blocks with heavy tails are pruned least by accident: legacy_nan_to_zero does the same. "
            "It also ignores the 7 and spreads by its option of 0.08.",
        ),
        Packaged(
            "dsa-poster-best",
            "W:(NORM)-(VAR)-(ABS,NO_OP)-(8)",
            "the paper's search trace (poster), (Norm, Var, Abs, No), perplexity 22.6 of LLaMA-1-7B at 70% with Wanda",
            "Degenerate as printed: what is normalised has variance 1 in every block, and the program is rejected as "
            "constant. What was meant is not known.",
        ),
        Packaged(
            "dsa-poster-second",
            "W:(EXP)-(ENTROPY)-(COS,LOG)-(8)",
            "the paper's search trace (poster), (Exp, Entropy, Cos, Log), perplexity about 25.1",
            "The logarithm of a cosine is undefined wherever the cosine is not positive, and exp overflows for scores "
            "above 709; such models are refused.",
        ),
        Packaged(
            "dsa-poster-first",
            "W:(ABS)-(MEAN)-(EXP,NO_OP)-(8)",
            "the paper's search trace (poster), (Abs, Mean, Exp, Mean), perplexity about 26.7",
            "The mean of one number is that number, hence NO_OP. By magnitude: exp overflows for a mean above 709.",
        ),
        Packaged(
            "dsa-poster-graph",
            "W:(EXP)-(ENTROPY)-(EXP,SIGMOID)-(8)",
            "an illustration of the paper (poster), Exp-Entropy-Exp-Sigmoid; nothing is claimed for it",
            "exp of the entropy is the effective number of scores, and the sigmoid of more than 40 is 1 up to "
            "rounding: rejected as constant unless few scores outweigh all others.",
        ),
        Packaged(
            "found-wanda-0.7",
            "W:(TANH,ABS)-(STD)-(ABS,TAN)-(20)-(KEEP)",
            "pared search, evolution of 320 candidates, seed 0: SmolLM2-135M-Instruct in bfloat16, wanda at 70%, the "
            "last 20% of the WikiText-2 training part here; candidate 167 (benchmarks/search/evolution)",
            "The deviation of tanh of the scores: blocks whose scores vary little below 1, or are all above it, are "
            "pruned most. tanh makes it depend on the scale of scores, which are those of the search: sums over 65,536 "
            "tokens, whatever is calibrated on.",
            tokens=128 * 512,
        ),
        Packaged(
            DEFAULT_OF_ZEROS,
            "W:(ABSLOG)-(STD)-(ATAN)-(15)-(KEEP)",
            "candidate 89 of the random search, written with ABSLOG: SmolLM2-135M-Instruct, wanda at 70%, 376 where "
            "uniform has 759 and found-wanda-0.7 297 (benchmarks/search/random)",
            "The deviation of the log-scores, which no scale changes and which is defined for all finite scores: "
            "blocks whose scores spread widely are pruned least. The default of zeros; where it tells no block from "
            "another all get the same.",
        ),
        Packaged(
            DEFAULT_OF_RANKS,
            "W:(POW)-(ENTROPY)-(NO_OP)-(10)-(KEEP)",
            "ours, after the effective rank of D-Rank (arXiv 2509.25622); not searched",
            "The entropy of the squared singular values of a block, the logarithm of their effective rank, which no "
            "scale changes: blocks whose spectra are flat keep most. The default of ranks; where it tells no block "
            "from another all keep the same. Perplexity 142.6 where uniform ranks have 139.7 (docs/search.md).",
        ),
    )
}


def packaged_of(name: str) -> Packaged:
    """Return the packaged program of a name.

    Raises:
        ParedError: there is none.
    """
    require_known("packaged program", name, PACKAGED)
    return PACKAGED[name]
