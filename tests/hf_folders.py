"""Build tokenizers of each kind and write them as Hugging Face folders, for tests of the import and export.

    tokenizer = write_folder(tmp_path / "hf", kind="unigram")  # also writes a chat template and generation settings
    imported = ...  # the tokenizer that the code under test reads from the folder
    assert imported.encode(text) == tokenizer.encode(text).ids  # for each text of MORE_DIFFICULT_TEXTS

The tokenizers are trained on PROSE. TOKENIZER_FILES are the names of the files that an export must reproduce.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

PROSE = [
    f"The {number}th ship sailed to port {number * 7}; it's late, they'll wait — 漢字 {number}.\r\n"
    for number in range(200)
]
CHAT_TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}</s>{% endfor %}"
GENERATION = {"bos_token_id": 1, "eos_token_id": [2, 3], "do_sample": True, "temperature": 0.6, "top_p": 0.9}
# Added tokens that are not special: a full word, a part of a word, and one with punctuation.
ADDED = ["ship", "ailed", "<think>"]
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>"]

MORE_DIFFICULT_TEXTS = (
    *("", " ", "  ", "\n", "\t", "\r\n", "\n\n\n", " \n \n", "a", "A", " a", "a ", "  a  ", "a  b", "a   b"),
    *("ship", "ships", "shipship", "warship", " ship ", "sailed", "the ship sailed", "SHIP", "<think>ship</think>"),
    *("<s>", "</s>", "a</s>b", "<|im_start|>user", "<s><s>", "<|endoftext|>", "<unk>", "text </s> text", "< s>"),
    *(
        "漢字",
        "漢字かな交じり文。",
        "한국어 문장",
        "مرحبا ١٢٣",
        "हिन्दी",
        "e\u0301",
        "é",
        "ﬁ Ⅷ ²",
        "İıſK",
        "\u200d\ufeff",
    ),
    *("👩‍👩‍👧‍👦", "🏳️‍🌈🏳️‍🌈", "a👍b", "line\r\nline\r\n", "1234567890", "3.14e-10", "don't we'll", "\x00\x7f", "a" * 300),
    *(" " * 200 + "x", "\u00a0\u2003\u3000", "def f(x):\n    return x\n", "▁under▁", "##ing ##", "Ġthe", "<0x0A>"),
)


def build_byte_level() -> Tokenizer:
    """Build a byte-level BPE like those of Llama 3 and Qwen: NFC, a split pattern, then bytes."""
    tokenizer = Tokenizer(models.BPE())
    pattern = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    split_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), split_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        PROSE, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, **_make_trainer_options())
    )
    return tokenizer


def build_sentencepiece_bpe() -> Tokenizer:
    """Build a BPE like that of Llama 2: spaces become ▁, characters without a token become bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    decoding_steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(decoding_steps)
    special = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(PROSE, trainers.BpeTrainer(vocab_size=500, **_make_trainer_options(special)))
    content = json.loads(tokenizer.to_str())  # byte tokens belong to the model and are not special
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(content))


def build_unigram() -> Tokenizer:
    """Build a Unigram tokenizer like that of T5: SentencePiece, with ▁ in front of each word."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.train_from_iterator(
        PROSE, trainers.UnigramTrainer(vocab_size=150, unk_token="<unk>", **_make_trainer_options())
    )
    return tokenizer


def build_wordpiece() -> Tokenizer:
    """Build a WordPiece tokenizer like that of BERT: lower case, with ## in front of the continuation of a word."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    tokenizer.train_from_iterator(PROSE, trainers.WordPieceTrainer(vocab_size=200, **_make_trainer_options()))
    return tokenizer


TOKENIZER_BUILDERS = {
    "byte_level": build_byte_level,
    "sentencepiece_bpe": build_sentencepiece_bpe,
    "unigram": build_unigram,
    "wordpiece": build_wordpiece,
}


def _make_trainer_options(special: list[str] = SPECIAL) -> dict[str, Any]:
    """Return the options that all trainers of tokenizers share."""
    return {"special_tokens": special, "show_progress": False}


def write_folder(folder: Path, kind: str, *, added: list[str] = ADDED, bos: bool = True) -> Tokenizer:
    """Write the files of a tokenizer with a chat template and generation settings; return the tokenizer.

    `kind` is a key of TOKENIZER_BUILDERS. `added` are tokens that are added to the trained vocabulary. With `bos`, the
    tokenizer adds <s> at the start of a text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = TOKENIZER_BUILDERS[kind]()
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in added])
    if bos:
        prefix_tokens = [("<s>", tokenizer.token_to_id("<s>"))]
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", prefix_tokens)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "lstrip": False, "rstrip": False},
        "clean_up_tokenization_spaces": False,
        "model_max_length": 77,
    }
    texts = {
        "tokenizer_config.json": json.dumps(settings, indent=4),
        "special_tokens_map.json": json.dumps({"bos_token": "<s>", "eos_token": "</s>"}),
        "added_tokens.json": json.dumps({token: tokenizer.token_to_id(token) for token in added}),
        "chat_template.jinja": CHAT_TEMPLATE,
        # With another indent and line end than our writer uses, so a copy is distinguishable from a rewritten file.
        "generation_config.json": json.dumps(GENERATION, indent=3) + "\r\n",
    }
    for name, text in texts.items():
        (folder / name).write_bytes(text.encode())
    return tokenizer


TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "generation_config.json"),
)
