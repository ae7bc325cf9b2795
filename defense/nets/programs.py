"""Networks as files without Python code: torch.export (.pt2) and TorchScript (.pt).

A file that `save_program` wrote also says what the network was made of.
"""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from defense.inference import freeze

Kind = TypeVar("Kind", bound="Program")

EXPORTED, SCRIPTED = ".pt2", ".pt"
DESCRIPTION = "made_of.json"  # a file inside the archive


class Program(nn.Module):
    """A program, which stays in the mode that it was saved in; images (B,C,H,W) -> what it returns.

    ``about`` is its description, empty if the file has none.
    """

    def __init__(self, program: nn.Module, about: Mapping[str, Any]) -> None:
        super().__init__()
        self.program = program
        self.about = dict(about)

    def train(self, mode: bool = True) -> Self:
        """There is no other mode."""
        return self

    def forward(self, x: Tensor) -> Any:
        return self.program(x)


class EnergyProgram(Program):
    """Images (N,C,H,W) in net range [-1, 1] -> energies (N,), any network of any architecture.

    Its output is scaled as that of `defense.ConvEnergy`, so that one Langevin step is
    x - grad f(x) + tau z. The description states ``shape`` (C,H,W), ``tau``, and ``sigma`` or null,
    the noise on its training images. `ValueError` if it does not.
    """

    def __init__(self, program: nn.Module, about: Mapping[str, Any]) -> None:
        super().__init__(program, about)
        try:
            channels, height, width = about["shape"]
            self.shape = int(channels), int(height), int(width)
            self.tau = float(about["tau"])
            self.sigma = None if about["sigma"] is None else float(about["sigma"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"does not state the shape, tau and sigma of an energy ({error!r})"
            ) from None
        self.architecture = {"activation": "its own"}

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1:] != self.shape:
            expected = "(N,{},{},{})".format(*self.shape)
            raise ValueError(f"x: expected images {expected}, got shape {tuple(x.shape)}")
        energies: Tensor = super().forward(x)
        return energies.flatten()


def load_program(path: Path, kind: type[Kind]) -> Kind:
    """A frozen program of ``kind`` from a .pt2 file of torch.export or a .pt file of TorchScript.

    `ValueError` for another file. TorchScript is put into evaluation mode.
    """
    files = {DESCRIPTION: ""}
    try:
        if path.suffix == EXPORTED:
            program = torch.export.load(path, extra_files=files).module()
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                program = torch.jit.load(path, map_location="cpu", _extra_files=files).eval()
    except Exception as error:  # they raise many kinds for a file that is none of theirs
        reason = " ".join(str(error).split())[:200]
        name = "torch.export" if path.suffix == EXPORTED else "TorchScript"
        raise ValueError(f"not a program of {name} ({reason})") from None
    about = json.loads(files[DESCRIPTION] or "{}")
    return freeze(kind(program, about))


def save_program(network: nn.Module, x: Tensor, about: Mapping[str, Any], path: Path) -> None:
    """Write a network as a .pt2 file, for batches of any size of images like x (B,C,H,W), B > 1.

    `ValueError` if torch.export cannot follow it.
    """
    batch = {0: torch.export.Dim("batch")}
    try:
        program = torch.export.export(network, (x,), dynamic_shapes=(batch,))
    except Exception as error:  # of many kinds
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"torch.export cannot follow this network ({reason}); in Python it can be defended as "
            "it is, see defense.EOTDefense"
        ) from None
    torch.export.save(program, path, extra_files={DESCRIPTION: json.dumps(about)})
