"""The quality and repetition rules of MassiveText: Rae et al. 2021, "Scaling Language Models", A.1.1, table A1.

Words are separated by blanks. If a line, paragraph or n-gram repeats, all occurrences except the first are duplicates.
Character counts exclude the blanks between words.
"""

import re
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from dist_llm.text.report import RemovalCounts

MIN_WORDS, MAX_WORDS = 50, 100_000
MIN_MEAN_WORD_CHARS, MAX_MEAN_WORD_CHARS = 3, 10
STOP_WORDS, MIN_STOP_WORDS = {"the", "be", "to", "of", "and", "that", "have", "with"}, 2
# The limits below are fractions: of the words, the lines, the paragraphs or the characters of a document.
MAX_SYMBOLS_PER_WORD = 0.1
MAX_BULLET_LINES, MAX_ELLIPSIS_LINES = 0.9, 0.3
MIN_ALPHABETIC_WORDS = 0.8
MAX_DUPLICATES = {"line": 0.30, "paragraph": 0.30}
MAX_DUPLICATE_CHARS = {"line": 0.20, "paragraph": 0.20}
MAX_TOP_NGRAM_CHARS = {2: 0.20, 3: 0.18, 4: 0.16}  # by n
MAX_DUPLICATE_NGRAM_CHARS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}  # by n
RULES = (
    *("word_count", "mean_word_chars", "symbols_per_word", "bullet_lines", "ellipsis_lines"),
    *("alphabetic_words", "stop_words"),
    *(f"duplicate_{segment_kind}{suffix}" for segment_kind in MAX_DUPLICATES for suffix in ("s", "_chars")),
    *(f"top_{n}gram_chars" for n in MAX_TOP_NGRAM_CHARS),
    *(f"duplicate_{n}gram_chars" for n in MAX_DUPLICATE_NGRAM_CHARS),
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
    """Return the first of RULES that a document breaks, or None. Cheap rules are checked first."""
    words = text.split()
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    for rules in (_check_quality(text, words, lines), _check_repetition(text, lines), _check_ngrams(words)):
        for rule, is_broken in rules:
            if is_broken:
                return rule
    return None


def _check_quality(text: str, words: list[str], lines: list[str]) -> Iterator[tuple[str, bool]]:
    """Yield (rule, whether it is broken), as the other checks do."""
    yield "word_count", not MIN_WORDS <= len(words) <= MAX_WORDS
    yield "mean_word_chars", not MIN_MEAN_WORD_CHARS <= sum(map(len, words)) / len(words) <= MAX_MEAN_WORD_CHARS
    symbols = max(text.count("#"), text.count("...") + text.count("…"))
    yield "symbols_per_word", symbols / len(words) > MAX_SYMBOLS_PER_WORD
    bullets = sum(line.startswith(("•", "‣", "▪", "◦", "-", "*")) for line in lines)
    yield "bullet_lines", bullets / len(lines) > MAX_BULLET_LINES
    yield "ellipsis_lines", sum(line.endswith(("...", "…")) for line in lines) / len(lines) > MAX_ELLIPSIS_LINES
    alphabetic = sum(any(char.isalpha() for char in word) for word in words)
    yield "alphabetic_words", alphabetic / len(words) < MIN_ALPHABETIC_WORDS
    yield "stop_words", len(STOP_WORDS & {word.strip(_PUNCTUATION).lower() for word in words}) < MIN_STOP_WORDS


def _check_repetition(text: str, lines: list[str]) -> Iterator[tuple[str, bool]]:
    """Check the fractions of duplicate lines and paragraphs, and of the characters in them."""
    paragraphs = [paragraph.strip() for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip()]
    for segment_kind, segments in (("line", lines), ("paragraph", paragraphs)):
        duplicates = _find_duplicates(segments)
        yield f"duplicate_{segment_kind}s", len(duplicates) / len(segments) > MAX_DUPLICATES[segment_kind]
        char_fraction = sum(map(len, duplicates)) / sum(map(len, segments))
        yield f"duplicate_{segment_kind}_chars", char_fraction > MAX_DUPLICATE_CHARS[segment_kind]


def _find_duplicates(segments: Sequence[str]) -> list[str]:
    """Return the segments that equal an earlier one."""
    duplicates, seen = [], set[str]()
    for segment in segments:
        if segment in seen:
            duplicates.append(segment)
        seen.add(segment)
    return duplicates


def _check_ngrams(words: list[str]) -> Iterator[tuple[str, bool]]:
    """Check the fraction of characters in repeated n-grams. Two n-grams are equal if and only if their ids are."""
    id_of_word: dict[str, int] = {}
    word_ids = np.array([id_of_word.setdefault(word, len(id_of_word)) for word in words], dtype=np.int64)
    word_chars = np.array([len(word) for word in words], dtype=np.int64)
    ngram_ids = word_ids
    for n in range(2, max(MAX_DUPLICATE_NGRAM_CHARS) + 1):
        # The id of an n-gram is derived from the id of its first n-1 words and the id of its last word.
        pair_ids = ngram_ids[:-1] * len(id_of_word) + word_ids[n - 1 :]
        _, first_positions, ngram_ids, counts = np.unique(
            pair_ids, return_index=True, return_inverse=True, return_counts=True
        )
        if n in MAX_TOP_NGRAM_CHARS:
            char_fraction = _count_top_chars(first_positions, counts, word_chars, n) / word_chars.sum()
            yield f"top_{n}gram_chars", char_fraction > MAX_TOP_NGRAM_CHARS[n]
        else:
            char_fraction = _count_duplicate_chars(first_positions, len(pair_ids), word_chars, n) / word_chars.sum()
            yield f"duplicate_{n}gram_chars", char_fraction > MAX_DUPLICATE_NGRAM_CHARS[n]


def _count_top_chars(first_positions: Ints, counts: Ints, word_chars: Ints, n: int) -> int:
    """Count the characters in all occurrences of the most frequent n-gram; 0 if no n-gram repeats.

    If several n-grams are the most frequent, take the longest. `first_positions` and `counts` have one entry per
    distinct n-gram; positions are word indices.
    """
    if counts.max() == 1:
        return 0
    char_ends = np.concatenate([[0], np.cumsum(word_chars)])
    top_positions = first_positions[counts == counts.max()]
    return int(counts.max() * (char_ends[top_positions + n] - char_ends[top_positions]).max())


def _count_duplicate_chars(first_positions: Ints, num_ngrams: int, word_chars: Ints, n: int) -> int:
    """Count the characters of the words in any n-gram that occurred before. Each word counts once."""
    is_duplicate = np.ones(num_ngrams, dtype=np.int64)
    is_duplicate[first_positions] = 0
    is_covered = np.convolve(is_duplicate, np.ones(n, dtype=np.int64)) > 0
    return int(word_chars[is_covered].sum())
