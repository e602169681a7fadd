"""Certificates change: for a year, by two dispatchers, beside older agents and wrong clocks, with kill -9."""

# ruff: noqa: F811

import json
import os
import random
import signal
import threading
import time

import ctrl_exec
import older
import pytest
import support
from support import wait_until
from test_21_upkeep import (  # noqa: F401  (home and site are fixtures)
    DAY, OPENSSL, Saved, age, assert_all_answer, ced, clock_ahead, die_at, entry, findings, home, impostor,
    install, maintain, overwrite, ping, put_map, read, sign, site, steady, trusted, well,
)  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # `ced` forks

# --- kill -9 ---------------------------------------------------------------------------------------------


def check_whole(site):
    """Nothing is half written, the identity fits, and every host answers."""
    for directory, _, names in os.walk(site.control.file(ctrl_exec.VAR)):
        for name in names:
            if name.endswith(".json") and not name.startswith("."):
                assert isinstance(json.loads(read(os.path.join(directory, name))), dict)
    identity = ctrl_exec.dispatcher_identity(site.control.config)
    ctrl_exec.check_identity(OPENSSL, identity, "sslclient")
    for former in ctrl_exec.find_former(identity):
        OPENSSL.check_key_match(read(former.cert), former.key)
    assert_all_answer(site)


def prepare_successor(site):
    well(ced(site.control, "setup-ca", "--next"))
    steady(site)


def is_rotated(site, done):
    return done.returncode == 0 and site.control.serial() in trusted(site["alpha"])


def has_successor(site, done):
    handed = ctrl_exec.load_handover(site.control.config.ca)
    return bool(handed) and (done.returncode == 0 or "the CA has a successor" in done.err)


def is_replaced(site, done):
    is_over = done.returncode == 0 or "first: ced setup-ca --next" in done.err
    steady(site)
    cas = ctrl_exec.load_cas(site.control.config.ca)
    return is_over and len(cas) == 1 and ctrl_exec.load_cas(site["alpha"].config.ca) == cas


def is_renewed(site, done):
    steady(site)
    record = entry(site, "alpha")
    is_new = record.expiry > ctrl_exec.iso_time(time.time() + 360 * DAY)
    return is_new and record.serial == ctrl_exec.read_certificate(site["alpha"].config.cert).serial


VERBS = {
    "rotate-cert": (("rotate-cert",), lambda site: None, is_rotated, 8),
    "setup-ca --next": (("setup-ca", "--next"), lambda site: None, has_successor, 3),
    "retire-ca": (("retire-ca",), prepare_successor, is_replaced, 5),
    "a renewal": (("ping", "alpha"), lambda site: age(site, "alpha"), is_renewed, 3),
}


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_a_ced_killed_at_any_write_leaves_all_working_and_the_next_call_goes_on(fresh, verb):
    words, prepare, is_through, least = VERBS[verb]
    site = fresh("alpha")
    assert_all_answer(site)
    prepare(site)
    saved, number = Saved(site), 0
    while True:
        number += 1
        done = ced(site.control, *words, change=lambda: die_at(number, site.control.root))
        if done.returncode != -signal.SIGKILL:
            break
        check_whole(site)
        assert is_through(site, ced(site.control, *words)), "killed before change %d" % number
        check_whole(site)
        saved.restore()
    well(done)
    assert number > least


# --- a year ----------------------------------------------------------------------------------------------


def dates(path, known={}):  # noqa: B006  (a cache)
    data = read(path)
    if data not in known:
        known[data] = ctrl_exec.parse_certificate(data)
    return known[data]


