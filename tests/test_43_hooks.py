"""Hooks that denied in older releases deny here; and what is in force, and why, is said."""

import json
import os
import subprocess

import pytest

import ctrl_exec
import support
from support import ApiServer

# as the older documentation has them
TOKEN_HOOK = '[ "$ENVEXEC_ACTION" = api ] && [ "$ENVEXEC_TOKEN" != "right" ] && exit 2\nexit 0\n'
HOSTS_HOOK = 'case ",$ENVEXEC_HOSTS," in *,beta,*) exit 3;; esac\nexit 0\n'


def write(path, body, mode=0o755):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="ascii") as file:
        file.write("#!/bin/sh\n" + body)
    os.chmod(path, mode)
    return path


@pytest.fixture
def hook(deployment):
    """A function that gives the control host a hook in its default place."""
    path = deployment.control.file(ctrl_exec.ETC + "/auth-hook")
    yield lambda body, mode=0o755: write(path, body, mode)
    if os.path.exists(path):
        os.unlink(path)


@pytest.mark.parametrize("words", [["beta"], ["alpha", "beta"], ["beta", "alpha"], ["--all"]])
def test_a_hook_that_looks_for_a_host_between_commas_finds_it(deployment, hook, words):
    hook(HOSTS_HOOK)
    for verb in (["run", *words, "hello"], ["ping", *words], ["discovery", *words]):
        done = deployment.control.run(*verb)
        assert done.returncode == 1 and "insufficient privilege" in done.err
    assert deployment.control.run("run", "alpha", "hello").returncode == 0


def test_a_hook_that_checks_the_token_of_the_api_is_asked_there_and_leaves_the_command_line_alone(deployment, hook):
    hook(TOKEN_HOOK)
    assert deployment.control.run("run", "alpha", "hello").returncode == 0
    with ApiServer(deployment.control, "older", "") as server:
        for token, status in (("wrong", 403), ("", 403), ("right", 200)):
            for path in ("/run", "/ping"):
                body = {"hosts": ["alpha"], "token": token}
                reply = server.call("POST", path, dict(body, script="hello") if path == "/run" else body)
                assert reply.status == status, reply.json
        server.stop()
    with ApiServer(deployment.control, "newer", "api_hook = operation\n") as server:
        assert server.run_script(["alpha"], "hello", token="wrong").status == 200


def test_a_hook_can_tell_the_faces_apart_and_what_exactly_is_asked(deployment, hook, tmp_path):
    hook('echo "$ENVEXEC_VIA $ENVEXEC_ACTION $ENVEXEC_OPERATION" >> %s\n' % (tmp_path / "asked"))
    deployment.control.run("discovery", "alpha")
    deployment.control.run("ping", "alpha")
    with ApiServer(deployment.control, "faces", "") as server:
        server.call("POST", "/discovery", {"hosts": ["alpha"]})
    assert (tmp_path / "asked").read_text().splitlines() == [
        "cli ping discovery", "cli ping ping", "api api api", "api ping discovery",
    ]  # fmt: skip


def test_what_is_too_long_for_a_variable_is_left_out_and_named(tmp_path):
    path = write(str(tmp_path / "hook"), "cat > %s/in; env > %s/env\n" % (tmp_path, tmp_path))
    os.chmod(str(tmp_path), 0o755)
    hosts = tuple("host-%06d.example.com" % number for number in range(20_000))
    ctrl_exec.Hook(path, 60).decide(ctrl_exec.HookContext("run", "r1", "deploy", hosts, ("x" * 200_000,)))
    told = json.loads((tmp_path / "in").read_text())
    assert len(told["hosts"]) == 20_000 and len(told["args"][0]) == 200_000
    lines = (tmp_path / "env").read_text().splitlines()
    assert "ENVEXEC_OMITTED=ENVEXEC_HOSTS,ENVEXEC_ARGS,ENVEXEC_ARGS_JSON" in lines
    assert not any(line.startswith(("ENVEXEC_HOSTS=", "ENVEXEC_ARGS")) for line in lines)
    assert "ENVEXEC_SCRIPT=deploy" in lines


def test_which_hook_is_in_force_and_why_is_said(deployment, hook):
    control = deployment.control
    path = hook("exit 1\n")
    findings = [one["what"] for one in control.json("check")[1]["findings"]]
    assert "auth hook %s (it lies there, and no auth_hook is set)" % path in findings
    assert control.run("ping", "alpha").returncode == 1
    (line,) = [line for line in control.events("auth") if "RESULT=denied" in line][-1:]
    assert "HOOK=" + path in line and "no auth_hook is set" in line
    with ApiServer(control, "told", "") as server:
        assert "HOOK=" + path in server.events("api-start")[-1]
    assert "HOOK=none" in deployment["alpha"].events("start")[-1]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: another user's rights")
def test_a_hook_that_the_service_may_not_execute_is_found(fresh):
    solo = fresh(start=False)["solo"]
    for directory in (solo.root, *_parents(solo.root)):
        if directory != "/tmp":
            os.chmod(directory, 0o755)
    path = write(solo.file(ctrl_exec.AGENT_ETC + "/auth-hook"), "exit 0\n", 0o750)
    user = "nobody" if subprocess.run(["id", ctrl_exec.AGENT_USER], capture_output=True).returncode else ""
    status, shown = solo.json("self-check")
    failed = [one["what"] for one in shown["findings"] if one["level"] == "FAIL" and path in one["what"]]
    if user:  # nothing is installed here: there is no such user to ask for
        assert ctrl_exec.may_execute("nobody", path) is False and failed == []
    else:
        assert status == 1 and "may not execute it" in failed[0]
    os.chmod(path, 0o755)
    assert ctrl_exec.may_execute("nobody", path) is True


def _parents(path):
    while os.path.dirname(path) not in ("/", path):
        path = os.path.dirname(path)
        yield path
