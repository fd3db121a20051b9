#!/usr/bin/env bash
# A real Slurm on this machine, for tests: munged, slurmctld and two slurmd, all in one directory, nothing in /etc.
#   tools/slurm_testbed.sh start [DIRECTORY]     its last line is the export that makes sbatch, srun ... find it
#   tools/slurm_testbed.sh stop [DIRECTORY]      ends it, its jobs and their processes, and removes the directory
#   tools/slurm_testbed.sh status [DIRECTORY]
# Partition main has nodes n1 and n2 (this machine twice). Partition big has four nodes that do not exist: it is
# for `sbatch --test-only`. Each node says it has 8 GPUs, whatever there is.
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin
unset "${!SLURM_@}" "${!SBATCH_@}"  # settings of another Slurm would mislead daemons and clients

die() {
    echo "error: $*" >&2
    exit 1
}

command=${1:-}
dir=$(realpath -m -- "${2:-${TMPDIR:-/tmp}/slurm-testbed-$(id -u)}")
export SLURM_CONF=$dir/slurm.conf
marker=$dir/.slurm-testbed

install() {
    local program missing=()
    for program in munged slurmctld slurmd slurmstepd sbatch perl; do
        command -v "$program" >/dev/null || missing+=("$program")
    done
    ((${#missing[@]})) || return 0
    local packages=(slurmctld slurmd slurm-client munge perl-base)
    [[ $EUID == 0 && $(command -v apt-get) ]] ||
        die "not installed: ${missing[*]}; as root: apt-get install ${packages[*]} (or what has them on this system)"
    export DEBIAN_FRONTEND=noninteractive
    local apt=(apt-get install -y --no-install-recommends "${packages[@]}")
    "${apt[@]}" >&2 </dev/null || { apt-get update >&2 && "${apt[@]}" >&2 </dev/null; } ||
        die "apt-get could not install ${packages[*]}"
}

alive() {  # NAME: not a zombie, which has no environment, and not another's process that got the pid of a crashed one
    local pid
    pid=$(cat "$dir/$1.pid" 2>/dev/null) && grep -qszFx "SLURM_CONF=$SLURM_CONF" "/proc/$pid/environ"
}

answers() {
    [[ -e $SLURM_CONF ]] && timeout 10 scontrol ping 2>/dev/null | grep -q ' is UP'
}

processes() {  # daemons have a variable from start, jobs one from Slurm, slurmstepd neither; a client is left alone
    local environ
    while read -r environ; do
        if grep -qszE '^(SLURM_JOB_ID|SLURM_TESTBED)=' "$environ" ||
            [[ $(cat "${environ%/environ}/comm" 2>/dev/null) == slurmstepd ]]; then
            cut -d/ -f3 <<<"$environ"
        fi
    done < <(grep -lszFx "SLURM_CONF=$SLURM_CONF" /proc/[0-9]*/environ)
}

stop() {
    [[ -e $marker ]] || return 0
    if answers; then
        timeout 10 scancel --user="$(id -un)" || true
        for _ in {1..20}; do
            [[ -n $(timeout 5 squeue --noheader 2>/dev/null) ]] || break
            sleep 0.2
        done
    fi
    local pids
    for _ in {1..50}; do  # again, for those born meanwhile
        mapfile -t pids < <(processes)
        ((${#pids[@]})) || break
        kill -KILL "${pids[@]}" 2>/dev/null || true
        sleep 0.1
    done
    ((${#pids[@]} == 0)) || die "still running in spite of SIGKILL: ${pids[*]}"
    rm -rf -- "$dir"
}

free_ports() {  # the first of eight neighbours that nobody listens on, below those the kernel hands out by itself
    local first port
    for _ in {1..100}; do
        first=$((20000 + RANDOM % 1500 * 8))
        for ((port = first; port < first + 8; port++)); do
            (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null && continue 2
        done
        echo "$first" && return
    done
    die "no eight free ports in a row between 20000 and 32000"
}

configure() {
    local port host
    port=$(free_ports)
    host=$(uname -n)
    host=${host%%.*}
    mkdir -p "$dir"/{state,spool,log,gpu}
    : >"$marker"
    (umask 077 && head -c 1024 /dev/urandom >"$dir/munge.key")
    # slurmd drops GPUs without a File from what it has (and the node is invalid then); any file that exists will do.
    touch "$dir"/gpu/{0..7}
    echo "Name=gpu File=$dir/gpu/[0-7]" >"$dir/gres.conf"
    # proctrack/linuxproc signals the tree of processes below a step, sessions of their own included, but not those whose
    # parent is gone, unless slurmstepd (of slurmd -d) adopts them: 36 is PR_SET_CHILD_SUBREAPER, which exec keeps.
    # Clusters reach them by cgroup, which needs more rights than a container may have.
    local prctl=157
    [[ $(uname -m) == x86_64 ]] || prctl=167  # as on all newer architectures
    cat >"$dir/slurmstepd" <<END
#!/usr/bin/env perl
syscall($prctl, 36, 1, 0, 0, 0) == 0 or die "prctl: \$!";
exec {"$(command -v slurmstepd)"} "slurmstepd", @ARGV or die "slurmstepd: \$!";
END
    chmod +x "$dir/slurmstepd"
    # - cred_expire: a requeued job waits that long and a second; Slurm takes 5 as the least, and 120 is its default.
    # - SlurmdTimeout: a node that is gone is noticed after about that long.
    # - config_overrides: nodes have what is declared, not what the machine has.
    # - CLOUD: nodes that start when needed, thus fit a job without being there. Suspend* and ResumeProgram must be set.
    cat >"$SLURM_CONF" <<END
ClusterName=testbed
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthInfo=socket=$dir/munge.socket,cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/%n.log
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1
JobRequeue=1
KillWait=25
UnkillableStepTimeout=30
SlurmdTimeout=10
ReturnToService=2
SlurmdParameters=config_overrides
SuspendProgram=/bin/true
ResumeProgram=/bin/true
SuspendTime=86400
SuspendExcParts=main
GresTypes=gpu
NodeName=DEFAULT RealMemory=2000000 Gres=gpu:8
NodeName=n[1-2] NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 1))-$((port + 2)) CPUs=8
NodeName=big[1-4] NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 3))-$((port + 6)) CPUs=128 State=CLOUD
PartitionName=main Nodes=n1,n2 Default=YES
PartitionName=big Nodes=big[1-4]
END
}

daemon() {  # NAME COMMAND ...: unless it is alive; goes to the background by itself, once it is sure it can run
    alive "$1" || SLURM_TESTBED=1 timeout 60 setsid "${@:2}" </dev/null >>"$dir/log/start.log" 2>&1
}

daemons() {
    daemon munge munged --force --key-file="$dir/munge.key" --socket="$dir/munge.socket" \
        --pid-file="$dir/munge.pid" --log-file="$dir/log/munge.log" --seed-file="$dir/munge.seed" &&
        daemon slurmctld slurmctld &&
        daemon n1 slurmd -N n1 -d "$dir/slurmstepd" &&
        daemon n2 slurmd -N n2 -d "$dir/slurmstepd"
}

start() {
    install
    # Unix sockets below it have names of up to 107 characters.
    ((${#dir} <= 75)) || die "directory $dir: longer than 75 characters; give a shorter one"
    [[ -e $marker || -z $(ls -A "$dir" 2>/dev/null) ]] || die "directory $dir: is not empty; give another one"
    # With one daemon left, the others join it and jobs continue; with none, it is a crash long ago or the first start.
    alive munge || alive slurmctld || alive n1 || alive n2 || { stop && configure; }
    local end=$((SECONDS + 60)) states
    if daemons; then
        while ((SECONDS < end)); do
            states=$(timeout 10 sinfo --noheader --Node --partition=main --format=%T 2>/dev/null | sort -u) || true
            if [[ $states ]] && ! grep -qvE '^(idle|mixed|allocated|completing)$' <<<"$states"; then
                echo "Slurm is up in $dir"
                echo "export SLURM_CONF=$SLURM_CONF"
                return
            fi
            sleep 0.2
        done
    fi
    tail -n 15 "$dir"/log/* >&2
    die "Slurm in $dir did not start; above are the ends of its logs (stop removes it)"
}

case $command in
    start | stop) "$command" ;;
    status)
        answers || die "no Slurm is up in $dir"
        sinfo
        squeue
        echo "export SLURM_CONF=$SLURM_CONF"
        ;;
    *) die "usage: ${0##*/} start|stop|status [DIRECTORY]" ;;
esac
