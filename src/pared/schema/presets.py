"""Protocols of papers by name: what a recipe or a training begins with, as data, compared with what the paper says.

A preset is a file in ``pared/schema/recipes``. What is given beside it wins, and is reported: a result that goes by a
paper's name says where it is not the paper's. Nothing here needs torch.
"""

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import Field, ModelWrapValidatorHandler, ValidationInfo, model_validator
from typing_extensions import Self, TypedDict

from pared.errors import ParedError
from pared.names import called, require_known
from pared.schema.base import Config, Strict, validated
from pared.schema.command_line import Option
from pared.schema.fields import flatten, lies_inside, only, plain, side_by_side, value_at, without_plain_nulls
from pared.schema.options import Kind, untyped

RECORDED = {"recorded": True}  # the context in which what was asked for once is read again, and nothing is added to it
# One of these is a choice: giving one discards the others.
EXCLUSIVE = {
    "compress": ("keep", "keep_bytes", "target_bytes", "rank_fraction", "sparsity", "pattern"),
    "tune": ("epochs", "tokens"),
}
LENGTHS = ("length", "calibration.length", "evaluation.length")  # of a preset, yield as defaults do
# What no protocol is about: names, places, and what changes cost but no result.
NEUTRAL = ("preset", "version", "model", "out", "device", "calibration.batch", "report_to", "checkpoint_every",
        "gradient_checkpointing")  # fmt: skip
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # several times faster, where libyaml is
OF_USE = ("text", "sampling")  # fields of a calibration that a use stands for
ALL_IF_NULL = ("samples", "windows")
DEMO = "demo"  # no paper's protocol
EVALUATION = "evaluation"  # free too, where a preset says nothing of it


class Deviation(TypedDict):
    """A field of a preset that something else was asked for."""

    preset: Any
    given: Any


class PresetRecord(TypedDict):
    """What a manifest holds of a preset: its name, its source, and by dotted field where it was left."""

    name: str
    source: str
    deviations: dict[str, Deviation]


class Setting(Strict):
    """What a paper says of a field, and where."""

    says: Any
    where: str


class Preset(Strict):
    """A protocol by name.

    Attributes:
        name: what users call it.
        command: what it is for: ``compress`` or ``tune``.
        summary: one line for people.
        source: the paper and the code it is read from.
        requires: fields that it leaves to the user, and what to give.
        fields: of the recipe or the training, as in a file.
        paper: of every one of those, by dotted name, what the paper or its code says.
        differences: what the paper or its code does otherwise that no field is of.
    """

    name: str
    command: Literal["compress", "tune"]
    summary: str
    source: str
    requires: dict[str, str] = Field(default={})
    fields: dict[str, Any]
    paper: dict[str, Setting] = Field(default={})
    differences: tuple[str, ...] = ()


