"""Under a real systemd, the oldest that we promise and the newest: what the units say is what happens."""

import contextlib
import json
import os
import re
import signal
from subprocess import PIPE

import pytest
import trees
from machines import INSTALL, PYTHON, SCRIPTS, boot, find_obstacle, pair
from support import wait_until

pytestmark = pytest.mark.skipif(bool(find_obstacle(systemd=True)), reason=find_obstacle(systemd=True))

AGENT, API, MAINTAIN = "ctrl-exec-agent", "ctrl-exec-api", "ctrl-exec-maintain"
CONF, API_CONF = "/etc/ctrl-exec-agent/agent.conf", "/etc/ctrl-exec/ctrl-exec.conf"
SCRIPTS_CONF = "/etc/ctrl-exec-agent/scripts.conf"
HOLD = "import socket; a = socket.create_server(('', 7443)); print('taken', flush=True); input()"
GATE = "#!/bin/sh\necho begun >/run/begun\nread -r word </run/go\necho $word\n"


class Site:
    """A machine that systemd runs, with all three roles, paired with itself."""

    def __init__(self, machine):
        self.machine = machine
        self.name = machine.name
        wait_until(lambda: self._is_up(), what="the end of the boot")
        machine.run(*INSTALL, "--dispatcher", "--agent", "--api")
        machine.put(API_CONF, "api_auth_default = allow\n", 0o640)
        for verb in ("setup-ca", "setup-ctrl-exec"):
            machine.run("ced", verb)
        machine.run(*INSTALL, "--api")
        machine.run("mkfifo", "-m", "666", "/run/begun", "/run/go")
        machine.put("/opt/gate", GATE, 0o755)
        machine.put("/opt/hello", "#!/bin/sh\necho hello\n", 0o755)
        self.allow("hello", "gate")
        pair(machine, machine)
        self.systemctl("enable", "--now", AGENT, API, MAINTAIN + ".timer")

    def _is_up(self):
        """Whether all has started that starts at boot. `degraded` says that some of it has failed."""
        said = self.machine.run("systemctl", "is-system-running", status=None).out.strip()
        assert said != "degraded", self.machine.run("systemctl", "--failed", "--no-pager").out
        return said == "running"

    def allow(self, *names):
        """Write scripts.conf, which the agent does not read before it is told to."""
        lines = ["%s = /opt/%s\n" % (name, name.split("-")[0]) for name in names]
        self.machine.put(SCRIPTS_CONF, "".join(lines))

    def systemctl(self, *words, status=0):
        """What systemctl prints; another status than this is a failure, or with None, it is returned."""
        done = self.machine.run("systemctl", "--no-pager", *words, status=None)
        if status is None:
            return done.returncode
        said = "systemctl %s: %d\n%s" % (" ".join(words), done.returncode, done.out + done.err)
        assert done.returncode == status, said + self.journal()[-6000:]
        return done.out.strip()

    def journal(self):
        """All of it: by unit, lines of a process that has ended at once would be missing."""
        self.machine.run("journalctl", "--sync")
        return self.machine.run("journalctl", "--no-pager", "-q", "-o", "cat").out

    def show(self, name, unit=AGENT):
        return self.systemctl("show", "-p", name, unit).partition("=")[2]

    def pid(self, unit=AGENT):
        """The main process of a service, as it is called out here."""
        inside = self.show("MainPID", unit)
        with open("/proc/%d/task/%d/children" % ((self.machine.pid,) * 2), encoding="ascii") as file:
            for pid in file.read().split():
                with open("/proc/%s/status" % pid, encoding="ascii") as status:
                    if re.search(r"(?m)^NSpid:.*\t%s$" % inside, status.read()):
                        return int(pid)
        raise AssertionError("%s has no process" % unit)

    def ping(self):
        return self.machine.run("ced", "ping", self.name, status=None).returncode == 0

    def hello(self, name="hello"):
        (result,) = json.loads(self.machine.run("ced", "run", self.name, name, "--json").out)["results"]
        return result["stdout"]

    def start_gate(self):
        """Start a script that waits; its request id, once it has begun."""
        answer = self.machine.run("ced", "run", "--async", self.name, "gate", "--json").out
        assert self.machine.run("cat", "/run/begun").out == "begun\n"
        return json.loads(answer)["reqid"]

    def open_gate(self, word):
        self.machine.run("sh", "-c", "echo %s >/run/go" % word)

    def result(self, reqid):
        """What a script printed, when it ended well."""
        shown = self.machine.run("ced", "wait", reqid).out
        assert "[done  exit:0]" in shown, shown
        return shown.splitlines()[-1]

    def ask(self, *words):
        return json.loads(self.machine.run(PYTHON, SCRIPTS + "/ask.py", *words).out)


