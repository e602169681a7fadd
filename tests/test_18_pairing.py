"""Pairing: the real two processes of each side, and what somebody between them can and cannot do."""

import base64
import contextlib
import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import threading
import time
import types

import ctrl_exec
import peers
import pytest
import support

OPENSSL = ctrl_exec.OpenSSL()


class Listener(threading.Thread):
    """Collects what a process prints, so that a full pipe never holds it up."""

    def __init__(self, stream):
        super().__init__(daemon=True)
        self.stream = stream
        self.data = b""
        self.start()

    def run(self):
        while True:
            piece = os.read(self.stream.fileno(), 4096)
            if not piece:
                return
            self.data += piece

    @property
    def text(self):
        return self.data.decode("utf-8", "replace")

    def wait_for(self, pattern, start=0):
        return support.wait_until(lambda: re.search(pattern, self.text[start:]), what=pattern)


class Desk:
    """A control host with pairing-mode open."""

    def __init__(self, control, *options):
        self.control = control
        self.config = control.config
        self.process = control.open_pairing(*options)
        self.port = self.process.port
        self.config = ctrl_exec.load_config("dispatcher", "", control.root)
        self.screen = Listener(self.process.stdout)
        self.screen.wait_for("Ctrl-C to stop")

    def type(self, line):
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()

    def waiting(self):
        return ctrl_exec.load_pairing_requests(self.config)[0]

    def request(self, hostname):
        """The request of that name, once it is in the queue."""
        return support.wait_until(
            lambda: [request for request in self.waiting() if request.hostname == hostname], what=hostname
        )[0]

    def code(self, request):
        return ctrl_exec.request_code(ctrl_exec.build_terms(self.config, OPENSSL, ""), request)

    def approve(self, hostname, **approval):
        request = self.request(hostname)
        ctrl_exec.approve_pairing(self.config, OPENSSL, request, ctrl_exec.Approval(**approval))
        return request

    def is_closed(self):
        """Whether the port is closed; its process ends a little later than the one that we started."""
        try:
            socket.create_connection(("127.0.0.1", self.port), 1).close()
        except OSError:
            return True
        return False

    def close(self):
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
        self.process.stdin.close()
        self.screen.join(60)
        self.process.stdout.close()


class Attempt(threading.Thread):
    """An agent's half in this process: opens its commitment and waits in a thread."""

    def __init__(self, host, port, seconds=60, **wish):
        super().__init__(daemon=True)
        self.host = host
        words = {"hostname": host.name, "ip": "", "lookup_by": "", "key_type": "ec", "token": ""}
        words.update(allow_legacy=False, ca_fingerprint="", replace_ca=False)
        words.update(wish)
        wished = ctrl_exec.PairingWish("127.0.0.1", port, **words)
        self.session = ctrl_exec.PairingSession(host.config, wished, OPENSSL, seconds)
        self.code = self.session.code
        self.reqid = self.session.reqid
        self._decision = None
        self.error = None
        self.start()

    def run(self):
        try:
            self._decision = self.session.wait()
        except Exception as error:
            self.error = error

    def end(self):
        self.join(60)
        assert not self.is_alive()
        return self.error

    def store(self):
        """Wait for the decision and store it; raises what either raises."""
        if self.end() is not None:
            raise self.error
        return self.session.store(self._decision)

    def leave(self):
        """Go away without a word."""
        with contextlib.suppress(OSError):
            self.session._connection._tls.shutdown(socket.SHUT_RDWR)
        self.join(60)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return support.Control(tmp_path_factory.mktemp("template") / "control")


@pytest.fixture(scope="module")
def shared(template):
    """One pairing-mode for all tests that leave its queue as they found it."""
    desk = Desk(
        copy_control(
            template, os.path.dirname(template.root) + "/shared", "pairing_rate_limit_disable = yes\n"
        )
    )
    yield desk
    desk.close()


@pytest.fixture
def new_desk(template, tmp_path):
    """A function that opens a pairing-mode of one's own: new_desk(conf, *options)."""
    made = []

    def make(conf="", *options):
        control = copy_control(template, str(tmp_path / ("control%d" % len(made))), conf)
        made.append(Desk(control, *options))
        return made[-1]

    yield make
    for desk in made:
        desk.close()


@pytest.fixture(scope="module")
def impostor(tmp_path_factory):
    """A self-signed server certificate and a CA that belong to nobody: (cert, key, ca)."""
    top = str(tmp_path_factory.mktemp("impostor"))
    ca, key = os.path.join(top, "ca.crt"), os.path.join(top, "server.key")
    ctrl_exec.new_ca(OPENSSL, ca, "ec", "impostor")
    ctrl_exec.new_key_file(OPENSSL, key, "ec")
    cert = os.path.join(top, "server.crt")
    with open(cert, "w", encoding="ascii") as file:
        file.write(OPENSSL.sign_ca(key, "impostor", 1))
    return cert, key, ca


def copy_control(template, root, conf=""):
    """A control host with the same CA and dispatcher certificate, and nothing else."""
    etc = ctrl_exec.under_root(root, ctrl_exec.ETC)
    shutil.copytree(template.file(ctrl_exec.ETC), etc)
    return support.Control(root, conf, set_up=False)


def new_host(tmp_path, name):
    return support.Host(tmp_path / ("host-" + name[:40]), name)


def stored(host):
    """Which of the files that pairing makes are there, besides the key."""
    paths = (host.config.cert, host.config.ca, host.config.trusted_dispatchers_path)
    return [os.path.basename(path) for path in paths if os.path.exists(path)]


def text_of(path):
    with open(path, encoding="utf-8") as file:
        return file.read()


def mode_of(path):
    return stat.S_IMODE(os.stat(path).st_mode)


def start_request(host, port, *words, env=None, tmp=None):
    """`cea request-pairing` as a process; its standard error goes to `.said`, a file's path."""
    said = os.path.join(host.root, "said-%d" % time.monotonic_ns())
    with open(said, "wb") as file:
        process = host.spawn(
            "request-pairing", "--dispatcher", "127.0.0.1:%d" % port, "--name", host.name, *words,
            env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=file,
        )  # fmt: skip
    process.said = said
    return process


def shown_code(process):
    hit = support.wait_until(
        lambda: re.search(r"pairing code: (\d{3}) (\d{3})\n", text_of(process.said)), what="code"
    )
    return hit[1] + hit[2]


# --- raw peers ------------------------------------------------------------------------------------------


def read_http_request(sock):
    """One request: (path, object), or None when the peer has gone."""
    data = b""
    try:
        while b"\r\n\r\n" not in data:
            piece = sock.recv(65536)
            if not piece:
                return None
            data += piece
        head, _, body = data.partition(b"\r\n\r\n")
        length = int(re.search(rb"(?i)content-length: (\d+)", head)[1])
        while len(body) < length:
            body += sock.recv(65536)
    except (OSError, ssl.SSLError):
        return None
    return head.split()[1].decode("ascii"), json.loads(body)


