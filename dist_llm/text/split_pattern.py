"""Convert a split pattern between tiktoken (regex engine: fancy-regex) and the `tokenizers` library (Oniguruma).

A split pattern is the regular expression that splits text before merging. The engines agree on most constructs. Two
constructs are rewritten: `$`, which in Oniguruma is the end of any line, and `{1,3}+`, which in Oniguruma is a repeated
count. A construct that is not known to agree is rejected.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from dist_llm.errors import CheckpointError
from dist_llm.text.bpe_tokenizer import SPLIT_PATTERNS

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}

# Regular expressions that match the source of a split pattern: a character class, a single-character construct with or
# without brackets, a count such as {1,3}, and one supported construct.
_CLASS = r"\\[pP]\{\w+\}|\\[sSrnt]"
_ATOM = rf"(?:{_CLASS}|\[\^?(?:{_CLASS}|[\w !-%'-,./:-@])+\]|[\w !\"#%&',/:;<=>@~-])"
_COUNT = r"\{\d+(?:,\d*)?\}"
_CONSTRUCT = re.compile(
    rf"(?:(?P<atomic>{_ATOM}{_COUNT})\+|(?P<end>\$)|{_ATOM}(?:[?*+]\+?|{_COUNT})?"
    rf"|\((?:\?(?:[:!=>]|i:))?|\)(?:[?*+]\+?)?|\||\\z)(?![?*+{{])",
    re.ASCII,
)
# Pairs of letters under (?i:...). Oniguruma also matches them against one character, such as ß; fancy-regex does not.
_FOLDED_LETTERS = re.compile(r"\(\?i:[^)]*(?:s[st]|f[fil])", re.IGNORECASE)


def to_oniguruma(pattern: str) -> str:
    """Convert a pattern without changing its meaning. Raises CheckpointError if the meaning might change."""
    translated, position = [], 0
    while position < len(pattern):
        match = _CONSTRUCT.match(pattern, position)
        if match is None or _FOLDED_LETTERS.search(pattern):
            raise CheckpointError(
                f"split pattern {pattern!r}: not known to mean the same in both engines, at "
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


def read_pattern(content: Mapping[str, Any], exported: str | None) -> str:
    """Return the split pattern of a `tokenizer.json`. Return `exported` if `to_oniguruma` converts it to this pattern.

    Raises CheckpointError if the tokenizer changes text before the split, or splits it in another way.
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
            if exported is not None and to_oniguruma(exported) == regex:
                return exported
            if to_oniguruma(regex) == regex:
                return regex
            raise CheckpointError(f"split pattern {regex!r}: tiktoken reads it differently.")
    raise CheckpointError(
        f"text is prepared by {json.dumps([normalizer, *splits, last])[:200]}, "
        "and not by one split pattern and ByteLevel without a space in front."
    )
