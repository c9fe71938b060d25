# Every target works on a fresh clone: it makes .venv, installs the pinned versions and builds the extension.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet -c constraints.txt
SOURCES := setup.py pyproject.toml constraints.txt $(wildcard csrc/* csrc/aten/* csrc/cpu/* csrc/cuda/*)
CPP := $(wildcard csrc/*.h csrc/*.cpp csrc/aten/* csrc/cpu/* csrc/cuda/* tests/emulation/*.h tests/emulation/*.cpp)
ARGS ?=
# A process a core, a thread a process: threads of several processes would wait for one another.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

EXAMPLES ?= 10000
SEED ?= 1
CUDA ?= 0
DIST := dist/$(if $(filter 1,$(CUDA)),cuda,cpu)

.PHONY: demo test fuzz bench kernels docs check wheel clean

demo: $(VENV)/demo
	$(BIN)/python -m experiments $(ARGS)

# The first tier of the tests: every kind of check, on what is quick. tests/conftest.py tells what is where.
test: $(VENV)/test
	$(PYTEST) -m "not slow" $(ARGS)

# Random trainings: make fuzz EXAMPLES=1000 SEED=2. One process; another seed beside it makes use of another core.
fuzz: $(VENV)/test
	SHARPKERN_FUZZ_EXAMPLES=$(EXAMPLES) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_fuzz.py -k many --hypothesis-seed=$(SEED) $(ARGS)

bench: $(VENV)/bench
	$(BIN)/python -m bench $(ARGS)

# What the compilers make of every kernel: registers, spills, widths. No GPU is needed; nvcc is used where it is found.
kernels: $(VENV)/bench
	$(BIN)/python -m bench.kernels $(ARGS)

# The pages of docs/ and the docstrings, as HTML. A warning is an error; nothing is fetched.
docs: $(VENV)/docs
	$(BIN)/python -m sphinx --fresh-env --write-all --quiet --fail-on-warning --keep-going docs docs/_build

# What CI runs. Both tiers.
check: $(VENV)/check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/mypy
	$(MAKE) docs
	$(MAKE) wheel
	$(PYTEST) $(ARGS)

# What a user's `pip install` of the source archive makes, as a wheel for other Linux machines in dist/: its tag says what
# it needs of the system, torch's libraries stay torch's. Installed and tried outside of the tree before it is put there.
# Without CUDA, which was compiled for the tests; make wheel CUDA=1 insists on it.
wheel: $(VENV)/wheels
	rm -rf $(VENV)/wheel && $(BIN)/python setup.py --quiet sdist -d $(VENV)/wheel
	SHARPKERN_CUDA=$(CUDA) $(BIN)/pip --disable-pip-version-check wheel --quiet --no-build-isolation --no-deps -w $(VENV)/wheel $(VENV)/wheel/sharpkern-*.tar.gz
	PATH="$(CURDIR)/$(BIN):$$PATH" auditwheel repair --strip --exclude 'libtorch*' --exclude 'libc10*' -w $(VENV)/wheel/repaired $(VENV)/wheel/sharpkern-*.whl
	$(BIN)/pip --disable-pip-version-check install --quiet --no-deps --target $(VENV)/wheel/installed $(VENV)/wheel/repaired/sharpkern-*.whl
	cd $(VENV)/wheel/installed && PYTHONPATH=. ../../bin/python ../../../tests/smoke.py --path aten
	mkdir -p $(DIST) && cp $(VENV)/wheel/sharpkern-*.tar.gz $(VENV)/wheel/repaired/sharpkern-*.whl $(DIST)

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

# The build requirements come first: the extension is built against this very torch (no build isolation).
$(VENV)/build: $(BIN)/pip $(SOURCES)
	$(PIP) torch setuptools wheel ninja pybind11
	$(PIP) --no-build-isolation --editable .
	touch $@

$(VENV)/demo: $(VENV)/build
	$(PIP) --no-build-isolation --editable ".[demo]"
	touch $@

$(VENV)/test: $(VENV)/build
	$(PIP) --no-build-isolation --editable ".[analysis,demo,bench,test]"
	touch $@

$(VENV)/bench: $(VENV)/test
	touch $@

$(VENV)/docs: $(VENV)/build
	$(PIP) --no-build-isolation --editable ".[analysis,docs]"
	touch $@

$(VENV)/wheels: $(VENV)/build
	$(PIP) --no-build-isolation --editable ".[wheel]"
	touch $@

$(VENV)/check: $(VENV)/test
	$(PIP) --no-build-isolation --editable ".[analysis,demo,bench,test,integrations,docs,check,wheel]"
	touch $@

clean:
	rm -rf $(VENV) build dist sharpkern.egg-info sharpkern/_C*.so sharpkern/_aten*.so
