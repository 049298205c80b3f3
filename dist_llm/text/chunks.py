"""Group documents into large chunks, with a resume point at the end of input files.

A resumed run does not read the input files before the last resume point again.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dist_llm.text.input_files import InputFile
from dist_llm.text.rows import Document, Tally
from dist_llm.text.tokenizer import ENDOFTEXT

COUNTS = ("empty_documents", "documents_of", "end_token_origin", "end_token_documents")
CHUNK_CHARS = 1 << 20
DOCUMENT_OVERHEAD_CHARS = 64  # limits the number of objects in a chunk of tiny documents
# A resume point syncs all files to the disk, which takes a tenth of the time of tokenizing this text. Smaller input
# files share a resume point with their neighbours.
RESUME_POINT_CHARS = 8 << 20


@dataclass(frozen=True)
class ResumePoint:
    """The fingerprints of the input files that were finished since the last resume point, and the counts so far."""

    inputs: list[list[str | int] | None]
    counts: dict[str, Any]


@dataclass(frozen=True)
class Chunk:
    """Non-empty texts, the `file:line` of each and the length of its prompt. A resume point if an input file ends with
    the last text."""

    texts: list[str] = field(default_factory=list)
    origins: list[str] = field(default_factory=list)
    resume_point: ResumePoint | None = None
    prompts: list[int] = field(default_factory=list)  # characters


class ChunkReader:
    """Reads input files one after the other."""

    def __init__(self, files: Sequence[InputFile], tally: Tally) -> None:
        self.files, self.tally = files, tally
        self.empty_documents = self.end_token_documents = 0
        self.end_token_origin = ""  # of the first document that contains the text of the end token
        self.documents_of: dict[str, int] = {}  # by --source

    def iter_chunks(self) -> Iterator[Chunk]:
        chunk, chars, unmarked, inputs = Chunk(), 0, 0, []
        for file in self.files:
            fingerprint = file.fingerprint  # computed before the read, because a file may change meanwhile
            for document in file.iter_documents(self.tally):
                self._count_document(document, file.spec)
                if not document.text:
                    self.empty_documents += 1
                    continue
                chunk.texts.append(document.text)
                chunk.origins.append(document.origin)
                chunk.prompts.append(document.prompt_chars)
                size = len(document.text) + DOCUMENT_OVERHEAD_CHARS
                chars, unmarked = chars + size, unmarked + size
                if chars >= CHUNK_CHARS:
                    yield chunk
                    chunk, chars = Chunk(), 0
            inputs.append(fingerprint)
            if unmarked >= RESUME_POINT_CHARS:
                yield Chunk(chunk.texts, chunk.origins, ResumePoint(inputs, self._copy_counts()), chunk.prompts)
                chunk, chars, unmarked, inputs = Chunk(), 0, 0, []
        if chunk.texts:
            yield chunk

    def _count_document(self, document: Document, spec: str) -> None:
        """Count signs that a document is several documents: documents per --source, and end tokens in texts."""
        self.documents_of[spec] = self.documents_of.get(spec, 0) + 1
        if ENDOFTEXT in document.text:
            self.end_token_origin = self.end_token_origin or document.origin
            self.end_token_documents += 1

    def list_warnings(self, reads_all_files: bool) -> list[str]:
        """Return warnings about documents that may be several. `reads_all_files`: this run is not one of the parts."""
        warnings = []
        if single := [spec for spec, count in self.documents_of.items() if reads_all_files and count == 1]:
            warnings.append(
                f"--source {single[0]} is a single document. If it is a text file that holds many, give --separator "
                "STRING, or --separator blank-lines"
            )
        if self.end_token_documents:
            warnings.append(
                f"{self.end_token_documents:,} documents contain {ENDOFTEXT}, such as {self.end_token_origin}: "
                f"it is encoded as text and ends no document. If it separates documents, give --separator '{ENDOFTEXT}'"
            )
        return warnings

    def _copy_counts(self) -> dict[str, Any]:
        tally = asdict(self.tally)
        del tally["max_bad_rate"], tally["part"], tally["skip_unreadable"]
        return {"tally": tally, **{name: getattr(self, name) for name in COUNTS}}

    def restore(self, num_files: int, counts: dict[str, Any]) -> None:
        """Continue after the first `num_files` files, with the counts of a resume point."""
        self.files = self.files[num_files:]
        for name in COUNTS:
            setattr(self, name, counts[name])
        for name, value in counts["tally"].items():
            setattr(self.tally, name, value)
