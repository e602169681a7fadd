"""Requests that are proved past the agent's front: what the supervisor takes, and from whom."""

import json
import os
import re
import time

import ctrl_exec
import pytest
import support

OPENSSL = ctrl_exec.OpenSSL()
SECRET = "ab" * 32
BODY = {"script": "hello", "reqid": "r1", "args": ["a"], "username": "me", "token": "t"}


def secrets_of(host):
    return ctrl_exec.load_request_secrets(ctrl_exec.request_secrets_path(host.config))


def own_secret(site, name="solo"):
    return ctrl_exec.find_secret(ctrl_exec.secret_directory(site.control.config), name)


def agree(site, name="solo", is_used=True):
    """What pairing leaves on both sides."""
    config = site.control.config
    ctrl_exec.save_secret(ctrl_exec.secret_directory(config), name, SECRET, config.key)
    entry = ctrl_exec.RequestSecret(SECRET, is_used)
    path = ctrl_exec.request_secrets_path(site[name].config)
    ctrl_exec.edit_request_secrets(path, lambda known: known.update(control=entry))


@pytest.fixture
def site(fresh):
    made = fresh()
    agree(made)
    return made


def ask(site, path, body, secret=SECRET, moment=None, signed=None, signed_path=None):
    """(status, answer) of a request with a proof: of `signed` and `signed_path`, if those are not what is sent."""
    data = json.dumps(body).encode()
    said = data if signed is None else json.dumps(signed).encode()
    moment = ctrl_exec.iso_time(time.time()) if moment is None else moment
    proof = ctrl_exec.request_proof(secret, "POST", signed_path or path, moment, said)
    head = "POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\nConnection: close\r\n" % (path, len(data))
    head += "Ctrl-Exec-Time: %s\r\nCtrl-Exec-Proof: %s\r\n\r\n" % (moment, proof)
    context = support.dispatcher_context(site.control)
    status, _, reply = support.send_raw(site["solo"].port, context, head.encode() + data)
    return status, json.loads(reply)


def plain(site, path, body):
    return support.post(site["solo"].port, support.dispatcher_context(site.control), path, body)


CHANGES = {
    "/run": BODY,
    "/cancel": {"reqid": "r1"},
    "/rotate-serial": {"reqid": "r1", "action": "add", "serial": "cd" * 16},
    "/renew": {"reqid": "r1"},
    "/renew-complete": {"reqid": "r1", "cert": "x"},
}


# --- one's own requests ----------------------------------------------------------------------------------------


def test_every_verb_works_with_a_host_that_wants_proof(site):
    control = site.control
    assert control.run("run", "solo", "hello").out.endswith("hello\n")
    assert control.run("run", "solo", "hello", "--stream").returncode == 0
    reqid = control.json("run", "solo", "hello", "--async")[1]["reqid"]
    for words in (("wait", reqid), ("status", reqid), ("follow", reqid), ("cancel", reqid), ("ping", "solo")):
        assert control.run(*words).returncode == 0, words
    assert control.run("discovery").returncode == 0
    for words in (("rotate-cert",), ("maintain",)):
        done = control.run(*words)
        assert done.returncode == 0, done.out
    assert control.run("run", "solo", "hello").returncode == 0
    assert site["solo"].events("proof-reject") == []


def test_the_api_proves_its_requests_as_well(site):
    with support.ApiServer(site.control) as api:
        reply = api.run_script(["solo"], "hello")
        assert (reply.status, reply.json["results"][0]["stdout"]) == (200, "hello\n")


# --- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(CHANGES))
def test_nothing_is_changed_without_a_proof(site, path):
    before = ctrl_exec.load_trust_map(site["solo"].config.trusted_dispatchers_path)
    status, answer = plain(site, path, CHANGES[path])
    assert status == 403 and "not proved" in answer["error"]
    assert site["solo"].events("proof-reject") and not site["solo"].events("run")
    assert ctrl_exec.load_trust_map(site["solo"].config.trusted_dispatchers_path) == before


