# Two commands do everything on a fresh machine with python3: make demo, make test.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# More arguments for pip, such as another index, or one with CPU builds of torch.
PIP_ARGS ?=
EXTRAS := train,preprocess,fast,hf,offline,tensorboard,wandb,dev

# The ends of the range of torch that pyproject.toml promises; docs/containers.md says which images have which torch.
OLDEST_TORCH := 2.8.0
OLDEST_PYTHON ?= python3.12
NEWEST_TORCH := 2.15.0
NEWEST_PYTHON ?= python3.13
TORCH ?= $(OLDEST_TORCH)
TORCH_VENV := .venv-torch-$(TORCH)
TORCH_TESTS ?= $(wildcard tests/test_trainer_*.py) tests/test_plan_memory.py tests/test_bench.py tests/test_bench_loss.py
NEWEST_TESTS := $(addprefix tests/test_,trainer_parallel.py trainer_checkpoints.py trainer_packing.py bench_loss.py)

.PHONY: demo test test-fast test-torch test-torch-range torch-range-environments oldest-environment newest-environment lint install clean

demo: install
	$(BIN)/amlaunch local quickstart
	@echo; echo "to have amlaunch on the path of this shell: . $(BIN)/activate"

# Four processes on two cores, because the tests that use a cluster mostly wait for Slurm.
test: install lint
	$(BIN)/python -m pytest tests -n 4 --dist loadfile --no-loadscope-reorder

test-fast: install
	$(BIN)/python -m pytest tests -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder

# The trainer's tests on another torch, such as make test-torch TORCH=2.8.0 PYTHON=python3.12
test-torch: $(TORCH_VENV)/.installed
	$(TORCH_VENV)/bin/python -m pytest $(TORCH_TESTS) -n 4 --dist loadfile --no-loadscope-reorder

# What CI runs at both ends of the range: the tests of what torch changed, and less at the newest, which has what the
# pinned one has.
test-torch-range:
	$(MAKE) test-torch TORCH=$(OLDEST_TORCH) PYTHON=$(OLDEST_PYTHON) TORCH_TESTS="$(TORCH_TESTS) -m torch_range"
	$(MAKE) test-torch TORCH=$(NEWEST_TORCH) PYTHON=$(NEWEST_PYTHON) TORCH_TESTS="$(NEWEST_TESTS) -m torch_range"

# Both environments; as make -j2 one downloads while the other unpacks.
torch-range-environments: oldest-environment newest-environment
oldest-environment:
	$(MAKE) .venv-torch-$(OLDEST_TORCH)/.installed TORCH=$(OLDEST_TORCH) PYTHON=$(OLDEST_PYTHON)
newest-environment:
	$(MAKE) .venv-torch-$(NEWEST_TORCH)/.installed TORCH=$(NEWEST_TORCH) PYTHON=$(NEWEST_PYTHON)

# numpy: images with torch 2.8 have 1.26. PIP_CONSTRAINT replaces constraints of the machine, such as a newest torch.
$(TORCH_VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) --version >/dev/null || { echo "error: $(PYTHON) does not run; PYTHON=... uses another" >&2; exit 2; }
	@test -x $(TORCH_VENV)/bin/python || $(PYTHON) -m venv $(TORCH_VENV)
	@echo "installing torch $(TORCH) into $(TORCH_VENV): up to 7 GB, some minutes"
	@grep -vE '^(torch|numpy)==' constraints.txt > $(TORCH_VENV)/constraints.txt
	PIP_CONSTRAINT=$(abspath $(TORCH_VENV))/constraints.txt \
	$(TORCH_VENV)/bin/python -m pip install --quiet --no-compile --disable-pip-version-check $(PIP_ARGS) \
	  torch==$(TORCH) "numpy$(if $(filter 2.8.%,$(TORCH)),<2)" \
	  -e ".[train,preprocess,offline,tensorboard,wandb]" transformers pytest pytest-xdist hypothesis psutil
	@touch $@

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
	rm -rf $(VENV) .venv-torch-* build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
