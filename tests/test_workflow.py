"""The graph against the source: imports, homes of packages, dependencies, parameters, paths."""

import ast
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from stages.core import presets
from stages.core.dependencies import imports
from stages.core.files import CODE, Paths, classifier_name
from stages.core.params import EVALUATED, INSPECTED, PGD_ATTACKS, PHASES, TRAININGS

ROOT = Path(__file__).parent.parent
GRAPH = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]

HOMES = {
    "typer": {"stages/cli.py", "stages/core/options.py"}
    | {f"stages/{room}/commands.py" for room in ("custom", "systems", "tools")},
    "pydantic": {"stages/core/params.py", "stages/core/sections.py"},
    "rich": {"stages/core/console.py", "stages/reporting/tables.py"},
    "pandas": {
        *(f"stages/bench/{name}.py" for name in ("speed", "attack", "networks", "cost")),
        *(f"stages/reporting/{name}.py" for name in ("figures", "pictures", "rows", "tables")),
        *("stages/reporting/tuning.py", "stages/custom/tune.py", "stages/systems/report.py"),
    },
    "matplotlib": {
        f"stages/reporting/{name}.py"
        for name in ("figures", "pictures", "portraits", "style", "systems_pictures", "tuning")
    },
    "safetensors": {
        "stages/core/artifacts.py",
        "defense/nets/pretrained.py",
        "defense/nets/importers.py",
    },
    "torchvision": {"stages/prepare_data.py"},
    "sklearn": {"stages/prepare_data.py"},
    "PIL": {
        *("stages/prepare_data.py", "stages/custom/secure.py"),
        "defense/systems/transforms.py",
    },
    "scipy": {
        *("defense/verdict.py", "defense/systems/smoothing.py"),
        *("stages/reporting/findings.py", "stages/custom/secure.py"),
    },
    "ruamel": {"stages/core/presets.py"},
    "jinja2": {"stages/reporting/page.py"},
    "dvc": set(),
}
LAYERS = [
    {"rng", "pixels", "threat", "bank", "inference", "energy", "losses"}
    | {"nets.wide_resnet", "fast.onednn", "studies.frechet"},
    {
        "langevin",
        "nets.pretrained",
        "nets.importers",
        "nets.programs",
        "fast.written_gradient",
        "fast.precision",
    },
    {"rules.pgd", "rules.apgd", "rules.square", "rules.noise"},
    {"rules", "ebm_training", "classifier_training", "fast.langevin", "gradient.chain"}
    | {"studies.lyapunov", "studies.diagnostics"},
    {"purifier", "gradient.hessian"},
    {"through"},
    {"eot"},
    {"verdict"},
    {"attack", "known_noise", "systems.system"},
    {"plain_attack", "studies.active_test", "systems.denoiser"},
    {f"systems.{name}" for name in ("hill", "menet", "pixeldefend", "score", "transforms")},
    {"systems.malade", "systems.smoothing"},
    {"systems"},
]
"""The modules of the library: each imports only from layers before its own, or from the first."""
ROOMS = ["stages.core", "stages.reporting", "stages", "stages.bench", "stages.custom"]
ROOMS += ["stages.systems", "stages.tools"]
"""The packages of the workflow: each imports only from itself and from those before it."""


def sources() -> list[str]:
    return sorted(
        str(path.relative_to(ROOT))
        for name in ("defense", "stages")
        for path in (ROOT / name).rglob("*.py")
    )


def imported(path: str) -> set[str]:
    """Dotted names that a module imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def module_of(stage: str) -> str:
    command = GRAPH[stage]["cmd"].removeprefix("python -m stages ").split()[0]
    return f"stages/{command.replace('-', '_')}.py"


def test_the_parameters_are_checked_before_any_stage_loses_its_outs() -> None:
    checked = "artifacts/${run}/params.checked"
    assert GRAPH["check_params"]["outs"] == [checked]
    for name, stage in GRAPH.items():
        assert name in ("code", "check_params") or checked in stage["deps"], name


@pytest.mark.parametrize("stage", sorted(GRAPH.keys() - {"code"}))
def test_a_stage_depends_on_the_file_of_its_code(stage: str) -> None:
    listed = [dep for dep in GRAPH[stage]["deps"] if dep.endswith(".txt")]
    name = "params" if stage == "check_params" else Path(module_of(stage)).stem
    assert listed == [f"{CODE}/{name}.txt"]
    assert not any(dep.endswith(".py") for dep in GRAPH[stage]["deps"])


@pytest.mark.parametrize("path", sources())
def test_every_package_has_its_home(path: str) -> None:
    packages = {name.split(".")[0] for name in imported(path)}
    for package, homes in HOMES.items():
        assert package not in packages or path in homes, f"{package} in {path}"


def test_the_library_knows_no_files_and_no_workflow() -> None:
    allowed = {"torch", "defense", "collections", "dataclasses", "typing", "math", "hashlib"}
    allowed |= {"scipy", "warnings", "secrets"}
    files = {"json", "pathlib", "safetensors"}
    allowed |= {"contextlib", "functools", "itertools", "concurrent", "threading", "copy", "os"}
    allowed |= {"inspect", "sys"}
    for path in sources():
        if path.startswith("defense/"):
            packages = {name.split(".")[0] for name in imported(path)}
            reads = ("defense/nets/pretrained.py", "defense/nets/programs.py")
            here = allowed | files if path in reads else allowed
            if path == "defense/nets/importers.py":  # which reads other people's files
                here = allowed | files | {"ast", "importlib", "pickle", "re", "types", "zipfile"}
            if path == "defense/studies/frechet.py":
                here = allowed | {"pathlib", "importlib"}
            if path == "defense/systems/transforms.py":
                here = allowed | {"PIL", "io", "numpy"}
            assert packages <= here, f"{path}: {packages - here}"


def dotted(path: str) -> str:
    """The name by which a module is imported."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def test_imports_in_the_library_go_one_way() -> None:
    level = {f"defense.{name}": i for i, layer in enumerate(LAYERS) for name in layer}
    only_names = {f"defense.{room}" for room in ("fast", "gradient", "nets", "studies")}
    names = {dotted(path) for path in sources() if path.startswith("defense/")}
    assert names == level.keys() | only_names | {"defense"}
    for path in sources():
        if dotted(path) in level:
            for below in map(dotted, imports(path)):
                lower = level[below] < level[dotted(path)] or level[below] == 0
                assert lower, f"{path} imports {below}"


