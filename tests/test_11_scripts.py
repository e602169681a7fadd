"""What may run: the allowlist, its sidecars, the modes of files, and the profiles scripts run under."""

import hashlib
import json
import os
import re
import subprocess
import sys

import pytest

import ctrl_exec
import support
from support import IS_ROOT

needs_root = pytest.mark.skipif(not IS_ROOT, reason="only root can give a file or a process to another user")
NOBODY = 65534


def profile(name="p", **values):
    """A profile with its defaults."""
    return ctrl_exec.Profile(name, **dict(ctrl_exec.complete_profile({}), **values))


def load(tmp_path, text, **profiles):
    """Load an allowlist with this text: (scripts, warnings)."""
    path = tmp_path / "scripts.conf"
    path.write_text(text, encoding="utf-8")
    known = {name: ctrl_exec.complete_profile(values) for name, values in profiles.items()}
    return ctrl_exec.load_allowlist(str(path), ctrl_exec.build_profiles(known))


def refusal(tmp_path, text, **profiles):
    """The message with which an allowlist of this text is refused."""
    with pytest.raises(ctrl_exec.ConfigError) as caught:
        load(tmp_path, text, **profiles)
    return caught.value.message


def new_script(path, body="echo inside\n", mode=0o755):
    os.makedirs(os.path.dirname(str(path)), exist_ok=True)
    with open(str(path), "w", encoding="ascii") as file:
        file.write("#!/bin/sh\n" + body)
    os.chmod(str(path), mode)
    return str(path)


def listed(path, **values):
    """An allowlist entry for a path."""
    return ctrl_exec.Script("s", str(path), profile(), values.get("timeout", 0), 1)


def why_refused(path, script_dirs=(), strict=True):
    with pytest.raises(ctrl_exec.ScriptRefused) as caught:
        ctrl_exec.check_script(listed(path), tuple(script_dirs), strict)
    return caught.value.message


def group_writable(path):
    """Let a group that is not root's write."""
    if IS_ROOT:
        os.chown(str(path), -1, NOBODY)
    os.chmod(str(path), os.stat(str(path)).st_mode | 0o020)


# --- the allowlist's grammar ----------------------------------------------------------------------------


def test_a_line_with_all_options_is_read(tmp_path):
    text = "# what may run\n\n a-B_9 = /opt/x.sh profile=web timeout=30 max_running=4 \n"
    scripts, warnings = load(tmp_path, text, web={"nice": 5})
    script = scripts["a-B_9"]
    assert (script.path, script.timeout, script.max_running) == ("/opt/x.sh", 30, 4)
    assert (script.profile.name, script.profile.nice) == ("web", 5)
    assert list(scripts) == ["a-B_9"] and warnings == ()


def test_a_line_without_options_has_the_defaults(tmp_path):
    script = load(tmp_path, "s=/x\n")[0]["s"]
    assert (script.path, script.timeout, script.max_running) == ("/x", 0, 1)
    assert (script.schema, script.schema_version) == (None, "")
    assert script.profile._replace(name="") == profile("")


def test_a_path_may_have_spaces_and_equals_signs(tmp_path):
    text = "a = /opt/my dir/the script.sh timeout=5\nb = /opt/a=b/x y\nc = /opt/dir with/two  blanks\n"
    scripts = load(tmp_path, text)[0]
    assert [scripts[name].path for name in "abc"] == [
        "/opt/my dir/the script.sh", "/opt/a=b/x y", "/opt/dir with/two  blanks",
    ]  # fmt: skip
    assert scripts["a"].timeout == 5


def test_a_profile_called_default_is_the_one_of_lines_that_name_none(tmp_path):
    scripts = load(tmp_path, "a = /x\nb = /x profile=default\n", default={"nice": 7})[0]
    assert [scripts[name].profile.nice for name in "ab"] == [7, 7]


def test_a_missing_allowlist_allows_nothing_and_warns(tmp_path):
    scripts, warnings = ctrl_exec.load_allowlist(str(tmp_path / "none"), ctrl_exec.build_profiles({}))
    assert scripts == {} and "no script can run" in warnings[0] and str(tmp_path / "none") in warnings[0]


def test_an_empty_allowlist_allows_nothing(tmp_path):
    assert load(tmp_path, "# nothing\n") == ({}, ())


