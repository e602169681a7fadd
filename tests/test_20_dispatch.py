"""Work on many hosts: every selected host ends in exactly one state, whatever the others do."""

import json
import os
import shutil
import socket
import ssl
import threading

import peers
import pytest
from support import Control, free_port, wait_until

import ctrl_exec

GOOD_RUN = {"script": "hello", "exit": 0, "stdout": "hi\n", "stderr": ""}
GOOD_PING = {"status": "ok", "host": "x", "version": "1", "expiry": "2099-01-01T00:00:00Z"}


def http(status, body):
    """One HTTP answer with this body, an object or bytes."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = (
        "HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: %d\r\nConnection: close\r\n\r\n"
    )
    return (head % (status, len(data))).encode() + data


class FakeAgent:
    """Answers with a host's certificate, and says whatever a test wants: `answer(request)` gives bytes.

    No bytes: it closes the connection without a word.
    """

    def __init__(self, host, answer):
        identity = ctrl_exec.agent_identity(host.config)
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(identity.cert, identity.key)
        self._answer = answer
        self.requests = []
        self._listener = peers.Listener(self._serve)
        self.port = self._listener.port

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._listener.close()

    def _serve(self, raw):
        try:
            with self._context.wrap_socket(raw, server_side=True) as tls:
                request = self._read(tls)
                self.requests.append(request)
                data = self._answer(request) if callable(self._answer) else self._answer
                if data:
                    tls.sendall(data)
                    tls.unwrap()
        except (OSError, ValueError):
            pass

    def _read(self, tls):
        data = b""
        while b"\r\n\r\n" not in data:
            data += tls.recv(65536) or b"\r\n\r\n"
        head, _, body = data.partition(b"\r\n\r\n")
        length = 0
        for line in head.split(b"\r\n")[1:]:
            if line.lower().startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        while len(body) < length:
            body += tls.recv(65536)
        return json.loads(body) if body else {}


def settings(control, tmp_path, **values):
    """A configuration of this control host's with some keys of its own, and locks of its own."""
    values.setdefault("lock_dir", tmp_path / "locks")
    lines = ["dispatcher_id = control\n"] + ["%s = %s\n" % item for item in values.items()]
    path = tmp_path / "own.conf"
    path.write_text("".join(lines))
    return ctrl_exec.load_config("dispatcher", str(path), control.root)


def entry(name, port, cert_name="alpha"):
    return ctrl_exec.Agent(name, name, "127.0.0.1", port, "ip", cert_name)


def wanted(script="hello", *args):
    return ctrl_exec.RunRequest(script, args, ctrl_exec.new_id(), "tester")


def run_on(deployment, tmp_path, answer, **values):
    """What `run` makes of one agent that answers so."""
    config = settings(deployment.control, tmp_path, **values)
    with FakeAgent(deployment["alpha"], answer) as fake:
        results = list(ctrl_exec.Dispatcher(config).run([entry("one", fake.port)], wanted()))
    assert [result.host for result in results] == ["one"]
    return results[0]


# --- one result a host ----------------------------------------------------------------------------------


def test_every_host_of_a_mixed_run_ends_in_its_own_state_once(deployment, tmp_path):
    config = settings(deployment.control, tmp_path, read_timeout=4)
    over = threading.Event()
    alpha = deployment["alpha"]

    def silent(_):
        over.wait(60)
        return b""

    with (
        FakeAgent(alpha, http(200, dict(GOOD_RUN, exit=3))) as failing,
        FakeAgent(
            alpha, http(200, {"exit": -1, "stdout": "", "stderr": "", "error": "script not permitted"})
        ) as refusing,
        FakeAgent(alpha, http(409, {"error": "already running"})) as busy,
        FakeAgent(alpha, silent) as slow,
        FakeAgent(alpha, b"") as lost,
    ):
        agents = [
            entry("ok", alpha.port),
            entry("failed", failing.port),
            entry("refused", refusing.port),
            entry("busy", busy.port),
            entry("timeout", slow.port),
            entry("unreachable", free_port()),
            entry("unknown", lost.port),
            entry("impostor", deployment["beta"].port),
        ]
        results = list(ctrl_exec.Dispatcher(config).run(agents, wanted()))
        over.set()
    states = {result.host: result.state for result in results}
    assert len(results) == len(agents)
    assert states.pop("impostor") == "unreachable"
    assert states == {state: state for state in ctrl_exec.STATES if state != "accepted"}


