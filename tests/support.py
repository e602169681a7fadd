"""What tests share: a control host, managed hosts, and raw peers, all of them real processes and real TLS."""

import atexit
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time

import ctrl_exec

PROGRAM = os.path.realpath(ctrl_exec.__file__)
IS_ROOT = os.geteuid() == 0
LAUNCHER = """\
import sys

sys.path.insert(0, %r)
import ctrl_exec

ctrl_exec.leave(ctrl_exec.main(sys.argv))
"""


def wait_until(condition, seconds=60, what="the condition"):
    """Poll until `condition()` is true and return its value; fail the test when it never is."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError("%s did not come true within %g s" % (what, seconds))


def _own_ports():
    """Ports of a block that no other run of the tests has, in turn: what is to listen on one does so later,
    or again. They lie below those that the kernel gives to connections and to who asks for any."""
    mark = socket.socket(socket.AF_UNIX)
    for first in range(10000, 32000, 1000):
        try:
            mark.bind("\0ctrl-exec-tests-%d" % first)  # the kernel takes it back when we end
            break
        except OSError:  # another run's
            continue
    while True:
        yield from range(first, first + 1000)


_PORTS = _own_ports()


def free_port():
    """A port of loopback that nobody has, and that nobody else is going to have."""
    for port in _PORTS:
        try:
            socket.create_server(("127.0.0.1", port)).close()
            return port
        except OSError:
            continue


def as_starter(conf):
    """The text of an agent.conf whose profiles say that scripts run as who starts the agent, where he is root."""
    if not IS_ROOT:
        return conf
    if "[profile default]" not in conf:
        conf += "\n[profile default]\n"
    head, *profiles = re.split(r"(?m)^(?=\[profile )", conf)
    return head + "".join(
        text if re.search(r"(?m)^run_as", text) else text.rstrip("\n") + "\nrun_as = root\n" for text in profiles
    )


class Program:
    """One role with a root of its own, started through its symlink as a user would."""

    link = ""

    def __init__(self, root):
        self.root = str(root)
        os.makedirs(self.root, exist_ok=True)
        self.path = os.path.join(self.root, self.link)
        if not os.path.lexists(self.path):
            os.symlink(self._make_launcher(), self.path)

    def _make_launcher(self):
        """What an installation has: a script that imports the program from its compiled cache. Compiling it anew
        at each of some thousand starts would take most of the tests' time."""
        path = os.path.join(self.root, ".launch")
        with open(path, "w", encoding="utf-8") as file:
            file.write(LAUNCHER % os.path.dirname(PROGRAM))
        return path

    def argv(self, *words):
        return [sys.executable, "-IS", self.path, "--root", self.root, *words]

    def environment(self, extra=None):
        return {"PATH": ctrl_exec.SAFE_PATH, "LC_ALL": "C", **(extra or {})}

    def run(self, *words, input=None, env=None, timeout=60):
        """Run one command to its end; text is bytes decoded as UTF-8 with surrogateescape."""
        done = subprocess.run(
            self.argv(*words), input=input, env=self.environment(env), timeout=timeout, capture_output=True
        )
        done.out = done.stdout.decode("utf-8", "surrogateescape")
        done.err = done.stderr.decode("utf-8", "surrogateescape")
        assert "Traceback" not in done.err, done.err
        return done

    def json(self, *words, **how):
        """Run with --json before any `--`; returns (exit status, object)."""
        at = words.index("--") if "--" in words else len(words)
        done = self.run(*words[:at], "--json", *words[at:], **how)
        return done.returncode, json.loads(done.out)

    def spawn(self, *words, env=None, **how):
        """Start a command and return the Popen; its group is its own."""
        return subprocess.Popen(self.argv(*words), env=self.environment(env), start_new_session=True, **how)

    def file(self, path):
        """Where a default path lies below this root."""
        return ctrl_exec.under_root(self.root, path)

    def put(self, path, text, mode=0o644):
        path = self.file(path)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(text if isinstance(text, bytes) else text.encode("utf-8"))
        os.chmod(path, mode)
        return path

    def log(self):
        """The event lines so far."""
        try:
            with open(self.file(ctrl_exec.ROOT_LOG), encoding="ascii") as file:
                return file.read()
        except FileNotFoundError:
            return ""

    def events(self, action):
        """The lines of one action."""
        return [line for line in self.log().splitlines() if "ACTION=%s " % action in line + " "]


