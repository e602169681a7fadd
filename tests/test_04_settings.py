import ipaddress
import json
import os
import re
import subprocess
import sys

import ctrl_exec
import pytest
import support
from ctrl_exec import ConfigError, Rate, load_config, render_example

ROLES = ("dispatcher", "agent")
EXAMPLE = os.path.join(os.path.dirname(support.PROGRAM), "conf.example")
ROWS = pytest.mark.parametrize("row", ctrl_exec.SETTINGS, ids=lambda row: row.role + "." + row.key)

# What the documentation promises, written down apart from the table that has to keep it.
DEFAULTS = {
    "dispatcher": {
        "port": 7443, "key_type": "ec", "auth_hook": "", "auth_hook_timeout": 10, "auth_deny_generic": False,
        "read_timeout": 60, "connect_timeout": 10, "run_retention_hours": 24, "cert_days": 365,
        "cert_renewal_days": 90, "cert_overlap_days": 30, "cert_check_interval": 14400, "pairing_port": 7444,
        "pairing_max_queue": 10, "pairing_timeout": 600, "pairing_rate_limit_volume": Rate(10, 60, 300),
        "pairing_rate_limit_disable": False, "api_port": 7445, "api_bind": ("127.0.0.1",), "api_cert": "",
        "api_key": "", "api_auth_default": "deny", "api_max_connections": 64,
        "ca": "/etc/ctrl-exec/ca.crt", "cert": "/etc/ctrl-exec/dispatcher.crt",
        "key": "/etc/ctrl-exec/dispatcher.key", "registry_dir": "/var/lib/ctrl-exec/agents",
        "lock_dir": "/var/lib/ctrl-exec/locks", "runs_dir": "/var/lib/ctrl-exec/runs",
        "pairing_dir": "/var/lib/ctrl-exec/pairing",
    },
    "agent": {
        "port": 7443, "bind": (), "auth_hook": "", "auth_hook_timeout": 10, "script_dirs": (),
        "strict_modes": True, "allowed_ips": (), "rate_limit_volume": Rate(10, 60, 300),
        "rate_limit_probe": Rate(3, 600, 3600), "rate_limit_disable": False, "max_connections": 256,
        "stdin_timeout": 10, "run_retention_hours": 24, "max_output": 10 * 1024 * 1024, "script_timeout": 0,
        "cert": "/etc/ctrl-exec-agent/agent.crt", "key": "/etc/ctrl-exec-agent/agent.key",
        "ca": "/etc/ctrl-exec-agent/ca.crt", "revoked_serials": "/etc/ctrl-exec-agent/revoked-serials",
        "trusted_dispatchers_path": "/var/lib/ctrl-exec-agent/ctrl-exec-dispatchers",
        "runs_dir": "/var/lib/ctrl-exec-agent/runs",
    },
    "profile": {
        "run_as": "", "caps": "", "writable": (), "no_new_privileges": False, "timeout": 0, "nice": 0,
        "memory": 0, "cpu_seconds": 0, "open_files": 0,
    },
}  # fmt: skip
OLDER = [
    ("dispatcher", "api_max_children", "api_max_connections", "7", 7),
    ("agent", "max_children", "max_connections", "7", 7),
    ("agent", "async_runs_dir", "runs_dir", "/srv/runs", "/srv/runs"),
]


@pytest.fixture
def load(tmp_path):
    """A function that loads a configuration from text; the file is `c.conf`."""

    def load_text(role, text, root=""):
        path = tmp_path / "c.conf"
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
        return load_config(role, str(path), root)

    return load_text


def values_of(config):
    return {row.key: getattr(config, row.key) for row in ctrl_exec.SETTINGS if row.role == config.role}


def refused(load, role, text):
    """The message of the ConfigError that a text must cause, less the directory of the file."""
    with pytest.raises(ConfigError) as caught:
        load(role, text)
    assert caught.value.exit_code == 78
    return re.sub(r"\S*/c\.conf", "c.conf", caught.value.message)


# --- the table ------------------------------------------------------------------------------------------


@ROWS
def test_every_row_parses_its_own_default_and_says_what_it_is_for(row):
    value = row.parse(row.default)
    assert isinstance(value, (int, str, bool, tuple))
    assert row.role in ("dispatcher", "agent", "profile")
    assert re.fullmatch("[a-z][a-z_]*", row.key)
    assert row.help and "\n" not in row.help


