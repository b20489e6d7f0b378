// SPDX-License-Identifier: Apache-2.0

package inspect

import (
	"fmt"
	"slices"
)

// Health is how full a node's maps are, and what could not be put into them.
type Health struct {
	Maps     []Fill   `json:"maps"`
	Problems []string `json:"problems,omitempty"` // of Services and policies; each names one, and the remedy
	More     int      `json:"more,omitempty"`     // problems that are not listed
}

// Fill is how full a map is.
type Fill struct {
	Map     string `json:"map"`
	Used    uint64 `json:"used"`
	Fits    uint64 `json:"fits"`
	Evicted uint64 `json:"evicted,omitempty"` // connections that others drove out, at least, since the map was made
	Failed  uint64 `json:"failed,omitempty"`  // that could not be noted
}

// listedProblems bounds an answer.
const listedProblems = 20

// NewHealth keeps the first problems in order of their text.
func NewHealth(maps []Fill, problems []string) Health {
	h := Health{Maps: maps, Problems: slices.Sorted(slices.Values(problems))}
	if more := len(h.Problems) - listedProblems; more > 0 {
		h.Problems, h.More = h.Problems[:listedProblems], more
	}
	return h
}

// connections are the maps of flows, and what their entries are called.
var connections = map[string]string{"conntrack_tcp": "TCP", "conntrack_udp": "UDP"}

// Connections says in one line how many flows are tracked, and what became of those that were not.
func (h Health) Connections() string {
	var used, lost string
	for _, f := range h.Maps {
		name, ok := connections[f.Map]
		if !ok {
			continue
		}
		if used != "" {
			used, lost = used+", ", lost+", "
		}
		used += fmt.Sprintf("%d of %d %s", f.Used, f.Fits, name)
		lost += fmt.Sprintf("%d %s driven out, %d not noted", f.Evicted, name, f.Failed)
	}
	return fmt.Sprintf("entries in use: %s; for want of room: %s", used, lost)
}

// nearlyFull is the share from which a map is a trouble.
const nearlyFull = 0.9

// Troubles are what an operator should know, and do.
func (h Health) Troubles() []string {
	var out []string
	for _, f := range h.Maps {
		name, tracked := connections[f.Map]
		remedy := "what comes beyond is refused, and what is there works on"
		if tracked {
			remedy = "the connection that was used longest ago goes when another comes; a larger --conntrack-max helps"
		}
		if f.Fits > 0 && float64(f.Used) >= nearlyFull*float64(f.Fits) {
			out = append(out, fmt.Sprintf("map %s holds %d of %d entries: %s", f.Map, f.Used, f.Fits, remedy))
		}
		if f.Evicted > 0 {
			out = append(out, fmt.Sprintf("%d %s connections were driven out of map %s since it was made: %s", f.Evicted, name, f.Map, remedy))
		}
		if f.Failed > 0 {
			out = append(out, fmt.Sprintf("%d %s connections could not be noted in map %s since it was made: %s", f.Failed, name, f.Map, remedy))
		}
	}
	out = append(out, h.Problems...)
	if h.More > 0 {
		out = append(out, fmt.Sprintf("and %d more like these: the agent's log names them", h.More))
	}
	return out
}
