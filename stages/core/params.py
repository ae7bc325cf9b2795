"""params.yaml as a whole, read and validated. No torch here: a wrong value is reported at once."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import Field, PrivateAttr, ValidationError, model_validator

from stages import StageError
from stages.core.files import WORKFLOW
from stages.core.sections import (
    EBM,
    FID,
    Attack,
    Classifier,
    Compare,
    CountOrNone,
    Dataset as Dataset,
    Diagnose,
    Energy,
    Evaluate,
    Inspect,
    Langevin,
    Lyapunov,
    Name,
    NamedAttack as NamedAttack,
    Section,
    Snapshots,
    Sweep,
    Systems,
)

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

SHOWN = 5  # wrong parameters in one message


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
    systems: Systems | None
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
    def _names_are_free(self) -> Self:
        for name in self.evaluate.attacks:
            if name in (*TABLE_ATTACKS, TRANSFER):
                raise ValueError(f"evaluate.attacks: {name!r} is the name of another attack")
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
            ("evaluate.draws", self.evaluate.draws, ("langevin.H_def", self.langevin.H_def)),
            (
                "evaluate.draws",
                self.evaluate.draws,
                ("attack.transfer.replicas", self.attack.transfer.replicas),
            ),
            ("diagnose.H", max(self.diagnose.H), ("diagnose.replicas", self.diagnose.replicas)),
            ("langevin.K", self.langevin.K, ("inspect.long_steps", self.inspect.long_steps)),
        ):
            if size > most:
                raise ValueError(f"{name}: expected <= {whole} = {most}, got {size}")
        for dataset in self.datasets:
            section = self.data[dataset]
            asked = [("attack.pgd.images", self.attack.pgd.images)]
            asked += [("attack.bpda_eot.images", self.attack.bpda_eot.images)]
            asked += [("fid.images", self.fid.images)] if dataset == self.compare_dataset else []
            for name, size in asked if section.judged_on == "held_out" else []:
                if size > section.held_out:
                    raise ValueError(
                        f"{name}: expected <= data.{dataset}.held_out = {section.held_out}, as "
                        f"judged_on is held_out, got {size}"
                    )
        return self

    @model_validator(mode="after")
    def _attacks_can_be_run(self) -> Self:
        classes = self.data[self.compare_dataset].shape.classes
        for name, named in self.evaluate.attacks.items():
            where = f"evaluate.attacks.{name}"
            if named.rule == "square" and self.attack.threat.norm != "linf":
                raise ValueError(f"{where}.rule: square expects attack.threat.norm linf")
            if named.loss == "dlr" and classes < 3:
                raise ValueError(f"{where}.loss: dlr expects at least 3 classes, got {classes}")
        tested = self.evaluate.attacks[self.evaluate.active_test.attack]
        if tested.loss == "dlr" or tested.scale == 0 or tested.energy not in (None, MODELS[0]):
            raise ValueError(
                "evaluate.active_test.attack: expected one with a radius and another loss than dlr "
                f"(there are two classes) that is run on the energy {MODELS[0]}, got "
                f"{self.evaluate.active_test.attack!r}"
            )
        return self

    @model_validator(mode="after")
    def _run_is_not_relabelled(self) -> Self:
        """The name of a preset belongs to that preset's datasets: results must not be mixed up."""
        preset = presets_folder() / f"{self.run}.yaml"
        if preset.exists():
            theirs = yaml.safe_load(preset.read_text()).get("datasets", self.datasets)
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
        """Whether the verdicts of an attack may stop early, by the sequential test."""
        section = self.attack if attack in TABLE_ATTACKS else self.evaluate
        return section.early_verdicts

    def conditions(self, attack: str) -> dict[str, object]:
        """What an attack's accuracy depends on: stated in the record, checked by the report."""
        section, langevin = self.attack, self.langevin
        named = self.named(attack)
        size, scale = (named, named.scale) if named else (section.pgd, 1.0)
        takes_steps = named is None or named.rule == "pgd"
        shown: dict[str, object] = {
            "norm": section.threat.norm,
            "eps_255": section.threat.eps_255 * scale,
            **({"step_255": section.threat.step_255 * scale} if takes_steps else {}),
            "steps": size.steps,
            "restarts": size.restarts,
        }
        if named:
            shown |= {"rule": named.rule, "gradient": named.gradient, "loss": named.loss}
            surrogate = named.H_adv or langevin.H_adv
            shown |= {"K": langevin.K, "H_adv": surrogate, "H_def": langevin.H_def}
            shown |= {"stop_at_break": named.stop_at_break}
            if named.gradient == "smoothed":
                shown["softness"] = self.evaluate.softness
        elif attack not in PGD_ATTACKS:
            steps = langevin.K_short if attack == "transfer_K_short" else langevin.K
            table = attack in TABLE_ATTACKS
            shown |= {"K": steps, "H_def": section.transfer.replicas if table else langevin.H_def}
        if attack not in PGD_ATTACKS:
            shown |= {"precision": langevin.precision, "denoise": langevin.denoise}
            shown |= {f"sequential_{k}": v for k, v in section.sequential.model_dump().items()}
            shown["early_verdicts"] = self.early_verdicts(attack)
        return shown

    def study(self, name: str, dataset: str) -> dict[str, object]:
        """What a study's numbers depend on: stated in its record, checked by the report."""
        langevin, attack, tested = self.langevin, self.attack, self.evaluate.active_test
        images = {"judged_on": self.data[dataset].judged_on}
        chain = {"precision": langevin.precision}
        defense = {**chain, "denoise": langevin.denoise}
        judge = {f"sequential_{k}": v for k, v in attack.sequential.model_dump().items()}
        judge |= {"early_verdicts": self.evaluate.early_verdicts}
        threat = attack.threat.model_dump()
        step = {"step_255": threat.pop("step_255")}
        attacked = {**images, **defense, **judge, **threat}
        studies: dict[str, dict[str, object]] = {
            "compare": {**self.compare.model_dump(), **attacked, **step},
            "sweep": {
                **self.sweep.model_dump(),
                **attacked,
                "K": langevin.K,
                "step_share": attack.threat.step_share,
            },
            "snapshots": {**self.snapshots.model_dump(), **chain},
            "lyapunov": {**self.lyapunov.model_dump(), **images},
            "fid": {**self.fid.model_dump(), **images, **defense},
            "inspect": {**self.inspect.model_dump(), **images, **chain, "K": langevin.K},
            "diagnose": {
                **self.diagnose.model_dump(),
                **images,
                **defense,
                "K": langevin.K,
                "H_adv": langevin.H_adv,
            },
            "active_test": {**tested.model_dump(), **images, **self.conditions(tested.attack)},
        }
        return studies[name]

    def reloaded(self) -> "Params":
        """The file that these parameters came from, as it is now."""
        return load_params(self._origin)

    def dataset(self, name: str) -> Dataset:
        """The section of one dataset, or an error that says which there are."""
        if name not in self.datasets:
            raise StageError(f"dataset: expected one of {list(self.datasets)}, got {name!r}")
        return self.data[name]


def presets_folder() -> Path:
    """The presets of this folder if it has some (`stochsec init` lays them out), else ours."""
    own = Path("presets")
    return own if (own / "digits.yaml").is_file() else WORKFLOW / "presets"


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
        found = error.errors()
        more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        wrong = "; ".join(map(_describe, found[:SHOWN]))
        raise StageError(f"{origin}: {wrong}{more}") from None


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
