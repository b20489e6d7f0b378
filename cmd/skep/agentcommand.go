// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/cli-runtime/pkg/genericiooptions"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"

	"skep.io/skep/api"
	"skep.io/skep/node"
	"skep.io/skep/node/join"
)

// agentOptions are the flags of `skep agent`; every one is also a key of its YAML file.
type agentOptions struct {
	nodeOptions
	server    string
	token     string
	tokenFile string
}

func (o *agentOptions) addFlags(f *pflag.FlagSet) {
	o.nodeOptions.addFlags(f, api.AgentConfigPath)
	f.StringVar(&o.server, "server", "", "A server of the cluster: https://HOST:6443")
	f.StringVar(&o.token, "token", "", "What `skep token create` printed on a server; needed only until this machine has joined")
	f.StringVar(&o.tokenFile, "token-file", "", "File that holds the token, so that it shows in no list of processes")
}

// agentSettings are the options once they have been checked and completed.
type agentSettings struct {
	nodeSettings
	server *url.URL
	token  string
	host   host
}

// complete checks every option. It reports all mistakes at once.
func (o *agentOptions) complete(h host, readFile func(string) ([]byte, error)) (agentSettings, error) {
	var errs []error
	bad := func(flag, format string, args ...any) {
		errs = append(errs, fmt.Errorf("--%s: %w", flag, fmt.Errorf(format, args...)))
	}
	s := agentSettings{nodeSettings: o.nodeOptions.complete(h, bad), host: h}
	var err error
	if s.server, err = serverURL(o.server); err != nil {
		bad("server", "%w", err)
	}
	s.token = readToken(o.token, o.tokenFile, readFile, bad)
	return s, errors.Join(errs...)
}

func newAgentCommand(streams genericiooptions.IOStreams) *cobra.Command {
	var o agentOptions
	c := &cobra.Command{
		Use:   "agent --server https://HOST:6443 --token TOKEN",
		Short: "Make this machine a node of a cluster that a server on another machine controls",
		Long: "Make this machine a node of a cluster that a server on another machine controls, in the foreground.\n\n" +
			"The token, which `skep token create` prints on a server, also says which certificate authority to\n" +
			"trust: nothing secret is sent to another one. Once the machine has joined, its certificates are in\n" +
			"--data-dir and the token is not needed any more. Pods keep running, and their connections stay,\n" +
			"while the agent is stopped or replaced. `skep reset` takes all of it off the machine.",
		Args:         cobra.NoArgs,
		SilenceUsage: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			log, err := o.prepare(cmd, streams, api.AgentConfigPath)
			if err != nil {
				return err
			}
			h, err := thisHost()
			if err != nil {
				return fail("%w", err)
			}
			settings, err := o.complete(h, os.ReadFile)
			if err != nil {
				return fail("%w", err)
			}
			ctx, stop := untilSignal(cmd)
			defer stop()
			if err := runAgent(ctx, settings, log); err != nil {
				return fail("%w", err)
			}
			fmt.Fprintln(streams.ErrOut, "skep: stopped; pods keep running (`skep reset` removes them)")
			return nil
		},
	}
	o.addFlags(c.Flags())
	return c
}

