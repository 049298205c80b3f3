"""What can be wrong with a user's input. Each message names the place, the rule, and the way out.

The command line prints these without a traceback and exits with 2; anything else is our own
mistake and keeps its traceback. `user_error_of` finds user errors among those of the operating system.
"""

import errno


class UserError(Exception):
    """Something the user can mend."""


class ConfigError(UserError):
    """A config file, an override or a layout that cannot work."""


class DataError(UserError):
    """A source, tokenizer or token shard that is missing, malformed or does not match."""


class CheckpointError(UserError):
    """A checkpoint that is missing, incomplete or belongs to another model."""


class DivergedError(UserError):
    """A bad step, by the policy of the section `guard`."""


HINT_SPACE = "make room there, or set another directory"
HINT_PERMISSIONS = "change its permissions, or set another directory"
HINT_OPEN_FILES = "raise the limit of open files (ulimit -n)"
HINTS = {
    errno.ENOSPC: HINT_SPACE,
    errno.EDQUOT: HINT_SPACE,
    errno.EFBIG: HINT_SPACE,
    errno.EACCES: HINT_PERMISSIONS,
    errno.EPERM: HINT_PERMISSIONS,
    errno.EROFS: HINT_PERMISSIONS,
    errno.ENOTDIR: "a file stands where a directory should be: move it away",
    errno.EISDIR: "a directory stands where a file should be: move it away",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: HINT_OPEN_FILES,
    errno.ENFILE: HINT_OPEN_FILES,
}


def to_user_error(error: OSError, location: str = "") -> UserError | None:
    """What the user can do about an error of the operating system; None where it may be our mistake.

    `place` is named where the error names no file, as that of a write does not.
    """
    if error.errno not in HINTS:
        return None
    where = error.filename or location or "a file of this command"
    if isinstance(where, bytes):
        where = where.decode(errors="replace")
    return UserError(f"{where}: {error.strerror}; {HINTS[error.errno]}, and start the same command again")
