"""What the user asked for of a measurement: what to measure, and how."""

from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BeforeValidator, model_validator
from typing_extensions import Self

from pared.errors import ParedError
from pared.names import called, is_told_in_flags, require_known
from pared.schema.base import Config, Whole
from pared.schema.command_line import Option
from pared.schema.recipe import Bos, Device, TextName

# The options that each measure reads, besides the device.
READS: dict[str, tuple[str, ...]] = {
    "perplexity": ("length", "windows", "stride", "bos", "against", "dtype"),
    "perplexity protocol": ("protocol", "against", "dtype"),
    "examples": ("length", "windows", "batch_size", "dtype"),
    "tasks": ("limit", "shots", "samples", "temperature", "batch_size", "allow_code_execution", "against", "dtype"),
    "vqa": ("limit", "batch_size", "dtype"),
    "fine_tune": ("epochs", "learning_rate", "length", "limit"),
}
MEASURES = tuple(name for name in READS if " " not in name)
TOGETHER = ("perplexity", "tasks")  # that one run may do both of


def _split(value: Any) -> Any:
    """Return names that stand between commas, in one text or several, each once."""
    if value is None:
        return None
    pieces = [value] if isinstance(value, str) else value
    if not isinstance(pieces, (list, tuple)) or not all(isinstance(piece, str) for piece in pieces):
        raise ValueError(f"expected names, in a list or in one text with commas; got {value!r}")
    names = (name.strip() for piece in pieces for name in piece.split(","))
    return tuple(dict.fromkeys(name for name in names if name))


def _known_bos(value: Any) -> Any:
    if value is not None:
        require_known("bos", str(value), get_args(Bos))
    return value


def _number_or_auto(value: Any) -> Any:
    """Return a number that is written as a text, as on the command line; whole ones from 1."""
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    if number == "auto" or (isinstance(number, int) and not isinstance(number, bool) and number > 0):
        return number
    raise ValueError(f"batch_size: expected a whole number from 1, or auto; got {value!r}")


BatchRows = int | Literal["auto"]
Names = Annotated[tuple[str, ...], BeforeValidator(_split)]


class EvaluationConfig(Config):
    """What is measured of a model: perplexity, tasks or both; examples; questions about images; fine-tuning."""

    NOUN: ClassVar[str] = "evaluation"
    perplexity: Annotated[TextName | None, Option()] = None
    """Text to measure perplexity on."""
    examples: Annotated[str | None, Option()] = None
    """Labelled examples to label: glue:sst2:dev, ner:wnut17:test, file:PATH."""
    tasks: Annotated[Names | None, Option()] = None
    """Tasks to do, with commas, by the names that `pared eval --help` lists."""
    vqa: Annotated[str | None, Option(path=True)] = None
    """Questions about images: vqav2, textvqa, scienceqa, or a .jsonl file of image, question, answers."""
    fine_tune: Annotated[Names | None, Option()] = None
    """Tasks an encoder is fine-tuned for and scored on, with commas: glue:cola, ner:wnut17."""
    epochs: Annotated[float | None, Option(default="3")] = None
    """Epochs of fine-tuning."""
    learning_rate: Annotated[float | None, Option(default="5e-5")] = None
    """Learning rate of fine-tuning."""
    length: Annotated[Whole | None, Option(default="1024; fine-tuning 128")] = None
    """Tokens in a window, or the most of an example."""
    windows: Annotated[Whole | None, Option(default="all")] = None
    """Windows, or examples, from the start."""
    stride: Annotated[Whole | None, Option()] = None
    """Windows overlap and begin every so many tokens; each counts its last so many."""
    protocol: Annotated[str | None, Option()] = None
    """Cut and average as a paper does: svd-llm, basis-sharing, wanda, gptq."""
    bos: Annotated[Annotated[Bos, BeforeValidator(_known_bos)] | None, Option(default="none")] = None
    """Beginning-of-sequence token before: none, text, window."""
    limit: Annotated[Whole | None, Option(default="all")] = None
    """The most rows (to train on, of fine-tuning), from the first."""
    shots: Annotated[Whole | None, Option(default="the task's own")] = None
    """Examples before a prompt."""
    samples: Annotated[Whole | None, Option(default="1")] = None
    """Answers to every prompt of a task."""
    temperature: Annotated[float | None, Option(default="0")] = None
    """Temperature of answers; 0 takes the likeliest token."""
    batch_size: Annotated[
        Annotated[BatchRows, BeforeValidator(_number_or_auto)] | None, Option(default="8; of examples 32, of images 4")
    ] = None
    """Rows that go through the model at a time, or auto for as many as memory holds; results do not depend on it."""
    allow_code_execution: Annotated[bool, Option()] = False
    """Run the programs a model writes; limits are no security boundary."""
    against: Annotated[str | None, Option()] = None
    """Also compare with this model, or with the .json file of an earlier --json: paired differences, row by row."""
    dtype: Annotated[str, Option()] = "auto"
    """What the model is loaded in; auto keeps what is stored."""
    device: Annotated[Device, Option()] = "auto"
    """Where it runs; auto takes the GPU (CUDA) where there is one."""

    @model_validator(mode="after")
    def _known_measures(self) -> Self:
        asked = self.measures
        if len(asked) != 1 and asked != TOGETHER:
            raise ParedError(f"pass one thing to measure: {', '.join(map(called, MEASURES))}; or both "
                             f"{' and '.join(map(called, TOGETHER))}")  # fmt: skip
        protocol = {"perplexity": "perplexity protocol"} if self.protocol is not None and "perplexity" in asked else {}
        kinds = [protocol.get(name, name) for name in asked]
        reads = tuple(dict.fromkeys(name for kind in kinds for name in READS[kind]))
        always = ("device", "json") if is_told_in_flags() else ("device",)
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if name not in (*MEASURES, *reads, "device") and value != field.default:
                raise ParedError(
                    f"{' '.join(called(word) for kind in kinds for word in kind.split())} reads no {called(name)} (got "
                    f"{value}); it reads {', '.join(map(called, (*reads, *always)))}"
                )
        if any(getattr(self, name) == () for name in asked):
            raise ParedError(f"{called(asked[0])} names no task")
        return self

    @property
    def measures(self) -> tuple[str, ...]:
        """The names of what is measured."""
        return tuple(name for name in MEASURES if getattr(self, name) is not None)

    @property
    def measure(self) -> str:
        """What is measured, in words: the name, or two with ``and`` between them."""
        return " and ".join(self.measures)
