"""Errors that the user can fix. Each message names the file or config key, the problem and what to change.

The command line prints a UserError without a traceback and exits with code 2. Any other exception is a bug and keeps
its traceback. `to_user_error` converts errors of the operating system, such as a full disk.
"""

import errno


class UserError(Exception):
    """An error that the user can fix."""


class ConfigError(UserError):
    """A config file, an override or a parallel layout is invalid."""


class DataError(UserError):
    """A data source, tokenizer or token shard is missing, malformed or does not match the config."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged or of another model."""


class DivergedError(UserError):
    """An anomaly, such as a loss that is not finite, ends the run, as section `guard` of the config says."""


HINT_SPACE = "free disk space, or set another directory"
HINT_PERMISSIONS = "change its permissions, or set another directory"
HINT_OPEN_FILES = "raise the limit of open files (ulimit -n)"
# Error number -> what the user can do.
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
    """Convert an error of the operating system to a UserError. Return None if the error may be a bug.

    The message names `location` if the error itself names no file, as in a failed write.
    """
    if error.errno not in HINTS:
        return None
    path = error.filename or location or "a file of this command"
    if isinstance(path, bytes):
        path = path.decode(errors="replace")
    return UserError(f"{path}: {error.strerror}; {HINTS[error.errno]}, and run the same command again")
