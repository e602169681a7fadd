"""Hosts that answer strangely about runs: hostile ones, and those of an older release."""

import base64
import json
import ssl
import threading
import time

import pytest
import support
from peers import Peer, read_request, routing

import ctrl_exec


def lines(*events):
    """A streamed answer."""
    return b"".join(json.dumps(event).encode() + b"\n" for event in events)


def output(**changes):
    return dict({"event": "output", "stream": "stdout", "offset": 3, "data": "abc"}, **changes)


END = {"event": "end", "exit": 0, "stdout": "", "stderr": ""}
RUN = {"exit": 0, "stdout": "old\n", "stderr": "", "reqid": "x", "host": "h", "script": "hello"}
ACCEPTED = (202, {"status": "accepted"})

# name: (streamed answer to a run, state, words of the error)
STREAMS = {
    "no-such-stream": (lines(output(stream="stdin"), END), "unknown", "no valid `stream`"),
    "stream-a-list": (lines(output(stream=["stdout"]), END), "unknown", "no valid `stream`"),
    "no-offset": (
        lines({"event": "output", "stream": "stdout", "data": "a"}),
        "unknown",
        "no valid `offset`",
    ),
    "offset-true": (lines(output(offset=True)), "unknown", "no valid `offset`"),
    "data-a-list": (lines(output(data=["a"])), "unknown", "no valid `data`"),
    "half-a-character": (lines(output(data="\ud800")), "unknown", "output that is none"),
    "not-base64": (lines(output(base64="a")), "unknown", "output that is none"),
    "exit-text": (lines(output(), dict(END, exit="0")), "unknown", "no valid `exit`"),
    "no-exit": (lines(output(), {"event": "end"}), "unknown", "no valid `exit`"),
    "a-list": (b"[1]\n", "unknown", "not a JSON object"),
    "no-json": (b"<html>\n", "unknown", "not JSON"),
    "deep": (b'{"a":' * 5000 + b"\n", "unknown", "nested deeper"),
    "no-end": (lines(output()), "unknown", "ended the stream too early"),
    "of-no-kind": (lines({"event": "news"}, {"event": ["x"]}, END), "ok", ""),
    "sound": (lines(output(base64=base64.b64encode(b"a\xff").decode()), END), "ok", ""),
}

# name: (answer to /cancel, state, words)
CANCELS = {
    "left-text": (
        (200, {"status": "cancelled", "processes_left": "0"}),
        "unknown",
        "no valid `processes_left`",
    ),
    "odd-status": ((200, {"status": "fine", "processes_left": 0}), "unknown", "no valid `status`"),
    "status-a-list": ((200, {"status": ["done"], "processes_left": 0}), "unknown", "no valid `status`"),
    "cannot": ((404, {"error": "not found"}), "refused", "runs an older agent"),
    "may-not": ((403, {"error": "not authorised"}), "refused", "not authorised"),
    "escapes": (
        (200, {"status": "done", "processes_left": 1, "processes_ended": "\x1b[2J", "left": ["\x1b[2J\n1"]}),
        "done",
        "",
    ),
}

# name: (answer to /result, state, words)
RESULTS = {
    "exit-a-list": ((200, dict(RUN, status="done", exit=[0])), "unknown", "no valid `exit`"),
    "gone": ((404, {"status": "unknown", "error": "no such request"}), "expired", "EXPIRED"),
    "keeps-none": ((404, {"error": "not found"}), "refused", "runs an older agent"),
    "broken": ((500, {"error": "x"}), "failed", "x"),
    "nameless": ((200, {}), "unknown", "no valid `exit`"),
}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    """A control host whose registry has a strange host for each row above, and one of an older release."""
    top = tmp_path_factory.mktemp("strange")
    with support.Deployment(top, ("good",)) as deployment:
        control = deployment.control
        with open(control.config.path, "a", encoding="ascii") as file:
            file.write("connect_timeout = 10\nread_timeout = 6\nmax_parallel = 100\n")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        identity = ctrl_exec.agent_identity(deployment["good"].config)
        context.load_cert_chain(identity.cert, identity.key)
        good = ctrl_exec.find_agent(control.config.registry_dir, "good")
        gone = (404, {"error": "not found"})
        routes = {"s-" + name: {"POST /run": (200, row[0]), "GET": gone} for name, row in STREAMS.items()}
        routes.update(
            {"c-" + name: {"POST /run": ACCEPTED, "POST /cancel": row[0]} for name, row in CANCELS.items()}
        )
        routes.update(
            {"r-" + name: {"POST /run": ACCEPTED, "GET /result": row[0]} for name, row in RESULTS.items()}
        )
        routes["older"] = {"POST /run": (200, RUN), "GET": gone, "POST": gone}
        peers = []
        for name, table in routes.items():
            port = support.free_port()
            entry = good._replace(name=name, hostname=name, cert_name="good", port=port)
            with ctrl_exec.registry_lock(control.config.registry_dir):
                ctrl_exec.save_agent(control.config.registry_dir, entry)
            peers.append(Peer(port, routing(table), context))
        yield control
        for peer in peers:
            peer.close()


@pytest.fixture(scope="module")
def streamed(fleet):
    names = ["good", *("s-" + name for name in STREAMS)]
    done = fleet.run("run", *names, "--stream", "hello", "--json")
    *shown, last = [json.loads(line) for line in done.out.splitlines()]
    return done, shown, last["results"]


