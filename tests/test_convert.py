"""Folders as Hugging Face has them, made here with random weights: names, orders, numbers, vocabularies, bad input."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import tokenizers
from click.testing import CliRunner

import hipquant as hq
from hipquant.cli.app import cli
from hipquant.convert import convert_folder
from hipquant.convert.architectures import ARCHITECTURES
from hipquant.errors import HipquantError, InvalidModelFileError, QuantizationError, TokenizerError
from hipquant.gguf_file import GGUFFile
from hipquant.quants import BY_NAME
from models import llama3_divisors
from reference import dequantize

F32Array = npt.NDArray[np.float32]
HIDDEN, HEADS, KV, FF, VOCAB, LAYERS = 32, 4, 2, 48, 300, 2
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = ("hel hel", "Hello, it'S 12345 wörld\n\n  hel  ", "hehel\t\u200b🚀<x>", " abc")


def write_safetensors(path: Path, tensors: dict[str, F32Array], kind: str = "F32") -> None:
    """In the given type; bfloat16 by cutting off."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    blobs, at = [], 0
    for name, x in tensors.items():
        raw = (
            (x.view(np.uint32) >> 16).astype("<u2") if kind == "BF16" else x.astype({"F32": "<f4", "F16": "<f2"}[kind])
        )
        header[name] = {"dtype": kind, "shape": list(x.shape), "data_offsets": [at, at + raw.nbytes]}
        blobs.append(raw.tobytes())
        at += raw.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))


def added(number: int, content: str, special: bool = True) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, "special": special, **flags}


def byte_level() -> dict[str, Any]:
    """A tokenizer of all bytes and a few merges, in the format of tokenizer.json."""
    letters = [chr(c) for c in [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)]]
    vocab = {c: i for i, c in enumerate(letters)} | {"he": 256, "hel": 257, "\u0120hel": 258}
    return {
        "added_tokens": [added(259, "<|end|>"), added(260, "<x>", special=False)],
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "post_processor": None,
        "model": {
            "type": "BPE",
            "ignore_merges": True,
            "vocab": vocab,
            "merges": [["h", "e"], ["he", "l"], ["\u0120", "hel"]],
        },
    }


def sentence_piece() -> dict[str, Any]:
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{b:02X}>" for b in range(256)),
        "▁",
        *"helabc",
        "he",
        "hel",
        "▁hel",
        "ab",
        "bc",
    ]
    bos, text = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "added_tokens": [added(i, pieces[i]) for i in range(3)],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, text],
            "pair": [bos, text, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "model": {
            "type": "BPE",
            "byte_fallback": True,
            "unk_token": "<unk>",
            "vocab": {p: i for i, p in enumerate(pieces)},
            "merges": ["h e", "he l", "▁ hel", "a b", "b c"],
        },
    }


