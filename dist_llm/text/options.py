"""The options of `dist-llm prepare`, as a dataclass and as command-line arguments.

Imports the standard library only, so that `--help` is instant.
"""

import argparse
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from dist_llm.errors import DataError

EPILOG = """\
examples:
  # try the whole program on text that every Python installation has
  dist-llm prepare --source python-stdlib --tokenizer bpe:4096 --out data/stdlib

  # a folder of compressed JSON lines, with the text under the key "content"
  dist-llm prepare --source crawl/ --text-key content --tokenizer bpe:32000 --split-pattern llama3 --out data/crawl

  # all files that match a glob, which the shell expands
  dist-llm prepare --source shards/*.jsonl --tokenizer data/stdlib --out data/shards

  # several sources, read in this order; the tokenizer of GPT-2 from its two files
  dist-llm prepare --source books.parquet --source notes.txt --tokenizer vocab.json,merges.txt --out data/mixed

  # another corpus with the tokenizer of an existing corpus
  dist-llm prepare --source hf:wikitext:wikitext-2-raw-v1 --tokenizer data/stdlib --out data/wikitext

  # a web crawl: apply two published sets of quality rules and remove exact duplicates; report.json counts the removals
  dist-llm prepare --source crawl/ --tokenizer data/stdlib --filter gopher --filter c4 --dedup exact --out data/web

  # questions and answers: the model reads both, but only the answers have a loss
  dist-llm prepare --source qa.jsonl --prompt-key question --text-key answer --tokenizer data/stdlib --out data/qa

  # on two machines: prepare one part on each, then merge the parts into one corpus
  dist-llm prepare --source crawl/ --tokenizer data/stdlib --part 1/2 --out data/big
  dist-llm prepare --source crawl/ --tokenizer data/stdlib --part 2/2 --out data/big
  dist-llm prepare --merge data/big

A killed run leaves OUT.partial, which train does not accept. Run the same command again to resume it. Input files that
were finished before the last resume point are not read again. A resume point comes at the end of an input file, at
least 8 million characters of text after the previous one; 64 characters are added for each document. If an input file
has changed, the run resumes at the last resume point before this file. The run starts over if the tokenizer, a file on
which bpe:N was trained, or an option that changes the corpus has changed. A resumed run writes the same bytes as an
uninterrupted run.

The order of processing is: filters, deduplication, tokenizer.
"""

USAGE = """\
dist-llm prepare --source SOURCE [SOURCE ...] --tokenizer TOKENIZER --out OUT [options]
       dist-llm prepare --merge OUT"""
FILTER_NAMES = ("gopher", "c4")
DEDUP_KINDS = ("exact", "near")


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """The source, the tokenizer, the filters and the output of prepare."""

    source: tuple[str, ...]
    tokenizer: str
    out: Path
    split_pattern: str | None = None
    text_key: str = "text"
    hf_split: str = "train"
    heldout_fraction: float = 0.01
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    shard_tokens: int = 100_000_000
    bpe_train_bytes: int = 256 * 2**20
    max_bad_rate: float = 0.001
    overwrite: bool = False
    part: str | None = None
    filter: tuple[str, ...] = ()
    dedup: str | None = None
    dedup_threshold: float = 0.8
    prompt_key: str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    skip_unreadable: bool = False
    separator: str | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add every field of PrepareOptions to `parser`, with explanations and examples."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog, parser.usage = EPILOG, USAGE
    _add_inputs(parser)
    _add_files(parser)
    _add_selection(parser)
    _add_parts(parser)
    _add_tuning(parser)


