// SPDX-License-Identifier: Apache-2.0

package main

import (
	"slices"
	"strings"
	"testing"
)

const sample = `<?xml version="1.0" encoding="UTF-8"?>
<testsuites tests="5">
  <testsuite name="Kubernetes e2e suite">
    <testcase name="[SynchronizedBeforeSuite]" status="passed"></testcase>
    <testcase name="[It] [sig-node] Pods should run [Conformance]" status="passed"></testcase>
    <testcase name="[It] [sig-node] Pods should end [Conformance]" status="failed"><failure message="it stayed" type="failed"></failure></testcase>
    <testcase name="[It] [sig-node] Pods should wait [Conformance]" status="skipped"><skipped message="skipped"></skipped></testcase>
    <testcase name="[It] [sig-api-machinery] Watchers should see [Conformance]" status="timedout"></testcase>
    <testcase name="[It] [sig-apps] Jobs should come [Conformance]" status="skipped"></testcase>
  </testsuite>
</testsuites>`

func TestSummary(t *testing.T) {
	groups, err := read(strings.NewReader(sample))
	if err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	if failed := summarize(&out, groups); failed != 2 {
		t.Errorf("%d failed, want 2", failed)
	}
	want := `sig            passed  failed
api-machinery  0       1
node           1       1
all            1       2
failed: [It] [sig-api-machinery] Watchers should see [Conformance]
failed: [It] [sig-node] Pods should end [Conformance]
`
	if out.String() != want {
		t.Errorf("got\n%s\nwant\n%s", out.String(), want)
	}
	if _, err := read(strings.NewReader("<testsuites>")); err == nil {
		t.Error("half a report was read")
	}
}

func TestLibraries(t *testing.T) {
	got := libraries([]byte("\tlinux-vdso.so.1 (0x00007f)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)\n\t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n\tstatically linked\n"))
	if want := []string{"/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestSerialTestsRunAlone(t *testing.T) {
	for _, tc := range []struct {
		procs      int
		skip, want string
	}{
		{1, "", "--skip="},
		{1, "x", "--skip=x"},
		{2, "", `--skip=\[Serial\]`},
		{2, "x|y", `--skip=\[Serial\]|x|y`},
	} {
		argv := options{procs: tc.procs, skip: tc.skip}.ginkgo("r")
		if !slices.Contains(argv, tc.want) {
			t.Errorf("procs %d, skip %q: %q lacks %q", tc.procs, tc.skip, argv, tc.want)
		}
	}
}