def write_http_answer(sock, value, status=200):
    data = json.dumps(value).encode()
    sock.sendall(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%s" % (status, len(data), data))


def http_post(path, value):
    data = json.dumps(value).encode()
    return b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (path.encode(), len(data), data)


class FakeServer:
    """A TLS server of the test's own; `talk(sock)` speaks on each connection."""

    def __init__(self, impostor, talk):
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(impostor[0], impostor[1])
        self._talk = talk
        self._open = []
        self._listener = peers.Listener(self._serve)
        self.port = self._listener.port

    def _serve(self, raw):
        try:
            with self._context.wrap_socket(raw, server_side=True) as sock:
                self._open.append(sock)
                self._talk(sock)
        except (OSError, ssl.SSLError):
            pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._listener.close()
        for sock in self._open:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


class Middleman(FakeServer):
    """Relays between an agent and a dispatcher, and changes what it is told to."""

    def __init__(self, impostor, port, request=None, answer=None):
        self._target = port
        self._request = request or (lambda path, body: body)
        self._answer = answer or (lambda path, body: body)
        self.seen = []
        super().__init__(impostor, self._relay)

    def _relay(self, sock):
        with support.tls_connect(self._target, support.client_context(), 60) as onward:
            self._open.append(onward)
            while True:
                got = read_http_request(sock)
                if got is None:
                    return
                path, body = got
                onward.sendall(http_post(path, self._request(path, body)))
                status, _, reply = support.read_reply(onward)
                answer = json.loads(reply) if reply else {}
                self.seen.append((path, body, answer))
                write_http_answer(sock, self._answer(path, dict(answer)), status or 502)


def raw_offer(tmp_path, hostname, csr=None, **more):
    """An offer as an agent would make it, and the nonce that opens its commitment."""
    if csr is None:
        key = str(tmp_path / ("raw-%s.key" % ctrl_exec.new_id()))
        ctrl_exec.new_key_file(OPENSSL, key, "ec")
        csr = OPENSSL.new_request(key, "raw")
    fields = dict(
        hostname=hostname, csr=csr, nonce=ctrl_exec.new_id(32), port=7443, ip="", lookup_by="", version="1"
    )
    fields.update(more)
    nonce = ctrl_exec.new_id(32)
    commit = ctrl_exec.pairing_commitment(nonce, ctrl_exec.PairingOffer(**fields))
    return dict(fields, commit=commit), nonce


def exchange(sock, path, body):
    sock.sendall(http_post(path, body))
    status, _, reply = support.read_reply(sock)
    return status, json.loads(reply) if reply else None


def assert_port_serves(desk):
    status, answer = support.post(desk.port, support.client_context(), "/pair", {"hostname": "x"})
    assert status == 400 and answer["status"] == "denied"
    assert desk.process.poll() is None


# --- the operator at the prompt -------------------------------------------------------------------------


def test_one_request_is_skipped_listed_and_approved_at_the_prompt(new_desk, tmp_path):
    desk = new_desk()
    host = new_host(tmp_path, "web-1")
    desk.type("list")
    desk.screen.wait_for("nothing waits")
    agent = start_request(host, desk.port)
    code = shown_code(agent)
    desk.screen.wait_for(r"1  \S+  web-1  from 127\.0\.0\.1  code %s %s" % (code[:3], code[3:]))
    desk.screen.wait_for(r"\[a\]pprove, \[d\]eny, \[s\]kip")
    for word in ("a7", "a0", "d2"):
        desk.type(word)
        desk.screen.wait_for("%s does not wait" % word[1:])
    for word in ("what?", "\x1b[A", "approve it"):
        start = len(desk.screen.text)
        desk.type(word)
        desk.screen.wait_for("a, d, s .with a number", start)
    start = len(desk.screen.text)
    desk.type("s")
    desk.type("list")
    desk.screen.wait_for(r"\[a\]pprove", start)
    status, shown = desk.control.json("list-requests")
    assert status == 0
    (request,) = shown["requests"]
    assert (request["hostname"], request["code"], request["peer"]) == ("web-1", code, "127.0.0.1")
    table = desk.control.run("list-requests").out.splitlines()
    assert table[2].startswith(request["id"] + "  web-1 ") and code[:3] + " " + code[3:] in table[2]
    assert agent.poll() is None and stored(host) == []
    desk.type("a")
    desk.screen.wait_for("approved: web-1 at 127.0.0.1 port %d" % host.port)
    assert agent.wait(60) == 0, text_of(agent.said)
    assert desk.control.json("list-requests")[1]["requests"] == []
    check_stored_files(desk, host)
    done = host.run("pairing-status")
    assert done.returncode == 0 and "stored" in done.out and "control" in done.out
    # the agent waits some seconds only to be told that this is noted
    support.wait_until(lambda: desk.control.events("pair-complete"), what="the note that it has stored it")
    desk.type("quit")
    assert desk.process.wait(60) == 0
    support.wait_until(desk.is_closed, what="the end of the network process")
    for action in (
        "pairing-mode-start",
        "pair-request",
        "pair-approve",
        "pair-complete",
        "pairing-mode-stop",
    ):
        assert desk.control.events(action), action
    assert host.events("pair-complete")


def check_stored_files(desk, host):
    assert mode_of(host.config.key) == 0o600
    assert mode_of(host.config.cert) == 0o644
    assert mode_of(host.config.ca) == 0o644
    assert mode_of(host.config.trusted_dispatchers_path) == 0o644
    assert text_of(host.config.ca) == text_of(desk.config.ca)
    assert text_of(host.config.trusted_dispatchers_path) == "%s control\n" % desk.control.serial()
    info = ctrl_exec.read_certificate(host.config.cert)
    entry = ctrl_exec.get_agent(desk.config.registry_dir, host.name)
    assert (entry.serial, entry.cert_name, entry.port) == (info.serial, host.name, host.port)
    assert entry.expiry == ctrl_exec.iso_time(info.not_after)
    assert mode_of(os.path.join(desk.config.registry_dir, host.name + ".json")) == 0o640
    identity = ctrl_exec.agent_identity(host.config)
    assert ctrl_exec.check_identity(OPENSSL, identity, "sslserver").names == (host.name,)


def test_of_two_requests_each_gets_its_own_answer(new_desk, tmp_path):
    desk = new_desk()
    one, two = new_host(tmp_path, "one"), new_host(tmp_path, "two")
    first = Attempt(one, desk.port)
    desk.request("one")
    second = Attempt(two, desk.port)
    desk.request("two")
    desk.screen.wait_for(r"a1 ... d2")
    desk.type("a")
    desk.screen.wait_for("which\\?")
    assert len(desk.waiting()) == 2
    desk.type("d2")
    desk.screen.wait_for("denied: two")
    assert isinstance(second.end(), ctrl_exec.PairingDenied) and stored(two) == []
    support.wait_until(lambda: len(desk.waiting()) == 1)
    desk.type("a1")
    desk.screen.wait_for("approved: one")
    assert first.store().names == ("one",)
    assert ctrl_exec.list_agent_names(desk.config.registry_dir) == ["one"]
    assert any("NAME=two" in line for line in desk.control.events("pair-deny"))


def test_the_prompt_keeps_the_port_open_when_its_input_ends(new_desk, tmp_path):
    desk = new_desk()
    desk.process.stdin.close()
    attempt = Attempt(new_host(tmp_path, "late"), desk.port)
    desk.approve("late")
    assert attempt.store().names == ("late",)
    assert desk.process.poll() is None


def test_list_shows_also_a_single_request_with_its_code(new_desk, tmp_path):
    desk = new_desk()
    attempt = Attempt(new_host(tmp_path, "single"), desk.port)
    desk.screen.wait_for(r"\[a\]pprove")
    start = len(desk.screen.text)
    desk.type("list")
    desk.screen.wait_for(r"\[a\]pprove", start)
    shown = desk.screen.text[start:]
    attempt.leave()
    assert "single" in shown and attempt.code[:3] + " " + attempt.code[3:] in shown


def test_quitting_denies_whoever_waits(new_desk, tmp_path):
    desk = new_desk()
    host = new_host(tmp_path, "left")
    attempt = Attempt(host, desk.port)
    desk.request("left")
    desk.type("quit")
    assert isinstance(attempt.end(), ctrl_exec.PairingDenied)
    assert desk.process.wait(60) == 0 and stored(host) == []
    assert [name for name in os.listdir(desk.config.pairing_dir) if name.endswith(".json")] == []


def test_a_spoiled_file_in_the_queue_is_named_and_does_not_end_pairing_mode(new_desk, tmp_path):
    desk = new_desk()
    desk.control.put(ctrl_exec.VAR + "/pairing/0badc0de.json", "{")
    attempt = Attempt(new_host(tmp_path, "fine"), desk.port)
    support.wait_until(lambda: desk.control.run("list-requests").out.count("fine"), what="the request")
    assert "0badc0de.json" in desk.control.run("list-requests").err
    desk.screen.wait_for(r"1  \S+  fine ")
    desk.type("a")
    assert attempt.store().names == ("fine",)
    assert desk.process.poll() is None


# --- the operator in another terminal -------------------------------------------------------------------


def test_approve_from_elsewhere_names_and_places_the_agent(shared, tmp_path):
    host = new_host(tmp_path, "asked-for")
    attempt = Attempt(host, shared.port, ip="198.51.100.7", lookup_by="ip")
    request = shared.request("asked-for")
    assert (request.ip, request.port, request.peer) == ("198.51.100.7", host.port, "127.0.0.1")
    words = ("--name", "given", "--ip", "192.0.2.9", "--agent-port", "7999", "--lookup-by", "hostname")
    done = shared.control.run("approve", attempt.reqid, *words)
    assert done.returncode == 0, done.err
    assert "given" in done.out and attempt.code[:3] + " " + attempt.code[3:] in done.out
    assert attempt.store().names == ("given",)
    entry = ctrl_exec.get_agent(shared.config.registry_dir, "given")
    assert (entry.ip, entry.port, entry.lookup_by, entry.cert_name) == (
        "192.0.2.9",
        7999,
        "hostname",
        "given",
    )
    assert entry.reqid == attempt.reqid
    assert ctrl_exec.find_agent(shared.config.registry_dir, "asked-for") is None


@pytest.mark.parametrize(
    "words",
    [("--name", "../x"), ("--ip", "not-an-ip"), ("--agent-port", "0x1"), ("--lookup-by", "x")],
    ids=str,
)
def test_a_bad_value_at_approval_leaves_the_request_waiting(shared, tmp_path, words):
    name = "careful" + words[0]
    attempt = Attempt(new_host(tmp_path, name), shared.port)
    shared.request(name)
    done = shared.control.run("approve", attempt.reqid, *words)
    left = [request.reqid for request in shared.waiting()]
    attempt.leave()
    assert done.returncode == 2, done.err
    assert attempt.reqid in left
    assert ctrl_exec.find_agent(shared.config.registry_dir, name) is None


def test_deny_from_elsewhere_is_exit_status_3(shared, tmp_path):
    host = new_host(tmp_path, "unwanted")
    agent = start_request(host, shared.port)
    request = shared.request("unwanted")
    done = shared.control.run("deny", request.reqid)
    assert done.returncode == 0 and "unwanted" in done.out
    assert agent.wait(60) == 3
    assert stored(host) == [] and "denied" in text_of(agent.said)
    done = host.run("pairing-status", request.reqid)
    assert done.returncode == 1 and "denied" in done.out
    assert host.run("pairing-status").returncode == 1


def test_an_id_that_does_not_wait_is_an_error(shared):
    for verb in ("approve", "deny"):
        for reqid in ("0123456789abcdef", "../agents/x", "\x1b[2J"):
            done = shared.control.run(verb, reqid)
            assert done.returncode == 1 and "\x1b" not in done.err


def test_a_decision_is_made_once(shared, tmp_path):
    attempt = Attempt(new_host(tmp_path, "decided"), shared.port)
    request = shared.approve("decided")
    assert attempt.store().names == ("decided",)
    with pytest.raises(ctrl_exec.NotFound):
        ctrl_exec.approve_pairing(shared.config, OPENSSL, request, ctrl_exec.Approval(name="again"))
    with pytest.raises(ctrl_exec.NotFound):
        ctrl_exec.deny_pairing(shared.config, request, "too late")
    path = os.path.join(shared.config.pairing_dir, request.reqid + ".json")
    support.wait_until(lambda: not os.path.exists(path), what="the end of its file")  # after the answer


# The time that an agent is to wait in vain counts from its start: long enough that its request gets there.
WAITS = "10"


def test_a_time_out_is_exit_status_2(shared, tmp_path):
    host = new_host(tmp_path, "patient")
    agent = start_request(host, shared.port, "--timeout", WAITS)
    assert agent.wait(60) == 2
    assert stored(host) == []
    done = host.run("pairing-status", "--json")
    assert done.returncode == 1
    body = json.loads(done.out)
    assert body["paired"] is False and body["requests"][0]["status"] == "timed out"
    support.wait_until(lambda: not [r for r in shared.waiting() if r.hostname == "patient"])


@pytest.mark.parametrize("seconds", ["0", "601", "x"])
def test_a_waiting_time_out_of_range_is_a_usage_error(tmp_path, seconds):
    host = new_host(tmp_path, "x")
    done = host.run("request-pairing", "--dispatcher", "127.0.0.1:1", "--timeout", seconds)
    assert done.returncode == 2 and not os.path.exists(host.config.key)


# --- in the background ----------------------------------------------------------------------------------


def test_background_in_a_command_substitution_returns_and_holds_nothing(shared, tmp_path):
    host = new_host(tmp_path, "behind")
    line = 'exec 9>"$0"; id=$("$@"); echo "got $id"'
    words = host.argv(
        "request-pairing", "--dispatcher", "127.0.0.1:%d" % shared.port, "--name", "behind", "--background",
        "--timeout", "60",
    )  # fmt: skip
    done = subprocess.run(
        ["/bin/sh", "-c", line, str(tmp_path / "nine"), *words],
        capture_output=True, stdin=subprocess.DEVNULL, env=host.environment(), timeout=60,
    )  # fmt: skip
    reqid = re.fullmatch(r"got ([0-9a-f]+)\n", done.stdout.decode())[1]
    code = re.search(r"pairing code: (\d{3}) (\d{3})", done.stderr.decode())
    request = shared.request("behind")
    assert (request.reqid, shared.code(request)) == (reqid, code[1] + code[2])
    answer = host.run("pairing-status", reqid, "--json")
    assert answer.returncode == 2
    state = json.loads(answer.out)["requests"][0]
    assert state["status"] == "waiting" and state["pid"] > 0
    held = [
        os.readlink("/proc/%d/fd/%s" % (state["pid"], name))
        for name in os.listdir("/proc/%d/fd" % state["pid"])
    ]
    assert held.count("/dev/null") >= 3
    assert str(tmp_path / "nine") not in held
    assert [name for name in held if name.startswith("pipe:")] == []
    assert os.getsid(state["pid"]) == state["pid"]
    assert shared.control.run("approve", reqid).returncode == 0
    support.wait_until(lambda: host.run("pairing-status", reqid).returncode == 0, what="stored")
    assert len(stored(host)) == 3
    support.wait_until(
        lambda: not os.path.exists("/proc/%d" % state["pid"]), what="the end of the waiting process"
    )


@pytest.mark.parametrize("end", ["denied", "timed out"])
def test_a_background_request_that_fails_says_how(shared, tmp_path, end):
    host = new_host(tmp_path, "behind-" + end.split()[0])
    words = ("--name", host.name, "--background", "--timeout", WAITS if end == "timed out" else "60")
    done = host.run("request-pairing", "--dispatcher", "127.0.0.1:%d" % shared.port, *words)
    assert done.returncode == 0, done.err
    reqid = done.out.strip()
    if end == "denied":
        shared.request(host.name)
        assert shared.control.run("deny", reqid).returncode == 0
    support.wait_until(lambda: host.run("pairing-status", reqid).returncode == 1, what=end)
    done = host.run("pairing-status", reqid)
    assert "%s: %s" % ("127.0.0.1", end) in done.out and stored(host) == []


def test_pairing_status_of_a_request_never_made_is_an_error(tmp_path):
    host = new_host(tmp_path, "x")
    done = host.run("pairing-status", "0123")
    assert done.returncode == 1 and "0123" in done.err
    done = host.run("pairing-status")
    assert done.returncode == 1 and "not paired" in done.out


# --- pairing again, other dispatchers, other CAs --------------------------------------------------------


def test_a_live_name_is_given_away_only_with_replace_and_its_old_serial_is_revoked(shared, tmp_path):
    first = Attempt(new_host(tmp_path, "twice"), shared.port)
    shared.approve("twice")
    old = first.store().serial
    attempt = Attempt(support.Host(tmp_path / "other", "TWICE"), shared.port)
    shared.request("TWICE")
    done = shared.control.run("approve", attempt.reqid)
    assert done.returncode == 1 and "twice is paired already" in done.err
    done = shared.control.run("approve", attempt.reqid, "--name", "twice")
    assert done.returncode == 1
    assert old not in ctrl_exec.load_revoked(shared.config.revoked_serials)
    done = shared.control.run("approve", attempt.reqid, "--name", "twice", "--replace")
    assert done.returncode == 0, done.err
    new = attempt.store().serial
    assert new != old
    assert ctrl_exec.get_agent(shared.config.registry_dir, "twice").serial == new
    revoked = ctrl_exec.load_revoked(shared.config.revoked_serials)
    assert old in revoked and new not in revoked


def test_a_second_dispatcher_of_the_same_ca_is_added_to_the_map(shared, template, tmp_path):
    host = new_host(tmp_path, "served-by-two")
    attempt = Attempt(host, shared.port)
    shared.approve("served-by-two")
    attempt.store()
    second = copy_control(template, str(tmp_path / "second"))
    for name in ("dispatcher.key", "dispatcher.crt"):
        os.unlink(second.file(ctrl_exec.ETC + "/" + name))
    second.put(ctrl_exec.ETC + "/ctrl-exec.conf", "dispatcher_id = second\n", 0o640)
    second.config = ctrl_exec.load_config("dispatcher", "", second.root)
    assert second.run("setup-ctrl-exec").returncode == 0
    desk = Desk(second)
    try:
        attempt = Attempt(host, desk.port)
        desk.approve("served-by-two")
        attempt.store()
    finally:
        desk.close()
    trusted = ctrl_exec.load_trust_map(host.config.trusted_dispatchers_path)
    assert trusted == {shared.control.serial(): "control", second.serial(): "second"}


def test_another_ca_is_refused_unless_it_shall_replace_the_old_one(shared, impostor, tmp_path):
    host = new_host(tmp_path, "moved")
    with open(impostor[2], "rb") as file:
        ctrl_exec.make_directory(os.path.dirname(host.config.ca), 0o755)
        ctrl_exec.write_atomic(host.config.ca, file.read(), mode=0o644)
    before = text_of(host.config.ca)
    agent = start_request(host, shared.port)
    assert agent.wait(60) == 3
    assert "--replace-ca" in text_of(agent.said)
    assert text_of(host.config.ca) == before and not os.path.exists(host.config.cert)
    attempt = Attempt(host, shared.port, replace_ca=True)
    shared.approve("moved")
    attempt.store()
    assert text_of(host.config.ca) == text_of(shared.config.ca)


@pytest.mark.parametrize("right", [True, False])
def test_a_pinned_ca_is_demanded(shared, tmp_path, right):
    host = new_host(tmp_path, "pinned")
    pin = ctrl_exec.fingerprint(ctrl_exec.read_certificate_der(shared.config.ca))
    pin = ":".join(pin[i : i + 2] for i in range(0, 64, 2)).upper() if right else "0" * 64
    if not right:
        with pytest.raises(ctrl_exec.PairingDenied, match="fingerprint"):
            Attempt(host, shared.port, ca_fingerprint=pin)
        return
    attempt = Attempt(host, shared.port, ca_fingerprint=pin)
    shared.approve("pinned", replace=True)
    assert attempt.store().names == ("pinned",)


def test_a_running_agent_takes_its_new_certificate_at_once(fresh):
    made = fresh("solo")
    host = made["solo"]
    old = ctrl_exec.read_certificate(host.config.cert).serial
    desk = Desk(made.control)
    try:
        agent = start_request(host, desk.port)
        desk.approve("solo", ip="127.0.0.1", replace=True)
        assert agent.wait(60) == 0, text_of(agent.said)
        assert "process %d" % host.process.pid in text_of(agent.said)
    finally:
        desk.close()
    assert ctrl_exec.read_certificate(host.config.cert).serial != old
    support.wait_until(lambda: host.events("reload"), what="the reload")
    support.wait_until(
        lambda: made.control.json("ping", "solo")[0] == 0, what="an answer with the new certificate"
    )


@pytest.mark.parametrize("which", ["etc", "var"])
def test_a_place_that_cannot_be_written_is_found_before_anything_is_asked(shared, tmp_path, which):
    host = new_host(tmp_path, "stuck")
    if which == "etc":
        conf = "port = %d\nkey = %s/k/agent.key\ncert = %s/k/agent.crt\n" % ((host.port,) + (host.root,) * 2)
        host.put(ctrl_exec.AGENT_ETC + "/agent.conf", conf)
        host.put("/k", "a file in the way")
    else:
        host.put(ctrl_exec.AGENT_VAR, "a file in the way")
    done = host.run("request-pairing", "--dispatcher", "127.0.0.1:%d" % shared.port, "--name", "stuck")
    assert done.returncode == 1
    assert (host.file("/k") if which == "etc" else host.file(ctrl_exec.AGENT_VAR)) in done.err
    assert not [line for line in shared.control.events("pair-request") if "NAME=stuck" in line]


# --- bounds ---------------------------------------------------------------------------------------------


def test_the_queue_is_bounded_and_has_room_again_when_an_agent_goes_away(new_desk, tmp_path):
    desk = new_desk("pairing_max_queue = 2\n")
    attempts = [Attempt(new_host(tmp_path, "q%d" % number), desk.port) for number in (1, 2)]
    for attempt in attempts:
        desk.request(attempt.host.name)
    third = Attempt(new_host(tmp_path, "q3"), desk.port)
    assert isinstance(third.end(), ctrl_exec.PairingDenied) and "full" in third.error.message
    assert sorted(request.hostname for request in desk.waiting()) == ["q1", "q2"]
    assert any("NAME=q3" in line for line in desk.control.events("pair-reject"))
    attempts[0].leave()
    support.wait_until(lambda: [request.hostname for request in desk.waiting()] == ["q2"], what="room")
    fourth = Attempt(new_host(tmp_path, "q4"), desk.port)
    desk.approve("q4")
    assert fourth.store().names == ("q4",)


def test_a_request_expires(new_desk, tmp_path):
    desk = new_desk("pairing_timeout = 1\n")
    host = new_host(tmp_path, "slow")
    attempt = Attempt(host, desk.port)
    assert isinstance(attempt.end(), (ctrl_exec.PairingDenied, ctrl_exec.PairingTimeout))
    assert stored(host) == [] and desk.waiting() == []
    assert desk.control.run("approve", attempt.reqid).returncode == 1
    assert any(attempt.reqid in line for line in desk.control.events("pair-timeout"))


def test_a_killed_pairing_mode_leaves_nothing_to_approve(new_desk, tmp_path):
    desk = new_desk()
    host = new_host(tmp_path, "orphan")
    attempt = Attempt(host, desk.port)
    desk.request("orphan")
    desk.process.kill()
    assert attempt.end() is not None and stored(host) == []
    assert desk.control.json("list-requests")[1]["requests"] == []
    assert desk.control.run("approve", attempt.reqid).returncode == 1
    assert ctrl_exec.list_agent_names(desk.config.registry_dir) == []
    support.wait_until(desk.is_closed, what="the end of the network process")


def test_a_request_whose_time_is_over_is_its_desks_to_end(new_desk, tmp_path, monkeypatch):
    desk = new_desk()
    attempt = Attempt(new_host(tmp_path, "late"), desk.port)
    request = desk.request("late")
    path = os.path.join(desk.config.pairing_dir, request.reqid + ".json")
    monkeypatch.setattr(ctrl_exec, "now", lambda: time.time() + 3600)
    assert ctrl_exec.load_pairing_requests(desk.config) == ([], [])
    assert os.path.exists(path)  # removed, it would not be said to have timed out
    desk.process.kill()
    desk.process.wait()
    assert ctrl_exec.load_pairing_requests(desk.config) == ([], [])
    left = os.listdir(desk.config.pairing_dir)
    assert not os.path.exists(path) and [name for name in left if name.endswith(".desk")] == []
    assert attempt.end() is not None


def test_the_desk_is_given_a_request_only_when_all_of_it_is_there(monkeypatch):
    """It reads what it is given at once, and all that it does waits for that."""
    given = []

    def look(_, words, descriptors):
        os.set_blocking(descriptors[0], False)
        given.append((words, os.read(descriptors[0], 65536)))
        raise ConnectionError("enough")

    monkeypatch.setattr(socket, "send_fds", look)
    front = ctrl_exec.PairingFront(None, None, None, None)
    with pytest.raises(ConnectionError, match="enough"):
        front._wait_for_decision(None, types.SimpleNamespace(_asdict=lambda: {"reqid": "r"}))
    body = ctrl_exec.encode_json({"reqid": "r"})
    assert given == [([b"pair"], len(body).to_bytes(4, "big") + body)]


def test_a_request_that_ends_while_its_state_is_looked_at_has_not_timed_out(tmp_path, monkeypatch):
    host = new_host(tmp_path, "shown")
    directory = host.file(ctrl_exec.AGENT_VAR + "/pairing")
    os.makedirs(directory)
    gone = subprocess.Popen(["true"])
    gone.wait()
    state = ctrl_exec.PairingState("feed", "control", "123456", "waiting", pid=gone.pid)
    for name in ("feed.json", ".tmp-beef.json"):
        ctrl_exec.write_atomic(
            os.path.join(directory, name), ctrl_exec.encode_state(state._asdict()), mode=0o600
        )
    os.symlink("nowhere", os.path.join(directory, "swept.json"))
    assert [one.status for one in ctrl_exec.load_pairing_states(host.config)] == ["timed out"]
    read = [state._asdict(), state._replace(status="stored")._asdict()]
    monkeypatch.setattr(ctrl_exec, "read_json_file", lambda path: read.pop(0))
    assert [one.status for one in ctrl_exec.load_pairing_states(host.config)] == ["stored"]


def test_the_default_rate_limit_blocks_an_address_after_ten_connections(new_desk):
    desk = new_desk()
    context = support.client_context()

    def is_served():
        try:
            return support.post(desk.port, context, "/pair", {"hostname": "x"})[0] == 400
        except (OSError, ssl.SSLError):
            return False

    served = 0
    while is_served():
        served += 1
        assert served <= 10
    assert served >= 8  # opening the desk looked at its port
    assert len(desk.control.events("rate-block")) == 1
    assert not is_served()


def test_ten_agents_at_once_are_ten_requests(new_desk, tmp_path):
    desk = new_desk("pairing_rate_limit_disable = yes\n")
    offers = [raw_offer(tmp_path, "p%d" % number) for number in range(10)]
    sockets = []
    try:
        for offer, _ in offers:  # each at once: a connection that does not ask for ten seconds is closed
            sockets.append(support.tls_connect(desk.port, support.client_context()))
            sockets[-1].sendall(http_post("/pair", offer))
        answers = [json.loads(support.read_reply(sock)[2]) for sock in sockets]
        assert len({answer["reqid"] for answer in answers}) == 10
        assert len({answer["dispatcher_nonce"] for answer in answers}) == 10
        for sock, answer, (_, nonce) in zip(sockets, answers, offers):
            sock.sendall(http_post("/pair/reveal", {"reqid": answer["reqid"], "reveal": nonce}))
        support.wait_until(lambda: len(desk.waiting()) == 10, what="ten requests")
        assert {r.hostname for r in desk.waiting()} == {"p%d" % number for number in range(10)}
        desk.approve("p7")
        decision = json.loads(support.read_reply(sockets[7])[2])
        assert decision["status"] == "approved" and decision["nonce"] == offers[7][0]["nonce"]
        assert len(desk.waiting()) == 9
    finally:
        for sock in sockets:
            sock.close()
    support.wait_until(lambda: desk.waiting() == [], what="an empty queue")


def test_the_process_that_faces_the_network_has_no_privileges_and_no_key_of_the_ca(shared):
    assert_port_serves(shared)  # it has gone through its start

    def children():
        with open("/proc/%d/task/%d/children" % ((shared.process.pid,) * 2), encoding="ascii") as file:
            return [int(word) for word in file.read().split()]

    (front,) = support.wait_until(lambda: len(children()) == 1 and children(), what="the front alone")
    with open("/proc/%d/status" % front, encoding="ascii") as file:
        uids = re.search(r"^Uid:\s+(\d+)\s+(\d+)\s+(\d+)", file.read(), re.MULTILINE).groups()
    assert len(set(uids)) == 1
    if support.IS_ROOT:
        assert uids[0] != "0"
    held = []
    for name in os.listdir("/proc/%d/fd" % front):
        with contextlib.suppress(FileNotFoundError):  # a connection that has just ended
            held.append(os.readlink("/proc/%d/fd/%s" % (front, name)))
    assert held and [name for name in held if name.endswith((".key", ".json", ".desk"))] == []


# --- tokens ---------------------------------------------------------------------------------------------

TOKEN_REFUSAL = "the pairing token is not accepted"


def new_token(desk, ttl=3600, uses=1, name=""):
    return ctrl_exec.new_token(ctrl_exec.token_directory(desk.config), ttl, uses, name)


def test_a_token_pairs_once_without_a_person(shared, tmp_path):
    status, shown = shared.control.json("pairing-token")
    assert status == 0 and (shown["uses"], shown["ttl"]) == (1, 3600)
    token = shown["token"]
    assert re.fullmatch(r"[0-9a-f]{8}\.[a-z2-7]{32}", token)
    path = os.path.join(ctrl_exec.token_directory(shared.config), token[:8] + ".json")
    assert mode_of(path) == 0o600 and mode_of(os.path.dirname(path)) == 0o700
    host = new_host(tmp_path, "by-token")
    assert Attempt(host, shared.port, token=token).store().names == ("by-token",)
    assert ctrl_exec.get_agent(shared.config.registry_dir, "by-token").ip == "127.0.0.1"
    again = Attempt(new_host(tmp_path, "by-token-2"), shared.port, token=token)
    assert TOKEN_REFUSAL in str(again.end())


def test_a_token_for_n_uses_pairs_n_hosts(shared, tmp_path):
    token = new_token(shared, uses=2)
    for number in (1, 2):
        Attempt(new_host(tmp_path, "many-%d" % number), shared.port, token=token).store()
    attempt = Attempt(new_host(tmp_path, "many-3"), shared.port, token=token)
    assert TOKEN_REFUSAL in str(attempt.end())


def test_every_unusable_token_is_refused_in_the_same_words(shared, tmp_path):
    used, expired, named = new_token(shared), new_token(shared), new_token(shared, name="db-*")
    other = new_token(shared)
    Attempt(new_host(tmp_path, "first-use"), shared.port, token=used).store()
    path = os.path.join(ctrl_exec.token_directory(shared.config), expired[:8] + ".json")
    values = ctrl_exec.read_json_file(path)
    ctrl_exec.write_atomic(path, ctrl_exec.encode_state(dict(values, expires=time.time() - 1)), mode=0o600)
    wrong = other[:9] + ("a" if other[9] != "a" else "b") + other[10:]
    reasons = set()
    for token in (used, expired, named, wrong, "00000000." + "a" * 32):
        host = new_host(tmp_path, "web-" + ctrl_exec.new_id(4))
        error = Attempt(host, shared.port, token=token).end()
        assert isinstance(error, ctrl_exec.PairingDenied) and stored(host) == []
        reasons.add(str(error).partition("denied: ")[2])
        assert ctrl_exec.find_agent(shared.config.registry_dir, host.name) is None
    assert reasons == {TOKEN_REFUSAL}
    for name, token in (("db-7", named), ("any", other)):  # a failed guess uses nothing up
        assert Attempt(new_host(tmp_path, name), shared.port, token=token).store().names == (name,)


def test_a_token_from_the_environment_is_seen_nowhere(shared, impostor, tmp_path):
    token = new_token(shared)
    host = new_host(tmp_path, "quiet")
    seen, looked = [], threading.Event()

    def after_a_look(path, body):
        looked.wait(60)
        return body

    with Middleman(impostor, shared.port, after_a_look) as relay:  # so that it does not end unseen
        process = start_request(host, relay.port, env={"CTRL_EXEC_PAIRING_TOKEN": token})
        while process.poll() is None:
            for pid in filter(str.isdigit, os.listdir("/proc")):
                with contextlib.suppress(OSError), open("/proc/%s/cmdline" % pid, "rb") as file:
                    seen.append(file.read())
            if [line for line in seen if host.path.encode() in line]:
                looked.set()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.02)
    assert process.returncode == 0, text_of(process.said)
    secret = token[9:]
    assert looked.is_set() and not [line for line in seen if secret.encode() in line]
    assert secret not in host.log() + shared.control.log() + text_of(process.said) + shared.screen.text
    assert "command line" not in text_of(process.said)


