"""Machines to test on that are thrown away: namespaces of their own with a tree of another release as /."""

import contextlib
import functools
import os
import shutil
import subprocess
import tempfile

import pytest
import support
import trees

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
CHECKOUT = "/root/ctrl-exec"  # where a machine has what a person copies to a host
INSTALL = ("sh", CHECKOUT + "/install.sh")
SCRIPTS = "/root/systems"  # and where it has what tests run on it
PYTHON = "/usr/bin/python3"
LATE_CED = (PYTHON, "-IS", SCRIPTS + "/late.py")
HERE = os.path.dirname(os.path.abspath(__file__))

# Run as the first process of a new machine. $1: an empty directory, $2: the tree, $3: the host's name,
# $4: not empty if systemd is to take over.
_SET_UP = r"""
mount -t tmpfs -o mode=0755 none "$1"
cd "$1"
mkdir lower upper work root
mount --bind "$2" lower
mount -o remount,bind,ro lower
mount -t overlay -o lowerdir=lower,upperdir=upper,workdir=work none root || {
    cp -a --reflink=auto lower/. root
    mount --bind root root
}
cd root
mount -t proc none proc
mount --bind proc/sys proc/sys # whoever is root in here could change the kernel that all share
mount -o remount,bind,ro proc/sys
mount -t sysfs -o ro none sys
[ -z "$4" ] || mount -t cgroup2 none sys/fs/cgroup
mount -t tmpfs -o mode=0755 none run
mount -t tmpfs -o mode=0755 none dev
mkdir dev/shm dev/pts
mount -t tmpfs -o mode=1777 none dev/shm
mount -t devpts -o newinstance,ptmxmode=0666,mode=620 none dev/pts
mknod -m 666 dev/null c 1 3
mknod -m 666 dev/zero c 1 5
mknod -m 666 dev/full c 1 7
mknod -m 666 dev/random c 1 8
mknod -m 666 dev/urandom c 1 9
mknod -m 666 dev/tty c 5 0
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
ln -s fd/0 dev/stdin
ln -s fd/1 dev/stdout
ln -s fd/2 dev/stderr
ip link set lo up
hostname "$3"
echo "$3" >etc/hostname
printf '127.0.0.1 localhost\n127.0.1.1 %s\n' "$3" >etc/hosts
rm -f etc/resolv.conf
: >etc/resolv.conf
mkdir .old
pivot_root . .old
cd /
umount -l .old
rmdir .old
echo ready
exec >&2
if [ -n "$4" ]; then
    exec env -i container=ctrl-exec-tests PATH="$PATH" setpriv --bounding-set -sys_time,-sys_module \
        /lib/systemd/systemd
fi
exec env --ignore-signal=CHLD sleep infinity # so that the kernel reaps the orphans that it is given
"""

# Run before it, with the name of a cgroup for the machine and a directory to mount on.
_ENTER_CGROUP = r"""
mount -t cgroup2 none "$2"
own=$2$(sed -n 's/^0:://p' /proc/self/cgroup)/$1
mkdir "$own"
echo $$ >"$own/cgroup.procs"
umount "$2"
shift 2
exec "$@"
"""
_LEAVE_CGROUP = r"""
mount -t cgroup2 none "$2"
own=$2$(sed -n 's/^0:://p' /proc/self/cgroup)/$1
[ ! -d "$own" ] || find "$own" -depth -type d -exec rmdir {} +
"""
_TOOLS = ("unshare", "nsenter", "setpriv", "mount", "ip", "pivot_root", "hostname")


@functools.lru_cache(maxsize=None)
def find_obstacle(systemd=False):
    """Why there can be no machine here, or nothing."""
    if os.geteuid() != 0:
        return "needs root for namespaces with a root tree of their own"
    missing = [tool for tool in _TOOLS if not shutil.which(tool)]
    if missing:
        return "needs the programs " + ", ".join(missing)
    words = ["unshare", "--mount", "--pid", "--fork", "--net", "--uts", "--ipc", "--cgroup", "sh", "-euc"]
    what = "mount -t tmpfs none /mnt"
    if systemd:
        what += "\nmount -t cgroup2 none /mnt"
    words.append(what)
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    if done.returncode != 0:
        wanted = "namespaces, a tmpfs and a cgroup2" if systemd else "namespaces and a tmpfs"
        return "needs %s of its own: %s" % (wanted, done.stderr.strip())
    return ""


