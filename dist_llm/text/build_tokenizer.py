"""Build the tokenizer of a specification: train it on the source, or read it from files.

The forms of a specification:

byte                     the 256 bytes
bpe:N                    byte-level BPE with N ids, trained on the source
gpt2, cl100k_base, ...   an encoding of tiktoken
FILE.tiktoken            a base64 token and its id on each line
vocab.json,merges.txt    the two files of GPT-2, or a folder with only these
FOLDER                   a folder of Hugging Face: its tokenizer.json, which is run unchanged, and the files beside it
meta.pkl                 nanoGPT's table of characters, or a folder with it
CORPUS or CHECKPOINT     the tokenizer of a prepared corpus or of a checkpoint
"""

import base64
import json
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from dist_llm.errors import DataError
from dist_llm.text.bpe_tokenizer import SPLIT_PATTERNS, BPETokenizer
from dist_llm.text.byte_alphabet import CHAR_TO_BYTE, to_bytes
from dist_llm.text.char_tokenizer import NANOGPT_META_FILE, read_nanogpt_meta
from dist_llm.text.difficult_texts import DIFFICULT_TEXTS
from dist_llm.text.hf_folder import is_hf_folder, read_hf_folder
from dist_llm.text.tokenizer import ENDOFTEXT, TOKENIZER_FILE, Tokenizer, is_own_format

BYTE_IDS = {bytes([byte]): byte for byte in range(256)}

# Split patterns that the regex engines of tokenizers and tiktoken read in the same way; in cl100k `{1,3}+` differs.
TRAINABLE_PATTERNS = ("gpt2", "llama3")
MIN_BPE_SIZE = len(BYTE_IDS) + 1
NUM_SAMPLES, MAX_CHARS_PER_SAMPLE = 256, 8192
TextFactory = Callable[[], Iterable[str]]


def build_tokenizer(spec: str, split_pattern: str | None, training_texts: TextFactory) -> Tokenizer:
    """Build the tokenizer of `spec` (see above). `training_texts` is called only for `bpe:N`.

    Raises DataError if the spec is unknown, its files are missing or malformed, it needs a network and there is none,
    or the texts are too few for N ids.
    """
    import tiktoken

    path = Path(spec)
    if spec.startswith("bpe:"):
        return _train_bpe(
            _parse_bpe_size(spec), _choose_pattern(spec, split_pattern, "gpt2", TRAINABLE_PATTERNS), training_texts
        )
    if path.name.endswith(".tiktoken"):
        return _load_tiktoken_file(path, _choose_pattern(spec, split_pattern, "cl100k", tuple(SPLIT_PATTERNS)))
    own_file = _has_own_tokenizer(path)
    if "," in spec or ((path / "merges.txt").is_file() and not own_file and not is_hf_folder(path)):
        paths = spec.split(",") if "," in spec else [str(path / "vocab.json"), str(path / "merges.txt")]
        if len(paths) != 2:
            raise DataError(f"--tokenizer {spec}: expected two files, as in vocab.json,merges.txt")
        pattern = _choose_pattern(spec, split_pattern, "gpt2", tuple(SPLIT_PATTERNS))
        return _load_vocab_and_merges(Path(paths[0]), Path(paths[1]), pattern)
    if split_pattern is not None:
        raise DataError(f"--split-pattern {split_pattern}: tokenizer {spec} has its own pattern; leave the option out.")
    if spec == "byte":
        return BPETokenizer("byte", SPLIT_PATTERNS["gpt2"], BYTE_IDS, {ENDOFTEXT: len(BYTE_IDS)})
    if spec in tiktoken.list_encoding_names():
        return _load_tiktoken_encoding(spec)
    if own_file:
        return Tokenizer.load(path)
    if is_hf_folder(path):
        return read_hf_folder(path)
    if path.name == NANOGPT_META_FILE or (path / NANOGPT_META_FILE).is_file():
        return read_nanogpt_meta(path if path.name == NANOGPT_META_FILE else path / NANOGPT_META_FILE)
    raise DataError(
        f"--tokenizer {spec}: unknown. Give byte, bpe:N, a .tiktoken file, vocab.json,merges.txt, a folder of "
        "Hugging Face's, nanoGPT's meta.pkl, the folder of a prepared corpus or checkpoint, or one of "
        f"tiktoken's: {', '.join(tiktoken.list_encoding_names())}"
    )


def _has_own_tokenizer(folder: Path) -> bool:
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        return False
    try:
        return is_own_format(json.loads(_read_file(path)))
    except (ValueError, RecursionError):
        raise DataError(f"{path}: cannot be read as JSON. Check the path given to --tokenizer.") from None


def _choose_pattern(spec: str, requested_pattern: str | None, default: str, allowed_patterns: tuple[str, ...]) -> str:
    pattern = requested_pattern or default
    if pattern not in allowed_patterns:
        raise DataError(f"--split-pattern {pattern}: tokenizer {spec} offers {', '.join(allowed_patterns)}.")
    return pattern


def _parse_bpe_size(spec: str) -> int:
    digits = spec.removeprefix("bpe:")
    size = int(digits) if digits.isdecimal() else 0
    if size < MIN_BPE_SIZE:
        raise DataError(
            f"--tokenizer {spec}: N must be a whole number of at least {MIN_BPE_SIZE}, "
            f"for 256 bytes and {ENDOFTEXT}; for example bpe:4096"
        )
    return size


