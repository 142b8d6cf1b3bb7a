"""tokenizer.json to the vocabulary of a GGUF file: byte-level BPE ("gpt2"), or SentencePiece's BPE ("llama")."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import TokenizerError
from ..gguf_writer import KeyValue, Uint32
from ..pre_tokenizers import PRE_TOKENIZERS
from .safetensors import read_json

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_WORD = "\u2581"
_PAIRS = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))  # of added tokens that plain text must not produce
_GPT2 = PRE_TOKENIZERS["gpt-2"].patterns[0]
# The same in the table's words: it knows no inline flags.
_CONTRACTIONS = ("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])")

Json = dict[str, Any]


def read_vocabulary(folder: Path, config: Json, n_vocab: int) -> dict[str, KeyValue]:
    """The keys `tokenizer.*` of a model with n_vocab rows in its embedding. `TokenizerError` for a tokenizer that GGUF
    cannot express, with what was found."""
    path = folder / "tokenizer.json"
    file = read_json(path)
    options = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
    model = file.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict):
        found = model.get("type") if isinstance(model, dict) else model
        raise TokenizerError(f"{path}: a model of type {found!r:.60}, expected BPE with a vocabulary")
    try:
        merges = [m if isinstance(m, str) else " ".join(p.replace(" ", "\u0120") for p in m) for m in model["merges"]]
        if not merges:
            raise TokenizerError(f"{path}: BPE without merges")
        tokens, types = _tokens(file, model, n_vocab)
        sentence_piece = bool(model.get("byte_fallback"))
        keys = _sentence_piece(path, file, model, merges, tokens, types) if sentence_piece else _byte_level(path, file)
        if not sentence_piece:
            "".join(merges).encode()
            keys["tokenizer.ggml.merges"] = merges
        keys |= _special(file, options, config, tokens)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, TokenizerError):
            raise
        raise TokenizerError(f"{path}: its parts do not fit together ({error!r:.100}); download it again") from None
    common: dict[str, KeyValue] = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    return common | keys | _template(folder, options)


def _tokens(file: Json, model: Json, n_vocab: int) -> tuple[list[str], list[int]]:
    """Texts and types by id; ids that the tokenizer lacks are padding."""
    tokens, types = [f"[PAD{i}]" for i in range(n_vocab)], [_UNUSED] * n_vocab
    added = file.get("added_tokens") or []
    for i in [*model["vocab"].values(), *(t["id"] for t in added)]:
        if type(i) is not int or not 0 <= i < n_vocab:
            raise TokenizerError(f"the tokenizer has an id {i!r:.20}, the embedding {n_vocab} rows")
    for text in [*model["vocab"], *(t["content"] for t in added)]:
        text.encode()  # a text that is none, or half a character, is an error here
    for text, i in model["vocab"].items():
        tokens[i], types[i] = text, _NORMAL
    for token in added:
        text = token["content"]
        control = token.get("special") or text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
        control = control or any(text.startswith(a) and text.endswith(b) for a, b in _PAIRS)
        types[token["id"]] = _CONTROL if control else _USER_DEFINED
        tokens[token["id"]] = text if control else text.replace(_WORD, " ")
    return tokens, types


def _parts(step: Json | None, inner: str) -> Iterator[Json]:
    """A step, or those of a sequence of steps."""
    if step:
        yield from step[inner] if step.get("type") == "Sequence" else [step]


def _byte_level(path: Path, file: Json) -> dict[str, KeyValue]:
    """The name of the pre-tokenizer whose patterns the file has."""
    patterns: list[str] = []
    for step in _parts(file.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "Split":
            patterns.append(step["pattern"]["Regex"].replace(*_CONTRACTIONS))
        elif step["type"] == "Digits":
            patterns.append(r"\p{N}" if step.get("individual_digits") else r"\p{N}+")
        elif step["type"] == "ByteLevel":
            patterns += [_GPT2] if step.get("use_regex", True) else []
        else:
            raise TokenizerError(f"{path}: a pre-tokenizer of type {step['type']!r}, which GGUF has no name for")
    whole = bool(file["model"].get("ignore_merges"))
    for name, known in PRE_TOKENIZERS.items():
        if name != "default" and known.patterns == tuple(patterns) and known.whole_words == whole:
            return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name}
    raise TokenizerError(f"{path}: no pre-tokenizer with a name has the patterns {patterns!r:.300}")


def _sentence_piece(
    path: Path, file: Json, model: Json, merges: list[str], tokens: list[str], types: list[int]
) -> dict[str, KeyValue]:
    """Scores that merge in the order of the merges; types of bytes and of the unknown token; the space in front."""
    normal = list(_parts(file.get("normalizer"), "normalizers"))
    split = [s for s in _parts(file.get("pre_tokenizer"), "pretokenizers") if s["type"] == "Metaspace"]
    prefix = any(s["type"] == "Prepend" for s in normal) or any(s.get("prepend_scheme") != "never" for s in split)
    if not split and not any(s["type"] == "Replace" and s["content"] == _WORD for s in normal):
        raise TokenizerError(f"{path}: no step writes spaces as {_WORD!r}, as SentencePiece does")
    ranks: dict[str, int] = {}
    for i, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", ""), i)
    scores = [float(-ranks.get(t, len(merges))) if k == _NORMAL else 0.0 for t, k in zip(tokens, types, strict=True)]
    for i, token in enumerate(tokens):
        if len(token) == 6 and token.startswith("<0x"):
            types[i] = _BYTE
    if model.get("unk_token") in model["vocab"]:
        types[model["vocab"][model["unk_token"]]] = _UNKNOWN
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": prefix,
    }


def _special(file: Json, options: Json, config: Json, tokens: list[str]) -> dict[str, KeyValue]:
    """The ids of the tokens that begin, end and fill up texts, and whether they are added."""
    keys: dict[str, KeyValue] = {}
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        found = options.get(f"{theirs}_token")
        text = found.get("content") if isinstance(found, dict) else found
        number = tokens.index(text) if text in tokens else config.get(f"{theirs}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if type(number) is int and 0 <= number < len(tokens):
            keys[f"tokenizer.ggml.{ours}_token_id"] = Uint32(number)
    first, bos = None, keys.get("tokenizer.ggml.bos_token_id")
    for step in _parts(file.get("post_processor"), "processors"):
        if step.get("type") == "TemplateProcessing" and step.get("single"):
            first = step["single"][0].get("SpecialToken", {}).get("id")
    added = isinstance(bos, Uint32) and first == tokens[bos.value]
    stated = options.get("add_bos_token")
    keys["tokenizer.ggml.add_bos_token"] = stated if isinstance(stated, bool) else added
    if isinstance(options.get("add_eos_token"), bool):
        keys["tokenizer.ggml.add_eos_token"] = options["add_eos_token"]
    return keys


def _template(folder: Path, options: Json) -> dict[str, KeyValue]:
    """The chat template: in a file of its own, or in tokenizer_config.json, alone or as the default of several."""
    found = options.get("chat_template")
    if isinstance(found, list):
        found = next((t.get("template") for t in found if isinstance(t, dict) and t.get("name") == "default"), None)
    if (folder / "chat_template.jinja").exists():
        found = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    return {"tokenizer.chat_template": found} if isinstance(found, str) else {}
