"""The CA: what it makes, what it signs, and which requests it refuses."""

import base64
import json
import os
import random
import re
import secrets
import shutil
import ssl
import stat
import subprocess
import sys
import threading
import time

import pytest

import ctrl_exec
import support
from ctrl_exec import CtrlExecError, ProgramError, TrustError

DAY = 86400
LONG_NAME = ".".join(["a" * 63, "b" * 63, "c" * 63, "d" * 61])  # 253 characters

BASIC_CONSTRAINTS, KEY_USAGE, EXTENDED = "2.5.29.19", "2.5.29.15", "2.5.29.37"
SUBJECT_KEY, AUTHORITY_KEY, ALT_NAME = "2.5.29.14", "2.5.29.35", "2.5.29.17"
SERVER_AUTH, CLIENT_AUTH = "2b06010505070301", "2b06010505070302"  # id-kp-serverAuth, id-kp-clientAuth


# --- a small reader of our own, so that the program's parser does not judge itself ----------------------


def elements(data):
    """(tag, content) of every element in a DER content."""
    found, at = [], 0
    while at < len(data):
        tag, size, at = data[at], data[at + 1], at + 2
        if size & 0x80:
            count = size & 0x7F
            size, at = int.from_bytes(data[at : at + count], "big"), at + count
        assert at + size <= len(data)
        found.append((tag, data[at : at + size]))
        at += size
    return found


