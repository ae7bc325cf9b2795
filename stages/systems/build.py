"""A system of params.yaml, or a purifier of one's own, with its networks: what is attacked."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn

from defense.eot import EOTDefense
from defense.gradient.chain import GradientMode
from defense.inference import flops, freeze
from defense.nets.importers import build_model
from defense.purifier import LangevinPurifier, Purifier, Reversible
from defense.rng import make_generator
from defense.systems import SYSTEMS, Fit, System
from defense.systems.hill import Hill
from stages import StageError
from stages.core.artifacts import all_finite, load_tensors
from stages.core.classifiers import load_classifier
from stages.core.energies import load_energy
from stages.core.files import Paths
from stages.core.hardware import Hardware
from stages.core.params import Params
from stages.core.sections import Systems

TRIED = 8  # images to see whether a purifier draws noise


@dataclass(frozen=True)
class Built:
    """A system with trained networks; ``files`` are those it was read from, by role."""

    name: str
    system: System | None  # None: a purifier of one's own
    bare: nn.Module  # the classifier to be defended
    classifier: nn.Module  # the one that sees purified images: the bare one, or trained on them
    purifier: Purifier
    files: dict[str, Path]
    seed: int
    max_chains: int
    random: bool = field(init=False)  # whether it draws noise
    shape: tuple[int, int, int]

    def __post_init__(self) -> None:
        x = torch.rand(TRIED, *self.shape, generator=make_generator(0, "images to purify"))
        device = next(self.classifier.parameters()).device
        one, other = (
            self.purifier(x.to(device), generator=make_generator(seed, device=device))
            for seed in (1, 2)
        )
        object.__setattr__(self, "random", not torch.equal(one, other))

    @property
    def has_gradient(self) -> bool:
        """Whether the purifier has a gradient besides BPDA's identity."""
        differentiable = bool(getattr(self.purifier, "differentiable", False))
        return differentiable or isinstance(self.purifier, Reversible)

    def defense(
        self, replicas: int, purpose: str, gradient: GradientMode = "identity"
    ) -> EOTDefense:
        """The defended classifier; one replica if it draws no noise. Each purpose has own noise."""
        return EOTDefense(
            self.classifier,
            self.purifier,
            replicas=replicas if self.random else 1,
            max_chains=self.max_chains,
            seed=f"{self.seed}/systems/{self.name}/{purpose}",
            gradient=gradient,
        )

    def cost(self, replicas: int, gradient: GradientMode | None) -> float:
        """Operations of one look at the defense, relative to a forward pass of its classifier.

        With its ``gradient``, or None: without. Only convolutions and matrix products count.
        """
        device = next(self.classifier.parameters()).device
        x = torch.rand(1, *self.shape, generator=make_generator(0, "one image")).to(device)
        back = gradient is not None
        once = flops(self.classifier, x, back=False)
        if isinstance(self.purifier, LangevinPurifier):  # whose chains the counter cannot follow
            # The way back runs the chain again, and a Hessian product costs as two of its steps.
            step = flops(self.purifier.energy, x) * (4 if gradient == "exact" else 1)
            steps = self.purifier.config.steps
            return replicas * (steps * step + flops(self.classifier, x, back=back)) / once
        return flops(self.defense(replicas, "cost", gradient or "identity"), x, back=back) / once


def section_of(params: Params) -> Systems:
    """The section `systems`, or an error that says where it is."""
    if params.systems is None:
        raise StageError(
            "systems: params.yaml has no such section; `stochsec preset systems` writes one"
        )
    return params.systems


def system_of(params: Params, name: str) -> System:
    """The system of that name with its settings, or `StageError`."""
    settings = section_of(params).settings
    if name not in settings or name not in SYSTEMS:
        known = [name for name in settings if name in SYSTEMS]
        raise StageError(f"system: expected one of {known}, or FILE.py:NAME(), got {name!r}")
    kind, values = SYSTEMS[name], dict(settings[name])
    try:
        if values.get("fit"):
            values["fit"] = Fit(**values["fit"])
        if issubclass(kind, Hill):
            chain = params.langevin
            tau = params.dataset(params.compare_dataset).tau
            values |= {"steps": chain.K, "tau": tau, "denoise": chain.denoise}
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise StageError(f"systems.settings.{name}: {error}") from None


def settings_of(system: System) -> dict[str, object]:
    """The settings of a system, for its record."""
    return asdict(system)


def network_file(params: Params, name: str) -> Path:
    """Where the trained network of a system is."""
    return Paths(params.run, params.compare_dataset).model(f"system_{name}")


def build(
    params: Params, name: str, hardware: Hardware, *, classifier: Path, network: Path | None
) -> Built:
    """A system ready to be attacked; `StageError` for files that are missing or do not fit.

    ``name`` of a system in params.yaml, or FILE.py:NAME(...) of a module that purifies.
    """
    dataset = params.compare_dataset
    shape = params.dataset(dataset).shape.image
    bare = load_classifier(params, dataset, hardware, classifier)
    files, seed, chains = {"classifier": classifier}, params.seed, hardware.max_chains
    if ":" in name:
        try:
            own = freeze(build_model(name)).to(hardware.device)
        except ValueError as error:
            raise StageError(str(error)) from None
        return Built(name, None, bare, bare, own, files, seed, chains, shape=shape)
    system = system_of(params, name)
    trained: nn.Module | None
    if isinstance(system, Hill):
        if network is None:
            raise StageError(f"network: {name} expects the file of an energy")
        trained = load_energy(params, dataset, hardware, network)
    else:
        trained = system.network(shape, bare)
        network = network or network_file(params, name)
    if trained is not None:
        files["network"] = network
        if not isinstance(system, Hill):
            load_network(trained, network, name)
            freeze(trained.to(hardware.device))
    judge = system.classifier(bare, trained)
    purifier = system.purifier(trained)
    return Built(name, system, bare, judge, purifier, files, seed, chains, shape=shape)


def load_network(network: nn.Module, path: Path, name: str) -> None:
    """The weights that `train-system` wrote."""
    tensors, _ = load_tensors(path)
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise StageError(f"{path}: not the network of {name}: {reason}") from None
    if not all_finite(tensors):
        raise StageError(f"{path}: its weights are NaN or infinite: its training has diverged")
