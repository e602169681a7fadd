#!/usr/bin/env python3
"""What `ced` and the agent cost, next to what one would use instead.

    python3 tests/bench/bench.py [--rounds N] [--python /path/to/python] [--flags='-I -S'] [--only PART,PART]

The parts: cold (ced, a bare Python process, ssh, check_nrpe), cpu, memory, kept, fanout, trace. Everything
runs on loopback below one temporary directory, with servers on ports the kernel picks. The variants of a
part take turns within each round, so that noise hits all of them alike: read the ratios, not the
milliseconds. A ratio is the median of the rounds' ratios.

The interpreter is named by its own path, because a `python3` on PATH may be a wrapper that costs 70 ms a
start. The .pth files in its site-packages would run at each start too: `--flags=-I` shows what starts cost
with them, for ced and the bare process alike. ssh (openssh-server) and check_nrpe (nagios-nrpe-plugin,
nagios-nrpe-server) are compared with when they are there.

Run it on an otherwise idle machine, as root or not: it changes nothing outside its directory, except that
sshd, started by root, needs /run/sshd.
"""

import argparse
import contextlib
import getpass
import json
import os
import pwd
import py_compile
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
TESTS = os.path.dirname(HERE)
sys.path[:0] = [os.path.dirname(TESTS), TESTS]

PARTS = ("cold", "cpu", "memory", "kept", "fanout", "trace")
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/usr/lib/nagios/plugins"
REQUESTS = 200

LAUNCHER = """\
import os, sys
sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
import ctrl_exec
ctrl_exec.leave(ctrl_exec.main(sys.argv))
"""

# The least that a Python program can do for the same answer.
BARE = """\
import json, os, socket, ssl, sys
port, path, script, cert, key, ca = sys.argv[1:]
context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
context.check_hostname = False
context.load_verify_locations(ca)
context.load_cert_chain(cert, key)
body = {"reqid": os.urandom(8).hex()}
if script:
    body.update(script=script, args=[], username="bench", token="")
body = json.dumps(body).encode()
head = "POST %s HTTP/1.1\\r\\nHost: x\\r\\nContent-Length: %d\\r\\n" % (path, len(body))
head += "Connection: close\\r\\n\\r\\n"
raw = socket.create_connection(("127.0.0.1", int(port)))
raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # or it would wait 40 ms for an acknowledgement
with context.wrap_socket(raw) as tls:
    tls.sendall(head.encode() + body)
    answer = b""
    while True:
        data = tls.recv(65536)
        if not data:
            break
        answer += data
head, _, body = answer.partition(b"\\r\\n\\r\\n")
print(json.loads(body))
sys.exit(0 if b" 200 " in head[:16] else 1)
"""

# One request id runs once on an agent, and here all hosts are one agent: so each host gets an id of its own.
FAN_LAUNCHER = """\
import os, sys
sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
import ctrl_exec
plain = ctrl_exec.HostClient.call
def call(self, agent, reqid, method, path, body, *rest, **how):
    return plain(self, agent, reqid, method, path, dict(body, reqid=reqid + "-" + agent.name), *rest, **how)
ctrl_exec.HostClient.call = call
status = ctrl_exec.main(sys.argv)
with open("/proc/self/status") as file:
    peak = [line.split()[1] for line in file if line.startswith("VmHWM")][0]
os.write(int(os.environ["BENCH_FD"]), peak.encode())
sys.exit(status)
"""