def dotted(content):
    """A DER object identifier below 2.5 or 1.x as text; enough for extensions."""
    numbers, value = [content[0] // 40, content[0] % 40], 0
    for byte in content[1:]:
        value = value << 7 | byte & 0x7F
        if not byte & 0x80:
            numbers.append(value)
            value = 0
    return ".".join(map(str, numbers))


class Cert:
    """What a certificate says, straight from its DER."""

    def __init__(self, pem):
        der = ssl.PEM_cert_to_DER_cert(pem)
        ((_, whole),) = elements(der)
        tbs = elements(elements(whole)[0][1])
        self.serial = int.from_bytes(tbs[1][1], "big", signed=True)
        self.algorithm = tbs[2][1]
        self.issuer, self.subject = tbs[3][1], tbs[5][1]
        self.date_tags = [tag for tag, _ in elements(tbs[4][1])]
        self.public_key = tbs[6][1]
        self.extensions = {}
        for _, entry in elements(elements(tbs[-1][1])[0][1]):
            parts = elements(entry)
            oid = dotted(parts[0][1])
            assert oid not in self.extensions
            self.extensions[oid] = (len(parts) == 3 and parts[1] == (1, b"\xff"), parts[-1][1])

    def names(self):
        """(tag, text) of every subjectAltName; 0x82 is a DNS name."""
        ((_, listed),) = elements(self.extensions[ALT_NAME][1])
        return [(tag, content.decode()) for tag, content in elements(listed)]

    def common_names(self):
        found = []
        for _, relative in elements(self.subject):
            for _, pair in elements(relative):
                (_, oid), (_, value) = elements(pair)
                found.append((dotted(oid), value.decode()))
        return found


def tool(*argv, stdin=b"", fails=False):
    """Run the real openssl."""
    done = subprocess.run(["openssl", *argv], input=stdin, capture_output=True, timeout=60)
    assert fails or done.returncode == 0, done.stderr.decode()
    return done.stdout


class Ca:
    """A CA made by the program, and keys to ask it with."""

    def __init__(self, top, openssl):
        self.top = str(top)
        self.openssl = openssl
        self.cert, self.key = self.path("ca.crt"), self.path("ca.key")
        self.info = ctrl_exec.new_ca(openssl, self.cert, "ec", "Test CA")
        self.ec = self.keep("ec.key", openssl.new_key("ec"))
        self.rsa = self.keep("rsa.key", tool("genrsa", "2048"))

    def path(self, name):
        return os.path.join(self.top, name)

    def keep(self, name, data):
        with open(self.path(name), "wb") as file:
            file.write(data if isinstance(data, bytes) else data.encode())
        os.chmod(self.path(name), 0o600)
        return self.path(name)

    def ask(self, key="", extensions="", subject="CN = asked", options=("-sha256",)):
        """A request made by the real openssl, with whatever is wished for in it."""
        config = "[req]\nprompt = no\ndistinguished_name = dn\n%s[dn]\n%s\n[v3]\n%s\n" % (
            "req_extensions = v3\n" if extensions else "", subject, extensions,
        )  # fmt: skip
        path = self.keep("req.cnf", config)
        return tool("req", "-new", *options, "-key", key or self.ec, "-config", path).decode()

    def sign(self, request, name="web-1", profile="agent", days=365):
        return self.openssl.sign(request, name, profile, days, self.cert, self.key)


@pytest.fixture(scope="module")
def ca(tmp_path_factory, openssl):
    return Ca(tmp_path_factory.mktemp("ca"), openssl)


@pytest.fixture(scope="module")
def issued(ca):
    """One certificate of each profile."""
    pem = {profile: ca.sign(ca.ask(), "web-1", profile) for profile in ("agent", "dispatcher")}
    with open(ca.cert, encoding="ascii") as file:
        pem["ca"] = file.read()
    return pem


def read(path):
    with open(path, "rb") as file:
        return file.read()


def armour(der, label="CERTIFICATE REQUEST"):
    text = base64.b64encode(der).decode()
    lines = [text[at : at + 64] for at in range(0, len(text), 64)]
    return "-----BEGIN %s-----\n%s\n-----END %s-----\n" % (label, "\n".join(lines), label)


def unarmour(pem):
    return base64.b64decode("".join(pem.split("-----")[2].split()))


def refusal(openssl, pem):
    """The sentence a request is refused with."""
    with pytest.raises(TrustError) as caught:
        openssl.check_request(pem)
    return caught.value.message


# --- the CA is made once --------------------------------------------------------------------------------


def test_setup_ca_never_overwrites_a_ca(tmp_path):
    control = support.Control(tmp_path / "c", set_up=False)
    assert control.run("setup-ca").returncode == 0
    key, cert = ctrl_exec.ca_key_path(control.config.ca), control.config.ca
    before = read(key), read(cert)
    again = control.run("setup-ca")
    assert again.returncode == 1
    assert "never overwritten" in again.err
    assert (read(key), read(cert)) == before


@pytest.mark.parametrize("half", ["ca.key", "ca.crt"])
def test_half_a_ca_is_left_as_it_is_and_named(tmp_path, openssl, half):
    path = tmp_path / half
    path.write_text("somebody's file\n")
    with pytest.raises(TrustError, match=re.escape(str(path))):
        ctrl_exec.new_ca(openssl, str(tmp_path / "ca.crt"), "ec", "CA")
    assert path.read_text() == "somebody's file\n"
    assert os.listdir(str(tmp_path)) == [half]


def test_a_ca_that_could_not_be_signed_leaves_nothing_behind(tmp_path):
    class Broken(ctrl_exec.OpenSSL):
        def sign_ca(self, *_):
            raise ProgramError("no")

    ca_cert = str(tmp_path / "ca.crt")
    with pytest.raises(ProgramError):
        ctrl_exec.new_ca(Broken(), ca_cert, "ec", "CA")
    assert os.listdir(str(tmp_path)) == []
    assert ctrl_exec.new_ca(ctrl_exec.OpenSSL(), ca_cert, "ec", "CA").common_name == "CA"


def test_a_second_setup_ca_at_the_same_moment_does_not_destroy_the_first(tmp_path, openssl):
    ca_cert = str(tmp_path / "ca.crt")
    made = []

    class Late(ctrl_exec.OpenSSL):
        def new_key(self, kind):
            if not made:  # while we make our key, another process makes its whole CA
                made.append(ctrl_exec.new_ca(openssl, ca_cert, "ec", "First"))
            return super().new_key(kind)

    with pytest.raises(CtrlExecError):
        ctrl_exec.new_ca(Late(), ca_cert, "ec", "Second")
    assert ctrl_exec.read_certificate(ca_cert).serial == made[0].serial
    assert os.path.exists(ctrl_exec.ca_key_path(ca_cert))
    openssl.check_key_match(read(ca_cert), ctrl_exec.ca_key_path(ca_cert))


def test_a_second_setup_ca_between_key_and_certificate_keeps_the_key(tmp_path, openssl):
    ca_cert = str(tmp_path / "ca.crt")
    key = ctrl_exec.ca_key_path(ca_cert)

    class Between(ctrl_exec.OpenSSL):
        def new_key(self, kind):
            ctrl_exec.new_key_file(openssl, key, kind)  # the other has its key, not yet its certificate
            return super().new_key(kind)

        def sign_ca(self, *_):
            raise ProgramError("no")

    with pytest.raises(CtrlExecError):
        ctrl_exec.new_ca(Between(), ca_cert, "ec", "Second")
    assert os.path.exists(key)


ODD_NAMES = ["Größe " * 20, "a/b=c", "x\ny", "semi;colon # $HOME \\ \"q\"", "n" * 300]


@pytest.mark.parametrize("name", ODD_NAMES, ids=range(len(ODD_NAMES)))
def test_any_name_for_the_ca_works_or_is_refused_in_a_sentence(tmp_path, name):
    control = support.Control(tmp_path / "c", set_up=False)
    done = control.run("setup-ca", "--name", name)
    assert done.returncode in (0, 1, 2), done.err
    exists = [os.path.exists(path) for path in (control.config.ca, ctrl_exec.ca_key_path(control.config.ca))]
    assert exists == [done.returncode == 0] * 2
    if done.returncode == 0:
        assert set(Cert(read(control.config.ca).decode()).extensions) == {
            BASIC_CONSTRAINTS, KEY_USAGE, SUBJECT_KEY, AUTHORITY_KEY,
        }  # fmt: skip


def test_the_dispatcher_certificate_is_not_overwritten(deployment):
    control = deployment.control
    before = read(control.config.cert), read(control.config.key)
    again = control.run("setup-ctrl-exec")
    assert again.returncode == 1
    assert "exists" in again.err
    assert (read(control.config.cert), read(control.config.key)) == before


def test_a_dispatcher_without_a_ca_is_told_to_make_one(tmp_path):
    control = support.Control(tmp_path / "c", set_up=False)
    done = control.run("setup-ctrl-exec")
    assert done.returncode == 1
    assert "setup-ca" in done.err
    assert not os.path.exists(control.config.key)


def test_a_missing_ca_key_is_named_when_something_is_to_be_signed(tmp_path):
    control = support.Control(str(tmp_path / "control"))
    key = ctrl_exec.ca_key_path(control.config.ca)
    os.rename(key, key + ".away")
    for words in (("rotate-cert",), ("setup-ca", "--next")):
        done = control.run(*words)
        assert done.returncode == 1
        assert "%s: no such file\n     do this on the host that has the CA's key\n" % key in done.err


def test_a_missing_openssl_is_said_in_a_sentence(tmp_path):
    with pytest.raises(ProgramError) as caught:
        ctrl_exec.OpenSSL(str(tmp_path / "none")).new_key("ec")
    assert "openssl" in caught.value.message
    assert "install" in caught.value.hint


# --- whichever openssl there is ------------------------------------------------------------------------


def fake(top, body):
    """A program in openssl's place; `"$real" "$@"` is the real one."""
    path = os.path.join(str(top), "openssl-%s" % secrets.token_hex(4))
    with open(path, "w", encoding="ascii") as file:
        file.write('#!/bin/sh\nreal=%s\n%s\n' % (shutil.which("openssl"), body))
    os.chmod(path, 0o755)
    return ctrl_exec.OpenSSL(path)


MUTE = '"$real" "$@" 2>/dev/null'  # as if all that is not data had gone to the other stream, or nowhere
FLATTERER = '"$real" "$@"; status=$?; echo "verify OK" >&2; echo "Verified OK: CA:TRUE" >&2; exit $status'


@pytest.mark.parametrize("body", [MUTE, FLATTERER])
def test_what_openssl_says_beside_its_data_decides_nothing(ca, issued, tmp_path, body):
    odd = fake(tmp_path, body)
    for key in (ca.ec, ca.rsa):
        request = ca.ask(key)
        assert odd.check_request(request) == unarmour(request)
        broken = bytearray(unarmour(request))
        broken[-1] ^= 1
        assert "own key" in refusal(odd, armour(bytes(broken)))
    certificate = odd.sign(ca.ask(), "web-1", "agent", 365, ca.cert, ca.key).encode()
    odd.check_chain(certificate, read(ca.cert), "sslserver")
    other = odd.sign_ca(ca.ec, "Other CA", 10).encode()
    for wrong, authority, purpose in (
        (certificate, other, "sslserver"),
        (certificate, read(ca.cert), "sslclient"),
    ):
        with pytest.raises(TrustError):
            odd.check_chain(wrong, authority, purpose)
    with pytest.raises(TrustError):
        odd.check_endorsement(certificate, read(ca.cert), other)
    assert odd.try_out() == odd.version()


@pytest.mark.parametrize(
    "body, said",
    [
        ('case $1 in dgst) "$real" "$@"; exit 0;; esac; "$real" "$@"', "its key has not signed"),
        ('case $1 in verify) "$real" "$@"; exit 0;; esac; "$real" "$@"', "the CA has not signed"),
        ('case $1 in dgst) exit 1;; esac; "$real" "$@"', "not signed by its own key"),
        ('case $1 in ca) echo "ca: unknown option" >&2; exit 1;; esac; "$real" "$@"', "ca: unknown option"),
        ('case $1 in genpkey) exit 0;; esac; "$real" "$@"', "openssl"),
    ],
)
def test_an_openssl_that_does_not_do_what_we_need_is_found_out(tmp_path, body, said):
    with pytest.raises(ProgramError) as caught:
        fake(tmp_path, body).try_out()
    assert "does not do what ctrl-exec needs" in caught.value.message and said in caught.value.message
    assert "1.1.1" in caught.value.hint


def check_with(control, top, body, mode=0o755):
    """`ced check` with another openssl first in the fixed PATH: (exit status, findings by level)."""
    path = os.path.join(str(top), "openssl")
    with open(path, "w", encoding="ascii") as file:
        file.write("#!/bin/sh\nreal=%s\n%s\n" % (shutil.which("openssl"), body))
    os.chmod(path, mode)
    lines = (
        "import sys; sys.path.insert(0, %r); sys.argv[0] = 'ced'; import ctrl_exec; ctrl_exec.SAFE_PATH = %r"
        "; ctrl_exec.leave(ctrl_exec.main(sys.argv))"
    ) % (os.path.dirname(ctrl_exec.__file__), str(top))
    words = [sys.executable, "-I", "-c", lines, "--root", control.root, "check", "--json"]
    done = subprocess.run(words, capture_output=True, timeout=120, cwd="/")
    return done.returncode, json.loads(done.stdout)["findings"]


def test_check_says_what_is_wrong_with_openssl_and_does_not_advise_a_new_ca(deployment, tmp_path):
    broken = 'case $1 in version) echo "OpenSSL 3.2.0";; *) exit 127;; esac'
    for body, mode, said in (
        (broken, 0o755, "OpenSSL 3.2.0"),
        ("exit 1", 0o755, "openssl version failed"),
        ("", 0o644, "Permission denied"),
    ):
        status, findings = check_with(deployment.control, tmp_path, body, mode)
        failed = [one for one in findings if one["level"] == "FAIL"]
        assert status == 1 and len(failed) == 1 and said in failed[0]["what"], findings
        assert not any("setup-ca" in one["hint"] for one in findings)
    os.unlink(str(tmp_path / "openssl"))


def test_check_names_an_openssl_of_another_project_that_works(deployment, tmp_path):
    libre = 'case $1 in version) echo "LibreSSL 3.8.2";; *) exec "$real" "$@";; esac'
    status, findings = check_with(deployment.control, tmp_path, libre)
    warned = [one["what"] for one in findings if "LibreSSL" in one["what"] and one["level"] == "WARN"]
    assert status == 0 and len(warned) == 1
    status, findings = check_with(deployment.control, tmp_path, 'exec "$real" "$@"')
    assert status == 0 and [one for one in findings if one["what"].startswith("openssl makes, signs")]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: puts a CA into the system's directory of them")
def test_a_ca_that_the_system_trusts_is_not_trusted_by_us(ca, issued, tmp_path):
    system = re.search(r'"(.*)"', tool("version", "-d").decode())[1] + "/certs"
    (tmp_path / "certs").mkdir()
    name = tool("x509", "-noout", "-hash", "-in", ca.cert).decode().strip() + ".0"
    (tmp_path / "certs" / name).write_bytes(read(ca.cert))
    other = ca.keep("system.crt", ca.openssl.sign_ca(ca.ec, "Other CA", 10))
    leaf = ca.keep("leaf.crt", issued["agent"])
    lines = (
        "import sys; sys.path.insert(0, %r); import ctrl_exec\n"
        "ctrl_exec.OpenSSL().check_chain(open(%r, 'rb').read(), open(%r, 'rb').read(), 'sslserver')"
    ) % (os.path.dirname(ctrl_exec.__file__), leaf, other)
    bind = 'mount --bind "$0" "$1" && shift && { openssl verify -CAfile "$1" "$2" && shift 2 && exec "$@"; }'
    words = ["unshare", "-m", "sh", "-c", bind, str(tmp_path / "certs"), system, other, leaf]
    done = subprocess.run([*words, sys.executable, "-I", "-c", lines], capture_output=True, timeout=60)
    assert b"leaf.crt: OK" in done.stdout, done.stderr  # openssl by itself would believe it
    assert b"TrustError: the certificate is refused" in done.stderr


SITE = """openssl_conf = site
[site]
ssl_conf = ssl
[ssl]
system_default = defaults
[defaults]
%s
[req]
distinguished_name = dn
default_md = sha1
default_bits = 512
prompt = yes
x509_extensions = ext
req_extensions = ext
[dn]
O = The Site
[ext]
basicConstraints = CA:TRUE
subjectAltName = DNS:everybody
nsComment = "of the site"
[ca]
default_ca = other
[other]
default_md = sha1
copy_extensions = copyall
"""


@pytest.mark.parametrize(
    "policy",
    ["CipherString = DEFAULT@SECLEVEL=2", "CipherString = DEFAULT@SECLEVEL=3", "MinProtocol = TLSv1.3"],
)
@pytest.mark.parametrize("kind", ["ec", "rsa"])
def test_a_configuration_of_the_site_changes_nothing_that_is_issued(tmp_path, kind, policy):
    (tmp_path / "site.cnf").write_text(SITE % policy)
    env = dict(os.environ, OPENSSL_CONF=str(tmp_path / "site.cnf"))
    control = support.Control(str(tmp_path / "c"), conf="key_type = %s\n" % kind, set_up=False)
    for verb in ("setup-ca", "setup-ctrl-exec", "check"):
        done = control.run(verb, env=env)
        assert done.returncode == 0, done.out + done.err
    for path, profile in ((control.config.ca, "ca"), (control.config.cert, "dispatcher")):
        cert = Cert(read(path).decode())
        assert set(cert.extensions) == set(Cert(issued_by_default(tmp_path, profile)).extensions)
        assert b"Site" not in ssl.PEM_cert_to_DER_cert(read(path).decode())
        assert b"everybody" not in ssl.PEM_cert_to_DER_cert(read(path).decode())


def issued_by_default(top, profile):
    """What is issued without any configuration of the site's."""
    control = support.Control(os.path.join(str(top), "plain"))
    return read(control.config.ca if profile == "ca" else control.config.cert).decode()


# --- private from the first byte ------------------------------------------------------------------------


class Watch(threading.Thread):
    """Collects the command line of every process on this machine while it runs."""

    def __init__(self):
        super().__init__(daemon=True)
        self.seen = set()
        self.done = threading.Event()

    def run(self):
        while not self.done.is_set():
            for name in os.listdir("/proc"):
                if name.isdigit():
                    try:
                        with open("/proc/%s/cmdline" % name, "rb") as file:
                            self.seen.add(file.read())
                    except OSError:
                        pass

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.done.set()
        self.join()


class Loose:
    """A whole RSA deployment, set up by its own commands under umask 000 while command lines are watched."""

    def __init__(self, top):
        self.token = "canary" + secrets.token_hex(16)
        self.said = []
        os.chmod(top, 0o755)
        self.control = support.Control(os.path.join(top, "control"), "key_type = rsa\n", set_up=False)
        self.host = support.Host(os.path.join(top, "old"), "old", "rate_limit_disable = yes\n")
        self.other = support.Host(os.path.join(top, "other"), "other")
        self.host.script("hello", "sleep 0.2\necho hello\n")
        hook = "#!/bin/sh\ncat >/dev/null\nsleep 0.2\nexit 0\n"
        self.control.put(ctrl_exec.ETC + "/auth-hook", hook, 0o755)
        self.port = support.free_port()
        with open(self.control.config.path, "a", encoding="ascii") as file:
            file.write("pairing_port = %d\n" % self.port)
        old = os.umask(0o000)
        try:
            with Watch() as watch:
                self.set_up()
                self.pair()
        finally:
            os.umask(old)
        self.argv = watch.seen

    def set_up(self):
        for verb in ("setup-ca", "setup-ctrl-exec"):
            self.said.append(self.control.run(verb))
        ctrl_exec.new_key_file(ctrl_exec.OpenSSL(), self.host.config.key, "rsa")  # register() then keeps it
        self.control.register(self.host)
        self.host.start()
        for words in (("run", "old", "hello"), ("ping", "old")):
            self.said.append(self.control.run(*words, env={"ENVEXEC_TOKEN": self.token}))

    def pair(self):
        self.pairing_token = ctrl_exec.json.loads(self.control.run("pairing-token", "--json").out)["token"]
        desk = self.control.open_pairing()
        try:
            self.paired = self.other.run(
                "request-pairing", "--dispatcher", "127.0.0.1:%d" % desk.port, "--name", "other",
                "--key-type", "rsa", "--ip", "127.0.0.1",
                env={"CTRL_EXEC_PAIRING_TOKEN": self.pairing_token},
            )  # fmt: skip
        finally:
            desk.stdin.close()
            desk.terminate()
            self.desk_said = desk.stdout.read().decode("utf-8", "replace")
            desk.wait(60)
            desk.stdout.close()

    def tops(self):
        return self.control.root, self.host.root, self.other.root

    def keys(self):
        config = self.control.config
        return ctrl_exec.ca_key_path(config.ca), config.key, self.host.config.key, self.other.config.key


@pytest.fixture(scope="module")
def loose(tmp_path_factory):
    made = Loose(str(tmp_path_factory.mktemp("loose")))
    yield made
    made.host.stop()


def below(top):
    for directory, _, files in os.walk(top):
        yield directory
        for name in files:
            path = os.path.join(directory, name)
            if not os.path.islink(path):
                yield path


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


def test_private_keys_are_0600_under_umask_000(loose):
    config = loose.control.config
    for path in loose.keys():
        assert mode(path) == 0o600, path
        assert b"PRIVATE KEY" in read(path)
    for path in (config.ca, config.cert, loose.host.config.cert, loose.host.config.ca):
        assert mode(path) == 0o644, path


def test_nothing_is_writable_by_everybody_under_umask_000(loose):
    for top in loose.tops():
        assert [path for path in below(top) if mode(path) & 0o002] == []


def test_no_other_file_holds_a_private_key(loose):
    files = [path for top in loose.tops() for path in below(top) if os.path.isfile(path)]
    assert {path for path in files if b"PRIVATE KEY" in read(path)} == set(loose.keys())


def test_a_private_key_is_never_readable_by_others_for_an_instant(tmp_path, openssl, monkeypatch):
    modes = []
    real = os.open

    def watched(path, flags, mode=0o777, **how):
        descriptor = real(path, flags, mode, **how)
        if flags & os.O_CREAT:
            modes.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        return descriptor

    old = os.umask(0)
    try:
        monkeypatch.setattr(ctrl_exec.os, "open", watched)
        ctrl_exec.new_key_file(openssl, str(tmp_path / "k"), "ec")
    finally:
        monkeypatch.undo()
        os.umask(old)
    assert modes == [0o600]
    assert mode(str(tmp_path / "k")) == 0o600


def test_an_existing_key_is_kept(tmp_path, openssl):
    path = tmp_path / "agent.key"
    path.write_text("mine")
    ctrl_exec.new_key_file(openssl, str(path), "ec")
    assert path.read_text() == "mine"


def test_key_type_rsa_makes_a_whole_deployment_that_works(loose):
    assert [done.returncode for done in loose.said] == [0, 0, 0, 0], [done.err for done in loose.said]
    assert "hello" in loose.said[2].out
    config = loose.control.config
    for path in (config.ca, config.cert, loose.host.config.cert):
        key = tool("x509", "-noout", "-pubkey", "-in", path)
        text = tool("pkey", "-pubin", "-noout", "-text", stdin=key).decode()
        assert re.search(r"\(3072 bit\)", text), path
        tool("verify", "-x509_strict", "-CAfile", config.ca, path)


def test_an_rsa_agent_pairs_by_token_under_umask_000(loose):
    assert loose.paired.returncode == 0, loose.paired.err + loose.desk_said
    config = loose.other.config
    ctrl_exec.check_identity(ctrl_exec.OpenSSL(), ctrl_exec.agent_identity(config), "sslserver")
    assert [mode(path) for path in (config.cert, config.ca)] == [0o644, 0o644]
    assert mode(config.trusted_dispatchers_path) == 0o644


def test_no_secret_is_ever_in_an_argument_list(loose):
    everything = b"\n".join(loose.argv)
    assert b"openssl\0genpkey" in everything  # the watch has seen what it is for
    assert b"auth-hook" in everything
    for secret in canaries(loose):
        assert secret not in everything


def test_no_secret_is_ever_in_a_log_or_in_what_is_printed(loose):
    texts = [loose.control.log(), loose.host.log(), loose.other.log(), loose.desk_said]
    texts += [text for done in [*loose.said, loose.paired] for text in (done.out, done.err)]
    assert "ACTION=run " in texts[1]
    for secret in canaries(loose):
        for text in texts:
            assert secret not in text.encode("utf-8", "surrogateescape")


def test_the_request_token_is_in_no_file_of_either_side(loose):
    for top in loose.tops():
        for path in below(top):
            if os.path.isfile(path):
                assert loose.token.encode() not in read(path), path


def canaries(loose):
    found = [loose.token.encode(), loose.pairing_token.encode(), loose.pairing_token.split(".")[1].encode()]
    for path in loose.keys():
        found += [line for line in read(path).splitlines()[2:-2]]
    assert len(found) > 30 and all(len(secret) >= 32 for secret in found)
    return found


# --- what a certificate says ----------------------------------------------------------------------------


def test_the_ca_certificate_has_exactly_its_profile(issued):
    cert = Cert(issued["ca"])
    assert set(cert.extensions) == {BASIC_CONSTRAINTS, KEY_USAGE, SUBJECT_KEY, AUTHORITY_KEY}
    assert cert.extensions[BASIC_CONSTRAINTS] == (True, bytes.fromhex("30060101ff020100"))  # CA, pathlen 0
    assert cert.extensions[KEY_USAGE] == (True, bytes.fromhex("03020106"))  # keyCertSign, cRLSign
    assert cert.common_names() == [("2.5.4.3", "Test CA")]
    assert cert.issuer == cert.subject


@pytest.mark.parametrize(
    "profile, purposes", [("agent", [SERVER_AUTH]), ("dispatcher", [CLIENT_AUTH, SERVER_AUTH])]
)
def test_a_leaf_has_exactly_its_profile(issued, profile, purposes):
    cert, issuer = Cert(issued[profile]), Cert(issued["ca"])
    assert set(cert.extensions) == {
        BASIC_CONSTRAINTS, KEY_USAGE, EXTENDED, SUBJECT_KEY, AUTHORITY_KEY, ALT_NAME,
    }  # fmt: skip
    assert cert.extensions[BASIC_CONSTRAINTS] == (True, bytes.fromhex("3000"))
    assert cert.extensions[KEY_USAGE] == (True, bytes.fromhex("03020780"))  # digitalSignature
    ((_, listed),) = elements(cert.extensions[EXTENDED][1])
    assert [oid.hex() for _, oid in elements(listed)] == purposes
    assert cert.names() == [(0x82, "web-1")]
    assert cert.common_names() == [("2.5.4.3", "web-1")]
    assert cert.issuer == issuer.subject
    ((_, key_id),) = elements(issuer.extensions[SUBJECT_KEY][1])
    ((_, authority),) = elements(cert.extensions[AUTHORITY_KEY][1])
    assert elements(authority) == [(0x80, key_id)]


@pytest.mark.parametrize("profile", ["ca", "agent", "dispatcher"])
def test_certificates_have_dates_as_rfc_5280_wants_them_and_sha256(issued, profile):
    cert = Cert(issued[profile])
    assert cert.date_tags == [0x17, 0x17]  # UTCTime before 2050
    assert elements(cert.algorithm)[0][1].hex() == "2a8648ce3d040302"  # ecdsa-with-SHA256


@pytest.mark.parametrize(
    "profile, good, bad",
    [("agent", ["sslserver"], ["sslclient"]), ("dispatcher", ["sslserver", "sslclient"], ["crlsign"])],
)
def test_strict_verification_accepts_a_certificate_for_its_purpose_only(ca, issued, profile, good, bad):
    path = ca.keep("leaf.pem", issued[profile])
    for purpose in good:
        assert b"OK" in tool("verify", "-x509_strict", "-purpose", purpose, "-CAfile", ca.cert, path)
    for purpose in bad:
        said = tool("verify", "-x509_strict", "-purpose", purpose, "-CAfile", ca.cert, path, fails=True)
        assert b"OK" not in said
    assert b"OK" in tool("verify", "-x509_strict", "-CAfile", ca.cert, ca.cert)


def shake_hands(client, server, name):
    """A whole handshake in memory; returns both ends or raises what either end says."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname=name),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    waiting = list(ends)
    for _ in range(10):
        for end in list(waiting):
            try:
                end.do_handshake()
                waiting.remove(end)
            except ssl.SSLWantReadError:
                pass
    assert not waiting
    return ends


@pytest.mark.parametrize("name", ["web-1", LONG_NAME], ids=len)
def test_the_default_contexts_of_a_strict_python_accept_both_sides(ca, name):
    agent = ca.keep("agent.pem", ca.sign(ca.ask(), name, "agent"))
    control = ca.keep("control.pem", ca.sign(ca.ask(), name, "dispatcher"))
    client = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=ca.cert)
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=ca.cert)
    for context in (client, server):
        if sys.version_info >= (3, 13):
            assert context.verify_flags & ssl.VERIFY_X509_STRICT
        context.verify_flags |= ssl.VERIFY_X509_STRICT
    client.load_cert_chain(control, ca.ec)
    server.load_cert_chain(agent, ca.ec)
    server.verify_mode = ssl.CERT_REQUIRED
    ours, theirs = shake_hands(client, server, name)
    assert ours.getpeercert()["subjectAltName"] == (("DNS", name),)
    assert theirs.getpeercert()["subjectAltName"] == (("DNS", name),)
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(client, server, "another")


def test_serials_are_random_and_long(ca):
    request = ca.ask()
    serials = [Cert(ca.sign(request)).serial for _ in range(6)]
    assert len(set(serials)) == 6
    for serial in serials:
        assert serial > 0 and 64 <= serial.bit_length() <= 159
    steps = [abs(one - other) for one, other in zip(serials, serials[1:])]
    assert min(steps) > 2**64  # no counter
    assert len({serial >> 64 for serial in serials}) == len({serial % 2**64 for serial in serials}) == 6
    assert Cert(read(ca.cert).decode()).serial.bit_length() >= 64
    assert [name for name in os.listdir(ca.top) if "serial" in name or "index" in name] == []


def test_not_before_is_more_than_an_hour_ago(ca):
    began = time.time()
    leaf = ctrl_exec.parse_certificate(ca.sign(ca.ask()).encode())
    for info in (leaf, ca.info):
        assert info.not_before < began - 3600 - 300
        assert info.not_before > began - DAY
    assert abs(leaf.not_after - (began + 365 * DAY)) < 600


def test_a_leaf_never_outlives_the_ca(tmp_path, openssl, ca, monkeypatch):
    cert, key = str(tmp_path / "ca.crt"), str(tmp_path / "ca.key")
    ctrl_exec.new_key_file(openssl, key, "ec")
    ctrl_exec.write_atomic(cert, openssl.sign_ca(key, "Short", 10).encode())
    end = ctrl_exec.read_certificate(cert).not_after
    leaf = ctrl_exec.parse_certificate(openssl.sign(ca.ask(), "a", "agent", 3650, cert, key).encode())
    assert time.time() < leaf.not_after <= end
    for left, works in ((2.5 * DAY, True), (-DAY, False)):
        monkeypatch.setattr(ctrl_exec, "now", lambda: end - left)  # noqa: B023
        if works:
            leaf = ctrl_exec.parse_certificate(openssl.sign(ca.ask(), "a", "agent", 365, cert, key).encode())
            assert end - left < leaf.not_after <= end
        else:
            with pytest.raises(TrustError, match="expired"):
                openssl.sign(ca.ask(), "a", "agent", 365, cert, key)


@pytest.mark.parametrize("name", ["a", "A.b-c_d.9", "n" * 64, "n" * 65, "x" * 253, LONG_NAME], ids=len)
def test_names_up_to_253_characters_are_carried_whole(ca, name):
    assert len(name) <= 253
    pem = ca.sign(ca.ask(), name, "agent")
    cert = Cert(pem)
    assert cert.names() == [(0x82, name)]
    ((oid, common),) = cert.common_names()
    assert oid == "2.5.4.3" and len(common) <= 64
    assert common == name if len(name) <= 64 else name.startswith(common[:47])
    assert ctrl_exec.parse_certificate(pem.encode()).names == (name,)


def test_long_names_that_begin_alike_keep_different_common_names():
    names = ["x" * 100 + ending for ending in ("a", "b")]
    assert len({ctrl_exec.shorten_common_name(name) for name in names}) == 2


def test_a_request_of_ours_is_accepted_whatever_the_key_and_the_name(ca):
    for key in (ca.ec, ca.rsa):
        for name in ("web-1", LONG_NAME):
            der = ca.openssl.check_request(ca.openssl.new_request(key, name))
            assert der[:1] == b"\x30"


@pytest.mark.parametrize("curve", ["P-256", "P-384", "P-521"])
@pytest.mark.parametrize("digest", ["-sha256", "-sha384", "-sha512"])
def test_usual_curves_and_digests_are_accepted(ca, curve, digest):
    key = ca.keep("curve.key", tool("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:" + curve))
    pem = ca.ask(key, options=(digest,))
    assert ca.openssl.check_request(pem) == unarmour(pem)


# --- requests that ask for too much: signed, but for what was approved ----------------------------------

WISHES = {
    "to be a CA": "basicConstraints = critical, CA:TRUE",
    "to be a CA with certificate signing": "basicConstraints = CA:TRUE\nkeyUsage = keyCertSign, cRLSign",
    "the dispatcher's name": "subjectAltName = DNS:control, DNS:web-1, IP:127.0.0.1, URI:spiffe://x/y",
    "a wildcard": "subjectAltName = DNS:*, DNS:*.example.com",
    "client authentication": "extendedKeyUsage = critical, clientAuth, serverAuth, codeSigning",
    "any purpose": "extendedKeyUsage = anyExtendedKeyUsage",
    "other key usage": "keyUsage = keyEncipherment, dataEncipherment, keyAgreement, nonRepudiation",
    "an extension nobody knows": "1.2.3.4.5 = critical, DER:0500\ntlsfeature = status_request",
    "name constraints": "nameConstraints = critical, permitted;DNS:example.com",
}


@pytest.mark.parametrize("wish", sorted(WISHES))
def test_nothing_that_a_request_wishes_for_is_in_the_certificate(ca, issued, wish):
    request = ca.ask(extensions=WISHES[wish])
    ca.openssl.check_request(request)
    cert, plain = Cert(ca.sign(request)), Cert(issued["agent"])
    assert cert.extensions == plain.extensions
    assert cert.subject == plain.subject


@pytest.mark.parametrize(
    "subject",
    [
        "CN = control",
        "0.CN = web-1\n1.CN = control",
        "O = Big Corp\nOU = ctrl-exec dispatchers\nCN = *",
        "CN = web-1\nemailAddress = root@example.com",
        "O = no name at all",
    ],
)
def test_the_subject_is_the_approved_name_whatever_was_asked(ca, subject):
    request = ca.ask(subject=subject)
    ca.openssl.check_request(request)
    assert Cert(ca.sign(request)).common_names() == [("2.5.4.3", "web-1")]


# --- requests that are refused --------------------------------------------------------------------------


@pytest.mark.parametrize("bits", ["1024", "2040"])
def test_short_rsa_is_refused(ca, bits):
    key = ca.keep("weak.key", tool("genrsa", bits))
    assert bits in refusal(ca.openssl, ca.ask(key))


@pytest.mark.parametrize("curve", ["secp256k1", "brainpoolP256r1", "brainpoolP384r1", "secp224r1"])
def test_an_unusual_curve_is_refused(ca, curve):
    key = ca.keep("odd.key", tool("ecparam", "-name", curve, "-genkey", "-noout"))
    assert "curve" in refusal(ca.openssl, ca.ask(key))


def test_explicit_curve_parameters_are_refused(ca):
    argv = ("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-param_enc", "explicit")
    key = ca.keep("explicit.key", tool(*argv))
    assert "curve" in refusal(ca.openssl, ca.ask(key))


@pytest.mark.parametrize("algorithm", ["ED25519", "ED448"])
def test_edwards_keys_are_refused(ca, algorithm):
    key = ca.keep("ed.key", tool("genpkey", "-algorithm", algorithm))
    assert "neither EC nor RSA" in refusal(ca.openssl, ca.ask(key, options=()))


def test_a_dsa_key_is_refused(ca):
    # made-up numbers would not pass openssl itself, and real parameters take it seconds: only the key's
    # algorithm (1.2.840.10040.4.1) is put in the place of an RSA key's, and that is what is looked at first
    der = unarmour(ca.ask(ca.rsa))
    rsa, dsa = bytes.fromhex("06092a864886f70d010101"), bytes.fromhex("06092a8648ce38040100")
    assert der.count(rsa) == 1
    patched = der.replace(rsa, dsa + b"\0" * (len(rsa) - len(dsa)))
    assert len(patched) == len(der)
    assert "refused" in refusal(ca.openssl, armour(patched))


WEAK = [("rsa", "-sha1"), ("rsa", "-md5"), ("rsa", "-sha224"), ("ec", "-sha1"), ("ec", "-sha224")]


@pytest.mark.parametrize("kind, digest", WEAK)
def test_a_weak_digest_is_refused(ca, kind, digest):
    pem = ca.ask(getattr(ca, kind), options=(digest,))
    assert "SHA-256" in refusal(ca.openssl, pem)


def test_rsa_pss_signatures_are_refused_in_a_sentence(ca):
    pem = ca.ask(ca.rsa, options=("-sha256", "-sigopt", "rsa_padding_mode:pss"))
    assert "SHA-256" in refusal(ca.openssl, pem)


def test_a_broken_self_signature_is_refused(ca):
    for key in (ca.ec, ca.rsa):
        der = bytearray(unarmour(ca.ask(key)))
        der[-1] ^= 1
        assert "own key" in refusal(ca.openssl, armour(bytes(der)))


def test_a_request_for_a_key_that_did_not_sign_it_is_refused(ca):
    mine = unarmour(ca.ask())
    other = ca.keep("other.key", ca.openssl.new_key("ec"))
    theirs = unarmour(ca.ask(other))
    points = []
    for der in (mine, theirs):
        info = elements(elements(elements(der)[0][1])[0][1])
        points.append(elements(info[2][1])[1][1])
    assert len(points[0]) == len(points[1]) and points[0] != points[1]
    assert "own key" in refusal(ca.openssl, armour(mine.replace(points[0], points[1])))


def test_a_request_with_a_changed_subject_is_refused(ca):
    assert "own key" in refusal(ca.openssl, armour(unarmour(ca.ask()).replace(b"asked", b"other")))


def test_a_request_over_10_kib_is_refused(ca):
    names = ",".join("DNS:host-%04d.example.com" % number for number in range(500))
    big = ca.ask(extensions="subjectAltName = " + names)
    assert len(big) > 10 * 1024
    assert "larger" in refusal(ca.openssl, big)
    assert "larger" in refusal(ca.openssl, ca.ask() + "\n" * 10240)


def test_a_request_just_under_10_kib_is_accepted(ca):
    pem = ca.ask()
    assert ca.openssl.check_request(pem + "\n" * (10 * 1024 - len(pem)))


def test_not_exactly_one_pem_block_is_refused(ca, issued):
    pem = ca.ask()
    wrong = {
        "two": pem + pem,
        "two different": pem + ca.ask(ca.rsa),
        "with a certificate": pem + issued["agent"],
        "after a certificate": issued["agent"] + pem,
        "with a key": pem + read(ca.ec).decode(),
        "with text before": "Certificate Request:\n" + pem,
        "with text after": pem + "x",
        "another label": pem.replace("CERTIFICATE REQUEST", "NEW CERTIFICATE REQUEST"),
        "a certificate": issued["agent"],
        "a header": pem.replace("REQUEST-----\n", "REQUEST-----\nProc-Type: 4,ENCRYPTED\n\n", 1),
        "half": pem[: len(pem) // 2],
        "no end": pem.replace("-----END", "----END"),
        "nothing": "",
        "NUL": pem + "\0",
        "empty": "-----BEGIN CERTIFICATE REQUEST-----\n\n-----END CERTIFICATE REQUEST-----\n",
        "bad base64": armour(b"\0" * 100).replace("AAAA", "A=AA", 1),
    }
    for what, text in wrong.items():
        with pytest.raises(TrustError):
            ctrl_exec.parse_request(text)
            pytest.fail(what)


@pytest.mark.parametrize("space", ["\u00a0", "\u2003", "\u3000", "\x85"])
def test_spaces_beyond_ascii_are_refused_in_a_sentence(ca, space):
    pem = ca.ask()
    for text in (space + pem, pem + space, pem.replace("\n", space + "\n", 2)):
        assert "refused" in refusal(ca.openssl, text)


def test_what_the_program_reads_is_what_openssl_reads(ca):
    pem = ca.ask()
    lines = pem.splitlines()
    variants = [
        pem.replace("\n", "\r\n"),
        "\n".join([lines[0], "".join(lines[1:-1]), lines[-1], ""]),
        "\n".join([lines[0], *lines[1:3], "", *lines[3:], ""]),
        "\n".join([lines[0], *(line + "  " for line in lines[1:-1]), lines[-1], ""]),
        "\n".join([lines[0], *(" " + line for line in lines[1:-1]), lines[-1], ""]),
    ]
    accepted = 0
    for text in variants:
        try:
            der = ca.openssl.check_request(text)
        except TrustError:
            continue  # refusing is always safe
        accepted += 1
        assert der == tool("req", "-outform", "DER", stdin=text.encode())
    assert accepted >= 1


def test_a_request_cut_anywhere_is_refused(ca):
    for key in (ca.ec, ca.rsa):
        der = unarmour(ca.ask(key))
        for length in range(1, len(der)):
            with pytest.raises(TrustError):
                ctrl_exec.parse_request(armour(der[:length]))
        with pytest.raises(TrustError):
            ctrl_exec.parse_request(armour(der + b"\0\0"))


def test_garbage_is_refused_and_nothing_else_happens(ca):
    rng = random.Random(5)
    der = unarmour(ca.ask())
    for round in range(3000):
        if round % 3 == 0:
            data = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 200)))
        else:
            data = bytearray(der)
            for _ in range(rng.randrange(1, 4)):
                data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            ctrl_exec.parse_request(armour(bytes(data)))
        except TrustError as error:
            assert "refused" in error.message


def test_deep_and_huge_der_lengths_are_refused():
    for data in (b"\x30\x84" + b"\xff" * 4, b"\x30\x80\0\0", b"\x30\x89" + b"\xff" * 9, b"\x30" * 4000):
        with pytest.raises(TrustError):
            ctrl_exec.parse_request(armour(data))


def test_a_refused_request_runs_no_openssl_with_it(ca, monkeypatch):
    ran = []
    monkeypatch.setattr(ctrl_exec, "run_program", lambda argv, *_, **__: ran.append(argv))
    with pytest.raises(TrustError):
        ctrl_exec.OpenSSL().check_request("rubbish")
    assert ran == []


def test_a_private_temporary_directory_is_removed_after_signing(ca, tmp_path, monkeypatch):
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    modes = []
    real = ctrl_exec._WorkDirectory.put

    def watched(self, name, text):
        modes.append(mode(self._path))
        return real(self, name, text)

    monkeypatch.setattr(ctrl_exec._WorkDirectory, "put", watched)
    ca.sign(ca.ask())
    with pytest.raises(CtrlExecError):
        ca.sign("not a request")
    assert set(modes) == {0o700}
    assert os.listdir(str(tmp_path)) == []


# --- reading certificates -------------------------------------------------------------------------------


def test_a_certificate_is_read_as_openssl_reads_it(ca, issued):
    info = ctrl_exec.parse_certificate(issued["dispatcher"].encode())
    printed = tool("x509", "-noout", "-serial", stdin=issued["dispatcher"].encode()).decode().strip()
    assert ctrl_exec.parse_serial(printed) == info.serial == "%x" % Cert(issued["dispatcher"]).serial
    assert (info.common_name, info.names) == ("web-1", ("web-1",))
    assert ctrl_exec.read_certificate(ca.cert).names == ()


def test_what_is_no_certificate_is_named(ca, tmp_path):
    for path, text in (("none", None), ("empty", b""), ("text", b"hello\n"), ("key", read(ca.ec))):
        if text is not None:
            (tmp_path / path).write_bytes(text)
        with pytest.raises(TrustError, match=re.escape(str(tmp_path / path))):
            ctrl_exec.read_certificate(str(tmp_path / path))


def test_the_fingerprint_is_the_one_openssl_prints(ca):
    printed = tool("x509", "-noout", "-fingerprint", "-sha256", "-in", ca.cert).decode()
    ours = ctrl_exec.fingerprint(ctrl_exec.read_certificate_der(ca.cert))
    assert ours == printed.split("=")[1].strip().replace(":", "").lower()


def test_a_place_for_temporary_files_that_cannot_be_written_is_named(ca, monkeypatch):
    import tempfile

    def refuse(*_, **__):
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(ctrl_exec.StorageError) as caught:
        ca.sign(ca.ask(), "web-1")
    assert "temporary files" in caught.value.message and "TMPDIR" in caught.value.hint
