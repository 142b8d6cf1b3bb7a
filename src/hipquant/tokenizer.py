"""Text to tokens and back, for the vocabularies that GGUF files carry.

Two kinds: `tokenizer.ggml.model` = "llama" (SentencePiece BPE: pieces with scores, U+2581 for a space, byte tokens) and
"gpt2" (byte-level BPE: merges, and a pre-tokenizer chosen by `tokenizer.ggml.pre`). Token ids are those of llama.cpp,
except where it would turn plain text into control tokens. Keys and token types: ggml's docs/gguf.md.
"""

from __future__ import annotations

import codecs
import itertools
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .errors import InvalidModelFileError, TokenizerError
from .pre_tokenizers import OF_ARCHITECTURE, PRE_TOKENIZERS, PreTokenizer

_log = logging.getLogger(__name__)
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_WORD = "\u2581"  # SentencePiece writes a space as this
_SURROGATE = re.compile("[\ud800-\udfff]")

# Texts that end a turn or a document in some family of models, whatever the file's own type for them.
_END_OF_TURN = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<EOT>", "_<EOT>",
    "[EOT]", "<｜end▁of▁sentence｜>", "<end_of_utterance>",
)  # fmt: skip
_END_TEXTS = (
    "</s>", "<eos>", "[EOS]", "<|eom_id|>", "<|return|>", "<|call|>", "<|calls|>", "<|flush|>", "<turn|>",
    "<|tool_response>", "[e~[", "<PAD>", "[PAD]", "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<|fim_repo|>",
    "<fim-repo>", "<|repo_name|>", "<REPO>", "<reponame>", "<|file_sep|>",
)  # fmt: skip
# Control tokens that some converters call user-defined, which would let plain text produce them.
_FILL_IN_MIDDLE = (
    "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>", "<|fim_suffix|>",
    "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>", "<|fim_middle|>", "<fim-middle>",
    "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>",
)  # fmt: skip


def has_vocabulary(metadata: Mapping[str, Any]) -> bool:
    """Whether the file carries a vocabulary: `tokenizer.ggml.model` is there and is not "no_vocab" or "none"."""
    return metadata.get("tokenizer.ggml.model") not in (None, "", "none", "no_vocab")


@dataclass(frozen=True)
class _Vocabulary:
    """The checked arrays of a file: `ids` maps a text to its lowest id, since real files hold duplicates."""

    tokens: list[str]
    types: npt.NDArray[np.int64]
    ids: dict[str, int]

    @classmethod
    def read(cls, metadata: Mapping[str, Any], n_vocab: int | None) -> _Vocabulary:
        tokens = metadata.get("tokenizer.ggml.tokens")
        if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], str):
            raise _invalid("tokens", f"{type(tokens).__name__} of length {_length(tokens)}", "a list of strings")
        if n_vocab is not None and len(tokens) != n_vocab:
            raise _invalid("tokens", f"{len(tokens)} tokens", f"{n_vocab}, the rows of the token embedding")
        types = np.ones(len(tokens), np.int64)
        if "tokenizer.ggml.token_type" in metadata:
            types = _numbers(metadata, "token_type", len(tokens)).astype(np.int64)
        ids = dict(zip(tokens, range(len(tokens)), strict=True))
        if len(ids) != len(tokens):
            _log.warning("%d tokens of the vocabulary are duplicates; the lowest id is used", len(tokens) - len(ids))
            ids = dict(zip(reversed(tokens), reversed(range(len(tokens))), strict=True))
        return cls(tokens, types, ids)


def _invalid(key: str, found: object, expected: object) -> InvalidModelFileError:
    return InvalidModelFileError(f"tokenizer.ggml.{key}: found {found}, expected {expected}")


def _length(value: object) -> int:
    return len(value) if hasattr(value, "__len__") else 0


def _numbers(metadata: Mapping[str, Any], key: str, length: int) -> npt.NDArray[Any]:
    """An array of the file, one number per token."""
    value = metadata.get(f"tokenizer.ggml.{key}")
    array = np.asarray(() if value is None else value)
    if array.shape != (length,) or array.dtype.kind not in "iuf":
        raise _invalid(key, f"{_length(value)} values of {array.dtype}", f"{length} numbers, one for each token")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise _invalid(key, f"{array[~np.isfinite(array)][0]}", "finite numbers")
    return array


