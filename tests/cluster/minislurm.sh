#!/usr/bin/env bash
# A throw-away SLURM cluster of one node for tests, as root, without systemd: fake GPUs, fake CPUs, a partition gpu.
#
#   minislurm.sh start DIR    prints the line that makes sbatch find it
#   minislurm.sh stop DIR     cancels its jobs and ends its three daemons
set -euo pipefail
COMMAND=${1:?start or stop}
DIR=$(mkdir -p "${2:?folder}" && cd "$2" && pwd)
HOST=$(hostname -s)
export SLURM_CONF=$DIR/slurm.conf

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

write_configuration() {
  local device
  mkdir -p "$DIR"/{state,spool,log,run,dev}
  chmod 755 "$DIR" "$DIR/run"
  cat >"$SLURM_CONF" <<CONF
ClusterName=mini
SlurmctldHost=$HOST(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$DIR/run/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool
SlurmctldPidFile=$DIR/run/slurmctld.pid
SlurmdPidFile=$DIR/run/slurmd.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
MailProg=/bin/true
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2,sched_min_interval=0
MpiDefault=none
ReturnToService=2
SwitchType=switch/none
SlurmdParameters=config_overrides
GresTypes=gpu
MinJobAge=3600
KillWait=600
InactiveLimit=0
Waittime=0
NodeName=node1 NodeHostname=$HOST NodeAddr=127.0.0.1 CPUs=64 Boards=1 SocketsPerBoard=1 CoresPerSocket=64 ThreadsPerCore=1 RealMemory=524288 Gres=gpu:a100:6,gpu:h100:2 State=UNKNOWN
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
  for device in {0..7}; do ln -sfn /dev/null "$DIR/dev/nvidia$device"; done # links to null stand in for GPUs
  printf 'NodeName=node1 Name=gpu Type=%s File=%s\n' a100 "$DIR/dev/nvidia[0-5]" h100 "$DIR/dev/nvidia[6-7]" >"$DIR/gres.conf"
  echo "CgroupPlugin=cgroup/v1" >"$DIR/cgroup.conf" # keeps slurmd 22.05 from probing /sys/fs/cgroup
}

start() {
  [[ -f $SLURM_CONF ]] || write_configuration
  [[ -f $DIR/munge.key ]] || (umask 077 && dd if=/dev/urandom of="$DIR/munge.key" bs=1 count=1024 status=none)
  munged --key-file="$DIR/munge.key" --socket="$DIR/run/munge.sock" --pid-file="$DIR/run/munged.pid" \
    --log-file="$DIR/log/munged.log" --seed-file="$DIR/munge.seed" --num-threads=2
  slurmctld -f "$SLURM_CONF"
  slurmd -f "$SLURM_CONF"
  for _ in {1..300}; do
    case $(sinfo --noheader --format=%T 2>/dev/null || true) in
      idle | mixed | allocated) echo "export SLURM_CONF=$SLURM_CONF" && return ;;
    esac
    sleep 0.1
  done
  echo "the node did not come up" >&2
  tail -n 20 "$DIR"/log/*.log >&2
  return 1
}

stop() {
  local file pid
  scancel --full --signal=KILL --user=root 2>/dev/null || true
  for file in "$DIR"/run/{slurmd,slurmctld,munged}.pid; do
    [[ -s $file ]] || continue
    pid=$(<"$file")
    kill "$pid" 2>/dev/null || true
    for _ in {1..100}; do
      kill -0 "$pid" 2>/dev/null || break
      sleep 0.1
    done
    kill -9 "$pid" 2>/dev/null || true
  done
}

"$COMMAND"
