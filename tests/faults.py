"""A harness for faults: who asks what and hears what is recorded, something is broken meanwhile, and a small
model looks at the history and at what lies on disk.

The model: a run that was accepted ends in exactly one final state, which never changes afterwards; its script
was started exactly once; a script's lock had one holder at a time; nothing stays at `running`.

A new fault is one more function in `FAULTS`: it gets the `Scene` while runs go on.
"""

import json
import os
import signal
import threading

import ctrl_exec
import support
from support import wait_until

# The scripts write what they do to $1: a line when they start and one when they end. `held` keeps a directory
# while it runs, so that two at once would be seen.
SCRIPTS = {
    "held": """mkdir "$1.held" || echo "$CTRL_EXEC_REQID overlap" >> "$1"
echo "$CTRL_EXEC_REQID start" >> "$1"; echo begun
while [ ! -e "$2" ]; do sleep 0.02; done
rmdir "$1.held"; echo "$CTRL_EXEC_REQID end" >> "$1"; echo through
""",
    "free": """echo "$CTRL_EXEC_REQID start" >> "$1"; echo begun
sleep 300 & while [ ! -e "$2" ]; do sleep 0.02; done; kill $!
echo "$CTRL_EXEC_REQID end" >> "$1"; echo through
""",
    # waits without a process of its own for the writer of a FIFO
    "parked": """echo "$CTRL_EXEC_REQID start" >> "$1"
read -r word < "$2"
echo "$CTRL_EXEC_REQID end" >> "$1"
""",
}
FINAL_FIELDS = ("status", "exit", "signal", "timed_out", "cancelled", "interrupted", "finished")


class Asked:
    """One request, made by a thread of its own; what it heard is in `heard` once it is over."""

    def __init__(self, scene, script, mode):
        self.reqid, self.script, self.mode = ctrl_exec.new_id(), script, mode
        self.heard = None  # (status, answer), (0, None) when the connection only broke
        body = {"script": script, "args": [scene.journal, scene.gate], "reqid": self.reqid}
        if mode != "sync":
            body[mode] = True
        self._thread = threading.Thread(target=self._ask, args=(scene, body), daemon=True)
        self._thread.start()

    def _ask(self, scene, body):
        data = json.dumps(body).encode()
        head = b"POST /run HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(data)
        try:
            status, _, reply = support.send_raw(scene.host.port, scene.context, head + data)
            lines = [json.loads(line) for line in reply.splitlines() if line.strip()]
            self.heard = (status, lines[-1] if lines else None)
        except (OSError, ValueError, AssertionError):
            self.heard = (0, None)

    def wait(self):
        self._thread.join(60)
        assert self.heard is not None, "no answer for " + self.reqid
        return self.heard


class Scene:
    """One agent, its runs, and what they have left behind."""

    def __init__(self, top, host, control):
        self.host, self.control = host, control
        self.context = support.dispatcher_context(control)
        self.journal, self.gate = os.path.join(str(top), "journal"), os.path.join(str(top), "gate")
        self.asked = []
        os.chmod(str(top), 0o755)

    def ask(self, script, mode):
        """Make a request."""
        self.asked.append(Asked(self, script, mode))

    def start(self, script, mode):
        """Make a request and wait until its script has begun."""
        one = Asked(self, script, mode)
        self.asked.append(one)
        wait_until(lambda: (one.reqid, "start") in self.lines(), what="the start of " + one.reqid)
        return one

    def open_gate(self):
        with open(self.gate, "w", encoding="ascii"):
            pass

    def lines(self):
        """What the scripts have written: (request id, word)."""
        if not os.path.exists(self.journal):
            return []
        with open(self.journal, encoding="ascii") as file:
            return [tuple(line.split()) for line in file if line.endswith("\n")]

    def result(self, reqid, wait=0):
        """(status, answer) of /result, from whatever front answers."""

        def ask():
            try:
                path = "/result/%s?wait=%d" % (reqid, wait)
                status, answer = support.post(self.host.port, self.context, path, b"", "GET")
                return status and (status, answer)
            except OSError:
                return None

        return wait_until(ask, what="an answer about " + reqid)

    def run(self, script="held"):
        """One more run, to see whether its lock is free: (status, answer)."""
        body = {"script": script, "args": [self.journal, self.gate], "reqid": ctrl_exec.new_id()}
        return support.post(self.host.port, self.context, "/run", body)

    # --- who is who ---

    def supervisor(self, asked):
        return self.host.record(asked.reqid)["supervisor"]

    def group(self, asked):
        """The processes of a run's session."""
        pid = self.host.record(asked.reqid)["pid"]
        return [process.pid for process in ctrl_exec.list_processes() if process.session == pid]

    def wait_for_release(self, asked):
        """Wait until a run holds nothing: its record says `done` a moment before its lock is free."""
        path = os.path.join(self.host.config.runs_dir, "control", asked.reqid + ".out")
        wait_until(lambda: not ctrl_exec.is_claimed(path), what="the end of the claim")

    def restart(self):
        """Start the agent again after its end."""
        self.host.process.wait(60)
        wait_until(lambda: not self.host.is_up(), what="the closed port")
        self.host.process.stdout.close()
        self.host.start()

    # --- the model ---

    def check(self, interrupted=()):
        """Every accepted run: one final state that stays, one start, no overlap, nothing at `running`."""
        answers = {asked.reqid: self.result(asked.reqid, wait=20) for asked in self.asked}
        lines = self.lines()
        assert [line for line in lines if line[1] == "overlap"] == []
        for asked in self.asked:
            status, answer = answers[asked.reqid]
            assert (status, answer["status"]) == (200, "done"), answer
            record = self.host.record(asked.reqid)
            final = {key: record[key] for key in FINAL_FIELDS}
            assert final["status"] == "done"
            assert final["interrupted"] == (asked in interrupted), record
            assert [line for line in lines if line == (asked.reqid, "start")] == [(asked.reqid, "start")]
            ended = (asked.reqid, "end") in lines
            assert ended != (asked in interrupted), lines
            if asked not in interrupted:
                assert (answer["exit"], answer["stdout"]) == (0, "begun\nthrough\n")
            self.wait_for_release(asked)
            # what the script has killed may have yet to notice
            wait_until(lambda: self.group(asked) == [], what="the end of the group")
            status, again = self.result(asked.reqid)
            assert again == answer
            assert {key: self.host.record(asked.reqid)[key] for key in FINAL_FIELDS} == final
        states = [self.host.record(name[:-5])["status"] for name in self._record_names()]
        assert set(states) == {"done"}

    def _record_names(self):
        return [
            n for n in os.listdir(os.path.join(self.host.config.runs_dir, "control")) if n.endswith(".json")
        ]


# --- what can happen while runs go on -------------------------------------------------------------------


def kill_front(scene):
    pid = scene.host.front()
    os.kill(pid, signal.SIGKILL)
    scene.host.front(other_than=pid)


def kill_executor(scene):
    scene.host.process.kill()
    scene.restart()


def kill_both(scene):
    pid = scene.host.front()
    os.kill(pid, signal.SIGSTOP)  # so that it cannot see that the executor is gone
    scene.host.process.kill()
    os.kill(pid, signal.SIGKILL)
    scene.restart()


def restart(scene):
    scene.host.process.terminate()
    scene.restart()


def reload(scene):
    assert "RESULT=ok" in scene.host.reload()


FAULTS = {fault.__name__: fault for fault in (kill_front, kill_executor, kill_both, restart, reload)}
