"""One run of prepare: write a corpus directory from the input files, or resume an interrupted run."""

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dist_llm.data.shard import SPLITS, CorpusManifest, select_token_dtype
from dist_llm.errors import DataError
from dist_llm.text.build_tokenizer import build_tokenizer
from dist_llm.text.chunks import ChunkReader
from dist_llm.text.corpus_part import CorpusPart
from dist_llm.text.corpus_writer import KEYS_FILE, CorpusWriter
from dist_llm.text.encode import DocumentEncoderSpec, encode_in_order, is_heldout
from dist_llm.text.filters import FilterChain
from dist_llm.text.inputs import Input
from dist_llm.text.journal import JOURNAL_FILE, Journal
from dist_llm.text.options import PrepareOptions
from dist_llm.text.progress import ProgressMeter
from dist_llm.text.report import InputFileCounts, PrepareReport, RemovalCounts
from dist_llm.text.rows import MAX_LOCATIONS, RowTracker
from dist_llm.text.tokenizer import TOKENIZER_FILE, Tokenizer

PROGRESS_FORMAT = "dist_llm prepare progress 1"
# Options that do not change the content of the corpus. A run may resume with other values of these options.
NON_CORPUS_OPTIONS = {"out", "workers", "max_bad_rate", "overwrite", "skip_unreadable"}


def select_corpus_options(options: PrepareOptions) -> dict[str, Any]:
    """Return the options that change the content of the corpus, as JSON stores them (a tuple becomes a list)."""
    selected = {name: value for name, value in asdict(options).items() if name not in NON_CORPUS_OPTIONS}
    loaded: dict[str, Any] = json.loads(json.dumps(selected))
    return loaded


