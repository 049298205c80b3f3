"""The rules of C4 for web pages: Raffel et al. 2020, "Exploring the Limits of Transfer Learning", 2.2.

Not implemented: the list of bad words and the language detector, which need external data and models, and the removal
of repeated three-sentence spans. For repeated documents see dist_llm/text/duplicates.py. A removed citation marker adds
its bytes to the removal counts, but no line.
"""

import re

from dist_llm.text.report import RemovalCounts

TERMINAL = (".", "!", "?", '"', "”")
MIN_WORDS_PER_LINE = 5
MIN_SENTENCES = 3
POLICY_NOTICES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
LINE_RULES = ("terminal_punctuation", "words_per_line", "javascript", "policy_notice")
RULES = ("lorem_ipsum", "curly_bracket", "citation_marker", *LINE_RULES, "sentences")

_CITATION = re.compile(r"\[(?:\d+|edit|citation needed)\]")
_SENTENCE_END = re.compile(r"[.!?]+[\"”’')\]]*(?=\s|$)")


def filter_page(text: str, removed: RemovalCounts) -> str | None:
    """Return the lines of a page that break no rule, or None. Count removals in `removed`, under "c4.<rule>"."""
    if broken_rule := _find_broken_page_rule(text):
        removed.add(f"c4.{broken_rule}", documents=1, bytes=len(text.encode()))
        return None
    lines = [line for line in _remove_citations(text, removed).split("\n") if not _drops_line(line, removed)]
    page = "\n".join(lines)
    if len(_SENTENCE_END.findall(page)) < MIN_SENTENCES:
        removed.add("c4.sentences", documents=1, bytes=len(page.encode()))
        return None
    return page


def _find_broken_page_rule(text: str) -> str | None:
    """Return the first rule about full pages that a text breaks, or None."""
    if "lorem ipsum" in text.lower():
        return "lorem_ipsum"
    return "curly_bracket" if "{" in text else None


def _remove_citations(text: str, removed: RemovalCounts) -> str:
    """Remove citation markers such as [1], and count their bytes."""
    shorter = _CITATION.sub("", text)
    if len(shorter) < len(text):
        removed.add("c4.citation_marker", bytes=len(text) - len(shorter))  # the markers are ASCII
    return shorter


def _drops_line(line: str, removed: RemovalCounts) -> bool:
    """Return whether a line breaks a rule. If so, count its removal."""
    rule = find_broken_line_rule(line)
    if rule is not None:
        removed.add(f"c4.{rule}", lines=1, bytes=len(line.encode()))
    return rule is not None


def find_broken_line_rule(line: str) -> str | None:
    """Return the first of LINE_RULES that a line breaks, or None."""
    lower = line.lower()
    if not line.rstrip().endswith(TERMINAL):
        return "terminal_punctuation"
    if len(line.split()) < MIN_WORDS_PER_LINE:
        return "words_per_line"
    if "javascript" in lower:
        return "javascript"
    return "policy_notice" if any(notice in lower for notice in POLICY_NOTICES) else None
