// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/version"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/util/retry"

	"skep.io/skep/api"
	"skep.io/skep/controlplane/controllers/nodelifecycle"
	"skep.io/skep/node"
)

// data is what a server tells its nodes, by the names of the server's flags.
func (c clusterSettings) data() map[string]string {
	return map[string]string{
		"cluster-cidr":              joinPrefixes(c.clusterCIDRs),
		"service-cluster-ip-range":  joinPrefixes(c.serviceCIDRs),
		"service-node-port-range":   c.nodePortRange.String(),
		"cluster-domain":            c.clusterDomain,
		"routing":                   string(c.routing),
		"nodeport-mode":             string(c.nodePortMode),
		"node-monitor-grace-period": c.nodeGrace.String(),
		"ingress-http-port":         strconv.Itoa(int(c.ingressHTTPPort)),
		"ingress-https-port":        strconv.Itoa(int(c.ingressHTTPSPort)),
	}
}

func joinPrefixes(list []netip.Prefix) string {
	var out []string
	for _, p := range list {
		out = append(out, p.String())
	}
	return strings.Join(out, ",")
}

// clusterFrom reads what data writes, and checks it as a server checks its flags.
func clusterFrom(data map[string]string, hasIPv6 bool) (clusterSettings, error) {
	var o serverOptions
	for key, target := range map[string]*string{
		"cluster-cidr": &o.clusterCIDR, "service-cluster-ip-range": &o.serviceCIDR,
		"service-node-port-range": &o.nodePortRange, "cluster-domain": &o.clusterDomain, "routing": &o.routing, "nodeport-mode": &o.nodePortMode,
	} {
		*target = data[key]
	}
	var errs [3]error
	// Servers of before this setting do not tell it.
	if o.nodeGrace = nodelifecycle.DefaultTiming.Grace; data["node-monitor-grace-period"] != "" {
		o.nodeGrace, errs[2] = time.ParseDuration(data["node-monitor-grace-period"])
	}
	o.ingressHTTPPort, errs[0] = strconv.Atoi(data["ingress-http-port"])
	o.ingressHTTPSPort, errs[1] = strconv.Atoi(data["ingress-https-port"])
	s, err := o.cluster(hasIPv6)
	if err = errors.Join(errs[0], errs[1], errs[2], err); err != nil {
		return s, fmt.Errorf("ConfigMap %s/%s, which the server writes: %w", metav1.NamespaceSystem, api.ClusterConfigMap, err)
	}
	return s, nil
}

// publishCluster tells nodes what they have to agree on; what others tell under other keys stays.
func publishCluster(ctx context.Context, client kubernetes.Interface, data map[string]string) error {
	configMaps := client.CoreV1().ConfigMaps(metav1.NamespaceSystem)
	another := func(err error) bool { return apierrors.IsConflict(err) || apierrors.IsAlreadyExists(err) }
	err := retry.OnError(retry.DefaultRetry, another, func() error {
		have, err := configMaps.Get(ctx, api.ClusterConfigMap, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			_, err = configMaps.Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: api.ClusterConfigMap}, Data: data}, metav1.CreateOptions{})
			return err
		}
		if err != nil {
			return err
		}
		want := maps.Clone(have.Data)
		if want == nil {
			want = map[string]string{}
		}
		maps.Copy(want, data)
		if maps.Equal(have.Data, want) {
			return nil
		}
		have.Data = want
		_, err = configMaps.Update(ctx, have, metav1.UpdateOptions{})
		return err
	})
	if err != nil {
		return fmt.Errorf("tell nodes the cluster's settings: %w", err)
	}
	return nil
}

// publishAuthorities tells nodes whom to trust.
func publishAuthorities(ctx context.Context, client kubernetes.Interface, authorities []byte) error {
	return publishCluster(ctx, client, map[string]string{api.AuthoritiesKey: string(authorities)})
}

// learnCluster asks the server what this node has to agree on. If it does not answer but has before,
// what it said then is used: what runs here needs no server, and is not to wait for one.
func learnCluster(ctx context.Context, client kubernetes.Interface, cache string, hasIPv6 bool, log *slog.Logger) (clusterSettings, error) {
	for delay := 250 * time.Millisecond; ; delay = min(2*delay, 10*time.Second) {
		data, err := askCluster(ctx, client)
		if err == nil {
			raw, err := json.Marshal(data)
			if err == nil {
				err = os.WriteFile(cache, raw, 0o600)
			}
			if err != nil {
				return clusterSettings{}, fmt.Errorf("keep the cluster's settings: %w", err)
			}
			return clusterFrom(data, hasIPv6)
		}
		if ctx.Err() != nil || errors.Is(err, errVersionSkew) {
			return clusterSettings{}, err
		}
		log.Warn("the server does not tell the cluster's settings", "error", err)
		if raw, err := os.ReadFile(cache); err == nil && json.Unmarshal(raw, &data) == nil {
			log.Info("using the settings that the server told before", "file", filepath.Base(cache))
			return clusterFrom(data, hasIPv6)
		}
		t := time.NewTimer(delay)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
		}
	}
}

func askCluster(ctx context.Context, client kubernetes.Interface) (map[string]string, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	raw, err := client.Discovery().RESTClient().Get().AbsPath("/version").Do(ctx).Raw()
	if err != nil {
		return nil, err
	}
	var server struct{ GitVersion string }
	if err := json.Unmarshal(raw, &server); err != nil {
		return nil, fmt.Errorf("version of the server: %w", err)
	}
	if err := checkSkew(node.KubeletVersion, server.GitVersion); err != nil {
		return nil, err
	}
	c, err := client.CoreV1().ConfigMaps(metav1.NamespaceSystem).Get(ctx, api.ClusterConfigMap, metav1.GetOptions{})
	if err != nil {
		return nil, err
	}
	return c.Data, nil
}

var errVersionSkew = errors.New("this agent does not fit the server")

// checkSkew refuses an agent that is newer than its server by more than one minor version: it might ask
// for what the server does not know. One minor is what a rolling upgrade in the wrong order makes.
func checkSkew(agent, server string) error {
	a, err := version.ParseSemantic(agent)
	if err != nil {
		return err
	}
	s, err := version.ParseSemantic(server)
	if err != nil {
		return fmt.Errorf("version of the server: %w", err)
	}
	if a.Major() == s.Major() && a.Minor() <= s.Minor()+1 {
		return nil
	}
	return fmt.Errorf("%w: the agent is of version %s, the server of %s: an agent may be newer by one minor version at most; upgrade the server first", errVersionSkew, agent, server)
}

// serverURL reads https://HOST[:PORT].
func serverURL(text string) (*url.URL, error) {
	if text == "" {
		return nil, errors.New("which server's cluster is this machine to join? Give https://HOST:6443")
	}
	u, err := url.Parse(text)
	if err != nil || u.Scheme != "https" || u.Host == "" || strings.Trim(u.Path, "/") != "" || u.User != nil || u.RawQuery != "" {
		return nil, fmt.Errorf("%q is not of the form https://HOST:6443", text)
	}
	if u.Port() == "" {
		u.Host = net.JoinHostPort(u.Hostname(), strconv.Itoa(api.DefaultAPIPort))
	}
	u.Path = ""
	return u, nil
}

func firstField(s string) string {
	for f := range strings.FieldsSeq(s) {
		return f
	}
	return ""
}
