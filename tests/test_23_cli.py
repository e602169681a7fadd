"""What a person or a shell script at the control host sees: text, tables, JSON, colours, exit statuses."""

import errno
import json
import os
import pwd
import pty
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile

import pytest
from support import IS_ROOT, PROGRAM, Control, Deployment, free_port, wait_until

import ctrl_exec

NOBODY = 65534

SCRIPTS = {
    "both": "printf out; printf err >&2\n",
    "nothing": ":\n",
    "unicode": "printf 'caf\\303\\251 \\342\\202\\254\\n'\n",
    "binary": "printf 'a\\377\\000b'\n",
    "escapes": "printf '\\033]0;owned\\007\\033[31mred\\rX\\n\\302\\233m'\n",
    "lines": 'i=0; while [ $i -lt 3000 ]; do echo "line $i of lines that fill a pipe"; i=$((i+1)); done\n',
    "two": "echo 1; echo 2; echo 3 >&2; exit 4\n",
}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A control host with `one` and `two`, both up, and `gone`, which nobody answers for."""
    top = tmp_path_factory.mktemp("site")
    with Deployment(top, ("one", "two"), start=False) as made:
        made.gate = str(top / "gate")
        for name in ("one", "two"):
            for script, body in SCRIPTS.items():
                made[name].script(script, body)
            wait = "while [ ! -e '%s.'$1 ]; do sleep 0.05; done; echo \"$1\" > '%s.done.'$1\n"
            made[name].script("wait", wait % (made.gate, made.gate))
            made[name].start()
        directory = made.control.config.registry_dir
        with ctrl_exec.registry_lock(directory):
            one = ctrl_exec.get_agent(directory, "one")
            gone = one._replace(name="gone", cert_name="gone", port=free_port(), serial="")
            ctrl_exec.save_agent(directory, gone)
        yield made


@pytest.fixture
def ced(site, capfdbinary):
    """Run one command in this process: (exit status, output, what was said on standard error)."""

    def run(*words, control=site.control):
        status = ctrl_exec.main(["ced", "--root", control.root, *words])
        out, err = capfdbinary.readouterr()
        assert type(status) is int
        assert b"Traceback" not in err, err
        return status, out.decode("utf-8", "surrogateescape"), err.decode("utf-8", "surrogateescape")

    return run


@pytest.fixture
def other(site, tmp_path):
    """A control host of one's own with the same identity and registry."""
    root = tmp_path / "other"
    shutil.copytree(site.control.root, str(root), symlinks=True)
    return Control(str(root), set_up=False)


