"""What an agent keeps of a run, and how it is shown while it grows."""

import base64
import fcntl
import json
import os
import signal
import socket
import threading
import time

import ctrl_exec
import pytest


@pytest.fixture
def store(tmp_path):
    os.makedirs(str(tmp_path / "runs" / "me"))
    return ctrl_exec.RunStore(str(tmp_path / "runs"), None, 3600)


def put(store, reqid, out=b"", err=b"", status="done", **values):
    record = ctrl_exec.RunRecord(
        reqid, "me", "script", "host", "", "", status, "2026-01-01T00:00:00Z", 1, **values
    )
    ctrl_exec.write_record(store, record, new=True)
    for suffix, data in ((".out", out), (".err", err)):
        with open(ctrl_exec.record_path(store, "me", reqid, suffix), "wb") as file:
            file.write(data)
    return record


def shown(data):
    """The events of a follower, and what each stream was in all."""
    events = [json.loads(line) for line in data.decode().splitlines()]
    streams = {"stdout": b"", "stderr": b""}
    for event in events:
        if event["event"] == "output":
            import base64

            exact = event.get("base64")
            streams[event["stream"]] += base64.b64decode(exact) if exact else event["data"].encode()
    return events, streams


def follow(store, reqid, record, **offsets):
    ours, theirs = socket.socketpair()
    window = ctrl_exec.Window(theirs, store, "me", reqid, dict({"stdout": 0, "stderr": 0}, **offsets))
    window.finish(record)
    theirs.close()
    data = b""
    while True:
        piece = ours.recv(65536)
        if not piece:
            ours.close()
            return shown(data)
        data += piece


@pytest.mark.parametrize("cut", range(11))
def test_a_piece_ends_between_two_characters_wherever_it_is_cut(store, cut):
    text = "aä€😀b".encode()
    record = put(store, "r", status="running")
    ours, theirs = socket.socketpair()
    window = ctrl_exec.Window(theirs, store, "me", "r", {"stdout": 0, "stderr": 0})
    with open(ctrl_exec.record_path(store, "me", "r", ".out"), "ab") as file:
        for part in (text[:cut], text[cut:]):
            file.write(part)
            file.flush()
            window.pump()
    window.finish(record)
    theirs.close()
    events, streams = shown(ours.makefile("rb").read())
    ours.close()
    assert streams["stdout"] == text
    assert not any("base64" in event for event in events)


def test_bytes_that_are_no_text_are_carried_exactly_and_the_end_says_how_it_went(store):
    record = put(store, "r", b"\xff\xfe\x00", b"e", exit=3)
    events, streams = follow(store, "r", record)
    assert streams == {"stdout": b"\xff\xfe\x00", "stderr": b"e"}
    assert (events[-1]["event"], events[-1]["exit"], events[-1]["status"]) == ("end", 3, "done")
    assert "stdout" not in events[-1]


@pytest.mark.parametrize("start, rest", [(0, b"abcdef"), (4, b"ef"), (6, b""), (900, b""), (-1, b"")])
def test_following_begins_where_it_is_told(store, start, rest):
    record = put(store, "r", b"abcdef")
    events, streams = follow(store, "r", record, stdout=start)
    assert streams["stdout"] == rest
    assert not rest or [event["offset"] for event in events if event["event"] == "output"] == [6]


def test_a_follower_who_takes_nothing_holds_up_nobody_and_costs_one_piece(store):
    put(store, "r", b"x" * 5_000_000, status="running")
    ours, theirs = socket.socketpair()
    window = ctrl_exec.Window(theirs, store, "me", "r", {"stdout": 0, "stderr": 0})
    assert window.pump() is True  # more waits for him
    assert window.pump() is True
    ours.close()
    assert window.pump() is False and window.is_open is False
    theirs.close()


def test_a_silent_run_shows_that_it_lives(store, monkeypatch):
    put(store, "r", status="running")
    monkeypatch.setattr(ctrl_exec, "BEAT_SECONDS", 0)
    ours, theirs = socket.socketpair()
    window = ctrl_exec.Window(theirs, store, "me", "r", {"stdout": 0, "stderr": 0})
    window.pump()
    assert json.loads(ours.recv(4096).splitlines()[0]) == {"event": "beat"}
    ours.close()
    theirs.close()


# --- claims ---------------------------------------------------------------------------------------------


def test_a_claim_has_one_holder_and_is_seen(store):
    path = ctrl_exec.record_path(store, "me", "r", ".out")
    claim = ctrl_exec.claim_run(store, "me", "r")
    assert claim >= 0 and ctrl_exec.is_claimed(path)
    assert ctrl_exec.claim_run(store, "me", "r") == -1
    os.close(claim)
    assert not ctrl_exec.is_claimed(path)


def test_a_claim_on_a_file_that_was_removed_is_none(store):
    path = ctrl_exec.record_path(store, "me", "r", ".out")
    first = ctrl_exec.claim_run(store, "me", "r")
    os.unlink(path)
    second = ctrl_exec.claim_run(store, "me", "r")
    assert second >= 0 and ctrl_exec.is_current(second, path) and not ctrl_exec.is_current(first, path)
    os.close(first)
    os.close(second)


def test_waiting_ends_when_the_claim_does_and_when_it_is_enough(store):
    claim = ctrl_exec.claim_run(store, "me", "r")
    asked = []
    ctrl_exec.wait_for_end(store, "me", "r", lambda: asked.append(1) or len(asked) == 2)
    assert len(asked) >= 2  # a third look may come while the second one ends it
    pid = os.fork()
    if pid == 0:
        os.close(claim)  # the lock belongs to both copies
        ctrl_exec.wait_for_end(store, "me", "r", lambda: False)
        os._exit(7)
    os.close(claim)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