@pytest.mark.parametrize(
    "line, words",
    [
        ("backup", "expected `key = value`"),
        ("= /x", "expected `key = value`"),
        ("bad name = /x", "a script name is letters"),
        ("../x = /x", "a script name is letters"),
        ("ä = /x", "a script name is letters"),
        ("n\u0663 = /x", "a script name is letters"),
        ("s" * 129 + " = /x", "a script name is letters"),
        ("s = relative/path", "an absolute path"),
        ("s =", "an absolute path"),
        ("s = timeout=5", "an absolute path"),
        ("s = ~/x", "an absolute path"),
        ("s = /x profil=web", "did you mean profile"),
        ("s = /x color=red", "unknown option `color`"),
        ("s = /x profile=wbe", "did you mean web"),
        ("s = /x profile=", "no [profile ]"),
        ("s = /x timeout=", "`timeout` expects a whole number"),
        ("s = /x timeout=-1", "`timeout` expects a whole number"),
        ("s = /x timeout=+5", "`timeout` expects a whole number"),
        ("s = /x timeout=5s", "`timeout` expects a whole number"),
        ("s = /x timeout=5_0", "`timeout` expects a whole number"),
        ("s = /x timeout=\u0665", "`timeout` expects a whole number"),
        ("s = /x max_running=0", "`max_running` expects a whole number from 1"),
        ("s = /x max_running=many", "`max_running` expects a whole number from 1"),
        ("s = /x\0y", "a NUL character"),
        ("[tags]", "sections have no place here"),
    ],
)
def test_a_wrong_line_is_refused_with_file_and_line(tmp_path, line, words):
    message = refusal(tmp_path, "# one\nok = /x\n%s\n" % line, web={})
    assert message.startswith("%s:3: " % (tmp_path / "scripts.conf"))
    assert words in message
    assert message.isprintable()


def test_a_name_that_is_there_twice_is_refused(tmp_path):
    assert "scripts.conf:2: `a` is there twice" in refusal(tmp_path, "a = /x\na = /y\n")


def test_an_option_that_is_there_twice_is_refused(tmp_path):
    message = refusal(tmp_path, "a = /x timeout=5 timeout=500\n")
    assert "scripts.conf:1: " in message and "timeout" in message


def test_an_allowlist_that_is_not_utf8_is_a_configuration_error(tmp_path):
    (tmp_path / "scripts.conf").write_bytes(b"a = /x\xff\n")
    with pytest.raises(ctrl_exec.ConfigError, match="scripts.conf: not UTF-8 at byte 6"):
        ctrl_exec.load_allowlist(str(tmp_path / "scripts.conf"), ctrl_exec.build_profiles({}))


def test_a_control_character_in_a_name_is_shown_escaped(tmp_path):
    assert "\\x1b[31m" in refusal(tmp_path, "a\x1b[31m = /x\n")


# --- sidecars -------------------------------------------------------------------------------------------


def sidecar(tmp_path, data):
    """What loading a sidecar with this content gives: (schema, version)."""
    data = data if isinstance(data, bytes) else json.dumps(data).encode("ascii")
    (tmp_path / "s.schema.json").write_bytes(data)
    return ctrl_exec.load_sidecar(str(tmp_path / "s"))


def digest(text):
    return "sha256:" + hashlib.sha256(text.encode("ascii")).hexdigest()[:12]


def test_without_a_sidecar_there_is_no_schema(tmp_path):
    assert ctrl_exec.load_sidecar(str(tmp_path / "s")) == (None, "")


@pytest.mark.parametrize("version", ["1", "1.2.3", "v2_beta-1", "a" * 64, "sha256"])
def test_a_proper_version_is_the_schema_version(tmp_path, version):
    assert sidecar(tmp_path, {"version": version, "x": [1]}) == ({"version": version, "x": [1]}, version)


@pytest.mark.parametrize(
    "version", ["", "a" * 65, "1 2", "1\n", "ä", "sha256:abc", "1/2", 1, 1.5, None, True, ["1"], {"a": "1"}]
)
def test_any_other_version_gives_way_to_the_digest(tmp_path, version):
    schema = {"version": version}
    canonical = json.dumps(schema, separators=(",", ":"))
    assert sidecar(tmp_path, schema) == (schema, digest(canonical))


def test_the_digest_is_of_sorted_compact_ascii_json(tmp_path):
    data = '{ "b" : [1, 2],\n "a": {"z": "\u00e4", "y": null} }'.encode("utf-8")
    schema, version = sidecar(tmp_path, data)
    assert schema == {"b": [1, 2], "a": {"z": "\u00e4", "y": None}}
    assert version == digest('{"a":{"y":null,"z":"\\u00e4"},"b":[1,2]}')
    assert sidecar(tmp_path, b'{"a":{"z":"\\u00e4","y":null},"b":[1,2]}')[1] == version


