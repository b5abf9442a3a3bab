# Everything a newcomer needs is `make demo` and `make test`; both set up a local virtual environment first.
PYTHON ?= python3
VENV   ?= .venv
# Pinned for development; any torch >= 2.11 works: make TORCH='torch==2.12.0' test
TORCH  ?= torch==2.13.0
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

OLDEST := 2.11
CXX_FILES = $$(git ls-files '*.cpp' '*.h' '*.cu')

.PHONY: help demo test test-all peft-suite docs fuzz lint format check-oldest matrix check-cuda cuda-resources check-ptx mutants bench bench-experts bench-step bench-serving bench-server kernel-model quality quality-experts metamathqa-dry gpu-report native wheel check-install check-aarch64 check-ray clean

help:
	@echo "make demo        MoS beside LoRA of the same budget and of eight times it, on a small model; no downloads (at most 4 minutes)"
	@echo "make test        the test-suite"
	@echo "make test-all    the test-suite, PEFT's own suite over MoS (fetched from PyPI), check-oldest with every newer torch"
	@echo "make peft-suite  the latter alone; counts and reasons of skips go to build/peft-suite"
	@echo "make docs        the documentation site in build/docs, without warnings (half a minute)"
	@echo "make fuzz        odd input to the public face, and every causal model of transformers that can be made small (minutes)"
	@echo "make lint        ruff, clang-format, mypy and the linters of workflows, as CI runs them; make format applies the first two"
	@echo "make check-oldest  build against torch $(OLDEST) (fetched from PyPI, 530 MB), import and test beside it; CUDA, too, with nvcc"
	@echo "make matrix      the wheel beside every Python, torch, PEFT and transformers it promises, as docs/install.md shows (half an hour)"
	@echo "make check-cuda  check-oldest, and check the machine code of every .cu for every architecture; needs nvcc, no GPU"
	@echo "make cuda-resources    check-cuda, and keep its table of registers and occupancy"
	@echo "make check-ptx   execute the PTX that nvcc makes of the CUDA kernels, on this CPU (3 minutes); needs nvcc, no GPU"
	@echo "make mutants     plant bugs in the CUDA kernels and show which are found (an hour or two)"
	@echo "make bench       what MoS costs on this CPU, beside PEFT: CSV, tables and plots in build/bench (at most 8 minutes)"
	@echo "make bench-experts   what adapters on every expert cost, beside PEFT: CSV and tables (at most 7 minutes)"
	@echo "make bench-step  what a training step of a whole model costs with adapters, MoS's and PEFT's: CSV and table (at most 7 minutes)"
	@echo "make bench-serving   what many adapters on one base cost, beside PEFT: time, memory, loading; CSV and tables (at most 8 minutes)"
	@echo "make bench-server    a server of many adapters under load: right, wrong and lost answers, tokens a second (at most 3 minutes)"
	@echo "make kernel-model   what the CUDA kernels of a layer should take, by a model; ARGS=\"--rows 2048 --rank 64\", or --table"
	@echo "make quality     the paper in miniature: MoS, its ablations, LoRA, VeRA, VB-LoRA; report in build/quality (at most 15 minutes)"
	@echo "make quality-experts   the same for a small mixture of experts, adapted on its experts; report in build/quality-experts"
	@echo "make metamathqa-dry PEFT=dir   rehearse PEFT's comparison on MetaMathQA, and its table of capabilities; dir is a clone of PEFT"
	@echo "make gpu-report OUT=dir   on a machine with a GPU: build, tests, compute-sanitizer, benchmarks (under 9 minutes)"
	@echo "make wheel       sdist and manylinux wheel in dist/, checked as an index would; with the CUDA kernels where there is nvcc"
	@echo "make check-install   every situation of the table of docs/install.md, by the commands that stand there (half an hour)"
	@echo "make check-aarch64   the CPU kernels on aarch64, cross-compiled and executed by qemu-user (2 minutes); needs Debian's packages of both"
	@echo "make check-ray   two replicas of the server under Ray Serve, one of them killed (2 minutes); Ray is fetched from PyPI"
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
	@$(BIN)/python -m benchmarks.quality.demo $(or $(OUT),demo-output)

test: native
	$(BIN)/python -m pytest -n auto --dist worksteal

test-all: test peft-suite
	$(BIN)/python tests/torch_versions.py $(OLDEST) --to-newest

peft-suite: native
	$(BIN)/python tests/peft_suite/run.py -n auto

docs: native
	$(BIN)/python -m sphinx -q -W --keep-going -n -b html docs $(or $(OUT),build/docs)

