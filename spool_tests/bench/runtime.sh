#!/bin/sh
# As runtime.c, where there is no compiler.
while [ $# -gt 0 ]; do
    if [ "$1" = --pid-file ]; then pid_file=$2; fi
    shift
done
set -f
IFS=$(printf '\037')
$RUNTIME_ARGV &
[ -z "$pid_file" ] || printf %d $! >"$pid_file"