# The installed launcher with a clock around the steps; what it measures goes to the descriptor in BENCH_FD.
TRACE_LAUNCHER = """\
import time
began = time.monotonic()
import json, os, sys
sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
first = time.monotonic()
import ctrl_exec
loaded = time.monotonic()
spent = {}
def clocked(owner, name, label):
    plain = getattr(owner, name)
    def call(*args, **how):
        start = time.monotonic()
        try:
            return plain(*args, **how)
        finally:
            spent[label] = spent.get(label, 0.0) + time.monotonic() - start
    setattr(owner, name, call)
for owner, name, label in (
    (ctrl_exec, "parse_command", "parse the command line"),
    (ctrl_exec, "load_config", "load the configuration"),
    (ctrl_exec, "new_client_context", "TLS context, key and CA"),
    (ctrl_exec, "load_revoked", "revocation list"),
    (ctrl_exec.Dispatcher, "select", "registry"), (ctrl_exec.HostClient, "call", "the call, all of it"),
    (ctrl_exec, "_connect", "  of that: connect"),
    (ctrl_exec.ssl.SSLSocket, "do_handshake", "  of that: handshake"),
    (ctrl_exec.Connection, "check_identity", "  of that: check the identity"),
    (ctrl_exec.Connection, "request", "  of that: request and answer"),
    (ctrl_exec.Connection, "close", "  of that: close"),
    (ctrl_exec.EventLog, "event", "log events"), (ctrl_exec, "_write_out", "write the result"),
    (ctrl_exec.HostLocks, "__enter__", "take the lock"),
    (ctrl_exec.HostLocks, "__exit__", "give back the lock"),
    (ctrl_exec.threading.Thread, "start", "start a thread"),
):
    clocked(owner, name, label)
start = time.monotonic()
status = ctrl_exec.main(sys.argv)
ended = time.monotonic()
spawned = float(os.environ["BENCH_SPAWNED"])
facts = {"interpreter": began - spawned, "import": loaded - first, "main": ended - start, "spent": spent,
         "ended": ended}
os.write(int(os.environ["BENCH_FD"]), json.dumps(facts).encode())
sys.exit(status)
"""


# --- running and counting -------------------------------------------------------------------------------


class Timing:
    """What the rounds of one variant took: wall and CPU milliseconds."""

    def __init__(self):
        self.wall, self.cpu = [], []

    def median(self):
        return statistics.median(self.wall)


def run_cold(argv, environment, statuses=(0,)):
    """Start a program and wait for its end: (wall ms, CPU ms)."""
    actions = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)]
    actions += [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_WRONLY, 0) for number in (1, 2)]
    began = time.perf_counter()
    pid = os.posix_spawn(argv[0], argv, environment, file_actions=actions)
    _, status, usage = os.wait4(pid, 0)
    wall = time.perf_counter() - began
    if not os.WIFEXITED(status) or os.WEXITSTATUS(status) not in statuses:
        raise SystemExit("%s ended with wait status %d" % (" ".join(argv), status))
    return wall * 1000, (usage.ru_utime + usage.ru_stime) * 1000


def run_and_tell(bench, argv):
    """`run_cold` of a launcher that tells us something: (wall and CPU ms, what it wrote to BENCH_FD)."""
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    environment = dict(bench.environment, BENCH_FD=str(writer), BENCH_SPAWNED=repr(time.monotonic()))
    times = run_cold(argv, environment)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        return times, file.read()


def take_turns(variants, rounds):
    """Measure `variants` (name to a function that returns wall and CPU ms), each once a round."""
    timings = {name: Timing() for name in variants}
    names = list(variants)
    for number in range(rounds + 1):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            wall, cpu = variants[name]()
            if number:  # the first round warms up
                timings[name].wall.append(wall)
                timings[name].cpu.append(cpu)
    return timings


