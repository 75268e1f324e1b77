#!/usr/bin/env bash
# A SLURM cluster of one node on this machine, for tests:   slurm_cluster.sh start|stop|sockets [FOLDER]
#
# As root, with Debian's slurm-wlm and munge. Everything it writes (configuration, keys, state, logs) lies in FOLDER; its
# ports are its own and on loopback only, which is checked. It neither reads nor touches a cluster that this machine belongs to.
# Clients find it by SLURM_CONF=FOLDER/slurm.conf.
set -euo pipefail
folder=${2:-/run/dynarep-slurm}
munge=$folder/munge
PATH=$PATH:/usr/sbin:/sbin

missing() {
    for tool in munged slurmctld slurmd sbatch squeue ss; do
        command -v "$tool" >/dev/null || { echo "$tool: not installed (Debian: slurm-wlm munge iproute2)"; return; }
    done
    [ "$(id -u)" = 0 ] || echo "starting SLURM's daemons needs root"
}

configuration() {
    local host memory
    host=$(hostname -s)
    memory=$(($(awk '/^MemTotal/ {print $2}' /proc/meminfo) / 1024 - 512))
    cat <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=26817
SlurmdPort=26818
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$munge/socket
CredType=cred/munge
StateSaveLocation=$folder/slurmctld
SlurmdSpoolDir=$folder/slurmd
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
# no systemd, no control groups, no database: memory is scheduled, but not enforced
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
ReturnToService=2
MpiDefault=none
MinJobAge=3600
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SchedulerParameters=batch_sched_delay=0,sched_interval=2
DefMemPerCPU=1000
GresTypes=gpu
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=$memory Gres=gpu:1 State=UNKNOWN
PartitionName=cpu Nodes=$host Default=YES MaxTime=01:00:00 State=UP
CONF
}

start() {
    local why
    why=$(missing)
    [ -z "$why" ] || { echo "$why" >&2; exit 3; }
    stop
    install -d -m 0755 "$folder" "$folder/slurmctld" "$folder/slurmd"
    install -d -o munge -g munge -m 0755 "$munge"
    dd if=/dev/urandom of="$munge/key" bs=128 count=1 status=none
    chown munge: "$munge/key"
    chmod 400 "$munge/key"
    runuser -u munge -- "$(command -v munged)" --key-file="$munge/key" --socket="$munge/socket" \
        --pid-file="$munge/pid" --log-file="$munge/log" --seed-file="$munge/seed"
    configuration >"$folder/slurm.conf"
    echo "Name=gpu File=/dev/null" >"$folder/gres.conf" # a GPU to ask for, not to compute on
    export SLURM_CONF=$folder/slurm.conf
    slurmctld -f "$SLURM_CONF"
    slurmd -f "$SLURM_CONF"
    for _ in $(seq 100); do
        [ "$(sinfo -h -o %T 2>/dev/null)" = idle ] && break
        sleep 0.1
    done
    [ "$(sinfo -h -o %T)" = idle ] || { tail -n 20 "$folder"/*.log >&2; stop; exit 1; }
    if sockets | grep -qv '^127\.'; then
        echo "SLURM listens on more than loopback: $(sockets | tr '\n' ' ')" >&2
        stop
        exit 1
    fi
}

# The addresses that the daemons of this cluster, and whatever runs on it, listen on.
sockets() {
    local file ours="srun"
    for file in "$folder"/slurmctld.pid "$folder"/slurmd.pid "$munge/pid"; do
        ours+="|pid=$(cat "$file"),"
    done
    ss -ltnpH | awk -v ours="$ours" '$0 ~ ours {print $4}' | sort -u
}

stop() {
    local file
    if [ -f "$folder/slurm.conf" ]; then
        export SLURM_CONF=$folder/slurm.conf
        timeout 10 scancel --user=root --full 2>/dev/null || true
        for _ in $(seq 50); do
            [ -z "$(timeout 10 squeue -h 2>/dev/null)" ] && break
            sleep 0.1
        done
    fi
    for file in "$folder"/slurmd.pid "$folder"/slurmctld.pid "$munge/pid"; do
        ended "$file"
    done
    rm -rf "$folder"
}

# End the process of a file and wait for it.
ended() {
    local process
    [ -f "$1" ] || return 0
    process=$(cat "$1")
    [ -n "$process" ] && kill "$process" 2>/dev/null || return 0
    for _ in $(seq 50); do
        kill -0 "$process" 2>/dev/null || return 0
        sleep 0.1
    done
    kill -9 "$process" 2>/dev/null || true
}

case ${1:-} in
start | stop | sockets) "$1" ;;
*) echo "usage: $0 start|stop|sockets [FOLDER]" >&2; exit 2 ;;
esac
