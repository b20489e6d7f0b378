// SPDX-License-Identifier: Apache-2.0

package steps

import (
	"context"
	"slices"
	"testing"
)

func TestObservers(t *testing.T) {
	var heard []string
	hear := func(who string) Observer {
		return func(pod, step string) { heard = append(heard, who+" "+pod+" "+step) }
	}
	Passed(Of(context.Background(), "a/b"), "nobody listens")
	one := With(context.Background(), hear("one"))
	two := Of(With(one, hear("two")), "a/b")
	other := Of(With(one, hear("other")), "c/d") // beside two, and not instead of it
	Passed(two, "1")
	Passed(other, "2")
	Passed(context.WithoutCancel(one), "3")
	if want := []string{"one a/b 1", "two a/b 1", "one c/d 2", "other c/d 2", "one  3"}; !slices.Equal(heard, want) {
		t.Errorf("%q, want %q", heard, want)
	}
}