def test_a_token_as_an_option_works_with_a_warning(shared, tmp_path):
    host = new_host(tmp_path, "loud")
    process = start_request(host, shared.port, "--token", new_token(shared))
    assert process.wait(60) == 0
    assert "CTRL_EXEC_PAIRING_TOKEN" in text_of(process.said)
    bad = host.run("request-pairing", "--dispatcher", "127.0.0.1:1", "--token", "short")
    assert bad.returncode == 2 and "short" not in bad.err


def fake_dispatcher(control, change_pending=lambda body: body, change_decision=lambda body: body):
    """The dispatcher's half, written anew: approves everything, knows no token."""
    terms = ctrl_exec.build_terms(control.config, OPENSSL, "")

    def talk(sock):
        _, offer = read_http_request(sock)
        pending = {
            "status": "pending",
            "reqid": "fake1",
            "dispatcher_nonce": ctrl_exec.new_id(32),
            "ca": terms.ca,
        }
        pending.update(dispatcher_id=terms.dispatcher_id, dispatcher_serial=terms.dispatcher_serial)
        write_http_answer(sock, change_pending(pending))
        if read_http_request(sock) is None:
            return
        ca_key = ctrl_exec.ca_key_path(control.config.ca)
        cert = OPENSSL.sign(offer["csr"], offer["hostname"], "agent", 365, control.config.ca, ca_key)
        body = {"status": "approved", "cert": cert, "ca": terms.ca, "nonce": offer["nonce"]}
        body.update(dispatcher_id=terms.dispatcher_id, dispatcher_serial=terms.dispatcher_serial)
        write_http_answer(sock, change_decision(body))
        read_http_request(sock)

    return talk


