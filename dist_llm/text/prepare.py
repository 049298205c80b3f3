"""`dist-llm prepare`: tokenize raw text to a corpus of token shards.

The corpus is written to `OUT.partial`, and renamed to `OUT` when it is complete and synced to the disk. A killed run
leaves `OUT.partial` with a journal, from which the next run resumes. A lock on `OUT.lock` excludes a second run; the
kernel releases the lock when the process dies.
"""

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from dist_llm.data.shard import MANIFEST_FILE, CorpusManifest
from dist_llm.errors import DataError
from dist_llm.text.corpus_part import SINGLE_PART, CorpusPart, parse_part
from dist_llm.text.inputs import Input, open_inputs, sum_size_bytes
from dist_llm.text.journal import Journal
from dist_llm.text.options import PrepareOptions, add_arguments, build_options
from dist_llm.text.prepare_run import PrepareRun, select_corpus_options
from dist_llm.text.progress import ProgressMeter
from dist_llm.text.publish import check_output, lock_output, publish_corpus, recover_output
from dist_llm.text.report import InputFileCounts, PrepareReport
from dist_llm.text.rows import RowFormat
from dist_llm.text.walk import FileRules

__all__ = ["PrepareOptions", "add_arguments", "build_options", "prepare"]

NOTHING_TO_DO = (
    "nothing to do: {} was prepared with the same options from the same number of files and bytes; to prepare it "
    "again, give --overwrite"
)
RESUME_HINT = "The finished input files are kept in {}: fix this and run the same command again to resume."


def prepare(options: PrepareOptions, log_stream: TextIO | None = None) -> CorpusManifest:
    """Build the corpus that `options` describe. Print progress and a summary to `log_stream` (default: stderr).

    Raises DataError for each error that the user can fix: options, files, tokenizer, rows, `OUT`, a full disk.
    """
    _check_options(options)
    file_counts = InputFileCounts()
    row_format = RowFormat(options.text_key, options.prompt_key, options.separator)
    rules = FileRules(options.include, options.exclude, options.skip_unreadable)
    files = open_inputs(options.source, row_format, options.hf_split, rules, file_counts)
    part = _select_part(options, len(files))
    out = Path(os.path.realpath(options.out))
    if part.num_parts > 1:
        _check_not_merged(out)
        out = out / part.name
    partial, old = out.with_name(out.name + ".partial"), out.with_name(out.name + ".old")
    try:
        with lock_output(out):
            recover_output(out, old)
            finished_corpus = None if options.overwrite else _find_finished_corpus(options, out, files, file_counts)
            if finished_corpus is not None:
                print(NOTHING_TO_DO.format(out), file=log_stream or sys.stderr)
                return finished_corpus
            check_output(out, options.overwrite)
            partial.mkdir(exist_ok=True)
            try:
                with ProgressMeter(log_stream or sys.stderr, sum_size_bytes(part.select_files(files))) as meter:
                    run = PrepareRun(options, part, files, partial, meter, file_counts)
                    manifest = run.write_corpus()
                    publish_corpus(partial, out, old)
                    run.print_summary(manifest)
            except DataError as error:
                raise DataError(
                    f"{error} {RESUME_HINT.format(partial)}" if Journal(partial).has_records else str(error)
                ) from None
            finally:
                if not Journal(partial).has_records:
                    shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        path, reason = error.filename or partial, error.strerror or error
        hint = RESUME_HINT.format(partial) if Journal(partial).has_records else "Nothing of this run was saved."
        raise DataError(f"{path}: cannot be written: {reason}. {hint}") from None
    return manifest


def _find_finished_corpus(
    options: PrepareOptions, out: Path, files: Sequence[Input], file_counts: InputFileCounts
) -> CorpusManifest | None:
    """Return the manifest of `out` if the same options made it from the same number of files and bytes.

    Only the files that were read count, because other versions name the reasons to skip a file differently.
    Return None if `out` is another corpus or no corpus, and if the size of an input is unknown.
    """
    if sum_size_bytes(files) is None:
        return None
    try:
        report, manifest = PrepareReport.load(out), CorpusManifest.load(out)
    except DataError:
        return None
    has_same_files = report.inputs.get("read") == file_counts.get("read")
    is_same = report.options == select_corpus_options(options) and has_same_files
    return manifest if is_same else None


def _check_options(options: PrepareOptions) -> None:
    rules = (
        (bool(options.source), "--source: give at least one"),
        (0 <= options.heldout_fraction < 1, "--heldout-fraction: must be at least 0 and below 1"),
        (
            not (options.prompt_key and options.filter),
            "--filter: changes texts, so the end of their prompts is lost; leave out --filter or --prompt-key",
        ),
        (
            options.separator is None or (options.separator != "" and "\n" not in options.separator),
            "--separator: must not be empty or contain a line break; for empty lines give blank-lines",
        ),
        (0 <= options.max_bad_rate <= 1, "--max-bad-rate: must be from 0 to 1"),
        (options.workers >= 1, "--workers: must be at least 1"),
        (options.shard_tokens >= 1, "--shard-tokens: must be at least 1"),
        (options.bpe_train_bytes >= 1, "--bpe-train-bytes: must be at least 1"),
        (0.1 <= options.dedup_threshold < 1, "--dedup-threshold: must be at least 0.1 and below 1"),
        (
            options.part is None or options.dedup != "near",
            "--dedup near: does not work with --part, because near duplicates may be in different parts. "
            "Leave out --part, or use --dedup exact",
        ),
    )
    for is_satisfied, message in rules:
        if not is_satisfied:
            raise DataError(message)


def _select_part(options: PrepareOptions, num_files: int) -> CorpusPart:
    if options.part is None:
        return SINGLE_PART
    number, num_parts = parse_part(options.part)
    if options.dedup:
        return CorpusPart(number, num_parts, "text")
    return CorpusPart(number, num_parts, "file" if num_files >= num_parts else "row")


def _check_not_merged(out: Path) -> None:
    if (out / MANIFEST_FILE).exists():
        raise DataError(f"{out}: is a complete corpus, so no part is added to it. Choose another --out, or remove it.")