def test_no_name_means_two_keys_of_one_role():
    names = [(row.role, name) for row in ctrl_exec.SETTINGS for name in (row.key, row.older) if name]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("role", ROLES)
def test_without_a_file_every_documented_default_holds(role, load):
    config = load(role, "")
    assert {key: getattr(config, key) for key in DEFAULTS[role]} == DEFAULTS[role]
    assert (config.tags, config.profiles, config.warnings) == ({}, {}, ())


def test_an_empty_profile_has_the_documented_defaults(load):
    assert load("agent", "[profile p]\n").profiles == {"p": DEFAULTS["profile"]}


def test_the_dispatcher_is_called_like_its_host_unless_it_is_told(load):
    import socket

    assert load("dispatcher", "").dispatcher_id == socket.gethostname()
    assert load("dispatcher", "dispatcher_id = c-1\n").dispatcher_id == "c-1"


def test_a_key_of_another_role_is_no_attribute(load):
    with pytest.raises(AttributeError, match="registry_dir"):
        load("agent", "").registry_dir
    assert not hasattr(load("dispatcher", ""), "strict_modes")


# --- values ---------------------------------------------------------------------------------------------

COUNTS = ["+5", "5_0", "\u0665", "\u00b2", "5.0", "0x5", "1e3", "-1", "five", "", "5 5", "99999999999"]


@pytest.mark.parametrize("text", COUNTS)
@pytest.mark.parametrize("key", ["max_connections", "script_timeout", "port"])
def test_numbers_are_plain_digits(key, text, load):
    assert "c.conf:1: `%s` expects a whole number" % key in refused(load, "agent", "%s = %s" % (key, text))


@pytest.mark.parametrize("text", [" 5 ", "5 ", "5\n", "+5", "\t5", "5\0"])
@pytest.mark.parametrize("name", ["parse_count", "parse_positive", "parse_port", "parse_nice"])
def test_number_parsers_take_no_blanks_and_no_signs_by_themselves(name, text):
    with pytest.raises(ValueError):
        getattr(ctrl_exec, name)(text)


@pytest.mark.parametrize(
    "key, text", [("port", "65536"), ("max_connections", "0"), ("auth_hook_timeout", "0")]
)
def test_numbers_stay_in_their_range(key, text, load):
    assert "`%s` expects a whole number from" % key in refused(load, "agent", "%s = %s" % (key, text))


@pytest.mark.parametrize("text, value", [("0", 0), ("65535", 65535), ("007", 7)])
def test_ports_reach_from_nought_to_65535(text, value, load):
    assert load("agent", "port = " + text).port == value


@pytest.mark.parametrize("text, value", [("-20", -20), ("19", 19), ("0", 0), ("-5", -5)])
def test_nice_goes_both_ways(text, value, load):
    assert load("agent", "[profile p]\nnice = " + text).profiles["p"]["nice"] == value


@pytest.mark.parametrize("text", ["20", "-21", "+5", "--5", "5_0", "\u0665", ""])
def test_nice_outside_its_range_is_refused(text, load):
    assert "c.conf:2: `nice` expects" in refused(load, "agent", "[profile p]\nnice = " + text)


@pytest.mark.parametrize("text", ["10/60", "1/2/3/4", "10/60/0", "0/60/300", "a/b/c", "10/ 60/300", "", "/"])
def test_a_rate_is_three_positive_numbers(text, load):
    message = refused(load, "agent", "rate_limit_volume = " + text)
    assert message.startswith("c.conf:1: `rate_limit_volume` expects ")


def test_a_rate_is_read_in_the_order_count_window_block(load):
    assert load("agent", "rate_limit_probe = 1/2/3").rate_limit_probe == Rate(count=1, window=2, block=3)


@pytest.mark.parametrize(
    "text, value",
    [
        ("512", 512), ("512K", 524288), ("10M", 10485760), ("10 MiB", 10485760), ("2G", 2 * 1024**3),
        ("1KB", 1024),
    ],  # fmt: skip
)
def test_sizes_have_units_of_1024(text, value, load):
    assert load("agent", "max_output = " + text).max_output == value


