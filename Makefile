# Every target sets itself up in .venv. With VENV= (empty) the interpreter at hand is used and
# nothing is installed: torch has to be there, and linters that are absent are left out.
VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0
# What this torch is released with.
TRITON ?= triton==3.7.1; sys_platform == "linux"
ARGS ?=

ifeq ($(VENV),)
PY := $(PYTHON)
READY :=
else
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
endif

CPP := $(shell find seq2seq_fast/csrc tests benchmarks -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
# $(call if-there,NAME,COMMAND): runs the tool COMMAND begins with; without VENV it may be missing.
BIN := $(if $(VENV),$(VENV)/bin/,)
if-there = @if [ -n "$(VENV)" ] || command -v $(1) > /dev/null; \
	then echo "$(1) $(2)"; $(BIN)$(1) $(2); else echo "lint: no $(1) here, left out"; fi

.PHONY: help demo bench gpu test lint build sanitize races clean

help: ## what there is
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: build ## learn to pronounce English words (ARGS="--epochs 8 --hidden 512 --save model.pt")
	PYTHONPATH=. $(PY) examples/pronounce.py $(ARGS)

bench: build ## ratios against eager PyTorch and torch.compile (ARGS=--full for all workloads)
	$(PY) -m pytest -q benchmarks -o python_files='bench_*.py' $(ARGS)

gpu: $(READY) ## on a GPU: the tests, what it can do at most, the workloads (GPU_MINUTES=3)
	$(PY) -c "import seq2seq_fast" || rm -f seq2seq_fast/_C*.so  # built for another machine
	$(PY) benchmarks/gpu.py --check
	$(PY) benchmarks/gpu.py --built || $(PY) setup.py -q build_ext --inplace
	$(PY) benchmarks/gpu.py $(if $(GPU_MINUTES),--minutes $(GPU_MINUTES)) $(ARGS)

test: lint build ## lint, build, the whole test suite
	$(PY) -m pytest -q tests $(ARGS)

lint: $(READY) ## ruff, mypy, clang-format
	$(call if-there,ruff,check .)
	$(call if-there,ruff,format --check .)
	$(call if-there,mypy,)
	$(call if-there,clang-format,--dry-run --Werror $(CPP))

build: $(READY) ## the compiled extension, in place
	$(PY) setup.py -q build_ext --inplace

# The sanitized package lies under build-sanitize/, apart from the one in use. A finding is written
# to the process's standard error as it ends, which pytest must therefore not capture.
SANITIZED = LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=lib

sanitize: $(READY) ## the kernels' tests under AddressSanitizer and UBSan (g++ on Linux)
	SEQ2SEQ_FAST_SANITIZE=1 $(PY) setup.py -q build -b build-sanitize --build-lib build-sanitize/lib
	cd build-sanitize && $(SANITIZED) $(if $(VENV),$(abspath $(PY)),$(PY)) -m pytest -q \
		-p no:cacheprovider --capture=sys -m "not unsanitized" ../tests $(ARGS)

races: build ## the CUDA kernels' tests on the CPU, watched for races (g++)
	CUDA_ON_CPU_RACES=1 $(PY) -m pytest -q -p no:cacheprovider \
		tests/test_cuda.py tests/test_cuda_decoder.py tests/test_cuda_decoding.py \
		tests/test_cuda_location.py $(ARGS)

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q "$(TORCH)" '$(TRITON)'
	$(PY) -m pip install -q setuptools wheel ninja
	$(PY) -m pip install -q --no-build-isolation -e ".[demo,bench,test,dev]"
	touch $@

clean: ## removes what was built, not $(VENV)
	rm -rf build build-sanitize seq2seq_fast/*.so