class Control(Program):
    """A control host."""

    link = "ced"
    _made = {}  # configuration to directories with what was set up under it

    def __init__(self, root, conf="", set_up=True):
        super().__init__(root)
        self.put(ctrl_exec.ETC + "/ctrl-exec.conf", "dispatcher_id = control\n" + conf, 0o640)
        self.config = ctrl_exec.load_config("dispatcher", "", self.root)
        self.identity = ctrl_exec.dispatcher_identity(self.config)
        if set_up:
            self._set_up(conf)

    def _set_up(self, conf):
        """Give it a CA and a certificate, as the program makes them. They are made a few times only, and then
        handed out in turn: ten processes for each of two hundred control hosts would take a minute."""
        made = Control._made.setdefault(conf, [])
        if len(made) == 3:
            for name in ("etc", "var"):
                subprocess.run(["cp", "-a", os.path.join(made[0], name), self.root], check=True)
            made.append(made.pop(0))
            return
        for verb in ("setup-ca", "setup-ctrl-exec"):
            done = self.run(verb)
            assert done.returncode == 0, done.err
        made.append(tempfile.mkdtemp())
        atexit.register(shutil.rmtree, made[-1])
        for name in ("etc", "var"):
            subprocess.run(["cp", "-a", os.path.join(self.root, name), made[-1]], check=True)

    def wait_for_lock(self):
        """Wait until a run holds a lock here and has written into it whose it is; the request's id."""
        locks = wait_until(
            lambda: [lock for lock in ctrl_exec.list_locks(self.config.lock_dir) if "reqid" in lock], what="a lock"
        )
        return locks[0]["reqid"]

    def serial(self):
        return ctrl_exec.read_certificate(self.config.cert).serial

    def register(self, host):
        """Give a host what pairing would: its certificate, the CA, our serial, and an entry in the registry."""
        openssl = ctrl_exec.OpenSSL()
        identity = ctrl_exec.agent_identity(host.config)
        ctrl_exec.new_key_file(openssl, identity.key, "ec")
        request = openssl.new_request(identity.key, host.name)
        ca_key = ctrl_exec.ca_key_path(self.config.ca)
        pem = openssl.sign(request, host.name, "agent", 365, self.config.ca, ca_key)
        ctrl_exec.write_atomic(identity.cert, pem.encode(), mode=0o644)
        with open(self.config.ca, "rb") as file:
            ctrl_exec.write_atomic(identity.ca, file.read(), mode=0o644)
        ctrl_exec.add_trusted(host.config.trusted_dispatchers_path, self.serial(), "control")
        info = ctrl_exec.read_certificate(identity.cert)
        agent = ctrl_exec.Agent(
            host.name, host.name, "127.0.0.1", host.port, "ip", host.name, info.serial,
            ctrl_exec.iso_time(info.not_after), ctrl_exec.iso_time(time.time()),
        )  # fmt: skip
        with ctrl_exec.registry_lock(self.config.registry_dir):
            ctrl_exec.save_agent(self.config.registry_dir, agent)

    def open_pairing(self, *options):
        """Start pairing-mode on a free port; returns the Popen with .port, stdin a pipe."""
        port = free_port()
        with open(self.file(ctrl_exec.ETC + "/ctrl-exec.conf"), "a", encoding="ascii") as file:
            file.write("" if "pairing_port" in open(file.name).read() else "pairing_port = %d\n" % port)
        port = ctrl_exec.load_config("dispatcher", "", self.root).pairing_port
        process = self.spawn("pairing-mode", *options, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        process.port = port
        wait_for_port(port)
        return process


class Host(Program):
    """A managed host: its files, its scripts, its agent process."""

    link = "cea"

    def __init__(self, root, name, conf=""):
        super().__init__(root)
        self.name = name
        self.port = free_port()
        self.process = None
        self.configure(conf)
        self.config = ctrl_exec.load_config("agent", "", self.root)

    def configure(self, conf=""):
        """Write agent.conf: port, loopback, and `conf`. Scripts run as who runs the tests unless a profile says
        otherwise: what they write lies in directories of his."""
        text = "port = %d\nbind = 127.0.0.1\n%s" % (self.port, as_starter(conf))
        self.put(ctrl_exec.AGENT_ETC + "/agent.conf", text, 0o640)

    def allow(self, text):
        """Write scripts.conf."""
        self.put(ctrl_exec.AGENT_ETC + "/scripts.conf", text, 0o640)

    def script(self, name, body, options="", mode=0o755, interpreter="/bin/sh"):
        """Add a script and its allowlist line; takes effect at start or reload. Returns its path."""
        path = self.put("/scripts/" + name, "#!%s\n%s" % (interpreter, body), mode)
        conf = self.file(ctrl_exec.AGENT_ETC + "/scripts.conf")
        with open(conf, "a", encoding="ascii") as file:
            file.write("%s = %s %s\n" % (name, path, options))
        os.chmod(conf, 0o640)
        return path

    def start(self, *options, wait=True, env=None):
        self.process = self.spawn(
            "serve", *options, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        if wait:
            wait_until(lambda: self.is_ready() or self.process.poll() is not None, what="the agent")
            assert self.process.poll() is None, self.process.stdout.read().decode() + self.log()
        return self.process

    def is_up(self):
        try:
            socket.create_connection(("127.0.0.1", self.port), 1).close()
            return True
        except OSError:
            return False

    def is_ready(self):
        """Whether it is up and acts on signals: its port is open earlier, when SIGHUP would still end it."""
        with open("/proc/%d/status" % self.process.pid, encoding="ascii") as file:
            caught = int(re.search(r"SigCgt:\s*([0-9a-f]+)", file.read())[1], 16)
        # the port last: each look at it is a connection, which a rate limit counts
        return bool(caught >> (signal.SIGHUP - 1) & 1) and self.is_up()

    def stop(self, number=signal.SIGTERM):
        """End the agent; returns its exit status."""
        if self.process is None:
            return None
        if self.process.poll() is None:
            self.process.send_signal(number)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
        self.process.stdout.close()
        return self.process.returncode

    def reload(self):
        """SIGHUP, and wait for the event that says how it went; returns that line."""
        before = len(self.events("reload"))
        self.process.send_signal(signal.SIGHUP)
        return wait_until(lambda: self.events("reload")[before:], what="the reload")[0]

    def children(self, pid=None):
        """The process ids of the agent's children."""
        path = "/proc/%d/task/%d/children" % ((pid or self.process.pid,) * 2)
        with open(path, encoding="ascii") as file:
            return [int(word) for word in file.read().split()]

    def fronts(self):
        """The process ids of the agent's network side: children that make no session of their own.

        Supervisors need a moment to make theirs, so there can be a false one among them.
        """
        own = ctrl_exec.find_process(self.process.pid)
        children = [ctrl_exec.find_process(pid) for pid in self.children()]
        return [one.pid for one in children if one is not None and one.session == own.session]

    def front(self, other_than=0):
        """The one front, as soon as there is one, and another one than this."""

        def look():
            found = self.fronts()
            return found[0] if len(found) == 1 and found[0] != other_than else 0

        return wait_until(look, what="one front")

    def record(self, reqid, owner="control"):
        with open(os.path.join(self.config.runs_dir, owner, reqid + ".json"), encoding="ascii") as file:
            return json.load(file)


class Reply:
    """One HTTP answer as a client sees it."""

    def __init__(self, status, headers, body):
        self.status = status
        self.headers = headers
        self.body = body

    @property
    def json(self):
        return json.loads(self.body)


def send_http(sock, method, path, body=None, **headers):
    """Send a request with a JSON body (or bytes as they are); `_` in a header's name is a hyphen."""
    data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    lines = ["%s %s HTTP/1.1" % (method, path)]
    found = {"Host": "localhost"}
    if body is not None or method == "POST":
        found.update({"Content-Type": "application/json", "Content-Length": len(data)})
    found.update({name.replace("_", "-"): value for name, value in headers.items()})
    lines += ["%s: %s" % pair for pair in found.items() if pair[1] is not None]
    sock.sendall("\r\n".join([*lines, "", ""]).encode("latin-1") + data)


class ApiServer(Program):
    """An HTTP API on a control host's files, with a configuration of its own."""

    link = "ctrl-exec-api"

    def __init__(self, control, name="api", conf="api_auth_default = allow\n"):
        super().__init__(control.root)
        self.port = free_port()
        self.conf = os.path.join(control.root, name + ".conf")
        self.configure(conf)
        self.config = ctrl_exec.load_config("dispatcher", self.conf, self.root)
        self.tls = None  # a client's context, where it speaks TLS
        self.process = None

    def configure(self, conf):
        with open(self.conf, "w", encoding="ascii") as file:
            file.write("dispatcher_id = control\napi_port = %d\n%s" % (self.port, conf))

    def start(self, env=None):
        self.process = self.spawn("--config", self.conf, env=env, stdin=subprocess.DEVNULL)
        wait_until(lambda: self.answers() or self.process.poll() is not None, what="the API")
        assert self.process.poll() is None, self.log()
        return self

    def answers(self):
        try:
            return self.call("GET", "/health").status == 200
        except OSError:
            return False

    def connect(self, timeout=60):
        raw = socket.create_connection(("127.0.0.1", self.port), timeout)
        return raw if self.tls is None else self.tls.wrap_socket(raw)

    def call(self, method, path, body=None, **headers):
        with self.connect() as sock:
            send_http(sock, method, path, body, Connection="close", **headers)
            return Reply(*read_reply(sock))

    def run_script(self, hosts, script, *args, **fields):
        return self.call("POST", "/run", {"hosts": list(hosts), "script": script, "args": list(args), **fields})

    def stop(self, number=signal.SIGTERM):
        """End the server; returns its exit status."""
        if self.process is None or self.process.poll() is not None:
            return None if self.process is None else self.process.returncode
        self.process.send_signal(number)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.stop()


def parse_events(data):
    """Server-sent events as (id, event, object); comments and `retry` are left out."""
    events = []
    for block in data.decode("utf-8").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n") if line and not line.startswith(":"))
        if "data" in fields:
            events.append((fields["id"], fields["event"], json.loads(fields["data"])))
    return events


STANDARD_SCRIPTS = {
    "hello": "echo hello\n",
    "args": 'for a in "$@"; do printf "%s\\0" "$a"; done\n',
    "context": "cat\n",
    "exit": 'exit "$1"\n',
    "sleep": 'exec sleep "$1"\n',
    "env": "env\n",
}


class Deployment:
    """A control host and agents that are paired with it and, unless told otherwise, running."""

    def __init__(self, top, names, start=True):
        os.makedirs(str(top), exist_ok=True)
        os.chmod(str(top), 0o755)
        self.top = str(top)
        self.control = Control(os.path.join(self.top, "control"))
        self.hosts = {}
        self._start = start
        for name in names:
            self.add(name)

    def add(self, name, conf="rate_limit_disable = yes\n"):
        host = self.hosts[name] = Host(os.path.join(self.top, name), name, conf)
        for script, body in STANDARD_SCRIPTS.items():
            host.script(script, body)
        self.control.register(host)
        return host

    def __getitem__(self, name):
        return self.hosts[name]

    def __enter__(self):
        if self._start:
            for host in self.hosts.values():
                host.start()
        return self

    def __exit__(self, *_):
        for host in self.hosts.values():
            host.stop()


# --- raw peers ------------------------------------------------------------------------------------------


def wait_for_port(port):
    def try_connect():
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return True
        except OSError:
            return False

    wait_until(try_connect, what="port %d" % port)


def client_context(cert=None, key=None, ca=None):
    """A TLS client that shows `cert` and, given a CA, verifies against it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED if ca else ssl.CERT_NONE
    if ca:
        context.load_verify_locations(ca)
    if cert:
        context.load_cert_chain(cert, key)
    return context


def tls_connect(port, context, timeout=60):
    raw = socket.create_connection(("127.0.0.1", port), timeout)
    return context.wrap_socket(raw)


def read_reply(sock):
    """Read one HTTP answer to its end: (status, headers, body)."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = sock.recv(65536)
        if not piece:
            break
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    if not head:
        return 0, {}, b""
    lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
    if headers.get("transfer-encoding") == "chunked":
        while not body.endswith(b"0\r\n\r\n"):
            piece = sock.recv(65536)
            if not piece:
                break
            body += piece
        joined, rest = b"", body
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            joined, rest = joined + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
        body = joined
    else:
        length = int(headers.get("content-length", 10**9))
        while len(body) < length:
            piece = sock.recv(65536)
            if not piece:
                break
            body += piece
    return int(re.match(r"HTTP/1\.[01] ([0-9]{3})", lines[0])[1]), headers, body


def send_raw(port, context, data):
    """Send bytes over TLS and read one answer; (0, {}, b"") when the peer only closed."""
    with tls_connect(port, context) as sock:
        try:
            sock.sendall(data)
            return read_reply(sock)
        except (OSError, ssl.SSLError):
            return 0, {}, b""


def post(port, context, path, body, method="POST"):
    """One request with a JSON body: (status, object)."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = "%s %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % (method, path, len(data))
    status, _, reply = send_raw(port, context, head.encode() + data)
    return status, json.loads(reply) if reply else None


def dispatcher_context(control):
    """What the real dispatcher shows."""
    return client_context(control.config.cert, control.config.key, control.config.ca)
