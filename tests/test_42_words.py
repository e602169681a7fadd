"""What an operator writes means what it says: keys, links, tags, names, addresses, modes, the order of history."""

import os
import subprocess

import pytest

import ctrl_exec
import support

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: files of several users")


@pytest.fixture
def load(tmp_path):
    """A function that loads a configuration text."""

    def load_text(role, text):
        path = tmp_path / "c.conf"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return ctrl_exec.load_config(role, str(path), str(tmp_path))

    return load_text


def refusal(load, role, text):
    with pytest.raises(ctrl_exec.ConfigError) as caught:
        load(role, text)
    return caught.value.message


# --- keys -----------------------------------------------------------------------------------------------

AGENT_KEYS = [row.key for row in ctrl_exec.SETTINGS if row.role == "agent"]
PROFILE_KEYS = [row.key for row in ctrl_exec.SETTINGS if row.role == "profile"]


@pytest.mark.parametrize("key", [*AGENT_KEYS, *PROFILE_KEYS, "max_children", "async_runs_dir"])
def test_a_key_below_tags_is_an_error_and_no_tag(load, key):
    message = refusal(load, "agent", "[tags]\nsite = north\n%s = 1\n" % key)
    assert "c.conf:3: unknown key `%s` here: it belongs" % key in message


@pytest.mark.parametrize("key", sorted(set(AGENT_KEYS) - set(PROFILE_KEYS)))
def test_a_key_of_the_agent_in_a_profile_is_an_error(load, key):
    assert "above all sections" in refusal(load, "agent", "[profile p]\n%s = 1\n" % key)


@pytest.mark.parametrize("key", sorted(set(PROFILE_KEYS) - set(AGENT_KEYS)))
def test_a_key_of_a_profile_above_all_sections_is_an_error(load, key):
    assert "in a section [profile NAME]" in refusal(load, "agent", "%s = 1\n" % key)


def test_a_guard_in_the_file_of_the_other_role_is_an_error(load):
    assert "of agent.conf" in refusal(load, "dispatcher", "allowed_ips = 10.0.0.0/8\n")
    assert "in ctrl-exec.conf" in refusal(load, "agent", "api_auth_default = deny\n")
    assert load("dispatcher", "max_output = 5\n").warnings  # no guard: a warning will do


@pytest.mark.parametrize(
    "role, word, meant",
    [
        ("agent", "allow_ips", "allowed_ips"), ("agent", "allowed_ip", "allowed_ips"),
        ("agent", "Allowed-IPs", "allowed_ips"), ("agent", "authhook", "auth_hook"),
        ("agent", "auth-hook", "auth_hook"), ("agent", "script_dir", "script_dirs"),
        ("agent", "strictmodes", "strict_modes"), ("agent", "revoked_serial", "revoked_serials"),
        ("agent", "rate_limit_volumes", "rate_limit_volume"), ("agent", "ratelimit_probe", "rate_limit_probe"),
        ("dispatcher", "auth_hooks", "auth_hook"), ("dispatcher", "api_auth_defaults", "api_auth_default"),
        ("agent", "binds", "bind"), ("agent", "rate_limits", "rate_limit_"), ("agent", "revoked_list", "revoked_serials"),
        ("dispatcher", "api_certs", "api_cert"),
    ],
)  # fmt: skip
def test_a_guard_that_is_misspelt_is_an_error(load, role, word, meant):
    assert "unknown key `%s`; did you mean %s" % (word, meant) in refusal(load, role, word + " = 1\n")


@pytest.mark.parametrize("word", ["allowed_ip", "Allowed-IPs", "strict_mode", "auth_hooks"])
def test_a_guard_that_is_misspelt_below_tags_is_no_tag(load, word):
    assert "did you mean" in refusal(load, "agent", "[tags]\n%s = 1\n" % word)


@pytest.mark.parametrize("line", ["allowed_ips = ,", "bind = , ,"])
def test_a_list_of_nothing_but_separators_is_no_empty_list(load, line):
    assert "nothing is in the list" in refusal(load, "agent", line + "\n")


@pytest.mark.parametrize("key", ["auth_hook", "script_dirs", "revoked_serials", "trusted_dispatchers_path"])
def test_a_guard_in_the_allowlist_is_no_script(tmp_path, key):
    path = tmp_path / "scripts.conf"
    path.write_text("%s = /bin/true\n" % key)
    with pytest.raises(ctrl_exec.ConfigError, match="is a key of agent.conf, and no name for a script"):
        ctrl_exec.load_allowlist(str(path), ctrl_exec.build_profiles({}))


