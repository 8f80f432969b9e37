#!/usr/bin/env bash
# A real Slurm cluster of several nodes on one Debian machine, for the tests; root only, Debian's packages only.
#
#   up                      install what is missing, configure, start; quick when repeated
#   down                    stop everything that `up` started; packages, accounts and old jobs stay
#   status                  which daemons and nodes run, and what sinfo says
#   crash NODE              a pulled plug: the network first, then every process
#   revive NODE             boot it again
#   sh NODE [CMD...]        CMD, or a shell, as root on that node
#   lab [CMD...]            CMD, or a shell, as the ordinary user lab on the login side
#   reach PATH...           lets lab read a folder, also below one closed to others; on every node, until `down`
#   ctld-stop, ctld-start   the controller: without it squeue and sbatch fail
#   acct-off, acct-on       the accounting daemon: without it sacct fails
#   without WORD, restore   take the lines with WORD out of slurm.conf, and put them back
#   mount ARG..., umount    a disk that the login side alone sees
#   packages [NAME...]      only install, NAME too
#   check                   say what keeps a cluster from running here
#
# AMLAUNCH_CLUSTER=N (1) is which of several that run at once and know nothing of each other: each has a network, /run,
# /etc/slurm, daemons' folders and a home of lab to itself, in namespaces of its own.
#
# A node is a set of namespaces (net, uts, ipc, mount, pid) with its own slurmd, hostname, /run, /local and /dev/shm.
# It has two interfaces: eth0 (10.77.0.0/24) and ib0, which has one IPv6 address (fd77::/64) and no IPv4. / is shared,
# and so stands for the cluster's file system.
: "${AMLAUNCH_CLUSTER:=1}" "${AMLAUNCH_CPU_NODES:=2}" "${AMLAUNCH_GPU_NODES:=2}" "${AMLAUNCH_GPUS:=8}"
set -euo pipefail
export LC_ALL=C DEBIAN_FRONTEND=noninteractive
umask 022

STATE=/var/lib/amlaunch-cluster # inside: jobs, accounts, the nodes' own files, process ids
WORLD=/var/lib/amlaunch-clusters/$AMLAUNCH_CLUSTER # outside: what a cluster has to itself, each in a folder
LOG=/var/log/slurm
CONF=/etc/slurm
MARK='# of tests/slurm/cluster.sh'
NET=10.77.0
IB_NET=fd77:
LAB=lab

say() { printf 'cluster: %s\n' "$*"; }
die() { printf 'cluster: error: %s\n' "$*" >&2; exit 1; }

wait_for() { # wait_for SECONDS CMD...
  local tries=$(($1 * 10)); shift
  while ! "$@" >/dev/null 2>&1; do
    tries=$((tries - 1)); [ $tries -gt 0 ] || return 1
    sleep 0.1
  done
}

# --- processes: STATE/pid/NAME holds a process id and its start time, so that a reused id is never taken for ours

born() { # of a process that nobody has reaped yet: nothing
  local stat; stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
  awk '$1 != "Z" {print $20}' <<<"${stat##*) }"
}
pid_of() { cut -d' ' -f1 "$STATE/pid/$1"; }

alive() {
  local pid time
  read -r pid time 2>/dev/null <"$STATE/pid/$1" && [ "$(born "$pid")" = "$time" ]
}
gone() { ! alive "$1"; }

daemon() { # daemon NAME CMD...: in a session of its own, output in STATE/NAME.out
  local name=$1 pid; shift
  setsid "$@" >"$STATE/$name.out" 2>&1 </dev/null &
  pid=$!
  echo "$pid $(born $pid)" >"$STATE/pid/$name"
}

stop() { # stop NAME: asks, and kills after ten seconds
  if alive "$1"; then
    kill "$(pid_of "$1")" 2>/dev/null || true
    wait_for 10 gone "$1" || kill -KILL "$(pid_of "$1")"
  fi
  rm -f "$STATE/pid/$1"
}

init_of() { # the first process of a node, as seen from outside: the only child of its unshare
  local pid; pid=$(pid_of "$1")
  grep -o '[0-9]*' "/proc/$pid/task/$pid/children"
}

inside() { # inside NODE CMD...
  local node=$1; shift
  alive "$node" || die "$node does not run"
  nsenter -t "$(init_of "$node")" -m -u -i -n -p -r -- "$@"
}

