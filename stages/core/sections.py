"""The sections of params.yaml: every number with its kind and its bounds. No torch here."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Count = Annotated[int, Field(ge=1, strict=True)]
CountOrNone = Annotated[int, Field(ge=0, strict=True)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Precision = Literal["float32", "tf32", "bfloat16"]
NAME = r"^[a-z0-9_]+$"
Name = Annotated[str, Field(pattern=NAME)]
Activation = Literal["leaky_relu", "smooth_leaky_relu", "silu", "softplus"]


def _ascending(name: str, grid: tuple[float, ...]) -> None:
    """`ValueError` for a grid that does not ascend."""
    if list(grid) != sorted(set(grid)):
        raise ValueError(f"{name}: expected ascending numbers, got {list(grid)}")


class Section(BaseModel):
    """A part of params.yaml: every key is required, no other key is allowed."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Schedule(Section):
    """How long a classifier is trained, at what learning rate."""

    epochs: Count
    learning_rate: Positive
    schedule: Literal["step", "one_cycle"]
    milestones: tuple[Count, ...]
    warm_up: Fraction


class ClassifierTraining(Section):
    """What both trainings share; with a `Schedule` it is a `defense.ClassifierTrainConfig`."""

    batch: Annotated[int, Field(ge=2, strict=True)]
    momentum: Fraction
    weight_decay: NotNegative
    crop: CountOrNone
    flip: bool
    precision: Precision


class AdversarialTraining(Schedule):
    """The baseline of Madry et al. (2018): PGD in the l_inf ball moves every training batch."""

    eps_255: NotNegative
    steps: CountOrNone
    step_255: NotNegative


