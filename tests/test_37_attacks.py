"""What attacks on certificates, registry and records found, each kept as a test."""

import json
import os
import tempfile
import threading
import time

import ctrl_exec
import peers
import pytest
import support
from support import wait_until

OPENSSL = ctrl_exec.OpenSSL()
DAY = 86400


# --- words --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["[0-99999]" * 200, "[0-9]" * 6, "a[0-999999999]", "[1-2]" * 17])
def test_a_word_that_names_too_many_hosts_is_refused_before_a_name_is_built(word):
    with pytest.raises(ctrl_exec.UsageError, match="more than"):
        ctrl_exec.expand_ranges(word)


def test_ranges_multiply_and_keep_their_order_and_width():
    assert ctrl_exec.expand_ranges("a[1-2]b[08-10,7]c") == [
        "a1b08c", "a1b09c", "a1b10c", "a1b7c", "a2b08c", "a2b09c", "a2b10c", "a2b7c",
    ]  # fmt: skip


def test_more_than_a_hundred_patterns_are_refused(deployment):
    words = tuple("a%d*" % number for number in range(101))
    with pytest.raises(ctrl_exec.UsageError, match="more than 100"):
        ctrl_exec.select_agents(deployment.control.config.registry_dir, ctrl_exec.Selection(words))


# --- an agent that lies ---------------------------------------------------------------------------------------


