// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/util/duration"
	"k8s.io/cli-runtime/pkg/genericiooptions"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	bootstrapapi "k8s.io/cluster-bootstrap/token/api"
	bootstraputil "k8s.io/cluster-bootstrap/token/util"

	"skep.io/skep/api"
	"skep.io/skep/node/join"
)

func newTokenCommand(streams genericiooptions.IOStreams) *cobra.Command {
	c := &cobra.Command{
		Use:   "token",
		Short: "Let machines join the cluster: make, list and revoke tokens",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	c.AddCommand(newTokenCreateCommand(streams), newTokenListCommand(streams), newTokenRevokeCommand(streams))
	return c
}

// tokenClient is a client of the cluster with its configuration.
func tokenClient(cmd *cobra.Command) (kubernetes.Interface, *rest.Config, error) {
	config, err := clientConfig(cmd)
	if err != nil {
		return nil, nil, fail("%w", err)
	}
	client, err := kubernetes.NewForConfig(config)
	return client, config, err
}

func newTokenCreateCommand(streams genericiooptions.IOStreams) *cobra.Command {
	var ttl time.Duration
	var description string
	var server bool
	c := &cobra.Command{
		Use:   "create",
		Short: "Make a token and print it",
		Long: "Make a token and print it. Whoever holds it can make any number of machines nodes of this cluster\n" +
			"until it expires or is revoked; machines that have joined stay. It also holds the hash of the\n" +
			"cluster's certificate authority, so that a machine sends it to no other server.",
		Example: "  skep token create --ttl 1h\n  skep agent --server https://HOST:6443 --token \"$TOKEN\"   # on the other machine",
		Args:    cobra.NoArgs, SilenceUsage: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if ttl < 0 {
				return fail("--ttl: %s is over already; 0 makes a token that never expires", ttl)
			}
			client, config, err := tokenClient(cmd)
			if err != nil {
				return err
			}
			authority, err := clusterAuthority(config)
			if err != nil {
				return fail("%w", err)
			}
			ctx, stop := untilSignal(cmd)
			defer stop()
			pair, err := bootstraputil.GenerateBootstrapToken()
			if err != nil {
				return err
			}
			group := api.BootstrapGroup
			if server {
				group = api.ServerBootstrapGroup
			}
			token := join.Token{Authority: join.Pin(authority)}
			token.ID, token.Secret, _ = strings.Cut(pair, ".")
			if _, err := client.CoreV1().Secrets(metav1.NamespaceSystem).Create(ctx, tokenSecret(token, group, ttl, description, time.Now()), metav1.CreateOptions{}); err != nil {
				return fail("make a token: %w", err)
			}
			fmt.Fprintln(streams.Out, token)
			return nil
		},
	}
	c.Flags().DurationVar(&ttl, "ttl", 24*time.Hour, "How long the token lets machines join; 0 for ever")
	c.Flags().BoolVar(&server, "for-server", false, "For `skep server --join` instead of `skep agent`: whoever holds it gets the cluster's keys")
	c.Flags().StringVar(&description, "description", "", "What the token is for, to find it in the list")
	return c
}

// tokenSecret is the form in which the API server keeps and knows a token.
func tokenSecret(t join.Token, group string, ttl time.Duration, description string, now time.Time) *corev1.Secret {
	s := &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: bootstraputil.BootstrapTokenSecretName(t.ID), Namespace: metav1.NamespaceSystem},
		Type:       bootstrapapi.SecretTypeBootstrapToken,
		StringData: map[string]string{
			bootstrapapi.BootstrapTokenIDKey:               t.ID,
			bootstrapapi.BootstrapTokenSecretKey:           t.Secret,
			bootstrapapi.BootstrapTokenUsageAuthentication: "true",
			bootstrapapi.BootstrapTokenExtraGroupsKey:      group,
		},
	}
	if description != "" {
		s.StringData[bootstrapapi.BootstrapTokenDescriptionKey] = description
	}
	if ttl > 0 {
		s.StringData[bootstrapapi.BootstrapTokenExpirationKey] = now.Add(ttl).UTC().Format(time.RFC3339)
	}
	return s
}

