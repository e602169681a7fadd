"""install.sh: what it puts where, what it leaves alone, and that what it installs works."""

import ast
import configparser
import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys

import pytest

import ctrl_exec
import support

REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCRIPT = os.path.join(REPOSITORY, "install.sh")
SHELLS = [
    words for words in (["sh"], ["dash"], ["busybox", "sh"], ["bash", "--posix"]) if shutil.which(words[0])
]
BOTH = ("--dispatcher", "--agent")
PYC = os.path.basename(importlib.util.cache_from_source("ctrl_exec.py"))

LIB = "usr/local/lib/ctrl-exec"
BIN = "usr/local/bin"
LINK = "../lib/ctrl-exec/launch"
UNIT = "etc/systemd/system/ctrl-exec-agent.service"
API_UNIT = "etc/systemd/system/ctrl-exec-api.service"
SOCKET, API_SOCKET = (path.replace(".service", ".socket") for path in (UNIT, API_UNIT))
TIMER = "etc/systemd/system/ctrl-exec-maintain.timer"
TIMER_FILES = {TIMER: 0o644, "etc/systemd/system/ctrl-exec-maintain.service": 0o644}
PROGRAM_FILES = {
    LIB + "/ctrl_exec.py": 0o755,
    LIB + "/launch": 0o755,
    LIB + "/__pycache__/" + PYC: 0o644,
}
DISPATCHER_LINKS = {BIN + "/" + name: LINK for name in ("ced", "ctrl-exec", "ctrl-exec-dispatcher")}
AGENT_LINKS = {BIN + "/" + name: LINK for name in ("cea", "ctrl-exec-agent")}
API_LINKS = {BIN + "/ctrl-exec-api": LINK}
CONFIGURATION = {
    "etc/ctrl-exec/ctrl-exec.conf": 0o640,
    "etc/ctrl-exec-agent/agent.conf": 0o640,
    "etc/ctrl-exec-agent/scripts.conf": 0o640,
}
DIRECTORIES = {
    "etc/ctrl-exec": (0o750, "root", "ctrl-exec"),
    "etc/ctrl-exec-agent": (0o750, "root", "ctrl-exec-agent"),
    "var/lib/ctrl-exec": (0o750, "root", "ctrl-exec"),
    "var/lib/ctrl-exec/agents": (0o2750, "root", "ctrl-exec"),
    "var/lib/ctrl-exec/locks": (0o2770, "root", "ctrl-exec"),
    "var/lib/ctrl-exec/runs": (0o2770, "root", "ctrl-exec"),
    "var/lib/ctrl-exec/pairing": (0o700, "root", "root"),
    "var/lib/ctrl-exec/pairing-tokens": (0o700, "root", "root"),
    "var/lib/ctrl-exec/request-secrets": (0o750, "root", "ctrl-exec"),
    "var/lib/ctrl-exec-agent": (0o755, "root", "root"),
    "var/lib/ctrl-exec-agent/runs": (0o750, "root", "ctrl-exec-agent"),
    "var/lib/ctrl-exec-agent/locks": (0o700, "root", "root"),
}


def install(stage, *options, shell=("sh",), script=SCRIPT, env=None, **how):
    """Run install.sh with DESTDIR; a value of None in `env` takes a variable away."""
    environment = {
        **os.environ,
        "DESTDIR": str(stage),
        "PYTHON": sys.executable,
        "LC_ALL": "C",
        **(env or {}),
    }
    environment = {name: value for name, value in environment.items() if value is not None}
    return subprocess.run(
        [*shell, str(script), *options],
        env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, **how
    )  # fmt: skip


def succeed(*words, **how):
    done = install(*words, **how)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done


def tree(top):
    """Every path below `top`: the mode of a file or directory, the target of a link."""
    found = {}
    for directory, names, files in os.walk(str(top)):
        for name in names + files:
            path = os.path.join(directory, name)
            status = os.lstat(path)
            link = stat.S_ISLNK(status.st_mode)
            found[os.path.relpath(path, str(top))] = (
                os.readlink(path) if link else stat.S_IMODE(status.st_mode)
            )
    return found


def files_of(top):
    return {path: mode for path, mode in tree(top).items() if not os.path.isdir(os.path.join(str(top), path))}


def snapshot(top):
    """Files and links with all that a second installation could change about them."""
    found = {}
    for path, mode in files_of(top).items():
        full = os.path.join(str(top), path)
        with open(full, "rb") as file:
            found[path] = (mode, os.lstat(full).st_mtime_ns, os.lstat(full).st_ino, file.read())
    return found


def read(*parts):
    with open(os.path.join(*map(str, parts)), encoding="utf-8") as file:
        return file.read()


def put(path, text, mode=0o755):
    os.makedirs(os.path.dirname(str(path)), exist_ok=True)
    with open(str(path), "w", encoding="utf-8") as file:
        file.write(text)
    os.chmod(str(path), mode)


def fake_path(directory, **programs):
    """A PATH on which these programs come first; each value is the body of a shell script."""
    for name, body in programs.items():
        put(os.path.join(str(directory), name.replace("_", "-")), "#!/bin/sh\n%s\n" % body)
    return str(directory) + ":" + os.environ["PATH"]


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    """Both roles, staged once, for tests that only look or run."""
    stage = tmp_path_factory.mktemp("staged") / "tree"
    succeed(stage, *BOTH)
    return stage


# --- the tree -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", SHELLS, ids="-".join)
def test_staging_makes_this_tree_with_these_modes_whatever_the_umask(tmp_path, shell):
    stage = tmp_path / "a stage"
    succeed(
        stage,
        *BOTH,
        shell=shell,
        umask=0o077,
        env={"PATH": fake_path(tmp_path / "fake", openrc_run="exit 1")},
    )
    expected = {**PROGRAM_FILES, **DISPATCHER_LINKS, **AGENT_LINKS, **CONFIGURATION}
    expected.update({UNIT: 0o644, SOCKET: 0o644, "etc/init.d/ctrl-exec-agent": 0o755, **TIMER_FILES})
    assert files_of(stage) == expected
    found = tree(stage)
    assert {path: found[path] for path in DIRECTORIES} == {
        path: mode for path, (mode, _, _) in DIRECTORIES.items()
    }
    shared = ["usr", "usr/local", BIN, "usr/local/lib", LIB, LIB + "/__pycache__", "etc", "var", "var/lib"]
    assert {found[path] for path in shared} == {0o755}


def test_the_dispatcher_role_brings_nothing_of_the_agent(tmp_path):
    succeed(tmp_path, "--dispatcher")
    conf = {"etc/ctrl-exec/ctrl-exec.conf": 0o640}
    assert files_of(tmp_path) == {**PROGRAM_FILES, **DISPATCHER_LINKS, **conf, **TIMER_FILES}


def test_the_agent_role_brings_nothing_of_the_dispatcher(tmp_path):
    done = succeed(tmp_path, "--agent")
    found = files_of(tmp_path)
    found.pop("etc/init.d/ctrl-exec-agent", None)  # where OpenRC is
    agent = {path: mode for path, mode in CONFIGURATION.items() if "agent" in path}
    assert found == {**PROGRAM_FILES, **AGENT_LINKS, **agent, UNIT: 0o644, SOCKET: 0o644}
    assert "request-pairing" in done.stdout and "setup-ca" not in done.stdout


def test_the_api_role_brings_what_it_shares_with_the_dispatcher_and_a_service(tmp_path):
    done = succeed(tmp_path, "--api")
    found = files_of(tmp_path)
    found.pop("etc/init.d/ctrl-exec-api", None)  # where OpenRC is
    units = {API_UNIT: 0o644, API_SOCKET: 0o644}
    assert found == {**PROGRAM_FILES, **API_LINKS, "etc/ctrl-exec/ctrl-exec.conf": 0o640, **units}
    assert "auth-hook" in done.stdout and "setup-ca" not in done.stdout
    assert run_launcher(tmp_path, "ctrl-exec-api", "--help").stdout.startswith("usage: ctrl-exec-api ")
    succeed(tmp_path, "--uninstall", "--api")
    assert set(files_of(tmp_path)) == {"etc/ctrl-exec/ctrl-exec.conf"}


def test_configuration_files_are_the_examples_and_allow_nothing(staged):
    for role, path in (
        ("dispatcher", "etc/ctrl-exec/ctrl-exec.conf"),
        ("agent", "etc/ctrl-exec-agent/agent.conf"),
    ):
        assert read(staged, path) == ctrl_exec.render_example(role) + "\n"
    lines = read(staged, "etc/ctrl-exec-agent/scripts.conf").splitlines()
    assert lines and all(line.startswith("#") for line in lines)


