"""The quality and repetition rules of MassiveText: Rae et al. 2021, "Scaling Language Models", A.1.1, table A1.

Words are separated by whitespace. If a line, paragraph or n-gram repeats, all occurrences except the first are
duplicates. The rules of n-grams count only the characters of words.
"""

import re
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from dist_llm.text.report import RemovalCounts

MIN_WORDS, MAX_WORDS = 50, 100_000
MIN_MEAN_WORD_CHARS, MAX_MEAN_WORD_CHARS = 3, 10
STOP_WORDS, MIN_STOP_WORDS = {"the", "be", "to", "of", "and", "that", "have", "with"}, 2
MAX_SYMBOLS_PER_WORD = 0.1
# Each fraction is relative to all words, lines, paragraphs or characters of a document.
MAX_BULLET_LINE_FRACTION, MAX_ELLIPSIS_LINE_FRACTION = 0.9, 0.3
MIN_ALPHABETIC_WORD_FRACTION = 0.8
MAX_DUPLICATE_FRACTION = {"line": 0.30, "paragraph": 0.30}
MAX_DUPLICATE_CHAR_FRACTION = {"line": 0.20, "paragraph": 0.20}
MAX_TOP_NGRAM_CHAR_FRACTION = {2: 0.20, 3: 0.18, 4: 0.16}  # by n
MAX_DUPLICATE_NGRAM_CHAR_FRACTION = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}  # by n
RULES = (
    *("word_count", "mean_word_chars", "symbols_per_word", "bullet_lines", "ellipsis_lines"),
    *("alphabetic_words", "stop_words"),
    *(f"duplicate_{unit}{suffix}" for unit in MAX_DUPLICATE_FRACTION for suffix in ("s", "_chars")),
    *(f"top_{n}gram_chars" for n in MAX_TOP_NGRAM_CHAR_FRACTION),
    *(f"duplicate_{n}gram_chars" for n in MAX_DUPLICATE_NGRAM_CHAR_FRACTION),
)

Ints = npt.NDArray[np.int64]
_PUNCTUATION = ".,;:!?\"'()[]“”‘’"


def filter_document(text: str, removed: RemovalCounts) -> str | None:
    """Return the unchanged text if it breaks no rule, else None. Count a removal under the first broken rule."""
    rule = find_broken_rule(text)
    if rule is None:
        return text
    removed.add(f"gopher.{rule}", documents=1, bytes=len(text.encode()))
    return None


def find_broken_rule(text: str) -> str | None:
    """Return the first of RULES that a document breaks, or None.

    Cheap rules are checked first. The checks are generators, so no rule after the first broken one is computed.
    """
    words = text.split()
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    for rules in (_check_quality(text, words, lines), _check_repetition(text, lines), _check_ngrams(words)):
        for rule, is_broken in rules:
            if is_broken:
                return rule
    return None


def _check_quality(text: str, words: list[str], lines: list[str]) -> Iterator[tuple[str, bool]]:
    """Yield (rule, whether it is broken) for each rule of quality. The other checks yield the same.

    The caller must stop at the first broken rule: a text without words breaks the first one, and the later rules divide
    by the number of words.
    """
    yield "word_count", not MIN_WORDS <= len(words) <= MAX_WORDS
    yield "mean_word_chars", not MIN_MEAN_WORD_CHARS <= sum(map(len, words)) / len(words) <= MAX_MEAN_WORD_CHARS
    symbols = max(text.count("#"), text.count("...") + text.count("…"))
    yield "symbols_per_word", symbols / len(words) > MAX_SYMBOLS_PER_WORD
    bullets = sum(line.startswith(("•", "‣", "▪", "◦", "-", "*")) for line in lines)
    yield "bullet_lines", bullets / len(lines) > MAX_BULLET_LINE_FRACTION
    ellipses = sum(line.endswith(("...", "…")) for line in lines)
    yield "ellipsis_lines", ellipses / len(lines) > MAX_ELLIPSIS_LINE_FRACTION
    alphabetic = sum(any(char.isalpha() for char in word) for word in words)
    yield "alphabetic_words", alphabetic / len(words) < MIN_ALPHABETIC_WORD_FRACTION
    yield "stop_words", len(STOP_WORDS & {word.strip(_PUNCTUATION).lower() for word in words}) < MIN_STOP_WORDS


