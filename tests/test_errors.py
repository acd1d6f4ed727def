"""What the proxy answers of its own: one shape, a stable code, and a status that clients act on rightly."""

import json

import pytest

from xaiproxy import errors

# As the README promises them: class, status, code, and whether an SDK may repeat the request by itself.
REFUSALS = [
    (errors.Refusal, 500, "internal_error", None),
    (errors.BadRequest, 400, "bad_request", "false"),
    (errors.HeadTooLarge, 431, "bad_request", "false"),
    (errors.LoginRequired, 401, "login_required", "false"),
    (errors.ClientKeyRequired, 401, "client_key_required", "false"),
    (errors.HostNotAllowed, 403, "host_not_allowed", "false"),
    (errors.OriginNotAllowed, 403, "origin_not_allowed", "false"),
    (errors.NotFound, 404, "not_found", "false"),
    (errors.MethodNotAllowed, 405, "method_not_allowed", "false"),
    (errors.ClientTimeout, 408, "client_timeout", "false"),
    (errors.UpstreamUnreachable, 502, "upstream_unreachable", "false"),
    (errors.TokenUnavailable, 503, "token_unavailable", "true"),
    (errors.TooManyConnections, 503, "too_many_connections", "true"),
    (errors.UpstreamTimeout, 504, "upstream_timeout", "false"),
    (errors.LoopDetected, 508, "loop_detected", "false"),
]


def make(kind, message="what happened", **how) -> errors.Refusal:
    return kind(message, 7) if kind is errors.TokenUnavailable else kind(message, **how)


def test_every_refusal_is_in_the_table():
    def all_of(kind):
        return {kind}.union(*map(all_of, kind.__subclasses__()))
    assert all_of(errors.Refusal) == {kind for kind, *_ in REFUSALS}


@pytest.mark.parametrize("kind, status, code, repeat", REFUSALS, ids=[kind.__name__ for kind, *_ in REFUSALS])
def test_a_refusal_is_json_with_a_message_a_type_and_a_code(kind, status, code, repeat):
    line, fields, body = make(kind).rendered()
    assert int(line.split(" ", 1)[0]) == status and len(line) > 4
    error = json.loads(body)["error"]
    assert list(json.loads(body)) == ["error"] and list(error) == ["message", "type", "code"]
    assert (error["message"], error["code"]) == ("what happened", code) and error["type"].endswith("_error")
    values = dict(fields)
    assert len(values) == len(fields)
    assert (values["Content-Type"], values["X-XAI-Proxy-Error"]) == ("application/json", code)
    assert values["Content-Length"] == str(len(body)) and body.endswith(b"}\n")
    assert values.get("x-should-retry") == repeat and (status >= 500 or repeat == "false")


def test_only_what_the_proxy_cannot_help_is_a_server_error():
    for kind, status, _, _ in REFUSALS:
        error = json.loads(make(kind).rendered()[2])["error"]
        assert (error["type"] == "api_error") is (status >= 500)
        assert (error["type"] == "authentication_error") is (status == 401)


def test_every_401_has_a_challenge():
    for kind, status, _, _ in REFUSALS:
        challenges = [value for name, value in make(kind).rendered()[1] if name == "WWW-Authenticate"]
        assert challenges == (['Bearer realm="xaiproxy"'] if status == 401 else [])


def test_retry_after_is_in_seconds():
    assert ("Retry-After", "7") in errors.TokenUnavailable("x", 7).rendered()[1]


@pytest.mark.parametrize("message", ["", "\"quoted\" \\ \r\n\0", "é € 😀", "\udcff",
                                     "<script>alert(1)</script>", "x" * 10000])
def test_any_message_is_sound_json_in_ascii(message):
    _, fields, body = errors.NotFound(message).rendered()
    assert json.loads(body)["error"]["message"] == message and body.isascii()
    assert dict(fields)["Content-Length"] == str(len(body))


def test_further_headers_come_after_those_of_the_kind_and_belong_to_one_refusal():
    refusal = errors.ClientTimeout("x", headers=(("A", "1"), ("B", "2")))
    assert refusal.rendered()[1][-3:] == [("x-should-retry", "false"), ("A", "1"), ("B", "2")]
    assert errors.ClientTimeout("x").rendered()[1][-1] == ("x-should-retry", "false")


def test_whether_the_connection_ends_with_it():
    assert errors.BadRequest("x", close=True).close and not errors.BadRequest("x").close


def test_what_ends_a_request_from_outside_is_no_refusal_and_no_error_of_a_command():
    for kind in (errors.ClientGone, errors.UpstreamBroken):
        assert not issubclass(kind, errors.Error)


def test_only_a_502_that_repeats_no_paid_work_may_be_retried():
    for may_retry, value in ((True, "true"), (False, "false")):
        assert ("x-should-retry", value) in errors.UpstreamUnreachable("gone", may_retry=may_retry).rendered()[1]
