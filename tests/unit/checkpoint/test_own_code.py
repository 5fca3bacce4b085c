"""Models whose class lies outside of transformers: their code comes along, and runs only where the user allows it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TINY_MODELS, VOCAB
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner

import pared
from pared import ParedError, Recipe
from pared.cli.commands import app
from pared.entrypoints.export import make_dense

TOKENS = torch.randint(0, VOCAB, (2, 16), generator=torch.Generator().manual_seed(1))
CONFIGURATION = """
from transformers import LlamaConfig


class MineConfig(LlamaConfig):
    model_type = "mine_lm"
"""
# One file imports two others, one of which imports a third; the model doubles its logits.
MODELING = """
from transformers import LlamaForCausalLM, LlamaModel
from .configuration_mine import MineConfig
from .scaling_mine import scaled


class MineModel(LlamaModel):
    config_class = MineConfig


class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = scaled(output.logits)
        return output
"""
SCALING = "from .factor_mine import FACTOR\n\n\ndef scaled(logits):\n    return FACTOR * logits\n"
FACTOR = "FACTOR = 2.0\n"
FILES = {"configuration_mine": CONFIGURATION, "modeling_mine": MODELING, "scaling_mine": SCALING, "factor_mine": FACTOR}


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model.eval()(input_ids=TOKENS).logits


def foreign(folder: Path, tokenizer: PreTrainedTokenizerFast, marker: Path | None = None, name: str = "Mine") -> Path:
    """Write a folder whose model is code of its own, which says in a file that it ran."""
    TINY_MODELS["llama"]().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file, text in FILES.items():
        ran = f"open({str(marker)!r}, 'w').close()\n" if marker and file == "modeling_mine" else ""
        (folder / f"{file}.py").write_text(ran + text.replace("MineForCausalLM", f"{name}ForCausalLM"))
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "mine_lm"
    config["architectures"] = [f"{name}ForCausalLM"]
    config["auto_map"] = {
        "AutoConfig": "configuration_mine.MineConfig",
        "AutoModel": "modeling_mine.MineModel",
        "AutoModelForCausalLM": f"modeling_mine.{name}ForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


LOADS = """
import sys, torch
{imports}
from transformers import AutoModelForCausalLM, AutoModel
model = AutoModelForCausalLM.from_pretrained({folder!r}, trust_remote_code=True).eval()
body = AutoModel.from_pretrained({folder!r}, trust_remote_code=True)
assert type(body).__name__ == "MineModel", type(body)
with torch.no_grad():
    torch.save(model(input_ids=torch.load({tokens!r})).logits, {out!r})
