"""Who may, and from where: everything that is not a clear yes of the hook is a no, and nothing runs then."""

import ipaddress
import json
import os
import shutil
import select
import socket
import tempfile
import threading

import pytest

import ctrl_exec
import support
from ctrl_exec import AddressGate, Denied, Hook, HookContext, Rate
from support import wait_until

CANARY = "token-4f2a-canary"


@pytest.fixture(scope="module")
def shelf():
    """A directory that any user can enter, as the agent's front may be one; pytest's own are private."""
    path = tempfile.mkdtemp(prefix="ctrl-exec-hooks-")
    os.chmod(path, 0o755)
    yield path
    shutil.rmtree(path)


def write_hook(path, body, mode=0o755):
    """Put a hook in place; `body` None: there is none, and `directory`: something else is there."""
    if os.path.isdir(path):
        os.rmdir(path)
    elif os.path.lexists(path):
        os.unlink(path)
    if body == "directory":
        os.mkdir(path, mode)
    elif body is not None:
        # never open for writing at the place where somebody may execute it at this moment
        with open(path + ".new", "w", encoding="ascii") as file:
            file.write(body)
        os.chmod(path + ".new", mode)
        os.rename(path + ".new", path)


SH = "#!/bin/sh\n"

# name: (hook, mode, reason code, part of the reason), for every answer that is no clear yes
NO = {
    "exit 1": (SH + "exit 1\n", 0o755, 1, "denied"),
    "exit 2": (SH + "exit 2\n", 0o755, 2, "bad credentials"),
    "exit 3": (SH + "exit 3\n", 0o755, 3, "insufficient privilege"),
    "exit 4": (SH + "exit 4\n", 0o755, 1, "failed (exit status 4)"),
    "exit 126": (SH + "exit 126\n", 0o755, 1, "failed (exit status 126)"),
    "exit 255": (SH + "exit 255\n", 0o755, 1, "failed (exit status 255)"),
    "command not found": (SH + "no-such-command-here\n", 0o755, 1, "failed (exit status 127)"),
    "killed": (SH + "kill -KILL $$\n", 0o755, 1, "failed"),
    "terminated": (SH + "kill -TERM $$\n", 0o755, 1, "failed"),
    "crashed": (SH + "kill -SEGV $$\n", 0o755, 1, "failed"),
    "missing": (None, 0, 1, "cannot be run: No such file or directory"),
    "not executable": (SH + "exit 0\n", 0o644, 1, "cannot be run: Permission denied"),
    "world-writable": (SH + "exit 0\n", 0o757, 1, "is writable by everybody (mode 0757)"),
    "a directory": ("directory", 0o755, 1, "not a regular file"),
    "no interpreter": ("#!/no/such/interpreter\nexit 0\n", 0o755, 1, "cannot be run"),
    "not a program": ("hello\n", 0o755, 1, "cannot be run: Exec format error"),
    "empty": ("", 0o755, 1, "cannot be run: Exec format error"),
}

YES = {
    "silent": SH + "exit 0\n",
    "reading": SH + "cat >/dev/null\n",
    "10 MB of output": SH + "head -c 10000000 /dev/zero; head -c 10000000 /dev/zero >&2\n",
    "output that says no": SH + "echo denied; echo denied >&2\n",
    "closing everything": SH + "exec <&- >&- 2>&-\n",
}

FULL = HookContext(
    action="run", reqid="r1", script="deploy", hosts=("web-1", "web-2"), args=("a b", "", "-x", "\u00e9\n"),
    username="ann", token=CANARY, source_ip="192.0.2.7", dispatcher="control", dispatcher_serial="ab12",
    submitter="bob", submitter_ip="192.0.2.8",
)  # fmt: skip


def decide(path, context=FULL, timeout=20, generic=False):
    """The Denied of a hook, or None when it said yes."""
    try:
        Hook(path, timeout, generic).decide(context)
    except Denied as error:
        return error
    return None


# --- the hook by itself ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NO)
def test_whatever_is_not_a_clear_yes_is_a_no(tmp_path, name):
    body, mode, code, reason = NO[name]
    path = str(tmp_path / "hook")
    write_hook(path, body, mode)
    error = decide(path)
    assert error is not None
    assert error.reason_code == code
    assert error.message.startswith("not authorised: ") and reason in error.message


@pytest.mark.parametrize("name", YES)
def test_exit_0_is_a_yes_whatever_the_hook_prints_or_reads(tmp_path, name):
    path = str(tmp_path / "hook")
    write_hook(path, YES[name])
    assert decide(path) is None


def test_a_hook_that_hangs_is_a_no_and_its_children_end_too(tmp_path):
    path, pids = str(tmp_path / "hook"), tmp_path / "pids"
    write_hook(path, SH + "echo $$ > %s; sleep 300 & echo $! >> %s; wait\n" % (pids, pids))
    numbers = []
    for seconds in (2, 10, 50):  # a host that is very busy needs more until the hook has begun
        error = decide(path, timeout=seconds)
        assert error.reason_code == 1 and "did not answer within %d s" % seconds in error.message
        numbers = pids.read_text().split() if pids.exists() else []
        if len(numbers) == 2:
            break

    def is_gone(pid):
        try:
            with open("/proc/%s/stat" % pid, encoding="ascii") as file:
                return file.read().rpartition(") ")[2][0] == "Z"
        except OSError:
            return True

    assert len(numbers) == 2
    wait_until(lambda: all(is_gone(number) for number in numbers), what="the end of the hook's processes")