def hf_tensors(family: str) -> dict[str, F32Array]:
    """The tensors of an architecture by their names in transformers, with random values."""
    rng, dim = np.random.default_rng(0), HIDDEN // HEADS
    q, kv = HEADS * dim, KV * dim
    phi2 = family == "PhiForCausalLM"
    layer: dict[str, tuple[int, ...]] = {"input_layernorm": (HIDDEN,)}
    if family == "Phi3ForCausalLM":
        layer |= {"self_attn.qkv_proj": (q + 2 * kv, HIDDEN), "mlp.gate_up_proj": (2 * FF, HIDDEN)}
    else:
        layer |= {"self_attn.q_proj": (q, HIDDEN), "self_attn.k_proj": (kv, HIDDEN), "self_attn.v_proj": (kv, HIDDEN)}
    if phi2:
        layer |= {"self_attn.dense": (HIDDEN, q), "mlp.fc1": (FF, HIDDEN), "mlp.fc2": (HIDDEN, FF)}
    else:
        layer |= {"self_attn.o_proj": (HIDDEN, q), "mlp.down_proj": (HIDDEN, FF), "post_attention_layernorm": (HIDDEN,)}
        if family != "Phi3ForCausalLM":
            layer |= {"mlp.gate_proj": (FF, HIDDEN), "mlp.up_proj": (FF, HIDDEN)}
    if "Gemma" in family:
        layer |= {"pre_feedforward_layernorm": (HIDDEN,), "post_feedforward_layernorm": (HIDDEN,)}
    if family.startswith(("Qwen3", "Gemma3")):
        layer |= {"self_attn.q_norm": (dim,), "self_attn.k_norm": (dim,)}
    norm = "final_layernorm" if phi2 else "norm"
    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN), f"model.{norm}.weight": (HIDDEN,)}
    if "Gemma" not in family:
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    for i in range(LAYERS):
        for name, shape in layer.items():
            shapes[f"model.layers.{i}.{name}.weight"] = shape
            if phi2 or (family == "Qwen2ForCausalLM" and name.endswith(("q_proj", "k_proj", "v_proj"))):
                shapes[f"model.layers.{i}.{name}.bias"] = shape[:1]
    if phi2:
        shapes |= {f"model.{norm}.bias": (HIDDEN,), "lm_head.bias": (VOCAB,)}
    prefix = "language_model." if family == "Gemma3ForConditionalGeneration" else ""
    found = {prefix + n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    if prefix:
        found["vision_tower.patch.weight"] = np.ones((2, 2), np.float32)
    return found


def write_folder(
    folder: Path, family: str, *, kind: str = "F32", tokenizer: Any = None, **changes: Any
) -> dict[str, F32Array]:
    folder.mkdir(exist_ok=True)
    config: dict[str, Any] = {
        "architectures": [family],
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS if family == "PhiForCausalLM" else KV,
        "intermediate_size": FF,
        "max_position_embeddings": 128,
        "rope_theta": 50000.0,
        "eos_token_id": [259, 1],
        **(
            {"layer_norm_eps": 1e-5, "partial_rotary_factor": 0.5}
            if family == "PhiForCausalLM"
            else {"rms_norm_eps": 1e-6}
        ),
    }
    if "Gemma" in family:
        config |= {"head_dim": HIDDEN // HEADS, "sliding_window": 64}
    if family.startswith("Gemma2"):
        config |= {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    config |= changes
    if family == "Gemma3ForConditionalGeneration":
        config = {"architectures": [family], "text_config": config}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer or byte_level()))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": "{{ messages }}", "pad_token": "<|end|>"})
    )
    tensors = hf_tensors(family)
    if family == "PhiForCausalLM":
        for name in [n for n in tensors if ".k_proj." in n or ".v_proj." in n]:
            tensors[name] = np.resize(tensors[name], (HIDDEN, *tensors[name].shape[1:]))
    write_safetensors(folder / "model.safetensors", tensors, kind)
    return tensors


def read(path: Path) -> dict[str, F32Array]:
    with GGUFFile(path) as file:
        return {n: dequantize(t.type, file.data(n), t.shape) for n, t in file.tensors.items()}


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_tensors(family: str, tmp_path: Path) -> None:
    """The names are those of llama.cpp's map (the gguf package), and every value arrives where it belongs."""
    stored = write_folder(tmp_path / "hf", family)
    convert_folder(tmp_path / "hf", tmp_path / "out.gguf")
    found = read(tmp_path / "out.gguf")
    arch = gguf.MODEL_ARCH[ARCHITECTURES[family].name.upper()]
    names = gguf.get_tensor_name_map(arch, LAYERS)
    expected = {}
    for name, x in stored.items():
        plain = name.removeprefix("language_model.")
        if plain.startswith("vision"):
            continue
        mapped = names.get_name(plain, try_suffixes=(".weight", ".bias"))
        assert mapped is not None, name
        if family in ("LlamaForCausalLM", "MistralForCausalLM") and ("q_proj" in name or "k_proj" in name):
            heads, half = (HEADS if "q_proj" in name else KV), HIDDEN // HEADS // 2
            y = np.empty_like(x)
            for h in range(heads):
                for i in range(half):  # the pair (i, i + half) of a head becomes (2 i, 2 i + 1)
                    at = 2 * half * h
                    y[at + 2 * i], y[at + 2 * i + 1] = x[at + i], x[at + half + i]
            x = y
        expected[mapped] = x + 1 if "Gemma" in family and name.endswith("norm.weight") else x
    assert set(found) == set(expected)
    for name, x in expected.items():
        assert np.array_equal(found[name], x), name