class Liar:
    """An agent with the certificate of `host` that answers as it is told: h(path, body) to (status, object)."""

    def __init__(self, host, answer):
        self._context = ctrl_exec.new_server_context(ctrl_exec.agent_identity(host.config), True)
        self.asked = []
        self._answer = answer
        self._listener = peers.Listener(self._serve, host.port)
        self.close = self._listener.close

    def _serve(self, raw):
        with raw:
            try:
                with self._context.wrap_socket(raw, server_side=True) as tls:
                    channel = ctrl_exec.Channel(tls)
                    while True:
                        request = ctrl_exec.read_request(channel, ctrl_exec.Deadline(60))
                        self.asked.append(request.path)
                        status, body = self._answer(request.path, json.loads(request.body or b"{}"))
                        data = json.dumps(body).encode()
                        tls.sendall(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%s" % (status, len(data), data))
            except (OSError, ValueError):
                pass


@pytest.fixture
def aged(fresh, monkeypatch):
    """A deployment whose host is not running and has a certificate past half its life."""
    site = fresh("solo", start=False)
    identity = ctrl_exec.agent_identity(site["solo"].config)
    with monkeypatch.context() as past:
        past.setattr(ctrl_exec, "now", lambda: time.time() - 200 * DAY)
        request = OPENSSL.new_request(identity.key, "solo")
        ca = site.control.config.ca
        pem = OPENSSL.sign(request, "solo", "agent", 300, ca, ctrl_exec.ca_key_path(ca))
    ctrl_exec.write_atomic(identity.cert, pem.encode(), mode=0o644)
    info = ctrl_exec.read_certificate(identity.cert)
    directory = site.control.config.registry_dir
    ctrl_exec.update_agent(directory, "solo", lambda agent: ctrl_exec.with_certificate(agent, info, ""))
    return site


@pytest.mark.parametrize("verb", ["revoke", "unpair"])
def test_an_agent_that_delays_its_renewal_is_refused_with_all_that_it_got(aged, verb):
    control, host = aged.control, aged["solo"]
    asked, go, given = threading.Event(), threading.Event(), []

    def answer(path, body):
        if path == "/renew":
            asked.set()
            go.wait(30)
            return 200, {"status": "ok", "csr": OPENSSL.new_request(host.config.key, "solo")}
        if path == "/renew-complete":
            given.append(body["cert"])
        return 200, {"status": "ok"}

    liar = Liar(host, answer)
    ping = control.spawn("ping", "solo", stdout=support.subprocess.DEVNULL)
    assert asked.wait(30)
    assert control.run(verb, "solo").returncode == 0
    go.set()
    ping.wait(60)
    liar.close()
    assert given == []
    entry = ctrl_exec.find_agent(control.config.registry_dir, "solo")
    assert (entry is None) == (verb == "unpair")
    revoked = ctrl_exec.load_revoked(control.config.revoked_serials)
    assert ctrl_exec.read_certificate(host.config.cert).serial in revoked
    assert entry is None or set(ctrl_exec.list_serials(entry)) <= revoked


def test_an_agent_that_takes_certificates_and_never_uses_them_gets_one_an_hour(aged):
    control, host = aged.control, aged["solo"]

    def answer(path, _):
        csr = OPENSSL.new_request(host.config.key, "solo") if path == "/renew" else ""
        return 200, {"status": "ok", "csr": csr}

    liar = Liar(host, answer)
    for _ in range(4):
        done = control.run("ping", "solo")
        assert done.returncode == 0, done.out + done.err
    liar.close()
    assert liar.asked.count("/renew-complete") == 1


@pytest.mark.parametrize("tags", [{"t": "x" * 2_000_000}, {"bad name": "x"}, {"t": "x" * 257}])
def test_tags_that_are_none_leave_the_registry_as_it_was(fresh, tags):
    site = fresh("solo", start=False)
    body = {"status": "ok", "host": "solo", "version": "1", "scripts": [], "tags": tags}
    liar = Liar(site["solo"], lambda *_: (200, body))
    site.control.run("discovery", "solo")
    liar.close()
    assert ctrl_exec.find_agent(site.control.config.registry_dir, "solo").tags == {}


def test_a_host_has_no_more_than_sixty_four_tags(fresh):
    site = fresh("solo", start=False)
    tags = {"t%03d" % number: "x" for number in range(100)}
    body = {"status": "ok", "host": "solo", "version": "1", "scripts": [], "tags": tags}
    liar = Liar(site["solo"], lambda *_: (200, body))
    assert site.control.run("discovery", "solo").returncode == 0
    liar.close()
    assert len(ctrl_exec.find_agent(site.control.config.registry_dir, "solo").tags) == ctrl_exec.MAX_TAGS


# --- one agent against the rest ----------------------------------------------------------------------------


def done_with(body):
    return {"script": "hello", "exit": 0, "stdout": "", "stderr": "", **body}


@pytest.fixture
def pair(fresh):
    """(deployment, start a liar in the place of its host `bad`); its host `good` works."""
    site = fresh("bad", "good", start=False)
    site["good"].start()
    liars = []

    def lie(answer):
        liars.append(Liar(site["bad"], answer))

    yield site, lie
    for liar in liars:
        liar.close()


@pytest.mark.parametrize("status, exit_status", [(200, 3), (403, 0), (500, 0)], ids=["ran", "refused", "failed"])
def test_a_long_error_of_one_host_spoils_the_record_of_none(pair, status, exit_status):
    site, lie = pair
    lie(lambda *_: (status, done_with({"exit": exit_status, "error": "x" * (3 << 20)})))
    done = site.control.run("run", "--all", "hello", "--json")
    entries = {one["host"]: one for one in json.loads(done.out)["results"]}
    assert entries["good"]["stdout"] == "hello\n"
    assert entries["bad"]["error"].startswith("xxx") and len(entries["bad"]["error"]) < 1100
    for verb in ("status", "wait", "cancel"):
        shown = site.control.run(verb, json.loads(done.out)["reqid"])
        assert "good  [done" in shown.out and len(shown.out) < 4000, shown
    path = os.path.join(site.control.config.runs_dir, json.loads(done.out)["reqid"] + ".json")
    assert os.path.getsize(path) < 1000


@pytest.mark.parametrize(
    "words, body",
    [
        (("ping",), {"status": "ok", "host": "bad", "version": "1", "expiry": "", "junk": "x" * (2 << 20)}),
        (("discovery",), {"status": "ok", "host": "bad", "version": "1", "scripts": [], "junk": "x" * (5 << 20)}),
        (("run", "hello"), done_with({"junk": [0] * 300_000})),
        (("run", "hello"), done_with({"junk": [1e9] * 5_000_000})),
    ],
    ids=["ping", "discovery", "numbers", "more numbers"],
)
def test_an_answer_beyond_its_question_costs_its_own_host_only(pair, words, body):
    site, lie = pair
    lie(lambda *_: (200, body))
    done = site.control.run(words[0], "bad", "good", *words[1:], "--json")
    shown = json.loads(done.out)
    entries = shown["hosts"] if "hosts" in shown else {one["host"]: one for one in shown["results"]}
    assert done.returncode == 1 and "the" in entries["bad"]["error"] and "more than" in entries["bad"]["error"]
    assert entries["good"].get("status") == "ok" or entries["good"]["state"] == "ok"


@pytest.mark.parametrize("key", ["version", "expiry", "status"])
def test_a_long_text_of_a_ping_is_cut(pair, key):
    site, lie = pair
    lie(lambda *_: (200, {"status": "ok", "host": "bad", "version": "1", "expiry": "", key: "y" * 900_000}))
    assert len(site.control.run("ping", "--all").out) < 5000


def test_a_script_of_an_offer_says_no_more_than_there_can_be(pair):
    site, lie = pair
    scripts = [{"name": "a", "path": "/" + "x" * 5000, "executable": True}]
    lie(lambda *_: (200, {"status": "ok", "host": "bad", "version": "1", "scripts": scripts}))
    done = site.control.run("discovery", "--all")
    assert done.returncode == 1 and "more of a script" in done.out and "hello" in done.out


@pytest.mark.parametrize("text", [b'"x":' + b"1," * 300_000 + b"1", b'"x":[' + b'"",' * 300_000 + b'""]'])
def test_masses_of_flat_values_are_refused_before_they_are_parsed(text, monkeypatch):
    monkeypatch.setattr(ctrl_exec.json, "loads", lambda *_, **__: pytest.fail("parsed"))
    with pytest.raises(ctrl_exec.BadRequest, match="values"):
        ctrl_exec.parse_json(b"{" + text + b"}")


def test_a_text_with_many_commas_is_one_value():
    assert len(ctrl_exec.parse_json(b'{"x":"' + b"," * 600_000 + b'"}')["x"]) == 600_000


@pytest.mark.parametrize("text", [b"1" * 100, b"1." + b"0" * 500])
def test_a_number_with_hundreds_of_digits_is_none(text):
    with pytest.raises(ctrl_exec.BadRequest, match="digits"):
        ctrl_exec.parse_json(b'{"x":' + text + b"}")


def large(**more):
    return done_with({"stdout": "z" * (3 << 20), **more})


@pytest.fixture
def small_room(pair):
    """(dispatcher with room for one answer of 3 MiB, three names for the host that lies, start the liar)."""
    site, lie = pair
    dispatcher = ctrl_exec.Dispatcher(site.control.config)
    dispatcher.client.room = ctrl_exec.Room(4 << 20)
    agent = ctrl_exec.find_agent(site.control.config.registry_dir, "bad")
    return dispatcher, [agent._replace(name=name) for name in ("one", "two", "three")], lie


def new_request(**more):
    return ctrl_exec.RunRequest("hello", (), ctrl_exec.new_id(), "me", **more)


def is_empty(dispatcher):
    room = dispatcher.client.room
    return (room._free, room._kept, room._readers) == (room._size, 0, {})


def test_large_answers_come_one_after_the_other_when_memory_holds_one(small_room):
    dispatcher, agents, lie = small_room
    lie(lambda *_: (200, large()))
    states = [result.state for result in dispatcher.run(agents, new_request(), keep=False)]
    assert states == ["ok"] * 3 and is_empty(dispatcher)


def test_results_that_are_kept_together_have_a_bound_together(small_room):
    dispatcher, agents, lie = small_room
    lie(lambda *_: (200, large()))
    results = list(dispatcher.run(agents, new_request()))
    lost = [result for result in results if result.state != "ok"]
    assert [result.state for result in lost] == ["unknown"] * 2
    assert all("no room" in result.error and "ced wait" in result.hint for result in lost)
    del results, lost
    assert is_empty(dispatcher)
    texts = [result.answer.get("stdout") for result in dispatcher.run(agents, new_request())]  # as the API does
    assert sorted(map(bool, texts)) == [False, False, True] and is_empty(dispatcher)


@pytest.mark.parametrize(
    "path, status, more",
    [
        ("/run", 500, {"status": "unknown"}), ("/run", 409, {}), ("/run", 403, {}), ("/run", 200, {"exit": -1}),
        ("/run", 200, {"exit": "x"}), ("/result", 200, {"status": "running"}), ("/result", 404, {}),
        ("/result", 500, {"status": "unknown"}),
    ],
    ids=str,
)  # fmt: skip
def test_an_answer_whose_output_nobody_shows_takes_no_room(small_room, path, status, more):
    dispatcher, agents, lie = small_room
    lie(lambda asked, _: (status, large(**more)) if asked.startswith(path) else (500, {"status": "unknown"}))
    request = new_request(retries=1)
    results = list(dispatcher.run([agents[0]._replace(name="bad")], request, keep=False))
    record = dispatcher.get_request(request.reqid)
    record.hosts["bad"] = ctrl_exec.Outcome("unknown")
    results += list(dispatcher.wait(record, 1))
    assert all(result.state not in ("ok", "failed") for result in results)
    assert is_empty(dispatcher)


@pytest.mark.parametrize("keep", [False, True])
def test_results_that_nobody_takes_any_more_give_their_room_back(small_room, keep):
    dispatcher, agents, lie = small_room
    lie(lambda *_: (200, large()))
    results = dispatcher.run(agents, new_request(), keep=keep)
    state = next(results).state  # and not the result, which would hold its room
    results.close()
    assert state == "ok"
    wait_until(lambda: is_empty(dispatcher), what="the room")


def test_a_host_that_stalls_loses_its_room_to_those_that_do_not(pair, small_room):
    (site, _), (dispatcher, agents, lie) = pair, small_room
    stalled, over = threading.Event(), threading.Event()

    def serve(raw):
        context = ctrl_exec.new_server_context(ctrl_exec.agent_identity(site["bad"].config), True)
        with raw, context.wrap_socket(raw, server_side=True) as tls:
            ctrl_exec.read_request(ctrl_exec.Channel(tls), ctrl_exec.Deadline(60))
            tls.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 5000000\r\n\r\n{"stdout":"' + b"z" * (4 << 20))
            stalled.set()
            over.wait(60)

    thief = peers.Listener(serve)
    lie(lambda *_: (200, large()))
    victims = [agents[0]._replace(port=thief.port)]
    ended = []
    waiting = threading.Thread(target=lambda: ended.extend(dispatcher.run(victims, new_request())))
    waiting.start()
    assert stalled.wait(60)
    wait_until(lambda: dispatcher.client.room._free < 1 << 20, what="the theft")
    request = new_request()._replace(script="context")
    assert [one.state for one in dispatcher.run([agents[1]], request, keep=False)] == ["ok"]
    over.set()
    waiting.join(60)
    assert [result.state for result in ended] == ["unknown"]
    ended.clear()
    thief.close()
    wait_until(lambda: is_empty(dispatcher), what="the room")


def test_a_text_with_wide_characters_counts_as_what_it_takes(small_room):
    dispatcher, agents, lie = small_room
    lie(lambda *_: (200, done_with({"stdout": "\U0001f600" + "z" * (3 << 20)})))
    (result,) = dispatcher.run(agents[:1], new_request())
    assert result.state == "unknown" and "no room" in result.error and is_empty(dispatcher)


def test_a_record_of_very_many_hosts_is_read_back_and_a_larger_one_is_not_written(tmp_path):
    outcome = ctrl_exec.Outcome("unreachable", -1, "e" * ctrl_exec.MAX_OUTCOME)
    record = ctrl_exec.RequestRecord("r1", "hello", "sync", "me", "", "2026-01-01T00:00:00Z", {})
    for number in range(40_000):
        record.hosts["host-%d" % number] = outcome
    ctrl_exec.save_request(str(tmp_path), record)
    assert ctrl_exec.get_request(str(tmp_path), "r1") == record
    for number in range(40_000):
        record.hosts["host-with-a-longer-name-%d" % number] = outcome
    with pytest.raises(ctrl_exec.StorageError, match="is not written"):
        ctrl_exec.save_request(str(tmp_path), record)
    assert len(ctrl_exec.get_request(str(tmp_path), "r1").hosts) == 40_000


def test_who_follows_introduces_himself_to_a_host_that_refuses_his_certificate(fresh, tmp_path, monkeypatch):
    site = fresh()
    reqid = json.loads(site.control.run("run", "solo", "hello", "--async", "--json").out)["reqid"]
    client = ctrl_exec.HostClient(site.control.config)
    known, asked = client._context, []
    ctrl_exec.new_ca(OPENSSL, str(tmp_path / "ca.crt"), "ec", "another")
    key, cert = str(tmp_path / "other.key"), str(tmp_path / "other.crt")
    ctrl_exec.new_key_file(OPENSSL, key, "ec")
    pem = OPENSSL.sign(
        OPENSSL.new_request(key, "control"), "control", "dispatcher", 9, str(tmp_path / "ca.crt"),
        str(tmp_path / "ca.key"),
    )  # fmt: skip
    ctrl_exec.write_atomic(cert, pem.encode())
    client._context = ctrl_exec.new_client_context(ctrl_exec.Identity(cert, key, site.control.config.ca))
    monkeypatch.setattr(client, "_introduce", lambda *_: asked.append(1) or known)
    agent = ctrl_exec.find_agent(site.control.config.registry_dir, "solo")
    shown = []
    result = client.follow(agent, reqid, None, lambda *words: shown.append(words))
    assert (asked, result.state) == ([1], "ok")
    assert shown == [("solo", "stdout", b"hello\n")]


# --- a dispatcher against another ------------------------------------------------------------------------------


@pytest.fixture
def two(fresh):
    """A running agent that trusts `control` and, of the same CA, `bee`: (deployment, bee's TLS context)."""
    site = fresh("solo", start=False)
    control, host = site.control, site["solo"]
    stem = os.path.join(control.root, "bee")
    ctrl_exec.new_key_file(OPENSSL, stem + ".key", "ec")
    ca = control.config.ca
    request = OPENSSL.new_request(stem + ".key", "bee")
    pem = OPENSSL.sign(request, "bee", "dispatcher", 365, ca, ctrl_exec.ca_key_path(ca))
    ctrl_exec.write_atomic(stem + ".crt", pem.encode())
    serial = ctrl_exec.read_certificate(stem + ".crt").serial
    ctrl_exec.add_trusted(host.config.trusted_dispatchers_path, serial, "bee")
    host.start()
    return site, support.client_context(stem + ".crt", stem + ".key")


def test_a_dispatcher_cannot_fill_an_agents_revocation_list(two):
    site, bee = two
    host = site["solo"]
    text = "".join("%030x  # by dispatcher bee\n" % n for n in range(ctrl_exec.MAX_OWN_SERIALS))
    host.put(ctrl_exec.AGENT_ETC + "/revoked-serials", text)
    ctrl_exec.add_trusted(host.config.trusted_dispatchers_path, "ab" * 16, "bee")
    before = ctrl_exec.load_trust_map(host.config.trusted_dispatchers_path)
    body = {"serial": "ab" * 16, "action": "revoke", "reqid": "r1"}
    status, answer = support.post(host.port, bee, "/rotate-serial", body)
    assert status == 403 and "already" in answer["error"]
    assert ctrl_exec.load_trust_map(host.config.trusted_dispatchers_path) == before  # not half done
    own, body["serial"] = support.dispatcher_context(site.control), "cd" * 16
    assert support.post(host.port, own, "/rotate-serial", body)[0] == 200  # the other one's room is his own


def test_a_dispatcher_cannot_fill_an_agents_trust_map(two):
    site, bee = two
    path = site["solo"].config.trusted_dispatchers_path
    with open(path, "a", encoding="ascii") as file:
        for number in range(ctrl_exec.MAX_OWN_SERIALS - 1):
            file.write("%030x bee\n" % (number + 1))
    before = ctrl_exec.load_trust_map(path)
    body = {"serial": "cd" * 16, "action": "add", "reqid": "r1"}
    assert support.post(site["solo"].port, bee, "/rotate-serial", body)[0] == 403
    assert ctrl_exec.load_trust_map(path) == before


def test_a_dispatcher_cannot_drop_a_ca_that_another_may_need(two):
    site, bee = two
    control, host = site.control, site["solo"]
    assert control.run("setup-ca", "--next").returncode == 0
    assert control.run("maintain").returncode == 0
    assert len(ctrl_exec.load_cas(host.config.ca)) == 2
    successor = ctrl_exec.next_path(control.config.ca)
    bee.load_verify_locations(successor)
    with open(successor, encoding="ascii") as file:
        body = {"reqid": "r1", "ca": file.read()}
    support.post(host.port, bee, "/renew-complete", body)
    assert len(ctrl_exec.load_cas(host.config.ca)) == 2
    assert control.run("ping", "solo").returncode == 0


def test_an_agents_former_certificate_cannot_be_put_back(aged):
    control, host = aged.control, aged["solo"]
    with open(host.config.cert, encoding="ascii") as file:
        former = file.read()
    host.start()
    assert control.run("maintain").returncode == 0
    present = ctrl_exec.read_certificate(host.config.cert).serial
    os.unlink(ctrl_exec.request_secrets_path(host.config))  # who asks need not prove it
    context = support.dispatcher_context(control)
    status, answer = support.post(host.port, context, "/renew-complete", {"reqid": "r1", "cert": former})
    assert status == 400 and "older than the present one" in answer["error"]
    assert ctrl_exec.read_certificate(host.config.cert).serial == present


def test_adding_a_serial_that_is_there_reloads_nothing(two):
    site, _ = two
    host, own = site["solo"], support.dispatcher_context(site.control)
    body = {"serial": "ef" * 16, "action": "add", "reqid": "r1"}
    answers = [support.post(host.port, own, "/rotate-serial", body) for _ in range(3)]
    assert [(status, answer["had"]) for status, answer in answers] == [(200, False), (200, True), (200, True)]
    assert len(host.events("reload")) == 1


# --- what the API's user could leave for root --------------------------------------------------------------------


GOOD = {
    "reqid": "r1", "script": "hello", "mode": "sync", "username": "u", "source_ip": "", "finished": "",
    "started": "2026-01-02T03:04:05Z", "hosts": {"alpha": ["ok", 0, ""]},
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"reqid": "r2"}, {"reqid": "r1 HTTP/1.1\r\nHost: x\r\n\r\nPOST /run HTTP/1.1"}, {"script": "\x1b[2J"},
        {"mode": "x"}, {"started": "nonsense"}, {"finished": "9999-99-99T99:99:99"}, {"username": 1},
        {"hosts": {"../runs/evil": ["ok", 0, ""]}}, {"hosts": {"a": ["ok", 0, {}]}}, {"hosts": {"a": [["x"], 0, ""]}},
        {"hosts": {"\u00e4" * 241: ["ok", 0, ""]}}, {"hosts": {"a": ["ok", True, ""]}}, {"hosts": []},
    ],
)  # fmt: skip
def test_a_planted_record_is_named_and_not_believed(deployment, change):
    control = deployment.control
    path = control.put(ctrl_exec.VAR + "/runs/r1.json", json.dumps(dict(GOOD, **change)))
    try:
        for verb in ("status", "wait", "cancel", "follow"):
            done = control.run(verb, "r1")
            assert done.returncode == 1 and "r1.json" in done.err, done.err
        done = control.run("history")
        assert done.returncode == 1 and "r1.json" in done.err
    finally:
        os.unlink(path)


