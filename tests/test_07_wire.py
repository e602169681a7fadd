"""What counts as a request and as an answer: every malformed one is refused in words, and nothing runs."""

import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

import ctrl_exec
import support
from ctrl_exec import BadRequest, HeadTooLarge, TooLarge

MIB = 1024 * 1024


@pytest.fixture(scope="module")
def alpha(deployment):
    return deployment["alpha"]


@pytest.fixture(scope="module")
def tls(deployment):
    return support.dispatcher_context(deployment.control)


def head(first="POST /ping HTTP/1.1", *lines):
    return ("\r\n".join((first, "Host: x", *lines)) + "\r\n\r\n").encode("utf-8")


def request(body=b"{}", path="/ping", *lines):
    return head("POST %s HTTP/1.1" % path, "Content-Length: %d" % len(body), *lines) + body


def ask(alpha, tls, data):
    """Send bytes to the agent: (status, headers, object or None)."""
    status, headers, body = support.send_raw(alpha.port, tls, data)
    return status, headers, json.loads(body) if body else None


def read_all(sock):
    data = b""
    while True:
        try:
            piece = sock.recv(65536)
        except OSError:
            return data
        if not piece:
            return data
        data += piece


def has_record(alpha, reqid):
    return os.path.exists(os.path.join(alpha.config.runs_dir, "control", reqid + ".json"))


# --- the head of a request ------------------------------------------------------------------------------

GOOD_HEADS = {
    "plain": request(),
    "empty body": request(b""),
    "http/1.0": b"POST /ping HTTP/1.0\r\nContent-Length: 2\r\n\r\n{}",
    "no host header": b"POST /ping HTTP/1.1\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}",
    "header name in capitals": b"POST /ping HTTP/1.1\r\nCONTENT-LENGTH: 2\r\n\r\n{}",
    "blanks round a value": b"POST /ping HTTP/1.1\r\nContent-Length: \t 2 \t\r\n\r\n{}",
    "no blank before a value": b"POST /ping HTTP/1.1\r\nContent-Length:2\r\n\r\n{}",
    "empty value": request(b"{}", "/ping", "X-Empty:"),
    "latin-1 value": b"POST /ping HTTP/1.1\r\nX-Name: \xe9\r\nContent-Length: 2\r\n\r\n{}",
    "query": request(b"{}", "/ping?a=b&c"),
    "leading zeros in the length": head("POST /ping HTTP/1.1", "Content-Length: 0002") + b"{}",
    "32 headers": request(b"{}", "/ping", *("X-%d: y" % n for n in range(30))),
}


@pytest.mark.parametrize("name", GOOD_HEADS)
def test_a_well_formed_request_is_answered(alpha, tls, name):
    status, headers, body = ask(alpha, tls, GOOD_HEADS[name])
    assert (status, body["status"], body["host"]) == (200, "ok", "alpha")
    assert headers["content-type"] == "application/json"


