#!/bin/sh
# Take each event of a spool exactly once: sh consumer.sh CURSOR DIRECTORY
#
# A batch of events is committed when its file has its name in DIRECTORY, which is its number.
mkdir -p "$2"
rm -f "$2/.new" "$2/.answers"; mkfifo "$2/.answers"
chaperone follow --cursor "$1" <"$2/.answers" | {
    exec 3>"$2/.answers"
    while IFS= read -r line; do
        if [ "$(printf '%s\n' "$line" | jq -r .event)" = batch ]; then
            number=$(printf '%s\n' "$line" | jq .batch)
            [ -e "$2/$number" ] || mv "$2/.new" "$2/$number"   # the commit: the events and their number
            rm -f "$2/.new"
            echo "$number" >&3
        else
            printf '%s\n' "$line" >>"$2/.new"
        fi
    done
}
