"""What a GGUF file becomes: the tensors of transformers, bit for bit, without the whole model in memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, quantize
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.modeling_gguf_pytorch_utils import TensorProcessor, get_gguf_hf_weights_map

import pared
import pared.models.gguf_weights
import pared.models.twin
from pared import ParedError
from pared.models.gguf_weights import _Names
from pared.models.source import find_model
from unit.cli.test_commands import pared as command

WIDE, KEYS, NARROW, BLOCKS, EXPERTS = 64, 32, 96, 2, 2
EXPERT = 768  # what transformers takes the width of experts of qwen3moe for, whatever a file says
TOKENS = [*bytes_to_unicode().values(), "ab"]
Kind = GGMLQuantizationType


def write(path: Path, architecture: str, tensors: dict[str, tuple[int, ...]], kind: Kind, fields: Any = None) -> Path:
    """Write a model of random numbers whose matrices are of one type."""
    generator = np.random.default_rng(0)
    writer = GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_block_count(BLOCKS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDE)
    writer.add_feed_forward_length(NARROW)
    writer.add_head_count(4)
    writer.add_head_count_kv(fields.pop("kv") if fields and "kv" in fields else 2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    for key, value in (fields or {}).items():
        writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * len(TOKENS))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, shape in tensors.items():
        values = generator.normal(size=shape).astype(np.float32)
        if len(shape) == 1 or kind is Kind.F32 or "conv" in name:
            writer.add_tensor(name, values)
        elif kind is Kind.F16:
            writer.add_tensor(name, values.astype(np.float16))
        else:
            writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


ATTENTION = {
    "attn_q": (WIDE, WIDE), "attn_k": (KEYS, WIDE), "attn_v": (KEYS, WIDE), "attn_output": (WIDE, WIDE),
    "attn_norm": (WIDE,), "ffn_norm": (WIDE,),
}  # fmt: skip
DENSE = {"ffn_gate": (NARROW, WIDE), "ffn_up": (NARROW, WIDE), "ffn_down": (WIDE, NARROW)}
MIXTURE = {
    "ffn_gate_inp": (EXPERTS, WIDE), "ffn_gate_exps": (EXPERTS, EXPERT, WIDE), "ffn_up_exps": (EXPERTS, EXPERT, WIDE),
    "ffn_down_exps": (EXPERTS, WIDE, EXPERT), "attn_q_norm": (16,), "attn_k_norm": (16,),
}  # fmt: skip
CONVOLUTION = {"shortconv.conv": (WIDE, 3), "shortconv.in_proj": (3 * WIDE, WIDE), "shortconv.out_proj": (WIDE, WIDE)}


def blocks(*each: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a model with these blocks."""
    found = {"token_embd.weight": (len(TOKENS), WIDE), "output_norm.weight": (WIDE,)}
    return found | {f"blk.{n}.{name}.weight": shape for n, block in enumerate(each) for name, shape in block.items()}


def llama(path: Path, kind: Kind = Kind.Q8_0) -> Path:
    return write(path, "llama", blocks(*[ATTENTION | DENSE] * BLOCKS), kind)


def mixture(path: Path) -> Path:
    fields = {"expert_count": EXPERTS, "expert_used_count": 2, "expert_feed_forward_length": EXPERT,
              "attention.key_length": 16, "attention.value_length": 16}  # fmt: skip
    return write(path, "qwen3moe", blocks(*[ATTENTION | MIXTURE] * BLOCKS), Kind.Q8_0, fields)


def convolutional(path: Path) -> Path:
    norms = {"attn_norm": (WIDE,), "ffn_norm": (WIDE,)}
    heads = {"attn_q_norm": (16,), "attn_k_norm": (16,)}
    tensors = blocks(CONVOLUTION | DENSE | norms, ATTENTION | DENSE | heads)
    del tensors["output_norm.weight"]
    tensors["token_embd_norm.weight"] = (WIDE,)
    return write(path, "lfm2", tensors, Kind.Q8_0, {"kv": [0, 2], "shortconv.l_cache": 3})


