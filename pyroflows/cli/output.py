"""What a command says: results on stdout, notes on stderr, one object with ``--json``."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json as js
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from pyroflows.training.history import History
from pyroflows.training.interruption import WORDS
from pyroflows.training.loop import DivergedError

Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, and nothing else.")]
EXPECTED = (ValueError, OSError, ImportError, MemoryError, DivergedError)


def note(text: str) -> None:
    """A line on stderr about what is going on."""
    typer.echo(_printable(text), err=True)


def _printable(text: str) -> str:
    """Text that any stream takes: file names and saved words may hold halves of characters."""
    return text.encode("utf-8", "backslashreplace").decode()


def result(facts: dict[str, Any], lines: list[str], json: bool) -> None:
    """What came out, as lines for people or as one object for machines.

    Args:
        facts: for machines.
        lines: for people.
        json: which of both.
    """
    text = js.dumps(_plain(facts), ensure_ascii=False) if json else "\n".join(lines)
    typer.echo(_printable(text))


def end_as(history: History) -> None:
    """End the command with the exit code of the signal that a training was stopped by, if any.

    Args:
        history: of the training.
    """
    for number, word in WORDS.items():
        if history.stopped == word:
            raise typer.Exit(128 + number)


def _plain(value: Any) -> Any:
    """JSON has no word for NaN and infinity: null."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def on_terminal(json: bool) -> bool:
    """Whether a person watches the command: it writes lines, to a terminal."""
    return not json and sys.stderr.isatty()


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Errors become one line and exit code 2; warnings become notes.

    A function whose one argument is a dataclass becomes a command with its fields as options.
    """
    parameters = list(inspect.signature(function, eval_str=True).parameters.values())
    options = parameters[0].annotation
    gathered = len(parameters) == 1 and dataclasses.is_dataclass(options)

    @functools.wraps(function)
    def run(**kwargs: Any) -> None:
        try:
            with _notes():
                if gathered:
                    function(options(**kwargs))
                else:
                    function(**kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except KeyboardInterrupt:
            note("stopped")
            raise typer.Exit(130) from None
        except BrokenPipeError:  # the reader, say head, has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except EXPECTED as error:
            _fail(str(error) or type(error).__name__, kwargs)
        except Exception as error:
            if os.environ.get("PYROFLOWS_TRACEBACK"):
                raise
            _fail(
                f"unexpected {type(error).__name__}: {error} (PYROFLOWS_TRACEBACK=1 shows where)",
                kwargs,
            )

    if gathered:
        run.__signature__ = inspect.signature(options, eval_str=True)  # type: ignore[attr-defined]
    # Help keeps the line breaks of a docstring: only those between paragraphs are meant.
    paragraphs = (function.__doc__ or "").split("\n\n")
    run.__doc__ = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
    return run


def _fail(text: str, kwargs: dict[str, Any]) -> None:
    text = " ".join(text.split())
    text = text if len(text) <= 1000 else text[:997] + "..."
    if kwargs.get("json"):
        typer.echo(js.dumps({"error": _printable(text)}, ensure_ascii=False))
    else:
        note(f"error: {text}")
    raise typer.Exit(2)


@contextmanager
def _notes() -> Iterator[None]:
    """Warnings meant for users as notes, and none of a library's to its programmers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("default", UserWarning)

        def show(message: Any, *_: Any, **__: Any) -> None:
            note("note: " + " ".join(str(message).split()))

        warnings.showwarning = show
        yield
