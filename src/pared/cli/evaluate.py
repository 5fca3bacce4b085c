"""``pared eval``: what a model, dense or compressed, is worth."""

from typing import Annotated

import typer

from pared.cli.console import ConsoleProgress, JsonFile, LmEvalFile, errors, out, quiet_libraries, write_json
from pared.cli.from_schema import Change, Fields, Given, schema_options
from pared.cli.options import Resume
from pared.entrypoints.checks import require_evaluable, task_names
from pared.entrypoints.evaluation.kept_results import Kept
from pared.errors import ParedError
from pared.schema.evaluate import TOGETHER, EvaluationConfig

FIELDS = Fields(EvaluationConfig, changed={"tasks": Change(f"Tasks to do, with commas: {', '.join(task_names())}.")})


@schema_options
def evaluate(
    model: Annotated[str, typer.Argument(help="A folder that pared made, or any named model.")],
    given: Annotated[Given[EvaluationConfig], FIELDS],
    resume: Resume = None,
    json_file: JsonFile = None,
    lm_eval_file: LmEvalFile = None,
) -> None:
    """Measure a model: perplexity on a text, tasks, or how an encoder scores on labelled examples."""
    kept_back = given.values["tasks"] and json_file is not None
    left = (
        "tasks that were done are kept beside the file of --json, and --resume continues"
        if kept_back
        else "nothing is kept of it"
    )
    progress = ConsoleProgress()
    with errors(left), Kept(json_file, progress.note, resume) as kept:
        quiet_libraries()
        config = given.merged()
        require_evaluable(model, config)
        if lm_eval_file is not None and not set(config.measures) <= set(TOGETHER):
            raise ParedError(f"--lm-eval-json holds a perplexity and tasks, got {config.measure}; use --json")
        from pared.entrypoints.evaluate import evaluate as measure

        result = measure(model, config, progress, out.print, kept)
        if lm_eval_file is not None:
            from pared.report.lm_eval import in_lm_eval_layout

            write_json(lm_eval_file, in_lm_eval_layout({"model": model, **result}), "--lm-eval-json")
        write_json(json_file, {"model": model, **result})
        kept.finish(["perplexity", *(task["task"] for task in result.get("tasks", ()))])