@pytest.mark.parametrize(
    "text", ["", "10X", "-1", "+1", "1.5M", "M", "10MM", "1_0", "\u0661K", "10 M 5", "10iB"]
)
def test_what_is_not_a_size_is_refused(text, load):
    assert "`max_output` expects a size" in refused(load, "agent", "max_output = " + text)


@pytest.mark.parametrize(
    "text, value",
    [
        ("yes", True), ("TRUE", True), ("on", True), ("1", True),
        ("no", False), ("False", False), ("off", False), ("0", False),
    ],
)  # fmt: skip
def test_yes_and_no_have_the_usual_words(text, value, load):
    assert load("agent", "strict_modes = " + text).strict_modes is value


@pytest.mark.parametrize("text", ["", "y", "2", "enabled", "yes no"])
def test_anything_else_is_neither_yes_nor_no(text, load):
    message = refused(load, "agent", "strict_modes = " + text)
    assert message == "c.conf:1: `strict_modes` expects yes or no, not `%s`" % text


@pytest.mark.parametrize("separator", [",", " ", ", ", "\t"])
def test_networks_are_addresses_and_prefixes_of_both_families(separator, load):
    parts = ["10.0.0.0/8", "192.0.2.7", "fd00::/8", "::1", "10.128.0.0/9"]
    found = load("agent", "allowed_ips = " + separator.join(parts)).allowed_ips
    assert found == tuple(map(ipaddress.ip_network, parts))


@pytest.mark.parametrize(
    "text", ["10.0.0.1/8", "10.0.0.0/33", "host.example", "300.1.1.1", "10.0.0.0/8;::1", "1"]
)
def test_what_is_not_a_network_is_refused_and_never_ignored(text, load):
    message = refused(load, "agent", "allowed_ips = " + text)
    assert message.startswith("c.conf:1: `allowed_ips` expects addresses or prefixes")


def test_addresses_to_listen_on_are_many_and_of_both_families(load):
    assert load("agent", "bind = 127.0.0.1, ::1").bind == ("127.0.0.1", "::1")
    assert "`bind` expects IP addresses" in refused(load, "agent", "bind = localhost")


@pytest.mark.parametrize(
    "key, text", [("cert", "agent.crt"), ("cert", ""), ("auth_hook", "./hook"), ("key", "~/key")]
)
def test_paths_are_absolute(key, text, load):
    assert "`%s` expects an absolute path" % key in refused(load, "agent", "%s = %s" % (key, text))


def test_script_dirs_is_a_list_with_colons(load):
    assert load("agent", "script_dirs = /opt/a:/opt/b/").script_dirs == ("/opt/a", "/opt/b")
    assert "`script_dirs` expects" in refused(load, "agent", "script_dirs = /opt/a:b")


@pytest.mark.parametrize(
    "line, expected",
    [
        ("key_type = dsa", "ec or rsa"),
        ("api_auth_default = maybe", "deny or allow"),
        ("dispatcher_id = a b", "a name of letters"),
        ("dispatcher_id = ../x", "a name of letters"),
    ],
)
def test_words_from_a_list_are_checked_against_it(line, expected, load):
    assert "expects " + expected in refused(load, "dispatcher", line)


# --- the file -------------------------------------------------------------------------------------------


def test_an_error_names_file_line_key_expectation_and_value(load):
    message = refused(load, "agent", "# a comment\n\nport = 7443\nmax_connections = many\n")
    assert message == "c.conf:4: `max_connections` expects a whole number from 1 to 1000000000, not `many`"


def test_blanks_comments_and_windows_line_ends_do_not_matter(load):
    config = load("agent", "\r\n  # port = 1\r\n\t port=7000\t\r\n\r\nscript_timeout   =   5")
    assert (config.port, config.script_timeout) == (7000, 5)


def test_a_hash_within_a_value_is_part_of_it(load):
    assert load("agent", "key = /a/b#c").key == "/a/b#c"
    assert "`port` expects" in refused(load, "agent", "port = 7443 # the port")


@pytest.mark.parametrize("line", ["port", "= 5", "[tags", "port: 5", "]", "[]"])
def test_a_line_that_is_no_entry_is_refused(line, load):
    assert refused(load, "agent", "port = 1\n%s\n" % line).startswith("c.conf:2: expected `key = value`")