def test_a_staged_tree_works_where_it_is_moved_to(tmp_path):
    succeed(tmp_path / "here", *BOTH)
    os.rename(str(tmp_path / "here"), str(tmp_path / "there"))
    for link in {**DISPATCHER_LINKS, **AGENT_LINKS}:
        done = subprocess.run(
            [str(tmp_path / "there" / link), "--version"], capture_output=True, text=True, timeout=60
        )
        assert done.stdout.startswith("ctrl-exec " + ctrl_exec.__version__), done.stderr


def test_a_relative_destdir_is_below_the_working_directory(tmp_path):
    succeed("out", "--dispatcher", cwd=str(tmp_path))
    assert set(DISPATCHER_LINKS) < set(files_of(tmp_path / "out"))


def test_prefix_moves_the_program_and_the_service_follows(tmp_path):
    succeed(tmp_path, *BOTH, "--prefix=/usr/")
    found = files_of(tmp_path)
    assert "usr/bin/ced" in found and "usr/lib/ctrl-exec/ctrl_exec.py" in found
    assert "ExecStart=/usr/bin/cea serve\n" in read(
        tmp_path, "usr/lib/systemd/system/ctrl-exec-agent.service"
    )
    assert not [path for path in found if path.startswith("usr/local")]


# --- again, over an older one, and back -------------------------------------------------------------------


def test_a_second_run_changes_nothing_and_says_what_it_kept(tmp_path):
    succeed(tmp_path, *BOTH)
    before = snapshot(tmp_path)
    done = succeed(tmp_path, *BOTH)
    assert snapshot(tmp_path) == before
    assert "installed:" not in done.stdout
    assert sorted(re.findall(r"kept: /(\S+)", done.stdout)) == sorted(CONFIGURATION)


def test_edited_configuration_keeps_its_text_and_its_mode(tmp_path):
    succeed(tmp_path, *BOTH)
    for number, path in enumerate(CONFIGURATION):
        put(tmp_path / path, "# mine %d\n" % number, 0o600)
    os.unlink(str(tmp_path / "etc/ctrl-exec/ctrl-exec.conf"))
    os.symlink("/nowhere/else.conf", str(tmp_path / "etc/ctrl-exec/ctrl-exec.conf"))
    succeed(tmp_path, *BOTH)
    assert os.readlink(str(tmp_path / "etc/ctrl-exec/ctrl-exec.conf")) == "/nowhere/else.conf"
    for number, path in list(enumerate(CONFIGURATION))[1:]:
        assert read(tmp_path, path) == "# mine %d\n" % number
        assert stat.S_IMODE(os.stat(str(tmp_path / path)).st_mode) == 0o600


def test_a_second_run_repairs_what_is_missing(tmp_path):
    succeed(tmp_path, *BOTH)
    before = tree(tmp_path)
    for path in (
        LIB + "/__pycache__/" + PYC,
        LIB + "/launch",
        BIN + "/cea",
        "etc/ctrl-exec-agent/scripts.conf",
    ):
        os.unlink(str(tmp_path / path))
    os.chmod(str(tmp_path / "var/lib/ctrl-exec/runs"), 0o777)
    succeed(tmp_path, *BOTH)
    assert tree(tmp_path) == before


def test_a_newer_program_replaces_the_older_one_and_is_compiled(tmp_path):
    stage = tmp_path / "stage"
    succeed(stage, "--dispatcher")
    newer = tmp_path / "newer"
    newer.mkdir()
    shutil.copy(SCRIPT, str(newer))
    text = read(REPOSITORY, "ctrl_exec.py")
    put(newer / "ctrl_exec.py", re.sub(r"(?m)^__version__ = .*$", '__version__ = "99.1.2"', text))
    succeed(stage, "--dispatcher", script=newer / "install.sh")
    done = run_launcher(stage, "ced", "--version", python_options=["-v"])
    assert done.stdout.startswith("ctrl-exec 99.1.2 ")
    assert "code object from " + repr(str(stage / LIB / "__pycache__" / PYC)) in done.stderr


def test_uninstall_takes_the_program_and_leaves_configuration_and_state(tmp_path):
    succeed(tmp_path, *BOTH)
    put(tmp_path / "var/lib/ctrl-exec/agents/web-01.json", "{}", 0o640)
    put(tmp_path / "etc/ctrl-exec/ca.key", "secret", 0o600)
    before = tree(tmp_path)
    done = succeed(tmp_path, "--uninstall")
    kept = ("etc/ctrl-exec", "var/lib/ctrl-exec")
    assert files_of(tmp_path) == {
        **CONFIGURATION, "var/lib/ctrl-exec/agents/web-01.json": 0o640, "etc/ctrl-exec/ca.key": 0o600,
    }  # fmt: skip
    after = tree(tmp_path)
    assert {p: m for p, m in after.items() if p.startswith(kept)} == {
        p: m for p, m in before.items() if p.startswith(kept)
    }
    assert not os.path.exists(str(tmp_path / LIB))
    for path in ("/etc/ctrl-exec", "/var/lib/ctrl-exec", "/etc/ctrl-exec-agent", "/var/lib/ctrl-exec-agent"):
        assert re.search(r"(?m)^left as it is:.* %s( |$)" % path, done.stdout)
    assert "removed:" not in succeed(tmp_path, "--uninstall").stdout


def test_uninstalling_one_role_leaves_the_other_working(tmp_path):
    succeed(tmp_path, *BOTH)
    succeed(tmp_path, "--uninstall", "--agent")
    found = files_of(tmp_path)
    assert set(DISPATCHER_LINKS) | set(PROGRAM_FILES) <= set(found)
    assert not {*AGENT_LINKS, UNIT, SOCKET} & set(found)
    assert run_launcher(tmp_path, "ced", "--version").returncode == 0


def test_uninstall_leaves_files_of_others(tmp_path):
    succeed(tmp_path, *BOTH)
    os.unlink(str(tmp_path / BIN / "ced"))
    put(tmp_path / BIN / "ced", "somebody else's")
    put(tmp_path / LIB / "notes", "mine")
    put(tmp_path / UNIT, "[Service]\nExecStart=/opt/other/cea serve\n", 0o644)
    done = succeed(tmp_path, "--uninstall")
    found = files_of(tmp_path)
    assert set(found) == {BIN + "/ced", LIB + "/notes", UNIT, *CONFIGURATION}
    assert "being of another origin: /usr/local/bin/ced" in done.stdout
    assert "holding other files: /usr/local/lib/ctrl-exec" in done.stdout


def test_uninstalling_one_prefix_keeps_the_service_of_another(tmp_path):
    succeed(tmp_path, "--agent")
    succeed(tmp_path, "--uninstall", "--agent", "--prefix", "/opt/other")
    assert "ExecStart=/usr/local/bin/cea serve\n" in read(tmp_path, UNIT)
    assert os.path.exists(str(tmp_path / SOCKET))


# --- refusals: one sentence, and nothing is changed -------------------------------------------------------


def refused(done, status, stage, *, left=()):
    """install.sh said one line, ended with `status`, and the stage holds only `left`."""
    assert done.returncode == status, done.stdout + done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("install.sh: ") and done.stderr.count("\n") == 1, done.stderr
    assert sorted(files_of(stage) if os.path.isdir(str(stage)) else ()) == sorted(left)
    return done.stderr


@pytest.mark.parametrize(
    "options, word",
    [
        ((), "which role"),
        (("--agnet",), "`--agnet'"),
        (("--agent", "extra"), "`extra'"),
        (("--agent", "--prefix"), "--prefix needs"),
        (("--agent", "--prefix", "relative/path"), "absolute"),
        (("--agent", "--prefix", "/with space"), "letters, digits"),
        (("--agent", "--prefix", "/a\nExecStart=/bin/x"), None),
        (("--agent", "--run-tests"), "no other option"),
        (("--move-aside", "--run-tests"), "no other option"),
        (("--uninstall", "--move-aside"), "for an installation"),
    ],
)
def test_a_wrong_command_line_is_refused_before_anything_is_changed(tmp_path, options, word):
    done = install(tmp_path / "stage", *options)
    assert done.returncode == 2 and done.stderr.startswith("install.sh: ")
    assert not os.path.exists(str(tmp_path / "stage"))
    if word is not None:
        assert word in refused(done, 2, tmp_path / "stage")


