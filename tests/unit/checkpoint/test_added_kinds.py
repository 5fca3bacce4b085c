"""A kind of module that another package adds: saved and loaded like pared's own, and missed by name."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from plugin_package import install, installed
from tiny_models import TINY_MODELS
from transformers import AutoModelForCausalLM, PreTrainedModel

import pared
from pared.checkpoint import mark
from pared.checkpoint.format import ParedConfig
from pared.errors import ParedError
from pared.modules import replace_module

CODE = """
    import torch
    from torch import nn


    class HalfStep(nn.Module):
        '''A weight as whole multiples of a step, int8.'''

        def __init__(self, in_features, out_features, bias, step, device=None, dtype=None):
            super().__init__()
            self.in_features, self.out_features, self.step = in_features, out_features, step
            self.register_buffer("steps", torch.empty(out_features, in_features, dtype=torch.int8, device=device))
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None

        @property
        def weight(self):
            return self.steps * self.step

        def forward(self, x):
            return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)

        def entry(self):
            return {"in_features": self.in_features, "out_features": self.out_features, "bias": self.bias is not None,
                    "step": self.step}
"""
NAMED = {"pared.modules": {"half-step": "half_steps:HalfStep"}}
KIND = "half_steps:half-step"
SITE = "model.layers.1.mlp.up_proj"
TOKENS = torch.arange(24).view(2, 12) % 60


def changed() -> PreTrainedModel:
    from half_steps import HalfStep

    model = TINY_MODELS["llama"]()
    old = model.get_submodule(SITE)
    new = HalfStep(old.in_features, old.out_features, False, 0.01)
    new.steps.copy_((old.weight / 0.01).round())
    replace_module(model, SITE, new)
    mark(model)
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(TOKENS).logits


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    return install(tmp_path / "packages", "half_steps", CODE, NAMED)


@pytest.fixture
def folder(packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with installed(packages, monkeypatch):
        changed().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_kind_of_another_package_is_saved_and_loaded(
    packages: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with installed(packages, monkeypatch):
        expected = logits(changed())
        entry = json.loads((folder / "config.json").read_text())["quantization_config"]["modules"][SITE]
        assert entry == {"kind": KIND, "in_features": 32, "out_features": 48, "bias": False, "step": 0.01}
        for model in (pared.load(folder), AutoModelForCausalLM.from_pretrained(folder)):
            assert type(model.get_submodule(SITE)).__name__ == "HalfStep"
            assert torch.equal(logits(model), expected)


def test_where_the_package_is_missing_it_is_named(folder: Path) -> None:
    told = r"up_proj: modules of kind 'half_steps:half-step' are those of package 'half_steps', which is not installed"
    with pytest.raises((ParedError, ValueError), match=told):
        pared.load(folder)


def test_the_loader_in_the_folder_finds_it_without_pared(packages: Path, folder: Path) -> None:
    code = (
        "import sys; sys.modules['pared'] = None\n"
        "import torch; from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)\n"
        f"print(type(model.get_submodule({SITE!r})).__name__)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(packages)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "HalfStep"


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({"kind": "half_steps:half-step", "in_features": 0, "out_features": 4}, "in_features is 0, expected 1 to"),
        ({"kind": "half_steps:half-step", "in_features": 4}, "out_features is None"),
        ({"kind": "half_steps:half-step", "in_features": 4, "out_features": 4, "x": [1]}, r"'x' is \[1\], expected a"),
        ({"kind": "half_steps:other", "in_features": 4, "out_features": 4}, "adds none of that name"),
        ({"kind": "../evil:x y", "in_features": 4, "out_features": 4}, "unknown or malformed"),
    ],
)
def test_an_entry_of_an_added_kind_is_checked(
    entry: dict[str, object], told: str, packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with installed(packages, monkeypatch), pytest.raises(ValueError, match=told):
        ParedConfig(modules={"a": entry})


def test_a_package_that_adds_no_module_or_cannot_be_imported_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = install(tmp_path / "p", "none", "X = 3", {"pared.modules": {"x": "none:X"}})
    install(place, "broken", "raise OSError('no')", {"pared.modules": {"x": "broken:X"}})
    sides = {"in_features": 4, "out_features": 4}
    with installed(place, monkeypatch):
        with pytest.raises(ValueError, match="'none:x': none:X is not a torch module"):
            ParedConfig(modules={"a": {"kind": "none:x", **sides}})
        with pytest.raises(ValueError, match="package 'broken' cannot be imported"):
            ParedConfig(modules={"a": {"kind": "broken:x", **sides}})
