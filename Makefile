# make install | demo | test | test-all | check | docs | bench | gpu | gpu-wheels | clean
#
# All targets except `gpu` use .venv, which `install` creates; you need not activate it.
# Another interpreter: make PYTHON=python3.12 install

PYTHON ?= python3
INSTALLED := .venv/.installed
# The programs of .venv come first on PATH, because deepspeed looks for ninja there.
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: install demo test test-all check docs bench gpu gpu-wheels clean
.DELETE_ON_ERROR:

install: $(INSTALLED)

# Runs again only if the requirements have changed.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: Python 3.11 or newer is needed, but $(PYTHON) is: $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Name another with: make PYTHON=python3.12 install" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: $(PYTHON) cannot make virtual environments. On Debian and Ubuntu: apt install python3-venv" >&2; \
	  exit 1; }
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	python -m pip install -c constraints.txt -e '.[dev,docs,accelerate,deepspeed]'
	@rm -rf dist_llm.egg-info  # left by the build; in this directory Python would read its metadata first
	@touch $@

# A second `make demo` resumes from the newest checkpoint, so a complete run does not train further.
# To start again: make clean, or rm -r runs/demo.
demo: install
	test -f data/stdlib/manifest.json || \
	  dist-llm prepare --source python-stdlib --tokenizer bpe:4096 --heldout-fraction 0.05 --out data/stdlib
	OMP_NUM_THREADS=$$(($$(nproc) / 2 + ($$(nproc) < 2))) \
	  torchrun --nproc-per-node 2 -m dist_llm train --config configs/demo.yaml
	dist-llm evaluate --checkpoint runs/demo
	dist-llm generate --checkpoint runs/demo --prompt "    def __init__(self, " --max-tokens 200 \
	  --temperature 0.7 --top-p 0.9 --seed 1
	@echo; echo "The curves: .venv/bin/tensorboard --logdir runs/demo/tensorboard"

# Two workers; one for tests that measure time.
SERIAL := tests/chaos tests/slurm tests/netns

test: install
	python -m pytest --numprocesses 2 --dist loadfile $(SERIAL:%=--ignore %)
	python -m pytest $(SERIAL)

# Also the tests that take hours; run before a release.
test-all: install
	python -m pytest -m 'not gpu'

check: install
	ruff format --check .
	ruff check .
	mypy
	python tools/lint_names.py

# The documentation site: build/site/index.html. A broken link or a missing page is an error.
docs: install
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict

# Over a quarter of an hour on two cores. With --write, the programs store their rows in benchmarks/results.
bench: install
	for program in overhead train loss attention window optimizer data checkpoint communication collectives layouts startup; do python benchmarks/$$program.py || exit 1; done

# At most eight minutes on a GPU (docs/gpu.md). Installs nothing and needs no network.
# DEVICE=cpu runs the same rows on the CPU at tiny sizes.
DEVICE ?= cuda
RESULTS ?= $(if $(filter cuda,$(DEVICE)),benchmarks/results,runs/gpu)
GPU_PYTHON ?= $(if $(wildcard .venv/bin/python),.venv/bin/python,$(PYTHON))
COMMIT ?=

gpu:
	$(GPU_PYTHON) benchmarks/gpu_start.py --device $(DEVICE) --write $(RESULTS) --commit=$(COMMIT)

# Download wheels for `make gpu` on a machine that has torch and transformers but no network: about 5 MB.
WHEELS_PYTHON ?= 3.12

gpu-wheels:
	$(PYTHON) -m pip download --dest wheels --only-binary=:all: --python-version $(WHEELS_PYTHON) \
	  --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
	  --platform manylinux2014_x86_64 -c constraints.txt pydantic blake3 pytest pytest-timeout

# Remove what the targets above created, but none of your runs and corpora.
clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis data/stdlib runs/demo \
	  wheels runs/gpu
	find dist_llm tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
