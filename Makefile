# The targets a newcomer needs. Everything is installed into .venv; nothing outside this folder is changed.
PYTHON ?= python3

BIN := .venv/bin
PYTEST := $(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
INSTALLED := .venv/.stamp
DOCS_INSTALLED := .venv/.docs-stamp

.DEFAULT_GOAL := help
.PHONY: help demo test check docs install clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(INSTALLED)  ## draw data, train on it, evaluate, and write demo/report.html
	$(BIN)/tmca demo -o demo

test: $(INSTALLED)  ## run the tests
	$(PYTEST)

check: $(INSTALLED)  ## run every check of a pull request: format, lint, types, imports, spelling, tests
	$(BIN)/pre-commit run --all-files
	$(PYTEST) --cov

docs: $(DOCS_INSTALLED)  ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

install: $(INSTALLED)  ## create .venv with the package and its development tools

clean:  ## remove what the other targets wrote, except .venv
	rm -rf build dist site demo htmlcov .coverage
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { \
	  echo "'$(PYTHON)' was not found. Install Python 3.11 or newer (Debian, Ubuntu: sudo apt install python3 python3-venv)," >&2; \
	  echo "or name another interpreter: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$$($(PYTHON) --version) is too old: tmca needs Python 3.11 or newer." >&2; \
	  echo "Name one: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$$($(PYTHON) --version) lacks the venv module." >&2; \
	  echo "Install it (Debian, Ubuntu): sudo apt install python3-venv" >&2; exit 1; }
	@echo "Installing into .venv; the first time takes a few minutes."
	$(PYTHON) -m venv .venv
	$(PIP) install -q -c constraints.txt -e ".[dev]"
	@touch $@

$(DOCS_INSTALLED): $(INSTALLED)
	$(PIP) install -q -c constraints.txt -e ".[docs]"
	@touch $@
