"""Whether a calibration text tells enough of every feature that its Grams are of, and reaches every layer.

Decomposing by a Gram, or making up for channels that go, is a least squares on n features. Fitted to T independent
tokens its error is ``1 - n/T`` of the true one on those tokens, and ``1 / (1 - n/T)`` of it on others (a random design:
Breiman and Freedman, Journal of the American Statistical Association 78, 1983): it looks better than it is by
``(1 - n/T)^-2``. Tokens of a text depend on each other, and other text is other text: measured on SmolLM2-135M
(``benchmarks/shrinkage.py``) it is 5.2 at 2.7 tokens a feature, 2.4 at 7.1 and 1.7 at 14.2. Ten are asked for, where it
is about 2.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from pared.calibration import CROSS, StatisticView, accumulators, statistic_kind
from pared.data.windows import Windows
from pared.engine.spec import CompressionSpec
from pared.modules.opened import Expert
from pared.schema.manifest import TooFew
from pared.structure import Anatomy

PER_FEATURE = 10  # distinct tokens for every feature of a Gram
UNREACHED = "no calibration token reached it"
STARVED = "its expert was given fewer calibration tokens than it has inputs"


def too_few(windows: Windows, anatomy: Anatomy, spec: CompressionSpec) -> TooFew | None:
    """Return what is lacking of a calibration text; none where it is enough, or no Gram is read.

    Args:
        windows: that are calibrated on.
        anatomy: after the probe pass.
        spec: of the compression.
    """
    features = _features(anatomy, spec)
    wanted = PER_FEATURE * max(features.values(), default=0)
    if wanted and (tokens := windows.distinct_tokens) < wanted:
        short = sum(PER_FEATURE * one > tokens for one in features.values())
        return TooFew(tokens=tokens, wanted=wanted, features=max(features.values()), layers=short)
    return None


def _features(anatomy: Anatomy, spec: CompressionSpec) -> dict[str, int]:
    """Return the features of the widest Gram that a method reads of each site; of those it reads none of, nothing."""
    made = accumulators(anatomy.sites, lambda shapes: spec.requires(shapes) | spec.gradients, torch.device("meta"))
    return {
        site: max(one.features for one in grams)
        for site, own in made.items()
        if (grams := [one for name, one in own.items() if statistic_kind(name).gram])
    }


def why_dense(
    model: nn.Module, site: str, statistics: Mapping[str, StatisticView], for_gram: bool = False, share: float = 1.0
) -> str:
    """Return why a site stays dense for want of tokens; "" if it need not.

    That is a site that no token reached, and both layers of an expert whose router gave it fewer tokens than the wider
    of them has inputs, if a Gram is read of them: it would be fitted to those few tokens, and what it is said to lose,
    by which ranks and widths are decided, would be next to nothing. A layer that every token reaches is decomposed
    however short the text is, as :func:`too_few` says so.

    Args:
        model: that holds the site.
        site: its name.
        statistics: of it, by name.
        for_gram: a Gram will be read of what these statistics are of, whatever they are themselves.
        share: of the text, that these statistics are of.
    """
    tokens = {name: one.tokens for name, one in statistics.items() if name != CROSS}
    if 0 in tokens.values():
        return UNREACHED
    expert = model.get_submodule(site.rpartition(".")[0])
    of_grams = [count for name, count in tokens.items() if for_gram or statistic_kind(name).gram]
    if isinstance(expert, Expert) and of_grams and (count := round(min(of_grams) / share)) < expert.inputs:
        return f"{STARVED}: {count:,}, expected {expert.inputs:,} or more"
    return ""


def dense_for_want_of_tokens(reasons: Iterable[str]) -> dict[str, int]:
    """Count reasons for which layers stay dense, of those :func:`why_dense` gives, by what they say of all."""
    found = list(reasons)
    counts = {said: sum(one.startswith(said) for one in found) for said in (UNREACHED, STARVED)}
    return {said: count for said, count in counts.items() if count}