def test_a_sidecar_of_64_kib_is_taken_and_a_byte_more_is_not(tmp_path):
    data = b'{"d":"%s"}' % (b"x" * (65536 - 8))
    assert len(data) == 65536
    assert sidecar(tmp_path, data)[0] == {"d": "x" * 65528}
    with pytest.raises(ValueError, match="larger than 65536 bytes"):
        sidecar(tmp_path, data + b" ")


BAD_SIDECARS = {
    "list": b"[1]",
    "text": b'"x"',
    "null": b"null",
    "empty": b"",
    "cut": b'{"a": ',
    "nan": b'{"a": NaN}',
    "huge": b'{"maximum": 1e999}',
    "twice": b'{"a": 1, "a": 2}',
    "deep": b'{"a":' * 2000 + b"1" + b"}" * 2000,
    "latin": b'{"a": "\xe4"}',
    "large": b'{"a":"' + b"x" * 65536 + b'"}',
}
# those that one agent has all at once; numbers without end have a test of their own there
REFUSED_SIDECARS = sorted(set(BAD_SIDECARS) - {"huge"})


@pytest.mark.parametrize("kind", sorted(BAD_SIDECARS))
def test_a_bad_sidecar_is_left_out_with_a_warning_and_its_script_stays(tmp_path, kind):
    path = str(tmp_path / "s")
    (tmp_path / "s.schema.json").write_bytes(BAD_SIDECARS[kind])
    scripts, warnings = load(tmp_path, "s = %s\n" % path)
    assert (scripts["s"].path, scripts["s"].schema, scripts["s"].schema_version) == (path, None, "")
    assert len(warnings) == 1 and warnings[0].startswith(path + ".schema.json: left out: ")


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: os.symlink(path, path)])
def test_a_sidecar_that_is_no_file_is_left_out(tmp_path, make):
    make(str(tmp_path / "s.schema.json"))
    scripts, warnings = load(tmp_path, "s = %s\n" % (tmp_path / "s"))
    assert scripts["s"].schema is None and "left out" in warnings[0]


# --- modes and owners -----------------------------------------------------------------------------------


def test_a_script_that_only_we_can_change_is_accepted(tmp_path):
    path = new_script(tmp_path / "bin" / "s")
    assert ctrl_exec.check_script(listed(path), (), True) == os.path.realpath(path)


def test_a_script_that_everybody_can_write_is_refused(tmp_path):
    path = new_script(tmp_path / "s", mode=0o757)
    assert why_refused(path) == "%s is writable by everybody (mode 0757)" % os.path.realpath(path)
    assert ctrl_exec.check_script(listed(path), (), False) == os.path.realpath(path)


def test_a_script_that_its_group_can_write_is_refused(tmp_path):
    path = new_script(tmp_path / "s")
    group_writable(path)
    assert why_refused(path) == "%s is writable by its group (mode 0775)" % os.path.realpath(path)


@pytest.mark.parametrize("open_to", ["everybody", "its group"])
def test_a_directory_above_it_that_others_can_write_is_refused(tmp_path, open_to):
    path = new_script(tmp_path / "open" / "closed" / "s")
    if open_to == "everybody":
        os.chmod(str(tmp_path / "open"), 0o777)
    else:
        group_writable(tmp_path / "open")
    assert why_refused(path).startswith("%s is writable by %s " % (tmp_path / "open", open_to))


def test_a_sticky_directory_that_all_can_write_is_accepted(tmp_path):
    path = new_script(tmp_path / "tmp" / "s")
    os.chmod(str(tmp_path / "tmp"), 0o1777)
    assert ctrl_exec.check_script(listed(path), (), True) == os.path.realpath(path)


def test_the_sticky_bit_on_a_file_excuses_nothing(tmp_path):
    path = new_script(tmp_path / "s", mode=0o1757)
    assert "is writable by everybody" in why_refused(path)


@needs_root
def test_a_script_of_another_user_is_refused(tmp_path):
    path = new_script(tmp_path / "s")
    os.chown(path, NOBODY, -1)
    assert "%s belongs to user %d" % (path, NOBODY) in why_refused(path)


@needs_root
def test_a_directory_of_another_user_above_a_script_is_refused(tmp_path):
    path = new_script(tmp_path / "theirs" / "s")
    os.chown(str(tmp_path / "theirs"), NOBODY, -1)
    assert "%s belongs to user %d" % (tmp_path / "theirs", NOBODY) in why_refused(path)


@needs_root
def test_a_symlink_of_another_user_in_a_sticky_directory_is_refused(tmp_path):
    target = new_script(tmp_path / "bin" / "s")
    os.mkdir(str(tmp_path / "tmp"))
    os.chmod(str(tmp_path / "tmp"), 0o1777)
    link = str(tmp_path / "tmp" / "s")
    os.symlink(target, link)
    os.chown(link, NOBODY, NOBODY, follow_symlinks=False)
    assert "%s belongs to user %d" % (link, NOBODY) in why_refused(link)


