"""Calling: whatever goes wrong is said in words, with the truth about whether the host can have acted."""

import json
import socket
import ssl
import struct
import time

import pytest

import ctrl_exec
import support
from peers import Peer, answering, answering_json, read_request

CONNECT_SECONDS = 4
READ_SECONDS = 4


def saying_nothing_after_tls(raw, context):
    with context.wrap_socket(raw, server_side=True) as tls:
        read_request(tls)
        tls.recv(1)  # until the caller goes


def dripping(raw, context):
    """Speak one byte at a time, always in time for a deadline that starts anew with each read."""
    with context.wrap_socket(raw, server_side=True) as tls:
        read_request(tls)
        for byte in b"HTTP/1.1 200 OK\r\nX-A: " + b"y" * 1000:
            tls.sendall(bytes([byte]))
            time.sleep(0.1)


def silent(raw, _):
    while raw.recv(65536):
        pass


def closing_at_once(raw, _):
    raw.close()


def closing_after_hello(raw, _):
    raw.recv(65536)
    raw.close()


def resetting_after_hello(raw, _):
    raw.recv(65536)
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    raw.close()


def speaking_plain_http(raw, _):
    raw.recv(65536)
    raw.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
    raw.close()


def speaking_ssh(raw, _):
    raw.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
    raw.recv(65536)
    raw.close()


def resetting_after_request(raw, context):
    tls = context.wrap_socket(raw, server_side=True)
    read_request(tls)
    tls.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    socket.socket.close(tls)


def plain(raw, context):
    """A handshake with whatever the context says, then a request if there is one."""
    with context.wrap_socket(raw, server_side=True) as tls:
        read_request(tls)


def refusing_certificate(raw, context):
    """Refuse the handshake, and stay until the caller has read why."""
    tls = context.wrap_socket(raw, server_side=True, do_handshake_on_connect=False)
    try:
        tls.do_handshake()
    except ssl.SSLError:
        while socket.socket.recv(tls, 65536):
            pass
    tls.close()


GOOD_RUN = {"exit": 0, "stdout": "", "stderr": ""}
HUGE = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000000000\r\n\r\n"