class Shape(Section):
    """Image size (one side, or height and width), channels and number of classes of a dataset."""

    image_size: int | tuple[int, int]
    channels: Literal[1, 3]
    classes: Annotated[int, Field(ge=2)]

    @property
    def image(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        size = self.image_size
        return self.channels, *((size, size) if isinstance(size, int) else size)

    @model_validator(mode="after")
    def _energy_can_halve_it(self) -> Self:
        """As `defense.ConvEnergy` does, until no side is longer than 4."""
        _, height, width = self.image
        shorter, longer = sorted((height, width))
        if shorter < 4:
            raise ValueError(f"image_size: expected >= 4, got {shorter}")
        while longer > 4:
            shorter, longer = shorter // 2, longer // 2
        if not shorter:
            raise ValueError(
                f"image_size: {height}x{width} is too narrow for the energy, which halves images "
                "until no side is longer than 4"
            )
        return self


class Dataset(Section):
    """What differs between datasets."""

    source: Literal["embedded", "torchvision", "npz", "folder"]
    path: str | None
    shape: Shape
    train_images: Annotated[int, Field(ge=2, strict=True)] | None
    test_images: Count | None
    held_out: CountOrNone
    judged_on: Literal["test", "held_out"]
    tau: Positive
    data_noise: NotNegative
    adam_lr: Positive
    sgd_lr: Positive
    training: ClassifierTraining
    classifier: Schedule
    adversarial: AdversarialTraining

    @model_validator(mode="after")
    def _something_is_held_out(self) -> Self:
        if self.judged_on == "held_out" and not self.held_out:
            raise ValueError("judged_on: held_out expects held_out >= 1, got 0")
        return self


class Classifier(Section):
    """Size of the Wide ResNet; depth is 6 n + 4."""

    depth: Annotated[int, Field(ge=10)]
    width: Count

    @model_validator(mode="after")
    def _depth_fits(self) -> Self:
        if (self.depth - 4) % 6:
            raise ValueError(f"depth: expected 6 n + 4, got {self.depth}")
        return self


class Energy(Section):
    """Size and activation of the energy network, and of the one with gradients to attack."""

    width: Count
    activation: Activation
    smooth_activation: Activation


class Update(Section):
    """One batch of Algorithm 2."""

    batch: Count
    steps: Count
    precision: Precision
    bank: Count | None
    life: Count | None
    coupled: bool
    mirror: bool
    average: Fraction

    @model_validator(mode="after")
    def _switches_fit(self) -> Self:
        """``life`` and ``coupled`` require chains that start at data (``bank``)."""
        if self.bank is None:
            for name, value in (("life", self.life), ("coupled", self.coupled)):
                if value:
                    raise ValueError(f"{name}: expects chains that start at data (bank), got none")
        elif self.batch > self.bank:
            raise ValueError(f"batch: expected <= bank = {self.bank}, got {self.batch}")
        return self


class EBM(Section):
    """Algorithm 2."""

    update: Update
    phase_1_batches: Count
    phase_2_batches: Count
    snapshots: Count
    phase_2: Literal["sgd", "cosine"]


class Langevin(Section):
    """The defense: chain lengths and replicas."""

    K: Count
    K_short: Count
    H_adv: Count
    H_def: Count
    precision: Precision
    denoise: bool


class PGD(Section):
    """Size of one attack."""

    images: Count
    steps: CountOrNone
    restarts: Count


class Transfer(Section):
    """How transferred images are judged."""

    images: Count
    replicas: Count


class SequentialTest(Section):
    """The fields of `defense.verdict.Sequential`."""

    error: Annotated[float, Field(gt=0, lt=1)]
    first: Annotated[int, Field(ge=2, strict=True)]
    clip: Positive


class NamedAttack(Section):
    """One attack on the defense; ``scale`` multiplies eps_255 and step_255.

    Without ``stop_at_break`` it runs all steps, so that the saved images are as strong as possible.
    ``H_adv``: replicas for losses and gradients; None means langevin.H_adv. ``energy``: the only
    energy that an evaluation attacks with it; None means both.
    """

    rule: Literal["pgd", "apgd", "square", "noise"]
    gradient: Literal["identity", "exact", "smoothed", "none"]
    loss: Literal["cross_entropy", "margin", "dlr"]
    steps: CountOrNone
    restarts: Count
    scale: NotNegative
    stop_at_break: bool
    H_adv: Count | None = None
    energy: Literal["convergent", "smooth_convergent"] | None = None

    def left_out(self, energy: str, *, corners: bool) -> str | None:
        """Why an evaluation of an energy skips this attack; None if it does not.

        ``corners``: whether the energy has a ReLU or leaky ReLU.
        """
        if self.energy not in (None, energy):
            return f"it is for the energy {self.energy}"
        if self.gradient == "smoothed" and not corners:
            return f"{energy} has no corners to smooth"
        return None

    def mode(self) -> Literal["identity", "exact", "smoothed"]:
        """How the surrogate differentiates its chains, if it is asked to."""
        return "identity" if self.gradient == "none" else self.gradient

    @model_validator(mode="after")
    def _gradient_fits(self) -> Self:
        if (self.rule in ("pgd", "apgd")) == (self.gradient == "none"):
            expected = "none" if self.gradient != "none" else "identity, exact or smoothed"
            raise ValueError(f"gradient: rule {self.rule} expects {expected}, got {self.gradient}")
        return self


class SystemAttack(NamedAttack):
    """An attack on every system; ``images`` None: as many as all.

    ``gradient`` best: exact where the purifier has a gradient, else identity. ``noise`` known: the
    attacker holds the generator of the defender.
    """

    gradient: Literal["identity", "exact", "best", "none"]  # type: ignore[assignment]
    noise: Literal["unknown", "known"] = "unknown"
    images: Count | None = None


class Certificate(Section):
    """Of smoothed classifiers (Cohen et al. 2019): sizes, and an attack that must not break it."""

    select: Count
    estimate: Count
    alpha: Annotated[float, Field(gt=0, lt=1)]
    l2_255: Positive
    steps: CountOrNone


class Systems(Section):
    """Other purification defenses under one suite of attacks; ``settings`` by `defense.SYSTEMS`."""

    images: Count
    H_adv: Count
    H_def: Count
    attacks: dict[Name, SystemAttack]
    certificate: Certificate
    settings: dict[Name, dict[str, Any]]


class ActiveTest(Section):
    """Planted adversarial images that one of the attacks has to find."""

    images: Count
    attack: Name
    points: Annotated[int, Field(ge=2, strict=True)]


class Evaluate(Section):
    """The attacks of an evaluation, by name."""

    images: Count
    draws: Count
    softness: Positive
    early_verdicts: bool
    active_test: ActiveTest
    attacks: dict[Name, NamedAttack]

    @model_validator(mode="after")
    def _tested_attack_exists(self) -> Self:
        if self.active_test.attack not in self.attacks:
            raise ValueError(
                f"active_test.attack: expected one of {list(self.attacks)}, "
                f"got {self.active_test.attack!r}"
            )
        return self


class Threat(Section):
    """The ball of an attack, and the length of its steps."""

    norm: Literal["linf", "l2"]
    eps_255: NotNegative
    step_255: NotNegative

    @property
    def step_share(self) -> float:
        """Length of a step in radii (alpha / eps); the paper's where there is no radius."""
        return self.step_255 / self.eps_255 if self.eps_255 else 0.25


class Attack(Section):
    """The threat model and the attacks of Tables 1 to 3."""

    threat: Threat
    shard: Count
    sequential: SequentialTest
    early_verdicts: bool
    pgd: PGD
    transfer: Transfer
    bpda_eot: PGD


class CompareAttack(Section):
    """BPDA+EOT at every K of the comparison; no images, no attack."""

    images: CountOrNone
    steps: CountOrNone
    H_adv: Count
    H_def: Count


class Compare(Section):
    """Convergent against non-convergent learning."""

    K: Annotated[tuple[CountOrNone, ...], Field(min_length=1)]
    images: Count
    replicas: Count
    bpda_eot: CompareAttack

    @model_validator(mode="after")
    def _grid_ascends(self) -> Self:
        _ascending("K", self.K)
        return self


class Sweep(Section):
    """Figures 5 and 6: Algorithm 1 of this size over the radius, and over the replicas."""

    images: Count
    steps: CountOrNone
    H_adv: Count
    H_def: Count
    linf_255: Annotated[tuple[Positive, ...], Field(min_length=1)]
    l2_255: Annotated[tuple[Positive, ...], Field(min_length=1)]
    attacker_replicas: Annotated[tuple[Count, ...], Field(min_length=1)]
    defender_replicas: Annotated[tuple[Count, ...], Field(min_length=1)]

    def radii(self, norm: Literal["linf", "l2"]) -> tuple[float, ...]:
        """Those of a norm, in 1/255 of the pixel range."""
        return self.linf_255 if norm == "linf" else self.l2_255

    @model_validator(mode="after")
    def _grids_ascend(self) -> Self:
        for name in ("linf_255", "l2_255", "attacker_replicas", "defender_replicas"):
            _ascending(name, getattr(self, name))
        return self


class Snapshots(Section):
    """Figure 2: samples over training."""

    long_steps: Count


class Lyapunov(Section):
    """Figure 8: the maximal Lyapunov exponent over the strength of the noise."""

    eta: Annotated[tuple[Positive, ...], Field(min_length=1)]
    chains: Count
    burn_in: Count
    steps: Count
    every: Count
    separations: Annotated[tuple[Positive, ...], Field(min_length=1, max_length=4)]

    @model_validator(mode="after")
    def _grid_ascends(self) -> Self:
        _ascending("eta", self.eta)
        _ascending("separations", self.separations)
        for name, steps in (("burn_in", self.burn_in), ("steps", self.steps)):
            if steps % self.every:
                raise ValueError(
                    f"{name}: expected a multiple of every = {self.every}, got {steps}"
                )
        return self


class FID(Section):
    """Figure 9: Frechet distance to the training images along chains from them."""

    K: Annotated[tuple[CountOrNone, ...], Field(min_length=1)]
    images: Annotated[int, Field(ge=2, strict=True)]
    features: Literal["inception", "classifier"]

    @model_validator(mode="after")
    def _grid_ascends(self) -> Self:
        _ascending("K", self.K)
        return self


class Inspect(Section):
    """Long chains under an energy."""

    chains: Annotated[int, Field(ge=1, le=500, strict=True)]
    long_steps: Count
    levels: Annotated[tuple[Count, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _grid_ascends(self) -> Self:
        _ascending("levels", self.levels)
        return self


class Diagnose(Section):
    """Logit histograms."""

    images: Count
    replicas: Count
    H: Annotated[tuple[Count, ...], Field(min_length=1)]