def test_a_symlink_to_a_sound_script_is_accepted_as_its_target(tmp_path):
    target = new_script(tmp_path / "bin" / "s")
    os.symlink(target, str(tmp_path / "link"))
    assert ctrl_exec.check_script(listed(tmp_path / "link"), (), True) == os.path.realpath(target)


def test_a_symlink_in_a_directory_that_all_can_write_is_refused(tmp_path):
    target = new_script(tmp_path / "bin" / "s")
    os.mkdir(str(tmp_path / "open"))
    os.chmod(str(tmp_path / "open"), 0o777)
    os.symlink(target, str(tmp_path / "open" / "s"))
    message = why_refused(tmp_path / "open" / "s")
    assert message.startswith("%s is writable by everybody" % (tmp_path / "open"))


def test_a_symlink_to_a_script_in_a_directory_that_all_can_write_is_refused(tmp_path):
    target = new_script(tmp_path / "open" / "s")
    os.chmod(str(tmp_path / "open"), 0o777)
    os.symlink(target, str(tmp_path / "link"))
    assert why_refused(tmp_path / "link").startswith("%s is writable by everybody" % (tmp_path / "open"))


def test_a_linked_directory_that_others_could_point_elsewhere_is_refused(tmp_path):
    new_script(tmp_path / "bin" / "s")
    os.mkdir(str(tmp_path / "open"))
    os.chmod(str(tmp_path / "open"), 0o777)
    os.symlink(str(tmp_path / "bin"), str(tmp_path / "open" / "current"))
    message = why_refused(tmp_path / "open" / "current" / "s")
    assert message.startswith("%s is writable by everybody" % (tmp_path / "open"))


def test_a_symlink_halfway_along_a_chain_that_others_could_change_is_refused(tmp_path):
    target = new_script(tmp_path / "bin" / "s")
    os.mkdir(str(tmp_path / "open"))
    os.chmod(str(tmp_path / "open"), 0o777)
    os.symlink(target, str(tmp_path / "open" / "second"))
    os.symlink(str(tmp_path / "open" / "second"), str(tmp_path / "first"))
    assert why_refused(tmp_path / "first").startswith("%s is writable by everybody" % (tmp_path / "open"))


def test_script_dirs_hold_by_whole_path_components(tmp_path):
    inside, beside = new_script(tmp_path / "bin" / "s"), new_script(tmp_path / "bin-evil" / "s")
    top = str(tmp_path / "bin")
    assert ctrl_exec.check_script(listed(inside), (top,), True) == inside
    assert ctrl_exec.check_script(listed(inside), ("/nowhere", top), True) == inside
    assert why_refused(beside, [top]) == "%s is outside script_dirs" % beside
    around = os.path.join(top, "..", "bin-evil", "s")
    assert why_refused(around, [top]) == "%s is outside script_dirs" % beside


def test_script_dirs_hold_for_where_a_symlink_leads(tmp_path):
    outside = new_script(tmp_path / "elsewhere" / "s")
    os.mkdir(str(tmp_path / "bin"))
    os.symlink(outside, str(tmp_path / "bin" / "s"))
    for strict in (True, False):
        message = why_refused(tmp_path / "bin" / "s", [str(tmp_path / "bin")], strict)
        assert message == "%s is outside script_dirs" % outside


def test_script_dirs_may_themselves_be_symlinks(tmp_path):
    inside = new_script(tmp_path / "real" / "s")
    os.symlink(str(tmp_path / "real"), str(tmp_path / "bin"))
    path = tmp_path / "bin" / "s"
    assert ctrl_exec.check_script(listed(path), (str(tmp_path / "bin"),), True) == inside


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_no_regular_file_is_refused(tmp_path, make):
    make(str(tmp_path / "s"))
    assert why_refused(tmp_path / "s") == "%s is not a regular file" % (tmp_path / "s")


def test_what_is_not_there_is_refused_with_the_systems_reason(tmp_path):
    os.symlink("loop", str(tmp_path / "loop"))
    new_script(tmp_path / "file")
    assert "No such file" in why_refused(tmp_path / "none")
    assert "symbolic links" in why_refused(tmp_path / "loop")
    assert "Not a directory" in why_refused(tmp_path / "file" / "s")
    assert "too long" in why_refused(tmp_path / ("x" * 300))


