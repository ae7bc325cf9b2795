"""Energies and classifiers, loaded from the safetensors files of their training."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from torch import nn

from defense.energy import ConvEnergy
from defense.inference import freeze
from defense.nets.wide_resnet import WideResNet

Network = TypeVar("Network", bound=nn.Module)


def load_energy(path: str | Path) -> tuple[ConvEnergy, float]:
    """A frozen energy on the CPU, and tau, the step size with which it was trained.

    ``path`` is a safetensors file of `stochsec train-ebm`, such as those in pretrained/. It also
    holds the architecture and the training noise (``energy.sigma``). `FileNotFoundError` if there
    is no file, `ValueError` if it is of another kind.
    """
    energy, about = _load(path, ConvEnergy, "an energy of `stochsec train-ebm`", says=("tau",))
    return energy, float(about["tau"])


def load_classifier(path: str | Path) -> WideResNet:
    """A frozen classifier on the CPU, pixels in [0, 1] to logits; errors as in `load_energy`.

    ``path`` is a safetensors file of `stochsec train-classifier`, such as those in pretrained/.
    """
    return _load(path, WideResNet, "a classifier of `stochsec train-classifier`")[0]


def _load(
    path: str | Path, kind: Callable[..., Network], expected: str, *, says: tuple[str, ...] = ()
) -> tuple[Network, dict[str, Any]]:
    """The network that a file describes, with its weights, and the whole description.

    ``says`` names the numbers that the description must have.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            about: dict[str, Any] = json.loads((file.metadata() or {})["about"])
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        network = kind(**about["architecture"])
        for name in says:
            float(about[name])
        network.load_state_dict(weights)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: not {expected}: {reason}") from None
    return freeze(network), about