BAD_HEADS = {
    # the request line
    "not http": (b"HELO there\r\n\r\n", 400),
    "no version": (b"POST /ping\r\nContent-Length: 2\r\n\r\n{}", 400),
    "http/0.9": (b"POST /ping HTTP/0.9\r\nContent-Length: 2\r\n\r\n{}", 400),
    "http/2.0": (b"POST /ping HTTP/2.0\r\nContent-Length: 2\r\n\r\n{}", 400),
    "http/1.10": (b"POST /ping HTTP/1.10\r\nContent-Length: 2\r\n\r\n{}", 400),
    "two blanks": (b"POST  /ping HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}", 400),
    "tab for a blank": (b"POST\t/ping HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}", 400),
    "blank at the end": (b"POST /ping HTTP/1.1 \r\nContent-Length: 2\r\n\r\n{}", 400),
    "empty first line": (b"\r\nPOST /ping HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}", 400),
    "lower-case method": (b"post /ping HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}", 400),
    "long method": (b"A" * 17 + b" /ping HTTP/1.1\r\n\r\n", 400),
    "long path": (b"POST /" + b"a" * 2001 + b" HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}", 400),
    "NUL in the path": (b"POST /ping\0 HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}", 400),
    "raw UTF-8 in the path": (b"POST /\xc3\xa9 HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}", 400),
    "proxy form": (b"POST http://x/ping HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}", 400),
    "asterisk form": (b"OPTIONS * HTTP/1.1\r\n\r\n", 400),
    # header lines
    "folded header": (head("POST /ping HTTP/1.1", "X-A: 1", " 2", "Content-Length: 2") + b"{}", 400),
    "folded with a tab": (head("POST /ping HTTP/1.1", "X-A: 1", "\t2", "Content-Length: 2") + b"{}", 400),
    "blank before the colon": (head("POST /ping HTTP/1.1", "Content-Length : 2") + b"{}", 400),
    "no colon": (head("POST /ping HTTP/1.1", "Content-Length 2") + b"{}", 400),
    "no name": (head("POST /ping HTTP/1.1", ": 2") + b"{}", 400),
    "name with a blank": (head("POST /ping HTTP/1.1", "X A: 2") + b"{}", 400),
    "name with UTF-8": (head("POST /ping HTTP/1.1", "X-\u00e9: 2") + b"{}", 400),
    "long name": (head("POST /ping HTTP/1.1", "X" * 65 + ": 2") + b"{}", 400),
    "bare LF": (b"POST /ping HTTP/1.1\r\nX-A: 1\nContent-Length: 2\r\n\r\n{}", 400),
    "bare CR": (b"POST /ping HTTP/1.1\r\nX-A: 1\rContent-Length: 2\r\n\r\n{}", 400),
    "bare LF after the first line": (b"POST /ping HTTP/1.1\nContent-Length: 2\r\n\r\n{}", 400),
    "NUL in a value": (b"POST /ping HTTP/1.1\r\nX-A: \0\r\nContent-Length: 2\r\n\r\n{}", 400),
    "ESC in a value": (b"POST /ping HTTP/1.1\r\nX-A: \x1b[2J\r\nContent-Length: 2\r\n\r\n{}", 400),
    "host twice": (b"POST /ping HTTP/1.1\r\nHost: a\r\nHost: b\r\nContent-Length: 2\r\n\r\n{}", 400),
    "33 headers": (request(b"{}", "/ping", *("X-%d: y" % n for n in range(31))), 431),
    "10,000 headers": (request(b"{}", "/ping", *("X-%d: y" % n for n in range(10000))), 431),
    "a head of 33 KiB": (request(b"{}", "/ping", "X-A: " + "y" * 33 * 1024), 431),
    "a head that never ends": (b"POST /ping HTTP/1.1\r\nX-A: " + b"y" * 40000, 431),
    # the length
    "length -1": (head("POST /ping HTTP/1.1", "Content-Length: -1") + b"{}", 400),
    "length +5": (head("POST /ping HTTP/1.1", "Content-Length: +5") + b"{}", 400),
    "length 5_0": (head("POST /ping HTTP/1.1", "Content-Length: 5_0") + b"{}", 400),
    "length in Arabic digits": (head("POST /ping HTTP/1.1", "Content-Length: \u0662") + b"{}", 400),
    "length in superscript": (b"POST /ping HTTP/1.1\r\nContent-Length: \xb2\r\n\r\n{}", 400),
    "length in hex": (head("POST /ping HTTP/1.1", "Content-Length: 0x2") + b"{}", 400),
    "length 2.0": (head("POST /ping HTTP/1.1", "Content-Length: 2.0") + b"{}", 400),
    "length of 20 digits": (head("POST /ping HTTP/1.1", "Content-Length: " + "9" * 20), 400),
    "length of 19 digits": (head("POST /ping HTTP/1.1", "Content-Length: " + "9" * 19), 413),
    "empty length": (head("POST /ping HTTP/1.1", "Content-Length:") + b"{}", 400),
    "length as a list": (head("POST /ping HTTP/1.1", "Content-Length: 2, 2") + b"{}", 400),
    "length twice": (head("POST /ping HTTP/1.1", "Content-Length: 2", "Content-Length: 2") + b"{}", 400),
    "two lengths": (head("POST /ping HTTP/1.1", "Content-Length: 2", "content-length: 3") + b"{}", 400),
    "no length": (head("POST /ping HTTP/1.1") + b"{}", 411),
    "chunked": (head("POST /ping HTTP/1.1", "Transfer-Encoding: chunked") + b"2\r\n{}\r\n0\r\n\r\n", 411),
    "chunked and a length": (
        head("POST /ping HTTP/1.1", "Transfer-Encoding: chunked", "Content-Length: 2") + b"{}",
        411,
    ),
    "odd transfer coding": (
        head("POST /ping HTTP/1.1", "Transfer-Encoding: xchunked", "Content-Length: 2") + b"{}",
        411,
    ),
    "GET with a transfer coding": (head("GET /capabilities HTTP/1.1", "Transfer-Encoding: chunked"), 411),
    "10 GB": (head("POST /ping HTTP/1.1", "Content-Length: 10000000000"), 413),
    "a byte over a MiB": (head("POST /ping HTTP/1.1", "Content-Length: %d" % (MIB + 1)), 413),
    "GET with 10 GB": (head("GET /capabilities HTTP/1.1", "Content-Length: 10000000000"), 413),
}