def build_options(namespace: argparse.Namespace) -> PrepareOptions:
    """Build the options from a namespace parsed with `add_arguments`; other attributes are ignored.

    Raises DataError if a required option is missing.
    """
    values = {option.name: getattr(namespace, option.name) for option in fields(PrepareOptions)}
    if missing := [f"--{name}" for name in ("source", "tokenizer", "out") if not values[name]]:
        raise DataError(f"{', '.join(missing)}: must be given. See dist-llm prepare --help for examples.")
    tuples: dict[str, Any] = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return PrepareOptions(**{**values, **tuples})


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--source",
        action="extend",
        nargs="+",
        help="the text: one or more sources, read in this order; may be given several times. A folder (walked in "
        "sorted order); a .jsonl, .ndjson or .json file with one object per line; a .csv or .tsv file whose first line "
        "has the column names; a .parquet file; a folder of datasets.save_to_disk; any other file is one "
        "document or, with --separator, many. Files may be .gz, .zst, .xz or .bz2. hf:NAME[:CONFIG] streams a Hugging "
        "Face dataset (NAME may be a local folder). python-stdlib is the source code of Python's standard library, "
        "to which --include and --exclude do not apply",
    )
    parser.add_argument(
        "--tokenizer",
        help="bpe:N trains N ids on the source (256 bytes, merges, <|endoftext|>); byte uses the 256 bytes; a tiktoken "
        "encoding by name (gpt2, cl100k_base, ...; needs the network once); a .tiktoken file; vocab.json,merges.txt "
        "or a folder with both; a Hugging Face folder, whose tokenizer.json runs unchanged and whose "
        "files are kept for exports; nanoGPT's meta.pkl; a prepared corpus or a checkpoint, to reuse its tokenizer",
    )
    parser.add_argument("--out", type=Path, help="the directory of the corpus; it appears when the corpus is complete")
    parser.add_argument(
        "--split-pattern",
        help="the pattern that splits text before merging: gpt2 or llama3 for bpe:N (default gpt2); gpt2, llama3 or "
        "cl100k for a .tiktoken file (default cl100k)",
    )
    parser.add_argument(
        "--text-key",
        default="text",
        help="the JSON key or column of the text; a.b for key b of the object under a; a list of strings is joined "
        "with empty lines (default: %(default)s)",
    )
    parser.add_argument(
        "--separator",
        metavar="STRING",
        help="the string between the documents of a text file, such as '<|endoftext|>', on its own line or within a "
        "line; blank-lines: one or more empty lines (default: a file is one document)",
    )
    parser.add_argument(
        "--prompt-key",
        help="the JSON key or column of a prompt, which is put before the text; prompt tokens have no loss",
    )
    parser.add_argument(
        "--hf-split", default="train", help="the split of an hf: or save_to_disk source (default: %(default)s)"
    )


def _add_files(parser: argparse.ArgumentParser) -> None:
    for option, action in (("--include", "read only"), ("--exclude", "skip")):
        parser.add_argument(
            option,
            action="append",
            default=[],
            metavar="GLOB",
            help=f"in the folders of --source, {action} the files whose name, or path below the folder, matches GLOB; "
            "quote GLOB; * also matches /; may be given several times",
        )
    parser.add_argument(
        "--skip-unreadable",
        action="store_true",
        help="skip files and folders that cannot be read (no permission, broken links, other compressions or "
        "encodings, truncated files) and list them in the report (default: the run fails)",
    )


def _add_selection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--filter",
        action="append",
        default=[],
        choices=FILTER_NAMES,
        help="remove text of low quality; may be given several times and is applied in this order. gopher: removes "
        "documents by length, words, symbols and repetition (Rae et al. 2021, A.1.1 and table A1). c4: removes lines "
        "and documents (Raffel et al. 2020, 2.2). Both are designed for English web pages, not for code",
    )
    parser.add_argument(
        "--dedup",
        choices=DEDUP_KINDS,
        help="keep only the first of several equal documents (exact) or similar documents (near: MinHash of 5-word "
        "shingles). Memory per kept document, in one process: exact about 100 bytes; near about 5 kB, or 10 kB with a "
        "threshold of 0.5. near does not work with --part",
    )
    parser.add_argument(
        "--dedup-threshold",
        type=float,
        default=PrepareOptions.dedup_threshold,
        help="near: remove a document whose Jaccard similarity of 5-word shingles with an earlier document is at least "
        "this; the similarity is estimated with an error of about 0.04 (default: %(default)s)",
    )


def _add_parts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--part",
        metavar="i/n",
        help="prepare part i of n (i counts from 1) as a corpus of its own in OUT/part-i-of-n. A part has every n-th "
        "input file, or every n-th row if there are fewer files than n. With --dedup exact a part reads all files and "
        "selects texts by their hash, so that equal texts are in one part. With bpe:N each part trains the same "
        "tokenizer; to train it only once, prepare a corpus with bpe:N and give this corpus as --tokenizer",
    )
    parser.add_argument(
        "--merge",
        type=Path,
        metavar="OUT",
        help="merge all parts in OUT into one corpus: write a manifest that lists their files, without moving them",
    )


def _add_tuning(parser: argparse.ArgumentParser) -> None:
    defaults = PrepareOptions(source=(), tokenizer="", out=Path())
    parser.add_argument(
        "--heldout-fraction",
        type=float,
        default=defaults.heldout_fraction,
        help="fraction of documents to hold out for evaluation, selected by a hash of the text (default: %(default)s)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=defaults.workers,
        help="tokenizing processes; their number does not affect the corpus (default: one per CPU, here %(default)s)",
    )
    parser.add_argument(
        "--shard-tokens",
        type=int,
        default=defaults.shard_tokens,
        help="maximum number of tokens in a shard; longer documents get their own shard (default: %(default)s)",
    )
    parser.add_argument(
        "--bpe-train-bytes",
        type=int,
        default=defaults.bpe_train_bytes,
        help="bytes of text on which bpe:N is trained, from the start of the source, without held-out documents "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--max-bad-rate",
        type=float,
        default=defaults.max_bad_rate,
        help="maximum fraction of bad rows (not UTF-8, not JSON, or no text under the key): up to it they are skipped, "
        "above it the run fails (default: %(default)s)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the corpus at --out when the new corpus is complete"
    )