def test_the_dispatcher_written_anew_is_believed_when_it_does_all_right(template, impostor, tmp_path):
    host = new_host(tmp_path, "plain")
    with FakeServer(impostor, fake_dispatcher(template)) as server:
        assert Attempt(host, server.port).store().names == ("plain",)


def test_a_dispatcher_that_does_not_know_the_token_is_not_believed(template, impostor, tmp_path):
    token = "0123abcd." + "a" * 32
    for proof in (None, "", "0" * 64):
        host = new_host(tmp_path, "sceptic-%s" % (proof or "")[:2])

        def change(body, proof=proof):
            return body if proof is None else dict(body, token_proof=proof)

        with FakeServer(impostor, fake_dispatcher(template, change_decision=change)) as server:
            error = Attempt(host, server.port, token=token).end()
        assert isinstance(error, ctrl_exec.PairingDenied) and "does not know the token" in str(error)
        assert stored(host) == []


@pytest.mark.parametrize(
    "change",
    [
        {"dispatcher_nonce": "00"},
        {"dispatcher_nonce": 7},
        {"dispatcher_nonce": "x" * 64},
        {"ca": "not a certificate"},
        {"ca": None},
        {"dispatcher_id": "../x"},
        {"dispatcher_id": "\x1b[2J"},
        {"dispatcher_serial": "zz"},
        {"reqid": "../../etc/x"},
        {"reqid": ""},
        {"status": "approved"},
        {"status": "denied", "reason": "\x1b]0;x\x07"},
    ],
    ids=repr,
)
def test_a_malformed_first_answer_is_refused_in_one_sentence(template, impostor, tmp_path, change):
    host = new_host(tmp_path, "wary")
    with FakeServer(
        impostor, fake_dispatcher(template, change_pending=lambda body: dict(body, **change))
    ) as server:
        with pytest.raises(ctrl_exec.PairingDenied) as caught:
            Attempt(host, server.port)
    assert "\x1b" not in caught.value.message
    assert stored(host) == []


