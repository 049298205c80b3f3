"""Convert a split pattern between tiktoken (regex engine: fancy-regex) and the `tokenizers` library (Oniguruma).

The engines agree on most of the language, over all of Unicode. Two constructs are rewritten: `$`, which in Oniguruma is
the end of any line, and `{1,3}+`, which in Oniguruma is a repeated count. Constructs not known to agree are refused.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from dist_llm.errors import CheckpointError
from dist_llm.text.bpe_tokenizer import SPLIT_PATTERNS

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}

_SET = r"\\[pP]\{\w+\}|\\[sSrnt]"
_ATOM = rf"(?:{_SET}|\[\^?(?:{_SET}|[\w !-%'-,./:-@])+\]|[\w !\"#%&',/:;<=>@~-])"
_COUNT = r"\{\d+(?:,\d*)?\}"
_PART = re.compile(
    rf"(?:(?P<atomic>{_ATOM}{_COUNT})\+|(?P<end>\$)|{_ATOM}(?:[?*+]\+?|{_COUNT})?"
    rf"|\((?:\?(?:[:!=>]|i:))?|\)(?:[?*+]\+?)?|\||\\z)(?![?*+{{])",
    re.ASCII,
)
# If case is ignored, Oniguruma matches one character, such as ß, to these two characters.
_FOLDED = re.compile(r"\(\?i:[^)]*(?:s[st]|f[fil])", re.IGNORECASE)


def to_oniguruma(pattern: str) -> str:
    """Convert a pattern without changing its meaning. Raises CheckpointError if the meaning might change."""
    translated, position = [], 0
    while position < len(pattern):
        part = _PART.match(pattern, position)
        if part is None or _FOLDED.search(pattern):
            rest = pattern[position : position + 20]
            raise CheckpointError(
                f"split pattern {pattern!r}: not known to mean the same in both engines, at {rest!r}."
            )
        translated.append(f"(?>{part['atomic']})" if part["atomic"] else r"\z" if part["end"] else part[0])
        position = part.end()
    return "".join(translated)


def build_pre_tokenizer(pattern: str) -> dict[str, Any]:
    """Build the entry of `tokenizer.json` for a pattern. Raises CheckpointError as `to_oniguruma` does."""
    return {"type": "Sequence", "pretokenizers": [{**SPLIT, "pattern": {"Regex": to_oniguruma(pattern)}}, BYTE_LEVEL]}


def read_pattern(content: Mapping[str, Any], exported: str | None) -> str:
    """Return the pattern by which a `tokenizer.json` splits text, or `exported` if it was exported from that pattern.

    Raises CheckpointError if the text is changed before the split, or is split in another way.
    """
    normalizer, step = content.get("normalizer"), content.get("pre_tokenizer") or {}
    *splits, last = step["pretokenizers"] if step.get("type") == "Sequence" else [step]
    plain = normalizer is None or normalizer["type"] == "NFC"
    if plain and last.get("type") == "ByteLevel" and last.get("add_prefix_space") is False and len(splits) < 2:
        own = last.get("use_regex", True)
        if own and not splits:
            return SPLIT_PATTERNS["gpt2"]
        regex = splits[0].get("pattern", {}).get("Regex") if splits else None
        if regex and not own and splits == [{**SPLIT, "pattern": {"Regex": regex}}]:
            if exported is not None and to_oniguruma(exported) == regex:
                return exported
            if to_oniguruma(regex) == regex:
                return regex
            raise CheckpointError(f"split pattern {regex!r}: tiktoken reads it differently.")
    raise CheckpointError(
        f"text is prepared by {json.dumps([normalizer, *splits, last])[:200]}, "
        "and not by one split pattern and ByteLevel without a space in front."
    )
