// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"k8s.io/cli-runtime/pkg/genericiooptions"

	"skep.io/skep/controlplane/apiserver"
	"skep.io/skep/controlplane/encryption"
	"skep.io/skep/controlplane/store"
)

// keysOfSecrets is the file of the keys that skep makes itself. It is among the authority's files, since whoever has the
// store needs it: snapshots have it, and servers that join get it.
func keysOfSecrets(dataDir string) encryption.File {
	return encryption.File(filepath.Join(dataDir, "server", "tls", "encryption.key"))
}

// prepareEncryption sees to it that Secrets are encrypted as the settings say.
func prepareEncryption(s serverSettings, m *membership) error {
	file := keysOfSecrets(s.dataDir)
	if s.access.EncryptionConfig != "" {
		if _, err := os.Stat(string(file)); err == nil {
			return fmt.Errorf("--encryption-provider-config: Secrets are encrypted with the keys of %s: run `skep secrets rotate` without --secrets-encryption, which decrypts them, and remove that file", file)
		}
		return nil
	}
	if m != nil {
		if err := sameForAll(file, s.secretsEncrypted, filepath.Join(s.dataDir, "server", "etcd"), m); err != nil {
			return err
		}
	}
	path, err := file.Prepare(s.secretsEncrypted)
	s.access.EncryptionConfig = path
	return err
}

// sameForAll refuses what would make one of several servers write what the others cannot read.
func sameForAll(file encryption.File, on bool, storeDir string, m *membership) error {
	_, err := os.Stat(storeDir)
	if errors.Is(err, fs.ErrNotExist) && m.Settings == nil {
		return nil // the first server, for the first time
	}
	ring, err := file.Read()
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if ring.On != on {
		return errors.New("--secrets-encryption: with several servers it is decided when the first one is made, and all of them have to be given it, or none")
	}
	return nil
}

// secretsOrders are what `skep secrets` asks of a running server.
func (p *process) secretsOrders(etcd *store.Store, orders *http.ServeMux) {
	log := p.log.With("part", "secrets")
	file := keysOfSecrets(p.settings.dataDir)
	own := p.settings.access.EncryptionConfig == string(file)
	var turn sync.Mutex // one rotation after the other
	active := func() (encryption.Stored, error) {
		if !own {
			return encryption.Plain, nil
		}
		ring, err := file.Read()
		return ring.Active(), err
	}
	orders.HandleFunc("POST /secrets/status", control(func(ctx context.Context, _ string) (secretsAnswer, error) {
		now, err := active()
		if err != nil {
			return secretsAnswer{}, err
		}
		report, err := encryption.Look(ctx, etcd.Client(), now)
		return secretsAnswer{Report: report, Config: p.settings.access.EncryptionConfig, Own: own}, err
	}))
	orders.HandleFunc("POST /secrets/rotate", control(func(ctx context.Context, _ string) (secretsAnswer, error) {
		turn.Lock()
		defer turn.Unlock()
		answer := secretsAnswer{Config: p.settings.access.EncryptionConfig, Own: own}
		var err error
		switch {
		case p.settings.access.EncryptionConfig == "":
			return answer, apiserver.ErrNotEncrypted
		case !own:
			if err = p.server.ReloadEncryption(); err == nil {
				answer.Rewritten, err = p.server.Rewrite(ctx)
			}
		default:
			var keys encryption.Keys = encryption.OneServer{File: file, Reload: p.server.ReloadEncryption}
			if p.agreed != nil {
				keys = p.agreed.keys(etcd)
			}
			answer.Report, err = encryption.Rotator{Keys: keys, Rewrite: p.server.Rewrite, KV: etcd.Client()}.Rotate(ctx)
		}
		if err == nil {
			log.Info("encryption of the store has been renewed", "active", answer.Active.String())
		}
		return answer, err
	}))
}

// secretsAnswer is what a server says about encryption.
type secretsAnswer struct {
	encryption.Report
	Config    string `json:"config,omitempty"` // the file of keys
	Own       bool   `json:"own"`              // whether skep keeps it
	Rewritten int    `json:"rewritten"`        // objects, if it does not
}

func newSecretsCommand(streams genericiooptions.IOStreams) *cobra.Command {
	c := &cobra.Command{
		Use:   "secrets",
		Short: "Show how Secrets are encrypted in the store, and change the key",
		Long: "Show how Secrets are encrypted in the store, and change the key. A server that was started with\n" +
			"--secrets-encryption makes its keys itself; with --encryption-provider-config they are the administrator's.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	status := &cobra.Command{
		Use:   "status",
		Short: "Count the Secrets of the store by the key that they are encrypted with",
		Args:  cobra.NoArgs, SilenceUsage: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := untilSignal(cmd)
			defer stop()
			answer, err := order[secretsAnswer](ctx, http.MethodPost, "/secrets/status", "")
			if err != nil {
				return fail("%w", err)
			}
			return printSecrets(streams.Out, answer)
		},
	}
	rotate := &cobra.Command{
		Use:   "rotate",
		Short: "Encrypt everything anew with a new key, and forget the earlier ones",
		Long: "Encrypt all Secrets anew with a new key, and forget the earlier ones when the store has nothing left that\n" +
			"needs them. Without --secrets-encryption, decrypt all that were encrypted before. With\n" +
			"--encryption-provider-config, read that file again and write everything that it names again: the keys that\n" +
			"are not the first in it can be removed then. Snapshots keep the keys of their time.",
		Args: cobra.NoArgs, SilenceUsage: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := untilSignal(cmd)
			defer stop()
			answer, err := order[secretsAnswer](ctx, http.MethodPost, "/secrets/rotate", "")
			if err != nil {
				return fail("%w", err)
			}
			if !answer.Own {
				fmt.Fprintf(streams.Out, "%d objects are written again, as %s says\n", answer.Rewritten, answer.Config)
				return nil
			}
			return printSecrets(streams.Out, answer)
		},
	}
	c.AddCommand(status, rotate)
	return c
}

func printSecrets(out io.Writer, a secretsAnswer) error {
	switch {
	case a.Config == "":
		fmt.Fprintln(out, "Secrets are not encrypted: start the server with --secrets-encryption")
	case a.Own:
		fmt.Fprintf(out, "Secrets are written: %s\n", a.Active)
	default:
		fmt.Fprintf(out, "Secrets are written as %s says\n", a.Config)
	}
	w := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
	fmt.Fprintln(w, "STORED\tSECRETS")
	for _, c := range a.Counts {
		fmt.Fprintf(w, "%s\t%d\n", c.Stored, c.Secrets)
	}
	return w.Flush()
}
