"""Build the tokenizer of a spec: train it, or load it from tiktoken or from files of other programs.

byte                      the 256 bytes
bpe:N                     N ids, trained on the source
gpt2, cl100k_base, ...    a tiktoken encoding
FILE.tiktoken             a base64 token and its rank on each line
vocab.json,merges.txt     GPT-2's two files, or a folder with only these
FOLDER                    a folder of Hugging Face: its tokenizer.json, run unchanged, and the files beside it
meta.pkl                  nanoGPT's character table, or a folder with it
CORPUS                    the tokenizer of a prepared corpus or of a checkpoint
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
from dist_llm.text.char_tokenizer import META_FILE, read_meta
from dist_llm.text.difficult_texts import DIFFICULT_TEXTS
from dist_llm.text.hf_folder import is_hf_folder, read_hf_folder
from dist_llm.text.tokenizer import ENDOFTEXT, TOKENIZER_FILE, Tokenizer, is_own_format

BYTES = {bytes([byte]): byte for byte in range(256)}

# Patterns that mean the same in the trainer's regex engine and in tiktoken's. In cl100k `{1,3}+` differs.
TRAINABLE_PATTERNS = ("gpt2", "llama3")
MIN_BPE = len(BYTES) + 1
SAMPLE_DOCUMENTS, SAMPLE_CHARS = 256, 8192
Texts = Callable[[], Iterable[str]]


def build_tokenizer(spec: str, split_pattern: str | None, training_texts: Texts) -> Tokenizer:
    """Build the tokenizer of `spec` (see above). `training_texts` is called only for `bpe:N`.

    Raises DataError if the spec is unknown, its files are missing or malformed, it needs a network and there is none,
    or the texts are too few for N ids.
    """
    import tiktoken

    folder, _, name = Path(spec), *spec.rpartition("/")[1:]
    if spec.startswith("bpe:"):
        return _train_bpe(
            _parse_bpe_size(spec), _choose_pattern(spec, split_pattern, "gpt2", TRAINABLE_PATTERNS), training_texts
        )
    if name.endswith(".tiktoken"):
        return _load_tiktoken_file(Path(spec), _choose_pattern(spec, split_pattern, "cl100k", tuple(SPLIT_PATTERNS)))
    own_file = _has_own_tokenizer(folder)
    if "," in spec or ((folder / "merges.txt").is_file() and not own_file and not is_hf_folder(folder)):
        paths = spec.split(",") if "," in spec else [str(folder / "vocab.json"), str(folder / "merges.txt")]
        if len(paths) != 2:
            raise DataError(f"--tokenizer {spec}: expected two files, as in vocab.json,merges.txt")
        pattern = _choose_pattern(spec, split_pattern, "gpt2", tuple(SPLIT_PATTERNS))
        return _load_vocab_and_merges(Path(paths[0]), Path(paths[1]), pattern)
    if split_pattern is not None:
        raise DataError(f"--split-pattern {split_pattern}: tokenizer {spec} has its own pattern; leave the option out.")
    if spec == "byte":
        return BPETokenizer("byte", SPLIT_PATTERNS["gpt2"], BYTES, {ENDOFTEXT: len(BYTES)})
    if spec in tiktoken.list_encoding_names():
        return _load_tiktoken_name(spec)
    if own_file:
        return Tokenizer.load(folder)
    if is_hf_folder(folder):
        return read_hf_folder(folder)
    if name == META_FILE or (folder / META_FILE).is_file():
        return read_meta(folder if name == META_FILE else folder / META_FILE)
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


def _choose_pattern(spec: str, chosen: str | None, default: str, offered: tuple[str, ...]) -> str:
    pattern = chosen or default
    if pattern not in offered:
        raise DataError(f"--split-pattern {pattern}: tokenizer {spec} offers {', '.join(offered)}.")
    return pattern


def _parse_bpe_size(spec: str) -> int:
    digits = spec.removeprefix("bpe:")
    size = int(digits) if digits.isdecimal() else 0
    if size < MIN_BPE:
        raise DataError(
            f"--tokenizer {spec}: N must be a whole number of at least {MIN_BPE}, "
            f"for 256 bytes and {ENDOFTEXT}; for example bpe:4096"
        )
    return size


def _train_bpe(size: int, pattern: str, training_texts: Texts) -> BPETokenizer:
    """Train byte-level BPE of `size` ids: bytes, merges in the order of training, `<|endoftext|>` last."""
    trainer = _train_reference(size - 1, pattern, training_texts)
    vocabulary = trainer.get_vocab()
    if len(vocabulary) < size - 1:
        raise DataError(
            f"--tokenizer bpe:{size}: the training text is too small or too uniform for so many merges. "
            f"The largest N it allows is {len(vocabulary) + 1}: use bpe:{len(vocabulary) + 1} or add text."
        )
    ranks = {to_bytes(token): rank for token, rank in sorted(vocabulary.items(), key=lambda item: item[1])}
    tokenizer = BPETokenizer(f"bpe:{size}", SPLIT_PATTERNS[pattern], ranks, {ENDOFTEXT: size - 1})
    _prove_equal(tokenizer, trainer, training_texts)
    return tokenizer


def _train_reference(size: int, pattern: str, training_texts: Texts) -> Any:
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
        min_frequency=2,  # a pair that occurs once is not worth a merge
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    reference.train_from_iterator(training_texts(), trainer)
    return reference


def _prove_equal(tokenizer: BPETokenizer, reference: Any, training_texts: Texts) -> None:
    """Raise DataError unless both libraries give the same ids, since two regex engines run the pattern."""
    sample = (text[:SAMPLE_CHARS] for text in islice(training_texts(), SAMPLE_DOCUMENTS))
    for text in (*DIFFICULT_TEXTS, *sample):
        if not np.array_equal(tokenizer.encode(text), reference.encode(text).ids):
            raise DataError(
                f"--tokenizer {tokenizer.name}: tiktoken and tokenizers disagree on {text[:60]!r}. "
                "Choose another N or --split-pattern."
            )


def _load_tiktoken_name(name: str) -> BPETokenizer:
    import tiktoken

    try:
        encoding = tiktoken.get_encoding(name)
    except Exception as error:  # the network, its library and a stale cache raise many types
        raise DataError(
            f"--tokenizer {name}: tiktoken could not download its file ({type(error).__name__}). It needs the network "
            "once: set TIKTOKEN_CACHE_DIR to a directory filled on a connected machine, give a local .tiktoken file "
            "or vocab.json,merges.txt, or train your own with bpe:N."
        ) from None
    return BPETokenizer(name, encoding._pat_str, encoding._mergeable_ranks, encoding._special_tokens)


def _load_tiktoken_file(path: Path, pattern: str) -> BPETokenizer:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(_read_file(path).splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise DataError(f"{path}:{number}: expected a base64 token and its rank, got {line[:60]!r}") from None
    if not ranks:
        raise DataError(f"{path}: no ranks in it.")
    return BPETokenizer(".tiktoken", SPLIT_PATTERNS[pattern], ranks, {ENDOFTEXT: max(ranks.values()) + 1})


def _load_vocab_and_merges(vocab: Path, merges: Path, pattern: str) -> BPETokenizer:
    """Load GPT-2's two files. tiktoken merges by id, so ids must ascend in the order of the merges."""
    try:
        ids: dict[str, int] = json.loads(_read_file(vocab))
        if not all(type(rank) is int for rank in ids.values()):
            raise ValueError("an id is not a whole number")
        lines = _read_file(merges).decode("utf-8").split("\n")
        products = ["".join(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        alphabet = list(CHAR_TO_BYTE)
        mergeable = {token: ids[token] for token in (*alphabet, *products)}
    except KeyError as error:
        raise DataError(
            f"{vocab}: no id for {error.args[0]!r}, which {merges} needs. Check that the two files belong together."
        ) from None
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{vocab}, {merges}: not a vocabulary and its merges: {error}") from None
    order = [mergeable[token] for token in dict.fromkeys(products)]
    if order != sorted(order):
        raise DataError(f"{vocab}: ids do not ascend in the order of {merges}, as in GPT-2's; tiktoken cannot run it.")
    if ENDOFTEXT not in ids:
        raise DataError(f"{vocab}: no {ENDOFTEXT}, which ends each document. Add it with an id of its own.")
    ranks = {to_bytes(token): rank for token, rank in sorted(mergeable.items(), key=lambda item: item[1])}
    special = {token: rank for token, rank in ids.items() if token not in mergeable}
    return BPETokenizer("vocab.json,merges.txt", SPLIT_PATTERNS[pattern], ranks, special)


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}. Check the path given to --tokenizer.") from None
