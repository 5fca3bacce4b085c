"""A basis of several modules is one parameter: in memory, on disk, and after every way of loading it."""

import copy
import json
import pickle
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import TINY_MODELS
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

import pared
from pared import ParedError
from pared.checkpoint import mark, module_map, require_tensors, save
from pared.checkpoint.format import ParedConfig
from pared.checkpoint.save import shared_tensors
from pared.entrypoints.export import export_dense, make_dense
from pared.modules import BasisHolder, LowRankLinear, PivotedLinear, replace_module, share
from pared.structure import bias_of, weight_of
from unit.checkpoint.test_checkpoint import LOAD, TOKENS, Edit, auto_class, change_config, logits, run_python

Group = tuple[str, ...]
BLOCK = "model.layers.{}."
Q = tuple(f"{BLOCK}self_attn.q_proj".format(block) for block in range(3))
GATE = tuple(f"{BLOCK}mlp.gate_proj".format(block) for block in range(2))
# With and without tied embeddings, with biases, Conv1D, another Auto class; groups of three and of two.
GROUPS: dict[str, list[Group]] = {
    "llama": [Q, GATE],
    "qwen2": [Q[:2], GATE],
    "qwen3": [Q[:2], GATE],
    "gpt2": [("transformer.h.0.mlp.c_fc", "transformer.h.1.mlp.c_fc")],
    "bert": [("bert.encoder.layer.0.intermediate.dense", "bert.encoder.layer.1.intermediate.dense")],
}


@torch.no_grad()
def put_low_rank(model: PreTrainedModel, names: Sequence[str], rank: int) -> None:
    """Put the best factors of the stacked weights in place; more than one module share the basis."""
    olds = [model.get_submodule(name) for name in names]
    weights = [weight_of(old).float() for old in olds]
    _, _, directions = torch.linalg.svd(torch.cat(weights), full_matrices=False)
    owner: LowRankLinear | None = None
    for name, old, weight in zip(names, olds, weights, strict=True):
        bias, dtype = bias_of(old), weight_of(old).dtype
        new = LowRankLinear(weight.shape[1], weight.shape[0], rank, bias is not None, dtype=dtype)
        new.down.weight.copy_(directions[:rank])
        new.up.weight.copy_(weight @ directions[:rank].T)
        if bias is not None:
            new.up.bias.copy_(bias)
        owner = owner or new
        new.down.weight = owner.down.weight
        replace_module(model, name, new)


def shared_model(family: str = "llama", tied: bool | None = None) -> PreTrainedModel:
    """A tiny model whose groups have one basis each, and which has a low-rank module of its own beside them."""
    model = TINY_MODELS[family]()
    for group in GROUPS[family]:
        put_low_rank(model, group, 12)
    if family != "bert" and family != "gpt2":
        put_low_rank(model, ["model.layers.1.mlp.down_proj"], 9)
    mark(model)
    return model


def aliases(family: str) -> dict[str, str]:
    return {f"{name}.down.weight": f"{group[0]}.down.weight" for group in GROUPS[family] for name in group[1:]}


def is_tied(model: PreTrainedModel, groups: Sequence[Group], prefix: str = "") -> bool:
    modules = [[model.get_submodule(name.removeprefix(prefix)) for name in group] for group in groups]
    return all(member.down.weight is group[0].down.weight for group in modules for member in group)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, torch.Tensor]]:
    """A family's folder, and what the model in memory answered; made once."""
    made: dict[str, tuple[Path, torch.Tensor]] = {}

    def folder_of(family: str) -> tuple[Path, torch.Tensor]:
        if family not in made:
            model = shared_model(family)
            folder = tmp_path_factory.mktemp(f"shared-{family}")
            save(model, None, folder)
            made[family] = folder, logits(model)
        return made[family]

    return folder_of


Folders = Callable[[str], tuple[Path, torch.Tensor]]


@pytest.fixture
def folder(shared: Folders, tmp_path: Path) -> Path:
    """A folder that a test may damage."""
    return Path(shutil.copytree(shared("llama")[0], tmp_path / "copy"))


# On disk.


@pytest.mark.parametrize("family", GROUPS)
def test_a_shared_basis_is_stored_once_with_its_first_module(family: str, shared: Folders) -> None:
    folder, _ = shared(family)
    fields = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert fields["shared"] == aliases(family)
    stored = load_file(folder / "model.safetensors")
    model = shared_model(family)
    unstored = model.state_dict().keys() - stored.keys()
    assert unstored == aliases(family).keys() | ({"lm_head.weight"} if family in ("gpt2", "qwen3") else set())
    numbers = sum(parameter.numel() for parameter in model.parameters())
    assert sum(tensor.numel() for tensor in stored.values()) == numbers
    assert require_tensors(folder) == (folder / "model.safetensors").stat().st_size


