"""Requests that outlive their connection, as an operator sees them."""

import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
import termios
import threading
import time

import ctrl_exec
import peers
import pytest
import support
from support import wait_until

SCRIPTS = {
    "gate": 'echo begun\nwhile [ ! -e "$1" ]; do sleep 0.02; done\necho through\n',
    "mark": 'echo x >> "$1"\necho marked\n',
    "gated-mark": 'echo x >> "$1"\nwhile [ ! -e "$2" ]; do sleep 0.02; done\necho through\n',
    "halves": 'printf "\\303"; while [ ! -e "$1" ]; do sleep 0.02; done; printf "\\244 end\\377"\n',
    "both": "echo out-1; echo err-1 >&2; echo out-2; echo err-2 >&2; printf tail\n",
    "stubborn": 'trap "" TERM; sleep 71 & sleep 72 & echo ready; wait; wait\n',
    "escape": "setsid sleep 73 & sleep 0.2; echo ready; wait; sleep 74\n",
    "fail": 'echo x >> "$1"; exit 3\n',
}


class Relay:
    """A TCP relay in front of an agent that can cut what passes through it."""

    def __init__(self, port, own_port=0):
        self._target = port
        self.open = True  # whether new connections are served
        self.pairs = []
        self._listener = peers.Listener(self._serve, own_port)
        self.port = self._listener.port

    def _serve(self, near):
        if not self.open:
            near.close()
            return
        far = socket.create_connection(("127.0.0.1", self._target))
        self.pairs.append((near, far))
        for one, other in ((near, far), (far, near)):
            threading.Thread(target=self._pump, args=(one, other), daemon=True).start()

    def _pump(self, one, other):
        try:
            while True:
                data = one.recv(65536)
                if not data:
                    break
                other.sendall(data)
        except OSError:
            pass
        for sock in (one, other):
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def cut(self, reopen=True):
        """Break every connection; `reopen` says whether new ones are served."""
        self.open = reopen
        for pair in self.pairs:
            for sock in pair:
                try:
                    sock.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass
        self.pairs = []

    def close(self):
        self._listener.close()
        self.cut()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    with support.Deployment(tmp_path_factory.mktemp("requests"), ("alpha", "beta"), start=False) as made:
        for host in made.hosts.values():
            for name, body in SCRIPTS.items():
                host.script(name, body, "max_running=4")
            host.script("single", SCRIPTS["gate"])
            host.start()
        yield made


@pytest.fixture
def relay(site):
    """A relay to alpha."""
    one = Relay(site["alpha"].port)
    yield one
    one.close()


def open_way(path):
    """Let the agent's unprivileged front reach a file below a temporary directory of root's."""
    while path != "/":
        path = os.path.dirname(path)
        os.chmod(path, os.stat(path).st_mode | 0o055)


def submit(site, *words):
    """Submit with --async; returns the request id."""
    status, shown = site.control.json("run", "--async", *words)
    assert status == 0, shown
    return shown["reqid"]


def record(site, reqid):
    with open(os.path.join(site.control.config.runs_dir, reqid + ".json"), encoding="ascii") as file:
        return json.load(file)


def host_status(site, reqid, name="alpha", verb="status"):
    return site.control.json(verb, reqid)[1]["hosts"][name]


def count(path):
    """How often a marking script has run."""
    return path.read_text().count("x") if path.exists() else 0


# --- asynchronous ---------------------------------------------------------------------------------------


def test_an_asynchronous_run_is_accepted_then_pending_then_complete(site, tmp_path):
    gate = tmp_path / "gate"
    done = site.control.run("run", "--async", "alpha", "beta", "gate", "--", str(gate))
    lines = done.out.splitlines()
    assert done.returncode == 0
    assert sorted(line.split("  ")[0] for line in lines[:2]) == ["==> alpha", "==> beta"]
    assert all("[accepted  " in line and line.endswith("ms]") for line in lines[:2])
    word, reqid = lines[2].split()
    assert word == "Request"
    shown = site.control.run("status", reqid)
    assert shown.returncode == 2
    assert shown.out.splitlines() == [
        "Request %s  (script: gate)  [PENDING]" % reqid, "==> alpha  [running]", "==> beta  [running]",
    ]  # fmt: skip
    assert site.control.run("wait", "--timeout", "1", reqid).returncode == 2
    gate.touch()
    waited = site.control.run("wait", reqid)
    assert waited.returncode == 0
    assert waited.out.splitlines() == [
        "Request %s  (script: gate)  [COMPLETE]" % reqid,
        "==> alpha  [done  exit:0]", "begun", "through", "==> beta  [done  exit:0]", "begun", "through",
    ]  # fmt: skip
    assert site.control.run("status", reqid).out == waited.out


