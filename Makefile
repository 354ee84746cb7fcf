# `make` lists the targets. Each one sets up what it needs: Python 3.11 or newer, pip and make suffice.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
RESULTS := metabloom-results/demo
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo test e2e check docs scoreboard build clean FORCE

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# --- set-up -------------------------------------------------------------------------------------
# The stamp is written last and holds the folder it was made in. Without it (an interrupted install),
# with a venv whose Python is gone or that was moved, everything is made anew.
SOUND := $(shell $(BIN)/python -c "" 2>/dev/null && test "$$(cat $(READY) 2>/dev/null)" = "$(CURDIR)" && echo yes)

$(READY): pyproject.toml constraints.txt $(if $(SOUND),,FORCE)
	@$(PYTHON) -c "" 2>/dev/null || { \
	  echo "metabloom needs Python 3.11 or newer, and '$(PYTHON)' does not run." \
	    "Install it, or name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || { \
	  echo "metabloom needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) -V 2>&1)." \
	    "Name a newer one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "Installing into $(VENV) (torch, Flower and Ray: some minutes the first time)"
	@rm -f $@
	$(if $(SOUND),,@$(PYTHON) -m venv --clear $(VENV))
	@$(PIP) -c constraints.txt -e '.[dev]'
	@printf '%s' "$(CURDIR)" > $@

# --- targets ------------------------------------------------------------------------------------
demo: $(READY) ## install, train on real data that needs no network, say where the results are
	@$(BIN)/metabloom simulate --out $(RESULTS)
	@echo "Results: $(CURDIR)/$(RESULTS)"

test: $(READY) ## install, run every test but the long ones
	@$(BIN)/python -m pytest -m "not e2e"

e2e: $(READY) ## long proofs that start real Flower processes
	@$(BIN)/python -m pytest -m e2e

check: $(READY) ## lint, format and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/python tests/house/types_tree.py
	@$(BIN)/mypy

docs: $(READY) ## write RunConfig's keys into pyproject.toml and docs/configuration.md
	@METABLOOM_REWRITE=1 $(BIN)/python -m pytest -q tests/house/test_configuration_keys.py

scoreboard: $(READY) ## run the benchmarks (hours) on the data sets of METABLOOM_DATA, else ./data
	@$(BIN)/python benchmarks/omniglot.py --model mlp
	@$(BIN)/python benchmarks/omniglot.py --model conv4
	@$(BIN)/python benchmarks/privacy.py
	@$(BIN)/python benchmarks/privacy_cost.py
	@$(BIN)/python benchmarks/dp_step.py
	@$(BIN)/python benchmarks/engine.py
	@$(BIN)/python benchmarks/distillation.py
	@$(BIN)/python benchmarks/generator.py
	@$(BIN)/python benchmarks/pretrained.py

build: $(READY) ## wheel, source archive and Flower app bundle in dist/
	@rm -rf dist && $(BIN)/python -m build --no-isolation --outdir dist . >/dev/null
	@cd dist && FLWR_TELEMETRY_ENABLED=0 ../$(BIN)/flwr build --app ..
	@ls dist

clean: ## remove what these targets made, the venv too; results stay
	@rm -rf $(VENV) .types dist build .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
