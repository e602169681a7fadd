"""Running a script: what it is given, what comes back, its record, its slot, and what outlives what."""

import base64
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading

import pytest

import ctrl_exec
import support
from support import IS_ROOT, wait_until

needs_root = pytest.mark.skipif(not IS_ROOT, reason="only root can mount a small disk")

_CONF = """\
rate_limit_disable = yes
max_output = 6M
"""

_POLLUTION = {
    "LD_PRELOAD": "",
    "BASH_ENV": "/nonexistent/bash-env",
    "ENV": "/nonexistent/env",
    "PYTHONPATH": "/nonexistent/python",
    "IFS": "x",
    "CTRL_EXEC_TOKEN": "secret",
    "ENVEXEC_TOKEN": "secret",
    "NOTIFY_SOCKET": "/nonexistent/notify",
    "CREDENTIALS_DIRECTORY": "/nonexistent",
    "LANG": "C.UTF-8",
    "TZ": "UTC",
}

_PYTHON_SCRIPTS = {
    "binary": "import os; os.write(1, bytes(range(256)) * 300); os.write(2, b'\\xff\\r\\n')",
    "big": "import os\nfor n in range(5): os.write(1, (b'%07d\\n' % n) * 131072)",
    "flood": "import os, sys\nfor n in range(int(sys.argv[1])): os.write(1, b'x' * 1048576)",
    "pipe": "import os, sys\nsys.stdout.write(open('/proc/self/status').read())",
    "edges": "import os; os.write(1, b'a\\xe2\\x82'); os.write(2, ('\\u20ac' * 60000).encode())",
    # waits until the other end is closed, and only then reads
    "asleep-on-stdin": """import select, sys
poller = select.poll()
poller.register(0, 0)
poller.poll()
print(len(sys.stdin.buffer.read()))
""",
    "raw-context": "import sys; sys.stdout.buffer.write(sys.stdin.buffer.read())",
}

_SHELL_SCRIPTS = {
    "die": 'kill -"$1" $$\nsleep 60\n',
    "stubborn": "trap '' TERM\necho before\nsleep 300 &\necho $!\nwhile :; do sleep 1; done\n",
    "obliging": "trap 'echo bye; exit 0' TERM\necho $$\nwhile :; do sleep 0.1; done\n",
    "quick-exit": "sleep 300 > /dev/null 2>&1 < /dev/null &\necho $!\nwait\n",
    "both": "echo out\necho err >&2\n",
    "background": "sleep 300 &\necho $!\n",
    "ignores-stdin": "exec <&-\necho done\n",
    "fds": "ls -l /proc/self/fd | awk 'NR > 1 { print $9 }'\n",
    "session": "cut -d' ' -f1,5,6 /proc/$$/stat\n",
    "place": "pwd\numask\n",
    "silent": "",
    "no-newline": "printf x\n",
    "lines": "printf 'a\\r\\nb\\033[31m\\000c\\n'\n",
    "gate": 'while [ ! -e "$1" ]; do sleep 0.02; done\necho through\n',
    "gate2": 'while [ ! -e "$1" ]; do sleep 0.02; done\necho through\n',
    "mark": 'echo x >> "$1"\n',
    "slow-mark": 'echo x >> "$1"\nsleep 0.5\necho marked\n',
    "filler": 'head -c "$1" /dev/zero\necho end >&2\n',
}


class Site:
    """One agent and the dispatcher that asks it."""

    def __init__(self, top, conf=_CONF, start=True):
        self.deployment = support.Deployment(top, ("solo",), start=False)
        self.control, self.host = self.deployment.control, self.deployment["solo"]
        self.host.configure(conf)
        self.host.config = ctrl_exec.load_config("agent", "", self.host.root)
        self.context = support.dispatcher_context(self.control)
        for name, body in _SHELL_SCRIPTS.items():
            self.host.script(name, body, "max_running=2" if name == "gate2" else "")
        for name, body in _PYTHON_SCRIPTS.items():
            self.host.script(name, body, interpreter=sys.executable)
        if start:
            self.host.start(env=_POLLUTION)

    def ask(self, script, *args, **fields):
        """(status, answer) of one POST /run."""
        body = dict({"script": script, "args": list(args), "reqid": ctrl_exec.new_id()}, **fields)
        return support.post(self.host.port, self.context, "/run", body)

    def run(self, script, *args, **fields):
        """The answer to a run; it has to be 200."""
        status, answer = self.ask(script, *args, **fields)
        assert status == 200, answer
        return answer

    def ced(self, script, *args, **how):
        """The host's entry of `ced run --json`."""
        _, shown = self.control.json("run", "solo", script, "--", *args, **how)
        assert shown["ok"] is True, shown
        return shown["results"][0]

    def result(self, reqid, query=""):
        """(status, answer) of one GET /result."""
        return support.post(self.host.port, self.context, "/result/" + reqid + query, b"", method="GET")

    def start(self, script, *args, **fields):
        """Ask in a thread; returns an object whose .wait() is (status, answer)."""
        return _Asked(self, script, args, fields)

    def hold(self, script, gate, **fields):
        """Start a gated script and wait until it runs: (what was asked, its request id)."""
        reqid = ctrl_exec.new_id()
        asked = self.start(script, str(gate), reqid=reqid, **fields)
        wait_until(lambda: self.pid(reqid), what="the run's process")
        return asked, reqid

    def wait_for_end(self, reqid):
        """Wait until a run holds nothing: its record says `done` a moment before its slot is free."""
        path = os.path.join(self.host.config.runs_dir, "control", reqid + ".out")
        wait_until(lambda: self.host.record(reqid)["status"] == "done", what="the record's end")
        wait_until(lambda: not ctrl_exec.is_claimed(path), what="the end of the claim")

    def overtime(self, script, words):
        """The answer to a run whose time is over when its script has said so many words. A host that is very
        busy may need more time until a script has begun."""
        for seconds in (1, 5, 25):
            answer = self.run(script, timeout=seconds)
            assert (answer["exit"], answer["timed_out"]) == (124, True)
            if len(answer["stdout"].split()) >= words:
                break
        return answer

    def pid(self, reqid):
        """The process of a run, once its record has it."""
        try:
            return self.host.record(reqid)["pid"]
        except FileNotFoundError:
            return 0