def test_a_good_record_is_read_as_it_was_written(deployment):
    path = deployment.control.put(ctrl_exec.VAR + "/runs/r1.json", json.dumps(GOOD))
    record = ctrl_exec.get_request(deployment.control.config.runs_dir, "r1")
    os.unlink(path)
    assert (record.script, record.hosts) == ("hello", {"alpha": ctrl_exec.Outcome("ok", 0, "")})


def test_a_fifo_among_the_locks_holds_up_nobody(deployment):
    directory = deployment.control.config.lock_dir
    os.makedirs(directory, exist_ok=True)
    path = os.path.join(directory, "x--y.lock")
    os.mkfifo(path)
    try:
        assert ctrl_exec.list_locks(directory) == []
    finally:
        os.unlink(path)


def test_a_lock_that_somebody_keeps_holds_a_status_up_for_a_moment_only(deployment):
    control = deployment.control
    reqid = control.json("run", "alpha", "hello")[1]["reqid"]
    with ctrl_exec.FileLock(os.path.join(control.config.runs_dir, ".lock"), mode=0o660):
        done = control.run("status", reqid)
    assert done.returncode == 0 and "[done  exit:0]" in done.out
    assert wait_until(lambda: [line for line in control.events("run-store-fail") if reqid in line])


def test_what_is_no_record_does_not_end_the_sweep(tmp_path):
    directory = str(tmp_path)
    old = time.time() - 3 * DAY
    os.mkdir(str(tmp_path / "a.json"))
    os.symlink("/nowhere", str(tmp_path / "b.json"))
    (tmp_path / "c.json").write_text("{}")
    for name in ("a.json", "b.json", "c.json"):
        os.utime(str(tmp_path / name), (old, old), follow_symlinks=False)
    ctrl_exec.sweep_requests(directory, DAY)
    assert sorted(name for name in os.listdir(directory) if name.endswith(".json")) == ["a.json"]


