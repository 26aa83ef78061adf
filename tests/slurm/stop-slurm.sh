#!/usr/bin/env bash
# End the cluster of start-slurm.sh DIR, and its jobs.
#
#   usage: stop-slurm.sh DIR
dir=$1
# Unlike kill -0, this ignores zombies, which init can take seconds to collect.
is_alive() { [ -e "/proc/$1/stat" ] && ! grep -qs ') Z ' "/proc/$1/stat"; }
export PATH=$PATH:/usr/sbin:/sbin SLURM_CONF=$dir/slurm.conf

if [ -e "$dir/pid/slurmctld" ] && is_alive "$(cat "$dir/pid/slurmctld")"; then
    # A job's processes ignore SIGTERM. SIGKILL ends all of them before their slurmd.
    for state in RUNNING PENDING; do
        timeout 10 squeue -h -t $state -o %A | while read -r job; do
            [ $state = PENDING ] || timeout 10 scancel --full --signal=KILL "$job"
            timeout 10 scancel "$job"
        done
    done 2>/dev/null
    for _ in {1..50}; do
        [ "$(timeout 5 squeue -h -t RUNNING,COMPLETING 2>/dev/null)" ] || break
        sleep .2
    done
fi

# Nodes end first, while the controller is reachable. SIGKILL keeps the controller from storing its state for seconds.
for name in slurmd-127.0.0.1 slurmd-127.0.0.2 slurmctld munged; do
    [ -e "$dir/pid/$name" ] || continue
    pid=$(cat "$dir/pid/$name")
    [ $name = slurmctld ] && signal=KILL || signal=TERM
    kill -$signal "$pid" 2>/dev/null
    for _ in {1..60}; do
        is_alive "$pid" || break
        sleep .1
    done
    is_alive "$pid" && kill -KILL "$pid"
    rm "$dir/pid/$name"
done
exit 0
