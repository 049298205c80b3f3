"""Folders as Hugging Face's tools write them: tokenizers of every kind, and texts that are hard for them."""

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

PROSE = [f"The {n}th ship sailed to port {n * 7}; it's late, they'll wait — 漢字 {n}.\r\n" for n in range(200)]
CHAT_TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}</s>{% endfor %}"
GENERATION = {"bos_token_id": 1, "eos_token_id": [2, 3], "do_sample": True, "temperature": 0.6, "top_p": 0.9}
# Ordinary tokens that were added: one is a word, one stands within words, one has signs.
ADDED = ["ship", "ailed", "<think>"]
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>"]

DIFFICULT = (
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


def byte_level() -> Tokenizer:
    """As Llama 3 and Qwen: a split pattern, then bytes; NFC first."""
    made = Tokenizer(models.BPE())
    pattern = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte])
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(PROSE, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, **_training()))
    return made


def sentencepiece_bpe() -> Tokenizer:
    """As Llama 2: blanks as ▁, bytes for what has no token."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    special = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    made.train_from_iterator(PROSE, trainers.BpeTrainer(vocab_size=500, **_training(special)))
    content = json.loads(made.to_str())  # bytes are tokens of the model, and not special
    content["added_tokens"] = [each for each in content["added_tokens"] if not each["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(content))


def unigram() -> Tokenizer:
    """As T5: SentencePiece's Unigram, with ▁ in front of each word."""
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made.train_from_iterator(PROSE, trainers.UnigramTrainer(vocab_size=150, unk_token="<unk>", **_training()))
    return made


def wordpiece() -> Tokenizer:
    """As BERT: lower case, words, and ## before what goes on with one."""
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    made.train_from_iterator(PROSE, trainers.WordPieceTrainer(vocab_size=200, **_training()))
    return made


KINDS = {each.__name__: each for each in (byte_level, sentencepiece_bpe, unigram, wordpiece)}


def _training(special: list[str] = SPECIAL) -> dict[str, Any]:
    return {"special_tokens": special, "show_progress": False}


def write_folder(folder: Path, kind: str, added: list[str] = ADDED, bos: bool = True) -> Tokenizer:
    """Write the tokenizer's files, with a chat template and settings for generation; return the library's own."""
    folder.mkdir(parents=True, exist_ok=True)
    made = KINDS[kind]()
    made.add_tokens([AddedToken(token, normalized=False) for token in added])
    if bos:
        front = [("<s>", made.token_to_id("<s>"))]
        made.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", front)
    made.save(str(folder / "tokenizer.json"))
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
        "added_tokens.json": json.dumps({token: made.token_to_id(token) for token in added}),
        "chat_template.jinja": CHAT_TEMPLATE,
        "generation_config.json": json.dumps(GENERATION, indent=3) + "\r\n",  # other bytes than we would write
    }
    for name, text in texts.items():
        (folder / name).write_bytes(text.encode())
    return made


ORIGINALS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "generation_config.json"),
)
