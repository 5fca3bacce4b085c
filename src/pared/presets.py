"""Protocols of papers by name: what a recipe or a training begins with, as data, beside what the paper says.

A preset is a file in ``pared/recipes``. What is given beside it wins, and is reported: a result that goes by a
paper's name says where it is not the paper's. Nothing here needs torch.
"""

from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files
from typing import Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, Field, ValidationInfo, model_validator

from pared.errors import ParedError
from pared.names import require_known
from pared.strict import Strict, validated

RECORDED = {"recorded": True}  # the context in which what was asked for once is read again, and nothing is added to it
# Of these one is a choice: who gives one beside a preset leaves those of the preset behind.
EXCLUSIVE = {"compress": ("keep", "rank_fraction", "sparsity", "pattern"), "tune": ("epochs", "tokens")}
# What no protocol is about: names, places, and what changes cost but no result.
NEUTRAL = ("preset", "version", "model", "out", "device", "calibration.batch", "report_to", "checkpoint_every",
        "gradient_checkpointing")  # fmt: skip
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # several times faster, where libyaml is
DEMO = "demo"  # nobody's protocol
EVALUATION = "evaluation"  # free too, where a preset says nothing of it


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


class FromPreset(Strict):
    """What may begin with a preset: its fields hold where nothing else is given, and it says where it leaves it.

    Attributes:
        preset: a name that ``pared presets`` lists.
    """

    COMMAND: ClassVar[Literal["compress", "tune"]]
    preset: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _over_preset(cls, fields: Any, info: ValidationInfo) -> Any:
        if not isinstance(fields, Mapping) or not fields.get("preset") or (info.context or {}).get("recorded"):
            return fields
        return merged(fields, load_preset(str(fields["preset"]), cls.COMMAND))

    def deviations(self) -> dict[str, dict[str, Any]]:
        """Return where this leaves its preset: by dotted field what the preset has, and what is asked for here.

        Raises:
            ParedError: there is no preset of its name any more.
        """
        if self.preset is None:
            return {}
        preset = load_preset(self.preset, self.COMMAND)
        asked = self.model_dump(mode="json")
        own = validated(type(self), {"preset": preset.name, **_nested(asked, preset.requires)}, f"preset {preset.name}")
        plain, found = dict(flatten(own.model_dump(mode="json"))), dict(flatten(asked))
        for name in set(EXCLUSIVE[self.COMMAND]) - set(preset.fields):  # a default that nobody chose is none
            default, plain[name] = plain.get(name), None
            found[name] = None if found.get(name) == default else found[name]
        free = [*NEUTRAL, *preset.requires, *([] if EVALUATION in preset.fields else [EVALUATION])]
        return {
            name: {"preset": plain.get(name), "given": found.get(name)}
            for name in {**plain, **found}
            if plain.get(name) != found.get(name) and not _inside(name, free) and not _above(name, {*plain, *found})
        }


def preset_names() -> list[str]:
    """Return the names of all presets, in order."""
    folder = files("pared.recipes")
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def read_preset(name: str) -> str:
    """Return a preset as its file has it.

    Raises:
        ParedError: there is none of that name.
    """
    require_known("preset", name, preset_names())
    return (files("pared.recipes") / f"{name}.yaml").read_text(encoding="utf-8")


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
    method = preset.fields["method"]
    if given.get("method", method) != method:
        raise ParedError(f"preset {preset.name} is a protocol of method {method}, found method {given['method']!r} "
                         "beside it; leave one of them out")  # fmt: skip
    fields = dict(preset.fields)
    choices = EXCLUSIVE[preset.command]
    if any(given.get(name) is not None for name in choices):
        fields = {name: value for name, value in fields.items() if name not in choices}
    for name, value in given.items():
        below, above = fields.get(name), _plain(value)
        fields[name] = {**below, **above} if isinstance(below, Mapping) and isinstance(above, Mapping) else value
    return fields


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
            raise ParedError(f"preset {preset.name} leaves {name} to you: {what}")


def record_of(asked: FromPreset) -> dict[str, Any] | None:
    """Return what a manifest holds of a preset: its name, its source, and where it was left; none without one."""
    if asked.preset is None:
        return None
    preset = load_preset(asked.preset, asked.COMMAND)
    return {"name": preset.name, "source": preset.source, "deviations": asked.deviations()}


def note_of(asked: FromPreset) -> str:
    """Return what to tell of a preset before anything is done, nothing without one."""
    record = record_of(asked)
    return summary_of(record) if record else ""


def summary_of(record: Mapping[str, Any]) -> str:
    """Return in words what :func:`record_of` returned, nothing where no paper's protocol was followed or left."""
    deviations = record["deviations"]
    if not deviations:
        return "" if record["name"] == DEMO else f"preset {record['name']}, unchanged"
    changed = "; ".join(f"{name} {as_text(one['given'])} (preset: {as_text(one['preset'])})"
                        for name, one in deviations.items())  # fmt: skip
    return f"preset {record['name']}, changed: {changed}"


def flatten(fields: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested mappings by dotted name."""
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def as_text(value: Any) -> str:
    """Return a value as a file would have it."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
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
            says = as_text(setting.says) if setting.says == value else f"**{as_text(setting.says)}**"
            parts.append(f"| `{field}` | {as_text(value)} | {says} | {setting.where} |")
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
presets NAME` prints one. What is given beside a preset wins. Where that changes the protocol it is reported, and
`pared.json` holds every field, the preset's name and each deviation. Another method beside a preset is refused.

Below, every field of every preset stands beside what the paper or its code says, **bold** where the two are not the
same, and under the table what no field is of. A preset says what is done, not what comes out: none of the papers'
tables was repeated here, as their models are not at hand. `pared presets --markdown` prints this page."""


def _plain(value: Any) -> Any:
    return value.model_dump(exclude_unset=True) if isinstance(value, BaseModel) else value


def _inside(name: str, wanted: list[str]) -> bool:
    return any(name == one or name.startswith(f"{one}.") for one in wanted)


def _above(name: str, names: set[str]) -> bool:
    """Whether a whole section is told of already, as one of the two has none."""
    return any(name.startswith(f"{other}.") for other in names)


def _nested(asked: Mapping[str, Any], dotted: Mapping[str, str]) -> dict[str, Any]:
    """Return the values of dotted names alone, nested as they were."""
    found: dict[str, Any] = {}
    for name in dotted:
        value: Any = asked
        target = found
        *sections, leaf = name.split(".")
        for section in sections:
            value, target = value[section], target.setdefault(section, {})
        target[leaf] = value[leaf]
    return found
