// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/xml"
	"fmt"
	"io"
	"maps"
	"regexp"
	"slices"
	"text/tabwriter"
)

// junit is what is read of a report of Ginkgo's.
type junit struct {
	Cases []struct {
		Name   string `xml:"name,attr"`
		Status string `xml:"status,attr"`
	} `xml:"testsuite>testcase"`
}

// count is how the tests of one special interest group went.
type count struct {
	passed, skipped int
	failed          []string
}

var sig = regexp.MustCompile(`\[sig-([a-z-]+)\]`)

// read counts a report's tests by group. What the suite was told not to run is not in the counts, and neither is what
// is no test.
func read(r io.Reader) (map[string]*count, error) {
	var report junit
	if err := xml.NewDecoder(r).Decode(&report); err != nil {
		return nil, fmt.Errorf("read the report: %w", err)
	}
	groups := map[string]*count{}
	for _, c := range report.Cases {
		m := sig.FindStringSubmatch(c.Name)
		if m == nil {
			continue
		}
		g := groups[m[1]]
		if g == nil {
			g = &count{}
			groups[m[1]] = g
		}
		switch c.Status {
		case "passed":
			g.passed++
		case "skipped", "pending":
			g.skipped++
		default:
			g.failed = append(g.failed, c.Name)
		}
	}
	return groups, nil
}

// summarize prints the table and the names of what failed, and returns how many did.
func summarize(out io.Writer, groups map[string]*count) int {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "sig\tpassed\tfailed")
	passed, failed := 0, 0
	for _, name := range slices.Sorted(maps.Keys(groups)) {
		g := groups[name]
		if g.passed+len(g.failed) == 0 {
			continue
		}
		passed, failed = passed+g.passed, failed+len(g.failed)
		fmt.Fprintf(w, "%s\t%d\t%d\n", name, g.passed, len(g.failed))
	}
	fmt.Fprintf(w, "all\t%d\t%d\n", passed, failed)
	_ = w.Flush() // to a terminal or a buffer
	for _, name := range slices.Sorted(maps.Keys(groups)) {
		for _, test := range slices.Sorted(slices.Values(groups[name].failed)) {
			fmt.Fprintln(out, "failed:", test)
		}
	}
	return failed
}
