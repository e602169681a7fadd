"""Listening: silent, slow and too many clients cost a slot and a deadline, and the service goes on."""

import json
import os
import resource
import signal
import socket
import ssl
import subprocess
import threading

import pytest

import ctrl_exec
import support
from support import wait_until


def has_ipv6():
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


def client_hello():
    """The first bytes of a TLS client."""
    outgoing = ssl.MemoryBIO()
    tls = support.client_context().wrap_bio(ssl.MemoryBIO(), outgoing)
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


class Crowd:
    """Many clients at once on one port; all are gone when the block ends."""

    def __init__(self, port):
        self._port = port
        self._sockets = []
        self._slow = []  # [socket, bytes that are left]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._drip)

    def __enter__(self):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()
        for sock in self._sockets:
            sock.close()

    def add_silent(self, count):
        for _ in range(count):
            sock = socket.socket()
            self._sockets.append(sock)
            sock.setblocking(False)
            sock.connect_ex(("127.0.0.1", self._port))

    def add_slow_tls(self, count):
        hello = client_hello()
        for _ in range(count):
            sock = socket.create_connection(("127.0.0.1", self._port), 20)
            self._sockets.append(sock)
            self._slow.append([sock, hello])

    def add_slow_http(self, count, context, start=b""):
        """Clients that finish TLS, send `start` at once and then one byte at a time."""
        for _ in range(count):
            sock = support.tls_connect(self._port, context)
            self._sockets.append(sock)
            sock.sendall(start)
            self._slow.append([sock, b"POST /ping HTTP/1.1\r\nX-A: " + b"y" * 20000])

    def _drip(self):
        while not self._stop.wait(0.2):
            for entry in list(self._slow):
                try:
                    entry[0].send(entry[1][:1])
                    entry[1] = entry[1][1:]
                except (OSError, ValueError):  # closed by the server, as it may
                    self._slow.remove(entry)


BODY_TO_COME = b"POST /ping HTTP/1.1\r\nContent-Length: 60000\r\n\r\n"


def assert_ping(control, name):
    code, answer = control.json("ping", name)
    assert (code, [entry["status"] for entry in answer["results"]]) == (0, ["ok"]), answer


def count_threads(pid):
    return len(os.listdir("/proc/%d/task" % pid))


def count_descriptors(pid):
    return len(os.listdir("/proc/%d/fd" % pid))


def end(host):
    """SIGTERM; returns the exit status and what the agent printed."""
    host.process.send_signal(signal.SIGTERM)
    printed = host.process.stdout.read().decode()
    return host.process.wait(60), printed


# --- crowds on the agent's port -------------------------------------------------------------------------


def test_a_hundred_silent_and_a_hundred_slow_clients_do_not_keep_a_ping_out(fresh):
    deployment = fresh("solo")
    solo, context = deployment["solo"], support.dispatcher_context(deployment.control)
    with Crowd(solo.port) as crowd:
        crowd.add_silent(100)
        crowd.add_slow_tls(34)
        crowd.add_slow_http(33, context)
        crowd.add_slow_http(33, context, BODY_TO_COME)
        assert_ping(deployment.control, "solo")
        assert_ping(deployment.control, "solo")
    pid = solo.front()
    wait_until(lambda: count_threads(pid) == 1, what="the end of all threads")
    status, printed = end(solo)
    assert (status, printed) == (0, "")
    assert "ACTION=bug" not in solo.log()


def test_five_hundred_silent_clients_do_not_keep_a_ping_out_of_256_places(fresh):
    deployment = fresh("solo")
    solo = deployment["solo"]
    assert solo.config.max_connections == 256
    pid = solo.front()
    with Crowd(solo.port) as crowd:
        crowd.add_silent(500)
        assert_ping(deployment.control, "solo")
        assert_ping(deployment.control, "solo")
    wait_until(lambda: count_threads(pid) == 1, what="the end of all threads")
    assert solo.front() == pid
    assert_ping(deployment.control, "solo")
    status, printed = end(solo)
    assert (status, printed) == (0, "")
    assert "ACTION=bug" not in solo.log()


