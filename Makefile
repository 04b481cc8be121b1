# `make quickstart` and `make test` need nothing but a fresh clone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: quickstart test slow soak gpu lint format api embedded clean

quickstart: $(VENV)/installed
	$(BIN)/lit-prune fit --config configs/quickstart.yaml --overwrite

# Number of pytest processes, one thread each; above half of the cores, tests that start processes may have to wait.
WORKERS ?= 2

test: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

slow: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m slow

# Random configurations, kills at random moments, full disks.
soak: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m 'slow or not slow' -s tests/test_soak.py tests/test_kill_anywhere.py tests/test_disk_full.py

# Checks everything that runs on a GPU against the CPU, and measures it; GPU="--pretrained FOLDER ..." for another model.
gpu: $(VENV)/installed
	$(BIN)/python -m benchmarks.gpu $(GPU)

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The reference of all public classes and functions, from their docstrings.
api: $(VENV)/installed-dev
	$(BIN)/pdoc --docformat google --output-directory build/api lit_prune lit_prune.callbacks '!lit_prune.models.embedded'

# Trains the embedded model from scratch, in about an hour.
embedded: $(VENV)/installed-dev
	$(BIN)/python tools/train_tokenizer.py lit_prune/models/embedded
	$(BIN)/lit-prune fit --config configs/pretrain_embedded.yaml --overwrite
	$(BIN)/python tools/install_embedded.py runs/pretrain_embedded

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) -e .
	touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) -e '.[dev]'
	touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
