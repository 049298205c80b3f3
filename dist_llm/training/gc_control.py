"""Run Python's cyclic garbage collector only between steps.

A collection within a step stalls one rank, and all other ranks wait for that rank.
"""

import gc
from types import TracebackType


class GCControl:
    """While open, automatic collection is off, and objects that already existed are exempt from collection.

    On exit, also after an exception, the collector has its previous state.
    """

    def __enter__(self) -> "GCControl":
        self.was_enabled = gc.isenabled()
        gc.disable()
        gc.collect()
        gc.freeze()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        gc.unfreeze()
        if self.was_enabled:
            gc.enable()

    def collect(self, full: bool = False) -> None:
        """Collect garbage between steps. Without `full`, collect only the two young generations, which is fast."""
        gc.collect(2 if full else 1)
