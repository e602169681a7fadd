"""What less privileged hands have written is not believed: messages of the processes that talk to strangers,
files in directories that others share, and everything an agent answers."""

import json
import os
import socket
import subprocess
import sys

import pytest
import support

import ctrl_exec


def build_rules(tmp_path):
    script = tmp_path / "hello"
    script.write_text("#!/bin/sh\necho hello\n")
    script.chmod(0o755)
    profile = ctrl_exec.build_profiles({})["default"]
    return ctrl_exec.JobRules(
        scripts={"hello": ctrl_exec.Script("hello", str(script), profile, 0, 1)},
        script_dirs=(),
        strict_modes=False,
        store=ctrl_exec.RunStore(str(tmp_path / "state" / "runs"), None, 3600),
        locks_dir=str(tmp_path / "state" / "locks"),
        trusted={"ab1": "control"},
        host="here",
        max_output=1000,
        stdin_timeout=5,
        script_timeout=0,
    )


def tree(path):
    return sorted(os.path.join(top, name) for top, _, names in os.walk(str(path)) for name in names)


def answer_to(rules, job):
    """What a supervisor answers to a front's message: its first line as an object."""
    ours, theirs = socket.socketpair()
    executor, control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, executor:
        with theirs:
            socket.send_fds(executor, [b"job"], [theirs.fileno()])
        ctrl_exec.send_job(ours, job._replace(serial="ab1"))
        ctrl_exec.serve_job(control, rules, {}, lambda request: None, lambda request: None)
        return json.loads(ours.makefile("rb").readline())


# --- the agent's front ----------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", ["zz", "", "RUN", "run\n"])
@pytest.mark.parametrize("reqid", ["/tmp/elsewhere", "../../elsewhere", "plain"])
def test_an_operation_that_is_none_does_nothing(tmp_path, operation, reqid):
    rules = build_rules(tmp_path)
    before = tree(tmp_path)
    event = answer_to(rules, ctrl_exec.JobRequest(operation, reqid, "control", script="hello"))
    assert (event["event"], event["status"]) == ("refused", 400)
    assert [path for path in tree(tmp_path) if path not in before and not path.endswith(".swept")] == []


@pytest.mark.parametrize(
    "change",
    [{"reqid": "../x"}, {"reqid": "a/b"}, {"owner": ".."}, {"owner": "a/b"}, {"script": "../hello"}, {"reqid": ""}],
)
def test_a_name_that_could_be_a_path_is_refused(tmp_path, change):
    rules = build_rules(tmp_path)
    job = ctrl_exec.JobRequest("run", "id-1", "control", script="hello")._replace(**change)
    event = answer_to(rules, job)
    assert (event["event"], event["status"]) == ("refused", 400)
    assert not os.path.exists(rules.store.directory) or tree(rules.store.directory) in ([], [rules.store.directory + "/.swept"])


def test_a_front_cannot_name_a_dispatcher_that_is_not_trusted(tmp_path):
    rules = build_rules(tmp_path)
    event = answer_to(rules, ctrl_exec.JobRequest("run", "id-1", "stranger", script="hello"))
    assert (event["event"], event["code"]) == ("refused", "denied")
    assert not os.path.exists(os.path.join(rules.store.directory, "stranger"))


def test_a_record_of_another_run_is_not_given_out(tmp_path):
    rules = build_rules(tmp_path)
    record = ctrl_exec.RunRecord("other", "control", "hello", "here", "", "", "done", "", 0)
    os.makedirs(os.path.join(rules.store.directory, "control"))
    path = os.path.join(rules.store.directory, "control", "mine.json")
    with open(path, "w", encoding="ascii") as file:
        json.dump(record._asdict(), file)
    with pytest.raises(ctrl_exec.StorageError, match="mine.json"):
        ctrl_exec.find_record(rules.store, "control", "mine")


def test_a_descriptor_that_is_no_socket_is_closed(tmp_path):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, open(str(tmp_path / "file"), "wb") as file:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(5):
            socket.send_fds(ours, [b"job"], [file.fileno()])
            with pytest.raises(OSError):
                ctrl_exec.receive_socket(theirs)
        assert len(os.listdir("/proc/self/fd")) == before


