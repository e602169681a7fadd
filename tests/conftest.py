"""Fixtures for all tests: real openssl, real processes below a temporary root, ports the kernel picks."""

import os
import signal
import sys

import pytest

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))  # ctrl_exec
sys.path.insert(0, HERE)  # support

import support  # noqa: E402

# Who starts the tests in the background may have them ignore signals, and then all that they start would.
signal.signal(signal.SIGINT, signal.default_int_handler)
for number in (signal.SIGHUP, signal.SIGQUIT):
    signal.signal(number, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    """Nothing of the caller's own set-up reaches a test."""
    for name in list(os.environ):
        if name.startswith(("CTRL_EXEC_", "ENVEXEC_")) or name in ("NO_COLOR", "NOTIFY_SOCKET", "SUDO_USER"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def openssl():
    import ctrl_exec

    return ctrl_exec.OpenSSL()


@pytest.fixture(scope="session")
def deployment(tmp_path_factory):
    """A control host and two running agents, `alpha` and `beta`, shared by tests that only use them."""
    with support.Deployment(tmp_path_factory.mktemp("deployment"), ("alpha", "beta")) as shared:
        yield shared


@pytest.fixture
def fresh(tmp_path):
    """A function that makes a deployment of one's own: fresh("name", ..., start=True)."""
    made = []

    def make(*names, start=True):
        made.append(support.Deployment(tmp_path / ("d%d" % len(made)), names or ("solo",), start))
        return made[-1].__enter__()

    yield make
    for one in made:
        one.__exit__()