def test_imports_between_the_rooms_of_the_workflow_go_one_way() -> None:
    def room(path: str) -> str:
        name = dotted(path)
        return name if path.endswith("/__init__.py") else name.rpartition(".")[0]

    ours = [path for path in sources() if path.startswith("stages/")]
    assert {room(path) for path in ours} == set(ROOMS)
    apps = {"stages/cli.py", "stages/__main__.py"}
    for path in ours:
        if path not in apps:
            for file in imports(path) - {"stages/__init__.py"}:
                if file.startswith("stages/"):
                    assert file not in apps, f"{path} imports {file}"
                    below, here = ROOMS.index(room(file)), ROOMS.index(room(path))
                    assert below <= here, f"{path} imports {file}"


def test_paths_in_the_graph_are_those_of_the_code() -> None:
    paths = Paths("RUN", "SET")
    known = {str(paths.images), str(paths.checked), "artifacts/RUN/records", "reports/RUN"}
    known |= {"artifacts/RUN/data", "artifacts/RUN/models", "pretrained/RUN", str(paths.tables)}
    classifiers = [classifier_name(training) for training in TRAININGS]
    energies = [f"ebm_{phase}" for phase in PHASES]
    known |= {str(paths.model(name)) for name in (*classifiers, *energies)}
    known |= {str(paths.state(name)) for name in energies}
    drawn = [name for name in energies if "smooth" not in name]
    known |= {str(paths.snapshots(name)) for name in drawn}
    known |= {str(paths.history(name)) for name in (*classifiers, *energies)}
    records = (
        *PGD_ATTACKS,
        "sweep",
        "snapshots",
        "lyapunov",
        "fid",
        "transfer_K_short",
        "transfer_K",
        "bpda_eot",
        "compare",
        "diagnose",
        "active_test",
        *(f"inspect_{energy}" for energy in INSPECTED),
    )
    known |= {str(paths.record(name)) for name in records}
    known |= {str(paths.evaluation(energy)) for energy in EVALUATED}
    stated: set[str] = set()
    for stage in GRAPH.values():
        for entry in [*stage["deps"], *stage["outs"]]:
            path = next(iter(entry)) if isinstance(entry, dict) else entry
            filled = path.replace("${run}", "RUN").replace("${item.dataset}", "SET")
            axes = (("K", "K_short"), EVALUATED, INSPECTED)
            for chain, energy, phase in itertools.product(*axes):
                filled_in = filled.replace("${item.chain}", chain).replace("${item.phase}", phase)
                stated.add(filled_in.replace("${item.energy}", energy))
    assert GRAPH["evaluate"]["matrix"]["energy"] == list(EVALUATED)
    inspected = (GRAPH[name]["matrix"]["phase"] for name in ("inspect", "inspect_others"))
    assert sorted(itertools.chain(*inspected)) == sorted(INSPECTED)
    assert {path for path in stated if "RUN" in path} == known


def test_every_parameter_is_read_by_some_stage() -> None:
    values = yaml.safe_load(presets.text("digits"))
    values["data"] = {"${item.dataset}": values["data"]["digits"]}
    keys = {key for stage in GRAPH.values() for key in stage.get("params", [])}
    stated = {key.replace("${item.chain}", chain) for key in keys for chain in ("K", "K_short")}
    covered = {"run", "systems"}  # an axis of the matrix; read by stages/systems/dvc.yaml

    def walk(value: object, key: str) -> None:
        if key in stated or key in covered:
            return
        assert isinstance(value, dict), f"no stage in dvc.yaml lists {key}"
        for name, child in value.items():
            walk(child, f"{key}.{name}" if key else name)

    walk(values, "")
    for key in stated:
        value: object = values
        for name in re.split(r"\.(?!dataset\})", key):
            assert isinstance(value, dict)
            assert name in value, f"dvc.yaml lists {key}, params.yaml has no such key"
            value = value[name]


def test_params_yaml_is_the_digits_preset() -> None:
    assert (ROOT / "params.yaml").read_text() == presets.text("digits")


def test_help_and_the_check_of_parameters_do_not_wait_for_torch() -> None:
    code = "import sys, stages.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
