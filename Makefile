# All the set-up there is: `make train` or `make test` on a machine with Python 3.11 or newer.
#   make train ARGS=--config.training.steps=100    passes flags on
#   make train PYTHON=python3.12 EXTRAS=plot,cuda   another Python, other extras
PYTHON ?= python3
EXTRAS ?= plot
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
comma := ,
PLACES := memjax tests configs benchmarks launch notebooks

.PHONY: help train test test-slow lint clean

help:
	@echo 'make train      trains configs/default.py on the bundled corpus into runs/default'
	@echo 'make test       runs the test suite'
	@echo 'make test-slow  runs the tests that take longer'
	@echo 'make lint       checks the style'
	@echo 'make clean      removes the environment, builds and caches; keeps runs/'

train: $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))
	$(BIN)/python -m memjax.train --config configs/default.py --workdir runs/default $(ARGS)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n auto --dist loadfile -m 'not slow' $(ARGS)

test-slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n auto --dist loadfile -m slow $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check $(wildcard $(PLACES))

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find $(wildcard $(PLACES)) -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'memjax: $(PYTHON) is missing or older than 3.11; name another one: make PYTHON=python3.12' >&2; exit 2; }
	@echo 'memjax: creating $(VENV)'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo 'memjax: $(PYTHON) cannot create environments; install its venv module' >&2; exit 2; }

# One stamp for each set of extras, renewed when pyproject.toml changes.
$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	@echo 'memjax: installing memjax[$(subst -,$(comma),$*)] into $(VENV) (about 800 MB the first time, one to three minutes)'
	@$(PIP) -e '.[$(subst -,$(comma),$*)]'
	@touch $@
