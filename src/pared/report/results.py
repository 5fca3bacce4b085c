"""A finished compression or training as a table with what is to be said of it, for the command line and for Python."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from pared.names import called
from pared.report.table import WORTH_SAYING, comparison, learned_from
from pared.schema.presets import summary_of
from pared.tables import Row, Table

if TYPE_CHECKING:
    from pared.schema.manifest import Manifest, Refined, TooFew, Training

RUINED = 100  # times the perplexity of the dense model


def compressed_table(manifest: "Manifest", folder: str) -> Table:
    """Return what a compression came to, and where it lies."""
    return Table.comparison(manifest.model["name"], comparison(manifest), [*_remarks(manifest), f"folder: {folder}"])


def trained_table(manifest: "Manifest", folder: str) -> Table:
    """Return what the last training of a folder came to, and where it lies."""
    training = manifest.training[-1]
    rows = manifest.plan.sizes(bytes_after=manifest.bytes_on_disk)
    before, after = training.perplexity_before, training.perplexity_after
    if before is not None and after is not None:
        rows.append(Row("perplexity", f"{before:,.2f}", f"{after:,.2f}", f"x{after / before:.3g}"))
    lines = [*training_lines(training), *_ends(training.seconds, training.peak_memory_bytes, manifest, folder)]
    return Table.comparison(f"{training.parent['name']}, trained", rows, lines)


def trained_lines(manifest: "Manifest", folder: str) -> list[str]:
    """Return in lines what the last training of a folder changed, and where it lies."""
    training, before, after = manifest.training[-1], manifest.plan.before, manifest.plan.after
    return [
        f"target parameters {before.covered_parameters:,} -> {after.covered_parameters:,} "
        f"({manifest.plan.achieved_keep:.1%}), whole model {before.model_parameters:,} -> {after.model_parameters:,}, "
        f"bytes on disk {manifest.bytes_on_disk:,}",
        *training_lines(training),
        *_ends(training.seconds, training.peak_memory_bytes, manifest, folder),
    ]


def training_lines(training: "Training") -> Iterator[str]:
    """Yield how a training went, line by line."""
    texts = ", ".join(str(row["text"]) for row in training.data)
    yield f"trained by {training.tuning.method} on {texts}"
    if training.preset and (changed := summary_of(training.preset)):
        yield f"  {changed}"
    for stage in training.stages:
        first, last = stage["loss"]
        yield (
            f"{stage['name']}: {stage['steps']:,} steps, {stage['tokens']:,} tokens, {stage['trained_parameters']:,} "
            f"parameters trained, loss {first:.4f} -> {last:.4f}"
        )
        if reached := stage.get("reached"):
            figures = ", ".join(
                f"{name.replace('_', ' ')} {value:,.4g}"
                if isinstance(value, float)
                else f"{name.replace('_', ' ')} {value:,}"
                for name, value in reached.items()
            )
            yield f"  reached: {figures}"
        for note in stage.get("notes", ()):
            yield f"  note: {note}"
        if stage["validation"]:
            start, *rest = stage["validation"]
            measured = ", ".join(f"{loss:.4f} (step {step})" for step, loss in (start, *rest[-2:]))
            yield f"  loss on rows never trained on: {measured}"
    if training.perplexity_before is not None and training.perplexity_after is not None and training.evaluation:
        before, after, on = training.perplexity_before, training.perplexity_after, training.evaluation
        share = float(on.get("learned_from", 0))
        seen = f"; {share:.0%} of it was calibrated or trained on" if share >= WORTH_SAYING else ""
        yield (
            f"perplexity on {on['text']}: {before:,.2f} -> {after:,.2f} (x{after / before:.3g}), {on['windows']} "
            f"windows of {on['length']} tokens{seen}"
        )


def _ends(seconds: dict[str, float], peak: int, manifest: "Manifest", folder: str) -> Iterator[str]:
    yield f"seconds by stage: {_by_stage(seconds)}"
    yield f"peak memory: {peak / 2**20:,.0f} MiB"
    yield f"self-check: reloaded, largest relative difference {manifest.self_check:.2g}"
    yield f"folder: {folder}"


def _remarks(manifest: "Manifest") -> Iterator[str]:
    """Yield the remarks on a compression, besides its figures."""
    if manifest.perplexity_after is not None and manifest.evaluation:
        on = manifest.evaluation
        stand_in = "; only a stand-in for a real corpus" if on["stand_in"] else ""
        share = learned_from(manifest)
        seen = f"; {share:.0%} of it was calibrated or trained on" if share else ""
        yield f"perplexity on {on['text']}: {on['windows']} windows of {on['length']} tokens{stand_in}{seen}"
        if manifest.perplexity_before and manifest.perplexity_after > RUINED * manifest.perplexity_before:
            yield "the model is ruined: try another method, a larger keep or more samples"
    yield f"seconds by stage: {_by_stage(manifest.seconds)}"
    if manifest.preset and (changed := summary_of(manifest.preset)):
        yield changed
    if manifest.plan.missed:
        yield manifest.plan.missed
    if manifest.refined:
        yield refined_line(manifest.refined)
    if (elastic := manifest.elastic) is not None:
        yield (
            f"every size: `pared slice` cuts any keep from {elastic.least:g} to {elastic.most:g} out of the folder, "
            f"which has {elastic.bytes:,} bytes more for that"
        )
    if manifest.too_few:
        yield too_few_line(manifest.too_few)
    elif manifest.damping:
        read = manifest.calibration
        tokens = read["windows"] * read["length"] if read is not None else 0
        yield (
            f"{len(manifest.damping)} layers read too little to tell all their inputs apart ({tokens:,} tokens of "
            f"calibration text): raise {called('samples')} or {called('length')}"
        )
    yield f"self-check: reloaded, largest relative difference {manifest.self_check:.2g}"


def too_few_line(few: "TooFew") -> str:
    """Return in a line that a calibration text is too short for what is made of it."""
    each = few["wanted"] // few["features"]
    return (
        f"too few calibration tokens: {few['tokens']:,} distinct ones, where {few['layers']:,} layers are solved by "
        f"Grams of up to {few['features']:,} features, which take {each} tokens a feature, {few['wanted']:,}; raise "
        f"{called('samples')} or {called('length')}"
    )


def refined_line(refined: "Sequence[Refined]") -> str:
    """Return what training all blocks came to, in a line."""
    better, last = sum(one.epochs > 0 for one in refined), refined[-1]
    return (
        f"refined: {better} of {len(refined)} blocks improved on the windows held out; error of the last one's output "
        f"{last.before:.3g} -> {last.after:.3g}"
    )


def _by_stage(seconds: dict[str, float]) -> str:
    return "  ".join(f"{stage} {value:.1f}" for stage, value in seconds.items())