def test_a_mark_at_the_beginning_of_a_file_is_skipped(load, tmp_path):
    mark = b"\xef\xbb\xbf"
    assert load("agent", mark + b"allowed_ips = 10.0.0.0/8\n").allowed_ips
    path = str(tmp_path / "file")
    for text, read in (
        (b"abc  # one\n", ctrl_exec.load_revoked),
        (b"abc control\n", ctrl_exec.load_trust_map),
        (b'{"a": 1}', ctrl_exec.read_json_file),
    ):
        answers = []
        for data in (text, mark + text):
            with open(path, "wb") as file:
                file.write(data)
            answers.append(read(path))
        assert answers[0] == answers[1] and answers[0]
    with open(path, "wb") as file:
        file.write(mark + b"up = /usr/bin/uptime\n")
    assert "up" in ctrl_exec.load_allowlist(path, ctrl_exec.build_profiles({}))[0]


# --- links ----------------------------------------------------------------------------------------------


def test_a_revocation_list_that_leads_nowhere_refuses_everybody(fresh):
    deployment = fresh()
    solo, control = deployment["solo"], deployment.control
    for path in (solo.config.revoked_serials, control.config.revoked_serials):
        os.symlink("gone", path)
    assert control.json("ping", "solo")[0] == 1
    done = control.run("ping", "solo")
    assert "leads to a file that is not there" in done.out + done.err
    os.unlink(control.config.revoked_serials)
    solo.reload()
    assert control.json("ping", "solo")[1]["results"][0]["status"] == "refused"
    assert any("leads to a file" in line for line in solo.events("deny"))
    os.symlink("gone", control.config.revoked_serials)
    for program, verb in ((solo, "self-check"), (control, "check")):
        status, shown = program.json(verb)
        assert status == 1
        assert any(one["level"] == "FAIL" and "leads to a file" in one["what"] for one in shown["findings"])


def test_a_trust_map_that_leads_nowhere_is_not_an_older_release(tmp_path):
    os.symlink("gone", str(tmp_path / "map"))
    (tmp_path / "older").write_text("ABCDEF\n")
    with pytest.raises(ctrl_exec.TrustError, match="leads to a file"):
        ctrl_exec.load_trust_map(str(tmp_path / "map"), str(tmp_path / "older"))


def test_revoke_and_edit_agent_change_the_file_that_a_link_leads_to(fresh):
    deployment = fresh(start=False)
    control = deployment.control
    shared = os.path.join(control.root, "shared")
    os.mkdir(shared)
    entry = os.path.join(control.config.registry_dir, "solo.json")
    for path in (entry, control.config.revoked_serials):
        real = os.path.join(shared, os.path.basename(path))
        if os.path.exists(path):
            os.rename(path, real)
        else:
            open(real, "w").close()
        os.symlink(real, path)
    assert control.run("edit-agent", "solo", "--ip", "127.0.0.9").returncode == 0
    assert control.run("revoke", "solo").returncode == 0
    for path in (entry, control.config.revoked_serials):
        assert os.path.islink(path)
    assert ctrl_exec.find_agent(control.config.registry_dir, "solo").ip == "127.0.0.9"
    assert ctrl_exec.load_revoked(os.path.join(shared, "revoked-serials"))


# --- hosts and tags -------------------------------------------------------------------------------------


def agent(name, ip="10.0.0.1", **tags):
    return ctrl_exec.Agent(name, name, ip, 7443, "ip", name, tags=tags)


@pytest.fixture
def registry(tmp_path):
    directory = str(tmp_path / "agents")
    for one in (
        agent("web-01", rack="a", site="north"), agent("web-02", rack="b", site="north"), agent("bare"),
        agent("db-01.example.com", rack="None"),
    ):  # fmt: skip
        with ctrl_exec.registry_lock(directory):
            ctrl_exec.save_agent(directory, one)
    return directory


def chosen(directory, *words, tags=()):
    selection = ctrl_exec.Selection(words, not words, tuple(tags))
    return [one.name for one in ctrl_exec.select_agents(directory, selection)[0]]


def test_a_host_without_a_tag_never_matches(registry):
    assert chosen(registry, tags=[("rack", "None")]) == ["db-01.example.com"]
    with pytest.raises(ctrl_exec.UnknownHost):
        chosen(registry, tags=[("zone", "None")])


def test_all_tags_of_all_options_hold(registry):
    assert ctrl_exec._parse_tags(["rack=a,site=north", "rack=b"]) == (
        ("rack", "a"), ("site", "north"), ("rack", "b"),
    )  # fmt: skip
    with pytest.raises(ctrl_exec.UnknownHost):
        chosen(registry, tags=ctrl_exec._parse_tags(["rack=a", "rack=b"]))
    assert chosen(registry, tags=ctrl_exec._parse_tags(["rack=a", "site=north"])) == ["web-01"]


