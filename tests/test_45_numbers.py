"""Numbers of processes are used again: nobody is signalled for a number, a name or a file that others may write."""

import os
import signal
import subprocess
import sys

import pytest
import support
from support import ApiServer, wait_until

import ctrl_exec

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: processes and files of several users")


@pytest.fixture
def innocent():
    """A process of ours, in a session of its own, with a child."""
    words = [sys.executable, "-c", "import subprocess; subprocess.run(['sleep', '600'])"]
    process = subprocess.Popen(words, start_new_session=True)
    wait_until(lambda: ctrl_exec.list_descendants(process.pid), what="its child")
    yield process
    for one in ctrl_exec.list_descendants(process.pid):
        os.kill(one.pid, signal.SIGKILL)
    process.kill()
    process.wait()


@needs_root
def test_who_can_write_a_lock_does_not_choose_whom_root_signals(tmp_path, innocent):
    path = str(tmp_path / "lock")
    script = (
        "import fcntl, os, sys; fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o644); os.fchown(fd, 65534, 65534);"
        "os.setuid(65534); fcntl.flock(fd, fcntl.LOCK_EX); os.write(fd, (sys.argv[2] + '\\n0 0 \\n').encode());"
        "print('held', flush=True); sys.stdin.read()"
    )
    words = [sys.executable, "-c", script, path, str(innocent.pid)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        assert ctrl_exec.find_serving(path).pid == innocent.pid
        with pytest.raises(ctrl_exec.Unavailable, match="cannot signal"):
            ctrl_exec.reload_service(path, "API", "")
        holder.stdin.close()
    assert innocent.poll() is None


def record_of(pid, birth):
    fields = ctrl_exec.RunRecord("r1", "o", "s", "h", "", "", "running", "", 999999999)
    return fields._replace(supervisor=pid, supervisor_birth=birth)


def test_a_supervisor_whose_number_is_used_again_is_not_believed(innocent):
    own = ctrl_exec.find_process(innocent.pid)
    assert own.pid == own.session and ctrl_exec.is_own_title(own.name)
    for birth in ("", "1@00000000", own.birth.replace("@", "0@")):
        assert ctrl_exec.find_run_processes(record_of(innocent.pid, birth)) == []
    found = ctrl_exec.find_run_processes(record_of(innocent.pid, own.birth))
    assert [process.name for process in found] == ["sleep"]


def test_a_record_says_which_process_its_supervisor_was(fresh, tmp_path):
    deployment = fresh()
    solo = deployment["solo"]
    solo.script("held", 'while [ ! -e "$1" ]; do sleep 0.05; done\n')
    solo.reload()
    reqid = deployment.control.json("run", "--async", "solo", "held", "--", str(tmp_path / "gate"))[1]["reqid"]
    record = solo.record(reqid)
    assert ctrl_exec.find_process(record["supervisor"]).birth == record["supervisor_birth"]
    assert deployment.control.json("cancel", reqid)[1]["results"][0]["processes_left"] == 0


def test_a_process_whose_first_thread_has_ended_is_one_that_runs():
    script = "import ctypes, threading, time; threading.Thread(target=time.sleep, args=(600,)).start(); "
    process = subprocess.Popen([sys.executable, "-c", script + "ctypes.CDLL(None).pthread_exit(None)"])
    try:
        def state():
            with open("/proc/%d/stat" % process.pid, encoding="ascii") as file:
                return file.read().rpartition(") ")[2][0]

        wait_until(lambda: state() == "Z", what="the end of its first thread")
        assert ctrl_exec.find_process(process.pid) is not None
    finally:
        process.kill()
        process.wait()


def test_a_storm_of_hangups_costs_no_run_and_ends_nothing(fresh):
    deployment = fresh()
    solo = deployment["solo"]
    context = support.dispatcher_context(deployment.control)
    storm = subprocess.Popen(
        [sys.executable, "-c", "import os, signal, sys, time\nwhile True:\n"
         "    for name in os.listdir('/proc'):\n"
         "        try:\n"
         "            if name.isdigit() and open('/proc/%s/comm' % name).read().startswith('cea: ') and sys.argv[1].encode()"
         " in open('/proc/%s/cmdline' % name, 'rb').read():\n"
         "                os.kill(int(name), signal.SIGHUP)\n"
         "        except OSError:\n            pass\n    time.sleep(0.001)\n", solo.root]
    )  # fmt: skip
    try:
        for _ in range(30):
            body = {"script": "hello", "reqid": ctrl_exec.new_id()}
            status, answer = support.post(solo.port, context, "/run", body)
            assert status == 200 and (answer["exit"], answer["stdout"]) in ((0, "hello\n"), (126, "")), answer
            if answer["exit"]:
                assert answer["signal"] == "SIGHUP"  # it was the script's own by then
    finally:
        storm.kill()
        storm.wait()
    assert solo.events("bug") == [] and solo.process.poll() is None


def test_a_storm_of_hangups_leaves_the_api_serving(fresh):
    with ApiServer(fresh(start=False).control) as server:
        for _ in range(3000):
            server.process.send_signal(signal.SIGHUP)
        assert server.answers() and server.process.poll() is None
        assert server.run("--config", server.conf, "reload").returncode == 0


def test_a_script_that_stops_its_supervisor_is_ended_all_the_same(fresh, tmp_path):
    deployment = fresh()
    solo, gate = deployment["solo"], tmp_path / "gate"
    solo.script("stops", 'while [ ! -e "$1" ]; do sleep 0.05; done\nkill -STOP $PPID\nsleep 600\n')
    solo.reload()
    reqid = deployment.control.json("run", "--async", "solo", "stops", "--", str(gate))[1]["reqid"]
    gate.touch()
    supervisor = solo.record(reqid)["supervisor"]

    def state():
        with open("/proc/%d/stat" % supervisor, encoding="ascii") as file:
            return file.read().rpartition(") ")[2][0]

    wait_until(lambda: state() == "T", what="the stop")
    status, shown = deployment.control.json("cancel", reqid)
    assert (status, shown["results"][0]["processes_left"]) == (0, 0)


def test_a_lock_from_when_the_disk_had_no_room_still_counts(tmp_path):
    rules = ctrl_exec.JobRules(
        {}, (), True, ctrl_exec.RunStore(str(tmp_path / "runs"), None, 3600), str(tmp_path / "locks"), {}, "h", 0, 1, 0,
        spare_dir=str(tmp_path / "spare"),
    )  # fmt: skip
    os.makedirs(str(tmp_path / "spare" / "locks"))
    with ctrl_exec.FileLock(str(tmp_path / "spare" / "locks" / "s.0")):
        assert ctrl_exec._acquire_slot(rules, "s.0") is None
    lock = ctrl_exec._acquire_slot(rules, "s.0")
    assert lock is not None
    lock.release()


def test_an_openssl_that_cannot_say_yes_does_not_make_a_request_bad(tmp_path):
    path = tmp_path / "openssl"
    path.write_text('#!/bin/sh\ncase $1 in dgst | verify) exit 1;; esac\nexec openssl "$@"\n')
    path.chmod(0o755)
    real, broken = ctrl_exec.OpenSSL(), ctrl_exec.OpenSSL(str(path))
    key = str(tmp_path / "key")
    ctrl_exec.new_key_file(real, key, "ec")
    with pytest.raises(ctrl_exec.ProgramError, match="does not do what ctrl-exec needs"):
        broken.check_request(real.new_request(key, "web-1"))
    ca = real.sign_ca(key, "CA", 10).encode()
    with pytest.raises(ctrl_exec.ProgramError, match="does not do what ctrl-exec needs"):
        ctrl_exec.OpenSSL(str(path)).check_chain(ca, ca, "any")