model.save_pretrained({again!r})
"""


def loaded_elsewhere(folder: Path, place: Path, imports: str) -> torch.Tensor:
    """Load a folder in a process of its own, and save it again there."""
    torch.save(TOKENS, place / "tokens.pt")
    out, again = str(place / "logits.pt"), str(place / "again")
    source = LOADS.format(imports=imports, folder=str(folder), tokens=str(place / "tokens.pt"), out=out, again=again)
    environment = {**os.environ, "HF_MODULES_CACHE": str(place / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, check=False, cwd=place, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out)


WITHOUT_PARED = "sys.modules['pared'] = None  # a machine without the package"


def test_a_models_own_code_comes_along(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    source = foreign(tmp_path / "source", tokenizer)
    model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
    pared.compress(model, tokenizer, Recipe(method="svd", keep=0.6))
    expected = logits(model)
    folder = tmp_path / "0"
    model.save_pretrained(folder)
    for again in ("1", "2"):
        assert {f"{file}.py" for file in (*FILES, "modeling_pared")} == {file.name for file in folder.glob("*.py")}
        loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        assert torch.equal(logits(loaded), expected)
        assert type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__ == "MineModel"
        folder = tmp_path / again
        loaded.save_pretrained(folder)


@pytest.mark.slow
def test_a_models_own_code_comes_along_and_loads_anywhere(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    source = foreign(tmp_path / "source", tokenizer)
    model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
    pared.compress(model, tokenizer, Recipe(method="svd", keep=0.6))
    expected = logits(model)
    model.save_pretrained(tmp_path / "out")
    assert {f"{file}.py" for file in FILES} < {file.name for file in (tmp_path / "out").iterdir()}
    here = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    torch.testing.assert_close(logits(here), expected)
    torch.testing.assert_close(loaded_elsewhere(tmp_path / "out", tmp_path, WITHOUT_PARED), expected)
    torch.testing.assert_close(loaded_elsewhere(tmp_path / "again", tmp_path, "import pared"), expected)


def test_a_whole_job_on_own_code_needs_to_be_allowed(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    source = foreign(tmp_path / "source", tokenizer, marker)
    recipe = Recipe(model=str(source), out=str(tmp_path / "out"), method="svd", keep=0.6, evaluation=None)
    for refused in (
        lambda: pared.run(recipe),
        lambda: pared.load(source),
        lambda: pared.load(source, trust_remote_code=False),
    ):
        with pytest.raises(ParedError, match=r"code of its own.*trust_remote_code=True"):
            refused()
    assert not marker.exists()
    assert not (tmp_path / "out").exists()
    outcome = pared.run(recipe, trust_remote_code=True)
    assert marker.exists()
    assert outcome.manifest.self_check == 0
    with pytest.raises(ParedError, match="trust_remote_code=True"):
        pared.verify(outcome.folder)
    assert pared.verify(outcome.folder, trust_remote_code=True) == 0
    assert type(pared.load(outcome.folder, trust_remote_code=True)).__name__ == "MineForCausalLM"


def test_own_code_named_as_a_class_of_transformers_stays_own(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    source = foreign(tmp_path / "source", tokenizer, name="GPTNeoX")
    outcome = pared.run(
        Recipe(model=str(source), out=str(tmp_path / "out"), method="svd", keep=0.6, evaluation=None),
        trust_remote_code=True,
    )
    assert outcome.manifest.self_check == 0
    again = pared.load(outcome.folder, trust_remote_code=True)
    assert hasattr(again.model.layers[0], "mlp")  # a llama inside


def test_a_dense_export_of_own_code_loads(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    source = foreign(tmp_path / "source", tokenizer)
    recipe = Recipe(model=str(source), out=str(tmp_path / "out"), method="svd", keep=0.6, evaluation=None)
    pared.run(recipe, trust_remote_code=True)
    model = pared.load(tmp_path / "out", trust_remote_code=True)
    expected = logits(model)
    make_dense(model).save_pretrained(tmp_path / "dense")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", trust_remote_code=True)
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-4)


class NotebookConfig(LlamaConfig):
    model_type = "notebook_lm"


class NotebookForCausalLM(LlamaForCausalLM):
    config_class = NotebookConfig


def tiny_of(kind: Any, config: Any) -> PreTrainedModel:
    sizes: Any = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                  "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    return kind(config(**sizes)).eval()


def test_a_class_defined_in_a_notebook_loads_by_itself(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for cls in (NotebookConfig, NotebookForCausalLM):
        monkeypatch.setattr(cls, "__module__", "__main__")
    model = tiny_of(NotebookForCausalLM, NotebookConfig)
    pared.compress(model, tokenizer, Recipe(method="svd", keep=0.6))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert not json.loads((tmp_path / "config.json").read_text()).get("auto_map")
    torch.testing.assert_close(logits(NotebookForCausalLM.from_pretrained(tmp_path)), expected)


@pytest.mark.slow
def test_a_class_of_a_package_that_is_registered_runs_the_whole_road(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "their_package.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n\n"
        "class TheirConfig(LlamaConfig):\n    model_type = 'their_lm'\n\n\n"
        "class TheirForCausalLM(LlamaForCausalLM):\n    config_class = TheirConfig\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import their_package  # type: ignore[import-not-found]

    AutoConfig.register("their_lm", their_package.TheirConfig)
    AutoModelForCausalLM.register(their_package.TheirConfig, their_package.TheirForCausalLM)
    tiny_of(their_package.TheirForCausalLM, their_package.TheirConfig).save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    recipe = Recipe(model=str(tmp_path / "source"), out=str(tmp_path / "out"), method="svd", keep=0.6, evaluation=None)
    assert pared.run(recipe).manifest.self_check == 0
    assert pared.verify(tmp_path / "out") == 0
    torch.save(TOKENS, tmp_path / "tokens.pt")
    script = (
        f"import sys, torch\nsys.path.insert(0, {str(tmp_path)!r})\nsys.modules['pared'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r}, trust_remote_code=True).eval()\n"
        f"torch.save(model(input_ids=torch.load({str(tmp_path / 'tokens.pt')!r})).logits, {str(tmp_path / 'l.pt')!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    torch.testing.assert_close(
        torch.load(tmp_path / "l.pt"), logits(pared.load(tmp_path / "out")), rtol=1e-4, atol=1e-4
    )


COMMANDS = {
    "plan": ["plan", "MODEL", "--keep", "0.5"],
    "compress": ["compress", "MODEL", "--method", "svd", "--eval", "none", "--out", "OUT"],
    "verify": ["verify", "MODEL"],
    "export": ["export", "MODEL", "--to", "dense", "--out", "OUT"],
    "eval": ["eval", "MODEL", "--perplexity", "embedded"],
    "fine-tune": ["eval", "MODEL", "--fine-tune", "glue:cola"],
    "tune": ["tune", "MODEL", "--method", "full", "--out", "OUT"],
    "bench": ["bench", "MODEL"],
    "search": ["search", "MODEL", "--method", "magnitude", "--sparsity", "0.5", "--out", "OUT"],
    "diagnose": ["diagnose", "rank-groups", "MODEL"],
}


@pytest.fixture(scope="module")
def hostile(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder whose code leaves a mark when it runs: of the configuration, the model, and the tokenizer."""
    place = tmp_path_factory.mktemp("hostile")
    source, marker = place / "source", place / "ran"
    foreign(source, tokenizer, marker)
    for file in ("configuration_mine", "tokenization_mine"):
        text = (source / f"{file}.py").read_text() if (source / f"{file}.py").exists() else ""
        (source / f"{file}.py").write_text(f"open({str(marker)!r}, 'w').close()\n{text}")
    told = json.loads((source / "tokenizer_config.json").read_text())
    told["auto_map"] = {"AutoTokenizer": ["tokenization_mine.MineTokenizer", None]}
    (source / "tokenizer_config.json").write_text(json.dumps(told))
    return source, marker


