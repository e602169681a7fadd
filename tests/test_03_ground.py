import contextlib
import errno
import fcntl
import json
import os
import re
import signal
import stat
import subprocess
import sys
import threading
import traceback
import unicodedata

import ctrl_exec
import pytest
import support
from ctrl_exec import FileLock, StorageError, read_file, run_program, write_atomic

needs_root = pytest.mark.skipif(not support.IS_ROOT, reason="only root may mount and give files away")

NASTY = {
    "newline": "a\nACTION=run SCRIPT=evil",
    "carriage return": "a\rACTION=run",
    "quote": 'say "hi" EXIT=0',
    "backslash": "a\\nb\\",
    "escape sequence": "\x1b]0;title\x07\x1b[2J",
    "C1": "a\x9b2Jb\x85c",
    "delete": "a\x7fb",
    "NUL": "a\0b",
    "equals": "x EXIT=0",
    "not ASCII": "bj\u00f6rk \u65e5\u672c \U0001f4a5",
    "right-to-left override": "a\u202egnp.sh",
    "line separator": "a\u2028b\u2029c",
    "raw byte": b"caf\xe9".decode("utf-8", "surrogateescape"),
    "empty": "",
    "very long": "\n" * 100000,
}
nasty = pytest.mark.parametrize("text", list(NASTY.values()), ids=list(NASTY))