def test_ten_silent_clients_do_not_keep_a_ping_out_of_four_places(fresh):
    deployment = fresh(start=False)
    solo = deployment["solo"]
    solo.configure("rate_limit_disable = yes\nmax_connections = 4\n")
    solo.start()
    with Crowd(solo.port) as crowd:
        crowd.add_silent(10)
        assert_ping(deployment.control, "solo")
        crowd.add_slow_http(4, support.dispatcher_context(deployment.control))
        assert_ping(deployment.control, "solo")
    assert "ACTION=bug" not in solo.log()


def test_a_run_that_is_being_answered_is_not_pushed_out_by_a_crowd(fresh, tmp_path):
    deployment = fresh(start=False)
    solo, control = deployment["solo"], deployment.control
    solo.configure("rate_limit_disable = yes\nmax_connections = 4\n")
    solo.script("gate", 'touch "$1.begun"; while [ ! -e "$1" ]; do sleep 0.05; done; echo through\n')
    solo.start()
    gate = str(tmp_path / "gate")
    run = control.spawn("run", "solo", "gate", "--json", "--", gate, stdout=subprocess.PIPE)
    try:
        wait_until(lambda: os.path.exists(gate + ".begun"), what="the run")
        with Crowd(solo.port) as crowd:
            crowd.add_silent(40)
            assert_ping(control, "solo")
    finally:
        open(gate, "w").close()
        printed, _ = run.communicate(timeout=60)
    result = json.loads(printed)["results"][0]
    assert (run.returncode, result["state"], result["stdout"]) == (0, "ok", "through\n")


def start_with_few_descriptors(host):
    """Start the agent under a limit of 48 descriptors."""
    host.process = host.spawn(
        "serve",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48)),
    )
    wait_until(host.is_up, what="the agent's port")


def test_out_of_descriptors_the_agent_says_so_and_recovers(fresh):
    deployment = fresh(start=False)
    solo = deployment["solo"]
    start_with_few_descriptors(solo)
    assert_ping(deployment.control, "solo")
    pid = solo.front()
    for _ in range(3):
        seen = len(solo.events("deny"))
        with Crowd(solo.port) as crowd:
            crowd.add_silent(100)
            wait_until(lambda: len(solo.events("deny")) > seen, what="the event")
        wait_until(lambda: count_threads(pid) == 1, what="the end of all threads")
    assert "out of file descriptors" in solo.events("deny")[0]
    assert_ping(deployment.control, "solo")
    assert solo.front() == pid
    status, printed = end(solo)
    assert (status, printed) == (0, "")
    assert "ACTION=bug" not in solo.log()


