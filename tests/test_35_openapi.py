"""The server answers as its OpenAPI document says: requests good and bad are made from the document itself."""

import json
import random
import re
import socket

import pytest

import ctrl_exec
import support
from support import ApiServer, parse_events, read_reply, send_http, wait_until

ROUNDS = 12  # good requests for each operation
METHODS = ("get", "post")


# --- a reader of JSON Schema, as much as the document uses -----------------------------------------------------

KINDS = {
    "object": dict, "array": list, "string": str, "boolean": bool, "null": type(None), "integer": int,
}  # fmt: skip
WORDS = {
    "type", "properties", "required", "items", "additionalProperties", "enum", "const", "oneOf", "pattern",
    "minItems", "maxItems", "maxLength", "minimum", "maximum", "description", "$ref",
}  # fmt: skip


def find_faults(value, schema, document, where="$"):
    """What is wrong with a value, a line each."""
    assert set(schema) <= WORDS, "a word that this reader does not know: %s" % sorted(set(schema) - WORDS)
    if "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    if "oneOf" in schema:
        good = [one for one in schema["oneOf"] if not find_faults(value, one, document)]
        return [] if len(good) == 1 else ["%s: %d of oneOf hold" % (where, len(good))]
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(type(value) is KINDS[kind] for kind in kinds):
        return ["%s: %r is not %s" % (where, value, kinds)]
    faults = []
    if "const" in schema and value is not schema["const"]:
        faults.append("%s: not %r" % (where, schema["const"]))
    if "enum" in schema and value not in schema["enum"]:
        faults.append("%s: %r is not one of %s" % (where, value, schema["enum"]))
    if isinstance(value, str):
        if "pattern" in schema and not re.search(schema["pattern"], value):
            faults.append("%s: %r does not match" % (where, value))
        if len(value) > schema.get("maxLength", len(value)):
            faults.append("%s: too long" % where)
    if type(value) is int and not schema.get("minimum", value) <= value <= schema.get("maximum", value):
        faults.append("%s: %d is out of range" % (where, value))
    if isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            faults.append("%s: %d items" % (where, len(value)))
        for number, item in enumerate(value):
            faults += find_faults(item, schema.get("items", {}), document, "%s[%d]" % (where, number))
    if isinstance(value, dict):
        faults += ["%s: no %s" % (where, name) for name in schema.get("required", ()) if name not in value]
        for name, item in value.items():
            inner = schema.get("properties", {}).get(name, schema.get("additionalProperties", {}))
            faults += find_faults(item, inner, document, "%s.%s" % (where, name))
    return faults


# --- requests from schemas ----------------------------------------------------------------------------------------

TEXTS = ["", "a", "a b", "$(id)", "ü€😀", "\u202e", "-x", "--", "x" * 200, "\n\r\t", "'\"\\", "../..", "{}", "\x7f\x9b"]


def make_value(schema, chance):
    """A value that the schema allows."""
    if "enum" in schema:
        return chance.choice(schema["enum"])
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    kind = chance.choice(kinds)
    if kind == "string":
        fitting = [text for text in TEXTS if re.search(schema.get("pattern", ""), text)]
        return chance.choice(fitting)[: schema.get("maxLength", 1000)]
    if kind == "integer":
        return chance.choice([schema["minimum"], schema["maximum"], schema["minimum"] + 5])
    if kind == "boolean":
        return chance.choice([True, False])
    if kind == "array":
        count = chance.randint(schema.get("minItems", 0), 3)
        return [make_value(schema["items"], chance) for _ in range(count)]
    return None


def make_body(schema, chance):
    """An object that the schema allows, sometimes with what a newer client might add."""
    body = {
        name: make_value(inner, chance)
        for name, inner in schema["properties"].items()
        if name in schema["required"] or chance.random() < 0.6
    }
    if chance.random() < 0.3:
        body["x-newer"] = {"a": [1, None, {"b": 1.5}]}
    return body