def test_real_agents_give_ok_failed_and_refused(deployment, tmp_path):
    dispatcher = ctrl_exec.Dispatcher(settings(deployment.control, tmp_path))
    agents, _ = dispatcher.select(ctrl_exec.Selection(("alpha", "beta")))
    for request, state in (
        (wanted("exit", "0"), "ok"),
        (wanted("exit", "7"), "failed"),
        (wanted("reboot"), "refused"),
    ):
        results = list(dispatcher.run(agents, request))
        assert sorted((result.host, result.state) for result in results) == [
            ("alpha", state),
            ("beta", state),
        ]


def test_a_script_that_another_control_host_started_is_busy(fresh, tmp_path):
    solo = fresh("solo", start=False)["solo"]
    gate = tmp_path / "gate"
    solo.script("wait", "while [ ! -e '%s' ]; do sleep 0.05; done\n" % gate)
    solo.start()
    control = Control(os.path.join(os.path.dirname(solo.root), "control"), set_up=False)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    first = ctrl_exec.Dispatcher(settings(control, tmp_path / "one"))
    second = ctrl_exec.Dispatcher(settings(control, tmp_path / "two"))
    agents, _ = first.select(ctrl_exec.Selection(("solo",)))
    request, results = wanted("wait"), []
    thread = threading.Thread(target=lambda: results.extend(first.run(agents, request)))
    thread.start()
    try:
        wait_until(lambda: os.path.exists(solo.config.runs_dir + "/control/%s.json" % request.reqid))
        states = [result.state for result in second.run(agents, wanted("wait"))]
    finally:
        gate.touch()
        thread.join(30)
    assert states == ["busy"]
    assert [result.state for result in results] == ["ok"]


def test_one_slow_host_and_one_dead_host_hold_back_no_other_result(deployment, tmp_path):
    release = threading.Event()
    alpha = deployment["alpha"]

    def slow(_):
        release.wait(60)
        return http(200, GOOD_RUN)

    mute = socket.create_server(("127.0.0.1", 0))  # accepts, and never says a word of TLS
    config = settings(deployment.control, tmp_path, connect_timeout=5)
    with mute, FakeAgent(alpha, slow) as late:
        agents = [entry("late", late.port), entry("mute", mute.getsockname()[1])]
        agents += [entry("quick-%d" % number, alpha.port) for number in range(4)]
        order = []
        for result in ctrl_exec.Dispatcher(config).run(agents, wanted("exit", "0")):
            order.append((result.host, result.state))
            if len(order) == len(agents) - 1:  # everybody else is through while `late` still waits for us
                release.set()
    assert order[-1] == ("late", "ok")
    assert ("mute", "unreachable") in order
    assert sorted(host for host, _ in order) == sorted(agent.name for agent in agents)


def test_two_hundred_entries_on_one_agent_are_two_hundred_results(deployment, tmp_path):
    registry = tmp_path / "registry"
    registry.mkdir()
    for number in range(200):
        agent = entry("host-%03d" % number, deployment["alpha"].port)
        values = {key: value for key, value in agent._asdict().items() if key != "extra"}
        (registry / (agent.name + ".json")).write_text(json.dumps(values))
    config = settings(deployment.control, tmp_path, registry_dir=registry)
    dispatcher = ctrl_exec.Dispatcher(config)
    agents, _ = dispatcher.select(ctrl_exec.Selection((), everything=True))
    results = list(dispatcher.ping(agents, ctrl_exec.new_id()))
    assert sorted(result.host for result in results) == ["host-%03d" % number for number in range(200)]
    counts = {state: sum(result.state == state for result in results) for state in ctrl_exec.STATES}
    assert sum(counts.values()) == 200
    assert counts["ok"] == 200, counts