def test_a_hook_that_ignores_term_and_hangs_is_a_no(tmp_path):
    path = str(tmp_path / "hook")
    write_hook(path, SH + "trap '' TERM INT HUP\nwhile :; do sleep 1; done\n")
    assert "did not answer within 1 s" in decide(path, timeout=1).message


def test_a_hook_that_does_not_read_its_input_is_not_in_the_way(tmp_path):
    path = str(tmp_path / "hook")
    args = ("x" * 100000,)  # more than a pipe holds
    write_hook(path, SH + "exit 0\n")
    assert decide(path, FULL._replace(args=args)) is None
    write_hook(path, SH + "exit 3\n")
    assert decide(path, FULL._replace(args=args)).reason_code == 3


def test_arguments_of_half_a_megabyte_are_decided_either_way(tmp_path):
    """The environment cannot hold them; a hook must never say yes to less than what will run."""
    path, marker = str(tmp_path / "hook"), tmp_path / "asked"
    args = tuple("%04d" % number + "x" * 100 for number in range(5000))
    write_hook(path, SH + "touch %s; exit 3\n" % marker)
    error = decide(path, FULL._replace(args=args))
    assert error.reason_code == (3 if marker.exists() else 1)
    write_hook(path, SH + "cat > %s\n" % (tmp_path / "input"))
    error = decide(path, FULL._replace(args=args))
    if error is None:
        assert tuple(json.loads((tmp_path / "input").read_text())["args"]) == args
    else:
        assert "rgument" in error.message and "too l" in error.message.lower()


def test_deny_generic_hides_the_reason_and_the_code(tmp_path):
    path = str(tmp_path / "hook")
    for name in ("exit 1", "exit 2", "exit 3", "exit 4", "missing"):
        write_hook(path, NO[name][0])
        error = decide(path, generic=True)
        assert (error.message, error.reason_code) == ("not authorised", 1)
    write_hook(path, YES["silent"])
    assert decide(path, generic=True) is None


def test_a_hook_of_somebody_else_is_a_no(tmp_path, monkeypatch):
    path = str(tmp_path / "hook")
    write_hook(path, YES["silent"])
    if support.IS_ROOT:
        os.chown(path, 12345, 12345)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert "belongs to user" in decide(path).message


def test_the_hook_gets_the_whole_context_as_json_and_as_environment(tmp_path, monkeypatch):
    monkeypatch.setattr(ctrl_exec, "now", lambda: 1700000000.5)
    monkeypatch.setenv("ENVEXEC_LEFTOVER", "x")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/tmp")
    path = str(tmp_path / "hook")
    write_hook(path, SH + "cat > %s/in; env -0 > %s/env; pwd > %s/cwd\n" % ((tmp_path,) * 3))
    assert decide(path) is None
    told = json.loads((tmp_path / "in").read_bytes())
    assert told == {
        "action": "run",
        "reqid": "r1",
        "script": "deploy",
        "hosts": ["web-1", "web-2"],
        "args": ["a b", "", "-x", "\u00e9\n"],
        "username": "ann",
        "token": CANARY,
        "source_ip": "192.0.2.7",
        "dispatcher": "control",
        "dispatcher_serial": "ab12",
        "submitter": "bob",
        "submitter_ip": "192.0.2.8",
        "timestamp": "2023-11-14T22:13:20Z",
        "via": "cli",
        "operation": "run",
    }
    pairs = (tmp_path / "env").read_bytes().decode().strip("\0").split("\0")
    environment = dict(pair.split("=", 1) for pair in pairs)
    assert json.loads(environment.pop("ENVEXEC_ARGS_JSON")) == told["args"]
    assert {name: value for name, value in environment.items() if name not in ("PWD", "SHLVL", "_")} == {
        "PATH": ctrl_exec.SAFE_PATH,
        "ENVEXEC_ACTION": "run",
        "ENVEXEC_REQID": "r1",
        "ENVEXEC_SCRIPT": "deploy",
        "ENVEXEC_HOSTS": "web-1,web-2",
        "ENVEXEC_VIA": "cli",
        "ENVEXEC_OPERATION": "run",
        "ENVEXEC_OMITTED": "",
        "ENVEXEC_ARGS": "a b  -x \u00e9\n",
        "ENVEXEC_USERNAME": "ann",
        "ENVEXEC_TOKEN": CANARY,
        "ENVEXEC_SOURCE_IP": "192.0.2.7",
        "ENVEXEC_TIMESTAMP": "2023-11-14T22:13:20Z",
        "ENVEXEC_DISPATCHER": "control",
        "ENVEXEC_DISPATCHER_SERIAL": "ab12",
        "ENVEXEC_SUBMITTER": "bob",
        "ENVEXEC_SUBMITTER_IP": "192.0.2.8",
    }
    assert (tmp_path / "cwd").read_text() == "/\n"


