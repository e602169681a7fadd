"""`ced check` and `cea self-check`: every file's mode and owner, every certificate, clocks; and what to do."""

import json
import os
import shutil
import subprocess
import tempfile
import time

import pytest

import ctrl_exec
import support
from support import IS_ROOT, wait_until

OPENSSL = ctrl_exec.OpenSSL()
STRANGER = 12345

needs_root = pytest.mark.skipif(not IS_ROOT, reason="giving a file away needs root")


@pytest.fixture(scope="module")
def open_top():
    """A directory that everybody may look into, as /etc is; what pytest gives is for one user alone."""
    top = tempfile.mkdtemp()
    os.chmod(top, 0o755)
    yield top
    shutil.rmtree(top)


@pytest.fixture(scope="module")
def home(open_top):
    with support.Deployment(os.path.join(open_top, "checks"), ("solo",)) as made:
        assert made.control.run("run", "solo", "hello").returncode == 0  # so that there are records
        yield made


@pytest.fixture
def site(home):
    """One control host and one agent, whose files are as they were afterwards."""
    tops = [os.path.join(one.root, top) for one in (home.control, home["solo"]) for top in ("etc", "var")]
    for top in tops:
        shutil.copytree(top, top + ".kept")
    yield home
    for top in tops:
        _put_back(top + ".kept", top)
        shutil.rmtree(top + ".kept")


def _put_back(copy, root):
    """The files of a tree as they were: content, mode, owner; what is new goes."""
    for directory, names, files in os.walk(root):
        for name in names + files:
            path = os.path.join(directory, name)
            former = os.path.join(copy, os.path.relpath(path, root))
            if not os.path.lexists(former):
                shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)
    for directory, names, files in os.walk(copy):
        for name in names + files:
            former = os.path.join(directory, name)
            path = os.path.join(root, os.path.relpath(former, copy))
            os.makedirs(path, exist_ok=True) if name in names else shutil.copyfile(former, path)
            os.chmod(path, os.stat(former).st_mode & 0o7777)
            if IS_ROOT:
                os.chown(path, os.stat(former).st_uid, os.stat(former).st_gid)


def lines(findings):
    """Findings as `LEVEL what`; whatever is not well says what to do."""
    for finding in findings:
        assert bool(finding.hint) == (finding.level != "OK"), finding
        assert "\n" not in finding.what + finding.hint
    return ["%s %s" % (finding.level, finding.what) for finding in findings]


def self_check(site):
    return lines(ctrl_exec.check_agent(site["solo"].config))


def check(site):
    return lines(ctrl_exec.check_dispatcher(site.control.config))


def control_places(site):
    """What `ced check` says of files alone, which starts no openssl."""
    return lines(ctrl_exec.check_places(ctrl_exec._control_places(site.control.config)))


def agent_places(site):
    return lines(ctrl_exec.check_places(ctrl_exec._agent_places(site["solo"].config)))


def amiss(found):
    """What is not well, but for what is so on every machine of these tests."""
    usual = ("runs as root", "agent.crt is for solo, and not for", "has not told this host the time")
    return [line for line in found if not line.startswith("OK") and not any(words in line for words in usual)]


def put(path, text=b"x", mode=0o600):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(text)
    os.chmod(path, mode)


# --- modes and owners -----------------------------------------------------------------------------------


def test_both_checks_are_content_with_what_is_sound(site):
    assert amiss(self_check(site)) == [] and amiss(check(site)) == []


def former(site):
    """A certificate of the dispatcher's that was replaced, and the paths of it and its key."""
    identity = ctrl_exec.dispatcher_identity(site.control.config)
    kept = ctrl_exec.former_identity(identity, "abc123")
    for source, target in ((identity.key, kept.key), (identity.cert, kept.cert)):
        shutil.copy2(source, target)
    return kept


def token(site):
    ctrl_exec.new_token(ctrl_exec.token_directory(site.control.config), 600, 1, "")
    directory = ctrl_exec.token_directory(site.control.config)
    return os.path.join(directory, os.listdir(directory)[0])


def rotation(site):
    path = ctrl_exec.rotation_path(site.control.config)
    ctrl_exec.edit_rotation(path, lambda known: known)
    return path


def first_of(directory):
    return os.path.join(
        directory, sorted(name for name in os.listdir(directory) if name.endswith(".json"))[0]
    )


