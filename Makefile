# make quickstart   install into .venv and run the main job end to end
# make test         install into .venv and run the tests, two at a time (about 7 minutes on 2 cores)
# make test-all     the same with the slow tests
# make bench        merging, scoring, driver and samplers against named alternatives
# make gpu          all of it on this machine's GPU, 450 s at the most; figures go to gpu.jsonl
# make lint         ruff and mypy

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable

.PHONY: quickstart test test-all bench gpu lint

$(BIN)/python:
	$(PYTHON) -m venv .venv

.venv/quickstart: $(BIN)/python pyproject.toml constraints.txt
	$(INSTALL) ".[quickstart]"
	touch $@

.venv/dev: $(BIN)/python pyproject.toml constraints.txt
	$(INSTALL) ".[quickstart,dev]"
	touch $@

quickstart: .venv/quickstart
	$(BIN)/python studies/quickstart/prepare.py base
	$(BIN)/searchmerge run studies/quickstart --config configs/local.yaml

test: .venv/dev
	$(BIN)/python -m pytest -n 2

test-all: .venv/dev
	$(BIN)/python -m pytest -n 2 -m "not gpu"

bench: .venv/dev
	$(BIN)/python tests/benchmarks/bench_merging.py
	$(BIN)/python tests/benchmarks/bench_scoring.py
	$(BIN)/python tests/benchmarks/bench_execution.py
	$(BIN)/python tests/benchmarks/bench_samplers.py

gpu: .venv/dev
	$(BIN)/python tests/gpu/check.py --out gpu.jsonl

lint: .venv/dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
