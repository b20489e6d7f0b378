// SPDX-License-Identifier: Apache-2.0

package scheduler

import (
	"fmt"
	"slices"
	"strings"
)

const (
	reasonNoNodes          = "no nodes available to schedule pods"
	reasonAffinityConflict = "pod affinity terms conflict"
	reasonNotNamed         = "node(s) didn't satisfy plugin(s) [NodeAffinity]"

	reasonPreemptionUseless = "Preemption is not helpful for scheduling"
	reasonNoVictims         = "No preemption victims found for incoming pod"
	reasonNeverPreempts     = "not eligible due to preemptionPolicy=Never."
	reasonVictimsTerminate  = "not eligible due to a terminating pod on the nominated node."

	// notePrefix stands before preemption's own words: Kubernetes 1.36 asks whether a resource
	// claim could be given back before it asks for preemption, and says so.
	notePrefix = "no new claims to deallocate, preemption: "
)

// diagnosis says why a pod fits nowhere.
type diagnosis struct {
	nodes   int            // how many there are
	reasons map[string]int // how many nodes gave each reason; one node may give several
	whole   string         // in place of reasons: what is wrong whatever the node
	note    string         // what came of preemption; empty when it makes room

	blockers   blockers
	resolvable []*node // those that would fit if other pods went away
}

// message is in exactly upstream's words (Kubernetes 1.36, pkg/scheduler/framework, FitError):
// people and tools read it.
func (d *diagnosis) message() string {
	if d.nodes == 0 {
		return reasonNoNodes
	}
	var b strings.Builder
	b.WriteString(available(d.nodes, d.whole, d.reasons))
	if d.note != "" {
		b.WriteString(" " + notePrefix + d.note)
	}
	return b.String()
}

func available(nodes int, whole string, reasons map[string]int) string {
	text := fmt.Sprintf("0/%d nodes are available:", nodes)
	if whole != "" {
		return text + " " + whole + "."
	}
	if len(reasons) == 0 {
		return text
	}
	counted := make([]string, 0, len(reasons))
	for reason, count := range reasons {
		counted = append(counted, fmt.Sprintf("%d %s", count, reason))
	}
	slices.Sort(counted) // as text, so "10 ..." comes before "2 ...": upstream's order
	return text + " " + strings.Join(counted, ", ") + "."
}
