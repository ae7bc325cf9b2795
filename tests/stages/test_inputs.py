"""Real inputs of the wrong kind: one line that says what to do, no wrong number, nothing lost."""

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stages.core.artifacts import load_tensors, save_tensors
from stages.core.files import Paths, Whole
from tests.tiny import command, tiny_params

PATHS = Paths("tiny", "digits")


@pytest.fixture(autouse=True)
def folder(experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the tiny experiment to try things in."""
    shutil.copytree(experiment / "artifacts", tmp_path / "artifacts")
    shutil.copy(experiment / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fails(words: str) -> str:
    """What a command says that fails with one line."""
    result = command(words)
    said = " ".join(result.output.split())
    assert result.exit_code == 2, said
    assert "error: " in said
    return said


class Small(nn.Module):
    """A network of digits whose output may be wrapped."""

    def __init__(self, wrap: Callable[[Tensor], object] = lambda z: z) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)
        )
        self.drop = nn.Dropout(0.5)
        self.dropping = False
        self.wrap = wrap

    def forward(self, x: Tensor) -> object:
        h = self.layers(x)
        return self.wrap(self.drop(h) if self.dropping else h)


def exported(network: nn.Module, path: str = "mine.pt2") -> str:
    batch = torch.export.Dim("batch")
    shapes = ({0: batch},)
    program = torch.export.export(network, (torch.rand(2, 1, 8, 8),), dynamic_shapes=shapes)
    torch.export.save(program, path)
    return path


def test_a_program_in_evaluation_mode_is_taken() -> None:
    path = exported(Small().eval())
    assert command(f"attack digits pgd --classifier {path}").exit_code == 0


def test_a_program_of_torchscript_is_taken_and_weights_of_that_name_are_not() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(64, 10))
    torch.jit.script(network).save("mine.pt")
    assert command("attack digits pgd --classifier mine.pt").exit_code == 0
    torch.save(network.state_dict(), "weights.pt")
    said = fails("attack digits pgd --classifier weights.pt")
    assert "not a program of TorchScript" in said
    assert "`stochsec convert` makes one" in said


def test_a_program_that_was_exported_in_training_mode_is_refused() -> None:
    assert "depends on the other images in the batch" in fails(
        f"attack digits pgd --classifier {exported(Small().train())}"
    )


def test_a_program_with_dropout_at_work_is_refused() -> None:
    network = Small().eval()
    network.drop.train()
    network.dropping = True
    assert "its answer to an image changes from call to call" in fails(
        f"attack digits pgd --classifier {exported(network)}"
    )


def test_logits_in_a_dictionary_are_taken_and_two_tensors_are_not() -> None:
    path = exported(Small(lambda z: {"logits": z}).eval())
    assert command(f"attack digits pgd --classifier {path}").exit_code == 0
    path = exported(Small(lambda z: (z, z + 1)).eval(), "two.pt2")
    assert "expected logits" in fails(f"attack digits pgd --classifier {path}")


@pytest.mark.parametrize("suffix", [".pth", ".th", ".ckpt"])
def test_weights_without_an_architecture_are_told_how_to_come_in(suffix: str) -> None:
    torch.save({"state_dict": Small().state_dict()}, f"mine{suffix}")
    assert "`stochsec convert`" in fails(f"attack digits pgd --classifier mine{suffix}")


def test_a_classifier_whose_training_diverges_is_an_error_and_no_file() -> None:
    values = tiny_params()
    values["data"]["digits"]["classifier"]["learning_rate"] = 1e6
    Path("wild.yaml").write_text(yaml.safe_dump(values))
    said = fails("train-classifier digits --params wild.yaml --out wild.safetensors")
    assert "the loss is not a number in epoch" in said
    assert "data.digits.classifier.learning_rate" in said
    assert not Path("wild.safetensors").exists()


def test_weights_that_are_no_numbers_are_refused() -> None:
    path = PATHS.classifier()
    with_nan = {name: value * torch.nan for name, value in load_file(path).items()}
    save_file(with_nan, "nan.safetensors")
    assert "its weights are NaN or infinite" in fails(
        "attack digits pgd --classifier nan.safetensors"
    )


def test_images_that_were_made_for_another_classifier_are_not_transferred() -> None:
    other = PATHS.classifier("adversarial")
    for words in ("attack digits transfer_K", "evaluate digits", "compare digits"):
        said = fails(f"{words} --classifier {other} --out other")
        assert "its images were made for another classifier than" in said, words
        assert "run `stochsec attack DATASET pgd --classifier" in said
    made = f"attack digits pgd --classifier {other} --out mine.safetensors"
    assert command(made).exit_code == 0
    fits = f"attack digits transfer_K --classifier {other} --pgd mine.safetensors --out other"
    assert command(fits).exit_code == 0


@pytest.mark.parametrize(("name", "value"), [("norm", "l2"), ("eps_255", 24)])
def test_images_of_another_ball_are_not_transferred(name: str, value: object) -> None:
    values = tiny_params()
    values["attack"]["threat"][name] = value
    values["evaluate"]["attacks"].pop("square")
    Path("other.yaml").write_text(yaml.safe_dump(values))
    said = fails("attack digits transfer_K --params other.yaml --out other")
    assert f"its images were made with {name} = " in said
    assert f"params.yaml says {value}" in said


def test_a_place_that_cannot_be_written_is_one_line() -> None:
    Path("file").write_text("mine")
    for words in ("check-params", "prepare-data digits", "train-ebm digits adam"):
        said = fails(f"{words} --out file/below")
        assert "file" in said
        assert "what was finished before is kept" in said
    assert Path("file").read_text() == "mine"


def test_a_full_disk_is_said_whatever_a_library_calls_it(monkeypatch) -> None:
    class Usage:
        free = 0

    monkeypatch.setattr("stages.core.files.shutil.disk_usage", lambda path: Usage)
    Path("out").write_text("old")
    with pytest.raises(Exception, match="out: no space left on its disk"), Whole(Path("out")):
        raise RuntimeError("PytorchStreamWriter failed writing file")
    assert Path("out").read_text() == "old"


def test_files_have_the_mode_of_the_umask() -> None:
    before = os.umask(0o022)
    try:
        assert command("train-classifier digits --out mine.safetensors").exit_code == 0
    finally:
        os.umask(before)
    assert stat.S_IMODE(Path("mine.safetensors").stat().st_mode) == 0o644


def test_where_there_are_no_file_locks_of_posix_stages_run(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "fcntl", None)
    assert command("train-classifier digits --out mine.safetensors").exit_code == 0


def test_an_energy_of_another_tau_is_refused() -> None:
    values = tiny_params()
    values["data"]["digits"]["tau"] = 0.09
    Path("other.yaml").write_text(yaml.safe_dump(values))
    said = fails("attack digits bpda_eot --params other.yaml --out out.safetensors")
    assert "was trained with tau 0.08, and data.digits.tau is 0.09" in said


@pytest.mark.parametrize("words", ["attack digits bpda_eot", "compare digits", "sweep digits"])
def test_an_energy_that_diverged_is_refused(words: str) -> None:
    path = PATHS.model("ebm_convergent")
    save_file({name: value * torch.nan for name, value in load_file(path).items()}, path)
    assert "its training has diverged" in fails(f"{words} --out out.safetensors")


def test_a_last_update_that_diverges_is_an_error() -> None:
    values = tiny_params()
    values["data"]["digits"]["training"]["batch"] = 5000
    values["data"]["digits"]["classifier"] |= {"learning_rate": 1e30, "epochs": 1}
    Path("wild.yaml").write_text(yaml.safe_dump(values))
    said = fails("train-classifier digits --params wild.yaml --out wild.safetensors")
    assert "the training has diverged; lower data.digits.classifier.learning_rate" in said
    assert not Path("wild.safetensors").exists()


def test_files_that_are_not_ours_are_not_replaced() -> None:
    notes, weights = Path("notes.txt"), Path("mine.safetensors")
    notes.write_text("precious")
    shutil.copy(PATHS.classifier(), weights)
    content = weights.read_bytes()
    assert "not a checkpoint file" in fails(
        f"attack digits pgd --no-resume --checkpoint {notes} --out out.safetensors"
    )
    assert "is a network" in fails(f"attack digits pgd --classifier {weights} --out {weights}")
    assert "no .zip file" in fails(f"export {notes}")
    assert "another ending than .csv" in fails("train-classifier digits --out weights.csv")
    os.mkfifo("pipe")
    assert "expected a regular file" in fails("check-params --out pipe")
    assert notes.read_text() == "precious"
    assert weights.read_bytes() == content


def test_images_made_by_another_attack_are_not_transferred() -> None:
    for key, value in (("steps", 9), ("restarts", 2)):
        values = tiny_params()
        values["attack"]["pgd"][key] = value
        Path("other.yaml").write_text(yaml.safe_dump(values))
        said = fails("attack digits transfer_K --params other.yaml --out out.safetensors")
        assert f"its images were made with {key} =" in said


def test_images_with_other_labels_are_not_transferred() -> None:
    with np.load(PATHS.images) as arrays:
        contents = dict(arrays)
    contents["test_labels"] = (contents["test_labels"] + 1) % 10
    np.savez(PATHS.images, **contents)
    assert "expected a record of attack pgd on the same" in fails(
        "attack digits transfer_K --out out.safetensors"
    )


def test_an_image_file_of_floating_pixels_is_refused() -> None:
    with np.load(PATHS.images) as arrays:
        contents = dict(arrays)
    contents["test_images"] = contents["test_images"].astype(np.float32) / 255
    np.savez("mine.npz", **contents)
    said = fails("attack digits pgd --images mine.npz --out out.safetensors")
    assert "expected images uint8" in said


def test_records_of_different_networks_make_no_report() -> None:
    other = Paths("tiny", "digits").own("other.safetensors")
    nets = f"--energy {PATHS.model('ebm_smooth_convergent')}"
    assert command(f"attack digits bpda_eot {nets} --out {other}").exit_code == 0
    tensors, about = load_tensors(other)
    about["energy"] = "convergent"
    save_tensors(PATHS.record("bpda_eot"), tensors, about)
    assert "was made of another ebm_convergent than" in fails("report")


def test_studies_of_other_images_make_no_report() -> None:
    path = PATHS.record("compare")
    tensors, about = load_tensors(path)
    save_tensors(path, tensors, about | {"judged_on": "held_out"})
    assert "expected judged_on = test as in params.yaml, got held_out" in fails("report")


def test_a_preset_that_cannot_be_written_is_one_line() -> None:
    assert "error: " in fails("preset digits --params params.yaml/x")


def test_what_a_killed_run_left_goes() -> None:
    left = PATHS.evaluation("convergent").with_name(".evaluate_convergent.123456789.partial")
    shutil.copytree(PATHS.evaluation("convergent"), left)
    assert command("report").exit_code == 0
    assert command("evaluate digits").exit_code == 0
    assert not left.exists()