@pytest.mark.parametrize("word", ["web-[01..02]", "web-[0-2/2]", "web-[1-3, 10]", "web-[!0]*", "[wd]*", "web-[", "a]"])
def test_a_bracket_that_is_no_range_is_an_error(registry, word):
    with pytest.raises(ctrl_exec.UsageError, match="range"):
        chosen(registry, word)


def test_a_large_file_of_hosts_is_read_whole(tmp_path, fresh):
    control = fresh(start=False).control
    listing = tmp_path / "hosts"
    listing.write_text("solo\n" * 300_000 + "the-last-name\n")
    done = control.run("ping", "-f", str(listing))
    assert done.returncode == 2 and "unknown host: the-last-name" in done.err


# --- names and addresses --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "word, name",
    [
        ("WEB-01", "web-01"), ("web-01.", "web-01"), ("Web-01.Example.COM", "web-01"),
        ("db-01", "db-01.example.com"), ("DB-01.example.com.", "db-01.example.com"),
    ],
)  # fmt: skip
def test_another_spelling_of_a_name_gets_the_right_suggestion_and_is_taken(registry, word, name):
    with pytest.raises(ctrl_exec.UnknownHost) as caught:
        chosen(registry, word)
    assert caught.value.message.endswith("; did you mean %s?" % name)
    with pytest.raises(ctrl_exec.TrustError, match="is paired already"):
        ctrl_exec.check_free_name(registry, word)


def test_names_of_other_domains_are_other_hosts(registry):
    ctrl_exec.check_free_name(registry, "db-01.example.org")


@pytest.mark.parametrize("word", ["::1", "[::1]", "10.0.0.1", "fe80::1%eth0"])
def test_an_address_as_a_host_says_something(fresh, word):
    done = fresh(start=False).control.run("ping", word)
    assert done.returncode == 2 and "is an address, and hosts are named as they are registered" in done.err


def test_a_host_is_not_renamed_to_an_address(fresh):
    deployment = fresh(start=False)
    done = deployment.control.run("edit-agent", "solo", "--rename", "10.0.0.5")
    assert done.returncode == 2 and "10.0.0.5 is not a host name" in done.err
    assert deployment.control.run("list-agents", "--json").out.count("10.0.0.5") == 0


@pytest.mark.parametrize("text", [",", " ", "10.0.0.1 ", "10.0.0.1,10.0.0.2", "10.0.0.1/8", "1.2.3", "::g", "fe80::1%", "a\n"])
def test_what_is_no_address_is_refused_when_it_is_given(fresh, text):
    deployment = fresh(start=False)
    with pytest.raises(ctrl_exec.UsageError):
        ctrl_exec.check_ip_address(text)
    assert deployment.control.run("edit-agent", "solo", "--ip", text).returncode == 2
    done = deployment["solo"].run("request-pairing", "--dispatcher", "127.0.0.1:1", "--ip", text)
    assert done.returncode == 2 and "is not an IP address" in done.err
    fields = {"hostname": "h", "nonce": "0" * 64, "lookup_by": "", "version": "1", "ip": text}
    with pytest.raises(ctrl_exec.BadRequest):
        ctrl_exec._check_offer(fields, "")


def test_an_address_is_no_name_for_a_host(fresh):
    deployment = fresh(start=False)
    done = deployment["solo"].run("request-pairing", "--dispatcher", "127.0.0.1:1", "--name", "10.0.0.9")
    assert done.returncode == 2 and "10.0.0.9 is not a host name" in done.err
    fields = {"hostname": "10.0.0.9", "nonce": "0" * 64, "lookup_by": "", "version": "1", "ip": ""}
    with pytest.raises(ctrl_exec.BadRequest, match="hostname"):
        ctrl_exec._check_offer(fields, "")


def test_self_check_finds_an_address_that_is_not_up():
    (finding,) = ctrl_exec.check_addresses(("127.0.0.1", "192.0.2.77"))
    assert finding.level == "FAIL" and "192.0.2.77" in finding.what


@pytest.mark.parametrize("text", ["10.0.0.1", "::1", "fe80::1%eth0", "2001:db8::2", ""])
def test_addresses_of_both_families_and_zones_are_taken(fresh, text):
    ctrl_exec.check_ip_address(text)
    if text:
        assert fresh(start=False).control.run("edit-agent", "solo", "--ip", text).returncode == 0
        assert ctrl_exec.parse_addresses(text) == (text,)


@pytest.mark.parametrize(
    "text, meant",
    [
        ("[::1]:7444", ("::1", "7444")), ("[::1]", ("::1", "")), ("::1", ("::1", "")),
        ("host:7", ("host", "7")), ("host", ("host", "")), ("10.0.0.1:7", ("10.0.0.1", "7")),
        ("[fe80::1%eth0]:7", ("fe80::1%eth0", "7")),
    ],
)  # fmt: skip
def test_where_pairing_mode_runs_may_be_any_address(text, meant):
    assert ctrl_exec._split_address(text) == meant