@pytest.mark.parametrize("reason, expected", [("SSLV3_ALERT_BAD_RECORD_MAC", False), ("TLSV1_ALERT_UNKNOWN_CA", True)])
def test_only_an_alert_about_our_certificate_says_that_nothing_was_done(reason, expected):
    error = support.ssl.SSLError(1, "x")
    error.reason = reason
    assert ctrl_exec.is_refusal(error) == expected


# --- the HTTP API -----------------------------------------------------------------------------------------------


@pytest.fixture
def api(fresh):
    """An API with 16 places and no hook, on a control host of its own: everything but /health is denied."""
    server = support.ApiServer(fresh("solo", start=False).control, conf="api_max_connections = 16\n").start()
    yield server
    server.stop()


def test_readers_that_take_nothing_do_not_keep_others_out(api):
    slow = []
    for _ in range(16):
        sock = support.socket.socket()
        sock.setsockopt(support.socket.SOL_SOCKET, support.socket.SO_RCVBUF, 2048)
        sock.connect(("127.0.0.1", api.port))
        sock.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 300)
        slow.append(sock)
    assert [api.call("GET", "/health").status for _ in range(5)] == [200] * 5
    for sock in slow:
        sock.close()


def test_who_may_not_ask_costs_no_search_for_hosts(api):
    for hosts in (["[0-99999]" * 200], ["*"] * 10_000, ["nobody"], ["solo"]):
        reply = api.call("POST", "/ping", {"hosts": hosts})
        assert (reply.status, json.loads(reply.body)["error"]) == (403, "not authorised: there is no auth hook here")


