# What the scripts of bin/ share: they read it by `. bin/lib.sh`.

say() { printf '%s: %s\n' "$0" "$*" >&2; }

as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi; }

# The python of the tiers page and agents and of the bench's row page: what only these import; the browser is Debian's.
long_python() { VENV=.venv-long MORE_TOOLS='playwright axe-playwright-python schemathesis' bin/venv; }

# Install Debian packages, and say which before it does; 1 if it can't. Nothing else of the machine changes: no service of
# theirs is started, and no command that was there leads to another program afterwards (gawk would become the awk).
install_packages() {
    say "installing $* (once)"
    _log=$(mktemp)
    _policy=/usr/sbin/policy-rc.d
    if [ -e $_policy ] || ! as_root sh -c "printf '#!/bin/sh\nexit 101\n' >$_policy && chmod 755 $_policy" 2>>"$_log"; then _policy=; fi
    _before=$(update-alternatives --get-selections 2>/dev/null) || _before=
    _installed=0
    _apt_get install -y --no-install-recommends "$@" >>"$_log" 2>&1 ||
        { _apt_get update && _apt_get install -y --no-install-recommends "$@"; } >>"$_log" 2>&1 || _installed=1
    _after=$(update-alternatives --get-selections 2>/dev/null) || _after=
    printf '%s\n' "$_before" | while read -r _name _mode _value; do
        printf '%s\n' "$_after" | grep -q "^$_name  *[a-z]*  *$_value\$" ||
            as_root update-alternatives --set "$_name" "$_value" </dev/null >>"$_log" 2>&1 || :
    done
    [ -z "$_policy" ] || as_root rm -f $_policy
    [ $_installed = 0 ] || { tail -n 5 "$_log" >&2; say "unable to install $*; have root run: apt-get install $*"; }
    rm -f "$_log"
    return $_installed
}

_apt_get() { as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq "$@" </dev/null; }

# The packages, of a list of lines "PROGRAM PACKAGE" on stdin, whose programs are not there.
missing_packages() {
    while read -r _program _package; do
        command -v "$_program" >/dev/null || printf '%s\n' "$_package"
    done
}
