"""params.yaml as typed, validated sections. No torch here: a wrong value is reported at once."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from stages import StageError

PRESETS = Path(__file__).parent.parent / "presets"

# PGD on a classifier by itself, and how that was trained.
PGD_ATTACKS = {"pgd": "natural", "pgd_adversarial": "adversarial"}
TABLE_ATTACKS = (*PGD_ATTACKS, "transfer_K_short", "transfer_K", "bpda_eot")
TRANSFER = "transfer"  # of every evaluation: the images of the PGD on the bare classifier
MODELS = ("convergent", "nonconvergent")
SMOOTH = "smooth_"  # phases that train the energy of energy.smooth_activation
NORMS: tuple[Literal["linf"], Literal["l2"]] = ("linf", "l2")
TRAININGS = ("natural", "adversarial")  # how a classifier is trained
PHASES = ("adam", *MODELS, f"{SMOOTH}adam", f"{SMOOTH}convergent")
EVALUATED = ("convergent", f"{SMOOTH}convergent")
INSPECTED = ("convergent", "nonconvergent", f"{SMOOTH}convergent")

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


class ClassifierTraining(Schedule):
    """SGD; the fields of `defense.ClassifierTrainConfig`."""

    batch: Count
    momentum: Fraction
    weight_decay: NotNegative
    crop: CountOrNone
    flip: bool
    precision: Precision


class AdversarialTraining(Schedule):
    """The baseline of Madry et al. (2018): PGD in the l_inf ball moves every training batch.

    Batches, momentum, decay, crops and precision are those of natural training.
    """

    eps_255: NotNegative
    steps: CountOrNone
    step_255: NotNegative

    def own_schedule(self) -> dict[str, Any]:
        """What differs from natural training but for the adversary."""
        return self.model_dump(include=set(Schedule.model_fields))


class Dataset(Section):
    """What differs between datasets."""

    source: Literal["embedded", "torchvision", "npz", "folder"]
    path: str | None
    image_size: Annotated[int, Field(ge=4)]
    channels: Literal[1, 3]
    classes: Annotated[int, Field(ge=2)]
    train_images: Count | None
    test_images: Count | None
    tau: Positive
    data_noise: NotNegative
    adam_lr: Positive
    sgd_lr: Positive
    classifier: ClassifierTraining
    adversarial: AdversarialTraining


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


class EBM(Section):
    """Algorithm 2."""

    batch: Count
    steps: Count
    adam_batches: Count
    sgd_batches: Count
    precision: Precision
    snapshots: Count


class Langevin(Section):
    """The defense: chain lengths and replicas."""

    K: Count
    K_short: Count
    H_adv: Count
    H_def: Count
    precision: Precision


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


class NamedAttack(Section):
    """One attack on the defense; ``scale`` multiplies attack.eps_255 and attack.step_255.

    Without ``stop_at_break`` it goes on to the end, for the strongest images to judge afresh.
    """

    rule: Literal["pgd", "apgd", "square", "noise"]
    gradient: Literal["identity", "exact", "smoothed", "none"]
    loss: Literal["cross_entropy", "margin", "dlr"]
    steps: CountOrNone
    restarts: Count
    scale: NotNegative
    stop_at_break: bool

    def mode(self) -> Literal["identity", "exact", "smoothed"]:
        """How the surrogate differentiates its chains, if it is asked to."""
        return "identity" if self.gradient == "none" else self.gradient

    @model_validator(mode="after")
    def _gradient_fits(self) -> Self:
        if (self.rule in ("pgd", "apgd")) == (self.gradient == "none"):
            expected = "none" if self.gradient != "none" else "identity, exact or smoothed"
            raise ValueError(f"gradient: rule {self.rule} expects {expected}, got {self.gradient}")
        return self


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

    @model_validator(mode="after")
    def _names_are_free(self) -> Self:
        for name in self.attacks:
            if name in (*TABLE_ATTACKS, TRANSFER):
                raise ValueError(f"attacks: {name!r} is the name of another attack")
        return self


class Attack(Section):
    """The threat model and the attacks of Tables 1 to 3."""

    norm: Literal["linf", "l2"]
    eps_255: NotNegative
    step_255: NotNegative
    shard: Count
    sequential: SequentialTest
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
    features: Literal["auto", "inception", "classifier"]

    @model_validator(mode="after")
    def _grid_ascends(self) -> Self:
        _ascending("K", self.K)
        return self


class Inspect(Section):
    """Long chains under an energy."""

    chains: Annotated[int, Field(ge=1, le=500, strict=True)]
    long_steps: Count


class Diagnose(Section):
    """Logit histograms."""

    images: Count
    replicas: Count
    H: Annotated[tuple[Count, ...], Field(min_length=1)]


class Params(Section):
    """The whole of params.yaml."""

    run: Name
    seed: CountOrNone
    datasets: Annotated[tuple[Name, ...], Field(min_length=1)]
    compare_dataset: Name
    data: dict[Name, Dataset]
    classifier: Classifier
    energy: Energy
    ebm: EBM
    langevin: Langevin
    attack: Attack
    evaluate: Evaluate
    compare: Compare
    sweep: Sweep
    snapshots: Snapshots
    lyapunov: Lyapunov
    fid: FID
    inspect: Inspect
    diagnose: Diagnose
    _origin: Path = PrivateAttr(default=Path("params.yaml"))

    @model_validator(mode="after")
    def _datasets_have_sections(self) -> Self:
        for name in self.datasets:
            if name not in self.data:
                raise ValueError(f"datasets: expected names among {list(self.data)}, got {name!r}")
        if self.compare_dataset not in self.datasets:
            raise ValueError(
                f"compare_dataset: expected one of {list(self.datasets)}, "
                f"got {self.compare_dataset!r}"
            )
        return self

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        pgd = ("attack.pgd.images", self.attack.pgd.images)
        compared = ("compare.images", self.compare.images)
        drawn = ("attack.sequential.first", self.attack.sequential.first)
        for name, size, (whole, most) in (
            ("attack.transfer.images", self.attack.transfer.images, pgd),
            ("evaluate.images", self.evaluate.images, pgd),
            ("compare.images", self.compare.images, pgd),
            ("diagnose.images", self.diagnose.images, pgd),
            ("sweep.images", self.sweep.images, pgd),
            ("lyapunov.chains", self.lyapunov.chains, pgd),
            ("compare.bpda_eot.images", self.compare.bpda_eot.images, compared),
            ("evaluate.draws", self.evaluate.draws, drawn),
            ("diagnose.H", max(self.diagnose.H), ("diagnose.replicas", self.diagnose.replicas)),
            ("langevin.K", self.langevin.K, ("inspect.long_steps", self.inspect.long_steps)),
        ):
            if size > most:
                raise ValueError(f"{name}: expected <= {whole} = {most}, got {size}")
        return self

    @model_validator(mode="after")
    def _attacks_can_be_run(self) -> Self:
        classes = self.data[self.compare_dataset].classes
        for name, named in self.evaluate.attacks.items():
            where = f"evaluate.attacks.{name}"
            if named.rule == "square" and self.attack.norm != "linf":
                raise ValueError(f"{where}.rule: square expects attack.norm linf")
            if named.loss == "dlr" and classes < 3:
                raise ValueError(f"{where}.loss: dlr expects at least 3 classes, got {classes}")
        tested = self.evaluate.attacks[self.evaluate.active_test.attack]
        if tested.loss == "dlr" or tested.scale == 0:
            raise ValueError(
                "evaluate.active_test.attack: expected one with a radius and another loss than dlr "
                f"(there are two classes), got {self.evaluate.active_test.attack!r}"
            )
        return self

    @model_validator(mode="after")
    def _run_is_not_relabelled(self) -> Self:
        """The name of a preset belongs to that preset's datasets: results must not be mixed up."""
        preset = PRESETS / f"{self.run}.yaml"
        if preset.exists():
            theirs = yaml.safe_load(preset.read_text())["datasets"]
            if not set(theirs) & set(self.datasets):
                raise ValueError(
                    f"run: {self.run!r} is the preset for {', '.join(theirs)}, got datasets "
                    f"{list(self.datasets)}; give your own experiment a name of its own"
                )
        return self

    def attacks(self) -> list[str]:
        """Every attack that there is."""
        return [*TABLE_ATTACKS, TRANSFER, *self.evaluate.attacks]

    def named(self, attack: str) -> NamedAttack | None:
        """What an attack on the defense does; None for PGD on the bare classifier and transfers."""
        if attack == "bpda_eot":
            size = self.attack.bpda_eot
            return NamedAttack(
                rule="pgd",
                gradient="identity",
                loss="cross_entropy",
                steps=size.steps,
                restarts=size.restarts,
                scale=1.0,
                stop_at_break=True,
            )
        return self.evaluate.attacks.get(attack)

    def images(self, attack: str) -> int:
        """How many test images an attack is run on."""
        section = self.attack
        sizes = dict.fromkeys(PGD_ATTACKS, section.pgd.images) | {
            "bpda_eot": section.bpda_eot.images
        }
        if attack in TABLE_ATTACKS:
            return sizes.get(attack, section.transfer.images)
        return self.evaluate.images

    def early_verdicts(self, attack: str) -> bool:
        """Tables 1-3 count all replicas, as the paper does; an evaluation need not."""
        return attack not in TABLE_ATTACKS and self.evaluate.early_verdicts

    def conditions(self, attack: str) -> dict[str, object]:
        """What an attack's accuracy depends on: stated in the record, checked by the report."""
        section, langevin = self.attack, self.langevin
        named = self.named(attack)
        size, scale = (named, named.scale) if named else (section.pgd, 1.0)
        takes_steps = named is None or named.rule == "pgd"
        shown: dict[str, object] = {
            "norm": section.norm,
            "eps_255": section.eps_255 * scale,
            **({"step_255": section.step_255 * scale} if takes_steps else {}),
            "steps": size.steps,
            "restarts": size.restarts,
        }
        if named:
            shown |= {"rule": named.rule, "gradient": named.gradient, "loss": named.loss}
            shown |= {"K": langevin.K, "H_adv": langevin.H_adv, "H_def": langevin.H_def}
            shown |= {"stop_at_break": named.stop_at_break}
            if named.gradient == "smoothed":
                shown["softness"] = self.evaluate.softness
        elif attack not in PGD_ATTACKS:
            steps = langevin.K_short if attack == "transfer_K_short" else langevin.K
            table = attack in TABLE_ATTACKS
            shown |= {"K": steps, "H_def": section.transfer.replicas if table else langevin.H_def}
        if attack not in PGD_ATTACKS:
            shown["precision"] = langevin.precision
            shown |= {f"sequential_{k}": v for k, v in section.sequential.model_dump().items()}
            shown["early_verdicts"] = self.early_verdicts(attack)
        return shown

    def sweep_conditions(self) -> dict[str, object]:
        """What the sweep depends on: stated in its record, checked by the report."""
        attack = self.attack
        return {
            **self.sweep.model_dump(),
            "K": self.langevin.K,
            "precision": self.langevin.precision,
            "step_share": self.step_share,
            "norm": attack.norm,
            "eps_255": attack.eps_255,
            "early_verdicts": self.evaluate.early_verdicts,
        }

    @property
    def step_share(self) -> float:
        """Length of an attack's step in radii (alpha / eps); the paper's where there is none."""
        return self.attack.step_255 / self.attack.eps_255 if self.attack.eps_255 else 0.25

    def reloaded(self) -> "Params":
        """The file that these parameters came from, as it is now."""
        return load_params(self._origin)

    def dataset(self, name: str) -> Dataset:
        """The section of one dataset, or an error that says which there are."""
        if name not in self.datasets:
            raise StageError(f"dataset: expected one of {list(self.datasets)}, got {name!r}")
        return self.data[name]


