// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/spf13/cobra"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"skep.io/skep/api"
)

// useDefaultKubeconfig points kubectl's loading rules at /etc/skep/kubeconfig when nothing else is
// set: neither $KUBECONFIG nor ~/.kube/config. An explicit --kubeconfig wins over both, as ever.
func useDefaultKubeconfig() {
	if os.Getenv(clientcmd.RecommendedConfigPathEnvVar) != "" {
		return
	}
	if _, err := os.Stat(clientcmd.RecommendedHomeFile); err == nil {
		return
	}
	if _, err := os.Stat(api.KubeconfigPath); os.IsNotExist(err) {
		return
	}
	// The loading rules are built deep inside kubectl from this variable, and nowhere else.
	_ = os.Setenv(clientcmd.RecommendedConfigPathEnvVar, api.KubeconfigPath)
}

var errNoCluster = fmt.Errorf("no cluster is configured: neither $KUBECONFIG, %s nor %s exists; start one with `skep server`, or name a server with --server",
	clientcmd.RecommendedHomeFile, api.KubeconfigPath)

// clientConfig is the configuration that kubectl's verbs would use, for skep's own.
func clientConfig(cmd *cobra.Command) (*rest.Config, error) {
	if err := findCluster(cmd); err != nil {
		return nil, err
	}
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	overrides := &clientcmd.ConfigOverrides{}
	for name, target := range map[string]*string{
		"kubeconfig": &rules.ExplicitPath, "context": &overrides.CurrentContext,
		"cluster": &overrides.Context.Cluster, "user": &overrides.Context.AuthInfo,
		"server": &overrides.ClusterInfo.Server, "certificate-authority": &overrides.ClusterInfo.CertificateAuthority,
		"tls-server-name": &overrides.ClusterInfo.TLSServerName, "token": &overrides.AuthInfo.Token,
		"client-certificate": &overrides.AuthInfo.ClientCertificate, "client-key": &overrides.AuthInfo.ClientKey,
		"as": &overrides.AuthInfo.Impersonate, "as-uid": &overrides.AuthInfo.ImpersonateUID,
	} {
		if f := cmd.Flags().Lookup(name); f != nil {
			*target = f.Value.String()
		}
	}
	if groups, err := cmd.Flags().GetStringArray("as-group"); err == nil {
		overrides.AuthInfo.ImpersonateGroups = groups
	}
	return clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, overrides).ClientConfig()
}

// offlineVerbs work without a cluster.
var offlineVerbs = []string{
	"completion", "config", "help", "kuberc", "kustomize", "options", "plugin",
	cobra.ShellCompRequestCmd, cobra.ShellCompNoDescRequestCmd,
}

// needCluster makes kubectl's verbs say what is missing when no cluster is configured at all, in
// place of kubectl's attempt at localhost:8080, where nobody has listened for years; and what to do
// when the administrator's kubeconfig is not this user's to read.
func needCluster(root *cobra.Command) {
	next := root.PersistentPreRunE
	root.PersistentPreRunE = func(cmd *cobra.Command, args []string) error {
		verb := verbOf(cmd)
		if cmd.HasParent() && !slices.Contains(offlineVerbs, verb) && !isOwnVerb(verb) {
			if err := findCluster(cmd); err != nil {
				return fail("%w", err)
			}
		}
		return next(cmd, args)
	}
}

// verbOf is the name of the command right below the root.
func verbOf(cmd *cobra.Command) string {
	for cmd.HasParent() && cmd.Parent().HasParent() {
		cmd = cmd.Parent()
	}
	return cmd.Name()
}

// findCluster is nil if something names a cluster: a flag, the environment, or a file.
func findCluster(cmd *cobra.Command) error {
	for _, name := range []string{"kubeconfig", "server"} {
		if f := cmd.Flags().Lookup(name); f != nil && f.Value.String() != "" {
			return nil
		}
	}
	switch named := os.Getenv(clientcmd.RecommendedConfigPathEnvVar); {
	case named == api.KubeconfigPath:
		return checkReadable(named)
	case named != "" || os.Getenv("KUBERNETES_SERVICE_HOST") != "":
		return nil
	}
	if _, err := os.Stat(clientcmd.RecommendedHomeFile); err != nil {
		return errNoCluster
	}
	return nil
}

// checkReadable says what a user can do who may not read the administrator's kubeconfig.
func checkReadable(file string) error {
	f, err := os.Open(file)
	if errors.Is(err, os.ErrPermission) {
		return fmt.Errorf("%s holds the administrator's key and is root's to read: use sudo, or give this user a copy (sudo install -D -m 0600 -o $USER %s %s)",
			file, file, clientcmd.RecommendedHomeFile)
	}
	if err == nil {
		return f.Close()
	}
	return nil // whatever else is wrong, kubectl says it better
}
