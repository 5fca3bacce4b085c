"""The model card that lies in every folder: what this is, how it was made, how to load it."""

from collections.abc import Mapping
from typing import Any

import yaml

from pared.models.architecture import AUTO_CLASSES
from pared.report.metadata import metadata
from pared.report.table import comparison, learned_from
from pared.schema.manifest import Manifest
from pared.schema.presets import PresetRecord, summary_of
from pared.schema.width import Width

LOADING = """\
With the package `pared`:

```python
import pared  # teaches transformers the format
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("{folder}"{trust})
tokenizer = AutoTokenizer.from_pretrained("{folder}"{trust})
```

Without it, with the loader that lies in this folder:

```python
model = {auto}.from_pretrained("{folder}", trust_remote_code=True)
```

With neither, transformers refuses the folder. `pared doctor {folder}` says how a machine would load it, and
`pared verify {folder}` whether a copy answers as the original did.

"""
PLAIN = """\
It is a plain model of its architecture with smaller layers, which needs nothing but transformers:

```python
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```

"""
LORA = """\
LoRA with PEFT takes the names that the layers have in the dense model:

```python
from peft import LoraConfig, get_peft_model

adapted = get_peft_model(model, LoraConfig(target_modules={targets}))
merged = adapted.merge_and_unload()  # after training
merged.save_pretrained("merged")
```
"""
FEW_BITS = """\
Layers are stored in few bits and multiplied out whenever they run; adapters and training take the folder of before.
"""
SPARSE_LORA = """\
LoRA with PEFT leaves the zeros alone, and this merges under their mask; what the adapter learned where weights are zero
is lost by that:

```python
from peft import LoraConfig, get_peft_model
from pared.training import merge_lora_keeping_zeros

adapted = get_peft_model(model, LoraConfig(target_modules={targets}))
merged = merge_lora_keeping_zeros(adapted)  # after training
merged.save_pretrained("merged")
```
"""


def model_card(manifest: Manifest, folder: str, config: Mapping[str, Any]) -> str:
    """Return the text of ``README.md``, YAML header included.

    Args:
        manifest: of the compression.
        folder: what the loading examples call the folder.
        config: what its ``config.json`` holds.
    """
    recipe = manifest.recipe
    narrow = any(isinstance(site.decision, Width) for site in manifest.plan.sites)
    pruned = recipe.sparsity is not None or recipe.pattern is not None
    table = "\n".join(f"| {row.what} | {row.before} | {row.after} | {row.share} |" for row in comparison(manifest))
    shown = recipe.as_file()
    return "\n".join(
        [
            "---",
            yaml.safe_dump(metadata(manifest, folder, config), sort_keys=False).rstrip(),
            "---",
            "",
            f"# {manifest.model['name']}, {_smaller(manifest):.0%} smaller",
            "",
            f"Made from `{manifest.model['name']}` ({manifest.model['origin']}) by "
            f"pared {manifest.versions['pared']} with the method `{recipe.method}`{_protocol(manifest.preset)}.",
            "",
            "| | before | after | |",
            "|---|---:|---:|---:|",
            table,
            "",
            _measured_on(manifest),
            "",
            *_trained(manifest),
            "## Load",
            "",
            _loading(folder, config)
            if config.get("quantization_config") or not narrow
            else PLAIN.format(folder=folder, auto=_auto_of(config)),
            _adapters(manifest, pruned),
            "## Recipe",
            "",
            "```yaml",
            yaml.safe_dump(shown, sort_keys=False).rstrip(),
            "```",
            "",
            _settled(manifest)
            + _inputs(manifest)
            + "The exact ranks, data digests, versions and timings are in `pared.json`.",
            "",
        ]
    )


def _loading(folder: str, config: Mapping[str, Any]) -> str:
    """Return how to load a folder: by the Auto class that gives the class the configuration names."""
    refs: Mapping[str, str] = config.get("auto_map") or {}
    named = [auto for auto in AUTO_CLASSES if refs.get(auto, "").rpartition(".")[2] in config.get("architectures", ())]
    own = ", trust_remote_code=True" if "AutoConfig" in refs else ""  # transformers cannot read its configuration
    return LOADING.format(folder=folder, auto=named[-1] if named else "AutoModelForCausalLM", trust=own)


def _auto_of(config: Mapping[str, Any]) -> str:
    """Return the Auto class of a plain model, by how transformers calls classes with a head."""
    for own in config.get("architectures") or ():
        for auto in AUTO_CLASSES[1:]:
            if own.endswith(auto.removeprefix("AutoModel")):
                return auto
    return "AutoModelForCausalLM"