def test_configuration_files_that_others_can_write_keep_the_agent_from_starting(tmp_path):
    host = support.Host(str(tmp_path / "h"), "h")
    for name in ("agent.conf", "scripts.conf"):
        host.allow("")
        path = host.file(ctrl_exec.AGENT_ETC + "/" + name)
        os.chmod(path, 0o666)
        with pytest.raises(ctrl_exec.ConfigError, match="writable by everybody") as caught:
            ctrl_exec.build_rules(host.config, "h", {})
        assert path in caught.value.message
        os.chmod(path, 0o640)
    assert ctrl_exec.build_rules(host.config, "h", {})[0].scripts == {}


# --- a path that changes while it is being run -----------------------------------------------------------

_RUN_MANY = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import ctrl_exec
config = ctrl_exec.load_config("agent", "", sys.argv[2])
rules, _ = ctrl_exec.build_rules(config, "h", {"ab1": "control"})
answers = []
# so many times, and until it was seen both ways: a busy host may let the swapper rest
while len(answers) < int(sys.argv[3]) or len({code for code, _ in answers}) < 2:
    request = ctrl_exec.JobRequest("run", "r%d" % len(answers), "control", script="s")
    stage = ctrl_exec.Stage()
    try:
        record = ctrl_exec.Job(rules, request, stage).finish()
        with open(os.path.join(config.runs_dir, "control", record.reqid + ".out")) as file:
            answers.append([record.exit, file.read()])
    except ctrl_exec.ScriptRefused as error:
        stage.close()
        answers.append([-1, error.message])
print(json.dumps(answers))
"""

_SWAP = """
import os, sys
link, inside, outside = sys.argv[1:]
while os.getppid() != 1:
    for target in (outside, inside):
        os.symlink(target, link + ".new")
        os.rename(link + ".new", link)
"""


def test_a_link_that_is_swapped_during_hundreds_of_runs_never_runs_what_is_outside(tmp_path):
    host = support.Host(str(tmp_path / "h"), "h")
    top = host.file("/bin")
    host.configure("script_dirs = %s\n" % top)
    inside = new_script(os.path.join(top, "good"))
    outside = new_script(tmp_path / "outside", "echo OUTSIDE; : > %s\n" % (tmp_path / "it-ran"))
    link = os.path.join(top, "s")
    os.symlink(inside, link)
    host.allow("s = %s\n" % link)
    swapper = subprocess.Popen([sys.executable, "-c", _SWAP, link, inside, outside])
    try:
        done = subprocess.run(
            [sys.executable, "-c", _RUN_MANY, os.path.dirname(support.PROGRAM), host.root, "300"],
            capture_output=True, timeout=600,
        )  # fmt: skip
    finally:
        swapper.kill()
        swapper.wait()
    assert done.returncode == 0, done.stderr.decode()
    answers = json.loads(done.stdout)
    ran = [answer for answer in answers if answer == [0, "inside\n"]]
    refused = [answer for answer in answers if answer == [-1, "%s is outside script_dirs" % outside]]
    assert len(ran) + len(refused) == len(answers) >= 300, answers
    assert ran and refused  # the swapper was at work
    assert not os.path.exists(str(tmp_path / "it-ran"))


# --- profiles -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key, value", [("caps", "cap_net_admin"), ("writable", ("/var",))])
def test_what_a_profile_cannot_apply_yet_is_refused_by_name(key, value):
    with pytest.raises(ctrl_exec.ScriptRefused) as caught:
        ctrl_exec.check_profile(profile("web", **{key: value}))
    assert "profile web" in caught.value.message and "`%s`" % key in caught.value.message


@pytest.mark.parametrize("run_as", ["no-such-user", "root:no-such-group", "no\x1buser", "0", ":"])
def test_a_user_or_group_that_does_not_exist_is_refused(run_as):
    with pytest.raises(ctrl_exec.ScriptRefused) as caught:
        ctrl_exec.check_profile(profile("web", run_as=run_as))
    assert "profile web" in caught.value.message and caught.value.message.isprintable()


def as_ordinary_user(check):
    """The refusal's message of `check()` when we are not root, or "" when it passes."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        word = "?"
        try:
            if IS_ROOT:
                os.setgroups([])
                os.setresgid(NOBODY, NOBODY, NOBODY)
                os.setresuid(NOBODY, NOBODY, NOBODY)
            check()
            word = ""
        except ctrl_exec.ScriptRefused as error:
            word = error.message
        finally:
            os.write(writer, word.encode())
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        word = file.read()
    os.waitpid(pid, 0)
    return word


@pytest.mark.parametrize("run_as", ["root", "root:root", ":root"])
def test_an_agent_that_is_not_root_refuses_a_profile_for_another_user(run_as):
    message = as_ordinary_user(lambda: ctrl_exec.check_profile(profile("web", run_as=run_as)))
    assert "profile web" in message