def test_a_map_without_shared_tensors_has_no_word_of_them(tmp_path: Path) -> None:
    model = TINY_MODELS["llama"]()
    put_low_rank(model, [Q[0]], 8)
    mark(model)
    save(model, None, tmp_path)
    assert "shared" not in json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert "_tied_weights_keys" not in vars(model)


def test_a_map_with_shared_tensors_can_be_read_back() -> None:
    config = shared_model().config.quantization_config
    assert config.shared == aliases("llama")
    assert ParedConfig(**config.to_dict()).to_dict() == config.to_dict()
    assert dict(ParedConfig(**dict(config))) == dict(config)


def test_a_module_under_two_parents_is_refused() -> None:
    model = TINY_MODELS["llama"]()
    put_low_rank(model, [Q[0]], 8)
    model.model.layers[1].self_attn.q_proj = model.get_submodule(Q[0])
    with pytest.raises(ParedError, match=rf"{re.escape(Q[1])} and {re.escape(Q[0])} have one module between them"):
        mark(model)
    put_low_rank(model, [Q[2]], 8)
    replace_module(model, Q[1], copy.deepcopy(model.get_submodule(Q[0])))
    model.get_submodule(Q[2]).down = model.get_submodule(Q[0]).down
    with pytest.raises(ParedError, match=r"tie their `down.weight` instead"):
        mark(model)


def test_marking_again_forgets_what_is_shared_no_more(tmp_path: Path) -> None:
    model = shared_model()
    for name in (*Q[1:], GATE[1]):
        module = model.get_submodule(name)
        module.down.weight = torch.nn.Parameter(module.down.weight.detach() + 0.1)
    expected = logits(model)
    mark(model)
    assert shared_tensors(model) == {}
    assert not [key for key in model._tied_weights_keys if "down" in key]
    assert {module.shares for module in model.modules() if isinstance(module, BasisHolder)} == {None}
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)


# Every way of loading.


@pytest.mark.parametrize("family", GROUPS)
def test_plain_transformers_loads_it_tied_and_answers_the_same(family: str, shared: Folders) -> None:
    folder, expected = shared(family)
    model, info = auto_class(family).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert is_tied(model, GROUPS[family])
    assert shared_tensors(model) == aliases(family)
    assert (logits(model) - expected).abs().max() == 0.0
    before = shared_model(family)
    assert model.num_parameters() == before.num_parameters()
    assert model.state_dict().keys() == before.state_dict().keys()
    assert len({id(parameter) for parameter in model.parameters()}) == len(list(before.parameters()))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_it_does_not_matter_whether_the_embeddings_are_tied(family: str, tie_embeddings: bool, tmp_path: Path) -> None:
    model = shared_model(family)
    model.config.tie_word_embeddings = tie_embeddings
    if tie_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    else:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 0.1)
    model.save_pretrained(tmp_path)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) != tie_embeddings
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tie_embeddings
    assert is_tied(loaded, GROUPS[family])
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_body_alone_loads_and_saves_and_takes_its_head_back(family: str, shared: Folders, tmp_path: Path) -> None:
    folder, _ = shared(family)
    body, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    whole = AutoModelForCausalLM.from_pretrained(folder)
    assert not info["missing_keys"]
    assert is_tied(body, GROUPS[family], "model.")
    with torch.no_grad():
        expected = whole.base_model(TOKENS)[0]
        assert torch.equal(body(TOKENS)[0], expected)
        body.save_pretrained(tmp_path)
        stored = load_file(tmp_path / "model.safetensors").keys()
        assert len(stored) == len(list(body.parameters())) + 2, "and what stops a load without pared"
        assert torch.equal(AutoModel.from_pretrained(tmp_path)(TOKENS)[0], expected)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert is_tied(again, GROUPS[family])
        assert torch.equal(again.base_model(TOKENS)[0], expected)