def on_terminal(control, *words, env=None):
    """What a terminal gets to see: (exit status, bytes, standard error)."""
    ours, theirs = pty.openpty()
    with control.spawn(
        *words,
        env={"TERM": "xterm", **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=subprocess.PIPE,
    ) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError as error:
                assert error.errno == errno.EIO  # the other end is closed
                break
            if not piece:
                break
            shown += piece
        err = process.stderr.read()
    os.close(ours)
    return process.returncode, shown.replace(b"\r\n", b"\n"), err


HEADING = re.compile(r"==> ([A-Za-z0-9._-]+)  \[(OK|FAIL)  exit:(-?[0-9]+)  ([0-9]+)ms  req:([0-9a-f]+)\]\n")

# --- run: text ------------------------------------------------------------------------------------------


def test_a_block_is_heading_then_output(ced):
    status, out, err = ced("run", "one", "hello")
    assert status == 0
    hit = HEADING.match(out)
    assert hit and hit.group(1, 2, 3) == ("one", "OK", "0"), out
    assert out[hit.end() :] == "hello\n"
    assert err == ""


def test_a_failed_block_has_stdout_then_stderr(ced):
    status, out, _ = ced("run", "one", "two")
    assert status == 1
    hit = HEADING.match(out)
    assert hit and hit.group(1, 2, 3) == ("one", "FAIL", "4"), out
    assert out[hit.end() :] == "1\n2\n3\n"


def test_each_stream_ends_its_last_line(ced):
    status, out, _ = ced("run", "one", "both")
    assert (status, out.partition("\n")[2]) == (0, "out\nerr\n")


def test_a_silent_script_is_a_heading_only(ced):
    status, out, _ = ced("run", "one", "nothing")
    assert status == 0
    assert HEADING.fullmatch(out)


def test_a_refusal_has_its_reason_below_the_heading(ced):
    status, out, _ = ced("run", "one", "reboot")
    assert status == 1
    hit = HEADING.match(out)
    assert hit and hit.group(1, 2, 3) == ("one", "FAIL", "-1"), out
    assert out[hit.end() :] == "refused: script not permitted\n"


def test_a_host_that_is_not_there_is_a_block_with_the_reason_in_words(ced):
    status, out, _ = ced("run", "gone", "hello")
    assert status == 1
    hit = HEADING.match(out)
    assert hit and hit.group(1, 2, 3) == ("gone", "FAIL", "-1"), out
    assert re.fullmatch(r"unreachable: 127\.0\.0\.1 port \d+ refused the connection.*\n", out[hit.end() :]), (
        out
    )


def test_several_hosts_are_a_block_each_under_one_request_id_and_are_summed_up(ced):
    status, out, err = ced("run", "one", "two", "gone", "hello")
    assert status == 1
    found = HEADING.findall(out)
    assert sorted(hit[0] for hit in found) == ["gone", "one", "two"]
    assert len({hit[4] for hit in found}) == 1
    assert err == "3 hosts: 2 ok, 1 unreachable\n"


def test_a_script_ended_by_a_signal_is_126_and_says_which(ced, site):
    site["one"].script("die", "kill -KILL $$\n")
    site["one"].reload()
    status, out, _ = ced("run", "one", "die")
    assert status == 1
    assert "[FAIL  exit:126  " in out
    assert "\nended by SIGKILL\n" in out


def test_a_time_limit_is_124_and_said_so(ced):
    status, out, _ = ced("run", "one", "sleep", "--timeout", "1", "--", "300")
    assert status == 1
    assert "[FAIL  exit:124  " in out
    assert "time limit" in out


# --- run: JSON ------------------------------------------------------------------------------------------


def test_json_of_run_is_compact_and_has_the_promised_keys(ced):
    status, out, _ = ced("run", "one", "gone", "two", "--json")
    assert status == 1
    assert out.endswith("\n") and out.count("\n") == 1
    answer = json.loads(out)
    assert out == json.dumps(answer, separators=(",", ":")) + "\n"
    assert answer["ok"] is True
    results = {result["host"]: result for result in answer["results"]}
    assert sorted(results) == ["gone", "one"]
    for result in results.values():
        assert {"host", "script", "exit", "stdout", "stderr", "rtt", "reqid"} <= set(result)
        assert (result["script"], result["reqid"]) == ("two", answer["reqid"])
        assert re.fullmatch(r"[0-9]+ms", result["rtt"])
    one, gone = results["one"], results["gone"]
    assert (one["exit"], one["stdout"], one["stderr"]) == (4, "1\n2\n", "3\n")
    assert "error" not in one
    assert (gone["exit"], gone["stdout"], gone["stderr"]) == (-1, "", "")
    assert "refused the connection" in gone["error"]


def test_json_carries_bytes_that_are_no_text_exactly(ced):
    import base64

    status, out, _ = ced("run", "one", "binary", "--json")
    (result,) = json.loads(out)["results"]
    assert status == 0
    assert base64.b64decode(result["stdout_base64"]) == b"a\xff\0b"


def test_a_lock_held_by_another_request_is_the_promised_object(ced, site):
    with ctrl_exec.HostLocks(site.control.config.lock_dir, ["one", "two"], "hello", "feed"):
        status, out, err = ced("run", "two", "one", "hello", "--json")
        assert status == 1
        assert out.startswith('{"ok":false,"error":"locked",')
        answer = json.loads(out)
        assert (answer["code"], sorted(answer["conflicts"])) == (4, ["one:hello", "two:hello"])
        status, out, err = ced("run", "one", "hello")
        assert (status, out) == (1, "")
        assert err.startswith("ced: locked: one:hello (request feed, since ")
        _, out, _ = ced("list-locks", "--json")
        assert sorted(lock["host"] for lock in json.loads(out)["locks"]) == ["one", "two"]
        _, out, _ = ced("list-locks")
        lines = out.splitlines()
        assert lines[0].startswith("HOST") and set(lines[1]) == {"-", " "}
        assert [line.split()[:3] for line in lines[2:]] == [
            ["one", "hello", "feed"],
            ["two", "hello", "feed"],
        ]
    assert json.loads(ced("list-locks", "--json")[1]) == {"ok": True, "locks": []}


@pytest.mark.parametrize(
    "words, status",
    [
        (("run", "onne", "hello"), 2),
        (("run", "web-*", "hello"), 2),
        (("run", "one", "a/b"), 2),
        (("run", "hello"), 2),
        (("run", "--all", "one", "hello"), 2),
        (("run", "--tags", "nonsense", "hello"), 2),
        (("ping", "one", "nobody-here"), 2),
        (("edit-agent", "one"), 2),
        (("unpair", "nobody-here"), 2),
    ],
)
def test_an_error_is_one_json_object_with_json_and_one_sentence_without(ced, words, status):
    got, out, err = ced(*words)
    assert (got, out) == (status, "")
    assert err.startswith("ced: ") and len(err.splitlines()) <= 2
    if words[0] in ("run", "ping"):
        got, out, err = ced(*words, "--json")
        assert got == status
        answer = json.loads(out)
        assert answer["ok"] is False and answer["error"] and out.count("\n") == 1


def test_an_unknown_host_stops_everything_and_names_the_nearest(ced, site):
    before = site["one"].log()
    status, out, err = ced("run", "one", "gonne", "hello")
    assert (status, out) == (2, "")
    assert "unknown host: gonne; did you mean" in err and "gone" in err
    assert site["one"].log() == before


# --- ping, list-agents, discovery -----------------------------------------------------------------------


def table(text, heading):
    """The rows of a table, whose heading and rule are checked."""
    lines = text.splitlines()
    assert re.split(r"  +", lines[0]) == heading
    assert set(lines[1]) == {"-", " "}
    assert len(lines[1].split()) == len(heading)
    return [re.split(r"  +", line) for line in lines[2:]]


def test_ping_is_a_table_and_fails_when_a_host_did_not_answer(ced):
    heading = ["NAME", "STATUS", "RTT", "EXPIRES", "VERSION", "REMARKS"]
    status, out, _ = ced("ping", "one", "two")
    rows = table(out, heading)
    assert (status, [row[:2] for row in rows]) == (0, [["one", "ok"], ["two", "ok"]])
    assert all(re.fullmatch(r"[0-9]+ms", row[2]) and row[4] == ctrl_exec.__version__ for row in rows)
    assert {row[3] for row in rows} <= {"364d", "365d"}
    status, out, _ = ced("ping", "--all")
    rows = table(out, heading)
    assert (status, [row[:2] for row in rows]) == (1, [["gone", "unreachable"], ["one", "ok"], ["two", "ok"]])
    assert "refused the connection" in rows[0][-1]


def test_json_of_ping_has_a_status_for_each_host(ced):
    status, out, _ = ced("ping", "--all", "--json")
    assert status == 1
    answer = json.loads(out)
    assert out == json.dumps(answer, separators=(",", ":")) + "\n"
    assert [(entry["host"], entry["status"]) for entry in answer["results"]] == [
        ("gone", "unreachable"),
        ("one", "ok"),
        ("two", "ok"),
    ]
    assert '"status":"ok"' in out
    assert [("error" in entry, "expiry" in entry) for entry in answer["results"]] == [
        (True, False),
        (False, True),
        (False, True),
    ]


def test_list_agents_is_a_table_whose_rows_begin_with_the_name(ced, site):
    status, out, _ = ced("list-agents")
    rows = table(out, ["NAME", "ADDRESS", "PORT", "EXPIRES", "PAIRED", "TAGS"])
    assert status == 0
    assert [row[0] for row in rows] == ["gone", "one", "two"]
    assert rows[1][1:3] == ["127.0.0.1", str(site["one"].port)]


def test_json_of_list_agents_has_what_the_registry_knows(ced, site):
    status, out, _ = ced("list-agents", "--json")
    answer = json.loads(out)
    assert (status, answer["ok"]) == (0, True)
    assert out == json.dumps(answer, separators=(",", ":")) + "\n"
    one = answer["agents"][1]
    assert (one["name"], one["port"], one["cert_name"]) == ("one", site["one"].port, "one")
    assert one["days_left"] in (364, 365)


def test_an_agent_file_that_is_broken_is_named_and_the_others_are_listed(ced, other):
    with open(os.path.join(other.config.registry_dir, "torn.json"), "w", encoding="ascii"):
        pass
    status, out, err = ced("list-agents", control=other)
    assert status == 1
    assert "torn.json" in err
    assert [line.split()[0] for line in out.splitlines()[2:]] == ["gone", "one", "two"]


def test_discovery_lists_what_each_host_would_run(ced):
    status, out, _ = ced("discovery", "one", "two")
    rows = table(out, ["NAME", "SCRIPT", "RUNS", "PROFILE", "USER", "PATH"])
    assert status == 0
    profile, user = ("default", "root") if IS_ROOT else ("-", pwd.getpwuid(os.geteuid()).pw_name)
    assert ["one", "hello", "yes", profile, user] in [row[:5] for row in rows]
    assert ["two", "both", "yes", profile, user] in [row[:5] for row in rows]
    status, out, _ = ced("discovery", "--json")
    answer = json.loads(out)
    assert status == 1  # `gone` did not answer
    assert sorted(answer["hosts"]) == ["gone", "one", "two"]
    assert {"both", "hello"} <= {script["name"] for script in answer["hosts"]["one"]["scripts"]}
    assert answer["hosts"]["gone"]["status"] == "unreachable"


# --- the command line -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ("run", "--json", "one", "args"),
        ("run", "one", "--json", "args"),
        ("run", "one", "args", "--json"),
        ("--json", "run", "one", "args"),
        ("run", "one", "--username", "ann", "args", "--timeout", "60", "--json"),
        ("run", "--timeout=60", "one", "--json", "args", "--verbose"),
    ],
)
def test_options_stand_anywhere_before_the_double_dash(ced, words):
    status, out, _ = ced(*words, "--", "x")
    (result,) = json.loads(out)["results"]
    assert (status, result["host"], result["stdout"]) == (0, "one", "x\0")