def test_name_with_a_port_reaches_that_port_under_the_registered_identity(deployment, tmp_path):
    dispatcher = ctrl_exec.Dispatcher(settings(deployment.control, tmp_path))
    agents, _ = dispatcher.select(ctrl_exec.Selection(("alpha:%d" % deployment["beta"].port,)))
    (result,) = dispatcher.ping(agents, ctrl_exec.new_id())
    assert result.state == "unreachable"
    assert "wrong identity" in result.error


# --- the fan-out itself ---------------------------------------------------------------------------------


def test_no_more_than_max_parallel_hosts_are_worked_on_at_once():
    guard, now, peak = threading.Lock(), [0], [0]
    together = threading.Barrier(4)

    def work(agent):
        with guard:
            now[0] += 1
            peak[0] = max(peak[0], now[0])
        together.wait(60)  # passes only when four are here at once
        with guard:
            now[0] -= 1
        return agent

    assert sorted(ctrl_exec.fan_out(list(range(20)), work, 4)) == list(range(20))
    assert peak[0] == 4


def test_max_parallel_of_the_configuration_bounds_the_connections(deployment, tmp_path):
    guard, now, peak = threading.Lock(), [0], [0]
    together = threading.Barrier(3)

    def answer(_):
        with guard:
            now[0] += 1
            peak[0] = max(peak[0], now[0])
        together.wait(60)
        with guard:
            now[0] -= 1
        return http(200, GOOD_PING)

    config = settings(deployment.control, tmp_path, max_parallel=3)
    with FakeAgent(deployment["alpha"], answer) as fake:
        agents = [entry("h%d" % number, fake.port) for number in range(9)]
        results = list(ctrl_exec.Dispatcher(config).ping(agents, ctrl_exec.new_id()))
    assert [result.state for result in results] == ["ok"] * 9
    assert peak[0] == 3


def test_more_threads_than_hosts_are_not_started():
    before = threading.active_count()
    seen = []

    def work(agent):
        seen.append(threading.active_count())
        return agent

    assert list(ctrl_exec.fan_out([1, 2], work, 500)) in ([1, 2], [2, 1])
    assert max(seen) <= before + 2


def test_nothing_is_done_for_no_hosts():
    assert list(ctrl_exec.fan_out([], lambda agent: agent, 8)) == []


def test_closing_the_iterator_begins_no_further_host():
    begun, gate = [], threading.Event()

    def work(agent):
        begun.append(agent)
        if agent:
            gate.wait(60)
        return agent

    before = set(threading.enumerate())
    results = ctrl_exec.fan_out(list(range(50)), work, 1)
    assert next(results) == 0
    wait_until(lambda: len(begun) == 2)
    results.close()
    gate.set()
    workers = set(threading.enumerate()) - before
    wait_until(lambda: not any(worker.is_alive() for worker in workers))
    assert begun == [0, 1]


def test_a_bug_in_the_work_for_one_host_costs_that_host_only(deployment, tmp_path, monkeypatch):
    real = ctrl_exec.connect_agent

    def broken(target, *rest):
        if target.name == "bad":
            raise ZeroDivisionError("nobody foresaw this")
        return real(target, *rest)

    monkeypatch.setattr(ctrl_exec, "connect_agent", broken)
    port = deployment["alpha"].port
    agents = [entry("bad", port), entry("good", port)]
    results = ctrl_exec.Dispatcher(settings(deployment.control, tmp_path)).ping(agents, ctrl_exec.new_id())
    states = {result.host: (result.state, result.error) for result in results}
    assert states == {"bad": ("unknown", "internal error; see the log"), "good": ("ok", "")}


