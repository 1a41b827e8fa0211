"""A command's memory: how the C library of Linux is told to hold it."""

import builtins
import os
import sys

# Huge pages; buffers of up to 256 MiB stay in the process, and up to 1 GiB of freed memory with
# them. Only the main arena (of one heap) can hold buffers of that size.
KEEP_MEMORY = ":".join(
    f"glibc.malloc.{name}={value}"
    for name, value in {
        "hugetlb": 1,
        "mmap_threshold": 256 << 20,
        "trim_threshold": 1 << 30,
        "arena_max": 1,
    }.items()
)


def keep_memory() -> None:
    """Starts this very command again, once, with the C library told to hold memory (Linux only).

    XLA's CPU backend allocates its buffers anew at every step. glibc takes them from the system and
    gives them back each time, page by page, which is up to a third of a small model's step; and the
    weights that decoding reads for every token come a tenth slower from small pages. See
    `KEEP_MEMORY`; glibc reads it only when a process starts. Any GLIBC_TUNABLES of the user's own
    are left alone, and so is a notebook's kernel.
    """
    in_notebook = hasattr(builtins, "__IPYTHON__")
    if sys.platform != "linux" or "GLIBC_TUNABLES" in os.environ or in_notebook:
        return
    os.environ["GLIBC_TUNABLES"] = KEEP_MEMORY
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
