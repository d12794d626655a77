"""Ctrl-C and SIGTERM while training: heeded between two steps, so that none is half done."""

from __future__ import annotations

import signal
import threading
from typing import Any

WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


class Interruption:
    """A context in which these signals are noted, for whoever trains to end after the step at hand.

    A second one raises ``KeyboardInterrupt`` at once. In other threads than the main one, and where
    the process has a handler of its own for a signal, that is as it was.

    Attributes:
        word: ``"interrupted"`` or ``"terminated"``, as soon as a signal has come.

    Example:
        >>> with Interruption() as stop:
        ...     signal.raise_signal(signal.SIGTERM)
        ...     stop.word
        'terminated'
    """

    def __init__(self) -> None:
        self.word = ""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
        if threading.current_thread() is threading.main_thread():
            for number, handler in usual.items():
                if signal.getsignal(number) == handler:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._note:
                signal.signal(number, handler)

    def _note(self, number: int, _frame: Any) -> None:
        if self.word:
            raise KeyboardInterrupt
        self.word = WORDS[signal.Signals(number)]
