# Bulkhead. `make demo` and `make test` do all set-up themselves, on a bare Debian 12 as root.
SHELL := /bin/bash
PYTHON := /usr/bin/python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PACKAGES := python3 python3-venv crun runc containernetworking-plugins iptables nftables iproute2 \
	util-linux procps kmod attr libcap2-bin docker-registry skopeo umoci busybox-static apache2-utils \
	openssl gpg gpgv gpg-agent strace gcc libc6-dev
VM_PACKAGES := user-mode-linux mmdebstrap e2fsprogs systemd-container
PACKAGING_PACKAGES := debhelper dpkg-dev fakeroot binutils lintian rpm rpmlint mandoc zsh fish bash-completion
BENCH_PACKAGES := conmon containerd podman
PROMTOOL := .cache/promtool

# $(call install,PACKAGES) installs those that are missing.
define install
	@missing=$$(for p in $(1); do dpkg-query -W -f='$${Status}\n' $$p 2>/dev/null | grep -q 'ok installed' || echo $$p; done); \
	if [ -n "$$missing" ]; then \
		echo "installing:" $$missing; \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null; \
	fi
endef

.DEFAULT_GOAL := help
.PHONY: help system system-vm system-packaging wheels deb rpm setup vm-image demo test bench test-unit test-root test-crash test-vm test-packaging test-fuzz test-soak lint proto lock clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /  make \1\t/' | expand -t 20

system: ## Install the Debian packages that a node and the tests need
	$(call install,$(PACKAGES))

system-vm: ## Install what virtual machines take
	$(call install,$(VM_PACKAGES))

system-packaging: ## Install what building and checking packages takes
	$(call install,$(PACKAGING_PACKAGES))

wheels: setup ## Fetch the wheels that packages carry, if they are not there
	@packaging/build wheels

deb: setup system-packaging ## Build the Debian package (into build/packages)
	@packaging/build deb $(BUILD)
	@ls -l build/packages/*.deb

rpm: setup system-packaging ## Build the RPM package (into build/packages)
	@packaging/build rpm $(BUILD)
	@ls -l build/packages/*.rpm

$(STAMP): requirements-dev.lock pyproject.toml | system
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -q --disable-pip-version-check --require-hashes -r requirements-dev.lock
	@$(BIN)/pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

setup: system $(STAMP) ## Packages, virtual environment, Bulkhead in it

demo: setup ## Start Bulkhead, pull an image, run a pod, show its log, status and workers, clean up
	@$(BIN)/python -m tests.support.demo

vm-image: setup system-vm ## Build the root file system of the virtual machines, if it is not there (half a minute)
	@$(BIN)/python -m tests.support.vm_image

# Of the whole package one program is wanted, and no server that starts when it is installed.
$(PROMTOOL): | setup
	@mkdir -p $(@D) && work=$$(mktemp -d) && trap "rm -rf $$work" EXIT && cd $$work && \
		{ apt-get download -qq -o APT::Sandbox::User=root prometheus || { apt-get update -qq && \
		apt-get download -qq -o APT::Sandbox::User=root prometheus; }; } && \
		dpkg-deb --fsys-tarfile prometheus_*.deb | tar -x ./usr/bin/promtool && mv usr/bin/promtool $(CURDIR)/$@

test: setup vm-image system-packaging wheels $(PROMTOOL) ## All tests, linters among them
	@$(BIN)/python -m pytest

test-unit: setup system-packaging ## Tests that need neither root nor a runtime
	@$(BIN)/python -m pytest tests/unit tests/ipc

test-root: setup ## Tests of single workers with the real parts
	@$(BIN)/python -m pytest tests/root tests/process

test-crash: setup ## Every process struck in every phase of every operation, a thousand times and more (half an hour)
	@$(BIN)/python -m tests.crash.matrix --write
	@BULKHEAD_CRASH=long $(BIN)/python -m pytest tests/crash -k "not nothing_that_runs_notices"

test-vm: setup vm-image system-packaging wheels ## Everything about cgroup v2 and systemd, in a virtual machine
	@$(BIN)/python -m pytest tests/vm/long_vm.py

test-packaging: setup vm-image system-packaging wheels ## Packages, built and taken through their life
	@$(BIN)/python -m pytest tests/packaging

test-fuzz: setup ## Long fuzzing of what parses input from outside
	@HYPOTHESIS_PROFILE=fuzz $(BIN)/python -m pytest tests/fuzz

test-soak: setup ## A day in an hour: 2,000 pods, and whether anything grows; draws docs/soak.png
	@$(BIN)/python -m tests.soak

bench: setup ## Figures, against the bare runtime and against Debian's peers
	$(call install,$(BENCH_PACKAGES))
	@$(BIN)/python -m tests.bench

lint: setup ## ruff and mypy alone
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

proto: setup ## Generate the modules of the protos in ipc/cri and ipc/nri anew
	@$(BIN)/python -m ipc.cri.generate && $(BIN)/python -m ipc.nri.generate

clean: ## Remove the environment and caches
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
