"""Root trees of other Debian releases, by debootstrap: for machines.py, which never writes to them.

Each is made once and kept in the user's cache. `python3 tests/trees.py` makes all that are missing.
"""

import fcntl
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings

CACHE = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "ctrl-exec-trees")
MAX_AGE = 30 * 86400  # seconds; a release is corrected now and then, and a test of it should be, too
PACKAGES = {"": "python3,openssl", "-systemd": "python3,openssl,systemd"}
SUITES = ("bullseye", "bookworm", "trixie")
SYSTEMD = {"bullseye": "247", "trixie": "257"}  # the oldest and the newest that we have promised
TREES = (*SUITES, *(suite + "-systemd" for suite in SYSTEMD))
MARK = "etc/ctrl-exec-tree"  # says what is in a tree that is complete, and by its mtime how old it is


class Unavailable(Exception):
    """What is missing here, in words for whoever reads why a test was skipped."""


def find_tree(name):
    """The directory of a tree, made now if need be, and kept from removal until this process ends.

    Raises Unavailable."""
    path, problem = _find_tree(name)
    if problem and not path:
        raise Unavailable(problem)
    if problem:
        warnings.warn(problem)
    return path


@functools.lru_cache(maxsize=None)  # a failure takes half a minute, and is the same for every test
def _find_tree(name):
    """(the tree, or nothing; what went wrong)."""
    os.makedirs(CACHE, exist_ok=True)
    path = os.path.join(CACHE, name)
    lock = open(path + ".lock", "w")  # noqa: SIM115 - closed, and so released, when this process ends
    _held.append(lock)
    fcntl.flock(lock, fcntl.LOCK_SH)
    age = _age(name, path)
    if age < MAX_AGE:
        return path, ""
    try:
        # Who holds an aged tree uses it, and is not waited for; one that is none is made by one of us.
        fcntl.flock(lock, fcntl.LOCK_EX | (fcntl.LOCK_NB if age < float("inf") else 0))
    except BlockingIOError:
        fcntl.flock(lock, fcntl.LOCK_SH)
        return path, ""
    problem = ""
    if _age(name, path) >= MAX_AGE:
        problem = _make_tree(name, path)
    age = _age(name, path)
    fcntl.flock(lock, fcntl.LOCK_SH)
    if age == float("inf"):
        return "", problem
    if problem:
        problem = "using the tree %s, which is %d days old: %s" % (name, age / 86400, problem)
    return path, problem


_held = []  # locks


def _packages(name):
    suite, hyphen, rest = name.partition("-")
    return suite, PACKAGES[hyphen + rest]


def _age(name, path):
    """Seconds since a tree was made; infinite when it is missing, or has other packages than it should."""
    try:
        with open(os.path.join(path, MARK), encoding="ascii") as file:
            if file.read() == _packages(name)[1]:
                return time.time() - os.fstat(file.fileno()).st_mtime
    except OSError:
        pass
    return float("inf")


def _make_tree(name, path):
    """Make a tree beside `path` and put it there; returns what went wrong. The caller holds the lock."""
    for entry in os.listdir(CACHE):
        if entry.startswith(name + ".") and not entry.endswith(".lock"):  # of a run that was killed
            shutil.rmtree(os.path.join(CACHE, entry))
    if not shutil.which("debootstrap"):
        return "needs debootstrap to make a tree of %s" % name
    suite, packages = _packages(name)
    made = tempfile.mkdtemp(prefix=name + ".", dir=CACHE)
    # In namespaces of its own, what debootstrap mounts and starts is gone when it has ended, however it does.
    words = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child"]
    words += ["debootstrap", "--force-check-gpg", "--variant=minbase", "--include=" + packages, suite, made]
    try:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=900)
        if done.returncode != 0:
            said = (done.stdout + done.stderr).decode("utf-8", "replace").strip().splitlines()
            return "debootstrap could not make a tree of %s (has this machine a network?): %s" % (
                name, "; ".join(said[-2:]) or "status %d" % done.returncode,
            )  # fmt: skip
        for directory in ("var/cache/apt/archives", "var/lib/apt/lists"):  # a third of its size
            shutil.rmtree(os.path.join(made, directory))
        with open(os.path.join(made, MARK), "w", encoding="ascii") as file:
            file.write(packages)
        os.chmod(made, 0o755)
        if os.path.exists(path):
            os.rename(path, made + ".old")
        os.rename(made, path)
    except (OSError, subprocess.SubprocessError) as error:
        return "a tree of %s could not be made: %s" % (name, error)
    finally:
        for left in (made, made + ".old"):
            shutil.rmtree(left, ignore_errors=True)
    return ""


if __name__ == "__main__":
    failed = 0
    for wanted in TREES:
        started = time.monotonic()
        try:
            path = find_tree(wanted)
            print("%s, after %.0f s" % (path, time.monotonic() - started), flush=True)
        except Unavailable as error:
            failed = 1
            print(error, file=sys.stderr)
    sys.exit(failed)
