# `make tables` runs the whole experiment, `make test` checks the code; both set themselves up.
# PRESET=paper (or any file in presets/) switches params.yaml first. See README.md.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: tables test
tables: $(VENV)/.installed
	$(if $(PRESET),$(BIN)/stochsec preset $(PRESET))
	$(BIN)/dvc repro

test: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python >= 3.11 is needed" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -e ".[dev]"
	$(BIN)/python -m pip install -q --no-deps "torchattacks>=3.5"
	touch $@
