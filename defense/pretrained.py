"""Trained energies from their files: the only module here that reads one."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from defense.energy import ConvEnergy
from defense.inference import freeze


def load_energy(path: str | Path) -> tuple[ConvEnergy, float]:
    """A frozen energy on the CPU, and tau, the step size with which it was trained.

    ``path`` is a safetensors file of `stochsec train-ebm`, such as those in pretrained/; it says
    which network it holds. `FileNotFoundError` if it is not there, `ValueError` if it is something
    else.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["about"])
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        energy, tau = ConvEnergy(**about["architecture"]), float(about["tau"])
        energy.load_state_dict(weights)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: not an energy of `stochsec train-ebm`: {reason}") from None
    return freeze(energy), tau