// clusterAuthority is the CA that a client configuration trusts.
func clusterAuthority(config *rest.Config) (*x509.Certificate, error) {
	if err := rest.LoadTLSFiles(config); err != nil {
		return nil, err
	}
	// Of two, while the cluster goes over to another, the first signs.
	block, _ := pem.Decode(config.CAData)
	if block == nil {
		return nil, errors.New("the client configuration names no certificate authority, which a token has to: use the one that the server wrote (" + api.KubeconfigPath + ")")
	}
	return x509.ParseCertificate(block.Bytes)
}

func newTokenListCommand(streams genericiooptions.IOStreams) *cobra.Command {
	return &cobra.Command{
		Use: "list", Aliases: []string{"ls"},
		Short: "List tokens, without their secrets",
		Args:  cobra.NoArgs, SilenceUsage: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, _, err := tokenClient(cmd)
			if err != nil {
				return err
			}
			ctx, stop := untilSignal(cmd)
			defer stop()
			list, err := client.CoreV1().Secrets(metav1.NamespaceSystem).List(ctx, metav1.ListOptions{
				FieldSelector: fields.OneTermEqualSelector("type", string(bootstrapapi.SecretTypeBootstrapToken)).String(),
			})
			if err != nil {
				return fail("list tokens: %w", err)
			}
			return printTokens(streams.Out, list.Items, time.Now())
		},
	}
}

func printTokens(out io.Writer, secrets []corev1.Secret, now time.Time) error {
	slices.SortFunc(secrets, func(a, b corev1.Secret) int { return cmp.Compare(a.Name, b.Name) })
	w := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
	fmt.Fprintln(w, "ID\tFOR\tEXPIRES IN\tAGE\tDESCRIPTION")
	for _, s := range secrets {
		expires := "never"
		if text, ok := s.Data[bootstrapapi.BootstrapTokenExpirationKey]; ok {
			at, err := time.Parse(time.RFC3339, string(text))
			switch {
			case err != nil:
				expires = "invalid"
			case !at.After(now):
				expires = "expired"
			default:
				expires = duration.HumanDuration(at.Sub(now))
			}
		}
		whom := "agents"
		if string(s.Data[bootstrapapi.BootstrapTokenExtraGroupsKey]) == api.ServerBootstrapGroup {
			whom = "servers"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", s.Data[bootstrapapi.BootstrapTokenIDKey], whom, expires,
			duration.HumanDuration(now.Sub(s.CreationTimestamp.Time)), cmp.Or(string(s.Data[bootstrapapi.BootstrapTokenDescriptionKey]), "-"))
	}
	return w.Flush()
}

func newTokenRevokeCommand(streams genericiooptions.IOStreams) *cobra.Command {
	return &cobra.Command{
		Use: "revoke ID|TOKEN...", Aliases: []string{"delete"},
		Short: "Revoke tokens: nobody can join with them any more, and machines that have joined stay",
		Args:  cobra.MinimumNArgs(1), SilenceUsage: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			var ids []string
			for _, arg := range args {
				id, err := tokenID(arg)
				if err != nil {
					return fail("%w", err)
				}
				ids = append(ids, id)
			}
			client, _, err := tokenClient(cmd)
			if err != nil {
				return err
			}
			ctx, stop := untilSignal(cmd)
			defer stop()
			return revokeTokens(ctx, client, ids, streams.Out)
		},
	}
}

func tokenID(arg string) (string, error) {
	if t, err := join.ParseToken(arg); err == nil {
		return t.ID, nil
	}
	if bootstraputil.IsValidBootstrapTokenID(arg) {
		return arg, nil
	}
	return "", errors.New("a token's ID has six characters (`skep token list` shows them); the whole token serves, too")
}

func revokeTokens(ctx context.Context, client kubernetes.Interface, ids []string, out io.Writer) error {
	var errs []error
	for _, id := range ids {
		err := client.CoreV1().Secrets(metav1.NamespaceSystem).Delete(ctx, bootstraputil.BootstrapTokenSecretName(id), metav1.DeleteOptions{})
		switch {
		case apierrors.IsNotFound(err):
			errs = append(errs, fmt.Errorf("there is no token %s (`skep token list` shows those there are)", id))
		case err != nil:
			errs = append(errs, fmt.Errorf("revoke token %s: %w", id, err))
		default:
			fmt.Fprintf(out, "token %s is revoked\n", id)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fail("%w", err)
	}
	return nil
}
