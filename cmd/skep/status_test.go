// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/cli-runtime/pkg/genericiooptions"

	"skep.io/skep/dataplane/inspect"
)

// restarting serves what an API on a second start does: the stored node is Ready at once, the API
// itself after some questions.
func restarting(t *testing.T, questions int64) (cmd *cobra.Command, asked *atomic.Int64) {
	t.Helper()
	asked = new(atomic.Int64)
	mux := http.NewServeMux()
	mux.HandleFunc("/readyz", func(w http.ResponseWriter, _ *http.Request) {
		if asked.Add(1) <= questions {
			w.WriteHeader(http.StatusInternalServerError)
			_, _ = io.WriteString(w, "[+]ping ok\n[-]poststarthook/crd-informer-synced failed: reason withheld\nreadyz check failed\n")
			return
		}
		_, _ = io.WriteString(w, "[+]ping ok\n[+]poststarthook/crd-informer-synced ok\nreadyz check passed\n")
	})
	answer := func(path string, object any) {
		mux.HandleFunc(path, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			_ = json.NewEncoder(w).Encode(object)
		})
	}
	answer("/version", map[string]string{"gitVersion": "v1.36.0"})
	answer("/api/v1/pods", corev1.PodList{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "PodList"}})
	answer("/api/v1/nodes", corev1.NodeList{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "NodeList"},
		Items: []corev1.Node{{
			ObjectMeta: metav1.ObjectMeta{Name: "one"},
			Status: corev1.NodeStatus{Conditions: []corev1.NodeCondition{
				{Type: corev1.NodeReady, Status: corev1.ConditionTrue},
			}},
		}},
	})
	answer("/api/v1/nodes/one/proxy/net/health", inspect.Health{
		Maps: []inspect.Fill{{Map: "services", Used: 10, Fits: 10}, {Map: "slots", Used: 1, Fits: 10}}, Problems: []string{"service default/web is late"},
	})
	server := httptest.NewServer(mux)
	t.Cleanup(server.Close)
	cmd = &cobra.Command{}
	cmd.Flags().String("server", server.URL, "")
	t.Setenv("KUBECONFIG", t.TempDir()+"/none")
	return cmd, asked
}

func TestStatusWaitsForTheAPI(t *testing.T) {
	cmd, asked := restarting(t, 3)
	var out bytes.Buffer
	err := runStatus(t.Context(), cmd, genericiooptions.IOStreams{Out: &out}, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(out.String(), "2 health checks pass") || asked.Load() < 4 {
		t.Errorf("after %d questions:\n%s", asked.Load(), &out)
	}
}

// TestStatusOfTheDataPlane: what a node's maps have no room for is shown; a cluster that serves is no failure.
func TestStatusOfTheDataPlane(t *testing.T) {
	cmd, _ := restarting(t, 0)
	var out bytes.Buffer
	if err := runStatus(t.Context(), cmd, genericiooptions.IOStreams{Out: &out}, 0); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"one: map services holds 10 of 10 entries: ", "one: service default/web is late\n"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("nothing says %q:\n%s", want, &out)
		}
	}
	if strings.Contains(out.String(), "slots") {
		t.Errorf("a map with room is shown:\n%s", &out)
	}
}

func TestStatusNamesWhatFails(t *testing.T) {
	cmd, _ := restarting(t, 1)
	err := runStatus(t.Context(), cmd, genericiooptions.IOStreams{Out: io.Discard}, 0)
	const want = "is not ready: 1 health checks pass, these fail: poststarthook/crd-informer-synced"
	if err == nil || !strings.HasSuffix(err.Error(), want) {
		t.Errorf("got %v, want %s", err, want)
	}
}
