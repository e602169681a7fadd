import pytest

import ctrl_exec
from ctrl_exec import CtrlExecError


def all_errors():
    found, todo = [], [CtrlExecError]
    while todo:
        found.append(todo.pop())
        todo.extend(found[-1].__subclasses__())
    return sorted(found, key=lambda kind: kind.__name__)


ERRORS = all_errors()

# What a person or a peer may rely on: class, exit status, HTTP status, code.
CONTRACT = {
    "BadRequest": (1, 400, "bad-request"),
    "Busy": (1, 409, "busy"),
    "ConfigError": (78, 500, "config"),
    "CtrlExecError": (1, 500, "error"),
    "Denied": (1, 403, "denied"),
    "HeadTooLarge": (1, 431, "head-too-large"),
    "LengthRequired": (1, 411, "length"),
    "Locked": (1, 409, "locked"),
    "MethodNotAllowed": (1, 405, "method"),
    "NotFound": (1, 404, "not-found"),
    "OutputError": (74, 500, "output"),
    "PairingDenied": (3, 403, "pairing-denied"),
    "PairingTimeout": (2, 408, "pairing-timeout"),
    "ProgramError": (1, 500, "program"),
    "ScriptRefused": (1, 200, "refused"),
    "StorageError": (1, 500, "storage"),
    "TooLarge": (1, 413, "too-large"),
    "TransportError": (1, 502, "transport"),
    "TrustError": (1, 500, "trust"),
    "Unavailable": (1, 503, "unavailable"),
    "UnknownHost": (2, 404, "unknown-host"),
    "UnsupportedMedia": (1, 415, "media-type"),
    "UsageError": (2, 400, "usage"),
}


def test_no_two_errors_share_a_code():
    codes = [kind.code for kind in ERRORS]
    assert sorted(codes) == sorted(set(codes))


def test_every_error_keeps_its_statuses_and_code():
    found = {kind.__name__: (kind.exit_code, kind.http_status, kind.code) for kind in ERRORS}
    assert {name: found.get(name) for name in CONTRACT} == CONTRACT
    assert sorted(found) == sorted(CONTRACT)


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_statuses_are_ones_that_a_shell_and_http_know(kind):
    assert 1 <= kind.exit_code <= 125
    assert kind.exit_code not in (ctrl_exec.EXIT_BUG, 126, 127)
    assert kind.http_status == 200 or 400 <= kind.http_status <= 599
    assert kind.code == kind.code.lower() and kind.code.replace("-", "").isalpha()
    assert kind.__doc__ and kind.__doc__ is not Exception.__doc__


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_every_error_has_a_message_and_a_hint(kind):
    error = kind({"a:b": ""}) if kind is ctrl_exec.Locked else kind("the reason")
    assert error.message == str(error) == ("locked: a:b" if kind is ctrl_exec.Locked else "the reason")
    assert isinstance(error.hint, str)


def test_errors_that_carry_more_keep_it():
    assert ctrl_exec.BadRequest("no", field="args").field == "args"
    assert ctrl_exec.Denied("no").reason_code == 1
    assert ctrl_exec.Denied("no", 3, "ask").hint == "ask"
    assert ctrl_exec.Locked({"a:x": "", "b:x": "request r1"}).conflicts == ("a:x", "b:x")
    assert ctrl_exec.TransportError("gone").state == "unreachable"
    assert ctrl_exec.TransportError("gone", "unknown").state == "unknown"


def test_no_error_is_an_oserror_or_a_valueerror():
    # `except OSError` around a piece of work must not swallow an answer that was already worded
    assert [kind.__name__ for kind in ERRORS if issubclass(kind, (OSError, ValueError))] == []


@pytest.mark.parametrize(
    "words, status",
    [
        ((), ctrl_exec.EXIT_USAGE),
        (("no-such-verb",), ctrl_exec.EXIT_USAGE),
        (("unpair", "nobody"), ctrl_exec.UnknownHost.exit_code),
        (("--config", "/nonexistent/ced.conf", "list-agents"), ctrl_exec.ConfigError.exit_code),
    ],
)
def test_the_class_of_an_error_decides_the_exit_status(words, status, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(ctrl_exec, "LOG", ctrl_exec.EventLog())
    argv = ["ced", "--root", str(tmp_path), *words]
    assert ctrl_exec.main(argv) == status
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("ced: ") and "Traceback" not in err