AWKWARD = [
    "--json",
    "-h",
    "--help",
    "--version",
    "--",
    "--root",
    "/",
    "",
    " ",
    "-1",
    "a\nb",
    "caf\u00e9",
    "$(id)",
    "*",
]


def test_everything_after_the_double_dash_reaches_the_script_untouched(ced):
    status, out, _ = ced("run", "one", "args", "--json", "--", *AWKWARD)
    (result,) = json.loads(out)["results"]
    assert status == 0
    assert result["stdout"] == "".join(word + "\0" for word in AWKWARD)


def test_arguments_survive_the_way_from_a_shell(site):
    done = site.control.run("run", "one", "args", "--", *AWKWARD)
    assert done.returncode == 0
    assert done.stdout.partition(b"\n")[2] == "".join(word + "\0" for word in AWKWARD).encode() + b"\n"


@pytest.mark.parametrize(
    "words, sentence",
    [
        (("lst-agents",), "ced: unknown verb `lst-agents`; did you mean list-agents"),
        (("pong",), "ced: unknown verb `pong`; did you mean ping"),
        (("run", "one", "hello", "--jsn"), "ced: unrecognized arguments: --jsn"),
        (("run", "one", "hello", "--js"), "ced: unrecognized arguments: --js"),
        (("run", "one", "hello", "--timeout", "soon"), "ced: --timeout: expected "),
        (("run", "one", "hello", "--timeout", "0"), "ced: --timeout: expected "),
        (("run", "one", "hello", "--port", "70000"), "ced: --port: a port is "),
        (("run",), "ced: no script is named"),
        (("run", "--", "x"), "ced: no script is named"),
        (("run", "hello"), "ced: `hello` is taken for the script, and no host is named"),
        (("approve",), "ced: the following arguments are required: ID"),
        (("edit-agent", "one", "--lookup-by", "guess"), "ced: argument --lookup-by: invalid choice"),
        (("\x1b[31m",), "ced: unknown verb `\\x1b[31m`"),
    ],
)
def test_a_usage_error_is_one_sentence_with_the_nearest_word_and_status_2(ced, words, sentence):
    status, out, err = ced(*words)
    assert (status, out) == (2, "")
    assert err.startswith(sentence), err
    assert len(err.splitlines()) <= 2