def test_a_submission_in_json_has_a_status_for_each_host(site, tmp_path):
    gate = tmp_path / "gate"
    first = submit(site, "alpha", "single", "--", str(gate))
    status, shown = site.control.json("run", "--async", "alpha", "single", "--", str(gate))
    gate.touch()
    assert (status, shown["results"][0]["status"]) == (1, "busy")
    assert "already running" in shown["results"][0]["error"]
    assert host_status(site, first, verb="wait")["status"] == "done"
    assert host_status(site, shown["reqid"])["status"] == "busy"


def test_busy_and_error_are_told_apart_for_each_host(site, tmp_path):
    gate = tmp_path / "gate"
    reqid = submit(site, "alpha", "single", "--", str(gate))
    busy = site.control.run("run", "--async", "alpha", "single", "--", str(gate))
    wrong = site.control.run("run", "--async", "alpha", "no-such-script")
    gate.touch()
    assert busy.returncode == wrong.returncode == 1
    assert "==> alpha  [BUSY: single is already running here (request " in busy.out
    assert "==> alpha  [ERROR: script not permitted]" in wrong.out
    assert site.control.run("wait", reqid).returncode == 0


def test_wait_says_that_some_have_failed(site, tmp_path):
    reqid = submit(site, "alpha", "fail", "--", str(tmp_path / "mark"))
    waited = site.control.run("wait", reqid)
    assert waited.returncode == 1 and "==> alpha  [done  exit:3]" in waited.out


def test_the_status_in_json(site):
    reqid = submit(site, "alpha", "hello")
    assert site.control.run("wait", reqid).returncode == 0
    status, shown = site.control.json("status", reqid)
    assert status == 0
    assert {key: shown[key] for key in ("ok", "reqid", "script", "mode", "complete", "pending")} == {
        "ok": True, "reqid": reqid, "script": "hello", "mode": "async", "complete": True, "pending": [],
    }  # fmt: skip
    assert shown["hosts"] == {
        "alpha": {"status": "done", "state": "ok", "exit": 0, "stdout": "hello\n", "stderr": ""}
    }


def test_a_request_that_nobody_made_is_no_such_request(site):
    for reqid in ("0123456789abcdef", "../../etc/passwd", ""):
        for verb in ("status", "wait", "follow", "cancel"):
            done = site.control.run(verb, reqid)
            assert done.returncode == 1 and "No such request: " + reqid in done.err, (verb, reqid)


def test_a_result_that_the_host_has_no_more_is_expired(site):
    reqid = submit(site, "alpha", "hello")
    assert site.control.run("wait", reqid).returncode == 0
    for suffix in (".json", ".out", ".err"):
        os.unlink(os.path.join(site["alpha"].config.runs_dir, "control", reqid + suffix))
    shown = site.control.run("status", reqid)
    assert "==> alpha  [EXPIRED]" in shown.out and shown.returncode == 1


def test_records_have_neither_arguments_nor_token_nor_output(site):
    status, shown = site.control.json(
        "run", "alpha", "args", "--", "argument-canary", env={"ENVEXEC_TOKEN": "token-canary"}
    )
    assert status == 0
    path = os.path.join(site.control.config.runs_dir, shown["reqid"] + ".json")
    with open(path, encoding="ascii") as file:
        text = file.read()
    assert "canary" not in text and os.stat(path).st_mode & 0o777 == 0o640
    assert record(site, shown["reqid"])["hosts"] == {"alpha": ["ok", 0, ""]}


def test_history_lists_the_latest_first_and_a_spoiled_record_does_not_hide_the_others(site):
    first, second = submit(site, "alpha", "hello"), site.control.json("run", "alpha", "hello")[1]["reqid"]
    os.utime(os.path.join(site.control.config.runs_dir, first + ".json"))
    values = dict(record(site, second), started="2999-01-01T00:00:00Z")
    with open(os.path.join(site.control.config.runs_dir, second + ".json"), "w", encoding="ascii") as file:
        json.dump(values, file)
    spoiled = site.control.put(ctrl_exec.VAR + "/runs/spoiled.json", "{")
    done = site.control.run("history")
    rows = done.out.splitlines()[2:]
    assert rows[0].split()[0] == second and first in [row.split()[0] for row in rows]
    assert done.returncode == 1 and "spoiled.json" in done.err
    os.unlink(spoiled)
    status, shown = site.control.json("history", "--last", "1")
    assert (status, [run["reqid"] for run in shown["runs"]]) == (0, [second])
    os.unlink(os.path.join(site.control.config.runs_dir, second + ".json"))


