"""A small byte-level vocabulary for test models: every byte, a few merges, and special tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf

from hipquant.tokenizer import _byte_characters
from models import LlamaFile, write_llama

MERGES = ("t h", "th e", "i n", "e r", "a n", "o n", "Ġ t", "Ġt h", "Ġth e", "Ġ a")
BEGIN, TURN, END = "<|begin|>", "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOKENS = [*_byte_characters().values(), *(m.replace(" ", "") for m in MERGES), BEGIN, TURN, END]


def add_vocabulary(
    *, begin: bool = True, ends: bool = True, chat_template: str | None = None
) -> Callable[[gguf.GGUFWriter], None]:
    """For `write_llama(extra=…, n_vocab=len(TOKENS))`; `begin` puts a begin token before each text; without `ends`
    no token ends a text."""

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(TOKENS if ends else [*TOKENS[:-1], "<|no_end|>"])
        writer.add_token_types([1] * (len(TOKENS) - 3) + [3] * 3)
        writer.add_token_merges(list(MERGES))
        writer.add_bos_token_id(TOKENS.index(BEGIN))
        if ends:
            writer.add_eos_token_id(TOKENS.index(END))
        writer.add_add_bos_token(begin)
        writer.add_add_eos_token(False)
        if chat_template is not None:
            writer.add_chat_template(chat_template)

    return add


def write_speaker(
    path: Path, *, begin: bool = True, ends: bool = True, chat_template: str | None = None, **sizes: Any
) -> LlamaFile:
    """A tiny random model that takes text."""
    extra = add_vocabulary(begin=begin, ends=ends, chat_template=chat_template)
    sizes = {"n_embd": 64, "n_ff": 128, "n_head": 2, "n_kv": 1} | sizes
    return write_llama(path, n_vocab=len(TOKENS), extra=extra, **sizes)
