"""Trust that looks after itself: renewed, rotated, replaced and revoked while real agents serve."""

import contextlib
import io
import json
import os
import shutil
import signal
import ssl
import sys
import tempfile
import time
from typing import NamedTuple

import ctrl_exec
import older
import peers
import pytest
import support
from support import wait_until

pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # `ced` forks

OPENSSL = ctrl_exec.OpenSSL()
DAY = 86400.0


# --- a ced whose clock is wrong, or that dies ------------------------------------------------------------


class Done(NamedTuple):
    returncode: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


def ced(control, *words, clock=0.0, change=None):
    """One `ced` in a child of this process, its clock `clock` seconds ahead; `change()` prepares the child.

    A child that was killed has a negative status."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pid = os.fork()
        if pid == 0:
            status = 99
            try:
                signal.alarm(120)
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                sys.stdout, sys.stderr = (io.TextIOWrapper(open(n, "wb", closefd=False)) for n in (1, 2))
                ctrl_exec.now = lambda: time.time() + clock
                if change is not None:
                    change()
                status = ctrl_exec.main(["ced", "--root", control.root, *words])
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        out.seek(0)
        err.seek(0)
        done = Done(status, out.read().decode(), err.read().decode())
    assert "Traceback" not in done.err and status not in (70, 99, -signal.SIGALRM), done
    return done


def well(done):
    """The command has succeeded; it is returned."""
    assert done.returncode == 0, done.out + done.err
    return done


def die_at(number, root):
    """Kill this process just before its `number`th change to a directory below `root`."""
    left = [number]

    def counted(real):
        def change(path, *rest, **named):
            if str(path).startswith(root):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return real(path, *rest, **named)

        return change

    for name in ("rename", "link", "unlink"):
        setattr(os, name, counted(getattr(os, name)))


@contextlib.contextmanager
def clock_ahead(seconds):
    """This process's own clock, for a moment."""
    real = ctrl_exec.now
    ctrl_exec.now = lambda: time.time() + seconds
    try:
        yield
    finally:
        ctrl_exec.now = real


# --- a deployment that can be put back -------------------------------------------------------------------


def read(path):
    with open(path, "rb") as file:
        return file.read()


def tree(top):
    """Every file below a directory: relative path to content."""
    found = {}
    for directory, _, names in os.walk(top):
        for name in names:
            path = os.path.join(directory, name)
            found[os.path.relpath(path, top)] = read(path)
    return found


def host_files(host):
    paths = (host.config.trusted_dispatchers_path, ctrl_exec.request_secrets_path(host.config))
    state = {path: read(path) if os.path.exists(path) else b"{}" for path in paths}
    return {"etc": tree(host.file(ctrl_exec.AGENT_ETC)), "state": state}


class Saved:
    """A deployment as it is now; `restore` puts control host and agents back to it."""

    def __init__(self, site):
        self._site = site
        self._top = tempfile.mkdtemp(dir=site.top)
        for path in (ctrl_exec.ETC, ctrl_exec.VAR):
            shutil.copytree(site.control.file(path), self._top + path, symlinks=True)
        self._hosts = {name: host_files(host) for name, host in site.hosts.items()}

    def restore(self):
        for path in (ctrl_exec.ETC, ctrl_exec.VAR):
            shutil.rmtree(self._site.control.file(path))
            shutil.copytree(self._top + path, self._site.control.file(path), symlinks=True)
        for name in set(self._site.hosts) - set(self._hosts):
            self._site.hosts.pop(name).stop()
        for name, files in self._hosts.items():
            self._put_back(self._site[name], files)

    def _put_back(self, host, files):
        present = host_files(host)
        if present != files:
            for name in present["etc"]:
                if name not in files["etc"]:
                    os.unlink(host.file(ctrl_exec.AGENT_ETC + "/" + name))
            for name, data in files["etc"].items():
                if present["etc"].get(name) != data:
                    overwrite(host.file(ctrl_exec.AGENT_ETC + "/" + name), data)
            for path, data in files["state"].items():
                overwrite(path, data)
        if host.process.poll() is not None:
            host.start()
        elif present != files:
            assert "RESULT=ok" in host.reload()


def overwrite(path, data):
    """New content; the mode stays."""
    with open(path, "wb") as file:
        file.write(data)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    with support.Deployment(tmp_path_factory.mktemp("upkeep"), ("alpha", "beta")) as made:
        care = ctrl_exec.Caretaker(made.control.config)
        for host in made.hosts.values():  # what pairing writes down, and Control.register does not
            fact = lambda agent: agent._replace(cas=care.cas, issuer=care.issuer)  # noqa: E731
            edit(made, host.name, lambda agent: ctrl_exec.with_trust(fact(agent), care.serial))
            # for tests in which months pass on the control host alone
            host.configure("run_retention_hours = %d\n" % (24 * 400))
            host.reload()
        made.saved = Saved(made)
        yield made


@pytest.fixture
def site(home):
    """A control host and two agents, put back afterwards; their logs begin empty."""
    for one in (home.control, *home.hosts.values()):
        with contextlib.suppress(FileNotFoundError):
            os.truncate(one.file(ctrl_exec.ROOT_LOG), 0)
    yield home
    home.saved.restore()


def edit(site, name, change):
    return ctrl_exec.update_agent(site.control.config.registry_dir, name, change)


def entry(site, name):
    return ctrl_exec.get_agent(site.control.config.registry_dir, name)


