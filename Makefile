# Every target sets up what it needs: `make demo` and `make test` work on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# One thread a test process: the processes already fill the cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

# Continuous integration counts the lines that tests reach: COVERAGE="--cov ...".
COVERAGE ?=

.PHONY: demo test test-integration test-all tutorials bench docs lint format clean

demo: $(READY)
	$(BIN)/python models/quickstart.py
	$(BIN)/python models/distill_maf_to_iaf.py --sets checkerboard

# Minutes. What takes whole programs, or longer, is in the two tiers below.
test: $(READY)
	$(PYTEST) -m "not slow and not integration" $(COVERAGE)

test-integration: $(READY)
	$(PYTEST) -m "integration and not slow" $(COVERAGE)

test-all: $(READY)
	$(PYTEST)

tutorials: $(READY)
	$(BIN)/python tutorials/execute.py

bench: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[benchmarks]"
	$(BIN)/python benchmarks/run.py

# Strict: a warning, or a reference that leads nowhere, fails.
docs: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	$(BIN)/python -m sphinx -W -n --keep-going -b html docs docs/_build/html

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs build docs/_build .pytest_cache .ruff_cache .mypy_cache .coverage

$(READY): pyproject.toml constraints.txt
	@echo "Setting up $(VENV): about 2 GB, once."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test,lint]"
	touch $(READY)
