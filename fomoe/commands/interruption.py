"""Ctrl-C and SIGTERM while an engine works.

Owns: the two signals' handlers. Does not know: what is interrupted.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any, TypeVar

R = TypeVar("R")

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """While it is entered, the first signal ends what runs under `unless`, in good order; a second
    one ends the process at once. `status` is the exit status to give, 0 without a signal.
    """

    def __init__(self) -> None:
        self.status = 0
        self._asked = asyncio.Event()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            self._before[number] = signal.getsignal(number)
            loop.add_signal_handler(number, self._ask, number)
        return self

    def __exit__(self, *_: object) -> None:
        self._leave_to(self._before)

    def _ask(self, number: signal.Signals) -> None:
        self.status = 128 + number
        self._asked.set()
        self._leave_to(dict.fromkeys(_SIGNALS, signal.SIG_DFL))

    def _leave_to(self, handlers: dict[signal.Signals, Any]) -> None:
        for number in _SIGNALS:
            asyncio.get_running_loop().remove_signal_handler(number)
            signal.signal(number, handlers[number])

    async def unless(self, work: Coroutine[Any, Any, R]) -> R | None:
        """The result of `work`, or None when a signal came first; `work` has ended in any case."""
        task = asyncio.ensure_future(work)
        asked = asyncio.ensure_future(self._asked.wait())
        try:
            await asyncio.wait([task, asked], return_when=asyncio.FIRST_COMPLETED)
        finally:
            asked.cancel()
            if not task.done():
                task.cancel()
                await asyncio.wait([task])
        return None if task.cancelled() else task.result()