@pytest.mark.parametrize("text", ["", ":7444", "a b", "[::1", "[::1]7", "[::1]:", "http://x", "::g", "a,b"])
def test_what_is_no_place_of_pairing_mode_is_refused(fresh, text):
    done = fresh(start=False)["solo"].run("request-pairing", "--dispatcher=" + text)
    assert done.returncode == 2 and len(done.err.splitlines()) <= 2, done.err


# --- modes ----------------------------------------------------------------------------------------------


def test_a_dot_in_a_link_does_not_hide_where_it_leads(tmp_path):
    os.chmod(str(tmp_path), 0o755)
    for name in ("checked", "run"):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(0o755)
        (tmp_path / name / "script").write_text("#!/bin/sh\n")
        (tmp_path / name / "script").chmod(0o755)
    (tmp_path / "run" / "script").chmod(0o777)
    (tmp_path / "checked" / "link").symlink_to("./../run/script")
    with pytest.raises(ctrl_exec.ScriptRefused, match="run/script is writable by everybody"):
        ctrl_exec.check_modes(str(tmp_path / "checked" / "link"))


ACLS = pytest.mark.parametrize(
    "acl, is_refused",
    [
        ("u:nobody:rw", True), ("g:nogroup:rw", True), ("u:nobody:rwx,m::rx", False), ("u:nobody:r", False),
        ("u:nobody:r,g::rw,m::rw", True), ("u:nobody:r,o::rw", True), ("m::rwx,g::rx,u:nobody:rx", False),
    ],
)  # fmt: skip


@needs_root
@ACLS
@pytest.mark.parametrize("what", ["script", "directory", "hook", "configuration"])
def test_an_acl_that_grants_write_is_refused(fresh, tmp_path, acl, is_refused, what):
    deployment = fresh(start=False)
    solo = deployment["solo"]
    script, hook = solo.script("mine", "echo\n"), solo.put(ctrl_exec.AGENT_ETC + "/auth-hook", "#!/bin/sh\n", 0o755)
    path = {"script": script, "directory": os.path.dirname(script), "hook": hook, "configuration": solo.config.path}
    done = subprocess.run(["setfacl", "-m", acl, path[what]], capture_output=True)
    if done.returncode:
        pytest.fail("this file system has no ACLs: %s" % done.stderr)
    status, shown = solo.json("self-check")
    faults = [one["what"] for one in shown["findings"] if one["level"] == "FAIL" and "ACL" in one["what"]]
    os.chmod(path[what], os.stat(path[what]).st_mode)
    assert bool(faults) == is_refused, shown
    if not is_refused and what != "configuration":
        assert not ctrl_exec._acl_grants_write(path[what])


# --- history --------------------------------------------------------------------------------------------


def test_history_is_in_the_order_of_starting_within_a_second_too(deployment):
    control = deployment.control
    began = [control.json("run", "alpha", "hello")[1]["reqid"] for _ in range(8)]
    shown = [run["reqid"] for run in control.json("history")[1]["runs"]]
    assert [reqid for reqid in shown if reqid in began] == began[::-1]
    (last,) = control.json("history", "--last", "1")[1]["runs"]
    assert last["reqid"] == began[-1]


# --- small things that were not what they said ----------------------------------------------------------


def test_a_file_name_that_steers_a_terminal_is_shown_as_text(fresh):
    control = fresh(start=False).control
    with open(os.path.join(control.config.registry_dir, "x\033[2Jy.json"), "w", encoding="ascii") as file:
        file.write("{")
    done = control.run("list-agents")
    assert "\033" not in done.out + done.err


def test_a_reload_that_fails_leaves_self_ping_as_it_was(fresh):
    deployment = fresh(start=False)
    solo = deployment["solo"]
    solo.configure("rate_limit_volume = 2/60/300\n")
    solo.start()
    solo.allow("broken line\n")
    assert "kept the old" in solo.reload()
    before = len(solo.events("rate-block"))
    for _ in range(5):
        assert solo.run("self-ping").returncode == 0
    assert len(solo.events("rate-block")) == before


def test_a_fan_out_goes_on_with_the_threads_that_it_has(monkeypatch):
    import threading

    real, started = threading.Thread.start, []

    def start(self):
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(self)
        real(self)

    monkeypatch.setattr(threading.Thread, "start", start)
    done = list(ctrl_exec.fan_out(list(range(20)), lambda one: one, 8))
    assert sorted(done) == list(range(20)) and len(started) == 2
