"""The quality and repetition rules of MassiveText: Rae et al. 2021, "Scaling Language Models", A.1.1, table A1.

Words are separated by blanks. Of repeated lines, paragraphs and n-grams, all occurrences but the first are duplicates.
Only the characters of words count, not blanks.
"""

import re
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from dist_llm.text.report import RemovalCounts

WORDS = (50, 100_000)
MEAN_WORD_CHARS = (3, 10)
MAX_SYMBOLS_PER_WORD = 0.1
MAX_BULLET_LINES, MAX_ELLIPSIS_LINES = 0.9, 0.3
MIN_ALPHABETIC_WORDS = 0.8
STOP_WORDS, MIN_STOP_WORDS = {"the", "be", "to", "of", "and", "that", "have", "with"}, 2
MAX_DUPLICATES = {"line": 0.30, "paragraph": 0.30}
MAX_DUPLICATE_CHARS = {"line": 0.20, "paragraph": 0.20}
MAX_TOP_NGRAM_CHARS = {2: 0.20, 3: 0.18, 4: 0.16}
MAX_DUPLICATE_NGRAM_CHARS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
RULES = (
    *("word_count", "mean_word_chars", "symbols_per_word", "bullet_lines", "ellipsis_lines"),
    *("alphabetic_words", "stop_words"),
    *(f"duplicate_{unit}{what}" for unit in MAX_DUPLICATES for what in ("s", "_chars")),
    *(f"top_{n}gram_chars" for n in MAX_TOP_NGRAM_CHARS),
    *(f"duplicate_{n}gram_chars" for n in MAX_DUPLICATE_NGRAM_CHARS),
)

Ints = npt.NDArray[np.int64]
_PUNCTUATION = ".,;:!?\"'()[]“”‘’"


def clean(text: str, removed: RemovalCounts) -> str | None:
    """Return the unchanged text, or None; removals are counted in `removed`, under the first broken rule."""
    rule = find_broken_rule(text)
    if rule is None:
        return text
    removed.add(f"gopher.{rule}", documents=1, bytes=len(text.encode()))
    return None


def find_broken_rule(text: str) -> str | None:
    """Return the first of RULES that a document breaks; cheap rules are checked first."""
    words = text.split()
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    for rules in (_check_quality(text, words, lines), _check_repetition(text, lines), _check_ngrams(words)):
        for rule, broken in rules:
            if broken:
                return rule
    return None


def _check_quality(text: str, words: list[str], lines: list[str]) -> Iterator[tuple[str, bool]]:
    yield "word_count", not WORDS[0] <= len(words) <= WORDS[1]
    yield "mean_word_chars", not MEAN_WORD_CHARS[0] <= sum(map(len, words)) / len(words) <= MEAN_WORD_CHARS[1]
    symbols = max(text.count("#"), text.count("...") + text.count("…"))
    yield "symbols_per_word", symbols / len(words) > MAX_SYMBOLS_PER_WORD
    bullets = sum(line.startswith(("•", "‣", "▪", "◦", "-", "*")) for line in lines)
    yield "bullet_lines", bullets / len(lines) > MAX_BULLET_LINES
    yield "ellipsis_lines", sum(line.endswith(("...", "…")) for line in lines) / len(lines) > MAX_ELLIPSIS_LINES
    alphabetic = sum(any(sign.isalpha() for sign in word) for word in words)
    yield "alphabetic_words", alphabetic / len(words) < MIN_ALPHABETIC_WORDS
    yield "stop_words", len(STOP_WORDS & {word.strip(_PUNCTUATION).lower() for word in words}) < MIN_STOP_WORDS


def _check_repetition(text: str, lines: list[str]) -> Iterator[tuple[str, bool]]:
    paragraphs = [each.strip() for each in re.split(r"\n\s*\n", text) if each.strip()]
    for unit, segments in (("line", lines), ("paragraph", paragraphs)):
        duplicates = _find_duplicates(segments)
        yield f"duplicate_{unit}s", len(duplicates) / len(segments) > MAX_DUPLICATES[unit]
        share = sum(map(len, duplicates)) / sum(map(len, segments))
        yield f"duplicate_{unit}_chars", share > MAX_DUPLICATE_CHARS[unit]


def _find_duplicates(segments: Sequence[str]) -> list[str]:
    seen: set[str] = set()
    return [segment for segment in segments if segment in seen or seen.add(segment)]  # type: ignore[func-returns-value]


def _check_ngrams(words: list[str]) -> Iterator[tuple[str, bool]]:
    """Check shares of characters in n-grams. Equal n-grams, and only these, have equal numbers."""
    numbers: dict[str, int] = {}
    singles = np.array([numbers.setdefault(word, len(numbers)) for word in words], dtype=np.int64)
    chars = np.array([len(word) for word in words], dtype=np.int64)
    ngrams = singles
    for n in range(2, max(MAX_DUPLICATE_NGRAM_CHARS) + 1):
        # An n-gram gets its number from the number of its first n-1 words and the number of its last word.
        pairs = ngrams[:-1] * len(numbers) + singles[n - 1 :]
        _, first, ngrams, counts = np.unique(pairs, return_index=True, return_inverse=True, return_counts=True)
        if n in MAX_TOP_NGRAM_CHARS:
            share = _count_top_chars(first, counts, chars, n) / chars.sum()
            yield f"top_{n}gram_chars", share > MAX_TOP_NGRAM_CHARS[n]
        else:
            share = _count_duplicate_chars(first, len(pairs), chars, n) / chars.sum()
            yield f"duplicate_{n}gram_chars", share > MAX_DUPLICATE_NGRAM_CHARS[n]


def _count_top_chars(first: Ints, counts: Ints, chars: Ints, n: int) -> int:
    """Count the characters in all occurrences of the most frequent n-gram, the longest if several; 0 if none
    repeats."""
    if counts.max() == 1:
        return 0
    ends = np.concatenate([[0], np.cumsum(chars)])
    top = first[counts == counts.max()]
    return int(counts.max() * (ends[top + n] - ends[top]).max())


def _count_duplicate_chars(first: Ints, ngrams: int, chars: Ints, n: int) -> int:
    """Count the characters of words in any n-gram that occurred before; each word counts once."""
    duplicates = np.ones(ngrams, dtype=np.int64)
    duplicates[first] = 0
    covered = np.convolve(duplicates, np.ones(n, dtype=np.int64)) > 0
    return int(chars[covered].sum())