# --- one request id -------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", [("run", "alpha", "hello"), ("ping", "alpha")])
def test_both_sides_log_the_same_request_id(deployment, verb):
    status, answer = deployment.control.json(*verb)
    assert status == 0
    word = "REQID=%s" % answer["reqid"]
    ours = [line for line in deployment.control.events(verb[0]) if word in line.split()]
    assert len(ours) == 1
    assert "HOST=alpha" in ours[0].split() and "STATE=ok" in ours[0].split()
    wait_until(lambda: [line for line in deployment["alpha"].events(verb[0]) if word in line.split()])


# --- what an answer means -------------------------------------------------------------------------------

ANSWERS = {
    "ok": (http(200, GOOD_RUN), "ok", ""),
    "exit-3": (http(200, dict(GOOD_RUN, exit=3)), "failed", ""),
    "exit-126": (http(200, dict(GOOD_RUN, exit=126, signal="SIGKILL")), "failed", ""),
    "exit-minus-1": (
        http(200, dict(GOOD_RUN, exit=-1, error="script not permitted")),
        "refused",
        "script not permitted",
    ),
    "exit-minus-1-without-error": (http(200, dict(GOOD_RUN, exit=-1)), "refused", "refused"),
    "400": (http(400, {"error": "args: expected a list"}), "refused", "args: expected a list"),
    "403": (http(403, {"error": "serial mismatch", "status": "forbidden"}), "refused", "serial mismatch"),
    "404": (http(404, {}), "refused", "404"),
    "409": (http(409, {"error": "already running"}), "busy", "already running"),
    "409-without-error": (http(409, {}), "busy", "busy"),
    "413": (http(413, {"error": "too large"}), "refused", "too large"),
    "500": (http(500, {"error": "internal error"}), "failed", "internal error"),
    "503": (http(503, {"error": "no processes left"}), "busy", "no processes left"),
    "not-json": (http(200, b"<html>hello</html>"), "unknown", "JSON"),
    "cut-json": (http(200, b'{"exit": 0, "stdout": "'), "unknown", ""),
    "a-list": (http(200, b"[]"), "unknown", ""),
    "nan": (http(200, b'{"exit": NaN, "stdout": "", "stderr": ""}'), "unknown", ""),
    "twice": (http(200, b'{"exit": 1, "exit": 0, "stdout": "", "stderr": ""}'), "unknown", ""),
    "deep": (http(200, b'{"exit": ' + b"[" * 5000 + b"]" * 5000 + b"}"), "unknown", ""),
    "no-exit": (http(200, {"stdout": "", "stderr": ""}), "unknown", "exit"),
    "exit-a-text": (http(200, dict(GOOD_RUN, exit="0")), "unknown", "exit"),
    "exit-true": (http(200, dict(GOOD_RUN, exit=True)), "unknown", "exit"),
    "exit-a-fraction": (http(200, dict(GOOD_RUN, exit=0.0)), "unknown", "exit"),
    "stdout-null": (http(200, dict(GOOD_RUN, stdout=None)), "unknown", "stdout"),
    "stderr-missing": (http(200, {"exit": 0, "stdout": ""}), "unknown", "stderr"),
    "empty-body": (http(200, b""), "unknown", ""),
    "not-http": (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "unknown", ""),
    "body-cut": (http(200, GOOD_RUN)[:-4], "unknown", "closed"),
    "nothing": (b"", "unknown", "closed"),
}


@pytest.mark.parametrize("name", sorted(ANSWERS))
def test_each_answer_to_a_run_has_its_one_state(deployment, tmp_path, name):
    answer, state, error = ANSWERS[name]
    result = run_on(deployment, tmp_path, answer, read_timeout=5)
    assert (result.state, error in result.error) == (state, True), result
    assert bool(result.error) == (state not in ("ok", "failed") or name in ("500", "503")), result