@pytest.mark.parametrize("host", ["evil.example:7445", "evil.example", "127.0.0.1.evil.example"])
def test_a_page_from_a_name_that_points_here_is_refused(api, host):
    headers = {"Host": host, "Origin": "http://" + host, "Content-Type": "application/json"}
    reply = api.call("POST", "/ping", {"hosts": ["solo"]}, **headers)
    error = json.loads(reply.body)["error"]
    assert reply.status == 403 and error.startswith("the Host %s is not a name of this API" % host.partition(":")[0])
    own = api.call("POST", "/ping", {"hosts": ["solo"]}, **dict(headers, Host="localhost"))  # only Origin is foreign
    assert (own.status, json.loads(own.body)["error"]) == (403, "web pages from elsewhere are refused")


# --- what first use found ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, hint",
    [
        (("run", "alpha", "hello", "-a"), "arguments of the script go after --"),
        (("run", "alpha"), "`alpha` is taken for the script, and no host is named"),
        (("run", "--tags", "a=b", "hello"), "ced discovery learns the tags of hosts"),
        (("pairing-token", "--ttl", "abc"), "--ttl: expected a whole number"),
        (("revoke", "abc123"), "--force"),
        (("revoke", "--dispatcher", "abc123"), "--force"),
        (("edit-agent", "alpha", "--rename", "beta"), "beta is paired already"),
    ],
)
def test_a_slip_is_answered_with_what_was_meant(deployment, words, hint):
    done = deployment.control.run(*words)
    assert done.returncode in (1, 2) and hint in done.err
    assert "approve" not in done.err


