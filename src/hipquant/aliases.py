"""Short names of models: those of Candle's examples `quantized` and `quantized-phi`, and the originals' names.

The files are the ones that Candle names (commit 2a13b0f3f, 2026-08-14); for Llama 2, whose files there are in the
format before GGUF, the same quant as GGUF.
"""

from __future__ import annotations

from typing import NamedTuple


class Alias(NamedTuple):
    """A file of a repository of the hub, at a revision."""

    repository: str
    file: str
    revision: str | None = None


# The revision of Phi-3 mini from when its architecture was called llama.
_PHI3 = Alias("microsoft/Phi-3-mini-4k-instruct-gguf", "Phi-3-mini-4k-instruct-q4.gguf")
_PHI3_LLAMA = _PHI3._replace(revision="5eef2ce24766d31909c0b269fe90c817a8f263fb")

QUANTIZED = {
    "7b": Alias("TheBloke/Llama-2-7B-GGUF", "llama-2-7b.Q4_0.gguf"),
    "13b": Alias("TheBloke/Llama-2-13B-GGUF", "llama-2-13b.Q4_0.gguf"),
    "70b": Alias("TheBloke/Llama-2-70B-GGUF", "llama-2-70b.Q4_0.gguf"),
    "7b-chat": Alias("TheBloke/Llama-2-7B-Chat-GGUF", "llama-2-7b-chat.Q4_0.gguf"),
    "13b-chat": Alias("TheBloke/Llama-2-13B-Chat-GGUF", "llama-2-13b-chat.Q4_0.gguf"),
    "70b-chat": Alias("TheBloke/Llama-2-70B-Chat-GGUF", "llama-2-70b-chat.Q4_0.gguf"),
    "7b-code": Alias("TheBloke/CodeLlama-7B-GGUF", "codellama-7b.Q8_0.gguf"),
    "13b-code": Alias("TheBloke/CodeLlama-13B-GGUF", "codellama-13b.Q8_0.gguf"),
    "32b-code": Alias("TheBloke/CodeLlama-34B-GGUF", "codellama-34b.Q8_0.gguf"),
    "7b-leo": Alias("TheBloke/leo-hessianai-7B-GGUF", "leo-hessianai-7b.Q4_K_M.gguf"),
    "13b-leo": Alias("TheBloke/leo-hessianai-13B-GGUF", "leo-hessianai-13b.Q4_K_M.gguf"),
    "7b-mistral": Alias("TheBloke/Mistral-7B-v0.1-GGUF", "mistral-7b-v0.1.Q4_K_S.gguf"),
    "7b-mistral-instruct": Alias("TheBloke/Mistral-7B-Instruct-v0.1-GGUF", "mistral-7b-instruct-v0.1.Q4_K_S.gguf"),
    "7b-mistral-instruct-v0.2": Alias("TheBloke/Mistral-7B-Instruct-v0.2-GGUF", "mistral-7b-instruct-v0.2.Q4_K_S.gguf"),
    "7b-zephyr-a": Alias("TheBloke/zephyr-7B-alpha-GGUF", "zephyr-7b-alpha.Q4_K_M.gguf"),
    "7b-zephyr-b": Alias("TheBloke/zephyr-7B-beta-GGUF", "zephyr-7b-beta.Q4_K_M.gguf"),
    "7b-open-chat-3.5": Alias("TheBloke/openchat_3.5-GGUF", "openchat_3.5.Q4_K_M.gguf"),
    "7b-starling-a": Alias("TheBloke/Starling-LM-7B-alpha-GGUF", "starling-lm-7b-alpha.Q4_K_M.gguf"),
    "mixtral": Alias("TheBloke/Mixtral-8x7B-v0.1-GGUF", "mixtral-8x7b-v0.1.Q4_K_M.gguf"),
    "mixtral-instruct": Alias("TheBloke/Mixtral-8x7B-Instruct-v0.1-GGUF", "mixtral-8x7b-instruct-v0.1.Q4_K_M.gguf"),
    "llama3-8b": Alias("QuantFactory/Meta-Llama-3-8B-GGUF", "Meta-Llama-3-8B.Q4_K_S.gguf"),
    "phi3": _PHI3_LLAMA,
    "SmoLM2-360M-Instruct": Alias("HuggingFaceTB/SmolLM2-360M-Instruct-GGUF", "smollm2-360m-instruct-q8_0.gguf"),
    "SmoLM2-1.7B-Instruct": Alias("HuggingFaceTB/SmolLM2-1.7B-Instruct-GGUF", "smollm2-1.7b-instruct-q4_k_m.gguf"),
    "deepseekr1-llama8b": Alias(
        "unsloth/DeepSeek-R1-Distill-Llama-8B-GGUF", "DeepSeek-R1-Distill-Llama-8B-Q4_K_M.gguf"
    ),
}
QUANTIZED_PHI = {
    "phi-2": Alias("TheBloke/phi-2-GGUF", "phi-2.Q4_K_M.gguf"),
    "phi-3": _PHI3,
    "phi-3b": _PHI3_LLAMA,
    "phi-4": Alias("microsoft/phi-4-gguf", "phi-4-q4.gguf"),
}
_ORIGINALS = {
    "meta-llama/Llama-2-7b-hf": "7b",
    "meta-llama/Llama-2-13b-hf": "13b",
    "meta-llama/Llama-2-70b-hf": "70b",
    "meta-llama/Llama-2-7b-chat-hf": "7b-chat",
    "meta-llama/Llama-2-13b-chat-hf": "13b-chat",
    "meta-llama/Llama-2-70b-chat-hf": "70b-chat",
    "codellama/CodeLlama-7b-hf": "7b-code",
    "codellama/CodeLlama-13b-hf": "13b-code",
    "codellama/CodeLlama-34b-hf": "32b-code",
    "LeoLM/leo-hessianai-7b": "7b-leo",
    "LeoLM/leo-hessianai-13b": "13b-leo",
    "mistralai/Mistral-7B-v0.1": "7b-mistral",
    "mistralai/Mistral-7B-Instruct-v0.1": "7b-mistral-instruct",
    "mistralai/Mistral-7B-Instruct-v0.2": "7b-mistral-instruct-v0.2",
    "HuggingFaceH4/zephyr-7b-alpha": "7b-zephyr-a",
    "HuggingFaceH4/zephyr-7b-beta": "7b-zephyr-b",
    "openchat/openchat_3.5": "7b-open-chat-3.5",
    "berkeley-nest/Starling-LM-7B-alpha": "7b-starling-a",
    "mistralai/Mixtral-8x7B-v0.1": "mixtral",
    "mistralai/Mixtral-8x7B-Instruct-v0.1": "mixtral-instruct",
    "meta-llama/Meta-Llama-3-8B": "llama3-8b",
    "HuggingFaceTB/SmolLM2-360M-Instruct": "SmoLM2-360M-Instruct",
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": "SmoLM2-1.7B-Instruct",
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": "deepseekr1-llama8b",
    "microsoft/phi-2": "phi-2",
    "microsoft/Phi-3-mini-4k-instruct": "phi-3",
    "microsoft/phi-4": "phi-4",
}
_BY_NAME = {name.lower(): alias for name, alias in (QUANTIZED | QUANTIZED_PHI).items()}
_BY_NAME |= {name.lower(): _BY_NAME[short.lower()] for name, short in _ORIGINALS.items()}


def alias(name: str) -> Alias | None:
    """The file that a short name or the name of an original stands for, in any case of letters."""
    return _BY_NAME.get(name.lower())
