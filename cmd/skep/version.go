// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"fmt"
	"runtime"

	"github.com/spf13/cobra"
	"k8s.io/cli-runtime/pkg/genericiooptions"
	"k8s.io/client-go/discovery"
	"k8s.io/component-base/version"
	"sigs.k8s.io/yaml"
)

// skepVersion is set by the Makefile from `git describe`.
var skepVersion = "dev"

// versions is what `skep version -o json` prints; the Kubernetes parts are shaped like kubectl's.
type versions struct {
	Skep          string `json:"skep"`
	Go            string `json:"go"`
	Platform      string `json:"platform"`
	ClientVersion any    `json:"clientVersion"`
	ServerVersion any    `json:"serverVersion,omitempty"`
}

func newVersionCommand(streams genericiooptions.IOStreams) *cobra.Command {
	var clientOnly bool
	var output string
	c := &cobra.Command{
		Use:   "version",
		Short: "Print the versions of skep, of the Kubernetes API it speaks, and of the server",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			v := versions{
				Skep:          skepVersion,
				Go:            runtime.Version(),
				Platform:      runtime.GOOS + "/" + runtime.GOARCH,
				ClientVersion: version.Get(),
			}
			var serverErr error
			if !clientOnly {
				v.ServerVersion, serverErr = serverVersion(cmd)
			}
			switch output {
			case "json":
				b, err := json.MarshalIndent(v, "", "  ")
				if err != nil {
					return err
				}
				fmt.Fprintln(streams.Out, string(b))
			case "yaml":
				b, err := yaml.Marshal(v)
				if err != nil {
					return err
				}
				fmt.Fprint(streams.Out, string(b))
			case "":
				fmt.Fprintf(streams.Out, "skep version: %s (%s, %s)\n", v.Skep, v.Go, v.Platform)
				fmt.Fprintf(streams.Out, "Client Version: %s\n", version.Get().GitVersion)
				if s, ok := v.ServerVersion.(fmt.Stringer); ok {
					fmt.Fprintf(streams.Out, "Server Version: %s\n", s)
				}
			default:
				return fail("--output %q is not known: use json or yaml", output)
			}
			return serverErr
		},
	}
	c.Flags().BoolVar(&clientOnly, "client", false, "Show only the version of this binary, ask no server")
	c.Flags().StringVarP(&output, "output", "o", "", "One of json or yaml")
	return c
}

func serverVersion(cmd *cobra.Command) (any, error) {
	config, err := clientConfig(cmd)
	if err != nil {
		return nil, fail("%w", err)
	}
	client, err := discovery.NewDiscoveryClientForConfig(config)
	if err != nil {
		return nil, err
	}
	info, err := client.ServerVersion()
	if err != nil {
		return nil, err
	}
	return info, nil
}