def test_numbers(tmp_path: Path) -> None:
    for family, arch in ARCHITECTURES.items():
        write_folder(tmp_path / family, family)
        convert_folder(tmp_path / family, tmp_path / "out.gguf", replace=True)
        with GGUFFile(tmp_path / "out.gguf") as file:
            keys = {k.removeprefix(f"{arch.name}."): v for k, v in file.metadata.items()}
        assert keys["general.architecture"] == arch.name
        assert (keys["block_count"], keys["embedding_length"], keys["feed_forward_length"]) == (LAYERS, HIDDEN, FF)
        assert (keys["context_length"], keys["vocab_size"], keys["rope.freq_base"]) == (128, VOCAB, 50000.0)
        assert keys["attention.head_count"] == HEADS
        assert keys["rope.dimension_count"] == (4 if arch.name == "phi2" else 8)
        assert ("attention.layer_norm_epsilon" in keys) == (arch.name == "phi2")
        assert keys["general.file_type"] == 0
        if arch.name == "gemma2":
            assert (keys["attn_logit_softcapping"], keys["final_logit_softcapping"]) == (50, 30)
        if arch.name.startswith("gemma"):
            assert (keys["attention.key_length"], keys["attention.sliding_window"]) == (8, 64)


def test_rope_scaling(tmp_path: Path) -> None:
    def convert(family: str, rope: dict[str, Any], **more: Any) -> tuple[dict[str, Any], dict[str, F32Array]]:
        write_folder(tmp_path / "hf", family, rope_scaling=rope, **more)
        convert_folder(tmp_path / "hf", tmp_path / "out.gguf", replace=True)
        with GGUFFile(tmp_path / "out.gguf") as file:
            return dict(file.metadata), read(tmp_path / "out.gguf")

    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    _, tensors = convert("LlamaForCausalLM", llama3 | {"original_max_position_embeddings": 64})
    assert np.allclose(tensors["rope_freqs.weight"], llama3_divisors(8, 50000.0, 8.0, 64), rtol=1e-6)
    keys, _ = convert("Qwen2ForCausalLM", {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32})
    assert [keys[f"qwen2.rope.scaling.{k}"] for k in ("type", "factor", "original_context_length")] == ["yarn", 4.0, 32]
    long = {"type": "longrope", "long_factor": [1.0, 2.0, 3.0, 4.0], "short_factor": [1.0] * 4}
    keys, tensors = convert("Phi3ForCausalLM", long, original_max_position_embeddings=32)
    assert tensors["rope_factors_long.weight"].tolist() == [1, 2, 3, 4]
    assert keys["phi3.rope.scaling.attn_factor"] == pytest.approx(np.sqrt(1 + np.log(4) / np.log(32)), rel=1e-6)
    with pytest.raises(InvalidModelFileError, match="RoPE scaling of type 'dynamic'"):
        convert("Qwen2ForCausalLM", {"type": "dynamic", "factor": 2.0})


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_types(kind: str, tmp_path: Path) -> None:
    """Matrices keep the type of the source, or take the one that is asked for; vectors are F32."""
    stored = write_folder(tmp_path / "hf", "Qwen2ForCausalLM", kind=kind)
    for asked in (None, "F16", "BF16", "F32"):
        convert_folder(tmp_path / "hf", tmp_path / "out.gguf", asked and BY_NAME[asked], replace=True)
        with GGUFFile(tmp_path / "out.gguf") as file:
            assert file.tensors["blk.0.ffn_up.weight"].type.name == (asked or kind)
            assert file.tensors["blk.0.attn_q.bias"].type.name == "F32"
        x = stored["model.layers.1.mlp.down_proj.weight"]
        assert np.allclose(read(tmp_path / "out.gguf")["blk.1.ffn_down.weight"], x, rtol=2**-7)


def test_several_files(tmp_path: Path) -> None:
    stored = write_folder(tmp_path / "hf", "LlamaForCausalLM", tie_word_embeddings=True)
    convert_folder(tmp_path / "hf", tmp_path / "one.gguf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    names = sorted(stored)
    for i, part in enumerate((names[:5], names[5:])):
        write_safetensors(tmp_path / "hf" / f"part{i}.safetensors", {n: stored[n] for n in part})
    index = {"weight_map": {n: f"part{int(n not in names[:5])}.safetensors" for n in names}}
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))
    convert_folder(tmp_path / "hf", tmp_path / "two.gguf")
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()
    assert "output.weight" not in read(tmp_path / "two.gguf")
    (tmp_path / "hf" / "part1.safetensors").unlink()
    with pytest.raises(InvalidModelFileError, match="part1.safetensors: there is no such file"):
        convert_folder(tmp_path / "hf", tmp_path / "three.gguf")