def test_a_value_may_hold_an_equals_sign(load):
    assert load("agent", "key = /a=b").key == "/a=b"


def test_errors_never_carry_control_characters(load):
    for text in ("port = \x1b[2J", "[\x1b[2J]", "[\x1b2J]", "[tags]\n\x1b = 1", "[profile p]\n\x1b = 1"):
        with pytest.raises(ConfigError) as caught:
            load("agent", text)
        assert "\x1b" not in caught.value.message
    assert "\x1b" not in load("agent", "\x1bport = 1").warnings[0]


@pytest.mark.parametrize("data", [b"port = \xff", b"\xe9 = 1"])
def test_a_file_that_is_not_utf_8_is_a_configuration_error(data, load):
    assert "not UTF-8" in refused(load, "agent", data)


def test_a_nul_is_a_configuration_error(load):
    assert "c.conf:1: a NUL character" in refused(load, "agent", "run_as = a\0b")


def test_a_file_that_was_named_must_be_there_and_be_a_file(tmp_path):
    for name in ("none", "."):
        with pytest.raises(ConfigError, match=re.escape(str(tmp_path / name))):
            load_config("agent", str(tmp_path / name))


@pytest.mark.parametrize(
    "role, word, near",
    [
        ("dispatcher", "prot", "port"),
        ("agent", "max_conections", "max_connections"),
        ("agent", "max_outputs", "max_output"),
    ],
)
def test_an_unknown_key_warns_with_the_nearest_known_one(role, word, near, load):
    config = load(role, "\n%s = 5\n" % word)
    (warning,) = config.warnings
    assert re.search(r"/c\.conf:2: unknown key `%s`; did you mean .*\b%s\b" % (word, near), warning)
    assert values_of(config) == values_of(load(role, ""))


def test_an_unknown_key_like_none_warns_without_a_guess(load):
    (warning,) = load("agent", "zzzzqqqq = 5").warnings
    assert warning.endswith("c.conf:1: unknown key `zzzzqqqq`")


def test_a_key_of_the_other_role_is_unknown(load):
    assert "unknown key `max_parallel`" in load("agent", "max_parallel = 3").warnings[0]


def test_a_key_set_twice_is_an_error_that_names_both_lines(load):
    message = refused(load, "agent", "port = 1\n\nport = 1\n")
    assert message == "c.conf:3: `port` was set before, at line 1"
    assert "c.conf:3: " in refused(load, "agent", "[tags]\na = 1\na = 2\n")
    assert "c.conf:4: " in refused(load, "agent", "[profile p]\nnice = 1\n\nnice = 2\n")
    assert "c.conf:2: " in refused(load, "agent", "[profile p]\n[profile p]\n")


@pytest.mark.parametrize("role, older, key, text, value", OLDER)
def test_a_key_may_have_its_older_name(role, older, key, text, value, load):
    config = load(role, "%s = %s" % (older, text))
    assert getattr(config, key) == value
    assert config.warnings == ()


@pytest.mark.parametrize("role, older, key, text, value", OLDER)
def test_a_key_under_both_its_names_is_an_error(role, older, key, text, value, load):
    for names in ((older, key), (key, older)):
        message = refused(load, role, "%s = %s\n%s = %s\n" % (names[0], text, names[1], text))
        assert message.startswith("c.conf:2: `%s` was set before" % names[1])


def test_tags_are_text_by_name(load):
    config = load("agent", "port = 1\n[tags]\nsite = north\nrole.x = db = 1\nempty =\n")
    assert config.tags == {"site": "north", "role.x": "db = 1", "empty": ""}
    assert "c.conf:2: `a b` is not a tag name" in refused(load, "agent", "[tags]\na b = 1\n")


def test_profiles_have_their_own_keys(load):
    text = "[profile a]\ntimeout = 5\nrun_as = nobody\n[ profile   b ]\nmemory = 1G\n[tags]\nsite = 5\n"
    config = load("agent", text)
    assert config.profiles["a"] == {**DEFAULTS["profile"], "timeout": 5, "run_as": "nobody"}
    assert config.profiles["b"] == {**DEFAULTS["profile"], "memory": 1024**3}
    assert config.port == 7443
    assert config.tags == {"site": "5"}


