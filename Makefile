# Every habit is one word. A fresh machine needs Python 3.10+, a C++20 compiler and make; the rest comes from PyPI.
VENV ?= .venv
PYTHON ?= python3
PY := $(VENV)/bin/python
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test soak lint format bench build clean
.DEFAULT_GOAL := build

# The virtual environment with everything that the habits below use, and the extension built from csrc/.
STAMP := $(VENV)/.ktmoe-installed
SOURCES := $(shell find csrc -type f) CMakeLists.txt pyproject.toml constraints.txt
build: $(STAMP)
$(STAMP): $(SOURCES)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --upgrade "scikit-build-core>=0.10" "nanobind>=2.4" ninja cmake
	$(PY) -m pip install -q --no-build-isolation -e ".[dev]"
	touch $@

demo: build  ## make a small MoE model, fine-tune it on the standard library's documentation, check the adapter in plain PEFT
	$(VENV)/bin/ktmoe demo $(ARGS)

test: build
	$(PY) -m pytest -q -n auto --dist loadfile $(ARGS)

soak: build  ## the long versions of the lifecycle tests: 10,000 layers, 1,000 exits, 200 forks, an hour's worth of calls
	KTMOE_SOAK=1 $(PY) -m pytest -q tests/lifecycle/test_soak.py tests/lifecycle/test_process_exit.py $(ARGS)

lint: build
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $$(find csrc bench -name '*.h' -o -name '*.cc')
	$(PY) tools/check_layers.py
	$(PY) tools/check_flags.py

format: build
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $$(find csrc bench -name '*.h' -o -name '*.cc')

bench: build  ## about half an hour; make bench ARGS=--quick, or ARGS="--cells S1:1,S1:64 --methods BF16", or ARGS=engine
	$(PY) -m bench $(ARGS)

clean:
	rm -rf build $(STAMP)
