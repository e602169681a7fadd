#!/usr/bin/python3 -IS
"""ctrl-exec: run allowlisted scripts on a fleet of hosts over mutual TLS, from one file.

One file, several roles, picked by the name the file is invoked by (make symlinks) or by its first word:

    ced, ctrl-exec    the dispatcher: a command line on the control host that holds a private CA, pairs
                      agents, keeps their registry, and runs a named script on one host or thousands.
    cea               the agent: a daemon on every managed host that runs what its own allowlist names.
    ctrl-exec-api     the HTTP API: what the dispatcher does, for programs.
    ctrl_exec.py demo a whole deployment in a temporary directory, to look at.

The file reads from the ground up: nothing is used above its definition, and each section opens with
what it owns and which sections it may use.

     1 HEAD       version, ports, paths, limits     13 JOBS       a supervisor: one run, start to end
     2 ERRORS     every failure with its status     14 EXECUTOR   the agent's parent process
     3 GROUND     log, files, locks, programs       15 CUSTODY    certificates and trust, renewed
     4 SETTINGS   one row per configuration key     16 AGENT      the daemon: pipeline and reload
     5 OPENSSL    the openssl program               17 REGISTRY   agents, host patterns, locks, runs
     6 TRUST      CA, identities, TLS contexts      18 PAIRING    both halves of one protocol
     7 WIRE       JSON over HTTP, both ways         19 HOSTS      one request to many hosts
     8 SERVER     listening                         20 DISPATCH   what a command does on them
     9 CLIENT     one request to one host           21 UPKEEP     trust that looks after itself
    10 POLICY     auth hooks, rate limits           22 API        the same over HTTP
    11 SCRIPTS    what may run, and as what         23 CLI        verbs, tables, text, JSON, demo
    12 RECORDS    what an agent keeps of a run      24 MAIN       role, signals, exit status

Where to begin: how a request is decided, AGENT; what a script is given, JOBS; who is believed and why,
TRUST and PAIRING; what `ced run` does, DISPATCH; what a key means, SETTINGS.
"""

# ======================================================================================================
# 1. HEAD
# Owns:  the Python floor, the imports, the version, and every number, name and path that others share.
# Uses:  nothing
# Why here: a limit is read next to its reason, and nothing below needs to explain itself twice.
# ======================================================================================================

import sys

# The floor is what RHEL 9 and Debian 11 ship. The check stands before anything an older Python could
# trip over at run time, and the file keeps to syntax that Python 3.6 still parses, so that the answer
# there is this sentence and not a SyntaxError.
if sys.version_info < (3, 9):
    sys.exit("ctrl-exec needs Python 3.9 or newer; this is Python %d.%d" % sys.version_info[:2])

# What every `ced run` imports. Dearer modules (argparse, subprocess, hashlib, ...) are imported by the one
# function that needs them: a person waits for `ced`, and most of its time is Python starting.
INCOMPLETE = (
    "this Python lacks its module %s: install the whole of Python's standard library (Debian: python3)"
)
try:
    import errno
    import fcntl
    import json
    import os
    import re
    import select
    import signal
    import socket
    import ssl
    import stat
    import threading
    import time
    from typing import Any, Callable, Iterable, Iterator, NamedTuple, Optional
except ImportError as lacking:  # python3-minimal of Debian, for one
    sys.exit("ctrl-exec: " + INCOMPLETE % lacking.name)

# Values that pass between sections are NamedTuples and not frozen dataclasses: creating thirty
# dataclasses costs each start 25 ms and importing their module 8 ms; NamedTuples cost 6 and 2.

__version__ = "1.1.0"

AGENT_PORT = 7443
PAIRING_PORT = 7444
API_PORT = 7445

ETC = "/etc/ctrl-exec"
VAR = "/var/lib/ctrl-exec"
AGENT_ETC = "/etc/ctrl-exec-agent"
AGENT_VAR = "/var/lib/ctrl-exec-agent"
AGENT_RUN = "/run/ctrl-exec-agent"  # in memory: records of runs that the disk has no room for
ROOT_LOG = "/var/log/ctrl-exec.log"  # events, when --root moves every path

DISPATCHER_USER = "ctrl-exec"  # what faces the network on the control host becomes this user
AGENT_USER = "ctrl-exec-agent"  # ... and on a managed host this one
SCRIPT_USER = "ctrl-exec-script"  # what a script runs as under root's agent, unless its profile says run_as

# What programs and scripts find as PATH: fixed, so that the caller's own PATH decides nothing.
SAFE_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# --- limits on what a peer may send --------------------------------------------------------------------

MAX_BODY = 1024 * 1024  # a request; lower and long argument lists fail, higher and 256 peers cost 256 MB
MAX_PAIRING_BODY = 64 * 1024  # a CSR is 1 KiB, a CA certificate 2
MAX_HEADERS = 32  # lines; real clients send fewer than 15
MAX_HEAD = 32 * 1024  # bytes of request line and headers together
MAX_JSON_DEPTH = 32  # levels; ours need 4, and the C parser's own limit differs between Pythons
MAX_CSR = 10 * 1024  # bytes of PEM; RSA-4096 with long names needs 2 KiB
MAX_JSON_VALUES = 250_000  # in one message; each costs some 100 bytes, and 5,000 scripts described are 40,000
MAX_ANSWER = 160 * 1024 * 1024  # two streams of 10 MiB of the worst case: 6 bytes of JSON for one, + base64
MAX_OFFER = 4 * 1024 * 1024  # what a host answers to /capabilities: 1,000 sidecars of a usual size
# Answers of all hosts in memory at once, besides the first MiB of each. As text, two streams of 10 MiB of
# noise take 230: a few wide characters have Python keep four bytes of each.
MAX_TOGETHER = 320 * 1024 * 1024
STALL_SECONDS = 2  # in which an answer must grow by STALL_BYTES while others wait for the room that it has
STALL_BYTES = 128 * 1024
MAX_REMARK = 1000  # characters of a sentence or a fact in a host's answer
MAX_OUTCOME = 200  # ... and of what a request's record keeps of it for each host
MAX_LINE = 64 * 1024  # bytes of a streamed line that are held back until it ends
MAX_STREAM = 2**40  # bytes of a streamed answer, which nobody holds
MAX_STATE_FILE = 1024 * 1024  # any one of our own JSON files
MAX_HOSTS_FILE = 16 * 1024 * 1024  # ... that has a line or more for each host
MAX_HOST_FILE = 16 * 1024 * 1024  # host words of one command; 100,000 names of the greatest length are more
MAX_LOCK_TEXT = 1024  # what a lock says about its holder: a host, a script, a request and a time
MAX_SIDECAR = 64 * 1024
NO_ROOM_BYTES = (
    64 * 1024
)  # with less than this free, a disk is full: locks come and go, and a block with them
NO_ROOM_INODES = 4
LOW_DISK_BYTES = 32 * 2**20  # one run may write 20 MiB; a check warns of less
LOW_DISK_INODES = 200  # a run takes three
MAX_SUPERVISORS = 512  # runs at once on one agent; a front that runs wild costs this many processes, no more
MAX_TAGS = 64  # of one host
MAX_OFFERS = 5000  # scripts of one host; their sidecars have a bound of their own
MAX_PLACE = 200_000  # files of one directory that a check looks at; a day's runs of a busy agent are 100,000
MAX_FAULTS = 10  # of one directory that a check names: a screen of them says what is wrong
MAX_ADDRESSES = 64  # of dispatchers that an agent remembers
MAX_OWN_SERIALS = 256  # that one dispatcher can have in an agent's lists; a rotation a month needs 12 a year
MAX_PATH = 4096  # bytes: PATH_MAX of Linux
MAX_NAME = 253  # a host name (RFC 1035 section 2.3.4 less the root)
MAX_SCRIPT_NAME = 128  # a script name becomes part of file names, which end at 255 bytes

# --- deadlines, in seconds ------------------------------------------------------------------------------

HANDSHAKE_SECONDS = 10  # TLS from first byte to last; a satellite link needs 3
HEAD_SECONDS = 10  # a whole request head
BODY_SECONDS = 30  # a whole request body: 1 MiB at 300 kbit/s
WRITE_SECONDS = 60  # a client that takes nothing for this long is gone
IDLE_SECONDS = 15  # a kept-alive connection between two requests
LINGER_SECONDS = 2  # after a refusal: time for the peer to read it before the connection is reset
RELOAD_SECONDS = 60  # for an agent to load its files and to replace its front, which may have to drain
DRAIN_SECONDS = 10  # SIGTERM: what is being answered may end
KILL_GRACE_SECONDS = 5  # between TERM and KILL for a script past its time limit
OUTPUT_GRACE_SECONDS = 0.5  # after a script's exit: what its background children may still write
BEAT_SECONDS = 15  # between two signs of life on a silent stream: both ends notice a peer that has gone
FOLLOW_SECONDS = 0.1  # how often a follower looks for new output of a run that another process writes
LOOK_SECONDS = 5  # looking at a lock takes a moment; a process that looks for this long holds it
ADDRESS_SECONDS = 30 * 86400  # an address that no dispatcher has used for this long is a stranger's again
TRY_SECONDS = 2  # between two connections of a blocked address: it cannot work on, and a dispatcher can
CLOCK_SECONDS = 60  # between two notes of the same dispatcher's clock: each costs a process
MAX_RESULT_WAIT = 300  # one long poll; a caller that wants to wait longer asks again
OPENSSL_SECONDS = 60  # RSA keys on a small board take 20
MAX_PAIRING_WAIT = 600

# --- trust ----------------------------------------------------------------------------------------------

CA_DAYS = 3650
MAX_SKEW = 60  # seconds between two clocks; certificates are backdated by more, logs are read side by side
BACKDATE_SECONDS = 2 * 3600  # a host whose clock is an hour slow must accept a new certificate
SERIAL_BYTES = 16  # CA/Browser Forum asks for 64 bits at least; RFC 5280 allows 20 octets
NONCE_BYTES = 32
PAIRING_CODE_DIGITS = 6
MIN_RSA_BITS = 2048

# --- names (always with fullmatch; ASCII classes only) --------------------------------------------------

HOST_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,%d}" % (MAX_NAME - 1))
SCRIPT_NAME = re.compile(r"[A-Za-z0-9_-]{1,%d}" % MAX_SCRIPT_NAME)
REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
PROFILE_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
TAG_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
SCHEMA_VERSION = re.compile(r"[A-Za-z0-9._-]{1,64}")

EXIT_USAGE = 2
EXIT_BUG = 70  # EX_SOFTWARE of sysexits.h
EXIT_OUTPUT = 74  # EX_IOERR
EXIT_CONFIG = 78  # EX_CONFIG: systemd is told not to restart on it


# ======================================================================================================
# 2. ERRORS
# Owns:  every failure that a person or a peer can see. The class is the contract: exit status, HTTP
#        status and code. The message is public; the cause is chained, and goes to the log at most.
# Uses:  HEAD
# Why here: everything below fails in these words.
# ======================================================================================================


class CtrlExecError(Exception):
    """A failure that was foreseen: one sentence saying what and where, and a hint saying what to do."""

    exit_code = 1
    http_status = 500
    code = "error"

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(CtrlExecError):
    """The command line asks for something that does not exist or does not fit together."""

    exit_code = EXIT_USAGE
    http_status = 400
    code = "usage"


class ConfigError(CtrlExecError):
    """A configuration file is missing, unreadable or wrong; the message begins with FILE:LINE."""

    exit_code = EXIT_CONFIG
    code = "config"


class BadRequest(CtrlExecError):
    """A peer sent something that is not a request; `field` names the JSON field at fault, if one is."""

    http_status = 400
    code = "bad-request"

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class Denied(CtrlExecError):
    """Policy says no. `reason_code` is the hook's: 1 denied, 2 bad credentials, 3 insufficient privilege."""

    http_status = 403
    code = "denied"

    def __init__(self, message: str, reason_code: int = 1, hint: str = "") -> None:
        super().__init__(message, hint)
        self.reason_code = reason_code


class ScriptRefused(CtrlExecError):
    """The agent will not run this script: its name, its file or its profile does not allow it."""

    http_status = 200  # the answer to a well-formed request; its `exit` is -1
    code = "refused"


class NotFound(CtrlExecError):
    """No such host, request, route or record."""

    http_status = 404
    code = "not-found"


class UnknownHost(NotFound):
    """A host that is not in the registry was named; nothing has been sent to anybody."""

    exit_code = EXIT_USAGE
    code = "unknown-host"


class MethodNotAllowed(CtrlExecError):
    """The path exists, but not for this method. `allowed` are those it exists for."""

    http_status = 405
    code = "method"

    def __init__(self, message: str, allowed: tuple = ()) -> None:
        super().__init__(message)
        self.allowed = allowed


class Busy(CtrlExecError):
    """The script is running already and its allowlist line allows no more at once."""

    http_status = 409
    code = "busy"


class Locked(CtrlExecError):
    """Another request holds the lock of one of the host:script pairs asked for."""

    http_status = 409
    code = "locked"

    def __init__(self, conflicts: dict) -> None:
        """`conflicts`: each host:script pair, to whose it is in words."""
        pairs = ["%s (%s)" % (pair, holder) if holder else pair for pair, holder in conflicts.items()]
        super().__init__("locked: " + ", ".join(pairs), "see: ced list-locks")
        self.conflicts = tuple(conflicts)


class LengthRequired(CtrlExecError):
    """A body without a Content-Length (RFC 9110 section 15.5.12)."""

    http_status = 411
    code = "length"


class TooLarge(CtrlExecError):
    """A body over its limit; refused before it is read."""

    http_status = 413
    code = "too-large"


class UnsupportedMedia(CtrlExecError):
    """A body that does not say that it is JSON."""

    http_status = 415
    code = "media-type"


class HeadTooLarge(CtrlExecError):
    """Too many headers, or too long ones (RFC 6585 section 5)."""

    http_status = 431
    code = "head-too-large"


class Unavailable(CtrlExecError):
    """Not now: out of processes, descriptors or queue places. Trying again later may work."""

    http_status = 503
    code = "unavailable"


class TrustError(CtrlExecError):
    """A key, certificate, trust map or revocation list on disk cannot be believed."""

    code = "trust"


class StorageError(CtrlExecError):
    """A file of ours could not be read or written; the message has its path and the system's reason."""

    code = "storage"


class ProgramError(CtrlExecError):
    """A helper program (openssl) failed; the message has the end of what it said. `status` is its exit
    status, None when it could not be run to its end: then it has decided nothing."""

    code = "program"

    def __init__(self, message: str, hint: str = "", status: Optional[int] = None) -> None:
        super().__init__(message, hint)
        self.status = status


class TransportError(CtrlExecError):
    """A host did not answer. `state` is `unreachable` (nothing was sent), `timeout` or `unknown`;
    `is_refusal`: it has refused our certificate."""

    http_status = 502
    code = "transport"

    def __init__(
        self, message: str, state: str = "unreachable", hint: str = "", is_refusal: bool = False
    ) -> None:
        super().__init__(message, hint)
        self.state = state
        self.is_refusal = is_refusal


class OutputError(CtrlExecError):
    """Standard output cannot be written: a full disk, a limit, a closed descriptor."""

    exit_code = EXIT_OUTPUT
    code = "output"


class PairingTimeout(CtrlExecError):
    """Nobody decided about a pairing request in time."""

    exit_code = 2
    http_status = 408
    code = "pairing-timeout"


class PairingDenied(CtrlExecError):
    """A pairing request was denied, or what came back does not prove who sent it."""

    exit_code = 3
    http_status = 403
    code = "pairing-denied"


# ======================================================================================================
# 3. GROUND
# Owns:  the operating system, once: the clock, ids, log lines, atomic files, file locks, users, and the
#        one door to helper programs.
# Uses:  HEAD, ERRORS
# On disk: nothing of its own
# ======================================================================================================


def now() -> float:
    """Seconds since the epoch. The one wall clock, so that a test can move it; durations use Deadline."""
    return time.time()


def iso_time(seconds: float) -> str:
    """A time as UTC, ISO 8601 with `Z`."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def parse_iso_time(text: str) -> float:
    """Seconds since the epoch of what `iso_time` wrote. Raises ValueError.

    By hand, because time.strptime and calendar cost each `ced ping` 4 ms of imports. Days are counted in
    years that begin in March, so that the leap day is the last.
    """
    hit = re.fullmatch(r"([0-9]{4})-([0-9]{2})-([0-9]{2})T([0-9]{2}):([0-9]{2}):([0-9]{2})Z", text)
    if not hit:
        raise ValueError("not a time such as 2026-11-23T18:09:47Z")
    year, month, day, hour, minute, second = (int(part) for part in hit.groups())
    if month < 3:
        year, month = year - 1, month + 12
    days = 365 * year + year // 4 - year // 100 + year // 400 + (153 * month - 457) // 5 + day - 719469
    return float(((days * 24 + hour) * 60 + minute) * 60 + second)


def measure_skew(told: str) -> Optional[float]:
    """Seconds that a clock which has just said `told` is ahead of ours; None when that is no time."""
    try:
        return parse_iso_time(told) - now()
    except ValueError:
        return None


def describe_skew(skew: float) -> str:
    """How a clock is to ours, in words."""
    return "%d s %s this one" % (abs(skew), "ahead of" if skew > 0 else "behind")


def is_clock_off(skew: Optional[float]) -> bool:
    """Whether two clocks are too far apart to judge certificates alike; not if nothing was told."""
    return skew is not None and abs(skew) > MAX_SKEW


def new_id(size: int = 8) -> str:
    """`size` random bytes from the kernel, as lower-case hex."""
    return os.urandom(size).hex()


class Deadline:
    """A moment on the monotonic clock; it does not move when somebody sets the time."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds until then, never below zero."""
        return max(0.0, self._end - time.monotonic())

    def is_over(self) -> bool:
        return time.monotonic() >= self._end


# --- text for people ------------------------------------------------------------------------------------

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_PLAIN_VALUE = re.compile(r"[A-Za-z0-9._:/@,+*-]+")


def as_given(text: str) -> str:
    """A word of the command line or the environment as the bytes that it was given as, read as UTF-8: Python
    has read them in the encoding of the locale, and ISO 8859-1 would change them. What is not UTF-8 becomes
    lone surrogates (PEP 383), which are refused where text is needed."""
    try:
        return os.fsencode(text).decode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # not from there
        return text


def printable(text: str) -> str:
    """Text that cannot move a cursor, change a title or reverse a line: controls become \\xNN."""
    return _CONTROL.sub(lambda hit: hit[0].encode("unicode_escape", "surrogatepass").decode("ascii"), text)


def one_line(text: str) -> str:
    """`printable`, on one line."""
    return printable(text).replace("\n", "\\n").replace("\t", " ")


def format_event(action: str, fields: dict) -> str:
    """One event as one line: ACTION first, the other keys sorted, awkward values quoted as in JSON."""
    words = ["ACTION=" + action]
    for key in sorted(fields):
        value = str(fields[key])
        if len(value) > 1000:
            value = value[:1000] + "..."
        words.append("%s=%s" % (key, value if _PLAIN_VALUE.fullmatch(value) else json.dumps(value)))
    return " ".join(words)


class Finding(NamedTuple):
    """One line of a check: OK, WARN or FAIL, what was looked at, and what to do about it."""

    level: str
    what: str
    hint: str = ""


class Owner(NamedTuple):
    """A user and group to give a file to; -1 leaves that one as it is."""

    uid: int = -1
    gid: int = -1


def make_directory(path: str, mode: int, owner: Optional[Owner] = None) -> None:
    """Make a directory, and its parents with 0755 whatever the umask; an existing one is left as it is.

    Raises StorageError.
    """
    if os.path.isdir(path):
        return
    parent = os.path.dirname(path)
    if parent and parent != path:
        make_directory(parent, 0o755)
    try:
        os.mkdir(path, 0o700)
        if owner is not None:
            os.chown(path, owner.uid, owner.gid)
        os.chmod(path, mode)
    except FileExistsError:  # another process was first, or it is no directory: then the next step says so
        pass
    except OSError as error:
        raise StorageError("cannot make the directory %s: %s" % (path, error.strerror)) from error


def _open_log(path: str) -> int:
    try:
        make_directory(os.path.dirname(path), 0o755)
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o640)
    except OSError as error:
        raise StorageError("cannot open the log %s: %s" % (path, error.strerror)) from error


class EventLog:
    """Where events go: a file (with --root), else syslog, else standard error."""

    def __init__(self) -> None:
        self._descriptor = 2  # standard error until MAIN has read the command line
        self._syslog = None  # the module, once it is the destination

    def open(self, tag: str, path: str = "", foreground: bool = False) -> None:
        """Choose the destination. Raises StorageError when the log file cannot be opened."""
        self._syslog = None
        if foreground:
            self._descriptor = 2
        elif path:
            self._descriptor = _open_log(path)
        elif os.path.exists("/dev/log"):
            import syslog

            syslog.openlog(tag, syslog.LOG_PID, syslog.LOG_DAEMON)
            self._syslog = syslog

    def event(self, action: str, **fields: object) -> None:
        """Log one event. Never raises: a full disk must not stop a request that was already decided."""
        line = format_event(action, fields)
        try:
            if self._syslog is not None:
                self._syslog.syslog(self._syslog.LOG_INFO, line)
            else:
                os.write(self._descriptor, (iso_time(now()) + " " + line + "\n").encode("ascii"))
        except OSError:
            pass

    def descriptor(self) -> int:
        """The descriptor to keep open across a fork that closes the others."""
        return self._descriptor


LOG = EventLog()


def try_check(findings: list, what: str, check: Callable, hint: str = "") -> Any:
    """Add how one check went to `findings`, and return its result, or None when it failed. `hint` is for an
    error that has none of its own."""
    try:
        result = check()
    except CtrlExecError as error:
        findings.append(Finding("FAIL", "%s: %s" % (what, error.message), error.hint or hint))
        return None
    findings.append(Finding("OK", what))
    return result


def log_bug(error: BaseException, **fields: object) -> None:
    """Log an exception nobody foresaw: one line with what a bug report needs."""
    import traceback

    trace = "".join(traceback.format_exception(type(error), error, error.__traceback__)[-6:])
    about = "ctrl-exec %s, Python %s, %s" % (__version__, sys.version.split()[0], ssl.OPENSSL_VERSION)
    LOG.event("bug", ABOUT=about, TRACE=trace[-900:], **fields)


def tell_systemd(state: str) -> None:
    """Send `state` to the service manager, if one listens (sd_notify(3)); nothing happens otherwise."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            # not waiting for a manager that does not read: it would stop the service
            channel.sendto(
                state.encode("utf-8", "replace"), socket.MSG_DONTWAIT, address.replace("@", "\0", 1)
            )
    except OSError:
        pass


# --- names of hosts -------------------------------------------------------------------------------------


def is_ip_address(text: str) -> bool:
    """Whether it is an IPv4 or IPv6 address, with a zone or without."""
    family = socket.AF_INET6 if ":" in text else socket.AF_INET
    try:
        socket.inet_pton(family, text.partition("%")[0])
    except (OSError, ValueError):  # ValueError: a NUL in it
        return False
    return "%" not in text or bool(re.fullmatch("[^%]+%[A-Za-z0-9._-]{1,15}", text))


def is_host_name(text: str) -> bool:
    """Whether it can name a host here; an address cannot."""
    return bool(HOST_NAME.fullmatch(text)) and not is_ip_address(text)


# --- files ----------------------------------------------------------------------------------------------


def find_user(name: str) -> Optional[Owner]:
    """The ids of a user of this machine."""
    import pwd

    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        return None
    return Owner(entry.pw_uid, entry.pw_gid)


def find_service_owner(user: str) -> Optional[Owner]:
    """The ids of a service user, when we are root and it exists; else None, and nothing changes hands."""
    return find_user(user) if os.geteuid() == 0 else None


def import_for_network() -> None:
    """Import what the network side imports later. Python itself may lie where only root can read, and what is
    missing should be missed while somebody looks. Raises ImportError."""
    import base64, fnmatch, hashlib, hmac, ipaddress  # noqa: E401, F401
    import resource, shlex, subprocess, tempfile, traceback  # noqa: E401, F401


def control_process(option: int, value: int) -> None:
    """One setting of prctl(2). A Python without ctypes goes without it."""
    try:
        import ctypes
    except ImportError:
        return
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def become_user(user: str) -> None:
    """Give up root for `user` for good; where there is no such user, for nobody. Not root: nothing to do."""
    if os.geteuid() != 0:
        return
    pr_set_no_new_privs = 38  # no setuid program gives anything back, to a hook neither
    control_process(pr_set_no_new_privs, 1)
    import_for_network()
    owner = find_service_owner(user) or Owner(65534, 65534)
    os.setgroups([])
    os.setresgid(owner.gid, owner.gid, owner.gid)
    os.setresuid(owner.uid, owner.uid, owner.uid)


def _try_as(user: str, look: Callable) -> int:
    """What `look()` returns in a child that has become `user`: 0 to 255, or the number of its error."""
    pid = os.fork()
    if pid == 0:
        try:
            become_user(user)
            os._exit(look())
        except BaseException as error:
            os._exit(min(255, getattr(error, "errno", None) or 1))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def check_user_change(user: str) -> None:
    """Try, in a child, whether root may become `user` here, as what faces the network will: a container may
    have root's number without root's rights (capabilities(7), CAP_SETUID). Raises ConfigError."""
    import_for_network()
    if os.geteuid() != 0:
        return
    status = _try_as(user, lambda: 0)
    if status:
        message = "root cannot become the user %s here: %s" % (user, os.strerror(status))
        hint = "give it CAP_SETUID and CAP_SETGID, and a mapping of users; or start it as an ordinary user"
        raise ConfigError(message, hint)


def may_execute(user: str, path: str) -> bool:
    """Whether a service user may execute a file, by trying in a child that becomes that user; when we are not
    root, whether we may."""
    if os.geteuid() != 0 or find_user(user) is None:
        return os.access(path, os.X_OK)
    return _try_as(user, lambda: 0 if os.access(path, os.X_OK) else errno.EACCES) == 0


def find_disk_fault(path: str) -> str:
    """Why root could write nothing below a directory, as its file system tells; empty when it could."""
    while not os.path.isdir(path) and path != "/":
        path = os.path.dirname(path)
    try:
        disk = os.statvfs(path)
    except OSError as error:
        return error.strerror
    if disk.f_flag & os.ST_RDONLY:
        return os.strerror(errno.EROFS)
    if disk.f_blocks and disk.f_bfree * disk.f_frsize < NO_ROOM_BYTES:
        return os.strerror(errno.ENOSPC)
    if disk.f_files and disk.f_ffree < NO_ROOM_INODES:
        return "%s (no inode is free)" % os.strerror(errno.ENOSPC)
    return ""


def read_file(path: str, limit: int = MAX_STATE_FILE, follow: bool = True) -> bytes:
    """The content of a regular file of at most `limit` bytes; unless `follow`, a symlink is none: where
    another user may put files, it could lead to what only we may read. Raises StorageError, or
    FileNotFoundError."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # a FIFO in the place of a file must not hold us
    flags |= 0 if follow else os.O_NOFOLLOW
    try:
        with open(path, "rb", opener=lambda name, _: os.open(name, flags)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise StorageError("%s: not a regular file" % path)
            data = file.read(limit + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        hint = "run this as root, or as a user who may read it" if error.errno == errno.EACCES else ""
        raise StorageError("cannot read %s: %s" % (path, error.strerror), hint) from error
    if len(data) > limit:
        raise StorageError("%s: larger than %d bytes" % (path, limit))
    return data


def read_text(path: str, limit: int = MAX_STATE_FILE, follow: bool = True) -> str:
    """`read_file` as UTF-8. Raises StorageError when it is not."""
    try:
        # An editor of another system may begin with a mark.
        return read_file(path, limit, follow).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise StorageError("%s: not UTF-8 at byte %d" % (path, error.start)) from error


def _refuse_constant(name: str) -> None:
    raise BadRequest("%s is not JSON" % name)


def _short_number(text: str) -> int:
    """A whole number; reading a very long one takes time that grows with its square."""
    if len(text) > 40:
        raise BadRequest("a number with %d digits" % len(text))
    return int(text)


def _finite(text: str) -> float:
    """A number that stays one: 1e999 would be written again as Infinity."""
    if len(text) > 400:
        raise BadRequest("a number with %d digits" % len(text))
    value = float(text)
    if value in (float("inf"), float("-inf")):
        _refuse_constant(text[:80])
    return value


# For json.loads: each number is one that can be computed with and written again.
STRICT_NUMBERS = {"parse_constant": _refuse_constant, "parse_float": _finite, "parse_int": _short_number}


def parse_object(text: str, path: str) -> dict:
    """The JSON object that a file of ours consists of. Raises StorageError naming the file."""
    try:
        value = json.loads(text, **STRICT_NUMBERS)
    except (ValueError, RecursionError, BadRequest) as error:
        raise StorageError("%s: not JSON (%s)" % (path, error)) from error
    if not isinstance(value, dict):
        raise StorageError("%s: not a JSON object" % path)
    return value


def read_json_file(path: str, limit: int = MAX_STATE_FILE, follow: bool = True) -> dict:
    """A JSON object of ours. Raises StorageError naming the file when it is cut short or not an object."""
    return parse_object(read_text(path, limit, follow), path)


def _sync_directory(directory: str) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def find_written(path: str) -> str:
    """The file to write when `path` is: where it leads to, if it is a symlink of root's or ours. To replace
    the link would leave others with the old file. Raises StorageError for somebody else's link: it could lead
    us to any file."""
    hops = 0
    while os.path.islink(path):
        hops += 1
        if os.lstat(path).st_uid not in (0, os.geteuid()) or hops > 40:
            raise StorageError("%s is a symlink that somebody else has made" % path, "see who, and remove it")
        path = os.path.join(os.path.dirname(path), os.readlink(path))
    return path


def write_atomic(
    path: str,
    data: bytes,
    mode: int = 0o640,
    durable: bool = False,
    owner: Optional[Owner] = None,
    replace: bool = True,
) -> None:
    """Write a file whole: temporary file beside it, flush, rename. `durable` adds fsync of both.

    The mode is right before the first byte is written. With `replace` off, an existing file is kept and
    FileExistsError raised. Raises StorageError for everything the disk or the rights refuse.
    """
    path = find_written(path) if replace else path
    directory = os.path.dirname(path) or "."
    temporary = os.path.join(directory, ".tmp-" + new_id())
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(temporary, flags, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                if owner is not None:
                    os.fchown(descriptor, owner.uid, owner.gid)
                os.fchmod(descriptor, mode)
                file.write(data)
                file.flush()
                if durable:
                    os.fsync(descriptor)
            if replace:
                os.rename(temporary, path)
            else:
                os.link(temporary, path)  # fails when the name is taken, as rename does not
                os.unlink(temporary)
        except BaseException:
            os.unlink(temporary)
            raise
        if durable:
            _sync_directory(directory)
    except FileExistsError:
        raise
    except OSError as error:
        raise StorageError("cannot write %s: %s" % (path, error.strerror)) from error


def rename_durably(source: str, target: str) -> None:
    """Rename a file, so that it stays renamed when the power fails. Raises OSError, StorageError."""
    target = find_written(target)
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        own = os.stat(source)  # a symlink has led to another file system
        owner = Owner(own.st_uid, own.st_gid)
        write_atomic(target, read_file(source), stat.S_IMODE(own.st_mode), True, owner)
        os.unlink(source)
    _sync_directory(os.path.dirname(target) or ".")


def check_room(directory: str) -> list:
    """Whether we can write into a directory, by trying, and whether that will last: Findings."""
    if not os.path.isdir(directory):
        return []
    probe = os.path.join(directory, ".tmp-" + new_id())
    try:
        write_atomic(probe, bytes(8192), mode=0o600, durable=True)
        os.unlink(probe)
        if find_disk_fault(directory):
            raise StorageError("it has no room left")
    except (StorageError, OSError) as error:
        cause = error.__cause__ if isinstance(error, StorageError) else error
        reason = find_disk_fault(directory) or getattr(cause, "strerror", "") or str(error)
        if getattr(cause, "errno", 0) in (errno.EACCES, errno.EPERM) and os.geteuid() != 0:
            what = "cannot try to write in %s: %s" % (directory, reason)
            return [Finding("WARN", what, "run this as root")]
        what = "cannot write in %s: %s" % (directory, reason)
        return [Finding("FAIL", what, "make room, or mend the disk")]
    disk = os.statvfs(directory)
    free, inodes = disk.f_bavail * disk.f_frsize, disk.f_favail
    if free < LOW_DISK_BYTES or (disk.f_files and inodes < LOW_DISK_INODES):
        what = "%s: only %d MiB and %d inodes are free" % (directory, free // 2**20, inodes)
        return [Finding("WARN", what, "make room")]
    return [Finding("OK", "room in %s" % directory)]


def remove_temporaries(directory: str) -> None:
    """Remove what `write_atomic` left there when it was killed: it may be a key. Never raises."""
    try:
        for entry in os.scandir(directory):
            if entry.name.startswith(".tmp-") and now() - entry.stat(follow_symlinks=False).st_mtime > 3600:
                os.unlink(entry.path)
    except OSError:  # not ours to tidy up
        pass


def encode_state(value: dict, limit: int = MAX_STATE_FILE) -> bytes:
    """A state file of ours: JSON that a person can read and diff. Raises StorageError for one that is larger
    than we would read: what was there stays."""
    data = (json.dumps(value, indent=1, sort_keys=True) + "\n").encode("ascii")
    if len(data) > limit:
        raise StorageError("a record of %d bytes is not written: at most %d are read" % (len(data), limit))
    return data


def _command(words: str, path: str) -> str:
    """What a person can type, whatever the file's name is: somebody else may have chosen it."""
    import shlex

    return "%s %s" % (words, shlex.quote(path))


def _acl_grants_write(path: str) -> bool:
    """Whether a file's POSIX ACL lets anybody but its owner write to it (acl(5); the format is that of
    posix_acl_xattr.h). What `ls` shows as the group's mode is then the mask, and not what the group may."""
    try:
        acl = os.getxattr(path, "system.posix_acl_access", follow_symlinks=False)
    except OSError:  # it has none, or its file system knows none
        return False
    entries = [acl[at : at + 8] for at in range(4, len(acl) - 7, 8)]  # after the version: tag, rights, id
    rights = {}
    for entry in entries:
        tag = int.from_bytes(entry[:2], "little")
        rights[tag] = rights.get(tag, 0) | int.from_bytes(entry[2:4], "little")
    user, group_owner, group, mask, other, write = 0x02, 0x04, 0x08, 0x10, 0x20, 2
    masked = rights.get(user, 0) | rights.get(group_owner, 0) | rights.get(group, 0)
    return bool((masked & rights.get(mask, 7) | rights.get(other, 0)) & write)


def _check_part(part: str, service: Optional[Owner] = None) -> int:
    """Check one component of a path; returns its mode. What is a service's, its user and group may change."""
    status = os.lstat(part)
    mode = stat.S_IMODE(status.st_mode)
    uids, gids = {0, os.geteuid()}, {0}
    if service is not None:  # what an ordinary user has made below a --root has the group of that user
        uids, gids = uids | {service.uid}, gids | {service.gid, os.getegid()}
    if status.st_uid not in uids:
        message = "%s belongs to user %d, not to root or the agent's user" % (part, status.st_uid)
        raise ScriptRefused(message, _command("chown root", part))
    sticky = stat.S_ISDIR(status.st_mode) and mode & stat.S_ISVTX
    if stat.S_ISLNK(status.st_mode):
        mode = 0  # a symlink's own mode means nothing
    elif not sticky and _acl_grants_write(part):
        message = "%s is writable by others than its owner (by its ACL: getfacl)" % part
        raise ScriptRefused(message, _command("setfacl -b", part))
    if mode & 0o002 and not sticky:
        raise ScriptRefused(
            "%s is writable by everybody (mode %04o)" % (part, mode), _command("chmod o-w", part)
        )
    if mode & 0o020 and status.st_gid not in gids and not sticky:
        raise ScriptRefused(
            "%s is writable by its group (mode %04o)" % (part, mode), _command("chmod g-w", part)
        )
    return status.st_mode


def check_modes(path: str, service: Optional[Owner] = None) -> None:
    """Raise ScriptRefused when somebody other than root, we and the service could change the file or its way
    there.

    Every component is looked at, and where one is a symlink, every component of where it leads as well.
    A directory with the sticky bit (such as /tmp) may be writable by all: nobody can rename or remove
    what is not his in it, and what is in it is checked in its turn.
    """
    part, rest, hops = "/", [name for name in path.split("/") if name], 0
    _check_part(part)
    while rest:
        name = rest.pop(0)
        if name == ".":
            continue  # not a part of the path: a later `..` would take away this one only
        part = os.path.dirname(part) if name == ".." else os.path.join(part, name)
        if name == ".." or not stat.S_ISLNK(_check_part(part, service)):
            continue
        hops += 1
        if hops > 40:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        target = os.readlink(part)
        rest[:0] = [name for name in target.split("/") if name]
        part = "/" if target.startswith("/") else os.path.dirname(part)


def _find_interpreter_fault(line: bytes) -> str:
    """What is wrong with the first line of a script, without its `#!` (execve(2)); empty when nothing is."""
    words = line.decode("utf-8", "replace").split()
    if line.endswith(b"\r"):
        return "its first line ends in a carriage return: save it with line ends of Unix"
    if not words:
        return "its first line names no interpreter"
    if not os.access(words[0], os.X_OK):
        return "the interpreter of its first line does not exist here: %s" % one_line(words[0])
    if os.path.basename(words[0]) == "env" and len(words) == 2:
        import shutil

        if shutil.which(words[1], path=SAFE_PATH) is None:
            return "the interpreter of its first line is not in %s: %s" % (SAFE_PATH, one_line(words[1]))
    return ""


def check_runnable(path: str) -> None:
    """Raise ValueError for a file that the kernel would not execute, as far as its mode and its first line
    tell. What we may not read, we do not judge."""
    if not os.access(path, os.X_OK):
        raise ValueError("not executable: " + _command("chmod +x", path))
    try:
        with open(path, "rb") as file:
            head = file.read(256)  # as much as the kernel looks at
    except OSError:
        return
    if head.startswith(b"#!"):
        fault = _find_interpreter_fault(head[2:].split(b"\n")[0])
    elif head.startswith(b"\x7fELF") or os.path.exists("/proc/sys/fs/binfmt_misc/status"):
        fault = ""  # with binfmt_misc, other kinds of file may be executable here
    else:
        fault = "it is no program, and no #! is in its first line"
    if fault:
        raise ValueError(fault)


class Place(NamedTuple):
    """A file of ours, or a directory with all that is in it, and who else may get at it."""

    path: str
    is_private: bool = False  # not everybody may read it
    user: str = ""  # a service user who may own what is there, and whose group may write to it; not there: we


def _list_place(path: str, findings: list) -> list:
    """A path and, if it is a directory, all that is in it; what cannot be looked into becomes a Finding.

    Not with os.walk, which calls itself before Python 3.12: who may write there could nest too deep for it.
    """
    paths, waiting = [path], [path] if os.path.isdir(path) else []
    while waiting and len(paths) < MAX_PLACE:
        directory = waiting.pop()
        try:
            with os.scandir(directory) as entries:
                for entry in entries:
                    paths.append(entry.path)
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    if len(paths) >= MAX_PLACE:
                        break
        except FileNotFoundError:
            pass
        except OSError as error:
            what = "cannot look into %s: %s" % (directory[:200], error.strerror)
            findings.append(Finding("WARN", what, "run this as root"))
    if len(paths) >= MAX_PLACE:
        what = "%s: so much is in it that not all was looked at" % path
        findings.append(Finding("WARN", what, "see what it is, and who has put it there"))
    return sorted(paths)


def _is_for_all(path: str) -> bool:
    """Whether everybody may read a file, or look into a directory."""
    mode = os.stat(path).st_mode
    if not mode & (0o001 if stat.S_ISDIR(mode) else 0o004):
        return False
    parent = os.path.dirname(path)
    return parent == path or _is_for_all(parent)


def _check_at(path: str, place: Place, service: Optional[Owner]) -> Optional[Finding]:
    """What is wrong with one file of a place."""
    try:
        if path != place.path and not os.path.islink(path):
            _check_part(path, service)
            return None
        check_modes(path, service)
        if path == place.path and place.is_private and _is_for_all(path):
            return Finding("WARN", "%s is for everybody to read" % path, _command("chmod o-rwx", path))
    except ScriptRefused as error:
        return Finding("FAIL", error.message, error.hint)
    except FileNotFoundError:  # a lock that was held, a file that was being written
        pass
    except OSError as error:
        return Finding("WARN", "cannot look at %s: %s" % (path, error.strerror), "run this as root")
    return None


def _check_place(place: Place) -> list:
    findings: list = []
    service = find_user(place.user) or Owner(os.geteuid(), os.getegid()) if place.user else None
    paths = _list_place(place.path, findings)
    found = (_check_at(path, place, service) for path in paths)
    findings += [finding for finding in found if finding is not None]
    if len(findings) > MAX_FAULTS:
        what = "%s: %d more like these" % (place.path, len(findings) - MAX_FAULTS)
        findings[MAX_FAULTS:] = [Finding(findings[-1].level, what, "mend those first")]
    inside = " and what is in it (%d)" % (len(paths) - 1) if len(paths) > 1 else ""
    return findings or [Finding("OK", "mode and owner of %s%s" % (place.path, inside))]


def check_places(places: Iterable) -> list:
    """Whether somebody else could change what is ours, or read what is not for all: Findings for each place
    that is there."""
    return [finding for place in places if os.path.exists(place.path) for finding in _check_place(place)]


def is_current(descriptor: int, path: str) -> bool:
    """Whether an open file is the one that `path` names now."""
    try:
        named = os.stat(path, follow_symlinks=False)
    except OSError:
        return False
    held = os.fstat(descriptor)
    return (named.st_dev, named.st_ino) == (held.st_dev, held.st_ino)


def is_locked(descriptor: int) -> bool:
    """Whether somebody holds the flock(2) of an open file. To look is to share it for a moment, which keeps
    nobody from it who asks with FileLock."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    return False


def read_lock(path: str) -> Optional[str]:
    """What the holder of a FileLock has written into it, or None when nobody holds it. Raises OSError."""
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW  # another user may have put anything there
    try:
        descriptor = os.open(path, flags | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        if not is_locked(descriptor):
            return None
        return os.pread(descriptor, MAX_LOCK_TEXT, 0).decode("utf-8", "replace")
    finally:
        os.close(descriptor)


class FileLock:
    """An exclusive flock(2) on a file of its own. The kernel frees it when its holder dies.

    `transient` removes the file on release, so that a directory of locks shows what is held.
    """

    def __init__(self, path: str, transient: bool = False, mode: int = 0o600) -> None:
        self.path = path
        self._transient = transient
        self._mode = mode
        self._descriptor = -1

    def acquire(self, wait: bool = False) -> bool:
        """Take the lock; False when another holds it and `wait` is off. Raises StorageError."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        patience = Deadline(LOOK_SECONDS)
        while True:
            descriptor = self._open(flags)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except OSError as error:
                is_held = is_locked(descriptor) or patience.is_over()
                os.close(descriptor)
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise StorageError("cannot lock %s: %s" % (self.path, error.strerror)) from error
                if is_held:
                    return False
                time.sleep(0.005)  # somebody only looks at it
                continue
            # A holder that released it meanwhile may have removed the file we opened: only the lock on
            # the file that the path names now is the lock.
            if is_current(descriptor, self.path):
                self._descriptor = descriptor
                return True
            os.close(descriptor)

    def _open(self, flags: int) -> int:
        """Open the file, and give it its mode whatever the umask: root and a service user share some locks.

        Another may have made it this very moment, and not opened it to us yet: so no is asked again.
        """
        for pause in (0.005, 0.02, 0.1, 0):
            try:
                descriptor = os.open(self.path, flags, self._mode)
                break
            except OSError as error:
                if error.errno == errno.EROFS and os.path.exists(self.path):
                    flags = flags & ~(os.O_RDWR | os.O_CREAT) | os.O_RDONLY  # it can be locked all the same
                    continue
                if error.errno != errno.EACCES or not pause:
                    message = "cannot open the lock %s: %s" % (self.path, error.strerror)
                    raise StorageError(message) from error
                time.sleep(pause)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:  # a link to what we would write over
            os.close(descriptor)
            hint = "remove it: a lock is made when needed"
            raise StorageError("%s is not a file of its own" % self.path, hint)
        if status.st_uid == os.geteuid() and self._mode & ~status.st_mode:
            os.fchmod(descriptor, self._mode)
        return descriptor

    def acquire_within(self, seconds: float) -> None:
        """Take the lock. Raises StorageError when another holds it all that time."""
        deadline = Deadline(seconds)
        while not self.acquire():
            if deadline.is_over():
                raise StorageError("%s is held by another process" % self.path)
            time.sleep(0.02)

    def write(self, text: str) -> None:
        """Say in the file who holds it; for people, never for deciding."""
        data = text.encode("utf-8")
        try:
            os.pwrite(self._descriptor, data, 0)  # first: a full disk has room where the last text was
            os.ftruncate(self._descriptor, len(data))
        except OSError as error:
            raise StorageError("cannot write the lock %s: %s" % (self.path, error.strerror)) from error

    def read(self) -> str:
        """What the last holder wrote."""
        return os.pread(self._descriptor, MAX_LOCK_TEXT, 0).decode("utf-8", "replace")

    def release(self) -> None:
        if self._descriptor < 0:
            return
        if self._transient:
            try:
                os.unlink(self.path)
            except OSError:
                pass
        os.close(self._descriptor)
        self._descriptor = -1

    def __enter__(self) -> "FileLock":
        self.acquire(wait=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


# --- a service that others signal -----------------------------------------------------------------------


class Serving(NamedTuple):
    """A service that runs, as it has written into the lock that it holds."""

    pid: int
    begun: int  # reloads
    ended: int
    error: str  # of the last reload
    owner: int  # of the lock: the user that the service has


def note_serving(lock: FileLock, begun: int, ended: int, error: str) -> None:
    """Write into our lock who serves, and how reloads went. A disk that cannot be written costs only that."""
    shown = one_line(error).encode("utf-8", "replace")[: MAX_LOCK_TEXT // 2].decode("utf-8", "ignore")
    try:
        lock.write("%d\n%d %d %s\n" % (os.getpid(), begun, ended, shown))
    except StorageError as problem:
        LOG.event("config-warn", MESSAGE=problem.message)


def find_serving(path: str) -> Optional[Serving]:
    """The service that holds a lock, if there is one. Older releases wrote the process id only."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:  # all from the one file that is open: who may write to its directory can exchange it at any moment
        if not is_locked(descriptor):
            return None
        text = os.pread(descriptor, MAX_LOCK_TEXT, 0).decode("utf-8", "replace")
        owner = os.fstat(descriptor).st_uid
    finally:
        os.close(descriptor)
    # the end of a longer text may still follow the lines that are just being written over it
    hit = re.match(r"([1-9][0-9]{0,9})\n(?:([0-9]{1,9}) ([0-9]{1,9}) (.*)\n)?", text)
    if hit is None:
        return None
    return Serving(int(hit[1]), int(hit[2] or 0), int(hit[3] or 0), hit[4] or "", owner)


def _hang_up(serving: Serving) -> None:
    """Send SIGHUP to a service. Who can write its lock is not to choose any process for root to signal: the
    process must be the lock's owner's. Raises OSError."""
    with open("/proc/%d/status" % serving.pid, "rb") as file:
        owner = re.search(rb"^Uid:\t(\d+)\t", file.read(8192), re.MULTILINE)
        if owner is None or int(owner[1]) != serving.owner:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        os.kill(serving.pid, signal.SIGHUP)


def reload_service(path: str, what: str, hint: str) -> int:
    """Have the service that holds a lock load its files anew, and wait for the outcome; returns its pid.

    Raises NotFound when there is none, ConfigError when it keeps what it had, Unavailable when it says
    nothing.
    """
    serving = find_serving(path)
    if serving is None:
        raise NotFound("no %s serves here: nobody holds %s" % (what, path), hint)
    try:
        _hang_up(serving)
    except OSError as error:
        message = "cannot signal the %s (process %d): %s" % (what, serving.pid, error.strerror)
        raise Unavailable(message, "run this as root") from error
    deadline = Deadline(RELOAD_SECONDS)
    while not deadline.is_over():
        latest = find_serving(path)
        if latest is None or latest.pid != serving.pid:
            raise Unavailable("the %s (process %d) has ended" % (what, serving.pid), "its log says why")
        if latest.ended > serving.begun:  # one that began after our signal
            if latest.error:
                raise ConfigError("the %s keeps its old configuration: %s" % (what, latest.error))
            return latest.pid
        time.sleep(0.02)
    message = "the %s (process %d) does not say that it has reloaded" % (what, serving.pid)
    raise Unavailable(message, "its log says more")


def has_hung_up(sock: Optional[socket.socket]) -> bool:
    """Whether the other end has closed its half of a connection, or all of it is closed."""
    if sock is None:
        return False
    try:
        poller = select.poll()
        poller.register(sock.fileno(), select.POLLRDHUP)
        return bool(poller.poll(0))
    except (OSError, ValueError):  # closed here
        return True


def receive_socket(control: socket.socket) -> tuple:
    """What another process of ours passes over `control`: (word, socket or None); no word is the end.

    Raises OSError.
    """
    word, descriptors, _, _ = socket.recv_fds(control, 16, 1)
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)  # recv_fds leaves it open across exec
        try:
            return word, socket.socket(fileno=descriptor)
        except OSError:  # the other process is the one that strangers talk to: it may pass anything
            os.close(descriptor)
            raise
    return word, None


def send_pieces(channel: socket.socket, pieces: Iterable) -> None:
    """Send in large pieces, so that a short answer arrives at once; a front that has gone is no matter."""
    buffer = bytearray()
    try:
        for piece in pieces:
            buffer += piece
            if len(buffer) >= 65536:
                channel.sendall(buffer)
                buffer.clear()
        channel.sendall(buffer)
    except OSError:
        pass


def close_descriptors(keep: Iterable) -> None:
    """Close every descriptor but standard ones and those to keep: a child starts with what it needs."""
    kept = sorted({0, 1, 2, *keep})
    try:
        names = os.listdir("/proc/self/fd")
    except OSError:  # there is no /proc: all numbers that a descriptor can have
        for low, high in zip(kept, [*kept[1:], os.sysconf("SC_OPEN_MAX")]):
            os.closerange(low + 1, high)
        return
    for number in {int(name) for name in names}.difference(kept):
        try:
            os.close(number)
        except OSError:  # the one listdir had open
            pass


def raise_descriptor_limit() -> int:
    """Lift the soft limit of open files to the hard one; returns what the soft one was."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return soft


def lower_descriptor_limit(soft: int) -> None:
    """Set the soft limit of open files, which a program started by us gets as we were given it."""
    import resource

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def reset_signals() -> None:
    """Give a new process of ours the signal handling that the programs it becomes expect: the default,
    whatever we were made to ignore by who started us, and by Python (SIGPIPE).

    SIGHUP is for the process that reloads, although `pkill -HUP -f` reaches all: it has no effect here. By a
    handler, which exec(3) takes back, because SIG_IGN would be inherited; and never by the default, not for a
    moment.
    """
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGHUP, lambda *_: None)
    for number in signal.valid_signals() - {signal.SIGHUP}:
        if signal.getsignal(number) is not signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def set_title(title: str) -> None:
    """Name this process for `ps -o comm` and /proc: at most 15 characters (PR_SET_NAME of prctl(2))."""
    try:
        with open("/proc/self/comm", "wb", buffering=0) as file:
            file.write(title.encode("ascii"))
    except OSError:  # no /proc: only the name is missing
        pass


def is_sweep_due(directory: str, retention: float) -> bool:
    """Whether a directory is due for a sweep, which happens at most once in a twenty-fourth of the time that
    its files are kept (seconds). Saying yes counts as a sweep. Raises StorageError."""
    marker = os.path.join(directory, ".swept")
    if os.path.exists(marker) and 0 <= now() - os.stat(marker).st_mtime < retention / 24:
        return False
    write_atomic(marker, b"")
    return True


class Process(NamedTuple):
    """A process as /proc describes it (proc(5))."""

    pid: int
    name: str
    parent: int
    group: int
    session: int
    birth: str  # tells it from another process that got the same number later: ticks since boot, boot

    def has_variables(self, texts: tuple) -> bool:
        """Whether it was started with these `NAME=value` in its environment."""
        try:
            with open("/proc/%d/environ" % self.pid, "rb") as file:
                return {text.encode("ascii") for text in texts} <= set(file.read(MAX_STATE_FILE).split(b"\0"))
        except OSError:  # gone, or another user's
            return False


def _has_threads(pid: int) -> bool:
    """Whether threads of a process live on after its first one has ended, which makes it look dead."""
    try:
        return len(os.listdir("/proc/%d/task" % pid)) > 1
    except OSError:
        return False


def find_process(pid: int) -> Optional[Process]:
    """A process that runs, or None when it is gone or only waits to be reaped."""
    try:
        with open("/proc/%d/stat" % pid, "rb") as file:
            first, _, rest = file.read(4096).rpartition(b") ")
        with open("/proc/sys/kernel/random/boot_id", "rb") as file:
            boot = file.read(8)
    except OSError:
        return None
    fields = rest.split()  # from the third field of proc_pid_stat(5) on: state, parent, group, session, ...
    if fields[0] in (b"Z", b"X") and not _has_threads(pid):
        return None
    name = printable(first.partition(b" (")[2].decode("utf-8", "replace"))
    birth = "%s@%s" % (fields[19].decode("ascii"), boot.decode("ascii"))
    return Process(pid, name, int(fields[1]), int(fields[2]), int(fields[3]), birth)


def list_processes() -> list:
    """All processes that run now; none where there is no /proc."""
    try:
        names = os.listdir("/proc")
    except OSError:
        return []
    found = (find_process(int(name)) for name in names if name.isdigit())
    return [process for process in found if process is not None]


# A control group for each run (cgroups(7), version 2), where the service manager has given the agent one of
# its own: then nothing can fork faster than it is killed.


# what processes of the agent are called: by `set_title`, before it, and by older releases
_OWN_TITLES = ("cea", "ctrl-exec", "ctrl_exec", "launch", "python")


def is_own_title(name: str) -> bool:
    """Whether a process with this name may be one of ours."""
    return name.startswith(_OWN_TITLES)


def find_own_cgroup() -> str:
    """The directory of the control group that holds us and nobody else, if we may divide it; else nothing."""
    try:
        with open("/proc/self/cgroup", encoding="utf-8", errors="replace") as file:
            lines = [line.rstrip("\n").partition("::")[2] for line in file if line.startswith("0::")]
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
            mounts = [line.split()[3:5] for line in file if " - cgroup2 " in line]
        root, mount = mounts[0]
        path = os.path.join(mount, os.path.relpath(lines[0], root))
        with open(os.path.join(path, "cgroup.procs"), "rb") as file:
            members = [find_process(int(word)) for word in file.read().split()]
        # supervisors of an agent before us may go on in it
        is_ours = all(one is None or is_own_title(one.name) for one in members)
        is_whole = lines[0] == root or lines[0].startswith("/..")
        return path if is_ours and not is_whole and os.access(path, os.W_OK) else ""
    except (OSError, ValueError, IndexError):
        return ""


def leave_cgroup(path: str) -> None:
    """Remove a control group, unless something still runs in it."""
    try:
        os.rmdir(path)
    except OSError:
        pass


def enter_cgroup(path: str, pid: int) -> bool:
    """Put a process, and what it will fork, into a control group of its own; whether that could be done."""
    try:
        os.mkdir(path, 0o755)
        with open(os.path.join(path, "cgroup.procs"), "wb", buffering=0) as file:
            file.write(b"%d" % pid)
        return True
    except OSError:
        leave_cgroup(path)
        return False


def kill_cgroup(path: str) -> None:
    """Kill all that a control group holds at once, where the kernel can (cgroup.kill, Linux 5.14)."""
    try:
        with open(os.path.join(path, "cgroup.kill"), "wb", buffering=0) as file:
            file.write(b"1")
    except OSError:
        pass


def send_signal(number: int, processes: Iterable) -> None:
    """Signal processes; one that has ended meanwhile is no matter."""
    for process in processes:
        try:
            os.kill(process.pid, number)
        except OSError:
            pass


def reap_children() -> Iterator[tuple]:
    """(pid, wait status) of every child that has ended and that nobody has waited for yet."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        yield pid, status


def _list_children(pid: int) -> list:
    """By /proc/PID/task/TID/children (proc(5)), which takes a few microseconds: a script that forks as it is
    killed must not be faster. A kernel without CONFIG_PROC_CHILDREN has none to show."""
    found: list = []
    try:
        for task in os.listdir("/proc/%d/task" % pid):
            with open("/proc/%d/task/%s/children" % (pid, task), "rb") as file:
                found += [int(word) for word in file.read().split()]
    except OSError:  # it has ended meanwhile
        pass
    return found


def _find_descendants(pid: int) -> Iterator[int]:
    waiting = _list_children(pid)
    while waiting:
        child = waiting.pop()
        yield child
        waiting += _list_children(child)


def list_descendants(pid: int) -> list:
    """All processes that run now below another one, and those that it has adopted (see `adopt_orphans`)."""
    return [process for process in map(find_process, _find_descendants(pid)) if process is not None]


def kill_descendants() -> None:
    """Kill every process below us, again and again until there is none: a script may fork as it dies. Gives
    up on what does not die of it (in the kernel's hands) after a while."""
    seen: set = set()
    patience, limit = Deadline(KILL_GRACE_SECONDS), Deadline(60)
    try:
        os.setpriority(os.PRIO_PROCESS, 0, -20)  # for what is left of our life: to be faster than they are
    except OSError:  # not root
        pass
    while not patience.is_over() and not limit.is_over():
        found = set()
        for pid in _find_descendants(os.getpid()):  # each at once, without a look at it
            found.add(pid)
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                pass
        list(reap_children())
        if not found:
            return
        if found - seen:
            patience = Deadline(KILL_GRACE_SECONDS)
        else:
            time.sleep(0.01)  # it is dying, or does not
        seen |= found


# --- helper programs ------------------------------------------------------------------------------------


class Finished(NamedTuple):
    """How a helper program ended; `status` is negative for a signal and None when its time ran out."""

    status: Optional[int]
    stdout: bytes
    stderr: bytes


def _close_quietly(pipe: Any) -> None:
    try:
        pipe.close()
    except OSError:  # what was buffered for a program that is dead
        pass


def run_program(
    argv: list, stdin: bytes = b"", env: Optional[dict] = None, timeout: float = 30, discard: bool = False
) -> Finished:
    """Run a program without a shell, in its own session, with a clean environment, under a time limit.

    `discard` throws its output away unread. Raises OSError when it cannot be started.
    """
    import subprocess

    output = subprocess.DEVNULL if discard else subprocess.PIPE
    environment = {"PATH": SAFE_PATH, "LC_ALL": "C"} if env is None else env
    process = subprocess.Popen(
        argv,
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=output,
        env=environment,
        cwd="/",
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(stdin, timeout=timeout)
        return Finished(process.returncode, stdout or b"", stderr or b"")
    except subprocess.TimeoutExpired:
        return Finished(None, b"", b"")
    finally:
        if process.returncode is None:
            # the group, because a child of it may hold the pipes; no read after it, for the same reason
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe is not None:
                    _close_quietly(pipe)


def start_program(argv: list, env: dict, output: int) -> Any:
    """Start a program that runs beside us, in its own session; has .pid, .terminate() and .wait()."""
    import subprocess

    return subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=env, cwd="/", start_new_session=True
    )


# ======================================================================================================
# 4. SETTINGS
# Owns:  one row per configuration key, for all roles; reading, precedence, messages with file and line,
#        and the example file. A key that is not in SETTINGS does not exist.
# Uses:  HEAD, ERRORS, GROUND
# On disk: ctrl-exec.conf, agent.conf (read only)
# ======================================================================================================


class Rate(NamedTuple):
    """More than `count` events within `window` seconds block an address for `block` seconds."""

    count: int
    window: int
    block: int


def parse_count(text: str, least: int = 0, most: int = 10**9) -> int:
    """A whole number in plain ASCII digits: int() alone would take `+5`, ` 5 `, `5_0` and other scripts."""
    if not re.fullmatch(r"[0-9]{1,10}", text) or not least <= int(text) <= most:
        raise ValueError("a whole number from %d to %d" % (least, most))
    return int(text)


def parse_positive(text: str) -> int:
    return parse_count(text, least=1)


def parse_port(text: str) -> int:
    """A TCP port; 0 lets the kernel choose (the start event says which)."""
    return parse_count(text, most=65535)


def parse_yes_no(text: str) -> bool:
    words = {
        "yes": True,
        "true": True,
        "on": True,
        "1": True,
        "no": False,
        "false": False,
        "off": False,
        "0": False,
    }
    if text.lower() not in words:
        raise ValueError("yes or no")
    return words[text.lower()]


def parse_size(text: str) -> int:
    """Bytes, with an optional unit of 1024: `512K`, `10M`, `10 MiB`, `2G`."""
    hit = re.fullmatch(r"([0-9]{1,10})\s*(?:([KMG])(?:i?B)?)?", text)
    if not hit:
        raise ValueError("a size in bytes, or with K, M or G")
    return int(hit[1]) * {None: 1, "K": 1024, "M": 1024**2, "G": 1024**3}[hit[2]]


def parse_path(text: str) -> str:
    if not text.startswith("/") or "\0" in text:
        raise ValueError("an absolute path")
    return os.path.normpath(text)


def parse_optional_path(text: str) -> str:
    return parse_path(text) if text else ""


def parse_path_list(text: str) -> tuple:
    return tuple(parse_path(part) for part in text.split(":") if part)


def parse_text(text: str) -> str:
    return text


def parse_choice(*words: str) -> Callable:
    """A parser that takes one of these words as it stands."""

    def parse(text: str) -> str:
        if text not in words:
            raise ValueError(" or ".join(words))
        return text

    return parse


def parse_host_names(text: str) -> tuple:
    """Host names separated by commas or spaces."""
    names = tuple(part for part in re.split(r"[,\s]+", text) if part)
    if not all(HOST_NAME.fullmatch(name) for name in names):
        raise ValueError("host names such as control.example.com")
    return names


def parse_dispatcher_id(text: str) -> str:
    if text and not HOST_NAME.fullmatch(text):
        raise ValueError("a name of letters, digits, dots, underscores and hyphens")
    return text


def parse_rate(text: str) -> Rate:
    parts = text.split("/")
    if len(parts) != 3:
        raise ValueError("COUNT/WINDOW/BLOCK, the last two in seconds, as in 10/60/300")
    return Rate(*(parse_positive(part) for part in parts))


def _split_list(text: str) -> list:
    """The parts of a list separated by commas or spaces. Raises ValueError for separators alone: to some keys
    an empty list means everything, and that has to be meant."""
    parts = [part for part in re.split(r"[,\s]+", text) if part]
    if text.strip() and not parts:
        raise ValueError("nothing is in the list")
    return parts


def parse_networks(text: str) -> tuple:
    """Addresses and prefixes, IPv4 and IPv6, separated by commas or spaces; none means everybody."""
    import ipaddress

    try:
        return tuple(ipaddress.ip_network(part) for part in _split_list(text))
    except ValueError as error:
        raise ValueError("addresses or prefixes such as 10.0.0.0/8 or fd00::/8 (%s)" % error) from None


def parse_addresses(text: str) -> tuple:
    """Addresses to listen on; none means all of them, IPv4 and IPv6."""
    import ipaddress

    try:
        return tuple(str(ipaddress.ip_address(part)) for part in _split_list(text))
    except ValueError as error:
        raise ValueError("IP addresses (%s)" % error) from None


def parse_nice(text: str) -> int:
    if not re.fullmatch(r"-?[0-9]{1,2}", text) or not -20 <= int(text) <= 19:
        raise ValueError("a whole number from -20 to 19")
    return int(text)


class Setting(NamedTuple):
    """One configuration key of one role."""

    role: str  # dispatcher, agent, or profile (a [profile NAME] section of agent.conf)
    key: str
    parse: Callable  # text to value; raises ValueError with what is expected
    default: str  # as it would be written in the file; an absolute path moves with --root
    help: str
    older: str = ""  # the name an earlier release used, still accepted


# What keeps somebody out. That one of these is not in force for a misspelling is worse than a stop.
GUARDS = frozenset((
    "allowed_ips", "api_auth_default", "api_bind", "api_cert", "auth_hook", "bind",
    "pairing_rate_limit_disable", "pairing_rate_limit_volume",
    "rate_limit_disable", "rate_limit_probe", "rate_limit_volume", "revoked_serials", "script_dirs",
    "strict_modes", "trusted_dispatchers_path",
))  # fmt: skip


SETTINGS = (
    Setting("dispatcher", "port", parse_port, str(AGENT_PORT), "port of the agents"),
    Setting("dispatcher", "cert", parse_path, ETC + "/dispatcher.crt", "the dispatcher's certificate"),
    Setting("dispatcher", "key", parse_path, ETC + "/dispatcher.key", "its private key"),
    Setting("dispatcher", "ca", parse_path, ETC + "/ca.crt", "the CA certificate; ca.key lies beside it"),
    Setting(
        "dispatcher",
        "dispatcher_id",
        parse_dispatcher_id,
        "",
        "who this dispatcher is to its agents, stable across rotations (empty: the host name)",
    ),
    Setting(
        "dispatcher",
        "key_type",
        parse_choice("ec", "rsa"),
        "ec",
        "new keys: ec (P-256), or rsa (3072 bits) for older peers",
    ),
    Setting(
        "dispatcher",
        "auth_hook",
        parse_optional_path,
        "",
        "executable that decides about every request (empty: auth-hook beside this file, if it exists)",
    ),
    Setting(
        "dispatcher", "auth_hook_timeout", parse_positive, "10", "seconds the hook has; after that, denied"
    ),
    Setting("dispatcher", "auth_deny_generic", parse_yes_no, "no", "answer every denial with the same words"),
    Setting("dispatcher", "read_timeout", parse_positive, "60", "seconds to wait for a host's answer"),
    Setting("dispatcher", "connect_timeout", parse_positive, "10", "seconds to reach a host, TLS included"),
    Setting("dispatcher", "max_parallel", parse_positive, "32", "hosts spoken to at the same time"),
    Setting("dispatcher", "run_retention_hours", parse_positive, "24", "hours a run record is kept"),
    Setting("dispatcher", "registry_dir", parse_path, VAR + "/agents", "one JSON file per paired agent"),
    Setting("dispatcher", "lock_dir", parse_path, VAR + "/locks", "locks of running host:script pairs"),
    Setting("dispatcher", "runs_dir", parse_path, VAR + "/runs", "run records"),
    Setting("dispatcher", "pairing_dir", parse_path, VAR + "/pairing", "pairing requests that wait"),
    Setting(
        "dispatcher",
        "revoked_serials",
        parse_path,
        VAR + "/revoked-serials",
        "serials of agent certificates that are refused, one a line",
    ),
    Setting("dispatcher", "cert_days", parse_positive, "365", "days a new certificate is valid"),
    Setting(
        "dispatcher",
        "cert_renewal_days",
        parse_positive,
        "90",
        "days left below which `maintain` rotates the dispatcher's certificate",
    ),
    Setting(
        "dispatcher", "cert_overlap_days", parse_positive, "30", "days that the one it replaces stays trusted"
    ),
    Setting(
        "dispatcher",
        "cert_check_interval",
        parse_positive,
        "14400",
        "seconds between two `maintain --if-due`",
    ),
    Setting("dispatcher", "pairing_port", parse_port, str(PAIRING_PORT), "port of `ced pairing-mode`"),
    Setting(
        "dispatcher", "pairing_max_queue", parse_positive, "10", "pairing requests that may wait at once"
    ),
    Setting("dispatcher", "pairing_timeout", parse_positive, "600", "seconds after which one expires"),
    Setting("dispatcher", "pairing_rate_limit_volume", parse_rate, "10/60/300", "connections per address"),
    Setting("dispatcher", "pairing_rate_limit_disable", parse_yes_no, "no", "no rate limit while pairing"),
    Setting("dispatcher", "api_port", parse_port, str(API_PORT), "port of the HTTP API"),
    Setting(
        "dispatcher",
        "api_names",
        parse_host_names,
        "",
        "names that the HTTP API is asked by, besides localhost, its addresses and the host's own name",
    ),
    Setting("dispatcher", "api_bind", parse_addresses, "127.0.0.1", "addresses of the HTTP API"),
    Setting(
        "dispatcher", "api_cert", parse_optional_path, "", "TLS certificate of the HTTP API (empty: no TLS)"
    ),
    Setting("dispatcher", "api_key", parse_optional_path, "", "its private key"),
    Setting(
        "dispatcher",
        "api_auth_default",
        parse_choice("deny", "allow"),
        "deny",
        "what the HTTP API does without a hook: deny or allow",
    ),
    Setting(
        "dispatcher",
        "api_hook",
        parse_choice("both", "operation"),
        "both",
        "what the hook is asked for a request to the HTTP API: both (`api`, then the operation) or operation",
    ),
    Setting(
        "dispatcher",
        "api_max_connections",
        parse_positive,
        "64",
        "connections to the HTTP API at once; over that, 503",
        "api_max_children",
    ),
    Setting("agent", "port", parse_port, str(AGENT_PORT), "port to listen on"),
    Setting("agent", "bind", parse_addresses, "", "addresses to listen on (empty: all, IPv4 and IPv6)"),
    Setting("agent", "cert", parse_path, AGENT_ETC + "/agent.crt", "this host's certificate"),
    Setting("agent", "key", parse_path, AGENT_ETC + "/agent.key", "its private key"),
    Setting("agent", "ca", parse_path, AGENT_ETC + "/ca.crt", "the CA certificate"),
    Setting(
        "agent",
        "auth_hook",
        parse_optional_path,
        "",
        "executable that decides about every request (empty: auth-hook beside this file, if it exists)",
    ),
    Setting("agent", "auth_hook_timeout", parse_positive, "10", "seconds the hook has; after that, denied"),
    Setting(
        "agent",
        "script_dirs",
        parse_path_list,
        "",
        "scripts must lie below one of these, PATH:PATH (empty: anywhere)",
    ),
    Setting(
        "agent",
        "strict_modes",
        parse_yes_no,
        "yes",
        "refuse a script that others than root or the agent's user could change",
    ),
    Setting(
        "agent",
        "trusted_dispatchers_path",
        parse_path,
        AGENT_VAR + "/ctrl-exec-dispatchers",
        "who may ask: `SERIAL ID` lines",
    ),
    Setting(
        "agent",
        "dispatcher_serial_path",
        parse_path,
        AGENT_ETC + "/ctrl-exec-serial",
        "the one trusted serial of an older release, read while there is no map",
    ),
    Setting(
        "agent",
        "revoked_serials",
        parse_path,
        AGENT_ETC + "/revoked-serials",
        "serials of dispatcher certificates that are refused",
    ),
    Setting(
        "agent", "allowed_ips", parse_networks, "", "addresses and prefixes that may connect (empty: all)"
    ),
    Setting("agent", "rate_limit_volume", parse_rate, "10/60/300", "connections by strangers, per address"),
    Setting("agent", "rate_limit_probe", parse_rate, "3/600/3600", "failed TLS handshakes, per address"),
    Setting("agent", "rate_limit_disable", parse_yes_no, "no", "no rate limits"),
    Setting("agent", "max_connections", parse_positive, "256", "connections at once", "max_children"),
    Setting(
        "agent",
        "authenticated_requests",
        parse_choice("prefer", "require"),
        "prefer",
        "require: refuse dispatchers with whom no secret is agreed; it is agreed by pairing again",
    ),  # fmt: skip
    Setting("agent", "stdin_timeout", parse_positive, "10", "seconds a script has to read its request"),
    Setting("agent", "runs_dir", parse_path, AGENT_VAR + "/runs", "run records", "async_runs_dir"),
    Setting("agent", "run_retention_hours", parse_positive, "24", "hours a run record is kept"),
    Setting(
        "agent", "max_output", parse_size, "10M", "bytes kept of each output stream; the rest is counted"
    ),
    Setting("agent", "script_timeout", parse_count, "0", "seconds a script may run (0: no limit)"),
    Setting(
        "profile",
        "run_as",
        parse_text,
        "",
        "USER or USER:GROUP the script runs as (empty: ctrl-exec-script, when root starts the agent)",
    ),
    Setting(
        "profile", "caps", parse_text, "", "capabilities to keep (not built yet: such a script is refused)"
    ),
    Setting("profile", "writable", parse_path_list, "", "paths left writable (not built yet: likewise)"),
    Setting(
        "profile", "no_new_privileges", parse_yes_no, "no", "setuid programs and file capabilities do nothing"
    ),
    Setting("profile", "timeout", parse_count, "0", "seconds the script may run (0: as script_timeout)"),
    Setting("profile", "nice", parse_nice, "0", "scheduling priority, -20 to 19"),
    Setting("profile", "memory", parse_size, "0", "address space of each process in bytes (0: no limit)"),
    Setting("profile", "cpu_seconds", parse_count, "0", "CPU time of each process (0: no limit)"),
    Setting("profile", "open_files", parse_count, "0", "open files of each process (0: no limit)"),
)

_CONFIG_FILES = {"dispatcher": ETC + "/ctrl-exec.conf", "agent": AGENT_ETC + "/agent.conf"}


def under_root(root: str, path: str) -> str:
    """A default path, moved below `root` when there is one."""
    return os.path.join(root, path.lstrip("/")) if root and path else path


class Config:
    """One role's settings, by attribute; made once and never changed."""

    def __init__(
        self, role: str, path: str, root: str, values: dict, tags: dict, profiles: dict, warnings: tuple
    ):
        self.role = role
        self.path = path
        self.root = root
        self.tags = tags  # [tags] of agent.conf: name to value
        self.profiles = profiles  # [profile NAME] sections: name to {key: value}
        self.warnings = warnings  # what was ignored, with file and line
        self._values = values

    def __getattr__(self, key: str) -> Any:
        try:
            return self.__dict__["_values"][key]
        except KeyError:
            raise AttributeError("no setting %r for the %s" % (key, self.role)) from None

    def default_path(self, path: str) -> str:
        """A path that has no key of its own, under this configuration's root."""
        return under_root(self.root, path)


def describe_config(config: Config) -> str:
    """Where the settings come from, for a check."""
    there = os.path.exists(config.path)
    return "configuration %s" % config.path if there else "configuration: defaults (no %s)" % config.path


class ConfigLine(NamedTuple):
    """One `key = value` line, or a section heading (then `key` is empty)."""

    number: int
    section: str
    key: str
    value: str


def parse_lines(text: str, path: str) -> Iterator[ConfigLine]:
    """The lines of a configuration file. Raises ConfigError for what is neither a comment nor an entry."""
    section = ""
    for number, raw in enumerate(text.split("\n"), 1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        heading = re.fullmatch(r"\[\s*([^\[\]]+?)\s*\]", line)
        if heading:
            section = " ".join(heading[1].split())
            yield ConfigLine(number, section, "", "")
            continue
        key, equals, value = line.partition("=")
        if not equals or not key.strip():
            raise ConfigError("%s:%d: expected `key = value`, a # comment or a [section]" % (path, number))
        if "\0" in value:
            raise ConfigError("%s:%d: a NUL character" % (path, number))
        yield ConfigLine(number, section, key.strip(), value.strip())


def find_nearest(word: str, known: Iterable, most: int = 3, cutoff: float = 0.6) -> list:
    """The known words that look like this one, the nearest first."""
    import difflib

    return difflib.get_close_matches(word, list(known), n=most, cutoff=cutoff)


def suggest(word: str, known: Iterable) -> str:
    """`; did you mean X?` with the nearest known words, or nothing."""
    words = list(known)
    near = find_nearest(word, words) or [one for one in words if len(word) > 2 and one.startswith(word)][:3]
    return "; did you mean %s?" % " or ".join(near) if near else ""


def _rows_of(role: str) -> dict:
    """A role's settings by their keys and the names that they had."""
    rows = {row.key: row for row in SETTINGS if row.role == role}
    rows.update({row.older: row for row in rows.values() if row.older})
    return rows


def _check_home(role: str, key: str, where: str) -> None:
    """Raise ConfigError for a key that would be in force elsewhere, or that is a guard's but for its
    spelling: who wrote it relies on it."""
    homes = {
        "agent": "above all sections of agent.conf",
        "profile": "in a section [profile NAME] of agent.conf",
    }
    homes["dispatcher"] = "in ctrl-exec.conf"
    for home, place in homes.items():
        is_near = home in ("agent", "profile") and role in ("agent", "profile", "tags")
        if home != role and key in _rows_of(home) and (is_near or key in GUARDS):
            raise ConfigError("%s: unknown key `%s` here: it belongs %s" % (where, key, place))
    spelt = key.lower().replace("-", "_")
    rows = _rows_of("agent" if role == "tags" else role)
    near = find_nearest(spelt, rows, *((1, 0.85) if role == "tags" else (3, 0.6)))
    if any(rows[one].key in GUARDS for one in near):
        raise ConfigError(
            "%s: unknown key `%s`; did you mean %s?" % (where, one_line(key), " or ".join(near))
        )


class _ConfigReader:
    """Takes the lines of one file, one at a time, and keeps what they say."""

    def __init__(self, role: str, path: str) -> None:
        self._role = role
        self._path = path
        self._seen: dict = {}
        self.values: dict = {}
        self.tags: dict = {}
        self.profiles: dict = {}
        self.warnings: list = []

    def take(self, line: ConfigLine) -> None:
        where = "%s:%d" % (self._path, line.number)
        earlier = self._seen.setdefault((line.section, line.key), line.number)
        if earlier != line.number:
            name = line.key or "[%s]" % line.section
            raise ConfigError("%s: `%s` was set before, at line %d" % (where, name, earlier))
        kind, _, name = line.section.partition(" ")
        if not line.section:
            self._take_setting(self._role, line, where, self.values)
        elif self._role == "agent" and line.section == "tags":
            if line.key and not TAG_NAME.fullmatch(line.key):
                raise ConfigError("%s: `%s` is not a tag name" % (where, one_line(line.key)))
            if line.key:
                _check_home("tags", line.key, where)
                self.tags[line.key] = line.value
        elif self._role == "agent" and kind == "profile":
            if not PROFILE_NAME.fullmatch(name):
                raise ConfigError("%s: expected [profile NAME], a name of letters, digits, _ and -" % where)
            profile = self.profiles.setdefault(name, {})
            if line.key:
                self._take_setting("profile", line, where, profile)
        else:
            raise ConfigError("%s: unknown section [%s]" % (where, one_line(line.section)))

    def _take_setting(self, role: str, line: ConfigLine, where: str, into: dict) -> None:
        rows = _rows_of(role)
        row = rows.get(line.key)
        if row is None:
            _check_home(role, line.key, where)
            message = "%s: unknown key `%s`%s" % (where, one_line(line.key), suggest(line.key, rows))
            if role == "profile":  # a limit that is silently not applied is worse than a stop
                raise ConfigError(message)
            self.warnings.append(message)
            return
        if row.key in into:
            raise ConfigError(
                "%s: `%s` was set before (as `%s` or under its other name)" % (where, line.key, row.key)
            )
        try:
            into[row.key] = row.parse(line.value)
        except ValueError as error:
            raise ConfigError(
                "%s: `%s` expects %s, not `%s`" % (where, line.key, error, one_line(line.value))
            ) from None


def complete_profile(given: dict) -> dict:
    """A profile's values with the defaults of those it does not set."""
    return {row.key: given.get(row.key, row.parse(row.default)) for row in SETTINGS if row.role == "profile"}


def load_config(role: str, path: str = "", root: str = "") -> Config:
    """Read a role's configuration: the file, then the defaults (moved below `root`).

    Without `path` the default file is read if it is there. Raises ConfigError.
    """
    chosen = path or under_root(root, _CONFIG_FILES[role])
    reader = _ConfigReader(role, chosen)
    try:
        text = read_text(chosen)
    except FileNotFoundError:
        if path:
            raise ConfigError("%s: no such file" % path) from None
        text = ""
    except StorageError as error:
        raise ConfigError(error.message, error.hint) from error
    for line in parse_lines(text, chosen):
        reader.take(line)
    values = {}
    for row in SETTINGS:
        if row.role == role:
            default = under_root(root, row.default) if row.default.startswith("/") else row.default
            values[row.key] = reader.values.get(row.key, row.parse(default))
    if role == "dispatcher" and not values["dispatcher_id"]:
        values["dispatcher_id"] = socket.gethostname()
        if not HOST_NAME.fullmatch(values["dispatcher_id"]):
            raise ConfigError("%s: the host name cannot be the dispatcher's id; set `dispatcher_id`" % chosen)
    profiles = {name: complete_profile(values) for name, values in reader.profiles.items()}
    return Config(role, chosen, root, values, reader.tags, profiles, tuple(reader.warnings))


_EXAMPLE_HEADS = {
    "dispatcher": """\
# ==== {file}: the dispatcher (ced) and the API ====
# `key = value` lines; whole-line # comments. Every key is here with its default: uncomment to change.
""",
    "agent": """\
# ==== {file}: the agent (cea) ====
# Read at start and on SIGHUP. Which scripts may run is another file, scripts.conf, one line a script:
#   NAME = /absolute/path [profile=P] [timeout=SECONDS] [max_running=N] [unrecorded=yes]
""",
    "profile": """\
# [tags]: shown by `ced discovery` and used by `ced run --tags site=north ...`
#[tags]
#site = north

# [profile NAME]: what a script runs as, chosen by `profile=NAME` in scripts.conf. A profile called
# `default` holds for the scripts that name none.
#[profile example]
""",
}


def _render_rows(role: str) -> Iterator[str]:
    for row in SETTINGS:
        if row.role == role:
            older = " (older name: %s)" % row.older if row.older else ""
            yield "# %s%s\n#%s\n" % (row.help, older, ("%s = %s" % (row.key, row.default)).rstrip())


def render_example(role: str) -> str:
    """The example file of one role: every key, commented out, with its default and what it means."""
    parts = [_EXAMPLE_HEADS[role].format(file=_CONFIG_FILES[role])]
    parts += _render_rows(role)
    if role == "agent":
        parts.append(_EXAMPLE_HEADS["profile"])
        parts += _render_rows("profile")
    return "\n".join(parts)


# ======================================================================================================
# 5. OPENSSL
# Owns:  the only place that knows the openssl program's options and output. Works with 1.1.1 and 3.x.
# Uses:  HEAD, ERRORS, GROUND
# On disk: a private temporary directory while a certificate is signed
# ======================================================================================================


class CertInfo(NamedTuple):
    """What a certificate says. `serial` is canonical (lower-case hex); times are seconds since the epoch."""

    serial: str
    common_name: str
    names: tuple  # DNS names of subjectAltName
    not_before: float
    not_after: float
    is_ca: bool = False
    purposes: tuple = ()  # OIDs of extendedKeyUsage
    public_key: bytes = b""  # SubjectPublicKeyInfo, DER
    pairing_proof: str = ""  # hex; see `pairing_answer`


# One profile per kind of certificate. Purposes are kept apart by extendedKeyUsage; the key identifiers
# and criticality are what RFC 5280 wants and VERIFY_X509_STRICT (Python 3.13's default) checks.
_EXTENSIONS = {
    "ca": """\
basicConstraints = critical, CA:TRUE, pathlen:0
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid:always
""",
    "dispatcher": """\
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = clientAuth, serverAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid:always
subjectAltName = DNS:{name}
""",
    "agent": """\
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid:always
subjectAltName = DNS:{name}
""",
}

# An extension of a host's first certificate: what the exchange was in which it was issued. Its number is made
# from a UUID, as ITU-T X.667 lets everybody do.
_PAIRING_PROOF = "2.25.255952842712604938590257164542787336655"

# `openssl ca` and not `openssl x509 -req`: only the former can set notBefore before OpenSSL 3.4. Its
# database lives as long as one signature; serials are ours and random. copy_extensions = none is the
# rule that the CA signs what it decided, not what was asked.
_CA_CONFIG = """\
[ca]
default_ca = this
[this]
database = {work}/index.txt
new_certs_dir = {work}
serial = {work}/serial
default_md = sha256
policy = policy
copy_extensions = none
unique_subject = no
email_in_dn = no
string_mask = utf8only
[policy]
commonName = supplied
[req]
distinguished_name = dn
prompt = no
string_mask = utf8only
[dn]
CN = {common_name}
[extensions]
{extensions}
"""

_CURVES = {"1.2.840.10045.3.1.7": "P-256", "1.3.132.0.34": "P-384", "1.3.132.0.35": "P-521"}
_EC_KEY = "1.2.840.10045.2.1"
_RSA_KEY = "1.2.840.113549.1.1.1"
# SubjectPublicKeyInfo of a key on P-256, up to its point (RFC 5480 section 2)
_P256_KEY = bytes.fromhex("3059301306072a8648ce3d020106082a8648ce3d030107034200")
EXCHANGE_KEY = re.compile(r"04[0-9a-f]{128}")  # such a point, uncompressed
_SIGNATURES = {  # what a request may be signed with (RFC 5758, RFC 8017), and its digest; no MD5, no SHA-1
    "1.2.840.10045.4.3.2": "sha256",  # ECDSA
    "1.2.840.10045.4.3.3": "sha384",
    "1.2.840.10045.4.3.4": "sha512",
    "1.2.840.113549.1.1.11": "sha256",  # RSA, PKCS #1 version 1.5
    "1.2.840.113549.1.1.12": "sha384",
    "1.2.840.113549.1.1.13": "sha512",
}


def shorten_common_name(name: str) -> str:
    """The CN for a name: itself, or, over the 64 characters X.520 allows, its start and a hash."""
    if len(name) <= 64:
        return name
    import hashlib

    return name[:47] + "-" + hashlib.sha256(name.encode("ascii")).hexdigest()[:16]


_BASE64_LINE = re.compile(r"[A-Za-z0-9+/]+={0,2}")


def encode_pem(der: bytes, label: str) -> bytes:
    """One PEM block (RFC 7468)."""
    import base64

    text = base64.b64encode(der).decode("ascii")
    lines = [text[at : at + 64] for at in range(0, len(text), 64)]
    return "\n".join(["-----BEGIN %s-----" % label, *lines, "-----END %s-----\n" % label]).encode("ascii")


def decode_pem(text: str, label: str) -> bytes:
    """The DER inside one PEM block (RFC 7468). Raises ValueError when there is not exactly one."""
    import base64

    # Line by line: a pattern over the whole text would take quadratic time for a megabyte of blanks.
    lines = [line.rstrip(" \t\r") for line in text.strip(" \t\r\n").split("\n")]
    frame = ["-----BEGIN %s-----" % label, "-----END %s-----" % label]
    # RFC 2045 allows lines of 76 characters; what openssl makes of longer ones differs between its releases
    is_body = all(len(line) <= 76 and _BASE64_LINE.fullmatch(line) for line in lines[1:-1])
    if [lines[0], lines[-1]] != frame or not is_body:
        raise ValueError("not one PEM block of type %s" % label)
    return base64.b64decode("".join(lines[1:-1]), validate=True)


def _read_der(data: bytes) -> list:
    """The elements of a DER sequence's content as (tag, content) pairs.

    Raises ValueError when it is cut short, or BER only: then `_encode_der` would not give the same bytes.
    """
    elements = []
    at = 0
    while at < len(data):
        if at + 2 > len(data):
            raise ValueError("DER cut short")
        tag, length = data[at], data[at + 1]
        at += 2
        if length & 0x80:
            size = length & 0x7F
            if not 1 <= size <= 4 or at + size > len(data):
                raise ValueError("DER length")
            length = int.from_bytes(data[at : at + size], "big")
            if length < 0x80 or data[at] == 0:
                raise ValueError("DER length")
            at += size
        if at + length > len(data):
            raise ValueError("DER cut short")
        elements.append((tag, data[at : at + length]))
        at += length
    return elements


def _encode_der(tag: int, content: bytes) -> bytes:
    """One element as DER (X.690 section 10.1)."""
    size = len(content)
    if size < 0x80:
        return bytes((tag, size)) + content
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes((tag, 0x80 | len(length))) + length + content


def _read_oid(content: bytes) -> str:
    """An object identifier in dotted form (X.690 section 8.19)."""
    numbers: list = []
    value = 0
    for byte in content:
        value = value << 7 | byte & 0x7F
        if not byte & 0x80:
            numbers.append(value)
            value = 0
    first = min(numbers[0] // 40, 2) if numbers else 0
    return ".".join(str(n) for n in [first, numbers[0] - 40 * first] + numbers[1:]) if numbers else ""


_BASIC_CONSTRAINTS, _KEY_USAGE, _SUBJECT_KEY_ID = "2.5.29.19", "2.5.29.15", "2.5.29.14"
_ALTERNATIVE_NAMES, _EXTENDED_KEY_USAGE = "2.5.29.17", "2.5.29.37"
_COMMON_NAME = "2.5.4.3"
_CLIENT_PURPOSES = ("1.3.6.1.5.5.7.3.2", "2.5.29.37.0")  # clientAuth, anyExtendedKeyUsage


def _read_certificate_fields(der: bytes) -> list:
    """A certificate's fields from the serial on (RFC 5280 section 4.1). Raises ValueError, IndexError."""
    ((_, certificate),) = _read_der(der)
    fields = _read_der(_read_der(certificate)[0][1])
    return fields[fields[0][0] == 0xA0 :]  # [0] is the version, which a certificate of version 1 leaves out


def _read_extensions(fields: list) -> dict:
    """A certificate's extensions, OID to value; version 1 has none. Raises ValueError, IndexError."""
    found = {}
    for tag, content in fields[6:]:
        if tag == 0xA3:
            ((_, extensions),) = _read_der(content)
            for _, extension in _read_der(extensions):
                parts = _read_der(extension)  # the OID, whether it is critical, the value
                found[_read_oid(parts[0][1])] = parts[-1][1]
    return found


def is_strict_ca(der: bytes) -> bool:
    """Whether a CA certificate has what VERIFY_X509_STRICT demands; those of older releases have not."""
    try:
        extensions = _read_extensions(_read_certificate_fields(der))
        return {_BASIC_CONSTRAINTS, _KEY_USAGE, _SUBJECT_KEY_ID} <= extensions.keys()
    except (ValueError, IndexError):
        return False


def _read_time(element: tuple) -> float:
    """UTCTime or GeneralizedTime (RFC 5280 section 4.1.2.5) in seconds since the epoch. Raises ValueError."""
    tag, content = element
    text = content.decode("ascii", "replace")
    if tag == 0x17:  # UTCTime: 50 to 99 are the years of the century before
        text = ("19" if text >= "50" else "20") + text
    hit = re.fullmatch(r"([0-9]{4})([0-9]{2})([0-9]{2})([0-9]{2})([0-9]{2})([0-9]{2})Z", text, re.ASCII)
    if not hit:
        raise ValueError("DER time")
    return parse_iso_time("%s-%s-%sT%s:%s:%sZ" % hit.groups())


def _read_common_name(name: bytes) -> str:
    """The last, most specific, commonName of a Name (RFC 5280 section 4.1.2.4); none is empty."""
    found = ""
    for _, parts in _read_der(name):
        for _, pair in _read_der(parts):
            (_, oid), (tag, value) = _read_der(pair)
            if _read_oid(oid) == _COMMON_NAME:
                found = value.decode("utf-16-be" if tag == 0x1E else "utf-8", "replace")  # 0x1E: BMPString
    return found


def parse_certificate_der(der: bytes) -> CertInfo:
    """What a certificate says (RFC 5280 section 4.1). Raises TrustError when it is none."""
    try:
        fields = _read_certificate_fields(der)
        (_, serial), _, _, (_, validity), (_, subject), (key_tag, key) = fields[:6]
        not_before, not_after = map(_read_time, _read_der(validity))
        extensions = _read_extensions(fields)
        empty = _encode_der(0x30, b"")
        names, purposes, constraints = (
            _read_der(_read_der(extensions.get(oid, empty))[0][1])
            for oid in (_ALTERNATIVE_NAMES, _EXTENDED_KEY_USAGE, _BASIC_CONSTRAINTS)
        )
        return CertInfo(
            "%x" % int.from_bytes(serial, "big"),
            _read_common_name(subject),
            tuple(name.decode("ascii", "replace") for tag, name in names if tag == 0x82),  # [2] dNSName
            not_before,
            not_after,
            (0x01, b"\xff") in constraints,
            tuple(_read_oid(oid) for _, oid in purposes),
            _encode_der(key_tag, key),
            extensions.get(_PAIRING_PROOF, b"\x04\x00")[2:].hex(),
        )
    except (ValueError, IndexError) as error:
        raise TrustError("not a certificate") from error


def split_pem(text: str) -> list:
    """The certificates in a PEM text, each in the one form that this function gives it. Raises ValueError."""
    blocks = re.findall(r"-----BEGIN CERTIFICATE-----[^-]*-----END CERTIFICATE-----", text)
    if text.strip() and not blocks:
        raise ValueError("there is no PEM certificate in it")
    return [ssl.DER_cert_to_PEM_cert(decode_pem(block, "CERTIFICATE")) for block in blocks]


def parse_certificate(pem: bytes) -> CertInfo:
    """What the first certificate in a PEM text says. Raises TrustError when there is none."""
    try:
        return parse_certificate_der(decode_pem(split_pem(pem.decode("ascii", "replace"))[0], "CERTIFICATE"))
    except (ValueError, IndexError) as error:
        raise TrustError("not a certificate") from error


def _check_request_key(key_info: bytes) -> None:
    """Raise ValueError unless a SubjectPublicKeyInfo is an EC key on a usual curve or RSA, long enough."""
    algorithm, key = _read_der(key_info)
    parts = _read_der(algorithm[1])
    kind = _read_oid(parts[0][1])
    if kind == _EC_KEY:
        curve = _read_oid(parts[1][1]) if len(parts) > 1 and parts[1][0] == 0x06 else "explicit parameters"
        if curve not in _CURVES:
            raise ValueError("its curve is not P-256, P-384 or P-521")
    elif kind == _RSA_KEY:
        modulus = _read_der(_read_der(key[1][1:])[0][1])[0][1]
        bits = int.from_bytes(modulus, "big").bit_length()
        if not MIN_RSA_BITS <= bits <= 8192:
            raise ValueError("its RSA key has %d bits; from %d to 8192 are accepted" % (bits, MIN_RSA_BITS))
    else:
        raise ValueError("its key is neither EC nor RSA")


class CertRequest(NamedTuple):
    """A certificate request (PKCS #10, RFC 2986 section 4), its parts as DER."""

    der: bytes
    signed: bytes  # what the signature is over: CertificationRequestInfo
    public_key: bytes  # SubjectPublicKeyInfo
    digest: str
    signature: bytes


def parse_request(pem: str) -> CertRequest:
    """Take a certificate request apart, and check its size, key and signature algorithm.

    Raises TrustError saying what is wrong with it.
    """
    if len(pem) > MAX_CSR:
        raise TrustError("the certificate request is larger than %d bytes" % MAX_CSR)
    if not pem.isascii():
        raise TrustError("the certificate request is refused: it is not ASCII")
    try:
        der = decode_pem(pem, "CERTIFICATE REQUEST")
        ((_, request),) = _read_der(der)
        (tag, info), (_, algorithm), (_, signature) = _read_der(request)
        key_tag, key = _read_der(info)[2]
        _check_request_key(key)
        digest = _SIGNATURES.get(_read_oid(_read_der(algorithm)[0][1]))
        if digest is None:
            raise ValueError("it is not signed with SHA-256 or better")
    except (ValueError, IndexError, TypeError) as error:
        reason = str(error) if isinstance(error, ValueError) else "it is not PKCS #10"
        raise TrustError("the certificate request is refused: %s" % reason) from error
    # a BIT STRING begins with the number of its unused bits
    return CertRequest(der, _encode_der(tag, info), _encode_der(key_tag, key), digest, signature[1:])


def explain_openssl() -> str:
    """What to look at when OpenSSL, the program or the library, lacks what every OpenSSL has."""
    where = os.environ.get("OPENSSL_CONF") or "openssl.cnf, where `openssl version -d` says"
    return "see OpenSSL's configuration (%s): it may name a provider, such as fips, that is not there" % where


def _openssl_environment() -> dict:
    """What openssl finds in its environment. The system's configuration holds for it as it does for Python's
    ssl (it may demand FIPS); what we issue is in our own text above, which no configuration changes."""
    passed = ("OPENSSL_CONF", "OPENSSL_MODULES")
    site = {name: os.environ[name] for name in passed if name in os.environ}
    # `openssl verify` trusts the CAs that it finds in these, beside the one that it is given
    nowhere = {"SSL_CERT_DIR": "/dev/null", "SSL_CERT_FILE": "/dev/null"}
    return {"PATH": SAFE_PATH, "LC_ALL": "C", **nowhere, **site}


def read_certificate_file(path: str) -> bytes:
    """The PEM text of a certificate on disk. Raises TrustError when there is none."""
    try:
        return read_file(path)
    except FileNotFoundError:
        raise TrustError("%s: no such file" % path) from None


def read_certificate_der(path: str) -> bytes:
    """The DER of the certificate in a file. Raises TrustError."""
    try:
        return decode_pem(read_certificate_file(path).decode("ascii", "replace"), "CERTIFICATE")
    except ValueError as error:
        raise TrustError("%s: %s" % (path, error)) from error


def read_certificate(path: str) -> CertInfo:
    """What the certificate in a PEM file says. Raises TrustError when there is none."""
    pem = read_certificate_file(path)
    try:
        return parse_certificate(pem)
    except TrustError as error:
        raise TrustError("%s: %s" % (path, error.message)) from error


_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def parse_openssl_time(text: str) -> float:
    """`Nov 23 18:09:47 2026 GMT`, as openssl and getpeercert() write it, in seconds since the epoch.

    By hand for the reason that `parse_iso_time` has. Raises ValueError.
    """
    hit = re.fullmatch(r"([A-Z][a-z]{2}) +([0-9]{1,2}) ([0-9:]{8}) ([0-9]{4}) GMT", text)
    if not hit or hit[1] not in _MONTHS:
        raise ValueError("not a time such as Nov 23 18:09:47 2026 GMT")
    return parse_iso_time("%s-%02d-%02dT%sZ" % (hit[4], _MONTHS.index(hit[1]) + 1, int(hit[2]), hit[3]))


class _WorkDirectory:
    """A directory that only we can read, for as long as openssl needs files."""

    def __init__(self) -> None:
        self._path = ""
        self.common_name = ""

    def __enter__(self) -> "_WorkDirectory":
        import tempfile

        try:
            self._path = tempfile.mkdtemp(prefix="ctrl-exec-")
        except OSError as error:
            message = "cannot make a directory for temporary files: %s" % error.strerror
            hint = "make room, or set TMPDIR to a directory that can be written to"
            raise StorageError(message, hint) from error
        return self

    def __exit__(self, *_: object) -> None:
        for name in os.listdir(self._path):
            os.unlink(os.path.join(self._path, name))
        os.rmdir(self._path)

    def put(self, name: str, data: bytes) -> str:
        path = os.path.join(self._path, name)
        write_atomic(path, data, mode=0o600)
        return path

    def write(self, name: str, template: str, subject: str, extensions: str) -> str:
        self.common_name = shorten_common_name(subject)
        values = {"work": self._path, "common_name": self.common_name, "extensions": extensions}
        return self.put(name, template.format(**values).encode("ascii"))


_HINTS_TO_RUN = {
    errno.ENOENT: "install the openssl package",
    errno.EMFILE: "raise the limit of open files: ulimit -n, LimitNOFILE= of a service",
    errno.EAGAIN: "raise the limit of processes: ulimit -u, TasksMax= of a service",
}


class OpenSSL:
    """The openssl program. One object, made once; each method is one task done by it."""

    def __init__(self, binary: str = "openssl") -> None:
        self._binary = binary
        self._is_tried = False

    def _run(self, *options: str, stdin: bytes = b"") -> bytes:
        """What openssl prints. Raises ProgramError when it cannot be run or its exit status is not 0."""
        argv = [self._binary, *options]
        try:
            done = run_program(argv, stdin=stdin, env=_openssl_environment(), timeout=OPENSSL_SECONDS)
        except OSError as error:
            hint = _HINTS_TO_RUN.get(error.errno, "")
            raise ProgramError("cannot run openssl: %s" % error.strerror, hint) from error
        if done.status is None:
            raise ProgramError("openssl %s did not end within %d s" % (options[0], OPENSSL_SECONDS))
        if done.status != 0:
            said = one_line(b" ".join((done.stdout, done.stderr)).decode("utf-8", "replace").strip()[-400:])
            hint = explain_openssl() if re.search(":unsupported:|provider|fips", said, re.IGNORECASE) else ""
            raise ProgramError("openssl %s failed: %s" % (options[0], said), hint, done.status)
        return done.stdout

    def version(self) -> str:
        return self._run("version").decode("ascii", "replace").strip()

    def try_out(self) -> str:
        """Make a CA, a request and a certificate, and verify them, with keys that are thrown away afterwards:
        whether the openssl of this host does what we need. Returns its version.

        Raises ProgramError.
        """
        version = self.version()
        try:
            with _WorkDirectory() as work:
                ca_key, key = (work.put(name, self.new_key("ec")) for name in ("ca.key", "try.key"))
                ca = self.sign_ca(ca_key, "ctrl-exec check", 2).encode("ascii")
                ca_cert = work.put("ca.crt", ca)
                request = self.new_request(key, "check")
                self.check_request(request)
                certificate = self.sign(request, "check", "agent", 1, ca_cert, ca_key).encode("ascii")
                self.check_chain(certificate, ca, "sslserver")
                self.check_key_match(certificate, key)
                # It must be able to say no as well.
                if self._is_signed(parse_request(request)._replace(signed=b"another request")):
                    raise ProgramError("it accepts a request that its key has not signed")
                other = self.sign_ca(key, "ctrl-exec check", 2).encode("ascii")
                if self._find_fault(certificate, other, "sslserver") is None:
                    raise ProgramError("it accepts a certificate that the CA has not signed")
        except CtrlExecError as error:
            message = "the openssl program here (%s) does not do what ctrl-exec needs: %s"
            hint = error.hint or "install OpenSSL, 1.1.1 or newer"
            raise ProgramError(message % (version, error.message), hint) from error
        return version

    def new_key(self, kind: str) -> bytes:
        """A new private key as PEM: `ec` is P-256, `rsa` 3072 bits."""
        if kind == "ec":
            choice = [
                "-algorithm",
                "EC",
                "-pkeyopt",
                "ec_paramgen_curve:P-256",
                "-pkeyopt",
                "ec_param_enc:named_curve",
            ]
        else:
            choice = ["-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:3072"]
        return self._run("genpkey", *choice)

    def new_request(self, key_path: str, name: str) -> str:
        """A certificate request for `name`, signed by the key at `key_path`, as PEM."""
        with _WorkDirectory() as work:
            config = work.write("openssl.cnf", _CA_CONFIG, name, "")
            return self._run("req", "-new", "-sha256", "-key", key_path, "-config", config).decode("ascii")

    def check_request(self, pem: str) -> bytes:
        """Check a request's form and that it is signed by its own key; return its DER. Raises TrustError."""
        request = parse_request(pem)
        if not self._is_signed(request):
            self._check_itself()
            raise TrustError("the certificate request is refused: it is not signed by its own key")
        return request.der

    def _is_signed(self, request: CertRequest) -> bool:
        # Not by `openssl req -verify`: before OpenSSL 3.2 its exit status says nothing, and from then on its
        # words are on another stream.
        with _WorkDirectory() as work:
            key = work.put("key.pem", encode_pem(request.public_key, "PUBLIC KEY"))
            signature = work.put("signature", request.signature)
            options = ("-" + request.digest, "-verify", key, "-signature", signature)
            try:
                self._run("dgst", *options, stdin=request.signed)
            except ProgramError as error:
                if error.status is None:
                    raise
                return False
        return True

    def sign_ca(self, key_path: str, name: str, days: int) -> str:
        """A self-signed CA certificate for the key at `key_path`, as PEM."""
        with _WorkDirectory() as work:
            config = work.write("openssl.cnf", _CA_CONFIG, name, _EXTENSIONS["ca"])
            request = self._run("req", "-new", "-sha256", "-key", key_path, "-config", config)
            return self._sign(work, config, request, ["-selfsign", "-keyfile", key_path], days)

    def new_exchange(self) -> tuple:
        """A key pair for one key agreement: (private key as PEM, public key as hex)."""
        key = self.new_key("ec")
        public = self._run("pkey", "-pubout", "-outform", "DER", stdin=key)
        return key, public[len(_P256_KEY) :].hex()

    def agree(self, key: bytes, public: str) -> bytes:
        """What only the holders of `key` and of the other side's `public` key can compute (NIST SP 800-56A,
        elliptic-curve Diffie-Hellman). Raises TrustError for what is no public key, ProgramError."""
        if not EXCHANGE_KEY.fullmatch(public):
            raise TrustError("not a public key on P-256")
        with _WorkDirectory() as work:
            peer = encode_pem(_P256_KEY + bytes.fromhex(public), "PUBLIC KEY")
            paths = work.put("own.pem", key), work.put("peer.pem", peer)
            try:
                return self._run("pkeyutl", "-derive", "-inkey", paths[0], "-peerkey", paths[1])
            except ProgramError as error:
                if error.status is None:
                    raise
                raise TrustError("not a public key on P-256") from error

    def sign(
        self, request: str, name: str, profile: str, days: int, ca_cert: str, ca_key: str, proof: bytes = b""
    ) -> str:
        """A certificate for the key in `request`, as PEM: its name and extensions come from here alone.
        `proof`: 32 bytes that say in which exchange it was issued."""
        if not os.path.exists(ca_key):
            raise TrustError("%s: no such file" % ca_key, "do this on the host that has the CA's key")
        days_left = int((read_certificate(ca_cert).not_after - now()) // 86400)
        if days_left < 1:
            raise TrustError("%s: the CA certificate has expired" % ca_cert)
        with _WorkDirectory() as work:
            extensions = _EXTENSIONS[profile].format(name=name)
            if not is_strict_ca(read_certificate_der(ca_cert)):  # it has no key identifier to point at
                extensions = extensions.replace("= keyid:always", "= issuer:always")
            if proof:
                extensions += "%s = DER:04%02x%s\n" % (_PAIRING_PROOF, len(proof), proof.hex())
            config = work.write("openssl.cnf", _CA_CONFIG, name, extensions)
            signer = ["-cert", ca_cert, "-keyfile", ca_key]
            return self._sign(work, config, request.encode("ascii"), signer, min(days, days_left))

    def _sign(self, work: "_WorkDirectory", config: str, request: bytes, signer: list, days: int) -> str:
        # the first bit is clear, so that the DER integer is positive; the second set, so that it is long
        serial = os.urandom(SERIAL_BYTES)
        work.put("serial", b"%02X%s\n" % (serial[0] & 0x7F | 0x40, serial[1:].hex().upper().encode("ascii")))
        work.put("index.txt", b"")
        path = work.put("request.pem", request)
        dates = [
            time.strftime("%Y%m%d%H%M%SZ", time.gmtime(now() + s)) for s in (-BACKDATE_SECONDS, days * 86400)
        ]
        subject = "/CN=" + work.common_name
        text = self._run(
            "ca", "-batch", "-notext", "-config", config, "-in", path, "-subj", subject, *signer,
            "-startdate", dates[0], "-enddate", dates[1], "-extensions", "extensions",
        )  # fmt: skip
        return text.decode("ascii")

    def check_chain(self, pem: bytes, ca: bytes, purpose: str) -> None:
        """Raise TrustError unless the certificate chains to one of the CAs for `purpose`: sslserver,
        sslclient or any."""
        fault = self._find_fault(pem, ca, purpose)
        if fault is not None:
            self._check_itself()
            raise TrustError("the certificate is refused: " + fault)

    def _check_itself(self) -> None:
        """Before something is refused on openssl's word: could it have said yes? Raises ProgramError."""
        if not self._is_tried:
            self._is_tried = True  # first: this asks, too
            self.try_out()

    def _find_fault(self, pem: bytes, ca: bytes, purpose: str) -> Optional[str]:
        """Why a certificate does not chain to one of the CAs, in openssl's words; None when it does."""
        cas = split_pem(ca.decode("ascii", "replace"))
        strict = all(is_strict_ca(decode_pem(one, "CERTIFICATE")) for one in cas)
        with _WorkDirectory() as work:
            path = work.put("certificate.pem", pem)
            ca_path = work.put("ca.pem", ca)
            options = ["-x509_strict"] if strict else []  # see `is_strict_ca`
            clock = ["-attime", "%d" % now()]  # the clock that dates what we sign
            try:
                self._run("verify", *options, *clock, "-purpose", purpose, "-CAfile", ca_path, path)
            except ProgramError as error:
                if error.status is None:
                    raise
                reason = re.search(r"error \d+ at \d+ depth lookup: *([^\\]*)", error.message)
                return reason[1] if reason else "no chain"
        return None

    def check_no_client(self, pem: bytes) -> None:
        """Raise TrustError for a certificate that names the purpose of a dispatcher's."""
        if set(parse_certificate(pem).purposes) & set(_CLIENT_PURPOSES):
            raise TrustError("the certificate is refused: its purpose is a dispatcher's")

    def find_key(self, pem: bytes, paths: list) -> str:
        """Which of these private keys the certificate was issued for. Raises TrustError when it is none, and
        StorageError for a key that cannot be read."""
        public = parse_certificate(pem).public_key
        for path in paths:
            try:
                key = read_file(path)
            except FileNotFoundError:
                raise TrustError("%s: no such file" % path) from None
            if self._run("pkey", "-pubout", "-outform", "DER", stdin=key) == public:
                return path
        raise TrustError("the certificate does not belong to the key %s" % paths[0])

    def check_key_match(self, pem: bytes, key_path: str) -> None:
        """Raise TrustError unless the certificate was issued for the key at `key_path`."""
        self.find_key(pem, [key_path])

    def check_endorsement(self, endorsement: bytes, cas: bytes, successor: bytes) -> None:
        """Raise TrustError unless one of `cas` has certified the key of the CA `successor` as a CA's: then
        whoever believes the one may believe the other (as in RFC 4210 section 4.4)."""
        self.check_chain(endorsement, cas, "any")
        self.check_chain(successor, successor, "any")
        endorsed, itself = parse_certificate(endorsement), parse_certificate(successor)
        if not (endorsed.is_ca and itself.is_ca):
            raise TrustError("the successor of the CA is no CA")
        if endorsed.public_key != itself.public_key:
            raise TrustError("the known CA has endorsed another successor")


# ======================================================================================================
# 6. TRUST
# Owns:  who is believed: the CA, an identity on disk, the trusted-dispatchers map, revocations, the one
#        TLS policy, the peer's certificate as facts, and the arithmetic of pairing.
# Uses:  HEAD, ERRORS, GROUND, OPENSSL
# On disk: ca.key, ca.crt; dispatcher.key/.crt, agent.key/.crt; ctrl-exec-dispatchers; revoked-serials
# ======================================================================================================


def parse_serial(text: str) -> str:
    """The canonical form of a certificate serial: lower-case hex without leading zeros.

    Takes plain hex, `DE:AD`, `0x..`, `serial=..`, and decimal where it cannot be hex: more digits than
    the 20 octets of RFC 5280 have as hex. Raises ValueError.
    """
    plain = text.strip().lower()
    if re.fullmatch(r"[0-9]{41,60}", plain):
        return "%x" % int(plain)
    for prefix in ("serial=", "0x"):
        if plain.startswith(prefix):
            plain = plain[len(prefix) :]
    plain = plain.replace(":", "")
    if not re.fullmatch(r"[0-9a-f]{1,60}", plain):
        raise ValueError("`%s` is not a certificate serial" % one_line(text[:80]))
    return plain.lstrip("0") or "0"


def _serial_readings(text: str) -> set:
    """Every serial that `text` can mean: digits alone are hex or decimal, and a revocation covers both."""
    readings = {parse_serial(text)}
    if re.fullmatch(r"[0-9]{1,60}", text.strip()):
        readings.add("%x" % int(text))
    return readings


def _read_guard(path: str, what: str) -> Optional[list]:
    """The lines of a file that keeps somebody out; None without one. Raises TrustError when it is there, or
    should be, and cannot be read."""
    try:
        return read_text(path).splitlines()
    except FileNotFoundError:
        if os.path.islink(path):
            message = "the %s cannot be used: %s leads to a file that is not there" % (what, path)
            raise TrustError(message, "put it back, or remove the link") from None
        return None
    except StorageError as error:
        raise TrustError("the %s cannot be used: %s" % (what, error.message), error.hint) from error


def load_revoked(path: str) -> frozenset:
    """The revoked serials. No file: none. Raises TrustError for a list that cannot be read or understood:
    then everybody is refused, rather than nobody."""
    serials: set = set()
    for number, line in enumerate(_read_guard(path, "revocation list") or (), 1):
        word = line.partition("#")[0].strip()
        if word:
            try:
                serials |= _serial_readings(word)
            except ValueError as error:
                raise TrustError("%s:%d: %s" % (path, number, error)) from None
    return frozenset(serials)


def add_revoked(path: str, serials: Iterable, comment: str) -> None:
    """Add serials to a revocation list. Raises StorageError or TrustError, with the list unchanged."""
    make_directory(os.path.dirname(path), 0o755)
    with FileLock(path + ".lock"):
        known = load_revoked(path)
        try:
            text = read_text(path)
        except FileNotFoundError:
            text = "# serials of revoked certificates, one a line\n"
        if text and not text.endswith("\n"):
            text += "\n"  # or the first of ours would become part of the last line
        for serial in serials:
            if serial not in known:
                marked = serial if re.search("[a-f]", serial) else "0x" + serial  # digits alone mean two
                text += "%s  # %s\n" % (marked, one_line(comment))
        write_atomic(path, text.encode("utf-8"), mode=0o644, durable=True)


OLDER_DISPATCHER = "dispatcher"  # the id of the one that an older release trusted without a name


def _load_older_serial(path: str) -> dict:
    """The one trusted serial of an older release."""
    try:
        return {parse_serial(read_text(path)): OLDER_DISPATCHER}
    except (FileNotFoundError, ValueError):  # none, or it trusts nobody
        return {}
    except StorageError as error:
        raise TrustError("the trusted serial cannot be used: %s" % error.message, error.hint) from error


def load_trust_map(path: str, older: str = "") -> dict:
    """Trusted dispatchers: canonical serial to dispatcher id. While there is no map, the one serial in the
    file `older` is trusted, which releases without a map wrote. Raises TrustError naming the line."""
    lines = _read_guard(path, "trusted-dispatchers map")
    if lines is None:
        return _load_older_serial(older) if older else {}
    trusted = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        words = line.split()
        try:
            serial = parse_serial(words[0])
            if len(words) != 2 or not HOST_NAME.fullmatch(words[1]):
                raise ValueError("expected `SERIAL DISPATCHER_ID`")
        except ValueError as error:
            raise TrustError("%s:%d: %s" % (path, number, error)) from None
        trusted[serial] = words[1]
    return trusted


def edit_trust_map(path: str, older: str, edit: Callable) -> None:
    """Let `edit` change the map, and write it. Raises StorageError, TrustError, and what `edit` raises."""
    make_directory(os.path.dirname(path), 0o755)
    with FileLock(path + ".lock"):
        trusted = load_trust_map(path, older)
        edit(trusted)
        text = "".join("%s %s\n" % entry for entry in trusted.items())
        write_atomic(path, text.encode("ascii"), mode=0o644, durable=True)


def add_trusted(path: str, serial: str, dispatcher_id: str, older: str = "") -> None:
    """Add a dispatcher to the map; the others stay. Raises StorageError or TrustError."""
    edit_trust_map(path, older, lambda trusted: trusted.update({serial: dispatcher_id}))


# --- keys and certificates on disk ----------------------------------------------------------------------


class Identity(NamedTuple):
    """Where a role keeps its certificate and key, and the CA it believes."""

    cert: str
    key: str
    ca: str


def _find_group(name: str) -> int:
    import grp

    try:
        return grp.getgrnam(name).gr_gid if name else -1
    except KeyError:
        return -1


def check_key_mode(path: str, group: str = "") -> None:
    """Raise TrustError when others can read a private key; `group` may (an older installation's 0640)."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise TrustError("%s: no such file" % path) from None
    except OSError as error:
        raise TrustError("%s: %s" % (path, error.strerror), "run this as root") from error
    loose = stat.S_IMODE(status.st_mode) & 0o077
    if loose == 0o040 and status.st_gid == _find_group(group):
        loose = 0
    if loose:
        mode = stat.S_IMODE(status.st_mode)
        raise TrustError("%s: mode %04o lets others at a private key" % (path, mode), "chmod 600 " + path)


def new_key_file(openssl: OpenSSL, path: str, kind: str) -> bool:
    """Make a private key that only we can read, unless there is one; whether it is new.

    Raises StorageError, ProgramError.
    """
    if os.path.exists(path):
        return False
    make_directory(os.path.dirname(path), 0o755)
    try:
        write_atomic(path, openssl.new_key(kind), mode=0o600, durable=True, replace=False)
    except FileExistsError:  # another process was first
        return False
    return True


def ca_key_path(ca_cert: str) -> str:
    """The CA's key lies beside its certificate: ca.crt, ca.key."""
    return os.path.splitext(ca_cert)[0] + ".key"


def sibling_path(path: str, word: str) -> str:
    """A file that belongs to another one: `ca.crt` and `retired` give `ca.retired.crt`."""
    return "%s.%s%s" % (os.path.splitext(path)[0], word, os.path.splitext(path)[1])


def find_siblings(path: str) -> list:
    """A file and those that belong to it, as far as they are there: ca.key, ca.next.key, ca.retired-*.key."""
    directory, name = os.path.split(path)
    stem, suffix = os.path.splitext(name)
    try:
        files = sorted(os.listdir(directory))
    except OSError:  # not ours to look into
        return [path]
    kin = [file for file in files if file.startswith(stem + ".") and file.endswith(suffix) and file != name]
    return ([path] if name in files else []) + [os.path.join(directory, file) for file in kin]


def next_path(path: str) -> str:
    """Where the successor of a certificate or key waits: ca.next.crt."""
    return sibling_path(path, "next")


# A certificate is replaced together with its key, which takes two renames: the certificate's comes first. Who
# is killed between them, or reads between them, finds the key that fits under the name of the successor.


def key_paths(key: str) -> list:
    """Where the key of a certificate may be, most likely first."""
    return [path for path in (key, next_path(key)) if path == key or os.path.exists(path)]


def put_next(cert: str, key: str) -> None:
    """Put the successors of a certificate and its key in place. Raises StorageError."""
    try:
        for path in (cert, key):
            if os.path.exists(next_path(path)):
                rename_durably(next_path(path), path)
    except OSError as error:
        raise StorageError("cannot replace %s: %s" % (path, error.strerror)) from error


def settle_next(openssl: OpenSSL, cert: str, key: str) -> None:
    """Finish a replacement that was interrupted between its two renames. Raises StorageError, TrustError."""
    if os.path.exists(next_path(key)) and not os.path.exists(next_path(cert)):
        if openssl.find_key(read_certificate_file(cert), key_paths(key)) == next_path(key):
            put_next(cert, key)


def read_cas(path: str) -> list:
    """The CA certificates in a file, each as PEM. Raises TrustError when there is none."""
    try:
        cas = split_pem(read_certificate_file(path).decode("ascii", "replace"))
    except ValueError as error:
        raise TrustError("%s: %s" % (path, error)) from error
    if not cas:
        raise TrustError("%s: not a CA certificate" % path)
    return cas


def load_cas(ca_cert: str) -> list:
    """The CAs that are believed, as PEM: those in the file, and its successor's. Raises TrustError."""
    successor = next_path(ca_cert)
    return read_cas(ca_cert) + (read_cas(successor) if os.path.exists(successor) else [])


def former_identity(identity: Identity, serial: str) -> Identity:
    """Where an identity is kept once it has been replaced."""
    word = "former-" + serial
    return Identity(sibling_path(identity.cert, word), sibling_path(identity.key, word), identity.ca)


def find_former(identity: Identity) -> list:
    """The identities that this one has replaced and that some agent may still trust, the latest first:
    dispatcher.former-SERIAL.crt and .key beside the present ones."""
    directory, name = os.path.split(sibling_path(identity.cert, "former-"))
    form = re.compile("%s([0-9a-f]{1,40})%s" % tuple(map(re.escape, os.path.splitext(name))))
    try:
        hits = [form.fullmatch(file) for file in os.listdir(directory)]
    except OSError:  # not ours to look into: then there are none for us
        return []
    found = [former_identity(identity, hit[1]) for hit in hits if hit]
    present = [former for former in found if os.path.exists(former.key)]  # both are put there, the key first
    return sorted(present, key=lambda former: -os.lstat(former.key).st_mtime)


def new_ca(openssl: OpenSSL, ca_cert: str, kind: str, name: str) -> CertInfo:
    """Make the private CA, once. Raises TrustError when there is one, or half of one."""
    key = ca_key_path(ca_cert)
    taken = next((path for path in (ca_cert, key) if os.path.exists(path)), "")
    if taken or not new_key_file(openssl, key, kind):
        message = "%s exists: a CA is never overwritten" % (taken or key)
        raise TrustError(message, "every paired agent depends on it")
    try:
        certificate = openssl.sign_ca(key, name, CA_DAYS)
        write_atomic(ca_cert, certificate.encode("ascii"), mode=0o644, durable=True, replace=False)
    except BaseException:
        os.unlink(key)  # ours, and nothing was signed with it: half a CA would only block the next attempt
        raise
    return read_certificate(ca_cert)


def name_cas(cas: list) -> str:
    """A name for a set of CAs, to see whether two hosts believe the same: their serials."""
    return ",".join(sorted(parse_certificate(pem.encode("ascii")).serial for pem in cas))


def endorsement_path(ca_cert: str) -> str:
    """Where the CA's word for its successor is: a certificate for the successor's key, signed by the CA."""
    return sibling_path(next_path(ca_cert), "endorsed")


def new_successor(openssl: OpenSSL, ca_cert: str, kind: str, name: str) -> CertInfo:
    """Make the CA that will follow this one, and this one's word for it; goes on where an interrupted call
    has stopped. Raises TrustError when there is a successor already."""
    cert, key = next_path(ca_cert), next_path(ca_key_path(ca_cert))
    if not os.path.exists(ca_cert):
        raise TrustError("%s: no such file" % ca_cert, "there is no CA yet: ced setup-ca")
    if os.path.exists(endorsement_path(ca_cert)):
        raise TrustError("%s exists: the CA has a successor" % cert, "next: ced maintain, then ced retire-ca")
    new_key_file(openssl, key, kind)  # there may be one: nobody has believed it yet
    if not os.path.exists(cert):
        write_atomic(cert, openssl.sign_ca(key, name, CA_DAYS).encode("ascii"), mode=0o644, durable=True)
    info = read_certificate(cert)
    request = openssl.new_request(key, info.common_name)
    word = openssl.sign(request, info.common_name, "ca", CA_DAYS, ca_cert, ca_key_path(ca_cert))
    write_atomic(endorsement_path(ca_cert), word.encode("ascii"), mode=0o644, durable=True)
    return info


def find_issuer(openssl: OpenSSL, ca_cert: str, pem: bytes) -> str:
    """Which CA has issued a certificate: the file of the successor's certificate, or of ours."""
    try:
        openssl.check_chain(pem, read_certificate_file(next_path(ca_cert)), "any")
        return next_path(ca_cert)
    except TrustError:  # there is none, or it was not that one
        return ca_cert


def load_handover(ca_cert: str) -> dict:
    """What an agent needs to believe the CA's successor as well; nothing while there is none."""
    if not os.path.exists(endorsement_path(ca_cert)) or not os.path.exists(next_path(ca_cert)):
        return {}
    word = read_certificate_file(endorsement_path(ca_cert)).decode("ascii", "replace")
    return {"ca": "".join(load_cas(ca_cert)), "endorsement": word}


def retire_ca(openssl: OpenSSL, ca_cert: str) -> str:
    """Put the successor in the place of the CA, whose files are kept under a name of their own; returns its
    certificate's. Called again, it finishes what was interrupted. Raises StorageError, TrustError."""
    key = ca_key_path(ca_cert)
    settle_next(openssl, ca_cert, key)
    kept = sibling_path(ca_cert, "retired-" + read_certificate(ca_cert).serial)
    if os.path.exists(next_path(ca_cert)):
        write_atomic(ca_key_path(kept), read_file(key), mode=0o600, durable=True)
        write_atomic(kept, read_certificate_file(ca_cert), mode=0o644, durable=True)
        put_next(ca_cert, key)
    if os.path.exists(endorsement_path(ca_cert)):
        os.unlink(endorsement_path(ca_cert))
    return kept


def new_dispatcher_identity(
    openssl: OpenSSL, identity: Identity, name: str, kind: str, days: int
) -> CertInfo:
    """Make the dispatcher's key and certificate. Raises TrustError when it has a certificate already."""
    if os.path.exists(identity.cert):
        raise TrustError(
            "%s exists" % identity.cert, "agents trust this certificate; remove it only to start over"
        )
    new_key_file(openssl, identity.key, kind)
    request = openssl.new_request(identity.key, name)
    pem = openssl.sign(request, name, "dispatcher", days, identity.ca, ca_key_path(identity.ca))
    write_atomic(identity.cert, pem.encode("ascii"), mode=0o644, durable=True)
    return read_certificate(identity.cert)


def check_identity(openssl: OpenSSL, identity: Identity, purpose: str, group: str = "") -> CertInfo:
    """Check an identity on disk whole: modes, chain, purpose, dates, key. Raises TrustError."""
    check_key_mode(identity.key, group)
    info = read_certificate(identity.cert)
    pem = read_certificate_file(identity.cert)
    try:
        openssl.check_chain(pem, "".join(load_cas(identity.ca)).encode("ascii"), purpose)
        if purpose == "sslserver":
            openssl.check_no_client(pem)
        openssl.find_key(pem, key_paths(identity.key))
    except TrustError as error:
        raise TrustError("%s: %s" % (identity.cert, error.message), error.hint) from error
    return info


def check_expiry(path: str, info: CertInfo, hint: str) -> Finding:
    """Whether a certificate's dates leave time."""
    days = int((info.not_after - now()) // 86400)
    if info.not_before > now():
        return Finding(
            "FAIL", "%s is not valid before %s" % (path, iso_time(info.not_before)), "check this host's clock"
        )
    if days < 0:
        return Finding("FAIL", "%s expired on %s" % (path, iso_time(info.not_after)), hint)
    return Finding("WARN" if days < 30 else "OK", "%s expires in %d days" % (path, days), hint * (days < 30))


def check_name(path: str, info: CertInfo, name: str, hint: str) -> Finding:
    """Whether a certificate is for `name`, and for nobody else."""
    shown = info.names or (info.common_name,)
    if [one.lower() for one in shown] == [name.lower()]:
        return Finding("OK", "%s is for %s" % (path, name))
    return Finding("WARN", "%s is for %s, and not for %s" % (path, ", ".join(shown), name), hint)


def check_keys(path: str, group: str = "") -> list:
    """Whether others can read a private key, or those that it replaced or that will replace it."""
    findings: list = []
    for key in find_siblings(path):
        try_check(findings, "private key %s" % key, lambda: check_key_mode(key, group))
    return findings


def fingerprint(der: bytes) -> str:
    """SHA-256 of a certificate, lower-case hex: what `openssl x509 -fingerprint -sha256` prints, plainly."""
    import hashlib

    return hashlib.sha256(der).hexdigest()


# --- TLS ------------------------------------------------------------------------------------------------


def render_reason(reason: str) -> str:
    """OpenSSL's `KEY_VALUES_MISMATCH` as `key values mismatch`."""
    return reason.replace("_", " ").lower()


def _apply_policy(context: ssl.SSLContext) -> ssl.SSLContext:
    # A site may demand TLS 1.3; from Python 3.10 on this is seen only where the distribution has seen to it.
    context.minimum_version = max(context.minimum_version, ssl.TLSVersion.TLSv1_2)
    context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")  # TLS 1.3 has none but AEAD
    context.verify_flags |= ssl.VERIFY_X509_STRICT  # on all Pythons, not from 3.13 on only
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_TICKET
    context.options |= getattr(ssl, "OP_NO_RENEGOTIATION", 0)
    return context


def _new_context(protocol: Any) -> ssl.SSLContext:
    """A context with the TLS policy of every socket of this program. Raises TrustError when there can be
    none."""
    try:
        return _apply_policy(ssl.SSLContext(protocol))
    except ssl.SSLError as error:
        message = "the OpenSSL of this Python (%s) cannot be used: %s"
        reason = render_reason(error.reason or str(error))
        raise TrustError(message % (ssl.OPENSSL_VERSION, reason), explain_openssl()) from error


def _load_identity(context: ssl.SSLContext, identity: Identity, group: str) -> None:
    problem: Optional[Exception] = None
    for key in (*key_paths(identity.key), identity.key):  # once more: it may have been renamed just now
        check_key_mode(key, group)
        try:
            return context.load_cert_chain(identity.cert, key)
        except FileNotFoundError:
            raise TrustError("%s: no such file" % identity.cert) from None
        except (OSError, ssl.SSLError) as error:
            problem = problem or error
    what = getattr(problem, "reason", None) or getattr(problem, "strerror", None) or "cannot be loaded"
    raise TrustError("%s with %s: %s" % (identity.cert, identity.key, render_reason(what))) from problem


def _load_ca(context: ssl.SSLContext, path: str) -> None:
    """Believe the CAs of a file, and its successor's. Strict verification is given up for a CA of an older
    release, which has no extensions, and for no other."""
    cas = load_cas(path)
    try:
        context.load_verify_locations(cadata="".join(cas))
    except ssl.SSLError as error:
        raise TrustError("%s: not a CA certificate" % path) from error
    if not all(is_strict_ca(decode_pem(pem, "CERTIFICATE")) for pem in cas):
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT


def _check_ca(openssl: OpenSSL, path: str, pem: str, hint: str) -> Iterator[Finding]:
    try:
        openssl.check_chain(pem.encode("ascii"), pem.encode("ascii"), "any")
        yield check_expiry(path, parse_certificate(pem.encode("ascii")), hint)
    except TrustError as error:
        yield Finding("FAIL", "%s: %s" % (path, error.message), error.hint or hint)
    if not is_strict_ca(decode_pem(pem, "CERTIFICATE")):
        what = "%s is of an older release: it has no extensions, and for it alone strict verification is off"
        yield Finding("WARN", what % path, "move on: ced setup-ca --next, ced maintain, ced retire-ca")


def check_openssl(openssl: OpenSSL) -> Finding:
    """Whether the openssl program of this host does what we need."""
    try:
        version = openssl.try_out()
    except ProgramError as error:
        return Finding("FAIL", error.message, error.hint)
    if not version.startswith("OpenSSL "):
        what = "openssl is %s, which ctrl-exec is not tested with; it does what ctrl-exec needs" % version
        return Finding("WARN", what, "if something about certificates fails, install OpenSSL 1.1.1 or newer")
    return Finding("OK", "openssl makes, signs and verifies certificates (%s)" % version)


def check_cas(openssl: OpenSSL, ca_cert: str, hint: str) -> list:
    """Every CA that is believed: whether it is one, its dates, and what is weak about it."""
    findings: list = []
    for path in (ca_cert, next_path(ca_cert)):
        if path == ca_cert or os.path.exists(path):
            found = try_check(findings, "CA certificate %s" % path, lambda: read_cas(path), "put it back")
            for pem in found or ():
                findings += _check_ca(openssl, path, pem, hint)
    return findings


def new_server_context(identity: Identity, verify_clients: bool, group: str = "") -> ssl.SSLContext:
    """The context of a listening port. Raises TrustError for files that cannot be used."""
    context = _new_context(ssl.PROTOCOL_TLS_SERVER)
    context.num_tickets = 0  # without this, a small exchange waits 40 ms for a delayed acknowledgement
    _load_identity(context, identity, group)
    if verify_clients:
        _load_ca(context, identity.ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def new_client_context(identity: Identity) -> ssl.SSLContext:
    """The context of a dispatcher calling agents: shows its certificate, demands one of the CA.

    The name is compared by `is_named`, exactly: check_hostname would take wildcards and IP addresses. The
    key may be readable for the group that the HTTP API runs as.
    """
    context = _new_context(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    _load_ca(context, identity.ca)
    _load_identity(context, identity, DISPATCHER_USER)
    return context


def new_pairing_context() -> ssl.SSLContext:
    """The context of an agent that believes nobody yet: encrypted, not authenticated."""
    context = _new_context(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def new_probe_context(ca_path: str) -> ssl.SSLContext:
    """The context of a caller without a certificate that checks the server's against the CA."""
    context = _new_context(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    _load_ca(context, ca_path)
    return context


class PeerCert(NamedTuple):
    """The facts of the certificate the peer has proved to hold; times are seconds since the epoch."""

    serial: str
    common_name: str
    names: tuple
    not_before: float = 0.0
    not_after: float = 0.0


def read_peer_cert(tls: ssl.SSLSocket) -> Optional[PeerCert]:
    """The verified peer certificate of a connection after its handshake, from the socket itself."""
    facts = tls.getpeercert()
    if not facts:
        return None
    subject = {key: value for part in facts.get("subject", ()) for key, value in part}
    names = tuple(value for kind, value in facts.get("subjectAltName", ()) if kind == "DNS")
    dates = (parse_openssl_time(facts[key]) for key in ("notBefore", "notAfter"))
    return PeerCert(parse_serial(facts["serialNumber"]), subject.get("commonName", ""), names, *dates)


def is_named(peer: PeerCert, name: str) -> bool:
    """Whether the certificate was issued for `name`: its DNS name, or its CN where it has none."""
    return name.lower() in [known.lower() for known in (peer.names or (peer.common_name,))]


_ALERTS = {  # what the peer said when it refused, by OpenSSL's reason
    "TLSV1_ALERT_UNKNOWN_CA": "it does not know the CA of our certificate",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "it says that our certificate is expired (or its clock is ahead)",
    "SSLV3_ALERT_CERTIFICATE_REVOKED": "it says that our certificate is revoked",
    "SSLV3_ALERT_BAD_CERTIFICATE": "it says that our certificate is not valid (or its clock is behind)",
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": "it says that our certificate is not for this purpose",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "it does not accept our certificate",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "it demands a certificate",
    "SSLV3_ALERT_HANDSHAKE_FAILURE": "it found no common TLS version, cipher or certificate",
    "TLSV1_ALERT_PROTOCOL_VERSION": "it speaks no TLS version of ours",
    "WRONG_VERSION_NUMBER": "it does not speak TLS",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "it showed no certificate",
    "HTTP_REQUEST": "it spoke plain HTTP",
}


_DATE_ERRORS = (9, 10)  # X509_V_ERR_CERT_NOT_YET_VALID and _HAS_EXPIRED of x509_vfy.h


_CERTIFICATE_ALERTS = re.compile(
    "TLSV1_ALERT_(UNKNOWN_CA|ACCESS_DENIED)|TLSV13_ALERT_CERTIFICATE_REQUIRED"
    "|SSLV3_ALERT_(CERTIFICATE_(EXPIRED|REVOKED|UNKNOWN)|BAD_CERTIFICATE|UNSUPPORTED_CERTIFICATE)"
)


def is_refusal(error: ssl.SSLError) -> bool:
    """Whether the peer said that it does not accept our certificate, in an alert (RFC 8446 section 6.2)."""
    return bool(_CERTIFICATE_ALERTS.fullmatch(error.reason or ""))


def is_hang_up(error: ssl.SSLError) -> bool:
    """Whether the peer closed the connection, without a word, before TLS was done."""
    return isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError)) or "EOF" in (error.reason or "")


def is_date_error(error: ssl.SSLError) -> bool:
    """Whether a certificate is good but for its dates; its signature is verified before them."""
    return isinstance(error, ssl.SSLCertVerificationError) and error.verify_code in _DATE_ERRORS


def describe_tls_error(error: ssl.SSLError) -> str:
    """A TLS failure in words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        clock = " (or a clock is wrong)" if is_date_error(error) else ""
        return "its certificate is refused: %s%s" % (error.verify_message, clock)
    if is_hang_up(error):
        return "it closed the connection during TLS"
    reason = error.reason or ""
    return _ALERTS.get(reason) or render_reason(reason) or "TLS failed"


# --- the arithmetic of pairing (the exchange is in PAIRING) ---------------------------------------------


class PairingOffer(NamedTuple):
    """What an agent asks for, as both sides know it and both hash it."""

    hostname: str
    csr: str  # PEM
    nonce: str  # public, hex: the agent recognises its answer by it
    port: int
    ip: str
    lookup_by: str
    version: str


class PairingSecrets(NamedTuple):
    """What both sides know once the agent has revealed its nonce: all that the code depends on."""

    offer: PairingOffer
    agent_nonce: str  # hex; secret until the dispatcher has sent its own
    dispatcher_nonce: str  # hex
    ca: str  # PEM
    dispatcher_id: str
    dispatcher_serial: str


def _digest(*parts: object) -> bytes:
    """SHA-256 over length-prefixed parts, so that no two lists of parts hash alike."""
    import hashlib

    total = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode("utf-8")
        total.update(len(data).to_bytes(8, "big") + data)
    return total.digest()


def pairing_commitment(agent_nonce: str, offer: PairingOffer) -> str:
    """What the agent says first: it fixes its secret nonce and its request without showing the nonce."""
    return _digest("ctrl-exec pairing commitment 1", bytes.fromhex(agent_nonce), *offer).hex()


def pairing_transcript(secrets: PairingSecrets) -> bytes:
    """One hash over everything both sides said; equal on both only if nobody in between changed a thing."""
    offer = secrets.offer
    return _digest(
        "ctrl-exec pairing transcript 1",
        offer.hostname,
        decode_pem(offer.csr, "CERTIFICATE REQUEST"),
        decode_pem(secrets.ca, "CERTIFICATE"),
        secrets.dispatcher_id,
        secrets.dispatcher_serial,
        bytes.fromhex(secrets.agent_nonce),
        bytes.fromhex(secrets.dispatcher_nonce),
    )


def pairing_code(secrets: PairingSecrets) -> str:
    """The six digits for a person to compare. Neither side can steer them: each has fixed its part
    before it learns the other's (numeric comparison, as in the Bluetooth Core Specification)."""
    number = int.from_bytes(pairing_transcript(secrets), "big") % 10**PAIRING_CODE_DIGITS
    return "%0*d" % (PAIRING_CODE_DIGITS, number)


def legacy_pairing_code(csr: str) -> str:
    """The code of releases without a commitment. It proves little: see --allow-legacy."""
    import hashlib

    return "%06d" % (int.from_bytes(hashlib.sha256(csr.encode("ascii")).digest()[:4], "big") % 10**6)


def exchange_nonce(public: str) -> str:
    """An agent's secret nonce: it stands for the key that the agent reveals with it, so that the code and the
    proofs of a token are about that key as well."""
    return _digest("ctrl-exec pairing exchange 1", public).hex()


def pairing_answer(secrets: PairingSecrets, public: str) -> bytes:
    """What the CA says with a certificate: the exchange that it answers, and the dispatcher's key in it."""
    return _digest("ctrl-exec pairing answer 1", pairing_transcript(secrets), public)


def token_proof(secret: str, side: str, secrets: PairingSecrets, certificate: str = "") -> str:
    """HMAC-SHA-256 with a pairing token's secret over the transcript: `side` knows the secret."""
    import hashlib
    import hmac

    message = _digest("ctrl-exec pairing token 1", side, pairing_transcript(secrets), certificate)
    return hmac.new(secret.encode("ascii"), message, hashlib.sha256).hexdigest()


def is_same_secret(one: str, other: str) -> bool:
    """Compare in a time that does not depend on where they differ."""
    import hmac

    return hmac.compare_digest(one.encode("utf-8", "replace"), other.encode("utf-8", "replace"))


# --- requests that are proved past the agent's front -----------------------------------------------------
# The front of an agent talks to strangers. Should somebody take it over, he can show the supervisor any
# serial that is trusted; what he cannot make is the proof that each request of a dispatcher carries.


class RequestSecret(NamedTuple):
    """What an agent has agreed on with a dispatcher."""

    secret: str  # hex
    is_used: bool  # the dispatcher has it as well: nothing without proof is taken from it any more
    seen: tuple = ()  # the latest proofs of requests that must not be done twice


MAX_SEEN = 256  # proofs that are remembered; a dispatcher changes an agent's trust a few times a day


def request_secret(shared: bytes, *context: object) -> str:
    """The secret that two sides make of what they have agreed on, and of what they know of each other."""
    return _digest("ctrl-exec request secret 1", shared, *context).hex()


def request_proof(secret: str, method: str, path: str, moment: str, body: bytes) -> str:
    """HMAC-SHA-256 over a request (RFC 2104). Its id is in its body or its path."""
    import hmac

    message = _digest("ctrl-exec request 1", method, path, moment, body)
    return hmac.new(bytes.fromhex(secret), message, "sha256").hexdigest()


def load_request_secrets(path: str) -> dict:
    """What an agent has agreed on, by dispatcher id. Raises StorageError."""
    try:
        values = read_json_file(path)
        known = {
            name: RequestSecret(
                str(entry["secret"]), entry["is_used"] is True, tuple(map(str, entry["seen"]))
            )
            for name, entry in values.items()
        }
        if not all(re.fullmatch("[0-9a-f]{64}", entry.secret) for entry in known.values()):
            raise ValueError("a secret")
        return known
    except FileNotFoundError:
        return {}
    except (KeyError, TypeError, ValueError) as error:
        raise StorageError(
            "%s: not a list of secrets" % path, "remove it, and pair this host again"
        ) from error


def edit_request_secrets(path: str, edit: Callable) -> None:
    """Change what an agent has agreed on; `edit(known)` changes the table. Raises StorageError."""
    make_directory(os.path.dirname(path), 0o755)
    with FileLock(path + ".lock"):
        known = load_request_secrets(path)
        edit(known)
        values = {name: entry._asdict() for name, entry in known.items()}
        write_atomic(path, encode_state(values), mode=0o600, durable=True)


# ======================================================================================================
# 7. WIRE
# Owns:  JSON over HTTP/1.1, both ways: what a request and an answer are, and every bound on their size.
#        Formats: RFC 9112 (HTTP/1.1), RFC 8259 (JSON). Parsing is stricter than the RFCs allow to be.
# Uses:  HEAD, ERRORS, GROUND
# Why here: listening and calling share it, and no other section looks at a header.
# ======================================================================================================


class Channel:
    """Bytes to and from one peer, every wait under a deadline.

    Raises socket.timeout when one passes and ConnectionError when the peer has gone.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self._buffer = bytearray()

    def has_more(self) -> bool:
        """Whether bytes that were read already wait to be parsed (a pipelined request)."""
        return bool(self._buffer)

    def _receive(self, deadline: Deadline) -> None:
        left = deadline.left()
        if left <= 0:
            raise socket.timeout("timed out")
        self.socket.settimeout(left)
        data = self.socket.recv(65536)
        if not data:
            raise ConnectionError("the peer closed the connection")
        self._buffer += data

    def _take(self, size: int) -> bytes:
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        return data

    def read_until(self, mark: bytes, limit: int, deadline: Deadline) -> bytes:
        """Everything up to `mark`, without it. Raises HeadTooLarge when `limit` bytes hold none."""
        start = 0
        while True:
            at = self._buffer.find(mark, start)
            if 0 <= at <= limit:
                return self._take(at + len(mark))[:at]
            if len(self._buffer) > limit:
                raise HeadTooLarge("more than %d bytes before the end of the headers" % limit)
            start = max(0, len(self._buffer) - len(mark) + 1)
            self._receive(deadline)

    def read_exactly(self, size: int, deadline: Deadline) -> bytes:
        while len(self._buffer) < size:
            self._receive(deadline)
        return self._take(size)

    def read_some(self, size: int, deadline: Deadline) -> bytes:
        """At most `size` bytes, as soon as there are any; empty at the end of the stream."""
        if not self._buffer:
            try:
                self._receive(deadline)
            except ConnectionError:
                return b""
        return self._take(size)

    def write(self, data: bytes, seconds: float) -> None:
        """Send it all; the peer may take `seconds` for each piece."""
        self.socket.settimeout(seconds)
        view = memoryview(data)
        for at in range(0, len(data), 65536):
            self.socket.sendall(view[at : at + 65536])


# --- JSON -----------------------------------------------------------------------------------------------


def _find_structure_fault(data: bytes) -> str:
    brackets = data.count(b"[") + data.count(b"{")
    if brackets <= MAX_JSON_DEPTH and data.count(b",") <= MAX_JSON_VALUES:
        return ""
    too_many = "the JSON has more than %d values" % MAX_JSON_VALUES
    pieces = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    if pieces.count(b'"') > 4 * MAX_JSON_VALUES:  # a name and a value have four
        return too_many
    structure = b"".join(pieces.split(b'"')[0::2])
    if sum(map(structure.count, (b",", b"[", b"{"))) > MAX_JSON_VALUES:
        return too_many
    depth = 0
    for byte in re.findall(rb"[][{}]", structure):
        depth += 1 if byte in (b"[", b"{") else -1
        if depth > MAX_JSON_DEPTH:
            return "the JSON is nested deeper than %d levels" % MAX_JSON_DEPTH
    return ""


def check_json_structure(data: bytes) -> None:
    """Raise BadRequest when brackets nest too deep, or there are more values than any message of ours has:
    before the parser, whose limit is its C stack, and which makes an object of every value.

    In steps that are linear in time and copy the data a few times at most: escapes go, so that every quote
    that is left begins or ends a string; every second piece between quotes is then outside of strings. None
    of the copies is in a frame that raises, or its traceback would hold them.
    """
    fault = _find_structure_fault(data)
    if fault:
        raise BadRequest(fault)


def _unique_fields(pairs: list) -> dict:
    fields: dict = {}
    for name, value in pairs:
        if name in fields:
            raise BadRequest("field `%s` is there twice" % one_line(name[:80]), field=name[:80])
        fields[name] = value
    return fields


def parse_json(data: bytes) -> dict:
    """A JSON object from the network: bounded in depth and values, no duplicate names, no NaN.
    Raises BadRequest."""
    check_json_structure(data)
    try:
        text = data.decode("utf-8")
        value = json.loads(
            text,
            object_pairs_hook=_unique_fields,
            **STRICT_NUMBERS,
        )
    except (ValueError, RecursionError):
        raise BadRequest("the body is not JSON") from None
    if not isinstance(value, dict):
        raise BadRequest("the body is not a JSON object")
    return value


class Field(NamedTuple):
    """One field of a request body. `kind` is str, int, bool, dict, or list (of strings)."""

    name: str
    kind: type
    required: bool = False
    most: int = MAX_BODY  # characters of a string, entries of a list, or the largest number
    least: int = 0  # the smallest number, or the fewest entries


_KIND_NAMES = {
    str: "a string",
    int: "a whole number",
    bool: "true or false",
    dict: "an object",
    list: "a list of strings",
}


def _check_text(value: str, field: Field) -> None:
    if len(value) > field.most:
        raise BadRequest("field `%s` is longer than %d characters" % (field.name, field.most), field.name)
    if "\0" in value:
        raise BadRequest("field `%s` has a NUL character" % field.name, field.name)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRequest("field `%s` has half of a surrogate pair" % field.name, field.name) from None


def parse_fields(data: bytes, fields: tuple, loose: bool = False) -> dict:
    """The fields of a JSON body, checked against their rows; absent ones get their kind's empty value.

    Unknown fields are ignored, so that a newer peer can say more. `loose` takes 60.0 for 60, as JSON Schema
    does. Raises BadRequest naming the field.
    """
    body = parse_json(data) if data else {}
    values = {}
    for field in fields:
        value = body.get(field.name)
        if value is None:
            if field.required:
                raise BadRequest("field `%s` is missing" % field.name, field.name)
            value = field.kind()
        if loose and field.kind is int and type(value) is float and value.is_integer():
            value = int(value)
        if type(value) is not field.kind:  # not isinstance: True is an int, and must not pass for one
            raise BadRequest("field `%s` must be %s" % (field.name, _KIND_NAMES[field.kind]), field.name)
        if field.kind is str:
            _check_text(value, field)
        elif field.kind is int and not field.least <= value <= field.most:
            limits = (field.name, field.least, field.most)
            raise BadRequest("field `%s` must be from %d to %d" % limits, field.name)
        elif field.kind is list:
            if not all(type(entry) is str for entry in value):
                raise BadRequest("field `%s` must be %s" % (field.name, _KIND_NAMES[list]), field.name)
            if not field.least <= len(value) <= field.most:
                limits = (field.name, field.least, field.most)
                raise BadRequest("field `%s` must have from %d to %d entries" % limits, field.name)
            for number, entry in enumerate(value):
                _check_text(entry, field._replace(name="%s[%d]" % (field.name, number), most=MAX_BODY))
        values[field.name] = value
    return values


def encode_json(value: dict) -> bytes:
    """Compact JSON, as existing shell scripts match it: no spaces."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "replace")


# --- requests -------------------------------------------------------------------------------------------

PROOF_HEADERS = ("Ctrl-Exec-Time", "Ctrl-Exec-Proof")


class Request(NamedTuple):
    """One HTTP request, whole."""

    method: str
    path: str  # as sent, without the query; never percent-decoded: no route of ours needs it
    query: dict
    version: str  # "1.0" or "1.1"
    headers: dict  # lower-case names
    body: bytes

    def wants_close(self) -> bool:
        return self.version == "1.0" or "close" in self.headers.get("connection", "").lower()


_REQUEST_LINE = re.compile(rb"([A-Z]{1,16}) (/[\x21-\x7e]{0,2000}) HTTP/1\.([01])")
_HEADER = re.compile(rb"([A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}):([\x20-\x7e\x80-\xff\t]*)")


def _parse_headers(lines: list) -> dict:
    if len(lines) > MAX_HEADERS:
        raise HeadTooLarge("%d headers; at most %d are read" % (len(lines), MAX_HEADERS))
    headers: dict = {}
    for line in lines:
        hit = _HEADER.fullmatch(line)
        if not hit:
            raise BadRequest("a malformed header line")
        name = hit[1].decode("ascii").lower()
        if name in headers and name in ("content-length", "transfer-encoding", "host", "authorization"):
            raise BadRequest("header `%s` is there twice" % name)
        headers[name] = hit[2].strip(b" \t").decode("latin-1")
    return headers


def _body_length(method: str, headers: dict, limit: int) -> int:
    """How long the body is, from one strict Content-Length. Raises BadRequest, LengthRequired, TooLarge."""
    if "transfer-encoding" in headers:
        raise LengthRequired("a transfer coding is not taken; send a Content-Length")
    text = headers.get("content-length")
    if text is None:
        if method == "POST":
            raise LengthRequired("a POST needs a Content-Length")
        return 0
    if not re.fullmatch(r"[0-9]{1,19}", text):
        raise BadRequest("the Content-Length is not a number")
    if int(text) > limit:
        raise TooLarge("the body has %s bytes; at most %d are taken" % (text, limit))
    return int(text)


def read_request(channel: Channel, first_byte: Deadline, limit: int = MAX_BODY) -> Request:
    """Read one request, its head under HEAD_SECONDS and its body under BODY_SECONDS.

    Raises a CtrlExecError with the HTTP status to answer, socket.timeout, or ConnectionError.
    """
    if not channel.has_more():
        channel._receive(first_byte)
    head = channel.read_until(b"\r\n\r\n", MAX_HEAD, Deadline(HEAD_SECONDS))
    first, *lines = head.split(b"\r\n")
    hit = _REQUEST_LINE.fullmatch(first)
    if not hit:
        raise BadRequest("not an HTTP/1.1 request line")
    headers = _parse_headers(lines)
    method = hit[1].decode("ascii")
    length = _body_length(method, headers, limit)
    if headers.get("expect", "").lower() == "100-continue" and length:
        channel.write(b"HTTP/1.1 100 Continue\r\n\r\n", WRITE_SECONDS)  # curl waits a second for it
    body = channel.read_exactly(length, Deadline(BODY_SECONDS))
    path, _, query = hit[2].decode("ascii").partition("?")
    pairs = [part.partition("=")[::2] for part in query.split("&") if part]
    if len(dict(pairs)) < len(pairs):
        raise BadRequest("a name is there twice in the query")
    return Request(method, path, dict(pairs), "1.%s" % hit[3].decode("ascii"), headers, body)


def encode_request(
    method: str, path: str, host: str, body: Optional[dict], keep: bool, prove: Optional[Callable] = None
) -> bytes:
    """A request in one piece, so that it leaves in one write. `prove(method, path, body)` gives a time and a
    proof to send along."""
    if not re.fullmatch(r"[\x21-\x7e]+", path):
        raise BadRequest("not a path")
    data = b"" if body is None else encode_json(body)
    lines = ["%s %s HTTP/1.1" % (method, path), "Host: " + host, "User-Agent: ctrl-exec/" + __version__]
    if body is not None:
        lines += ["Content-Type: application/json", "Content-Length: %d" % len(data)]
    if prove is not None:
        lines += ["%s: %s" % pair for pair in zip(PROOF_HEADERS, prove(method, path, data))]
    lines += ["Connection: " + ("keep-alive" if keep else "close"), "", ""]
    return "\r\n".join(lines).encode("ascii") + data


# --- answers --------------------------------------------------------------------------------------------

_REASONS = {
    200: "OK", 202: "Accepted", 400: "Bad Request", 403: "Forbidden", 404: "Not Found",
    405: "Method Not Allowed", 408: "Request Timeout", 409: "Conflict", 411: "Length Required",
    413: "Content Too Large", 415: "Unsupported Media Type", 431: "Request Header Fields Too Large",
    500: "Internal Server Error", 502: "Bad Gateway", 503: "Service Unavailable",
}  # fmt: skip


EVENT_LINES = "application/x-ndjson"


class Response(NamedTuple):
    """One HTTP answer. The body is an object, or chunks of text that were never whole in memory."""

    status: int
    body: Any  # dict, or an iterable of bytes
    close: bool = False
    is_live: bool = False  # each chunk is sent as it comes, and is one or more lines of JSON
    kind: str = ""  # of the body, when it is something else
    headers: tuple = ()  # (name, value) pairs besides those that every answer has
    is_resumable: bool = False  # a stream whose client comes again by itself, and goes on where it was


def write_response(
    channel: Channel, version: str, response: Response, keep: bool, bare: bool = False
) -> None:
    """Send an answer. Short ones leave in one write; long ones are chunked, or end with the connection."""
    chunks = iter([encode_json(response.body)] if isinstance(response.body, dict) else response.body)
    first = b"" if response.is_live else next(chunks, b"")
    second = b"" if response.is_live else next(chunks, None)
    kind = response.kind or (EVENT_LINES if response.is_live else "application/json")
    lines = [
        "HTTP/%s %d %s" % (version, response.status, _REASONS.get(response.status, "")),
        "Content-Type: " + kind,
        *("%s: %s" % pair for pair in response.headers),
    ]
    chunked = second is not None and version == "1.1"
    if second is None:
        lines.append("Content-Length: %d" % len(first))
    elif chunked:
        lines.append("Transfer-Encoding: chunked")
    lines.append("Connection: " + ("keep-alive" if keep and (second is None or chunked) else "close"))
    head = ("\r\n".join(lines) + "\r\n\r\n").encode("ascii")
    if bare:  # an answer to HEAD has no body (RFC 9110 section 9.3.2)
        channel.write(head, WRITE_SECONDS)
        return
    frame = (lambda data: b"%x\r\n%s\r\n" % (len(data), data)) if chunked else (lambda data: data)
    channel.write(head + (frame(first) if first or not chunked else b""), WRITE_SECONDS)
    while second is not None:
        if second:
            channel.write(frame(second), WRITE_SECONDS)
        second = next(chunks, None)
    if chunked:
        channel.write(b"0\r\n\r\n", WRITE_SECONDS)


class Answer(NamedTuple):
    """The head of an answer, as a client reads it; the body follows by `read_body`."""

    status: int
    version: str
    headers: dict


def read_answer(channel: Channel, deadline: Deadline) -> Answer:
    """Read the head of an answer. Raises BadRequest when it is none, socket.timeout, ConnectionError."""
    first, *lines = channel.read_until(b"\r\n\r\n", MAX_HEAD, deadline).split(b"\r\n")
    hit = re.fullmatch(rb"HTTP/1\.([01]) ([1-5][0-9][0-9])(?: [\x20-\x7e]*)?", first)
    if not hit:
        raise BadRequest("the answer is not HTTP")
    return Answer(int(hit[2]), "1.%s" % hit[1].decode("ascii"), _parse_headers(lines))


def _read_chunks(channel: Channel, deadline: Deadline, limit: int) -> Iterator[bytes]:
    total = 0
    while True:
        size_line = channel.read_until(b"\r\n", 64, deadline)
        if not re.fullmatch(rb"[0-9A-Fa-f]{1,8}", size_line):
            raise BadRequest("the answer's chunks are malformed")
        size = int(size_line, 16)
        total += size
        if total > limit:
            raise TooLarge("the answer has more than %d bytes" % limit)
        left = size
        while left:
            data = channel.read_some(min(left, 65536), deadline)
            if not data:
                raise ConnectionError("the answer was cut short")
            left -= len(data)
            yield data
        if channel.read_exactly(2, deadline) != b"\r\n":
            raise BadRequest("the answer's chunks are malformed")
        if size == 0:
            return


def read_body(
    channel: Channel, answer: Answer, deadline: Deadline, limit: int = MAX_ANSWER
) -> Iterator[bytes]:
    """The body of an answer in pieces: by length, chunked, or to the end of the connection.

    Raises TooLarge over `limit`, and as `read_answer`.
    """
    if answer.headers.get("transfer-encoding", "").lower() == "chunked":
        yield from _read_chunks(channel, deadline, limit)
        return
    length = answer.headers.get("content-length")
    if length is not None and not re.fullmatch(r"[0-9]{1,19}", length):
        raise BadRequest("the answer's Content-Length is not a number")
    left = limit + 1 if length is None else int(length)
    if length is not None and left > limit:
        raise TooLarge("the answer has more than %d bytes" % limit)
    while left:
        data = channel.read_some(min(left, 65536), deadline)
        if not data:
            if length is None:
                return
            raise ConnectionError("the answer was cut short")
        left -= len(data)
        yield data
    if length is None:
        raise TooLarge("the answer has more than %d bytes" % limit)


# ======================================================================================================
# 8. SERVER
# Owns:  listening: accept, TLS handshake off the accept path, deadlines, the bound on connections and who
#        has to go when it is reached, drain, routes. What a request means is the business of `handle`.
# Uses:  HEAD, ERRORS, GROUND, TRUST, WIRE
# Why here: agent, pairing and API listen with the same code, and so with the same defences.
# ======================================================================================================


class Peer(NamedTuple):
    """Who is at the other end of a connection."""

    address: str
    port: int
    cert: Optional[PeerCert]  # verified; None where no certificate is asked for
    sock: Optional[socket.socket] = None  # only for asking whether the peer is still there


class Route(NamedTuple):
    """One operation of a server. What is not in the table is not served."""

    method: str
    path: str  # as it is; a final `*` takes one more segment, which `handle` gets as `argument`
    handle: Callable  # its arguments are between the server's owner and the table's


def find_route(routes: tuple, request: Request) -> tuple:
    """The route of a request and its path's argument. Raises NotFound or MethodNotAllowed."""
    others = []
    for route in routes:
        argument = ""
        if route.path.endswith("*"):
            prefix = route.path[:-1]
            argument = request.path[len(prefix) :]
            if not request.path.startswith(prefix) or not REQUEST_ID.fullmatch(argument):
                continue
        elif request.path != route.path:
            continue
        if request.method == route.method:
            return route, argument
        others.append(route.method)
    if others:
        raise MethodNotAllowed("%s is not answered here" % request.method, tuple(others))
    raise NotFound("no such path")


# What a listening socket can lack now and have later: an address that is not up yet, IPv6, a port that
# somebody else has at this moment. All else (no right to the port, for one) needs a person.
_MAY_COME_RIGHT = (
    errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.ENETDOWN, errno.ENODEV,
    errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM,
)  # fmt: skip


def _open_listener(address: str, port: int) -> socket.socket:
    """A listening socket. Raises OSError."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        # with its zone, `fe80::1%eth0`, an address needs the system's resolver
        place = socket.getaddrinfo(address, port, family, socket.SOCK_STREAM, 0, socket.AI_NUMERICHOST)
        listener.bind(place[0][4])
        listener.listen(128)
    except socket.gaierror as error:  # a zone that is not up yet has no number
        listener.close()
        raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL)) from error
    except OSError:
        listener.close()
        raise
    listener.setblocking(False)
    return listener


def check_addresses(addresses: tuple) -> list:
    """Whether a server can listen on them by now, whatever the port: Findings."""
    findings = []
    for address in addresses:
        try:
            _open_listener(address, 0).close()
        except OSError as error:
            what = "cannot listen on %s: %s" % (address, error.strerror)
            findings.append(Finding("FAIL", what, "bring the address up; the agent tries again by itself"))
    return findings


def take_passed_sockets() -> list:
    """The listening sockets that the service manager has opened for us (sd_listen_fds(3))."""
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not re.fullmatch("[0-9]{1,3}", count):
        return []
    passed = []
    for descriptor in range(3, 3 + int(count)):
        try:
            os.set_inheritable(descriptor, False)
            listener = socket.socket(fileno=descriptor)
            is_ours = listener.family in (socket.AF_INET, socket.AF_INET6)
            if is_ours and listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                listener.setblocking(False)
                passed.append(listener)
            else:
                listener.close()
        except OSError:  # no socket
            pass
    return passed


def _serves(listener: socket.socket, address: str, port: int) -> bool:
    """Whether an open socket listens on an address and port (0: any)."""
    try:
        own = listener.getsockname()
        if port not in (0, own[1]) or not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return False
        if ":" in address and own[3] and "%" not in own[0]:
            own = (own[0] + "%" + socket.if_indextoname(own[3]), *own[1:])
    except (OSError, IndexError):  # the interface of its zone has gone
        return False
    if listener.family == socket.AF_INET6 and own[0] == "::" and address == "0.0.0.0":
        return not listener.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
    return address == own[0]


class Listening(NamedTuple):
    """The sockets of a server, and what keeps it from listening on the addresses that are missing."""

    sockets: tuple
    faults: tuple  # one sentence for each address

    def status(self) -> str:
        """What the service manager shows of the server."""
        return "STATUS=" + one_line("; ".join(self.faults) or "serving")


def listen_where_possible(addresses: tuple, port: int, already: Iterable = ()) -> Listening:
    """Listen on every address (none: all of IPv4, and of IPv6 where there is one), with those of the sockets
    that are open `already` which fit. With port 0 the kernel picks one, the same for all.

    Raises ConfigError for what no waiting will change.
    """
    already, sockets, faults, asked = list(already), [], [], port
    for address in addresses or ("0.0.0.0", "::"):
        listener = next((one for one in already if _serves(one, address, port)), None)
        try:
            listener = listener or _open_listener(address, port)
        except OSError as error:
            if not addresses and address == "::" and (error.errno != errno.EADDRINUSE or not asked):
                continue  # a host without IPv6
            what = "cannot listen on %s port %d: %s" % (address, port, error.strerror)
            if error.errno not in _MAY_COME_RIGHT:
                for opened in sockets:
                    if opened not in already:
                        opened.close()
                raise ConfigError(what, "see what has it: ss -ltnp") from error
            faults.append(what)
            continue
        port = port or listener.getsockname()[1]
        if listener not in sockets:
            sockets.append(listener)
    return Listening(tuple(sockets), tuple(faults))


def close_unwanted(passed: Iterable, listening: Listening) -> None:
    """Close the sockets that the service manager has passed for what is not configured."""
    for listener in passed:
        if listener not in listening.sockets:
            what = "a socket was passed for %s port %d, which is not configured" % listener.getsockname()[:2]
            LOG.event("config-warn", MESSAGE=what + "; install.sh writes the socket unit anew")
            listener.close()


def note_listening(before: tuple, listening: Listening) -> None:
    """Log what has changed about the addresses that are missing."""
    for fault in listening.faults:
        if fault not in before:
            LOG.event("listen", RESULT="failed", ERROR=fault + "; it is tried again")
    if before and not listening.faults:
        LOG.event("listen", RESULT="ok")


def listen_again(addresses: tuple, port: int, before: Listening) -> Listening:
    """Try the addresses that are missing, for a service that goes on with the others whatever is in the way
    now; what is new about them is logged."""
    try:
        listening = listen_where_possible(addresses, port, before.sockets)
    except ConfigError as error:
        LOG.event("listen", RESULT="failed", ERROR=error.message + "; it is tried again")
        return before
    note_listening(before.faults, listening)
    return listening


def open_listeners(addresses: tuple, port: int) -> list:
    """Listening sockets on every address. Raises ConfigError when one of them cannot be had."""
    listening = listen_where_possible(addresses, port)
    if listening.faults:
        for opened in listening.sockets:
            opened.close()
        raise ConfigError(listening.faults[0], "see what has it: ss -ltnp")
    return list(listening.sockets)


class _Connection:
    """One accepted connection. `waiting`: we wait for the peer's bytes, so it may be sent away."""

    def __init__(self, raw: socket.socket, address: str, port: int) -> None:
        self.raw = raw
        self.address = address
        self.port = port
        self.waiting = True
        self.is_repeatable = False  # what it is being sent can be had again
        self.is_stream = False  # ... and the client comes again for it by itself
        self.served = 0  # requests answered

    def send_away(self) -> None:
        self.waiting = self.is_repeatable = self.is_stream = False
        try:
            # Wakes the thread that reads, and it closes the socket. Not SSLSocket's own shutdown, which would
            # take the TLS state from under a handshake that is just beginning.
            socket.socket.shutdown(self.raw, socket.SHUT_RDWR)
        except OSError:
            pass


class ServerPolicy(NamedTuple):
    """What a server asks its owner about connections."""

    admit: Callable  # (address): may it connect?
    # (address, failure, reason, sock): nothing came of it. `failure`: silent; or of a handshake tls, or clock
    # when one of the two clocks may be wrong
    note: Callable
    refuse: Optional[Callable] = None  # (address, CtrlExecError) to Response, if it wants its own words


def render_refusal(error: CtrlExecError) -> dict:
    """The body of a refusal."""
    body = {"ok": False, "error": error.message, "status": error.code}
    if isinstance(error, BadRequest) and error.field:
        body["field"] = error.field
    return body


def _linger(sock: Any) -> None:
    """Close our half and read on for a moment: closing with unread bytes would send a reset, and a reset
    can overtake the answer (RFC 9112 section 9.6)."""
    deadline = Deadline(LINGER_SECONDS)
    try:
        if isinstance(sock, ssl.SSLSocket):
            sock.settimeout(0)
            try:
                sock.unwrap()  # sends close_notify; the peer's is not waited for
            except (OSError, ValueError):
                pass
        sock.shutdown(socket.SHUT_WR)  # from here on a TLS socket reads plain bytes, which nobody looks at
        while not deadline.is_over():
            sock.settimeout(max(0.01, deadline.left()))
            if not sock.recv(65536):
                break
    except (OSError, ValueError):
        pass


class Server:
    """Serves requests on listening sockets, one thread a connection, until it is told to drain.

    A thread waits for one client only, so a silent or slow one costs a slot and a deadline. When all slots
    are taken, the connection that has kept us waiting longest is closed for the next: a flood of silent
    clients pushes itself out, and a client that speaks TLS at normal speed is served.
    """

    def __init__(
        self,
        listeners: list,
        context: Optional[ssl.SSLContext],  # None: plain HTTP
        handle: Callable,  # (Peer, Request) to Response; CtrlExecErrors it raises are answered
        policy: ServerPolicy,
        max_connections: int,
        max_body: int = MAX_BODY,
    ) -> None:
        self._listeners = listeners
        self._context = context
        self._handle = handle
        self._policy = policy
        self._max_connections = max_connections
        self._max_body = max_body
        self._connections: dict = {}  # of _Connection, in order of arrival
        self._guard = threading.Lock()
        self._draining = False
        self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)  # see _accept_one
        self._turning_away = threading.BoundedSemaphore(16)  # connections that are told so; others are closed

    def use_context(self, context: ssl.SSLContext) -> None:
        """Show another certificate, from the next connection on."""
        self._context = context

    def listen_on(self, listeners: Iterable) -> None:
        """Accept on more sockets, from the next time that `serve` wakes up: write to its `stop`."""
        self._listeners = [*self._listeners, *listeners]

    # --- accepting ---------------------------------------------------------------------------------------

    def serve(self, stop: int, is_over: Callable = lambda: True) -> None:
        """Accept until descriptor `stop` becomes readable and `is_over()` says so, or a listening socket has
        come to its end. From then on each connection is answered once at most."""
        threading.stack_size(512 * 1024)  # 256 threads with the default of 8 MiB frighten some limits
        poller = select.poll()
        by_descriptor: dict = {}
        poller.register(stop, select.POLLIN)
        serving = True
        while serving:
            for listener in self._listeners[len(by_descriptor) :]:
                by_descriptor[listener.fileno()] = listener
                poller.register(listener.fileno(), select.POLLIN)
            for descriptor, event in poller.poll():
                if descriptor == stop:
                    serving = serving and not is_over()
                elif event & (select.POLLHUP | select.POLLERR):
                    serving = False
                else:
                    self._accept_one(by_descriptor[descriptor])
        self._draining = True
        for listener in self._listeners:
            listener.close()

    def drain(self, seconds: float, grace: float = 0) -> bool:
        """Close what waits, let what is being answered end; whether everything ended in time.

        A connection that was accepted and has not been served yet gets `grace` seconds for its first request.
        """
        deadline, newcomers = Deadline(seconds), Deadline(grace)
        while True:
            with self._guard:
                open_ones = list(self._connections)
            for connection in open_ones:
                if connection.waiting and (connection.served or newcomers.is_over()):
                    connection.send_away()
            if not open_ones or deadline.is_over():
                return not open_ones
            time.sleep(0.02)

    def _accept_one(self, listener: socket.socket) -> None:
        try:
            raw, name = listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._refuse_without_descriptor(listener)
            return  # gone again, or taken by the process that shares this socket during a reload
        # A socket for both families shows an IPv4 peer as ::ffff:10.0.0.5, which no allowlist means.
        address = name[0][7:] if name[0].startswith("::ffff:") and "." in name[0] else name[0]
        connection = _Connection(raw, address, name[1])
        if not self._policy.admit(address):
            raw.close()
            return
        with self._guard:
            full = len(self._connections) >= self._max_connections and not self._make_room()
            if not full:
                self._connections[connection] = None
        work = self._serve_connection
        if full:
            work = self._turn_away
            if self._policy.refuse is None or not self._turning_away.acquire(blocking=False):
                self._forget(connection)
                raw.close()
                return
        try:
            threading.Thread(target=work, args=(connection,), daemon=True).start()
        except RuntimeError:  # can't start new thread
            self._forget(connection)
            raw.close()
            if full:
                self._turning_away.release()

    def _refuse_without_descriptor(self, listener: socket.socket) -> None:
        """Out of descriptors, accept() would fail at once and for ever, at full speed: give the kernel's
        queue one connection's worth of air with a descriptor kept for this, and pause."""
        try:
            if self._spare >= 0:
                os.close(self._spare)
                self._spare = -1
                listener.accept()[0].close()
            self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # another thread was faster; there will be a spare one the next time
            pass
        LOG.event("deny", REASON="out of file descriptors")
        time.sleep(0.1)

    def _make_room(self) -> bool:
        if len(self._connections) >= 2 * self._max_connections:
            return False  # those sent away have not all left yet
        # Streams first: whoever listens goes on with another connection where this one ended.
        for is_free in (lambda one: one.is_stream, lambda one: one.waiting or one.is_repeatable):
            connection = next(filter(is_free, self._connections), None)
            if connection is not None:
                connection.send_away()
                return True
        return False

    def _forget(self, connection: _Connection) -> None:
        with self._guard:
            self._connections.pop(connection, None)

    # --- one connection ----------------------------------------------------------------------------------

    def _serve_connection(self, connection: _Connection) -> None:
        try:
            connection.raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            cert = None
            if self._context is not None:
                if not self._shake_hands(connection):
                    return
                cert = read_peer_cert(connection.raw)
            peer = Peer(connection.address, connection.port, cert, connection.raw)
            channel = Channel(connection.raw)
            wait = HEAD_SECONDS
            while not (self._draining and connection.served):
                if not self._answer_one(connection, channel, peer, wait):
                    break
                wait = IDLE_SECONDS
        except (OSError, ValueError):  # gone, or sent away: a closed TLS socket raises ValueError
            if connection.served == 0:
                self._policy.note(connection.address, "silent", "", connection.raw)
        finally:
            self._forget(connection)
            connection.raw.close()

    def _turn_away(self, connection: _Connection) -> None:
        """Tell somebody for whom there is no room: in his own protocol, but with little patience."""
        try:
            if self._context is not None and not self._shake_hands(connection, LINGER_SECONDS):
                return
            channel = Channel(connection.raw)
            channel.read_until(b"\r\n\r\n", MAX_HEAD, Deadline(LINGER_SECONDS))
            error = Unavailable("%d connections are open; try again later" % self._max_connections)
            write_response(channel, "1.1", self._policy.refuse(connection.address, error), keep=False)
            _linger(connection.raw)
        except (OSError, ValueError, CtrlExecError):
            pass
        finally:
            self._forget(connection)
            connection.raw.close()
            self._turning_away.release()

    def _shake_hands(self, connection: _Connection, seconds: float = HANDSHAKE_SECONDS) -> bool:
        """Put TLS on a connection; False when it failed, which has been noted."""
        raw = connection.raw
        connection.raw = self._context.wrap_socket(raw, server_side=True, do_handshake_on_connect=False)
        try:
            connection.raw.settimeout(seconds)  # for the whole handshake, not for each of its reads
            connection.raw.do_handshake()
            return True
        except ssl.SSLError as error:
            failure = "silent" if is_hang_up(error) else "clock" if is_date_error(error) else "tls"
            self._policy.note(connection.address, failure, describe_tls_error(error), connection.raw)
            return False

    def _answer_one(self, connection: _Connection, channel: Channel, peer: Peer, wait: float) -> bool:
        """Read one request and answer it; whether the connection goes on."""
        version, keep, method = "1.1", False, ""
        connection.waiting, connection.is_repeatable, connection.is_stream = True, False, False
        try:
            request = read_request(channel, Deadline(wait), self._max_body)
            connection.waiting = False
            version, method = request.version, request.method
            keep = not request.wants_close() and not self._draining
            response = self._handle(peer, request)
        except CtrlExecError as error:
            LOG.event("deny", PEER=peer.address, STATUS=error.http_status, REASON=error.message)
            if self._policy.refuse is not None:
                response = self._policy.refuse(peer.address, error)
            else:
                response = Response(error.http_status, render_refusal(error))
        except (OSError, ConnectionError):
            raise
        except Exception as error:
            log_bug(error, PEER=peer.address)
            response = Response(500, {"ok": False, "error": "internal error; see the log here"})
        connection.waiting = False
        connection.is_repeatable = isinstance(response.body, (dict, list))
        connection.is_stream = response.is_resumable
        connection.served += 1
        keep = keep and not response.close and not self._draining
        try:
            write_response(channel, version, response, keep, method == "HEAD")
        finally:
            end = getattr(response.body, "close", None)  # of a generator: it may hold something
            if end is not None:
                end()
        if not keep:
            connection.waiting = True
            _linger(channel.socket)
        return keep


# ======================================================================================================
# 9. CLIENT
# Owns:  one connection to one host under deadlines, the peer's identity checked before a request byte
#        leaves, and a truthful error in words: what happened, and whether the host can have acted on it.
# Uses:  HEAD, ERRORS, GROUND, TRUST, WIRE
# ======================================================================================================


class Target(NamedTuple):
    """Where a host is and who must answer there."""

    name: str
    address: str  # a host name or an IP address
    port: int
    cert_name: str  # the name its certificate was issued for


def _resolve(address: str, port: int, deadline: Deadline) -> list:
    """Socket addresses of a host. The system's resolver knows no deadline, so it gets a thread of its own."""
    flags = socket.AI_NUMERICHOST
    try:
        return socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=flags)
    except (socket.gaierror, UnicodeError):
        pass
    found: list = []

    def ask() -> None:
        try:
            found.append(socket.getaddrinfo(address, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            found.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(deadline.left())
    if not found:
        raise TransportError("%s did not resolve within %g s" % (address, deadline.seconds))
    if isinstance(found[0], Exception):
        raise TransportError(
            "%s did not resolve (%s)" % (address, getattr(found[0], "strerror", None) or "not a name")
        )
    return found[0]


def _connect(address: str, port: int, deadline: Deadline) -> socket.socket:
    """A TCP connection to the first of a host's addresses that answers. Raises TransportError."""
    candidates = _resolve(address, port, deadline)
    problem: Optional[OSError] = None
    for number, (family, kind, protocol, _, where) in enumerate(candidates):
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(max(0.01, deadline.left() / (len(candidates) - number)))
            sock.connect(where)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock
        except OSError as error:
            sock.close()
            problem = error
    if isinstance(problem, socket.timeout):
        raise TransportError("no answer from %s port %d within %g s" % (address, port, deadline.seconds))
    if isinstance(problem, ConnectionRefusedError):
        raise TransportError(
            "%s port %d refused the connection" % (address, port), hint="is it running there?"
        )
    reason = problem.strerror if problem is not None else "no address"
    raise TransportError("%s port %d is unreachable: %s" % (address, port, reason))


class Patience:
    """A deadline that begins anew with every wait: for a stream, where only silence is a fault."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def left(self) -> float:
        return self.seconds


class Room:
    """The memory that the answers of all hosts may take together."""

    def __init__(self, size: int = MAX_TOGETHER) -> None:
        self._size = size
        self._free = size
        self._kept = 0  # bytes of results that stay until the last one is there
        self._readers: dict = {}  # answers that come now, the eldest first
        self._change = threading.Condition()
        self.parsing = threading.Lock()  # for as long as a large answer is there twice

    def take(self, answer: "AnswerRoom", size: int, deadline: Deadline) -> None:
        """Room for `size` bytes more of an answer. The eldest of those that are being read may go beyond the
        bound when others only wait, so that they do not wait for each other; one that stalls meanwhile loses
        its place.

        Raises socket.timeout when there is no room in time, and TooLarge when there will be none.
        """
        with self._change:
            self._readers.setdefault(answer)
            while self._free < size:
                needed = answer.size + size
                if needed > self._size - self._kept:
                    raise TooLarge("the other results leave no room in memory for its answer")
                ended = self._size - self._free - sum(one.size for one in list(self._readers))
                if answer is next(iter(self._readers), None) and needed <= self._size - ended:
                    break
                answer.is_waiting = True
                if deadline.left() <= 0:
                    raise socket.timeout("timed out")
                self._change.wait(min(0.5, deadline.left()))
                self._send_stalled_away()
            answer.is_waiting = False
            if answer.is_sent_away:
                raise TooLarge("its answer came too slowly for one of its size")
            self._free -= size
            answer.size += size

    def _send_stalled_away(self) -> None:
        """While somebody waits for room: who has it and does not use it?"""
        for answer in list(self._readers):
            if answer.has_stalled():
                del self._readers[answer]
                self._free += answer.size
                answer.size = 0
                answer.send_away()
        self._change.notify_all()

    def end(self, answer: "AnswerRoom") -> None:
        """An answer is read; what it has taken it has until it gives that back."""
        with self._change:
            self._readers.pop(answer, None)
            self._change.notify_all()

    def give(self, answer: "AnswerRoom") -> None:
        """All that an answer has taken is free again."""
        with self._change:
            self._readers.pop(answer, None)
            self._free += answer.size
            answer.size = 0
            self._change.notify_all()

    def keep(self, size: int) -> None:
        """Say that so much of what was taken stays taken; less than nothing: that it does not."""
        with self._change:
            self._kept += size
            self._change.notify_all()


class AnswerRoom:
    """What one answer has of the room, for as long as somebody holds this."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self._looked, self._had = time.monotonic(), 0  # when it was looked at last, and what it had then
        self.size = 0
        self.is_waiting = False
        self.is_sent_away = False
        self.abort: Callable = lambda: None  # ends the connection on which it comes

    def take(self, size: int, deadline: Deadline) -> None:
        """Have `size` bytes in all. Raises as `Room.take`."""
        if size > self.size or self.is_sent_away:
            self._room.take(self, size - self.size, deadline)

    def parse(self, data: bytes, deadline: Deadline) -> dict:
        """A whole answer as an object, with room for its texts: Python has four bytes for each character of a
        text that has one beyond the Basic Multilingual Plane. Raises as `Room.take`, and BadRequest."""
        if len(data) <= MAX_BODY:
            return parse_json(data)
        is_wide = re.search(rb"[\xf0-\xf4]|\\u[dD][89abAB]", data) is not None
        width = 4 if is_wide else 1 if data.isascii() and b"\\u" not in data else 2
        characters = len(data.translate(None, bytes(range(0x80, 0xC0))))  # each begins with another byte
        self.take(characters * width, deadline)
        with self._room.parsing:
            return parse_json(data)

    def has_stalled(self) -> bool:
        """Whether it has hardly grown since it was looked at, some time ago."""
        if self.is_waiting or time.monotonic() - self._looked < STALL_SECONDS:
            return False
        grown, self._looked, self._had = self.size - self._had, time.monotonic(), self.size
        return 0 < self.size and grown < STALL_BYTES

    def send_away(self) -> None:
        self.is_sent_away = True
        self.abort()

    def end(self) -> None:
        """The answer is read."""
        self._room.end(self)

    def give_back(self) -> None:
        """Nobody wants the answer."""
        self._room.give(self)

    def __del__(self) -> None:
        self.give_back()


class _Truth:
    """Turns what goes wrong with a request into a TransportError that tells whether the host can have acted:
    `unreachable` when it cannot, `timeout` when the deadline passed, `unknown` otherwise."""

    def __init__(self, name: str, deadline: Any) -> None:
        self._name = name
        self._seconds = deadline.seconds
        self.sent = False

    def __enter__(self) -> "_Truth":
        return self

    def __exit__(self, _: object, error: Optional[BaseException], __: object) -> None:
        state = "unknown" if self.sent else "unreachable"
        if isinstance(error, socket.timeout):
            raise TransportError("read timeout after %gs" % self._seconds, state="timeout") from None
        if isinstance(error, ssl.SSLError):
            # With TLS 1.3 the server judges our certificate after our handshake has succeeded: a refusal
            # arrives here, as an alert, and is no lost answer.
            refused = is_refusal(error)
            state = "unreachable" if refused else state
            words = "%s: %s" % (self._name, describe_tls_error(error))
            raise TransportError(words, state, is_refusal=refused) from error
        if isinstance(error, OSError):
            raise TransportError("%s closed the connection before it answered" % self._name, state) from error
        if isinstance(error, (BadRequest, TooLarge, HeadTooLarge)):
            raise TransportError("%s: %s" % (self._name, error.message), "unknown") from error


_BLOCKED_HINT = "perhaps it has blocked this address: its log says so, and SIGHUP clears that"


class Connection:
    """One TLS connection to one host."""

    def __init__(self, address: str, port: int, context: ssl.SSLContext, seconds: float) -> None:
        """Connect and shake hands within `seconds`. Raises TransportError."""
        deadline = Deadline(seconds)
        self._name = "%s port %d" % (address, port)
        raw = _connect(address, port, deadline)
        self._tls = context.wrap_socket(raw, do_handshake_on_connect=False)
        try:
            self._tls.settimeout(max(0.01, deadline.left()))
            self._tls.do_handshake()
        except socket.timeout as error:
            self.close()
            raise TransportError("%s did not finish TLS within %g s" % (self._name, seconds)) from error
        except ssl.SSLError as error:
            self.close()
            words = "TLS with %s failed: %s" % (self._name, describe_tls_error(error))
            hint = _BLOCKED_HINT if is_hang_up(error) else ""
            raise TransportError(words, is_refusal=is_refusal(error), hint=hint) from error
        except OSError as error:
            self.close()
            words = "%s closed the connection during TLS" % self._name
            raise TransportError(words, hint=_BLOCKED_HINT) from error
        self._channel = Channel(self._tls)
        self.is_kept = False  # whether the other end takes another request after the last answer
        self.prove: Optional[Callable] = None  # see `encode_request`

    def peer_cert(self) -> Optional[PeerCert]:
        return read_peer_cert(self._tls)

    def peer_pem(self) -> bytes:
        """The certificate that the other end has proved to hold."""
        return ssl.DER_cert_to_PEM_cert(self._tls.getpeercert(binary_form=True)).encode("ascii")

    def check_identity(self, name: str, revoked: frozenset) -> None:
        """Raise TransportError unless the certificate at the other end is the one issued for `name`."""
        cert = self.peer_cert()
        if cert is None or not is_named(cert, name):
            shown = ", ".join(cert.names or (cert.common_name,)) if cert is not None else "none"
            message = "wrong identity: %s shows the certificate of %s, not of %s"
            hint = "is it another machine? else pair it again under that name: ced approve ID --replace"
            raise TransportError(message % (self._name, one_line(shown), name), hint=hint)
        if cert.serial in revoked:
            raise TransportError("the certificate of %s (serial %s) is revoked" % (name, cert.serial))

    def request(
        self,
        method: str,
        path: str,
        body: Optional[dict],
        deadline: Deadline,
        keep: bool = False,
        limit: int = MAX_BODY,
        room: Optional[AnswerRoom] = None,
    ) -> tuple:
        """Send a request and read its answer whole: (status, object). Of more than a MiB `room` is asked.

        Raises TransportError: `timeout` when the deadline passed, `unknown` when the connection broke after
        the request had left, `unreachable` when it cannot have arrived.
        """
        with _Truth(self._name, deadline) as truth:
            self._send(self._encode(method, path, body, keep), deadline)
            truth.sent = True
            answer = read_answer(self._channel, deadline)
            self.is_kept = answer.version == "1.1" and "close" not in answer.headers.get("connection", "")
            data = bytearray()
            for piece in self._read_pieces(answer, deadline, limit, room):
                data += piece
            try:  # with the same distrust as a request
                parsed = parse_json(data) if room is None else room.parse(data, deadline)
            finally:
                data.clear()  # what an error's traceback holds
            return answer.status, parsed

    def _read_pieces(
        self, answer: Answer, deadline: Any, limit: int, room: Optional[AnswerRoom]
    ) -> Iterator[bytes]:
        """The body of an answer, with room for what is more than a MiB."""
        total = 0
        if room is not None:
            room.abort = lambda: socket.socket.shutdown(self._tls, socket.SHUT_RDWR)
        try:
            for piece in read_body(self._channel, answer, deadline, limit):
                total += len(piece)
                if room is not None and total > MAX_BODY:
                    room.take(total - MAX_BODY, deadline)
                yield piece
        except (OSError, ValueError):
            if room is not None and room.is_sent_away:
                raise TooLarge("its answer came too slowly for one of its size") from None
            raise

    def _encode(self, method: str, path: str, body: Optional[dict], keep: bool) -> bytes:
        return encode_request(method, path, self._name.split()[0], body, keep, self.prove)

    def _send(self, data: bytes, deadline: Deadline) -> None:
        """Write a request. A peer that has refused our certificate may have closed already: its alert waits
        to be read, and says more than the broken pipe."""
        try:
            self._channel.write(data, max(0.01, deadline.left()))
        except socket.timeout:
            raise
        except OSError as broken:
            self._tls.settimeout(1)
            try:
                self._tls.recv(1)
            except ssl.SSLError as alert:
                if is_refusal(alert):
                    raise
            except OSError:
                pass
            raise broken

    def request_lines(
        self, method: str, path: str, body: Optional[dict], deadline: Any, room: Optional[AnswerRoom] = None,
        limit: int = MAX_STREAM,
    ) -> Iterator[tuple]:  # fmt: skip
        """Send a request, and yield (status, object) for each line of its answer as it comes.

        `deadline` is a Deadline or a Patience. Raises TransportError, as `request`.
        """
        with _Truth(self._name, deadline) as truth:
            self._send(self._encode(method, path, body, True), deadline)
            truth.sent = True
            answer = read_answer(self._channel, deadline)
            # A release that does not stream answers with one object, whatever it was asked for.
            is_whole = answer.headers.get("content-type", "") != EVENT_LINES
            longest = MAX_ANSWER if is_whole else MAX_BODY
            rest = bytearray()
            for piece in self._read_pieces(answer, deadline, limit, room if is_whole else None):
                rest += piece
                if b"\n" in piece:
                    *lines, rest = rest.split(b"\n")
                    for line in lines:
                        yield answer.status, parse_json(line)
                if len(rest) > longest:
                    raise TooLarge("a line of the answer has more than %d bytes" % longest)
            if rest:
                yield answer.status, parse_json(rest) if room is None else room.parse(rest, deadline)

    def descriptor(self) -> int:
        return self._tls.fileno()

    def close(self) -> None:
        try:
            self._tls.close()
        except OSError:
            pass

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def connect_agent(target: Target, context: ssl.SSLContext, revoked: frozenset, seconds: float) -> Connection:
    """A connection to an agent, which must be the one registered. Raises TransportError."""
    connection = Connection(target.address, target.port, context, seconds)
    try:
        connection.check_identity(target.cert_name, revoked)
    except BaseException:
        connection.close()
        raise
    return connection


# ======================================================================================================
# 10. POLICY
# Owns:  auth hooks, and which addresses may connect: the allowlist of addresses and the rate limits.
# Uses:  HEAD, ERRORS, GROUND, SETTINGS, WIRE
# Why here: dispatcher, agent and API ask the same hook in the same way; everything that is not a clear
#        yes is a no.
# ======================================================================================================


class HookContext(NamedTuple):
    """What an auth hook is told, on stdin as JSON and as ENVEXEC_* in its environment."""

    action: str  # run, ping, discovery, ...
    reqid: str
    script: str = ""
    hosts: tuple = ()
    args: tuple = ()
    username: str = ""
    token: str = ""
    source_ip: str = ""
    dispatcher: str = ""  # the dispatcher's id, as its certificate proved it
    dispatcher_serial: str = ""
    submitter: str = ""  # of the run that a status request asks about
    submitter_ip: str = ""
    via: str = "cli"  # which face is asked: cli, api or agent
    operation: str = ""  # what exactly is asked, where `action` keeps the words that older hooks know


# The kernel refuses a variable of 128 KiB and more (MAX_ARG_STRLEN of execve(2)), and more than a quarter of
# the stack's limit of all together.
MAX_HOOK_VARIABLE = 64 * 1024


def _hook_environment(context: HookContext, timestamp: str) -> dict:
    """The context as variables. What is too long for one is left out and named in ENVEXEC_OMITTED: cut short,
    it would say something else. It stands on stdin."""
    values = context._asdict()
    values["timestamp"] = timestamp
    values["hosts"] = ",".join(context.hosts)
    values["args"] = " ".join(context.args)
    values["args_json"] = json.dumps(context.args)
    omitted = [name for name, value in values.items() if len(os.fsencode(value)) > MAX_HOOK_VARIABLE]
    values["omitted"] = ",".join("ENVEXEC_" + name.upper() for name in omitted)
    environment = {"ENVEXEC_" + name.upper(): values[name] for name in values if name not in omitted}
    environment["PATH"] = SAFE_PATH
    return environment


_HOOK_ANSWERS = {1: "denied", 2: "bad credentials", 3: "insufficient privilege"}


def _check_hook(path: str) -> None:
    """Raise ValueError for a hook that somebody else could have written, or could replace."""
    try:
        check_modes(path)
    except ScriptRefused as error:
        raise ValueError(error.message) from error
    if not os.path.isfile(path):
        raise ValueError("not a regular file")


class Hook(NamedTuple):
    """An auth hook and how long it may think."""

    path: str
    timeout: int
    deny_generic: bool = False
    is_configured: bool = True  # or it lies in the default place

    def origin(self) -> str:
        """Why it is asked, in words."""
        return "auth_hook names it" if self.is_configured else "it lies there, and no auth_hook is set"

    def decide(self, context: HookContext) -> None:
        """Return when the hook exits 0; raise Denied in every other case."""
        timestamp = iso_time(now())
        context = context._replace(operation=context.operation or context.action)
        try:
            _check_hook(self.path)
            done = run_program(
                [self.path],
                stdin=encode_json(dict(context._asdict(), timestamp=timestamp)),
                env=_hook_environment(context, timestamp),
                timeout=self.timeout,
                discard=True,
            )
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            self._deny(context, "error", "the auth hook %s cannot be run: %s" % (self.path, reason), 1)
        if done.status is None:
            self._deny(context, "error", "the auth hook did not answer within %d s" % self.timeout, 1)
        if done.status in _HOOK_ANSWERS:
            self._deny(context, "denied", _HOOK_ANSWERS[done.status], done.status)
        if done.status != 0:
            self._deny(context, "error", "the auth hook failed (exit status %d)" % done.status, 1)
        LOG.event("auth", RESULT="authorised", **self._event_fields(context))

    def _event_fields(self, context: HookContext) -> dict:
        return {
            "REQID": context.reqid,
            "FOR": context.operation,
            "SCRIPT": context.script,
            "USERNAME": context.username,
        }

    def _deny(self, context: HookContext, result: str, reason: str, code: int) -> None:
        facts = dict(self._event_fields(context), HOOK=self.path, BECAUSE=self.origin())
        LOG.event("auth", RESULT=result, REASON=reason, CODE=code, **facts)
        if self.deny_generic:
            raise Denied("not authorised", 1)
        raise Denied("not authorised: %s" % reason, code)


def check_hook(hook: Optional[Hook], user: str = "") -> list:
    """Whether the hook, if there is one, could be asked, by a service user: Findings."""
    if hook is None:
        return []
    what = "auth hook %s (%s)" % (hook.path, hook.origin())
    try:
        _check_hook(hook.path)
        check_runnable(hook.path)
        if user and not may_execute(user, hook.path):
            raise ValueError("the user %s, which asks it, may not execute it" % user)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        hint = "while it is so, everything is denied"
        return [Finding("FAIL", "%s: cannot be run: %s" % (what, reason), hint)]
    return [Finding("OK", what)]


def find_hook(path: str, default: str, timeout: int, deny_generic: bool = False) -> Optional[Hook]:
    """The hook a configuration names, which must then exist; or the one at the default place, if it does."""
    if path:
        return Hook(path, timeout, deny_generic)
    return Hook(default, timeout, deny_generic, False) if os.path.lexists(default) else None


def _rate_key(address: str) -> str:
    """The address, or the /64 of an IPv6 one: a single host has all of that to itself."""
    if ":" not in address:
        return address
    return socket.inet_pton(socket.AF_INET6, address.partition("%")[0])[:8].hex()


class AddressGate:
    """Which addresses may connect now. Strangers are counted when their connection has come to nothing; an
    address that a trusted dispatcher has used is never blocked, so that no neighbour on the control host can
    lock it out. A blocked address may still try once every few seconds, because a dispatcher may come from
    there: not one connection at a time, which somebody who says nothing could keep. Tables are bounded and
    forget the oldest; a reload starts new ones, without blocks."""

    def __init__(
        self,
        allowed: tuple,
        volume: Rate,
        probe: Rate,
        disabled: bool,
        known: Iterable = (),  # addresses that dispatchers have used
        bound: int = 4096,
    ) -> None:
        self._allowed = allowed
        self._rates = {"volume": volume, "probe": probe}
        self._disabled = disabled
        self._bound = bound
        self._guard = threading.Lock()
        self._events: dict = {}  # (kind, address): times of recent failures
        self._blocked: dict = {}  # address: until when
        self._trusted = {_rate_key(address): None for address in known}  # oldest first
        self._tried: dict = {}  # blocked addresses: when each was let in last
        self._told: dict = {}  # addresses outside the allowlist that have been logged

    def admit(self, address: str) -> bool:
        """Whether a connection from here is looked at."""
        if self._allowed and not self._is_allowed(address):
            with self._guard:
                is_new = self._put(self._told, address, None)
            if is_new:
                LOG.event("ip-block", PEER=address)
            return False
        key = _rate_key(address)
        if self._disabled or key in self._trusted:
            return True
        with self._guard:
            if self._blocked.get(key, 0) <= time.monotonic():
                self._blocked.pop(key, None)
                return True
            if self._tried.get(key, -TRY_SECONDS) > time.monotonic() - TRY_SECONDS:
                return False
            self._put(self._tried, key, time.monotonic())
            return True

    def is_blocked(self, address: str) -> bool:
        return self._blocked.get(_rate_key(address), 0) > time.monotonic()

    def trust(self, address: str) -> None:
        """A trusted dispatcher has just proved itself from here."""
        key = _rate_key(address)
        if key not in self._trusted:
            with self._guard:
                self._put(self._trusted, key, None)
                self._blocked.pop(key, None)

    def count(self, address: str, kind: str) -> None:
        """A stranger's connection came to nothing; `kind` is `volume`, or `probe` for a bad handshake."""
        key = _rate_key(address)
        if self._disabled or key in self._trusted:
            return
        rate, moment = self._rates[kind], time.monotonic()
        with self._guard:
            recent = [at for at in self._events.pop((kind, key), []) if at > moment - rate.window]
            recent.append(moment)
            over = len(recent) > rate.count if kind == "volume" else len(recent) >= rate.count
            blocked = self._blocked.get(key, 0)
            if over:
                self._put(self._blocked, key, max(blocked, moment + rate.block))
            else:
                self._put(self._events, (kind, key), recent[-rate.count - 1 :])
        if over and blocked <= moment:
            LOG.event("rate-block", PEER=address, KIND=kind, SECONDS=rate.block)

    def _put(self, table: dict, key: Any, value: Any) -> bool:
        """With the guard held: put an entry into a table, dropping the oldest when it is full; whether it is
        new."""
        new = key not in table
        table[key] = value
        if len(table) > self._bound:
            del table[next(iter(table))]
        return new

    def _is_allowed(self, address: str) -> bool:
        import ipaddress

        parsed = ipaddress.ip_address(address.partition("%")[0])
        return any(parsed in network for network in self._allowed)


# ======================================================================================================
# 11. SCRIPTS
# Owns:  what may run, and as what: the allowlist, sidecars, the modes of files, security profiles.
# Uses:  HEAD, ERRORS, GROUND, SETTINGS, WIRE
# On disk: scripts.conf, PATH.schema.json (read only)
# ======================================================================================================


class Profile(NamedTuple):
    """What a script runs as. Zero and empty mean: as the agent, without a limit."""

    name: str
    run_as: str
    caps: str
    writable: tuple
    no_new_privileges: bool
    timeout: int  # seconds
    nice: int
    memory: int  # bytes of address space
    cpu_seconds: int
    open_files: int


class Script(NamedTuple):
    """One line of the allowlist."""

    name: str
    path: str
    profile: Profile
    timeout: int  # seconds; 0: none of its own
    max_running: int
    schema: Optional[dict] = None  # the sidecar, carried untouched
    schema_version: str = ""
    unrecorded: bool = False  # it may run when the disk has no room for its record


def build_profiles(profiles: dict) -> dict:
    """Profiles by name from a configuration's sections; `default` is always there."""
    built = {name: Profile(name, **values) for name, values in profiles.items()}
    built.setdefault("default", Profile("", **complete_profile({})))
    return built


_SCRIPT_OPTIONS = {
    "profile": str,
    "timeout": parse_count,
    "max_running": parse_positive,
    "unrecorded": parse_yes_no,
}


def load_sidecar(path: str) -> tuple:
    """A script's sidecar and its version, or (None, ""). Raises ValueError when it cannot be used."""
    try:
        check_modes(path + ".schema.json")  # or others could point us at a file that only we can read
        data = read_file(path + ".schema.json", MAX_SIDECAR)
    except FileNotFoundError:
        return None, ""
    except OSError as error:
        raise ValueError(error.strerror) from error
    except (ScriptRefused, StorageError) as error:
        raise ValueError(error.message) from error
    try:
        schema = parse_json(data)
        check_json_structure(b"[[[" + data)  # as deep as it stands in the answer to /capabilities
        json.dumps(schema, ensure_ascii=False).encode("utf-8")
    except (BadRequest, UnicodeEncodeError) as error:
        raise ValueError(getattr(error, "message", "half of a surrogate pair")) from error
    version = schema.get("version")
    if isinstance(version, str) and SCHEMA_VERSION.fullmatch(version) and not version.startswith("sha256:"):
        return schema, version
    import hashlib

    canonical = json.dumps(schema, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return schema, "sha256:" + hashlib.sha256(canonical.encode("ascii")).hexdigest()[:12]


def _parse_script(line: ConfigLine, where: str, profiles: dict, warnings: list) -> Script:
    path, options = line.value, {}
    while True:  # options stand at the end, so that a path may have spaces
        hit = re.fullmatch(r"(.*\S)\s+([a-z_]+)=(\S*)", path)
        if not hit:
            break
        path, key, value = hit[1], hit[2], hit[3]
        if key not in _SCRIPT_OPTIONS:
            raise ConfigError("%s: unknown option `%s`%s" % (where, key, suggest(key, _SCRIPT_OPTIONS)))
        if key in options:
            raise ConfigError("%s: `%s` is there twice" % (where, key))
        try:
            options[key] = _SCRIPT_OPTIONS[key](value)
        except ValueError as error:
            raise ConfigError("%s: `%s` expects %s" % (where, key, error)) from None
    try:
        path = parse_path(path)
    except ValueError as error:
        raise ConfigError("%s: expected %s, not `%s`" % (where, error, one_line(path))) from None
    name = options.get("profile", "default")
    if name not in profiles:
        raise ConfigError(
            "%s: no [profile %s] in agent.conf%s" % (where, one_line(name), suggest(name, profiles))
        )
    schema, version = None, ""
    try:
        schema, version = load_sidecar(path)
    except ValueError as error:
        warnings.append("%s.schema.json: left out: %s" % (path, error))
    limits, unrecorded = (options.get("timeout", 0), options.get("max_running", 1)), options.get("unrecorded")
    return Script(line.key, path, profiles[name], *limits, schema, version, unrecorded is True)


def load_allowlist(path: str, profiles: dict) -> tuple:
    """Read scripts.conf: (scripts by name, warnings). Raises ConfigError naming the line.

    A missing file is an empty allowlist: then nothing runs.
    """
    try:
        text = read_text(path)
    except FileNotFoundError:
        return {}, ("%s: no such file: no script can run" % path,)
    except StorageError as error:
        raise ConfigError(error.message, error.hint) from error
    scripts: dict = {}
    warnings: list = []
    for line in parse_lines(text, path):
        where = "%s:%d" % (path, line.number)
        if line.section:
            raise ConfigError("%s: sections have no place here" % where)
        if not SCRIPT_NAME.fullmatch(line.key):
            raise ConfigError(
                "%s: a script name is letters, digits, _ and -, not `%s`" % (where, one_line(line.key))
            )
        if line.key in scripts:
            raise ConfigError("%s: `%s` is there twice" % (where, line.key))
        if line.key in GUARDS:  # here it would be a script that anybody may run
            raise ConfigError("%s: `%s` is a key of agent.conf, and no name for a script" % (where, line.key))
        scripts[line.key] = _parse_script(line, where, profiles, warnings)
    return scripts, tuple(warnings)


# --- is this the file that was meant? -------------------------------------------------------------------


def _is_below(path: str, directory: str) -> bool:
    return os.path.commonpath([path, directory]) == directory


def check_script(script: Script, script_dirs: tuple, strict_modes: bool) -> str:
    """The real path of a script that may run now. Raises ScriptRefused saying what stands against it."""
    try:
        real = os.path.realpath(script.path)
        status = os.stat(real)
        if not stat.S_ISREG(status.st_mode):
            raise ScriptRefused("%s is not a regular file" % real)
        if script_dirs and not any(_is_below(real, os.path.realpath(top)) for top in script_dirs):
            raise ScriptRefused("%s is outside script_dirs" % real)
        if strict_modes:
            check_modes(script.path)
    except OSError as error:
        raise ScriptRefused("%s: %s" % (script.path, error.strerror)) from error
    return real


class Account(NamedTuple):
    """The user a script runs as."""

    uid: int
    gid: int
    groups: tuple
    user: str
    home: str
    shell: str


def find_account(profile: Profile) -> Account:
    """The account of a profile's `run_as`; without one our own, and SCRIPT_USER's when we are root: nothing
    is root unless it says so. Raises ScriptRefused when it cannot be had."""
    import grp
    import pwd

    user, _, group = profile.run_as.partition(":")
    if profile.run_as and not user:
        raise ScriptRefused("profile %s: run_as names no user" % profile.name)
    if not user and os.geteuid() == 0:
        user = SCRIPT_USER
        if find_user(user) is None:
            message = (
                "it has no run_as, and there is no user %s: write run_as = USER in [profile %s] of agent.conf"
            )
            raise ScriptRefused(
                message % (user, profile.name or "default"), "install.sh --agent makes that user"
            )
    try:
        entry = pwd.getpwnam(user) if user else pwd.getpwuid(os.geteuid())
        gid = grp.getgrnam(group).gr_gid if group else entry.pw_gid
    except KeyError:
        if not user:  # a container's user without a passwd entry
            return Account(os.geteuid(), os.getegid(), (), str(os.geteuid()), "/", "/bin/sh")
        raise ScriptRefused(
            "profile %s: no user or group %s" % (profile.name, one_line(profile.run_as))
        ) from None
    if user and os.geteuid() != 0 and (entry.pw_uid, gid) != (os.geteuid(), os.getegid()):
        raise ScriptRefused(
            "profile %s asks for user %s, and the agent does not run as root" % (profile.name, user)
        )
    groups = tuple(os.getgrouplist(entry.pw_name, gid))
    return Account(entry.pw_uid, gid, groups, entry.pw_name, entry.pw_dir, entry.pw_shell or "/bin/sh")


def default_user(profiles: dict) -> str:
    """What a script without a profile runs as, for people to read."""
    own = SCRIPT_USER if os.geteuid() == 0 else "uid %d" % os.geteuid()
    return profiles.get("default", {}).get("run_as") or own


def check_profile(profile: Profile) -> Account:
    """The account to run as, if everything the profile asks for can be applied. Raises ScriptRefused."""
    for key in ("caps", "writable"):
        if getattr(profile, key):
            raise ScriptRefused(
                "profile %s asks for `%s`, which this version cannot apply" % (profile.name, key)
            )
    if profile.nice < 0 and os.geteuid() != 0:
        raise ScriptRefused(
            "profile %s asks for nice %d, and the agent does not run as root" % (profile.name, profile.nice)
        )
    return find_account(profile)


# ======================================================================================================
# 12. RECORDS
# Owns:  what an agent keeps of a run: its record and its output, on disk, and the result made of them.
# Uses:  HEAD, ERRORS, GROUND, WIRE
# On disk: runs/OWNER/REQID.json, .out, .err
# ======================================================================================================


class RunStore(NamedTuple):
    """Where an agent's run records lie, whom their files belong to, and how long they are kept."""

    directory: str
    file_owner: Optional[Owner]
    retention: int  # seconds


class RunRecord(NamedTuple):
    """One run, as its record on disk says. Output lies beside it; arguments and tokens are not kept.

    running ──→ done, in exactly one way: by itself (exit or signal), timed_out, cancelled, interrupted
    """

    reqid: str
    owner: str
    script: str
    host: str
    username: str
    peer_ip: str
    status: str  # running or done
    started: str  # ISO 8601
    pid: int  # of the script, which leads its own session and process group
    birth: str = ""  # of that process, see Process
    supervisor: int = 0  # the process that watches it; means nothing unless the run is claimed
    supervisor_birth: str = ""  # of that process, see Process; not in records of older releases
    finished: str = ""
    exit: int = -1
    signal: str = ""
    timed_out: bool = False
    cancelled: bool = False
    interrupted: bool = False  # its supervisor was killed
    stdout_truncated: int = 0  # bytes that were dropped
    stderr_truncated: int = 0
    error: str = ""


STREAMS = {"stdout": ".out", "stderr": ".err"}  # and the file that each is kept in


def record_path(store: RunStore, owner: str, reqid: str, suffix: str) -> str:
    """A file of one run. The last gate before names become paths: raises BadRequest for what is no name."""
    if not HOST_NAME.fullmatch(owner) or not REQUEST_ID.fullmatch(reqid):
        raise BadRequest("not a run's name")
    return os.path.join(store.directory, owner, reqid + suffix)


def write_record(store: RunStore, record: RunRecord, new: bool) -> None:
    """Write a run's record. Raises StorageError, and FileExistsError when a new one's id is taken.

    On a full disk an existing record is overwritten where it stands: it is smaller than the one block that it
    has already, and that a script ended is worth more than that no reader ever meets half a file.
    """
    path = record_path(store, record.owner, record.reqid, ".json")
    data = encode_state(record._asdict())
    try:
        write_atomic(path, data, mode=0o640, owner=store.file_owner, replace=not new)
    except StorageError:
        if new:
            raise
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise StorageError("cannot write %s: %s" % (path, error.strerror)) from error
        try:
            os.pwrite(descriptor, data.ljust(os.fstat(descriptor).st_size), 0)
        except OSError as error:
            raise StorageError("cannot write %s: %s" % (path, error.strerror)) from error
        finally:
            os.close(descriptor)


def find_record(store: RunStore, owner: str, reqid: str) -> Optional[RunRecord]:
    """The record of a run, or None. Raises StorageError for one that cannot be read or is another's."""
    path = record_path(store, owner, reqid, ".json")
    try:
        values = read_json_file(path)
        record = RunRecord(**{key: values[key] for key in RunRecord._fields if key in values})
    except FileNotFoundError:
        return None
    except TypeError as error:
        raise StorageError("%s: fields are missing" % path) from error
    if (record.owner, record.reqid) != (owner, reqid):
        raise StorageError("%s: not the record of this run" % path)
    return record


# A run is claimed while its supervisor lives: it holds a lock on the run's .out file, and the kernel takes
# that back when it dies, however it dies. A record that says `running` without a claim was interrupted.


def _open_claim(path: str) -> tuple:
    """(descriptor, whether it can be written) of a run's .out file. Raises OSError. On a disk that has become
    read-only, whether the run lives can be seen all the same."""
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(path, flags, 0o640), True
    except OSError as error:
        if error.errno != errno.EROFS or not os.path.exists(path):
            raise
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), False


def claim_run(store: RunStore, owner: str, reqid: str) -> int:
    """The descriptor of a run's .out file, locked, or -1 when another process has claimed the run.

    Raises StorageError.
    """
    path = record_path(store, owner, reqid, ".out")
    make_directory(store.directory, 0o750, store.file_owner)
    make_directory(os.path.dirname(path), 0o750, store.file_owner)
    while True:
        try:
            descriptor, is_new = _open_claim(path)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                return -1
            if store.file_owner is not None and is_new:
                os.fchown(descriptor, store.file_owner.uid, store.file_owner.gid)
        except OSError as error:
            raise StorageError("cannot write %s: %s" % (path, error.strerror)) from error
        if is_current(descriptor, path):  # and not one that was removed meanwhile
            return descriptor
        os.close(descriptor)


def is_claimed(path: str) -> bool:
    """Whether the run with this .out file has a supervisor."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        return is_locked(descriptor)
    finally:
        os.close(descriptor)


class _Enough(Exception):
    """Waiting longer is of no use."""


def wait_for_end(store: RunStore, owner: str, reqid: str, is_over: Callable) -> None:
    """Wait until a run is claimed no more, in the kernel's queue for its lock; or until `is_over()`, which is
    asked twice a second."""

    def look(*_: object) -> None:
        if is_over():
            signal.setitimer(signal.ITIMER_REAL, 0)  # here: it may come when the wait has just ended
            raise _Enough

    try:
        descriptor = os.open(record_path(store, owner, reqid, ".out"), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return
    signal.signal(signal.SIGALRM, look)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.5, 0.5)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except _Enough:
        pass
    os.close(descriptor)


def _age(path: str) -> float:
    """Seconds since a run's files were of use: since its record was written last, or else the file itself."""
    record = os.path.splitext(path)[0] + ".json"
    return now() - os.stat(record if os.path.exists(record) else path, follow_symlinks=False).st_mtime


def sweep_records(store: RunStore) -> None:
    """Remove what is older than the retention; never raises."""
    try:
        if not os.path.isdir(store.directory) or not is_sweep_due(store.directory, store.retention):
            return
        for owner in os.scandir(store.directory):
            if owner.is_dir(follow_symlinks=False):
                paths = sorted((entry.path for entry in os.scandir(owner.path)), reverse=True)
                for path in paths:  # .out and .err before the .json that tells their age
                    output = os.path.splitext(path)[0] + STREAMS["stdout"]
                    try:
                        if _age(path) > store.retention and not is_claimed(output):
                            os.unlink(path)
                    except FileNotFoundError:  # another sweeps, too
                        pass
    except (OSError, StorageError) as error:
        LOG.event("run-store-fail", MESSAGE="sweep: %s" % error)


# --- the answer -----------------------------------------------------------------------------------------


_BLOCK = 49152  # bytes of output at a time; a multiple of 3, so that pieces in base64 join


def _render_text(path: str, most: int) -> Iterator[bytes]:
    """The content of an output file as the inside of a JSON string, as long as it and what `_render_base64`
    makes of the same bytes have at most `most`; what is not UTF-8 is replaced. Returns how much it took."""
    import codecs

    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    taken = 0
    with open(path, "rb") as file:
        while True:
            data = file.read(_BLOCK)
            text = decoder.decode(data, final=not data)
            encoded = json.dumps(text, ensure_ascii=False)[1:-1].encode("utf-8")
            most -= len(encoded) + len(data) * 4 // 3
            if most < 0:
                return taken
            taken += len(data)
            yield encoded
            if not data:
                return taken


def _render_base64(path: str, size: int) -> Iterator[bytes]:
    """The first `size` bytes of a file."""
    import base64

    with open(path, "rb") as file:
        while size > 0:
            data = file.read(min(size, _BLOCK))
            if not data:
                return
            size -= len(data)
            yield base64.b64encode(data)


def _is_utf8(path: str) -> bool:
    import codecs

    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    with open(path, "rb") as file:
        try:
            while True:
                data = file.read(65536)
                decoder.decode(data, final=not data)
                if not data:
                    return True
        except UnicodeDecodeError:
            return False


def describe_run(record: RunRecord) -> dict:
    """A run without its output, as answers and events tell of it."""
    facts = {"script": record.script, "exit": record.exit, "reqid": record.reqid, "host": record.host}
    if record.status != "done":
        del facts["exit"]
    facts.update(status=record.status, owner=record.owner, started=record.started)
    optional = ("finished", "signal", "timed_out", "cancelled", "interrupted")
    optional += ("stdout_truncated", "stderr_truncated", "error")
    facts.update({key: getattr(record, key) for key in optional if getattr(record, key)})
    return facts


def render_result(store: RunStore, record: RunRecord) -> Iterator[bytes]:
    """A run's result as JSON text in pieces: whatever a script has written is never whole in memory. Of each
    stream there is as much as a dispatcher takes; the rest counts as dropped."""
    facts = describe_run(record)
    dropped = {stream: facts.pop(stream + "_truncated", 0) for stream in STREAMS}
    yield encode_json(facts)[:-1]
    for stream, suffix in STREAMS.items():
        path = record_path(store, record.owner, record.reqid, suffix)
        if not os.path.exists(path):
            yield b',"%s":""' % stream.encode("ascii")
            continue
        yield b',"%s":"' % stream.encode("ascii")
        taken = yield from _render_text(path, (MAX_ANSWER - MAX_BODY) // len(STREAMS))
        yield b'"'
        if not _is_utf8(path):
            yield b',"%s_base64":"' % stream.encode("ascii")
            yield from _render_base64(path, taken)
            yield b'"'
        dropped[stream] += os.path.getsize(path) - taken
        if dropped[stream]:
            yield b',"%s_truncated":%d' % (stream.encode("ascii"), dropped[stream])
    yield b"}"


# --- the same as events, while it runs ------------------------------------------------------------------

_PIECE = 32768  # bytes of output in one event


def _whole_characters(data: bytes) -> int:
    """How many bytes of `data` end between two characters of UTF-8 (RFC 3629), as far as can be told."""
    for back in range(1, min(4, len(data) + 1)):
        byte = data[-back]
        if byte >= 0xC0:
            length = 4 if byte >= 0xF0 else 3 if byte >= 0xE0 else 2
            return len(data) - back if length > back else len(data)
        if byte < 0x80:
            break
    return len(data)


class Window:
    """A run's output as a stream of events to whoever follows it, read back from disk at his own pace: one
    who stalls delays neither the script nor others, and whoever comes later sees the same.

    Each event is one line of JSON: {"event": "output", "stream", "offset", "data", "base64"?}, {"event":
    "beat"}, and at last {"event": "end", ...} with what `describe_run` says. `offset` is where in its stream
    the event ends, to go on from there over another connection.
    """

    def __init__(
        self, channel: socket.socket, store: RunStore, owner: str, reqid: str, offsets: dict
    ) -> None:
        """`offsets`: where to begin in each stream; -1 is what its end is now."""
        self.channel = channel
        self._paths = {name: record_path(store, owner, reqid, suffix) for name, suffix in STREAMS.items()}
        self._files: dict = {}
        self._offsets = dict(offsets)
        self._outgoing = b""
        self._beat = Deadline(0)  # at once: whoever comes again learns that the run is still there
        self.is_open = True
        for stream, offset in offsets.items():
            self._open(stream)
            if offset < 0:
                size = os.fstat(self._files[stream]).st_size if stream in self._files else 0
                self._offsets[stream] = size

    def _open(self, stream: str) -> None:
        try:
            self._files[stream] = os.open(self._paths[stream], os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:  # nothing there: nothing to tell
            pass

    def _next_event(self, final: bool) -> bytes:
        """The next piece of output, or nothing when there is none yet."""
        for stream, file in self._files.items():
            data = os.pread(file, _PIECE, self._offsets[stream])
            if not final or len(data) == _PIECE:
                data = data[: _whole_characters(data)]
            if not data:
                continue
            self._offsets[stream] += len(data)
            event = {"event": "output", "stream": stream, "offset": self._offsets[stream]}
            try:
                event["data"] = data.decode("utf-8")
            except UnicodeDecodeError:
                import base64

                event.update(data=data.decode("utf-8", "replace"), base64=base64.b64encode(data).decode())
            return encode_json(event) + b"\n"
        return b""

    def pump(self, final: bool = False) -> bool:
        """Send what there is and the follower takes now; whether more waits for him."""
        self.channel.setblocking(False)
        for _ in range(16):  # then it is the script's turn
            if not self._outgoing:
                self._outgoing = self._next_event(final)
                if not self._outgoing and self._beat.is_over():
                    self._outgoing = encode_json({"event": "beat"}) + b"\n"
            if not self._outgoing or not self.is_open:
                return False
            try:
                sent = self.channel.send(self._outgoing)
            except BlockingIOError:
                return True
            except OSError:
                self.is_open = False
                return False
            self._outgoing = self._outgoing[sent:]
            self._beat = Deadline(BEAT_SECONDS)
        return True

    def wait_seconds(self) -> float:
        """Until the next sign of life is due."""
        return self._beat.left()

    def finish(self, record: RunRecord) -> None:
        """Send what is left, and how it ended."""
        poller = select.poll()
        poller.register(self.channel.fileno(), select.POLLOUT)
        while self.pump(final=True):
            if not poller.poll(WRITE_SECONDS * 1000):
                return
        if self.is_open:
            self.channel.settimeout(WRITE_SECONDS)
            try:
                self.channel.sendall(encode_json(dict(describe_run(record), event="end")) + b"\n")
            except OSError:
                pass


# ======================================================================================================
# 13. JOBS
# Owns:  one supervisor process per run: it checks again what may run, starts the script, watches it, keeps
#        its limits and its record. It outlives the executor that forked it, and the front that asked.
# Uses:  HEAD, ERRORS, GROUND, WIRE, SCRIPTS, RECORDS
# On disk: locks/SCRIPT.N
# ======================================================================================================


class JobRules(NamedTuple):
    """What the agent's own files say about running; a supervisor believes nothing else."""

    scripts: dict
    script_dirs: tuple
    strict_modes: bool
    store: RunStore
    locks_dir: str
    trusted: dict  # serials that are in the trust map and not revoked, to dispatcher ids
    host: str
    max_output: int
    stdin_timeout: int
    script_timeout: int
    spare_dir: str = ""  # for the records and locks of runs that the disk has no room for; empty: refuse them
    open_files: int = 0  # the soft limit that the agent was started with; 0: as it is
    cgroup: str = ""  # a directory for the control groups of runs; empty: none is ours to divide


class JobRequest(NamedTuple):
    """What the front asks an executor for; `operation` is `run` or one of `_QUESTIONS`."""

    operation: str
    reqid: str = ""
    owner: str = ""  # the dispatcher's id, from its certificate
    peer_ip: str = ""
    script: str = ""
    args: tuple = ()
    username: str = ""
    token: str = ""
    timeout: int = 0  # seconds; can only shorten what the agent's files allow
    mode: str = "sync"  # of a run: sync, async or stream
    wait: int = 0  # seconds that a result may be waited for
    stdout: int = 0  # where to begin following; -1: what is written from now on
    stderr: int = 0
    serial: str = ""  # of the certificate that it was asked with
    body: str = ""  # the request as it came, when there is a proof of it
    time: str = ""  # ISO 8601, as the dispatcher says
    proof: str = ""


# --- starting a script ----------------------------------------------------------------------------------


class _Plan(NamedTuple):
    """All that a process needs to become the script."""

    path: str
    args: tuple
    environment: dict
    account: Account
    profile: Profile
    open_files: int


def _decode_plan(data: bytes) -> _Plan:
    """A plan as our own process wrote it."""
    values = json.loads(data)
    return _Plan(**dict(values, account=Account(*values["account"]), profile=Profile(*values["profile"])))


class _Started(NamedTuple):
    """A script that runs, and our ends of its pipes."""

    pid: int
    stdin: int
    stdout: int
    stderr: int


def _script_environment(request: JobRequest, account: Account, host: str) -> dict:
    return {
        "PATH": SAFE_PATH,
        "HOME": account.home,
        "USER": account.user,
        "SHELL": account.shell,
        "LANG": os.environ.get("LANG", "C.UTF-8"),
        "TZ": os.environ.get("TZ", ":/etc/localtime"),  # what libc does without TZ
        "CTRL_EXEC_REQID": request.reqid,
        "CTRL_EXEC_SCRIPT": request.script,
        "CTRL_EXEC_DISPATCHER": request.owner,
        "CTRL_EXEC_HOST": host,
    }


def _apply_profile(plan: _Plan) -> None:
    """In the child, before exec: limits, then the user, then what must survive the change of user."""
    import resource

    profile, account = plan.profile, plan.account
    if profile.no_new_privileges:
        import ctypes  # now: a limit, or the other user's rights, could keep its files from being read

        prctl = ctypes.CDLL(None, use_errno=True).prctl
    if profile.nice:
        os.setpriority(os.PRIO_PROCESS, 0, profile.nice)
    if profile.cpu_seconds:
        resource.setrlimit(resource.RLIMIT_CPU, (profile.cpu_seconds, profile.cpu_seconds))
    if profile.open_files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (profile.open_files, profile.open_files))
    elif plan.open_files:
        lower_descriptor_limit(plan.open_files)
    if os.geteuid() == 0:
        os.setgroups(account.groups)
        os.setresgid(account.gid, account.gid, account.gid)
        os.setresuid(account.uid, account.uid, account.uid)
    pr_set_no_new_privs = 38  # prctl(2); Python has no call of its own for it
    if profile.no_new_privileges and prctl(pr_set_no_new_privs, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "no_new_privileges")
    if profile.memory:  # last: we are larger than some limits ourselves, and could not even grow our stack
        resource.setrlimit(resource.RLIMIT_AS, (profile.memory, profile.memory))


class Stage:
    """A process that waits to be told which script to become. It is forked before anybody asks for a run,
    which takes its cost off the run; and it ends by itself when we do, so that a run's record can be on disk,
    with the script's pid, before the script does anything."""

    def __init__(self) -> None:
        """Fork, no shell. Raises Unavailable when there is no process to be had."""
        try:
            pipes = [os.pipe() for _ in range(5)]  # stdin, stdout, stderr, our plan, its word about exec
            theirs = (pipes[0][0], pipes[1][1], pipes[2][1], pipes[3][0], pipes[4][1])
            self._ours = (pipes[0][1], pipes[1][0], pipes[2][0], pipes[3][1], pipes[4][0])
            self.pid = os.fork()
        except OSError as error:  # our caller is a supervisor, and ends: the kernel closes the pipes
            raise Unavailable("cannot start a process: %s" % error.strerror, "try again later") from error
        if self.pid == 0:
            self._wait(theirs)
        for descriptor in theirs:
            os.close(descriptor)

    def _wait(self, theirs: tuple) -> None:
        """The process's own life; never returns."""
        try:
            os.setsid()
            close_descriptors(theirs)
            for number in range(3):
                os.dup2(theirs[number], number)  # all our other descriptors are close-on-exec
            reset_signals()
            set_title("cea: script")
            os.umask(0o022)
            os.chdir("/")
            with open(theirs[3], "rb") as file:
                text = file.read()
            if text:
                plan = _decode_plan(text)
                _apply_profile(plan)
                os.execve(plan.path, [plan.path, *plan.args], plan.environment)
        except BaseException as error:
            code = getattr(error, "errno", None) or 0
            said = "%d %s" % (code, getattr(error, "strerror", None) or error)
            os.write(theirs[4], said.encode("utf-8", "replace"))
        finally:
            os._exit(126)

    def play(self, plan: _Plan) -> _Started:
        """Let it execute the script. Raises OSError from its attempt."""
        with open(self._ours[3], "wb") as file:
            file.write(encode_json(plan._asdict()))
        failure = os.read(self._ours[4], 4096)  # ends when exec has closed the other end, or with its word
        os.close(self._ours[4])
        if failure:
            os.waitpid(self.pid, 0)
            code, _, text = failure.decode("utf-8", "replace").partition(" ")
            raise OSError(int(code), text)
        return _Started(self.pid, *self._ours[:3])

    def close(self) -> None:
        """There is nothing to play."""
        for descriptor in self._ours:
            os.close(descriptor)
        os.waitpid(self.pid, 0)


# --- watching it ----------------------------------------------------------------------------------------


class _Spool:
    """An output stream on its way to a file: keeps the first `limit` bytes and counts the rest."""

    def __init__(self, descriptor: int, limit: int) -> None:
        self._descriptor = descriptor
        self._room = limit
        self.dropped = 0

    def put(self, data: bytes) -> None:
        kept = 0
        try:
            while kept < min(len(data), self._room):
                kept += os.write(self._descriptor, data[kept : self._room])
        except OSError:  # a full disk: the script goes on, and what is lost is counted
            self._room = kept
        self._room -= kept
        self.dropped += len(data) - kept

    def close(self) -> None:
        os.close(self._descriptor)


class _Watch:
    """Feeds a script its request, takes its output, keeps its time limit, and waits for its end.

    running ──exit──→ draining (what background children still write, OUTPUT_GRACE_SECONDS) ──→ over
       └──time limit, SIGUSR1 (cancel)──→ TERM to all ──KILL_GRACE_SECONDS──→ KILL ──exit──→ draining
    """

    def __init__(
        self,
        script: _Started,
        stdin: bytes,
        spools: tuple,
        stdin_seconds: float,
        limit: int,
        window: Optional[Window],
        find_all: Callable,  # () to the processes that the run has
    ) -> None:
        self._script = script
        self._find_all = find_all
        self._stdin = memoryview(stdin)
        self._sinks = {script.stdout: spools[0], script.stderr: spools[1]}
        self._stdin_deadline = Deadline(stdin_seconds)
        self._limit = Deadline(limit) if limit else None
        self._kill: Optional[Deadline] = None
        self._drain: Optional[Deadline] = None
        self._cancel_asked = False
        self._window = window
        self.wait_status: Optional[int] = None
        self.timed_out = False
        self.cancelled = False
        self.stdin_timed_out = False
        self._poller = select.poll()
        for descriptor in (script.stdout, script.stderr):
            os.set_blocking(descriptor, False)
            self._poller.register(descriptor, select.POLLIN)
        os.set_blocking(script.stdin, False)
        self._poller.register(script.stdin, select.POLLOUT)
        self._stdin_open = True

    def run(self) -> None:
        """Until the script has ended and its output has been taken."""
        wake, signaled = os.pipe()
        os.set_blocking(signaled, False)
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(signaled, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # so that it ends a poll
        signal.signal(signal.SIGUSR1, self._ask_cancel)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
        self._poller.register(wake, select.POLLIN)
        while True:
            self._look()  # after the handler is in place: an end before it would wake nobody
            if self._is_over():
                break
            self._show()
            for descriptor, _ in self._poller.poll(self._next_wait()):
                if descriptor == wake:
                    os.read(wake, 512)
                elif descriptor == self._script.stdin:
                    self._feed()
                elif descriptor in self._sinks:
                    self._take(descriptor)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
        signal.set_wakeup_fd(-1)
        if self._stdin_open:
            self._close_stdin()
        for descriptor in list(self._sinks):  # what the script wrote is taken, late as we may be
            self._take(descriptor)
        os.close(wake)
        os.close(signaled)

    def left_open(self) -> list:
        """The output streams that background processes still hold."""
        return list(self._sinks)

    def _ask_cancel(self, *_: object) -> None:
        self._cancel_asked = True

    def _show(self) -> None:
        """Let whoever follows have what is new; be woken when he can take more."""
        if self._window is None:
            return
        descriptor = self._window.channel.fileno()
        if self._window.pump():
            self._poller.register(descriptor, select.POLLOUT)
            return
        try:
            self._poller.unregister(descriptor)
        except KeyError:
            pass
        if not self._window.is_open:
            self._window = None

    def _is_over(self) -> bool:
        if self._drain is None or self._is_lingering():
            return False
        return not self._sinks or self._drain.is_over()

    def _is_lingering(self) -> bool:
        """Whether the script has ended at our TERM, and others of the run still use their grace."""
        if self._kill is None or self.wait_status is None:
            return False
        if not self._find_all():
            self._kill = None
        return self._kill is not None

    def _next_wait(self) -> float:
        """Milliseconds until something is due."""
        due = [deadline.left() for deadline in (self._limit, self._kill, self._drain) if deadline is not None]
        if self._stdin_open:
            due.append(self._stdin_deadline.left())
        if self._window is not None:
            due.append(self._window.wait_seconds())
        if self.wait_status is not None and self._kill is not None:
            due.append(0.05)  # nothing tells of the end of processes that are not our children
        return max(1, int(min(due) * 1000) + 1) if due else 3600_000

    def _feed(self) -> None:
        try:
            written = os.write(self._script.stdin, self._stdin[:65536])
            self._stdin = self._stdin[written:]
        except BlockingIOError:
            return
        except OSError:  # the script does not read it: its choice
            self._stdin = self._stdin[:0]
        if not self._stdin:
            self._close_stdin()

    def _close_stdin(self) -> None:
        self._poller.unregister(self._script.stdin)
        os.close(self._script.stdin)
        self._stdin_open = False

    def _take(self, descriptor: int) -> None:
        try:
            data = os.read(descriptor, 262144)
        except BlockingIOError:
            return
        if data:
            self._sinks[descriptor].put(data)
        else:
            self._poller.unregister(descriptor)
            os.close(descriptor)
            del self._sinks[descriptor]

    def _look(self) -> None:
        """See whether the script has ended, and do what is due."""
        for pid, status in reap_children():
            if pid == self._script.pid:
                self.wait_status = status
                self._limit = None
                self._drain = Deadline(OUTPUT_GRACE_SECONDS)
        if self._stdin_open and self._stdin_deadline.is_over():
            self.stdin_timed_out = bool(self._stdin)
            self._close_stdin()
        if self._limit is not None and self._limit.is_over():
            self.timed_out = True
            self._end_all()
        if self._cancel_asked and not (self.cancelled or self.timed_out) and self.wait_status is None:
            self.cancelled = True
            self._end_all()
        if self._kill is not None and self._kill.is_over():
            self._kill = None
            self._signal_all(signal.SIGKILL)

    def _end_all(self) -> None:
        self._limit, self._kill = None, Deadline(KILL_GRACE_SECONDS)
        self._signal_all(signal.SIGTERM)

    def _signal_all(self, number: int) -> None:
        is_told = self.wait_status is None  # once it is reaped, its number may be another group's
        if is_told:
            try:
                os.killpg(self._script.pid, number)
            except (ProcessLookupError, PermissionError):
                pass
        left = self._find_all()
        send_signal(number, [one for one in left if not (is_told and one.group == self._script.pid)])


# --- the supervisor -------------------------------------------------------------------------------------


def adopt_orphans() -> None:
    """Become the parent of every process below us that loses its own (PR_SET_CHILD_SUBREAPER of prctl(2)):
    then a run's processes are those below its supervisor, whatever sessions and groups they make."""
    pr_set_child_subreaper = 36  # without it, their session and their environment remain to know them by
    control_process(pr_set_child_subreaper, 1)


def _find_birth(pid: int) -> str:
    process = find_process(pid)
    return process.birth if process else ""


def _has_supervisor(record: RunRecord) -> bool:
    """Whether a run's supervisor lives, and is not another process that has got its number since. Without its
    birth (in records of older releases, and where there is no /proc) nothing is believed of the number."""
    return bool(record.supervisor_birth) and _find_birth(record.supervisor) == record.supervisor_birth


def find_run_processes(record: RunRecord) -> list:
    """The processes that a run still has: those below its supervisor, those of its session, and those that
    left both but were started with its request id. A number that belongs to somebody else's process by now
    is not believed."""
    marks = tuple(
        "CTRL_EXEC_%s=%s" % mark
        for mark in (("REQID", record.reqid), ("DISPATCHER", record.owner), ("HOST", record.host))
    )
    leader = find_process(record.pid)
    is_ours = leader is not None and leader.birth == record.birth
    found = {}
    if _has_supervisor(record):
        found = {process.pid: process for process in list_descendants(record.supervisor)}
    for process in list_processes():
        if (is_ours and process.session == record.pid) or process.has_variables(marks):
            found[process.pid] = process
    found.pop(os.getpid(), None)
    return list(found.values())


def _kill_run(record: RunRecord, cgroup: str = "") -> None:
    """Kill all that a run still has, again and again until nothing is left: a script may fork as it dies."""
    deadline = Deadline(KILL_GRACE_SECONDS)
    while not deadline.is_over():
        if cgroup:
            kill_cgroup(cgroup)
        if record.supervisor == os.getpid():
            kill_descendants()
        left = find_run_processes(record)
        if not left:
            return
        send_signal(signal.SIGKILL, left)


def _end_run(record: RunRecord) -> None:
    """TERM, and KILL after the grace, to what is left of a run that nobody watches any more."""
    deadline = Deadline(KILL_GRACE_SECONDS)
    left = find_run_processes(record)
    send_signal(signal.SIGTERM, left)
    while left and not deadline.is_over():
        time.sleep(0.05)
        left = find_run_processes(record)
    if left:
        _kill_run(record)


def settle_run(store: RunStore, record: RunRecord) -> RunRecord:
    """The record as it is true now: `running` without a supervisor becomes `interrupted`, and what the script
    has left ends. Raises StorageError."""
    if record.status == "done":
        return record
    claim = claim_run(store, record.owner, record.reqid)
    if claim < 0:
        return record
    try:
        latest = find_record(store, record.owner, record.reqid)
        if latest is None or latest.status == "done":
            return latest or record
        _end_run(latest)
        reason = "interrupted: the process that watched it ended without recording how; output may be lost"
        latest = latest._replace(
            status="done", interrupted=True, finished=iso_time(now()), exit=126, error=reason
        )
        write_record(store, latest, new=False)
        LOG.event("run", REQID=latest.reqid, SCRIPT=latest.script, DISPATCHER=latest.owner, INTERRUPTED="yes")
        return latest
    finally:
        os.close(claim)


_SLOT_NAME = re.compile(r"[A-Za-z0-9_-]{1,%d}\.[0-9]{1,9}" % MAX_SCRIPT_NAME)


def _spare_rules(rules: JobRules) -> JobRules:
    """The same for a run that the disk has no room for: its record goes where it is lost when the host
    restarts."""
    return rules._replace(store=rules.store._replace(directory=os.path.join(rules.spare_dir, "runs")))


def _settle_request(store: RunStore, owner: str, reqid: str) -> None:
    """See to a run that may have lost its supervisor. Raises StorageError when that cannot be recorded."""
    try:
        record = find_record(store, owner, reqid)
    except StorageError as error:  # as after a power failure: that must not stop the script for good
        LOG.event("run-store-fail", REQID=reqid, MESSAGE=error.message)
        record = None
    if record is not None:
        settle_run(store, record)


def _settle_holder(rules: JobRules, lock: FileLock) -> None:
    """See to the run that held a script's lock last, if it died without giving it back."""
    owner, _, reqid = lock.read().partition(" ")
    if HOST_NAME.fullmatch(owner) and REQUEST_ID.fullmatch(reqid):
        _settle_request(rules.store, owner, reqid)
    lock.write("")


def _settle_unrecorded(rules: JobRules) -> None:
    """See to the runs that the disk had no room for. Their locks may tell nothing, for the same reason."""
    store = _spare_rules(rules).store
    for directory, _, names in os.walk(store.directory):
        for name in names:
            if name.endswith(".json"):
                _settle_request(store, os.path.basename(directory), name[: -len(".json")])


def recover_jobs(rules: JobRules) -> None:
    """After somebody was killed: no record stays at `running`, no script goes on unwatched. Never raises."""
    try:
        if rules.spare_dir:
            _settle_unrecorded(rules)
    except (OSError, CtrlExecError) as error:
        LOG.event("run-store-fail", MESSAGE="recovery: %s" % error)
    try:
        names = os.listdir(rules.locks_dir)
    except OSError:  # nothing has ever run
        return
    for name in names:
        if not _SLOT_NAME.fullmatch(name):
            continue
        lock = FileLock(os.path.join(rules.locks_dir, name))
        try:
            # an empty one was given back: to take it could make a run that is about to start one too many
            if os.path.getsize(lock.path) and lock.acquire():
                _settle_holder(rules, lock)
        except (OSError, CtrlExecError) as error:
            LOG.event("run-store-fail", MESSAGE="recovery: %s" % error)
        lock.release()


def _acquire_slot(rules: JobRules, name: str) -> Optional[FileLock]:
    """A lock of the script's, or None when another run has it. Raises StorageError."""
    lock = FileLock(os.path.join(rules.locks_dir, name))
    try:
        make_directory(rules.locks_dir, 0o700)
        if not lock.acquire():
            return None
        if read_lock(os.path.join(rules.spare_dir, "locks", name)) is None:
            return lock
        lock.release()  # one that began when the disk had no room is still running
        return None
    except StorageError:  # it was never made, so nobody holds it
        if rules != _spare_rules(rules):
            raise
    directory = os.path.join(rules.spare_dir, "locks")
    make_directory(directory, 0o700)
    lock = FileLock(os.path.join(directory, name))
    return lock if lock.acquire() else None


def _name_holder(rules: JobRules, script: Script, owner: str) -> str:
    """Whose run has a script's lock, in words; of another dispatcher's there is its name alone. What cannot
    be read is not named."""
    spare_locks = os.path.join(rules.spare_dir, "locks")
    try:
        for store, locks in ((rules.store, rules.locks_dir), (_spare_rules(rules).store, spare_locks)):
            holder, _, reqid = (read_lock(os.path.join(locks, script.name + ".0")) or "").partition(" ")
            if holder != owner and HOST_NAME.fullmatch(holder):
                return " (for dispatcher %s)" % holder
            record = find_record(store, owner, reqid) if holder and REQUEST_ID.fullmatch(reqid) else None
            if record is not None:
                return " (request %s of %s)" % (reqid, one_line(record.username) or "nobody named")
    except (OSError, StorageError):
        pass
    return ""


def _take_slot(rules: JobRules, script: Script, request: JobRequest) -> FileLock:
    """One of the script's `max_running` locks. Raises Busy. Held by the supervisor, it outlasts the agent."""
    for number in range(script.max_running):
        lock = _acquire_slot(rules, "%s.%d" % (script.name, number))
        if lock is None:
            continue
        try:
            _settle_holder(rules, lock)
            lock.write("%s %s" % (request.owner, request.reqid))
        except StorageError:
            if rules != _spare_rules(rules):
                lock.release()
                raise
        return lock
    holder = _name_holder(rules, script, request.owner)
    hint = "max_running in scripts.conf allows more at once"
    raise Busy("%s is already running here%s" % (script.name, holder), hint)


def _time_limit(rules: JobRules, script: Script, asked: int) -> int:
    """Seconds a run may take: the most specific of the agent's own limits; a caller can only shorten it."""
    allowed = script.timeout or script.profile.timeout or rules.script_timeout
    return min(asked, allowed) if asked and allowed else asked or allowed


def _signal_name(number: int) -> str:
    """`SIGKILL`, or `signal 40` for one without a name (the real-time signals)."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return "signal %d" % number


def _finish_record(record: RunRecord, watch: _Watch, spools: tuple) -> RunRecord:
    status = watch.wait_status or 0
    name = _signal_name(os.WTERMSIG(status)) if os.WIFSIGNALED(status) else ""
    code = 126 if name else os.WEXITSTATUS(status)
    return record._replace(
        status="done",
        finished=iso_time(now()),
        exit=124 if watch.timed_out else code,
        signal=name,
        timed_out=watch.timed_out,
        cancelled=watch.cancelled,
        stdout_truncated=spools[0].dropped,
        stderr_truncated=spools[1].dropped,
    )


def _permit(rules: JobRules, request: JobRequest) -> tuple:
    """What the request may start: (script, account, real path). Raises ScriptRefused."""
    script = rules.scripts.get(request.script)
    if script is None:
        raise ScriptRefused("script not permitted")
    return script, check_profile(script.profile), check_script(script, rules.script_dirs, rules.strict_modes)


def _render_context(request: JobRequest, record: RunRecord) -> bytes:
    """What a script reads on stdin."""
    context = {
        key: getattr(request, key) for key in ("script", "args", "reqid", "peer_ip", "username", "token")
    }
    return encode_json(dict(context, dispatcher=request.owner, timestamp=record.started))


def _update_record(rules: JobRules, record: RunRecord) -> None:
    """Write what is known now. The disk may have filled up: the caller still learns how the run ended."""
    try:
        write_record(rules.store, record, new=False)
    except StorageError as error:
        LOG.event("run-store-fail", REQID=record.reqid, MESSAGE=error.message)


def _describe_exec_error(path: str, error: OSError) -> str:
    why = error.strerror
    if error.errno == errno.ENOENT and os.path.exists(path):
        why = "the interpreter of its first line does not exist"
    elif error.errno == errno.ENOEXEC:
        why += " (no program, and no #! in its first line)"
    return "cannot execute %s: %s" % (path, why)


class Job:
    """One run, from its record to its end.

    Order is what makes it safe to be killed at any point: the claim on the request id, the script's lock, the
    record with the pid of a process that waits, and only then the script. The claim comes first because who
    repeats a request must see the first one's, and not that the script is busy with it.
    """

    def __init__(self, rules: JobRules, request: JobRequest, stage: Stage) -> None:
        """Permit, lock, record and start. Raises ScriptRefused, Busy, Unavailable, StorageError, and
        FileExistsError when this request id has run or runs already."""
        self._rules = rules
        self._request = request
        self._script, account, path = _permit(rules, request)
        self._spools: tuple = ()
        self._started: Optional[_Started] = None
        self._cgroup = ""
        self._left_open: list = []
        claim = self._claim()
        try:
            self._lock = _take_slot(rules, self._script, request)
        except BaseException:  # it does not run, so its id is free again
            os.unlink(record_path(rules.store, request.owner, request.reqid, STREAMS["stdout"]))
            os.close(claim)
            raise
        try:
            self._open_spools(claim)
            environment = _script_environment(request, account, rules.host)
            profile = self._script.profile
            self._start(stage, _Plan(path, request.args, environment, account, profile, rules.open_files))
        except BaseException:
            self._release()
            raise

    def _claim(self) -> int:
        store, request = self._rules.store, self._request
        claim = claim_run(store, request.owner, request.reqid)
        if claim < 0:
            raise FileExistsError(request.reqid)
        if find_record(store, request.owner, request.reqid) is not None:
            os.close(claim)
            raise FileExistsError(request.reqid)
        return claim

    def _open_spools(self, claim: int) -> None:
        store, request = self._rules.store, self._request
        path = record_path(store, request.owner, request.reqid, STREAMS["stderr"])
        try:
            os.ftruncate(claim, 0)  # left by a run that never got its record
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
            other = os.open(path, flags, 0o640)
            if store.file_owner is not None:
                os.fchown(other, store.file_owner.uid, store.file_owner.gid)
        except OSError as error:
            raise StorageError("cannot write %s: %s" % (path, error.strerror)) from error
        self._spools = tuple(_Spool(file, self._rules.max_output) for file in (claim, other))

    def _start(self, stage: Stage, plan: _Plan) -> None:
        request = self._request
        process = find_process(stage.pid)
        self.record = RunRecord(
            request.reqid, request.owner, request.script, self._rules.host, request.username,
            request.peer_ip, "running", iso_time(now()), stage.pid, process.birth if process else "",
            os.getpid(), _find_birth(os.getpid()),
        )  # fmt: skip
        try:
            write_record(self._rules.store, self.record, new=True)
        except BaseException:  # it does not run, so its id is free again
            for suffix in STREAMS.values():
                os.unlink(record_path(self._rules.store, request.owner, request.reqid, suffix))
            raise
        cgroup = os.path.join(self._rules.cgroup, "run-%s-%d" % (request.reqid, stage.pid))
        if self._rules.cgroup and enter_cgroup(cgroup, stage.pid):
            self._cgroup = cgroup
        try:
            self._started = stage.play(plan)
        except OSError as error:
            reason = _describe_exec_error(plan.path, error)
            self._close(self.record._replace(status="done", finished=iso_time(now()), exit=126, error=reason))

    def finish(self, window: Optional[Window] = None) -> RunRecord:
        """Watch it to its end, while `window` shows it; the record as it is then."""
        if self._started is None:
            return self.record
        record = self.record
        limit = _time_limit(self._rules, self._script, self._request.timeout)
        stdin = _render_context(self._request, record)
        watch = _Watch(
            self._started, stdin, self._spools, self._rules.stdin_timeout, limit, window,
            lambda: find_run_processes(record),
        )  # fmt: skip
        watch.run()
        self._left_open = watch.left_open()
        if watch.timed_out or watch.cancelled:
            _kill_run(record, self._cgroup)
        if watch.stdin_timed_out:
            LOG.event("stdin-timeout", REQID=record.reqid, SCRIPT=record.script)
        self._close(_finish_record(record, watch, self._spools))
        return self.record

    def _close(self, record: RunRecord) -> None:
        """Record the end, give back the lock, then the claim: whoever waits for that finds all of it."""
        self.record = record
        _update_record(self._rules, record)
        self._release()
        who = {"DISPATCHER": record.owner, "PEER": record.peer_ip, "USERNAME": record.username}
        LOG.event("run", REQID=record.reqid, SCRIPT=record.script, EXIT=record.exit, **who)

    def _release(self) -> None:
        try:
            self._lock.write("")
        except StorageError:  # it names a run that has ended, which is no matter
            pass
        self._lock.release()
        for spool in self._spools:
            spool.close()
        self._spools = ()
        if self._cgroup:
            leave_cgroup(self._cgroup)

    def drain(self) -> None:
        """Leave a process that takes what background processes of the run still write, to nowhere, for as
        long as they live: else SIGPIPE would end a daemon at its first word if nobody had redirected its
        output. The parent ends, and so gives up those that it has adopted."""
        if not self._left_open:
            return
        try:
            if os.fork():
                return
        except OSError:  # then this process does it
            pass
        try:
            self._take_all()
        finally:
            os._exit(0)

    def _take_all(self) -> None:
        set_title("cea: drain")
        nowhere = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):  # nobody who waits for the end of the agent's output is to wait for a daemon
            os.dup2(nowhere, number)
        close_descriptors(self._left_open)
        poller = select.poll()
        for descriptor in self._left_open:
            poller.register(descriptor, select.POLLIN)
        while self._left_open:
            for descriptor, _ in poller.poll():
                if not os.read(descriptor, 65536):
                    poller.unregister(descriptor)
                    self._left_open.remove(descriptor)
        if self._cgroup:
            leave_cgroup(self._cgroup)


def inspect_scripts(rules: JobRules) -> list:
    """The allowlist as `capabilities` shows it, each file as it is now."""
    shown = []
    for script in rules.scripts.values():
        user = ""
        try:
            user = check_profile(script.profile).user
            executable = os.access(check_script(script, rules.script_dirs, rules.strict_modes), os.X_OK)
        except ScriptRefused:
            executable = False
        entry = {
            "name": script.name,
            "path": script.path,
            "executable": executable,
            "profile": script.profile.name,
            "user": user,
        }
        if script.schema is not None:
            entry.update(schema=script.schema, schema_version=script.schema_version)
        shown.append(entry)
    return shown


# --- between front and supervisor: a socketpair per request ---------------------------------------------
# front → supervisor: 4 bytes of length, a JobRequest as JSON
# supervisor → front: one line of JSON, {"event": "refused" | "answer", "status", ...}; after `answer` a body


def send_job(channel: socket.socket, request: JobRequest) -> None:
    data = encode_json(request._asdict())
    channel.sendall(len(data).to_bytes(4, "big") + data)


_JOB_FIELDS = (
    Field("operation", str, True, 16),
    Field("reqid", str, most=64),
    Field("owner", str, most=MAX_NAME),
    Field("peer_ip", str, most=64),
    Field("script", str, most=MAX_SCRIPT_NAME),
    Field("args", list, most=10000),
    Field("username", str, most=256),
    Field("token", str, most=8192),
    Field("timeout", int, most=10**9),
    Field("mode", str, most=16),
    Field("wait", int, most=MAX_RESULT_WAIT),
    Field("stdout", int, most=10**15, least=-1),
    Field("stderr", int, most=10**15, least=-1),
    Field("serial", str, most=64),
    Field("body", str, most=MAX_BODY),
    Field("time", str, most=64),
    Field("proof", str, most=64),
)


def _receive_job(channel: socket.socket, operations: Iterable) -> JobRequest:
    """The front's request, checked again: the front is the process that strangers talk to."""
    reader, deadline = Channel(channel), Deadline(BODY_SECONDS)
    size = int.from_bytes(reader.read_exactly(4, deadline), "big")
    if size > 8 * MAX_BODY:  # JSON text of 1 MiB can be longer when written again
        raise TooLarge("a job request of %d bytes" % size)
    values = parse_fields(reader.read_exactly(size, deadline), _JOB_FIELDS)
    if values["operation"] not in operations or values["mode"] not in ("sync", "async", "stream"):
        raise BadRequest("field `operation` is malformed", "operation")
    if values["operation"] != "inspect":
        patterns = {"reqid": REQUEST_ID, "owner": HOST_NAME}
        if values["operation"] == "run":
            patterns["script"] = SCRIPT_NAME
        for field, pattern in patterns.items():
            if not pattern.fullmatch(values[field]):
                raise BadRequest("field `%s` is malformed" % field, field)
    return JobRequest(**dict(values, args=tuple(values["args"])))


def _answer(channel: socket.socket, status: int, pieces: Iterable) -> None:
    def chain() -> Iterator[bytes]:
        yield encode_json({"event": "answer", "status": status}) + b"\n"
        yield from pieces

    channel.settimeout(WRITE_SECONDS)
    send_pieces(channel, chain())
    channel.close()


def _await_run(channel: socket.socket, store: RunStore, record: RunRecord, seconds: float) -> RunRecord:
    """A run of another supervisor, once it has ended, `seconds` are over, or nobody waits any more."""
    deadline = Deadline(seconds)

    def is_over() -> bool:
        return deadline.is_over() or has_hung_up(channel)

    record = settle_run(store, record)
    while record.status != "done" and not is_over():
        time.sleep(0.01)  # a claim that is free and not to be had is one that somebody only looks at
        wait_for_end(store, record.owner, record.reqid, is_over)
        latest = find_record(store, record.owner, record.reqid)
        if latest is None:  # it was swept
            break
        record = settle_run(store, latest)
    return record


def _follow_run(channel: socket.socket, store: RunStore, record: RunRecord, offsets: dict) -> None:
    """Show a run of another supervisor until its end."""
    send_pieces(channel, [encode_json({"event": "answer", "status": 200}) + b"\n"])
    window = Window(channel, store, record.owner, record.reqid, offsets)
    output = record_path(store, record.owner, record.reqid, STREAMS["stdout"])
    poller = select.poll()
    while window.is_open:
        has_ended = not is_claimed(output)  # first: what was written before the end is seen after it
        if window.pump():
            poller.register(channel.fileno(), select.POLLOUT)
            poller.poll(WRITE_SECONDS * 1000)
        elif has_ended:
            break
        else:
            poller.register(channel.fileno(), select.POLLRDHUP)
            poller.poll(FOLLOW_SECONDS * 1000)
    record = find_record(store, record.owner, record.reqid) or record
    window.finish(_await_run(channel, store, record, KILL_GRACE_SECONDS + 10))
    channel.close()


def _serve_again(
    channel: socket.socket, rules: JobRules, request: JobRequest, stage: Stage, record: RunRecord
) -> None:
    """The same request once more: what it is told is how the first one goes."""
    stage.close()
    if request.mode == "async":
        _answer(
            channel, 202, [encode_json({"status": "accepted", "reqid": record.reqid, "host": record.host})]
        )
    elif request.mode == "stream":
        _follow_run(channel, rules.store, record, dict.fromkeys(STREAMS, 0))
    else:
        record = _await_run(channel, rules.store, record, 10**9)
        _answer(channel, 200, render_result(rules.store, record))


def _do_without_disk(rules: JobRules, request: JobRequest, error: StorageError) -> JobRules:
    """The rules for a run that cannot be recorded. Raises ScriptRefused unless the allowlist lets it run."""
    LOG.event("run-store-fail", REQID=request.reqid, SCRIPT=request.script, MESSAGE=error.message)
    spare = _spare_rules(rules)
    is_allowed = rules.scripts[request.script].unrecorded and rules.spare_dir
    if not is_allowed or rules == spare:
        message = "not started, because the run cannot be recorded: " + error.message
        if not is_allowed:
            message += "; make room there, or say unrecorded=yes for the script in scripts.conf"
        raise ScriptRefused(message) from error
    return spare


def _serve_run(channel: socket.socket, rules: JobRules, request: JobRequest, stage: Stage) -> None:
    """Run a script to its end, whether or not somebody stays to see it."""
    job, deadline = None, Deadline(5)
    while job is None:
        record = find_record(rules.store, request.owner, request.reqid)
        if record is not None:
            return _serve_again(channel, rules, request, stage, record)
        try:
            job = Job(rules, request, stage)
        except FileExistsError:  # the same request is about to start, or to be refused
            if deadline.is_over():
                raise Busy("request %s is about to start" % request.reqid, "ask for its result") from None
            time.sleep(0.01)
        except StorageError as error:
            rules = _do_without_disk(rules, request, error)
    if request.mode == "async":
        accepted = {"status": "accepted", "reqid": request.reqid, "host": rules.host}
        _answer(channel, 202, [encode_json(accepted)])
        job.finish()
    elif request.mode == "stream":
        send_pieces(channel, [encode_json({"event": "answer", "status": 200}) + b"\n"])
        window = Window(channel, rules.store, request.owner, request.reqid, dict.fromkeys(STREAMS, 0))
        window.finish(job.finish(window))
        channel.close()
    else:
        _answer(channel, 200, render_result(rules.store, job.finish()))
    job.drain()


def _find_rules(rules: JobRules, request: JobRequest) -> JobRules:
    """The rules with the store in which the run that a request is about has its record."""
    spare = _spare_rules(rules)
    path = request.reqid and record_path(spare.store, request.owner, request.reqid, ".json")
    return spare if rules.spare_dir and path and os.path.exists(path) else rules


def _serve_inspect(channel: socket.socket, rules: JobRules, _: JobRequest) -> None:
    _answer(channel, 200, [encode_json({"scripts": inspect_scripts(rules)})])


def _get_record(rules: JobRules, request: JobRequest) -> RunRecord:
    """The run a request asks about. Raises NotFound: another dispatcher's run does not exist for this one."""
    record = find_record(rules.store, request.owner, request.reqid)
    if record is None:
        raise NotFound("no such request: %s" % request.reqid)
    return record


def _serve_result(channel: socket.socket, rules: JobRules, request: JobRequest) -> None:
    """How a run goes: at once, or when it has ended, but not later than `wait` seconds."""
    record = _await_run(channel, rules.store, _get_record(rules, request), request.wait)
    if record.status == "done":
        _answer(channel, 200, render_result(rules.store, record))
    else:
        _answer(channel, 200, [encode_json(describe_run(record))])


def _serve_follow(channel: socket.socket, rules: JobRules, request: JobRequest) -> None:
    offsets = {"stdout": request.stdout, "stderr": request.stderr}
    _follow_run(channel, rules.store, _get_record(rules, request), offsets)


def _is_older_supervisor(record: RunRecord) -> bool:
    """Whether it looks like a supervisor of a release that did not record its birth."""
    process = find_process(record.supervisor) if not record.supervisor_birth else None
    return process is not None and process.pid == process.session and is_own_title(process.name)


def _ask_supervisor(store: RunStore, record: RunRecord) -> None:
    """Ask a run's supervisor to end it. A claim means that it lives, so that its number is nobody else's; but
    whoever settles the run of a dead one holds that claim as well, for a moment."""
    if not _has_supervisor(record) and not _is_older_supervisor(record):
        return
    if is_claimed(record_path(store, record.owner, record.reqid, STREAMS["stdout"])):
        try:
            os.kill(record.supervisor, signal.SIGUSR1)
            os.kill(record.supervisor, signal.SIGCONT)  # its script may have stopped it
        except OSError:  # it has just ended
            pass


def _serve_cancel(channel: socket.socket, rules: JobRules, request: JobRequest) -> None:
    """End a run: its supervisor is asked, so that its record is true; then see what is left."""
    record = settle_run(rules.store, _get_record(rules, request))
    had = []
    if record.status != "done":
        had = find_run_processes(record)
        _ask_supervisor(rules.store, record)
        record = _await_run(channel, rules.store, record, KILL_GRACE_SECONDS + 10)
    left = find_run_processes(record)
    deadline = Deadline(1)
    while had and left and not deadline.is_over():  # what was killed needs a moment
        time.sleep(0.02)
        left = find_run_processes(record)
    status = "running" if record.status != "done" else "cancelled" if record.cancelled else "done"
    body = dict(describe_run(record), status=status, processes_left=len(left))
    body["processes_ended"] = len({process.pid for process in had} - {process.pid for process in left})
    body["left"] = ["%d %s" % (process.pid, process.name) for process in left[:20]]
    LOG.event("cancel", REQID=record.reqid, SCRIPT=record.script, DISPATCHER=record.owner, STATUS=status)
    _answer(channel, 200, [encode_json(body)])


_QUESTIONS = {
    "inspect": _serve_inspect,
    "result": _serve_result,
    "follow": _serve_follow,
    "cancel": _serve_cancel,
}


def serve_job(control: socket.socket, rules: JobRules, tasks: dict, check: Callable, note: Callable) -> None:
    """A supervisor's life: wait for a request, do it, answer, tidy up.

    It begins before there is a request: over `control` comes a channel to whoever makes one, or the end.
    `check` raises what speaks against a request of a trusted dispatcher; `note` is told of the others.
    `tasks` are the requests that are not about runs: a function for each operation, which gets the request
    and returns the answer's object, or raises a CtrlExecError.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])  # a cancel that comes early waits
    adopt_orphans()
    stage = Stage()
    channel = receive_socket(control)[1]
    control.close()
    if channel is None:
        return stage.close()
    channel.settimeout(BODY_SECONDS)
    try:
        request = _receive_job(channel, ("run", *_QUESTIONS, *tasks))
        if rules.trusted.get(request.serial) != request.owner:  # a front that drains has older rules
            raise Denied("serial mismatch")
        check(request)
        note(request)
        if request.operation in ("run", *_QUESTIONS):
            rules = _find_rules(rules, request)
        if request.operation == "run":
            _serve_run(channel, rules, request, stage)
        else:
            stage.close()
            if request.operation in tasks:
                _answer(channel, 200, [encode_json(tasks[request.operation](request))])
            else:
                _QUESTIONS[request.operation](channel, rules, request)
    except CtrlExecError as error:
        if isinstance(error, StorageError):
            LOG.event("run-store-fail", MESSAGE=error.message)
        refusal = {"event": "refused", "code": error.code, "status": error.http_status}
        channel.settimeout(WRITE_SECONDS)
        send_pieces(channel, [encode_json(dict(refusal, error=error.message)) + b"\n"])
    channel.close()
    sweep_records(rules.store)
    if rules.spare_dir:
        sweep_records(_spare_rules(rules).store)
    if rules.cgroup:
        for entry in os.scandir(rules.cgroup):  # of runs whose daemons have ended since
            if entry.name.startswith("run-"):
                leave_cgroup(entry.path)


# ======================================================================================================
# 14. EXECUTOR
# Owns:  the agent's parent process: it binds the port, keeps a front alive that serves from one bundle,
#        forks a supervisor for each request, and reaps. It takes nothing from the network.
# Uses:  HEAD, ERRORS, GROUND, WIRE
# ======================================================================================================


class _Front:
    """A front process as its parent sees it."""

    def __init__(self, pid: int, control: socket.socket) -> None:
        self.pid = pid
        self.control: Optional[socket.socket] = control
        self.started = time.monotonic()
        self.draining = False
        self.accepts = True  # until it says that it has closed its listening sockets

    def tell(self, word: bytes) -> None:
        self.draining = True
        try:
            if self.control is not None:
                self.control.send(word)
        except OSError:
            pass

    def hang_up(self) -> None:
        """It said its last word; what remains is to reap it."""
        if self.control is not None:
            self.control.close()
        self.control = None


class _Backoff:
    """When to try again: at once the first time, then after a pause that doubles up to a minute."""

    def __init__(self, first: float) -> None:
        self._first = first
        self._pause = 0.0
        self._at: Optional[float] = None  # monotonic

    def schedule(self) -> None:
        self._at = time.monotonic() + self._pause
        self._pause = min(60.0, max(self._first, self._pause * 2))

    def is_due(self) -> bool:
        """Whether it was scheduled and the time has come; it is scheduled no more then."""
        if self._at is None or time.monotonic() < self._at:
            return False
        self._at = None
        return True

    def is_pending(self) -> bool:
        return self._at is not None

    def left(self) -> float:
        """Seconds until it is due, a minute when nothing is scheduled."""
        return 60.0 if self._at is None else max(0.0, self._at - time.monotonic())

    def cancel(self) -> None:
        """What was to be tried again has been done."""
        self._at = None

    def reset(self) -> None:
        """All is well: the next failure is the first."""
        self._pause, self._at = 0.0, None


class _Spare(NamedTuple):
    """A supervisor that waits for its request, and our end of what it waits at."""

    pid: int
    control: socket.socket


def _fork_child(title: str, life: Callable, *descriptors: int) -> int:
    """A process of its own session that does `life()` and keeps only these descriptors; its pid."""
    pid = os.fork()
    if pid:
        return pid
    status = EXIT_BUG
    try:
        reset_signals()
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        os.setsid()
        set_title(title)
        close_descriptors([LOG.descriptor(), *descriptors])
        life()
        status = 0
    except BaseException as error:
        log_bug(error)
    finally:
        os._exit(status)


class _Supervisors:
    """The supervisors that run, and one more that waits, so that a run does not wait for it to be forked."""

    def __init__(self, fork: Callable) -> None:
        """`fork(control)`: a process that reads its request from `control`; returns its pid."""
        self._fork = fork
        self._pids: set = set()
        self._spare: Optional[_Spare] = None
        self.refork = _Backoff(0.5)  # after one that has died unused

    def pass_on(self, channel: socket.socket) -> None:
        """Give a request to the supervisor that waits for one, or to a new one. Raises OSError."""
        if len(self._pids) >= MAX_SUPERVISORS:
            raise OSError(errno.EAGAIN, "%d are running" % MAX_SUPERVISORS)
        for _ in range(2):
            spare = self._spare or self._fork_one()
            self._spare = None
            with spare.control:
                try:
                    socket.send_fds(spare.control, [b"job"], [channel.fileno()])
                    self._pids.add(spare.pid)
                    return
                except (BrokenPipeError, ConnectionError):  # it was killed while it waited
                    continue
        raise OSError(errno.EAGAIN, "supervisors die at once")

    def _fork_one(self) -> _Spare:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                return _Spare(self._fork(theirs), ours)
            except OSError:
                ours.close()
                raise

    def keep_spare(self) -> None:
        """Have a supervisor ready."""
        if self._spare is not None or len(self._pids) >= MAX_SUPERVISORS:
            return
        if self.refork.is_pending() and not self.refork.is_due():
            return
        try:
            self._spare = self._fork_one()
        except OSError:  # the next run will try, and say so
            pass

    def dismiss_spare(self) -> None:
        """The bundle that it was forked with is not served any more."""
        if self._spare is not None:
            self._spare.control.close()
        self._spare = None

    def note_end(self, pid: int) -> bool:
        """A child has ended; whether it was a supervisor that had a request."""
        if self._spare is not None and pid == self._spare.pid:
            self.dismiss_spare()
            self.refork.schedule()
        if pid not in self._pids:
            return False
        self.refork.reset()
        self._pids.discard(pid)
        return True


class Executor:
    """The agent's parent process: single-threaded, no network input. It holds one bundle, keeps one front
    alive that serves from it, forks a supervisor for each request, and reaps. What a bundle is, and what its
    children do, is its caller's:

    load(previous)                     a new bundle with .listening; raises a CtrlExecError
    listen_again(bundle)               what there is to listen on by now: Listening
    run_front(bundle, control)         a front's life; returns its exit status when it has drained
    supervise(bundle, control, order)  a supervisor's life; `order()` has the bundle loaded anew and returns
                                       when the new one is served, or raises Unavailable
    recover(bundle)                    settles what supervisors that were killed have left
    note_reload(begun, ended, error)   how many reloads have begun and ended, and what the last one met
    """

    def __init__(
        self,
        load: Callable,
        listen_again: Callable,
        run_front: Callable,
        supervise: Callable,
        recover: Callable,
        note_reload: Callable,
    ) -> None:
        self._load = load
        self._note_reload = note_reload
        self._reloads = 0
        self._listen_again = listen_again
        self._run_front = run_front
        self._supervise = supervise
        self._recover = recover
        self._bundle: Any = None
        self._fronts: dict = {}  # pid to _Front
        self._supervisors = _Supervisors(self._fork_supervisor)
        self._is_recovery_due = True  # at the start, and whenever a supervisor was killed
        self._restart = _Backoff(0.5)  # until a dead front is replaced
        self._listen = _Backoff(1.0)  # until what cannot be listened on is tried again
        self._wake, self._signaled = socket.socketpair()
        self._orders, self._ordering = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._pending: set = set()  # signals to act on

    def catch_signals(self) -> None:
        """Keep for `run` what comes from now on: whoever finds a process that starts may send it SIGHUP."""
        for end in (self._wake, self._signaled):
            end.setblocking(False)
        signal.set_wakeup_fd(self._signaled.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, lambda caught, _: self._pending.add(caught))
        signal.signal(signal.SIGINT, lambda *_: self._pending.add(signal.SIGTERM))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGHUP])

    def run(self) -> int:
        """Serve until SIGTERM or SIGINT; returns the exit status. Raises what the first load raises."""
        self._bundle = self._load(None)
        import base64, codecs, grp, pwd, resource  # noqa: E401, F401 - once, and not in every child
        import gc

        try:
            import ctypes  # noqa: F401
        except ImportError:  # see control_process
            pass

        gc.freeze()  # what exists now is shared with all children; a collection would copy it for each
        set_title("cea: executor")
        if self._bundle.listening.faults:
            self._listen.schedule()
        self._start_front()
        self._start_recovery()
        self._supervisors.keep_spare()
        tell_systemd("READY=1\n" + self._bundle.listening.status())
        while signal.SIGTERM not in self._pending:
            self._turn()
        return self._stop()

    def _turn(self) -> None:
        """Wait for a signal or a front's word, and act on it."""
        poller = select.poll()
        poller.register(self._wake.fileno(), select.POLLIN)
        poller.register(self._orders.fileno(), select.POLLIN)
        by_descriptor = {front.control.fileno(): front for front in self._fronts.values() if front.control}
        for descriptor in by_descriptor:
            poller.register(descriptor, select.POLLIN)
        wait = min(backoff.left() for backoff in (self._restart, self._listen, self._supervisors.refork))
        ready = [descriptor for descriptor, _ in poller.poll(int(wait * 1000) + 1)]
        for descriptor in ready:
            if descriptor in by_descriptor:
                self._take_job(by_descriptor[descriptor])
            elif descriptor != self._orders.fileno():
                self._drop_wakeups()
        if self._orders.fileno() in ready:  # last: a reload takes what fronts say, and nothing is ready then
            self._take_order()
        self._reap()
        if signal.SIGHUP in self._pending:
            self._pending.discard(signal.SIGHUP)
            self._reload()
        if self._restart.is_due():
            self._start_front()
        if self._listen.is_due():
            self._try_to_listen()
        if self._is_recovery_due:
            self._start_recovery()
        self._supervisors.keep_spare()

    def _try_to_listen(self) -> None:
        """An address that was missing may be there by now."""
        listening = self._listen_again(self._bundle)
        if len(listening.faults) < len(self._bundle.listening.faults):
            self._serve_from(self._bundle._replace(listening=listening))
            tell_systemd(self._bundle.listening.status())
        if listening.faults:
            self._listen.schedule()
        else:
            self._listen.reset()

    def _drop_wakeups(self) -> None:
        try:
            while self._wake.recv(512):
                pass
        except BlockingIOError:
            pass

    def _start_front(self) -> None:
        self._restart.cancel()
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            pid = os.fork()
        except OSError as error:
            LOG.event("bug", MESSAGE="cannot fork a front: %s" % error.strerror)
            self._restart.schedule()
            return
        if pid:
            theirs.close()
            self._fronts[pid] = _Front(pid, ours)
            return
        status = EXIT_BUG
        try:
            reset_signals()
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the parent to act on
            signal.signal(signal.SIGTERM, lambda *_: None)  # a handler, because hooks would inherit SIG_IGN
            signal.signal(signal.SIGPIPE, signal.SIG_IGN)
            set_title("cea: front")
            listening = [listener.fileno() for listener in self._bundle.listening.sockets]
            close_descriptors([theirs.fileno(), LOG.descriptor(), *listening])
            status = self._run_front(self._bundle, theirs)
        except BaseException as error:
            log_bug(error)
        finally:
            os._exit(status)

    def _take_job(self, front: _Front) -> None:
        """A front passes one end of a socketpair: fork the supervisor that will read from it."""
        try:
            word, channel = receive_socket(front.control)
        except ConnectionResetError:  # it was killed before it read a word of ours: that is its end
            word, channel = b"", None
        except OSError as error:  # no descriptor left for it, for instance; its front sees the end
            LOG.event("bug", MESSAGE="a request was lost: %s" % error.strerror)
            return
        if word in (b"", b"closed"):
            front.accepts = False
            if not word:
                front.hang_up()
        if channel is None:
            return
        channel.settimeout(0)  # nothing that a front does may hold us
        try:
            self._supervisors.pass_on(channel)
        except OSError as error:
            reason = {"event": "refused", "code": "unavailable", "status": 503}
            reason["error"] = "cannot start a process: %s; try again later" % error.strerror
            send_pieces(channel, [encode_json(reason) + b"\n"])
        channel.close()

    def _fork_supervisor(self, control: socket.socket) -> int:
        bundle, kept = self._bundle, (control.fileno(), self._ordering.fileno())
        life = lambda: self._supervise(bundle, control, self._order_reload)  # noqa: E731
        return _fork_child("cea: supervisor", life, *kept)

    def _order_reload(self) -> None:
        """In a supervisor: have what it has changed on disk served, before it says that it is done."""
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                socket.send_fds(self._ordering, [b"reload"], [theirs.fileno()])
            ours.settimeout(BODY_SECONDS)
            said = ours.recv(4096).decode("utf-8", "replace")
        if said != "ok":
            raise Unavailable("the agent could not load what was changed: %s" % (said or "it has stopped"))

    def _take_order(self) -> None:
        try:
            _, channel = receive_socket(self._orders)
            if channel is not None:
                with channel:
                    channel.settimeout(0)
                    channel.sendall(one_line(self._reload() or "ok").encode("utf-8")[:4096])
        except OSError as error:
            LOG.event("bug", MESSAGE="an order was lost: %s" % error.strerror)

    def _start_recovery(self) -> None:
        self._is_recovery_due = False
        try:
            _fork_child("cea: recovery", lambda: self._recover(self._bundle))
        except OSError as error:
            LOG.event("bug", MESSAGE="cannot fork for recovery: %s" % error.strerror)
            self._is_recovery_due = True

    def _reap(self) -> None:
        for pid, status in reap_children():
            if self._supervisors.note_end(pid):
                self._is_recovery_due = self._is_recovery_due or status != 0
            front = self._fronts.pop(pid, None)
            if front is None:
                continue
            front.hang_up()
            front.accepts = False
            if not front.draining and signal.SIGTERM not in self._pending:
                if time.monotonic() - front.started > 60:
                    self._restart.reset()
                LOG.event("bug", MESSAGE="the front ended with status %d; it is replaced" % status)
                self._restart.schedule()

    def _reload(self) -> str:
        """Serve from a new bundle, if it is sound, or say what is wrong with it; a front that still answers
        keeps the one it began with."""
        self._reloads += 1
        self._note_reload(self._reloads, self._reloads - 1, "")
        tell_systemd("RELOADING=1\nMONOTONIC_USEC=%d" % (time.monotonic_ns() // 1000))
        error = self._load_anew()
        self._note_reload(self._reloads, self._reloads, error)
        return error

    def _load_anew(self) -> str:
        try:
            bundle = self._load(self._bundle)
        except CtrlExecError as error:
            LOG.event("reload", RESULT="kept the old configuration", ERROR=error.message)
            tell_systemd("READY=1\nSTATUS=reload failed: %s" % one_line(error.message))
            return error.message
        self._serve_from(bundle)
        self._listen.reset()
        if bundle.listening.faults:  # what was in the way may have been a socket of ours, which is closed now
            self._try_to_listen()
        LOG.event("reload", RESULT="ok")
        tell_systemd("READY=1\n" + self._bundle.listening.status())
        return ""

    def _serve_from(self, bundle: Any) -> None:
        """Replace the bundle and the front that serves from it."""
        earlier = list(self._fronts.values())
        kept = set(bundle.listening.sockets)
        previous, self._bundle = self._bundle, bundle
        self._supervisors.dismiss_spare()
        # First the old one stops accepting, then the new one begins: whoever connects after the event below
        # is served from the new bundle, and whoever connects in between waits in the kernel's queue.
        for front in earlier:
            front.tell(b"drain")
        deadline = Deadline(DRAIN_SECONDS)
        while any(front.accepts for front in earlier) and not deadline.is_over():
            for front in earlier:
                if front.control and select.select([front.control], [], [], 0.01)[0]:
                    self._take_job(front)
            self._reap()
        for front in earlier:
            if front.accepts:  # it hangs: nobody may be served from the old bundle after this
                LOG.event("bug", MESSAGE="a front did not stop accepting; it is killed")
                os.kill(front.pid, signal.SIGKILL)
        for listener in previous.listening.sockets:
            if listener not in kept:
                listener.close()  # before there is a front that would have it for a moment, too
        self._start_front()

    def _stop(self) -> int:
        """Let fronts finish what they answer; supervisors go on by themselves."""
        tell_systemd("STOPPING=1")
        self._supervisors.dismiss_spare()
        deadline = Deadline(DRAIN_SECONDS + 1)
        for front in self._fronts.values():
            front.tell(b"stop")
        for listener in self._bundle.listening.sockets:
            listener.close()
        while self._fronts and not deadline.is_over():
            for front in list(self._fronts.values()):
                if front.control and select.select([front.control], [], [], 0)[0]:
                    self._take_job(front)
            self._reap()
            time.sleep(0.01)
        for front in self._fronts.values():
            os.kill(front.pid, signal.SIGKILL)
        return 0


# ======================================================================================================
# 15. CUSTODY
# Owns:  what an agent changes about its own trust on the word of a dispatcher that it trusts: its
#        certificate, the CAs it believes, its trusted-dispatchers map; and what their clocks have said, by
#        which certificates are judged. It runs with the executor's rights, in a process of its own, and
#        believes of a request only what it can check.
# Uses:  HEAD, ERRORS, GROUND, OPENSSL, TRUST, JOBS
# On disk: agent.crt, ca.crt, ctrl-exec-dispatchers, revoked-serials, request-secrets.json (all in the forms
#          of TRUST); clocks.json, addresses.json
# ======================================================================================================


class Custody(NamedTuple):
    """Where an agent keeps what it is and whom it believes."""

    identity: Identity
    trust_map: str
    older_serial: str  # where an older release kept the one serial that it trusted
    revoked: str
    clocks: str  # where it is kept what dispatchers' clocks have said
    addresses: str  # ... and which addresses they have used
    secrets: str  # ... and what proves their requests
    host: str  # the name in its certificate


class ClockNote(NamedTuple):
    """What a dispatcher's clock said."""

    ahead: int  # seconds that it was ahead of ours
    seen: str  # ISO 8601, by our clock


def load_clocks(path: str) -> dict:
    """What dispatchers' clocks have said, by their ids. Raises StorageError."""
    try:
        values = read_json_file(path)
        notes = {name: ClockNote(int(note["ahead"]), str(note["seen"])) for name, note in values.items()}
    except FileNotFoundError:
        return {}
    except (KeyError, OverflowError, TypeError, ValueError) as error:
        raise StorageError("%s: not a list of clocks" % path) from error
    return notes


def load_addresses(path: str) -> dict:
    """The addresses that trusted dispatchers have used lately, with when (ISO 8601). A file that cannot be
    used counts as none: it is only remembered."""
    try:
        values = read_json_file(path)
    except (FileNotFoundError, StorageError):
        return {}
    return {
        address: seen
        for address, seen in values.items()
        if isinstance(seen, str) and measure_skew(seen) is not None and is_ip_address(address)
    }


_REVOKED_BY = "by dispatcher %s"  # in the revocation list


class Custodian:
    """Does what a dispatcher asks about trust. `order()` has the agent serve what was changed.

    Each method is a task of a supervisor: it gets a JobRequest, whose `args` are its own, and returns the
    answer. Raises BadRequest for what is not believed, Denied, StorageError, ProgramError, Unavailable.
    """

    def __init__(self, custody: Custody, openssl: OpenSSL, order: Callable) -> None:
        self._custody = custody
        self._openssl = openssl
        self._order = order

    def tasks(self) -> dict:
        """Every task by the name of its operation."""
        return {
            "renew": self.renew, "renew-complete": self.complete, "rotate-serial": self.rotate,
            "note-clock": self.note_clock, "agree": self.agree, "prove": self.prove,
        }  # fmt: skip

    def note_address(self, request: JobRequest) -> None:
        """Keep from where a trusted dispatcher comes: such an address is not blocked, nor after a restart."""
        path, address = self._custody.addresses, request.peer_ip
        known = load_addresses(path)
        if (
            not is_ip_address(address)
            or -(measure_skew(known.get(address, "")) or -1e9) < ADDRESS_SECONDS / 2
        ):
            return
        try:
            with FileLock(path + ".lock"):
                known = dict(load_addresses(path), **{address: iso_time(now())})
                latest = sorted(known, key=lambda one: known[one], reverse=True)[:MAX_ADDRESSES]
                write_atomic(path, encode_state({one: known[one] for one in latest}), mode=0o640)
        except StorageError:  # a full disk: it is only remembered
            pass

    def renew(self, request: JobRequest) -> dict:
        """A certificate request from the key there is: what changes is the date, not who we are."""
        csr = self._openssl.new_request(self._custody.identity.key, self._custody.host)
        LOG.event("renew", REQID=request.reqid, DISPATCHER=request.owner)
        return {"status": "ok", "reqid": request.reqid, "host": self._custody.host, "csr": csr}

    def complete(self, request: JobRequest) -> dict:
        """Put a new certificate in place, new CAs, or both; args: certificate, CAs, the CA's endorsement of
        its successor, each as PEM or empty."""
        certificate, cas, endorsement = request.args
        try:
            with FileLock(self._custody.identity.ca + ".lock"):  # two dispatchers may come at once
                info = self._store(certificate, cas, endorsement, request.owner)
        except TrustError as error:
            LOG.event("renew-complete", REQID=request.reqid, DISPATCHER=request.owner, ERROR=error.message)
            raise BadRequest(error.message) from error
        self._order()
        serial = info.serial
        LOG.event("renew-complete", REQID=request.reqid, DISPATCHER=request.owner, SERIAL=serial)
        body = {"status": "ok", "reqid": request.reqid, "serial": serial, "staged": False}
        return dict(body, expiry=iso_time(info.not_after))

    def _store(self, certificate: str, cas: str, endorsement: str, owner: str) -> CertInfo:
        """Check and write it all. CAs first: the old certificate works with the new CAs as well."""
        identity = self._custody.identity
        held = load_cas(identity.ca)
        try:
            believed = split_pem(cas) or held
            shown = split_pem(certificate) or split_pem(read_certificate_file(identity.cert).decode("ascii"))
            endorsed = split_pem(endorsement)
        except ValueError as error:
            raise TrustError("not a certificate: %s" % error) from error
        others = {*load_trust_map(self._custody.trust_map, self._custody.older_serial).values()} - {owner}
        if others:  # who may need a CA that this dispatcher can do without
            believed += [pem for pem in held if pem not in believed]
        for pem in believed:
            if pem not in held:
                if len(endorsed) != 1:
                    raise TrustError(
                        "a CA that this host does not know, without the word of the one it knows"
                    )
                self._openssl.check_endorsement(endorsed[0].encode(), "".join(held).encode(), pem.encode())
        if len(shown) != 1:
            raise TrustError("expected one certificate, not %d" % len(shown))
        pem, text = shown[0].encode("ascii"), "".join(believed).encode("ascii")
        self._openssl.check_chain(pem, text, "sslserver")
        self._openssl.check_no_client(pem)
        self._openssl.check_key_match(pem, identity.key)
        info = parse_certificate(pem)
        if self._custody.host.lower() not in [name.lower() for name in info.names or (info.common_name,)]:
            raise TrustError("the certificate is for another name than %s" % self._custody.host)
        present = read_certificate(identity.cert)
        if info.not_before < present.not_before - BACKDATE_SECONDS:  # or a revoked one could be put back
            raise TrustError("the certificate is older than the present one")
        if believed != held:
            write_atomic(identity.ca, text, mode=0o644, durable=True)
        if certificate:
            write_atomic(identity.cert, pem, mode=0o644, durable=True)
        return info

    def rotate(self, request: JobRequest) -> dict:
        """Change which serials the caller is trusted by; args: action, serial."""
        action, text = request.args
        try:
            serial = parse_serial(text)
        except ValueError as error:
            raise BadRequest("field `serial`: %s" % error, "serial") from None
        if action not in ("add", "remove", "revoke"):
            raise BadRequest("field `action` must be add, remove or revoke", "action")
        if action != "add" and serial == request.serial:
            raise Denied("serial %s is the one that this request was made with" % serial)
        revoked = load_revoked(self._custody.revoked) if action != "remove" else ()  # before any change
        if action == "add" and serial in revoked:
            raise Denied("serial %s is revoked here" % serial)
        is_to_revoke = action == "revoke" and serial not in revoked
        if is_to_revoke:
            self._check_room(request.owner)
        had = self._edit_map(action, serial, request.owner)
        if is_to_revoke:
            add_revoked(self._custody.revoked, [serial], _REVOKED_BY % request.owner)
        if is_to_revoke or had != (action == "add"):
            self._order()
        facts = {"DISPATCHER": request.owner, "SERIAL": serial, "CHANGE": action}
        LOG.event("rotate", REQID=request.reqid, **facts)
        return {"status": "ok", "reqid": request.reqid, "serial": serial, "action": action, "had": had}

    def _check_room(self, owner: str) -> None:
        """Raise Denied when a dispatcher has revoked as many serials as it may: a list that grows without end
        would one day refuse everybody."""
        try:
            text = read_text(self._custody.revoked)
        except FileNotFoundError:
            return
        if text.count("# %s\n" % (_REVOKED_BY % owner)) >= MAX_OWN_SERIALS:
            raise Denied("dispatcher %s has revoked %d serials here already" % (owner, MAX_OWN_SERIALS))

    def _edit_map(self, action: str, serial: str, owner: str) -> bool:
        """Change the map under the caller's id only; whether the serial was in it."""
        had = False

        def edit(trusted: dict) -> None:
            nonlocal had
            had = serial in trusted
            if trusted.get(serial, owner) != owner:
                raise Denied("serial %s belongs to dispatcher %s" % (serial, trusted[serial]))
            trusted.pop(serial, None)
            if action == "add":
                trusted[serial] = owner
            own = list(trusted.values()).count(owner)
            if own == 0 and had:
                raise Denied("serial %s is the last one of dispatcher %s" % (serial, owner))
            if own > MAX_OWN_SERIALS:
                raise Denied("dispatcher %s has %d serials here already" % (owner, MAX_OWN_SERIALS))

        edit_trust_map(self._custody.trust_map, self._custody.older_serial, edit)
        return had

    def agree(self, request: JobRequest) -> dict:
        """Agree on a secret with a dispatcher that has none yet; args: its public key. This is trust at first
        use: whoever has taken over our front by now can be in between."""
        if len(request.args) != 1:
            raise BadRequest("field `exchange` is missing", "exchange")
        key, public = self._openssl.new_exchange()
        try:
            shared = self._openssl.agree(key, request.args[0])
        except TrustError as error:
            raise BadRequest("field `exchange`: %s" % error, "exchange") from error
        secret = request_secret(shared, request.args[0], public)

        def edit(known: dict) -> None:
            if request.owner in known and known[request.owner].is_used:
                raise Denied("dispatcher %s has agreed on a secret here already: pair again" % request.owner)
            known[request.owner] = RequestSecret(secret, False)

        edit_request_secrets(self._custody.secrets, edit)
        LOG.event("agree", REQID=request.reqid, DISPATCHER=request.owner)
        return {"status": "ok", "reqid": request.reqid, "exchange": public}

    def prove(self, request: JobRequest) -> dict:
        """Nothing but what comes before each task: the proof is looked at, and from then on demanded. Raises
        NotFound when there is no secret here to look at it with."""
        if request.owner not in load_request_secrets(self._custody.secrets):
            raise NotFound("no secret is agreed with dispatcher %s here" % request.owner)
        return {"status": "ok", "reqid": request.reqid}

    def note_clock(self, request: JobRequest) -> dict:
        """Keep what a dispatcher's clock has said, for `self-check`; args: the seconds that it is ahead."""
        if len(request.args) != 1 or not re.fullmatch("-?[0-9]{1,12}", request.args[0]):
            raise BadRequest("the clock's distance is malformed")
        path = self._custody.clocks
        with FileLock(path + ".lock"):
            try:
                known = load_clocks(path)
            except StorageError:  # it is only remembered
                known = {}
            trusted = load_trust_map(self._custody.trust_map, self._custody.older_serial).values()
            notes = {name: note._asdict() for name, note in known.items() if name in trusted}
            notes[request.owner] = ClockNote(int(request.args[0]), iso_time(now()))._asdict()
            write_atomic(path, encode_state(notes), mode=0o640)
        return {"status": "ok", "reqid": request.reqid}


# ======================================================================================================
# 16. AGENT
# Owns:  the daemon of a managed host: the bundle that a process serves from, the pipeline of a request
#        (revoked, trusted, parsed, listed, asked, run), and the agent's checks of itself.
# Uses:  HEAD, ERRORS, GROUND, SETTINGS, OPENSSL, TRUST, WIRE, SERVER, POLICY, SCRIPTS, RECORDS, JOBS,
#        EXECUTOR, CUSTODY
# On disk: agent.lock (who serves from this state directory)
# ======================================================================================================


class Given(NamedTuple):
    """What the agent was started with, and keeps over reloads."""

    sockets: tuple = ()  # listening, from the service manager
    open_files: int = 0  # the soft limit of descriptors
    cgroup: str = ""  # a control group that is ours to divide
    faults: tuple = ()  # what is wrong with this host, in sentences


class Bundle(NamedTuple):
    """All that a front serves from; loaded by the executor, replaced whole by a reload."""

    config: Config
    listening: Listening
    context: ssl.SSLContext
    rules: JobRules
    trusted: dict  # serial to dispatcher id
    revoked: Optional[frozenset]  # None: the list cannot be read, and everybody is refused
    hook: Optional[Hook]
    host: str  # the name in our certificate
    expiry: str  # ISO 8601
    faults: tuple  # what does not work here, in sentences
    addresses: tuple  # that trusted dispatchers have used


def agent_identity(config: Config) -> Identity:
    return Identity(config.cert, config.key, config.ca)


def get_agent_identity(config: Config) -> Identity:
    """The identity of an agent that is paired. Raises ConfigError."""
    identity = agent_identity(config)
    if not os.path.exists(identity.cert):
        hint = "pair this host first: cea request-pairing --dispatcher HOST"
        raise ConfigError("%s: no such file: this host is not paired" % identity.cert, hint)
    return identity


def scripts_conf_path(config: Config) -> str:
    """scripts.conf lies beside agent.conf."""
    return os.path.join(os.path.dirname(config.path), "scripts.conf")


def _check_own_file(path: str) -> None:
    """What decides what root runs must not be writable by others."""
    try:
        check_modes(path)
    except ScriptRefused as error:
        raise ConfigError("%s cannot be trusted: %s" % (path, error.message), error.hint) from error


def build_rules(config: Config, host: str, trusted: dict, given: Given = Given()) -> tuple:
    """What may run, from the configuration and the allowlist: (JobRules, warnings). Raises ConfigError."""
    if config.strict_modes:
        for path in (config.path, scripts_conf_path(config)):
            if os.path.exists(path):
                _check_own_file(path)
    scripts, warnings = load_allowlist(scripts_conf_path(config), build_profiles(config.profiles))
    owner = find_service_owner(AGENT_USER)
    store = RunStore(
        config.runs_dir, None if owner is None else Owner(-1, owner.gid), config.run_retention_hours * 3600
    )
    rules = JobRules(
        scripts=scripts,
        script_dirs=config.script_dirs,
        strict_modes=config.strict_modes,
        store=store,
        locks_dir=config.default_path(AGENT_VAR + "/locks"),
        trusted=trusted,
        host=host,
        max_output=config.max_output,
        stdin_timeout=config.stdin_timeout,
        script_timeout=config.script_timeout,
        spare_dir=config.default_path(AGENT_RUN),
        open_files=given.open_files,
        cgroup=given.cgroup,
    )
    return rules, warnings


def _self_ping_path(config: Config) -> str:
    return os.path.join(config.default_path(AGENT_VAR), "self-ping")


def _recognise_self_ping(context: ssl.SSLContext, config: Config) -> None:
    """Let `self-ping` be told from strangers: the server name it asks for is a secret that only we and root
    can read. All it gains by that is not to be counted. Raises StorageError."""
    secret = new_id(16) + ".self-ping.invalid"
    write_atomic(_self_ping_path(config), secret.encode("ascii"), mode=0o600)

    def look(tls: Any, name: Optional[str], _: ssl.SSLContext) -> None:
        tls.is_self_ping = name is not None and is_same_secret(name, secret)

    context.sni_callback = look


def clocks_path(config: Config) -> str:
    return config.default_path(AGENT_VAR + "/clocks.json")


def request_secrets_path(config: Config) -> str:
    return config.default_path(AGENT_VAR + "/request-secrets.json")


def addresses_path(config: Config) -> str:
    return config.default_path(AGENT_VAR + "/addresses.json")


def find_agent_hook(config: Config) -> Optional[Hook]:
    default = config.default_path(AGENT_ETC + "/auth-hook")
    return find_hook(config.auth_hook, default, config.auth_hook_timeout)


def _listen(config: Config, already: Iterable, told: tuple) -> Listening:
    """Listen on the configured addresses, as far as possible; what is new about it is logged. Raises
    ConfigError."""
    listening = listen_where_possible(config.bind, config.port, already)
    note_listening(told, listening)
    return listening


def _list_addresses(config: Config) -> tuple:
    """Where dispatchers have come from lately, the latest last."""
    known = load_addresses(addresses_path(config))
    ages = {address: -(measure_skew(seen) or 0) for address, seen in known.items()}
    return tuple(sorted((one for one in ages if ages[one] < ADDRESS_SECONDS), key=lambda one: -ages[one]))


def load_bundle(config_path: str, root: str, previous: Optional[Bundle], given: Given = Given()) -> Bundle:
    """Load everything anew; sockets whose address did not change are kept. Raises ConfigError, TrustError."""
    faults = list(given.faults)
    config = load_config("agent", config_path, root)
    trusted = load_trust_map(config.trusted_dispatchers_path, config.dispatcher_serial_path)
    try:
        revoked: Optional[frozenset] = load_revoked(config.revoked_serials)
    except TrustError as error:
        if previous is None:
            raise
        LOG.event("deny", REASON="everybody is refused: " + error.message)
        revoked = None
    identity = get_agent_identity(config)
    context = new_server_context(identity, verify_clients=True, group=AGENT_USER)
    info = read_certificate(identity.cert)
    host = info.names[0] if info.names else info.common_name
    refused = trusted if revoked is None else revoked
    valid = {serial: dispatcher for serial, dispatcher in trusted.items() if serial not in refused}
    rules, warnings = build_rules(config, host, valid, given)
    for warning in config.warnings + warnings:
        LOG.event("schema-skip" if ".schema.json: " in warning else "config-warn", MESSAGE=warning)
    for script in rules.scripts.values():
        try:
            check_profile(script.profile)
        except ScriptRefused as error:
            LOG.event("config-warn", MESSAGE="script %s will be refused: %s" % (script.name, error.message))
    already = given.sockets if previous is None else previous.listening.sockets
    listening = _listen(config, already, () if previous is None else previous.listening.faults)
    try:
        _recognise_self_ping(context, config)  # last: a reload that fails leaves the secret that is in force
    except StorageError as error:  # then self-ping is a stranger
        LOG.event("config-warn", MESSAGE=error.message)
        faults.append(error.message)
    return Bundle(
        config, listening, context, rules, trusted, revoked, find_agent_hook(config), host,
        iso_time(info.not_after), tuple(faults), _list_addresses(config),
    )  # fmt: skip


# --- the front ------------------------------------------------------------------------------------------


class Caller(NamedTuple):
    """A dispatcher whose certificate is in the trust map: who it is, and from where."""

    dispatcher: str
    serial: str
    address: str


_RUN_FIELDS = (
    Field("script", str, True, MAX_SCRIPT_NAME),
    Field("args", list, most=10000),
    Field("reqid", str, True, 64),
    Field("username", str, most=256),
    Field("token", str, most=8192),
    Field("async", bool),
    Field("stream", bool),
    Field("timeout", int, most=10**9),
)
_PING_FIELDS = (Field("reqid", str, most=64), Field("time", str, most=64))
_RENEW_FIELDS = (Field("reqid", str, True, 64),)
_COMPLETE_FIELDS = (
    Field("reqid", str, True, 64),
    Field("cert", str, most=MAX_PAIRING_BODY),
    Field("ca", str, most=MAX_PAIRING_BODY),
    Field("endorsement", str, most=MAX_PAIRING_BODY),
)
_ROTATE_FIELDS = (
    Field("serial", str, True, 128),
    Field("action", str, True, 16),
    Field("reqid", str, most=64),
    Field("username", str, most=256),
    Field("token", str, most=8192),
)
_CANCEL_FIELDS = (
    Field("reqid", str, True, 64),
    Field("username", str, most=256),
    Field("token", str, most=8192),
)
_AGREE_FIELDS = (Field("reqid", str, True, 64), Field("exchange", str, True, 130))
_TASKS = {  # what changes something, by the name of its path: the fields of its body, and which are its args
    "run": (_RUN_FIELDS, ("args",)),
    "cancel": (_CANCEL_FIELDS, ()),
    "renew": (_RENEW_FIELDS, ()),
    "renew-complete": (_COMPLETE_FIELDS, ("cert", "ca", "endorsement")),
    "rotate-serial": (_ROTATE_FIELDS, ("action", "serial")),
    "agree": (_AGREE_FIELDS, ("exchange",)),
    "prove": (_RENEW_FIELDS, ()),
}
_ONCE = ("renew-complete", "rotate-serial")  # a run has its request id for that


def read_job(operation: str, data: bytes) -> JobRequest:
    """What the body of a request asks for: the front reads it, and the supervisor again where it is proved.
    Raises BadRequest."""
    rows, names = _TASKS[operation]
    fields = parse_fields(data, rows)
    forms = {"reqid": REQUEST_ID} if fields["reqid"] or operation != "rotate-serial" else {}
    if operation == "run":
        forms["script"] = SCRIPT_NAME
    for name, pattern in forms.items():
        if not pattern.fullmatch(fields[name]):
            raise BadRequest("field `%s` is malformed" % name, name)
    who = {name: fields.get(name, "") for name in ("username", "token")}
    if operation != "run":
        args = tuple(fields[name] for name in names)
        return JobRequest(operation, fields["reqid"], args=args, **who)
    if fields["async"] and fields["stream"]:
        raise BadRequest("`async` and `stream` do not go together", "stream")
    mode = "async" if fields["async"] else "stream" if fields["stream"] else "sync"
    asked = {"script": fields["script"], "timeout": fields["timeout"], "mode": mode}
    return JobRequest(operation, fields["reqid"], args=tuple(fields["args"]), **asked, **who)


def _note_proof(path: str, job: JobRequest) -> None:
    """From now on nothing is taken from this dispatcher without proof, and this request not again."""

    def edit(known: dict) -> None:
        entry = known.get(job.owner)
        if entry is None:
            raise Denied("dispatcher %s has been paired anew meanwhile" % job.owner)
        if job.operation in _ONCE:
            if job.proof in entry.seen:
                raise Denied("this request has been made before")
            entry = entry._replace(seen=(*entry.seen, job.proof)[-MAX_SEEN:])
        known[job.owner] = entry._replace(is_used=True)

    try:
        edit_request_secrets(path, edit)
    except StorageError as error:
        if job.operation in _ONCE:
            raise
        LOG.event("config-warn", MESSAGE=error.message)  # a full disk: it is noted with the next one


def _check_proof(config: Config, job: JobRequest) -> None:
    """Before a supervisor acts: does the request come from the dispatcher that the front names, and is it
    the one that the dispatcher has made? Raises Denied, StorageError."""
    if job.operation == "agree" and config.authenticated_requests == "require":
        raise Denied(
            "authenticated_requests = require: pair again, or set prefer until ced maintain has agreed"
        )
    if job.operation not in _TASKS or job.operation == "agree":
        return
    path = request_secrets_path(config)
    agreed = load_request_secrets(path).get(job.owner)
    if agreed is None or not (agreed.is_used or job.proof):
        if config.authenticated_requests == "require":
            raise Denied("no secret is agreed with dispatcher %s: pair again" % job.owner)
        if job.proof:
            LOG.event("proof-unknown", REQID=job.reqid, DISPATCHER=job.owner)
        return
    body = job.body.encode("utf-8")
    proof = request_proof(agreed.secret, "POST", "/" + job.operation, job.time, body)
    if not is_same_secret(proof, job.proof):
        LOG.event("proof-reject", REQID=job.reqid, DISPATCHER=job.owner, PEER=job.peer_ip)
        what = "the request's proof is wrong" if job.proof else "the request is not proved"
        raise Denied("%s: pair again if this host or dispatcher %s was restored" % (what, job.owner))
    skew = measure_skew(job.time.partition(" ")[0])
    # A run's id is known for `run_retention_hours` after its end, whatever its request says of the time: with
    # half of that, a request from a fast clock is too old before its id is forgotten.
    if skew is None or abs(skew) > config.run_retention_hours * 1800:
        raise Denied(
            "the request is too old or too new: the dispatcher's clock is %s" % describe_skew(skew or 0)
        )
    asked = read_job(job.operation, body)
    passed_on = job._replace(owner="", peer_ip="", serial="", body="", time="", proof="")
    if asked._replace(reqid=asked.reqid or job.reqid) != passed_on:
        LOG.event("proof-reject", REQID=job.reqid, DISPATCHER=job.owner, PEER=job.peer_ip)
        raise Denied("the request is not the one that was proved")
    if job.operation in _ONCE or not agreed.is_used:
        _note_proof(path, job)


def _relay(channel: socket.socket, reader: Channel, is_live: bool = False) -> Iterator[bytes]:
    """What a supervisor sends: as it comes when it is live, else in pieces of 64 KiB, so that a short answer
    is one piece."""
    with channel:
        buffer = b""
        while True:
            data = reader.read_some(65536, Deadline(WRITE_SECONDS))
            buffer += data
            if len(buffer) >= 65536 or (not data and buffer) or (is_live and buffer):
                yield buffer
                buffer = b""
            if not data:
                return


def _query_number(request: Request, name: str, most: int) -> int:
    """A number of the query, 0 when it is not there. Raises BadRequest."""
    try:
        return parse_count(request.query.get(name, "0"), 0, most)
    except ValueError as error:
        raise BadRequest("`%s` in the query must be %s" % (name, error), name) from None


class Front:
    """The agent's network side: no privileges, no scripts. It decides whether a request may be passed on;
    the supervisor decides again whether it may run."""

    def __init__(self, bundle: Bundle, control: socket.socket) -> None:
        config = bundle.config
        self._bundle = bundle
        self._control = control  # to the executor
        self._clocks: dict = {}  # dispatcher id to when its clock was noted last, and whether it disagreed
        self._gate = AddressGate(
            config.allowed_ips, config.rate_limit_volume, config.rate_limit_probe, config.rate_limit_disable,
            bundle.addresses,
        )  # fmt: skip
        self._routes = (
            Route("POST", "/run", self._run),
            Route("POST", "/ping", self._ping),
            Route("GET", "/capabilities", self._capabilities),
            Route("GET", "/result/*", self._result),
            Route("GET", "/follow/*", self._follow),
            Route("POST", "/cancel", self._cancel),
            Route("POST", "/renew", self._pass_task),
            Route("POST", "/renew-complete", self._pass_task),
            Route("POST", "/agree", self._pass_task),
            Route("POST", "/prove", self._pass_task),
            Route("POST", "/rotate-serial", self._rotate),
        )

    def run(self) -> int:
        """Serve until the executor says so or is gone; returns the exit status of the process."""
        become_user(AGENT_USER)
        raise_descriptor_limit()
        policy = ServerPolicy(self._gate.admit, self._note)
        server = Server(
            list(self._bundle.listening.sockets),
            self._bundle.context,
            self.handle,
            policy,
            self._bundle.config.max_connections,
        )
        server.serve(self._control.fileno())
        word = self._control.recv(16)
        if word:
            self._control.send(b"closed")
        if word == b"drain":  # a reload: no hurry, and a connection that has just come is served as promised
            server.drain(10**9, grace=HANDSHAKE_SECONDS)
        else:  # the service manager may hold the sockets, and have let somebody in meanwhile
            server.drain(DRAIN_SECONDS, grace=LINGER_SECONDS)
        return 0

    def _note(self, address: str, failure: str, reason: str, sock: Any) -> None:
        if getattr(sock, "is_self_ping", False):
            return  # it must not lock itself out
        if failure in ("tls", "clock") and not self._gate.is_blocked(address):
            LOG.event("tls-failure", PEER=address, REASON=reason)
        if failure == "clock":  # of our CA, so no stranger's; when the clock is right, it is to get through
            return
        if failure == "tls":
            self._gate.count(address, "probe")
        self._gate.count(address, "volume")

    def handle(self, peer: Peer, request: Request) -> Response:
        """The pipeline, after address, rate and TLS: revoked, trusted, then the route's own steps."""
        serial = peer.cert.serial if peer.cert is not None else ""
        if self._bundle.revoked is None:
            return self._forbid(peer, serial, "revoked-cert", "the revocation list cannot be used")
        if serial in self._bundle.revoked:
            return self._forbid(peer, serial, "revoked-cert", "certificate revoked")
        dispatcher = self._bundle.trusted.get(serial)
        if dispatcher is None:
            return self._forbid(peer, serial, "serial-reject", "serial mismatch")
        self._gate.trust(peer.address)
        route, argument = find_route(self._routes, request)
        return route.handle(Caller(dispatcher, serial, peer.address), peer, request, argument)

    def _forbid(self, peer: Peer, serial: str, action: str, reason: str) -> Response:
        LOG.event(action, PEER=peer.address, SERIAL=serial)
        self._gate.count(peer.address, "volume")
        return Response(403, {"error": reason, "status": "forbidden"}, close=True)

    def _ping(self, caller: Caller, peer: Peer, request: Request, _: str) -> Response:
        fields = parse_fields(request.body, _PING_FIELDS)
        LOG.event("ping", REQID=fields["reqid"], PEER=caller.address, DISPATCHER=caller.dispatcher)
        skew = measure_skew(fields["time"])
        if skew is not None:  # an older dispatcher does not say
            self._note_clock(caller, peer, skew)
        body = {"status": "ok", "host": self._bundle.host, "version": __version__}
        body.update(expiry=self._bundle.expiry, staged=False, reqid=fields["reqid"], time=iso_time(now()))
        faults = self._find_faults()
        if faults:
            body["faults"] = faults
        return Response(200, body)

    def _find_faults(self) -> list:
        """What does not work on this host, a sentence each, for whoever pings it."""
        config = self._bundle.config
        faults = [*self._bundle.faults, *self._bundle.listening.faults]
        for directory in (config.runs_dir, config.default_path(AGENT_VAR)):
            fault = find_disk_fault(directory)
            if fault and not any(fault in known or directory in known for known in faults):
                faults.append("%s: %s" % (directory, fault))
        return [one_line(fault)[:300] for fault in faults[:10]]

    def _note_clock(self, caller: Caller, peer: Peer, skew: float) -> None:
        """Have it kept what a dispatcher's clock says: once a minute, and whenever it comes to disagree with
        ours or to agree again."""
        is_far = is_clock_off(skew)
        noted, was_far = self._clocks.get(caller.dispatcher, (-CLOCK_SECONDS, False))
        if was_far == is_far and time.monotonic() - noted < CLOCK_SECONDS:
            return
        job = JobRequest("note-clock", new_id(), caller.dispatcher, caller.address, args=(str(int(skew)),))
        try:
            event, rest = self._pass_on(job, peer)
        except Unavailable:  # a ping needs no more than the answer
            return
        b"".join(rest)
        if event["event"] == "answer":
            self._clocks[caller.dispatcher] = (time.monotonic(), is_far)
        else:
            LOG.event("run-store-fail", REQID=job.reqid, MESSAGE=event["error"])

    def _capabilities(self, caller: Caller, peer: Peer, _: Request, __: str) -> Response:
        reqid = new_id()
        try:
            self._ask_hook(caller, HookContext("discovery", reqid, source_ip=caller.address))
        except Denied as error:
            return Response(403, {"error": error.message, "status": "forbidden"})
        LOG.event("capabilities", REQID=reqid, PEER=caller.address, DISPATCHER=caller.dispatcher)
        event, rest = self._pass_on(JobRequest("inspect", reqid, caller.dispatcher), peer)
        if event["event"] != "answer":
            return Response(event["status"], {"error": event["error"], "status": event["code"]})
        scripts = json.loads(b"".join(rest))["scripts"]
        body = {"status": "ok", "host": self._bundle.host, "version": __version__}
        body.update(scripts=scripts, tags=self._bundle.config.tags)
        return Response(200, body)

    def _run(self, caller: Caller, peer: Peer, request: Request, _: str) -> Response:
        job = self._read("run", caller, request)
        if job.script not in self._bundle.rules.scripts:
            return self._refuse_run(job, "script not permitted")
        hosts = (self._bundle.host,)
        context = HookContext("run", job.reqid, job.script, hosts, job.args, job.username, job.token)
        try:
            self._ask_hook(caller, context._replace(source_ip=caller.address))
        except Denied as error:
            return self._refuse_run(job, error.message)
        event, rest = self._pass_on(job, peer)
        if event["event"] == "answer":
            return Response(event["status"], rest, is_live=job.mode == "stream")
        if event["code"] == ScriptRefused.code:
            return self._refuse_run(job, event["error"])
        LOG.event("deny", REQID=job.reqid, SCRIPT=job.script, REASON=event["error"], DISPATCHER=job.owner)
        return Response(
            event["status"], {"status": event["code"], "error": event["error"], "reqid": job.reqid}
        )

    def _read(self, operation: str, caller: Caller, request: Request) -> JobRequest:
        """A request that changes something, with the proof that the supervisor will want to see."""
        job = read_job(operation, request.body)
        moment, proof = (request.headers.get(name.lower(), "") for name in PROOF_HEADERS)
        if proof:
            job = job._replace(body=request.body.decode("utf-8"), time=moment[:64], proof=proof[:64])
        return job._replace(reqid=job.reqid or new_id(), owner=caller.dispatcher, peer_ip=caller.address)

    def _pass_question(self, job: JobRequest, peer: Peer, is_live: bool = False) -> Response:
        """What a run's record says, from somebody who may read it."""
        event, rest = self._pass_on(job, peer)
        if event["event"] == "answer":
            return Response(event["status"], rest, is_live=is_live)
        status = "unknown" if event["status"] == 404 else event["code"]
        return Response(event["status"], {"status": status, "error": event["error"], "reqid": job.reqid})

    def _result(self, caller: Caller, peer: Peer, request: Request, reqid: str) -> Response:
        wait = _query_number(request, "wait", MAX_RESULT_WAIT)
        LOG.event("result", REQID=reqid, PEER=caller.address, DISPATCHER=caller.dispatcher)
        return self._pass_question(JobRequest("result", reqid, caller.dispatcher, wait=wait), peer)

    def _follow(self, caller: Caller, peer: Peer, request: Request, reqid: str) -> Response:
        """A run's output as it comes, from `?stdout=N&stderr=N`, or with `?from=now` from its present end."""
        if request.query.get("from", "start") not in ("start", "now"):
            raise BadRequest("`from` in the query must be start or now", "from")
        offsets = [-1, -1]
        if request.query.get("from") != "now":
            offsets = [_query_number(request, stream, 10**10 - 1) for stream in STREAMS]
        LOG.event("result", REQID=reqid, PEER=caller.address, DISPATCHER=caller.dispatcher, FOLLOW="yes")
        job = JobRequest("follow", reqid, caller.dispatcher, stdout=offsets[0], stderr=offsets[1])
        return self._pass_question(job, peer, is_live=True)

    def _cancel(self, caller: Caller, peer: Peer, request: Request, _: str) -> Response:
        return self._ask_and_pass("cancel", "forbidden", caller, peer, request)

    def _rotate(self, caller: Caller, peer: Peer, request: Request, _: str) -> Response:
        return self._ask_and_pass("rotate", "denied", caller, peer, request)

    def _ask_and_pass(
        self, action: str, refusal: str, caller: Caller, peer: Peer, request: Request
    ) -> Response:
        """Something that the hook is asked about, by the name that hooks know."""
        job = self._read(request.path[1:], caller, request)
        context = HookContext(action, job.reqid, hosts=(self._bundle.host,), args=job.args)
        context = context._replace(username=job.username, token=job.token, source_ip=caller.address)
        try:
            self._ask_hook(caller, context)
        except Denied as error:
            LOG.event("deny", REQID=job.reqid, REASON=error.message, DISPATCHER=caller.dispatcher)
            return Response(403, {"error": error.message, "status": refusal})
        return self._pass_question(job, peer)

    def _pass_task(self, caller: Caller, peer: Peer, request: Request, _: str) -> Response:
        """Something about trust that the hook is not asked about: what it changes is judged by itself."""
        job = self._read(request.path[1:], caller, request)
        if job.operation == "renew-complete" and not (job.args[0] or job.args[1]):
            raise BadRequest("field `cert` is missing", "cert")
        return self._pass_question(job, peer)

    def _refuse_run(self, job: JobRequest, reason: str) -> Response:
        """A well-formed request for something that does not run here: 200, and exit -1 says the rest."""
        LOG.event(
            "deny", REQID=job.reqid, SCRIPT=job.script, REASON=reason, DISPATCHER=job.owner, PEER=job.peer_ip
        )
        body = {"script": job.script, "exit": -1, "stdout": "", "stderr": "", "reqid": job.reqid}
        return Response(200, dict(body, host=self._bundle.host, error=reason))

    def _ask_hook(self, caller: Caller, context: HookContext) -> None:
        hook = self._bundle.hook or find_agent_hook(self._bundle.config)  # one put there meanwhile counts
        if hook is not None:
            who = {"dispatcher": caller.dispatcher, "dispatcher_serial": caller.serial}
            hook.decide(context._replace(via="agent", **who))

    def _pass_on(self, job: JobRequest, peer: Peer) -> tuple:
        """Give a request to a new supervisor: (its event, its answer in pieces).

        Raises ConnectionError when the caller goes away meanwhile; the run does not.
        """
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:
            raise Unavailable("cannot pass the request on: %s; try again later" % error.strerror) from error
        with theirs:
            socket.send_fds(self._control, [b"job"], [theirs.fileno()])
        ours.settimeout(WRITE_SECONDS)
        try:
            send_job(ours, job._replace(serial=peer.cert.serial, peer_ip=peer.address))
        except OSError:  # it was refused before it was read: the answer says why
            pass
        poller = select.poll()
        poller.register(ours.fileno(), select.POLLIN)
        poller.register(peer.sock.fileno(), select.POLLRDHUP)
        if ours.fileno() not in [descriptor for descriptor, _ in poller.poll()]:
            ours.close()
            raise ConnectionError("the caller is gone; request %s goes on" % job.reqid)
        reader = Channel(ours)
        try:
            event = json.loads(reader.read_until(b"\n", 65536, Deadline(WRITE_SECONDS)))
        except (OSError, ValueError):
            reason = "the run's process ended without an answer; it may have run"
            event = {"event": "refused", "code": "unknown", "status": 500, "error": reason}
        return event, _relay(ours, reader, job.mode == "stream" or job.operation == "follow")


def _run_front(bundle: Bundle, control: socket.socket) -> int:
    return Front(bundle, control).run()


def _supervise(bundle: Bundle, control: socket.socket, order: Callable) -> None:
    config = bundle.config
    custody = Custody(
        agent_identity(config), config.trusted_dispatchers_path, config.dispatcher_serial_path,
        config.revoked_serials, clocks_path(config), addresses_path(config), request_secrets_path(config),
        bundle.host,
    )  # fmt: skip
    custodian = Custodian(custody, OpenSSL(), order)
    check = lambda job: _check_proof(config, job)  # noqa: E731
    serve_job(control, bundle.rules, custodian.tasks(), check, custodian.note_address)


def agent_lock_path(config: Config) -> str:
    """What the agent that serves from a state directory holds, and writes its process id into."""
    return os.path.join(config.default_path(AGENT_VAR), "agent.lock")


def _lock_state(config: Config) -> FileLock:
    """The lock that keeps a second agent from this state directory. Raises ConfigError when one serves from
    it already, StorageError when there can be no lock."""
    state = config.default_path(AGENT_VAR)
    make_directory(state, 0o755)
    lock = FileLock(agent_lock_path(config))
    try:
        os.chmod(lock.path, 0o600)  # who can open it can hold it: an older one may be open to all
    except OSError:  # there is none, or the disk cannot be written
        pass
    if not lock.acquire():
        raise ConfigError("an agent serves from %s already" % state, "give this one a --root of its own")
    return lock


def serve_agent(config_path: str, root: str) -> int:
    """The agent: until SIGTERM. Raises ConfigError for what a person must mend; all else it does without."""
    lock: Optional[FileLock] = None
    faults: list = []
    config = load_config("agent", config_path, root)
    check_user_change(AGENT_USER)
    try:
        lock = _lock_state(config)
    except StorageError as error:
        LOG.event("config-warn", MESSAGE=error.message)
        faults.append(error.message)
    sockets = tuple(take_passed_sockets())
    given = Given(sockets, raise_descriptor_limit(), find_own_cgroup(), tuple(faults))

    def load(previous: Optional[Bundle]) -> Bundle:
        bundle = load_bundle(config_path, root, previous, given)
        if previous is None:
            close_unwanted(sockets, bundle.listening)
            opened = bundle.listening.sockets
            port = opened[0].getsockname()[1] if opened else bundle.config.port
            LOG.event(
                "start", VERSION=__version__, PORT=port, HOST=bundle.host, SCRIPTS=len(bundle.rules.scripts),
                SCRIPTS_RUN_AS=default_user(bundle.config.profiles),
                HOOK=bundle.hook.path if bundle.hook else "none",
            )  # fmt: skip
        return bundle

    def listen(bundle: Bundle) -> Listening:
        return listen_again(bundle.config.bind, bundle.config.port, bundle.listening)

    def note_reload(begun: int, ended: int, error: str) -> None:
        if lock is not None:
            note_serving(lock, begun, ended, error)

    executor = Executor(
        load, listen, _run_front, _supervise, lambda bundle: recover_jobs(bundle.rules), note_reload
    )
    executor.catch_signals()
    note_reload(0, 0, "")
    try:
        status = executor.run()
    except TrustError as error:  # as final as a broken configuration: a restart will not mend it
        raise ConfigError(error.message, error.hint) from error
    LOG.event("stop")
    return status


# --- checks ---------------------------------------------------------------------------------------------


def _check_runnable(script: Script, rules: JobRules) -> None:
    path = check_script(script, rules.script_dirs, rules.strict_modes)
    check_profile(script.profile)
    try:
        check_runnable(path)
    except ValueError as error:
        raise ScriptRefused("%s: %s" % (path, error)) from error


def _agent_places(config: Config) -> list:
    """What decides something on an agent's host, or holds what not everybody may read."""
    state = config.default_path(AGENT_VAR)
    hook = find_agent_hook(config)
    names = (
        "agent.lock",
        "clocks.json",
        "clocks.json.lock",
        "addresses.json",
        "self-ping",
        "request-secrets.json",
        "locks",
        "pairing",
    )
    changed = (config.trusted_dispatchers_path, config.revoked_serials, config.ca)
    locks = [path + ".lock" for path in changed]
    return [
        *(Place(path, is_private=True) for path in (config.path, scripts_conf_path(config), config.runs_dir)),
        *(Place(path) for one in (config.key, config.cert, config.ca) for path in find_siblings(one)),
        *(Place(path) for path in (config.trusted_dispatchers_path, config.dispatcher_serial_path)),
        *(Place(path) for path in (config.revoked_serials, *locks)),
        *(Place(os.path.join(state, name), is_private=True) for name in names),
        *(Place(path) for path in ((hook.path,) if hook is not None else ())),
    ]


_PAIR_AGAIN = "cea request-pairing --dispatcher HOST"
_PAIR_ANEW = (
    "put back what belongs together; or pair again, under the name it has there: %s --name NAME, and there: "
    "ced approve ID --replace" % _PAIR_AGAIN
)


def _check_own_name(path: str, info: CertInfo) -> Finding:
    """Whether the certificate is for this host, whose name may be given with its domain or without."""
    own, called = info.names[0] if info.names else info.common_name, socket.gethostname()
    is_ours = own.lower().partition(".")[0] == called.lower().partition(".")[0]
    hint = "fine if it was approved under that name; a copied disk must be paired anew: " + _PAIR_AGAIN
    return check_name(path, info, own if is_ours else called, hint)


def _check_agent_identity(config: Config) -> list:
    """The openssl program, our certificate, its key, and the CAs that we believe."""
    openssl, identity = OpenSSL(), agent_identity(config)
    findings = [check_openssl(openssl)]
    if findings[0].level == "FAIL":  # or what is wrong with it would be said of the certificates
        return findings + check_keys(identity.key, AGENT_USER)
    info = try_check(
        findings, "identity %s" % identity.cert,
        lambda: check_identity(openssl, identity, "sslserver", AGENT_USER), _PAIR_ANEW,
    )  # fmt: skip
    if info is not None:
        findings.append(check_expiry(identity.cert, info, "on the dispatcher: ced ping this host"))
        findings.append(_check_own_name(identity.cert, info))
    findings += check_keys(identity.key, AGENT_USER)
    if os.path.exists(identity.ca):
        findings += check_cas(openssl, identity.ca, "on the dispatcher: ced check")
    return findings


def _check_clocks(config: Config, trusted: dict) -> Iterator[Finding]:
    """Whether the dispatchers' clocks agreed with ours when they last pinged us."""
    notes = load_clocks(clocks_path(config))
    for dispatcher in sorted({*trusted.values()}):
        note = notes.get(dispatcher)
        if note is None:
            what = "dispatcher %s has not told this host the time" % dispatcher
            yield Finding("WARN", what, "on it: ced ping this host; an older one does not tell")
        elif is_clock_off(note.ahead):
            words = (dispatcher, describe_skew(note.ahead), note.seen)
            hint = "set one of them: certificates are judged by the clock; then, on it: ced ping this host"
            yield Finding("WARN", "dispatcher %s: its clock was %s at %s" % words, hint)
        else:
            yield Finding("OK", "dispatcher %s: its clock agreed at %s" % (dispatcher, note.seen))


def _check_trust(config: Config) -> list:
    """Whom we believe: the map, the revocation list, and the dispatchers' clocks."""
    findings: list = []
    paths = (config.trusted_dispatchers_path, config.dispatcher_serial_path)
    trusted = try_check(findings, "trust map", lambda: load_trust_map(*paths), "mend that line")
    if trusted is not None and not trusted:
        findings.append(Finding("FAIL", "no dispatcher is trusted", _PAIR_AGAIN))
    try_check(findings, "revocation list", lambda: load_revoked(config.revoked_serials), "mend that line")
    secrets = try_check(
        findings, "secrets that prove requests", lambda: load_request_secrets(request_secrets_path(config)),
        "remove it, and pair this host again",
    )  # fmt: skip
    unproved = {*(trusted or {}).values()} - {one for one, entry in (secrets or {}).items() if entry.is_used}
    if unproved and config.authenticated_requests == "prefer":
        what = "requests of %s need no proof yet (on the control host: ced maintain)"
        findings.append(Finding("OK", what % ", ".join(sorted(unproved))))
    elif unproved:
        what = "requests of %s are refused: no secret is agreed" % ", ".join(sorted(unproved))
        findings.append(Finding("FAIL", what, "pair this host again"))
    clocks = try_check(
        findings,
        "clocks",
        lambda: list(_check_clocks(config, trusted or {})),
        "remove it: it is only remembered",
    )
    return findings if clocks is None else findings[:-1] + clocks


def _runs_as_root(script: Script) -> bool:
    try:
        return check_profile(script.profile).uid == 0
    except ScriptRefused:  # it does not run
        return False


def _check_allowlist(config: Config) -> list:
    """What may run here, and the hook that is asked."""
    findings: list = []
    built = try_check(findings, "allowlist", lambda: build_rules(config, "", {}))
    if built is not None:
        rules, warnings = built
        findings += [Finding("WARN", warning, "mend it, or remove it") for warning in warnings]
        for script in rules.scripts.values():
            try_check(findings, "script %s" % script.name, lambda: _check_runnable(script, rules))
            if os.geteuid() == 0 and _runs_as_root(script):
                what = "script %s runs as root, as profile %s says" % (script.name, script.profile.name)
                findings.append(Finding("WARN", what, "give it another user if it can do with less"))
    return findings + check_hook(find_agent_hook(config), AGENT_USER)


def check_agent(config: Config) -> list:
    """Everything the agent depends on, one Finding each."""
    findings = [Finding("WARN", warning, "mend it in %s" % config.path) for warning in config.warnings]
    findings += [
        Finding("OK", describe_config(config)),
        *_check_agent_identity(config),
        *_check_trust(config),
    ]
    findings += check_addresses(config.bind)
    for directory in dict.fromkeys((config.default_path(AGENT_VAR), config.runs_dir)):
        findings += check_room(directory)
    return findings + check_places(_agent_places(config)) + _check_allowlist(config)


def ping_self(config: Config) -> CertInfo:
    """Reach our own port and see that it shows our own certificate. Raises ConfigError, TransportError,
    TrustError.

    The handshake stops before its last message, so that the agent sees a connection that was closed, and
    not one that tried to get in without a certificate.
    """
    info = read_certificate(get_agent_identity(config).cert)
    context = new_probe_context(config.ca)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    try:
        name: Optional[str] = read_text(_self_ping_path(config))
    except (FileNotFoundError, StorageError):  # then this counts as a stranger's connection
        name = None
    tls = context.wrap_bio(incoming, outgoing, server_hostname=name)
    address = config.bind[0] if config.bind else "127.0.0.1"
    try:
        with socket.create_connection((address, config.port), timeout=HANDSHAKE_SECONDS) as sock:
            while True:
                try:
                    tls.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    sock.sendall(outgoing.read())
                    data = sock.recv(65536)
                    if not data:
                        raise TransportError("port %d closed the connection" % config.port) from None
                    incoming.write(data)
    except ssl.SSLError as error:
        raise TransportError(
            "TLS with port %d failed: %s" % (config.port, describe_tls_error(error))
        ) from error
    except OSError as error:
        raise TransportError(
            "port %d: %s" % (config.port, error.strerror or error), hint="is the agent running?"
        ) from error
    shown = parse_serial(tls.getpeercert()["serialNumber"])
    if shown != info.serial:
        raise TrustError(
            "port %d shows certificate %s, and %s is on disk" % (config.port, shown, info.serial),
            "reload the agent",
        )
    return info


# ======================================================================================================
# 17. REGISTRY
# Owns:  the paired agents on the control host, which of them a command means, and the locks of running
#        host:script pairs. All of it is files: several control hosts can share the directory.
# Uses:  HEAD, ERRORS, GROUND, SETTINGS, OPENSSL, TRUST, CLIENT
# On disk: agents/NAME.json, agents/.lock; runs/REQID.json; locks/HOST--SCRIPT.lock
# ======================================================================================================


class Agent(NamedTuple):
    """One paired agent."""

    name: str
    hostname: str
    ip: str
    port: int
    lookup_by: str  # `ip` or `hostname`: which of the two to connect to
    cert_name: str  # the name its certificate was issued for; renaming the agent keeps it
    serial: str = ""
    expiry: str = ""
    paired: str = ""
    reqid: str = ""  # of the pairing request
    tags: dict = {}
    dispatcher_serial: str = ""  # the latest of our own certificates that it is known to trust
    serial_confirmed: str = ""  # when that was
    serial_status: str = ""  # current, pending, or stale: never told before the overlap ended
    issued: dict = {}  # serials of its certificates that have not expired: [expiry, `issuer`]
    issuer: str = ""  # the CA of its certificate, as `name_cas` calls it
    cas: str = ""  # the CAs that it believes, as `name_cas` calls them
    renewal_tried: str = ""  # when a renewal was last begun
    extra: dict = {}  # fields of other releases, kept as they are

    def address(self) -> str:
        return self.hostname if self.lookup_by == "hostname" else self.ip or self.hostname


_AGENT_FIELDS = tuple(field for field in Agent._fields if field != "extra")


def _file_name(name: str) -> str:
    """A name as part of a file name, which ends at 255 bytes: a longer one becomes its start and a hash, with
    a `~`, which no name of ours has."""
    if len(name) <= 240:
        return name
    import hashlib

    return name[:200] + "~" + hashlib.sha256(name.encode("ascii")).hexdigest()[:32]


def _agent_path(directory: str, name: str) -> str:
    return os.path.join(directory, _file_name(name) + ".json")


def _parse_agent(values: dict, path: str) -> Agent:
    """An agent from its file, whatever release wrote it. Raises StorageError."""
    name = values.get("name") or os.path.basename(path)[: -len(".json")]
    known = {key: values[key] for key in _AGENT_FIELDS if values.get(key) is not None}
    known.update(name=name, extra={key: value for key, value in values.items() if key not in _AGENT_FIELDS})
    known.setdefault("hostname", name)
    known.setdefault("ip", "")
    known.setdefault("lookup_by", "ip" if known["ip"] else "hostname")
    known.setdefault("cert_name", name)
    known.update({key: str(known[key]) for key in ("serial_confirmed", "serial_status") if key in known})
    try:
        known["port"] = parse_count(str(known.get("port", AGENT_PORT)), 1, 65535)
        for key in ("serial", "dispatcher_serial"):
            if known.get(key):
                known[key] = parse_serial(str(known[key]))
    except ValueError as error:
        raise StorageError("%s: port and serials: expected %s" % (path, error)) from None
    issued = known.get("issued", {})
    if type(issued) is not dict or not all(
        type(fact) is list and list(map(type, fact)) == [str, str] for fact in issued.values()
    ):
        raise StorageError("%s: `issued` is not SERIAL: [EXPIRY, ISSUER]" % path)
    for key in ("name", "hostname", "cert_name"):
        if type(known[key]) is not str or not HOST_NAME.fullmatch(known[key]):
            raise StorageError("%s: `%s` is not a host name" % (path, key))
    for key, value in known.items():
        expected = {"port": int, "tags": dict, "issued": dict, "extra": dict}.get(key, str)
        if type(value) is not expected:
            raise StorageError("%s: `%s` is not %s" % (path, key, "text" if expected is str else "an object"))
    return Agent(**known)


def list_agent_names(directory: str) -> list:
    """The names of all agents, sorted; from file names alone where that is possible."""
    try:
        files = os.listdir(directory)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError(
            "cannot read the registry %s: %s" % (directory, error.strerror), "run this as root"
        ) from error
    names = []
    for file in files:
        if file.endswith(".json") and not file.startswith("."):
            name = file[: -len(".json")]
            if "~" in name:
                try:
                    name = str(read_json_file(os.path.join(directory, file)).get("name", name))
                except (StorageError, FileNotFoundError):
                    pass  # under the name of its file, so that whoever loads it says what is wrong
            names.append(name)
    return sorted(names)


def find_agent(directory: str, name: str) -> Optional[Agent]:
    """One agent, or None. Raises StorageError for a file that cannot be used, or is about another one."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._~-]*", name):  # with `~`: the file of a long name
        return None
    path = _agent_path(directory, name)
    try:
        return _parse_agent(read_json_file(path), path)
    except FileNotFoundError:
        return None


def is_same_host_name(one: str, other: str) -> bool:
    """Whether two names are those of one host: but for their case, a final dot, or a domain that only one of
    them has."""
    one, other = one.rstrip(".").lower(), other.rstrip(".").lower()
    return one == other or ("." in one) != ("." in other) and one.partition(".")[0] == other.partition(".")[0]


def get_agent(directory: str, name: str, is_terse: bool = False) -> Agent:
    """One agent. Raises UnknownHost, with the nearest names unless `is_terse`."""
    agent = find_agent(directory, name) if HOST_NAME.fullmatch(name) else None
    if agent is None:
        names = [] if is_terse else list_agent_names(directory)
        same = [known for known in names if is_same_host_name(known, name)]
        near = "; did you mean %s?" % " or ".join(same[:3]) if same else suggest(name, names)
        raise UnknownHost("unknown host: %s%s" % (one_line(name[:300]), near))
    return agent


def load_agents(directory: str) -> tuple:
    """All agents, sorted by name, and a message for each file that could not be used."""
    agents, problems = [], []
    for name in list_agent_names(directory):
        try:
            agent = find_agent(directory, name)
            if agent is not None:
                agents.append(agent)
        except StorageError as error:
            problems.append(error.message)
    return agents, problems


def registry_lock(directory: str) -> FileLock:
    """Held while an agent is added, changed or removed."""
    make_directory(directory, 0o750)
    return FileLock(os.path.join(directory, ".lock"))  # the HTTP API reads here, and never writes


def save_agent(directory: str, agent: Agent) -> None:
    """Write an agent's file. The caller holds `registry_lock`."""
    values = dict(agent.extra)
    values.update({key: value for key, value in agent._asdict().items() if key != "extra"})
    write_atomic(_agent_path(directory, agent.name), encode_state(values), mode=0o640, durable=True)


def update_agent(directory: str, name: str, change: Callable) -> Optional[Agent]:
    """Let `change(agent)` return an agent's new record; None when it is not registered any more."""
    with registry_lock(directory):
        agent = find_agent(directory, name)
        changed = None if agent is None else change(agent)
        if changed is not None and changed != agent:
            save_agent(directory, changed)
        return changed


def count_days_left(expiry: str) -> Optional[int]:
    """Whole days until a time, in ISO 8601 or as older releases wrote it, or None when it is neither."""
    for parse in (parse_iso_time, parse_openssl_time):
        try:
            return int((parse(expiry) - now()) // 86400)
        except ValueError:
            pass
    return None


def with_issued(agent: Agent, info: CertInfo, issuer: str) -> Agent:
    """An agent for which a certificate has been made, whether or not it has arrived there."""
    known = {agent.serial: [agent.expiry, agent.issuer], **agent.issued} if agent.serial else agent.issued
    valid = {serial: fact for serial, fact in known.items() if (count_days_left(fact[0]) or 0) >= 0}
    return agent._replace(issued=dict(valid, **{info.serial: [iso_time(info.not_after), issuer]}))


def with_certificate(agent: Agent, info: CertInfo, issuer: str) -> Agent:
    """An agent that has this certificate."""
    holder = with_issued(agent, info, issuer)
    return holder._replace(serial=info.serial, expiry=iso_time(info.not_after), issuer=issuer)


def with_trust(agent: Agent, serial: str) -> Agent:
    """An agent that trusts this certificate of ours."""
    return agent._replace(dispatcher_serial=serial, serial_confirmed=iso_time(now()), serial_status="current")


def list_serials(agent: Agent) -> list:
    """The serials of all certificates that were made for an agent and may still be valid."""
    return sorted({parse_serial(text) for text in (agent.serial, *agent.issued) if text})


def remove_agent(directory: str, name: str) -> None:
    """Remove an agent's file. The caller holds `registry_lock`."""
    try:
        os.unlink(_agent_path(directory, name))
    except OSError as error:
        raise StorageError("cannot remove %s from the registry: %s" % (name, error.strerror)) from error


# --- what proves our requests to a host --------------------------------------------------------------------


def _secret_path(directory: str, name: str) -> str:
    return os.path.join(directory, _file_name(name))


def find_secret(directory: str, name: str) -> str:
    """What this dispatcher has agreed on with a host, or nothing. Raises StorageError."""
    path = _secret_path(directory, name)
    try:
        secret = read_text(path, 128).strip()
    except FileNotFoundError:
        return ""
    if not re.fullmatch("[0-9a-f]{64}", secret):
        raise StorageError("%s: not a secret" % path, "remove it, and pair that host again")
    return secret


def save_secret(directory: str, name: str, secret: str, key_path: str) -> None:
    """Keep it for those who may read the dispatcher's key; an empty one removes what there is. Raises
    StorageError."""
    path = _secret_path(directory, name)
    try:
        if not secret:
            if os.path.lexists(path):
                os.unlink(path)
            return
        key = os.stat(key_path)
    except OSError as error:
        raise StorageError("%s: %s" % (error.filename, error.strerror)) from error
    readers = Owner(key.st_uid, key.st_gid)
    mode = stat.S_IMODE(key.st_mode) & 0o640
    make_directory(directory, 0o700 | (0o050 if mode & 0o040 else 0), readers)
    write_atomic(path, secret.encode("ascii"), mode, durable=True, owner=readers)


def check_ip_address(text: str) -> None:
    """Raise UsageError for what an operator gave as an address and is none; nothing given is fine."""
    if text and not is_ip_address(text):
        raise UsageError("`%s` is not an IP address" % one_line(text[:80]))


def check_free_name(directory: str, name: str, renamed: str = "") -> None:
    """Raise TrustError when a name is taken, in whatever spelling, by a host or by a certificate: a host that
    was renamed still proves itself by the name in its certificate. `renamed` is the host that asks."""
    hint = "choose another name"
    if not renamed:
        hint += ", or give its place to the new one: ced approve ID --replace"
    for known in list_agent_names(directory):
        if known != renamed and is_same_host_name(known, name):
            raise TrustError("%s is paired already" % known, hint)
    for agent in load_agents(directory)[0]:
        if agent.name != renamed and is_same_host_name(agent.cert_name, name):
            raise TrustError("the certificate of %s is for the name %s" % (agent.name, agent.cert_name))


# --- which hosts are meant ------------------------------------------------------------------------------

MAX_SELECTION = 100_000  # hosts one command can name; stops web-[0-9999999999]
MAX_PATTERNS = 100  # words with * in one command; each is compared with every name
MAX_WORD = 4096  # characters of a word with ranges

_RANGE = re.compile(r"\[([0-9][0-9,-]*)\]")


def _parse_spans(text: str, whole: str) -> list:
    """`01-03,07` as (first, last, width) triples. Raises UsageError."""
    spans = []
    for part in text.split(","):
        span = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", part)
        if not span or int(span[2] or span[1]) < int(span[1]):
            raise UsageError("`%s` is not a range such as [01-20] or [1,3,7-9]" % one_line(whole[:80]))
        width = len(span[1]) if span[1].startswith("0") else 0
        spans.append((int(span[1]), int(span[2] or span[1]), width))
    return spans


def expand_ranges(word: str) -> list:
    """`web-[01-03,07]` as its names; leading zeros keep their width. Raises UsageError, before anything is
    built, for more names than a command can mean."""
    parts, rest, total = [], word, 1
    hit = _RANGE.search(rest)
    while hit:
        spans = _parse_spans(hit[1], hit[0])
        total *= sum(last - first + 1 for first, last, _ in spans)
        if total > MAX_SELECTION or len(word) > MAX_WORD:
            raise UsageError("`%s` names more than %d hosts" % (one_line(word[:80]), MAX_SELECTION))
        parts.append((rest[: hit.start()], spans))
        rest = rest[hit.end() :]
        hit = _RANGE.search(rest)
    names = [""]
    for text, spans in parts:
        numbers = ["%0*d" % (width, n) for first, last, width in spans for n in range(first, last + 1)]
        names = [name + text + number for name in names for number in numbers]
    return [name + rest for name in names]


class Selection(NamedTuple):
    """Which hosts a command is for: words as typed, or everything, narrowed by tags."""

    words: tuple
    everything: bool = False
    tags: tuple = ()  # of (name, value): a host must have all of them
    port: int = 0  # instead of the registered one


class _Budget:
    """What the words of one request may cost together, before anybody has been asked whether it may."""

    def __init__(self) -> None:
        self._names = MAX_SELECTION
        self._patterns = MAX_PATTERNS

    def spend(self, names: int, patterns: int) -> None:
        """Raises UsageError when it is used up."""
        self._names -= names
        self._patterns -= patterns
        if self._names < 0:
            raise UsageError("the words name more than %d hosts" % MAX_SELECTION)
        if self._patterns < 0:
            raise UsageError("the words have more than %d patterns with * or ?" % MAX_PATTERNS)


def _expand_word(word: str, budget: _Budget) -> tuple:
    """The names and patterns that a word means, and its port or 0. Raises UnknownHost and UsageError."""
    if is_ip_address(word.strip("[]")):
        message = "%s is an address, and hosts are named as they are registered" % one_line(word)
        raise UnknownHost(message, "see: ced list-agents")
    name, colon, port = word.partition(":")
    expansions = expand_ranges(name)
    budget.spend(len(expansions), len(expansions) if "*" in name or "?" in name else 0)
    for expanded in expansions:
        if "[" in expanded or "]" in expanded:
            shown = one_line(word[:80])
            raise UsageError("`%s` has a bracket that is no range such as [01-20] or [1,3,7-9]" % shown)
    try:
        return expansions, parse_count(port, 1, 65535) if colon else 0
    except ValueError as error:
        raise UsageError("%s: the port must be %s" % (one_line(word), error)) from None


def _match_names(expanded: str, names: list) -> list:
    """The registered names that a name or pattern selects. Raises UnknownHost."""
    if "*" not in expanded and "?" not in expanded:
        return [expanded]
    import fnmatch

    matching = [known for known in names if fnmatch.fnmatchcase(known, expanded)]
    if not matching:
        raise UnknownHost("no host matches %s" % one_line(expanded))
    return matching


def has_tags(agent: Agent, tags: tuple) -> bool:
    return all(key in agent.tags and str(agent.tags[key]) == value for key, value in tags)


def select_agents(directory: str, selection: Selection, is_terse: bool = False) -> tuple:
    """The agents a selection means, each once, in the order named, and a message for each registry file that
    could not be used. Raises UnknownHost, with the nearest names unless `is_terse`, UsageError, and
    StorageError when such a file's host was named."""
    chosen: dict = {}
    problems: list = []
    known: dict = {}

    def get(name: str) -> Agent:
        if name not in known:
            known[name] = get_agent(directory, name, is_terse)
        return known[name]

    if selection.everything or (selection.tags and not selection.words):
        agents, problems = load_agents(directory)
        chosen = {agent.name: agent for agent in agents}
    else:
        words = dict.fromkeys(selection.words)
        has_patterns = any("*" in word or "?" in word for word in words)
        names = list_agent_names(directory) if has_patterns else []
        budget = _Budget()
        for expansions, port in [
            _expand_word(word, budget) for word in words
        ]:  # all is counted, then matched
            for name in (name for expanded in expansions for name in _match_names(expanded, names)):
                agent = get(name)
                chosen.setdefault(name, agent._replace(port=port) if port else agent)
    agents = [agent for agent in chosen.values() if has_tags(agent, selection.tags)]
    if not agents:
        hint = "ced discovery learns the tags of hosts" if selection.tags else "see: ced list-agents"
        raise UnknownHost("no host is selected", hint)
    if selection.port:
        agents = [agent._replace(port=selection.port) for agent in agents]
    return agents, problems


def build_target(agent: Agent) -> Target:
    return Target(agent.name, agent.address(), agent.port, agent.cert_name)


# --- requests that were sent ----------------------------------------------------------------------------


class Outcome(NamedTuple):
    """How one host of a request ended, as far as the control host knows."""

    state: str = "pending"  # pending, accepted, or a state of a result
    exit: int = -1
    error: str = ""


class RequestRecord(NamedTuple):
    """A request as the control host remembers it: for whom, and how each host ended. Arguments, tokens and
    output are not kept; the hosts have the output."""

    reqid: str
    script: str
    mode: str  # sync, async or stream
    username: str
    source_ip: str
    started: str  # ISO 8601
    hosts: dict  # name to Outcome
    finished: str = ""
    began: str = ""  # `started` in seconds since the epoch, to the microsecond; not in older records


def _run_path(directory: str, reqid: str) -> str:
    if not REQUEST_ID.fullmatch(reqid):
        raise NotFound("No such request: %s" % one_line(reqid[:80]))
    return os.path.join(directory, reqid + ".json")


def save_request(directory: str, record: RequestRecord) -> None:
    """Write a request's record. Raises StorageError."""
    make_directory(directory, 0o750)
    values = dict(record._asdict(), hosts={name: list(outcome) for name, outcome in record.hosts.items()})
    write_atomic(_run_path(directory, record.reqid), encode_state(values, MAX_HOSTS_FILE), mode=0o640)


_RUN_FORMS = {  # of the fields of a request's record, which the HTTP API's user can write as well as root
    "reqid": REQUEST_ID,
    "script": SCRIPT_NAME,
    "mode": re.compile("sync|async|stream"),
    "started": re.compile("[0-9TZ:-]{20}"),
    "finished": re.compile("|[0-9TZ:-]{20}"),
    "began": re.compile("|[0-9]{1,12}[.][0-9]{6}"),
}


def _parse_outcome(name: str, values: list) -> Outcome:
    outcome = Outcome(*values)
    if not HOST_NAME.fullmatch(name) or list(map(type, outcome)) != [str, int, str]:
        raise TypeError("`hosts` is malformed")
    return outcome


def _parse_run(values: dict, path: str) -> RequestRecord:
    """A request's record from its file. Raises StorageError."""
    try:
        known = {key: values[key] for key in RequestRecord._fields if key in values}
        hosts = {name: _parse_outcome(name, outcome) for name, outcome in known.pop("hosts").items()}
        if not all(type(value) is str for value in known.values()):
            raise TypeError("a field is not text")
        record = RequestRecord(hosts=hosts, **known)
        for field, form in _RUN_FORMS.items():
            if not form.fullmatch(getattr(record, field)):
                raise TypeError("`%s` is malformed" % field)
        for moment in filter(None, (record.started, record.finished)):
            parse_iso_time(moment)
        if os.path.basename(path) != record.reqid + ".json":
            raise TypeError("it is about another request")
        return record
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise StorageError("%s: not the record of a request (%s)" % (path, error)) from error


def get_request(directory: str, reqid: str) -> RequestRecord:
    """The record of a request. Raises NotFound, and StorageError for one that cannot be used."""
    path = _run_path(directory, reqid)
    try:
        return _parse_run(read_json_file(path, MAX_HOSTS_FILE, follow=False), path)
    except FileNotFoundError:
        raise NotFound("No such request: %s" % reqid, "see: ced history") from None


def _list_by_change(directory: str) -> list:
    """(when it was changed, name) of every record of a request, the latest first. Raises StorageError."""
    found = []
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.name.endswith(".json") and entry.name[0] != ".":
                    try:
                        found.append((entry.stat(follow_symlinks=False).st_mtime, entry.name))
                    except OSError:  # swept meanwhile
                        pass
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError("cannot read %s: %s" % (directory, error.strerror), "run this as root") from error
    return sorted(found, reverse=True)


def list_request_records(directory: str, last: int = 0) -> tuple:
    """The requests that are remembered, the latest first, and a message for each file that cannot be used.
    With `last`, only so many, and only files that can be among them are read."""
    records: list = []
    problems = []
    began: list = []  # of the `last` latest so far, the earliest first
    for changed, name in _list_by_change(directory):
        # a request has begun before its record was changed; two clocks may share the directory
        if last and len(began) >= last and began[0] > changed + MAX_SKEW:
            break
        try:
            path = os.path.join(directory, name)
            records.append(_parse_run(read_json_file(path, MAX_HOSTS_FILE, follow=False), name))
        except FileNotFoundError:  # swept meanwhile
            continue
        except StorageError as error:
            problems.append(error.message)
            continue
        began = sorted([*began, parse_iso_time(records[-1].started)])[-last:] if last else []
    records.sort(key=lambda record: (record.started, record.began, record.reqid), reverse=True)
    return records[: last or None], problems


def sweep_requests(directory: str, retention: float) -> None:
    """Forget requests older than `retention` seconds; never raises."""
    try:
        for entry in os.scandir(directory) if is_sweep_due(directory, retention) else ():
            is_old = now() - entry.stat(follow_symlinks=False).st_mtime > retention
            if is_old and entry.name.endswith(".json") and not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)
    except (OSError, StorageError) as error:
        LOG.event("run-store-fail", MESSAGE="sweep: %s" % error)


# --- locks ----------------------------------------------------------------------------------------------


def _lock_path(directory: str, host: str, script: str) -> str:
    return os.path.join(directory, _file_name("%s--%s" % (host, script)) + ".lock")


def _name_lock_holder(path: str) -> str:
    """Which request holds a host:script lock, and whose it is, as it says."""
    try:
        values = parse_object(read_lock(path) or "", path)
    except (OSError, StorageError):
        return ""
    words = (("reqid", "request %s"), ("user", " of %s"), ("since", ", since %s"))
    return "".join(word % one_line(str(values[key])[:256]) for key, word in words if values.get(key))


class HostLocks:
    """The locks of one script on several hosts: all of them or none; held until released, or we die."""

    def __init__(self, directory: str, hosts: Iterable, script: str, reqid: str, user: str = "") -> None:
        self._directory = directory
        self._user = user
        self._hosts = sorted(hosts)  # one order for everybody
        self._script = script
        self._reqid = reqid
        self._held: list = []

    def __enter__(self) -> "HostLocks":
        """Raises Locked, naming every pair another request holds."""
        make_directory(self._directory, 0o770)
        try:
            conflicts = self._acquire_all()
        except StorageError:
            self.__exit__()
            raise
        if conflicts:
            self.__exit__()
            LOG.event("lock-conflict", REQID=self._reqid, CONFLICTS=",".join(conflicts))
            raise Locked(conflicts)
        LOG.event("lock-acquire", REQID=self._reqid, SCRIPT=self._script, HOSTS=len(self._held))
        return self

    def _acquire_all(self) -> dict:
        """Take what can be had; the pairs that others hold, with whose they are."""
        conflicts = {}
        for host in self._hosts:
            lock = FileLock(_lock_path(self._directory, host, self._script), transient=True, mode=0o660)
            if lock.acquire():
                holder = {"host": host, "script": self._script, "reqid": self._reqid, "user": self._user}
                lock.write(json.dumps(dict(holder, pid=os.getpid(), since=iso_time(now()))))
                self._held.append(lock)
            else:
                conflicts["%s:%s" % (host, self._script)] = _name_lock_holder(lock.path)
        return conflicts

    def __exit__(self, *_: object) -> None:
        for lock in self._held:
            lock.release()
        if self._held:
            LOG.event("lock-release", REQID=self._reqid, SCRIPT=self._script, HOSTS=len(self._held))
        self._held = []


def list_locks(directory: str) -> list:
    """The locks that are held now, as their holders described them."""
    try:
        files = sorted(file for file in os.listdir(directory) if file.endswith(".lock"))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError("cannot read %s: %s" % (directory, error.strerror)) from error
    held = []
    for file in files:
        path = os.path.join(directory, file)
        try:
            text = read_lock(path)
        except OSError:  # not a lock
            continue
        if text is None:  # left behind by a kill
            continue
        try:
            held.append(parse_object(text, path))
        except StorageError:
            held.append({"host": file[:-5].partition("--")[0], "script": file[:-5].partition("--")[2]})
    return held


# ======================================================================================================
# 18. PAIRING
# Owns:  how an agent gets its certificate: both halves of one protocol, side by side, and the tokens that
#        stand in for a person.
# Uses:  HEAD, ERRORS, GROUND, SETTINGS, OPENSSL, TRUST, WIRE, SERVER, CLIENT, POLICY, AGENT, REGISTRY
# On disk: pairing/REQID.json, pairing/DESK.desk, pairing-tokens/ID.json; on the agent pairing/REQID.json
#
#   agent                                   front (no privileges)            desk (holds the CA)
#     POST /pair: offer, commitment     →
#                                       ←   nonce, CA, who I am
#     POST /pair/reveal: secret nonce   →   opens the commitment?        →   queued, or token checked
#       both show the same six digits                                        operator: approve, deny
#                                       ←   certificate                  ←   signed
#     stored; POST /pair/stored         →   logged
# ======================================================================================================


class PairingRequest(NamedTuple):
    """One agent that wants a certificate, after it has opened its commitment."""

    reqid: str
    hostname: str
    csr: str
    nonce: str
    port: int
    ip: str  # as the agent says; empty: where it came from
    lookup_by: str
    version: str
    peer: str  # where it came from
    agent_nonce: str
    dispatcher_nonce: str
    legacy: bool = False  # of a release without commitment; see --allow-legacy
    token_id: str = ""
    token_proof: str = ""
    received: float = 0.0
    desk: str = ""  # which pairing-mode holds its connection
    status: str = "pending"  # approved, denied
    reason: str = ""
    certificate: str = ""
    answer_proof: str = ""  # the token's proof to the agent
    ahead: int = 0  # seconds that the agent's clock was ahead of ours
    exchange: str = ""  # the agent's public key for agreeing on a secret; empty: its release knows none
    answer_exchange: str = ""  # the dispatcher's

    def offer(self) -> PairingOffer:
        return PairingOffer(*(getattr(self, field) for field in PairingOffer._fields))


_OFFER_FIELDS = (
    Field("hostname", str, True, MAX_NAME),
    Field("csr", str, True, MAX_CSR),
    Field("nonce", str, True, 2 * NONCE_BYTES),
    Field("port", int, most=65535),
    Field("ip", str, most=45),
    Field("lookup_by", str, most=8),
    Field("version", str, most=32),
    Field("commit", str, most=64),
    Field("token_id", str, most=32),
    Field("time", str, most=64),
)
_REVEAL_FIELDS = (
    Field("reqid", str, True, 64),
    Field("reveal", str, True, 2 * NONCE_BYTES),
    Field("token_proof", str, most=64),
    Field("exchange", str, most=130),
)
_STORED_FIELDS = (Field("reqid", str, True, 64),)


class PairingTerms(NamedTuple):
    """What the dispatcher's two processes know before the first request comes."""

    ca: str  # PEM
    dispatcher_id: str
    dispatcher_serial: str
    allow_legacy: bool
    timeout: int
    max_queue: int
    desk: str


def build_secrets(terms: PairingTerms, request: PairingRequest) -> PairingSecrets:
    who = (terms.ca, terms.dispatcher_id, terms.dispatcher_serial)
    return PairingSecrets(request.offer(), request.agent_nonce, request.dispatcher_nonce, *who)


def request_code(terms: PairingTerms, request: PairingRequest) -> str:
    """The six digits of a request, computed anew from all that they stand for."""
    return legacy_pairing_code(request.csr) if request.legacy else pairing_code(build_secrets(terms, request))


# --- the dispatcher's network side ----------------------------------------------------------------------


class _Offered(NamedTuple):
    """An offer whose commitment is still closed."""

    request: PairingRequest
    commit: str
    sock: socket.socket
    deadline: Deadline


def _is_opened(commit: str, reveal: str, offer: PairingOffer) -> bool:
    """Whether a revealed nonce opens the commitment to an offer."""
    if not re.fullmatch(r"[0-9a-f]{%d}" % (2 * NONCE_BYTES), reveal):
        return False
    return is_same_secret(pairing_commitment(reveal, offer), commit)


def _check_offer(fields: dict, commit: str) -> None:
    if not is_host_name(fields["hostname"]):
        raise BadRequest("field `hostname` is not a host name", "hostname")
    if not re.fullmatch(r"[0-9a-f]{%d}" % (2 * NONCE_BYTES), fields["nonce"]):
        raise BadRequest("field `nonce` must be %d bytes as hex" % NONCE_BYTES, "nonce")
    if commit and not re.fullmatch(r"[0-9a-f]{64}", commit):
        raise BadRequest("field `commit` must be a SHA-256 as hex", "commit")
    if fields["lookup_by"] not in ("", "ip", "hostname"):
        raise BadRequest("field `lookup_by` must be ip or hostname", "lookup_by")
    if not re.fullmatch(r"[A-Za-z0-9.+-]*", fields["version"]):
        raise BadRequest("field `version` is malformed", "version")
    if fields["ip"] and not is_ip_address(fields["ip"]):
        raise BadRequest("field `ip` is not an IP address", "ip")


class PairingFront:
    """Talks to agents. It has no privileges and no files: what it learns goes to the desk."""

    def __init__(
        self, terms: PairingTerms, openssl: OpenSSL, control: socket.socket, gate: AddressGate
    ) -> None:
        self._terms = terms
        self._openssl = openssl
        self._control = control
        self._gate = gate
        self._offered: dict = {}  # reqid to _Offered; bounded, see _offer
        self._issued: dict = {}  # reqid to (hostname, socket): a certificate is on its way
        self._guard = threading.Lock()
        self._routes = (
            Route("POST", "/pair", self._offer),
            Route("POST", "/pair/reveal", self._reveal),
            Route("POST", "/pair/stored", self._stored),
        )

    def run(self, listeners: list, context: ssl.SSLContext) -> int:
        become_user(DISPATCHER_USER)

        def count(address: str, *_: object) -> None:
            self._gate.count(address, "volume")

        def refuse(address: str, error: CtrlExecError) -> Response:
            self._gate.count(address, "volume")
            return Response(error.http_status, render_refusal(error))

        policy = ServerPolicy(self._gate.admit, count, refuse)
        server = Server(listeners, context, self.handle, policy, 256, MAX_PAIRING_BODY)
        server.serve(self._control.fileno())
        server.drain(1)
        return 0

    def handle(self, peer: Peer, request: Request) -> Response:
        route, _ = find_route(self._routes, request)
        try:
            return route.handle(peer, request)
        except (BadRequest, TrustError, Unavailable) as error:
            LOG.event("pair-reject", PEER=peer.address, REASON=error.message)
            if request.path != "/pair":  # which has counted already
                self._gate.count(peer.address, "volume")
            return Response(
                503 if isinstance(error, Unavailable) else 400,
                {"status": "denied", "reason": error.message},
                True,
            )

    def _offer(self, peer: Peer, request: Request) -> Response:
        self._gate.count(peer.address, "volume")
        if not self._gate.admit(peer.address):  # the limit holds within a connection as well
            raise Unavailable("too many pairing requests from this address; try again later")
        fields = parse_fields(request.body, _OFFER_FIELDS)
        commit, skew = fields.pop("commit"), measure_skew(fields.pop("time"))
        legacy = not commit
        _check_offer(fields, commit)
        if legacy and not self._terms.allow_legacy:
            raise BadRequest("this agent does not commit to its request; see --allow-legacy", "commit")
        self._openssl.check_request(fields["csr"])
        waiting = PairingRequest(
            reqid=new_id(),
            peer=peer.address,
            agent_nonce="",
            dispatcher_nonce=new_id(NONCE_BYTES),
            legacy=legacy,
            ahead=int(skew or 0),
            **fields,
        )
        LOG.event(
            "pair-request", REQID=waiting.reqid, PEER=peer.address, NAME=waiting.hostname, LEGACY=legacy
        )
        pending = {"status": "pending", "reqid": waiting.reqid}
        if legacy:
            return Response(200, self._legacy_lines(pending, peer, waiting), True)
        with self._guard:
            for reqid in [known for known, offer in self._offered.items() if offer.deadline.is_over()]:
                del self._offered[reqid]
            if len(self._offered) >= 256:
                raise Unavailable("too many pairing requests at once")
            self._offered[waiting.reqid] = _Offered(waiting, commit, peer.sock, Deadline(HANDSHAKE_SECONDS))
        pending.update(dispatcher_nonce=waiting.dispatcher_nonce, ca=self._terms.ca)
        pending.update(
            dispatcher_id=self._terms.dispatcher_id, dispatcher_serial=self._terms.dispatcher_serial,
            time=iso_time(now()),
        )  # fmt: skip
        return Response(200, pending)

    def _reveal(self, peer: Peer, request: Request) -> Response:
        fields = parse_fields(request.body, _REVEAL_FIELDS)
        with self._guard:
            offered = self._offered.pop(fields["reqid"], None)
        if offered is None or offered.sock is not peer.sock:
            raise BadRequest("no such pairing request on this connection", "reqid")
        waiting = offered.request
        if not _is_opened(offered.commit, fields["reveal"], waiting.offer()):
            self._gate.count(peer.address, "volume")
            LOG.event("pair-tamper", REQID=waiting.reqid, PEER=peer.address, NAME=waiting.hostname)
            return Response(
                403, {"status": "denied", "reason": "the reveal does not match the commitment"}, True
            )
        if fields["exchange"] and exchange_nonce(fields["exchange"]) != fields["reveal"]:
            raise BadRequest("field `exchange` is not what the reveal stands for", "exchange")
        waiting = waiting._replace(
            agent_nonce=fields["reveal"], token_proof=fields["token_proof"], exchange=fields["exchange"]
        )
        decision = self._wait_for_decision(peer, waiting)
        if decision["status"] == "approved":
            with self._guard:
                self._issued[waiting.reqid] = (waiting.hostname, peer.sock)
                if len(self._issued) > 256:
                    del self._issued[next(iter(self._issued))]
        return Response(200, decision)

    def _stored(self, peer: Peer, request: Request) -> Response:
        reqid = parse_fields(request.body, _STORED_FIELDS)["reqid"]
        with self._guard:
            name, sock = self._issued.pop(reqid, ("", None))
        if sock is not peer.sock:
            raise BadRequest("no such pairing request on this connection", "reqid")
        LOG.event("pair-complete", REQID=reqid, PEER=peer.address, NAME=name)
        return Response(200, {"status": "ok"}, True)

    def _legacy_lines(self, pending: dict, peer: Peer, waiting: PairingRequest) -> Iterator[bytes]:
        """The older protocol: `pending` at once, the decision when it is made, one JSON object a line."""
        yield encode_json(pending) + b"\n"
        yield b""  # so that the first line leaves now
        yield encode_json(self._wait_for_decision(peer, waiting)) + b"\n"

    def _wait_for_decision(self, peer: Peer, waiting: PairingRequest) -> dict:
        """Hand the request to the desk and wait. Raises ConnectionError when the agent goes away."""
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                data = encode_json(waiting._asdict())
                ours.sendall(len(data).to_bytes(4, "big") + data)  # first: the desk does not wait for it
                socket.send_fds(self._control, [b"pair"], [theirs.fileno()])
            poller = select.poll()
            poller.register(ours.fileno(), select.POLLIN)
            poller.register(peer.sock.fileno(), select.POLLRDHUP)
            if ours.fileno() not in [descriptor for descriptor, _ in poller.poll()]:
                raise ConnectionError("the agent went away")
            return json.loads(Channel(ours).read_until(b"\n", MAX_PAIRING_BODY, Deadline(WRITE_SECONDS)))


def run_pairing_front(
    listeners: list, context: ssl.SSLContext, terms: PairingTerms, config: Config, control: socket.socket
) -> int:
    """Fork the network side; returns its process id. It ends when `control` is closed here."""
    rate, disabled = config.pairing_rate_limit_volume, config.pairing_rate_limit_disable
    pid = os.fork()
    if pid:
        return pid
    status = EXIT_BUG
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: None)  # the desk decides when to stop
        os.setsid()
        close_descriptors(
            [control.fileno(), LOG.descriptor(), *(listener.fileno() for listener in listeners)]
        )
        gate = AddressGate((), rate, rate, disabled)
        status = PairingFront(terms, OpenSSL(), control, gate).run(listeners, context)
    except BaseException as error:
        log_bug(error)
    finally:
        os._exit(status)


# --- tokens: pairing without a person -------------------------------------------------------------------


class PairingToken(NamedTuple):
    """What a token on disk allows. The secret is a key for HMAC, so both sides must have it."""

    token_id: str
    secret: str
    expires: float
    uses: int  # that are left; one that is used up is kept for a day, for the log to say so
    name: str  # a host name or a pattern with *; empty: any
    replace: bool = False  # it may take the place of a host of that name


def _token_path(directory: str, token_id: str) -> str:
    return os.path.join(directory, token_id + ".json")


def _write_token(directory: str, token: PairingToken) -> None:
    path = _token_path(directory, token.token_id)
    write_atomic(path, encode_state(token._asdict()), mode=0o600, durable=True)


def _is_long_over(path: str) -> bool:
    try:
        return float(read_json_file(path)["expires"]) < now() - 86400
    except (FileNotFoundError, StorageError, KeyError, TypeError, ValueError):
        return False


def new_token(directory: str, ttl: int, uses: int, name: str, replace: bool = False) -> str:
    """Make a token and return it: 8 hex digits to find it by, a dot, 160 bits in base 32."""
    import base64

    make_directory(directory, 0o700)
    secret = base64.b32encode(os.urandom(20)).decode("ascii").lower()
    token = PairingToken(new_id(4), secret, now() + ttl, uses, name, replace)
    with FileLock(os.path.join(directory, ".lock")):
        for entry in os.scandir(directory):
            if entry.name.endswith(".json") and _is_long_over(entry.path):
                os.unlink(entry.path)
        _write_token(directory, token)
    return "%s.%s" % (token.token_id, token.secret)


class _TokenRefused(Exception):
    """Why a token is not accepted: for the log. Its agent learns only that it is not."""


def _check_token(directory: str, terms: PairingTerms, request: PairingRequest) -> PairingToken:
    """The token of a request, if it may be used for it. Raises _TokenRefused."""
    import fnmatch

    if not re.fullmatch(r"[0-9a-f]{8}", request.token_id):
        raise _TokenRefused("malformed")
    try:
        token = PairingToken(**read_json_file(_token_path(directory, request.token_id)))
    except FileNotFoundError:
        raise _TokenRefused("unknown") from None
    except (StorageError, TypeError) as error:
        raise _TokenRefused("its file cannot be used: %s" % error) from None
    proof = token_proof(token.secret, "agent", build_secrets(terms, request))
    if not is_same_secret(proof, request.token_proof):  # first: only who knows it has it judged
        raise _TokenRefused("wrong secret")
    if token.expires < now():
        raise _TokenRefused("expired")
    if token.uses < 1:
        raise _TokenRefused("used")
    if token.name and not fnmatch.fnmatchcase(request.hostname, token.name):
        raise _TokenRefused("another name: it is for %s" % token.name)
    return token


def use_token(directory: str, terms: PairingTerms, request: PairingRequest, approve: Callable) -> None:
    """Check a request's token, and spend one use of it on `approve(token)`, which gets it back if it raises a
    CtrlExecError. Raises _TokenRefused, and that."""
    if not os.path.isdir(directory):
        raise _TokenRefused("unknown")
    with FileLock(os.path.join(directory, ".lock")):
        token = _check_token(directory, terms, request)
        _write_token(directory, token._replace(uses=token.uses - 1))  # first: who is killed now has used it
        try:
            approve(token)
        except CtrlExecError:
            _write_token(directory, token)
            raise


# --- the queue on disk ----------------------------------------------------------------------------------


def _request_path(directory: str, reqid: str) -> str:
    return os.path.join(directory, reqid + ".json")


def _remove_request(directory: str, reqid: str) -> None:
    try:
        os.unlink(_request_path(directory, reqid))
    except FileNotFoundError:  # another control host, or another terminal, was first
        pass


def _desk_path(directory: str, desk: str) -> str:
    return os.path.join(directory, desk + ".desk")


def write_pairing_request(directory: str, request: PairingRequest) -> None:
    write_atomic(_request_path(directory, request.reqid), encode_state(request._asdict()), mode=0o640)


def parse_pairing_request(values: dict) -> PairingRequest:
    """A request from the front or from the queue. Both are written by less privileged hands than ours, so
    every field is checked for its type and its form. Raises BadRequest."""
    try:
        request = PairingRequest(**values)
    except TypeError:
        raise BadRequest("not a pairing request") from None
    for name, kind in PairingRequest.__annotations__.items():
        value = getattr(request, name)
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise BadRequest("field `%s` has the wrong type" % name, name)
    _check_offer(request._asdict(), "")
    nonce = r"[0-9a-f]{%d}" % (2 * NONCE_BYTES)
    forms = (
        ("reqid", REQUEST_ID.pattern),
        ("desk", r"[0-9a-f]{16}|"),
        ("agent_nonce", "" if request.legacy else nonce),
        ("dispatcher_nonce", nonce),
        ("peer", r"[0-9A-Fa-f.:%a-z]{2,64}"),
        ("token_id", r"[0-9a-f]{8}|"),
        ("token_proof", r"[0-9a-f]{64}|"),
        ("exchange", EXCHANGE_KEY.pattern + "|"),
        ("answer_exchange", EXCHANGE_KEY.pattern + "|"),
        ("status", "pending|approved|denied"),
    )
    for name, form in forms:
        if not re.fullmatch(form, getattr(request, name)):
            raise BadRequest("field `%s` is malformed" % name, name)
    if request.exchange and exchange_nonce(request.exchange) != request.agent_nonce:
        raise BadRequest("field `exchange` is malformed", "exchange")
    if not 0 <= request.port <= 65535:
        raise BadRequest("field `port` is malformed", "port")
    if not abs(request.ahead) < 10**12:
        raise BadRequest("field `ahead` is malformed", "ahead")
    try:
        decode_pem(request.csr, "CERTIFICATE REQUEST")
    except ValueError as error:
        raise BadRequest("field `csr`: %s" % error, "csr") from None
    return request


def find_pairing_request(directory: str, reqid: str) -> Optional[PairingRequest]:
    """A request in the queue, or None. Raises StorageError for a file that cannot be used."""
    path = _request_path(directory, reqid)
    try:
        request = parse_pairing_request(read_json_file(path, follow=False))
    except FileNotFoundError:
        return None
    except BadRequest as error:
        raise StorageError("%s: %s" % (path, error.message)) from error
    if request.reqid != reqid:
        raise StorageError("%s: it says that it is request %s" % (path, request.reqid))
    return request


def _is_desk_open(directory: str, desk: str) -> bool:
    """Whether the pairing-mode that holds a request's connection still runs."""
    path = _desk_path(directory, desk)
    try:
        if read_lock(path) is not None:
            return True
        os.unlink(path)
    except FileNotFoundError:
        return False
    except OSError:  # nothing may be removed because of that
        return True
    return False


def load_pairing_requests(config: Config) -> tuple:
    """The requests that wait for a decision, oldest first, and a message for each file that is spoiled.

    What a killed pairing-mode left is removed.
    """
    waiting: list = []
    problems: list = []
    try:
        files = os.listdir(config.pairing_dir)
    except FileNotFoundError:
        return waiting, problems
    except OSError as error:
        raise StorageError(
            "cannot read %s: %s" % (config.pairing_dir, error.strerror), "run this as root"
        ) from error
    for file in files:
        if not file.endswith(".json"):
            continue
        try:
            request = find_pairing_request(config.pairing_dir, file[: -len(".json")])
        except StorageError as error:
            problems.append(error.message)
            continue
        if request is None or request.status != "pending":
            continue
        if not _is_desk_open(config.pairing_dir, request.desk):
            _remove_request(config.pairing_dir, request.reqid)
        elif now() - request.received <= config.pairing_timeout:  # its desk says that it is over
            waiting.append(request)
    return sorted(waiting, key=lambda request: request.received), problems


def get_pairing_request(config: Config, reqid: str) -> PairingRequest:
    """A waiting request by its id. Raises NotFound."""
    for request in load_pairing_requests(config)[0]:
        if request.reqid == reqid:
            return request
    raise NotFound("no pairing request %s is waiting" % one_line(reqid[:80]), "see: ced list-requests")


class Approval(NamedTuple):
    """What the operator decided about an agent; empty means as the request says."""

    name: str = ""
    ip: str = ""
    port: int = 0
    lookup_by: str = ""
    replace: bool = False  # give it the place of an agent of that name


def dispatcher_identity(config: Config) -> Identity:
    return Identity(config.cert, config.key, config.ca)


def find_signer(config: Config, openssl: OpenSSL) -> str:
    """The CA that certifies a new agent: the one of our own certificate, which the agent is to verify."""
    return find_issuer(openssl, config.ca, read_certificate_file(config.cert))


def build_terms(config: Config, openssl: OpenSSL, desk: str, allow_legacy: bool = False) -> PairingTerms:
    """Who this dispatcher is, for the front and for computing codes. Raises TrustError."""
    ca = read_certificate_file(find_signer(config, openssl)).decode("ascii", "replace")
    return PairingTerms(
        ca, config.dispatcher_id, read_certificate(config.cert).serial, allow_legacy, config.pairing_timeout,
        config.pairing_max_queue, desk,
    )  # fmt: skip


def _check_undecided(config: Config, request: PairingRequest) -> None:
    """Raise NotFound when a request was decided by somebody else, is gone, or is not what was shown."""
    if find_pairing_request(config.pairing_dir, request.reqid) != request:
        raise NotFound("pairing request %s is not waiting any more" % request.reqid)


def secret_directory(config: Config) -> str:
    """Where this dispatcher keeps what it has agreed on with its hosts."""
    return config.default_path(VAR + "/request-secrets")


def _agree(openssl: OpenSSL, terms: PairingTerms, request: PairingRequest) -> tuple:
    """(our public key, the secret agreed on) with an agent whose release knows of it, or two empty texts."""
    if not request.exchange:
        return "", ""
    key, public = openssl.new_exchange()
    transcript = pairing_transcript(build_secrets(terms, request))
    return public, request_secret(openssl.agree(key, request.exchange), transcript)


def approve_pairing(
    config: Config, openssl: OpenSSL, request: PairingRequest, approval: Approval, secret: str = ""
) -> Agent:
    """Sign the request that was shown, register the agent, and leave the certificate for the desk to send.

    The certificate's name is the approved one and nothing else comes from the request but its key. Raises
    TrustError when the name is taken, StorageError, ProgramError.
    """
    name = approval.name or request.hostname
    if not is_host_name(name):
        raise UsageError("%s is not a host name" % one_line(name))
    check_ip_address(approval.ip)
    openssl.check_request(request.csr)
    with registry_lock(config.registry_dir):
        _check_undecided(config, request)
        replaced = find_agent(config.registry_dir, name) if approval.replace else None
        if replaced is None:
            check_free_name(config.registry_dir, name)
        terms = build_terms(config, openssl, request.desk)
        signer = find_signer(config, openssl)
        exchange, agreed = _agree(openssl, terms, request)
        said = b"" if request.legacy else pairing_answer(build_secrets(terms, request), exchange)
        days = config.cert_days
        certificate = openssl.sign(request.csr, name, "agent", days, signer, ca_key_path(signer), said)
        info = parse_certificate(certificate.encode("ascii"))
        agent = Agent(
            name=name,
            hostname=request.hostname,
            ip=approval.ip or request.ip or request.peer,
            port=approval.port or request.port or AGENT_PORT,
            lookup_by=approval.lookup_by or request.lookup_by or "ip",
            cert_name=name,
            paired=iso_time(now()),
            reqid=request.reqid,
        )
        agent = with_certificate(agent, info, name_cas([terms.ca]))
        agent = with_trust(agent, terms.dispatcher_serial)._replace(cas=agent.issuer)
        former = find_secret(secret_directory(config), name)
        save_secret(secret_directory(config), name, agreed, config.key)
        try:
            save_agent(config.registry_dir, agent)
        except StorageError:  # the host that had the name goes on
            save_secret(secret_directory(config), name, former, config.key)
            raise
        if replaced is not None:
            add_revoked(config.revoked_serials, list_serials(replaced), "replaced: %s" % name)
        proof = (
            token_proof(secret, "dispatcher", build_secrets(terms, request), certificate) if secret else ""
        )
        decided = request._replace(status="approved", certificate=certificate, answer_proof=proof)
        decided = decided._replace(answer_exchange=exchange)
        write_pairing_request(config.pairing_dir, decided)
    LOG.event("pair-approve", REQID=request.reqid, NAME=name, SERIAL=info.serial, PEER=request.peer)
    return agent


def deny_pairing(config: Config, request: PairingRequest, reason: str) -> None:
    """Leave a denial for the desk to send. Raises NotFound when it has been decided meanwhile."""
    with registry_lock(config.registry_dir):
        _check_undecided(config, request)
        write_pairing_request(config.pairing_dir, request._replace(status="denied", reason=reason))
    LOG.event("pair-deny", REQID=request.reqid, NAME=request.hostname, REASON=reason)


# --- the desk: what pairing-mode does with privileges ---------------------------------------------------


def token_directory(config: Config) -> str:
    return config.default_path(VAR + "/pairing-tokens")


class PairingDesk:
    """Takes requests from the front into the queue, and decisions from the queue to the front.

    Decisions are made by whoever writes the request's file: the operator at the prompt, `ced approve` from
    another terminal, or a token. The desk itself listens to nobody but its own front.
    """

    def __init__(self, config: Config, openssl: OpenSSL, terms: PairingTerms, control: socket.socket) -> None:
        self._config = config
        self._openssl = openssl
        self._terms = terms
        self._control = control
        self._channels: dict = {}  # reqid to the socket on which the front waits
        self._lock = FileLock(_desk_path(config.pairing_dir, terms.desk), transient=True)
        self._lock.acquire()
        self._identity = os.stat(config.cert).st_mtime_ns

    def descriptors(self) -> list:
        """What to wait for, besides the terminal and the clock."""
        return [self._control.fileno()] + [channel.fileno() for channel in self._channels.values()]

    def turn(self) -> None:
        """Do what is due: take in what the front has, send what was decided, forget who went away.

        Raises Unavailable when the front has died, or shows a certificate that is no longer ours.
        """
        if os.stat(self._config.cert).st_mtime_ns != self._identity:
            raise Unavailable("the dispatcher's certificate was replaced", "start pairing-mode again")
        readable = select.select(self.descriptors(), [], [], 0)[0]
        if self._control.fileno() in readable:
            self._take_request()
        for reqid, channel in list(self._channels.items()):
            if channel.fileno() in readable:  # the front says nothing after its request: this is the end
                self._finish(reqid)
                self._remove(reqid)
                LOG.event("pair-timeout", REQID=reqid, REASON="the agent went away")
        for reqid in list(self._channels):
            self._look_for_decision(reqid)

    def close(self) -> None:
        """End: whoever still waits is told so."""
        for reqid in list(self._channels):
            self._answer(reqid, {"status": "denied", "reason": "pairing mode was ended"})
            self._remove(reqid)
        self._control.close()
        self._lock.release()

    def _take_request(self) -> None:
        """Take one request from the front. What is not one is dropped: its agent sees the end."""
        try:
            word, channel = receive_socket(self._control)
        except OSError as error:
            LOG.event("pair-reject", REASON="from the front: %s" % error.strerror)
            return
        if not word:
            raise Unavailable("the pairing port stopped working; see the log")
        if channel is None:
            return
        try:
            reader, deadline = Channel(channel), Deadline(2)
            size = int.from_bytes(reader.read_exactly(4, deadline), "big")
            values = parse_json(reader.read_exactly(min(size, MAX_PAIRING_BODY), deadline))
            request = parse_pairing_request(
                dict(values, received=now(), desk=self._terms.desk, status="pending")
            )
            if request.legacy and not self._terms.allow_legacy:
                raise BadRequest("a request without commitment", "legacy")
            # The operator may have read the code of the one that is there: none takes its place.
            taken = os.path.lexists(_request_path(self._config.pairing_dir, request.reqid))
            if taken or request.reqid in self._channels:
                raise BadRequest("the request id %s is taken" % request.reqid, "reqid")
        except (OSError, CtrlExecError) as error:
            LOG.event("pair-reject", REASON="from the front: %s" % error)
            channel.close()
            return
        self._channels[request.reqid] = channel
        self._admit(request)

    def _admit(self, request: PairingRequest) -> None:
        def approve(token: PairingToken) -> None:
            write_pairing_request(self._config.pairing_dir, request)
            approval = Approval(replace=token.replace)
            approve_pairing(self._config, self._openssl, request, approval, token.secret)

        try:
            if request.token_id:
                return use_token(token_directory(self._config), self._terms, request, approve)
            self._make_room(request.peer)
            write_pairing_request(self._config.pairing_dir, request)
        except _TokenRefused as refusal:
            self._reject(request, PairingDenied("the pairing token is not accepted"), WHY=str(refusal))
        except CtrlExecError as error:
            self._reject(request, error)

    def _make_room(self, peer: str) -> None:
        """See that the queue has a place for a request from an address. Where the queue is full, whoever has
        two places in it gives one up for an address that has none. Raises PairingDenied."""
        waiting = load_pairing_requests(self._config)[0]
        if len(waiting) < self._terms.max_queue:
            return
        peers = [request.peer for request in waiting]
        greedy = max(peers, key=peers.count, default=peer)
        if peer in peers or peers.count(greedy) < 2:
            raise PairingDenied("the queue is full (%d requests wait)" % len(waiting))
        latest = [request for request in waiting if request.peer == greedy][-1]
        self._reject(latest, PairingDenied("the queue is full, and others wait"))

    def _reject(self, request: PairingRequest, error: CtrlExecError, **facts: str) -> None:
        facts.update(REQID=request.reqid, PEER=request.peer, NAME=request.hostname)
        LOG.event("pair-reject", REASON=error.message, **facts)
        reason = "%s (%s)" % (error.message, error.hint) if error.hint else error.message
        self._answer(request.reqid, {"status": "denied", "reason": reason})
        self._remove(request.reqid)

    def _look_for_decision(self, reqid: str) -> None:
        try:
            request = find_pairing_request(self._config.pairing_dir, reqid)
        except StorageError as error:
            LOG.event("pair-reject", REQID=reqid, REASON=error.message)
            request = None
        if request is None:
            self._answer(reqid, {"status": "denied", "reason": "the request was removed"})
        elif request.status == "approved":
            body = {
                "status": "approved",
                "cert": request.certificate,
                "ca": self._terms.ca,
                "nonce": request.nonce,
            }
            body.update(
                dispatcher_serial=self._terms.dispatcher_serial, dispatcher_id=self._terms.dispatcher_id
            )
            if request.answer_proof:
                body["token_proof"] = request.answer_proof
            if request.answer_exchange:
                body["exchange"] = request.answer_exchange
            self._answer(reqid, body)
            self._remove(reqid)
        elif request.status == "denied":
            self._answer(reqid, {"status": "denied", "reason": request.reason})
            self._remove(reqid)
        elif now() - request.received > self._terms.timeout:
            LOG.event("pair-timeout", REQID=reqid, NAME=request.hostname)
            self._answer(
                reqid, {"status": "denied", "reason": "nobody decided within %d s" % self._terms.timeout}
            )
            self._remove(reqid)

    def _answer(self, reqid: str, body: dict) -> None:
        channel = self._channels.get(reqid)
        if channel is not None:
            try:
                channel.settimeout(2)
                channel.sendall(encode_json(body) + b"\n")
            except OSError:
                pass
            self._finish(reqid)

    def _finish(self, reqid: str) -> None:
        self._channels.pop(reqid).close()

    def _remove(self, reqid: str) -> None:
        _remove_request(self._config.pairing_dir, reqid)


def _own_queue(directory: str) -> None:
    """The queue is the desk's alone: what stands in it gets a certificate. Raises StorageError."""
    make_directory(directory, 0o700)
    try:
        if os.stat(directory).st_uid != os.geteuid():
            raise StorageError("%s belongs to another user" % directory, "chown root %s" % directory)
        os.chmod(directory, 0o700)  # earlier releases shared it with the service's group
    except OSError as error:
        raise StorageError("%s: %s" % (directory, error.strerror)) from error


def open_desk(config: Config, allow_legacy: bool) -> tuple:
    """Start pairing mode: (desk, terms, port). Raises TrustError, ConfigError, StorageError."""
    openssl = OpenSSL()
    check_user_change(DISPATCHER_USER)
    if not os.path.exists(ca_key_path(config.ca)):
        raise TrustError(
            "%s: no such file" % ca_key_path(config.ca), "ced setup-ca, or pair on the host that has the CA"
        )
    _own_queue(config.pairing_dir)
    terms = build_terms(config, openssl, new_id(), allow_legacy)
    context = new_server_context(dispatcher_identity(config), verify_clients=False, group=DISPATCHER_USER)
    listeners = open_listeners((), config.pairing_port)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    port = listeners[0].getsockname()[1]
    run_pairing_front(listeners, context, terms, config, theirs)
    for sock in [theirs, *listeners]:
        sock.close()
    return PairingDesk(config, openssl, terms, ours), terms, port


# --- the agent's half -----------------------------------------------------------------------------------


class PairingWish(NamedTuple):
    """What the operator on the managed host asks for."""

    dispatcher: str
    port: int
    hostname: str
    ip: str
    lookup_by: str
    key_type: str
    token: str
    allow_legacy: bool
    ca_fingerprint: str  # what the CA must be; empty: not known
    replace_ca: bool


def _check_writable(path: str) -> None:
    """Raise StorageError now, rather than when the certificate has been issued."""
    directory = os.path.dirname(path)
    make_directory(directory, 0o755)
    probe = os.path.join(directory, ".tmp-" + new_id())
    write_atomic(probe, b"", mode=0o600)
    os.unlink(probe)


class PairingSession:
    """An agent's conversation with pairing-mode, from the offer to the stored certificate."""

    def __init__(self, config: Config, wish: PairingWish, openssl: OpenSSL, seconds: int) -> None:
        """Connect, send offer and commitment, and compute the code. Nothing is stored yet but our key.

        `seconds` is for the whole exchange. Raises TransportError, PairingDenied, PairingTimeout,
        StorageError, ProgramError.
        """
        self._config = config
        self._wish = wish
        self._openssl = openssl
        self._deadline = Deadline(seconds)
        self._began = now()
        identity = agent_identity(config)
        for path in (*identity, config.trusted_dispatchers_path):
            _check_writable(path)
        new_key_file(openssl, identity.key, wish.key_type)
        csr = openssl.new_request(identity.key, wish.hostname)
        self._offer = PairingOffer(
            wish.hostname, csr, new_id(NONCE_BYTES), config.port, wish.ip, wish.lookup_by, __version__
        )
        self._key, self._exchange = openssl.new_exchange()
        self._agent_nonce = exchange_nonce(self._exchange)
        self._token_id, _, self._secret = wish.token.partition(".")
        try:
            self._connection = Connection(
                wish.dispatcher, wish.port, new_pairing_context(), HANDSHAKE_SECONDS
            )
        except TransportError as error:
            error.hint = "is `ced pairing-mode` running there?"
            raise
        body = dict(self._offer._asdict(), commit=pairing_commitment(self._agent_nonce, self._offer))
        body["time"] = iso_time(now())
        if wish.token:
            body["token_id"] = self._token_id
        self._lines = self._connection.request_lines(
            "POST", "/pair", body, self._deadline, limit=MAX_PAIRING_BODY
        )
        pending = self._next_line()
        if pending is None:
            raise PairingDenied("the dispatcher ended the exchange without an answer")
        self._take_pending(pending)

    def _next_line(self) -> Optional[dict]:
        """The next object of the dispatcher's first answer, or None at its end."""
        try:
            return next(self._lines, (0, None))[1]
        except TransportError as error:
            if error.state == "timeout":
                raise PairingTimeout("the dispatcher did not decide in time") from None
            raise PairingDenied("the exchange broke off: %s" % error) from error

    def _take_pending(self, pending: dict) -> None:
        """Step 2: learn who the dispatcher says it is, and what code that makes."""
        if pending.get("status") != "pending":
            raise PairingDenied(
                "the dispatcher refused: %s" % one_line(str(pending.get("reason", "no reason given"))[:300])
            )
        self.reqid = str(pending.get("reqid", ""))
        self.skew = measure_skew(str(pending.get("time", "")))  # an older dispatcher does not say
        if not REQUEST_ID.fullmatch(self.reqid):
            raise PairingDenied("the dispatcher's answer has no request id")
        self.legacy = "dispatcher_nonce" not in pending
        if self.legacy:
            if not self._wish.allow_legacy or self._wish.token:
                hint = (
                    "if that is expected: --allow-legacy; the README says what the code then does not prove"
                )
                raise PairingDenied("the dispatcher does not know the commitment protocol", hint)
            self.code = legacy_pairing_code(self._offer.csr)
            return
        if self._next_line() is not None:
            raise PairingDenied("the dispatcher said more than its first answer")
        texts = [
            str(pending.get(key, ""))
            for key in ("dispatcher_nonce", "ca", "dispatcher_id", "dispatcher_serial")
        ]
        self._secrets = PairingSecrets(self._offer, self._agent_nonce, *texts)
        try:
            if len(bytes.fromhex(texts[0])) != NONCE_BYTES or texts[0] == self._agent_nonce:
                raise ValueError("nonce")
            if not HOST_NAME.fullmatch(texts[2]) or parse_serial(texts[3]) != texts[3]:
                raise ValueError("identity")
            self.code = pairing_code(self._secrets)
        except ValueError as error:
            raise PairingDenied("the dispatcher's first answer is malformed (%s)" % error) from error
        self._check_ca(texts[1])

    def _check_ca(self, ca: str) -> None:
        """The CA must be the pinned one, and the one this host already belongs to, if any."""
        try:
            self.ca_fingerprint = fingerprint(decode_pem(ca, "CERTIFICATE"))
        except ValueError as error:
            raise PairingDenied("the dispatcher's CA is no certificate (%s)" % error) from error
        pinned = self._wish.ca_fingerprint.replace(":", "").lower()
        if pinned and not is_same_secret(pinned, self.ca_fingerprint):
            raise PairingDenied("the CA is not the expected one: its fingerprint is %s" % self.ca_fingerprint)
        path = self._config.ca
        if os.path.exists(path) and not self._wish.replace_ca:
            if not self._is_known_ca(ca):
                hint = "to leave that CA and its dispatchers: --replace-ca"
                raise PairingDenied("this host belongs to another CA (%s)" % path, hint)

    def _is_known_ca(self, ca: str) -> bool:
        """Whether this host believes the CA already, perhaps beside another."""
        path = self._config.ca
        return os.path.exists(path) and split_pem(ca)[0] in load_cas(path)

    def wait(self) -> dict:
        """Open the commitment and wait for the decision. Raises PairingTimeout, PairingDenied."""
        if self.legacy:
            decision = self._next_line()
            if decision is None:
                raise PairingDenied("the dispatcher ended the exchange without a decision")
            return self._accept(decision)
        body = {"reqid": self.reqid, "reveal": self._agent_nonce, "exchange": self._exchange}
        if self._secret:
            body["token_proof"] = token_proof(self._secret, "agent", self._secrets)
        try:
            _, decision = self._connection.request("POST", "/pair/reveal", body, self._deadline, keep=True)
        except TransportError as error:
            self._connection.close()
            if error.state == "timeout":
                raise PairingTimeout(
                    "nobody approved request %s within %g s" % (self.reqid, self._deadline.seconds)
                ) from error
            raise PairingDenied("the exchange broke off: %s" % error.message) from error
        return self._accept(decision)

    def _accept(self, decision: dict) -> dict:
        """Check that a decision is for us, from the CA of step 2, and proved. Raises PairingDenied."""
        if decision.get("status") != "approved":
            reason = one_line(str(decision.get("reason", "no reason given"))[:300])
            raise PairingDenied("request %s was denied: %s" % (self.reqid, reason))
        texts = {
            key: str(decision.get(key, ""))
            for key in ("cert", "ca", "nonce", "dispatcher_serial", "dispatcher_id", "exchange")
        }
        try:
            if not is_same_secret(texts["nonce"], self._offer.nonce):
                raise ValueError("it is not the answer to our request")
            if self.legacy:
                self._check_ca(texts["ca"])
            else:
                same = (self._secrets.ca, self._secrets.dispatcher_id, self._secrets.dispatcher_serial)
                if (texts["ca"], texts["dispatcher_id"], texts["dispatcher_serial"]) != same:
                    raise ValueError("the CA or the dispatcher is not the one the code stands for")
                self._check_answer(texts["cert"], texts["exchange"])
            if self._secret:
                proof = token_proof(self._secret, "dispatcher", self._secrets, texts["cert"])
                if not is_same_secret(proof, str(decision.get("token_proof", ""))):
                    raise ValueError("the dispatcher does not know the token")
            texts["dispatcher_serial"] = parse_serial(texts["dispatcher_serial"])
            texts["dispatcher_id"] = texts["dispatcher_id"] or self._wish.dispatcher
            if not HOST_NAME.fullmatch(texts["dispatcher_id"]):
                raise ValueError("its dispatcher id is malformed")
        except (TrustError, ValueError) as error:
            raise PairingDenied("the decision is not believed: %s" % error) from error
        return texts

    def _check_answer(self, certificate: str, exchange: str) -> None:
        """The CA must have said, with the certificate, that it answers this very exchange: who only relays
        it cannot put another dispatcher, or another key, in the place of the true one. Raises ValueError."""
        said = parse_certificate(certificate.encode("utf-8")).pairing_proof
        if not said and not exchange and not (self._wish.ca_fingerprint and not self._secret):
            self._check_new(certificate)
            return  # an older dispatcher, whom a person or a token has proved
        if not said:
            raise ValueError(
                "the CA does not say that it answers this request: the dispatcher runs an older release, or"
                " somebody is in between; pair by a token, or compare the code and leave out --ca-fingerprint"
            )
        if not exchange or not is_same_secret(said, pairing_answer(self._secrets, exchange).hex()):
            raise ValueError("the certificate was issued in another exchange")

    def _check_new(self, certificate: str) -> None:
        """An earlier certificate of ours, which anybody can see, is no answer. Raises ValueError."""
        path = self._config.cert
        if os.path.exists(path):
            present, info = read_certificate(path), parse_certificate(certificate.encode("utf-8"))
            if info.serial == present.serial or info.not_before < self._began - MAX_SKEW - BACKDATE_SECONDS:
                raise ValueError("it is an earlier certificate of this host")

    def store(self, decision: dict) -> CertInfo:
        """Put certificate, CA and trust in place, each whole, and say so. Raises PairingDenied, StorageError.

        The certificate comes last: without it the host is simply not paired, and can ask again.
        """
        config = self._config
        try:
            for text in (decision["ca"], decision["cert"]):
                decode_pem(text, "CERTIFICATE")  # one block each: a second one would be stored unseen
            ca_pem, pem = decision["ca"].encode("ascii"), decision["cert"].encode("ascii")
            self._openssl.check_chain(pem, ca_pem, "sslserver")
            self._openssl.check_key_match(pem, config.key)
            info = parse_certificate(pem)
            agreed = self._agree(decision["exchange"])
        except (TrustError, ProgramError, ValueError) as error:
            hint = ""
            if is_clock_off(self.skew):
                hint = "the dispatcher's clock is %s: set one of them, and ask again" % describe_skew(
                    self.skew
                )
            raise PairingDenied("the certificate is not believed: %s" % error, hint) from error
        if not self._is_known_ca(decision["ca"]):
            write_atomic(config.ca, ca_pem, mode=0o644, durable=True)
        serial, dispatcher_id = decision["dispatcher_serial"], decision["dispatcher_id"]
        add_trusted(
            config.trusted_dispatchers_path, serial, dispatcher_id, older=config.dispatcher_serial_path
        )
        edit_request_secrets(
            request_secrets_path(config), lambda known: self._note(known, dispatcher_id, agreed)
        )
        write_atomic(config.cert, pem, mode=0o644, durable=True)
        if not self.legacy:
            try:
                self._connection.request("POST", "/pair/stored", {"reqid": self.reqid}, Deadline(5))
            except TransportError:  # it only wanted to know
                pass
        self._connection.close()
        return info

    def _agree(self, exchange: str) -> str:
        """The secret that the dispatcher has by now; nothing when its release knows of none."""
        if not exchange or self.legacy:
            return ""
        return request_secret(self._openssl.agree(self._key, exchange), pairing_transcript(self._secrets))

    def _note(self, known: dict, dispatcher_id: str, agreed: str) -> None:
        known.pop(dispatcher_id, None)
        if agreed:
            known[dispatcher_id] = RequestSecret(agreed, True)

    def keep_only(self, others: list) -> None:
        """Close every descriptor but the connection's, the standard ones, and `others`."""
        close_descriptors([self._connection.descriptor(), *others])


class PairingState(NamedTuple):
    """Where an agent's pairing request stands, for `pairing-status` after `--background`."""

    reqid: str
    dispatcher: str
    code: str
    status: str  # waiting, stored, denied, timed out
    reason: str = ""
    pid: int = 0


def write_pairing_state(config: Config, state: PairingState) -> None:
    directory = config.default_path(AGENT_VAR + "/pairing")
    make_directory(directory, 0o700)
    write_atomic(os.path.join(directory, state.reqid + ".json"), encode_state(state._asdict()), mode=0o600)


def _load_pairing_state(path: str) -> PairingState:
    """One request as it is. Raises FileNotFoundError, StorageError, TypeError."""
    state = PairingState(**read_json_file(path))
    if state.status == "waiting" and state.pid and not os.path.exists("/proc/%d" % state.pid):
        state = PairingState(**read_json_file(path))  # what it said last, after we had read it
        if state.status == "waiting":
            state = state._replace(status="timed out", reason="its process has ended")
    return state


def load_pairing_states(config: Config) -> list:
    """The pairing requests this host has made, newest first."""
    directory = config.default_path(AGENT_VAR + "/pairing")
    try:
        names = [name for name in os.listdir(directory) if name.endswith(".json") and name[0] != "."]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError("cannot read %s: %s" % (directory, error.strerror), "run this as root") from error
    dated = []
    for name in names:
        path = os.path.join(directory, name)
        try:
            dated.append((os.stat(path).st_mtime, _load_pairing_state(path)))
        except FileNotFoundError:  # removed meanwhile
            pass
        except (StorageError, TypeError) as error:
            LOG.event("config-warn", MESSAGE="%s: %s" % (path, error))
    return [state for _, state in sorted(dated, key=lambda pair: pair[0], reverse=True)]


# ======================================================================================================
# 19. HOSTS
# Owns:  one request to many hosts or one: the fan-out, what an answer means, and what became of a request
#        whose connection broke. Whatever happens to a host comes back as one result.
# Uses:  HEAD, ERRORS, GROUND, SETTINGS, OPENSSL, TRUST, WIRE, CLIENT, RECORDS, REGISTRY, PAIRING
# ======================================================================================================


class HostResult(NamedTuple):
    """How one host ended. Every selected host gets exactly one of these."""

    host: str
    state: str  # ok, failed, refused, busy, timeout, unreachable, unknown
    reqid: str
    rtt: float = 0.0  # seconds
    error: str = ""
    hint: str = ""
    answer: dict = {}  # what the agent said, checked
    note: Optional[Finding] = None  # what was done for it besides
    room: Optional[AnswerRoom] = None  # what its output has of the client's Room, while somebody holds it


STATES = ("ok", "accepted", "failed", "refused", "busy", "timeout", "unreachable", "unknown")
OPEN_STATES = ("pending", "accepted", "running", "timeout", "unknown")  # the last word is not yet spoken
NEVER_STARTED = ("refused", "busy", "unreachable", "skipped")

LONG_POLL = 50  # seconds; less than what proxies and firewalls cut off, and a request a minute costs nothing
MAX_WAITING = 1000  # threads that wait for hosts at once; each is idle, and costs some 100 KiB


def fan_out(
    agents: list, work: Callable, parallel: int, check: Optional[Callable] = None
) -> Iterator[HostResult]:
    """`work(agent)` for every agent on at most `parallel` threads; results as they come.

    When the caller stops listening (Ctrl-C), or `check()`, which is called every second, raises, no further
    host is begun. One host needs no thread, unless there is such a check.
    """
    if len(agents) == 1 and check is None:
        yield work(agents[0])
        return
    import queue

    results: Any = queue.SimpleQueue()
    waiting = iter(agents)
    guard = threading.Lock()
    stopped = threading.Event()

    def labour() -> None:
        while not stopped.is_set():
            with guard:
                agent = next(waiting, None)
            if agent is None:
                return
            try:
                result = work(agent)
            except BaseException as error:
                result = error  # for the caller, whom a result that never comes would hold for ever
            if not stopped.is_set():
                results.put(result)
            result = None  # so that nobody holds it while this thread works for the next host

    try:
        for number in range(min(parallel, len(agents))):
            try:
                threading.Thread(target=labour, daemon=True).start()
            except RuntimeError:  # can't start new thread: the others do the work
                if not number:
                    raise Unavailable("cannot start a thread; try again later") from None
                break
        for _ in agents:
            while True:
                try:
                    result = results.get(timeout=None if check is None else 1)
                    break
                except queue.Empty:
                    check()
            if isinstance(result, BaseException):
                raise result
            yield result
    finally:
        stopped.set()
        while not results.empty():  # threads that still wait hold the queue, and it would hold its results
            results.get_nowait()


_OUTPUT = (*STREAMS, *(stream + "_base64" for stream in STREAMS))
_SENTENCES = ("faults", "left")  # members of an answer that are lists of them
_LISTS = ("scripts", "tags")  # ... and those that have a form of their own


def shorten_answer(answer: dict) -> dict:
    """An agent's answer with each of its texts as long as such a text is, and without lists and objects that
    no answer has: it goes on into logs, records and tables."""
    short: dict = {}
    for key, value in answer.items():
        if type(value) is str and len(value) > MAX_REMARK and key not in _OUTPUT:
            value = value[:MAX_REMARK] + "..."
        elif key in _SENTENCES and type(value) is list:
            value = [entry[:MAX_REMARK] if type(entry) is str else entry for entry in value[:100]]
        elif type(value) in (list, dict) and key not in _LISTS:
            value = type(value)()  # no answer has one there; who asks for a text sees that it is none
        if len(key) <= MAX_REMARK:
            short[key] = value
    return short


def without_output(answer: dict) -> dict:
    """An answer for those who only want to know how a run went."""
    short = {key: value for key, value in answer.items() if key not in _OUTPUT}
    return dict(short, **dict.fromkeys(STREAMS, "")) if short else short


class _Malformed(Exception):
    """An agent's answer lacks a field or has the wrong type in it."""


class _TooOld(Exception):
    """An agent's release does not know this request; the message is the request's name."""


class _Stranger(Exception):
    """The agent does not trust the certificate that we have shown; nothing has been done."""


def _check_known(status: int, answer: dict) -> None:
    if status == 403 and answer.get("error") == "serial mismatch":
        raise _Stranger("serial mismatch")


def _expect(answer: dict, fields: dict) -> dict:
    for name, kind in fields.items():
        if type(answer.get(name)) is not kind:
            raise _Malformed("the agent's answer has no valid `%s`" % name)
    return answer


_RUN_ANSWER = {"exit": int, "stdout": str, "stderr": str}
_PING_ANSWER = {"status": str}
_CAPABILITIES_ANSWER = {"status": str, "host": str, "version": str, "scripts": list}


def is_run_answer(answer: dict) -> bool:
    """Whether an agent's answer has the fields of a run, each of its type."""
    return all(type(answer.get(name)) is kind for name, kind in _RUN_ANSWER.items())


def _judge_refusal(status: int, answer: dict) -> tuple:
    return "refused", str(answer.get("error", "the agent answered %d" % status))


def judge_ping(status: int, answer: dict) -> tuple:
    _expect(answer, {key: str for key in ("host", "version", "expiry", "time") if key in answer})
    faults = answer.get("faults", [])
    if type(faults) is not list or not all(type(fault) is str for fault in faults):
        raise _Malformed("the agent's answer has no valid `faults`")
    if status != 200:
        return _judge_refusal(status, answer)
    _expect(answer, _PING_ANSWER)
    return ("ok", "") if answer["status"] == "ok" else ("failed", answer["status"])


def list_faults(result: HostResult) -> list:
    """What a host that answers says is wrong with it, in sentences."""
    return [one_line(fault[:300]) for fault in result.answer.get("faults", [])[:10]]


def judge_capabilities(status: int, answer: dict) -> tuple:
    if status != 200:
        return _judge_refusal(status, answer)
    _expect(answer, _CAPABILITIES_ANSWER)
    names = set()
    for entry in answer["scripts"]:
        name = entry.get("name") if type(entry) is dict else None
        if type(name) is not str or not SCRIPT_NAME.fullmatch(name):
            raise _Malformed("the agent's answer lists a script without a valid name")
        if name in names or len(names) >= MAX_OFFERS:
            raise _Malformed("the agent's answer lists a script twice, or more than %d" % MAX_OFFERS)
        if any(type(value) is str and len(value) > MAX_PATH for value in entry.values()):
            raise _Malformed("the agent's answer says more of a script than there can be")
        names.add(name)
    return "ok", ""


def judge_run(status: int, answer: dict) -> tuple:
    """(state, error) of an answer to /run."""
    error = answer.get("error", "")
    if status == 202:
        return "accepted", ""
    if status in (409, 503):
        return "busy", str(error or ("busy" if status == 409 else "the agent answered 503"))
    if status == 500 and answer.get("status") == "unknown":
        return "unknown", str(error)
    if status != 200:
        return ("refused" if status < 500 else "failed"), str(error or "the agent answered %d" % status)
    _expect(answer, _RUN_ANSWER)
    if answer["exit"] == 0 and answer.get("cancelled") is not True:
        return "ok", ""
    if answer["exit"] == -1:
        return "refused", str(error or "the agent refused")
    return "failed", str(error or ("cancelled" if answer.get("cancelled") is True else ""))


def judge_result(status: int, answer: dict) -> tuple:
    """(state, error) of an answer to /result; `expired` is a run that the agent does not have (any more)."""
    if status == 404 and answer.get("status") == "unknown":
        return "expired", "no such run there"
    if status == 404:
        raise _TooOld("result")
    if status == 200 and answer.get("status") == "running":
        return "running", ""
    return judge_run(status, answer)


def judge_cancel(status: int, answer: dict) -> tuple:
    if status == 404 and answer.get("status") == "unknown":
        return "expired", "no such run there"
    if status in (404, 405):
        raise _TooOld("cancel")
    if status != 200:
        return _judge_refusal(status, answer)
    _expect(answer, {"status": str, "processes_left": int})
    if answer["status"] not in ("cancelled", "done", "running"):
        raise _Malformed("the agent's answer has no valid `status`")
    return answer["status"], ""


class RunRequest(NamedTuple):
    """What to run, for whom."""

    script: str
    args: tuple
    reqid: str
    username: str
    token: str = ""
    timeout: int = 0  # seconds the script may take; 0: as the agent's files say
    mode: str = "sync"  # sync, async or stream
    retries: int = 0  # how often to repeat what is known not to have started
    source_ip: str = ""


def check_run_request(request: RunRequest) -> None:
    """Raise UsageError for what no agent would take, before anything is asked or sent."""
    if not SCRIPT_NAME.fullmatch(request.script):
        shown = one_line(request.script[:80])
        raise UsageError(
            "`%s` is not a script name (letters, digits, _ and -, at most %d)" % (shown, MAX_SCRIPT_NAME)
        )
    for number, argument in enumerate(request.args, 1):
        try:
            argument.encode("utf-8")
        except UnicodeEncodeError:
            raise UsageError(
                "argument %d is not UTF-8" % number, "pass it encoded, for instance as base64"
            ) from None
        if "\0" in argument:
            raise UsageError("argument %d has a NUL byte" % number)
    if len(encode_json({"args": request.args})) > MAX_BODY - 16384:
        raise UsageError("the arguments are larger than a request may be (%d bytes)" % (MAX_BODY - 16384))


class _Received:
    """What one host has shown of a run, however many connections that took."""

    def __init__(self, host: str, is_run: bool, show: Optional[Callable], begin: tuple) -> None:
        self._host = host
        self._is_run = is_run  # the first request started it
        self._show = show
        self._offsets = dict(zip(STREAMS, begin))  # -1: from now

    def where(self) -> str:
        """Where to go on, as a query of /follow."""
        if -1 in self._offsets.values():
            return "from=now"
        return "&".join("%s=%d" % pair for pair in self._offsets.items())

    def take(self, status: int, event: dict) -> Optional[tuple]:
        """Deal with one line; (state, error, answer) when it was the last one. Raises _Malformed."""
        if "event" not in event:
            return self._take_whole(status, shorten_answer(event))
        if event["event"] == "end":
            answer = without_output(shorten_answer(event))
            return (*judge_run(200, answer), answer)
        if event["event"] == "output":
            self._take_output(event)
        return None

    def _take_whole(self, status: int, answer: dict) -> tuple:
        """An answer that is no stream: a refusal, or the result of a release that does not stream."""
        if self._is_run and status == 404:  # asked by its id, after the connection had broken
            raise TransportError("the agent knows no such run", "unknown")
        state, error = (judge_run if self._is_run else judge_result)(status, answer)
        for stream in STREAMS:
            if state in ("ok", "failed") and self._show is not None:
                data = str(answer.get(stream, "")).encode("utf-8", "surrogatepass")
                self._show(self._host, stream, data[max(0, self._offsets[stream]) :])
        return state, error, without_output(answer)

    def _take_output(self, event: dict) -> None:
        import base64

        _expect(event, {"stream": str, "offset": int, "data": str})
        if event["stream"] not in STREAMS:
            raise _Malformed("the agent's answer has no valid `stream`")
        self._offsets[event["stream"]] = event["offset"]
        exact = event.get("base64")
        try:
            data = base64.b64decode(exact) if type(exact) is str else event["data"].encode("utf-8")
        except ValueError:
            raise _Malformed("the agent's answer has output that is none") from None
        if self._show is not None:
            self._show(self._host, event["stream"], data)


def quote_refusal(status: int, answer: dict) -> str:
    """What an agent says about what it does not do."""
    return one_line(str(answer.get("error", "it answered %d" % status))[:MAX_REMARK])


class HostSession:
    """Requests to one host, one after the other, over one connection for as long as the host keeps it: an
    agent closes it, for one, when it reloads what a request has changed. Only for what may be asked twice."""

    def __init__(self, connect: Callable) -> None:
        """`connect()` gives a Connection. Raises TransportError."""
        self._connect = connect
        self._connection = connect()
        self._is_used = False

    def request(
        self, method: str, path: str, body: Optional[dict], deadline: Deadline, limit: int = MAX_BODY,
        room: Optional[AnswerRoom] = None,
    ) -> tuple:  # fmt: skip
        """As `Connection.request`."""
        was_used, self._is_used = self._is_used, True
        if was_used and not self._connection.is_kept:
            self.renew()
            was_used = False
        try:
            return self._connection.request(method, path, body, deadline, True, limit, room)
        except TransportError as error:
            if not was_used or error.state == "timeout":
                raise
            self.renew()
        return self._connection.request(method, path, body, deadline, True, limit, room)

    def renew(self) -> None:
        """Go on over another connection."""
        self._connection.close()
        self._connection = self._connect()

    def peer_cert(self) -> Optional[PeerCert]:
        return self._connection.peer_cert()

    def peer_pem(self) -> bytes:
        return self._connection.peer_pem()

    def __enter__(self) -> "HostSession":
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()


_LONG_ANSWERS = (("/run", MAX_ANSWER), ("/result/", MAX_ANSWER), ("/capabilities", MAX_OFFER))


class HostClient:
    """Speaks with hosts, one call to one host at a time; whatever happens comes back as a result."""

    def __init__(self, config: Config, count: Optional[Callable] = None) -> None:
        """`count(worked)` is told how each attempt to connect went. Raises TrustError when the dispatcher's
        own identity cannot be used."""
        self.room = Room()
        self._config = config
        self._count = count
        self._handshakes = threading.BoundedSemaphore(config.max_parallel)
        self.load()

    def load(self) -> None:
        """Be who the files say that we are, and refuse whom they refuse. Raises TrustError."""
        self._identity = dispatcher_identity(self._config)
        if not os.path.exists(self._identity.cert):
            hint = "first: ced setup-ca, ced setup-ctrl-exec"
            raise TrustError("%s: no such file: there is no dispatcher here yet" % self._identity.cert, hint)
        self._context = new_client_context(self._identity)
        self._revoked = load_revoked(self._config.revoked_serials)

    def apart(self) -> "HostClient":
        """The same for another caller, whom hosts that do not answer this one do not hold up."""
        import copy

        other = copy.copy(self)
        other._handshakes = threading.BoundedSemaphore(self._config.max_parallel)
        return other

    def _find_proof(self, agent: Agent) -> Optional[Callable]:
        """How requests to a host are proved, if it has agreed on a secret; see `encode_request`."""
        try:
            secret = find_secret(secret_directory(self._config), agent.name)
        except StorageError as error:
            raise TransportError(error.message, hint=error.hint) from error
        if not secret:
            return None

        def prove(method: str, path: str, body: bytes) -> tuple:
            moment = iso_time(now())
            once = "%s %s" % (moment, new_id(4))  # or two equal requests of one second would be one
            return once, request_proof(secret, method, path, once, body)

        return prove

    def _connect(self, agent: Agent, context: Any) -> Connection:
        prove = self._find_proof(agent)
        connection = None
        try:
            with self._handshakes:
                connection = connect_agent(
                    build_target(agent), context, self._revoked, self._config.connect_timeout
                )
            connection.prove = prove
            return connection
        finally:
            if self._count is not None:
                self._count(connection is not None)

    def call(
        self, agent: Agent, reqid: str, method: str, path: str, body: Optional[dict], judge: Callable,
        seconds: float = 0, then: Optional[Callable] = None,
    ) -> HostResult:  # fmt: skip
        """One request to one host, whatever happens, as a result; `seconds` instead of `read_timeout`.

        After a good answer `then(agent, session, is_current)` may go on with the host, and returns the
        result's note; `is_current`: the agent trusts our present certificate.
        """
        room = AnswerRoom(self.room)

        def exchange(context: Any) -> tuple:
            deadline = Deadline(seconds or self._config.read_timeout)
            limit = next((most for start, most in _LONG_ANSWERS if path.startswith(start)), MAX_BODY)
            with HostSession(lambda: self._connect(agent, context)) as session:
                status, answer = session.request(method, path, body, deadline, limit, room)
                answer = shorten_answer(answer)
                _check_known(status, answer)
                state, error = judge(status, answer)
                note = None
                if then is not None and state == "ok":
                    note = then(agent, session, context is self._context)
                return state, error, answer, note

        try:
            result = self._judge_safely(agent, reqid, lambda: self._as_known(agent, reqid, exchange))
        finally:
            room.end()
        if result.state in ("ok", "failed"):
            return result._replace(room=room)
        room.give_back()
        answer = result.answer  # nobody shows its output
        return result._replace(answer=without_output(answer) if is_run_answer(answer) else answer)

    def _judge_safely(self, agent: Agent, reqid: str, exchange: Callable) -> HostResult:
        """What `exchange()` says, which is (state, error, answer, note), and what went wrong instead."""
        began = time.monotonic()
        answer: dict = {}
        hint, note = "", None
        try:
            state, error, answer, note = exchange()
        except TransportError as problem:
            state, error, hint = problem.state, problem.message, problem.hint
        except _Stranger as problem:
            state, error = "refused", str(problem)
        except _Malformed as problem:
            state, error, answer = "unknown", str(problem), {}
        except _TooOld as problem:
            state, error = "refused", "%s: %s runs an older agent" % (problem, agent.name)
        except (BrokenPipeError, OutputError):  # our own output, when it is shown as it comes
            raise
        except Exception as problem:
            log_bug(problem, REQID=reqid, HOST=agent.name)
            state, error = "unknown", "internal error; see the log"
        return HostResult(agent.name, state, reqid, time.monotonic() - began, error, hint, answer, note)

    # --- an agent that does not know our present certificate yet -----------------------------------------

    def _as_known(self, agent: Agent, reqid: str, exchange: Callable) -> Any:
        """Do `exchange(context)`; if the agent does not know the certificate that we show, show an earlier
        one and introduce ourselves. What it refused, it has not done: so it may be asked again."""
        try:
            return exchange(self._context)
        except (TransportError, _Stranger) as problem:
            if isinstance(problem, TransportError) and not problem.is_refusal:
                raise
            context = self._introduce(agent, reqid)
            if context is None:
                raise
        return exchange(context)

    def _introduce(self, agent: Agent, reqid: str) -> Any:
        """Have the agent trust our present certificate, on the word of an earlier one that it knows. Returns
        what to go on with: the present one, the earlier one with an agent too old to learn, or None."""
        body = {"serial": read_certificate(self._identity.cert).serial, "action": "add", "reqid": reqid}
        requests = [("/rotate-serial", body)]
        handover = load_handover(self._identity.ca)
        if handover:  # or it could not verify our present certificate
            requests.insert(0, ("/renew-complete", dict(handover, reqid=reqid)))
        for former in find_former(self._identity):
            try:
                context = new_client_context(former)
                with HostSession(lambda: self._connect(agent, context)) as session:
                    for path, body in requests:
                        deadline = Deadline(self._config.read_timeout)
                        status, _ = session.request("POST", path, body, deadline)
                        if status in (404, 405):
                            return context
            except (TransportError, TrustError):
                continue
            if status == 200:
                LOG.event("rotate", REQID=reqid, HOST=agent.name, SERIAL=body["serial"], CHANGE="add")
                self._remember_trust(agent, body["serial"])
                return self._context
        return None

    def try_identity(self, agent: Agent, identity: Identity) -> str:
        """What keeps an agent from accepting this identity of ours, in words; nothing when it does."""
        body, deadline = {"reqid": new_id()}, Deadline(self._config.read_timeout)
        try:
            with self._connect(agent, new_client_context(identity)) as connection:
                status, answer = connection.request("POST", "/ping", body, deadline)
        except (TransportError, TrustError) as error:
            return error.message
        return "" if status == 200 else quote_refusal(status, answer)

    def _remember_trust(self, agent: Agent, serial: str) -> None:
        """Note in the registry that a host has heard of our present certificate."""
        directory = self._config.registry_dir
        if os.access(directory, os.W_OK):  # the HTTP API may only read: the next `ced ping` sees for itself
            update_agent(directory, agent.name, lambda known: with_trust(known, serial))

    def fetch(self, agent: Agent, reqid: str, wait: float) -> HostResult:
        """Ask for a result, which the agent may take `wait` seconds to give."""
        seconds = int(-(-wait // 1))
        path = "/result/%s?wait=%d" % (reqid, seconds)
        return self.call(agent, reqid, "GET", path, None, judge_result, seconds + self._config.read_timeout)

    def recover(self, agent: Agent, request: RunRequest, lost: HostResult, deadline: Deadline) -> HostResult:
        """The result of a run whose connection broke after it had been sent: by its id, until the deadline.

        A run that the agent does not know may still be on its way there, waiting for a hook; an answer that
        cannot be used may have been an accident. Both are asked for again, but not for ever.
        """
        pause, misses = 0.2, 0
        while misses < 3:
            time.sleep(min(pause, deadline.left()))
            if deadline.is_over():
                break
            pause = min(2.0, 2 * pause)
            found = self.fetch(agent, request.reqid, min(LONG_POLL, deadline.left()))
            if found.state == "running" and request.mode == "async":
                return found._replace(state="accepted")
            if is_run_answer(found.answer):
                return found._replace(rtt=lost.rtt + found.rtt)
            misses = 0 if found.rtt > 5 else misses + (found.state in ("expired", "unknown", "refused"))
            if found.state == "expired":
                lost = lost._replace(error="the connection was lost, and the agent knows no such run")
        return lost

    def follow(
        self, agent: Agent, reqid: str, run: Optional[dict], show: Optional[Callable],
        begin: tuple = (0, 0), check: Optional[Callable] = None,
    ) -> HostResult:  # fmt: skip
        """Show a run on one host as it writes, over as many connections as that takes, each going on where
        the last one broke. `run` is the body that starts it; without one, it runs already, and `begin` says
        where in its streams to begin (-1: now). The result has no output. `check()` is called at least as
        often as the host gives a sign of life, to end all this by what it raises: BrokenPipeError."""
        seconds = self._config.read_timeout
        received = _Received(agent.name, run is not None, show, begin)
        room = AnswerRoom(self.room)
        body = run

        def exchange(context: Any) -> tuple:
            nonlocal body
            lost: Optional[TransportError] = None
            deadline, heard = Deadline(seconds), False
            while lost is None or not deadline.is_over():
                method, path = "POST", "/run"
                if body is None:
                    method, path = "GET", "/follow/%s?%s" % (reqid, received.where())
                try:
                    with self._connect(agent, context) as connection:
                        lines = connection.request_lines(method, path, body, Patience(seconds), room)
                        for status, event in lines:
                            if check is not None:
                                check()
                            _check_known(status, event)
                            ended = received.take(status, event)
                            if ended is not None:
                                return (*ended, None)
                            heard = True
                    raise TransportError("%s ended the stream too early" % agent.name, "unknown")
                except TransportError as problem:
                    if problem.is_refusal and body is None:
                        raise TransportError(problem.message, "unknown", is_refusal=True) from None
                    if lost is None and problem.state == "unreachable" and body is not None:
                        raise  # nothing has been sent
                    lost = lost or problem
                    if heard:  # since the last loss; silence may have used up all the time
                        deadline, heard = Deadline(seconds), False
                if check is not None:
                    check()
                time.sleep(min(1.0, deadline.left()))
                body = None
            raise TransportError(lost.message, "unknown")

        try:
            return self._judge_safely(agent, reqid, lambda: self._as_known(agent, reqid, exchange))
        finally:
            room.give_back()


# ======================================================================================================
# 20. DISPATCH
# Owns:  what a command means: `ping`, `discovery`, `run` and what comes after it; changes to the registry
#        that an operator asks for.
# Uses:  HEAD, ERRORS, GROUND, SETTINGS, OPENSSL, TRUST, POLICY, RECORDS, REGISTRY, PAIRING,
#        HOSTS
# ======================================================================================================


def _update_request(record: RequestRecord, results: list, is_first: bool = False) -> RequestRecord:
    """A request's record with what hosts have said since."""
    hosts = dict(record.hosts)
    for result in results:
        known = hosts[result.host].state
        if not is_first and result.state != "running" and not is_run_answer(result.answer):
            continue  # it says nothing about how the run went
        if result.state in OPEN_STATES and known not in OPEN_STATES:
            continue  # what was known is better
        exit_status = result.answer["exit"] if is_run_answer(result.answer) else -1
        hosts[result.host] = Outcome(result.state, exit_status, result.error[:MAX_OUTCOME])
    has_ended = all(outcome.state not in OPEN_STATES for outcome in hosts.values())
    return record._replace(hosts=hosts, finished=record.finished or (iso_time(now()) if has_ended else ""))


def _as_noted(result: HostResult) -> HostResult:
    """A result for the request's record, which keeps no output."""
    return result._replace(answer=without_output(result.answer), room=None)


def _as_ended(result: HostResult) -> HostResult:
    """What an answer to /cancel says of how the run went, if it has ended."""
    if result.state not in ("cancelled", "done") or type(result.answer.get("exit")) is not int:
        return result
    answer = without_output(result.answer)
    state, error = judge_run(200, answer)
    return result._replace(state=state, error=error, answer=answer)


def _explain(result: HostResult) -> HostResult:
    """Say how to go on where the last word is not spoken."""
    if result.state not in ("timeout", "unknown"):
        return result
    verbs = ", ".join("ced %s %s" % (verb, result.reqid) for verb in ("wait", "follow", "cancel"))
    hint = "the script may still run there; see: " + verbs
    return result._replace(hint=hint)


def find_dispatcher_hook(config: Config) -> Optional[Hook]:
    """The hook that is asked before anything is sent, if there is one."""
    default = config.default_path(ETC + "/auth-hook")
    return find_hook(config.auth_hook, default, config.auth_hook_timeout, config.auth_deny_generic)


class Dispatcher:
    """The control host's operations. It keeps nothing between calls but the files that it works on."""

    def __init__(self, config: Config, count: Optional[Callable] = None) -> None:
        """`count`: see HostClient. Raises TrustError when the dispatcher's own identity cannot be used."""
        self._config = config
        self.client = HostClient(config, count)
        self._hook = find_dispatcher_hook(config)

    def select(self, selection: Selection, is_terse: bool = False) -> tuple:
        """The agents meant, and what is wrong with the registry; see `select_agents`."""
        return select_agents(self._config.registry_dir, selection, is_terse)

    def apart(self) -> "Dispatcher":
        """The same for another caller, at the same time; see HostClient."""
        import copy

        other = copy.copy(self)
        other.client = self.client.apart()
        return other

    def has_hook(self) -> bool:
        return self._hook is not None

    def authorise(self, context: HookContext) -> None:
        """Ask the hook, if there is one. Raises Denied."""
        if self._hook is None:
            return
        serial = read_certificate(self._config.cert).serial
        context = context._replace(
            dispatcher=self._config.dispatcher_id, dispatcher_serial=serial, operation=context.action
        )
        # older releases ask about a discovery as about a ping, and so their hooks know no other word
        action = "ping" if context.action == "discovery" else context.action
        self._hook.decide(context._replace(action=action))

    def _each(
        self, agents: list, action: str, work: Callable, parallel: int = 0, keep: bool = True,
        check: Optional[Callable] = None,
    ) -> Iterator[HostResult]:  # fmt: skip
        """`keep`: the caller keeps all results, in whatever form, and not each until it asks for the next.
        `check`: see `fan_out`."""
        room = self.client.room
        kept: list = []  # what the caller may have made of a result is as large
        try:
            for result in fan_out(agents, work, parallel or self._config.max_parallel, check):
                fields = {"REQID": result.reqid, "HOST": result.host, "STATE": result.state}
                if result.error:
                    fields["ERROR"] = result.error
                LOG.event(action, RTT="%dms" % (result.rtt * 1000), **fields)
                if keep and result.room is not None:
                    room.keep(result.room.size)
                    kept.append(result.room)
                yield result
                if not keep and result.room is not None:
                    result.room.give_back()  # now, and not when the next one is there
        finally:
            room.keep(-sum(one.size for one in kept))

    def ping(
        self, agents: list, reqid: str, then: Optional[Callable] = None, check: Optional[Callable] = None
    ) -> Iterator[HostResult]:
        """Ask every agent whether it is there; `then` as in `HostClient.call`, `check` as in `fan_out`."""

        def work(agent: Agent) -> HostResult:
            body = {"reqid": reqid, "time": iso_time(now())}
            return self.client.call(agent, reqid, "POST", "/ping", body, judge_ping, then=then)

        return self._each(agents, "ping", work, check=check)

    def discover(self, agents: list, reqid: str, check: Optional[Callable] = None) -> Iterator[HostResult]:
        """Ask every agent what it offers, and keep its tags in the registry; `check` as in `fan_out`."""

        def work(agent: Agent) -> HostResult:
            return self.client.call(agent, reqid, "GET", "/capabilities", None, judge_capabilities)

        for result in self._each(agents, "discovery", work, check=check):
            tags = result.answer.get("tags")
            if result.state == "ok" and isinstance(tags, dict):
                texts = {str(key): str(value) for key, value in tags.items()}
                if all(TAG_NAME.fullmatch(key) and len(text) <= 256 for key, text in texts.items()):
                    self._keep_tags(result.host, dict(list(texts.items())[:MAX_TAGS]))
            yield result

    def _keep_tags(self, name: str, tags: dict) -> None:
        directory = self._config.registry_dir
        agent = find_agent(directory, name)
        if agent is None or agent.tags == tags or not os.access(directory, os.W_OK):
            return  # the HTTP API may read the registry only: `ced discovery` keeps the tags
        update_agent(directory, name, lambda agent: agent._replace(tags=tags))

    # --- runs ----------------------------------------------------------------------------------------------

    def run(
        self, agents: list, request: RunRequest, show: Optional[Callable] = None, keep: bool = True
    ) -> Iterator[HostResult]:
        """Run a script on every agent, under the locks of all host:script pairs until the last result.

        `show(host, stream, data)` gets what a streamed run writes, from several threads. `keep`: the caller
        keeps all results. Raises Locked and StorageError on the first step, before anything is sent.
        """
        check_run_request(request)
        body = {"script": request.script, "args": list(request.args), "reqid": request.reqid}
        body.update(username=request.username, token=request.token)
        body.update({request.mode: True} if request.mode != "sync" else {})
        if request.timeout:
            body["timeout"] = request.timeout
        begun: set = set()

        def work(agent: Agent) -> HostResult:
            begun.add(agent.name)
            return _explain(self._run_with_retries(agent, request, body, show))

        raise_descriptor_limit()  # a lock and a connection for each host
        names = [agent.name for agent in agents]
        with HostLocks(self._config.lock_dir, names, request.script, request.reqid, request.username):
            moment = now()
            record = RequestRecord(
                request.reqid, request.script, request.mode, request.username, request.source_ip,
                iso_time(moment), dict.fromkeys(names, Outcome()), began="%.6f" % moment,
            )  # fmt: skip
            save_request(self._config.runs_dir, record)
            facts = {"HOSTS": len(agents), "USERNAME": request.username}
            LOG.event("dispatch", REQID=request.reqid, SCRIPT=request.script, **facts)
            results: list = []
            try:
                action = "run" if request.mode != "async" else "run-async"
                for result in self._each(agents, action, work, keep=keep):
                    results.append(_as_noted(result))
                    yield result
            finally:
                skipped = Outcome("skipped", -1, "interrupted before anything was sent")
                record.hosts.update({name: skipped for name in names if name not in begun})
                self._save(_update_request(record, results, is_first=True))
        sweep_requests(self._config.runs_dir, self._config.run_retention_hours * 3600)

    def _save(self, record: RequestRecord) -> None:
        try:
            save_request(self._config.runs_dir, record)
        except StorageError as error:
            LOG.event("run-store-fail", REQID=record.reqid, MESSAGE=error.message)

    def _note(self, record: RequestRecord, results: list) -> None:
        """Add what hosts have said to a request's record as it is now: others may have written it meanwhile,
        and what they know must not be forgotten."""
        lock = FileLock(os.path.join(self._config.runs_dir, ".lock"), mode=0o660)
        try:
            lock.acquire_within(5)
            latest = get_request(self._config.runs_dir, record.reqid)
            changed = _update_request(latest, results)
            if changed != latest:
                self._save(changed)
        except (NotFound, StorageError) as error:
            LOG.event("run-store-fail", REQID=record.reqid, MESSAGE=error.message)
        finally:
            lock.release()

    def is_coming(self, record: RequestRecord, host: str) -> bool:
        """Whether a host that does not know a run may just not have been asked yet: then somebody holds the
        locks of that run, which the kernel takes back from who has been killed."""
        return record.hosts[host].state == "pending" and record.reqid in [
            lock.get("reqid") for lock in list_locks(self._config.lock_dir)
        ]

    def _run_with_retries(
        self, agent: Agent, request: RunRequest, body: dict, show: Optional[Callable]
    ) -> HostResult:
        """Run on one host; again, after a growing pause, when it is known that nothing has started."""
        pause = 0.5
        for attempt in range(request.retries + 1):
            if request.mode == "stream":
                result = self.client.follow(agent, request.reqid, body, show)
            else:
                deadline = Deadline(self._config.read_timeout)
                result = self.client.call(agent, request.reqid, "POST", "/run", body, judge_run)
                if result.state == "unknown":
                    result = self.client.recover(agent, request, result, deadline)
            if result.state not in ("unreachable", "busy") or attempt == request.retries:
                break
            time.sleep(pause)
            pause = min(30, 2 * pause)
        return result

    def _registered(self, record: RequestRecord) -> tuple:
        """The agents that can still be asked about a request, and a result for each host that cannot."""
        agents, others = [], []
        for name, outcome in record.hosts.items():
            if outcome.state in NEVER_STARTED:
                others.append(HostResult(name, outcome.state, record.reqid, 0.0, outcome.error))
                continue
            agent = find_agent(self._config.registry_dir, name)
            if agent is None:
                others.append(HostResult(name, "expired", record.reqid, 0.0, "the host is not registered"))
            else:
                agents.append(agent)
        return agents, others

    def get_request(self, reqid: str) -> RequestRecord:
        """What is remembered of a request. Raises NotFound."""
        return get_request(self._config.runs_dir, reqid)

    def wait(
        self, record: RequestRecord, seconds: Optional[float], check: Optional[Callable] = None
    ) -> Iterator[HostResult]:
        """How a request goes on every host, each as soon as it has ended there, after `seconds` at the latest
        (None: whenever that is). A host that cannot be reached is tried again meanwhile. `check` as in
        `fan_out`."""
        deadline = Deadline(10**9 if seconds is None else seconds)
        agents, others = self._registered(record)

        def work(agent: Agent) -> HostResult:
            unreachable = Deadline(self._config.read_timeout)
            pause = 0.5
            while True:
                result = self.client.fetch(agent, record.reqid, min(LONG_POLL, deadline.left()))
                if result.state == "expired" and self.is_coming(record, agent.name):
                    result = result._replace(state="pending", error="")
                    time.sleep(min(pause, deadline.left()))
                if result.state in ("running", "pending"):
                    unreachable, pause = Deadline(self._config.read_timeout), 0.5
                    if deadline.is_over():
                        return result
                    if result.rtt < 1:  # it was to keep us waiting, and has not
                        time.sleep(min(pause, deadline.left()))
                elif result.state not in ("unreachable", "timeout", "unknown"):
                    return result
                elif deadline.is_over() or (seconds is None and unreachable.is_over()):
                    return result
                else:
                    time.sleep(min(pause, deadline.left()))
                    pause = min(5.0, 2 * pause)

        raise_descriptor_limit()
        yield from others
        results: list = []
        parallel = max(self._config.max_parallel, min(len(agents), MAX_WAITING))
        try:
            for result in self._each(agents, "result", work, parallel, check=check) if agents else ():
                known = record.hosts[result.host]
                if result.state in ("unreachable", "timeout", "unknown") and known.state not in OPEN_STATES:
                    error = "its output cannot be had now: " + result.error
                    answer = {"exit": known.exit, **dict.fromkeys(STREAMS, "")}
                    result = result._replace(state=known.state, error=error, answer=answer)
                results.append(_as_noted(result))
                yield result
        finally:
            self._note(record, results)

    def follow(
        self, record: RequestRecord, show: Callable, from_now: bool, places: Optional[dict] = None,
        check: Optional[Callable] = None,
    ) -> Iterator[HostResult]:  # fmt: skip
        """Show what a request writes on every host until it ends there, from the beginning or from now; or,
        with `places`, on its hosts only and from there on: name to offsets. `check`: see HostClient."""
        agents, others = self._registered(record)
        if places is not None:
            agents = [agent for agent in agents if agent.name in places]
            others = [result for result in others if result.host in places]

        def work(agent: Agent) -> HostResult:
            begin = (-1, -1) if from_now else (places or {}).get(agent.name, (0, 0))
            return _explain(self.client.follow(agent, record.reqid, None, show, begin, check))

        raise_descriptor_limit()
        yield from others
        results: list = []
        parallel = max(self._config.max_parallel, min(len(agents), MAX_WAITING))
        try:
            for result in self._each(agents, "result", work, parallel) if agents else ():
                results.append(result)
                yield result
        finally:
            self._note(record, results)

    def cancel(self, record: RequestRecord, username: str, token: str) -> Iterator[HostResult]:
        """End a request's script on every host where it may run. States: cancelled, done (it had ended),
        running (it could not be ended), expired, and those of transport."""
        agents, others = self._registered(record)
        body = {"reqid": record.reqid, "username": username, "token": token}
        seconds = self._config.read_timeout + 3 * KILL_GRACE_SECONDS

        def work(agent: Agent) -> HostResult:
            return self.client.call(agent, record.reqid, "POST", "/cancel", body, judge_cancel, seconds)

        yield from others
        results: list = []
        try:
            for result in self._each(agents, "cancel", work) if agents else ():
                results.append(result)
                yield result
        finally:
            self._note(record, [_as_ended(result) for result in results])


# --- results as JSON --------------------------------------------------------------------------------------
# The command line and the HTTP API show the same things in the same words.


def milliseconds(seconds: float) -> str:
    return "%dms" % round(seconds * 1000)


def render_ping(result: HostResult) -> dict:
    """One host of a ping."""
    entry = {"host": result.host, "status": result.state, "rtt": milliseconds(result.rtt)}
    entry["reqid"] = result.reqid
    if result.state == "ok":
        entry.update({key: result.answer.get(key, "") for key in ("expiry", "version")})
    if result.error:
        entry["error"] = result.error
    if list_faults(result):
        entry["faults"] = list_faults(result)
    if result.note is not None:
        entry["note"] = result.note.what
    return entry


def render_offer(result: HostResult) -> dict:
    """One host of a discovery."""
    entry: dict = {"status": result.state, "rtt": milliseconds(result.rtt)}
    if result.state == "ok":
        entry.update({key: result.answer.get(key) for key in ("version", "scripts", "tags")})
    if result.error:
        entry["error"] = result.error
    return entry


def render_run(result: HostResult, script: str) -> dict:
    """One host of a run."""
    answer = result.answer
    known = is_run_answer(answer)
    entry = {"host": result.host, "script": script, "exit": answer["exit"] if known else -1}
    entry.update({stream: answer.get(stream, "") if known else "" for stream in ("stdout", "stderr")})
    entry.update(rtt=milliseconds(result.rtt), reqid=result.reqid, state=result.state)
    for key in (
        "signal",
        "timed_out",
        "cancelled",
        "interrupted",
        "stdout_truncated",
        "stderr_truncated",
        "stdout_base64",
        "stderr_base64",
    ):
        if known and key in answer:
            entry[key] = answer[key]
    if result.error:
        entry["error"] = result.error
    return entry


def render_submission(result: HostResult) -> dict:
    """One host of an asynchronous run that was just sent."""
    entry = {"host": result.host, "status": result.state, "rtt": milliseconds(result.rtt)}
    if result.error:
        entry["error"] = result.error
    return entry


def render_cancelled(result: HostResult) -> dict:
    """One host of a cancellation."""
    entry = {"host": result.host, "status": result.state}
    keys = ("exit", "signal", "processes_ended", "processes_left", "left")
    entry.update({key: result.answer[key] for key in keys if key in result.answer})
    if result.error:
        entry["error"] = result.error
    return entry


def _is_open(record: RequestRecord, result: HostResult) -> bool:
    """Whether the last word on a host's run is not spoken: it goes on, or the host could not be asked."""
    if result.state in OPEN_STATES or (result.state == "unreachable" and result.rtt > 0):
        return True
    was_open = record.hosts[result.host].state in OPEN_STATES
    return was_open and result.state != "expired" and not is_run_answer(result.answer)


def render_host_status(result: HostResult) -> dict:
    """One host of a request's status."""
    answer = result.answer if is_run_answer(result.answer) else {}
    status = "done" if answer else result.state
    entry = {"status": status}
    entry.update(render_run(result, ""), state=result.state) if answer else {}
    for key in ("script", "host", "rtt", "reqid"):
        entry.pop(key, None)
    if result.error:
        entry["error"] = result.error
    return entry


def list_pending(record: RequestRecord, results: list) -> list:
    """The names of the hosts whose last word on a run is not spoken, sorted."""
    return sorted(result.host for result in results if _is_open(record, result))


def render_request(record: RequestRecord) -> dict:
    """A request as it is remembered."""
    return dict(record._asdict(), hosts={name: outcome._asdict() for name, outcome in record.hosts.items()})


def render_error(error: CtrlExecError) -> dict:
    """A failure."""
    body = {"ok": False, "error": error.message, "status": error.code}
    if isinstance(error, Locked):
        body.update(error="locked", code=4, conflicts=list(error.conflicts))
    elif isinstance(error, Denied):
        body["code"] = error.reason_code
    if error.hint:
        body["detail"] = error.hint
    return body


# --- changes to the registry ----------------------------------------------------------------------------


def unpair_agent(config: Config, name: str) -> Agent:
    """Refuse an agent from now on: its certificate is revoked here, and its entry removed."""
    with registry_lock(config.registry_dir):
        agent = get_agent(config.registry_dir, name)
        add_revoked(config.revoked_serials, list_serials(agent), "unpaired: %s" % name)
        remove_agent(config.registry_dir, name)
        save_secret(secret_directory(config), name, "", config.key)
    LOG.event("unpair", NAME=name, SERIAL=agent.serial)
    return agent


class AgentEdit(NamedTuple):
    """What to change about an agent; empty means as it is."""

    rename: str = ""
    ip: str = ""
    port: int = 0
    lookup_by: str = ""


def edit_agent(config: Config, name: str, edit: AgentEdit) -> Agent:
    """Change where an agent is, or what it is called here. Its certificate's name stays in its record."""
    if edit.rename and not is_host_name(edit.rename):
        raise UsageError("%s is not a host name" % one_line(edit.rename))
    check_ip_address(edit.ip)
    with registry_lock(config.registry_dir):
        agent = get_agent(config.registry_dir, name)
        changed = agent._replace(
            name=edit.rename or agent.name, ip=edit.ip or agent.ip, port=edit.port or agent.port,
            lookup_by=edit.lookup_by or agent.lookup_by,
        )  # fmt: skip
        if changed.name != agent.name:
            check_free_name(config.registry_dir, changed.name, renamed=agent.name)
            secrets = secret_directory(config)
            save_secret(secrets, changed.name, find_secret(secrets, agent.name), config.key)
            save_agent(config.registry_dir, changed)
            remove_agent(config.registry_dir, agent.name)
            save_secret(secrets, agent.name, "", config.key)
        else:
            save_agent(config.registry_dir, changed)
    LOG.event(
        "edit-agent", NAME=name, RENAME=edit.rename, IP=edit.ip, PORT=edit.port, LOOKUP_BY=edit.lookup_by
    )
    return changed


# ======================================================================================================
# 21. UPKEEP
# Owns:  trust that looks after itself: agents' certificates are renewed, the dispatcher's is rotated, the CA
#        is replaced, revoked dispatchers are made known; who has heard of what; and the control host's
#        checks of itself.
# Uses:  HEAD, ERRORS, GROUND, SETTINGS, OPENSSL, TRUST, POLICY, REGISTRY, PAIRING, HOSTS, DISPATCH
# On disk: rotation.json, upkeep.lock; the dispatcher's .next and .former-SERIAL certificates and keys
#
#   The dispatcher's certificate changes in steps, each of which a call that was killed can go on from:
#
#   .next is made ──→ announced, with the present one ──→ in use; the present one becomes .former-SERIAL,
#   which introduces us to hosts that were away ──(overlap)──→ trusted no more by each host, then removed
# ======================================================================================================

RENEWAL_PAUSE = 3600  # seconds between two attempts of `ping` to renew the same certificate
MAX_TRIED = 5  # hosts that are shown a new certificate before it is given up


class Rotation(NamedTuple):
    """What is remembered of certificates that come and go; which one is used, the files themselves say."""

    former: dict  # serial of ours that was replaced: {"since": ISO 8601, "gone": hosts that trust it no more}
    revoked: dict  # serial of a dispatcher's: {"since": ISO 8601, "told": hosts that refuse it}
    checked: str = ""  # when `maintain` was last through
    extra: dict = {}  # fields of other releases, kept as they are


ROTATION_FORMAT = 1  # of rotation.json; a release that changes its meaning counts up: older ones refuse it
_NAMES = {"former": "gone", "revoked": "told"}  # the tables, and what each calls its list of hosts


def rotation_path(config: Config) -> str:
    return config.default_path(VAR + "/rotation.json")


def _read_entries(values: dict, key: str, names: str, path: str) -> dict:
    """One of the two tables of rotation.json. Raises StorageError."""
    entries = values.get(key, {})
    try:
        return {
            parse_serial(serial): {"since": str(entry["since"]), names: [str(name) for name in entry[names]]}
            for serial, entry in entries.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise StorageError("%s: `%s` cannot be used" % (path, key)) from error


class _NewerFormat(Exception):
    """A state file says that it means something else than we know."""


def load_rotation(path: str) -> Rotation:
    """What rotation.json says. Raises StorageError."""
    try:
        values = read_json_file(path, MAX_HOSTS_FILE)
        if values.get("format", 1) != ROTATION_FORMAT:
            raise _NewerFormat
        tables = [_read_entries(values, table, names, path) for table, names in _NAMES.items()]
    except FileNotFoundError:
        return Rotation({}, {})
    except _NewerFormat:
        message = "%s was written by a newer release, whose rotation of certificates this one does not know"
        raise StorageError(message % path, "use that release here; README, Rolling back") from None
    except StorageError as error:
        hint = "mend it, or remove it: hosts are asked again, and former certificates stay longer"
        raise StorageError(error.message, error.hint or hint) from error
    extra = {key: value for key, value in values.items() if key not in Rotation._fields}
    return Rotation(*tables, str(values.get("checked", "")), extra)


def edit_rotation(path: str, edit: Callable) -> Rotation:
    """Write what `edit(rotation)` makes of rotation.json, and return it. Raises StorageError."""
    make_directory(os.path.dirname(path), 0o755)
    with FileLock(path + ".lock"):
        rotation = edit(load_rotation(path))
        values = {key: value for key, value in rotation._asdict().items() if key != "extra"}
        values.update(format=ROTATION_FORMAT)
        data = encode_state(dict(rotation.extra, **values), MAX_HOSTS_FILE)
        write_atomic(path, data, mode=0o640, durable=True)
    return rotation


class _Visit(NamedTuple):
    """One agent, over a connection that is open."""

    agent: Agent
    session: HostSession
    reqid: str
    deadline: Deadline  # for all of it

    def who(self) -> tuple:
        """What another machine of the same name would not share."""
        return self.agent.paired, self.agent.reqid, self.agent.cert_name

    def ask(self, path: str, **body: str) -> tuple:
        """One more request: (status, answer). Raises TransportError."""
        body["reqid"] = self.reqid
        return self.session.request("POST", path, body, self.deadline)

    def rotate(self, action: str, serial: str) -> None:
        """Have the agent trust a serial, trust it no more, or revoke it. Raises Denied when it does not."""
        status, answer = self.ask("/rotate-serial", action=action, serial=serial)
        if status == 400 and action == "revoke":  # its release knows only the first two
            status, answer = self.ask("/rotate-serial", action="remove", serial=serial)
        if status in (404, 405):
            raise Denied("it runs an older agent, which cannot be told of certificates")
        if status != 200:
            words = {"add": "to trust", "remove": "to give up", "revoke": "to refuse"}[action], serial
            raise Denied("it was asked %s %s: %s" % (*words, quote_refusal(status, answer)))


class Caretaker:
    """Looks after trust on one host, whenever there is a connection to it."""

    def __init__(self, config: Config, eager: bool = False) -> None:
        """`eager`: do what is due now, even if it was tried a moment ago. Raises TrustError, StorageError."""
        self._config = config
        self._eager = eager
        self._openssl = OpenSSL()
        self._guard = threading.Lock()
        self._heard: list = []  # (table of Rotation, serial, host) that is not in rotation.json yet
        self.load()

    def load(self) -> None:
        """See which certificates there are."""
        cert, ca = self._config.cert, self._config.ca
        self.serial = read_certificate(cert).serial
        self.next_serial = read_certificate(next_path(cert)).serial if os.path.exists(next_path(cert)) else ""
        self.rotation = load_rotation(rotation_path(self._config))
        self.cas = name_cas(load_cas(ca))  # that every host should believe
        self.handover = load_handover(ca)
        self.signer = next_path(ca) if self.handover else ca  # of agents' certificates
        self.issuer = name_cas(split_pem(read_certificate_file(self.signer).decode("ascii", "replace")))

    def agents(self) -> list:
        """All hosts whose records can be read."""
        return load_agents(self._config.registry_dir)[0]

    def edit(self, edit: Callable) -> None:
        """Write what `edit(rotation)` makes of rotation.json. Raises StorageError."""
        edit_rotation(rotation_path(self._config), edit)
        self.load()

    def _update(self, visit: _Visit, change: Callable) -> None:
        """Change an agent's record, if it is still the one that this visit began with. Raises TrustError."""

        def guarded(known: Agent) -> Agent:
            if (known.paired, known.reqid, known.cert_name) != visit.who():
                raise TrustError("it was paired anew meanwhile")
            if visit.session.peer_cert().serial in load_revoked(self._config.revoked_serials):
                raise TrustError("its certificate was revoked meanwhile")
            return change(known)

        if update_agent(self._config.registry_dir, visit.agent.name, guarded) is None:
            raise TrustError("it was unpaired meanwhile")

    def tend(self, agent: Agent, session: HostSession, is_current: bool) -> Optional[Finding]:
        """Do what is due on a host that has just answered, and say what was done. Fits `HostClient.call`."""
        visit = _Visit(agent, session, new_id(), Deadline(2 * self._config.read_timeout))
        try:
            self._confirm(visit, is_current)
            finding = self._renew(visit)
            if is_current:
                self._spread(visit)
                if self._eager:
                    self._prove(visit)
            return finding
        except CtrlExecError as error:
            LOG.event("renew", HOST=agent.name, REQID=visit.reqid, ERROR=error.message)
            return Finding("FAIL", error.message, error.hint)

    def _confirm(self, visit: _Visit, is_current: bool) -> None:
        """Note which certificates the two of us have proved to each other, if the registry says otherwise."""
        agent, cert = visit.agent, visit.session.peer_cert()
        if agent.serial != cert.serial or not agent.expiry:
            shown = CertInfo(cert.serial, cert.common_name, cert.names, cert.not_before, cert.not_after)
            issuer = agent.issued.get(cert.serial, ("", ""))[1]
            self._update(visit, lambda known: with_certificate(known, shown, issuer))
        trusted = agent.dispatcher_serial if agent.serial_status == "current" else ""
        if is_current and trusted not in (self.serial, self.next_serial or self.serial):
            self._update(visit, lambda known: with_trust(known, self.serial))

    # --- its certificate, and the CAs that it believes ---------------------------------------------------

    def _renew(self, visit: _Visit) -> Optional[Finding]:
        """Renew a host's certificate and tell it of the CAs, where that is due."""
        agent = visit.agent
        reason = self._renewal_reason(visit)
        has_news = not self.knows_cas(agent) and bool(self.handover or agent.cas)
        if not (reason or has_news) or (self._was_tried(agent) and not self._eager):
            return None
        if reason and not os.access(ca_key_path(self.signer), os.R_OK):
            return Finding("WARN", "renewal is due (%s), and the CA's key is not here" % reason)
        self._update(visit, lambda known: known._replace(renewal_tried=iso_time(now())))
        certificate = self._make_certificate(visit) if reason else ""
        if reason and not certificate:
            until = iso_time(visit.session.peer_cert().not_after)[:10]
            return Finding("WARN", "it runs an older agent: pair it again before %s" % until)
        return self._deliver(visit, certificate)

    def knows_cas(self, agent: Agent) -> bool:
        """Whether an agent believes the CAs that it should, or the successor alone: it was paired late."""
        return agent.cas in (self.cas, self.issuer)

    def _renewal_reason(self, visit: _Visit) -> str:
        cert = visit.session.peer_cert()
        if self.handover and visit.agent.issuer != self.issuer:
            return "the CA is replaced"
        return "past half its life" if now() > (cert.not_before + cert.not_after) / 2 else ""

    def _was_tried(self, agent: Agent) -> bool:
        try:
            return 0 <= now() - parse_iso_time(agent.renewal_tried) < RENEWAL_PAUSE
        except ValueError:  # never
            return False

    def _make_certificate(self, visit: _Visit) -> str:
        """A certificate for the key that the agent has just proved to hold and the name that it is registered
        for; nothing when its release cannot renew. Raises TrustError."""
        status, answer = visit.ask("/renew")
        if status in (404, 405):
            return ""
        csr = answer.get("csr")
        if status != 200 or type(csr) is not str:
            raise TrustError("it gave no certificate request: %s" % quote_refusal(status, answer))
        self._openssl.check_request(csr)
        if parse_request(csr).public_key != parse_certificate(visit.session.peer_pem()).public_key:
            raise TrustError("its certificate request is for another key than it holds")
        name, days = visit.agent.cert_name, self._config.cert_days
        pem = self._openssl.sign(csr, name, "agent", days, self.signer, ca_key_path(self.signer))
        info = parse_certificate(pem.encode("ascii"))
        # before it leaves: whatever becomes of the answer, `unpair` refuses all that the host may hold
        self._update(visit, lambda known: with_issued(known, info, self.issuer))
        return pem

    def _deliver(self, visit: _Visit, certificate: str) -> Finding:
        """Send a new certificate, the CAs to believe, or both. Raises TrustError."""
        body = dict(self.handover)
        if self.knows_cas(visit.agent):
            body = {}
        elif visit.agent.cas:
            body.setdefault("ca", "".join(load_cas(self._config.ca)))
        if certificate:
            body["cert"] = certificate
        status, answer = visit.ask("/renew-complete", **body)
        if status in (404, 405):
            raise Denied("it runs an older agent, which cannot be told of the CA's successor")
        if status != 200:
            raise TrustError("it refused the renewal: %s" % quote_refusal(status, answer))
        if "ca" in body:
            self._update(visit, lambda known: known._replace(cas=self.cas))
        if not certificate:
            return Finding(
                "OK", "it has heard of the CA's successor" if self.handover else "it has the new CA"
            )
        info = parse_certificate(certificate.encode("ascii"))
        self._update(visit, lambda known: with_certificate(known, info, self.issuer))
        LOG.event("renew-complete", HOST=visit.agent.name, REQID=visit.reqid, SERIAL=info.serial)
        return Finding("OK", "its certificate is renewed until %s" % iso_time(info.not_after)[:10])

    def _prove(self, visit: _Visit) -> None:
        """See that a host takes our proofs, once and for all; agree on a secret with one that has none.
        Raises Denied, TrustError."""
        directory, name = secret_directory(self._config), visit.agent.name
        if not find_secret(directory, name) and not self._agree(visit):
            return
        status, answer = visit.session.request("POST", "/prove", {"reqid": visit.reqid}, visit.deadline)
        if status == 404 and answer.get("status") == "unknown":  # it was set up anew, or from a backup
            LOG.event("proof-unknown", HOST=name, REQID=visit.reqid)
            save_secret(directory, name, "", self._config.key)
            if self._agree(visit):
                status, answer = visit.session.request(
                    "POST", "/prove", {"reqid": visit.reqid}, visit.deadline
                )
        if status not in (200, 404):
            raise Denied(
                "it does not take our proofs: %s" % quote_refusal(status, answer), 1, "pair it again"
            )

    def _agree(self, visit: _Visit) -> bool:
        """Agree on what proves our requests; False with a release that knows of none."""
        directory, name = secret_directory(self._config), visit.agent.name
        key, public = self._openssl.new_exchange()
        status, answer = visit.ask("/agree", exchange=public)
        if status in (404, 405):  # it runs an older agent
            return False
        other = answer.get("exchange")
        if status != 200 or type(other) is not str:
            raise TrustError("it agreed on no secret: %s" % quote_refusal(status, answer), "pair it again")
        secret = request_secret(self._openssl.agree(key, other), public, other)
        save_secret(directory, name, secret, self._config.key)
        visit.session.renew()  # from here on with proofs
        LOG.event("agree", HOST=name, REQID=visit.reqid)
        return True

    # --- what it is to know of dispatchers ---------------------------------------------------------------

    def _spread(self, visit: _Visit) -> None:
        """Tell a host of our certificates that come and go, and of dispatchers that are revoked."""
        name = visit.agent.name
        if self.next_serial and visit.agent.dispatcher_serial != self.next_serial:
            visit.rotate("add", self.next_serial)
            self._update(visit, lambda known: with_trust(known, self.next_serial))
        for serial, entry in self.rotation.former.items():
            if self.is_overlap_over(entry) and name not in entry["gone"]:
                visit.rotate("remove", serial)
                self._hear("former", serial, name)
        for serial, entry in self.rotation.revoked.items():
            if name not in entry["told"]:
                visit.rotate("revoke", serial)
                self._hear("revoked", serial, name)
                self._hear("former", serial, name)

    def is_overlap_over(self, entry: dict) -> bool:
        """Whether a former certificate need not be trusted any more."""
        try:
            return now() > parse_iso_time(entry["since"]) + self._config.cert_overlap_days * 86400
        except ValueError:
            return True

    def _hear(self, table: str, serial: str, name: str) -> None:
        with self._guard:
            self._heard.append((table, serial, name))

    def note_heard(self) -> None:
        """Write down what hosts have confirmed. Raises StorageError."""
        heard, self._heard = self._heard, []

        def edit(rotation: Rotation) -> Rotation:
            for table, serial, name in heard:
                names = getattr(rotation, table).get(serial, {}).get(_NAMES[table], [])
                names[:] = sorted({*names, name})
            return rotation

        if heard:
            self.rotation = edit_rotation(rotation_path(self._config), edit)


_IF_SURE = "is it whole? to refuse it all the same: --force"


def _serial_status(agent: Agent, serials: tuple) -> str:
    """What an agent's record says about our certificates, as it is true now."""
    if not agent.dispatcher_serial:
        return "unknown"
    if agent.dispatcher_serial in serials:
        return "current"
    return "stale" if agent.serial_status == "stale" else "pending"


class Rotator:
    """Replaces the dispatcher's certificate and key, step by step. Callers see to it that they are alone."""

    def __init__(self, config: Config, dispatcher: Dispatcher, caretaker: Caretaker) -> None:
        self._config = config
        self._dispatcher = dispatcher
        self._caretaker = caretaker
        self._openssl = OpenSSL()
        self._identity = dispatcher_identity(config)

    def settle(self) -> None:
        """Finish what an interrupted call has left."""
        settle_next(self._openssl, self._identity.cert, self._identity.key)
        if os.path.exists(ca_key_path(self._config.ca)):
            settle_next(self._openssl, self._config.ca, ca_key_path(self._config.ca))
        remove_temporaries(os.path.dirname(self._identity.key))
        self._caretaker.load()
        kept = {read_certificate(former.cert).serial for former in find_former(self._identity)}
        kept.discard(self._caretaker.serial)
        known = self._caretaker.rotation.former
        if kept != set(known):  # a call was killed, or somebody has moved files away
            former = {serial: entry for serial, entry in known.items() if serial in kept}
            self._caretaker.edit(lambda rotation: rotation._replace(former=former))
            self._remember_former(kept - set(known))

    def _remember_former(self, serials: Iterable) -> None:
        since = iso_time(now())
        entries = {serial: {"since": since, "gone": []} for serial in serials}
        self._caretaker.edit(lambda rotation: rotation._replace(former={**entries, **rotation.former}))

    def prepare(self) -> None:
        """Make the next key and certificate, which nobody uses yet; or go on with what there is."""
        cert, key = next_path(self._identity.cert), next_path(self._identity.key)
        new_key_file(self._openssl, key, self._config.key_type)
        own = os.stat(self._identity.key)
        if os.path.exists(cert):
            info = read_certificate(cert)
            if not info.not_before <= now() < info.not_after:  # made when this host's clock was wrong
                os.unlink(cert)
        os.chown(key, own.st_uid, own.st_gid)  # whoever may read the present key may read the next
        os.chmod(key, stat.S_IMODE(own.st_mode))
        if not os.path.exists(cert):
            is_known = all(map(self._caretaker.knows_cas, self._caretaker.agents()))
            signer = self._caretaker.signer if is_known else self._config.ca
            name, days = self._config.dispatcher_id, self._config.cert_days
            request = self._openssl.new_request(key, name)
            pem = self._openssl.sign(request, name, "dispatcher", days, signer, ca_key_path(signer))
            write_atomic(cert, pem.encode("ascii"), mode=0o644, durable=True)
        self._caretaker.load()

    def change_over(self) -> list:
        """Use the next certificate, if a host has heard of it; the former stays for those that have not."""
        former, serial = self._caretaker.serial, self._caretaker.next_serial
        agents = self._caretaker.agents()
        untold = [agent.name for agent in agents if agent.dispatcher_serial != serial]
        if agents and len(untold) == len(agents):
            what = "no host could be told of the new certificate: the present one stays in use"
            return [Finding("FAIL", what, "when hosts answer: ced rotate-cert")]
        problem = self._try_next([agent for agent in agents if agent.name not in untold])
        if problem:
            what = "no host accepts the new certificate (%s): the present one stays in use" % problem
            return [Finding("FAIL", what, "is this host's clock right? then: ced rotate-cert")]
        kept = former_identity(self._identity, former)
        own = os.stat(self._identity.key)
        owner = Owner(own.st_uid, own.st_gid)
        write_atomic(kept.key, read_file(self._identity.key), stat.S_IMODE(own.st_mode), True, owner)
        write_atomic(kept.cert, read_certificate_file(self._identity.cert), mode=0o644, durable=True)
        self._remember_former([former])
        put_next(self._identity.cert, self._identity.key)
        LOG.event("rotate", SERIAL=serial, FORMER=former, HOSTS=len(agents), UNTOLD=len(untold))
        self._dispatcher.client.load()
        self._caretaker.load()
        until = iso_time(read_certificate(self._identity.cert).not_after)[:10]
        words = (serial, until, former, self._config.cert_overlap_days)
        findings = [Finding("OK", "certificate %s is in use until %s; %s stays trusted for %d days" % words)]
        for name in untold:
            self._mark(name, "pending")
            findings.append(
                Finding("WARN", "%s: it has not heard of it, and will at the next contact" % name)
            )
        return findings

    def _try_next(self, told: list) -> str:
        """Have a host that was told of the next certificate see it, before it is used; what went wrong."""
        paths = next_path(self._identity.cert), next_path(self._identity.key)
        problem = ""
        for agent in told[:MAX_TRIED]:
            problem = self._dispatcher.client.try_identity(agent, Identity(*paths, self._identity.ca))
            if not problem:
                break
        if problem:
            os.unlink(paths[0])
            self._caretaker.load()
        return problem

    def _mark(self, name: str, status: str) -> None:
        update_agent(self._config.registry_dir, name, lambda agent: agent._replace(serial_status=status))

    def retire_former(self) -> list:
        """Drop a former certificate that no host trusts any more; after the overlap, name those that do."""
        findings = []
        names = {agent.name for agent in self._caretaker.agents()}
        for serial, entry in sorted(self._caretaker.rotation.former.items()):
            if self._caretaker.is_overlap_over(entry) or (names and names <= set(entry["gone"])):
                findings += self._retire_one(serial, set(entry["gone"]))
        return findings

    def _retire_one(self, serial: str, gone: set) -> list:
        kept = former_identity(self._identity, serial)
        ends = read_certificate(kept.cert).not_after if os.path.exists(kept.cert) else 0.0
        findings = []
        waiting = [agent for agent in self._caretaker.agents() if agent.name not in gone]
        stale = [agent for agent in waiting if agent.dispatcher_serial != self._caretaker.serial]
        for agent in stale:
            if agent.serial_status != "stale":
                LOG.event("serial-stale", HOST=agent.name, SERIAL=serial)
                self._mark(agent.name, "stale")
            if now() < ends:
                words = (agent.name, self._caretaker.serial, iso_time(ends)[:10])
                what = "%s: stale: it has not heard of certificate %s; it can be told until %s" % words
                findings.append(Finding("WARN", what, "see that it can be reached"))
            else:
                what = "%s: stale: it trusts no certificate of ours that is still valid" % agent.name
                findings.append(Finding("FAIL", what, "pair it again, and approve it with --replace"))
        if waiting and now() < ends:
            return findings
        for path in (kept.cert, kept.key):
            if os.path.exists(path):
                os.unlink(path)
        self._caretaker.edit(
            lambda known: known._replace(former={one: e for one, e in known.former.items() if one != serial})
        )
        LOG.event("serial-retire", SERIAL=serial)
        return [*findings, Finding("OK", "certificate %s is retired" % serial)]


class Upkeep:
    """Looks after the dispatcher's own certificate, the CA and revocations, on all hosts."""

    def __init__(self, config: Config, dispatcher: Dispatcher) -> None:
        """Raises TrustError, StorageError."""
        self._config = config
        self._dispatcher = dispatcher
        self._caretaker = Caretaker(config, eager=True)
        self._rotator = Rotator(config, dispatcher, self._caretaker)
        self._openssl = OpenSSL()
        self._identity = dispatcher_identity(config)

    def _alone(self) -> FileLock:
        """Held by whoever changes the dispatcher's certificate or the CA. Raises Unavailable."""
        path = self._config.default_path(VAR + "/upkeep.lock")
        make_directory(os.path.dirname(path), 0o755)
        lock = FileLock(path)
        if not lock.acquire():
            raise Unavailable("another ced looks after certificates now", "try again when it has ended")
        return lock

    def _visit_all(self) -> list:
        """Tend every host that can be reached; what is worth telling."""
        agents, problems = load_agents(self._config.registry_dir)
        findings = [Finding("FAIL", problem, "mend it, or pair the host again") for problem in problems]
        visits = self._dispatcher.ping(agents, new_id(), self._caretaker.tend) if agents else ()
        for result in visits:
            note = result.note
            if result.state != "ok":
                note = Finding("WARN", result.error or result.state, result.hint)
            if note is not None:
                findings.append(note._replace(what="%s: %s" % (result.host, note.what)))
        self._caretaker.note_heard()
        return sorted(findings, key=lambda finding: finding.what)

    # --- the dispatcher's certificate --------------------------------------------------------------------

    def rotate(self) -> list:
        """Replace the dispatcher's certificate and key; one Finding for each thing to tell."""
        lock = self._alone()
        try:
            self._rotator.settle()
            self._rotator.prepare()
            return self._visit_all() + self._rotator.change_over()
        finally:
            lock.release()

    # --- the CA and revocations ----------------------------------------------------------------------------

    def _own_issuer(self) -> str:
        return find_issuer(self._openssl, self._config.ca, read_certificate_file(self._identity.cert))

    def _dependents(self) -> list:
        """Who still needs the CA that is being replaced, in words."""
        care = self._caretaker
        found = [
            "%s (%s)" % (agent.name, "its certificate" if care.knows_cas(agent) else "has not heard of it")
            for agent in self._caretaker.agents()
            if not care.knows_cas(agent) or agent.issuer != care.issuer
        ]
        if self._own_issuer() == self._config.ca:
            found.append("this dispatcher (its certificate)")
        else:
            untold = [
                agent.name for agent in self._caretaker.agents() if agent.dispatcher_serial != care.serial
            ]
            found += ["%s (trusts only our former certificate)" % name for name in untold]
        return found

    def _report_successor(self) -> list:
        if not self._caretaker.handover:
            return []
        found = self._dependents()
        if not found:
            return [Finding("OK", "nobody depends on the CA that is being replaced: ced retire-ca")]
        return [Finding("WARN", "the CA is being replaced; still depend on it: %s" % ", ".join(found))]

    def retire_ca(self) -> list:
        """Put the CA's successor in its place, if nobody depends on the CA any more. Raises TrustError."""
        ca = self._config.ca
        lock = self._alone()
        try:
            if os.path.exists(next_path(ca)):
                found = self._dependents()
                if found:
                    what = "the CA cannot be retired; these depend on it: %s" % ", ".join(found)
                    raise TrustError(what, "ced maintain moves them; ced unpair NAME gives one up")
            elif not any(os.path.exists(path) for path in (next_path(ca_key_path(ca)), endorsement_path(ca))):
                raise TrustError("%s has no successor" % ca, "first: ced setup-ca --next")
            kept = retire_ca(self._openssl, ca)
            LOG.event("rotate", CA=read_certificate(ca).serial, FORMER=os.path.basename(kept))
            self._dispatcher.client.load()
            self._caretaker.load()
            hint = "destroy its key: %s" % ca_key_path(kept)
            return [Finding("OK", "the CA is replaced; the former one is %s (%s)" % (kept, hint))] + (
                self._visit_all()
            )
        finally:
            lock.release()

    def is_known(self, serial: str) -> bool:
        """Whether a serial is or was one of this dispatcher's, as far as is remembered."""
        rotation = self._caretaker.rotation
        trusted = {agent.dispatcher_serial for agent in self._caretaker.agents()}
        return serial in {*rotation.former, *rotation.revoked, *trusted, self._caretaker.serial}

    def revoke_dispatcher(self, serial: str, is_sure: bool) -> list:
        """Have every host refuse a dispatcher's certificate, and report which do; `is_sure`: also one that is
        not known here. Raises TrustError, UsageError."""
        if not is_sure and not self.is_known(serial):
            raise UsageError(
                "this dispatcher has had no certificate %s, as far as it remembers" % serial, _IF_SURE
            )
        if serial in (self._caretaker.serial, self._caretaker.next_serial):
            raise TrustError("%s is the certificate in use here" % serial, "first: ced rotate-cert")
        entry = {"since": iso_time(now()), "told": []}
        self._caretaker.edit(lambda rotation: rotation._replace(revoked={serial: entry, **rotation.revoked}))
        LOG.event("rotate", SERIAL=serial, CHANGE="revoke")
        findings = self._visit_all()
        told = self._caretaker.rotation.revoked[serial]["told"]
        findings += [Finding("OK", "%s: it refuses %s" % (name, serial)) for name in told]
        return findings + self._report_revoked() + self._rotator.retire_former()

    def _report_revoked(self) -> list:
        findings = []
        for serial, entry in sorted(self._caretaker.rotation.revoked.items()):
            left = [agent.name for agent in self._caretaker.agents() if agent.name not in entry["told"]]
            if left:
                what = "dispatcher serial %s is not refused yet by %s" % (serial, ", ".join(left))
                findings.append(Finding("FAIL", what, "ced maintain tells them when they answer"))
        return findings

    # --- all of it, and a look at it -----------------------------------------------------------------------

    def _is_rotation_due(self) -> bool:
        """Whether the certificate ends soon, was being replaced, or is of a CA that hosts can do without."""
        info = read_certificate(self._identity.cert)
        if self._caretaker.next_serial or info.not_after - now() < self._config.cert_renewal_days * 86400:
            return True
        if not self._caretaker.handover or not all(map(self._caretaker.knows_cas, self._caretaker.agents())):
            return False
        return self._own_issuer() == self._config.ca

    def is_due(self) -> bool:
        """Whether `maintain` was last through longer ago than `cert_check_interval`."""
        try:
            checked = parse_iso_time(self._caretaker.rotation.checked)
        except ValueError:
            return True
        return not 0 <= now() - checked < self._config.cert_check_interval

    def maintain(self) -> list:
        """Do all that is due: one Finding for each thing that was done, or that needs a person."""
        lock = self._alone()
        try:
            self._rotator.settle()
            findings = []
            if self._is_rotation_due():
                self._rotator.prepare()
                findings = self._visit_all() + self._rotator.change_over()
            else:
                findings = self._visit_all()
            findings += self._rotator.retire_former() + self._report_revoked() + self._report_successor()
            self._caretaker.edit(lambda rotation: rotation._replace(checked=iso_time(now())))
        finally:
            lock.release()
        levels = [finding.level for finding in findings]
        LOG.event("cert-check", DONE=levels.count("OK"), WARN=levels.count("WARN"), FAIL=levels.count("FAIL"))
        return findings

    def status(self) -> dict:
        """Which certificates of this dispatcher there are, and which of them each host knows."""
        care = self._caretaker
        info = read_certificate(self._identity.cert)
        names = {agent.name for agent in self._caretaker.agents()}
        overlap = self._config.cert_overlap_days
        former = [
            {"serial": serial, "since": entry["since"], "overlap_days": overlap,
             "trusted_by": sorted(names - set(entry["gone"]))}
            for serial, entry in care.rotation.former.items()
        ]  # fmt: skip
        revoked = [
            {"serial": serial, "since": entry["since"], "not_told": sorted(names - set(entry["told"]))}
            for serial, entry in care.rotation.revoked.items()
        ]
        agents = [
            {"name": agent.name, "serial": agent.dispatcher_serial, "confirmed": agent.serial_confirmed,
             "status": _serial_status(agent, (care.serial, care.next_serial))}
            for agent in self._caretaker.agents()
        ]  # fmt: skip
        body = {"serial": care.serial, "expiry": iso_time(info.not_after), "next": care.next_serial}
        body.update(former=former, revoked=revoked, agents=agents, checked=care.rotation.checked)
        return dict(body, ca_dependents=self._dependents() if care.handover else None)


def revoke_agent(config: Config, who: str, is_sure: bool = False) -> list:
    """Refuse the certificates of a host, or a single one by its serial, from now on; the serials refused.
    `is_sure`: also a serial that no registered host has. Raises UsageError, StorageError, TrustError."""
    with registry_lock(config.registry_dir):  # so that no certificate is made for it meanwhile
        agent = find_agent(config.registry_dir, who)
        try:
            serials = list_serials(agent) if agent is not None else [parse_serial(who)]
        except ValueError:
            message = "%s is neither a registered host nor a serial" % one_line(who[:80])
            raise UsageError(message, "a name of `ced list-agents`, or a serial") from None
        if agent is None and not is_sure:
            known = {serial for one in load_agents(config.registry_dir)[0] for serial in list_serials(one)}
            if serials[0] not in known:
                raise UsageError("no registered host has a certificate %s" % serials[0], _IF_SURE)
        add_revoked(config.revoked_serials, serials, "revoked: %s" % who)
    LOG.event("revoked-cert", NAME=who, SERIALS=",".join(serials))
    return serials


# --- checks of the control host -------------------------------------------------------------------------


def check_hosts(dispatcher: Dispatcher, agents: list) -> list:
    """Whether each host answers and its clock agrees with ours, one Finding each."""
    findings = []
    for result in dispatcher.ping(agents, new_id()) if agents else ():
        skew = measure_skew(str(result.answer.get("time")))  # nothing from a release that does not say
        if result.state != "ok":
            hint = result.hint or "on %s: cea self-check" % result.host
            findings.append(Finding("WARN", "%s: %s" % (result.host, result.error or result.state), hint))
        elif skew is None:
            what = "%s answers (an older agent: it does not tell the time)" % result.host
            findings.append(Finding("WARN", what, "install this release there, and pair it again"))
        elif abs(skew) > MAX_SKEW + result.rtt:
            what = "%s: its clock is %s" % (result.host, describe_skew(skew))
            findings.append(Finding("WARN", what, "set one of them: certificates are judged by the clock"))
        else:
            findings.append(Finding("OK", "%s answers, and its clock agrees" % result.host))
        for fault in list_faults(result):
            findings.append(Finding("WARN", "%s: %s" % (result.host, fault), "on it: cea self-check"))
    return sorted(findings, key=lambda finding: finding.what)


def _check_registered(agent: Agent, revoked: frozenset) -> Iterator[Finding]:
    days = count_days_left(agent.expiry)
    if agent.serial in revoked:
        yield Finding(
            "FAIL",
            "%s: its certificate is revoked" % agent.name,
            "ced unpair %s, and pair it again" % agent.name,
        )
    if days is not None and days < 0:
        yield Finding(
            "FAIL", "%s: its certificate has expired" % agent.name, "pair it again: approve --replace"
        )
    elif days is not None and days < 30:
        yield Finding("WARN", "%s: its certificate expires in %d days" % (agent.name, days), "ced maintain")


def _control_places(config: Config) -> list:
    """What decides something on a control host, or holds what not everybody may read."""
    hook = find_dispatcher_hook(config)
    kin = [path for one in (config.ca, config.cert) for path in find_siblings(one)]
    keys = [path for one in (ca_key_path(config.ca), config.key) for path in find_siblings(one)]
    private = (config.path, config.registry_dir, rotation_path(config), token_directory(config))
    private += (secret_directory(config), config.pairing_dir)
    changed = (rotation_path(config), config.revoked_serials)
    locks = (config.default_path(VAR + "/upkeep.lock"), *(path + ".lock" for path in changed))
    return [
        *(Place(path) for path in (*kin, *keys, *locks, config.revoked_serials)),
        *(Place(path, is_private=True) for path in private),
        *(Place(path, True, DISPATCHER_USER) for path in (config.runs_dir, config.lock_dir)),
        *(Place(path) for path in ((hook.path,) if hook is not None else ())),
    ]


_REPLACE_CA = "ced setup-ca --next, ced maintain, ced retire-ca"


def _check_own_ca(config: Config, openssl: OpenSSL) -> list:
    """The CA and, if it is here, its key; the same of its successor."""
    key = ca_key_path(config.ca)
    if not os.path.exists(config.ca) and not os.path.exists(key):
        return [
            Finding(
                "FAIL", "there is no CA: %s" % config.ca, "put it back; on a new control host: ced setup-ca"
            )
        ]
    findings = check_cas(openssl, config.ca, _REPLACE_CA)
    if not os.path.exists(key):
        findings.append(
            Finding("WARN", "no CA key here: this host can run scripts, but pair nobody", "pair where it is")
        )
    elif os.path.exists(config.ca):
        try_check(
            findings, "CA certificate %s and its key" % config.ca,
            lambda: openssl.find_key(read_certificate_file(config.ca), key_paths(key)),
            "one of them is of another CA: put back what belongs to it",
        )  # fmt: skip
    return findings + check_keys(key)


def _check_own_identity(config: Config, openssl: OpenSSL) -> list:
    """The dispatcher's certificates: the present one, the next, and those that it replaced."""
    findings: list = []
    identity = dispatcher_identity(config)
    hint = "put back the CA, certificate and key that belong together; see README, When a key is lost"
    if not os.path.exists(identity.cert):
        hint = "put it back; on a new control host: ced setup-ctrl-exec"
    info = try_check(
        findings, "identity %s" % identity.cert,
        lambda: check_identity(openssl, identity, "sslclient", DISPATCHER_USER), hint,
    )  # fmt: skip
    if info is not None:
        findings.append(check_expiry(identity.cert, info, "ced rotate-cert"))
        hint = "hosts know it by the id that they were paired with: set dispatcher_id back"
        findings.append(check_name(identity.cert, info, config.dispatcher_id, hint))
    following = Identity(next_path(identity.cert), next_path(identity.key), identity.ca)
    for other in (following, *find_former(identity)):
        if os.path.exists(other.cert):
            try_check(
                findings, "certificate %s and its key" % other.cert,
                lambda: openssl.check_key_match(read_certificate_file(other.cert), other.key),
                "put its key back; without it, hosts that know only this certificate must be paired again",
            )  # fmt: skip
    return findings + check_keys(identity.key, DISPATCHER_USER)


def check_dispatcher(config: Config) -> list:
    """Everything the dispatcher depends on, one Finding each."""
    openssl = OpenSSL()
    findings = [Finding("WARN", warning, "mend it in %s" % config.path) for warning in config.warnings]
    findings += [Finding("OK", describe_config(config)), check_openssl(openssl)]
    if findings[-1].level != "FAIL":  # or what is wrong with openssl would be said of the CA
        findings += _check_own_ca(config, openssl) + _check_own_identity(config, openssl)
    findings += check_places(_control_places(config))
    state = (config.registry_dir, config.lock_dir, config.runs_dir, config.pairing_dir)
    for directory in dict.fromkeys((os.path.dirname(config.ca), *state)):
        findings += check_room(directory)
    revoked = try_check(
        findings, "revocation list", lambda: load_revoked(config.revoked_serials), "mend that line"
    )
    path = rotation_path(config)
    try_check(findings, "rotation %s" % path, lambda: load_rotation(path))
    findings += check_hook(find_dispatcher_hook(config))
    registry = try_check(
        findings, "registry %s" % config.registry_dir, lambda: load_agents(config.registry_dir)
    )
    if registry is not None:
        agents, problems = registry
        findings += [Finding("FAIL", problem, "mend it, or pair the host again") for problem in problems]
        for agent in agents:
            findings += _check_registered(agent, revoked or frozenset())
    return findings


# ======================================================================================================
# 22. API
# Owns:  the same operations over HTTP, for programs: which there are, who may ask for them, what their
#        answers look like, and the OpenAPI document, which is made from the same table.
# Uses:  HEAD, ERRORS, GROUND, SETTINGS, OPENSSL, TRUST, WIRE, SERVER, POLICY, RECORDS, REGISTRY, HOSTS,
#        DISPATCH, UPKEEP
# Why here: a thin skin on DISPATCH. It keeps nothing that another server on the same files would miss.
# ======================================================================================================

MAX_HOSTS = 10_000  # words in one request
MAX_RUNS = 1000  # records in one answer; a record of 100 hosts has 10 KB
RETRY_SECONDS = 1  # what a client that found no room is told to wait
FEED_ITEMS = 32  # pieces of output on their way to one listener; each has 64 KiB at most
EVENT_STREAM = "text/event-stream"
METRICS_TEXT = "text/plain; version=0.0.4; charset=utf-8"  # the Prometheus exposition format

_CREDENTIALS = (Field("username", str, most=256), Field("token", str, most=8192))
_ON_HOSTS = (Field("hosts", list, True, MAX_HOSTS, 1), *_CREDENTIALS)
_ON_SOME_HOSTS = (Field("hosts", list, most=MAX_HOSTS), *_CREDENTIALS)
_ON_RUN = (
    *_ON_HOSTS,
    Field("script", str, True, MAX_SCRIPT_NAME),
    Field("args", list, most=10000),
    Field("async", bool),
    Field("timeout", int, most=10**9),
)


class Operation(NamedTuple):
    """One thing that a client can ask for."""

    name: str
    method: str
    path: str  # a final `*` takes a request's id
    action: str  # what the hook is asked about; empty: open to everybody
    fields: tuple  # of the body
    answers: dict  # status of success to the name of its schema
    refusals: tuple  # statuses besides those that every operation may answer
    about: str
    query: tuple = ()  # Fields of numbers
    kind: str = "application/json"


OPERATIONS = (
    Operation("index", "GET", "/", "", _CREDENTIALS, {200: "Index"}, (), "what there is"),
    Operation("health", "GET", "/health", "", _CREDENTIALS, {200: "Health"}, (),
              "whether this server answers"),
    Operation("ping", "POST", "/ping", "ping", _ON_HOSTS, {200: "Pinged"}, (404, 411),
              "ask hosts whether they answer"),
    Operation("run", "POST", "/run", "run", _ON_RUN, {200: "Ran", 202: "Submitted"}, (404, 409, 411),
              "run a script on hosts; with async, answer once it has begun"),
    Operation("discovery", "GET", "/discovery", "discovery", _ON_SOME_HOSTS, {200: "Offers"}, (404,),
              "what all hosts offer"),
    Operation("discovery_of", "POST", "/discovery", "discovery", _ON_SOME_HOSTS, {200: "Offers"}, (404, 411),
              "what hosts offer"),
    Operation("status", "GET", "/status/*", "status", _CREDENTIALS, {200: "Status"}, (404,),
              "how an earlier run goes, with its output"),
    Operation("cancel", "POST", "/cancel/*", "cancel", _CREDENTIALS, {200: "Cancelled"}, (404, 411),
              "end the script of an earlier run"),
    Operation("runs", "GET", "/runs", "status", _CREDENTIALS, {200: "Runs"}, (), "the runs of the last day",
              (Field("last", int, most=MAX_RUNS, least=1),)),
    Operation("events", "GET", "/events/*", "status", _CREDENTIALS, {200: "Events"}, (404,),
              "what an earlier run writes, as it comes: server-sent events", kind=EVENT_STREAM),
    Operation("openapi", "GET", "/openapi.json", "", _CREDENTIALS, {200: "Document"}, (), "this document"),
    Operation("openapi_live", "GET", "/openapi-live.json", "discovery", _CREDENTIALS, {200: "Document"}, (),
              "this document, with the hosts and scripts there are"),
    Operation("metrics", "GET", "/metrics", "metrics", _CREDENTIALS, {200: "Metrics"}, (),
              "figures for Prometheus", kind=METRICS_TEXT),
)  # fmt: skip


# --- the OpenAPI document -------------------------------------------------------------------------------


def _object(required: str, **properties: Any) -> dict:
    return {"type": "object", "required": required.split(), "properties": properties}


def _list_of(items: dict) -> dict:
    return {"type": "array", "items": items}


def _map_of(values: dict) -> dict:
    return {"type": "object", "additionalProperties": values}


def _named(name: str) -> dict:
    return {"$ref": "#/components/schemas/" + name}


_TEXT = {"type": "string"}
_NUMBER = {"type": "integer"}
_FLAG = {"type": "boolean"}
_YES = {"const": True}
_TIME = {"type": "string", "description": "12ms"}
_ENDED = {
    "state": _TEXT, "error": _TEXT, "signal": _TEXT, "timed_out": _FLAG, "cancelled": _FLAG,
    "interrupted": _FLAG, "stdout_truncated": _NUMBER, "stderr_truncated": _NUMBER,
    "stdout_base64": _TEXT, "stderr_base64": _TEXT,
}  # fmt: skip
_HEADING = {"ok": _YES, "reqid": _TEXT}

_SCHEMAS = {
    "Error": _object(
        "ok error status", ok={"const": False}, error=_TEXT, detail=_TEXT, status=_TEXT, field=_TEXT,
        reqid=_TEXT, conflicts=_list_of(_TEXT),
        code={"type": "integer", "enum": [1, 2, 3, 4], "description": "1 denied, 2 bad credentials, "
              "3 insufficient privilege, 4 locked"},
    ),
    "Index": _object(
        "ok name version endpoints", ok=_YES, name=_TEXT, version=_TEXT,
        endpoints=_list_of(_object("method path about", method=_TEXT, path=_TEXT, about=_TEXT)),
    ),
    "Health": _object("ok version", ok=_YES, version=_TEXT),
    "Pinged": _object("ok reqid results", **_HEADING, results=_list_of(_object(
        "host status rtt reqid", host=_TEXT, status=_TEXT, rtt=_TIME, reqid=_TEXT, expiry=_TEXT,
        version=_TEXT, error=_TEXT,
    ))),
    "RunResult": _object(
        "host script exit stdout stderr rtt reqid state", host=_TEXT, script=_TEXT, exit=_NUMBER,
        stdout=_TEXT, stderr=_TEXT, rtt=_TIME, reqid=_TEXT, **_ENDED,
    ),
    "Ran": _object("ok reqid results", **_HEADING, results=_list_of(_named("RunResult"))),
    "Submitted": _object("ok reqid results", **_HEADING, results=_list_of(_object(
        "host status rtt", host=_TEXT, status=_TEXT, rtt=_TIME, error=_TEXT,
    ))),
    "Offers": _object(
        "ok reqid hosts", **_HEADING, warnings=_list_of(_TEXT),
        hosts=_map_of(_object(
            "status rtt", status=_TEXT, rtt=_TIME, version=_TEXT, tags={"type": ["object", "null"]},
            error=_TEXT, scripts=_list_of(_object(
                "name", name=_TEXT, path=_TEXT, executable=_FLAG, schema={"type": "object"},
                schema_version=_TEXT,
            )),
        )),
    ),
    "Status": _object(
        "ok reqid script mode started completed complete pending hosts", **_HEADING, script=_TEXT,
        mode={"enum": ["sync", "async", "stream"]}, started=_TEXT, complete=_FLAG, pending=_list_of(_TEXT),
        completed={"type": ["integer", "null"], "description": "seconds since the epoch"},
        results=_list_of(_named("RunResult")),
        hosts={"oneOf": [_list_of(_TEXT), _map_of(_object(
            "status", status=_TEXT, exit=_NUMBER, stdout=_TEXT, stderr=_TEXT, **_ENDED,
        ))]},
    ),
    "Cancelled": _object("ok reqid results", **_HEADING, results=_list_of(_object(
        "host status", host=_TEXT, status=_TEXT, error=_TEXT, processes_ended=_NUMBER,
        processes_left=_NUMBER,
    ))),
    "Runs": _object("ok runs", ok=_YES, warnings=_list_of(_TEXT), runs=_list_of(_object(
        "reqid script mode username source_ip started finished hosts", reqid=_TEXT, script=_TEXT, mode=_TEXT,
        username=_TEXT, source_ip=_TEXT, started=_TEXT, finished=_TEXT,
        hosts=_map_of(_object("state exit error", state=_TEXT, exit=_NUMBER, error=_TEXT)),
    ))),
    "Document": _object(
        "openapi info paths", openapi=_TEXT, info={"type": "object"}, paths={"type": "object"},
    ),
    "Events": _object(  # each of them; `data` is JSON, see README
        "id event data", id=_TEXT, event={"enum": ["output", "end", "lost", "complete"]}, data=_TEXT,
    ),
    "Metrics": _TEXT,
}  # fmt: skip

_REFUSALS = {
    400: "not a request: malformed, a field that is missing or of the wrong type",
    403: "the hook says no (codes 1 to 3), or a web page from elsewhere asks",
    404: "no such run or host, or not for you",
    409: "locked (code 4): another request runs this script on one of these hosts",
    411: "a POST without a Content-Length",
    413: "a body over 1 MiB",
    415: "a body that is not application/json",
    431: "too many headers, or too long ones",
    500: "a failure here; the log has it under the request's id",
    503: "no room; try again after Retry-After",
}
_ALWAYS = (400, 403, 413, 415, 431, 500, 503)
_PATTERNS = {"script": "^[A-Za-z0-9_-]{1,%d}$" % MAX_SCRIPT_NAME}


def _field_schema(field: Field) -> dict:
    """What `parse_fields` takes, as JSON Schema."""
    plain = {"type": "string", "pattern": _PATTERNS.get(field.name, "^[^\\x00]*$")}
    schema: dict = {
        str: {**plain, "maxLength": field.most},
        int: {"type": "integer", "minimum": field.least, "maximum": field.most},
        bool: {"type": "boolean"},
        list: {"type": "array", "items": plain, "minItems": field.least, "maxItems": field.most},
    }[field.kind]
    return schema if field.required else dict(schema, type=[schema["type"], "null"])


def _describe_operation(operation: Operation) -> dict:
    """One operation of the document."""
    parameters = [
        {"name": field.name, "in": "query", "schema": _field_schema(field._replace(required=True))}
        for field in operation.query
    ]
    if operation.path.endswith("*"):
        schema = {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"}
        parameters.append({"name": "reqid", "in": "path", "required": True, "schema": schema})
    answers: dict = {}
    for status, name in operation.answers.items():
        content = {operation.kind.partition(";")[0]: {"schema": _named(name)}}
        answers[str(status)] = {"description": operation.about, "content": content}
    for status in sorted({*_ALWAYS, *operation.refusals}):
        answers[str(status)] = {
            "description": _REFUSALS[status], "content": {"application/json": {"schema": _named("Error")}}
        }  # fmt: skip
    answers["503"]["headers"] = {"Retry-After": {"schema": _NUMBER}}
    described: dict = {"operationId": operation.name, "summary": operation.about, "responses": answers}
    described["security"] = [{"token": []}, {}] if operation.action else []
    if parameters:
        described["parameters"] = parameters
    if operation.method == "POST":
        properties = {field.name: _field_schema(field) for field in operation.fields}
        required = " ".join(field.name for field in operation.fields if field.required)
        content = {"application/json": {"schema": _object(required, **properties)}}
        described["requestBody"] = {"required": bool(required), "content": content}
    return described


def build_openapi() -> dict:
    """The OpenAPI 3.1 document, from the table of operations."""
    paths: dict = {}
    for operation in OPERATIONS:
        path = operation.path.replace("*", "{reqid}")
        paths.setdefault(path, {})[operation.method.lower()] = _describe_operation(operation)
    about = "Run allowlisted scripts on a fleet. The token goes in the header, or in the body as `token`."
    return {
        "openapi": "3.1.0",
        "info": {"title": "ctrl-exec", "version": __version__, "description": about},
        "paths": paths,
        "components": {
            "schemas": _SCHEMAS,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def build_live_openapi(results: list) -> dict:
    """The document with the hosts and scripts that a discovery found, and what their sidecars say."""
    document = json.loads(json.dumps(build_openapi()))
    hosts, scripts = sorted(result.host for result in results), {}
    known: dict = {}  # (script, its schema as text) to what is shown of it
    for result in sorted(results):
        for offer in result.answer.get("scripts", ()) if result.state == "ok" else ():
            script = scripts.setdefault(offer["name"], {"hosts": [], "schemas": []})
            script["hosts"].append(result.host)
            if isinstance(offer.get("schema"), dict):
                key = (offer["name"], json.dumps(offer["schema"], sort_keys=True))
                if key not in known:
                    version = str(offer.get("schema_version", ""))
                    known[key] = {"schema_version": version, "schema": offer["schema"], "hosts": []}
                    script["schemas"].append(known[key])
                known[key]["hosts"].append(result.host)
    for path in ("/ping", "/run", "/discovery"):
        body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        if hosts:
            body["properties"]["hosts"]["items"] = {"type": "string", "enum": hosts}
        if scripts and path == "/run":
            body["properties"]["script"] = {"type": "string", "enum": sorted(scripts)}
    document["x-ctrl-exec-scripts"] = scripts
    return document


# --- figures --------------------------------------------------------------------------------------------

_FAMILIES = {  # name: (type, help); as https://prometheus.io/docs/practices/naming/ has it
    "ctrl_exec_build_info": ("gauge", "The version, as a label."),
    "process_start_time_seconds": ("gauge", "When this server started, in seconds since the epoch."),
    "ctrl_exec_api_requests_total": ("counter", "Requests answered, by operation, method and status."),
    "ctrl_exec_api_requests_in_progress": ("gauge", "Requests being answered now."),
    "ctrl_exec_runs_total": ("counter", "Runs of a script on one host, by how they ended for the caller."),
    "ctrl_exec_run_seconds": ("histogram", "Time from sending a synchronous run to a host to its result."),
    "ctrl_exec_agent_handshakes_total": ("counter", "Connections to agents, TLS included, by result."),
    "ctrl_exec_certificate_not_after_timestamp_seconds": (
        "gauge", "The end of a certificate's validity, in seconds since the epoch.",
    ),
}  # fmt: skip
_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class _Metrics:
    """What this server counts from its start on; another on the same files counts for itself."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._values: dict = {}  # (family, suffix, labels) to a number
        self.add("process_start_time_seconds", amount=round(now(), 3))
        self.add("ctrl_exec_build_info", version=__version__)
        for result in ("ok", "failed"):
            self.add("ctrl_exec_agent_handshakes_total", amount=0, result=result)
        for state in STATES:
            self.add("ctrl_exec_runs_total", amount=0, state=state)

    def add(self, family: str, suffix: str = "", amount: float = 1, **labels: str) -> None:
        key = (family, suffix, tuple(labels.items()))
        with self._guard:
            self._values[key] = self._values.get(key, 0) + amount

    def count_handshake(self, worked: bool) -> None:
        self.add("ctrl_exec_agent_handshakes_total", result="ok" if worked else "failed")

    def count_run(self, result: HostResult, mode: str) -> None:
        """One host of a run has ended, as far as its caller is told."""
        self.add("ctrl_exec_runs_total", state=result.state)
        if mode == "sync" and is_run_answer(result.answer):
            for bound in _BUCKETS:
                amount = int(result.rtt <= bound)
                self.add("ctrl_exec_run_seconds", "_bucket", amount, le="%g" % bound)
            self.add("ctrl_exec_run_seconds", "_bucket", le="+Inf")
            self.add("ctrl_exec_run_seconds", "_sum", result.rtt)
            self.add("ctrl_exec_run_seconds", "_count")

    def render(self, more: dict) -> bytes:
        """All of it as text; `more` has the same keys as what is counted."""
        with self._guard:
            values = {**self._values, **more}
        lines = []
        for family, (kind, text) in _FAMILIES.items():
            rows = [(key, value) for key, value in values.items() if key[0] == family]
            if rows:
                lines += ["# HELP %s %s" % (family, text), "# TYPE %s %s" % (family, kind)]
            for (_, suffix, labels), value in rows:
                shown = ",".join("%s=%s" % (name, json.dumps(label)) for name, label in labels)
                number = "%d" % value if value == int(value) else repr(float(value))
                lines.append("%s%s%s %s" % (family, suffix, "{%s}" % shown if shown else "", number))
        return ("\n".join(lines) + "\n").encode("utf-8")


# --- server-sent events ---------------------------------------------------------------------------------


class _Feed:
    """What a run writes, on its way from the threads that follow its hosts to the one that answers. A slow
    listener slows down its own threads only: the agents read what they show back from their disks."""

    def __init__(self) -> None:
        import queue

        self._queue: Any = queue.Queue(FEED_ITEMS)
        self._full, self._empty = queue.Full, queue.Empty
        self._closed = False

    def put(self, *item: object) -> None:
        """Hand over an item. Raises BrokenPipeError when the listener has gone."""
        while True:
            self.check()
            try:
                return self._queue.put(item, timeout=1)
            except self._full:
                continue

    def show(self, host: str, stream: str, data: bytes) -> None:
        if data:
            self.put("output", host, stream, data)

    def check(self) -> None:
        if self._closed:
            raise BrokenPipeError(errno.EPIPE, "the listener has gone")

    def get(self, seconds: float) -> Optional[tuple]:
        """The next item, or None when there was none in time."""
        try:
            return self._queue.get(timeout=seconds)
        except self._empty:
            return None

    def close(self) -> None:
        self._closed = True


class _Places:
    """Where a listener is in the streams of each host. As text, it is the id of an event: for each host in
    order of name `STDOUT-STDERR`, the bytes it has had of both, or `x` when it knows how the host ended."""

    def __init__(self, hosts: Iterable, text: str = "") -> None:
        """Raises BadRequest for a text that is not of this run."""
        names = sorted(hosts)
        self._places: dict = {name: [0, 0] for name in names}  # None: it has ended
        if not text:
            return
        parts = text.split(".")
        for name, part in zip(names, parts):
            hit = re.fullmatch(r"([0-9]{1,10})-([0-9]{1,10})", part)
            if not hit and part != "x":
                break
            self._places[name] = [int(hit[1]), int(hit[2])] if hit else None
        else:
            if len(parts) == len(names):
                return
        raise BadRequest("the Last-Event-ID is not one of this run")

    def left(self) -> dict:
        """Where to go on on the hosts that have not ended."""
        return {name: tuple(place) for name, place in self._places.items() if place is not None}

    def move(self, host: str, stream: str, size: int) -> None:
        self._places[host][list(STREAMS).index(stream)] += size

    def end(self, host: str) -> None:
        self._places[host] = None

    def render(self) -> str:
        return ".".join("%d-%d" % tuple(place) if place else "x" for place in self._places.values())


def _render_event(name: str, place: str, data: dict) -> bytes:
    """One server-sent event (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""
    return b"id: %s\nevent: %s\ndata: %s\n\n" % (place.encode(), name.encode(), encode_json(data))


def _render_output(host: str, stream: str, data: bytes) -> dict:
    shown = {"host": host, "stream": stream, "data": data.decode("utf-8", "replace")}
    if shown["data"].encode("utf-8") != data:
        import base64

        shown["base64"] = base64.b64encode(data).decode("ascii")
    return shown


def _follow(dispatcher: Dispatcher, record: RequestRecord, left: dict, feed: _Feed) -> None:
    """Put what a run writes into a feed: `output`, then `end` for each host, or `lost` for one that cannot be
    heard now, and at last `last`, with whether all went as it should."""
    well = False
    try:
        for result in dispatcher.follow(record, feed.show, False, left, feed.check):
            shown = render_run(result, record.script)
            for stream in STREAMS:
                del shown[stream]
            coming = result.state == "expired" and dispatcher.is_coming(record, result.host)
            feed.put("lost" if coming or list_pending(record, [result]) else "end", result.host, shown)
        well = True
    except BrokenPipeError:  # the listener has gone
        return
    except Exception as error:
        log_bug(error, REQID=record.reqid)
    try:
        feed.put("last", well)
    except BrokenPipeError:
        pass


# --- what is asked, and by whom -------------------------------------------------------------------------


def _check_browser(request: Request, names: tuple) -> None:
    """No web page but our own host's makes requests here, whatever its reader's browser could reach: a page
    from elsewhere can give its name our address (DNS rebinding), and the browser then says that name as Host.

    Raises BadRequest, Denied.
    """
    host = request.headers.get("host")
    if host is None:
        if request.version == "1.1":
            raise BadRequest("a request needs a Host header (RFC 9112 section 3.2)")
        return  # HTTP/1.0: no browser
    name = re.sub(r":[0-9]+\Z", "", host.lower())
    is_address = bool(re.fullmatch(r"localhost|[0-9.]{7,15}|\[[0-9a-f:.]+\]", name))
    own = (socket.gethostname().lower(), *(known.lower() for known in names))
    if not is_address and name.rstrip(".") not in own:
        raise Denied("the Host %s is not a name of this API; api_names gives it more" % one_line(name[:80]))
    origin = request.headers.get("origin")
    allowed = ["%s://%s" % (scheme, host.lower()) for scheme in ("http", "https")]
    if origin is not None and (origin.lower() not in allowed or not is_address):
        raise Denied("web pages from elsewhere are refused")


def _is_json(content_type: str) -> bool:
    kind, _, rest = content_type.lower().partition(";")
    return kind.strip() == "application/json" and rest.strip().replace('"', "") in ("", "charset=utf-8")


def _read_query(request: Request, rows: tuple) -> dict:
    """The numbers of a query. Raises BadRequest."""
    values = {}
    for row in rows:
        if row.name in request.query:
            try:
                values[row.name] = parse_count(request.query[row.name], row.least, row.most)
            except ValueError as error:
                raise BadRequest("`%s` in the query must be %s" % (row.name, error), row.name) from None
    return values


class _Call:
    """One request on its way through: what is known of it so far."""

    def __init__(self, peer: Peer, request: Request) -> None:
        self.address = peer.address
        self._sock = peer.sock
        self.request = request
        self.operation: Optional[Operation] = None
        self.fields: dict = {}
        self.username = ""
        self.token = ""
        self.reqid = new_id()  # or that of the run it is about

    def is_alone(self) -> bool:
        """Whether the caller has gone."""
        return has_hung_up(self._sock)

    def check(self) -> None:
        """End what nobody waits for any more. Raises BrokenPipeError."""
        if self.is_alone():
            raise BrokenPipeError(errno.EPIPE, "the caller has gone")

    def read(self, names: tuple) -> None:
        """Find out what is asked for, by whatever of our names. Raises BadRequest, Denied, NotFound,
        MethodNotAllowed, UnsupportedMedia."""
        request = self.request
        _check_browser(request, names)
        self.operation, argument = find_route(OPERATIONS, request)
        self.reqid = argument or self.reqid
        if request.body and not _is_json(request.headers.get("content-type", "")):
            raise UnsupportedMedia("the body must be application/json")
        self.fields = parse_fields(request.body, self.operation.fields, loose=True)
        self.fields.update(_read_query(request, self.operation.query))
        self.username = self.fields["username"]
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        self.token = self.fields["token"] or (token.strip() if scheme.lower() == "bearer" else "")


class _EventStream:
    """One of them. A generator that was never begun would not tell of its end."""

    def __init__(self, pieces: Iterator[bytes], note_end: Callable) -> None:
        self._pieces = pieces
        self._note_end = note_end

    def __iter__(self) -> Iterator[bytes]:
        return self._pieces

    def close(self) -> None:
        self._pieces.close()
        self._note_end()


class _EventStreams:
    """Runs that are shown as they go: at most so many at once, and no longer than the server serves."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._open = 0
        self._stopping = threading.Event()

    def stop(self) -> None:
        """End those that would go on for ever; who listens goes on at another server."""
        self._stopping.set()

    def start(self, most: int, *what: Any) -> "_EventStream":
        """A stream of server-sent events; `what` as for `_show`. Raises Unavailable."""
        with self._guard:
            if self._open >= most:
                raise Unavailable("%d event streams are open; try again later" % self._open)
            self._open += 1
        return _EventStream(self._show(*what), self._end_one)

    def _end_one(self) -> None:
        with self._guard:
            self._open -= 1

    def _show(
        self, call: _Call, dispatcher: Dispatcher, record: RequestRecord, places: _Places
    ) -> Iterator[bytes]:
        """A run. Without `complete` at its end, a client is to come again."""
        feed = _Feed()
        follower = threading.Thread(
            target=_follow, args=(dispatcher, record, places.left(), feed), daemon=True
        )
        try:
            follower.start()
        except RuntimeError:  # can't start new thread: the listener will come again
            return
        beat, complete = Deadline(BEAT_SECONDS), True
        try:
            yield b"retry: %d\n\n" % (1000 * RETRY_SECONDS)
            while not self._stopping.is_set() and not call.is_alone():
                item = feed.get(min(1, BEAT_SECONDS))
                if item is not None:
                    kind, host, *rest = item
                    if kind == "last":
                        if complete and host:
                            yield _render_event("complete", places.render(), {"reqid": record.reqid})
                        return
                    if kind == "output":
                        places.move(host, rest[0], len(rest[1]))
                        shown = _render_output(host, *rest)
                    else:
                        shown = rest[0]
                        complete = complete and kind != "lost"
                        places.end(host) if kind == "end" else None
                    yield _render_event(kind, places.render(), shown)
                elif beat.is_over():
                    yield b": beat\n\n"
                    beat = Deadline(BEAT_SECONDS)
        finally:
            feed.close()


def _render_refusal(error: CtrlExecError) -> Response:
    """A failure as an answer; what another server has to say about it (502) is none of ours."""
    body = render_error(error)
    if isinstance(error, BadRequest) and error.field:
        body["field"] = error.field
    headers: tuple = ()
    if isinstance(error, MethodNotAllowed):
        headers = (("Allow", ", ".join(error.allowed)),)
    elif isinstance(error, Unavailable):
        headers = (("Retry-After", "%d" % RETRY_SECONDS),)
    status = error.http_status if error.http_status in (*_REFUSALS, 405) else 500
    return Response(status, body, headers=headers)


def _signature(paths: Iterable) -> tuple:
    """What changes when one of these files does."""
    found = []
    for path in paths:
        try:
            status = os.stat(path)
            found.append((status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
        except OSError:
            found.append(())
    return tuple(found)


class Api:
    """The HTTP API: one request after the other through the same steps, by many threads at once."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._metrics = _Metrics()
        self._guard = threading.Lock()
        self._dispatcher: Optional[Dispatcher] = None
        self._made_of: tuple = ()  # signature of the files that it was made of
        self._expiries: dict = {}  # path of a certificate: (signature, end of validity)
        self._streams = _EventStreams()
        self._handlers = {
            "index": self._index, "health": self._health, "ping": self._ping, "run": self._run,
            "discovery": self._discovery, "discovery_of": self._discovery, "status": self._status,
            "cancel": self._cancel, "runs": self._runs, "events": self._events, "openapi": self._openapi,
            "openapi_live": self._openapi_live, "metrics": self._show_metrics,
        }  # fmt: skip

    def use(self, config: Config) -> None:
        """Work by another configuration from the next request on."""
        with self._guard:
            self._config, self._made_of = config, ()

    def stop(self) -> None:
        """End what would go on for ever."""
        self._streams.stop()

    def dispatcher(self) -> Dispatcher:
        """The control host's operations, as its files are now: a rotated certificate or a revocation counts
        from the next request on. Raises TrustError."""
        config = self._config
        hook = config.auth_hook or config.default_path(ETC + "/auth-hook")
        files = (config.cert, config.key, config.ca, next_path(config.ca), config.revoked_serials, hook)
        with self._guard:
            for pause in (0.05, 0.2, 0):
                made_of = _signature(files)
                if self._dispatcher is not None and made_of == self._made_of:
                    return self._dispatcher.apart()
                try:
                    self._dispatcher = Dispatcher(self._config, self._metrics.count_handshake)
                    self._made_of = made_of
                    return self._dispatcher.apart()
                except TrustError:  # perhaps the key has just been replaced, and the certificate comes next
                    if not pause:
                        raise
                    time.sleep(pause)
        raise AssertionError("not reached")

    # --- every request -----------------------------------------------------------------------------------

    def handle(self, peer: Peer, request: Request) -> Response:
        """Answer one request, whatever happens."""
        call = _Call(peer, request)
        self._metrics.add("ctrl_exec_api_requests_in_progress")
        try:
            call.read(self._config.api_names)
            response = self._handlers[call.operation.name](call)
        except CtrlExecError as error:
            response = _render_refusal(error)
        except BrokenPipeError as error:
            LOG.event("api-request", REQID=call.reqid, PEER=call.address, ERROR=error.strerror)
            raise
        except Exception as error:
            log_bug(error, REQID=call.reqid, PEER=call.address)
            body = {"ok": False, "error": "internal error; the log has it under this request id"}
            response = Response(500, dict(body, status="bug", reqid=call.reqid))
        finally:
            self._metrics.add("ctrl_exec_api_requests_in_progress", amount=-1)
        self._note(call, response)
        return response

    def refuse(self, address: str, error: CtrlExecError) -> Response:
        """Answer what is no request, or comes when there is no room."""
        response = _render_refusal(error)
        self._metrics.add("ctrl_exec_api_requests_total", path="", method="", code=str(response.status))
        LOG.event("api-request", STATUS=response.status, PEER=address, ERROR=error.message)
        return response

    def _note(self, call: _Call, response: Response) -> None:
        operation, request = call.operation, call.request
        path, method = (operation.path, operation.method) if operation else ("", "")
        self._metrics.add("ctrl_exec_api_requests_total", path=path, method=method, code=str(response.status))
        if operation and operation.name == "health" and response.status == 200:
            return  # a proxy asks every other second
        facts = {"METHOD": request.method, "PATH": request.path, "STATUS": response.status}
        LOG.event("api-request", REQID=call.reqid, PEER=call.address, USERNAME=call.username, **facts)

    # --- who may -----------------------------------------------------------------------------------------

    def _authorise(self, call: _Call, dispatcher: Dispatcher, **details: Any) -> None:
        """Ask the hook, or the default where there is none. Raises Denied."""
        facts = {"username": call.username, "token": call.token, "source_ip": call.address, "via": "api"}
        details.setdefault("action", call.operation.action)
        context = HookContext(reqid=call.reqid, **facts, **details)
        if dispatcher.has_hook():
            return dispatcher.authorise(context)
        if self._config.api_auth_default != "allow":
            facts = {"FOR": context.action, "USERNAME": call.username, "PEER": call.address}
            LOG.event("auth", RESULT="denied", REASON="no hook", REQID=call.reqid, **facts)
            why = "" if self._config.auth_deny_generic else ": there is no auth hook here"
            raise Denied("not authorised" + why)

    def _enter(self, call: _Call) -> Dispatcher:
        """The control host's operations, once the caller may use the API at all, which older releases ask
        first: their hooks check its token there. Raises Denied."""
        dispatcher = self.dispatcher()
        if self._config.api_hook == "both" and dispatcher.has_hook():
            self._authorise(call, dispatcher, action="api")
        return dispatcher

    def _open(self, call: _Call, **details: Any) -> tuple:
        """(dispatcher, agents, warnings) of an operation on hosts, once its caller may. Who may not is not
        told which hosts there are."""
        dispatcher = self._enter(call)
        words = tuple(call.fields.get("hosts", ()))
        failure: Optional[CtrlExecError] = None
        if not dispatcher.has_hook():  # then it does not matter which hosts
            self._authorise(call, dispatcher)
        selection = Selection(words, everything=not words)
        try:  # without a search for names like the one asked for: time tells
            agents, problems = dispatcher.select(selection, is_terse=True)
        except CtrlExecError as error:
            agents, problems = [], []
            failure = error if words or not isinstance(error, UnknownHost) else None
        names = tuple(agent.name for agent in agents) or words
        self._authorise(call, dispatcher, hosts=names, **details)
        if failure is not None:
            dispatcher.select(selection)
            raise failure
        return dispatcher, agents, problems

    def _find(self, call: _Call) -> tuple:
        """(dispatcher, record) of an earlier run, once its caller may: what is not his is not there."""
        dispatcher = self._enter(call)
        record: Optional[RequestRecord] = None
        failure: CtrlExecError = NotFound("no such request: %s" % call.reqid)
        try:
            record = dispatcher.get_request(call.reqid)
        except NotFound:
            pass
        except StorageError as error:
            failure = error
        details = {}
        if record is not None:
            details = {"script": record.script, "hosts": tuple(record.hosts)}
            details.update(submitter=record.username, submitter_ip=record.source_ip)
        try:  # for what is not there, too: the answer must not come sooner
            self._authorise(call, dispatcher, **details)
        except Denied:
            raise NotFound("no such request: %s" % call.reqid) from None
        if record is None:
            raise failure
        return dispatcher, record

    # --- open to everybody -------------------------------------------------------------------------------

    def _index(self, _: _Call) -> Response:
        rows = [
            {"method": one.method, "path": one.path.replace("*", "{reqid}"), "about": one.about}
            for one in OPERATIONS
        ]
        return Response(200, {"ok": True, "name": "ctrl-exec", "version": __version__, "endpoints": rows})

    def _health(self, _: _Call) -> Response:
        return Response(200, {"ok": True, "version": __version__})

    def _openapi(self, _: _Call) -> Response:
        return Response(200, build_openapi())

    # --- on hosts ----------------------------------------------------------------------------------------

    def _ping(self, call: _Call) -> Response:
        dispatcher, agents, _ = self._open(call)
        pinged = dispatcher.ping(agents, call.reqid, check=call.check)
        results = [render_ping(result) for result in pinged]
        return Response(200, {"ok": True, "reqid": call.reqid, "results": results})

    def _run(self, call: _Call) -> Response:
        fields = call.fields
        mode = "async" if fields["async"] else "sync"
        request = RunRequest(
            fields["script"], tuple(fields["args"]), call.reqid, call.username, call.token,
            fields["timeout"], mode, source_ip=call.address,
        )  # fmt: skip
        check_run_request(request)
        dispatcher, agents, _ = self._open(call, script=request.script, args=request.args)
        results = []
        for result in dispatcher.run(agents, request):
            self._metrics.count_run(result, mode)
            shown = render_submission(result) if mode == "async" else render_run(result, request.script)
            results.append(shown)
        body = {"ok": True, "reqid": call.reqid, "results": results}
        return Response(202 if mode == "async" else 200, body)

    def _discovery(self, call: _Call) -> Response:
        dispatcher, agents, problems = self._open(call)
        found = dispatcher.discover(agents, call.reqid, call.check)
        hosts = {result.host: render_offer(result) for result in found}
        body = {"ok": True, "reqid": call.reqid, "hosts": hosts}
        return Response(200, dict(body, warnings=problems) if problems else body)

    def _openapi_live(self, call: _Call) -> Response:
        dispatcher, agents, _ = self._open(call)
        return Response(200, build_live_openapi(list(dispatcher.discover(agents, call.reqid, call.check))))

    # --- about earlier runs ------------------------------------------------------------------------------

    def _status(self, call: _Call) -> Response:
        dispatcher, record = self._find(call)
        results = sorted(dispatcher.wait(record, 0, call.check), key=lambda result: result.host)
        finished = dispatcher.get_request(record.reqid).finished  # which those results may have changed
        pending = list_pending(record, results)
        body = {"ok": True, "reqid": record.reqid, "script": record.script, "mode": record.mode}
        body.update(started=record.started, complete=not pending, pending=pending)
        body["completed"] = int(parse_iso_time(finished)) if finished and not pending else None
        if record.mode == "async":
            body["hosts"] = {result.host: render_host_status(result) for result in results}
        else:
            body["hosts"] = sorted(record.hosts)
            body["results"] = [render_run(result, record.script) for result in results]
        return Response(200, body)

    def _cancel(self, call: _Call) -> Response:
        dispatcher, record = self._find(call)
        results = dispatcher.cancel(record, call.username, call.token)
        body = {"ok": True, "reqid": record.reqid}
        return Response(200, dict(body, results=[render_cancelled(result) for result in results]))

    def _runs(self, call: _Call) -> Response:
        self._authorise(call, self._enter(call))
        records, problems = list_request_records(self._config.runs_dir, call.fields.get("last", 100))
        shown = [render_request(record) for record in records]
        body = {"ok": True, "runs": shown}
        return Response(200, dict(body, warnings=problems) if problems else body)

    def _events(self, call: _Call) -> Response:
        dispatcher, record = self._find(call)
        places = _Places(record.hosts, call.request.headers.get("last-event-id", ""))
        most = max(1, self._config.api_max_connections // 2)  # the rest is for those who ask and go
        stream = self._streams.start(most, call, dispatcher, record, places)
        headers = (("Cache-Control", "no-store"), ("X-Accel-Buffering", "no"))  # nginx would hold it back
        facts = {"close": True, "is_live": True, "is_resumable": True, "headers": headers}
        return Response(200, stream, kind=EVENT_STREAM, **facts)

    # --- figures -----------------------------------------------------------------------------------------

    def _show_metrics(self, call: _Call) -> Response:
        self._authorise(call, self._enter(call))
        family = "ctrl_exec_certificate_not_after_timestamp_seconds"
        more = {}
        config = self._config
        for role, path in (("ca", config.ca), ("dispatcher", config.cert), ("api", config.api_cert)):
            end = self._expiry(path) if path else None
            if end is not None:
                more[family, "", (("role", role), ("name", os.path.basename(path)))] = end
        for agent in load_agents(config.registry_dir)[0]:
            try:
                end = parse_iso_time(agent.expiry)
            except ValueError:
                continue
            more[family, "", (("role", "agent"), ("name", agent.name))] = end
        return Response(200, [self._metrics.render(more)], kind=METRICS_TEXT)

    def _expiry(self, path: str) -> Optional[float]:
        """When a certificate of ours ends; openssl is asked again when the file has changed."""
        made_of = _signature([path])
        if self._expiries.get(path, ((), 0))[0] != made_of:
            try:
                self._expiries[path] = (made_of, read_certificate(path).not_after)
            except CtrlExecError:
                return None
        return self._expiries[path][1]


# --- the server -----------------------------------------------------------------------------------------


def _check_readable(key: str) -> None:
    """Raise ConfigError, with what to do, for a key that is not there for the user we are now."""
    if os.path.isdir(os.path.dirname(key)) and not os.path.exists(key):
        raise ConfigError("%s: no such file" % key, "put it back, or mend the configuration")
    if not os.access(key, os.R_OK) and os.path.isdir(os.path.dirname(key)):
        hint = "as root: chgrp %s %s && chmod 640 %s" % (DISPATCHER_USER, key, key)
        raise ConfigError("%s cannot be read by user %d, who serves the API" % (key, os.geteuid()), hint)


def load_api_context(config: Config) -> Any:
    """The TLS context of the API's port, or None without TLS. Raises ConfigError, TrustError."""
    if bool(config.api_cert) != bool(config.api_key):
        raise ConfigError("%s: `api_cert` and `api_key` go together" % config.path)
    if not config.api_cert:
        return None
    _check_readable(config.api_key)
    identity = Identity(config.api_cert, config.api_key, config.ca)
    return new_server_context(identity, verify_clients=False, group=DISPATCHER_USER)


def check_exposure(config: Config) -> list:
    """What is allowed, and hardly wanted: Findings."""
    import ipaddress

    findings = []
    open_to_all = [one for one in config.api_bind or ("::",) if not ipaddress.ip_address(one).is_loopback]
    if open_to_all and not config.api_cert:
        where = ", ".join(open_to_all)
        what = "the API listens on %s without TLS: tokens can be read on the way" % where
        findings.append(Finding("WARN", what, "set api_cert and api_key, or api_bind = 127.0.0.1"))
    if config.api_auth_default == "allow":
        what = "api_auth_default = allow: without a hook, whoever reaches the port may run scripts"
        findings.append(Finding("WARN", what, "write a hook, and set it to deny"))
    if config.root and os.geteuid() == 0:
        what = "with --root, the API stays root; an installation runs it as %s" % DISPATCHER_USER
        findings.append(Finding("WARN", what, "install.sh --api"))
    return findings


def _become_api_user(config: Config) -> None:
    """Give up root, before the first byte from the network; below a --root, everything is its starter's."""
    if config.root or os.geteuid() != 0:
        return
    # As in become_user: modules that are imported later may lie where only root can read.
    import copy, difflib, queue, resource  # noqa: E401, F401

    if find_service_owner(DISPATCHER_USER) is None:
        message = "there is no user %s to serve the API as" % DISPATCHER_USER
        raise ConfigError(message, "run: install.sh --api")
    check_user_change(DISPATCHER_USER)
    become_user(DISPATCHER_USER)


def _check_api_files(config: Config) -> None:
    """Raise ConfigError for what would fail at every request."""
    if os.path.exists(config.cert):  # else the next step says that there is no identity
        _check_readable(config.key)
    for path in (config.runs_dir, config.lock_dir):
        try:
            make_directory(path, 0o2770)
            if not os.access(path, os.W_OK | os.X_OK):
                raise StorageError("%s is not writable for the API" % path)
        except StorageError as error:
            if not find_disk_fault(path):
                raise ConfigError(error.message, "run again: install.sh --api") from error
            LOG.event(
                "config-warn", MESSAGE=error.message
            )  # it may come right, and much can be asked until then


def _note_connection(address: str, failure: str, reason: str, _: Any) -> None:
    if failure == "tls":
        LOG.event("tls-failure", PEER=address, REASON=reason)


def _keep_listening(config: Config, server: Server, listening: Listening, wake: Callable) -> None:
    """Try again to listen where it was not possible, with a growing pause, until it is. A thread's work."""
    pause = 1.0
    while listening.faults:
        time.sleep(pause)
        pause = min(60.0, 2 * pause)
        before, listening = listening, listen_again(config.api_bind, config.api_port, listening)
        server.listen_on([one for one in listening.sockets if one not in before.sockets])
        tell_systemd(listening.status())
        wake()


class _ApiSignals:
    """SIGTERM and SIGINT end the wait for connections, and SIGHUP calls `reload`.

    Python runs a handler between two steps of its own: a signal that comes just before the wait for a new
    connection would be seen with that one only. So the wait itself is ended, by the signal's number.
    """

    def __init__(self, reload: Callable) -> None:
        self.descriptor, self._signalled = os.pipe()
        os.set_blocking(self._signalled, False)
        signal.set_wakeup_fd(self._signalled)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        self._reload = reload
        signal.signal(signal.SIGHUP, lambda *_: None)  # not here: a second one would come in the middle of it
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGHUP])

    def wake(self) -> None:
        os.write(self._signalled, b"\0")

    def is_told_to_stop(self) -> bool:
        caught = set(os.read(self.descriptor, 512))
        if signal.SIGHUP in caught:
            self._reload()
        return not caught.isdisjoint({signal.SIGTERM, signal.SIGINT})


def api_lock_path(config: Config) -> str:
    """What an API server holds, and writes its process id into: in a directory that its user may write to and
    that servers of several hosts may share."""
    host = re.sub("[^A-Za-z0-9._-]", "_", socket.gethostname())
    return os.path.join(config.runs_dir, ".api-%s-%d" % (host, config.api_port))


def _lock_api(config: Config) -> Optional[FileLock]:
    """Nothing where there can be none: then it can only not be told to reload."""
    lock = FileLock(api_lock_path(config))
    try:
        return lock if lock.acquire() else None
    except StorageError as error:
        LOG.event("config-warn", MESSAGE=error.message)
        return None


class _ApiReloads:
    """What SIGHUP does: the files are loaded anew, and whoever has asked for it can read how that went."""

    def __init__(self, config: Config, api: Api, server: Server, reread: Callable) -> None:
        self._api = api
        self._server = server
        self._reread = reread
        self._has_tls = bool(config.api_cert)  # decided at the start
        self._count = 0
        self._lock = _lock_api(config)
        self._note(0, "")

    def _note(self, ended: int, error: str) -> None:
        if self._lock is not None:
            note_serving(self._lock, self._count, ended, error)

    def reload(self) -> None:
        self._count += 1
        self._note(self._count - 1, "")
        error = ""
        try:
            changed = self._reread()
            context = load_api_context(changed)
            self._api.use(changed)
            if context is not None and self._has_tls:
                self._server.use_context(context)
            LOG.event("reload", RESULT="ok")
        except CtrlExecError as problem:
            error = problem.message
            LOG.event("reload", RESULT="kept the old configuration", REASON=error)
        self._note(self._count, error)


def serve_api(config: Config, reread: Callable) -> int:
    """The HTTP API, until SIGTERM. `reread()` gives the configuration anew, at SIGHUP: all of it counts from
    then on but addresses, port, api_max_connections, and whether there is TLS. Raises ConfigError for what
    keeps it from starting."""
    passed = take_passed_sockets()
    listening = listen_where_possible(config.api_bind, config.api_port, passed)
    close_unwanted(passed, listening)
    note_listening((), listening)
    _become_api_user(config)
    raise_descriptor_limit()
    api = Api(config)
    try:
        _check_api_files(config)
        context = load_api_context(config)
        api.dispatcher()
    except (TrustError, StorageError) as error:  # as final as a broken configuration
        raise ConfigError(error.message, error.hint) from error
    for warning in [*config.warnings, *(finding.what for finding in check_exposure(config))]:
        LOG.event("config-warn", MESSAGE=warning)
    policy = ServerPolicy(lambda address: True, _note_connection, api.refuse)
    server = Server(list(listening.sockets), context, api.handle, policy, config.api_max_connections)

    reloads = _ApiReloads(config, api, server, reread)
    signals = _ApiSignals(reloads.reload)
    threading.Thread(
        target=_keep_listening, args=(config, server, listening, signals.wake), daemon=True
    ).start()
    port = listening.sockets[0].getsockname()[1] if listening.sockets else config.api_port
    hook = find_dispatcher_hook(config)
    facts = {"PORT": port, "TLS": "yes" if context else "no", "UID": os.geteuid()}
    LOG.event("api-start", VERSION=__version__, HOOK=hook.path if hook else "none", **facts)
    tell_systemd("READY=1\n" + listening.status())
    server.serve(signals.descriptor, signals.is_told_to_stop)
    tell_systemd("STOPPING=1")
    api.stop()
    drained = server.drain(config.connect_timeout + config.read_timeout)
    LOG.event("api-stop", DRAINED="yes" if drained else "no")
    return 0


def check_api(config: Config) -> list:
    """Everything the API depends on, one Finding each."""
    findings = check_dispatcher(config)
    if not config.root:  # below one, the API stays who has started it
        hook = check_hook(find_dispatcher_hook(config), DISPATCHER_USER)
        findings += [finding for finding in hook if finding.level == "FAIL" and finding not in findings]
    if config.api_cert or config.api_key:
        what, hint = "TLS of the API %s" % config.api_cert, "mend it, or take out api_cert and api_key"
        if try_check(findings, what, lambda: load_api_context(config), hint) is not None:
            info = read_certificate(config.api_cert)
            findings.append(check_expiry(config.api_cert, info, "have it issued anew, then SIGHUP"))
        findings += check_places((Place(config.api_cert), Place(config.api_key)))
    if find_dispatcher_hook(config) is None and config.api_auth_default == "deny":
        findings.append(Finding("WARN", "no auth hook: the API denies everything", "write one, see README"))
    return findings + check_exposure(config)


# ======================================================================================================
# 23. CLI
# Owns:  verbs and their options as a table; text, tables and JSON; the prompt of pairing mode; the demo.
#        The only section that prints.
# Uses:  HEAD, ERRORS, GROUND, SETTINGS, OPENSSL, TRUST, WIRE, POLICY, RECORDS, AGENT, REGISTRY, PAIRING,
#        HOSTS, DISPATCH, UPKEEP, API
# ======================================================================================================


def _write_out(data: bytes) -> None:
    """Write to standard output, all of it. Raises BrokenPipeError, and OutputError for everything else."""
    if sys.stdout is None:
        raise OutputError("cannot write the output: standard output is closed")
    left = memoryview(data)
    try:
        while left:
            left = left[sys.stdout.buffer.write(left) :]  # unbuffered (python -u), it may take a part only
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that a later flush does not fail again
        raise OutputError("cannot write the output: %s" % error.strerror) from error


def say(text: str) -> None:
    """One line to standard output, as UTF-8 whatever the locale says."""
    _write_out((text + "\n").encode("utf-8", "backslashreplace"))


def warn(text: str, end: str = "\n") -> None:
    """One line to standard error. Where that is closed or full, nobody reads it: what was asked for goes on,
    and the exit status says how it went."""
    if sys.stderr is not None:
        try:
            sys.stderr.write(printable(text) + end)  # file names that others choose are among what is said
            sys.stderr.flush()
        except OSError:
            pass


def _say_json(value: dict) -> None:
    _write_out(encode_json(value) + b"\n")


def _is_terminal() -> bool:
    return sys.stdout is not None and sys.stdout.isatty()


def _paint(text: str, colour: str) -> str:
    """Colour on a terminal that wants it (https://no-color.org), plain text everywhere else."""
    codes = {"red": "31", "green": "32", "yellow": "33", "bold": "1"}
    if colour and _is_terminal() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb":
        return "\033[%sm%s\033[0m" % (codes[colour], text)
    return text


def _render_table(headings: tuple, rows: list, colours: Optional[dict] = None) -> str:
    """A heading line, a rule, then the rows. `colours`: (row, column) to colour."""
    cells = [[one_line(str(cell)) for cell in row] for row in rows]
    widths = [max(len(line[column]) for line in [list(headings), *cells]) for column in range(len(headings))]
    lines = ["  ".join(heading.ljust(width) for heading, width in zip(headings, widths)).rstrip()]
    lines.append("  ".join("-" * width for width in widths))
    for number, row in enumerate(cells):
        padded = [cell.ljust(width) for cell, width in zip(row, widths)]
        painted = [
            _paint(cell, (colours or {}).get((number, column), "")) for column, cell in enumerate(padded)
        ]
        lines.append("  ".join(painted).rstrip())
    return "\n".join(lines)


def _render_days(expiry: str) -> tuple:
    """Days left as text, and the colour it deserves."""
    days = count_days_left(expiry)
    if days is None:
        return "-", ""
    return ("expired" if days < 0 else "%dd" % days), ("red" if days < 14 else "yellow" if days < 30 else "")


def _report_findings(findings: list, as_json: bool) -> int:
    failed = any(finding.level == "FAIL" for finding in findings)
    if as_json:
        _say_json({"ok": not failed, "findings": [finding._asdict() for finding in findings]})
        return int(failed)
    colours = {"OK": "green", "WARN": "yellow", "FAIL": "red"}
    for finding in findings:
        hint = "  (%s)" % one_line(finding.hint) if finding.hint and finding.level != "OK" else ""
        say(
            "%s  %s%s"
            % (_paint(finding.level.ljust(4), colours[finding.level]), one_line(finding.what), hint)
        )
    return int(failed)


# --- dispatcher: set-up and registry --------------------------------------------------------------------


def cmd_setup_ca(args: Any, config: Config) -> int:
    name = args.name or "ctrl-exec CA of " + config.dispatcher_id[:36]
    if args.next and not args.name:
        name += " " + iso_time(now())[:10]
    if not re.fullmatch(r"[A-Za-z0-9 ._-]{1,64}", name):
        raise UsageError("the CA's name is letters, digits, spaces, dots, _ and -, at most 64 of them")
    make, path = (new_successor, next_path(config.ca)) if args.next else (new_ca, config.ca)
    info = make(OpenSSL(), config.ca, config.key_type, name)
    say("CA made: %s, valid until %s" % (path, iso_time(info.not_after)))
    say("its key: %s (keep it here, and keep a copy in a safe)" % ca_key_path(path))
    say("fingerprint: %s" % fingerprint(read_certificate_der(path)))
    if args.next:
        say("next: `ced maintain` until every host has moved to it, then `ced retire-ca`")
    return 0


def cmd_setup_ctrl_exec(args: Any, config: Config) -> int:
    if not os.path.exists(config.ca):
        raise TrustError("%s: no such file" % config.ca, "first: ced setup-ca")
    identity = dispatcher_identity(config)
    info = new_dispatcher_identity(
        OpenSSL(), identity, config.dispatcher_id, config.key_type, config.cert_days
    )
    group = find_service_owner(DISPATCHER_USER)
    for path, mode in (  # setgid: what root makes in them, the HTTP API can read
        (config.registry_dir, 0o2750),
        (config.lock_dir, 0o2770),
        (config.runs_dir, 0o2770),
    ):
        make_directory(path, mode, None if group is None else Owner(0, group.gid))
    make_directory(config.pairing_dir, 0o700)
    say("dispatcher %s: certificate %s" % (config.dispatcher_id, identity.cert))
    say("serial %s, valid until %s" % (info.serial, iso_time(info.not_after)))
    say("next: `ced pairing-mode` here, and `cea request-pairing --dispatcher THIS-HOST` on each host")
    return 0


def _parse_tags(texts: Optional[list]) -> tuple:
    tags = []
    for text in texts or []:
        for part in text.split(","):
            key, equals, value = part.partition("=")
            if not equals or not TAG_NAME.fullmatch(key):
                raise UsageError("`%s` is not a tag: expected KEY=VALUE" % one_line(part))
            tags.append((key, value))
    return tuple(tags)


def cmd_list_agents(args: Any, config: Config) -> int:
    agents, problems = load_agents(config.registry_dir)
    tags = _parse_tags(args.tags)
    agents = [agent for agent in agents if has_tags(agent, tags)]
    for problem in problems:
        warn("ced: " + problem)
    if args.json:
        shown = []
        for agent in agents:
            entry = {key: value for key, value in agent._asdict().items() if key != "extra"}
            shown.append(dict(entry, days_left=count_days_left(agent.expiry)))
        _say_json({"ok": not problems, "agents": shown})
        return int(bool(problems))
    rows, colours = [], {}
    for number, agent in enumerate(agents):
        days, colours[(number, 3)] = _render_days(agent.expiry)
        labels = ",".join("%s=%s" % pair for pair in sorted(agent.tags.items()))
        rows.append((agent.name, agent.address(), agent.port, days, agent.paired, labels))
    say(_render_table(("NAME", "ADDRESS", "PORT", "EXPIRES", "PAIRED", "TAGS"), rows, colours))
    return int(bool(problems))


def cmd_edit_agent(args: Any, config: Config) -> int:
    edit = AgentEdit(args.rename or "", args.ip or "", args.agent_port or 0, args.lookup_by or "")
    if edit == AgentEdit():
        raise UsageError("nothing to change", "give --rename, --ip, --agent-port or --lookup-by")
    agent = edit_agent(config, args.name, edit)
    say("%s: %s port %d (certificate name %s)" % (agent.name, agent.address(), agent.port, agent.cert_name))
    return 0


def cmd_unpair(args: Any, config: Config) -> int:
    agent = unpair_agent(config, args.name)
    if list_serials(agent):
        say("%s is unpaired; refused from now on: %s" % (agent.name, ", ".join(list_serials(agent))))
    else:
        warn("ced: the registry knows no serial of %s, so its certificate could not be revoked" % agent.name)
    say("it still trusts this dispatcher until its agent is stopped or removed there")
    return 0


def cmd_check(args: Any, config: Config) -> int:
    findings = check_dispatcher(config)
    try:
        findings += check_hosts(Dispatcher(config), load_agents(config.registry_dir)[0])
    except CtrlExecError:  # a finding says why
        pass
    return _report_findings(findings, args.json)


# --- dispatcher: certificates, the CA, revocation -------------------------------------------------------


def _report_upkeep(args: Any, findings: list) -> int:
    return _report_findings(findings or [Finding("OK", "nothing is due")], args.json)


def cmd_rotate_cert(args: Any, config: Config) -> int:
    return _report_upkeep(args, Upkeep(config, Dispatcher(config)).rotate())


def cmd_maintain(args: Any, config: Config) -> int:
    upkeep = Upkeep(config, Dispatcher(config))
    if args.if_due and not upkeep.is_due():
        return 0
    return _report_upkeep(args, upkeep.maintain())


def cmd_retire_ca(args: Any, config: Config) -> int:
    return _report_upkeep(args, Upkeep(config, Dispatcher(config)).retire_ca())


def cmd_revoke(args: Any, config: Config) -> int:
    if args.dispatcher:
        try:
            serial = parse_serial(args.name)
        except ValueError as error:
            raise UsageError(str(error), "`ced serial-status` shows them") from None
        return _report_upkeep(args, Upkeep(config, Dispatcher(config)).revoke_dispatcher(serial, args.force))
    serials = revoke_agent(config, args.name, args.force)
    if args.json:
        _say_json({"ok": True, "revoked": serials})
    else:
        say("refused from now on: %s" % ", ".join(serials))
    return 0


def cmd_serial_status(args: Any, config: Config) -> int:
    status = Upkeep(config, Dispatcher(config)).status()
    agents = status["agents"]
    behind = [agent["name"] for agent in agents if agent["status"] in ("pending", "stale")]
    if args.json:
        _say_json(dict(status, ok=not behind))
        return int(bool(behind))
    days, colour = _render_days(status["expiry"])
    say("in use: %s, %s left" % (status["serial"], _paint(days, colour)))
    if status["next"]:
        say("next: %s, announced to hosts; `ced rotate-cert` goes on" % status["next"])
    for entry in status["former"]:
        words = (entry["serial"], entry["since"], entry["overlap_days"], len(entry["trusted_by"]))
        say("former: %s, replaced %s, kept for %d days at least; trusted by up to %d hosts" % words)
    for entry in status["revoked"]:
        told = ", ".join(entry["not_told"]) or "nobody"
        say("revoked: %s, since %s; not told yet: %s" % (entry["serial"], entry["since"], told))
    if status["ca_dependents"] is not None:
        say(
            "the CA is being replaced; still depend on it: %s"
            % (", ".join(status["ca_dependents"]) or "nobody")
        )
    colours = {"current": "green", "pending": "yellow", "stale": "red", "unknown": ""}
    painted = {(row, 1): colours[agent["status"]] for row, agent in enumerate(agents)}
    rows = [
        (agent["name"], agent["status"], agent["serial"] or "-", agent["confirmed"] or "-")
        for agent in agents
    ]
    say(_render_table(("NAME", "STATUS", "TRUSTS", "CONFIRMED"), rows, painted))
    return int(bool(behind))


def cmd_list_locks(args: Any, config: Config) -> int:
    locks = list_locks(config.lock_dir)
    if args.json:
        _say_json({"ok": True, "locks": locks})
        return 0
    keys = ("host", "script", "reqid", "pid", "since", "user")
    say(
        _render_table(
            tuple(key.upper() for key in keys), [tuple(lock.get(key, "-") for key in keys) for lock in locks]
        )
    )
    for record in list_request_records(config.runs_dir)[0]:  # they hold no lock here, but one on the host
        hosts = sorted(name for name, outcome in record.hosts.items() if outcome.state == "accepted")
        if hosts:
            facts = (record.reqid, record.script, ", ".join(hosts), record.reqid)
            say("request %s (--async): %s may still run on %s; see: ced status %s" % facts)
    return 0


# --- dispatcher: pairing --------------------------------------------------------------------------------


def _spaced(code: str) -> str:
    return code[:3] + " " + code[3:]


def _render_remarks(request: PairingRequest) -> str:
    """What to think of before a request is approved."""
    remarks = ["legacy: the code proves little"] if request.legacy else []
    if is_clock_off(request.ahead):
        remarks.append("its clock is %s: set one of them" % describe_skew(request.ahead))
    return "; ".join(remarks)


def _describe_request(terms: PairingTerms, request: PairingRequest) -> str:
    remarks = "  (%s)" % _render_remarks(request) if _render_remarks(request) else ""
    return "%s  %s  from %s  code %s%s" % (
        request.reqid, request.hostname, request.peer, _spaced(request_code(terms, request)), remarks
    )  # fmt: skip


def cmd_list_requests(args: Any, config: Config) -> int:
    requests, problems = load_pairing_requests(config)
    for problem in problems:
        warn("ced: " + problem)
    terms = build_terms(config, OpenSSL(), "")
    if args.json:
        shown = [
            {
                "id": request.reqid,
                "hostname": request.hostname,
                "peer": request.peer,
                "port": request.port,
                "code": request_code(terms, request),
                "received": iso_time(request.received),
                "legacy": request.legacy,
                "clock": request.ahead,
            }
            for request in requests
        ]
        _say_json({"ok": True, "requests": shown})
        return 0
    rows = [
        (request.reqid, request.hostname, request.peer, request.port or AGENT_PORT,
         _spaced(request_code(terms, request)), "%ds" % (now() - request.received),
         _render_remarks(request))
        for request in requests
    ]  # fmt: skip
    say(_render_table(("ID", "NAME", "FROM", "PORT", "CODE", "WAITS", "REMARKS"), rows))
    return 0


def _confirm(question: str) -> bool:
    warn(question, end="")
    return sys.stdin is not None and sys.stdin.readline().strip().lower() in ("y", "yes")


def cmd_approve(args: Any, config: Config) -> int:
    openssl = OpenSSL()
    request = get_pairing_request(config, args.id)
    terms = build_terms(config, openssl, "")
    code = request_code(terms, request)
    if not args.yes and sys.stdin is not None and sys.stdin.isatty():
        warn(_describe_request(terms, request))
        if not _confirm("Does the agent show the code %s? [y/N] " % _spaced(code)):
            raise PairingDenied("the code was not confirmed; request %s still waits" % request.reqid)
    approval = Approval(
        args.name or "", args.ip or "", args.agent_port or 0, args.lookup_by or "", args.replace
    )
    agent = approve_pairing(config, openssl, request, approval)
    say("approved: %s at %s port %d, code %s" % (agent.name, agent.address(), agent.port, _spaced(code)))
    return 0


def cmd_deny(args: Any, config: Config) -> int:
    request = get_pairing_request(config, args.id)
    deny_pairing(config, request, "denied by the operator")
    say("denied: %s" % request.hostname)
    return 0


def cmd_pairing_token(args: Any, config: Config) -> int:
    pattern = args.name or ""
    if pattern and not HOST_NAME.fullmatch(pattern.replace("*", "x")):
        raise UsageError("%s is not a host name or a pattern with *" % one_line(pattern))
    if args.replace and (not pattern or "*" in pattern):
        raise UsageError("--replace needs the name of one host", "ced pairing-token --name NAME --replace")
    token = new_token(token_directory(config), args.ttl, args.uses, pattern, args.replace)
    if args.json:
        facts = {"ttl": args.ttl, "uses": args.uses, "name": pattern, "replace": args.replace}
        _say_json({"ok": True, "token": token, **facts})
        return 0
    say(token)
    warn(
        "valid for %d s and %d use%s, while `ced pairing-mode` runs"
        % (args.ttl, args.uses, "" if args.uses == 1 else "s")
    )
    return 0


class _PairingPrompt:
    """The operator's side of pairing mode: shows what waits, takes `a`, `d2`, `list`, `quit`.

    A request keeps its number for as long as pairing mode runs, and a letter alone means the one request
    that was shown last: what is approved is what was compared, also when others come and go meanwhile.
    """

    def __init__(self, config: Config, desk: PairingDesk, terms: PairingTerms) -> None:
        self._config = config
        self._desk = desk
        self._terms = terms
        self._openssl = OpenSSL()
        self._shown: dict = {}  # number to PairingRequest, those that wait
        self._next_number = 1
        self._asked = 0  # the number that a letter alone means
        self._input = b""

    def run(self) -> None:
        """Until `quit`, SIGINT or SIGTERM. Without input (as a service) it only keeps the port open."""
        descriptors = [] if sys.stdin is None else [sys.stdin.fileno()]
        while True:
            try:
                ready = select.select(descriptors + self._desk.descriptors(), [], [], 0.2)[0]
            except OSError:  # the terminal is gone
                descriptors, ready = [], []
            self._desk.turn()
            self._show_new()
            if descriptors and descriptors[0] in ready:
                data = os.read(descriptors[0], 4096)
                if not data:
                    descriptors = []
                self._input += data
                *lines, self._input = self._input.split(b"\n")
                for line in lines:
                    if self._obey(line.decode("utf-8", "replace").strip()) == "quit":
                        return

    def _show_new(self) -> None:
        waiting = load_pairing_requests(self._config)[0]
        gone = [number for number, request in self._shown.items() if request not in waiting]
        for number in gone:
            del self._shown[number]
        new = [request for request in waiting if request not in self._shown.values()]
        for request in new:
            self._shown[self._next_number] = request
            self._next_number += 1
            say("")
            if find_agent(self._config.registry_dir, request.hostname) is not None:
                say("the name is taken: ced approve %s --replace, or --name OTHER" % request.reqid)
        if new or (gone and self._shown):
            self._show_choices()

    def _show_choices(self) -> None:
        for number, request in self._shown.items():
            say("%d  %s" % (number, _describe_request(self._terms, request)))
        if len(self._shown) == 1:
            self._asked = next(iter(self._shown))
            say("   compare the code with the agent's, then: [a]pprove, [d]eny, [s]kip")
        else:
            first, *_, last = self._shown
            say("   compare the codes with the agents', then: a%d ... d%d; list, quit" % (first, last))

    def _obey(self, line: str) -> str:
        hit = re.fullmatch(r"([ads])\s*([0-9]{0,6})", line)
        number = int(hit[2] or self._asked) if hit else 0
        if line in ("quit", "q", "exit"):
            return "quit"
        if (hit or line in ("list", "l")) and not self._shown:
            say("   nothing waits")
        elif line in ("list", "l"):
            self._show_choices()
        elif hit and not hit[2] and len(self._shown) > 1:
            say("   which? " + ", ".join("%s%d" % (hit[1], known) for known in self._shown))
        elif hit and number in self._shown:
            self._decide(hit[1], self._shown[number])
        elif hit:
            say("   %d does not wait" % number)
        elif line:
            say("   a, d, s (with a number when several wait), list, quit")
        return ""

    def _decide(self, choice: str, request: PairingRequest) -> None:
        try:
            if choice == "a":
                agent = approve_pairing(self._config, self._openssl, request, Approval())
                say("   approved: %s at %s port %d" % (agent.name, agent.address(), agent.port))
            elif choice == "d":
                deny_pairing(self._config, request, "denied by the operator")
                say("   denied: %s" % request.hostname)
        except CtrlExecError as error:
            say("   %s%s" % (error.message, " (%s)" % error.hint if error.hint else ""))


def cmd_pairing_mode(args: Any, config: Config) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    desk, terms, port = open_desk(config, args.allow_legacy)
    try:
        LOG.event("pairing-mode-start", PORT=port, LEGACY=args.allow_legacy)
        ca = fingerprint(decode_pem(terms.ca, "CERTIFICATE"))
        say("pairing mode on port %d; CA fingerprint %s" % (port, ca))
        if args.allow_legacy:
            say("warning: older agents are served. Their code is a hash of their request alone, and somebody")
            say("in the middle finds another request with the same code in a second: only on a network you")
            say("trust.")
        say("on each host: cea request-pairing --dispatcher THIS-HOST     (here: quit or Ctrl-C to stop)")
        _PairingPrompt(config, desk, terms).run()
    except KeyboardInterrupt:
        pass
    finally:
        desk.close()
        LOG.event("pairing-mode-stop")
    return 0


# --- dispatcher: hosts ----------------------------------------------------------------------------------


def _read_host_file(path: str) -> list:
    """Host words from a file, or from standard input for `-`: one or more a line, # begins a comment."""
    if path == "-" and sys.stdin is None:
        raise UsageError("standard input is closed", "the hosts were to come from there")
    try:
        # a pipe will do, so its size is not known beforehand
        with open(0 if path == "-" else path, "rb", closefd=path != "-") as file:
            text = file.read(MAX_HOST_FILE + 1).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError("%s: %s" % (path, getattr(error, "strerror", None) or "not UTF-8")) from None
    if len(text) > MAX_HOST_FILE:
        raise UsageError("%s: larger than %d bytes" % (path, MAX_HOST_FILE))
    words = [word for line in text.splitlines() for word in line.partition("#")[0].split()]
    if not words:
        raise UsageError("%s names no host" % ("standard input" if path == "-" else path))
    return words


def _build_selection(args: Any, words: list) -> Selection:
    hosts: list = []
    for word in words:
        hosts += _read_host_file("-") if word == "-" else [word]
    for path in args.file or []:
        hosts += _read_host_file(path)
    tags = _parse_tags(args.tags)
    if args.all and hosts:
        raise UsageError("--all and named hosts do not go together")
    if not (args.all or hosts or tags):
        raise UsageError(
            "no host is named", "HOST..., --all, --tags KEY=VALUE, -f FILE, or - for standard input"
        )
    return Selection(tuple(hosts), args.all, tags, args.port or 0)


def _user_name() -> str:
    """Who sits at the keyboard, for hooks and logs: not a proof of anything."""
    import pwd

    try:
        return os.environ.get("SUDO_USER") or pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def _find_token(args: Any) -> str:
    if args.token:
        warn("ced: everybody on this host can see a token on the command line; use ENVEXEC_TOKEN")
        return args.token
    return as_given(os.environ.get("ENVEXEC_TOKEN", ""))


class _Opened(NamedTuple):
    """What every verb for hosts begins with."""

    dispatcher: Dispatcher
    agents: list
    context: HookContext  # as the hook has agreed to it
    spoiled: bool  # a registry file could not be used: the others are served, and the exit status says so


def _open_dispatch(options: Any, config: Config, words: list, action: str, **details: Any) -> _Opened:
    dispatcher = Dispatcher(config)
    agents, problems = dispatcher.select(_build_selection(options, words))
    for problem in problems:
        warn("ced: " + problem)
    context = HookContext(
        action,
        new_id(),
        hosts=tuple(agent.name for agent in agents),
        username=options.username or _user_name(),
        token=_find_token(options),
        source_ip="127.0.0.1",
        **details,
    )
    dispatcher.authorise(context)
    return _Opened(dispatcher, agents, context, bool(problems))


def _find_caretaker(config: Config) -> Optional[Caretaker]:
    """What looks after the hosts that a ping reaches; a spoiled file of its own does not stop the ping."""
    try:
        return Caretaker(config)
    except CtrlExecError as error:
        warn("ced: certificates are not looked after: " + error.message)
        return None


def cmd_ping(args: Any, config: Config) -> int:
    dispatcher, agents, context, spoiled = _open_dispatch(args, config, args.hosts, "ping")
    caretaker = _find_caretaker(config)
    tend = None if caretaker is None else caretaker.tend
    results = sorted(dispatcher.ping(agents, context.reqid, tend), key=lambda result: result.host)
    if caretaker is not None:
        caretaker.note_heard()
    failed = spoiled or any(result.state != "ok" for result in results)
    if args.json:
        shown = [render_ping(result) for result in results]
        _say_json({"ok": True, "reqid": context.reqid, "results": shown})
        return int(failed)
    rows, colours = [], {}
    for number, result in enumerate(results):
        days, colours[(number, 3)] = _render_days(str(result.answer.get("expiry", "")))
        colours[(number, 1)] = "green" if result.state == "ok" else "red"
        detail = result.error + (" (%s)" % result.hint if result.hint else "")
        notes = list_faults(result) + ([result.note.what] if result.note is not None else [])
        detail = detail or "; ".join(notes)
        rows.append(
            (
                result.host,
                result.state,
                milliseconds(result.rtt),
                days,
                result.answer.get("version", "-"),
                detail,
            )
        )
    say(_render_table(("NAME", "STATUS", "RTT", "EXPIRES", "VERSION", "REMARKS"), rows, colours))
    return int(failed)


def _exact_output(answer: dict, stream: str) -> bytes:
    """A stream as the script wrote it; on a terminal, without what could steer it."""
    text = answer.get(stream, "")
    if _is_terminal():
        return printable(text).encode("utf-8", "backslashreplace")
    encoded = answer.get(stream + "_base64")
    if isinstance(encoded, str):
        import base64

        try:
            return base64.b64decode(encoded, validate=True)
        except ValueError:
            pass
    return text.encode("utf-8", "surrogatepass")


def _render_notes(result: HostResult) -> list:
    """What there is to say about a host's run besides its output, a line each."""
    answer = result.answer if is_run_answer(result.answer) else {}
    notes = []
    if result.error:
        notes.append("%s: %s" % (result.state, result.error) + (" (%s)" % result.hint if result.hint else ""))
    if answer.get("timed_out"):
        notes.append("the script's time limit ended it")
    elif answer.get("signal"):
        notes.append("ended by %s" % answer["signal"])
    for stream in ("stdout", "stderr"):
        if answer.get(stream + "_truncated"):
            notes.append("%s bytes of %s were dropped (max_output)" % (answer[stream + "_truncated"], stream))
    return notes


def _render_block(result: HostResult, label: str = "") -> bytes:
    """One host's block: how it went, then what it wrote."""
    answer = result.answer if is_run_answer(result.answer) else {}
    if not label:
        state = _paint("OK", "green") if result.state == "ok" else _paint("FAIL", "red")
        facts = (state, answer.get("exit", -1), milliseconds(result.rtt), result.reqid)
        label = "%s  exit:%d  %s  req:%s" % facts
    block = ("==> %s  [%s]\n" % (result.host, label)).encode("utf-8", "backslashreplace")
    for note in _render_notes(result):
        block += one_line(note).encode("utf-8", "backslashreplace") + b"\n"
    for stream in ("stdout", "stderr"):
        output = _exact_output(answer, stream)
        block += output + (b"\n" if output and not output.endswith(b"\n") else b"")
    return block


def _render_submission(result: HostResult) -> str:
    """One host's line of `run --async`."""
    if result.state == "accepted":
        return "==> %s  [accepted  %s]" % (result.host, milliseconds(result.rtt))
    word = "BUSY" if result.state == "busy" else "ERROR"
    return "==> %s  [%s: %s]" % (result.host, word, one_line(result.error))


class _LiveOutput:
    """Shows what streamed runs write, line by line, each with its host when there are several. Whole lines
    only, so that those of two hosts never mix; stdout goes to standard output, stderr to standard error."""

    def __init__(self, several: bool, as_json: bool) -> None:
        self._several = several
        self._as_json = as_json
        self._guard = threading.Lock()
        self._rest: dict = {}  # (host, stream) to the beginning of a line

    def show(self, host: str, stream: str, data: bytes) -> None:
        """Take some output; called from several threads."""
        with self._guard:
            *lines, rest = (self._rest.pop((host, stream), b"") + data).split(b"\n")
            if len(rest) >= MAX_LINE:  # a line without an end is shown in parts, not kept
                lines, rest = [*lines, rest], b""
            if rest:
                self._rest[(host, stream)] = rest
            if lines:
                self._write(host, stream, lines)

    def _write(self, host: str, stream: str, lines: list) -> None:
        if self._as_json:
            texts = [line.decode("utf-8", "replace") for line in lines]
            data = b"".join(
                encode_json({"host": host, "stream": stream, "line": text}) + b"\n" for text in texts
            )
            return _write_out(data)
        if _is_terminal() if stream == "stdout" else sys.stderr is not None and sys.stderr.isatty():
            lines = [printable(line.decode("utf-8", "replace")).encode("utf-8") for line in lines]
        prefix = host.encode("ascii") + b": " if self._several else b""
        data = b"".join(prefix + line + b"\n" for line in lines)
        if stream == "stdout":
            _write_out(data)
        elif sys.stderr is not None:
            try:
                sys.stderr.buffer.write(data)
                sys.stderr.flush()
            except BrokenPipeError:
                raise
            except OSError as error:
                raise OutputError("cannot write the output: %s" % error.strerror) from error

    def end(self, host: str) -> None:
        """Show the last line of a host's streams, if it had no end."""
        with self._guard:
            for stream in STREAMS:
                rest = self._rest.pop((host, stream), b"")
                if rest:
                    self._write(host, stream, [rest])


def _find_live(args: Any, hosts: Iterable) -> Optional[_LiveOutput]:
    return _LiveOutput(len(list(hosts)) > 1, args.json) if args.stream else None


def _render_cancelled(result: HostResult) -> str:
    """One host's line of `cancel`."""
    answer = result.answer
    if result.state in ("cancelled", "done", "running") and type(answer.get("processes_left")) is int:
        ended, left = answer.get("processes_ended", 0), answer["processes_left"]
        facts = (result.host, result.state, one_line(str(ended)[:20]), left)
        line = "==> %s  [%s  processes ended: %s  processes left: %d]" % facts
        if left and isinstance(answer.get("left"), list):
            line += "\n" + "\n".join("left: process %s" % one_line(str(entry)) for entry in answer["left"])
        return line
    return "==> %s  [%s: %s]" % (result.host, result.state, one_line(result.error or "nothing to cancel"))


def _explain_stop(args: Any, record: RequestRecord) -> None:
    """Where the scripts go on, and what can be done about it."""
    left = sorted(name for name, outcome in record.hosts.items() if outcome.state in OPEN_STATES)
    if args.json:
        _say_json({"ok": False, "error": "interrupted", "reqid": record.reqid, "running": left})
    where = ", ".join(left) or "no host"
    warn("\nced: stopped waiting; the script may still run on %s (request %s)" % (where, record.reqid))
    warn("     to go on: ced wait %s, ced follow %s" % ((record.reqid,) * 2))
    warn("     to end it: ced cancel %s, or Ctrl-C again within 2 seconds" % record.reqid)


def _stop_waiting(args: Any, dispatcher: Dispatcher, context: HookContext) -> int:
    """After Ctrl-C: the scripts go on; a second Ctrl-C, from now until two seconds after, ends them."""
    try:
        _explain_stop(args, dispatcher.get_request(context.reqid))
        time.sleep(2)
        return 130
    except KeyboardInterrupt:
        warn("\nced: cancelling")
    record = dispatcher.get_request(context.reqid)
    for result in dispatcher.cancel(record, context.username, context.token):
        warn(_render_cancelled(result))
    return 130


def _run_on_hosts(args: Any, opened: _Opened, request: RunRequest) -> list:
    """Run, and print what there is as it comes; the results."""
    live = _find_live(args, opened.agents)
    results = []
    show = live.show if live else None
    for result in opened.dispatcher.run(opened.agents, request, show, keep=args.json):
        if live:
            live.end(result.host)
        if args.json:
            results.append(result)
            continue
        results.append(result._replace(answer={}, room=None))
        if request.mode == "async":
            say(_render_submission(result))
        else:
            _write_out(_render_block(result))
    return results


_RUN_USAGE = "ced run HOST... SCRIPT [-- ARG...]"


def cmd_run(args: Any, config: Config) -> int:
    if not args.hosts:
        raise UsageError("no script is named", _RUN_USAGE)
    if len(args.hosts) == 1 and not (args.all or args.tags or args.file):
        shown = one_line(args.hosts[0][:80])
        raise UsageError("`%s` is taken for the script, and no host is named" % shown, _RUN_USAGE)
    if args.stream and getattr(args, "async"):
        raise UsageError("--async and --stream do not go together", "start with --async, then: ced follow ID")
    *words, script = args.hosts
    arguments = tuple(args.script_args)
    mode = "async" if getattr(args, "async") else "stream" if args.stream else "sync"
    request = RunRequest(
        script, arguments, "", args.username or _user_name(), "", args.timeout or 0, mode, args.retries or 0
    )
    check_run_request(request)
    try:
        opened = _open_dispatch(args, config, words, "run", script=script, args=arguments)
    except UnknownHost as error:
        if len(words) > 1 and not arguments:
            error.hint = error.hint or "arguments of the script go after --: ced run HOST... SCRIPT -- ARG..."
        raise
    context = opened.context
    request = request._replace(reqid=context.reqid, token=context.token, source_ip=context.source_ip)
    try:
        results = _run_on_hosts(args, opened, request)
    except KeyboardInterrupt:
        return _stop_waiting(args, opened.dispatcher, context)
    well = all(result.state in ("ok", "accepted") for result in results)
    if args.json:
        entries = [
            render_submission(result) if mode == "async" else render_run(result, script) for result in results
        ]
        _say_json({"ok": True, "reqid": request.reqid, "results": entries})
    elif mode == "async":
        say("Request %s" % request.reqid)
    if len(results) > 1 and not args.json:
        counts = ((state, sum(result.state == state for result in results)) for state in STATES)
        shown = ", ".join("%d %s" % (count, state) for state, count in counts if count)
        warn("%d hosts: %s" % (len(results), shown))
    return int(opened.spoiled or not well)


# --- dispatcher: requests that were sent ----------------------------------------------------------------


def _open_request(args: Any, config: Config, action: str) -> tuple:
    """(dispatcher, the request's record, the hook's context) for a verb about an earlier request."""
    dispatcher = Dispatcher(config)
    record = dispatcher.get_request(args.id)
    context = HookContext(
        action, record.reqid, record.script, tuple(record.hosts), username=args.username or _user_name(),
        token=_find_token(args), source_ip="127.0.0.1", submitter=record.username,
        submitter_ip=record.source_ip,
    )  # fmt: skip
    dispatcher.authorise(context)
    return dispatcher, record, context


def _report_request(args: Any, record: RequestRecord, results: list) -> int:
    """Print where a request stands: 0 all well, 1 some failed, 2 some are not known to have ended."""
    pending = list_pending(record, results)
    failed = any(result.state != "ok" and result.host not in pending for result in results)
    status = 1 if failed and not pending else 2 if pending else 0
    results = sorted(results, key=lambda result: result.host)
    if args.json:
        hosts = {result.host: render_host_status(result) for result in results}
        body = {"ok": True, "reqid": record.reqid, "script": record.script, "mode": record.mode}
        body.update(started=record.started, complete=not pending, pending=pending, hosts=hosts)
        _say_json(body)
        return status
    word = _paint("PENDING", "yellow") if pending else "COMPLETE"
    say("Request %s  (script: %s)  [%s]" % (record.reqid, record.script, word))
    for result in results:
        if is_run_answer(result.answer):
            _write_out(_render_block(result, "done  exit:%d" % result.answer["exit"]))
        elif result.state in ("running", "expired"):
            word = "EXPIRED" if result.state == "expired" else "running"
            say("==> %s  [%s]" % (result.host, word) + ("  " + result.error if result.error else ""))
        else:
            say("==> %s  [%s: %s]" % (result.host, result.state, one_line(result.error)))
    return status


def cmd_status(args: Any, config: Config) -> int:
    dispatcher, record, _ = _open_request(args, config, "status")
    return _report_request(args, record, list(dispatcher.wait(record, 0)))


def cmd_wait(args: Any, config: Config) -> int:
    dispatcher, record, _ = _open_request(args, config, "status")
    return _report_request(args, record, list(dispatcher.wait(record, args.timeout)))


def cmd_follow(args: Any, config: Config) -> int:
    dispatcher, record, context = _open_request(args, config, "status")
    live = _LiveOutput(len(record.hosts) > 1, args.json)
    failed = False
    try:
        for result in dispatcher.follow(record, live.show, args.from_now):
            live.end(result.host)
            failed = failed or result.state != "ok"
            if args.json:
                _say_json(render_run(result, record.script))
            else:
                _write_out(_render_block(result))
    except KeyboardInterrupt:
        warn("\nced: stopped following; to go on: ced follow %s" % context.reqid)
        return 130
    return int(failed)


def cmd_cancel(args: Any, config: Config) -> int:
    dispatcher, record, context = _open_request(args, config, "cancel")
    entries = []
    well = True
    for result in dispatcher.cancel(record, context.username, context.token):
        nothing_left = result.answer.get("processes_left") == 0
        never_ran = (
            result.answer.get("status") == "unknown" or record.hosts[result.host].state in NEVER_STARTED
        )
        well = well and ((result.state in ("cancelled", "done") and nothing_left) or never_ran)
        if not args.json:
            say(_render_cancelled(result))
        entries.append(render_cancelled(result))
    if args.json:
        _say_json({"ok": True, "reqid": record.reqid, "results": entries})
    return int(not well)


def cmd_history(args: Any, config: Config) -> int:
    records, problems = list_request_records(config.runs_dir, args.last or 0)
    for problem in problems:
        warn("ced: " + problem)
    if args.json:
        _say_json({"ok": not problems, "runs": [render_request(record) for record in records]})
        return int(bool(problems))
    rows = []
    for record in records:
        states = [outcome.state for outcome in record.hosts.values()]
        summary = ", ".join("%d %s" % (states.count(state), state) for state in sorted(set(states)))
        hosts = ",".join(list(record.hosts)[:3]) + (",..." if len(record.hosts) > 3 else "")
        rows.append(
            (record.reqid, record.started, record.mode, record.username, record.script, hosts, summary)
        )
    say(_render_table(("REQUEST", "STARTED", "MODE", "USER", "SCRIPT", "HOSTS", "STATES"), rows))
    return int(bool(problems))


def cmd_discovery(args: Any, config: Config) -> int:
    if not (args.hosts or args.all or args.tags or args.file):
        args.all = True
    dispatcher, agents, context, spoiled = _open_dispatch(args, config, args.hosts, "discovery")
    results = sorted(dispatcher.discover(agents, context.reqid), key=lambda result: result.host)
    failed = spoiled or any(result.state != "ok" for result in results)
    if args.json:
        hosts = {result.host: render_offer(result) for result in results}
        _say_json({"ok": True, "reqid": context.reqid, "hosts": hosts})
        return int(failed)
    rows = []
    for result in results:
        if result.state != "ok":
            rows.append((result.host, "-", result.state, "", "", result.error))
        for script in result.answer.get("scripts", ()) if result.state == "ok" else ():
            runs = "yes" if script.get("executable") else "NO"
            profile, user = script.get("profile") or "-", script.get("user") or "-"
            rows.append((result.host, script["name"], runs, profile, user, script.get("path", "")))
    say(_render_table(("NAME", "SCRIPT", "RUNS", "PROFILE", "USER", "PATH"), rows))
    return int(failed)


# --- agent ----------------------------------------------------------------------------------------------


def cmd_serve(args: Any, config: Config) -> int:
    return serve_agent(args.config or "", config.root)


def _reload(args: Any, path: str, what: str, hint: str) -> int:
    pid = reload_service(path, what, hint)
    if args.json:
        _say_json({"ok": True, "pid": pid})
    else:
        say("the %s (process %d) has reloaded" % (what, pid))
    return 0


def cmd_reload(args: Any, config: Config) -> int:
    hint = "start it: cea serve, or systemctl start ctrl-exec-agent"
    return _reload(args, agent_lock_path(config), "agent", hint)


def cmd_self_check(args: Any, config: Config) -> int:
    return _report_findings(check_agent(config), args.json)


def cmd_self_ping(args: Any, config: Config) -> int:
    info = ping_self(config)
    days, _ = _render_days(iso_time(info.not_after))
    if args.json:
        _say_json(
            {"ok": True, "port": config.port, "serial": info.serial, "expiry": iso_time(info.not_after)}
        )
    else:
        say("the agent answers on port %d with certificate %s (%s left)" % (config.port, info.serial, days))
    return 0


def _finish_pairing(config: Config, session: PairingSession, state: PairingState, ask: bool) -> int:
    """Wait, confirm, store, and keep the state file true; raises what the wait raises."""
    write_pairing_state(config, state._replace(pid=os.getpid()))
    try:
        decision = session.wait()
        if ask and not _confirm("Does the dispatcher show the code %s? [y/N] " % _spaced(session.code)):
            hint = "deny it there too, or: ced unpair; then ask again"
            raise PairingDenied("the code was not confirmed here; nothing is stored", hint)
        info = session.store(decision)
    except PairingTimeout as error:
        write_pairing_state(config, state._replace(status="timed out", reason=error.message))
        raise
    except CtrlExecError as error:
        write_pairing_state(config, state._replace(status="denied", reason=error.message))
        raise
    except KeyboardInterrupt:
        write_pairing_state(config, state._replace(status="timed out", reason="interrupted"))
        raise
    write_pairing_state(config, state._replace(status="stored"))
    LOG.event("pair-complete", REQID=state.reqid, DISPATCHER=decision["dispatcher_id"], SERIAL=info.serial)
    warn("paired as %s with dispatcher %s; certificate valid until %s"
          % (", ".join(info.names), decision["dispatcher_id"], iso_time(info.not_after)))  # fmt: skip
    path = agent_lock_path(config)
    if find_serving(path) is None:
        warn("start the agent: cea serve, or systemctl enable --now ctrl-exec-agent")
        return 0
    try:
        warn("the running agent (process %d) has reloaded" % reload_service(path, "agent", ""))
    except CtrlExecError as error:  # this host is paired all the same
        warn("cea: %s" % error.message)
    return 0


def _show_code(session: PairingSession, has_token: bool, background: bool) -> None:
    if is_clock_off(session.skew):
        warn(
            "cea: the dispatcher's clock is %s; certificates are judged by the clock:"
            % describe_skew(session.skew)
        )
        warn("     set one of them before you go on")
    if session.legacy:
        warn("cea: the dispatcher is of an older release: this code is a hash of our request alone,")
        warn("     which somebody in the middle can imitate in a second")
    if not has_token:
        if not background:  # which prints the id on standard output
            warn("request %s" % session.reqid)
        warn("pairing code: %s" % _spaced(session.code))
        warn("approve it on the dispatcher only if it shows the same code there")


def _wait_in_background(config: Config, session: PairingSession, state: PairingState) -> int:
    """Print the request id and return, leaving a process that waits and holds nothing of the caller's."""
    write_pairing_state(config, state)
    pid = os.fork()
    if pid:
        say(state.reqid)
        return 0
    status = EXIT_BUG
    try:
        os.setsid()
        nowhere = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(nowhere, number)
        session.keep_only([LOG.descriptor()])
        status = _finish_pairing(config, session, state, False)
    except CtrlExecError as error:
        status = error.exit_code
    except BaseException as error:
        log_bug(error)
    finally:
        os._exit(status)


def _must_ask(args: Any, token: str) -> bool:
    """Whether a person here confirms the code: not when a token or the pinned CA proves the dispatcher."""
    if token or args.ca_fingerprint or args.yes:
        return False
    if not args.background and sys.stdin is not None and sys.stdin.isatty():
        return True
    warn("cea: nobody confirms the code on this side; --ca-fingerprint or a token would prove the dispatcher")
    return False


def _split_address(text: str) -> tuple:
    """`HOST`, `HOST:PORT`, `::1` and `[::1]:PORT` as (host, port or nothing). Raises UsageError."""
    hit = re.fullmatch(r"\[([^\[\]]+)\](?::(.*))?", text)
    host, _, port = text.partition(":") if text.count(":") == 1 else (text, "", "")
    if hit:
        host, port = hit[1], hit[2] or ""
    if text.endswith(":") and not is_ip_address(text):
        host = ""  # the port was forgotten
    if not (is_ip_address(host) or HOST_NAME.fullmatch(host)):
        shown = one_line(text[:80])
        raise UsageError("`%s` is no host: a name or an address, and :PORT, is expected" % shown)
    return host, port


def cmd_request_pairing(args: Any, config: Config) -> int:
    host, port = _split_address(args.dispatcher)
    token = as_given(os.environ.get("CTRL_EXEC_PAIRING_TOKEN", ""))
    if args.token:
        warn("cea: everybody on this host can see a token on the command line; use CTRL_EXEC_PAIRING_TOKEN")
        token = args.token
    name = args.name or socket.gethostname()
    if not is_host_name(name):
        raise UsageError("%s is not a host name" % one_line(name[:300]), "give one with --name")
    if args.ca_fingerprint and not re.fullmatch(r"[0-9a-fA-F]{64}", args.ca_fingerprint.replace(":", "")):
        raise UsageError("--ca-fingerprint expects 64 hex digits", "pairing-mode shows them")
    if token and not re.fullmatch(r"[0-9a-f]{8}\.[a-z2-7]{32}", token):
        raise UsageError("that is not a pairing token", "ced pairing-token prints one")
    try:
        check_ip_address(args.ip or "")
        wish = PairingWish(
            dispatcher=host,
            port=parse_port(port) if port else args.port,
            hostname=name,
            ip=args.ip or "",
            lookup_by=args.lookup_by or "",
            key_type=args.key_type,
            token=token,
            allow_legacy=args.allow_legacy,
            ca_fingerprint=args.ca_fingerprint or "",
            replace_ca=args.replace_ca,
        )
    except ValueError as error:
        raise UsageError("expected %s" % error) from None
    session = PairingSession(config, wish, OpenSSL(), args.timeout)
    state = PairingState(session.reqid, host, session.code, "waiting")
    _show_code(session, bool(token), args.background)
    if args.background:
        return _wait_in_background(config, session, state)
    return _finish_pairing(config, session, state, _must_ask(args, token))


def cmd_pairing_status(args: Any, config: Config) -> int:
    """0 paired, 1 not paired, 2 a request waits."""
    states = load_pairing_states(config)
    if args.id:
        states = [state for state in states if state.reqid == args.id]
        if not states:
            raise NotFound("no pairing request %s was made here" % one_line(args.id[:80]))
    info = read_certificate(config.cert) if os.path.exists(config.cert) else None
    trusted = load_trust_map(config.trusted_dispatchers_path)
    paired = info is not None and bool(trusted)
    if args.json:
        body = {"ok": True, "paired": paired, "dispatchers": trusted}
        if info is not None:
            body.update(
                name=info.names[0] if info.names else info.common_name,
                serial=info.serial,
                expiry=iso_time(info.not_after),
            )
        _say_json(dict(body, requests=[state._asdict() for state in states]))
    else:
        if info is not None:
            days, _ = _render_days(iso_time(info.not_after))
            say(
                "certificate: %s, serial %s, %s left"
                % (", ".join(info.names) or info.common_name, info.serial, days)
            )
        for serial, dispatcher in trusted.items():
            say("trusted dispatcher: %s (serial %s)" % (dispatcher, serial))
        for state in states[:5]:
            say(
                "request %s to %s: %s%s"
                % (
                    state.reqid,
                    state.dispatcher,
                    state.status,
                    " (%s)" % state.reason if state.reason else "",
                )
            )
        if not paired:
            say("not paired")
    if args.id:
        return {"stored": 0, "waiting": 2}.get(states[0].status, 1)
    return 0 if paired else 2 if any(state.status == "waiting" for state in states) else 1


# --- HTTP API -------------------------------------------------------------------------------------------


def cmd_serve_api(args: Any, config: Config) -> int:
    path = config.path if args.config else ""
    return serve_api(config, lambda: load_config("dispatcher", path, config.root))


def cmd_reload_api(args: Any, config: Config) -> int:
    hint = "start it: ctrl-exec-api, or systemctl start ctrl-exec-api"
    return _reload(args, api_lock_path(config), "API", hint)


def cmd_check_api(args: Any, config: Config) -> int:
    return _report_findings(check_api(config), args.json)


# --- the table of verbs ---------------------------------------------------------------------------------


def _option(*flags: str, **details: Any) -> tuple:
    """One row of a verb's options, in argparse's words."""
    return flags, details


def _named_type(flag: str, parse: Callable) -> Callable:
    """A parser of values whose complaints name the option."""

    def parse_named(text: str) -> Any:
        try:
            return parse(text)
        except UsageError as error:
            raise UsageError("%s: %s" % (flag, error.message), error.hint) from None

    return parse_named


def _count_option(text: str) -> int:
    try:
        return parse_positive(text)
    except ValueError as error:
        raise UsageError("expected %s, not `%s`" % (error, one_line(text[:40]))) from None


def _seconds_option(text: str) -> int:
    try:
        return parse_count(text)
    except ValueError as error:
        raise UsageError("expected %s" % error) from None


def _agent_port_option(text: str) -> int:
    try:
        return parse_count(text, 1, 65535)
    except ValueError as error:
        raise UsageError("a port is %s" % error) from None


def _port_option(text: str) -> int:
    try:
        return parse_port(text)
    except ValueError as error:
        raise UsageError("a port is %s" % error) from None


def _wait_option(text: str) -> int:
    seconds = _count_option(text)
    if seconds > MAX_PAIRING_WAIT:
        raise UsageError("--timeout is at most %d seconds" % MAX_PAIRING_WAIT)
    return seconds


_TAGS = _option("--tags", action="append", metavar="K=V", help="only hosts with these tags")
_LOOKUP_BY = _option(
    "--lookup-by", choices=("ip", "hostname"), help="connect to its address or its host name"
)
_JSON = _option("--json", action="store_true", help="print JSON")
_HOSTS = (
    _option(
        "hosts",
        nargs="*",
        metavar="HOST",
        help="NAME, NAME:PORT, 'web-*', 'web-[01-20]', or - for standard input",
    ),
    _option("--all", action="store_true", help="every registered host"),
    _TAGS,
    _option("-f", "--file", action="append", metavar="FILE", help="hosts from a file"),
    _option("--port", type=_port_option, metavar="P", help="this port instead of the registered one"),
    _option("--username", metavar="NAME", help="who asks, for hooks and scripts (default: you)"),
    _option("--token", metavar="T", help="for hooks and scripts; better in ENVEXEC_TOKEN"),
    _JSON,
)
_PLACE = (
    _option("--ip", metavar="A", help="its IP address"),
    _option("--agent-port", type=_agent_port_option, metavar="P", help="its port"),
    _LOOKUP_BY,
)


_REQUEST = (
    _option("id", metavar="ID"),
    _option("--username", metavar="NAME", help="who asks, for hooks (default: you)"),
    _option("--token", metavar="T", help="for hooks; better in ENVEXEC_TOKEN"),
    _JSON,
)


class Command(NamedTuple):
    """One verb."""

    role: str
    name: str
    help: str
    options: tuple
    handler: Callable  # (args, config) to exit status


COMMANDS = (
    Command("dispatcher", "setup-ca", "make the private CA, once", (
        _option("--name", help="the CA's common name"),
        _option("--next", action="store_true", help="make the CA that will follow the present one"),
    ), cmd_setup_ca),
    Command("dispatcher", "setup-ctrl-exec", "make the dispatcher's key and certificate", (),
            cmd_setup_ctrl_exec),
    Command("dispatcher", "pairing-mode", "open the pairing port and approve agents", (
        _option("--allow-legacy", action="store_true", help="serve agents without the commitment"),
    ), cmd_pairing_mode),
    Command("dispatcher", "pairing-token", "print a token that pairs without a person", (
        _option("--ttl", type=_count_option, default=3600, metavar="S", help="seconds it is valid (3600)"),
        _option("--uses", type=_count_option, default=1, metavar="N", help="how often it can be used (1)"),
        _option("--name", metavar="NAME", help="only for this host name, or a pattern with *"),
        _option("--replace", action="store_true", help="it may take the place of the host of that name"),
        _JSON,
    ), cmd_pairing_token),
    Command("dispatcher", "list-requests", "pairing requests that wait", (_JSON,), cmd_list_requests),
    Command("dispatcher", "approve", "approve a pairing request", (
        _option("id", metavar="ID"),
        _option("--name", metavar="N", help="register it under this name"),
        *_PLACE,
        _option("--replace", action="store_true", help="in the place of the agent of that name"),
        _option("--yes", action="store_true", help="do not ask whether the code is the same"),
    ), cmd_approve),
    Command("dispatcher", "deny", "deny a pairing request", (_option("id", metavar="ID"),), cmd_deny),
    Command("dispatcher", "list-agents", "the registered hosts", (_TAGS, _JSON), cmd_list_agents),
    Command("dispatcher", "edit-agent", "change a host's name or address here", (
        _option("name", metavar="NAME"),
        _option("--rename", metavar="N", help="its new name here"),
        *_PLACE,
    ), cmd_edit_agent),
    Command("dispatcher", "unpair", "forget a host and refuse its certificate", (
        _option("name", metavar="NAME"),
    ), cmd_unpair),
    Command("dispatcher", "discovery", "what the hosts offer", _HOSTS, cmd_discovery),
    Command("dispatcher", "ping", "see whether hosts answer", _HOSTS, cmd_ping),
    Command("dispatcher", "run", "run a script: run HOST... SCRIPT [-- ARG...]", (
        *_HOSTS,
        _option("--timeout", type=_count_option, metavar="S", help="seconds the script may take"),
        _option("--async", action="store_true", help="print the request id and return at once"),
        _option("--stream", action="store_true", help="show each line as the script writes it"),
        _option("--retries", type=_count_option, metavar="N",
                help="repeat up to N times what is known not to have started"),
    ), cmd_run),
    Command("dispatcher", "status", "how an earlier request goes", _REQUEST, cmd_status),
    Command("dispatcher", "wait", "wait for the end of an earlier request", (
        *_REQUEST,
        _option("--timeout", type=_seconds_option, metavar="S", help="at most S seconds; then exit 2"),
    ), cmd_wait),
    Command("dispatcher", "follow", "show what an earlier request writes", (
        *_REQUEST,
        _option("--from-now", action="store_true", help="not what it has written so far"),
    ), cmd_follow),
    Command("dispatcher", "cancel", "end the script of an earlier request", _REQUEST, cmd_cancel),
    Command("dispatcher", "history", "the requests of the last day", (
        _option("--last", type=_count_option, metavar="N", help="only the latest N"),
        _JSON,
    ), cmd_history),
    Command("dispatcher", "list-locks", "scripts that are being run from here", (_JSON,), cmd_list_locks),
    Command("dispatcher", "maintain", "renew certificates, tell hosts what they missed", (
        _option("--if-due", action="store_true", help="only when cert_check_interval has passed"),
        _JSON,
    ), cmd_maintain),
    Command("dispatcher", "rotate-cert", "replace the dispatcher's certificate and key", (_JSON,),
            cmd_rotate_cert),
    Command("dispatcher", "serial-status", "which of our certificates each host trusts", (_JSON,),
            cmd_serial_status),
    Command("dispatcher", "retire-ca", "put the CA's successor in its place", (_JSON,), cmd_retire_ca),
    Command("dispatcher", "revoke", "refuse a certificate: revoke NAME|SERIAL", (
        _option("name", metavar="NAME|SERIAL"),
        _option("--dispatcher", action="store_true", help="a dispatcher's: every host is told to refuse it"),
        _option("--force", action="store_true", help="also a serial that is not known here"),
        _JSON,
    ), cmd_revoke),
    Command("dispatcher", "check", "check files, certificates, registry and hosts", (_JSON,), cmd_check),
    Command("agent", "serve", "run the agent, in the foreground", (
        _option("--foreground", action="store_true", help="log to standard error"),
    ), cmd_serve),
    Command("agent", "reload", "have the running agent load its files anew", (_JSON,), cmd_reload),
    Command("agent", "request-pairing", "ask a dispatcher for a certificate", (
        _option("--dispatcher", required=True, metavar="HOST[:PORT]", help="where pairing-mode runs"),
        _option("--port", type=_port_option, default=PAIRING_PORT, metavar="P",
                help="its port (%d)" % PAIRING_PORT),
        _option("--name", metavar="N", help="this host's name (default: the system's)"),
        _option("--ip", metavar="A", help="the address to reach this host at (default: as seen there)"),
        _LOOKUP_BY,
        _option("--key-type", choices=("ec", "rsa"), default="ec", help="of a new key (ec)"),
        _option("--timeout", type=_wait_option, default=30, metavar="S",
                help="seconds to wait (30, at most %d)" % MAX_PAIRING_WAIT),
        _option("--background", action="store_true", help="print the request id; wait in the background"),
        _option("--token", metavar="T", help="a pairing token; better in CTRL_EXEC_PAIRING_TOKEN"),
        _option("--ca-fingerprint", metavar="HEX", help="SHA-256 of the CA, as pairing-mode shows it"),
        _option("--yes", action="store_true", help="do not ask whether the code is the same"),
        _option("--replace-ca", action="store_true", help="leave the CA this host belongs to"),
        _option("--allow-legacy", action="store_true", help="accept a dispatcher without commitment"),
    ), cmd_request_pairing),
    Command("agent", "pairing-status", "whether this host is paired, and with whom", (
        _option("id", nargs="?", metavar="ID"),
        _JSON,
    ), cmd_pairing_status),
    Command("agent", "self-check", "check files, certificates and scripts", (_JSON,), cmd_self_check),
    Command("agent", "self-ping", "reach the agent on this host", (_JSON,), cmd_self_ping),
    Command("api", "serve", "run the HTTP API, in the foreground (also without a verb)", (
        _option("--foreground", action="store_true", help="log to standard error"),
    ), cmd_serve_api),
    Command("api", "reload", "have the running API load its files anew", (_JSON,), cmd_reload_api),
    Command("api", "check", "check files, certificates and registry", (_JSON,), cmd_check_api),
)  # fmt: skip

_GLOBALS = (
    _option("--config", metavar="FILE", help="instead of the default configuration file"),
    _option("--root", metavar="DIR", help="put every default path below DIR (CTRL_EXEC_ROOT)"),
    _option("--verbose", action="store_true", help="log to standard error too"),
    _option("-h", "--help", action="store_true", help="show this"),
)


def render_usage(role: str, program: str) -> str:
    """The verbs of a role, one a line."""
    rows = [(command.name, command.help) for command in COMMANDS if command.role == role]
    width = max(len(name) for name, _ in rows)
    lines = ["usage: %s [--config FILE] [--root DIR] VERB ..." % program, ""]
    lines += ["  %s  %s" % (name.ljust(width), text) for name, text in rows]
    return "\n".join(lines + ["", "%s VERB --help says more; --version says which this is" % program])


def render_version() -> str:
    """Version and the hash of this very file, so that a copy can be told from another."""
    try:
        digest = fingerprint(read_file(os.path.realpath(__file__), 16 * MAX_STATE_FILE))[:12]
    except (OSError, CtrlExecError):
        digest = "unknown"
    python = "%d.%d.%d" % sys.version_info[:3]
    return "ctrl-exec %s (file %s, Python %s, %s)" % (__version__, digest, python, ssl.OPENSSL_VERSION)


def _parse_options(command: Command, program: str, words: list) -> tuple:
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> None:
            hint = "%s %s --help" % (program, command.name)
            if command.name == "run" and message.startswith("unrecognized"):
                hint = "arguments of the script go after --: " + _RUN_USAGE
            raise UsageError(message, hint)

    parser = Parser(
        prog="%s %s" % (program, command.name),
        usage="%s run [options] HOST... SCRIPT [-- ARG...]" % program if command.name == "run" else None,
        description=command.help,
        add_help=False,
        allow_abbrev=False,
        # without a width, each add_argument asks shutil for the terminal's, which imports 8 ms of modules
        formatter_class=lambda prog: argparse.HelpFormatter(prog, width=100),
    )
    for flags, details in command.options + _GLOBALS:
        if "type" in details:
            details = dict(details, type=_named_type(flags[-1], details["type"]))
        parser.add_argument(*flags, **details)
    script_args: list = []
    if command.name == "run" and "--" in words:
        at = words.index("--")
        words, script_args = words[:at], words[at + 1 :]
    if "--version" in words:
        return None, render_version()
    if "--help" in words or "-h" in words:
        return None, parser.format_help().rstrip()
    args = parser.parse_intermixed_args(words)
    args.script_args = script_args
    return command, args


def parse_command(role: str, program: str, argv: list) -> tuple:
    """(Command, its arguments). Raises UsageError; with --help or --version the Command is None and the text
    to print comes instead."""
    words = list(argv)
    leading: list = []
    while words and words[0].startswith("-"):  # global options before the verb
        taken = 2 if words[0] in ("--config", "--root") else 1
        leading += words[:taken]
        words = words[taken:]
    if "--version" in leading:
        return None, render_version()
    is_help = "--help" in leading or "-h" in leading
    if not words and (is_help or (role == "dispatcher" and not leading)) or words == ["help"]:
        return None, render_usage(role, program)
    if words == ["version"]:
        return None, render_version()
    if not words and role == "dispatcher":
        raise UsageError("no verb is given", "%s --help" % program)
    verb, *rest = words or ["serve"]
    known = {command.name: command for command in COMMANDS if command.role == role}
    if verb not in known:
        raise UsageError(
            "unknown verb `%s`%s" % (one_line(verb[:80]), suggest(verb, known)), "%s --help" % program
        )
    return _parse_options(known[verb], program, leading + rest)


def run_command(role: str, program: str, argv: list) -> int:
    """Parse, load the configuration, and run one verb; returns its exit status. Raises CtrlExecError."""
    command, args = parse_command(role, program, argv)
    if command is None:
        say(args)
        return 0
    if command.name != "serve":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGHUP])
    root = args.root or as_given(os.environ.get("CTRL_EXEC_ROOT", ""))
    root = os.path.abspath(root) if root else ""
    foreground = args.verbose or getattr(args, "foreground", False)
    LOG.open("ctrl-exec-" + role, under_root(root, ROOT_LOG) if root else "", foreground)
    try:
        file = "agent" if role == "agent" else "dispatcher"  # the API is the dispatcher's
        config = load_config(file, os.path.abspath(args.config) if args.config else "", root)
        if command.name != "serve":
            for warning in config.warnings:
                warn("%s: %s" % (program, warning))
        return command.handler(args, config)
    except CtrlExecError as error:
        if getattr(args, "json", False):
            _say_json(render_error(error))
        raise


# --- the demo -------------------------------------------------------------------------------------------

_DEMO_SCRIPTS = {
    "facts": """#!/bin/sh
# reports on the machine
uname -sr
echo "user:   $(id -un)"
echo "caller: $CTRL_EXEC_DISPATCHER"
""",
    "echo-args": """#!/bin/sh
# shows each argument as it arrived
for a in "$@"; do printf '[%s]\\n' "$a"; done
""",
    "context": "#!/bin/sh\n# shows the request it was given on stdin\ncat\necho\n",
    "fail": "#!/bin/sh\n# fails\necho 'the disk is on fire' >&2\nexit 3\n",
}
_DEMO_HOSTS = ("web-01", "web-02", "db-01")


class _Demo:
    """A whole deployment in one directory: a dispatcher, three agents, and what an operator would type."""

    def __init__(self, top: str) -> None:
        import py_compile

        self.top = top
        self.running: list = []  # processes to end
        self.interrupted = False
        for number in (signal.SIGINT, signal.SIGTERM):
            # not an exception, which could strike between a process's start and our noting it
            signal.signal(number, self._interrupt)
        self._log = os.open(
            os.path.join(top, "output.log"), os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600
        )
        # Some twenty commands follow, and each would compile the program anew, for half a second.
        compiled = os.path.join(top, "ctrl_exec.pyc")
        py_compile.compile(os.path.realpath(__file__), compiled, "ctrl_exec.py", doraise=True)
        for link in ("ced", "cea"):
            os.symlink(compiled, os.path.join(top, link))

    def _interrupt(self, *_: object) -> None:
        self.interrupted = True

    def program(self, link: str, host: str = "") -> list:
        """The beginning of a command line for the dispatcher, or for one host's agent."""
        root = os.path.join(self.top, "hosts", host) if host else os.path.join(self.top, "control")
        return [sys.executable, "-IS", os.path.join(self.top, link), "--root", root]

    def show(self, *words: str, host: str = "", quiet: bool = False, status: int = 0) -> str:
        """Type one command, show what it prints, return it. Raises Unavailable when it ends with another
        status than it should: what follows would only fail for that reason."""
        import shlex

        link = "cea" if host else "ced"
        if not quiet:
            say(_paint("\n%s$ %s %s" % (host + " " if host else "", link, shlex.join(words)), "bold"))
        done = run_program(self.program(link, host) + list(words), env=self._environment(), timeout=60)
        if self.interrupted:
            raise KeyboardInterrupt
        text = done.stdout.decode("utf-8", "replace")
        said = text + done.stderr.decode("utf-8", "replace") if not quiet else ""
        for line in said.splitlines():
            say("  " + printable(line))
        if done.status != status:
            what = "`%s %s` ended with status %s, and %d was expected" % (link, words[0], done.status, status)
            raise Unavailable("the demo stops here: " + what, "the lines above say why")
        return text

    def start(self, *words: str, host: str = "") -> None:
        self.running.append(
            start_program(
                self.program("cea" if host else "ced", host) + list(words), self._environment(), self._log
            )
        )

    def _environment(self) -> dict:
        return {"PATH": SAFE_PATH, "TERM": "dumb"}

    def put(self, path: str, text: str, mode: int = 0o644) -> None:
        path = os.path.join(self.top, path)
        make_directory(os.path.dirname(path), 0o755)
        write_atomic(path, text.encode("utf-8"), mode=mode)

    def stop(self) -> None:
        for process in reversed(self.running):
            process.terminate()
        for process in self.running:
            process.wait()


def _free_ports(count: int) -> list:
    """Ports of loopback that nobody has at this moment."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


def _wait_for_port(port: int, process: Any) -> None:
    """Until the port is open. Raises Unavailable when the process ends instead, or nothing happens."""
    deadline = Deadline(20)
    while not deadline.is_over() and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise Unavailable("port %d did not open; somebody else may have taken it" % port, "run the demo again")


def _try_path(directory: str) -> str:
    """A script that does nothing, to see who can run what lies there."""
    return os.path.join(directory, "try")


def _demo_files(demo: _Demo, pairing_port: int, ports: list) -> None:
    demo.put(
        "control/etc/ctrl-exec/ctrl-exec.conf", "pairing_port = %d\ndispatcher_id = control\n" % pairing_port
    )
    for host, port in zip(_DEMO_HOSTS, ports):
        etc = "hosts/%s%s/" % (host, AGENT_ETC)
        site = "north" if host == "web-01" else "south"
        conf = "port = %d\nbind = 127.0.0.1\n[tags]\nsite = %s\n" % (port, site)
        if os.geteuid() == 0:  # nothing is installed: there is no ctrl-exec-script
            can_nobody = find_user("nobody") is not None and may_execute("nobody", _try_path(demo.top))
            conf += "[profile default]\nrun_as = %s\n" % ("nobody" if can_nobody else "root")
        demo.put(etc + "agent.conf", conf)
        lines = []
        for name, text in _DEMO_SCRIPTS.items():
            demo.put("hosts/%s/scripts/%s" % (host, name), text, 0o755)
            lines.append("%s = %s/hosts/%s/scripts/%s\n" % (name, demo.top, host, name))
        demo.put(etc + "scripts.conf", "".join(lines))


def _read_state(demo: _Demo, host: str, reqid: str) -> str:
    try:
        return read_text("%s/hosts/%s%s/pairing/%s.json" % (demo.top, host, AGENT_VAR, reqid))
    except FileNotFoundError:
        return ""


def _demo_pair(demo: _Demo, pairing_port: int) -> None:
    say("\nPairing: both sides show six digits, computed from everything both have said.")
    demo.start("pairing-mode")
    _wait_for_port(pairing_port, demo.running[0])
    for host in _DEMO_HOSTS:
        asked = demo.show(
            "request-pairing",
            "--background",
            "--dispatcher",
            "127.0.0.1:%d" % pairing_port,
            "--name",
            host,
            host=host,
        )
        reqid = asked.strip()
        if host == _DEMO_HOSTS[0]:
            demo.show("list-requests")
        demo.show("approve", reqid)
        deadline = Deadline(20)
        while '"status": "stored"' not in _read_state(demo, host, reqid):
            if deadline.is_over():
                raise Unavailable("%s was not paired; see %s" % (host, demo.top), "run the demo again")
            time.sleep(0.05)
        demo.start("serve", host=host)


def _demo_run(demo: _Demo) -> None:
    demo.show("list-agents")
    demo.show("ping", "--all")
    demo.show("discovery")
    demo.show("run", "web-[01-02]", "facts")
    say("\nArguments arrive as they are: there is no shell that could look at them.")
    demo.show("run", "db-01", "echo-args", "--", "two words", "$(id) `id`", "--force", "", "*")
    demo.show("run", "db-01", "context", "--", "one")
    say("\nA failure is told as one, and what the host's own allowlist does not name does not run.")
    demo.show("run", "--tags", "site=south", "fail", status=1)
    demo.show("run", "web-01", "reboot", status=1)


def _say_how_to_go_on(demo: _Demo) -> None:
    import shlex

    say("\nIt keeps running. To go on:")
    say("  alias ced=%s" % shlex.quote(shlex.join(demo.program("ced"))))
    say("  ced run --all facts")
    say("To end it:")
    say("  kill %s; rm -r %s" % (" ".join(str(process.pid) for process in demo.running), demo.top))


def _remove_for_good(top: str) -> None:
    """Remove the demo's directory. An agent that still waited for its pairing notes how that ended, and so
    puts a file back: gone is what stays gone."""
    import shutil

    deadline = Deadline(10)
    times_gone = 0
    while times_gone < 4 and not deadline.is_over():
        times_gone = 0 if os.path.exists(top) else times_gone + 1
        shutil.rmtree(top, ignore_errors=True)
        time.sleep(0.05)


def _can_run_scripts(directory: str) -> bool:
    """Whether a script that lies there can be executed: many sites mount /tmp with noexec."""
    path = _try_path(directory)
    try:
        os.chmod(directory, 0o755)
        write_atomic(path, b"#!/bin/sh\nexit 0\n", mode=0o755)
        return run_program([path]).status == 0
    except (OSError, StorageError):
        return False


def _make_place() -> str:
    """A new directory in which scripts can run. Raises StorageError."""
    import tempfile

    for base in ("", "/var/tmp", os.path.expanduser("~"), "/run", os.getcwd()):
        try:
            top = tempfile.mkdtemp(prefix="ctrl-exec-demo-", dir=base or None)
        except OSError:  # not there, or not ours to write to
            continue
        if _can_run_scripts(top):
            return top
        _remove_for_good(top)
    hint = "set TMPDIR to one on a disk that is not full, read-only or mounted with noexec"
    raise StorageError("no directory was found in which scripts can run", hint)


def run_demo(keep: bool) -> int:
    """Set up, show, clean up: as whoever calls it, on loopback, below one temporary directory. Raises
    StorageError, and Unavailable for a step that fails."""
    top = os.path.realpath(_make_place())
    os.chmod(top, 0o755)
    demo = _Demo(top)
    kept = False
    try:
        pairing_port, *ports = _free_ports(1 + len(_DEMO_HOSTS))
        say("A deployment below %s: one dispatcher, three agents on loopback; nothing else is touched." % top)
        _demo_files(demo, pairing_port, ports)
        demo.show("setup-ca")
        demo.show("setup-ctrl-exec")
        _demo_pair(demo, pairing_port)
        for port, process in zip(ports, demo.running[1:]):
            _wait_for_port(port, process)
        _demo_run(demo)
        kept = keep
    except KeyboardInterrupt:
        warn("interrupted")
        return 130
    finally:
        if kept:
            _say_how_to_go_on(demo)
        else:
            demo.stop()
            _remove_for_good(top)
            say("\nStopped, and %s removed. `--keep` leaves it running." % top)
    return 0


# ======================================================================================================
# 24. MAIN
# Owns:  the role from the name invoked, signals, and the way from an error to an exit status. The only
#        section that leaves the process.
# Uses:  HEAD, ERRORS, GROUND, SETTINGS, CLI
# ======================================================================================================

_ROLES = {
    "ced": "dispatcher",
    "ctrl-exec": "dispatcher",
    "ctrl-exec-dispatcher": "dispatcher",
    "dispatcher": "dispatcher",
    "cea": "agent",
    "ctrl-exec-agent": "agent",
    "agent": "agent",
    "ctrl-exec-api": "api",
    "api": "api",
}

_USAGE = """\
usage: ctrl_exec.py demo [--keep]              a whole deployment in a temporary directory, to look at
       ctrl_exec.py dispatcher VERB ...        the control host (also: ced, ctrl-exec)
       ctrl_exec.py agent VERB ...             a managed host (also: cea, ctrl-exec-agent)
       ctrl_exec.py api                        the HTTP API (also: ctrl-exec-api)
       ctrl_exec.py conf-example ROLE          the configuration file of a role, every key explained
       ctrl_exec.py --version"""


def _start_compiled(role: str, words: list) -> None:
    """Begin anew, in this process, with the compiled form of the program, if this is a plain copy of it: what
    the compiler has used would stay with a service for good, 35 MiB of it, and be copied for its children.

    Returns when there is nothing to gain, or when it cannot be done: the service runs all the same.
    """
    if __name__ != "__main__" or type(__loader__).__name__ != "SourceFileLoader":
        return
    import py_compile
    import tempfile

    try:
        with tempfile.TemporaryDirectory() as top:
            compiled = os.path.join(top, "ctrl_exec.pyc")
            py_compile.compile(__file__, compiled, os.path.realpath(__file__), doraise=True)
            program = os.open(compiled, os.O_RDONLY)
        os.set_inheritable(program, True)
        os.execv(sys.executable, [sys.executable, "-IS", "/proc/self/fd/%d" % program, role, *words])
    except OSError:
        pass


def _run_role(argv: list) -> int:
    """Find out who we are, and do as asked. Raises CtrlExecError."""
    program = os.path.basename(argv[0])
    words = argv[1:]
    role = _ROLES.get(program, "")
    if not role and words:
        role = _ROLES.get(words[0], "")
        if role:
            program, words = "ctrl_exec.py " + words[0], words[1:]
    # A hang-up that comes while a service starts is for the service, and must not end it.
    is_service = role in ("agent", "api")
    signal.pthread_sigmask(signal.SIG_BLOCK if is_service else signal.SIG_UNBLOCK, [signal.SIGHUP])
    if is_service and "serve" in words:
        _start_compiled(role, words)
    if role:
        return run_command(role, program, words)
    if "--version" in words:
        say(render_version())
        return 0
    if "--help" in words or "-h" in words:
        say(_USAGE)
        return 0
    if words[:1] == ["demo"] and set(words[1:]) <= {"--keep"}:
        return run_demo("--keep" in words)
    if words[:1] == ["conf-example"] and len(words) == 2 and words[1] in ("dispatcher", "agent"):
        say(render_example(words[1]))
        return 0
    raise UsageError("what to do?\n" + _USAGE)


def _fail(program: str, error: CtrlExecError) -> int:
    warn("%s: %s" % (program, error.message))
    if error.hint:
        warn("%s  %s" % (" " * len(program), error.hint))
    return error.exit_code


def _report_bug(program: str, error: BaseException) -> int:
    log_bug(error)
    what = "internal error (%s); the log has the details. Please report it with them."
    warn("%s: %s" % (program, what % type(error).__name__))
    return EXIT_BUG


def _hold_standard_descriptors() -> None:
    """Started with a standard descriptor closed, the next file we open would become it, and output would go
    there: hold its place. Python has made its own stream None already, so the loss is still noticed."""
    while True:
        descriptor = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        if descriptor > 2:
            os.close(descriptor)
            return


def main(argv: list) -> int:
    """Run one command line (`argv[0]` is the name we were called by); returns the exit status."""
    argv = [as_given(word) for word in argv]
    program = os.path.basename(argv[0])
    _hold_standard_descriptors()
    try:
        return _run_role(argv)
    except CtrlExecError as error:
        return _fail(program, error)
    except ImportError as error:
        return _fail(program, ConfigError(INCOMPLETE % error.name))
    except KeyboardInterrupt:
        return 130  # 128 + SIGINT, as shells count
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that the last flush at exit does not fail again
        return 141  # 128 + SIGPIPE
    except Exception as error:
        return _report_bug(program, error)


def leave(status: int) -> None:
    """End the process at once. Taking the interpreter down in order costs `ced` 10 ms and does nothing:
    everything has been written, and threads that still wait for a host are not to be waited for."""
    try:
        sys.stderr.flush()
    finally:
        os._exit(status)


if __name__ == "__main__":
    leave(main(sys.argv))