def spoil_value(schema):
    """Values that the schema does not allow, each in one respect."""
    kinds = schema["type"] if isinstance(schema.get("type"), list) else [schema.get("type", "string")]
    wrong = {"string": "s", "integer": 7, "boolean": True, "array": ["s"], "object": {}, "null": None}
    yield from (value for kind, value in wrong.items() if kind not in kinds)
    yield 1.5
    if "string" in kinds and "enum" not in schema:
        yield from ("nul \0", "x" * (schema["maxLength"] + 1))
        if schema["pattern"] != "^[^\\x00]*$":
            yield from ("", "a b", "ü", "a/b", "a\n")
    if "integer" in kinds:
        yield from (schema["minimum"] - 1, schema["maximum"] + 1, 10**50, True, "5", 1e300)
    if "array" in kinds:
        yield from ([1], [None], [["s"]], ["nul \0"], ["s"] * (schema["maxItems"] + 1))
        if schema.get("minItems"):
            yield []


def make_bad_bodies(schema, chance):
    """(what is wrong, bytes) of bodies that must be refused."""
    good = {**make_body(schema, chance), **{name: make_value(schema["properties"][name], chance) for name in schema["required"]}}
    for name in schema["required"]:
        yield "no " + name, json.dumps({key: value for key, value in good.items() if key != name}).encode()
    for name, inner in schema["properties"].items():
        for value in spoil_value(inner):
            yield "%s: %.20r" % (name, value), json.dumps({**good, name: value}).encode()
        twice = json.dumps(good)[:-1] + "%s%s: 1, %s: 1}" % (", " if good else "", json.dumps(name), json.dumps(name))
        yield name + " twice", twice.encode()
        yield name + ": half a pair", json.dumps({**good, name: "\udc80"}).encode()
    for text in (b"[]", b"1", b"null", b"{", b"\xff{}", b"{} {}", b'{"a": NaN}', b'{"a": 1e999}', b"[" * 100000):
        yield repr(text[:12]), text
    yield "deep", b'{"a": ' + b"[" * 60 + b"]" * 60 + b"}"
    yield "digits", b'{"a": ' + b"1" * 5000 + b"}"


def operations(document):
    """(path, method, operation) of everything the document has."""
    for path, methods in document["paths"].items():
        for method in METHODS:
            if method in methods:
                yield path, method.upper(), methods[method]


# --- against the server -------------------------------------------------------------------------------------------------


class Checked:
    """An API whose every answer is held to the document."""

    def __init__(self, server):
        self.server = server
        self.document = server.call("GET", "/openapi.json").json
        self.seen = set()  # (path, method, status)

    def call(self, path, method, body=None, argument="", query="", connect=None, **headers):
        with (connect or self.server.connect)() as sock:
            send_http(sock, method, path.replace("{reqid}", argument) + query, body, Connection="close", **headers)
            reply = support.Reply(*read_reply(sock))
        self.check(path, method, reply)
        return reply

    def check(self, path, method, reply):
        answers = self.document["paths"][path][method.lower()]["responses"]
        assert str(reply.status) in answers, (path, method, reply.status, reply.body[:300])
        ((kind, content),) = answers[str(reply.status)]["content"].items()
        assert reply.headers["content-type"].partition(";")[0] == kind
        if kind == "application/json":
            values = [reply.json]
        elif kind == "text/event-stream":
            values = [{"id": i, "event": e, "data": json.dumps(d)} for i, e, d in parse_events(reply.body)]
        else:
            values = [reply.body.decode("utf-8")]
        for value in values:
            assert find_faults(value, content["schema"], self.document) == []
        for name in answers[str(reply.status)].get("headers", {}):
            assert name.lower() in reply.headers
        self.seen.add((path, method, reply.status))


@pytest.fixture(scope="module")
def checked(deployment):
    with ApiServer(deployment.control, "openapi") as server:
        yield Checked(server)


@pytest.fixture(scope="module")
def guarded(deployment):
    with ApiServer(deployment.control, "openapi-denying", "") as server:
        yield Checked(server)


@pytest.fixture(scope="module")
def reqid(checked):
    return checked.server.run_script(["alpha", "beta"], "hello").json["reqid"]


CASES = [
    (path, method, operation["operationId"]) for path, method, operation in operations(ctrl_exec.build_openapi())
]
EACH = pytest.mark.parametrize("path, method", [case[:2] for case in CASES], ids=[case[2] for case in CASES])


