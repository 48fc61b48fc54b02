# The far side: what runs beside the program, on the host where it runs. POSIX sh; awk, setsid and /proc are used where they are.
# payload.py puts settings before this text (nonce, cookie, life, ...) and sends both as lines of standard input; comments stay here.
#
#   sh S --- pipeline ---> W | R          W runs the program and reports how it ended
#                              R -> D     R reads control lines, D watches the lease
#   life=survive:    S -> A               A is attached: it copies to one connection, and only A ends when that is cut
#
# S is a subreaper where it could be made one (payload.py), so it has to stay for as long as the run. zsh and ksh93 run R in S itself.
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
  # No path leads to another printf here, so this needs no process.
  if PATH=/ printf ''; then printf '%s\n' "$1"; else print -r -- "$1"; fi
}

# -- W: the program, and how it ended

# Only awk's system() tells a signal (256 + n) from an exit code (0-255) where `$?` is 128 + n for both. Busybox's awk says 0 for a
# killed program, so it has to pass a probe first, in the same process; gawk documents it since 4.2, and says its version. After "B", which
# system() flushes, nothing may be run a second time.
# The program's own text comes by a pipe: in argv or in an environment it would be seen, and it may be too long for either. Whoever waits
# for the program keeps that pipe as its standard input: by it R hears of the exec.
run_program() {
  exec 8>&1 9>&2 2>/dev/null
  outcome=A
  command -v awk >/dev/null && outcome=$(
    spill "$program" | awk 'BEGIN { if (PROCINFO["version"] < "4.2" && system("kill -9 $$") != 265) { print "A"; exit }
      print "B"; print "R" system(ARGV[1]) }' "exec $setsid /bin/sh" 7>&6 6<&3 3<&- 5>&8 4>&9 8>&- 9>&-
    times
  )
  case $outcome in
  A*) outcome=$(
    spill "$program" | { $setsid /bin/sh 7>&6 6<&3 3<&- 5>&8 4>&9 8>&- 9>&-; echo "R$?" ambiguous; }
    times
  ) ;;
  esac
  exec 8>&- 9>&-
}

# How it ended, and by how much the count of OOM kills has moved, where there is one.
say_end() {
  count_kills
  say end $outcome ${before:+${kills:+"oom=$((kills - before))"}}
}

# These signals get a handler, as an ignored one would stay ignored in the program; the reader holds the pipe that is our output.
run() {
  trap : TERM INT HUP QUIT
  exec 3<&0 6>&1 >/dev/null
  find_counter
  count_kills
  before=$kills
  case $life in
  kill)
    run_program >&5 2>&4
    say_end
    echo "$nonce eof" >&5
    ;;
  survive)
    # Through pipes into the files: a program that opens /dev/stderr anew would else truncate what it has written.
    # The first cat keeps 7, so that the second ends after it: ksh93 waits for the last part of a pipeline alone.
    {
      {
        run_program 2>&7 7>&-
        say_end
      } | cat >>"$dir/out" 3<&- 4>&- 6>&- || say short out
    } 7>&1 | cat >>"$dir/err" 3<&- 4>&- 6>&- || say short err
    say eof $(size out) $(size err)
    ;;
  esac
}

# Of a stream in the directory; -1 where somebody removed it.
size() { if [ -f "$dir/$1" ]; then wc -c <"$dir/$1"; else echo -1; fi; }

# -- D: the lease

# Fed by an empty line at every heartbeat, through a pipe of which D holds both ends: it writes the pid of each of its sleepers into it and
# reads to there, so that it never waits for R. Not by signals: a startup file may have them ignored, and then no shell can catch them.
watch_lease() {
  # The end may wait for a tick where TERM is ignored; where not, it does not. $! is known even between a fork and an assignment; zsh says
  # 0 where there is none yet. By KILL: a sleep that is not yet one takes TERM for this shell's.
  trap '[ "${!:-0}" -gt 1 ] && kill -KILL "$!"; exit' TERM
  idle=0
  while [ "$idle" -lt "$lease" ] && kill -0 "$reader"; do
    sleep "$tick" 3<&- 4>&- 5>&- 9>&- &
    echo $! >&9
    wait $!
    idle=$((idle + tick))
    while read -r line <&9 && [ "$line" != $! ]; do
      [ ! "$line" ] || exit
      idle=0
    done
  done
  trap exit TERM # what is behind us now is no sleeper
  why=$idle
  [ "$idle" -ge "$lease" ] || { why=reader; idle=0; }
  tell lost "$why"
  nap
  end_all "$grace"
  name_refused tell
  kill -KILL "$reader"
  [ "$life" = survive ] || return
  # Where it is R that is gone, whoever is attached, or comes within another lease, may still hear how it ended, and clears.
  while [ "$idle" -lt "$lease" ] && [ -d "$dir" ]; do
    sleep "$tick" 3<&- 4>&- 5>&-
    idle=$((idle + tick))
  done
  detach
  rm -rf "$dir"
}