def test_the_hook_inherits_no_descriptor(tmp_path):
    path = str(tmp_path / "hook")
    write_hook(path, SH + "exec ls /proc/self/fd > %s/fds\n" % tmp_path)
    with socket.socket() as listener:
        os.set_inheritable(listener.fileno(), True)
        assert decide(path) is None
        numbers = (tmp_path / "fds").read_text().split()
    assert sorted(numbers) == ["0", "1", "2", "3"]  # 3 is the directory being listed


def test_a_default_hook_is_used_when_it_is_there_and_a_configured_one_always(tmp_path):
    default, configured = str(tmp_path / "auth-hook"), str(tmp_path / "configured")
    assert ctrl_exec.find_hook("", default, 5) is None
    assert ctrl_exec.find_hook(configured, default, 5) == Hook(configured, 5)
    os.symlink("/no/such/file", default)  # somebody meant a hook to be there
    assert ctrl_exec.find_hook("", default, 5) == Hook(default, 5, is_configured=False)
    assert "No such file" in decide(default).message


# --- on the control host --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guarded(tmp_path_factory, shelf):
    """A control host and an agent, each with a hook of its own: (deployment, control's hook, agent's)."""
    theirs = os.path.join(shelf, "agent-hook")
    write_hook(theirs, YES["silent"])
    with support.Deployment(tmp_path_factory.mktemp("policy"), ("solo",), start=False) as deployment:
        ours = deployment.control.file(ctrl_exec.ETC + "/auth-hook")
        write_hook(ours, YES["silent"])
        solo = deployment["solo"]
        solo.configure("rate_limit_disable = yes\nauth_hook = %s\n" % theirs)
        solo.script("mark", 'touch "$1"\n')
        solo.start()
        yield deployment, ours, theirs


@pytest.fixture(autouse=True)
def agreeing_hooks(request):
    """Each test begins with two hooks that say yes."""
    if "guarded" in request.fixturenames:
        _, ours, theirs = request.getfixturevalue("guarded")
        write_hook(ours, YES["silent"])
        write_hook(theirs, YES["silent"])


def events_since(program, start, action="auth"):
    return program.events(action)[start:]


@pytest.mark.parametrize("name", ("exit 1", "exit 2", "exit 3", "exit 4", "killed", "not executable"))
def test_a_no_of_the_dispatchers_hook_ends_a_run_before_anything_is_sent(guarded, tmp_path, name):
    deployment, ours, _ = guarded
    body, mode, code, reason = NO[name]
    write_hook(ours, body, mode)
    control, solo = deployment.control, deployment["solo"]
    asked, began = len(solo.events("auth")), len(control.events("auth"))
    status, answer = control.json("run", "solo", "mark", "--", str(tmp_path / "mark"))
    assert status == 1
    assert (answer["ok"], answer["status"], answer["code"]) == (False, "denied", code)
    assert answer["error"].startswith("not authorised: ") and reason in answer["error"]
    assert not (tmp_path / "mark").exists()
    assert len(solo.events("auth")) == asked
    lines = events_since(control, began)
    result = "denied" if name in ("exit 1", "exit 2", "exit 3") else "error"
    assert len(lines) == 1 and "RESULT=%s " % result in lines[0] + " " and "SCRIPT=mark" in lines[0]


def test_a_configured_hook_that_is_missing_denies_on_the_dispatcher(guarded, tmp_path):
    control = guarded[0].control
    conf = control.put("/other.conf", "dispatcher_id = control\nauth_hook = /no/such/hook\n", 0o640)
    status, answer = control.json("--config", conf, "run", "solo", "mark", "--", str(tmp_path / "mark"))
    assert (status, answer["status"], answer["code"]) == (1, "denied", 1)
    assert "/no/such/hook cannot be run: No such file or directory" in answer["error"]
    assert not (tmp_path / "mark").exists()


def test_deny_generic_and_a_hanging_hook_on_the_dispatcher(guarded, tmp_path):
    control, hook = guarded[0].control, str(tmp_path / "hook")
    write_hook(hook, SH + "sleep 300\n")
    conf = control.put(
        "/other.conf",
        "dispatcher_id = control\nauth_hook = %s\nauth_hook_timeout = 1\nauth_deny_generic = yes\n" % hook,
        0o640,
    )
    status, answer = control.json("--config", conf, "run", "solo", "mark", "--", str(tmp_path / "mark"))
    assert (status, answer["error"], answer["code"]) == (1, "not authorised", 1)
    assert "did not answer within 1 s" in control.events("auth")[-1]
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("verb", ("ping", "discovery"))
def test_ping_and_discovery_ask_the_dispatchers_hook_too(guarded, verb):
    deployment, ours, _ = guarded
    control, solo = deployment.control, deployment["solo"]
    write_hook(ours, SH + '[ "$ENVEXEC_ACTION" = run ] || exit 3\n')
    served = len(solo.events("ping") + solo.events("capabilities"))
    status, answer = control.json(verb, "solo")
    assert (status, answer["ok"], answer["code"]) == (1, False, 3)
    assert len(solo.events("ping") + solo.events("capabilities")) == served
    assert control.json("run", "solo", "hello")[0] == 0


