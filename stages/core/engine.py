"""Which implementation of the chain runs."""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

from torch import Tensor, nn

from defense.energy import ConvEnergy
from defense.fast.langevin import FastLangevin, bytes_per_image, images_at_once
from defense.fast.precision import Precision, tensor_cores, usable
from defense.langevin import Chain, EnergyFn, LangevinConfig, langevin
from stages import StageError
from stages.core.console import Track, detail
from stages.core.hardware import Hardware, engine_name

SHORT = 4  # steps below which laying the weights out costs a CPU more than it gains


def choose_chain(energy: nn.Module, steps: int, precision: Precision, hardware: Hardware) -> Chain:
    """The fast chain, unless the job is too short for it or the reference was asked for.

    An energy that is no `ConvEnergy` has the reference only, and in float32 if bfloat16 is wanted.

    `StageError` if the reference is to compute in bfloat16, which only the fast chain can.
    """
    precision = usable(precision, hardware.device)
    name, device = engine_name(), hardware.device.type
    if not isinstance(energy, ConvEnergy):
        precision = "float32" if precision == "bfloat16" else precision
        _say_once(f"engine: plain, {precision}, {steps} steps (no ConvEnergy)")
        return watched(plain_chain(precision))
    if name == "plain" and precision == "bfloat16":
        raise StageError("STOCHSEC_ENGINE: plain computes in float32 or tf32, not in bfloat16")
    short = device == "cpu" and steps < SHORT and precision != "bfloat16"
    if name == "plain" or (name == "auto" and short):
        why = "asked for" if name == "plain" else f"fewer than {SHORT} steps a call"
        _say_once(f"engine: plain, {precision}, {steps} steps ({why})")
        return watched(plain_chain(precision))
    kib = bytes_per_image(energy, precision) / 1024
    at_once = images_at_once(energy, precision, hardware.device)
    how = "CUDA graphs" if device == "cuda" else "library kernels, weights laid out once a call"
    _say_once(
        f"engine: fast, {precision}, {steps} steps ({how}; activations {kib:.0f} KiB an image, "
        f"{at_once} images at once)"
    )
    return watched(_fast(precision))


def counted(chain: Chain, count: Callable[[int], None]) -> Chain:
    """A chain (`defense.langevin.Chain`) that tells ``count`` how many image-steps it took."""

    @wraps(chain, updated=())
    def run(energy: EnergyFn, x: Tensor, config: LangevinConfig, **options: Any) -> Tensor:
        end = chain(energy, x, config, **options)
        count(len(x) * config.steps)
        return end

    return run


def watched(chain: Chain) -> Chain:
    """A chain whose steps the running progress line counts."""

    def count(image_steps: int) -> None:
        if Track.running is not None:
            Track.running.image_steps += image_steps
            Track.running.show()

    return counted(chain, count)


@cache
def _fast(precision: Precision) -> FastLangevin:
    """One for the whole process: it keeps its CUDA graphs."""
    return FastLangevin(precision=precision)


@cache
def plain_chain(precision: Precision) -> Chain:
    """The reference, on CUDA in the float32 or tf32 that was asked for."""
    return tensor_cores(precision)(langevin)


@cache
def _say_once(message: str) -> None:
    detail(message)
