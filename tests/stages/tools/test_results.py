"""Results that travel: packed, checked as a whole, reported; nothing is written if one is wrong."""

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image

from defense import load_classifier, load_energy
from defense.bank import CompactBank
from stages.core.artifacts import load_state, load_tensors, save_tensors
from stages.core.files import NETWORK_TIMES, Paths, WholeFolder, fingerprint
from stages.core.records import AttackResult
from stages.reporting import style
from stages.reporting.findings import convergence
from stages.reporting.provenance import source
from tests.tiny import command

PATHS = Paths("tiny", "digits")


@pytest.fixture(scope="module")
def packed(experiment: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny experiment in one file."""
    out = tmp_path_factory.mktemp("packed") / "results.zip"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(experiment)
        result = command(f"export {out}")
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture
def drawn() -> None:
    """For tests that look at the figures; for all others a report draws blanks, which is faster."""


@pytest.fixture(autouse=True)
def elsewhere(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Another machine: an empty folder."""
    monkeypatch.chdir(tmp_path)
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(style, "draw", lambda _, out, name: blank(out / f"figures/{name}.png"))
    return tmp_path


def blank(path: Path) -> None:
    """An empty picture."""
    path.parent.mkdir(exist_ok=True)
    Image.new("L", (8, 8)).save(path)


def changed(packed: Path, change: Callable[[dict[str, bytes]], None], *, rehash: bool) -> Path:
    """A copy of the file with other contents; ``rehash`` brings the manifest into line."""
    import hashlib

    with zipfile.ZipFile(packed) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    change(contents)
    if rehash:
        manifest = json.loads(contents["manifest.json"])
        manifest["files"] = {
            name: hashlib.sha256(data).hexdigest()
            for name, data in contents.items()
            if name != "manifest.json"
        }
        contents["manifest.json"] = json.dumps(manifest).encode()
    out = Path("changed.zip")
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    return out


def edited(data: bytes, edit: Callable[[AttackResult], None]) -> bytes:
    path = Path("edited.safetensors")
    path.write_bytes(data)
    result = AttackResult.load(path)
    edit(result)
    result.save(path)
    content = path.read_bytes()
    path.unlink()
    return content


def test_an_import_gives_the_report_of_the_machine_that_made_it(
    experiment: Path, packed: Path, drawn: None
) -> None:
    shutil.copytree(experiment / NETWORK_TIMES, NETWORK_TIMES)  # git brings them
    result = command(f"import {packed}")
    assert result.exit_code == 0, result.output
    theirs, ours = experiment / "reports/tiny", Path("reports/tiny")
    names = {path.relative_to(theirs) for path in theirs.rglob("*") if path.is_file()}
    assert names == {path.relative_to(ours) for path in ours.rglob("*") if path.is_file()}
    for name in names - {Path("provenance.json"), Path("index.html")}:
        assert (theirs / name).read_bytes() == (ours / name).read_bytes(), name
    assert "which images were attacked is not checked" in result.output


def test_the_report_says_where_results_come_from(packed: Path) -> None:
    assert command(f"import {packed}").exit_code == 0
    provenance = json.loads(Path("reports/tiny/provenance.json").read_text())
    assert provenance["import"]["source"] == source()
    assert provenance["import"].keys() >= {"commit", "device", "torch", "files"}
    record = provenance["records"]["digits/bpda_eot.safetensors"]
    assert record["sha256"] == fingerprint(PATHS.record("bpda_eot"))
    assert record["made of"]["energy"] == fingerprint(PATHS.model("ebm_convergent"))
    assert record["device"] == "cpu"
    assert record["imported"]
    compared = provenance["records"]["digits/compare.safetensors"]
    assert compared["made of"]["convergent"] == fingerprint(PATHS.model("ebm_convergent"))
    assert compared["made of"]["images"] == record["made of"]["images"]


def test_a_report_can_be_made_again_from_what_was_imported(packed: Path) -> None:
    assert command(f"import {packed}").exit_code == 0
    assert command("report --params reports/tiny/params.yaml --out again").exit_code == 0
    for path in Path("again").rglob("*.*"):
        twin = Path("reports/tiny") / path.relative_to("again")
        assert path.read_bytes() == twin.read_bytes(), path


BPDA = "records/digits/bpda_eot.safetensors"


def outside_the_ball(contents: dict[str, bytes]) -> None:
    def edit(result: AttackResult) -> None:
        result.record.adversarial[0] = 1 - result.record.adversarial[0].round()

    contents[BPDA] = edited(contents[BPDA], edit)


def outside_the_box(contents: dict[str, bytes]) -> None:
    def edit(result: AttackResult) -> None:
        result.record.adversarial[0, 0, 0, 0] = -0.01

    contents[BPDA] = edited(contents[BPDA], edit)


def not_finite(contents: dict[str, bytes]) -> None:
    def edit(result: AttackResult) -> None:
        result.record.clean_logits[0, 0] = torch.nan

    contents[BPDA] = edited(contents[BPDA], edit)


def other_conditions(contents: dict[str, bytes]) -> None:
    contents["params.yaml"] = contents["params.yaml"].replace(b"H_def: 5\n", b"H_def: 6\n")


def nan_in_the_comparison(contents: dict[str, bytes]) -> None:
    path = Path("compare.safetensors")
    path.write_bytes(contents["records/digits/compare.safetensors"])
    tensors, about = load_tensors(path)
    tensors["convergent/natural/logits"][0, 0, 0] = torch.inf
    save_tensors(path, tensors, about)
    contents["records/digits/compare.safetensors"] = path.read_bytes()
    path.unlink()


def another_energy(contents: dict[str, bytes]) -> None:
    models = "models/digits/ebm_{}.safetensors"
    contents[models.format("convergent")] = contents[models.format("nonconvergent")]


def no_energy(contents: dict[str, bytes]) -> None:
    contents["models/digits/ebm_adam.safetensors"] = b"garbage"


def another_classifier(contents: dict[str, bytes]) -> None:
    other = contents["models/digits/classifier_adversarial.safetensors"]
    contents["models/digits/classifier.safetensors"] = other


def no_classifier(contents: dict[str, bytes]) -> None:
    contents["models/digits/classifier.safetensors"] = b"garbage"


def images_too(contents: dict[str, bytes]) -> None:
    contents["data/digits.npz"] = b"others"


def a_history_of_something_else(contents: dict[str, bytes]) -> None:
    contents["records/digits/ebm_convergent.csv"] = b"a,b\n1,2\n"


def an_inspection_of_something_else(contents: dict[str, bytes]) -> None:
    path = Path("inspect.safetensors")
    path.write_bytes(contents["records/digits/inspect_convergent.safetensors"])
    _, about = load_tensors(path)
    save_tensors(path, {"grid": torch.tensor([0, 1])}, about)
    contents["records/digits/inspect_convergent.safetensors"] = path.read_bytes()
    path.unlink()


def no_device(contents: dict[str, bytes]) -> None:
    manifest = json.loads(contents["manifest.json"])
    del manifest["device"]
    contents["manifest.json"] = json.dumps(manifest).encode()


def one_bit(contents: dict[str, bytes]) -> None:
    data = bytearray(contents[BPDA])
    data[-1] ^= 1
    contents[BPDA] = bytes(data)


def one_more(contents: dict[str, bytes]) -> None:
    contents["records/digits/more.csv"] = b"a\n"


def a_way_out(contents: dict[str, bytes]) -> None:
    contents["../../out.csv"] = b"a\n"


def another_run(contents: dict[str, bytes]) -> None:
    manifest = json.loads(contents["manifest.json"])
    contents["manifest.json"] = json.dumps({**manifest, "run": "../up"}).encode()


@pytest.mark.parametrize(
    ("change", "rehash", "message"),
    [
        (outside_the_ball, True, "expected distance <= 0.188"),
        (outside_the_box, True, "adversarial pixels outside [0, 1]"),
        (not_finite, True, "clean_logits: values that are NaN or infinite"),
        (nan_in_the_comparison, True, "natural/logits: values that are NaN or infinite"),
        (other_conditions, True, "expected H_def = 6 as in params.yaml, got 5"),
        (another_energy, True, "was not made with the network ebm_convergent.safetensors beside"),
        (another_classifier, True, "was not made with the network classifier.safetensors beside"),
        (no_energy, True, "not an energy of `stochsec train-ebm`"),
        (no_classifier, True, "not a classifier of `stochsec train-classifier`"),
        (images_too, True, "data/digits.npz: no record and no network of a run"),
        (a_history_of_something_else, True, "a record is not what it should be"),
        (an_inspection_of_something_else, True, "a record is not what it should be"),
        (no_device, False, "not a file of `stochsec export`"),
        (one_bit, False, f"{BPDA}: its sha256 is not that of the manifest"),
        (one_more, False, "more.csv: in the archive or in its manifest, not in both"),
        (a_way_out, True, "../../out.csv: no record and no network of a run"),
        (another_run, False, "'../up' is no name of a run"),
    ],
)
def test_nothing_is_imported_if_anything_is_wrong(
    packed: Path, change: Callable[[dict[str, bytes]], None], rehash: bool, message: str
) -> None:
    path = changed(packed, change, rehash=rehash)
    result = command(f"import {path}")
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert [entry.name for entry in Path().iterdir()] == ["changed.zip"]


def test_a_file_that_is_no_export_is_one_line() -> None:
    Path("any.zip").write_bytes(b"no zip")
    for name, message in (("any.zip", "not a file of `stochsec export`"), ("no.zip", "no such")):
        result = command(f"import {name}")
        assert result.exit_code == 2
        assert message in " ".join(result.output.split())


def test_a_damaged_file_is_one_line(packed: Path) -> None:
    content = bytearray(packed.read_bytes())
    content[len(content) // 2] ^= 255
    Path("damaged.zip").write_bytes(content)
    result = command("import damaged.zip")
    assert result.exit_code == 2
    assert "damaged.zip: not a file of `stochsec export`" in " ".join(result.output.split())


def test_a_report_of_something_else_is_not_written_over(packed: Path) -> None:
    Path("reports/tiny").mkdir(parents=True)
    Path("reports/tiny/mine.txt").write_text("mine")
    result = command(f"import {packed}")
    assert result.exit_code == 2
    assert "reports/tiny: is not empty and has no provenance.json" in result.output
    assert not Path("artifacts").exists(), "nothing is written"


def test_records_that_are_here_are_not_overwritten_unasked(packed: Path) -> None:
    assert command(f"import {packed}").exit_code == 0
    result = command(f"import {packed}")
    assert result.exit_code == 2
    assert "--force" in result.output
    assert command(f"import {packed} --force").exit_code == 0


@pytest.mark.parametrize("name", ["bpda_eot", "evaluate_convergent/identity"])
@pytest.mark.parametrize("what", ["images", "labels", "index"])
def test_attacked_images_are_compared_with_those_that_are_here(
    experiment: Path, packed: Path, name: str, what: str
) -> None:
    images = Path("artifacts/tiny/data/digits.npz")
    images.parent.mkdir(parents=True)
    shutil.copy(experiment / images, images)
    record = f"records/digits/{name}.safetensors"

    def edit(result: AttackResult) -> None:
        getattr(result.images, what)[0] += 1

    def other_images(contents: dict[str, bytes]) -> None:
        contents[record] = edited(contents[record], edit)

    result = command(f"import {changed(packed, other_images, rehash=True)}")
    assert result.exit_code == 2
    assert f"{record}: its images or labels are not those of" in " ".join(result.output.split())
    assert command(f"import {packed}").exit_code == 0


def test_an_import_takes_the_place_of_what_it_replaces(experiment: Path, packed: Path) -> None:
    """Old records do not mix with new ones, nor new energies with old states; nothing is lost."""
    shutil.copytree(experiment / "artifacts", "artifacts")
    old = Path("artifacts/tiny/records/digits/old.safetensors")
    shutil.copy(PATHS.record("compare"), old)
    weights = PATHS.model("ebm_convergent")
    weights.write_bytes(PATHS.model("ebm_nonconvergent").read_bytes())
    mine = weights.read_bytes()
    result = command(f"import {packed}")
    assert result.exit_code == 2
    assert "--force moves it aside" in result.output
    assert old.exists()
    result = command(f"import {packed} --force")
    assert result.exit_code == 0
    aside = Path("artifacts/tiny/own/replaced-1")
    assert f"what was there is now in {aside}" in result.output
    assert (aside / "records/digits/old.safetensors").exists()
    assert (aside / "models/digits/ebm_convergent.safetensors").read_bytes() == mine
    assert (aside / "models/digits/ebm_convergent.state.pt").exists()
    assert not old.exists()
    assert weights.read_bytes() == (experiment / weights).read_bytes()
    assert not PATHS.state("ebm_convergent").exists(), "it belongs to the energy that was here"
    assert PATHS.state("ebm_adam").exists()


def test_what_is_made_here_after_an_import_is_not_called_imported(packed: Path) -> None:
    assert command(f"import {packed}").exit_code == 0
    path = PATHS.record("bpda_eot")
    result = AttackResult.load(path)
    result.about["torch"] = "another"
    result.save(path)
    assert command("report --params reports/tiny/params.yaml").exit_code == 0
    records = json.loads(Path("reports/tiny/provenance.json").read_text())["records"]
    assert not records["digits/bpda_eot.safetensors"]["imported"]
    assert records["digits/pgd.safetensors"]["imported"]


def test_what_was_not_run_says_so(packed: Path) -> None:
    """Half an experiment: no comparison, no evaluation, no BPDA+EOT."""
    gone = ("compare", "evaluate", "bpda_eot", "diagnose", "inspect", "active_test")

    def half(contents: dict[str, bytes]) -> None:
        for name in [name for name in contents if any(word in name for word in gone)]:
            del contents[name]

    result = command(f"import {changed(packed, half, rehash=True)}")
    assert result.exit_code == 0, result.output
    table = pd.read_csv("reports/tiny/table2.csv")
    ours = table[table.Defense == "Ours"].set_index("Dataset").loc["digits"]
    assert (ours["Source"], ours["Adv."]) == ("not run", "not run")
    first = pd.read_csv("reports/tiny/table1.csv").set_index(["Defense", "Dataset"])
    assert first.loc[("Ours", "digits"), "long K nat."].endswith("n=10")
    assert not list(Path("reports/tiny/figures").glob("figure4*"))


def test_an_evaluation_that_lacks_attacks_is_reported(packed: Path) -> None:
    def without(contents: dict[str, bytes]) -> None:
        for name in ("transfer", "identity", "no_attack"):
            del contents[f"records/digits/evaluate_convergent/{name}.safetensors"]

    result = command(f"import {changed(packed, without, rehash=True)}")
    assert result.exit_code == 0, result.output
    lines = pd.read_csv("reports/tiny/attacks.csv").set_index("energy").loc["convergent"]
    assert "identity" not in set(lines["attack"])
    assert {"exact", "smoothed", "square", "huge"} < set(lines["attack"])


def test_a_report_shows_nothing_of_an_earlier_one(packed: Path) -> None:
    assert command(f"import {packed}").exit_code == 0
    assert "figure4" in Path("reports/tiny/README.md").read_text()
    PATHS.record("compare").unlink()
    assert command("report --params reports/tiny/params.yaml --out reports/tiny").exit_code == 0
    assert "figure4" not in Path("reports/tiny/README.md").read_text()
    assert not Path("reports/tiny/curves.csv").exists()


@pytest.mark.parametrize("words", ["report", "publish"])
def test_a_folder_of_something_else_is_not_written_over(packed: Path, words: str) -> None:
    assert command(f"import {packed}").exit_code == 0
    Path("mine").mkdir()
    Path("mine/README.md").write_text("mine")
    result = command(f"{words} --params reports/tiny/params.yaml --out mine")
    assert result.exit_code == 2
    assert "mine: is not empty and has no" in result.output
    assert [path.name for path in Path("mine").iterdir()] == ["README.md"]


def test_a_run_without_networks_publishes_nothing(packed: Path) -> None:
    assert command(f"import {packed}").exit_code == 0
    shutil.rmtree("artifacts/tiny/models")
    result = command("publish --params reports/tiny/params.yaml")
    assert result.exit_code == 2
    assert "no networks to publish" in result.output
    assert not Path("pretrained").exists()


def test_a_new_folder_is_there_as_a_whole_or_not_at_all() -> None:
    out = Path("out")
    for content in ("old", "new"):
        with WholeFolder(out, "mark") as partial:
            (partial / "mark").write_text(content)
            (partial / content).touch()
    assert {path.name for path in out.iterdir()} == {"mark", "new"}
    with pytest.raises(InterruptedError), WholeFolder(out, "mark") as partial:
        (partial / "newer").touch()
        raise InterruptedError
    assert {path.name for path in out.iterdir()} == {"mark", "new"}
    assert [path.name for path in Path().iterdir()] == ["out"]


@pytest.mark.parametrize("start", ["test images", "noise"])
def test_chains_that_end_in_no_number_are_not_convergent(experiment: Path, start: str) -> None:
    tensors, _ = load_tensors(experiment / PATHS.record("inspect_convergent"))
    still = {
        name: tensors["persistent chains/levels"][:6].expand(len(tensors["grid"]), 6).clone()
        if name.endswith("energies")
        else value
        for name, value in tensors.items()
    }
    assert convergence(still).startswith("convergent")
    still[f"{start}/energies"][-1, 2] = torch.nan
    assert convergence(still).startswith("FLAG: not convergent")
    still[f"{start}/energies"][-1] = still["persistent chains/levels"].mean() + 5000
    assert convergence(still).startswith("FLAG: not convergent")


def test_a_new_card_leaves_what_it_did_not_write(experiment: Path, packed: Path) -> None:
    shutil.copytree(experiment / "artifacts/tiny/models", "artifacts/tiny/models")
    shutil.copytree(experiment / "pretrained/tiny", "mine")
    Path("mine/notes.txt").write_text("mine")
    PATHS.model("ebm_smooth_convergent").unlink()
    before = {path.name: path.read_bytes() for path in Path("mine").iterdir()}
    params = experiment / "params.yaml"
    assert command(f"publish --params {params} --out mine").exit_code == 0
    after = {path.name: path.read_bytes() for path in Path("mine").iterdir()}
    assert after.keys() == before.keys()
    assert after["index.json"] == before["index.json"]
    for name in ("notes.txt", "digits_smooth_convergent.safetensors"):
        assert after[name] == before[name]
    section = before["README.md"].split(b"\n## digits_smooth_convergent\n")[1].split(b"\n## ")[0]
    assert section in after["README.md"], "the card of a network that is not here"


def test_a_card_has_no_numbers_of_another_network(experiment: Path) -> None:
    shutil.copytree(experiment / "artifacts", "artifacts")
    shutil.copyfile(PATHS.model("ebm_nonconvergent"), PATHS.model("ebm_convergent"))
    result = command(f"publish --params {experiment}/params.yaml")
    assert result.exit_code == 2
    assert "was not made with the network ebm_convergent.safetensors beside it" in result.output


def test_published_classifiers_load_in_one_line(experiment: Path) -> None:
    folder = experiment / "pretrained/tiny"
    for training in ("classifier", "classifier_adversarial"):
        classifier = load_classifier(folder / f"digits_{training}.safetensors")
        trained, _ = load_tensors(experiment / PATHS.model(training))
        assert all(trained[name].equal(value) for name, value in classifier.state_dict().items())
        assert not classifier.training
        assert classifier(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    with pytest.raises(ValueError, match="not a classifier of `stochsec train-classifier`"):
        load_classifier(folder / "digits_convergent.safetensors")


def test_published_energies_load_in_one_line(experiment: Path) -> None:
    folder = experiment / "pretrained/tiny"
    names = {path.name for path in folder.iterdir()}
    assert {f"digits_{phase}.safetensors" for phase in ("convergent", "smooth_convergent")} < names
    assert {"README.md", "digits_convergent.png", "digits_smooth_convergent.png"} < names
    energy, tau = load_energy(folder / "digits_convergent.safetensors")
    assert tau == 0.08
    assert energy.sigma == 0.12, "the noise of its training, for the denoising"
    trained, _ = load_tensors(experiment / PATHS.model("ebm_convergent"))
    assert all(trained[name].equal(value) for name, value in energy.state_dict().items())
    assert not any(parameter.requires_grad for parameter in energy.parameters())


def test_the_card_says_what_was_measured(experiment: Path) -> None:
    card = (experiment / "pretrained/tiny/README.md").read_text()
    record = AttackResult.load(experiment / PATHS.record("bpda_eot"))
    robust = record.record.robust(record.images.labels).float().mean()
    assert f"defended, bpda_eot: {robust:.4f} [" in card
    assert "after 40 steps the mean energy lies" in card
    assert "20 with Adam at 0.002, then 20 with SGD at 0.002" in card
    assert "Wide ResNet 10-1, 77,898 parameters" in card
    assert "1 steps of" not in card
    assert "2 steps of 16/255 from a random point of the l_inf ball of 48/255" in card


@pytest.mark.parametrize("content", [b"", b"\x00garbage" * 20])
def test_what_is_no_energy_is_said(content: bytes) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_energy("none.safetensors")
    Path("bad.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="not an energy of `stochsec train-ebm`"):
        load_energy("bad.safetensors")


def test_weights_of_a_classifier_are_no_energy(experiment: Path) -> None:
    with pytest.raises(ValueError, match="not an energy"):
        load_energy(experiment / PATHS.model("classifier"))


def test_an_inspection_follows_chains_from_three_starts(experiment: Path) -> None:
    tensors, _ = load_tensors(experiment / PATHS.record("inspect_convergent"))
    grid = tensors["grid"].tolist()
    assert grid[0] == 0
    assert grid[-1] == 40
    assert {3, 4} < set(grid), "the steps of training and of the defense"
    state = load_state(experiment / PATHS.state("ebm_convergent"), "", torch.device("cpu"))
    bank = CompactBank.from_state_dict(state["bank"])
    first = tensors["persistent chains/states"][0]
    assert first.equal(bank.read(torch.arange(len(first))))
    for start in ("test images", "persistent chains", "noise"):
        assert tensors[f"{start}/energies"].shape == (len(grid), 6)
        assert tensors[f"{start}/levels"].shape == (500,)
        torch.testing.assert_close(
            tensors[f"{start}/energies"][0], tensors[f"{start}/levels"][:6], rtol=1e-4, atol=1e-2
        )