def test_a_body_that_was_compressed_alone_loads_with_a_head(tmp_path: Path) -> None:
    body = TINY_MODELS["llama"]().model
    put_low_rank(body, [name.removeprefix("model.") for name in Q], 8)
    mark(body)
    body.save_pretrained(tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert is_tied(whole, [Q])
    with torch.no_grad():
        assert torch.equal(whole.base_model(TOKENS)[0], body(TOKENS)[0])


@pytest.mark.parametrize("family", GROUPS)
def test_a_loaded_model_saves_the_very_folder_again(family: str, shared: Folders, tmp_path: Path) -> None:
    folder, expected = shared(family)
    auto_class(family).from_pretrained(folder).save_pretrained(tmp_path)
    for name in ("config.json", "modeling_pared.py", "model.safetensors"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    assert torch.equal(logits(auto_class(family).from_pretrained(tmp_path)), expected)


def test_shards_load_and_pass_the_check(shared: Folders, tmp_path: Path) -> None:
    folder, expected = shared("llama")
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path, max_shard_size="10KB")
    shards = [load_file(path).keys() for path in tmp_path.glob("*.safetensors")]
    assert len(shards) > 3
    assert not set(aliases("llama")) & {name for shard in shards for name in shard}
    require_tensors(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert is_tied(model, GROUPS["llama"])
    assert torch.equal(logits(model), expected)


def test_device_map_cpu_loads_the_same_model(shared: Folders) -> None:
    folder, expected = shared("llama")
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
    assert is_tied(model, GROUPS["llama"])
    assert torch.equal(logits(model), expected)


def test_offloaded_blocks_answer_the_same_and_save_the_same(shared: Folders, tmp_path: Path) -> None:
    folder, expected = shared("llama")
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    places["model.layers"] = "disk"
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path / "disk")
    assert torch.equal(logits(model), expected)
    with pytest.warns(UserWarning, match="save a model with offloaded modules"):
        model.save_pretrained(tmp_path / "again")
    require_tensors(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), expected)


def test_a_machine_without_pared_loads_and_saves_the_same_model(shared: Folders, tmp_path: Path) -> None:
    folder, expected = shared("llama")
    arguments = ", trust_remote_code=True"
    run_python(LOAD, tmp_path, folder, blocked="dict(pared=None)", imports="", arguments=arguments)
    assert torch.equal(torch.load(tmp_path / "out.first"), expected)
    assert torch.equal(torch.load(tmp_path / "out.second"), expected)
    for name in ("config.json", "modeling_pared.py", "model.safetensors"):
        assert (tmp_path / "out.folder" / name).read_bytes() == (folder / name).read_bytes()


# What one does with a loaded model.