@pytest.mark.parametrize("name", STREAMS)
def test_a_strange_stream_has_its_state_and_its_words(streamed, name):
    _, state, words = STREAMS[name]
    entry = next(entry for entry in streamed[2] if entry["host"] == "s-" + name)
    assert entry["state"] == state, entry
    assert words in entry.get("error", ""), entry


def test_strange_streams_do_not_disturb_the_good_one(fleet, streamed):
    done, shown, results = streamed
    assert done.returncode == 1
    assert {"host": "good", "stream": "stdout", "line": "hello"} in shown
    assert len(results) == 1 + len(STREAMS)
    assert fleet.events("bug") == []


@pytest.mark.parametrize("name", CANCELS)
def test_a_strange_answer_to_cancel_has_its_state_and_its_words(fleet, name):
    _, state, words = CANCELS[name]
    _, shown = fleet.json("run", "--async", "c-" + name, "hello")
    status, answer = fleet.json("cancel", shown["reqid"])
    (entry,) = answer["results"]
    assert entry["status"] == state and words in entry.get("error", ""), entry
    done = fleet.run("cancel", shown["reqid"])
    assert "\x1b" not in done.out + done.err
    assert (done.returncode, status) == (1, 1)  # none of these has said that nothing is left
    assert fleet.events("bug") == []


@pytest.mark.parametrize("name", RESULTS)
def test_a_strange_answer_about_a_run_has_its_state_and_its_words(fleet, name):
    _, state, words = RESULTS[name]
    _, shown = fleet.json("run", "--async", "r-" + name, "hello")
    done = fleet.run("status", shown["reqid"])
    assert words in done.out + done.err, done.out
    _, answer = fleet.json("status", shown["reqid"])
    entry = answer["hosts"]["r-" + name]
    assert entry.get("state", entry["status"]) == state, answer
    assert done.returncode != 0
    assert fleet.events("bug") == []


@pytest.mark.parametrize("options", [(), ("--async",), ("--stream",)])
def test_an_older_agent_runs_a_script_in_the_only_way_it_knows(fleet, options):
    done = fleet.run("run", *options, "older", "hello")
    assert done.returncode == 0, done.err
    assert "old" in done.out


class Solo:
    """A control host whose one agent is a peer of the test's making."""

    def __init__(self, top, behave, conf=""):
        self.asked = []
        self._behave = behave
        self.deployment = support.Deployment(top, ("solo",), start=False)
        self.control, host = self.deployment.control, self.deployment["solo"]
        with open(self.control.config.path, "a", encoding="ascii") as file:
            file.write(conf)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(host.config.cert, host.config.key)
        self.peer = Peer(host.port, self._serve, context)

    def _serve(self, raw, context):
        with context.wrap_socket(raw, server_side=True) as tls:
            while True:
                request = read_request(tls)
                if not request:
                    return
                self.asked.append(request)
                self._behave(tls, request)

    def count(self, prefix):
        return len([request for request in self.asked if request.startswith(prefix)])


def send_json(tls, body, status=200):
    data = json.dumps(body).encode()
    tls.sendall(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%s" % (status, len(data), data))


def test_a_stream_that_falls_silent_is_taken_up_again_where_it_was(tmp_path):
    stopped = threading.Event()

    def behave(tls, request):
        tls.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
        if request.startswith("POST /run"):
            tls.sendall(lines(output(offset=6, data="begun\n")))
            stopped.wait(60)
        else:
            tls.sendall(lines(output(offset=14, data="through\n"), END))
        raise ConnectionError

    solo = Solo(tmp_path, behave, "read_timeout = 4\n")
    done = solo.control.run("run", "solo", "hello", "--stream")
    stopped.set()
    solo.peer.close()
    assert done.returncode == 0, done.out + done.err
    assert done.out.startswith("begun\nthrough\n")
    assert solo.asked[1].startswith("GET /follow/") and "stdout=6" in solo.asked[1]


def test_a_host_that_does_not_keep_us_waiting_is_not_asked_without_a_pause(tmp_path):
    def behave(tls, request):
        if request.startswith("POST /run"):
            send_json(tls, {"status": "accepted"}, 202)
        else:
            send_json(
                tls, {"status": "running", "reqid": request.split("/")[2].split("?")[0], "script": "hello"}
            )

    solo = Solo(tmp_path, behave)
    reqid = solo.control.json("run", "--async", "solo", "hello")[1]["reqid"]
    assert solo.control.run("wait", reqid, "--timeout", "3").returncode == 2
    solo.peer.close()
    assert 2 <= solo.count("GET /result/" + reqid) <= 12


def test_a_host_that_is_slow_with_every_answer_gets_one_deadline_for_all_of_a_visit(tmp_path):
    def behave(tls, request):
        if request.startswith("POST /ping"):
            send_json(tls, {"status": "ok", "host": "solo", "version": "1", "expiry": "", "staged": False})
        else:
            time.sleep(2.4)
            send_json(tls, {"status": "ok"})

    solo = Solo(tmp_path, behave, "read_timeout = 3\n")
    told = {"%x" % serial: {"since": "2026-01-01T00:00:00Z", "told": []} for serial in range(4096, 4116)}
    path = ctrl_exec.rotation_path(solo.control.config)
    ctrl_exec.edit_rotation(path, lambda known: known._replace(revoked=told))
    done = solo.control.run("maintain")
    solo.peer.close()
    assert 1 <= solo.count("POST /rotate-serial") <= 3
    assert "FAIL  solo: read timeout" in done.out, done.out
