// SPDX-License-Identifier: Apache-2.0

package tools

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"

	"google.golang.org/grpc"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
)

// healthMain says that it is well as long as a file exists: over gRPC for the service "bees", and over HTTPS with a
// certificate that nobody trusts.
func healthMain(args []string) error {
	flags := flag.NewFlagSet("health", flag.ContinueOnError)
	file := flags.String("file", "/tmp/well", "the file")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() != 2 {
		return errors.New("health: two addresses to listen on are needed, for gRPC and for HTTPS")
	}
	well := func() bool {
		_, err := os.Stat(*file)
		return err == nil
	}
	l, err := net.Listen("tcp", flags.Arg(0))
	if err != nil {
		return err
	}
	secure, err := net.Listen("tcp", flags.Arg(1))
	if err != nil {
		return err
	}
	web := &httptest.Server{Listener: secure, Config: &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if !well() {
			http.Error(w, "unwell", http.StatusServiceUnavailable)
		}
	})}}
	web.StartTLS()
	defer web.Close()
	server := grpc.NewServer()
	healthpb.RegisterHealthServer(server, healthServer{well: well})
	fmt.Println("listening on", l.Addr(), "and", secure.Addr())
	return server.Serve(l)
}

type healthServer struct {
	healthpb.UnimplementedHealthServer
	well func() bool
}

func (s healthServer) Check(_ context.Context, r *healthpb.HealthCheckRequest) (*healthpb.HealthCheckResponse, error) {
	status := healthpb.HealthCheckResponse_NOT_SERVING
	if r.Service == "bees" && s.well() {
		status = healthpb.HealthCheckResponse_SERVING
	}
	return &healthpb.HealthCheckResponse{Status: status}, nil
}
