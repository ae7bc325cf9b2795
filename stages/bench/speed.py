"""`stochsec bench`: this library against plain torch code, and both against the machine's limits.

Every round of a run times each entry once, so a drift of the machine's speed affects all of them
equally. Speedups are ratios of medians. Each plain torch job runs in its own process: see
`stages.bench.jobs`.
"""

import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from defense.fast.langevin import bytes_per_image
from defense.fast.precision import Precision, runs_bfloat16, tensor_cores
from stages import StageError
from stages.bench.jobs import Job, Work, milliseconds, ours
from stages.core.console import Track, say
from stages.core.files import write_text
from stages.core.hardware import Hardware
from stages.reporting import figures, style

USUAL = "usual"  # the loop that a user would write: the baseline
BACKWARD = "backward"  # the same with backward(), whose gradients of weights nobody needs
CONVOLUTIONS = ((64, 32), (128, 16), (256, 8))  # channels and side of 3x3 convolutions
PRODUCTS = (1024, 2048)  # sides of square matrix products

HOW_TO_READ = """\
`usual` is the loop that a user would write and the authors wrote, with torch's defaults (float32 on
a CPU, tf32 convolutions on a GPU), each job in a process of its own; `backward` the same with
`backward()`, which computes gradients of the weights too; `plain` the reference chain of this
library; `fast` the fast chain, with what this library does around it: data and chains in one pass
and fused Adam in an `ebm_update`, channels last in everything. `speedup` is the usual loop's median
time over this one's, from one run with everything timed in turn. `of the limit` is the rate of
useful operations over that of the fastest 3x3 convolution of the machine's library in that
precision, measured in the same run.
"""


class Entry(NamedTuple):
    """One thing that is timed in every round."""

    task: str
    job: Job | None
    engine: str
    precision: Precision
    time: Callable[[], float]


def jobs(device: str) -> list[Job]:
    """What is timed: the paper's networks, as far as the device can bear."""
    if device == "cpu":
        return [
            Job("langevin", device, 15, 10),
            Job("langevin", device, 150, 10),
            Job("langevin", device, 200, 60, side=8, channels=1, width=16),
            Job("ebm_update", device, 100, 100),
            Job("ebm_update", device, 100, 4, side=8, channels=1, width=16),
            Job("attack_step", device, 150, 60),
            Job("classifier_step", device, 100),
        ]
    full = {"depth": 28, "widening": 10}
    return [
        *(Job("langevin", device, batch, 200) for batch in (100, 1000, 4000)),
        Job("ebm_update", device, 100, 100),
        Job("attack_step", device, 1500, 200, **full),
        Job("classifier_step", device, 500, **full),
    ]


def run(hardware: Hardware, rounds: int, out: Path, json_path: Path | None) -> None:
    """Time everything ``rounds`` times; write the numbers, a table and a plot."""
    device = hardware.device.type
    if device not in ("cpu", "cuda"):
        raise StageError(f"device: expected cpu or cuda, got {device!r}")
    try:
        entries, times = timings(str(hardware.device), rounds)
    except BrokenPipeError:
        raise StageError(
            "bench: the process of the usual loop ended; see its error above"
        ) from None
    limits = limits_of(entries, times)
    result = {
        "machine": {**machine(hardware.device), "rounds": rounds},
        "limits": limits,
        "rows": rows_of(entries, times, limits),
    }
    text = json.dumps(result, indent=1) + "\n"
    write_text(out / f"{device}.json", text)
    if json_path is not None:
        write_text(json_path, text)
    write(result, out, device)
    say((out / f"{device}.md").read_text())
    say(f"bench: {out}")


def timings(device: str, rounds: int) -> tuple[list[Entry], list[list[float]]]:
    """Everything in turn, once to warm up and then ``rounds`` times, in milliseconds."""
    with ExitStack() as users:
        entries = entries_on(device, users)
        times: list[list[float]] = [[] for _ in entries]
        with Track("bench", (rounds + 1) * len(entries), unit="timings") as track:
            for number in range(rounds + 1):
                for entry, measured in zip(entries, times, strict=True):
                    spent = entry.time()
                    if number:
                        measured.append(spent)
                    track.advance(watch=f"{entry.task} {entry.engine} {entry.precision}")
    return entries, times


def entries_on(device: str, users: ExitStack) -> list[Entry]:
    """Every job on both sides, and the machine's own rates; ``users`` ends the processes."""

    def apart(job: Job, backward: bool) -> Callable[[], float]:
        asked = json.dumps([asdict(job), backward])
        command = [sys.executable, "-m", "stages.bench.jobs", asked]
        pipe = subprocess.PIPE
        user = users.enter_context(
            subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, bufsize=1)
        )

        def time() -> float:
            assert user.stdin is not None and user.stdout is not None
            user.stdin.write("again\n")
            answer = user.stdout.readline()
            if not answer:
                raise BrokenPipeError
            return float(answer)

        return time

    def here(work: Work) -> Callable[[], float]:
        return lambda: milliseconds(work, device)

    left_out = {"tf32"} if device == "cpu" else set()
    if not runs_bfloat16(torch.device(device)):
        left_out.add("bfloat16")
    precisions = [p for p in get_args(Precision) if p not in left_out]
    default: Precision = "float32" if device == "cpu" else "tf32"  # torch's, of convolutions
    entries = []
    for job in jobs(device):
        entries.append(Entry(job.task, job, USUAL, default, apart(job, False)))
        if job.task == "langevin":
            entries.append(Entry(job.task, job, BACKWARD, default, apart(job, True)))
            work = ours(job, "plain", "float32")
            entries.append(Entry(job.task, job, "plain", "float32", here(work)))
        for precision in precisions:
            work = ours(job, "fast", precision)
            entries.append(Entry(job.task, job, "fast", precision, here(work)))
    for precision in precisions:
        for task, work in machine_work(device, precision):
            entries.append(Entry(task, None, "", precision, here(work)))
    return entries


