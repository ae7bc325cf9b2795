"""`stochsec bench-networks`: a Langevin step of the paper's energy and of two large ones.

Figure 10, right, of Hill et al. (2021): the running time of sampling with 100 images at 32x32x3
from their network, IGEBM (Du & Mordatch 2019) and JEM (Grathwohl et al. 2020). All go through the
same plain loop on autograd in float32, ours through the fast engine too; every one is timed in turn
in every round, in one process, and ratios are between medians. Weights are random: the time does
not depend on them.
"""

import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defense.energy import ConvEnergy, count_parameters
from defense.fast.langevin import FastLangevin
from defense.inference import flops, freeze
from defense.langevin import Chain, LangevinConfig
from defense.rng import make_generator
from stages import StageError
from stages.bench.jobs import TAU, milliseconds
from stages.bench.speed import machine
from stages.core.console import Track, say
from stages.core.engine import plain_chain
from stages.core.files import write_csv, write_text
from stages.core.hardware import Hardware
from stages.reporting.tables import show

BATCH = 100  # images, as in Figure 10
SHAPE = (3, 32, 32)
LEAK = 0.2  # of both networks' leaky ReLU
OURS, FAST, PLAIN = "Ours", "fast", "plain"


def shortcut(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Module:
    """Shortcut of a residual block: the identity if the shapes match, else a convolution."""
    if inputs == outputs and stride == 1:
        return nn.Identity()
    return nn.Conv2d(inputs, outputs, size, stride, size // 2)


class _PooledBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, averaged over 2x2 pixels if ``halve``, activated."""

    def __init__(self, inputs: int, outputs: int, *, halve: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = shortcut(inputs, outputs, 3)
        self.halve = halve

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.leaky_relu(self.conv1(x), LEAK)) + self.shortcut(x)
        return F.leaky_relu(F.avg_pool2d(h, 2) if self.halve else h, LEAK)


class IGEBM(nn.Module):
    """Images (N,3,S,S) -> energies (N,): residual networks of Du & Mordatch (2019) for CIFAR-10.

    A 3x3 convolution to ``stem`` channels; three groups of three blocks with ``width``, 2 and 4
    times ``width`` channels, the first of each halving the image; ReLU, sum over pixels, linear.
    Width 128 is the official code's `ResNet32Large` (unconditional, 18.6M parameters), width 192
    its `ResNet32Wider` (conditional, 41.9M, the one that they attack).

    Left out: spectral normalization, which acts on the weights alone (under 0.1 % of the arithmetic
    of a step with 100 images); attention and dropout, which their evaluation leaves off; scales for
    channels and classes, an elementwise product each; biases are those of the convolutions.
    Source: openai/ebm_code_release, models.py, utils.py, train.py and README.md.
    """

    def __init__(self, *, stem: int = 128, width: int = 128) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(SHAPE[0], stem, 3, padding=1), nn.LeakyReLU(LEAK)]
        inputs = stem
        for outputs in (width, 2 * width, 4 * width):
            for halve in (True, False, False):
                layers.append(_PooledBlock(inputs, outputs, halve=halve))
                inputs = outputs
        self.layers = nn.Sequential(*layers, nn.ReLU())
        self.head = nn.Linear(inputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        energies: Tensor = self.head(self.layers(x).sum(dim=(2, 3)))
        return energies.flatten()


class _WideBlock(nn.Module):
    """Activation first, two 3x3 convolutions of which the second strides, and a shortcut."""

    def __init__(self, inputs: int, outputs: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, stride, 1)
        self.shortcut = shortcut(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.leaky_relu(self.conv1(F.leaky_relu(x, LEAK)), LEAK))
        out: Tensor = h + self.shortcut(x)
        return out


class JEM(nn.Module):
    """Images (N,3,S,S) -> energies (N,): minus logsumexp of a Wide ResNet's logits.

    Grathwohl et al. (2020): WRN-28-10 without normalization, with leaky ReLU and biases, 36.5M
    parameters. A 3x3 convolution to 16 channels; three groups of (``depth`` - 4) / 6 blocks with
    16, 32 and 64 times ``width`` channels, the second and third halving the image; mean over
    pixels, linear. Nothing is left out. Source: wgrathwohl/JEM, wideresnet.py, train_wrn_ebm.py.
    """

    def __init__(self, *, depth: int = 28, width: int = 10, classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(SHAPE[0], 16, 3, padding=1)]
        inputs = 16
        for outputs, stride in ((16 * width, 1), (32 * width, 2), (64 * width, 2)):
            for block in range((depth - 4) // 6):
                layers.append(_WideBlock(inputs, outputs, stride=1 if block else stride))
                inputs = outputs
        self.layers = nn.Sequential(*layers, nn.LeakyReLU(LEAK))
        self.head = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layers(x).mean(dim=(2, 3)))
        return -logits.logsumexp(1)


class System(NamedTuple):
    """A network (N,3,32,32) -> (N,) and the chain that samples it; a timing is ``steps`` steps."""

    network: str
    engine: str
    net: nn.Module
    chain: Chain
    steps: int

    def work(self, x: Tensor) -> Callable[[], Tensor]:
        """One timing, from images x (N,3,32,32)."""
        generator = make_generator(0, "bench-networks", device=x.device)
        config = LangevinConfig(self.steps, TAU)
        return partial(self.chain, self.net, x, config, generator=generator)


def systems(device: torch.device) -> list[System]:
    """Ours under both engines, the large networks under the plain one; as few steps as tell."""
    small, large = (10, 1) if device.type == "cpu" else (200, 10)
    plain, ours = plain_chain("float32"), ConvEnergy()
    found = [
        System(OURS, FAST, ours, FastLangevin(), small),
        System(OURS, PLAIN, ours, plain, small),
        System("IGEBM, large", PLAIN, IGEBM(), plain, large),
        System("IGEBM, wider", PLAIN, IGEBM(width=192), plain, large),
        System("JEM", PLAIN, JEM(), plain, large),
    ]
    return [system._replace(net=freeze(system.net.to(device))) for system in found]


def run(hardware: Hardware, rounds: int, out: Path, *, batch: int = BATCH) -> None:
    """Time all systems ``rounds`` times with ``batch`` images; write JSON and CSV, show a table.

    JEM takes 4 GB of memory for 100 images; fewer need less, and the rows say how many they were.
    """
    device = hardware.device
    if device.type not in ("cpu", "cuda"):
        raise StageError(f"device: expected cpu or cuda, got {device.type!r}")
    for name, value, least in (("rounds", rounds, 2), ("batch", batch, 1)):
        if value < least:
            raise StageError(f"{name}: expected >= {least}, got {value}")
    if out.exists() and not out.is_dir():
        raise StageError(f"{out}: expected a folder")
    torch.manual_seed(0)
    x = torch.rand(batch, *SHAPE, device=device)
    found = systems(device)
    try:
        rows = rows_of(found, timings(found, x, rounds), x)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise StageError(f"batch: {batch} images do not fit into the memory; give fewer") from None
    about = {**machine(device), "rounds": rounds}
    result = {"machine": about, "rows": rows}
    write_text(out / f"{device.type}.json", json.dumps(result, indent=1) + "\n")
    write_csv(out / f"{device.type}.csv", list(rows[0]), [list(row.values()) for row in rows])
    said = ", ".join(f"{key} {value}" for key, value in about.items())
    show(table(rows), f"Langevin steps of {batch} images, 32x32x3. Machine: {said}.")
    say(f"bench-networks: {out}")


def timings(found: list[System], x: Tensor, rounds: int) -> list[list[float]]:
    """Milliseconds a step of every system in turn, once to warm up and then ``rounds`` times."""
    works = [system.work(x) for system in found]
    times: list[list[float]] = [[] for _ in found]
    with Track("bench-networks", (rounds + 1) * len(found), unit="timings") as track:
        for number in range(rounds + 1):
            for system, work, measured in zip(found, works, times, strict=True):
                ms = milliseconds(work, str(x.device)) / system.steps
                if number:
                    measured.append(ms)
                track.advance(watch=f"{system.network} {system.engine} {ms:.4g} ms a step")
    return times


def rows_of(found: list[System], times: list[list[float]], x: Tensor) -> list[dict[str, Any]]:
    """One row for each system: times in ms a step of the batch, and their ratios to ours.

    ``multiply_adds`` are those of one image's step: forward and back to the image.
    """
    medians = [statistics.median(measured) for measured in times]
    ours = {s.engine: ms for s, ms in zip(found, medians, strict=True) if s.network == OURS}
    rows = []
    for system, measured, ms in zip(found, times, medians, strict=True):
        low, _, high = statistics.quantiles(measured, n=4, method="inclusive")  # within the times
        rows.append(
            {
                "network": system.network,
                "engine": system.engine,
                "precision": "float32",
                "batch": len(x),
                "steps": system.steps,
                "ms": round(ms, 4),
                "ms_low": round(low, 4),
                "ms_high": round(high, 4),
                "times_plain": round(ms / ours[PLAIN], 3),
                "times_fast": round(ms / ours[FAST], 3),
                "parameters": count_parameters(system.net),
                "multiply_adds": flops(system.net, x[:1]) // 2,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """The rows as people read them."""
    return pd.DataFrame(
        {
            "network": row["network"],
            "engine": row["engine"],
            "parameters": f"{row['parameters']:,}",
            "multiply-adds an image and step": f"{row['multiply_adds'] / 1e6:,.0f}M",
            "ms a step [quartiles]": "{ms:.4g} [{ms_low:.4g}, {ms_high:.4g}]".format(**row),
            "of our plain loop": f"{row['times_plain']:.3g}x",
            "of our fast engine": f"{row['times_fast']:.3g}x",
        }
        for row in rows
    )
