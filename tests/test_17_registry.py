"""The registry of agents, which of them a command means, and the locks of what is running."""

import json
import os
import signal
import stat
import subprocess
import sys

import ctrl_exec
import pytest
import support

OLD_ENTRY = {
    "hostname": "web-1.example.org",
    "ip": "192.0.2.5",
    "paired": "2025-01-02T03:04:05Z",
    "expiry": "2031-01-02T03:04:05Z",
    "reqid": "0f0e0d0c",
    "lookup_by": "ip",
    "port": 7443,
    "dispatcher_serial": "0AB1",
    "serial_status": "current",
    "serial_confirmed": "2025-01-02T03:04:06Z",
    "tags": {"env": "prod", "rack": "7"},
}
LONG_NAME = "n" * 250 + ".ab"


@pytest.fixture
def control(tmp_path):
    """A control host without a CA: enough for the commands that only look at the registry."""
    return support.Control(tmp_path / "control", set_up=False)


@pytest.fixture
def directory(tmp_path):
    """A registry with some hosts, for selections made in this process."""
    path = str(tmp_path / "agents")
    names = ["web-%02d" % number for number in range(1, 13)] + ["db-1", "db-2", "mail"]
    with ctrl_exec.registry_lock(path):
        for name in names:
            tags = {"kind": name.partition("-")[0], "env": "prod" if name < "web-07" else "test"}
            ctrl_exec.save_agent(path, ctrl_exec.Agent(name, name, "", 7443, "hostname", name, tags=tags))
    return path


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two agents whose script `gate` runs until a file appears, several at once if asked to."""
    made = support.Deployment(tmp_path_factory.mktemp("locks"), ("left", "right"))
    for host in made.hosts.values():
        host.script("gate", 'while [ ! -e "$1" ]; do sleep 0.05; done; echo open\n', "max_running=9")
    with made:
        yield made


def put_entry(control, name, values):
    text = values if isinstance(values, (str, bytes)) else json.dumps(values)
    return control.put(ctrl_exec.VAR + "/agents/%s.json" % name, text, 0o640)


def read_entry(control, name):
    with open(control.file(ctrl_exec.VAR + "/agents/%s.json" % name), encoding="utf-8") as file:
        return json.load(file)


def chosen(directory, *words, **how):
    agents, _ = ctrl_exec.select_agents(directory, ctrl_exec.Selection(words, **how))
    return [agent.name for agent in agents]


# --- files ----------------------------------------------------------------------------------------------


def test_an_entry_of_an_older_release_is_listed_with_its_facts(control):
    put_entry(control, "web-1", OLD_ENTRY)
    status, shown = control.json("list-agents")
    assert status == 0 and shown["ok"] is True
    (agent,) = shown["agents"]
    for key in ("hostname", "ip", "paired", "expiry", "reqid", "lookup_by", "port", "tags"):
        assert agent[key] == OLD_ENTRY[key]
    assert (agent["name"], agent["cert_name"]) == ("web-1", "web-1")
    table = control.run("list-agents").out.splitlines()
    assert table[0].split() == ["NAME", "ADDRESS", "PORT", "EXPIRES", "PAIRED", "TAGS"]
    assert set(table[1]) == {"-", " "}
    assert table[2].split()[:3] == ["web-1", "192.0.2.5", "7443"]
    assert "env=prod,rack=7" in table[2]


def test_an_entry_with_the_fewest_fields_is_usable(control):
    put_entry(control, "bare", {"hostname": "bare.example.org"})
    agent = ctrl_exec.get_agent(control.config.registry_dir, "bare")
    assert (agent.address(), agent.port, agent.cert_name) == ("bare.example.org", 7443, "bare")


def test_fields_of_other_releases_survive_an_edit(control):
    put_entry(control, "web-1", dict(OLD_ENTRY, future={"a": [1, None, "\u00e9"]}))
    assert control.run("edit-agent", "web-1", "--agent-port", "7555").returncode == 0
    values = read_entry(control, "web-1")
    assert values["port"] == 7555
    assert values["future"] == {"a": [1, None, "\u00e9"]}
    assert {key: values[key] for key in OLD_ENTRY} == dict(OLD_ENTRY, port=7555, dispatcher_serial="ab1")


def test_a_written_entry_can_be_read_by_owner_and_group_only(control):
    put_entry(control, "web-1", OLD_ENTRY)
    assert control.run("edit-agent", "web-1", "--ip", "192.0.2.9").returncode == 0
    path = control.file(ctrl_exec.VAR + "/agents/web-1.json")
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o640
    assert [name for name in os.listdir(os.path.dirname(path)) if name.startswith(".tmp")] == []


@pytest.mark.parametrize(
    "content",
    [
        "",
        '{"hostname": "x"',
        "[1]",
        '"text"',
        b"\xff\xfe{}",
        '{"hostname": "../x"}',
        '{"port": 70000}',
        '{"tags": [1]}',
    ],
    ids=["empty", "cut", "list", "string", "binary", "path", "port", "tags"],
)
def test_a_file_that_cannot_be_used_is_named_and_the_others_are_listed(control, content):
    put_entry(control, "good", OLD_ENTRY)
    put_entry(control, "bad", content)
    done = control.run("list-agents")
    assert done.returncode == 1
    assert "bad.json" in done.err and "good.json" not in done.err
    assert done.out.splitlines()[2].startswith("good ")
    status, shown = control.json("list-agents")
    assert status == 1 and shown["ok"] is False
    assert [agent["name"] for agent in shown["agents"]] == ["good"]


@pytest.mark.parametrize("field", [{"ip": 5}, {"expiry": 7}, {"serial": "not hex"}], ids=str)
def test_a_field_of_the_wrong_kind_is_named_and_never_an_internal_error(control, field):
    put_entry(control, "good", OLD_ENTRY)
    put_entry(control, "bad", dict(OLD_ENTRY, **field))
    for words in (("list-agents",), ("list-agents", "--json")):
        done = control.run(*words)
        assert done.returncode == 1, done.err
        assert "bad.json" in done.err and "good" in done.out
    done = control.run("unpair", "bad")
    assert done.returncode != ctrl_exec.EXIT_BUG, done.err


def test_a_spoiled_file_does_not_stop_a_host_that_is_named(directory):
    with open(os.path.join(directory, "web-01.json"), "w", encoding="ascii") as file:
        file.write("{")
    assert chosen(directory, "web-02", "db-*") == ["web-02", "db-1", "db-2"]
    with pytest.raises(ctrl_exec.StorageError, match="web-01.json"):
        chosen(directory, "web-01")


def test_everything_with_a_spoiled_file_names_the_file_and_goes_on_with_the_others(directory):
    with open(os.path.join(directory, "web-01.json"), "w", encoding="ascii") as file:
        file.write("{")
    agents, problems = ctrl_exec.select_agents(directory, ctrl_exec.Selection((), everything=True))
    assert [agent.name for agent in agents] == [n for n in ctrl_exec.list_agent_names(directory) if n != "web-01"]
    assert len(problems) == 1 and "web-01.json" in problems[0]


def test_a_name_of_253_characters_works_like_any_other(control):
    path = control.config.registry_dir
    agent = ctrl_exec.Agent(LONG_NAME, LONG_NAME, "192.0.2.1", 7443, "ip", LONG_NAME, "ab12")
    with ctrl_exec.registry_lock(path):
        ctrl_exec.save_agent(path, agent)
    status, shown = control.json("list-agents")
    assert status == 0 and [entry["name"] for entry in shown["agents"]] == [LONG_NAME]
    assert control.run("edit-agent", LONG_NAME, "--agent-port", "7555").returncode == 0
    assert ctrl_exec.get_agent(path, LONG_NAME).port == 7555
    assert chosen(path, "n*") == [LONG_NAME]
    assert control.run("unpair", LONG_NAME).returncode == 0
    assert ctrl_exec.list_agent_names(path) == []
    assert ctrl_exec.load_revoked(control.config.revoked_serials) == {"ab12"}


def test_two_long_names_with_the_same_beginning_are_two_agents(control):
    path = control.config.registry_dir
    names = [LONG_NAME, LONG_NAME[:-1] + "c"]
    with ctrl_exec.registry_lock(path):
        for number, name in enumerate(names):
            ctrl_exec.save_agent(path, ctrl_exec.Agent(name, name, "", 7000 + number, "hostname", name))
    assert [ctrl_exec.get_agent(path, name).port for name in names] == [7000, 7001]


def test_a_spoiled_file_of_a_long_name_does_not_stop_the_others(control):
    path = control.config.registry_dir
    with ctrl_exec.registry_lock(path):
        ctrl_exec.save_agent(path, ctrl_exec.Agent(LONG_NAME, LONG_NAME, "", 7443, "hostname", LONG_NAME))
    (file,) = [name for name in os.listdir(path) if name.endswith(".json")]
    with open(os.path.join(path, file), "w", encoding="ascii") as spoiled:
        spoiled.write("{")
    put_entry(control, "good", OLD_ENTRY)
    done = control.run("list-agents")
    assert done.returncode == 1
    assert file in done.err and "\ngood " in done.out
    assert chosen(path, "goo*") == ["good"]


def test_a_registry_that_cannot_be_read_says_so(tmp_path):
    control = support.Control(tmp_path / "c", "registry_dir = %s\n" % (tmp_path / "file"), set_up=False)
    (tmp_path / "file").write_text("not a directory")
    done = control.run("list-agents")
    assert done.returncode == 1
    assert str(tmp_path / "file") in done.err


# --- edit-agent and unpair ------------------------------------------------------------------------------


def test_renaming_keeps_the_name_of_the_certificate(control):
    put_entry(control, "web-1", OLD_ENTRY)
    assert control.run("edit-agent", "web-1", "--rename", "front").returncode == 0
    assert control.run("edit-agent", "front", "--rename", "front-2").returncode == 0
    assert ctrl_exec.list_agent_names(control.config.registry_dir) == ["front-2"]
    agent = ctrl_exec.get_agent(control.config.registry_dir, "front-2")
    assert agent.cert_name == "web-1"
    assert agent.dispatcher_serial == "ab1"
    assert len(control.events("edit-agent")) == 2


def test_a_renamed_agent_still_answers(pair):
    assert pair.control.run("edit-agent", "right", "--rename", "other").returncode == 0
    try:
        status, shown = pair.control.json("ping", "other")
        assert (status, shown["results"][0]["status"]) == (0, "ok")
    finally:
        assert pair.control.run("edit-agent", "other", "--rename", "right").returncode == 0


def test_a_change_of_case_alone_is_a_rename(control):
    put_entry(control, "Web", OLD_ENTRY)
    assert control.run("edit-agent", "Web", "--rename", "web").returncode == 0
    assert ctrl_exec.list_agent_names(control.config.registry_dir) == ["web"]


@pytest.mark.parametrize("name", ["taken", "TAKEN", "tAkEn"])
def test_a_rename_to_a_taken_name_is_refused_whatever_its_case(control, name):
    put_entry(control, "web-1", OLD_ENTRY)
    put_entry(control, "taken", dict(OLD_ENTRY, ip="192.0.2.77"))
    done = control.run("edit-agent", "web-1", "--rename", name)
    assert done.returncode == 1 and "taken" in done.err
    assert ctrl_exec.list_agent_names(control.config.registry_dir) == ["taken", "web-1"]
    assert read_entry(control, "taken")["ip"] == "192.0.2.77"


def test_the_address_can_be_changed(control):
    put_entry(control, "web-1", OLD_ENTRY)
    words = ("--ip", "2001:db8::7", "--agent-port", "7001", "--lookup-by", "hostname")
    assert control.run("edit-agent", "web-1", *words).returncode == 0
    agent = ctrl_exec.get_agent(control.config.registry_dir, "web-1")
    assert (agent.ip, agent.port, agent.lookup_by) == ("2001:db8::7", 7001, "hostname")
    assert agent.address() == "web-1.example.org"
    assert control.run("edit-agent", "web-1", "--lookup-by", "ip").returncode == 0
    assert ctrl_exec.get_agent(control.config.registry_dir, "web-1").address() == "2001:db8::7"


@pytest.mark.parametrize(
    "words",
    [
        ("--rename", "../x"),
        ("--rename", "-x"),
        ("--rename", ".x"),
        ("--rename", "a b"),
        ("--rename", "a\nb"),
        ("--rename", "x" * 254),
        ("--rename", "\x1b[31mred"),
        ("--ip", "192.0.2"),
        ("--ip", "192.0.2.1/24"),
        ("--ip", "host.example.org"),
        ("--agent-port", "0"),
        ("--agent-port", "65536"),
        ("--agent-port", "ssh"),
        ("--lookup-by", "guess"),
        (),
    ],
    ids=repr,
)
def test_a_bad_value_is_a_usage_error_and_changes_nothing(control, words):
    put_entry(control, "web-1", OLD_ENTRY)
    done = control.run("edit-agent", "web-1", *words)
    assert done.returncode == 2, done.err
    assert "\x1b" not in done.err
    assert read_entry(control, "web-1") == OLD_ENTRY
    assert ctrl_exec.list_agent_names(control.config.registry_dir) == ["web-1"]


@pytest.mark.parametrize(
    "verb", [("edit-agent", "--agent-port", "1"), ("unpair",)], ids=["edit-agent", "unpair"]
)
def test_an_unknown_name_is_answered_with_the_nearest(control, verb):
    put_entry(control, "web-1", OLD_ENTRY)
    done = control.run(verb[0], "web-l", *verb[1:])
    assert done.returncode == 2
    assert "web-l" in done.err and "did you mean web-1?" in done.err
    assert control.run(verb[0], "../agents/web-1", *verb[1:]).returncode == 2
    assert read_entry(control, "web-1") == OLD_ENTRY


def test_an_unpaired_agent_is_refused_even_if_its_entry_comes_back(pair):
    host = pair.add("gone")
    host.start()
    path = pair.control.file(ctrl_exec.VAR + "/agents/gone.json")
    with open(path, "rb") as file:
        entry = file.read()
    assert pair.control.json("ping", "gone")[0] == 0
    done = pair.control.run("unpair", "gone")
    assert done.returncode == 0
    serial = json.loads(entry)["serial"]
    assert serial in done.out
    assert serial in ctrl_exec.load_revoked(pair.control.config.revoked_serials)
    assert not os.path.exists(path)
    assert pair.control.run("ping", "gone").returncode == 2
    pair.control.put(ctrl_exec.VAR + "/agents/gone.json", entry, 0o640)
    for words in (("ping", "gone"), ("run", "gone", "hello")):
        status, shown = pair.control.json(*words)
        assert status == 1
        assert "revoked" in shown["results"][0]["error"]
    assert host.events("run") == []
    os.unlink(path)
    assert any("NAME=gone" in line and "SERIAL=" + serial in line for line in pair.control.events("unpair"))


def test_unpairing_without_a_known_serial_says_that_nothing_was_revoked(control):
    put_entry(control, "web-1", OLD_ENTRY)
    done = control.run("unpair", "web-1")
    assert done.returncode == 0 and "could not be revoked" in done.err
    assert ctrl_exec.list_agent_names(control.config.registry_dir) == []


def test_unpairing_keeps_what_was_revoked_before(control):
    revoked = control.config.revoked_serials
    control.put("/" + os.path.relpath(revoked, control.root), "# mine\nDE:AD  # stolen laptop\n")
    put_entry(control, "web-1", dict(OLD_ENTRY, serial="beef"))
    assert control.run("unpair", "web-1").returncode == 0
    assert ctrl_exec.load_revoked(revoked) == {"dead", "beef"}
    with open(revoked, encoding="utf-8") as file:
        assert "# mine\nDE:AD  # stolen laptop\n" in file.read()


def test_a_revocation_list_that_cannot_be_read_keeps_the_agent_registered(control):
    control.put("/" + os.path.relpath(control.config.revoked_serials, control.root), "what is this\n")
    put_entry(control, "web-1", dict(OLD_ENTRY, serial="beef"))
    assert control.run("unpair", "web-1").returncode == 1
    assert ctrl_exec.list_agent_names(control.config.registry_dir) == ["web-1"]


# --- which hosts are meant ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, names",
    [
        (["db-1"], "db-1"),
        (["mail", "db-1"], "mail db-1"),
        (["db-1", "db-1", "db-?", "db-[1-2]"], "db-1 db-2"),
        (["web-0*"], " ".join("web-%02d" % n for n in range(1, 10))),
        (["web-[01-03]"], "web-01 web-02 web-03"),
        (["web-[09-11]"], "web-09 web-10 web-11"),
        (["db-[1,2]", "web-[01,03,07-09]"], "db-1 db-2 web-01 web-03 web-07 web-08 web-09"),
        (["web-[0-1][1-2]"], "web-01 web-02 web-11 web-12"),
        (["web-1[0-2]"], "web-10 web-11 web-12"),
        (["*[1]"], "db-1 web-01 web-11"),
        (["?b-1"], "db-1"),
    ],
    ids=str,
)
def test_words_mean_these_hosts(directory, words, names):
    assert " ".join(chosen(directory, *words)) == names


def test_all_hosts_and_tags(directory):
    assert len(chosen(directory, everything=True)) == 15
    assert chosen(directory, tags=(("kind", "db"),)) == ["db-1", "db-2"]
    assert chosen(directory, "web-*", tags=(("env", "prod"), ("kind", "web"))) == [
        "web-%02d" % n for n in range(1, 7)
    ]
    assert chosen(directory, everything=True, tags=(("kind", "mail"),)) == ["mail"]
    with pytest.raises(ctrl_exec.UnknownHost):
        chosen(directory, everything=True, tags=(("kind", "none"),))


def test_a_port_goes_with_a_word_or_with_all(directory):
    words = ctrl_exec.Selection(("db-1:9000", "web-[01-02]:9001", "mail"))
    agents, _ = ctrl_exec.select_agents(directory, words)
    assert [(agent.name, agent.port) for agent in agents] == [
        ("db-1", 9000), ("web-01", 9001), ("web-02", 9001), ("mail", 7443)
    ]  # fmt: skip
    agents, _ = ctrl_exec.select_agents(directory, ctrl_exec.Selection(("db-*",), port=9002))
    assert [agent.port for agent in agents] == [9002, 9002]


@pytest.mark.parametrize("word", ["db-1:", "db-1:0", "db-1:70000", "db-1:ssh", "db-1:1:2"])
def test_a_bad_port_is_a_usage_error(directory, word):
    with pytest.raises(ctrl_exec.UsageError):
        chosen(directory, word)


@pytest.mark.parametrize(
    "word",
    [
        "web-[1-999999999]",
        "web-[0-9999999999]",
        "web-[1-1000][1-1000]",
        "web-[5-3]",
        "web-[1-]",
        "web-[1,,2]",
        "web-[1-2-3]",
        "web-[" + ",".join(["1-99999"] * 3) + "]",
        "x[1-100][1-100][1-100]",
    ],
)
def test_an_absurd_range_is_refused(directory, word):
    with pytest.raises(ctrl_exec.UsageError, match="range|more than"):
        chosen(directory, word)


@pytest.mark.parametrize("word", ["nope*", "web-99", "../agents/db-1", "", "db-1\n", "\x1bc", "x" * 5000])
def test_what_matches_no_host_is_unknown(directory, word):
    with pytest.raises(ctrl_exec.UnknownHost) as caught:
        chosen(directory, "db-1", word)
    assert "\x1b" not in caught.value.message and len(caught.value.message) < 1000
    assert caught.value.exit_code == 2


def test_an_unknown_host_among_known_ones_stops_the_run_before_anything_is_sent(deployment):
    done = deployment.control.run("run", "alpha", "betta", "sent-to-nobody")
    assert done.returncode == 2
    assert "betta" in done.err and "did you mean beta?" in done.err and done.out == ""
    status, shown = deployment.control.json("run", "alpha", "betta", "sent-to-nobody")
    assert status == 2 and shown["ok"] is False and "betta" in shown["error"]
    assert deployment.control.json("run", "alpha", "sent-to-alpha")[0] == 1
    assert "SCRIPT=sent-to-alpha" in deployment["alpha"].log()  # it would have been logged
    assert [name for name, host in deployment.hosts.items() if "sent-to-nobody" in host.log()] == []


def test_hosts_come_from_files_and_from_standard_input_each_once(deployment, tmp_path):
    listed = tmp_path / "hosts"
    listed.write_text("# the fleet\nalpha beta   # both\n\nalpha\n")
    status, shown = deployment.control.json("ping", "-f", str(listed), "beta")
    assert (status, [result["host"] for result in shown["results"]]) == (0, ["alpha", "beta"])
    status, shown = deployment.control.json("run", "-", "hello", input=b"beta\nbeta\n")
    assert (status, [result["host"] for result in shown["results"]]) == (0, ["beta"])
    status, shown = deployment.control.json("ping", "--all")
    assert [result["host"] for result in shown["results"]] == ["alpha", "beta"]


@pytest.mark.parametrize(
    "words",
    [
        ("ping",),
        ("ping", "--all", "alpha"),
        ("ping", "-f", "/nonexistent/hosts"),
        ("ping", "-"),
        ("ping", "--tags", "x"),
        ("run",),
    ],
    ids=str,
)
def test_a_selection_that_makes_no_sense_is_a_usage_error(deployment, words):
    done = deployment.control.run(*words, input=b"# nobody\n")
    assert done.returncode == 2
    assert done.err.startswith("ced: ")


# --- locks ----------------------------------------------------------------------------------------------


def start_gate(deployment, gate, *hosts):
    """Start `ced run HOSTS gate` and wait until its locks are shown; returns the Popen and the locks."""
    process = deployment.control.spawn("run", *hosts, "gate", "--json", "--", gate, stdout=subprocess.PIPE)

    def mine():
        locks = ctrl_exec.list_locks(deployment.control.config.lock_dir)
        return [lock for lock in locks if lock.get("pid") == process.pid] if len(locks) >= len(hosts) else []

    return process, support.wait_until(lambda: len(mine()) == len(hosts) and mine(), what="the locks")


def end_gate(process, gate):
    with open(gate, "w", encoding="ascii"):
        pass
    out, _ = process.communicate(timeout=60)
    return process.returncode, json.loads(out)


def test_a_lock_is_held_from_start_to_last_result_and_then_gone(pair, tmp_path):
    gate = str(tmp_path / "gate")
    process, _ = start_gate(pair, gate, "left", "right")
    status, shown = pair.control.json("list-locks")
    assert status == 0 and shown["ok"] is True
    assert [(lock["host"], lock["script"], lock["pid"]) for lock in shown["locks"]] == [
        ("left", "gate", process.pid), ("right", "gate", process.pid)
    ]  # fmt: skip
    table = pair.control.run("list-locks").out.splitlines()
    assert table[0].split() == ["HOST", "SCRIPT", "REQID", "PID", "SINCE", "USER"]
    assert [line.split()[:2] for line in table[2:]] == [["left", "gate"], ["right", "gate"]]
    status, result = end_gate(process, gate)
    assert status == 0 and {lock["reqid"] for lock in shown["locks"]} == {result["reqid"]}
    assert pair.control.json("list-locks") == (0, {"ok": True, "locks": []})
    assert [file for file in os.listdir(pair.control.config.lock_dir) if "gate" in file] == []


def test_a_second_run_of_the_same_script_is_told_what_is_locked(pair, tmp_path):
    gate = str(tmp_path / "gate")
    process, _ = start_gate(pair, gate, "left")
    runs = len(pair["right"].events("run"))
    done = pair.control.run("run", "right", "left", "gate", "--json", "--", gate)
    assert done.returncode == 1
    assert '"code":4' in done.out and '"error":"locked"' in done.out
    answer = json.loads(done.out)
    assert (answer["ok"], answer["error"], answer["code"]) == (False, "locked", 4)
    assert answer["conflicts"] == ["left:gate"]
    text = pair.control.run("run", "left", "gate", "--", gate)
    assert text.returncode == 1 and "left:gate" in text.err and "locked" in text.err
    locks = ctrl_exec.list_locks(pair.control.config.lock_dir)
    assert [(lock["host"], lock["script"]) for lock in locks] == [("left", "gate")]  # right was given back
    assert len(pair["right"].events("run")) == runs
    assert any("CONFLICTS=left:gate" in line for line in pair.control.events("lock-conflict"))
    status, shown = pair.control.json("run", "left", "hello")
    assert status == 0 and shown["results"][0]["stdout"] == "hello\n"
    assert end_gate(process, gate)[0] == 0


def test_a_killed_run_leaves_no_lock(pair, tmp_path):
    gate = str(tmp_path / "gate")
    process, _ = start_gate(pair, gate, "left")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert ctrl_exec.list_locks(pair.control.config.lock_dir) == []
    with open(gate, "w", encoding="ascii"):
        pass
    status, shown = pair.control.json("run", "left", "gate", "--", gate)
    assert status == 0 and shown["results"][0]["stdout"] == "open\n"


def test_a_lock_directory_that_cannot_be_used_stops_the_run_before_anything_is_sent(pair, tmp_path):
    (tmp_path / "file").write_text("in the way")
    conf = pair.control.put(
        "/etc/nolocks.conf", "dispatcher_id = control\nlock_dir = %s\n" % (tmp_path / "file")
    )
    done = pair.control.run("--config", conf, "run", "left", "env")  # which no other test here runs
    assert done.returncode == 1
    assert str(tmp_path / "file") in done.err and done.out == ""
    assert [line for line in pair["left"].events("run") if "SCRIPT=env " in line] == []


_HAMMER = """
import os, sys
sys.path.insert(0, sys.argv[1])
import ctrl_exec
print("ready", flush=True)
while not os.path.exists(sys.argv[3]):
    ctrl_exec.list_locks(sys.argv[2])
