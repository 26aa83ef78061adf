#!/usr/bin/env bash
# Start a SLURM cluster of two nodes on this machine: munged, slurmctld and two slurmd, as any user, without systemd,
# cgroups or an accounting database.
#
#   usage: start-slurm.sh DIR PORT    then: export SLURM_CONF=DIR/slurm.conf
#
# All files are written to DIR, whose path must be short (DIR contains a socket). PORT to PORT + 2 must be free.
# stop-slurm.sh DIR ends the cluster.
set -euo pipefail
dir=$1 port=$2
here=$(cd "$(dirname "$0")" && pwd)
export PATH=$PATH:/usr/sbin:/sbin SLURM_CONF=$dir/slurm.conf
mkdir -p "$dir"/{state,log,pid}
chmod 755 "$dir"
mkdir -m 700 "$dir/munge"
trap '[ "${up:-}" ] || "$here/stop-slurm.sh" "$dir"' EXIT

# The socket needs a directory that is open to other users, the key a closed one; --force allows both below /tmp.
mkdir -m 755 "$dir/socket"
(umask 077 && head -c 128 /dev/urandom >"$dir/munge/key")
munged --force --key-file="$dir/munge/key" --seed-file="$dir/munge/seed" --log-file="$dir/munge/log" \
    --pid-file="$dir/munge/pid" --socket="$dir/socket/munge" 2>"$dir/log/munged" ||
    { cat "$dir/log/munged" >&2; exit 1; }
cp "$dir/munge/pid" "$dir/pid/munged"

# Node names are loopback addresses, so that a job resolves its first node without DNS. GPUs are links to /dev/null.
# cred_expire: time until a requeued job can start, 2 minutes by default.
# preempt_send_user_signal: a preempted job receives the signal of its --signal option, and GraceTime to react.
for gpu in 0 1; do ln -s /dev/null "$dir/gpu$gpu"; done
echo "Name=gpu File=$dir/gpu[0-1]" >"$dir/gres.conf"
echo 'CgroupAutomount=no' >"$dir/cgroup.conf"
cat >"$SLURM_CONF" <<END
ClusterName=tests
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$dir/socket/munge,cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool-%n
SlurmctldPidFile=$dir/state/slurmctld.pid
SlurmdPidFile=$dir/state/slurmd-%n.pid
SlurmctldLogFile=$dir/log/slurmctld
SlurmdLogFile=$dir/log/slurmd-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
InactiveLimit=0
KillWait=5
DefMemPerCPU=100
GresTypes=gpu
NodeName=127.0.0.1 NodeAddr=127.0.0.1 NodeHostname=$(hostname -s) Port=$((port + 1)) CPUs=4 RealMemory=4000 Gres=gpu:2
NodeName=127.0.0.2 NodeAddr=127.0.0.2 NodeHostname=$(hostname -s) Port=$((port + 2)) CPUs=4 RealMemory=4000 Gres=gpu:2
PartitionName=normal Nodes=ALL Default=YES PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=ALL PriorityTier=9 PreemptMode=OFF
PartitionName=single Nodes=ALL MaxNodes=1 PriorityTier=1
PartitionName=brief Nodes=ALL MaxTime=30 PriorityTier=1
END

setsid slurmctld -D -c </dev/null &>"$dir/log/slurmctld.out" &
echo $! >"$dir/pid/slurmctld"
for node in 127.0.0.1 127.0.0.2; do
    setsid slurmd -D -N $node </dev/null &>"$dir/log/slurmd-$node.out" &
    echo $! >"$dir/pid/slurmd-$node"
done

for _ in {1..150}; do
    if [ "$(timeout 5 sinfo -h -p normal -N -o %T 2>/dev/null | grep -c '^idle$')" = 2 ]; then
        up=yes
        exit
    fi
    sleep .2
done
echo 'start-slurm.sh: the nodes did not become idle' >&2
tail -n 5 "$dir"/log/* >&2
exit 1
