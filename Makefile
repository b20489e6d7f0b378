# SPDX-License-Identifier: Apache-2.0
# `make help` lists the targets. As root nothing calls sudo; for anybody else the targets that need
# the kernel do.

SHELL       := /bin/bash
BUILD       := .build
BIN         := $(BUILD)/bin
KUBE        := v1.36.3
VERSION     := $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
LINT        := v2.15.0
VERPKG      := k8s.io/component-base/version
LDFLAGS     := -s -w -X main.skepVersion=$(VERSION) \
	-X $(VERPKG).gitVersion=$(KUBE)+skep -X $(VERPKG).gitMajor=1 -X $(VERPKG).gitMinor=36 \
	-X $(VERPKG).gitTreeState=clean
export CGO_ENABLED := 0
export GOFLAGS     := -buildvcs=false

# The kernel is real, so tests and `run` are root's. ROOT is empty for root, sudo for others.
ifneq ($(shell id -u),0)
ROOT := $(if $(shell command -v sudo),sudo env PATH="$$PATH" GOFLAGS="$$GOFLAGS" CGO_ENABLED=0 GOCACHE="$$(go env GOCACHE)" GOMODCACHE="$$(go env GOMODCACHE)" CI="$$CI")
ifeq ($(ROOT),)
ROOT := @echo 'This needs root, and there is no sudo here: run the same command as root (su -c "make $(MAKECMDGOALS)").' >&2; exit 1; :
endif
endif

.PHONY: help build root run dist test soak scale conformance bench generate lint fmt clean images

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## Build skep and the containerd shim into .build/bin
	go build -ldflags '$(LDFLAGS)' -o $(BIN)/ ./cmd/...

images: build ## Build the example images from source into .build/images
	./scripts/build-images.sh $(BUILD)/images

root: # before anything is built
	@$(ROOT) true

run: root images ## Start a node on this machine, deploy examples/hello, wait until it answers on port 80
	$(ROOT) ./scripts/run.sh

test: ## Run every test; the kernel is real, so this needs root
	$(ROOT) ./scripts/test.sh

SOAK := 1h
soak: root ## Let one fault after the other happen to a cluster of five nodes for as long as SOAK says (default 1h)
	$(ROOT) go test ./tests/e2e -count=1 -v -timeout 0 -run 'TestFaults$$' -args -soak $(SOAK)

NODES := 1000
scale: root ## Let one server control hollow nodes, ten times as many from line to line up to NODES (default 1000, of 30 pods each)
	$(ROOT) go run ./tests/scale -nodes $(NODES)

FOCUS := \[Conformance\]
SKIP  :=
PROCS := 1
conformance: root ## Run Kubernetes' own conformance suite on two nodes: FOCUS= and SKIP= are regular expressions, PROCS= how many tests at once
	$(ROOT) go run ./tests/conformance -focus '$(FOCUS)' -skip '$(SKIP)' -procs $(PROCS)

bench: ## Measure speed, memory and scale beside peers; prints the table of docs/benchmarks.md
	$(ROOT) ./scripts/bench.sh

dist: ## Build archives for amd64 and arm64 with checksums, the same bytes everywhere, into .build/dist
	./scripts/dist.sh $(BUILD)/dist '$(VERSION)' '$(LDFLAGS)'

generate: ## Compile the BPF programs (clang-19) and regenerate their Go bindings
	./scripts/generate.sh

lint: ## Format check, go vet, golangci-lint, shell and C formatting
	./scripts/lint.sh $(LINT)

fmt: ## Format Go and C
	gofmt -w $$(git ls-files '*.go')
	clang-format-19 -i $$(git ls-files 'bpf/*.c' 'bpf/*.h')

clean: ## Take every trace of skep off this machine, then delete what was built
	$(ROOT) ./scripts/reset.sh
	rm -rf $(BUILD)
