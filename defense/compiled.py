"""The fast chain for the convolutional energies: the call of `langevin`, several times its speed.

The gradient is `written_out_gradient`, made anew from the weights at every call of the chain, so
that training may change them between calls. On a CPU the batch is cut into parts whose activations
stay in the cache, and as many parts advance at a time as torch has threads. On a GPU runs of many
steps are replayed as one CUDA graph. There is no compiler: on a CPU, library kernels with weights
in the library's own layout match torch.compile or beat it, and need no start-up.
"""

import copy
import os
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from threading import Barrier
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Generator, Tensor, nn

from defense.energy import ConvEnergy
from defense.langevin import EnergyFn, LangevinConfig, StepFn
from defense.written_gradient import Map, written_out_gradient

Precision = Literal["float32", "tf32", "bfloat16"]

CACHED_VALUES = 2**18  # values of the widest activation in one part of a CPU batch ...
SMALLEST_PART = 25  # ... but at least these many images, for the sake of the matrix products
NOISE_VALUES = 2**20  # values of noise drawn ahead of the CPU workers
GRAPH_STEPS = 50  # Langevin steps in one CUDA graph


def padded_batch(count: int) -> int:
    """The batch of a CUDA graph for ``count`` images: few sizes, at most a quarter larger."""
    grain = max(16, 1 << max(0, count.bit_length() - 3))
    return -(-count // grain) * grain


class _Call(NamedTuple):
    """One call of the chain; x is its working copy, advanced in place."""

    energy: ConvEnergy
    x: Tensor
    config: LangevinConfig
    generator: Generator | None
    on_step: StepFn | None
    precision: Precision

    def gradient(self, parts: int) -> Map:
        dtype = torch.bfloat16 if self.precision == "bfloat16" else torch.float32
        return written_out_gradient(self.energy, [parts, *self.x.shape[1:]], dtype)


class _Graphs:
    """CUDA graphs of one step and of `GRAPH_STEPS`, over static weights, states and noise."""

    def __init__(self, call: _Call) -> None:
        x = call.x.new_zeros(padded_batch(len(call.x)), *call.x.shape[1:])
        energy = copy.deepcopy(call.energy)
        self.call = call._replace(energy=energy, x=x, generator=Generator(x.device), on_step=None)
        aside = torch.cuda.Stream(x.device)
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            self._advance(2)
        torch.cuda.current_stream().wait_stream(aside)
        self.graphs: dict[int, Any] = {}
        for steps in (1, GRAPH_STEPS):
            self.graphs[steps] = torch.cuda.CUDAGraph()
            self.graphs[steps].register_generator_state(self.call.generator)
            with torch.cuda.graph(self.graphs[steps]):
                self._advance(steps)

    def _advance(self, steps: int) -> None:
        """What a graph records: the weights as they are at its replay, re-laid, then the steps."""
        x, generator, tf32 = self.call.x, self.call.generator, self.call.precision == "tf32"
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=tf32):
            gradient = self.call.gradient(len(x))
            for _ in range(steps):
                noise = torch.randn(x.shape, generator=generator, device=x.device)
                x.sub_(gradient(x)).add_(noise, alpha=self.call.config.tau)

    def run(self, call: _Call) -> None:
        """Advance ``call.x`` with the noise of ``call.generator``, which moves on as if used."""
        for static, current in zip(
            self.call.energy.parameters(), call.energy.parameters(), strict=True
        ):
            static.copy_(current)
        own = cast(Generator, self.call.generator)
        theirs = call.generator or torch.cuda.default_generators[call.x.get_device()]
        own.set_state(theirs.get_state())
        state = self.call.x[: len(call.x)]
        state.copy_(call.x)
        done = 0
        while done < call.config.steps:
            many = call.on_step is None and call.config.steps - done >= GRAPH_STEPS
            steps = GRAPH_STEPS if many else 1
            self.graphs[steps].replay()
            done += steps
            if call.on_step is not None:
                call.on_step(done, state.clone())
        theirs.set_state(own.get_state())
        call.x.copy_(state)