@pytest.fixture(scope="module", params=trees.SYSTEMD)
def site(request):
    with boot(request.param + "-systemd", systemd=True) as machine:
        version = machine.run("systemctl", "--version").out
        assert version.startswith("systemd %s " % trees.SYSTEMD[request.param])
        site = Site(machine)
        yield site
        assert "ACTION=bug" not in site.journal()


@pytest.fixture(autouse=True)
def running(site):
    """Whatever became of the test before, when one begins both services run, on ports that systemd holds."""
    units = [unit + kind for unit in (AGENT, API) for kind in (".socket", ".service")]
    if any(site.show("ActiveState", unit) != "active" for unit in units):
        site.systemctl("stop", *units)
        site.systemctl("reset-failed")
        site.systemctl("start", *units)


@contextlib.contextmanager
def broken(site, path, text):
    """A configuration file that is this instead, while a block runs."""
    sound = site.machine.read(path)
    site.machine.put(path, text, 0o640)
    try:
        yield
    finally:
        site.machine.put(path, sound, 0o640)


def test_the_agent_answers_as_soon_as_systemd_says_that_it_has_started(site):
    for _ in range(5):
        site.systemctl("stop", AGENT)
        site.systemctl("start", AGENT)
        assert site.ping()
    assert (site.show("ActiveState"), site.show("SubState")) == ("active", "running")


def test_when_a_reload_has_ended_what_was_changed_is_served(site):
    for number in range(5):
        name = "hello-%d" % number
        site.allow("hello", "gate", name)
        site.systemctl("reload", AGENT)
        assert site.hello(name) == "hello\n"


@pytest.mark.parametrize("unit, path", [(AGENT, CONF), (AGENT, SCRIPTS_CONF), (API, API_CONF)])
def test_a_reload_of_a_broken_file_fails_and_the_service_goes_on(site, unit, path):
    process = site.pid(unit)
    with broken(site, path, "???\n"):
        assert site.systemctl("reload", unit, status=None) != 0
        assert site.pid(unit) == process and site.systemctl("is-active", unit) == "active"
        assert site.ask("/health")["ok"] is True
        if unit == AGENT:
            assert site.hello() == "hello\n"
    site.systemctl("reload", unit)
    assert site.pid(unit) == process


@pytest.mark.parametrize("unit", [AGENT, API])
def test_a_service_that_is_killed_comes_back(site, unit):
    process, restarts = site.pid(unit), int(site.show("NRestarts", unit))
    os.kill(process, signal.SIGKILL)
    wait_until(lambda: int(site.show("NRestarts", unit)) == restarts + 1, what="the restart")
    wait_until(lambda: site.show("SubState", unit) == "running", what="the service")
    assert site.pid(unit) != process
    assert site.hello() == "hello\n" and site.ask("/health")["ok"] is True


@pytest.mark.parametrize("verb", ["stop", "restart", "kill"])
def test_a_script_outlives_its_agent(site, verb):
    reqid = site.start_gate()
    if verb == "kill":
        restarts = int(site.show("NRestarts"))
        site.systemctl("kill", "--kill-who=main", "--signal=KILL", AGENT)
        wait_until(lambda: int(site.show("NRestarts")) == restarts + 1, what="the restart")
    else:
        site.systemctl(verb, AGENT)
    site.open_gate("after-" + verb)
    site.systemctl("start", AGENT)
    assert site.result(reqid) == "after-" + verb


def test_an_agent_that_a_person_must_mend_is_not_started_again_and_again(site):
    with broken(site, CONF, "port = nonsense\n"):
        assert site.systemctl("restart", AGENT, status=None) != 0
        wait_until(lambda: site.show("ActiveState") == "failed", what="the end of it")
        assert site.show("ExecMainStatus") == "78" and site.show("NRestarts") == "0"
        assert not site.ping() and site.show("ActiveState") == "failed"
    site.systemctl("start", AGENT)
    assert site.ping() and site.systemctl("is-active", AGENT + ".socket") == "active"