def test_a_year_of_maintain_loses_no_host(tmp_path):
    """TLS judges by the real clock: a certificate made in the past must still be valid now, so its life is
    a year, and an early renewal makes for several rotations."""
    chance, start = random.Random(21), -363 * DAY
    site = support.Deployment(tmp_path / "year", (), start=False)
    control = site.control
    control.put(
        ctrl_exec.ETC + "/ctrl-exec.conf",
        "dispatcher_id = control\ncert_days = 365\ncert_renewal_days = 300\ncert_overlap_days = 20\n", 0o640,
    )  # fmt: skip
    control.config = ctrl_exec.load_config("dispatcher", "", control.root)
    os.unlink(control.config.cert)
    well(ced(control, "setup-ctrl-exec", clock=start))
    with clock_ahead(start):
        for name in ("one", "two", "three"):
            site.add(name).configure("run_retention_hours = 19200\n")  # no clock is too far from ours
    serials, away, renewed = [control.serial()], {}, set()
    with site:
        days = 0
        while days < 363:
            for name, host in site.hosts.items():
                if name in away and days >= away[name]:
                    del away[name]
                    host.start()
                elif name not in away and chance.random() < 0.05:
                    away[name] = days + chance.choice((9, 18, 45))
                    host.stop()
            clock = start + days * DAY
            done = ced(control, "maintain", clock=clock)
            assert "FAIL" not in done.out or len(away) == 3, done.out
            moment = time.time() + clock
            for path in (control.config.cert, *(host.config.cert for host in site.hosts.values())):
                info = dates(path)
                assert info.not_before <= moment < info.not_after, (days, path)
                if "agent" in path:
                    renewed.add(info.serial)
            if control.serial() != serials[-1]:
                serials.append(control.serial())
            days += 9
        for name in away:
            site[name].start()
        maintain(site)
        assert_all_answer(site)
        assert len(set(serials)) >= 4 and len(renewed) >= 6
        for host in site.hosts.values():
            assert trusted(host)[control.serial()] == "control" and len(trusted(host)) <= 3
            assert dates(host.config.cert).not_after > time.time() + 365 / 3 * DAY
        well(ced(control, "serial-status"))  # all are current


# --- each refusal names its cause, on both sides ---------------------------------------------------------


def other_ca(tmp_path):
    """The certificate of a CA that nobody here knows."""
    path = str(tmp_path / "stranger" / "ca.crt")
    ctrl_exec.new_ca(OPENSSL, path, "ec", "stranger")
    return path


def bad_certificate(site, kind, key, name, profile, tmp_path, monkeypatch):
    """A certificate for a key that is wrong in one way."""
    request = OPENSSL.new_request(key, name)
    if kind == "expired":
        return sign(site, request, name, profile, -40, 30)
    if kind == "not yet valid":
        return sign(site, request, name, profile, 3)
    if kind == "wrong purpose":
        purpose = {"agent": "clientAuth", "dispatcher": "serverAuth"}[profile]
        text = ctrl_exec._EXTENSIONS["agent"].replace("serverAuth", purpose)
        monkeypatch.setitem(ctrl_exec._EXTENSIONS, profile, text)
        return sign(site, request, name, profile)
    if kind == "wrong name":
        return sign(site, request, "beta", profile)
    if kind == "unknown CA":
        ca = other_ca(tmp_path)
        return OPENSSL.sign(request, name, profile, 30, ca, ctrl_exec.ca_key_path(ca))
    return sign(site, request, name, profile)  # and it will be revoked, or is in no map


AGENTS_FAULT = {  # what is wrong with an agent's certificate: what `ced ping` says, what the agent logs
    "expired": ("its certificate is refused: certificate has expired (or a clock is wrong)", "is expired"),
    "not yet valid": ("its certificate is refused: certificate is not yet valid (or a", "is not valid"),
    "wrong purpose": ("refused: unsuitable certificate purpose", "is not for this purpose"),
    "wrong name": ("shows the certificate of beta, not of alpha", ""),
    "unknown CA": ("its certificate is refused: unable to get local issuer", "does not know the CA"),
    "revoked": ("is revoked", ""),
}


@pytest.mark.parametrize("kind", sorted(AGENTS_FAULT))
def test_a_bad_certificate_of_an_agent_is_refused_with_its_cause(site, kind, tmp_path, monkeypatch):
    said, logged = AGENTS_FAULT[kind]
    alpha = site["alpha"]
    pem = bad_certificate(site, kind, alpha.config.key, "alpha", "agent", tmp_path, monkeypatch)
    serial = install(site, "alpha", pem)
    if kind == "revoked":
        well(ced(site.control, "revoke", serial))
    result = ping(site, "alpha")["alpha"]
    assert result["status"] == "unreachable" and said in result["error"], result
    if logged:
        reason = wait_until(lambda: alpha.events("tls-failure"), what="the agent's log")[-1]
        assert logged in reason
    assert not alpha.events("ping")


