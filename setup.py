"""What pyproject.toml cannot say: a wheel carries the workflow, for `stochsec init`."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

WORKFLOW = ("dvc.yaml", "presets", "reports/bench/networks")


class BuildWithWorkflow(build_py):
    """Copies dvc.yaml, the presets and what dvc.yaml reads into stages/workflow of the wheel."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        inside = Path(self.build_lib) / "stages/workflow"
        for name in WORKFLOW:
            (inside / name).parent.mkdir(parents=True, exist_ok=True)
            if Path(name).is_dir():
                shutil.copytree(name, inside / name, dirs_exist_ok=True)
            else:
                shutil.copy(name, inside / name)


setup(cmdclass={"build_py": BuildWithWorkflow})
