# make setup   create .venv and install the requirements and this package, only when they changed
# make demo    demo.sh: data, train, distill, evaluate on miniature data, one table
# make test    ruff and the test suite

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check

.PHONY: setup demo test

setup: .venv/installed

# The package is installed as a link to this folder, so that `python -m dualenc.search` works from
# any folder.
.venv/installed: requirements.txt requirements-dev.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(PIP) -r requirements-dev.txt
	$(PIP) --no-deps --editable .
	touch $@

demo: setup
	./demo.sh

# Two processes share the test files. Tests of one file stay together, since they share set-ups.
test: setup
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n 2 --dist loadfile
