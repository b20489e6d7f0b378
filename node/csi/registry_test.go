// SPDX-License-Identifier: Apache-2.0

package csi

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	spec "github.com/container-storage-interface/spec/lib/go/csi"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"
	registerapi "k8s.io/kubelet/pkg/apis/pluginregistration/v1"
)

// plugin is a driver with its registrar, behind one socket as the two may be.
type plugin struct {
	registerapi.UnimplementedRegistrationServer
	spec.UnimplementedNodeServer
	info registerapi.PluginInfo
	node *spec.NodeGetInfoResponse
	told chan *registerapi.RegistrationStatus
}

func (p *plugin) GetInfo(context.Context, *registerapi.InfoRequest) (*registerapi.PluginInfo, error) {
	return &p.info, nil
}

func (p *plugin) NotifyRegistrationStatus(_ context.Context, s *registerapi.RegistrationStatus) (*registerapi.RegistrationStatusResponse, error) {
	select {
	case p.told <- s:
	default:
	}
	return &registerapi.RegistrationStatusResponse{}, nil
}

func (p *plugin) NodeGetInfo(context.Context, *spec.NodeGetInfoRequest) (*spec.NodeGetInfoResponse, error) {
	return p.node, nil
}

// serve puts the plugin behind a socket until end is called, which removes the socket.
func (p *plugin) serve(t *testing.T, path string) (end func()) {
	t.Helper()
	return p.serveAs(t, p, path)
}

// serveAs is serve with another's answers about volumes.
func (p *plugin) serveAs(t *testing.T, node spec.NodeServer, path string) (end func()) {
	t.Helper()
	p.told = make(chan *registerapi.RegistrationStatus, 10)
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	registerapi.RegisterRegistrationServer(s, p)
	spec.RegisterNodeServer(s, node)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = s.Serve(l)
	}()
	return func() {
		s.Stop()
		<-done
	}
}

func newPlugin(name, id string) *plugin {
	return &plugin{info: registerapi.PluginInfo{Type: registerapi.CSIPlugin, Name: name, SupportedVersions: []string{"1.9.0"}}, node: &spec.NodeGetInfoResponse{NodeId: id}}
}

// bench is drivers in a directory, with an API server in memory.
type bench struct {
	*Drivers
	t      *testing.T
	dir    string
	client *fake.Clientset
	stop   func()
}

func newBench(t *testing.T, before ...func(dir string)) *bench {
	t.Helper()
	dir, err := os.MkdirTemp("", "csi") // paths of sockets are short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	for _, f := range before {
		f(dir)
	}
	b := &bench{t: t, dir: dir, client: fake.NewClientset(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n", UID: "node-uid", Labels: map[string]string{"zone": "a"}}})}
	b.start()
	t.Cleanup(func() { b.stop() })
	return b
}

func (b *bench) start() {
	b.Drivers = New(Config{Dir: b.dir, NodeName: "n", Client: b.client, Log: slog.New(slog.DiscardHandler)})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		b.Run(ctx)
	}()
	b.stop = func() { cancel(); <-done }
}

func (b *bench) until(what string, ok func() bool) {
	b.t.Helper()
	for end := time.Now().Add(2 * time.Minute); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if ok() {
			return
		}
	}
	b.t.Fatalf("timed out waiting until %s: %s", what, b.shows())
}

// shows is what the API has of drivers.
func (b *bench) shows() string {
	var out []string
	if n, err := b.client.StorageV1().CSINodes().Get(context.Background(), "n", metav1.GetOptions{}); err == nil {
		for _, d := range n.Spec.Drivers {
			most := int32(0)
			if d.Allocatable != nil {
				most = *d.Allocatable.Count
			}
			out = append(out, fmt.Sprintf("%s=%s %v %d of %s", d.Name, d.NodeID, d.TopologyKeys, most, n.OwnerReferences[0].UID))
		}
	}
	node, err := b.client.CoreV1().Nodes().Get(context.Background(), "n", metav1.GetOptions{})
	if err != nil {
		b.t.Fatal(err)
	}
	return strings.Join(out, ", ") + "; " + node.Annotations[annotationNodeIDs] + "; " + node.Labels["rack"]
}