def _special_id(metadata: Mapping[str, Any], key: str, n_vocab: int, default: int | None = None) -> int | None:
    """The id under a key; a default that the vocabulary does not reach counts as none."""
    value = metadata.get(f"tokenizer.ggml.{key}")
    if value is None:
        return default if default is not None and default < n_vocab else None
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 0 <= int(value) < n_vocab:
        raise _invalid(key, repr(value), f"an id from 0 to {n_vocab - 1}")
    return int(value)


class _SentencePiece:
    """Merges the adjacent pair whose text is the best-scored token, leftmost first, until none is left; what is then
    no token falls back to its UTF-8 bytes, or to the unknown token in vocabularies without byte tokens.
    """

    _CACHED_LENGTH, _CACHED_PIECES = 48, 1 << 15

    def __init__(self, vocabulary: _Vocabulary, scores: npt.NDArray[Any], unknown: int | None) -> None:
        tokens, types = vocabulary.tokens, vocabulary.types
        byte_ids = [vocabulary.ids.get(f"<0x{byte:02X}>", -1) for byte in range(256)]
        types[[i for i in byte_ids if i >= 0]] = _BYTE
        self.byte_ids, self.unknown = byte_ids, unknown
        # As in SentencePiece itself, text never merges into a control, unknown or byte token.
        texts = np.flatnonzero(~np.isin(types, (_UNKNOWN, _CONTROL, _BYTE))).tolist()
        ranks = np.unique(-scores.astype(np.float32), return_inverse=True)[1].tolist()
        self.ids = {tokens[i]: i for i in reversed(texts)}
        # One integer orders the heap: rank of the score, position (40 bits), length (20 bits).
        self.keys = {text: (ranks[i] << 60) | len(text) for text, i in self.ids.items()}
        self.pairs = _character_pairs(list(self.ids))
        self.cache: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Ids of a text in which spaces are written as U+2581."""
        ids: list[int] = []
        for piece in self._pieces(text):
            found = self.cache.get(piece)
            if found is None:
                found = self._merge(piece)
                if len(piece) <= self._CACHED_LENGTH:
                    if len(self.cache) >= self._CACHED_PIECES:
                        self.cache.clear()
                    self.cache[piece] = found
            ids += found
        return ids

    def _pieces(self, text: str) -> Iterable[str]:
        """Cuts the text between two characters that no token holds side by side: no merge can cross such a place."""
        pairs = _pair_codes(text)
        at = np.searchsorted(self.pairs, pairs)
        cuts = (np.flatnonzero(self.pairs[np.minimum(at, len(self.pairs) - 1)] != pairs) + 1).tolist()
        return (text[start:end] for start, end in itertools.pairwise([0, *cuts, len(text)]))

    def _merge(self, piece: str) -> list[int]:
        key, parts = self.keys.get, list(piece)
        n = len(parts)
        before, after = list(range(-1, n - 1)), [*range(1, n), -1]
        pairs = (key(parts[i] + parts[i + 1]) for i in range(n - 1))
        heap = [pair | (i << 20) for i, pair in enumerate(pairs) if pair is not None]
        heapify(heap)
        while heap:
            entry = heappop(heap)
            left, length = (entry >> 20) & 0xFFFFFFFFFF, entry & 0xFFFFF
            right = after[left]
            if right < 0 or not parts[left] or len(parts[left]) + len(parts[right]) != length:
                continue  # one of the two was merged meanwhile
            parts[left] += parts[right]
            parts[right] = ""
            after[left] = behind = after[right]
            if behind >= 0:
                before[behind] = left
                if (pair := key(parts[left] + parts[behind])) is not None:
                    heappush(heap, pair | (left << 20))
            if (front := before[left]) >= 0 and (pair := key(parts[front] + parts[left])) is not None:
                heappush(heap, pair | (front << 20))
        return [i for part in parts if part for i in self._ids(part)]

    def _ids(self, part: str) -> list[int]:
        if (token := self.ids.get(part)) is not None:
            return [token]
        fallback = [self.byte_ids[byte] for byte in part.encode()]
        if min(fallback) >= 0:
            return fallback
        if self.unknown is None:
            raise TokenizerError(f"the vocabulary has no token for {part!r}, no byte tokens and no unknown token")
        return [self.unknown]


def _pair_codes(text: str) -> npt.NDArray[np.uint64]:
    """One number for each pair of adjacent characters."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint64)
    return (points[:-1] << np.uint64(32)) | points[1:]


