"""An agent's certificate, its CAs and its map change on the word of a dispatcher, and of nobody else."""

import contextlib
import http.client
import json
import os
import shutil
import signal
import ssl
import subprocess
import tempfile
import threading

import pytest

import ctrl_exec
import older
import support
from support import wait_until

OPENSSL = ctrl_exec.OpenSSL()
GATE = 'while [ ! -e "$1" ]; do sleep 0.02; done\necho through\n'


class Authority:
    """A CA with its key; it signs what a test wants."""

    def __init__(self, directory, name=""):
        self.directory = str(directory)
        self.cert = os.path.join(self.directory, "ca.crt")
        self.key = ctrl_exec.ca_key_path(self.cert)
        if name:
            ctrl_exec.new_ca(OPENSSL, self.cert, "ec", name)
        self.pem = ctrl_exec.load_cas(self.cert)[0]

    def sign(self, csr, name, profile="agent", days=365):
        return ctrl_exec.split_pem(OPENSSL.sign(csr, name, profile, days, self.cert, self.key))[0]

    def endorse(self, other, profile="ca"):
        """Our word for another CA: a certificate for its key."""
        return self.sign(OPENSSL.new_request(other.key, "successor"), "successor", profile)

    def caller(self, name):
        """A dispatcher with a certificate of this CA."""
        path = os.path.join(self.directory, name)
        identity = ctrl_exec.Identity(path + ".crt", path + ".key", self.cert)
        info = ctrl_exec.new_dispatcher_identity(OPENSSL, identity, name, "ec", 30)
        return older.Identity(identity.cert, identity.key, info.serial)


def read(path):
    with open(path, "rb") as file:
        return file.read()


def write(path, data):
    with open(path, "wb") as file:
        file.write(data)


def trust_files(host):
    config = host.config
    lists = [config.trusted_dispatchers_path, config.revoked_serials, config.dispatcher_serial_path]
    return [config.path, config.cert, config.key, config.ca, *lists]


def snapshot(host):
    """Every file that trust rests on: its content, or None."""
    return {path: read(path) if os.path.exists(path) else None for path in trust_files(host)}


def trusted(host):
    return ctrl_exec.load_trust_map(host.config.trusted_dispatchers_path)


def trust(host, caller, name):
    """What pairing with one more dispatcher leaves."""
    ctrl_exec.add_trusted(host.config.trusted_dispatchers_path, caller.serial, name)
    assert "RESULT=ok" in host.reload()


def ask(host, caller, path, **body):
    return support.post(host.port, caller.context(), path, body)


def ping(host, caller):
    """The status of a ping; 0 when TLS said no."""
    return ask(host, caller, "/ping", reqid="p")[0]


def renew(host, caller):
    """The agent's request for its next certificate."""
    status, answer = ask(host, caller, "/renew", reqid="renewal")
    assert status == 200, answer
    return answer["csr"]


def complete(host, caller, **body):
    return ask(host, caller, "/renew-complete", **dict({"reqid": "renewal"}, **body))


def rotate(host, caller, action, serial, **body):
    return ask(host, caller, "/rotate-serial", serial=serial, action=action, **body)


def served(host, caller):
    """The certificate that a new connection is shown, as PEM."""
    with support.tls_connect(host.port, caller.context()) as tls:
        return ssl.DER_cert_to_PEM_cert(tls.getpeercert(binary_form=True))


def post_on(connection, path, **body):
    """A request on a connection that is kept: its (status, object), or (0, None) when it was closed."""
    try:
        connection.request("POST", path, json.dumps(body))
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    except (OSError, http.client.HTTPException):
        return 0, None


def keep_open(host, caller):
    """A connection on which one request has been answered; it never opens itself again."""
    connection = http.client.HTTPSConnection("127.0.0.1", host.port, context=caller.context(), timeout=30)
    assert post_on(connection, "/ping", reqid="first")[0] == 200
    connection.auto_open = 0
    return connection


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """An agent whose trust the tests here change."""
    with support.Deployment(tmp_path_factory.mktemp("custody"), ("solo",)) as one:
        one["solo"].script("gate", GATE)
        assert "RESULT=ok" in one["solo"].reload()
        yield one


@contextlib.contextmanager
def restored(host):
    """An agent that runs, and whose files are afterwards as they were."""
    before = snapshot(host)
    yield host
    if snapshot(host) != before:
        for path, data in before.items():
            if data is not None:
                write(path, data)
            elif os.path.exists(path):
                os.unlink(path)
        if host.process.poll() is None:
            assert "RESULT=ok" in host.reload()
    if host.process.poll() is not None:
        host.start()


@pytest.fixture
def host(site):
    with restored(site["solo"]) as one:
        yield one


@pytest.fixture(scope="module")
def caller(site):
    """The dispatcher that the agent was paired with."""
    control = site.control
    return older.Identity(control.config.cert, control.config.key, control.serial())


@pytest.fixture(scope="module")
def ca(site):
    return Authority(os.path.dirname(site.control.config.ca))


@pytest.fixture(scope="module")
def csr(site, caller):
    """The agent's own request; its key stays, and so this fits in every test."""
    return renew(site["solo"], caller)


@pytest.fixture(scope="module")
def good(ca, csr):
    """A certificate that the agent would take."""
    return ca.sign(csr, "solo")


@pytest.fixture(scope="module")
def second(ca):
    """Another certificate of the same CA; nobody trusts it yet."""
    return ca.caller("second")


@pytest.fixture(scope="module")
def new_ca(tmp_path_factory):
    """A CA that the agent has not heard of."""
    return Authority(tmp_path_factory.mktemp("new-ca"), "New CA")


# --- asking for a new certificate -----------------------------------------------------------------------


