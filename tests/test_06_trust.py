"""Who is believed: serials, trust map, revocations, identities, TLS policy, and attackers on both sides."""

import grp
import os
import socket
import ssl
import subprocess
import threading
import time
import warnings

import pytest

import ctrl_exec
import support
from ctrl_exec import TrustError

DAY = 86400

# --- serials --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, serial",
    [
        ("dead01", "dead01"),
        ("DEAD01", "dead01"),
        ("DE:AD:01", "dead01"),
        ("00:de:ad:01", "dead01"),
        ("0xDEAD01", "dead01"),
        ("0Xdead01", "dead01"),
        ("serial=DEAD01", "dead01"),
        ("Serial=0xDEAD01", "dead01"),
        ("serial=DE:AD:01", "dead01"),
        ("  dead01\n", "dead01"),
        ("0000dead01", "dead01"),
        ("0" * 20 + "1", "1"),
        ("0", "0"),
        ("000", "0"),
        ("1234", "1234"),
        ("f" * 40, "f" * 40),
        (str(2**159 - 1), "%x" % (2**159 - 1)),  # as long as this, digits are decimal
        (str(10**40), "%x" % 10**40),
        ("9" * 40, "9" * 40),
    ],
)
def test_a_serial_has_one_canonical_form(text, serial):
    assert ctrl_exec.parse_serial(text) == serial
    assert ctrl_exec.parse_serial(serial) == serial or len(serial) > 40


@pytest.mark.parametrize("prefix", ["0x", "serial="])
def test_a_serial_marked_as_hex_is_hex_however_long(prefix):
    assert ctrl_exec.parse_serial(prefix + "0" * 10 + "1" * 35) == "1" * 35


RUBBISH = ["", " ", ":", "0x", "serial=", "xyz", "dead beef", "-1", "+1", "1.5", "de\0ad", "٣", "²", "#"]
RUBBISH.append("f" * 61)


@pytest.mark.parametrize("text", RUBBISH, ids=range(len(RUBBISH)))
def test_rubbish_is_no_serial(text):
    with pytest.raises(ValueError):
        ctrl_exec.parse_serial(text)


def test_the_socket_and_openssl_and_the_program_agree_on_a_serial(deployment):
    control = deployment.control
    printed = subprocess.run(
        ["openssl", "x509", "-noout", "-serial", "-in", control.config.cert], capture_output=True, check=True
    ).stdout.decode()
    assert ctrl_exec.parse_serial(printed) == control.serial()


# --- the trust map --------------------------------------------------------------------------------------


def test_the_trust_map_is_read_with_comments_and_any_form_of_serial(tmp_path):
    path = tmp_path / "map"
    path.write_text("# who may ask\n\nDE:AD control\n  0x0B  backup-1 \nserial=0C third\n")
    assert ctrl_exec.load_trust_map(str(path)) == {"dead": "control", "b": "backup-1", "c": "third"}


def test_no_trust_map_trusts_nobody(tmp_path):
    assert ctrl_exec.load_trust_map(str(tmp_path / "none")) == {}


BAD_LINES = ["nonsense", "dead", "dead a b", "xyz control", "dead ../control", "dead -x", "\0"]


