"""Pruned models are trained, and adapters merged into them, without a zero being lost."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import TINY_MODELS
from torch import nn
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, TrainerCallback

import pared
from pared import ParedError
from pared.entrypoints.export import export_dense
from pared.modules import SparseLinear
from pared.training import KeepZeros, merge_lora_keeping_zeros, pruned_layers, zeros_of
from unit.checkpoint.test_checkpoint import TOKENS, logits

BUDGETS = {"unstructured": {"sparsity": 0.5}, "2:4": {"pattern": "2:4"}}
ROWS = [{"input_ids": row, "labels": row} for row in TOKENS.repeat(4, 1)]
Folders = Callable[[str, str], dict[str, Path]]
Zeros = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast, calibration: pared.Calibration
) -> Folders:
    """The packed folder of a pruned model, and a plain one with the same zeros."""
    made: dict[tuple[str, str], dict[str, Path]] = {}

    def of(family: str, budget: str) -> dict[str, Path]:
        if (family, budget) not in made:
            place = tmp_path_factory.mktemp("pruned")
            recipe = pared.Recipe.model_validate({"method": "wanda", "calibration": calibration, **BUDGETS[budget]})
            model = pared.compress(TINY_MODELS[family](), tokenizer, recipe).model
            model.save_pretrained(place / "packed")
            tokenizer.save_pretrained(place / "packed")
            export_dense(str(place / "packed"), place / "plain")
            made[family, budget] = {"packed": place / "packed", "plain": place / "plain"}
        return made[family, budget]

    return of


def trainer(
    model: PreTrainedModel, out: Path, callbacks: list[TrainerCallback], optimizers: Any = (None, None), **more: Any
) -> transformers.Trainer:
    arguments = transformers.TrainingArguments(**{
        "output_dir": str(out), "max_steps": 3, "learning_rate": 1e-2, "weight_decay": 0.1, "report_to": [],
        "per_device_train_batch_size": 2, "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", **more,
    })  # fmt: skip
    return transformers.Trainer(
        model=model, args=arguments, train_dataset=ROWS, callbacks=callbacks, optimizers=optimizers
    )


def zeros(model: nn.Module) -> Zeros:
    return {name: zeros_of(layer) for name, layer in pruned_layers(model).items()}


def lost(model: nn.Module, where: Zeros) -> int:
    """How many zeros are not zero any more."""
    return sum(int((model.get_submodule(name).weight[mask] != 0).sum()) for name, mask in where.items())


class Watch(TrainerCallback):
    """Counts the zeros that are lost when a step has ended."""

    def __init__(self, where: Zeros) -> None:
        self.where, self.counts = where, []

    def on_step_end(self, *_: Any, **kwargs: Any) -> None:
        self.counts.append(lost(kwargs["model"], self.where))


# Full training.


@pytest.mark.parametrize("kind", ["packed", "plain"])
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_zeros_are_exactly_zero_after_every_step_and_in_what_is_saved(
    family: str, budget: str, kind: str, folders: Folders, tmp_path: Path
) -> None:
    folder = folders(family, budget)[kind]
    model = pared.load(folder)
    where, before = zeros(model), logits(model)
    keeper, watch = KeepZeros(), Watch(where)
    trained = trainer(model, tmp_path, [keeper, watch], save_strategy="steps", save_steps=1)
    trained.train()
    assert watch.counts == [0, 0, 0]
    assert set(keeper.layers) == set(where)
    assert sum(int(mask.sum()) for mask in where.values()) > 1000
    assert not torch.allclose(logits(model.eval()), before, atol=1e-3)
    for place in ("checkpoint-1", "checkpoint-3"):
        assert lost(pared.load(tmp_path / place), where) == 0
    trained.save_model(str(tmp_path / "trained"))
    again = pared.load(tmp_path / "trained")
    assert sum(isinstance(module, SparseLinear) for module in again.modules()) == (
        len(where) if kind == "packed" else 0
    )
    assert torch.equal(logits(again), logits(model))
    sizes = [(place / "model.safetensors").stat().st_size for place in (folder, tmp_path / "trained")]
    assert sizes[0] == sizes[1]


def test_without_it_a_plain_export_loses_its_zeros(folders: Folders, tmp_path: Path) -> None:
    model = pared.load(folders("llama", "unstructured")["plain"])
    watch = Watch(zeros(model))
    trainer(model, tmp_path, [watch]).train()
    assert min(watch.counts) > 1000


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_plain_trainer_keeps_the_zeros_of_sparse_layers_to_the_same_weights(
    budget: str, folders: Folders, tmp_path: Path
) -> None:
    """Regression: training without KeepZeros ran to its end, and then the model could not be saved."""
    folder = folders("llama", budget)["packed"]
    model, reference = pared.load(folder), pared.load(folder)
    where = zeros(model)
    watch = Watch(where)
    trained = trainer(model, tmp_path, [watch])
    trained.train()
    trainer(reference, tmp_path, [KeepZeros()]).train()
    assert watch.counts == [0, 0, 0]
    trained.save_model(str(tmp_path / "trained"))
    assert torch.equal(logits(pared.load(tmp_path / "trained")), logits(model.eval()))
    for name in where:
        assert torch.equal(model.get_submodule(name).weight, reference.get_submodule(name).weight)


def test_what_an_optimiser_makes_of_zeros_has_no_effect_and_is_gone_when_the_model_is_evaluated_or_saved(
    folders: Folders, tmp_path: Path
) -> None:
    model = pared.load(folders("llama", "2:4")["packed"])
    where, before = zeros(model), logits(model)
    model.train()
    for evaluated in (True, False):
        expected = model(input_ids=TOKENS).logits
        with torch.no_grad():
            for name, mask in where.items():
                model.get_submodule(name).weight[mask] = 0.5  # as by an optimiser that mixes weights
        assert torch.equal(model(input_ids=TOKENS).logits, expected)
        if evaluated:
            assert torch.equal(logits(model.eval()), before)
            model.train()
        else:
            model.save_pretrained(tmp_path)
        assert lost(model, where) == 0
    assert torch.equal(logits(pared.load(tmp_path)), before)


class Masked(nn.Module):
    """``mask * weight`` as a parametrisation: what training the kept weights means."""

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.mask


@pytest.mark.parametrize("optimiser", ["adamw_torch", "adamw_torch_fused", "sgd"])
@pytest.mark.parametrize("clip", [0.05, 0.0], ids=["clipped", "unclipped"])
def test_kept_weights_move_as_if_there_were_no_others(
    clip: float, optimiser: str, folders: Folders, tmp_path: Path
) -> None:
    folder = folders("llama", "unstructured")["plain"]
    model, reference = pared.load(folder), pared.load(folder)
    where = zeros(model)
    for name, mask in where.items():
        parametrize.register_parametrization(reference.get_submodule(name), "weight", Masked(~mask))
    more = {"max_grad_norm": clip, "optim": optimiser, "gradient_accumulation_steps": 2}
    trainer(model, tmp_path, [KeepZeros()], **more).train()
    trainer(reference, tmp_path, [], **more).train()
    for name in where:
        torch.testing.assert_close(
            model.get_submodule(name).weight, reference.get_submodule(name).weight, atol=1e-7, rtol=1e-5
        )
    torch.testing.assert_close(logits(model.eval()), logits(reference.eval()), atol=1e-5, rtol=1e-4)


class Orthogonal(torch.optim.SGD):
    """A step as Muon's: the whole matrix decides about each of its weights."""

    @torch.no_grad()
    def step(self, *_: object) -> None:
        for parameter in self.param_groups[0]["params"]:
            if parameter.ndim == 2 and parameter.grad is not None:
                u, _, v = torch.linalg.svd(parameter.grad, full_matrices=False)
                parameter.sub_(0.01 * u @ v)


