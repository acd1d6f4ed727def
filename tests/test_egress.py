"""The proxy and the CA certificates: their sources, and that no password is repeated."""

import shutil
import subprocess
import sys

import certifi
import pytest

from xaiproxy import errors
from xaiproxy.egress import Egress


def egress(environ, **options):
    def refuse(error):
        raise error

    return Egress.from_environ(environ, refuse, **options)


def refusal(environ, **options) -> str:
    with pytest.raises(errors.ConfigurationError) as caught:
        egress(environ, **options)
    return str(caught.value)


def test_the_proxy_is_https_proxy_else_all_proxy_in_lower_case_first():
    def proxy(**environ):
        return egress(environ).proxy

    assert proxy(HTTP_PROXY="http://h:1") is None
    assert proxy(ALL_PROXY="http://a:1") == "http://a:1"
    assert proxy(ALL_PROXY="http://a:1", HTTPS_PROXY="http://s:1") == "http://s:1"
    assert proxy(HTTPS_PROXY="http://S:1", https_proxy="http://s:1") == "http://s:1"
    assert proxy(HTTPS_PROXY="s:3128") == "http://s:3128"
    assert proxy(HTTPS_PROXY="", all_proxy="https://a:1") == "https://a:1"
    assert (
        egress({"ALL_PROXY": "http://a:1", "https_proxy": "http://s:1"}).proxy_from == "https_proxy"
    )


def test_hosts_of_no_proxy_and_loopback_are_reached_directly():
    chosen = egress({"HTTPS_PROXY": "http://p:1", "NO_PROXY": "x.ai, .example.org,10.0.0.1"})
    for url in (
        "https://x.ai",
        "https://api.x.ai:443/v1",
        "https://a.example.org",
        "https://10.0.0.1",
        "https://127.0.0.1:1",
        "https://localhost",
        "https://[::1]:5",
        "https://LOCALHOST",
        "http://login.example",
    ):
        assert chosen.proxy_for(url) is None, url
    for url in ("https://evilx.ai", "https://login.example"):
        assert chosen.proxy_for(url) == "http://p:1"
    assert egress({"HTTPS_PROXY": "http://p:1", "NO_PROXY": "*"}).proxy_for("https://x.ai") is None


def test_plain_http_goes_through_http_proxy_else_all_proxy_if_it_is_used():
    environ = {"HTTP_PROXY": "http://h:1", "ALL_PROXY": "http://a:1", "NO_PROXY": "in.example"}
    chosen = egress(environ, plain_http=True)
    assert chosen.proxy_for("http://hook.example:81") == "http://h:1"
    assert chosen.proxy_for("https://hook.example") == "http://a:1"
    for direct in ("http://in.example", "http://127.0.0.1:1", "http://localhost", "http://[::1]"):
        assert chosen.proxy_for(direct) is None, direct
    environ["http_proxy"] = ""
    del environ["HTTP_PROXY"]
    assert egress(environ, plain_http=True).proxy_for("http://hook.example") == "http://a:1"
    assert egress({"HTTPS_PROXY": "s:1"}, plain_http=True).proxy_for("http://hook.example") is None
    wrong = {"HTTP_PROXY": "ftp://me:secret@p:1"}
    assert egress(wrong).http_proxy is None
    assert (
        refusal(wrong, plain_http=True)
        == "HTTP_PROXY must be the URL of a proxy, such as http://proxy.example:3128"
    )
    assert "secret" not in repr(egress({"HTTP_PROXY": "http://me:secret@p:1"}, plain_http=True))


@pytest.mark.parametrize(
    "proxy", ["http://", "ftp://me:secret@p:1", "http://me:secret@p:99999", "http://me:secret@[::1"]
)
def test_a_malformed_proxy_is_refused_without_its_password(proxy):
    assert (
        refusal({"HTTPS_PROXY": proxy})
        == "HTTPS_PROXY must be the URL of a proxy, such as http://proxy.example:3128"
    )


def test_a_proxys_password_is_in_no_repr():
    assert "secret" not in repr(egress({"ALL_PROXY": "http://me:secret@p:1"}))


def test_a_socks_proxy_without_version_is_refused_with_the_versions():
    with pytest.raises(
        errors.ConfigurationError,
        match=r"all_proxy names a SOCKS proxy, but .* socks5h:// .* socks4a://",
    ):
        egress({"all_proxy": "socks://user:password@proxy.example:1080/"})


def test_socks_needs_its_extra():
    code = (
        "import sys; sys.modules['socks'] = None; from xaiproxy import config; "
        "config.from_environ({'ALL_PROXY': 'socks5h://p:1'})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert (
        "ALL_PROXY names a SOCKS proxy, which requires xaiproxy[socks]: install that" in done.stderr
    )


def test_the_ca_file_is_ssl_cert_file_else_requests_ca_bundle_else_certifis(tmp_path):
    one, two = (
        shutil.copy(certifi.where(), tmp_path / "one"),
        shutil.copy(certifi.where(), tmp_path / "two"),
    )
    one, two = str(one), str(two)
    assert egress({"SSL_CERT_FILE": one, "REQUESTS_CA_BUNDLE": two}).ca_file == one
    assert egress({"REQUESTS_CA_BUNDLE": two}).ca_file == two
    assert egress({"REQUESTS_CA_BUNDLE": two}).ca_from == "REQUESTS_CA_BUNDLE"
    for wrong in ("/none", "/etc/hostname", "/etc"):
        assert (
            refusal({"SSL_CERT_FILE": wrong})
            == f"SSL_CERT_FILE must be a file of PEM certificates, not '{wrong}'"
        )