@pytest.mark.parametrize("line", BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_line_of_the_trust_map_is_named(tmp_path, line):
    path = tmp_path / "map"
    path.write_text("aa one\n%s\nbb two\n" % line)
    with pytest.raises(TrustError) as caught:
        ctrl_exec.load_trust_map(str(path))
    assert caught.value.message.startswith("%s:2: " % path)
    assert "\0" not in caught.value.message


@pytest.mark.parametrize("load", [ctrl_exec.load_trust_map, ctrl_exec.load_revoked])
@pytest.mark.parametrize("kind", ["directory", "binary", "fifo", "loop", "huge"])
def test_a_list_that_cannot_be_read_is_an_error_and_not_an_empty_list(tmp_path, load, kind):
    path = tmp_path / "list"
    if kind == "directory":
        path.mkdir()
    elif kind == "binary":
        path.write_bytes(b"\xff\xfe\x00")
    elif kind == "fifo":
        os.mkfifo(str(path))
    elif kind == "loop":
        path.symlink_to(path)
    else:
        path.write_text("# \n" * ctrl_exec.MAX_STATE_FILE)
    with pytest.raises(TrustError) as caught:
        load(str(path))
    assert str(path) in caught.value.message


@pytest.mark.parametrize("load", [ctrl_exec.load_trust_map, ctrl_exec.load_revoked])
def test_a_list_without_read_permission_is_an_error(tmp_path, load):
    path = tmp_path / "list"
    path.write_text("")
    path.chmod(0)
    if support.IS_ROOT:
        os.seteuid(65534)  # root itself reads every file
    try:
        with pytest.raises(TrustError, match="Permission denied"):
            load(str(path))
    finally:
        if support.IS_ROOT:
            os.seteuid(0)


def test_adding_a_dispatcher_keeps_the_others(tmp_path):
    path = str(tmp_path / "state" / "map")
    for serial, name in (("AA:01", "one"), ("bb", "two"), ("0xCC", "three"), ("bb", "two-again")):
        ctrl_exec.add_trusted(path, ctrl_exec.parse_serial(serial), name)
    assert ctrl_exec.load_trust_map(path) == {"aa01": "one", "bb": "two-again", "cc": "three"}
    assert os.stat(path).st_mode & 0o777 == 0o644


def test_dispatchers_added_at_the_same_time_are_all_kept(tmp_path):
    path = str(tmp_path / "map")
    threads = [
        threading.Thread(target=ctrl_exec.add_trusted, args=(path, "%x" % number, "d%d" % number))
        for number in range(1, 13)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ctrl_exec.load_trust_map(path)) == 12


def test_a_broken_trust_map_is_not_overwritten_by_adding_to_it(tmp_path):
    path = tmp_path / "map"
    path.write_text("rubbish\n")
    with pytest.raises(TrustError):
        ctrl_exec.add_trusted(str(path), "aa", "one")
    assert path.read_text() == "rubbish\n"


# --- the revocation list --------------------------------------------------------------------------------


def test_no_revocation_list_revokes_nobody(tmp_path):
    assert ctrl_exec.load_revoked(str(tmp_path / "none")) == frozenset()


def test_a_revocation_list_takes_every_form_of_serial_and_comments(tmp_path):
    path = tmp_path / "revoked"
    path.write_text("# gone\nDE:AD # a laptop\n\n0x00be\nserial=EF01\n")
    assert ctrl_exec.load_revoked(str(path)) == {"dead", "be", "ef01"}


def test_digits_alone_revoke_both_what_they_mean_as_hex_and_as_decimal(tmp_path):
    path = tmp_path / "revoked"
    path.write_text("0012\n%d\n" % 2**127)
    assert ctrl_exec.load_revoked(str(path)) == {"12", "c", str(2**127), "8" + "0" * 31}


@pytest.mark.parametrize("line", ["garbage", "dead beef", "<<<<<<< HEAD", "\0\0\0"], ids=range(4))
def test_garbage_in_a_revocation_list_is_named_and_revokes_nothing_silently(tmp_path, line):
    path = tmp_path / "revoked"
    path.write_text("aa\n%s\n" % line)
    with pytest.raises(TrustError) as caught:
        ctrl_exec.load_revoked(str(path))
    assert caught.value.message.startswith("%s:2: " % path)


def test_adding_a_revocation_keeps_lines_and_adds_nothing_twice(tmp_path):
    path = tmp_path / "revoked"
    path.write_text("# mine\nAA # laptop\n")
    for _ in range(2):
        ctrl_exec.add_revoked(str(path), ["aa", "bb"], "unpaired: x\ninjected")
    text = path.read_text()
    assert text.startswith("# mine\nAA # laptop\n")
    assert len(text.splitlines()) == 3
    assert ctrl_exec.load_revoked(str(path)) == {"aa", "bb"}


def test_adding_to_a_list_without_a_final_newline_joins_no_lines(tmp_path):
    path = tmp_path / "revoked"
    path.write_text("aa")
    ctrl_exec.add_revoked(str(path), ["bb"], "x")
    assert ctrl_exec.load_revoked(str(path)) == {"aa", "bb"}
    path.write_text("aa # laptop of")
    ctrl_exec.add_revoked(str(path), ["bb"], "x")
    assert ctrl_exec.load_revoked(str(path)) == {"aa", "bb"}


def test_a_broken_revocation_list_is_not_overwritten_by_adding_to_it(tmp_path):
    path = tmp_path / "revoked"
    path.write_text("rubbish\n")
    with pytest.raises(TrustError):
        ctrl_exec.add_revoked(str(path), ["aa"], "x")
    assert path.read_text() == "rubbish\n"


# --- keys and identities on disk ------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o700])
def test_a_private_key_for_its_owner_alone_is_accepted(tmp_path, mode):
    path = tmp_path / "key"
    path.write_text("x")
    path.chmod(mode)
    assert ctrl_exec.check_key_mode(str(path)) is None


@pytest.mark.parametrize("mode", [0o640, 0o644, 0o604, 0o660, 0o620, 0o610, 0o601, 0o602, 0o777])
def test_a_private_key_that_others_can_touch_is_refused_with_its_mode(tmp_path, mode):
    path = tmp_path / "key"
    path.write_text("x")
    path.chmod(mode)
    for group in ("", "no-such-group"):
        with pytest.raises(TrustError, match="%04o" % mode) as caught:
            ctrl_exec.check_key_mode(str(path), group)
        assert caught.value.hint == "chmod 600 %s" % path


def test_a_key_that_the_service_group_reads_is_accepted_for_that_group_only(tmp_path):
    path = tmp_path / "key"
    path.write_text("x")
    path.chmod(0o640)
    group = grp.getgrgid(os.stat(str(path)).st_gid).gr_name
    assert ctrl_exec.check_key_mode(str(path), group) is None
    other = next(entry.gr_name for entry in grp.getgrall() if entry.gr_gid != os.stat(str(path)).st_gid)
    with pytest.raises(TrustError):
        ctrl_exec.check_key_mode(str(path), other)
    for mode in (0o660, 0o644, 0o641, 0o650):
        path.chmod(mode)
        with pytest.raises(TrustError):
            ctrl_exec.check_key_mode(str(path), group)


def test_a_missing_key_is_named(tmp_path):
    with pytest.raises(TrustError, match="no such file"):
        ctrl_exec.check_key_mode(str(tmp_path / "none"))


# --- forging --------------------------------------------------------------------------------------------

PROFILE = """\
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid:always
"""

CA_CONFIG = """\
[ca]
default_ca = this
[this]
database = {work}/index.txt
new_certs_dir = {work}
serial = {work}/serial
default_md = sha256
policy = policy
unique_subject = no
email_in_dn = no
string_mask = utf8only
[policy]
commonName = supplied
[req]
prompt = no
distinguished_name = dn
string_mask = utf8only
[dn]
CN = {name}
[extensions]
{extensions}
"""


class Shown:
    """A certificate with its key, as somebody shows it."""

    def __init__(self, cert, key, serial=0):
        self.cert, self.key, self.serial = cert, key, serial


class Forger:
    """Makes certificates of every kind with the real openssl."""

    def __init__(self, top):
        self.top = str(top)
        self.number = 0

    def openssl(self, *argv):
        done = subprocess.run(["openssl", *argv], capture_output=True, timeout=60)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout

    def new_key(self):
        self.number += 1
        path = os.path.join(self.top, "%d.key" % self.number)
        argv = ("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", path)
        self.openssl(*argv, "-pkeyopt", "ec_param_enc:named_curve")
        return path

    def make(self, signer, name, eku="", serial=0, days=(-1, 30), is_ca=False, key="", san=True):
        """A certificate signed by `signer` (None: by itself), valid from and to `days` from now."""
        key = key or self.new_key()
        self.number += 1
        work = os.path.join(self.top, "work%d" % self.number)
        os.mkdir(work)
        serial = serial or int.from_bytes(b"\x55" + os.urandom(15), "big")
        extensions = PROFILE
        if is_ca:
            extensions = extensions.replace("CA:FALSE", "CA:TRUE").replace("digitalSignature", "keyCertSign")
        elif san:
            extensions += "subjectAltName = DNS:%s\n" % name
        if eku:
            extensions += "extendedKeyUsage = %s\n" % eku
        values = {"work": work, "name": name, "extensions": extensions}
        texts = {"cnf": CA_CONFIG.format(**values), "index.txt": "", "serial": "%032X\n" % serial}
        for file, text in texts.items():
            with open(os.path.join(work, file), "w", encoding="ascii") as out:
                out.write(text)
        conf, request, cert = (os.path.join(work, name) for name in ("cnf", "csr", "crt"))
        self.openssl("req", "-new", "-sha256", "-key", key, "-config", conf, "-out", request)
        moments = [time.strftime("%Y%m%d%H%M%SZ", time.gmtime(time.time() + day * DAY)) for day in days]
        by = ["-selfsign", "-keyfile", key]
        if signer is not None:
            by = ["-cert", signer.cert, "-keyfile", signer.key]
        self.openssl(
            "ca", "-batch", "-notext", "-config", conf, "-in", request, "-out", cert, "-extensions",
            "extensions", "-startdate", moments[0], "-enddate", moments[1], *by,
        )  # fmt: skip
        return Shown(cert, key, serial)

    def chain(self, *shown):
        """The first one's certificate with those of the others behind it."""
        self.number += 1
        path = os.path.join(self.top, "chain%d.pem" % self.number)
        with open(path, "wb") as out:
            for one in shown:
                with open(one.cert, "rb") as file:
                    out.write(file.read())
        return Shown(path, shown[0].key, shown[0].serial)


class Field(support.Deployment):
    """Two agents whose one script leaves a mark, and everything an attacker could get hold of."""

    def __init__(self, top):
        self.marks = {}
        super().__init__(top, ("alpha", "beta"))
        self.forger = Forger(self.top)
        config = self.control.config
        self.ca = Shown(config.ca, ctrl_exec.ca_key_path(config.ca))
        subject = ctrl_exec.read_certificate(config.ca).common_name
        self.other_ca = self.forger.make(None, "Other CA", is_ca=True)
        self.twin_ca = self.forger.make(None, subject, is_ca=True)  # the same name, another key

    def add(self, name, conf="rate_limit_disable = yes\n"):
        host = super().add(name, conf)
        self.marks[name] = os.path.join(host.root, "mark")
        host.script("mark", "echo ran >> '%s'\n" % self.marks[name])
        return host

    def identity(self, name):
        config = self[name].config
        return Shown(config.cert, config.key)

    def has_run(self, name):
        try:
            with open(self.marks[name], encoding="ascii") as file:
                return len(file.read().splitlines())
        except FileNotFoundError:
            return 0


@pytest.fixture(scope="module")
def field(tmp_path_factory):
    with Field(tmp_path_factory.mktemp("field")) as made:
        yield made


def requests(tag):
    run = {"script": "mark", "args": [], "reqid": "attack-" + tag, "username": "x", "token": ""}
    return (
        ("POST", "/run", run),
        ("POST", "/ping", {"reqid": "attack-" + tag}),
        ("GET", "/capabilities", {}),
        ("POST", "/renew", {"reqid": "attack-" + tag}),
        ("GET", "/no-such-path", {}),
    )


def try_post(port, context, method, path, body):
    """(status, object), or (0, None) when TLS itself said no."""
    try:
        return support.post(port, context, path, body, method)
    except (OSError, ssl.SSLError):
        return 0, None


def attack(field, shown, name="beta", highest=None):
    """Try every endpoint of an agent with what is `shown`: [(status, object)], and the lines it logged."""
    context = support.client_context()
    if shown is not None:
        context.load_cert_chain(shown.cert, shown.key)
    if highest:
        context.maximum_version = highest
    host = field[name]
    before, ran = len(host.log()), field.has_run(name)
    asked = requests("%d" % time.monotonic_ns())
    answers = [try_post(host.port, context, *request) for request in asked]

    def lines():
        return [line for line in host.log()[before:].splitlines() if refused_line(line)]

    support.wait_until(lambda: len(lines()) >= len(asked), what="a line for every refusal")
    assert field.has_run(name) == ran
    assert "ACTION=run " not in host.log()[before:] and "ACTION=ping " not in host.log()[before:]
    assert len(lines()) == len(asked)
    return answers, lines()


def refused_line(line):
    return any("ACTION=%s " % action in line for action in ("tls-failure", "serial-reject", "revoked-cert"))


def assert_tls_refused(field, shown, **how):
    for highest in (ssl.TLSVersion.TLSv1_3, ssl.TLSVersion.TLSv1_2):
        answers, lines = attack(field, shown, highest=highest, **how)
        assert answers == [(0, None)] * len(answers)
        assert all("ACTION=tls-failure " in line for line in lines)
    return lines


def assert_forbidden(field, shown, error, action):
    answers, lines = attack(field, shown)
    assert answers == [(403, {"error": error, "status": "forbidden"})] * len(answers)
    assert all("ACTION=%s " % action in line and "SERIAL=%x" % shown.serial in line for line in lines)


# --- attacks on a running agent -------------------------------------------------------------------------


def test_the_real_dispatcher_does_leave_a_mark(field):
    before = field.has_run("beta")
    done = field.control.run("run", "beta", "mark")
    assert done.returncode == 0, done.out + done.err
    assert field.has_run("beta") == before + 1


def test_an_agents_own_certificate_opens_no_other_agent(field):
    lines = assert_tls_refused(field, field.identity("alpha"))
    assert all("purpose" in line for line in lines)


def test_an_agents_own_certificate_does_not_open_its_own_port(field):
    assert_tls_refused(field, field.identity("beta"))


def test_a_server_certificate_with_a_trusted_serial_opens_nothing(field):
    trusted = int(field.control.serial(), 16)
    assert_tls_refused(field, field.forger.make(field.ca, "control", "serverAuth", serial=trusted))


@pytest.mark.parametrize("signer", ["other_ca", "twin_ca"])
def test_a_certificate_of_another_ca_opens_nothing_even_with_our_names_and_serial(field, signer):
    trusted = int(field.control.serial(), 16)
    shown = field.forger.make(getattr(field, signer), "control", "clientAuth", serial=trusted)
    assert_tls_refused(field, shown)
    assert_tls_refused(field, field.forger.chain(shown, getattr(field, signer)))


def test_a_self_signed_certificate_opens_nothing(field):
    trusted = int(field.control.serial(), 16)
    assert_tls_refused(field, field.forger.make(None, "control", "clientAuth", serial=trusted))


@pytest.mark.parametrize("days, why", [((-10, -1), "expired"), ((1, 10), "not yet valid")])
def test_a_certificate_outside_its_dates_opens_nothing(field, days, why):
    trusted = int(field.control.serial(), 16)
    shown = field.forger.make(field.ca, "control", "clientAuth", serial=trusted, days=days)
    assert all(why in line for line in assert_tls_refused(field, shown))


@pytest.mark.parametrize("eku", ["", "clientAuth", "clientAuth,serverAuth", "anyExtendedKeyUsage"])
def test_a_certificate_of_our_ca_whose_serial_is_not_in_the_map_is_forbidden(field, eku):
    shown = field.forger.make(field.ca, "control", eku)
    if eku == "anyExtendedKeyUsage":  # OpenSSL releases differ on it; neither answer lets it in
        answers, _ = attack(field, shown)
        assert all(status in (0, 403) for status, _ in answers)
        return
    assert_forbidden(field, shown, "serial mismatch", "serial-reject")


def test_the_ca_certificate_itself_opens_nothing(field):
    answers, _ = attack(field, field.ca)
    assert all(status in (0, 403) for status, _ in answers)


def test_a_leaf_that_signs_a_further_leaf_opens_nothing(field):
    trusted = int(field.control.serial(), 16)
    for leaf in (field.identity("alpha"), Shown(field.control.config.cert, field.control.config.key)):
        further = field.forger.make(leaf, "control", "clientAuth", serial=trusted)
        assert_tls_refused(field, field.forger.chain(further, leaf))


def test_a_sub_ca_is_refused_by_the_path_length_of_our_ca(field):
    trusted = int(field.control.serial(), 16)
    sub = field.forger.make(field.ca, "Sub CA", is_ca=True)
    shown = field.forger.make(sub, "control", "clientAuth", serial=trusted)
    assert_tls_refused(field, field.forger.chain(shown, sub))


def test_no_certificate_at_all_opens_nothing(field):
    lines = assert_tls_refused(field, None)
    assert all("no certificate" in line for line in lines)


def test_plain_http_on_the_tls_port_runs_nothing(field):
    host, before, ran = field["beta"], len(field["beta"].log()), field.has_run("beta")
    for method, path, body in requests("plain"):
        data = ctrl_exec.encode_json(body)
        head = "%s %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (method, path, len(data))
        with socket.create_connection(("127.0.0.1", host.port), 20) as sock:
            try:
                sock.sendall(head.encode() + data)
                while sock.recv(4096):
                    pass
            except ConnectionError:
                pass

    def lines():
        return [line for line in host.log()[before:].splitlines() if "plain HTTP" in line]

    support.wait_until(lambda: len(lines()) == 5, what="the log lines")
    assert all("ACTION=tls-failure " in line for line in lines())
    assert field.has_run("beta") == ran


def test_a_revoked_serial_is_forbidden_from_the_next_reload(fresh):
    own = fresh("solo")
    host = own["solo"]
    context = support.dispatcher_context(own.control)
    assert support.post(host.port, context, "/ping", {"reqid": "before"})[0] == 200
    with support.tls_connect(host.port, context) as kept:  # a connection from before the revocation
        kept.sendall(ctrl_exec.encode_request("POST", "/ping", "x", {"reqid": "kept"}, True))
        assert support.read_reply(kept)[0] == 200
        serial = own.control.serial()
        host.put(ctrl_exec.AGENT_ETC + "/revoked-serials", "# lost\n%s\n" % serial.upper())
        assert "RESULT=ok" in host.reload()

        def refused():
            return try_post(host.port, context, "POST", "/ping", {"reqid": "after"})[0] == 403

        support.wait_until(refused, what="the new list")
        try:
            kept.sendall(ctrl_exec.encode_request("POST", "/ping", "x", {"reqid": "late"}, True))
            status = support.read_reply(kept)[0]
        except (OSError, ssl.SSLError):
            status = 0
        assert status in (0, 403)
    for method, path, body in requests("revoked"):
        answer = support.post(host.port, context, path, body, method)
        assert answer == (403, {"error": "certificate revoked", "status": "forbidden"})
    assert host.events("revoked-cert")
    assert all("SERIAL=" + serial in line for line in host.events("revoked-cert"))
    assert "REQID=late" not in host.log()
    done = own.control.run("run", "solo", "hello")
    assert done.returncode == 1
    assert "revoked" in done.out
    # garbage in the list: everybody is refused, and a restart refuses to serve at all
    host.put(ctrl_exec.AGENT_ETC + "/revoked-serials", "")
    host.reload()
    assert support.post(host.port, context, "/ping", {"reqid": "again"})[0] == 200
    host.put(ctrl_exec.AGENT_ETC + "/revoked-serials", "what is this?\n")
    host.reload()
    status, answer = support.post(host.port, context, "/ping", {"reqid": "none"})
    assert (status, answer["error"]) == (403, "the revocation list cannot be used")
    assert any("everybody is refused" in line for line in host.events("deny"))
    host.stop()
    broken = host.run("serve")
    assert broken.returncode == 78
    assert "revoked-serials:1" in broken.err


def test_a_dispatcher_with_an_unreadable_revocation_list_asks_nobody(field):
    path = field.control.config.revoked_serials
    saved = open(path, "rb").read() if os.path.exists(path) else None
    before = len(field["alpha"].log())
    try:
        ctrl_exec.write_atomic(path, b"rubbish\n")
        for words in (("ping", "alpha"), ("run", "alpha", "mark"), ("discovery", "alpha")):
            done = field.control.run(*words)
            assert done.returncode == 1
            assert "revoked-serials:1" in done.err
    finally:
        if saved is None:
            os.unlink(path)
        else:
            ctrl_exec.write_atomic(path, saved)
    assert field["alpha"].log()[before:] == ""


# --- the TLS policy -------------------------------------------------------------------------------------


def own_context(control):
    return support.dispatcher_context(control)


def handshake_error(port, context):
    with pytest.raises((ssl.SSLError, ConnectionError)) as caught:
        with support.tls_connect(port, context) as sock:
            sock.sendall(b"GET /capabilities HTTP/1.1\r\nHost: x\r\n\r\n")
            assert sock.recv(1) == b""
            raise ConnectionResetError("closed")
    return str(caught.value)


@pytest.mark.parametrize("version", ["TLSv1", "TLSv1_1"])
def test_tls_below_1_2_is_refused(field, version):
    context = own_context(field.control)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = getattr(ssl.TLSVersion, version)
        context.maximum_version = getattr(ssl.TLSVersion, version)
    context.set_ciphers("ALL:@SECLEVEL=0")
    before = len(field["beta"].events("tls-failure"))
    handshake_error(field["beta"].port, context)
    support.wait_until(lambda: len(field["beta"].events("tls-failure")) > before, what="the log line")


@pytest.mark.parametrize(
    "ciphers", ["ECDHE+AES:!AESGCM:!AESCCM", "ECDHE-ECDSA-AES256-SHA", "AES128-GCM-SHA256", "DHE+AESGCM"]
)
def test_what_is_not_ecdhe_with_aead_is_refused(field, ciphers):
    context = own_context(field.control)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(ciphers + ":@SECLEVEL=0")
    handshake_error(field["beta"].port, context)


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_what_is_agreed_on_is_ecdhe_with_aead(field, version):
    context = own_context(field.control)
    context.minimum_version = context.maximum_version = getattr(ssl.TLSVersion, version)
    with support.tls_connect(field["beta"].port, context) as sock:
        name, spoken, _ = sock.cipher()
        assert "GCM" in name or "CHACHA20" in name
        assert spoken == version.replace("_", ".")
        assert sock.compression() is None


def talk(port, context, session):
    """One ping: (its status, the session to resume, whether one was resumed)."""
    with socket.create_connection(("127.0.0.1", port), 20) as raw:
        with context.wrap_socket(raw, session=session) as sock:
            sock.sendall(ctrl_exec.encode_request("POST", "/ping", "x", {"reqid": "again"}, False))
            return support.read_reply(sock)[0], sock.session, sock.session_reused


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_no_session_ticket_is_given_or_taken(field, version):
    context = own_context(field.control)
    context.minimum_version = context.maximum_version = getattr(ssl.TLSVersion, version)
    status, session, _ = talk(field["beta"].port, context, None)
    assert status == 200
    assert session is None or not session.has_ticket
    if version == "TLSv1_3":
        assert talk(field["beta"].port, context, session)[::2] == (200, False)


def test_a_session_from_before_a_revocation_opens_nothing(field):
    host = field["beta"]
    context = own_context(field.control)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    status, session, _ = talk(host.port, context, None)
    assert status == 200
    path = host.put(ctrl_exec.AGENT_ETC + "/revoked-serials", field.control.serial() + "\n")
    try:
        assert "RESULT=ok" in host.reload()
        support.wait_until(lambda: talk(host.port, context, None)[0] == 403, what="the new list")
        assert talk(host.port, context, session)[0] == 403
    finally:
        os.unlink(path)
        host.reload()
    support.wait_until(lambda: talk(host.port, context, None)[0] == 200, what="the list without us")


def test_one_policy_holds_for_every_context(field):
    identity = field.control.identity
    contexts = [
        ctrl_exec.new_server_context(identity, verify_clients=True),
        ctrl_exec.new_server_context(identity, verify_clients=False),
        ctrl_exec.new_client_context(identity),
        ctrl_exec.new_pairing_context(),
        ctrl_exec.new_probe_context(identity.ca),
    ]
    for context in contexts:
        assert context.minimum_version == ssl.TLSVersion.TLSv1_2
        assert context.options & ssl.OP_NO_TICKET and context.options & ssl.OP_NO_COMPRESSION
        assert context.verify_flags & ssl.VERIFY_X509_STRICT
        for cipher in context.get_ciphers():
            assert cipher["aead"], cipher
            assert cipher["protocol"] == "TLSv1.3" or "ECDHE" in cipher["name"]
    assert [context.verify_mode for context in contexts] == [
        ssl.CERT_REQUIRED, ssl.CERT_NONE, ssl.CERT_REQUIRED, ssl.CERT_NONE, ssl.CERT_REQUIRED,
    ]  # fmt: skip


# --- an identity on disk that cannot be used ------------------------------------------------------------


def test_a_sound_identity_is_accepted(field, openssl):
    config = field["alpha"].config
    info = ctrl_exec.check_identity(openssl, ctrl_exec.agent_identity(config), "sslserver")
    assert info.names == ("alpha",)
    control = ctrl_exec.check_identity(openssl, field.control.identity, "sslclient")
    assert control.names == ("control",)


@pytest.mark.parametrize(
    "what, why",
    [
        ("another key", "does not belong to the key"),
        ("another CA", "refused"),
        ("a CA of the same name", "refused"),
        ("the other purpose", "purpose"),
        ("expired", "expired"),
        ("not yet valid", "not yet valid"),
        ("self-signed", "refused"),
        ("loose key", "mode 0644"),
        ("no certificate", "no such file"),
        ("no key", "no such file"),
        ("no CA", "no such file"),
        ("garbage certificate", "not a certificate"),
        ("garbage CA", "refused"),
        ("empty key", "key"),
    ],
)
def test_an_identity_that_cannot_be_used_is_refused_with_the_cause(field, openssl, tmp_path, what, why):
    forger, ca = field.forger, field.ca
    shown, authority = None, ca.cert
    if what == "another CA":
        authority = field.other_ca.cert
    elif what == "a CA of the same name":
        authority = field.twin_ca.cert
    elif what == "the other purpose":
        shown = forger.make(ca, "alpha", "clientAuth")
    elif what == "expired":
        shown = forger.make(ca, "alpha", "serverAuth", days=(-9, -1))
    elif what == "not yet valid":
        shown = forger.make(ca, "alpha", "serverAuth", days=(1, 9))
    elif what == "self-signed":
        shown = forger.make(None, "alpha", "serverAuth")
    shown = shown or forger.make(ca, "alpha", "serverAuth")
    key, cert = shown.key, shown.cert
    if what == "another key":
        key = forger.new_key()
    elif what == "loose key":
        os.chmod(key, 0o644)
    elif what == "empty key":
        key = str(tmp_path / "key")
        open(key, "w").close()
        os.chmod(key, 0o600)
    elif what.startswith("no "):
        missing = str(tmp_path / "missing")
        cert = missing if what == "no certificate" else cert
        key = missing if what == "no key" else key
        authority = missing if what == "no CA" else authority
    elif what.startswith("garbage"):
        garbage = str(tmp_path / "garbage")
        with open(garbage, "w", encoding="ascii") as file:
            file.write("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
        cert = garbage if what == "garbage certificate" else cert
        authority = garbage if what == "garbage CA" else authority
    identity = ctrl_exec.Identity(cert, key, authority)
    with pytest.raises(ctrl_exec.CtrlExecError) as caught:
        ctrl_exec.check_identity(openssl, identity, "sslserver")
    assert why in caught.value.message
    if what in ("another key", "loose key", "no certificate", "no key", "no CA", "garbage certificate",
                "garbage CA", "empty key"):  # fmt: skip
        with pytest.raises(ctrl_exec.CtrlExecError):
            ctrl_exec.new_server_context(identity, verify_clients=True)


def test_a_certificate_that_is_not_utf8_is_refused_and_no_bug(field, openssl, tmp_path):
    bad = str(tmp_path / "bad.crt")
    with open(field["alpha"].config.cert, "rb") as file, open(bad, "wb") as out:
        out.write("Größe\n".encode("latin-1") + file.read())  # text before the block, as openssl writes it
    identity = ctrl_exec.agent_identity(field["alpha"].config)
    for changed in (identity._replace(cert=bad), identity._replace(ca=bad)):
        try:
            ctrl_exec.check_identity(openssl, changed, "sslserver")
        except TrustError:
            pass


def test_an_agent_with_a_loose_key_does_not_start(fresh):
    own = fresh("solo", start=False)
    os.chmod(own["solo"].config.key, 0o644)
    done = own["solo"].run("serve")
    assert done.returncode == 78
    assert "0644" in done.err and "chmod 600" in done.err


def test_a_dispatcher_with_a_loose_key_asks_nobody(field):
    key, before = field.control.config.key, len(field["alpha"].log())
    os.chmod(key, 0o640)
    try:
        done = field.control.run("ping", "alpha")
    finally:
        os.chmod(key, 0o600)
    assert done.returncode == 1
    assert "0640" in done.err
    assert field["alpha"].log()[before:] == ""


# --- a name is compared exactly -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names, common, name, same",
    [
        (("web-1",), "x", "web-1", True),
        (("WEB-1",), "x", "web-1", True),
        (("*.example.com",), "x", "a.example.com", False),
        (("*",), "*", "web-1", False),
        (("web-1",), "web-2", "web-2", False),  # the CN counts only where there is no DNS name
        ((), "web-1", "web-1", True),
        ((), "", "", True),
        (("web-10",), "web-1", "web-1", False),
        (("web-1.example.com",), "", "web-1", False),
        (("web-1 ",), "", "web-1", False),
    ],
)
def test_a_certificate_is_for_exactly_its_name(names, common, name, same):
    assert ctrl_exec.is_named(ctrl_exec.PeerCert("1", common, names), name) == same


# --- impostors in an agent's place ----------------------------------------------------------------------


class Impostor:
    """Listens like an agent, shows what it has, and keeps every byte it is sent over TLS."""

    def __init__(self, shown):
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(shown.cert, shown.key)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.connections = 0
        self.received = b""
        self.finished = 0
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        while True:
            try:
                raw, _ = self.listener.accept()
            except OSError:
                return
            self.connections += 1
            try:
                raw.settimeout(60)
                with self.context.wrap_socket(raw, server_side=True) as sock:
                    while True:
                        data = sock.recv(65536)
                        if not data:
                            break
                        self.received += data
                        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
            except OSError:
                pass
            finally:
                raw.close()
                self.finished += 1

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


def enlist(field, name, port, cert_name, serial=""):
    """An entry in the registry."""
    agent = ctrl_exec.Agent(name, name, "127.0.0.1", port, "ip", cert_name, serial, "2099-01-01T00:00:00Z")
    with ctrl_exec.registry_lock(field.control.config.registry_dir):
        ctrl_exec.save_agent(field.control.config.registry_dir, agent)


def refused_by_ced(field, shown, cause, cert_name="victim", serial=""):
    """Have the real `ced` meet an impostor with every verb."""
    with Impostor(shown) as impostor:
        enlist(field, "victim", impostor.port, cert_name, serial)
        verbs = (("ping", "victim"), ("run", "victim", "mark"), ("discovery", "victim"))
        for words in verbs:
            status, answer = field.control.json(*words)
            assert status == 1
            text = ctrl_exec.json.dumps(answer)
            assert cause in text, text
            assert "Traceback" not in text
        done = field.control.run("run", "victim", "mark")
        assert done.returncode == 1
        assert cause in done.out + done.err
        support.wait_until(lambda: impostor.finished == 4, what="the end of the connections")
        assert impostor.connections == 4
        assert impostor.received == b""


def test_an_impostor_of_another_ca_is_refused(field):
    for signer in (field.other_ca, field.twin_ca):
        shown = field.forger.chain(field.forger.make(signer, "victim", "serverAuth"), signer)
        refused_by_ced(field, shown, "certificate is refused")


def test_a_self_signed_impostor_is_refused(field):
    refused_by_ced(field, field.forger.make(None, "victim", "serverAuth"), "self-signed")


def test_an_impostor_with_an_expired_certificate_is_refused(field):
    shown = field.forger.make(field.ca, "victim", "serverAuth", days=(-10, -1))
    refused_by_ced(field, shown, "expired")


def test_an_impostor_with_a_certificate_not_yet_valid_is_refused(field):
    shown = field.forger.make(field.ca, "victim", "serverAuth", days=(1, 10))
    refused_by_ced(field, shown, "not yet valid")


def test_an_impostor_with_a_client_certificate_is_refused(field):
    refused_by_ced(field, field.forger.make(field.ca, "victim", "clientAuth"), "purpose")


def test_an_impostor_with_a_leaf_signed_by_a_leaf_is_refused(field):
    leaf = field.identity("beta")
    shown = field.forger.chain(field.forger.make(leaf, "victim", "serverAuth"), leaf)
    refused_by_ced(field, shown, "certificate is refused")


@pytest.mark.parametrize("name", ["intruder", "victim2", "*", "*.victim"])
def test_an_impostor_with_another_name_is_refused_before_a_byte_is_sent(field, name):
    refused_by_ced(field, field.forger.make(field.ca, name, "serverAuth"), "wrong identity")


def test_the_common_name_does_not_help_where_there_is_a_dns_name(field):
    purposes = "serverAuth\nsubjectAltName = DNS:x"
    shown = field.forger.make(field.ca, "victim", purposes, san=False)
    refused_by_ced(field, shown, "wrong identity")


def test_an_unpaired_agent_is_refused_from_then_on(field):
    path = field.control.config.revoked_serials
    shown = field.forger.make(field.ca, "leaver", "serverAuth")
    with Impostor(shown) as impostor:
        enlist(field, "leaver", impostor.port, "leaver", "%x" % shown.serial)
        assert field.control.run("unpair", "leaver").returncode == 0
        assert "unknown host" in field.control.run("ping", "leaver").err
        assert impostor.connections == 0
    assert "%x" % shown.serial in ctrl_exec.load_revoked(path)
    refused_by_ced(field, shown, "is revoked", cert_name="leaver", serial="%x" % shown.serial)


def test_an_impostor_that_does_not_speak_tls_is_refused_in_a_sentence(field):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        got = []

        def serve():
            sock, _ = listener.accept()
            with sock:
                got.append(sock.recv(65536))
                sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        enlist(field, "plain", listener.getsockname()[1], "plain")
        done = field.control.run("run", "plain", "mark")
        thread.join(60)
    assert done.returncode == 1
    assert "does not speak TLS" in done.out + done.err
    assert got[0][:1] == b"\x16" and b"mark" not in got[0]  # a handshake record and nothing else


def test_another_agent_at_the_registered_address_is_refused_before_a_byte_is_sent(field):
    alpha, beta = field["alpha"], field["beta"]
    before, ran = len(beta.log()), field.has_run("beta")
    moved = field.control.run("edit-agent", "alpha", "--agent-port", str(beta.port))
    assert moved.returncode == 0, moved.err
    try:
        for words in (("ping", "alpha"), ("run", "alpha", "mark"), ("discovery", "alpha")):
            done = field.control.run(*words)
            assert done.returncode == 1
            text = done.out + done.err
            assert "wrong identity" in text and "beta" in text and "alpha" in text
        # the same through --port and name:port, which say where and not who
        for words in (("ping", "beta:%d" % alpha.port), ("ping", "beta", "--port", str(alpha.port))):
            done = field.control.run(*words)
            assert done.returncode == 1
            assert "wrong identity" in done.out + done.err
    finally:
        assert field.control.run("edit-agent", "alpha", "--agent-port", str(alpha.port)).returncode == 0
    assert field.has_run("beta") == ran
    assert not any(
        "ACTION=%s " % action in beta.log()[before:] for action in ("ping", "run", "capabilities", "deny")
    )
    assert field.control.run("ping", "alpha").returncode == 0


def test_the_certificate_and_key_of_another_agent_at_an_impostor_see_no_request(field):
    refused_by_ced(field, field.identity("beta"), "wrong identity")


def test_a_renamed_agent_is_still_known_by_the_name_in_its_certificate(field):
    control = field.control
    assert control.run("edit-agent", "beta", "--rename", "db-9").returncode == 0
    try:
        ran = field.has_run("beta")
        done = control.run("run", "db-9", "mark")
        assert done.returncode == 0, done.out + done.err
        assert field.has_run("beta") == ran + 1
        assert control.run("ping", "beta").returncode == 2
        assert ctrl_exec.get_agent(control.config.registry_dir, "db-9").cert_name == "beta"
        # and the new name alone is no identity
        with Impostor(field.forger.make(field.ca, "db-9", "serverAuth")) as impostor:
            done = control.run("ping", "db-9", "--port", str(impostor.port))
            assert done.returncode == 1
            assert "wrong identity" in done.out + done.err
            support.wait_until(lambda: impostor.finished == 1, what="the end of the connection")
            assert impostor.received == b""
    finally:
        assert control.run("edit-agent", "db-9", "--rename", "beta").returncode == 0
    assert control.run("ping", "beta").returncode == 0


def test_an_agent_that_does_not_trust_the_dispatcher_says_so(field):
    stranger = field.forger.make(field.ca, "control", "clientAuth,serverAuth")
    real, key = field.control.config.cert, field.control.config.key
    saved = [(path, open(path, "rb").read(), mode) for path, mode in ((real, 0o644), (key, 0o600))]
    try:
        for source, target, mode in ((stranger.cert, real, 0o644), (stranger.key, key, 0o600)):
            with open(source, "rb") as file:
                ctrl_exec.write_atomic(target, file.read(), mode=mode)
        done = field.control.run("run", "alpha", "mark")
    finally:
        for path, data, mode in saved:
            ctrl_exec.write_atomic(path, data, mode=mode)
    assert done.returncode == 1
    assert "serial mismatch" in done.out


def test_a_dispatcher_that_the_agent_refuses_is_told_why_every_time(field):
    # TLS 1.3 lets the caller finish its handshake before it is refused, and then write into a closed
    # connection: the reason that the agent gave must come out whichever is faster
    foreign = field.forger.make(field.other_ca, "control", "clientAuth")
    context = ctrl_exec.new_client_context(ctrl_exec.Identity(foreign.cert, foreign.key, field.ca.cert))
    target = ctrl_exec.Target("alpha", "127.0.0.1", field["alpha"].port, "alpha")
    told = set()
    for _ in range(40):
        with pytest.raises(ctrl_exec.TransportError) as caught:
            with ctrl_exec.connect_agent(target, context, frozenset(), 20) as connection:
                connection.request("POST", "/ping", {"reqid": "x"}, ctrl_exec.Deadline(20))
        told.add((caught.value.message.partition(": ")[2], caught.value.state))
    assert told == {("it does not know the CA of our certificate", "unreachable")}


# --- the self ping --------------------------------------------------------------------------------------


def test_self_ping_finds_an_agent_that_serves_another_certificate(fresh):
    own = fresh("solo")
    host = own["solo"]
    assert host.run("self-ping").returncode == 0
    own.control.run("unpair", "solo")
    os.unlink(host.config.cert)
    own.control.register(host)
    done = host.run("self-ping")
    assert done.returncode == 1
    assert "reload" in done.err
    host.reload()
    support.wait_until(lambda: host.run("self-ping").returncode == 0, what="the new certificate")

