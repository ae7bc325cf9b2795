"""Train the network of a system: a PixelCNN, a denoiser, or the classifier on purified images."""

import math
from pathlib import Path

import torch

from defense.inference import freeze
from defense.pixels import from_bytes
from defense.rng import make_generator
from defense.systems import Trainer
from stages import StageError
from stages.core.artifacts import load_images, load_state, save_state, save_tensors
from stages.core.classifiers import load_classifier
from stages.core.console import Track, say
from stages.core.files import fingerprint, write_csv
from stages.core.hardware import Hardware
from stages.core.params import Params
from stages.core.resume import Scratch, Stopwatch
from stages.systems.build import settings_of, system_of

MEAN = 50  # updates that a reported loss is the mean of


def run(
    params: Params, name: str, hardware: Hardware, *, images: Path, classifier: Path, out: Path
) -> None:
    """Train on the training images; write weights, and the curve of the loss beside them.

    `StageError` if the system has nothing to train, or its loss is not finite.
    """
    system, dataset = system_of(params, name), params.compare_dataset
    inputs = {"images": images, "classifier": classifier}

    def key(p: Params) -> object:
        return p.seed, dataset, name, settings_of(system_of(p, name)), p.data[dataset]

    with Scratch(f"train-{dataset}-{name}", params, key, inputs, hardware) as scratch:
        trainer = make_trainer(params, name, hardware, images, classifier)
        checkpoint, rows = scratch.folder / "checkpoint.pt", list[tuple[int, float]]()
        if checkpoint.exists():
            state = load_state(checkpoint, "", hardware.device)
            rows = [(int(done), float(loss)) for done, loss in state.pop("rows")]
            trainer.load_state_dict(state)
        total, saved, updates = 0.0, Stopwatch(), trainer.fit.updates
        with Track(f"train {name}", updates, unit="updates", done=trainer.done) as track:
            while trainer.done < updates:
                total += trainer.step()
                track.advance(watch=f"loss {rows[-1][1]:.4f}" if rows else "")
                scratch.lap()
                if trainer.done % MEAN:
                    continue
                rows.append((trainer.done, total / MEAN))
                total = 0.0
                if not math.isfinite(rows[-1][1]):
                    raise StageError(
                        f"{name}: the loss is not a number after {trainer.done} updates; lower "
                        f"systems.settings.{name}.fit.learning_rate"
                    )
                if saved.due() or scratch.stopping:
                    save_state(checkpoint, {**trainer.state_dict(), "rows": rows})
                    scratch.check()
        about = {
            "network": type(trainer.network).__name__,
            "system": name,
            "settings": settings_of(system),
            "dataset": dataset,
            "files": {role: fingerprint(path) for role, path in inputs.items()},
            **hardware.conditions(),
        }
        save_tensors(out, freeze(trainer.network).state_dict(), about)
        write_csv(out.with_suffix(".csv"), ("updates", "loss"), rows)
        scratch.done()
    losses = f"; loss {rows[0][1]:.4f} -> {rows[-1][1]:.4f}" if rows else ""
    say(f"train {name}: {out}{losses}")


def make_trainer(
    params: Params, name: str, hardware: Hardware, images: Path, classifier: Path
) -> Trainer:
    """A trainer at the beginning; `StageError` if the system has nothing to train."""
    system, dataset = system_of(params, name), params.compare_dataset
    section, device = params.dataset(dataset), hardware.device
    if system.training is None:
        raise StageError(f"{name}: has nothing to train")
    bare = load_classifier(params, dataset, hardware, classifier)
    data = load_images(images, "train", section)
    torch.manual_seed(params.seed)  # weight initialization takes no generator
    network = system.network(section.shape.image, bare)
    assert network is not None
    return Trainer(
        system,
        system.training,
        network.to(device),
        bare,
        from_bytes(data.images).to(device),
        data.labels.to(device),
        generator=make_generator(params.seed, "systems", name, device=device),
    )