@pytest.mark.parametrize("command", COMMANDS)
def test_a_pipe_allows_no_code(command: str, hostile: tuple[Path, Path], tmp_path: Path) -> None:
    source, marker = hostile
    words = [{"MODEL": str(source), "OUT": str(tmp_path / "out")}.get(word, word) for word in COMMANDS[command]]
    result = CliRunner().invoke(app, words, input="y\n" * 20)
    assert result.exit_code == 2, result.output
    assert not marker.exists()
    if command != "verify":  # which misses the manifest first
        assert "--trust-remote-code" in result.stderr


def test_the_option_of_a_command_lets_code_run(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    source = foreign(tmp_path / "source", tokenizer, marker)
    out = str(tmp_path / "out")
    words = ["compress", str(source), "--method", "svd", "--eval", "none", "--out", out]
    assert CliRunner().invoke(app, words).exit_code == 2
    assert not marker.exists()
    result = CliRunner().invoke(app, [*words, "--trust-remote-code"])
    assert result.exit_code == 0, result.output
    assert CliRunner().invoke(app, ["verify", out], input="y\n").exit_code == 2
    assert CliRunner().invoke(app, ["verify", out, "--trust-remote-code"]).exit_code == 0


def test_what_pared_makes_of_a_known_model_runs_no_code_of_its_folder(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = TINY_MODELS["llama"]()
    pared.compress(model, tokenizer, Recipe(method="svd", keep=0.6))
    model.save_pretrained(tmp_path)
    marker = tmp_path / "ran"
    (tmp_path / "modeling_pared.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    assert type(pared.load(tmp_path)).__name__ == "LlamaForCausalLM"
    assert not marker.exists()
