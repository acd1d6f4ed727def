"""Callers that a running proxy must refuse: pages of other sites in a real browser, and no key."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import queue
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from chromium import ARGUMENTS
from proxy_process import ProxyProcess, environment
from recording_upstream import HANDSHAKE, RecordingUpstream, Seen

from xaiproxy import client_keys

KEY = "xaip_of-the-laptop"


@pytest.fixture
def upstream() -> Iterator[RecordingUpstream]:
    with RecordingUpstream() as running:
        yield running


# Pages

PATHS = ("/v1/chat/completions", "/v1/models", "/", "/metrics", "/healthz")
# All requests that a page can send without a click. Each returns what it could read, or that it was
# not refused.
PAGE = """<!DOCTYPE html><body><script>
const text = async answer => (await answer).text();
const element = (name, attributes) => new Promise(end => {
  const made = Object.assign(document.createElement(name), attributes);
  made.onload = () => end(name === 'iframe' ? made.contentDocument?.body?.textContent : made.naturalWidth || '');
  made.onerror = () => end('');
  document.body.append(made);
});
const form = (url, fields) => new Promise(end => {
  const frame = Object.assign(document.createElement('iframe'), {name: Math.random()});
  document.body.append(frame);
  const made = Object.assign(document.createElement('form'), {action: url, target: frame.name, ...fields});
  document.body.append(made);
  frame.onload = () => end(frame.contentDocument?.body?.textContent);
  made.submit();
});
const json = {method: 'POST', headers: {'Content-Type': 'application/json', Authorization: 'Bearer x'}, body: '{}'};
const plain = {method: 'POST', body: '{"model": "grok-4.5"}', headers: {'Content-Type': 'text/plain'}};
const hidden = {mode: 'no-cors', referrerPolicy: 'no-referrer'};
const attacks = {
  get: url => text(fetch(url)), json: url => text(fetch(url, json)), plain: url => text(fetch(url, plain)),
  credentials: url => text(fetch(url, {credentials: 'include'})), delete: url => text(fetch(url, {method: 'DELETE'})),
  opaque_get: url => text(fetch(url, hidden)), opaque_post: url => text(fetch(url, {...plain, ...hidden})),
  opaque_head: url => text(fetch(url, {method: 'HEAD', ...hidden})),
  beacon: async url => void navigator.sendBeacon(url, '{}'),
  xhr: url => new Promise(end => {
    const request = new XMLHttpRequest();
    request.onloadend = () => end(request.responseText);
    request.open('POST', url);
    request.send('{}');
  }),
  img: src => element('img', {src, referrerPolicy: 'no-referrer'}),
  cors_img: src => element('img', {src, crossOrigin: ''}),
  script: src => element('script', {src}), module: src => element('script', {src, type: 'module'}),
  style: href => element('link', {href, rel: 'stylesheet'}), iframe: src => element('iframe', {src}),
  form_get: url => form(url, {}), form_post: url => form(url, {method: 'post', enctype: 'text/plain'}),
  socket: url => url.includes('/v1/') && new Promise(end => {  // after 16 that failed Chromium waits between two
    const socket = new WebSocket(url.replace('http', 'ws'));
    socket.onopen = () => end('open');
    socket.onerror = () => end('');
  }),
  events: url => new Promise(end => {
    const events = new EventSource(url);
    events.onopen = events.onmessage = () => end('open');
    events.onerror = () => { events.close(); end(''); };
  }),
};
(async () => {
  const read = [];
  await Promise.all(URLS.map(url => Promise.all(Object.entries(attacks).map(async ([how, attack]) => {
    const result = await Promise.resolve(attack(url)).catch(() => '');
    if (result) read.push([how, url, String(result)]);
  }))));
  await fetch('/result', {method: 'POST', body: JSON.stringify(read)});
})();
</script>"""
# At least so many attacks send a request without a preflight.
SIMPLE = 12


class Site(http.server.ThreadingHTTPServer):
    """Another site, which serves its page at every path; `results` gets what the page could read."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Page)
        self.page = b""
        self.results: queue.Queue[list[list[str]]] = queue.Queue()


class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(self.server.page)))
        self.end_headers()
        self.wfile.write(self.server.page)

    def do_POST(self) -> None:
        self.server.results.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_arguments: object) -> None:
        pass


