# What people and CI run. Every target works in an environment outside the tree, which `setup` makes.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help

# The first Python that can be used; name another with `make ... PYTHON=/path/to/python3`.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	  "$$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null \
	    && command -v "$$python" && break; \
	done || echo python3)
PYTHON := $(PYTHON)
VENV = $(shell $(PYTHON) scripts/environment.py path)
RUN = PATH="$(VENV)/bin:$$PATH"
# One thread each: the tests start several processes on few cores.
PYTEST = $(RUN) OMP_NUM_THREADS=1 python -m pytest
# In several processes, file by file, fast tests first; what runs a whole node wants the machine for itself.
WORKERS ?= 2
SPREAD = -n $(WORKERS) --dist loadfile --no-loadscope-reorder
ON_A_NODE := real_node or real_images
# Where the machine can run no node there is no test of one, which pytest ends with 5.
OR_NONE = || test $$? = 5

export TORCH_INDEX UNMASK_CACHE UNMASK_CLUSTER

.PHONY: ablations help setup setup-eval demo test test-fast test-training test-serving test-shards test-kills test-faults bench-operator test-full test-torchx-nightly test-cluster charts cluster cluster-programs images prometheus lint format generate verify path lock bench bench-decode bench-gpu bench-serve bench-shards bench-train clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## Make the environment: pinned packages and this checkout (nothing to do if it is there)
	@$(PYTHON) scripts/environment.py setup

setup-eval: setup ## Add the packages of `unmask eval --harness` and `--task` (340 MB)
	@$(PYTHON) scripts/environment.py setup-eval

demo: setup ## Train a small diffusion model and generate with it, end to end, on this machine
	@$(RUN) python examples/quickstart/demo.py

test: setup-eval lint verify images prometheus ## Check and test everything, fast tests first
	@$(PYTEST) $(SPREAD) -m "not ($(ON_A_NODE))"
	@$(PYTEST) -m "$(ON_A_NODE)" $(OR_NONE)
	@$(MAKE) test-torchx-nightly WHICH="$(SAMPLE_OF_SECOND)"

test-fast: setup-eval prometheus ## Run the tests that take less than ten seconds each
	@$(PYTEST) $(SPREAD) -m "not slow"

test-training: setup-eval ## Run the tests that prove the training invariants, on 1, 2 and 4 processes
	@$(PYTEST) -m training

# What launches jobs and talks to clusters: what another TorchX and another Kubernetes client may change.
WHICH ?= $(wildcard tests/unit/test_launch*.py tests/unit/test_operator_*.py tests/unit/test_train_job_*.py \
  tests/integration/test_api_server.py tests/integration/test_cluster_*.py tests/integration/test_torchx_*.py)
SAMPLE_OF_SECOND := tests/unit/test_launch_pods.py tests/integration/test_torchx_scheduler.py

test-torchx-nightly: setup ## Run the tests of launching with torchx-nightly and its Kubernetes client
	@$(PYTHON) scripts/environment.py setup-torchx-nightly
	@PATH="$$($(PYTHON) scripts/environment.py path-torchx-nightly)/bin:$$PATH" OMP_NUM_THREADS=1 \
	  python -m pytest -m "not slow" $(WHICH)

# How much `make test-serving` does.
REQUESTS ?= 200
MESSAGES ?= 1000000
ABORTS ?= 1000
STREAMS ?= 10000

test-serving: setup-eval ## Prove what a server holds: REQUESTS=200, MESSAGES=1000000, ABORTS=1000, STREAMS=10000
	@UNMASK_REQUESTS=$(REQUESTS) UNMASK_MESSAGES=$(MESSAGES) UNMASK_ABORTS=$(ABORTS) UNMASK_STREAMS=$(STREAMS) \
	  $(PYTEST) $(SPREAD) -m serving

test-shards: setup-eval ## Prove that a lost expert shard changes no token: every layer and step, every fault
	@UNMASK_FULL=1 $(PYTEST) -m shards

# How often `make test-kills` kills.
KILLS ?= 300

test-kills: setup ## Kill one of two training ranks KILLS=300 times, and compare with a quiet run; prints JSON
	@cd tests && $(RUN) OMP_NUM_THREADS=1 python -m support.kills --kills "$(KILLS)"

test-faults: setup ## Fail each write of the operator in ten ways; UNMASK_FULL=1: 1,000 runs, 100 pauses of the leader
	@$(RUN) PYTHONPATH=tests python -m support.fault_rig

