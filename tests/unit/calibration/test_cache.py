"""Statistics collected once give what a pass of their own would have given."""

import itertools
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import TINY_MODELS
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import pared
from pared import ParedError, compress
from pared.calibration import BlockStatistics, Statistic, save_block, saved_blocks, statistic_kind
from pared.engine import LowRankSpec, PassSpec, collect, resolve
from pared.engine.observe import Observer
from pared.engine.statistics.of_method import MethodStatistics
from pared.io.digests import model_digest
from pared.progress import Silent
from pared.structure import find_anatomy
from pared.structure.store import ResidentBlocks

CPU = torch.device("cpu")
TOKENS = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("method", "names"),
    [
        ("svd-llm", {"gram"}),
        ("asvd", {"magnitude", "gram"}),
        ("basis-sharing", {"gram"}),
        ("fwsvd", {"fisher", "gram"}),
        ("loss-optimal", {"mean_gram", "output_gradient_full"}),
    ],
)
def test_saved_statistics_give_what_a_pass_gives(
    method: str, names: set[str], tokenizer: PreTrainedTokenizerFast, calibration: pared.Calibration, tmp_path: Path
) -> None:
    recipe = pared.Recipe(method=method, keep=0.7, calibration=calibration)
    collect(TINY_MODELS["llama"](), tokenizer, recipe, frozenset(names), tmp_path / "statistics")
    logits = []
    for collected in (None, lambda: saved_blocks(tmp_path / "statistics")):
        model = TINY_MODELS["llama"]()
        plan = compress(model, tokenizer, recipe, collected=collected).plan
        with torch.no_grad():
            logits.append((plan, model(input_ids=TOKENS).logits))
    assert logits[0][0] == logits[1][0]
    torch.testing.assert_close(logits[0][1], logits[1][1], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("weighting", "felt"), [("full", 8), ("diagonal", 2), ("scalar", 2)])
def test_a_diagonal_is_felt_on_a_quarter_of_the_windows_and_all_are_read(
    weighting: str, felt: int, tokenizer: PreTrainedTokenizerFast, calibration: pared.Calibration
) -> None:
    model = TINY_MODELS["llama"]()
    asked = calibration.model_copy(update={"samples": 8, "batch": 1})
    recipe = pared.Recipe(method="loss-optimal", options={"output_weighting": weighting}, calibration=asked)
    spec, blocks = resolve(recipe), list[BlockStatistics]()
    assert isinstance(spec, LowRankSpec)
    anatomy = find_anatomy(model)
    observer = Observer(ResidentBlocks(model, anatomy), tokenizer, spec)
    observer.probe(anatomy)
    observer.read()
    MethodStatistics(observer, spec).run(PassSpec("solve", spec.solving), blocks.append)
    assert len(blocks) == 3
    for own in (own for block in blocks for own in block.statistics.values()):
        assert own["mean_gram"].tokens == 8 * asked.length
        assert own[f"output_gradient_{weighting}"].tokens == felt * asked.length


def test_an_interrupted_pass_leaves_whole_files_only(
    tokenizer: PreTrainedTokenizerFast, calibration: pared.Calibration, tmp_path: Path
) -> None:
    class Stopped(Silent):
        @contextmanager
        def stage(self, name: str, total: int, unit: str) -> Iterator[Callable[[], None]]:  # noqa: ARG002
            steps = itertools.count(1)

            def advance() -> None:
                if next(steps) > total // 2:
                    raise KeyboardInterrupt

            yield advance

    recipe = pared.Recipe(method="svd-llm", keep=0.7, calibration=calibration)
    with pytest.raises(KeyboardInterrupt):
        collect(TINY_MODELS["llama"](), tokenizer, recipe, frozenset({"gram"}), tmp_path / "half", Stopped())
    blocks = list(saved_blocks(tmp_path / "half"))
    assert 0 < len(blocks) < 3
    assert all(own["gram"].value.isfinite().all() for block in blocks for own in block.statistics.values())


