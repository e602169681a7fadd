"""Promises about requests that outlive their connection which no other test would miss."""

import os
import re
import signal
import subprocess
import threading
import time

import ctrl_exec
import pytest
import support
from peers import Peer, read_request, routing
from support import wait_until

SCRIPTS = {
    "gate": 'echo begun\nwhile [ ! -e "$1" ]; do sleep 0.02; done\necho through\n',
    "tidy": 'trap "echo tidied; exit 3" TERM\necho begun\nwhile :; do sleep 0.02; done\n',
    "both": "echo text-of-stdout\necho text-of-stderr >&2\nexit 4\n",
    "soon": 'i=0; while [ $i -lt "$1" ]; do i=$((i + 1)); done\n',
    "mark": 'echo "$CTRL_EXEC_SCRIPT" >> "$1"; sleep 0.3\n',
    "other-mark": 'echo "$CTRL_EXEC_SCRIPT" >> "$1"; sleep 0.3\n',
    "here": 'echo begun\n[ "$CTRL_EXEC_HOST" = alpha ] && exit 5\nwhile [ ! -e "$1" ]; do sleep 0.02; done\n',
    "noise": "head -c 60000000 /dev/urandom >&2; exec head -c 60000000 /dev/urandom\n",
    "line": "head -c 200000000 /dev/zero | tr '\\000' x\n",
}
MEGABYTE = 1024 * 1024


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    with support.Deployment(tmp_path_factory.mktemp("promises"), ("alpha", "beta"), start=False) as made:
        for host in made.hosts.values():
            for name, body in SCRIPTS.items():
                host.script(name, body, "max_running=40")
            host.start()
        yield made


@pytest.fixture
def solo(fresh):
    """A control host and one agent of this test's own, which may be broken."""
    made = fresh("alpha", start=False)
    for name, body in SCRIPTS.items():
        made["alpha"].script(name, body)
    made["alpha"].start()
    return made


def submit(site, *words):
    status, shown = site.control.json("run", "--async", *words)
    assert status == 0, shown
    return shown["reqid"]


def begin(site, *words, **how):
    """Start `ced`, and wait until its script has begun: (the process, its request id)."""
    seen = {one.reqid for one in ctrl_exec.list_request_records(site.control.config.runs_dir)[0]}
    process = site.control.spawn(*words, stdout=subprocess.PIPE, **how)

    def started():
        records = ctrl_exec.list_request_records(site.control.config.runs_dir)[0]
        new = [one.reqid for one in records if one.reqid not in seen]
        return new[0] if new and os.path.exists(run_file(site, new[0], ".json")) else ""

    return process, wait_until(started, what="the script's start")


def run_file(site, reqid, suffix, name="alpha"):
    return os.path.join(site[name].config.runs_dir, "control", reqid + suffix)


def kill_front(host):
    os.kill(host.front(), signal.SIGKILL)


def kill_and_restart(host):
    host.process.kill()
    host.process.wait()
    wait_until(lambda: not host.is_up(), what="the closed port")
    host.process.stdout.close()
    host.start()


# --- asynchronous ---------------------------------------------------------------------------------------


def test_a_request_is_pending_while_one_host_is_although_another_has_failed(site, tmp_path):
    gate = tmp_path / "gate"
    reqid = submit(site, "alpha", "beta", "here", "--", str(gate))
    wait_until(lambda: site["alpha"].record(reqid)["status"] == "done", what="the end on the first host")
    status, shown = site.control.json("wait", "--timeout", "1", reqid)
    assert (status, shown["complete"], shown["pending"]) == (2, False, ["beta"])
    assert shown["hosts"]["alpha"]["exit"] == 5
    gate.touch()
    status, shown = site.control.json("wait", reqid)
    assert (status, shown["complete"], shown["hosts"]["beta"]["state"]) == (1, True, "ok")


@pytest.mark.parametrize("fault", [kill_front, kill_and_restart])
def test_wait_goes_on_when_the_agent_is_killed_meanwhile(solo, tmp_path, fault):
    gate, host = tmp_path / "gate", solo["alpha"]
    reqid = submit(solo, "alpha", "gate", "--", str(gate))
    waiting = solo.control.spawn("wait", reqid, stdout=subprocess.PIPE)
    wait_until(lambda: host.events("result"), what="the question")
    fault(host)
    wait_until(lambda: len(host.events("result")) >= 2, what="the second question")
    gate.touch()
    out = waiting.communicate(timeout=60)[0]
    assert waiting.returncode == 0 and b"[done  exit:0]\nbegun\nthrough\n" in out