MODELS: dict[str, Callable[[Path], Path]] = {"llama": llama, "qwen3moe": mixture, "lfm2": convolutional}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PARED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pared.models.twin, "SHARD", 50_000)
    monkeypatch.setattr(pared.models.gguf_weights, "PANEL", 1000)
    return tmp_path / "cache"


def in_memory(path: Path, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype=dtype
    )


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_tensors_are_those_that_transformers_loads(tmp_path: Path, architecture: str, dtype: str) -> None:
    path = MODELS[architecture](tmp_path / "tiny.gguf")
    model, expected = pared.load(path, dtype), in_memory(path, getattr(torch, dtype)).state_dict()
    assert type(model).__name__.lower().startswith(architecture)
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    assert len(list(tmp_path.glob("cache/models/*/*.safetensors"))) > 1


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(Kind.Q8_0, "bfloat16"), (Kind.Q4_0, "bfloat16"), (Kind.F16, "float16"), (Kind.F32, "float32")],
)
def test_a_quantised_file_is_read_as_bfloat16_and_others_as_they_are(tmp_path: Path, kind: Kind, dtype: str) -> None:
    source = find_model(str(llama(tmp_path / "tiny.gguf", kind)))
    assert source.origin == f"tiny.gguf, dequantised to {dtype}"
    assert source.declared_dtype() == source.load().dtype == getattr(torch, dtype)
    assert source.declared_dtype("float32") == torch.float32


def test_an_asked_dtype_is_dequantised_to_and_not_rounded_first(tmp_path: Path) -> None:
    path = llama(tmp_path / "tiny.gguf")
    written = pared.export(path, tmp_path / "wide", dtype="float32")
    assert written.self_check == 0
    weight = pared.load(tmp_path / "wide").get_parameter("model.layers.0.mlp.up_proj.weight")
    assert not torch.equal(weight, weight.bfloat16().float())
    assert len(list(tmp_path.glob("cache/models/*"))) == 1


def test_the_tokenizer_is_that_of_transformers_and_the_vocabulary_is_read_by_the_gguf_package_never(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = llama(tmp_path / "tiny.gguf")
    expected = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    build, sizes = GGUFReader._build_fields, []

    def watched(self: GGUFReader, *given: Any) -> int:
        end = build(self, *given)
        sizes.append("tokenizer.ggml.token_type" in self.fields and len(self.fields["tokenizer.ggml.token_type"].data))
        return end

    monkeypatch.setattr("pared.models.gguf_header.LONGEST", 100)
    monkeypatch.setattr(GGUFReader, "_build_fields", watched)
    found = pared.load_tokenizer(path)
    assert found("abba").input_ids == expected("abba").input_ids
    assert found.get_vocab() == expected.get_vocab()
    assert sizes
    assert not any(sizes)


def test_names_are_mapped_as_by_the_whole_model() -> None:
    from transformers import BloomConfig, GPT2Config

    small = {"n_layer": 3, "n_embd": 8, "hidden_size": 8, "n_head": 2, "vocab_size": 10}
    for config in (BloomConfig(**small), GPT2Config(**small)):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        whole = get_gguf_hf_weights_map(model, TensorProcessor())
        assert len(whole) > 3 * 12
        assert get_gguf_hf_weights_map(_Names(model), TensorProcessor()) == whole


def test_a_truncated_file_leaves_no_twin(tmp_path: Path) -> None:
    path = llama(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ParedError, match=r"tiny.gguf: cannot be read as GGUF \(ValueError: it ends within"):
        pared.load(path)
    assert not list(tmp_path.glob("cache/models/*"))


def test_a_streamed_compression_of_a_gguf_file_is_that_in_memory(tmp_path: Path) -> None:
    path = llama(tmp_path / "tiny.gguf")
    for mode in ("on", "off"):
        code, told, _ = command(
            "compress",
            path,
            "--method",
            "svd",
            "--keep",
            0.5,
            "--stream",
            mode,
            "--eval",
            "none",
            "--out",
            tmp_path / mode,
        )
        assert code == 0, told
    streamed, whole = pared.load(tmp_path / "on").state_dict(), pared.load(tmp_path / "off").state_dict()
    assert streamed.keys() == whole.keys()
    assert all(torch.equal(streamed[name], tensor) for name, tensor in whole.items())
