#!/usr/bin/env bash
# A Slurm cluster of this machine alone, to try hydra/launcher=submitit_slurm for real. As root, on Debian or Ubuntu:
#   tests/slurm/cluster.sh install       the packages, where they are missing
#   tests/slurm/cluster.sh start DIR     munged, slurmctld and slurmd, with all their files in DIR, which must not exist
#   . DIR/env                            makes sbatch and python run.py use it
#   tests/slurm/cluster.sh stop DIR      ends them and their jobs
# Nothing outside DIR is written, and no cluster that this machine may belong to is touched.
set -euo pipefail

fail() { printf 'tests/slurm/cluster.sh: %s\n' "$*" >&2; exit 1; }
[ $# -ge 1 ] || fail "say install, start DIR or stop DIR"
dir=${2:-}

stop() { # each daemon by the process id it left, and by force if it stays for ten seconds
    if [ -e "$dir/slurmctld.pid" ] && [ -e "$dir/slurmd.pid" ]; then
        export SLURM_CONF=$dir/slurm.conf
        timeout 10 scancel --user="$(id -un)" || true
        for _ in $(seq 30); do # what watches over a job would outlive its daemon
            [ -n "$(timeout 5 squeue --noheader || true)" ] || break
            sleep 0.5
        done
    fi
    for daemon in slurmd slurmctld munged; do
        [ -s "$dir/$daemon.pid" ] || continue
        pid=$(cat "$dir/$daemon.pid")
        kill "$pid" 2>/dev/null || continue
        for _ in $(seq 100); do
            kill -0 "$pid" 2>/dev/null || continue 2
            sleep 0.1
        done
        kill -9 "$pid" 2>/dev/null || true
    done
}

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

case $1 in
install)
    if ! command -v slurmctld slurmd munged sbatch srun >/dev/null; then
        apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends slurm-wlm munge
    fi
    ;;
start)
    [ -n "$dir" ] || fail "start needs a folder"
    [ "$(id -u)" = 0 ] || fail "slurmd starts jobs for their users, so it needs root"
    command -v slurmctld slurmd munged >/dev/null || fail "Slurm is not installed; tests/slurm/cluster.sh install"
    mkdir -p "$(dirname "$dir")" && mkdir -m 755 "$dir"
    dir=$(cd "$dir" && pwd)
    mkdir "$dir/state" "$dir/spool" "$dir/bin"
    host=$(hostname -s)
    memory=$(awk '/^MemTotal/ { print int($2 / 1024) - 500 }' /proc/meminfo)
    cat >"$dir/slurm.conf" <<CONF
ClusterName=bayesq
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge.socket
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
KillWait=2
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc --all) RealMemory=$memory State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
    # Accounting needs a database. What submitit asks sacct for, slurmctld still knows of jobs that ended minutes ago.
    cat >"$dir/bin/sacct" <<'SACCT'
#!/bin/sh
echo 'JobID|State|NodeList'
scontrol --oneliner show job | awk '{
    id = array = task = state = ""
    for (i = 1; i <= NF; i++) {
        key = value = $i; sub(/=.*/, "", key); sub(/[^=]*=/, "", value)
        if (key == "JobId") id = value
        if (key == "ArrayJobId") array = value
        if (key == "ArrayTaskId") task = value
        if (key == "JobState") state = value
    }
    if (task ~ /[-,%]/) task = "[" task "]"
    if (id) print (array == "" ? id : array "_" task) "|" state "|"
}'
SACCT
    chmod +x "$dir/bin/sacct"
    printf 'export SLURM_CONF=%q PATH=%q:$PATH\n' "$dir/slurm.conf" "$dir/bin" >"$dir/env"

    trap '[ $? -eq 0 ] || { tail -n 20 "$dir"/*.log >&2; stop; }' EXIT
    head -c 1024 /dev/urandom >"$dir/munge.key" && chmod 400 "$dir/munge.key"
    munged --socket="$dir/munge.socket" --key-file="$dir/munge.key" --pid-file="$dir/munged.pid" \
        --log-file="$dir/munged.log" --seed-file="$dir/munge.seed"
    . "$dir/env"
    slurmctld
    slurmd -N "$host"
    for _ in $(seq 120); do
        [ "$(timeout 5 sinfo -h -o %T 2>/dev/null)" != idle ] || exit 0
        sleep 0.25
    done
    fail "no node was ready within 30 seconds"
    ;;
stop)
    [ -e "$dir/slurm.conf" ] || fail "there is no cluster in ${dir:-no folder}"
    stop
    ;;
*) fail "say install, start DIR or stop DIR" ;;
esac