def test_an_agent_that_is_not_root_refuses_a_profile_with_a_higher_priority():
    message = as_ordinary_user(lambda: ctrl_exec.check_profile(profile("web", nice=-5)))
    assert "profile web" in message and "nice -5" in message
    assert as_ordinary_user(lambda: ctrl_exec.check_profile(profile("web", nice=5))) == ""


@needs_root
def test_an_agent_that_is_not_root_may_name_its_own_user():
    assert as_ordinary_user(lambda: ctrl_exec.check_profile(profile("web", run_as="nobody"))) == ""


# --- an agent and its files -----------------------------------------------------------------------------

_CONF = """\
rate_limit_disable = yes
script_dirs = {dirs}
[profile default]
nice = 1
[profile small]
memory = 64M
cpu_seconds = 77
open_files = 40
nice = 9
[profile tiny]
memory = 32M
open_files = 11
no_new_privileges = yes
[profile quiet]
no_new_privileges = yes
[profile quick]
timeout = 1
[profile capable]
caps = cap_net_admin
[profile writer]
writable = /var
[profile nobody]
run_as = nobody
nice = -3
no_new_privileges = yes
[profile missing]
run_as = no-such-user
"""

_SHOW = """\
echo "nice $(nice)"
echo "memory $(ulimit -v)"
echo "cpu $(ulimit -t)"
echo "files $(ulimit -n)"
echo "privileges $(grep NoNewPrivs /proc/self/status)"
"""


class Site:
    """One agent and the dispatcher that asks it."""

    def __init__(self, top):
        self.deployment = support.Deployment(top, ("solo",), start=False)
        self.control, self.host = self.deployment.control, self.deployment["solo"]
        self.context = support.dispatcher_context(self.control)
        self.dirs = self.host.file("/scripts")

    def run(self, script, *args, **fields):
        """The agent's answer to a run; it has to be 200."""
        body = dict({"script": script, "args": list(args), "reqid": ctrl_exec.new_id()}, **fields)
        status, answer = support.post(self.host.port, self.context, "/run", body)
        assert status == 200, answer
        return answer

    def show(self, script):
        """What the showing script said, as a dictionary."""
        answer = self.run(script)
        assert (answer["exit"], answer["stderr"]) == (0, ""), answer
        return dict(line.split(" ", 1) for line in answer["stdout"].splitlines())


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    one = Site(tmp_path_factory.mktemp("scripts"))
    one.host.configure(_CONF.format(dirs=one.dirs + ":/usr/bin:/bin"))
    for name in ("default", "small", "quiet", "capable", "writer", "missing"):
        one.host.script("show-" + name, _SHOW, "" if name == "default" else "profile=" + name)
    one.host.script("tiny", 'echo "$#"\n', "profile=tiny")
    one.host.script("quick", "sleep 60 & wait\n", "profile=quick")
    one.host.script("quick-but-longer", "sleep 1.5\n", "profile=quick timeout=30")
    one.host.script("my tool", "echo with space\n")
    text = "spaced = %s/my tool timeout=50\n" % one.dirs
    for name in ("victim", "linked", "sidecars"):
        text += "%s = %s\n" % (name, new_script(os.path.join(one.dirs, name)))
    text += "as-nobody = /bin/sh profile=nobody\nas-us = /bin/sh\n"
    path = one.host.file(ctrl_exec.AGENT_ETC + "/scripts.conf")
    with open(path, encoding="ascii") as file:
        kept = [line for line in file.read().splitlines(True) if not line.startswith("my tool")]
    one.host.allow("".join(kept) + text)
    for kind in REFUSED_SIDECARS:
        script = one.host.script("bad-" + kind, "echo callable\n")
        with open(script + ".schema.json", "wb") as file:
            file.write(BAD_SIDECARS[kind])
    one.host.start()
    with one.deployment:
        yield one


@pytest.fixture
def victim(site):
    """The path of a script on the running agent that a test may spoil; it is whole again afterwards."""
    path = os.path.join(site.dirs, "victim")
    assert site.run("victim")["stdout"] == "inside\n"
    yield path
    if os.path.lexists(path):
        os.unlink(path)
    new_script(path)


def test_a_path_with_a_space_runs(site):
    assert site.run("spaced")["stdout"] == "with space\n"


def test_the_default_profile_is_applied(site):
    assert site.show("show-default")["nice"] == "1"


def test_limits_of_a_profile_are_seen_from_inside_the_script(site):
    shown = site.show("show-small")
    assert (shown["memory"], shown["cpu"], shown["files"], shown["nice"]) == ("65536", "77", "40", "9")
    assert shown["privileges"].split() == ["NoNewPrivs:", "0"]


