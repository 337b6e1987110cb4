# Every target but help makes .venv by itself, when it is missing or older than pyproject.toml.
# Chromium, for the tests of the page, comes by apt-get (as root) or from Playwright; without it they are skipped, in CI they fail.
# `make PYTHON=python3.12 …` chooses the interpreter of a new .venv.
PYTHON ?= python3
MINUTES ?= 2
SEED ?= 1
# All tests: in three processes, a file at a time, each with servers of its own. A part of them (ARGS) runs in one, at once.
WHOLE := -n 3 --dist loadfile --no-loadscope-reorder --durations=10
BIN := .venv/bin
READY := .venv/.ready

.PHONY: help demo test torture teeth lint bench bench-compare

help:
	@echo "make demo    the whole way on real servers, with faults, checked; about a minute"
	@echo "make test    all tests on real servers; ARGS='-k inbox' is passed to pytest"
	@echo "make torture MINUTES=2 SEED=1   every fault we can make, then all compared; the seed decides the schedule"
	@echo "make teeth   the code broken in one way at a time, and the test that fails; ONLY=naive-floor,no-recycling chooses"
	@echo "make lint    ruff, mypy, import-linter"
	@echo "make bench   all benchmarks, one JSON line each; ONLY=relay,latency chooses"
	@echo "make bench-compare REF=HEAD~1   this tree's relay beside another commit's, in turns; fails where it is slower"

demo: $(READY)
	$(BIN)/python -m examples.chip_quality.demo

test: $(READY)
	$(BIN)/outbox codegen --check schemas examples/chip_quality/events.py
	$(BIN)/python -m tests.browser
	$(BIN)/python -m pytest $(or $(ARGS),$(WHOLE))

torture: $(READY)
	$(BIN)/python -m tests.torture --minutes $(MINUTES) --seed $(SEED)

teeth: $(READY)
	$(BIN)/python -m tests.teeth --only "$(ONLY)"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY)
	ONLY=$(ONLY) $(BIN)/python -m benchmarks

bench-compare: $(READY)
	$(BIN)/python -m benchmarks.compare $(or $(REF),HEAD)

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=…")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[relay,migrations,registry,check,metrics,otel,uvloop]' --group dev
	@touch $@