def machine_work(device: str, precision: Precision) -> list[tuple[str, Work]]:
    """Torch's own convolutions and matrix products, which measure the machine's peak rates.

    Pairs of a task, "conv" or "matmul" with its number of operations, and the call to time.
    """
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    many = 1 if device == "cpu" else 40
    work: list[tuple[str, Work]] = []

    def exactly(operation: Callable[[], Tensor]) -> Work:
        def call() -> Tensor:
            with torch.no_grad(), tensor_cores(precision):
                return operation()

        return call

    for channels, side in CONVOLUTIONS:
        shape = (100 * many, channels, side, side)
        x = torch.rand(shape, device=device, dtype=dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        weight = torch.rand(channels, channels, 3, 3, device=device, dtype=dtype)
        weight = weight.contiguous(memory_format=torch.channels_last)
        flops = 2 * 9 * channels * x.numel()
        call = exactly(partial(F.conv2d, x, weight, padding=1))
        work.append((f"conv {flops}", call))
    for side in PRODUCTS:
        matrix = torch.rand(side * (1 if device == "cpu" else 4), side, device=device, dtype=dtype)
        square = torch.rand(side, side, device=device, dtype=dtype)
        flops = 2 * matrix.numel() * side
        call = exactly(partial(torch.matmul, matrix, square))
        work.append((f"matmul {flops}", call))
    return work


def limits_of(entries: list[Entry], times: list[list[float]]) -> list[dict[str, Any]]:
    """The best rate of the machine's library in each precision, in GFLOP/s."""
    best: dict[str, dict[str, float]] = {}
    for entry, measured in zip(entries, times, strict=True):
        if entry.job is None:
            kind, flops = entry.task.split()
            rate = float(flops) / statistics.median(measured) / 1e6
            rates = best.setdefault(entry.precision, {"conv": 0.0, "matmul": 0.0})
            rates[kind] = max(rates[kind], rate)
    return [
        {
            "precision": precision,
            **{f"{kind}_gflops": round(rate, 1) for kind, rate in rates.items()},
        }
        for precision, rates in best.items()
    ]


def rows_of(
    entries: list[Entry], times: list[list[float]], limits: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """One row for each job, engine and precision; the baseline's own row has speedup 1."""
    conv = {limit["precision"]: limit["conv_gflops"] for limit in limits}
    rows = []
    for entry, measured in zip(entries, times, strict=True):
        job = entry.job
        if job is None:
            continue
        ms = statistics.median(measured)
        low, _, high = statistics.quantiles(measured, n=4)
        if entry.engine == USUAL:
            baseline, flops = ms, job.flops()
        rows.append(
            {
                "task": job.task,
                "device": torch.device(job.device).type,
                "image": f"{job.channels}x{job.side}x{job.side}",
                "engine": entry.engine,
                "precision": entry.precision,
                "batch": job.batch,
                "steps": job.steps,
                "ms": round(ms, 3),
                "ms_quartiles": [round(low, 3), round(high, 3)],
                "baseline_ms": round(baseline, 3),
                "speedup": round(baseline / ms, 3),
                "limit_fraction": round(flops / ms / 1e6 / conv[entry.precision], 3),
                "image_steps_per_s": round(1e3 * job.image_steps() / ms, 1),
                "activation_bytes_per_image": bytes_per_image(job.energy(), entry.precision)
                if entry.engine == "fast" and job.steps
                else None,
            }
        )
    return rows


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on; nothing that names a host."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [
            line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        name = models[0].split(":")[1].strip() if models else name
    about: dict[str, Any] = {"cpu": name, "threads": torch.get_num_threads()}
    if device.type == "cuda":
        about |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return {**about, "torch": torch.__version__, "python": platform.python_version()}


def table(result: dict[str, Any]) -> pd.DataFrame:
    """The rows as people read them."""
    rows = pd.DataFrame(result["rows"])
    spread = rows["ms_quartiles"].map(lambda ends: f" [{ends[0]:.4g}, {ends[1]:.4g}]")
    return pd.DataFrame(
        {
            "task": rows["task"],
            "image": rows["image"],
            "batch": rows["batch"],
            "steps": rows["steps"],
            "engine": rows["engine"],
            "precision": rows["precision"],
            "ms [quartiles]": rows["ms"].map(lambda ms: f"{ms:.4g}") + spread,
            "speedup": rows["speedup"].map(lambda ratio: f"{ratio:.2f}"),
            "of the limit": rows["limit_fraction"].map(lambda share: f"{share:.0%}"),
            "image-steps/s": rows["image_steps_per_s"].map(lambda rate: f"{rate:,.0f}"),
        }
    )


def write(result: dict[str, Any], out: Path, name: str) -> None:
    """``name``.md and the picture beside it."""
    about = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
    limits = pd.DataFrame(result["limits"]).to_markdown(index=False)
    rows = table(result).to_markdown(index=False, disable_numparse=True)
    text = f"# Speed\n\nMachine: {about}.\n\n{HOW_TO_READ}\n![Speed]({name}.png)\n\n{rows}\n\n"
    write_text(out / f"{name}.md", f"{text}The machine's own rates:\n\n{limits}\n")
    style.save(figures.speed(pd.DataFrame(result["rows"])), out / f"{name}.png")
