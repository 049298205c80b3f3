"""Texts to compare two tokenizers on: scripts, combining characters, runs of blanks, line ends, numbers."""

from dist_llm.text.tokenizer import ENDOFTEXT

DIFFICULT_TEXTS = (
    "I'm sure they'll say it's DON'T we'Ve'd",
    "emoji 👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 ﬁ Ⅷ ² ½",
    "漢字かな交じり文。한국어 문장",
    "مرحبا بالعالم ١٢٣ हिन्दी ไทย",
    "a" + " " * 300 + "b\t\t\tc   \n\n   d" + " " * 50,
    "1 12 123 1234 1234567890 3.14159 0x1F",
    "line\r\nline\r\n\r\n  indented\r\n\u00a0\u2003\u3000wide",
    ENDOFTEXT + "!?#$%^&*()_+{}[]|\\\x00\x7f",
)