def test_a_denied_command_says_so_to_a_person(guarded):
    deployment, ours, _ = guarded
    write_hook(ours, NO["exit 2"][0])
    done = deployment.control.run("run", "solo", "hello")
    assert (done.returncode, done.out, done.err) == (1, "", "ced: not authorised: bad credentials\n")


def test_the_dispatchers_hook_is_told_who_what_and_where(guarded, tmp_path):
    deployment, ours, _ = guarded
    write_hook(ours, SH + "cat > %s/in; env -0 > %s/env\n" % (tmp_path, tmp_path))
    words = ("run", "solo", "args", "--username", "ann", "--", "a b", "", "--json")
    status, answer = deployment.control.json(*words, env={"ENVEXEC_TOKEN": CANARY})
    assert status == 0
    told = json.loads((tmp_path / "in").read_bytes())
    assert told.pop("timestamp").endswith("Z")
    assert told == {
        "action": "run",
        "reqid": answer["reqid"],
        "script": "args",
        "hosts": ["solo"],
        "args": ["a b", "", "--json"],
        "username": "ann",
        "token": CANARY,
        "source_ip": "127.0.0.1",
        "dispatcher": "control",
        "dispatcher_serial": deployment.control.serial(),
        "submitter": "",
        "submitter_ip": "",
        "via": "cli",
        "operation": "run",
    }
    names = [pair.partition("=")[0] for pair in (tmp_path / "env").read_text().split("\0")]
    assert sorted(name for name in names if name.startswith("ENVEXEC_")) == [
        "ENVEXEC_ACTION", "ENVEXEC_ARGS", "ENVEXEC_ARGS_JSON", "ENVEXEC_DISPATCHER",
        "ENVEXEC_DISPATCHER_SERIAL", "ENVEXEC_HOSTS", "ENVEXEC_OMITTED", "ENVEXEC_OPERATION",
        "ENVEXEC_REQID", "ENVEXEC_SCRIPT",
        "ENVEXEC_SOURCE_IP", "ENVEXEC_SUBMITTER", "ENVEXEC_SUBMITTER_IP", "ENVEXEC_TIMESTAMP",
        "ENVEXEC_TOKEN", "ENVEXEC_USERNAME", "ENVEXEC_VIA",
    ]  # fmt: skip


def test_the_hook_is_asked_once_about_all_hosts(guarded, tmp_path):
    deployment, ours, _ = guarded
    control = deployment.control
    entry = ctrl_exec.find_agent(control.config.registry_dir, "solo")
    with ctrl_exec.registry_lock(control.config.registry_dir):
        ctrl_exec.save_agent(control.config.registry_dir, entry._replace(name="twin"))
    write_hook(ours, SH + "cat >> %s/in; echo >> %s/in\n" % (tmp_path, tmp_path))
    control.json("ping", "solo", "twin")
    lines = (tmp_path / "in").read_text().splitlines()
    assert [sorted(json.loads(line)["hosts"]) for line in lines] == [["solo", "twin"]]


# --- on the agent ---------------------------------------------------------------------------------------


def run_on(deployment, path, **fields):
    """POST /run for the script `mark`: (HTTP status, answer)."""
    body = dict({"script": "mark", "reqid": ctrl_exec.new_id(), "args": [str(path)]}, **fields)
    context = support.dispatcher_context(deployment.control)
    return support.post(deployment["solo"].port, context, "/run", body)


@pytest.mark.parametrize("name", NO)
def test_a_no_of_the_agents_hook_is_an_answer_and_nothing_runs(guarded, tmp_path, name):
    deployment, _, theirs = guarded
    solo = deployment["solo"]
    body, mode, _, reason = NO[name]
    write_hook(theirs, body, mode)
    began = len(solo.events("auth"))
    status, answer = run_on(deployment, tmp_path / "mark")
    assert (status, answer["exit"], answer["script"], answer["host"]) == (200, -1, "mark", "solo")
    assert (answer["stdout"], answer["stderr"]) == ("", "")
    assert answer["error"].startswith("not authorised: ") and reason in answer["error"]
    assert not (tmp_path / "mark").exists()
    assert not os.path.exists(os.path.join(solo.config.runs_dir, "control", answer["reqid"] + ".json"))
    assert len(solo.events("auth")) == began + 1
    assert "REQID=" + answer["reqid"] in solo.events("auth")[-1]


@pytest.mark.parametrize("name", YES)
def test_a_yes_of_the_agents_hook_lets_it_run(guarded, tmp_path, name):
    deployment, _, theirs = guarded
    write_hook(theirs, YES[name])
    status, answer = run_on(deployment, tmp_path / "mark")
    assert (status, answer["exit"]) == (200, 0)
    assert (tmp_path / "mark").exists()