def test_waiting_longer_than_one_question_lasts_is_another_question(site, tmp_path, monkeypatch):
    monkeypatch.setattr(ctrl_exec, "LONG_POLL", 1)
    gate = tmp_path / "gate"
    reqid = submit(site, "alpha", "gate", "--", str(gate))
    dispatcher = ctrl_exec.Dispatcher(site.control.config)
    ended = []
    record = dispatcher.get_request(reqid)
    thread = threading.Thread(target=lambda: ended.extend(dispatcher.wait(record, None)))
    thread.start()
    wait_until(lambda: sum(reqid in line for line in site["alpha"].events("result")) >= 2)
    gate.touch()
    thread.join(30)
    assert [(result.state, result.answer["stdout"]) for result in ended] == [("ok", "begun\nthrough\n")]


def test_two_who_wait_for_one_run_both_get_its_result(site, tmp_path):
    gate = tmp_path / "gate"
    reqid = submit(site, "alpha", "gate", "--", str(gate))
    both = [site.control.spawn("wait", reqid, stdout=subprocess.PIPE) for _ in range(2)]
    wait_until(lambda: sum(reqid in line for line in site["alpha"].events("result")) == 2)
    gate.touch()
    for process in both:
        assert b"[done  exit:0]\nbegun\nthrough\n" in process.communicate(timeout=60)[0]
        assert process.returncode == 0


def test_an_agent_forgets_old_runs_when_another_one_ends(solo):
    old = submit(solo, "alpha", "hello")
    supervisor = solo["alpha"].record(old)["supervisor"]
    # it has looked for old runs itself, and left a mark of that, when it ends; and it is the only one here
    wait_until(lambda: ctrl_exec.find_process(supervisor) is None, what="the end of the first run")
    assert solo["alpha"].record(old)["exit"] == 0
    then = time.time() - 25 * 3600
    runs = solo["alpha"].config.runs_dir
    for path in [run_file(solo, old, suffix) for suffix in (".json", ".out", ".err")] + [runs + "/.swept"]:
        os.utime(path, (then, then))
    young = submit(solo, "alpha", "hello")
    wait_until(lambda: {name.split(".")[0] for name in os.listdir(runs + "/control")} == {young}, what="the sweep")
    assert "[EXPIRED]" in solo.control.run("status", old).out


# --- streamed -------------------------------------------------------------------------------------------


def test_what_was_shown_as_it_came_is_in_no_exit_block(site):
    done = site.control.run("run", "--stream", "alpha", "both")
    assert done.returncode == 1 and "==> alpha  [FAIL  exit:4" in done.out
    assert (done.out + done.err).count("text-of-stdout") == done.out.count("text-of-stdout") == 1
    assert (done.out + done.err).count("text-of-stderr") == done.err.count("text-of-stderr") == 1


def test_a_streamed_run_outlives_its_ced_and_can_be_followed(site, tmp_path):
    gate = tmp_path / "gate"
    process, reqid = begin(site, "run", "--stream", "alpha", "gate", "--", str(gate))
    assert process.stdout.readline() == b"begun\n"
    process.kill()
    process.communicate()
    assert site.control.json("list-locks")[1]["locks"] == []
    follower = site.control.spawn("follow", reqid, stdout=subprocess.PIPE)
    asked = "ACTION=result .*FOLLOW=yes.*REQID=%s" % reqid
    wait_until(lambda: re.search(asked, site["alpha"].log()), what="the question")
    gate.touch()
    *shown, block = follower.communicate(timeout=60)[0].splitlines()
    assert shown == [b"begun", b"through"] and block.startswith(b"==> alpha  [OK  exit:0")


@pytest.mark.parametrize("mode", [(), ("--stream",)])
def test_ctrl_c_stops_waiting_for_a_single_host_too(site, tmp_path, mode):
    gate = tmp_path / "gate"
    process, reqid = begin(site, "run", *mode, "alpha", "gate", "--", str(gate), stderr=subprocess.PIPE)
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 130 and "ced wait %s, ced follow %s" % (reqid, reqid) in err
    assert site["alpha"].record(reqid)["status"] == "running"
    gate.touch()
    assert site.control.run("wait", reqid).returncode == 0


# --- cancelled ------------------------------------------------------------------------------------------


def test_cancel_lets_a_script_tidy_up(site):
    reqid = submit(site, "alpha", "tidy")
    wait_until(lambda: os.path.getsize(run_file(site, reqid, ".out")), what="the script's first line")
    assert "[cancelled  processes ended: " in site.control.run("cancel", reqid).out
    entry = site.control.json("status", reqid)[1]["hosts"]["alpha"]
    assert (entry["exit"], entry["cancelled"]) == (3, True) and "tidied" in entry["stdout"]


