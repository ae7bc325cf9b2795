"""Run the workflow without DVC, for short-lived machines that have only Python."""

import itertools
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from stages import TIME_IS_UP, TOO_SHORT, StageError
from stages.core.console import say
from stages.core.files import CODE, WORKFLOW, minutes
from stages.core.params import Params

GRAPH = WORKFLOW / "dvc.yaml"
TOO_LITTLE = 0.05  # fraction of the time limit; with less left, no step is started


@dataclass(frozen=True)
class Step:
    """One stage of dvc.yaml with its matrix filled in."""

    stage: str
    words: list[str]  # of its command, after `stochsec`
    reads: list[Path]  # what other stages made
    writes: list[Path]

    def is_done(self) -> bool:
        """Whether its outs are there, and no older than what it reads."""
        if not all(path.exists() for path in self.writes):
            return False
        made = min(map(newest, self.writes))
        return all(newest(path) <= made for path in self.reads if path.exists())


def run(
    params: Params,
    params_file: Path,
    stages: Sequence[str],
    time_limit: float | None,
    device: str | None,
) -> int:
    """Run every step of ``stages`` (none named: all) that is not done; the exit status.

    The steps come in the order of dvc.yaml, or of the names. Like make, it looks at files and their
    times alone: it does not see that parameters or code have changed. All steps together have
    ``time_limit`` minutes; a step that it stops goes on next time.
    """
    began, limit = time.monotonic(), 60 * minutes(time_limit)
    environment = dict(os.environ) | ({"STOCHSEC_DEVICE": device} if device else {})
    chosen = steps(params)
    names = list(dict.fromkeys(step.stage for step in chosen))
    for name in stages:
        if name not in names:
            raise StageError(f"stages: expected names among {names}, got {name!r}")
    chosen = [step for name in stages or names for step in chosen if step.stage == name]
    ran = 0
    for step in chosen:
        if step.is_done():
            continue
        left = began + limit - time.monotonic()
        if left < TOO_LITTLE * limit:
            undone = sum(not step.is_done() for step in chosen)
            say(f"run-all: the time is up, at least {undone} of {len(chosen)} steps are left")
            return TIME_IS_UP
        if math.isfinite(left):
            environment["STOCHSEC_TIME_LIMIT"] = str(left / 60)
        say(f"run-all: stochsec {' '.join(step.words)}")
        command = [sys.executable, "-m", "stages", *step.words, "--params", str(params_file)]
        status = call(command, environment)
        if status == TOO_SHORT and ran > 0:
            return TIME_IS_UP  # what was left of the window was too short for a piece of it
        if status:
            return status
        ran += 1
    say("run-all: everything is done")
    return 0


def call(command: list[str], environment: dict[str, str]) -> int:
    """Run a stage and hand it the signals that come here, so that it can keep its work."""
    process = subprocess.Popen(command, env=environment)

    def hand_on(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)

    handlers = {n: signal.signal(n, hand_on) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        status = process.wait()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return status if status >= 0 else 128 - status  # as shells say that a signal ended it


def steps(params: Params) -> list[Step]:
    """Every stage of dvc.yaml for every entry of its matrix."""
    values = {
        "run": params.run,
        "datasets": list(params.datasets),
        "compare_dataset": params.compare_dataset,
    }
    found = []
    for name, stage in yaml.safe_load(GRAPH.read_text())["stages"].items():
        if "matrix" not in stage:  # `code`, by which DVC sees what an edit changes
            continue
        axes = {key: entries(axis, values) for key, axis in stage["matrix"].items()}
        for chosen in itertools.product(*axes.values()):
            item = {f"item.{key}": value for key, value in zip(axes, chosen, strict=True)}
            known = {**values, **item}
            paths = [filled(path, known) for path in stage["deps"]]
            reads = [Path(path) for path in paths if path.startswith("artifacts/")]
            outs = [next(iter(out)) if isinstance(out, dict) else out for out in stage["outs"]]
            step = Step(
                stage=name,
                words=filled(stage["cmd"], known).removeprefix("python -m stages ").split(),
                reads=[p for p in reads if p.name != "params.checked" and p.parent != CODE],
                writes=[Path(filled(out, known)) for out in outs],
            )
            found.append(step)
    return found


def entries(axis: Any, values: dict[str, Any]) -> list[str]:
    """An axis of a matrix: a list, or the name of one."""
    if isinstance(axis, str):
        return list(values[axis.removeprefix("${").removesuffix("}")])
    return [filled(entry, values) for entry in axis]


def filled(template: str, values: dict[str, Any]) -> str:
    """A text of dvc.yaml with every ${name} replaced."""
    return re.sub(r"\$\{([a-z_.]+)\}", lambda match: str(values[match.group(1)]), template)


def newest(path: Path) -> float:
    """When a file, or the newest in a folder, was written."""
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else []
    return max(file.stat().st_mtime for file in files or [path])