def in_child(work):
    """Run `work()` in a forked child; returns its wait status. What it raises is status 1."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1]


def open_descriptors():
    """How many descriptors this process has open."""
    return len(os.listdir("/proc/self/fd"))


def is_gone(pid):
    """Whether a process has ended, reaped or not."""
    try:
        with open("/proc/%d/stat" % pid, "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] in (b"Z", b"X")
    except (FileNotFoundError, ProcessLookupError):
        return True


# --- events and text ------------------------------------------------------------------------------------


def parse_event(line):
    """The pairs of an event line, read as a log reader would."""
    pairs, at = [], 0
    while at < len(line):
        key, _, _ = line[at:].partition("=")
        at += len(key) + 1
        if line[at : at + 1] == '"':
            value, length = json.JSONDecoder().raw_decode(line[at:])
        else:
            value = line[at:].partition(" ")[0]
            length = len(value)
        pairs.append((key, value))
        at += length + 1
    return pairs


@nasty
def test_an_event_is_one_line_of_printable_ascii_whatever_its_values(text):
    line = ctrl_exec.format_event("run", {"SCRIPT": text, "EXIT": 3})
    assert re.fullmatch("[ -~]+", line), line
    assert len(line) < 10000


@nasty
def test_no_value_of_an_event_can_pass_for_another_field(text):
    pairs = parse_event(ctrl_exec.format_event("run", {"SCRIPT": text, "EXIT": 3, "ARGS": text}))
    assert [key for key, _ in pairs] == ["ACTION", "ARGS", "EXIT", "SCRIPT"]
    assert dict(pairs)["EXIT"] == "3"
    assert dict(pairs)["SCRIPT"] == (text if len(text) <= 1000 else text[:1000] + "...")


def test_plain_values_of_an_event_stand_as_they_are_and_keys_are_sorted():
    line = ctrl_exec.format_event("dispatch", {"REQID": "ab-1", "HOST": "web.x:7443", "IP": "::1"})
    assert line == "ACTION=dispatch HOST=web.x:7443 IP=::1 REQID=ab-1"


@nasty
def test_printable_text_holds_no_control_and_nothing_that_turns_a_line_round(text):
    shown = ctrl_exec.printable(text)
    controls = {char for char in shown if unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp")}
    assert controls <= {"\n", "\t"}
    assert not set(shown) & set(map(chr, [*range(0x202A, 0x202F), *range(0x2066, 0x206A)]))
    assert "\n" not in ctrl_exec.one_line(text) and "\t" not in ctrl_exec.one_line(text)


def test_printable_leaves_ordinary_text_alone():
    assert ctrl_exec.printable("bj\u00f6rk\t\u65e5\u672c\n") == "bj\u00f6rk\t\u65e5\u672c\n"
    assert ctrl_exec.printable("\x1b[2J\x9b") == "\\x1b[2J\\x9b"


def test_events_under_the_C_locale_are_ascii_lines_in_the_file_and_on_standard_error(tmp_path):
    code = """if 1:
        import sys
        sys.path.insert(0, sys.argv[1])
        import ctrl_exec
        text = "bj\\u00f6rk \\u65e5\\u672c \\udce9\\n\\x1b[2J"
        ctrl_exec.LOG.event("one", VALUE=text)
        ctrl_exec.LOG.open("tag", sys.argv[2])
        ctrl_exec.LOG.event("two", VALUE=text)
    """
    log = tmp_path / "new" / "event.log"
    argv = [sys.executable, "-I", "-c", code, os.path.dirname(support.PROGRAM), str(log)]
    environment = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = subprocess.run(argv, env=environment, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    stamp = rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ "
    value = rb' VALUE="bj\\u00f6rk \\u65e5\\u672c \\udce9\\n\\u001b\[2J"\n'
    assert re.fullmatch(stamp + b"ACTION=one" + value, done.stderr)
    assert re.fullmatch(stamp + b"ACTION=two" + value, log.read_bytes())
    assert stat.S_IMODE(log.stat().st_mode) & 0o027 == 0


def test_logging_to_a_full_disk_raises_nothing():
    log = ctrl_exec.EventLog()
    log.open("tag", "/dev/full")
    assert log.event("run", HOST="a") is None
    os.close(log.descriptor())


def test_a_log_that_is_a_symlink_is_refused(tmp_path):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "log").symlink_to(tmp_path / "victim")
    with pytest.raises(StorageError, match="cannot open the log"):
        ctrl_exec.EventLog().open("tag", str(tmp_path / "log"))
    assert (tmp_path / "victim").read_text() == "mine"


def test_times_and_ids_have_one_form():
    assert ctrl_exec.iso_time(0) == "1970-01-01T00:00:00Z"
    assert re.fullmatch("[0-9a-f]{16}", ctrl_exec.new_id())
    assert len({ctrl_exec.new_id() for _ in range(1000)}) == 1000


def test_a_deadline_ignores_the_wall_clock(monkeypatch):
    deadline = ctrl_exec.Deadline(3600)
    monkeypatch.setattr(ctrl_exec, "now", lambda: 10.0**12)
    assert not deadline.is_over()
    assert 0 < deadline.left() <= 3600


@pytest.mark.parametrize("seconds", [0, -5])
def test_a_deadline_that_is_over_has_nothing_left(seconds):
    deadline = ctrl_exec.Deadline(seconds)
    assert deadline.is_over()
    assert deadline.left() == 0


# --- reading --------------------------------------------------------------------------------------------


def test_a_missing_file_is_its_own_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_file(str(tmp_path / "none"))


def test_what_is_not_a_regular_file_is_refused_at_once_and_leaves_no_descriptor(tmp_path):
    os.mkfifo(str(tmp_path / "fifo"))
    before = open_descriptors()
    for path in (str(tmp_path / "fifo"), str(tmp_path), "/dev/zero"):
        with pytest.raises(StorageError, match=re.escape(path)):
            read_file(path)
    assert open_descriptors() == before


def test_a_file_of_the_limit_is_read_and_one_byte_more_is_refused(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100)
    assert read_file(str(path), limit=100) == b"x" * 100
    with pytest.raises(StorageError, match="larger than 99 bytes"):
        read_file(str(path), limit=99)


def test_a_file_without_rights_is_an_error_with_its_path_and_what_to_do(tmp_path):
    path = tmp_path / "secret"
    path.write_text("x")
    path.chmod(0)

    def work():
        os.chdir(str(tmp_path))  # the way here may be closed to the other user
        if support.IS_ROOT:
            os.chmod(".", 0o755)
            os.setresuid(65534, 65534, 65534)
        with pytest.raises(StorageError, match="cannot read secret: Permission denied") as caught:
            read_file("secret")
        assert "as root" in caught.value.hint

    assert in_child(work) == 0


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b'{"a": "\xff"}', b"[" * 200000, b"null"])
def test_a_damaged_state_file_is_reported_by_name(data, tmp_path):
    path = tmp_path / "state.json"
    path.write_bytes(data)
    with pytest.raises(StorageError, match="state.json"):
        ctrl_exec.read_json_file(str(path))


def test_a_state_file_comes_back_as_it_was_written(tmp_path):
    value = {"name": "bj\u00f6rk", "list": [1, None, True], "lone": "\udce9"}
    write_atomic(str(tmp_path / "state.json"), ctrl_exec.encode_state(value))
    assert ctrl_exec.read_json_file(str(tmp_path / "state.json")) == value


# --- writing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o000, 0o077])
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644])
def test_a_written_file_has_the_mode_asked_for_under_any_umask(umask, mode, tmp_path):
    path = tmp_path / "file"
    old = os.umask(umask)
    try:
        write_atomic(str(path), b"one", mode=mode)
        write_atomic(str(path), b"two", mode=mode, durable=True)
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert path.read_bytes() == b"two"
    assert os.listdir(str(tmp_path)) == ["file"]


def test_a_new_mode_replaces_the_old_one(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"open")
    path.chmod(0o666)
    write_atomic(str(path), b"shut", mode=0o600)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_symlink_of_ours_is_written_through_and_never_replaced(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "real").write_text("old")
    (tmp_path / "file").symlink_to("elsewhere/real")
    (tmp_path / "dangling").symlink_to("elsewhere/none")
    for link, real in (("file", "real"), ("dangling", "none")):
        write_atomic(str(tmp_path / link), b"new", durable=True)
        assert (tmp_path / link).is_symlink() and (tmp_path / "elsewhere" / real).read_text() == "new"
    with pytest.raises(FileExistsError):
        write_atomic(str(tmp_path / "file"), b"newer", replace=False)
    (tmp_path / "next").write_text("renamed")
    ctrl_exec.rename_durably(str(tmp_path / "next"), str(tmp_path / "file"))
    assert (tmp_path / "file").is_symlink() and (tmp_path / "elsewhere" / "real").read_text() == "renamed"


def test_a_link_to_another_file_system_stays_and_leads_to_the_new_content(tmp_path, monkeypatch):
    def rename(source, target, real=os.rename):
        if os.path.dirname(source) != os.path.dirname(target):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))  # as rename(2) does
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    other = tmp_path / "other"
    other.mkdir()
    (other / "real").write_text("old")
    (tmp_path / "next").write_text("new")
    (tmp_path / "next").chmod(0o600)
    (tmp_path / "file").symlink_to("other/real")
    ctrl_exec.rename_durably(str(tmp_path / "next"), str(tmp_path / "file"))
    assert (tmp_path / "file").is_symlink() and (tmp_path / "file").read_text() == "new"
    assert stat.S_IMODE((other / "real").stat().st_mode) == 0o600
    assert not (tmp_path / "next").exists() and os.listdir(str(other)) == ["real"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: a link of another user")
def test_a_symlink_of_another_user_is_neither_followed_nor_replaced(tmp_path):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "file").symlink_to(tmp_path / "victim")
    os.lchown(str(tmp_path / "file"), 65534, 65534)
    with pytest.raises(StorageError, match="a symlink that somebody else has made"):
        write_atomic(str(tmp_path / "file"), b"new")
    assert (tmp_path / "victim").read_text() == "mine" and (tmp_path / "file").is_symlink()


def test_without_replace_an_existing_file_is_kept(tmp_path):
    path = tmp_path / "file"
    write_atomic(str(path), b"first", replace=False)
    with pytest.raises(FileExistsError):
        write_atomic(str(path), b"second", replace=False)
    assert path.read_bytes() == b"first"
    assert os.listdir(str(tmp_path)) == ["file"]


def test_a_file_that_cannot_be_written_is_named_and_leaves_nothing(tmp_path):
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory" / "something").touch()
    for path in (tmp_path / "none" / "file", tmp_path / "directory"):
        with pytest.raises(StorageError, match=re.escape("cannot write %s: " % path)):
            write_atomic(str(path), b"x")
    assert os.listdir(str(tmp_path)) == ["directory"]


def test_a_write_beyond_the_file_size_limit_keeps_the_old_file(tmp_path):
    path = str(tmp_path / "file")
    write_atomic(path, b"old")

    def work():
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        before = open_descriptors()
        with pytest.raises(StorageError, match="cannot write"):
            write_atomic(path, b"x" * 100000)
        assert open_descriptors() == before

    assert in_child(work) == 0
    assert read_file(path) == b"old"
    assert os.listdir(str(tmp_path)) == ["file"]


@needs_root
def test_a_full_disk_keeps_the_old_file_and_leaves_no_temporary_one(tmp_path):
    disk = str(tmp_path / "disk")
    os.mkdir(disk)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], check=True, timeout=60)
    try:
        path = os.path.join(disk, "file")
        write_atomic(path, b"old", durable=True)
        for durable in (False, True):
            with pytest.raises(StorageError, match="cannot write .*No space left") as caught:
                write_atomic(path, b"x" * 200000, durable=durable)
            assert caught.value.__cause__.errno == errno.ENOSPC
        assert read_file(path) == b"old"
        assert os.listdir(disk) == ["file"]
        write_atomic(path, b"x" * 8000)  # and it works again when there is room
        assert read_file(path) == b"x" * 8000
    finally:
        subprocess.run(["umount", disk], check=True, timeout=60)


@needs_root
def test_root_gives_a_file_to_its_owner_before_it_has_its_name(tmp_path):
    path = tmp_path / "file"
    write_atomic(str(path), b"x", mode=0o640, owner=ctrl_exec.Owner(65534, -1))
    assert (path.stat().st_uid, path.stat().st_gid) == (65534, os.getegid())
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def kill_at_line(count):
    """Trace this process, and SIGKILL it before the `count`th line that write_atomic executes."""
    left = [count]

    def trace(frame, event, _):
        if frame.f_code is not write_atomic.__code__:
            return None
        if event == "line":
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)


@pytest.mark.parametrize("replace", [True, False])
def test_sigkill_at_any_line_of_a_write_leaves_the_old_file_or_the_new_one(replace, tmp_path):
    seen = set()
    for count in range(1, 200):
        directory = tmp_path / str(count)
        directory.mkdir()
        path = directory / "file"
        if replace:
            path.write_bytes(b"old")

        def work():
            kill_at_line(count)
            write_atomic(str(path), b"new" * 1000, mode=0o600, durable=True, replace=replace)

        status = in_child(work)
        seen.add(path.read_bytes() if path.exists() else None)
        strangers = [name for name in os.listdir(str(directory)) if name != "file"]
        assert all(name.startswith(".tmp-") for name in strangers)
        if status == 0:
            break
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert status == 0 and count > 10
    assert seen == {b"old" if replace else None, b"new" * 1000}


def test_a_reader_and_a_kill_in_mid_write_never_meet_half_a_file(tmp_path):
    path = str(tmp_path / "file")
    whole = {bytes([65 + number]) * 300000 for number in range(3)}
    write_atomic(path, min(whole))
    for looks in range(0, 60, 5):
        pid = os.fork()
        if pid == 0:
            try:
                while True:
                    for data in whole:
                        write_atomic(path, data)
            finally:
                os._exit(1)
        try:
            first = os.stat(path).st_ino
            support.wait_until(lambda: os.stat(path).st_ino != first, what="a write")
            for _ in range(looks):
                assert read_file(path) in whole
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        assert read_file(path) in whole


def test_an_existing_directory_keeps_its_mode_and_a_new_one_gets_it(tmp_path):
    (tmp_path / "old").mkdir(mode=0o711)
    old_mode = stat.S_IMODE((tmp_path / "old").stat().st_mode)
    ctrl_exec.make_directory(str(tmp_path / "old"), 0o700)
    ctrl_exec.make_directory(str(tmp_path / "a" / "new"), 0o770)
    assert stat.S_IMODE((tmp_path / "old").stat().st_mode) == old_mode
    assert stat.S_IMODE((tmp_path / "a" / "new").stat().st_mode) == 0o770
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot make the directory"):
        ctrl_exec.make_directory(str(tmp_path / "file" / "x"), 0o700)


# --- locks ----------------------------------------------------------------------------------------------


def test_a_lock_is_held_by_one_at_a_time(tmp_path):
    one, two = FileLock(str(tmp_path / "lock")), FileLock(str(tmp_path / "lock"))
    assert one.acquire() is True
    assert two.acquire() is False
    one.release()
    assert two.acquire() is True
    two.release()
    two.release()
    assert (tmp_path / "lock").exists()


@pytest.mark.parametrize("transient", [False, True])
def test_kill_9_frees_a_lock(transient, tmp_path):
    path = str(tmp_path / "lock")
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reader)
            lock = FileLock(path, transient)
            os.write(writer, b"y" if lock.acquire() else b"n")
            signal.pause()
        finally:
            os._exit(1)
    mine = FileLock(path, transient)
    try:
        os.close(writer)
        assert os.read(reader, 1) == b"y"
        os.close(reader)
        assert mine.acquire() is False
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert mine.acquire() is True
    mine.release()
    assert os.path.exists(path) is not transient


def test_a_transient_lock_excludes_while_others_remove_its_file(tmp_path):
    path, counter = str(tmp_path / "lock"), tmp_path / "counter"
    counter.write_text("0")
    workers, rounds = 4, 100

    def work():
        for _ in range(rounds):
            with FileLock(path, transient=True):
                counter.write_text(str(int(counter.read_text()) + 1))

    children = []
    for _ in range(workers):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                work()
                status = 0
            finally:
                os._exit(status)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * workers
    assert counter.read_text() == str(workers * rounds)
    assert os.listdir(str(tmp_path)) == ["counter"]


def look_at(path):
    """Share a lock, as who looks whether it is held."""
    descriptor = os.open(path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    return descriptor


def test_who_looks_at_a_lock_for_a_moment_keeps_nobody_from_it(tmp_path):
    path = tmp_path / "lock"
    path.touch()
    timer = threading.Timer(0.5, os.close, (look_at(path),))
    timer.start()
    lock = FileLock(str(path))
    assert lock.acquire() is True
    timer.join()
    assert ctrl_exec.is_locked(os.open(path, os.O_RDONLY)) is True
    lock.release()


def test_who_looks_at_a_lock_for_ever_holds_it(tmp_path, monkeypatch):
    monkeypatch.setattr(ctrl_exec, "LOOK_SECONDS", 0.1)
    path = tmp_path / "lock"
    path.touch()
    descriptor = look_at(path)
    assert FileLock(str(path)).acquire() is False
    os.close(descriptor)


def test_a_lock_is_read_while_it_is_held_and_is_not_made_by_that(tmp_path):
    path = tmp_path / "lock"
    assert ctrl_exec.read_lock(str(path)) is None and os.listdir(tmp_path) == []
    with FileLock(str(path)) as lock:
        lock.write("pid 7" + " " * 5000)
        assert ctrl_exec.read_lock(str(path)).startswith("pid 7")
        assert len(ctrl_exec.read_lock(str(path))) <= 1024
    assert ctrl_exec.read_lock(str(path)) is None
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(OSError):
        ctrl_exec.read_lock(str(tmp_path / "link"))


def test_a_lock_says_who_holds_it(tmp_path):
    path = tmp_path / "lock"
    path.write_text("somebody before, with a long text")
    with FileLock(str(path)) as lock:
        lock.write("pid 7")
        assert path.read_text() == "pid 7"


def test_a_lock_is_not_taken_through_a_symlink(tmp_path):
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="cannot open the lock"):
        FileLock(str(tmp_path / "lock")).acquire()
    assert not (tmp_path / "elsewhere").exists()


# --- helper programs ------------------------------------------------------------------------------------


def shell(text, **how):
    return run_program(["/bin/sh", "-c", text], **how)


def test_a_program_gets_its_input_and_gives_its_output_and_status():
    done = shell("cat; echo problem >&2; exit 3", stdin=b"data")
    assert done == (3, b"data", b"problem\n")
    assert shell("kill -9 $$").status == -signal.SIGKILL


def test_a_program_starts_in_a_clean_place(monkeypatch, tmp_path):
    monkeypatch.setenv("SECRET", "x")
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    done = shell("pwd; echo $(ls /proc/self/fd | wc -l); exec env")
    os.close(reader)
    os.close(writer)
    lines = done.stdout.decode().splitlines()
    assert lines[0] == "/"
    assert int(lines[1]) == 4  # the three standard ones and the directory that ls reads
    assert "PATH=" + ctrl_exec.SAFE_PATH in lines and "LC_ALL=C" in lines
    assert not [line for line in lines if line.startswith("SECRET")]


def test_a_program_that_is_not_there_is_an_oserror_and_leaves_no_descriptor(tmp_path):
    before = open_descriptors()
    with pytest.raises(FileNotFoundError):
        run_program([str(tmp_path / "none")])
    assert open_descriptors() == before


def test_a_program_that_reads_no_input_is_not_an_error():
    assert shell("exit 0", stdin=b"x" * 1000000).status == 0


def test_ten_megabytes_of_output_arrive_or_are_thrown_away_as_asked():
    flood = "head -c 10000000 /dev/zero; head -c 1000000 /dev/zero >&2"
    done = shell(flood)
    assert (done.status, len(done.stdout), len(done.stderr)) == (0, 10000000, 1000000)
    assert shell(flood, discard=True) == (0, b"", b"")


def test_time_running_out_kills_the_whole_group(tmp_path):
    note = tmp_path / "pid"
    before = open_descriptors()
    done = shell("sleep 1000 & echo $! $$ >%s; wait" % note, timeout=3)
    assert done == (None, b"", b"")
    pids = [int(word) for word in note.read_text().split()]
    assert len(pids) == 2
    support.wait_until(lambda: all(is_gone(pid) for pid in pids), what="the end of the group")
    assert open_descriptors() == before


def test_a_grandchild_that_holds_the_pipes_ends_with_the_time_limit(tmp_path):
    note = tmp_path / "pid"
    done = shell("sleep 1000 & echo $! >%s; exit 0" % note, timeout=3)
    assert done.status is None
    support.wait_until(lambda: is_gone(int(note.read_text())), what="the end of the grandchild")


def test_a_grandchild_in_a_session_of_its_own_cannot_hold_us(tmp_path):
    note = tmp_path / "pid"
    done = shell("setsid sh -c 'echo $$ >%s; exec sleep 1000' & exit 0" % note, timeout=1)
    assert done.status is None
    pid = int(support.wait_until(lambda: note.exists() and note.read_text(), what="the grandchild"))
    assert not is_gone(pid)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def test_a_background_child_does_not_hold_a_program_whose_output_is_thrown_away(tmp_path):
    note = tmp_path / "pid"
    done = shell("sleep 1000 & echo $! >%s; exit 5" % note, discard=True, timeout=60)
    os.kill(int(note.read_text()), signal.SIGKILL)
    assert done.status == 5
