# SPDX-License-Identifier: Apache-2.0
#
# Each target first installs what it needs (Debian 12, root); that takes no time when all is there.

CARGO ?= cargo
TOOLS := .tools/bin
PROTO_BASELINE := proto/baseline.binpb

.PHONY: help demo test lint fmt bench soak proto-baseline

help: ## lists the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 18

demo: ## shows a real server broken, rescued, repaired and unrescued
	tools/setup
	$(CARGO) build --quiet --locked -p salvor-agent -p salvor -p salvor-tests --bins
	$(CARGO) run --quiet --locked -p salvor-tests --bin salvor-demo

test: ## runs all tests, those with real libvirt and real guests included
	tools/setup
	$(CARGO) test --locked --workspace

lint: ## checks format, lints, dependencies, the API, the systemd unit and the documents
	tools/setup lint
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --workspace --all-targets --all-features -- -D warnings
	$(TOOLS)/cargo-deny --locked --log-level error check bans licenses sources
	$(TOOLS)/buf format --diff --exit-code proto/proto
	$(TOOLS)/buf lint
	$(TOOLS)/buf breaking proto/proto --against $(PROTO_BASELINE)
	tools/check-unit deploy/systemd/salvord.service
	tools/check-docs

fmt: ## formats the Rust code and the protocol buffers
	tools/setup lint
	$(CARGO) fmt --all
	$(TOOLS)/buf format --write proto/proto

bench: ## measures the agent against raw libvirt calls
	tools/setup
	$(CARGO) build --locked --release -p salvor-agent -p salvor-tests --bins
	$(CARGO) run --locked --release -p salvor-tests --bin salvor-bench

MINUTES ?= 30
soak: ## runs random verbs while the agent and libvirtd are killed at random (MINUTES=30, SEED=)
	tools/setup
	$(CARGO) build --locked -p salvor-tests --bins
	$(CARGO) run --locked -p salvor-tests --bin salvor-soak -- --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

proto-baseline: ## makes the API as it is now what later changes must be compatible with (at a release)
	tools/setup lint
	$(TOOLS)/buf build proto/proto --exclude-source-info -o $(PROTO_BASELINE)