def test_what_comes_over_a_control_socket_is_not_inherited():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        socket.send_fds(ours, [b"job"], [ours.fileno()])
        word, passed = ctrl_exec.receive_socket(theirs)
        with passed:
            assert word == b"job" and not os.get_inheritable(passed.fileno())


def test_nobody_else_can_hold_the_lock_of_the_agent(deployment):
    path = deployment["alpha"].file(ctrl_exec.AGENT_VAR + "/agent.lock")
    assert os.stat(path).st_mode & 0o777 == 0o600


# --- the pairing queue ----------------------------------------------------------------------------------


def sound_request():
    openssl = ctrl_exec.OpenSSL()
    with ctrl_exec._WorkDirectory() as work:
        key = work.put("key", openssl.new_key("ec"))
        csr = openssl.new_request(key, "web-1")
    nonce = "ab" * 32
    return ctrl_exec.PairingRequest(
        "id-1", "web-1", csr, nonce, 7443, "", "ip", "1.0", "127.0.0.1", nonce, nonce, received=1.5
    )


def test_a_sound_request_is_read_as_it_was_written():
    request = sound_request()
    assert ctrl_exec.parse_pairing_request(request._asdict()) == request


@pytest.mark.parametrize(
    "change",
    [
        {"reqid": 7}, {"reqid": "../x"}, {"hostname": "../x"}, {"hostname": "\ud800"}, {"csr": "x"}, {"csr": 5},
        {"agent_nonce": "zz"}, {"dispatcher_nonce": ""}, {"nonce": "x"}, {"port": "7443"}, {"port": 70000},
        {"ip": "\x1b[2J"}, {"peer": "\x1b[2J"}, {"received": "x"}, {"desk": "../../x"}, {"status": "done"},
        {"token_id": 5}, {"token_id": "../x"}, {"token_proof": "x"}, {"legacy": "yes"}, {"lookup_by": "magic"},
        {"unknown": 1},
    ],
)  # fmt: skip
def test_a_request_with_a_field_of_another_form_is_none(change):
    with pytest.raises(ctrl_exec.BadRequest):
        ctrl_exec.parse_pairing_request(dict(sound_request()._asdict(), **change))


def test_a_planted_file_in_the_queue_removes_nothing_elsewhere(fresh):
    control = fresh("one", start=False).control
    precious = control.put("/etc/precious.json", "{}")
    for name, reqid in (("x", precious[: -len(".json")]), ("y", "../../../../etc/precious"), ("z", "other")):
        values = dict(sound_request()._asdict(), reqid=reqid, desk="gone")
        control.put(ctrl_exec.VAR + "/pairing/%s.json" % name, json.dumps(values))
    for _ in range(2):
        done = control.run("list-requests")
        assert done.returncode == 0
        assert all("/%s.json" % name in done.err for name in "xyz")
    assert os.path.exists(precious)


# --- files that others could change ---------------------------------------------------------------------


def test_a_hook_in_a_directory_that_everybody_can_write_is_a_no(tmp_path):
    place = tmp_path / "open"
    place.mkdir()
    hook = place / "hook"
    hook.write_text("#!/bin/sh\nexit 0\n")
    hook.chmod(0o755)
    place.chmod(0o777)
    with pytest.raises(ctrl_exec.Denied, match="writable by everybody"):
        ctrl_exec.Hook(str(hook), 5).decide(ctrl_exec.HookContext("run", "id-1"))
    place.chmod(0o755)
    ctrl_exec.Hook(str(hook), 5).decide(ctrl_exec.HookContext("run", "id-1"))


def test_a_sidecar_that_others_could_point_elsewhere_is_left_out(tmp_path):
    secret = tmp_path / "secret.json"
    secret.write_text('{"secret": 1}')
    place = tmp_path / "open"
    place.mkdir()
    place.chmod(0o777)
    (place / "script.schema.json").symlink_to(secret)
    with pytest.raises(ValueError, match="writable by everybody"):
        ctrl_exec.load_sidecar(str(place / "script"))


