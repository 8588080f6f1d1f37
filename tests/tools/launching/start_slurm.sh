#!/bin/bash
# A real Slurm of one node on this machine: start_slurm.sh FOLDER PORT. Needs slurmctld, slurmd, munged, and root.
# Keeps all it writes in FOLDER, uses PORT and PORT + 1 on loopback, prints "ready", and ends its daemons when it ends.
# Clients need SLURM_CONF=FOLDER/slurm.conf.
set -eu
folder=$1 port=$2 host=$(hostname -s)
mkdir -p "$folder/spool" "$folder/state"
chmod 755 "$folder"
head -c 1024 /dev/urandom >"$folder/munge.key"
chmod 400 "$folder/munge.key"

cat >"$folder/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmdPort=$((port + 1))
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=10
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=2,batch_sched_delay=1
SelectType=select/linear
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
export SLURM_CONF=$folder/slurm.conf

# Jobs outlive the daemons, if nobody cancels them.
trap 'timeout 10 scancel --user="$(id -un)" 2>/dev/null || true; sleep 1; kill $(jobs -p) 2>/dev/null; wait' EXIT
trap 'exit 0' TERM INT
munged --foreground --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" \
  --pid-file="$folder/munged.pid" --log-file="$folder/munged.log" --seed-file="$folder/munged.seed" 2>"$folder/munged.err" &
for _ in $(seq 100); do [ -S "$folder/munge.socket" ] && break; sleep 0.1; done
slurmctld -D -i >"$folder/slurmctld.out" 2>&1 &
slurmd -D >"$folder/slurmd.out" 2>&1 &
for _ in $(seq 300); do
  [ "$(jobs -pr | wc -l)" = 3 ] || break # one has ended, with its reason in its log
  if timeout 5 sinfo --noheader --format=%T 2>/dev/null | grep -q idle; then
    echo ready
    wait
    exit
  fi
  sleep 0.2
done
tail -n 5 "$folder"/*.log "$folder"/*.out >&2
exit 1