DISPATCHERS_FAULT = {  # the same of a dispatcher's; the agent's log as action and reason
    "expired": ("it says that our certificate is expired", "tls-failure", "certificate has expired"),
    "not yet valid": ("our certificate is not valid", "tls-failure", "certificate is not yet valid"),
    "wrong purpose": ("our certificate is not for this purpose", "tls-failure", "certificate purpose"),
    "unknown CA": ("it does not know the CA of our certificate", "tls-failure", "unable to get local issuer"),
    "revoked": ("certificate revoked", "revoked-cert", "SERIAL="),
    "in no map": ("serial mismatch", "serial-reject", "SERIAL="),
}


@pytest.mark.parametrize("kind", sorted(DISPATCHERS_FAULT))
def test_a_bad_certificate_of_a_dispatcher_is_refused_with_its_cause(site, kind, tmp_path, monkeypatch):
    said, action, logged = DISPATCHERS_FAULT[kind]
    alpha, config = site["alpha"], site.control.config
    pem = bad_certificate(site, kind, config.key, "control", "dispatcher", tmp_path, monkeypatch)
    overwrite(config.cert, pem.encode())
    if kind == "revoked":
        ctrl_exec.add_revoked(alpha.config.revoked_serials, [site.control.serial()], "for a test")
        assert "RESULT=ok" in alpha.reload()
    result = ping(site, "alpha")["alpha"]
    assert said in result["error"] and result["status"] in ("unreachable", "refused"), result
    assert logged in wait_until(lambda: alpha.events(action), what="the agent's log")[-1]
    assert not alpha.events("ping")


# --- an end in the middle of a run -----------------------------------------------------------------------


def test_a_run_outlives_the_agents_certificate_and_the_next_connection_is_refused(site, tmp_path):
    alpha, gate = site["alpha"], tmp_path / "gate"
    os.chmod(tmp_path, 0o755)
    alpha.script("gated", 'while [ ! -e "$1" ]; do sleep 0.02; done; echo through\n')
    ends = 8.0 - DAY  # of a day's life
    request = OPENSSL.new_request(alpha.config.key, "alpha")
    install(site, "alpha", sign(site, request, "alpha", start=ends / DAY, days=1))
    until = ctrl_exec.read_certificate(alpha.config.cert).not_after
    heard, runs = [], os.path.join(alpha.config.runs_dir, "control")
    words = ("run", "alpha", "gated", "--json", "--", str(gate))
    thread = threading.Thread(target=lambda: heard.append(site.control.run(*words)))
    thread.start()
    wait_until(lambda: os.listdir(runs) if os.path.isdir(runs) else [], what="the run's record")
    assert time.time() < until
    time.sleep(until + 0.5 - time.time())
    gate.touch()
    thread.join(60)
    (result,) = json.loads(heard[0].out)["results"]
    assert (result["exit"], result["stdout"]) == (0, "through\n")
    assert alpha.record(result["reqid"])["status"] == "done"
    assert "certificate has expired" in ping(site, "alpha")["alpha"]["error"]
    assert ced(site.control, "check").out.count("has expired")


# --- wrong clocks on the control host --------------------------------------------------------------------


@pytest.mark.parametrize("hours", [-24, -1, 1])
def test_a_certificate_made_by_a_clock_that_is_slow_or_an_hour_fast_works_at_once(site, hours):
    for name in site.hosts:
        age(site, name)
    assert sum("renewed" in line for line in maintain(site, clock=hours * 3600)) == 2
    well(ced(site.control, "rotate-cert", clock=hours * 3600))
    assert_all_answer(site)


WRONG = {"a day fast": (DAY, "not yet valid"), "1970": (-time.time(), "expired")}