class Machine:
    """A tree as a machine of its own, with only a loopback for a network; all of it is forgotten at the end.

    `beside` another machine it shares that one's network. With `systemd` that is the first process.
    Raises trees.Unavailable."""

    def __init__(self, tree, name, beside=None, systemd=False):
        self.name = name
        self._mounts = tempfile.mkdtemp(prefix="ctrl-exec-machine-")
        self._cgroup = os.path.basename(self._mounts) if systemd else ""
        self._log = tempfile.TemporaryFile()
        self.pid = 0
        words = ["setpriv", "--pdeathsig", "KILL"]  # it ends when we do, however that happens
        if beside is not None:
            words += ["nsenter", "--net=/proc/%d/ns/net" % beside.pid]
        if systemd:
            words += ["unshare", "--mount", "sh", "-euc", _ENTER_CGROUP, "sh", self._cgroup, self._mounts]
            words += ["unshare", "--cgroup", "--mount"]
        else:
            words += ["unshare", "--mount"]
        words += ["--pid", "--fork", "--kill-child", "--uts", "--ipc", *([] if beside else ["--net"])]
        words += ["sh", "-euc", _SET_UP, "sh", self._mounts, tree, name, "systemd" if systemd else ""]
        self._holder = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self._log,
            env={"PATH": PATH, "LC_ALL": "C"}, start_new_session=True,
        )  # fmt: skip
        said = self._holder.stdout.readline()
        if said != b"ready\n":
            self.close()
            self._log.seek(0)
            said = self._log.read().decode("utf-8", "replace").strip()
            raise trees.Unavailable("a machine cannot be set up here: " + said)
        with open("/proc/%d/task/%d/children" % ((self._holder.pid,) * 2), encoding="ascii") as file:
            self.pid = int(file.read())
        self._copy_checkout()

    def _copy_checkout(self):
        top = self.path(CHECKOUT)
        os.mkdir(top)
        for name in ("ctrl_exec.py", "install.sh", "conf.example"):
            shutil.copy(os.path.join(os.path.dirname(HERE), name), top)
        shutil.copytree(os.path.join(HERE, "systems"), self.path(SCRIPTS))

    def path(self, path):
        """Where a file of the machine is for us."""
        return "/proc/%d/root%s" % (self.pid, path)

    def read(self, path):
        with open(self.path(path), encoding="utf-8") as file:
            return file.read()

    def put(self, path, text, mode=0o644):
        os.makedirs(os.path.dirname(self.path(path)), exist_ok=True)
        with open(self.path(path), "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(self.path(path), mode)

    def argv(self, *words, **environment):
        """A command line of ours that runs a command in there."""
        enter = ["nsenter", "--target", str(self.pid), "--mount", "--pid", "--net", "--uts", "--ipc"]
        enter += ["--cgroup", "--root", "--wd", "--"]
        given = {"PATH": PATH, "HOME": "/root", "LC_ALL": "C", **environment}
        return [*enter, "env", "-i", *map("=".join, given.items()), *words]

    def run(self, *words, status=0, timeout=120, **environment):
        """Run a command to its end, which must be this status (None: any)."""
        done = subprocess.run(
            self.argv(*words, **environment), stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout
        )
        done.out, done.err = (data.decode("utf-8", "replace") for data in (done.stdout, done.stderr))
        said = "%s: %s: status %d\n%s%s" % (self.name, " ".join(words), done.returncode, done.out, done.err)
        assert status is None or done.returncode == status, said
        assert "Traceback" not in done.err, said
        return done

    def spawn(self, *words, **how):
        """Start a command; it ends with the machine at the latest."""
        return subprocess.Popen(self.argv(*words), **how)

    def is_open(self, port):
        """Whether somebody listens on a port of its loopback."""
        return self.run("bash", "-c", ": </dev/tcp/127.0.0.1/%d" % port, status=None).returncode == 0

    def close(self):
        """End every process of the machine; with them go its mounts and its network."""
        with contextlib.suppress(ProcessLookupError):
            if self.pid:  # before its parent, which waits until all is gone
                os.kill(self.pid, 9)
            else:
                self._holder.kill()
        self._holder.wait(60)
        self._holder.stdout.close()
        if self._cgroup:
            words = ["unshare", "--mount", "sh", "-euc", _LEAVE_CGROUP, "sh", self._cgroup, self._mounts]
            subprocess.run(words, check=True, timeout=60)
        os.rmdir(self._mounts)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
        self._log.close()


# --- what tests do with them ------------------------------------------------------------------------------


def boot(name, **how):
    """A machine with this tree. Where there can be none, the test is skipped, for a reason that says why."""
    try:
        return Machine(trees.find_tree(name), name.partition("-")[0], **how)
    except trees.Unavailable as error:
        pytest.skip(str(error))


def pair(control, host, ced=("ced",), *options):
    """Pair two machines, or one with itself, by a token; `ced` as somebody else's clock has it, maybe."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    mode = control.spawn(*ced, "pairing-mode", **pipes)
    support.wait_until(lambda: control.is_open(7444) or mode.poll() is not None, what="the pairing port")
    token = control.run(*ced, "pairing-token").out.strip()
    words = ("cea", "request-pairing", "--dispatcher", "127.0.0.1", "--timeout", "120", *options)
    host.run(*words, CTRL_EXEC_PAIRING_TOKEN=token)
    mode.communicate(b"quit\n", timeout=120)
    assert mode.returncode == 0