def move(site, name, port):
    """Where the registry says that the host listens."""
    return edit(site, name, lambda agent: agent._replace(port=port))


def trusted(host):
    return ctrl_exec.load_trust_map(host.config.trusted_dispatchers_path)


def served(host, control):
    """The certificate that a new connection to the agent gets, as PEM."""
    with support.tls_connect(host.port, support.dispatcher_context(control)) as tls:
        return ssl.DER_cert_to_PEM_cert(tls.getpeercert(binary_form=True))


def sign(site, request, name, profile="agent", start=0.0, days=365):
    """A certificate whose life begins `start` days from now."""
    ca = site.control.config.ca
    with clock_ahead(start * DAY):
        return OPENSSL.sign(request, name, profile, days, ca, ctrl_exec.ca_key_path(ca))


def install(site, name, pem):
    """Give an agent this certificate, behind the program's back; the registry knows it."""
    host = site[name]
    overwrite(host.config.cert, pem.encode())
    assert "RESULT=ok" in host.reload()
    info = ctrl_exec.parse_certificate(pem.encode())
    fresh = lambda agent: agent._replace(serial="", issued={})  # noqa: E731
    edit(site, name, lambda agent: ctrl_exec.with_certificate(fresh(agent), info, agent.issuer))
    return info.serial


def age(site, name, days=200):
    """Have an agent's certificate be that old, of 365 days; its serial."""
    request = OPENSSL.new_request(site[name].config.key, name)
    return install(site, name, sign(site, request, name, start=-days))


def age_dispatcher(site, days):
    """Have the dispatcher's certificate be that old, and known to every host; its serial."""
    config = site.control.config
    pem = sign(site, OPENSSL.new_request(config.key, "control"), "control", "dispatcher", -days)
    overwrite(config.cert, pem.encode())
    serial = site.control.serial()
    for host in site.hosts.values():
        put_map(host, {serial: "control"})
        edit(site, host.name, lambda agent: ctrl_exec.with_trust(agent, serial))
    return serial


def put_map(host, entries):
    text = "".join("%s %s\n" % one for one in entries.items())
    overwrite(host.config.trusted_dispatchers_path, text.encode())
    assert "RESULT=ok" in host.reload()


def identity(control):
    """What a control host shows now, kept as it is whatever becomes of the files."""
    config = control.config
    where = tempfile.mkdtemp(dir=os.path.dirname(control.root))
    paths = [shutil.copy(path, where) for path in (config.cert, config.key)]
    return older.Identity(*paths, control.serial())


def ask_ping(host, who):
    """(status, answer) of a ping by an identity; TLS refusals are (0, None)."""
    return support.post(host.port, who.context(), "/ping", {"reqid": "x"})


def ping(site, *names, **how):
    """The results of `ced ping`, by name."""
    done = ced(site.control, "ping", *(names or ("--all",)), "--json", **how)
    return {result["host"]: result for result in done.json["results"]}


def assert_all_answer(site):
    answers = ping(site)
    states = {name: answer["status"] for name, answer in answers.items()}
    assert states == dict.fromkeys(site.hosts, "ok"), answers


def findings(done):
    assert done.json["ok"] in (True, False) and "findings" in done.json, done
    return [finding["level"] + " " + finding["what"] for finding in done.json["findings"]]


def maintain(site, **how):
    return findings(ced(site.control, "maintain", "--json", **how))


# --- a peer in an agent's place --------------------------------------------------------------------------


