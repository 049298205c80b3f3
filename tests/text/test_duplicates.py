"""Exact and near duplicates against comparing all pairs."""

import random

import numpy as np
import pytest

from dist_llm.text.duplicates import (
    KEY_BYTES,
    PERMUTATIONS,
    SHINGLE_WORDS,
    build_index,
    compute_near_key,
    select_key_function,
)

WORDS = [f"{a}{b}" for a in ("sh", "tr", "qu", "é", "漢") for b in ("ip", "ade", "it", "on", "ul", "ax")]


def texts_with_copies(count, seed=0):
    """Random texts; some of them earlier ones with a few words changed."""
    rng, texts = random.Random(seed), []
    for _ in range(count):
        words = rng.choices(WORDS, k=rng.randint(100, 300))
        if texts and rng.random() < 0.5:
            words = rng.choice(texts).split()
            for _ in range(rng.choice([0, 1, 2, 8, 30])):
                words[rng.randrange(len(words))] = rng.choice(WORDS)
        texts.append(" ".join(words))
    return texts


def shingles(text):
    words = text.split()
    return {tuple(words[k : k + SHINGLE_WORDS]) for k in range(len(words) - SHINGLE_WORDS + 1)}


def jaccard(a, b):
    a, b = shingles(a), shingles(b)
    return len(a & b) / len(a | b)


def first_ones(texts, kind, threshold=0.8):
    index = build_index(kind, threshold)
    return [index.is_new(select_key_function(kind)(text)) for text in texts]


def test_exact_keeps_the_first_of_each():
    texts = random.Random(1).choices([f"text {n}" for n in range(50)], k=300)
    assert first_ones(texts, "exact") == [text not in texts[:n] for n, text in enumerate(texts)]
    assert {len(select_key_function(kind)("x")) for kind in ("exact",)} == {KEY_BYTES["exact"]}


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.9])
def test_near_agrees_with_all_pairs_but_close_to_the_threshold(threshold):
    """The estimate's standard deviation is below 0.045: three of them off, it must be right."""
    texts = texts_with_copies(300)
    kept, clear = [], 0
    for text, new in zip(texts, first_ones(texts, "near", threshold), strict=True):
        nearest = max((jaccard(text, other) for other in kept), default=0.0)
        if abs(nearest - threshold) > 0.14:
            clear += 1
            assert new is (nearest < threshold), nearest
        if new:
            kept.append(text)
    assert clear > 150


def test_the_estimate_is_unbiased():
    errors = []
    for seed in range(300):
        rng = random.Random(seed)
        words = rng.choices(WORDS, k=300)
        text, changed = " ".join(words), [*words]
        for place in rng.sample(range(300), 1 + seed % 15):
            changed[place] = "changed"
        estimate = np.mean(compute_near_key(text).view("<u4") == compute_near_key(" ".join(changed)).view("<u4"))
        errors.append(estimate - jaccard(text, " ".join(changed)))
    assert abs(np.mean(errors)) < 0.01  # four standard deviations of this mean
    assert np.std(errors) < 0.5 / PERMUTATIONS**0.5


def test_case_and_punctuation_do_not_matter_and_order_does():
    text = " ".join(random.Random(5).choices(WORDS, k=200))
    assert np.array_equal(compute_near_key(text), compute_near_key(text.upper().replace(" ", ", ")))
    assert (
        np.mean(compute_near_key(text).view("<u4") == compute_near_key(" ".join(text.split()[::-1])).view("<u4")) < 0.2
    )


@pytest.mark.parametrize("text", ["", "!?", "one", "a b c d", "a b c d e", " \n"])
def test_short_texts_have_keys_of_their_own(text):
    assert len(compute_near_key(text)) == KEY_BYTES["near"]
    assert first_ones([text, "something else altogether", text], "near") == [True, True, False]


def test_a_long_text_is_hashed_in_slices(monkeypatch):
    text = " ".join(random.Random(2).choices(WORDS, k=2000))
    want = compute_near_key(text)
    monkeypatch.setattr("dist_llm.text.duplicates.SHINGLES_PER_BATCH", 7)
    assert np.array_equal(compute_near_key(text), want)
