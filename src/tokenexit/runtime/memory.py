"""Memory settings: large buffers that the process keeps when they are freed."""

from __future__ import annotations

import ctypes
import os
import platform

# glibc's names for mallopt(3)
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
KEPT_BYTES = 2**30
"""Freed buffers up to this size stay with the process."""


def keep_buffers() -> bool:
    """Let this process keep large buffers that it frees, instead of giving each back to the system; True if it will.

    Activations are freed and asked for again in every layer. By default glibc maps each anew, and the system fills it
    with zeros: a seventh of a ViT-Small's time at 512x512 in bf16. The process keeps up to 1 GiB of what it once held.
    The command line calls this at its start; programs of your own may, before their first large tensor. Does nothing
    where the C library is another, or where the environment has its own settings (`MALLOC_TRIM_THRESHOLD_` and others).
    """
    if platform.libc_ver()[0] != "glibc" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((_M_MMAP_THRESHOLD, KEPT_BYTES), (_M_TRIM_THRESHOLD, KEPT_BYTES), (_M_TOP_PAD, 2**26))
    return all(mallopt(name, value) == 1 for name, value in settings)