# name: (behaviour, certificate, state, part of the error)
FAILURES = {
    "not-answering-tls": (silent, "own", "unreachable", "did not finish TLS within 4 s"),
    "closing-at-once": (closing_at_once, "own", "unreachable", "closed the connection during TLS"),
    "closing-after-hello": (closing_after_hello, "own", "unreachable", "closed the connection during TLS"),
    "resetting-after-hello": (
        resetting_after_hello,
        "own",
        "unreachable",
        "closed the connection during TLS",
    ),
    "plain-http": (speaking_plain_http, "own", "unreachable", "it does not speak TLS"),
    "ssh": (speaking_ssh, "own", "unreachable", "it does not speak TLS"),
    "self-signed": (plain, "foreign", "unreachable", "its certificate is refused: "),
    "client-certificate": (plain, "dispatcher", "unreachable", ""),
    "somebody-else": (plain, "other", "unreachable", "wrong identity: "),
    "weak-cipher": (plain, "weak", "unreachable", "TLS with "),
    "not-knowing-our-ca": (
        refusing_certificate,
        "demanding",
        "unreachable",
        "it does not know the CA of our certificate",
    ),
    "closing-after-request": (answering(b""), "own", "unknown", "closed the connection"),
    "resetting-after-request": (resetting_after_request, "own", "unknown", "closed the connection"),
    "half-a-head": (answering(b"HTTP/1.1 200 OK\r\nConte"), "own", "unknown", "closed the connection"),
    "half-a-body": (
        answering(b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{}"),
        "own",
        "unknown",
        "closed the connection",
    ),
    "garbage": (answering(b"\0\xff" * 100 + b"\r\n\r\n"), "own", "unknown", "the answer is not HTTP"),
    "garbage-without-end": (answering(b"\xff" * 40000), "own", "unknown", "before the end of the headers"),
    "chunk-garbage": (
        answering(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"),
        "own",
        "unknown",
        "chunks are malformed",
    ),
    "huge-length": (answering(HUGE + b"x" * 1000), "own", "unknown", "the answer has more than"),
    "not-json": (answering_json(b"<html>"), "own", "unknown", "not JSON"),
    "json-list": (answering_json(b"[1]"), "own", "unknown", "not a JSON object"),
    "deep-json": (answering_json(b'{"a":' * 100000), "own", "unknown", "nested deeper"),
    "names-twice": (answering_json(b'{"exit":1,"exit":0}'), "own", "unknown", "is there twice"),
    "no-exit": (answering_json({"stdout": "", "stderr": ""}), "own", "unknown", "no valid `exit`"),
    "exit-true": (answering_json(dict(GOOD_RUN, exit=True)), "own", "unknown", "no valid `exit`"),
    "exit-text": (answering_json(dict(GOOD_RUN, exit="0")), "own", "unknown", "no valid `exit`"),
    "stdout-list": (answering_json(dict(GOOD_RUN, stdout=[])), "own", "unknown", "no valid `stdout`"),
    "stderr-null": (answering_json(dict(GOOD_RUN, stderr=None)), "own", "unknown", "no valid `stderr`"),
    "forbidding": (answering_json({"error": "serial mismatch"}, 403), "own", "refused", "serial mismatch"),
    "forbidding-oddly": (
        answering_json({"error": "no", "exit": 0, "stdout": [1], "stderr": 5}, 403),
        "own",
        "refused",
        "no",
    ),
    "busy": (answering_json({"error": "it runs already"}, 409), "own", "busy", "it runs already"),
    "failing": (answering_json({}, 503), "own", "busy", "the agent answered 503"),
    "error-an-object": (answering_json({"error": {"a": 1}}, 500), "own", "failed", "a"),
    "slow": (saying_nothing_after_tls, "own", "timeout", "read timeout after 4s"),
    "dripping": (dripping, "own", "timeout", "read timeout after 4s"),
}

# name: (change to the registry entry, part of the error); nothing of ours listens there
NOWHERE = {
    "no-such-name": ({"hostname": "no-such-host.invalid", "lookup_by": "hostname"}, "did not resolve"),
    "no-name-at-all": ({"hostname": "a..b", "lookup_by": "hostname"}, "did not resolve"),
    "name-too-long": ({"hostname": "a" * 64 + ".invalid", "lookup_by": "hostname"}, "did not resolve"),
    "refused": ({}, "refused the connection"),
    "unroutable": ({"ip": "255.255.255.255"}, "unreachable"),
    "black-hole": ({}, "no answer from 127.0.0.1 port "),
}


# answers to ping and discovery that pass for one at first sight
ODD = {"status": "ok", "host": "\x1b[2J", "version": "\x1b[2J\n", "expiry": "tomorrow"}
ODD_ANSWERS = {
    "odd-1": dict(ODD, scripts=[{"name": "a", "path": ["x"], "profile": {"y": 1}, "executable": "z"}]),
    "odd-2": dict(ODD, expiry="9" * 400, scripts=[{"name": "a", "path": "\x1b[2J\n"}], tags=["a"]),
    "odd-3": dict(ODD, expiry="2999-99-99T99:99:99Z", scripts=[{"name": "a"}, 5], tags={"\x1b": {}}),
}


class BlackHole:
    """A port whose queue of connections is full, so that the kernel drops what else comes."""

    def __init__(self):
        self._listener = socket.socket()
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(0)
        self.port = self._listener.getsockname()[1]
        self._fillers = []
        for _ in range(8):
            sock = socket.socket()
            sock.setblocking(False)
            sock.connect_ex(("127.0.0.1", self.port))
            self._fillers.append(sock)

    def close(self):
        for sock in (*self._fillers, self._listener):
            sock.close()


def server_contexts(control, host, other, foreign):
    """TLS servers with the certificates of various peers."""
    identities = {
        "own": ctrl_exec.agent_identity(host.config),
        "other": ctrl_exec.agent_identity(other.config),
        "dispatcher": control.identity,
        "foreign": foreign.identity,
        "weak": ctrl_exec.agent_identity(host.config),
        "demanding": ctrl_exec.agent_identity(host.config),
    }
    contexts = {}
    for name, identity in identities.items():
        contexts[name] = context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(identity.cert, identity.key)
    contexts["weak"].maximum_version = ssl.TLSVersion.TLSv1_2
    contexts["weak"].set_ciphers("ECDHE-ECDSA-AES128-SHA")
    contexts["demanding"].verify_mode = ssl.CERT_REQUIRED
    contexts["demanding"].load_verify_locations(foreign.identity.ca)
    return contexts


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    """A control host whose registry has one working agent and one peer for each way to go wrong."""
    top = tmp_path_factory.mktemp("client")
    conf = "connect_timeout = %d\nread_timeout = %d\nmax_parallel = 100\n" % (CONNECT_SECONDS, READ_SECONDS)
    with support.Deployment(top, ("good",)) as deployment:
        control = deployment.control
        with open(control.config.path, "a", encoding="ascii") as file:
            file.write(conf)
        other = deployment.add("other")
        foreign = support.Control(top / "foreign")
        contexts = server_contexts(control, deployment["good"], other, foreign)
        good = ctrl_exec.find_agent(control.config.registry_dir, "good")

        def register(name, **changes):
            entry = good._replace(**dict({"name": name, "hostname": name, "cert_name": "good"}, **changes))
            with ctrl_exec.registry_lock(control.config.registry_dir):
                ctrl_exec.save_agent(control.config.registry_dir, entry)

        peers = []
        for name, (behave, certificate, _, _) in FAILURES.items():
            port = support.free_port()
            register(name, port=port)
            peers.append(Peer(port, behave, contexts[certificate]))
        for name, answer in ODD_ANSWERS.items():
            port = support.free_port()
            register(name, port=port)
            peers.append(Peer(port, answering_json(answer), contexts["own"]))
        hole = BlackHole()
        for name, (changes, _) in NOWHERE.items():
            port = hole.port if name == "black-hole" else support.free_port()
            register(name, **dict({"port": port}, **changes))
        yield control
        for peer in (*peers, hole):
            peer.close()


@pytest.fixture(scope="module")
def outcome(fleet):
    """What one `ced run` says about the good host and all the others."""
    names = ["good", *FAILURES, *NOWHERE]
    done = fleet.run("run", *names, "hello", "--json")
    return done, json.loads(done.out)


def entry_of(outcome, name):
    return {entry["host"]: entry for entry in outcome[1]["results"]}[name]


def test_every_host_gets_exactly_one_result_and_the_status_is_1(outcome):
    done, answer = outcome
    assert done.returncode == 1
    assert sorted(entry["host"] for entry in answer["results"]) == sorted(["good", *FAILURES, *NOWHERE])
    assert {entry["reqid"] for entry in answer["results"]} == {answer["reqid"]}


def test_the_host_that_works_is_not_disturbed_by_the_others(outcome):
    entry = entry_of(outcome, "good")
    assert (entry["state"], entry["exit"], entry["stdout"]) == ("ok", 0, "hello\n")
    assert "error" not in entry


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_has_its_state_and_its_words(outcome, name):
    _, _, state, words = FAILURES[name]
    entry = entry_of(outcome, name)
    assert entry["state"] == state, entry
    assert words in entry["error"]
    assert (entry["stdout"], entry["stderr"], entry["script"]) == ("", "", "hello")
    assert entry["exit"] == -1
    assert "Error" not in entry["error"] and "_" not in entry["error"].replace(name, "")


@pytest.mark.parametrize("name", ["closing-at-once", "closing-after-hello", "resetting-after-hello"])
def test_who_closes_during_tls_may_have_blocked_us_and_it_says_so(fleet, name):
    assert "during TLS (perhaps it has blocked this address: " in fleet.run("ping", name).out


def test_answers_of_wrong_types_do_not_keep_other_hosts_from_being_shown(fleet):
    names = ["stdout-list", "stderr-null", "exit-text", "forbidding-oddly", "error-an-object"]
    done = fleet.run("run", *names, "good", "hello")
    assert (done.returncode, done.out.count("==> ")) == (1, 6), done.err
    assert "==> good  [OK  exit:0  " in done.out
    assert "internal error" not in done.err


@pytest.mark.parametrize("verb", ("ping", "discovery"))
@pytest.mark.parametrize("json_option", ((), ("--json",)))
def test_odd_answers_to_other_verbs_do_not_keep_other_hosts_from_being_shown(fleet, verb, json_option):
    done = fleet.run(verb, "odd-1", "odd-2", "odd-3", "good", *json_option)
    assert done.returncode in (0, 1), done.err
    assert "good" in done.out and "odd-1" in done.out and "odd-2" in done.out and "odd-3" in done.out
    assert "internal error" not in done.err
    assert "\x1b" not in done.out + done.err


@pytest.mark.parametrize("name", ("slow", "dripping"))
def test_a_read_timeout_is_worded_as_scripts_expect_it(outcome, name):
    assert entry_of(outcome, name)["error"] == "read timeout after 4s"


@pytest.mark.parametrize("name", NOWHERE)
def test_a_host_that_cannot_be_reached_is_said_to_be_so_and_why(outcome, name):
    entry = entry_of(outcome, name)
    assert entry["state"] == "unreachable", entry
    assert NOWHERE[name][1] in entry["error"]


def test_nothing_was_a_bug(fleet, outcome):
    assert outcome[0].err == ""
    assert "ACTION=bug" not in fleet.log()


def test_each_result_is_one_line_of_the_log_with_the_request_id(fleet, outcome):
    lines = [line for line in fleet.events("run") if "REQID=" + outcome[1]["reqid"] in line]
    assert len(lines) == len(outcome[1]["results"])
    assert [line for line in lines if "HOST=slow" in line and "STATE=timeout" in line]


def test_a_lost_answer_is_followed_by_how_to_find_the_result(fleet):
    done = fleet.run("run", "closing-after-request", "hello")
    assert done.returncode == 1
    first, second = done.out.splitlines()[:2]
    reqid = first.rpartition("req:")[2].rstrip("]")
    assert first.startswith("==> closing-after-request  [FAIL  exit:-1  ")
    assert second.startswith("unknown: ") and reqid in second and "may still run" in second


def test_a_host_that_was_never_reached_is_not_said_to_run_anything(fleet):
    done = fleet.run("run", "refused", "hello")
    assert done.returncode == 1
    assert "unreachable: 127.0.0.1 port " in done.out
    assert "is it running there?" in done.out
    assert "may still run" not in done.out


@pytest.mark.parametrize("verb", ("ping", "discovery"))
def test_other_verbs_say_the_same(fleet, verb):
    names = ["refused", "no-such-name", "plain-http", "somebody-else", "garbage", "not-json", "good"]
    code, answer = fleet.json(verb, *names)
    if verb == "ping":
        found = {entry["host"]: (entry["status"], entry.get("error", "")) for entry in answer["results"]}
    else:
        found = {name: (entry["status"], entry.get("error", "")) for name, entry in answer["hosts"].items()}
    assert code == 1
    assert found["good"] == ("ok", "")
    assert found["refused"][0] == "unreachable" and "refused the connection" in found["refused"][1]
    assert found["no-such-name"][0] == "unreachable" and "did not resolve" in found["no-such-name"][1]
    assert "it does not speak TLS" in found["plain-http"][1]
    assert "wrong identity" in found["somebody-else"][1]


def test_a_request_with_nothing_behind_it_reaches_no_impostor(fleet, tmp_path):
    """The identity is checked before a byte of the request leaves: the token stays here."""
    seen = []

    def listen(raw, context):
        with context.wrap_socket(raw, server_side=True) as tls:
            try:
                seen.append(tls.recv(65536))
            except OSError:  # reset, because the caller left our session tickets unread
                seen.append(b"")

    entry = ctrl_exec.find_agent(fleet.config.registry_dir, "good")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    other = support.Host(tmp_path / "impostor", "impostor")
    fleet.register(other)
    identity = ctrl_exec.agent_identity(other.config)
    context.load_cert_chain(identity.cert, identity.key)
    peer = Peer(other.port, listen, context)
    with ctrl_exec.registry_lock(fleet.config.registry_dir):
        impersonated = entry._replace(name="impersonated", port=other.port)
        ctrl_exec.save_agent(fleet.config.registry_dir, impersonated)
    try:
        code, answer = fleet.json("run", "impersonated", "hello", env={"ENVEXEC_TOKEN": "secret-token"})
        support.wait_until(lambda: seen, what="the end of the connection")
    finally:
        peer.close()
    assert (code, answer["results"][0]["state"]) == (1, "unreachable")
    assert "shows the certificate of impostor, not of good" in answer["results"][0]["error"]
    assert seen == [b""]


def test_a_revoked_agent_is_refused_before_anything_is_sent(fleet):
    serial = ctrl_exec.find_agent(fleet.config.registry_dir, "other").serial
    with open(fleet.config.revoked_serials, "a", encoding="ascii") as file:
        file.write(serial + "\n")
    code, answer = fleet.json("run", "somebody-else", "hello")
    assert (code, answer["results"][0]["state"]) == (1, "unreachable")