def test_records_are_forgotten_when_their_time_is_over(site):
    reqid = submit(site, "alpha", "hello")
    runs = site.control.config.runs_dir
    old = time.time() - 25 * 3600
    for name in (reqid + ".json", ".swept"):
        os.utime(os.path.join(runs, name), (old, old))
    young = submit(site, "alpha", "hello")
    assert not os.path.exists(os.path.join(runs, reqid + ".json"))
    assert os.path.exists(os.path.join(runs, young + ".json"))


def test_nothing_is_sent_when_the_request_cannot_be_recorded(site, tmp_path):
    mark = tmp_path / "mark"
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    conf = site.control.put("/other.conf", "dispatcher_id = control\nruns_dir = %s/runs\n" % blocked)
    done = site.control.run("--config", conf, "run", "alpha", "mark", "--", str(mark))
    assert done.returncode == 1 and str(blocked) in done.err and count(mark) == 0


def test_another_dispatchers_run_does_not_exist_for_this_one(site, tmp_path, openssl):
    key, cert, ca = str(tmp_path / "other.key"), str(tmp_path / "other.crt"), site.control.config.ca
    ctrl_exec.new_key_file(openssl, key, "ec")
    request = openssl.new_request(key, "other")
    pem = openssl.sign(request, "other", "dispatcher", 30, ca, ctrl_exec.ca_key_path(ca))
    with open(cert, "w", encoding="ascii") as file:
        file.write(pem)
    host = site["alpha"]
    ctrl_exec.add_trusted(
        host.config.trusted_dispatchers_path, ctrl_exec.read_certificate(cert).serial, "other"
    )
    assert "RESULT=ok" in host.reload()
    gate = tmp_path / "gate"
    reqid = submit(site, "alpha", "gate", "--", str(gate))
    other = support.client_context(cert, key, ca)
    for path, body, method in (
        ("/result/" + reqid, b"", "GET"), ("/follow/" + reqid, b"", "GET"),
        ("/cancel", {"reqid": reqid}, "POST"),
    ):  # fmt: skip
        status, answer = support.post(host.port, other, path, body, method)
        assert (status, answer["status"]) == (404, "unknown"), path
        assert answer["error"] == "no such request: " + reqid
    assert host_status(site, reqid)["status"] == "running"
    gate.touch()
    assert site.control.run("wait", reqid).returncode == 0


# --- streamed -------------------------------------------------------------------------------------------


