# What one does with areal_fast, as verbs. `make help` lists them.
#
# Everything is installed into .venv by pip from constraints.txt; nothing has to be there before but make, Python >= 3.11
# with venv and headers, and a C compiler (see .ci/venv). Stamps under build/ remember what was installed for which
# pyproject.toml. Variables: PYTHON (interpreter that makes .venv), SEED (of fuzz and property tests, which print it), ARGS
# (passed on to pytest, demo, bench), TORCH_INDEX (an extra package index with CPU builds of torch).

PYTHON ?= python3
VENV ?= .venv
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
INSTALL := $(PIP) install -qq -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
SEED ?= $(shell date +%Y%m%d)
ARGS ?=
export SOAK_SECONDS ?= 1800
RUFF_PATHS := areal_fast tests benchmarks setup.py
NATIVE := $(wildcard csrc/*.c csrc/*.h areal_fast/*/*.pyx areal_fast/*/*.pxd areal_fast/*/*.pxi) setup.py
# Other versions format differently.
CLANG_FORMAT := 14

.PHONY: help
help: ## this list
	@grep -hE '^[a-z0-9 -]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

# ---- what has to be there -------------------------------------------------------------------------------------------

build/venv.ok:
	@./.ci/venv $(PYTHON) $(VENV)
	@mkdir -p build && touch $@

# The build's own tools go first, so that the extension is built with the pinned Cython (no build isolation).
build/tools.ok: build/venv.ok constraints.txt
	@echo "installing build tools"; $(INSTALL) setuptools cython && touch $@

build/demo.ok: build/tools.ok pyproject.toml
	@echo "installing areal_fast and what the demo needs (torch takes a while)"
	@$(INSTALL) --no-build-isolation -e '.[demo]' && touch $@

build/dev.ok: build/tools.ok pyproject.toml
	@echo "installing areal_fast and what tests and linters need (torch takes a while)"
	@$(INSTALL) --no-build-isolation -e '.[dev]' && touch $@ build/demo.ok

build/native.ok: build/tools.ok $(NATIVE)
	@echo "building the extension"; $(PY) setup.py -q build_ext --inplace && touch $@

.PHONY: build
build: build/dev.ok build/native.ok ## .venv with everything for development, extension built in place

# ---- the README's two commands --------------------------------------------------------------------------------------

.PHONY: demo test
demo: build/demo.ok build/native.ok ## a day in the proxy's life on the embedded engine; its exit status is its verdict
	$(VENV)/bin/areal-fast demo $(ARGS)

test: build c-test ## the everyday suite: the C tests, then all of pytest but the verbs below
	$(PY) -m pytest -q -m "not areal and not soak and not slow and not openapi" $(ARGS)

# ---- parts of it, and the long ones ---------------------------------------------------------------------------------

.PHONY: lint format c-test fuzz crash asan ubsan tsan model e2e slow areal bench gpu bench-micro soak soak-churn clean
lint: build ## ruff, mypy --strict, stubtest, cython-lint; clang-format where installed
	$(PY) -m ruff check $(wildcard $(RUFF_PATHS))
	$(PY) -m ruff format --check $(wildcard $(RUFF_PATHS))
	$(PY) -m mypy
	$(PY) -m mypy.stubtest $(subst /,.,$(basename $(wildcard areal_fast/*/_*.pyx)))
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" cython-lint areal_fast/*/*.px[dyi]
	@if clang-format --version 2>/dev/null | grep -q 'version $(CLANG_FORMAT)\.'; then \
	  echo clang-format --dry-run; clang-format --dry-run -Werror csrc/*.[ch]; \
	  else echo "clang-format $(CLANG_FORMAT): not installed, C formatting not checked"; fi

format: build ## let ruff (and clang-format) rewrite
	$(PY) -m ruff format $(wildcard $(RUFF_PATHS))
	$(PY) -m ruff check --fix $(wildcard $(RUFF_PATHS))
	@! command -v clang-format >/dev/null || clang-format -i csrc/*.[ch]

c-test: ## the core's own tests, warnings as errors
	$(MAKE) -C tests/c test

crash: build ## every crash point one by one in C; then the Python crash tests on a build with crash points
	$(MAKE) -C tests/c crash
	AREAL_FAST_CRASH_POINTS=1 ./tests/instrumented.sh crash $(PY) -m pytest -q -m crashpoints tests/unit/core $(ARGS)

fuzz: build ## seeded kill -9 fuzz of the core, the HTTP fuzzers, and every JSON body
	$(MAKE) -C tests/c fuzz SEED=$(SEED)
	SEED=$(SEED) OPENAPI_EXAMPLES=300 $(PY) -m pytest -q $(wildcard tests/fuzz/*_fuzz.py) $(ARGS)

# what reads bytes of others in C, beside the core; tsan has nothing to find in what one thread does
asan ubsan: READERS := $(addprefix tests/property/test_,byte_pairs.py folds.py http_shortcut.py known_chats.py token_rows.py)
asan ubsan tsan: build ## the core's C tests and its Python tests under that sanitizer; asan, ubsan: all native code
	$(MAKE) -C tests/c $@
	./tests/instrumented.sh $@ $(PY) -m pytest -q tests/unit/core tests/property/test_arena.py $(READERS) $(ARGS)

model: ## SPIN over the control word and the two-step export; skipped, saying so, where there is no spin
	./tests/c/model/run.sh

e2e: build ## whole process trees: kills, stops, drain, the demo
	$(PY) -m pytest -q tests/e2e -m "not areal and not soak" $(ARGS)

slow: build ## whole trees killed at every moment, GPU shards on the fake driver, churn, a wheel from end to end, the demo
	$(PY) -m pytest -q -m "slow and not areal and not soak" $(ARGS)

areal: build ## under the released AReaL's controller, guard, gateway and router; AReaL lives in .venv-areal
	@$(PY) tests/wire/areal_env.py
	$(PY) -m pytest -q -m areal tests/e2e tests/wire $(ARGS)

bench: build ## all of benchmarks/ beside the original, plots, a verdict a goal: half an hour; ARGS=--quick: small numbers
	@$(PY) tests/wire/areal_env.py
	$(PY) -m benchmarks $(ARGS)

gpu: build ## on a machine with a GPU: its tests, then put, get and hold against a plain copy, kept in benchmarks/results
	$(PY) -m pytest -q tests/gpu tests/contract/test_real_gpu.py $(ARGS)
	$(PY) -m benchmarks gpu

bench-micro: build ## single steps of a request, by pytest-benchmark
	$(PY) -m pytest -q benchmarks/micro --benchmark-columns=median,iqr,rounds $(ARGS)

soak-churn: build ## sessions churning at 80 % load for SOAK_SECONDS (1800): nothing may grow
	$(PY) -m benchmarks soak $(ARGS)

soak: soak-churn ## soak-churn, then random kills, the fuzzers and the property tests, for another half hour
	for seed in 1 2 3 4 5 6 7 8 9 10; do SEED=$$seed $(PY) -m pytest -q -m soak tests/e2e $(ARGS); done
	$(MAKE) -C tests/c fuzz SEED=$(SEED) FUZZ_SECONDS=900
	$(PY) -m tests.fuzz.http_fuzz --seed $(SEED) --seconds 600
	HYPOTHESIS_PROFILE=thorough $(PY) -m pytest -q tests/property --timeout 3600 $(ARGS)

clean: ## everything that was built, .venv included
	rm -rf build .venv .venv-areal *.egg-info areal_fast/*/_*.c areal_fast/*/_*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	@! test -e tests/c/Makefile || $(MAKE) -C tests/c clean
