"""Select the files of a folder to read: by name, by --include and --exclude, and by whether they are readable.

Each file below the folder is counted in an `InputTable` as read or skipped, with the reason. An unreadable file or
folder raises DataError, unless the user allows to skip it.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from dist_llm.errors import DataError
from dist_llm.text.compression import CODECS
from dist_llm.text.report import InputTable

# Suffixes of files with rows. Text files beside such files are not part of the corpus.
ROW_SUFFIXES = {".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv", ".arrow"}
UNSUPPORTED_COMPRESSION = {
    ".lz4",
    ".lzma",
    ".br",
    ".7z",
    ".zip",
    ".rar",
    ".tar",
    ".tgz",
    ".tbz",
    ".tbz2",
    ".txz",
    ".z",
    ".lzo",
    ".sz",
}
CHECKSUMS = ("*.md5", "*.sha1", "*.sha256", "*.sha512", "*.crc32", "*.asc", "*.sig", "md5sums*", "sha*sums*")
BACKUPS = ("*~", "#*#", "*.bak", "*.orig", "*.rej", "*.swp", "*.swo", "*.tmp", "*.partial")
ABOUT_FILES = ("readme", "readme.*", "license", "license.*", "licence", "licence.*", "citation.*", "changelog.*")
SKIPPED_FOLDERS = frozenset({"__pycache__"})
MAX_LISTED = 5


@dataclass(frozen=True)
class FileRules:
    """The globs of files to read. They match a file's name, or its path below the folder; `*` also matches `/`."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    skip_unreadable: bool = False


def get_data_suffix(path: Path) -> str:
    """Return the suffix that selects the reader: the one before that of a compression, in lower case."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in CODECS else suffix


def find_read_problem(path: Path) -> str | None:
    """Return why a file cannot be read, judging by its name and directory entry; None if nothing is wrong."""
    if not path.exists():
        return "a broken link" if path.is_symlink() else "missing"
    if not path.is_file():
        return "not a regular file"
    if not os.access(path, os.R_OK):
        return "no permission"
    if path.suffix.lower() in UNSUPPORTED_COMPRESSION:
        return f"compressed as {path.suffix}, which is not supported (only {', '.join(sorted(CODECS))})"
    return None


class FolderWalk:
    """The files of one run's sources, and the globs that matched any of them."""

    def __init__(self, rules: FileRules, table: InputTable) -> None:
        self.rules, self.table = rules, table
        self._unreadable: list[str] = []
        self._used: set[str] = set()

    def check_file(self, path: Path) -> list[Path]:
        """Check a file that the user names, whatever the globs are. Return it if it is readable."""
        return [path] if self._count_readable(path) else []

    def walk_folder(self, root: Path, left_out: Iterable[str] = ()) -> list[Path]:
        """Return the files below `root`, sorted by relative path."""
        skipped, files = SKIPPED_FOLDERS | set(left_out), []
        for path in sorted(self._iter_files(root, skipped), key=lambda each: each.relative_to(root).as_posix()):
            relative = path.relative_to(root).as_posix()
            if self._matches(relative, self.rules.exclude):
                self._skip("--exclude", path)
            elif self.rules.include and not self._matches(relative, self.rules.include):
                self._skip("not in --include", path)
            else:
                files.append(path)
        texts = {
            get_data_suffix(path) for path in files if not _matches_name(path, (*ABOUT_FILES, *CHECKSUMS, *BACKUPS))
        }
        return [path for path in files if self._is_text(path, texts) and self._count_readable(path)]

    def check(self) -> None:
        """Raise DataError if a file is unreadable, or a glob matched nothing."""
        if self._unreadable and not self.rules.skip_unreadable:
            more = f"\n  and {len(self._unreadable) - MAX_LISTED} more" if len(self._unreadable) > MAX_LISTED else ""
            raise DataError(
                f"{len(self._unreadable)} files or folders of --source cannot be read:\n  "
                + "\n  ".join(self._unreadable[:MAX_LISTED])
                + f"{more}\nFix them, leave them out with --exclude, or skip them with --skip-unreadable."
            )
        for option, globs in (("--include", self.rules.include), ("--exclude", self.rules.exclude)):
            if unused := [each for each in globs if each not in self._used]:
                raise DataError(
                    f"{option} {unused[0]}: matches no file in the folders of --source. Quote it, so that the shell "
                    "does not expand it; it is compared with names and with paths below the folder."
                )

    def _iter_files(self, root: Path, skipped: frozenset[str] | set[str]) -> Iterator[Path]:
        """Yield all files below `root`. A linked folder is skipped if it is read under another path."""
        top, folders, entered = os.path.realpath(root), [root], set()
        while folders:
            folder = folders.pop()
            real = os.path.realpath(folder)
            if real in entered:
                self._skip("folder read already", folder)
                continue
            entered.add(real)
            try:
                entries = sorted(os.scandir(folder), key=lambda entry: entry.name, reverse=True)
            except OSError as error:
                self._record_unreadable(folder, error.strerror or str(error))
                continue
            for entry in entries:
                path = Path(folder, entry.name)
                if entry.name.startswith("."):
                    self._skip("hidden", path)
                elif not os.path.isdir(path):
                    yield path
                elif entry.name in skipped:
                    self._skip("never read", path)
                elif entry.is_symlink() and _are_nested(os.path.realpath(path), top):
                    self._skip("folder read already", path)
                else:
                    folders.append(path)

    def _matches(self, relative: str, globs: Sequence[str]) -> bool:
        name = relative.rpartition("/")[2]
        matches = [each for each in globs if fnmatchcase(name, each) or fnmatchcase(relative, each)]
        self._used.update(matches)
        return bool(matches)

    def _is_text(self, path: Path, texts: set[str]) -> bool:
        """Return whether a file may be text, judging by its name. Files that --include matches are always read.

        `texts` are the suffixes of the other files. A README is read only beside files of its own kind.
        """
        if self.rules.include:
            return True
        beside = bool(texts) and (get_data_suffix(path) not in texts or bool(texts & ROW_SUFFIXES))
        kinds = (
            ("checksum", CHECKSUMS, True),
            ("editor backup", BACKUPS, True),
            ("about the data", ABOUT_FILES, beside),
        )
        for reason, globs, applies in kinds:
            if applies and _matches_name(path, globs):
                self._skip(reason, path)
                return False
        return True

    def _count_readable(self, path: Path) -> bool:
        if reason := find_read_problem(path):
            self._record_unreadable(path, reason)
            return False
        self.table.add("read", path, _get_size(path))
        return True

    def _record_unreadable(self, path: Path, reason: str) -> None:
        self._unreadable.append(f"{path}: {reason}")
        self._skip("unreadable", path)

    def _skip(self, reason: str, path: Path) -> None:
        self.table.add(f"skipped: {reason}", path, _get_size(path))


def _matches_name(path: Path, globs: Sequence[str]) -> bool:
    return any(fnmatchcase(path.name.lower(), each) for each in globs)


def _are_nested(one: str, other: str) -> bool:
    """Return whether two folders are equal or one contains the other."""
    return f"{one}/".startswith(f"{other}/") or f"{other}/".startswith(f"{one}/")


def _get_size(path: Path) -> int:
    """Return the bytes of a file; 0 for a folder and for a missing file."""
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:
        return 0