def test_help_names_every_option(tmp_path):
    done = succeed(tmp_path / "stage", "--help")
    for option in (*BOTH, "--api", "--move-aside", "--uninstall", "--run-tests", "--prefix", "--help", "DESTDIR", "PYTHON"):
        assert option in done.stdout
    assert not os.path.exists(str(tmp_path / "stage"))


def test_a_python_that_is_too_old_is_refused(tmp_path):
    put(
        tmp_path / "python3", "#!/bin/sh\nexit 1\n"
    )  # as an older one answers: it knows no -I, or is below 3.9
    done = install(tmp_path / "stage", *BOTH, env={"PYTHON": str(tmp_path / "python3")})
    assert "Python 3.9" in refused(done, 1, tmp_path / "stage")


def _imports():
    """Every module that the program imports anywhere, also those that one function imports when it is called."""
    nodes = list(ast.walk(ast.parse(read(REPOSITORY, "ctrl_exec.py"))))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module for node in nodes if isinstance(node, ast.ImportFrom)}


def test_an_interpreter_is_asked_for_each_module_that_the_program_imports(tmp_path):
    block = """
import builtins, os, re, sys
sys.argv = sys.argv[2:]
there = builtins.__import__
def no_more(name, scope=None, *rest, **more):
    if scope is not None and scope.get("__name__") != "__main__" or name in ("os", "re", "sys"):
        return there(name, scope, *rest, **more)
    raise ImportError(name)
builtins.__import__ = no_more
exec(sys.stdin.read())
"""
    put(tmp_path / "block.py", block, 0o644)
    bare = "#!/bin/sh\nexec '%s' -I '%s' \"$@\"\n" % (sys.executable, tmp_path / "block.py")
    put(tmp_path / "python3", bare)
    done = install(tmp_path / "stage", *BOTH, env={"PYTHON": str(tmp_path / "python3")})
    said = refused(done, 1, tmp_path / "stage")
    asked = set(re.search(r" cannot import ([\w, .]+):", said)[1].split(", "))
    assert asked == _imports() - {"os", "re", "sys"}
    assert asked <= set(getattr(sys, "stdlib_module_names", asked))


def test_only_ctypes_is_a_module_that_the_program_can_do_without():
    """install.sh refuses an interpreter without any of them; the program itself says which it lacks, and goes on
    without ctypes only."""
    program = ast.parse(read(REPOSITORY, "ctrl_exec.py"))
    optional = set()
    for attempt in (node for node in ast.walk(program) if isinstance(node, ast.Try)):
        for handler in attempt.handlers:
            names = {name.id for name in ast.walk(handler.type or ast.Name("x")) if isinstance(name, ast.Name)}
            ends = any(isinstance(node, ast.Attribute) and node.attr == "exit" for node in ast.walk(handler))
            if names & {"ImportError", "ModuleNotFoundError"} and not ends:
                imports = [node for node in attempt.body if isinstance(node, ast.Import)]
                optional |= {alias.name for node in imports for alias in node.names}
    assert optional == {"ctypes"}


def _python_without(top, *missing):
    """An interpreter whose standard library is this one's without some modules, as python3-minimal is."""
    version = "python%d.%d" % sys.version_info[:2]
    library, extensions = os.path.dirname(os.__file__), os.path.dirname(importlib.util.find_spec("_json").origin)
    gone = re.compile(r"(_?(%s))(\..*)?" % "|".join(missing))
    kept = top / "lib" / version
    for source, target in ((library, kept), (extensions, kept / "lib-dynload")):
        target.mkdir(parents=True, exist_ok=True)
        for name in os.listdir(source):
            if not gone.fullmatch(name) and name not in ("lib-dynload", "__pycache__", "site-packages"):
                os.symlink(os.path.join(source, name), str(target / name))
    (top / "bin").mkdir()
    shutil.copy(os.path.realpath(sys.executable), str(top / "bin/python3"))  # which looks for lib beside bin
    return str(top / "bin/python3")


@pytest.mark.parametrize(
    "missing",
    [
        ("ctypes", "difflib", "hmac", "json", "queue", "resource", "shlex", "shutil"),  # Debian 11
        ("ssl",),
    ],
    ids=len,
)
def test_a_python_with_a_part_of_the_standard_library_is_refused_and_told_what_is_missing(tmp_path, missing):
    python = _python_without(tmp_path / "python", *missing)
    done = install(tmp_path / "stage", *BOTH, env={"PYTHON": python})
    said = refused(done, 1, tmp_path / "stage")
    named = re.fullmatch(r"install\.sh: (\S+) cannot import ([\w, ]+): install the rest .* python3\)\n", said)
    assert named and named[1] == python
    assert set(missing) <= set(named[2].split(", ")) <= {*missing, "tempfile"}  # which needs shutil


def test_another_python_is_taken_when_the_first_has_a_part_of_the_standard_library(tmp_path):
    bare = _python_without(tmp_path / "python", "queue")
    whole = "exec '%s' \"$@\"" % sys.executable
    path = fake_path(tmp_path / "fake", **{"python3.9": whole})
    script = tmp_path / "checkout/install.sh"
    put(script, read(SCRIPT).replace("/usr/bin/python3 /usr/local/bin/python3 python3 ", bare + " "))
    shutil.copy(os.path.join(REPOSITORY, "ctrl_exec.py"), str(tmp_path / "checkout"))
    env = {"PYTHON": None, "PATH": path}
    succeed(tmp_path / "stage", "--agent", script=script, env=env)
    assert bare not in read(tmp_path, "stage", LIB, "launch")
    assert run_program([str(tmp_path / "stage" / BIN / "cea"), "--version"]).returncode == 0


@pytest.mark.parametrize("missing, package", [("openssl", "openssl"), ("cmp", "diffutils")])
def test_a_machine_without_a_program_that_is_needed_is_refused(tmp_path, missing, package):
    tools = "sh dirname cat cut cmp cp chmod mv mkdir mktemp rm rmdir ln readlink grep id sed env openssl"
    (tmp_path / "bin").mkdir()
    for name in set(tools.split()) - {missing}:
        os.symlink(shutil.which(name), str(tmp_path / "bin" / name))
    done = install(tmp_path / "stage", *BOTH, env={"PATH": str(tmp_path / "bin")})
    said = refused(done, 1, tmp_path / "stage")
    assert "the %s program is missing: install the package %s first" % (missing, package) in said


OLDER = (
    BIN + "/ctrl-exec-dispatcher", BIN + "/cea", UNIT, API_UNIT, API_SOCKET, "etc/init.d/ctrl-exec-agent",
)  # fmt: skip


@pytest.fixture
def taken(tmp_path):
    """A tree with programs and services of another origin."""
    for path in OLDER:
        put(tmp_path / path, "of another origin: %s\n" % path)
    os.unlink(str(tmp_path / UNIT))
    os.symlink("/dev/null", str(tmp_path / UNIT))  # masked by the administrator
    put(tmp_path / "var/lib/ctrl-exec", "no directory\n", 0o644)
    return tmp_path


ALL = (*BOTH, "--api")


def test_all_that_is_in_the_way_is_named_at_once_and_not_overwritten(taken):
    before = snapshot(taken)
    said = refused(install(taken, *ALL), 1, taken, left=before)
    named = re.search(r"not made by this script: (.*); move them away first, or add --move-aside", said)[1]
    assert sorted(named.split()) == sorted("/" + path for path in (*OLDER, "var/lib/ctrl-exec"))
    assert snapshot(taken) == before


def test_only_what_the_role_needs_is_in_the_way(taken):
    os.unlink(str(taken / "var/lib/ctrl-exec"))
    os.unlink(str(taken / BIN / "ctrl-exec-dispatcher"))
    succeed(taken, "--dispatcher")


def test_move_aside_renames_what_is_in_the_way_and_says_so(taken):
    before = {path: tree(taken)[path] for path in (*OLDER, "var/lib/ctrl-exec")}
    done = succeed(taken, *ALL, "--move-aside")
    after = tree(taken)
    assert {path: after[path + ".before-ctrl-exec"] for path in before} == before
    assert read(taken, OLDER[0] + ".before-ctrl-exec") == "of another origin: %s\n" % OLDER[0]
    moved = set(re.findall(r"(?m)^moved: /(\S+) to /(\S+)$", done.stdout))
    assert moved == {(path, path + ".before-ctrl-exec") for path in before}
    assert run_launcher(taken, "cea", "--version").returncode == 0
    before = snapshot(taken)
    succeed(taken, *ALL, "--move-aside")  # now there is nothing in the way
    assert snapshot(taken) == before


