"""What can be wrong with a user's input. Each message names the place, the rule, and the way out.

The command line prints these without a traceback and exits with 2; anything else is our own
mistake and keeps its traceback.
"""


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
