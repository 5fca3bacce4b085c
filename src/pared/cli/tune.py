"""``pared tune``: a compressed model in, the same one trained out."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pared.cli import options
from pared.cli.console import ConsoleProgress, JsonFile, errors, out, quiet_libraries, write_json
from pared.report.table import WORTH_SAYING
from pared.schema.presets import summary_of
from pared.schema.training import Tuning
from pared.training.early import require_possible

if TYPE_CHECKING:
    from pared.schema.manifest import Manifest, Training


def tune(
    model: Annotated[
        str | None, typer.Argument(help="A folder that pared made; for basel a dense model.", show_default=False)
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="YAML file of a training; options given here win over it.")
    ] = None,
    preset: options.Preset = None,
    method: Annotated[
        str | None, typer.Option(help="A name that `pared methods` lists under training. [default: distill]")
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="What to train on, by name: a text, instruct:NAME, "
            "or for encoders glue:NAME:train or ner:NAME:train; repeatable, mixed. [default: embedded]")
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="Of the prompts of instructions: alpaca, plain. [default: alpaca]")
    ] = None,
    length: Annotated[int | None, typer.Option(help="Tokens in a window. [default: 512]")] = None,
    windows: Annotated[int | None, typer.Option(help="The most windows of each text. [default: all]")] = None,
    validation: Annotated[
        int | None, typer.Option(help="Windows at the end of each text, not trained on, for its loss. [default: 8]")
    ] = None,
    epochs: Annotated[
        float | None, typer.Option(help="How often the data is gone through. [default: lora 2, others 1]")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens to train on, in place of --epochs.")] = None,
    batch: Annotated[int | None, typer.Option(help="Windows in a batch. [default: 8]")] = None,
    accumulation: Annotated[int | None, typer.Option(help="Batches in a step. [default: 1]")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="At its peak. [default: the method's own]")] = None,
    warmup: Annotated[
        float | None,
        typer.Option(help="Steps in which it rises, or below 1 their share. [default: the method's own]"),
    ] = None,
    schedule: Annotated[str | None, typer.Option(help="constant, linear, cosine. [default: the method's own]")] = None,
    clip: Annotated[float | None, typer.Option(help="Largest norm of a step's gradient. [default: 1]")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Of AdamW. [default: 0]")] = None,
    evaluate_every: Annotated[
        int | None, typer.Option(help="Steps between two measurements of the validation loss. [default: at the end]")
    ] = None,
    patience: Annotated[
        int | None, typer.Option(help="Stop after so many measurements without a better one, and keep the best.")
    ] = None,
    checkpoint_every: Annotated[
        int | None, typer.Option(help="Steps between two states to resume from after a crash. [default: 100]")
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None, typer.Option("--gradient-checkpointing", help="Less memory for a third more time.")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="What is multiplied in; what is trained is held in float32. [default: auto]")
    ] = None,
    report_to: Annotated[
        list[str] | None, typer.Option(help="A tracker, as Accelerate names it: tensorboard, wandb; repeatable.")
    ] = None,
    option: options.MethodOptions = None,
    eval_text: Annotated[
        str | None,
        typer.Option("--eval", help="Text to measure perplexity on, before and after; none measures nothing. "
                     "[default: what the folder was measured on]"),
    ] = None,
    eval_length: options.EvalLength = None,
    eval_windows: options.EvalWindows = None,
    seed: Annotated[int | None, typer.Option(help="Of order and draws. [default: 0]")] = None,
    device: options.Device = None,
    out_folder: Annotated[Path | None, typer.Option("--out", help="The folder to make.")] = None,
    overwrite: options.Overwrite = False,
    json_file: JsonFile = None,
) -> None:  # fmt: skip
    """Train a compressed model: rank, format and zeros stay; or, with basel, make a dense one smaller for a task.

    The same command resumes after a crash.
    """
    with errors("interrupted; the same command resumes from the last checkpoint, if there is one"):
        quiet_libraries()
        asked = options.asked_of(
            Tuning,
            recipe,
            {
                "model": model,
                "preset": preset,
                "method": method,
                "data": data,
                "template": template,
                "length": length,
                "windows": windows,
                "validation": validation,
                "epochs": epochs,
                "tokens": tokens,
                "batch": batch,
                "accumulation": accumulation,
                "learning_rate": learning_rate,
                "warmup": warmup,
                "schedule": schedule,
                "clip": clip,
                "weight_decay": weight_decay,
                "evaluate_every": evaluate_every,
                "patience": patience,
                "checkpoint_every": checkpoint_every,
                "gradient_checkpointing": gradient_checkpointing,
                "precision": precision,
                "report_to": report_to,
                "options": options.named_values(option),
                "evaluation.text": eval_text,
                "evaluation.length": eval_length,
                "evaluation.windows": eval_windows,
                "seed": seed,
                "device": device,
                "out": out_folder,
            },
        )
        require_possible(asked, overwrite)
        from pared.training import tune as run

        made = run(asked, overwrite, ConsoleProgress())
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
        f"bytes on disk {manifest.bytes_on_disk:,}",
        markup=False,
    )
    print_training(training)
    seconds = "  ".join(f"{stage} {value:.1f}" for stage, value in training.seconds.items())
    out.print(f"seconds by stage: {seconds}", markup=False)
    out.print(f"peak memory: {training.peak_memory_bytes / 2**20:,.0f} MiB", markup=False)
    out.print(f"self-check: reloaded, largest relative difference {manifest.self_check:.2g}", markup=False)
    out.print(f"folder: {folder}", markup=False)


def print_training(training: "Training") -> None:
    """Print how a training went."""
    texts = ", ".join(str(row["text"]) for row in training.data)
    out.print(f"trained by {training.tuning.method} on {texts}", markup=False)
    if training.preset and (changed := summary_of(training.preset)):
        out.print(f"  {changed}", markup=False)
    for stage in training.stages:
        first, last = stage["loss"]
        out.print(
            f"{stage['name']}: {stage['steps']:,} steps, {stage['tokens']:,} tokens, {stage['trained_parameters']:,} "
            f"parameters trained, loss {first:.4f} -> {last:.4f}",
            markup=False,
        )
        if reached := stage.get("reached"):
            figures = ", ".join(f"{name.replace('_', ' ')} {value:,.4g}" if isinstance(value, float)
                             else f"{name.replace('_', ' ')} {value:,}" for name, value in reached.items())  # fmt: skip
            out.print(f"  reached: {figures}", markup=False)
        for note in stage.get("notes", ()):
            out.print(f"  note: {note}", markup=False)
        if stage["validation"]:
            measured = ", ".join(f"{loss:.4f} (step {step})" for step, loss in stage["validation"][-3:])
            out.print(f"  loss on rows never trained on: {measured}", markup=False)
    if training.perplexity_before is not None and training.perplexity_after is not None and training.evaluation:
        before, after, on = training.perplexity_before, training.perplexity_after, training.evaluation
        share = float(on.get("learned_from", 0))
        seen = f"; {share:.0%} of it was calibrated or trained on" if share >= WORTH_SAYING else ""
        out.print(
            f"perplexity on {on['text']}: {before:,.2f} -> {after:,.2f} (x{after / before:.3g}), {on['windows']} "
            f"windows of {on['length']} tokens{seen}",
            markup=False,
        )