# --- what a hostile agent answers -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b'{"x":' + b"[]," * 10 + b"1}",
        b'{"x":"' + b"[" * 1000 + b'"}',
        b'{"x":"' + b'\\"[' * 1000 + b'"}',
        b'{"x":"' + b"\\\\" * 1001 + b'","y":[' + b"[]," * 40 + b"1]}",
    ],
)
def test_brackets_inside_strings_and_beside_each_other_are_not_depth(data):
    ctrl_exec.check_json_structure(data)


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 100,
        b'{"x":"\\\\",' + b'"y":[' * 40,
        b'{"a":' * 33,
        b"[" + b"[]," * (2 * ctrl_exec.MAX_BODY),
        b"[" * 33 + b'"",' * ctrl_exec.MAX_BODY,
    ],
    ids=["deep", "after an escaped backslash", "objects", "wide", "strings"],
)
def test_depth_and_masses_of_values_are_refused_before_they_are_parsed(data):
    with pytest.raises(ctrl_exec.BadRequest):
        ctrl_exec.check_json_structure(data)


@pytest.mark.parametrize("escape", ["\\n", '\\"', "\\\\"], ids=["newlines", "quotes", "backslashes"])
def test_the_look_at_depth_takes_a_few_times_the_memory_of_the_data_at_most(escape):
    code = (
        "import resource, sys; sys.path.insert(0, sys.argv[1]); import ctrl_exec\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "data = b'{\"x\":\"' + b'[' * 40 + sys.argv[2].encode() * (5 << 20) + b'\"}'\n"
        "before = peak(); ctrl_exec.check_json_structure(data); print((peak() - before) / len(data))"
    )
    words = [sys.executable, "-I", "-c", code, os.path.dirname(support.PROGRAM), escape]
    done = subprocess.run(words, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 6


def test_the_service_manager_hears_the_state(tmp_path, monkeypatch):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(60)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        ctrl_exec.tell_systemd("READY=1")
        assert manager.recv(100) == b"READY=1"


def test_work_that_fails_is_an_error_and_not_a_wait_for_ever():
    def work(agent):
        raise ValueError("a bug for %s" % agent)

    with pytest.raises(ValueError, match="a bug"):
        list(ctrl_exec.fan_out(["a", "b", "c"], work, 2))


# --- output that cannot be written ----------------------------------------------------------------------


@pytest.mark.parametrize("options", [["-IS"], ["-ISu"]], ids=["buffered", "unbuffered"])
def test_output_that_stops_half_way_is_reported(deployment, tmp_path, options):
    big = deployment["alpha"]
    name = "noise" + options[0]
    big.script(name, "head -c 3000000 /dev/zero | tr '\\0' x\n")
    assert "RESULT=ok" in big.reload()
    words = [sys.executable, *options, deployment.control.path, "--root", deployment.control.root]
    quoted = " ".join(words + ["run", "alpha", name])
    done = subprocess.run(
        ["/bin/sh", "-c", "trap '' XFSZ; ulimit -f 100; %s > %s/out" % (quoted, tmp_path)],
        env=deployment.control.environment(), capture_output=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == ctrl_exec.EXIT_OUTPUT
    assert b"cannot write the output" in done.stderr and b"internal error" not in done.stderr


def test_closed_standard_output_is_an_output_error(deployment):
    words = [*deployment.control.argv("ping", "alpha")]
    done = subprocess.run(
        ["/bin/sh", "-c", " ".join(words) + " >&-"],
        env=deployment.control.environment(), capture_output=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == ctrl_exec.EXIT_OUTPUT and b"internal error" not in done.stderr


def test_hosts_can_come_from_a_pipe(deployment):
    done = subprocess.run(
        ["/bin/bash", "-c", "%s -f <(echo alpha)" % " ".join(deployment.control.argv("ping"))],
        env=deployment.control.environment(), capture_output=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0 and b"alpha" in done.stdout


def test_a_reload_is_announced_when_only_the_new_bundle_serves(fresh):
    solo = fresh("solo")["solo"]
    context = support.dispatcher_context(support.Control(solo.root + "/../control", set_up=False))
    for number in range(10):
        solo.script("step-%d" % number, "echo %d\n" % number)
        assert "RESULT=ok" in solo.reload()
        body = {"script": "step-%d" % number, "reqid": "step-%d" % number}
        assert support.post(solo.port, context, "/run", body)[1]["stdout"] == "%d\n" % number