# -rf: architectures that cannot be made small are counted, not listed; ARGS=-rs lists them.
fuzz: native
	$(BIN)/python -m pytest -n auto --dist worksteal -rf $(ARGS) tests/fuzz/fuzz_public.py tests/fuzz/fuzz_architectures.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/mypy
	$(BIN)/zizmor --quiet --offline --pedantic .github
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-workflows .github/workflows/*.yml

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# Everything is compiled against the oldest torch only; the newest meets csrc/cuda/ops.cpp in the emulator and test-all.
check-oldest: native
	$(BIN)/python tests/torch_versions.py $(OLDEST)

# WHEEL=file or folder takes that instead of building one; ARGS="--python 3.12 --torch 2.13" runs one cell.
matrix: $(if $(WHEEL),,wheel)
	@$(if $(WHEEL),$(PYTHON),$(BIN)/python) tests/matrix.py --wheel $(or $(WHEEL),dist) $(ARGS)

check-cuda: check-oldest
	@if [ -f build/check-cuda/mos_ext/_C_cuda.so ]; then \
	  $(BIN)/python tests/cuda_gates.py build/check-cuda/mos_ext/_C_cuda.so $(GATES) && \
	  echo "check-cuda: compiled and linked $$(ls csrc/cuda/*.cu | wc -l) .cu files for every architecture"; \
	else echo "check-cuda: nothing checked, nvcc was not found"; fi

cuda-resources:
	$(MAKE) check-cuda GATES="--write csrc/cuda/RESOURCES.md"

# GRID=full runs every check on every architecture. See tests/ptx_machine/README.md.
check-ptx: $(READY)
	@$(BIN)/python tests/ptx_machine $(if $(GRID),--grid $(GRID)) $(ARGS)

mutants: $(READY)
	$(BIN)/python tests/cuda_emulator/mutants.py
	$(BIN)/python tests/ptx_machine/mutants.py

# OUT=dir puts the results elsewhere; ARGS="--grid all" measures everything. See benchmarks/README.md.
bench: native
	$(BIN)/python -m benchmarks $(or $(OUT),build/bench) $(ARGS)

# A mixture-of-experts block, and rows of many adapters: experts.csv and experts.md beside those of `bench`.
bench-experts: native
	$(BIN)/python -m benchmarks.experts $(or $(OUT),build/bench)/experts.csv $(ARGS)

# A training step of a whole model: step.csv and step.md beside those of `bench`.
bench-step: native
	$(BIN)/python -m benchmarks.step $(or $(OUT),build/bench)/step.csv $(ARGS)

# A bank of adapters, its layers, a model, memory and loading: serving.csv and serving.md beside those of `bench`.
bench-serving: native
	$(BIN)/python -m benchmarks.serving $(or $(OUT),build/bench)/serving.csv $(ARGS)

# Requests to examples/server on loopback: server.csv and server.md beside those of `bench`.
bench-server: native
	$(BIN)/python -m benchmarks.server $(or $(OUT),build/bench)/server.csv $(ARGS)

kernel-model: $(READY)
	@$(BIN)/python -m benchmarks.kernel_model $(ARGS)

# Resumable: run again to go on. See benchmarks/quality/README.md.
quality: native
	$(BIN)/python -m benchmarks.quality $(or $(OUT),build/quality) $(ARGS)

quality-experts: native
	$(BIN)/python -m benchmarks.quality $(or $(OUT),build/quality-experts) --experts $(ARGS)

# PEFT's package does not hold these scripts. See benchmarks/metamathqa/README.md.
metamathqa-dry: native
	@test -n "$(PEFT)" || { echo "make metamathqa-dry PEFT=dir: PEFT must be a git checkout of PEFT's repository, got none"; exit 2; }
	PEFT="$(abspath $(PEFT))" $(BIN)/python -m pytest tests/peft_checkout.py

# With the interpreter that has a CUDA build of torch, not the virtual environment. See benchmarks/README.md.
gpu-report:
	@test -n "$(OUT)" || { echo "make gpu-report OUT=dir [PART=build,test,sanitize,bench]: OUT must be given"; exit 2; }
	@$(PYTHON) -m benchmarks.gpu_report "$(OUT)" $(if $(PART),--part $(PART)) $(if $(DEVICE),--device $(DEVICE))

# MOS_EXT_BUILD=cpu leaves the CUDA kernels out where there is nvcc.
wheel: $(READY)
	$(BIN)/python tests/release.py dist

check-aarch64: $(READY)
	$(BIN)/python tests/aarch64.py

check-ray: $(READY)
	$(BIN)/python -m pytest -s tests/check_ray.py

# Long: a clone and an environment for each situation, compiled anew. ARGS="'CPU kernels'" runs some of them.
check-install: wheel
	$(BIN)/python tests/check_install.py $(ARGS)

clean:
	rm -rf build dist *.egg-info mos_ext/*.so mos_ext/_build_info.json .pytest_cache .ruff_cache .mypy_cache .hypothesis
