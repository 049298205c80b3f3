"""Each rule against text made to break that rule and no other, and the repetition rules against plain counting."""

import random
from collections import Counter

import pytest

from dist_llm.text import c4, gopher, options
from dist_llm.text.filters import FILTERS, Filters
from dist_llm.text.report import RemovalCounts, TextCount

SENTENCE = "The {} of the harbour sailed with a cargo of number {} and came home to an old town."


def prose(sentences=8, seed=0):
    """Passes all rules."""
    rng = random.Random(seed)
    names = ["ship", "boat", "crew", "captain", "ferry", "barge", "raft", "pilot", "clerk", "baker"]
    verbs = ["saw", "met", "lost", "found", "drew", "sold", "kept", "heard", "left", "won"]
    tails = ["at dawn", "by night", "in spring", "on Monday", "near home", "past noon", "last year", "too late"]
    colours = ["red", "blue", "pale", "dark", "green", "grey", "brown", "white", "warm", "cold"]

    def words(pool):
        return rng.choice(pool)

    return "\n".join(
        f"{words(colours).title()} {words(names)} {n} {words(verbs)} the {words(colours)} {words(names)} and "
        f"{words(verbs)} some {words(names)} {words(tails)}."
        for n in range(sentences)
    )


def lines_of(text):
    return text.split("\n")


def test_options_offer_what_there_is():
    assert set(options.FILTERS) == set(FILTERS)


def test_good_text_passes_unchanged():
    removed = RemovalCounts()
    assert Filters(["gopher", "c4"])(prose(), removed) == prose()
    assert removed == {}


GOPHER = {
    "word_count": " ".join(prose().split()[:49]),
    "mean_word_chars": " ".join(word + "x" * 12 for word in prose().split()) + " the and",
    "symbols_per_word": prose() + " #" * 15,
    "bullet_lines": "\n".join("- " + line for line in lines_of(prose())),
    "ellipsis_lines": "\n".join(line + "..." if n < 3 else line for n, line in enumerate(lines_of(prose()))),
    "alphabetic_words": prose() + " 1234" * 60,
    "stop_words": " ".join(f"wort{a}{b}" for a in "abcdefgh" for b in "abcdefgh") + " the the",
    "duplicate_lines": "\n".join(["a b c d"] * 7 + lines_of(prose(10))),
    "duplicate_line_chars": "\n".join([*lines_of(prose(10)), *lines_of(prose(10))[:3]]),
    "duplicate_paragraphs": "\n\n".join(["x\ny"] * 6 + [lines_of(prose(9, seed=n))[n] for n in range(9)]),
    "top_2gram_chars": " ".join(f"{word} the harbourmaster" for word in prose().split()),
}


@pytest.mark.parametrize("rule", GOPHER)
def test_gopher_by_rule(rule):
    text, removed = GOPHER[rule], RemovalCounts()
    found = dict(all_rules(text))
    assert found[rule], {name for name, broken in found.items() if broken}
    assert gopher.clean(text, removed) is None
    first = next(name for name in gopher.RULES if found[name])
    assert removed == {f"gopher.{first}": TextCount(1, 0, len(text.encode()))}


def all_rules(text):
    words, lines = text.split(), [line.strip() for line in text.split("\n") if line.strip()]
    yield from gopher._check_quality(text, words, lines)
    yield from gopher._check_repetition(text, lines)
    yield from gopher._check_ngrams(words)


def test_gopher_names_its_rules_in_the_order_it_looks():
    assert tuple(rule for rule, _ in all_rules(prose())) == gopher.RULES


def top_chars(words, n):
    """By counting strings."""
    counts = Counter(tuple(words[k : k + n]) for k in range(len(words) - n + 1))
    most = max(counts.values())
    return 0 if most == 1 else most * max(len("".join(gram)) for gram, count in counts.items() if count == most)


def duplicate_chars(words, n):
    seen, covered = set(), set()
    for k in range(len(words) - n + 1):
        gram = tuple(words[k : k + n])
        if gram in seen:
            covered |= set(range(k, k + n))
        seen.add(gram)
    return sum(len(words[k]) for k in covered)


@pytest.mark.parametrize("seed", range(20))
def test_repeated_ngrams_against_counting(seed, monkeypatch):
    """With each threshold just below what is counted by hand the rule is broken, and at it, it is not."""
    rng = random.Random(seed)
    words = rng.choices(["a", "bb", "ccc", "dddd", "é"], k=rng.randint(60, 90))
    total = len("".join(words))
    shares = {n: top_chars(words, n) / total for n in (2, 3, 4)}
    shares |= {n: duplicate_chars(words, n) / total for n in range(5, 11)}
    for shift, broken in ((0, False), (-1e-9, True)):
        for name in ("MAX_TOP_NGRAM_CHARS", "MAX_DUPLICATE_NGRAM_CHARS"):
            limits = {n: shares[n] + shift for n in getattr(gopher, name)}
            monkeypatch.setattr(gopher, name, limits)
        assert {found for _, found in gopher._check_ngrams(words)} == {broken}


C4_LINES = {
    "terminal_punctuation": "this line of the page has no end",
    "words_per_line": "Only four words here.",
    "javascript": "Please turn on JavaScript to see this page.",
    "policy_notice": "By going on you accept our Privacy Policy and all it says.",
}


@pytest.mark.parametrize("rule", C4_LINES)
def test_c4_takes_out_lines(rule):
    removed, line = RemovalCounts(), C4_LINES[rule]
    assert c4.clean(f"{prose(4)}\n{line}\n{prose(3, seed=1)}", removed) == f"{prose(4)}\n{prose(3, seed=1)}"
    assert removed == {f"c4.{rule}": TextCount(0, 1, len(line))}


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ("lorem_ipsum", prose() + " Lorem Ipsum dolor."),
        ("curly_bracket", prose() + " if (x) { }."),
        ("sentences", "One sentence of five words. Another one of five words."),
    ],
)
def test_c4_takes_out_pages(rule, text):
    removed = RemovalCounts()
    assert c4.clean(text, removed) is None
    assert removed == {f"c4.{rule}": TextCount(1, 0, len(text.encode()))}


def test_c4_takes_out_citation_markers_and_counts_every_byte():
    text, removed = prose().replace(".", "[1][citation needed].", 1) + "\nMenu\n", RemovalCounts()
    left = c4.clean(text, removed)
    assert left == prose()
    assert removed["c4.citation_marker"] == TextCount(0, 0, 18 + 2)
    newlines = 2  # of the lines that went
    assert len(text.encode()) == len(left.encode()) + sum(each.bytes for each in removed.values()) + newlines


def test_filters_are_called_in_order_until_one_has_taken_the_document():
    removed = RemovalCounts()
    assert Filters(["c4", "gopher"])("Menu", removed) is None
    assert list(removed) == ["c4.terminal_punctuation", "c4.sentences"]
    assert list(Filters(["c4"]).zero_counts()) == [f"c4.{rule}" for rule in c4.RULES]
