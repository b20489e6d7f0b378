// SPDX-License-Identifier: Apache-2.0

package main

import (
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"k8s.io/cli-runtime/pkg/genericclioptions"
	"k8s.io/cli-runtime/pkg/genericiooptions"
	_ "k8s.io/client-go/plugin/pkg/client/auth" // credential plugins that kubeconfig files may name
	"k8s.io/component-base/logs"
	"k8s.io/kubectl/pkg/cmd"
	"k8s.io/kubectl/pkg/cmd/plugin"
	"k8s.io/kubectl/pkg/util/templates"
)

const longHelp = `
skep runs containers on Linux machines and connects them with eBPF, behind the Kubernetes API.

  skep server            turn this machine into a cluster of one node
  skep apply -f FILE     ask for what a manifest says
  skep get pods -o wide  see what runs where

Every verb of kubectl works here; without other instructions they talk to the cluster
that /etc/skep/kubeconfig names.`

// newRootCommand builds the whole command tree: skep's own verbs beside kubectl's.
func newRootCommand(args []string, in io.Reader, out, errOut io.Writer) *cobra.Command {
	_, _ = logs.GlogSetter(cmd.GetLogVerbosity(args)) // a bad -v is reported when flags are parsed
	useDefaultKubeconfig()

	streams := genericiooptions.IOStreams{In: in, Out: out, ErrOut: errOut}
	root := cmd.NewDefaultKubectlCommandWithArgs(cmd.KubectlOptions{
		PluginHandler: cmd.NewDefaultPluginHandler(plugin.ValidPluginFilenamePrefixes),
		Arguments:     withoutOwnVerb(args),
		ConfigFlags: genericclioptions.NewConfigFlags(true).WithDeprecatedPasswordFlag().
			WithDiscoveryBurst(300).WithDiscoveryQPS(50).WithWarningPrinter(streams),
		IOStreams: streams,
	})
	renameKubectl(root)
	root.Use = "skep"
	root.Short = "skep runs containers and connects them with eBPF, behind the Kubernetes API"
	root.Long = strings.TrimSpace(longHelp)
	needCluster(root)
	root.SetArgs(args[1:])
	root.SetIn(in)
	root.SetOut(out)
	root.SetErr(errOut)
	root.SilenceErrors = true

	own := ownCommands(streams)
	for _, c := range own {
		if replaced, _, err := root.Find([]string{c.Name()}); err == nil && replaced != root {
			root.RemoveCommand(replaced)
		}
		root.AddCommand(c)
	}
	groups := append(templates.CommandGroups{{Message: "Cluster Commands:", Commands: own}}, kubectlGroups(root)...)
	templates.ActsAsRootCommand(root, []string{"options", "alpha"}, groups...)
	return root
}

// ownCommands lists skep's own verbs: this list is the place to add one.
func ownCommands(streams genericiooptions.IOStreams) []*cobra.Command {
	return []*cobra.Command{
		newServerCommand(streams),
		newAgentCommand(streams),
		newTokenCommand(streams),
		newSnapshotCommand(streams),
		newMemberCommand(streams),
		newSecretsCommand(streams),
		newCACommand(streams),
		newShutdownCommand(streams),
		newInstallCommand(streams),
		newUninstallCommand(streams),
		newStatusCommand(streams),
		newFlowsCommand(streams),
		newNetCommand(streams),
		newTraceCommand(streams),
		newCheckCommand(streams),
		newResetCommand(streams),
		newVersionCommand(streams),
	}
}

// withoutOwnVerb hides skep's own verbs from kubectl's search for plugins.
func withoutOwnVerb(args []string) []string {
	if len(args) > 1 && isOwnVerb(args[1]) {
		return args[:1]
	}
	return args
}

func isOwnVerb(name string) bool {
	return slices.ContainsFunc(ownCommands(genericiooptions.NewTestIOStreamsDiscard()), func(c *cobra.Command) bool {
		return c.Name() == name
	})
}

// kubectlGroups arranges kubectl's verbs for the help page as kubectl does.
func kubectlGroups(root *cobra.Command) templates.CommandGroups {
	var groups templates.CommandGroups
	for _, g := range []struct{ message, verbs string }{
		{"Basic Commands:", "apply get describe create delete edit explain run expose set"},
		{"Deploy Commands:", "rollout scale autoscale"},
		{"Cluster Management Commands:", "certificate cluster-info top cordon uncordon drain taint"},
		{"Troubleshooting and Debugging Commands:", "logs exec attach port-forward proxy cp auth debug events"},
		{"Advanced Commands:", "diff patch replace wait kustomize"},
		{"Settings Commands:", "label annotate completion"},
	} {
		group := templates.CommandGroup{Message: g.message}
		for _, verb := range strings.Fields(g.verbs) {
			if c, _, err := root.Find([]string{verb}); err == nil && c != root {
				group.Commands = append(group.Commands, c)
			}
		}
		groups = append(groups, group)
	}
	return templates.AddAdditionalCommands(groups, "Other Commands:", root.Commands())
}

// renameKubectl makes examples and explanations say what a person types here.
func renameKubectl(c *cobra.Command) {
	rename := func(s string) string {
		s = strings.ReplaceAll(s, "kubectl ", "skep ")
		return strings.ReplaceAll(s, `"kubectl"`, `"skep"`)
	}
	c.Example = rename(c.Example)
	c.Long = rename(c.Long)
	c.Short = rename(c.Short)
	for _, sub := range c.Commands() {
		renameKubectl(sub)
	}
}
