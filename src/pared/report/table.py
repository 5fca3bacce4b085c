"""The rows a compression is reported in: always the three sizes together."""

from typing import TYPE_CHECKING

from pared.tables import Row

if TYPE_CHECKING:
    from pared.schema.manifest import Manifest

WORTH_SAYING = 0.05  # of the tokens; any two texts of one kind share some phrases


def learned_from(manifest: "Manifest") -> float:
    """Return the share of what is measured on that was calibrated or trained on, 0 if it is next to nothing."""
    measured = [manifest.evaluation, *(entry.evaluation for entry in manifest.training[-1:])]
    share = max((float(one.get("learned_from", 0)) for one in measured if one), default=0.0)
    return share if share >= WORTH_SAYING else 0.0


def comparison(manifest: "Manifest") -> list[Row]:
    """Return the rows of a finished compression."""
    rows = manifest.plan.sizes(manifest.bytes_before, manifest.bytes_on_disk)
    before, after = manifest.perplexity_before, manifest.perplexity_after
    if before is not None and after is not None:
        share = learned_from(manifest)
        what = f"perplexity ({share:.0%} on calibration text)" if share else "perplexity"
        rows.append(Row(what, f"{before:,.2f}", f"{after:,.2f}", f"x{after / before:.3g}"))
    rows.append(Row("seconds", "", f"{sum(manifest.seconds.values()):,.1f}", ""))
    bound = manifest.memory_bound_bytes
    most = f"of {bound / 2**20:,.0f}" if bound else ""
    rows.append(Row("peak memory", "", f"{manifest.peak_memory_bytes / 2**20:,.0f} MiB", most))
    return [Row("method", "dense", manifest.recipe.method, manifest.recipe.budget), *rows]
