// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"errors"
	"fmt"
	"os"

	"github.com/spf13/pflag"
	apiserverconfig "k8s.io/apiserver/pkg/apis/apiserver"
	"k8s.io/apiserver/pkg/authentication/authenticator"
	"k8s.io/apiserver/pkg/authentication/request/anonymous"
	authenticatorunion "k8s.io/apiserver/pkg/authentication/request/union"
	genericoptions "k8s.io/apiserver/pkg/server/options"
	"k8s.io/kubernetes/cmd/kube-apiserver/app/options"
	kubeoptions "k8s.io/kubernetes/pkg/kubeapiserver/options"
	"sigs.k8s.io/yaml"
)

// Access says who else may use the API, what is written down about its use, and how objects are encrypted in the
// store. Its flags have the names and the meaning that they have in kube-apiserver. NewAccess has the defaults.
type Access struct {
	audit          *genericoptions.AuditOptions
	authentication *kubeoptions.BuiltInAuthenticationOptions
	// EncryptionConfig is the path of an EncryptionConfiguration (apiserver.config.k8s.io/v1), empty for none.
	EncryptionConfig string
}

// NewAccess is nobody else, nothing, and not at all; anonymous requests are answered about health only.
func NewAccess() *Access {
	a := &Access{
		audit:          genericoptions.NewAuditOptions(),
		authentication: kubeoptions.NewBuiltInAuthenticationOptions().WithOIDC().WithAnonymous(),
	}
	a.authentication.Anonymous.Allow = false
	return a
}

// accessFlags are those of kube-apiserver's flags that Access has.
var accessFlags = []string{
	"audit-policy-file", "audit-log-path", "audit-log-maxage", "audit-log-maxbackup", "audit-log-maxsize", "audit-log-compress",
	"audit-log-mode", "audit-webhook-config-file",
	"authentication-config", "anonymous-auth",
	"oidc-issuer-url", "oidc-client-id", "oidc-ca-file", "oidc-username-claim", "oidc-username-prefix", "oidc-groups-claim",
	"oidc-groups-prefix", "oidc-signing-algs", "oidc-required-claim",
}

// AddFlags adds the flags to f.
func (a *Access) AddFlags(f *pflag.FlagSet) {
	all := pflag.NewFlagSet("", pflag.ContinueOnError)
	a.audit.AddFlags(all)
	a.authentication.AddFlags(all)
	for _, name := range accessFlags {
		f.AddFlag(all.Lookup(name))
	}
	f.StringVar(&a.EncryptionConfig, "encryption-provider-config", "", "File that says with which keys, or by which KMS, objects are encrypted in the store; `skep secrets rotate` reads it again")
}

// Validate says what does not fit together; what upstream checks at start is not checked here.
func (a *Access) Validate() error {
	var errs []error
	if a.audit.PolicyFile == "" && (a.audit.LogOptions.Path != "" || a.audit.WebhookOptions.ConfigFile != "") {
		errs = append(errs, errors.New("--audit-policy-file: without a policy nothing is audited: give one, such as a file with `{apiVersion: audit.k8s.io/v1, kind: Policy, rules: [{level: Metadata}]}`"))
	}
	if a.audit.PolicyFile != "" && a.audit.LogOptions.Path == "" && a.audit.WebhookOptions.ConfigFile == "" {
		errs = append(errs, errors.New("--audit-log-path: say where audit events go, or give --audit-webhook-config-file"))
	}
	errs = append(errs, a.audit.Validate()...)
	errs = append(errs, a.authentication.Validate()...)
	return errors.Join(errs...)
}

// applyTo says in upstream's words what a says.
func (a *Access) applyTo(o *options.ServerRunOptions) {
	o.Audit = a.audit
	o.Authentication.OIDC = a.authentication.OIDC
	o.Authentication.AuthenticationConfigFile = a.authentication.AuthenticationConfigFile
	o.Authentication.Anonymous = a.authentication.Anonymous
}

// healthPaths are answered to everybody, so that load balancers and supervisors need no credentials.
var healthPaths = []apiserverconfig.AnonymousAuthCondition{{Path: "/healthz"}, {Path: "/livez"}, {Path: "/readyz"}}

// orHealth adds anonymous requests about health to what next authenticates. Who shows credentials that do not hold is
// refused there, too. What the administrator says about anonymous requests is as he says.
func (a *Access) orHealth(next authenticator.Request) (authenticator.Request, error) {
	decided, err := a.decidesAnonymous()
	if err != nil || decided {
		return next, err
	}
	return authenticatorunion.NewFailOnError(next, anonymous.NewAuthenticator(healthPaths)), nil
}

func (a *Access) decidesAnonymous() (bool, error) {
	if a.authentication.Anonymous.Allow {
		return true, nil
	}
	path := a.authentication.AuthenticationConfigFile
	if path == "" {
		return false, nil
	}
	raw, err := os.ReadFile(path)
	if err != nil {
		return false, fmt.Errorf("--authentication-config: %w", err)
	}
	var file struct { // in every version of its kind
		Anonymous *struct{} `json:"anonymous"`
	}
	if err := yaml.Unmarshal(raw, &file); err != nil {
		return false, fmt.Errorf("--authentication-config %s: %w", path, err)
	}
	return file.Anonymous != nil, nil
}
