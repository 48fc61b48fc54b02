# The far side: what runs beside the program, on the host where it runs. POSIX sh; awk, setsid and /proc are used where they are.
# farside.py puts settings before this text (nonce, cookie, life, ...) and sends both as lines of standard input; comments stay here.
#
#   sh S --- pipeline ---> W | R          W runs the program and reports how it ended
#                              R -> D     R reads control lines, D watches the lease
#   life=survive:         { W | R; } | A  A is attached: it copies to one connection, and only A ends when that is cut
#
# The program must be in a foreground pipeline: as `program &` it would ignore SIGINT and SIGQUIT for good (dash, ash, mksh, zsh).
#
# Descriptors: 3 control lines in, 4 records out, 5 the program's output to the near side. 0, 1, 2 of the shell are the program's
# standard input, and /dev/null twice: a shell's own words (mksh on odd locales, zsh on kill) must not mix into the records.

# -- words to the near side

# A record is one write, shorter than PIPE_BUF: no byte of the program gets into it.
say() { echo "$nonce $*" >&4; }

# A record before an end: whoever should read it may be gone with the pipe full, and the program has to be ended all the same.
tell() { say "$@" 3<&- 5>&- & }

# Text to standard output, unchanged. `echo` would undo backslashes; where printf is no builtin (mksh) it would show secrets in ps.
spill() {
  case $(command -v printf) in
  printf) printf '%s\n' "$1" ;;
  *) print -r -- "$1" ;;
  esac
}

# -- whom there is to end

# Whatever carries the cookie in its environment, also if it left the session or its parent died. In the middle of an exec a process
# shows no environment at all: nobody is there only where a second look finds nobody either.
marked() {
  for look in 1 2; do
    found=$(grep -lF "CHAPERONE_COOKIE=$cookie" /proc/[0-9]*/environ)
    [ "$found" ] && break
  done
  for member in $found; do
    member=${member#/proc/}
    echo "${member%/environ}"
  done
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

others() {
  if [ "$setsid" ]; then marked; else { kill -0 "$pid" && family; marked; } | sort -u; fi
}

# Whether a process is in the program's group, by the fifth word of its stat; the second one may hold blanks and ends with a bracket.
in_group() {
  read -r words <"/proc/$1/stat" || return 1
  set -- ${words##*")"}
  [ "$setsid" ] && [ "$3" = "$pid" ]
}

# A process that has ended counts as a member until its parent takes it up; an init that takes its time with that is not waited for.
group_lives() {
  [ "$setsid" ] && kill -0 "-$pid" || return 1
  [ ! -r /proc/self/stat ] || grep -qs "^[0-9]* (.*) [^ZX] [0-9]* $pid " /proc/[0-9]*/stat
}

# pid is checked before every use: `kill -TERM -` followed by nothing, or by 0, would be our own group.
left() {
  [ "$pid" -gt 1 ] || return 1
  group_lives || [ "$(others)" ]
}

# One signal for all of them, and for each only once; listed first, since a parent's death may hide its children.
hit() {
  [ "$pid" -gt 1 ] || return 1
  listed=$(others)
  [ "$setsid" ] && kill "-$1" "-$pid"
  for other in $listed; do in_group "$other" || kill "-$1" "$other"; done
}

# A fifth of a second, or a whole one where sleep takes no fractions. Helpers hold none of our pipes, or ssh would wait for them.
nap() { sleep 0.2 3<&- 4>&- 5>&- || { sleep 1 3<&- 4>&- 5>&-; fifths=$((fifths + 4)); }; fifths=$((fifths + 1)); }

# TERM, then after $1 fifths of a second KILL, again and again for 3 s more: a fork may have been on its way.
end_all() {
  fifths=0
  left && hit TERM
  while left; do
    [ "$fifths" -ge "$1" ] && hit KILL
    [ "$fifths" -ge $(($1 + 15)) ] && break
    nap
  done
}

# How many were left by a program that has ended: the marked ones; without /proc it is only known that there are any.
count_left() {
  set -- $(others)
  count=$#
  [ "$count" -eq 0 ] && group_lives && count=1
  echo "$count"
}

# -- W: the program, and how it ended

# Only awk's system() tells a signal (256 + n) from an exit code (0-255) where `$?` is 128 + n for both. Busybox's awk says 0 for a
# killed program, so it has to pass a probe first, in the same process. After "B" nothing may be run a second time.
# The program's own text comes by a pipe: in argv or in an environment it would be seen, and it may be too long for either.
run_program() {
  exec 8>&1 9>&2 2>/dev/null
  outcome=A
  command -v awk >/dev/null && outcome=$(
    spill "$program" | awk 'BEGIN { if (system("kill -9 $$") != 265) { print "A"; exit }
      print "B"; system(""); print "R" system(ARGV[1]) }' "exec $setsid /bin/sh -c '$boot'" 7>&6 6<&3 3<&- 5>&8 4>&9 8>&- 9>&-
    times
  )
  case $outcome in
  A*) outcome=$(
    spill "$program" | $setsid /bin/sh -c "$boot" 7>&6 6<&3 3<&- 5>&8 4>&9 8>&- 9>&-
    echo "R$?" ambiguous
    times
  ) ;;
  esac
  exec 8>&- 9>&-
}

# These signals get a handler, as an ignored one would stay ignored in the program; the reader holds the pipe that is our output.
run() {
  trap : TERM INT HUP QUIT USR1
  exec 3<&0 6>&1 >/dev/null
  case $life in
  kill)
    run_program >&5 2>&4
    say end $outcome
    echo "$nonce eof" >&5
    ;;
  survive)
    # Through pipes into the files: a program that opens /dev/stderr anew would else truncate what it has written.
    {
      {
        run_program 2>&7 7>&-
        say end $outcome
      } | cat >>"$dir/out" 3<&- 4>&- 6>&- 7>&-
    } 7>&1 | cat >>"$dir/err" 3<&- 4>&- 6>&-
    say eof $(size out) $(size err)
    ;;
  esac
}

