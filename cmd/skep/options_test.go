// SPDX-License-Identifier: Apache-2.0

package main

import (
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/spf13/pflag"
)

var dualHost = host{name: "Node-1", hasIPv6: true, addrs: []netip.Addr{netip.MustParseAddr("192.0.2.7"), netip.MustParseAddr("2001:db8::7")}}

func parsed(t *testing.T, args ...string) *serverOptions {
	t.Helper()
	var o serverOptions
	flags := pflag.NewFlagSet("server", pflag.ContinueOnError)
	o.addFlags(flags)
	if err := flags.Parse(args); err != nil {
		t.Fatal(err)
	}
	return &o
}

func TestDefaultsAreComplete(t *testing.T) {
	s, err := parsed(t).complete(dualHost)
	if err != nil {
		t.Fatal(err)
	}
	if s.nodeName != "node-1" || s.advertiseAddress.String() != "192.0.2.7" || len(s.clusterCIDRs) != 2 || len(s.serviceCIDRs) != 2 {
		t.Errorf("%+v", s)
	}
	want := []netip.Addr{netip.MustParseAddr("10.43.0.10"), netip.MustParseAddr("fd73:6b65:7043::a")}
	if !reflect.DeepEqual(s.clusterDNS, want) {
		t.Errorf("DNS addresses %v, want %v", s.clusterDNS, want)
	}
	if s.imagesDir != "/var/lib/skep/images" {
		t.Errorf("images in %s", s.imagesDir)
	}
}

func TestHostWithoutIPv6GetsOneFamily(t *testing.T) {
	h := host{name: "a", addrs: dualHost.addrs[:1]}
	s, err := parsed(t).complete(h)
	if err != nil {
		t.Fatal(err)
	}
	if len(s.clusterCIDRs) != 1 || len(s.serviceCIDRs) != 1 || len(s.clusterDNS) != 1 || s.bindAddress.To4() == nil {
		t.Errorf("%+v", s)
	}
}

func TestMistakesAreNamed(t *testing.T) {
	for _, c := range []struct {
		args []string
		says string
	}{
		{[]string{"--node-name=Not Good"}, "--node-name"},
		{[]string{"--node-ip=nonsense"}, `"nonsense" is not an IP address`},
		{[]string{"--cluster-cidr=10.42.0.0/99"}, "--cluster-cidr"},
		{[]string{"--xdp=on"}, "none of auto, native, generic and off"},
		{[]string{"--conntrack-max=7"}, "--conntrack-max: 7 is not between 1024 and 4194304"},
		{[]string{"--nodeport-mode=nat"}, "none of snat, dsr and hybrid"},
		{[]string{"--cluster-cidr=10.42.0.1/16"}, "did you mean 10.42.0.0/16?"},
		{[]string{"--cluster-cidr=10.42.0.0/30"}, "too small"},
		{[]string{"--cluster-cidr=10.42.0.0/16,10.44.0.0/16"}, "more than one range of a family"},
		{[]string{"--service-cluster-ip-range=10.42.0.0/16"}, "overlaps --cluster-cidr"},
		{[]string{"--service-node-port-range=9-1"}, "--service-node-port-range"},
		{[]string{"--secure-port=70000"}, "70000 is not a port"},
		{[]string{"--bind-address=here"}, "--bind-address"},
		{[]string{"--advertise-address=there"}, "--advertise-address"},
		{[]string{"--cluster-domain=-"}, "--cluster-domain"},
		{[]string{"--snapshot-schedule=whenever"}, `"whenever" is not a schedule`},
		{[]string{"--join=http://x"}, `"http://x" is not of the form https://HOST:6443`},
		{[]string{"--join=https://x", "--cluster-init"}, "give either this, on the first server, or --join"},
		{[]string{"--join=https://x", "--token=abc"}, "this is not a token"},
		{[]string{"--node-monitor-grace-period=2s"}, "whole seconds, at least 8s"},
		{[]string{"--node-monitor-grace-period=8500ms"}, "whole seconds, at least 8s"},
		{[]string{"--etcd-servers=https://a:2379", "--cluster-init"}, "give either this, for one server with an etcd elsewhere"},
		{[]string{"--etcd-servers=http://192.0.2.1:2379"}, "in the clear"},
		{[]string{"--etcd-servers=a:2379"}, "is not of the form https://HOST:2379"},
		{[]string{"--etcd-servers=https://a:2379", "--etcd-certfile=x"}, "needs its key"},
		{[]string{"--snapshot-retention=0"}, "at least one is kept"},
		{[]string{"--scheduler-config=/nowhere/scheduler.yaml"}, "--scheduler-config: open /nowhere/scheduler.yaml"},
	} {
		if _, err := parsed(t, c.args...).complete(dualHost); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%v: error %v, want it to say %q", c.args, err, c.says)
		}
	}
	if _, err := parsed(t).complete(host{name: "a", hasIPv6: true}); err == nil || !strings.Contains(err.Error(), "--node-ip") {
		t.Errorf("host without addresses: %v", err)
	}
}