def test_the_document_is_of_openapi_3_1_and_has_the_table_whole(checked):
    document = checked.document
    assert document == json.loads(json.dumps(ctrl_exec.build_openapi()))
    assert document["openapi"].startswith("3.1.") and document["info"]["version"] == ctrl_exec.__version__
    listed = {(path.replace("{reqid}", "*"), method) for path, method, _ in operations(document)}
    assert listed == {(operation.path, operation.method) for operation in ctrl_exec.OPERATIONS}
    names = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(set(names)) == len(names)
    index = checked.server.call("GET", "/").json["endpoints"]
    assert {(row["path"], row["method"]) for row in index} == {case[:2] for case in CASES}


def test_every_reference_has_a_target_and_every_schema_is_used(checked):
    text = json.dumps(checked.document)
    used = set(re.findall(r'"#/components/schemas/([A-Za-z]+)"', text))
    assert used == set(checked.document["components"]["schemas"])


def test_the_live_document_names_hosts_and_scripts(checked, deployment):
    live = checked.server.call("GET", "/openapi-live.json").json
    fields = live["paths"]["/run"]["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert fields["hosts"]["items"]["enum"] == ["alpha", "beta"]
    assert {"hello", "sleep"} <= set(fields["script"]["enum"]) == set(live["x-ctrl-exec-scripts"])
    assert live["x-ctrl-exec-scripts"]["hello"] == {"hosts": ["alpha", "beta"], "schemas": []}
    deployment["alpha"].script("described", "echo\n")
    deployment["alpha"].put("/scripts/described.schema.json", '{"version": "7", "type": "object"}')
    deployment["alpha"].reload()
    live = checked.server.call("GET", "/openapi-live.json").json
    assert live["x-ctrl-exec-scripts"]["described"] == {
        "hosts": ["alpha"],
        "schemas": [
            {"schema_version": "7", "schema": {"version": "7", "type": "object"}, "hosts": ["alpha"]},
        ],
    }  # fmt: skip


def body_schema(checked, path, method):
    """The schema of an operation's body, with the hosts and scripts that there are."""
    operation = checked.document["paths"][path][method.lower()]
    if "requestBody" not in operation:
        return None
    schema = json.loads(json.dumps(operation["requestBody"]["content"]["application/json"]["schema"]))
    if "hosts" in schema["properties"]:
        schema["properties"]["hosts"]["items"] = {"type": "string", "enum": ["alpha", "beta"]}
    if "script" in schema["properties"]:
        schema["properties"]["script"] = {"type": "string", "enum": ["hello", "args", "env", "nonesuch"]}
    return schema


@EACH
def test_good_requests_get_a_documented_answer_that_is_no_refusal(checked, reqid, path, method):
    chance = random.Random(path + method)
    schema = body_schema(checked, path, method)
    for _ in range(ROUNDS if schema else 2):
        body = make_body(schema, chance) if schema else None
        reply = checked.call(path, method, body, reqid)
        allowed = {int(status) for status in checked.document["paths"][path][method.lower()]["responses"]}
        assert reply.status in allowed & {200, 202, 409}, (body, reply.body[:300])


@EACH
def test_bad_bodies_are_refused_with_a_sentence(checked, reqid, path, method):
    schema = body_schema(checked, path, method)
    if schema is None:  # a body has no meaning here, but for its token, and must still be sound
        schema = {"properties": {}, "required": []}
    for what, body in make_bad_bodies(schema, random.Random(path)):
        reply = checked.call(path, method, body, reqid, Content_Length=len(body), Content_Type="application/json")
        assert reply.status == 400 and reply.json["error"], (what, reply.status, reply.body[:200])


@EACH
def test_what_any_operation_may_answer(checked, guarded, reqid, path, method):
    def ask(status, body=None, argument=reqid, by=checked, query="", **headers):
        reply = by.call(path, method, body, argument, query, **headers)
        assert reply.status == status, reply.body[:300]

    ask(403, Origin="https://evil.example")
    ask(413, b"", Content_Length=2 * ctrl_exec.MAX_BODY)
    ask(415, b"{}", Content_Type="text/plain", Content_Length=2)
    ask(431, **{"X-%d" % number: "x" for number in range(40)})
    ask(400, Host=None)
    if method == "POST":
        ask(411, Content_Length=None)
    if "{reqid}" in path:
        ask(404, argument="0" * 16)
        ask(404, by=guarded)


def test_parameters_of_queries(checked):
    for text in ("0", "-1", "x", "", "1001", "1.0", "+1", "%31"):
        assert checked.call("/runs", "GET", query="?last=" + text).status == 400
    for text in ("?last=1", "?last=1000", "?", "", "?other=1"):
        assert checked.call("/runs", "GET", query=text).status == 200
    assert checked.call("/runs", "GET", query="?last=1&last=2").status == 400


@EACH
def test_a_failure_here_is_documented_too(checked, deployment, monkeypatch, tmp_path, path, method):
    monkeypatch.setattr(ctrl_exec, "LOG", log := ctrl_exec.EventLog())
    log.open("test", str(tmp_path / "log"))
    api = ctrl_exec.Api(checked.server.config)
    name = checked.document["paths"][path][method.lower()]["operationId"]
    monkeypatch.setitem(api._handlers, name, lambda call: {}["a bug"])
    schema = body_schema(checked, path, method)
    body = make_body(schema, random.Random(1)) if schema else None
    ours, theirs = socket.socketpair()
    with ours, theirs:
        send_http(ours, method, path.replace("{reqid}", "r1"), body)
        channel = ctrl_exec.Channel(theirs)
        request = ctrl_exec.read_request(channel, ctrl_exec.Deadline(5))
        response = api.handle(ctrl_exec.Peer("127.0.0.1", 1, None), request)
        ctrl_exec.write_response(channel, "1.1", response, keep=False)
        reply = support.Reply(*read_reply(ours))
    assert reply.status == 500
    checked.check(path, method, reply)
    refused = api.refuse("127.0.0.1", ctrl_exec.Unavailable("no room"))
    headers = {"content-type": "application/json", **{name.lower(): value for name, value in refused.headers}}
    checked.check(path, method, support.Reply(refused.status, headers, ctrl_exec.encode_json(refused.body)))


def test_every_documented_answer_has_been_seen(checked, deployment):
    """Runs after the others, whose answers it counts."""
    if len(checked.seen) < 60:
        pytest.skip("counts what the other tests of this file have seen: run it whole")
    for path, method, operation in operations(checked.document):
        if "404" in operation["responses"] and "requestBody" in operation and "{reqid}" not in path:
            checked.call(path, method, {"hosts": ["nobody"], "script": "hello"})
    for body in ({"hosts": ["alpha"], "script": "hello"}, {"hosts": ["alpha"], "script": "hello", "async": True}):
        checked.call("/run", "POST", body)
    running = checked.server.connect()
    send_http(running, "POST", "/run", {"hosts": ["alpha"], "script": "sleep", "args": ["600"]})
    held = deployment.control.wait_for_lock()
    assert checked.call("/run", "POST", {"hosts": ["alpha"], "script": "sleep", "args": ["0"]}).status == 409
    wait_until(lambda: checked.server.call("POST", "/cancel/" + held).json["results"][0]["status"] == "cancelled")
    assert read_reply(running)[0] == 200
    running.close()
    documented = {
        (path, method, int(status)) for path, method, one in operations(checked.document) for status in one["responses"]
    }
    assert checked.seen <= documented
    unseen = documented - checked.seen
    assert unseen == {("/discovery", "GET", 404)}, unseen  # a body that names a host; asked below
    checked.call("/discovery", "GET", {"hosts": ["nobody"]})
    assert documented == checked.seen


# --- what another generator of requests has found -------------------------------------------------------------------------


def test_a_number_with_a_zero_fraction_is_a_whole_number(checked):
    body = {"hosts": ["alpha"], "script": "hello", "timeout": 60.0, "args": None, "async": None}
    assert checked.call("/run", "POST", body).status == 200


def test_events_are_described_one_by_one(checked, reqid):
    schema = checked.document["components"]["schemas"]["Events"]
    assert set(schema["required"]) == {"id", "event", "data"}
    assert checked.call("/events/{reqid}", "GET", None, reqid).status == 200
