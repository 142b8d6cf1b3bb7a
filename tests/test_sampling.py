import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hipquant.sampling import Sampler, SamplingParams, StopStrings, _probabilities, random_bits


def exact_distribution(logits, params, recent=()):
    """llama.cpp's chain, step by step, in float64: penalty, top-k, top-p, min-p, temperature."""
    logits = np.asarray(logits, np.float64).copy()
    for token in set(list(recent)[-params.repetition_window :] if params.repetition_window else ()):
        scale = 1 / params.repetition_penalty if logits[token] > 0 else params.repetition_penalty
        logits[token] *= scale
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if params.top_k:
        order = order[: params.top_k]
    weights = np.exp(logits[order] - logits[order[0]])
    weights /= weights.sum()
    if params.top_p < 1:
        total, kept = 0.0, 0
        for kept, weight in enumerate(weights, 1):  # noqa: B007
            total += weight
            if total >= params.top_p:
                break
        order, weights = order[:kept], weights[:kept]
    if params.min_p > 0:
        order = [i for i, weight in zip(order, weights, strict=True) if weight >= params.min_p * weights[0]]
    probabilities = np.zeros(len(logits))
    final = np.exp((logits[order] - logits[order[0]]) / params.temperature)
    probabilities[order] = final / final.sum()
    return probabilities


CHAINS = [
    SamplingParams(seed=1),
    SamplingParams(seed=2, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0),
    SamplingParams(seed=3, temperature=1.0, top_k=0, top_p=0.7, min_p=0.0),
    SamplingParams(seed=4, temperature=1.5, top_k=0, top_p=1.0, min_p=0.2),
    SamplingParams(seed=5, temperature=2.0, top_k=5, top_p=1.0, min_p=0.0),
    SamplingParams(seed=6, temperature=1.3, top_k=10, top_p=0.9, min_p=0.1, repetition_penalty=1.7),
    SamplingParams(seed=7, temperature=1.0, top_k=3, top_p=0.0, min_p=0.0),
]


@pytest.mark.parametrize("params", CHAINS, ids=str)
def test_draws_follow_the_exact_distribution(params):
    logits = np.random.default_rng(0).normal(0, 1.5, 30).astype(np.float32)
    logits[7] = -np.inf
    recent = [0, 3, 3, 12, 29]
    expected = exact_distribution(logits, params, recent)
    sampler, n = Sampler(params), 6000
    counts = np.bincount([sampler.sample(logits, recent) for _ in range(n)], minlength=30)
    assert not counts[expected == 0].any()
    kept = expected > 0
    chi2 = float(((counts - n * expected)[kept] ** 2 / (n * expected)[kept]).sum())
    freedom = int(kept.sum()) - 1
    assert chi2 <= freedom + 4 * math.sqrt(2 * freedom) + 1e-9  # four standard deviations; the seeds are fixed


@given(
    st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=40),
    st.integers(0, 45),
    st.floats(0, 1),
    st.floats(0, 0.9),
    st.lists(st.integers(0, 39), max_size=10),
)
@settings(max_examples=200, deadline=None)
def test_only_what_remains_is_drawn(values, top_k, top_p, min_p, recent):
    params = SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=2.0, repetition_window=4, seed=0)
    recent = [token % len(values) for token in recent]
    expected = exact_distribution(np.float32(values), params, recent)
    slack = exact_distribution(np.float32(values), SamplingParams(top_k=top_k, top_p=min(1, top_p + 1e-5),
        min_p=max(0, min_p - 1e-5), repetition_penalty=2.0, repetition_window=4), recent)  # fmt: skip
    sampler = Sampler(params)
    for _ in range(5):
        token = sampler.sample(np.float32(values), recent)
        assert expected[token] > 0 or slack[token] > 0  # rounding at the edge of a cut


@pytest.mark.parametrize("n_vocab", [1, 40, 255, 256, 5000, 128_256])
@pytest.mark.parametrize("top_k", [1, 2, 40, 600, 5000])
def test_top_k_of_large_vocabularies(n_vocab, top_k):
    logits = np.round(np.random.default_rng(n_vocab).normal(0, 2, n_vocab), 1).astype(np.float32)  # many are equal
    sampler = Sampler(SamplingParams(top_k=top_k, top_p=1.0, min_p=0.0, seed=0))
    best = np.lexsort((np.arange(n_vocab), -logits))[:top_k]
    if top_k >= n_vocab:  # nothing is cut, so nothing is sorted
        best = np.arange(n_vocab)
    assert sampler._candidates(logits).tolist() == best.tolist()


def test_greedy():
    sampler = Sampler(SamplingParams(temperature=0.0))
    assert sampler.sample(np.float32([1, 5, 5, -np.inf])) == 1
    penalized = Sampler(SamplingParams(temperature=0.0, repetition_penalty=2.0, repetition_window=2))
    assert penalized.sample(np.float32([1, 5, 4]), [1]) == 2
    assert penalized.sample(np.float32([1, 5, 4]), [1, 0, 0]) == 1  # outside the window
    assert penalized.sample(np.float32([-1, -1.5]), [0]) == 1
    assert penalized.sample(np.float32([1, 5]), [99, -1]) == 1


def test_logits_are_not_changed():
    logits = np.float32([1, 5, 4])
    Sampler(SamplingParams(repetition_penalty=2.0, seed=0)).sample(logits, [1])
    assert logits.tolist() == [1, 5, 4]


def test_seeds():
    logits = np.random.default_rng(0).normal(0, 1, 1000).astype(np.float32)
    draws = [[Sampler(p).sample(logits) for _ in range(1)] for p in (SamplingParams(seed=5), SamplingParams(seed=5))]
    assert draws[0] == draws[1]
    a, b, c = (Sampler(SamplingParams(seed=seed)) for seed in (5, 5, 6))
    first, second, third = ([s.sample(logits) for _ in range(20)] for s in (a, b, c))
    assert first == second != third
    d, e = Sampler(), Sampler()
    assert [d.sample(logits) for _ in range(20)] != [e.sample(logits) for _ in range(20)]


