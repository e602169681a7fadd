"""The HTTP API: real servers on real files, asked over real sockets."""

import base64
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time

import pytest

import ctrl_exec
import support
from support import ApiServer, parse_events, read_reply, send_http, wait_until

GUARDED = [operation for operation in ctrl_exec.OPERATIONS if operation.action]
ALLOW = "api_auth_default = allow\n"

HOOK = """#!/bin/sh
cat >> "$0.seen"
echo >> "$0.seen"
case $ENVEXEC_TOKEN in
    good) ;;
    bad) exit 2 ;;
    low) exit 3 ;;
    crash) kill -9 $$ ;;
    *) exit 1 ;;
esac
case $ENVEXEC_ACTION in
    status | cancel) [ -z "$ENVEXEC_SUBMITTER" ] || [ "$ENVEXEC_SUBMITTER" = "$ENVEXEC_USERNAME" ] ;;
esac
"""


@pytest.fixture(scope="module")
def api(deployment):
    """An open API, shared by tests that only use it."""
    with ApiServer(deployment.control) as server:
        yield server


@pytest.fixture(scope="module")
def hooked(deployment):
    """An API with a hook that takes the token `good`, and shows runs to their submitters only."""
    control = deployment.control
    path = control.put("/hooks/api", HOOK, 0o755)
    with ApiServer(control, "hooked", "auth_hook = %s\n" % path) as server:
        server.hook = path
        yield server


@pytest.fixture
def start(request, deployment):
    """A function that makes an API of one's own, on the shared deployment or on one with hosts of one's own,
    and ends it with the test."""
    made = []

    def make(conf=ALLOW, *hosts):
        one = request.getfixturevalue("fresh")(*hosts) if hosts else deployment
        server = ApiServer(one.control, "own", conf)
        server.deployment = one
        made.append(server)
        return server

    yield make
    for server in made:
        server.stop()


@contextlib.contextmanager
def busy_places(api, *hosts):
    """As many connections that wait for a run of their own, each on another host."""
    waiting = []
    for host in hosts:
        waiting.append(api.connect())
        send_http(waiting[-1], "POST", "/run", {"hosts": [host], "script": "sleep", "args": ["600"]})
    locks = lambda: ctrl_exec.list_locks(api.config.lock_dir)  # noqa: E731
    wait_until(lambda: len([one for one in locks() if "reqid" in one]) == len(hosts), what="the runs")
    held = {lock["reqid"] for lock in locks()}
    try:
        yield
    finally:
        ended = [api.deployment.control.run("cancel", reqid).returncode for reqid in held]
    assert set(ended) == {0}
    for sock in waiting:
        assert read_reply(sock)[0] == 200
        sock.close()


def seen(server):
    """What the hook was told, one object for each request."""
    try:
        with open(server.hook + ".seen", encoding="utf-8") as file:
            return [json.loads(line) for line in file if line.strip()]
    except FileNotFoundError:
        return []


def path_of(operation, reqid="0123456789abcdef"):
    return operation.path.replace("*", reqid)


def body_of(operation, **more):
    fields = {"hosts": ["alpha"], "script": "hello"}
    names = {field.name for field in operation.fields}
    return {**{name: value for name, value in fields.items() if name in names}, **more}


def in_background(work):
    """Start `work()` in a thread; call what comes back for its result."""
    found = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()

    def result():
        thread.join(60)
        assert found, "it has not ended, or failed"
        return found[0]

    return result


# --- what clients of other releases read ------------------------------------------------------------------


def test_a_run_answers_with_what_each_host_wrote(api):
    reply = api.run_script(["alpha", "beta"], "args", "a b", "ü", username="ann", token="t")
    assert reply.status == 200 and reply.headers["content-type"] == "application/json"
    assert reply.json["ok"] is True
    results = {entry["host"]: entry for entry in reply.json["results"]}
    assert sorted(results) == ["alpha", "beta"]
    for entry in results.values():
        assert {"host", "exit", "stdout", "stderr", "rtt", "reqid", "script"} <= set(entry)
        assert (entry["script"], entry["exit"], entry["stdout"]) == ("args", 0, "a b\0ü\0")
        assert entry["reqid"] == reply.json["reqid"] and re.fullmatch(r"\d+ms", entry["rtt"])


def test_a_script_that_fails_is_an_answer(api):
    reply = api.run_script(["alpha"], "exit", "7")
    assert reply.status == 200 and reply.json["results"][0]["exit"] == 7
    reply = api.run_script(["alpha"], "nonesuch")
    assert reply.status == 200 and reply.json["results"][0]["error"] == "script not permitted"


def test_the_script_is_told_the_user_and_token_of_the_body(api):
    context = json.loads(api.run_script(["alpha"], "context", username="ann", token="s3").json["results"][0]["stdout"])
    assert (context["username"], context["token"]) == ("ann", "s3")


def test_status_of_a_synchronous_run(api):
    reqid = api.run_script(["alpha", "beta"], "hello").json["reqid"]
    status = api.call("GET", "/status/" + reqid).json
    assert (status["mode"], status["hosts"]) == ("sync", ["alpha", "beta"])
    assert [entry["stdout"] for entry in status["results"]] == ["hello\n"] * 2
    assert type(status["completed"]) is int and abs(status["completed"] - time.time()) < 600
    assert status["complete"] is True and status["pending"] == []


def test_status_of_an_asynchronous_run(api):
    reply = api.run_script(["alpha", "beta"], "sleep", "0.5", **{"async": True})
    assert reply.status == 202
    assert sorted((entry["host"], entry["status"]) for entry in reply.json["results"]) == [
        ("alpha", "accepted"), ("beta", "accepted"),
    ]  # fmt: skip
    path = "/status/" + reply.json["reqid"]
    first = api.call("GET", path).json
    assert first["mode"] == "async" and set(first["hosts"]) == {"alpha", "beta"}
    assert (first["complete"], first["completed"]) == (not first["pending"], None) or first["complete"]
    last = wait_until(lambda: (lambda one: one["complete"] and one)(api.call("GET", path).json))
    assert last["pending"] == [] and type(last["completed"]) is int
    assert {entry["status"] for entry in last["hosts"].values()} == {"done"}
    assert {entry["exit"] for entry in last["hosts"].values()} == {0}


