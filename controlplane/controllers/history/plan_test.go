// SPDX-License-Identifier: Apache-2.0

package history

import (
	"fmt"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/sets"
	corev1defaults "k8s.io/kubernetes/pkg/apis/core/v1"
	"pgregory.net/rapid"
)

func template(image string) *corev1.PodTemplateSpec {
	t := corev1.PodTemplate{Template: corev1.PodTemplateSpec{
		ObjectMeta: metav1.ObjectMeta{Labels: map[string]string{"app": "db"}},
		Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "c", Image: image}}},
	}}
	corev1defaults.SetObjectDefaults_PodTemplate(&t)
	return &t.Template
}

func data(t interface{ Fatal(...any) }, image string) []byte {
	raw, err := Data(template(image))
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func revision(t interface{ Fatal(...any) }, number int64, image string) *appsv1.ControllerRevision {
	return &appsv1.ControllerRevision{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: fmt.Sprint("r", number)},
		Data:       runtime.RawExtension{Raw: data(t, image)}, Revision: number,
	}
}

func TestFind(t *testing.T) {
	v1, v2, v3 := revision(t, 1, "v1"), revision(t, 2, "v2"), revision(t, 5, "v1")
	for _, tt := range []struct {
		name      string
		revisions []*appsv1.ControllerRevision
		image     string
		want      *appsv1.ControllerRevision
		number    int64
	}{
		{"the first of all", nil, "v1", nil, 1},
		{"nothing changed", []*appsv1.ControllerRevision{v1, v2}, "v2", v2, 2},
		{"a new template", []*appsv1.ControllerRevision{v1, v2}, "v3", nil, 3},
		{"rolled back", []*appsv1.ControllerRevision{v1, v2}, "v1", v1, 3},
		{"recorded twice: the newest", []*appsv1.ControllerRevision{v1, v2, v3}, "v1", v3, 5},
	} {
		if got, number := Find(tt.revisions, data(t, tt.image)); got != tt.want || number != tt.number {
			t.Errorf("%s: %v, number %d, want %v, %d", tt.name, got, number, tt.want, tt.number)
		}
	}
}

// A revision that an older API server recorded, without fields of today, is found all the same.
func TestFindWithoutNewDefaults(t *testing.T) {
	old := revision(t, 1, "v1")
	text := strings.Replace(string(old.Data.Raw), `"enableServiceLinks":true,`, "", 1)
	text = strings.Replace(text, `"schedulerName":"default-scheduler",`, "", 1)
	if text == string(old.Data.Raw) {
		t.Fatalf("the data has no field to take away: %s", text)
	}
	old.Data.Raw = []byte(text)
	broken := revision(t, 2, "v9")
	broken.Data.Raw = []byte(`{"spec":1}`)
	if got, number := Find([]*appsv1.ControllerRevision{old, broken}, data(t, "v1")); got != old || number != 3 {
		t.Errorf("%v, number %d", got, number)
	}
	if got, _ := Find([]*appsv1.ControllerRevision{old, broken}, data(t, "v2")); got != nil {
		t.Errorf("another template is taken for %v", got)
	}
}

// What was recorded comes back.
func TestTemplateRoundTrip(t *testing.T) {
	want := data(t, "v1")
	got, err := Template(revision(t, 1, "v1"))
	if err != nil {
		t.Fatal(err)
	}
	if again, err := Data(got); err != nil || string(again) != string(want) {
		t.Errorf("%s, %v, want %s", again, err, want)
	}
	if !strings.Contains(string(want), `"$patch":"replace"`) {
		t.Errorf("%s merges instead of replacing", want)
	}
	none := &appsv1.ControllerRevision{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "r"}, Data: runtime.RawExtension{Raw: []byte(`{"spec":{}}`)}}
	if _, err := Template(none); err == nil || !strings.Contains(err.Error(), "ns/r") {
		t.Errorf("error %v", err)
	}
}

// What expires is old, dead, and no more than is beyond the limit.
func TestExpired(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		limit := int32(rapid.IntRange(0, 6).Draw(t, "limit"))
		live := sets.New[string]()
		var all []*appsv1.ControllerRevision
		dead := 0
		for i := range rapid.IntRange(0, 12).Draw(t, "revisions") {
			all = append(all, revision(t, int64(i+1), "v"))
			if rapid.Bool().Draw(t, "live") {
				live.Insert(all[i].Name)
			} else {
				dead++
			}
		}
		gone := Expired(all, live, &limit)
		if want := max(0, dead-int(limit)); len(gone) != want {
			t.Fatalf("%d expire, want %d", len(gone), want)
		}
		for i, r := range gone {
			if live.Has(r.Name) || i > 0 && gone[i-1].Revision >= r.Revision {
				t.Fatalf("%v expire", gone)
			}
		}
		for _, r := range all { // nothing older that is dead stays
			if len(gone) > 0 && !live.Has(r.Name) && r.Revision < gone[len(gone)-1].Revision && !sets.New(gone...).Has(r) {
				t.Fatalf("%s stays", r.Name)
			}
		}
	})
}
