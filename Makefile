# Everything a contributor needs. `make demo` and `make test` set up what they use, on a machine with Python 3.10 or
# newer and make. PYTHON chooses the interpreter: make test PYTHON=python3.12
PYTHON ?= python3
# The oldest Lightning that passes the tests; the newest one is in constraints.txt.
OLDEST_LIGHTNING = 2.6.0

# Relative paths throughout, and no console script: the folder may have a space in its name.
RUN = .venv/bin/python -m
TEST = $(RUN) pytest -n 3 --dist worksteal
OF_MODULES = tests/callbacks tests/core tests/report tests/sweep lightning_recipes
OF_ALL_TOGETHER = $(wildcard tests/test_*.py) README.md

.PHONY: demo test test-all check lint oldest coverage format clean

# Train on handwritten digits with and without the recipes, and show the result.
demo: .venv/installed
	$(RUN) compileall -q lightning_recipes
	.venv/bin/python examples/do_the_recipes_help.py

# All that CI runs.
test: check oldest

check: lint
	$(TEST)

lint: .venv/installed
	$(RUN) ruff format --check
	$(RUN) ruff check
	$(RUN) mypy

# What every recipe promises once more, with the oldest Lightning beside the newest torch.
oldest: .oldest/lightning
	PYTHONPATH=.oldest $(TEST) tests/test_contract.py tests/test_distributed.py

# Branches that are run by the tests of each module alone; to measure them makes the tests twice as slow.
coverage: .venv/installed
	$(TEST) $(OF_MODULES) --cov --cov-report=term --cov-fail-under=95

# All that `make test` runs, and every cell of the matrix of tests/matrix.py, and whatever else is too much for every change.
test-all: lint oldest coverage
	$(TEST) $(OF_MODULES) -m everything
	$(TEST) $(OF_ALL_TOGETHER) -m "everything or not everything"

format: .venv/installed
	$(RUN) ruff format
	$(RUN) ruff check --fix

# torch first, by itself: what else needs it is then content with the version of constraints.txt.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	@echo 'Installing into .venv, which takes some minutes.'
	$(PYTHON) -m venv .venv
	$(RUN) pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(RUN) pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch .venv/installed

.oldest/lightning: .venv/installed
	$(RUN) pip install --quiet --disable-pip-version-check --upgrade --no-deps --target .oldest lightning==$(OLDEST_LIGHTNING)
	touch .oldest/lightning

clean:
	rm -rf .venv .oldest demo .mypy_cache .pytest_cache .ruff_cache .coverage .coverage.*
