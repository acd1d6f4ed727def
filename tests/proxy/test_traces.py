"""Traces: what upstream and a collector get, and that no collector holds up the proxy."""

import gzip
import json
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from proxy_process import ProxyProcess
from sandbox import until

from xaiproxy.proxy import routes

trace_service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED = f"traceparent: 00-{TRACE}-{PARENT}-01"
UNSAMPLED = f"traceparent: 00-{TRACE}-{PARENT}-00"
USAGE = {"prompt_tokens": 12, "completion_tokens": 7, "total_tokens": 30}
CHAT = json.dumps(
    {"model": "grok-4.5", "choices": [{"message": "secret answer"}], "usage": USAGE}
).encode()


def response(status: int, body: bytes = b"", *fields: str) -> bytes:
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}", *fields, "", ""]
    return "\r\n".join(lines).encode() + body


class Collector:
    """Decodes what is exported. `spans`: of all requests, as the exporter's messages."""

    def __init__(self, status: int = 200):
        self.spans = []
        self.resources = []
        self.raw = b""
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                assert self.path == "/v1/traces"
                body = self.rfile.read(int(self.headers["Content-Length"]))
                collector.raw += bytes(self.headers) + body
                if status == 200:
                    request = trace_service.ExportTraceServiceRequest.FromString(body)
                    for group in request.resource_spans:
                        collector.resources.append(values(group.resource))
                        for scope in group.scope_spans:
                            collector.spans.extend(scope.spans)
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *arguments):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def wait_for(self, number: int) -> list:
        until(lambda: len(self.spans) >= number, 10)
        return self.spans


def values(message) -> dict:
    """The attributes of a span or a resource."""
    return {
        item.key: getattr(item.value, item.value.WhichOneof("value")) for item in message.attributes
    }


def start(tmp_path, upstream, url: str, **environ: str) -> ProxyProcess:
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": url, "OTEL_BSP_SCHEDULE_DELAY": "50", **environ}
    # So few need no warning about the file descriptor limit.
    proxy = ProxyProcess(tmp_path, upstream=upstream.origin, environ=environ, max_connections=100)
    proxy.sign_in()
    return proxy


@pytest.fixture
def collector():
    with Collector() as running:
        yield running


def exchange(proxy, upstream, *request: str, answer: bytes = response(200, b"ok"), body=b""):
    """Send a request through the proxy; return it as upstream got it, and the response."""
    with proxy.client() as client:
        client.request(*request, body=body)
        received = upstream.receive()
        received.answer(answer)
        return received, client.message()


def warnings(proxy) -> list[str]:
    lines = [line for line in proxy.log_lines() if line.get("level") != "info"]
    # No refresher runs in these tests.
    return [line["message"] for line in lines if "refresher" not in line["message"]]


def traceparents(received) -> list[bytes]:
    return [
        line.partition(b":")[2].strip()
        for line in received.head.split(b"\r\n")
        if line.lower().startswith(b"traceparent:")
    ]


# without tracing


def test_trace_context_passes_in_both_directions_as_it_came(running, upstream):
    fields = (SAMPLED, "tracestate: a=1,b=2")
    answer = response(200, b"ok", f"Traceparent: 00-{TRACE}-{PARENT}-01", "tracestate: c=3")
    received, message = exchange(running, upstream, "GET", "/v1/models", *fields, answer=answer)
    for field in fields:
        assert field.encode() in received.head
    assert f"Traceparent: 00-{TRACE}-{PARENT}-01".encode() in message.head
    assert b"tracestate: c=3" in message.head


def test_nothing_of_opentelemetry_is_imported_without_an_endpoint():
    code = (
        "import sys; from xaiproxy.proxy import command, traces; from xaiproxy import config; "
        "assert traces.start(config.from_environ({})) is None; "
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd="/").returncode == 0


