# make setup          a virtual environment in .venv with everything that follows needs
# make quickstart     dense, spectral and kernel projection, a budget and a dense warm-up on handwritten digits, and a report
# make test           the fast tests: minutes
# make test-all       all tests, with real processes and signals, Ray and the TPU's compiler
# make test-versions  a wheel in empty environments, with the oldest and the newest versions that PyPI has: an hour, and downloads
# make coverage       all tests, and how many lines of lowrank_jax/ they run
# make check          format, lint and types
# make bench          benchmarks; each prints a ratio against a rival measured in the same run
PYTHON ?= python3
EXTRAS ?= train,dev
BIN := .venv/bin

.PHONY: setup quickstart test test-all test-versions coverage check bench clean
.NOTPARALLEL: # one pip at a time in an environment

comma := ,
# A stamp for each extra, so that the tests add to what the quickstart has installed.
setup: $(patsubst %,.venv/ready-%,$(subst $(comma), ,$(EXTRAS)))

.venv/ready-%: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lowrank_jax needs Python 3.11 or newer: make setup PYTHON=python3.x")'
	$(PYTHON) -m venv .venv
	$(BIN)/python scripts/install.py -c constraints.txt -e '.[$*]'
	touch $@

quickstart: .venv/ready-train
	$(BIN)/lowrank sweep --config=digits_resnet --config.epochs=20 --workdir=runs/quickstart/scales --jobs=2 \
	  --sweep='lowrank.scale=0.1,0.25; lowrank.method=none,spectral,kernel_projection; seed=0:2'
	$(BIN)/lowrank sweep --config=digits_resnet --config.epochs=20 --workdir=runs/quickstart/budgets --jobs=2 \
	  --sweep='lowrank.budget.params=0.15; lowrank.dense_warmup=None,4 epochs; seed=0:2'
	$(BIN)/lowrank report runs/quickstart/scales runs/quickstart/budgets --out=runs/quickstart

# A worker that crashes ends the tests: with another in its place they would wait for ever.
PYTEST := $(BIN)/python -m pytest -n 2 --dist=loadfile --max-worker-restart=0

test: setup
	$(PYTEST) -m "not slow"

test-all: setup
	$(PYTEST)

test-versions:
	$(PYTHON) scripts/test_versions.py

coverage: setup
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -n 2 --dist=loadfile --max-worker-restart=0
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --sort=cover

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

bench: setup
	$(BIN)/python -m benchmarks.loop_overhead
	$(BIN)/python -m benchmarks.init_model
	$(BIN)/python -m benchmarks.projections
	$(BIN)/python -m benchmarks.learning
	$(BIN)/python -m benchmarks.sweep_overhead
	$(BIN)/python -m benchmarks.decode
	$(BIN)/python -m benchmarks.folder
	$(BIN)/python -m benchmarks.execution
	$(BIN)/python -m benchmarks.allocate
	$(BIN)/python -m benchmarks.calibrate

clean:
	rm -rf .venv runs .coverage .coverage.*