def test_move_aside_overwrites_nothing(taken):
    for path in (OLDER[0], OLDER[2]):
        put(taken / (path + ".before-ctrl-exec"), "from an earlier time\n")
    before = snapshot(taken)
    said = refused(install(taken, *ALL, "--move-aside"), 1, taken, left=before)
    assert all("/%s.before-ctrl-exec" % path in said for path in (OLDER[0], OLDER[2]))
    assert snapshot(taken) == before


def test_all_places_that_cannot_be_written_are_named_at_once(tmp_path):
    for path in ("etc", "var/lib"):
        put(tmp_path / path, "no directory\n", 0o644)
    said = refused(install(tmp_path, *BOTH), 1, tmp_path, left=["etc", "var/lib"])
    assert all(str(tmp_path / path) in said for path in ("etc", "var/lib"))


# --- as an ordinary user ----------------------------------------------------------------------------------


@pytest.fixture
def ordinary(tmp_path):
    """Environment in which install.sh is run by an ordinary user; root is told so by a false `id`."""
    env = {"DESTDIR": None}
    if support.IS_ROOT:
        env["PATH"] = fake_path(
            tmp_path / "fake", id="echo 1000", chown="exit 9", useradd="exit 9", groupadd="exit 9"
        )
    return env


def test_an_ordinary_user_gets_the_program_alone_in_a_prefix_of_his_own(tmp_path, ordinary):
    prefix = tmp_path / "local"
    done = succeed("", *BOTH, "--prefix", str(prefix), env=ordinary)
    moved = {
        path[len("usr/local/") :]: value
        for path, value in {**PROGRAM_FILES, **DISPATCHER_LINKS, **AGENT_LINKS}.items()
    }
    assert files_of(prefix) == moved
    assert "Only the program is installed" in done.stdout
    succeed("", "--uninstall", "--prefix", str(prefix), env=ordinary)
    assert files_of(prefix) == {}


def test_an_unwritable_prefix_is_refused_in_one_sentence(tmp_path, ordinary):
    put(tmp_path / "file", "no directory")
    done = install("", "--agent", "--prefix", str(tmp_path / "file" / "deep"), env=ordinary)
    assert "run this as root, or with --prefix DIR or DESTDIR" in refused(done, 1, tmp_path / "file")


def test_what_a_user_installed_sets_up_a_control_host_below_a_root(tmp_path, ordinary):
    prefix, root = tmp_path / "local", tmp_path / "root"
    succeed("", "--dispatcher", "--prefix", str(prefix), env=ordinary)
    for words in (["setup-ca"], ["setup-ctrl-exec"], ["check"], ["list-agents", "--json"]):
        done = run_program([str(prefix / "bin" / "ced"), "--root", str(root), *words])
        assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["agents"] == []
    assert os.path.exists(str(root / "etc/ctrl-exec/ca.key"))


# --- what is installed works ------------------------------------------------------------------------------


def run_program(argv, env=None, cwd=None):
    environment = {"PATH": ctrl_exec.SAFE_PATH, "LC_ALL": "C", **(env or {})}
    return subprocess.run(argv, env=environment, cwd=cwd, capture_output=True, text=True, timeout=60)


def run_launcher(stage, link, *words, python_options=(), **how):
    """Run an installed command by its interpreter, as its first line does, with more options for that."""
    path = os.path.join(str(stage), BIN, link)
    return run_program([sys.executable, "-I", *python_options, path, *words], **how)


def test_the_installed_file_is_the_one_of_the_checkout(staged):
    done = run_program([str(staged / BIN / "ced"), "--version"])
    with open(support.PROGRAM, "rb") as file:
        digest = hashlib.sha256(file.read()).hexdigest()[:12]
    assert "(file %s, Python %d.%d.%d," % ((digest,) + sys.version_info[:3]) in done.stdout


@pytest.mark.parametrize(
    "link, verb",
    [(os.path.basename(link), "setup-ca") for link in DISPATCHER_LINKS]
    + [(os.path.basename(link), "self-check") for link in AGENT_LINKS],
)
def test_each_name_is_its_role(staged, link, verb):
    done = run_program([str(staged / BIN / link), "--help"])
    assert done.returncode == 0 and re.search(r"(?m)^  %s " % verb, done.stdout)


def test_the_launcher_serves_what_needs_no_role(staged):
    done = run_program([str(staged / LIB / "launch"), "conf-example", "agent"])
    assert (done.returncode, done.stdout) == (0, ctrl_exec.render_example("agent") + "\n")


def test_exit_statuses_come_through_the_launcher(staged):
    assert run_program([str(staged / BIN / "ced"), "no-such-verb"]).returncode == ctrl_exec.EXIT_USAGE


def test_the_first_line_names_one_interpreter_by_its_path_in_isolated_mode(staged):
    line = read(staged, LIB, "launch").splitlines()[0]
    assert re.fullmatch(r"#!/\S+ -IS", line)
    version = subprocess.run(
        [line[2:-4], "-c", "import sys; print(sys.version)"], capture_output=True, text=True, timeout=60
    )
    assert version.stdout.strip() == sys.version.strip()


def test_the_compiled_program_is_used_and_not_compiled_again(staged):
    cache = str(staged / LIB / "__pycache__" / PYC)
    before = os.stat(cache)
    done = run_launcher(staged, "ced", "--version", python_options=["-v"])
    assert "code object from " + repr(cache) in done.stderr
    assert "wrote " + repr(cache) not in done.stderr
    after = os.stat(cache)
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_the_launcher_takes_no_module_from_the_working_directory_or_the_environment(staged, tmp_path):
    for name in ("json", "ssl", "os", "ctrl_exec", "sitecustomize", "usercustomize"):
        put(tmp_path / (name + ".py"), "print('taken over')\nraise SystemExit(99)\n", 0o644)
    env = {"PYTHONPATH": str(tmp_path), "PYTHONSTARTUP": str(tmp_path / "os.py"), "HOME": str(tmp_path)}
    done = run_program([str(staged / BIN / "ced"), "--version"], env=env, cwd=str(tmp_path))
    assert done.returncode == 0 and done.stdout.startswith("ctrl-exec ") and "taken over" not in done.stdout


# --- services -------------------------------------------------------------------------------------------


def parse_unit(*parts):
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str
    unit.read_string(read(*parts))
    return unit


STOP_POST = (
    "-%s/bin/sh -c '[ \"$$EXIT_STATUS\" != 78 ]"
    " || exec systemctl --no-block --job-mode=ignore-dependencies stop %s.socket'"
)


def test_the_unit_lets_scripts_outlive_a_restart_and_does_not_confine_them(staged):
    unit = parse_unit(staged, UNIT)
    service = dict(unit["Service"])
    assert service == {
        "Type": "notify",
        "NotifyAccess": "main",
        "ExecStart": "/usr/local/bin/cea serve",
        "ExecReload": "/usr/local/bin/cea reload",
        "KillMode": "process",
        "Delegate": "yes",
        "OOMPolicy": "continue",
        "Restart": "always",
        "RestartSec": "2",
        "RestartPreventExitStatus": str(ctrl_exec.EXIT_CONFIG),
        "ExecStopPost": STOP_POST % ("", "ctrl-exec-agent"),
    }
    assert unit["Install"]["WantedBy"] == "multi-user.target"
    assert os.path.lexists(str(staged / service["ExecStart"].split()[0].lstrip("/")))


@pytest.mark.parametrize(
    "role, path, port",
    [("--agent", UNIT, ["0.0.0.0:7443", "[::]:7443"]), ("--api", API_UNIT, ["127.0.0.1:7445"])],
)
def test_a_service_always_comes_back_and_its_port_is_never_free_meanwhile(tmp_path, role, path, port):
    succeed(tmp_path, role)
    name = os.path.basename(path)[: -len(".service")]
    unit = parse_unit(tmp_path, path)
    assert (unit["Service"]["Restart"], unit["Unit"]["StartLimitIntervalSec"]) == ("always", "0")
    # Wanted, so that it comes along with a service that was enabled without it, and does not keep it away.
    assert unit["Unit"]["Wants"].split() == unit["Unit"]["After"].split()
    assert name + ".socket" in unit["Unit"]["Wants"].split() and "Requires" not in unit["Unit"]
    assert unit["Unit"]["PartOf"] == unit["Install"]["Also"] == name + ".socket"
    assert unit["Service"]["ExecReload"] == unit["Service"]["ExecStart"].split()[0] + " reload"
    text = read(tmp_path, path.replace(".service", ".socket"))
    assert re.findall(r"(?m)^ListenStream=(.*)$", text) == port
    for line in ("BindIPv6Only=ipv6-only", "FreeBind=yes", "Accept=no", "FileDescriptorName=" + name):
        assert "\n%s\n" % line in text
    assert int(re.search(r"(?m)^Backlog=(\d+)$", text)[1]) >= 128
    assert "\n[Install]\nWantedBy=sockets.target\n" in text