@pytest.mark.parametrize("unit, port", [(AGENT, 7443), (API, 7445)])
def test_no_other_user_can_have_the_port_while_its_service_is_down(site, unit, port):
    other = ("setpriv", "--reuid=33", "--regid=33", "--clear-groups", PYTHON, "/opt/taker.py", str(port))
    site.machine.put("/opt/taker.py", site.machine.read(SCRIPTS + "/taker.py"))
    taker = site.machine.spawn(*other, stdin=PIPE, stdout=PIPE)
    assert taker.stdout.readline() == b"trying\n"
    for _ in range(3):
        site.systemctl("stop", unit)
        assert site.machine.run(*other).out == "trying\n0\n"
        site.systemctl("start", unit)
        site.systemctl("restart", unit)
    assert taker.communicate(timeout=60)[0] == b"0\n"


def test_a_port_that_somebody_else_has_is_tried_again(site):
    site.systemctl("stop", AGENT + ".socket")
    other = site.machine.spawn(PYTHON, "-c", HOLD, stdin=PIPE, stdout=PIPE)
    assert other.stdout.readline() == b"taken\n"
    site.systemctl("start", AGENT)
    wait_until(lambda: "cannot listen" in site.show("StatusText"), what="a word of it")
    other.communicate(b"\n", timeout=60)
    wait_until(site.ping, what="an answer")
    assert site.show("NRestarts") == "0"


def test_nobody_is_turned_away_while_the_agent_is_restarted(site):
    again = site.machine.spawn("sh", "-euc", "for i in 1 2 3 4 5; do systemctl restart %s; done" % AGENT)
    while again.poll() is None:
        assert site.hello() == "hello\n"
    assert again.returncode == 0


def test_who_connects_while_the_service_is_down_is_answered(site):
    site.systemctl("stop", AGENT)
    assert site.ping() and site.systemctl("is-active", AGENT) == "active"
    site.systemctl("stop", API)
    assert site.ask("/health")["ok"] is True and site.systemctl("is-active", API) == "active"


def test_the_timer_waits_and_its_service_looks_after_certificates(site):
    assert site.systemctl("is-active", MAINTAIN + ".timer") == "active"
    site.systemctl("start", MAINTAIN + ".service")
    assert site.show("Result", MAINTAIN + ".service") == "success"
    assert "ACTION=cert-check" in site.journal()


def test_the_api_serves_under_all_that_confines_it(site):
    assert site.ask("/health")["ok"] is True
    answer = site.ask("/run", json.dumps({"hosts": [site.name], "script": "hello"}))
    assert answer["results"][0]["stdout"] == "hello\n", answer
    status = site.machine.read("/proc/%s/status" % site.show("MainPID", API))
    uid = site.machine.run("id", "-u", "ctrl-exec").out.strip()
    assert re.search(r"(?m)^Uid:\t(.*)$", status)[1].split() == [uid] * 4
    for line in ("NoNewPrivs:\t1", "CapEff:\t" + "0" * 16, "CapBnd:\t" + "0" * 16, "Seccomp:\t2"):
        assert "\n%s\n" % line in status, status
    view = "/proc/%s/root" % site.show("MainPID", API)
    assert site.machine.run("cat", view + "/etc/ctrl-exec/ca.key", status=None).out == ""
    assert site.machine.run("touch", view + "/etc/x", status=None).returncode != 0
    assert "BEGIN" in site.machine.run("cat", view + "/etc/ctrl-exec/dispatcher.key").out


def test_what_check_and_self_check_say_is_no_failure(site):
    for words in (("ced", "check"), ("cea", "self-check"), ("ctrl-exec-api", "check"), ("cea", "self-ping")):
        assert "FAIL" not in site.machine.run(*words).out


def test_uninstall_ends_the_services_and_leaves_nothing_of_them_with_systemd(site):
    """The last of these tests, as it is the end of the site."""
    machine = site.machine
    machine.run(*INSTALL, "--uninstall")
    assert "ctrl-exec" not in site.systemctl("list-unit-files")
    assert not machine.is_open(7443) and not machine.is_open(7445)
    site.systemctl("daemon-reload")
    assert site.systemctl("--all", "--no-legend", "list-units", "ctrl-exec*") == ""
