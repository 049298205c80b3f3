"""Build the tokenizer that `--tokenizer` names: train it on the source text, or read it from files.

The accepted values:

byte                     the 256 bytes
bpe:N                    byte-level BPE with N ids, trained on the source text
gpt2, cl100k_base, ...   an encoding of tiktoken
FILE.tiktoken            a base64 token and its id on each line
vocab.json,merges.txt    the two files of GPT-2, or a folder with only these
FOLDER                   a Hugging Face folder: its tokenizer.json, which is run unchanged, and the files beside it
meta.pkl                 the character table of nanoGPT, or a folder with this file
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

# Split patterns with the same meaning in the regex engines of `tokenizers` (which trains) and tiktoken (which encodes).
# cl100k is not one of them: `{1,3}+` has different meanings.
TRAINABLE_PATTERNS = ("gpt2", "llama3")
MIN_BPE_IDS = len(BYTE_IDS) + 1  # 256 bytes and <|endoftext|>
# Training texts on which both libraries are compared: their number, and the compared length of each.
NUM_CHECKED_TEXTS, MAX_CHECKED_CHARS = 256, 8192
TextFactory = Callable[[], Iterable[str]]


def build_tokenizer(spec: str, split_pattern: str | None = None, training_texts: TextFactory = tuple) -> Tokenizer:
    """Build the tokenizer of `spec`, a value of `--tokenizer`. `training_texts` is called only for `bpe:N`.

    Raises DataError if the spec is unknown, its files are missing or malformed, a download fails, or the training texts
    are too few for N ids.
    """
    import tiktoken

    path = Path(spec)
    if spec.startswith("bpe:"):
        return _train_bpe(
            _parse_bpe_size(spec), _choose_pattern(spec, split_pattern, "gpt2", TRAINABLE_PATTERNS), training_texts
        )
    if path.name.endswith(".tiktoken"):
        return _load_tiktoken_file(path, _choose_pattern(spec, split_pattern, "cl100k", tuple(SPLIT_PATTERNS)))
    has_own_file = _has_own_tokenizer(path)
    if "," in spec or ((path / "merges.txt").is_file() and not has_own_file and not is_hf_folder(path)):
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
    if has_own_file:
        return Tokenizer.load(path)
    if is_hf_folder(path):
        return read_hf_folder(path)
    if path.name == NANOGPT_META_FILE or (path / NANOGPT_META_FILE).is_file():
        return read_nanogpt_meta(path if path.name == NANOGPT_META_FILE else path / NANOGPT_META_FILE)
    raise DataError(
        f"--tokenizer {spec}: unknown. Give byte, bpe:N, a .tiktoken file, vocab.json,merges.txt, a Hugging Face "
        "folder, the meta.pkl of nanoGPT, the folder of a prepared corpus or checkpoint, or an encoding of tiktoken: "
        f"{', '.join(tiktoken.list_encoding_names())}"
    )


def _has_own_tokenizer(folder: Path) -> bool:
    """Return whether the `tokenizer.json` of a folder has our format, not that of Hugging Face."""
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
    """Return N of `bpe:N`. Raises DataError if N is too small or no number."""
    digits = spec.removeprefix("bpe:")
    num_ids = int(digits) if digits.isdecimal() else 0
    if num_ids < MIN_BPE_IDS:
        raise DataError(
            f"--tokenizer {spec}: N must be a whole number of at least {MIN_BPE_IDS}, "
            f"for 256 bytes and {ENDOFTEXT}; for example bpe:4096"
        )
    return num_ids


def _train_bpe(num_ids: int, pattern: str, training_texts: TextFactory) -> BPETokenizer:
    """Train byte-level BPE with `num_ids` ids: bytes, then merges in the order of training, then `<|endoftext|>`."""
    hf_tokenizer = _train_hf_tokenizer(num_ids - 1, pattern, training_texts)
    vocab = hf_tokenizer.get_vocab()
    if len(vocab) < num_ids - 1:
        raise DataError(
            f"--tokenizer bpe:{num_ids}: the training text is too small or too uniform for so many merges. "
            f"The largest N it allows is {len(vocab) + 1}: use bpe:{len(vocab) + 1} or add text."
        )
    ranks = {to_bytes(token): token_id for token, token_id in sorted(vocab.items(), key=lambda item: item[1])}
    tokenizer = BPETokenizer(f"bpe:{num_ids}", SPLIT_PATTERNS[pattern], ranks, {ENDOFTEXT: num_ids - 1})
    _check_same_ids_on_texts(tokenizer, hf_tokenizer, training_texts)
    return tokenizer


def _train_hf_tokenizer(num_ids: int, pattern: str, training_texts: TextFactory) -> Any:
    """Train a `tokenizers.Tokenizer` on the texts. The library breaks ties by id, so training is deterministic."""
    from tokenizers import Regex, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as LibraryTokenizer

    hf_tokenizer = LibraryTokenizer(models.BPE())
    hf_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERNS[pattern]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=num_ids,
        min_frequency=2,  # do not merge pairs that occur only once
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    hf_tokenizer.train_from_iterator(training_texts(), trainer)
    return hf_tokenizer


def _check_same_ids_on_texts(tokenizer: BPETokenizer, hf_tokenizer: Any, training_texts: TextFactory) -> None:
    """Raise DataError unless tiktoken and `tokenizers` give the same ids on difficult texts and on training texts.

    The regex engines of the two libraries differ, so the same split pattern may split text differently.
    """
    checked_texts = (text[:MAX_CHECKED_CHARS] for text in islice(training_texts(), NUM_CHECKED_TEXTS))
    for text in (*DIFFICULT_TEXTS, *checked_texts):
        if not np.array_equal(tokenizer.encode(text), hf_tokenizer.encode(text).ids):
            raise DataError(
                f"--tokenizer {tokenizer.name}: tiktoken and tokenizers disagree on {text[:60]!r}. "
                "Choose another N or --split-pattern."
            )


def _load_tiktoken_encoding(name: str) -> BPETokenizer:
    """Load an encoding of tiktoken, which the first use downloads."""
    import tiktoken

    try:
        encoding = tiktoken.get_encoding(name)
    except Exception as error:  # the network, the HTTP library and a stale cache raise exceptions of many types
        raise DataError(
            f"--tokenizer {name}: tiktoken could not get its file ({type(error).__name__}). The first use downloads a "
            "file: set TIKTOKEN_CACHE_DIR to a directory filled on a connected machine, give a local .tiktoken file "
            "or vocab.json,merges.txt, or train your own with bpe:N."
        ) from None
    return BPETokenizer(name, encoding._pat_str, encoding._mergeable_ranks, encoding._special_tokens)


def _load_tiktoken_file(path: Path, pattern: str) -> BPETokenizer:
    """Load a file with a base64 token and its id on each line. `<|endoftext|>` gets the next id."""
    ranks: dict[bytes, int] = {}
    for line_number, line in enumerate(_read_file(path).splitlines(), start=1):
        try:
            token, token_id = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(token_id)
        except ValueError:
            raise DataError(f"{path}:{line_number}: expected a base64 token and its id, got {line[:60]!r}") from None
    if not ranks:
        raise DataError(f"{path}: contains no ids.")
    return BPETokenizer(".tiktoken", SPLIT_PATTERNS[pattern], ranks, {ENDOFTEXT: max(ranks.values()) + 1})


def _load_vocab_and_merges(vocab: Path, merges: Path, pattern: str) -> BPETokenizer:
    """Load the two files of GPT-2. tiktoken merges by id, so ids must ascend in the order of the merges."""
    try:
        ids: dict[str, int] = json.loads(_read_file(vocab))
        if not all(type(token_id) is int for token_id in ids.values()):
            raise ValueError("an id is not a whole number")
        lines = _read_file(merges).decode("utf-8").split("\n")
        merged_tokens = ["".join(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        mergeable_ids = {token: ids[token] for token in (*CHAR_TO_BYTE, *merged_tokens)}
    except KeyError as error:
        raise DataError(
            f"{vocab}: no id for {error.args[0]!r}, which {merges} needs; the two files may be from different "
            "tokenizers."
        ) from None
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{vocab}, {merges}: not a vocabulary and its merges: {error}") from None
    ids_in_merge_order = [mergeable_ids[token] for token in dict.fromkeys(merged_tokens)]
    if ids_in_merge_order != sorted(ids_in_merge_order):
        raise DataError(
            f"{vocab}: ids must rise in the order of {merges}, as those of GPT-2 do; tiktoken cannot use this "
            "vocabulary."
        )
    if ENDOFTEXT not in ids:
        raise DataError(f"{vocab}: no {ENDOFTEXT}, which ends each document. Add this token with an unused id.")
    ranks = {to_bytes(token): token_id for token, token_id in sorted(mergeable_ids.items(), key=lambda item: item[1])}
    special = {token: token_id for token, token_id in ids.items() if token not in mergeable_ids}
    return BPETokenizer("vocab.json,merges.txt", SPLIT_PATTERNS[pattern], ranks, special)


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}. Check the path given to --tokenizer.") from None
