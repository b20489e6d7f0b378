// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"context"
	"fmt"
	"net"
	"os"
	"time"

	"skep.io/skep/controlplane/pki"
)

// certificates are the files that upstream reads, and reads again when they change.
type certificates struct {
	serving       pki.Files // what clients of the API see
	kubeletClient pki.Files // what nodes see when logs, exec and port-forward reach them
	frontProxy    pki.Files // what aggregated API servers and webhooks see
}

// kubeletClientUser may do everything with the node API (ClusterRole system:kubelet-api-admin by
// way of system:masters, as kubeadm has it).
const kubeletClientUser = "kube-apiserver-kubelet-client"

// renewEvery is how often certificates are looked at. They last a year and are renewed after two
// thirds of it; a new address of the host gets into the serving certificate this soon.
const renewEvery = 10 * time.Minute

func (c Config) certificates() (certificates, error) {
	var out certificates
	hostname, err := os.Hostname()
	if err != nil {
		return out, fmt.Errorf("apiserver: host name: %w", err)
	}
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return out, fmt.Errorf("apiserver: host addresses: %w", err)
	}
	if out.serving, err = c.PKI.ServerFiles("apiserver", "kube-apiserver", c.servingNames(hostname, addrs)); err != nil {
		return out, err
	}
	if out.kubeletClient, err = c.PKI.ClientFiles("apiserver-kubelet-client", kubeletClientUser, []string{"system:masters"}); err != nil {
		return out, err
	}
	out.frontProxy, err = c.PKI.FrontProxyClientFiles()
	return out, err
}

// renewCertificates keeps the files fresh until ctx ends; upstream's file watchers do the rest.
func (s *Server) renewCertificates(ctx context.Context) {
	tick := time.NewTicker(renewEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if _, err := s.cfg.certificates(); err != nil {
			s.cfg.Log.Error("renew certificates", "error", err)
		}
	}
}