def test_a_line_appears_before_its_script_has_ended(site, tmp_path):
    gate = tmp_path / "gate"
    process = site.control.spawn("run", "--stream", "alpha", "gate", "--", str(gate), stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"begun\n"
    assert process.poll() is None
    gate.touch()
    rest = process.stdout.read().decode().splitlines()
    assert process.wait(30) == 0
    assert rest[0] == "through" and rest[1].startswith("==> alpha  [OK  exit:0  ") and len(rest) == 2
    process.stdout.close()


def test_lines_of_several_hosts_carry_their_host_and_streams_stay_apart(site):
    done = site.control.run("run", "--stream", "alpha", "beta", "both")
    assert done.returncode == 0
    for host in ("alpha", "beta"):
        out = [line for line in done.out.splitlines() if line.startswith(host + ": ")]
        assert out == ["%s: %s" % (host, text) for text in ("out-1", "out-2", "tail")]
        err = [line for line in done.err.splitlines() if line.startswith(host + ": ")]
        assert err == ["%s: %s" % (host, text) for text in ("err-1", "err-2")]
        assert done.out.count("==> %s  [OK  exit:0" % host) == 1


def test_a_character_in_two_halves_and_a_byte_that_is_none_arrive_as_they_are(site, tmp_path):
    gate = tmp_path / "gate"
    process = site.control.spawn(
        "run", "--stream", "alpha", "halves", "--", str(gate), stdout=subprocess.PIPE
    )
    wait_until(lambda: any(r["status"] == "running" for r in all_records(site["alpha"], "halves")))
    gate.touch()
    out = process.communicate(timeout=60)[0]
    assert out.splitlines()[0] == b"\xc3\xa4 end\xff"


def all_records(host, script):
    directory = os.path.join(host.config.runs_dir, "control")
    names = os.listdir(directory) if os.path.isdir(directory) else []
    found = [host.record(name[:-5]) for name in names if name.endswith(".json")]
    return [one for one in found if one["script"] == script]


def test_a_stream_in_json_is_one_object_a_line(site):
    done = site.control.run("run", "--stream", "--json", "alpha", "both")
    *lines, result = [json.loads(line) for line in done.out.splitlines()]
    out = [line["line"] for line in lines if line["stream"] == "stdout"]
    assert out == ["out-1", "out-2", "tail"] and {line["host"] for line in lines} == {"alpha"}
    assert result["results"][0]["exit"] == 0


def test_a_stream_that_loses_its_connection_shows_every_line_once(site, relay, tmp_path):
    gate = tmp_path / "gate"
    process = site.control.spawn(
        "run", "--stream", "alpha:%d" % relay.port, "gate", "--", str(gate), stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"begun\n"
    relay.cut()
    gate.touch()
    rest = process.stdout.read().decode().splitlines()
    process.stdout.close()
    assert process.wait(30) == 0
    assert rest[0] == "through" and rest[1].startswith("==> alpha  [OK  exit:0")


def test_a_run_can_be_followed_from_its_beginning_and_from_now(site, tmp_path):
    gate = tmp_path / "gate"
    reqid = submit(site, "alpha", "gate", "--", str(gate))
    wait_until(
        lambda: os.path.getsize(os.path.join(site["alpha"].config.runs_dir, "control", reqid + ".out"))
    )
    both = [
        site.control.spawn("follow", *options, reqid, stdout=subprocess.PIPE)
        for options in ((), ("--from-now",))
    ]
    assert both[0].stdout.readline() == b"begun\n"
    wait_until(lambda: len([e for e in site["alpha"].events("result") if reqid in e and "FOLLOW" in e]) == 2)
    gate.touch()
    start, now = (process.communicate(timeout=60)[0].decode().splitlines() for process in both)
    assert start[0] == now[0] == "through"
    assert [process.returncode for process in both] == [0, 0]
    again = site.control.run("follow", reqid)
    assert again.out.splitlines()[:2] == ["begun", "through"] and again.returncode == 0
    assert site.control.run("follow", "--from-now", reqid).out.startswith("==> alpha  [OK")


# --- cancel and Ctrl-C ----------------------------------------------------------------------------------


def test_cancel_ends_the_whole_group_even_if_it_ignores_term(site):
    reqid = submit(site, "alpha", "stubborn")
    pid = wait_until(lambda: site["alpha"].record(reqid)["pid"])
    wait_until(lambda: len([p for p in ctrl_exec.list_processes() if p.session == pid]) == 3)
    done = site.control.run("cancel", reqid)
    assert done.out == "==> alpha  [cancelled  processes ended: 3  processes left: 0]\n"
    assert done.returncode == 0
    assert [p for p in ctrl_exec.list_processes() if p.session == pid] == []
    final = site["alpha"].record(reqid)
    assert (final["status"], final["cancelled"], final["timed_out"]) == ("done", True, False)
    shown = site.control.run("status", reqid)
    assert shown.returncode == 1 and "cancelled" in shown.out
    again = site.control.json("cancel", reqid)
    assert again[0] == 0 and again[1]["results"][0]["processes_left"] == 0


def test_cancel_ends_what_has_left_the_session(site):
    reqid = submit(site, "alpha", "escape")
    pid = wait_until(lambda: site["alpha"].record(reqid)["pid"])
    marks = ("CTRL_EXEC_REQID=" + reqid,)

    def away():
        return [p for p in ctrl_exec.list_processes() if p.has_variables(marks) and p.session != pid]

    (loose,) = wait_until(lambda: [p for p in away() if p.name == "sleep"])
    status, shown = site.control.json("cancel", reqid)
    assert status == 0 and shown["results"][0]["processes_left"] == 0
    assert loose.pid not in [process.pid for process in ctrl_exec.list_processes()]


def test_cancel_of_a_run_that_has_ended_says_so(site):
    reqid = submit(site, "alpha", "hello")
    assert site.control.run("wait", reqid).returncode == 0
    done = site.control.run("cancel", reqid)
    assert (done.returncode, done.out) == (0, "==> alpha  [done  processes ended: 0  processes left: 0]\n")
    assert site["alpha"].record(reqid)["cancelled"] is False


def run_to_interrupt(site, gate, stderr):
    """A synchronous run on both hosts, which waits for the gate there."""
    process = site.control.spawn("run", "alpha", "beta", "gate", "--", str(gate), stderr=stderr)
    wait_until(lambda: all(all_running(host) for host in site.hosts.values()), what="the runs")
    return process


def all_running(host):
    return [one for one in all_records(host, "gate") if one["status"] == "running"]


def test_ctrl_c_stops_waiting_and_not_the_script(site, tmp_path):
    gate = tmp_path / "gate"
    process = run_to_interrupt(site, gate, subprocess.PIPE)
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=60)[1].decode()
    reqid = err.partition("(request ")[2][:16]
    assert process.returncode == 130
    assert "alpha, beta" in err and "ced wait " + reqid in err and "ced cancel " + reqid in err
    assert len(all_running(site["alpha"])) == len(all_running(site["beta"])) == 1
    gate.touch()
    assert site.control.run("wait", reqid).returncode == 0
    assert site.control.run("list-locks").out.count("gate") == 0


def count_unread(descriptor):
    """How many bytes wait in a pipe."""
    return struct.unpack("i", fcntl.ioctl(descriptor, termios.FIONREAD, b"\0" * 4))[0]


def test_a_second_ctrl_c_cancels_on_the_hosts(site, tmp_path):
    """Also one that comes while the first is still being answered: there is room for one line to be said."""
    reader, writer = os.pipe()
    room = os.write(writer, b"x" * (65536 - 120))  # a pipe holds 64 KiB (pipe(7))
    process = run_to_interrupt(site, tmp_path / "gate", writer)
    os.close(writer)
    process.send_signal(signal.SIGINT)
    wait_until(lambda: count_unread(reader) > room, what="the first line")
    process.send_signal(signal.SIGINT)
    with open(reader, encoding="ascii") as said:
        err = said.read()[room:]
    reqid = err.partition("(request ")[2][:16]
    assert process.wait(60) == 130
    assert err.count("[cancelled  processes ended: ") == 2 and err.count("processes left: 0]") == 2
    assert all(host.record(reqid)["cancelled"] for host in site.hosts.values())


# --- lost connections -----------------------------------------------------------------------------------


def test_a_run_whose_connection_is_lost_reports_its_result_and_ran_once(site, relay, tmp_path):
    mark, gate = tmp_path / "mark", tmp_path / "gate"
    process = site.control.spawn(
        "run", "--json", "alpha:%d" % relay.port, "gated-mark", "--", str(mark), str(gate),
        stdout=subprocess.PIPE,
    )  # fmt: skip
    wait_until(lambda: count(mark) == 1)
    relay.cut()
    gate.touch()
    shown = json.loads(process.communicate(timeout=60)[0])
    assert process.returncode == 0
    assert (shown["results"][0]["state"], shown["results"][0]["stdout"]) == ("ok", "through\n")
    assert count(mark) == 1


def test_a_run_that_cannot_be_asked_about_is_unknown_with_the_way_to_go_on(site, relay, tmp_path):
    mark, gate = tmp_path / "mark", tmp_path / "gate"
    conf = site.control.put("/short.conf", "dispatcher_id = control\nread_timeout = 6\n")
    process = site.control.spawn(
        "--config", conf, "run", "alpha:%d" % relay.port, "gated-mark", "--", str(mark), str(gate),
        stdout=subprocess.PIPE,
    )  # fmt: skip
    wait_until(lambda: count(mark) == 1)
    relay.cut(reopen=False)
    out = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 1 and "unknown: " in out and "ced wait " in out
    gate.touch()
    reqid = out.partition("req:")[2].partition("]")[0]
    assert site.control.run("wait", reqid).returncode == 0
    assert count(mark) == 1


def test_a_read_timeout_ends_the_wait_and_not_the_script(site, tmp_path):
    gate = tmp_path / "gate"
    conf = site.control.put("/short.conf", "dispatcher_id = control\nread_timeout = 1\n")
    done = site.control.run("--config", conf, "run", "alpha", "gate", "--", str(gate))
    assert done.returncode == 1 and "read timeout after 1s" in done.out
    reqid = done.out.partition("req:")[2].partition("]")[0]
    assert "ced wait " + reqid in done.out
    gate.touch()
    waited = site.control.run("wait", reqid)
    assert waited.returncode == 0 and "through" in waited.out


def test_retries_repeat_what_was_busy_and_nothing_that_has_run(site, tmp_path):
    gate, mark = tmp_path / "gate", tmp_path / "mark"
    held = submit(site, "alpha", "single", "--", str(gate))
    process = site.control.spawn(
        "run", "--retries", "20", "alpha", "single", "--", str(gate), stdout=subprocess.PIPE
    )
    wait_until(lambda: [e for e in site["alpha"].events("deny") if "already running" in e and held not in e])
    gate.touch()
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and b"through" in out
    assert site.control.run("run", "--retries", "5", "alpha", "fail", "--", str(mark)).returncode == 1
    assert count(mark) == 1


def test_retries_reach_a_host_that_comes_up_later(site, tmp_path):
    mark, port = tmp_path / "mark", support.free_port()
    process = site.control.spawn(
        "run", "--retries", "20", "alpha:%d" % port, "mark", "--", str(mark), stdout=subprocess.PIPE
    )
    wait_until(lambda: site.control.events("lock-acquire"))
    behind = Relay(site["alpha"].port, port)
    out = process.communicate(timeout=60)[0]
    behind.close()
    assert process.returncode == 0 and b"marked" in out and count(mark) == 1


def test_a_killed_ced_leaves_no_lock_and_its_result_can_be_fetched(site, tmp_path):
    gate = tmp_path / "gate"
    process = site.control.spawn("run", "alpha", "gate", "--", str(gate), stdout=subprocess.PIPE)
    (running,) = wait_until(lambda: all_running(site["alpha"]))
    process.kill()
    process.communicate()
    assert site.control.json("list-locks")[1]["locks"] == []
    assert record(site, running["reqid"])["hosts"] == {"alpha": ["pending", -1, ""]}
    gate.touch()
    waited = site.control.run("wait", running["reqid"])
    assert waited.returncode == 0 and "through" in waited.out
    assert record(site, running["reqid"])["hosts"] == {"alpha": ["ok", 0, ""]}


# --- waiting and asking ---------------------------------------------------------------------------------


def test_waiting_is_one_question_and_not_one_a_second(site, tmp_path):
    gate = tmp_path / "gate"
    reqid = submit(site, "alpha", "gate", "--", str(gate))
    process = site.control.spawn("wait", reqid, stdout=subprocess.PIPE)

    def questions():
        return [event for event in site["alpha"].events("result") if reqid in event]

    wait_until(questions)
    time.sleep(2.5)  # in which a poll a second would ask twice more
    gate.touch()
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and b"through" in out
    assert len(questions()) == 1


def test_the_hook_is_asked_about_earlier_requests_and_obeyed(site, tmp_path):
    told = tmp_path / "told"
    hook = site.control.put(
        "/hook",
        '#!/bin/sh\necho "$ENVEXEC_ACTION $ENVEXEC_REQID $ENVEXEC_SUBMITTER $ENVEXEC_SCRIPT" >> %s\n'
        '[ "$ENVEXEC_USERNAME" != mallory ]\n' % told,
        0o755,
    )
    conf = site.control.put("/hook.conf", "dispatcher_id = control\nauth_hook = %s\n" % hook)
    status, shown = site.control.json(
        "--config", conf, "run", "--async", "--username", "ann", "alpha", "hello"
    )
    reqid = shown["reqid"]
    for verb, action in (
        ("wait", "status"),
        ("status", "status"),
        ("follow", "status"),
        ("cancel", "cancel"),
    ):
        assert site.control.run("--config", conf, verb, reqid).returncode == 0
        assert told.read_text().splitlines()[-1] == "%s %s ann hello" % (action, reqid)
        denied = site.control.run("--config", conf, verb, "--username", "mallory", reqid)
        assert denied.returncode == 1 and "not authorised" in denied.err


def test_the_agents_hook_can_refuse_a_cancel(fresh):
    site = fresh("solo", start=False)
    host = site["solo"]
    hook = host.put("/hook", '#!/bin/sh\n[ "$ENVEXEC_ACTION" != cancel ]\n', 0o755)
    open_way(hook)
    host.configure("auth_hook = %s\nrate_limit_disable = yes\n" % hook)
    host.start()
    reqid = site.control.json("run", "--async", "solo", "sleep", "--", "60")[1]["reqid"]
    done = site.control.run("cancel", reqid)
    assert done.returncode == 1 and "not authorised" in done.out
    assert host.record(reqid)["status"] == "running"
    host.configure("rate_limit_disable = yes\n")
    host.reload()
    assert site.control.run("cancel", reqid).returncode == 0