def test_hosts_come_from_patterns_ranges_files_and_standard_input(site, tmp_path):
    control = site.control
    listing = tmp_path / "hosts"
    listing.write_text("# the lot\none two # both\n")
    for words, given in (
        (("o*", "t*"), None),
        (("-f", str(listing)), None),
        (("-",), b"one\ntwo\n"),
        (("one", "two", "one", "t*"), None),
    ):
        done = control.run("ping", *words, "--json", input=given)
        assert (done.returncode, done.err) == (0, "")
        assert [entry["host"] for entry in json.loads(done.out)["results"]] == ["one", "two"]
    assert control.run("ping", "-", input=b"").returncode == 2
    assert control.run("ping", "-f", str(tmp_path / "none")).returncode == 2
    assert control.run("ping", "web-[01-03]").err.startswith("ced: unknown host: web-01")


def test_help_of_every_verb_names_its_options(ced):
    for command in ctrl_exec.COMMANDS:
        status = ctrl_exec.main([command.role, command.name, "--help"])
        assert status == 0
    for command in ctrl_exec.COMMANDS:
        if command.role == "dispatcher":
            status, out, err = ced(command.name, "--help")
            assert (status, err) == (0, "")
            for flags, _ in command.options:
                assert flags[0] in out or flags[0] in ("hosts", "id", "name"), out
    status, out, _ = ced("--help")
    assert status == 0
    assert all(
        "\n  %s " % command.name in out for command in ctrl_exec.COMMANDS if command.role == "dispatcher"
    )