def test_an_endpoint_without_the_extra_is_one_warning(tmp_path, upstream):
    script = tmp_path / "without_extra.py"
    script.write_text(
        "import runpy, sys\n"
        "sys.modules['opentelemetry'] = None\n"
        "sys.argv = ['xaiproxy']\n"
        "runpy.run_module('xaiproxy', run_name='__main__')\n"
    )
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://me:pass-word@127.0.0.1:1/secret"}
    with ProxyProcess(
        tmp_path,
        command=[sys.executable, "-W", "error", str(script)],
        upstream=upstream.origin,
        environ=environ,
        max_connections=100,
    ) as proxy:
        proxy.sign_in()
        received, _ = exchange(proxy, upstream, "GET", "/v1/models", SAMPLED)
        assert traceparents(received) == [SAMPLED.partition(": ")[2].encode()]
    [warning] = warnings(proxy)
    assert warning.endswith("pip install 'xaiproxy[otel]'")
    assert "secret" not in str(proxy.log_lines()) and "pass-word" not in str(proxy.log_lines())


# spans


def test_a_span_has_the_attributes_of_a_chat_and_no_content(tmp_path, upstream, collector):
    with start(tmp_path, upstream, collector.url) as proxy:
        received, _ = exchange(
            proxy,
            upstream,
            "POST",
            "/v1/chat/completions?secret=query",
            SAMPLED,
            "tracestate: a=1",
            "Authorization: Bearer xaip_secret-client-key",
            answer=response(200, CHAT),
            body=b'{"model": "grok-4.5", "messages": ["secret prompt"]}',
        )
        [span] = collector.wait_for(1)
    assert traceparents(received) == [f"00-{TRACE}-{span.span_id.hex()}-01".encode()]
    assert b"tracestate: a=1" in received.head
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    assert (span.name, span.kind, span.trace_state) == ("chat grok-4.5", 2, "a=1")
    assert 0 < span.end_time_unix_nano - span.start_time_unix_nano < 60e9
    assert abs(span.end_time_unix_nano / 1e9 - time.time()) < 60
    assert values(span) == {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "url.scheme": "http",
        "url.path": "/v1/chat/completions",
        "server.address": "127.0.0.1",
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "x_ai",
        "gen_ai.response.model": "grok-4.5",
        "gen_ai.usage.input_tokens": 12,
        "gen_ai.usage.output_tokens": 18,
    }
    assert collector.resources[0]["service.name"] == "xaiproxy"
    for secret in (b"secret", b"the-token", b"xaip_"):
        assert secret not in collector.raw


def test_usage_is_read_from_a_compressed_stream(tmp_path, upstream, collector):
    events = b'data: {"model": "grok-4.5", "usage": null}\n\ndata: {"usage": %b}\n\n' % (
        json.dumps(USAGE).encode()
    )
    fields = "Content-Type: text/event-stream", "Content-Encoding: gzip"
    with start(tmp_path, upstream, collector.url) as proxy:
        for body, more in ((events, fields[:1]), (gzip.compress(events), fields)):
            exchange(
                proxy,
                upstream,
                "POST",
                "/v1/chat/completions",
                answer=response(200, body, *more),
                body=b"{}",
            )
        found = [values(span) for span in collector.wait_for(2)]
    assert [attributes["gen_ai.usage.output_tokens"] for attributes in found] == [18, 18]


def test_a_request_without_a_valid_parent_begins_a_trace(tmp_path, upstream, collector):
    with start(tmp_path, upstream, collector.url) as proxy:
        for fields in ((), ("traceparent: nonsense",), (SAMPLED, SAMPLED)):
            received, _ = exchange(proxy, upstream, "GET", "/v1/models", *fields)
            span = collector.wait_for(1).pop()
            trace = span.trace_id.hex()
            assert span.parent_span_id == b"" and trace != TRACE
            [sent] = traceparents(received)
            # Newer versions set a second flag.
            assert sent[:-2] == f"00-{trace}-{span.span_id.hex()}-".encode() and sent[-1:] in b"13"
            assert span.name == "GET models" and "gen_ai.operation.name" not in values(span)


