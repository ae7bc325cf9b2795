"""`stochsec secure`: defended predictions for images of somebody, by somebody's classifier."""

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from scipy.stats import binomtest
from torch import Tensor

from defense.eot import EOTDefense
from defense.inference import classify
from defense.pixels import from_bytes
from defense.rng import make_generator
from stages.core.console import Track, said_warnings, say
from stages.core.files import Whole, write_csv
from stages.core.params import Params
from stages.core.resume import Scratch
from stages.custom.given import Given
from stages.reporting import portraits, style
from stages.reporting.rows import count

SHOWN = 8  # images of the picture before and after
DOUBT = 0.05  # p-value of the vote above which a prediction is not clear


@dataclass(frozen=True)
class Verdicts:
    """Predictions (N,), the share of replicas that agree (N,), and whether the vote is clear (N,).

    ``logits`` (N,classes) are the means over the replicas, whose largest is the prediction.
    """

    logits: Tensor
    predicted: Tensor
    agreement: Tensor
    clear: Tensor


def run(given: Given, out: Path, replicas: int, *, keep: bool, afresh: bool) -> None:
    """Purify and classify every image; write ``out``/predictions.csv and before_after.png.

    ``keep`` also writes one purified copy of every image to ``out``/purified. Images are read and
    purified block by block. A killed run resumes.
    """
    with said_warnings():
        nets = given.nets()
        given.say_unlike(nets)
        defense = nets.defense(given.params.langevin.K, replicas, "secure")
    params, images = given.params, given.pictures
    size = max(1, given.hardware.max_chains // replicas)
    found: list[dict[str, Tensor]] = []

    def key(p: Params) -> object:
        return p.seed, p.langevin, p.data, replicas, keep, images.identity

    with (
        said_warnings(),
        Scratch("secure", params, key, given.inputs, given.hardware, afresh=afresh) as scratch,
        Track("secure", len(images), unit="images") as track,
    ):
        for first in range(0, len(images), size):
            names = images.names[first : first + size]

            def compute(first: int = first, names: list[str] = names) -> dict[str, Tensor]:
                pixels = from_bytes(images.read(range(first, first + len(names))))
                made = block(defense, pixels.to(given.hardware.device), replicas, first)
                if keep:
                    write_pictures(made["purified"], names, out / "purified")
                for name in PIXELS:  # those of the picture
                    made[name] = made[name][: max(0, SHOWN - first)]
                return made

            found.append(scratch.piece(f"{first:09d}", compute))
            track.advance(len(names))
        joined = {name: torch.cat([piece[name] for piece in found]) for name in found[0]}
        said = judged(joined["logits"], joined["votes"])
        write_predictions(given, said, out / "predictions.csv")
        said_of = [images.called(label) for label in said.predicted[:SHOWN].tolist()]
        shown = portraits.before_and_after(joined["before"], joined["purified"], said_of)
        style.save(shown, out / "before_after.png")
        scratch.done()
    say_result(given, said, joined["bare"], out)


PIXELS = ("before", "purified")


def block(defense: EOTDefense, pixels: Tensor, replicas: int, first: int) -> dict[str, Tensor]:
    """Mean logits and votes (n,classes), bare predictions (n,), and pixels before and after."""
    generator = make_generator(defense.seed, first, device=pixels.device)
    purified = defense.purify(pixels.repeat(replicas, 1, 1, 1), generator=generator)
    batch = defense.max_chains
    logits = classify(defense.classifier, purified, batch=batch).unflatten(0, (replicas, -1))
    votes = torch.nn.functional.one_hot(logits.argmax(2), logits.shape[2]).sum(0)
    bare = classify(defense.classifier, pixels, batch=batch).argmax(1)
    return {
        "logits": logits.mean(0),
        "votes": votes,
        "bare": bare,
        "before": pixels,
        "purified": purified[: len(pixels)].clamp(0, 1),
    }


def judged(logits: Tensor, votes: Tensor) -> Verdicts:
    """Verdicts from mean logits and votes (N,classes).

    A prediction is clear if its class leads the vote, and the runner-up would get so few votes with
    a probability of at most `DOUBT` if both were equally likely (Cohen et al. 2019, Section 3.2.2).
    """
    predicted = logits.argmax(1)
    for_it = votes.gather(1, predicted[:, None]).flatten()
    against = votes.scatter(1, predicted[:, None], -1).amax(1)
    clear = [
        mine > other and binomtest(mine, mine + other).pvalue <= DOUBT
        for mine, other in zip(for_it.tolist(), against.tolist(), strict=True)
    ]
    return Verdicts(logits, predicted, for_it / votes.sum(1), torch.tensor(clear))


def write_predictions(given: Given, said: Verdicts, path: Path) -> None:
    """A line an image: prediction, agreement, whether it is clear, the label if known, logits."""
    images = given.pictures
    labels = ["" for _ in images.names] if images.labels is None else images.labels.tolist()
    classes = range(said.logits.shape[1])
    rows = zip(
        images.names,
        said.predicted.tolist(),
        [f"{share:.3f}" for share in said.agreement.tolist()],
        ["yes" if clear else "abstain" for clear in said.clear.tolist()],
        labels,
        *([f"{value:.4f}" for value in said.logits[:, c].tolist()] for c in classes),
        strict=True,
    )
    columns = (
        "image",
        "prediction",
        "agreement",
        "clear",
        "label",
        *(f"logit_{c}" for c in classes),
    )
    write_csv(path, columns, rows)


def write_pictures(pixels: Tensor, names: list[str], folder: Path) -> None:
    """Pixels (n,C,H,W) in [0, 1] as PNG files."""
    values = (255 * pixels).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    for name, value in zip(names, values, strict=True):
        with Whole((folder / name).with_suffix(".png")) as partial:
            Image.fromarray(value.squeeze()).save(partial, format="PNG")


def say_result(given: Given, said: Verdicts, bare: Tensor, out: Path) -> None:
    """What came of it, in a line or two."""
    total, labels = len(said.clear), given.pictures.labels
    say(f"{out / 'predictions.csv'}: {total} images, {int(said.clear.sum())} clear verdicts")
    if labels is not None:
        right = said.predicted == labels
        clear = f", of clear verdicts {count(right[said.clear])}" if said.clear.any() else ""
        say(f"accuracy: bare {count(bare == labels)}, defended {count(right)}{clear} n={total}")