def test_out_of_descriptors_a_caller_is_told_to_try_later(fresh):
    deployment = fresh(start=False)
    solo = deployment["solo"]
    start_with_few_descriptors(solo)
    body = b'{"script":"hello","reqid":"no-room"}'
    with support.tls_connect(solo.port, support.dispatcher_context(deployment.control)) as sock:
        sock.sendall(b"POST /ping HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}")
        assert support.read_reply(sock)[0] == 200
        with Crowd(solo.port) as crowd:
            crowd.add_silent(100)
            wait_until(lambda: solo.events("deny"), what="the event")
            sock.sendall(b"POST /run HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            status, _, answer = support.read_reply(sock)
    assert status == 503
    assert json.loads(answer)["status"] == "unavailable"


def test_three_hundred_requests_leave_no_thread_descriptor_or_process(fresh):
    deployment = fresh("solo")
    solo, context = deployment["solo"], support.dispatcher_context(deployment.control)
    plain = support.client_context()

    def burst(count):
        for number in range(count):
            kind = number % 10
            if kind == 0:
                body = {"script": "hello", "reqid": ctrl_exec.new_id()}
                assert support.post(solo.port, context, "/run", body)[0] == 200
            elif kind < 4:
                assert support.post(solo.port, context, "/ping", {})[0] == 200
            elif kind < 6:
                assert support.post(solo.port, context, "/nothing", {})[0] == 404
            elif kind == 6:
                assert support.send_raw(solo.port, context, b"nonsense\r\n\r\n")[0] == 400
            elif kind == 7:
                assert support.send_raw(solo.port, plain, b"GET / HTTP/1.1\r\n\r\n")[0] == 0
            elif kind == 8:
                socket.create_connection(("127.0.0.1", solo.port)).close()
            else:
                with support.tls_connect(solo.port, context) as sock:
                    sock.sendall(BODY_TO_COME + b"x")

    def counts():
        pids = (solo.process.pid, solo.front())
        return [count_threads(pid) for pid in pids] + [count_descriptors(pid) for pid in pids]

    burst(20)
    wait_until(lambda: count_threads(solo.front()) == 1, what="the end of all threads")
    wait_until(lambda: len(solo.children()) == 2, what="the end of all supervisors")
    before = counts()
    burst(300)
    wait_until(lambda: counts() == before, what="the counts of before")
    assert len(wait_until(lambda: len(solo.children()) == 2 and solo.children())) == 2
    status, printed = end(solo)
    assert (status, printed) == (0, "")
    assert "ACTION=bug" not in solo.log()


def test_a_client_that_is_sent_away_just_before_its_handshake_is_no_crash(deployment):
    class SentAway(ssl.SSLSocket):
        def do_handshake(self, block=False):
            connection.send_away()  # as the accepting thread may do at any moment
            super().do_handshake(block)

    noted = []
    context = ctrl_exec.new_server_context(ctrl_exec.agent_identity(deployment["alpha"].config), True)
    context.sslsocket_class = SentAway
    policy = ctrl_exec.ServerPolicy(lambda address: True, lambda *what: noted.append(what[:2]))
    server = ctrl_exec.Server([], context, lambda *_: None, policy, 4)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with socket.create_connection(listener.getsockname()):
            raw, name = listener.accept()
            connection = ctrl_exec._Connection(raw, *name)
            server._serve_connection(connection)
    assert noted == [("127.0.0.1", "silent")]


# --- speaking something else ----------------------------------------------------------------------------


def test_a_request_in_clear_is_not_parsed(deployment):
    alpha = deployment["alpha"]
    body = b'{"script":"hello","reqid":"in-clear"}'
    data = b"POST /run HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    with socket.create_connection(("127.0.0.1", alpha.port), 20) as sock:
        sock.sendall(data)
        answer = b""
        try:
            sock.shutdown(socket.SHUT_WR)
            while True:
                piece = sock.recv(65536)
                if not piece:
                    break
                answer += piece
        except OSError:  # it has been closed, or reset
            pass
    assert b"HTTP" not in answer
    assert not os.path.exists(os.path.join(alpha.config.runs_dir, "control", "in-clear.json"))
    wait_until(lambda: [line for line in alpha.events("tls-failure") if "plain HTTP" in line])


def test_old_tls_and_weak_ciphers_are_refused(deployment):
    alpha = deployment["alpha"]
    for change in ("AES128-SHA256", "ECDHE-RSA-AES128-SHA", "AES128-GCM-SHA256"):
        context = support.dispatcher_context(deployment.control)
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers(change)
        with pytest.raises((ssl.SSLError, OSError)):
            support.tls_connect(alpha.port, context).close()
    assert_ping(deployment.control, "alpha")


def test_tls_1_2_with_a_modern_cipher_is_served(deployment):
    context = support.dispatcher_context(deployment.control)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    assert support.post(deployment["alpha"].port, context, "/ping", {})[0] == 200


# --- addresses ------------------------------------------------------------------------------------------


def test_a_taken_pairing_port_is_one_sentence_and_status_78(tmp_path):
    port = support.free_port()
    control = support.Control(tmp_path / "control", "pairing_port = %d\n" % port)
    with socket.create_server(("0.0.0.0", port)):
        done = control.run("pairing-mode", input=b"")
    assert done.returncode == 78
    assert "port %d: Address already in use" % port in done.err


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback")
def test_ipv6_is_served_beside_ipv4(fresh):
    deployment = fresh(start=False)
    solo, control = deployment["solo"], deployment.control
    text = support.as_starter("port = %d\nbind = 127.0.0.1, ::1\nrate_limit_disable = yes\n" % solo.port)
    solo.put(ctrl_exec.AGENT_ETC + "/agent.conf", text, 0o640)
    solo.start()
    assert_ping(control, "solo")
    assert control.run("edit-agent", "solo", "--ip", "::1").returncode == 0
    code, answer = control.json("run", "solo", "context")
    assert (code, answer["results"][0]["state"]) == (0, "ok")
    assert json.loads(answer["results"][0]["stdout"])["peer_ip"] == "::1"


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback")
def test_without_bind_all_addresses_are_served_and_ipv4_peers_keep_their_address(fresh):
    deployment = fresh(start=False)
    solo, control = deployment["solo"], deployment.control
    text = "port = %d\nrate_limit_disable = yes\nallowed_ips = 127.0.0.1\n" % solo.port
    solo.put(ctrl_exec.AGENT_ETC + "/agent.conf", text, 0o640)
    solo.start()
    assert_ping(control, "solo")  # 127.0.0.1, not ::ffff:127.0.0.1, which allowed_ips would not match
    with socket.create_connection(("::1", solo.port), 20) as sock:
        assert sock.recv(1) == b""
    assert "PEER=::1" in solo.events("ip-block")[0]


def test_port_0_is_the_same_for_all_addresses():
    listeners = ctrl_exec.open_listeners(("127.0.0.1", "127.0.0.2"), 0)
    try:
        assert len({listener.getsockname()[1] for listener in listeners}) == 1
    finally:
        for listener in listeners:
            listener.close()


# --- the end --------------------------------------------------------------------------------------------


def test_sigterm_lets_a_run_be_answered_refuses_new_callers_and_exits_0(fresh, tmp_path):
    deployment = fresh(start=False)
    solo, control = deployment["solo"], deployment.control
    solo.script("gate", 'touch "$1.begun"; while [ ! -e "$1" ]; do sleep 0.05; done; echo through\n')
    solo.start()
    idle = support.tls_connect(solo.port, support.dispatcher_context(control))
    gate = str(tmp_path / "gate")
    run = control.spawn("run", "solo", "gate", "--json", "--", gate, stdout=subprocess.PIPE)
    try:
        wait_until(lambda: os.path.exists(gate + ".begun"), what="the run")
        solo.process.send_signal(signal.SIGTERM)
        wait_until(lambda: not solo.is_up(), what="the end of listening")
        assert idle.recv(1) == b""  # what waits is closed
        assert solo.process.poll() is None
    finally:
        open(gate, "w").close()
        idle.close()
        printed, _ = run.communicate(timeout=60)
    result = json.loads(printed)["results"][0]
    assert (run.returncode, result["state"], result["stdout"]) == (0, "ok", "through\n")
    assert solo.process.wait(60) == 0
    assert len(solo.events("stop")) == 1


def test_sigterm_with_a_crowd_on_the_port_exits_0(fresh):
    deployment = fresh("solo")
    solo = deployment["solo"]
    with Crowd(solo.port) as crowd:
        crowd.add_silent(50)
        crowd.add_slow_tls(10)
        crowd.add_slow_http(10, support.dispatcher_context(deployment.control), BODY_TO_COME)
        status, printed = end(solo)
    assert (status, printed) == (0, "")


# --- crowds on the pairing port -------------------------------------------------------------------------


@pytest.mark.parametrize("silent", (100, 500))
def test_a_crowd_on_the_pairing_port_does_not_keep_an_agent_from_pairing(tmp_path, silent):
    control = support.Control(tmp_path / "control", "pairing_rate_limit_disable = yes\n")
    host = support.Host(tmp_path / "host", "newcomer")
    token = control.run("pairing-token").out.split()[-1]
    process = control.open_pairing()
    try:
        with Crowd(process.port) as crowd:
            crowd.add_silent(silent)
            if silent == 100:
                crowd.add_slow_tls(34)
                crowd.add_slow_http(33, support.client_context())
                crowd.add_slow_http(33, support.client_context(), BODY_TO_COME.replace(b"ping", b"pair"))
            done = host.run(
                "request-pairing", "--dispatcher", "127.0.0.1:%d" % process.port, "--name", "newcomer",
                env={"CTRL_EXEC_PAIRING_TOKEN": token},
            )  # fmt: skip
            assert done.returncode == 0, done.err
    finally:
        process.send_signal(signal.SIGINT)
        printed = process.communicate(timeout=60)[0].decode()
    assert "Traceback" not in printed
    assert "ACTION=bug" not in control.log()
    assert ctrl_exec.find_agent(control.config.registry_dir, "newcomer").cert_name == "newcomer"
    assert os.path.exists(host.config.cert)
