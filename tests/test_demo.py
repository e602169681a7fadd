"""The demonstration shows what it promises, as anybody, and leaves nothing behind."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile

import pytest
from support import IS_ROOT, PROGRAM, wait_until

import ctrl_exec

NOBODY = 65534
HOSTS = ("web-01", "web-02", "db-01")


def processes_of(directory):
    """Process ids whose command line has to do with `directory`."""
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        try:
            with open("/proc/%s/cmdline" % entry, "rb") as file:
                if directory.encode() in file.read():
                    found.append(int(entry))
        except OSError:
            continue
    return found


def environment(temporary):
    return {"PATH": ctrl_exec.SAFE_PATH, "LC_ALL": "C", "TMPDIR": str(temporary)}


def demo(temporary, *words, **how):
    """Start the demo with a temporary directory of its own."""
    argv = [how.pop("python", sys.executable), "-I", how.pop("program", PROGRAM), "demo", *words]
    return subprocess.Popen(
        argv,
        env=environment(temporary),
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        **how,
    )


def restore_interrupt():
    signal.signal(signal.SIGINT, signal.default_int_handler)


def check_story(out, top):
    """Everything the demo is there to show is in what it printed."""
    asked = dict(re.findall(r"^(\S+) \$ cea request-pairing [^\n]*\n  ([0-9a-f]+)$", out, re.MULTILINE))
    assert sorted(asked) == sorted(HOSTS), out
    codes = dict(
        re.findall(r"^  ([0-9a-f]{16})\n  pairing code: ([0-9]{3} [0-9]{3})$", out, re.MULTILINE)
    )
    assert sorted(codes) == sorted(asked.values())
    shown = re.search(r"^  %s  .*?([0-9]{3} [0-9]{3})" % asked["web-01"], out, re.MULTILINE)  # list-requests
    assert shown and shown[1] == codes[asked["web-01"]], out
    ping = out.partition("$ ced ping --all")[2].partition("$ ced")[0]
    assert re.findall(r"^  (\S+) +ok ", ping, re.MULTILINE) == sorted(HOSTS)
    assert len(re.findall(r"==> web-0[12]  \[OK  exit:0  ", out)) == 2
    echo = out.partition("echo-args -- ")[2]
    assert echo.startswith("'two words' '$(id) `id`' --force '' '*'\n")
    words = echo.partition("==> db-01  [OK  exit:0")[2].split("\n")[1:6]
    assert words == ["  [two words]", "  [$(id) `id`]", "  [--force]", "  []", "  [*]"]
    failing = out.partition("site=south fail")[2].partition("$ ced")[0]
    assert sorted(re.findall(r"==> (\S+)  \[FAIL  exit:3 ", failing)) == ["db-01", "web-02"]
    assert failing.count("the disk is on fire") == 2
    refused = out.partition("$ ced run web-01 reboot")[2]
    assert "==> web-01  [FAIL  exit:-1" in refused and "script not permitted" in refused
    assert top in out


def test_the_demo_shows_its_story_and_leaves_nothing(tmp_path):
    process = demo(tmp_path)
    out, err = (data.decode() for data in process.communicate(timeout=120))
    assert (process.returncode, err) == (0, ""), out + err
    check_story(out, str(tmp_path))
    assert out.rstrip().endswith("`--keep` leaves it running.")
    assert "\x1b" not in out
    assert os.listdir(str(tmp_path)) == []
    wait_until(lambda: not processes_of(str(tmp_path)), what="the end of every process of the demo")


@pytest.mark.skipif(
    not IS_ROOT, reason="only root can become another user; without root the other tests do this"
)
def test_the_demo_works_for_a_user_without_any_right():
    top = tempfile.mkdtemp(prefix="ctrl-exec-test-")
    try:
        os.chmod(top, 0o755)
        temporary = os.path.join(top, "tmp")
        os.mkdir(temporary)
        os.chown(temporary, NOBODY, NOBODY)
        program = shutil.copy(PROGRAM, top)
        os.chmod(program, 0o644)
        who = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
        process = demo(temporary, python=find_python(who), program=program, **who)
        out, err = (data.decode() for data in process.communicate(timeout=120))
        assert (process.returncode, err) == (0, ""), out + err
        check_story(out, temporary)
        assert os.listdir(temporary) == []
        wait_until(lambda: not processes_of(temporary), what="the end of every process of the demo")
    finally:
        shutil.rmtree(top)


def find_python(who):
    """An interpreter that this user can start: ours, or the system's when ours lies in root's home."""
    code = "import sys, hashlib, ssl; print(sys.version_info >= (3, 9))"
    for python in (sys.executable, "/usr/bin/python3"):
        try:
            done = subprocess.run([python, "-I", "-c", code], capture_output=True, cwd="/", **who)
        except OSError:
            continue
        if done.stdout == b"True\n":
            return python
    raise AssertionError("no Python 3.9 that this user can start")


def test_keep_leaves_it_running_and_prints_commands_that_work_and_end_it(tmp_path):
    process = demo(tmp_path, "--keep")
    out, err = (data.decode() for data in process.communicate(timeout=120))
    assert (process.returncode, err) == (0, ""), out + err
    alias = shlex.split(re.search(r"^  alias ced=(.*)$", out, re.MULTILINE)[1])[0]
    run = re.search(r"^  (ced run .*)$", out, re.MULTILINE)[1]
    end = re.search(r"^  (kill .*)$", out, re.MULTILINE)[1]
    assert processes_of(str(tmp_path))
    try:
        env = {"PATH": ctrl_exec.SAFE_PATH, "LC_ALL": "C"}
        command = run.replace("ced", alias, 1)
        done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, env=env, timeout=60)
        assert done.returncode == 0, done.stderr
        assert sorted(re.findall(r"^==> (\S+)  \[OK  exit:0 ", done.stdout.decode(), re.M)) == sorted(HOSTS)
        done = subprocess.run(["/bin/sh", "-c", end], capture_output=True, env=env, timeout=60)
        assert (done.returncode, done.stderr) == (0, b"")
        wait_until(lambda: not processes_of(str(tmp_path)), what="the end of every process of the demo")
        assert os.listdir(str(tmp_path)) == []
    finally:
        for pid in processes_of(str(tmp_path)):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    "number, moment",
    [
        (signal.SIGINT, "A deployment below"),
        (signal.SIGTERM, "Pairing:"),
        (signal.SIGINT, "$ ced approve"),
        (signal.SIGINT, "$ ced ping --all"),
    ],
)
def test_an_interrupt_in_the_middle_cleans_up(tmp_path, number, moment):
    process = demo(tmp_path, preexec_fn=restore_interrupt)
    out = ""
    while moment not in out:
        line = process.stdout.readline().decode()
        assert line, out + process.stderr.read().decode()
        out += line
    process.send_signal(number)
    rest, err = (data.decode() for data in process.communicate(timeout=120))
    assert process.returncode == 130, out + rest + err
    assert "Traceback" not in err and "internal error" not in err
    assert "$ ced run web-01 reboot" not in rest
    wait_until(lambda: not processes_of(str(tmp_path)), what="the end of every process of the demo")
    assert os.listdir(str(tmp_path)) == []


def in_namespace(shell, cwd="/"):
    """The demo in a mount namespace of its own, after some shell."""
    copy = "mount -t tmpfs none /srv\ncp %s /srv\n" % shlex.quote(PROGRAM)  # which may lie in /tmp
    argv = ["unshare", "--mount", "sh", "-ec", copy + shell + '\ncd %s\nexec "$@"' % cwd, "sh"]
    # not the one of a virtual environment, which may lie in /tmp as well
    python = getattr(sys, "_base_executable", None) or sys.executable
    argv += [python, "-I", "/srv/" + os.path.basename(PROGRAM), "demo"]
    env = {"PATH": ctrl_exec.SAFE_PATH, "LC_ALL": "C", "HOME": "/mnt"}
    return subprocess.run(argv, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(not IS_ROOT, reason="needs root: mounts")
def test_the_demo_finds_a_place_where_scripts_can_run():
    done = in_namespace("mount -t tmpfs -o noexec none /tmp\nmount -t tmpfs none /var/tmp")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    check_story(done.stdout, "/var/tmp/ctrl-exec-demo-")


@pytest.mark.skipif(not IS_ROOT, reason="needs root: mounts")
@pytest.mark.parametrize("option", ["noexec", "ro"])
def test_the_demo_stops_with_a_sentence_where_no_script_can_run(option):
    places = "\n".join("mount -t tmpfs -o %s none %s" % (option, at) for at in ("/tmp", "/var/tmp", "/mnt", "/run"))
    done = in_namespace(places, cwd="/proc")
    assert (done.returncode, done.stdout) == (1, "")
    assert "no directory was found in which scripts can run" in done.stderr and "TMPDIR" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_demo_stops_at_a_step_that_fails(tmp_path):
    program = tmp_path / "ctrl_exec.py"
    with open(PROGRAM, encoding="utf-8") as file:
        text = file.read()
    broken = text.replace("def cmd_list_requests(args: Any, config: Config) -> int:\n",
                            "def cmd_list_requests(args: Any, config: Config) -> int:\n    return 5\n")  # fmt: skip
    assert broken != text
    program.write_text(broken, encoding="utf-8")
    temporary = tmp_path / "t"
    temporary.mkdir()
    process = demo(temporary, program=str(program))
    out, err = (data.decode() for data in process.communicate(timeout=120))
    assert process.returncode == 1 and "`ced list-requests` ended with status 5, and 0 was expected" in err
    assert "$ ced approve" not in out and os.listdir(str(temporary)) == []
