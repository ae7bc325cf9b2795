"""Long work in windows: time limits, checkpoints that travel, work that goes on elsewhere."""

import math
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml

from stages.core.artifacts import load_tensors
from stages.core.console import Track
from stages.core.files import Paths, readable
from stages.core.hardware import Hardware
from stages.core.records import AttackResult
from tests.tiny import ROOT, command, tiny_params

PATHS = Paths("tiny", "digits")
MORE_BATCHES = 600
ATTACK = "attack digits no_attack --params long.yaml"  # breaks nothing: all steps are taken
TRAIN = "train-ebm digits adam --params long.yaml"
CLASSIFY = "train-classifier digits --params long.yaml"
EVALUATE = "evaluate digits --params long.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with trained tiny models, and longer work in long.yaml."""
    folder = tmp_path_factory.mktemp("windows")
    before = Path.cwd()
    os.chdir(folder)
    values = tiny_params()
    Path("params.yaml").write_text(yaml.safe_dump(values))
    for words in (
        "prepare-data digits",
        "train-classifier digits",
        "train-ebm digits adam",
        "train-ebm digits convergent",
        "attack digits pgd",
    ):
        assert command(words).exit_code == 0, words
    values["ebm"]["phase_1_batches"] = MORE_BATCHES
    values["evaluate"]["images"] = 12
    values["evaluate"]["attacks"]["no_attack"]["steps"] = 30
    Path("long.yaml").write_text(yaml.safe_dump(values))
    for words in (TRAIN, ATTACK, CLASSIFY):
        assert command(f"{words} --out whole.{words.split()[0]}").exit_code == 0
    assert command(f"{EVALUATE} --out whole.evaluate").exit_code == 0
    yield folder
    os.chdir(before)