class FromPreset(Config):
    """What may begin with a preset: its fields hold where nothing else is given, and it says where it leaves it."""

    COMMAND: ClassVar[Literal["compress", "tune"]]
    TYPED: ClassVar[Mapping[str, tuple[Kind, str]]]
    """By the field of a name, whose options may stand in its place, what it names, and the field of plain options."""
    preset: Annotated[str | None, Option()] = None
    """A protocol by name, which `pared presets` lists; what is given beside it wins and is reported."""

    @model_validator(mode="wrap")
    @classmethod
    def _over_preset(cls, fields: Any, handler: ModelWrapValidatorHandler[Self], info: ValidationInfo) -> Self:
        if not isinstance(fields, Mapping):
            return handler(fields)
        fields = untyped(fields, cls.TYPED)
        if not fields.get("preset") or (info.context or {}).get("recorded"):
            implied = cls.implied(fields)
            made = handler({**fields, **implied})
            made.model_fields_set.difference_update(implied)  # not asked for: it yields to what is laid over it
            return made
        preset = load_preset(str(fields["preset"]), cls.COMMAND)
        made = handler(merged(fields, preset))
        for name in LENGTHS:
            if value_at(preset.fields, name) is not None and value_at(fields, name) is None:
                section, _, leaf = name.rpartition(".")
                owner = getattr(made, section) if section else made
                if owner is not None:
                    owner.model_fields_set.discard(leaf)  # not asked for it: it yields where a model has less
        return made

    @classmethod
    def implied(cls, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the defaults that depend on what is given, where there is no preset: none by default."""
        del fields
        return {}

    @classmethod
    def plain(cls, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return fields with names and plain values in place of typed options.

        Raises:
            ParedError: options of something else, or given twice.
        """
        try:
            return untyped(fields, cls.TYPED)
        except ValueError as error:
            raise ParedError(f"{cls.__name__}: {error}") from None

    def left_beside(self, given: Mapping[str, Any], update: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return what was given and goes with other values; what does not yields."""
        return left_below(given, update, self.COMMAND)

    def deviations(self) -> dict[str, Deviation]:
        """Return where this leaves its preset: by dotted field what the preset has, and what is asked for here.

        A section that only one of the two has is reported as a whole.

        Raises:
            ParedError: there is no preset of its name any more.
        """
        if self.preset is None:
            return {}
        preset = load_preset(self.preset, self.COMMAND)
        asked = self.model_dump(mode="json")
        own = validated(type(self), {"preset": preset.name, **only(asked, preset.requires)}, f"preset {preset.name}")
        its = own.model_dump(mode="json")
        for name in set(EXCLUSIVE[self.COMMAND]) - set(preset.fields):  # a default that was not chosen is none
            default, its[name] = its.get(name), None
            asked[name] = None if asked.get(name) == default else asked[name]
        free = [*NEUTRAL, *preset.requires, *([] if EVALUATION in preset.fields else [EVALUATION])]
        # A benchmark leaves the method and all that is of it to whoever takes part.
        bound = list(preset.fields) if "method" not in preset.fields else [*its, *asked]
        return {
            name: {"preset": before, "given": given}
            for name, before, given in side_by_side(its, asked)
            if before != given and lies_inside(name, bound) and not lies_inside(name, free)
        }

    def as_file(self) -> dict[str, Any]:
        """Return what a file says that asks for the same, without the output folder.

        A field that is null is left out only where it is null, too, when nothing is said of it.
        """
        below = {} if self.preset is None else load_preset(self.preset, self.COMMAND).fields
        default = type(self)().model_dump(mode="json")
        return without_plain_nulls(self.model_dump(mode="json", exclude={"out"}), default, below)


def preset_names() -> list[str]:
    """Return the names of all presets, in order."""
    folder = files("pared.schema.recipes")
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def read_preset(name: str) -> str:
    """Return a preset as its file has it.

    Raises:
        ParedError: there is none of that name.
    """
    require_known("preset", name, preset_names())
    return (files("pared.schema.recipes") / f"{name}.yaml").read_text(encoding="utf-8")


@cache
def load_preset(name: str, command: str | None = None) -> Preset:
    """Return a preset by name.

    Args:
        name: of it.
        command: what it has to be for; any if none is given.

    Raises:
        ParedError: there is none of that name, or it is for another command.
    """
    preset = validated(Preset, {"name": name, **yaml.load(read_preset(name), LOADER)}, f"preset {name}")
    if command is not None and preset.command != command:
        others = ", ".join(one for one in preset_names() if load_preset(one).command == command)
        raise ParedError(f"preset {name!r} is for pared {preset.command}; for pared {command} there are: {others}")
    return preset


def merged(given: Mapping[str, Any], preset: Preset) -> dict[str, Any]:
    """Return the fields of a preset with what was given over them.

    Raises:
        ParedError: another method than the preset's is given.
    """
    method = preset.fields.get("method")  # a benchmark's has none: any goes with it
    if method is not None and given.get("method", method) != method:
        raise ParedError(f"preset {preset.name} is a protocol of method {method}, got method {given['method']!r} "
                         "beside it; leave one of them out")  # fmt: skip
    fields = left_below(preset.fields, given, preset.command)
    for name, value in given.items():
        below, above = fields.get(name), plain(value)
        fields[name] = {**below, **above} if isinstance(below, Mapping) and isinstance(above, Mapping) else value
    return fields


def left_below(
    below: Mapping[str, Any], above: Mapping[str, Any], command: Literal["compress", "tune"]
) -> dict[str, Any]:
    """Return the fields that stay where others are laid over them; those that do not go with the others do not.

    A budget or a length replaces any other, a method or an allocation the options of another one, a fraction of ranks,
    which decides every rank, any allocation, and what a use is calibrated on any text. Without a validation part
    nothing is measured on it.

    Args:
        below: of a preset, a file, or what is copied.
        above: given over them; null is not given.
        command: whose fields they are.
    """
    gone: set[str] = set()
    if any(above.get(name) is not None for name in EXCLUSIVE[command]):
        gone.update(EXCLUSIVE[command])
    if above.get("rank_fraction") is not None:
        gone.update(("allocation", "allocation_options"))
    if above.get("allocation") is not None and below.get("allocation") not in (None, above["allocation"]):
        gone.add("allocation_options")
    if above.get("method") is not None and below.get("method") not in (None, above["method"]):
        gone.add("options")
    if command == "tune" and above.get("validation") == 0:
        gone.update(("evaluate_every", "patience"))
    stays = {name: value for name, value in below.items() if name not in gone}
    if above.get("calibrate_on") is not None and "calibration" in stays:
        section = plain(stays["calibration"])
        if isinstance(section, Mapping):
            stays["calibration"] = {name: value for name, value in section.items() if name not in OF_USE}
    return stays


def require_user_fields(asked: FromPreset) -> None:
    """Refuse what leaves open a field that its preset leaves to the user.

    Raises:
        ParedError: names the field and what to give.
    """
    if asked.preset is None:
        return
    preset = load_preset(asked.preset, asked.COMMAND)
    for name, what in preset.requires.items():
        owner: Any = asked
        *sections, leaf = name.split(".")
        for section in sections:
            owner = getattr(owner, section)
        if leaf not in owner.model_fields_set:
            raise ParedError(f"preset {preset.name} leaves {called(name)} to you: {what}")


def record_of(asked: FromPreset) -> PresetRecord | None:
    """Return what a manifest holds of a preset: its name, its source, and where it was left; none without one."""
    if asked.preset is None:
        return None
    preset = load_preset(asked.preset, asked.COMMAND)
    return {"name": preset.name, "source": preset.source, "deviations": asked.deviations()}


def note_of(asked: FromPreset) -> str:
    """Return what to tell of a preset before anything is done, nothing without one."""
    record = record_of(asked)
    return summary_of(record) if record else ""


def summary_of(record: PresetRecord) -> str:
    """Return in words what :func:`record_of` returned, nothing where no paper's protocol was followed or left."""
    deviations = record["deviations"]
    if not deviations:
        return "" if record["name"] == DEMO else f"preset {record['name']}, unchanged"
    changed = "; ".join(f"{name} {as_text(one['given'], name)} (preset: {as_text(one['preset'], name)})"
                        for name, one in deviations.items())  # fmt: skip
    return f"preset {record['name']}, changed: {changed}"


def as_text(value: Any, name: str = "") -> str:
    """Return a value in words.

    Args:
        value: of a field.
        name: of the field; of some, no number means all there are.
    """
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {as_text(one, name)}" for name, one in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    if value is None and name.rpartition(".")[2] in ALL_IF_NULL:
        return "all"
    if isinstance(value, float):
        return f"{value:g}"
    if value is None or value == "":
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def to_markdown() -> str:
    """Return the page that shows every preset beside its paper, in Markdown."""
    parts = [PAGE]
    for name in preset_names():
        preset = load_preset(name)
        if not preset.paper:
            continue
        heading = f"`pared {preset.command} --preset {name}`: {preset.summary}. {preset.source}."
        parts += [f"\n## {name}\n", heading, "", "| field | preset | paper | where it says so |", "|---|---|---|---|"]
        for field, value in flatten(preset.fields):
            setting = preset.paper[field]
            says = as_text(setting.says, field)
            says = says if setting.says == value else f"**{says}**"
            parts.append(f"| `{field}` | {as_text(value, field)} | {says} | {setting.where} |")
        parts += [f"| `{field}` | left to you | the task's | {what} |" for field, what in preset.requires.items()]
        parts += ["", *(f"- {line}" for line in preset.differences)]
    return "\n".join(parts) + "\n"


PAGE = """\
# Presets: protocols of papers by name

A preset is what a recipe or a training begins with:

```
pared compress MODEL --preset basis-sharing-paper --out SMALLER
pared tune SMALLER --preset basis-sharing-lora --out BETTER
```

In a YAML file it is `preset: NAME`, in Python `pared.Recipe.of({"preset": NAME})`. `pared presets` lists them, `pared
presets NAME` prints one. What is given beside a preset wins, and what does not go with it gives way: another budget,
the options of another allocation, any allocation beside `--rank-fraction`. So does a length that is more than the model
has positions. Where that changes the protocol it is reported, and `pared.json` holds every field, the preset's name and
each deviation. Another method beside a preset is refused, unless the preset is a benchmark's, which names none.

Below, every field of every preset stands beside what the paper or its code says, **bold** where the two are not the
same, and under the table what no field is of. A preset says what is done, not what comes out: none of the papers'
tables was repeated here, as their models were not available. `pared presets --markdown` prints this page."""
