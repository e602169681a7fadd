"""Scripts do not become root by an upgrade: what a script runs as under an agent that root starts."""

import os
import subprocess

import pytest
import support
from support import wait_until

import ctrl_exec

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: an agent that root starts")

WITH_USER = """cp /etc/passwd /etc/group "$0"
echo ctrl-exec-script:x:64901:64901::/nonexistent:/bin/false >> "$0/passwd"
echo ctrl-exec-script:x:64901: >> "$0/group"
mount --bind "$0/passwd" /etc/passwd
mount --bind "$0/group" /etc/group
"""
WITHOUT_USER = """cp /etc/passwd /etc/group "$0"
sed -i /^ctrl-exec-script:/d "$0/passwd" "$0/group"
mount --bind "$0/passwd" /etc/passwd
mount --bind "$0/group" /etc/group
"""


@pytest.fixture
def host(fresh, tmp_path):
    """A function that starts an agent on a host with that user or without: start(accounts, conf)."""
    deployment = fresh(start=False)
    solo = deployment["solo"]
    for directory in (tmp_path, *list(tmp_path.parents)[:-2]):
        os.chmod(str(directory), 0o711)
    for name, options in (("who", ""), ("plain", "profile=plain"), ("rooted", "profile=rooted")):
        solo.script(name, "id -un; id -u; id -G; id -g\n", options)

    def start(accounts, conf):
        text = "port = %d\nbind = 127.0.0.1\n[profile plain]\nnice = 1\n[profile rooted]\nrun_as = root\n%s"
        solo.put(ctrl_exec.AGENT_ETC + "/agent.conf", text % (solo.port, conf), 0o640)
        solo.within = ["unshare", "--mount", "sh", "-ec", accounts + 'exec "$@"', str(tmp_path)]
        solo.process = subprocess.Popen(
            [*solo.within, *solo.argv("serve")], env=solo.environment(), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        wait_until(solo.is_up, what="the agent")
        return deployment

    return start


def run(deployment, script):
    return deployment.control.json("run", "solo", script)[1]["results"][0]


def inside(host, *words):
    """One command on that very host."""
    return subprocess.run([*host.within, *host.argv(*words)], env=host.environment(), capture_output=True, text=True)


def test_without_a_profile_a_script_runs_as_the_user_who_owns_nothing(host):
    deployment = host(WITH_USER, "")
    for script in ("who", "plain"):  # a profile that names no user makes nobody root, either
        assert run(deployment, script)["stdout"].split() == ["ctrl-exec-script", "64901", "64901", "64901"]
    assert run(deployment, "rooted")["stdout"].split()[:2] == ["root", "0"]
    offers = deployment.control.json("discovery", "solo")[1]["hosts"]["solo"]["scripts"]
    assert {offer["name"]: offer["user"] for offer in offers if offer["name"] in ("who", "rooted")} == {
        "who": "ctrl-exec-script", "rooted": "root",
    }  # fmt: skip
    assert "SCRIPTS_RUN_AS=ctrl-exec-script" in deployment["solo"].events("start")[0]
    said = inside(deployment["solo"], "self-check").stdout
    assert "script rooted runs as root, as profile rooted says" in said and "script who runs as root" not in said


def test_without_that_user_a_script_is_refused_and_told_what_to_write(host):
    deployment = host(WITHOUT_USER, "")
    for script, profile in (("who", "default"), ("plain", "plain")):
        answer = run(deployment, script)
        assert answer["exit"] == -1
        assert "there is no user ctrl-exec-script: write run_as = USER in [profile %s]" % profile in answer["error"]
    assert run(deployment, "rooted")["stdout"].split()[0] == "root"
    warned = deployment["solo"].events("config-warn")
    assert any("script who will be refused" in line for line in warned)
    done = inside(deployment["solo"], "self-check")
    assert done.returncode == 1 and "write run_as = USER" in done.stdout


def test_the_default_profile_says_as_what_scripts_without_one_run(host):
    deployment = host(WITH_USER, "[profile default]\nrun_as = nobody\n")
    assert run(deployment, "who")["stdout"].split()[0] == "nobody"
    assert run(deployment, "plain")["stdout"].split()[0] == "ctrl-exec-script"
    assert "SCRIPTS_RUN_AS=nobody" in deployment["solo"].events("start")[0]