def ratio(one, other):
    """The median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(one.wall, other.wall))


def heading(text):
    print("\n%s\n%s" % (text, "-" * len(text)), flush=True)


def show_timings(timings, base=""):
    print("  %-40s %9s %9s %9s  %s" % ("", "median ms", "least ms", "CPU ms", "x " + base if base else ""))
    for name, timing in timings.items():
        versus = "%.2f" % ratio(timing, timings[base]) if base else ""
        cpu = statistics.median(timing.cpu)
        row = (name, timing.median(), min(timing.wall), "%.1f" % cpu if cpu else "-", versus)
        print("  %-40s %9.1f %9.1f %9s  %s" % row)


# --- the set-up -----------------------------------------------------------------------------------------


class Bench:
    """A control host and one agent, both from an installed copy, and how to start things against them."""

    def __init__(self, top, python, flags):
        import ctrl_exec
        import support

        self.ctrl_exec, self.support = ctrl_exec, support
        self.top, self.python, self.flags = top, python, flags
        self.library = os.path.join(top, "lib")
        os.chmod(top, 0o755)
        self.environment = {"PATH": SYSTEM_PATH, "LC_ALL": "C"}
        self._install()
        self.deployment = support.Deployment(os.path.join(top, "d"), ("alpha",), start=False)
        self.control, self.host = self.deployment.control, self.deployment["alpha"]
        nap = self.host.put("/scripts/nap", "#!/bin/sh\nexec sleep 0.2\n", 0o755)
        self.host.allow("true = /bin/true max_running=1000\nnap = %s max_running=1000\n" % nap)
        self.plain_agent = self._link(self.host.root + "/plain", "cea", "ctrl_exec.py")
        self.plain = self._link(self.control.root + "/plain", "ced", "ctrl_exec.py")
        self.host.path = self._link(self.host.root + "/installed", "cea", "launcher")
        self.installed = self._link(self.control.root + "/installed", "ced", "launcher")

    def _install(self):
        os.makedirs(self.library)
        shutil.copy(self.support.PROGRAM, self.library)
        py_compile.compile(os.path.join(self.library, "ctrl_exec.py"), doraise=True)
        programs = {"launcher": LAUNCHER, "fan": FAN_LAUNCHER, "trace": TRACE_LAUNCHER, "bare.py": BARE}
        for name, text in programs.items():
            with open(os.path.join(self.library, name), "w", encoding="ascii") as file:
                file.write(text)

    def _link(self, directory, name, launcher):
        os.makedirs(directory, exist_ok=True)
        path = os.path.join(directory, name)
        os.symlink(os.path.join(self.library, launcher), path)
        return path

    def ced(self, *words, link=""):
        return [self.python, *self.flags, link or self.installed, "--root", self.control.root, *words]

    def bare(self, path, script=""):
        config = self.control.config
        program = os.path.join(self.library, "bare.py")
        words = (str(self.host.port), path, script, config.cert, config.key, config.ca)
        return [self.python, *self.flags, program, *words]

    def cold(self, argv, statuses=(0,)):
        """A variant for take_turns."""
        return lambda: run_cold(argv, self.environment, statuses)

    def post(self, path, body):
        """One request on a connection of its own."""
        context = self.support.dispatcher_context(self.control)
        status, answer = self.support.post(self.host.port, context, path, body)
        assert status == 200 and answer.get("exit", 0) == 0, answer

    def check(self):
        """Every way of asking gives the answer that it should, before any of them is timed."""
        for words in (("ping", "alpha"), ("run", "alpha", "true")):
            for link in (self.installed, self.plain):
                done = subprocess.run(self.ced(*words, link=link), env=self.environment, capture_output=True)
                assert done.returncode == 0 and b"alpha" in done.stdout, done
        for path, script, mark in (("/ping", "", b"'status': 'ok'"), ("/run", "true", b"'exit': 0")):
            done = subprocess.run(self.bare(path, script), env=self.environment, capture_output=True)
            assert done.returncode == 0 and mark in done.stdout, done


# --- what one would use instead -------------------------------------------------------------------------


def find_program(name):
    return shutil.which(name, path=SYSTEM_PATH)


@contextlib.contextmanager
def running(bench, argv, port):
    """A server in the foreground until the block ends."""
    log = open(os.path.join(bench.top, os.path.basename(argv[0]) + ".log"), "ab")
    with log:
        nothing = subprocess.DEVNULL
        process = subprocess.Popen(argv, env=bench.environment, stdin=nothing, stdout=log, stderr=log)
        try:
            bench.support.wait_for_port(port)
            yield
        finally:
            process.terminate()
            process.wait()


@contextlib.contextmanager
def ssh_variant(bench):
    """`ssh` with a forced command; client and server read no configuration of the system's."""
    ssh, sshd, keygen = (find_program(name) for name in ("ssh", "sshd", "ssh-keygen"))
    if not (ssh and sshd and keygen):
        print("  ssh: left out: no ssh, sshd or ssh-keygen here (openssh-server)")
        yield {}
        return
    place, port = os.path.join(bench.top, "ssh"), bench.support.free_port()
    os.mkdir(place, 0o700)
    for name in ("host", "user"):
        subprocess.run([keygen, "-q", "-t", "ed25519", "-N", "", "-f", os.path.join(place, name)], check=True)
    with open(os.path.join(place, "user.pub"), encoding="ascii") as file:
        key = file.read()
    with open(os.path.join(place, "authorized"), "w", encoding="ascii") as file:
        file.write('command="/bin/true",restrict ' + key)
    with open(os.path.join(place, "conf"), "w", encoding="ascii") as file:
        file.write("Port %d\nListenAddress 127.0.0.1\nHostKey %s/host\nPidFile none\n" % (port, place))
        file.write("AuthorizedKeysFile %s/authorized\nStrictModes no\nUsePAM no\nMaxStartups 100\n" % place)
        file.write("PermitRootLogin forced-commands-only\n")
    made = os.geteuid() == 0 and not os.path.isdir("/run/sshd")
    if made:
        os.mkdir("/run/sshd", 0o755)
    options = ("StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "BatchMode=yes",
               "IdentitiesOnly=yes", "LogLevel=ERROR")  # fmt: skip
    argv = [ssh, "-F", "/dev/null", "-i", place + "/user", "-p", str(port), "-l", getpass.getuser()]
    argv += [word for option in options for word in ("-o", option)] + ["127.0.0.1"]
    try:
        with running(bench, [sshd, "-D", "-e", "-f", place + "/conf"], port):
            yield try_variant(bench, "ssh, forced command /bin/true", argv, (0,))
    finally:
        if made:
            os.rmdir("/run/sshd")