def test_the_agents_hook_hangs_for_no_longer_than_its_time_and_holds_up_nobody(guarded, tmp_path):
    deployment, _, theirs = guarded
    solo = deployment["solo"]
    answers = []
    write_hook(theirs, SH + "sleep 300\n")
    text = "rate_limit_disable = yes\nauth_hook = %s\nauth_hook_timeout = %d\n"
    solo.configure(text % (theirs, 2))
    assert "RESULT=ok" in solo.reload()
    try:
        asker = threading.Thread(target=lambda: answers.append(run_on(deployment, tmp_path / "mark")))
        asker.start()
        context = support.dispatcher_context(deployment.control)
        assert support.post(solo.port, context, "/ping", {})[0] == 200
        asker.join(60)
    finally:
        solo.configure(text % (theirs, 10))
        assert "RESULT=ok" in solo.reload()
    status, answer = answers[0]
    assert (status, answer["exit"]) == (200, -1)
    assert "did not answer within 2 s" in answer["error"]
    assert not (tmp_path / "mark").exists()


def test_the_agents_hook_is_asked_after_the_allowlist(guarded):
    deployment, _, theirs = guarded
    write_hook(theirs, NO["exit 2"][0])
    began = len(deployment["solo"].events("auth"))
    status, answer = run_on(deployment, "/x", script="not-listed")
    assert (status, answer["exit"], answer["error"]) == (200, -1, "script not permitted")
    assert len(deployment["solo"].events("auth")) == began


def test_the_agents_hook_decides_about_discovery_and_not_about_ping(guarded):
    deployment, _, theirs = guarded
    write_hook(theirs, NO["exit 3"][0])
    context = support.dispatcher_context(deployment.control)
    port = deployment["solo"].port
    status, answer = support.post(port, context, "/capabilities", b"", "GET")
    assert (status, answer["status"]) == (403, "forbidden")
    assert "insufficient privilege" in answer["error"] and "scripts" not in answer
    assert support.post(port, context, "/ping", {})[0] == 200


def test_the_agents_hook_is_told_who_calls_by_its_certificate(guarded, shelf, tmp_path):
    deployment, _, theirs = guarded
    inbox = tempfile.mkdtemp(dir=shelf)
    os.chmod(inbox, 0o777)
    write_hook(theirs, SH + "cat > %s/in; env -0 > %s/env\n" % (inbox, inbox))
    args = [str(tmp_path / "m"), "b c"]
    fields = {"username": "ann", "token": CANARY, "dispatcher": "forged", "args": args}
    status, answer = run_on(deployment, "", **fields)
    assert (status, answer["exit"]) == (200, 0)
    with open(inbox + "/in", encoding="utf-8") as file:
        told = json.load(file)
    assert told.pop("timestamp").endswith("Z")
    assert told == {
        "action": "run",
        "reqid": answer["reqid"],
        "script": "mark",
        "hosts": ["solo"],
        "args": [str(tmp_path / "m"), "b c"],
        "username": "ann",
        "token": CANARY,
        "source_ip": "127.0.0.1",
        "dispatcher": "control",
        "dispatcher_serial": deployment.control.serial(),
        "submitter": "",
        "submitter_ip": "",
        "via": "agent",
        "operation": "run",
    }
    with open(inbox + "/env", encoding="utf-8") as file:
        environment = dict(pair.partition("=")[::2] for pair in file.read().split("\0"))
    assert environment["ENVEXEC_TOKEN"] == CANARY
    assert json.loads(environment["ENVEXEC_ARGS_JSON"]) == told["args"]
    assert environment["ENVEXEC_DISPATCHER"] == "control"
    assert environment["ENVEXEC_DISPATCHER_SERIAL"] == deployment.control.serial()


def test_the_token_is_in_no_log_whatever_the_hooks_say(guarded, tmp_path):
    deployment, ours, theirs = guarded
    control, solo = deployment.control, deployment["solo"]
    for our_body, their_body in (
        (YES["silent"], YES["silent"]),
        (NO["exit 2"][0], YES["silent"]),
        (YES["silent"], NO["exit 2"][0]),
        ("hello\n", YES["silent"]),
        (YES["silent"], "hello\n"),
    ):
        write_hook(ours, our_body)
        write_hook(theirs, their_body)
        done = control.run("run", "solo", "mark", "--", str(tmp_path / "m"), env={"ENVEXEC_TOKEN": CANARY})
        assert done.returncode in (0, 1)
        assert CANARY not in done.out + done.err
    assert len(solo.events("auth")) > 0
    assert CANARY not in control.log() + solo.log()
    for directory, _, names in os.walk(solo.config.runs_dir):
        for name in names:
            if name.startswith(".tmp-"):  # the mark of a sweep, which comes after an answer and is renamed
                continue
            with open(os.path.join(directory, name), encoding="utf-8", errors="replace") as file:
                assert CANARY not in file.read()


# --- addresses ------------------------------------------------------------------------------------------


