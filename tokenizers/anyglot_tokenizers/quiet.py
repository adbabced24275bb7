"""Lightning without its notes on hardware, workers and log folders, and without an end of its own for Ctrl-C.

Warnings of substance still come through.
"""

from __future__ import annotations

import logging
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """Without Lightning's notes on hardware, workers and log folders."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for message in (
                ".*does not have many workers.*",
                ".*resuming from a checkpoint.*",
                ".*Experiment logs directory.*",
                ".*LeafSpec.*",
                ".*in eval mode at the start of training.*",  # averaged weights, teachers
            ):
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def interruptible() -> Iterator[None]:
    """A KeyboardInterrupt inside comes out as one, also where Lightning makes a SystemExit of it."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as end:
        if not isinstance(end.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, handler)  # Lightning left it ignored
        raise KeyboardInterrupt from end
