# Every target sets up .venv (test-oldest: .venv-oldest) when it is missing or when what it is made from has changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
INSTALL := -m pip install --quiet --disable-pip-version-check
TESTS ?=

# Compiled modules are kept, also where the environment says otherwise: dozens of tests start Python.
export PYTHONDONTWRITEBYTECODE :=

# MLflow's client wants a newer requests than torchattacks says that it does, with which it works all the same: pip takes
# both one after the other, not at once.
INSTALL_MLFLOW = grep -v "^requests==" constraints.txt > $(VENV)/constraints-mlflow.txt; \
	$(BIN)/python $(INSTALL) --constraint $(VENV)/constraints-mlflow.txt mlflow-skinny requests==2.34.2

.PHONY: quickstart test test-exhaustive test-oldest docs docs-serve docs-links bench lint clean

quickstart: $(VENV)/.train
	$(BIN)/python -m immunity_fast.train

test: lint
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

# All of what the suite has a sample of: every size a kernel is compiled for, more kills, more spoilt files.
test-exhaustive: $(VENV)/.dev
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder -m exhaustive

# On the oldest versions that setup.py allows; TESTS="tests/kernels tests/training/test_step.py" runs these alone.
test-oldest: $(OLDEST)/.test
	$(OLDEST)/bin/python -m pytest --numprocesses auto --dist loadfile $(TESTS)

# From nothing, so that no warning is lost in what is taken over from an earlier build.
docs: $(VENV)/.dev
	rm -rf build/docs
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet docs build/docs
	@echo "build/docs/index.html"

docs-serve: docs
	$(BIN)/python -m http.server --bind localhost --directory build/docs 8000

# Of links to other sites, which wants a network; those between pages are checked by docs and by the tests.
docs-links: $(VENV)/.dev
	$(BIN)/python -m sphinx --builder linkcheck --quiet docs build/links

bench: $(VENV)/.dev
	$(BIN)/python -m pytest benchmarks --benchmark-only

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info

# One stamp an extra: the quickstart does not wait for the tools of the developers, nor for pip to compile three times as
# many modules as it imports, which Python compiles when it first does.
$(VENV)/.%: setup.py pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(INSTALL) $(if $(filter train,$*),--no-compile) --constraint constraints.txt --editable ".[$*]"
	$(if $(filter dev,$*),$(INSTALL_MLFLOW))
	touch $@

$(OLDEST)/.test: setup.py pyproject.toml constraints-oldest.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python $(INSTALL) --constraint constraints-oldest.txt --editable ".[test]"
	touch $@