@pytest.mark.parametrize("how", ["unknown", "timeout"])
def test_when_the_answer_is_lost_the_hint_names_the_request(deployment, tmp_path, how):
    over = threading.Event()

    def silent(_):
        over.wait(60)
        return b""

    answer = {"unknown": b"", "timeout": silent}[how]
    result = run_on(deployment, tmp_path, answer, read_timeout=3)
    over.set()
    assert result.state == how
    assert result.reqid in result.hint
    if how == "timeout":
        assert result.error == "read timeout after 3s"


@pytest.mark.parametrize("field, value", [("status", None), *((field, 7) for field in GOOD_PING if field != "reqid")])
def test_a_ping_without_a_status_or_with_a_field_of_another_type_is_unknown(deployment, tmp_path, field, value):
    config = settings(deployment.control, tmp_path)
    answer = dict(GOOD_PING, **{field: value})
    with FakeAgent(deployment["alpha"], http(200, answer)) as fake:
        (result,) = ctrl_exec.Dispatcher(config).ping([entry("one", fake.port)], ctrl_exec.new_id())
    assert (result.state, field in result.error) == ("unknown", True)


def test_a_ping_of_an_older_agent_may_say_less(deployment, tmp_path):
    config = settings(deployment.control, tmp_path)
    with FakeAgent(deployment["alpha"], http(200, {"status": "ok"})) as fake:
        (result,) = ctrl_exec.Dispatcher(config).ping([entry("one", fake.port)], ctrl_exec.new_id())
    assert (result.state, result.error) == ("ok", "")


@pytest.mark.parametrize(
    "scripts", ["x", [1], [{}], [{"name": "../x"}], [{"name": "a\nb"}], [{"name": None}]]
)
def test_a_discovery_with_an_unfit_script_list_is_unknown(deployment, tmp_path, scripts):
    answer = http(200, {"status": "ok", "host": "x", "version": "1", "scripts": scripts})
    with FakeAgent(deployment["alpha"], answer) as fake:
        dispatcher = ctrl_exec.Dispatcher(settings(deployment.control, tmp_path))
        (result,) = dispatcher.discover([entry("one", fake.port)], ctrl_exec.new_id())
    assert result.state == "unknown"


MISSHAPEN = {
    "stdout-null": (200, {"exit": 0, "stdout": None, "stderr": ""}),
    "stdout-a-list": (200, {"exit": 0, "stdout": ["x"], "stderr": {}}),
    "exit-true": (200, {"exit": True, "stdout": 5, "stderr": 6}),
    "busy-with-output": (409, {"exit": 4, "stdout": 5, "stderr": [], "error": {"a": ["b"]}}),
    "failed-with-output": (503, {"exit": 4, "stdout": False, "error": 17}),
    "odd-extras": (
        200,
        dict(
            GOOD_RUN, exit=1, signal=["x"], timed_out="no", stdout_truncated={}, stdout_base64=[1], error=[2]
        ),
    ),
    "bad-base64": (200, dict(GOOD_RUN, stdout_base64="%%%")),
    "surrogates": (200, dict(GOOD_RUN, stdout="\ud800", stderr="\udcff")),
    "huge-exit": (200, dict(GOOD_RUN, exit=10**400)),
}


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
@pytest.mark.parametrize("name", sorted(MISSHAPEN))
def test_one_misshapen_answer_spoils_no_other_hosts_output(deployment, tmp_path, capfdbinary, name, as_json):
    registry = tmp_path / "registry"
    registry.mkdir()
    settings(deployment.control, tmp_path, registry_dir=registry)
    with FakeAgent(deployment["alpha"], http(*MISSHAPEN[name])) as fake:
        for agent in (entry("bad", fake.port), entry("good", deployment["alpha"].port)):
            values = {key: value for key, value in agent._asdict().items() if key != "extra"}
            (registry / (agent.name + ".json")).write_text(json.dumps(values))
        words = ["ced", "--root", deployment.control.root, "--config", str(tmp_path / "own.conf")]
        words += ["run", "--all", "hello"] + ["--json"] * as_json
        status = ctrl_exec.main(words)
    out, err = capfdbinary.readouterr()
    assert status in (0, 1) and b"internal error" not in err, err
    if as_json:
        entries = {result["host"]: result for result in json.loads(out)["results"]}
        assert sorted(entries) == ["bad", "good"]
        assert entries["good"]["stdout"] == "hello\n"
        assert {type(entries["bad"][key]) for key in ("stdout", "stderr")} == {str}
        assert type(entries["bad"]["exit"]) is int
    else:
        assert out.count(b"==> bad  [") == 1 and out.count(b"==> good  [OK  exit:0  ") == 1
        assert b"\nhello\n" in out