@pytest.fixture
def site() -> Iterator[Site]:
    with Site() as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def visit(site: Site, tmp_path: Path) -> Iterator[Callable[[str, list[str]], list[list[str]]]]:
    """Show Chromium the page under a host name. Return what it could read of these URLs."""
    if not shutil.which("chromium"):
        pytest.skip("chromium is not installed")
    with contextlib.ExitStack() as stack:

        def visit(name: str, urls: list[str]) -> list[list[str]]:
            site.page = PAGE.replace("URLS", json.dumps(urls)).encode()
            browser = subprocess.Popen(
                [
                    "chromium",
                    *ARGUMENTS,
                    "--host-resolver-rules=MAP *.test 127.0.0.1, MAP box 127.0.0.1",
                    "--remote-debugging-port=0",
                    f"--user-data-dir={tmp_path}/{name}",
                    f"http://{name}:{site.server_port}/",
                ],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
            )
            stack.callback(browser.wait)
            stack.callback(os.killpg, browser.pid, signal.SIGKILL)
            return site.results.get(timeout=30)

        yield visit


NAMES = (
    "127.0.0.1",
    "localhost",
    "rebound.test",
    "0.0.0.0",
    "[::ffff:127.0.0.1]",
    "evil.localhost",
    "box",
)


@pytest.mark.parametrize("page", ["127.0.0.1", "localhost", "rebound.test"])
def test_a_page_of_another_site_cannot_use_the_proxy(
    tmp_path: Path,
    upstream: RecordingUpstream,
    site: Site,
    visit: Callable,
    page: str,
) -> None:
    # Each name and each path, but not each pair: a browser takes ten seconds for all pairs.
    places = [(name, path) for name in NAMES for path in PATHS if page == name or path == PATHS[0]]
    with ProxyProcess(tmp_path, upstream=upstream.origin) as proxy:
        proxy.sign_in()
        assert visit(page, [f"http://{name}:{proxy.port}{path}" for name, path in places]) == []
        proxy.ask("GET", "/afterwards")
        proxy.wait_for_request("/afterwards")
        assert upstream.taken() == [] and upstream.received == 0
        # The requests did arrive.
        for path in PATHS[:-1]:
            statuses = [line["status"] for line in proxy.log_lines() if line.get("path") == path]
            names = [name for name, asked_path in places if asked_path == path]
            # A frame may load the status page's shell from a name that is not of loopback. It has no
            # data, and its policy has the browser not show it.
            allowed = {200, 403} if path == "/" else {403}
            assert len(statuses) > len(names) * SIMPLE and 403 in statuses
            assert {*statuses} <= allowed


def test_a_page_of_a_listed_site_can_use_the_proxy(
    tmp_path: Path, upstream: RecordingUpstream, site: Site, visit: Callable
) -> None:
    """This proves that the page above would work without the refusals."""
    with ProxyProcess(
        tmp_path,
        upstream=upstream.origin,
        allowed_origins=f"http://rebound.test:{site.server_port}",
    ) as proxy:
        proxy.sign_in()
        read = visit("rebound.test", [f"http://127.0.0.1:{proxy.port}/v1/models"])
        assert {how: text for how, _, text in read} == {
            "get": "GET /v1/models",
            "json": "POST /v1/models",
            "plain": "POST /v1/models",
            "delete": "DELETE /v1/models",
            "xhr": "POST /v1/models",
        }
        requests = upstream.taken()
        assert {request.method for request in requests} == {"GET", "POST", "DELETE"}
        assert any(request.fields[-2:] == HANDSHAKE for request in requests)


# Host and Origin as no browser sends them


def outcome_of(
    proxy: ProxyProcess, *lines: str, target: str = "/v1/models", version: str = "HTTP/1.1"
) -> tuple[int, str | None]:
    """Return the status, and the error code if it is an error of the proxy's own."""
    with proxy.client() as client:
        client.send("\r\n".join([f"GET {target} {version}", *lines, "", ""]).encode("latin-1"))
        answer = client.message()
        return answer.status, answer.value("X-XAI-Proxy-Error")


