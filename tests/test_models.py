"""Models against the numpy oracle, the cache, several sequences and threads, generation, and files that are wrong."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
import threading
from pathlib import Path

import gguf
import numpy as np
import pytest

import hipquant as hq
from hipquant.errors import ContextLengthError, InvalidModelFileError, TokenizerError, UnsupportedQuantTypeError
from hipquant.models.cpu import CHUNK
from hipquant.models.layers import Rope
from hipquant.models.model import common_prefix
from hipquant.quants import FLOAT_TYPES, MATRIX_TYPES, QuantType
from models import ROPE_VARIANTS, write_llama
from reference import LlamaReference, nmse

LIMIT = 1e-3  # NMSE of logits: activations are quantized to 8 bits
FLOAT_LIMIT = 2e-5  # with float weights only the KV cache is rounded, to half precision


def ids(model: hq.Model, n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, model.n_vocab, n).tolist()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> hq.Model:
    path = tmp_path_factory.mktemp("models") / "small.gguf"
    write_llama(path, type="Q8_0", context=512)
    return hq.load(path, sequences=3)


@pytest.mark.parametrize("kind", MATRIX_TYPES, ids=str)
def test_logits_for_each_type(kind: QuantType, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_llama(path, type=kind.name)
    model, reference = hq.load(path), LlamaReference(path)
    tokens = ids(model, 40)
    expected, limit = reference.forward(tokens), FLOAT_LIMIT if kind in FLOAT_TYPES else LIMIT
    assert nmse(model.forward(tokens, 0, logits="all"), expected) <= limit
    assert nmse(model.forward(tokens, 0, sequence=1), expected[-1]) <= limit
    for i, token in enumerate(tokens):
        last = model.forward([token], i, sequence=2)
    assert nmse(last, expected[-1]) <= limit


@pytest.mark.parametrize("variant", ROPE_VARIANTS)
def test_rope_variants(variant: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_llama(path, type="F32", rope=ROPE_VARIANTS[variant], context=384)
    model, reference = hq.load(path), LlamaReference(path)
    tokens = ids(model, 300)
    assert nmse(model.forward(tokens, 0, logits="all"), reference.forward(tokens)) <= FLOAT_LIMIT


@pytest.mark.parametrize(
    "shape",
    [
        {"tied": True, "type": "Q4_K"},
        {"biases": True, "type": "F32"},
        {"n_head": 4, "n_kv": 4},
        {"n_head": 8, "n_kv": 1, "head_dim": 32},
        {"n_head": 6, "n_kv": 2, "n_embd": 192, "n_ff": 320, "head_dim": 32},
        {"n_head": 7, "n_kv": 1, "n_embd": 224, "head_dim": 32, "n_ff": 96},
        {"head_dim": 80, "n_embd": 320, "type": "F16"},
        {"head_dim": 24, "n_head": 3, "n_kv": 3, "n_embd": 40, "n_ff": 50, "n_vocab": 61, "type": "F32"},
        {"types": {"*.ffn_down.*": "Q6_K", "*.attn_v.*": "Q5_K", "token_embd.*": "F16"}, "type": "Q4_K"},
        {"n_vocab": 1009, "type": "Q5_0"},
        {"version": 2},
    ],
    ids=str,
)
def test_shapes(shape: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_llama(path, **shape)  # type: ignore[arg-type]
    model, reference = hq.load(path), LlamaReference(path)
    tokens = ids(model, 50)
    limit = FLOAT_LIMIT if shape.get("type") in ("F32", "F16") else LIMIT
    assert nmse(model.forward(tokens, 0, logits="all"), reference.forward(tokens)) <= limit


def test_prompts_of_any_length_agree(small: hq.Model) -> None:
    """Chunks, captured passes and single tokens are the same function."""
    tokens = ids(small, 2 * CHUNK + 9)
    expected = small.forward(tokens, 0, logits="all")
    for n in (1, 2, 7, 8, 9, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 9):
        assert nmse(small.forward(tokens[:n], 0, sequence=1), expected[n - 1]) <= 1e-6, n


def test_sequences_are_independent(small: hq.Model) -> None:
    a, b = ids(small, 30, 1), ids(small, 30, 2)
    small.forward(a, 0, sequence=0)
    small.forward(b, 0, sequence=1)
    c = small.forward([5], 30, sequence=0)
    small.forward(ids(small, 40, 3), 0, sequence=1)
    np.testing.assert_array_equal(c, small.forward([5], 30, sequence=0))
    assert small.cached(0) == [*a, 5]


def test_a_batch_of_sequences(small: hq.Model) -> None:
    prompts = [ids(small, n, n) for n in (3, 17, 140)]
    for s, prompt in enumerate(prompts):
        small.forward(prompt, 0, sequence=s)
    batch = small.forward_batch([1, 2, 3], [3, 17, 140], [0, 1, 2])
    for s, prompt in enumerate(prompts):
        assert small.cached(s) == [*prompt, s + 1]
        assert nmse(batch[s], small.forward([s + 1], len(prompt), sequence=s)) <= 1e-6
    with pytest.raises(ValueError, match="sequence 0 holds 4 tokens, its next position is not 3"):
        small.forward_batch([1], [3], [0])
    with pytest.raises(ValueError, match="different sequences"):
        small.forward_batch([1, 2], [4, 4], [0, 0])


def test_a_batch_of_many_sequences(tmp_path: Path) -> None:
    """More than a pass takes; launched, captured, replayed: the logits that each sequence has alone."""
    write_llama(tmp_path / "model.gguf", n_layer=1, context=16)
    n = 35
    model, alone = (hq.load(tmp_path / "model.gguf", sequences=n) for _ in range(2))
    tokens = ids(model, n)
    for s in range(n):
        for m in (model, alone):
            m.forward(tokens[: s % 3 + 1], 0, sequence=s)
    for step in range(3):
        held = [s % 3 + 1 + step for s in range(n)]
        batch = model.forward_batch(tokens, held, range(n))
        for s in range(n):
            assert nmse(batch[s], alone.forward([tokens[s]], held[s], sequence=s)) <= 1e-6
            assert model.cached(s) == alone.cached(s)


def test_rewinding_replaces_the_cache(small: hq.Model) -> None:
    tokens = ids(small, 60)
    expected = small.forward(tokens, 0)
    small.forward(ids(small, 50, 9), 20)
    found = small.forward(tokens[20:], 20)
    assert small.cached() == [*small.cached()[:20], *tokens[20:]]
    assert nmse(found, expected) <= 1e-6


def test_extend_computes_only_what_is_new(small: hq.Model) -> None:
    tokens = ids(small, 50)
    small.forward([0], 0)
    _, computed = small.extend(tokens)
    assert computed == (50 if tokens[0] else 49)
    logits, computed = small.extend([*tokens, 7, 8])
    assert computed == 2
    again, computed = small.extend([*tokens, 7, 8])
    assert computed == 1, "logits of the last token must be computed again"
    assert nmse(again, logits) <= 1e-6
    assert common_prefix([1, 2, 3], [1, 2, 4, 5]) == 2
    assert common_prefix([], [1]) == 0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.forward([], 0), ValueError, "one or more ids"),
        (lambda m: m.forward([m.n_vocab], 0), ValueError, "from 0 to 511, found 512 to 512"),
        (lambda m: m.forward([-1], 0), ValueError, "found -1"),
        (lambda m: m.forward([1.5], 0), ValueError, "not float64"),
        (lambda m: m.forward([1], -1), ValueError, "position must be from 0"),
        (lambda m: m.forward([1], 400), ValueError, "position must be from 0 to .*, not 400"),
        (lambda m: m.forward([1], 0, sequence=3), ValueError, "sequence must be from 0 to 2, not 3"),
        (lambda m: m.forward([1], 0, logits="some"), ValueError, "'last' or 'all'"),
        (lambda m: m.forward([1] * 513, 0), ContextLengthError, "513 tokens do not fit into the context of 512"),
        (lambda m: m.generate([1] * 512), ContextLengthError, "the prompt has 512 tokens, the context holds 512"),
        (lambda m: m.generate([]), ValueError, "the prompt has no tokens"),
        (lambda m: m.generate([1], max_tokens=-1), ValueError, "max_tokens must be 0 or more"),
        (lambda m: m.generate("text"), TokenizerError, "has no vocabulary"),
        (lambda m: m.generate([1], sequence=9), ValueError, "sequence must be"),
        (lambda m: m.generate([1], temperature=-1), ValueError, "temperature"),
    ],
)
def test_what_a_model_refuses(small: hq.Model, call: object, error: type[Exception], message: str) -> None:
    small.forward([1], 0)
    with pytest.raises(error, match=message):
        call(small)  # type: ignore[operator]


def test_generation_is_greedy_decoding(small: hq.Model) -> None:
    prompt = ids(small, 12)
    generation = small.generate(prompt, max_tokens=20, temperature=0)
    text = "".join(generation)
    expected: list[int] = []
    for _ in range(20):
        expected.append(int(small.forward([*prompt, *expected], 0, sequence=2).argmax()))
    assert generation.tokens == expected
    assert text.split() == [str(t) for t in expected]
    assert generation.finish_reason == "length"
    assert generation.timings.prompt_tokens == 12
    assert generation.timings.generated_tokens == 20
    assert generation.timings.generated_tokens_per_second > 0


def test_generation_ends_with_the_context(tmp_path: Path) -> None:
    write_llama(tmp_path / "m.gguf", context=32)
    model = hq.load(tmp_path / "m.gguf")
    generation = model.generate(ids(model, 30), temperature=0)
    assert len("".join(generation).split()) == 2
    assert generation.finish_reason == "context"


def test_no_tokens_asked_for(small: hq.Model) -> None:
    generation = small.generate([1], max_tokens=0)
    assert list(generation) == []
    assert generation.finish_reason == "length"


def test_seeds(small: hq.Model) -> None:
    def run(seed: int) -> list[int]:
        generation = small.generate([1, 2, 3], max_tokens=30, temperature=1.5, top_k=0, top_p=1.0, min_p=0.0, seed=seed)
        list(generation)
        return generation.tokens

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_the_next_turn_reuses_the_cache(small: hq.Model) -> None:
    first = small.generate(ids(small, 40), max_tokens=5, temperature=0)
    list(first)
    turn = [*first.prompt, *first.tokens, *ids(small, 6, 5)]
    second = small.generate(turn, max_tokens=3, temperature=0)
    list(second)
    assert second.timings.prompt_computed <= 7
    fresh = small.generate(turn, max_tokens=3, temperature=0, sequence=2)
    small.forward([0], 0, sequence=2)
    list(fresh)
    assert fresh.tokens == second.tokens


def test_two_python_threads_generate_with_one_model(small: hq.Model) -> None:
    """More generations than sequences: those that share one recompute, none goes wrong."""
    prompts = [ids(small, 20, seed) for seed in range(5)]
    alone = []
    for prompt in prompts:
        generation = small.generate(prompt, max_tokens=15, temperature=0)
        list(generation)
        alone.append(generation.tokens)
    together: dict[int, list[int]] = {}

    def work(i: int) -> None:
        generation = small.generate(prompts[i], max_tokens=15, temperature=0)
        list(generation)
        together[i] = generation.tokens

    workers = [threading.Thread(target=work, args=(i,)) for i in range(5)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [together[i] for i in range(5)] == alone


def test_an_abandoned_generation_frees_its_sequence(small: hq.Model) -> None:
    for _ in range(small.sequences + 2):
        generation = small.generate([1, 2], max_tokens=50, temperature=0)
        next(generation)
        generation.close()
    assert not small._busy


def test_a_shared_sequence_stays_its_owners(small: hq.Model) -> None:
    owners = [small.generate([1, s], max_tokens=9, temperature=0) for s in range(small.sequences)]
    for owner in owners:
        next(owner)
    guest = small.generate([5, 6, 7], max_tokens=3, temperature=0)
    list(guest)
    assert small.reserve([1]) is None, "the guest must not give away what it did not own"
    for owner in owners:
        owner.close()
    assert small.reserve([1]) is not None
    small._busy.clear()


def _rewritten(path: Path, change: object, **shape: object) -> Path:
    write_llama(path, extra=change, **shape)  # type: ignore[arg-type]
    return path


def test_architecture_and_metadata(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "mamba")
    writer.add_tensor("x", np.zeros(1, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InvalidModelFileError, match="architecture 'mamba' is not known; there are: gemma2, .*llama, "):
        hq.load(path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("llama.attention.head_count", None, "'llama.attention.head_count' is missing"),
        ("llama.attention.head_count", 0, "is 0, expected 1 to 4096"),
        ("llama.attention.head_count", 3, "do not divide"),
        ("llama.attention.head_count_kv", 3, "3 key-value heads do not divide 4 heads"),
        ("llama.block_count", 3, "tensor 'blk.2.ffn_gate.weight' is missing"),
        ("llama.block_count", 1 << 30, "expected 1 to 1024"),
        ("llama.embedding_length", 512, "tensor 'token_embd.weight' has shape"),
        ("llama.feed_forward_length", 256, "has shape .* the metadata says"),
        ("llama.attention.layer_norm_rms_epsilon", None, "is missing"),
        ("llama.attention.layer_norm_rms_epsilon", float("nan"), "expected a number above 0"),
        ("llama.rope.freq_base", -1.0, "expected a number above 0"),
        ("llama.rope.freq_base", float("inf"), "expected a number above 0"),
        ("llama.rope.dimension_count", 63, "an even number of at most 64"),
        ("llama.rope.scaling.type", "longrope", "'longrope'; supported: none, linear, yarn"),
        ("llama.rope.scaling.factor", 0.0, "expected a number above 0"),
        ("llama.context_length", 0, "expected 1 to"),
        ("llama.expert_count", 8, "'llama.expert_used_count' is missing"),
        ("llama.attention.key_length", 48, "has shape|different lengths|dimension_count"),
        ("llama.attention.head_count", "four", "expected an integer"),
    ],
)
def test_metadata_that_does_not_fit(tmp_path: Path, key: str, value: object, message: str) -> None:
    path = tmp_path / "m.gguf"

    def change(writer: gguf.GGUFWriter) -> None:
        kinds = {int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32, str: gguf.GGUFValueType.STRING}
        for data in writer.kv_data:
            data.pop(key, None)
        if value is not None:
            writer.kv_data[0][key] = gguf.gguf_writer.GGUFValue(value, kinds[type(value)])

    _rewritten(path, change)
    with pytest.raises(InvalidModelFileError, match=message) as error:
        hq.load(path)
    assert str(path) in str(error.value)


def test_a_vocabulary_that_does_not_fit(tmp_path: Path) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(["a", "b", "c"])

    with pytest.raises(InvalidModelFileError, match="the vocabulary has 3 tokens, the embedding 512 rows"):
        hq.load(_rewritten(tmp_path / "m.gguf", change))


def test_nan_scales_are_found(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "m.gguf", type="Q4_0")
    from hipquant.gguf_file import GGUFFile

    for name in ("blk.1.ffn_up.weight", "token_embd.weight", "blk.0.attn_norm.weight"):
        blob = bytearray((tmp_path / "m.gguf").read_bytes())
        info = GGUFFile(tmp_path / "m.gguf").tensors[name]
        blob[info.offset : info.offset + 4] = b"\xff\x7f\xff\x7f"
        (tmp_path / "bad.gguf").write_bytes(blob)
        with pytest.raises(InvalidModelFileError, match=f"'{name}'.*NaN or infinite"):
            hq.load(tmp_path / "bad.gguf")
    assert model


def test_types_that_cannot_be_weights(tmp_path: Path) -> None:
    write_llama(tmp_path / "m.gguf", type="Q4_0", types={"*.ffn_up.weight": "Q8_K"})
    with pytest.raises((InvalidModelFileError, UnsupportedQuantTypeError), match="Q8_K"):
        hq.load(tmp_path / "m.gguf")


def test_load_checks_its_arguments(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_llama(path, context=256)
    for context in (0, 257):
        with pytest.raises(ValueError, match="context must be from 1 to the 256"):
            hq.load(path, context=context)
    with pytest.raises(ValueError, match="sequences must be from 1"):
        hq.load(path, sequences=0)
    model = hq.load(path, context=100)
    assert model.context == 100
    with pytest.raises(ContextLengthError):
        model.forward([1] * 101, 0)
    calls: list[tuple[int, int]] = []
    hq.load(path, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1][0] == calls[-1][1]
    assert all(a[0] <= b[0] for a, b in itertools.pairwise(calls))


def test_rope_table_by_definition() -> None:
    rope = Rope(8, base=100.0)
    table = rope.table(5)
    assert table.shape == (5, 4, 2)
    np.testing.assert_allclose(table[3, 2], [np.cos(3 * 100 ** (-4 / 8)), np.sin(3 * 100 ** (-4 / 8))], rtol=1e-6)
    halved = dataclasses.replace(rope, scaling="linear", factor=2.0)
    np.testing.assert_allclose(halved.table(5)[4], table[2], rtol=1e-6)


def test_memory_is_weights_and_cache_and_little_more(tmp_path: Path) -> None:
    """Peak memory of a process that loads a model and runs a prompt, over what it is before the load."""
    path = tmp_path / "m.gguf"
    write_llama(path, type="Q8_0", n_embd=2048, n_layer=4, n_head=16, n_kv=4, n_ff=6144, n_vocab=8192, context=512)
    code = (
        "import hipquant as hq, resource, sys, json\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "import hipquant.models, hipquant.driver; hq.device(); before = peak()\n"
        "m = hq.load(sys.argv[1]); m.forward(list(range(200)), 0)\n"
        "print(json.dumps([peak() - before, m.weights_bytes, 200 * m.blocks.nbytes_per_position]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    grown, weights, cache = json.loads(done.stdout)
    assert weights <= path.stat().st_size * 1.01
    assert grown <= weights + cache + (80 << 20), f"{grown / 2**20:.0f} MiB for {weights / 2**20:.0f} MiB of weights"
