"""Each rule of the Gopher and C4 filters removes text that breaks the rule.

The repetition rules are compared with a simple count.
"""

import random
from collections import Counter

import pytest

from dist_llm.text import c4, gopher, options
from dist_llm.text.filters import FILTERS, FilterChain
from dist_llm.text.report import RemovalCounts, TextCount

from .prepare_runs import make_prose


def split_lines(text):
    """Return the lines of a text."""
    return text.split("\n")


def test_options_match_the_filters():
    assert set(options.FILTER_NAMES) == set(FILTERS)


def test_good_text_passes_unchanged():
    removed = RemovalCounts()
    assert FilterChain(["gopher", "c4"])(make_prose(), removed) == make_prose()
    assert removed == {}


GOPHER_VIOLATIONS = {  # rule: a text that breaks it
    "word_count": " ".join(make_prose().split()[:49]),
    "mean_word_chars": " ".join(word + "x" * 12 for word in make_prose().split()) + " the and",
    "symbols_per_word": make_prose() + " #" * 15,
    "bullet_lines": "\n".join("- " + line for line in split_lines(make_prose())),
    "ellipsis_lines": "\n".join(
        line + "..." if index < 3 else line for index, line in enumerate(split_lines(make_prose()))
    ),
    "alphabetic_words": make_prose() + " 1234" * 60,
    "stop_words": " ".join(
        f"wort{first_letter}{second_letter}" for first_letter in "abcdefgh" for second_letter in "abcdefgh"
    )
    + " the the",
    "duplicate_lines": "\n".join(["a b c d"] * 7 + split_lines(make_prose(10))),
    "duplicate_line_chars": "\n".join([*split_lines(make_prose(10)), *split_lines(make_prose(10))[:3]]),
    "duplicate_paragraphs": "\n\n".join(
        ["x\ny"] * 6 + [split_lines(make_prose(9, seed=seed))[seed] for seed in range(9)]
    ),
    "top_2gram_chars": " ".join(f"{word} the harbourmaster" for word in make_prose().split()),
}


@pytest.mark.parametrize("rule", GOPHER_VIOLATIONS)
def test_each_gopher_rule_removes_a_document(rule):
    text, removed = GOPHER_VIOLATIONS[rule], RemovalCounts()
    is_broken_by_rule = dict(check_all_rules(text))
    assert is_broken_by_rule[rule], [name for name, is_broken in is_broken_by_rule.items() if is_broken]
    assert gopher.filter_document(text, removed) is None
    first_rule = next(name for name in gopher.RULES if is_broken_by_rule[name])
    assert removed == {f"gopher.{first_rule}": TextCount(documents=1, lines=0, bytes=len(text.encode()))}


def check_all_rules(text):
    """Yield (rule, whether the text breaks it)."""
    text_words, lines = text.split(), [line.strip() for line in text.split("\n") if line.strip()]
    yield from gopher._check_quality(text, text_words, lines)
    yield from gopher._check_repetition(text, lines)
    yield from gopher._check_ngrams(text_words)


def test_gopher_rules_are_listed_in_their_order():
    assert tuple(rule for rule, _ in check_all_rules(make_prose())) == gopher.RULES


def count_top_chars(text_words, n):
    """Return the number of characters that the most frequent n-gram covers; 0 if no n-gram repeats."""
    counts = Counter(tuple(text_words[start : start + n]) for start in range(len(text_words) - n + 1))
    highest_count = max(counts.values())
    if highest_count == 1:
        return 0
    return highest_count * max(len("".join(gram)) for gram, count in counts.items() if count == highest_count)


def count_duplicate_chars(text_words, n):
    """Return the number of characters in n-grams that occurred before."""
    seen, covered_positions = set(), set()
    for k in range(len(text_words) - n + 1):
        gram = tuple(text_words[k : k + n])
        if gram in seen:
            covered_positions |= set(range(k, k + n))
        seen.add(gram)
    return sum(len(text_words[position]) for position in covered_positions)


@pytest.mark.parametrize("seed", range(20))
def test_repetition_rules_agree_with_a_simple_count(seed, monkeypatch):
    """A text breaks a rule if the threshold is just below the counted value, but not if it is equal."""
    rng = random.Random(seed)
    text_words = rng.choices(["a", "bb", "ccc", "dddd", "é"], k=rng.randint(60, 90))
    num_chars = len("".join(text_words))
    fractions = {n: count_top_chars(text_words, n) / num_chars for n in (2, 3, 4)}
    fractions |= {n: count_duplicate_chars(text_words, n) / num_chars for n in range(5, 11)}
    for shift, is_expected_broken in ((0, False), (-1e-9, True)):
        for name in ("MAX_TOP_NGRAM_CHAR_FRACTION", "MAX_DUPLICATE_NGRAM_CHAR_FRACTION"):
            limits = {n: fractions[n] + shift for n in getattr(gopher, name)}
            monkeypatch.setattr(gopher, name, limits)
        assert {is_broken for _, is_broken in gopher._check_ngrams(text_words)} == {is_expected_broken}


C4_VIOLATING_LINES = {  # rule: a line that breaks it
    "terminal_punctuation": "this line of the page has no end",
    "words_per_line": "Only four words here.",
    "javascript": "Please turn on JavaScript to see this page.",
    "policy_notice": "By going on you accept our Privacy Policy and all it says.",
}


@pytest.mark.parametrize("rule", C4_VIOLATING_LINES)
def test_c4_removes_lines_that_break_a_rule(rule):
    removed, line = RemovalCounts(), C4_VIOLATING_LINES[rule]
    before, after = make_prose(4), make_prose(3, seed=1)
    assert c4.filter_page(f"{before}\n{line}\n{after}", removed) == f"{before}\n{after}"
    assert removed == {f"c4.{rule}": TextCount(documents=0, lines=1, bytes=len(line))}


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ("lorem_ipsum", make_prose() + " Lorem Ipsum dolor."),
        ("curly_bracket", make_prose() + " if (x) { }."),
        ("sentences", "One sentence of five words. Another one of five words."),
    ],
)
def test_c4_removes_pages_that_break_a_rule(rule, text):
    removed = RemovalCounts()
    assert c4.filter_page(text, removed) is None
    assert removed == {f"c4.{rule}": TextCount(documents=1, lines=0, bytes=len(text.encode()))}


def test_c4_counts_the_bytes_of_citation_markers():
    text, removed = make_prose().replace(".", "[1][citation needed].", 1) + "\nMenu\n", RemovalCounts()
    cleaned = c4.filter_page(text, removed)
    assert cleaned == make_prose()
    assert removed["c4.citation_marker"] == TextCount(documents=0, lines=0, bytes=18 + 2)
    num_newlines = 2  # of the removed lines
    removed_bytes = sum(count.bytes for count in removed.values())
    assert len(text.encode()) == len(cleaned.encode()) + removed_bytes + num_newlines


def test_filters_run_in_order_until_one_removes_the_document():
    removed = RemovalCounts()
    assert FilterChain(["c4", "gopher"])("Menu", removed) is None
    assert list(removed) == ["c4.terminal_punctuation", "c4.sentences"]
    assert list(FilterChain(["c4"]).build_zero_counts()) == [f"c4.{rule}" for rule in c4.RULES]