def test_what_only_looks_needs_none(site):
    assert plain(site, "/ping", {"reqid": "r1"})[0] == 200
    context = support.dispatcher_context(site.control)
    assert support.post(site["solo"].port, context, "/capabilities", b"", "GET")[0] == 200


@pytest.mark.parametrize("field", ["args", "script", "username", "token", "reqid", "async", "timeout"])
def test_a_proof_of_another_body_is_none(site, field):
    other = {"args": ["b"], "script": "other", "username": "root", "token": "u", "reqid": "r2"}
    site["solo"].script("other", "true\n")
    site["solo"].reload()
    changed = dict(BODY, **{field: other.get(field, True if field == "async" else 9)})
    status, answer = ask(site, "/run", changed, signed=BODY)
    assert status == 403 and "proof is wrong" in answer["error"]


def test_a_proof_by_another_secret_or_of_another_path_is_none(site):
    assert ask(site, "/run", BODY, secret="cd" * 32)[0] == 403
    assert ask(site, "/cancel", {"reqid": "r1"}, signed_path="/renew")[0] == 403
    assert ask(site, "/run", BODY, signed_path="/run?x=1")[0] == 403


@pytest.mark.parametrize("hours", [-13, 13])
def test_a_request_of_another_day_is_refused_with_the_distance_of_the_clocks(site, hours):
    moment = ctrl_exec.iso_time(time.time() + hours * 3600)
    status, answer = ask(site, "/run", BODY, moment=moment)
    assert status == 403 and re.search("clock is 4(679|680)[0-9] s", answer["error"])
    assert ("behind" if hours < 0 else "ahead") in answer["error"]


@pytest.mark.parametrize("moment", ["", "now", "2026-01-01", "9" * 64])
def test_a_time_that_is_none_is_refused(site, moment):
    assert ask(site, "/run", BODY, moment=moment)[0] == 403


def test_a_run_that_is_replayed_runs_once_and_a_change_of_trust_is_refused(site):
    moment = ctrl_exec.iso_time(time.time())
    for _ in range(2):
        status, answer = ask(site, "/run", BODY, moment=moment)
        assert (status, answer["stdout"]) == (200, "hello\n")
    assert len(site["solo"].events("run")) == 1
    body = {"reqid": "r7", "action": "add", "serial": "cd" * 16}
    assert ask(site, "/rotate-serial", body, moment=moment)[0] == 200
    assert ask(site, "/rotate-serial", dict(body, action="remove", reqid="r8"), moment=moment)[0] == 200
    status, answer = ask(site, "/rotate-serial", body, moment=moment)
    assert status == 403 and "before" in answer["error"]
    assert "cd" * 16 not in ctrl_exec.load_trust_map(site["solo"].config.trusted_dispatchers_path)


# --- a front that was taken over -------------------------------------------------------------------------------


def job_of(body, **changes):
    """What a front passes on, its proof right."""
    data = json.dumps(body).encode()
    moment = ctrl_exec.iso_time(time.time())
    proof = ctrl_exec.request_proof(SECRET, "POST", "/run", moment, data)
    job = ctrl_exec.read_job("run", data)._replace(owner="control", peer_ip="192.0.2.1", serial="ab")
    return job._replace(body=data.decode(), time=moment, proof=proof, **changes)


def test_the_supervisor_takes_what_the_front_passes_on_as_it_came(site):
    ctrl_exec._check_proof(site["solo"].config, job_of(BODY))


@pytest.mark.parametrize(
    "change",
    [
        {"script": "fails"}, {"args": ("b",)}, {"args": ()}, {"username": "root"}, {"token": ""},
        {"timeout": 9}, {"mode": "async"}, {"reqid": "r2"}, {"operation": "cancel"}, {"wait": 3},
        {"body": "{}"}, {"body": ""}, {"proof": ""}, {"proof": "0" * 64}, {"time": "2026-01-01T00:00:00Z"},
    ],
    ids=str,
)  # fmt: skip
def test_a_front_cannot_change_what_it_passes_on(site, change):
    with pytest.raises(ctrl_exec.Denied):
        ctrl_exec._check_proof(site["solo"].config, job_of(BODY)._replace(**change))