def test_commands_before_the_set_up_say_what_comes_first(tmp_path):
    control = support.Control(tmp_path / "c", set_up=False)
    for words in (("run", "x", "y"), ("ping", "x"), ("maintain",), ("rotate-cert",), ("serial-status",), ("retire-ca",)):
        done = control.run(*words)
        assert done.returncode == 1 and "ced setup-ca" in done.err, (words, done.err)
    done = control.run("setup-ca", "--next")
    assert done.returncode == 1 and "there is no CA yet" in done.err
    assert os.listdir(control.file(ctrl_exec.ETC)) == ["ctrl-exec.conf"]


def test_a_hook_that_is_put_on_a_host_counts_from_the_next_request_on():
    with tempfile.TemporaryDirectory() as top:  # into which the agent's unprivileged half can look
        os.chmod(top, 0o755)
        with support.Deployment(top, ("solo",)) as site:
            assert site.control.run("run", "solo", "hello").returncode == 0
            site["solo"].put(ctrl_exec.AGENT_ETC + "/auth-hook", "#!/bin/sh\nexit 3\n", 0o755)
            done = site.control.run("run", "solo", "hello")
    assert done.returncode == 1 and "insufficient privilege" in done.out


def test_a_run_that_was_cancelled_is_remembered_as_ended(deployment):
    control = deployment.control
    reqid = control.json("run", "--async", "alpha", "sleep", "--", "300")[1]["reqid"]
    assert control.run("cancel", reqid).returncode == 0
    runs = {run["reqid"]: run for run in control.json("history")[1]["runs"]}
    assert (runs[reqid]["hosts"]["alpha"]["state"], bool(runs[reqid]["finished"])) == ("failed", True)


