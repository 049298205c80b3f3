"""Run Python's cyclic garbage collector between steps only: within a step it stalls one rank, and all others wait."""

import gc
from types import TracebackType


class GCControl:
    """While open, automatic collection is off, and objects that existed before are exempt from collection.

    On exit the collector has its previous state, also after an exception.
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
        """Collect while all ranks are between steps. Without `full`, only the two young generations, which is fast."""
        gc.collect(2 if full else 1)