@pytest.mark.parametrize("role, path", [("--agent", UNIT), ("--api", API_UNIT)])
@pytest.mark.parametrize("status", ["78", "1", "KILL"])
def test_the_port_is_closed_with_a_service_that_a_person_must_mend(tmp_path, role, path, status):
    """Else the next to connect would start it again, and so on."""
    succeed(tmp_path / "stage", role)
    command = parse_unit(tmp_path / "stage", path)["Service"]["ExecStopPost"]
    shell, text = re.fullmatch(r"-\+?(/bin/sh -c) '(.*)'", command).groups()
    env = {"PATH": fake_path(tmp_path / "fake", systemctl='echo "$*"'), "EXIT_STATUS": status}
    done = run_program([*shell.split(), text.replace("$$", "$")], env=env)
    name = os.path.basename(path).replace(".service", ".socket")
    stopped = "--no-block --job-mode=ignore-dependencies stop %s\n" % name
    assert (done.returncode, done.stdout) == (0, stopped if status == "78" else "")


@pytest.mark.parametrize(
    "settings, expected",
    [
        ("port = 9000", ["0.0.0.0:9000", "[::]:9000"]),
        ("bind = 10.0.0.1, ::1", ["10.0.0.1:7443", "[::1]:7443"]),
        ("port = 7\nbind = fe80::1%eth0", ["[fe80::1]:7%%eth0"]),
        ("port = 0", []),  # another one at each start
    ],
)
def test_the_socket_follows_the_configuration_when_this_is_run_again(tmp_path, settings, expected):
    succeed(tmp_path, "--agent")
    put(tmp_path / "etc/ctrl-exec-agent/agent.conf", settings + "\n", 0o640)
    succeed(tmp_path, "--agent")
    text = read(tmp_path, SOCKET) if os.path.exists(str(tmp_path / SOCKET)) else ""
    assert re.findall(r"(?m)^ListenStream=(.*)$", text) == expected
    assert bool(text) == bool(expected)


def test_the_socket_of_the_api_follows_its_own_settings(tmp_path):
    settings = "port = 1\napi_port = 9001\napi_bind = ::1\n"
    put(tmp_path / "etc/ctrl-exec/ctrl-exec.conf", settings, 0o640)
    succeed(tmp_path, "--api")
    assert re.findall(r"(?m)^ListenStream=(.*)$", read(tmp_path, API_SOCKET)) == ["[::1]:9001"]


def test_the_timer_has_certificates_looked_after_when_that_is_due(tmp_path):
    succeed(tmp_path, "--dispatcher")
    timer, service = parse_unit(tmp_path, TIMER), parse_unit(tmp_path, TIMER.replace(".timer", ".service"))
    assert service["Service"]["ExecStart"] == "/usr/local/bin/ced maintain --if-due"
    assert service["Service"]["Type"] == "oneshot"
    assert service["Service"]["TimeoutStartSec"] == "4h"  # a turn that hangs would be the last one
    assert (timer["Timer"]["OnCalendar"], timer["Install"]["WantedBy"]) == ("hourly", "timers.target")
    gone = succeed(tmp_path, "--uninstall", "--dispatcher")
    assert TIMER in gone.stdout and not [path for path in files_of(tmp_path) if "systemd" in path]


def test_the_unit_of_the_api_runs_it_as_its_user_and_confines_it(tmp_path):
    succeed(tmp_path, "--api")
    service = dict(parse_unit(tmp_path, API_UNIT)["Service"])
    assert service["ExecStart"] == "/usr/local/bin/ctrl-exec-api" and service["User"] == "ctrl-exec"
    assert service["RestartPreventExitStatus"] == str(ctrl_exec.EXIT_CONFIG)
    assert service["ExecStopPost"] == STOP_POST % ("+", "ctrl-exec-api")  # +: its user may stop nothing
    assert service["ProtectSystem"] == "strict" and service["NoNewPrivileges"] == "yes"
    assert service["ReadWritePaths"].split() == ["-/var/lib/ctrl-exec/locks", "-/var/lib/ctrl-exec/runs"]
    hidden = ["-/etc/ctrl-exec/ca.key", "-/etc/ctrl-exec/ca.next.key", "-/var/lib/ctrl-exec/pairing-tokens"]
    assert service["InaccessiblePaths"].split() == hidden


def test_the_unit_of_the_api_follows_what_the_configuration_keeps_elsewhere(tmp_path):
    conf = "lock_dir = /srv/my locks\nruns_dir = /srv/100%\nca = /srv/pki/our.crt\n"
    put(tmp_path / "etc/ctrl-exec/ctrl-exec.conf", conf, 0o640)
    os.makedirs(str(tmp_path / "srv/100%"), mode=0o700)
    succeed(tmp_path, "--api")
    unit = parse_unit(tmp_path, API_UNIT)
    assert unit["Service"]["ReadWritePaths"] == '"-/srv/my locks" -/srv/100%%'
    assert unit["Service"]["InaccessiblePaths"].startswith("-/srv/pki/our.key -/srv/pki/our.next.key ")
    found = tree(tmp_path)
    assert found["srv/my locks"] == 0o2770  # made as the default would be
    assert found["srv/100%"] == 0o700  # somebody's own, left alone


@pytest.mark.parametrize(
    "role, path", [("--agent", "etc/ctrl-exec-agent/agent.conf"), ("--api", "etc/ctrl-exec/ctrl-exec.conf")]
)
def test_a_configuration_that_the_program_refuses_is_named_before_anything_is_changed(tmp_path, role, path):
    put(tmp_path / path, "\n\nport = many\n", 0o640)
    said = refused(install(tmp_path, role), 1, tmp_path, left=[path])
    assert "%s:3: `port` expects" % (tmp_path / path) in said


def test_the_openrc_script_is_sound_and_starts_the_same(tmp_path):
    env = {"PATH": fake_path(tmp_path / "fake", openrc_run="exit 1")}
    succeed(tmp_path / "stage", "--agent", env=env)
    path = str(tmp_path / "stage/etc/init.d/ctrl-exec-agent")
    show = 'RC_SVCNAME=x; . "$0"; echo "$command|$command_args|$command_background|$pidfile"; type reload >&2'
    done = subprocess.run(["sh", "-euc", show, path], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "/usr/local/bin/cea|serve|true|/run/x.pid\n")


# What OpenRC 0.45 does around such a script, with whatever is called start-stop-daemon.
OPENRC = """
RC_SVCNAME=ctrl-exec-agent
ebegin() { :; }
eend() { status=$1; shift; [ "$status" = 0 ] || echo "$*" >&2; return "$status"; }
ewarn() { echo "$*" >&2; }
eerror() { echo "$*" >&2; }
service_started() { [ -e "$top/started" ]; }
default_start() {
    start-stop-daemon --start --exec "$command" --pidfile "$pidfile" --background --make-pidfile \
        -- $command_args
}
default_stop() { start-stop-daemon --stop --retry $retry --exec "$command" --pidfile "$pidfile"; }
default_status() { echo "as OpenRC says"; }
start() { default_start; }
stop() { default_stop; }
status() { default_status; }
top=$1 verb=$2
. "$0"
command=$top/bin/cea pidfile=$top/pid seconds_to_stop=1
"$verb"
"""
DAEMON = """#!%s -IS
import os, signal, sys, time
top = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
there = lambda name: os.path.exists(os.path.join(top, name))
if sys.argv[1] == "reload":
    sys.exit("cea: what is wrong" if there("wrong") else 0)
if there("wrong"):
    sys.exit(78)
if there("deaf"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
open(os.path.join(top, "up-%%d" %% os.getpid()), "w").close()
time.sleep(600)
"""