# --- a world of its own for each cluster: what is below STATE is there only inside

start_world() {
  alive world && return 0
  mkdir -p "$STATE/pid"
  rm -f "$STATE/ready"
  daemon world unshare --net --mount --propagation slave bash "$0" world
  wait_for 10 test -e "$STATE/ready" || die "no namespaces: $(cat "$STATE/world.out")"
}

world() {
  local name places=(state /var/lib/amlaunch-cluster conf "$CONF" log "$LOG" spool /var/spool/slurmd home "/home/$LAB" run /run)
  mkdir -p "$STATE"/{state,conf,log,spool,home,cgroup}
  install -d -o $LAB -g $LAB "$STATE/home"
  mount --rbind /sys/fs/cgroup "$STATE/cgroup"
  mount -t sysfs sysfs /sys # shows this world's interfaces only
  mount --rbind "$STATE/cgroup" /sys/fs/cgroup
  rm -rf "$STATE/run"
  mkdir -m 755 "$STATE/run"
  mkdir -m 1777 "$STATE/run/lock"
  cp /etc/hosts "$STATE/hosts"
  mount --bind "$STATE/hosts" /etc/hosts
  ip link set lo up
  for ((name = 0; name < ${#places[@]}; name += 2)); do
    mkdir -p "${places[name + 1]}"
    mount --bind "$STATE/${places[name]}" "${places[name + 1]}"
  done
  touch "$STATE/ready"
  exec sleep infinity
}

enter() { # enter COMMAND...: this script again, inside; every program replaces the one before
  alive world || die "cluster $AMLAUNCH_CLUSTER does not run"
  exec nsenter -t "$(pid_of world)" -m -n -- env -C "$PWD" AMLAUNCH_CLUSTER_INSIDE=1 bash "$0" "$@"
}

from_outside() { # from_outside COMMAND...
  STATE=$WORLD
  case $1 in
    up)
      check
      mkdir -p "$STATE"
      exec 9>"$STATE/../lock" # two that start at once install, and make the user, one after the other
      flock 9
      packages "${@:2}"
      add_user
      start_world 9>&-
      exec 9>&-
      enter up
      ;;
    down)
      if alive world; then (enter down); fi
      stop world
      say down
      ;;
    *) enter "$@" ;;
  esac
}

# --- installation and configuration

packages() {
  local missing=("$@") name
  for name in slurmctld slurmd slurmdbd slurm-client slurm-wlm-basic-plugins munge mariadb-server-core \
    mariadb-client-core iproute2 util-linux procps shellcheck; do
    [ "$(dpkg-query -W -f='${db:Status-Status}' $name 2>/dev/null)" = installed ] || missing+=("$name")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  say "installing ${missing[*]}"
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}

nodes() {
  local i
  for ((i = 1; i <= AMLAUNCH_CPU_NODES; i++)); do echo "cpu$i"; done
  for ((i = 1; i <= AMLAUNCH_GPU_NODES; i++)); do echo "gpu$i"; done
}

