"""``pared eval``: what a model, dense or compressed, is worth."""

from typing import Annotated

import typer

from pared.cli.console import ConsoleProgress, JsonFile, errors, out, quiet_libraries, write_json
from pared.cli.from_schema import Change, Fields, Given, schema_options
from pared.cli.options import Resume
from pared.entrypoints.checks import require_evaluable, task_names
from pared.entrypoints.kept_results import Kept
from pared.schema.evaluate import EvaluationConfig

FIELDS = Fields(EvaluationConfig, changed={"tasks": Change(f"Tasks to do, with commas: {', '.join(task_names())}.")})


@schema_options
def evaluate(
    model: Annotated[str, typer.Argument(help="A folder that pared made, or any named model.")],
    given: Annotated[Given[EvaluationConfig], FIELDS],
    resume: Resume = None,
    json_file: JsonFile = None,
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
        from pared.entrypoints.evaluate import evaluate as measure

        result = measure(model, config, progress, out.print, kept)
        write_json(json_file, {"model": model, **result})
        kept.finish([task["task"] for task in result.get("tasks", ())])