def test_a_basis_stays_shared_through_casts_and_copies(shared: Folders) -> None:
    folder, expected = shared("llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for made in copies:
        assert is_tied(made, GROUPS["llama"])
        assert made.get_submodule(Q[0]).down.weight is not model.get_submodule(Q[0]).down.weight
        assert torch.equal(logits(made), expected)
    for cast in (model.half(), model.float(), model.to(torch.bfloat16)):
        assert is_tied(cast, GROUPS["llama"])
        assert len({parameter.dtype for parameter in cast.parameters()}) == 1
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert is_tied(loaded, GROUPS["llama"])


def test_a_state_dict_goes_in_and_out(shared: Folders) -> None:
    model = AutoModelForCausalLM.from_pretrained(shared("llama")[0])
    other = shared_model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    assert not model.load_state_dict(other.state_dict()).missing_keys
    assert is_tied(model, GROUPS["llama"])
    assert torch.equal(logits(model), logits(other))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_new_tokens_leave_the_basis_shared(family: str, shared: Folders, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(shared(family)[0])
    model.resize_token_embeddings(70)
    assert is_tied(model, GROUPS[family])
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_training_moves_one_basis_for_all_and_is_saved_once(shared: Folders, tmp_path: Path) -> None:
    folder, before = shared("llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True
    )
    rows = [{"input_ids": row, "labels": row} for row in TOKENS]
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model(str(tmp_path / "trained"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert is_tied(again, GROUPS["llama"])
    assert torch.equal(logits(again), logits(model.eval()))
    assert not torch.allclose(logits(again), before, atol=1e-4)


# Out again.


@pytest.mark.parametrize("family", GROUPS)
def test_a_dense_export_gives_every_member_its_own_weight(family: str, shared: Folders, tmp_path: Path) -> None:
    folder, expected = shared(family)
    make_dense(auto_class(family).from_pretrained(folder)).save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == (
        TINY_MODELS[family]().state_dict().keys() - ({"lm_head.weight"} if family in ("gpt2", "qwen3") else set())
    )
    model, info = auto_class(family).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)


def test_a_dense_export_knows_nothing_of_what_was_shared(shared: Folders) -> None:
    model = make_dense(AutoModelForCausalLM.from_pretrained(shared("qwen3")[0]))
    assert model._tied_weights_keys == {"lm_head.weight": "model.embed_tokens.weight"}
    assert model.all_tied_weights_keys == {"lm_head.weight": "model.embed_tokens.weight"}
    model.resize_token_embeddings(70)


def test_the_export_of_a_folder_passes(folder: Path, tokenizer: Any, tmp_path: Path, shared: Folders) -> None:
    tokenizer.save_pretrained(folder)
    export_dense(str(folder), tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(logits(model), shared("llama")[1], atol=1e-5, rtol=1e-5)
    assert not module_map(model)


# Folders that are not right.


def change_shared(edit: Callable[[dict[str, str]], object]) -> Edit:
    return lambda fields: edit(fields["shared"])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        pytest.param(
            lambda fields: fields["shared"].update(
                {"model.layers.2.mlp.up_proj.down.weight": f"{GATE[0]}.down.weight"}
            ),
            r"shared tensor model\.layers\.2\.mlp\.up_proj\.down\.weight: .* is not the down\.weight of a module",
            id="not in the map",
        ),
        pytest.param(
            lambda fields: fields["shared"].update({f"{Q[1]}.down.weight": f"{Q[0]}.up.weight"}),
            r"q_proj\.up\.weight is not the down\.weight of a module in the map",
            id="not a basis",
        ),
        pytest.param(
            lambda fields: fields["shared"].update({f"{Q[1]}.down.weight": ["a"]}),
            r"\['a'\] is not the down\.weight",
            id="not a name",
        ),
        pytest.param(
            lambda fields: fields["shared"].update({f"{Q[1]}.down.weight": f"{Q[2]}.down.weight"}),
            r"layers\.1.*: its owner model\.layers\.2.* is shared itself",
            id="owner shared",
        ),
        pytest.param(
            lambda fields: fields["shared"].update({f"{Q[0]}.down.weight": f"{Q[0]}.down.weight"}),
            r"is shared itself",
            id="its own owner",
        ),
        pytest.param(
            lambda fields: fields["modules"][Q[2]].update(rank=11),
            r"layers\.2.*'rank': 11\} in the map, but its owner model\.layers\.0.*'rank': 12\}",
            id="another rank",
        ),
        pytest.param(
            lambda fields: fields.update(shared=["a"]),
            r"the shared tensors are list, expected the owner's name by tensor name",
            id="no map",
        ),
    ],
)
def test_a_malformed_list_of_shared_tensors_is_refused(folder: Path, edit: Edit, message: str) -> None:
    change_config(folder, edit)
    for check in (require_tensors, lambda path: pared.load(str(path))):
        with pytest.raises(ParedError, match=message):
            check(folder)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


def change_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_missing_owner_is_refused_by_name(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.pop(f"{Q[0]}.down.weight"))
    with pytest.raises(ParedError, match=rf"{re.escape(Q[0])}\.down\.weight is missing"):
        require_tensors(folder)
    with pytest.raises(ParedError, match=r"weights are missing from the checkpoint, the first is 'model\.layers\.0"):
        pared.load(str(folder))


def test_a_shared_tensor_that_is_stored_must_be_its_owner(folder: Path, shared: Folders) -> None:
    def add(change: float) -> Callable[[dict[str, torch.Tensor]], None]:
        return lambda tensors: tensors.update({f"{Q[1]}.down.weight": tensors[f"{Q[0]}.down.weight"] + change})

    change_tensors(folder, add(0.0))
    require_tensors(folder)
    assert torch.equal(logits(pared.load(str(folder))), shared("llama")[1])
    change_tensors(folder, add(0.1))
    with pytest.raises(ParedError, match=rf"{re.escape(Q[1])}\.down\.weight is stored and differs from model"):
        require_tensors(folder)


def test_a_loader_that_knows_no_sharing_refuses_the_folder(folder: Path) -> None:
    """What this loader does with a key it does not know, an older one does with ``shared``."""
    change_config(folder, lambda fields: fields.update(shared_later=fields.pop("shared")))
    with pytest.raises(ParedError, match=r"unknown keys \['shared_later'\]"):
        pared.load(str(folder))


# Adapters.


def adapted(model: PreTrainedModel, targets: list[str] | str, **options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **options)).eval()


@pytest.mark.parametrize("from_disk", [True, False])
@pytest.mark.parametrize("way", ["merge_and_unload", "merge_adapter"])
@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("dora", [True, False])
def test_an_adapter_on_a_shared_basis_is_not_merged(
    shared: Folders, from_disk: bool, way: str, safe: bool, dora: bool
) -> None:
    base = AutoModelForCausalLM.from_pretrained(shared("llama")[0]) if from_disk else shared_model()
    before = base.get_submodule(Q[0]).down.weight.detach().clone()
    model = adapted(base, rf".*({'|'.join(name.rpartition('.')[2] for name in (Q[0], GATE[0]))})\.down", use_dora=dora)
    answer = logits(model)
    with pytest.raises(ValueError, match=rf"cannot be merged: .*{re.escape(Q[0])}.*one that targets `up`"):
        getattr(model, way)(safe_merge=safe)
    assert torch.equal(before, model.base_model.model.get_submodule(Q[0]).down.base_layer.weight)
    assert torch.equal(logits(model), answer)


def test_a_copied_or_pickled_adapter_is_not_merged_either(shared: Folders) -> None:
    model = adapted(AutoModelForCausalLM.from_pretrained(shared("llama")[0]), ["down"])
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(ValueError, match="cannot be merged"):
            made.merge_and_unload()


def test_an_adapter_on_a_shared_basis_works_unmerged_and_comes_off(shared: Folders) -> None:
    folder, before = shared("llama")
    model = adapted(AutoModelForCausalLM.from_pretrained(folder), ["down"])
    assert not torch.allclose(logits(model), before, atol=1e-3)
    back = model.unload()
    assert is_tied(back, GROUPS["llama"])
    assert torch.equal(logits(back), before)


def test_an_adapter_on_a_basis_of_one_module_merges_exactly(shared: Folders) -> None:
    model = adapted(AutoModelForCausalLM.from_pretrained(shared("llama")[0]), ["layers.1.mlp.down_proj.down"])
    answer = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), answer, atol=1e-5, rtol=1e-5)