def _check_repetition(text: str, lines: list[str]) -> Iterator[tuple[str, bool]]:
    """Check the fractions of duplicate lines and paragraphs, and of the characters in them."""
    paragraphs = [paragraph.strip() for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip()]
    for unit, texts in (("line", lines), ("paragraph", paragraphs)):
        duplicates = _find_duplicates(texts)
        yield f"duplicate_{unit}s", len(duplicates) / len(texts) > MAX_DUPLICATE_FRACTION[unit]
        char_fraction = sum(map(len, duplicates)) / sum(map(len, texts))
        yield f"duplicate_{unit}_chars", char_fraction > MAX_DUPLICATE_CHAR_FRACTION[unit]


def _find_duplicates(texts: Sequence[str]) -> list[str]:
    """Return the texts that equal an earlier one."""
    duplicates, seen = [], set[str]()
    for text in texts:
        if text in seen:
            duplicates.append(text)
        seen.add(text)
    return duplicates


def _check_ngrams(words: list[str]) -> Iterator[tuple[str, bool]]:
    """Check the fraction of characters in repeated n-grams."""
    id_of_word: dict[str, int] = {}
    word_ids = np.array([id_of_word.setdefault(word, len(id_of_word)) for word in words], dtype=np.int64)
    word_chars = np.array([len(word) for word in words], dtype=np.int64)
    ngram_ids = word_ids
    for n in range(2, max(MAX_DUPLICATE_NGRAM_CHAR_FRACTION) + 1):
        # A pair id combines the id of the first n-1 words of an n-gram with the id of its last word. `np.unique`
        # numbers the distinct pair ids. So two n-grams are equal if and only if their ids are equal.
        pair_ids = ngram_ids[:-1] * len(id_of_word) + word_ids[n - 1 :]
        _, first_positions, ngram_ids, counts = np.unique(
            pair_ids, return_index=True, return_inverse=True, return_counts=True
        )
        if n in MAX_TOP_NGRAM_CHAR_FRACTION:
            char_fraction = _count_top_chars(first_positions, counts, word_chars, n) / word_chars.sum()
            yield f"top_{n}gram_chars", char_fraction > MAX_TOP_NGRAM_CHAR_FRACTION[n]
        else:
            char_fraction = _count_duplicate_chars(first_positions, len(pair_ids), word_chars, n) / word_chars.sum()
            yield f"duplicate_{n}gram_chars", char_fraction > MAX_DUPLICATE_NGRAM_CHAR_FRACTION[n]


def _count_top_chars(first_positions: Ints, counts: Ints, word_chars: Ints, n: int) -> int:
    """Count the characters in all occurrences of the most frequent n-gram; 0 if no n-gram repeats.

    If several n-grams are equally frequent, count the one with the most characters. `first_positions` has the index of
    the word at which each distinct n-gram first occurs, and `counts` the number of its occurrences.
    """
    if counts.max() == 1:
        return 0
    chars_before_word = np.concatenate([[0], np.cumsum(word_chars)])
    top_positions = first_positions[counts == counts.max()]
    return int(counts.max() * (chars_before_word[top_positions + n] - chars_before_word[top_positions]).max())


def _count_duplicate_chars(first_positions: Ints, num_ngrams: int, word_chars: Ints, n: int) -> int:
    """Count the characters of the words in any n-gram that occurred before. Each word counts once."""
    is_duplicate = np.ones(num_ngrams, dtype=np.int64)
    is_duplicate[first_positions] = 0
    is_covered = np.convolve(is_duplicate, np.ones(n, dtype=np.int64)) > 0
    return int(word_chars[is_covered].sum())