def test_an_unknown_key_in_a_profile_is_an_error(load):
    message = refused(load, "agent", "[profile p]\ntime_out = 5\n")
    assert message.startswith("c.conf:2: unknown key `time_out`; did you mean timeout")
    assert "unknown key `port`" in refused(load, "agent", "[profile p]\nport = 5\n")


@pytest.mark.parametrize("heading", ["[profile]", "[profile a b]", "[profile ../x]", "[profile \u00e4]"])
def test_a_profile_has_a_plain_name(heading, load):
    assert refused(load, "agent", heading).startswith("c.conf:1: expected [profile NAME]")


@pytest.mark.parametrize(
    "role, heading",
    [("agent", "[Tags]"), ("agent", "[other]"), ("dispatcher", "[tags]"), ("dispatcher", "[profile p]")],
)
def test_an_unknown_section_is_an_error(role, heading, load):
    assert refused(load, role, "\n" + heading).startswith("c.conf:2: unknown section [")


@pytest.mark.parametrize("role", ROLES)
def test_root_moves_default_paths_and_nothing_else(role, load, tmp_path):
    root = str(tmp_path / "r")
    plain, moved = values_of(load(role, "")), values_of(load(role, "", root))
    paths = {key for key, value in plain.items() if isinstance(value, str) and value.startswith("/")}
    assert {"cert", "key", "ca", "runs_dir"} <= paths
    for key, value in plain.items():
        assert moved[key] == (root + value if key in paths else value)


def test_root_leaves_a_path_that_the_file_gives(load, tmp_path):
    config = load("agent", "cert = /srv/a.crt\nauth_hook = /srv/hook\nscript_dirs = /srv\n", str(tmp_path))
    assert (config.cert, config.auth_hook, config.script_dirs) == ("/srv/a.crt", "/srv/hook", ("/srv",))
    assert config.key == str(tmp_path) + "/etc/ctrl-exec-agent/agent.key"


def test_the_default_file_is_looked_for_below_root(tmp_path):
    assert load_config("agent", "", str(tmp_path)).port == 7443
    (tmp_path / "etc" / "ctrl-exec-agent").mkdir(parents=True)
    (tmp_path / "etc" / "ctrl-exec-agent" / "agent.conf").write_text("port = 7000")
    assert load_config("agent", "", str(tmp_path)).port == 7000


# --- the example ----------------------------------------------------------------------------------------


def example_parts():
    """The part of conf.example for each role."""
    with open(EXAMPLE, encoding="ascii") as file:
        text = file.read()
    at = text.index("# ==== /etc/ctrl-exec-agent/agent.conf")
    return {"dispatcher": text[:at], "agent": text[at:]}


def uncomment(text):
    """Every line that is commented out, and not a comment in words, put into force."""
    return re.sub(r"(?m)^#(?=[a-z_]+ =|\[)", "", text)


def test_the_example_file_is_what_the_program_prints():
    printed = b""
    for role in ROLES:
        argv = [sys.executable, "-I", support.PROGRAM, "conf-example", role]
        done = subprocess.run(argv, capture_output=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, b"")
        assert done.stdout.decode("ascii") == render_example(role) + "\n"
        printed += done.stdout
    with open(EXAMPLE, "rb") as file:
        assert file.read() == printed


@ROWS
def test_the_example_explains_every_key(row):
    text = example_parts()["dispatcher" if row.role == "dispatcher" else "agent"]
    line = ("#%s = %s" % (row.key, row.default)).rstrip()
    before = [text.split("\n")[at - 1] for at, one in enumerate(text.split("\n")) if one == line]
    about = "# " + row.help + (" (older name: %s)" % row.older if row.older else "")
    assert about in before


@pytest.mark.parametrize("role", ROLES)
def test_the_example_as_it_is_changes_nothing(role, load):
    config = load(role, example_parts()[role])
    assert values_of(config) == values_of(load(role, ""))
    assert (config.tags, config.profiles, config.warnings) == ({}, {}, ())


@pytest.mark.parametrize("role", ROLES)
def test_uncommenting_every_line_of_the_example_yields_the_defaults(role, load):
    text = uncomment(example_parts()[role])
    keys = re.findall(r"(?m)^([a-z_]+) =", text)
    roles = ("agent", "profile") if role == "agent" else (role,)
    rows = [row.key for row in ctrl_exec.SETTINGS if row.role in roles]
    assert sorted(keys) == sorted(rows + (["site"] if role == "agent" else []))
    config = load(role, text)
    assert values_of(config) == values_of(load(role, ""))
    assert config.warnings == ()
    if role == "agent":
        assert config.tags == {"site": "north"}
        assert config.profiles == {"example": DEFAULTS["profile"]}