def test_no_new_privileges_is_seen_from_inside_the_script(site):
    assert site.show("show-quiet")["privileges"].split() == ["NoNewPrivs:", "1"]


def test_tight_limits_and_no_new_privileges_together_still_start_the_script(site):
    answer = site.run("tiny", "one", "two")
    assert (answer["exit"], answer["stdout"]) == (0, "2\n"), answer


def test_a_profile_that_asks_for_less_leaves_no_limit_of_another_behind(site):
    assert site.show("show-small")["memory"] == "65536"
    assert site.show("show-default")["memory"] == "unlimited"


def test_the_time_limit_of_a_profile_ends_the_script(site):
    answer = site.run("quick")
    assert (answer["exit"], answer["timed_out"]) == (124, True)


def test_the_time_limit_of_an_allowlist_line_goes_before_its_profiles(site):
    answer = site.run("quick-but-longer")
    assert answer["exit"] == 0 and "timed_out" not in answer


@pytest.mark.parametrize(
    "name, word", [("capable", "`caps`"), ("writer", "`writable`"), ("missing", "no-such-user")]
)
def test_a_profile_that_cannot_be_applied_is_refused_with_the_reason(site, name, word):
    answer = site.run("show-" + name)
    assert (answer["exit"], answer["stdout"]) == (-1, "")
    assert "profile " + name in answer["error"] and word in answer["error"]
    warned = "script show-%s will be refused" % name
    assert [line for line in site.host.events("config-warn") if warned in line]


_WHO = "grep -E '^(Uid|Gid|Groups|NoNewPrivs|CapEff)' /proc/self/status; nice; echo $HOME $USER $SHELL"


def test_run_as_gives_the_script_that_user_for_good_or_is_refused_by_an_agent_that_is_not_root(site):
    answer = site.run("as-nobody", "-c", _WHO)
    if not IS_ROOT:
        assert answer["exit"] == -1 and "does not run as root" in answer["error"]
        return
    assert (answer["exit"], answer["stderr"]) == (0, ""), answer
    *status, nice, home = answer["stdout"].splitlines()
    facts = {line.split(":")[0]: line.split()[1:] for line in status}
    assert facts["Uid"] == facts["Gid"] == ["65534"] * 4
    assert facts["Groups"] == ["65534"] and facts["NoNewPrivs"] == ["1"]
    assert facts["CapEff"] == ["0" * 16]
    assert nice == "-3"
    import pwd

    entry = pwd.getpwnam("nobody")
    assert home.split() == [entry.pw_dir, "nobody", entry.pw_shell]


def test_a_script_has_the_user_of_its_profile_or_the_agents(site):
    answer = site.run("as-us", "-c", "id -u; id -g; echo $USER")
    import pwd

    entry = pwd.getpwuid(os.geteuid())
    assert answer["stdout"].split() == [str(os.geteuid()), str(os.getegid()), entry.pw_name]


def test_bad_sidecars_are_logged_and_their_scripts_answer(site):
    for kind in REFUSED_SIDECARS:
        assert site.run("bad-" + kind)["stdout"] == "callable\n"
        path = os.path.join(site.dirs, "bad-%s.schema.json" % kind)
        assert [line for line in site.host.events("schema-skip") if path in line], kind


def discovered(site):
    """The scripts as `ced discovery` shows them, by name."""
    status, shown = site.control.json("discovery", "solo")
    assert status == 0 and shown["ok"] is True, shown
    assert shown["hosts"]["solo"]["status"] == "ok", shown
    return {entry["name"]: entry for entry in shown["hosts"]["solo"]["scripts"]}


def test_bad_sidecars_do_not_spoil_discovery(site):
    scripts = discovered(site)
    for kind in REFUSED_SIDECARS:
        assert "schema" not in scripts["bad-" + kind] and "schema_version" not in scripts["bad-" + kind]
        assert scripts["bad-" + kind]["executable"] is True


def nested(levels):
    return b'{"a":' * levels + b"1" + b"}" * levels


@pytest.mark.parametrize(
    "data, version",
    [
        (b'{"version": "2.1", "args": [{"name": "\xc3\xa4", "max": 1.5, "x": null}]}', "2.1"),
        (b'{"a": "\xf0\x9f\x98\x80 \\u0000 \\"\\n"}', None),
        (nested(20), None),
    ],
    ids=["with a version", "escapes", "nested"],
)
def test_a_sidecar_arrives_untouched(site, data, version):
    path = os.path.join(site.dirs, "sidecars.schema.json")
    with open(path, "wb") as file:
        file.write(data)
    try:
        assert "RESULT=ok" in site.host.reload()
        entry = discovered(site)["sidecars"]
        assert entry["schema"] == json.loads(data)
        assert re.fullmatch(version or "sha256:[0-9a-f]{12}", entry["schema_version"])
    finally:
        os.unlink(path)


