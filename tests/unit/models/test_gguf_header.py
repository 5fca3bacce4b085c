"""A dry run on a GGUF file reads its header, and no vocabulary and no weight."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from transformers import AutoConfig

import pared.models.source
from pared import ParedError
from pared.models.gguf import config_of
from pared.models.gguf_header import LONGEST, MAGIC, read_header
from pared.models.source import find_model
from unit.cli.test_commands import pared as command
from unit.cli.test_commands import refused

WORDS, WIDE, NARROW, KEYS, BLOCKS = 2 * LONGEST, 32, 48, 16, 2
# name -> (out, in)
BLOCK = {
    "attn_q": (WIDE, WIDE), "attn_k": (KEYS, WIDE), "attn_v": (KEYS, WIDE), "attn_output": (WIDE, WIDE),
    "ffn_gate": (NARROW, WIDE), "ffn_up": (NARROW, WIDE), "ffn_down": (WIDE, NARROW),
    "attn_norm": (WIDE,), "ffn_norm": (WIDE,),
}  # fmt: skip


def write(path: Path, vocabulary: bool = True, tied: bool = True) -> Path:
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(BLOCKS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDE)
    writer.add_feed_forward_length(NARROW)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    if vocabulary:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list([f"w{i}" for i in range(WORDS)])
        writer.add_token_types([1] * WORDS)
        writer.add_token_scores([0.5] * WORDS)
        writer.add_token_merges(["a b", "ab c"])
        writer.add_bos_token_id(1)
    else:
        writer.add_vocab_size(WORDS)
    shapes = {"token_embd.weight": (WORDS, WIDE), "output_norm.weight": (WIDE,)}
    shapes |= {f"blk.{n}.{name}.weight": shape for n in range(BLOCKS) for name, shape in BLOCK.items()}
    shapes |= {} if tied else {"output.weight": (WORDS, WIDE)}
    for name, shape in shapes.items():
        writer.add_tensor(name, np.zeros(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_the_header_has_what_the_gguf_package_reads(model: Path) -> None:
    header, reader = read_header(model), GGUFReader(model)
    assert {name: (one.shape, one.kind, one.start) for name, one in header.tensors.items()} == {
        tensor.name: (tuple(reversed(tensor.shape.tolist())), tensor.tensor_type, tensor.data_offset)
        for tensor in reader.tensors
    }
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    long = {"tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.scores"}
    assert header.fields == {key: value for key, value in fields.items() if key not in long}
    assert {key: header.lengths[key] for key in long} == dict.fromkeys(long, WORDS)


@pytest.mark.parametrize("vocabulary", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_the_configuration_is_that_of_the_whole_file(tmp_path: Path, vocabulary: bool, tied: bool) -> None:
    path = write(tmp_path / "tiny.gguf", vocabulary, tied)
    whole = AutoConfig.from_pretrained(tmp_path, gguf_file=path.name).to_dict()
    found = config_of(path, "float32").to_dict()
    assert found["vocab_size"] == WORDS
    assert found["architectures"] == ["LlamaForCausalLM"]
    ours = {"architectures", "dtype", "_name_or_path"}
    assert {k: v for k, v in found.items() if k not in ours} == {k: v for k, v in whole.items() if k not in ours}


def test_a_plan_reads_the_header_and_counts_every_number(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def converted(*_: object) -> Path:
        raise AssertionError("dequantised")

    monkeypatch.setattr(pared.models.source, "converted", converted)
    code, told, _ = command("plan", model, "--full", "--method", "svd", "--keep", 0.5, "--json", tmp_path / "plan.json")
    assert code == 0
    assert "model.layers.1.mlp.down_proj" in told
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["model_parameters"] == read_header(model).parameters
    assert plan["bytes_per_parameter"] == 4
    assert [(site["out_features"], site["in_features"]) for site in plan["sites"][:7]] == [
        BLOCK[name] for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    ]


DAMAGED = {
    "empty": lambda whole: whole[:0],
    "another file": lambda whole: b"PK\3\4" + whole[4:],
    "a newer version": lambda whole: MAGIC + struct.pack("<I", 99) + whole[8:],
    "cut in its vocabulary": lambda whole: whole[:4000],
    "cut in its first field": lambda whole: whole[:30],
    "a field longer than the file": lambda whole: whole[:24] + struct.pack("<Q", 2**63) + whole[32:],
    "absurd counts": lambda whole: whole[:8] + struct.pack("<QQ", 2**62, 2**62) + whole[24:],
    "an array longer than the file": lambda whole: whole.replace(struct.pack("<Q", WORDS), struct.pack("<Q", 2**40)),
    "an unknown type": lambda whole: whole.replace(b"block_count" + struct.pack("<I", 4), b"block_count\x63\0\0\0"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_refused_in_one_line(model: Path, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(DAMAGED[damage](model.read_bytes()))
    with pytest.raises(ValueError, match=r"\w"):
        read_header(path)
    refused(command("plan", path, "--method", "svd", "--keep", 0.5), "damaged.gguf", "cannot be read as GGUF")
    with pytest.raises(ParedError, match="cannot be read as GGUF"):
        find_model(str(path)).skeleton()