def _adapters(manifest: Manifest, pruned: bool) -> str:
    """Return how adapters are trained; a weight in few bits takes none."""
    if any(getattr(site.decision, "quantized", None) for site in manifest.plan.sites):
        return FEW_BITS
    return (SPARSE_LORA if pruned else LORA).format(targets=_targets(manifest))


def _targets(manifest: Manifest) -> str:
    """Return two names for adapters as they are written in Python: queries and values, or the first that there are."""
    plan = manifest.plan
    experts = any(isinstance(site.decision, Width) and site.decision.unit == "expert" for site in plan.sites)
    layers = plan.uncovered if experts else plan.sites  # experts are no linear layers, and these were left alone
    leaves = list(dict.fromkeys(layer.name.rpartition(".")[2] for layer in layers))
    usual = [name for name in ("q_proj", "v_proj") if name in leaves]
    names = usual if len(usual) == 2 else leaves[:2]
    return "[" + ", ".join(f'"{name}"' for name in names) + "]"


def _trained(manifest: Manifest) -> list[str]:
    """Tell of every training since the compression."""
    if not manifest.training:
        return []
    lines = ["## Training", ""]
    for entry in manifest.training:
        tokens = sum(stage["tokens"] for stage in entry.stages)
        text = ", ".join(str(row["text"]) for row in entry.data)
        line = f"- `{entry.tuning.method}` on {tokens:,} tokens of {text}{_protocol(entry.preset)}"
        if entry.evaluation and entry.perplexity_before is not None and entry.perplexity_after is not None:
            line += (
                f"; perplexity on {entry.evaluation['text']}: {entry.perplexity_before:,.2f} before, "
                f"{entry.perplexity_after:,.2f} after"
            )
        lines.append(line)
    return [*lines, ""]


def _protocol(preset: PresetRecord | None) -> str:
    """Tell the preset of a recipe or a training, and what was changed of it."""
    words = summary_of(preset) if preset else ""
    return f", {words}" if words else ""


def _settled(manifest: Manifest) -> str:
    """Say what the recipe's ``auto`` stood for."""
    listed = ", ".join(f"{name} {value}" for name, value in manifest.settled.items())
    return f"`auto` stood for: {listed}. " if listed else ""


def _inputs(manifest: Manifest) -> str:
    """Name the local files and folders of the recipe, which lie somewhere else for a reader who repeats it."""
    listed = ", ".join(f"`{name}` {digest[:16]}…" for name, digest in manifest.inputs.items())
    return f"Local files and folders it names, by their SHA-256: {listed}. " if listed else ""


def _smaller(manifest: Manifest) -> float:
    """Return the fraction of the whole model's parameters that is gone; of its bytes where some are of few bits."""
    before, after = manifest.plan.before, manifest.plan.after
    if any(getattr(site.decision, "quantized", None) for site in manifest.plan.sites):
        return 1 - after.bytes_on_disk / before.bytes_on_disk
    return 1 - after.model_parameters / before.model_parameters


def _measured_on(manifest: Manifest) -> str:
    lines = []
    if manifest.evaluation and manifest.perplexity_after is not None:
        on = manifest.evaluation
        lines.append(f"Perplexity: {on['windows']} windows of {on['length']} tokens of {on['text']} ({on['origin']}).")
        if share := learned_from(manifest):
            lines.append(f"**{share:.0%} of this text was calibrated or trained on**: the perplexity says nothing "
                         "about text the model has not seen.")  # fmt: skip
    if read := manifest.calibration:
        lines.append(
            f"Calibrated on {read['windows']} windows of {read['length']} tokens of {read['text']} ({read['origin']})."
        )
    if any(on["stand_in"] for on in (manifest.evaluation, manifest.calibration) if on is not None):
        lines.append("This text only stands in for a real corpus; do not compare the figures with published ones.")
    if manifest.converted:
        lines.append(f"Converted to {manifest.converted} by `pared convert`, up to rounding the same weights; what "
                     "was measured was measured before.")  # fmt: skip
    if elastic := manifest.elastic:
        lines.append(f"This is the largest of many sizes: `pared slice` cuts any keep from {elastic.least:g} to "
                     f"{elastic.most:g} out of the folder.")  # fmt: skip
    if missed := manifest.plan.missed:
        lines.append(f"{missed[0].upper()}{missed[1:]}.")
    if manifest.plan.uncovered:
        lines.append(
            f"Not targeted: {len(manifest.plan.uncovered)} weights inside the blocks "
            f"({manifest.plan.uncovered_share:.1%} of their parameters), the first is "
            f"`{manifest.plan.uncovered[0].name}` ({manifest.plan.uncovered[0].reason}); `pared.json` lists them."
        )
    return " ".join(lines)
