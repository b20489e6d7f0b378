// SPDX-License-Identifier: Apache-2.0

package main

import "strings"

// unitFile is the systemd unit of a role.
//
// What hardens a usual service would break this one or its pods: whatever makes a mount namespace
// (ProtectSystem, PrivateTmp and the like) hides the host's mounts from pods and theirs from the host, and
// what is inherited by children (NoNewPrivileges, seccomp filters, RestrictNamespaces, fewer capabilities)
// would hold in every container, privileged ones included. What remains is what concerns this process alone;
// pods get their own walls from skep.
func unitFile(role, skep string) string {
	return strings.NewReplacer("ROLE", role, "SKEP", skep).Replace(`# Written by "skep install ROLE"; "skep uninstall" removes it. Change it by "systemctl edit skep-ROLE".
[Unit]
Description=skep ROLE
Wants=network-online.target
After=network-online.target
# A machine that cannot start skep goes on trying: what it lacks may be another machine.
StartLimitIntervalSec=0

[Service]
Type=exec
ExecStart=SKEP ROLE
# Pods end in order before the machine does, and stay when the service alone is stopped.
ExecStop=-/bin/sh -c 'if [ "$(systemctl is-system-running)" = stopping ]; then exec SKEP shutdown; fi'
Restart=always
RestartSec=2s
# Pods outlive the process: only the process itself is stopped, and a restart finds them again.
KillMode=process
Delegate=yes
TimeoutStopSec=60s
TasksMax=infinity
LimitNOFILE=1048576
LimitNPROC=infinity
LimitCORE=0
OOMScoreAdjust=-999
KeyringMode=private
StandardOutput=journal
StandardError=journal
SyslogIdentifier=skep

[Install]
WantedBy=multi-user.target
`)
}