def _train_bpe(size: int, pattern: str, training_texts: TextFactory) -> BPETokenizer:
    """Train byte-level BPE of `size` ids: bytes, merges in the order of training, `<|endoftext|>` last."""
    reference = _train_reference(size - 1, pattern, training_texts)
    vocabulary = reference.get_vocab()
    if len(vocabulary) < size - 1:
        raise DataError(
            f"--tokenizer bpe:{size}: the training text is too small or too uniform for so many merges. "
            f"The largest N it allows is {len(vocabulary) + 1}: use bpe:{len(vocabulary) + 1} or add text."
        )
    ranks = {to_bytes(token): token_id for token, token_id in sorted(vocabulary.items(), key=lambda item: item[1])}
    tokenizer = BPETokenizer(f"bpe:{size}", SPLIT_PATTERNS[pattern], ranks, {ENDOFTEXT: size - 1})
    _check_same_ids_on_samples(tokenizer, reference, training_texts)
    return tokenizer


def _train_reference(size: int, pattern: str, training_texts: TextFactory) -> Any:
    """Train a `tokenizers.Tokenizer` on the texts. Ties are broken by id, so it is deterministic."""
    from tokenizers import Regex, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Reference

    reference = Reference(models.BPE())
    reference.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERNS[pattern]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,  # do not merge pairs that occur only once
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    reference.train_from_iterator(training_texts(), trainer)
    return reference


def _check_same_ids_on_samples(tokenizer: BPETokenizer, reference: Any, training_texts: TextFactory) -> None:
    """Raise DataError unless both libraries give the same ids on samples.

    Their regex engines differ, so the same split pattern may match different text.
    """
    sample = (text[:MAX_CHARS_PER_SAMPLE] for text in islice(training_texts(), NUM_SAMPLES))
    for text in (*DIFFICULT_TEXTS, *sample):
        if not np.array_equal(tokenizer.encode(text), reference.encode(text).ids):
            raise DataError(
                f"--tokenizer {tokenizer.name}: tiktoken and tokenizers disagree on {text[:60]!r}. "
                "Choose another N or --split-pattern."
            )


def _load_tiktoken_encoding(name: str) -> BPETokenizer:
    import tiktoken

    try:
        encoding = tiktoken.get_encoding(name)
    except Exception as error:  # the network, its library and a stale cache raise many types
        raise DataError(
            f"--tokenizer {name}: tiktoken could not get its file ({type(error).__name__}). The first use downloads a "
            "file: set TIKTOKEN_CACHE_DIR to a directory filled on a connected machine, give a local .tiktoken file "
            "or vocab.json,merges.txt, or train your own with bpe:N."
        ) from None
    return BPETokenizer(name, encoding._pat_str, encoding._mergeable_ranks, encoding._special_tokens)


def _load_tiktoken_file(path: Path, pattern: str) -> BPETokenizer:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(_read_file(path).splitlines(), start=1):
        try:
            token, token_id = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(token_id)
        except ValueError:
            raise DataError(f"{path}:{number}: expected a base64 token and its id, got {line[:60]!r}") from None
    if not ranks:
        raise DataError(f"{path}: no ids in it.")
    return BPETokenizer(".tiktoken", SPLIT_PATTERNS[pattern], ranks, {ENDOFTEXT: max(ranks.values()) + 1})


def _load_vocab_and_merges(vocab: Path, merges: Path, pattern: str) -> BPETokenizer:
    """Load GPT-2's two files. tiktoken merges by id, so ids must ascend in the order of the merges."""
    try:
        ids: dict[str, int] = json.loads(_read_file(vocab))
        if not all(type(token_id) is int for token_id in ids.values()):
            raise ValueError("an id is not a whole number")
        lines = _read_file(merges).decode("utf-8").split("\n")
        merged_tokens = ["".join(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        alphabet = list(CHAR_TO_BYTE)
        mergeable_ids = {token: ids[token] for token in (*alphabet, *merged_tokens)}
    except KeyError as error:
        raise DataError(
            f"{vocab}: no id for {error.args[0]!r}, which {merges} needs; the two files may be from different "
            "tokenizers."
        ) from None
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{vocab}, {merges}: not a vocabulary and its merges: {error}") from None
    order = [mergeable_ids[token] for token in dict.fromkeys(merged_tokens)]
    if order != sorted(order):
        raise DataError(
            f"{vocab}: ids must rise in the order of {merges}, as GPT-2's do; tiktoken cannot use this vocabulary."
        )
    if ENDOFTEXT not in ids:
        raise DataError(f"{vocab}: no {ENDOFTEXT}, which ends each document. Add it with an id of its own.")
    ranks = {to_bytes(token): token_id for token, token_id in sorted(mergeable_ids.items(), key=lambda item: item[1])}
    special = {token: token_id for token, token_id in ids.items() if token not in mergeable_ids}
    return BPETokenizer("vocab.json,merges.txt", SPLIT_PATTERNS[pattern], ranks, special)


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}. Check the path given to --tokenizer.") from None
