# Everything a newcomer needs is `make demo` and `make test`; both set up a local virtual environment first.
PYTHON ?= python3
VENV   ?= .venv
# Pinned for development; any torch >= 2.11 works: make TORCH='torch==2.12.0' test
TORCH  ?= torch==2.13.0
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: help demo test lint format check-cuda native wheel clean

help:
	@echo "make demo        fine-tune a small model with MoS, no downloads of models or data (at most 4 minutes)"
	@echo "make test        the test-suite"
	@echo "make lint        ruff, clang-format and mypy, as CI runs them; make format applies the first two"
	@echo "make check-cuda  compile and link every .cu for every architecture; needs nvcc, no GPU"
	@echo "make wheel       sdist and wheel in dist/"
	@echo "make clean       remove builds and caches (not $(VENV))"

$(READY): pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)" "setuptools>=77" wheel ninja numpy
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[dev]"
	@touch $@

# Incremental: ninja compiles what changed in csrc/.
native: $(READY)
	@$(BIN)/python setup.py --quiet build_ext --inplace

demo: native
	$(BIN)/python examples/finetune.py

test: native
	$(BIN)/python -m pytest -n auto --dist worksteal

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh')
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh')

check-cuda: $(READY)
	@if command -v nvcc >/dev/null || [ -n "$$CUDA_HOME" ]; then \
	  MOS_EXT_BUILD=cuda MOS_EXT_WERROR=1 $(BIN)/python setup.py --quiet build_ext --force \
	    --build-lib build/check-cuda --build-temp build/check-cuda-objects && \
	  $(BIN)/python -m pytest -q tests/test_layers.py -k symbols && \
	  echo "check-cuda: compiled and linked $$(ls csrc/cuda/*.cu | wc -l) .cu file(s) for every architecture"; \
	else echo "check-cuda: nothing checked, nvcc was not found"; fi

wheel: $(READY)
	$(BIN)/python -m build --no-isolation

clean:
	rm -rf build dist *.egg-info mos_ext/*.so mos_ext/_build_info.json .pytest_cache .ruff_cache .mypy_cache .hypothesis
