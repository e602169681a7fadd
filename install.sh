#!/bin/sh
# Installs ctrl-exec by copying one file, and runs its tests. POSIX sh; needs no network except that
# --run-tests fetches pytest where the Python it uses has none. `./install.sh --help` says how to use it.

set -eu
umask 022

usage() {
    cat <<'END'
usage: install.sh [--dispatcher] [--agent] [--api] [--prefix DIR] [--move-aside]   install one role or more
       install.sh --uninstall [--dispatcher] [--agent] [--api] [--prefix DIR]
       install.sh --run-tests [ARGUMENTS OF PYTEST ...]

  --dispatcher   the control host: ced (also: ctrl-exec, ctrl-exec-dispatcher)
  --agent        a managed host: cea (also: ctrl-exec-agent), and a service that is not started yet
  --api          the HTTP API on a control host: ctrl-exec-api, and a service that is not started yet
  --move-aside   rename what is in the way and not made by this script to NAME.before-ctrl-exec
  --uninstall    remove the program and the service; configuration, keys, state and users stay
  --run-tests    run the tests with $PYTHON, or with python3
  --prefix DIR   where the program goes (default: /usr/local)
  --help         show this

Run it again at any time: it repairs what is missing and never changes a configuration file.
Environment: DESTDIR puts the whole tree below a directory (no users, no service manager, owners as they
come); PYTHON is the interpreter to use (default: the system's python3, 3.9 or newer).
As an ordinary user with a --prefix of one's own, only the program is installed.
END
}

say() { printf '%s\n' "$*"; }

die() { # STATUS SENTENCE
    status=$1
    shift
    printf 'install.sh: %s\n' "$*" >&2
    exit "$status"
}

has() { command -v "$1" >/dev/null 2>&1; }

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd -P)

# --- options ------------------------------------------------------------------------------------------

dispatcher='' agent='' api='' uninstall='' run_tests='' move_aside=''
prefix=/usr/local

while [ $# -gt 0 ]; do
    case $1 in
    --dispatcher) dispatcher=yes ;;
    --agent) agent=yes ;;
    --api) api=yes ;;
    --uninstall) uninstall=yes ;;
    --move-aside) move_aside=yes ;;
    --prefix)
        [ $# -ge 2 ] || die 2 "--prefix needs a directory"
        prefix=$2
        shift
        ;;
    --prefix=*) prefix=${1#--prefix=} ;;
    --run-tests) # everything after it is for pytest
        run_tests=yes
        shift
        break
        ;;
    -h | --help)
        usage
        exit 0
        ;;
    *) die 2 "unknown option \`$1' (see install.sh --help)" ;;
    esac
    shift
done

