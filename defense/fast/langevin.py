"""The fast chain for `ConvEnergy`, with the same call as `langevin`.

The gradient is a `WrittenGradient`, rebuilt from the weights at every call of the chain, so that
training may change them between calls. On a CPU the batch goes through each step in pieces whose
activations fit the cache. On a GPU many steps are replayed as one CUDA graph. torch.compile is not
used: on a CPU, oneDNN kernels with prepacked weights are at least as fast, with no start-up.
"""

import copy
import os
import sys
from functools import cache
from typing import Any, NamedTuple, cast

import torch
from torch import Generator, Tensor, nn

from defense.energy import ConvEnergy
from defense.fast.precision import Precision, check_precision, tensor_cores, usable
from defense.fast.written_gradient import WrittenGradient
from defense.langevin import ChainLog, EnergyFn, LangevinConfig

CACHED_VALUES = 2**18  # per CPU thread: values of the widest activation in one piece ...
SMALLEST_SHARE = 25  # ... but at least this many images, to keep matrix products efficient
GRAPH_STEPS = 50  # Langevin steps in one CUDA graph
SHARE_OF_FREE_MEMORY = 0.5  # of a GPU, for the activations of one piece


def padded_batch(count: int) -> int:
    """Batch size of a CUDA graph for ``count`` images: rounded up to one of few sizes.

    From 64 images on it is at most a quarter larger than ``count``.
    """
    grain = max(16, 1 << max(0, count.bit_length() - 3))
    return -(-count // grain) * grain


def bytes_per_image(energy: ConvEnergy, precision: Precision) -> int:
    """Peak memory in bytes of one gradient, per image in a piece: activations and working copies.

    Not counted are state, noise and gradient of the chain: three float32 images for every image of
    the whole batch.
    """
    (_, height, width), sizes = energy.shape, list[int]()
    for conv in cast(list[nn.Conv2d], energy.layers[:-1:2]):
        height, width = height // conv.stride[0], width // conv.stride[0]
        sizes.append(conv.out_channels * height * width)
    return (sum(sizes) + 5 * max(sizes)) * (2 if precision == "bfloat16" else 4)


class _Call(NamedTuple):
    """One call of the chain; x is its working copy, advanced in place."""

    energy: ConvEnergy
    x: Tensor
    config: LangevinConfig
    generator: Generator | None
    log: ChainLog | None
    precision: Precision
    states: list[Tensor] | None = None

    def advance(self, steps: int, most: int) -> None:
        """Take Langevin steps with the current weights, ``most`` images per gradient call.

        This is what a CUDA graph records.
        """
        x, most = self.x, min(most, len(self.x))
        dtype = torch.bfloat16 if self.precision == "bfloat16" else torch.float32
        gradient = WrittenGradient(self.energy, [most, *x.shape[1:]], dtype, steps)
        for _ in range(steps):
            if self.states is not None:
                self.states.append(x.clone())
            noise = torch.randn(x.shape, generator=self.generator, device=x.device)
            energies, norms = x.new_empty(2, len(x)) if self.log is not None else (None, None)
            for first in range(0, len(x), most):
                part = slice(first, first + most)
                g = gradient(x[part], None if energies is None else energies[part])
                if norms is not None:
                    torch.linalg.vector_norm(g.flatten(1), dim=1, out=norms[part])
                x[part].sub_(g).add_(noise[part], alpha=self.config.tau)
            if self.log is not None:
                self.log.energies.append(cast(Tensor, energies))
                self.log.gradient_norms.append(cast(Tensor, norms))


class _Graphs:
    """CUDA graphs of one step and of `GRAPH_STEPS`, over static weights, states and noise.

    All graphs of one ``pool`` share its memory. This is safe because nothing in it is read after
    another graph has been replayed.
    """

    def __init__(self, call: _Call, pool: Any) -> None:
        x = call.x.new_zeros(padded_batch(len(call.x)), *call.x.shape[1:])
        energy = copy.deepcopy(call.energy)
        torch.cuda.empty_cache()  # so that memory cached by torch counts as free
        self.most = images_at_once(energy, call.precision, x.device)
        self.logged = call.log is not None
        self.call = call._replace(
            energy=energy, x=x, generator=Generator(x.device), log=None, states=None
        )
        aside = torch.cuda.Stream(x.device)
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            self._advance(2)
        torch.cuda.current_stream().wait_stream(aside)
        self.graphs: dict[int, Any] = {}
        self.logs: dict[int, ChainLog | None] = {}
        for steps in (1, GRAPH_STEPS):
            self.graphs[steps] = torch.cuda.CUDAGraph()
            self.graphs[steps].register_generator_state(self.call.generator)
            with torch.cuda.graph(self.graphs[steps], pool=pool):
                self.logs[steps] = self._advance(steps)

    def _advance(self, steps: int) -> ChainLog | None:
        """What a graph records: prepack the weights as they are at replay, then take the steps."""
        log = ChainLog() if self.logged else None
        with tensor_cores(self.call.precision):
            self.call._replace(log=log).advance(steps, self.most)
        return log

    def run(self, call: _Call) -> Tensor:
        """The end of a chain from ``call.x``; advances the call's generator by the noise drawn."""
        for static, current in zip(
            self.call.energy.parameters(), call.energy.parameters(), strict=True
        ):
            static.copy_(current)
        own = cast(Generator, self.call.generator)
        theirs = call.generator or torch.cuda.default_generators[call.x.get_device()]
        own.set_state(theirs.get_state())
        count = len(call.x)
        state = self.call.x[:count]
        state.copy_(call.x)
        done = 0
        while done < call.config.steps:
            many = call.states is None and call.config.steps - done >= GRAPH_STEPS
            steps = GRAPH_STEPS if many else 1
            if call.states is not None:
                call.states.append(state.clone())
            self.graphs[steps].replay()
            done += steps
            if call.log is not None:
                written = cast(ChainLog, self.logs[steps])
                call.log.energies += [row[:count].clone() for row in written.energies]
                call.log.gradient_norms += [row[:count].clone() for row in written.gradient_norms]
        theirs.set_state(own.get_state())
        return state.clone()


@cache
def _keep_freed_memory(process: int) -> None:
    """Free one large block, so that glibc's allocator keeps smaller ones instead of unmapping them.

    Otherwise returning activations to the system and faulting them in again takes a third of the
    time or more.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


def images_at_once(energy: ConvEnergy, precision: Precision, device: torch.device) -> int:
    """Images per gradient call: as many as fit a CPU's cache or a GPU's memory.

    A larger batch goes through every step in pieces. The noise is drawn for the whole batch, so
    the size of a piece does not change the chain.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return max(1, int(SHARE_OF_FREE_MEMORY * free) // bytes_per_image(energy, precision))
    _, height, width = energy.shape
    widest = cast(nn.Conv2d, energy.layers[0]).out_channels * height * width
    return torch.get_num_threads() * max(SMALLEST_SHARE, CACHED_VALUES // widest)


class FastLangevin:
    """`langevin` for a `ConvEnergy` on a CPU or a CUDA device, in float32 or with less precision.

    State and noise are always float32; ``precision`` is that of the energy's gradient. On a CPU
    tf32 is float32, and so is bfloat16 if the CPU has no kernels for it (see `usable`). The noise
    there is the plain chain's, and the same seed gives the same bits. On CUDA the noise is the
    plain chain's for a batch of `padded_batch` images, and results repeat up to rounding, since
    kernels are chosen by timing. Copies and pickles of an instance drop its CUDA graphs.
    """

    def __init__(self, *, precision: Precision = "float32") -> None:
        self.precision: Precision = check_precision(precision)
        self._graphs: dict[object, _Graphs] = {}
        self._pool: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_graphs": {}, "_pool": None}

    def __call__(
        self,
        energy: EnergyFn,
        x: Tensor,
        config: LangevinConfig,
        *,
        generator: Generator | None,
        log: ChainLog | None = None,
        states: list[Tensor] | None = None,
    ) -> Tensor:
        """K steps from x, (N,C,H,W) float32 in net range -> the same shape; see `langevin`."""
        if not isinstance(energy, ConvEnergy):
            raise ValueError(f"energy: expected a ConvEnergy, got {type(energy).__name__}")
        energy.check(x)
        if x.dtype != torch.float32:
            raise ValueError(f"x: expected float32, got {x.dtype}")
        x = x.detach()
        if config.steps == 0 or len(x) == 0:
            return x
        precision = usable(self.precision, x.device)
        call = _Call(energy, x, config, generator, log, precision, states)
        run = self._replay if x.is_cuda else _run
        if (
            "torch._dynamo" in sys.modules
        ):  # not imported just for this: it takes as long to import as torch itself
            run = torch.compiler.disable(run)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            return run(call)

    def _replay(self, call: _Call) -> Tensor:
        """On CUDA: graphs for this energy, batch and step size, recorded at their first use."""
        shape = (padded_batch(len(call.x)), *call.x.shape[1:])
        logged = call.log is not None
        key = (str(call.energy), shape, call.x.device, call.config.tau, logged)
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(call.x.device):
            if key not in self._graphs:
                self._pool = self._pool or torch.cuda.graph_pool_handle()
                self._graphs[key] = _Graphs(call, self._pool)
            return self._graphs[key].run(call)


def _run(call: _Call) -> Tensor:
    """On a CPU: step by step."""
    _keep_freed_memory(os.getpid())
    x = call.x.clone(memory_format=torch.contiguous_format)
    most = images_at_once(call.energy, call.precision, x.device)
    call._replace(x=x).advance(call.config.steps, most)
    return x
