"""Convert a split pattern between tiktoken (regex engine: fancy-regex) and the `tokenizers` library (Oniguruma).

A split pattern is the regular expression that splits text before merging. The engines read most constructs alike. Two
constructs mean something else in Oniguruma and are rewritten: `$` matches at the end of any line there, and the `+` of
`{1,3}+` repeats the count, where fancy-regex only forbids backtracking. Constructs that may differ are rejected.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from dist_llm.errors import CheckpointError
from dist_llm.text.bpe_tokenizer import SPLIT_PATTERNS

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}

# Regular expressions that match the source text of a split pattern.
# A character class, such as \p{L} or \s:
_CLASS = r"\\[pP]\{\w+\}|\\[sSrnt]"
# What matches exactly one character: a class, a bracket expression such as [^\r\n\p{L}], or a literal character:
_ATOM = rf"(?:{_CLASS}|\[\^?(?:{_CLASS}|[\w !-%'-,./:-@])+\]|[\w !\"#%&',/:;<=>@~-])"
# A count, such as {1,3}:
_COUNT = r"\{\d+(?:,\d*)?\}"
# One supported construct: an atom with or without a quantifier, $, |, \z, or the start or the end of a group:
_CONSTRUCT = re.compile(
    rf"(?:(?P<atomic>{_ATOM}{_COUNT})\+|(?P<end>\$)|{_ATOM}(?:[?*+]\+?|{_COUNT})?"
    rf"|\((?:\?(?:[:!=>]|i:))?|\)(?:[?*+]\+?)?|\||\\z)(?![?*+{{])",
    re.ASCII,
)
# Pairs of letters under (?i:...). Oniguruma also matches them against one character, such as ß; fancy-regex does not.
_FOLDED_LETTERS = re.compile(r"\(\?i:[^)]*(?:s[st]|f[fil])", re.IGNORECASE)


def to_oniguruma(pattern: str) -> str:
    """Convert a pattern without changing its meaning. Raises CheckpointError if the meaning might change."""
    if match := _FOLDED_LETTERS.search(pattern):
        raise CheckpointError(
            f"split pattern {pattern!r}: in {match[0]!r}, Oniguruma also matches the last two letters against one "
            "character, such as ß."
        )
    translated, position = [], 0
    while position < len(pattern):
        match = _CONSTRUCT.match(pattern, position)
        if match is None:
            raise CheckpointError(
                f"split pattern {pattern!r}: the two engines may read it differently, at "
                f"{pattern[position : position + 20]!r}."
            )
        if match["atomic"]:
            translated.append(f"(?>{match['atomic']})")
        else:
            translated.append(r"\z" if match["end"] else match[0])
        position = match.end()
    return "".join(translated)


def build_pre_tokenizer(pattern: str) -> dict[str, Any]:
    """Build the `pre_tokenizer` of a `tokenizer.json` for a pattern. Raises CheckpointError as `to_oniguruma` does."""
    return {"type": "Sequence", "pretokenizers": [{**SPLIT, "pattern": {"Regex": to_oniguruma(pattern)}}, BYTE_LEVEL]}


def read_pattern(content: Mapping[str, Any], exported_pattern: str | None) -> str:
    """Return the split pattern of a `tokenizer.json`.

    `exported_pattern` is the pattern from which an export of ours wrote the file, or None for other files. It is
    returned if `to_oniguruma` converts it to the pattern of the file. Raises CheckpointError if the tokenizer changes
    text before the split, or splits it in another way.
    """
    normalizer, pre_tokenizer = content.get("normalizer"), content.get("pre_tokenizer") or {}
    is_sequence = pre_tokenizer.get("type") == "Sequence"
    *splits, last = pre_tokenizer["pretokenizers"] if is_sequence else [pre_tokenizer]
    keeps_text = normalizer is None or normalizer["type"] == "NFC"
    is_byte_level = last.get("type") == "ByteLevel" and last.get("add_prefix_space") is False
    if keeps_text and is_byte_level and len(splits) < 2:
        splits_as_gpt2 = last.get("use_regex", True)
        if splits_as_gpt2 and not splits:
            return SPLIT_PATTERNS["gpt2"]
        regex = splits[0].get("pattern", {}).get("Regex") if splits else None
        if regex and not splits_as_gpt2 and splits == [{**SPLIT, "pattern": {"Regex": regex}}]:
            if exported_pattern is not None and to_oniguruma(exported_pattern) == regex:
                return exported_pattern
            if to_oniguruma(regex) == regex:
                return regex
            raise CheckpointError(f"split pattern {regex!r}: tiktoken reads it differently.")
    raise CheckpointError(
        f"text is prepared by {json.dumps([normalizer, *splits, last])[:200]}, "
        "but only one split pattern followed by ByteLevel without add_prefix_space can be imported."
    )
