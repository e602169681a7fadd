"""Two API servers on one shared state directory, behind the proxies that people put in front of them."""

import json
import os
import shutil
import signal
import subprocess
import threading
import time

import pytest

import ctrl_exec
import support
from support import ApiServer, Reply, free_port, parse_events, read_reply, send_http, wait_until

HAPROXY = """\
global
    maxconn 200
defaults
    mode http
    timeout connect 5s
    timeout client 120s
    timeout server 120s
    timeout check 10s
    retries 3
    option redispatch
frontend in
    bind 127.0.0.1:{port}
    default_backend api
backend api
    balance roundrobin
    option httpchk
    http-check send meth GET uri /health ver HTTP/1.1 hdr Host localhost
    server one 127.0.0.1:{one} check inter 200ms fall 1 rise 1
    server two 127.0.0.1:{two} check inter 200ms fall 1 rise 1
"""

NGINX = """\
{user}
daemon off;
pid {top}/nginx.pid;
error_log {top}/error.log;
worker_processes 1;
events {{ worker_connections 64; }}
http {{
    access_log off;
    client_body_temp_path {top}/body;
    proxy_temp_path {top}/proxy;
    fastcgi_temp_path {top}/fastcgi;
    uwsgi_temp_path {top}/uwsgi;
    scgi_temp_path {top}/scgi;
    upstream api {{
        server 127.0.0.1:{one};
        server 127.0.0.1:{two};
        keepalive 8;
    }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://api;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host $host;
            proxy_read_timeout 120s;
        }}
    }}
}}
"""

MARK = 'echo "$1 $CTRL_EXEC_REQID" >> "{path}"\nsleep 0.05\necho "$1"\n'
CLIENTS = 4


