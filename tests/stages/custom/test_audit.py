"""`stochsec audit`: the suite on somebody's classifier, and a page about it."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages import attack
from stages.core.params import Params
from stages.core.records import AttackResult
from tests.tiny import command

pytestmark = pytest.mark.usefixtures("folder")

CLASSIFIER = "artifacts/tiny/models/digits/classifier.safetensors"
ENERGY = "artifacts/tiny/models/digits/ebm_convergent.safetensors"
IMAGES = "artifacts/tiny/data/digits.npz"
SMALL = {
    "langevin": {"K": 2, "denoise": "false", "H_adv": 2, "H_def": 12, "K_short": 1},
    "attack": {
        "pgd.images": 20,
        "transfer.images": 20,
        "transfer.replicas": 12,
        "bpda_eot.images": 10,
        "bpda_eot.steps": 2,
        "pgd.steps": 4,
        "threat.eps_255": 48,
        "threat.step_255": 24,
    },
    "evaluate": {"images": 5},
}
WORDS = " ".join(
    f"--set {section}.{name}={value}"
    for section, values in SMALL.items()
    for name, value in values.items()
)


def audited(words: str, out: Path) -> tuple[str, str]:
    """The page, and what was said."""
    result = command(f"audit {CLASSIFIER} {words} {WORDS} --out {out}")
    assert result.exit_code == 0, result.output
    return (out / "index.html").read_text(), " ".join(result.output.split())


def test_a_bare_classifier_is_attacked_by_pgd_alone(folder: Path) -> None:
    page, said = audited(f"{IMAGES} --quick", folder)
    assert "Without the defense" in said
    assert "Defended with" not in page
    assert re.search(r"attacks not run \(no energy given\): .*bpda_eot", page)
    assert sorted(path.name for path in (folder / "records").iterdir()) == ["pgd.safetensors"]


def test_a_quick_audit_says_what_it_measured_and_what_not(folder: Path) -> None:
    page, said = audited(f"{IMAGES} --energy {ENERGY} --quick", folder)
    results = {
        name: AttackResult.load(folder / f"records/{name}.safetensors")
        for name in ("pgd", "transfer_K", "bpda_eot")
    }
    labels = results["bpda_eot"].images.labels
    assert [len(r.images.labels) for r in results.values()] == [20, 20, 10]
    withstood = results["transfer_K"].record.robust(results["transfer_K"].images.labels)[:10]
    withstood = withstood & results["bpda_eot"].record.robust(labels)
    share = int(withstood.sum()) / 10
    assert re.search(rf" {share:.0%} \[\d+%, \d+%\] of 10 withstand every attack", said)
    assert "No attack that knows the defense" not in said
    for words in ("A quick audit", "attacks not run (--quick): identity", "one image at a time"):
        assert words in page
    assert ("data:image/png" in page) == (folder / "failures.png").exists()
    assert not re.search(r"(src|href)=\"(?!data:)", page)  # needs nothing beside it


def test_a_full_audit_runs_every_attack_that_fits_the_energy(folder: Path) -> None:
    few = " ".join(
        f"--set evaluate.attacks.{name}.steps=1"
        for name in (
            "identity",
            "smoothed",
            "exact",
            "apgd",
            "square",
            "noise",
            "no_attack",
            "huge",
        )
    )
    page, _ = audited(f"{IMAGES} --energy {ENERGY} {few}", folder)
    made = {path.stem for path in (folder / "records").iterdir()}
    assert {"pgd", "transfer_K", "bpda_eot", "identity", "smoothed", "huge"} <= made
    assert "exact" not in made
    assert "attacks not run (it is for the energy smooth_convergent): exact" in page
    assert "Controls: attacks of another radius" in page


def test_an_audit_continues_after_a_kill(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attacks, run = list[str](), attack.run
    pages = list[str]()

    def counted(params: Params, dataset: str, name: str, *args: Any, **options: Any) -> Any:
        attacks.append(name)
        if name == "bpda_eot":
            pages.append((folder / "index.html").read_text())
        if attacks == ["pgd", "transfer_K"]:
            raise RuntimeError("killed")
        return run(params, dataset, name, *args, **options)

    monkeypatch.setattr(attack, "run", counted)
    words = f"audit {CLASSIFIER} {IMAGES} --energy {ENERGY} --quick {WORDS} --out {folder}"
    with pytest.raises(RuntimeError, match="killed"):
        command(words)
    page = (folder / "index.html").read_text()
    assert "attacks not run (not yet): transfer_K, bpda_eot" in page
    assert "No attack that knows the defense" not in page  # nothing is said of the defense yet
    result = command(words)
    assert result.exit_code == 0, result.output
    assert attacks == ["pgd", "transfer_K", "transfer_K", "bpda_eot"]
    assert "No attack that knows the defense has been run yet." in pages[0]


def test_an_audit_needs_labels(folder: Path) -> None:
    np.savez(folder / "n.npz", images=np.zeros((5, 8, 8, 1), np.uint8))
    result = command(f"audit {CLASSIFIER} {folder}/n.npz --out {folder}")
    assert result.exit_code == 2
    assert "images: expected labels; give a folder" in " ".join(result.output.split())
