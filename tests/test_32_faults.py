"""What breaks while jobs run: processes are killed, disks fill, output floods, hundreds come at once."""

import base64
import os
import signal
import subprocess
import threading

import ctrl_exec
import pytest
import support
from faults import FAULTS, SCRIPTS, Scene
from support import wait_until

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system needs root")

FLOODS = {  # how many bytes, and the script that writes them once the file that $1 names is there
    "zeros": (10_000_000_000, "exec head -c %d /dev/zero\n"),
    "one-line": (1_000_000_000, "head -c %d /dev/zero | tr '\\000' x\n"),
    "noise": (60_000_000, "exec head -c %d /dev/urandom\n"),
    "noise-errors": (60_000_000, "exec head -c %d /dev/urandom >&2\n"),
}
GATE = 'while [ $# -gt 0 ] && [ ! -e "$1" ]; do sleep 0.02; done\n'
KEPT = 100_000


@pytest.fixture
def scene(fresh, tmp_path):
    """An agent of this test's own."""
    site = fresh("solo", start=False)
    host = site["solo"]
    for name, body in SCRIPTS.items():
        host.script(name, body, "" if name == "held" else "max_running=8")
    host.start()
    return Scene(tmp_path, host, site.control)


@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_jobs_survive_and_their_locks_hold(scene, fault):
    held = scene.start("held", "sync")
    others = [scene.start("free", mode) for mode in ("sync", "async", "stream")]
    FAULTS[fault](scene)
    assert [scene.result(one.reqid)[1]["status"] for one in (held, *others)] == ["running"] * 4
    assert scene.run()[0] == 409  # its lock holds
    scene.open_gate()
    scene.check()
    assert scene.run()[1]["stdout"] == "begun\nthrough\n"  # and is free afterwards
    if fault == "reload":  # which breaks no connection
        assert held.wait()[1]["exit"] == 0
        assert [one.wait()[1].get("exit") for one in others] == [0, None, 0]


# --- a killed supervisor --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["sync", "async", "stream"])
def test_a_killed_supervisor_interrupts_its_run_ends_its_group_and_frees_its_lock(scene, mode):
    one = scene.start("held", mode)
    waiting = []
    thread = threading.Thread(target=lambda: waiting.append(scene.result(one.reqid, wait=60)))
    thread.start()
    wait_until(lambda: scene.host.events("result"), what="the waiter")
    assert scene.group(one)
    os.kill(scene.supervisor(one), signal.SIGKILL)
    thread.join(40)
    assert waiting[0][1]["interrupted"] is True and waiting[0][1]["exit"] == 126
    wait_until(lambda: scene.group(one) == [], what="the end of the group")
    os.rmdir(scene.journal + ".held")  # which the script cannot have removed
    scene.open_gate()
    assert scene.run()[0] == 200
    scene.check(interrupted=[one])


def test_recovery_needs_nobody_who_asks(scene):
    one = scene.start("free", "async")
    os.kill(scene.supervisor(one), signal.SIGKILL)
    record = wait_until(
        lambda: scene.host.record(one.reqid)["status"] == "done" and scene.host.record(one.reqid)
    )
    assert record["interrupted"] is True
    wait_until(lambda: scene.group(one) == [], what="the end of the group")


def test_supervisor_and_executor_killed_together_are_settled_at_the_next_start(scene):
    one, other = scene.start("held", "async"), scene.start("free", "async")
    supervisor = scene.supervisor(one)
    scene.host.process.send_signal(signal.SIGSTOP)  # nobody reaps, nobody recovers
    os.kill(supervisor, signal.SIGKILL)
    scene.host.process.kill()
    scene.restart()
    wait_until(lambda: scene.host.record(one.reqid)["status"] == "done", what="recovery at the start")
    assert scene.host.record(other.reqid)["status"] == "running"
    os.rmdir(scene.journal + ".held")
    scene.open_gate()
    scene.check(interrupted=[one])


def test_whoever_asks_settles_a_run_that_recovery_has_missed(scene):
    one = scene.start("free", "async")
    rules, _ = ctrl_exec.build_rules(scene.host.config, "solo", {"ab1": "control"})
    scene.host.process.send_signal(signal.SIGSTOP)
    os.kill(scene.supervisor(one), signal.SIGKILL)
    record = ctrl_exec.find_record(rules.store, "control", one.reqid)
    assert record.status == "running"
    wait_until(
        lambda: not ctrl_exec.is_claimed(ctrl_exec.record_path(rules.store, "control", one.reqid, ".out"))
    )
    settled = ctrl_exec.settle_run(rules.store, record)
    scene.host.process.send_signal(signal.SIGCONT)
    assert (settled.status, settled.interrupted) == ("done", True)
    wait_until(lambda: scene.group(one) == [], what="the end of the group")
    scene.open_gate()
    scene.check(interrupted=[one])


