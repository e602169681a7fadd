"""The daemon on a managed host: start, reload, the death of its parts, its checks of itself, its answers."""

import http.client
import getpass
import json
import os
import signal
import socket
import threading

import pytest

import ctrl_exec
import support
from support import IS_ROOT, wait_until

needs_root = pytest.mark.skipif(not IS_ROOT, reason="only root can change to another user")


def ask(control, host, script, *args, **fields):
    """(status, answer) of one POST /run."""
    body = dict({"script": script, "args": list(args), "reqid": ctrl_exec.new_id()}, **fields)
    return support.post(host.port, support.dispatcher_context(control), "/run", body)


def ping(control, host):
    return support.post(host.port, support.dispatcher_context(control), "/ping", {"reqid": "p"})


def get(control, host, path):
    return support.post(host.port, support.dispatcher_context(control), path, b"", method="GET")


def descriptors(pid):
    """What a process has open, as the names of its descriptors."""
    names = []
    for number in os.listdir("/proc/%d/fd" % pid):
        try:
            names.append(os.readlink("/proc/%d/fd/%s" % (pid, number)))
        except FileNotFoundError:
            pass
    return names


def is_done(host, reqid):
    try:
        return host.record(reqid)["status"] == "done"
    except FileNotFoundError:
        return False


def has_pid(host, reqid):
    try:
        return host.record(reqid)["pid"]
    except FileNotFoundError:
        return 0


GATE = 'while [ ! -e "$1" ]; do sleep 0.02; done\necho through\n'