class _Asked:
    def __init__(self, site, script, args, fields):
        self._answer = None
        self._thread = threading.Thread(target=self._ask, args=(site, script, args, fields), daemon=True)
        self._thread.start()

    def _ask(self, site, script, args, fields):
        self._answer = site.ask(script, *args, **fields)

    def is_answered_within(self, seconds):
        self._thread.join(seconds)
        return self._answer is not None

    def wait(self):
        assert self.is_answered_within(60), "no answer"
        return self._answer


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    one = Site(tmp_path_factory.mktemp("jobs"))
    with one.deployment:
        yield one


def is_alive(pid):
    """Whether a process runs; a zombie does not."""
    try:
        with open("/proc/%d/stat" % pid, encoding="ascii") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# --- arguments ------------------------------------------------------------------------------------------

ARGUMENTS = [
    "two words", " lead and trail ", "a\tb", "'single'", '"double"', "back\\slash", "line\nfeed", "\n",
    "cr\rlf\r\n", "$(touch /tmp/x)", "`id`", "$HOME", "${IFS}", ";", "&", "|", "> /tmp/x", "*", "?", "[a-z]",
    "~", "!!", "#",
    "-", "-rf", "--", "--help", "--json", "-oProxyCommand=x", "", "%s%n", "\x01\x1b[31m\x7f", "\u00e4\u20ac",
    "\U0001f600\U0001f468\u200d\U0001f469", "\ufeff", "\u202eabc", "\u2028", "a" * 1000,
]  # fmt: skip


def test_arguments_arrive_byte_for_byte_over_the_wire(site):
    answer = site.run("args", *ARGUMENTS)
    assert answer["exit"] == 0
    assert answer["stdout"].split("\0")[:-1] == ARGUMENTS


def test_arguments_arrive_byte_for_byte_from_the_command_line(site):
    result = site.ced("args", *ARGUMENTS)
    assert result["exit"] == 0
    assert result["stdout"].split("\0")[:-1] == ARGUMENTS


def test_no_arguments_are_no_arguments(site):
    assert site.run("args")["stdout"] == "" and site.ced("args")["stdout"] == ""
    assert site.run("args", "")["stdout"] == "\0" and site.ced("args", "")["stdout"] == "\0"


def test_arguments_that_look_like_ours_stay_the_scripts(site):
    given = ["--", "--token", "x", "--", "-h", "--version", "--root", "/"]
    assert site.ced("args", *given)["stdout"].split("\0")[:-1] == given


def test_long_arguments_arrive_whole(site):
    given = ["\u00e4" * 50000, "y" * 100000, "z" * 131071]
    assert site.run("args", *given)["stdout"].split("\0")[:-1] == given
    assert site.ced("args", *given)["stdout"].split("\0")[:-1] == given


def test_five_thousand_arguments_arrive(site):
    given = ["a%d" % number for number in range(5000)]
    assert site.run("args", *given)["stdout"].split("\0")[:-1] == given


def test_an_argument_that_the_kernel_does_not_take_is_126_with_the_reason(site):
    answer = site.run("args", "x" * 131072)
    assert (answer["exit"], answer["stdout"]) == (126, "")
    assert "cannot execute" in answer["error"] and "Argument list too long" in answer["error"]


@pytest.mark.parametrize(
    "argument, words",
    [(b'"a\\u0000b"', "args[1]"), (b'"\\ud800"', "args[1]"), (b'"\\udc41x"', "args[1]"), (b'"\xff"', "JSON")],
)
def test_what_cannot_be_an_argument_is_refused_with_its_place(site, argument, words):
    body = b'{"script":"args","reqid":"%s","args":["ok",%s]}' % (ctrl_exec.new_id().encode(), argument)
    status, answer = support.post(site.host.port, site.context, "/run", body)
    assert status == 400 and words in answer["error"]


@pytest.mark.parametrize("args", ['"x"', "[1]", "[null]", '[["x"]]', "{}", "[true]", "7"])
def test_arguments_that_are_no_list_of_strings_are_refused(site, args):
    body = ('{"script":"args","reqid":"%s","args":%s}' % (ctrl_exec.new_id(), args)).encode()
    status, answer = support.post(site.host.port, site.context, "/run", body)
    assert (status, answer["field"]) == (400, "args")


