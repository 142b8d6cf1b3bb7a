import json
import os
import struct
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hipquant.errors import InvalidModelFileError, TokenizerError
from hipquant.pre_tokenizers import PRE_TOKENIZERS
from hipquant.tokenizer import Tokenizer, _byte_characters, has_vocabulary

NORMAL, UNKNOWN, CONTROL, USER, BYTE = 1, 2, 3, 4, 6
BYTES = [_byte_characters()[i] for i in range(256)]


def byte_level(words=("he", "ll", "llo", "hello", "Ġw", "Ġwo"), special=(), pre="gpt-2", **more):
    """A byte-level vocabulary: ids 0-255 are the bytes, then the words, then (text, type) specials."""
    merges = {"he": "h e", "ll": "l l", "llo": "ll o", "hello": "he llo", "Ġw": "Ġ w", "Ġwo": "Ġw o"}
    tokens = [*BYTES, *words, *(text for text, _ in special)]
    types = [NORMAL] * (256 + len(words)) + [kind for _, kind in special]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.merges": [merges[word] for word in words],
    }
    return metadata | {f"tokenizer.ggml.{key}": value for key, value in more.items()}


def sentencepiece(pieces=(), with_bytes=True, special=(), **more):
    """A SentencePiece vocabulary: <unk> <s> </s>, the bytes from id 3, then (text, score), then (text, type)."""
    names = [f"<0x{i:02X}>" for i in range(256)] if with_bytes else []
    tokens = ["<unk>", "<s>", "</s>", *names, *(p for p, _ in pieces), *(s for s, _ in special)]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * len(names), *[NORMAL] * len(pieces), *(t for _, t in special)]
    scores = [0.0] * (3 + len(names)) + [score for _, score in pieces] + [0.0] * len(special)
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.scores": np.array(scores, np.float32),
    }
    return metadata | {f"tokenizer.ggml.{key}": value for key, value in more.items()}


PIECES = [("\u2581", -9), ("h", -8), ("e", -7), ("l", -6), ("o", -5), ("he", -1), ("ll", -2), ("\u2581he", -3),
          ("llo", -4), ("\u2581hello", -4.5)]  # fmt: skip


def ids_of(metadata, *texts):
    return [metadata["tokenizer.ggml.tokens"].index(text) for text in texts]


# --- what the ids are ---


def test_byte_level_ids():
    tokenizer = Tokenizer.from_metadata(byte_level())
    assert tokenizer.encode("hello wo") == [259, 261]
    assert tokenizer.encode("hello  wow") == [259, ord(" "), 261, ord("w")]
    assert tokenizer.encode("") == []
    assert tokenizer.token_bytes(261) == b" wo"
    assert tokenizer.n_vocab == 262


def test_sentencepiece_ids():
    metadata = sentencepiece(PIECES)
    tokenizer = Tokenizer.from_metadata(metadata)
    assert tokenizer.encode("hello") == [1, *ids_of(metadata, "\u2581hello")]
    assert tokenizer.encode("hello", add_special=False) == ids_of(metadata, "\u2581hello")
    assert tokenizer.encode("é\n", add_special=False) == ids_of(metadata, "\u2581", "<0xC3>", "<0xA9>", "<0x0A>")
    assert tokenizer.encode("") == [1]
    plain = Tokenizer.from_metadata(metadata | {"tokenizer.ggml.add_space_prefix": False})
    assert plain.encode("hell", add_special=False) == ids_of(metadata, "he", "ll")


def test_sentencepiece_leftmost_pair_first_where_scores_are_equal():
    metadata = sentencepiece([("a", -1), ("aa", -2), ("aaa", -2)], add_space_prefix=False)
    tokenizer = Tokenizer.from_metadata(metadata)
    assert tokenizer.encode("aaaaa", add_special=False) == ids_of(metadata, "aaa", "aa")