# Of a stream in the directory; -1 where somebody removed it.
size() { if [ -f "$dir/$1" ]; then wc -c <"$dir/$1"; else echo -1; fi; }

# -- D: the lease

# Fed by USR1 at every heartbeat. A USR1 that comes before it is caught here would kill D, and the lease would silently never end; to
# ignore it until then is no help, as ksh93 can't catch what was ignored when it forked. So D says when it is ready, and R feeds
# only then. `wait` and not `sleep` alone, so that a signal is served at once.
watch_lease() {
  trap 'idle=0' USR1
  kill -USR1 "$reader"
  # $! and not $sleeper: between the fork and the assignment the one is newer. zsh says 0 where there is none yet.
  # By KILL, and not waited for: a sleep that is not yet one takes TERM for this shell's, and one time in 7,000 a wait that zsh
  # begins in a trap, while it waits already, never returns.
  trap '[ "${!:-0}" -gt 1 ] && kill -KILL "$!"; exit' TERM
  trap : INT HUP QUIT
  trap '' PIPE
  idle=0
  sleeper=
  while [ "$idle" -lt "$lease" ] && kill -0 "$reader"; do
    sleep "$tick" 3<&- 4>&- 5>&- &
    sleeper=$!
    wait "$sleeper"
    kill "$sleeper" && continue
    idle=$((idle + tick))
  done
  trap exit TERM # what is behind us now is no sleeper
  why=$idle
  [ "$idle" -ge "$lease" ] || { why=reader; idle=0; }
  tell lost "$why"
  nap
  end_all "$grace"
  kill -KILL "$reader"
  [ "$life" = survive ] || return
  # Where it is R that is gone, whoever is attached, or comes within another lease, may still hear how it ended, and clears.
  while [ "$idle" -lt "$lease" ] && [ -d "$dir" ]; do
    sleep "$tick" 3<&- 4>&- 5>&-
    idle=$((idle + tick))
  done
  read -r attached <"$dir/attached" && [ "/proc/$attached/cwd" -ef "$dir" ] && kill "$attached"
  rm -rf "$dir"
}

# -- R: control lines

# The pid of this very subshell; $$ would be S.
own_pid() { read -r self ignored </proc/self/stat || self=$(exec sh -c 'echo $PPID'); }

# Of a directory in which somebody has damaged our own words: that is why there is no end among them.
said_start() { [ "$life" = kill ] || grep -q " start $pid" "$dir/said" || echo said; }

feed() { kill -USR1 "$watcher"; }

# A record written into a connection that is gone raises SIGPIPE: it must not end R before R has ended the program.
control() {
  trap : TERM INT HUP QUIT
  trap '' PIPE
  read -r pid why
  case $pid in
  '' | *[!0-9]* | 0 | 1)
    say fail "${why:-setup}"
    exit 0
    ;;
  esac
  exec </dev/null
  own_pid
  reader=$self
  [ "$life" = survive ] && echo "$reader $boot_id" >"$dir/reader"
  say start "$pid"
  ready=
  trap 'ready=1' USR1
  watch_lease 3<&- &
  watcher=$!
  while [ ! "$ready" ] && kill -0 "$watcher"; do :; done
  done=
  while read -r word one two <&3; do
    case $word in
    h) # heartbeat
      feed
      kill -0 "$pid" || { [ "$done" ] && grep -q ' end R' "$dir/said"; } || say dead $(said_start)
      [ "$life" = kill ] && say beat "$one"
      ;;
    k) kill "-$one" "$pid" ;; # signal the program
    g) hit "$one" ;;                      # signal all of it
    z) end_all 0 ;;                       # kill all of it
    q)                                    # the program has ended: what about the rest?
      done=1
      count=$(count_left)
      [ "$one" = leave ] || [ "$count" -eq 0 ] || end_all "$one"
      [ "$one" = leave ] && [ "$life" = survive ] && nap && say eof $(size out) $(size err)
      say left "$count"
      [ "$life" = kill ] && break
      ;;
    c) # the near side has it all
      break
      ;;
    esac
  done
  kill "$watcher"
  [ ! "$word" ] && left && tell lost eof
  [ "$done" ] || end_all "$grace"
  # Not before: whatever may become of D, the program has to be ended.
  wait "$watcher"
  [ "$life" = survive ] && rm -rf "$dir"
}

