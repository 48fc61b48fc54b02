# How often the kernel's OOM killer has struck in the cgroup of this shell, where the program is started: as program/cgroup.py, by builtins.
# No variable is `path`: in zsh that is PATH.

# The file that counts: v1's, or in v2 that of the nearest cgroup above us that has the controller. Where a container shows a part of the
# tree alone, mountinfo says which.
find_counter() {
  mount= cgroup= counter=memory.events
  while IFS=: read -r word kinds rest; do
    case $word,$kinds, in
    *,memory,*)
      mount=/sys/fs/cgroup/memory cgroup=$rest counter=memory.oom_control
      break
      ;;
    0,,) mount=/sys/fs/cgroup cgroup=$rest ;;
    esac
  done </proc/self/cgroup
  # Another namespace's.
  case $cgroup/ in */../*) mount= ;; esac
  [ "$mount" ] || return
  [ -d "$mount$cgroup" ] || while read -r word word word root point rest; do
    [ "$point" = "$mount" ] && case $cgroup/ in "$root"/*) cgroup=${cgroup#"$root"} ;; esac
  done </proc/self/mountinfo
  cgroup=${cgroup%/}
  [ -d "$mount$cgroup" ] && [ "$counter" = memory.events ] && while [ "$cgroup" ] && [ ! -e "$mount$cgroup/$counter" ]; do
    cgroup=${cgroup%/*}
  done
  counter=$mount$cgroup/$counter
}

# Into $kills; empty where nothing counts.
count_kills() {
  kills=
  [ -r "$counter" ] && while read -r word rest; do [ "$word" = oom_kill ] && kills=$rest; done <"$counter"
}
