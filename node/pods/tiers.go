// SPDX-License-Identifier: Apache-2.0

package pods

import (
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/component-helpers/resource"
	"k8s.io/kubernetes/pkg/apis/core/v1/helper/qos"
)

// burstableShares is the weight of all burstable pods together: that of what they ask for (kubelet:
// cm/qos_container_manager_linux.go). Without it their number would not count: beside a guaranteed pod they would get
// what one pod gets that asks for a processor.
func burstableShares(pods []*corev1.Pod) uint64 {
	milli := int64(0)
	for _, p := range pods {
		if qos.GetPodQOS(p) == corev1.PodQOSBurstable {
			requests := resource.PodRequests(p, resource.PodResourcesOptions{})
			milli += requests.Cpu().MilliValue()
		}
	}
	return shares(milli)
}

// reweigh tells that pods have come or gone, or have other resources.
func (s *Set) reweigh() {
	select {
	case s.weighDue <- struct{}{}:
	default:
	}
}

// runWeights has the weight of burstable pods follow what they ask for, until the Set's context ends.
func (s *Set) runWeights() {
	var retry <-chan time.Time
	told := uint64(0)
	for {
		select {
		case <-s.weighDue:
		case <-retry:
		case <-s.ctx.Done():
			return
		}
		retry = nil
		s.mu.Lock()
		known, want := s.complete, burstableShares(s.taken())
		s.mu.Unlock()
		if !known || want == told { // until all pods are known, those that are not would lose theirs
			continue
		}
		if err := s.cfg.Weigh(want); err != nil {
			s.cfg.Log.Warn("burstable pods do not have the weight of what they ask for", "shares", want, "error", err)
			retry = time.After(retryLimit)
			continue
		}
		told = want
	}
}
