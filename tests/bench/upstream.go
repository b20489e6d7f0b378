// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"time"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"skep.io/skep/controlplane/pki"
	"skep.io/skep/tests/cluster"
)

// upstreamPrograms are the control plane as upstream ships it, of the versions in go.mod.
var upstreamPrograms = map[string]string{
	"etcd":                    "go.etcd.io/etcd/server/v3",
	"kube-apiserver":          "k8s.io/kubernetes/cmd/kube-apiserver",
	"kube-controller-manager": "k8s.io/kubernetes/cmd/kube-controller-manager",
	"kube-scheduler":          "k8s.io/kubernetes/cmd/kube-scheduler",
}

// buildUpstream builds the programs into dir. It uses a copy of go.mod, because the programs need
// modules that skep does not.
func buildUpstream(ctx context.Context, dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for _, name := range []string{"go.mod", "go.sum"} {
		data, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o644); err != nil {
			return err
		}
	}
	for name, source := range upstreamPrograms {
		build := exec.CommandContext(ctx, "go", "build", "-mod=mod", "-modfile="+filepath.Join(dir, "go.mod"),
			"-ldflags", "-s -w", "-o", filepath.Join(dir, name), source)
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			return fmt.Errorf("build %s: %w\n%s", name, err, out)
		}
	}
	return nil
}

// upstream is upstream's control plane on a machine of its own, with the flags it cannot do without.
// It has no node.
type upstream struct {
	machine  *cluster.LAN
	bin, dir string
	files    upstreamFiles
	config   *rest.Config
	running  []*exec.Cmd
}

type upstreamFiles struct {
	ca, cert, key, serviceAccount, kubeconfig string
}

func (b *bench) newUpstream(ctx context.Context, name string) (*upstream, error) {
	bin := filepath.Join(".build", "upstream")
	if err := buildUpstream(ctx, bin); err != nil {
		return nil, err
	}
	u := &upstream{bin: bin, dir: filepath.Join(b.dir, name)}
	if err := u.credentials(); err != nil {
		return nil, err
	}
	var err error
	u.machine, err = cluster.NewLAN(fmt.Sprintf("bench-%s-%d", name, os.Getpid()))
	return u, err
}

const upstreamURL = "https://127.0.0.1:6443"

func (u *upstream) credentials() error {
	authority, err := pki.Open(filepath.Join(u.dir, "tls"))
	if err != nil {
		return err
	}
	server, err := authority.ServerFiles("apiserver", "kube-apiserver", []string{"127.0.0.1"})
	if err != nil {
		return err
	}
	cert, key, err := authority.IssueClient("kubernetes-admin", []string{"system:masters"})
	if err != nil {
		return err
	}
	u.files = upstreamFiles{
		ca: authority.CAFile(), cert: server.Cert, key: server.Key,
		serviceAccount: authority.ServiceAccountKeyFile(), kubeconfig: filepath.Join(u.dir, "kubeconfig"),
	}
	u.config = &rest.Config{Host: upstreamURL, TLSClientConfig: rest.TLSClientConfig{CAData: authority.CAPEM(), CertData: cert, KeyData: key}}
	return pki.WriteKubeconfig(u.files.kubeconfig, upstreamURL, authority.CAPEM(), cert, key)
}

// start runs etcd and the API server, and returns after how long it served; then the others, and
// returns after how long all were ready.
func (u *upstream) start(ctx context.Context) (serving, ready time.Duration, err error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	begin := time.Now()
	if err := u.run("etcd", "--data-dir", filepath.Join(u.dir, "etcd")); err != nil {
		return 0, 0, err
	}
	if err := u.await(ctx, "http://127.0.0.1:2379/health"); err != nil {
		return 0, 0, err
	}
	f := u.files
	err = u.run("kube-apiserver", "--etcd-servers", "http://127.0.0.1:2379", "--advertise-address", "192.0.2.1", "--bind-address", "127.0.0.1",
		"--tls-cert-file", f.cert, "--tls-private-key-file", f.key, "--client-ca-file", f.ca, "--authorization-mode", "Node,RBAC",
		"--enable-admission-plugins", "NodeRestriction", "--service-cluster-ip-range", "10.43.0.0/16",
		"--service-account-issuer", "https://kubernetes.default.svc", "--service-account-key-file", f.serviceAccount,
		"--service-account-signing-key-file", f.serviceAccount)
	if err != nil {
		return 0, 0, err
	}
	if err := u.await(ctx, upstreamURL+"/readyz"); err != nil {
		return 0, 0, err
	}
	serving = time.Since(begin)
	if err := u.run("kube-controller-manager", "--kubeconfig", f.kubeconfig, "--bind-address", "127.0.0.1", "--root-ca-file", f.ca,
		"--service-account-private-key-file", f.serviceAccount, "--use-service-account-credentials", "--node-monitor-grace-period", patience,
		"--cert-dir", filepath.Join(u.dir, "controller-manager")); err != nil {
		return 0, 0, err
	}
	if err := u.run("kube-scheduler", "--kubeconfig", f.kubeconfig, "--bind-address", "127.0.0.1",
		"--cert-dir", filepath.Join(u.dir, "scheduler")); err != nil {
		return 0, 0, err
	}
	if err := u.await(ctx, "https://127.0.0.1:10259/readyz"); err != nil {
		return 0, 0, err
	}
	config := rest.CopyConfig(u.config)
	config.Dial = u.machine.Dial
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return 0, 0, err
	}
	err = awaitServiceAccount(ctx, client)
	return serving, time.Since(begin), err
}

func (u *upstream) run(program string, args ...string) error {
	path, err := filepath.Abs(filepath.Join(u.bin, program))
	if err != nil {
		return err
	}
	log, err := os.Create(filepath.Join(u.dir, program+".log"))
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := u.machine.Command(context.Background(), append([]string{path}, args...)...)
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		return err
	}
	u.running = append(u.running, cmd)
	return nil
}

// await asks until the answer is 200. What serves it made its own certificate a moment ago.
func (u *upstream) await(ctx context.Context, url string) error {
	err := awaitPage(ctx, &http.Client{Timeout: time.Second, Transport: &http.Transport{
		DialContext: u.machine.Dial, DisableKeepAlives: true,
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, //nolint:gosec // on a machine of our own, and nothing is sent
	}}, url)
	if err != nil {
		return fmt.Errorf("%w; logs: %s", err, u.dir)
	}
	return nil
}

// use sums what the programs take.
func (u *upstream) use() (cluster.ProcessUse, error) {
	var total cluster.ProcessUse
	for _, cmd := range u.running {
		use, err := cluster.UseOf(cmd.Process.Pid)
		if err != nil {
			return total, fmt.Errorf("%s: %w", cmd.Path, err)
		}
		total.RSS += use.RSS
		total.PSS += use.PSS
		total.CPU += use.CPU
	}
	return total, nil
}

// stop ends the programs, the last started first, and their machine.
func (u *upstream) stop() error {
	var errs []error
	for _, cmd := range slices.Backward(u.running) {
		errs = append(errs, cmd.Process.Kill())
		_ = cmd.Wait() // says that it was killed
	}
	u.machine.Close()
	return errors.Join(errs...)
}
