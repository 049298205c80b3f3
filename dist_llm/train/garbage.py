"""Python's cyclic collector out of the way: it would stop one rank within a step, and all others wait for it."""

import gc
from types import TracebackType


class Garbage:
    """Within it nothing is collected but when asked; what is there at its beginning is not looked at again.

    At its end the collector is as it was before, whatever the end.
    """

    def __enter__(self) -> "Garbage":
        self.enabled = gc.isenabled()
        gc.disable()
        gc.collect()
        gc.freeze()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        gc.unfreeze()
        if self.enabled:
            gc.enable()

    def collect(self, everything: bool = False) -> None:
        """Where all ranks stand anyway. Not `everything`: what has come since the last time, and that is quick."""
        gc.collect(2 if everything else 1)