@pytest.mark.parametrize("name", BAD_HEADS)
def test_a_malformed_head_is_refused_with_its_status_and_the_connection_closed(alpha, tls, name):
    data, expected = BAD_HEADS[name]
    status, headers, body = ask(alpha, tls, data)
    assert status == expected
    assert body["ok"] is False and body["error"] and "\n" not in body["error"]
    assert headers["connection"] == "close"


def test_a_body_of_exactly_one_mib_is_read(alpha, tls):
    body = b'{"reqid":"full","padding":"%s"}'
    body = body % (b"x" * (MIB - len(body) + 2))
    assert len(body) == MIB
    status, _, answer = ask(alpha, tls, request(body))
    assert (status, answer["reqid"]) == (200, "full")


def test_a_header_of_blanks_that_ends_badly_costs_no_more_than_its_length():
    # in a process of its own: the interpreter lock is held while a regular expression searches
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import ctrl_exec\n"
        "try: ctrl_exec._parse_headers([b'X-A:' + b' ' * 30000 + b'\\x01'])\n"
        "except ctrl_exec.BadRequest as error: print(error.message)"
    )
    where = os.path.dirname(support.PROGRAM)
    done = subprocess.run([sys.executable, "-c", code, where], timeout=60, stdout=subprocess.PIPE, text=True)
    assert done.stdout == "a malformed header line\n"


# --- routes ---------------------------------------------------------------------------------------------

SPELLINGS = {
    "POST //run": 404,
    "POST /run/": 404,
    "POST /run;x": 404,
    "POST /%72un": 404,
    "POST /run%00": 404,
    "POST /run%2f": 404,
    "POST /./run": 404,
    "POST /x/../run": 404,
    "POST /../run": 404,
    "POST /RUN": 404,
    "POST /run.json": 404,
    "POST /run#x": 404,
    "POST /run\\": 404,
    "POST /": 404,
    "POST /run?/../ping": 200,  # a query is not part of the path: this is /run
    "POST http://x/run": 400,
    "POST run": 400,
    "POST *": 400,
    "GET /run": 405,
    "PUT /run": 405,
    "DELETE /run": 405,
    "PATCH /run": 405,
    "OPTIONS /run": 405,
    "TRACE /run": 405,
    "HEAD /run": 405,
    "post /run": 400,
    "Post /run": 400,
    "CONNECT x:1": 400,
    "POST /capabilities": 405,
    "GET /ping": 405,
    "GET /capabilities/": 404,
    "GET /etc/passwd": 404,
}


@pytest.mark.parametrize("number, spelling", list(enumerate(SPELLINGS)))
def test_another_spelling_of_a_path_or_method_opens_nothing(alpha, tls, number, spelling):
    reqid = "spelling-%d" % number
    body = b'{"script":"hello","reqid":"%s"}' % reqid.encode()
    data = head(spelling + " HTTP/1.1", "Content-Length: %d" % len(body), "Connection: close") + body
    with support.tls_connect(alpha.port, tls) as sock:
        sock.sendall(data)
        answer = read_all(sock)
    assert answer.split(b" ")[1] == b"%d" % SPELLINGS[spelling]
    assert has_record(alpha, reqid) == (SPELLINGS[spelling] == 200)


def test_the_same_spellings_are_forbidden_to_strangers_without_a_word_about_paths(fresh):
    deployment = fresh("solo", start=False)
    solo = deployment["solo"]
    context = support.dispatcher_context(deployment.control)
    solo.put(ctrl_exec.AGENT_VAR + "/ctrl-exec-dispatchers", "")
    solo.start()
    for path in ("/run", "//run", "/nothing", "/ping", "/%72un"):
        status, _, body = ask(solo, context, request(b'{"script":"hello","reqid":"s"}', path))
        assert (status, body) == (403, {"error": "serial mismatch", "status": "forbidden"})
    assert not has_record(solo, "s")


def test_a_forbidden_caller_loses_the_connection(fresh):
    deployment = fresh("solo", start=False)
    solo = deployment["solo"]
    solo.put(ctrl_exec.AGENT_VAR + "/ctrl-exec-dispatchers", "")
    solo.start()
    with support.tls_connect(solo.port, support.dispatcher_context(deployment.control)) as sock:
        sock.sendall(request())
        status, headers, _ = support.read_reply(sock)
    assert (status, headers["connection"]) == (403, "close")