def made(path):
    put(path)
    return path


# What there is on a control host, and who may not write to it: everybody, its group.
CONTROL_FILES = {
    "configuration": lambda site: site.control.config.path,
    "CA": lambda site: site.control.config.ca,
    "certificate": lambda site: site.control.config.cert,
    "former certificate": lambda site: former(site).cert,
    "revocations": lambda site: made(site.control.config.revoked_serials),
    "registry": lambda site: site.control.config.registry_dir,
    "agent": lambda site: ctrl_exec._agent_path(site.control.config.registry_dir, "solo"),
    "rotation": rotation,
    "runs": lambda site: site.control.config.runs_dir,
    "run": lambda site: first_of(site.control.config.runs_dir),
    "locks": lambda site: site.control.config.lock_dir,
    "lock": lambda site: made(site.control.config.lock_dir + "/solo--x.lock"),
    "pairing": lambda site: site.control.config.pairing_dir,
    "pairing request": lambda site: made(site.control.config.pairing_dir + "/abc.json"),
    "tokens": lambda site: os.path.dirname(token(site)),
    "token": token,
    "hook": lambda site: made(site.control.file(ctrl_exec.ETC + "/auth-hook")),
    "lock of revocations": lambda site: made(site.control.config.revoked_serials + ".lock"),
    "lock of certificates": lambda site: made(site.control.file(ctrl_exec.VAR + "/upkeep.lock")),
}


def spoil(path, bits):
    os.chmod(path, os.stat(path).st_mode | bits)
    if IS_ROOT:
        os.chown(path, -1, STRANGER)  # a group that is not root's, which needs no looking into


@pytest.mark.parametrize(
    "bits, words", [(0o002, "is writable by everybody"), (0o020, "is writable by its group")]
)
@pytest.mark.parametrize("name", sorted(CONTROL_FILES))
def test_a_control_host_is_told_what_others_can_change(site, name, bits, words):
    path = CONTROL_FILES[name](site)
    spoil(path, bits)
    assert [line for line in control_places(site) if line.startswith("FAIL %s %s" % (path, words))]


@needs_root
@pytest.mark.parametrize("name", sorted(CONTROL_FILES))
def test_a_control_host_is_told_what_belongs_to_somebody_else(site, name):
    path = CONTROL_FILES[name](site)
    os.chown(path, STRANGER, -1)
    assert [line for line in control_places(site) if "FAIL %s belongs to user %d" % (path, STRANGER) in line]


AGENT_FILES = {
    "configuration": lambda host: host.config.path,
    "allowlist": lambda host: ctrl_exec.scripts_conf_path(host.config),
    "certificate": lambda host: host.config.cert,
    "CA": lambda host: host.config.ca,
    "trust map": lambda host: host.config.trusted_dispatchers_path,
    "serial of an older release": lambda host: made(host.config.dispatcher_serial_path),
    "revocations": lambda host: made(host.config.revoked_serials),
    "runs": lambda host: host.config.runs_dir,
    "runs of one dispatcher": lambda host: host.config.runs_dir + "/control",
    "run": lambda host: first_of(host.config.runs_dir + "/control"),
    "locks": lambda host: host.file(ctrl_exec.AGENT_VAR + "/locks"),
    "who serves": lambda host: host.file(ctrl_exec.AGENT_VAR + "/agent.lock"),
    "clocks": lambda host: made(host.file(ctrl_exec.AGENT_VAR + "/clocks.json")),
    "pairing": lambda host: made(host.file(ctrl_exec.AGENT_VAR + "/pairing/abc.json")),
    "lock of revocations": lambda host: made(host.config.revoked_serials + ".lock"),
    "hook": lambda host: made(host.file(ctrl_exec.AGENT_ETC + "/auth-hook")),
}


@pytest.mark.parametrize("name", sorted(AGENT_FILES))
def test_an_agent_is_told_what_others_can_change(site, name):
    path = AGENT_FILES[name](site["solo"])
    os.chmod(path, os.stat(path).st_mode | 0o002)
    assert [line for line in agent_places(site) if "FAIL %s is writable by everybody" % path in line]


