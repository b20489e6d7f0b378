// SPDX-License-Identifier: Apache-2.0

package runtime

import (
	"time"

	eventsapi "github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/typeurl/v2"
)

type subscription struct {
	messages <-chan *events.Envelope
	errs     <-chan error
}

func (r *Runtime) subscribe() subscription {
	m, e := r.client.Subscribe(r.ctx, `topic=="/tasks/exit"`, `topic=="/tasks/oom"`)
	return subscription{m, e}
}

// watch turns containerd's events into changes of what List says. It subscribes again when the host's
// containerd restarts, and then looks at every task, since events were missed.
func (r *Runtime) watch(s subscription) {
	for {
		select {
		case <-r.ctx.Done():
			return
		case e := <-s.messages:
			if e == nil {
				continue
			}
			r.handle(e)
		case err := <-s.errs:
			if r.ctx.Err() != nil {
				return
			}
			r.log.Warn("containerd's events broke off", "error", err)
			// Nothing tells when a foreign containerd is back.
			select {
			case <-r.ctx.Done():
				return
			case <-time.After(time.Second):
			}
			s = r.subscribe()
			r.refresh()
		}
	}
}

func (r *Runtime) handle(e *events.Envelope) {
	v, err := typeurl.UnmarshalAny(e.Event)
	if err != nil {
		r.log.Warn("containerd event is unreadable", "topic", e.Topic, "error", err)
		return
	}
	switch ev := v.(type) {
	case *eventsapi.TaskExit:
		if ev.ID != ev.ContainerID {
			return // a process of exec
		}
		if c := r.lookup(ev.ContainerID); c != nil {
			go r.harvest(c)
		}
	case *eventsapi.TaskOOM:
		if c := r.lookup(ev.ContainerID); c != nil {
			c.mu.Lock()
			c.oom = true
			c.mu.Unlock()
		}
	}
}