def test_renew_answers_a_request_by_the_present_key_for_the_name_in_the_certificate(host, caller):
    before = snapshot(host)
    status, answer = ask(host, caller, "/renew", reqid="r-1", name="other", hostname="other")
    csr = answer.pop("csr")
    assert (status, answer) == (200, {"status": "ok", "reqid": "r-1", "host": "solo"})
    assert OPENSSL.check_request(csr)
    assert ctrl_exec.parse_request(csr).public_key == ctrl_exec.parse_certificate(read(host.config.cert)).public_key
    done = subprocess.run(["openssl", "req", "-noout", "-subject"], input=csr.encode(), capture_output=True)
    assert done.stdout.decode().replace(" ", "").strip() == "subject=CN=solo"
    assert snapshot(host) == before
    assert "DISPATCHER=control" in host.events("renew")[-1] and "REQID=r-1" in host.events("renew")[-1]


REQUESTS = {
    "/renew": {},
    "/renew-complete": {"cert": "x"},
    "/rotate-serial": {"serial": "abcd", "action": "add"},
}


@pytest.mark.parametrize("path", sorted(REQUESTS))
def test_a_stranger_changes_nothing(host, second, path):
    before = snapshot(host)
    answer = ask(host, second, path, reqid="r", **REQUESTS[path])
    assert answer == (403, {"error": "serial mismatch", "status": "forbidden"})
    assert snapshot(host) == before


def test_a_revoked_dispatcher_changes_nothing(host, caller):
    write(host.config.revoked_serials, caller.serial.encode() + b"\n")
    assert "RESULT=ok" in host.reload()
    before = snapshot(host)
    for path in REQUESTS:
        answer = ask(host, caller, path, reqid="r", **REQUESTS[path])
        assert answer == (403, {"error": "certificate revoked", "status": "forbidden"})
    assert snapshot(host) == before


BAD_IDS = [{}, {"reqid": ""}, {"reqid": "../x"}, {"reqid": 5}, {"reqid": "x" * 65}]


@pytest.mark.parametrize("path", ["/renew", "/renew-complete"])
@pytest.mark.parametrize("body", BAD_IDS, ids=range(len(BAD_IDS)))
def test_a_bad_request_id_is_named(host, caller, path, body):
    before = snapshot(host)
    status, answer = ask(host, caller, path, cert="x", **body)
    assert (status, answer["field"]) == (400, "reqid")
    assert snapshot(host) == before


# --- a new certificate ----------------------------------------------------------------------------------


def test_a_new_certificate_is_stored_and_served_without_a_restart(host, caller, ca, csr):
    pem = ca.sign(csr, "solo", days=100)
    info = ctrl_exec.parse_certificate(pem.encode())
    key = read(host.config.key)
    os.chmod(host.config.cert, 0o600)
    status, answer = complete(host, caller, cert=pem)
    expiry = ctrl_exec.iso_time(info.not_after)
    assert (status, answer) == (200, {
        "status": "ok", "reqid": "renewal", "serial": info.serial, "expiry": expiry, "staged": False,
    })  # fmt: skip
    assert served(host, caller) == read(host.config.cert).decode() == pem
    assert os.stat(host.config.cert).st_mode & 0o777 == 0o644
    assert read(host.config.key) == key
    assert ask(host, caller, "/ping", reqid="p")[1]["expiry"] == expiry
    assert ctrl_exec.find_agent_pid(host.config) == host.process.pid and host.process.poll() is None
    line = host.events("renew-complete")[-1]
    assert "DISPATCHER=control" in line and "REQID=renewal" in line and "SERIAL=" + info.serial in line


def test_a_certificate_that_is_sent_twice_is_in_place_once(host, caller, ca, csr):
    pem = ca.sign(csr, "solo")
    first, again = complete(host, caller, cert=pem), complete(host, caller, cert=pem)
    assert first[0] == 200 and first == again
    assert served(host, caller) == pem


def new_request(directory, name):
    """A request by a key of one's own."""
    key = os.path.join(str(directory), "own.key")
    ctrl_exec.new_key_file(OPENSSL, key, "ec")
    return OPENSSL.new_request(key, name)