class OpenRC:
    """The rendered script with a program in the agent's place, which is a script of Python as well."""

    def __init__(self, top, shell, daemon):
        env = {"PATH": fake_path(top / "fake", openrc_run="exit 1")}
        succeed(top / "stage", "--agent", env=env)
        put(top / "bin/cea", DAEMON % sys.executable)
        self._argv = [*shell, "-uc", OPENRC, str(top / "stage/etc/init.d/ctrl-exec-agent"), str(top)]
        self._env = {"PATH": ctrl_exec.SAFE_PATH}
        if daemon == "busybox":
            os.symlink(shutil.which("busybox"), str(top / "fake/start-stop-daemon"))
            self._env["PATH"] = "%s:%s" % (top / "fake", ctrl_exec.SAFE_PATH)
        self._top = top

    def __call__(self, verb):
        done = run_program([*self._argv, verb], env={**self._env, "supervisor": ""})
        return done.returncode, (done.stdout + done.stderr).strip()

    def pid(self):
        """Of the process that was started, once it is up."""
        pid = int(read(self._top, "pid"))
        support.wait_until((self._top / ("up-%d" % pid)).exists, what="the program")
        return pid

    def mark(self, name, text=""):
        put(self._top / name, text)

    def unmark(self, name):
        os.unlink(str(self._top / name))

    def close(self):
        with contextlib.suppress(OSError):
            pid = int(read(self._top, "pid"))
            if str(self._top / "bin/cea") in read("/proc/%d/cmdline" % pid):
                os.kill(pid, signal.SIGKILL)


def _is_alive(pid):
    with contextlib.suppress(FileNotFoundError):
        return "\nState:\tZ" not in read("/proc/%d/status" % pid)
    return False


@pytest.fixture(
    params=[
        (["sh"], "dpkg"),
        (["busybox", "sh"], "busybox"),
    ],
    ids=lambda param: param[1],
)
def openrc(request, tmp_path):
    shell, daemon = request.param
    if not shutil.which("start-stop-daemon" if daemon == "dpkg" else "busybox"):
        pytest.skip("needs %s's start-stop-daemon" % daemon)
    with contextlib.closing(OpenRC(tmp_path, shell, daemon)) as one:
        yield one


def test_openrc_starts_restarts_and_stops_whatever_start_stop_daemon_is(openrc):
    assert openrc("start") == (0, "")
    first = openrc.pid()
    assert openrc("stop") == (0, "") and not _is_alive(first)
    assert openrc("stop") == (0, "")
    assert openrc("start") == (0, "")
    second = openrc.pid()
    status, said = openrc("start")  # OpenRC has forgotten that it runs
    assert (status, openrc.pid()) == (0, second) and "runs already, as process %d" % second in said
    openrc.mark("started")
    assert openrc("status") == (0, "as OpenRC says")
    os.kill(second, signal.SIGKILL)
    support.wait_until(lambda: not _is_alive(second), what="its end")
    assert openrc("status") == (32, "status: crashed")
    assert openrc("stop") == (0, "")


def test_openrc_reloads_by_the_program_itself_and_fails_when_that_fails(openrc):
    assert openrc("start") == (0, "")
    pid = openrc.pid()
    assert openrc("reload") == (0, "")
    openrc.mark("wrong")
    status, said = openrc("reload")
    assert status == 1 and "cea: what is wrong" in said and "goes on with the configuration from before" in said
    assert _is_alive(pid)


def test_openrc_says_so_when_the_program_ends_at_once(openrc):
    openrc.mark("wrong")
    status, said = openrc("start")
    assert status == 1 and "ended at once; this says why: /usr/local/bin/cea self-check" in said
    openrc.unmark("wrong")
    assert openrc("start") == (0, "")


def test_openrc_kills_what_does_not_end_by_itself(openrc):
    openrc.mark("deaf")
    assert openrc("start") == (0, "")
    pid = openrc.pid()
    assert openrc("stop") == (0, "") and not _is_alive(pid)


def test_openrc_does_not_end_a_process_that_has_got_the_number_of_ours(openrc):
    with subprocess.Popen(["sleep", "60"]) as other:
        openrc.mark("pid", "%d\n" % other.pid)
        assert openrc("stop") == (0, "")
        assert other.poll() is None
        other.kill()


# --- the tests' own start ---------------------------------------------------------------------------------


@pytest.fixture
def small_checkout(tmp_path):
    top = tmp_path / "checkout"
    put(top / "install.sh", read(SCRIPT))
    put(
        top / "tests/test_small.py",
        "def test_good():\n    pass\n\n\ndef test_bad():\n    assert False\n",
        0o644,
    )
    return top


@pytest.mark.parametrize(
    "arguments, status, counted",
    [
        ((), 1, "1 failed, 1 passed"),
        (("-k", "good"), 0, "1 passed, 1 deselected"),
        (("tests/test_small.py::test_good",), 0, "1 passed"),
        (("-k", "neither"), 5, "2 deselected"),
    ],
)
def test_run_tests_passes_arguments_on_and_ends_as_pytest_does(
    small_checkout, tmp_path, arguments, status, counted
):
    env = {"DESTDIR": None, "PYTEST_ADDOPTS": None}
    done = install(
        "", "--run-tests", *arguments, script=small_checkout / "install.sh", env=env, cwd=str(tmp_path)
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert re.search(r"(?m)^=*\s*%s in " % re.escape(counted), done.stdout), done.stdout


def test_run_tests_without_a_usable_python_says_so(small_checkout, tmp_path):
    env = {"PYTHON": str(tmp_path / "no-python")}
    done = install("", "--run-tests", script=small_checkout / "install.sh", env=env)
    assert done.returncode == 1 and "Python 3.9" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="needs shellcheck")
def test_shellcheck_finds_nothing():
    scripts = [SCRIPT, os.path.join(REPOSITORY, ".ci", "run")]
    done = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "")


# --- a real installation ----------------------------------------------------------------------------------


def _can_mount():
    """Whether we may have a mount namespace of our own and mount in it."""
    if not support.IS_ROOT or not shutil.which("unshare") or not shutil.which("nsenter"):
        return False
    words = ["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"]
    return subprocess.run(words, capture_output=True, timeout=60).returncode == 0


