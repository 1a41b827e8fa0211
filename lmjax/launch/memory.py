"""Settings of glibc's malloc for XLA's CPU backend: freed memory is kept, in huge pages.

XLA allocates its buffers anew at every step. By default glibc takes large ones from the system and
gives them back each time, page by page, which is up to a third of a small model's step; and the
weights that decoding reads for every token come a tenth slower from small pages.
"""

import builtins
import ctypes
import mmap
import os
import sys
from pathlib import Path

# Parameters of mallopt (malloc.h).
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD, ARENA_MAX = -1, -2, -3, -8
LARGEST_IN_HEAP = 256 << 20  # bytes; larger buffers are mapped one by one, as always
USUAL_TOP_PAD = 128 << 10  # bytes
MOST = (1 << 31) - 1  # mallopt takes a C int


def keep_memory() -> None:
    """Makes malloc keep what is freed, on a heap of huge pages (Linux with glibc only).

    The heap is extended once, by addresses that take no memory until they are written, so that one
    `madvise` covers them. Nothing is changed where GLIBC_TUNABLES is set, or in a notebook's
    kernel.
    """
    in_notebook = hasattr(builtins, "__IPYTHON__")
    if sys.platform != "linux" or "GLIBC_TUNABLES" in os.environ or in_notebook:
        return
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):  # another C library, such as musl
        return
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    library.mallopt(ARENA_MAX, 1)  # the other arenas hold no large buffers
    library.mallopt(MMAP_THRESHOLD, LARGEST_IN_HEAP)
    library.mallopt(TRIM_THRESHOLD, -1)  # never: the advice would be lost with the addresses
    library.mallopt(TOP_PAD, min(memory // 2, MOST))
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.restype, library.free.argtypes = None, [ctypes.c_void_p]
    library.free(library.malloc(LARGEST_IN_HEAP // 2))  # more than the heap has left: it grows
    library.mallopt(TOP_PAD, USUAL_TOP_PAD)
    _use_huge_pages(library)


def _use_huge_pages(library: ctypes.CDLL) -> None:
    """Advises the kernel to back the heap with huge pages, where it leaves that to programs."""
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for line in Path("/proc/self/maps").read_text("ascii", "replace").splitlines():
        if line.endswith("[heap]"):
            begin, end = (int(address, 16) for address in line.split()[0].split("-"))
            library.madvise(begin, end - begin, mmap.MADV_HUGEPAGE)