case $prefix in
/*) ;;
*) die 2 "--prefix must be an absolute path, and \`$prefix' is not" ;;
esac
case $prefix in # it is written into the service file, which has quoting rules of its own
*[!A-Za-z0-9/._+@~,-]*) die 2 "--prefix may hold letters, digits and /._+@~,- only, unlike \`$prefix'" ;;
esac
while [ "$prefix" != "${prefix%/}" ]; do prefix=${prefix%/}; done

# --- the interpreter ----------------------------------------------------------------------------------

# Print the absolute path of an interpreter that will do; or fail, and print what it lacks if that is all that
# is amiss. $2 = all: everybody must be able to read its library, because what faces the network gives up root
# and imports modules afterwards.
probe_python() {
    "$1" -IS - "$2" "$here/ctrl_exec.py" 2>/dev/null <<'END'
import os
import re
import sys

if sys.version_info < (3, 9) or len(sys.executable.split()) != 1:
    sys.exit(1)

# A system may have a part of the standard library only (python3-minimal), and the program imports much of it
# late: each module that it imports anywhere is tried now.
names = set()
if os.path.exists(sys.argv[2]):
    with open(sys.argv[2], encoding="utf-8") as file:
        found = re.findall(r"(?m)^ *(?:import +([\w., ]+)|from +([\w.]+) +import )", file.read())
    names = {name.split()[0] for pair in found for name in ",".join(pair).split(",") if name.strip()}
missing = []
for name in sorted(names | {"ssl"}):
    try:
        __import__(name)
    except Exception:  # NameError, too: modules whose own imports fail half-way raise what they like
        missing.append(name)
if missing:
    print(sys.executable, "cannot import", ", ".join(missing))
    sys.exit(1)

if sys.argv[1] == "all":
    for path in (os.path.realpath(os.__file__), os.path.realpath(sys.executable)):
        while path != "/":
            path = os.path.dirname(path)
            if not os.stat(path).st_mode & 1:
                sys.exit(1)
print(sys.executable)
END
}

# For an installation: a system interpreter before the one that happens to be first in somebody's PATH, which
# may be a shim that works in his shell only, and by the name that survives the system's upgrades. When it
# fails it prints what the first one lacks for which a package is all that is needed.
find_python() { # WHO
    if [ -n "${PYTHON:-}" ]; then
        probe_python "$PYTHON" "$1" || return 1
        return
    fi
    lacking=''
    for candidate in /usr/bin/python3 /usr/local/bin/python3 python3 \
        python3.14 python3.13 python3.12 python3.11 python3.10 python3.9; do
        if ! has "$candidate"; then
            continue
        elif answer=$(probe_python "$candidate" "$1"); then
            case $candidate in
            /*) answer=$candidate ;;
            esac
            printf '%s\n' "$answer"
            return
        fi
        lacking=${lacking:-$answer}
    done
    printf '%s\n' "$lacking"
    return 1
}

refuse_python() { # WHAT NEEDS IT, WHO, WHAT AN INTERPRETER LACKS
    if [ -n "$3" ]; then
        die 1 "$3: install the rest of its standard library (on Debian and Ubuntu, the package python3)"
    fi
    where=${2:+, where every user can read it}
    die 1 "$1 Python 3.9 or newer with its standard library$where${PYTHON:+; $PYTHON is none}"
}

need_program() { # NAME PACKAGE
    has "$1" || die 1 "the $1 program is missing: install the package $2 first"
}

# --- --run-tests --------------------------------------------------------------------------------------

is_test_environment() { "$1/bin/python" -I -c 'import pytest' >/dev/null 2>&1; }

# A private virtual environment with pytest, made once for each interpreter; prints its python.
make_test_environment() { # PYTHON CACHE
    name=$("$1" -I -c 'import platform; print(platform.python_implementation(), platform.python_version())')
    name=$(printf '%s' "$name" | tr ' ' '-')
    name=$name-$(printf '%s' "$1" | cksum | cut -d ' ' -f 1)
    if ! is_test_environment "$2/$name"; then
        made=$(mktemp -d "$2/new.XXXXXX")
        trap 'rm -rf "$made"' EXIT # of the subshell this runs in
        "$1" -I -m venv "$made/venv" >&2 ||
            die 1 "$1 cannot make a virtual environment: install python3-venv, or give it pytest"
        "$made/venv/bin/python" -I -m pip install --quiet --disable-pip-version-check pytest >&2 ||
            die 1 "pytest could not be installed for $1: give it pytest, or a network"
        if ! is_test_environment "$2/$name"; then # another run may have been quicker
            rm -rf "${2:?}/$name"
            mv "$made/venv" "$2/$name"
        fi
    fi
    printf '%s\n' "$2/$name/bin/python"
}

if [ -n "$run_tests" ]; then
    [ -z "$dispatcher$agent$api$uninstall$move_aside" ] || die 2 "--run-tests goes with no other option"
    python=$(probe_python "${PYTHON:-python3}" '') || python=$(find_python '') ||
        refuse_python "the tests need" '' "$python"
    need_program openssl openssl
    cd "$here"
    temporary=''
    if ! "$python" -c 'import pytest' >/dev/null 2>&1; then
        cache=${XDG_CACHE_HOME:-${HOME:-/nonexistent}/.cache}/ctrl-exec-tests
        if ! mkdir -p "$cache" 2>/dev/null || [ ! -w "$cache" ]; then
            temporary=$(mktemp -d)
            trap 'rm -rf "$temporary"' EXIT
            cache=$temporary
        fi
        python=$(make_test_environment "$python" "$cache")
    fi
    chosen='' # tests named by the caller, instead of all
    for argument in "$@"; do
        case $argument in
        tests/*) chosen=yes ;;
        esac
    done
    [ -n "$chosen" ] || set -- tests "$@"
    status=0
    "$python" -m pytest "$@" || status=$?
    exit "$status"
fi

# --- what is asked, and whether it can be had: nothing is changed before this is clear ------------------

[ -z "$uninstall" ] || [ -z "$move_aside" ] || die 2 "--move-aside is for an installation"
if [ -z "$dispatcher$agent$api" ]; then
    [ -n "$uninstall" ] || die 2 "say which role: --dispatcher, --agent, --api (see install.sh --help)"
    dispatcher=yes agent=yes api=yes
fi

stage=${DESTDIR:-}
case $stage in
'' | /*) ;;
*) stage=$PWD/$stage ;;
esac
while [ "$stage" != "${stage%/}" ]; do stage=${stage%/}; done

# live: a real installation, with users and a service. staged: the tree only. program: the program only.
if [ -n "${DESTDIR:-}" ]; then
    kind=staged
elif [ "$(id -u)" = 0 ]; then
    kind=live
else
    kind=program
fi

lib=$stage$prefix/lib/ctrl-exec
bin=$stage$prefix/bin
launcher=../lib/ctrl-exec/launch # as seen from bin: holds wherever the tree is moved to
links="${dispatcher:+ced ctrl-exec ctrl-exec-dispatcher }${agent:+cea ctrl-exec-agent }${api:+ctrl-exec-api}"
all_links='ced ctrl-exec ctrl-exec-dispatcher cea ctrl-exec-agent ctrl-exec-api'
services="${agent:+ctrl-exec-agent }${api:+ctrl-exec-api}"
timers="${dispatcher:+ctrl-exec-maintain}"
unit_files=''
for name in $services; do unit_files="$unit_files $name.service $name.socket"; done
for name in $timers; do unit_files="$unit_files $name.service $name.timer"; done
case $prefix in
/usr) units=$stage/usr/lib/systemd/system ;; # a package's
*) units=$stage/etc/systemd/system ;;        # an administrator's
esac
inits=$stage/etc/init.d
mark='written by install.sh of ctrl-exec'

check_writable() { # DIRECTORY...: each of them, or what there is of the way to it
    unwritable=''
    for path in "$@"; do
        while [ ! -e "$path" ] && [ ! -L "$path" ]; do path=$(dirname "$path"); done
        if [ ! -d "$path" ] || [ ! -w "$path" ]; then unwritable="$unwritable, $path"; fi
    done
    [ -z "$unwritable" ] ||
        die 1 "not a directory that you may write to: ${unwritable#, }; run this as root, or with --prefix DIR or DESTDIR"
}

check_writable "$lib" "$bin"

is_our_link() { [ -L "$1" ] && [ "$(readlink "$1")" = "$launcher" ]; }
is_our_service() { [ -f "$1" ] && grep -qF "$mark" "$1"; }
is_there() { [ -e "$1" ] || [ -L "$1" ]; }

runs_systemd() { [ "$kind" = live ] && [ -d /run/systemd/system ] && has systemctl; }

# --- --uninstall --------------------------------------------------------------------------------------

remove() {
    if is_there "$1"; then
        rm -f "$1"
        say "removed: ${1#"$stage"}"
    fi
}

# The service file that starts the program of this very prefix.
is_its_service() { is_our_service "$1" && grep -qF "$prefix/bin/" "$1"; }

remove_units() { # NAME SUFFIX: a service, and what starts it
    there=''
    for suffix in "$2" service; do
        file=$units/$1.$suffix
        if is_its_service "$file" || { is_its_service "$units/$1.service" && is_our_service "$file"; }; then
            there="$there $1.$suffix"
        fi
    done
    [ -n "$there" ] || return 0
    if runs_systemd; then
        # shellcheck disable=SC2086 # several names
        systemctl disable --now $there || true
    fi
    for name in $there; do remove "$units/$name"; done
    if runs_systemd; then systemctl daemon-reload || true; fi
}

remove_service() { # NAME
    remove_units "$1" socket
    if is_its_service "$inits/$1"; then
        if [ "$kind" = live ] && has rc-service && has rc-update; then
            rc-service --ifstarted "$1" stop || true
            rc-update del "$1" || true
        fi
        remove "$inits/$1"
    fi
}

say_what_stays() { # DIRECTORY DIRECTORY USER...
    left=''
    for path in "$1" "$2"; do
        [ ! -e "$stage$path" ] || left="$left $path"
    done
    shift 2
    for name in "$@"; do
        [ "$kind" != live ] || ! id -u "$name" >/dev/null 2>&1 || left="$left, the user $name"
    done
    left=${left#,}
    [ -z "$left" ] || say "left as it is:$left"
}

if [ -n "$uninstall" ]; then
    if [ "$kind" != program ]; then
        for name in $services; do remove_service "$name"; done
        for name in $timers; do remove_units "$name" timer; done
    fi
    for name in $links; do
        if is_our_link "$bin/$name"; then
            remove "$bin/$name"
        elif is_there "$bin/$name"; then
            say "left as it is, being of another origin: ${bin#"$stage"}/$name"
        fi
    done
    for name in $all_links; do
        if is_our_link "$bin/$name"; then
            say "left for the other role: ${lib#"$stage"}"
            lib=''
            break
        fi
    done
    if [ -n "$lib" ] && [ -d "$lib" ]; then
        for path in "$lib/ctrl_exec.py" "$lib/launch" "$lib/__pycache__"/ctrl_exec.*.pyc; do
            remove "$path"
        done
        rmdir "$lib/__pycache__" 2>/dev/null || true
        rmdir "$lib" 2>/dev/null || say "left as it is, holding other files: ${lib#"$stage"}"
    fi
    if [ "$kind" != program ]; then
        [ -z "$dispatcher$api" ] || say_what_stays /etc/ctrl-exec /var/lib/ctrl-exec ctrl-exec
        [ -z "$agent" ] ||
            say_what_stays /etc/ctrl-exec-agent /var/lib/ctrl-exec-agent ctrl-exec-agent ctrl-exec-script
    fi
    exit 0
fi

# --- before the installation ----------------------------------------------------------------------------

[ -f "$here/ctrl_exec.py" ] || die 1 "ctrl_exec.py is not beside this script, in $here"

# MODE OWNER:GROUP PATH of each directory.
list_directories_of_dispatcher() {
    # setgid: what root makes in them, the HTTP API can read. The tokens are secrets: only root makes and reads
    # them.
    cat <<'END'
0750 root:ctrl-exec /etc/ctrl-exec
0750 root:ctrl-exec /var/lib/ctrl-exec
2750 root:ctrl-exec /var/lib/ctrl-exec/agents
2770 root:ctrl-exec /var/lib/ctrl-exec/locks
2770 root:ctrl-exec /var/lib/ctrl-exec/runs
0700 root:root /var/lib/ctrl-exec/pairing
0700 root:root /var/lib/ctrl-exec/pairing-tokens
0750 root:ctrl-exec /var/lib/ctrl-exec/request-secrets
END
}

list_directories_of_agent() {
    cat <<'END'
0750 root:ctrl-exec-agent /etc/ctrl-exec-agent
0755 root:root /var/lib/ctrl-exec-agent
0750 root:ctrl-exec-agent /var/lib/ctrl-exec-agent/runs
0700 root:root /var/lib/ctrl-exec-agent/locks
END
}

list_directories() {
    [ -z "$dispatcher$api" ] || list_directories_of_dispatcher
    [ -z "$agent" ] || list_directories_of_agent
}

in_the_way='' # what has a name that is needed; without the stage, whose own name may hold spaces
note_foreign() { # PATH: neither link nor service of ours, as the caller has found
    ! is_there "$1" || in_the_way="$in_the_way ${1#"$stage"}"
}
for name in $links; do
    is_our_link "$bin/$name" || note_foreign "$bin/$name"
done
if [ "$kind" != program ]; then
    check_writable "$stage/etc" "$stage/var/lib" "$units"
    for path in $(list_directories | cut -d ' ' -f 3); do
        [ -d "$stage$path" ] || note_foreign "$stage$path"
    done
    for name in $unit_files; do
        is_our_service "$units/$name" || note_foreign "$units/$name"
    done
    for name in $services; do
        is_our_service "$inits/$name" || note_foreign "$inits/$name"
    done
fi
version_of() { sed -n 's/^__version__ = "\([0-9.]*\)"$/\1/p' "$1"; }

# While the CA is being replaced, hosts believe two CAs. Releases differ in what they know of that, and one that
# knows less would reach no host any more.
is_newer() { # VERSION VERSION: whether the first is
    [ "$1" != "$2" ] && [ "$(printf '%s\n%s\n' "$1" "$2" | sort -t . -k 1,1n -k 2,2n -k 3,3n | tail -n 1)" = "$1" ]
}
if [ -f "$lib/ctrl_exec.py" ]; then
    installed=$(version_of "$lib/ctrl_exec.py") ours=$(version_of "$here/ctrl_exec.py")
    if is_newer "${installed:-0}" "${ours:-0}"; then
        for path in "$stage"/etc/ctrl-exec/*.next.crt "$stage"/etc/ctrl-exec/*.next.key; do
            [ ! -e "$path" ] || die 1 "${path#"$stage"} is there: certificates are being replaced, which $installed began;" \
                "finish it before going back to $ours: ced maintain, ced retire-ca (README, Rolling back)"
        done
        say "going back from $installed to $ours (README, Rolling back)"
    fi
fi

if [ -n "$in_the_way" ]; then
    [ -n "$move_aside" ] ||
        die 1 "in the way, and not made by this script:$in_the_way; move them away first, or add --move-aside"
    taken=''
    for path in $in_the_way; do
        ! is_there "$stage$path.before-ctrl-exec" || taken="$taken $path.before-ctrl-exec"
    done
    [ -z "$taken" ] || die 1 "--move-aside overwrites nothing: move these away first:$taken"
fi
who=''
[ "$kind" != live ] || who=all
python=$(find_python "$who") || refuse_python "an installation needs" "$who" "$python"
need_program openssl openssl
need_program cmp diffutils # small images leave it out
if [ "$kind" = live ] && ! has useradd && ! has adduser; then
    die 1 "neither useradd nor adduser is there to make the service users with: install the package passwd"
fi

# What the configuration of a role says, as the program itself reads it.
ask() { # DIRECTORY-OF-PROGRAM ROLE CONFIGURATION QUESTION
    "$python" -ISB - "$@" <<'END'
import os
import re
import socket
import sys

library, role, path, question = sys.argv[1:]
sys.path.insert(0, library)
import ctrl_exec

socket.gethostname = lambda: "localhost"  # no answer depends on it, and not every host name can be an id
try:
    config = ctrl_exec.load_config(role, path)
except ctrl_exec.CtrlExecError as error:
    print(error.message)
    sys.exit(1)


def directories():
    """MODE OWNER:GROUP PATH of those that have a key."""
    modes = {"registry_dir": "2750", "lock_dir": "2770", "runs_dir": "2770"}
    for key, mode in modes.items():
        yield "%s root:ctrl-exec %s" % (mode, getattr(config, key))
    yield "0700 root:root %s" % config.pairing_dir
    yield "0750 root:ctrl-exec %s" % ctrl_exec.secret_directory(config)


def files_of_api():
    """What the API must read and others must not. A TLS key of its own only if it is kept with the rest: one
    from elsewhere has other users, too."""
    identity = ctrl_exec.dispatcher_identity(config)
    yield config.key
    yield ctrl_exec.next_path(config.key)
    for former in ctrl_exec.find_former(identity):
        yield former.key
    if config.api_key and os.path.dirname(config.api_key) == ctrl_exec.ETC:
        yield config.api_key
    secrets = ctrl_exec.secret_directory(config)
    for directory in filter(os.path.isdir, (config.registry_dir, secrets)):
        for name in sorted(os.listdir(directory)):
            if name.endswith(".json") or directory == secrets:
                yield os.path.join(directory, name)


def quoted(path):
    """A path in a unit, which is not to fail for one that is missing: the program says more than systemd."""
    escaped = "-" + path.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return escaped if re.fullmatch(r"[\w./+@,%-]+", escaped) else '"%s"' % escaped


def listen(addresses, port):
    """Lines of a socket unit; none for port 0, which is another one at each start. IPv4 and IPv6 apart, as the
    program has them: no peer arrives as ::ffff:10.0.0.5."""
    for address in addresses or ("0.0.0.0", "::"):
        address, _, zone = address.partition("%")
        form = "ListenStream=[%s]:%d" if ":" in address else "ListenStream=%s:%d"
        if port:
            yield form % (address, port) + ("%%" + zone if zone else "")


def rights_of_api():
    """Lines of its unit: what it may write, and what it must not see."""
    key = ctrl_exec.ca_key_path(config.ca)
    hidden = (key, ctrl_exec.next_path(key), ctrl_exec.token_directory(config))
    yield "ReadWritePaths=" + " ".join(map(quoted, (config.lock_dir, config.runs_dir)))
    yield "InaccessiblePaths=" + " ".join(map(quoted, hidden))


def rights_of_maintain():
    """Lines of its unit: what it may write."""
    files = (config.ca, config.cert, config.key, config.revoked_serials, ctrl_exec.rotation_path(config))
    places = {os.path.dirname(path) for path in files} | {config.registry_dir, ctrl_exec.secret_directory(config)}
    places.add(config.default_path(ctrl_exec.VAR))
    yield "ReadWritePaths=" + " ".join(map(quoted, sorted(places)))


answers = {
    "valid": tuple,
    "directories": directories,
    "files-of-api": files_of_api,
    "rights-of-api": rights_of_api,
    "rights-of-maintain": rights_of_maintain,
    "key": lambda: [config.key],
    "port-of-agent": lambda: listen(config.bind, config.port),
    "port-of-api": lambda: listen(config.api_bind, config.api_port),
}
for line in answers[question]():
    print(line)
END
}

agent_conf=/etc/ctrl-exec-agent/agent.conf
dispatcher_conf=/etc/ctrl-exec/ctrl-exec.conf

check_configuration() { # ROLE CONFIGURATION: what is installed is made after it
    if [ -e "$stage$2" ]; then
        reason=$(ask "$here" "$1" "$stage$2" valid) || die 1 "$reason"
    fi
}
if [ "$kind" != program ]; then
    [ -z "$dispatcher$api" ] || check_configuration dispatcher "$dispatcher_conf"
    [ -z "$agent" ] || check_configuration agent "$agent_conf"
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# --- pieces -------------------------------------------------------------------------------------------

# Copy SOURCE to TARGET with MODE if they differ; by renaming, so that nobody ever starts half a file.
put() { # SOURCE TARGET MODE
    if ! cmp -s "$1" "$2"; then
        cp "$1" "$2.new.$$"
        chmod "$3" "$2.new.$$"
        mv -f "$2.new.$$" "$2"
        say "installed: ${2#"$stage"}"
    fi
    chmod "$3" "$2"
}

give() { # OWNER:GROUP PATH: a staged tree has no such groups yet
    [ "$kind" != live ] || chown "$1" "$2"
}

make_directories() { # as they are listed on standard input
    while read -r mode owner path; do
        if [ ! -d "$stage$path" ]; then
            mkdir -p "$(dirname "$stage$path")"
            mkdir -m 0700 "$stage$path"
        fi
        give "$owner" "$stage$path"
        chmod "$mode" "$stage$path"
    done
}

# A configuration file, from SOURCE; one that is there stays as it is, its mode too.
make_conf() { # SOURCE GROUP PATH
    if is_there "$stage$3"; then
        say "kept: $3"
        return
    fi
    (umask 077 && cp "$1" "$stage$3.new.$$")
    give "root:$2" "$stage$3.new.$$"
    chmod 0640 "$stage$3.new.$$"
    mv "$stage$3.new.$$" "$stage$3"
    say "installed: $3"
}

example() { # ROLE FILE
    "$python" -I "$lib/launch" conf-example "$1" >"$2"
}

ask_dispatcher() { ask_installed dispatcher "$dispatcher_conf" "$1"; } # QUESTION
ask_agent() { ask_installed agent "$agent_conf" "$1"; }                # QUESTION

ask_installed() { # ROLE CONFIGURATION QUESTION
    path=$stage$2
    [ -e "$path" ] || path=$work/${2##*/} # a link to nowhere was kept: then the example, which is the defaults
    ask "$lib" "$1" "$path" "$3"
}

