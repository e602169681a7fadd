"""Hosts that are ill: an agent starts and answers all the same, says what is wrong, and recovers by itself.

Also what a script inherits, what ends with it, and which process a signal is for.
"""

import errno
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys

import pytest

import ctrl_exec
import support
from support import wait_until

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: namespaces and mounts")


def ping(deployment, name="solo"):
    """The host's entry of `ced ping --json`."""
    return deployment.control.json("ping", name)[1]["results"][0]


def run(deployment, script, *args, name="solo", **how):
    """The host's entry of `ced run --json`."""
    return deployment.control.json("run", name, script, "--", *args, **how)[1]["results"][0]


def start_within(host, shell, before=""):
    """Start an agent in namespaces of its own, after a line of shell."""
    words = ["unshare", *before.split(), "sh", "-ec", shell + '\nexec "$@"', "sh", *host.argv("serve")]
    host.process = subprocess.Popen(
        words, env=host.environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


# --- addresses and ports --------------------------------------------------------------------------------


def test_an_agent_waits_for_a_port_that_somebody_has(fresh):
    deployment = fresh(start=False)
    solo = deployment["solo"]
    with socket.create_server(("127.0.0.1", solo.port)):
        solo.start(wait=False)
        wait_until(lambda: solo.events("listen"), what="the event")
        assert "RESULT=failed" in solo.events("listen")[0] and "in use" in solo.events("listen")[0]
    wait_until(lambda: ping(deployment)["status"] == "ok", what="the port")
    assert [line.split("RESULT=")[1].split()[0] for line in solo.events("listen")] == ["failed", "ok"]
    assert solo.stop() == 0


def test_an_agent_serves_the_addresses_that_are_there_and_says_which_are_not(fresh):
    deployment = fresh(start=False)
    solo = deployment["solo"]
    solo.configure("rate_limit_disable = yes\n")
    solo.put(ctrl_exec.AGENT_ETC + "/agent.conf", "port = %d\nbind = 127.0.0.1, 127.0.0.9\n" % solo.port, 0o640)
    with socket.create_server(("127.0.0.9", solo.port)):
        solo.start()
        told = "cannot listen on 127.0.0.9 port %d: Address already in use" % solo.port
        assert ping(deployment)["faults"] == [told]
        assert told in deployment.control.run("ping", "solo").out
        shown = deployment.control.json("check")[1]["findings"]
        assert [one["level"] for one in shown if told in one["what"]] == ["WARN"]
    wait_until(lambda: "faults" not in ping(deployment), what="the other address")
    socket.create_connection(("127.0.0.9", solo.port)).close()


@pytest.mark.parametrize("number", [errno.ENFILE, errno.EACCES])
def test_a_service_that_listens_already_goes_on_when_the_rest_is_refused(monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    before = ctrl_exec.listen_where_possible(("127.0.0.1",), 0)._replace(faults=("192.0.2.7 is missing",))
    port = before.sockets[0].getsockname()[1]
    monkeypatch.setattr(ctrl_exec, "_open_listener", refuse)
    said = []
    monkeypatch.setattr(ctrl_exec.LOG, "event", lambda action, **fields: said.append((action, str(fields))))
    after = ctrl_exec.listen_again(("127.0.0.1", "192.0.2.7"), port, before)
    assert after.sockets == before.sockets and len(after.faults) == 1
    assert [action for action, fields in said if os.strerror(number) in fields] == ["listen"]
    with socket.create_connection(("127.0.0.1", port), 60):
        before.sockets[0].close()


def test_a_lock_is_read_while_a_longer_text_is_being_replaced(tmp_path):
    path = str(tmp_path / "lock")
    lock = ctrl_exec.FileLock(path)
    assert lock.acquire()
    ctrl_exec.note_serving(lock, 1, 1, "a long reason why the last reload failed")
    with open(path, "r+b") as file:  # the new lines are there, the end of the former text still is
        file.write(b"%d\n2 1 \n" % os.getpid())
    assert ctrl_exec.find_serving(path) == ctrl_exec.Serving(os.getpid(), 2, 1, "", os.geteuid())
    lock.release()


@pytest.mark.parametrize("before, after", [("0.0.0.0", "127.0.0.1"), ("127.0.0.1", "0.0.0.0")])
def test_a_reload_that_changes_the_address_serves_the_new_one_when_it_is_done(fresh, before, after):
    deployment = fresh(start=False)
    solo = deployment["solo"]
    conf = "port = %d\nbind = %%s\nrate_limit_disable = yes\n" % solo.port
    solo.put(ctrl_exec.AGENT_ETC + "/agent.conf", conf % before, 0o640)
    solo.start()
    solo.put(ctrl_exec.AGENT_ETC + "/agent.conf", conf % after, 0o640)
    assert solo.run("reload").returncode == 0
    assert ping(deployment)["status"] == "ok" and "faults" not in ping(deployment)
    listening = subprocess.run(["ss", "-Hltn", "sport = :%d" % solo.port], capture_output=True, text=True).stdout
    assert [line.split()[3] for line in listening.splitlines()] == ["%s:%d" % (after, solo.port)]


@needs_root
@pytest.mark.parametrize(
    "bind, prepare, mend",
    [
        ("192.0.2.7", "", "ip address add 192.0.2.7/32 dev lo"),
        (
            "::1",
            "echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6",
            "echo 0 > /proc/sys/net/ipv6/conf/all/disable_ipv6",
        ),
    ],
    ids=["an address that is not up", "IPv6 off"],
)
def test_an_agent_starts_before_its_address(fresh, bind, prepare, mend):
    deployment = fresh(start=False)
    solo = deployment["solo"]
    solo.put(ctrl_exec.AGENT_ETC + "/agent.conf", "port = %d\nbind = %s\n" % (solo.port, bind), 0o640)
    start_within(solo, "ip link set lo up\n" + prepare, "--net")
    wait_until(lambda: solo.events("listen"), what="the event")
    inside = ["nsenter", "--net=/proc/%d/ns/net" % solo.process.pid]
    subprocess.run([*inside, "sh", "-ec", mend], check=True)
    wait_until(lambda: "RESULT=ok" in solo.events("listen")[-1], what="the address")
    check = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2]))).close()"
    subprocess.run([*inside, sys.executable, "-c", check, bind, str(solo.port)], check=True)


