# Every target sets up .venv first; when nothing changed since the last time that takes 0.1 s.
# Another Python: `make test PYTHON=python3.12`. More to pytest: `make test PYTEST_ARGS="-k swizzle"`.

PYTHON ?= python3
PYTEST_ARGS ?=

PY := .venv/bin/python
# Two workers: tests also start processes and compile. tests/conftest.py shares out the cores.
CORES = $(shell $(PYTHON) -c "import os; print(os.cpu_count() or 1)")
WORKERS ?= $(shell [ $(CORES) -gt 1 ] && echo 2 || echo 1)

.DEFAULT_GOAL := help
.PHONY: help venv venv-demo demo test sanitize lint types format clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: ## set up .venv for the demo and the tests
	@$(PYTHON) tools/setup_venv.py test

venv-demo:
	@$(PYTHON) tools/setup_venv.py demo

demo: venv-demo ## set up .venv and run examples/demo.py
	@echo "== demo: $(PY) examples/demo.py"
	@$(PY) examples/demo.py

test: lint types ## set up .venv, then run ruff, mypy and pytest
	@if [ $(WORKERS) -gt 1 ] && $(PY) -c "import xdist" 2>/dev/null; then \
		parallel="-n $(WORKERS) --dist worksteal"; \
	else parallel=""; fi; \
	echo "== pytest $$parallel $(PYTEST_ARGS)"; \
	$(PY) -m pytest $$parallel $(PYTEST_ARGS)

sanitize: venv ## run small GPU tests under compute-sanitizer: memcheck and racecheck
	@$(PY) tools/sanitize.py $(if $(PYTEST_ARGS),-- $(PYTEST_ARGS))

# On a machine without network ruff and mypy may be absent; the tests still run there.
lint: venv ## ruff check and ruff format --check
	@if $(PY) -c "import ruff" 2>/dev/null; then \
		echo "== ruff check" && $(PY) -m ruff check && \
		echo "== ruff format --check" && $(PY) -m ruff format --check; \
	else echo "== SKIPPED ruff: it is not installed"; fi

types: venv ## mypy on nvfp4_ops (not its kernels/)
	@if $(PY) -c "import mypy" 2>/dev/null; then \
		echo "== mypy" && $(PY) -m mypy; \
	else echo "== SKIPPED mypy: it is not installed"; fi

format: venv ## let ruff fix and format the code
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

clean: ## remove .venv, caches and build products
	rm -rf .venv build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