def test_a_dispatcher_that_breaks_off_in_its_first_answer_is_no_internal_error(template, impostor, tmp_path):
    host = new_host(tmp_path, "broken-off")

    def talk(sock):
        read_http_request(sock)
        line = (
            json.dumps({"status": "pending", "reqid": "x1", "dispatcher_nonce": "0" * 64, "ca": ""}).encode()
            + b"\n"
        )
        sock.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n" % (len(line), line))

    with FakeServer(impostor, talk) as server:
        done = host.run("request-pairing", "--dispatcher", "127.0.0.1:%d" % server.port, "--name", "x")
    assert done.returncode == 3, done.err
    assert "internal error" not in done.err and stored(host) == []


def test_a_dispatcher_that_says_nothing_is_given_up_within_the_time_asked_for(impostor, tmp_path):
    host = new_host(tmp_path, "ignored")
    with FakeServer(impostor, lambda sock: (read_http_request(sock), read_http_request(sock))) as server:
        process = start_request(host, server.port, "--timeout", "1")
        try:
            assert process.wait(60) == 2
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


# --- older releases -------------------------------------------------------------------------------------


def read_lines_until(sock, mark):
    data = b""
    while mark not in data:
        piece = sock.recv(65536)
        if not piece:
            break
        data += piece
    return data


def test_an_agent_without_commitment_is_refused(shared, tmp_path):
    offer, _ = raw_offer(tmp_path, "older")
    del offer["commit"]
    status, answer = support.post(shared.port, support.client_context(), "/pair", offer)
    assert status == 400 and answer["status"] == "denied" and "--allow-legacy" in answer["reason"]
    assert not [request for request in shared.waiting() if request.hostname == "older"]


def test_an_agent_without_commitment_is_served_when_allowed(new_desk, tmp_path):
    desk = new_desk("", "--allow-legacy")
    assert "warning" in desk.screen.text
    offer, _ = raw_offer(tmp_path, "older")
    del offer["commit"]
    with support.tls_connect(desk.port, support.client_context()) as sock:
        sock.sendall(http_post("/pair", offer))
        first = read_lines_until(sock, b'"pending"')
        assert b"chunked" in first.lower()
        request = desk.request("older")
        assert request.legacy and desk.code(request) == ctrl_exec.legacy_pairing_code(offer["csr"])
        (shown,) = desk.control.json("list-requests")[1]["requests"]
        assert shown["legacy"] is True
        desk.screen.wait_for("legacy: the code proves little")
        desk.approve("older")
        rest = read_lines_until(sock, b"\r\n0\r\n\r\n")
    decision = json.loads(re.search(rb"\{.*\"approved\".*\}", rest)[0])
    assert decision["nonce"] == offer["nonce"] and "BEGIN CERTIFICATE" in decision["cert"]
    assert decision["dispatcher_serial"] == desk.control.serial()
    assert ctrl_exec.parse_certificate(decision["cert"].encode()).names == ("older",)


def test_an_agent_with_commitment_is_served_with_one_also_where_older_ones_are(new_desk, tmp_path):
    desk = new_desk("", "--allow-legacy")
    attempt = Attempt(new_host(tmp_path, "newer"), desk.port, allow_legacy=True)
    request = desk.approve("newer")
    assert not request.legacy and desk.code(request) == attempt.code
    assert attempt.store().names == ("newer",)


def legacy_dispatcher(control, silent=False, **more):
    terms = ctrl_exec.build_terms(control.config, OPENSSL, "")

    def chunk(value):
        line = json.dumps(value).encode() + b"\n"
        return b"%x\r\n%s\r\n" % (len(line), line)

    def talk(sock):
        _, offer = read_http_request(sock)
        sock.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        sock.sendall(chunk({"status": "pending", "reqid": "00ff"}))
        if silent:
            read_http_request(sock)
            return
        ca_key = ctrl_exec.ca_key_path(control.config.ca)
        cert = OPENSSL.sign(offer["csr"], offer["hostname"], "agent", 365, control.config.ca, ca_key)
        body = {"status": "approved", "cert": cert, "ca": terms.ca, "nonce": offer["nonce"]}
        body.update(dispatcher_serial=terms.dispatcher_serial.upper(), dispatcher_id="old-control", **more)
        sock.sendall(chunk(body) + b"0\r\n\r\n")
        read_http_request(sock)

    return talk


def test_a_dispatcher_without_commitment_is_believed_only_when_allowed(template, impostor, tmp_path):
    host = new_host(tmp_path, "newer")
    with FakeServer(impostor, legacy_dispatcher(template)) as server:
        refused = start_request(host, server.port)
        assert refused.wait(60) == 3
        assert "--allow-legacy" in text_of(refused.said) and stored(host) == []
        agent = start_request(host, server.port, "--allow-legacy")
        assert agent.wait(60) == 0, text_of(agent.said)
    said = text_of(agent.said)
    assert "imitate" in said and re.search(r"pairing code: \d{3} \d{3}\n", said)
    trusted = ctrl_exec.load_trust_map(host.config.trusted_dispatchers_path)
    assert trusted == {template.serial(): "old-control"}


def test_a_token_is_never_shown_to_a_dispatcher_without_commitment(template, impostor, tmp_path):
    host = new_host(tmp_path, "x")
    with FakeServer(impostor, legacy_dispatcher(template)) as server:
        with pytest.raises(ctrl_exec.PairingDenied):
            Attempt(host, server.port, allow_legacy=True, token="0123abcd." + "a" * 32)


@pytest.mark.parametrize("wish", ["pinned", "member"])
def test_the_ca_of_an_older_dispatcher_is_checked_as_well(template, impostor, tmp_path, wish):
    host = new_host(tmp_path, "strict")
    pin = ""
    if wish == "pinned":
        pin = "0" * 64
    else:
        ctrl_exec.make_directory(os.path.dirname(host.config.ca), 0o755)
        shutil.copy(impostor[2], host.config.ca)
    before = stored(host)
    with FakeServer(impostor, legacy_dispatcher(template)) as server:
        with pytest.raises(ctrl_exec.PairingDenied):
            Attempt(host, server.port, allow_legacy=True, ca_fingerprint=pin).store()
    assert stored(host) == before
    if before:
        assert text_of(host.config.ca) == text_of(impostor[2])


def test_an_older_dispatcher_that_never_decides_is_given_up_in_time(template, impostor, tmp_path):
    host = new_host(tmp_path, "ignored")
    with FakeServer(impostor, legacy_dispatcher(template, silent=True)) as server:
        process = start_request(host, server.port, "--allow-legacy", "--timeout", "1")
        try:
            assert process.wait(60) == 2
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


# --- somebody in the middle -----------------------------------------------------------------------------


def test_a_relay_that_changes_nothing_changes_nothing(shared, impostor, tmp_path):
    host = new_host(tmp_path, "relayed")
    with Middleman(impostor, shared.port) as relay:
        attempt = Attempt(host, relay.port)
        request = shared.request("relayed")
        assert shared.code(request) == attempt.code
        shared.approve("relayed")
        assert attempt.store().names == ("relayed",)
        paths = ["/pair", "/pair/reveal", "/pair/stored"]  # the agent need not wait for the last one's answer
        support.wait_until(lambda: [path for path, _, _ in relay.seen] == paths, what="all three")


def stand_in(tmp_path):
    """A key of the middleman's own and a request with it."""
    offer, _ = raw_offer(tmp_path, "x")
    return offer["csr"]


@pytest.mark.parametrize("field", ["csr", "hostname", "ip", "port", "nonce", "lookup_by", "version"])
def test_an_offer_changed_under_its_commitment_never_enters_the_queue(shared, impostor, tmp_path, field):
    name = "changed-" + field.replace("_", "-")
    host = new_host(tmp_path, name)
    change = {"csr": stand_in(tmp_path), "hostname": name + "-x", "ip": "192.0.2.66", "port": 6666}
    change.update(nonce="0" * 64, lookup_by="hostname", version="0")

    def request(path, body):
        return dict(body, **{field: change[field]}) if path == "/pair" else body

    with Middleman(impostor, shared.port, request) as relay:
        attempt = Attempt(host, relay.port)
        assert isinstance(attempt.end(), ctrl_exec.PairingDenied)
    assert [line for line in shared.control.events("pair-tamper") if attempt.reqid in line]
    assert not [r for r in shared.waiting() if r.hostname.startswith(name)] and stored(host) == []


@pytest.mark.parametrize("what", ["csr", "csr and ca", "hostname"])
def test_an_offer_replaced_with_its_commitment_shows_another_code(shared, impostor, tmp_path, what):
    name = "replaced-" + what.replace(" ", "-")
    host = new_host(tmp_path, name)
    csr = None if "csr" in what else "same"
    state = {}

    def request(path, body):
        if path == "/pair":
            hostname = name if "csr" in what else name + "-x"
            offer, state["nonce"] = raw_offer(tmp_path, hostname, body["csr"] if csr else None)
            state["csr"] = offer["csr"]
            return offer
        return dict(body, reveal=state["nonce"], exchange="") if path == "/pair/reveal" else body

    def answer(path, body):
        return dict(body, ca=text_of(impostor[2])) if "ca" in what.split() and path == "/pair" else body

    with Middleman(impostor, shared.port, request, answer) as relay:
        attempt = Attempt(host, relay.port)
        entry = support.wait_until(lambda: [r for r in shared.waiting() if r.hostname.startswith(name)])[0]
        assert entry.csr == state["csr"]
        assert shared.code(entry) != attempt.code
        # and even when the operator does not look: what comes back is not for this agent
        ctrl_exec.approve_pairing(shared.config, OPENSSL, entry, ctrl_exec.Approval())
        with pytest.raises(ctrl_exec.PairingDenied):
            attempt.store()
    assert stored(host) == []


