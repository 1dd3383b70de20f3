"""Python's garbage collector in a process of our own: a command, a worker, an app of Flower's.

torch and transformers make 700,000 objects while they load, which live as long as the process. The
collector walks them again and again on the way (a quarter of the time of loading) and once more at
the end (a second), and finds nothing. Here it looks rarely until all is loaded, and never again at
what is there then.

A process that is somebody else's, a notebook or a test, is left as it is.
"""

from __future__ import annotations

import atexit
import gc

__all__ = ["loaded", "loading"]

RARELY = (100_000, 50, 1000)
_usual: list[tuple[int, int, int]] = []  # the thresholds to go back to, between the two calls
_begun: list[bool] = []  # a process loads once, however many messages it answers


def loading() -> None:
    """This process is ours, and is about to load; only the first call means anything."""
    if not _begun:
        _begun.append(True)
        _usual.append(gc.get_threshold())
        gc.set_threshold(*RARELY)
        atexit.register(gc.freeze)


def loaded() -> None:
    """What is here stays; from now on the collector works as usual. Nothing without ``loading``."""
    if _usual:
        gc.freeze()
        gc.set_threshold(*_usual.pop())