class PrepareRun:
    """One pass over the input files, which writes a corpus directory."""

    def __init__(
        self,
        options: PrepareOptions,
        part: CorpusPart,
        files: list[Input],
        directory: Path,
        meter: ProgressMeter,
        file_counts: InputFileCounts,
    ) -> None:
        self.options, self.part, self.files = options, part, files
        self.directory, self.meter, self.file_counts = directory, meter, file_counts
        self.journal = Journal(directory)
        self.reader = ChunkReader(
            part.select_files(files), RowTracker(options.max_bad_rate, part, skip_unreadable=options.skip_unreadable)
        )
        self.corpus_options = select_corpus_options(options)
        # Fingerprints of the input files on which the tokenizer was trained, by index of the file.
        self._trained_on: dict[int, list[str | int] | None] = {}
        self._resumed_bytes = 0  # bytes of text that an earlier run wrote

    def write_corpus(self) -> CorpusManifest:
        """Write the tokenizer, the shards and the report, then the manifest."""
        journal_lines = self.journal.read()
        tokenizer = self._load_trained_tokenizer(journal_lines) or self._build_tokenizer()
        header = {
            "format": PROGRESS_FORMAT,
            "options": self.corpus_options,
            "tokenizer": tokenizer.sha256,
            "trained_on": list(self._trained_on.values()),
        }
        with self._resume(header, journal_lines, tokenizer) as writer:
            self._write_chunks(writer)
            shards = writer.close()
        self.reader.row_tracker.check()
        self.report = self._build_report(writer)
        manifest = CorpusManifest(
            dtype=select_token_dtype(tokenizer.vocab_size),
            vocab_size=tokenizer.vocab_size,
            tokenizer_sha256=tokenizer.sha256,
            source=self.options.source,
            shards=shards,
            bad_rows=self.report.bad_rows,
            prompts=self.options.prompt_key is not None,
        )
        if not manifest.count_tokens("train") and self.part.num_parts == 1:
            raise DataError(self._format_no_text_error(manifest))
        self.report.save(self.directory)
        for name in (JOURNAL_FILE, KEYS_FILE):
            (self.directory / name).unlink(missing_ok=True)
        manifest.save(self.directory)
        return manifest

    def _resume(
        self, header: dict[str, Any], journal_lines: list[dict[str, Any]], tokenizer: Tokenizer
    ) -> CorpusWriter:
        """Open the corpus of an earlier run at its last valid resume point, or an empty corpus."""
        records = self._select_valid_records(journal_lines, header)
        writer = self._build_writer(tokenizer)
        try:
            if records:
                writer.restore([record["note"] for record in records])
        except (DataError, LookupError, TypeError, ValueError, AttributeError) as error:
            # DataError: a file of the earlier run has changed. The other types: a record of the journal is damaged.
            self.meter.print_line(f"starting over: {error}")
            writer.__exit__()
            writer, records = self._build_writer(tokenizer), []
        if records:
            num_finished_files = sum(len(record["inputs"]) for record in records)
            self.meter.print_line(f"resuming after {num_finished_files:,} of {len(self.reader.files):,} input files")
            self.reader.restore(num_finished_files, records[-1]["counts"])
            self._resumed_bytes = writer.written_counts.bytes
        writer.remove_other_files({TOKENIZER_FILE, JOURNAL_FILE})
        tokenizer.save(self.directory)
        self.journal.rewrite([header, *records])
        return writer

    def _select_valid_records(
        self, journal_lines: list[dict[str, Any]], header: dict[str, Any]
    ) -> list[dict[str, Any]]:
        """Return the records of the journal before the first input file that changed; [] if the header differs."""
        if journal_lines[:1] != [header]:
            return []
        valid_records: list[dict[str, Any]] = []
        remaining_files = iter(self.reader.files)
        for record in journal_lines[1:]:
            if not isinstance(record.get("inputs"), list) or not isinstance(record.get("counts"), dict):
                return valid_records  # a damaged line
            for fingerprint in record["inputs"]:
                file = next(remaining_files, None)
                if file is None or fingerprint is None or file.fingerprint != fingerprint:
                    return valid_records
            valid_records.append(record)
        return valid_records

    def _build_writer(self, tokenizer: Tokenizer) -> CorpusWriter:
        options = self.options
        removed = FilterChain(options.filter).build_zero_counts()
        if options.dedup:
            removed.add(f"dedup.{options.dedup}")
        return CorpusWriter(
            self.directory,
            dtype=select_token_dtype(tokenizer.vocab_size),
            shard_tokens=options.shard_tokens,
            dedup=options.dedup,
            threshold=options.dedup_threshold,
            removed=removed,
            has_prompts=options.prompt_key is not None,
        )

    def _write_chunks(self, writer: CorpusWriter) -> None:
        options = self.options
        spec = DocumentEncoderSpec(self.directory, options.heldout_fraction, options.filter, options.dedup, self.part)
        with closing(encode_in_order(self.reader.iter_chunks(), spec, options.workers)) as chunks:
            for chunk, resume_point in chunks:
                writer.add(chunk)
                new_bytes = writer.written_counts.bytes - self._resumed_bytes
                self.meter.update(self.reader.row_tracker.bytes_read, new_bytes, writer.written_counts.documents)
                if resume_point:
                    self.journal.append(
                        {"inputs": resume_point.inputs, "counts": resume_point.counts, "note": writer.sync()}
                    )

    def _build_tokenizer(self) -> Tokenizer:
        if self.options.tokenizer.startswith("bpe:"):
            self.meter.print_line(f"training {self.options.tokenizer} ...")
        return build_tokenizer(self.options.tokenizer, self.options.split_pattern, self._iter_training_texts)

    def _load_trained_tokenizer(self, journal_lines: list[dict[str, Any]]) -> Tokenizer | None:
        """Load the bpe:N tokenizer of an interrupted run if the options and the training files have not changed."""
        if (
            not self.options.tokenizer.startswith("bpe:")
            or not journal_lines
            or journal_lines[0].get("options") != self.corpus_options
        ):
            return None
        trained_on = journal_lines[0]["trained_on"]
        if None in trained_on or trained_on != [file.fingerprint for file in self.files[: len(trained_on)]]:
            return None
        try:
            tokenizer = Tokenizer.load(self.directory)
        except DataError:
            return None
        self._trained_on = dict(enumerate(trained_on))
        return tokenizer if tokenizer.sha256 == journal_lines[0]["tokenizer"] else None

    def _iter_training_texts(self) -> Iterator[str]:
        """Yield the first `bpe_train_bytes` of text that is not held out. All parts of a corpus read the same text."""
        remaining_bytes = self.options.bpe_train_bytes
        filters, removed = FilterChain(self.options.filter), RemovalCounts()
        row_tracker = RowTracker(self.options.max_bad_rate, skip_unreadable=self.options.skip_unreadable)
        for file_index, file in enumerate(self.files):
            self._trained_on[file_index] = file.fingerprint
            for document in file.iter_documents(row_tracker):
                filtered = filters(document.text, removed) if document.text else None
                text = (filtered or "").encode()
                if filtered is None or is_heldout(text, self.options.heldout_fraction):
                    continue
                if len(text) <= remaining_bytes:
                    yield filtered
                else:
                    yield text[:remaining_bytes].decode(errors="ignore")
                remaining_bytes -= len(text)
                if remaining_bytes <= 0:
                    return

    def _build_report(self, writer: CorpusWriter) -> PrepareReport:
        row_tracker, counts_textless = self.reader.row_tracker, self.part.counts_textless_rows
        bad_rows = row_tracker.bad_rows if counts_textless else 0
        empty_documents = self.reader.empty_documents if counts_textless else 0
        for path, (file_bytes, _) in row_tracker.unreadable.items():
            self.file_counts.mark_unreadable(Path(path), file_bytes)
        removed_documents = sum(removed.documents for removed in writer.removal_counts.values())
        return PrepareReport(
            options=self.corpus_options,
            rows=writer.written_counts.documents + removed_documents + bad_rows + empty_documents,
            bad_rows=bad_rows,
            empty_documents=empty_documents,
            kept=writer.written_counts,
            removed=writer.removal_counts,
            bad_bytes=row_tracker.bad_bytes if counts_textless else 0,
            inputs=self.file_counts,
            unreadable=row_tracker.unreadable,
            warnings=self.reader.list_warnings(reads_all_files=self.part.num_parts == 1),
        )

    def _format_no_text_error(self, manifest: CorpusManifest) -> str:
        removed = sum(counts.documents for counts in self.report.removed.values())
        return (
            f"--source {' '.join(self.options.source)}: no text to train on, in {self.report.rows:,} rows "
            f"({self.report.empty_documents:,} empty, {manifest.count_documents('heldout'):,} held out"
            f"{f', {removed:,} removed by rules' if removed else ''}). Give more text."
        )

    def print_summary(self, manifest: CorpusManifest) -> None:
        """Print the counts, the report, the warnings and the first skipped rows and files."""
        num_tokens, text_bytes, num_documents = (
            sum(count(split) for split in SPLITS)
            for count in (manifest.count_tokens, manifest.count_text_bytes, manifest.count_documents)
        )
        out = self.options.out / self.part.name if self.part.num_parts > 1 else self.options.out
        self.meter.print_line(
            f"prepared {out}: {num_documents:,} documents, {num_tokens:,} tokens of {manifest.vocab_size:,} ids, "
            f"{text_bytes / max(num_tokens, 1):.2f} bytes per token, "
            f"{sum(map(len, manifest.shards.values()))} shards, "
            f"{manifest.count_documents('heldout') / max(num_documents, 1):.2%} held out, "
            f"{manifest.bad_rows:,} bad rows, {self.report.empty_documents:,} empty, {self.meter.seconds:.1f} s, "
            f"{(text_bytes - self._resumed_bytes) / 1e6 / self.meter.seconds:.1f} MB/s"
        )
        warnings = [f"  warning: {warning}" for warning in self.report.warnings]
        skipped = [f"  skipped {description}" for description in self._list_skipped()]
        for line in (*self.report.format_lines(), *warnings, *skipped):
            self.meter.print_line(line)

    def _list_skipped(self) -> list[str]:
        """Describe the first rows and files that were skipped."""
        row_tracker = self.reader.row_tracker
        files = [f"{path}: {reason}" for path, (_, reason) in row_tracker.unreadable.items()]
        return [*row_tracker.locations, *files[:MAX_LOCATIONS]]
