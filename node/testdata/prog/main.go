// SPDX-License-Identifier: Apache-2.0

// Command prog is what the containers of the agent's tests run.
package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"time"
)

func main() {
	if len(os.Args) < 2 {
		os.Args = append(os.Args, "serve")
	}
	switch os.Args[1] {
	case "serve":
		serve()
	case "write": // write FILE CONTENT
		if err := os.WriteFile(os.Args[2], []byte(os.Args[3]), 0o644); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	case "exit": // exit CODE MESSAGE
		code, _ := strconv.Atoi(os.Args[2])
		if len(os.Args) > 3 {
			_ = os.WriteFile("/dev/termination-log", []byte(os.Args[3]), 0o644)
		}
		fmt.Println("exiting with", code)
		os.Exit(code)
	case "test": // test FILE: like test -e
		if _, err := os.Stat(os.Args[2]); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
	case "sleep":
		d, _ := time.ParseDuration(os.Args[2])
		time.Sleep(d)
	}
}

func serve() {
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM)
	go func() {
		<-stop
		fmt.Println("bye")
		os.Exit(0)
	}()
	http.HandleFunc("/env", func(w http.ResponseWriter, r *http.Request) { _ = json.NewEncoder(w).Encode(os.Environ()) })
	http.HandleFunc("/args", func(w http.ResponseWriter, r *http.Request) { _ = json.NewEncoder(w).Encode(os.Args) })
	http.HandleFunc("/file", func(w http.ResponseWriter, r *http.Request) {
		b, err := os.ReadFile(r.URL.Query().Get("name"))
		if err != nil {
			http.Error(w, err.Error(), http.StatusNotFound)
			return
		}
		_, _ = w.Write(b)
	})
	http.HandleFunc("/crash", func(w http.ResponseWriter, r *http.Request) {
		_ = os.WriteFile("/dev/termination-log", []byte("crashed as asked"), 0o644)
		os.Exit(7)
	})
	http.HandleFunc("/ready", func(w http.ResponseWriter, r *http.Request) {
		if _, err := os.Stat("/shared/unready"); err == nil {
			http.Error(w, "told not to be", http.StatusServiceUnavailable)
		}
	})
	http.HandleFunc("/write", func(w http.ResponseWriter, r *http.Request) {
		if err := os.WriteFile(r.URL.Query().Get("name"), nil, 0o644); err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
		}
	})
	fmt.Println(http.ListenAndServe(":8080", nil))
	os.Exit(1)
}