def test_discovery_says_no_of_a_script_whose_profile_cannot_be_applied(fresh):
    site = fresh("solo", start=False)
    host = site["solo"]
    host.configure("[profile cap]\ncaps = cap_net_raw\n")
    host.script("raw", "echo\n", "profile=cap")
    host.start()
    scripts = site.control.json("discovery", "solo")[1]["hosts"]["solo"]["scripts"]
    assert {one["name"]: one["executable"] for one in scripts}["raw"] is False


# --- what stands where others may write ------------------------------------------------------------------------


@pytest.mark.parametrize("trap", ["link", "fifo", "directory", "endless"])
def test_a_trap_among_the_records_of_requests_is_named_and_passed_by(deployment, tmp_path, trap):
    control = deployment.control
    path = os.path.join(control.config.runs_dir, "abcdef12.json")
    secret = tmp_path / "secret"
    secret.write_text('{"reqid": "abcdef12"}')
    if trap == "link":
        os.symlink(str(secret), path)
    elif trap == "fifo":
        os.mkfifo(path)
    elif trap == "directory":
        os.mkdir(path)
    else:
        os.symlink("/dev/zero", path)
    try:
        for words in (("history",), ("status", "abcdef12"), ("wait", "abcdef12"), ("cancel", "abcdef12")):
            done = control.run(*words)
            assert done.returncode == 1 and "abcdef12.json" in done.err and "Traceback" not in done.err, done
        assert control.run("list-locks").returncode == 0
    finally:
        os.rmdir(path) if trap == "directory" else os.unlink(path)


@pytest.mark.parametrize("number", ["1" + "0" * 400, "Infinity", "-Infinity", "NaN", "1e999"])
def test_numbers_that_are_none_spoil_their_own_record_only(deployment, number):
    control = deployment.control
    path = os.path.join(control.config.runs_dir, "abcdef13.json")
    hosts = '{"alpha": ["ok", %s, ""]}' % number
    with open(path, "w") as file:
        file.write('{"reqid": "abcdef13", "script": "s", "mode": "sync", "username": "", "source_ip": "", '
                   '"started": "2026-01-01T00:00:00Z", "hosts": %s}' % hosts)  # fmt: skip
    try:
        done = control.run("history")
        assert done.returncode == 1 and "abcdef13.json" in done.err and "Traceback" not in done.err
    finally:
        os.unlink(path)


