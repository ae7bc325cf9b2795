"""Findings across all attacks of one evaluation: controls, and comparisons image by image."""

from collections.abc import Sequence

import torch
from scipy.special import bdtr

from defense.attack import NOT_MEASURED
from defense.studies.active_test import BELIEVED
from stages.core.records import AttackResult
from stages.reporting.rows import Accuracy, count

BPDA = "identity"  # the attack of that name in evaluate.attacks
GRADIENT_FREE_MAY_WIN_BY = 0.002  # of accuracy, as in AutoAttack's own checks


def findings(results: list[AttackResult], usual: float) -> list[str]:
    """Findings from the records of all attacks on one defense, one line of text each.

    Attacks are compared at the radius ``usual`` (eps_255); those at other radii are controls.
    """
    by_name = {str(result.about["attack"]): result for result in results}
    labels = results[0].images.labels
    robust = {name: result.record.robust(labels) for name, result in by_name.items()}
    scale = {name: float(result.about["eps_255"]) for name, result in by_name.items()}
    guided = [name for name in by_name if _guided(by_name[name]) and scale[name] == usual]
    blind = [name for name in by_name if not _guided(by_name[name]) and scale[name] == usual]
    said = []
    for name in by_name:
        if scale[name] == 0:
            clean = by_name[name].record.clean_correct(labels)
            broken = int((clean & ~robust[name]).sum())
            said.append(
                f"false breaks: Algorithm 1 without any perturbation breaks {broken} of "
                f"{int(clean.sum())} images ({name})"
            )
        if scale[name] > usual:
            said.append(_at_huge_eps(name, by_name[name], robust[name]))
    if BPDA in robust:
        said += [_paired(name, robust[name], robust[BPDA]) for name in guided if name != BPDA]
    if guided and blind:
        said.append(_gradient_free(robust, guided, blind))
    strongest = against_all(results, usual)
    if strongest:
        said.append(f"robust to every attack of this radius: {strongest} n={strongest.n}")
    said.append(verification(results))
    cost = results[0].about.get("cost")
    if cost:
        said.append(f"one defended prediction costs {cost:,.0f} times a bare one (multiplications)")
    return said


def active_test(tensors: dict[str, torch.Tensor], attack: str) -> str:
    """Did the attack find what was planted in the ball? Zimmermann et al. (2022) ask for 95 %."""
    planted, found = tensors["planted"], tensors["found"]
    share = count(found[planted])
    if not share.n:
        return f"FLAG: active test: nothing could be planted in {len(planted)} images"
    hits = float(tensors["random_hits"][planted].mean())
    text = (
        f"active test: attack {attack} finds {int(share.right)} of {share.n} planted "
        f"images {share}; random points of the ball find one in {hits:.2%} of tries"
    )
    return (
        text if share.value >= BELIEVED else f"FLAG: {text}; at least {BELIEVED:.0%} is asked for"
    )


def against_all(results: list[AttackResult], usual: float) -> Accuracy | None:
    """Images that no attack of the usual radius breaks; None if there is no such attack."""
    robust = [
        result.record.robust(result.images.labels)
        for result in results
        if float(result.about["eps_255"]) == usual
    ]
    return count(torch.stack(robust).all(0)) if robust else None


def in_the_tables(results: list[AttackResult], dataset: str) -> list[str]:
    """Defense and adversarial training on the images that both were attacked on in the tables."""
    by_name = {r.about["attack"]: r for r in results if r.about["dataset"] == dataset}
    pair = [by_name[name] for name in ("bpda_eot", "pgd_adversarial") if name in by_name]
    if len(pair) < 2:
        return []
    common = min(len(result.images.labels) for result in pair)
    ours, theirs = (result.record.robust(result.images.labels)[:common] for result in pair)
    only, only_theirs, p = _sign_test(ours, theirs)
    return [
        f"Tables 1-3, {dataset}: of the {common} images that both were attacked on, {only} stay "
        f"right with the defense alone, {only_theirs} with adversarial training alone (sign test "
        f"p = {p:.2g})"
    ]


def against_baseline(tensors: dict[str, torch.Tensor], norm: str, radii: Sequence[float]) -> str:
    """The sweep's images under the defense and under adversarial training, radius by radius."""
    said, count = [], 0
    for radius in radii:
        ours, theirs = (
            tensors[f"{norm}/{radius:.12g}/{system}/robust"]
            for system in ("defense", "adversarial")
        )
        only, only_theirs, p = _sign_test(ours, theirs)
        said.append(f"{only}:{only_theirs} at {radius:g}/255 (p = {p:.2g})")
        count = len(ours)
    return (
        f"{norm}, images that only the defense or only adversarial training keeps right, of "
        f"{count}: {', '.join(said)}"
    )


