// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
)

// dataplaneSection runs the benchmarks of package dataplane, which need no cluster: their machines are namespaces, their
// services objects in memory. What they report becomes rows.
func dataplaneSection(ctx context.Context, b *bench) error {
	rounds := fmt.Sprintf("-benchtime=%dx", b.samples(9))
	cmd := exec.CommandContext(ctx, "go", "test", "./dataplane", "-run=^$", "-bench=^Benchmark(NodePort|PolicyRules|ManyServices|Programs)$", rounds, "-timeout=15m")
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("%v: %w: %s", cmd.Args, err, out)
	}
	figures, err := readBenchmarks(out)
	if err != nil {
		return err
	}
	for _, r := range dataplaneRows(figures) {
		b.add(r.what, r.skep, r.beside, r.ratio, r.goal)
	}
	return nil
}

// figures are values by what they are, as `go test -bench` prints them: "12 packets/s".
type figures map[string]float64

// readBenchmarks reads all figures of all benchmarks.
func readBenchmarks(output []byte) (figures, error) {
	all := figures{}
	for s := bufio.NewScanner(bytes.NewReader(output)); s.Scan(); {
		fields := strings.Fields(s.Text())
		if len(fields) < 4 || !strings.HasPrefix(fields[0], "Benchmark") {
			continue
		}
		for i := 2; i+1 < len(fields); i += 2 {
			value, err := strconv.ParseFloat(fields[i], 64)
			if err != nil {
				return nil, fmt.Errorf("%s reports %q: %w", fields[0], fields[i], err)
			}
			all[fields[i+1]] = value
		}
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("no benchmark reported anything: %s", output)
	}
	return all, nil
}

// dataplaneRows arranges what was measured. It is pure.
func dataplaneRows(f figures) (rows []row) {
	compare := func(what, ours string, besides []string, goal string) {
		for _, beside := range besides {
			if other, ok := f[beside+"-packets/s"]; ok && other > 0 {
				rows = append(rows, row{what, fmt.Sprintf("%.0f", f[ours+"-packets/s"]), fmt.Sprintf("%s %.0f", beside, other), fmt.Sprintf("%.2f", f[ours+"-packets/s"]/other), goal})
				goal = ""
			}
		}
	}
	compare("NodePort from outside, datagrams a second on one core (with their sender), at XDP", "xdp", []string{"iptables", "nftables", "routed"}, "5")
	compare("the same, at tc", "tc", []string{"iptables", "nftables", "routed"}, "")
	for _, size := range []string{"1", "1000", "10000", "50000"} {
		for _, side := range []string{"direct", "clusterip", "routed", "nftables", "iptables"} {
			rate, ok := f[size+"-"+side+"/s"]
			if !ok {
				continue
			}
			goal := map[string]string{"direct": "0.97", "clusterip": "0.97"}[side]
			rows = append(rows, row{
				fmt.Sprintf("new connections a second, one at a time, %s services present: %s", size, side), fmt.Sprintf("%.0f", rate),
				fmt.Sprintf("clean pair %.0f", f[size+"-clean/s"]), fmt.Sprintf("%.2f", f[size+"-"+side+":clean"]), goal,
			})
		}
	}
	for _, what := range []string{"connections", "requests"} {
		for _, rules := range []string{"100", "1000", "10000"} {
			rows = append(rows, row{
				fmt.Sprintf("NetworkPolicy, %s rules: %s a second", rules, what), fmt.Sprintf("%.0f", f[what+"-"+rules+"-rules/s"]),
				fmt.Sprintf("no rules %.0f", f[what+"-0-rules/s"]), fmt.Sprintf("%.2f", f[what+"-"+rules+"-rules:0-rules"]), "flat",
			})
		}
	}
	rows = append(rows,
		row{"50,000 services from objects into empty maps", fmt.Sprintf("%.2f s", f["s-to-program-50000"]), "", "", "0.7 s"},
		row{"the same, from the start of the informers until the agent has synced", fmt.Sprintf("%.2f s", f["s-to-sync-50000"]), "", "", ""},
		row{"memory of one of 50,000 services: kernel", fmt.Sprintf("%.0f bytes", f["kernel-bytes/service"]), "", "", ""},
		row{"the same: process, with its copies of Service and EndpointSlice", fmt.Sprintf("%.0f bytes", f["process-bytes/service"]), "", "", ""},
		row{"kernel memory of all maps with one service", mebibytes(int64(f["kernel-bytes-at-1"])), "", "", ""},
	)
	var programs []string
	for name := range f {
		if program, ok := strings.CutSuffix(name, "-ns"); ok {
			programs = append(programs, program)
		}
	}
	slices.Sort(programs)
	for _, program := range programs {
		rows = append(rows, row{"one run of " + program, fmt.Sprintf("%.0f ns", f[program+"-ns"]), "", "", ""})
	}
	return rows
}
