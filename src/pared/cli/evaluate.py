"""``pared eval``: what a model, dense or compressed, is worth."""

from collections.abc import Callable
from typing import Annotated, Any, get_args

import typer

from pared.cli.console import JsonFile, err, errors, quiet_libraries, write_json
from pared.data.files import require_there
from pared.data.labelled import parts_of_task, require_examples
from pared.data.texts import require_text
from pared.entrypoints.kept_results import Kept
from pared.environment import device_of, require_device, require_dtype
from pared.errors import ParedError
from pared.evaluation import TASKS
from pared.evaluation.multiple_choice import CHOICES
from pared.evaluation.protocols import protocol_of
from pared.io.files import path_of
from pared.models.source import find_model
from pared.names import require_known
from pared.schema.recipe import Bos

# What each measure reads of the options, beside --device and --json.
READS = {
    "perplexity": ("length", "windows", "stride", "bos", "dtype"),
    "perplexity --protocol": ("protocol", "dtype"),
    "examples": ("length", "windows", "dtype"),
    "tasks": ("limit", "shots", "samples", "temperature", "allow-code-execution", "dtype"),
    "vqa": ("limit", "dtype"),
    "fine-tune": ("epochs", "learning-rate", "length", "limit"),
}


def evaluate(
    model: Annotated[str, typer.Argument(help="A folder that pared made, or any named model.")],
    perplexity: Annotated[str | None, typer.Option(help="Text to measure perplexity on.")] = None,
    examples: Annotated[
        str | None, typer.Option(help="Labelled examples to label: glue:sst2:dev, ner:wnut17:test, file:PATH.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help=f"Tasks to do, with commas: {', '.join([*CHOICES, *TASKS])}.")
    ] = None,
    vqa: Annotated[
        str | None, typer.Option(help="Questions about images: a .jsonl file of image, question, answers.")
    ] = None,
    fine_tune: Annotated[
        str | None,
        typer.Option(help="Tasks an encoder is fine-tuned for and scored on, with commas: glue:cola, ner:wnut17."),
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Of fine-tuning. [default: 3]")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of fine-tuning. [default: 5e-5]")] = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens in a window (1024), or the most of an example (1024; fine-tuning 128).")
    ] = None,
    windows: Annotated[int | None, typer.Option(help="Windows from the start; all if not given.")] = None,
    stride: Annotated[
        int | None, typer.Option(help="Windows overlap and begin every so many tokens; each counts its last so many.")
    ] = None,
    protocol: Annotated[
        str | None, typer.Option(help="Cut and average as a paper does: svd-llm, basis-sharing, wanda, gptq.")
    ] = None,
    bos: Annotated[
        str | None, typer.Option(help="Beginning-of-sequence token before: none, text, window. [default: none]")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="The most rows (to train on, of fine-tuning), from the first.")
    ] = None,
    shots: Annotated[int | None, typer.Option(help="Examples before a prompt; the task's own if not given.")] = None,
    samples: Annotated[int | None, typer.Option(help="Answers to every prompt of a task. [default: 1]")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Of answers; 0 takes the likeliest token. [default: 0]")
    ] = None,
    allow_code_execution: Annotated[
        bool,
        typer.Option(
            "--allow-code-execution", help="Run the programs a model writes; limits are no security boundary."
        ),
    ] = False,
    dtype: Annotated[str, typer.Option(help="What the model is loaded in; auto keeps what is stored.")] = "auto",
    device: Annotated[str, typer.Option(help="Where it runs.")] = "cpu",
    json_file: JsonFile = None,
) -> None:
    """Measure a model: perplexity on a text, tasks it does, or what an encoder gets right of labelled examples."""
    kept_back = tasks is not None and json_file is not None
    interrupted = "tasks that were done are kept beside the file of --json" if kept_back else "nothing is kept of it"
    with (
        errors(f"interrupted; {interrupted}"),
        Kept(json_file, lambda told: err.print(f"note: {told}", markup=False)) as kept,
    ):
        quiet_libraries()
        given = {
            "perplexity": perplexity,
            "examples": examples,
            "tasks": tasks,
            "vqa": vqa,
            "fine-tune": fine_tune,
        }
        asked = [name for name, value in given.items() if value is not None]
        if len(asked) != 1:
            raise ParedError(f"pass one thing to measure: {', '.join(f'--{name}' for name in given)}")
        options = {
            "length": length, "windows": windows, "stride": stride, "bos": bos, "protocol": protocol,
            "epochs": epochs, "learning-rate": learning_rate, "limit": limit, "shots": shots, "samples": samples,
            "temperature": temperature, "allow-code-execution": allow_code_execution or None,
            "dtype": None if dtype == "auto" else dtype,
        }  # fmt: skip
        _require_read(asked[0] if protocol is None else "perplexity --protocol", options)
        require_device(device)
        require_dtype(dtype)
        if protocol is not None:
            protocol_of(protocol)
        require_known("bos", bos or "none", get_args(Bos))
        _require_there(asked[0], str(given[asked[0]]))
        find_model(model)
        from pared.cli.measures import (
            ask_about_images,
            do_tasks,
            fine_tune_for,
            label,
            perplexity_by_protocol,
            perplexity_on,
        )
        from pared.evaluation import Sampling

        place = device_of(device)
        if perplexity is not None and protocol is not None:
            result = perplexity_by_protocol(model, perplexity, protocol, dtype, place)
        elif perplexity is not None:
            result = perplexity_on(model, perplexity, length, windows, stride, bos or "none", dtype, place)
        elif examples is not None:
            result = label(model, examples, length, windows, dtype, place)
        elif fine_tune is not None:
            from pared.entrypoints.fine_tune_encoder import FineTuning  # the Trainer is seconds to import

            how = {"epochs": epochs, "learning_rate": learning_rate, "length": length, "examples": limit}
            chosen = FineTuning(**{name: value for name, value in how.items() if value is not None})  # type: ignore[arg-type]
            result = fine_tune_for(model, names_of(fine_tune), chosen, place, kept)
        elif vqa is not None:
            result = ask_about_images(model, path_of(vqa), limit, dtype, place)
        else:
            sampling = Sampling(
                temperature=0.0 if temperature is None else temperature, samples=1 if samples is None else samples
            )
            result = do_tasks(
                model, names_of(tasks or ""), limit, shots, sampling, allow_code_execution, dtype, place, kept
            )
        write_json(json_file, {"model": model, **result})
        kept.finish([task["task"] for task in result.get("tasks", ())])


def _require_read(measure: str, options: dict[str, Any]) -> None:
    """Refuse options that a measure does not read."""
    for name, value in options.items():
        if value is not None and name not in READS[measure]:
            raise ParedError(
                f"--{measure} reads no --{name} (found {value}); it reads "
                f"{', '.join(f'--{one}' for one in (*READS[measure], 'device', 'json'))}"
            )


def _require_there(measure: str, named: str) -> None:
    """Refuse what a measure cannot be taken on: an unknown text, task or set of examples, a file that is not there."""
    checks: dict[str, Callable[[str], object]] = {
        "perplexity": require_text,
        "examples": require_examples,
        "tasks": lambda name: require_known("task", name, [*CHOICES, *TASKS]),
        "vqa": lambda name: require_there(path_of(name), "file of questions"),
        "fine-tune": parts_of_task,
    }
    names = names_of(named) if measure in ("tasks", "fine-tune") else [named]
    if not names:
        raise ParedError(f"--{measure} names no task")
    for name in names:
        checks[measure](name)


def names_of(given: str) -> list[str]:
    """Return names that stand between commas, each once."""
    return list(dict.fromkeys(name.strip() for name in given.split(",") if name.strip()))
