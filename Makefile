# Every target sets up .venv when it is missing or when what it is made from has changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: quickstart test bench lint clean

quickstart: $(VENV)/.train
	$(BIN)/python -m immunity_fast.train

test: lint
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

bench: $(VENV)/.dev
	$(BIN)/python -m pytest benchmarks --benchmark-only

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info

# One stamp an extra: the quickstart does not wait for the tools of the developers.
$(VENV)/.%: setup.py pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable ".[$*]"
	touch $@