def try_variant(bench, name, argv, statuses):
    """A variant by name, if the program does what it should; else a line that says why not."""
    done = subprocess.run(argv, env=bench.environment, stdin=subprocess.DEVNULL, capture_output=True)
    if done.returncode not in statuses:
        said = (done.stderr + done.stdout).decode("utf-8", "replace").strip().replace("\n", " ")
        print("  %s: left out: it ended with %d: %s" % (name, done.returncode, said[-200:]))
        return {}
    return {name: bench.cold(argv, statuses)}


def nrpe_user():
    """Who its daemon runs as: not root, which it refuses to be."""
    if os.geteuid() != 0:
        return pwd.getpwuid(os.geteuid())
    for name in ("nagios", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    return pwd.getpwuid(65534)


@contextlib.contextmanager
def nrpe_variant(bench, with_certificates):
    """check_nrpe over TLS: as packaged (anonymous Diffie-Hellman), or certificates on both sides."""
    client, server = find_program("check_nrpe"), find_program("nrpe")
    if not (client and server):
        print("  check_nrpe: left out: no check_nrpe or nrpe here (nagios-nrpe-plugin, nagios-nrpe-server)")
        yield {}
        return
    port = bench.support.free_port()
    conf = os.path.join(bench.top, "nrpe-%d.cfg" % with_certificates)
    ours, theirs = bench.control.config, bench.host.config
    user = nrpe_user()
    lines = ["server_port=%d" % port, "server_address=127.0.0.1", "allowed_hosts=127.0.0.1", "debug=0",
             "nrpe_user=%d" % user.pw_uid, "nrpe_group=%d" % user.pw_gid, "pid_file=%s.pid" % conf,
             "dont_blame_nrpe=0", "command[true]=/bin/true"]  # fmt: skip
    argv = [client, "-H", "127.0.0.1", "-4", "-D", "-p", str(port), "-c", "true"]
    if with_certificates:
        name = "check_nrpe, TLS with certificates"
        lines += ["ssl_cacert_file=" + theirs.ca, "ssl_cert_file=" + theirs.cert,
                  "ssl_privatekey_file=" + theirs.key, "ssl_client_certs=2", "ssl_use_adh=0",
                  "ssl_version=TLSv1.2+"]  # fmt: skip
        argv += ["-C", ours.cert, "-K", ours.key, "-A", ours.ca, "-d", "0", "-S", "TLSv1.2+"]
    else:
        name = "check_nrpe, TLS as packaged (anonymous)"
    with open(conf, "w", encoding="ascii") as file:
        file.write("\n".join(lines) + "\n")
    with running(bench, [server, "-c", conf, "-f"], port):
        yield try_variant(bench, name, argv, (0, 3))  # 3: it ran, and had nothing to say


# --- cold starts ----------------------------------------------------------------------------------------


def measure_cold(bench, rounds):
    heading("Cold starts: one process, one host, one answer")
    variants = {
        "python -I -c pass": bench.cold([bench.python, "-I", "-c", "pass"]),
        "python -I -S -c pass": bench.cold([bench.python, "-I", "-S", "-c", "pass"]),
        "bare Python: ping": bench.cold(bench.bare("/ping")),
        "ced ping, installed": bench.cold(bench.ced("ping", "alpha")),
        "ced ping, plain file": bench.cold(bench.ced("ping", "alpha", link=bench.plain)),
        "bare Python: run": bench.cold(bench.bare("/run", "true")),
        "ced run, installed": bench.cold(bench.ced("run", "alpha", "true")),
        "ced run, plain file": bench.cold(bench.ced("run", "alpha", "true", link=bench.plain)),
    }
    with contextlib.ExitStack() as servers:
        ssh = servers.enter_context(ssh_variant(bench))
        packaged = servers.enter_context(nrpe_variant(bench, False))
        mutual = servers.enter_context(nrpe_variant(bench, True))
        variants.update({**ssh, **packaged, **mutual})
        timings = take_turns(variants, rounds)
    show_timings(timings)
    show_ratios(timings, list(ssh), [*packaged, *mutual])


def show_ratios(timings, ssh, nrpe):
    rows = [("ced %s, %s" % (verb, kind), "bare Python: " + verb, 1.5)
            for verb in ("ping", "run") for kind in ("installed", "plain file")]  # fmt: skip
    rows += [("ced %s, installed" % verb, other, 0.25) for verb in ("ping", "run") for other in ssh]
    rows += [("ced %s, installed" % verb, other, 1.0) for verb in ("ping", "run") for other in nrpe]
    print("\n  %-24s / %-41s %6s  %s" % ("ratio of", "", "", "aim"))
    for one, other, aim in rows:
        value = ratio(timings[one], timings[other])
        if "plain" in one:
            verdict = "-"
        else:
            verdict = "at most %.2f: %s" % (aim, "met" if value <= aim else "missed")
        print("  %-24s / %-41s %6.2f  %s" % (one, other, value, verdict))


# --- the agent: CPU, memory, time per request -----------------------------------------------------------


def wait_for_quiet(bench):
    """Until there are the executor, its front, the supervisor that waits for the next run, and that one's
    process for the script, and nothing else; returns their process ids."""
    executor = bench.host.process.pid

    def family():
        children = bench.host.children()
        try:
            others = [other for pid in children for other in bench.host.children(pid)]
        except FileNotFoundError:  # one has just ended
            return None
        return [executor, *children, *others] if (len(children), len(others)) == (2, 1) else None

    return bench.support.wait_until(family, what="the supervisors' end")


def agent_ticks(bench):
    """Seconds of CPU of the agent's processes, and everything they have reaped."""
    total = 0
    for pid in wait_for_quiet(bench):
        with open("/proc/%d/stat" % pid, encoding="ascii") as file:
            fields = file.read().rpartition(")")[2].split()
        total += sum(int(word) for word in fields[11:15])  # utime, stime, cutime, cstime
    return total / os.sysconf("SC_CLK_TCK")


class KeptClient:
    """One TLS connection for many requests."""

    def __init__(self, bench):
        context = bench.support.dispatcher_context(bench.control)
        self.socket = bench.support.tls_connect(bench.host.port, context)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._read = bench.support.read_reply

    def post(self, path, body):
        data = json.dumps(body).encode()
        head = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (path, len(data))
        self.socket.sendall(head + data)
        status, _, reply = self._read(self.socket)
        assert status == 200 and (b'"exit":0' in reply or b'"status":"ok"' in reply), reply


def run_body():
    return {"script": "true", "args": [], "reqid": os.urandom(8).hex(), "username": "bench", "token": ""}


def measure_cpu(bench):
    heading("CPU of the agent per request: executor, front, supervisors, scripts (%d each)" % REQUESTS)
    for kind in ("a connection each", "one kept connection"):
        for path in ("/ping", "/run"):
            if kind == "a connection each":
                send = bench.post
            else:
                kept = KeptClient(bench)
                send = lambda path, body, kept=kept: kept.post(path.encode(), body)  # noqa: E731
            before = agent_ticks(bench)
            for _ in range(REQUESTS):
                send(path, run_body() if path == "/run" else {"reqid": "bench"})
            print("  %-8s %-22s %7.2f ms" % (path, kind, (agent_ticks(bench) - before) * 1000 / REQUESTS))
            if kind != "a connection each":
                kept.socket.close()


def read_memory(pid):
    """(PSS, anonymous part of it, {mapping: file pages in it}) of a process, in KiB."""
    pss = anonymous = 0
    files, current = {}, ""
    rss = 0
    with open("/proc/%d/smaps" % pid, encoding="utf-8", errors="replace") as file:
        for line in file:
            hit = re.match(r"[0-9a-f]+-[0-9a-f]+ \S+ (\S+) \S+ \S+\s*(.*)", line)
            if hit:
                current = "%s@%s" % (hit[2], hit[1]) if hit[2].startswith("/") else ""
                continue
            name, _, rest = line.partition(":")
            size = int(rest.split()[0]) if rest.split()[:1] and rest.split()[0].isdigit() else 0
            if name == "Pss":
                pss += size
            elif name == "Rss":
                rss = size
            elif name == "Anonymous" and current:
                files[current] = rss - size
    with open("/proc/%d/smaps_rollup" % pid, encoding="ascii") as file:
        for line in file:
            if line.startswith("Pss_Anon:"):
                anonymous = int(line.split()[1])
    return pss, anonymous, files


def show_memory(bench, when):
    """PSS of all its processes, and what it would be if nobody else on this machine used the same libraries."""
    facts = [read_memory(pid) for pid in wait_for_quiet(bench)]
    pss = sum(fact[0] for fact in facts) / 1024
    anonymous = sum(fact[1] for fact in facts)
    pages = {name: max(fact[2].get(name, 0) for fact in facts) for fact in facts for name in fact[2]}
    alone = (anonymous + sum(pages.values())) / 1024
    verdict = "met" if pss < 25 else "missed"
    print("  %-36s %7.1f %10.1f %12.1f   %s" % (when, pss, anonymous / 1024, alone, verdict))


def measure_memory(bench):
    heading("Memory of the agent in MiB, executor and front together (aim: PSS under 25)")
    print("  %-36s %7s %10s %12s" % ("", "PSS", "anonymous", "if alone"))
    for label, path in (("plain file", bench.plain_agent), ("installed", bench.host.path)):
        bench.host.stop()
        bench.host.path = path
        bench.host.start()
        show_memory(bench, label + ": started")
        for _ in range(REQUESTS):
            bench.post("/ping", {"reqid": "bench"})
        show_memory(bench, label + ": after %d pings" % REQUESTS)
        for _ in range(REQUESTS):
            bench.post("/run", run_body())
        show_memory(bench, label + ": after %d runs as well" % REQUESTS)


def measure_kept(bench, rounds):
    heading("One request on a kept connection; what supervisor and record cost a run")
    kept = KeptClient(bench)

    def timed(action, pause=0.0):
        def variant():
            time.sleep(pause)
            began = time.perf_counter()
            action()
            return (time.perf_counter() - began) * 1000, 0

        return variant

    def start_true():
        os.waitpid(os.posix_spawn("/bin/true", ["/bin/true"], {}), 0)

    timings = take_turns(
        {
            "/ping": timed(lambda: kept.post(b"/ping", {"reqid": "bench"})),
            "/run of /bin/true": timed(lambda: kept.post(b"/run", run_body()), pause=0.05),
            "/run, one upon another": timed(lambda: kept.post(b"/run", run_body())),
            "subprocess.run of /bin/true": timed(lambda: subprocess.run(["/bin/true"])),
            "posix_spawn of /bin/true": timed(start_true),
        },
        rounds * 5,
    )
    show_timings(timings)
    for name in ("/run of /bin/true", "/run, one upon another"):
        rows = zip(timings[name].wall, timings["/ping"].wall, timings["subprocess.run of /bin/true"].wall)
        cost = statistics.median(run - ping - bare for run, ping, bare in rows)
        verdict = "met" if cost < 3 else "missed"
        print("  %s: record and supervisor cost %.2f ms (at most 3: %s)" % (name, cost, verdict))
    kept.socket.close()


# --- fan-out --------------------------------------------------------------------------------------------


def measure_fanout(bench, rounds):
    heading("Fan-out: one ced run over N hosts, which are all one agent on this machine (seconds)")
    registry = bench.control.config.registry_dir
    agent = bench.ctrl_exec.get_agent(registry, "alpha")
    for number in range(300):
        bench.ctrl_exec.save_agent(registry, agent._replace(name="n%03d" % number, hostname="n%03d" % number))
    link = bench._link(bench.control.root + "/fan", "ced", "fan")
    confs = {}
    for parallel in (8, 16, 32, 64, 128):
        text = "dispatcher_id = control\nmax_parallel = %d\n" % parallel
        confs[parallel] = bench.control.put("/fan%d.conf" % parallel, text, 0o640)
    print("  %-30s" % "max_parallel" + "".join("%10d" % parallel for parallel in confs))
    for script, shown in (("true", "/bin/true"), ("nap", "sleep 0.2")):
        for count in (100, 300):
            rows = {parallel: [] for parallel in confs}
            for _ in range(rounds):
                for parallel, conf in confs.items():
                    words = ("--config", conf, "run", "n[000-%03d]" % (count - 1), script)
                    times, peak = run_and_tell(bench, bench.ced(*words, link=link))
                    rows[parallel].append((*times, int(peak)))
            show_fanout("%d x %s" % (count, shown), rows, count)


def show_fanout(label, rows, count):
    def line(text, value, form):
        medians = [statistics.median(map(value, runs)) for runs in rows.values()]
        print("  %-30s" % text + "".join(form % median for median in medians))

    line(label, lambda run: run[0] / 1000, "%10.2f")
    line("   CPU ms of ced per host", lambda run: run[1] / count, "%10.2f")
    line("   largest RSS of ced, MiB", lambda run: run[2] / 1024, "%10.1f")  # VmHWM


# --- where the time goes --------------------------------------------------------------------------------


def read_trace(bench, link, words):
    """One run of the clocked launcher: step to milliseconds."""
    _, told = run_and_tell(bench, bench.ced(*words, link=link))
    over = time.monotonic()
    facts = json.loads(told)
    steps = {"start the interpreter": facts["interpreter"], "import ctrl_exec": facts["import"],
             "main, all of it": facts["main"]}  # fmt: skip
    steps.update(("  " + name, seconds) for name, seconds in facts["spent"].items())
    steps["end the interpreter"] = over - facts["ended"]
    return {name: seconds * 1000 for name, seconds in steps.items()}


def read_imports(bench, argv):
    """What -X importtime says of one command: module to (self, cumulative) in milliseconds."""
    words = [argv[0], "-X", "importtime", *argv[1:]]
    done = subprocess.run(words, env=bench.environment, capture_output=True, check=True)
    found = {}
    for line in done.stderr.decode().splitlines():
        hit = re.match(r"import time:\s+(\d+) \|\s+(\d+) \| (\s*\S+)", line)
        if hit:
            found[hit[3].strip()] = (int(hit[1]) / 1000, int(hit[2]) / 1000)
    return found


def median_imports(bench, argv, rounds):
    runs = [read_imports(bench, argv) for _ in range(rounds)]
    names = set.intersection(*(set(run) for run in runs))
    return {name: tuple(statistics.median(run[name][at] for run in runs) for at in (0, 1)) for name in names}


def show_imports(bench, rounds):
    bare = median_imports(bench, bench.bare("/ping"), rounds)
    for words in (("ping", "alpha"), ("run", "alpha", "true")):
        ours = median_imports(bench, bench.ced(*words), rounds)
        extra = {name: times for name, times in ours.items() if name not in bare}
        print("\n  ced %s: imports that the bare process lacks (own ms, under -X importtime)" % words[0])
        for name, times in sorted(extra.items(), key=lambda entry: -entry[1][0])[:14]:
            print("    %-28s %6.1f" % (name, times[0]))
        total = sum(times[0] for times in extra.values())
        print("    %-28s %6.1f" % ("all of them (%d modules)" % len(extra), total))


def measure_trace(bench, rounds):
    heading("Where the time of the installed copy goes (medians, ms; a step may contain others)")
    link = bench._link(bench.control.root + "/trace", "ced", "trace")
    for words in (("ping", "alpha"), ("run", "alpha", "true")):
        runs = [read_trace(bench, link, words) for _ in range(rounds)]
        print("\n  ced %s" % words[0])
        for name in runs[0]:
            print("    %-40s %6.1f" % (name, statistics.median(run.get(name, 0.0) for run in runs)))
    show_imports(bench, max(3, rounds // 3))


# --- the whole ------------------------------------------------------------------------------------------


def find_interpreter(wanted):
    """The interpreter behind `wanted`, which may be a wrapper, by its own path."""
    if not wanted:
        return os.path.realpath(sys.executable)
    code = "import os, sys; print(os.path.realpath(sys.executable))"
    done = subprocess.run([wanted, "-I", "-c", code], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def measure(bench, parts, rounds):
    actions = {
        "cold": lambda: measure_cold(bench, rounds),
        "cpu": lambda: measure_cpu(bench),
        "memory": lambda: measure_memory(bench),
        "kept": lambda: measure_kept(bench, rounds),
        "fanout": lambda: measure_fanout(bench, max(1, rounds // 7)),
        "trace": lambda: measure_trace(bench, rounds),
    }
    for part in PARTS:
        if part in parts:
            actions[part]()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=21, metavar="N", help="rounds of each part (21)")
    parser.add_argument("--python", metavar="PATH", help="the interpreter for everything (default: this one)")
    parser.add_argument("--flags", default="-I -S", help="how Python is started (-I -S, as installed copies are)")
    parser.add_argument("--only", default=",".join(PARTS), metavar="P,P", help="some of: " + ",".join(PARTS))
    args = parser.parse_args()
    python = find_interpreter(args.python)
    if python != os.path.realpath(sys.executable):
        sys.stdout.flush()
        words = ["--rounds", str(args.rounds), "--flags=" + args.flags, "--only", args.only]
        os.execv(python, [python, os.path.abspath(__file__), *words])
    sys.executable = python  # what the set-up for tests starts its programs with
    parts = set(args.only.split(","))
    if args.rounds < 1 or not parts <= set(PARTS):
        parser.error("--rounds is 1 or more; --only names some of " + ",".join(PARTS))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers and files go with us
    top = tempfile.mkdtemp(prefix="ctrl-exec-bench-")
    try:
        bench = Bench(top, python, args.flags.split())
        shown = (sys.version.split()[0], python, args.flags, os.cpu_count(), args.rounds)
        print("Python %s at %s with %s, %d processors, %d rounds" % shown)
        with bench.deployment:
            bench.host.start()
            bench.check()
            measure(bench, parts, args.rounds)
    finally:
        shutil.rmtree(top, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
