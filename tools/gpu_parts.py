"""The processes that tools/gpu_check is made of, and the time that they have.

Owns: starting them, their output as it comes, their end when the time is over. Does not know: what
they do. Uses the standard library only.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TAIL = 4000  # characters of a failed process's output that are kept


class PartError(Exception):
    """A process failed, or ran out of time; the message is what it printed last."""


class Clock:
    """The time that all of it may take."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self.seconds = seconds

    @property
    def left(self) -> float:
        return self._end - time.monotonic()


class Processes:
    """Python processes of one environment, in `folder`."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._folder = folder
        self.environment = environment
        self._running: set[subprocess.Popen[str]] = set()
        self._stopped = False

    def run(
        self,
        *arguments: str | Path,
        seconds: float,
        tell: Callable[[dict[str, Any]], None] | None = None,
    ) -> str:
        """Run Python, and return what it prints; but lines that are JSON objects are handed to
        `tell` as they come. PartError where it fails, and after so many seconds."""
        if self._stopped:
            raise PartError("stopped")
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(
                [sys.executable, "-P", *arguments],
                cwd=self._folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,  # its own children end with it
            )
            self._running.add(process)
            timer = threading.Timer(max(seconds, 0), kill, [process])
            timer.start()
            try:
                output = read(process, tell)
            finally:
                in_time = timer.is_alive()
                timer.cancel()
                kill(process)  # where reading was interrupted
                self._running.discard(process)
            if process.returncode:
                errors.seek(0)
                text = output + errors.read()
                raise PartError(text[-TAIL:] + self._end(in_time, process.returncode, seconds))
        return output

    def _end(self, in_time: bool, status: int, seconds: float) -> str:
        if self._stopped:
            return "\nstopped"
        if not in_time:
            return f"\nstopped after {seconds:.0f} s: no time was left"
        return f"\nended by signal {-status}" if status < 0 else ""

    def stop(self) -> None:
        """End all of them, and start no more."""
        self._stopped = True
        for process in list(self._running):
            kill(process)


def read(process: subprocess.Popen[str], tell: Callable[[dict[str, Any]], None] | None) -> str:
    """What it prints, until it ends."""
    lines = []
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            if tell and line.startswith("{"):
                tell(json.loads(line))
            else:
                lines.append(line)
    process.wait()
    return "".join(lines)


def kill(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