@pytest.fixture(autouse=True)
def nothing_left(folder: Path) -> Iterator[None]:
    yield
    shutil.rmtree(".scratch", ignore_errors=True)
    Path("work.zip").unlink(missing_ok=True)


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the clock: the time is up at so many looks at it."""

    def set_clock(count: float) -> None:
        left = count

        def seconds_left(hardware: Hardware) -> float:
            nonlocal left
            left -= 1
            return 1000.0 if left >= 0 else 0.0

        monkeypatch.setattr(Hardware, "seconds_left", seconds_left)

    return set_clock


def windows(
    words: str, count: int, looks: Callable[[float], None], *, elsewhere: bool = False
) -> int:
    """Run a command in windows of so many looks at the clock until it is done; their number.

    ``elsewhere``: every window begins on a machine that has nothing but the checkpoint file.
    """
    for number in range(1, 100):
        looks(count)
        result = command(f"{words} --time-limit 20")
        if result.exit_code == 0:
            return number
        assert result.exit_code == 75, result.output
        assert "the time is up" in result.output
        assert "run the same command to continue" in result.output
        if elsewhere:
            shutil.rmtree(".scratch")
    raise AssertionError("it never ends")


def test_training_in_windows_ends_at_the_same_weights(folder: Path, looks) -> None:
    assert windows(f"{TRAIN} --out parts.safetensors", 450, looks) == 2
    assert Path("parts.safetensors").read_bytes() == Path("whole.train-ebm").read_bytes()


@pytest.mark.parametrize(("words", "count"), [(TRAIN, 250), (ATTACK, 40), (CLASSIFY, 15)])
def test_work_travels_in_one_file(folder: Path, looks, words: str, count: int) -> None:
    name = words.split()[0]
    travels = f"{words} --out moved.{name} --checkpoint travels/work.zip"
    assert windows(travels, count, looks, elsewhere=True) == 3
    assert Path(f"moved.{name}").read_bytes() == Path(f"whole.{name}").read_bytes()
    assert not Path("travels/work.zip").exists(), "the work is done"


def test_an_evaluation_travels_with_the_attack_it_is_at(folder: Path, looks) -> None:
    words = f"{EVALUATE} --out moved.evaluate --checkpoint work.zip"
    assert windows(words, 40, looks, elsewhere=True) > 3
    for path in Path("whole.evaluate").iterdir():
        assert path.read_bytes() == (Path("moved.evaluate") / path.name).read_bytes(), path.name


def test_the_size_of_what_is_kept_is_said(folder: Path, looks) -> None:
    looks(20)
    result = command(f"{TRAIN} --out parts.safetensors --checkpoint work.zip ")
    assert f"work.zip ({readable(Path('work.zip'))}) keeps what is done" in result.output
    with zipfile.ZipFile("work.zip") as archive:
        state = next(info for info in archive.infolist() if info.filename == "checkpoint.pt")
    images = 1297 * 64
    assert images < state.file_size < 2.2 * images, "the bank is in 8 bits a value"


def test_a_signal_leaves_the_file_too(folder: Path) -> None:
    arguments = [sys.executable, "-m", "stages", *TRAIN.split(), "--checkpoint", "work.zip"]
    arguments += ["--out", "moved.safetensors"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),  # the same sums as here
    }
    process = subprocess.Popen(arguments, env=environment, stderr=subprocess.DEVNULL)
    while not list(Path(".scratch").glob("train-ebm-digits-adam-*.lock")):
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 130
    shutil.rmtree(".scratch")
    assert command(f"{TRAIN} --checkpoint work.zip --out moved.safetensors").exit_code == 0
    assert Path("moved.safetensors").read_bytes() == Path("whole.train-ebm").read_bytes()


def test_a_window_too_short_for_one_piece_says_so(folder: Path, looks) -> None:
    looks(10)
    result = command(f"{ATTACK} --out parts.safetensors --time-limit 3")
    assert result.exit_code == 76
    assert "3 minutes are too few for one piece of this work" in result.output


def test_a_checkpoint_of_other_work_is_refused(folder: Path, looks) -> None:
    looks(20)
    stopped = command(f"{TRAIN} --checkpoint work.zip --out other.safetensors")
    assert stopped.exit_code == 75
    values = yaml.safe_load(Path("long.yaml").read_text())
    values["seed"] = 5
    Path("seed.yaml").write_text(yaml.safe_dump(values))
    for words, reason in (
        (ATTACK, "is a checkpoint of other work"),
        (TRAIN.replace("long", "seed"), "is a checkpoint of other parameters"),
    ):
        result = command(f"{words} --checkpoint work.zip --out other.safetensors")
        assert result.exit_code == 2
        assert reason in " ".join(result.output.split())
    assert Path("work.zip").exists(), "nothing is lost"
    Path("work.zip").write_bytes(b"no zip file")
    result = command(f"{TRAIN} --checkpoint work.zip --out other.safetensors")
    assert result.exit_code == 2
    assert "work.zip: not a checkpoint file" in " ".join(result.output.split())


def test_newer_work_of_this_machine_is_not_thrown_away(folder: Path, looks) -> None:
    words = f"{TRAIN} --checkpoint work.zip --out parts.safetensors"
    looks(20)
    assert command(words).exit_code == 75
    old = Path("work.zip").read_bytes()
    looks(20)
    assert command(words).exit_code == 75
    Path("work.zip").write_bytes(old)  # an old copy; when it was copied says nothing
    before = batches_done(next(Path(".scratch").glob("train-ebm-*/checkpoint.pt")))
    looks(20)
    assert command(words).exit_code == 75
    assert batches_done(next(Path(".scratch").glob("train-ebm-*/checkpoint.pt"))) == before + 21


def test_a_damaged_checkpoint_takes_nothing_away(folder: Path, looks) -> None:
    words = f"{TRAIN} --checkpoint work.zip --out parts.safetensors"
    looks(20)
    assert command(words).exit_code == 75
    content = bytearray(Path("work.zip").read_bytes())
    content[len(content) // 2] ^= 255
    Path("work.zip").write_bytes(content)
    for path in Path(".scratch").glob("train-ebm-*/*"):
        os.utime(path, (0, 0))  # older than what the file holds
    for _ in range(2):
        result = command(words)
        assert result.exit_code == 2
        assert "work.zip: not a checkpoint file" in " ".join(result.output.split())
        assert list(Path(".scratch").glob("train-ebm-*/checkpoint.pt")), "the work is still there"
    assert not list(Path(".scratch").glob("*.unpacked"))


def test_a_place_that_cannot_be_written_to_is_said_at_once(folder: Path, looks) -> None:
    Path("file").write_text("no folder")
    looks(20)
    result = command(f"{TRAIN} --checkpoint file/work.zip --out parts.safetensors")
    assert result.exit_code == 2
    assert "file/work.zip: cannot be written" in " ".join(result.output.split())


def test_a_signal_in_the_last_shard_of_an_attack_ends_the_evaluation(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = Track.advance

    def stop_there(track: Track, *arguments: object, **named: object) -> None:
        if track.what.endswith("-identity") and track.done == track.total - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        advance(track, *arguments, **named)

    monkeypatch.setattr(Track, "advance", stop_there)
    result = command(f"{EVALUATE} --out stopped.evaluate")
    assert result.exit_code == 130
    assert "identity digits: natural" in result.output, "the shard was finished"
    assert "no_attack digits: natural" not in result.output
    monkeypatch.undo()
    assert command(f"{EVALUATE} --out stopped.evaluate").exit_code == 0
    for path in Path("whole.evaluate").iterdir():
        assert path.read_bytes() == (Path("stopped.evaluate") / path.name).read_bytes(), path.name


def batches_done(path: Path) -> int:
    return int(torch.load(path, weights_only=True)["batches_done"])


def test_another_machine_goes_on_and_the_record_says_so(folder: Path, looks) -> None:
    looks(40)
    words = f"{ATTACK} --checkpoint work.zip --out mixed.safetensors"
    assert command(words).exit_code == 75
    looks(math.inf)
    result = command(f"{words} --max-chains 7")
    assert result.exit_code == 0
    assert "made by another machine; continuing its work here" in result.output
    assert AttackResult.load(Path("mixed.safetensors")).about["max_chains"] == "200, 7"


def test_the_environment_limits_what_dvc_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STOCHSEC_TIME_LIMIT", "20")
    assert 1190 < Hardware.choose("cpu").seconds_left() <= 1200
    monkeypatch.setenv("STOCHSEC_TIME_LIMIT", "soon")
    result = command("attack digits pgd")
    assert result.exit_code == 2
    assert "STOCHSEC_TIME_LIMIT: expected minutes > 0, got 'soon'" in result.output


def test_an_inspection_goes_on_from_start_to_start(folder: Path, looks) -> None:
    words = "inspect digits"
    assert command(f"{words} --out whole.inspect").exit_code == 0
    words = f"{words} --checkpoint work.zip --out moved.inspect"
    assert windows(words, 1, looks, elsewhere=True) == 5, "three starts, two kinds of images"
    whole, moved = (load_tensors(Path(f"{name}.inspect"))[0] for name in ("whole", "moved"))
    assert whole.keys() == moved.keys()
    assert all(whole[name].equal(moved[name]) for name in whole)