HERE = "Host: localhost:PORT"
OK, NO_HOST, NO_ORIGIN, BAD = (
    (200, None),
    (403, "host_not_allowed"),
    (403, "origin_not_allowed"),
    (400, "bad_request"),
)
CALLERS = [
    (OK, [HERE]),
    (OK, ["hOST:LOCALHOST."]),
    (OK, ["Host: [::1]:PORT"]),
    (OK, ["Host: 127.0.0.1"]),
    (OK, ["Host: localhost:1"]),
    (NO_HOST, ["Host: 127.1"]),
    (NO_HOST, ["Host: 0x7f.1"]),
    (NO_HOST, ["Host: 0177.0.0.1:PORT"]),
    (NO_HOST, ["Host: 127.0.0.1.nip.io"]),
    (NO_HOST, ["Host: 0.0.0.0:PORT"]),
    (NO_HOST, ["Host: [::]"]),
    (NO_HOST, ["Host: [::ffff:127.0.0.1]:PORT"]),
    (NO_HOST, ["Host: [::1%lo]"]),
    (NO_HOST, ["Host: xn--lcalhost-54a.com"]),
    (NO_HOST, ["Host: l\xf6calhost"]),
    (NO_HOST, ["Host: \xe2\x93\x9bocalhost"]),
    (NO_HOST, ["Host: localhost\xe3\x80\x82"]),
    (NO_HOST, ["Host: user@localhost"]),
    (NO_HOST, ["Host: localhost@evil.example"]),
    (NO_HOST, ["Host: localhost, evil.example"]),
    (NO_HOST, ["Host: evil.example#localhost"]),
    (NO_HOST, ["Host: evil.example:PORT"]),
    (NO_HOST, ["Host: evil.example", "X-Forwarded-Host: localhost"]),
    (NO_HOST, ["Host: evil.example", "X-Host: localhost"]),
    (NO_HOST, ["Host:"]),
    (NO_HOST, ["Host: evil.example", "Connection: host"]),
    (BAD, [HERE, HERE]),
    (BAD, [HERE, "Host: evil.example"]),
    (BAD, ["Host: evil.example", HERE]),
    (BAD, ["X-Host: localhost"]),
    (BAD, ["H\xf6st: localhost"]),
    (BAD, ["Host : localhost"]),
    (OK, [HERE, "Origin: http://localhost:PORT"]),
    (OK, [HERE, "Origin: HTTP://LOCALHOST:PORT", "Sec-Fetch-Site: same-origin"]),
    (OK, [HERE, "Sec-Fetch-Site: none"]),
    (NO_ORIGIN, [HERE, "Origin: http://localhost"]),
    (NO_ORIGIN, [HERE, "Origin: http://localhost.:PORT"]),
    (NO_ORIGIN, [HERE, "Origin: http://127.0.0.1:PORT"]),
    (NO_ORIGIN, [HERE, "Origin: null"]),
    (NO_ORIGIN, [HERE, "Origin:"]),
    (NO_ORIGIN, [HERE, "Origin: http://localhost:PORT@evil.example"]),
    (NO_ORIGIN, [HERE, "Origin: http://localhost:PORT", "Origin: http://localhost:PORT"]),
    (NO_ORIGIN, [HERE, "Origin: http://localhost:PORT", "Origin: http://evil.example"]),
    (NO_ORIGIN, [HERE, "Origin: http://localhost:PORT, http://evil.example"]),
    (NO_ORIGIN, [HERE, "Origin: http://evil.example", "Connection: origin"]),
    (NO_ORIGIN, [HERE, "Origin: http://localhost:PORT", "Sec-Fetch-Site: cross-site"]),
    *(
        (NO_ORIGIN, [HERE, f"Sec-Fetch-Site: {site}"])
        for site in (
            "cross-site",
            "same-site",
            "Cross-Site",
            "",
            "same-origin, cross-site",
            '"none"',
            "none;x",
        )
    ),
    (NO_ORIGIN, [HERE, "Sec-Fetch-Site: none", "Sec-Fetch-Site: cross-site"]),
    (NO_ORIGIN, [HERE, "Sec-Fetch-Site: cross-site", "Connection: sec-fetch-site"]),
    (BAD, [HERE, "Sec_Fetch_Site: none", "Sec-Fetch-Site: cross-site"]),
]