group_exists() {
    if has getent; then
        getent group "$1" >/dev/null
    else
        grep -q "^$1:" /etc/group
    fi
}

make_user() { # NAME: a user and a group, who own nothing and cannot log in
    [ "$kind" = live ] || return 0
    if ! group_exists "$1"; then
        if has groupadd; then groupadd --system "$1"; else addgroup -S "$1"; fi
        say "group made: $1"
    fi
    if ! id -u "$1" >/dev/null 2>&1; then
        shell=/bin/false
        for path in /usr/sbin/nologin /sbin/nologin; do
            [ ! -x "$path" ] || shell=$path
        done
        if has useradd; then
            useradd --system --gid "$1" --home-dir /nonexistent --no-create-home --no-log-init \
                --shell "$shell" "$1"
        else
            adduser -S -D -H -h /nonexistent -s "$shell" -G "$1" "$1"
        fi
        say "user made: $1"
    fi
}

# --- the program --------------------------------------------------------------------------------------

install_program() {
    mkdir -p "$bin" "$lib"
    # A script is compiled anew at each start, which takes longer than most of what it then does; a module
    # is compiled once. So `launch` is the script, and the file with the program is a module beside it.
    cat >"$work/launch" <<END
#!$python -IS
# ctrl-exec, under the name this is called by; $mark
import os
import signal
import sys

signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])  # kept for a service that starts; main() unblocks it
sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
import ctrl_exec