def test_a_process_that_got_the_number_of_an_old_script_is_left_alone(scene):
    rules, _ = ctrl_exec.build_rules(scene.host.config, "solo", {"ab1": "control"})
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as innocent:
        record = ctrl_exec.RunRecord(
            "old",
            "control",
            "held",
            "solo",
            "",
            "",
            "running",
            ctrl_exec.iso_time(0),
            innocent.pid,
            "1@other",
        )
        os.makedirs(os.path.join(rules.store.directory, "control"), exist_ok=True)
        ctrl_exec.write_record(rules.store, record, new=True)
        settled = ctrl_exec.settle_run(rules.store, record)
        assert settled.interrupted is True and innocent.poll() is None
        innocent.kill()


def test_recovery_takes_no_lock_that_was_given_back(scene, monkeypatch, tmp_path):
    locks, taken = str(tmp_path), []  # not the agent's own, which its own recovery may look at just now
    for name, text in (("given.0", ""), ("kept.0", "control never-was")):
        with open(os.path.join(locks, name), "w", encoding="ascii") as file:
            file.write(text)
    acquire = ctrl_exec.FileLock.acquire
    monkeypatch.setattr(
        ctrl_exec.FileLock, "acquire", lambda lock: (taken.append(lock.path), acquire(lock))[1]
    )
    rules, _ = ctrl_exec.build_rules(scene.host.config, "solo", {"ab1": "control"})
    ctrl_exec.recover_jobs(rules._replace(locks_dir=locks))
    assert [os.path.basename(path) for path in taken] == ["kept.0"]


def test_recovery_leaves_files_alone_that_are_not_locks(scene):
    locks = scene.host.file(ctrl_exec.AGENT_VAR + "/locks")
    os.makedirs(locks, exist_ok=True)
    for name in ("notes", "a.b", "..."):
        with open(os.path.join(locks, name), "w", encoding="ascii") as file:
            file.write("control something")
    rules, _ = ctrl_exec.build_rules(scene.host.config, "solo", {"ab1": "control"})
    ctrl_exec.recover_jobs(rules)
    for name in ("notes", "a.b", "..."):
        with open(os.path.join(locks, name), encoding="ascii") as file:
            assert file.read() == "control something"


def spares(host):
    """The supervisors that wait for a request. Each has a process staged, which nobody else has when nothing
    runs: neither one that has answered nor the one that recovers at the start."""
    front, found = host.front(), []
    for pid in host.children():
        try:
            if pid != front and host.children(pid):
                found.append(pid)
        except OSError:  # it has just ended
            pass
    return found


def test_a_spare_supervisor_that_is_killed_costs_nobody_a_run(scene):
    scene.open_gate()
    for _ in range(3):
        # the one that has run the last script may still be ending
        (spare,) = wait_until(lambda: len(spares(scene.host)) == 1 and spares(scene.host), what="one spare")
        os.kill(spare, signal.SIGKILL)
        # until it has ended, it can be given a request
        wait_until(lambda: ctrl_exec.find_process(spare) is None, what="its end")
        assert scene.run("free")[1]["exit"] == 0


# --- output ---------------------------------------------------------------------------------------------


def peak(pid):
    """The most memory a process has had, in MiB."""
    with open("/proc/%d/status" % pid, encoding="ascii") as file:
        return int(file.read().partition("VmHWM:")[2].split()[0]) / 1024


@pytest.fixture(scope="module")
def flooded(tmp_path_factory):
    with support.Deployment(tmp_path_factory.mktemp("floods"), ("solo",), start=False) as made:
        host = made["solo"]
        host.configure("max_output = %d\nrate_limit_disable = yes\n" % KEPT)
        for name, (size, body) in FLOODS.items():
            host.script(name, GATE + body % size)
        host.start()
        yield made


