# make test | test-oldest | demo | bench | bench-check | gpu-check | aarch64-test | docs | dist | lint | clean. Everything is installed into .venv; PYTHON and VENV can be given.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO := build/demo
CLIP ?= $(firstword $(sort $(wildcard assets/demo/clips/*.mp4)))
QUERY ?= $(shell cat $(CLIP:.mp4=.txt) 2>/dev/null)

.PHONY: help test test-oldest demo bench bench-check gpu-check gpu-check-bundle aarch64-test docs dist lint format clean
.DELETE_ON_ERROR:

comma := ,

help:
	@echo "make test    install into $(VENV) and run the tests (PYTEST_ARGS=... is passed on)"
	@echo "make test-oldest  run the runtime's tests on Python 3.10 with the lowest version of every dependency"
	@echo "make demo    install, export the demo checkpoint and ground a sample clip into $(DEMO)/"
	@echo "make bench   speed of this runtime beside torch, on the demo and a 0.5B model, with this machine's limits (FULL=1: every size and peer)"
	@echo "make bench-check  fail if the demo is slower, relative to torch in the same run, than recorded for this CPU (5 minutes)"
	@echo "make gpu-check-bundle  export the bundles of the next target"
	@echo "make gpu-check  with an NVIDIA GPU, in 7 minutes and without a network: device code, backends, parity, times (PRETEND=1: without a GPU)"
	@echo "make aarch64-test  run the wheel on an emulated aarch64 machine and compare its answer (root on Debian or Ubuntu)"
	@echo "make docs    build the site of the documentation in build/docs"
	@echo "make dist    build the archives of HEAD in dist/, check them and install the wheel (DIST_PYTHONS=3.10 3.12)"
	@echo "make lint    ruff, mypy --strict and the import layers"
	@echo "make clean   remove $(VENV), build/ and caches"

# Tests of one file stay in one process, so that its fixtures are made once; JOBS=0 runs all in this process.
JOBS ?= 2
test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(PYTEST_ARGS)

# Checkpoints and bundles are made in $(VENV), and used by Python 3.10, which has no torch; the one test file that needs it is left out.
OLDEST_PYTHON ?= python3.10
OLDEST_SLOW_TESTS := tests/bridge_stg/demo/chain/test_quantized.py
test-oldest: $(INSTALLED)
	@$(OLDEST_PYTHON) -c 'import ensurepip, sys, venv; sys.exit(sys.version_info[:2] != (3, 10))' 2>/dev/null || { echo "make: $(OLDEST_PYTHON) is not a Python 3.10 with venv. Install it (Ubuntu 22.04: apt install python3.10-venv; elsewhere: pyenv install 3.10) or name it: make test-oldest OLDEST_PYTHON=path" >&2; exit 2; }
	rm -rf build/oldest
	$(OLDEST_PYTHON) -m venv build/oldest/venv
	$(BIN)/python tests/packaging/lower_bounds.py 3.10 > build/oldest/bounds.txt
	build/oldest/venv/bin/python -m pip install --disable-pip-version-check -q -r build/oldest/bounds.txt
	$(BIN)/python -m pytest -qq --setup-only --bundles=build/oldest/bundles -m 'not gpu' tests/runtime $(OLDEST_SLOW_TESTS) > build/oldest/setup.txt || { cat build/oldest/setup.txt; exit 1; }
	build/oldest/venv/bin/python -m pytest --bundles=build/oldest/bundles -m 'not gpu' $(OLDEST_SLOW_TESTS)
	build/oldest/venv/bin/python -m pytest -n $(JOBS) --dist loadfile --bundles=build/oldest/bundles tests/runtime --ignore=tests/runtime/chain/test_tokenizer.py

demo: $(INSTALLED)
	@test -n "$(CLIP)" || { echo "make demo: there is no clip in assets/demo/clips; name one: CLIP=video.mp4 QUERY='...'" >&2; exit 2; }
	@test -n "$(QUERY)" || { echo "make demo: no query; name one: make demo QUERY='the red car'" >&2; exit 2; }
	@mkdir -p $(DEMO)
	$(BIN)/python cli.py export assets/demo/checkpoint --out $(DEMO)/bundle --overwrite
	$(BIN)/python cli.py infer "$(CLIP)" "$(QUERY)" --bundle $(DEMO)/bundle \
	    --json $(DEMO)/result.json --annotate $(DEMO)/annotated.mp4 --sheet $(DEMO)/sheet.png

# Goes on where it was stopped; BENCH_ARGS=--fresh begins anew. A peer that does not install is named in the result.
bench: $(INSTALLED)
	$(BIN)/python benchmarks/bench.py $(if $(filter 1,$(FULL)),--full) $(BENCH_ARGS)

# Status 1: slower; 2: nothing is recorded for this CPU. BENCH_ARGS=--update records.
bench-check: $(INSTALLED)
	$(BIN)/python benchmarks/bench.py --check $(BENCH_ARGS)

# Makes the bundles of the GPU check, which then travel with the checkout to a machine without a network.
GPU_CHECK := build/gpu-check
gpu-check-bundle: $(INSTALLED)
	rm -rf $(GPU_CHECK)/bundles
	$(BIN)/python cli.py export assets/demo/checkpoint --out $(GPU_CHECK)/bundles/fp32
	$(BIN)/python cli.py export assets/demo/checkpoint --out $(GPU_CHECK)/bundles/fp16 --dtype fp16
	$(BIN)/python cli.py export assets/demo/text_checkpoint --out $(GPU_CHECK)/bundles/text
	$(BIN)/python benchmarks/speed/workload/bundles.py $(GPU_CHECK)/bundles/fp32 $(GPU_CHECK)/bundles/int8 w8a8 $(GPU_CHECK)/demo

# Needs a Python with the packages, such as that of an image with torch: PYTHON=python3. WHEELS=dir has what is missing.
gpu-check:
	$(PYTHON) benchmarks/gpu/check.py $(if $(WHEELS),--wheels "$(WHEELS)") $(if $(filter 1,$(PRETEND)),--pretend) $(GPU_CHECK_ARGS)

# Debian in aarch64 under qemu, as root; AARCH64_ARGS="--mirror URL --suite NAME".
aarch64-test: $(INSTALLED)
	$(BIN)/python -m tests.packaging.aarch64 $(AARCH64_ARGS)

docs: $(INSTALLED)
	$(BIN)/python -m sphinx -q -W --keep-going -d build/docs-cache docs build/docs

DIST_PYTHONS ?= 3.10 3.12
dist:
	$(PYTHON) -m venv build/dist-venv
	build/dist-venv/bin/python -m pip install --disable-pip-version-check -q -c constraints.txt setuptools build twine cyclonedx-bom
	build/dist-venv/bin/python tests/packaging/dist.py dist $(DIST_PYTHONS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p bridge_stg
	$(BIN)/lint-imports --no-cache

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build .venv .pytest_cache .ruff_cache .mypy_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is made last: an installation that was interrupted starts again.
$(INSTALLED): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) was not found. Install Python 3.11 with venv (Debian and Ubuntu: apt install python3.11 python3.11-venv) or name another: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: $(PYTHON) is older than 3.11, which training and export need. Name another: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "make: $(PYTHON) has no venv module. Install it (Debian and Ubuntu: apt install python3.11-venv)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
