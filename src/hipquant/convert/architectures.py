"""What Hugging Face's models are called in GGUF: architectures, tensors, and the numbers of config.json.

Names and conventions are those of llama.cpp's converter, so that the files run there too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InvalidModelFileError
from ..gguf_writer import KeyValue, Uint32

F32Array = npt.NDArray[np.float32]

_LLAMA = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_GEMMA = _LLAMA | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_PHI2 = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.dense": "attn_output",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
_PHI3 = {
    "input_layernorm": "attn_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True)
class Architecture:
    """An architecture of GGUF: `layer` maps the names within a layer; `keys` are beyond those of all models."""

    name: str
    layer: Mapping[str, str]
    final_norm: str = "norm"
    layer_norm: bool = False  # rather than RMS norm
    rotates_neighbours: bool = False  # RoPE turns pairs (2 i, 2 i + 1): rows of q and k are put in that order
    norm_from_zero: bool = False  # norms are stored as w, and multiply by 1 + w
    head_dim: bool = False  # always tells the length of a head
    tied: bool = False  # never has an output matrix of its own
    keys: Callable[[Config], dict[str, KeyValue]] | None = None

    def tensor(self, name: str) -> str | None:
        """The name in GGUF; None for one that is not needed. `InvalidModelFileError` for one that is not known."""
        name = re.sub(r"^(model\.)?language_model\.(model\.)?", "model.", name).replace("model.lm_head", "lm_head")
        if re.search(r"rotary_emb\.inv_freq$|vision_tower\.|multi_modal_projector\.", name):
            return None
        whole = {"model.embed_tokens": "token_embd", f"model.{self.final_norm}": "output_norm", "lm_head": "output"}
        stem, _, end = name.rpartition(".")
        found = whole.get(stem)
        if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem):
            inner = self.layer.get(match[2])
            found = f"blk.{match[1]}.{inner}" if inner else None
        if found is None or end not in ("weight", "bias"):
            raise InvalidModelFileError(
                f"tensor {name!r} has no place in the architecture {self.name!r}; is this a variant of it?"
            )
        return None if found == "output" and self.tied else f"{found}.{end}"

    def required(self, layers: int) -> list[str]:
        names = [f"blk.{i}.{inner}.weight" for i in range(layers) for inner in self.layer.values()]
        return ["token_embd.weight", "output_norm.weight", *names]


class Config:
    """config.json, with the text model's part of it in front."""

    def __init__(self, raw: Mapping[str, Any], path: object) -> None:
        text = raw.get("text_config")
        self.raw, self.path = {**raw, **(text if isinstance(text, dict) else {})}, path
        rope = self.raw.get("rope_parameters") or self.raw.get("rope_scaling") or {}
        rope = rope.get("full_attention", rope) if isinstance(rope, dict) else {}
        self.rope: dict[str, Any] = {"rope_theta": self.raw.get("rope_theta")} | rope

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.raw.get(key)
        return self.whole(key, default if value is None else value)

    def whole(self, key: str, value: Any, least: int = 1) -> int:
        if type(value) is not int or not least <= value < 1 << 31:
            raise InvalidModelFileError(f"{self.path}: {key!r} is {value!r:.60}, expected a number from {least} on")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.raw.get(key)
        return self.checked(key, default if value is None else value)

    def checked(self, key: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e38:
            raise InvalidModelFileError(f"{self.path}: {key!r} is {value!r:.60}, expected a finite number")
        return float(value)

    @property
    def heads(self) -> int:
        return self.integer("num_attention_heads")

    @property
    def kv_heads(self) -> int:
        return self.integer("num_key_value_heads", self.heads)

    @property
    def head_dim(self) -> int:
        return self.integer("head_dim", self.integer("hidden_size") // self.heads)

    @property
    def rotated(self) -> int:
        """Values of a head that RoPE turns."""
        part = self.rope.get("partial_rotary_factor", self.raw.get("partial_rotary_factor"))
        share = self.checked("partial_rotary_factor", 1.0 if part is None else part)
        if not 0 < share <= 1:
            raise InvalidModelFileError(f"{self.path}: 'partial_rotary_factor' is {share}, expected at most 1")
        return int(share * self.head_dim)

    @property
    def original_context(self) -> int:
        """Tokens of the context before RoPE was scaled for a longer one."""
        key = "original_max_position_embeddings"
        value = self.rope.get(key, self.raw.get(key))
        return self.whole(key, self.integer("max_position_embeddings") if value is None else value, 2)


def _phi3(config: Config) -> dict[str, KeyValue]:
    original, window = config.original_context, config.raw.get("sliding_window")
    found: dict[str, KeyValue] = {
        "rope.scaling.original_context_length": Uint32(original),
        "attention.sliding_window": Uint32(0 if window is None else config.whole("sliding_window", window, 0)),
    }
    if config.rope.get("long_factor"):
        scale = config.integer("max_position_embeddings") / original
        found["rope.scaling.attn_factor"] = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    return found


def _gemma2(config: Config) -> dict[str, KeyValue]:
    return {
        "attn_logit_softcapping": config.number("attn_logit_softcapping"),
        "final_logit_softcapping": config.number("final_logit_softcapping"),
        "attention.sliding_window": Uint32(config.integer("sliding_window")),
    }


def _gemma3(config: Config) -> dict[str, KeyValue]:
    if config.raw.get("attn_logit_softcapping") is not None:
        raise InvalidModelFileError(f"{config.path}: 'attn_logit_softcapping' in a gemma3 model, expected none")
    found: dict[str, KeyValue] = {"attention.sliding_window": Uint32(config.integer("sliding_window"))}
    if config.raw.get("final_logit_softcapping") is not None:
        found["final_logit_softcapping"] = config.number("final_logit_softcapping")
    return found


LLAMA = Architecture("llama", _LLAMA, rotates_neighbours=True)
ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": LLAMA,
    "PhiForCausalLM": Architecture("phi2", _PHI2, final_norm="final_layernorm", layer_norm=True),
    "Phi3ForCausalLM": Architecture("phi3", _PHI3, keys=_phi3),
    "Qwen2ForCausalLM": Architecture("qwen2", _LLAMA),
    "Qwen3ForCausalLM": Architecture("qwen3", _LLAMA | _HEAD_NORMS, head_dim=True),
    "Gemma2ForCausalLM": Architecture("gemma2", _GEMMA, norm_from_zero=True, head_dim=True, tied=True, keys=_gemma2),
    "Gemma3ForCausalLM": (
        gemma3 := Architecture(
            "gemma3", _GEMMA | _HEAD_NORMS, norm_from_zero=True, head_dim=True, tied=True, keys=_gemma3
        )
    ),
    "Gemma3ForConditionalGeneration": gemma3,
}


def architecture(config: Config) -> Architecture:
    """The architecture of a model; `InvalidModelFileError` names those that are known."""
    names = config.raw.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if not isinstance(name, str) or name not in ARCHITECTURES:
        known = " ".join(ARCHITECTURES)
        raise InvalidModelFileError(f"{config.path}: the architecture is {name!r}, expected one of {known}")
    if config.raw.get("quantization_config"):
        raise InvalidModelFileError(f"{config.path}: the weights are quantized already; take the original model")
    return ARCHITECTURES[name]


def model_keys(arch: Architecture, config: Config, n_vocab: int) -> dict[str, KeyValue]:
    """The metadata that describe the model, with `{architecture}.` in front of each."""
    hidden = config.integer("hidden_size")
    eps = "layer_norm_epsilon" if arch.layer_norm else "layer_norm_rms_epsilon"
    keys: dict[str, KeyValue] = {
        "block_count": Uint32(config.integer("num_hidden_layers")),
        "context_length": Uint32(config.integer("max_position_embeddings", 131072 if arch.name == "gemma3" else None)),
        "embedding_length": Uint32(hidden),
        "feed_forward_length": Uint32(config.integer("intermediate_size", 4 * hidden if arch.layer_norm else None)),
        "attention.head_count": Uint32(config.heads),
        "attention.head_count_kv": Uint32(config.kv_heads),
        f"attention.{eps}": config.number("layer_norm_eps" if arch.layer_norm else "rms_norm_eps", 1e-6),
        "rope.dimension_count": Uint32(config.rotated),
        "vocab_size": Uint32(n_vocab),
    }
    theta = config.rope.get("rope_theta")
    default = 1e6 if arch.name == "gemma3" else 1e4
    keys["rope.freq_base"] = config.checked("rope_theta", default if theta is None else theta)
    if arch.head_dim or config.head_dim * config.heads != hidden:
        keys |= {f"attention.{kind}_length": Uint32(config.head_dim) for kind in ("key", "value")}
    keys |= _rope_scaling(config)
    if arch.keys is not None:
        keys |= arch.keys(config)
    return {f"{arch.name}.{key}": value for key, value in keys.items()}


def _rope_type(config: Config) -> str:
    found = config.rope.get("rope_type", config.rope.get("type")) or "default"
    if found not in ("default", "linear", "yarn", "llama3", "longrope", "su"):
        raise InvalidModelFileError(
            f"{config.path}: RoPE scaling of type {found!r}, expected linear, yarn, llama3 or longrope"
        )
    return str(found)


def _rope_scaling(config: Config) -> dict[str, KeyValue]:
    kind, rope = _rope_type(config), config.rope
    if kind not in ("linear", "yarn"):
        return {"rope.scaling.type": "longrope"} if kind in ("longrope", "su") else {}
    keys: dict[str, KeyValue] = {
        "rope.scaling.type": kind,
        "rope.scaling.factor": config.checked("rope_scaling factor", rope.get("factor")),
    }
    if kind == "yarn":
        keys["rope.scaling.original_context_length"] = Uint32(config.original_context)
    return keys


def _factors(config: Config, key: str, length: int) -> F32Array:
    values = config.rope.get(key)
    if not isinstance(values, list) or len(values) != length:
        raise InvalidModelFileError(f"{config.path}: {key!r} is {values!r:.60}, expected {length} numbers")
    return np.array([config.checked(key, v) for v in values], np.float32)


def rope_tensors(config: Config) -> dict[str, F32Array]:
    """Divisors of RoPE's frequencies, float32 [rotated / 2]: of Llama 3's scaling, and the two of longrope."""
    kind, rope, half = _rope_type(config), config.rope, config.rotated // 2
    if kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "rope_theta")
        factor, low, high, context, base = (config.checked(n, rope.get(n)) for n in names)
        if not (factor >= 1 and high > low > 0 and base > 1):
            raise InvalidModelFileError(f"{config.path}: RoPE scaling of {rope}, expected the factors of Llama 3")
        turns = context / (2 * np.pi * base ** (np.arange(half) / half))  # of each pair in the original context
        smooth = np.clip((turns - low) / (high - low), 0, 1)
        return {"rope_freqs.weight": (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)}
    if kind in ("longrope", "su"):
        return {f"rope_factors_{n}.weight": _factors(config, f"{n}_factor", half) for n in ("long", "short")}
    return {}
