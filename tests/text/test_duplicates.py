"""Exact and near duplicates compared with brute force over all pairs."""

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

VOCABULARY = [f"{a}{b}" for a in ("sh", "tr", "qu", "é", "漢") for b in ("ip", "ade", "it", "on", "ul", "ax")]


def make_texts_with_copies(count, seed=0):
    """Return random texts; about half are earlier texts with a few changed words."""
    rng, texts = random.Random(seed), []
    for _ in range(count):
        text_words = rng.choices(VOCABULARY, k=rng.randint(100, 300))
        if texts and rng.random() < 0.5:
            text_words = rng.choice(texts).split()
            for _ in range(rng.choice([0, 1, 2, 8, 30])):
                text_words[rng.randrange(len(text_words))] = rng.choice(VOCABULARY)
        texts.append(" ".join(text_words))
    return texts


def shingles(text):
    text_words = text.split()
    return {tuple(text_words[k : k + SHINGLE_WORDS]) for k in range(len(text_words) - SHINGLE_WORDS + 1)}


def jaccard(a, b):
    a, b = shingles(a), shingles(b)
    return len(a & b) / len(a | b)


def find_first_occurrences(texts, kind, threshold=0.8):
    index = build_index(kind, threshold)
    return [index.is_new(select_key_function(kind)(text)) for text in texts]


def test_exact_keeps_the_first_occurrence():
    texts = random.Random(1).choices([f"text {n}" for n in range(50)], k=300)
    assert find_first_occurrences(texts, "exact") == [text not in texts[:n] for n, text in enumerate(texts)]
    assert {len(select_key_function(kind)("x")) for kind in ("exact",)} == {KEY_BYTES["exact"]}


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.9])
def test_near_agrees_with_brute_force_except_close_to_the_threshold(threshold):
    """The estimate's standard deviation is below 0.045, so beyond three of them from the threshold it must be right."""
    texts = make_texts_with_copies(300)
    kept_texts, num_clear_cases = [], 0
    for text, is_new in zip(texts, find_first_occurrences(texts, "near", threshold), strict=True):
        nearest = max((jaccard(text, other) for other in kept_texts), default=0.0)
        if abs(nearest - threshold) > 0.14:
            num_clear_cases += 1
            assert is_new is (nearest < threshold), nearest
        if is_new:
            kept_texts.append(text)
    assert num_clear_cases > 150


def test_the_estimate_is_unbiased():
    errors = []
    for seed in range(300):
        rng = random.Random(seed)
        text_words = rng.choices(VOCABULARY, k=300)
        text, changed_words = " ".join(text_words), [*text_words]
        for position in rng.sample(range(300), 1 + seed % 15):
            changed_words[position] = "changed"
        estimate = np.mean(compute_near_key(text).view("<u4") == compute_near_key(" ".join(changed_words)).view("<u4"))
        errors.append(estimate - jaccard(text, " ".join(changed_words)))
    assert abs(np.mean(errors)) < 0.01  # four standard deviations of the mean
    assert np.std(errors) < 0.5 / PERMUTATIONS**0.5


def test_case_and_punctuation_have_no_effect_and_order_has():
    text = " ".join(random.Random(5).choices(VOCABULARY, k=200))
    assert np.array_equal(compute_near_key(text), compute_near_key(text.upper().replace(" ", ", ")))
    assert (
        np.mean(compute_near_key(text).view("<u4") == compute_near_key(" ".join(text.split()[::-1])).view("<u4")) < 0.2
    )


@pytest.mark.parametrize("text", ["", "!?", "one", "a b c d", "a b c d e", " \n"])
def test_short_texts_have_unique_keys(text):
    assert len(compute_near_key(text)) == KEY_BYTES["near"]
    assert find_first_occurrences([text, "something else altogether", text], "near") == [True, True, False]


def test_hashing_in_batches_gives_the_same_key(monkeypatch):
    text = " ".join(random.Random(2).choices(VOCABULARY, k=2000))
    expected = compute_near_key(text)
    monkeypatch.setattr("dist_llm.text.duplicates.SHINGLES_PER_BATCH", 7)
    assert np.array_equal(compute_near_key(text), expected)
