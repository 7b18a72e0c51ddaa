# Every target sets itself up: the first run makes .venv and installs the pinned versions into it.
PYTHON ?= python3
JOBS   ?= 2
MARKS  ?= not slow
BIN    := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench report clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-6s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: .venv/.installed  ## train a tiny model on English text, save, reload, generate (minutes)
	$(BIN)/python examples/demo.py

test: .venv/.installed  ## run the tests; JOBS=4 for more processes, MARKS= to include the slow ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m "$(MARKS)" --durations=10

lint: .venv/.installed  ## check style, formatting, types, and that the README shows the results
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/python -m benchmarks.report --check

bench: .venv/.installed  ## time the ops on this GPU; BENCH_ARGS="--op kda --budget 600", or --help
	$(BIN)/python -m benchmarks.run $(BENCH_ARGS)

report: .venv/.installed  ## write the README's tables and the plots from benchmarks/results
	$(BIN)/python -m benchmarks.report

clean:  ## remove build output and caches, keep .venv
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; choose one with make PYTHON=...")'
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev]"
	touch $@
