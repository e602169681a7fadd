"""The life of an installation: all three roles on one host, from install.sh to its removal.

`python3 scenario.py ec|rsa`, as root on a machine that is thrown away afterwards; the word is the type of all
keys. Each step looks at exit statuses and output, and ends when what it is about has happened: nothing here
depends on how long anything takes. The first step that goes wrong is named, and ends it all with 1.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import urllib.request

HERE = os.path.dirname(os.path.abspath(__file__))
INSTALL = ("sh", "/root/ctrl-exec/install.sh")
BIN = "/usr/local/bin/"
HOST = socket.gethostname()
KEY_TYPE = sys.argv[1]
SCRIPTS = {
    "hello": "echo hello\n",
    "who": "id -un; id -gn\n",
    # It says that it has begun, to whoever reads that sooner or later, and ends when it is let through.
    "gate": "echo one; echo begun >/run/scenario/begun; read -r word </run/scenario/go; echo two $word\n",
}


# --- what the steps are made of ---------------------------------------------------------------------------


def run(*words, status=0, **environment):
    """Run a command, which must end with this status; returns what it printed."""
    print("$", *words, flush=True)
    done = subprocess.run(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        timeout=120, env={**os.environ, **environment},
    )  # fmt: skip
    print(done.stdout + done.stderr, end="", flush=True)
    assert done.returncode == status, "status %d instead of %d" % (done.returncode, status)
    assert "Traceback" not in done.stderr
    return done.stdout


def ced(*words, status=0):
    return run(BIN + "ced", *words, status=status)


def cea(*words, status=0, **environment):
    return run(BIN + "cea", *words, status=status, **environment)


def ced_json(*words, status=0):
    return json.loads(ced(*words, "--json", status=status))


def run_script(*words):
    """One script on our one host; its stdout."""
    (result,) = ced_json("run", HOST, *words)["results"]
    assert result["state"] == "ok" and result["stderr"] == "", result
    return result["stdout"]


def no_failure(*words):
    """A check of many lines, none of which may be FAIL."""
    lines = run(*words).splitlines()
    assert lines and all(line.startswith(("OK ", "WARN ")) for line in lines), lines


def wait_until(condition, what, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "%s did not come about within %d s" % (what, seconds)
        time.sleep(0.02)


def is_open(port):
    try:
        socket.create_connection(("127.0.0.1", port), 10).close()
        return True
    except OSError:
        return False


def read(path):
    with open(path, encoding="utf-8") as file:
        return file.read()


def append(path, text):
    with open(path, "a", encoding="utf-8") as file:
        file.write(text)


def write(path, text):
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def configure_control(**settings):
    """Set these in ctrl-exec.conf, and whatever else was set back to its default."""
    settings = {"key_type": KEY_TYPE, "api_auth_default": "allow", **settings}
    write("/etc/ctrl-exec/ctrl-exec.conf", "".join("%s = %s\n" % pair for pair in settings.items()))


def let_through(word):
    with open("/run/scenario/go", "w", encoding="ascii") as file:
        file.write(word + "\n")


def wait_for_begin():
    assert read("/run/scenario/begun") == "begun\n"


class Service:
    """A program as a service manager starts it: it is ready when it says so."""

    def __init__(self, name, *words):
        self.log = "/var/log/%s.log" % name
        path = "/run/scenario/%s.notify" % name
        if os.path.exists(path):
            os.unlink(path)
        self._heard = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._heard.bind(path)
        os.chmod(path, 0o666)  # it may be another user by then
        self._said = set()
        # To its end: a service that nobody listens to any more would wait for us.
        threading.Thread(target=self._listen, daemon=True).start()
        print("$", *words, "&", flush=True)
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env={**os.environ, "NOTIFY_SOCKET": path},
            )  # fmt: skip
        wait_until(self._is_ready, "that %s is ready" % name)

    def _listen(self):
        while True:
            self._said.update(self._heard.recv(4096).decode("utf-8").splitlines())

    def _is_ready(self):
        assert self.process.poll() is None, read(self.log)
        return "READY=1" in self._said

    def events(self, action):
        return [line for line in read(self.log).splitlines() if "ACTION=%s " % action in line + " "]

    def reload(self):
        before = len(self.events("reload"))
        self.process.send_signal(signal.SIGHUP)
        wait_until(lambda: self.events("reload")[before:], "the reload")
        assert "RESULT=ok" in self.events("reload")[-1], self.events("reload")[-1]

    def stop(self):
        self.process.terminate()
        assert self.process.wait(120) == 0, read(self.log)


class PairingMode:
    """`ced pairing-mode`, or one like it, while a block runs."""

    def __init__(self, *words):
        self._words = words

    def __enter__(self):
        print("$", *self._words, "&", flush=True)
        self._process = subprocess.Popen(
            self._words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        wait_until(lambda: self._process.poll() is not None or is_open(7444), "an open pairing port")
        return self

    def __exit__(self, *_):
        said, _ = self._process.communicate("quit\n", timeout=120)
        print(said, flush=True)
        assert self._process.returncode == 0, self._process.returncode


def post(path, body):
    request = urllib.request.Request(
        "http://127.0.0.1:7445" + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


# --- the steps ------------------------------------------------------------------------------------------

services = {}


def step_install():
    run(*INSTALL, "--dispatcher", "--agent", "--api")
    run(BIN + "ced", "--version")
    for user in ("ctrl-exec", "ctrl-exec-agent"):
        assert run("id", "-u", user).strip() != "0"


def step_configure():
    configure_control()
    append("/etc/ctrl-exec-agent/agent.conf", "\n[profile web]\nrun_as = www-data\n")
    os.makedirs("/opt/scripts")
    for name, body in SCRIPTS.items():
        path = "/opt/scripts/" + name
        append(path, "#!/bin/sh\n" + body)
        os.chmod(path, 0o755)
        append("/etc/ctrl-exec-agent/scripts.conf", "%s = %s\n" % (name, path))
    append("/etc/ctrl-exec-agent/scripts.conf", "who-web = /opt/scripts/who profile=web\n")
    os.mkdir("/run/scenario")
    for name in ("begun", "go"):
        os.mkfifo("/run/scenario/" + name)
        os.chmod("/run/scenario/" + name, 0o666)  # whoever scripts run as


def step_set_up_the_control_host():
    ced("setup-ca")
    ced("setup-ctrl-exec")
    run(*INSTALL, "--dispatcher", "--api")  # as it said: the API gets the key
    text = run("openssl", "x509", "-in", "/etc/ctrl-exec/dispatcher.crt", "-noout", "-text")
    assert {"ec": "id-ecPublicKey", "rsa": "rsaEncryption"}[KEY_TYPE] in text


def pair(token, *words):
    words = ("--dispatcher", "127.0.0.1", "--key-type", KEY_TYPE, "--timeout", "120", *words)
    cea("request-pairing", *words, CTRL_EXEC_PAIRING_TOKEN=token)


def step_pair_by_token():
    cea("pairing-status", status=1)
    with PairingMode(BIN + "ced", "pairing-mode"):
        pair(ced("pairing-token").strip())
    cea("pairing-status")
    (agent,) = ced_json("list-agents")["agents"]
    assert agent["name"] == HOST, agent


def step_start_the_agent():
    services["agent"] = Service("agent", BIN + "cea", "serve")
    (result,) = ced_json("ping", HOST)["results"]
    assert result["status"] == "ok", result


def step_check():
    no_failure(BIN + "ced", "check")
    no_failure(BIN + "cea", "self-check")
    no_failure(BIN + "ctrl-exec-api", "check")
    cea("self-ping")


def step_run():
    assert run_script("hello") == "hello\n"
    (result,) = ced_json("run", HOST, "not-listed", status=1)["results"]
    assert result["state"] == "refused", result


def step_run_as_another_user():
    assert run_script("who") == "ctrl-exec-script\nctrl-exec-script\n"  # it has no profile
    assert run_script("who-web") == "www-data\nwww-data\n"


def step_stream():
    words = (BIN + "ced", "run", "--stream", HOST, "gate")
    print("$", *words, flush=True)
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "one\n"  # while the script waits
    wait_for_begin()
    let_through("streamed")
    rest, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and rest.startswith("two streamed\n"), rest


def start_gate():
    answer = ced_json("run", "--async", HOST, "gate")
    assert answer["results"][0]["status"] == "accepted", answer
    wait_for_begin()
    return answer["reqid"]


def finish_gate(reqid, word):
    let_through(word)
    shown = ced("wait", reqid)
    assert "[done  exit:0]" in shown and "one\ntwo %s\n" % word in shown, shown


def step_run_without_waiting():
    finish_gate(start_gate(), "later")


def step_reload_during_a_run():
    reqid = start_gate()
    append("/etc/ctrl-exec-agent/scripts.conf", "again = /opt/scripts/hello\n")
    services["agent"].reload()
    assert run_script("again") == "hello\n"
    finish_gate(reqid, "reloaded")


def step_restart_during_a_run():
    reqid = start_gate()
    services["agent"].stop()
    services["agent"] = Service("agent", BIN + "cea", "serve")
    finish_gate(reqid, "restarted")


def step_api():
    services["api"] = Service("api", BIN + "ctrl-exec-api")
    uid = run("id", "-u", "ctrl-exec").strip()
    ids = re.search(r"(?m)^Uid:\t(.*)$", read("/proc/%d/status" % services["api"].process.pid))[1]
    assert ids.split() == [uid] * 4, ids  # it was started by root
    with urllib.request.urlopen("http://127.0.0.1:7445/health", timeout=120) as answer:
        assert json.load(answer)["ok"] is True
    answer = post("/run", {"hosts": [HOST], "script": "hello"})
    assert answer["ok"] and answer["results"][0]["stdout"] == "hello\n", answer
    services["api"].reload()
    answer = post("/run", {"hosts": [HOST], "script": "who-web", "async": True})
    assert "www-data" in ced("wait", answer["reqid"])


def serial_of(path):
    return run("openssl", "x509", "-in", path, "-noout", "-serial").strip()


def step_renew():
    """Both sides' certificates, by `maintain`: they are for a day, and half of the host's is over."""
    configure_control(cert_days=1)
    late = ("/usr/bin/python3", "-IS", HERE + "/late.py")
    ced("unpair", HOST)
    with PairingMode(*late, "pairing-mode"):
        pair(run(*late, "pairing-token").strip())
    services["agent"].reload()
    host = serial_of("/etc/ctrl-exec-agent/agent.crt")
    shown = ced("maintain")
    assert re.search(r"(?m)^OK +%s: its certificate is renewed" % HOST, shown), shown
    assert serial_of("/etc/ctrl-exec-agent/agent.crt") != host
    assert run_script("hello") == "hello\n"
    ced("rotate-cert")  # to one of a day, of which too little is left from the beginning
    dispatcher = serial_of("/etc/ctrl-exec/dispatcher.crt")
    assert "is in use until" in ced("maintain")
    assert serial_of("/etc/ctrl-exec/dispatcher.crt") != dispatcher
    assert run_script("hello") == "hello\n"
    configure_control()


def step_rotate():
    before = serial_of("/etc/ctrl-exec/dispatcher.crt")
    assert "is in use until" in ced("rotate-cert")
    assert serial_of("/etc/ctrl-exec/dispatcher.crt") != before
    ced("serial-status")
    assert run_script("hello") == "hello\n"


def step_replace_the_ca():
    before = serial_of("/etc/ctrl-exec/ca.crt")
    ced("setup-ca", "--next")
    ced("maintain")  # the host moves
    assert "nobody depends on the CA" in ced("maintain")  # and we do
    ced("retire-ca")
    assert serial_of("/etc/ctrl-exec/ca.crt") != before
    verify = ("openssl", "verify", "-x509_strict", "-CAfile", "/etc/ctrl-exec/ca.crt")
    run(*verify, "/etc/ctrl-exec-agent/agent.crt")
    assert run_script("hello") == "hello\n"
    answer = post("/run", {"hosts": [HOST], "script": "hello"})  # which has the new ones without a word
    assert answer["results"][0]["stdout"] == "hello\n", answer


def step_check_again():
    step_check()


def step_stop():
    services["api"].stop()
    services["agent"].stop()
    for name, service in services.items():
        assert service.events("bug") == [], name


def step_uninstall():
    run(*INSTALL, "--uninstall")
    left = [name for name in os.listdir(BIN) if name.startswith(("ce", "ctrl-exec"))]
    assert left == [] and not os.path.exists("/usr/local/lib/ctrl-exec"), left
    assert os.path.exists("/etc/ctrl-exec/ca.key") and os.path.exists("/etc/ctrl-exec-agent/agent.key")
    run("id", "-u", "ctrl-exec-agent")


def main():
    signal.alarm(600)  # whatever hangs is to end before the patience of who started this
    for name, step in list(globals().items()):
        if name.startswith("step_"):
            print("\n=== %s" % name[5:].replace("_", " "), flush=True)
            try:
                step()
            except BaseException:
                traceback.print_exc(file=sys.stdout)
                for service in services.values():
                    print("--- %s\n%s" % (service.log, read(service.log)[-4000:]))
                print("failed: %s" % name[5:].replace("_", " "), flush=True)
                return 1
    print("\nall of it went well", flush=True)
    return 0


if __name__ == "__main__":
    os._exit(main())  # what still runs must not keep us
