# make demo: the demo study, end to end. make test: the tests. make fuzz: 20,000 cases of bad input.
# make chaos: faults at random moments, for 40 minutes. All of them install into .venv first (about 6 GB, minutes).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# uv fetches, unpacks and compiles side by side; where it does not know the registry that pip was told of, pip does it.
UV := UV_HTTP_TIMEOUT=180 $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python

.PHONY: demo test test-cluster fuzz chaos check lock clean

demo: $(STAMP)
	$(BIN)/raybd demo

# A process for each core, and one thread in each: the models of the tests gain nothing from more. In the order of
# tests/conftest.py, in which what takes longest, with the fewest tests, does not come last.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# `ray up`: over ssh to hosts made of namespaces, which needs root and says where it is missing, and to AWS as moto
# plays it. Side by side, as much of it is waiting; what was done is told at the end.
SIDE_BY_SIDE ?= 2
test-cluster: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "" -n $(SIDE_BY_SIDE) --dist loadfile --no-loadscope-reorder -rA -o log_level=INFO \
	  tests/cluster/test_ray_up.py tests/cluster/test_jobs.py tests/test_cluster_aws.py

fuzz: $(STAMP)
	$(BIN)/python -m pytest tests/fuzz --hypothesis-profile=fuzz --timeout=3600

# Kills, full disks and failing storage at random moments, until so many have hit: tests/chaos/README.md.
SEED ?= 0
FAULTS ?= 100
chaos: $(STAMP)
	$(BIN)/python -m tests.chaos --seed $(SEED) --faults $(FAULTS) --json chaos.json

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "raybd needs Python 3.11 to 3.13; this is $$($(PYTHON) --version). Give another: make PYTHON=python3.12 …"; exit 3; }
	@echo "installing into $(VENV): torch and what goes with it, about 6 GB, some minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$(grep '^uv==' requirements.lock)
	$(UV) --requirement requirements.lock || $(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	$(BIN)/python -m compileall -q raybd
	@touch $@

# The lock names versions only: which registry they come from is the machine's business.
lock: $(STAMP)
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-annotate --no-header --no-emit-index-url \
	  --extra notebooks --extra s3 --extra text --group dev pyproject.toml --output-file requirements.lock

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