class Machine:
    """This machine seen from a mount namespace where /etc is a copy and /var/lib, /run and /mnt are empty."""

    prefix = "/mnt/local"

    _SET_UP = """
        cp -a /etc "$1/etc"
        mount --bind "$1/etc" /etc
        for path in /var/lib /run /mnt; do mount -t tmpfs none $path; done
        chmod 755 /mnt
        echo ready
        exec cat
    """

    def __init__(self, top):
        words = ["unshare", "-m", "sh", "-euc", self._SET_UP, "sh", str(top)]
        self._holder = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._holder.stdout.readline() == b"ready\n"
        self._enter = ["nsenter", "--mount=/proc/%d/ns/mnt" % self._holder.pid]
        self._running = []

    def path(self, path):
        return "/proc/%d/root%s" % (self._holder.pid, path)

    def run(self, *argv):
        done = run_program([*self._enter, *argv])
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def installed(self, link, *words):
        return self.run(self.prefix + "/bin/" + link, *words)

    def spawn(self, link, *words):
        argv = [*self._enter, self.prefix + "/bin/" + link, *words]
        env = {"PATH": ctrl_exec.SAFE_PATH}
        process = subprocess.Popen(
            argv, env=env, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._running.append(process)
        return process

    def ids(self, path):
        """Names and numbers of /etc/passwd or /etc/group."""
        with open(self.path(path), encoding="utf-8") as file:
            return {line.split(":")[0]: int(line.split(":")[2]) for line in file}

    def access(self, path):
        """Mode, owner and group of a file, by name."""
        status = os.lstat(self.path(path))
        users = {number: name for name, number in self.ids("/etc/passwd").items()}
        groups = {number: name for name, number in self.ids("/etc/group").items()}
        return stat.S_IMODE(status.st_mode), users[status.st_uid], groups[status.st_gid]

    def close(self):
        for process in reversed(self._running):
            process.terminate()
            process.wait(30)
            process.stdin.close()
        self._holder.stdin.close()
        self._holder.wait(30)
        self._holder.stdout.close()


@pytest.fixture
def machine(tmp_path):
    with contextlib.closing(Machine(tmp_path)) as one:
        done = one.run("sh", SCRIPT, *BOTH, "--prefix", one.prefix)
        assert done.returncode == 0, done.stdout + done.stderr
        yield one


needs_mounts = pytest.mark.skipif(
    not _can_mount(), reason="needs root and a mount namespace to install for real"
)


@needs_mounts
def test_a_real_installation_makes_users_and_gives_each_directory_its_owner(machine):
    assert {path: machine.access("/" + path) for path in DIRECTORIES} == DIRECTORIES
    assert {path: machine.access("/" + path) for path in CONFIGURATION} == {
        path: (mode, "root", path.split("/")[1]) for path, mode in CONFIGURATION.items()
    }
    for user in ("ctrl-exec", "ctrl-exec-agent", "ctrl-exec-script"):
        with open(machine.path("/etc/passwd"), encoding="utf-8") as file:
            (fields,) = [line.strip().split(":") for line in file if line.startswith(user + ":")]
        assert int(fields[3]) == machine.ids("/etc/group")[user]
        assert int(fields[2]) != 0 and os.path.basename(fields[6]) in ("nologin", "false")
        assert not os.path.exists(machine.path(fields[5]))


@needs_mounts
def test_the_user_of_scripts_is_in_no_group_of_others_and_can_read_nothing_of_the_agents(machine):
    with open(machine.path("/etc/group"), encoding="utf-8") as file:
        assert not [line for line in file if "ctrl-exec-script" in line.strip().split(":")[3].split(",")]
    secret = "/etc/ctrl-exec-agent/agent.key"
    put(machine.path(secret), "secret", 0o640)
    os.chown(machine.path(secret), 0, machine.ids("/etc/group")["ctrl-exec-agent"])
    script = ["setpriv", "--reuid=ctrl-exec-script", "--regid=ctrl-exec-script", "--init-groups"]
    for path in (secret, "/etc/ctrl-exec-agent", "/var/lib/ctrl-exec-agent/runs", "/var/lib/ctrl-exec"):
        assert machine.run("test", "-r", path).returncode == 0
        assert machine.run(*script, "test", "-r", path).returncode == 1
    assert machine.run(*script, "true").returncode == 0


@needs_mounts
def test_a_second_real_installation_repairs_owners_and_keeps_users_and_configuration(machine):
    users, groups = machine.ids("/etc/passwd"), machine.ids("/etc/group")
    os.chown(machine.path("/var/lib/ctrl-exec/pairing"), 0, 0)
    os.chmod(machine.path("/etc/ctrl-exec-agent/agent.conf"), 0o600)
    done = machine.run("sh", SCRIPT, *BOTH, "--prefix", machine.prefix)
    assert (done.returncode, done.stderr) == (0, "")
    assert {path: machine.access("/" + path) for path in DIRECTORIES} == DIRECTORIES
    assert machine.access("/etc/ctrl-exec-agent/agent.conf")[0] == 0o600
    assert (machine.ids("/etc/passwd"), machine.ids("/etc/group")) == (users, groups)
    gone = machine.run("sh", SCRIPT, "--uninstall", "--prefix", machine.prefix)
    assert gone.returncode == 0
    assert "/var/lib/ctrl-exec-agent, the user ctrl-exec-agent, the user ctrl-exec-script\n" in gone.stdout
    assert "/var/lib/ctrl-exec, the user ctrl-exec\n" in gone.stdout
    assert machine.ids("/etc/passwd") == users
    assert not os.path.lexists(machine.path(machine.prefix + "/bin/cea"))


@needs_mounts
def test_a_real_installation_refuses_an_interpreter_that_only_root_may_read(machine, tmp_path):
    (tmp_path / "private").mkdir(mode=0o700)
    made = subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", "--copies", str(tmp_path / "private/venv")],
        capture_output=True, timeout=120,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    words = [
        "env",
        "PYTHON=%s/private/venv/bin/python" % tmp_path,
        "sh",
        SCRIPT,
        "--agent",
        "--prefix",
        "/mnt/other",
    ]
    done = machine.run(*words)
    assert done.returncode == 1 and "where every user can read it" in done.stderr
    assert not os.path.exists(machine.path("/mnt/other"))


@needs_mounts
def test_what_is_really_installed_pairs_and_answers_with_its_front_as_the_service_user(machine):
    agent_port, pairing_port = support.free_port(), support.free_port()
    settings = {
        "/etc/ctrl-exec/ctrl-exec.conf": "pairing_port = %d\n" % pairing_port,
        "/etc/ctrl-exec-agent/agent.conf": "port = %d\nbind = 127.0.0.1\n" % agent_port,
    }
    for path, text in settings.items():
        example = read(machine.path(path))
        put(machine.path(path), text + example, 0o640)
    assert machine.installed("cea", "serve").returncode == ctrl_exec.EXIT_CONFIG  # not paired yet
    for verb in ("setup-ca", "setup-ctrl-exec"):
        assert machine.installed("ced", verb).returncode == 0
    machine.spawn("ced", "pairing-mode")
    support.wait_for_port(pairing_port)
    dispatcher = "127.0.0.1:%d" % pairing_port
    asked = machine.installed(
        "cea", "request-pairing", "--dispatcher", dispatcher, "--name", "solo", "--background"
    )
    assert asked.returncode == 0, asked.stderr
    assert machine.installed("ced", "approve", asked.stdout.strip()).returncode == 0
    support.wait_until(
        lambda: "stored" in machine.installed("cea", "pairing-status").stdout, what="the certificate"
    )
    agent = machine.spawn("cea", "serve")
    support.wait_for_port(agent_port)
    ping = machine.installed("ced", "ping", "solo", "--json")
    assert ping.returncode == 0, ping.stdout + ping.stderr
    wanted = machine.ids("/etc/passwd")["ctrl-exec-agent"]

    def users():
        """Of its children at this moment; one may come or go while they are read."""
        with open("/proc/%d/task/%d/children" % (agent.pid, agent.pid), encoding="ascii") as file:
            children = file.read().split()
        try:
            statuses = [read("/proc/%s/status" % child) for child in children]
        except (FileNotFoundError, ProcessLookupError):
            return []
        return sorted(re.search(r"(?m)^Uid:\s+(\d+)\s+(\d+)\s+(\d+)\s", status).groups() for status in statuses)

    # The front, and the supervisor that waits for the next run, once those of the pings have gone.
    both = sorted([(str(wanted),) * 3, ("0",) * 3])
    support.wait_until(lambda: users() == both, what="the front and one supervisor")
    amiss = lambda *words: [  # noqa: E731
        line for line in machine.installed(*words).stdout.splitlines() if not line.startswith("OK ")
    ]
    assert amiss("ced", "check") == []
    (line,) = amiss("cea", "self-check")  # it was approved under a name of its own
    assert "agent.crt is for solo, and not for" in line


def _api_post(port, path, body):
    data = json.dumps(body).encode()
    head = "POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n" % path
    head += "Content-Length: %d\r\nConnection: close\r\n\r\n" % len(data)
    with socket.create_connection(("127.0.0.1", port), 30) as sock:
        sock.sendall(head.encode() + data)
        status, _, reply = support.read_reply(sock)
    return status, json.loads(reply)


@needs_mounts
def test_the_api_runs_as_its_user_with_the_key_and_without_the_ca(machine):
    port = support.free_port()
    path = "/etc/ctrl-exec/ctrl-exec.conf"
    put(machine.path(path), "api_port = %d\napi_auth_default = allow\n" % port + read(machine.path(path)), 0o640)
    for verb in ("setup-ca", "setup-ctrl-exec"):
        assert machine.installed("ced", verb).returncode == 0
    done = machine.run("sh", SCRIPT, "--dispatcher", "--prefix", machine.prefix)
    assert machine.access("/etc/ctrl-exec/dispatcher.key") == (0o600, "root", "root")
    assert not os.path.lexists(machine.path(machine.prefix + "/bin/ctrl-exec-api"))
    os.makedirs(machine.path(machine.prefix + "/x"))
    os.symlink("../lib/ctrl-exec/launch", machine.path(machine.prefix + "/x/ctrl-exec-api"))
    early = machine.run(machine.prefix + "/x/ctrl-exec-api")  # before the key is the group's
    assert early.returncode == ctrl_exec.EXIT_CONFIG
    assert "chgrp ctrl-exec /etc/ctrl-exec/dispatcher.key && chmod 640" in early.stderr
    link = machine.path("/var/lib/ctrl-exec/agents/link.json")
    os.symlink("/etc/ctrl-exec/ca.key", link)  # which must not become readable
    done = machine.run("sh", SCRIPT, "--api", "--prefix", machine.prefix)
    assert done.returncode == 0, done.stderr
    os.unlink(link)
    assert machine.access("/etc/ctrl-exec/dispatcher.key") == (0o640, "root", "ctrl-exec")
    assert machine.access("/etc/ctrl-exec/ca.key") == (0o600, "root", "root")
    done = machine.installed("ced", "check")  # which takes the key of that mode
    assert done.returncode == 0 and {line[:2] for line in done.stdout.splitlines()} == {"OK"}, done.stdout
    api = machine.spawn("ctrl-exec-api")
    support.wait_for_port(port)
    wanted = str(machine.ids("/etc/passwd")["ctrl-exec"])
    ids = re.compile(r"(?m)^Uid:\s+%s\s+%s\s+%s\s" % ((wanted,) * 3))  # it listens first: a port may be low
    support.wait_until(lambda: ids.search(read("/proc/%d/status" % api.pid)), what="another user")
    assert re.search(r"(?m)^CapEff:\s+(\S+)", read("/proc/%d/status" % api.pid))[1].strip("0") == ""
    agent = {"name": "gone", "ip": "127.0.0.1", "port": 1, "lookup_by": "ip"}
    put(machine.path("/var/lib/ctrl-exec/agents/gone.json"), json.dumps(agent), 0o644)
    status, body = _api_post(port, "/run", {"hosts": ["gone"], "script": "x"})
    assert status == 200 and body["results"][0]["state"] == "unreachable"
    record = "/var/lib/ctrl-exec/runs/%s.json" % body["reqid"]
    assert machine.access(record) == (0o640, "ctrl-exec", "ctrl-exec")
    mine = json.loads(machine.installed("ced", "run", "gone", "x", "--json").stdout)["reqid"]
    assert machine.access("/var/lib/ctrl-exec/runs/%s.json" % mine)[2] == "ctrl-exec"
    history = json.loads(machine.installed("ced", "history", "--json").stdout)["runs"]
    assert {run["reqid"] for run in history} == {mine, body["reqid"]}
    with socket.create_connection(("127.0.0.1", port), 30) as sock:
        sock.sendall(b"GET /status/%s HTTP/1.1\r\nHost: localhost\r\n\r\n" % mine.encode())
        assert support.read_reply(sock)[0] == 200


@needs_mounts
def test_the_api_may_read_the_key_that_the_configuration_names_and_what_is_kept_of_it(machine):
    conf = "/etc/ctrl-exec/ctrl-exec.conf"
    settings = "key = /etc/ctrl-exec/ctrl-exec.key\ncert = /etc/ctrl-exec/ctrl-exec.crt\n"
    settings += "registry_dir = /var/lib/registry\napi_auth_default = allow\n"
    put(machine.path(conf), settings + read(machine.path(conf)), 0o640)
    for verb in ("setup-ca", "setup-ctrl-exec"):
        assert machine.installed("ced", verb).returncode == 0
    kept = ["ctrl-exec.key", "ctrl-exec.next.key", "ctrl-exec.former-ab12.key"]
    others = ["ca.key", "ca.next.key", "other.key", "ctrl-exec.old.key"]
    for name in kept[1:] + others[1:]:
        put(machine.path("/etc/ctrl-exec/" + name), "secret", 0o600)
    put(machine.path("/etc/ctrl-exec/ctrl-exec.former-ab12.crt"), "a certificate", 0o644)
    put(machine.path("/var/lib/registry/web-01.json"), "{}", 0o600)
    assert "once `ced setup-ctrl-exec`" not in _install_api(machine)
    for name in kept:
        assert machine.access("/etc/ctrl-exec/" + name) == (0o640, "root", "ctrl-exec")
    for name in others:
        assert machine.access("/etc/ctrl-exec/" + name) == (0o600, "root", "root")
    assert machine.access("/var/lib/registry/web-01.json") == (0o640, "root", "ctrl-exec")
    said = machine.installed("ctrl-exec-api", "check").stdout
    for name in kept:
        assert "OK    private key /etc/ctrl-exec/%s\n" % name in said, said


def _install_api(machine):
    done = machine.run("sh", SCRIPT, "--api", "--prefix", machine.prefix)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_mounts
@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_systemd_finds_nothing_amiss_in_the_units(machine):
    _install_api(machine)
    names = [os.path.basename(path) for path in (UNIT, SOCKET, API_UNIT, API_SOCKET, *TIMER_FILES)]
    done = machine.run("systemd-analyze", "verify", "--man=no", *names)
    assert (done.returncode, [line for line in done.stderr.splitlines() if "ctrl-exec" in line]) == (0, [])


class Managed:
    """A machine with a service manager that notes what it is told."""

    def __init__(self, machine):
        self.machine = machine
        os.makedirs(machine.path("/run/systemd/system"))
        self.active = ()
        put(machine.path("/mnt/fake/systemctl"), "#!/bin/sh\necho \"$*\" >>/mnt/fake/told\n"
            'case $1 in is-active) grep -qxF "$3" /mnt/fake/active ;; esac\n')  # fmt: skip

    def install(self, *options, active=()):
        put(self.machine.path("/mnt/fake/active"), "".join(one + "\n" for one in active))
        put(self.machine.path("/mnt/fake/told"), "")
        path = "PATH=/mnt/fake:" + ctrl_exec.SAFE_PATH
        done = self.machine.run("env", path, "sh", SCRIPT, *options, "--prefix", self.machine.prefix)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def told(self):
        return read(self.machine.path("/mnt/fake/told")).splitlines()


@needs_mounts
def test_after_an_upgrade_or_another_port_this_says_what_must_be_restarted(machine):
    managed = Managed(machine)
    service, port = "ctrl-exec-agent.service", "ctrl-exec-agent.socket"
    os.unlink(machine.path("/" + SOCKET))  # as an installation without sockets has left it
    said = managed.install("--agent", active=[service])
    assert said.endswith("is the one from before: systemctl restart ctrl-exec-agent\n")
    assert "daemon-reload" in managed.told()
    put(machine.path("/etc/ctrl-exec-agent/agent.conf"), "port = 9000\n", 0o640)
    said = managed.install("--agent", active=[service, port])
    assert said.endswith("is the one from before: systemctl restart ctrl-exec-agent.socket\n")
    said = managed.install("--agent", active=[port])
    assert "from before" not in said


@needs_mounts
def test_uninstall_ends_the_service_and_gives_its_port_back(machine):
    managed = Managed(machine)
    managed.install("--uninstall", "--agent")
    assert managed.told() == [
        "disable --now ctrl-exec-agent.socket ctrl-exec-agent.service",
        "daemon-reload",
    ]
    os.unlink(machine.path("/" + TIMER))
    managed.install("--uninstall", "--dispatcher")
    assert managed.told() == ["disable --now ctrl-exec-maintain.service", "daemon-reload"]


# --- going back -----------------------------------------------------------------------------------------


def give_version(path, version):
    """Make an installed program one of another release."""
    with open(path, encoding="utf-8") as file:
        text = file.read()
    with open(path, "w", encoding="utf-8") as file:
        file.write(re.sub(r'(?m)^__version__ = ".*"$', '__version__ = "%s"' % version, text))


@pytest.mark.parametrize("path", ["ca.next.crt", "ca.next.key", "dispatcher.next.crt"])
def test_going_back_is_refused_while_certificates_are_being_replaced(tmp_path, path):
    succeed(tmp_path, "--dispatcher")
    program = str(tmp_path / "usr/local/lib/ctrl-exec/ctrl_exec.py")
    give_version(program, "99.0.10")
    waiting = tmp_path / "etc/ctrl-exec" / path
    waiting.write_text("")
    before = snapshot(tmp_path)
    done = install(tmp_path, "--dispatcher")
    assert done.returncode == 1 and "/etc/ctrl-exec/%s is there" % path in done.stderr
    assert "99.0.10" in done.stderr and "ced retire-ca" in done.stderr
    assert snapshot(tmp_path) == before
    waiting.unlink()
    done = succeed(tmp_path, "--dispatcher")
    assert "going back from 99.0.10 to %s" % ctrl_exec.__version__ in done.stdout
    assert ctrl_exec.__version__ in read(tmp_path, "usr/local/lib/ctrl-exec/ctrl_exec.py")


@pytest.mark.parametrize("version", ["0.9.9", "1.0.0", ctrl_exec.__version__])
def test_going_on_is_always_possible(tmp_path, version):
    succeed(tmp_path, "--dispatcher")
    give_version(str(tmp_path / "usr/local/lib/ctrl-exec/ctrl_exec.py"), version)
    (tmp_path / "etc/ctrl-exec/ca.next.crt").write_text("")
    assert "going back" not in succeed(tmp_path, "--dispatcher").stdout
