# `make test` sets itself up. With VENV= (empty) the interpreter at hand is used and nothing is installed.
VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0

ifeq ($(VENV),)
PY := $(PYTHON)
READY :=
else
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
endif

.PHONY: test lint build clean

test: lint build
	$(PY) -m pytest -q tests

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

build: $(READY)
	$(PY) setup.py -q build_ext --inplace

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q "$(TORCH)"
	$(PY) -m pip install -q setuptools numpy pytest hypothesis ruff
	touch $@

clean:
	rm -rf build seq2seq_fast/*.so
