# The verbs of this repository; `make help` lists them. Each makes the virtual environment it needs once, in place,
# and native code is rebuilt only when csrc/, CMakeLists.txt or pyproject.toml changed (stamp files do the bookkeeping).

PYTHON ?= python3
FUZZ_SECONDS ?= 60
FUZZ_CC ?= clang-19
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest
NATIVE := CMakeLists.txt pyproject.toml $(shell find csrc -type f 2>/dev/null)
BUILD_TOOLS := "scikit-build-core>=0.11,<2" "cython>=3.1,<4" "numpy>=2.0,<3" "cmake>=3.25,<5" "ninja>=1.11"
# CMAKE_INSTALL_ALWAYS: an object relinked within the same second must not leave the old one installed.
PIP := CMAKE_INSTALL_ALWAYS=1 PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install -q
SANITIZED := PYTHONMALLOC=malloc ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help emulated tiles quickstart test tier1 tier2 tier3 lint format coverage mutants deny-check bench fuzz san docs clean \
        build oracles oracles-large

help:  ## list the verbs
	@awk -F':.*## ' '/^[a-z0-9-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

quickstart: build  ## fine-tune, merge and export the bundled tiny model, in about a minute
	@$(BIN)/entrenar quickstart

test: build  ## run every test
	@$(PYTEST) -q

tier1: build  ## the tests of the inner loop, within 5 s
	@$(PYTEST) -q -m tier1 --hypothesis-profile=quick

tier2: build  ## tier1 and the next ones, within 30 s
	@$(PYTEST) -q -m "tier1 or tier2"

tier3: test  ## every test, as `make test`

lint: build  ## ruff, mypy on the package, and who may import whom
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(PYTEST) -q tests/test_imports.py

format: build  ## let ruff repair and sort what it safely can
	@$(BIN)/ruff check --fix .

coverage: build  ## line coverage of the package; fails under 90 %
	@$(PYTEST) -q --cov=entrenar --cov-report=term-missing:skip-covered --cov-fail-under=90

mutants: build  ## mutation tests on the modules named in pyproject.toml (long)
	@$(PIP) "mutmut>=3.3,<4"
	@$(BIN)/python tests/mutants.py

deny-check: build  ## dependencies and licences against the allow-list; no forbidden import
	@$(BIN)/python tests/deny_check.py

emulated: build  ## the tests of products on an emulated machine with AMX (long; docs/emulated.md)
	@$(BIN)/python tests/emulated/machine.py -- env ENTRENAR_ISA=amx python -m pytest -q -p no:cacheprovider \
	  tests/kernels/test_product.py -k amx

# A build of its own, as the sanitized ones below.
tiles: .venv-tiles/.built  ## tests of level amx with tiles made in software, on any CPU with AVX512_BF16 (docs/emulated.md)
	@.venv-tiles/bin/python -m pytest -q -p no:cacheprovider -k amx tests/kernels

.venv-tiles/.built: $(NATIVE)
	@echo "make: building with tiles in software in .venv-tiles"
	@test -x .venv-tiles/bin/python || $(PYTHON) -m venv .venv-tiles
	@.venv-tiles/bin/python -m pip install -q $(BUILD_TOOLS)
	@.venv-tiles/bin/python -m pip install -q --no-build-isolation -C build-dir=build/tiles \
	  -C cmake.define.ENTRENAR_TILES=software -e ".[test]"
	@touch $@

bench: build  ## measure kernels and steps, with PEER=python also PyTorch's stack; stored in bench/results/
	@$(BIN)/python bench/run.py $(if $(PEER),--peer $(PEER))

docs: build  ## check the pages: links lead somewhere, code blocks compile, commands and flags exist
	@$(PYTEST) -q tests/test_docs.py

build: .venv/.built

oracles: build  ## add the quick development-only programs that tests marked `oracle` compare with
	@$(PIP) -r tests/oracles/requirements.txt

.venv/bin/python:
	@echo "make: creating the virtual environment .venv (once)"
	@$(PYTHON) -m venv .venv

.venv/.built: $(NATIVE) | .venv/bin/python
	@echo "make: building the native core and installing entrenar, with what it needs, into .venv"
	@$(PIP) $(BUILD_TOOLS)
	@$(PIP) --no-build-isolation -C build-dir=build/editable -e ".[test,dev]"
	@touch $@