# -- A: one connection to a run that survives it

# R reads a FIFO that it holds open itself, so the end of a connection is no end of file to it. Another A that a silent cut left
# behind goes first; its directory proves that the pid is not somebody else's.
attach() {
  trap : TERM INT HUP QUIT
  trap '' PIPE
  cd "$dir" || exit 0
  read -r old <attached && [ "/proc/$old/cwd" -ef "$dir" ] && kill "$old"
  own_pid
  echo "$self" >attached
  tail -c "+$((out_offset + 1))" -f out >&5 3<&- 4>&- & tails=$!
  tail -c "+$((err_offset + 1))" -f err >&4 3<&- 5>&- & tails="$tails $!"
  tail -n +1 -f said >&4 3<&- 5>&- & tails="$tails $!"
  # Not by TERM: a tail that is not yet one, between fork and exec, would take it for this shell's and forget it.
  trap 'kill -KILL $tails; exit' TERM
  pipe=control
  [ -p control ] || pipe=/dev/null
  while read -r word one two <&3; do
    [ "$word" = h ] && { supervised || say dead; same control 3 || say dead control; same said 4 || say dead said; say beat "$one"; }
    [ -p control ] && echo "$word $one $two" >&7
    [ "$word" = c ] && { cleared; break; }
  done 7<>"$pipe"
  kill -KILL $tails
}

# Whether R still lives. After a reboot its pid may be another's.
supervised() { read -r reader booted <"$dir/reader" && [ "$booted" = "$boot_id" ] && kill -0 "$reader"; }

# Whether a file is still the one that R has open, and was not removed or replaced; R would not hear us, or we not R.
same() { if [ -e "/proc/$reader/fd/$2" ]; then [ "$1" -ef "/proc/$reader/fd/$2" ]; else [ -e "$1" ]; fi; }

# R clears the directory; where there is no R any more, or it can't be told, what it should have ended and cleared is done here.
cleared() {
  fifths=0
  while supervised && same control 3 && [ "$fifths" -lt 25 ]; do nap; done
  supervised && kill -KILL "$reader"
  cd /
  [ -d "$dir" ] && { for one in $(marked); do kill -KILL "$one"; done; rm -rf "$dir"; }
  say bye
}

# -- S: this shell

# Standard input for the program, counted and complete before it starts, in a file that has no name any more. Passed on live it could
# block the control lines behind it. dd with a big block may read short from a pipe, unless it knows fullblock (GNU, busybox).
take_stdin() {
  stdin_file=${TMPDIR:-/tmp}/chaperone.$stdin_name
  (umask 077; set -C; : >"$stdin_file") || { say fail stdin; exit 0; }
  exec 8>"$stdin_file" 9<"$stdin_file"
  rm -f "$stdin_file"
  if dd iflag=fullblock count=0 </dev/null >/dev/null; then
    dd bs=65536 iflag=fullblock count=$((stdin_size / 65536)) <&3 >&8
    dd bs=$((stdin_size % 65536 + (stdin_size % 65536 == 0))) iflag=fullblock count=$((stdin_size % 65536 > 0)) <&3 >&8
  else
    dd ibs=1 obs=65536 count="$stdin_size" <&3 >&8
  fi
  exec 0<&9 8>&- 9<&-
}

# -v: without it bash takes a function of that name, where there is no such variable.
unset -v pid why self ignored word words one other two done count attached old booted outcome table next member listed fifths found look
pid=0
exec 3<&0 4>&2 5>&1 </dev/null >/dev/null 2>&1
setsid=
command -v setsid >/dev/null && setsid=setsid
boot_id=
read -r boot_id </proc/sys/kernel/random/boot_id
echo "$nonce out" >&5
say hello $$ "setsid=$setsid" "environ=$([ -r /proc/self/environ ] && echo proc)"
[ "$life" = attach ] || [ "$stdin_size" -eq 0 ] || take_stdin
case $life in
kill) run | control ;;
survive)
  # mkdir decides whether this is the one start: a second one, or one that was overtaken by an `attach`, is refused.
  (umask 077; mkdir -p "${dir%/*}"; mkdir "$dir" && mkfifo "$dir/control" && : >"$dir/out" && : >"$dir/err" && : >"$dir/said") || { say fail directory; exit 0; }
  # By exec, for a shell that redirects a whole group keeps the old descriptors meanwhile, and ssh would wait for them.
  {
    exec 3<>"$dir/control" 4>>"$dir/said" 5>&-
    run | control
  } | attach
  ;;
attach)
  # No directory: it was never started, and the mkdir sees to it that a start still on its way is refused.
  if (umask 077; mkdir -p "${dir%/*}"; mkdir "$dir"); then
    say fail never
    (sleep 60; rmdir "$dir") 3<&- 4>&- 5>&- &
    exit 0
  fi
  [ "$(size out)" -ge "$out_offset" ] || say short out
  [ "$(size err)" -ge "$err_offset" ] || say short err
  attach
  ;;
esac
exit 0
