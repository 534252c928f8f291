# Each target does all of its own set-up, once, in a virtual environment beside this file.

PYTHON ?= python3
VENV ?= .venv
VENV_OLDEST ?= .venv-oldest
WORKERS ?= 2
BUDGET ?= 540
SOAK ?= 50

# The oldest versions that pyproject.toml admits, and the tests that must hold on them.
OLDEST_PINS := "torch===2.11.0" "torchvision==0.26.0" "timm==1.0.31" "numpy<2.4"
OLDEST_TESTS := tests/ops tests/backends/test_backends.py tests/blocks/test_blocks*.py tests/blocks/test_freeze.py \
	tests/blocks/test_compile.py tests/test_graphs.py tests/weights/test_weights.py tests/training/test_train.py
# The versions of the tests' own tools; torch, timm and what they bring are the newest or the oldest.
TOOLS := -c tests/constraints.txt
# Too large for two workers to share the memory.
ALONE := regnety_640,resnetv2_50x3_bit,resnetv2_152x2_bit
OLDEST_MODELS := regnetx_002,regnety_040_sgn,regnetz_005,repvgg_a0,resnetv2_18

# The tests start some hundred processes, which need not compile the same files again.
export PYTHONDONTWRITEBYTECODE :=

# The tests run one torch thread per worker: on small shapes two processes beat two threads.
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n $(WORKERS)
MAIN := tests --ignore=tests/test_models.py --ignore=tests/test_families.py --ignore=tests/versions -m "not slow"
# Whole models run with all threads, as users run them: torch chooses other libraries with one thread. Threads of two
# processes on the same cores wait passively, or they wait for each other.
PYTEST_MODELS := OMP_WAIT_POLICY=passive $(VENV)/bin/python -m pytest -q tests/test_models.py tests/test_families.py
# Triton's interpreter is chosen when the kernels are imported, so that these tests have processes of their own.
PYTEST_KERNELS := -m pytest -q -n $(WORKERS) tests/kernels -m "not slow"
# Networks in training and tuning are interpreted with the oldest versions alone, every configuration with the newest.
NOT_NEWEST := --ignore=tests/kernels/test_training_backend.py --ignore=tests/kernels/test_tune.py
NOT_OLDEST := -k "not every_configuration"
PYTEST_OLDEST := OMP_NUM_THREADS=1 $(VENV_OLDEST)/bin/python -m pytest -q -n $(WORKERS)

.PHONY: help environments demo digits docs test test-all test-rest matrix soak kernels test-oldest versions lint host-suite bench gpu gpu-dry-run sanitize clean

help:
	@echo "make demo         what it does and how much faster it is here"
	@echo "make digits       trains a small model on handwritten digits, and timm's own beside it: some ten minutes"
	@echo "make docs         the documentation as a site, in build/site; fails on a broken link"
	@echo "make test         lint, the site of the documentation, and of every kind of test a few: ten minutes"
	@echo "make test-all     every test but the slow ones, the quick part of timm's own model tests, and all versions of torch"
	@echo "make test-oldest  the tests that must hold on the oldest supported versions"
	@echo "make versions     a short set of tests on every minor version of torch, and on every Python"
	@echo "make matrix       the numbers of every architecture that is rebuilt, the largest too (16 GB of memory)"
	@echo "make soak         SOAK times the random inputs, threads and calls of the tests: ten to twenty minutes; docs/robustness.md"
	@echo "make kernels      every kernel for every shape and GPU architecture: more models in the interpreter, all compiled"
	@echo "make host-suite   timm's own model tests on every architecture that fits in memory"
	@echo "make bench        the CPU results in bench/results: an hour or two on an idle machine; goes on where it ended"
	@echo "make gpu          what a GPU should measure, for BUDGET seconds with PYTHON's own torch; goes on where it ended"
	@echo "make gpu-dry-run  the same order on tiny shapes, without a GPU: two to three minutes"
	@echo "make sanitize     the CUDA C++ kernels under compute-sanitizer, on a GPU with PYTHON's own torch"
	@echo "make lint         ruff, and that every tensor names its dtype and device"

demo: $(VENV)/installed
	$(VENV)/bin/regnet-fast demo

