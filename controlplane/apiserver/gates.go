// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"fmt"
	"sync"

	apimachineryversion "k8s.io/apimachinery/pkg/version"
	genericfeatures "k8s.io/apiserver/pkg/features"
	"k8s.io/apiserver/pkg/util/compatibility"
	utilfeature "k8s.io/apiserver/pkg/util/feature"
	"k8s.io/client-go/rest"
	basecompatibility "k8s.io/component-base/compatibility"
	baseversion "k8s.io/component-base/version"
)

// featureGates differ from upstream's defaults. They are process-wide upstream, so all servers of
// one process share them.
var featureGates = map[string]bool{
	// One server has no peers: its identity lease would be a write every ten seconds.
	string(genericfeatures.APIServerIdentity):                   false,
	string(genericfeatures.UnknownVersionInteroperabilityProxy): false,
}

// setProcessWide does what upstream's main does to its process-wide settings, once.
var setProcessWide = sync.OnceValue(func() error {
	if err := utilfeature.DefaultMutableFeatureGate.SetFromMap(featureGates); err != nil {
		return fmt.Errorf("feature gates: %w", err)
	}
	if err := compatibility.DefaultComponentGlobalsRegistry.SetFallback(); err != nil {
		return fmt.Errorf("feature gates: %w", err)
	}
	// In-process clients would log the deprecation warnings that are meant for people.
	rest.SetDefaultWarningHandler(rest.NoWarnings{})
	useInProcessEtcd()
	return nil
})

// effectiveVersion answers /version. The linker sets component-base's version in a release
// (-X k8s.io/component-base/version.gitVersion=...); without that, and so in tests, it says a
// placeholder that no client can parse, and the version of the module is told instead.
type effectiveVersion struct {
	basecompatibility.EffectiveVersion
}

func (v effectiveVersion) Info() *apimachineryversion.Info {
	info := v.EffectiveVersion.Info()
	if v := baseversion.Get(); v.Major == "" || v.GitVersion[:2] == "v0" {
		info.GitVersion = kubernetesVersion + "+skep"
		info.GitCommit, info.GitTreeState = "", "clean"
	}
	return info
}

// kubernetesVersion is the version of k8s.io/kubernetes in go.mod. (A program could read it from
// its build information; a test binary has none.)
const kubernetesVersion = "v1.36.3"
