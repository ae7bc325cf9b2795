"""Stage 2: the naturally trained classifier that is to be secured, and its baseline.

The baseline is trained adversarially (Madry et al. 2018), as in Tables 2 and 3, with the same
network and in the same loop.
"""

import math
from pathlib import Path

import torch

from defense.classifier_training import Adversary, ClassifierTrainConfig, ClassifierTrainer
from defense.inference import classify, freeze
from defense.pixels import from_bytes
from defense.rng import make_generator
from defense.threat import ThreatModel
from stages import StageError
from stages.core.artifacts import load_images, load_state, save_state, save_weights
from stages.core.classifiers import new_classifier
from stages.core.console import Track, detail, say
from stages.core.files import write_csv
from stages.core.hardware import Hardware
from stages.core.params import TRAININGS, Params
from stages.core.resume import Scratch, Stopwatch
from stages.core.sections import Schedule

LOOK_EVERY = 50  # batches between two looks at the loss
COMPILED_BATCHES = 5000  # from so many on a GPU, torch.compile gains more than its minute


def run(
    params: Params,
    dataset: str,
    training: str,
    hardware: Hardware,
    *,
    images: Path,
    out: Path,
    history: Path,
) -> None:
    """Train on the training images; write weights and the curve of loss and accuracy.

    The accuracy is that on the held-out images, or, if nothing is held out, on the test images.
    """
    if training not in TRAININGS:
        raise StageError(f"training: expected one of {list(TRAININGS)}, got {training!r}")
    section, device = params.dataset(dataset), hardware.device
    trainer = make_trainer(params, dataset, training, hardware, images)
    classifier, config = trainer.classifier, trainer.config
    name = f"classifier {dataset}" + (" adversarial" if trainer.adversary else "")
    where = "adversarial" if trainer.adversary else "classifier"
    remedy = f"the training has diverged; lower data.{dataset}.{where}.learning_rate"
    looked_at = "held_out" if section.held_out else "test"
    seen = load_images(images, looked_at, section)
    seen_images, seen_labels = from_bytes(seen.images).to(device), seen.labels.to(device)

    def accuracy() -> float:
        classifier.eval()
        logits = classify(classifier, seen_images, batch=1000)
        if not torch.isfinite(logits).all():
            raise StageError(f"{name}: its logits are NaN or infinite: {remedy}")
        return float((logits.argmax(1) == seen_labels).float().mean())

    def key(p: Params) -> object:
        others = {"tau", "data_noise", "adam_lr", "sgd_lr", "judged_on"}
        others |= {"adversarial"} if training == "natural" else set()
        return p.seed, dataset, training, p.classifier, p.data[dataset].model_dump(exclude=others)

    rows: list[tuple[int, float, float]] = []
    scratch_name = f"train-classifier-{dataset}-{training}"
    with Scratch(scratch_name, params, key, {"images": images}, hardware) as scratch:
        checkpoint = scratch.folder / "checkpoint.pt"
        if checkpoint.exists():
            state = load_state(checkpoint, "", device)
            rows = state.pop("rows")
            trainer.load_state_dict(state)
        saved, watch = Stopwatch(), ""
        done = trainer.epochs_done * trainer.batches + trainer.batches_done
        with Track(name, config.epochs * trainer.batches, unit="batches", done=done) as track:

            def refuse_divergence(loss: float) -> None:
                if not math.isfinite(loss):
                    raise StageError(
                        f"{name}: the loss is not a number in epoch {len(rows) + 1}: {remedy}"
                    )

            def on_batch() -> None:
                track.advance(watch=watch)
                scratch.lap()
                if trainer.batches_done % LOOK_EVERY == 0:
                    refuse_divergence(float(trainer.total))
                if saved.due() or scratch.stopping:
                    save_state(checkpoint, {**trainer.state_dict(), "rows": rows})
                    scratch.check()

            while trainer.epochs_done < config.epochs:
                loss = trainer.epoch(on_batch)
                refuse_divergence(loss)
                rows.append((trainer.epochs_done, loss, accuracy()))
                watch = f"loss {loss:.3f}  {looked_at} accuracy {rows[-1][2]:.4f}"
        write_csv(history, ("epoch", "loss", f"{looked_at}_accuracy"), rows)
        save_weights(out, freeze(classifier))
        scratch.done()
    said = f"{name}: {looked_at} accuracy {rows[-1][2]:.4f} (n={len(seen_labels)})"
    poor = rows[-1][2] < 1.5 / section.shape.classes
    say(f"FLAG: {said}, hardly better than chance: {remedy}, or train longer" if poor else said)


def make_trainer(
    params: Params, dataset: str, training: str, hardware: Hardware, images: Path
) -> ClassifierTrainer:
    """A trainer at the beginning, with an adversary if the training is adversarial."""
    section, device = params.dataset(dataset), hardware.device
    train = load_images(images, "train", section)
    torch.manual_seed(params.seed)  # weight initialization takes no generator
    classifier = new_classifier(params, dataset).to(device)
    schedule, adversary = section.classifier, None
    if training == "adversarial":
        schedule = adversarial = section.adversarial
        threat = ThreatModel("linf", adversarial.eps_255)
        adversary = Adversary(threat, adversarial.steps, adversarial.step_255)
    own = schedule.model_dump(include=set(Schedule.model_fields))
    config = ClassifierTrainConfig(**section.training.model_dump(), **own)
    return ClassifierTrainer(
        classifier,
        from_bytes(train.images).to(device),
        train.labels.to(device),
        config,
        generator=make_generator(params.seed, "classifier", dataset, device=device),
        adversary=adversary,
        compiled=worth_compiling(config, len(train.images), device),
    )


def worth_compiling(config: ClassifierTrainConfig, images: int, device: torch.device) -> bool:
    """Whether torch.compile pays off: for long training on a GPU; a CPU gains 10 % (measured)."""
    batches = config.epochs * (images // config.batch)
    worth = device.type == "cuda" and batches >= COMPILED_BATCHES
    how = "torch.compile (TORCH_COMPILE_DISABLE=1 turns it off)" if worth else "not compiled"
    detail(f"engine: classifier in {config.precision}, channels last, {how} ({batches} batches)")
    return worth