ctrl_exec.leave(ctrl_exec.main(sys.argv))
END
    put "$here/ctrl_exec.py" "$lib/ctrl_exec.py" 0755
    # By the interpreter that will run it, and with the path it will have; not again if it is good.
    "$python" -I - "$lib/ctrl_exec.py" "$prefix/lib/ctrl-exec/ctrl_exec.py" <<'END'
import importlib.util
import os
import py_compile
import struct
import sys

source, final = sys.argv[1:]
cache = importlib.util.cache_from_source(source)
status = os.stat(source)
stamp = struct.pack("<III", 0, int(status.st_mtime) & 0xFFFFFFFF, status.st_size & 0xFFFFFFFF)
try:
    with open(cache, "rb") as file:
        head = file.read(16)
except OSError:
    head = b""
if head != importlib.util.MAGIC_NUMBER + stamp:
    by_time = py_compile.PycInvalidationMode.TIMESTAMP
    py_compile.compile(source, cache, final, doraise=True, invalidation_mode=by_time)
END
    put "$work/launch" "$lib/launch" 0755
    for name in $links; do
        if ! is_our_link "$bin/$name"; then
            ln -s "$launcher" "$bin/$name"
            say "installed: ${bin#"$stage"}/$name"
        fi
    done
}

# --- configuration, state, service ----------------------------------------------------------------------