@needs_root
def test_a_host_without_ipv6_is_served_by_default(fresh):
    deployment = fresh(start=False)
    solo = deployment["solo"]
    solo.put(ctrl_exec.AGENT_ETC + "/agent.conf", "port = %d\n" % solo.port, 0o640)
    start_within(solo, "echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6; ip link set lo up", "--net")
    wait_until(lambda: solo.events("start"), what="the start")
    assert solo.events("listen") == []


@needs_root
def test_a_port_that_only_a_person_can_give_is_status_78(fresh):
    solo = fresh(start=False)["solo"]
    solo.put(ctrl_exec.AGENT_ETC + "/agent.conf", "port = 81\nbind = 127.0.0.1\n", 0o640)
    words = ["setpriv", "--bounding-set=-net_bind_service", *solo.argv("serve")]
    done = subprocess.run(words, env=solo.environment(), capture_output=True, timeout=60)
    assert done.returncode == 78 and b"cannot listen on 127.0.0.1 port 81: Permission denied" in done.stderr


def serve_with(host, sockets, extra=()):
    """Start an agent as systemd does, which has opened its sockets."""
    script = (
        "import os, sys; count = int(sys.argv[1]); os.environ.update(LISTEN_FDS=str(count), "
        "LISTEN_PID=str(os.getpid()), LISTEN_FDNAMES='a'); os.execv(sys.argv[2], sys.argv[2:])"
    )
    numbers = [listener.fileno() for listener in sockets]

    def arrange():
        for at, number in enumerate(numbers):
            os.dup2(number, 3 + at)

    host.process = subprocess.Popen(
        [sys.executable, "-c", script, str(len(numbers)), *host.argv("serve")], env=host.environment(),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=arrange,
        pass_fds=[3 + at for at in range(len(numbers))], start_new_session=True,
    )  # fmt: skip


def test_the_port_is_never_free_when_the_service_manager_holds_it(fresh):
    deployment = fresh(start=False)
    solo = deployment["solo"]
    with socket.create_server(("127.0.0.1", solo.port)) as held:
        serve_with(solo, [held])
        wait_until(lambda: ping(deployment)["status"] == "ok", what="the agent")
        assert solo.events("config-warn") == []
        solo.process.kill()
        solo.process.wait()
        with pytest.raises(OSError):
            socket.create_server(("127.0.0.1", solo.port)).close()
        with socket.create_connection(("127.0.0.1", solo.port), 60) as early:  # waits for the next one
            serve_with(solo, [held])
            tls = support.client_context().wrap_socket(early)
            assert tls.version()
        # the front of the one that was killed may have answered that, while it ended
        wait_until(lambda: len(solo.events("start")) == 2, what="the next one")
        assert "RESULT=ok" in solo.reload()
        assert ping(deployment)["status"] == "ok"
        solo.stop()


def test_a_passed_socket_that_is_not_configured_is_closed_and_named(fresh):
    deployment = fresh(start=False)
    solo = deployment["solo"]
    with socket.create_server(("127.0.0.1", 0)) as other:
        serve_with(solo, [other])
        wait_until(lambda: ping(deployment)["status"] == "ok", what="the agent")
        (line,) = solo.events("config-warn")
        assert "127.0.0.1 port %d, which is not configured" % other.getsockname()[1] in line
        solo.stop()


def test_one_socket_for_both_families_serves_ipv4_addresses_as_such(fresh):
    deployment = fresh(start=False)
    solo = deployment["solo"]
    conf = support.as_starter("port = %d\nallowed_ips = 127.0.0.0/8\nrate_limit_disable = yes\n" % solo.port)
    solo.put(ctrl_exec.AGENT_ETC + "/agent.conf", conf, 0o640)
    with socket.create_server(("::", solo.port), family=socket.AF_INET6, dualstack_ipv6=True) as both:
        serve_with(solo, [both])
        wait_until(lambda: ping(deployment)["status"] == "ok", what="the agent")
        assert solo.events("config-warn") + solo.events("ip-block") == []
        solo.stop()


# --- disks ----------------------------------------------------------------------------------------------


