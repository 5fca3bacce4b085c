"""``pared tune``: a compressed model in, the same one trained out."""

from typing import TYPE_CHECKING, Annotated

from pared.cli.console import ConsoleProgress, JsonFile, errors, out, quiet_libraries, write_json
from pared.cli.from_schema import Fields, Given, schema_options
from pared.cli.options import Overwrite
from pared.report.table import WORTH_SAYING
from pared.schema.presets import summary_of
from pared.schema.training import TrainingConfig

if TYPE_CHECKING:
    from pared.schema.manifest import Manifest, Training


@schema_options
def tune(
    given: Annotated[
        Given[TrainingConfig], Fields(TrainingConfig, file="YAML file of a training; options given here win over it.")
    ],
    overwrite: Overwrite = False,
    json_file: JsonFile = None,
) -> None:
    """Train a compressed model: rank, format and zeros stay; or, with basel, make a dense one smaller for a task.

    The same command resumes after a crash.
    """
    with errors("interrupted; the same command resumes from the last checkpoint, if there is one"):
        quiet_libraries()
        config = given.merged()
        from pared.training.early import require_possible

        require_possible(config, overwrite)
        from pared.training import tune as run

        made = run(config, overwrite, ConsoleProgress())
        if made.is_first:
            print_trained(made.manifest, str(made.folder))
            write_json(json_file, {"folder": str(made.folder), **made.manifest.model_dump(mode="json")})


def print_trained(manifest: "Manifest", folder: str) -> None:
    """Print what a training changed and where it lies."""
    training = manifest.training[-1]
    before, after = manifest.plan.before, manifest.plan.after
    out.print(
        f"covered parameters {before.covered_parameters:,} -> {after.covered_parameters:,} "
        f"({manifest.plan.achieved_keep:.1%}), whole model {before.model_parameters:,} -> {after.model_parameters:,}, "
        f"bytes on disk {manifest.bytes_on_disk:,}"
    )
    print_training(training)
    seconds = "  ".join(f"{stage} {value:.1f}" for stage, value in training.seconds.items())
    out.print(f"seconds by stage: {seconds}")
    out.print(f"peak memory: {training.peak_memory_bytes / 2**20:,.0f} MiB")
    out.print(f"self-check: reloaded, largest relative difference {manifest.self_check:.2g}")
    out.print(f"folder: {folder}")


def print_training(training: "Training") -> None:
    """Print how a training went."""
    texts = ", ".join(str(row["text"]) for row in training.data)
    out.print(f"trained by {training.tuning.method} on {texts}")
    if training.preset and (changed := summary_of(training.preset)):
        out.print(f"  {changed}")
    for stage in training.stages:
        first, last = stage["loss"]
        out.print(
            f"{stage['name']}: {stage['steps']:,} steps, {stage['tokens']:,} tokens, {stage['trained_parameters']:,} "
            f"parameters trained, loss {first:.4f} -> {last:.4f}"
        )
        if reached := stage.get("reached"):
            figures = ", ".join(f"{name.replace('_', ' ')} {value:,.4g}" if isinstance(value, float)
                             else f"{name.replace('_', ' ')} {value:,}" for name, value in reached.items())  # fmt: skip
            out.print(f"  reached: {figures}")
        for note in stage.get("notes", ()):
            out.print(f"  note: {note}")
        if stage["validation"]:
            measured = ", ".join(f"{loss:.4f} (step {step})" for step, loss in stage["validation"][-3:])
            out.print(f"  loss on rows never trained on: {measured}")
    if training.perplexity_before is not None and training.perplexity_after is not None and training.evaluation:
        before, after, on = training.perplexity_before, training.perplexity_after, training.evaluation
        share = float(on.get("learned_from", 0))
        seen = f"; {share:.0%} of it was calibrated or trained on" if share >= WORTH_SAYING else ""
        out.print(
            f"perplexity on {on['text']}: {before:,.2f} -> {after:,.2f} (x{after / before:.3g}), {on['windows']} "
            f"windows of {on['length']} tokens{seen}"
        )
