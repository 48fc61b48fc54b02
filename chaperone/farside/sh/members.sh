# Which processes belong to a run on the far side, and how all of them are ended. Part of what is sent, before supervisor.sh.

# What the kernel says of a process, by its stat; the second word may hold blanks and ends with a bracket. False of one that has ended:
# no run waits for an init that takes its time to reap. A process whose first thread alone has ended still lives.
look() {
  read -r words <"/proc/$1/stat" || return 1
  number=${words%% *}
  set -- ${words##*")"}
  parent=$2 group=$3 session=$4 born=${20}
  case $1 in [ZX]) [ "${18}" -gt 1 ] ;; esac
}

# Whether $1 can be the pid of a process of the run. A `kill -KILL -1` would end all that the user may end.
is_pid() { case $1 in '' | *[!0-9]* | 0 | 1) return 1 ;; esac; }

# Whether a process, or with a - before it a group, is there. Another user's can't be signalled, but the kernel says that it is there.
exists() {
  kill -0 "$1" && return
  [ ! "$shows_all" ] || case $1 in -*) ;; *) [ -e "/proc/$1" ]; return ;; esac
  case $(LC_ALL=C; kill -0 "$1" 2>&1) in *ermi*) return 0 ;; *) return 1 ;; esac
}

# Whether the program has ended, and another process has its pid by now.
reused() { [ "$started" ] && look "$pid" && [ "$born" != "$started" ]; }

# Who belongs to the run, into $inside (of the program's own group) and $outside.
list_members() {
  inside= outside=
  if [ "$tracking" = kernel ]; then descend && return; track; fi
  case $tracking in
  cookie) search ;;
  group) [ "$setsid" ] && exists "-$pid" && inside=1 ;;
  esac
  [ "$setsid" ] || ! exists "$pid" || for member in $(family); do add "$member"; done
}

add() { case "$inside$outside " in *" $1 "*) ;; *) outside="$outside $1" ;; esac; }

# By the kernel: what descends from the program, or was handed to S when its parent died. What is in our own session is a part of us; the
# program began a session of its own, and nothing comes back from there. S is asked again after each generation, until it has none that is
# new: who dies in between hands its children to S. False where S is gone: then they are handed elsewhere.
descend() {
  look $$ && [ "$born" = "$birth" ] || return 1
  home=$session seen=' ' next=$pid
  ! reused || next=
  while :; do
    table= kids=
    read -r kids <"$children"
    for member in $next $kids; do
      case $seen in *" $member "*) ;; *) seen="$seen$member " table="$table $member" ;; esac
    done
    [ "$table" ] || return 0
    next=
    for member in $table; do
      is_pid "$member" || continue
      if look "$member"; then
        [ "$session" != "$home" ] || continue
      else
        # A /proc with hidepid shows nothing of another user's.
        [ ! -e "/proc/$member/stat" ] && exists "$member" || continue
        group=
      fi
      if [ "$group" = "$pid" ]; then inside="$inside $member"; else outside="$outside $member"; fi
      for list in "/proc/$member/task"/[0-9]*/children; do
        kids=
        read -r kids <"$list"
        next="$next $kids"
      done
    done
  done
}

# By the cookie in the environment of whatever belongs to the run, also if it left the session or its parent died. In the middle of an exec a
# process shows no environment at all: none is there only if a second look finds none either.
search() {
  found=$(grep_proc)
  [ "$found" ] || found=$(grep_proc)
  for member in $found; do
    case $member in
    */stat) inside="$inside ${member%/stat}" ;;
    *) add "${member%/environ}" ;;
    esac
  done
}

# One look for both: the group by the fifth word of stat, the cookie.
grep_proc() {
  cd /proc && LC_ALL=C grep -lsz -e "^[0-9]* (.*) [^ZX] [0-9]* ${setsid:+$pid} " -e "CHAPERONE_COOKIE=$cookie" [0-9]*/stat [0-9]*/environ
}

# Where the kernel does not hand orphans to S. Not each grep sees what is behind a NUL, and some only with -z: tried before it is believed.
track() {
  tracking=group
  [ "$proc" ] && [ "$(seen_1=1 seen_2=1 grep -cz 'seen_[12]=1' /proc/self/environ)" = 2 ] && tracking=cookie
}

# The program and its descendants, for hosts without setsid, where it has no group of its own.
family() {
  table=$(ps -A -o ppid= -o pid=)
  next=$pid
  while [ "$next" ]; do
    for member in $next; do echo "$member"; done
    next=$(echo "$table" | while read -r parent child; do case " $next " in *" $parent "*) echo "$child" ;; esac; done)
    next=$(echo $next) # blanks for its newlines
  done
}

# pid is checked before every use: `kill -TERM -` followed by nothing, or by 0, would be our own group.
left() {
  [ "$pid" -gt 1 ] || return 1
  list_members
  [ "$inside$outside" ]
}

# One signal for all that `left` has listed, and for each only once. False where none could be signalled: gone, or another user's.
hit() {
  hurt=
  [ "$setsid" ] && [ "$inside" ] && is_pid "$pid" && kill "-$1" "-$pid" && hurt=1
  for member in $outside; do is_pid "$member" && kill "-$1" "$member" && hurt=1; done
  [ "$hurt" ]
}

# A fifth of a second, or a whole one where sleep takes no fractions. Helpers hold none of our pipes, or ssh would wait for them.
nap() { sleep 0.2 3<&- 4>&- 5>&- || { sleep 1 3<&- 4>&- 5>&-; fifths=$((fifths + 4)); }; fifths=$((fifths + 1)); }

# TERM where there is a grace, of $1 fifths of a second, and then KILL, again and again for 3 s more: a fork may have been on its way.
end_all() {
  fifths=0 spared= refused=
  [ "$1" -gt 0 ] && left && hit TERM
  while left; do
    # Not at the first time: what is gone by now may have forked.
    [ "$fifths" -lt "$1" ] || hit KILL || { [ "$inside$outside" = "$spared" ] && refused=1 && break; spared=$inside$outside; }
    [ "$fifths" -ge $(($1 + 15)) ] && break
    nap
  done
}

# What `end_all` could not kill, as it is another user's: by `say` or `tell`, how many, and some by pid and name. Of a name only what no
# shell and no record could take for anything else.
name_refused() {
  [ "$refused" ] || return
  [ "$inside" != 1 ] || inside=$pid
  how=$1 named=
  set -- $inside $outside
  for member in "$@"; do
    [ "${#named}" -lt 400 ] || break
    line=
    read -r line <"/proc/$member/comm"
    line=${line%%[!A-Za-z0-9._+-]*}
    named="$named $member ${line:--}"
  done
  $how unkillable $# $named
}
