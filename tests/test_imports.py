"""The import rules: the web side imports nothing that could spend a refresh token or wait for a
lock, and the credential side is plain Python.
"""

import ast
import subprocess
import sys

import pytest
from checkout import ROOT

PACKAGE = ROOT / "xaiproxy"
# The roots of each side; what they import belongs to it too.
WEB = [
    "__main__",
    "http1.headers",
    "http1.exchange",
    "proxy.access",
    "proxy.forward",
    "proxy.app",
    "proxy.command",
    "quota",
    "sandbox.__main__",
]
CREDENTIAL = [
    "oauth.session",
    "oauth.discovery",
    "oauth.token_endpoint",
    "oauth.device_authorization",
    "oauth.authorization_code",
    "oauth.revocation",
    "login.command",
    "login.doctor",
    "launch_command",
    "refresher.command",
    "token_writer",
]
SPENDERS = {"xaiproxy.oauth", "xaiproxy.login", "xaiproxy.refresher", "xaiproxy.token_writer"}


def imports(module: str) -> set[str]:
    """All imports in a module of ours, at any depth; `from a import b` counts as a and a.b."""
    path = PACKAGE.parent / module.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} imports relatively, which this test does not follow"
            names.update([node.module, *(f"{node.module}.{alias.name}" for alias in node.names)])
    return names


def is_ours(name: str) -> bool:
    path = PACKAGE.parent / name.replace(".", "/")
    return name.split(".")[0] == "xaiproxy" and (path.is_dir() or path.with_suffix(".py").exists())


def reachable(roots: list[str]) -> tuple[set[str], set[str]]:
    """Our modules that `roots` import, themselves included, and everything that these import."""
    pending, ours, everything = {f"xaiproxy.{root}" for root in roots}, set(), set()
    while pending:
        module = pending.pop()
        ours.add(module)
        found = imports(module)
        everything |= found
        pending |= {name for name in found if is_ours(name)} - ours
    return ours, everything


def loaded_by(*modules: str) -> set[str]:
    """sys.modules of a new interpreter that has imported them."""
    code = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    return set(
        subprocess.run(
            [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
        ).stdout.split()
    )


def test_the_sources_are_followed():
    ours, everything = reachable(["refresher.command"])
    assert {
        "xaiproxy.refresher.process",
        "xaiproxy.token_writer",
        "xaiproxy.oauth",
        "xaiproxy.oauth.session",
    } <= ours
    assert {"fcntl", "requests"} <= everything


def test_the_web_side_can_neither_spend_nor_lock():
    # gevent and the standard library import fcntl themselves: the rule is about our own sources.
    ours, everything = reachable(WEB)
    assert not everything & SPENDERS
    # It locks the folder of a Unix socket, without waiting.
    assert {module for module in ours if "fcntl" in imports(module)} == {
        "xaiproxy.proxy.socket_file"
    }


@pytest.mark.parametrize(
    "module", ["login.doctor", "login.summary", "login.billing", "login.watch"]
)
def test_the_doctor_and_status_can_neither_spend_nor_write_a_login_nor_lock(module):
    ours, everything = reachable([module])
    assert "xaiproxy.oauth.session" in ours
    assert not everything & {
        "xaiproxy.oauth.token_endpoint",
        "xaiproxy.refresher",
        "xaiproxy.login.sign_in",
        "xaiproxy.token_writer",
        "fcntl",
    }


def test_the_credential_side_imports_nothing_of_the_web_side():
    ours, _ = reachable(CREDENTIAL)
    assert not {name for name in ours if name.startswith(("xaiproxy.http1", "xaiproxy.proxy."))}


def test_the_http_engine_imports_no_logins_keys_or_flask():
    shared = {
        *("__version__", "addresses", "config", "errors", "kernel", "log", "socks_proxy", "trust"),
    }
    allowed = {"xaiproxy", "xaiproxy.http1", *(f"xaiproxy.{name}" for name in shared)}
    for path in (PACKAGE / "http1").glob("*.py"):
        module = "xaiproxy.http1" if path.stem == "__init__" else f"xaiproxy.http1.{path.stem}"
        names = {
            name
            for name in imports(module)
            if name.split(".")[0] in ("xaiproxy", "flask", "werkzeug")
        }
        assert not {
            name
            for name in names
            if not name.startswith("xaiproxy.http1.")
            and ".".join(name.split(".")[:2]) not in allowed
        }, module


def test_only_the_sandbox_imports_the_sandbox():
    for path in PACKAGE.rglob("*.py"):
        if PACKAGE / "sandbox" not in path.parents:
            module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
            assert not any(
                name.startswith("xaiproxy.sandbox")
                for name in imports(module.removesuffix(".__init__"))
            ), module


@pytest.mark.parametrize("module", WEB)
def test_nothing_of_the_credential_side_is_loaded_with_the_web_side(module):
    # __main__ lets gevent patch the standard library before it imports the rest in main().
    loaded = loaded_by(
        f"xaiproxy.{module}", *(["xaiproxy.proxy.command"] if module == "__main__" else [])
    )
    assert not loaded & SPENDERS
    assert f"xaiproxy.{module}" in loaded


def test_the_credential_side_is_plain_python():
    _, everything = reachable(CREDENTIAL)
    assert not {
        name
        for name in everything
        if name.split(".")[0] in ("flask", "gevent", "werkzeug", "greenlet")
    }
    loaded = loaded_by(*(f"xaiproxy.{module}" for module in CREDENTIAL))
    assert not {
        name for name in loaded if name.split(".")[0] in ("flask", "gevent", "werkzeug", "greenlet")
    }


def test_the_package_itself_imports_nothing():
    assert imports("xaiproxy") == set()


def test_prometheus_client_is_imported_at_the_start_and_not_for_a_help():
    assert "prometheus_client" not in loaded_by("xaiproxy.__main__", "xaiproxy.proxy.command")
    assert "prometheus_client" in loaded_by("xaiproxy.proxy.metrics")
