"""The options of `dist-llm adopt`, as a dataclass and as command-line arguments.

Imports the standard library only, so that `--help` is instant.
"""

import argparse
import os
from dataclasses import dataclass, field, fields
from pathlib import Path

FORMATS = ("megatron", "npy", "bin", "llmc")
EOT_POSITIONS = ("start", "end")
DTYPES = ("uint16", "int16", "uint32", "int32")

EPILOG = """\
No file is copied: the new directory contains a manifest that points at the files, the tokenizer, and the document
offsets. If you move or change a file, adopt it again.

examples:
  # Megatron-LM: mix_text_document.bin and its .idx
  dist-llm adopt --format megatron --data mix_text_document --tokenizer vocab.json,merges.txt --out data/mix

  # nanoGPT
  dist-llm adopt --format bin --dtype uint16 --data train.bin --heldout val.bin --tokenizer gpt2 --out data/owt

  # nanoGPT with character-level ids
  dist-llm adopt --format bin --dtype uint16 --data train.bin --tokenizer meta.pkl --out data/chars

  # FineWeb in the format of llm.c, many files
  dist-llm adopt --format llmc --data fineweb_train_*.bin --heldout fineweb_val_*.bin --tokenizer gpt2 --out data/fw

  # remote files: read once now, and fetched again when training needs them
  dist-llm adopt --format npy --data s3://bucket/part-000.npy --tokenizer data/owt --out data/remote
"""


@dataclass(frozen=True, kw_only=True)
class AdoptOptions:
    """The token files, their format and tokenizer, and the corpus to build from them."""

    format: str
    data: tuple[str, ...]
    tokenizer: str
    out: Path
    heldout: tuple[str, ...] = ()
    dtype: str | None = None
    eot_position: str | None = None
    split_pattern: str | None = None
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add every field of AdoptOptions to `parser`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    add = parser.add_argument
    add(
        "--format",
        choices=FORMATS,
        required=True,
        help="megatron: X.bin beside X.idx; npy: one-dimensional arrays; bin: ids without a header (nanoGPT, OLMo); "
        "llmc: the token files of llm.c",
    )
    add(
        "--data",
        action="extend",
        nargs="+",
        required=True,
        metavar="FILE",
        help="files or URLs of training tokens, in the order of the corpus",
    )
    add(
        "--heldout",
        action="extend",
        nargs="+",
        default=[],
        metavar="FILE",
        help="files or URLs of held-out tokens (default: none; training then runs no evaluation)",
    )
    add(
        "--tokenizer",
        required=True,
        help="the tokenizer that made the ids: any value that prepare accepts, except bpe:N",
    )
    add("--split-pattern", help="the pattern that splits text before merging, as for prepare")
    add("--dtype", choices=DTYPES, help="type of the little-endian ids; only for --format bin: other formats store it")
    add(
        "--eot-position",
        choices=EOT_POSITIONS,
        help="whether <|endoftext|> is the first or the last token of a document (default: start for llmc, end for npy "
        "and bin; not for megatron, whose .idx has the document boundaries)",
    )
    add("--out", type=Path, required=True, help="the directory of the corpus; it appears when the corpus is complete")
    add("--workers", type=int, default=os.cpu_count() or 1, help="files read at once (default: one per CPU)")


def build_options(namespace: argparse.Namespace) -> AdoptOptions:
    """Build the options from a namespace parsed with `add_arguments`; other attributes are ignored."""
    values = {option.name: getattr(namespace, option.name) for option in fields(AdoptOptions)}
    return AdoptOptions(**{**values, "data": tuple(values["data"]), "heldout": tuple(values["heldout"])})
