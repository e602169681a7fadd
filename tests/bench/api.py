#!/usr/bin/env python3
"""What the HTTP API costs, next to the command line doing the same.

    python3 tests/bench/api.py [--seconds S] [--clients 1,8,64]

One agent, one API and the clients on this machine's loopback, below one temporary directory. Each client keeps
one connection and asks for a script of its own, so that no lock is in its way; `ced` is started once for each
run, as many at a time. CPU is that of the server, or of the `ced` processes, user and system. Read the ratios:
the clients here and the agent use the same cores. Run it on an otherwise idle machine.
"""

import argparse
import os
import py_compile
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
TESTS = os.path.dirname(HERE)
sys.path[:0] = [os.path.dirname(TESTS), TESTS]

import support  # noqa: E402

LAUNCHER = """\
import os, sys
sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
import ctrl_exec
ctrl_exec.leave(ctrl_exec.main(sys.argv))
"""
TICK = 1 / os.sysconf("SC_CLK_TCK")


class Figures:
    """One row: how many requests in how many seconds, for how much CPU."""

    def __init__(self, count, seconds, cpu):
        self.rate = count / seconds
        self.cpu = 1000 * cpu / max(1, count)

    def __str__(self):
        return "%8.1f a second  %7.2f ms of CPU each" % (self.rate, self.cpu)


def process_cpu(pid):
    """CPU seconds of a process and its children that have ended."""
    with open("/proc/%d/stat" % pid, encoding="ascii") as file:
        fields = file.read().rpartition(")")[2].split()
    return TICK * sum(int(field) for field in fields[11:15])


def read_pss(pid):
    """MiB of memory, shared pages counted by share."""
    with open("/proc/%d/smaps_rollup" % pid, encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Pss:")) / 1024


def in_parallel(count, work, seconds):
    """Let `count` threads do `work(number)` again and again; (times done, seconds it took)."""
    done = [0] * count
    began = time.monotonic()

    def labour(number):
        with_state = work(number)
        while time.monotonic() - began < seconds:
            next(with_state)
            done[number] += 1

    threads = [threading.Thread(target=labour, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(done), time.monotonic() - began


def measure_api(server, clients, seconds, path):
    """Figures of kept connections that ask for /health, or for a run."""

    def work(number):
        with server.connect() as sock:
            while True:
                if path == "/health":
                    support.send_http(sock, "GET", path)
                else:
                    body = {"hosts": ["alpha"], "script": "true%d" % number}
                    support.send_http(sock, "POST", path, body)
                status, _, reply = support.read_reply(sock)
                assert status == 200 and (path == "/health" or b'"exit":0' in reply), reply
                yield

    before = process_cpu(server.process.pid)
    count, took = in_parallel(clients, work, seconds)
    return Figures(count, took, process_cpu(server.process.pid) - before)


def measure_ced(argv, clients, seconds):
    """Figures of `ced run`, started anew each time."""

    def work(number):
        while True:
            done = subprocess.run([*argv, "run", "alpha", "true%d" % number], env={}, capture_output=True)
            assert done.returncode == 0, done.stdout + done.stderr
            yield

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    count, took = in_parallel(clients, work, seconds)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Figures(count, took, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def install(top):
    """A copy as install.sh makes it, compiled; the command line of its `ced`, and of its API."""
    os.makedirs(top)
    shutil.copy(support.PROGRAM, top)
    py_compile.compile(os.path.join(top, "ctrl_exec.py"), doraise=True)
    for name in ("ced", "ctrl-exec-api"):
        with open(os.path.join(top, name), "w", encoding="ascii") as file:
            file.write(LAUNCHER)
    return [[sys.executable, "-IS", os.path.join(top, name)] for name in ("ced", "ctrl-exec-api")]


def measure(top, counts, seconds):
    ced, api = install(os.path.join(top, "installed"))
    with support.Deployment(os.path.join(top, "d"), ("alpha",), start=False) as deployment:
        host = deployment["alpha"]
        for number in range(max(counts)):
            host.script("true%d" % number, "exit 0\n")
        host.start()
        conf = "api_auth_default = allow\napi_max_connections = %d\n" % (max(counts) + 16)
        server = support.ApiServer(deployment.control, "bench", conf)
        server.argv = lambda *words: [*api, "--root", server.root, *words]
        with server:
            print("memory of an idle server: %.1f MiB (PSS)" % read_pss(server.process.pid))
            for clients in counts:
                health = measure_api(server, clients, seconds, "/health")
                run = measure_api(server, clients, seconds, "/run")
                cold = measure_ced([*ced, "--root", server.root], clients, seconds)
                print("\n%d clients" % clients)
                print("  GET /health  %s" % health)
                print("  POST /run    %s" % run)
                print("  ced run      %s" % cold)
                print("  a run by the API to one by ced: %.2f of the rate, %.2f of the CPU"
                      % (run.rate / cold.rate, run.cpu / cold.cpu))  # fmt: skip
            print("\nmemory after that: %.1f MiB (PSS)" % read_pss(server.process.pid))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10, help="for each figure (10)")
    parser.add_argument("--clients", default="1,8,64", help="how many at a time (1,8,64)")
    args = parser.parse_args()
    top = tempfile.mkdtemp(prefix="ctrl-exec-bench-")
    try:
        measure(top, [int(word) for word in args.clients.split(",")], args.seconds)
    finally:
        shutil.rmtree(top, ignore_errors=True)


if __name__ == "__main__":
    main()
