# make setup   create .venv and install the requirements, only when they changed
# make demo    demo.sh: data, train, distill, evaluate on miniature data, one table
# make test    ruff and the test suite

PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test

setup: .venv/installed

.venv/installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

demo: setup
	./demo.sh

test: setup
	$(BIN)/ruff check .
	$(BIN)/python -m pytest