def _character_pairs(texts: list[str]) -> npt.NDArray[np.uint64]:
    """The sorted codes of all pairs of characters that stand side by side in one of the texts."""
    pairs = _pair_codes("".join(texts))
    ends = np.cumsum([len(text) for text in texts])[:-1]
    inside = np.ones(len(pairs), bool)
    inside[ends[(ends > 0) & (ends <= len(pairs))] - 1] = False
    return np.append(np.unique(pairs[inside]), np.uint64(2**64 - 1))


def _byte_characters() -> dict[int, str]:
    """The printable character that GPT-2's vocabulary writes for each byte (openai/gpt-2, encoder.py)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {byte: chr(byte) for byte in printable}
    others = (byte for byte in range(256) if byte not in table)
    return table | {byte: chr(256 + n) for n, byte in enumerate(others)}


class _ByteLevel:
    """Byte-level BPE by the `tokenizers` library, over the words that the pre-tokenizer cuts."""

    def __init__(self, vocabulary: _Vocabulary, merges: object, pre: PreTokenizer) -> None:
        from tokenizers import Regex, pre_tokenizers
        from tokenizers import Tokenizer as Backend
        from tokenizers.models import BPE

        if not isinstance(merges, list):
            raise _invalid("merges", type(merges).__name__, "a list of strings")
        pairs = [(merge[:at], merge[at + 1 :]) for merge in merges if (at := merge.find(" ", 1)) > 0]
        if len(pairs) != len(merges):
            bad = next(i for i, merge in enumerate(merges) if merge.find(" ", 1) < 0)
            raise _invalid("merges", f"{merges[bad]!r} at index {bad}", "two tokens with a space between them")
        vocab = vocabulary.ids
        if _SURROGATE.search("".join(vocab)):  # the library takes only UTF-8, and text is never anything else
            vocab = {text: i for text, i in vocab.items() if not _SURROGATE.search(text)}
        try:
            model = BPE(vocab, pairs, ignore_merges=pre.whole_words)
        except Exception as error:  # the library raises nothing narrower
            raise _bad_merge(pairs, vocab, error) from error
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self.backend = Backend(model)
        self.backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
        self.missing = frozenset(byte for byte, text in _byte_characters().items() if text not in vocab)

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Bytes without a token would be lost without a trace, hence the check."""
        if self.missing and (lost := self.missing.intersection(text.encode())):
            raise TokenizerError(f"the vocabulary has no token for the byte 0x{min(lost):02X} of the text")
        ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        return ids


def _bad_merge(pairs: list[tuple[str, str]], vocab: dict[str, int], error: Exception) -> InvalidModelFileError:
    for index, (left, right) in enumerate(pairs):
        for text in (left, right, left + right):
            if text not in vocab:
                found = f"the merge {left + ' ' + right!r} at index {index}"
                return _invalid("merges", found, f"tokens of the vocabulary, which lacks {text!r}")
    return _invalid("merges", error, "a list that the tokenizers library takes")


class _Special(NamedTuple):
    text: str
    id: int
    always: bool  # user-defined tokens are found in any text, the others only where the caller asks for it
    strip_right: bool


