"""Errors that a user can fix. Each message names the file or key, the rule and what to do.

The command line prints them without a traceback and exits with 2. Any other exception is a bug and keeps its traceback.
`to_user_error` converts the errors of the operating system that a user can fix.
"""

import errno


class UserError(Exception):
    """An error that the user can fix."""


class ConfigError(UserError):
    """A config file, an override or a parallel layout is invalid."""


class DataError(UserError):
    """A source, tokenizer or token shard is missing, malformed or does not match."""


class CheckpointError(UserError):
    """A checkpoint is missing, incomplete or of another model."""


class DivergedError(UserError):
    """A bad step ends the run, by the policy of section `guard`."""


HINT_SPACE = "free disk space, or set another directory"
HINT_PERMISSIONS = "change its permissions, or set another directory"
HINT_OPEN_FILES = "raise the limit of open files (ulimit -n)"
HINTS = {
    errno.ENOSPC: HINT_SPACE,
    errno.EDQUOT: HINT_SPACE,
    errno.EFBIG: HINT_SPACE,
    errno.EACCES: HINT_PERMISSIONS,
    errno.EPERM: HINT_PERMISSIONS,
    errno.EROFS: HINT_PERMISSIONS,
    errno.ENOTDIR: "there is a file where a directory should be: move it",
    errno.EISDIR: "there is a directory where a file should be: move it",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: HINT_OPEN_FILES,
    errno.ENFILE: HINT_OPEN_FILES,
}


def to_user_error(error: OSError, location: str = "") -> UserError | None:
    """Convert an error of the operating system; return None if it may be a bug.

    `location` is named if the error names no file, as a write error does not.
    """
    if error.errno not in HINTS:
        return None
    where = error.filename or location or "a file of this command"
    if isinstance(where, bytes):
        where = where.decode(errors="replace")
    return UserError(f"{where}: {error.strerror}; {HINTS[error.errno]}, and run the same command again")