def test_an_optimiser_that_mixes_weights_loses_no_zero_either(folders: Folders, tmp_path: Path) -> None:
    model = pared.load(folders("llama", "unstructured")["packed"])
    watch = Watch(zeros(model))
    optimiser = Orthogonal(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimiser)
    trainer(model, tmp_path, [KeepZeros(), watch], optimizers=(optimiser, schedule)).train()
    assert watch.counts == [0, 0, 0]


@pytest.mark.parametrize("kind", ["packed", "plain"])
def test_training_that_was_interrupted_goes_on_as_if_it_had_not_been(
    kind: str, folders: Folders, tmp_path: Path
) -> None:
    folder = folders("llama", "2:4")[kind]
    whole, part, rest = pared.load(folder), pared.load(folder), pared.load(folder)
    more = {"lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 2}
    trainer(whole, tmp_path / "whole", [KeepZeros()], **more).train()
    trainer(part, tmp_path / "part", [KeepZeros()], max_steps=2, **more).train()
    resumed = trainer(rest, tmp_path / "rest", [KeepZeros()], **more)
    resumed.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-2"))
    assert lost(rest, zeros(pared.load(folder))) == 0
    assert torch.equal(logits(rest.eval()), logits(whole.eval()))


def test_a_kept_weight_that_is_zero_in_a_packed_layer_is_trained(tmp_path: Path) -> None:
    mask = torch.rand(6, 8) > 0.5
    layer = SparseLinear.of(torch.zeros(6, 8), mask, None)
    model = nn.Sequential(layer)
    keeper = KeepZeros()
    keeper.on_train_begin(transformers.TrainingArguments(str(tmp_path), use_cpu=True), None, None, model=model)
    layer(torch.randn(3, 8)).square().sum().add(layer.weight.sum()).backward()
    assert torch.equal(layer.weight.grad != 0, mask)


def test_masks_and_hooks_are_gone_afterwards(folders: Folders, tmp_path: Path) -> None:
    model = pared.load(folders("llama", "2:4")["plain"])  # a packed layer keeps its zeros without any hook
    keeper = KeepZeros()
    trainer(model, tmp_path, [keeper], max_steps=1).train()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    weight = model.get_submodule(keeper.layers[0]).weight
    assert int((weight.grad == 0).sum()) < weight.numel() / 4
    assert not keeper._kept


def test_infinite_and_negative_gradients_leave_plain_zeros(tmp_path: Path) -> None:
    layer = SparseLinear.of(torch.tensor([[1.0, 0.0, 0.0, 2.0]]), torch.tensor([[True, False, False, True]]), None)
    keeper = KeepZeros()
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True)
    keeper.on_train_begin(arguments, None, None, model=nn.Sequential(layer))
    (layer.weight * torch.tensor([[1.0, float("inf"), -1.0, 1.0]])).sum().backward()
    assert layer.weight.grad.tolist() == [[1.0, 0.0, 0.0, 1.0]]
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, float("nan"), -0.0, 2.0]]))
    keeper.on_optimizer_step(arguments, None, None)
    assert layer.weight.tolist() == [[1.0, 0.0, 0.0, 2.0]]
    assert not bool(layer.weight.signbit().any())


