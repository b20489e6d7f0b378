// SPDX-License-Identifier: Apache-2.0

// Command client is package tools as a program, for images.
//
//	client http|dial|serve|echo|load|connect|first|health|csi ARG...
package main

import (
	"fmt"
	"os"

	"skep.io/skep/tests/tools"
)

func main() {
	if len(os.Args) < 2 || tools.Tools[os.Args[1]] == nil {
		fmt.Fprintln(os.Stderr, "usage: client http|dial|serve|echo|load|connect|first|health|csi ARG...")
		os.Exit(2)
	}
	if err := tools.Tools[os.Args[1]](os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
