# Everything runs in .venv, made from the lock files. `make help` lists the targets.
SHELL := /bin/sh
BIN := .venv/bin
SQL := models macros tests/dbt
# One more than there are cores: a test waits now and then.
WORKERS := $$(( $$(getconf _NPROCESSORS_ONLN) + 1 ))
PIP := $(BIN)/python -m pip --disable-pip-version-check -q install
# The first Python that starts, has a supported version, and can make an environment.
FIND_PYTHON = for p in $(PYTHON) python3.13 python3.12 python3.11 python3.10 python3; do \
	$$p -c 'import ensurepip, sys, venv; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' \
	>/dev/null 2>&1 && { echo $$p; exit 0; }; done; \
	echo 'Python 3.10 to 3.13 with venv is needed: install it, or name it: make PYTHON=/path/python3' >&2; exit 1

.PHONY: help demo test test-long test-dbt bench check docs docs-site format lock clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*##/ —/'

demo: .venv/.runtime  ## run the main job on an embedded PostgreSQL
	@$(BIN)/exporter demo $(ARGS)

test: .venv/.dev  ## run the tests, the long ones shortened
	@$(BIN)/python -m pytest -m "not long" -n $(WORKERS) --dist worksteal $(ARGS)

test-long: .venv/.dev  ## run the tests in full
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

test-dbt: .venv/.dev  ## try the wheel and dbt's own suites under each version of dbt
	@.ci/dbt-versions $(ARGS)

bench: .venv/.dev .bench/.done  ## compare with a raw pipe, postgres_fdw, dlt, and dbt's own strategies
	@$(BIN)/python -m benchmarks $(ARGS)

check: .venv/.dev  ## lint, check formats and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/sqlfmt --check -q $(SQL)
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

docs: .venv/.runtime  ## serve dbt docs of DATABASE_URL_ANALYTICS, else of an embedded server
	@$(BIN)/python docs/serve.py $(ARGS)

docs-site: .venv/.dev  ## build the documentation into site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -q && echo site/index.html

format: .venv/.dev  ## fix lint and formats where a tool can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/sqlfmt -q $(SQL)

LOCK = uv pip compile --universal --python-version 3.10 --generate-hashes --no-annotate \
	--no-strip-extras --no-emit-index-url --custom-compile-command "make lock" -q
lock:  ## rewrite the lock files (needs uv)
	echo 'hatchling>=1.27' | $(LOCK) pyproject.toml - --extra demo -o requirements.lock
	echo 'hatchling>=1.27' | $(LOCK) pyproject.toml - --all-extras --group dev --group docs -o requirements-dev.lock
	$(LOCK) --group bench -o requirements-bench.lock

clean:  ## remove what make and dbt have created
	rm -rf .venv .bench target logs site

.venv/bin/python:
	@python=$$($(FIND_PYTHON)) && $$python -m venv .venv

.venv/.runtime: .venv/bin/python requirements.lock pyproject.toml
	@echo 'Installing what requirements.lock names into .venv …'
	@$(PIP) --require-hashes -r requirements.lock
	@$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

.venv/.dev: .venv/.runtime requirements-dev.lock
	@echo 'Installing what requirements-dev.lock names into .venv …'
	@$(PIP) --require-hashes -r requirements-dev.lock
	@touch $@

.bench/.done: requirements-bench.lock
	@echo 'Installing what requirements-bench.lock names into .bench …'
	@python=$$($(FIND_PYTHON)) && $$python -m venv .bench
	@.bench/bin/python -m pip --disable-pip-version-check -q install --require-hashes -r requirements-bench.lock
	@touch $@