def bad_certificate(kind, csr, good, ca, new_ca, directory):
    return {
        "another key": lambda: ca.sign(new_request(directory, "solo"), "solo"),
        "another name": lambda: ca.sign(csr, "sole"),
        "another CA": lambda: new_ca.sign(csr, "solo"),
        "a dispatcher's purpose": lambda: ca.sign(csr, "solo", "dispatcher"),
        "a CA's purpose": lambda: ca.sign(csr, "solo", "ca"),
        "expired": lambda: ca.sign(csr, "solo", days=-1),
        "two": lambda: good * 2,
        "garbage": lambda: "garbage",
        "broken": lambda: good.replace("MII", "M?I", 1),
        "cut short": lambda: good[: len(good) // 2],
        "changed": lambda: change_signature(good),
        "a request": lambda: csr,
    }[kind]()


def change_signature(pem):
    der = bytearray(ssl.PEM_cert_to_DER_cert(pem))
    der[-1] ^= 1
    return ssl.DER_cert_to_PEM_cert(bytes(der))


BAD_CERTIFICATES = {
    "another key": "does not belong to the key",
    "another name": "for another name than solo",
    "another CA": "unable to get local issuer certificate",
    "a dispatcher's purpose": "purpose",
    "a CA's purpose": "purpose",
    "expired": "expired",
    "two": "expected one certificate, not 2",
    "garbage": "",
    "broken": "",
    "cut short": "",
    "changed": "the certificate is refused",
    "a request": "",
}


@pytest.mark.parametrize("kind", sorted(BAD_CERTIFICATES))
def test_a_certificate_that_is_not_ours_is_refused_and_the_old_one_stays(
    host, caller, ca, new_ca, csr, good, tmp_path, kind
):
    shown, before = served(host, caller), snapshot(host)
    pem = bad_certificate(kind, csr, good, ca, new_ca, tmp_path)
    status, answer = complete(host, caller, cert=pem)
    assert status == 400, answer
    assert BAD_CERTIFICATES[kind] in answer["error"]
    assert snapshot(host) == before
    assert served(host, caller) == shown
    assert "ERROR=" in host.events("renew-complete")[-1]


LONG = "x" * (ctrl_exec.MAX_PAIRING_BODY + 1)
BAD_BODIES = {
    "nothing": ({}, 400, "cert"),
    "empty": ({"cert": "", "ca": ""}, 400, "cert"),
    "a number": ({"cert": 5}, 400, "cert"),
    "a list": ({"cert": ["a"]}, 400, "cert"),
    "long": ({"cert": LONG}, 400, "cert"),
    "a long CA": ({"ca": LONG}, 400, "ca"),
    "a long endorsement": ({"ca": "x", "endorsement": LONG}, 400, "endorsement"),
    "huge": ({"cert": "x" * (ctrl_exec.MAX_BODY + 1)}, 413, None),
}


@pytest.mark.parametrize("kind", sorted(BAD_BODIES))
def test_a_body_without_a_certificate_of_sensible_size_is_refused(host, caller, kind):
    body, wanted, field = BAD_BODIES[kind]
    before = snapshot(host)
    status, answer = complete(host, caller, **body)
    assert (status, answer.get("field")) == (wanted, field)
    assert snapshot(host) == before and ping(host, caller) == 200


def test_a_kept_connection_ends_cleanly_and_the_next_shows_the_new_certificate(host, caller, ca, csr):
    connection = keep_open(host, caller)
    pem = ca.sign(csr, "solo")
    assert complete(host, caller, cert=pem)[0] == 200
    status, answer = post_on(connection, "/ping", reqid="second")
    assert (status, answer and answer["reqid"]) in ((200, "second"), (0, None))
    connection.close()
    assert served(host, caller) == pem and ping(host, caller) == 200


def test_the_connection_that_brought_the_certificate_gets_its_answer(host, caller, ca):
    connection = keep_open(host, caller)
    status, answer = post_on(connection, "/renew", reqid="kept")
    assert (status, answer["reqid"]) == (200, "kept")
    pem = ca.sign(answer["csr"], "solo")
    status, answer = post_on(connection, "/renew-complete", reqid="kept", cert=pem)
    connection.close()
    assert (status, answer["serial"]) == (200, ctrl_exec.read_certificate(host.config.cert).serial)


def test_a_connection_that_has_not_asked_yet_is_answered_after_a_renewal(host, caller, ca, csr):
    pem = ca.sign(csr, "solo")  # before: the agent gives a connection ten seconds for its first request
    with support.tls_connect(host.port, caller.context()) as tls:
        assert complete(host, caller, cert=pem)[0] == 200
        tls.sendall(b"POST /ping HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
        status, _, body = support.read_reply(tls)
    assert (status, json.loads(body)["status"]) == (200, "ok")


def test_a_run_that_goes_on_during_a_renewal_is_answered_and_kept(host, caller, ca, tmp_path, csr):
    gate, reqid, answers = tmp_path / "gate", ctrl_exec.new_id(), []

    def work():
        answers.append(ask(host, caller, "/run", script="gate", args=[str(gate)], reqid=reqid))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    record = host.config.runs_dir + "/control/%s.json" % reqid
    wait_until(lambda: os.path.exists(record) and host.record(reqid)["pid"], what="the run's process")
    pem = ca.sign(csr, "solo")
    assert complete(host, caller, cert=pem)[0] == 200
    assert served(host, caller) == pem and not answers
    gate.touch()
    thread.join(60)
    assert [(status, answer["stdout"]) for status, answer in answers] == [(200, "through\n")]
    status, answer = support.post(host.port, caller.context(), "/result/" + reqid, b"", "GET")
    assert (status, answer["status"], answer["stdout"]) == (200, "done", "through\n")


def kill(host):
    """End the agent's executor as a crash would, and start it again."""
    assert host.stop(signal.SIGKILL) == -signal.SIGKILL
    wait_until(lambda: not host.is_up(), what="the end of its front")
    host.start()


def test_an_agent_that_is_killed_right_after_a_renewal_comes_back_with_the_new_one(host, caller, ca, csr):
    pem = ca.sign(csr, "solo")
    assert complete(host, caller, cert=pem)[0] == 200
    kill(host)
    assert served(host, caller) == pem and ping(host, caller) == 200


def test_a_renewal_that_was_only_begun_leaves_the_old_certificate_working(host, caller, ca):
    before, shown = snapshot(host), served(host, caller)
    csr = renew(host, caller)
    assert served(host, caller) == shown
    kill(host)
    assert (snapshot(host), served(host, caller), ping(host, caller)) == (before, shown, 200)
    pem = ca.sign(csr, "solo")
    assert complete(host, caller, cert=pem)[0] == 200, "what was begun before the crash can be ended"
    assert served(host, caller) == pem


def test_a_certificate_that_the_agent_cannot_load_yet_is_no_success_and_is_served_when_it_can(
    host, caller, ca, csr
):
    shown = served(host, caller)
    pem = ca.sign(csr, "solo")
    conf = ctrl_exec.scripts_conf_path(host.config)
    kept = read(conf)
    write(conf, b"nonsense\n")
    try:
        status, answer = complete(host, caller, cert=pem)
        assert (status, answer["status"]) == (503, "unavailable") and "scripts.conf:1" in answer["error"]
        assert served(host, caller) == shown
    finally:
        write(conf, kept)
    assert "RESULT=ok" in host.reload()
    assert served(host, caller) == pem


# --- new CAs --------------------------------------------------------------------------------------------


def test_a_ca_that_nobody_vouches_for_is_refused(host, caller, ca, new_ca, csr):
    before = snapshot(host)
    certificate = new_ca.sign(csr, "solo")
    for cert, cas in (("", new_ca.pem), ("", ca.pem + new_ca.pem), (certificate, ca.pem + new_ca.pem)):
        status, answer = complete(host, caller, cert=cert, ca=cas)
        assert status == 400 and "does not know" in answer["error"]
    assert snapshot(host) == before


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("stranger"), "Stranger")


@pytest.fixture(scope="module")
def word(ca, new_ca):
    """What makes the agent believe the new CA."""
    return ca.endorse(new_ca)


def bad_endorsement(kind, ca, new_ca, stranger, word, tmp_path):
    """(CAs, endorsement) of which the agent must not believe a word."""
    both = ca.pem + new_ca.pem
    return {
        "another key": lambda: (both, ca.endorse(stranger)),
        "a stranger's": lambda: (both, stranger.endorse(new_ca)),
        "its own": lambda: (both, new_ca.endorse(new_ca)),
        "the CA's own": lambda: (both, ca.pem),
        "for an agent": lambda: (both, ca.endorse(new_ca, "agent")),
        "for a dispatcher": lambda: (both, ca.endorse(new_ca, "dispatcher")),
        "two": lambda: (both, word * 2),
        "garbage": lambda: (both, "garbage"),
        "cut short": lambda: (both, word[: len(word) // 2]),
        "one of two CAs": lambda: (both + stranger.pem, word),
        "a CA that is none": lambda: leaf_as_ca(ca, tmp_path),
        "an agent of the CA": lambda: agent_as_ca(ca, tmp_path),
    }[kind]()


def leaf_as_ca(ca, directory):
    """A certificate by itself that is no CA's, for a key that the CA has endorsed."""
    path = str(directory / "leaf")
    key, cert = path + ".key", path + ".crt"
    ctrl_exec.new_key_file(OPENSSL, key, "ec")
    conf = "[req]\ndistinguished_name=dn\nprompt=no\nx509_extensions=e\n[dn]\nCN=Leaf\n[e]\n"
    write(path + ".cnf", (conf + "basicConstraints=critical,CA:FALSE\nsubjectKeyIdentifier=hash\n").encode())
    words = ["-x509", "-new", "-key", key, "-days", "30", "-config", path + ".cnf", "-out", cert]
    subprocess.run(["openssl", "req", *words], check=True, capture_output=True)
    return ca.pem + read(cert).decode(), ca.sign(OPENSSL.new_request(key, "Leaf"), "Leaf", "ca")


def agent_as_ca(ca, directory):
    """The certificate of some agent, with a CA's certificate for its key."""
    csr = new_request(directory, "Leaf")
    return ca.pem + ca.sign(csr, "Leaf"), ca.sign(csr, "Leaf", "ca")


BAD_ENDORSEMENTS = {
    "another key": "another successor",
    "a stranger's": "the certificate is refused",
    "its own": "the certificate is refused",
    "the CA's own": "another successor",
    "for an agent": "no CA",
    "for a dispatcher": "no CA",
    "two": "does not know",
    "garbage": "",
    "cut short": "",
    "one of two CAs": "another successor",
    "a CA that is none": "",
    "an agent of the CA": "",
}


@pytest.mark.parametrize("kind", sorted(BAD_ENDORSEMENTS))
def test_a_ca_with_a_word_that_is_not_the_known_ones_for_it_is_refused(
    host, caller, ca, new_ca, stranger, word, tmp_path, kind
):
    before = snapshot(host)
    cas, endorsement = bad_endorsement(kind, ca, new_ca, stranger, word, tmp_path)
    status, answer = complete(host, caller, ca=cas, endorsement=endorsement)
    assert status == 400, answer
    assert BAD_ENDORSEMENTS[kind] in answer["error"]
    assert snapshot(host) == before and ping(host, caller) == 200


EMPTY_SHELL = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"


@pytest.mark.parametrize("text", ["garbage", EMPTY_SHELL], ids=["garbage", "shell"])
def test_cas_that_are_no_certificates_are_refused(host, caller, good, text):
    before = snapshot(host)
    for body in ({"ca": text}, {"ca": text, "cert": good}):
        status, answer = complete(host, caller, **body)
        assert status == 400, answer
    assert snapshot(host) == before and ping(host, caller) == 200


def hand_over(host, caller, ca, new_ca, word):
    """Have both CAs believed."""
    both = ca.pem + new_ca.pem
    status, answer = complete(host, caller, ca=both, endorsement=word)
    assert status == 200, answer
    assert read(host.config.ca).decode() == both


@pytest.fixture(scope="module")
def heir(new_ca):
    """The dispatcher with a certificate of the new CA."""
    return new_ca.caller("heir")


def test_a_hand_over_from_one_ca_to_the_next_locks_nobody_out(host, caller, ca, new_ca, heir, word):
    shown = served(host, caller)
    assert (ping(host, caller), ping(host, heir)) == (200, 0), "the new CA is unknown to TLS"
    assert rotate(host, caller, "add", heir.serial)[0] == 200
    hand_over(host, caller, ca, new_ca, word)
    assert (ping(host, caller), ping(host, heir)) == (200, 200)
    assert served(host, caller) == shown, "only CAs were sent"

    status, answer = complete(host, heir, ca=new_ca.pem)
    assert status == 400 and "issuer" in answer["error"], "our own certificate still needs the old CA"
    assert read(host.config.ca).decode() == ca.pem + new_ca.pem

    pem = new_ca.sign(renew(host, heir), "solo")
    assert complete(host, heir, cert=pem)[0] == 200
    assert served(host, caller) == served(host, heir) == pem
    assert (ping(host, caller), ping(host, heir)) == (200, 200)

    assert complete(host, heir, ca=new_ca.pem)[0] == 200
    assert read(host.config.ca).decode() == new_ca.pem
    assert (ping(host, caller), ping(host, heir)) == (0, 200), "the old CA is believed no longer"
    status, answer = complete(host, heir, ca=ca.pem + new_ca.pem)
    assert status == 400 and "does not know" in answer["error"], "it does not come back by itself"
    kill(host)
    assert (ping(host, caller), ping(host, heir)) == (0, 200)


def test_a_new_ca_and_a_certificate_of_it_may_come_together(host, caller, ca, new_ca, csr, word):
    pem = new_ca.sign(csr, "solo")
    status, answer = complete(host, caller, cert=pem, ca=ca.pem + new_ca.pem, endorsement=word)
    assert (status, answer.get("serial")) == (200, ctrl_exec.read_certificate(host.config.cert).serial)
    assert served(host, caller) == pem and ping(host, caller) == 200
    assert read(host.config.ca).decode() == ca.pem + new_ca.pem


def test_a_new_ca_does_not_come_in_with_a_certificate_that_is_refused(host, caller, ca, new_ca, csr, word):
    before = snapshot(host)
    pem = new_ca.sign(csr, "sole")
    status, answer = complete(host, caller, cert=pem, ca=ca.pem + new_ca.pem, endorsement=word)
    assert (status, "another name" in answer["error"]) == (400, True)
    assert snapshot(host) == before


def test_a_handed_over_ca_does_not_make_its_certificates_trusted(host, caller, ca, new_ca, heir, word):
    hand_over(host, caller, ca, new_ca, word)
    assert ping(host, heir) == 403


# --- whom the agent trusts ------------------------------------------------------------------------------


def test_an_added_serial_is_served_at_once_and_a_removed_one_refused_at_once(host, caller, second):
    assert ping(host, second) == 403
    status, answer = rotate(host, caller, "add", second.serial, reqid="r-1")
    facts = {"status": "ok", "reqid": "r-1", "serial": second.serial}
    assert (status, answer) == (200, dict(facts, action="add", had=False))
    assert ping(host, second) == 200
    assert trusted(host) == {caller.serial: "control", second.serial: "control"}
    assert rotate(host, caller, "add", second.serial)[1]["had"] is True

    status, answer = rotate(host, caller, "remove", second.serial, reqid="r-1")
    assert (status, answer) == (200, dict(facts, action="remove", had=True))
    assert ping(host, second) == 403
    assert trusted(host) == {caller.serial: "control"}
    assert rotate(host, caller, "remove", second.serial)[1]["had"] is False
    assert not os.path.exists(host.config.revoked_serials)
    assert ctrl_exec.find_agent_pid(host.config) == host.process.pid
    lines = host.events("rotate")[-4:]
    for change, line in zip(("add", "add", "remove", "remove"), lines):
        assert "CHANGE=%s DISPATCHER=control " % change in line and "SERIAL=" + second.serial in line


def test_a_dispatcher_can_follow_itself_and_retire_its_former_certificate(host, caller, second):
    assert rotate(host, caller, "add", second.serial)[0] == 200
    assert rotate(host, second, "remove", caller.serial)[0] == 200
    assert (ping(host, caller), ping(host, second)) == (403, 200)
    kill(host)
    assert (ping(host, caller), ping(host, second)) == (403, 200)


def test_a_revoked_serial_is_refused_at_once_and_cannot_come_back(host, caller, second):
    assert rotate(host, caller, "add", second.serial)[0] == 200
    assert rotate(host, caller, "revoke", second.serial)[0] == 200
    assert ask(host, second, "/ping")[1]["error"] == "certificate revoked"
    assert second.serial in ctrl_exec.load_revoked(host.config.revoked_serials)
    assert trusted(host) == {caller.serial: "control"}
    for spelling in (second.serial, "0x" + second.serial.upper()):
        status, answer = rotate(host, caller, "add", spelling)
        assert status == 403 and "revoked" in answer["error"]
    assert trusted(host) == {caller.serial: "control"} and ping(host, second) == 403


def test_revoking_keeps_what_the_list_says_already(host, caller, second):
    write(host.config.revoked_serials, b"# lost laptop\nDE:AD:01")
    assert rotate(host, caller, "revoke", second.serial)[0] == 200
    assert ctrl_exec.load_revoked(host.config.revoked_serials) == {"dead01", second.serial}
    assert read(host.config.revoked_serials).startswith(b"# lost laptop\nDE:AD:01\n")


@pytest.mark.parametrize("action", ["remove", "revoke"])
def test_what_is_taken_away_is_gone_from_a_kept_connection_too(host, caller, second, action):
    assert rotate(host, caller, "add", second.serial)[0] == 200
    connection = keep_open(host, second)
    assert rotate(host, caller, action, second.serial)[0] == 200
    assert post_on(connection, "/ping", reqid="again")[0] in (0, 403)
    connection.close()
    assert ping(host, second) == 403


@pytest.mark.parametrize("action", ["remove", "revoke"])
def test_what_is_taken_away_runs_nothing_over_a_connection_that_was_silent(host, caller, second, action):
    assert rotate(host, caller, "add", second.serial)[0] == 200
    reqid = ctrl_exec.new_id()
    body = json.dumps({"script": "hello", "args": [], "reqid": reqid}).encode()
    head = "POST /run HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body)
    with support.tls_connect(host.port, second.context()) as tls:
        assert rotate(host, caller, action, second.serial)[0] == 200
        try:
            tls.sendall(head.encode() + body)
            status, _, answer = support.read_reply(tls)
        except OSError:
            status = 0
    assert status in (0, 403) or json.loads(answer)["exit"] == -1
    assert not os.path.exists(host.config.runs_dir + "/control/%s.json" % reqid)


@pytest.mark.parametrize("action", ["remove", "revoke"])
def test_the_serial_that_a_call_is_made_with_stays(host, caller, action):
    before = snapshot(host)
    for spelling in (caller.serial, caller.serial.upper(), "0x" + caller.serial, "serial=" + caller.serial):
        status, answer = rotate(host, caller, action, spelling)
        assert status == 403 and caller.serial in answer["error"]
    assert snapshot(host) == before and ping(host, caller) == 200


@pytest.mark.parametrize("action", ["add", "remove", "revoke"])
def test_a_serial_of_another_dispatcher_cannot_be_touched(host, caller, second, action):
    trust(host, second, "other")
    before = snapshot(host)
    for actor, victim in ((caller, second), (second, caller)):
        status, answer = rotate(host, actor, action, victim.serial)
        assert status == 403 and "belongs to" in answer["error"]
    assert snapshot(host) == before
    assert (ping(host, caller), ping(host, second)) == (200, 200)


def test_a_revocation_means_the_serial_and_not_what_its_digits_are_in_decimal(host, caller, second):
    trust(host, second, "other")
    answers = [rotate(host, caller, "revoke", str(int(one.serial, 16)))[0] for one in (caller, second)]
    assert (ping(host, caller), ping(host, second)) == (200, 200), answers


def test_a_serial_is_added_under_the_callers_own_id(host, caller, second, ca):
    trust(host, second, "other")
    third = ca.caller("third")
    assert rotate(host, second, "add", third.serial, dispatcher="control", owner="control")[0] == 200
    assert trusted(host) == {caller.serial: "control", second.serial: "other", third.serial: "other"}
    assert rotate(host, caller, "remove", third.serial)[0] == 403
    assert ping(host, third) == 200


SPELLINGS = ["DE:AD:0B", "DEAD0B", "0XDeAd0b", "serial=DEAD0B", "00dead0b", " dead0b\n"]


def test_every_spelling_of_a_serial_is_one_entry_of_the_map(host, caller):
    for spelling in SPELLINGS:
        status, answer = rotate(host, caller, "add", spelling)
        assert (status, answer["serial"]) == (200, "dead0b")
        assert trusted(host) == {caller.serial: "control", "dead0b": "control"}
    assert b"dead0b control\n" in read(host.config.trusted_dispatchers_path)
    status, answer = rotate(host, caller, "remove", "DE:AD:0B")
    assert (status, answer["had"], trusted(host)) == (200, True, {caller.serial: "control"})


BAD_ROTATIONS = [
    ({}, "serial"), ({"action": "add"}, "serial"), ({"serial": "abcd"}, "action"),
    ({"serial": "", "action": "add"}, "serial"), ({"serial": "xyz", "action": "add"}, "serial"),
    ({"serial": "ab cd", "action": "remove"}, "serial"), ({"serial": "ab\ncd x", "action": "add"}, "serial"),
    ({"serial": "-1", "action": "add"}, "serial"), ({"serial": "a" * 61, "action": "add"}, "serial"),
    ({"serial": 17, "action": "add"}, "serial"), ({"serial": "\u0663", "action": "add"}, "serial"),
    ({"serial": "a" * 129, "action": "add"}, "serial"), ({"serial": "abcd", "action": ""}, "action"),
    ({"serial": "abcd", "action": "ADD"}, "action"), ({"serial": "abcd", "action": "replace"}, "action"),
    ({"serial": "abcd", "action": ["add"]}, "action"),
    ({"serial": "abcd", "action": "add", "reqid": "../x"}, "reqid"),
]  # fmt: skip


@pytest.mark.parametrize("body, field", BAD_ROTATIONS, ids=range(len(BAD_ROTATIONS)))
def test_a_bad_rotation_is_refused_by_the_name_of_its_field(host, caller, body, field):
    before = snapshot(host)
    status, answer = ask(host, caller, "/rotate-serial", **body)
    assert status == 400 and "`%s`" % field in answer["error"]
    assert snapshot(host) == before


@pytest.fixture
def shelf():
    """A directory that any user can enter, as the agent's front may be one; pytest's own are private."""
    path = tempfile.mkdtemp(prefix="ctrl-exec-hooks-")
    os.chmod(path, 0o755)
    yield path
    shutil.rmtree(path)


def test_the_agents_hook_decides_about_rotation(host, caller, second, shelf):
    hook, asked = os.path.join(shelf, "hook"), os.path.join(shelf, "asked")
    for path, text, mode in (
        (hook, '#!/bin/sh\nenv > "%s"\n[ "$ENVEXEC_USERNAME" = ann ] || exit 3\n' % asked, 0o755),
        (asked, "", 0o666),
    ):
        write(path, text.encode())
        os.chmod(path, mode)
    host.configure("rate_limit_disable = yes\nauth_hook = %s\n" % hook)
    try:
        assert "RESULT=ok" in host.reload()
        before = snapshot(host)
        for action in ("add", "remove", "revoke"):
            status, answer = rotate(host, caller, action, second.serial, username="bob", reqid="h-1")
            assert status == 403 and "insufficient privilege" in answer["error"]
        assert snapshot(host) == before
        assert rotate(host, caller, "add", second.serial, username="ann", token="secret")[0] == 200
        lines = read(asked).decode().splitlines()
        for line in ("ACTION=rotate", "USERNAME=ann", "TOKEN=secret", "DISPATCHER=control"):
            assert "ENVEXEC_" + line in lines
        assert "ENVEXEC_DISPATCHER_SERIAL=" + caller.serial in lines
        assert ping(host, second) == 200
    finally:
        host.configure("rate_limit_disable = yes\n")
        assert "RESULT=ok" in host.reload()


def test_two_dispatchers_on_one_agent_see_only_their_own_runs(host, caller, second):
    trust(host, second, "other")
    reqids = {}
    for name, one, stranger in (("control", caller, second), ("other", second, caller)):
        reqid = reqids[name] = ctrl_exec.new_id()
        status, answer = ask(host, one, "/run", script="hello", args=[], reqid=reqid)
        assert (status, answer["owner"], answer["stdout"]) == (200, name, "hello\n")
        assert host.record(reqid, name)["owner"] == name
        for method, path in (("GET", "/result/%s"), ("GET", "/follow/%s"), ("POST", "/cancel")):
            body = {"reqid": reqid} if method == "POST" else b""
            path = path % reqid if "%" in path else path
            status, answer = support.post(host.port, stranger.context(), path, body, method)
            assert (status, answer["status"]) == (404, "unknown")
    status, answer = support.post(host.port, second.context(), "/result/" + reqids["other"], b"", "GET")
    assert (status, answer["stdout"]) == (200, "hello\n")


def test_two_control_hosts_may_share_one_ca(host, caller, site, tmp_path):
    twin = support.Control(tmp_path / "twin", set_up=False)
    for source in (site.control.config.ca, ctrl_exec.ca_key_path(site.control.config.ca)):
        twin.put(ctrl_exec.ETC + "/" + os.path.basename(source), read(source), 0o600)
    done = twin.run("setup-ctrl-exec")
    assert done.returncode == 0, done.err
    other = older.Identity(twin.config.cert, twin.config.key, twin.serial())
    assert other.serial != caller.serial
    assert ping(host, other) == 403
    trust(host, other, "twin")
    shared = Authority(os.path.dirname(twin.config.ca))
    serials = set()
    for one in (caller, other):
        pem = shared.sign(renew(host, one), "solo")
        assert complete(host, one, cert=pem)[0] == 200
        serials.add(served(host, caller))
        assert (ping(host, caller), ping(host, other)) == (200, 200)
    assert len(serials) == 2
    assert rotate(host, other, "revoke", caller.serial)[0] == 403
    assert trusted(host) == {caller.serial: "control", other.serial: "twin"}


def test_changes_by_two_dispatchers_at_once_are_all_in_the_map(fresh):
    deployment = fresh("solo")
    host, config = deployment["solo"], deployment.control.config
    caller = older.Identity(config.cert, config.key, deployment.control.serial())
    second = Authority(os.path.dirname(config.ca)).caller("second")
    trust(host, second, "other")
    wanted = {caller.serial: "control", second.serial: "other"}
    threads, answers = [], []
    for number in range(8):
        one, owner = ((caller, "control"), (second, "other"))[number % 2]
        wanted["aa0%d" % number] = owner
        words = (host, one, "add", "aa0%d" % number)
        work = lambda words=words: answers.append(rotate(*words)[0])  # noqa: E731
        threads.append(threading.Thread(target=work, daemon=True))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers == [200] * 8
    assert trusted(host) == wanted
    assert ping(host, caller) == 200


def test_a_change_of_trust_before_the_first_run_is_no_failure_in_the_log(fresh):
    deployment = fresh("solo")
    host, config = deployment["solo"], deployment.control.config
    caller = older.Identity(config.cert, config.key, deployment.control.serial())
    assert rotate(host, caller, "add", "abcd")[0] == 200
    only_spare_left = lambda: len(host.children()) == 2  # noqa: E731 - a front, and who waits for a request
    wait_until(only_spare_left, what="the end of the task")
    assert not host.events("run-store-fail")


# --- a revocation list that cannot be used --------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nonsense", "binary", "directory"])
def test_everybody_is_refused_while_the_revocation_list_cannot_be_used(host, caller, kind):
    path = host.config.revoked_serials
    if kind == "directory":
        os.mkdir(path)
    else:
        write(path, b"abcd\nnot a serial\n" if kind == "nonsense" else b"\xff\xfe\x00")
    seen = len(host.events("deny"))
    try:
        assert "RESULT=ok" in host.reload()
        answer = (403, {"error": "the revocation list cannot be used", "status": "forbidden"})
        for request in ("/ping", *REQUESTS):
            assert ask(host, caller, request, reqid="r", **REQUESTS.get(request, {})) == answer
        lines = host.events("deny")[seen:]
        assert any("everybody is refused" in line and path in line for line in lines)
        assert host.events("revoked-cert")
    finally:
        os.rmdir(path) if kind == "directory" else os.unlink(path)
    assert "RESULT=ok" in host.reload()
    assert ping(host, caller) == 200


@pytest.mark.parametrize("action", ["add", "revoke"])
def test_nothing_changes_while_the_revocation_list_cannot_be_used(host, caller, second, action):
    if action == "revoke":
        assert rotate(host, caller, "add", second.serial)[0] == 200
    write(host.config.revoked_serials, b"not a serial\n")
    before = snapshot(host)
    status, answer = rotate(host, caller, action, second.serial)
    assert status >= 400 and host.config.revoked_serials in answer["error"]
    assert snapshot(host) == before


# --- an older installation ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def past(tmp_path_factory):
    """The PKI of an older control host."""
    return older.OlderSite(tmp_path_factory.mktemp("past"))


@pytest.fixture(scope="module")
def old_house(past, tmp_path_factory):
    """An agent of ours on a host that an older release has installed."""
    one = support.Host(tmp_path_factory.mktemp("house") / "relic", "relic", "rate_limit_disable = yes\n")
    past.give_agent(one)
    one.start()
    yield one
    one.stop()


@pytest.fixture
def relic(old_house):
    with restored(old_house) as one:
        yield one


def serial_path(host):
    return host.config.dispatcher_serial_path


@pytest.mark.parametrize("bits", [2048, 4096])
def test_an_older_dispatcher_is_served_as_it_was(bits, past, tmp_path):
    site = past if bits == 2048 else older.OlderSite(tmp_path / "past", bits)
    host = support.Host(tmp_path / "relic", "relic", "rate_limit_disable = yes\n")
    identity = site.give_agent(host, site.dispatcher.key)  # one key for both: it takes seconds to make
    host.script("hello", "echo hello\n")
    host.start()
    try:
        status, answer = older.ask(host.port, site.dispatcher, "/ping", {"reqid": "p-1"})
        assert (status, answer["status"], answer["host"]) == (200, "ok", "relic")
        assert answer["expiry"] == ctrl_exec.iso_time(ctrl_exec.read_certificate(identity.cert).not_after)
        body = {"script": "hello", "args": [], "reqid": ctrl_exec.new_id(), "username": "", "token": ""}
        status, answer = older.ask(host.port, site.dispatcher, "/run", body)
        assert (status, answer["exit"], answer["stdout"]) == (200, 0, "hello\n")
        assert host.record(body["reqid"], "dispatcher")["owner"] == "dispatcher"
        status, answer = older.ask(host.port, site.dispatcher, "/capabilities")
        assert (status, [script["name"] for script in answer["scripts"]]) == (200, ["hello"])
        assert served(host, site.dispatcher) == read(identity.cert).decode()
        assert not os.path.exists(host.config.trusted_dispatchers_path)
    finally:
        host.stop()


def test_an_older_agents_certificate_opens_no_other_agent(relic, past):
    stranger, itself = past.agent("stranger"), older.Identity(relic.config.cert, relic.config.key, "")
    for identity in (stranger, itself):
        for path, body in (("/ping", {}), ("/renew", {"reqid": "r"}), ("/capabilities", None)):
            status, answer = older.ask(relic.port, identity, path, body)
            assert (status, answer["error"]) == (403, "serial mismatch")
    assert "SERIAL=" + stranger.serial in relic.log()


def test_an_older_agents_certificate_cannot_issue_another(relic, past):
    forged = past.issue("forged", by=past.agent("forger"))
    chain = past.path("chain.pem")
    write(chain, read(forged.cert) + read(past.path("forger.crt")))
    write(relic.config.trusted_dispatchers_path, b"%s forged\n" % forged.serial.encode())
    assert "RESULT=ok" in relic.reload()
    assert older.ask(relic.port, forged._replace(cert=chain), "/ping", {}) == (0, None)
    wait_until(lambda: relic.events("tls-failure"), what="the event")


def is_strict(config):
    context = ctrl_exec.new_server_context(ctrl_exec.agent_identity(config), verify_clients=True)
    return bool(context.verify_flags & ssl.VERIFY_X509_STRICT)


def test_only_an_older_ca_is_verified_less_strictly(host, relic, past, ca):
    assert ctrl_exec.is_strict_ca(ssl.PEM_cert_to_DER_cert(ca.pem))
    assert not ctrl_exec.is_strict_ca(ctrl_exec.read_certificate_der(past.ca))
    assert (is_strict(host.config), is_strict(relic.config)) == (True, False)


@pytest.mark.parametrize("text", ["%s", "0x%s\n", "serial=%s\n", "\n  %s \n"], ids=range(4))
def test_the_older_serial_may_be_spelled_in_any_way(relic, past, text):
    write(serial_path(relic), (text % past.dispatcher.serial.upper()).encode())
    assert "RESULT=ok" in relic.reload()
    assert ping(relic, past.dispatcher) == 200


@pytest.mark.parametrize("text", ["", "\n", "none\n", "{0} {0}\n", "{0}\n{0}\n", None], ids=range(6))
def test_an_older_serial_that_is_none_trusts_nobody(relic, past, text):
    if text is None:
        os.unlink(serial_path(relic))
    else:
        write(serial_path(relic), text.format(past.dispatcher.serial).encode())
    assert "RESULT=ok" in relic.reload()
    assert ping(relic, past.dispatcher) == 403


def test_an_agent_with_an_older_serial_that_is_not_even_text_does_not_start(relic):
    relic.stop()
    write(serial_path(relic), b"\xff\xfe\x00")
    done = relic.run("serve")
    assert done.returncode == 78 and serial_path(relic) in done.err


def test_the_older_serial_may_lie_elsewhere(relic, past):
    path = relic.put("/elsewhere/serial", past.dispatcher.serial)
    os.unlink(serial_path(relic))
    relic.configure("rate_limit_disable = yes\ndispatcher_serial_path = %s\n" % path)
    assert "RESULT=ok" in relic.reload()
    assert ping(relic, past.dispatcher) == 200


@pytest.mark.parametrize("text", ["", "# nobody\n", "abcd other\n"], ids=["empty", "comment", "other"])
def test_once_there_is_a_map_it_decides_alone(relic, past, text):
    write(relic.config.trusted_dispatchers_path, text.encode())
    assert "RESULT=ok" in relic.reload()
    assert ping(relic, past.dispatcher) == 403


def test_a_rotation_by_the_older_dispatcher_keeps_it_in_the_new_map(relic, past):
    following = past.issue("following")
    assert ping(relic, following) == 403
    body = {"serial": following.serial.upper(), "action": "add", "reqid": "r"}
    assert older.ask(relic.port, past.dispatcher, "/rotate-serial", body)[0] == 200
    assert trusted(relic) == {past.dispatcher.serial: "dispatcher", following.serial: "dispatcher"}
    assert (ping(relic, past.dispatcher), ping(relic, following)) == (200, 200)
    assert rotate(relic, following, "remove", past.dispatcher.serial)[0] == 200
    assert (ping(relic, past.dispatcher), ping(relic, following)) == (403, 200)


def test_pairing_with_a_second_dispatcher_keeps_the_older_one(relic, past):
    path = relic.config.trusted_dispatchers_path
    second = past.issue("second")
    ctrl_exec.add_trusted(path, second.serial, "second", older=serial_path(relic))
    assert "RESULT=ok" in relic.reload()
    assert (ping(relic, past.dispatcher), ping(relic, second)) == (200, 200)
    assert trusted(relic) == {past.dispatcher.serial: "dispatcher", second.serial: "second"}


def test_an_older_dispatcher_renews_the_certificate_of_a_new_agent(relic, past):
    status, answer = older.ask(relic.port, past.dispatcher, "/renew", {"reqid": "r"})
    assert status == 200, answer
    pem = past.sign(answer["csr"])
    body = {"reqid": "r", "cert": pem, "ca": read(past.ca).decode()}
    status, answer = older.ask(relic.port, past.dispatcher, "/renew-complete", body)
    assert (status, answer.get("serial")) == (200, ctrl_exec.read_certificate(relic.config.cert).serial), answer
    assert served(relic, past.dispatcher) == pem
    assert ping(relic, past.dispatcher) == 200


def test_an_older_ca_hands_over_to_a_new_one_and_strictness_comes_with_it(relic, past, new_ca, heir):
    old_ca = Authority(past.top)
    assert rotate(relic, past.dispatcher, "add", heir.serial)[0] == 200
    hand_over(relic, past.dispatcher, old_ca, new_ca, old_ca.endorse(new_ca))
    assert (ping(relic, past.dispatcher), ping(relic, heir), is_strict(relic.config)) == (200, 200, False)
    pem = new_ca.sign(renew(relic, heir), "relic")
    status, answer = complete(relic, heir, cert=pem, ca=new_ca.pem)
    assert status == 200, answer
    assert served(relic, heir) == pem
    assert (ping(relic, past.dispatcher), ping(relic, heir), is_strict(relic.config)) == (0, 200, True)


def test_a_new_dispatcher_of_an_older_ca_is_served_beside_the_older_one(relic, past):
    newer = Authority(past.top).caller("newer")
    ctrl_exec.add_trusted(
        relic.config.trusted_dispatchers_path, newer.serial, "newer", older=serial_path(relic)
    )
    assert "RESULT=ok" in relic.reload()
    assert (ping(relic, past.dispatcher), ping(relic, newer)) == (200, 200)
    pem = Authority(past.top).sign(renew(relic, newer), "relic")
    assert complete(relic, newer, cert=pem)[0] == 200
    assert (served(relic, newer), ping(relic, past.dispatcher)) == (pem, 200)
