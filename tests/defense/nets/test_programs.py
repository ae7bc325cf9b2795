"""Programs of torch.export and TorchScript as networks, with what they say of themselves."""

from pathlib import Path

import pytest
import torch
from torch import nn

from defense import LangevinConfig, langevin
from defense.energy import ConvEnergy
from defense.nets.programs import EnergyProgram, Program, load_program, save_program

SAYS = {"shape": [1, 8, 8], "tau": 0.1, "sigma": 0.05}


def saved(network: nn.Module, path: Path, **about: object) -> Path:
    save_program(network, torch.rand(2, 1, 8, 8), about, path)
    return path


def test_a_program_takes_batches_of_any_size_and_says_what_it_was_made_of(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval()
    program = load_program(saved(network, tmp_path / "a.pt2", model="mine"), Program)
    for count in (1, 2, 7):
        x = torch.rand(count, 1, 8, 8)
        torch.testing.assert_close(program(x), network(x))
    assert program.about == {"model": "mine"}
    assert not any(weight.requires_grad for weight in program.parameters())


def test_torchscript_is_put_into_evaluation_mode(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 3))
    torch.jit.script(network.train()).save(str(tmp_path / "a.pt"))
    program, x = load_program(tmp_path / "a.pt", Program), torch.rand(4, 1, 8, 8)
    torch.testing.assert_close(program(x), network.eval()(x))
    assert program.about == {}


def test_an_energy_runs_the_plain_chain_as_its_module_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    energy = ConvEnergy(image_size=8, channels=1, width=4)
    program = load_program(saved(energy, tmp_path / "a.pt2", **SAYS), EnergyProgram)
    assert (program.shape, program.tau, program.sigma) == ((1, 8, 8), 0.1, 0.05)
    x, config = torch.rand(3, 1, 8, 8), LangevinConfig(5, program.tau)
    ends = [
        langevin(f, x, config, generator=torch.Generator().manual_seed(1))
        for f in (energy, program)
    ]
    torch.testing.assert_close(*ends)
    with pytest.raises(ValueError, match=r"expected images \(N,1,8,8\), got shape \(3, 1, 9, 8\)"):
        program(torch.rand(3, 1, 9, 8))


@pytest.mark.parametrize("lacking", SAYS)
def test_an_energy_must_say_its_shape_step_and_noise(tmp_path: Path, lacking: str) -> None:
    about = {name: value for name, value in SAYS.items() if name != lacking}
    path = saved(ConvEnergy(image_size=8, channels=1, width=4), tmp_path / "a.pt2", **about)
    with pytest.raises(ValueError, match="does not state the shape, tau and sigma"):
        load_program(path, EnergyProgram)


@pytest.mark.parametrize(("name", "kind"), [("a.pt2", "torch.export"), ("a.pt", "TorchScript")])
def test_other_files_are_one_line(tmp_path: Path, name: str, kind: str) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / name)
    with pytest.raises(ValueError, match=f"not a program of {kind}"):
        load_program(tmp_path / name, Program)
