# Two commands do all: `make demo` and `make test`. Each makes the environment in .venv on first use.

# The first Python on PATH with tested pins, else any from 3.11 on; or say PYTHON=... yourself.
PYTHON ?= $(shell for newest in 14 99; do for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c "import sys; sys.exit(not (3, 11) <= sys.version_info < (3, $$newest))" 2>/dev/null \
	&& echo $$p && exit; done; done)
VENV ?= .venv
WORKDIR ?= runs/digits
BIN := $(VENV)/bin
# What the demo needs, and all that tests and checks need besides.
READY := $(VENV)/.ready
READY_DEV := $(VENV)/.ready-dev
# Three on two cores: some tests wait for others' programs.
WORKERS := -n 3 --dist worksteal

.PHONY: demo test test-fast drill check format clean

demo: $(READY)  ## Train on the embedded digits: grid, loss curve and number, in minutes on a CPU.
	$(BIN)/python -m repulsor_jax.main --config=configs/digits.py --workdir=$(WORKDIR)
	@echo "Look at $(WORKDIR)/report.html"

test: $(READY_DEV)  ## The whole suite, on an 8-device CPU mesh.
	$(BIN)/python -m pytest $(WORKERS)

test-fast: $(READY_DEV)  ## The suite without its slow tests.
	$(BIN)/python -m pytest $(WORKERS) -m "not slow"

drill: $(READY_DEV)  ## Kill training at random moments, over and over: most of an hour.
	$(BIN)/python -m benchmarks.drill

check: $(READY_DEV)  ## Format, lint, types, direction of imports, shell scripts.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/shellcheck launch/*.sh launch/slurm.sbatch .ci/run

format: $(READY_DEV)  ## Put the format right.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## Remove the environment and the caches; runs/ stays.
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info

# The tested versions are pinned per Python version; a Python without pins takes the newest.
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(VENV)/pins.txt

$(READY): pyproject.toml $(wildcard constraints/*.txt)
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or later on PATH; say make PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	pins=constraints/py$$($(BIN)/python -c 'import sys; print("%d.%d" % sys.version_info[:2])').txt; \
	test -f $$pins || { echo "no $$pins: installing untested newest versions"; pins=/dev/null; }; \
	cp $$pins $(VENV)/pins.txt
	$(PIP) --no-compile -e .
	touch $@

$(READY_DEV): $(READY)
	$(PIP) -e '.[dev,plan]'
	touch $@
