// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"maps"
	"slices"
	"sync"
)

// failures are the requests of hollow nodes that were not answered as asked.
type failures struct {
	mu sync.Mutex
	of map[string]*failure // by what was being done, of which there are a handful
}

type failure struct {
	count int
	first error
}

// add counts err, unless it is nil.
func (f *failures) add(doing string, err error) {
	if err == nil {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.of == nil {
		f.of = map[string]*failure{}
	}
	if f.of[doing] == nil {
		f.of[doing] = &failure{first: err}
	}
	f.of[doing].count++
}

// all are their number, and what they were.
func (f *failures) all() (n int, says []string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, doing := range slices.Sorted(maps.Keys(f.of)) {
		n += f.of[doing].count
		says = append(says, fmt.Sprintf("%s: %d times, the first: %v", doing, f.of[doing].count, f.of[doing].first))
	}
	return n, says
}