"""


def test_looking_at_locks_never_makes_a_run_fail(tmp_path):
    directory, stop = str(tmp_path / "locks"), str(tmp_path / "stop")
    os.makedirs(directory)
    words = [sys.executable, "-c", _HAMMER, os.path.dirname(support.PROGRAM), directory, stop]
    watchers = [subprocess.Popen(words, stdout=subprocess.PIPE) for _ in range(3)]
    try:
        for watcher in watchers:
            assert watcher.stdout.readline() == b"ready\n"
        refused = []
        for turn in range(150):
            with open(os.path.join(directory, "web--job.lock"), "a", encoding="ascii"):
                pass  # what a killed run leaves behind
            try:
                with ctrl_exec.HostLocks(directory, ["web", "db"], "job", "r%d" % turn):
                    pass
            except ctrl_exec.Locked as error:
                refused.append(error.conflicts)
        assert refused == []
    finally:
        with open(stop, "w", encoding="ascii"):
            pass
        for watcher in watchers:
            watcher.communicate(timeout=60)


def test_a_lock_is_one_lock_however_long_the_names_are(tmp_path):
    directory = str(tmp_path / "locks")
    with ctrl_exec.HostLocks(directory, [LONG_NAME], "s" * 128, "one"):
        (held,) = ctrl_exec.list_locks(directory)
        assert (held["host"], held["script"], held["reqid"]) == (LONG_NAME, "s" * 128, "one")
        with ctrl_exec.HostLocks(directory, [LONG_NAME], "t" * 128, "two"):
            assert len(ctrl_exec.list_locks(directory)) == 2
    assert os.listdir(directory) == [] or ctrl_exec.list_locks(directory) == []


def test_a_conflict_gives_back_what_was_taken(tmp_path):
    directory = str(tmp_path / "locks")
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import ctrl_exec\n"
        "with ctrl_exec.HostLocks(sys.argv[2], ['b', 'd'], 'job', 'other'):\n"
        "    print('held', flush=True); sys.stdin.read()\n"
    )
    words = [sys.executable, "-c", script, os.path.dirname(support.PROGRAM), directory]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(ctrl_exec.Locked) as caught:
            ctrl_exec.HostLocks(directory, ["a", "b", "c", "d"], "job", "me").__enter__()
        assert caught.value.conflicts == ("b:job", "d:job")
        assert [lock["host"] for lock in ctrl_exec.list_locks(directory)] == ["b", "d"]
        other.stdin.close()
    with ctrl_exec.HostLocks(directory, ["a", "b", "c", "d"], "job", "me"):
        assert len(ctrl_exec.list_locks(directory)) == 4