def test_an_answer_to_head_has_no_body(alpha, tls):
    with support.tls_connect(alpha.port, tls) as sock:
        sock.sendall(head("HEAD /ping HTTP/1.1", "Connection: close"))
        answer = read_all(sock)
    assert answer.startswith(b"HTTP/1.1 405 ")
    assert answer.endswith(b"\r\n\r\n")


# --- JSON -----------------------------------------------------------------------------------------------

RUN = b'"script":"hello","reqid":"json"'

BAD_BODIES = {
    "empty": (b"", "script"),
    "empty object": (b"{}", "script"),
    "no script": (b'{"reqid":"json"}', "script"),
    "no reqid": (b'{"script":"hello"}', "reqid"),
    "null script": (b'{"script":null,"reqid":"json"}', "script"),
    "script a number": (b'{"script":1,"reqid":"json"}', "script"),
    "script a list": (b'{"script":["hello"],"reqid":"json"}', "script"),
    "script empty": (b'{"script":"","reqid":"json"}', "script"),
    "script with a path": (b'{"script":"../hello","reqid":"json"}', "script"),
    "script with a newline": (b'{"script":"hello\\n","reqid":"json"}', "script"),
    "script with a NUL": (b'{"script":"hello\\u0000","reqid":"json"}', "script"),
    "script not ASCII": (b'{"script":"h\xc3\xa9llo","reqid":"json"}', "script"),
    "script too long": (b'{"script":"%s","reqid":"json"}' % (b"h" * 129), "script"),
    "reqid a number": (b'{"script":"hello","reqid":5}', "reqid"),
    "reqid a path": (b'{"script":"hello","reqid":"../json"}', "reqid"),
    "reqid with a newline": (b'{"script":"hello","reqid":"json\\n"}', "reqid"),
    "reqid too long": (b'{"script":"hello","reqid":"%s"}' % (b"r" * 65), "reqid"),
    "args a string": (b'{"args":"x",%s}' % RUN, "args"),
    "args an object": (b'{"args":{"a":"b"},%s}' % RUN, "args"),
    "args with a number": (b'{"args":["a",1],%s}' % RUN, "args"),
    "args with null": (b'{"args":[null],%s}' % RUN, "args"),
    "args with true": (b'{"args":[true],%s}' % RUN, "args"),
    "args with a list": (b'{"args":[["a"]],%s}' % RUN, "args"),
    "args with a NUL": (b'{"args":["a","b\\u0000c"],%s}' % RUN, "args[1]"),
    "args with a lone surrogate": (b'{"args":["\\ud83d"],%s}' % RUN, "args[0]"),
    "10,001 args": (b'{"args":[%s"a"],%s}' % (b'"a",' * 10000, RUN), "args"),
    "username a number": (b'{"username":7,%s}' % RUN, "username"),
    "username too long": (b'{"username":"%s",%s}' % (b"u" * 257, RUN), "username"),
    "username a lone surrogate": (b'{"username":"\\udc80",%s}' % RUN, "username"),
    "token a list": (b'{"token":[],%s}' % RUN, "token"),
    "token with a NUL": (b'{"token":"\\u0000",%s}' % RUN, "token"),
    "timeout true": (b'{"timeout":true,%s}' % RUN, "timeout"),
    "timeout a fraction": (b'{"timeout":1.5,%s}' % RUN, "timeout"),
    "timeout 1e3": (b'{"timeout":1e3,%s}' % RUN, "timeout"),
    "timeout a string": (b'{"timeout":"5",%s}' % RUN, "timeout"),
    "timeout negative": (b'{"timeout":-1,%s}' % RUN, "timeout"),
    "timeout of 30 digits": (b'{"timeout":%s,%s}' % (b"9" * 30, RUN), "timeout"),
    "async a number": (b'{"async":1,%s}' % RUN, "async"),
    "async a string": (b'{"async":"no",%s}' % RUN, "async"),
    "stream a list": (b'{"stream":[],%s}' % RUN, "stream"),
    "a name twice": (b'{"args":[],"args":["x"],%s}' % RUN, "args"),
    "a name twice, once escaped": (b'{"\\u0061rgs":[],"args":["x"],%s}' % RUN, "args"),
    "an unknown name twice": (b'{"later":1,"later":1,%s}' % RUN, "later"),
    "a nested name twice": (b'{"later":{"a":1,"a":2},%s}' % RUN, "a"),
    "a list": (b"[]", ""),
    "a string": (b'"hello"', ""),
    "a number": (b"5", ""),
    "null": (b"null", ""),
    "not JSON": (b"script=hello", ""),
    "single quotes": (b"{'script':'hello'}", ""),
    "cut short": (b'{"script":"hel', ""),
    "two objects": (b"{%s}{%s}" % (RUN, RUN), ""),
    "a comma at the end": (b"{%s,}" % RUN, ""),
    "not UTF-8": (b'{"username":"\xff",%s}' % RUN, ""),
    "UTF-8 surrogate": (b'{"username":"\xed\xa0\x80",%s}' % RUN, ""),
    "UTF-16": (("{%s}" % RUN.decode()).encode("utf-16"), ""),
    "byte order mark": (b"\xef\xbb\xbf{%s}" % RUN, ""),
    "raw newline in a string": (b'{"username":"a\nb",%s}' % RUN, ""),
    "raw NUL in a string": (b'{"username":"a\0b",%s}' % RUN, ""),
    "NaN": (b'{"later":NaN,%s}' % RUN, ""),
    "Infinity": (b'{"timeout":Infinity,%s}' % RUN, ""),
    "-Infinity": (b'{"later":[-Infinity],%s}' % RUN, ""),
    "1,000,000 lists deep": (b"[" * 1000000, ""),
    "250,000 objects deep": (b'{"":' * 250000, ""),
    "33 deep": (b'{"later":%s%s,%s}' % (b"[" * 32, b"]" * 32, RUN), ""),
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_a_body_that_is_no_run_request_is_refused_and_the_field_is_named(alpha, tls, name):
    body, field = BAD_BODIES[name]
    status, _, answer = ask(alpha, tls, request(body, "/run"))
    assert status == 400
    assert answer["ok"] is False
    if field:
        assert answer["field"] == field
        assert "`%s`" % field in answer["error"]
    assert not has_record(alpha, "json")


def test_a_number_of_5000_digits_is_refused(alpha, tls):
    for field in (b"timeout", b"reqid"):
        data = b'{"script":"hello","reqid":"big","%s":%s}' % (field, b"1" * 5000)
        if field == b"reqid":
            data = data.replace(b'"reqid":"big",', b"")
        status, _, answer = ask(alpha, tls, request(data, "/run"))
        assert (status, answer["ok"]) == (400, False)
    assert not has_record(alpha, "big")


def test_unknown_fields_are_ignored_whatever_they_hold(alpha, tls):
    later = b'{"a":[1,2.5e3,null,true,{"b":"\\ud83d\\ude00"}]}'
    status, _, answer = ask(alpha, tls, request(b'{"later":%s,"reqid":"later"}' % later))
    assert (status, answer["reqid"]) == (200, "later")


def test_null_is_as_good_as_absent_for_a_field_that_may_be_absent(alpha, tls):
    status, _, answer = ask(alpha, tls, request(b'{"reqid":null}'))
    assert (status, answer["reqid"]) == (200, "")


def test_32_levels_of_json_are_read(alpha, tls):
    body = b'{"reqid":"deep","later":%s%s}' % (b"[" * 31, b"]" * 31)
    status, _, answer = ask(alpha, tls, request(body))
    assert (status, answer["reqid"]) == (200, "deep")


def test_brackets_in_strings_do_not_count_as_levels(alpha, tls):
    body = json.dumps({"reqid": "brackets", "later": '[{"\\' * 500 + '"' * 7 + "[" * 500}).encode()
    status, _, answer = ask(alpha, tls, request(body))
    assert (status, answer["reqid"]) == (200, "brackets")


def test_a_string_of_escapes_that_never_ends_costs_no_more_than_its_length():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import ctrl_exec\n"
        "try: ctrl_exec.parse_json(b'[' * 33 + b'\"' + b'\\\\\"' * 500000)\n"
        "except ctrl_exec.BadRequest as error: print('refused')"
    )
    where = os.path.dirname(support.PROGRAM)
    done = subprocess.run([sys.executable, "-c", code, where], timeout=60, stdout=subprocess.PIPE, text=True)
    assert done.stdout == "refused\n"