def test_ping_and_discovery(api):
    reply = api.call("POST", "/ping", {"hosts": ["alpha", "beta"], "username": "ann", "token": None})
    assert reply.status == 200
    for entry in reply.json["results"]:
        assert {"host", "status", "rtt", "expiry", "version"} <= set(entry) and entry["status"] == "ok"
    everything = api.call("GET", "/discovery").json["hosts"]
    assert set(everything) == {"alpha", "beta"}
    some = api.call("POST", "/discovery", {"hosts": ["alpha"]}).json["hosts"]
    assert set(some) == {"alpha"} and some["alpha"]["version"] == ctrl_exec.__version__
    assert all({"name", "path", "executable"} <= set(script) for script in some["alpha"]["scripts"])


def test_patterns_and_ranges_name_hosts(api):
    assert {entry["host"] for entry in api.call("POST", "/ping", {"hosts": ["*"]}).json["results"]} == {"alpha", "beta"}
    assert api.call("POST", "/ping", {"hosts": ["alph[1-2]"]}).status == 404


def test_cancel_ends_a_run(api):
    reqid = api.run_script(["alpha"], "sleep", "600", **{"async": True}).json["reqid"]
    reply = api.call("POST", "/cancel/" + reqid)
    assert reply.status == 200
    assert [(entry["host"], entry["status"]) for entry in reply.json["results"]] == [("alpha", "cancelled")]
    entry = api.call("GET", "/status/" + reqid).json["hosts"]["alpha"]
    assert entry["cancelled"] is True and entry["exit"] != 0


def test_runs_are_the_records_that_ced_has(api, deployment):
    reqid = api.run_script(["alpha"], "hello", username="ann").json["reqid"]
    status, shown = deployment.control.json("history", "--last", "50")
    assert status == 0 and shown["runs"] == api.call("GET", "/runs?last=50").json["runs"]
    (record,) = [run for run in shown["runs"] if run["reqid"] == reqid]
    assert (record["username"], record["source_ip"]) == ("ann", "127.0.0.1")
    assert len(api.call("GET", "/runs?last=1").json["runs"]) == 1
    assert deployment.control.run("status", reqid).out.endswith("==> alpha  [done  exit:0]\nhello\n")


def test_what_ced_ran_has_a_status_here(api, deployment):
    _, ran = deployment.control.json("run", "alpha", "hello")
    assert api.call("GET", "/status/" + ran["reqid"]).json["results"][0]["stdout"] == "hello\n"


def test_bytes_that_are_no_text_come_exactly(api, deployment):
    deployment["alpha"].script("bytes", "printf 'a\\377\\000b'\n")
    deployment["alpha"].reload()
    entry = api.run_script(["alpha"], "bytes").json["results"][0]
    assert base64.b64decode(entry["stdout_base64"]) == b"a\xff\0b"


def test_a_dead_host_is_a_result_and_delays_nobody(start):
    api = start(ALLOW, "up", "down")
    api.deployment["down"].stop()
    with api:
        results = {entry["host"]: entry for entry in api.run_script(["up", "down"], "hello").json["results"]}
        assert results["up"]["state"] == "ok"
        assert results["down"]["state"] == "unreachable" and "refused" in results["down"]["error"]
        figures = api.call("GET", "/metrics").body.decode()
    assert 'ctrl_exec_runs_total{state="unreachable"} 1\n' in figures
    assert 'ctrl_exec_agent_handshakes_total{result="failed"} 1\n' in figures


# --- who may ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", GUARDED, ids=lambda operation: operation.name)
def test_without_a_hook_everything_that_acts_is_denied(operation, start_denying):
    body = body_of(operation) if operation.method == "POST" else None
    reply = start_denying.call(operation.method, path_of(operation), body, Authorization="Bearer x")
    assert reply.status == (404 if operation.path.endswith("*") else 403)
    assert reply.json["ok"] is False and "results" not in reply.json


@pytest.fixture(scope="module")
def start_denying(deployment):
    with ApiServer(deployment.control, "denying", "") as server:
        yield server


def test_a_denial_says_nothing_about_hosts_or_runs(start_denying):
    known, unknown = (start_denying.run_script([name], "hello") for name in ("alpha", "gamma"))
    assert known.status == unknown.status == 403
    known.json.pop("reqid", None)
    assert known.json == unknown.json


@pytest.mark.parametrize("path", ["/", "/health", "/openapi.json"])
def test_what_is_open_needs_no_token(start_denying, path):
    assert start_denying.call("GET", path).status == 200


@pytest.mark.parametrize("token, code", [("bad", 2), ("low", 3), ("", 1), ("crash", 1)])
def test_the_hooks_answer_is_the_code(hooked, token, code):
    reply = hooked.run_script(["alpha"], "hello", token=token)
    assert (reply.status, reply.json["code"]) == (403, code)


@pytest.mark.parametrize("operation", GUARDED, ids=lambda operation: operation.name)
def test_the_hook_is_asked_about_every_request(hooked, operation):
    reqid = hooked.run_script(["alpha"], "hello", username="ann", token="good").json["reqid"]
    before = len(seen(hooked))
    body = body_of(operation, username="ann") if operation.method == "POST" else {"username": "ann"}
    reply = hooked.call(operation.method, path_of(operation, reqid), body, Authorization="Bearer good")
    assert reply.status in operation.answers
    first, told = seen(hooked)[before:]
    facts = ("action", "operation", "username", "token", "source_ip", "dispatcher", "via")
    same = ["ann", "good", "127.0.0.1", "control", "api"]
    assert [first[key] for key in facts] == ["api", "api", *same] and (first["script"], first["hosts"]) == ("", [])
    older = {"discovery": "ping"}.get(operation.action, operation.action)
    assert [told[key] for key in facts] == [older, operation.action, *same]
    if operation.path.endswith("*"):
        assert (told["reqid"], told["submitter"], told["submitter_ip"]) == (reqid, "ann", "127.0.0.1")


def test_what_is_not_yours_is_answered_as_what_is_not_there(hooked):
    reqid = hooked.run_script(["alpha"], "hello", username="ann", token="good").json["reqid"]
    for method, path in (("GET", "/status/"), ("GET", "/events/"), ("POST", "/cancel/")):
        asked = {"username": "eve", "token": "good"}
        theirs, none = (hooked.call(method, path + one, asked) for one in (reqid, "0" * 16))
        assert (theirs.status, none.status) == (404, 404)
        assert theirs.body.replace(reqid.encode(), b"0" * 16) == none.body
        assert theirs.headers == none.headers


