"""Group the documents of the input files into chunks, the unit of work that `prepare` sends to a tokenizing process.

A chunk may carry a resume point: the counts at the end of an input file. A resumed run continues at the last resume
point and does not read the input files before it again.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from dist_llm.text.inputs import Input
from dist_llm.text.rows import RowTracker, TextDocument
from dist_llm.text.tokenizer import ENDOFTEXT

SAVED_COUNTERS = ("empty_documents", "documents_of", "end_token_origin", "end_token_documents")  # keys of the journal
CHUNK_CHARS = 1 << 20  # minimum length of a chunk, except the last one
DOCUMENT_OVERHEAD_CHARS = 64  # added to the length of each document, to limit the number of tiny ones in a chunk
# The minimum number of characters between resume points, counted with the overhead of each document. A resume point
# syncs all files to the disk, which takes a tenth of the time of tokenizing this text.
RESUME_POINT_CHARS = 8 << 20


@dataclass(frozen=True)
class ResumePoint:
    """The fingerprints of the input files that were finished since the last resume point, and the counts so far."""

    inputs: list[list[str | int] | None]
    counts: dict[str, Any]


@dataclass(frozen=True)
class Chunk:
    """Non-empty documents. `resume_point` is set only if an input file ends with the last document."""

    texts: list[str] = field(default_factory=list)
    origins: list[str] = field(default_factory=list)  # `file:line` of each text
    resume_point: ResumePoint | None = None
    prompt_chars: list[int] = field(default_factory=list)  # length of the prompt at the start of each text


class ChunkReader:
    """Reads the input files in order, groups their documents into chunks, and counts rows and documents."""

    def __init__(self, files: Sequence[Input], row_tracker: RowTracker) -> None:
        self.files, self.row_tracker = files, row_tracker
        self.empty_documents = self.end_token_documents = 0
        self.end_token_origin = ""  # origin of the first document that contains the string <|endoftext|>
        self.documents_of: dict[str, int] = {}  # number of documents of each --source

    def iter_chunks(self) -> Iterator[Chunk]:
        """Yield the chunks in order. An input file that ends may add a resume point to the current chunk."""
        chunk, chunk_chars, chars_since_resume_point, fingerprints = Chunk(), 0, 0, []
        for file in self.files:
            fingerprint = file.fingerprint  # computed before the read, because the file may change during the read
            for document in file.iter_documents(self.row_tracker):
                self._count_document(document, file.spec)
                if not document.text:
                    self.empty_documents += 1
                    continue
                chunk.texts.append(document.text)
                chunk.origins.append(document.origin)
                chunk.prompt_chars.append(document.prompt_chars)
                document_chars = len(document.text) + DOCUMENT_OVERHEAD_CHARS
                chunk_chars += document_chars
                chars_since_resume_point += document_chars
                if chunk_chars >= CHUNK_CHARS:
                    yield chunk
                    chunk, chunk_chars = Chunk(), 0
            fingerprints.append(fingerprint)
            if chars_since_resume_point >= RESUME_POINT_CHARS:
                yield replace(chunk, resume_point=ResumePoint(fingerprints, self._copy_counts()))
                chunk, chunk_chars, chars_since_resume_point, fingerprints = Chunk(), 0, 0, []
        if chunk.texts:
            yield chunk

    def _count_document(self, document: TextDocument, spec: str) -> None:
        """Count the documents of each --source and those that contain <|endoftext|>, for `list_warnings`."""
        self.documents_of[spec] = self.documents_of.get(spec, 0) + 1
        if ENDOFTEXT in document.text:
            self.end_token_origin = self.end_token_origin or document.origin
            self.end_token_documents += 1

    def list_warnings(self, reads_all_files: bool) -> list[str]:
        """Return warnings about documents that may really be several documents.

        `reads_all_files` is False if this run prepares one of several parts of the corpus.
        """
        warnings = []
        if specs := [spec for spec, count in self.documents_of.items() if reads_all_files and count == 1]:
            warnings.append(
                f"--source {specs[0]} is a single document. If it is a text file that holds many, give --separator "
                "STRING, or --separator blank-lines"
            )
        if self.end_token_documents:
            warnings.append(
                f"{self.end_token_documents:,} documents contain {ENDOFTEXT}, such as {self.end_token_origin}: "
                f"it is encoded as text and ends no document. If it separates documents, give --separator '{ENDOFTEXT}'"
            )
        return warnings

    def _copy_counts(self) -> dict[str, Any]:
        """Return the counts so far, with the keys of the journal."""
        row_counts = asdict(self.row_tracker)
        del row_counts["max_bad_rate"], row_counts["part"], row_counts["skip_unreadable"]
        return {"tally": row_counts, **{name: getattr(self, name) for name in SAVED_COUNTERS}}

    def restore(self, num_files: int, counts: dict[str, Any]) -> None:
        """Continue after the first `num_files` files, with the counts of a resume point."""
        self.files = self.files[num_files:]
        for name in SAVED_COUNTERS:
            setattr(self, name, counts[name])
        for name, value in counts["tally"].items():
            setattr(self.row_tracker, name, value)
