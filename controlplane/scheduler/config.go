// SPDX-License-Identifier: Apache-2.0

package scheduler

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"slices"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation"
	componentbaseconfig "k8s.io/component-base/config/v1alpha1"
	configv1 "k8s.io/kube-scheduler/config/v1"
	"k8s.io/kubernetes/pkg/scheduler/framework/plugins/names"
	"sigs.k8s.io/yaml"
)

// configLimit is how large a configuration may be, in bytes.
const configLimit = 1 << 20

// LoadProfiles reads a file with a KubeSchedulerConfiguration.
func LoadProfiles(path string) (Profiles, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	profiles, err := parseProfiles(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return profiles, nil
}

// parseProfiles reads what has a meaning here, and refuses the rest by name: a setting that is ignored is worse than
// one that is missed.
func parseProfiles(data []byte) (Profiles, error) {
	if len(data) > configLimit {
		return nil, fmt.Errorf("%d bytes are too many: at most %d", len(data), configLimit)
	}
	var c configv1.KubeSchedulerConfiguration
	if err := yaml.UnmarshalStrict(data, &c); err != nil {
		return nil, err
	}
	if want := configv1.SchemeGroupVersion.String(); c.APIVersion != want || c.Kind != "KubeSchedulerConfiguration" {
		return nil, fmt.Errorf("apiVersion %q, kind %q: must be %s, KubeSchedulerConfiguration", c.APIVersion, c.Kind, want)
	}
	errs := unsupported(&c)
	profiles := Profiles{}
	for i := range c.Profiles {
		p := &c.Profiles[i]
		name := Name
		switch {
		case p.SchedulerName != nil && *p.SchedulerName != "":
			name = *p.SchedulerName
		case len(c.Profiles) > 1:
			errs = append(errs, fmt.Errorf("profiles[%d].schedulerName: required, as there are several", i))
		}
		for _, problem := range validation.IsDNS1123Subdomain(name) {
			errs = append(errs, fmt.Errorf("profiles[%d].schedulerName: %q: %s", i, name, problem))
		}
		if profiles[name] != nil {
			errs = append(errs, fmt.Errorf("profiles[%d].schedulerName: there are several profiles of %q", i, name))
		}
		profiles[name] = newProfile(name)
		for _, err := range profiles[name].configure(p) {
			errs = append(errs, fmt.Errorf("profiles[%d].%w", i, err))
		}
	}
	if len(c.Profiles) == 0 {
		profiles = DefaultProfiles()
	}
	return profiles, errors.Join(errs...)
}

// unsupported names what is set of upstream's settings that have no meaning here.
func unsupported(c *configv1.KubeSchedulerConfiguration) (errs []error) {
	for _, setting := range []struct {
		name   string
		set    bool
		remedy string
	}{
		{"parallelism", c.Parallelism != nil, "a decision is made by one processor"},
		{"leaderElection", c.LeaderElection != componentbaseconfig.LeaderElectionConfiguration{}, "skep's servers elect one of them for all that it runs"},
		{"clientConnection", c.ClientConnection != componentbaseconfig.ClientConnectionConfiguration{}, "the scheduler is in the API server's process"},
		{"enableProfiling", c.EnableProfiling != nil, "not a setting of skep's"},
		{"enableContentionProfiling", c.EnableContentionProfiling != nil, "not a setting of skep's"},
		{"percentageOfNodesToScore", c.PercentageOfNodesToScore != nil, "100 nodes that fit are compared in a cluster of any size"},
		{"podInitialBackoffSeconds", c.PodInitialBackoffSeconds != nil, "pods wait for an event that helps them"},
		{"podMaxBackoffSeconds", c.PodMaxBackoffSeconds != nil, "pods wait for an event that helps them"},
		{"extenders", len(c.Extenders) > 0, "run a scheduler of your own beside this one, under another schedulerName"},
		{"delayCacheUntilActive", c.DelayCacheUntilActive, "only the server that leads has the scheduler's caches"},
	} {
		if setting.set {
			errs = append(errs, fmt.Errorf("%s: skep has no such setting (%s): remove it", setting.name, setting.remedy))
		}
	}
	return errs
}

// plugins are upstream's names of what skep's filters, scores and the rest do.
var plugins = []string{
	names.SchedulingGates, names.PrioritySort, names.NodeUnschedulable, names.NodeName, names.TaintToleration, names.NodeAffinity, names.NodePorts,
	names.NodeResourcesFit, names.VolumeRestrictions, names.VolumeBinding, names.PodTopologySpread, names.InterPodAffinity,
	names.NodeResourcesBalancedAllocation, names.ImageLocality, names.DefaultPreemption, names.DefaultBinder,
}

// configure applies a profile; errors begin with the name of a field of it.
func (p *profile) configure(from *configv1.KubeSchedulerProfile) (errs []error) {
	if from.PercentageOfNodesToScore != nil {
		errs = append(errs, errors.New("percentageOfNodesToScore: skep has no such setting (100 nodes that fit are compared in a cluster of any size): remove it"))
	}
	if from.Plugins != nil {
		errs = append(errs, p.configurePlugins(from.Plugins)...)
	}
	var seen []string
	for i := range from.PluginConfig {
		of := &from.PluginConfig[i]
		if slices.Contains(seen, of.Name) {
			errs = append(errs, fmt.Errorf("pluginConfig[%d]: there are several of %s", i, of.Name))
		}
		seen = append(seen, of.Name)
		if err := p.configurePlugin(of); err != nil {
			errs = append(errs, fmt.Errorf("pluginConfig[%d]: %s: %w", i, of.Name, err))
		}
	}
	return errs
}

func (p *profile) configurePlugins(from *configv1.Plugins) (errs []error) {
	for _, point := range []struct {
		name string
		of   configv1.PluginSet
	}{
		{"preEnqueue", from.PreEnqueue}, {"queueSort", from.QueueSort}, {"preFilter", from.PreFilter}, {"filter", from.Filter},
		{"postFilter", from.PostFilter}, {"preScore", from.PreScore}, {"reserve", from.Reserve}, {"permit", from.Permit},
		{"preBind", from.PreBind}, {"bind", from.Bind}, {"postBind", from.PostBind},
		{"placementGenerate", from.PlacementGenerate}, {"placementScore", from.PlacementScore},
	} {
		if len(point.of.Enabled)+len(point.of.Disabled) > 0 {
			errs = append(errs, fmt.Errorf("plugins.%s: only scores can be chosen here, under plugins.score: remove it", point.name))
		}
	}
	// What is said of score holds against what is said of all points.
	return append(errs, append(p.choose("plugins.multiPoint", from.MultiPoint, false), p.choose("plugins.score", from.Score, true)...)...)
}

// choose applies a set of plugins as upstream merges it with the defaults: what is enabled counts, also if it is
// among the disabled, and its weight is 1 unless given.
func (p *profile) choose(field string, set configv1.PluginSet, scoresOnly bool) (errs []error) {
	for _, plugin := range set.Disabled {
		at := scoreNamed(plugin.Name)
		switch {
		case plugin.Name == "*" && scoresOnly:
			p.weights = [scoreCount]int64{}
		case at >= 0 && (scoresOnly || !slices.ContainsFunc(filters[:], func(f filter) bool { return f.name == plugin.Name })):
			p.weights[at] = 0
		case plugin.Name == "*" || slices.Contains(plugins, plugin.Name):
			errs = append(errs, fmt.Errorf("%s.disabled: %s: filters keep promises to other pods and cannot be disabled; disable scores under plugins.score", field, plugin.Name))
		default:
			errs = append(errs, unknownPlugin(field+".disabled", plugin.Name))
		}
	}
	var seen []string
	for _, plugin := range set.Enabled {
		if slices.Contains(seen, plugin.Name) {
			errs = append(errs, fmt.Errorf("%s.enabled: %s is there several times", field, plugin.Name))
		}
		seen = append(seen, plugin.Name)
		at, weight := scoreNamed(plugin.Name), int32(0)
		if plugin.Weight != nil {
			weight = *plugin.Weight
		}
		switch {
		case at < 0 && (scoresOnly || !slices.Contains(plugins, plugin.Name)):
			errs = append(errs, unknownPlugin(field+".enabled", plugin.Name))
		case weight < 0 || weight > maxWeight:
			errs = append(errs, fmt.Errorf("%s.enabled: %s: weight %d is not possible: from 1 to %d, or disable it", field, plugin.Name, weight, maxWeight))
		case at >= 0:
			p.weights[at] = max(1, int64(weight))
		}
	}
	return errs
}

// maxWeight is how much a score may count: its sum with others stays far from an overflow.
const maxWeight = 1_000_000

func unknownPlugin(field, name string) error {
	var known []string
	for i := range scores {
		known = append(known, scores[i].name)
	}
	return fmt.Errorf("%s: %q is no score of skep's scheduler; it has %q", field, name, known)
}

// configurePlugin applies the arguments of one plugin.
func (p *profile) configurePlugin(of *configv1.PluginConfig) error {
	switch of.Name {
	case names.NodeResourcesFit:
		var args configv1.NodeResourcesFitArgs
		if err := decodeArgs(of, &args, &args.TypeMeta); err != nil {
			return err
		}
		return p.configureFit(&args)
	case names.InterPodAffinity:
		var args configv1.InterPodAffinityArgs
		if err := decodeArgs(of, &args, &args.TypeMeta); err != nil {
			return err
		}
		if args.IgnorePreferredTermsOfExistingPods {
			return errors.New("ignorePreferredTermsOfExistingPods: skep has no such setting: remove it")
		}
		if weight := args.HardPodAffinityWeight; weight != nil {
			if *weight < 0 || *weight > 100 {
				return fmt.Errorf("hardPodAffinityWeight: %d is not possible: from 0 to 100", *weight)
			}
			p.hardAffinity = int64(*weight)
		}
		return nil
	case names.PodTopologySpread:
		var args configv1.PodTopologySpreadArgs
		if err := decodeArgs(of, &args, &args.TypeMeta); err != nil {
			return err
		}
		return p.configureSpread(&args)
	}
	return fmt.Errorf("skep's scheduler has settings for %s, %s and %s only: remove it", names.NodeResourcesFit, names.InterPodAffinity, names.PodTopologySpread)
}

func decodeArgs(of *configv1.PluginConfig, args any, meta *metav1.TypeMeta) error {
	if len(bytes.TrimSpace(of.Args.Raw)) == 0 {
		return nil
	}
	if err := yaml.UnmarshalStrict(of.Args.Raw, args); err != nil {
		return err
	}
	if want := of.Name + "Args"; meta.Kind != "" && meta.Kind != want {
		return fmt.Errorf("args.kind: %q must be %s", meta.Kind, want)
	}
	return nil
}

func (p *profile) configureFit(args *configv1.NodeResourcesFitArgs) error {
	if len(args.IgnoredResources)+len(args.IgnoredResourceGroups) > 0 {
		return errors.New("ignoredResources, ignoredResourceGroups: the filter asks for every resource that a pod requests: remove them")
	}
	strategy := args.ScoringStrategy
	if strategy == nil {
		return nil
	}
	switch strategy.Type {
	case configv1.LeastAllocated, "":
		p.packs = false
	case configv1.MostAllocated:
		p.packs = true
	default:
		return fmt.Errorf("scoringStrategy.type: %q is not possible: %s or %s", strategy.Type, configv1.LeastAllocated, configv1.MostAllocated)
	}
	if len(strategy.Resources) == 0 {
		return nil
	}
	p.cpuWeight, p.memoryWeight = 0, 0
	for _, r := range strategy.Resources {
		var of *int64
		switch v1.ResourceName(r.Name) {
		case v1.ResourceCPU:
			of = &p.cpuWeight
		case v1.ResourceMemory:
			of = &p.memoryWeight
		default:
			return fmt.Errorf("scoringStrategy.resources: %q is not possible: nodes are scored by cpu and memory", r.Name)
		}
		if *of != 0 || r.Weight < 0 || r.Weight > 100 {
			return fmt.Errorf("scoringStrategy.resources: %s once, with a weight from 1 to 100", r.Name)
		}
		*of = max(1, r.Weight)
	}
	return nil
}

func (p *profile) configureSpread(args *configv1.PodTopologySpreadArgs) error {
	switch args.DefaultingType {
	case configv1.SystemDefaulting, "":
		if len(args.DefaultConstraints) > 0 {
			return fmt.Errorf("defaultConstraints: need defaultingType %s", configv1.ListDefaulting)
		}
		return nil
	case configv1.ListDefaulting:
	default:
		return fmt.Errorf("defaultingType: %q is not possible: %s or %s", args.DefaultingType, configv1.SystemDefaulting, configv1.ListDefaulting)
	}
	p.spreads, p.ownSpreads = nil, true
	for i := range args.DefaultConstraints {
		c := &args.DefaultConstraints[i]
		switch {
		case c.WhenUnsatisfiable != v1.ScheduleAnyway:
			return fmt.Errorf("defaultConstraints[%d].whenUnsatisfiable: %q is not possible: %s only; what must hold stands in the pod", i, c.WhenUnsatisfiable, v1.ScheduleAnyway)
		case c.MaxSkew < 1:
			return fmt.Errorf("defaultConstraints[%d].maxSkew: must be at least 1", i)
		case len(validation.IsQualifiedName(c.TopologyKey)) > 0:
			return fmt.Errorf("defaultConstraints[%d].topologyKey: %q is no name of a label", i, c.TopologyKey)
		case c.LabelSelector != nil || len(c.MatchLabelKeys) > 0 || c.MinDomains != nil || c.NodeAffinityPolicy != nil || c.NodeTaintsPolicy != nil:
			return fmt.Errorf("defaultConstraints[%d]: has maxSkew, topologyKey and whenUnsatisfiable only", i)
		case slices.ContainsFunc(p.spreads, func(s spreadDefault) bool { return s.key == c.TopologyKey }):
			return fmt.Errorf("defaultConstraints[%d].topologyKey: %s is there already", i, c.TopologyKey)
		}
		p.spreads = append(p.spreads, spreadDefault{c.MaxSkew, c.TopologyKey})
	}
	return nil
}