@pytest.mark.parametrize("name", sorted(FLOODS))
def test_a_flood_is_kept_up_to_its_limit_and_counted_and_costs_little_memory(flooded, tmp_path, name):
    host, reqid, gate = flooded["solo"], ctrl_exec.new_id(), tmp_path / "gate"
    context = support.dispatcher_context(flooded.control)
    body = {"script": name, "args": [str(gate)], "reqid": reqid, "async": True}
    assert support.post(host.port, context, "/run", body)[0] == 202
    supervisor = host.record(reqid)["supervisor"]
    before, highest = peak(supervisor), 0.0
    gate.touch()
    while os.path.exists("/proc/%d" % supervisor):
        try:
            highest = max(highest, peak(supervisor))
        except (FileNotFoundError, ProcessLookupError, IndexError):
            break
    answer = support.post(host.port, context, "/result/%s?wait=60" % reqid, b"", "GET")[1]
    stream = "stderr" if name.endswith("errors") else "stdout"
    assert (answer["exit"], answer[stream + "_truncated"]) == (0, FLOODS[name][0] - KEPT)
    exact = answer.get(stream + "_base64")
    data = base64.b64decode(exact) if exact else answer[stream].encode()
    assert len(data) == KEPT
    assert os.path.getsize(os.path.join(host.config.runs_dir, "control", reqid + ".out")) <= KEPT
    assert max(highest - before, 0) < 50
    assert sum(peak(pid) for pid in [host.process.pid, host.front()]) < 150


def test_a_streamed_flood_shows_what_was_kept_and_says_what_was_not(flooded):
    done = flooded.control.run("run", "--stream", "solo", "one-line")
    assert done.returncode == 0
    head, _, rest = done.out.partition("==> ")
    assert head.replace("\n", "") == "x" * KEPT
    assert "%d bytes of stdout were dropped" % (FLOODS["one-line"][0] - KEPT) in rest


# --- many -----------------------------------------------------------------------------------------------


def sizes(scene):
    """What must be as before when all is over: descriptors of executor and front, and children."""
    pids = [scene.host.process.pid, scene.host.front()]
    return [len(os.listdir("/proc/%d/fd" % pid)) for pid in pids], len(scene.host.children())


def is_quiet(host):
    """Whether nobody is served: the front has no thread for a connection, and one supervisor waits."""
    with open("/proc/%d/status" % host.front(), encoding="ascii") as file:
        threads = int(file.read().partition("Threads:")[2].split()[0])
    return threads == 1 and len(host.children()) == 2 and len(spares(host)) == 1


def private(pid):
    """Memory that a process shares with nobody, in MiB."""
    with open("/proc/%d/smaps_rollup" % pid, encoding="ascii") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith("Private_")) / 1024


def test_two_hundred_jobs_at_once_are_all_accounted_for(fresh, tmp_path):
    site = fresh("solo", start=False)
    host = site["solo"]
    host.script("parked", SCRIPTS["parked"], "max_running=200")
    host.start()
    scene = Scene(tmp_path, host, site.control)
    os.mkfifo(scene.gate)
    assert site.control.run("run", "solo", "hello").returncode == 0  # the first run makes directories
    wait_until(lambda: is_quiet(host), what="quiet")
    before = sizes(scene)
    memory = [private(pid) for pid in (host.process.pid, scene.host.front())]
    for number in range(200):
        scene.ask("parked", ("async", "sync", "stream")[number % 3 if number < 90 else 0])
        # all run at once, and not all shake hands at once: for that there are ten seconds
        wait_until(lambda: len(scene.lines()) > number - 20, what="the start of the earlier ones")
    wait_until(lambda: len(scene.lines()) == 200, what="200 scripts at once")
    assert scene.run("parked")[0] == 409  # one more than is allowed

    def all_ended():
        try:
            os.close(os.open(scene.gate, os.O_WRONLY | os.O_NONBLOCK))
        except OSError:  # no reader is left
            pass
        return len(scene.lines()) == 400

    wait_until(all_ended, seconds=300, what="the end of all")
    assert {one.wait()[0] for one in scene.asked} == {200, 202}
    for one in scene.asked:
        wait_until(lambda: host.record(one.reqid)["status"] == "done", what="the record")
    lines = scene.lines()
    for one in scene.asked:
        assert lines.count((one.reqid, "start")) == lines.count((one.reqid, "end")) == 1
        assert host.record(one.reqid)["exit"] == 0
    wait_until(lambda: sizes(scene) == before, what="everything as before")
    after = [private(pid) for pid in (host.process.pid, scene.host.front())]
    assert all(now - then < 20 for now, then in zip(after, memory)), (memory, after)