def test_a_trace_that_the_client_does_not_sample_passes_as_it_came(tmp_path, upstream, collector):
    with start(tmp_path, upstream, collector.url) as proxy:
        received, _ = exchange(proxy, upstream, "GET", "/v1/models", UNSAMPLED)
        assert traceparents(received) == [UNSAMPLED.partition(": ")[2].encode()]
        exchange(proxy, upstream, "GET", "/v1/models", SAMPLED)
        assert len(collector.wait_for(1)) == 1


def test_failures_have_an_error_type(tmp_path, upstream, collector):
    cut = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf"
    with start(tmp_path, upstream, collector.url) as proxy:
        found = []

        def next_span():
            found.append(collector.wait_for(1).pop())

        for answer in (response(429, b"{}"), response(500, b"{}")):
            exchange(proxy, upstream, "POST", "/v1/responses", answer=answer, body=b"{}")
            next_span()
        with proxy.client() as client:
            client.request("GET", "/v1/models")
            received = upstream.receive()
            received.answer(cut)
            received.connection.close()
            next_span()
        # The client leaves before a response.
        with proxy.client() as client:
            client.request("GET", "/v1/models")
            upstream.receive()
        next_span()
        proxy.ask("GET", "/v1/a/../models")
        next_span()
        proxy.ask("GET", "/healthz")
        proxy.token_path.unlink()
        proxy.ask("GET", "/v1/models")
        next_span()
    seen = [
        (
            values(span).get("http.response.status_code"),
            values(span)["error.type"],
            span.status.code,
        )
        for span in found
    ]
    assert seen == [
        (429, "429", 0),
        (500, "500", 2),
        (200, "upstream_broken", 2),
        (None, "client_closed", 0),
        (400, "bad_request", 0),
        (401, "login_required", 0),
    ]
    assert {span.name for span in found} <= {"chat", "GET models", "GET other"}


def test_methods_and_paths_of_a_client_make_no_new_names(tmp_path, upstream, collector):
    with start(tmp_path, upstream, collector.url) as proxy:
        key = "xaip_" + "k" * 43
        exchange(proxy, upstream, "FROB", f"/v1/{key}/1234")
        [span] = collector.wait_for(1)
    assert span.name == "_OTHER other" and "other" in routes.ROUTES
    assert values(span)["url.path"] == "/v1/[secret]/1234"


# collectors that do not work


@pytest.mark.parametrize("kind", ["refusing", "hanging", "failing"])
def test_a_dead_collector_costs_one_line_and_a_moment_at_the_end(tmp_path, upstream, kind):
    with socket.create_server(("127.0.0.1", 0)) as listener, Collector(503) as failing:
        port = listener.getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        if kind == "refusing":
            listener.close()
        elif kind == "failing":
            url = failing.url
        # With the SDK's default of 10 s for an export, its first failure takes longer than a test.
        with start(tmp_path, upstream, url, OTEL_EXPORTER_OTLP_TIMEOUT="1") as proxy:
            begun = time.monotonic()
            for _ in range(40):
                exchange(proxy, upstream, "GET", "/v1/models")
            assert time.monotonic() - begun < 5
            proxy.wait_for_log(lambda line: "traces cannot be exported" in line["message"], 10)
            for _ in range(40):
                exchange(proxy, upstream, "GET", "/v1/models")
            begun = time.monotonic()
            proxy.terminate()
            assert proxy.wait() == 0 and time.monotonic() - begun < 3
        assert warnings(proxy) == [
            f"traces cannot be exported to {url} and are dropped; check that collector, or "
            "OTEL_EXPORTER_OTLP_ENDPOINT"
        ]


def test_the_last_spans_are_exported_at_the_end(tmp_path, upstream, collector):
    with start(tmp_path, upstream, collector.url, OTEL_BSP_SCHEDULE_DELAY="60000") as proxy:
        exchange(proxy, upstream, "GET", "/v1/models")
    assert len(collector.spans) == 1


def test_loopback_is_not_reached_through_a_proxy(tmp_path, upstream, collector):
    dead = "http://127.0.0.1:1"
    with start(tmp_path, upstream, collector.url, HTTP_PROXY=dead, ALL_PROXY=dead) as proxy:
        exchange(proxy, upstream, "GET", "/v1/models")
        collector.wait_for(1)
