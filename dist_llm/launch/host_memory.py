"""Choose what glibc does with the host memory that a process frees."""

import ctypes

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -3, -4, -8  # options of mallopt, from malloc.h


def keep_freed_memory() -> None:
    """Reuse freed memory instead of returning it to the system, as a training run on a CPU needs.

    By default glibc maps each large tensor anew, and the kernel zeroes its pages, which takes 10% of a step or more.
    All threads share one heap, so that backward, which runs in its own thread, reuses the memory of forward.
    """
    _set_options({ARENA_MAX: 1, MMAP_MAX: 0, TRIM_THRESHOLD: 2**31 - 1})


def return_freed_memory() -> None:
    """Return the memory of each freed tensor to the system at once, as a conversion of a large model needs.

    By default glibc keeps freed blocks of up to 32 MB. While blocks of different sizes are read one after the other,
    this adds up to hundreds of megabytes.
    """
    _set_options({MMAP_THRESHOLD: 1 << 20})


def _set_options(options: dict[int, int]) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc only
    if mallopt is not None:
        for option, value in options.items():
            mallopt(option, value)