charts: setup ## Lint and test the Helm charts, and package them into dist/
	@CI=true $(PYTEST) tests/unit/test_repository_charts.py tests/integration/test_charts.py \
	  tests/integration/test_charts_gateway.py
	@$(RUN) python scripts/charts.py

cluster-programs: ## Build a real Kubernetes for the tests that want one (long, once; nothing to do if it is there)
	@PYTHONPATH=scripts $(PYTHON) -m real_cluster.programs node

test-cluster: setup-eval images ## Train on a real Kubernetes node, of this machine: kills, pauses, restarts of the operator
	@$(PYTEST) -m "real_api or real_node or real_images"

images: cluster-programs ## Build the operator's and the worker's image, without a registry, for the tests that run them
	@PYTHONPATH=scripts $(PYTHON) -m real_cluster.images

prometheus: setup ## Fetch Prometheus for the tests of alerts and dashboards (Debian's; nothing to do if it is there)
	@PYTHONPATH=scripts $(PYTHON) -m observability.prometheus

cluster: images setup ## Run a Kubernetes of one node in the foreground until Enter; prints its kubeconfig
	@PYTHONPATH=scripts $(RUN) python -m real_cluster.running node

bench-operator: setup cluster-programs ## Apply 250, 500 and 1,000 jobs at once to a real API server; prints JSON
	@cd tests && PYTHONPATH=../scripts $(RUN) OMP_NUM_THREADS=1 python -m support.operator_scale

test-full: setup-eval images prometheus ## Run every test at its full counts and write docs/reports/test-full.{md,json}
	@UNMASK_FULL=1 $(PYTEST) --report=docs/reports/test-full $(SPREAD) -m "not ($(ON_A_NODE))"
	@UNMASK_FULL=1 $(PYTEST) --report=docs/reports/test-full --report-goes-on -m "$(ON_A_NODE)" $(OR_NONE)

lint: setup ## Check format, style, types and who imports whom
	@$(RUN) ruff format --check --quiet . || { echo "lint: make format mends these" >&2; exit 1; }
	@$(RUN) ruff check --quiet .
	@$(RUN) mypy
	@$(RUN) lint-imports --no-cache > /dev/null || $(RUN) lint-imports --no-cache

format: setup ## Format the code and mend what can be mended
	@$(RUN) ruff format --quiet .
	@$(RUN) ruff check --fix --quiet .

generate: setup ## Write again what is made from the protos, the models and the command line
	@$(RUN) python scripts/generate.py write

verify: setup ## Fail where a generated file differs from what `make generate` would write
	@$(RUN) python scripts/generate.py check

path: ## Print the folder of the environment's commands, for PATH
	@echo "$(VENV)/bin"

lock: setup ## Resolve requirements/*.txt anew from pyproject.toml (needs the network)
	@$(RUN) scripts/lock

bench: setup ## Time block generation on this machine and write benchmarks/generation_*.md
	@$(RUN) python benchmarks/generation.py

ablations: setup ## Train the quickstart without each of its parts, over SEEDS seeds, and report (hours)
	@$(RUN) python benchmarks/ablations.py --seeds $(or $(SEEDS),3) --divide $(or $(DIVIDE),2) \
	  --words $(or $(WORDS),1000) --report docs/reports/ablations

bench-decode: setup ## Time decoding beside the plain and the published way; BENCH="--only p7" for a part (long: a run of the published way takes minutes)
	@$(RUN) OMP_NUM_THREADS=1 python benchmarks/decode.py $(BENCH)

bench-gpu: setup ## Time steps of decoding on a GPU against reading their weights; the last line is one JSON object (minutes)
	@$(RUN) python benchmarks/gpu_decoding.py $(BENCH)

bench-serve: setup ## Time a server's forwards and what its users wait for; BENCH="--only users" for a part (minutes)
	@$(RUN) OMP_NUM_THREADS=1 python benchmarks/serving.py $(BENCH)

bench-shards: setup ## Time expert shards beside bare bytes and the whole model; the last line is one JSON object (minutes)
	@$(RUN) OMP_NUM_THREADS=1 python benchmarks/shards.py $(BENCH)

bench-train: setup ## Time a training step against the public recipe's, for speed and memory (minutes)
	@$(RUN) python benchmarks/training.py $(BENCH)

clean: ## Remove this checkout's environment and the tools' caches
	rm -rf "$(VENV)" .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