# --- terminals, pipes, locales --------------------------------------------------------------------------


def test_colours_are_for_terminals_that_want_them(site):
    status, shown, _ = on_terminal(site.control, "run", "one", "hello")
    assert status == 0 and b"[\x1b[32mOK\x1b[0m  exit:0" in shown, shown
    status, shown, _ = on_terminal(site.control, "run", "one", "reboot")
    assert status == 1 and b"[\x1b[31mFAIL\x1b[0m  exit:-1" in shown, shown
    for env in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        status, shown, _ = on_terminal(site.control, "run", "one", "hello", env=env)
        assert status == 0 and b"\x1b" not in shown, (env, shown)
    for words in (("run", "one", "hello"), ("ping", "one"), ("list-agents",), ("check",)):
        assert b"\x1b" not in site.control.run(*words, env={"TERM": "xterm"}).stdout


def test_columns_stay_aligned_with_colours(site):
    _, coloured, _ = on_terminal(site.control, "ping", "--all")
    assert b"\x1b[" in coloured
    plain = re.sub(rb"\x1b\[[0-9]+m", b"", coloured).decode().splitlines()
    column = plain[0].index("RTT")
    assert all(line[column - 1] == " " and line[column] != " " for line in plain)


def test_a_scripts_escape_sequences_are_shown_on_a_terminal_and_kept_in_a_pipe(site):
    exact = b"\x1b]0;owned\x07\x1b[31mred\rX\n\xc2\x9bm"
    _, shown, _ = on_terminal(site.control, "run", "one", "escapes", env={"NO_COLOR": "1"})
    body = shown.partition(b"\n")[2]
    assert body == b"\\x1b]0;owned\\x07\\x1b[31mred\\rX\n\\x9bm\n", body
    done = site.control.run("run", "one", "escapes")
    assert done.stdout.partition(b"\n")[2] == exact + b"\n"


def test_output_that_is_no_text_is_exact_in_a_pipe(site):
    done = site.control.run("run", "one", "binary")
    assert done.stdout.partition(b"\n")[2] == b"a\xff\0b\n"