def test_another_kind_of_adapter_on_a_shared_basis_is_not_merged(shared: Folders) -> None:
    from peft import LoHaConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(shared("llama")[0])
    model = get_peft_model(base, LoHaConfig(r=2, target_modules=["down"]))
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_and_unload()


def test_a_basis_that_was_trained_apart_is_saved_apart(shared: Folders, tmp_path: Path) -> None:
    model = adapted(AutoModelForCausalLM.from_pretrained(shared("llama")[0]), ["up"], modules_to_save=["down"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    merged = model.merge_and_unload()
    assert not is_tied(merged, GROUPS["llama"])
    merged.save_pretrained(tmp_path / "unmarked")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "unmarked")), logits(merged))
    with pytest.raises(ParedError, match=r"the map says they are one; .* call pared\.checkpoint\.mark"):
        require_tensors(tmp_path / "unmarked")
    mark(merged)
    merged.save_pretrained(tmp_path / "marked")
    require_tensors(tmp_path / "marked")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "marked")), logits(merged))


def test_what_is_wrapped_before_it_is_shared_is_not_merged() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    owner, member = (torch.nn.Sequential(LowRankLinear(8, 6, 3, False)) for _ in range(2))
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["down"]), owner)
    share(member[0], owner[0], "a")
    with pytest.raises(ValueError, match="its weight is a, one tensor"):
        owner[0].down.merge()


@pytest.mark.parametrize("kind", [LowRankLinear, PivotedLinear])
def test_every_module_that_may_share_refuses_merges(kind: type[torch.nn.Module]) -> None:
    assert issubclass(kind, BasisHolder)


def test_shapes_that_differ_are_not_shared() -> None:
    with pytest.raises(ValueError, match=r"cannot share a \(3, 8\) with a `down` of shape \(4, 8\)"):
        share(LowRankLinear(8, 6, 4, False), LowRankLinear(8, 6, 3, False), "a")


class Packed(torch.Tensor):
    """What a quantiser puts in place of a weight."""


def pack_each(model: PreTrainedModel) -> None:
    """Replace the weight of every linear layer, one after another, as torchao's ``quantize_`` does."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            packed = module.weight.detach().clone().as_subclass(Packed)
            module.weight = torch.nn.Parameter(packed, requires_grad=False)


def test_bases_were_quantised_into_as_many_tensors_as_layers(shared: Folders) -> None:
    """Regression: torchao's ``quantize_`` went from layer to layer, and every member got a tensor of its own."""
    folder, expected = shared("llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    pack_each(model)
    assert is_tied(model, GROUPS["llama"])
    assert isinstance(model.get_submodule(f"{Q[1]}.down").weight, Packed)
    own = [model.get_submodule(f"{group[0]}.down").weight for group in GROUPS["llama"]]
    assert own[0] is not own[1]
    assert torch.equal(logits(model), expected)


def test_a_shared_down_takes_another_weight_as_any_layer_does(shared: Folders) -> None:
    model = AutoModelForCausalLM.from_pretrained(shared("llama")[0])
    down = model.get_submodule(f"{Q[1]}.down")
    own = torch.nn.Parameter(torch.zeros_like(down.weight))
    down.weight = own
    assert down.weight is own
    assert model.get_submodule(f"{Q[0]}.down").weight is not own
