#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# `make lint`: formatting, vet and the linters of .golangci.yml.
# usage: lint.sh GOLANGCI_LINT_VERSION
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/host.sh
version=$1

unformatted=$(gofmt -l $(git ls-files '*.go'))
if [ -n "$unformatted" ]; then
  printf 'not formatted (run `make fmt`):\n%s\n' "$unformatted" >&2
  exit 1
fi

install_missing clang-format-19 clang-format-19
git ls-files 'bpf/*.c' 'bpf/*.h' | xargs -r clang-format-19 --dry-run -Werror

for script in $(git ls-files '*.sh' .ci/run); do
  bash -n "$script"
done

go vet ./...

linter=.build/bin/golangci-lint
if ! "$linter" version 2>/dev/null | grep -q "${version#v}"; then
  GOFLAGS= GOBIN="$PWD/.build/bin" go install "github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$version"
fi
"$linter" run ./...
