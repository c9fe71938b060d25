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

# What a user's `pip install` of the source archive makes, imported from outside the tree. Without CUDA: that part was
# compiled for the tests.
wheel: $(VENV)/test
	rm -rf $(VENV)/wheel && $(BIN)/python setup.py --quiet sdist -d $(VENV)/wheel
	SHARPKERN_CUDA=0 $(BIN)/pip --disable-pip-version-check wheel --quiet --no-build-isolation --no-deps -w $(VENV)/wheel $(VENV)/wheel/sharpkern-*.tar.gz
	$(BIN)/python -m zipfile -e $(VENV)/wheel/sharpkern-*.whl $(VENV)/wheel/unpacked
	cd $(VENV)/wheel/unpacked && ../../bin/python -c "import sharpkern, os; from sharpkern.ops import scan; assert sharpkern.build_info()['extension'], sharpkern.build_info(); assert scan.path() == 'aten', scan.path(); assert sharpkern.__file__.startswith(os.getcwd())"

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

$(VENV)/check: $(VENV)/test
	$(PIP) --no-build-isolation --editable ".[analysis,demo,bench,test,integrations,docs,check]"
	touch $@

clean:
	rm -rf $(VENV) build sharpkern.egg-info sharpkern/_C*.so sharpkern/_aten*.so