install_dispatcher() {
    make_user ctrl-exec
    list_directories_of_dispatcher | make_directories
    example dispatcher "$work/ctrl-exec.conf"
    make_conf "$work/ctrl-exec.conf" ctrl-exec "$dispatcher_conf"
    ask_dispatcher directories >"$work/directories"
    # One that is kept elsewhere and is there already is somebody's own, and may have other uses.
    while read -r line; do
        is_there "$stage${line#* * }" || printf '%s\n' "$line"
    done <"$work/directories" | make_directories
    [ -z "$dispatcher" ] || install_timer ctrl-exec-maintain
}

install_agent() {
    make_user ctrl-exec-agent # what faces the network
    make_user ctrl-exec-script # scripts without a profile: may read nothing of the agent's
    list_directories_of_agent | make_directories
    example agent "$work/agent.conf"
    make_conf "$work/agent.conf" ctrl-exec-agent "$agent_conf"
    cat >"$work/scripts.conf" <<'END'
# ==== /etc/ctrl-exec-agent/scripts.conf: what may run on this host; nothing else does ====
# Read at start and on SIGHUP. One script a line:
#   NAME = /absolute/path [profile=P] [timeout=SECONDS] [max_running=N] [unrecorded=yes]
#uptime = /usr/bin/uptime
END
    make_conf "$work/scripts.conf" ctrl-exec-agent /etc/ctrl-exec-agent/scripts.conf
    install_service ctrl-exec-agent
}