def naive_sentencepiece(text, scores):
    parts = list(text)
    while True:
        pairs = [(-scores[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in scores]
        if not pairs:
            return parts
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


@given(
    st.dictionaries(st.text("ab\u2581", min_size=1, max_size=5), st.integers(-3, 0), max_size=25),
    st.text("ab c", max_size=40),
)
@settings(max_examples=150, deadline=None)
def test_sentencepiece_is_the_naive_algorithm(words, text):
    pieces = [(c, -9) for c in "abc\u2581" if c not in words] + list(words.items())
    metadata = sentencepiece(pieces)
    expected = naive_sentencepiece("\u2581" + text.replace(" ", "\u2581"), dict(pieces)) if text else []
    tokenizer = Tokenizer.from_metadata(metadata)
    assert [metadata["tokenizer.ggml.tokens"][i] for i in tokenizer.encode(text, add_special=False)] == expected


def test_without_byte_tokens_the_unknown_token_stands_in():
    metadata = sentencepiece(PIECES, with_bytes=False)
    assert Tokenizer.from_metadata(metadata).encode("éo", add_special=False) == [3, 0, 3 + 4]


def test_plain_text_never_becomes_a_control_token():
    pieces = [(c, -1) for c in "<s>/0xA"] + [("</", -1), ("s>", -1), ("<0", -1), ("x0", -1), ("x0A", -1), ("<0x0A", -1)]
    metadata = sentencepiece(pieces, add_space_prefix=False)
    tokenizer = Tokenizer.from_metadata(metadata)
    assert tokenizer.encode("</s>", add_special=False) == ids_of(metadata, "</", "s>")
    assert tokenizer.encode("<0x0A>", add_special=False) == ids_of(metadata, "<0x0A", ">")
    assert tokenizer.encode("</s>", add_special=False, parse_special=True) == [2]


SPLITS = {  # what each pre-tokenizer makes of one text; from the models' published tokenizer.json patterns
    "gpt-2": "I|'m| 1234|\n  \n|\t|x| don|'|T|!!|\n",
    "llama-bpe": "I|'m| |123|4|\n  \n|\tx| don|'T|!!\n",
    "qwen2": "I|'m| |1|2|3|4|\n  \n|\tx| don|'T|!!\n",
    "smollm": "I|'m| |1|2|3|4|\n  \n|\t|x| don|'|T|!!|\n",
    "deepseek-llm": "I|'|m| |1234|\n|  |\n|\tx| don|'|T|!!|\n",
    "deepseek-coder": "I|'|m| |1|2|3|4|\n|  |\n|\tx| don|'|T|!!|\n",
    "falcon": "I|'|m| |123|4|\n  \n|\t|x| don|'|T|!!|\n",
    "gpt-4o": "I'm| |123|4|\n  \n|\tx| don'T|!!\n",
    "tekken": "I|'m| |1|2|3|4|\n  \n|\tx| don|'T|!!\n",
    "deepseek-v3": "I|'m| |123|4|\n  \n|\tx| don|'T|!!\n",
}


def words(tokenizer, text):
    return [text[a:b] for _, (a, b) in tokenizer._model.backend.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize("pre", SPLITS)
def test_pre_tokenizers(pre):
    assert "|".join(words(Tokenizer.from_metadata(byte_level(pre=pre)), "I'm 1234\n  \n\tx don'T!!\n")) == SPLITS[pre]


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_pre_tokenizers_lose_nothing(pre):
    tokenizer = Tokenizer.from_metadata(byte_level(pre=pre, bos_token_id=0))
    text = "  Ünï 9876543 x²\r\n\t你好吗ー が한국 'Ll 🚀🦙 ¡? \u0301\u3000…\n\n  "
    assert tokenizer.decode(tokenizer.encode(text, add_special=False)) == text
    with_bos = "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral lfm2 midm-2.0 tekken".split()
    assert tokenizer.encode("a") == [0, ord("a")][pre not in with_bos :]


def test_whole_words_go_before_merges():
    words = ("he", "ll", "llo", "hello", "Ġw", "Ġwo")
    metadata = byte_level(words) | {"tokenizer.ggml.merges": ["h e", "l l"]}
    assert Tokenizer.from_metadata(metadata).encode("hello") == [256, 257, ord("o")]
    assert Tokenizer.from_metadata(metadata | {"tokenizer.ggml.pre": "llama-bpe"}).encode("hello") == [259]


# --- special tokens ---

SPECIAL = (("<|im_start|>", CONTROL), ("<|im_end|>", CONTROL), ("<think>", USER), ("<|endoftext|>", CONTROL))


def test_special_tokens():
    tokenizer = Tokenizer.from_metadata(byte_level(special=SPECIAL, bos_token_id=265, eos_token_id=265))
    start, end, think, text_end = range(262, 266)
    assert tokenizer.encode("<|im_start|>hello<|im_end|>", parse_special=True) == [start, 259, end]
    assert start not in tokenizer.encode("<|im_start|>hello")
    assert tokenizer.encode("<think>hello") == [think, 259]
    assert tokenizer.decode([start, 259, think, end]) == "hello<think>"
    assert tokenizer.decode([start, 259, end], skip_special=False) == "<|im_start|>hello<|im_end|>"
    assert (tokenizer.eot_id, tokenizer.eos_id, tokenizer.bos_id) == (end, text_end, text_end)
    assert tokenizer.end_ids == {end, text_end}


def test_the_longest_special_token_wins():
    tokenizer = Tokenizer.from_metadata(byte_level(special=(("<a", USER), ("<a>", USER))))
    assert tokenizer.encode("<a><a") == [263, 262]


def test_bos_and_eos():
    special = (("<bos>", CONTROL), ("<eos>", CONTROL))
    both = {"bos_token_id": 262, "eos_token_id": 263, "add_bos_token": True, "add_eos_token": True}
    tokenizer = Tokenizer.from_metadata(byte_level(special=special, **both))
    assert tokenizer.encode("hello") == [262, 259, 263]
    assert tokenizer.encode("hello", add_special=False) == [259]
    assert tokenizer.encode("<bos>hello", parse_special=True) == [262, 259, 263]
    default = {"bos_token_id": 262, "eos_token_id": 263}
    assert Tokenizer.from_metadata(byte_level(special=special, **default)).encode("hello") == [259]
    assert Tokenizer.from_metadata(byte_level(special=special, pre="llama3", **default)).encode("hello") == [262, 259]
    off = default | {"add_bos_token": False}
    assert Tokenizer.from_metadata(byte_level(special=special, pre="llama3", **off)).encode("hello") == [259]
    assert Tokenizer.from_metadata(sentencepiece(PIECES, add_eos_token=True)).encode("")[-1] == 2


def test_phi3_special_tokens_swallow_the_space_after_them():
    metadata = sentencepiece(PIECES, special=[("<|user|>", CONTROL)]) | {"general.name": "Phi-3 mini"}
    tokenizer = Tokenizer.from_metadata(metadata)
    user = ids_of(metadata, "<|user|>")
    assert tokenizer.encode("<|user|> \n hello", parse_special=True) == [1, *user, *ids_of(metadata, "\u2581hello")]
    kept = tokenizer.encode("<s>\n", add_special=False, parse_special=True)
    assert kept == [1, *ids_of(metadata, "\u2581", "<0x0A>")]


@pytest.mark.parametrize(
    ("names", "ends"),
    [
        (["<|eot_id|>", "<|eom_id|>", "<|start_header_id|>"], ["<|eot_id|>", "<|eom_id|>"]),
        (["<|end|>", "<|return|>", "<|call|>"], ["<|return|>", "<|call|>"]),
        (["<|end|>", "<|user|>"], ["<|end|>"]),
        (["<end_of_turn>", "<eos>"], ["<end_of_turn>", "<eos>"]),
    ],
)
def test_tokens_that_end_generation(names, ends):
    metadata = byte_level(special=[(name, NORMAL) for name in names])  # some converters leave them normal
    tokenizer = Tokenizer.from_metadata(metadata)
    assert tokenizer.end_ids == set(ids_of(metadata, *ends))
    assert tokenizer.decode(ids_of(metadata, *ends)) == ""
    named = Tokenizer.from_metadata(metadata | {"tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.eos_token_id": 9})
    assert {7, 9} <= named.end_ids
    assert named.eot_id == 7


def test_html_strike_is_no_end_in_byte_level_vocabularies():
    metadata = byte_level(special=[("</s>", NORMAL)])
    assert Tokenizer.from_metadata(metadata).end_ids == frozenset()
    assert Tokenizer.from_metadata(sentencepiece(PIECES)).end_ids == {2}


# --- round trips and streams ---

BYTE_LEVEL = Tokenizer.from_metadata(byte_level(special=SPECIAL))
SENTENCEPIECE = Tokenizer.from_metadata(sentencepiece(PIECES))


@given(st.text(max_size=60))  # no lone surrogates by default
@settings(max_examples=200, deadline=None)
def test_round_trip(text):
    assert BYTE_LEVEL.decode(BYTE_LEVEL.encode(text), skip_special=False) == text
    plain = text.replace("\u2581", "")  # SentencePiece's space
    assert SENTENCEPIECE.decode(SENTENCEPIECE.encode(plain)) == plain
    assert SENTENCEPIECE.decode(SENTENCEPIECE.encode(plain, add_special=False)) == plain


@given(st.data(), st.sampled_from([BYTE_LEVEL, SENTENCEPIECE]), st.booleans(), st.booleans())
@settings(max_examples=200, deadline=None)
def test_stream_is_decode(data, tokenizer, skip_special, start):
    ids = data.draw(st.lists(st.integers(0, tokenizer.n_vocab - 1), max_size=40))
    stream = tokenizer.stream(skip_special=skip_special, start=start)
    pieces = [stream.push(token) for token in ids]
    whole = tokenizer.decode(ids, skip_special=skip_special, start=start)
    assert "".join(pieces) + stream.flush() == whole
    raw = b"".join(tokenizer.token_bytes(i) for i in ids)
    if not skip_special and not start:
        assert whole == raw.decode("utf-8", "replace")


def test_stream_holds_back_incomplete_characters():
    ids = BYTE_LEVEL.encode("é🚀")
    stream = BYTE_LEVEL.stream()
    assert [stream.push(i) for i in ids] == ["", "é", "", "", "", "🚀"]
    assert [stream.push(i) for i in ids[:3]] == ["", "é", ""]
    assert stream.flush() == "\ufffd"


def test_the_space_of_a_beginning():
    ids = SENTENCEPIECE.encode("hello", add_special=False)
    assert SENTENCEPIECE.decode(ids) == "hello"
    assert SENTENCEPIECE.decode(ids, start=False) == " hello"
    assert SENTENCEPIECE.stream().push(ids[0]) == " hello"


# --- what is refused ---


def test_files_without_a_vocabulary():
    for metadata in ({}, {"tokenizer.ggml.model": "no_vocab"}, {"tokenizer.ggml.model": "none"}):
        assert not has_vocabulary(metadata)
        with pytest.raises(TokenizerError, match="no vocabulary"):
            Tokenizer.from_metadata(metadata)
    assert has_vocabulary(byte_level())
    with pytest.raises(TokenizerError, match="'bert'; known: gpt2 llama"):
        Tokenizer.from_metadata(byte_level() | {"tokenizer.ggml.model": "bert"})


def test_pre_tokenizer_names():
    with pytest.raises(TokenizerError, match=r"'klingon'; known: .*llama-bpe.*qwen2"):
        Tokenizer.from_metadata(byte_level(pre="klingon"))
    old = byte_level()
    del old["tokenizer.ggml.pre"]
    tokenizer = Tokenizer.from_metadata(old)
    assert "llama.cpp's guess is taken" in tokenizer.notes[0]
    assert tokenizer.encode("hello") == [259]
    assert words(tokenizer, " a-1234") == [" a", "-", "123", "4"]
    of_phi = Tokenizer.from_metadata(old | {"general.architecture": "phi2"})
    assert "that of phi-2 is taken" in of_phi.notes[0]
    assert words(of_phi, " a-1234") == [" a", "-", "1234"]
    assert Tokenizer.from_metadata(byte_level()).notes == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": None}, "tokens: found NoneType of length 0, expected a list of strings"),
        ({"token_type": np.ones(5, np.int32)}, "token_type: found 5 values of int32, expected 269 numbers"),
        ({"scores": np.ones(300, np.float32)}, "scores: found 300 values of float32, expected 269 numbers"),
        ({"scores": None}, "scores: found 0 values"),
        ({"scores": np.full(269, np.nan, np.float32)}, "scores: found nan, expected finite"),
        ({"bos_token_id": 269}, "bos_token_id: found 269, expected an id from 0 to 268"),
        ({"eos_token_id": -1}, "eos_token_id: found -1, expected"),
        ({"eot_token_id": 2**32 - 1}, "eot_token_id: found 4294967295"),
        ({"unknown_token_id": "x"}, "unknown_token_id: found 'x'"),
    ],
)
def test_arrays_that_do_not_fit(change, message):
    metadata = sentencepiece(PIECES, **change)
    with pytest.raises(InvalidModelFileError) as error:
        Tokenizer.from_metadata(metadata)
    assert str(error.value).startswith(f"tokenizer.ggml.{message}")


def test_merges_that_do_not_fit():
    for merges, message in (
        (None, "found NoneType, expected a list"),
        (["he"], "found 'he' at index 0, expected two tokens"),
        (["h e", "x y"], "found the merge 'x y' at index 1, expected tokens of the vocabulary, which lacks 'xy'"),
    ):
        with pytest.raises(InvalidModelFileError, match=message):
            Tokenizer.from_metadata(byte_level() | {"tokenizer.ggml.merges": merges})
    with pytest.raises(InvalidModelFileError, match="add_bos_token: found true"):
        Tokenizer.from_metadata(byte_level(add_bos_token=True))


def test_rows_of_the_embedding():
    assert Tokenizer.from_metadata(byte_level(), 262).n_vocab == 262
    with pytest.raises(InvalidModelFileError, match="found 262 tokens, expected 300, the rows"):
        Tokenizer.from_metadata(byte_level(), 300)


def test_duplicates_and_broken_strings_are_taken():
    special = (("he", USER), ("\udcff\udcfe", NORMAL), ("", NORMAL))
    for metadata in (byte_level(special=special), sentencepiece([("he", -1), ("he", 0)], special=special[1:])):
        tokenizer = Tokenizer.from_metadata(metadata)
        first = metadata["tokenizer.ggml.tokens"].index("he")
        assert first in tokenizer.encode("he")
        assert tokenizer.token_bytes(tokenizer.n_vocab - 2) == b"\xff\xfe"
        assert tokenizer.decode([tokenizer.n_vocab - 2]) == "\ufffd\ufffd"
        assert tokenizer.token_bytes(tokenizer.n_vocab - 1) == b""


def test_text_that_cannot_be_expressed():
    for tokenizer in (BYTE_LEVEL, SENTENCEPIECE):
        with pytest.raises(TokenizerError, match=r"character 2 of the text is the lone surrogate '\\ud800'"):
            tokenizer.encode("ab\ud800")
        for token in (-1, tokenizer.n_vocab):
            with pytest.raises(TokenizerError, match=f"token {token} is not in the vocabulary"):
                tokenizer.decode([token])
    lacking = byte_level()
    lacking["tokenizer.ggml.tokens"] = ["[gone]" if t == "A" else t for t in lacking["tokenizer.ggml.tokens"]]
    assert Tokenizer.from_metadata(lacking).encode("hello") == [259]
    with pytest.raises(TokenizerError, match="no token for the byte 0x41"):
        Tokenizer.from_metadata(lacking).encode("A")
    bare = sentencepiece(PIECES, with_bytes=False)
    bare["tokenizer.ggml.unknown_token_id"] = None
    assert Tokenizer.from_metadata(bare).encode("é", add_special=False) == [3, 0]


# --- time ---


@pytest.mark.parametrize("text", ["a", "ab", " ", "\n", "9", "A", "ก", "的", "\u0301", "<|im_start", "'"])
@pytest.mark.parametrize("pre", ["llama", "llama-bpe", "deepseek-llm", "gpt-4o", "falcon"])
def test_a_long_text_without_a_space_is_not_quadratic(pre, text):
    many = [("a" * n, -n) for n in range(1, 17)] + [("ab", -20), ("\u2581\u2581", -21), ("\u2581", -22)]
    tokenizer = SENTENCEPIECE if pre == "llama" else Tokenizer.from_metadata(byte_level(special=SPECIAL, pre=pre))
    tokenizer = Tokenizer.from_metadata(sentencepiece(many)) if pre == "llama" else tokenizer
    long = text * (60_000 // len(text)) + "ก"
    start = time.perf_counter()
    ids = tokenizer.encode(long, parse_special=True)
    assert time.perf_counter() - start < 2  # quadratic: minutes
    assert tokenizer.decode(ids) == long


def test_loading_time():
    metadata = sentencepiece([(f"\u2581{n:x}", -n) for n in range(32_000)])
    start = time.perf_counter()
    Tokenizer.from_metadata(metadata)
    assert time.perf_counter() - start < 1.5  # 0.05 s on a quiet machine


# --- the vocabularies of llama.cpp ---

FIGURES = json.loads((Path(__file__).parent / "data" / "vocabularies.json").read_text())


@pytest.mark.parametrize("name", FIGURES)
def test_ids_of_llama_cpp_on_what_they_need_of_its_vocabularies(name):
    """Made by tools/vocabulary_figures.py."""
    kept = FIGURES[name]
    metadata = {f"tokenizer.ggml.{key}": kept[key] for key in ("model", "pre", "tokens", "merges") if key in kept}
    metadata |= {"tokenizer.ggml.token_type": np.array(kept["types"]), "general.name": kept["name"]}
    if "scores" in kept:
        metadata["tokenizer.ggml.scores"] = np.array(kept["scores"], np.float32)
    tokenizer = Tokenizer.from_metadata(metadata)
    for text, ids in kept["cases"]:
        own = tokenizer.encode(text, add_special=False)
        assert [kept["ids"][i] for i in own] == ids, text
        assert tokenizer.decode(own) == text


FOLDER = os.environ.get("HIPQUANT_VOCABS", "")
VOCABULARIES = sorted(
    path.stem.removeprefix("ggml-vocab-") for path in Path(FOLDER or "/none").glob("ggml-vocab-*.gguf")
)
REFUSED = {"bert-bge": "'bert'", "gemma-4": "'gemma4'", "nomic-bert-moe": "'t5'"}
NO_FOLDER = "HIPQUANT_VOCABS does not name models/ of llama.cpp (in llama-cpp-python's sdist: vendor/llama.cpp/models)"
FORMATS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}


def read_metadata(path):
    """The metadata of a GGUF file, read without the package under test."""
    data, at = path.read_bytes(), 24

    def string():
        nonlocal at
        (length,) = struct.unpack_from("<Q", data, at)
        at += 8 + length
        return data[at - length : at].decode("utf-8", "surrogateescape")

    def numbers(kind, count):
        nonlocal at
        array = np.frombuffer(data, FORMATS[kind], count, at)
        at += array.nbytes
        return array

    def value(kind):
        nonlocal at
        if kind == 8:
            return string()
        if kind != 9:
            return numbers(kind, 1)[0].item()
        kind, count = struct.unpack_from("<IQ", data, at)
        at += 12
        return [string() for _ in range(count)] if kind == 8 else numbers(kind, count)

    metadata = {}
    for _ in range(struct.unpack_from("<Q", data, 16)[0]):
        key = string()
        at += 4
        metadata[key] = value(struct.unpack_from("<I", data, at - 4)[0])
    return metadata


@pytest.mark.skipif(not FOLDER, reason=NO_FOLDER)
def test_the_folder_of_vocabularies_holds_what_it_should():
    wanted = {"llama-spm", "llama-bpe", "phi-3", "gpt-2", "qwen2", "deepseek-llm", "falcon", "starcoder"}
    assert wanted | REFUSED.keys() <= set(VOCABULARIES)


@pytest.mark.skipif(not FOLDER, reason=NO_FOLDER)
@pytest.mark.parametrize("name", VOCABULARIES)
def test_ids_of_llama_cpp(name):
    """For every entry; a vocabulary without ids beside it (aquila, baichuan, gpt-neox) must at least lose nothing."""
    path = Path(FOLDER) / f"ggml-vocab-{name}.gguf"
    if name in REFUSED:
        with pytest.raises(TokenizerError, match=f"tokenizer.ggml.model is {REFUSED[name]}; known: gpt2 llama"):
            Tokenizer.from_metadata(read_metadata(path))
        return
    tokenizer = Tokenizer.from_metadata(read_metadata(path))
    given = Path(f"{path}.inp") if Path(f"{path}.inp").exists() else path.with_name("ggml-vocab-gpt-2.gguf.inp")
    texts = given.read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = Path(f"{path}.out").read_text().splitlines() if Path(f"{path}.out").exists() else [None] * len(texts)
    assert min(len(texts), len(lines)) >= 46
    for text, line in zip(texts, lines, strict=False):
        ids = tokenizer.encode(text, add_special=False)
        assert line is None or ids == [int(word) for word in line.split()], text
        assert tokenizer.decode(ids) == text