@pytest.mark.parametrize("clock", sorted(WRONG))
def test_an_agents_certificate_made_by_a_wrong_clock_is_refused_in_words_and_loses_nothing(site, clock):
    ahead, words = WRONG[clock]
    old = age(site, "alpha")
    if clock == "1970":  # by which nothing is due; the agent is asked to move to a new CA instead
        well(ced(site.control, "setup-ca", "--next"))
    shown = maintain(site, clock=ahead)
    (line,) = [line for line in shown if line.startswith("FAIL alpha")]
    assert "clock" in line or (words in line and words in "".join(site["alpha"].events("renew-complete")))
    assert ctrl_exec.read_certificate(site["alpha"].config.cert).serial == old
    assert_all_answer(site)
    steady(site)
    assert entry(site, "alpha").expiry > ctrl_exec.iso_time(time.time() + 360 * DAY)
    assert_all_answer(site)


@pytest.mark.parametrize("clock", sorted(WRONG))
def test_a_rotation_by_a_wrong_clock_locks_nobody_out(site, clock):
    done = ced(site.control, "rotate-cert", clock=WRONG[clock][0])
    assert done.returncode in (0, 1)
    assert_all_answer(site)  # once the clock is right
    well(ced(site.control, "rotate-cert"))
    assert_all_answer(site)
    assert site.control.serial() in trusted(site["alpha"])


def test_maintain_by_a_clock_that_is_a_year_fast_locks_nobody_out(site):
    shown = maintain(site, clock=400 * DAY)
    assert_all_answer(site)
    maintain(site)
    assert_all_answer(site)
    assert shown


# --- several dispatchers ------------------------------------------------------------------------------


@pytest.fixture
def second(site, tmp_path):
    """Another control host of the same CA, trusted by both hosts."""
    twin = support.Control(tmp_path / "twin", set_up=False)
    twin.put(ctrl_exec.ETC + "/ctrl-exec.conf", "dispatcher_id = twin\n", 0o640)
    twin.config = ctrl_exec.load_config("dispatcher", "", twin.root)
    ca = site.control.config.ca
    twin.put(ctrl_exec.ETC + "/ca.crt", read(ca))
    twin.put(ctrl_exec.ETC + "/ca.key", read(ctrl_exec.ca_key_path(ca)), 0o600)
    well(ced(twin, "setup-ctrl-exec"))
    for host in site.hosts.values():
        put_map(host, {**trusted(host), twin.serial(): "twin"})
        agent = entry(site, host.name)._replace(dispatcher_serial="", serial_status="")
        with ctrl_exec.registry_lock(twin.config.registry_dir):
            ctrl_exec.save_agent(twin.config.registry_dir, agent)
    return twin


def test_a_second_dispatcher_rotates_retires_and_revokes_only_its_own(site, second):
    alpha, first, own = site["alpha"], site.control.serial(), second.serial()
    well(ced(second, "rotate-cert"))
    assert trusted(alpha) == {first: "control", own: "twin", second.serial(): "twin"}
    well(ced(site.control, "rotate-cert"))
    present = {site.control.serial(): "control", second.serial(): "twin"}
    assert trusted(alpha) == {first: "control", own: "twin", **present}
    well(ced(second, "maintain", clock=31 * DAY))
    assert trusted(alpha) == {first: "control", **present}
    assert ced(second, "revoke", "--dispatcher", first).returncode == 2
    shown = findings(ced(second, "revoke", "--dispatcher", first, "--force", "--json"))
    assert "FAIL dispatcher serial %s is not refused yet by alpha, beta" % first in shown
    assert trusted(alpha) == {first: "control", **present}
    assert "serial %s belongs to dispatcher control" % first in second.log()
    for control in (site.control, second):
        assert well(ced(control, "run", "--all", "hello")).returncode == 0
    assert maintain(site, clock=31 * DAY) == ["OK certificate %s is retired" % first]
    assert trusted(alpha) == present


def test_dispatchers_that_share_a_ca_issue_no_serial_twice_and_follow_each_others_renewals(site, second):
    serials = {age(site, "alpha")}
    for control in (second, site.control) * 2:
        first = findings(well(ced(control, "maintain", "--json")))[0]
        assert first.startswith("OK alpha: its certificate is renewed") == (control is second)
        assert_all_answer(site)
        serials.add(entry(site, "alpha").serial)
        age_pem = sign(site, OPENSSL.new_request(site["alpha"].config.key, "alpha"), "alpha", start=-200)
        if control is site.control:
            overwrite(site["alpha"].config.cert, age_pem.encode())
            assert "RESULT=ok" in site["alpha"].reload()
    assert len(serials) == 3 and all(len(serial) >= 16 for serial in serials)


