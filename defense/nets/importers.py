"""Other people's networks: built from an import path, with weights from any file of tensors.

Nothing is unpickled: weights are read by `torch.load(weights_only=True)` or safetensors.
"""

import ast
import importlib
import importlib.util
import pickle
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from defense.inference import logits_in

Statistics = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of pixels in [0, 1], one value or one a channel."""

NORMALIZATIONS: dict[str, Statistics] = {
    "none": ((0.0,), (1.0,)),
    "half": ((0.5,), (0.5,)),  # to [-1, 1]
    "bytes": ((0.0,), (1 / 255,)),  # to 0..255
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "svhn": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
}
"""What classifiers commonly expect, by name."""

SHOWN = 5  # names of weights in an error


class Preprocessed(nn.Module):
    """Pixels in [0, 1], resized and normalized, through a network.

    ``statistics`` are mean and standard deviation; ``size`` is (height, width), or None to resize
    nothing. Resizing is bilinear, antialiased, and has a gradient.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, statistics: Statistics, size: list[int] | None) -> None:
        super().__init__()
        self.network = network
        self.size = size
        mean, std = statistics
        if len(mean) != len(std) or not min(std) > 0:
            raise ValueError(f"std: expected {len(mean)} numbers > 0, got {list(std)}")
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Any:
        """Pixels (B,C,H,W) in [0, 1] -> what the network makes of them."""
        if self.size is not None:
            x = F.interpolate(x, self.size, mode="bilinear", align_corners=False, antialias=True)
        return self.network((x - self.mean) / self.std)


class Logits(nn.Module):
    """A network whose output is reduced to its logits (`defense.inference.logits_in`).

    Their number is not checked, which would fix the size of a batch in `torch.export`.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Images (B,C,H,W) -> logits (B, classes)."""
        return logits_in(self.network(x))


class Energies(nn.Module):
    """An energy whose output, (N,) or (N,1), becomes (N,)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Images (N,C,H,W) in net range -> energies (N,)."""
        found: Tensor = self.network(x)
        return found.flatten()


def build_model(source: str) -> nn.Module:
    """An `nn.Module` from ``package.module:factory(arguments)`` or ``folder/file.py:factory(...)``.

    The module or file is imported, so its code runs. Arguments are literals; a name without a call
    is a module that exists already. `ValueError` says what cannot be found, read or built.
    """
    place, colon, call = source.partition(":")
    if not colon:
        raise ValueError(
            f"{source}: expected a file and what to call in it, such as resnet.py:resnet32(), or "
            "package.module:resnet32()"
        )
    name, arguments, options, called = _parsed(source, call)
    found: Any = _module(source, place)
    for part in name.split("."):
        if not hasattr(found, part):
            names = [n for n in dir(found) if not n.startswith("_") and callable(getattr(found, n))]
            raise ValueError(f"{source}: {place} has no {part}; it has {', '.join(names)}")
        found = getattr(found, part)
    if called:
        try:
            found = found(*arguments, **options)
        except Exception as error:
            raise ValueError(f"{source}: {_reason(error)}") from None
    if not isinstance(found, nn.Module):
        hint = f"; call it, as in {name}()" if callable(found) and not called else ""
        raise ValueError(f"{source}: expected an nn.Module, got {type(found).__name__}{hint}")
    return found


def _parsed(source: str, call: str) -> tuple[str, list[Any], dict[str, Any], bool]:
    """Name, arguments and keyword arguments of a call with literals, and whether it is a call."""
    try:
        expression = ast.parse(call, mode="eval").body
        arguments, options = list[Any](), dict[str, Any]()
        called = isinstance(expression, ast.Call)
        if isinstance(expression, ast.Call):
            arguments = [ast.literal_eval(value) for value in expression.args]
            options = {str(k.arg): ast.literal_eval(k.value) for k in expression.keywords}
            expression = expression.func
        name = ast.unparse(expression)
    except (SyntaxError, ValueError) as error:
        raise ValueError(
            f"{source}: expected a call with plain values, such as resnet(depth=32) ({error})"
        ) from None
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", name):
        raise ValueError(f"{source}: expected the name of what builds the network, got {name!r}")
    return name, arguments, options, called


def _module(source: str, place: str) -> ModuleType:
    """A module by its dotted name, or a Python file, which may import its neighbours."""
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        path = Path(place).resolve()
        if not path.is_file():
            raise ValueError(f"{source}: {place}: no such file")
        name = f"imported_{path.stem}"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        sys.path.insert(0, str(path.parent))
        try:
            spec.loader.exec_module(module)
        finally:
            sys.path.remove(str(path.parent))
        return module
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"{source}: cannot import {place}: {_reason(error)}") from None


def load_weights(network: nn.Module, path: Path) -> None:
    """Weights of a file into a network, whatever wraps them.

    A .safetensors file, or one of `torch.save` (.th, .pth, .pt, .ckpt) with a dictionary of tensors
    anywhere inside, as under `state_dict`, `model` or `net`. A prefix of all names, such as
    `module.` or `model.`, is taken off or replaced by what the network has. `ValueError` for files
    with anything but tensors and plain values, and names the weights that do not fit.
    """
    expected = network.state_dict()
    weights = _renamed(_tensors(path), expected.keys())
    counters = {name for name in expected if name.endswith("num_batches_tracked")}
    missing = list(expected.keys() - weights.keys() - counters)
    unknown = list(weights.keys() - expected.keys())
    others = [
        f"{name} {tuple(weights[name].shape)} for {tuple(expected[name].shape)}"
        for name in expected.keys() & weights.keys()
        if weights[name].shape != expected[name].shape
    ]
    said = {"lacks": missing, "has besides": unknown, "has other shapes": others}
    wrong = [f"{what} {_some(names)}" for what, names in said.items() if names]
    if wrong:
        raise ValueError(f"{path}: not the weights of this network: it {'; it '.join(wrong)}")
    network.load_state_dict(weights, strict=False)


def _tensors(path: Path) -> dict[str, Tensor]:
    """The largest dictionary of tensors in a file."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if not path.read_bytes().startswith((b"PK", b"\x80")):  # as torch.save writes, now and then
            raise ValueError(f"{path}: not a file of weights")
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path}: holds Python objects besides tensors, and loading these may run code. Where "
            "you trust the file, load it and torch.save(model.state_dict(), 'weights.pth')"
        ) from None
    except (OSError, EOFError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{path}: not a file of weights ({_reason(error)})") from None
    found = max(_dictionaries(saved), key=len, default={})
    if not found:
        raise ValueError(f"{path}: has no dictionary of tensors")
    return found


def _dictionaries(saved: object) -> Iterator[dict[str, Tensor]]:
    """The tensors of every dictionary in what was saved."""
    if isinstance(saved, Mapping):
        yield {str(name): value for name, value in saved.items() if isinstance(value, Tensor)}
        for value in saved.values():
            yield from _dictionaries(value)


def _renamed(weights: dict[str, Tensor], expected: Any) -> dict[str, Tensor]:
    """With one prefix of all names replaced by another, so that most are expected."""

    def prefixes(names: Any) -> list[str]:
        parts = next(iter(names), "").split(".")
        return [".".join([*parts[:count], ""]) for count in range(len(parts))]

    def renamed(old: str, new: str) -> dict[str, Tensor]:
        return {new + name.removeprefix(old): value for name, value in weights.items()}

    ways = [(old, new) for old in prefixes(weights) for new in prefixes(expected)]
    best = max(ways, key=lambda way: len(renamed(*way).keys() & set(expected)), default=("", ""))
    return renamed(*best)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(sorted(names)[:SHOWN]) + more


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
