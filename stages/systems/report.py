"""The report on all systems: a table, two figures and a page, from the records alone."""

import math
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from defense.systems import SYSTEMS, System
from stages import StageError
from stages.core.artifacts import load_tensors
from stages.core.console import say
from stages.core.files import Paths, WholeFolder, write_text
from stages.core.params import Params
from stages.core.records import AttackResult
from stages.reporting import provenance, rows, style, systems_page, systems_pictures
from stages.reporting.rows import Accuracy, accuracies, count
from stages.reporting.tables import EMPTY, NOT_RUN, PUBLISHED
from stages.systems.attack import CERTIFICATE, PGD, TRANSFER
from stages.systems.build import section_of
from stages.systems.certificate import broken_inside

TABLE = "systems.csv"
CONDITIONS = ["norm", "eps_255", "steps", "restarts", "rule", "gradient", "loss", "noise"]
CONDITIONS += ["H_adv", "H_def", "cost"]


@dataclass(frozen=True)
class Line:
    """What was measured of one system; empty results: it was not run."""

    name: str
    results: dict[str, AttackResult]  # by attack; PGD on the bare classifier comes first
    certificate: dict[str, Tensor] | None

    @property
    def system(self) -> type[System]:
        """What it is."""
        return SYSTEMS[self.name]

    def title(self) -> str:
        """Its name for readers."""
        return self.system.title + ", smooth" * ("smooth_" in self.name)

    @property
    def attacks(self) -> dict[str, AttackResult]:
        """Those on the defense."""
        return {name: result for name, result in self.results.items() if name != PGD}

    def natural(self) -> Accuracy:
        """Of the defense, on the images of all attacks."""
        result = self.results[TRANSFER]
        return count(result.record.clean_correct(result.images.labels))

    def robust(self, attack: str) -> Accuracy:
        """Under one attack."""
        return count(robust(self.results[attack]))

    def own(self) -> Accuracy | None:
        """Under the strongest attack of its own paper; None if that was not run."""
        attack = self.system.own_attack
        return self.robust(attack) if attack in self.results else None

    def worst(self) -> Accuracy:
        """Images that withstood every attack, of those that all attacks tried."""
        common = min(len(result.images.labels) for result in self.attacks.values())
        return count(torch.stack([robust(r)[:common] for r in self.attacks.values()]).all(0))

    def strongest(self) -> str:
        """The attack under which fewest images are right."""
        return min(self.attacks, key=lambda attack: self.robust(attack).value)


def robust(result: AttackResult) -> Tensor:
    """(n,) bool."""
    return result.record.robust(result.images.labels)


def run(params: Params, out: Path) -> None:
    """Write the report on every system there is; one without records says "not run"."""
    section, whole = section_of(params), WholeFolder(out, TABLE)
    lines = [load(params, name) for name in SYSTEMS]
    measured = [line for line in lines if line.results]
    if not measured:
        raise StageError(f"artifacts/{params.run}: no system was attacked; see `attack-system`")
    attacks = [TRANSFER, *section.attacks]
    with whole as partial:
        rows.write(all_rows(params, measured), partial / TABLE)
        table = summary(lines, attacks)
        write_text(partial / "systems.md", table.to_markdown(index=False) + "\n")
        arrows = systems_pictures.arrows(
            [
                (
                    line.title(),
                    line.natural().value,
                    own.value if (own := line.own()) else math.nan,
                    line.worst().value,
                )
                for line in measured
            ]
        )
        style.save(arrows, partial / "arrows.png")
        costs = systems_pictures.costs({line.name: line.attacks for line in measured})
        style.save(costs, partial / "costs.png")
        write_text(partial / "params.yaml", provenance.as_yaml(params))
        cells = list(table.columns), table.to_numpy().tolist()
        systems_page.write(params, cells, findings(params, measured), flags(measured), partial)
    say(f"report-systems: {out}")