class Clock:
    """A monotonic clock that a test moves."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(ctrl_exec.time, "monotonic", clock)
    return clock


@pytest.fixture
def lines(monkeypatch):
    """What is logged, as (action, fields)."""
    seen = []
    monkeypatch.setattr(ctrl_exec.LOG, "event", lambda action, **fields: seen.append((action, fields)))
    return seen


VOLUME, PROBE = Rate(10, 60, 300), Rate(3, 600, 3600)


def make_gate(allowed=(), disabled=False, bound=4096):
    networks = tuple(ipaddress.ip_network(text) for text in allowed)
    return AddressGate(networks, VOLUME, PROBE, disabled, bound=bound)


def is_open(gate, address):
    """Whether any number of connections from an address is looked at."""
    return gate.admit(address) and not gate.is_blocked(address)


def test_a_blocked_address_may_try_once_every_few_seconds(clock, lines):
    gate = make_gate()
    for _ in range(3):
        gate.count("192.0.2.1", "probe")
    for _ in range(3):
        assert [gate.admit("192.0.2.1") for _ in range(4)] == [True, False, False, False]
        clock.now += ctrl_exec.TRY_SECONDS + 0.1
    assert gate.admit("192.0.2.1")
    gate.trust("192.0.2.1")  # it was a dispatcher
    assert [gate.admit("192.0.2.1") for _ in range(4)] == [True] * 4


def test_an_address_that_is_not_allowed_has_no_connection_at_all(clock, lines):
    gate = make_gate(("192.0.2.0/24",))
    assert not gate.admit("198.51.100.1")


def test_an_address_that_dispatchers_have_used_before_is_not_blocked(clock, lines):
    gate = AddressGate((), VOLUME, PROBE, False, ("192.0.2.1", "2001:db8::1"))
    for address in ("192.0.2.1", "2001:db8::99"):
        for _ in range(100):
            gate.count(address, "probe")
        assert is_open(gate, address)


def test_an_address_is_blocked_by_more_than_the_volume_and_for_its_time(clock, lines):
    gate = make_gate()
    for _ in range(10):
        gate.count("192.0.2.1", "volume")
    assert is_open(gate, "192.0.2.1")
    gate.count("192.0.2.1", "volume")
    assert not is_open(gate, "192.0.2.1")
    assert is_open(gate, "192.0.2.2")
    clock.now += 299
    assert not is_open(gate, "192.0.2.1")
    clock.now += 2
    assert is_open(gate, "192.0.2.1")
    assert lines == [("rate-block", {"PEER": "192.0.2.1", "KIND": "volume", "SECONDS": 300})]


def test_the_volume_is_forgotten_after_its_window(clock, lines):
    gate = make_gate()
    for _ in range(100):
        gate.count("192.0.2.1", "volume")
        clock.now += 6.1  # never more than ten within a minute
    assert is_open(gate, "192.0.2.1")
    assert lines == []


def test_three_bad_handshakes_block_for_an_hour(clock, lines):
    gate = make_gate()
    for _ in range(2):
        gate.count("192.0.2.1", "probe")
    assert is_open(gate, "192.0.2.1")
    gate.count("192.0.2.1", "probe")
    assert not is_open(gate, "192.0.2.1")
    clock.now += 3599
    assert not is_open(gate, "192.0.2.1")
    clock.now += 2
    assert is_open(gate, "192.0.2.1")
    assert lines == [("rate-block", {"PEER": "192.0.2.1", "KIND": "probe", "SECONDS": 3600})]


class Interrupted:
    """A guard after whose first release something else is done at once, as if by another thread."""

    def __init__(self, between):
        self.between = between

    def __enter__(self):
        pass

    def __exit__(self, *_):
        between, self.between = self.between, None
        if between is not None:
            between()


def test_failures_at_the_same_time_are_all_counted(clock, lines):
    gate = make_gate()
    for _ in range(6):
        assert is_open(gate, "192.0.2.1")
        gate._guard = Interrupted(lambda: gate.count("192.0.2.1", "volume"))
        gate.count("192.0.2.1", "volume")
    assert not is_open(gate, "192.0.2.1")  # twelve within a minute
    assert len(lines) == 1


def test_a_block_is_logged_once_and_a_shorter_one_does_not_cut_it(clock, lines):
    gate = make_gate()
    for _ in range(3):
        gate.count("192.0.2.1", "probe")
    for _ in range(30):  # connections that were open when it was blocked
        gate.count("192.0.2.1", "volume")
    assert len(lines) == 1
    clock.now += 3000
    assert not is_open(gate, "192.0.2.1")


def test_a_second_block_after_the_first_has_ended_is_logged_again(clock, lines):
    gate = make_gate()
    for _ in range(2):
        for _ in range(3):
            gate.count("192.0.2.1", "probe")
        assert not is_open(gate, "192.0.2.1")
        clock.now += 4000
        assert is_open(gate, "192.0.2.1")
    assert len(lines) == 2


def test_a_second_block_is_logged_also_when_nobody_connected_in_between(clock, lines):
    gate = make_gate()
    for _ in range(2):
        for _ in range(3):
            gate.count("192.0.2.1", "probe")
        clock.now += 4000
    assert len(lines) == 2


def test_an_address_of_a_trusted_dispatcher_is_never_blocked_and_gets_out_of_a_block(clock, lines):
    gate = make_gate()
    gate.trust("192.0.2.1")
    for _ in range(50):
        gate.count("192.0.2.1", "volume")
        gate.count("192.0.2.1", "probe")
    assert is_open(gate, "192.0.2.1")
    assert lines == []
    for _ in range(3):
        gate.count("192.0.2.2", "probe")
    gate.trust("192.0.2.2")  # a connection from before the block has proved itself
    assert is_open(gate, "192.0.2.2")


def test_disabled_means_no_counting_at_all(clock, lines):
    gate = make_gate(disabled=True)
    for _ in range(100):
        gate.count("192.0.2.1", "volume")
        gate.count("192.0.2.1", "probe")
    assert is_open(gate, "192.0.2.1")
    assert lines == []


def test_all_of_an_ipv6_64_is_one_address_and_its_neighbour_another(clock, lines):
    gate = make_gate()
    for number in range(3):
        gate.count("2001:db8:0:1::%x" % number, "probe")
    assert not is_open(gate, "2001:db8:0:1:ffff::1")
    assert is_open(gate, "2001:db8:0:2::1")
    assert len(lines) == 1


def test_an_address_with_a_zone_is_understood(clock, lines):
    gate = make_gate(["fe80::/10"])
    assert is_open(gate, "fe80::1%eth0")
    for _ in range(3):
        gate.count("fe80::1%eth0", "probe")
    assert not is_open(gate, "fe80::1%eth0")


@pytest.mark.parametrize(
    "allowed, inside, outside",
    (
        (["192.0.2.7"], ["192.0.2.7"], ["192.0.2.6", "192.0.2.70", "2001:db8::1"]),
        (["192.0.2.0/24"], ["192.0.2.0", "192.0.2.255"], ["192.0.3.0", "191.0.2.1"]),
        (["10.0.0.0/9"], ["10.127.255.255"], ["10.128.0.0"]),
        (["192.0.2.8/31"], ["192.0.2.8", "192.0.2.9"], ["192.0.2.10", "192.0.2.7"]),
        (["0.0.0.0/0"], ["8.8.8.8"], ["2001:db8::1"]),
        (["::/0"], ["2001:db8::1"], ["192.0.2.1"]),
        (["2001:db8::/33"], ["2001:db8:7fff::1"], ["2001:db8:8000::1"]),
        (["2001:db8::1"], ["2001:db8::1", "2001:0db8:0::0001"], ["2001:db8::2"]),
        (["192.0.2.1", "2001:db8::/32"], ["192.0.2.1", "2001:db8::9"], ["192.0.2.2", "2001:db9::"]),
        ([], ["192.0.2.1", "2001:db8::1"], []),
    ),
)
def test_allowed_ips_takes_addresses_and_prefixes_of_any_length(lines, allowed, inside, outside):
    gate = make_gate(allowed)
    assert all(is_open(gate, address) for address in inside)
    assert not any(is_open(gate, address) for address in outside)
    assert [fields["PEER"] for action, fields in lines if action == "ip-block"] == outside


def test_an_address_outside_is_logged_once_and_stays_outside_even_when_trusted(lines):
    gate = make_gate(["192.0.2.1"])
    gate.trust("192.0.2.2")
    for _ in range(5):
        assert not is_open(gate, "192.0.2.2")
    assert lines == [("ip-block", {"PEER": "192.0.2.2"})]


def test_the_tables_are_bounded_whatever_comes(clock, lines):
    gate = make_gate(["0.0.0.0/0"], bound=50)
    for number in range(500):
        address = "10.0.%d.%d" % divmod(number, 256)
        gate.admit(address)
        for _ in range(12):
            gate.count(address, "volume")
            gate.count(address, "probe")
        gate.count("10.1.%d.%d" % divmod(number, 256), "volume")
        gate.trust("10.2.%d.%d" % divmod(number, 256))
        gate.admit("2001:db8:%x::1" % number)
    tables = [table for table in vars(gate).values() if isinstance(table, dict)]
    assert tables and all(len(table) <= 50 for table in tables)
    assert not is_open(gate, "10.0.1.243")  # the latest is still blocked


def test_what_one_address_is_remembered_by_is_bounded(clock, lines):
    gate = make_gate()
    for _ in range(10):
        gate.count("192.0.2.1", "volume")
    gate.trust("192.0.2.9")
    for _ in range(1000):
        gate.count("192.0.2.9", "volume")
    tables = [table for table in vars(gate).values() if isinstance(table, dict)]
    entries = [value for table in tables for value in table.values() if isinstance(value, (list, tuple))]
    assert all(len(entry) <= VOLUME.count + 1 for entry in entries)


def test_a_gate_is_safe_under_threads(lines):
    gate = make_gate(bound=20)
    problems = []

    def hammer(seed):
        try:
            for number in range(300):
                address = "10.0.0.%d" % ((number * seed) % 50)
                gate.count(address, "volume")
                gate.admit(address)
                if number % 7 == 0:
                    gate.trust(address)
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=hammer, args=(seed,)) for seed in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []


# --- rates, on a running agent --------------------------------------------------------------------------


def limited(fresh, conf=""):
    """A deployment whose agent counts strangers."""
    deployment = fresh(start=False)
    deployment["solo"].configure(conf)
    deployment["solo"].start()
    return deployment


def probe(host):
    """Speak something that is not TLS, and see it logged."""
    seen = len(host.events("tls-failure"))
    with socket.create_connection(("127.0.0.1", host.port), 20) as sock:
        sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
        wait_until(lambda: len(host.events("tls-failure")) > seen, what="the failure")


def is_turned_away(host):
    """Whether one of a few connections at the same time is closed at once, without a handshake."""
    connections = [socket.create_connection(("127.0.0.1", host.port), 20) for _ in range(4)]
    poller = select.poll()
    for connection in connections:
        poller.register(connection, select.POLLIN)
    answered = poller.poll(1000)
    for connection in connections:
        connection.close()
    return bool(answered)


def test_bad_handshakes_block_the_address_and_a_reload_clears_it(fresh):
    deployment = limited(fresh)
    solo = deployment["solo"]
    for _ in range(2):
        probe(solo)
    assert solo.events("rate-block") == []
    probe(solo)
    wait_until(lambda: solo.events("rate-block"), what="the block")
    assert is_turned_away(solo)
    assert len(solo.events("tls-failure")) == 3
    assert len(solo.events("rate-block")) == 1
    assert "KIND=probe" in solo.events("rate-block")[0] and "PEER=127.0.0.1" in solo.events("rate-block")[0]
    assert "RESULT=ok" in solo.reload()
    assert not is_turned_away(solo)
    wait_until(lambda: deployment.control.json("ping", "solo")[0] == 0, what="the end of the block")


def test_a_dispatcher_behind_a_blocked_address_gets_through_and_is_known_from_then_on(fresh):
    deployment = limited(fresh)
    solo = deployment["solo"]
    for _ in range(3):
        probe(solo)
    wait_until(lambda: solo.events("rate-block"), what="the block")
    assert wait_until(lambda: deployment.control.json("ping", "solo")[0] == 0, what="the one connection")
    for restart in (solo.reload, lambda: (solo.stop(), solo.process.wait(), solo.start())):
        restart()
        for _ in range(3):
            probe(solo)
        assert not is_turned_away(solo) and deployment.control.json("ping", "solo")[0] == 0
    assert len(solo.events("rate-block")) == 1
    known = ctrl_exec.load_addresses(ctrl_exec.addresses_path(solo.config))
    assert list(known) == ["127.0.0.1"]


def test_connections_that_come_to_nothing_block_the_address(fresh):
    deployment = limited(fresh, "rate_limit_volume = 5/60/300\n")
    solo = deployment["solo"]
    for _ in range(8):
        socket.create_connection(("127.0.0.1", solo.port)).close()
    wait_until(lambda: solo.events("rate-block"), what="the block")
    assert "KIND=volume" in solo.events("rate-block")[0]
    assert is_turned_away(solo)
    assert len(solo.events("rate-block")) == 1


def test_the_address_of_a_trusted_dispatcher_is_served_whatever_else_comes_from_there(fresh):
    deployment = limited(fresh, "rate_limit_volume = 5/60/300\n")
    solo, control = deployment["solo"], deployment.control
    # the port was tried a few times while the agent started; now the dispatcher comes
    wait_until(lambda: control.json("ping", "solo")[0] == 0, what="the first ping")
    for _ in range(10):
        probe(solo)
        socket.create_connection(("127.0.0.1", solo.port)).close()
    for _ in range(3):
        assert control.json("ping", "solo")[0] == 0
    assert solo.events("rate-block") == []


def test_many_requests_of_a_trusted_dispatcher_block_nobody(fresh):
    deployment = limited(fresh, "rate_limit_volume = 5/60/300\nrate_limit_probe = 2/60/300\n")
    context = support.dispatcher_context(deployment.control)
    port = deployment["solo"].port
    assert [support.post(port, context, "/ping", {})[0] for _ in range(30)] == [200] * 30
    assert [support.post(port, context, "/nothing", {})[0] for _ in range(10)] == [404] * 10


def test_a_caller_who_is_not_trusted_is_counted(fresh):
    deployment = fresh(start=False)
    solo = deployment["solo"]
    solo.configure("rate_limit_volume = 5/60/300\n")
    solo.put(ctrl_exec.AGENT_VAR + "/ctrl-exec-dispatchers", "")
    solo.start()
    context = support.dispatcher_context(deployment.control)

    def try_once():
        try:
            return support.post(solo.port, context, "/ping", {})[0]
        except OSError:
            return 0

    statuses = [try_once() for _ in range(8)]
    assert statuses[0] == 403 and set(statuses) <= {403, 0}
    wait_until(lambda: solo.events("rate-block"), what="the block")
    assert is_turned_away(solo)
    assert len(solo.events("rate-block")) == 1


def test_allowed_ips_on_a_running_agent(fresh):
    deployment = limited(fresh, "allowed_ips = 192.0.2.0/24 ::1\n")
    solo = deployment["solo"]
    code, answer = deployment.control.json("ping", "solo")
    assert (code, answer["results"][0]["status"]) == (1, "unreachable")
    assert len(solo.events("ip-block")) == 1  # once, though its start was watched by connecting, too
    solo.configure("allowed_ips = 127.0.0.0/8\n")
    assert "RESULT=ok" in solo.reload()
    wait_until(lambda: deployment.control.json("ping", "solo")[0] == 0, what="the new allowlist")