def test_the_command_line_refuses_an_argument_that_is_not_utf8(site):
    done = site.control.run("run", "solo", "args", "--", b"a\xff")
    assert done.returncode == 2 and "argument 1 is not UTF-8" in done.err and done.out == ""


# --- exit status and signals ----------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 1, 3, 124, 126, 127, 255])
def test_the_exit_status_of_the_script_comes_back(site, code):
    answer = site.run("exit", str(code))
    assert answer["exit"] == code
    assert not {"signal", "timed_out", "error"} & set(answer)
    assert site.ced("exit", str(code))["exit"] == code


@pytest.mark.parametrize("name", ["TERM", "KILL", "SEGV", "PIPE", "HUP", "USR1"])
def test_a_script_that_a_signal_ends_is_126_with_its_name(site, name):
    for answer in (site.run("die", name), site.ced("die", name)):
        assert (answer["exit"], answer["signal"]) == (126, "SIG" + name)
        assert "timed_out" not in answer


@pytest.mark.parametrize("number", [35, 40, 64])
def test_a_script_that_a_realtime_signal_ends_is_126_and_done(site, number):
    reqid = ctrl_exec.new_id()
    status, answer = site.ask("die", str(number), reqid=reqid)
    assert status == 200, answer
    assert answer["exit"] == 126 and answer["signal"]
    assert site.host.record(reqid)["status"] == "done"


# --- time limits ----------------------------------------------------------------------------------------


def test_a_script_that_ignores_term_is_killed_with_its_group_and_keeps_its_output(site):
    answer = site.overtime("stubborn", 2)
    assert answer["signal"] == "SIGKILL"
    before, child = answer["stdout"].split()
    assert before == "before"
    wait_until(lambda: not is_alive(int(child)), what="the end of the script's child")


def test_a_script_may_tidy_up_on_term_and_has_still_timed_out(site):
    answer = site.overtime("obliging", 2)
    pid, *rest = answer["stdout"].split()
    assert rest == ["bye"]
    assert "signal" not in answer and not is_alive(int(pid))


def test_what_a_script_wrote_is_kept_however_late_its_end_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(ctrl_exec, "OUTPUT_GRACE_SECONDS", 0)
    words = ["/bin/sh", "-c", "echo out; echo err >&2"]
    pipe = subprocess.PIPE
    child = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    ends = (child.stdin, child.stdout, child.stderr)
    started = ctrl_exec._Started(child.pid, *(os.dup(end.fileno()) for end in ends))
    spools = tuple(
        ctrl_exec._Spool(os.open(tmp_path / name, os.O_WRONLY | os.O_CREAT), 1000) for name in ("out", "err")
    )
    handlers = {number: signal.getsignal(number) for number in (signal.SIGCHLD, signal.SIGUSR1)}
    try:
        watch = ctrl_exec._Watch(started, b"", spools, 60, 0, None, list)
        watch.run()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
        child.communicate()
        for spool in spools:
            spool.close()
    assert watch.wait_status == 0
    assert [(tmp_path / name).read_text() for name in ("out", "err")] == ["out\n", "err\n"]


def test_children_of_a_script_that_timed_out_end_with_it(site):
    result = site.overtime("quick-exit", 1)
    assert result["signal"] == "SIGTERM"
    wait_until(lambda: not is_alive(int(result["stdout"])), what="the end of the script's child")


def test_ced_says_that_the_time_limit_ended_a_script(site):
    done = site.control.run("run", "--timeout", "1", "solo", "sleep", "--", "60")
    assert done.returncode == 1 and "exit:124" in done.out and "time limit" in done.out


def test_the_most_specific_limit_counts_and_a_caller_can_only_shorten_it():
    def limit(asked, script, profile, agent):
        rules = ctrl_exec.JobRules(
            {}, (), True, ctrl_exec.RunStore("", None, 3600), "", frozenset(), "h", 0, 1, agent
        )  # fmt: skip
        settings = ctrl_exec.Profile("p", **dict(ctrl_exec.complete_profile({}), timeout=profile))
        return ctrl_exec._time_limit(rules, ctrl_exec.Script("s", "/x", settings, script, 1), asked)

    assert limit(0, 0, 0, 0) == 0
    assert limit(9, 0, 0, 0) == 9
    assert [limit(0, 5, 6, 7), limit(0, 0, 6, 7), limit(0, 0, 0, 7), limit(0, 9, 6, 7)] == [5, 6, 7, 9]
    assert [limit(3, 5, 0, 0), limit(8, 5, 0, 0), limit(8, 0, 6, 0), limit(8, 0, 0, 7)] == [3, 5, 6, 7]


def test_a_callers_longer_timeout_does_not_lengthen_the_scripts(site):
    site.host.script("limited", "sleep 60\n", "timeout=1")
    assert "RESULT=ok" in site.host.reload()
    assert site.run("limited", timeout=50)["exit"] == 124


@pytest.mark.parametrize("timeout", [-1, 1.5, "5", True, 10**10, [1]])
def test_a_timeout_that_is_no_whole_number_is_refused(site, timeout):
    status, answer = site.ask("hello", timeout=timeout)
    assert (status, answer["field"]) == (400, "timeout")


# --- output ---------------------------------------------------------------------------------------------


def test_both_streams_come_apart(site):
    for answer in (site.run("both"), site.ced("both")):
        assert (answer["exit"], answer["stdout"], answer["stderr"]) == (0, "out\n", "err\n")


