"""LoRA on compressed models by the usual names of the layers."""

import copy
import importlib
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from tiny_models import TINY_MODELS, VOCAB
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import pared
from pared import Recipe
from pared.checkpoint import mark, module_map
from pared.checkpoint.portable import _describe_anew
from pared.engine.install import install_group
from pared.lowrank import Factors
from pared.modules import BasisHolder, LowRankLinear, SparseLinear, replace_module
from pared.modules.adapters import adapter_class

TOKENS = torch.randint(0, VOCAB, (2, 16), generator=torch.Generator().manual_seed(1))
KINDS: dict[str, dict[str, Any]] = {
    "factors": {"method": "svd", "keep": 0.6, "storage": "factors"},
    "pivoted": {"method": "svd", "keep": 0.6, "storage": "pivoted"},
    "sparse": {"method": "magnitude", "sparsity": 0.5},
    "2:4": {"method": "magnitude", "pattern": "2:4"},
}
Made = Callable[[str], PreTrainedModel]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=TOKENS).logits


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return float((found - expected).norm() / expected.norm()) < tolerance


def share_bases(model: PreTrainedModel, pivoted: bool) -> None:
    """Give the queries and the values of all blocks one basis of rank 12 each."""
    for leaf in ("q_proj", "v_proj"):
        names = [name for name, _ in model.named_modules() if name.endswith(leaf)]
        stacked = torch.cat([model.get_submodule(name).weight.detach() for name in names])
        U, S, V = torch.linalg.svd(stacked, full_matrices=False)
        install_group(model, names, Factors(V[:12], U[:, :12] * S[:12]), pivoted)
    mark(model)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Callable[[str], Path]:
    """A compressed folder of every kind, made once: llama, and qwen2 with biases."""
    made: dict[str, Path] = {}

    def folder_of(kind: str) -> Path:
        if kind not in made:
            family, kind_of = ("qwen2", kind.removeprefix("bias ")) if kind.startswith("bias ") else ("llama", kind)
            model = TINY_MODELS[family]()
            if kind_of.startswith("shared"):
                share_bases(model, pivoted=kind_of.endswith("pivoted"))
            else:
                pared.compress(model, tokenizer, Recipe(**KINDS[kind_of]))
            made[kind] = tmp_path_factory.mktemp(kind.replace(":", "_").replace(" ", "_"))
            model.save_pretrained(made[kind])
        return made[kind]

    return folder_of


def loaded(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def adapted(model: PreTrainedModel, adapter: str = "default", **config: Any) -> Any:
    """Put an adapter of random numbers on ``q_proj`` and ``v_proj``."""
    asked = LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **config})
    result: Any = get_peft_model(model, asked, adapter_name=adapter)
    randomise(result)
    return result


def randomise(model: Any) -> None:
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)


ALL = ["factors", "pivoted", "shared", "shared pivoted", "sparse", "2:4", "bias factors", "bias pivoted"]