def read_whole(sock):
    """A request: (method and path, body)."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = sock.recv(65536)
        if not piece:
            return "", {}
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0] or 0)
    while len(body) < length:
        body += sock.recv(65536)
    return " ".join(head.decode().split(" ")[:2]), json.loads(body) if body else {}


def conversing(answer, version="1.1"):
    """A peer that answers one request after another: `answer(asked, body, serial of the caller)` gives
    (status, object), or None to hang up. HTTP/1.0 closes after each."""

    def behave(raw, context):
        with context.wrap_socket(raw, server_side=True) as tls:
            cert = ctrl_exec.read_peer_cert(tls)
            while True:
                asked, body = read_whole(tls)
                reply = answer(asked, body, cert.serial if cert else "") if asked else None
                if reply is None:
                    return
                data = json.dumps(reply[1]).encode()
                words = (version.encode(), reply[0], len(data), data)
                tls.sendall(b"HTTP/%s %d X\r\nContent-Length: %d\r\n\r\n%s" % words)
                if version == "1.0":
                    return

    return behave


@contextlib.contextmanager
def impostor(site, name, answer, cert="", key="", version="1.1", ca=""):
    """A peer in the place of a host, with its certificate unless another is given; the port is free again
    afterwards."""
    config = site[name].config if name in site.hosts else None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert or config.cert, key or config.key)
    if ca:
        context.load_verify_locations(ca)
        context.verify_mode = ssl.CERT_REQUIRED
    port = support.free_port()
    peer = peers.Peer(port, conversing(answer, version), context)
    before = entry(site, name).port
    move(site, name, port)
    try:
        yield port
    finally:
        move(site, name, before)
        peer.close()


GOOD_PING = {"status": "ok", "host": "alpha", "version": "1", "expiry": "2099-01-01T00:00:00Z"}


# --- 1. agents' certificates renew themselves ------------------------------------------------------------


@pytest.mark.parametrize("verb", ["ping", "maintain"])
def test_what_is_past_half_its_life_is_renewed_over_the_live_connection(site, verb):
    old = age(site, "alpha")
    beta, alpha = served(site["beta"], site.control), site["alpha"]
    if verb == "ping":
        done = well(ced(site.control, "ping", "alpha", "beta"))
    else:
        done = well(ced(site.control, "maintain"))
    assert "its certificate is renewed until" in done.out and done.out.count("renewed") == 1
    pem = served(alpha, site.control)
    info = ctrl_exec.parse_certificate(pem.encode())
    assert (info.names, info.common_name) == (("alpha",), "alpha") and info.serial != old
    OPENSSL.check_key_match(pem.encode(), alpha.config.key)
    assert entry(site, "alpha").serial == info.serial
    assert alpha.process.poll() is None and not alpha.events("stop")
    assert served(site["beta"], site.control) == beta  # which was not due
    agents = ced(site.control, "list-agents", "--json").json["agents"]
    assert [agent["days_left"] for agent in agents] == [364, 364]
    assert "note" not in ping(site)["alpha"] and served(alpha, site.control) == pem


def test_what_is_not_past_half_its_life_is_left_alone(site):
    old = age(site, "alpha", 181)
    assert maintain(site) == ["OK nothing is due"]
    assert ctrl_exec.read_certificate(site["alpha"].config.cert).serial == old and not site["alpha"].events("renew")


@pytest.mark.parametrize("lost", ["request", "delivery", "answer"])
def test_a_renewal_whose_connection_breaks_leaves_the_old_certificate_working(site, lost):
    old, alpha = age(site, "alpha"), site["alpha"]
    csr = OPENSSL.new_request(alpha.config.key, "alpha")

    def answer(asked, body, _):
        if asked == "POST /ping":
            return 200, GOOD_PING
        if asked == "POST /renew":
            return None if lost == "request" else (200, {"status": "ok", "csr": csr})
        if lost == "answer":
            overwrite(alpha.config.cert, body["cert"].encode())
        return None

    with impostor(site, "alpha", answer):
        result = ping(site, "alpha")["alpha"]
    assert result["status"] == "ok" and "closed the connection" in result["note"]
    record = entry(site, "alpha")
    made = set(record.issued) - {old}
    assert record.serial == old and len(made) == (lost != "request")
    if lost == "answer":
        assert "RESULT=ok" in alpha.reload()
    expected = made.pop() if lost == "answer" else old
    assert ping(site)["alpha"]["status"] == "ok"
    assert ctrl_exec.parse_certificate(served(alpha, site.control).encode()).serial == expected
    assert any("renewed" in line for line in maintain(site)) == (lost != "answer")
    assert entry(site, "alpha").serial == ctrl_exec.read_certificate(alpha.config.cert).serial


def test_an_attempt_to_renew_is_repeated_by_maintain_at_once_and_by_ping_after_an_hour(site):
    old, alpha = age(site, "alpha"), site["alpha"]
    with impostor(site, "alpha", lambda asked, *_: (200, GOOD_PING) if asked == "POST /ping" else None):
        assert "note" in ping(site, "alpha")["alpha"]
    assert "note" not in ping(site)["alpha"] and ctrl_exec.read_certificate(alpha.config.cert).serial == old
    saved = Saved(site)
    assert any("alpha: its certificate is renewed" in line for line in maintain(site))
    saved.restore()
    assert "renewed" in ping(site, clock=3700)["alpha"]["note"]


def test_an_agent_killed_during_its_renewal_comes_back_with_the_old_certificate(site):
    old, alpha = age(site, "alpha"), site["alpha"]

    def prepare():
        real = ctrl_exec.OpenSSL.check_request

        def check(openssl, csr):
            os.killpg(alpha.process.pid, signal.SIGKILL)
            return real(openssl, csr)

        ctrl_exec.OpenSSL.check_request = check

    assert ping(site, "alpha", change=prepare)["alpha"]["status"] == "ok"
    alpha.process.wait(60)
    alpha.stop()
    alpha.start()
    assert ping(site)["alpha"]["status"] == "ok"
    assert ctrl_exec.read_certificate(alpha.config.cert).serial == old
    assert any("alpha: its certificate is renewed" in line for line in maintain(site))


def test_without_the_cas_key_a_ping_notes_that_renewal_is_due(site):
    age(site, "alpha")
    os.unlink(ctrl_exec.ca_key_path(site.control.config.ca))
    done = well(ced(site.control, "ping", "alpha", "--json"))
    (result,) = done.json["results"]
    assert result["note"] == "renewal is due (past half its life), and the CA's key is not here"
    assert maintain(site) == ["WARN alpha: " + result["note"]]


def test_a_request_for_another_key_than_the_agents_is_refused(site, tmp_path):
    old, key = age(site, "alpha"), str(tmp_path / "other.key")
    ctrl_exec.new_key_file(OPENSSL, key, "ec")
    csr, asked = OPENSSL.new_request(key, "alpha"), []

    def answer(what, *_):
        asked.append(what)
        return 200, (GOOD_PING if what == "POST /ping" else {"status": "ok", "csr": csr})

    with impostor(site, "alpha", answer):
        result = ping(site, "alpha")["alpha"]
    assert result["note"] == "its certificate request is for another key than it holds"
    assert asked == ["POST /ping", "POST /renew"] and list(entry(site, "alpha").issued) == [old]


def test_only_the_registered_name_is_signed_whatever_the_request_says(site):
    age(site, "alpha")
    csr, sent = OPENSSL.new_request(site["alpha"].config.key, "beta"), []

    def answer(what, body, _):
        if what == "POST /renew-complete":
            sent.append(body)
        return 200, (GOOD_PING if what == "POST /ping" else {"status": "ok", "csr": csr})

    with impostor(site, "alpha", answer):
        assert "renewed" in ping(site, "alpha")["alpha"]["note"]
    info = ctrl_exec.parse_certificate(sent[0]["cert"].encode())
    assert (info.names, info.common_name) == (("alpha",), "alpha")


@pytest.mark.parametrize("verb", ["revoke", "unpair"])
def test_every_serial_ever_issued_to_a_host_is_refused(site, verb):
    alpha, control = site["alpha"], site.control
    first, old = age(site, "alpha"), read(alpha.config.cert)
    csr = OPENSSL.new_request(alpha.config.key, "alpha")
    routes = {"POST /ping": (200, GOOD_PING), "POST /renew": (200, {"csr": csr})}
    with impostor(site, "alpha", lambda asked, *_: routes.get(asked)):
        ping(site, "alpha")
    (failed,) = set(entry(site, "alpha").issued) - {first}
    assert any("renewed" in line for line in maintain(site))
    present, record = ctrl_exec.read_certificate(alpha.config.cert).serial, entry(site, "alpha")
    well(control.run(verb, "alpha"))
    assert {first, failed, present} <= ctrl_exec.load_revoked(control.config.revoked_serials)
    if verb == "unpair":
        with ctrl_exec.registry_lock(control.config.registry_dir):
            ctrl_exec.save_agent(control.config.registry_dir, record)
    for data in (None, old):
        if data:
            overwrite(alpha.config.cert, data)
            assert "RESULT=ok" in alpha.reload()
        result = ping(site)["alpha"]
        assert result["status"] == "unreachable" and "is revoked" in result["error"]
    assert ping(site)["beta"]["status"] == "ok"


def test_a_single_serial_can_be_revoked_in_every_spelling_and_is_refused_from_then_on(site):
    serial = entry(site, "alpha").serial
    spelled = ":".join(serial.upper()[at : at + 2] for at in range(0, len(serial), 2))
    shown = well(ced(site.control, "revoke", spelled, "--json")).json
    assert shown == {"ok": True, "revoked": [serial]}
    assert {name: one["status"] for name, one in ping(site).items()} == {"alpha": "unreachable", "beta": "ok"}
    assert ced(site.control, "run", "alpha", "hello").returncode == 1
    assert ced(site.control, "discovery", "alpha").returncode == 1
    done = ced(site.control, "revoke", "no-such-host")
    assert done.returncode == 2 and "neither a registered host nor a serial" in done.err


def test_the_revocation_list_is_read_again_by_every_ced_and_a_bad_one_refuses_everybody_loudly(site):
    path = site.control.config.revoked_serials
    assert_all_answer(site)
    with open(path, "a") as file:
        file.write("0x%s\n" % entry(site, "beta").serial.upper())
    assert "is revoked" in ping(site)["beta"]["error"]
    overwrite(path, b"not a serial\n")
    for words in (("ping", "--all"), ("run", "alpha", "hello"), ("maintain",), ("revoke", "alpha")):
        done = ced(site.control, *words)
        assert done.returncode == 1 and "%s:1: `not a serial` is not" % path in done.err + done.out, words
    assert not site["alpha"].events("run")
    os.unlink(path)
    os.mkdir(path)
    assert "the revocation list cannot be used" in ced(site.control, "ping", "--all").err
    os.rmdir(path)


def test_list_agents_shows_days_left_in_colour_near_the_end(site):
    for name, days in (("alpha", 29), ("beta", 13)):
        expiry = ctrl_exec.iso_time(time.time() + days * DAY + 60)
        edit(site, name, lambda agent: agent._replace(expiry=expiry))

    def on_terminal():
        ctrl_exec._is_terminal = lambda: True
        os.environ["TERM"] = "xterm"

    shown = well(ced(site.control, "list-agents", change=on_terminal)).out
    assert "\033[33m29d" in shown and "\033[31m13d" in shown
    plain = well(ced(site.control, "list-agents")).out
    assert "29d" in plain and "\033" not in plain
    edit(site, "beta", lambda agent: agent._replace(expiry="2026-01-01T00:00:00Z"))
    assert "expired" in ced(site.control, "list-agents").out


# --- 2. the dispatcher's certificate rotates -------------------------------------------------------------


def test_a_rotation_reaches_every_host_and_nothing_is_paired_again(site):
    old, key = site.control.serial(), read(site.control.config.key)
    shown = findings(well(ced(site.control, "rotate-cert", "--json")))
    new = site.control.serial()
    assert new != old and [line for line in shown if line.startswith("OK certificate %s is in use" % new)]
    assert read(site.control.config.key) != key
    assert os.stat(site.control.config.key).st_mode & 0o777 == 0o600
    for host in site.hosts.values():
        assert trusted(host) == {old: "control", new: "control"}
        (line,) = host.events("rotate")
        assert "CHANGE=add" in line and "SERIAL=%s" % new in line
        assert not host.events("serial-reject") and host.process.poll() is None
    assert well(ced(site.control, "run", "--all", "hello")).out.count("hello") >= 2
    status = well(ced(site.control, "serial-status", "--json")).json
    assert (status["serial"], status["next"]) == (new, "")
    assert [(agent["status"], agent["serial"]) for agent in status["agents"]] == [("current", new)] * 2
    assert [one["serial"] for one in status["former"]] == [old]
    assert well(ced(site.control, "serial-status")).out.startswith("in use: %s, 364d left" % new)


def test_nothing_changes_while_no_host_can_be_told(site):
    config = site.control.config
    before, serial = read(config.cert) + read(config.key), site.control.serial()
    for host in site.hosts.values():
        host.stop()
    for verb in ("rotate-cert", "rotate-cert", "maintain"):  # maintain goes on with what was begun
        done = ced(site.control, verb)
        assert done.returncode == 1 and "no host could be told of the new certificate" in done.out, done
    assert read(config.cert) + read(config.key) == before
    coming = ctrl_exec.read_certificate(ctrl_exec.next_path(config.cert)).serial
    assert "next: %s" % coming in ced(site.control, "serial-status").out
    for host in site.hosts.values():
        host.start()
    assert_all_answer(site)  # which tells them
    assert trusted(site["alpha"]) == {serial: "control", coming: "control"}
    well(ced(site.control, "rotate-cert"))
    assert site.control.serial() == coming


def test_without_the_cas_key_a_rotation_changes_nothing_and_says_why(site):
    config, serial = site.control.config, site.control.serial()
    os.unlink(ctrl_exec.ca_key_path(config.ca))
    done = ced(site.control, "rotate-cert")
    assert done.returncode == 1 and "ca.key" in done.err and site.control.serial() == serial
    assert_all_answer(site)


def forget(site, name, serial):
    """An agent that was off when this was replaced: it trusts nothing else."""
    put_map(site[name], {serial: "control"})
    edit(site, name, lambda agent: agent._replace(dispatcher_serial=serial, serial_status="pending"))


def test_a_host_that_was_off_is_reached_by_every_verb_and_told(site):
    old = site.control.serial()
    site["beta"].stop()
    done = well(ced(site.control, "rotate-cert"))
    assert "beta: it has not heard of it, and will at the next contact" in done.out
    new = site.control.serial()
    done = ced(site.control, "serial-status")
    assert done.returncode == 1 and done.out.splitlines()[-1].split()[:3] == ["beta", "pending", old]
    site["beta"].start()
    reqid = well(ced(site.control, "run", "beta", "hello", "--async", "--json")).json["reqid"]
    assert trusted(site["beta"]) == {old: "control", new: "control"}
    path = os.path.join(site.control.config.runs_dir, reqid + ".json")
    unfinished = read(path)
    wait_until(lambda: site["beta"].record(reqid)["status"] == "done")
    for words in (
        ("ping", "beta"), ("run", "beta", "hello"), ("run", "beta", "hello", "--stream"),
        ("discovery", "beta"), ("cancel", reqid), ("status", reqid), ("wait", reqid),
    ):  # fmt: skip
        forget(site, "beta", old)
        if words[0] in ("status", "wait", "cancel"):  # of a run whose end is not known here yet
            overwrite(path, unfinished)
        done = well(ced(site.control, *words))
        assert "mismatch" not in done.out and trusted(site["beta"]) == {old: "control", new: "control"}, words
    well(ced(site.control, "ping", "beta"))
    assert well(ced(site.control, "serial-status", "--json")).json["agents"][1]["status"] == "current"


def test_after_the_overlap_the_former_serial_is_retired_everywhere(site):
    former = identity(site.control)
    well(ced(site.control, "rotate-cert"))
    new = site.control.serial()
    assert maintain(site, clock=29 * DAY) == ["OK nothing is due"]
    assert ask_ping(site["alpha"], former)[0] == 200
    assert "OK certificate %s is retired" % former.serial in maintain(site, clock=31 * DAY)
    for host in site.hosts.values():
        assert trusted(host) == {new: "control"}
        assert ask_ping(host, former) == (403, {"error": "serial mismatch", "status": "forbidden"})
        assert host.events("serial-reject")
    assert "former" not in "".join(os.listdir(os.path.dirname(site.control.config.cert)))
    assert well(ced(site.control, "serial-status", "--json")).json["former"] == []
    assert site.control.events("serial-retire")
    assert_all_answer(site)


def test_a_host_that_was_never_reached_is_stale_and_named_and_can_still_be_told(site):
    old = site.control.serial()
    site["beta"].stop()
    well(ced(site.control, "rotate-cert"))
    new = site.control.serial()
    shown = maintain(site, clock=31 * DAY)
    assert any(line.startswith("WARN beta: stale: it has not heard of certificate " + new) for line in shown)
    assert trusted(site["alpha"]) == {new: "control"} and site.control.events("serial-stale")
    done = ced(site.control, "serial-status")
    assert done.returncode == 1 and done.out.splitlines()[-1].split()[:2] == ["beta", "stale"]
    site["beta"].start()
    assert_all_answer(site)
    assert trusted(site["beta"]) == {old: "control", new: "control"}
    assert "OK certificate %s is retired" % old in maintain(site, clock=31 * DAY)
    assert trusted(site["beta"]) == {new: "control"}
    well(ced(site.control, "serial-status"))


def test_a_host_that_trusts_only_an_expired_certificate_is_named_with_the_way_out(site):
    old = age_dispatcher(site, 340)
    site["beta"].stop()
    well(ced(site.control, "rotate-cert"))
    done = ced(site.control, "maintain", "--json", clock=31 * DAY)
    assert done.returncode == 1
    (finding,) = [one for one in done.json["findings"] if one["level"] == "FAIL"]
    assert finding["what"] == "beta: stale: it trusts no certificate of ours that is still valid"
    assert "--replace" in finding["hint"]
    assert old not in "".join(os.listdir(os.path.dirname(site.control.config.cert)))


def test_maintain_rotates_when_fewer_than_cert_renewal_days_remain(site):
    old = age_dispatcher(site, 274)
    assert maintain(site) == ["OK nothing is due"]
    old = age_dispatcher(site, 276)
    assert ced(site.control, "maintain", "--if-due", clock=3600).out == ""
    path = ctrl_exec.rotation_path(site.control.config)
    checked = ctrl_exec.iso_time(time.time() - 14500)
    ctrl_exec.edit_rotation(path, lambda rotation: rotation._replace(checked=checked))
    assert "is in use until" in ced(site.control, "maintain", "--if-due").out
    new = site.control.serial()
    assert new != old and trusted(site["alpha"]) == {old: "control", new: "control"}
    assert maintain(site) == ["OK nothing is due"]


def test_rotating_three_times_before_a_host_has_heard_of_the_first_is_safe(site):
    serials = [site.control.serial()]
    site["beta"].stop()
    for _ in range(3):
        well(ced(site.control, "rotate-cert"))
        serials.append(site.control.serial())
    assert len(set(serials)) == 4 and set(trusted(site["alpha"])) == set(serials)
    site["beta"].start()
    assert well(ced(site.control, "run", "--all", "hello")).returncode == 0
    assert trusted(site["beta"]) == {serials[0]: "control", serials[3]: "control"}
    shown = maintain(site, clock=31 * DAY)
    assert shown == ["OK certificate %s is retired" % serial for serial in sorted(serials[:3])]
    assert trusted(site["alpha"]) == trusted(site["beta"]) == {serials[3]: "control"}


def test_a_host_that_is_renewed_and_told_in_the_same_visit_hears_of_both(site):
    for name in site.hosts:
        age(site, name)
    shown = findings(ced(site.control, "rotate-cert", "--json"))
    assert sum("its certificate is renewed" in line for line in shown) == 2, shown
    new = site.control.serial()
    assert [new in trusted(host) for host in site.hosts.values()] == [True, True], shown


def test_a_spoiled_rotation_json_is_named_and_stops_no_ping(site):
    well(ced(site.control, "rotate-cert"))
    path = ctrl_exec.rotation_path(site.control.config)
    for text in (b"{", b'{"former": 1}', b'{"former": {"zz": {}}}'):
        overwrite(path, text)
        done = well(ced(site.control, "ping", "--all"))
        assert "certificates are not looked after: " + path in done.err
        done = ced(site.control, "maintain")
        assert done.returncode == 1 and path in done.err and read(path) == text
    os.unlink(path)
    assert maintain(site) == ["OK nothing is due"]
    assert len(well(ced(site.control, "serial-status", "--json")).json["former"]) == 1  # its files are there


def test_a_rotation_json_of_a_newer_release_is_refused_as_it_is(site):
    path = ctrl_exec.rotation_path(site.control.config)
    ctrl_exec.edit_rotation(path, lambda rotation: rotation)
    saved = read(path)
    newer = json.dumps(dict(json.loads(saved), format=2)).encode()
    try:
        with open(path, "wb") as file:
            file.write(newer)
        for verb in ("maintain", "rotate-cert", "check"):
            done = site.control.run(verb)
            assert done.returncode == 1 and "written by a newer release" in done.out + done.err
        assert site.control.run("ping", "alpha").returncode == 0
        assert read(path) == newer
    finally:
        with open(path, "wb") as file:
            file.write(saved)


def test_fields_of_other_releases_in_rotation_json_stay(site):
    path = ctrl_exec.rotation_path(site.control.config)
    overwrite(path, b'{"later": {"a": 1}}')
    well(ced(site.control, "rotate-cert"))
    assert json.loads(read(path))["later"] == {"a": 1}


def test_only_one_ced_changes_certificates_at_a_time(site):
    with ctrl_exec.FileLock(site.control.file(ctrl_exec.VAR + "/upkeep.lock")):
        for verb in ("rotate-cert", "maintain"):
            done = ced(site.control, verb)
            assert done.returncode == 1 and "another ced looks after certificates now" in done.err


# --- 3. the CA is replaced -------------------------------------------------------------------------------


@pytest.fixture
def pair(site):
    """A function that pairs a host by a token: pair("gamma"); a name that is registered is paired anew."""
    control = site.control

    def make(name):
        host = site.hosts.get(name)
        if host is None:
            host = support.Host(tempfile.mkdtemp(dir=site.top), name, "rate_limit_disable = yes\n")
            os.chmod(host.root, 0o755)
            host.script("hello", "echo hello\n")
        known = ctrl_exec.find_agent(control.config.registry_dir, name)
        if known is not None:
            with ctrl_exec.registry_lock(control.config.registry_dir):
                ctrl_exec.remove_agent(control.config.registry_dir, name)
        token = control.json("pairing-token")[1]["token"]
        desk = control.open_pairing()
        words = ("--dispatcher", "127.0.0.1:%d" % desk.port, "--name", name)
        done = host.run("request-pairing", *words, env={"CTRL_EXEC_PAIRING_TOKEN": token})
        desk.stdin.close()
        desk.terminate()
        desk.wait(60)
        desk.stdout.close()
        assert done.returncode == 0, done.out + done.err
        if host.process is None:
            site.hosts[name] = host
            host.start()
        return host

    return make


def steady(site):
    """Call `maintain` until nothing is left to do; what the last call said."""
    for _ in range(6):
        shown = maintain(site)
        if not any(line.startswith("OK ") or "FAIL" in line for line in shown):
            break
    return shown


def issuers(site):
    """Which CA each certificate in use is of."""
    ca = site.control.config.ca
    certs = {name: host.config.cert for name, host in site.hosts.items()}
    certs["control"] = site.control.config.cert
    return {name: ctrl_exec.find_issuer(OPENSSL, ca, read(cert)) for name, cert in certs.items()}


def test_the_ca_is_replaced_and_every_host_moves_without_being_paired_again(site):
    config, hosts = site.control.config, site.hosts.values()
    old_ca, former = read(config.ca), identity(site.control)
    alpha = site["alpha"].config
    agent_cert, agent_key = (shutil.copy(path, site.top) for path in (alpha.cert, alpha.key))
    refused = ced(site.control, "retire-ca")
    assert refused.returncode == 1 and "first: ced setup-ca --next" in refused.err
    assert "ced maintain" in well(ced(site.control, "setup-ca", "--next")).out
    following = ctrl_exec.next_path(config.ca)
    again = ced(site.control, "setup-ca", "--next")
    assert again.returncode == 1 and "the CA has a successor" in again.err
    refused = ced(site.control, "retire-ca")
    assert refused.returncode == 1
    for who in ("alpha (has not heard of it)", "beta (has not", "this dispatcher (its certificate)"):
        assert who in refused.err
    assert_all_answer(site)
    assert steady(site) == ["OK nobody depends on the CA that is being replaced: ced retire-ca"]
    for host in hosts:
        assert len(ctrl_exec.load_cas(host.config.ca)) == 2 and host.process.poll() is None
    assert issuers(site) == dict.fromkeys(("alpha", "beta", "control"), following)
    assert_all_answer(site)
    new_ca = read(following)
    shown = findings(well(ced(site.control, "retire-ca", "--json")))
    assert shown[0].startswith("OK the CA is replaced; the former one is ")
    steady(site)
    assert read(config.ca) == new_ca != old_ca and not os.path.exists(following)
    for host in hosts:
        assert ctrl_exec.load_cas(host.config.ca) == ctrl_exec.split_pem(new_ca.decode())
    assert well(ced(site.control, "run", "--all", "hello")).returncode == 0
    assert ask_ping(site["alpha"], former) == (0, None)
    refusals = wait_until(lambda: site["alpha"].events("tls-failure"), what="the agent's log")
    assert "unable to get local issuer certificate" in refusals[-1]
    with impostor(site, "alpha", lambda *_: (200, GOOD_PING), agent_cert, agent_key):
        result = ping(site, "alpha")["alpha"]
    assert result["status"] == "unreachable" and "its certificate is refused" in result["error"]


def test_a_host_that_is_off_while_the_ca_changes_keeps_it_and_follows_when_it_is_back(site):
    site["beta"].stop()
    well(ced(site.control, "setup-ca", "--next"))
    steady(site)
    done = ced(site.control, "retire-ca")
    assert done.returncode == 1 and "beta (has not heard of it)" in done.err and "alpha" not in done.err
    assert "beta (has not heard of it)" in "".join(maintain(site))
    assert "beta (has not heard of it)" in ced(site.control, "serial-status").out
    site["beta"].start()
    assert steady(site) == ["OK nobody depends on the CA that is being replaced: ced retire-ca"]
    well(ced(site.control, "retire-ca"))
    assert_all_answer(site)


def test_a_host_that_is_given_up_does_not_hold_up_the_new_ca(site):
    site["beta"].stop()
    well(ced(site.control, "setup-ca", "--next"))
    steady(site)
    well(ced(site.control, "unpair", "beta"))
    steady(site)
    well(ced(site.control, "retire-ca"))
    assert ping(site, "alpha")["alpha"]["status"] == "ok"


def test_a_host_that_knows_the_new_ca_but_not_the_new_dispatcher_is_told_at_the_next_contact(site):
    well(ced(site.control, "setup-ca", "--next"))
    maintain(site)
    site["beta"].stop()
    steady(site)
    following = ctrl_exec.next_path(site.control.config.ca)
    assert issuers(site) == dict.fromkeys(("alpha", "beta", "control"), following)
    done = ced(site.control, "retire-ca")
    assert done.returncode == 1
    assert done.err.splitlines()[0].endswith(": beta (trusts only our former certificate)")
    site["beta"].start()
    done = well(ced(site.control, "run", "beta", "hello"))
    assert "hello" in done.out and site.control.serial() in trusted(site["beta"])
    steady(site)  # a run writes nothing down
    well(ced(site.control, "retire-ca"))
    assert_all_answer(site)


@pytest.mark.parametrize("phase", ["before the dispatcher moves", "after it", "after retire-ca"])
def test_a_host_can_be_paired_in_every_phase_of_a_new_ca(site, pair, phase):
    well(ced(site.control, "setup-ca", "--next"))
    if phase != "before the dispatcher moves":
        steady(site)
        assert issuers(site)["control"] == ctrl_exec.next_path(site.control.config.ca)
    if phase == "after retire-ca":
        well(ced(site.control, "retire-ca"))
    pair("gamma")
    assert "hello" in well(ced(site.control, "run", "gamma", "hello")).out
    if phase == "before the dispatcher moves":
        done = ced(site.control, "retire-ca")
        assert done.returncode == 1 and "gamma (has not heard of it)" in done.err
    assert_all_answer(site)
    shown = steady(site)
    if phase != "after retire-ca":
        assert shown == ["OK nobody depends on the CA that is being replaced: ced retire-ca"]
        well(ced(site.control, "retire-ca"))
        steady(site)
    assert_all_answer(site)
    for host in site.hosts.values():
        assert ctrl_exec.load_cas(host.config.ca) == ctrl_exec.load_cas(site.control.config.ca)


def test_a_host_that_is_paired_again_while_the_ca_changes_is_named_until_it_has_moved(site, pair):
    well(ced(site.control, "setup-ca", "--next"))
    site["beta"].stop()
    maintain(site)
    pair("alpha")  # with the CA that is going
    done = ced(site.control, "retire-ca")
    assert done.returncode == 1 and "alpha (" in done.err and "beta (has not heard of it)" in done.err
    site["beta"].start()
    assert steady(site) == ["OK nobody depends on the CA that is being replaced: ced retire-ca"]
    well(ced(site.control, "retire-ca"))
    assert_all_answer(site)


# --- 4. revocation of a dispatcher -----------------------------------------------------------------------


def test_a_revoked_dispatcher_is_refused_by_all_and_a_host_that_was_off_is_told_later(site):
    former = identity(site.control)
    done = ced(site.control, "revoke", "--dispatcher", former.serial)
    assert done.returncode == 1 and "is the certificate in use here" in done.err
    well(ced(site.control, "rotate-cert"))
    site["beta"].stop()
    spelled = "0x" + former.serial.upper()
    shown = findings(ced(site.control, "revoke", "--dispatcher", spelled, "--json"))
    assert "OK alpha: it refuses %s" % former.serial in shown
    assert "FAIL dispatcher serial %s is not refused yet by beta" % former.serial in shown
    assert ask_ping(site["alpha"], former) == (403, {"error": "certificate revoked", "status": "forbidden"})
    assert site["alpha"].events("revoked-cert")
    assert "revoked: %s" % former.serial in ced(site.control, "serial-status").out
    site["beta"].start()
    assert ask_ping(site["beta"], former)[0] == 200
    assert not any("not refused yet" in line for line in maintain(site))
    assert ask_ping(site["beta"], former)[0] == 403
    assert former.serial in ctrl_exec.load_revoked(site["beta"].config.revoked_serials)
    assert_all_answer(site)


# --- 5. check --------------------------------------------------------------------------------------------


def check(site, **how):
    done = ced(site.control, "check", "--json", **how)
    lines = findings(done)
    assert done.returncode == any(line.startswith("FAIL") for line in lines)
    assert len(ced(site.control, "check", **how).out.splitlines()) == len(lines)
    return lines


def test_check_is_content_with_a_healthy_deployment(site):
    assert {line[:2] for line in check(site)} == {"OK"}
    assert "OK alpha answers, and its clock agrees" in check(site)


SPOILED = {
    "ca.key": (0o644, "lets others at a private key"),
    "dispatcher.key": (0o604, "lets others at a private key"),
    "ctrl-exec.conf": (0o666, "is writable by everybody"),
    "ca.crt": (0o666, "is writable by everybody"),
}


@pytest.mark.parametrize("name", sorted(SPOILED))
def test_check_names_a_file_that_others_can_get_at(site, name):
    mode, words = SPOILED[name]
    path = site.control.file(ctrl_exec.ETC + "/" + name)
    os.chmod(path, mode)
    (line,) = [line for line in check(site) if line.startswith("FAIL")][:1]
    assert path in line and words in line


@pytest.mark.skipif(not support.IS_ROOT, reason="giving a file away needs root")
def test_check_names_a_file_that_belongs_to_somebody_else(site):
    path = site.control.config.cert
    os.chown(path, 12345, -1)
    assert [line for line in check(site) if "belongs to user 12345" in line and line.startswith("FAIL")]


def test_check_tells_of_dates(site):
    age_dispatcher(site, 340)
    for name, days in (("alpha", 20), ("beta", -2)):
        edit(site, name, lambda agent: agent._replace(expiry=ctrl_exec.iso_time(time.time() + days * DAY)))
    lines = check(site)
    assert "WARN %s expires in 24 days" % site.control.config.cert in lines
    assert "FAIL beta: its certificate has expired" in lines
    assert any(line.startswith("WARN alpha: its certificate expires in") for line in lines)
    age_dispatcher(site, 400)
    assert any(line.startswith("FAIL") and "expired" in line for line in check(site)), check(site)
    age_dispatcher(site, -2)
    assert any(line.startswith("FAIL") and "not yet valid" in line for line in check(site)), check(site)


@pytest.mark.parametrize("skew, words", [(3600, "ahead of"), (-3600, "behind"), (30, "")])
def test_check_compares_clocks(site, skew, words):
    def answer(*_):
        return 200, dict(GOOD_PING, time=ctrl_exec.iso_time(time.time() + skew))

    with impostor(site, "alpha", answer):
        (line,) = [line for line in check(site) if "alpha" in line and "clock" in line]
    if not words:
        assert line == "OK alpha answers, and its clock agrees"
    else:
        assert line.startswith("WARN alpha: its clock is 3") and line.endswith(" s %s this one" % words)


def test_check_names_a_host_that_does_not_answer_and_one_that_is_revoked(site):
    site["alpha"].stop()
    well(ced(site.control, "revoke", "beta"))
    lines = check(site)
    assert any(line.startswith("WARN alpha: ") and "refused the connection" in line for line in lines)
    assert "FAIL beta: its certificate is revoked" in lines