@pytest.mark.parametrize(
    "data",
    [nested(31), nested(32), b'{"a": "\\ud800"}', b'{"maximum": -1e400}'],
    ids=["deep", "deepest", "half a surrogate pair", "infinite"],
)
def test_a_sidecar_at_the_edge_of_json_never_takes_the_host_out_of_discovery(site, data):
    path = os.path.join(site.dirs, "sidecars.schema.json")
    with open(path, "wb") as file:
        file.write(data)
    try:
        assert "RESULT=ok" in site.host.reload()
        entry = discovered(site)["sidecars"]  # carried untouched or left out, and nothing between
        assert entry.get("schema", json.loads(data)) == json.loads(data)
        assert ("schema" in entry) == ("schema_version" in entry)
    finally:
        os.unlink(path)
        site.host.reload()


# --- a script that changes after the agent has started ----------------------------------------------------


def refused(answer, *words):
    assert answer["exit"] == -1 and answer["stdout"] == "", answer
    for word in words:
        assert word in answer["error"], answer


def not_executed(answer, *words):
    assert answer["exit"] == 126 and answer["stdout"] == "" and "signal" not in answer, answer
    for word in ("cannot execute", *words):
        assert word in answer["error"], answer


def test_a_script_swapped_for_a_symlink_that_leads_outside_is_refused(site, victim, tmp_path):
    outside = new_script(tmp_path / "outside", "echo OUTSIDE\n")
    os.unlink(victim)
    os.symlink(outside, victim)
    refused(site.run("victim"), outside, "outside script_dirs")
    assert [line for line in site.host.events("deny") if "outside script_dirs" in line]


def test_a_script_made_writable_for_all_is_refused(site, victim):
    os.chmod(victim, 0o777)
    refused(site.run("victim"), victim, "writable by everybody")
    os.chmod(victim, 0o755)
    assert site.run("victim")["stdout"] == "inside\n"


def test_a_directory_made_writable_for_all_refuses_what_is_in_it(site, victim):
    os.chmod(site.dirs, 0o777)
    try:
        refused(site.run("victim"), "%s is writable by everybody" % site.dirs)
    finally:
        os.chmod(site.dirs, 0o755)
    assert site.run("victim")["stdout"] == "inside\n"


def test_a_script_that_was_removed_is_refused_until_it_is_back(site, victim):
    os.unlink(victim)
    refused(site.run("victim"), "No such file or directory")
    new_script(victim, "echo new\n")
    assert site.run("victim")["stdout"] == "new\n"


def test_a_directory_in_the_place_of_a_script_is_refused(site, victim):
    os.unlink(victim)
    os.mkdir(victim)
    try:
        refused(site.run("victim"), "not a regular file")
    finally:
        os.rmdir(victim)


def test_a_script_that_is_replaced_by_another_sound_one_runs_as_it_is_now(site, victim):
    new_script(victim + ".new", "echo replaced\n")
    os.rename(victim + ".new", victim)
    assert site.run("victim")["stdout"] == "replaced\n"


def test_a_script_that_is_not_executable_any_more_fails_with_the_reason(site, victim):
    os.chmod(victim, 0o644)
    not_executed(site.run("victim"), victim, "Permission denied")
    assert discovered(site)["victim"]["executable"] is False


def test_a_script_whose_interpreter_is_missing_fails_with_the_reason(site, victim):
    with open(victim, "w", encoding="ascii") as file:
        file.write("#!/no/such/interpreter\necho x\n")
    not_executed(site.run("victim"), victim, "the interpreter of its first line does not exist")


def test_a_script_without_an_interpreter_line_fails_with_the_reason(site, victim):
    with open(victim, "w", encoding="ascii") as file:
        file.write("echo no interpreter line\n")
    not_executed(site.run("victim"), victim, "Exec format error")


def test_an_empty_script_fails_with_the_reason(site, victim):
    with open(victim, "w", encoding="ascii"):
        pass
    not_executed(site.run("victim"), victim, "Exec format error")


def test_a_script_whose_interpreter_may_not_be_executed_fails_with_the_reason(site, victim, tmp_path):
    interpreter = new_script(tmp_path / "interpreter", mode=0o644)
    with open(victim, "w", encoding="ascii") as file:
        file.write("#!%s\n" % interpreter)
    not_executed(site.run("victim"), victim, "Permission denied")


def test_nothing_of_all_this_was_a_bug_to_the_agent(site):
    assert site.host.events("bug") == []
