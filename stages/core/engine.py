"""Which implementation of the chain runs."""

from functools import cache

from defense.energy import ConvEnergy
from defense.fast.langevin import FastLangevin, bytes_per_image, images_at_once
from defense.fast.precision import Precision, tensor_cores, usable
from defense.langevin import Chain, langevin
from stages import StageError
from stages.core.console import detail, watched
from stages.core.hardware import Hardware, engine_name

SHORT = 4  # steps below which laying the weights out costs a CPU more than it gains


def choose_chain(energy: ConvEnergy, steps: int, precision: Precision, hardware: Hardware) -> Chain:
    """The fast chain, unless the job is too short for it or the reference was asked for.

    `StageError` if the reference is to compute in bfloat16, which only the fast chain can.
    """
    name, device = engine_name(), hardware.device.type
    if name == "plain" and precision == "bfloat16":
        raise StageError("STOCHSEC_ENGINE: plain computes in float32 or tf32, not in bfloat16")
    short = device == "cpu" and steps < SHORT and precision != "bfloat16"
    if name == "plain" or (name == "auto" and short):
        why = "asked for" if name == "plain" else f"fewer than {SHORT} steps a call"
        _say_once(f"engine: plain, {precision}, {steps} steps ({why})")
        return watched(plain_chain(precision))
    computed = usable(precision, hardware.device)
    kib = bytes_per_image(energy, computed) / 1024
    at_once = images_at_once(energy, computed, hardware.device)
    how = "CUDA graphs" if device == "cuda" else "library kernels, weights laid out once a call"
    _say_once(
        f"engine: fast, {computed}, {steps} steps ({how}; activations {kib:.0f} KiB an image, "
        f"{at_once} images at once)"
    )
    return watched(_fast(precision))


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