# Which layers are meant.


def test_heads_adapters_and_layers_without_a_zero_do_not_count(folders: Folders) -> None:
    from peft import LoraConfig, get_peft_model

    model = pared.load(folders("llama", "unstructured")["plain"])
    names = set(pruned_layers(model))
    assert len(names) == 21
    with torch.no_grad():
        model.lm_head.weight[0] = 0
        model.get_submodule("model.layers.0.mlp.up_proj").weight.fill_(1)
        model.get_submodule("model.layers.1.mlp.up_proj").weight.zero_()
    assert set(pruned_layers(model)) == names - {"model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"}
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter[0] = 1
    assert len(pruned_layers(adapted)) == 19
    assert not any("lora" in name for name in pruned_layers(adapted))


def test_nothing_to_keep_and_layers_that_do_not_train_are_refused(folders: Folders, tmp_path: Path) -> None:
    with pytest.raises(ParedError, match="no linear layer of the model is pruned"):
        trainer(TINY_MODELS["llama"](), tmp_path, [KeepZeros()]).train()
    model = pared.load(folders("llama", "2:4")["packed"])
    inner = model.get_submodule("model.layers.0.mlp")
    inner.up_proj = SparseLinear(**inner.up_proj.entry())
    with pytest.raises(ParedError, match=r"mlp\.up_proj is still packed.*unpack_"):
        trainer(model, tmp_path, [KeepZeros()]).train()


