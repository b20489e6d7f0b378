// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"context"
	"fmt"
	"io"
	"net"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	utilerrors "k8s.io/apimachinery/pkg/util/errors"
	utilnet "k8s.io/apimachinery/pkg/util/net"
	"k8s.io/apiserver/pkg/admission"
	"k8s.io/kubernetes/cmd/kube-apiserver/app/options"
	"k8s.io/kubernetes/pkg/controlplane/reconcilers"
	"k8s.io/kubernetes/pkg/kubeapiserver/authorizer/modes"

	"skep.io/skep/api"
	"skep.io/skep/controlplane/apiserver/podpreset"
	"skep.io/skep/controlplane/pki"
)

// upstreamOptions says in upstream's words what cfg says; what is not set here is upstream's
// default, among it the admission plugins.
func upstreamOptions(ctx context.Context, cfg Config, certs certificates, listener net.Listener, etcd string, presets *podpreset.Plugin) (options.CompletedOptions, error) {
	o := options.NewServerRunOptions()

	o.Etcd.StorageConfig.Transport.ServerList = []string{etcd}
	o.Etcd.StorageConfig.CompactionInterval = cfg.CompactionInterval

	o.SecureServing.Listener = listener
	o.SecureServing.BindAddress = cfg.BindAddress
	o.SecureServing.BindPort = cfg.Port
	o.SecureServing.ServerCert.CertKey.CertFile = certs.serving.Cert
	o.SecureServing.ServerCert.CertKey.KeyFile = certs.serving.Key

	o.GenericServerRunOptions.AdvertiseAddress = cfg.AdvertiseAddress
	o.GenericServerRunOptions.RequestTimeout = cfg.RequestTimeout
	// At the end, end watches (which otherwise hold the port's connections for a minute), answer
	// what is in progress, then close connections; what is still open after two seconds, such as
	// `logs -f`, is cut.
	o.GenericServerRunOptions.ShutdownWatchTerminationGracePeriod = 5 * time.Second
	o.GenericServerRunOptions.ShutdownSendRetryAfter = true
	o.Features.EnableProfiling = false // /debug belongs to the process, not to the API

	cfg.Access.applyTo(o)
	o.Authentication.ClientCert.ClientCA = cfg.PKI.TrustedFile()
	o.Authentication.BootstrapToken.Enable = true
	o.Authentication.RequestHeader.ClientCAFile = cfg.PKI.FrontProxyCAFile()
	o.Authentication.RequestHeader.AllowedNames = []string{pki.FrontProxyClientName}
	o.Authentication.RequestHeader.UsernameHeaders = []string{"X-Remote-User"}
	o.Authentication.RequestHeader.GroupHeaders = []string{"X-Remote-Group"}
	o.Authentication.RequestHeader.UIDHeaders = []string{"X-Remote-Uid"}
	o.Authentication.RequestHeader.ExtraHeaderPrefixes = []string{"X-Remote-Extra-"}
	o.Authentication.ServiceAccounts.Issuers = []string{cfg.issuer()}
	o.Authentication.ServiceAccounts.KeyFiles = []string{cfg.PKI.ServiceAccountKeyFile()}
	o.ServiceAccountSigningKeyFile = cfg.PKI.ServiceAccountKeyFile()

	o.Authorization.Modes = []string{modes.ModeNode, modes.ModeRBAC}
	o.Admission.GenericAdmission.EnablePlugins = []string{"NodeRestriction", podpreset.PluginName}
	o.Admission.GenericAdmission.Plugins.Register(podpreset.PluginName, func(io.Reader) (admission.Interface, error) { return presets, nil })
	// Before whatever looks at containers and volumes.
	order := o.Admission.GenericAdmission.RecommendedPluginOrder
	o.Admission.GenericAdmission.RecommendedPluginOrder = slices.Insert(slices.Clone(order), slices.Index(order, "LimitRanger"), podpreset.PluginName)

	o.ProxyClientCertFile, o.ProxyClientKeyFile = certs.frontProxy.Cert, certs.frontProxy.Key
	// Aggregated API servers and webhooks are called at their pods: the server need not be on a
	// node whose data plane knows ClusterIPs.
	o.EnableAggregatorRouting = true

	o.AllowPrivileged = true
	o.ServiceClusterIPRanges = cfg.serviceCIDRList()
	ports, err := utilnet.ParsePortRange(cfg.NodePortRange)
	if err != nil {
		return options.CompletedOptions{}, fmt.Errorf("NodePortRange: %w", err)
	}
	o.ServiceNodePortRange = *ports
	// One server: nobody else's lease is to be watched, so nothing is written every ten seconds.
	o.EndpointReconcilerType, o.MasterCount = string(reconcilers.MasterCountReconcilerType), 1
	if cfg.Clustered {
		// The Service "kubernetes" has who renews its lease: fifteen seconds after a server has died it is out.
		o.EndpointReconcilerType = string(reconcilers.LeaseEndpointReconcilerType)
	}

	o.KubeletConfig.Port = api.DefaultNodeAPIPort
	o.KubeletConfig.PreferredAddressTypes = []string{
		string(corev1.NodeInternalIP), string(corev1.NodeExternalIP), string(corev1.NodeHostName),
	}
	o.KubeletConfig.TLSClientConfig.CAFile = cfg.PKI.TrustedFile()
	o.KubeletConfig.TLSClientConfig.CertFile = certs.kubeletClient.Cert
	o.KubeletConfig.TLSClientConfig.KeyFile = certs.kubeletClient.Key

	completed, err := o.Complete(ctx)
	if err != nil {
		return completed, err
	}
	return completed, utilerrors.NewAggregate(completed.Validate())
}
