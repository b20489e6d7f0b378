// SPDX-License-Identifier: Apache-2.0

package main

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// Greeting says something in some pods.
type Greeting struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec   GreetingSpec   `json:"spec,omitempty"`
	Status GreetingStatus `json:"status,omitempty"`
}

// GreetingSpec is what somebody wants.
type GreetingSpec struct {
	Text     string `json:"text"`
	Replicas int32  `json:"replicas"`
}

// GreetingStatus is what there is.
type GreetingStatus struct {
	Ready              int32              `json:"ready"`
	Alike              int32              `json:"alike"` // Greetings of this namespace with the same text
	ObservedGeneration int64              `json:"observedGeneration,omitempty"`
	Conditions         []metav1.Condition `json:"conditions,omitempty"`
}

// Greetings is a list.
type Greetings struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`

	Items []Greeting `json:"items"`
}

// DeepCopyObject implements runtime.Object.
func (g *Greeting) DeepCopyObject() runtime.Object {
	out := *g
	out.ObjectMeta = *g.ObjectMeta.DeepCopy()
	out.Status.Conditions = append([]metav1.Condition(nil), g.Status.Conditions...)
	return &out
}

// DeepCopyObject implements runtime.Object.
func (l *Greetings) DeepCopyObject() runtime.Object {
	out := *l
	out.Items = make([]Greeting, len(l.Items))
	for i := range l.Items {
		out.Items[i] = *l.Items[i].DeepCopyObject().(*Greeting)
	}
	return &out
}

var groupVersion = schema.GroupVersion{Group: "ecosystem.skep.io", Version: "v1"}

func addToScheme(s *runtime.Scheme) error {
	s.AddKnownTypes(groupVersion, &Greeting{})
	s.AddKnownTypeWithName(groupVersion.WithKind("GreetingList"), &Greetings{})
	metav1.AddToGroupVersion(s, groupVersion)
	return nil
}
