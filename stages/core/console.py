"""What a person sees while a stage works."""

import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import ClassVar, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

console = Console(stderr=True, highlight=False)
if not console.is_terminal:  # a log has room for a whole table
    console.width = 150


class Track:
    """A progress line: done of total, rate, time left, and a text with values to monitor.

    On a terminal it is a live bar; in a log it is one line every ``log_every`` seconds. It also
    shows the rate of ``image_steps``, the Langevin steps of single images, as one unit may take
    minutes.
    """

    log_every = 15.0
    running: ClassVar["Track | None"] = None

    def __init__(self, what: str, total: int, *, unit: str, done: int = 0) -> None:
        self.what, self.total, self.unit, self.done = what, total, unit, done
        self.first, self.started, self.logged = done, time.monotonic(), time.monotonic()
        self.image_steps, self.watch = 0, ""
        self.bar: Progress | None = None
        if console.is_terminal:
            columns = [
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[watch]}"),
            ]
            self.bar = Progress(*columns, console=console)
            self.task = self.bar.add_task(what, total=total, completed=done, rate="", watch="")

    def __enter__(self) -> Self:
        self.outer, Track.running = Track.running, self
        if self.bar is not None:
            self.bar.start()
        if self.done:
            console.print(f"{self.what}: resumed at {self.done} of {self.total} {self.unit}")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        Track.running = self.outer
        if self.bar is not None:
            self.bar.stop()

    def advance(self, count: int = 1, watch: str = "") -> None:
        """``count`` units more are done; ``watch`` is shown beside them."""
        self.done, self.watch = self.done + count, watch
        self.show()

    def show(self) -> None:
        """Bring the bar up to date; in a log, print a line if it is time for one."""
        now = time.monotonic()
        seconds = max(now - self.started, 1e-9)
        rate, steps = (self.done - self.first) / seconds, self.image_steps / seconds
        watch = self.watch + (f"  {steps:,.0f} image-steps/s" if steps else "")
        if self.bar is not None:
            shown = f"{rate:.3g} {self.unit}/s" if rate else ""
            self.bar.update(self.task, completed=self.done, rate=shown, watch=watch)
        elif now - self.logged >= self.log_every and self.done < self.total:
            self.logged = now
            left = f"{(self.total - self.done) / rate:.0f} s left" if rate else "time left unknown"
            print(
                f"{self.what}: {self.done}/{self.total} {self.unit}, {rate:.3g}/s, {left}  {watch}",
                file=sys.stderr,
                flush=True,
            )


verbose = False  # set by the command line


def detail(message: str) -> None:
    """One line for the person who asked for more (-v)."""
    if verbose:
        say(message)


@contextmanager
def said_warnings() -> Iterator[None]:
    """Warnings of the library as lines for the person at the terminal."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: say(f"warning: {message}")
        yield


def say(message: str) -> None:
    """One line for the person at the terminal."""
    console.print(message, soft_wrap=True, markup=False)
