// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"context"
	"fmt"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// BenchmarkServiceCreated measures from when the API has taken a Service with endpoints to the first
// connection through its ClusterIP.
func BenchmarkServiceCreated(b *testing.B) {
	n := newNode(b)
	client, server := n.pod("client"), n.pod("server")
	acceptAll(b, server.ns)
	var took []float64
	b.ResetTimer()
	for i := range b.N {
		name := fmt.Sprint("web", i)
		web := n.service(name, nil, server)
		start := time.Now()
		client.ns.do(b, func() error {
			for connectTimes(web.v4, 1) != nil {
				time.Sleep(100 * time.Microsecond)
				if time.Since(start) > 20*time.Second {
					return fmt.Errorf("%s does not answer", web.v4)
				}
			}
			return nil
		})
		took = append(took, float64(time.Since(start).Microseconds()))
		if err := n.client.CoreV1().Services("default").Delete(context.Background(), name, metav1.DeleteOptions{}); err != nil {
			b.Fatal(err)
		}
		n.nextPort.Store(int32(i % 50))
	}
	b.StopTimer()
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(median(took), "us-after-write")
}