def test_a_front_cannot_agree_anew(site):
    status, answer = plain(site, "/agree", {"reqid": "r1", "exchange": OPENSSL.new_exchange()[1]})
    assert status == 403 and "pair again" in answer["error"]
    assert secrets_of(site["solo"])["control"].secret == SECRET


# --- pairs of earlier releases -----------------------------------------------------------------------------------


def test_maintain_agrees_once_and_from_the_first_proof_on_nothing_else_is_taken(fresh):
    site = fresh()
    assert plain(site, "/run", BODY)[0] == 200  # as the older release did
    assert site.control.run("ping", "solo").returncode == 0 and own_secret(site) == ""
    done = site.control.run("maintain")
    assert (done.returncode, done.out) == (0, "OK    nothing is due\n")
    first = own_secret(site)
    assert secrets_of(site["solo"]) == {"control": ctrl_exec.RequestSecret(first, True)}  # it has proved it at once
    assert site.control.run("run", "solo", "hello").returncode == 0
    assert plain(site, "/run", dict(BODY, reqid="r3"))[0] == 403
    assert site.control.run("maintain").returncode == 0 and own_secret(site) == first
    assert first not in site["solo"].log() + site.control.log()


def test_an_agreement_whose_answer_was_lost_is_made_again(fresh):
    site = fresh()
    public = OPENSSL.new_exchange()[1]
    assert plain(site, "/agree", {"reqid": "r1", "exchange": public})[0] == 200
    lost = secrets_of(site["solo"])["control"].secret
    assert site.control.run("run", "solo", "hello").returncode == 0
    assert site.control.run("maintain").returncode == 0
    assert own_secret(site) == secrets_of(site["solo"])["control"].secret != lost
    assert site.control.run("run", "solo", "hello").returncode == 0


@pytest.mark.parametrize("public", ["", "zz", "04" * 65, "02" + "ab" * 64, "04" + "ab" * 64])
def test_what_is_no_public_key_is_agreed_on_with_nobody(fresh, public):
    site = fresh()
    status, answer = plain(site, "/agree", {"reqid": "r1", "exchange": public})
    assert status == 400 and answer["error"] and secrets_of(site["solo"]) == {}
    assert site["solo"].events("bug") == []


def test_a_host_can_require_proof_and_says_what_to_do(fresh):
    site = fresh(start=False)
    site["solo"].configure("authenticated_requests = require\n")
    site["solo"].start()
    done = site.control.run("run", "solo", "hello")
    assert done.returncode == 1 and "no secret is agreed with dispatcher control" in done.out
    checked = site["solo"].run("self-check")
    assert checked.returncode == 1 and "requests of control are refused" in checked.out
    done = site.control.run("maintain")  # a front that was taken over could be who agrees
    assert done.returncode == 1 and "set prefer until ced maintain has agreed" in done.out
    site["solo"].configure()
    site["solo"].reload()
    assert site.control.run("maintain").returncode == 0
    site["solo"].configure("authenticated_requests = require\n")
    site["solo"].reload()
    assert site.control.run("run", "solo", "hello").returncode == 0
    assert "are refused" not in site["solo"].run("self-check").out


def test_a_host_that_has_lost_the_secret_agrees_anew(site):
    os.unlink(ctrl_exec.request_secrets_path(site["solo"].config))
    assert site.control.run("run", "solo", "hello").returncode == 0
    assert site["solo"].events("proof-unknown")
    assert "requests of control need no proof yet" in site["solo"].run("self-check").out
    assert site.control.run("maintain").returncode == 0
    assert own_secret(site) == secrets_of(site["solo"])["control"].secret != SECRET
    assert plain(site, "/run", BODY)[0] == 403