def test_host_and_origin_are_checked_in_every_spelling(
    tmp_path: Path, upstream: RecordingUpstream
) -> None:
    with ProxyProcess(tmp_path, upstream=upstream.origin) as proxy:
        proxy.sign_in()
        for expected, lines in CALLERS:
            lines = [line.replace("PORT", str(proxy.port)) for line in lines]
            assert outcome_of(proxy, *lines) == expected, lines
            assert len(upstream.taken()) == (expected == OK)
        assert outcome_of(proxy, version="HTTP/1.0") == NO_HOST
        for host, target, expected in (
            ("localhost", "evil.example", BAD),
            ("evil.example", "localhost", BAD),
            ("evil.example", "evil.example", NO_HOST),
            ("localhost", "localhost", OK),
        ):
            assert (
                outcome_of(proxy, f"Host: {host}", target=f"http://{target}/v1/models") == expected
            )
            assert len(upstream.taken()) == (expected == OK)
        for target, expected in (("localhost", OK), ("evil.example", NO_HOST)):
            assert (
                outcome_of(proxy, target=f"http://{target}/v1/models", version="HTTP/1.0")
                == expected
            )
            assert len(upstream.taken()) == (expected == OK)
        assert outcome_of(proxy, "Host: localhost") == OK


# Keys

WITHOUT_KEY = [
    [],
    ["Authorization: Bearer"],
    ["Authorization:"],
    ["X-Api-Key:"],
    ["Authorization: Bearer xaip_unknown"],
    ["X-Api-Key: xaip_unknown"],
    [f"Authorization: Basic {KEY}"],
    [f"Authorization: {KEY}"],
    [f"Authorization: Bearer {KEY}", f"Authorization: Bearer {KEY}"],
    [f"X-Api-Key: {KEY}", f"X-Api-Key: {KEY}"],
    [f"X-Api-Key: {KEY}", "X-Api-Key: x"],
    ["Authorization: Bearer x", "X-Api-Key: x"],
    [f"Cookie: key={KEY}"],
    [f"Proxy-Authorization: Bearer {KEY}"],
    [f"X-Api-Key: {client_keys.digest(KEY)}"],
    ["X-Api-Key: laptop"],
]
WITH_KEY = (
    [f"Authorization: bearer {KEY}"],
    [f"x-api-key: {KEY}"],
    ["Authorization: Bearer x", f"X-Api-Key: {KEY}"],
)


def assert_unauthorized(
    proxy: ProxyProcess, upstream: RecordingUpstream, callers: list[list[str]]
) -> None:
    for lines in callers:
        for method, target in (("GET", "/v1/models"), ("POST", "/v2/x"), ("GET", "/v1/../x")):
            answer = proxy.ask(method, target, *lines)
            assert answer.status == 401, lines
            assert answer.value("WWW-Authenticate") == 'Bearer realm="xaiproxy"'
            assert answer.value("Content-Type") == "application/json"
            error = json.loads(answer.body)["error"]
            assert error.pop("message") and KEY not in answer.body.decode()
            assert error == {"type": "authentication_error", "code": "client_key_required"}
    assert upstream.taken() == [] and proxy.ask("GET", "/healthz").status == 200


