"""An older installation as its programs left it: RSA keys, and version 1 certificates by plain openssl.

Such certificates have no extension at all: no subjectAltName (the name is the CN), no purpose, no key
identifiers, and the CA's does not say that it is a CA's. The agent trusts one serial, in a file of its own.
"""

import json
import os
import shutil
import subprocess
import time
from typing import NamedTuple

import ctrl_exec
import support

CONFIG = "[req]\ndistinguished_name = dn\nprompt = no\n[dn]\nCN = %s\n"  # nothing asks for extensions


def sequence(*elements):
    """A DER SEQUENCE."""
    return ctrl_exec._encode_der(0x30, b"".join(elements))


class Identity(NamedTuple):
    """A certificate and its key: two paths. `serial` is canonical."""

    cert: str
    key: str
    serial: str

    def context(self):
        """A TLS client that shows it."""
        return support.client_context(self.cert, self.key)


class OlderSite:
    """The PKI of an older control host, below a directory of its own."""

    def __init__(self, top, bits=2048):
        self.top = str(top)
        self.bits = bits
        os.makedirs(self.top, exist_ok=True)
        self.ca, self.ca_key = self.path("ca.crt"), self.path("ca.key")
        key = self._key("ca")
        self._openssl("req", "-new", "-sha256", "-key", key, "-config", self._config("ca", "ctrl-exec CA"),
                      "-out", self.path("ca.csr"))  # fmt: skip
        self._write_certificate(self.path("ca.csr"), self.ca, key, days=3650)
        self.dispatcher = self.issue("dispatcher")

    def path(self, name):
        return os.path.join(self.top, name)

    def agent(self, name):
        """The identity of one more agent."""
        return self.issue(name)

    def issue(self, name, key="", by=None):
        """A certificate for a name and the key in a file, or a new one; `by` another identity than the CA."""
        request = self.path(name + ".csr")
        config = self._config(name, name)
        key = key or self._key(name)
        self._openssl("req", "-new", "-sha256", "-key", key, "-config", config, "-out", request)
        cert = self.path(name + ".crt")
        self._sign(request, cert, by)
        return Identity(cert, key, ctrl_exec.read_certificate(cert).serial)

    def sign(self, csr):
        """The certificate for a request, both as PEM: what an older dispatcher sends to renew one."""
        request, cert = self.path("renewal.csr"), self.path("renewal.crt")
        with open(request, "w", encoding="ascii") as file:
            file.write(csr)
        self._sign(request, cert)
        with open(cert, encoding="ascii") as file:
            return file.read()

    def give_agent(self, host, key=""):
        """Make a support.Host the agent of this installation, which trusts its dispatcher."""
        identity, config = self.issue(host.name, key), host.config
        self._copy(identity.cert, config.cert, 0o644)
        self._copy(identity.key, config.key, 0o600)
        self._copy(self.ca, config.ca, 0o644)
        host.put(ctrl_exec.AGENT_ETC + "/ctrl-exec-serial", self.dispatcher.serial.upper() + "\n")
        return identity

    def give_control(self, control):
        """Make a support.Control (with set_up=False) the dispatcher of this installation."""
        config = control.config
        self._copy(self.ca, config.ca, 0o644)
        self._copy(self.ca_key, ctrl_exec.ca_key_path(config.ca), 0o600)
        self._copy(self.dispatcher.cert, config.cert, 0o644)
        self._copy(self.dispatcher.key, config.key, 0o600)

    def _openssl(self, *words):
        done = subprocess.run(["openssl", *words], capture_output=True, timeout=120)
        assert done.returncode == 0, done.stderr.decode()

    def _config(self, name, common_name):
        path = self.path(name + ".cnf")
        with open(path, "w", encoding="ascii") as file:
            file.write(CONFIG % common_name)
        return path

    def _key(self, name):
        path = self.path(name + ".key")
        if os.path.exists(path):  # it gets another certificate
            return path
        choice = ("-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:%d" % self.bits)
        self._openssl("genpkey", *choice, "-out", path)
        os.chmod(path, 0o600)
        return path

    def _sign(self, request, cert, by=None):
        signer = by or Identity(self.ca, self.ca_key, "")
        self._write_certificate(request, cert, signer.key, issued_by=signer.cert)

    def _write_certificate(self, request, path, key, days=365, issued_by=""):
        """Sign a certificate of version 1 (RFC 5280 section 4.1), which openssl itself makes up to 3.1 only."""
        with open(request, encoding="ascii") as file:
            asked = ctrl_exec.parse_request(file.read())
        subject = ctrl_exec._encode_der(*ctrl_exec._read_der(ctrl_exec._read_der(asked.signed)[0][1])[1])
        issuer = subject
        if issued_by:
            fields = ctrl_exec._read_certificate_fields(ctrl_exec.read_certificate_der(issued_by))
            issuer = ctrl_exec._encode_der(*fields[4])
        dates = [time.strftime("%y%m%d%H%M%SZ", time.gmtime(at)) for at in (time.time(), time.time() + days * 86400)]
        algorithm = sequence(bytes.fromhex("06092a864886f70d01010b0500"))  # sha256WithRSAEncryption, NULL
        body = sequence(
            ctrl_exec._encode_der(0x02, b"\x55" + os.urandom(15)),
            algorithm,
            issuer,
            sequence(*(ctrl_exec._encode_der(0x17, date.encode()) for date in dates)),
            subject,
            asked.public_key,
        )
        signature = subprocess.run(
            ["openssl", "dgst", "-sha256", "-sign", key], input=body, capture_output=True, timeout=120, check=True
        ).stdout
        der = sequence(body, algorithm, ctrl_exec._encode_der(0x03, b"\0" + signature))
        with open(path, "wb") as file:
            file.write(ctrl_exec.encode_pem(der, "CERTIFICATE"))

    def _copy(self, source, target, mode):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        shutil.copyfile(source, target)
        os.chmod(target, mode)


def ask(port, identity, path, body=None):
    """One request as an older dispatcher makes it: HTTP/1.0, no Host, a connection to itself.

    Returns (status, object); a body makes it a POST. (0, None) when the agent only closed."""
    data = b"" if body is None else json.dumps(body).encode()
    head = "GET %s HTTP/1.0\r\n\r\n" % path
    if body is not None:
        head = "POST %s HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        head %= (path, len(data))
    status, _, answer = support.send_raw(port, identity.context(), head.encode() + data)
    return status, json.loads(answer) if answer else None
