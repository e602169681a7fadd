"""The oldest and the newest Debian that we know of, and one between: a whole life of the program on each.

The machines are namespaces with a root tree by debootstrap (machines.py): their Python, their OpenSSL."""

import json
from subprocess import DEVNULL

import pytest
import support
import trees
from machines import CHECKOUT, INSTALL, LATE_CED, PYTHON, SCRIPTS, boot, find_obstacle, pair

pytestmark = pytest.mark.skipif(bool(find_obstacle()), reason=find_obstacle())


@pytest.mark.parametrize("suite", trees.SUITES)
def test_the_demo_works_on(suite):
    with boot(suite) as machine:
        done = machine.run(PYTHON, CHECKOUT + "/ctrl_exec.py", "demo")
        assert done.err == "" and done.out.rstrip().endswith("`--keep` leaves it running."), done.out
        assert machine.run("ls", "-A", "/tmp").out == ""


@pytest.mark.parametrize("key_type", ["ec", "rsa"])
@pytest.mark.parametrize("suite", trees.SUITES)
def test_an_installation_lives_its_whole_life_on(suite, key_type):
    with boot(suite) as machine:
        done = machine.run(PYTHON, "-B", SCRIPTS + "/scenario.py", key_type, status=None, timeout=630)
        assert done.returncode == 0, done.out + done.err
        assert done.out.endswith("all of it went well\n")


# --- one release with another -----------------------------------------------------------------------------


def read_serial(machine, path):
    return machine.run("openssl", "x509", "-in", path, "-noout", "-serial").out


@pytest.mark.parametrize("suites", [("bullseye", "trixie"), ("trixie", "bullseye")], ids="-asks-".join)
def test_one_release_pairs_asks_and_renews_another(suites):
    with boot(suites[0]) as control, boot(suites[1], beside=control) as host:
        control.run(*INSTALL, "--dispatcher")
        control.put("/etc/ctrl-exec/ctrl-exec.conf", "cert_days = 1\n", 0o640)
        for verb in ("setup-ca", "setup-ctrl-exec"):
            control.run("ced", verb)
        host.run(*INSTALL, "--agent")
        host.put("/etc/ctrl-exec-agent/scripts.conf", "release = /opt/release\n", 0o640)
        host.put("/opt/release", "#!/bin/sh\ncat /etc/debian_version\n", 0o755)
        pair(control, host, LATE_CED)
        paired_as = read_serial(host, "/etc/ctrl-exec-agent/agent.crt")
        host.spawn("cea", "serve", stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL)
        support.wait_until(
            lambda: control.run("ced", "ping", host.name, status=None).returncode == 0, what="an answer"
        )
        assert read_serial(host, "/etc/ctrl-exec-agent/agent.crt") != paired_as  # renewed by that ping
        asked_by = read_serial(control, "/etc/ctrl-exec/dispatcher.crt")
        assert "is in use until" in control.run("ced", "maintain").out  # and so are we
        assert read_serial(control, "/etc/ctrl-exec/dispatcher.crt") != asked_by
        control.run("ced", "setup-ca", "--next")
        assert "its certificate is renewed" in control.run("ced", "maintain").out
        assert "nobody depends on the CA" in control.run("ced", "maintain").out
        control.run("ced", "retire-ca")
        (result,) = json.loads(control.run("ced", "run", host.name, "release", "--json").out)["results"]
        assert result["state"] == "ok" and result["stdout"] == host.read("/etc/debian_version"), result
        for machine, words in ((control, ("ced", "check")), (host, ("cea", "self-check"))):
            assert "FAIL" not in machine.run(*words).out
