"""Stage 3: the energy, Algorithm 2 in two phases, and the branch that never converges.

`adam` is phase 1. `convergent` continues it with SGD (or, if ebm.phase_2 says so, with Adam at a
learning rate that decays to zero), `nonconvergent` with the same Adam for as many batches: the
paper's two models (Hill et al. 2021, Sections 2 and 4.1). Averaged weights (ebm.update.average) are
meant for the decaying rate. With averaging even `nonconvergent` would hardly drift, so it keeps the
weights of its last batch. `smooth_adam` and `smooth_convergent` train an energy with a smooth
activation, whose chains have useful gradients for attacks.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from defense.bank import CompactBank, DataBank, ImageBank, NoisyImages
from defense.ebm_training import EBMTrainConfig, EBMTrainer
from defense.langevin import LangevinConfig
from defense.pixels import from_bytes, to_net
from defense.rng import make_generator
from stages import StageError
from stages.core.artifacts import load_images, load_state, save_state, save_tensors, save_weights
from stages.core.console import Track, say
from stages.core.energies import new_energy
from stages.core.engine import choose_chain
from stages.core.files import write_csv
from stages.core.hardware import Hardware
from stages.core.levels import held_out_images, say_levels
from stages.core.params import PHASES, SMOOTH, Params
from stages.core.resume import Scratch, Stopwatch

ROW_EVERY = 10  # batches between two rows of the history
SAMPLES = 12  # persistent chains in a snapshot


def run(
    params: Params,
    dataset: str,
    phase: str,
    hardware: Hardware,
    *,
    images: Path,
    start: Path,
    out: Path,
    state_out: Path,
    snapshots_out: Path | None,
    history: Path,
) -> None:
    """Train one phase; ``start`` is the state that phase 1 left (unused by phase 1 itself)."""
    if phase not in PHASES:
        raise StageError(f"phase: expected one of {list(PHASES)}, got {phase!r}")
    trainer = make_trainer(params, dataset, phase, hardware, images)
    held_out = held_out_images(params, dataset, images)
    first = phase.removeprefix(SMOOTH) == "adam"
    inputs = {"images": images} if first else {"images": images, "start": start}
    if not first:
        go_on_from_phase_1(trainer, phase_before(phase), dataset, start, hardware)
    total = params.ebm.phase_1_batches if first else params.ebm.phase_2_batches

    def key(p: Params) -> object:
        others = {"classifier", "adversarial", "judged_on"}
        return p.seed, dataset, phase, p.ebm, p.energy, p.data[dataset].model_dump(exclude=others)

    rows: list[tuple[int, float, float]] = []
    snapshots: dict[str, Tensor] = {}
    moments = snapshot_batches(total, params.ebm.snapshots)
    due = moments if snapshots_out else set[int]()
    with Scratch(f"train-ebm-{dataset}-{phase}", params, key, inputs, hardware) as scratch:
        checkpoint = scratch.folder / "checkpoint.pt"
        if checkpoint.exists():
            state = load_state(checkpoint, "", hardware.device)
            rows, snapshots = state.pop("rows"), state.pop("snapshots")
            restore(trainer, state, checkpoint)
        saved = Stopwatch()
        what = f"ebm {dataset} {phase}"
        with Track(what, total, unit="batches", done=trainer.batches_done) as track:
            while trainer.batches_done < total:
                stats = trainer.update()
                scratch.lap()
                if trainer.batches_done % ROW_EVERY == 0:
                    gap, norm = float(stats.energy_gap), float(stats.gradient_norm)
                    if not math.isfinite(gap):
                        raise StageError(
                            f"{what}: the energy is not a number after {trainer.batches_done} "
                            "batches; lower the learning rate or use more Langevin steps"
                        )
                    rows.append((trainer.batches_done, gap, norm))
                    track.advance(ROW_EVERY, f"energy gap {gap:+.2f}  gradient norm {norm:.3f}")
                if trainer.batches_done in moments:
                    say_levels(params, dataset, phase, hardware, trainer, held_out)
                if trainer.batches_done in due:
                    snapshots |= snapshot(trainer)
                if saved.due() or scratch.stopping:
                    more = {"rows": rows, "snapshots": snapshots}
                    save_state(checkpoint, {**trainer.state_dict(), **more})
                    scratch.check()
        write_csv(history, ("batch", "energy_gap", "gradient_norm"), rows)
        tau = trainer.config.langevin.tau
        save_weights(out, trainer.trained, dataset=dataset, phase=phase, tau=tau)
        save_state(state_out, trainer.state_dict())
        about = {"dataset": dataset, "phase": phase, "tau": tau, "batches": sorted(due)}
        if snapshots_out:
            save_tensors(snapshots_out, snapshots, about)
        scratch.done()
    late = [gap for _, gap, _ in rows[-20:]]
    if late:
        say(f"{what}: mean energy gap {sum(late) / len(late):+.2f} over the last {len(late)} rows")


def make_trainer(
    params: Params, dataset: str, phase: str, hardware: Hardware, images: Path
) -> EBMTrainer:
    """A trainer at the beginning of Algorithm 2, with the optimizer of a phase."""
    section = params.dataset(dataset)
    device = hardware.device
    data = to_net(from_bytes(load_images(images, "train", section).images)).to(device)
    ebm, update = params.ebm, params.ebm.update
    if update.batch > len(data):
        raise StageError(
            f"ebm.update.batch: expected <= {len(data)} training images, got {update.batch}"
        )
    torch.manual_seed(params.seed)  # weight initialization takes no generator
    energy = new_energy(params, dataset, phase).to(device)
    generator = make_generator(params.seed, "ebm", dataset, phase, device=device)
    noisy = NoisyImages(data, section.data_noise, mirror=update.mirror)
    bank: ImageBank
    if update.bank is None:
        bank = CompactBank.uniform(data.shape, generator=generator)
    else:
        bank = DataBank(noisy, update.bank, update.life, generator=generator)
    settles = phase.removeprefix(SMOOTH) == "convergent"
    sgd = settles and ebm.phase_2 == "sgd"
    config = EBMTrainConfig(
        optimizer="sgd" if sgd else "adam",
        learning_rate=section.sgd_lr if sgd else section.adam_lr,
        batch=update.batch,
        langevin=LangevinConfig(update.steps, section.tau),
        precision=update.precision,
        falls_over=ebm.phase_2_batches if settles and ebm.phase_2 == "cosine" else None,
        coupled=update.coupled,
        average=0.0 if phase == "nonconvergent" else update.average,
    )
    chain = choose_chain(energy, update.steps, update.precision, hardware)
    return EBMTrainer(energy, noisy, bank, config, generator=generator, chain=chain)


def snapshot_batches(total: int, count: int) -> set[int]:
    """The batches after which a phase is looked at: evenly spaced, its last one included."""
    return {max(1, total * i // count) for i in range(1, count + 1)}


def snapshot(trainer: EBMTrainer) -> dict[str, Tensor]:
    """Weights and the first persistent chains (n,C,H,W) as they are, named after the batch."""
    slots = torch.arange(min(SAMPLES, len(trainer.bank)), device=trainer.data.images.device)
    kept = {"chains": trainer.bank.read(slots)}
    kept |= {f"energy/{name}": value for name, value in trainer.trained.state_dict().items()}
    return {f"{trainer.batches_done}/{name}": value.cpu().clone() for name, value in kept.items()}


def phase_before(phase: str) -> str:
    """The phase whose state a phase goes on from."""
    return f"{SMOOTH}adam" if phase.startswith(SMOOTH) else "adam"


def go_on_from_phase_1(
    trainer: EBMTrainer, before: str, dataset: str, start: Path, hardware: Hardware
) -> None:
    """Load weights and bank from phase 1, and for Adam the optimizer state.

    The noise generator and the count of batches start anew.
    """
    state = load_state(start, f"`stochsec train-ebm {dataset} {before}`", hardware.device)
    state["generator"] = trainer.generator.get_state()
    state["batches_done"] = 0
    if trainer.config.optimizer == "sgd":
        state["optimizer"] = trainer.optimizer.state_dict()
    restore(trainer, state, start)


def restore(trainer: EBMTrainer, state: dict[str, Any], path: Path) -> None:
    """Put a state into the trainer; `StageError` if it is of another network or dataset."""
    try:
        trainer.load_state_dict(state)
    except (KeyError, IndexError, TypeError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise StageError(f"{path}: does not fit the parameters: {reason}") from None