host_part() { case $1 in cpu*) echo $((10 + ${1#cpu})) ;; gpu*) echo $((100 + ${1#gpu})) ;; esac }

slurm_conf() {
  cat <<END
$MARK
ClusterName=lab
SlurmctldHost=$(hostname -s)($NET.1)
SlurmUser=slurm
AuthType=auth/munge
# a requeued job starts again after this many seconds (default: two minutes)
AuthInfo=cred_expire=5
StateSaveLocation=$STATE/slurmctld
SlurmdSpoolDir=/var/spool/slurmd/%n
SlurmdPidFile=/var/spool/slurmd/%n/slurmd.pid
SlurmctldPidFile=/run/slurmctld.pid
SlurmctldLogFile=$LOG/slurmctld.log
SlurmdLogFile=$LOG/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=2
# there are no cgroups here: slurmstepd itself kills a job that takes too much memory
JobAcctGatherParams=OverMemoryKill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
GresTypes=gpu
# a node may claim more processors and memory than the machine has
SlurmdParameters=config_overrides
SchedulerParameters=bf_interval=2,sched_interval=2,sched_min_interval=100000,batch_sched_delay=0
# preemption with a grace time sends the signal that the job asked for with --signal
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MaxArraySize=1001
KillWait=5
MinJobAge=3600
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=15
MpiDefault=none
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStorageTRES=gres/gpu,gres/gpu:h100
AccountingStorageEnforce=associations,limits,qos
AccountingStoreFlags=job_comment,job_env,job_script
PriorityType=priority/multifactor
PriorityWeightQOS=1000
PartitionName=DEFAULT State=UP MaxTime=INFINITE
END
  local node gres cpu="Nodes=cpu[1-$AMLAUNCH_CPU_NODES]" gpu="Nodes=gpu[1-$AMLAUNCH_GPU_NODES]"
  for node in $(nodes); do
    case $node in gpu*) gres=Gres=gpu:h100:$AMLAUNCH_GPUS ;; *) gres= ;; esac
    echo "NodeName=$node NodeAddr=$NET.$(host_part "$node") CPUs=32 RealMemory=64000 $gres"
  done
  echo "PartitionName=cpu $cpu Default=YES"
  echo "PartitionName=short $cpu MaxTime=10"
  echo "PartitionName=closed $cpu AllowAccounts=nobody"
  echo "PartitionName=gpu $gpu PriorityTier=10 PreemptMode=OFF"
  echo "PartitionName=gpu-low $gpu PriorityTier=1 PreemptMode=REQUEUE GraceTime=10"
  echo "PartitionName=gpu-now $gpu PriorityTier=1 PreemptMode=REQUEUE GraceTime=0"
}

slurmdbd_conf() {
  cat <<END
$MARK
AuthType=auth/munge
DbdHost=localhost
SlurmUser=slurm
PidFile=/run/slurmdbd.pid
LogFile=$LOG/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=slurm
StorageLoc=slurm_acct_db
END
}

oci_conf() { # srun --container: runc, as the user; a state folder of each node's own
  local state='--root=/local/runc-%u'
  cat <<END
RunTimeRun="runc --rootless=true $state run --bundle %b %n.%u.%j.%s.%t"
RunTimeQuery="runc --rootless=true $state state %n.%u.%j.%s.%t"
RunTimeKill="runc --rootless=true $state kill -a %n.%u.%j.%s.%t SIGKILL"
RunTimeDelete="runc --rootless=true $state delete --force %n.%u.%j.%s.%t"
END
}

check() {
  { [ -e /etc/debian_version ] && command -v apt-get >/dev/null; } || die "needs Debian"
  unshare --net --uts --ipc --mount --pid --fork true 2>/dev/null || die "namespaces are forbidden here"
  [ ! -e $CONF/slurm.conf ] || grep -qxF "$MARK" $CONF/slurm.conf || die "$CONF/slurm.conf belongs to another cluster"
}

changed() { ! cmp -s "$0" "$STATE/cluster.sh" || ! slurm_conf | cmp -s - $CONF/slurm.conf; }

add_user() { # and devices
  local i
  getent passwd $LAB >/dev/null || useradd -m -s /bin/bash $LAB
  # Slurm takes only device files for GPUs: these are copies of /dev/null
  for ((i = 0; i < AMLAUNCH_GPUS; i++)); do [ -c "/dev/fakegpu$i" ] || mknod -m 666 "/dev/fakegpu$i" c 1 3; done
  ! [ -c /dev/fuse ] || chmod 666 /dev/fuse # containers of an ordinary user
}

podman_conf() { # of lab, whose home is the same everywhere: images and state are a node's own
  cat >"$1/storage.conf" <<END
[storage]
driver = "overlay"
graphroot = "/local/containers/storage"
runroot = "/local/containers/run"
END
  cat >"$1/containers.conf" <<END
[engine]
# crun 1.8 refuses a machine that has both kinds of control groups
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
tmp_dir = "/local/containers/tmp"
END
}

configure() {
  local node
  install -d -o $LAB -g $LAB /home/$LAB/.config /home/$LAB/.config/containers
  podman_conf /home/$LAB/.config/containers
  install -d -o slurm -g slurm $LOG "$STATE/slurmctld" "$STATE/db"
  slurm_conf >$CONF/slurm.conf
  slurmdbd_conf | install -m 600 -o slurm -g slurm /dev/stdin $CONF/slurmdbd.conf
  echo "Name=gpu Type=h100 File=/dev/fakegpu[0-$((AMLAUNCH_GPUS - 1))] Flags=nvidia_gpu_env" |
    sed "s/^/NodeName=gpu[1-$AMLAUNCH_GPU_NODES] /" >$CONF/gres.conf
  echo CgroupAutomount=no >$CONF/cgroup.conf
  oci_conf >$CONF/oci.conf
  forget_hosts
  for node in $(nodes); do echo "$NET.$(host_part "$node") $node $MARK"; done >>/etc/hosts
}

forget_hosts() { # not sed -i: in a container /etc/hosts cannot be replaced
  local rest; rest=$(grep -vF "$MARK" /etc/hosts || true)
  printf '%s\n' "$rest" >/etc/hosts
}

# --- daemons

start_munge() { # a munged that runs already is used, and left alone by `down`
  munge -n >/dev/null 2>&1 && return 0
  install -d -o munge -g munge /run/munge
  daemon munged setpriv --reuid munge --regid munge --clear-groups munged --foreground --force
  wait_for 10 munge -n || die "munged: $(cat "$STATE/munged.out")"
}

sql() { mariadb --no-defaults --socket "$STATE/db/socket" "$@"; }

start_database() {
  alive mariadbd && return 0
  if [ ! -d "$STATE/db/data" ]; then
    rm -rf "$STATE/db/new"
    mariadb-install-db --no-defaults --user=slurm --datadir="$STATE/db/new" --skip-test-db >"$STATE/mariadb-install.out"
    mv "$STATE/db/new" "$STATE/db/data"
  fi
  daemon mariadbd mariadbd --no-defaults --user=slurm --datadir="$STATE/db/data" --socket="$STATE/db/socket" \
    --pid-file="$STATE/db/pid" --skip-networking --skip-grant-tables --performance-schema=OFF \
    --innodb-buffer-pool-size=32M --innodb-log-file-size=16M --innodb-lock-wait-timeout=900
  wait_for 60 sql -e 'create database if not exists slurm_acct_db' || die "mariadbd: $(tail -5 "$STATE/mariadbd.out")"
}

start_accounting() {
  alive slurmdbd || daemon slurmdbd env MYSQL_UNIX_PORT="$STATE/db/socket" slurmdbd -D
  wait_for 60 sacctmgr -n show cluster || die "slurmdbd does not answer, see $LOG/slurmdbd.log"
}

add_accounts() { # lab belongs to account lab; account other has nobody
  [ -z "$(sacctmgr -nP show user $LAB)" ] || return 0
  {
    sacctmgr -iQ add cluster lab
    sacctmgr -iQ add account lab cluster=lab
    sacctmgr -iQ add account other cluster=lab
    sacctmgr -iQ add qos low set Priority=1
    sacctmgr -iQ add qos high set Priority=100
    sacctmgr -iQ add user root,$LAB account=lab qos=normal,low,high defaultqos=normal
  } >"$STATE/sacctmgr.out" 2>&1 || true # some may be there
  [ -n "$(sacctmgr -nP show user $LAB)" ] || die "sacctmgr: $(cat "$STATE/sacctmgr.out")"
}

start_ctld() {
  alive slurmctld || daemon slurmctld slurmctld -D
  wait_for 20 sh -c 'scontrol ping | grep -q "is UP"' || die "slurmctld does not answer, see $LOG/slurmctld.log"
}

# --- nodes

bridge() { # bridge NAME ADDRESS...
  local name=$1; shift
  [ ! -e "/sys/class/net/$name" ] || return 0
  ip link add "$name" type bridge
  ip link set "$name" addrgenmode none up
  ip addr add dev "$name" "$@"
}

plug() { # plug NODE INTERFACE BRIDGE ADDRESS...
  local ns=aml-$1 interface=$2 bridge=$3 outside=$2-$1; shift 3
  ip link add "$outside" type veth peer name "$interface" netns "$ns"
  ip link set "$outside" master "$bridge" addrgenmode none up
  ip -n "$ns" link set "$interface" addrgenmode none up
  ip -n "$ns" addr add dev "$interface" "$@"
}

start_network() {
  bridge aml-eth $NET.1/24
  bridge aml-ib $IB_NET:1/64 nodad # nodad: the address is usable at once
  # a firewall's rules for forwarded packets (docker's, say) are not for our bridges
  ! [ -e /proc/sys/net/bridge/bridge-nf-call-iptables ] || echo 0 >/proc/sys/net/bridge/bridge-nf-call-iptables
}

start_node() {
  local node=$1 host; host=$(host_part "$1")
  ! alive "$node" || return 0
  unplug "$node"
  ip netns add "aml-$node"
  ip -n "aml-$node" link set lo up
  plug "$node" eth0 aml-eth "$NET.$host/24"
  plug "$node" ib0 aml-ib "$IB_NET:$host/64" nodad
  install -d "$STATE/nodes/$node/run" "/var/spool/slurmd/$node" /local
  install -d -m 1777 "$STATE/nodes/$node/local"
  daemon "$node" nsenter --net="/run/netns/aml-$node" unshare --uts --ipc --mount --pid --fork --mount-proc \
    --propagation slave bash "$STATE/cluster.sh" boot "$node"
  wait_for 10 init_of "$node" || die "$node does not boot: $(cat "$STATE/$node.out")"
}

boot() { # the first process of a node, inside its namespaces
  local own="$STATE/nodes/"$1
  hostname "$1"
  mount --rbind / "$STATE/all" # see open_paths
  mount -t sysfs sysfs /sys # shows this node's interfaces only
  mount --rbind "$STATE/all/sys/fs/cgroup" /sys/fs/cgroup
  mount -t tmpfs -o mode=1777 tmpfs /dev/shm
  mkdir -p /dev/mqueue && mount -t mqueue mqueue /dev/mqueue # podman --ipc=host wants it
  mount --bind "$own/local" /local
  mount -t tmpfs -o mode=755 tmpfs "$own/run"
  install -d "$own/run/munge"
  install -d -m 1777 "$own/run/lock"
  mount --bind /run/munge "$own/run/munge"
  mount --rbind "$own/run" /run
  open_paths
  cd /
  slurmd -D &
  # outlives its slurmd, and reaps what tasks leave behind
  while :; do sleep 3600 & wait $! || true; done
}

unplug() {
  local interface
  for interface in eth0 ib0; do ip link del "$interface-$1" 2>/dev/null || true; done
  [ ! -e "/run/netns/aml-$1" ] || ip netns del "aml-$1"
}

crash() {
  local node=$1 interface
  alive "$node" || return 0
  for interface in eth0 ib0; do ip link set "$interface-$node" down; done
  kill -KILL "$(init_of "$node")"
  wait_for 10 gone "$node" || die "$node does not die"
  rm "$STATE/pid/$node"
  unplug "$node"
}

revive() {
  # a machine takes longer to boot than Slurm to miss it; a job of a node that is back at once would stay RUNNING
  alive "$1" || scontrol update nodename="$1" state=down reason=crashed || true
  start_node "$1"
  wait_for_nodes "$1"
}

listens() { (: <"/dev/tcp/$NET.$(host_part "$1")/6818") 2>/dev/null; }
usable() {
  local states; states=$(sinfo -hN -n "$1" -o %T) || return 1
  ! grep -qvE '^(idle|mixed|allocated|completing)$' <<<"$states"
}

wait_for_nodes() { # wait_for_nodes NODE...
  local node all
  for node in "$@"; do wait_for 20 listens "$node" || die "slurmd does not answer, see $LOG/slurmd-$node.log"; done
  all=$(IFS=,; echo "$*")
  wait_for 10 usable "$all" || {
    scontrol update nodename="$all" state=resume 2>/dev/null || true
    wait_for 30 usable "$all" || { sinfo -R; die "not every node of $all is up"; }
  }
}

# --- an ordinary user: lab, in a mount namespace of its own, which stands for the login node

start_login() {
  alive login || daemon login unshare --mount --propagation slave bash "$STATE/cluster.sh" login
}

login() {
  mount --rbind / "$STATE/all"
  open_paths
  exec sleep infinity
}

as_lab() { setpriv --reuid $LAB --regid $LAB --init-groups "$@"; }

open_paths() { # inside a namespace: lab may read every folder of STATE/reach here, whatever those above it allow
  local path closed
  while read -r path; do
    [ -d "$STATE/all$path" ] || continue
    ! as_lab test -r "$path" -a -x "$path" || continue
    if [ -e "$path" ]; then
      # the topmost closed folder gets an empty one laid over it, which only this namespace sees
      closed=$path
      while ! as_lab test -x "$(dirname "$closed")"; do closed=$(dirname "$closed"); done
      mount -t tmpfs -o mode=755 tmpfs "$closed"
    fi
    mkdir -p "$path"
    show "$path"
  done <"$STATE/reach"
}

show() { # STATE/all is the root folder as it was before anything was laid over
  local from="$STATE/all"$1 entry
  if [ -n "$(find "$from" -maxdepth 0 -perm -005)" ]; then
    mount --rbind "$from" "$1"
    return
  fi
  # the folder itself is closed: another one, with the same folders and copies of the files
  while IFS= read -r -d '' entry; do
    if [ -d "$from/$entry" ] && [ ! -L "$from/$entry" ]; then
      mkdir "$1/$entry"
      mount --rbind "$from/$entry" "$1/$entry"
    else
      cp -a "$from/$entry" "$1/$entry"
    fi
  done < <(find "$from" -mindepth 1 -maxdepth 1 -printf '%f\0')
}

reach() {
  local path place
  for path in "$@"; do grep -qxF "$path" "$STATE/reach" || echo "$path" >>"$STATE/reach"; done
  nsenter -t "$(pid_of login)" -m -r -- bash "$STATE/cluster.sh" open-paths
  for place in $(nodes); do ! alive "$place" || inside "$place" bash "$STATE/cluster.sh" open-paths; done
}

lab() {
  [ $# -gt 0 ] || set -- bash
  # every program replaces the one before: a signal to this process reaches CMD
  exec nsenter -t "$(pid_of login)" -m -r -- setpriv --reuid $LAB --regid $LAB --init-groups env -i -C "$PWD" \
    HOME=/home/$LAB USER=$LAB LOGNAME=$LAB LANG=C.UTF-8 PATH="$PATH" TERM="${TERM:-dumb}" "$@"
}

# --- the whole

up() {
  local started=$SECONDS node
  if alive slurmctld && changed; then stop_all; fi
  mkdir -p "$STATE/pid" "$STATE/all" "$STATE/nodes"
  touch "$STATE/reach"
  install -m 755 "$0" "$STATE/cluster.sh"
  configure
  start_munge
  start_network
  start_database
  start_accounting
  add_accounts
  start_ctld
  start_login
  for node in $(nodes); do start_node "$node"; done
  # shellcheck disable=SC2046 # one argument a node
  wait_for_nodes $(nodes)
  say "up after $((SECONDS - started)) s"
}

stop_all() {
  local file node name
  for file in "$STATE"/pid/[cg]pu*; do
    node=${file##*/}
    [ ! -e "$file" ] || crash "$node"
    unplug "$node"
  done
  for name in login slurmctld slurmdbd mariadbd munged; do stop $name; done
  for name in aml-eth aml-ib; do ip link del $name 2>/dev/null || true; done
  rm -f "$STATE/reach"
}

without() {
  grep -qF -- "$1" $CONF/slurm.conf || die "no $1 in slurm.conf"
  slurm_conf | grep -vF -- "$1" >$CONF/slurm.conf
  reconfigure
}

restore() {
  slurm_conf >$CONF/slurm.conf
  reconfigure
}

reconfigure() {
  scontrol reconfigure
  sleep 1
}

status() {
  local name
  for name in munged mariadbd slurmdbd slurmctld login $(nodes); do
    if alive "$name"; then say "$name runs, process $(pid_of "$name")"; else say "$name does not run"; fi
  done
  ! alive slurmctld || sinfo
}

[ "$(id -u)" = 0 ] || die "needs root"
command=${1:-}
[ $# -eq 0 ] || shift
case $command in
  check | packages) "$command" "$@" && exit ;;
  boot | login | open-paths | world) ;; # of this script, inside
  up | down | status | crash | revive | reach | lab | sh | ctld-stop | ctld-start | acct-off | acct-on | without | restore | mount | umount)
    [ -n "${AMLAUNCH_CLUSTER_INSIDE:-}" ] || from_outside "$command" "$@"
    ;;
esac
case $command in
  up | status | crash | revive | reach | lab | boot | login | without | restore) "$command" "$@" ;;
  world) STATE=$WORLD && world ;;
  down) stop_all ;;
  sh) [ $# -gt 1 ] || set -- "$1" bash; inside "$@" ;;
  mount | umount) nsenter -t "$(pid_of login)" -m -r -- "$command" "$@" ;;
  ctld-stop) stop slurmctld ;;
  ctld-start) start_ctld ;;
  acct-off) stop slurmdbd ;;
  acct-on) start_accounting ;;
  open-paths) open_paths ;;
  *) sed -n '2,/^$/{s/^# \?//p}' "$0"; exit 2 ;;
esac
