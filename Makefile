# Everything a person runs. `make help` lists it.
SHELL := /bin/bash
CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/moestack
UV := $(CACHE)/uv/bin/uv
PY := .venv/bin/python
PYTHON ?= python3
FILE ?= manifests/examples/laptop.yaml
STAMP := .venv/.moestack-stamp

.PHONY: help setup up down test test-full check unit faults cluster control-plane engine e2e node versions gpu lock
.PHONY: chart crd rbac golden fmt system browser node-sdks reference
help: ## list the commands
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | sort | expand -t 14

.NOTPARALLEL:
setup: system $(STAMP) ## make .venv from the locks in requirements/, system packages first
$(UV): requirements/uv.txt
	$(PYTHON) -m venv $(CACHE)/uv
	$(CACHE)/uv/bin/python -m pip install -q --require-hashes -r requirements/uv.txt
	touch $@
$(STAMP): requirements/dev.txt pyproject.toml shims/vllm/pyproject.toml | $(UV)
	test -x $(PY) || $(UV) venv -q --python $(PYTHON) .venv
	$(UV) pip sync -q --python $(PY) --require-hashes requirements/dev.txt
	$(UV) pip install -q --python $(PY) --no-deps --no-build-isolation ./shims/vllm -e .
	touch $@

system: ## install the system packages (Debian, as root), or say what to install
	@tools/system-packages

up: setup ## serve the tiny model on this machine: engine, gateway, Prometheus, tuner
	$(PY) -m moe_cli.main up $(FILE) --tiny --chat --detach

down: setup ## stop what `make up` started
	$(PY) -m moe_cli.main down

check: setup ## formatting, lint, types, layers, generated files: quick
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports
	$(PY) -m moe_cli.main crd --check manifests/crd/moestack.dev_moedeployments.yaml
	$(PY) -m moe_operator.rbac --check manifests/operator/rbac.yaml
	$(PY) -m moe_operator.chart --check charts/moestack/files
	$(PY) -m moe_cli.reference --check docs/reference
	$(PY) -m moe_tuner.rbac --check charts/moestack/files

unit: setup ## tests that need no engine and no control plane, on two cores
	.venv/bin/pytest -m "not faults and not cluster and not engine and not gpu and not full" -n 2 --dist worksteal

node-sdks: system ## install the official Node clients that the gateway's tests run; the tests do it too
	@$(PYTHON) tools/node_sdks.py

faults: setup ## the operator's fault suites on the in-memory API server, on two cores
	.venv/bin/pytest -m "faults and not full" -n 2 --dist worksteal

control-plane: ## build the Kubernetes that `make cluster` runs: once, minutes; KUBEBUILDER_ASSETS skips it
	@$(PYTHON) tools/controlplane/build.py

cluster: setup control-plane ## tests on a real Kubernetes control plane and the real KubeRay
	.venv/bin/pytest -m "cluster and not full"

engine: setup ## tests on the real vLLM and Ray Serve, one after another
	.venv/bin/pytest -m "engine and not full"

node: ## build the kubelet, containerd and the rest of the node that `make e2e` runs: once, minutes
	@tools/system-packages node
	@$(PYTHON) tools/node/build.py

e2e: setup control-plane node ## all of it on a real cluster with a node, in namespaces of its own (root): not part of `make test`
	$(PYTHON) tools/node/alone.py .venv/bin/pytest -m e2e tests/e2e

gpu: ## tests on a CUDA device, in an environment with the stock vllm wheel (PY=…): not part of `make test`
	$(PY) -m pytest -m gpu tests/gpu
	$(PY) -m benchmarks.capacity --device cuda

versions: system $(UV) ## the plugin's tests on the other vLLM that it supports, in an environment of its own
	@$(PYTHON) tools/versions.py --uv $(UV)

test: check unit faults cluster engine ## everything that CI runs

browser: ## install chromium, which the console's test drives (Debian, as root), or say what to install
	@tools/system-packages browser

test-full: check control-plane browser ## the long forms as well
	.venv/bin/pytest -m "not gpu and not e2e"

crd: setup ## write the CRD from the types
	$(PY) -m moe_cli.main crd --write manifests/crd/moestack.dev_moedeployments.yaml

chart: setup control-plane ## write what the chart has from the code, and the plain manifest from the chart
	$(PY) -m moe_operator.chart --write charts/moestack/files
	$(PY) -m moe_tuner.rbac --write charts/moestack/files
	$(PY) tools/install.py $$($(PYTHON) tools/controlplane/build.py --where)/bin/helm

reference: setup ## write docs/reference from the types
	$(PY) -m moe_cli.reference --write docs/reference

golden: setup ## write the golden renders of the tests anew, to be read in the diff
	$(PY) -m tests.render.cases

rbac: setup ## write the operator's rights from the table of what it calls
	$(PY) -m moe_operator.rbac --write manifests/operator/rbac.yaml

fmt: setup ## format and sort
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

lock: $(UV) ## resolve the locks again, with hashes and without registry addresses
	cd tools/node-sdks && npm install --package-lock-only  # its .npmrc keeps addresses out
	$(UV) pip compile -q pyproject.toml --extra gateway --extra tuner --extra operator --extra serving-cpu --extra cli \
	  --group dev --generate-hashes --no-header --no-emit-index-url --python-version 3.11 -o requirements/dev.txt
	cp requirements/dev.txt requirements/vllm-0.31.txt  # so that all but vLLM's own needs are the same
	$(UV) pip compile -q requirements/vllm-0.31.in --generate-hashes --no-header --no-emit-index-url \
	  --python-version 3.11 -o requirements/vllm-0.31.txt
	sed '/^ *#/d; /--hash/d; s/ \\$$//' requirements/dev.txt > .venv/pinned.txt  # images hold what the tests ran with
	$(UV) pip compile -q pyproject.toml --extra gateway --extra tuner --extra operator -c .venv/pinned.txt \
	  --generate-hashes --no-header --no-emit-index-url --python-version 3.11 -o requirements/control.txt
	for name in engine build; do $(UV) pip compile -q requirements/$$name.in -c .venv/pinned.txt --generate-hashes \
	  --no-header --no-emit-index-url --python-version 3.11 -o requirements/$$name.txt; done
	$(UV) pip compile -q requirements/uv.in --generate-hashes --no-header --no-emit-index-url -o requirements/uv.txt