@cache
def _workers(count: int, process: int) -> ThreadPoolExecutor:
    """Threads in each of which torch uses one thread; one pool per process."""
    threads, all_there = torch.get_num_threads(), Barrier(count)

    def start() -> None:
        torch.get_num_threads()  # torch sets up a thread at first use, and would undo the next line
        torch.set_num_threads(1)
        all_there.wait()

    pool = ThreadPoolExecutor(count)
    for job in [pool.submit(start) for _ in range(count)]:
        job.result()
    torch.set_num_threads(threads)  # what threads made later by others begin with
    return pool


@cache
def _keep_freed_memory(process: int) -> None:
    """Free one large block, so that glibc's allocator keeps smaller ones instead of unmapping them.

    Activations freed to the system and faulted in again cost a third of the time and more.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


def _finish(jobs: list[Future[None]]) -> None:
    """Wait for the workers, and raise what they raised."""
    for job in jobs:
        job.result()


def _run_parts(call: _Call) -> None:
    """The chain on a CPU: runs of steps, whose noise is drawn while workers still use the last."""
    threads = torch.get_num_threads()
    _keep_freed_memory(os.getpid())
    widest = cast(nn.Conv2d, call.energy.layers[0]).out_channels * call.x[0, 0].numel()
    most = max(SMALLEST_PART, CACHED_VALUES // widest)
    parts = call.x.chunk(threads * -(-len(call.x) // (threads * most)))
    with torch.inference_mode():
        gradient = call.gradient(len(parts[0]))

    @torch.inference_mode()
    def advance(part: Tensor, noise: tuple[Tensor, ...]) -> None:
        for z in noise:
            part.sub_(gradient(part)).add_(z, alpha=call.config.tau)

    pool = _workers(threads, os.getpid())
    ahead = 1 if call.on_step else max(1, min(16, NOISE_VALUES // call.x.numel()))
    jobs: list[Future[None]] = []
    for done in range(0, call.config.steps, ahead):
        count = min(ahead, call.config.steps - done)
        noise = [torch.randn(call.x.shape, generator=call.generator) for _ in range(count)]
        _finish(jobs)
        shares = zip(*(z.split(len(parts[0])) for z in noise), strict=True)
        jobs = [pool.submit(advance, *both) for both in zip(parts, shares, strict=True)]
        if call.on_step is not None:
            _finish(jobs)
            call.on_step(done + 1, call.x.clone())
    _finish(jobs)


class CompiledLangevin:
    """`langevin` for a `ConvEnergy` on a CPU or a CUDA device, in float32 or with less precision.

    State and noise are float32 always; ``precision`` is that of the energy's gradient, and tf32
    differs from float32 on CUDA only. On a CPU the noise is the plain chain's, whatever the number
    of threads; on CUDA it is the plain chain's for a batch of `padded_batch` images. ``on_step`` is
    given copies of the state. Copies and pickles of an instance leave its CUDA graphs behind.
    """

    def __init__(self, *, precision: Precision = "float32") -> None:
        if precision not in get_args(Precision):
            raise ValueError(f"precision: expected one of {get_args(Precision)}, got {precision!r}")
        self.precision: Precision = precision
        self._graphs: dict[object, _Graphs] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_graphs": {}}

    def __call__(
        self,
        energy: EnergyFn,
        x: Tensor,
        config: LangevinConfig,
        *,
        generator: Generator | None,
        on_step: StepFn | None = None,
    ) -> Tensor:
        """K steps from x, (N,C,S,S) float32 in net range -> the same shape; see `langevin`."""
        if not isinstance(energy, ConvEnergy):
            raise ValueError(f"energy: expected a ConvEnergy, got {type(energy).__name__}")
        energy.check(x)
        if x.dtype != torch.float32:
            raise ValueError(f"x: expected float32, got {x.dtype}")
        x = x.detach()
        if config.steps == 0 or len(x) == 0:
            return x
        x = x.clone(memory_format=torch.contiguous_format)
        call = _Call(energy, x, config, generator, on_step, self.precision)
        if x.is_cuda:
            self._run_graphs(call)
        else:
            _run_parts(call)
        return x

    def _run_graphs(self, call: _Call) -> None:
        shape = (padded_batch(len(call.x)), *call.x.shape[1:])
        key = (str(call.energy), shape, call.x.device, call.config.tau)
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(call.x.device):
            if key not in self._graphs:
                self._graphs[key] = _Graphs(call)
            self._graphs[key].run(call)