# -- R: control lines

# The pid of this very subshell; $$ would be S.
own_pid() { [ "$proc" ] && look self || number=$(exec sh -c 'echo $PPID'); }

# Of a directory in which somebody has damaged our own words: that is why there is no end among them.
said_start() { [ "$life" = kill ] || grep -q " start $pid" "$dir/said" || echo said; }

# The program's pid, once it is the program. Its shell holds the pipe of its text open for writing until exec closes it, and says in ours
# where exec came back: what we then read is that, or our own line.
await_start() {
  read -r pid why
  [ "$proc" ] && [ "$pid" -gt 1 ] || return
  read -r line <"/proc/$why/fd/0"
  { echo + >&9; read -r line why; } 9<>"$link"
  [ "$line" = + ] || pid=0
}

# A record written into a connection that is gone raises SIGPIPE: it must not end R before R has ended the program.
control() {
  trap : TERM
  trap '' INT HUP QUIT PIPE
  exec 7<&0
  await_start
  case $pid in
  '' | *[!0-9]* | 0 | 1)
    say fail "${why:-setup}"
    return
    ;;
  esac
  exec </dev/null
  born=
  look "$pid" || [ "$born" ] || exists "$pid" || born=gone
  started=$born
  own_pid
  reader=$number
  [ "$life" = survive ] && echo "$reader $boot_id" >"$dir/reader"
  say start "$pid" "$tracking"
  # A TERM before D has its trap is to end D. BusyBox 1.38 never comes back from a read after it has caught a signal, so it is ignored from
  # then on; what was ignored when D was forked ksh93 could not catch.
  trap - TERM
  watch_lease 3<&- 9<>"$link" 7<&- &
  watcher=$!
  trap '' TERM
  done= word=
  # Our end is for writing alone: without D a line is an error, and no pipe is filled up.
  {
    exec 7<&-
    [ "$proc" ] || rm -f "$link"
    while read -r word one two <&3; do
      case $word in
      h) # heartbeat
        echo >&8
        exists "$pid" || { [ "$done" ] && grep -q ' end R' "$dir/said"; } || say dead $(said_start)
        [ "$life" = kill ] && say beat "$one"
        ;;
      k) reused || ! is_pid "$pid" || kill "-$one" "$pid" ;; # signal the program
      g) left && hit "$one" ;;     # signal all of it
      z)                           # kill all of it
        end_all 0
        name_refused say
        ;;
      q)                           # the program has ended: what about the rest?
        done=1
        left
        set -- $inside $outside
        count=$#
        [ "$one" = leave ] || [ "$count" -eq 0 ] || { end_all "$one"; name_refused say; }
        [ "$one" = leave ] && [ "$life" = survive ] && nap && say eof $(size out) $(size err)
        say left "$count"
        [ "$life" = kill ] && break
        ;;
      c) # the near side has it all
        break
        ;;
      esac
    done
    echo end >&8
  } 8>"$link"
  kill "$watcher"
  [ ! "$word" ] && left && tell lost eof
  [ "$done" ] || { end_all "$grace"; name_refused tell; }
  # Not before: whatever may become of D, the program has to be ended.
  wait "$watcher"
  [ "$life" = kill ] || rm -rf "$dir"
}

# -- A: one connection to a run that survives it