def test_cancel_of_a_run_that_is_about_to_end_gives_it_one_state(site):
    host, context = site["alpha"], support.dispatcher_context(site.control)
    said = set()
    for number in range(24):
        reqid = ctrl_exec.new_id()
        body = {"script": "soon", "args": [str(4000 * number)], "reqid": reqid, "async": True}
        assert support.post(host.port, context, "/run", body)[0] == 202
        status, answer = support.post(host.port, context, "/cancel", {"reqid": reqid})
        record = host.record(reqid)
        assert (status, answer["processes_left"], record["status"]) == (200, 0, "done")
        assert answer["status"] == ("cancelled" if record["cancelled"] else "done")
        assert record["cancelled"] or (record["exit"], record["signal"]) == (0, "")
        again = support.post(host.port, context, "/cancel", {"reqid": reqid})[1]
        assert (again["status"], host.record(reqid)) == (answer["status"], record)
        said.add(answer["status"])
    assert host.events("bug") == [] and said


# --- once -----------------------------------------------------------------------------------------------


def test_one_request_id_for_two_scripts_at_once_runs_one_of_them(site, tmp_path):
    context = support.dispatcher_context(site.control)
    for number in range(5):
        mark, reqid = tmp_path / str(number), ctrl_exec.new_id()
        connections = [support.tls_connect(site["alpha"].port, context) for _ in range(4)]
        for connection, script in zip(connections, ("mark", "other-mark") * 2):
            body = ctrl_exec.encode_json({"script": script, "args": [str(mark)], "reqid": reqid})
            head = b"POST /run HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
            connection.sendall(head + body)
        answers = []
        for connection in connections:
            status, _, reply = support.read_reply(connection)
            answers.append((status, ctrl_exec.json.loads(reply)))
            connection.close()
        assert len(mark.read_text().split()) == 1
        assert all(answer == answers[0] for answer in answers), answers
        assert (answers[0][0], answers[0][1]["script"]) == (200, mark.read_text().strip())