def test_frozen_layers_need_no_keeping(folders: Folders, tmp_path: Path) -> None:
    model = pared.load(folders("llama", "2:4")["packed"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "mlp" in name
    keeper, watch = KeepZeros(), Watch(zeros(model))
    trainer(model, tmp_path, [keeper, watch]).train()
    assert len(keeper.layers) == 9
    assert watch.counts == [0, 0, 0]


# Adapters.


@pytest.fixture
def adapted(folders: Folders, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    from peft import LoraConfig, get_peft_model

    def trained(family: str, budget: str, kind: str, **more: Any) -> Any:
        torch.manual_seed(0)
        base = pared.load(folders(family, budget)[kind])
        targets = ["c_attn", "c_fc"] if family == "gpt2" else ["q_proj", "up_proj"]
        model = get_peft_model(base, LoraConfig(r=2, target_modules=targets, fan_in_fan_out=False, **more))
        trainer(model, tmp_path / "adapters", [KeepZeros()], learning_rate=0.1).train()
        return model.eval()

    return trained


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
@pytest.mark.parametrize("kind", ["packed", "plain"])
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_masked_merge_keeps_zeros_that_a_plain_one_loses(
    family: str, budget: str, kind: str, folders: Folders, adapted: Callable[..., Any], tmp_path: Path
) -> None:
    folder = folders(family, budget)[kind]
    where, old = zeros(pared.load(folder)), dict(pared.load(folder).named_modules())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "an adapter is merged into a pruned layer")
        plain = adapted(family, budget, kind).merge_and_unload()
    model = merge_lora_keeping_zeros(adapted(family, budget, kind))
    assert lost(plain, where) > 1000 if kind == "plain" else lost(plain, where) == 0
    assert lost(model, where) == 0
    moved = 0
    for name, mask in where.items():
        weight, merged = model.get_submodule(name).weight, plain.get_submodule(name).weight
        assert torch.equal(weight[~mask], merged[~mask])
        moved += int((weight != old[name].weight).sum())
    assert moved > 1000
    model.save_pretrained(tmp_path / "merged")
    again = pared.load(tmp_path / "merged")
    assert torch.equal(logits(again), logits(model))
    assert lost(again, where) == 0
    if kind == "packed":
        assert sum(isinstance(module, SparseLinear) for module in again.modules()) == len(where)


def test_scaled_and_magnitude_adapters_are_merged_too(adapted: Callable[..., Any], folders: Folders) -> None:
    where = zeros(pared.load(folders("llama", "2:4")["packed"]))
    for more in ({"use_rslora": True, "lora_alpha": 32}, {"use_dora": True}):
        assert lost(merge_lora_keeping_zeros(adapted("llama", "2:4", "packed", **more)), where) == 0


def test_what_cannot_be_merged_is_refused(folders: Folders, adapted: Callable[..., Any]) -> None:
    from peft import LoraConfig, get_peft_model

    model: Any = pared.load(folders("llama", "2:4")["packed"])
    with pytest.raises(ParedError, match="LlamaForCausalLM has no adapters to merge"):
        merge_lora_keeping_zeros(model)
    model = adapted("llama", "2:4", "plain")
    model.merge_adapter()
    with pytest.raises(ParedError, match=r"merged already, the first is .*q_proj.*unmerge_adapter"):
        merge_lora_keeping_zeros(model)
    dense = get_peft_model(TINY_MODELS["llama"](), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ParedError, match="none of the model's linear layers is pruned"):
        merge_lora_keeping_zeros(dense)


def test_packed_and_plain_train_to_the_same_weights(folders: Folders, tmp_path: Path) -> None:
    pair = folders("llama", "unstructured")
    packed, plain = pared.load(pair["packed"]), AutoModelForCausalLM.from_pretrained(pair["plain"])
    for model in (packed, plain):
        trainer(model, tmp_path, [KeepZeros()]).train()
    assert torch.equal(logits(packed.eval()), logits(plain.eval()))
