"""
Completion scripts for shells, made from the table of verbs.

Knows: the words of bash, zsh and fish.  Must not know: what a verb does.
The scripts start no chaperone, for a Tab key should answer at once: run ids are names in the spool,
which anybody may list.
"""

from __future__ import annotations

from ..spool import format
from . import arguments

SPECS, FILES, DIRECTORIES, RUNS, LIVE = (
    "SPEC",
    "FILE",
    "DIR",
    "RUN",
    "LIVE",
)  # the metavars that stand for names
WORDS = {
    "STREAM": (*format.STREAMS, format.LOG),
    "SHELL": arguments.SHELLS,
    "SIG": ("TERM", "INT", "HUP", "QUIT", "USR1", "USR2", "STOP", "CONT", "KILL", "WINCH", "ALRM"),
}
EVERYWHERE = ((("-h", "--help"), None, "this text"),)


def script(shell: str) -> str:
    """The completion script of `bash`, `zsh` or `fish`."""
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell]()


def _options(verb: str) -> list[tuple[tuple[str, ...], str | None, str]]:
    """Of each option its names, its metavar (None for a flag) and its help."""
    given = [
        (names, how.get("metavar"), str(how["help"]))
        for names, how in arguments.VERBS[verb][1]
        if names[0].startswith("-")
    ]
    return [*EVERYWHERE, *given]


def _positionals(verb: str) -> list[tuple[str, str]]:
    """Of each positional its place, `*` for the last one that may come again, and its metavar."""
    found = [how for names, how in arguments.VERBS[verb][1] if not names[0].startswith("-")]
    return [
        ("*" if how.get("nargs") in ("+", "*") else str(place), str(how["metavar"]))
        for place, how in enumerate(found)
    ]


def _with_value() -> list[str]:
    """The options that take one, whatever the verb."""
    return sorted(
        {
            name
            for verb in arguments.VERBS
            for names, metavar, _ in _options(verb)
            if metavar
            for name in names
        }
    )


# -- bash


def _bash() -> str:
    lines = []
    for verb in arguments.VERBS:
        names = " ".join(name for names, _, _ in _options(verb) for name in names)
        lines.append(f"        {verb}:option) _chaperone_words '{names}' ;;")
        lines += [
            f"        {verb}:{name}) {_in_bash(metavar)} ;;"
            for names, metavar, _ in _options(verb)
            if metavar
            for name in names
        ]
        lines += [
            f"        {verb}:{place.replace('*', '[0-9]*')}) {_in_bash(metavar)} ;;"
            for place, metavar in _positionals(verb)
        ]
    return _BASH.format(
        verbs=" ".join([*arguments.VERBS, "--help", "--version"]),
        with_value="|".join(_with_value()),
        cases="\n".join(lines),
    )


def _in_bash(metavar: str) -> str:
    if metavar in WORDS:
        return f"_chaperone_words '{' '.join(WORDS[metavar])}'"
    names = {RUNS: ".", LIVE: format.RUNNING}
    if metavar in names:
        return f'_chaperone_words "$(_chaperone_names {names[metavar]})"'
    flags = {SPECS: "f", FILES: "f", DIRECTORIES: "d"}
    return f"_chaperone_paths -{flags[metavar]}" if metavar in flags else ":"


_BASH = """\
# bash completion for chaperone: source it, or put it into the directory of bash-completion as `chaperone`.

_chaperone_words() {{ mapfile -t COMPREPLY < <(compgen -W "$1" -- "${{COMP_WORDS[COMP_CWORD]}}"); }}

_chaperone_paths() {{
    compopt -o filenames 2>/dev/null
    mapfile -t COMPREPLY < <(compgen "$1" -- "${{COMP_WORDS[COMP_CWORD]}}")
}}

_chaperone_names() {{
    local i spool=${{CHAPERONE_SPOOL:-spool}}
    for ((i = 2; i < COMP_CWORD - 1; i++)); do
        [[ ${{COMP_WORDS[i]}} != --spool ]] || spool=${{COMP_WORDS[i + 1]}}
    done
    command ls -- "$spool/$1" 2>/dev/null
}}

_chaperone() {{
    local i what=0
    COMPREPLY=()
    if ((COMP_CWORD == 1)); then
        _chaperone_words '{verbs}'
        return
    fi
    for ((i = 2; i < COMP_CWORD; i++)); do
        case ${{COMP_WORDS[i]}} in
            {with_value}) ((++i < COMP_CWORD)) || what=${{COMP_WORDS[i - 1]}} ;;
            -?*) ;;
            *) ((what += 1)) ;;
        esac
    done
    [[ $what == -* || ${{COMP_WORDS[COMP_CWORD]}} != -* ]] || what=option
    case ${{COMP_WORDS[1]}}:$what in
{cases}
    esac
}}

complete -F _chaperone chaperone
"""


# -- zsh


