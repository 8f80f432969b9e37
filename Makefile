# Two commands do everything on a fresh machine with python3: make demo, make test.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# More arguments for pip, such as another index, or one with CPU builds of torch.
PIP_ARGS ?=
EXTRAS := train,preprocess,fast,hf,offline,tensorboard,wandb,dev

.PHONY: demo test test-fast lint install clean

demo: install
	$(BIN)/amlaunch local quickstart
	@echo; echo "to have amlaunch on the path of this shell: . $(BIN)/activate"

# Four processes on two cores, because the tests that use a cluster mostly wait for Slurm.
test: install lint
	$(BIN)/python -m pytest tests -n 4 --dist loadfile --no-loadscope-reorder

test-fast: install
	$(BIN)/python -m pytest tests -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/python tests/code_style.py
	$(BIN)/mypy
	$(BIN)/lint-imports

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: $(PYTHON) is older than Python 3.10; make PYTHON=python3.11 uses another" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "error: $(PYTHON) has no venv module; on Debian: apt install python3-venv" >&2; exit 2; }
	@echo "installing into $(VENV); torch is large, this can take some minutes"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
