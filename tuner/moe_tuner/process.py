"""What the tuner's process does on one machine and in a cluster alike: end on a signal, say why it cannot begin."""

from __future__ import annotations

import asyncio
import errno
import signal


def told_to_stop() -> asyncio.Event:
    """Set by a signal from now on."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    return stop


def why(error: OSError, port: int) -> str:
    return f"port {port} is in use" if error.errno == errno.EADDRINUSE else str(error)