@needs_root
@pytest.mark.parametrize("name", sorted(AGENT_FILES))
def test_an_agent_is_told_what_belongs_to_somebody_else(site, name):
    path = AGENT_FILES[name](site["solo"])
    os.chown(path, STRANGER, -1)
    assert [line for line in agent_places(site) if "FAIL %s belongs to user %d" % (path, STRANGER) in line]


CONTROL_KEYS = ("ca.key", "ca.next.key", "ca.retired-ab.key", "dispatcher.key", "dispatcher.former-ab.key")


@pytest.mark.parametrize("name", CONTROL_KEYS)
def test_every_private_key_of_a_control_host_is_looked_at(site, name):
    path = site.control.file(ctrl_exec.ETC + "/" + name)
    if not os.path.exists(path):
        put(path)
    assert "OK private key %s" % path in check(site)
    os.chmod(path, 0o604)
    assert [line for line in check(site) if line.startswith("FAIL private key %s" % path) and "0604" in line]


def test_the_private_key_of_an_agent_is_looked_at(site):
    path = site["solo"].config.key
    os.chmod(path, 0o604)
    assert [line for line in self_check(site) if line.startswith("FAIL private key %s" % path)]


@needs_root
def test_a_key_that_belongs_to_somebody_else_is_no_secret(site):
    for path, found in ((site["solo"].config.key, agent_places), (site.control.config.key, control_places)):
        os.chown(path, STRANGER, -1)
        assert [line for line in found(site) if "FAIL" in line and "%s belongs to" % path in line]


def test_what_everybody_may_read_is_a_warning_unless_nobody_gets_there(site):
    config = site.control.config
    os.chmod(config.runs_dir, 0o755)
    assert "WARN %s is for everybody to read" % config.runs_dir in control_places(site)
    os.chmod(site.control.file(ctrl_exec.VAR), 0o750)
    assert amiss(control_places(site)) == []
    os.chmod(site["solo"].config.path, 0o644)
    assert "WARN %s is for everybody to read" % site["solo"].config.path in agent_places(site)
    os.chmod(site["solo"].file(ctrl_exec.AGENT_ETC), 0o750)
    assert amiss(agent_places(site)) == []


@needs_root
def test_the_service_user_may_write_where_the_api_does_and_nowhere_else(site, monkeypatch):
    config = site.control.config
    api = ctrl_exec.Owner(STRANGER, STRANGER)
    monkeypatch.setattr(
        ctrl_exec, "find_user", lambda name: api if name == ctrl_exec.DISPATCHER_USER else None
    )
    for path in (config.runs_dir, first_of(config.runs_dir), config.lock_dir):
        os.chown(path, STRANGER, STRANGER)
        os.chmod(path, 0o770)
    assert amiss(control_places(site)) == []
    for path in (config.registry_dir, config.cert):
        os.chown(path, STRANGER, STRANGER)
        assert [line for line in control_places(site) if "%s belongs to user" % path in line], path


def test_a_directory_full_of_faults_is_a_screen_and_a_count(site):
    directory = site.control.config.runs_dir
    for number in range(50):
        put("%s/x%02d.json" % (directory, number), mode=0o666)
    found = [line for line in control_places(site) if "FAIL" in line and directory in line]
    assert len(found) == ctrl_exec.MAX_FAULTS + 1
    assert found[-1] == "FAIL %s: %d more like these" % (directory, 50 - ctrl_exec.MAX_FAULTS)


def test_what_comes_and_goes_meanwhile_is_no_finding(site, monkeypatch):
    real = os.path.islink
    gone = made(site.control.config.lock_dir + "/gone.lock")

    def islink(path):
        if path == gone and os.path.exists(gone):
            os.unlink(gone)
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(ctrl_exec.os.path, "islink", islink)
        assert amiss(control_places(site)) == []
    assert not os.path.exists(gone)


