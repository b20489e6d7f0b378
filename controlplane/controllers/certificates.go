// SPDX-License-Identifier: Apache-2.0

package controllers

import (
	"context"
	"fmt"
	"sync"
	"time"

	"k8s.io/kubernetes/pkg/controller/bootstrap"
	"k8s.io/kubernetes/pkg/controller/certificates/cleaner"
	"k8s.io/kubernetes/pkg/controller/certificates/signer"
)

// signedLife is the longest that a certificate signed on request is valid.
const signedLife = 365 * 24 * time.Hour

// makeCSRSigning signs what was approved: nodes' certificates and those of people.
func makeCSRSigning(ctx context.Context, e env) (run, error) {
	if e.cfg.CAFile == "" {
		return nil, nil
	}
	requests := e.cfg.Informers.Certificates().V1().CertificateSigningRequests()
	serving, err := signer.NewKubeletServingCSRSigningController(ctx, e.deps.Client, requests, e.cfg.CAFile, e.cfg.CAKeyFile, signedLife)
	if err != nil {
		return nil, fmt.Errorf("signer of nodes' serving certificates: %w", err)
	}
	client, err := signer.NewKubeletClientCSRSigningController(ctx, e.deps.Client, requests, e.cfg.CAFile, e.cfg.CAKeyFile, signedLife)
	if err != nil {
		return nil, fmt.Errorf("signer of nodes' client certificates: %w", err)
	}
	people, err := signer.NewKubeAPIServerClientCSRSigningController(ctx, e.deps.Client, requests, e.cfg.CAFile, e.cfg.CAKeyFile, signedLife)
	if err != nil {
		return nil, fmt.Errorf("signer of client certificates: %w", err)
	}
	return blocking(func(ctx context.Context) {
		var wg sync.WaitGroup
		for _, c := range []*signer.CSRSigningController{serving, client, people} {
			wg.Go(func() { c.Run(ctx, 1) })
		}
		wg.Wait()
	}), nil
}

// makeCSRCleaner deletes requests that are over.
func makeCSRCleaner(_ context.Context, e env) (run, error) {
	c := cleaner.NewCSRCleanerController(e.deps.Client.CertificatesV1().CertificateSigningRequests(),
		e.cfg.Informers.Certificates().V1().CertificateSigningRequests())
	return blocking(func(ctx context.Context) { c.Run(ctx, 1) }), nil
}

// makeTokenCleaner deletes tokens that have expired.
func makeTokenCleaner(_ context.Context, e env) (run, error) {
	c, err := bootstrap.NewTokenCleaner(e.deps.Client, e.cfg.Informers.Core().V1().Secrets(), bootstrap.DefaultTokenCleanerOptions())
	if err != nil {
		return nil, err
	}
	return blocking(c.Run), nil
}