def test_generic_denials_say_no_more(deployment):
    path = deployment.control.put("/hooks/generic", HOOK, 0o755)
    with ApiServer(deployment.control, "generic", "auth_hook = %s\nauth_deny_generic = yes\n" % path) as server:
        bodies = {server.run_script(["alpha"], "hello", token=token).body for token in ("bad", "low", "")}
    assert len(bodies) == 1 and b"credentials" not in bodies.pop()


def test_the_callers_address_is_not_what_a_header_says(hooked):
    before = len(seen(hooked))
    body = {"hosts": ["alpha"], "token": "good"}
    hooked.call("POST", "/ping", body, X_Forwarded_For="10.9.9.9", Forwarded="for=10.9.9.9")
    assert seen(hooked)[before]["source_ip"] == "127.0.0.1"


# --- web pages ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("origin", ["null", "https://evil.example", "http://localhost:1", "http://localhost.evil"])
def test_web_pages_from_elsewhere_are_refused(api, origin):
    reply = api.call("GET", "/health", Origin=origin)
    assert reply.status == 403 and not [name for name in reply.headers if name.startswith("access-control")]


def test_our_own_origin_is_served_and_gets_no_cors(api):
    reply = api.call("GET", "/health", Origin="http://localhost")
    assert reply.status == 200 and not [name for name in reply.headers if name.startswith("access-control")]


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "application/jsonp"])
def test_a_body_that_is_not_json_is_refused(api, kind):
    body = {"hosts": ["alpha"]}
    assert api.call("POST", "/ping", body, Content_Type=kind).status == 415


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", 'Application/JSON;charset="UTF-8"'])
def test_json_may_say_its_charset(api, kind):
    assert api.call("POST", "/ping", {"hosts": ["alpha"]}, Content_Type=kind).status == 200


# --- HTTP ----------------------------------------------------------------------------------------------------


def test_a_wrong_method_is_told_the_right_ones(api):
    reply = api.call("PUT", "/discovery", {})
    assert (reply.status, reply.headers["allow"]) == (405, "GET, POST")
    assert api.call("GET", "/run").headers["allow"] == "POST"


@pytest.mark.parametrize(
    "path", ["//run", "/run/", "/RUN", "/%72un", "/./run", "/run;x", "/status/", "/status/a/b", "/status/..", "/x"]
)
def test_another_spelling_is_another_path(api, path):
    assert api.call("POST", path, {"hosts": ["alpha"], "script": "hello"}).status == 404