@pytest.fixture(scope="module")
def grams(
    tokenizer: PreTrainedTokenizerFast, calibration: pared.Calibration, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("statistics") / "grams"
    recipe = pared.Recipe(method="svd-llm", keep=0.7, calibration=calibration)
    collect(TINY_MODELS["llama"](), tokenizer, recipe, frozenset({"gram", "magnitude"}), folder)
    return folder


def other_weights(model: PreTrainedModel) -> PreTrainedModel:
    next(model.parameters()).data[0, 0] += 1
    return model


@pytest.mark.parametrize(
    ("make", "samples", "told"),
    [
        (lambda: TINY_MODELS["llama"](), 3, "tokens: .* there, .* now"),
        (lambda: other_weights(TINY_MODELS["llama"]()), 4, "model: .* there, .* now"),
        (lambda: TINY_MODELS["llama"]().to(torch.bfloat16), 4, "dtype: 'float32' there, 'bfloat16' now, model: "),
        (lambda: TINY_MODELS["qwen3"](), 4, "architecture: 'LlamaForCausalLM' there, 'Qwen3ForCausalLM' now"),
    ],
    ids=["tokens", "weights", "dtype", "architecture"],
)
def test_statistics_of_something_else_are_refused_and_the_model_stays(
    make: Callable[[], PreTrainedModel],
    samples: int,
    told: str,
    grams: Path,
    tokenizer: PreTrainedTokenizerFast,
    calibration: pared.Calibration,
) -> None:
    """Regression: taken for this model's on these tokens."""
    asked = calibration.model_copy(update={"samples": samples * calibration.samples // 4})
    model = make()
    before = model_digest(model)
    for collected in (grams, lambda: saved_blocks(grams)):
        with pytest.raises(ParedError, match=f"the collected statistics are of something else .*{told}"):
            compress(model, tokenizer, method="svd-llm", keep=0.7, calibration=asked, collected=collected)
    assert model_digest(model) == before


def test_statistics_of_another_loss_are_refused_where_gradients_are_read(
    tokenizer: PreTrainedTokenizerFast, calibration: pared.Calibration, tmp_path: Path
) -> None:
    recipe = pared.Recipe(method="fwsvd", keep=0.7, calibration=calibration)
    collect(TINY_MODELS["llama"](), tokenizer, recipe, frozenset({"fisher", "gram"}), tmp_path)
    with pytest.raises(ParedError, match="loss: 'labels' there, 'sampled' now"):
        compress(TINY_MODELS["llama"](), tokenizer, recipe, options={"loss": "sampled"}, collected=tmp_path)
    compress(TINY_MODELS["llama"](), tokenizer, method="svd-llm", calibration=calibration, collected=tmp_path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda files: files[2].unlink(), "lack block 2"),
        (lambda files: files[0].unlink(), "lack block 0"),
        (lambda files: shutil.copy(files[2], files[2].with_name("block-00003.safetensors")), "hold more than the 3"),
    ],
)
def test_a_folder_that_does_not_hold_every_block_once_is_refused(
    change: Callable[[list[Path]], object],
    told: str,
    grams: Path,
    tokenizer: PreTrainedTokenizerFast,
    calibration: pared.Calibration,
    tmp_path: Path,
) -> None:
    """Regression: a StopIteration in the middle, or a block of another model's at the end."""
    folder = shutil.copytree(grams, tmp_path / "grams")
    change(sorted(folder.iterdir()))
    model = TINY_MODELS["llama"]()
    with pytest.raises(ParedError, match=f"the collected statistics {told}"):
        compress(model, tokenizer, method="svd-llm", calibration=calibration, collected=folder)


def test_a_generator_that_is_read_once_is_told_of(
    grams: Path, tokenizer: PreTrainedTokenizerFast, calibration: pared.Calibration
) -> None:
    """Regression: a StopIteration."""
    once = saved_blocks(grams)
    with pytest.raises(ParedError, match="came to an end; give what can be read more than once"):
        compress(TINY_MODELS["llama"](), tokenizer, method="svd-llm", calibration=calibration, collected=lambda: once)


def test_collecting_again_replaces_what_is_of_the_same_model_and_nothing_else(
    grams: Path, tokenizer: PreTrainedTokenizerFast, calibration: pared.Calibration, tmp_path: Path
) -> None:
    """Regression: a shorter model left the last blocks of a longer one in the folder."""
    folder = shutil.copytree(grams, tmp_path / "grams")
    recipe = pared.Recipe(method="svd-llm", keep=0.7, calibration=calibration)
    held = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(ParedError, match=r"holds statistics of something else .*; give another folder, or remove"):
        collect(TINY_MODELS["qwen3"](), tokenizer, recipe, frozenset({"gram"}), folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == held
    (folder / "block-00009.safetensors").write_bytes(b"of another version")
    collect(TINY_MODELS["llama"](), tokenizer, recipe, frozenset({"gram"}), folder)
    assert [set(next(iter(block.statistics.values()))) for block in saved_blocks(folder)] == [{"gram"}] * 3


def test_a_folder_without_statistics_is_named(tmp_path: Path) -> None:
    with pytest.raises(ParedError, match=r"nothing.* holds no saved statistics"):
        next(saved_blocks(tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("method", "names", "told"),
    [
        ("svd-llm", {"grams"}, "unknown statistic 'grams'; did you mean 'gram'"),
        ("svd-llm", {"fisher"}, "method svd-llm has no option loss.*fwsvd or loss-optimal"),
        ("svd", {"output_gradient_full"}, "method svd has no option loss"),
        ("fwsvd", {"fisher:0"}, "unknown statistic 'fisher:0'"),
        ("fwsvd", {"fisher:two"}, "unknown statistic 'fisher:two'"),
        ("fwsvd", {"gram:2"}, "unknown statistic 'gram:2'"),
        ("fwsvd", {"cross"}, "unknown statistic 'cross'"),
        ("fwsvd", {"fisher", "output_gram"}, "output_gram is of what sites output; collect it apart"),
        ("svd-llm", set(), "expected a set of names"),
        ("svd-llm", "gram", "expected a set of names, got 'gram'"),
    ],
)
def test_collecting_what_does_not_exist_is_one_error(
    method: str,
    names: set[str] | str,
    told: str,
    tokenizer: PreTrainedTokenizerFast,
    calibration: pared.Calibration,
    tmp_path: Path,
) -> None:
    """Regression: a KeyError."""
    asked = names if isinstance(names, str) else frozenset(names)
    recipe = pared.Recipe(method=method, calibration=calibration)
    with pytest.raises(ParedError, match=told):
        collect(TINY_MODELS["llama"](), tokenizer, recipe, asked, tmp_path)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_statistics_that_were_saved_for_another_method_are_named(
    tokenizer: PreTrainedTokenizerFast, calibration: pared.Calibration, tmp_path: Path
) -> None:
    """Regression: a KeyError."""
    recipe = pared.Recipe(method="svd-llm", keep=0.7, calibration=calibration)
    collect(TINY_MODELS["llama"](), tokenizer, recipe, frozenset({"magnitude"}), tmp_path)
    with pytest.raises(
        ParedError, match="method svd-llm needs the statistic 'output_gram'; those given hold magnitude"
    ):
        compress(TINY_MODELS["llama"](), tokenizer, recipe, collected=lambda: saved_blocks(tmp_path))


NAMES = frozenset({"mean_gram", "fisher:3", "output_gradient_full"})


def empty(name: str, out_features: int, in_features: int) -> Statistic:
    kind = statistic_kind(name)
    return kind.accumulator(kind.features(out_features, in_features), CPU)


def accumulated(windows: int = 5) -> BlockStatistics:
    """A block of two sites that read one tensor; a group of three examples is left open."""
    sites = {"up": (4, 70), "gate": (6, 70)}
    made = {site: {name: empty(name, *shape) for name in NAMES} for site, shape in sites.items()}
    made["gate"]["mean_gram"] = made["up"]["mean_gram"]
    x = torch.randn(windows, 9, 70)
    for site, (outputs, _) in sites.items():
        g = torch.randn(windows, 9, outputs)
        for name, statistic in made[site].items():
            if site == "up" or name != "mean_gram":
                statistic.update(x, g)
    return BlockStatistics(3, made, 0.25)


def reloaded(folder: Path, block: BlockStatistics) -> BlockStatistics:
    save_block(folder, block)
    (found,) = saved_blocks(folder)
    return found


def test_a_reloaded_statistic_can_be_merged_and_updated_to_the_same_bits(tmp_path: Path) -> None:
    block, other = accumulated(), accumulated(4)
    found = reloaded(tmp_path, block)
    assert (found.index, found.influence) == (3, 0.25)
    for site, outputs in (("up", 4), ("gate", 6)):
        x, g = torch.randn(2, 9, 70), torch.randn(2, 9, outputs)
        for name in NAMES if site == "up" else NAMES - {"mean_gram"}:  # the Gram is the same one
            here, saved = block.statistics[site][name], found.statistics[site][name]
            there = saved.load()
            assert saved.tokens == here.tokens
            assert torch.equal(saved.value, here.value)
            for one in (here, there):
                one.update(x, g)
                one.merge(other.statistics[site][name])
            assert torch.equal(there.value, here.value)
            assert there.tokens == here.tokens


def test_what_sites_share_is_on_disk_once_and_one_handle(tmp_path: Path) -> None:
    found = reloaded(tmp_path, accumulated())
    assert found.statistics["up"]["mean_gram"] is found.statistics["gate"]["mean_gram"]
    assert found.statistics["up"]["fisher:3"] is not found.statistics["gate"]["fisher:3"]
    held = (tmp_path / "block-00003.safetensors").stat().st_size
    assert held < 8 * (64 * 70 + 6 * 6) + 8 * 70 * 12 + 8000, "half of one Gram"


def test_statistics_that_were_read_can_be_saved_again(tmp_path: Path) -> None:
    block = accumulated()
    found = reloaded(tmp_path / "second", reloaded(tmp_path / "first", block))
    for site, own in block.statistics.items():
        for name, statistic in own.items():
            assert torch.equal(found.statistics[site][name].value, statistic.value)


def test_a_statistic_is_read_when_its_value_is_asked_for(tmp_path: Path) -> None:
    """A block's Grams of a large model are gigabytes; who solves site by site holds one at a time."""
    found = reloaded(tmp_path, accumulated())
    (tmp_path / "block-00003.safetensors").unlink()
    assert found.statistics["up"]["mean_gram"].tokens == 45
    with pytest.raises(ParedError, match=r"block-00003.safetensors cannot be read .* collect the statistics again"):
        _ = found.statistics["up"]["mean_gram"].value


@pytest.mark.parametrize("length", [0, 4, 100, -8])
def test_a_damaged_file_is_named(tmp_path: Path, length: int) -> None:
    save_block(tmp_path, accumulated())
    file = tmp_path / "block-00003.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ParedError, match=r"block-00003.safetensors cannot be read"):
        next(saved_blocks(tmp_path))


def test_files_of_another_version_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "block-00000.safetensors", metadata={"block": '{"index": 0}'})
    with pytest.raises(ParedError, match="was not written by this version of pared; collect the statistics again"):
        next(saved_blocks(tmp_path))