def test_a_pairing_request_received_at_no_time_is_named(fresh):
    control = fresh("solo", start=False).control
    place = control.config.pairing_dir
    ctrl_exec.make_directory(place, 0o700)
    for number, received in enumerate(["1" + "0" * 400, "Infinity"]):
        with open(os.path.join(place, "abcdef0%d.json" % number), "w") as file:
            file.write('{"received": %s}' % received)
    done = control.run("list-requests")
    assert "abcdef00.json" in done.err and "abcdef01.json" in done.err and "Traceback" not in done.err


def test_a_lock_that_is_a_link_to_another_file_is_not_written_over(deployment, tmp_path):
    control = deployment.control
    own = tmp_path / "own"
    own.write_text("of somebody else")
    own.chmod(0o600)
    path = ctrl_exec._lock_path(control.config.lock_dir, "alpha", "hello")
    os.link(str(own), path)
    try:
        done = control.run("run", "alpha", "hello")
        assert done.returncode != 0 and "not a file of its own" in done.err, done
        assert own.read_text() == "of somebody else" and own.stat().st_mode & 0o777 == 0o600
    finally:
        os.unlink(path)
    assert control.run("run", "alpha", "hello").returncode == 0


# --- who holds what ----------------------------------------------------------------------------------------------


def test_busy_names_the_request_and_its_user_but_not_those_of_another_dispatcher(two):
    site, bee = two
    solo = site["solo"]
    mine = site.control.json("run", "solo", "sleep", "--async", "--username", "ann", "--", "600")[1]["reqid"]
    done = site.control.run("run", "solo", "sleep", "--", "1")
    assert "sleep is already running here (request %s of ann)" % mine in done.out
    status, answer = support.post(solo.port, bee, "/run", {"script": "sleep", "reqid": "r9", "args": ["1"]})
    assert status == 409 and answer["error"].endswith("(for dispatcher control)") and mine not in str(answer)
    shown = site.control.run("list-locks").out
    assert "request %s (--async): sleep may still run on solo" % mine in shown
    assert site.control.run("cancel", mine).returncode == 0
    assert mine not in site.control.run("list-locks").out


def test_a_busy_script_is_busy_also_when_its_record_cannot_be_read(fresh):
    site = fresh()
    solo = site["solo"]
    reqid = site.control.json("run", "solo", "sleep", "--async", "--", "600")[1]["reqid"]
    path = os.path.join(solo.config.runs_dir, "control", reqid + ".json")
    with open(path) as file:
        text = file.read()
    with open(path, "w") as file:
        file.write("{")
    done = site.control.run("run", "solo", "sleep", "--", "1")
    assert done.returncode == 1 and "busy: sleep is already running here\n" in done.out, done
    with open(path, "w") as file:
        file.write(text)
    assert site.control.run("cancel", reqid).returncode == 0


def test_a_conflict_names_the_request_that_holds_the_lock(deployment):
    control = deployment.control
    running = control.spawn("run", "alpha", "sleep", "--username", "ann", "--", "600", stdout=support.subprocess.DEVNULL)
    reqid = control.wait_for_lock()
    done = control.run("run", "alpha", "sleep", "--", "1")
    assert done.returncode == 1 and "alpha:sleep (request %s of ann, since 20" % reqid in done.err
    shown = json.loads(control.run("run", "alpha", "sleep", "--json", "--", "1").out)
    assert (shown["error"], shown["conflicts"]) == ("locked", ["alpha:sleep"])
    wait_until(lambda: control.run("cancel", reqid).returncode == 0, what="the run")
    running.wait(60)


def test_masses_of_values_that_come_again_and_again_are_not_kept():
    code = (
        "import re, sys; sys.path.insert(0, sys.argv[1]); import ctrl_exec\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) // 1024\n"
        "answer = ctrl_exec.AnswerRoom(ctrl_exec.Room())\n"
        "def refuse():\n"
        "    try:\n"
        "        answer.parse(bytearray(b'1,' * (8 << 20)), ctrl_exec.Deadline(9))\n"
        "    except ctrl_exec.BadRequest:\n"
        "        return peak()\n"
        "first = refuse()\n"
        "print(max(refuse() for _ in range(8)) - first)"
    )
    words = [support.sys.executable, "-I", "-c", code, os.path.dirname(support.PROGRAM)]
    done = support.subprocess.run(words, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 20  # MiB; the copies of one answer are 48
