# make quickstart   try tokenexit on a small made-up dataset, results in runs/quickstart
# make test         lint, format, types, and tests with their coverage
# make docs         the documentation site in site/, every link checked
#
# All set up .venv first, once; it is set up again when pyproject.toml or constraints.txt change.
#
# PYTHON=...        the Python to build .venv with (3.11 or newer)
# PIP_ARGS="..."    more arguments for pip install, such as another package index
# NO_VENV=1         use PYTHON and the packages it has as they are: no .venv, no installation
# PYTEST_ARGS="..." more arguments for pytest; where they pick some tests, COVERAGE= leaves coverage and its floor out
# OUT=...           where quickstart writes

PYTHON ?= python3
PIP_ARGS ?=
NO_VENV ?=
PYTEST_ARGS ?=
COVERAGE ?= 1
OUT ?= runs/quickstart

VENV := .venv
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs

ifeq ($(NO_VENV),)
RUN := $(VENV)/bin/python
READY := $(STAMP)
DOCS_READY := $(DOCS_STAMP)
else
RUN := $(PYTHON)
READY := check-python
DOCS_READY := check-python
endif

# This tree's sources come first, also in processes that tests start elsewhere, and if .venv was copied along with another tree.
SOURCES := PYTHONPATH="$(CURDIR)/src$${PYTHONPATH:+:$$PYTHONPATH}"

# Only where PYTHON is used: once .venv stands, it does not matter which python3 comes first.
define CHECK_PYTHON
command -v "$(PYTHON)" >/dev/null 2>&1 || { \
	echo "make: '$(PYTHON)' was not found: install Python 3.11 or newer, or name one with PYTHON=/path/to/python." >&2; exit 1; }; \
"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	echo "make: '$(PYTHON)' is $$("$(PYTHON)" -V 2>&1), tokenexit needs 3.11 or newer: name one with PYTHON=/path/to/python." >&2; exit 1; }
endef

.DELETE_ON_ERROR:
.PHONY: help quickstart test docs check-python clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

quickstart: $(READY)
	@$(SOURCES) "$(RUN)" -c 'import sys; sys.argv[0] = "tokenexit"; from tokenexit.cli import main; sys.exit(main())' \
		quickstart --out "$(OUT)"

# One recipe, so that the steps keep their order under make -j. In .venv all tools are there; elsewhere lint, types and coverage may be missing.
test: $(READY)
	@set -e; \
	has() { "$(RUN)" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$$1') is None)"; }; \
	for tool in pytest hypothesis; do \
		has $$tool || { echo "make test: $$tool is not installed in $(RUN): install it there, or leave out NO_VENV." >&2; exit 1; }; \
	done; \
	step() { echo "+ $$*"; $(SOURCES) "$(RUN)" -m "$$@"; }; \
	if has ruff; then step ruff check .; step ruff format --check .; else echo "ruff: skipped, not installed in $(RUN)"; fi; \
	if has mypy; then step mypy; else echo "mypy: skipped, not installed in $(RUN)"; fi; \
	if [ -z "$(COVERAGE)" ]; then cov=; elif has pytest_cov; then cov=--cov; \
	else cov=; echo "coverage: skipped, pytest-cov is not installed in $(RUN)"; fi; \
	step pytest $$cov $(PYTEST_ARGS)

docs: $(DOCS_READY)
	@"$(RUN)" -c "import mkdocs, material, mkdocstrings" 2>/dev/null || { \
		echo "make docs: mkdocs-material and mkdocstrings are not installed in $(RUN): pip install '.[docs]' there, or leave out NO_VENV." >&2; exit 1; }
	$(SOURCES) "$(RUN)" -m mkdocs build --strict

check-python:
	@$(CHECK_PYTHON)

# An environment of another Python version, or one that does not start, is made anew; any other is brought up to date.
$(STAMP): pyproject.toml constraints.txt
	@$(CHECK_PYTHON)
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || { \
		echo "make: '$(PYTHON)' has no venv module: install it (on Debian and Ubuntu: apt install python3-venv)." >&2; exit 1; }
	@version='import sys; print(sys.version_info[:2])'; \
	if [ "$$("$(VENV)/bin/python" -c "$$version" 2>/dev/null)" != "$$("$(PYTHON)" -c "$$version")" ]; then \
		echo "+ $(PYTHON) -m venv $(VENV)"; "$(PYTHON)" -m venv --clear $(VENV); \
	fi
	$(VENV)/bin/python -m pip install --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[test]'
	@touch $@

$(DOCS_STAMP): $(STAMP)
	$(VENV)/bin/python -m pip install --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[docs]'
	@touch $@

clean:
	rm -rf $(VENV) site .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis
