# The guard of one run: if the chaperone is killed, nothing of its run lives on.
# It sits in a session of its own, blocked on a pipe that only the chaperone holds open; no heartbeat is needed.
# stdin: the run's cookie, then the program's process group, then `done`.  An end without `done` means the chaperone was killed.
# 3, 4: what the program's stdout and stderr pipes still hold.  5, 6: the spool's files, and with them a lock that says "not drained yet".

trap '' HUP INT QUIT TERM USR1 USR2 PIPE

read -r cookie || exit 0
group=
while read -r word; do
  case $word in
    done) exit 0 ;;
    *) group=$word ;;
  esac
done

# The group first: it is the whole run in almost every case, and only its death ends the pipes.
[ "${group:-0}" -gt 1 ] && kill -s KILL -- "-$group" 2>/dev/null

# Each cat holds its file's lock until the last writer of its pipe is gone.
cat <&3 >&5 2>/dev/null 3<&- 4<&- 5>&- 6>&- &
drain_stdout=$!
cat <&4 >&6 2>/dev/null 3<&- 4<&- 5>&- 6>&- &
drain_stderr=$!
exec 3<&- 4<&- 5>&- 6>&-

# Then whatever left the group: it still carries the cookie in its environment.
# Two empty looks in a row, because a process between fork and exec shows its parent's environment.
looks=0
empty=0
while [ "$empty" -lt 2 ] && [ "$looks" -lt 200 ]; do
  found=$(grep -lsF -e "CHAPERONE_COOKIE=$cookie" /proc/[0-9]*/environ 2>/dev/null | sed 's,^/proc/,,;s,/environ$,,')
  if [ "$found" ]; then
    kill -s KILL $found 2>/dev/null
    empty=0
  else
    empty=$((empty + 1))
  fi
  looks=$((looks + 1))
  sleep 0.05
done

# A writer that escaped (its environment cleared, its session its own) may hold a pipe for ever: our patience is 2 s.
# By pid only while it still is our child: the shell may have reaped it, and the number may be someone else's by now.
drains() { grep -qs "^PPid:[[:space:]]*$$\$" "/proc/$1/status"; }
waited=0
while { drains "$drain_stdout" || drains "$drain_stderr"; } && [ "$waited" -lt 40 ]; do
  sleep 0.05
  waited=$((waited + 1))
done
for drain in "$drain_stdout" "$drain_stderr"; do
  drains "$drain" && kill -s KILL "$drain" 2>/dev/null
done
exit 0
