// SPDX-License-Identifier: Apache-2.0

package metricsapi

import (
	"context"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/metrics/pkg/apis/metrics"
)

// ConvertToTable is what `skep get nodes.metrics.k8s.io` shows.
func (*nodes) ConvertToTable(_ context.Context, o runtime.Object, _ runtime.Object) (*metav1.Table, error) {
	t := newTable()
	switch o := o.(type) {
	case *metrics.NodeMetrics:
		t.add(o, o.Usage, o.Window)
	case *metrics.NodeMetricsList:
		for i := range o.Items {
			t.add(&o.Items[i], o.Items[i].Usage, o.Items[i].Window)
		}
	default:
		return nil, fmt.Errorf("a table of %T", o)
	}
	return &t.Table, nil
}

// ConvertToTable is what `skep get pods.metrics.k8s.io` shows: containers added up.
func (*pods) ConvertToTable(_ context.Context, o runtime.Object, _ runtime.Object) (*metav1.Table, error) {
	t := newTable()
	switch o := o.(type) {
	case *metrics.PodMetrics:
		t.add(o, sum(o), o.Window)
	case *metrics.PodMetricsList:
		for i := range o.Items {
			t.add(&o.Items[i], sum(&o.Items[i]), o.Items[i].Window)
		}
	default:
		return nil, fmt.Errorf("a table of %T", o)
	}
	return &t.Table, nil
}

func sum(p *metrics.PodMetrics) corev1.ResourceList {
	var cpu, memory resource.Quantity
	for i := range p.Containers {
		cpu.Add(*p.Containers[i].Usage.Cpu())
		memory.Add(*p.Containers[i].Usage.Memory())
	}
	return corev1.ResourceList{corev1.ResourceCPU: cpu, corev1.ResourceMemory: memory}
}

type table struct{ metav1.Table }

func newTable() *table {
	return &table{metav1.Table{ColumnDefinitions: []metav1.TableColumnDefinition{
		{Name: "Name", Type: "string", Format: "name", Description: "Name of the node or pod"},
		{Name: "CPU", Type: "string", Description: "Processors in use, in thousandths of one"},
		{Name: "Memory", Type: "string", Description: "Working set"},
		{Name: "Window", Type: "string", Description: "The time that the numbers were averaged over"},
	}}}
}

func (t *table) add(o interface {
	runtime.Object
	metav1.Object
}, u corev1.ResourceList, window metav1.Duration) {
	t.Rows = append(t.Rows, metav1.TableRow{
		Cells: []any{
			o.GetName(), fmt.Sprintf("%dm", u.Cpu().MilliValue()), fmt.Sprintf("%dMi", u.Memory().Value()>>20),
			window.Round(100 * time.Millisecond).String(),
		},
		Object: runtime.RawExtension{Object: o},
	})
}