def load(params: Params, name: str) -> Line:
    """The records of one system."""
    folder = Paths(params.run, params.compare_dataset).system(name)
    certified = folder / f"{CERTIFICATE}.safetensors"
    results = {
        attack: AttackResult.load(folder / f"{attack}.safetensors")
        for attack in (PGD, TRANSFER, *section_of(params).attacks)
        if (folder / f"{attack}.safetensors").exists()
    }
    return Line(name, results, load_tensors(certified)[0] if certified.exists() else None)


def all_rows(params: Params, lines: list[Line]) -> pd.DataFrame:
    """Every accuracy by every metric, with its conditions, cost and flags."""
    return pd.DataFrame(
        [
            {
                "system": line.name,
                "attack": attack,
                "metric": metric,
                "right": accuracy.right,
                "n": accuracy.n,
                "accuracy": round(accuracy.value, 4),
                "low": round(accuracy.interval[0], 4),
                "high": round(accuracy.interval[1], 4),
                **{key: result.about.get(key, "") for key in CONDITIONS},
                "flags": "; ".join(result.about["flags"]),
            }
            for line in lines
            for attack, result in line.results.items()
            for metric, accuracy in accuracies(result, params.evaluate.draws).items()
        ]
    )


def summary(lines: list[Line], attacks: list[str]) -> pd.DataFrame:
    """One line for each system: published and measured accuracies, and what a prediction costs."""
    published = pd.read_csv(PUBLISHED, dtype=str).fillna(EMPTY)
    published = published[published.table == "2"]
    table = []
    for line in lines:
        what = f"{line.title()} ({line.system.source})"
        theirs = published[published.system.str.contains(line.system.source, regex=False)]
        printed = EMPTY
        if len(theirs):
            row = theirs.iloc[0]
            printed = f"{row.natural} / {row.adversarial} ({row.attack})"
        if not line.results:
            table.append([line.name, what, printed, *[NOT_RUN] * (len(attacks) + 4)])
            continue
        strongest = line.strongest()
        table.append(
            [
                line.name,
                what,
                printed,
                shown(line.natural()),
                *(
                    (f"**{shown(line.robust(a))}**" if a == strongest else shown(line.robust(a)))
                    if a in line.results
                    else EMPTY
                    for a in attacks
                ),
                f"{shown(line.worst())} n={line.worst().n}",
                strongest,
                f"{float(line.results[PGD].about['prediction_cost']):,.0f}",
            ]
        )
    columns = ["system", "what it is", "published, natural / attacked", "natural", *attacks]
    columns += ["all attacks together", "strongest", "cost of a prediction"]
    return pd.DataFrame(table, columns=columns)


def shown(accuracy: Accuracy) -> str:
    """A share with its 95 % interval."""
    low, high = accuracy.interval
    return f"{accuracy.value:.3f} [{low:.2f}, {high:.2f}]"


def findings(params: Params, lines: list[Line]) -> list[str]:
    """Sentences: what the own attack left and what the strongest leaves; the certificates."""
    said = []
    for line in lines:
        own, after = line.own(), line.worst()
        if own is not None:
            said.append(
                f"{line.name}: {own.value:.2f} under {line.system.own_attack}, as in its own "
                f"paper; {after.value:.2f} after all attacks (n={after.n})"
            )
    radius = section_of(params).certificate.l2_255
    for line in lines:
        if line.certificate is not None:
            inside, broken = broken_inside(line.certificate, radius)
            flag = "FLAG: " if broken else ""
            said.append(
                f"{flag}{line.name}: {inside} of {len(line.certificate['radius'])} images are "
                f"certified beyond l2 {radius:g}/255; an attack of that radius changed the vote on "
                f"{broken} of them"
            )
    return said


def flags(lines: list[Line]) -> list[str]:
    """Reasons to doubt a number."""
    return [
        f"{line.name}, {attack}: {flag}"
        for line in lines
        for attack, result in line.results.items()
        for flag in result.about["flags"]
    ]