def _sign_test(mine: torch.Tensor, other: torch.Tensor) -> tuple[int, int, float]:
    """(n,) bool each: how many are true in the first only, in the other only; the exact p-value."""
    only, only_other = int((mine & ~other).sum()), int((~mine & other).sum())
    differ = only + only_other
    return only, only_other, min(1.0, 2.0 * float(bdtr(min(only, only_other), differ, 0.5)))


def _guided(result: AttackResult) -> bool:
    return result.about.get("gradient") in ("identity", "exact", "smoothed")


def _paired(name: str, robust: torch.Tensor, under_bpda: torch.Tensor) -> str:
    """The same images under an attack and under BPDA: the sign test of the differences."""
    only, only_bpda, p = _sign_test(~robust, ~under_bpda)
    return (
        f"image by image, {name} breaks {only} that {BPDA} does not, {BPDA} breaks {only_bpda} "
        f"that {name} does not (sign test p = {p:.2g})"
    )


def _at_huge_eps(name: str, result: AttackResult, robust: torch.Tensor) -> str:
    """Control: with a huge radius accuracy must fall to chance; flagged if it does not."""
    classes, accuracy = result.record.clean_logits.shape[1], count(robust)
    text = f"at eps = {result.about['eps_255']:g}/255 ({name}) accuracy is {accuracy}"
    if accuracy.interval[0] > 1 / classes:
        return f"FLAG: {text}, above chance: the attack does not find what must be there"
    return f"{text}: chance or less, as it should be"


def _gradient_free(robust: dict[str, torch.Tensor], guided: list[str], blind: list[str]) -> str:
    """Gradient-free attacks must not be the stronger ones, nor break what gradients cannot."""
    survivors = torch.stack([robust[name] for name in guided]).all(0)
    strongest = min(guided, key=lambda name: float(robust[name].float().mean()))
    limit = float(robust[strongest].float().mean()) - GRADIENT_FREE_MAY_WIN_BY
    winners = [name for name in blind if float(robust[name].float().mean()) < limit]
    missed = {name: int((survivors & ~robust[name]).sum()) for name in blind}
    text = "images that no gradient attack broke but others did: " + ", ".join(
        f"{name} {number}" for name, number in missed.items()
    )
    if winners:
        return f"FLAG: {', '.join(winners)} beats every gradient attack; {text}"
    return f"the strongest attack with gradients is {strongest}; {text}"


def verification(results: list[AttackResult]) -> str:
    """Mean number of replicas per sequential verdict, and agreement with the full verdict.

    The agreement is known only where all replicas were drawn.
    """
    early = torch.cat([result.record.early for result in results])
    every = torch.cat([torch.full((len(r.record.early),), int(r.about["H_def"])) for r in results])
    text = (
        f"sequential verdicts on the saved images take {float(early[:, 0].double().mean()):.0f} of "
        f"{float(every.double().mean()):.0f} replicas on average (n={len(early)})"
    )
    agrees = early[early[:, 1] != NOT_MEASURED, 1]
    if len(agrees):
        text += f"; all replicas say the same of {int(agrees.sum())} of {len(agrees)}"
    return text


STARTS = ("test images", "persistent chains", "noise")
"""Where the chains of an inspected energy begin."""

FAR = 2.0  # standard deviations of the energies of persistent chains


def convergence(inspected: dict[str, torch.Tensor]) -> str:
    """Is the mean energy of long chains within `FAR` of the persistent chains? One line of text.

    Source: Hill et al. (2021), Section 2.
    """
    usual = inspected["persistent chains/levels"]
    steps = int(inspected["grid"][-1])
    away = {
        start: float((inspected[f"{start}/energies"][-1].mean() - usual.mean()) / usual.std())
        for start in STARTS
    }
    text = (
        f"after {steps:,} steps the mean energy lies "
        + ", ".join(f"{value:+.1f} (from {start})" for start, value in away.items())
        + " standard deviations from that of the persistent chains"
    )
    changes = {
        who.removesuffix("/changes"): values.tolist()
        for who, values in inspected.items()
        if who.endswith("/changes")
    }
    shown = inspected["levels_grid"].tolist()
    text += f"; chains from noisy images leave their level within {shown[-1]} steps by at most "
    text += ", ".join(f"{max(c, key=abs):+.0f} nats ({who})" for who, c in changes.items())
    if not all(abs(value) <= FAR for value in away.values()):  # nor if one is not a number
        return f"FLAG: not convergent: {text}"
    return f"convergent: {text}"