# --- what is asked --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script", ["", "a/b", "../x", "a b", "x.sh", "a\n", "h\xe9", "-\u0663", "a" * 129, "a\0"]
)
def test_what_is_not_a_script_name_is_refused_before_anything_is_sent(deployment, tmp_path, script):
    with FakeAgent(deployment["alpha"], http(200, GOOD_RUN)) as fake:
        dispatcher = ctrl_exec.Dispatcher(settings(deployment.control, tmp_path))
        with pytest.raises(ctrl_exec.UsageError):
            list(dispatcher.run([entry("one", fake.port)], wanted(script)))
        assert fake.requests == []
    assert not os.path.exists(tmp_path / "locks")


@pytest.mark.parametrize("argument", ["a\0b", "\udcff", "\ud800", "x" * ctrl_exec.MAX_BODY])
def test_an_argument_no_agent_could_take_is_refused_with_its_reason(argument):
    with pytest.raises(ctrl_exec.UsageError) as caught:
        ctrl_exec.check_run_request(wanted("hello", "fine", argument))
    assert "argument 2" in caught.value.message or "larger than" in caught.value.message


@pytest.mark.parametrize(
    "argument", ["", "-", "--", "$(id)", "a\nb", "\u00e9\U0001f600", "\x1b[31m", "x" * 500_000]
)
def test_any_other_argument_is_fine(argument):
    ctrl_exec.check_run_request(wanted("hello", argument))


def test_arguments_and_request_reach_the_agent_as_they_are(deployment, tmp_path):
    request = ctrl_exec.RunRequest("hello", ("", "a b", "\u00e9"), "0123456789abcdef", "ann", "t0ken", 9)
    with FakeAgent(deployment["alpha"], http(200, GOOD_RUN)) as fake:
        dispatcher = ctrl_exec.Dispatcher(settings(deployment.control, tmp_path))
        assert [result.state for result in dispatcher.run([entry("one", fake.port)], request)] == ["ok"]
        assert fake.requests == [
            {
                "script": "hello",
                "args": ["", "a b", "\u00e9"],
                "reqid": "0123456789abcdef",
                "username": "ann",
                "token": "t0ken",
                "timeout": 9,
            }
        ]


def test_locks_are_held_until_the_last_result_and_then_gone(deployment, tmp_path):
    locks = str(tmp_path / "locks")
    release = threading.Event()

    def slow(_):
        release.wait(60)
        return http(200, GOOD_RUN)

    config = settings(deployment.control, tmp_path)
    with (
        FakeAgent(deployment["alpha"], slow) as late,
        FakeAgent(deployment["alpha"], http(200, GOOD_RUN)) as quick,
    ):
        agents = [entry("late", late.port), entry("quick", quick.port)]
        results = ctrl_exec.Dispatcher(config).run(agents, wanted())
        assert next(results).host == "quick"
        assert sorted(lock["host"] for lock in ctrl_exec.list_locks(locks)) == ["late", "quick"]
        with pytest.raises(ctrl_exec.Locked) as caught:
            list(ctrl_exec.Dispatcher(config).run(agents[1:], wanted()))
        assert caught.value.conflicts == ("quick:hello",)
        assert len(quick.requests) == 1
        release.set()
        assert next(results).host == "late"
        assert list(results) == []
    assert ctrl_exec.list_locks(locks) == []