# The API is the dispatcher's, as another user: it may read the registry and the dispatcher's key, share
# locks and records of runs, and read nothing of the CA's.
install_api() {
    [ -n "$dispatcher" ] || install_dispatcher
    if [ "$kind" = live ]; then
        ask_dispatcher files-of-api >"$work/files" # not runs/: the API's user could put a link there
        while IFS= read -r path; do
            if [ -f "$path" ] && [ ! -L "$path" ]; then
                chgrp ctrl-exec "$path"
                chmod 0640 "$path"
            fi
        done <"$work/files"
    fi
    install_service ctrl-exec-api
}

has_openrc() { has openrc-run || [ -x /sbin/openrc-run ]; }
has_systemd() { has systemctl || [ -d /run/systemd/system ]; }

install_timer() { # NAME
    if [ "$kind" = staged ] || has_systemd; then
        mkdir -p "$units"
        for suffix in service timer; do
            "render_${suffix}_${1#ctrl-exec-}" >"$work/unit"
            put "$work/unit" "$units/$1.$suffix" 0644
        done
        if runs_systemd; then systemctl daemon-reload || true; fi
    fi
}

# What the services of a control host have in common: they change nothing but their own files.
render_confinement() { # RIGHTS
    cat <<END
ProtectSystem=strict
$1
ProtectHome=yes
PrivateTmp=yes
PrivateDevices=yes
NoNewPrivileges=yes
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectControlGroups=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6
RestrictNamespaces=yes
LockPersonality=yes
SystemCallArchitectures=native
END
}

render_service_maintain() {
    rights=$(ask_dispatcher rights-of-maintain)
    cat <<END
# Certificates of a ctrl-exec control host, renewed in time; $mark, which replaces it.
[Unit]
Description=ctrl-exec certificates
Wants=network-online.target
After=network-online.target

[Service]
Type=oneshot
ExecStart=$prefix/bin/ced maintain --if-due
# 1: a host needs a person, and the journal says which; the next turn tries again.
SuccessExitStatus=1
# Thousands of hosts that do not answer take an hour. Nothing is lost when it ends: the next turn goes on.
TimeoutStartSec=4h
# It reads what every host answers, beside the key of the CA: it can do nothing but what it is for.
$(render_confinement "$rights")
CapabilityBoundingSet=CAP_CHOWN CAP_DAC_OVERRIDE CAP_FOWNER
END
}

render_timer_maintain() {
    cat <<END
# When $prefix/bin/ced maintain runs; $mark, which replaces it. \`cert_check_interval\` in ctrl-exec.conf says how often it does something.
[Unit]
Description=ctrl-exec certificates, every hour

[Timer]
OnCalendar=hourly
RandomizedDelaySec=600
Persistent=true

[Install]
WantedBy=timers.target
END
}

install_service() { # NAME
    # A staged tree is for another machine: it gets the unit in any case.
    if [ "$kind" = staged ] || has_systemd; then
        "render_unit_${1#ctrl-exec-}" >"$work/unit"
        mkdir -p "$units"
        put "$work/unit" "$units/$1.service" 0644
        install_socket "$1"
        if runs_systemd; then systemctl daemon-reload || true; fi
    fi
    if has_openrc; then
        "render_init_${1#ctrl-exec-}" >"$work/init"
        mkdir -p "$inits"
        put "$work/init" "$inits/$1" 0755
    fi
}