def _zsh() -> str:
    verbs = "\n".join(
        f"        {_in_zsh(verb + ':' + summary.replace(':', chr(92) + ':'))}"
        for verb, (summary, _) in arguments.VERBS.items()
    )
    cases = []
    for verb in arguments.VERBS:
        words = []
        for names, metavar, text in _options(verb):
            told = text.replace("[", "(").replace("]", ")").replace(":", "\\:")
            words += [
                _in_zsh(
                    f"({' '.join(names)}){name}[{told}]"
                    + (f":{metavar}:{_zsh_action(metavar)}" if metavar else "")
                )
                for name in names
            ]
        words += [
            _in_zsh(f"{'*' if place == '*' else int(place) + 1}:{metavar}:{_zsh_action(metavar)}")
            for place, metavar in _positionals(verb)
        ]
        cases.append(f"        {verb}) _arguments -s {' '.join(words)} ;;")
    return _ZSH.format(verbs=verbs, cases="\n".join(cases))


def _in_zsh(word: str) -> str:
    return "'" + word.replace("'", "'\\''") + "'"


def _zsh_action(metavar: str) -> str:
    if metavar in WORDS:
        return f"({' '.join(WORDS[metavar])})"
    # A space first: else zsh puts options of compadd before our own argument.
    names = {
        RUNS: " _chaperone_names .",
        LIVE: f" _chaperone_names {format.RUNNING}",
        SPECS: "_files",
        FILES: "_files",
        DIRECTORIES: "_files -/",
    }
    return names.get(metavar, "")


_ZSH = """\
#compdef chaperone
# zsh completion for chaperone: source it after compinit, or put it into a directory of $fpath as `_chaperone`.

_chaperone_names() {{
    local spool=${{CHAPERONE_SPOOL:-spool}} place=${{words[(i)--spool]}}
    (( place + 1 < CURRENT )) && spool=${{(Q)words[place + 1]}}
    local -a names
    names=($spool/$1/*(N:t))
    compadd -a names
}}

_chaperone() {{
    local -a verbs
    verbs=(
{verbs}
    )
    if (( CURRENT == 2 )); then
        _describe verb verbs
        return
    fi
    shift words
    (( CURRENT-- ))
    case $words[1] in
{cases}
    esac
}}

if [[ $funcstack[1] == _chaperone ]]; then _chaperone "$@"; else compdef _chaperone chaperone; fi
"""


# -- fish


def _fish() -> str:
    lines = []
    for verb, (summary, _) in arguments.VERBS.items():
        lines.append(
            f"complete -c chaperone -n '__chaperone_at 0' -a {verb} -d {_in_fish(summary)}"
        )
        for names, metavar, text in _options(verb):
            flags = " ".join(
                f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in names
            )
            value = f" -x {_fish_action(metavar)}".rstrip() if metavar else ""
            lines.append(
                f"complete -c chaperone -n '__chaperone_at {verb}' {flags}{value} -d {_in_fish(text)}"
            )
        for place, metavar in _positionals(verb):
            lines.append(
                f"complete -c chaperone -n '__chaperone_at {verb} {place.replace('*', '')}' {_fish_action(metavar)}"
            )
    return _FISH.format(with_value=" ".join(_with_value()), lines="\n".join(lines))


def _in_fish(word: str) -> str:
    return "'" + word.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _fish_action(metavar: str) -> str:
    if metavar in WORDS:
        return f"-a '{' '.join(WORDS[metavar])}'"
    names = {
        RUNS: "__chaperone_names .",
        LIVE: f"__chaperone_names {format.RUNNING}",
        SPECS: "__fish_complete_path",
        FILES: "__fish_complete_path",
        DIRECTORIES: "__fish_complete_directories",
    }
    return f"-a '({names[metavar]})'" if metavar in names else ""


_FISH = """\
# fish completion for chaperone: source it, or put it into ~/.config/fish/completions as `chaperone.fish`.

function __chaperone_names
    set -l spool spool
    set -q CHAPERONE_SPOOL; and set spool $CHAPERONE_SPOOL
    set -l words (commandline -opc)
    set -l place (contains -i -- --spool $words); and set -q words[(math $place + 1)]; and set spool $words[(math $place + 1)]
    command ls -- $spool/$argv[1] 2>/dev/null
end

# Whether the word at the cursor belongs to a verb (0: is the verb itself), and is its positional of that place, if one is given.
function __chaperone_at
    set -l words (commandline -opc)
    if test $argv[1] = 0
        test (count $words) -eq 1
        return
    end
    test (count $words) -ge 2; and test $words[2] = $argv[1]; or return 1
    set -q argv[2]; or return 0
    set -l place 0
    set -l skip 0
    for word in $words[3..-1]
        if test $skip = 1
            set skip 0
        else if contains -- $word {with_value}
            set skip 1
        else if not string match -q -- '-?*' $word
            set place (math $place + 1)
        end
    end
    test $place = $argv[2]
end

complete -c chaperone -f
complete -c chaperone -n '__chaperone_at 0' -l help -s h -d 'all verbs'
complete -c chaperone -n '__chaperone_at 0' -l version -d 'the version'
{lines}
"""