# --- discovery ------------------------------------------------------------------------------------------


def test_discovery_keeps_tags_in_the_registry_and_tags_then_select(fresh):
    made = fresh("plain", start=False)
    made.add("north", "rate_limit_disable = yes\n[tags]\nsite = north\nrank = 1\n")
    made["north"].start()
    made["plain"].start()
    control = made.control
    assert control.run("run", "--tags", "site=north", "hello").returncode == 2  # nobody has told us yet
    done = control.run("discovery")
    assert done.returncode == 0, done.err
    assert "north" in done.out and "hello" in done.out
    kept = ctrl_exec.get_agent(control.config.registry_dir, "north")
    assert kept.tags == {"site": "north", "rank": "1"}
    assert kept.cert_name == "north" and kept.port == made["north"].port
    status, answer = control.json("run", "--tags", "site=north,rank=1", "hello")
    assert (status, [result["host"] for result in answer["results"]]) == (0, ["north"])
    assert control.run("run", "--tags", "site=north,rank=2", "hello").returncode == 2
    assert control.run("list-agents", "--tags", "site=north").out.count("\n") == 3


@pytest.mark.parametrize("tags", [None, [], "x", 5])
def test_tags_that_are_no_object_change_nothing(deployment, tmp_path, tags):
    registry = tmp_path / "registry"
    config = settings(deployment.control, tmp_path, registry_dir=registry)
    answer = http(200, {"status": "ok", "host": "x", "version": "1", "scripts": [], "tags": tags})
    with FakeAgent(deployment["alpha"], answer) as fake:
        agent = entry("one", fake.port)._replace(tags={"site": "south"})
        with ctrl_exec.registry_lock(str(registry)):
            ctrl_exec.save_agent(str(registry), agent)
        results = list(ctrl_exec.Dispatcher(config).discover([agent], ctrl_exec.new_id()))
    assert len(results) == 1
    assert ctrl_exec.get_agent(str(registry), "one").tags == {"site": "south"}


# --- check ----------------------------------------------------------------------------------------------


@pytest.fixture
def control(deployment, tmp_path):
    """A copy of the shared control host's files, to be broken."""
    root = tmp_path / "control"
    shutil.copytree(deployment.control.root, str(root), symlinks=True)
    return Control(str(root), set_up=False)


def check(control):
    """(exit status, findings) of `ced check`."""
    status, answer = control.json("check")
    assert answer["ok"] == (status == 0)
    return status, answer["findings"]


def test_check_finds_nothing_wrong_with_a_sound_control_host(control):
    status, findings = check(control)
    assert status == 0
    assert {finding["level"] for finding in findings} == {"OK"}
    done = control.run("check")
    assert done.returncode == 0
    assert all(line.startswith("OK    ") for line in done.out.splitlines())


def _loosen_key(control):
    os.chmod(control.config.key, 0o644)
    return control.config.key


def _loosen_ca_key(control):
    path = ctrl_exec.ca_key_path(control.config.ca)
    os.chmod(path, 0o640)
    return path


def _corrupt_registry(control):
    with open(os.path.join(control.config.registry_dir, "torn.json"), "w", encoding="ascii") as file:
        file.write('{"name": "torn", "po')
    return "torn.json"


def _plain_hook(control):
    return control.put(ctrl_exec.ETC + "/auth-hook", "#!/bin/sh\nexit 0\n", 0o644)


def _open_hook(control):
    path = control.put(ctrl_exec.ETC + "/auth-hook", "#!/bin/sh\nexit 0\n", 0o755)
    os.chmod(path, 0o777)
    return path


def _missing_hook(control):
    with open(control.file(ctrl_exec.ETC + "/ctrl-exec.conf"), "a", encoding="ascii") as file:
        file.write("auth_hook = /nowhere/hook\n")
    return "/nowhere/hook"


