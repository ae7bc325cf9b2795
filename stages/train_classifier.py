"""Stage 2: the naturally trained classifier that is to be secured."""

from pathlib import Path

import torch

from defense.classifier_training import ClassifierTrainConfig, ClassifierTrainer
from defense.inference import classify, freeze
from defense.pixels import from_bytes
from defense.rng import make_generator
from stages.artifacts import load_images, load_state, save_state, save_weights
from stages.classifiers import new_classifier
from stages.console import Track, detail, say
from stages.files import write_csv
from stages.hardware import Hardware
from stages.params import Params
from stages.resume import Scratch, Stopwatch

COMPILED_BATCHES = 5000  # from so many on a GPU, torch.compile gains more than its minute


def run(
    params: Params, dataset: str, hardware: Hardware, *, images: Path, out: Path, history: Path
) -> None:
    """Train on the training images; write weights and the curve of loss and accuracy."""
    section = params.dataset(dataset)
    train, test = (load_images(images, split, section) for split in ("train", "test"))
    device = hardware.device
    torch.manual_seed(params.seed)  # weight initialization takes no generator
    classifier = new_classifier(params, dataset).to(device)
    config = ClassifierTrainConfig(**section.classifier.model_dump())
    trainer = ClassifierTrainer(
        classifier,
        from_bytes(train.images).to(device),
        train.labels.to(device),
        config,
        generator=make_generator(params.seed, "classifier", dataset, device=device),
        compiled=worth_compiling(config, len(train.images), device),
    )
    test_images, test_labels = from_bytes(test.images).to(device), test.labels.to(device)

    def accuracy() -> float:
        classifier.eval()
        logits = classify(classifier, test_images, batch=1000)
        return float((logits.argmax(1) == test_labels).float().mean())

    def key(p: Params) -> object:
        return p.seed, dataset, p.classifier, p.data[dataset]

    rows: list[tuple[int, float, float]] = []
    epochs = section.classifier.epochs
    with Scratch(
        f"train-classifier-{dataset}", params, key, {"images": images}, hardware
    ) as scratch:
        checkpoint = scratch.folder / "checkpoint.pt"
        if checkpoint.exists():
            state = load_state(checkpoint, "", device)
            rows = state.pop("rows")
            trainer.load_state_dict(state)
        saved, watch = Stopwatch(), ""
        done = trainer.epochs_done * trainer.batches + trainer.batches_done
        with Track(
            f"classifier {dataset}", epochs * trainer.batches, unit="batches", done=done
        ) as track:

            def on_batch() -> None:
                track.advance(watch=watch)
                scratch.lap()
                if saved.due() or scratch.stopping:
                    save_state(checkpoint, {**trainer.state_dict(), "rows": rows})
                    scratch.check()

            while trainer.epochs_done < epochs:
                loss = trainer.epoch(on_batch)
                rows.append((trainer.epochs_done, loss, accuracy()))
                watch = f"loss {loss:.3f}  test accuracy {rows[-1][2]:.4f}"
        write_csv(history, ("epoch", "loss", "test_accuracy"), rows)
        save_weights(out, freeze(classifier))
        scratch.done()
    say(f"classifier {dataset}: test accuracy {rows[-1][2]:.4f} (n={len(test_labels)})")


def worth_compiling(config: ClassifierTrainConfig, images: int, device: torch.device) -> bool:
    """Whether the training is long enough; on a CPU it never is: measured, a tenth is gained."""
    batches = config.epochs * -(-images // config.batch)
    worth = device.type == "cuda" and batches >= COMPILED_BATCHES
    how = "torch.compile (TORCH_COMPILE_DISABLE=1 turns it off)" if worth else "not compiled"
    detail(f"engine: classifier in {config.precision}, channels last, {how} ({batches} batches)")
    return worth