@pytest.mark.parametrize("field", ["ca", "dispatcher_serial", "dispatcher_id", "dispatcher_nonce"])
def test_a_first_answer_changed_on_the_way_shows_another_code(shared, impostor, tmp_path, field):
    name = "misled-" + field.replace("_", "-")
    host = new_host(tmp_path, name)
    change = {"ca": text_of(impostor[2]), "dispatcher_serial": "abc123", "dispatcher_id": "evil"}
    change["dispatcher_nonce"] = ctrl_exec.new_id(32)

    def answer(path, body):
        return dict(body, **{field: change[field]}) if path == "/pair" else body

    with Middleman(impostor, shared.port, answer=answer) as relay:
        attempt = Attempt(host, relay.port)
        assert shared.code(shared.request(name)) != attempt.code
        if field != "dispatcher_nonce":  # nothing in the decision repeats the nonce: the code is its guard
            shared.approve(name)
            with pytest.raises(ctrl_exec.PairingDenied):
                attempt.store()
            assert stored(host) == []
    attempt.leave()
    support.wait_until(lambda: not [r for r in shared.waiting() if r.hostname == name])


@pytest.mark.parametrize("field", ["ca", "dispatcher_serial", "dispatcher_id", "nonce", "status", "cert"])
def test_a_decision_changed_on_the_way_stores_nothing(shared, impostor, tmp_path, field):
    name = "swapped-" + field.replace("_", "-")
    host = new_host(tmp_path, name)
    ca, ca_key = impostor[2], ctrl_exec.ca_key_path(impostor[2])
    change = {
        "ca": text_of(ca),
        "dispatcher_serial": "abc123",
        "dispatcher_id": "evil",
        "nonce": "0" * 64,
        "status": "?",
    }
    change["cert"] = OPENSSL.sign(stand_in(tmp_path), name, "agent", 1, ca, ca_key)

    def answer(path, body):
        return dict(body, **{field: change[field]}) if path == "/pair/reveal" else body

    with Middleman(impostor, shared.port, answer=answer) as relay:
        attempt = Attempt(host, relay.port)
        shared.approve(name)
        with pytest.raises(ctrl_exec.PairingDenied):
            attempt.store()
    assert stored(host) == []


@pytest.mark.parametrize("kind", ["other key", "other CA", "garbage", "two"])
def test_a_certificate_that_is_not_ours_is_not_stored(template, impostor, tmp_path, kind):
    host = new_host(tmp_path, "picky")
    ca = template.config.ca if kind != "other CA" else impostor[2]
    key = ctrl_exec.ca_key_path(ca)

    def change(body):
        own = OPENSSL.new_request(host.config.key, "picky")
        csr = stand_in(tmp_path) if kind == "other key" else own
        cert = OPENSSL.sign(csr, "picky", "agent", 1, ca, key)
        garbage = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
        return dict(body, cert={"garbage": garbage, "two": cert + cert}.get(kind, cert))

    with FakeServer(impostor, fake_dispatcher(template, change_decision=change)) as server:
        attempt = Attempt(host, server.port)
        with pytest.raises(ctrl_exec.PairingDenied):
            attempt.store()
    assert stored(host) == []


def test_a_recorded_conversation_played_again_shows_another_code(shared, impostor, tmp_path):
    host = new_host(tmp_path, "recorded")
    with Middleman(impostor, shared.port) as relay:
        attempt = Attempt(host, relay.port)
        shared.request("recorded")
        offer = relay.seen[0][1]
    attempt.leave()
    support.wait_until(lambda: not [r for r in shared.waiting() if r.hostname == "recorded"])
    with support.tls_connect(shared.port, support.client_context()) as sock:
        _, pending = exchange(sock, "/pair", offer)
        assert pending["reqid"] != attempt.reqid
        sock.sendall(
            http_post("/pair/reveal", {"reqid": pending["reqid"], "reveal": attempt.session._agent_nonce})
        )
        assert shared.code(shared.request("recorded")) != attempt.code


def test_the_agents_own_nonce_sent_back_as_the_dispatchers_is_no_way_in(shared, impostor, tmp_path):
    host = new_host(tmp_path, "mirrored")
    state = {}

    def request(path, body):
        state.setdefault("offer", body)
        return body

    def answer(path, body):
        return dict(body, dispatcher_nonce=state["offer"]["nonce"]) if path == "/pair" else body

    with Middleman(impostor, shared.port, request, answer) as relay:
        try:
            attempt = Attempt(host, relay.port)
        except ctrl_exec.PairingDenied:
            return
        assert shared.code(shared.request("mirrored")) != attempt.code
        attempt.leave()


def test_a_nonce_equal_to_our_secret_one_is_refused(template, impostor, tmp_path, monkeypatch):
    host = new_host(tmp_path, "mirrored")
    monkeypatch.setattr(ctrl_exec, "exchange_nonce", lambda _: "ab" * 32)
    answer = fake_dispatcher(template, change_pending=lambda body: dict(body, dispatcher_nonce="ab" * 32))
    with FakeServer(impostor, answer) as server:
        with pytest.raises(ctrl_exec.PairingDenied):
            Attempt(host, server.port)


def test_the_dispatchers_nonce_given_back_as_the_agents_does_not_open_the_commitment(shared, tmp_path):
    offer, _ = raw_offer(tmp_path, "echo")
    with support.tls_connect(shared.port, support.client_context()) as sock:
        _, pending = exchange(sock, "/pair", offer)
        reveal = {"reqid": pending["reqid"], "reveal": pending["dispatcher_nonce"]}
        status, answer = exchange(sock, "/pair/reveal", reveal)
    assert status == 403 and answer["status"] == "denied"
    assert [line for line in shared.control.events("pair-tamper") if pending["reqid"] in line]
    assert not [r for r in shared.waiting() if r.hostname == "echo"]


@pytest.mark.parametrize("reveal", ["", "00", "z" * 64, "0" * 64, "F" * 64])
def test_a_reveal_that_does_not_open_the_commitment_is_logged_and_burns_the_request(shared, tmp_path, reveal):
    offer, nonce = raw_offer(tmp_path, "liar")
    with support.tls_connect(shared.port, support.client_context()) as sock:
        _, pending = exchange(sock, "/pair", offer)
        status, answer = exchange(sock, "/pair/reveal", {"reqid": pending["reqid"], "reveal": reveal})
        assert status in (400, 403) and answer["status"] == "denied"
    assert not [r for r in shared.waiting() if r.hostname == "liar"]
    assert [line for line in shared.control.events("pair-tamper") if pending["reqid"] in line]
    with support.tls_connect(shared.port, support.client_context()) as sock:
        status, _ = exchange(sock, "/pair/reveal", {"reqid": pending["reqid"], "reveal": nonce})
    assert status == 400


def test_a_reveal_on_another_connection_is_refused(shared, tmp_path):
    offer, nonce = raw_offer(tmp_path, "elsewhere")
    with support.tls_connect(shared.port, support.client_context()) as sock:
        _, pending = exchange(sock, "/pair", offer)
        body = {"reqid": pending["reqid"], "reveal": nonce}
        assert support.post(shared.port, support.client_context(), "/pair/reveal", body)[0] == 400
        assert (
            support.post(shared.port, support.client_context(), "/pair/stored", {"reqid": pending["reqid"]})[
                0
            ]
            == 400
        )
    assert not [r for r in shared.waiting() if r.hostname == "elsewhere"]


def random_pem(label):
    body = base64.encodebytes(os.urandom(60)).decode("ascii")
    return "-----BEGIN %s-----\n%s-----END %s-----\n" % (label, body, label)


def test_somebody_in_the_middle_has_one_guess_among_all_codes(monkeypatch):
    monkeypatch.setattr(ctrl_exec, "PAIRING_CODE_DIGITS", 1)
    sessions, equal = 2000, 0
    ca, evil = random_pem("CERTIFICATE"), random_pem("CERTIFICATE")
    for number in range(sessions):
        true = ctrl_exec.PairingOffer("web", random_pem("CERTIFICATE REQUEST"), "00" * 32, 7443, "", "", "1")
        false = true._replace(csr=random_pem("CERTIFICATE REQUEST"))
        commit = os.urandom(32).hex(), os.urandom(32).hex()  # the agent's, the middleman's: fixed first
        given, told = os.urandom(32).hex(), os.urandom(32).hex()  # the dispatcher's, what the agent is told
        who = ("control", "ab12")
        if number % 3 == 0:
            at_agent = ctrl_exec.PairingSecrets(true, commit[0], told, evil, *who)
            at_desk = ctrl_exec.PairingSecrets(false, commit[1], given, ca, *who)
        elif number % 3 == 1:  # the nonce is passed on
            at_agent = ctrl_exec.PairingSecrets(true, commit[0], given, ca, *who)
            at_desk = ctrl_exec.PairingSecrets(false, commit[1], given, ca, *who)
        else:  # only who the dispatcher is
            at_agent = ctrl_exec.PairingSecrets(true, commit[0], given, ca, "evil", "ff")
            at_desk = ctrl_exec.PairingSecrets(true, commit[0], given, ca, *who)
        codes = ctrl_exec.pairing_code(at_agent), ctrl_exec.pairing_code(at_desk)
        assert all(re.fullmatch("[0-9]", code) for code in codes)
        equal += codes[0] == codes[1]
    spread = (sessions * 0.1 * 0.9) ** 0.5
    assert abs(equal - sessions * 0.1) < 5 * spread


def test_every_part_of_the_conversation_changes_the_code():
    offer = ctrl_exec.PairingOffer("web", random_pem("CERTIFICATE REQUEST"), "00" * 32, 7443, "", "", "1")
    secrets = ctrl_exec.PairingSecrets(
        offer, "11" * 32, "22" * 32, random_pem("CERTIFICATE"), "control", "ab"
    )
    others = [
        secrets._replace(offer=offer._replace(hostname="wed")),
        secrets._replace(offer=offer._replace(csr=random_pem("CERTIFICATE REQUEST"))),
        secrets._replace(agent_nonce="12" * 32),
        secrets._replace(dispatcher_nonce="23" * 32),
        secrets._replace(ca=random_pem("CERTIFICATE")),
        secrets._replace(dispatcher_id="contro", dispatcher_serial="lab"),
        secrets._replace(agent_nonce="22" * 32, dispatcher_nonce="11" * 32),
    ]
    transcripts = {ctrl_exec.pairing_transcript(one) for one in [secrets, *others]}
    assert len(transcripts) == 1 + len(others)
    assert re.fullmatch("[0-9]{6}", ctrl_exec.pairing_code(secrets))