def _garble_revocations(control):
    with open(control.config.revoked_serials, "w", encoding="ascii") as file:
        file.write("this is no serial\n")
    return "revo"


def _revocations_a_directory(control):
    if os.path.exists(control.config.revoked_serials):
        os.unlink(control.config.revoked_serials)
    os.makedirs(control.config.revoked_serials)
    return "revo"


def _lose_certificate(control):
    os.unlink(control.config.cert)
    return control.config.cert


def _foreign_certificate(control):
    shutil.copyfile(control.config.ca, control.config.cert)
    return control.config.cert


def _lose_ca(control):
    os.unlink(control.config.ca)
    return control.config.ca


def _revoke_alpha(control):
    agent = ctrl_exec.get_agent(control.config.registry_dir, "alpha")
    ctrl_exec.add_revoked(control.config.revoked_serials, [agent.serial], "test")
    return "alpha"


def _expire_alpha(control):
    agent = ctrl_exec.get_agent(control.config.registry_dir, "alpha")
    with ctrl_exec.registry_lock(control.config.registry_dir):
        changed = agent._replace(expiry="2020-01-01T00:00:00Z")
        ctrl_exec.save_agent(control.config.registry_dir, changed)
    return "alpha"


BREAKAGES = (
    _loosen_key,
    _loosen_ca_key,
    _corrupt_registry,
    _plain_hook,
    _open_hook,
    _missing_hook,
    _garble_revocations,
    _revocations_a_directory,
    _lose_certificate,
    _foreign_certificate,
    _lose_ca,
    _revoke_alpha,
    _expire_alpha,
)


@pytest.mark.parametrize("breakage", BREAKAGES, ids=lambda function: function.__name__.strip("_"))
def test_check_fails_on_each_broken_thing_and_names_it(control, breakage):
    word = breakage(control)
    status, findings = check(control)
    assert status == 1
    failed = [finding["what"] for finding in findings if finding["level"] == "FAIL"]
    assert any(word in what for what in failed), findings


def test_check_without_a_ca_key_warns_and_succeeds(control):
    os.unlink(ctrl_exec.ca_key_path(control.config.ca))
    status, findings = check(control)
    assert status == 0
    assert [finding["what"] for finding in findings if finding["level"] == "WARN"] == [
        "no CA key here: this host can run scripts, but pair nobody"
    ]


def test_check_tells_of_certificates_that_expire_soon(control, monkeypatch):
    expiry = ctrl_exec.read_certificate(control.config.cert).not_after
    good = ctrl_exec.check_openssl(ctrl_exec.OpenSSL())  # its own trial is by the real clock
    monkeypatch.setattr(ctrl_exec, "check_openssl", lambda _: good)
    for days, level in ((20, "WARN"), (-1, "FAIL")):
        monkeypatch.setattr(ctrl_exec, "now", lambda: expiry - days * 86400)
        findings = ctrl_exec.check_dispatcher(control.config)
        told = [finding for finding in findings if finding.level == level]
        assert any(control.config.cert in finding.what for finding in told), findings
        assert any("alpha" in finding.what for finding in told), findings


# --- a refusal that is not what it should be ----------------------------------------------------------------


@pytest.mark.parametrize(
    "field", [{"faults": 1}, {"faults": "disk"}, {"faults": {"a": 1}}, {"faults": [1]}, {"version": [1]}, {"expiry": 1}]
)
def test_a_refused_ping_with_fields_of_other_types_costs_its_own_host_only(deployment, tmp_path, field):
    alpha, control = deployment["alpha"], deployment.control
    with FakeAgent(alpha, http(403, dict(field, error="no"))) as fake:
        for words in ((), ("--json",)):
            done = control.run("ping", "alpha:%d" % fake.port, "beta", *words)
            assert done.returncode == 1 and "internal error" not in done.out + done.err, done
            assert "no valid `%s`" % next(iter(field)) in done.out and "beta" in done.out, done