@pytest.mark.parametrize(
    "value",
    ({}, {"a": "x"}, {"a": "\u00e9\u4e2d\U0001f600"}, {"a": 'q"\\\n\t\u2028'}, {"a": [1, True, None, 0.5]}),
)
def test_what_is_encoded_parses_to_the_same_and_has_no_blanks(value):
    data = ctrl_exec.encode_json(value)
    assert ctrl_exec.parse_json(data) == value
    assert b'": ' not in data and b", " not in data


def test_a_lone_surrogate_of_ours_is_sent_as_valid_utf_8():
    data = ctrl_exec.encode_json({"a": "x\udc80y"})
    assert ctrl_exec.parse_json(data)["a"] == "x?y"


# --- the connection -------------------------------------------------------------------------------------


def test_http_1_0_is_answered_in_http_1_0_and_closed(alpha, tls):
    with support.tls_connect(alpha.port, tls) as sock:
        sock.sendall(b"POST /ping HTTP/1.0\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\n{}")
        answer = read_all(sock)
    assert answer.startswith(b"HTTP/1.0 200 OK\r\n")
    assert b"\r\nConnection: close\r\n" in answer
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["host"] == "alpha"


def test_expect_100_continue_is_answered_before_the_body_is_sent(alpha, tls):
    with support.tls_connect(alpha.port, tls) as sock:
        sock.sendall(head("POST /ping HTTP/1.1", "Expect: 100-continue", "Content-Length: 15"))
        assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(b'{"reqid":"con"}')
        status, _, body = support.read_reply(sock)
    assert (status, json.loads(body)["reqid"]) == (200, "con")