def test_a_directory_that_is_too_deep_or_too_full_is_said_so(site, monkeypatch):
    directory = site.control.config.runs_dir
    deep = os.open(directory, os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("d", dir_fd=deep)
        further = os.open("d", os.O_RDONLY, dir_fd=deep)
        os.close(deep)
        deep = further
    os.close(deep)
    assert amiss(control_places(site)) == []
    monkeypatch.setattr(ctrl_exec, "MAX_PLACE", 100)
    assert "WARN %s: so much is in it that not all was looked at" % directory in control_places(site)
    subprocess.run(["rm", "-rf", directory + "/d"], check=True)


def test_a_file_name_is_no_command_and_moves_no_cursor(site):
    name = "x;id>PWNED;\n\033[2J#"
    put(os.path.join(site.control.config.runs_dir, name), mode=0o666)
    done = site.control.run("check")
    assert "\033" not in done.out
    (line,) = [line for line in done.out.splitlines() if "PWNED" in line]
    assert "(chmod o-w '%s/x;id>PWNED;" % site.control.config.runs_dir in line


def test_a_link_in_a_directory_is_followed(site, tmp_path):
    target = str(tmp_path / "target")
    put(target, mode=0o666)
    os.symlink(target, site.control.config.registry_dir + "/other.json")
    assert "FAIL %s is writable by everybody (mode 0666)" % target in control_places(site)


def test_keys_and_certificates_without_a_suffix_are_looked_at_too(site):
    config = site.control.config
    key, cert = (site.control.file(ctrl_exec.ETC + "/" + name) for name in ("ourkey", "ourcert"))
    shutil.copy2(config.key, key)
    shutil.copy2(config.cert, cert)
    with open(config.path, "a", encoding="ascii") as file:
        file.write("key = %s\ncert = %s\n" % (key, cert))
    changed = ctrl_exec.load_config("dispatcher", "", site.control.root)
    os.chmod(cert, 0o666)
    os.chmod(key, 0o604)
    found = lines(ctrl_exec.check_dispatcher(changed))
    assert "FAIL %s is writable by everybody (mode 0666)" % cert in found
    assert [line for line in found if line.startswith("FAIL private key %s" % key)]


def test_an_agents_successor_of_the_ca_is_looked_at(site):
    path = ctrl_exec.next_path(site["solo"].config.ca)
    put(path, mode=0o666)
    assert "FAIL %s is writable by everybody (mode 0666)" % path in agent_places(site)


def as_nobody(work):
    """What `work()` returns in a process of a user who owns nothing."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            if IS_ROOT:
                os.setgroups([])
                os.setresgid(65534, 65534, 65534)
                os.umask(0o022)
                os.setresuid(65534, 65534, 65534)
            os.write(writing, json.dumps(work()).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as file:
        text = file.read()
    os.waitpid(pid, 0)
    return json.loads(text)


@needs_root
def test_what_the_program_makes_for_a_user_without_rights_is_sound(site, monkeypatch):
    config = site.control.config
    for path in (config.runs_dir, config.lock_dir):
        os.chown(path, STRANGER, STRANGER)
        os.chmod(path, 0o2770)
    assert len(amiss(control_places(site))) == 2
    with monkeypatch.context() as patch:
        patch.setattr(ctrl_exec, "find_user", lambda name: None)
        patch.setattr(ctrl_exec.os, "geteuid", lambda: STRANGER)
        patch.setattr(ctrl_exec.os, "getegid", lambda: STRANGER)
        assert amiss(control_places(site)) == []


def test_who_may_not_look_is_told_so(open_top):
    shut = os.path.join(open_top, "shut")
    put(shut + "/inner/file")
    os.chmod(shut + "/inner", 0o000)
    os.chmod(shut, 0o755)
    place = ctrl_exec.Place(shut, user=ctrl_exec.DISPATCHER_USER)
    found = as_nobody(lambda: lines(ctrl_exec.check_places([place])))
    os.chmod(shut + "/inner", 0o700)
    assert "WARN cannot look into %s/inner: Permission denied" % shut in found


def test_who_may_not_read_a_key_is_not_told_to_throw_it_away(site):
    former(site)
    config = site.control.config
    for path in [
        path
        for one in (ctrl_exec.ca_key_path(config.ca), config.key)
        for path in ctrl_exec.find_siblings(one)
    ]:
        os.chmod(path, 0o000)
    for path in (site.top, site.control.root):
        os.chmod(path, 0o755)
    found = as_nobody(lambda: ctrl_exec.check_dispatcher(config))
    told = [
        (level, hint) for level, what, hint in found if "cannot read" in what and ".key: Permission" in what
    ]
    assert (
        told == [("FAIL", "run this as root, or as a user who may read it")] * 3
    )  # the CA's, ours, the former one


# --- certificates ---------------------------------------------------------------------------------------


def sign(site, request, name, profile, start=0, days=365):
    """A certificate whose life begins `start` days from now."""
    ca = site.control.config.ca
    real = ctrl_exec.now
    ctrl_exec.now = lambda: time.time() + start * 86400
    try:
        return OPENSSL.sign(request, name, profile, days, ca, ctrl_exec.ca_key_path(ca))
    finally:
        ctrl_exec.now = real


def reissue(site, who, name, profile, **when):
    """Give a control host or an agent another certificate for its key."""
    config = who.config
    put(config.cert, sign(site, OPENSSL.new_request(config.key, name), name, profile, **when).encode(), 0o644)


def test_an_agent_is_told_of_the_dates_of_its_certificate(site):
    reissue(site, site["solo"], "solo", "agent", start=-350)
    assert "WARN %s expires in 14 days" % site["solo"].config.cert in self_check(site)
    reissue(site, site["solo"], "solo", "agent", start=-400)
    assert [line for line in self_check(site) if line.startswith("FAIL identity") and "expired" in line]
    reissue(site, site["solo"], "solo", "agent", start=5)
    assert [line for line in self_check(site) if line.startswith("FAIL identity") and "not yet valid" in line]


def test_an_agent_is_told_of_a_certificate_of_the_wrong_purpose_or_key(site):
    reissue(site, site["solo"], "solo", "dispatcher")
    assert [line for line in self_check(site) if line.startswith("FAIL identity") and "purpose" in line]
    shutil.copy(site.control.config.cert, site["solo"].config.cert)
    assert [line for line in self_check(site) if line.startswith("FAIL identity")]


def test_an_agent_is_told_whose_certificate_it_has(site, monkeypatch):
    cert = site["solo"].config.cert
    monkeypatch.setattr(ctrl_exec.socket, "gethostname", lambda: "other.example.org")
    found = ctrl_exec.check_agent(site["solo"].config)
    (named,) = [one for one in found if one.what.startswith(cert + " is for ")]
    assert (named.level, named.what) == ("WARN", "%s is for solo, and not for other.example.org" % cert)
    assert "cea request-pairing" in named.hint
    for name in ("solo", "SOLO", "solo.example.org"):
        monkeypatch.setattr(ctrl_exec.socket, "gethostname", lambda: name)
        assert "OK %s is for solo" % cert in self_check(site)


def spare_ca(site, where):
    """Another CA, of our making: (certificate, key) paths."""
    ca = str(where / "ca.crt")
    ctrl_exec.new_ca(OPENSSL, ca, "ec", "another")
    return ca, ctrl_exec.ca_key_path(ca)


def old_ca(site, where, start):
    """The certificate of a CA whose life of ten years began `start` days from now."""
    real = ctrl_exec.now
    ctrl_exec.now = lambda: time.time() + start * 86400
    try:
        return spare_ca(site, where)[0]
    finally:
        ctrl_exec.now = real


@pytest.mark.parametrize(
    "start, words", [(-3640, "WARN %s expires in 9 days"), (-4000, "FAIL %s: the certificate is refused: "),
                     (9, "FAIL %s: the certificate is refused: ")],
)  # fmt: skip
def test_both_sides_are_told_of_the_dates_of_every_ca_that_they_believe(site, tmp_path, start, words):
    old = old_ca(site, tmp_path, start)
    with open(old, "rb") as file:
        data = file.read()
    agents = site["solo"].config.ca
    with open(agents, "ab") as file:
        file.write(data)
    assert [line for line in self_check(site) if line.startswith(words % agents)]
    successor = ctrl_exec.next_path(site.control.config.ca)
    put(successor, data, 0o644)
    assert [line for line in check(site) if line.startswith(words % successor)]


def test_both_sides_are_told_of_a_ca_file_that_is_none(site):
    for config, found in ((site["solo"].config, self_check), (site.control.config, check)):
        put(config.ca, b"no certificate\n", 0o644)
        assert [line for line in found(site) if line.startswith("FAIL CA certificate %s: " % config.ca)]
        os.unlink(config.ca)
        assert [line for line in found(site) if "FAIL" in line and "%s: no such file" % config.ca in line]


def test_a_control_host_is_told_of_a_key_that_is_not_the_ca_s(site, tmp_path):
    shutil.copy(spare_ca(site, tmp_path)[1], ctrl_exec.ca_key_path(site.control.config.ca))
    words = "FAIL CA certificate %s and its key: " % site.control.config.ca
    assert [line for line in check(site) if line.startswith(words)]


def test_a_control_host_is_told_when_its_id_is_not_the_one_that_it_is_certified_for(site):
    reissue(site, site.control, "another", "dispatcher")
    cert = site.control.config.cert
    assert "WARN %s is for another, and not for control" % cert in check(site)


def test_a_control_host_is_told_of_a_former_or_next_certificate_that_has_lost_its_key(site):
    kept = former(site)
    assert "OK certificate %s and its key" % kept.cert in check(site)
    put(kept.key, OPENSSL.new_key("ec"))
    assert [line for line in check(site) if line.startswith("FAIL certificate %s and its key: " % kept.cert)]
    identity = ctrl_exec.dispatcher_identity(site.control.config)
    shutil.copy(identity.cert, ctrl_exec.next_path(identity.cert))
    put(ctrl_exec.next_path(identity.key), OPENSSL.new_key("ec"))
    words = "FAIL certificate %s and its key: " % ctrl_exec.next_path(identity.cert)
    assert [line for line in check(site) if line.startswith(words)]


@pytest.mark.parametrize("name", ["rotation.json", "revoked-serials", "agents/solo.json"])
def test_a_control_host_is_told_of_a_file_that_is_spoiled(site, name):
    path = site.control.config.revoked_serials
    if name.endswith(".json"):
        path = site.control.file(ctrl_exec.VAR + "/" + name)
    put(path, b"{ spoiled", 0o640)
    found = ctrl_exec.check_dispatcher(site.control.config)
    (line,) = [one for one in found if one.level == "FAIL"]
    assert path in line.what and line.hint


def test_the_command_shows_what_to_do_and_fails_for_what_is_wrong_only(site):
    os.chmod(site.control.config.runs_dir, 0o755)
    done = site.control.run("check")
    assert done.returncode == 0
    (line,) = [line for line in done.out.splitlines() if "is for everybody to read" in line]
    assert line.startswith("WARN  ") and line.endswith("(chmod o-rwx %s)" % site.control.config.runs_dir)
    os.chmod(site.control.config.runs_dir, 0o777)
    status, answer = site.control.json("check")
    assert status == 1 and answer["ok"] is False


def test_the_api_s_own_certificate_and_what_it_is_open_to_are_looked_at(site):
    config = site.control.config
    cert, key = (site.control.file(ctrl_exec.ETC + "/api." + kind) for kind in ("crt", "key"))
    put(key, OPENSSL.new_key("ec"))
    with open(config.path, "a", encoding="ascii") as file:
        file.write(
            "api_cert = %s\napi_key = %s\napi_bind = 0.0.0.0\napi_auth_default = allow\n" % (cert, key)
        )
    changed = ctrl_exec.load_config("dispatcher", "", site.control.root)

    def found():
        return [line for line in lines(ctrl_exec.check_api(changed)) if "api" in line.lower()]

    assert [line for line in found() if line.startswith("FAIL TLS of the API %s: " % cert)]
    pem = sign(site, OPENSSL.new_request(key, "control"), "control", "dispatcher", start=-350)
    put(cert, pem.encode(), 0o644)
    assert {"OK TLS of the API %s" % cert, "WARN %s expires in 14 days" % cert} <= set(found())
    assert any(line.startswith("WARN api_auth_default = allow") for line in found())
    assert not any("without TLS" in line for line in found())
    os.chmod(key, 0o606)
    assert "FAIL %s is writable by everybody (mode 0606)" % key in found()


# --- clocks ---------------------------------------------------------------------------------------------


def tell(site, ahead=0.0, **body):
    """A ping from a dispatcher whose clock is that many seconds ahead of the agent's."""
    body = dict({"reqid": "p", "time": ctrl_exec.iso_time(time.time() + ahead)}, **body)
    host = site["solo"]
    status, answer = support.post(host.port, support.dispatcher_context(site.control), "/ping", body)
    assert (status, answer["status"]) == (200, "ok")


def clock_line(site):
    (line,) = [line for line in self_check(site) if " dispatcher control" in line]
    return line


def notes(site):
    return ctrl_exec.load_clocks(ctrl_exec.clocks_path(site["solo"].config))


@pytest.fixture
def ticking(site):
    """A front that has noted nothing yet."""
    assert "RESULT=ok" in site["solo"].reload()
    return site


def test_an_agent_compares_its_clock_with_its_dispatcher_s(ticking):
    assert clock_line(ticking) == "WARN dispatcher control has not told this host the time"
    tell(ticking)
    assert clock_line(ticking).startswith("OK dispatcher control: its clock agreed at 20")
    for ahead, words in ((7200, "7199 s ahead of"), (-86400, "86400 s behind")):
        tell(ticking, ahead)
        hit = clock_line(ticking).partition(" this one at ")
        assert hit[0].startswith("WARN dispatcher control: its clock was ")
        assert abs(int(hit[0].split()[6]) - abs(ahead)) < 60 and hit[0].endswith(words.split(" s ")[1])
        tell(ticking)  # set right
        assert clock_line(ticking).startswith("OK")


def test_ced_ping_tells_the_time(ticking):
    assert ticking.control.run("ping", "solo").returncode == 0
    assert clock_line(ticking).startswith("OK dispatcher control: its clock agreed at ")


def test_a_clock_is_noted_once_a_minute_while_nothing_changes(ticking):
    tell(ticking)
    path = ctrl_exec.clocks_path(ticking["solo"].config)
    written = os.stat(path).st_mtime_ns
    for _ in range(5):
        tell(ticking)
    assert os.stat(path).st_mtime_ns == written
    tell(ticking, 3600)
    assert os.stat(path).st_mtime_ns != written


@pytest.mark.parametrize("told", ["", "soon", "2026-13-99", "9" * 64, None])
def test_a_time_that_is_none_is_not_noted_and_the_ping_is_answered(ticking, told):
    (
        tell(ticking, time=told)
        if told is not None
        else support.post(
            ticking["solo"].port, support.dispatcher_context(ticking.control), "/ping", {"reqid": "p"}
        )
    )
    assert notes(ticking) == {}


def test_what_is_noted_is_private_and_only_of_dispatchers_that_are_trusted(ticking):
    path = ctrl_exec.clocks_path(ticking["solo"].config)
    gone = {"ahead": 5, "seen": "2026-01-01T00:00:00Z"}
    put(path, json.dumps({"gone": gone}).encode())
    tell(ticking)
    assert set(notes(ticking)) == {"control"}
    assert os.stat(path).st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    "text",
    [
        b"{",
        b"[]",
        b'{"control": 7}',
        b'{"control": {"ahead": "far", "seen": ""}}',
        b'{"control": {"ahead": 1e999, "seen": ""}}',
    ],
)
def test_a_note_that_is_spoiled_is_said_so_and_mended_by_the_next(ticking, text):
    path = ctrl_exec.clocks_path(ticking["solo"].config)
    put(path, text)
    assert [line for line in self_check(ticking) if line.startswith("FAIL clocks: %s" % path)]
    tell(ticking)
    assert clock_line(ticking).startswith("OK")


def test_a_note_that_cannot_be_written_costs_no_ping(ticking):
    path = ctrl_exec.clocks_path(ticking["solo"].config)
    os.makedirs(path)
    tell(ticking)
    assert wait_until(lambda: [line for line in ticking["solo"].events("run-store-fail") if path in line])
    os.rmdir(path)
    tell(ticking)  # and it is tried again
    assert clock_line(ticking).startswith("OK")


@pytest.mark.parametrize("args", [(), ("1", "2"), ("",), ("soon",), ("9" * 5000,), ("1e5",)])
def test_a_distance_that_is_none_is_refused_by_the_side_that_writes(site, args):
    config = site["solo"].config
    identity = ctrl_exec.agent_identity(config)
    path = str(site.top) + "/clocks.json"
    custody = ctrl_exec.Custody(
        identity, config.trusted_dispatchers_path, "", config.revoked_serials, path, path + ".addresses",
        path + ".secrets", "solo",
    )  # fmt: skip
    request = ctrl_exec.JobRequest("note-clock", "x", "control", args=args)
    with pytest.raises(ctrl_exec.BadRequest):
        ctrl_exec.Custodian(custody, OPENSSL, None).note_clock(request)
    assert not os.path.exists(path)