digits: $(VENV)/installed
	$(VENV)/bin/python examples/digits.py

# With -j 2, both at once.
environments: $(VENV)/installed $(VENV_OLDEST)/installed

docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict

test: lint docs
	$(VENV)/bin/python tests/versions/here.py
	$(PYTEST) $(MAIN) --part short
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(VENV)/bin/python $(PYTEST_KERNELS) $(NOT_NEWEST) --part short
	$(PYTEST_MODELS) -n $(WORKERS) -m "not slow" --part short

test-all: test test-rest test-oldest versions

test-rest: $(VENV)/installed
	$(PYTEST) $(MAIN) --part rest
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(VENV)/bin/python $(PYTEST_KERNELS) $(NOT_NEWEST) --part rest
	$(PYTEST_MODELS) -n $(WORKERS) -m "not slow" --part rest
	$(VENV)/bin/python tests/host_suite/run.py --quick -n $(WORKERS)
	$(VENV)/bin/python -m pytest -q bench --benchmark-disable
	$(MAKE) gpu-dry-run

test-oldest: $(VENV_OLDEST)/installed
	$(VENV_OLDEST)/bin/python tests/versions/here.py
	$(PYTEST_OLDEST) -m "not slow" $(OLDEST_TESTS) --part short
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(VENV_OLDEST)/bin/python $(PYTEST_KERNELS) $(NOT_OLDEST) --part short
	$(VENV_OLDEST)/bin/python tests/host_suite/run.py --models $(OLDEST_MODELS) -n $(WORKERS)

# Environments of 5 GB, two at a time, in .cache/versions; ONLY="--only 2.13" makes that one alone.
versions: environments
	$(VENV)/bin/python tests/versions/run.py $(VENV) $(VENV_OLDEST) -n $(WORKERS) $(ONLY)

matrix: $(VENV)/installed
	$(PYTEST_MODELS)

# The page is written from failures too.
soak: $(VENV)/installed
	rm -rf .cache/soak
	REGNET_FAST_SOAK=$(SOAK) $(PYTEST) --timeout 3600 tests/soak; \
		status=$$?; PYTHONPATH=. $(VENV)/bin/python tests/soak/report.py && exit $$status

kernels: $(VENV)/installed
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n $(WORKERS) tests/kernels
	$(VENV)/bin/python -m bench.compile.kernels
	$(VENV)/bin/python -m pytest -q -n $(WORKERS) tests/simulator
	$(VENV)/bin/python -m pytest -q -m slow tests/backends/test_cuda_build.py tests/bench/test_cuda_compilation.py
	if command -v nvcc; then $(VENV)/bin/python -m bench.compile.csrc; fi

bench: $(VENV)/installed
	$(VENV)/bin/python -m bench cpu

# On the machine with the GPU nothing is installed: its own Python has torch, timm and pytest.
gpu:
	$(PYTHON) -m bench gpu --budget $(BUDGET)

sanitize:
	$(PYTHON) -m pytest -q tests/gpu/test_sanitizer.py

gpu-dry-run: $(VENV)/installed
	rm -rf .cache/gpu-dry-run
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m bench gpu --dry-run

lint: $(VENV)/installed
	$(VENV)/bin/ruff check --output-format=concise .
	$(VENV)/bin/python tests/lint_factories.py

host-suite: $(VENV)/installed
	$(VENV)/bin/python tests/host_suite/run.py -n $(WORKERS)
	$(VENV)/bin/python tests/host_suite/run.py --models $(ALONE)

# An environment is complete when its stamp is newer than the files that say what it holds.
$(VENV)/installed: pyproject.toml setup.py tests/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -qq --no-compile --disable-pip-version-check $(TOOLS) --editable ".[dev,demo]"
	@touch $@

$(VENV_OLDEST)/installed: pyproject.toml setup.py tests/constraints.txt
	$(PYTHON) -m venv $(VENV_OLDEST)
	$(VENV_OLDEST)/bin/python -m pip install -qq --no-compile --disable-pip-version-check $(TOOLS) $(OLDEST_PINS) --editable ".[test]"
	@touch $@

clean:
	rm -rf $(VENV) $(VENV_OLDEST) .cache build dist *.egg-info