def run_key_command(proxy: ProxyProcess, *arguments: str) -> str:
    code = (
        "import sys; from xaiproxy import client_key_command; sys.exit(client_key_command.main())"
    )
    folder = proxy.token_path.parent
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments],
        cwd=folder,
        check=True,
        text=True,
        env=environment(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    return done.stdout.strip()


def test_no_request_is_admitted_without_a_key(tmp_path: Path, upstream: RecordingUpstream) -> None:
    keys = tmp_path / "client-keys"
    line = f"laptop {client_keys.digest(KEY)}\n"
    keys.write_text(line)
    with ProxyProcess(tmp_path, upstream=upstream.origin) as proxy:
        proxy.sign_in()
        assert_unauthorized(proxy, upstream, WITHOUT_KEY)
        for lines in WITH_KEY:
            assert proxy.ask("GET", "/v1/models", *lines).status == 200
            assert upstream.taken() == [Seen("GET", "/v1/models")]
        # The file is empty, truncated, garbage, or valid except for one detail.
        for text in (
            "",
            line[:-2],
            line[:40],
            line[:7],
            "\0" * 100,
            line + "phone",
            line + line,
            line.upper(),
            line.replace("laptop", ""),
            "laptop " + client_keys.digest("") + "\n",
        ):
            keys.write_text(line)
            assert proxy.ask("GET", "/v1/models", *WITH_KEY[0]).status == 200 and upstream.taken()
            keys.write_text(text)
            assert_unauthorized(proxy, upstream, [[], *WITH_KEY, ["X-Api-Key:"]])
        keys.unlink()
        # Not even root can read a folder as a file.
        keys.mkdir()
        assert_unauthorized(proxy, upstream, [[], *WITH_KEY])
        keys.rmdir()
        assert_unauthorized(proxy, upstream, [[], *WITH_KEY])
        keys.symlink_to("kept")
        assert_unauthorized(proxy, upstream, [[], *WITH_KEY])
        # The link's target is in the watched folder, so the next request sees it.
        (tmp_path / "kept").write_text(line)
        assert proxy.ask("GET", "/v1/models", *WITH_KEY[0]).status == 200 and upstream.taken()
        keys.unlink()
        made = run_key_command(proxy, "add", "tablet")
        assert proxy.ask("GET", "/v1/models", f"X-Api-Key: {made}").status == 200
        upstream.taken()
        # No key is left.
        run_key_command(proxy, "remove", "tablet")
        assert_unauthorized(proxy, upstream, [[], [f"X-Api-Key: {made}"], *WITH_KEY])


@pytest.mark.parametrize(
    "broken",
    [
        "empty",
        "half-written",
        "a folder",
        "gone, and named",
        "a link to nothing",
        "a link to nothing, and named",
        "in a folder that is a link to nothing",
    ],
)
def test_no_request_is_admitted_after_a_restart_with_a_broken_key_file(
    tmp_path: Path, upstream: RecordingUpstream, broken: str
) -> None:
    keys, settings = tmp_path / "client-keys", {}
    if broken == "a folder":
        keys.mkdir()
    elif broken == "gone, and named":
        settings["client_keys_file"] = tmp_path / "none"
    elif broken == "in a folder that is a link to nothing":
        settings["token_path"] = tmp_path / "not-mounted" / "tokens.json"
        (tmp_path / "not-mounted").symlink_to("nowhere")
    elif "a link to nothing" in broken:
        keys.symlink_to("nowhere")
        if "named" in broken:
            settings["client_keys_file"] = keys
    else:
        keys.write_text(
            f"laptop {client_keys.digest(KEY)}"[: 40 if broken == "half-written" else 0]
        )
    with ProxyProcess(tmp_path, upstream=upstream.origin, **settings) as proxy:
        proxy.sign_in()
        assert_unauthorized(proxy, upstream, [[], *WITH_KEY])


def test_a_dangling_link_that_appears_later_closes_an_open_proxy(
    tmp_path: Path, upstream: RecordingUpstream
) -> None:
    with ProxyProcess(tmp_path, upstream=upstream.origin) as proxy:
        proxy.sign_in()
        assert proxy.ask("GET", "/v1/models").status == 200 and upstream.taken()
        (tmp_path / "client-keys").symlink_to("/nowhere/client-keys")
        assert_unauthorized(proxy, upstream, [[], *WITH_KEY])


def test_no_request_is_admitted_while_a_changed_key_file_is_unreadable(
    tmp_path: Path, upstream: RecordingUpstream
) -> None:
    keys = tmp_path / "client-keys"
    keys.write_text(f"laptop {client_keys.digest(KEY)}\n")
    with ProxyProcess(tmp_path, upstream=upstream.origin) as proxy, proxy.client() as client:
        proxy.sign_in()
        assert client.ask("GET", "/v1/models", *WITH_KEY[0]).status == 200
        limits = resource.prlimit(proxy.process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(proxy.process.pid, resource.RLIMIT_NOFILE, (3, limits[1]))
        keys.touch()
        assert client.ask("GET", "/v1/models", *WITH_KEY[0]).status == 401
        resource.prlimit(proxy.process.pid, resource.RLIMIT_NOFILE, limits)
        assert client.ask("GET", "/v1/models", *WITH_KEY[0]).status == 200
        upstream.taken()