class Front:
    """A proxy before two servers; asked as an ApiServer is."""

    tls = None
    connect, call, run_script = ApiServer.connect, ApiServer.call, ApiServer.run_script

    def __init__(self, top, program, one, two):
        self.port = free_port()
        os.makedirs(top)
        conf = os.path.join(top, "conf")
        user = "user root;" if support.IS_ROOT else ""
        text = {"haproxy": HAPROXY, "nginx": NGINX}[program]
        with open(conf, "w", encoding="ascii") as file:
            file.write(text.format(port=self.port, one=one.port, two=two.port, top=top, user=user))
        words = {"haproxy": ["-db", "-f", conf], "nginx": ["-p", top, "-e", top + "/error.log", "-c", conf]}[
            program
        ]
        path = shutil.which(program, path=ctrl_exec.SAFE_PATH)
        self.process = subprocess.Popen(
            [path, *words], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        wait_until(self.is_ready, what=program)

    def is_ready(self):
        try:
            return self.call("GET", "/health").status == 200
        except OSError:
            return False

    def stop(self):
        os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait(60)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """(deployment, two servers) with the scripts mark0, mark1, ..., which write each run into one file."""
    with support.Deployment(tmp_path_factory.mktemp("cluster"), ("alpha", "beta"), start=False) as deployment:
        deployment.marks = os.path.join(deployment.top, "marks")
        for host in deployment.hosts.values():
            for number in range(CLIENTS):
                host.script("mark%d" % number, MARK.format(path=deployment.marks))
            host.script("talk", 'echo one; while [ ! -e "$1" ]; do sleep 0.02; done; echo two\n')
            host.start()
        servers = [ApiServer(deployment.control, name) for name in ("one", "two")]
        for server in servers:
            server.start()
        yield deployment, servers
        for server in servers:
            server.stop()


@pytest.fixture(params=["haproxy", "nginx"])
def front(request, cluster, tmp_path):
    if not shutil.which(request.param, path=ctrl_exec.SAFE_PATH):
        pytest.skip("needs " + request.param)
    proxy = Front(str(tmp_path / "proxy"), request.param, *cluster[1])
    yield proxy
    proxy.stop()


def test_servers_answer_for_each_other(cluster):
    _, (one, two) = cluster
    reqid = one.run_script(["alpha"], "hello").json["reqid"]
    assert two.call("GET", "/status/" + reqid).json["results"][0]["stdout"] == "hello\n"
    later = one.run_script(["alpha"], "sleep", "600", **{"async": True}).json["reqid"]
    assert two.call("POST", "/cancel/" + later).json["results"][0]["status"] == "cancelled"
    assert one.call("GET", "/runs").json == two.call("GET", "/runs").json


def test_locks_hold_across_servers(cluster):
    deployment, (one, two) = cluster
    found = []
    thread = threading.Thread(target=lambda: found.append(one.run_script(["alpha"], "sleep", "600")))
    thread.start()
    reqid = deployment.control.wait_for_lock()
    reply = two.run_script(["alpha", "beta"], "sleep", "0")
    assert (reply.status, reply.json["conflicts"]) == (409, ["alpha:sleep"])
    wait_until(lambda: two.call("POST", "/cancel/" + reqid).json["results"][0]["status"] == "cancelled")
    thread.join(60)
    assert found[0].status == 200 and two.run_script(["alpha"], "sleep", "0").status == 200


def test_a_proxy_passes_on_runs_errors_and_live_events(front, tmp_path):
    with front.connect() as sock:  # one connection, requests to both servers
        for number in range(4):
            body = {"hosts": ["alpha", "beta"], "script": "args", "args": [str(number)]}
            send_http(sock, "POST", "/run", body)
            reply = Reply(*read_reply(sock))
            assert [entry["stdout"] for entry in reply.json["results"]] == ["%d\0" % number] * 2
            send_http(sock, "GET", "/status/" + reply.json["reqid"])
            assert Reply(*read_reply(sock)).json["complete"] is True
    assert front.call("GET", "/nope").status == 404
    assert front.call("POST", "/run", b"{", Content_Length="1").status == 400
    assert front.call("POST", "/run", {"hosts": ["nobody"], "script": "hello"}).status == 404
    gate = tmp_path / "gate"
    reqid = front.run_script(["alpha"], "talk", str(gate), **{"async": True}).json["reqid"]
    with front.connect() as sock:
        send_http(sock, "GET", "/events/" + reqid)
        data = b""
        while b"one" not in data:
            data += sock.recv(65536)
        gate.touch()  # so it came before the script had ended
        while b"event: complete" not in data:
            data += sock.recv(65536)
    assert b'"data":"two' in data.replace(b"\\n", b"") or b"two" in data


class Client(threading.Thread):
    """Asks for one run after the other, each with a word of its own, and keeps what it was told."""

    def __init__(self, number, front, stop):
        super().__init__()
        self.number = number
        self.front = front
        self.stopped = stop
        self.told = {}  # word to a Reply, or None when no answer came

    def run(self):
        count = 0
        while not self.stopped.is_set():
            count += 1
            word, host = "w%d.%d" % (self.number, count), ("alpha", "beta")[count % 2]
            more = {"async": True} if count % 3 == 0 else {}
            try:
                self.told[word] = self.front.run_script([host], "mark%d" % self.number, word, **more)
            except (OSError, ValueError, AttributeError):
                self.told[word] = None
            if not is_answer(self.told[word]):
                time.sleep(0.05)  # the proxy has not found out yet, or nobody is there


def is_answer(reply):
    """Whether a client was told of a run, and did not get an error in its place."""
    return reply is not None and reply.status in (200, 202)


def check_answer(word, reply, counts):
    """What a client was told about one word is true: it ran once, or it was told that it did not."""
    if reply is None or reply.status == 0 or reply.status >= 500:
        assert counts.get(word, 0) <= 1  # it was told nothing
    elif reply.status == 409:
        assert word not in counts and reply.json["code"] == 4
    else:
        (entry,) = reply.json["results"]
        state = entry.get("state", entry.get("status"))
        if state == "busy":
            assert word not in counts
        else:
            assert state in ("ok", "accepted") and counts[word] == 1, entry
            assert state == "accepted" or entry["stdout"] == word + "\n"


def list_states(deployment):
    """(run's file, its state) of every run that the hosts know of."""
    found = set()
    for host in deployment.hosts.values():
        for name in os.listdir(os.path.join(host.config.runs_dir, "control")):
            if name.endswith(".json"):
                found.add((host.name, name, host.record(name[:-5])["status"]))
    return found


def wait_for_quiet(deployment):
    """Wait until no run is under way and none begins any more; returns their marks, (word, request id)."""

    def is_quiet():
        before = list_states(deployment)
        time.sleep(0.5)  # a request of a server that is dead may still be on its way
        return before == list_states(deployment) and {state for _, _, state in before} == {"done"}

    wait_until(is_quiet, what="the end of all runs")
    with open(deployment.marks, encoding="ascii") as file:
        return [line.split() for line in file]


@pytest.mark.skipif(not shutil.which("haproxy", path=ctrl_exec.SAFE_PATH), reason="needs haproxy")
def test_a_server_that_is_killed_under_load_loses_no_run_and_none_runs_twice(cluster, tmp_path):
    deployment, (one, two) = cluster
    front = Front(str(tmp_path / "proxy"), "haproxy", one, two)
    stop = threading.Event()
    clients = [Client(number, front, stop) for number in range(CLIENTS)]

    def wait_for_answers(what):
        count = lambda: sum(
            is_answer(reply) for client in clients for reply in list(client.told.values())
        )  # noqa: E731
        before = count()
        wait_until(lambda: count() > before + 12, what=what)

    try:
        for client in clients:
            client.start()
        for _ in range(2):
            wait_for_answers("load")
            os.kill(one.process.pid, signal.SIGKILL)
            one.process.wait()
            wait_for_answers("load on one server")
            one.start()
    finally:
        stop.set()
        for client in clients:
            client.join(90)
        front.stop()
    marks = wait_for_quiet(deployment)
    counts = {word: [one for one, _ in marks].count(word) for word, _ in marks}
    told = {word: reply for client in clients for word, reply in client.told.items()}
    assert set(counts) <= set(told) and set(counts.values()) == {1}
    for word, reply in told.items():
        check_answer(word, reply, counts)
    for _, reqid in marks[-20:]:  # whatever became of its server, its answer is to be had
        status = two.call("GET", "/status/" + reqid).json
        states = list(status["hosts"].values()) if status["mode"] == "async" else status["results"]
        assert [entry["exit"] for entry in states] == [0] and status["complete"]
    recorded = {name[:-5] for name in os.listdir(one.config.runs_dir) if name.endswith(".json")}
    assert {reqid for _, reqid in marks} <= recorded
    assert deployment.control.json("list-locks")[1]["locks"] == []
    assert "ACTION=bug" not in deployment.control.log()
    assert json.loads(deployment.control.run("history", "--json").out)["ok"] is True


def test_a_listener_goes_on_at_the_other_server(cluster, tmp_path):
    _, (one, two) = cluster
    gate = tmp_path / "gate"
    reqid = one.run_script(["alpha"], "talk", str(gate), **{"async": True}).json["reqid"]
    with one.connect() as sock:
        send_http(sock, "GET", "/events/" + reqid)
        data = b""
        while b"one" not in data:
            data += sock.recv(65536)
    first = parse_events(data[data.index(b"id: ") :].split(b"\r\n")[0])
    place = first[-1][0]
    gate.touch()
    rest = parse_events(two.call("GET", "/events/" + reqid, Last_Event_ID=place).body)
    assert [data["data"] for _, kind, data in first + rest if kind == "output"] == ["one\n", "two\n"]
    assert rest[-1][1] == "complete"
