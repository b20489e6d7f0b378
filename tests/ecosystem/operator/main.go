// SPDX-License-Identifier: Apache-2.0

// Command operator is an operator as people write them with controller-runtime: it turns Greetings, a kind of its own,
// into ConfigMaps and Deployments, with a finalizer, a status, events, an index and leader election.
// Nothing in it knows skep.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net/http"
	"os"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/tools/events"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"
	"sigs.k8s.io/controller-runtime/pkg/healthz"
	"sigs.k8s.io/controller-runtime/pkg/log/zap"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"
)

const (
	finalizer = "ecosystem.skep.io/farewell"
	// farewells is the ConfigMap in which a Greeting that goes is noted: what a finalizer does outside of its object.
	farewells = "farewells"
	// byText is the field index of spec.text.
	byText = "spec.text"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run() error {
	namespace := flag.String("namespace", "default", "Where the lease of the leader is")
	flag.Parse() // controller-runtime's own --kubeconfig, too
	ctrl.SetLogger(zap.New())
	scheme := runtime.NewScheme()
	if err := errors.Join(clientgoscheme.AddToScheme(scheme), addToScheme(scheme)); err != nil {
		return err
	}
	config, err := ctrl.GetConfig()
	if err != nil {
		return err
	}
	mgr, err := ctrl.NewManager(config, ctrl.Options{
		Scheme: scheme, LeaderElection: true, LeaderElectionID: "greetings", LeaderElectionNamespace: *namespace,
		LeaderElectionReleaseOnCancel: true, HealthProbeBindAddress: "127.0.0.1:8091",
		Metrics: metricsserver.Options{BindAddress: "0"},
	})
	if err != nil {
		return err
	}
	if err := mgr.AddReadyzCheck("leading", func(*http.Request) error {
		select {
		case <-mgr.Elected():
			return nil
		default:
			return errors.New("another operator leads")
		}
	}); err != nil {
		return err
	}
	if err := mgr.AddHealthzCheck("alive", healthz.Ping); err != nil {
		return err
	}
	ctx := ctrl.SetupSignalHandler()
	err = mgr.GetFieldIndexer().IndexField(ctx, &Greeting{}, byText, func(o client.Object) []string {
		return []string{o.(*Greeting).Spec.Text}
	})
	if err != nil {
		return err
	}
	r := &reconciler{Client: mgr.GetClient(), scheme: scheme, recorder: mgr.GetEventRecorder("greetings")}
	if err := ctrl.NewControllerManagedBy(mgr).For(&Greeting{}).Owns(&corev1.ConfigMap{}).Owns(&appsv1.Deployment{}).Complete(r); err != nil {
		return err
	}
	return mgr.Start(ctx)
}

type reconciler struct {
	client.Client
	scheme   *runtime.Scheme
	recorder events.EventRecorder
}

func (r *reconciler) Reconcile(ctx context.Context, request ctrl.Request) (ctrl.Result, error) {
	var g Greeting
	if err := r.Get(ctx, request.NamespacedName, &g); err != nil {
		return ctrl.Result{}, client.IgnoreNotFound(err)
	}
	if !g.DeletionTimestamp.IsZero() {
		return ctrl.Result{}, r.sayFarewell(ctx, &g)
	}
	if controllerutil.AddFinalizer(&g, finalizer) {
		return ctrl.Result{}, r.Update(ctx, &g)
	}
	replicas, err := r.deploy(ctx, &g)
	if err != nil {
		return ctrl.Result{}, err
	}
	var alike Greetings
	if err := r.List(ctx, &alike, client.InNamespace(g.Namespace), client.MatchingFields{byText: g.Spec.Text}); err != nil {
		return ctrl.Result{}, err
	}
	before := g.DeepCopyObject().(*Greeting)
	g.Status.Ready, g.Status.Alike, g.Status.ObservedGeneration = replicas, int32(len(alike.Items)), g.Generation
	condition := metav1.Condition{Type: "Ready", Status: metav1.ConditionFalse, Reason: "Starting", ObservedGeneration: g.Generation}
	if replicas == g.Spec.Replicas {
		condition.Status, condition.Reason = metav1.ConditionTrue, "Serving"
	}
	if meta.SetStatusCondition(&g.Status.Conditions, condition) && condition.Status == metav1.ConditionTrue {
		r.recorder.Eventf(&g, nil, corev1.EventTypeNormal, "Serving", "Greet", "%d pods say %q", replicas, g.Spec.Text)
	}
	return ctrl.Result{}, r.Status().Patch(ctx, &g, client.MergeFrom(before))
}

// deploy makes what a Greeting owns as it should be, and returns how many pods are ready.
func (r *reconciler) deploy(ctx context.Context, g *Greeting) (int32, error) {
	cm := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: g.Namespace, Name: g.Name}}
	_, err := controllerutil.CreateOrUpdate(ctx, r.Client, cm, func() error {
		cm.Data = map[string]string{"text": g.Spec.Text}
		return controllerutil.SetControllerReference(g, cm, r.scheme)
	})
	if err != nil {
		return 0, err
	}
	d := &appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{Namespace: g.Namespace, Name: g.Name}}
	labels := map[string]string{"greeting": g.Name}
	_, err = controllerutil.CreateOrUpdate(ctx, r.Client, d, func() error {
		d.Spec.Replicas = &g.Spec.Replicas
		d.Spec.Selector = &metav1.LabelSelector{MatchLabels: labels}
		d.Spec.Template.Labels = labels
		grace := int64(0)
		d.Spec.Template.Spec.TerminationGracePeriodSeconds = &grace
		containers := &d.Spec.Template.Spec.Containers
		if len(*containers) == 0 {
			*containers = []corev1.Container{{Name: "c"}}
		}
		(*containers)[0].Image = "busybox:1"
		(*containers)[0].Command = []string{"sleep", "100000"}
		return controllerutil.SetControllerReference(g, d, r.scheme)
	})
	return d.Status.ReadyReplicas, err
}

func (r *reconciler) sayFarewell(ctx context.Context, g *Greeting) error {
	if !controllerutil.ContainsFinalizer(g, finalizer) {
		return nil
	}
	cm := &corev1.ConfigMap{}
	err := r.Get(ctx, types.NamespacedName{Namespace: g.Namespace, Name: farewells}, cm)
	switch {
	case apierrors.IsNotFound(err):
		cm.Namespace, cm.Name, cm.Data = g.Namespace, farewells, map[string]string{g.Name: g.Spec.Text}
		err = r.Create(ctx, cm)
	case err == nil:
		patch := client.MergeFrom(cm.DeepCopy())
		if cm.Data == nil {
			cm.Data = map[string]string{}
		}
		cm.Data[g.Name] = g.Spec.Text
		err = r.Patch(ctx, cm, patch)
	}
	if err != nil {
		return err
	}
	controllerutil.RemoveFinalizer(g, finalizer)
	return r.Update(ctx, g)
}