func TestConfigFile(t *testing.T) {
	load := func(content string, args ...string) (*serverOptions, error) {
		path := filepath.Join(t.TempDir(), "server.yaml")
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		var o serverOptions
		flags := pflag.NewFlagSet("server", pflag.ContinueOnError)
		o.addFlags(flags)
		if err := flags.Parse(args); err != nil {
			t.Fatal(err)
		}
		return &o, loadConfig(path, flags)
	}

	o, err := load("data-dir: /srv/skep\nsecure-port: 7443\ntls-san: [a.example, 192.0.2.1]\nlog-level: debug\ncluster-cidr: [10.50.0.0/16, 'fd00:1::/48']\n", "--log-level=warn")
	if err != nil {
		t.Fatal(err)
	}
	if o.dataDir != "/srv/skep" || o.securePort != 7443 || len(o.tlsSANs) != 2 || o.clusterCIDR != "10.50.0.0/16,fd00:1::/48" {
		t.Errorf("%+v", o)
	}
	if o.logLevel != "warn" {
		t.Errorf("log level %q: the command line must win over the file", o.logLevel)
	}

	for content, says := range map[string]string{
		"dta-dir: /x\n":            `unknown key "dta-dir" (did you mean data-dir`,
		"frobnicate: 1\n":          `unknown key "frobnicate" (keys are the flags' names`,
		"secure-port: many\n":      `key "secure-port"`,
		"secure-port:\n":           "has no value",
		"data-dir: {a: b}\n":       "not a mapping",
		"data-dir: a\ndata-dir: b": "already set",
		"config: other.yaml\n":     `unknown key "config"`,
		"- a\n":                    "server.yaml",
	} {
		if _, err := load(content); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%q: error %v, want it to say %q", content, err, says)
		}
	}
}

// TestEveryFlagIsAKey keeps the promise that every flag of `server` can come from the file.
func TestEveryFlagIsAKey(t *testing.T) {
	var o serverOptions
	flags := pflag.NewFlagSet("server", pflag.ContinueOnError)
	o.addFlags(flags)
	flags.VisitAll(func(f *pflag.Flag) {
		if f.Name == "config" {
			return
		}
		path := filepath.Join(t.TempDir(), "server.yaml")
		value := "1"
		switch f.Value.Type() {
		case "duration":
			value = "1s"
		case "bool":
			value = "true"
		case pairs:
			value = "a=1"
		}
		if err := os.WriteFile(path, []byte(f.Name+": "+value+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := loadConfig(path, flags); err != nil {
			t.Errorf("key %s: %v", f.Name, err)
		}
		if got := f.Value.String(); got != value && got != "["+value+"]" {
			t.Errorf("key %s: flag is %q after the file said %q", f.Name, got, value)
		}
	})
}
