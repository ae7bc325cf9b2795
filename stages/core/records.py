"""Records of attacks on disk: what was attacked, what was found, and under which conditions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from defense.attack import AttackRecord
from defense.pixels import from_bytes
from defense.threat import ThreatModel
from stages import StageError
from stages.core.artifacts import Images, load_tensors, save_tensors, together
from stages.core.files import classifier_name, fingerprint, require
from stages.core.params import PHASES, TRAININGS


def made_of(about: Mapping[str, Any]) -> dict[str, str]:
    """What a record says it was made of: the fingerprint of images, PGD record and networks.

    By their names in the workflow, such as ebm_convergent.
    """
    stated: dict[str, str] = dict(about.get("files", {}))
    found: dict[str, str] = {r: stated[r] for r in ("images", "pgd") if r in stated}
    found |= {f"ebm_{role}": hashed for role, hashed in stated.items() if role in PHASES}
    found |= {classifier_name(role): hashed for role, hashed in stated.items() if role in TRAININGS}
    phase = about.get("energy", about.get("phase"))
    if phase and "energy" in stated:
        found[f"ebm_{phase}"] = stated["energy"]
    if "classifier" in stated:
        found[classifier_name(about.get("training", "natural"))] = stated["classifier"]
    return found


def check_networks(name: Path, about: Mapping[str, Any], models: Path) -> None:
    """`StageError` if a record was not made with the networks in a folder."""
    for network, hashed in made_of(about).items():
        weights = models / f"{network}.safetensors"
        if weights.exists() and fingerprint(weights) != hashed:
            raise StageError(f"{name}: was not made with the network {weights.name} beside it")


def check_together(abouts: Mapping[Path, Mapping[str, Any]]) -> None:
    """`StageError` if two records of one dataset were made of different images or networks."""
    seen: dict[str, tuple[str, Path]] = {}
    for path, about in abouts.items():
        for name, hashed in made_of(about).items():
            first, where = seen.setdefault(name, (hashed, path))
            if first != hashed:
                raise StageError(
                    f"{path}: was made of another {name} than {where}; run again what is older, or "
                    "move it away"
                )


KEPT = "kept"
"""What a record without images says of the whole one: its fingerprint, and `farthest`."""


@dataclass(frozen=True)
class AttackResult:
    """An attack record with its images: what the report judges.

    One that was kept for git (`stages.reporting.kept`) has no pixels. It says how far they were
    apart.
    """

    images: Images
    record: AttackRecord
    about: dict[str, Any]

    def save(self, path: Path) -> None:
        """Write to a safetensors file."""
        tensors = {field.name: getattr(self.record, field.name) for field in fields(AttackRecord)}
        save_tensors(path, {**vars(self.images), **tensors}, self.about)

    @classmethod
    def load(cls, path: Path, made_by: str = "`stochsec attack`") -> "AttackResult":
        """Read what `save` wrote."""
        require(path, made_by)
        tensors, about = load_tensors(path)
        try:
            images = Images(**{f.name: tensors[f.name] for f in fields(Images)})
            record = AttackRecord(**{f.name: tensors[f.name] for f in fields(AttackRecord)})
        except KeyError as error:
            raise StageError(f"{path}: not an attack record, it lacks {error}") from None
        return cls(images, record, about)

    def farthest(self) -> float:
        """The largest distance of an adversarial image from its own, in pixels of [0, 1].

        `StageError` for pixels that are not finite or outside the box.
        """
        if KEPT in self.about:
            return float(self.about[KEPT]["farthest"])
        x, x_adv = from_bytes(self.images.images), self.record.adversarial
        if not torch.isfinite(x_adv).all():
            raise StageError("adversarial: values that are NaN or infinite")
        if x_adv.min() < 0 or x_adv.max() > 1:
            raise StageError("adversarial pixels outside [0, 1]")
        threat = ThreatModel(self.about["norm"], float(self.about["eps_255"]))
        return float(threat.distance(x_adv, x).max())

    def of_pgd(
        self, data: Images, path: Path, classifier: Path, conditions: Mapping[str, object]
    ) -> Tensor:
        """The adversarial images that this record of PGD has for ``data``, (N,C,H,W).

        `StageError` if the record has other images, another attack or classifier, or other
        ``conditions`` (norm, radius, steps, ...), or was kept without its images.
        """
        if KEPT in self.about:
            raise StageError(
                f"{path}: was kept without its images; `stochsec attack DATASET pgd` makes them"
            )
        places = {place: i for i, place in enumerate(self.images.index.tolist())}
        rows = torch.tensor([places.get(place, -1) for place in data.index.tolist()])
        there = bool((rows >= 0).all()) and all(
            getattr(self.images, name)[rows].equal(getattr(data, name))
            for name in ("images", "labels")
        )
        if self.about.get("attack") != "pgd" or not there:
            raise StageError(f"{path}: expected a record of attack pgd on the same test images")
        for name, value in conditions.items():
            if self.about.get(name) != value:
                raise StageError(
                    f"{path}: its images were made with {name} = {self.about.get(name)}, and "
                    f"params.yaml says {value}; run `stochsec attack DATASET pgd` again"
                )
        if made_of(self.about).get("classifier") != fingerprint(classifier):
            raise StageError(
                f"{path}: its images were made for another classifier than {classifier}; run "
                f"`stochsec attack DATASET pgd --classifier {classifier} --out MINE.safetensors`, "
                "and give --pgd MINE.safetensors"
            )
        return self.record.adversarial[rows]

    @classmethod
    def concatenate(cls, parts: Sequence["AttackResult"]) -> "AttackResult":
        """Join shards into one record; values that differ between descriptions are all listed."""

        def joined(kind: type, values: list[Any]) -> Any:
            return kind(*(torch.cat([getattr(v, f.name) for v in values]) for f in fields(kind)))

        replicas = {part.record.clean_classes.shape[1] for part in parts}
        if len(replicas) > 1:
            raise StageError(
                f"classifier: answered at random in some shards and not in others ({replicas} "
                "replicas); a defense that draws its answer is judged from Python: "
                "defense.Replicated"
            )
        images = joined(Images, [part.images for part in parts])
        record = joined(AttackRecord, [part.record for part in parts])
        return cls(images, record, together([part.about for part in parts]))