def test_output_is_as_it_was_written(site):
    assert site.run("silent")["stdout"] == ""
    assert site.run("no-newline")["stdout"] == "x"
    assert site.run("lines")["stdout"] == site.ced("lines")["stdout"] == "a\r\nb\x1b[31m\x00c\n"


def test_five_megabytes_arrive_exactly(site):
    whole = "".join(("%07d\n" % number) * 131072 for number in range(5))
    for answer in (site.run("big"), site.ced("big")):
        assert answer["exit"] == 0 and answer["stdout"] == whole
        assert not {"stdout_truncated", "stdout_base64"} & set(answer)


def test_binary_output_is_replaced_in_text_and_exact_beside_it(site):
    exact = bytes(range(256)) * 300
    for answer in (site.run("binary"), site.ced("binary")):
        assert base64.b64decode(answer["stdout_base64"], validate=True) == exact
        assert answer["stdout"] == exact.decode("utf-8", "replace")
        assert base64.b64decode(answer["stderr_base64"]) == b"\xff\r\n" and answer["stderr"] == "\ufffd\r\n"


def test_without_json_ced_writes_the_exact_bytes(site):
    done = site.control.run("run", "solo", "binary")
    head, _, body = done.stdout.partition(b"\n")
    assert head.startswith(b"==> solo  [OK  exit:0")
    assert body == bytes(range(256)) * 300 + b"\n" + b"\xff\r\n"


def test_a_character_cut_off_at_the_end_and_one_across_pieces_are_told_apart(site):
    answer = site.run("edges")
    assert answer["stdout"] == "a\ufffd" and base64.b64decode(answer["stdout_base64"]) == b"a\xe2\x82"
    assert answer["stderr"] == "\u20ac" * 60000 and "stderr_base64" not in answer