def test_retries_do_not_repeat_what_may_have_run(fresh):
    site = fresh("alpha", start=False)
    identity = ctrl_exec.agent_identity(site["alpha"].config)
    context = ctrl_exec.ssl.SSLContext(ctrl_exec.ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(identity.cert, identity.key)
    asked = []

    def fall_silent(raw, context):
        with context.wrap_socket(raw, server_side=True) as tls:
            asked.append(read_request(tls))

    peer = Peer(site["alpha"].port, fall_silent, context)
    conf = site.control.put("/short.conf", "dispatcher_id = control\nread_timeout = 30\n")
    status, shown = site.control.json("--config", conf, "run", "--retries", "3", "alpha", "hello")
    peer.close()
    assert (status, shown["results"][0]["state"]) == (1, "unknown")
    assert asked.count("POST /run") == 1
    assert "GET /result/%s?wait=" % shown["reqid"] in asked[1]


def test_a_run_whose_supervisor_is_killed_is_reported_as_interrupted(solo, tmp_path):
    process, reqid = begin(solo, "run", "--json", "alpha", "gate", "--", str(tmp_path / "gate"))
    os.kill(solo["alpha"].record(reqid)["supervisor"], signal.SIGKILL)
    (entry,) = ctrl_exec.json.loads(process.communicate(timeout=60)[0])["results"]
    assert process.returncode == 1
    assert (entry["state"], entry["interrupted"], entry["exit"]) == ("failed", True, 126)
    assert solo.control.run("status", reqid).returncode == 1


# --- output ---------------------------------------------------------------------------------------------


def peak(pid):
    """The most memory a process has had, in MiB; 0 when it is gone."""
    try:
        with open("/proc/%d/status" % pid, encoding="ascii") as file:
            return int(re.search(r"VmHWM:\s+(\d+)", file.read())[1]) / 1024
    except (OSError, TypeError):
        return 0


def test_large_results_are_never_whole_in_the_agents_memory(solo):
    host = solo["alpha"]
    assert solo.control.run("run", "alpha", "hello").returncode == 0
    before = max(peak(pid) for pid in [host.process.pid, *host.children()])
    shown = []
    conf = solo.control.put("/patient.conf", "dispatcher_id = control\nread_timeout = 600\n")
    words = ("--config", conf, "run", "alpha", "noise")
    thread = threading.Thread(target=lambda: shown.append(solo.control.json(*words, timeout=600)))
    thread.start()
    highest = 0.0
    while thread.is_alive():
        highest = max(highest, *(peak(pid) for pid in [host.process.pid, *host.children()]))
        thread.join(0.02)
    status, entry = shown[0][0], shown[0][1]["results"][0]
    assert status == 0
    for stream, suffix in (("stdout", ".out"), ("stderr", ".err")):
        assert entry[stream + "_truncated"] == 60_000_000 - 10 * MEGABYTE
        assert os.path.getsize(run_file(solo, entry["reqid"], suffix)) == 10 * MEGABYTE
    assert highest - before < 50


def test_a_line_without_an_end_is_never_whole_in_the_memory_of_ced(site, tmp_path):
    memory, size = {}, 0
    for script, data in (("gate", b"x"), ("line", b"x")):
        words = ("run", "--stream", "alpha", script, "--", str(tmp_path / "gate"))
        process = site.control.spawn(*words, stdout=subprocess.PIPE)
        while data:
            data = process.stdout.read1(65536)
            size += len(data)
            memory[script] = max(memory.get(script, 0), peak(process.pid))
            (tmp_path / "gate").touch()
        process.stdout.close()
        assert process.wait(30) == 0
    assert size > 10 * MEGABYTE and memory["gate"] > 0
    assert memory["line"] - memory["gate"] < 8  # less than the line


# --- what is not known ----------------------------------------------------------------------------------


def be_away(site):
    host = site["alpha"]
    host.stop()
    return host.start


def trust_nobody(site):
    host = site["alpha"]
    path = host.config.trusted_dispatchers_path
    with open(path, encoding="ascii") as file:
        trusted = file.read()

    def put(text):
        with open(path, "w", encoding="ascii") as file:
            file.write(text)
        assert "RESULT=ok" in host.reload()

    put("")
    return lambda: put(trusted)


@pytest.mark.parametrize("fault", [be_away, trust_nobody])
@pytest.mark.parametrize("verb", ["status", "cancel"])
def test_a_host_that_could_not_be_asked_is_asked_again(solo, tmp_path, fault, verb):
    gate = tmp_path / "gate"
    reqid = submit(solo, "alpha", "gate", "--", str(gate))
    mend = fault(solo)
    before = solo.control.run("status", reqid), solo.control.run("cancel", reqid)
    mend()
    after = solo.control.run(verb, reqid)
    gate.touch()
    assert [done.returncode for done in before] == [2, 1]  # nobody knows whether it has ended
    if verb == "status":
        assert (after.returncode, "==> alpha  [running]" in after.out) == (2, True), after.out
    else:
        assert (after.returncode, "[cancelled  " in after.out) == (0, True), after.out


def test_an_agent_that_has_no_time_to_answer_changes_nothing_that_is_known(fresh):
    site = fresh("alpha", start=False)
    identity = ctrl_exec.agent_identity(site["alpha"].config)
    context = ctrl_exec.ssl.SSLContext(ctrl_exec.ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(identity.cert, identity.key)
    full = (503, {"status": "unavailable", "error": "cannot start a process; try again later"})
    routes = {"POST /run": (202, {"status": "accepted"}), "GET /result": full, "POST /cancel": full}
    peer = Peer(site["alpha"].port, routing(routes), context)
    reqid = submit(site, "alpha", "hello")
    shown = [site.control.run("status", reqid) for _ in range(2)]
    routes["GET /result"] = (200, {"status": "running"})
    last = site.control.run("status", reqid)
    peer.close()
    assert [done.returncode for done in (*shown, last)] == [2, 2, 2] and "[running]" in last.out


def test_cancel_fails_when_the_host_is_not_registered_any_more(solo, tmp_path):
    gate = tmp_path / "gate"
    reqid = submit(solo, "alpha", "gate", "--", str(gate))
    assert solo.control.run("edit-agent", "alpha", "--rename", "gamma").returncode == 0
    done = solo.control.run("cancel", reqid)
    gate.touch()
    assert done.returncode == 1 and "not registered" in done.out


def test_a_cancelled_run_is_no_success_whatever_its_script_exits_with(solo):
    solo["alpha"].script("polite", 'trap "exit 0" TERM\necho begun\nwhile :; do sleep 0.02; done\n')
    assert "RESULT=ok" in solo["alpha"].reload()
    reqid = submit(solo, "alpha", "polite")
    wait_until(lambda: os.path.getsize(run_file(solo, reqid, ".out")), what="the script's first line")
    assert solo.control.run("cancel", reqid).returncode == 0
    shown = solo.control.run("wait", reqid)
    assert shown.returncode == 1 and "cancelled" in shown.out