# --- an older agent -----------------------------------------------------------------------------------


@pytest.fixture
def museum(tmp_path):
    """An older control host taken over in place, a peer as its older agent `relic`, and an agent of this
    release, `modern`, that got its certificate from it."""
    past = older.OlderSite(tmp_path / "past")
    control = support.Control(tmp_path / "control", set_up=False)
    past.give_control(control)
    place = support.Deployment.__new__(support.Deployment)
    place.top, place.control, place.hosts = str(tmp_path), control, {}
    modern = place.hosts["modern"] = support.Host(tmp_path / "modern", "modern", "rate_limit_disable = yes\n")
    past.give_agent(modern)
    modern.script("hello", "echo hello\n")
    modern.start()
    relic = past.agent("relic")
    for name, port in (("relic", 1), ("modern", modern.port)):
        facts = {"hostname": name, "ip": "127.0.0.1", "port": port, "registered": "long ago"}
        control.put(ctrl_exec.VAR + "/agents/%s.json" % name, json.dumps(facts), 0o640)
    hello = {"status": "ok", "host": "relic", "version": "0.9"}
    ran = {"script": "hello", "exit": 0, "stdout": "hi\n", "stderr": ""}
    scripts = [{"name": "hello", "path": "/x", "executable": True}]

    def answer(asked, body, serial):
        if serial != past.dispatcher.serial:
            return 403, {"error": "serial mismatch", "status": "forbidden"}
        return {
            "POST /ping": (200, {**hello, "expiry": "Nov 20 10:00:00 2027 GMT"}),
            "POST /run": (200, {**ran, "reqid": body.get("reqid")}),
            "GET /capabilities": (200, {**hello, "scripts": scripts}),
        }.get(asked, (404, {"error": "not found"}))

    with impostor(place, "relic", answer, relic.cert, relic.key, "1.0", past.ca):
        yield place
    modern.stop()


def test_an_older_agent_is_served_and_what_it_cannot_do_is_said_in_words(museum):
    control = museum.control
    for words in (("ping", "--all"), ("run", "--all", "hello"), ("discovery",)):
        done = well(ced(control, *words))
        assert "relic" in done.out and "modern" in done.out
    done = ced(control, "maintain", "--json", clock=200 * DAY)
    relic = [line for line in findings(done) if "relic" in line]
    assert len(relic) == 1 and "it runs an older agent: pair it again before 20" in relic[0]
    reqid = well(ced(control, "run", "relic", "hello", "--json")).json["reqid"]
    done = ced(control, "cancel", reqid)
    assert "cancel: relic runs an older agent" in done.out


def test_an_older_agent_is_reached_with_the_former_certificate_after_a_rotation(museum):
    control, old = museum.control, museum.control.serial()
    for _ in range(2):
        done = ced(control, "rotate-cert")
        assert "relic: it has not heard of it" in done.out, done
    assert control.serial() != old and control.serial() in trusted(museum["modern"])
    assert {name: one["status"] for name, one in ping(museum).items()} == {"modern": "ok", "relic": "ok"}
    for words in (("run", "--all", "hello"), ("discovery",), ("run", "relic", "hello", "--stream")):
        well(ced(control, *words))
    shown = maintain(museum, clock=31 * DAY)
    assert any(line.startswith("WARN relic: stale") for line in shown)
    assert ping(museum)["relic"]["status"] == "ok"


def test_check_names_the_weak_ca_of_an_older_installation_and_how_to_move_on(museum):
    done = ced(museum.control, "check")
    (line,) = [line for line in done.out.splitlines() if "of an older release" in line]
    assert line.startswith("WARN") and "ced setup-ca --next, ced maintain, ced retire-ca" in line
    (line,) = [line for line in done.out.splitlines() if line.startswith("WARN  relic")]
    assert "an older agent: it does not tell the time" in line
    assert well(done)
