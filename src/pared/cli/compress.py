"""``pared compress``: a model in, a smaller folder out."""

from typing import TYPE_CHECKING

from pared.cli import options
from pared.cli.console import ConsoleProgress, JsonFile, errors, out, print_rows, quiet_libraries, write_json
from pared.engine.early import require_job
from pared.report.table import learned_from
from pared.schema.presets import summary_of

if TYPE_CHECKING:
    from pared.schema.manifest import Manifest

RUINED = 100  # times the perplexity of the dense model


def compress(
    model: options.Model = None,
    recipe: options.RecipeFile = None,
    preset: options.Preset = None,
    method: options.Method = None,
    keep: options.Keep = None,
    rank_fraction: options.RankFraction = None,
    sparsity: options.Sparsity = None,
    pattern: options.Pattern = None,
    skip: options.Skip = None,
    blocks: options.Blocks = None,
    allocation: options.Allocation = None,
    allocation_option: options.AllocationOptions = None,
    storage: options.Storage = None,
    statistics: options.Statistics = None,
    refit: options.Refit = None,
    dense_path: options.DensePath = None,
    option: options.MethodOptions = None,
    data: options.Data = None,
    samples: options.Samples = None,
    length: options.Length = None,
    seed: options.Seed = None,
    sampling: options.Sampling = None,
    calibration_dtype: options.CalibrationDtype = None,
    eval_text: options.Eval = None,
    eval_length: options.EvalLength = None,
    eval_windows: options.EvalWindows = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    out: options.Out = None,
    overwrite: options.Overwrite = False,
    json_file: JsonFile = None,
) -> None:
    """Compress a model and write it as an ordinary Hugging Face folder, checked by reloading."""
    with errors():
        quiet_libraries()
        asked = options.recipe_of(
            recipe,
            {
                "model": model,
                "preset": preset,
                "method": method,
                "keep": keep,
                "rank_fraction": rank_fraction,
                "sparsity": sparsity,
                "pattern": pattern,
                "skip": skip,
                "blocks": blocks,
                "allocation": allocation,
                "allocation_options": options.named_values(allocation_option, "--allocation-option"),
                "storage": storage,
                "statistics": statistics,
                "refit": refit,
                "dense_path": dense_path,
                "options": options.named_values(option),
                "calibration.text": data,
                "calibration.samples": samples,
                "calibration.length": length,
                "calibration.seed": seed,
                "calibration.sampling": sampling,
                "calibration.dtype": calibration_dtype,
                "evaluation.text": eval_text,
                "evaluation.length": eval_length,
                "evaluation.windows": eval_windows,
                "dtype": dtype,
                "device": device,
                "out": out,
            },
        )
        require_job(asked, overwrite)
        from pared.entrypoints.compress import run

        outcome = run(asked, overwrite, ConsoleProgress())
        print_manifest(outcome.manifest, str(outcome.folder))
        write_json(json_file, {"folder": str(outcome.folder), **outcome.manifest.model_dump(mode="json")})


def print_manifest(manifest: "Manifest", folder: str) -> None:
    """Print the table of a finished compression and where it lies."""
    from pared.report import comparison

    print_rows(manifest.model["name"], comparison(manifest))
    if manifest.perplexity_after is not None and manifest.evaluation:
        on = manifest.evaluation
        stand_in = "; only a stand-in for a real corpus" if on["stand_in"] else ""
        share = learned_from(manifest)
        seen = f"; {share:.0%} of it was calibrated or trained on" if share else ""
        out.print(
            f"perplexity on {on['text']}: {on['windows']} windows of {on['length']} tokens{stand_in}{seen}",
            markup=False,
        )
        if manifest.perplexity_before and manifest.perplexity_after > RUINED * manifest.perplexity_before:
            out.print("the model is ruined: try another method, a larger keep or more samples", markup=False)
    seconds = "  ".join(f"{stage} {value:.1f}" for stage, value in manifest.seconds.items())
    out.print(f"seconds by stage: {seconds}", markup=False)
    if manifest.preset and (changed := summary_of(manifest.preset)):
        out.print(changed, markup=False)
    if manifest.plan.missed:
        out.print(manifest.plan.missed, markup=False)
    if manifest.damping:
        read = manifest.calibration
        tokens = read["windows"] * read["length"] if read is not None else 0
        out.print(
            f"{len(manifest.damping)} layers read too little to tell all their inputs apart ({tokens:,} tokens of "
            "calibration text): raise --samples or --length", markup=False
        )  # fmt: skip
    out.print(f"self-check: reloaded, largest relative difference {manifest.self_check:.2g}", markup=False)
    out.print(f"folder: {folder}", markup=False)
