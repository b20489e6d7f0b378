// SPDX-License-Identifier: Apache-2.0

package store

import (
	"errors"
	"io"
	"syscall"
	"testing"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"pgregory.net/rapid"
)

func TestJudge(t *testing.T) {
	const plenty = 1 << 30
	tests := map[string]struct {
		found onDisk
		want  error
	}{
		"empty":                          {onDisk{free: plenty}, nil},
		"whole":                          {onDisk{wal: true, db: true, committed: true, free: plenty}, nil},
		"first start died before log":    {onDisk{db: true, free: plenty}, nil},
		"log without database":           {onDisk{wal: true, free: plenty}, ErrCorrupt},
		"database without log":           {onDisk{db: true, committed: true, free: plenty}, ErrCorrupt},
		"unreadable database":            {onDisk{wal: true, db: true, dbErr: io.ErrUnexpectedEOF, free: plenty}, ErrCorrupt},
		"database open elsewhere":        {onDisk{wal: true, db: true, dbErr: ErrLocked, free: plenty}, ErrLocked},
		"new, no room":                   {onDisk{free: minFreeNew - 1}, ErrNoSpace},
		"existing needs less":            {onDisk{wal: true, db: true, free: minFreeExisting}, nil},
		"existing, no room":              {onDisk{wal: true, db: true, free: minFreeExisting - 1}, ErrNoSpace},
		"of a later etcd":                {onDisk{wal: true, db: true, committed: true, version: "3.7.0", free: plenty}, ErrTooNew},
		"of a much later etcd":           {onDisk{wal: true, db: true, version: "4.0.0", free: plenty}, ErrTooNew},
		"of an earlier etcd":             {onDisk{wal: true, db: true, version: "3.5.0", free: plenty}, nil},
		"of no etcd that says so":        {onDisk{wal: true, db: true, version: "?", free: plenty}, nil},
		"corrupt is told before no room": {onDisk{wal: true}, ErrCorrupt},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			if err := judge(tt.found, "/d"); !errors.Is(err, tt.want) || (tt.want == nil) != (err == nil) {
				t.Errorf("got %v, want %v", err, tt.want)
			}
		})
	}
}

func TestWorthDefragmenting(t *testing.T) {
	const mb = 1 << 20
	tests := []struct {
		size, inUse int64
		want        bool
	}{
		{0, 0, false},
		{20 * mb, 1 * mb, false},     // a lot of a little
		{64 * mb, 0, true},           // exactly the minimum
		{128 * mb, 64 * mb, true},    // exactly half
		{127 * mb, 64 * mb, false},   // less than the minimum
		{1000 * mb, 600 * mb, false}, // would copy more than it gives back
		{1000 * mb, 100 * mb, true},
	}
	for _, tt := range tests {
		if got := worthDefragmenting(usage{tt.size, tt.inUse}); got != tt.want {
			t.Errorf("size %d in use %d: %v", tt.size/mb, tt.inUse/mb, got)
		}
	}
	rapid.Check(t, func(t *rapid.T) {
		size := rapid.Int64Range(0, 8<<30).Draw(t, "size")
		inUse := rapid.Int64Range(0, size).Draw(t, "inUse")
		if worthDefragmenting(usage{size, inUse}) && (size < 2*inUse || size-inUse < defragMinWaste) {
			t.Fatalf("rewrites %d for %d", inUse, size-inUse)
		}
	})
}

func TestClassify(t *testing.T) {
	tests := []struct {
		fields []zapcore.Field
		want   error
	}{
		{[]zapcore.Field{zap.Error(syscall.ENOSPC)}, ErrNoSpace},
		{[]zapcore.Field{zap.String("path", "x"), zap.Error(syscall.EIO)}, ErrFailed},
		{[]zapcore.Field{zap.Error(io.ErrUnexpectedEOF)}, ErrCorrupt},
		{nil, ErrFailed},
	}
	for _, tt := range tests {
		if err := classify("/d", "message", tt.fields); !errors.Is(err, tt.want) {
			t.Errorf("%v: got %v, want %v", tt.fields, err, tt.want)
		}
	}
}