def test_maintain_names_a_host_that_takes_no_proof_of_ours(site):
    entry = ctrl_exec.RequestSecret("cd" * 32, True)  # as after a restore of an older copy of the control host
    path = ctrl_exec.request_secrets_path(site["solo"].config)
    ctrl_exec.edit_request_secrets(path, lambda known: known.update(control=entry))
    done = site.control.run("maintain")
    assert done.returncode == 1 and "solo: it does not take our proofs" in done.out and "pair it again" in done.out


def test_two_equal_changes_of_one_second_are_two(site):
    connection = ctrl_exec.HostClient(site.control.config)
    agent = ctrl_exec.find_agent(site.control.config.registry_dir, "solo")
    body = {"reqid": "r1", "action": "add", "serial": "cd" * 16}
    with ctrl_exec.HostSession(lambda: connection._connect(agent, connection._context)) as session:
        for _ in range(3):
            assert session.request("POST", "/rotate-serial", body, ctrl_exec.Deadline(60))[0] == 200


def test_a_replay_from_a_fast_clock_finds_no_forgotten_run(site):
    """The run's record is kept for as long as its request could be repeated."""
    hours = site["solo"].config.run_retention_hours
    moment = ctrl_exec.iso_time(time.time() + hours * 1800 - 60)
    assert ask(site, "/run", BODY, moment=moment)[0] == 200
    assert ask(site, "/run", BODY, moment=ctrl_exec.iso_time(time.time() - hours * 1800 - 60))[0] == 403


@pytest.mark.parametrize("change", [{"body": "\ud800"}, {"operation": "agree", "args": ()}])
def test_what_no_front_of_ours_passes_on_is_refused(site, change):
    job = job_of(BODY)._replace(**change)
    config = site["solo"].config
    with pytest.raises((ctrl_exec.CtrlExecError, UnicodeEncodeError)):
        ctrl_exec._check_proof(config, job)
        custody = ctrl_exec.Custody(*("",) * 6, ctrl_exec.request_secrets_path(config), "solo")
        ctrl_exec.Custodian(custody, OPENSSL, None).agree(job)


# --- where the secrets are ---------------------------------------------------------------------------------------


def test_a_secret_goes_with_its_host(site):
    control = site.control
    assert control.run("edit-agent", "solo", "--rename", "other").returncode == 0
    assert (own_secret(site), own_secret(site, "other")) == ("", SECRET)
    assert control.run("run", "other", "hello").returncode == 0
    assert control.run("unpair", "other").returncode == 0
    assert own_secret(site, "other") == ""
    assert os.listdir(ctrl_exec.secret_directory(control.config)) == []


def test_secrets_that_cannot_be_read_are_named_on_both_sides(site):
    path = ctrl_exec.request_secrets_path(site["solo"].config)
    with open(path, "w") as file:
        file.write("{}x")
    done = site.control.run("run", "solo", "hello")
    assert done.returncode == 1 and "request-secrets.json" in done.out and "Traceback" not in done.err
    assert "request-secrets.json" in site["solo"].run("self-check").out
    own = ctrl_exec._secret_path(ctrl_exec.secret_directory(site.control.config), "solo")
    with open(own, "w") as file:
        file.write("no secret")
    done = site.control.run("run", "solo", "hello")
    assert done.returncode == 1 and own in done.out and "pair that host again" in done.out


def test_a_full_list_of_proofs_forgets_the_eldest(site):
    path = ctrl_exec.request_secrets_path(site["solo"].config)
    entry = ctrl_exec.RequestSecret(SECRET, True, tuple("%064x" % n for n in range(ctrl_exec.MAX_SEEN)))
    ctrl_exec.edit_request_secrets(path, lambda known: known.update(control=entry))
    assert ask(site, "/rotate-serial", {"reqid": "r1", "action": "add", "serial": "cd" * 16})[0] == 200
    seen = secrets_of(site["solo"])["control"].seen
    assert len(seen) == ctrl_exec.MAX_SEEN and seen[0] == "%064x" % 1