def test_output_beyond_the_bound_is_dropped_counted_and_never_held_in_memory(site):
    megabyte = 1024 * 1024
    reqid = ctrl_exec.new_id()
    asked = site.start("flood", "200", reqid=reqid)
    peaks = []

    def finished():
        for pid in site.host.children():
            try:
                with open("/proc/%d/status" % pid, encoding="ascii") as file:
                    peaks.extend(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
            except OSError:
                pass
        return not asked._thread.is_alive()

    wait_until(finished, what="the flood's end")
    status, answer = asked.wait()
    assert (status, answer["exit"], answer["stdout_truncated"]) == (200, 0, 194 * megabyte)
    assert answer["stdout"] == "x" * (6 * megabyte)
    assert peaks and max(peaks) < 150 * 1024  # KiB, with an interpreter in it
    directory = os.path.join(site.host.config.runs_dir, "control")
    assert os.path.getsize(os.path.join(directory, reqid + ".out")) == 6 * megabyte


def test_ced_says_how_much_was_dropped(site):
    done = site.control.run("run", "solo", "flood", "--", "7")
    assert done.returncode == 0
    assert b"1048576 bytes of stdout were dropped" in done.stdout[:400]
    assert site.ced("flood", "7")["stdout_truncated"] == 1048576


def test_a_background_child_that_keeps_the_pipe_does_not_keep_the_run(site):
    answer = site.run("background")
    child = int(answer["stdout"])
    try:
        assert answer["exit"] == 0 and is_alive(child)
    finally:
        os.kill(child, signal.SIGKILL)


# --- what a script is given -----------------------------------------------------------------------------

LARGE = ["x" * 90000] * 10  # a context of 900 KB on stdin


def test_a_script_that_closes_stdin_is_not_held_up(site):
    answer = site.run("ignores-stdin", *LARGE)
    assert (answer["exit"], answer["stdout"]) == (0, "done\n")


def test_a_script_that_never_reads_a_large_stdin_runs_to_its_end(site):
    answer = site.run("hello", *LARGE)
    assert (answer["exit"], answer["stdout"]) == (0, "hello\n")


def test_stdin_is_closed_when_its_time_is_over_and_that_is_logged(site):
    reqid = ctrl_exec.new_id()
    site.host.configure(_CONF + "stdin_timeout = 3\n")
    try:
        assert "RESULT=ok" in site.host.reload()
        answer = site.run("asleep-on-stdin", *LARGE, reqid=reqid)
    finally:
        site.host.configure(_CONF)
        assert "RESULT=ok" in site.host.reload()
    assert answer["exit"] == 0 and 0 < int(answer["stdout"]) < 900000
    assert [line for line in site.host.events("stdin-timeout") if "REQID=" + reqid in line]


def test_a_script_that_reads_its_large_stdin_gets_all_of_it(site):
    answer = site.run("raw-context", *LARGE)
    assert json.loads(answer["stdout"])["args"] == LARGE


def test_the_request_is_on_stdin_as_json(site):
    reqid = ctrl_exec.new_id()
    answer = site.run("context", "a b", "\u20ac\n", reqid=reqid, username="ann", token="t0ken")
    context = json.loads(answer["stdout"])
    assert context.pop("timestamp") == answer["started"]
    assert context == {
        "script": "context", "args": ["a b", "\u20ac\n"], "reqid": reqid, "peer_ip": "127.0.0.1",
        "username": "ann", "token": "t0ken", "dispatcher": "control",
    }  # fmt: skip


def test_the_environment_is_exactly_the_documented_one(site):
    reqid = ctrl_exec.new_id()
    answer = site.run("env", reqid=reqid)
    found = dict(line.split("=", 1) for line in answer["stdout"].splitlines())
    for name in ("PWD", "OLDPWD", "SHLVL", "_"):  # a shell's own
        found.pop(name, None)
    import pwd

    entry = pwd.getpwuid(os.geteuid())
    assert found == {
        "PATH": ctrl_exec.SAFE_PATH, "HOME": entry.pw_dir, "USER": entry.pw_name, "SHELL": entry.pw_shell,
        "LANG": "C.UTF-8", "TZ": "UTC", "CTRL_EXEC_REQID": reqid, "CTRL_EXEC_SCRIPT": "env",
        "CTRL_EXEC_DISPATCHER": "control",
        "CTRL_EXEC_HOST": "solo",
    }  # fmt: skip


def test_only_the_three_standard_descriptors_are_open(site):
    shown = site.run("fds")["stdout"].split()
    assert sorted(shown) == ["0", "1", "2", "3"]  # 3 is the directory that ls itself reads


def test_every_signal_has_its_default_and_none_is_blocked(site):
    status = dict(line.split(":\t", 1) for line in site.run("pipe")["stdout"].splitlines())
    assert status["SigBlk"] == "0" * 16
    assert int(status["SigIgn"], 16) & ~(1 << 12 | 1 << 24) == 0  # but for two that Python itself sets


def test_a_closed_pipe_ends_a_shell_pipeline_quietly(site):
    site.host.script("pipeline", "yes | head -n 1\n")
    assert "RESULT=ok" in site.host.reload()
    answer = site.run("pipeline")
    assert (answer["exit"], answer["stdout"], answer["stderr"]) == (0, "y\n", "")


def test_a_script_leads_a_session_and_group_of_its_own(site):
    reqid = ctrl_exec.new_id()
    pid, group, session = site.run("session", reqid=reqid)["stdout"].split()
    assert pid == group == session == str(site.host.record(reqid)["pid"])


def test_a_script_begins_in_the_root_directory_with_a_plain_umask(site):
    assert site.run("place")["stdout"].split() == ["/", "0022"]


# --- the record -----------------------------------------------------------------------------------------


def test_a_run_leaves_a_record_without_arguments_or_token(site):
    reqid = ctrl_exec.new_id()
    answer = site.run("both", "argument-canary", reqid=reqid, username="ann", token="token-canary")
    directory = os.path.join(site.host.config.runs_dir, "control")
    record = site.host.record(reqid)
    assert record.pop("pid") > 0 and record.pop("supervisor") > 0
    assert record.pop("birth") and record.pop("supervisor_birth")
    assert record == {
        "reqid": reqid, "owner": "control", "script": "both", "host": "solo", "username": "ann",
        "peer_ip": "127.0.0.1", "status": "done", "started": answer["started"],
        "finished": answer["finished"], "exit": 0, "signal": "", "timed_out": False,
        "cancelled": False, "interrupted": False, "stdout_truncated": 0, "stderr_truncated": 0, "error": "",
    }  # fmt: skip
    for suffix in (".json", ".out", ".err"):
        path = os.path.join(directory, reqid + suffix)
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o640
        with open(path, encoding="utf-8") as file:
            assert "canary" not in file.read()
    assert stat.S_IMODE(os.stat(directory).st_mode) == 0o750
    assert [name for name in os.listdir(directory) if name.startswith(".tmp")] == []
    assert "canary" not in site.host.log()


def test_what_the_agent_makes_is_never_writable_by_others_whatever_its_umask(fresh):
    deployment = fresh("solo", start=False)
    host = deployment["solo"]
    command = ["/bin/sh", "-c", 'umask 000; exec "$@"', "sh", *host.argv("serve")]
    host.process = subprocess.Popen(
        command, env=host.environment(), start_new_session=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    wait_until(host.is_up, what="the agent's port")
    assert deployment.control.json("run", "solo", "hello")[0] == 0
    # the run's process makes something after its answer, too
    swept = os.path.join(host.config.runs_dir, ".swept")
    wait_until(lambda: os.path.exists(swept), what="the mark of the first sweep")
    state = host.file(ctrl_exec.AGENT_VAR)
    loose = []
    for top, directories, files in os.walk(state):
        for path in [os.path.join(top, name) for name in directories + files]:
            if stat.S_IMODE(os.lstat(path).st_mode) & 0o022:
                loose.append(path)
    assert loose == []
    assert stat.S_IMODE(os.stat(state).st_mode) & 0o022 == 0


def test_an_agent_that_was_started_without_standard_descriptors_runs_scripts_properly(fresh):
    deployment = fresh("solo", start=False)
    host = deployment["solo"]
    host.script("fds", _SHELL_SCRIPTS["fds"])
    command = ["/bin/sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *host.argv("serve")]
    host.process = subprocess.Popen(
        command, env=host.environment(), start_new_session=True, stdout=subprocess.PIPE
    )
    wait_until(host.is_up, what="the agent's port")
    status, shown = deployment.control.json("run", "solo", "fds")
    assert status == 0, shown
    assert sorted(shown["results"][0]["stdout"].split()) == ["0", "1", "2", "3"]
    for _ in range(2):
        assert deployment.control.json("run", "solo", "args", "--", "x")[1]["results"][0]["stdout"] == "x\0"
    assert json.loads(deployment.control.json("run", "solo", "context")[1]["results"][0]["stdout"])


def test_the_same_request_again_gives_the_first_result_and_runs_once(site, tmp_path):
    mark, reqid = tmp_path / "mark", ctrl_exec.new_id()
    first = site.run("slow-mark", str(mark), reqid=reqid)
    for args in ([str(mark)], ["something else"]):
        assert site.run("slow-mark", *args, reqid=reqid) == first
    assert site.run("hello", reqid=reqid) == first  # whatever it asks for now
    assert mark.read_text() == "x\n" and first["stdout"] == "marked\n"


def test_the_same_request_many_times_at_once_runs_once(site, tmp_path):
    mark, reqid = tmp_path / "mark", ctrl_exec.new_id()
    asked = [site.start("slow-mark", str(mark), reqid=reqid) for _ in range(8)]
    answers = [one.wait() for one in asked]
    assert [status for status, _ in answers] == [200] * 8
    assert all(answer == answers[0][1] and answer["stdout"] == "marked\n" for _, answer in answers)
    assert mark.read_text() == "x\n"


def test_the_same_request_waits_while_the_first_one_is_decided(site):
    reqid = ctrl_exec.new_id()
    store = ctrl_exec.RunStore(site.host.config.runs_dir, None, 3600)
    claim = ctrl_exec.claim_run(store, "control", reqid)  # the first one, before it has a record
    asked = site.start("hello", reqid=reqid)
    assert not asked.is_answered_within(1)
    os.close(claim)  # it was refused
    assert asked.wait()[1]["stdout"] == "hello\n"


def test_the_same_request_id_of_another_dispatcher_is_another_run(site, tmp_path):
    openssl = ctrl_exec.OpenSSL()
    key, cert = str(tmp_path / "other.key"), str(tmp_path / "other.crt")
    ctrl_exec.new_key_file(openssl, key, "ec")
    ca = site.control.config.ca
    request = openssl.new_request(key, "other")
    pem = openssl.sign(request, "other", "dispatcher", 30, ca, ctrl_exec.ca_key_path(ca))
    with open(cert, "w", encoding="ascii") as file:
        file.write(pem)
    serial = ctrl_exec.read_certificate(cert).serial
    ctrl_exec.add_trusted(site.host.config.trusted_dispatchers_path, serial, "other")
    assert "RESULT=ok" in site.host.reload()
    mark, reqid = tmp_path / "mark", ctrl_exec.new_id()
    site.run("mark", str(mark), reqid=reqid)
    body = {"script": "mark", "args": [str(mark)], "reqid": reqid}
    context = support.client_context(cert, key, ca)
    status, answer = support.post(site.host.port, context, "/run", body)
    assert (status, answer["exit"]) == (200, 0)
    assert mark.read_text() == "x\nx\n"
    assert site.host.record(reqid)["owner"] == "control"
    assert site.host.record(reqid, "other")["owner"] == "other"


@pytest.mark.parametrize(
    "reqid", ["", "a/b", "../x", ".", "..", "-x", "a b", "a\n", "x" * 65, "\u00e4", "a.b"]
)
def test_a_malformed_request_id_is_refused(site, reqid):
    status, answer = site.ask("hello", reqid=reqid)
    assert (status, answer["field"]) == (400, "reqid")


def test_a_corrupt_record_is_named_and_stops_no_other_run(site):
    reqid = ctrl_exec.new_id()
    site.run("hello", reqid=reqid)
    path = os.path.join(site.host.config.runs_dir, "control", reqid + ".json")
    for content in ("", '{"reqid"', "[]", "{}"):
        with open(path, "w", encoding="ascii") as file:
            file.write(content)
        status, answer = site.ask("hello", reqid=reqid)
        assert status >= 500 and path in answer["error"]
    assert site.run("hello")["stdout"] == "hello\n"


# --- slots ----------------------------------------------------------------------------------------------


def test_a_script_that_runs_is_busy_and_free_afterwards(site, tmp_path):
    gate = tmp_path / "gate"
    asked, _ = site.hold("gate", gate)
    status, answer = site.ask("gate", str(gate))
    assert (status, answer["status"]) == (409, "busy") and "already running" in answer["error"]
    assert site.control.json("run", "solo", "gate", "--", str(gate))[1]["results"][0]["state"] == "busy"
    assert site.run("hello")["exit"] == 0  # another one is free
    gate.touch()
    assert asked.wait()[1]["stdout"] == "through\n"
    assert site.run("gate", str(gate))["stdout"] == "through\n"


def test_a_refused_run_leaves_no_record_and_its_id_is_free(site, tmp_path):
    gate, reqid = tmp_path / "gate", ctrl_exec.new_id()
    asked, _ = site.hold("gate", gate)
    assert site.ask("gate", str(gate), reqid=reqid)[0] == 409
    assert [name for name in os.listdir(site.host.config.runs_dir + "/control") if reqid in name] == []
    gate.touch()
    asked.wait()
    assert site.run("gate", str(gate), reqid=reqid)["stdout"] == "through\n"


def test_a_spoiled_record_of_the_last_run_does_not_stop_the_script(site):
    reqid = ctrl_exec.new_id()
    site.run("hello", reqid=reqid)
    path = site.host.config.runs_dir + "/control/%s.json" % reqid
    with open(path, "w", encoding="ascii"):  # as after a power failure
        pass
    with open(site.host.file(ctrl_exec.AGENT_VAR + "/locks/hello.0"), "w", encoding="ascii") as file:
        file.write("control " + reqid)
    assert site.run("hello")["stdout"] == "hello\n"
    assert [line for line in site.host.events("run-store-fail") if path in line]
    os.unlink(path)


def test_max_running_allows_so_many_at_once(site, tmp_path):
    gate = tmp_path / "gate"
    both = [site.hold("gate2", gate)[0] for _ in range(2)]
    assert site.ask("gate2", str(gate))[0] == 409
    gate.touch()
    assert [asked.wait()[1]["stdout"] for asked in both] == ["through\n"] * 2


def test_a_client_that_goes_away_leaves_the_run_and_its_record_is_completed(site, tmp_path):
    gate, reqid = tmp_path / "gate", ctrl_exec.new_id()
    body = json.dumps({"script": "gate", "args": [str(gate)], "reqid": reqid}).encode()
    head = b"POST /run HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    with support.tls_connect(site.host.port, site.context) as sock:
        sock.sendall(head + body)
        wait_until(lambda: site.pid(reqid), what="the run's process")
    pid = site.pid(reqid)
    assert site.result(reqid)[1]["status"] == "running" and is_alive(pid)
    gate.touch()
    record = wait_until(lambda: site.host.record(reqid)["status"] == "done" and site.host.record(reqid))
    assert record["exit"] == 0
    assert site.run("gate", str(gate), reqid=reqid)["stdout"] == "through\n"  # its result was kept


def test_a_reset_connection_leaves_the_run_as_well(site, tmp_path):
    gate, reqid = tmp_path / "gate", ctrl_exec.new_id()
    body = json.dumps({"script": "gate", "args": [str(gate)], "reqid": reqid}).encode()
    sock = support.tls_connect(site.host.port, site.context)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    sock.sendall(b"POST /run HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    wait_until(lambda: site.pid(reqid), what="the run's process")
    sock.close()
    gate.touch()
    wait_until(lambda: site.host.record(reqid)["status"] == "done", what="the record's end")
    assert site.run("gate", str(gate), reqid=reqid)["stdout"] == "through\n"


@pytest.fixture
def own(tmp_path):
    """An agent of this test's own."""
    one = Site(tmp_path / "own")
    with one.deployment:
        yield one


def test_a_run_keeps_its_slot_and_its_result_over_a_restart_of_the_agent(own, tmp_path):
    gate, reqid = tmp_path / "gate", ctrl_exec.new_id()
    _, other = own.hold("gate", gate)
    asked = own.start("gate2", str(gate), reqid=reqid)
    wait_until(lambda: own.pid(reqid), what="the run's process")
    own.host.process.send_signal(signal.SIGKILL)
    own.host.process.wait()
    wait_until(lambda: not own.host.is_up(), what="the front's end")
    own.host.process.stdout.close()
    own.host.start()
    assert own.ask("gate", str(gate))[0] == 409
    assert own.result(reqid)[1]["status"] == "running"
    again = own.start("gate2", str(gate), reqid=reqid)  # waits for the end of the first one
    gate.touch()
    assert again.wait()[1]["stdout"] == "through\n"
    wait_until(lambda: own.host.record(reqid)["status"] == "done", what="the record's end")
    assert own.run("gate2", "anything", reqid=reqid)["stdout"] == "through\n"
    own.wait_for_end(other)
    assert own.run("gate", str(gate))["stdout"] == "through\n"
    assert asked._thread.join(60) is None


def test_a_run_keeps_its_slot_over_the_death_of_the_front(own, tmp_path):
    gate = tmp_path / "gate"
    _, reqid = own.hold("gate", gate)
    os.kill(own.host.front(), signal.SIGKILL)
    wait_until(lambda: own.host.events("bug"), what="the front's replacement")
    wait_until(own.host.is_up, what="the new front")
    assert own.ask("gate", str(gate))[0] == 409
    gate.touch()
    own.wait_for_end(reqid)
    assert own.run("gate", str(gate))["stdout"] == "through\n"


# --- retention ------------------------------------------------------------------------------------------


def rules_of(host, **changes):
    rules, _ = ctrl_exec.build_rules(host.config, host.name, {"ab1": "control"})
    return rules._replace(**changes)


def a_record(rules, reqid, **values):
    """Put a finished run on disk."""
    directory = os.path.join(rules.store.directory, "control")
    os.makedirs(directory, exist_ok=True)
    record = ctrl_exec.RunRecord(reqid, "control", "s", "h", "", "", "done", "", 1)._replace(**values)
    ctrl_exec.write_record(rules.store, record, new=True)
    for suffix in (".out", ".err"):
        with open(os.path.join(directory, reqid + suffix), "w", encoding="ascii"):
            pass


def test_records_are_swept_when_their_retention_is_over(tmp_path, monkeypatch):
    rules = rules_of(support.Host(str(tmp_path / "h"), "h"))
    assert rules.store.retention == 24 * 3600
    a_record(rules, "old")
    directory, moment = os.path.join(rules.store.directory, "control"), ctrl_exec.now()
    monkeypatch.setattr(ctrl_exec, "now", lambda: moment + 23.5 * 3600)
    ctrl_exec.sweep_records(rules.store)
    assert sorted(os.listdir(directory)) == ["old.err", "old.json", "old.out"]
    a_record(rules, "young")
    for suffix in (".json", ".out", ".err"):
        os.utime(os.path.join(directory, "young" + suffix), (moment + 23 * 3600,) * 2)
    os.utime(os.path.join(rules.store.directory, ".swept"), (moment,) * 2)
    monkeypatch.setattr(ctrl_exec, "now", lambda: moment + 25 * 3600)
    ctrl_exec.sweep_records(rules.store)
    assert sorted(os.listdir(directory)) == ["young.err", "young.json", "young.out"]


def test_a_sweep_leaves_what_is_outside_alone(tmp_path, monkeypatch):
    rules = rules_of(support.Host(str(tmp_path / "h"), "h"))
    a_record(rules, "old")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").touch()
    os.symlink(str(outside), os.path.join(rules.store.directory, "linked"))
    os.symlink(str(outside / "precious"), os.path.join(rules.store.directory, "control", "x.json"))
    moment = ctrl_exec.now()
    monkeypatch.setattr(ctrl_exec, "now", lambda: moment + 1000 * 3600)
    ctrl_exec.sweep_records(rules.store)
    assert os.listdir(os.path.join(rules.store.directory, "control")) == []
    assert (outside / "precious").exists() and os.path.islink(os.path.join(rules.store.directory, "linked"))


def test_a_sweep_never_takes_the_record_of_a_run_that_goes_on(site, tmp_path, monkeypatch):
    gate = tmp_path / "gate"
    asked, reqid = site.hold("gate", gate)
    rules = rules_of(site.host)
    moment = ctrl_exec.now()
    monkeypatch.setattr(ctrl_exec, "now", lambda: moment + 1000 * 3600)
    try:
        marker = os.path.join(rules.store.directory, ".swept")
        if os.path.exists(marker):
            os.utime(marker, (moment - 1000 * 3600,) * 2)
        ctrl_exec.sweep_records(rules.store)
        left = sorted(
            name for name in os.listdir(os.path.join(rules.store.directory, "control")) if reqid in name
        )
    finally:
        gate.touch()
        status, answer = asked.wait()
    assert left == [reqid + ".err", reqid + ".json", reqid + ".out"]
    assert (status, answer["stdout"]) == (200, "through\n")


# --- a disk that is full --------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a disk of so many KiB on a directory."""
    mounted = []

    def mount(path, kib):
        os.makedirs(path, exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=%dk,mode=755" % kib, "tmpfs", path], check=True)
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        subprocess.run(["umount", "-l", path], check=True)


def fill(path):
    """Take what room a disk has left."""
    with open(os.path.join(path, "ballast"), "wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError:
            pass
    return file.name


@needs_root
@pytest.mark.parametrize("where", ["runs", "locks", ""], ids=["runs", "locks", "the whole state directory"])
def test_a_run_that_cannot_be_recorded_is_refused_until_there_is_room(tmp_path, small_disk, where):
    site = Site(tmp_path / "site", start=False)
    state = os.path.join(site.host.file(ctrl_exec.AGENT_VAR), where)
    saved = site.host.config.trusted_dispatchers_path
    with open(saved, encoding="ascii") as file:
        trusted = file.read()
    disk = small_disk(state, 256)
    if not where:
        with open(saved, "w", encoding="ascii") as file:
            file.write(trusted)
    with site.deployment:
        site.host.start()
        ballast = fill(disk)
        mark, reqid = tmp_path / "mark", ctrl_exec.new_id()
        status, answer = site.ask("mark", str(mark), reqid=reqid)
        assert (status, answer["exit"]) == (200, -1), answer
        for word in ("not started", "No space left on device", "unrecorded=yes"):
            assert word in answer["error"]
        assert not mark.exists()
        shown = site.control.json("run", "solo", "mark", "--", str(mark))[1]["results"][0]
        assert shown["exit"] == -1 and "No space left on device" in shown["error"]
        status, history = site.control.json("history")
        assert [list(run["hosts"].values())[0]["state"] for run in history["runs"]] == ["refused"]
        os.unlink(ballast)
        assert site.run("mark", str(mark), reqid=reqid)["exit"] == 0
        assert mark.read_text() == "x\n"
        assert site.host.events("bug") == []


@needs_root
def test_a_run_that_fills_the_disk_still_tells_its_exit_and_what_was_lost(tmp_path, small_disk):
    site = Site(tmp_path / "site", start=False)
    small_disk(site.host.config.runs_dir, 256)
    with site.deployment:
        site.host.start()
        answer = site.run("filler", str(1024 * 1024))
        assert answer["exit"] == 0, answer
        kept = len(answer["stdout"])
        assert 0 < kept < 256 * 1024
        assert kept + answer["stdout_truncated"] == 1024 * 1024
        assert len(answer["stderr"]) + answer.get("stderr_truncated", 0) == len("end\n")
        record = site.host.record(answer["reqid"])
        assert (record["status"], record["exit"]) == ("done", 0)
        assert record["stdout_truncated"] == answer["stdout_truncated"]
        assert site.result(answer["reqid"])[1] == answer
        assert site.host.events("bug") == []


def test_nothing_of_all_this_was_a_bug_to_the_agent(site):
    assert site.host.events("bug") == []
