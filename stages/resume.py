"""Work in progress, kept outside DVC's outs (DVC deletes outs before a run) and safe to kill."""

import fcntl
import hashlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from torch import Tensor

from stages import StageError, Stopped
from stages.artifacts import load_tensors, save_tensors
from stages.console import say
from stages.files import require
from stages.hardware import Hardware
from stages.params import Params


class Scratch:
    """A folder for one stage's unfinished work, keyed by all that determines its result.

    That is ``key`` of the parameters, the files read, the machine's settings and the source of both
    packages; ``afresh`` forgets what an earlier run has left.

    Inside the ``with`` block a first Ctrl-C or SIGTERM only sets ``stopping``: a loop
    calls `check` where its state is saved. `done` removes the folder once the out is written.
    """

    def __init__(
        self,
        name: str,
        params: Params,
        key: Callable[[Params], object],
        inputs: list[Path],
        hardware: Hardware,
        *,
        afresh: bool = False,
    ) -> None:
        self.afresh = afresh
        self.params, self.key = params, key
        about = (repr(key(params)), hardware.conditions())
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
        root = Path(__file__).parent.parent
        sources = [p for package in ("defense", "stages") for p in (root / package).glob("*.py")]
        for path in [*inputs, *sorted(sources)]:
            require(path)
            digest.update(path.read_bytes())
        scratch = Path(os.environ.get("DVC_ROOT", ".")) / ".scratch"
        self.folder = scratch / f"{name}-{digest.hexdigest()[:12]}"
        self.stopping = False

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = self.folder.with_suffix(".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StageError(f"{self.folder}: another process is at this very work") from None
        if self.afresh:
            shutil.rmtree(self.folder)
            self.folder.mkdir()
        self._handlers = {
            number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.stopping:  # asked twice: do not wait for the next safe point
            raise KeyboardInterrupt
        self.stopping = True
        say("stopping where it is safe; once more to stop now")

    def check(self) -> None:
        """Leave the stage if a stop was asked for; call it with everything saved."""
        if self.stopping:
            raise Stopped

    def piece(self, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Named tensors, computed and saved unless an earlier run of the stage has done so."""
        self.check()
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            save_tensors(path, compute(), {})
        return load_tensors(path)[0]

    def done(self) -> None:
        """The result is written: forget the work in progress.

        Not if the parameters were edited meanwhile: DVC, which reads them when a stage ends, would
        record the new values with the old result. The work is kept for when they are set back.
        """
        if self.key(self.params.reloaded()) != self.key(self.params):
            raise StageError("params.yaml changed while the stage ran; its result is not recorded")
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
