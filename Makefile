# Two commands do all the set-up on a fresh machine: `make simulate` and `make test`.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: simulate smoke test test-fast lint clean

simulate: .venv/.installed
	$(BIN)/flexlora simulate

smoke: .venv/.installed
	$(BIN)/flexlora simulate --config simulations/scenarios/smoke.toml

test: .venv/.installed-test
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations=15 --ignore=tests/simulations/test_ray_pool.py
	$(BIN)/python -m pytest tests/simulations/test_ray_pool.py  # counts processes: nothing else may be there

test-fast: .venv/.installed-test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

lint: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/.installed-test: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@ .venv/.installed

clean:
	rm -rf .venv build *.egg-info