@pytest.fixture
def disks():
    """A function that puts what is in a directory on a disk of its own."""
    mounted = []

    def mount(path, options):
        os.makedirs(path, exist_ok=True)
        shutil.copytree(path, path + ".before", symlinks=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755," + options, "tmpfs", path], check=True)
        mounted.append(path)
        subprocess.run(["cp", "-a", path + ".before/.", path], check=True)
        return path

    yield mount
    for path in mounted:
        while subprocess.run(["umount", "-l", path], capture_output=True).returncode == 0:
            pass  # once more if it was made read-only


def fill(path):
    """Take what room a disk has left."""
    with open(os.path.join(path, "ballast"), "ab", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass


def spoil(disk, how):
    """Make a disk one that cannot be written; what its users are told."""
    if how == "full":
        fill(disk)
        return "No space left on device"
    if how == "no inodes":
        while True:
            try:
                os.mkdir(os.path.join(disk, "d" + ctrl_exec.new_id()))
            except OSError:
                return "No space left on device"
    # not the disk itself: somebody may have a file of it open for writing
    subprocess.run(["mount", "--bind", disk, disk], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", disk], check=True)
    return "Read-only file system"


DISKS = pytest.mark.parametrize("how", ["full", "no inodes", "read-only"])


@needs_root
@DISKS
@pytest.mark.parametrize("when", ["before it starts", "while it serves"])
def test_an_agent_on_a_disk_that_cannot_be_written_answers_and_says_so(fresh, disks, tmp_path, how, when):
    deployment = fresh(start=False)
    solo = deployment["solo"]
    for directory in (tmp_path, *list(tmp_path.parents)[:-2]):  # the front is an ordinary user and looks at the disk, too
        os.chmod(str(directory), 0o711)
    mark = tmp_path / "mark"
    solo.script("needed", 'echo x >> "$1"\ncat > /dev/null\nseq 1 3\n', "unrecorded=yes")
    solo.script("other", 'echo x >> "$1"\n')
    disk = disks(solo.file(ctrl_exec.AGENT_VAR), "size=512k,nr_inodes=200")
    if when == "while it serves":
        solo.start()
        assert run(deployment, "needed", str(tmp_path / "first"))["exit"] == 0
    told = spoil(disk, how)
    if when == "before it starts":
        solo.start()
    assert any(told in fault for fault in ping(deployment)["faults"])

    if how != "read-only":
        spoil(disk, how)  # what ended meanwhile has left a little room
    refused = run(deployment, "other", str(mark))
    assert refused["exit"] == -1 and "not started" in refused["error"] and told in refused["error"]
    assert not mark.exists()
    reqid = refused["reqid"]
    assert deployment.control.json("status", reqid)[1]["hosts"]["solo"]["status"] == "refused"

    answer = run(deployment, "needed", str(mark))
    assert (answer["exit"], answer["stdout"]) == (0, "1\n2\n3\n")
    assert mark.read_text() == "x\n"
    context = support.dispatcher_context(deployment.control)
    body = {"script": "needed", "args": [str(mark)], "reqid": answer["reqid"]}
    again = support.post(solo.port, context, "/run", body)[1]  # the same request runs once
    assert (again["exit"], again["stdout"]) == (0, "1\n2\n3\n") and mark.read_text() == "x\n"
    found = support.post(solo.port, context, "/result/" + answer["reqid"], b"", "GET")[1]
    assert found["stdout"] == "1\n2\n3\n"

    shown = solo.json("self-check")
    assert shown[0] == 1 and any(told in one["what"] for one in shown[1]["findings"] if one["level"] == "FAIL")
    assert solo.events("bug") == []
    assert solo.stop() == 0


@needs_root
@DISKS
def test_check_sees_a_control_host_whose_disk_cannot_be_written(fresh, disks, how):
    deployment = fresh(start=False)
    disk = disks(deployment.control.file(ctrl_exec.VAR), "size=512k,nr_inodes=200")
    told = spoil(disk, how)
    status, shown = deployment.control.json("check")
    failed = [one["what"] for one in shown["findings"] if one["level"] == "FAIL"]
    assert status == 1 and any(told in what and disk in what for what in failed), failed


@needs_root
def test_checks_warn_of_a_disk_that_is_nearly_full(fresh, disks):
    deployment = fresh(start=False)
    disks(deployment.control.file(ctrl_exec.VAR), "size=16m")
    disks(deployment["solo"].file(ctrl_exec.AGENT_VAR), "nr_inodes=150")
    for program, verb in ((deployment.control, "check"), (deployment["solo"], "self-check")):
        findings = program.json(verb)[1]["findings"]
        assert [one for one in findings if one["level"] == "WARN" and "are free" in one["what"]]


def test_a_script_that_runs_is_not_joined_by_an_unrecorded_one(fresh, tmp_path, disks):
    if os.geteuid() != 0:
        pytest.skip("needs root: mounts")
    deployment = fresh(start=False)
    solo, gate = deployment["solo"], tmp_path / "gate"
    solo.script("held", 'while [ ! -e "$1" ]; do sleep 0.05; done\n', "unrecorded=yes")
    disk = disks(solo.file(ctrl_exec.AGENT_VAR), "size=512k")
    solo.start()
    submitted = deployment.control.json("run", "--async", "solo", "held", "--", str(gate))[1]["reqid"]
    spoil(disk, "read-only")
    assert "already running" in run(deployment, "held", str(gate))["error"]
    gate.touch()
    deployment.control.run("wait", submitted)


@needs_root
@pytest.mark.parametrize("how", ["full", "read-only"])
def test_an_unrecorded_run_whose_supervisor_is_killed_ends(fresh, disks, tmp_path, how):
    deployment = fresh(start=False)
    solo, pids = deployment["solo"], tmp_path / "pids"
    solo.script("held", 'echo $$ >> "$1"\nexec sleep 600\n', "unrecorded=yes")
    disk = disks(solo.file(ctrl_exec.AGENT_VAR), "size=512k")
    solo.start()
    spoil(disk, how)
    if how != "read-only":
        spoil(disk, how)  # what ended meanwhile has left a little room
    reqid = deployment.control.json("run", "--async", "solo", "held", "--", str(pids))[1]["reqid"]
    pid = int(wait_until(lambda: pids.exists() and pids.read_text(), what="the script"))
    path = os.path.join(solo.file(ctrl_exec.AGENT_RUN), "runs", "control", reqid + ".json")
    with open(path) as file:
        record = json.load(file)
    assert record["status"] == "running"
    os.kill(record["supervisor"], signal.SIGKILL)
    wait_until(lambda: ctrl_exec.find_process(pid) is None, what="the end of the script")

    def read_status():
        with open(path) as file:
            return json.load(file)["status"]

    wait_until(lambda: read_status() == "done", what="the record")
    assert solo.events("bug") == []
    assert solo.stop() == 0


def test_what_an_unrecorded_run_left_is_swept_by_the_runs_of_later_days(fresh):
    deployment = fresh()
    solo = deployment["solo"]
    spare = os.path.join(solo.file(ctrl_exec.AGENT_RUN), "runs", "control")
    os.makedirs(spare)
    for name in ("old.out", "old.err", "old.json"):
        with open(os.path.join(spare, name), "w"):
            pass
        os.utime(os.path.join(spare, name), (1, 1))
    assert run(deployment, "hello")["exit"] == 0
    wait_until(lambda: os.listdir(spare) == [], what="the sweep")


# --- no /proc, no rights --------------------------------------------------------------------------------


@needs_root
def test_an_agent_without_proc_answers_and_runs(fresh):
    deployment = fresh(start=False)
    solo = deployment["solo"]
    start_within(solo, "mount -t tmpfs none /proc", "--mount")
    wait_until(lambda: ping(deployment)["status"] == "ok", what="the agent")
    for _ in range(3):
        assert run(deployment, "hello")["stdout"] == "hello\n"
    assert run(deployment, "exit", "3")["exit"] == 3
    assert solo.events("bug") == []
    assert solo.stop() == 0


def test_supervisors_that_die_at_once_are_forked_again_with_a_growing_pause(fresh):
    deployment = fresh()
    solo = deployment["solo"]
    front = solo.front()
    for _ in range(6):
        waiting = wait_until(lambda: [pid for pid in solo.children() if pid != front], what="a supervisor")
        for pid in waiting:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not set(waiting) & set(solo.children()), what="its end")
        if not [pid for pid in solo.children() if pid != front]:
            break  # the next one is due later
    else:
        raise AssertionError("it is replaced at once each time")
    assert run(deployment, "hello")["stdout"] == "hello\n"  # one is forked for it


@needs_root
@pytest.mark.parametrize(
    "how",
    [
        ["setpriv", "--bounding-set=-setuid,-setgid"],
        ["unshare", "--user", "--map-root-user"],  # the only user there is
    ],
    ids=["no capability", "one user"],
)
def test_root_that_may_not_change_its_user_is_told_so(fresh, how):
    solo = fresh(start=False)["solo"]
    words = [*how, *solo.argv("serve")]
    done = subprocess.run(words, env=solo.environment(), capture_output=True, timeout=60)
    assert done.returncode == 78, done.stderr
    first = done.stderr.decode().splitlines()[0]
    assert "root cannot become the user ctrl-exec-agent here" in first and "Traceback" not in first


# --- a part of Python only ------------------------------------------------------------------------------

MINIMAL = ["shutil", "shlex", "hmac", "queue", "resource", "difflib", "ctypes"]  # lacks these on every Debian


def without(modules, root, *words):
    """Run one command line with a Python that has not got some modules."""
    script = """import runpy, sys
class Lacking:
    def find_spec(self, name, path=None, target=None):
        if name in %r:
            raise ModuleNotFoundError("No module named %%r" %% name, name=name)
sys.meta_path.insert(0, Lacking())
for name in %r:
    sys.modules.pop(name, None)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
""" % (modules, modules)
    argv = [sys.executable, "-IS", "-c", script, support.PROGRAM, *words]
    env = {"PATH": ctrl_exec.SAFE_PATH, "CTRL_EXEC_ROOT": str(root)}
    return subprocess.run(argv, env=env, capture_output=True, timeout=60, text=True)


@pytest.mark.parametrize("verb", ["agent serve", "dispatcher pairing-mode", "dispatcher check", "demo"])
def test_a_python_that_is_not_whole_is_one_sentence(fresh, verb):
    deployment = fresh(start=False)
    root = deployment["solo"].root if "agent" in verb else deployment.control.root
    done = without(MINIMAL, root, *verb.split())
    assert done.returncode == 78, done
    assert re.search("this Python lacks its module [a-z]+: install the whole", done.stderr)
    assert "Traceback" not in done.stderr


def test_a_python_without_json_is_the_same_sentence(tmp_path):
    done = without(["json"], tmp_path, "--version")
    assert done.returncode == 1 and "this Python lacks its module json: install the whole" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_agent_whose_python_has_no_ctypes_serves(fresh):
    deployment = fresh(start=False)
    solo = deployment["solo"]
    with open(os.path.join(solo.root, ".launch"), encoding="utf-8") as file:
        launcher = file.read()
    blind = "import sys\nsys.modules['ctypes'] = None\n" + launcher
    with open(os.path.join(solo.root, ".launch"), "w", encoding="utf-8") as file:
        file.write(blind)
    solo.start()
    assert run(deployment, "hello")["stdout"] == "hello\n"
    solo.script("profiled", "echo\n", "profile=p")
    solo.configure("[profile p]\nno_new_privileges = yes\n")
    assert "RESULT=ok" in solo.reload()
    assert run(deployment, "profiled")["exit"] == 126


# --- an OpenSSL that is restricted or ill ----------------------------------------------------------------

NO_FIPS = """openssl_conf = init
[init]
providers = providers
alg_section = algorithms
[providers]
none-such = missing
base = base
[missing]
activate = 1
[base]
activate = 1
[algorithms]
default_properties = fips=yes
"""


@pytest.fixture
def no_fips(tmp_path):
    """An environment that asks for a FIPS provider which is not there."""
    path = tmp_path / "fips.cnf"
    path.write_text(NO_FIPS, encoding="ascii")
    return {"OPENSSL_CONF": str(path)}


@pytest.mark.parametrize("verb", ["setup-ca", "ping solo", "pairing-mode", "rotate-cert", "check"])
def test_a_provider_that_is_missing_is_named_and_not_a_bug(fresh, no_fips, tmp_path, verb):
    deployment = fresh(start=False)
    control = support.Control(tmp_path / "new", set_up=False) if verb == "setup-ca" else deployment.control
    done = control.run(*verb.split(), env=no_fips, input=b"")
    assert done.returncode == 1, done.out + done.err
    assert no_fips["OPENSSL_CONF"] in done.out + done.err and "provider" in done.out + done.err
    assert "internal error" not in done.out + done.err and control.events("bug") == []


def test_an_agent_and_an_api_whose_provider_is_missing_say_so(fresh, no_fips):
    deployment = fresh(start=False)
    api = support.ApiServer(deployment.control)
    for program, words in ((deployment["solo"], ["serve"]), (api, ["--config", api.conf])):
        done = program.run(*words, env=no_fips)
        assert done.returncode == 78 and no_fips["OPENSSL_CONF"] in done.err and "cannot be used" in done.err
    assert deployment["solo"].json("self-check", env=no_fips)[0] == 1


@pytest.mark.parametrize("limit", [8, 10, 12, 14, 16, 20])
def test_few_descriptors_are_called_that_and_nothing_else(fresh, limit):
    deployment = fresh(start=False)
    for program, verb in ((deployment.control, "check"), (deployment["solo"], "self-check")):
        words = ["prlimit", "--nofile=%d:%d" % (limit, limit), *program.argv(verb)]
        done = subprocess.run(words, env=program.environment(), capture_output=True, timeout=60, text=True)
        assert done.returncode in (0, 1) and "Traceback" not in done.stderr
        for line in done.stdout.splitlines():
            if line.startswith("FAIL"):
                assert "Too many open files" in line, line
        assert "not a certificate" not in done.stdout and "setup-ca" not in done.stdout


# --- little memory --------------------------------------------------------------------------------------


def proportional(pid):
    """A process's share of memory in KiB (proc(5), Pss)."""
    with open("/proc/%d/smaps_rollup" % pid, encoding="ascii") as file:
        return int(re.search(r"^Pss: +([0-9]+)", file.read(), re.MULTILINE)[1])


def test_a_plain_copy_of_the_file_serves_from_its_compiled_form(fresh, tmp_path):
    deployment = fresh(start=False)
    solo, copy = deployment["solo"], tmp_path / "cea"
    shutil.copy(support.PROGRAM, str(copy))
    words = [sys.executable, "-IS", str(copy), "--root", solo.root, "serve"]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    solo.process = subprocess.Popen(words, env=solo.environment(), start_new_session=True, **pipes)
    wait_until(lambda: ping(deployment)["status"] == "ok", what="the agent")
    assert run(deployment, "hello")["stdout"] == "hello\n"
    with open("/proc/%d/cmdline" % solo.process.pid, "rb") as file:
        assert file.read().split(b"\0")[2].startswith(b"/proc/self/fd/")
    tree = [solo.process.pid, *(one.pid for one in ctrl_exec.list_descendants(solo.process.pid))]
    assert len(tree) >= 4
    assert sum(map(proportional, tree)) < 48 * 1024
    solo.script("new", "echo new\n")
    assert "RESULT=ok" in solo.reload()
    assert run(deployment, "new")["stdout"] == "new\n"
    assert solo.stop() == 0


# --- reload ---------------------------------------------------------------------------------------------


def test_reload_waits_for_the_outcome(fresh):
    deployment = fresh()
    solo = deployment["solo"]
    solo.script("new", "echo new\n")
    done = solo.run("reload")
    assert (done.returncode, done.out) == (0, "the agent (process %d) has reloaded\n" % solo.process.pid)
    assert run(deployment, "new")["stdout"] == "new\n"
    solo.put(ctrl_exec.AGENT_ETC + "/agent.conf", "port = none\n", 0o640)
    good = os.path.join(solo.root, "good.conf")
    with open(good, "w", encoding="ascii") as file:
        file.write("port = %d\nbind = 127.0.0.1\n" % solo.port)
    done = solo.run("--config", good, "reload")
    assert done.returncode == 78 and "keeps its old configuration" in done.err and "agent.conf:1" in done.err
    assert run(deployment, "new")["stdout"] == "new\n"
    solo.configure()
    assert solo.json("reload") == (0, {"ok": True, "pid": solo.process.pid})


def test_reload_without_an_agent_says_so(fresh):
    solo = fresh(start=False)["solo"]
    done = solo.run("reload")
    assert done.returncode == 1 and "no agent serves here" in done.err and "start it" in done.err


def test_an_agent_of_an_older_release_is_found_by_its_lock(tmp_path):
    config = support.Host(str(tmp_path), "solo").config
    lock = ctrl_exec.FileLock(ctrl_exec.agent_lock_path(config))
    os.makedirs(os.path.dirname(lock.path))
    with lock:
        lock.write("%d\n" % os.getpid())
        assert ctrl_exec.find_serving(lock.path) == ctrl_exec.Serving(os.getpid(), 0, 0, "", os.geteuid())


# --- signals and titles ---------------------------------------------------------------------------------


def test_a_hangup_of_all_its_processes_reloads_and_ends_nothing(fresh, tmp_path):
    deployment = fresh()
    solo, gate = deployment["solo"], tmp_path / "gate"
    body = 'trap "" HUP\n: > "$1.began"\nwhile [ ! -e "$1" ]; do sleep 0.05; done\necho through\n'
    solo.script("held", body)
    solo.reload()
    reqid = deployment.control.json("run", "--async", "solo", "held", "--", str(gate))[1]["reqid"]
    wait_until(lambda: os.path.exists(str(gate) + ".began"), what="the script")
    own = ctrl_exec.find_process(solo.process.pid)
    tree = lambda: [own, *ctrl_exec.list_descendants(own.pid)]  # noqa: E731
    titles = {"cea: executor", "cea: front", "cea: supervisor", "cea: script"}
    wait_until(lambda: titles <= {one.name for one in tree()}, what="all kinds of processes")
    ctrl_exec.send_signal(signal.SIGHUP, tree())
    wait_until(lambda: len(solo.events("reload")) == 2, what="the reload")
    gate.touch()
    status, shown = deployment.control.json("wait", reqid)
    assert (status, shown["hosts"]["solo"]["stdout"]) == (0, "through\n")
    assert run(deployment, "hello")["stdout"] == "hello\n"
    assert solo.events("bug") == []


# --- what a script inherits -----------------------------------------------------------------------------


def test_a_script_gets_the_limits_and_signals_that_the_agent_was_started_with(fresh):
    deployment = fresh(start=False)
    solo = deployment["solo"]
    solo.script("inherits", "ulimit -Sn\nulimit -Hn\ngrep -E 'SigIgn|SigBlk' /proc/self/status\numask\n")

    def ill():
        resource.setrlimit(resource.RLIMIT_NOFILE, (300, 5000))
        for number in (signal.SIGQUIT, signal.SIGUSR2, signal.SIGTSTP, signal.SIGHUP, signal.SIGTTOU):
            signal.signal(number, signal.SIG_IGN)
        os.umask(0)

    solo.process = solo.spawn(
        "serve", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=ill
    )
    wait_until(lambda: ping(deployment)["status"] == "ok", what="the agent")
    lines = run(deployment, "inherits")["stdout"].split("\n")
    assert lines[:2] == ["300", "5000"]
    assert [line.split()[1].strip("0") for line in lines[2:4]] == ["", ""]
    assert lines[4] == "0022"


def test_a_daemon_that_a_script_leaves_behind_is_not_ended_by_what_it_writes(fresh, tmp_path):
    deployment = fresh()
    solo, gate = deployment["solo"], tmp_path / "gate"
    body = """(while [ ! -e "$1" ]; do sleep 0.05; done
for number in $(seq 1 3000); do echo "line $number of the daemon" || exit 1; done; echo err >&2; : > "$1.done") &
echo started
"""
    solo.script("leaves", body)
    solo.reload()
    assert run(deployment, "leaves", str(gate))["stdout"] == "started\n"
    assert run(deployment, "leaves", str(gate))["exit"] == 0  # its lock is free
    def drains():
        found = [one for one in ctrl_exec.list_processes() if one.name == "cea: drain"]
        return [one for one in found if belongs(one.pid, [solo.root])]

    assert len(wait_until(lambda: len(drains()) == 2 and drains(), what="the drains")) == 2
    gate.touch()
    wait_until(lambda: os.path.exists(str(gate) + ".done"), what="the daemon's last word")
    wait_until(lambda: drains() == [], what="the end of the drains")


def belongs(pid, roots):
    try:
        with open("/proc/%d/cmdline" % pid, "rb") as file:
            return any(root.encode() in file.read() for root in roots)
    except OSError:
        return False


REFORKER = """import os, sys, time
open(sys.argv[1], "w").write(str(os.getpid()))
while True:
    if os.fork():
        if os.getpid() == os.getsid(0) and os.getppid() != 1 and "x" not in os.environ:
            os.environ["x"] = "1"
            time.sleep(1000)  # the script itself stays
        os._exit(0)
    os.setsid()
    os.environ.clear()
    time.sleep(0.001)
"""


@pytest.mark.parametrize("how", ["time limit", "cancel"])
def test_nothing_is_left_of_a_script_that_forks_as_it_is_killed(fresh, tmp_path, how):
    deployment = fresh()
    solo, note = deployment["solo"], str(tmp_path / "note")
    name = "reforks-%d" % os.getpid()  # for other runs of this test at the same time
    solo.script(name, REFORKER, interpreter=sys.executable)
    solo.reload()
    options = ["--timeout", "1"] if how == "time limit" else []
    reqid = deployment.control.json("run", *options, "--async", "solo", name, "--", note)[1]["reqid"]
    wait_until(lambda: os.path.exists(note), what="the script")
    supervisor = solo.record(reqid)["supervisor"]
    wait_until(lambda: len(ctrl_exec.list_descendants(supervisor)) > 1, what="its children")
    if how == "cancel":
        status, shown = deployment.control.json("cancel", reqid)
        assert (status, shown["results"][0]["processes_left"]) == (0, 0)
    deployment.control.run("wait", reqid)
    record = solo.record(reqid)
    assert (record["timed_out"], record["cancelled"]) == (how == "time limit", how == "cancel")
    assert [one for one in ctrl_exec.list_processes() if script_of(one.pid) == name] == []


def script_of(pid):
    try:
        with open("/proc/%d/cmdline" % pid, "rb") as file:
            words = file.read().split(b"\0")
        return os.path.basename(words[1].decode()) if len(words) > 1 else ""
    except OSError:
        return ""


def test_the_dead_members_of_a_group_keep_nobody_waiting(tmp_path):
    child = subprocess.Popen(["sh", "-c", "exit 0"], start_new_session=True)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and in its group still
    os.killpg(child.pid, 0)
    record = ctrl_exec.RunRecord("r", "o", "s", "h", "", "", "running", "", child.pid)
    assert ctrl_exec.find_run_processes(record) == []
    child.wait()


@pytest.fixture
def cgroup():
    """A control group of our own, version 2."""
    if os.geteuid() != 0:
        pytest.skip("needs root: a control group")
    with open("/proc/self/mountinfo", encoding="utf-8") as file:
        mounts = [line.split()[4] for line in file if " - cgroup2 " in line]
    made = mounted = ""
    if not mounts:
        mounted = mounts = subprocess.run(["mktemp", "-d"], capture_output=True, check=True).stdout.decode().split()
        if subprocess.run(["mount", "-t", "cgroup2", "none", mounts[0]]).returncode:
            pytest.skip("this kernel has no control groups of version 2")
    made = os.path.join(mounts[0], "ctrl-exec-test-%d" % os.getpid())
    os.mkdir(made)
    yield made
    wait_until(lambda: not open(made + "/cgroup.procs").read(), what="the end of all in the group")
    os.rmdir(made)
    if mounted:
        subprocess.run(["umount", mounts[0]], check=True)


def test_each_run_has_a_control_group_where_the_agent_has_one_of_its_own(fresh, tmp_path, cgroup):
    deployment = fresh(start=False)
    solo, note = deployment["solo"], str(tmp_path / "note")
    solo.script("where", "grep ^0:: /proc/self/cgroup\n")
    solo.script("reforks", REFORKER, interpreter=sys.executable)

    def enter():
        with open(cgroup + "/cgroup.procs", "w", encoding="ascii") as file:
            file.write(str(os.getpid()))

    solo.process = solo.spawn(
        "serve", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=enter
    )
    wait_until(lambda: ping(deployment)["status"] == "ok", what="the agent")
    answer = run(deployment, "where")
    assert "/run-%s-" % answer["reqid"] in answer["stdout"]
    assert deployment.control.run("run", "--timeout", "1", "solo", "reforks", "--", note).returncode == 1
    groups = lambda: [name for name in os.listdir(cgroup) if name.startswith("run-")]  # noqa: E731
    wait_until(lambda: groups() == [], what="the end of the groups")
    solo.stop()
    wait_until(lambda: not open(cgroup + "/cgroup.procs").read(), what="the end of the agent")


# --- what checks find -----------------------------------------------------------------------------------


BROKEN = {
    "carriage-return": (b"#!/bin/sh\r\necho\r\n", "carriage return"),
    "no-interpreter": (b"#!/opt/none/bin/python\n", "/opt/none/bin/python"),
    "no-env-interpreter": (b"#!/usr/bin/env none-such\n", "none-such"),
    "no-first-line": (b"echo hello\n", "no program, and no #!"),
    "empty": (b"", "no program, and no #!"),
    "bare": (b"#!\necho\n", "names no interpreter"),
}


@pytest.mark.parametrize("what", sorted(BROKEN))
def test_checks_find_a_first_line_that_nobody_can_run(fresh, what):
    deployment = fresh(start=False)
    solo, control = deployment["solo"], deployment.control
    content, told = BROKEN[what]
    path = solo.script("broken", "")
    hook = control.put(ctrl_exec.ETC + "/auth-hook", "", 0o755)
    for one in (path, hook):
        with open(one, "wb") as file:
            file.write(content)
    for program, verb in ((solo, "self-check"), (control, "check")):
        status, shown = program.json(verb)
        failed = [one["what"] for one in shown["findings"] if one["level"] == "FAIL"]
        assert status == 1 and any(told in one for one in failed), failed


def test_checks_accept_programs_and_scripts_that_run(fresh):
    deployment = fresh(start=False)
    solo = deployment["solo"]
    for name, line in (("by-env", "/usr/bin/env sh"), ("flags", "/bin/sh -e"), ("spaced", " /bin/sh")):
        solo.script(name, "echo\n", interpreter=line)
    with open(solo.file(ctrl_exec.AGENT_ETC + "/scripts.conf"), "a", encoding="ascii") as file:
        file.write("true = %s\n" % os.path.realpath("/bin/true"))
    status, shown = solo.json("self-check")
    assert [one for one in shown["findings"] if one["level"] == "FAIL"] == []


# --- clocks ---------------------------------------------------------------------------------------------


def issue_for_tomorrow(control, tmp_path):
    """A certificate of the dispatcher's CA that is not valid yet, and its key."""
    openssl = ctrl_exec.OpenSSL()
    key = str(tmp_path / "key")
    ctrl_exec.new_key_file(openssl, key, "ec")
    request = openssl.new_request(key, "control")
    saved = ctrl_exec.now
    try:
        ctrl_exec.now = lambda: saved() + 86400
        ca_key = ctrl_exec.ca_key_path(control.config.ca)
        pem = openssl.sign(request, "control", "dispatcher", 5, control.config.ca, ca_key)
    finally:
        ctrl_exec.now = saved
    cert = str(tmp_path / "cert")
    with open(cert, "w", encoding="ascii") as file:
        file.write(pem)
    return support.client_context(cert, key)


def test_a_handshake_that_fails_on_dates_blocks_nobody(fresh, tmp_path):
    deployment = fresh(start=False)
    solo = deployment["solo"]
    solo.configure("rate_limit_volume = 5/60/300\n")
    solo.start()
    context = issue_for_tomorrow(deployment.control, tmp_path)
    for number in range(8):
        assert support.send_raw(solo.port, context, b"GET / HTTP/1.0\r\n\r\n")[0] == 0
        wait_until(lambda: len(solo.events("tls-failure")) > number, what="the failure")
    assert "a clock is wrong" in solo.events("tls-failure")[0]
    assert solo.events("rate-block") == []
    assert ping(deployment)["status"] == "ok"


def set_clock(program, seconds):
    """Have a program's own clock be so far ahead."""
    path = os.path.join(program.root, ".launch")
    with open(path, encoding="utf-8") as file:
        text = file.read()
    moved = "import ctrl_exec\nreal = ctrl_exec.now\nctrl_exec.now = lambda: real() + %d\n" % seconds
    with open(path, "w", encoding="utf-8") as file:
        file.write(text.replace("import ctrl_exec\n", moved))


@pytest.mark.parametrize("seconds, words", [(-10800, "behind this one"), (7200, "ahead of this one"), (0, None)])
def test_pairing_with_clocks_apart_says_so_on_both_sides(tmp_path, seconds, words):
    control = support.Control(tmp_path / "control")
    host = support.Host(tmp_path / "host", "solo")
    set_clock(host, seconds)
    desk = control.open_pairing()
    try:
        asked = host.run("request-pairing", "--background", "--dispatcher", "127.0.0.1:%d" % desk.port, "--name", "solo")
        assert asked.returncode == 0, asked.err
        shown = wait_until(lambda: control.run("list-requests").out.splitlines()[2:], what="the request")[0]
        (request,) = control.json("list-requests")[1]["requests"]
        assert abs(request["clock"] - seconds) < 60
        if words:
            assert "its clock is" in shown and words in shown
            assert "the dispatcher's clock is" in asked.err and "set one of them" in asked.err
        else:
            assert "clock" not in shown + asked.err
        desk.stdin.write(b"list\n")
        desk.stdin.flush()
        line = desk.stdout.readline().decode()
        while "code" not in line:
            line = desk.stdout.readline().decode()
        assert ("its clock is" in line) == bool(words), line
        control.run("deny", asked.out.strip())
    finally:
        desk.terminate()
        desk.communicate(timeout=60)


# --- arguments as bytes ---------------------------------------------------------------------------------


def latin_locale():
    """A locale of this system whose encoding is ISO 8859-1, or nothing."""
    listed = subprocess.run(["locale", "-a"], capture_output=True).stdout.decode().split()
    return next((name for name in listed if re.search("iso-?8859-?1$", name, re.IGNORECASE)), "")


def test_arguments_arrive_as_the_bytes_that_were_given_whatever_the_locale(fresh, tmp_path):
    deployment = fresh()
    control, env = deployment.control, {}
    if os.geteuid() == 0 and not latin_locale():
        subprocess.run(["localedef", "-i", "de_DE", "-f", "ISO-8859-1", str(tmp_path / "de_DE.ISO-8859-1")], check=True)
        env["LOCPATH"] = str(tmp_path)
    name = latin_locale() or "de_DE.ISO-8859-1"
    for locale in (name, "C", "C.UTF-8"):
        env["LC_ALL"] = locale
        done = control.run("run", "solo", "args", "--", "gr\u00fc\u00df", "\u20ac", env=env)
        assert "gr\u00fc\u00df\0\u20ac\0" in done.out, (locale, done.out)
        words = control.argv("run", "solo", "args", "--", b"gr\xfc\xdf")
        refused = subprocess.run(words, env=control.environment(env), capture_output=True, timeout=60)
        assert refused.returncode == 2 and b"argument 1 is not UTF-8" in refused.stderr, locale


# --- standard descriptors that are closed or full --------------------------------------------------------


REDIRECTIONS = ["2>&-", "2>/dev/full", "<&-", ">&-", ">/dev/full", "<&- >&- 2>&-", ">/dev/full 2>/dev/full", "<&- 2>&-"]
VERBS = {
    "run": "run solo exit -- 3",
    "run two": "run solo other exit -- 0",
    "stream": "run --stream solo both",
    "ping": "ping solo",
    "unknown host": "ping nobody",
    "unknown option": "ping --wrong",
    "missing": "check",
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    with support.Deployment(tmp_path_factory.mktemp("pair"), ("solo", "other"), start=False) as made:
        for host in made.hosts.values():
            host.script("both", "echo out; echo err >&2; exit 4\n")
            host.start()
        yield made


@pytest.mark.parametrize("verb", sorted(VERBS))
@pytest.mark.parametrize("redirection", REDIRECTIONS)
def test_what_is_closed_or_full_costs_the_text_and_not_the_truth(pair, verb, redirection):
    control = pair.control

    def shell(how):
        words = ["sh", "-c", '"$@" ' + how, "sh", *control.argv(*VERBS[verb].split())]
        return subprocess.run(words, env=control.environment(), capture_output=True, timeout=120)

    plain, odd = shell(""), shell(redirection)
    loses_output = ">&-" in redirection.replace("2>&-", "") or ">/dev/full" in redirection.replace("2>/dev/full", "")
    is_shown = bool(plain.stdout)
    if verb == "stream" and "2>/dev/full" in redirection:
        assert odd.returncode == 74
    else:
        assert odd.returncode == (74 if loses_output and is_shown else plain.returncode), odd
    assert b"internal error" not in odd.stdout + odd.stderr and b"Traceback" not in odd.stdout + odd.stderr
    if not loses_output and verb not in ("stream", "missing"):
        noise = rb"[0-9]+ms|req:\S+|[ -]+"  # what differs from run to run, and the widths of a table's columns
        shown = [sorted(re.sub(noise, b" ", one.stdout).splitlines()) for one in (odd, plain)]
        assert shown[0] == shown[1]


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full", "<&-", "<&- 2>&-"])
def test_pairing_mode_with_descriptors_closed_or_full_keeps_its_port_open(tmp_path, redirection):
    port = support.free_port()
    control = support.Control(tmp_path / "control", "pairing_port = %d\n" % port)
    words = ["sh", "-c", 'exec "$@" ' + redirection, "sh", *control.argv("pairing-mode")]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen(words, env=control.environment(), **pipes)
    try:
        support.wait_for_port(port)
        while b"on each host" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.communicate()
    assert json.loads(control.run("list-requests", "--json").out)["ok"] is True