def test_expect_100_continue_is_refused_when_the_body_would_be_too_large(alpha, tls):
    with support.tls_connect(alpha.port, tls) as sock:
        sock.sendall(head("POST /ping HTTP/1.1", "Expect: 100-continue", "Content-Length: 5000000"))
        answer = read_all(sock)
    assert answer.startswith(b"HTTP/1.1 413 ")


def test_a_connection_answers_several_requests_one_after_the_other(alpha, tls):
    with support.tls_connect(alpha.port, tls) as sock:
        for number in range(5):
            sock.sendall(request(b'{"reqid":"keep-%d"}' % number))
            status, headers, body = support.read_reply(sock)
            assert (status, headers["connection"]) == (200, "keep-alive")
            assert json.loads(body)["reqid"] == "keep-%d" % number


def test_a_request_that_is_refused_for_its_content_does_not_end_the_connection(alpha, tls):
    with support.tls_connect(alpha.port, tls) as sock:
        for path, body, expected in (("/run", b"[]", 400), ("/no", b"{}", 404), ("/ping", b"{}", 200)):
            sock.sendall(request(body, path))
            assert support.read_reply(sock)[0] == expected


def test_two_requests_in_one_write_get_two_answers_in_order(alpha, tls):
    first = request(b'{"reqid":"first"}')
    second = request(b'{"reqid":"second"}', "/ping", "Connection: close")
    with support.tls_connect(alpha.port, tls) as sock:
        sock.sendall(first + second)
        answer = read_all(sock)
    assert answer.count(b"HTTP/1.1 200 OK\r\n") == 2
    assert 0 < answer.index(b'"reqid":"first"') < answer.index(b'"reqid":"second"')


def test_what_follows_a_malformed_request_is_not_taken_for_another(alpha, tls):
    smuggled = request(b'{"script":"hello","reqid":"smuggled"}', "/run")
    for data in (
        head("POST /ping HTTP/1.1", "Transfer-Encoding: chunked", "Content-Length: 3") + b"0\r\n\r\n",
        head("POST /ping HTTP/1.1", "Content-Length: 0", "Content-Length: 5"),
        head("POST /ping HTTP/1.1"),
    ):
        with support.tls_connect(alpha.port, tls) as sock:
            sock.sendall(data + smuggled)
            assert read_all(sock).count(b"HTTP/1.1 ") == 1
    assert not has_record(alpha, "smuggled")


def test_a_refusal_reaches_a_client_that_is_still_sending(alpha, tls):
    with support.tls_connect(alpha.port, tls) as sock:
        sock.sendall(head("POST /ping HTTP/1.1", "Content-Length: 10000000000"))
        for _ in range(32):  # the answer is on its way by now, and unread
            sock.sendall(b"x" * 16384)
        status, _, body = support.read_reply(sock)
    assert status == 413
    assert "10000000000" in json.loads(body)["error"]


def test_a_request_byte_by_byte_is_the_same_request(alpha, tls):
    with support.tls_connect(alpha.port, tls) as sock:
        for byte in request(b'{"reqid":"b\xc3\xa9"}', "/ping", "Connection: close"):
            sock.sendall(bytes([byte]))
        status, _, body = support.read_reply(sock)
    assert (status, json.loads(body)["reqid"]) == (200, "b\u00e9")


def test_a_client_that_goes_in_mid_body_leaves_nothing_behind(alpha, tls):
    data = request(b'{"script":"hello","reqid":"halfway"}', "/run")
    for size in (5, 30, len(data) - 1):
        with support.tls_connect(alpha.port, tls) as sock:
            sock.sendall(data[:size])
    assert ask(alpha, tls, request())[0] == 200
    assert not has_record(alpha, "halfway")


