"""Work in progress, kept outside DVC's outs (DVC deletes outs before a run) and safe to kill."""

import fcntl
import hashlib
import json
import os
import shutil
import signal
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from stages import StageError


class Stopped(Exception):  # noqa: N818 - a request, not an error
    """The user or the system asked the stage to stop; what was done is kept."""


class Scratch:
    """A folder for one stage's unfinished work, keyed by all that determines its result.

    ``key`` holds the resolved parameters, ``inputs`` the files read; the source of `defense` is
    part of it too. Inside the ``with`` block Ctrl-C and SIGTERM only set ``stopping``: a loop
    calls `check` where its state is saved. `done` removes the folder once the out is written.
    """

    def __init__(self, name: str, key: object, inputs: list[Path]) -> None:
        digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode())
        sources = sorted((Path(__file__).parent.parent / "defense").glob("*.py"))
        for path in [*inputs, *sources]:
            digest.update(path.read_bytes())
        self.fingerprint = digest.hexdigest()[:12]
        root = Path(os.environ.get("DVC_ROOT", "."))
        self.folder = root / ".scratch" / f"{name}-{self.fingerprint}"
        self.stopping = False

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StageError(f"{self.folder}: another process is at this very work") from None
        self._handlers = {
            number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.stopping:  # asked twice: do not wait for the next safe point
            raise KeyboardInterrupt
        self.stopping = True

    def check(self) -> None:
        """Leave the stage if a stop was asked for; call it with everything saved."""
        if self.stopping:
            raise Stopped

    def done(self) -> None:
        """The result is written: forget the work in progress."""
        shutil.rmtree(self.folder)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._lock.close()


class Stopwatch:
    """Says when the next checkpoint is due."""

    def __init__(self, every: float = 60.0) -> None:
        self.every, self.last = every, time.monotonic()

    def due(self) -> bool:
        """True once in every ``every`` seconds."""
        now = time.monotonic()
        if now - self.last < self.every:
            return False
        self.last = now
        return True
