"""Exact and near duplicates agree with a brute-force comparison of each text with all kept texts."""

import random

import numpy as np
import pytest

from dist_llm.text.duplicates import (
    KEY_BYTES,
    PERMUTATIONS,
    SHINGLE_WORDS,
    build_index,
    compute_key,
    compute_near_key,
)

WORDS = [
    f"{onset}{rhyme}" for onset in ("sh", "tr", "qu", "é", "漢") for rhyme in ("ip", "ade", "it", "on", "ul", "ax")
]


def make_texts_with_copies(count, seed=0):
    """Return random texts; about half are earlier texts with a few changed words."""
    rng, texts = random.Random(seed), []
    for _ in range(count):
        text_words = rng.choices(WORDS, k=rng.randint(100, 300))
        if texts and rng.random() < 0.5:
            text_words = rng.choice(texts).split()
            for _ in range(rng.choice([0, 1, 2, 8, 30])):
                text_words[rng.randrange(len(text_words))] = rng.choice(WORDS)
        texts.append(" ".join(text_words))
    return texts


def get_shingles(text):
    """Return the set of all sequences of SHINGLE_WORDS successive words."""
    text_words = text.split()
    return {tuple(text_words[start : start + SHINGLE_WORDS]) for start in range(len(text_words) - SHINGLE_WORDS + 1)}


def compute_jaccard(text, other_text):
    """Return the Jaccard similarity of the shingles of two texts."""
    shingles, other_shingles = get_shingles(text), get_shingles(other_text)
    return len(shingles & other_shingles) / len(shingles | other_shingles)


def compute_minhashes(text):
    """Return the MinHash values of a text."""
    return compute_near_key(text).view("<u4")


def flag_new_texts(texts, kind, threshold=0.8):
    """Return for each text whether it differs from all earlier kept texts."""
    index = build_index(kind, threshold)
    return [index.add_if_new(compute_key(kind, text)) for text in texts]


def test_exact_deduplication_keeps_the_first_occurrence():
    texts = random.Random(1).choices([f"text {number}" for number in range(50)], k=300)
    assert flag_new_texts(texts, "exact") == [text not in texts[:index] for index, text in enumerate(texts)]
    assert len(compute_key("exact", "x")) == KEY_BYTES["exact"]


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.9])
def test_near_deduplication_agrees_with_brute_force(threshold):
    """Similarities within 0.14 of the threshold are not checked: three standard deviations of the estimate (0.045)."""
    texts = make_texts_with_copies(300)
    kept_texts, num_clear_cases = [], 0
    for text, is_new in zip(texts, flag_new_texts(texts, "near", threshold), strict=True):
        max_similarity = max((compute_jaccard(text, kept_text) for kept_text in kept_texts), default=0.0)
        if abs(max_similarity - threshold) > 0.14:
            num_clear_cases += 1
            assert is_new is (max_similarity < threshold), max_similarity
        if is_new:
            kept_texts.append(text)
    assert num_clear_cases > 150


def test_the_estimated_similarity_is_unbiased():
    errors = []
    for seed in range(300):
        rng = random.Random(seed)
        text_words = rng.choices(WORDS, k=300)
        text, changed_words = " ".join(text_words), [*text_words]
        for position in rng.sample(range(300), 1 + seed % 15):
            changed_words[position] = "changed"
        changed_text = " ".join(changed_words)
        estimate = np.mean(compute_minhashes(text) == compute_minhashes(changed_text))
        errors.append(estimate - compute_jaccard(text, changed_text))
    assert abs(np.mean(errors)) < 0.01  # 0.01 is about four standard deviations of the mean of 300 estimates
    assert np.std(errors) < 0.5 / PERMUTATIONS**0.5


def test_near_keys_depend_on_words_and_their_order_only():
    text = " ".join(random.Random(5).choices(WORDS, k=200))
    assert np.array_equal(compute_near_key(text), compute_near_key(text.upper().replace(" ", ", ")))
    reversed_text = " ".join(text.split()[::-1])
    assert np.mean(compute_minhashes(text) == compute_minhashes(reversed_text)) < 0.2


@pytest.mark.parametrize("text", ["", "!?", "one", "a b c d", "a b c d e", " \n"])
def test_short_texts_are_duplicates_only_of_themselves(text):
    assert len(compute_near_key(text)) == KEY_BYTES["near"]
    assert flag_new_texts([text, "something else altogether", text], "near") == [True, True, False]


def test_hashing_in_batches_gives_the_same_key(monkeypatch):
    text = " ".join(random.Random(2).choices(WORDS, k=2000))
    expected = compute_near_key(text)
    monkeypatch.setattr("dist_llm.text.duplicates.SHINGLES_PER_BATCH", 7)
    assert np.array_equal(compute_near_key(text), expected)