@pytest.mark.parametrize("kind", ALL)
def test_an_adapter_by_the_usual_names_trains_saves_loads_and_merges_exactly(
    kind: str, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    model = loaded(folders(kind))
    dense = logits(model)
    with_adapter = adapted(model)
    before = {name: p.clone() for name, p in with_adapter.named_parameters() if p.requires_grad}
    assert before
    assert all("lora_" in name for name in before)
    with_adapter(input_ids=TOKENS, labels=TOKENS).loss.backward()
    torch.optim.SGD([p for p in with_adapter.parameters() if p.requires_grad], lr=0.1).step()
    assert all(not torch.equal(p, before[name]) for name, p in with_adapter.named_parameters() if p.requires_grad)
    expected = logits(with_adapter)
    assert not close(expected, dense, 1e-3)
    with with_adapter.disable_adapter():
        assert torch.equal(logits(with_adapter), dense)
    with_adapter.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(loaded(folders(kind)), tmp_path)
    assert close(logits(again), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again.merge_adapter()
        pruned = any(isinstance(module, SparseLinear) for module in again.modules())
        expected_merged = logits(again) if pruned else expected  # what an adapter adds to pruned weights is lost
        assert close(logits(again), expected_merged)
        again.unmerge_adapter()
        assert close(logits(again), expected)
        merged = again.merge_and_unload()
    assert close(logits(merged), expected_merged)
    assert type(merged).__name__ == type(model).__name__
    assert not any("lora" in name for name, _ in merged.named_modules())


@pytest.mark.parametrize("kind", ["sparse", "2:4"])
@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
def test_a_merge_into_pruned_layers_keeps_their_zeros_says_so_and_is_saved(
    kind: str, config: dict[str, Any], folders: Callable[[str], Path], tmp_path: Path
) -> None:
    """Regression: a merge filled the zeros, and only saving, at the very end, refused the model."""
    model = loaded(folders(kind))
    masks = {name: module.mask for name, module in model.named_modules() if isinstance(module, SparseLinear)}
    old = {name: model.get_submodule(name).weight.clone() for name in masks}
    with_adapter = adapted(model, **config)
    with pytest.warns(UserWarning, match="what it adds where weights are zero is lost"):
        merged = with_adapter.merge_and_unload()
    for name, mask in masks.items():
        weight = merged.get_submodule(name).weight
        assert not weight[~mask].any()
        assert torch.equal(weight, old[name]) == name.endswith(
            ("k_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        )
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(loaded(tmp_path)), logits(merged))


def test_unmerging_gives_pruned_layers_their_zeros_back(folders: Callable[[str], Path]) -> None:
    model = loaded(folders("sparse"))
    with_adapter = adapted(model)
    before = logits(with_adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with_adapter.merge_adapter()
    with_adapter.unmerge_adapter()
    assert close(logits(with_adapter), before)
    for module in with_adapter.modules():
        if isinstance(module, SparseLinear):
            assert not module.weight[~module.mask].any()


@pytest.mark.parametrize("kind", ["factors", "pivoted", "shared", "shared pivoted", "bias factors"])
@pytest.mark.filterwarnings("ignore:an adapter is merged")
def test_a_merged_model_saves_with_its_new_ranks(kind: str, folders: Callable[[str], Path], tmp_path: Path) -> None:
    model = loaded(folders(kind))
    old = module_map(model)
    with_adapter = adapted(model)
    expected = logits(with_adapter)
    merged = with_adapter.merge_and_unload()
    merged.save_pretrained(tmp_path)
    again = loaded(tmp_path)
    assert close(logits(again), expected)
    for name, entry in module_map(again).items():
        changed = name.endswith(("q_proj", "v_proj"))
        assert entry["rank"] == old[name]["rank"] + 2 * changed
        assert entry["kind"] == ("low_rank" if changed else old[name]["kind"])


def test_merging_into_one_member_leaves_a_shared_basis_as_it_was(
    folders: Callable[[str], Path], tmp_path: Path
) -> None:
    model = loaded(folders("shared"))
    first = next(name for name, module in model.named_modules() if getattr(module, "shares", None) and "q_proj" in name)
    basis = model.get_submodule(first).down.weight
    stored = basis.detach().clone()
    with_adapter = adapted(model, target_modules=[first])
    expected = logits(with_adapter)
    with pytest.warns(UserWarning, match="factors of its own"):
        merged = with_adapter.merge_and_unload()
    assert torch.equal(basis, stored)
    assert close(logits(merged), expected)
    merged.tie_weights()
    assert close(logits(merged), expected)
    merged.save_pretrained(tmp_path)
    assert close(logits(loaded(tmp_path)), expected)


def test_unmerging_gives_the_very_factors_back(folders: Callable[[str], Path]) -> None:
    model = loaded(folders("pivoted"))
    dense = logits(model)
    with_adapter = adapted(model)
    with_adapter.merge_adapter()
    with_adapter.unmerge_adapter()
    with with_adapter.disable_adapter():
        assert torch.equal(logits(with_adapter), dense)


@pytest.mark.parametrize("kind", ["factors", "pivoted", "shared", "bias factors"])
@pytest.mark.filterwarnings("ignore:an adapter is merged")
def test_a_model_cast_between_merging_and_unmerging_could_not_run(kind: str, folders: Callable[[str], Path]) -> None:
    """Regression: what was kept for unmerging stayed in the old dtype."""
    with_adapter = adapted(loaded(folders(kind)))
    expected = logits(with_adapter.to(torch.bfloat16))
    with_adapter.to(torch.float32).merge_adapter()
    with_adapter.to(torch.bfloat16)
    with_adapter.unmerge_adapter()
    assert {parameter.dtype for parameter in with_adapter.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(with_adapter), expected)


def test_a_configuration_of_an_adapter_could_not_be_unpickled() -> None:
    """Regression: it held a class that another process found under no name, whatever model it was for."""
    content = pickle.dumps(LoraConfig(r=3, target_modules=["q_proj"]))
    assert b"peft.tuners.lora.config" in content
    assert b"pared" not in content


UNPICKLES = """
import pickle, sys
{imports}
with open({path!r}, "rb") as file:
    found = pickle.load(file)
print(type(found).__name__)
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", ["configuration", "model"])
def test_what_has_adapters_is_unpickled_in_another_process(
    what: str, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    alone = what == "configuration"
    found: Any = LoraConfig(r=3, target_modules=["q_proj"]) if alone else adapted(loaded(folders("factors")))
    (tmp_path / "found").write_bytes(pickle.dumps(found))
    without = "sys.modules['pared'] = None  # a machine without it" if alone else ""
    code = UNPICKLES.format(path=str(tmp_path / "found"), imports=without)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == f"{type(found).__name__}\n", done.stderr


def test_the_class_of_an_adapter_is_found_by_its_name() -> None:
    module = importlib.import_module(adapter_class().__module__)
    assert getattr(module, adapter_class().__name__) is adapter_class()
    assert pickle.loads(pickle.dumps(adapter_class())) is adapter_class()


def test_a_configuration_that_was_copied_or_unpickled_knows_our_layers(folders: Callable[[str], Path]) -> None:
    class Mine(torch.nn.Module):
        pass

    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    for one in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert logits(get_peft_model(loaded(folders("factors")), one)).isfinite().all()
    config._register_custom_module({Mine: Mine})
    # Loaders that came with folders add their own classes.
    assert config._custom_modules.items() >= {Mine: Mine, BasisHolder: adapter_class()}.items()
    assert LoraConfig()._custom_modules.get(BasisHolder) is adapter_class()
    assert Mine not in LoraConfig()._custom_modules


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": r".*self_attn\.(q|v)_proj"},
        {"target_modules": r".*(q_proj|v_proj).*"},
        {"target_modules": "all-linear"},
        {"use_rslora": True, "lora_alpha": 7},
        {"lora_dropout": 0.3},
        {"modules_to_save": ["lm_head"]},
        {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 5}},
        {"layers_to_transform": [1]},
        {"init_lora_weights": "gaussian"},
        {"target_modules": ["q_proj", "up", "lm_head"]},
        {"target_modules": ["q_proj", "q_proj.up"]},
    ],
    ids=str,
)
def test_every_way_to_ask_for_adapters_works_and_merges(config: dict[str, Any], folders: Callable[[str], Path]) -> None:
    with_adapter = adapted(loaded(folders("factors")), **config).eval()
    expected = logits(with_adapter)
    assert close(logits(with_adapter.merge_and_unload(safe_merge=True)), expected)


def test_several_adapters_are_switched_and_merged_together(folders: Callable[[str], Path]) -> None:
    with_adapter = adapted(loaded(folders("factors")), "one")
    with_adapter.add_adapter("two", LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    randomise(with_adapter)
    one = logits(with_adapter)
    with_adapter.set_adapter("two")
    two = logits(with_adapter)
    assert not close(one, two, 1e-3)
    with_adapter.base_model.set_adapter(["one", "two"])
    both = logits(with_adapter)
    with_adapter.set_adapter("one")
    assert torch.equal(logits(with_adapter), one)
    assert close(logits(with_adapter.merge_and_unload(adapter_names=["one", "two"])), both)


def test_an_adapter_wider_than_the_layer_merges_into_no_more_than_the_whole_weight(
    folders: Callable[[str], Path],
) -> None:
    with_adapter = adapted(loaded(folders("factors")), r=40)
    expected = logits(with_adapter)
    merged = with_adapter.merge_and_unload()
    assert close(logits(merged), expected)
    entries = module_map(merged).values()
    assert all(entry["rank"] <= min(entry["in_features"], entry["out_features"]) for entry in entries)


@pytest.mark.parametrize(
    "config", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}], ids=str
)
def test_what_is_more_than_two_added_matrices_is_refused(
    config: dict[str, Any], folders: Callable[[str], Path]
) -> None:
    with pytest.raises(ValueError, match="factorised layer"):
        adapted(loaded(folders("factors")), **config)


def test_an_adapted_model_can_be_copied(folders: Callable[[str], Path]) -> None:
    with_adapter = adapted(loaded(folders("factors")))
    assert torch.equal(logits(copy.deepcopy(with_adapter)), logits(with_adapter))


def test_a_model_compressed_in_memory_takes_adapters_too(tokenizer: PreTrainedTokenizerFast) -> None:
    model = TINY_MODELS["llama"]()
    pared.compress(model, tokenizer, Recipe(method="svd", keep=0.6))
    with_adapter = adapted(model)
    expected = logits(with_adapter)
    merged = with_adapter.merge_and_unload()
    assert close(logits(merged), expected)
    assert any(isinstance(module, LowRankLinear) for module in merged.modules())


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_an_adapter_records_the_class_of_transformers(
    task: str | None, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    with_adapter = adapted(loaded(folders("factors")), task_type=task)
    with_adapter.save_pretrained(tmp_path)
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    assert close(logits(again), logits(with_adapter))


# Layers that were put in the place of others after loading.


def replaced(model: PreTrainedModel, name: str) -> None:
    """Put a plain linear layer of other numbers where a compressed one stands."""
    old = model.get_submodule(name)
    torch.manual_seed(7)
    replace_module(model, name, torch.nn.Linear(old.in_features, old.out_features, bias=old.up.bias is not None))


@pytest.mark.parametrize("kind", ["factors", "pivoted", "shared", "shared pivoted", "bias factors"])
@pytest.mark.parametrize("which", [0, 1])
def test_a_layer_made_dense_again_was_filled_with_random_numbers(
    kind: str, which: int, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    """Regression: the map kept the entry of what stood there before, and the weights had another name."""
    model = loaded(folders(kind))
    name = [name for name in module_map(model) if name.endswith("q_proj")][which]
    replaced(model, name)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    again = loaded(tmp_path)
    assert isinstance(again.get_submodule(name), torch.nn.Linear)
    assert module_map(again).keys() == module_map(loaded(folders(kind))).keys() - {name}
    assert torch.equal(logits(again), expected)


@pytest.mark.parametrize("kind", ["factors", "shared pivoted"])
@pytest.mark.filterwarnings("ignore:an adapter is merged")
def test_a_merged_model_loaded_by_the_loader_of_its_folder_kept_its_old_ranks(
    kind: str, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    """Regression: where the package is there too, the folder's own code did not know the modules as its own."""
    model = AutoModelForCausalLM.from_pretrained(folders(kind), trust_remote_code=True).eval()
    merged = adapted(model).merge_and_unload()
    expected = logits(merged)
    merged.save_pretrained(tmp_path)
    assert close(logits(loaded(tmp_path)), expected)


def test_a_model_that_lost_its_last_block_saves_and_loads(folders: Callable[[str], Path], tmp_path: Path) -> None:
    model: Any = loaded(folders("shared"))
    model.model.layers = model.model.layers[:-1]
    model.config.num_hidden_layers -= 1
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(loaded(tmp_path)), expected)


def test_a_layer_compressed_after_loading_is_in_the_map(folders: Callable[[str], Path], tmp_path: Path) -> None:
    model = loaded(folders("shared"))
    name = next(name for name, module in model.named_modules() if name.endswith("o_proj"))
    old = model.get_submodule(name)
    replace_module(model, name, LowRankLinear(old.in_features, old.out_features, 3, bias=False))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(loaded(tmp_path)), expected)


def test_a_member_with_a_basis_of_its_own_was_tied_to_the_others_again(
    folders: Callable[[str], Path], tmp_path: Path
) -> None:
    model = loaded(folders("shared"))
    name = [name for name in module_map(model) if name.endswith("v_proj")][1]
    old = model.get_submodule(name)
    new = LowRankLinear(old.in_features, old.out_features, old.rank, bias=False)
    replace_module(model, name, new)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(loaded(tmp_path)), expected)


def test_the_map_of_a_model_inside_of_adapters_is_that_without_them(folders: Callable[[str], Path]) -> None:
    model: Any = loaded(folders("shared"))
    told = copy.deepcopy(model.config.quantization_config.to_dict())
    adapted(model, modules_to_save=["o_proj"])
    _describe_anew(model)
    assert model.config.quantization_config.to_dict() == told
