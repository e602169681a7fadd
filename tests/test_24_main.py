"""Who we are by the name we are called, and the way from any ending to an exit status."""

import ast
import hashlib
import json
import os
import re
import subprocess
import sys

import pytest
from support import PROGRAM

import ctrl_exec

DISPATCHER_NAMES = ("ced", "ctrl-exec", "ctrl-exec-dispatcher")
AGENT_NAMES = ("cea", "ctrl-exec-agent")


def run_main(capfdbinary, *argv):
    """(exit status, output, what was said on standard error) of one command line in this process."""
    status = ctrl_exec.main(list(argv))
    out, err = capfdbinary.readouterr()
    assert type(status) is int
    return status, out.decode(), err.decode()


def verbs(role):
    return {command.name for command in ctrl_exec.COMMANDS if command.role == role}


def listed(usage):
    return set(re.findall(r"^  ([a-z][a-z-]+)  ", usage, re.MULTILINE))


# --- role -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DISPATCHER_NAMES + AGENT_NAMES)
def test_the_name_of_the_symlink_picks_the_role(tmp_path, name):
    link = tmp_path / name
    link.symlink_to(PROGRAM)
    done = subprocess.run([sys.executable, "-I", str(link), "--help"], capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
    usage = done.stdout.decode()
    assert usage.startswith("usage: %s " % name)
    assert listed(usage) == verbs("dispatcher" if name in DISPATCHER_NAMES else "agent")


@pytest.mark.parametrize("role", ["dispatcher", "agent"])
@pytest.mark.parametrize("name", ["ctrl_exec.py", "some-copy", "/usr/local/bin/ctrl_exec.py"])
def test_the_first_word_picks_the_role_under_any_other_name(capfdbinary, name, role):
    status, out, err = run_main(capfdbinary, name, role, "--help")
    assert (status, err) == (0, "")
    assert listed(out) == verbs(role)


def test_a_verb_of_the_other_role_is_unknown(capfdbinary):
    assert run_main(capfdbinary, "ced", "serve")[0] == 2
    assert run_main(capfdbinary, "cea", "run")[0] == 2
    assert run_main(capfdbinary, "cea", "dispatcher", "--help")[0] == 2


@pytest.mark.parametrize("words", [(), ("what",), ("serve",), ("demo", "--loud"), ("conf-example",), ("",)])
def test_under_an_unknown_name_without_a_role_it_says_what_there_is(capfdbinary, words):
    status, out, err = run_main(capfdbinary, "ctrl_exec.py", *words)
    assert (status, out) == (2, "")
    assert err.startswith("ctrl_exec.py: ")
    assert "ctrl_exec.py demo" in err and "ctrl_exec.py dispatcher" in err and "ctrl_exec.py agent" in err


@pytest.mark.parametrize("role", ["dispatcher", "agent"])
def test_the_example_configuration_of_each_role_is_printed(capfdbinary, role):
    status, out, err = run_main(capfdbinary, "ctrl_exec.py", "conf-example", role)
    assert (status, out, err) == (0, ctrl_exec.render_example(role) + "\n", "")


# --- version and help -----------------------------------------------------------------------------------

EVERYWHERE = [
    ("ctrl_exec.py",),
    ("ctrl_exec.py", "dispatcher"),
    ("ctrl_exec.py", "agent"),
    ("ctrl_exec.py", "demo"),
    ("ced",),
    ("cea",),
    ("ctrl-exec",),
    ("ced", "--verbose"),
    ("ced", "--root", "/nowhere"),
    ("ced", "--config", "/nowhere"),
    ("ced", "run"),
    ("ced", "list-agents", "--json"),
    ("cea", "serve"),
]


@pytest.mark.parametrize("argv", EVERYWHERE, ids=" ".join)
def test_version_works_everywhere_and_tells_this_copy_from_another(capfdbinary, argv):
    with open(PROGRAM, "rb") as file:
        digest = hashlib.sha256(file.read()).hexdigest()
    status, out, err = run_main(capfdbinary, *argv, "--version")
    assert (status, err) == (0, "")
    assert out.count("\n") == 1
    assert out.startswith("ctrl-exec %s (" % ctrl_exec.__version__)
    assert digest[:12] in out and digest[:14] not in out
    assert "Python %d.%d.%d" % sys.version_info[:3] in out and "OpenSSL" in out


@pytest.mark.parametrize("argv", EVERYWHERE, ids=" ".join)
def test_help_works_everywhere(capfdbinary, argv):
    status, out, err = run_main(capfdbinary, *argv, "--help")
    assert (status, err) == (0, "")
    assert out.startswith("usage: ")


def test_a_changed_copy_has_another_hash(tmp_path):
    with open(PROGRAM, "rb") as file:
        source = file.read()
    seen = set()
    for number, tail in enumerate((b"", b"# changed\n")):
        copy = tmp_path / ("copy-%d" % number)
        copy.write_bytes(source + tail)
        done = subprocess.run([sys.executable, "-I", str(copy), "--version"], capture_output=True, timeout=60)
        assert hashlib.sha256(source + tail).hexdigest()[:12].encode() in done.stdout
        seen.add(done.stdout)
    assert len(seen) == 2


# --- endings --------------------------------------------------------------------------------------------


@pytest.fixture
def failing(monkeypatch, tmp_path):
    """Make `ced list-agents` end with an exception: failing(exception) returns the command line."""

    def plan(error):
        def handler(args, config):
            raise error

        table = tuple(
            row._replace(handler=handler) if row.name == "list-agents" else row for row in ctrl_exec.COMMANDS
        )
        monkeypatch.setattr(ctrl_exec, "COMMANDS", table)
        return ("ced", "--root", str(tmp_path), "list-agents")

    return plan


@pytest.mark.parametrize(
    "error",
    [
        ZeroDivisionError("private detail"),
        KeyError("private detail"),
        OSError(5, "private detail"),
        RecursionError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_nobody_foresaw_is_70_one_sentence_and_a_trace_in_the_log_only(
    capfdbinary, failing, tmp_path, error
):
    status, out, err = run_main(capfdbinary, *failing(error))
    assert (status, out) == (70, "")
    assert err.count("\n") == 1 and err.startswith("ced: internal error (%s)" % type(error).__name__)
    assert "Traceback" not in err and "private detail" not in err
    log = (tmp_path / ctrl_exec.ROOT_LOG.lstrip("/")).read_text()
    lines = [line for line in log.splitlines() if "ACTION=bug " in line]
    assert len(lines) == 1
    assert type(error).__name__ in lines[0] and "in handler" in lines[0]
    assert ctrl_exec.__version__ in lines[0] and "OpenSSL" in lines[0]


def _subclasses(kind):
    for child in kind.__subclasses__():
        yield child
        yield from _subclasses(child)


def test_every_foreseen_failure_ends_with_its_own_status_and_its_message(capfdbinary, failing):
    for kind in _subclasses(ctrl_exec.CtrlExecError):
        if not kind.__module__.startswith("ctrl_exec"):
            continue
        error = kind({"a:b": ""}) if kind is ctrl_exec.Locked else kind("what went wrong\x1b[31m")
        error.hint = "what to do"
        status, out, err = run_main(capfdbinary, *failing(error))
        assert (status, out) == (kind.exit_code, "")
        message = "locked: a:b" if kind is ctrl_exec.Locked else "what went wrong\\x1b[31m"
        assert err == "ced: %s\n     what to do\n" % message


def test_with_json_a_foreseen_failure_is_an_object_too(capfdbinary, failing):
    status, out, err = run_main(capfdbinary, *failing(ctrl_exec.NotFound("no such thing", "look")), "--json")
    assert status == 1 and err
    assert json.loads(out) == {"ok": False, "error": "no such thing", "status": "not-found", "detail": "look"}


def test_an_interrupt_is_130_and_silent(capfdbinary, failing):
    assert run_main(capfdbinary, *failing(KeyboardInterrupt())) == (130, "", "")


@pytest.mark.parametrize(
    "argv",
    [
        ("",),
        ("ced", ""),
        ("ced", "--"),
        ("ced", "-"),
        ("ced", "--root"),
        ("ced", "--config"),
        ("ced", "run"),
        ("ced", "run", "--root"),
        ("ced", "run", "a", "b", "--port"),
        ("ced", "run", "--", "--help"),
        ("ced", "run", "a", "b", "--port", "x"),
        ("ced", "run", "a", "b", "--timeout", "-1"),
        ("ced", "approve"),
        ("ced", "approve", "a", "b"),
        ("ced", "list-agents", "--tags"),
        ("ced", "list-agents", "x"),
        ("ced", "edit-agent", "x", "--lookup-by", "guess"),
        ("ced", "\udcff"),
        ("ced", "list-agents", "\udcff"),
        ("ced", "pairing-token", "--uses", "many"),
        ("cea", "request-pairing"),
        ("cea", "request-pairing", "--dispatcher", "x", "--timeout", "601"),
        ("cea", "serve", "--bogus"),
        ("ctrl_exec.py", "dispatcher", "bogus"),
        ("\udcff",),
        ("ced", "--bogus", "list-agents"),
    ],
)
def test_a_command_line_that_makes_no_sense_is_2_and_never_a_system_exit(
    capfdbinary, monkeypatch, tmp_path, argv
):
    monkeypatch.setenv("CTRL_EXEC_ROOT", str(tmp_path))
    status, out, err = run_main(capfdbinary, *argv)
    assert (status, out) == (2, "")
    assert err and "Traceback" not in err
    assert "usage: " not in err or argv[0] not in ("ced", "cea")  # a sentence and a hint, no page of options
    assert os.listdir(str(tmp_path)) in ([], ["var"])  # nothing was written but the log


def test_started_as_a_program_the_status_is_the_processs(tmp_path):
    for words, status in ((("--version",), 0), (("bogus",), 2), (("demo", "bogus"), 2)):
        done = subprocess.run([sys.executable, "-I", PROGRAM, *words], capture_output=True, timeout=60)
        assert done.returncode == status


def test_nothing_happens_when_it_is_imported():
    code = "import sys; sys.path.insert(0, %r); import ctrl_exec, threading; print(threading.active_count())"
    argv = [sys.executable, "-c", code % os.path.dirname(PROGRAM)]
    done = subprocess.run(argv, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"1\n", b"")


# --- the oldest Python ----------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [(3, 8, 18), (3, 6, 0), (2, 7, 18)], ids=str)
def test_an_older_python_gets_one_sentence(version):
    code = (
        "import sys; sys.version_info = %r; source = open(%r, encoding='utf-8').read();"
        "exec(compile(source, 'ctrl_exec.py', 'exec'), {'__name__': '__main__'})"
    )
    argv = [sys.executable, "-I", "-c", code % ((*version, "final", 0), PROGRAM)]
    done = subprocess.run(argv, capture_output=True, timeout=60)
    sentence = "ctrl-exec needs Python 3.9 or newer; this is Python %d.%d\n" % version[:2]
    assert (done.returncode, done.stdout, done.stderr.decode()) == (1, b"", sentence)


def test_the_file_keeps_to_syntax_that_an_older_python_can_parse():
    with open(PROGRAM, encoding="utf-8") as file:
        source = file.read()
    tree = ast.parse(source, feature_version=(3, 6))
    first = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom, ast.If))][:2]
    assert isinstance(first[0], ast.Import) and [name.name for name in first[0].names] == ["sys"]
    assert isinstance(first[1], ast.If) and "version_info" in ast.dump(first[1].test)


def test_the_first_line_isolates_the_interpreter():
    with open(PROGRAM, encoding="utf-8") as file:
        assert file.readline() == "#!/usr/bin/python3 -IS\n"