def load_params(path: Path) -> Params:
    """Read and validate a whole params file; `StageError` names path, value and what is allowed."""
    try:
        values = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise StageError(f"{path}: no such file; `stochsec preset digits` writes one") from None
    except (OSError, UnicodeDecodeError) as error:
        raise StageError(f"{path}: not a readable text file ({error})") from None
    except yaml.YAMLError as error:
        raise StageError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise StageError(f"{path}: expected sections, got {values!r}")
    params = validate_params(values, path)
    params._origin = path
    return params


def validate_params(values: Any, origin: Path) -> Params:
    """Plain values -> Params; ``origin`` is named in the message."""
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        raise StageError(f"{origin}: " + "; ".join(map(_describe, error.errors()))) from None


def _describe(error: Any) -> str:
    where = ".".join(map(str, error["loc"]))
    if error["type"] == "value_error":
        message = str(error["ctx"]["error"])
        return f"{where}.{message}" if where else message
    if error["type"] == "missing":
        return f"{where}: missing"
    if error["type"] == "extra_forbidden":
        return f"{where} = {error['input']!r}: no such parameter; expected {_names(error['loc'])}"
    message = error["msg"].replace("Input should be ", "expected ")
    return f"{where} = {error['input']!r}: {message[0].lower()}{message[1:]}"


def _names(where: tuple[str | int, ...]) -> str:
    """The names that are allowed where a wrong one stands."""
    section: Any = Params
    for name in where[:-1]:
        kind = section if isinstance(section, type) else get_args(section)[1]  # dict[Name, kind]
        section = kind.model_fields[name].annotation if section is kind else kind
    return "one of " + ", ".join(section.model_fields)