# --- what a stranger may send ---------------------------------------------------------------------------


def openssl_request(tmp_path, *words, config="", kind=("ec", "-pkeyopt", "ec_paramgen_curve:P-256")):
    """A request made by openssl itself, with whatever an attacker writes into it."""
    (tmp_path / "evil.cnf").write_text(
        "[req]\ndistinguished_name = dn\nprompt = no\n[dn]\nCN = evil\n" + config
    )
    words = (
        "openssl",
        "req",
        "-new",
        "-nodes",
        "-newkey",
        *kind,
        "-keyout",
        str(tmp_path / "evil.key"),
        *words,
    )
    done = subprocess.run([*words, "-config", str(tmp_path / "evil.cnf")], capture_output=True, check=True)
    return done.stdout.decode("ascii")


def test_nothing_but_the_key_comes_from_a_hostile_request(shared, tmp_path):
    config = (
        "[ext]\nbasicConstraints = critical,CA:TRUE\nkeyUsage = keyCertSign\nextendedKeyUsage = clientAuth\n"
        "subjectAltName = DNS:other,DNS:*.example.org,IP:127.0.0.1\n"
    )
    csr = openssl_request(tmp_path, "-reqexts", "ext", config=config)
    offer, nonce = raw_offer(tmp_path, "modest", csr)
    with support.tls_connect(shared.port, support.client_context(), 60) as sock:
        _, pending = exchange(sock, "/pair", offer)
        sock.sendall(http_post("/pair/reveal", {"reqid": pending["reqid"], "reveal": nonce}))
        shared.approve("modest")
        decision = json.loads(support.read_reply(sock)[2])
    extensions = "basicConstraints,extendedKeyUsage,subjectAltName,keyUsage"
    done = subprocess.run(
        ["openssl", "x509", "-noout", "-subject", "-ext", extensions],
        input=decision["cert"].encode(), capture_output=True, check=True,
    )  # fmt: skip
    text = done.stdout.decode()
    assert "CA:FALSE" in text and "CA:TRUE" not in text and "Certificate Sign" not in text
    assert (
        "DNS:modest" in text
        and "other" not in text
        and "example.org" not in text
        and "IP Address" not in text
    )
    assert "Server Authentication" in text and "Client Authentication" not in text
    assert "evil" not in text


@pytest.mark.parametrize(
    "kind", ["rsa 1024", "sha1", "curve", "signature", "size", "garbage", "two", "empty"]
)
def test_a_request_below_our_standards_is_refused(shared, tmp_path, kind):
    csr = stand_in(tmp_path)
    if kind == "rsa 1024":
        csr = openssl_request(tmp_path, kind=("rsa:1024",))
    elif kind == "sha1":
        csr = openssl_request(tmp_path, "-sha1")
    elif kind == "curve":
        csr = openssl_request(tmp_path, kind=("ec", "-pkeyopt", "ec_paramgen_curve:secp256k1"))
    elif kind == "signature":
        der = bytearray(ctrl_exec.decode_pem(csr, "CERTIFICATE REQUEST"))
        der[-3] ^= 1
        body = base64.encodebytes(bytes(der)).decode("ascii")
        csr = "-----BEGIN CERTIFICATE REQUEST-----\n%s-----END CERTIFICATE REQUEST-----\n" % body
    else:
        csr = {"size": csr + "\n" * 10240, "garbage": "hello", "two": csr + csr, "empty": ""}[kind]
    offer, _ = raw_offer(tmp_path, "weak", csr)
    status, answer = support.post(shared.port, support.client_context(), "/pair", offer)
    assert status in (400, 413) and answer.get("status") != "pending"
    assert not [r for r in shared.waiting() if r.hostname == "weak"]
    assert_port_serves(shared)


@pytest.mark.parametrize(
    "field",
    [
        {"hostname": "../../etc/passwd"},
        {"hostname": ".."},
        {"hostname": "a/b"},
        {"hostname": "\x1b[31mroot"},
        {"hostname": "a\nACTION=pair-approve"},
        {"hostname": "a\u202eb"},
        {"hostname": "x" * 254},
        {"hostname": ""},
        {"hostname": "\uff41"},
        {"ip": "1.2.3.4; rm -rf /"},
        {"ip": "127.0.0.1/8"},
        {"port": 65536},
        {"port": -1},
        {"port": True},
        {"port": "22"},
        {"lookup_by": "guess"},
        {"version": "1\n2"},
        {"nonce": "short"},
        {"commit": "zz"},
        {"token_id": "../x" * 9},
        {"csr": None},
    ],
    ids=repr,
)
def test_a_hostile_field_is_refused_at_the_door(shared, tmp_path, field):
    offer = dict(HOSTILE_BASE, **field)
    lines = len(shared.control.log().splitlines())
    status, answer = support.post(shared.port, support.client_context(), "/pair", offer)
    assert status == 400 and answer["status"] == "denied"
    added = shared.control.log().splitlines()[lines:]
    assert all("ACTION=" in line and "\x1b" not in line for line in added)
    assert not [line for line in added if "ACTION=pair-approve" in line.split()[:2]]
    assert "\x1b" not in shared.screen.text


HOSTILE_BASE = dict(
    hostname="fine", csr="x", nonce="0" * 64, port=7443, ip="", lookup_by="", version="1", commit="0" * 64
)


@pytest.mark.parametrize(
    "body, status",
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b"null", 400),
        (b"\xff\xfe", 400),
        (b'{"hostname":"a","hostname":"b"}', 400),
        (b'{"hostname":NaN}', 400),
        (b"[" * 20000, 400),
        (b'{"csr":"' + b"A" * 70000 + b'"}', 413),
    ],
    ids=["empty", "cut", "list", "null", "binary", "twice", "nan", "deep", "large"],
)
@pytest.mark.parametrize("path", ["/pair", "/pair/reveal", "/pair/stored"])
def test_a_malformed_body_is_refused_and_the_port_goes_on(shared, path, body, status):
    assert support.post(shared.port, support.client_context(), path, body)[0] == status


def test_other_paths_and_methods_are_not_served(shared):
    context = support.client_context()
    assert support.post(shared.port, context, "/run", {})[0] == 404
    assert support.post(shared.port, context, "/", {})[0] == 404
    assert support.post(shared.port, context, "/pair", {}, "PUT")[0] == 405
    assert support.send_raw(shared.port, context, b"\x16\x03nonsense\r\n\r\n")[0] in (0, 400)
    assert_port_serves(shared)


def test_a_silent_connection_holds_up_nobody(shared, tmp_path):
    silent = [socket.create_connection(("127.0.0.1", shared.port)) for _ in range(20)]
    offered = support.tls_connect(shared.port, support.client_context())
    try:
        exchange(offered, "/pair", raw_offer(tmp_path, "half-way")[0])
        attempt = Attempt(new_host(tmp_path, "brisk"), shared.port)
        shared.approve("brisk")
        assert attempt.store().names == ("brisk",)
        assert not [r for r in shared.waiting() if r.hostname == "half-way"]
    finally:
        for sock in [*silent, offered]:
            sock.close()


def test_a_name_of_253_characters_can_be_paired(shared, tmp_path):
    name = "n" * 249 + ".abc"
    attempt = Attempt(new_host(tmp_path, name), shared.port)
    request = shared.request(name)
    assert shared.code(request) == attempt.code
    shared.approve(name)
    assert attempt.store().names == (name,)
    assert ctrl_exec.get_agent(shared.config.registry_dir, name).cert_name == name


@pytest.mark.parametrize("name", ["-x", "../x", "x" * 254, "a b", "\u00e9"])
def test_a_name_that_is_none_is_a_usage_error_on_the_host(tmp_path, name):
    host = new_host(tmp_path, "x")
    done = host.run("request-pairing", "--dispatcher", "127.0.0.1:1", "--name=" + name)
    assert done.returncode == 2 and not os.path.exists(host.config.key)


# --- a person on the managed host -----------------------------------------------------------------------


class Terminal:
    """`cea request-pairing` at a real terminal."""

    def __init__(self, host, port, *words):
        self.master, slave = pty.openpty()
        self.process = host.spawn(
            "request-pairing", "--dispatcher", "127.0.0.1:%d" % port, "--name", host.name, *words,
            stdin=slave, stdout=slave, stderr=slave,
        )  # fmt: skip
        os.close(slave)
        self.text = ""

    def has_shown(self, mark):
        while select.select([self.master], [], [], 0)[0]:
            try:
                self.text += os.read(self.master, 4096).decode("utf-8", "replace")
            except OSError:  # the process has closed its side
                break
        return mark in self.text

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.master)


@pytest.mark.parametrize("answer, status", [("n", 3), ("", 3), ("maybe", 3), ("y", 0), ("YES", 0)])
def test_a_person_at_a_terminal_is_asked_before_anything_is_stored(shared, tmp_path, answer, status):
    name = "asked-" + (answer or "nothing").lower()
    host = new_host(tmp_path, name)
    terminal = Terminal(host, shared.port)
    try:
        request = shared.request(name)
        code = shared.code(request)
        shared.approve(name)
        support.wait_until(lambda: terminal.has_shown("[y/N]"), what="the question")
        assert "show the code %s %s?" % (code[:3], code[3:]) in terminal.text
        assert stored(host) == []
        os.write(terminal.master, answer.encode() + b"\n")
        assert terminal.process.wait(60) == status
    finally:
        terminal.close()
    assert len(stored(host)) == (3 if status == 0 else 0)
    assert host.run("pairing-status").returncode == (0 if status == 0 else 1)


# --- what the CA says with a certificate, and the secret agreed on -------------------------------------------


def agreed(host):
    return ctrl_exec.load_request_secrets(ctrl_exec.request_secrets_path(host.config))


def test_both_sides_have_the_same_secret_and_nobody_else_has_it(shared, tmp_path):
    host = new_host(tmp_path, "agreeing")
    attempt = Attempt(host, shared.port)
    queued = ctrl_exec._request_path(shared.config.pairing_dir, shared.request("agreeing").reqid)
    seen = [text_of(queued)]
    shared.approve("agreeing")
    attempt.store()
    secret = ctrl_exec.find_secret(ctrl_exec.secret_directory(shared.config), "agreeing")
    assert re.fullmatch("[0-9a-f]{64}", secret)
    assert agreed(host) == {"control": ctrl_exec.RequestSecret(secret, True)}
    own = ctrl_exec._secret_path(ctrl_exec.secret_directory(shared.config), "agreeing")
    assert mode_of(own) == mode_of(shared.config.key) & 0o640
    assert mode_of(ctrl_exec.request_secrets_path(host.config)) == 0o600
    seen += [text_of(shared.control.file(ctrl_exec.ROOT_LOG)), text_of(host.config.cert)]
    assert not any(secret in text for text in seen)


