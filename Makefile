# make install | demo | test | check | bench | clean
#
# Everything happens in .venv, which `install` makes; no other target needs it to be activated.
# Another interpreter: make PYTHON=python3.12 install

PYTHON ?= python3
INSTALLED := .venv/.installed
# The environment's programs come first on PATH: some packages look for theirs there (deepspeed for ninja).
RUN := PATH="$(CURDIR)/.venv/bin:$$PATH"

DEMO_DATA := data/stdlib
DEMO_RUN := runs/demo

.PHONY: install demo test check bench clean
.DELETE_ON_ERROR:

install: $(INSTALLED)

# Again only when what is to be installed has changed.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: Python 3.11 or newer is needed, but '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Name another with: make PYTHON=python3.12 install" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: '$(PYTHON)' cannot make virtual environments. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -c constraints.txt -e '.[dev,accelerate,deepspeed]'
	@touch $@

# A second `make demo` goes on from the newest checkpoint, so a finished one trains no further;
# for a fresh one: make clean, or rm -r runs/demo.
demo: install
	test -f $(DEMO_DATA)/manifest.json || $(RUN) dist-llm prepare \
	  --source python-stdlib --tokenizer bpe:4096 --heldout-fraction 0.05 --out $(DEMO_DATA)
	OMP_NUM_THREADS=$$((($$(nproc) + 1) / 2)) $(RUN) torchrun --nproc-per-node 2 \
	  -m dist_llm train --config configs/demo.yaml data.path=$(DEMO_DATA) run.dir=$(DEMO_RUN)
	$(RUN) dist-llm evaluate --checkpoint $(DEMO_RUN)
	@echo; echo "a sample, prompted with \"def \":"; echo
	$(RUN) dist-llm generate --checkpoint $(DEMO_RUN) --prompt "def " \
	  --max-tokens 200 --temperature 0.8 --top-p 0.95 --seed 1
	@echo; echo "The curves: .venv/bin/tensorboard --logdir $(DEMO_RUN)/tensorboard"

test: install
	$(RUN) python -m pytest

check: install
	$(RUN) ruff format --check .
	$(RUN) ruff check .
	$(RUN) mypy

bench: install
	$(RUN) python benchmarks/overhead.py

# Removes what the targets above made, and no run or corpus of yours.
clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis $(DEMO_DATA) $(DEMO_RUN)
	find dist_llm tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
