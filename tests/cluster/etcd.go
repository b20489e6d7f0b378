// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"strconv"

	"go.etcd.io/etcd/client/pkg/v3/transport"
	"go.etcd.io/etcd/server/v3/embed"

	"skep.io/skep/controlplane/pki"
)

// etcdMain is an etcd on the machine it runs on, as others run one: its data, its authority (tls/ca.crt), a client's
// certificate and key (tls/client.pem) and its process id (pid) are in the directory that it is given. Its clients need
// a certificate. It prints its URL, and ends with its standard input.
func etcdMain(args []string) error {
	if len(args) != 1 {
		return errors.New("usage: etcd DIRECTORY")
	}
	ca, err := pki.Open(filepath.Join(args[0], "tls"))
	if err != nil {
		return err
	}
	files, err := ca.ServerFiles("server", "etcd", []string{"127.0.0.1"})
	if err != nil {
		return err
	}
	if _, err := ca.ClientFiles("client", "skep", nil); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(args[0], "pid"), []byte(strconv.Itoa(os.Getpid())), 0o600); err != nil {
		return err
	}
	self := url.URL{Scheme: "https", Host: "127.0.0.1:2379"}
	cfg := embed.NewConfig()
	cfg.Dir, cfg.LogLevel = filepath.Join(args[0], "data"), "fatal"
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = []url.URL{self}, []url.URL{self}
	cfg.ClientTLSInfo = transport.TLSInfo{CertFile: files.Cert, KeyFile: files.Key, TrustedCAFile: ca.CAFile(), ClientCertAuth: true}
	etcd, err := embed.StartEtcd(cfg)
	if err != nil {
		return err
	}
	defer etcd.Close()
	ended := make(chan error, 1)
	go func() {
		_, err := io.Copy(io.Discard, os.Stdin)
		ended <- err
	}()
	select {
	case <-etcd.Server.ReadyNotify():
	case err := <-etcd.Err():
		return err
	case err := <-ended:
		return err
	}
	fmt.Println(self.String())
	select {
	case err := <-etcd.Err():
		return err
	case err := <-ended:
		return err
	}
}