changed_sockets=' '
install_socket() { # NAME
    "render_socket_${1#ctrl-exec-}" >"$work/unit"
    if grep -q '^ListenStream=' "$work/unit"; then
        cmp -s "$work/unit" "$units/$1.socket" || changed_sockets="$changed_sockets$1 "
        put "$work/unit" "$units/$1.socket" 0644
    else
        remove "$units/$1.socket"
    fi
}

render_socket_agent() {
    render_socket ctrl-exec-agent cea "\`port\` and \`bind\` in agent.conf" "$(ask_agent port-of-agent)"
}

render_socket_api() {
    render_socket ctrl-exec-api ctrl-exec-api "\`api_port\` and \`api_bind\` in ctrl-exec.conf" \
        "$(ask_dispatcher port-of-api)"
}

render_socket() { # NAME COMMAND KEYS LISTEN
    cat <<END
# The port of $prefix/bin/$2; $mark, which replaces it.
# After a change to $3: run install.sh again, then \`systemctl restart $1.socket\`.
[Unit]
Description=The port of $1

[Socket]
# systemd holds the port, so that no other user can take it while the service stops and starts; who connects
# meanwhile waits.
$4
BindIPv6Only=ipv6-only
# An address may come up later than this.
FreeBind=yes
Backlog=1024
Accept=no
FileDescriptorName=$1

[Install]
WantedBy=sockets.target
END
}

# What both services have in common. Wants=, not Requires=: where the port cannot be had, the service says so
# and tries again, which systemd does not do for a socket. PartOf=: what stops the port stops the service.
render_socket_use() { # NAME
    cat <<END
Wants=network-online.target $1.socket
After=network-online.target $1.socket
PartOf=$1.socket
# systemd never gives up.
StartLimitIntervalSec=0
END
}

# No RestartSteps= to make the pause grow: systemd counts what has happened since the last manual start, and
# after a few mishaps in a year each further one would cost a minute.
render_restarts() { # NAME PREFIX-OF-COMMAND
    cat <<END
Restart=always
RestartSec=2
# 78: a person must mend something first, and starting again would not change that. The port is closed with the
# service then; or the next to connect would start it again, and so on for as long as somebody waits.
RestartPreventExitStatus=78
ExecStopPost=-$2/bin/sh -c '[ "\$\$EXIT_STATUS" != 78 ] || exec systemctl --no-block --job-mode=ignore-dependencies stop $1.socket'
END
}

render_unit_agent() {
    cat <<END
# The ctrl-exec agent; $mark, which replaces it: for changes, \`systemctl edit ctrl-exec-agent\`.
[Unit]
Description=ctrl-exec agent
$(render_socket_use ctrl-exec-agent)

[Service]
Type=notify
NotifyAccess=main
ExecStart=$prefix/bin/cea serve
# Waits for the outcome: \`systemctl reload\` fails when a file is wrong, and the agent goes on as before.
ExecReload=$prefix/bin/cea reload
# A restart ends the agent and not the scripts it runs: they finish, and their results are kept.
KillMode=process
# Below its own control group the agent makes one for each run, so that nothing of a run outlives its end.
Delegate=yes
# One script that eats all memory must not take the agent and the other scripts with it.
OOMPolicy=continue
$(render_restarts ctrl-exec-agent '')
# No sandbox (ProtectSystem=, PrivateTmp=, NoNewPrivileges=, ...) on purpose: all of it would hold for the
# scripts too, and they are here to change the system. The agent confines itself: what faces the network
# runs as the user ctrl-exec-agent, and scripts run as what their profile in agent.conf says.

[Install]
WantedBy=multi-user.target
Also=ctrl-exec-agent.socket
END
}

render_unit_api() {
    rights=$(ask_dispatcher rights-of-api)
    cat <<END
# The ctrl-exec HTTP API; $mark, which replaces it: for changes, \`systemctl edit ctrl-exec-api\`.
[Unit]
Description=ctrl-exec HTTP API
$(render_socket_use ctrl-exec-api)

[Service]
Type=notify
NotifyAccess=main
ExecStart=$prefix/bin/ctrl-exec-api
# Waits for the outcome: \`systemctl reload\` fails when a file is wrong, and the API goes on as before.
ExecReload=$prefix/bin/ctrl-exec-api reload
User=ctrl-exec
Group=ctrl-exec
$(render_restarts ctrl-exec-api +)
# It finishes what it is answering: connect_timeout and read_timeout together, and some air.
TimeoutStopSec=90
# An auth hook runs in here, too: what it needs beyond this, \`systemctl edit\` can give.
$(render_confinement "$rights")
RestrictSUIDSGID=yes
CapabilityBoundingSet=

[Install]
WantedBy=multi-user.target
Also=ctrl-exec-api.socket
END
}

render_init_agent() { render_init agent cea 30 "cea self-check"; }
render_init_api() { render_init "HTTP API" ctrl-exec-api 90 "ctrl-exec-api check"; }