oracles-large: oracles  ## add PyTorch, transformers, PEFT and bitsandbytes as well, more than a gigabyte
	@$(PIP) -r tests/oracles/large.txt

# Sanitized builds live in environments of their own, so that an everyday build is never mistaken for one.
san: .venv-san/.built  ## tests of kernels, formats, storage and operations under AddressSanitizer and UBSan
	@LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 $(SANITIZED) \
	 .venv-san/bin/python -m pytest -q -p no:cacheprovider $(wildcard tests/kernels tests/formats tests/ops tests/quant)

.venv-san/.built: $(NATIVE)
	@echo "make: building with AddressSanitizer and UBSan in .venv-san"
	@test -x .venv-san/bin/python || $(PYTHON) -m venv .venv-san
	@.venv-san/bin/python -m pip install -q $(BUILD_TOOLS)
	@CC=gcc .venv-san/bin/python -m pip install -q --no-build-isolation -C build-dir=build/san \
	  "-Ccmake.define.ENTRENAR_SAN=-fsanitize=address,undefined -fno-omit-frame-pointer" -e ".[test]"
	@touch $@

# The codecs alone, without Python: fuzz/codecs.c with the files of csrc/ that it needs.
build/fuzz-codecs: fuzz/codecs.c $(wildcard csrc/quant/*) csrc/entrenar.h csrc/threads.c csrc/cores.c csrc/memory.c \
                   csrc/blocks.c
	@command -v $(FUZZ_CC) >/dev/null || { echo "make fuzz: $(FUZZ_CC) is not installed" >&2; exit 2; }
	@mkdir -p build
	@$(FUZZ_CC) -g -O1 -ffp-contract=off -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=undefined \
	  -o $@ $(filter %.c,$^) -lpthread -lm

# malloc_context_size: stacks of allocations cost four fifths of the time; raise it to look into a crash.
fuzz: .venv-fuzz/.built build/fuzz-codecs  ## each target of fuzz/ for FUZZ_SECONDS=60 under AddressSanitizer (needs clang-19)
	@mkdir -p fuzz/corpus fuzz/crashes
	@mkdir -p fuzz/corpus/codecs; echo "== fuzz/codecs.c: $(FUZZ_SECONDS) s"; \
	  build/fuzz-codecs -max_total_time=$(FUZZ_SECONDS) -artifact_prefix=fuzz/crashes/codecs- fuzz/corpus/codecs
	@for target in fuzz/[a-z]*.py; do \
	  name=$$(basename $$target .py); mkdir -p fuzz/corpus/$$name; echo "== $$target: $(FUZZ_SECONDS) s"; \
	  LD_PRELOAD="$$(.venv-fuzz/bin/python -c 'import atheris; print(atheris.path())')/asan_with_fuzzer.so" \
	  $(SANITIZED):malloc_context_size=1 .venv-fuzz/bin/python $$target -max_total_time=$(FUZZ_SECONDS) \
	    -artifact_prefix=fuzz/crashes/$$name- fuzz/corpus/$$name || exit 1; \
	done

# Not editable: atheris sees no coverage in modules that an editable installation's loader brings.
.venv-fuzz/.built: $(NATIVE) $(shell find entrenar -name '*.py' 2>/dev/null)
	@command -v $(FUZZ_CC) >/dev/null || { \
	  echo "make fuzz: $(FUZZ_CC) is not installed; on Debian and Ubuntu: apt-get install clang-19 libclang-rt-19-dev" >&2; \
	  exit 2; }
	@echo "make: building with AddressSanitizer and libFuzzer in .venv-fuzz"
	@test -x .venv-fuzz/bin/python || $(PYTHON) -m venv .venv-fuzz
	@.venv-fuzz/bin/python -m pip install -q $(BUILD_TOOLS) "atheris>=3.0,<4"
	@CC=$(FUZZ_CC) .venv-fuzz/bin/python -m pip install -q --no-build-isolation -C build-dir=build/fuzz \
	  "-Ccmake.define.ENTRENAR_SAN=-fsanitize=fuzzer-no-link,address -fno-omit-frame-pointer" .
	@touch $@

clean:  ## remove everything that was built, the virtual environments too
	rm -rf .venv .venv-san .venv-fuzz .venv-tiles build dist mutants .coverage htmlcov .pytest_cache .mypy_cache .ruff_cache \
	  .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