def test_a_byte_level_vocabulary(tmp_path: Path) -> None:
    write_folder(tmp_path / "hf", "LlamaForCausalLM")
    path = str(tmp_path / "hf" / "tokenizer.json")
    convert_folder(tmp_path / "hf", tmp_path / "out.gguf")
    with GGUFFile(tmp_path / "out.gguf") as file:
        keys = file.metadata
        assert (keys["tokenizer.ggml.model"], keys["tokenizer.ggml.pre"]) == ("gpt2", "llama-bpe")
        assert keys["tokenizer.ggml.merges"] == ["h e", "he l", "\u0120 hel"]
        assert keys["tokenizer.ggml.token_type"][[258, 259, 260, 261]].tolist() == [1, 3, 4, 5]
        assert keys["tokenizer.ggml.tokens"][261] == "[PAD261]"
        ids = [keys[f"tokenizer.ggml.{n}_token_id"] for n in ("eos", "padding")]
        assert (ids, keys["tokenizer.ggml.add_bos_token"]) == ([259, 259], False)
        assert keys["tokenizer.chat_template"] == "{{ messages }}"
    tokenizer, theirs = hq.load(tmp_path / "out.gguf").tokenizer, tokenizers.Tokenizer.from_file(path)
    assert tokenizer.encode("hel hel") == [257, 258]
    for text in TEXTS:
        assert tokenizer.encode(text) == theirs.encode(text).ids, text


def test_a_sentencepiece_vocabulary(tmp_path: Path) -> None:
    write_folder(tmp_path / "hf", "MistralForCausalLM", tokenizer=sentence_piece(), bos_token_id=1)
    path = str(tmp_path / "hf" / "tokenizer.json")
    convert_folder(tmp_path / "hf", tmp_path / "out.gguf")
    with GGUFFile(tmp_path / "out.gguf") as file:
        keys = file.metadata
        assert keys["tokenizer.ggml.model"] == "llama"
        assert keys["tokenizer.ggml.token_type"][[0, 1, 3, 259]].tolist() == [2, 3, 6, 1]
        assert (keys["tokenizer.ggml.add_bos_token"], keys["tokenizer.ggml.add_space_prefix"]) == (True, True)
    tokenizer, theirs = hq.load(tmp_path / "out.gguf").tokenizer, tokenizers.Tokenizer.from_file(path)
    ids = keys["tokenizer.ggml.tokens"].tolist()
    assert tokenizer.encode("hel hel") == [1, ids.index("▁hel"), ids.index("▁hel")]
    for text in TEXTS:
        assert tokenizer.encode(text) == theirs.encode(text).ids, text


def change(path: Path, keys: str, value: Any) -> None:
    """Sets one value inside a JSON file."""
    whole = json.loads(path.read_text())
    *inner, last = keys.split("/")
    at = whole
    for key in inner:
        at = at[int(key)] if isinstance(at, list) else at[key]
    at[last] = value
    path.write_text(json.dumps(whole))