def hold(control, host, gate):
    """Start the gated script in a thread: (thread, list that gets its (status, answer), request id)."""
    reqid, answers = ctrl_exec.new_id(), []

    def work():
        try:
            answers.append(ask(control, host, "gate", str(gate), reqid=reqid))
        except OSError as error:
            answers.append((0, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    wait_until(lambda: has_pid(host, reqid), what="the run's process")
    return thread, answers, reqid


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """An agent that the tests here may reload."""
    with support.Deployment(tmp_path_factory.mktemp("agent"), ("solo",)) as one:
        one["solo"].script("gate", GATE)
        assert "RESULT=ok" in one["solo"].reload()
        yield one


@pytest.fixture
def host(site):
    """The agent of `site`, with its files as they were afterwards."""
    solo = site["solo"]
    paths = [solo.file(ctrl_exec.AGENT_ETC + "/" + name) for name in ("agent.conf", "scripts.conf")]
    paths.append(solo.config.trusted_dispatchers_path)
    kept = []
    for path in paths:
        with open(path, "rb") as file:
            kept.append(file.read())
    yield solo
    for path, data in zip(paths, kept):
        with open(path, "wb") as file:
            file.write(data)
    if os.path.exists(solo.config.revoked_serials):
        os.unlink(solo.config.revoked_serials)
    assert "RESULT=ok" in solo.reload()


# --- start ----------------------------------------------------------------------------------------------


def test_an_agent_that_is_not_paired_refuses_to_start_and_says_what_to_do(tmp_path):
    done = support.Host(tmp_path / "h", "h").run("serve")
    assert done.returncode == 78
    assert "not paired" in done.err and "request-pairing" in done.err


@pytest.mark.parametrize(
    "conf, words",
    [
        ("max_output = lots\n", ":3: `max_output` expects a size"),
        ("port = 7443\n", ":3: `port` was set before, at line 1"),
        ("nonsense\n", ":3: expected `key = value`"),
        ("[profile web]\nnices = 3\n", ":4: unknown key `nices`; did you mean nice?"),
        ("[other]\n", ":3: unknown section [other]"),
    ],
)
def test_a_broken_configuration_is_exit_78_with_file_and_line(tmp_path, conf, words):
    host = support.Host(tmp_path / "h", "h")
    host.configure(conf)
    done = host.run("serve")
    assert done.returncode == 78
    assert host.file(ctrl_exec.AGENT_ETC + "/agent.conf") + words in done.err
    assert len(done.err.strip().splitlines()) <= 2


def test_an_agent_with_a_broken_allowlist_does_not_start(fresh):
    host = fresh("solo", start=False)["solo"]
    host.allow("a = relative\n")
    done = host.run("serve")
    assert done.returncode == 78 and "scripts.conf:1: expected an absolute path" in done.err


def test_an_agent_with_a_broken_trust_map_or_identity_does_not_start(fresh):
    host = fresh("solo", start=False)["solo"]
    with open(host.config.trusted_dispatchers_path, "a", encoding="ascii") as file:
        file.write("not-a-serial control\n")
    done = host.run("serve")
    assert done.returncode == 78 and host.config.trusted_dispatchers_path in done.err
    with open(host.config.trusted_dispatchers_path, "w", encoding="ascii"):
        pass
    os.chmod(host.config.key, 0o644)
    done = host.run("serve")
    assert done.returncode == 78 and host.config.key in done.err


def test_a_second_agent_on_the_same_state_directory_refuses_to_start(deployment):
    done = deployment["alpha"].run("serve")
    assert done.returncode == 78 and "serves from" in done.err
    assert ping(deployment.control, deployment["alpha"])[0] == 200


# --- answers --------------------------------------------------------------------------------------------


def test_ping_answers_who_it_is_and_until_when(deployment):
    status, answer = support.post(
        deployment["alpha"].port, support.dispatcher_context(deployment.control), "/ping", {"reqid": "abc"}
    )
    info = ctrl_exec.read_certificate(deployment["alpha"].config.cert)
    assert abs(ctrl_exec.parse_iso_time(answer.pop("time")) - ctrl_exec.now()) < 60
    assert (status, answer) == (200, {
        "status": "ok", "host": "alpha", "version": ctrl_exec.__version__, "staged": False, "reqid": "abc",
        "expiry": ctrl_exec.iso_time(info.not_after),
    })  # fmt: skip


def test_capabilities_lists_the_allowlist_and_the_tags(site, host):
    path = host.script("described", "echo x\n", "profile=web")
    host.script("broken", "echo x\n", mode=0o644)
    with open(path + ".schema.json", "w", encoding="ascii") as file:
        file.write('{"version": "3", "args": []}')
    host.configure("rate_limit_disable = yes\n[tags]\nsite = south\nrole = a b\n[profile web]\nnice = 1\n")
    assert "RESULT=ok" in host.reload()
    status, answer = get(site.control, host, "/capabilities")
    assert status == 200
    scripts = {entry["name"]: entry for entry in answer.pop("scripts")}
    assert answer == {
        "status": "ok", "host": "solo", "version": ctrl_exec.__version__,
        "tags": {"site": "south", "role": "a b"},
    }  # fmt: skip
    assert set(scripts) == {*support.STANDARD_SCRIPTS, "gate", "described", "broken"}
    assert scripts["described"] == {
        "name": "described", "path": path, "executable": True, "profile": "web", "user": getpass.getuser(),
        "schema": {"version": "3", "args": []}, "schema_version": "3",
    }  # fmt: skip
    assert scripts["broken"]["executable"] is False and "schema" not in scripts["broken"]
    assert set(scripts["hello"]) == {"name", "path", "executable", "profile", "user"}


def test_a_run_answers_with_the_documented_fields(deployment):
    reqid = ctrl_exec.new_id()
    status, answer = ask(deployment.control, deployment["alpha"], "hello", reqid=reqid)
    assert status == 200
    assert answer.pop("started") <= answer.pop("finished")
    assert answer == {
        "script": "hello", "exit": 0, "stdout": "hello\n", "stderr": "", "reqid": reqid, "host": "alpha",
        "owner": "control", "status": "done",
    }  # fmt: skip


def test_a_script_that_is_not_listed_is_not_permitted_and_logged(deployment):
    reqid = ctrl_exec.new_id()
    status, answer = ask(deployment.control, deployment["alpha"], "reboot", reqid=reqid)
    assert (status, answer["exit"], answer["error"]) == (200, -1, "script not permitted")
    assert [line for line in deployment["alpha"].events("deny") if "REQID=" + reqid in line]


@pytest.mark.parametrize(
    "name",
    [
        "../x", "a/b", "/bin/sh", "a b", "hello\n", "\nhello", "", ".", "..", "hello.sh", "a;b", "$(id)",
        "h\u00e9llo", "hello\u0663", "%2e%2e", "-\u2010", "x" * 129, "x" * 10240,
    ],
    ids=range(18),
)  # fmt: skip
def test_a_malformed_script_name_is_refused(deployment, name):
    status, answer = ask(deployment.control, deployment["alpha"], name)
    assert (status, answer["field"]) == (400, "script")


@pytest.mark.parametrize("name", [b'"hello\\u0000"', b'"\\ud800"', b"7", b"null", b'["hello"]', b"{}"])
def test_a_script_name_that_is_no_proper_string_is_refused(deployment, name):
    body = b'{"reqid":"r1","script":%s}' % name
    context = support.dispatcher_context(deployment.control)
    status, answer = support.post(deployment["alpha"].port, context, "/run", body)
    assert (status, answer["field"]) == (400, "script")


@pytest.mark.parametrize("missing", ["script", "reqid"])
def test_a_missing_field_is_named(deployment, missing):
    body = {"script": "hello", "reqid": "r1"}
    del body[missing]
    context = support.dispatcher_context(deployment.control)
    status, answer = support.post(deployment["alpha"].port, context, "/run", body)
    assert (status, answer["field"]) == (400, missing) and missing in answer["error"]


BAD_QUESTIONS = [
    ("GET", "/result/none", b"", 404, "unknown"),
    ("GET", "/result/no%20id", b"", 404, "no such path"),
    ("GET", "/result/" + "x" * 65, b"", 404, "no such path"),
    ("GET", "/result/..", b"", 404, "no such path"),
    ("GET", "/result/none?wait=-1", b"", 400, "wait"),
    ("GET", "/result/none?wait=301", b"", 400, "wait"),
    ("GET", "/result/none?wait=1&wait=2", b"", 400, "twice"),
    ("GET", "/result/none?wait=%D9%A5", b"", 400, "wait"),
    ("GET", "/follow/none", b"", 404, "unknown"),
    ("GET", "/follow/none?from=then", b"", 400, "from"),
    ("GET", "/follow/none?stdout=-1", b"", 400, "stdout"),
    ("GET", "/follow/none?stderr=99999999999", b"", 400, "stderr"),
    ("POST", "/result/none", {}, 405, "method"),
    ("GET", "/cancel", b"", 405, "method"),
    ("POST", "/cancel", {}, 400, "reqid"),
    ("POST", "/cancel", {"reqid": "../x"}, 400, "reqid"),
    ("POST", "/cancel", {"reqid": ["a"]}, 400, "reqid"),
    ("POST", "/cancel", {"reqid": "none"}, 404, "unknown"),
    ("POST", "/cancel", {"reqid": "a", "username": 5}, 400, "username"),
]


@pytest.mark.parametrize("method, path, body, wanted, words", BAD_QUESTIONS)
def test_a_bad_question_about_a_run_is_refused_with_the_reason(site, host, method, path, body, wanted, words):
    status, answer = support.post(host.port, support.dispatcher_context(site.control), path, body, method)
    assert status == wanted, answer
    assert words in json.dumps(answer), answer
    assert ping(site.control, host)[0] == 200


def test_a_stream_ends_with_the_connection_for_a_client_of_http_1_0(site, host):
    body = json.dumps({"script": "hello", "args": [], "reqid": ctrl_exec.new_id(), "stream": True}).encode()
    head = b"POST /run HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % len(body)
    context = support.dispatcher_context(site.control)
    with support.tls_connect(host.port, context) as tls:
        tls.sendall(head + body)
        data = b""
        while True:
            piece = tls.recv(65536)
            if not piece:
                break
            data += piece
    head, _, answer = data.partition(b"\r\n\r\n")
    assert b"chunked" not in head.lower()
    beat, *events = [json.loads(line) for line in answer.splitlines()]
    assert (beat, [event["event"] for event in events]) == ({"event": "beat"}, ["output", "end"])
    assert (events[0]["data"], events[1]["exit"]) == ("hello\n", 0)


def test_thirty_different_runs_at_once_are_all_accounted_for(site, host):
    names = ["many%d" % number for number in range(30)]
    for name in names:
        host.script(name, 'sleep 0.2\necho "%s $1"\n' % name)
    assert "RESULT=ok" in host.reload()
    answers = {}

    def work(name):
        answers[name] = ask(site.control, host, name, "arg-" + name, reqid="at-once-" + name)

    threads = [threading.Thread(target=work, args=(name,), daemon=True) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(answers) == sorted(names)
    for name, (status, answer) in answers.items():
        assert (status, answer["exit"], answer["stdout"]) == (200, 0, "%s arg-%s\n" % (name, name))
        assert is_done(host, "at-once-" + name)


def test_two_hundred_runs_leave_no_process_descriptor_or_thread(site, host):
    context = support.dispatcher_context(site.control)
    front = host.front()

    def sizes():
        return (
            len(descriptors(front)), len(descriptors(host.process.pid)), len(host.children()),
            len(os.listdir("/proc/%d/task" % front)),
        )  # fmt: skip

    reqid = ctrl_exec.new_id()
    ask(site.control, host, "hello", reqid=reqid)
    supervisor = host.record(reqid)["supervisor"]

    def quiet():  # the front and who waits for the next request, not who served the last one
        children = host.children()
        return len(children) == 2 and supervisor not in children and sizes()[3] == 1 and sizes()

    before = wait_until(quiet, what="quiet")
    connection = http.client.HTTPSConnection("127.0.0.1", host.port, context=context, timeout=60)
    for number in range(200):
        body = json.dumps({"script": "hello", "reqid": "soak-%d-%s" % (number, ctrl_exec.new_id())})
        connection.request("POST", "/run", body)
        answer = json.loads(connection.getresponse().read())
        assert answer.get("exit") == 0, answer
    connection.close()
    wait_until(lambda: sizes() == before, what="everything as before 200 runs")
    assert host.front() == front


# --- reload ---------------------------------------------------------------------------------------------


def test_a_reload_swaps_the_allowlist_at_once(site, host):
    assert ask(site.control, host, "later")[1]["error"] == "script not permitted"
    host.script("later", "echo later\n")
    assert ask(site.control, host, "later")[1]["error"] == "script not permitted"
    assert "RESULT=ok" in host.reload()
    assert ask(site.control, host, "later")[1]["stdout"] == "later\n"
    host.allow("")
    assert "RESULT=ok" in host.reload()
    assert ask(site.control, host, "later")[1]["error"] == "script not permitted"


def test_a_reload_swaps_profiles_and_limits_at_once(site, host):
    host.script("files", "ulimit -n\n", "profile=p")
    for files in (33, 44):
        host.configure("rate_limit_disable = yes\n[profile p]\nopen_files = %d\n" % files)
        assert "RESULT=ok" in host.reload()
        assert ask(site.control, host, "files")[1]["stdout"] == "%d\n" % files


def test_a_reload_swaps_the_trust_map_at_once(site, host):
    path = host.config.trusted_dispatchers_path
    with open(path, encoding="ascii") as file:
        text = file.read()
    with open(path, "w", encoding="ascii") as file:
        file.write("dead control\n")
    assert "RESULT=ok" in host.reload()
    assert ping(site.control, host) == (403, {"error": "serial mismatch", "status": "forbidden"})
    assert ask(site.control, host, "hello")[0] == 403
    with open(path, "w", encoding="ascii") as file:
        file.write(text.replace(" control", " renamed"))
    assert "RESULT=ok" in host.reload()
    reqid = ctrl_exec.new_id()
    assert ask(site.control, host, "hello", reqid=reqid)[1]["exit"] == 0
    assert host.record(reqid, "renamed")["owner"] == "renamed"


def test_a_reload_swaps_revocations_at_once_even_on_an_open_connection(site, host):
    context = support.dispatcher_context(site.control)
    connection = http.client.HTTPSConnection("127.0.0.1", host.port, context=context, timeout=30)
    connection.request("POST", "/ping", b"{}")
    assert json.loads(connection.getresponse().read())["status"] == "ok"
    with open(host.config.revoked_serials, "w", encoding="ascii") as file:
        file.write(site.control.serial() + "\n")
    assert "RESULT=ok" in host.reload()
    assert ping(site.control, host) == (403, {"error": "certificate revoked", "status": "forbidden"})
    host.front()
    connection.auto_open = 0
    try:
        connection.request("POST", "/ping", b"{}")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException):
        status = "closed"
    assert status in (403, "closed")
    connection.close()
    assert host.events("revoked-cert")


def test_a_reload_ends_a_front_that_goes_on_with_the_old_bundle(fresh):
    deployment = fresh("solo")
    host = deployment["solo"]
    old = host.front()
    os.kill(old, signal.SIGSTOP)  # it accepts again as soon as it can
    assert "RESULT=ok" in host.reload()
    wait_until(lambda: ctrl_exec.find_process(old) is None, what="the end of the old front")
    assert [line for line in host.events("bug") if "did not stop accepting" in line]
    assert ping(deployment.control, host)[0] == 200


def test_a_signal_that_comes_while_the_agent_starts_is_acted_on_and_ends_nothing(fresh):
    deployment = fresh("solo", start=False)
    host = deployment["solo"]
    host.start(wait=False)
    pid = wait_until(lambda: ctrl_exec.find_serving(ctrl_exec.agent_lock_path(host.config)), what="the agent's number in its lock").pid
    os.kill(pid, signal.SIGHUP)
    wait_until(lambda: host.events("reload"), what="the reload")
    assert pid == host.process.pid and host.process.poll() is None
    assert ping(deployment.control, host)[0] == 200


def is_free(port):
    try:
        socket.create_server(("127.0.0.1", port)).close()
        return True
    except OSError:
        return False


def test_a_reload_swaps_the_port_and_frees_the_old_one(site, host):
    old, host.port = host.port, support.free_port()
    try:
        host.configure("rate_limit_disable = yes\n")
        assert "RESULT=ok" in host.reload()
        assert ping(site.control, host)[0] == 200
        host.front()
        wait_until(lambda: is_free(old), what="the end of who was forked before the reload")
    finally:
        host.port = old


def test_no_request_is_lost_while_the_agent_reloads_five_times(site, host):
    stop, outcomes = threading.Event(), []

    def hammer():
        while not stop.is_set():
            try:
                outcomes.append(ping(site.control, host)[0])
            except Exception as error:
                outcomes.append(repr(error))

    threads = [threading.Thread(target=hammer, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        seen = len(outcomes)
        assert "RESULT=ok" in host.reload()
        wait_until(lambda: len(outcomes) >= seen + 6, what="pings after the reload")
    stop.set()
    for thread in threads:
        thread.join(30)
    assert set(outcomes) == {200}
    host.front()


@pytest.mark.parametrize("broken", ["agent.conf", "scripts.conf", "trust"])
def test_a_broken_reload_keeps_the_old_configuration_and_says_so(site, host, broken):
    paths = {
        "agent.conf": host.file(ctrl_exec.AGENT_ETC + "/agent.conf"),
        "scripts.conf": host.file(ctrl_exec.AGENT_ETC + "/scripts.conf"),
        "trust": host.config.trusted_dispatchers_path,
    }
    with open(paths[broken], "a", encoding="ascii") as file:
        file.write("what is this\n")
    line = host.reload()
    assert "kept the old configuration" in line and paths[broken] in line
    assert ask(site.control, host, "hello")[1]["stdout"] == "hello\n"
    assert ping(site.control, host)[0] == 200


def test_a_run_that_is_under_way_survives_a_reload_and_is_answered(site, host, tmp_path):
    gate = tmp_path / "gate"
    thread, answers, _ = hold(site.control, host, gate)
    host.allow("")
    assert "RESULT=ok" in host.reload()
    assert ask(site.control, host, "gate", str(gate))[1]["error"] == "script not permitted"
    gate.touch()
    thread.join(60)
    assert answers[0][0] == 200 and answers[0][1]["stdout"] == "through\n"


# --- the two processes ----------------------------------------------------------------------------------


@needs_root
def test_the_front_is_not_root_and_cannot_become_it_again(site, host):
    assert site.control.json("ping", host.name)[0] == 0  # it has gone through its start
    with open("/proc/%d/status" % host.front(), encoding="ascii") as file:
        status = dict(line.rstrip("\n").split(":\t", 1) for line in file)
    ids = status["Uid"].split() + status["Gid"].split() + status["Groups"].split()
    assert "0" not in ids and len(set(status["Uid"].split())) == 1
    assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0


def test_the_front_holds_no_lock_and_no_key(site, host):
    assert ping(site.control, host)[0] == 200  # it has gone through its start
    front = host.front()
    try:
        names = descriptors(front)
    except PermissionError:
        pytest.fail("the descriptors of the front cannot be read")
    for name in names:
        assert "agent.lock" not in name and not name.endswith((".key", ".crt", ".conf"))


def test_a_front_that_is_killed_is_replaced_and_no_run_notices(site, host, tmp_path):
    gate = tmp_path / "gate"
    _, _, reqid = hold(site.control, host, gate)
    front = host.front()
    os.kill(front, signal.SIGKILL)
    host.front(other_than=front)
    wait_until(host.is_up, what="the port")
    assert ping(site.control, host)[0] == 200
    assert ask(site.control, host, "hello")[1]["exit"] == 0
    gate.touch()
    wait_until(lambda: is_done(host, reqid), what="the record's end")
    assert ask(site.control, host, "gate", str(gate), reqid=reqid)[1]["stdout"] == "through\n"


def test_when_the_executor_is_killed_the_front_goes_and_a_new_agent_can_start(fresh):
    deployment = fresh("solo")
    solo = deployment["solo"]
    front = solo.front()
    solo.process.kill()
    solo.process.wait()
    wait_until(lambda: not os.path.exists("/proc/%d" % front), what="the front's end")
    wait_until(lambda: not solo.is_up(), what="the end of who was only just forked")
    solo.process.stdout.close()
    solo.start()
    assert ask(deployment.control, solo, "hello")[1]["stdout"] == "hello\n"


def test_sigterm_exits_zero_frees_the_port_and_leaves_jobs_running(fresh, tmp_path):
    deployment = fresh("solo", start=False)
    solo, gate = deployment["solo"], tmp_path / "gate"
    solo.script("gate", GATE)
    solo.start()
    # a caller that goes away, so that there is nothing left to answer
    reqid = ctrl_exec.new_id()
    body = json.dumps({"script": "gate", "args": [str(gate)], "reqid": reqid}).encode()
    with support.tls_connect(solo.port, support.dispatcher_context(deployment.control)) as sock:
        head = b"POST /run HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
        sock.sendall(head + body)
        pid = wait_until(lambda: has_pid(solo, reqid), what="the run's process")
    assert solo.stop() == 0
    assert solo.events("stop")
    wait_until(lambda: not solo.is_up(), what="the end of who was only just forked")
    assert os.path.exists("/proc/%d" % pid) and not is_done(solo, reqid)
    gate.touch()
    wait_until(lambda: is_done(solo, reqid), what="the record's end")
    assert solo.record(reqid)["exit"] == 0


def test_sigterm_lets_what_is_being_answered_end(fresh, tmp_path):
    deployment = fresh("solo", start=False)
    solo, gate = deployment["solo"], tmp_path / "gate"
    solo.script("gate", GATE)
    solo.start()
    thread, answers, _ = hold(deployment.control, solo, gate)
    solo.process.send_signal(signal.SIGTERM)
    wait_until(lambda: not solo.is_up(), what="the port's end")
    gate.touch()
    thread.join(60)
    assert answers and answers[0][0] == 200 and answers[0][1]["stdout"] == "through\n"
    assert solo.stop() == 0


# --- checks of itself -----------------------------------------------------------------------------------


def test_self_check_of_a_sound_host_passes(site, host):
    done = host.run("self-check", "--json")
    assert done.returncode == 0, done.out
    assert "FAIL" not in done.out
    assert "script hello" in done.out and "identity" in done.out


def test_self_check_names_everything_that_is_wrong_and_fails(site, host):
    host.script("gone", "echo x\n")
    os.unlink(host.file("/scripts/gone"))
    host.script("not-executable", "echo x\n", mode=0o644)
    host.script("open-to-all", "echo x\n", mode=0o777)
    host.script("capable", "echo x\n", "profile=capable")
    host.configure("rate_limit_disable = yes\nprot = 7\n[profile capable]\ncaps = cap_kill\n")
    done = host.run("self-check")
    assert done.returncode == 1
    lines = done.out.splitlines()

    def line_of(word):
        found = [line for line in lines if word in line]
        assert found, done.out
        return found[0]

    assert "FAIL" in line_of("script gone") and "No such file" in line_of("script gone")
    assert "FAIL" in line_of("script not-executable") and "not executable" in line_of("script not-executable")
    assert "FAIL" in line_of("script open-to-all") and "writable" in line_of("script open-to-all")
    assert "FAIL" in line_of("script capable") and "`caps`" in line_of("script capable")
    assert "WARN" in line_of("did you mean port")
    assert "OK" in line_of("script hello")


def test_self_check_of_a_host_that_is_not_paired_fails(tmp_path):
    done = support.Host(tmp_path / "h", "h").run("self-check")
    assert done.returncode == 1 and "FAIL" in done.out
    assert "no dispatcher is trusted" in done.out or "trust map" in done.out


def test_self_check_of_a_broken_configuration_is_exit_78(tmp_path):
    host = support.Host(tmp_path / "h", "h")
    host.configure("max_output = lots\n")
    done = host.run("self-check")
    assert done.returncode == 78 and ":3: `max_output`" in done.err


def test_self_ping_works_again_and_again_under_rate_limits(fresh):
    deployment = fresh("solo", start=False)
    solo = deployment["solo"]
    solo.configure("")
    solo.start()
    for _ in range(20):
        done = solo.run("self-ping")
        assert done.returncode == 0, done.err
    assert solo.events("rate-block") == [] and solo.events("tls-failure") == []
    assert ping(deployment.control, solo)[0] == 200


def test_self_ping_fails_clearly_when_the_agent_is_down(fresh):
    solo = fresh("solo", start=False)["solo"]
    done = solo.run("self-ping")
    assert done.returncode == 1
    assert "port %d" % solo.port in done.err and "refused" in done.err
    assert "is the agent running?" in done.err


def test_self_ping_of_a_host_that_is_not_paired_says_how_to_pair_it(fresh):
    solo = fresh("solo", start=False)["solo"]
    os.unlink(solo.config.cert)
    for verb in ("self-ping", "serve"):
        done = solo.run(verb)
        assert done.returncode == 78 and done.out == ""
        assert "this host is not paired" in done.err and "cea request-pairing --dispatcher" in done.err


def test_self_ping_fails_clearly_when_something_else_has_the_port(fresh):
    solo = fresh("solo", start=False)["solo"]
    with socket.create_server(("127.0.0.1", solo.port)) as server:
        done_at = threading.Thread(target=lambda: server.accept()[0].close(), daemon=True)
        done_at.start()
        done = solo.run("self-ping")
        done_at.join(60)
    assert done.returncode == 1 and "port %d" % solo.port in done.err


def test_self_ping_tells_a_certificate_that_is_not_the_one_on_disk(fresh):
    deployment = fresh("solo")
    solo = deployment["solo"]
    deployment.control.register(solo)  # a new certificate on disk, not yet loaded
    done = solo.run("self-ping")
    assert done.returncode == 1 and "is on disk" in done.err
    assert "RESULT=ok" in solo.reload()
    assert solo.run("self-ping").returncode == 0


def test_nothing_of_all_this_was_a_bug_to_the_agent(site):
    lines = [line for line in site["solo"].events("bug") if "the front ended with status 9;" not in line]
    assert lines == []
