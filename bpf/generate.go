// SPDX-License-Identifier: Apache-2.0

// Package bpf holds the programs that run in the kernel: their C sources, the objects compiled from
// them, and Go functions that load the objects' specifications.
//
// The objects are committed, so that building skep needs no C compiler. `go generate` (make generate)
// makes them anew with clang-19; the result does not depend on the machine, and CI compares it. The C
// files say `go:build ignore`, or a plain `go build` with cgo on would refuse the package.
package bpf

//go:generate go tool bpf2go -cc clang-19 -strip llvm-strip-19 -target bpfel -no-global-types -go-package bpf Socket socket.c -- -O2 -mcpu=v3 -Wall -Werror
//go:generate go tool bpf2go -cc clang-19 -strip llvm-strip-19 -target bpfel -no-global-types -go-package bpf Pod pod.c -- -O2 -mcpu=v3 -Wall -Werror
//go:generate go tool bpf2go -cc clang-19 -strip llvm-strip-19 -target bpfel -no-global-types -go-package bpf Host host.c -- -O2 -mcpu=v3 -Wall -Werror
//go:generate go tool bpf2go -cc clang-19 -strip llvm-strip-19 -target bpfel -no-global-types -go-package bpf Xdp xdp.c -- -O2 -mcpu=v3 -Wall -Werror
//go:generate go tool bpf2go -cc clang-19 -strip llvm-strip-19 -target bpfel -no-global-types -go-package bpf Ingress ingress.c -- -O2 -mcpu=v3 -Wall -Werror
//go:generate go tool bpf2go -cc clang-19 -strip llvm-strip-19 -target bpfel -no-global-types -go-package bpf Orphans orphans.c -- -O2 -mcpu=v3 -Wall -Werror
