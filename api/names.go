// SPDX-License-Identifier: Apache-2.0

// Package api holds what every part of skep agrees on: places on a host, names of objects and
// labels, and default ranges. Kubernetes' own types come from k8s.io/api.
package api

// Places on a host. All but the data directory are fixed, so that an agent that starts anew, and
// `skep reset`, find what an earlier process left.
const (
	// DefaultDataDir keeps what must survive a reboot: etcd, certificates, images, containers.
	DefaultDataDir = "/var/lib/skep"
	// RunDir keeps what must not survive a reboot: namespaces, sockets, containerd's state.
	RunDir = "/run/skep"
	// BPFDir is where maps, programs and links are pinned.
	BPFDir = "/sys/fs/bpf/skep"
	// ConfigDir keeps what people edit or read.
	ConfigDir = "/etc/skep"
	// KubeconfigPath is the administrator's client configuration, mode 0600.
	KubeconfigPath = ConfigDir + "/kubeconfig"
	// ServerConfigPath is read by `skep server` when no --config is given and the file exists.
	ServerConfigPath = ConfigDir + "/server.yaml"
	// AgentConfigPath is the same for `skep agent`.
	AgentConfigPath = ConfigDir + "/agent.yaml"
	// RegistryConfigDir says where images come from instead, and whom to trust there, registry by registry.
	RegistryConfigDir = ConfigDir + "/certs.d"
	// PodLogsDir has the layout that log collectors know from kubelet:
	// NAMESPACE_NAME_UID/CONTAINER/ATTEMPT.log.
	PodLogsDir = "/var/log/pods"
)

// Defaults of the server's flags.
const (
	DefaultClusterCIDR   = "10.42.0.0/16,fd73:6b65:7042::/48"
	DefaultServiceCIDR   = "10.43.0.0/16,fd73:6b65:7043::/112"
	DefaultClusterDomain = "cluster.local"
	DefaultAPIPort       = 6443
	DefaultNodeAPIPort   = 10250
	DefaultPeerPort      = 2380 // where servers reach each other's part of the store
)

// Names of objects that skep itself creates.
const (
	// DNSServiceName, in kube-system, holds the tenth address of each service range.
	DNSServiceName = "kube-dns"
	// NodeLocalAnnotation marks a Service whose ClusterIP every node answers itself, on device
	// skep0: the data plane loads no frontend for it.
	NodeLocalAnnotation = "skep.io/node-local"
	// IngressClassName is the default IngressClass, with IngressControllerName as its controller.
	IngressClassName      = "skep"
	IngressControllerName = "skep.io/ingress"
	// LocalPathClassName is the default StorageClass, with LocalPathProvisioner as its provisioner;
	// LocalPathAnnotation on a Node is the directory below which that node keeps such volumes.
	LocalPathClassName   = "local-path"
	LocalPathProvisioner = "skep.io/local-path"
	LocalPathAnnotation  = "skep.io/local-path"
	// BootstrapGroup is whom tokens of `skep token create` authenticate as, besides their id.
	BootstrapGroup = "system:bootstrappers:skep:agents"
	// ServerBootstrapGroup is whom tokens of `skep token create --for-server` authenticate as, and JoinPath what they may
	// ask for: the cluster's keys, and a place among its servers.
	ServerBootstrapGroup = "system:bootstrappers:skep:servers"
	JoinPath             = "/skep/v1/join"
	// InformersUser, IngressUser and BootstrapUser are parts of a server that act within its process.
	// Their roles have the same names.
	InformersUser = "system:skep:informers"
	IngressUser   = "system:skep:ingress"
	BootstrapUser = "system:skep:bootstrap"
	// ClusterConfigMap, in kube-system, tells nodes what they have to agree on: its keys are flags of
	// `skep server`.
	ClusterConfigMap = "skep-cluster"
	// AuthoritiesKey in it has the certificates of the authorities to trust, in PEM, the one that signs first. On its Node
	// a machine says by the annotations whom it trusts and who signed its certificate.
	AuthoritiesKey               = "certificate-authorities"
	TrustedAuthoritiesAnnotation = "skep.io/trusted-authorities"
	AuthorityAnnotation          = "skep.io/certificate-authority"

	// AlgorithmAnnotation on a Service says how its packets choose a backend: AlgorithmMaglev or AlgorithmRandom.
	// Without it, those that come from outside choose by Maglev. Sockets choose at random.
	AlgorithmAnnotation = "skep.io/lb-algorithm"
	AlgorithmMaglev     = "maglev"
	AlgorithmRandom     = "random"

	// AddressPoolAnnotation on a Service of type LoadBalancer names the AddressPool to take from, and
	// AddressesAnnotation the addresses, one a family, separated by commas.
	AddressPoolAnnotation = "skep.io/address-pool"
	AddressesAnnotation   = "skep.io/load-balancer-ips"
	// LoadBalancerClassPool and LoadBalancerClassNode, as a Service's loadBalancerClass, ask for an address of a
	// pool, or for the nodes' own; without a class it is a pool's if there is a pool.
	LoadBalancerClassPool = "skep.io/pool"
	LoadBalancerClassNode = "skep.io/node"
	// AnnouncedCondition of a Service whose addresses are a pool's: its message is the name of the node that
	// announces them.
	AnnouncedCondition = "skep.io/Announced"
)
