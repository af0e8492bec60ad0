# Two commands do all the set-up on a fresh Debian machine with Rust:
#   make dev    runs everything in one process and prints a key and a curl line that works
#   make test   installs what the tests need and passes every one of them
# And one installs it for use:
#   make install   builds the program and puts it into Cargo's directory of programs

SHELL := /bin/bash
DATA ?= ./data
# What `make install` builds: `release`, or `dev`, which builds faster and runs slower.
PROFILE ?= release
.DEFAULT_GOAL := help

# What the build needs beyond Rust: cmake and a C compiler (zlib-ng and zstd, through Pingora; SQLite).
BUILD_PACKAGES := cmake gcc libc6-dev
# What the whole test suite talks to. Tests whose part is missing fail; they are never skipped.
TEST_PACKAGES := $(BUILD_PACKAGES) curl python3 python3-venv nginx-light haproxy nodejs chromium chromium-driver postgresql prometheus redis-server slowhttptest systemd valgrind

.PHONY: help dev install test lint deb package-files install-build install-test clean

help:
	@sed -n 's/^#   //p' Makefile

dev: install-build
	cargo run --quiet -- dev --data $(DATA)

install: install-build
	cargo install --quiet --locked --path . --profile $(PROFILE)

test: install-test
	cargo nextest run $(if $(CI),--profile ci)
	cargo test --doc --quiet

lint:
	cargo fmt --all --check
	cargo clippy --all-targets -- -D warnings

# A Debian package in target/debian, of the release build. Needs cargo-deb (`cargo install cargo-deb`).
deb: install-build
	cargo build --release --locked
	$(MAKE) package-files PROGRAM=target/release/tollgate
	cargo deb --no-build

PROGRAM ?= target/release/tollgate
package-files:
	mkdir -p target/package/man
	$(PROGRAM) man --dir target/package/man
	$(PROGRAM) completions bash > target/package/tollgate.bash
	$(PROGRAM) completions zsh > target/package/_tollgate
	$(PROGRAM) completions fish > target/package/tollgate.fish

install-build:
	@bash .ci/install $(BUILD_PACKAGES)

install-test:
	@bash .ci/install $(TEST_PACKAGES)
	@bash .ci/install-tools

clean:
	cargo clean