func (b *bench) is(want string) func() bool { return func() bool { return b.shows() == want } }

// TestRegistration: a driver comes, comes again as another, and goes; one that was there before the agent is found, and
// an agent that ends leaves it shown.
func TestRegistration(t *testing.T) {
	defer goleak.VerifyNone(t)
	first := newPlugin("a.csi.example", "id-1")
	first.node.AccessibleTopology = &spec.Topology{Segments: map[string]string{"rack": "7"}}
	first.node.MaxVolumesPerNode = 5
	var end func()
	b := newBench(t, func(dir string) { end = first.serve(t, filepath.Join(dir, "a-reg.sock")) })
	defer func() { b.stop() }()
	const shown = `a.csi.example=id-1 [rack] 5 of node-uid; {"a.csi.example":"id-1"}; 7`
	b.until("the driver is shown", b.is(shown))
	if s := <-first.told; !s.PluginRegistered {
		t.Errorf("it was told %v", s)
	}
	if f, err := b.find("a.csi.example"); err != nil || f.endpoint != filepath.Join(b.dir, "a-reg.sock") {
		t.Errorf("%+v, %v", f, err)
	}
	second := newPlugin("b.csi.example", "id-2")
	second.info.Endpoint = filepath.Join(b.dir, "a-reg.sock") // where NodeGetInfo says id-1
	defer second.serve(t, filepath.Join(b.dir, "b.sock"))()
	b.until("another one has the first's endpoint", b.is(`a.csi.example=id-1 [rack] 5 of node-uid, b.csi.example=id-1 [rack] 5 of node-uid; {"a.csi.example":"id-1","b.csi.example":"id-1"}; 7`))

	b.stop()
	b.start()
	b.until("the next agent finds them", func() bool { _, err := b.find("a.csi.example"); return err == nil })
	b.until("both of them", func() bool { _, err := b.find("b.csi.example"); return err == nil })

	end()
	b.until("the first is gone", b.is(`b.csi.example=id-1 [rack] 5 of node-uid; {"b.csi.example":"id-1"}; 7`))
	if _, err := b.find("a.csi.example"); err == nil {
		t.Error("it is still found")
	}
	again := newPlugin("a.csi.example", "id-3")
	defer again.serve(t, filepath.Join(b.dir, "a-reg.sock"))()
	b.until("it comes back as another", b.is(`b.csi.example=id-1 [rack] 5 of node-uid, a.csi.example=id-3 [] 0 of node-uid; {"a.csi.example":"id-3","b.csi.example":"id-1"}; 7`))
}

// TestRefusals: what cannot be used is told so, and what is no socket is passed over.
func TestRefusals(t *testing.T) {
	defer goleak.VerifyNone(t)
	b := newBench(t)
	defer func() { b.stop() }()
	if err := os.WriteFile(filepath.Join(b.dir, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	collides := newPlugin("collides", "id")
	collides.node.AccessibleTopology = &spec.Topology{Segments: map[string]string{"zone": "b"}}
	device, old, odd, nobody, nowhere := newPlugin("device", "id"), newPlugin("old", "id"), newPlugin("../odd", "id"), newPlugin("nobody", ""), newPlugin("nowhere", "id")
	device.info.Type = registerapi.DevicePlugin
	old.info.SupportedVersions = []string{"0.3.0", "v2", "x"}
	nowhere.info.Endpoint = "relative.sock"
	for i, c := range []struct {
		p    *plugin
		want string
	}{
		{device, `no use for plugins of type "DevicePlugin"`}, {old, "supports none of the versions"}, {odd, "no name of a driver"},
		{nobody, "gives no node id"}, {nowhere, "not the path of a socket"}, {collides, "topology value collision"},
	} {
		end := c.p.serve(t, filepath.Join(b.dir, fmt.Sprintf("%d.sock", i)))
		if s := <-c.p.told; s.PluginRegistered || !strings.Contains(s.Error, c.want) {
			t.Errorf("%s was told %v", c.p.info.Name, s)
		}
		if _, err := b.find(c.p.info.Name); err == nil {
			t.Errorf("%s is found", c.p.info.Name)
		}
		end()
	}
	if got := b.shows(); got != "; ; " {
		t.Errorf("shown: %s", got)
	}
}
