"""Which implementation of the chain a job gets, and what is said about it."""

import re
from functools import partial
from inspect import unwrap

import pytest
import torch

from defense.energy import ConvEnergy
from defense.fast.langevin import FastLangevin
from defense.fast.precision import arithmetic, tensor_cores
from defense.langevin import Chain, ChainLog, LangevinConfig, langevin
from stages import StageError
from stages.core import console, engine
from stages.core.hardware import Hardware

CPU = Hardware(torch.device("cpu"), 100)
GPU = Hardware(torch.device("cuda"), 100)


def chosen(steps: int, precision: str = "float32", hardware: Hardware = CPU) -> str:
    energy = ConvEnergy(image_size=8, channels=1, width=4)
    chain = engine.choose_chain(energy, steps, precision, hardware)
    return "fast" if isinstance(unwrap(chain), FastLangevin) else "plain"


@pytest.mark.parametrize(
    ("steps", "precision", "expected"),
    [
        (3, "float32", "plain"),
        (3, "tf32", "plain"),
        (4, "float32", "fast"),
        (1500, "float32", "fast"),
        (1, "bfloat16", "fast"),
    ],
)
def test_a_short_chain_stays_plain(steps: int, precision: str, expected: str) -> None:
    assert chosen(steps, precision) == expected


def test_without_bfloat16_kernels_a_chain_is_one_of_float32(without_bfloat16) -> None:
    with pytest.warns(UserWarning, match="no bfloat16 kernels"):
        assert CPU.conditions()["bfloat16"] == "float32"
        assert chosen(3, "bfloat16") == "plain"
    assert chosen(4, "bfloat16") == "fast"


def test_a_gpu_gets_graphs_at_any_length(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 10**9))
    assert chosen(1, hardware=GPU) == "fast"


def test_the_environment_insists(monkeypatch) -> None:
    monkeypatch.setenv("STOCHSEC_ENGINE", "fast")
    assert chosen(1) == "fast"
    monkeypatch.setenv("STOCHSEC_ENGINE", "plain")
    assert chosen(1500) == "plain"
    with pytest.raises(StageError, match="plain computes in float32 or tf32, not in bfloat16"):
        chosen(1500, "bfloat16")
    monkeypatch.setenv("STOCHSEC_ENGINE", "compiled")
    with pytest.raises(StageError, match=r"STOCHSEC_ENGINE: expected one of .* got 'compiled'"):
        chosen(1500)


def test_both_compute_the_same_chain(tiny_energy, images) -> None:
    def run(steps: int, chain: Chain) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        return chain(tiny_energy, images, LangevinConfig(steps, 0.1), generator=generator)

    for steps in (3, 4):
        chain = engine.choose_chain(tiny_energy, steps, "float32", CPU)
        torch.testing.assert_close(run(steps, chain), run(steps, langevin), rtol=1e-4, atol=1e-5)


def test_what_runs_and_why_is_said_once_to_those_who_ask(monkeypatch, capsys) -> None:
    engine._say_once.cache_clear()
    monkeypatch.setattr(console, "verbose", False)
    chosen(7)
    assert not capsys.readouterr().err
    engine._say_once.cache_clear()
    monkeypatch.setattr(console, "verbose", True)
    for steps in (2, 8, 8):
        chosen(steps)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "engine: plain, float32, 2 steps (fewer than 4 steps a call)"
    assert said[1].startswith("engine: fast, float32, 8 steps (library kernels")
    assert "KiB an image" in said[1]
    assert len(said) == 2


def test_the_steps_of_a_chain_show_that_a_long_unit_of_work_lives(
    monkeypatch, tiny_energy, images, capsys
) -> None:
    monkeypatch.setattr(console.Track, "log_every", 0.0)
    chain = engine.choose_chain(tiny_energy, 5, "float32", CPU)
    run = partial(chain, tiny_energy, images, LangevinConfig(5, 0.1), generator=None)
    run()
    assert not capsys.readouterr().err
    with console.Track("attack", 3, unit="images") as track:
        run()
        line = r"attack: 0/3 images, 0/s, time left unknown +[1-9][\d,]* image-steps/s\n"
        assert re.fullmatch(line, capsys.readouterr().err)
        assert track.image_steps == 5 * len(images)
        track.advance(watch="2 robust")
        assert re.search(r"1/3 .* s left  2 robust  .* image-steps/s", capsys.readouterr().err)
    run()
    assert track.image_steps == 5 * len(images)


def test_precision_is_set_inside_and_restored() -> None:
    def state() -> tuple[bool, bool]:
        return torch.backends.cudnn.allow_tf32, torch.is_autocast_enabled("cpu")

    before, cpu = state(), torch.device("cpu")
    for precision, expected in (
        ("float32", (False, False)),
        ("tf32", (True, False)),
        ("bfloat16", (True, True)),
    ):
        with arithmetic(precision, cpu):
            assert state() == expected
        with tensor_cores(precision):
            assert state() == (expected[0], False)
    assert state() == before


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_the_fast_chain_has_the_precision(precision: str) -> None:
    energy = ConvEnergy(image_size=8, channels=1, width=4)
    assert unwrap(engine.choose_chain(energy, 10, precision, CPU)).precision == precision


@pytest.mark.parametrize(("precision", "allowed"), [("float32", False), ("tf32", True)])
def test_the_plain_chain_has_the_precision_and_the_log(quadratic, precision, allowed) -> None:
    seen, energy, log = set(), quadratic(0.1), ChainLog()
    energy.register_forward_hook(lambda *_: seen.add(torch.backends.cudnn.allow_tf32))
    chain = engine.plain_chain(precision)
    chain(energy, torch.zeros(2, 1, 2, 2), LangevinConfig(3, 0.1), generator=None, log=log)
    assert seen == {allowed}
    assert len(log.energies) == 3