def test_two_pairings_of_one_host_agree_on_two_secrets(shared, tmp_path):
    host = new_host(tmp_path, "again")
    found = []
    for replace in (False, True):
        attempt = Attempt(host, shared.port)
        shared.approve("again", replace=replace)
        attempt.store()
        found.append(agreed(host)["control"].secret)
    assert found[0] != found[1]
    assert found[1] == ctrl_exec.find_secret(ctrl_exec.secret_directory(shared.config), "again")


@pytest.mark.parametrize("what", ["dropped", "another key", "no key", "malformed"])
def test_an_agents_key_changed_on_the_way_is_noticed(shared, impostor, tmp_path, what):
    name = "key-" + what.replace(" ", "-")
    other = {"dropped": "", "another key": OPENSSL.new_exchange()[1], "no key": "04" * 65, "malformed": "zz"}[what]

    def request(path, body):
        return dict(body, exchange=other) if path == "/pair/reveal" else body

    host = new_host(tmp_path, name)
    with Middleman(impostor, shared.port, request) as relay:
        attempt = Attempt(host, relay.port)
        if what == "dropped":
            shared.approve(name)
        with pytest.raises(ctrl_exec.PairingDenied):
            attempt.store()
    assert stored(host) == [] and agreed(host) == {}


@pytest.mark.parametrize("what", ["dropped", "another key", "no point", "malformed"])
def test_a_dispatchers_key_changed_on_the_way_is_noticed(shared, impostor, tmp_path, what):
    name = "answer-" + what.replace(" ", "-")
    other = {"dropped": "", "another key": OPENSSL.new_exchange()[1], "no point": "04" * 65, "malformed": "zz"}[what]

    def answer(path, body):
        return dict(body, exchange=other) if path == "/pair/reveal" else body

    host = new_host(tmp_path, name)
    with Middleman(impostor, shared.port, answer=answer) as relay:
        attempt = Attempt(host, relay.port)
        shared.approve(name)
        with pytest.raises(ctrl_exec.PairingDenied, match="another exchange"):
            attempt.store()
    assert stored(host) == [] and agreed(host) == {}


@pytest.mark.parametrize("pinned", [False, True], ids=["by code", "by the CA's fingerprint"])
@pytest.mark.parametrize("field", ["dispatcher_serial", "dispatcher_id"])
def test_nobody_in_between_names_another_dispatcher_of_the_same_ca(shared, impostor, tmp_path, field, pinned):
    name = "named-%s-%d" % (field.replace("_", "-"), pinned)
    host = new_host(tmp_path, name)
    other = {"dispatcher_serial": "abc123", "dispatcher_id": "evil"}[field]
    pin = ctrl_exec.fingerprint(ctrl_exec.read_certificate_der(shared.config.ca)) if pinned else ""

    def answer(path, body):
        return dict(body, **{field: other}) if path in ("/pair", "/pair/reveal") else body

    with Middleman(impostor, shared.port, answer=answer) as relay:
        attempt = Attempt(host, relay.port, ca_fingerprint=pin)
        shared.approve(name)  # by somebody who does not look at the code
        with pytest.raises(ctrl_exec.PairingDenied, match="another exchange"):
            attempt.store()
    assert stored(host) == []


def test_a_pinned_ca_is_not_enough_when_it_does_not_say_what_it_answers(template, impostor, tmp_path):
    pin = ctrl_exec.fingerprint(ctrl_exec.read_certificate_der(template.config.ca))
    host = new_host(tmp_path, "pinning")
    with FakeServer(impostor, fake_dispatcher(template)) as server:
        with pytest.raises(ctrl_exec.PairingDenied, match="token, or compare the code"):
            Attempt(host, server.port, ca_fingerprint=pin).store()
    assert stored(host) == []


def test_pairing_with_an_older_release_forgets_what_was_agreed_on(template, impostor, tmp_path):
    host = new_host(tmp_path, "older-now")
    path = ctrl_exec.request_secrets_path(host.config)
    entry = ctrl_exec.RequestSecret("ab" * 32, True)
    ctrl_exec.edit_request_secrets(path, lambda known: known.update(control=entry, other=entry))
    with FakeServer(impostor, fake_dispatcher(template)) as server:
        Attempt(host, server.port).store()
    assert agreed(host) == {"other": entry}


def test_an_agent_of_an_older_release_is_paired_without_a_secret(shared, tmp_path):
    offer, nonce = raw_offer(tmp_path, "older-agent")
    with support.tls_connect(shared.port, support.client_context()) as sock:
        _, pending = exchange(sock, "/pair", offer)
        sock.sendall(http_post("/pair/reveal", {"reqid": pending["reqid"], "reveal": nonce}))
        shared.approve("older-agent")
        status, _, reply = support.read_reply(sock)
    assert json.loads(reply)["status"] == "approved" and "exchange" not in json.loads(reply)
    assert ctrl_exec.find_secret(ctrl_exec.secret_directory(shared.config), "older-agent") == ""


def test_a_key_in_a_legacy_decision_is_not_looked_at(template, impostor, tmp_path):
    host = new_host(tmp_path, "legacy-key")
    with FakeServer(impostor, legacy_dispatcher(template, exchange=OPENSSL.new_exchange()[1])) as server:
        agent = start_request(host, server.port, "--allow-legacy")
        assert agent.wait(60) == 0, text_of(agent.said)
    assert agreed(host) == {}


# --- the queue, and those who crowd it -----------------------------------------------------------------------


def request_from(desk, peer, number):
    request = ctrl_exec.PairingRequest(
        "r%d" % number, "host-%d" % number, OFFERED["csr"], "ab" * 32, 7443, "", "", "1", peer, "cd" * 32, "ef" * 32,
        received=time.time() + number, desk=desk._terms.desk,
    )  # fmt: skip
    desk._admit(request)
    return request


OFFERED = {}


def test_who_has_two_places_in_a_full_queue_gives_one_to_who_has_none(new_desk, tmp_path, monkeypatch):
    OFFERED.update(raw_offer(tmp_path, "x")[0])
    opened = new_desk("pairing_max_queue = 3\n")
    terms = ctrl_exec.build_terms(opened.config, OPENSSL, ctrl_exec.new_id())._replace(max_queue=3)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        desk = ctrl_exec.PairingDesk(opened.config, OPENSSL, terms, ours)
        refused = []
        monkeypatch.setattr(desk, "_answer", lambda reqid, body: refused.append((reqid, body["reason"])))
        for number, peer in enumerate(["10.0.0.1", "10.0.0.1", "10.0.0.2"]):
            request_from(desk, peer, number)
        assert refused == []
        request_from(desk, "10.0.0.3", 3)  # the greedy one's latest goes
        assert refused == [("r1", "the queue is full, and others wait")]
        request_from(desk, "10.0.0.1", 4)
        request_from(desk, "10.0.0.4", 5)  # all have one by now
        assert [reqid for reqid, _ in refused] == ["r1", "r4", "r5"]
        assert sorted(request.reqid for request in opened.waiting()) == ["r0", "r2", "r3"]
        desk._lock.release()


@pytest.mark.parametrize("path", ["/pair/reveal", "/pair/stored", "/elsewhere", "garbage"])
def test_every_path_of_the_pairing_port_counts_towards_its_rate(new_desk, path):
    desk = new_desk("pairing_rate_limit_volume = 3/600/600\n")
    for _ in range(8):
        try:
            with support.tls_connect(desk.port, support.client_context()) as sock:
                if path == "garbage":
                    sock.sendall(b"\x00\x01\r\n\r\n")
                else:
                    sock.sendall(http_post(path, {"reqid": "r1", "reveal": "ab" * 32}))
                sock.recv(4096)
        except OSError:
            break
    support.wait_until(lambda: desk.control.events("rate-block"), what="the block")


def test_the_queue_of_an_earlier_release_becomes_the_desks_alone(new_desk, template, tmp_path):
    root = str(tmp_path / "earlier")
    control = copy_control(template, root)
    place = control.file(ctrl_exec.VAR + "/pairing")
    os.makedirs(place)
    os.chmod(place, 0o770)
    desk = Desk(control)
    try:
        assert mode_of(place) == 0o700
    finally:
        desk.close()


def test_what_faces_the_pairing_port_gains_no_privileges(new_desk):
    if os.geteuid() != 0:
        pytest.skip("needs root: a change of user")
    desk = new_desk()
    def fronts():
        pids = [one.pid for one in ctrl_exec.list_processes() if one.parent == desk.process.pid]
        return [pid for pid in pids if "NoNewPrivs:\t1" in text_of("/proc/%d/status" % pid)]
    support.wait_until(fronts, what="the front")


def test_an_earlier_certificate_of_the_host_is_no_answer(shared, impostor, tmp_path):
    host = new_host(tmp_path, "earlier")
    ctrl_exec.new_key_file(OPENSSL, host.config.key, "ec")
    csr = OPENSSL.new_request(host.config.key, "earlier")
    ca = shared.config.ca
    known = OPENSSL.sign(csr, "earlier", "agent", 99, ca, ctrl_exec.ca_key_path(ca))  # as a renewal made it
    ctrl_exec.write_atomic(host.config.cert, known.encode())
    ctrl_exec.write_atomic(host.config.ca, ctrl_exec.read_file(ca))

    def answer(path, body):
        if path != "/pair/reveal":
            return body
        return {key: value for key, value in dict(body, cert=known).items() if key != "exchange"}

    with Middleman(impostor, shared.port, answer=answer) as relay:
        attempt = Attempt(host, relay.port)
        shared.approve("earlier")
        with pytest.raises(ctrl_exec.PairingDenied, match="earlier certificate"):
            attempt.store()
    assert agreed(host) == {}


def test_a_replacement_that_cannot_be_registered_leaves_the_former_secret(shared, tmp_path, monkeypatch):
    host = new_host(tmp_path, "kept")
    for number in range(2):
        attempt = Attempt(host, shared.port)
        if number:
            def full(*_):
                raise ctrl_exec.StorageError("no room")
            monkeypatch.setattr(ctrl_exec, "save_agent", full)
            with pytest.raises(ctrl_exec.StorageError):
                shared.approve("kept", replace=True)
            attempt.leave()
        else:
            shared.approve("kept")
            attempt.store()
            before = ctrl_exec.find_secret(ctrl_exec.secret_directory(shared.config), "kept")
    assert before == ctrl_exec.find_secret(ctrl_exec.secret_directory(shared.config), "kept") != ""