# R reads a FIFO that it holds open itself, so the end of a connection is no end of file to it. Another A that a silent cut left behind goes
# first.
attach() {
  trap '' TERM INT HUP QUIT PIPE
  cd "$dir" || exit 0
  detach
  own_pid
  tail -c "+$((out_offset + 1))" -f out >&5 3<&- 4>&- & tails=$!
  tail -c "+$((err_offset + 1))" -f err >&4 3<&- 5>&- & tails="$tails $!"
  tail -n +1 -f said >&4 3<&- 5>&- & tails="$tails $!"
  echo "$number $tails" >attached
  pipe=control
  [ -p control ] || pipe=/dev/null
  while read -r word one two <&3; do
    [ "$word" = h ] && { copying || break; supervised || say dead; same control 3 || say dead control; same said 4 || say dead said; say beat "$one"; }
    [ -p control ] && echo "$word $one $two" >&7
    [ "$word" = c ] && { cleared; break; }
  done 7<>"$pipe"
  kill -KILL $tails
}

# Whether what copies still does: without it the near side waits for ever, unless it connects again. Where a file is gone that is said instead.
copying() { [ ! "$proc" ] || [ ! -e out ] || [ ! -e err ] || [ ! -e said ] || for old in $tails; do look "$old" || return 1; done; }

# Its directory proves that a pid is not somebody else's.
detach() {
  read -r attached <"$dir/attached"
  for old in $attached; do [ "/proc/$old/cwd" -ef "$dir" ] && kill -KILL "$old"; done
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
  [ -d "$dir" ] && { [ "$tracking" ] || track; list_members; hit KILL; rm -rf "$dir"; }
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

# Where R was killed D ends the run, and finds it by S: so S stays until D, its child by then, has ended.
stay() {
  [ "$tracking" = kernel ] && look $$ || return
  home=$session
  while kids=; read -r kids <"$children"; [ "$kids" ]; do
    for member in $kids; do
      look "$member" && [ "$session" = "$home" ] && { nap; continue 2; }
    done
    return
  done
}

# -v: without it bash takes a function of that name, where there is no such variable.
unset -v why self word words rest one two done kinds mount cgroup counter root point kills before count attached old booted outcome table next member list found line number parent group session born \
  seen kids home inside outside hurt spared refused named how setsid proc shows_all boot_id birth started tracking children tool tools link attacher
pid=-1
exec 3<&0 4>&2 5>&1 </dev/null >/dev/null 2>&1
echo "$nonce out" >&5
command -v setsid >/dev/null && setsid=setsid
read -r boot_id </proc/sys/kernel/random/boot_id
# A /proc of another pid namespace would show us strangers.
look self && [ "$number $parent" = "$$ $PPID" ] && proc=1 birth=$born
# With hidepid it does not show the processes of other users.
[ "$proc" ] && [ -e /proc/1/stat ] && shows_all=1
# What a startup file has started is S's child too, and none of the run's: then the kernel can't tell them apart. A run is tracked by its
# first connection, not by those that attach to it.
children=/proc/$$/task/$$/children
[ "$life" = attach ] || {
  tracking=kernel
  [ "$reaper" ] && [ "$setsid" ] && [ "$proc" ] && [ -r "$children" ] && { read -r kids <"$children"; [ ! "$kids" ]; } || track
}
say hello $$ "setsid=$setsid" "tracking=$tracking"
tools=sleep
[ "$life" = survive ] && tools="cat mkdir mkfifo rm sleep tail wc"
for tool in $tools; do command -v "$tool" || { say fail "no.$tool"; exit 0; }; done
[ "$life" = attach ] || [ "$stdin_size" -eq 0 ] || take_stdin
link=/proc/self/fd/7
[ "$proc" ] || [ "$life" = attach ] || {
  link=${TMPDIR:-/tmp}/chaperone.$stdin_name
  (umask 077; mkfifo "$link") || { say fail lease; exit 0; }
}
case $life in
kill) run | control || stay ;;
survive)
  # mkdir decides whether this is the one start: a second one, or one that was overtaken by an `attach`, is refused.
  (umask 077; mkdir -p "${dir%/*}"; mkdir "$dir" && mkfifo "$dir/control" && : >"$dir/out" && : >"$dir/err" && : >"$dir/said") || { say fail directory; exit 0; }
  # S goes on without the connection: what leaves the program is handed to S.
  attach &
  attacher=$!
  exec 3<>"$dir/control" 4>>"$dir/said" 5>&-
  run | control || stay
  wait "$attacher"
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
