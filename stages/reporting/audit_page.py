"""The page of an audit: one file that a browser shows without a network."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml

from stages.core.files import write_text
from stages.core.params import Params
from stages.core.records import AttackResult
from stages.reporting.flags import flags_of
from stages.reporting.page import Figure, embedded, template
from stages.reporting.provenance import here
from stages.reporting.rows import Accuracy, count

TEMPLATE = Path(__file__).with_suffix(".html")
GRADIENTS = {
    "identity": "the purifier skipped (BPDA)",
    "exact": "gradients through the chain",
    "smoothed": "gradients through a smoothed chain",
    "none": "no gradients",
}
NEVER_TESTED = (
    "other radii and norms than those above; changes that are no small perturbation, such as "
    "rotation, blur or a patch",
    "attackers who know the noise that the defender draws, or who train on the defended classifier",
    "images from elsewhere than these, where every accuracy may differ",
)


@dataclass(frozen=True)
class Cost:
    """Seconds of a prediction: bare, defended with ``replicas`` copies, and defended in a batch."""

    bare: float
    defended: float
    in_batch: float
    replicas: int
    device: str


@dataclass(frozen=True)
class Line:
    """One attack, as a line of the table and a bar."""

    name: str
    words: str
    natural: Accuracy
    robust: Accuracy
    flags: list[str]


@dataclass
class Audit:
    """What there is to show; filled as attacks end."""

    classifier: str
    energy: str | None
    params: Params
    quick: bool
    results: list[AttackResult] = field(default_factory=list)
    not_run: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    cost: Cost | None = None

    def lines(self, *, defended: bool) -> list[Line]:
        """The attacks of the usual radius on the bare classifier, or on the defended one."""
        usual = self.params.attack.threat.eps_255
        return [
            line_of(result)
            for result in self.results
            if ("H_def" in result.about) == defended and result.about["eps_255"] == usual
        ]

    def left_out(self) -> dict[str, list[str]]:
        """The attacks that were not run, by the reason."""
        reasons: dict[str, list[str]] = {}
        for name, why in self.not_run.items():
            reasons.setdefault(why, []).append(name)
        return reasons

    def controls(self) -> list[Line]:
        """Attacks of another radius, which test the attacks and not the defense."""
        usual = self.params.attack.threat.eps_255
        return [line_of(result) for result in self.results if result.about["eps_255"] != usual]

    def worst(self) -> tuple[Accuracy, str] | None:
        """Images that withstood every attack on the defense, of those that all attacks tried."""
        usual = self.params.attack.threat.eps_255
        tried = [r for r in self.results if "H_def" in r.about and r.about["eps_255"] == usual]
        if not tried:
            return None
        common = min(len(result.images.labels) for result in tried)
        robust = [result.record.robust(result.images.labels)[:common] for result in tried]
        strongest = min(zip(robust, tried, strict=True), key=lambda pair: int(pair[0].sum()))
        return count(torch.stack(robust).all(0)), words_of(strongest[1])

    def summary(self) -> list[str]:
        """The result in a sentence or two."""
        said = []
        threat = self.params.attack.threat
        radius = f"{threat.norm} {threat.eps_255:g}/255"
        for line in self.lines(defended=False):
            said.append(
                f"Without the defense {percent(line.natural)} of {line.natural.n} images are "
                f"classified correctly; attacked within {radius}, {percent(line.robust)}."
            )
        lines, worst = self.lines(defended=True), self.worst()
        if lines and worst:
            widest = max((line.natural for line in lines), key=lambda natural: natural.n)
            said.append(
                f"With it {percent(widest)} of {widest.n} natural images are; "
                f"{percent(worst[0])} of {worst[0].n} withstand every attack that was run. The "
                f"strongest was {worst[1]}."
            )
            if not any("rule" in result.about for result in self.results):
                said.append("No attack that knows the defense has been run yet.")
        return said


def percent(accuracy: Accuracy) -> str:
    """A share with its 95 % interval."""
    low, high = accuracy.interval
    return f"{accuracy.value:.0%} [{low:.0%}, {high:.0%}]"


def line_of(result: AttackResult) -> Line:
    """A record as a line."""
    labels, record = result.images.labels, result.record
    natural, robust = count(record.clean_correct(labels)), count(record.robust(labels))
    return Line(str(result.about["attack"]), words_of(result), natural, robust, flags_of(result))


def words_of(result: AttackResult) -> str:
    """An attack in words."""
    about = result.about
    if "H_def" not in about:
        return f"PGD, {about['steps']} steps"
    if "rule" not in about:
        return "the images that PGD made for the bare classifier"
    rule = {"pgd": "PGD", "apgd": "APGD", "square": "Square", "noise": "random points"}
    return f"{rule[about['rule']]}, {about['steps']} steps, {GRADIENTS[about['gradient']]}"


def write(audit: Audit, out: Path) -> None:
    """``out``/index.html, as far as the audit has come."""
    picture: Figure | None = None
    if (out / "failures.png").exists():
        picture = embedded(out / "failures.png", "")
    params = (out / "params.yaml").read_text()
    page = template(TEMPLATE, percent=percent).render(
        audit=audit,
        values=yaml.safe_load(params),
        params=params,
        picture=picture,
        never_tested=NEVER_TESTED,
        here=here(torch.device("cpu")),
    )
    write_text(out / "index.html", page)
