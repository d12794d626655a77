"""How far a training is: a bar on a terminal; in a log file or a notebook, a line now and then."""

from __future__ import annotations

import sys
import time
from typing import Any

EVERY = 10.0  # seconds from one line to the next


class Progress:
    """Shows on stderr how far something is, until it is closed.

    On a terminal ``tqdm`` draws a bar. Where there is none, a bar's carriage returns would fill a
    log: there a line is written every ten seconds, and one at the end.

    Args:
        label: what is under way.
        unit: what is counted, ``"epoch"`` or ``"step"``.
        total: how many at most.
        done: how many already.
        show: whether to show anything.
    """

    def __init__(self, label: str, unit: str, total: int, done: int = 0, show: bool = True) -> None:
        self.label, self.unit, self.total, self.done = label, unit, total, done
        self.show = show and sys.stderr is not None
        self._facts: dict[str, str] = {}
        self._start = self._last = time.monotonic()
        self._reported = done
        self._bar: Any = None
        if self.show and sys.stderr.isatty():
            from tqdm.auto import tqdm

            self._bar = tqdm(desc=label, unit=unit, total=total, initial=done)

    def tell(self, **facts: str) -> None:
        """Show these beside the count from now on.

        Args:
            **facts: names and what to say of each.
        """
        self._facts = facts
        if self._bar is not None:
            self._bar.set_postfix(facts, refresh=False)

    def update(self, count: int = 1) -> None:
        """So many more are done."""
        if not count:
            return
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
        elif self.show and time.monotonic() - self._last >= EVERY:
            self._line()

    def say(self, text: str) -> None:
        """A line of its own.

        Args:
            text: the line.
        """
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        elif self.show:
            sys.stderr.write(text + "\n")
            sys.stderr.flush()

    def close(self) -> None:
        """The end: the bar is left as it is, or a last line written."""
        if self._bar is not None:
            self._bar.close()
        elif self._reported < self.done:
            self._line()

    def _line(self) -> None:
        self._last, self._reported = time.monotonic(), self.done
        count = f"{self.unit} {self.done} of {self.total}"
        facts = [f"{name} {value}" for name, value in self._facts.items()]
        seconds = f"{self._last - self._start:.0f} s"
        self.say(f"{self.label}: {', '.join([count, *facts, seconds])}")