@pytest.mark.parametrize(
    ("file", "keys", "value", "error", "message"),
    [
        ("config", "architectures", ["MambaForCausalLM"], InvalidModelFileError, "'MambaForCausalLM', expected one of"),
        ("config", "hidden_size", "many", InvalidModelFileError, "'hidden_size' is 'many', expected a number"),
        ("config", "hidden_size", 64, InvalidModelFileError, "which config.json contradicts"),
        ("config", "num_hidden_layers", 3, InvalidModelFileError, "no tensor for 'blk.2.attn_norm.weight'"),
        ("config", "quantization_config", {"bits": 4}, InvalidModelFileError, "quantized already"),
        ("config", "rms_norm_eps", None, None, ""),
        ("config", "rms_norm_eps", "x", InvalidModelFileError, "'rms_norm_eps' is 'x'"),
        ("tokenizer", "model/type", "Unigram", TokenizerError, "type 'Unigram', expected BPE"),
        ("tokenizer", "model/vocab", {"a": 99999}, TokenizerError, "an id 99999, the embedding 300 rows"),
        ("tokenizer", "model/vocab", {"a": "b"}, TokenizerError, "an id 'b'"),
        ("tokenizer", "model/merges", 7, TokenizerError, "do not fit together"),
        ("tokenizer", "model/merges", [], TokenizerError, "BPE without merges"),
        ("tokenizer", "model/vocab", {"\ud800": 1}, TokenizerError, "do not fit together"),
        ("config", "sliding_window", -1, None, ""),
        ("config", "partial_rotary_factor", -0.5, InvalidModelFileError, "'partial_rotary_factor' is -0.5"),
        ("config", "rope_theta", 1e300, InvalidModelFileError, "'rope_theta' is 1e\\+300"),
        ("config", "rope_scaling", {"type": "longrope", "long_factor": 1}, InvalidModelFileError, "expected 4 numbers"),
        ("tokenizer", "post_processor", {"type": "TemplateProcessing", "single": "x"}, TokenizerError, "do not fit"),
        ("tokenizer", "pre_tokenizer/pretokenizers/0/pattern", {"Regex": "x+"}, TokenizerError, r"patterns \['x\+'\]"),
        ("tokenizer", "pre_tokenizer/pretokenizers/0/type", "Bert", TokenizerError, "type 'Bert'"),
    ],
)
def test_what_is_refused(
    file: str, keys: str, value: Any, error: type[HipquantError] | None, message: str, tmp_path: Path
) -> None:
    write_folder(tmp_path / "hf", "LlamaForCausalLM")
    change(tmp_path / "hf" / f"{file}.json", keys, value)
    if error is None:
        convert_folder(tmp_path / "hf", tmp_path / "out.gguf")
        return
    with pytest.raises(error, match=message):
        convert_folder(tmp_path / "hf", tmp_path / "out.gguf")
    assert not list(tmp_path.glob("out*"))


def test_damaged_safetensors(tmp_path: Path) -> None:
    stored = write_folder(tmp_path / "hf", "LlamaForCausalLM")
    path = tmp_path / "hf" / "model.safetensors"
    whole = path.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    spoiled = [
        (b"", "cannot be mapped"),
        (whole[:5], "a header of 0 bytes"),
        (whole[:100], "partial download"),
        (whole[:-1], "download the file again"),
        (whole[:8] + b"x" * length, "not a JSON object"),
        (whole.replace(b'"F32"', b'"I64"', 1), "is I64, expected one of F32 F16 BF16"),
        (whole.replace(b'"data_offsets": [0,', b'"data_offsets": [9,', 1), "expected 38400"),
        (whole.replace(b'"shape": [300, 32]', b'"shape": [300, -2]', 1), "expected dtype, shape"),
    ]
    for raw, message in spoiled:
        path.write_bytes(raw)
        with pytest.raises(InvalidModelFileError, match=message):
            convert_folder(tmp_path / "hf", tmp_path / "out.gguf")
    stored["model.layers.0.mlp.up_proj.weight"][3, 5] = np.nan
    write_safetensors(path, stored)
    with pytest.raises(QuantizationError, match=r"up_proj.weight' is nan at index 101 \(row 3, column 5\)"):
        convert_folder(tmp_path / "hf", tmp_path / "out.gguf")
    write_safetensors(path, stored | {"model.layers.0.mlp.experts.weight": np.ones((2, 2), np.float32)})
    with pytest.raises(InvalidModelFileError, match="'model.layers.0.mlp.experts.weight' has no place in"):
        convert_folder(tmp_path / "hf", tmp_path / "out.gguf")
    assert not list(tmp_path.glob("out*"))


def test_the_command(tmp_path: Path) -> None:
    write_folder(tmp_path / "hf", "Qwen3ForCausalLM")

    def call(*more: str) -> Any:
        arguments = ["convert", str(tmp_path / "hf"), str(tmp_path / "out.gguf"), *more]
        return CliRunner().invoke(cli, arguments, prog_name="hipquant")

    assert "out.gguf: 0.1 MiB in " in call("--type", "f16").stdout
    assert "the file exists" in call().stderr
    assert call("--force").exit_code == 0
    assert "give the folder of a model" in CliRunner().invoke(cli, ["convert", str(tmp_path), "x"]).stderr