def test_a_name_that_is_a_path_is_no_run(store):
    for owner, reqid in (("..", "r"), ("me", "../r"), ("me/x", "r"), ("", "r"), ("me", "")):
        with pytest.raises(ctrl_exec.BadRequest):
            ctrl_exec.claim_run(store, owner, reqid)


# --- the end of a run that nobody watches ---------------------------------------------------------------


@pytest.fixture
def seen_for_a_moment(store):
    """A run whose process was killed, and whose claim somebody looks at until a second has gone by."""
    put(store, "r", status="running")
    look = os.open(ctrl_exec.record_path(store, "me", "r", ".out"), os.O_RDONLY)
    fcntl.flock(look, fcntl.LOCK_SH)
    timer = threading.Timer(1, os.close, (look,))
    timer.start()
    before = signal.getsignal(signal.SIGALRM)
    yield ctrl_exec.find_record(store, "me", "r")
    signal.signal(signal.SIGALRM, before)
    timer.join()


def test_who_waits_for_a_run_is_told_its_end_though_another_looks_at_its_claim(store, seen_for_a_moment):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        record = ctrl_exec._await_run(theirs, store, seen_for_a_moment, 60)
    assert (record.status, record.interrupted) == ("done", True)


def test_who_follows_a_run_is_told_its_end_though_another_looks_at_its_claim(store, seen_for_a_moment):
    ours, theirs = socket.socketpair()
    ctrl_exec._follow_run(theirs, store, seen_for_a_moment, {"stdout": 0, "stderr": 0})
    with ours, ours.makefile("rb") as file:
        answer, *_, end = [json.loads(line) for line in file]
    assert (answer["status"], end["status"], end["interrupted"]) == (200, "done", True)


# --- keeping and forgetting -----------------------------------------------------------------------------


def test_a_record_of_an_earlier_release_can_be_read(store):
    record = put(store, "r")
    path = ctrl_exec.record_path(store, "me", "r", ".json")
    with open(path, encoding="ascii") as file:
        values = json.load(file)
    for name in ("birth", "supervisor", "cancelled", "interrupted"):
        del values[name]
    with open(path, "w", encoding="ascii") as file:
        json.dump(dict(values, later="unknown"), file)
    assert ctrl_exec.find_record(store, "me", "r") == record


def test_output_is_kept_as_long_as_its_record(store):
    put(store, "long", b"early output")
    put(store, "old", b"gone")
    then = time.time() - 7200
    directory = os.path.join(store.directory, "me")
    os.utime(os.path.join(directory, "long.out"), (then, then))  # it wrote two hours before it ended
    for suffix in (".json", ".out", ".err"):
        os.utime(os.path.join(directory, "old" + suffix), (then, then))
    ctrl_exec.sweep_records(store)
    assert sorted(os.listdir(directory)) == ["long.err", "long.json", "long.out"]


def test_two_sweeps_at_once_do_not_stop_each_other(store, monkeypatch):
    for reqid in ("old1", "old2"):
        put(store, reqid)
    directory = os.path.join(store.directory, "me")
    for name in os.listdir(directory):
        os.utime(os.path.join(directory, name), (1, 1))
    scandir = os.scandir

    def late(path):
        entries = list(scandir(path))
        if path == directory:  # the other has begun with the same files
            os.unlink(os.path.join(directory, "old2.out"))
            os.unlink(os.path.join(directory, "old2.json"))
        return iter(entries)

    monkeypatch.setattr(os, "scandir", late)
    ctrl_exec.sweep_records(store)
    assert os.listdir(directory) == []


def test_a_sweep_is_due_once_in_a_twenty_fourth_of_the_time(tmp_path):
    directory = str(tmp_path)
    assert ctrl_exec.is_sweep_due(directory, 2400)
    assert not ctrl_exec.is_sweep_due(directory, 2400)
    then = time.time() - 101
    os.utime(os.path.join(directory, ".swept"), (then, then))
    assert ctrl_exec.is_sweep_due(directory, 2400)
    future = time.time() + 9999  # somebody set the clock back
    os.utime(os.path.join(directory, ".swept"), (future, future))
    assert ctrl_exec.is_sweep_due(directory, 2400)


@pytest.mark.parametrize("piece", [b"a", b"\x01", b"\xff", "\u20ac".encode()], ids=["text", "control", "binary", "euro"])
def test_a_result_is_never_longer_than_a_dispatcher_takes(store, monkeypatch, piece):
    monkeypatch.setattr(ctrl_exec, "MAX_ANSWER", 3 * ctrl_exec.MAX_BODY)
    out = piece * ((4 << 20) // len(piece))
    record = put(store, "r1", out, b"short\n", stdout_truncated=7)
    data = b"".join(ctrl_exec.render_result(store, record))
    assert len(data) <= ctrl_exec.MAX_ANSWER
    result = ctrl_exec.parse_json(data)
    kept = base64.b64decode(result["stdout_base64"]) if piece == b"\xff" else result["stdout"].encode()
    assert result["stderr"] == "short\n" and "stderr_truncated" not in result
    assert len(kept) > 90_000
    if piece != "\u20ac".encode():  # which may be cut in its middle
        assert out.startswith(kept) and result["stdout_truncated"] == 7 + len(out) - len(kept)