# --- in the program -------------------------------------------------------------------------------------


def test_a_daemon_with_a_broken_configuration_exits_78_with_one_message(tmp_path):
    host = support.Host(tmp_path / "h", "h")
    host.configure("max_connections = many\n")
    done = host.run("serve")
    assert done.returncode == 78
    assert done.out == ""
    path = host.file(ctrl_exec.AGENT_ETC + "/agent.conf")
    expected = "%s:3: `max_connections` expects a whole number from 1 to 1000000000, not `many`" % path
    assert done.err == "cea: %s\n" % expected
    assert not host.is_up()


def test_a_reload_of_a_broken_configuration_keeps_the_old_one_and_says_so(fresh):
    shared = fresh("solo")
    host = shared["solo"]
    answer = {"script": "hello", "args": [], "reqid": "r1"}
    context = support.dispatcher_context(shared.control)
    host.configure("rate_limit_disable = yes\nmax_connections = many\n")
    line = host.reload()
    assert 'RESULT="kept the old configuration"' in line
    assert "agent.conf:4: `max_connections` expects" in line
    assert host.process.poll() is None
    status, reply = support.post(host.port, context, "/run", answer)
    assert (status, reply["stdout"], reply["exit"]) == (200, "hello\n", 0)
    host.configure("rate_limit_disable = yes\n[tags]\nsite = new\n")
    assert "RESULT=ok" in host.reload()
    status, reply = shared.control.json("discovery", "solo")
    assert status == 0 and '"site": "new"' in json.dumps(reply)


def test_an_unknown_key_is_an_event_at_start_and_does_not_stop_the_agent(fresh):
    shared = fresh("solo", start=False)
    host = shared["solo"]
    host.configure("rate_limit_disable = yes\nmax_conections = 5\n")
    host.start()
    (line,) = host.events("config-warn")
    assert "agent.conf:4: unknown key `max_conections`; did you mean max_connections" in line


def test_an_unknown_key_is_a_warning_of_each_command(tmp_path):
    control = support.Control(tmp_path / "c", "max_paralel = 5\n", set_up=False)
    done = control.run("list-agents")
    assert done.returncode == 0
    assert "ctrl-exec.conf:2: unknown key `max_paralel`; did you mean max_parallel" in done.err


def test_a_broken_configuration_stops_a_command_with_78(tmp_path):
    control = support.Control(tmp_path / "c", set_up=False)
    control.put(ctrl_exec.ETC + "/ctrl-exec.conf", "port = x\n")
    done = control.run("list-agents")
    assert done.returncode == 78
    assert done.out == "" and "ctrl-exec.conf:1: `port` expects" in done.err


def test_a_root_from_the_environment_counts_as_the_option_does(tmp_path):
    (tmp_path / "r" / "etc" / "ctrl-exec").mkdir(parents=True)
    (tmp_path / "r" / "etc" / "ctrl-exec" / "ctrl-exec.conf").write_text("port = bad\n")
    program = [sys.executable, "-I", support.PROGRAM, "dispatcher"]
    environment = {"PATH": ctrl_exec.SAFE_PATH}
    for words, root in ((["--root", "r"], ""), ([], str(tmp_path / "r"))):
        done = subprocess.run(
            [*program, *words, "list-agents"], env={**environment, "CTRL_EXEC_ROOT": root},
            cwd=str(tmp_path), capture_output=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 78, done.stderr
        assert b"r/etc/ctrl-exec/ctrl-exec.conf:1: `port` expects" in done.stderr


def test_a_relative_root_from_the_environment_is_taken_from_the_working_directory(tmp_path):
    argv = [sys.executable, "-I", support.PROGRAM, "dispatcher", "list-agents"]
    environment = {"PATH": ctrl_exec.SAFE_PATH, "CTRL_EXEC_ROOT": "here"}
    done = subprocess.run(argv, env=environment, cwd=str(tmp_path), capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
    assert os.listdir(str(tmp_path)) in ([], ["here"])