def test_a_short_answer_has_a_length_and_a_long_one_is_chunked_or_ends_with_the_connection(alpha, tls):
    long_args = ["%03d-" % n + "x" * 1000 for n in range(200)]
    expected = "".join(arg + "\0" for arg in long_args)
    body = json.dumps({"script": "hello", "reqid": "short-answer"}).encode()
    status, headers, answer = ask(alpha, tls, request(body, "/run"))
    assert (status, answer["stdout"]) == (200, "hello\n")
    assert "content-length" in headers and "transfer-encoding" not in headers

    body = json.dumps({"script": "args", "reqid": "chunked-answer", "args": long_args}).encode()
    status, headers, answer = ask(alpha, tls, request(body, "/run"))
    assert (status, answer["stdout"]) == (200, expected)
    assert headers["transfer-encoding"] == "chunked" and "content-length" not in headers

    body = body.replace(b"chunked-answer", b"ending-answer")
    data = request(body, "/run").replace(b"HTTP/1.1", b"HTTP/1.0")
    status, headers, answer = ask(alpha, tls, data)
    assert (status, answer["stdout"]) == (200, expected)
    assert "transfer-encoding" not in headers and headers["connection"] == "close"


def test_the_agent_is_well_after_all_this(deployment, alpha):
    code, answer = deployment.control.json("ping", "alpha")
    assert (code, answer["results"][0]["status"]) == (0, "ok")
    assert alpha.process.poll() is None
    assert "ACTION=bug" not in alpha.log()


# --- answers, as a client reads them --------------------------------------------------------------------