@pytest.mark.parametrize(
    "data, status",
    [
        (b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n", 400),
        (b"GET http://localhost/ HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"nonsense\r\n\r\n", 400),
        (b"POST /run HTTP/1.1\r\nHost: x\r\n\r\n", 411),
        (b"POST /run HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 411),
        (b"POST /run HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n", 413),
        (b"POST /run HTTP/1.1\r\nHost: x\r\nContent-Length: +5\r\n\r\n12345", 400),
        (b"POST /run HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n12", 400),
        (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 40 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\nA: " + b"x" * 40000 + b"\r\n\r\n", 431),
    ],
)
def test_what_is_no_request_is_refused_and_the_connection_ends(api, data, status):
    with api.connect() as sock:
        sock.sendall(data)
        got, headers, body = read_reply(sock)
        assert (got, headers["connection"]) == (status, "close")
        assert json.loads(body)["ok"] is False
        assert sock.recv(1) == b""


def test_keep_alive_and_pipelining_keep_order(api):
    with api.connect() as sock:
        for number in range(3):
            send_http(sock, "POST", "/run", {"hosts": ["alpha"], "script": "args", "args": [str(number)]})
            send_http(sock, "GET", "/nope")
        data = b""
        while data.count(b"HTTP/1.1 ") < 6 or not data.endswith(b"}"):
            data += sock.recv(65536)
    assert re.findall(rb"HTTP/1.1 (\d+)", data) == [b"200", b"404"] * 3
    assert re.findall(rb'"stdout":"(\d)', data) == [b"0", b"1", b"2"]


def test_http_1_0_is_answered_and_closed(api):
    with api.connect() as sock:
        sock.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        status, headers, _ = read_reply(sock)
        assert (status, headers["connection"]) == (200, "close") and sock.recv(1) == b""


def test_expect_continue_is_answered(api):
    body = json.dumps({"hosts": ["alpha"]}).encode()
    with api.connect() as sock:
        head = "POST /ping HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nExpect: 100-continue\r\n"
        sock.sendall((head + "Content-Length: %d\r\n\r\n" % len(body)).encode())
        assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(body)
        assert read_reply(sock)[0] == 200


# --- locks -----------------------------------------------------------------------------------------------------


def test_locks_hold_between_the_api_and_ced_both_ways(api, deployment):
    control = deployment.control
    running = in_background(lambda: api.run_script(["alpha"], "sleep", "600"))
    reqid = control.wait_for_lock()
    second = api.run_script(["beta", "alpha"], "sleep", "0")
    assert second.status == 409
    assert second.json == {
        "ok": False, "error": "locked", "status": "locked", "code": 4, "conflicts": ["alpha:sleep"],
        "detail": "see: ced list-locks",
    }  # fmt: skip
    status, said = control.json("run", "alpha", "sleep", "--", "0")
    assert status == 1 and said["conflicts"] == ["alpha:sleep"]
    assert api.call("POST", "/cancel/" + reqid).status == 200
    assert running().json["results"][0]["cancelled"] is True
    waiting = control.spawn("run", "beta", "sleep", "--", "600", stdout=subprocess.DEVNULL)
    reqid = control.wait_for_lock()
    assert api.run_script(["beta"], "sleep", "0").status == 409
    wait_until(lambda: api.call("POST", "/cancel/" + reqid).json["results"][0]["status"] == "cancelled")
    assert waiting.wait(60) == 1
    assert api.run_script(["beta"], "sleep", "0").status == 200


def test_a_lock_is_for_the_group_whatever_the_umask(tmp_path):
    before = os.umask(0o077)
    try:
        lock = ctrl_exec.FileLock(str(tmp_path / "a.lock"), mode=0o660)
        assert lock.acquire()
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(lock.path).st_mode) == 0o660
    lock.release()


# --- events ------------------------------------------------------------------------------------------------------


def listen(api, reqid, place=None):
    headers = {"Last-Event-ID": place} if place else {}
    reply = api.call("GET", "/events/" + reqid, **headers)
    assert (reply.status, reply.headers["content-type"]) == (200, "text/event-stream")
    return parse_events(reply.body)


def outputs(events):
    """The bytes of each (host, stream)."""
    found = {}
    for _, kind, data in events:
        if kind == "output":
            exact = base64.b64decode(data["base64"]) if "base64" in data else data["data"].encode()
            found[data["host"], data["stream"]] = found.get((data["host"], data["stream"]), b"") + exact
    return found


def listen_and_let_go_on(api, reqid, gate):
    """The events of a run on two hosts that waits after each line of stderr until that has been heard."""
    data = b""
    with api.connect() as sock:
        sock.sendall(b"GET /events/%s HTTP/1.0\r\nHost: localhost\r\n\r\n" % reqid.encode())
        for number in range(4):
            while data.count(b"err %d" % number) < 2:
                data += sock.recv(65536)
            open(gate + str(number), "w").close()
        while not data.endswith(b"}\n\n") or b"event: complete" not in data:
            data += sock.recv(65536)
    return parse_events(data.partition(b"\r\n\r\n")[2])


def test_events_show_a_run_to_its_end_and_resume_without_losing_or_repeating_a_byte(api, deployment, tmp_path):
    body = "for i in 0 1 2 3; do printf 'out %s \\377\\n' $i; echo err $i >&2\n"
    body += 'while [ ! -e "$1$i" ]; do sleep 0.02; done; done\n'
    for host in ("alpha", "beta"):
        deployment[host].script("talk", body)
        deployment[host].reload()
    gate = str(tmp_path / "gate")
    reqid = api.run_script(["alpha", "beta"], "talk", gate, **{"async": True}).json["reqid"]
    events = listen_and_let_go_on(api, reqid, gate)
    whole = outputs(events)
    expected = {
        "stdout": b"".join(b"out %d \xff\n" % number for number in range(4)),
        "stderr": b"".join(b"err %d\n" % number for number in range(4)),
    }
    assert whole == {(host, stream): expected[stream] for host in ("alpha", "beta") for stream in expected}
    assert len([one for one in events if one[1] == "output"]) >= 16  # as it came: lines, hosts, streams
    assert [one[1] for one in events].count("end") == 2 and events[-1][1:] == ("complete", {"reqid": reqid})
    ends = {data["host"]: data["exit"] for _, kind, data in events if kind == "end"}
    assert ends == {"alpha": 0, "beta": 0}
    for at in range(0, len(events) - 1, 3):
        first, rest = events[: at + 1], listen(api, reqid, events[at][0])
        assert rest[-1][1] == "complete"
        both = [outputs(first), outputs(rest)]
        joined = {key: both[0].get(key, b"") + both[1].get(key, b"") for key in whole}
        assert joined == whole
        ended = [data["host"] for _, kind, data in first + rest if kind == "end"]
        assert sorted(ended) == ["alpha", "beta"]


@pytest.mark.parametrize("place", ["x.x.x", "1", "0-0.0", "a-b.0-0", "99999999999-0.0-0", "-1-0.0-0"])
def test_a_place_that_is_not_of_this_run_is_refused(api, place):
    reqid = api.run_script(["alpha", "beta"], "hello").json["reqid"]
    reply = api.call("GET", "/events/" + reqid, Last_Event_ID=place)
    assert reply.status == 400 and "Last-Event-ID" in reply.json["error"]


def test_a_host_that_cannot_be_heard_leaves_the_run_incomplete(start):
    api = start(ALLOW + "read_timeout = 4\n", "up", "down")
    with api:
        reqid = api.run_script(["up", "down"], "hello").json["reqid"]
        api.deployment["down"].stop()
        events = listen(api, reqid)
        assert {(kind, data["host"]) for _, kind, data in events if kind in ("end", "lost")} == {
            ("end", "up"), ("lost", "down"),
        }  # fmt: skip
        assert "complete" not in [kind for _, kind, _ in events]
        api.deployment["down"].start()
        again = listen(api, reqid, events[-1][0])
        assert outputs(again) == {("down", "stdout"): b"hello\n"}
        assert [kind for _, kind, _ in again][-2:] == ["end", "complete"]


class Played:
    """A dispatcher whose run writes what a test says, for what a real one makes slow."""

    def __init__(self, play):
        self._play = play

    def follow(self, record, show, from_now, places, check):
        yield from self._play(show, check)


def record_of(*hosts):
    return ctrl_exec.RequestRecord("r1", "s", "async", "", "", "", dict.fromkeys(hosts, ctrl_exec.Outcome()))


def stream_of(dispatcher, *hosts):
    call = ctrl_exec._Call(ctrl_exec.Peer("127.0.0.1", 1, None), None)
    return ctrl_exec._EventStreams().start(9, call, dispatcher, record_of(*hosts), ctrl_exec._Places(hosts))


def test_a_silent_run_gives_signs_of_life_and_a_listener_who_goes_ends_the_following(api, monkeypatch):
    monkeypatch.setattr(ctrl_exec, "BEAT_SECONDS", 0.05)
    ended = threading.Event()

    def play(show, check):
        try:
            while True:
                time.sleep(0.01)
                check()
        finally:
            ended.set()
        yield

    stream = iter(stream_of(Played(play), "a"))
    assert [next(stream) for _ in range(3)] == [b"retry: 1000\n\n", b": beat\n\n", b": beat\n\n"]
    stream.close()
    assert ended.wait(60)


def test_a_slow_listener_holds_back_no_more_than_a_bounded_number_of_pieces(api):
    shown = []

    def play(show, check):
        for number in range(1000):
            show("a", "stdout", b"x" * 1000)
            shown.append(number)
        yield from ()

    stream = iter(stream_of(Played(play), "a"))
    next(stream)
    next(stream)
    wait_until(lambda: len(shown) >= ctrl_exec.FEED_ITEMS, what="a full feed")
    time.sleep(0.1)
    assert len(shown) <= ctrl_exec.FEED_ITEMS + 2
    assert sum(event.count(b"event: output") for event in stream) == 999
    assert len(shown) == 1000


def test_a_bug_ends_the_stream_without_a_word_to_the_listener(api, tmp_path, monkeypatch):
    monkeypatch.setattr(ctrl_exec, "LOG", log := ctrl_exec.EventLog())
    log.open("test", str(tmp_path / "log"))

    def play(show, check):
        raise KeyError("secret")
        yield

    stream = iter(stream_of(Played(play), "a"))
    assert list(stream) == [b"retry: 1000\n\n"]
    assert "ACTION=bug" in (tmp_path / "log").read_text()


# --- abuse and ends ------------------------------------------------------------------------------------------------


def check_refusal(api):
    """Over its connections, it says so, and serves again when there is room."""
    with busy_places(api, "alpha", "beta"):
        reply = api.call("GET", "/health")
        assert (reply.status, reply.json["ok"]) == (503, False) and int(reply.headers["retry-after"]) >= 1
    wait_until(lambda: api.call("GET", "/health").status == 200, what="room again")


def open_stream(api, reqid):
    sock = api.connect()
    send_http(sock, "GET", "/events/" + reqid)
    return sock, sock.recv(12)


@pytest.fixture
def long_run(deployment):
    reqid = deployment.control.json("run", "alpha", "sleep", "--async", "--", "600")[1]["reqid"]
    yield reqid
    assert deployment.control.run("cancel", reqid).returncode == 0


def test_event_streams_have_half_of_the_connections_at_most(start, long_run):
    with start(ALLOW + "api_max_connections = 6\n") as api:
        streams = [open_stream(api, long_run) for _ in range(5)]
        assert [said for _, said in streams] == [b"HTTP/1.1 200"] * 3 + [b"HTTP/1.1 503"] * 2
        assert api.call("GET", "/health").status == 200
        streams[0][0].close()
        streams += [wait_until(lambda: (found := open_stream(api, long_run))[1].endswith(b"200") and found, what="room")]
        for sock, _ in streams:
            sock.close()


def test_event_streams_go_first_when_connections_are_short(start, long_run):
    with start(ALLOW + "api_max_connections = 3\n") as api:
        stream, said = open_stream(api, long_run)
        assert said == b"HTTP/1.1 200"
        idle = api.connect()
        send_http(idle, "GET", "/health")
        assert read_reply(idle)[0] == 200
        with busy_places(api, "beta"):
            assert api.call("GET", "/health").status == 200
            while stream.recv(65536):  # it ends, and its client comes again
                pass
            send_http(idle, "GET", "/health")  # who has waited for less is still served
            assert read_reply(idle)[0] == 200
        idle.close()
        stream.close()


@pytest.mark.parametrize("path, body", [("/ping", {"hosts": ["a[1-4]"]}), ("/discovery", {}), ("/openapi-live.json", None)])
def test_what_nobody_waits_for_any_more_is_ended(start, path, body):
    api = start(ALLOW + "max_parallel = 1\nread_timeout = 3\n", "a1", "a2", "a3", "a4")
    for host in api.deployment.hosts.values():
        os.kill(host.process.pid, signal.SIGSTOP)
        for pid in host.children():
            os.kill(pid, signal.SIGSTOP)
    try:
        with api:
            with api.connect() as sock:
                send_http(sock, "GET" if body is None else "POST", path, body)
            wait_until(lambda: [one for one in api.events("api-request") if "the caller has gone" in one], what="the end")
            asked = len(api.events("ping")) + len(api.events("discovery"))
            assert asked < 4 and api.events("bug") == []
    finally:
        for host in api.deployment.hosts.values():
            for pid in [host.process.pid, *host.children()]:
                os.kill(pid, signal.SIGCONT)


def test_over_its_connections_it_says_so_and_when_to_come_again(start):
    with start(ALLOW + "api_max_connections = 2\n") as api:
        check_refusal(api)


def test_silent_clients_push_themselves_out(start):
    with start(ALLOW + "api_max_connections = 4\n") as api:
        idle = [api.connect() for _ in range(12)]
        assert api.run_script(["alpha"], "hello").status == 200
        for sock in idle:
            sock.close()
        assert api.run_script(["alpha"], "hello").status == 200


def test_a_client_that_goes_away_costs_nothing_and_its_run_is_recorded(api, deployment):
    before = {run["reqid"] for run in api.call("GET", "/runs").json["runs"]}
    with api.connect() as sock:
        send_http(sock, "POST", "/run", {"hosts": ["alpha"], "script": "sleep", "args": ["0.6"]})
        deployment.control.wait_for_lock()
    found = wait_until(
        lambda: [
            run for run in api.call("GET", "/runs").json["runs"]
            if run["reqid"] not in before and run["finished"]
        ]
    )  # fmt: skip
    assert found[0]["hosts"] == {"alpha": {"state": "ok", "exit": 0, "error": ""}}
    assert deployment.control.json("list-locks")[1]["locks"] == []


def test_sigterm_finishes_what_it_is_answering_and_ends_streams_for_another_server(start):
    with start() as api:
        long = api.run_script(["beta"], "sleep", "600", **{"async": True}).json["reqid"]
        stream = api.connect()
        send_http(stream, "GET", "/events/" + long)
        idle = api.connect()
        send_http(idle, "GET", "/health")
        assert read_reply(idle)[0] == 200
        running = in_background(lambda: api.run_script(["alpha"], "sleep", "1"))
        api.deployment.control.wait_for_lock()
        api.process.send_signal(signal.SIGTERM)
        assert running().json["results"][0]["exit"] == 0
        assert b"event: complete" not in read_reply(stream)[2]
        assert idle.recv(1) == b""
        assert api.process.wait(60) == 0
        with pytest.raises(ConnectionRefusedError):
            api.connect()
    assert "PORT=%d" % api.port in api.events("api-start")[-1] and "DRAINED=yes" in api.events("api-stop")[-1]
    assert api.deployment.control.json("cancel", long)[0] == 0


# --- files that change ------------------------------------------------------------------------------------------------


def test_a_revocation_counts_from_the_next_request_on(start):
    api = start(ALLOW, "one", "two")
    with api:
        assert api.call("POST", "/ping", {"hosts": ["one"]}).json["results"][0]["status"] == "ok"
        agent = ctrl_exec.get_agent(api.config.registry_dir, "one")
        ctrl_exec.add_revoked(api.config.revoked_serials, [agent.serial], "test")
        entry = api.call("POST", "/ping", {"hosts": ["one"]}).json["results"][0]
        assert entry["status"] == "unreachable" and "revoked" in entry["error"]
        with open(api.config.revoked_serials, "a", encoding="ascii") as file:
            file.write("garbage\n")
        reply = api.call("POST", "/ping", {"hosts": ["two"]})
        assert reply.status == 500 and "not a certificate serial" in reply.json["error"]
        assert api.call("GET", "/health").status == 200


def test_a_new_certificate_and_a_new_hook_count_from_the_next_request_on(start):
    api = start(ALLOW, "solo")
    control, openssl = api.deployment.control, ctrl_exec.OpenSSL()
    with api:
        assert api.run_script(["solo"], "hello").status == 200
        request = openssl.new_request(control.config.key, "control")
        pem = openssl.sign(request, "control", "dispatcher", 30, control.config.ca, ctrl_exec.ca_key_path(control.config.ca))
        ctrl_exec.write_atomic(control.config.cert, pem.encode(), mode=0o644)
        entry = api.call("POST", "/ping", {"hosts": ["solo"]}).json["results"][0]
        assert entry["error"] == "serial mismatch"  # the agent has been shown the new one
        control.put(ctrl_exec.ETC + "/auth-hook", "#!/bin/sh\nexit 3\n", 0o755)
        assert api.call("POST", "/ping", {"hosts": ["solo"]}).json["code"] == 3


def test_sighup_reads_the_configuration_again_and_keeps_it_when_it_is_broken(start):
    api = start("")
    with api:
        assert api.call("POST", "/ping", {"hosts": ["alpha"]}).status == 403
        api.configure(ALLOW)
        api.process.send_signal(signal.SIGHUP)
        wait_until(lambda: api.call("POST", "/ping", {"hosts": ["alpha"]}).status == 200)
        api.configure("api_auth_default = perhaps\n")
        api.process.send_signal(signal.SIGHUP)
        line = wait_until(lambda: [one for one in api.events("reload") if "kept" in one])[0]
        assert "expects deny or allow" in line
        assert api.call("POST", "/ping", {"hosts": ["alpha"]}).status == 200


# --- TLS and starting -----------------------------------------------------------------------------------------------


def test_with_a_certificate_it_speaks_tls_to_who_has_none(start):
    conf = ALLOW + "api_max_connections = 2\n"
    api = start(conf)
    api.configure(conf + "api_cert = %s\napi_key = %s\n" % (api.config.cert, api.config.key))
    api.tls = support.client_context(ca=api.config.ca)
    with api:
        assert api.run_script(["alpha"], "hello").status == 200
        with socket.create_connection(("127.0.0.1", api.port), 20) as plain:
            plain.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            try:
                assert b"HTTP" not in plain.recv(100)
            except ConnectionResetError:
                pass
        wait_until(lambda: api.events("tls-failure"), what="the event")
        silent = [socket.create_connection(("127.0.0.1", api.port), 20) for _ in range(9)]
        # those that are sent away for it need a moment to leave, and until then it is asked to come again
        wait_until(lambda: api.run_script(["alpha"], "hello").status == 200, what="room")
        for sock in silent:
            sock.close()
        check_refusal(api)
        figures = api.call("GET", "/metrics").body.decode()
        assert re.search(r'not_after_timestamp_seconds\{role="api",name="dispatcher.crt"\} \d{10}\n', figures)


@pytest.mark.parametrize(
    "conf, said",
    [
        ("api_cert = /x.crt\n", "go together"),
        ("api_cert = /nowhere/x.crt\napi_key = /nowhere/x.key\n", "no such file"),
        ("api_port = 70000\n", "api_port"),
        ("api_bind = everywhere\n", "IP addresses"),
        ("key = /nowhere/key\n", "/nowhere/key: no such file"),
    ],
)
def test_what_keeps_it_from_starting_is_one_sentence(deployment, conf, said):
    server = ApiServer(deployment.control, "broken", "")
    with open(server.conf, "w", encoding="ascii") as file:
        file.write("dispatcher_id = control\n" + ("" if "api_port" in conf else "api_port = 0\n") + conf)
    done = server.run("--config", server.conf)
    assert done.returncode == ctrl_exec.EXIT_CONFIG and said in done.err
    assert len(done.err.splitlines()) <= 2


def test_a_host_without_identity(tmp_path):
    empty = support.Control(tmp_path / "empty", set_up=False)
    done = ApiServer(empty).run("--config", ApiServer(empty).conf)
    assert done.returncode == ctrl_exec.EXIT_CONFIG and "no such file" in done.err


def lines_of(server, action, number):
    """The first lines of an action that this process has logged, as soon as there are so many."""
    mark = "ACTION=%s " % action
    wait_until(lambda: len(server.events(action)) >= number, what="%d lines %s" % (number, mark))
    return server.events(action)


def test_an_api_waits_for_a_port_that_somebody_has(fresh):
    deployment = fresh(start=False)
    server = ApiServer(deployment.control)
    with socket.create_server(("127.0.0.1", server.port)):
        server.process = server.spawn("--config", server.conf, stdin=subprocess.DEVNULL)
        assert "in use" in lines_of(server, "listen", 1)[0]
    wait_until(server.answers, what="the port")
    assert len(server.events("listen")) == 2 and "RESULT=ok" in server.events("listen")[1]
    assert server.stop() == 0


def test_a_hangup_while_the_api_starts_ends_nothing(fresh):
    deployment = fresh(start=False)
    for _ in range(5):
        server = ApiServer(deployment.control)
        server.process = server.spawn("--config", server.conf, stdin=subprocess.DEVNULL)
        status = "/proc/%d/status" % server.process.pid
        # blocked, and later caught
        look = lambda: re.findall("Sig(?:Blk|Cgt):\\s*([0-9a-f]+)", open(status).read())  # noqa: E731
        held = lambda: any(int(mask, 16) >> (signal.SIGHUP - 1) & 1 for mask in look())  # noqa: E731
        wait_until(held, what="its first steps")
        for _ in range(20):
            server.process.send_signal(signal.SIGHUP)
        wait_until(server.answers, what="the API")
        assert server.stop() == 0


def test_a_reload_of_the_api_waits_for_the_outcome(fresh):
    deployment = fresh(start=False)
    with ApiServer(deployment.control) as server:
        done = server.run("--config", server.conf, "reload")
        assert (done.returncode, done.out) == (0, "the API (process %d) has reloaded\n" % server.process.pid)
        good = server.conf + ".good"
        os.rename(server.conf, good)
        server.configure("read_timeout = never\n")
        done = server.run("--config", good, "reload")
        assert done.returncode == 78 and "keeps its old configuration" in done.err
    done = server.run("--config", good, "reload")
    assert done.returncode == 1 and "no API serves here" in done.err


def test_an_api_takes_the_socket_that_the_service_manager_holds(fresh):
    deployment = fresh(start=False)
    server = ApiServer(deployment.control)
    script = (
        "import os, sys; os.dup2(int(sys.argv[1]), 3); os.environ.update(LISTEN_FDS='1', "
        "LISTEN_PID=str(os.getpid())); os.execv(sys.argv[2], sys.argv[2:])"
    )
    with socket.create_server(("127.0.0.1", server.port)) as held:
        words = [sys.executable, "-c", script, str(held.fileno()), *server.argv("--config", server.conf)]
        for _ in range(2):
            server.process = subprocess.Popen(
                words, env=server.environment(), stdin=subprocess.DEVNULL, pass_fds=[3, held.fileno()]
            )
            wait_until(server.answers, what="the API")
            assert server.stop() == 0
            with pytest.raises(OSError):
                socket.create_server(("127.0.0.1", server.port)).close()
    assert server.events("listen") == []
    assert not any("socket" in line for line in server.events("config-warn"))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: mounts")
def test_an_api_on_a_read_only_disk_serves_what_it_can(fresh):
    deployment = fresh()
    server, state = ApiServer(deployment.control), deployment.control.file(ctrl_exec.VAR)
    for words in (["--bind", state, state], ["-o", "remount,bind,ro", state]):
        subprocess.run(["mount", *words], check=True)
    try:
        with server:
            assert server.call("POST", "/ping", {"hosts": ["solo"]}).json["results"][0]["status"] == "ok"
            refused = server.run_script(["solo"], "hello")
            assert refused.status == 500 and "Read-only file system" in refused.json["error"]
            assert deployment["solo"].events("run") == []
    finally:
        subprocess.run(["umount", "-l", state], check=True)


@pytest.fixture(scope="module")
def named(deployment):
    with ApiServer(deployment.control, "named", ALLOW + "api_names = control.example.com, other\n") as server:
        yield server


@pytest.mark.parametrize(
    "host, is_own",
    [
        ("localhost", True), ("127.0.0.1:7445", True), ("[::1]:7445", True), ("control.example.com:80", True),
        ("CONTROL.example.com.", True), (socket.gethostname(), True), ("evil.example.com", False),
        ("localhost.evil.example", False), ("127.0.0.1.evil.example", False), ("", False), ("a b", False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/health", "/", "/discovery", "/openapi.json", "/nothing"])
def test_a_name_that_is_not_ours_is_refused_on_every_request(named, host, is_own, path):
    reply = named.call("GET", path, Host=host)
    if is_own:
        assert reply.status == (404 if path == "/nothing" else 200), reply.json
    else:
        assert reply.status in (400, 403) and reply.json["ok"] is False


def test_a_dangerous_configuration_is_warned_of(deployment):
    conf = ALLOW + "api_bind = 127.0.0.1, 0.0.0.0\n"
    config = ApiServer(deployment.control, "open", conf).config
    said = " / ".join(finding.what for finding in ctrl_exec.check_exposure(config))
    assert "0.0.0.0 without TLS" in said and "127.0.0.1" not in said and "api_auth_default = allow" in said


def test_the_api_as_a_role_of_the_command_line(api, deployment):
    assert api.run("--version").out.startswith("ctrl-exec " + ctrl_exec.__version__)
    assert "serve" in api.run("--help").out
    done = api.run("--config", api.conf, "check", "--json")
    assert done.returncode == 0 and json.loads(done.out)["ok"] is True
    assert api.run("frobnicate").returncode == ctrl_exec.EXIT_USAGE
    words = [sys.executable, "-IS", support.PROGRAM, "api", "--help"]
    assert "ctrl_exec.py api" in subprocess.run(words, capture_output=True, text=True, timeout=60).stdout


# --- log, figures, bugs ----------------------------------------------------------------------------------------------


def test_each_request_is_an_event_without_tokens_or_arguments(api):
    reqid = api.run_script(["alpha"], "args", "s3cret-arg", username="ann", token="s3cret-body").json["reqid"]
    api.call("GET", "/status/" + reqid, Authorization="Bearer s3cret-head")
    lines = [line for line in api.events("api-request") if reqid in line]
    assert "METHOD=POST PATH=/run PEER=127.0.0.1 REQID=%s STATUS=200 USERNAME=ann" % reqid in lines[0]
    assert "PATH=/status/" + reqid in lines[1]
    assert "s3cret" not in api.log()


METRIC = re.compile(r'([a-z_]+)((?:_bucket|_sum|_count)?)(\{[a-z_]+="[^"\\]*"(?:,[a-z_]+="[^"\\]*")*\})? (-?[0-9.e+]+)')


def test_metrics_are_text_that_prometheus_reads(api):
    api.run_script(["alpha"], "hello")
    api.call("GET", "/nope")
    reply = api.call("GET", "/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    families, values = {}, {}
    for line in reply.body.decode().splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split()
            families[name] = kind
        elif not line.startswith("#"):
            hit = METRIC.fullmatch(line)
            assert hit, line
            values[hit[0].rsplit(" ", 1)[0]] = float(hit[4])
            assert hit[1] in families or re.sub("_(bucket|sum|count)$", "", hit[1]) in families, line
    assert all(name.endswith("_total") == (kind == "counter") for name, kind in families.items())
    assert values['ctrl_exec_api_requests_total{path="/run",method="POST",code="200"}'] >= 1
    assert values['ctrl_exec_api_requests_total{path="",method="",code="404"}'] >= 1
    assert values["ctrl_exec_api_requests_in_progress"] == 1
    buckets = [value for name, value in values.items() if name.startswith("ctrl_exec_run_seconds_bucket")]
    assert buckets == sorted(buckets) and buckets[-1] == values["ctrl_exec_run_seconds_count"] > 0
    for name in ('role="ca",name="ca.crt"', 'role="agent",name="alpha"'):
        assert values["ctrl_exec_certificate_not_after_timestamp_seconds{%s}" % name] > time.time()


def test_an_unforeseen_failure_tells_the_peer_an_id_and_the_log_the_rest(api, tmp_path, monkeypatch):
    monkeypatch.setattr(ctrl_exec, "LOG", log := ctrl_exec.EventLog())
    log.open("test", str(tmp_path / "log"))
    one = ctrl_exec.Api(api.config)
    monkeypatch.setattr(one, "dispatcher", lambda: {}["secret"])
    request = ctrl_exec.Request("GET", "/runs", {}, "1.1", {"host": "localhost"}, b"")
    response = one.handle(ctrl_exec.Peer("10.0.0.1", 1, None), request)
    assert response.status == 500 and "secret" not in json.dumps(response.body)
    assert "REQID=" + response.body["reqid"] in (tmp_path / "log").read_text()
    monkeypatch.setattr(one, "dispatcher", lambda: os.open("/nowhere", os.O_RDONLY))
    assert one.handle(ctrl_exec.Peer("10.0.0.1", 1, None), request).status == 500


def test_a_corrupt_record_is_named_and_the_others_are_shown(api):
    reqid = api.run_script(["alpha"], "hello").json["reqid"]
    path = os.path.join(api.config.runs_dir, "broken.json")
    with open(path, "w", encoding="ascii") as file:
        file.write("{")
    try:
        runs = api.call("GET", "/runs").json
        assert "broken.json" in runs["warnings"][0] and reqid in [run["reqid"] for run in runs["runs"]]
        assert api.call("GET", "/status/broken").status == 500
    finally:
        os.unlink(path)


# --- what the lower sections do for it ----------------------------------------------------------------------------------


def test_a_host_that_is_not_asked_yet_is_pending_and_not_expired(start):
    api = start(ALLOW + "max_parallel = 1\n")
    with api:
        running = in_background(lambda: api.run_script(["alpha", "beta"], "sleep", "2"))
        reqid = api.deployment.control.wait_for_lock()
        wait_until(lambda: reqid + ".json" in os.listdir(api.config.runs_dir), what="the record")
        status = api.call("GET", "/status/" + reqid).json
        assert (status["complete"], status["completed"]) == (False, None)
        assert "beta" in status["pending"]
        assert running().status == 200
        status = api.call("GET", "/status/" + reqid).json
        assert status["complete"] and [entry["exit"] for entry in status["results"]] == [0, 0]


def test_a_registry_that_may_only_be_read_keeps_its_tags(deployment, monkeypatch):
    config = deployment.control.config
    host = deployment["alpha"]
    dispatcher = ctrl_exec.Dispatcher(config)
    monkeypatch.setattr(ctrl_exec.os, "access", lambda path, mode: False)
    before = ctrl_exec.get_agent(config.registry_dir, host.name)
    dispatcher._keep_tags(host.name, {"new": "tag"})
    assert ctrl_exec.get_agent(config.registry_dir, host.name) == before


def test_what_is_known_of_a_run_is_not_forgotten_for_an_older_word(deployment):
    config = deployment.control.config
    known = record_of("alpha")._replace(
        reqid="known1", hosts={"alpha": ctrl_exec.Outcome("ok", 0)}, finished=ctrl_exec.iso_time(1e9),
        started=ctrl_exec.iso_time(1e9),
    )
    ctrl_exec.save_request(config.runs_dir, known)
    stale = known._replace(hosts={"alpha": ctrl_exec.Outcome()}, finished="")
    ctrl_exec.Dispatcher(config)._note(stale, [ctrl_exec.HostResult("alpha", "running", "known1")])
    assert ctrl_exec.get_request(config.runs_dir, "known1") == known
    os.unlink(os.path.join(config.runs_dir, "known1.json"))


def test_a_host_that_cannot_stream_shows_what_the_listener_has_not_had():
    shown = []
    received = ctrl_exec._Received("h", False, lambda *what: shown.append(what), (3, 0))
    assert received.where() == "stdout=3&stderr=0"
    state, _, _ = received.take(200, {"exit": 0, "stdout": "hello", "stderr": "oh"})
    assert (state, shown) == ("ok", [("h", "stdout", b"lo"), ("h", "stderr", b"oh")])


def test_callers_share_what_is_loaded_and_not_their_turns_to_connect(api):
    one = ctrl_exec.Api(api.config)
    first, second = one.dispatcher().client, one.dispatcher().client
    assert first._context is second._context and first._handshakes is not second._handshakes


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_an_answer_may_be_of_another_kind_and_say_more(version):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        response = ctrl_exec.Response(200, [b"a 1\n"], kind="text/plain", headers=(("X-More", "yes"),))
        ctrl_exec.write_response(ctrl_exec.Channel(theirs), version, response, keep=False)
        status, headers, body = read_reply(ours)
    assert (status, body) == (200, b"a 1\n")
    assert (headers["content-type"], headers["x-more"], headers["content-length"]) == ("text/plain", "yes", "4")


@pytest.mark.skipif(not support.IS_ROOT, reason="needs root to give a key to a group")
def test_the_key_may_be_readable_for_the_apis_group_and_no_other(tmp_path, monkeypatch):
    key = tmp_path / "key"
    key.write_text("x")
    os.chmod(str(key), 0o640)
    os.chown(str(key), 0, 12345)
    monkeypatch.setattr(ctrl_exec, "_find_group", lambda name: 12345 if name == "ctrl-exec" else -1)
    ctrl_exec.check_key_mode(str(key), ctrl_exec.DISPATCHER_USER)
    with pytest.raises(ctrl_exec.TrustError):
        ctrl_exec.check_key_mode(str(key), "")


def test_curl_can_use_it_as_the_readme_says(hooked):
    if not shutil.which("curl"):
        return
    words = ["curl", "-sS", "-H", "Authorization: Bearer good", "--json", '{"hosts":["alpha"],"script":"hello"}']
    done = subprocess.run([*words, "http://127.0.0.1:%d/run" % hooked.port], capture_output=True, text=True, timeout=60)
    if "unknown" not in done.stderr and "option --json" not in done.stderr:  # an older curl
        assert json.loads(done.stdout)["results"][0]["stdout"] == "hello\n"
