# Two commands do all the set-up on a fresh Debian machine with Rust:
#   make dev    runs everything in one process and prints a key and a curl line that works
#   make test   installs what the tests need and passes every one of them

SHELL := /bin/bash
DATA ?= ./data
.DEFAULT_GOAL := help

# What the build needs beyond Rust: cmake and a C compiler (zlib-ng and zstd, through Pingora; SQLite).
BUILD_PACKAGES := cmake gcc libc6-dev
# What the whole test suite talks to. Tests whose part is missing fail; they are never skipped.
TEST_PACKAGES := $(BUILD_PACKAGES) curl python3 python3-venv nginx-light haproxy nodejs chromium chromium-driver postgresql redis-server slowhttptest

.PHONY: help dev test lint install-build install-test clean

help:
	@sed -n 's/^#   //p' Makefile

dev: install-build
	cargo run --quiet -- dev --data $(DATA)

test: install-test
	cargo nextest run $(if $(CI),--profile ci)
	cargo test --doc --quiet

lint:
	cargo fmt --all --check
	cargo clippy --all-targets -- -D warnings

install-build:
	@bash .ci/install $(BUILD_PACKAGES)

install-test:
	@bash .ci/install $(TEST_PACKAGES)
	@bash .ci/install-tools

clean:
	cargo clean