def test_random_bits_are_philox():
    """The first two of the four words that Random123 (Salmon et al.) gives as known answers for counter and key 0."""
    assert random_bits(0, 0) == 0xE169C58D_6627E8D5
    assert len({random_bits(seed, number) for seed in (0, 1, 2**32, 2**64 - 1) for number in range(100)}) == 400


def test_probabilities():
    """e^x to a few units in the last place of a float, in multiples of 2^-40."""
    x = np.concatenate([-np.logspace(-9, np.log10(27.99), 5000), [0, -0.0]]).astype(np.float32)
    exact = np.exp(x.astype(np.float64)) * 2**40
    found = _probabilities(x)
    assert found[-1] == found[-2] == 2**40
    assert (np.abs(found - exact) <= 3e-7 * exact + 1).all()
    assert not _probabilities(np.float32([-28, -29, -1e30, -np.inf])).any()


def test_extreme_parameters():
    """What is finite stays finite, and nothing but the best remains where the temperature is next to 0."""
    logits = np.float32([1, 3e38, -3e38, 2])
    for penalty in (1e-300, 1e-3, 1e300):
        params = SamplingParams(temperature=1e-300, repetition_penalty=penalty, seed=0)
        expected = 0 if penalty > 1 else 1
        assert Sampler(params).sample(logits[:2], [1]) == expected
        Sampler(params).sample(logits, [1, 2, 0, 3])
    even = SamplingParams(temperature=1e300, top_k=0, top_p=1.0, min_p=0.0, seed=1)
    sampler = Sampler(even)
    assert {sampler.sample(np.float32([0, -1e30, 27, -np.inf])) for _ in range(60)} == {0, 1, 2}


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        ([1, float("nan"), 2], "found NaN or infinity for token 1"),
        ([1, 2, float("inf"), float("nan")], "found NaN or infinity for token 2"),
        ([float("-inf")] * 3, "found NaN or infinity for token 0"),
        ([], r"found shape \[0\]"),
        ([[1.0]], r"found shape \[1, 1\]"),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bad_logits(logits, message, temperature):
    with pytest.raises(ValueError, match=message):
        Sampler(SamplingParams(temperature=temperature)).sample(np.float32(logits))


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -1), ("temperature", float("nan")), ("temperature", "hot"), ("temperature", float("inf")),
     ("top_p", 1.5), ("min_p", -0.1), ("repetition_penalty", 0), ("top_k", -1), ("top_k", 1.5),
     ("repetition_window", -2), ("seed", -1), ("seed", "x"), ("top_k", True)],
)  # fmt: skip
def test_params_are_checked(name, value):
    with pytest.raises(ValueError, match=f"{name}: found {value!r}, expected"):
        SamplingParams(**{name: value})


def test_defaults_are_those_of_llama_cpp():
    p = SamplingParams()
    assert (p.temperature, p.top_k, p.top_p, p.min_p) == (0.8, 40, 0.95, 0.05)
    assert (p.repetition_penalty, p.repetition_window, p.seed) == (1.0, 64, None)


# --- stop strings ---


def naive_stop(text, strings):
    """The text before the stop string that ends first, of several with one end the longest; None if there is none."""
    for end in range(1, len(text) + 1):
        found = [s for s in strings if text[:end].endswith(s)]
        if found:
            return text[: end - max(map(len, found))]
    return None


@given(st.lists(st.text("ab", min_size=1, max_size=5), max_size=4), st.lists(st.text("abc", max_size=6), max_size=12))
@settings(max_examples=500, deadline=None)
def test_stop_strings_are_the_naive_search(strings, pieces):
    stops, out, stopped = StopStrings(strings), "", False
    for piece in pieces:
        text, stopped = stops.push(piece)
        out += text
        assert stopped == stops.stopped
    out += stops.flush()
    text = "".join(pieces)
    expected = naive_stop(text, strings)
    assert stopped == (expected is not None)
    assert out == (text if expected is None else expected)


@pytest.mark.parametrize("string", ["aabaaaa", "abaabaaabab", "aaab"])
def test_a_stop_string_that_overlaps_itself(string):
    rng = np.random.default_rng(0)
    for _ in range(200):
        text = "".join(rng.choice(["a", "b"], 40)) + string
        assert StopStrings([string]).push(text)[0] == text[: text.index(string)]


def test_only_possible_beginnings_are_held_back():
    stops = StopStrings(["\nUser:", "</s>"])
    assert stops.push("Hello") == ("Hello", False)
    assert stops.push(" <b>\nUs") == (" <b>", False)
    assert stops.push("e </") == ("\nUse ", False)
    assert stops.push("s> more") == ("", True)
    assert stops.push("x") == ("", True)
    assert stops.flush() == ""
    assert StopStrings([]).push("x") == ("x", False)
    ending = StopStrings(["abc"])
    assert ending.push("xab") == ("x", False)
    assert ending.flush() == "ab"


def test_stop_strings_are_linear():
    stops = StopStrings(["a" * 2000 + "b"])
    start = time.perf_counter()
    out = "".join(stops.push("a" * 100)[0] for _ in range(2000))
    assert time.perf_counter() - start < 3  # comparing from scratch at each character: minutes
    assert len(out) + len(stops.flush()) == 200_000


def test_bad_stop_strings():
    for strings in ("abc", ["a", ""], [1]):
        with pytest.raises(ValueError, match="stop strings: found"):
            StopStrings(strings)