@pytest.mark.parametrize("locale", ["C", "POSIX", "C.UTF-8", "xx_XX.ISO-8859-1"])
def test_the_locale_decides_nothing_about_output(site, locale):
    env = {"LC_ALL": locale, "LANG": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = site.control.run("run", "one", "unicode", env=env)
    assert done.returncode == 0
    assert done.stdout.partition(b"\n")[2] == b"caf\xc3\xa9 \xe2\x82\xac\n"
    done = site.control.run("run", "caf\u00e9", "unicode", env=env)
    assert (done.returncode, done.err.count("\n")) == (2, 1)


@pytest.mark.parametrize(
    "words", [("run", "one", "lines"), ("list-agents",), ("run", "one", "lines", "--json")]
)
def test_a_reader_that_went_away_ends_it_quietly_with_141(site, words):
    reading, writing = os.pipe()
    os.close(reading)
    process = site.control.spawn(*words, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (141, b"")


def test_head_gets_its_line_and_no_traceback_follows(site):
    process = site.control.spawn("run", "one", "lines", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    line = process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 141
    assert line.startswith(b"==> one  [OK  exit:0  ")
    assert err == b""
    assert json.loads(site.control.run("list-locks", "--json").out)["locks"] == []


@pytest.mark.parametrize(
    "words", [("run", "one", "hello"), ("list-agents",), ("--version",), ("ping", "one", "--json")]
)
def test_a_full_device_is_74_and_one_sentence(site, words):
    with open("/dev/full", "wb") as full:
        process = site.control.spawn(*words, stdout=full, stderr=subprocess.PIPE)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 74
    assert err == b"ced: cannot write the output: No space left on device\n"


# --- tokens ---------------------------------------------------------------------------------------------


def test_a_token_from_the_environment_reaches_hook_and_script_and_no_log(site, other, tmp_path):
    seen = tmp_path / "seen"
    other.put(ctrl_exec.ETC + "/auth-hook", "#!/bin/sh\nprintf %%s \"$ENVEXEC_TOKEN\" > '%s'\n" % seen, 0o755)
    done = other.run("run", "one", "context", env={"ENVEXEC_TOKEN": "s3cret-canary"})
    assert (done.returncode, done.err) == (0, "")
    assert json.loads(done.out.partition("\n")[2])["token"] == "s3cret-canary"
    assert seen.read_text() == "s3cret-canary"
    assert "s3cret-canary" not in other.log() + site["one"].log()
    reqid = json.loads(done.out.partition("\n")[2])["reqid"]
    assert reqid in other.log() and reqid in site["one"].log()


def test_a_token_on_the_command_line_warns_and_works(ced):
    status, out, err = ced("run", "one", "context", "--token", "s3cret")
    assert status == 0
    assert json.loads(out.partition("\n")[2])["token"] == "s3cret"
    assert "token on the command line" in err and "ENVEXEC_TOKEN" in err
    assert len(err.splitlines()) == 1, err


def test_a_hook_that_says_no_ends_it_before_anything_is_sent(site, other):
    other.put(ctrl_exec.ETC + "/auth-hook", "#!/bin/sh\nexit 3\n", 0o755)
    before = site["one"].log()
    status, answer = other.json("run", "one", "hello")
    assert (status, answer["ok"], answer["code"]) == (1, False, 3)
    assert other.run("ping", "one").returncode == 1
    assert other.run("discovery", "one").returncode == 1
    assert site["one"].log() == before


# --- configuration --------------------------------------------------------------------------------------


def test_a_configuration_that_is_missing_or_broken_is_78_and_one_sentence(ced, tmp_path):
    missing = str(tmp_path / "none.conf")
    status, out, err = ced("--config", missing, "list-agents")
    assert (status, out, err) == (78, "", "ced: %s: no such file\n" % missing)
    broken = tmp_path / "broken.conf"
    for text, words in (
        ("port = 7443\nnonsense\n", ":2: expected `key = value`"),
        ("port = 99999\n", ":1: "),
        ("port = 1\nport = 2\n", ":2: `port` was set before, at line 1"),
        ("[tags]\n", ":1: unknown section [tags]"),
        (b"\xff\xfe", "UTF-8"),
    ):
        broken.write_bytes(text if isinstance(text, bytes) else text.encode())
        status, out, err = ced("list-agents", "--config", str(broken))
        assert (status, out) == (78, "")
        assert err.startswith("ced: %s" % broken) and words in err, err
        assert len(err.splitlines()) <= 2


def test_a_configuration_given_by_a_relative_path_is_found(site, tmp_path):
    conf = tmp_path / "mine.conf"
    conf.write_text("dispatcher_id = mine\nregistry_dir = %s\n" % tmp_path)
    argv = [*site.control.argv("--config", "mine.conf", "list-agents", "--json")]
    done = subprocess.run(
        argv, cwd=str(tmp_path), capture_output=True, env=site.control.environment(), timeout=60
    )
    assert (done.returncode, json.loads(done.stdout)) == (0, {"ok": True, "agents": []})


def test_an_unknown_key_warns_with_the_nearest_and_goes_on(ced, other):
    with open(other.file(ctrl_exec.ETC + "/ctrl-exec.conf"), "a", encoding="ascii") as file:
        file.write("read_timeot = 5\n")
    status, out, err = ced("list-agents", control=other)
    assert status == 0 and out
    assert "read_timeot" in err and "did you mean read_timeout" in err and ":2:" in err, err
    assert len(err.splitlines()) == 1


@pytest.fixture
def public():
    """A directory with a copy of the program that every user of the machine can reach."""
    top = tempfile.mkdtemp(prefix="ctrl-exec-test-")
    os.chmod(top, 0o755)
    shutil.copy(PROGRAM, os.path.join(top, "ced"))
    os.chmod(os.path.join(top, "ced"), 0o755)
    yield top
    shutil.rmtree(top)


def as_ordinary_user(argv, **how):
    """Run as somebody who is not root: as nobody when we are root, else as ourselves."""
    env = {"PATH": ctrl_exec.SAFE_PATH, "LC_ALL": "C"}
    who = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if IS_ROOT else {}
    return subprocess.run(argv, capture_output=True, cwd="/", env=env, timeout=60, **who, **how)


def find_python():
    """An interpreter that an ordinary user can start: ours, or the system's when ours lies in root's home."""
    for python in (sys.executable, "/usr/bin/python3"):
        try:
            done = as_ordinary_user(
                [python, "-I", "-c", "import sys, hashlib, ssl; print(sys.version_info >= (3, 9))"]
            )
        except OSError:
            continue
        if done.stdout == b"True\n":
            return python
    raise AssertionError("no Python 3.9 that an ordinary user can start")


def test_a_configuration_one_may_not_read_is_one_clear_sentence(public):
    conf = os.path.join(public, "secret.conf")
    with open(conf, "w", encoding="ascii") as file:
        file.write("port = 7443\n")
    os.chmod(conf, 0o000)
    done = as_ordinary_user([find_python(), "-I", public + "/ced", "--config", conf, "list-agents"])
    assert (done.returncode, done.stdout) == (78, b"")
    lines = done.stderr.decode().splitlines()
    assert lines[0].startswith("ced: ") and conf in lines[0] and "Permission denied" in lines[0], lines
    assert len(lines) <= 2


def test_a_key_one_may_not_read_is_one_clear_sentence(public):
    root = os.path.join(public, "root")
    shutil.copytree(Control(root).root, root + "2")
    os.chmod(root + "2/etc/ctrl-exec/ctrl-exec.conf", 0o644)
    os.chmod(root + "2/etc/ctrl-exec/dispatcher.key", 0o000)
    os.makedirs(root + "2/var/log", exist_ok=True)
    for path, directories, files in os.walk(root + "2"):
        os.chmod(path, 0o777)
    log = root + "2/var/log/ctrl-exec.log"
    if os.path.exists(log):
        os.unlink(log)
    done = as_ordinary_user([find_python(), "-I", public + "/ced", "--root", root + "2", "ping", "--all"])
    assert (done.returncode, done.stdout) == (1, b"")
    lines = done.stderr.decode().splitlines()
    assert "dispatcher.key" in lines[0] and "permission denied" in lines[0].lower(), lines
    assert len(lines) <= 2


def test_the_root_may_come_from_the_environment(site):
    argv = [
        word
        for word in site.control.argv("list-agents", "--json")
        if word not in ("--root", site.control.root)
    ]
    env = site.control.environment({"CTRL_EXEC_ROOT": site.control.root})
    done = subprocess.run(argv, capture_output=True, env=env, timeout=60)
    assert [agent["name"] for agent in json.loads(done.stdout)["agents"]] == ["gone", "one", "two"]
    env["CTRL_EXEC_ROOT"] = "/nowhere/at/all"
    argv = site.control.argv("list-agents", "--json")
    done = subprocess.run(argv, capture_output=True, env=env, timeout=60)
    assert len(json.loads(done.stdout)["agents"]) == 3  # the option wins


def test_a_relative_root_from_the_environment_means_the_same_as_the_option(site):
    top, name = os.path.split(site.control.root)
    for words, env in (((), {"CTRL_EXEC_ROOT": name}), (("--root", name), {})):
        argv = [sys.executable, "-I", site.control.path, *words, "ping", "one", "--json"]
        done = subprocess.run(
            argv, capture_output=True, cwd=top, env=site.control.environment(env), timeout=60
        )
        assert done.returncode == 0, done.stderr


def test_new_files_are_not_for_everybody_even_under_an_open_umask(tmp_path):
    control = Control(tmp_path / "c", set_up=False)
    for verb in ("setup-ca", "setup-ctrl-exec"):
        process = control.spawn(verb, stdout=subprocess.DEVNULL, preexec_fn=lambda: os.umask(0))
        assert process.wait(60) == 0
    for name in ("ca.key", "dispatcher.key"):
        assert stat.S_IMODE(os.stat(control.file(ctrl_exec.ETC + "/" + name)).st_mode) == 0o600
    for name in (control.config.registry_dir, control.config.runs_dir):
        assert stat.S_IMODE(os.stat(name).st_mode) & 0o007 == 0


# --- interrupting ---------------------------------------------------------------------------------------


def test_ctrl_c_says_what_still_runs_and_disturbs_no_script(site):
    done = site.gate + ".done.c"
    process = site.control.spawn(
        "run",
        "one",
        "gone",
        "wait",
        "--",
        "c",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    first = process.stdout.readline().decode()
    assert first.startswith("==> gone  [FAIL"), first
    reqid = HEADING.fullmatch(first)[5]
    record = os.path.join(site["one"].config.runs_dir, "control", reqid + ".json")
    wait_until(lambda: os.path.exists(record))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"==> one" not in out
    assert b"the script may still run on one (request %s)" % reqid.encode() in err, err
    assert b"gone" not in err and b"Traceback" not in err
    assert json.loads(site.control.run("list-locks", "--json").out)["locks"] == []
    assert not os.path.exists(done)
    assert site["one"].record(reqid)["status"] == "running"
    with open(site.gate + ".c", "w", encoding="ascii"):
        pass
    wait_until(lambda: site["one"].record(reqid)["status"] == "done")
    assert site["one"].record(reqid)["exit"] == 0
    assert os.path.exists(done)


def test_blocks_appear_as_hosts_finish(site):
    process = site.control.spawn("run", "one", "gone", "wait", "--", "b", stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline().startswith(b"==> gone  ")  # while `one` has not begun to end
        assert process.poll() is None
    finally:
        with open(site.gate + ".b", "w", encoding="ascii"):
            pass
        out, _ = process.communicate(timeout=60)
    assert b"==> one  [OK  exit:0" in out
    assert process.returncode == 1


# --- what must not be loaded ----------------------------------------------------------------------------


def test_modules_beside_the_program_and_in_the_environment_are_not_loaded(public):
    if not os.path.exists("/usr/bin/python3"):
        pytest.skip("the first line of the file names /usr/bin/python3, which this machine lacks")
    evil = os.path.join(public, "evil")
    os.makedirs(evil)
    marker = os.path.join(evil, "loaded")
    for directory in (public, evil):
        for name in ("json", "ssl", "argparse", "socket", "sitecustomize", "usercustomize"):
            with open(os.path.join(directory, name + ".py"), "w", encoding="ascii") as file:
                file.write("open(%r, 'a').write(__name__)\n" % marker)
    startup = os.path.join(evil, "json.py")
    env = {"PATH": ctrl_exec.SAFE_PATH, "PYTHONPATH": evil, "PYTHONSTARTUP": startup, "PYTHONHOME": evil}
    link = os.path.join(evil, "cea")
    os.symlink(os.path.join(public, "ced"), link)
    for program, verb in ((os.path.join(public, "ced"), "setup-ca"), (link, "serve")):
        done = subprocess.run([program, verb, "--help"], capture_output=True, env=env, cwd=evil, timeout=60)
        assert done.returncode == 0, done.stderr
        assert verb in done.stdout.decode()
    assert not os.path.exists(marker)
