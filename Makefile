# Every target makes the environment that it needs, from nothing; a second call finds it there. `make help` lists them.

VENV := .venv
PYTHON := $(VENV)/bin/python
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(PYTHON) -m pip install --quiet
# "require" stops where the C++ library cannot be built; "1" goes on without it
BUILD ?= require
PYTEST_ARGS ?=
BENCH_ARGS ?=

CSRC := $(wildcard csrc/*)
# what runs C++, told from other backends by "-k cpp"
CPP_TESTS := python_tests/ops python_tests/selection/test_memory_bank.py
# every op of C++ once, and whether torch takes the CUDA library
OTHER_TORCH_TESTS := python_tests/ops/test_registry.py python_tests/test_build.py -q -k "test_kinds and cpp or cuda_library_loads"
FORMATTED := $(wildcard csrc/*.cpp csrc/*.h csrc/*.inc csrc/*.cu csrc/*.cuh)

TORCHES := oldest newest
PEERS := .venv-peers
INTEGRATIONS := .venv-integrations
SANITIZED := build/sanitized
RACES := build/races
LIBTSAN = $(shell c++ -print-file-name=libtsan.so)
LIBASAN = $(shell c++ -print-file-name=libasan.so):$(shell c++ -print-file-name=libstdc++.so.6)

.PHONY: help
help:
	@echo "make demo    compare three batch selectors on Fashion-MNIST: table, CSV, JSON and plot in demo_output/"
	@echo "make test    the quick tests (PYTEST_ARGS='-k greedy' for some of them)"
	@echo "make bench   time the ops against torch and the libraries one would install instead (BENCH_ARGS)"
	@echo "make sentences, lightning, accelerate, trainer   a sampler in the trainer of sentence-transformers, Lightning, ..."
	@echo "make lightly, ddp, graph   in a loop of lightly's parts, of one's own under torchrun, on WordNet's graph"
	@echo "make lint    ruff, mypy --strict, clang-format"
	@echo "make aot     compile the Triton kernels for GPUs that need not be there, and check spills, loads and matrix instructions"
	@echo "make check   the long tests: slow ones, property hunts, every CPU path, the oldest and newest torch, sanitizers"
	@echo "make clean   remove what was built; make distclean removes the environments too"

.PHONY: demo
demo: $(VENV)/package.stamp
	tools/fetch_fashion_mnist.sh
	$(VENV)/bin/spectral-kernels compare --config demo --out demo_output data.download=true

.PHONY: test
test: $(VENV)/package.stamp
	$(PYTHON) -m pytest python_tests -q -n auto -m "not slow" $(PYTEST_ARGS)

.PHONY: bench
bench: $(VENV)/package.stamp $(PEERS)/stamp
	PYTHONPATH=. $(PEERS)/bin/python bench/run.py $(BENCH_ARGS)

.PHONY: sentences graph lightning accelerate trainer lightly ddp
lightning: $(VENV)/package.stamp $(INTEGRATIONS)/stamp
	tools/fetch_fashion_mnist.sh
	PYTHONPATH=. $(INTEGRATIONS)/bin/python examples/lightning_simclr.py

trainer: $(VENV)/package.stamp $(INTEGRATIONS)/stamp
	tools/fetch_fashion_mnist.sh
	PYTHONPATH=. $(INTEGRATIONS)/bin/python examples/trainer_simclr.py

accelerate: $(VENV)/package.stamp $(INTEGRATIONS)/stamp
	tools/fetch_fashion_mnist.sh
	OMP_NUM_THREADS=1 PYTHONPATH=. $(INTEGRATIONS)/bin/python -m torch.distributed.run --nproc-per-node 2 \
	    examples/accelerate_simclr.py

# apart from Lightning, which imports torchvision where it is, whose binary part wants torch's own kind
lightly: $(VENV)/package.stamp $(PEERS)/stamp
	tools/fetch_fashion_mnist.sh
	PYTHONPATH=. $(PEERS)/bin/python tools/torchvision_beside_cpu_torch.py examples/lightly_moco.py

sentences: $(VENV)/package.stamp $(INTEGRATIONS)/stamp
	tools/fetch_wordnet.sh
	PYTHONPATH=. $(INTEGRATIONS)/bin/python examples/sentence_transformers_wordnet.py

ddp: $(VENV)/package.stamp
	tools/fetch_fashion_mnist.sh
	OMP_NUM_THREADS=1 PYTHONPATH=. $(PYTHON) -m torch.distributed.run --nproc-per-node 2 examples/ddp_simclr.py

graph: $(VENV)/package.stamp
	tools/fetch_wordnet.sh
	$(PYTHON) examples/graph.py

.PHONY: aot
aot: $(VENV)/package.stamp .venv-torch-oldest/stamp
	$(PYTHON) bench/aot.py
	.venv-torch-oldest/bin/python bench/aot.py --arch 90

.PHONY: lint
lint: $(VENV)/package.stamp
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(FORMATTED)

# --- the long suites -------------------------------------------------------------------------------------------------

.PHONY: check check-slow check-properties check-paths check-torch check-sanitize check-races check-peers check-integrations \
    check-examples
check: check-slow check-properties check-paths check-torch check-sanitize check-races check-peers check-integrations \
    check-examples

check-examples: graph sentences lightning accelerate trainer lightly ddp

check-slow: $(VENV)/package.stamp
	$(PYTHON) -m pytest python_tests -q -m slow $(PYTEST_ARGS)

check-properties: $(VENV)/package.stamp
	HYPOTHESIS_PROFILE=long $(PYTHON) -m pytest python_tests -q -n auto -m hypothesis $(PYTEST_ARGS)

# a package that is missing there is a failure, where `make test` leaves it out
check-peers: $(VENV)/package.stamp $(PEERS)/stamp
	SPECTRAL_KERNELS_PEERS=require PYTHONPATH=. $(PEERS)/bin/python -m pytest python_tests/peers -q $(PYTEST_ARGS)

check-integrations: $(VENV)/package.stamp $(INTEGRATIONS)/stamp
	SPECTRAL_KERNELS_PEERS=require PYTHONPATH=. $(INTEGRATIONS)/bin/python -m pytest python_tests/integrations -q $(PYTEST_ARGS)

# the paths that the widest one hides on this processor
check-paths: $(VENV)/package.stamp
	SPECTRAL_KERNELS_CPU_PATH=baseline $(PYTHON) -m pytest $(CPP_TESTS) -q -n auto -m "not slow" -k cpp $(PYTEST_ARGS)
	SPECTRAL_KERNELS_CPU_PATH=avx2 $(PYTHON) -m pytest $(CPP_TESTS) -q -n auto -m "not slow" -k cpp $(PYTEST_ARGS)

# each torch with the library that its headers made, then with the other's; unpacking a torch keeps one core busy
check-torch:
	$(MAKE) -j 2 $(TORCHES:%=.venv-torch-%/stamp)
	$(MAKE) $(TORCHES:%=check-torch-%)
	PYTHONPATH=build/torch-newest .venv-torch-oldest/bin/python -P -m pytest $(OTHER_TORCH_TESTS) $(PYTEST_ARGS)
	PYTHONPATH=build/torch-oldest .venv-torch-newest/bin/python -P -m pytest $(OTHER_TORCH_TESTS) $(PYTEST_ARGS)

.PHONY: $(TORCHES:%=check-torch-%)
$(TORCHES:%=check-torch-%): check-torch-%: .venv-torch-%/stamp
	SPECTRAL_KERNELS_BUILD=require SPECTRAL_KERNELS_CUDA=$(if $(shell command -v $(or $(NVCC),nvcc)),require,1) \
	    .venv-torch-$*/bin/python setup.py --quiet build --build-lib build/torch-$*
	PYTHONPATH=build/torch-$* .venv-torch-$*/bin/python -P -m pytest $(CPP_TESTS) -q -n auto -m "not slow" -k cpp $(PYTEST_ARGS)
	OMP_NUM_THREADS=1 PYTHONPATH=build/torch-$* \
	    .venv-torch-$*/bin/python -P -m pytest python_tests/ops -q -n auto -m "not slow" -k triton $(PYTEST_ARGS)

# -P: the package is the one in PYTHONPATH, not the one in this folder; -s, or pytest would keep what a sanitizer says
check-sanitize: $(VENV)/package.stamp
	SPECTRAL_KERNELS_SANITIZE=address,undefined SPECTRAL_KERNELS_BUILD=require \
	    $(PYTHON) setup.py --quiet build --build-lib $(SANITIZED)
	PYTHONPATH=$(SANITIZED) LD_PRELOAD=$(LIBASAN) ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	    $(PYTHON) -P -m pytest $(CPP_TESTS) -q -s -n auto -m "not slow" -k cpp $(PYTEST_ARGS)
	SPECTRAL_KERNELS_SANITIZE=address LD_PRELOAD=$(LIBASAN) ASAN_OPTIONS=detect_leaks=0 \
	    $(PYTHON) -m pytest python_tests/ops/test_device_data.py -q -k cuda $(PYTEST_ARGS)

# setarch -R: the sanitizer wants memory where it expects it
check-races: $(VENV)/package.stamp
	SPECTRAL_KERNELS_SANITIZE=thread SPECTRAL_KERNELS_BUILD=require \
	    $(PYTHON) setup.py --quiet build --build-lib $(RACES)
	PYTHONPATH=$(RACES) LD_PRELOAD=$(LIBTSAN) \
	    TSAN_OPTIONS=halt_on_error=1:ignore_noninstrumented_modules=1 \
	    setarch -R $(PYTHON) -P -m pytest $(CPP_TESTS) -q -s -n auto -m "not slow" -k "cpp or threads" $(PYTEST_ARGS)

# --- environments ----------------------------------------------------------------------------------------------------

define make_venv
	@set -e; for python in python3.11 python3 python3.12 python3.13 python3.14; do \
	    if $$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then \
	        echo "making $(1) with $$($$python --version)"; rm -rf $(1); exec $$python -m venv $(1); \
	    fi; \
	done; \
	echo "spectral_kernels needs Python 3.11 or newer with venv; neither python3 nor python3.11 ... python3.14 is" >&2; \
	exit 1
endef

$(PYTHON):
	$(call make_venv,$(VENV))

$(VENV)/torch.stamp: requirements/torch.txt | $(PYTHON)
	@echo "installing torch"
	@$(PIP) -r requirements/torch.txt
	@touch $@

$(VENV)/dev.stamp: requirements/dev.txt requirements/torchvision.txt $(VENV)/torch.stamp
	@echo "installing what build, tests and demo need"
	@$(PIP) -r requirements/dev.txt
	@$(PIP) --no-deps -r requirements/torchvision.txt
	@touch $@

# --no-deps: everything is there, and pip is not to look for another torch or triton
$(VENV)/package.stamp: setup.py tools/toolchain.py pyproject.toml $(CSRC) $(VENV)/dev.stamp
	@echo "building spectral_kernels"
	@SPECTRAL_KERNELS_BUILD=$(BUILD) $(PIP) --no-deps --no-build-isolation --editable . || { \
	    echo "Not built; 'no C++ library', above, says why. 'make BUILD=1 ...' goes on without the library." >&2; \
	    exit 1; }
	@touch $@

# --no-deps: a CUDA build of torch asks for gigabytes of CUDA's libraries, for which there are stubs
.venv-torch-%/stamp: requirements/torch-%.txt requirements/torch-tests.txt tools/stub_cuda.py
	$(call make_venv,.venv-torch-$*)
	@PIP_DISABLE_PIP_VERSION_CHECK=1 .venv-torch-$*/bin/python -m pip install --quiet --no-deps -r requirements/torch-$*.txt
	@.venv-torch-$*/bin/python tools/stub_cuda.py
	@touch $@

$(PEERS)/stamp: requirements/peers.txt requirements/judges.txt requirements/torchvision.txt requirements/torch.txt
	$(call make_venv,$(PEERS))
	@PIP_DISABLE_PIP_VERSION_CHECK=1 $(PEERS)/bin/python -m pip install --quiet -r requirements/torch.txt
	@PIP_DISABLE_PIP_VERSION_CHECK=1 $(PEERS)/bin/python -m pip install --quiet -r requirements/peers.txt
	@PIP_DISABLE_PIP_VERSION_CHECK=1 $(PEERS)/bin/python -m pip install --quiet --no-deps -r requirements/judges.txt \
	    -r requirements/torchvision.txt
	@touch $@

$(INTEGRATIONS)/stamp: requirements/integrations.txt requirements/model.txt requirements/torch.txt
	$(call make_venv,$(INTEGRATIONS))
	@PIP_DISABLE_PIP_VERSION_CHECK=1 $(INTEGRATIONS)/bin/python -m pip install --quiet -r requirements/torch.txt
	@PIP_DISABLE_PIP_VERSION_CHECK=1 $(INTEGRATIONS)/bin/python -m pip install --quiet -r requirements/integrations.txt
	@PIP_DISABLE_PIP_VERSION_CHECK=1 $(INTEGRATIONS)/bin/python -m pip install --quiet --no-deps -r requirements/model.txt
	@touch $@

.PHONY: clean distclean
clean:
	rm -rf build dist *.egg-info spectral_kernels/_C*.so spectral_kernels/_build_info.json $(VENV)/package.stamp
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis

distclean: clean
	rm -rf $(VENV) $(PEERS) $(INTEGRATIONS) $(TORCHES:%=.venv-torch-%)