# What is called start-stop-daemon may be OpenRC's, dpkg's or busybox's. They agree on how a script is started,
# and not on how its process is found again, which is the interpreter's: this does that by itself.
render_init() { # WHAT COMMAND SECONDS-TO-STOP CHECK
    cat <<END
#!/sbin/openrc-run
# The ctrl-exec $1; $mark, which replaces it.

description="ctrl-exec $1"
description_reload="Reads the configuration again; when a file is wrong, this fails and nothing changes"
command="$prefix/bin/$2"
command_args="serve"
command_background=true
pidfile="/run/\$RC_SVCNAME.pid"
extra_started_commands="reload"
seconds_to_stop=$3
# For \`supervisor=supervise-daemon\` in /etc/conf.d/\$RC_SVCNAME, which starts it again whenever it ends.
retry="TERM/$3/KILL/5"
respawn_delay=2
respawn_max=0

depend() {
    use net logger dns
    after firewall
}

# Sets \`pid\`, whose process may be another one by now: the program's name must be among its words.
is_running() {
    pid=\$(cat "\$pidfile") && [ -n "\$pid" ] || return 1
    tr '\\0' '\\n' <"/proc/\$pid/cmdline" | grep -q "/\${command##*/}\\\$"
} 2>/dev/null

wait_for_end() { # SECONDS
    turns=\$((\$1 * 5))
    while is_running && [ "\$turns" -gt 0 ]; do
        turns=\$((turns - 1))
        sleep 0.2 2>/dev/null || sleep 1
    done
    ! is_running
}

start() {
    if [ -z "\$supervisor" ] && is_running; then # after a \`zap\`
        ewarn "\$RC_SVCNAME runs already, as process \$pid"
        return 0
    fi
    rm -f "\$pidfile"
    default_start || return 1
    [ -z "\$supervisor" ] || return 0
    sleep 1 # by now it would have ended if a person must mend something first
    if ! is_running; then
        eerror "\$RC_SVCNAME ended at once; this says why: $prefix/bin/$4"
        return 1
    fi
}

stop() {
    if [ -n "\$supervisor" ]; then
        default_stop
        return
    fi
    ebegin "Stopping \$RC_SVCNAME"
    if is_running; then
        kill -s TERM "\$pid"
        wait_for_end "\$seconds_to_stop" || { kill -s KILL "\$pid" && wait_for_end 5; }
    fi
    eend \$? "Failed to stop \$RC_SVCNAME" && rm -f "\$pidfile"
}

status() {
    if [ -z "\$supervisor" ] && service_started && ! is_running; then
        eerror "status: crashed"
        return 32
    fi
    default_status
}

reload() {
    ebegin "Reloading \$RC_SVCNAME"
    "\$command" reload
    eend \$? "\$RC_SVCNAME goes on with the configuration from before"
}
END
}

# --- go -----------------------------------------------------------------------------------------------

say_next_steps() {
    as='' # a directory that PATH may not have
    case $prefix in
    /usr | /usr/local) ;;
    *) as=$prefix/bin/ ;;
    esac
    if [ "$kind" = program ]; then
        say "Only the program is installed. As an ordinary user, keep all it makes below one directory:"
        [ -z "$dispatcher" ] || say "  ${as}ced --root DIR setup-ca"
        [ -z "$agent" ] || say "  ${as}cea --root DIR request-pairing --dispatcher HOST"
        [ -z "$api" ] || say "  ${as}ctrl-exec-api --root DIR"
        return
    fi
    if [ -n "$dispatcher" ]; then
        say "Next, on the control host (what exists already is kept):"
        say "  ${as}ced setup-ca"
        say "  ${as}ced setup-ctrl-exec"
        say "  ${as}ced pairing-mode                  while hosts are being paired"
        if has_systemd; then
            say "  systemctl enable --now ctrl-exec-maintain.timer   renews certificates in time"
        else
            say "  have cron run this every hour, so that certificates are renewed: $prefix/bin/ced maintain --if-due"
        fi
    fi
    if [ -n "$agent" ]; then
        say "Next, on the managed host:"
        say "  ${as}cea request-pairing --dispatcher CONTROL-HOST --timeout 300"
        say "  edit /etc/ctrl-exec-agent/scripts.conf: what may run here"
        if has_systemd; then
            say "  systemctl enable --now ctrl-exec-agent"
        elif has_openrc; then
            say "  rc-update add ctrl-exec-agent default && rc-service ctrl-exec-agent start"
        else
            say "  have your service manager run this as root: $prefix/bin/cea serve"
        fi
        say_restart ctrl-exec-agent agent
    fi
    [ -z "$api" ] || say_next_steps_of_api
}

say_next_steps_of_api() {
    say "Next, for the HTTP API:"
    if [ ! -f "$stage$(ask_dispatcher key)" ]; then
        say "  once \`ced setup-ctrl-exec\` has made the key: run this again, so that the API can read it"
    fi
    say "  write /etc/ctrl-exec/auth-hook: without one, every request is denied"
    if has_systemd; then
        say "  systemctl enable --now ctrl-exec-api"
    elif has_openrc; then
        say "  rc-update add ctrl-exec-api default && rc-service ctrl-exec-api start"
    else
        say "  have your service manager run this: $prefix/bin/ctrl-exec-api"
    fi
    say_restart ctrl-exec-api API
}

say_restart() { # NAME WHAT
    runs_systemd || return 0
    case $changed_sockets in
    *" $1 "*)
        if systemctl is-active --quiet "$1.socket"; then
            say "The port that systemd holds for the $2 is the one from before: systemctl restart $1.socket"
            return
        fi
        ;;
    esac
    if systemctl is-active --quiet "$1.service"; then
        say "The $2 that is running is the one from before: systemctl restart $1"
    fi
}

for path in $in_the_way; do
    mv "$stage$path" "$stage$path.before-ctrl-exec"
    say "moved: $path to $path.before-ctrl-exec"
done
install_program
if [ "$kind" != program ]; then
    [ -z "$dispatcher" ] || install_dispatcher
    [ -z "$agent" ] || install_agent
    [ -z "$api" ] || install_api
fi
say_next_steps