// runAgent joins the cluster, starts every part and returns when ctx ends or one of them fails.
func runAgent(ctx context.Context, s agentSettings, log *slog.Logger) error {
	release, err := claimHost()
	if err != nil {
		return err
	}
	defer release()
	if _, err := os.Stat(filepath.Join(s.dataDir, "server")); err == nil {
		return fmt.Errorf("%s is a server's: this machine runs `skep server`, which is a node, too; `skep reset` takes it off", s.dataDir)
	}
	if err := checkFormat(s.dataDir); err != nil {
		return err
	}
	collectAt(gcPercent)
	identity, err := join.Join(ctx, join.Config{
		Server: s.server, Token: s.token, NodeName: s.nodeName, NodeIPs: s.nodeIPs,
		Dir: filepath.Join(s.dataDir, "agent"), UserAgent: "skep/" + skepVersion, Log: log.With("part", "join"),
		Fits: func(server string) error { return checkSkew(node.KubeletVersion, server) },
	})
	if err != nil {
		return untilStopped(ctx, err)
	}
	if err := writeFormat(s.dataDir); err != nil {
		return err
	}
	pace := newPacer(log)
	config := identity.ClientConfig()
	config.Wrap(pace.watch)
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return err
	}
	resources, err := dynamic.NewForConfig(config)
	if err != nil {
		return err
	}
	cluster, err := learnCluster(ctx, client, filepath.Join(s.dataDir, "agent", "cluster.json"), s.host.hasIPv6, log)
	if err != nil {
		return untilStopped(ctx, err)
	}
	if err := cluster.conflicts(s.host.networks); err != nil {
		return err
	}
	registry := prometheus.NewRegistry()
	shared := informers.NewSharedInformerFactoryWithOptions(client, 0, informers.WithTransform(dropManagedFields))
	now := make(chan struct{})
	close(now)
	a := &agent{
		nodeSettings: s.nodeSettings, cluster: cluster,
		access: access{
			node: client, ingress: client, informers: shared, dynamic: resources, ready: now, registered: now,
			serving: identity.Serving, clientCA: identity.ClientCA,
		},
		log: log, metrics: registry, gatherer: registry,
	}
	if err := a.start(ctx); err != nil {
		return err
	}
	if err := followServers(shared, identity, log); err != nil {
		return err
	}
	if err := followAuthorities(ctx, client, identity, log); err != nil {
		return err
	}
	log.Info("starting", "node", s.nodeName, "server", s.server.String(), "version", skepVersion, "data", s.dataDir)
	shared.StartWithContext(ctx)
	return runParts(ctx, log, append(a.parts(),
		part{"certificates", identity.Run},
		part{"pacer", pace.run},
	))
}

// followServers keeps the list of servers as the Service "kubernetes" has it.
func followServers(factory informers.SharedInformerFactory, identity *join.Identity, log *slog.Logger) error {
	learn := func(object any) {
		slice, ok := object.(*discoveryv1.EndpointSlice)
		if !ok || slice.Namespace != metav1.NamespaceDefault || slice.Name != "kubernetes" {
			return
		}
		if err := identity.LearnServers(serversOf(slice)); err != nil {
			log.Error("keep the list of servers", "error", err)
		}
	}
	_, err := factory.Discovery().V1().EndpointSlices().Informer().AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc: learn, UpdateFunc: func(_, now any) { learn(now) },
	})
	return err
}

// followAuthorities keeps the list of certificate authorities as the servers tell it.
func followAuthorities(ctx context.Context, client kubernetes.Interface, identity *join.Identity, log *slog.Logger) error {
	one := informers.NewSharedInformerFactoryWithOptions(client, 0, informers.WithNamespace(metav1.NamespaceSystem),
		informers.WithTweakListOptions(func(o *metav1.ListOptions) {
			o.FieldSelector = fields.OneTermEqualSelector(metav1.ObjectNameField, api.ClusterConfigMap).String()
		}))
	learn := func(object any) {
		// Servers of before this key do not tell it.
		config, ok := object.(*corev1.ConfigMap)
		if !ok || config.Data[api.AuthoritiesKey] == "" {
			return
		}
		if err := identity.LearnAuthorities(config.Data[api.AuthoritiesKey]); err != nil {
			log.Error("keep the list of certificate authorities", "error", err)
		}
	}
	_, err := one.Core().V1().ConfigMaps().Informer().AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc: learn, UpdateFunc: func(_, now any) { learn(now) },
	})
	one.StartWithContext(ctx)
	return err
}

// serversOf are the addresses in a slice, as HOST:PORT, in order.
func serversOf(slice *discoveryv1.EndpointSlice) []string {
	var out []string
	for _, port := range slice.Ports {
		if port.Port == nil || port.Name == nil || *port.Name != "https" {
			continue
		}
		for _, e := range slice.Endpoints {
			for _, address := range e.Addresses {
				out = append(out, net.JoinHostPort(address, strconv.Itoa(int(*port.Port))))
			}
		}
	}
	slices.Sort(out)
	return out
}

// untilStopped is nil if err only tells that ctx has ended.
func untilStopped(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return err
}