class Tokenizer:
    """A model's vocabulary: `encode`, `decode`, `stream`. Immutable; safe to share between threads.

    `bos_id`, `eos_id`, `eot_id` are None where the model has none. `end_ids` holds every token after which generation
    stops. `chat_template` is the file's Jinja source, or None. `notes` says in words what was assumed.
    """

    def __init__(self, metadata: Mapping[str, Any], vocabulary: _Vocabulary) -> None:
        """Use `Tokenizer.from_metadata`."""
        self._vocabulary, self.n_vocab = vocabulary, len(vocabulary.tokens)
        self.notes: tuple[str, ...] = ()
        self._sentencepiece = metadata["tokenizer.ggml.model"] == "llama"
        defaults = (1, 2, 0) if self._sentencepiece else (None, None, None)
        self.bos_id = _special_id(metadata, "bos_token_id", self.n_vocab, defaults[0])
        self.eos_id = _special_id(metadata, "eos_token_id", self.n_vocab, defaults[1])
        unknown = _special_id(metadata, "unknown_token_id", self.n_vocab, defaults[2])
        template = metadata.get("tokenizer.chat_template")
        self.chat_template = template if isinstance(template, str) else None
        self._model: _SentencePiece | _ByteLevel
        if self._sentencepiece:
            scores = _numbers(metadata, "scores", self.n_vocab)
            self._model, default_bos = _SentencePiece(vocabulary, scores, unknown), True
        else:
            pre = self._pre_tokenizer(metadata)
            self._model = _ByteLevel(vocabulary, metadata.get("tokenizer.ggml.merges"), pre)
            default_bos = pre.add_bos
        self._space_prefix = self._sentencepiece and bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
        self._prefix = self._added(metadata, "bos", self.bos_id, default_bos)
        self._suffix = self._added(metadata, "eos", self.eos_id, False)
        self._find_ends(metadata)
        self._find_special(str(metadata.get("general.name", "")).lower())
        self._byte_of = {character: byte for byte, character in _byte_characters().items()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], n_vocab: int | None = None) -> Tokenizer:
        """Builds the tokenizer of a GGUF file.

        `metadata` maps GGUF keys to Python values (arrays of numbers as numpy arrays, of strings as lists of str, with
        surrogate escapes where a string is not UTF-8). `n_vocab` is the number of rows of the token embedding.

        Raises TokenizerError for a file without a vocabulary or of a kind that is not known here, and
        InvalidModelFileError, naming key, found and expected, for arrays and ids that do not fit together.
        """
        kind = metadata.get("tokenizer.ggml.model")
        if not has_vocabulary(metadata):
            raise TokenizerError(f"the model file has no vocabulary (tokenizer.ggml.model is {kind!r}): pass token ids")
        if kind not in ("llama", "gpt2"):
            raise TokenizerError(f"tokenizer.ggml.model is {kind!r}; known: gpt2 llama")
        return cls(metadata, _Vocabulary.read(metadata, n_vocab))

    def _pre_tokenizer(self, metadata: Mapping[str, Any]) -> PreTokenizer:
        name = metadata.get("tokenizer.ggml.pre")
        if name is None:
            name = OF_ARCHITECTURE.get(str(metadata.get("general.architecture")), "default")
            taken = f"that of {name} is taken" if name != "default" else "llama.cpp's guess is taken; convert it again"
            self.notes += (f"the file names no pre-tokenizer (tokenizer.ggml.pre), as old files do: {taken}",)
            _log.warning(self.notes[-1])
        if name not in PRE_TOKENIZERS:
            known = " ".join(sorted(PRE_TOKENIZERS))
            raise TokenizerError(f"tokenizer.ggml.pre names an unknown pre-tokenizer {name!r}; known: {known}")
        return PRE_TOKENIZERS[name]

    @staticmethod
    def _added(metadata: Mapping[str, Any], name: str, token: int | None, default: bool) -> list[int]:
        """The token that encode puts at one end of a text."""
        flag = metadata.get(f"tokenizer.ggml.add_{name}_token")
        if flag and token is None:
            raise _invalid(f"add_{name}_token", "true", f"false, as there is no {name}_token_id")
        return [token] if token is not None and (default if flag is None else flag) else []

    def _find_ends(self, metadata: Mapping[str, Any]) -> None:
        ids, types = self._vocabulary.ids, self._vocabulary.types
        named = [_special_id(metadata, f"{key}_token_id", self.n_vocab) for key in ("eot", "eom")]
        self.eot_id = next((i for i in (named[0], *map(ids.get, _END_OF_TURN)) if i is not None), None)
        found = {text: ids[text] for text in (*_END_OF_TURN, *_END_TEXTS) if text in ids}
        if "</s>" in found and types[found["</s>"]] == _NORMAL:
            found.pop("</s>")  # the HTML tag in byte-level vocabularies
        types[[*found.values(), *(ids[text] for text in _FILL_IN_MIDDLE if text in ids)]] = _CONTROL
        harmony = {"<|return|>", "<|call|>"} <= found.keys() or {"<|flush|>", "<|calls|>"} <= found.keys()
        if harmony:
            found.pop("<|end|>", None)  # there it ends a message, not the answer
        ends = {*found.values(), self.eos_id, named[1], *((self.eot_id,) if not harmony else named[:1])}
        self.end_ids: frozenset[int] = frozenset(i for i in ends if i is not None)

    def _find_special(self, model_name: str) -> None:
        tokens, types = self._vocabulary.tokens, self._vocabulary.types
        phi3 = "phi-3" in model_name or "phi3" in model_name  # its special tokens swallow the white space after them
        keeps_space = ("<unk>", "<s>", "<|endoftext|>")
        special = np.flatnonzero(np.isin(types, (_UNKNOWN, _CONTROL, _USER_DEFINED))).tolist()
        found = [
            _Special(tokens[i], i, types[i] == _USER_DEFINED, phi3 and tokens[i] not in keeps_space)
            for i in special
            if tokens[i] and self._vocabulary.ids[tokens[i]] == i
        ]
        self._special = sorted(found, key=lambda special: -len(special.text.encode("utf-8", "surrogateescape")))
        self._hidden = frozenset(i for i in special if types[i] != _USER_DEFINED)
        self._verbatim = frozenset(special)

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """The token ids of a text.

        `add_special` puts BOS before and EOS after it where the model wants them; `parse_special` lets the texts of
        control tokens stand for these tokens (for rendered chat templates, never for what a user typed).
        Raises TokenizerError for a text that is not Unicode (lone surrogates) or that the vocabulary cannot express.
        """
        if lone := _SURROGATE.search(text):
            raise TokenizerError(f"character {lone.start()} of the text is the lone surrogate {lone.group()!a}")
        ids: list[int] = []
        space = self._space_prefix
        for fragment in self._fragments(text, parse_special):
            if isinstance(fragment, int):
                ids.append(fragment)
            elif self._sentencepiece:
                ids += self._model.encode((_WORD if space else "") + fragment.replace(" ", _WORD))
            else:
                ids += self._model.encode(fragment)
            space = self._space_prefix and isinstance(fragment, int)
        if not add_special:
            return ids
        doubled = parse_special and ids[:1] == self._prefix  # many chat templates write BOS themselves
        return [*(() if doubled else self._prefix), *ids, *self._suffix]

    def _fragments(self, text: str, parse_special: bool) -> list[str | int]:
        """The text with its special tokens replaced by their ids; the longest are looked for first."""
        fragments: list[str | int] = [text] if text else []
        for special in self._special:
            if not (parse_special or special.always) or special.text not in text:
                continue
            split: list[str | int] = []
            for fragment in fragments:
                if isinstance(fragment, int):
                    split.append(fragment)
                    continue
                first, *others = fragment.split(special.text)
                split += [first] if first else []
                for other in others:
                    rest = other.lstrip(" \t\n\v\f\r") if special.strip_right else other
                    split += [special.id, rest] if rest else [special.id]
            fragments = split
        return fragments

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for; of a control token its name. Raises TokenizerError for an id out of range."""
        token = int(token)
        if not 0 <= token < self.n_vocab:
            raise TokenizerError(f"token {token} is not in the vocabulary: ids run from 0 to {self.n_vocab - 1}")
        text = self._vocabulary.tokens[token]
        if token not in self._verbatim:
            if self._vocabulary.types[token] == _BYTE and len(text) == 6:
                return bytes((int(text[3:5], 16),))
            if not self._sentencepiece:
                raw = (self._byte_of.get(c) for c in text)
                encoded = (c.encode("utf-8", "surrogateescape") for c in text)
                return b"".join(e if b is None else bytes((b,)) for b, e in zip(raw, encoded, strict=True))
            text = text.replace(_WORD, " ")
        return text.encode("utf-8", "surrogateescape")

    def decode(self, ids: Iterable[int], *, skip_special: bool = True, start: bool = True) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD.

        `skip_special` leaves out control tokens. `start` says that the ids begin a text: the space that SentencePiece
        vocabularies put there is then removed.
        """
        stream = self.stream(skip_special=skip_special, start=start)
        return stream._decode(b"".join(map(stream._bytes, ids)), final=True)

    def stream(self, *, skip_special: bool = True, start: bool = False) -> StreamDecoder:
        """A decoder that takes one token at a time. By default the tokens continue a text, so their space is kept."""
        return StreamDecoder(self, skip_special, start)


class StreamDecoder:
    """Turns tokens into text as they come, holding back the bytes of an incomplete character.

    The pieces and the flush together are what `Tokenizer.decode` makes of the whole.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True, start: bool = False) -> None:
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._strip = start and tokenizer._space_prefix
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def _bytes(self, token: int) -> bytes:
        raw = self._tokenizer.token_bytes(token)
        if self._skip_special and token in self._tokenizer._hidden:
            return b""
        strip, self._strip = self._strip, False
        return raw[1:] if strip and raw.startswith(b" ") and token not in self._tokenizer._verbatim else raw

    def push(self, token: int) -> str:
        """The text that became certain with this token; often empty. Raises TokenizerError for an unknown id."""
        return self._decode(self._bytes(token))

    def flush(self) -> str:
        """The end of the text: U+FFFD for a character that was never completed, else nothing."""
        return self._decode(b"", final=True)
