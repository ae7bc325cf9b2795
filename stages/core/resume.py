"""Work in progress, kept outside DVC's outs (DVC deletes outs before a run) and safe to kill."""

import hashlib
import json
import os
import shutil
import signal
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from filelock import FileLock, Timeout
from torch import Tensor

from stages import StageError, Stopped, WindowTooShort
from stages.core.artifacts import load_tensors, save_tensors, together
from stages.core.console import say
from stages.core.dependencies import code_behind
from stages.core.files import Whole, fingerprint, readable, require
from stages.core.hardware import Hardware
from stages.core.params import Params

ONCE = 1.0  # seconds; a signal repeated within it (to process and group) counts once
MANIFEST = "work.json"  # in a checkpoint file: what the work belongs to


class Scratch:
    """A folder for one stage's unfinished work, keyed by everything that determines its result.

    The key consists of ``key`` of the parameters, the files read, the machine's settings and the
    code of the stage, which is the module that defines ``key`` (see `stages.core.dependencies`).
    ``afresh`` deletes what an earlier run has left. The folder lies in .scratch; for a part of
    larger work, in the folder of ``within``.

    Inside the ``with`` block the first Ctrl-C or SIGTERM, or the end of the time limit, only sets
    ``stopping``. A loop calls `lap` after each piece of work, and `check` when its state is saved.
    `done` removes the folder once the output is written. ``hardware.checkpoint`` is a copy of the
    folder in one file: read at the start, written once a minute and when the stage stops.
    """

    def __init__(
        self,
        name: str,
        params: Params,
        key: Callable[[Params], object],
        inputs: Mapping[str, Path],
        hardware: Hardware,
        *,
        afresh: bool = False,
        within: "Scratch | None" = None,
    ) -> None:
        for path in inputs.values():
            require(path)
        self.afresh, self.hardware = afresh, hardware
        self.params, self.key = params, key
        self.belongs: dict[str, object] = {
            "work": name,
            "parameters": repr(key(params)),
            "files": {role: fingerprint(path) for role, path in inputs.items()},
        }
        self.made_by: dict[str, object] = {
            "source": code_behind(key),
            "machine": hardware.conditions(),
        }
        self.root: Scratch = within.root if within else self
        scratch = within.folder if within else Path(os.environ.get("DVC_ROOT", ".")) / ".scratch"
        # Nested work resumes with its parent, even on another machine.
        about = self.belongs if within else {**self.belongs, **self.made_by}
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        self.folder: Path = scratch / f"{name}-{digest[:12]}"
        self.packed = Stopwatch(30.0)  # states are saved once a minute: every one of them is packed
        self.asked_to_stop, self.asked_at = False, 0.0
        self.laps, self.longest, self.lap_began = 0, 0.0, time.monotonic()
        self.machines: list[dict[str, object]] = []

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.folder.with_suffix(".lock"))
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            raise StageError(f"{self.folder}: another process is doing this work") from None
        try:
            self._take_up()
        except BaseException:
            self._lock.release()
            raise
        self._handlers = {
            number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)
        }
        self.lap_began = time.monotonic()
        return self

    def _take_up(self) -> None:
        """What an earlier run has left, here or in the checkpoint file."""
        for path in self.folder.glob(".*.partial"):  # of a run that was killed while it wrote
            path.unlink()
        if self.afresh:
            shutil.rmtree(self.folder)
            self.folder.mkdir()
        if self.root is self and self.hardware.checkpoint:
            if not self.afresh:
                self._unpack(self.hardware.checkpoint)
            elif self.hardware.checkpoint.exists() and not is_checkpoint(self.hardware.checkpoint):
                raise StageError(f"{self.hardware.checkpoint}: not a checkpoint file; {REMEDY}")
            self._pack()  # reports a path that cannot be written before any work is done

    def _stop(self, number: int, frame: FrameType | None) -> None:
        root = self.root
        if root.asked_to_stop and time.monotonic() - root.asked_at > ONCE:
            raise KeyboardInterrupt  # asked twice: do not wait for the next safe point
        if root.asked_to_stop:
            return
        root.asked_to_stop, root.asked_at = True, time.monotonic()
        say("stopping at the next safe point; press Ctrl-C again to stop now")

    @property
    def stopping(self) -> bool:
        """Whether a signal asks for the end, or too little time is left for another lap."""
        return self.root.asked_to_stop or self.hardware.seconds_left() <= self.longest

    def lap(self) -> None:
        """A piece of work has ended; others may take as long."""
        now = time.monotonic()
        self.longest, self.lap_began = max(self.longest, now - self.lap_began), now
        self.root.laps += 1

    def check(self) -> None:
        """Leave the stage if it is asked to stop; call it with everything saved."""
        if self.stopping:
            self._leave()
        if self.root.packed.due():
            self.root._pack()

    def check_clock(self) -> None:
        """Stop in the middle of a piece if the time is up; only the work on this piece is lost."""
        if self.hardware.seconds_left() <= 0:
            self._leave()

    def _leave(self) -> None:
        asked = self.root.asked_to_stop
        if not asked and not self.root.laps:
            raise WindowTooShort(
                f"time limit: {self.hardware.time_limit:g} minutes are too few for one piece of "
                "this work; give more, or lower attack.shard"
            )
        self.root._pack()
        kept = self.hardware.checkpoint or self.root.folder
        raise Stopped(
            f"{'stopped' if asked else 'the time is up'}; {kept} ({readable(kept)}) keeps what is "
            "done; run the same command to continue",
            time_is_up=not asked,
        )

    def _written(self) -> float:
        """When the newest file of the work was written; 0 if there is none."""
        return max((path.stat().st_mtime for path in self._files()), default=0.0)

    def _files(self) -> list[Path]:
        found = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return [path for path in found if path.suffix not in (".lock", ".partial")]

    def _pack(self) -> None:
        """The folder as one file, if it is to travel."""
        if self.hardware.checkpoint is None:
            return
        about = {**self.belongs, **self.made_by, "written": self._written()}
        try:
            with (
                Whole(self.hardware.checkpoint) as partial,
                zipfile.ZipFile(partial, "w") as archive,
            ):
                archive.writestr(MANIFEST, json.dumps(about))
                for path in self._files():
                    archive.write(path, path.relative_to(self.folder))
        except OSError as error:
            raise StageError(
                f"{self.hardware.checkpoint}: cannot be written ({error.strerror})"
            ) from None

    def _unpack(self, path: Path) -> None:
        """A checkpoint file into the folder, unless the folder has newer work.

        `StageError` if it belongs to other parameters or files, or is damaged; the folder is then
        unchanged. Another machine or source code is only reported.
        """
        if not path.exists():
            return
        fresh = self.folder.with_suffix(".unpacked")
        shutil.rmtree(fresh, ignore_errors=True)
        try:
            with zipfile.ZipFile(path) as archive:
                about = dict(json.loads(archive.read(MANIFEST)))
                written = float(about["written"])
                for name, value in self.belongs.items():
                    if about.get(name) != value:
                        raise StageError(f"{path}: is a checkpoint of other {name}; {REMEDY}")
                if self._written() > written:
                    say(f"{path}: {self.folder} has newer work, which continues")
                    return
                archive.extractall(fresh)
        except StageError:
            raise
        except Exception as error:  # damaged archives raise many kinds
            shutil.rmtree(fresh, ignore_errors=True)
            raise StageError(f"{path}: not a checkpoint file ({error}); {REMEDY}") from None
        for name, value in self.made_by.items():
            if about.get(name) != json.loads(json.dumps(value)):
                say(f"{path}: made by another {name}; continuing its work here")
        (fresh / MANIFEST).unlink()
        for file in (file for file in fresh.rglob("*") if file.is_file()):
            os.utime(file, (written, written))
        shutil.rmtree(self.folder)
        fresh.rename(self.folder)

    def piece(self, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Named tensors, computed and saved unless an earlier run of the stage has done so."""
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            self.check()
            save_tensors(path, compute(), self.hardware.conditions())
            self.lap()
        tensors, about = load_tensors(path)
        self.machines.append(about)
        return tensors

    def about(self) -> dict[str, object]:
        """What a record says of its making: the machines of all its pieces, and the files read."""
        files = self.belongs["files"]
        return {**together(self.machines or [self.hardware.conditions()]), "files": files}

    def done(self) -> None:
        """Delete the unfinished work, after the result is written.

        `StageError` if the parameters were edited meanwhile: DVC reads them when a stage ends, and
        would record the new values with the old result. The work is then kept, for the old values.
        """
        try:
            changed = self.key(self.params.reloaded()) != self.key(self.params)
        except (StageError, KeyError):  # edited so much that this stage has nothing in it
            changed = True
        if changed:
            raise StageError("params.yaml changed while the stage ran; its result is not recorded")
        shutil.rmtree(self.folder)
        if self.root is self and self.hardware.checkpoint:
            self.hardware.checkpoint.unlink(missing_ok=True)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._lock.release()


def is_checkpoint(path: Path) -> bool:
    """Whether a file is one that a `Scratch` travels in."""
    try:
        with zipfile.ZipFile(path) as archive:
            return MANIFEST in archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return False


REMEDY = "delete it, or name another file"


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