def read_answer(data, limit=1000, split=0):
    """Give bytes to the reader of answers, then end the stream: (status, body)."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        if split:
            theirs.sendall(data[:split])
            channel = ctrl_exec.Channel(ours)
            channel._receive(ctrl_exec.Deadline(5))
            theirs.sendall(data[split:])
        else:
            channel = ctrl_exec.Channel(ours)
            theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
        answer = ctrl_exec.read_answer(channel, ctrl_exec.Deadline(20))
        return answer.status, b"".join(ctrl_exec.read_body(channel, answer, ctrl_exec.Deadline(20), limit))


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"

GOOD_ANSWERS = {
    "by length": (OK + b"Content-Length: 5\r\n\r\nhello", b"hello"),
    "empty": (OK + b"Content-Length: 0\r\n\r\n", b""),
    "no more than its length": (OK + b"Content-Length: 4\r\n\r\nhello", b"hell"),
    "to the end": (OK + b"\r\nhello", b"hello"),
    "no reason": (b"HTTP/1.0 200\r\nContent-Length: 2\r\n\r\n{}", b"{}"),
    "chunks": (CHUNKED + b"2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n", b"hello"),
    "hex sizes": (CHUNKED + b"0A\r\n0123456789\r\nb\r\n0123456789a\r\n0\r\n\r\n", b"01234567890123456789a"),
    "no chunks": (CHUNKED + b"0\r\n\r\n", b""),
    "exactly the limit": (OK + b"Content-Length: 1000\r\n\r\n" + b"x" * 1000, b"x" * 1000),
    "exactly the limit, to the end": (OK + b"\r\n" + b"x" * 1000, b"x" * 1000),
    "exactly the limit, chunked": (CHUNKED + b"3e8\r\n" + b"x" * 1000 + b"\r\n0\r\n\r\n", b"x" * 1000),
}


@pytest.mark.parametrize("name", GOOD_ANSWERS)
def test_an_answer_is_read_whole(name):
    data, body = GOOD_ANSWERS[name]
    assert read_answer(data) == (200, body)


@pytest.mark.parametrize("name", ("by length", "to the end", "chunks", "hex sizes"))
def test_an_answer_is_the_same_wherever_the_network_cuts_it(name):
    data, body = GOOD_ANSWERS[name]
    for split in range(1, len(data)):
        assert read_answer(data, split=split) == (200, body)


BAD_ANSWERS = {
    "nothing": (b"", ConnectionError),
    "half a head": (b"HTTP/1.1 200 OK\r\nContent-", ConnectionError),
    "not HTTP": (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", BadRequest),
    "HTTP/2": (b"HTTP/2 200\r\n\r\n", BadRequest),
    "status 99": (b"HTTP/1.1 99 Low\r\n\r\n", BadRequest),
    "status 600": (b"HTTP/1.1 600 High\r\n\r\n", BadRequest),
    "status 2000": (b"HTTP/1.1 2000 Long\r\n\r\n", BadRequest),
    "ESC in the reason": (b"HTTP/1.1 200 \x1b[2J\r\n\r\n", BadRequest),
    "folded header": (OK + b"X-A: 1\r\n 2\r\n\r\n", BadRequest),
    "33 headers": (OK + b"".join(b"X-%d: y\r\n" % n for n in range(33)) + b"\r\n", HeadTooLarge),
    "a head of 40 KB": (OK + b"X-A: " + b"y" * 40000 + b"\r\n\r\n", HeadTooLarge),
    "length cut short": (OK + b"Content-Length: 5\r\n\r\nhell", ConnectionError),
    "length -1": (OK + b"Content-Length: -1\r\n\r\n", BadRequest),
    "length +5": (OK + b"Content-Length: +5\r\n\r\nhello", BadRequest),
    "length 5_0": (OK + b"Content-Length: 5_0\r\n\r\nhello", BadRequest),
    "length twice": (OK + b"Content-Length: 5\r\nContent-Length: 4\r\n\r\nhello", BadRequest),
    "length over the limit": (OK + b"Content-Length: 1001\r\n\r\n" + b"x" * 1001, TooLarge),
    "length of a petabyte": (OK + b"Content-Length: 1000000000000000\r\n\r\n", TooLarge),
    "to the end, over the limit": (OK + b"\r\n" + b"x" * 1001, TooLarge),
    "chunks over the limit": (CHUNKED + b"1f4\r\n%s\r\n" % (b"x" * 500) + b"1f5\r\n", TooLarge),
    "one chunk of 4 GB": (CHUNKED + b"ffffffff\r\n", TooLarge),
    "chunk cut short": (CHUNKED + b"5\r\nhell", ConnectionError),
    "chunks without an end": (CHUNKED + b"5\r\nhello\r\n", ConnectionError),
    "last chunk cut short": (CHUNKED + b"5\r\nhello\r\n0\r\n", ConnectionError),
    "chunk longer than it says": (CHUNKED + b"4\r\nhello\r\n0\r\n\r\n", BadRequest),
    "chunk size not hex": (CHUNKED + b"zz\r\nhello\r\n0\r\n\r\n", BadRequest),
    "chunk size -5": (CHUNKED + b"-5\r\nhello\r\n0\r\n\r\n", BadRequest),
    "chunk size +5": (CHUNKED + b"+5\r\nhello\r\n0\r\n\r\n", BadRequest),
    "chunk size 0x5": (CHUNKED + b"0x5\r\nhello\r\n0\r\n\r\n", BadRequest),
    "chunk size 5_0": (CHUNKED + b"5_0\r\nhello\r\n0\r\n\r\n", BadRequest),
    "chunk size with a blank": (CHUNKED + b" 5\r\nhello\r\n0\r\n\r\n", BadRequest),
    "chunk size of 9 digits": (CHUNKED + b"000000005\r\nhello\r\n0\r\n\r\n", BadRequest),
    "no chunk size": (CHUNKED + b"\r\nhello\r\n0\r\n\r\n", BadRequest),
    "a chunk size line without end": (CHUNKED + b"5" * 200, HeadTooLarge),
}


@pytest.mark.parametrize("name", BAD_ANSWERS)
def test_an_answer_that_is_none_raises_what_it_is(name):
    data, error = BAD_ANSWERS[name]
    with pytest.raises(error):
        read_answer(data)


def test_a_request_of_ours_is_one_that_we_would_take():
    data = ctrl_exec.encode_request("POST", "/ping", "host", {"reqid": "\u00e9"}, True)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(data)
        request = ctrl_exec.read_request(ctrl_exec.Channel(ours), ctrl_exec.Deadline(5))
    assert (request.method, request.path, request.version) == ("POST", "/ping", "1.1")
    assert request.headers["host"] == "host" and not request.wants_close()
    assert ctrl_exec.parse_json(request.body) == {"reqid": "\u00e9"}


def test_a_peer_that_takes_its_time_for_each_piece_gets_it_all():
    ours, theirs = socket.socketpair()
    got = []

    def read_slowly():
        while True:
            data = theirs.recv(65536)
            if not data:
                return
            got.append(data)
            time.sleep(0.1)

    reader = threading.Thread(target=read_slowly)
    reader.start()
    data = os.urandom(2 * 1024 * 1024)
    ctrl_exec.Channel(ours).write(data, 1)  # second; all of it takes more
    ours.close()
    reader.join(60)
    theirs.close()
    assert b"".join(got) == data
