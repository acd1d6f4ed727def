"""Both halves verify certificates alike, and as curl does: requests to the issuer and to upstream."""

import contextlib
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from checkout import ROOT

from xaiproxy import config, errors, trust
from xaiproxy.http1.pool import Pool
from xaiproxy.oauth.session import Session

KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
CA = ("basicConstraints=critical,CA:TRUE", "keyUsage=critical,keyCertSign")
NAMED = ("subjectAltName=IP:127.0.0.1",)
# openssl adds these by itself otherwise.
NO_IDS = (
    "authorityKeyIdentifier=none",
    "subjectKeyIdentifier=none",
)


class Authority:
    """Makes keys and certificates in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.openssl(
            "req",
            "-x509",
            *KEY,
            "-keyout",
            "ca.key",
            "-out",
            "ca.pem",
            "-days",
            "2",
            "-subj",
            "/CN=the CA",
            *(word for line in CA for word in ("-addext", line)),
        )

    def openssl(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=self.folder, check=True, capture_output=True)

    def sign(self, name: str, extensions: tuple[str, ...], by: str = "ca", days: int = 2) -> None:
        """Make `name`.key and `name`.pem, signed with `by`.key."""
        (self.folder / f"{name}.ext").write_text("".join(f"{line}\n" for line in extensions))
        self.openssl(
            "req", *KEY, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}"
        )
        self.openssl(
            "x509",
            "-req",
            "-in",
            f"{name}.csr",
            "-CA",
            f"{by}.pem",
            "-CAkey",
            f"{by}.key",
            "-CAcreateserial",
            "-out",
            f"{name}.pem",
            "-days",
            str(days),
            "-extfile",
            f"{name}.ext",
        )

    def path(self, *names: str) -> Path:
        """A file with all these certificates."""
        path = self.folder / ("+".join(names) + ".bundle")
        path.write_text("".join((self.folder / f"{name}.pem").read_text() for name in names))
        return path


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    made = Authority(tmp_path_factory.mktemp("authority"))
    made.sign("usual", NAMED)
    made.sign("no-aki", NAMED + NO_IDS)
    made.sign("other-address", ("subjectAltName=IP:127.0.0.9",))
    made.sign("expired", NAMED, days=-1)
    # Not critical, and without key usage.
    made.sign("careless-ca", ("basicConstraints=CA:TRUE", *NO_IDS))
    made.sign("below-careless", NAMED + NO_IDS, by="careless-ca")
    made.sign("no-ca", NAMED)
    made.sign("below-no-ca", NAMED, by="no-ca")
    made.sign("named", ("subjectAltName=IP:127.0.0.1,DNS:issuer.test", *NO_IDS))
    made.openssl(
        "req",
        "-x509",
        *KEY,
        "-keyout",
        "stranger.key",
        "-out",
        "stranger.pem",
        "-days",
        "2",
        "-subj",
        "/CN=stranger",
        "-addext",
        NAMED[0],
    )
    return made


@contextlib.contextmanager
def serving(authority: Authority, name: str, *chain: str):
    """A TLS server with that certificate; yields its port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority.path(name, *chain), authority.folder / f"{name}.key")
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            connection.settimeout(10)
            with (
                contextlib.suppress(OSError),
                context.wrap_socket(connection, server_side=True) as tls,
            ):
                while tls.recv(65536)[-4:] not in (b"\r\n\r\n", b""):
                    pass
                tls.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")
            connection.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def settings(port: int, ca: Path | None, **environ: str) -> config.Config:
    return config.from_environ(
        {
            "XAI_PROXY_UPSTREAM": f"https://127.0.0.1:{port}",
            **environ,
            **({"SSL_CERT_FILE": str(ca)} if ca else {}),
        },
        dotenv_path=os.devnull,
    )


def of_issuer(settings: config.Config) -> str:
    """The error of a request to the issuer; "" if it succeeds."""
    try:
        assert Session(settings).get(settings.upstream).status == 200
    except errors.IssuerUnavailable as error:
        return str(error)
    return ""


def of_upstream(settings: config.Config) -> str:
    try:
        Pool(settings).connect().close()
    except errors.UpstreamUnreachable as error:
        return str(error)
    return ""


def of_curl(settings: config.Config) -> str:
    done = subprocess.run(
        ["curl", "-sS", "--noproxy", "*", "--cacert", settings.egress.ca_file, settings.upstream],
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.returncode in (0, 60), done.stderr
    return done.stderr


# The server's certificates, those of the CA file, and the error if they are refused.
CASES = {
    "as usual": (["usual"], ["ca"], ""),
    "no authority key identifier": (["no-aki"], ["ca"], ""),
    "an intermediate CA alone is named": (["usual"], ["stranger", "ca"], ""),
    "a careless CA": (["below-careless", "careless-ca"], ["ca"], ""),
    "a careless intermediate CA alone is named": (["below-careless"], ["careless-ca"], ""),
    "the certificate itself is named": (["no-aki"], ["no-aki"], ""),
    "a self-signed one is named": (["stranger"], ["stranger"], ""),
    "another CA": (
        ["usual"],
        ["stranger"],
        "the CA certificate that it needs is not in {ca} (SSL_CERT_FILE)",
    ),
    "a self-signed one": (
        ["stranger"],
        ["ca"],
        "the CA certificate that it needs is not in {ca} (SSL_CERT_FILE)",
    ),
    "another address": (
        ["other-address"],
        ["ca"],
        "another server, or a proxy of your network, answers in its place",
    ),
    "expired": (["expired"], ["ca"], "(certificate has expired); check this machine's clock"),
    "signed by what is no CA": (["below-no-ca", "no-ca"], ["ca"], "needs another certificate"),
}


@pytest.mark.parametrize("case", CASES)
def test_both_halves_accept_the_certificates_that_curl_accepts(
    authority: Authority, case: str
) -> None:
    chain, trusted, message = CASES[case]
    ca = authority.path(*trusted)
    with serving(authority, *chain) as port:
        about = settings(port, ca)
        answers = [of_issuer(about), of_upstream(about)]
        if shutil.which("curl"):
            assert bool(of_curl(about)) is bool(message)
    for answer in answers:
        assert (message.format(ca=ca) in answer) if message else answer == ""
        assert "set SSL_CERT_FILE" not in answer


def test_without_a_ca_file_both_errors_name_the_setting(authority: Authority) -> None:
    with serving(authority, "usual") as port:
        for answer in (of_issuer(settings(port, None)), of_upstream(settings(port, None))):
            assert (
                "(unable to get local issuer certificate); "
                "if a proxy of your network answers in its place, set "
                "SSL_CERT_FILE" in answer
            )


def test_strict_verification_would_refuse_certificates_accepted_here(authority: Authority) -> None:
    """Python 3.13 has it for all contexts that do not set their own flags."""
    with serving(authority, "no-aki") as port:
        about = settings(port, authority.path("ca"))
        context = trust.context(about.egress)
        assert context.verify_flags == ssl.VERIFY_X509_TRUSTED_FIRST | ssl.VERIFY_X509_PARTIAL_CHAIN
        assert context.verify_mode is ssl.CERT_REQUIRED and context.check_hostname
        for flags, refused in ((ssl.VERIFY_X509_STRICT, True), (0, False)):
            context = trust.context(about.egress)
            context.verify_flags |= flags
            outcome = (
                contextlib.nullcontext()
                if not refused
                else pytest.raises(
                    ssl.SSLCertVerificationError, match=r"(?i)missing authority key identifier"
                )
            )
            with socket.create_connection(("127.0.0.1", port)) as sock, outcome:
                context.wrap_socket(sock, server_hostname="127.0.0.1").close()


AS_ON_3_13 = """
import os, sys
from xaiproxy import config
from xaiproxy.oauth.session import Session
sys.version_info = (3, 13, 0, "final", 0)  # by which urllib3 chooses its flags
print(Session(config.from_environ(os.environ)).get(sys.argv[1]).status)
"""


@pytest.mark.parametrize("through", ["", "http", "https"])
def test_the_same_certificates_are_accepted_with_python_3_13(
    authority: Authority, through: str, tmp_path: Path
) -> None:
    with contextlib.ExitStack() as stack:
        port, environ = stack.enter_context(serving(authority, "named")), {}
        url = f"https://127.0.0.1:{port}"
        # Loopback needs no proxy.
        if through:
            proxy = stack.enter_context(tunnelling(authority if through == "https" else None))
            environ["HTTPS_PROXY"], url = (
                f"{through}://127.0.0.1:{proxy}",
                f"https://issuer.test:{port}",
            )
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", AS_ON_3_13, url],
            cwd=tmp_path,
            text=True,
            capture_output=True,
            timeout=20,
            env={"PYTHONPATH": str(ROOT), "SSL_CERT_FILE": str(authority.path("ca")), **environ},
        )
    assert done.stdout == "200\n", done.stderr


@contextlib.contextmanager
def tunnelling(authority: Authority | None):
    """The port of a CONNECT proxy to 127.0.0.1; its TLS certificate has no key identifiers."""
    listener = socket.create_server(("127.0.0.1", 0))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if authority:
        context.load_cert_chain(authority.folder / "no-aki.pem", authority.folder / "no-aki.key")

    def copy(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)

    def serve() -> None:
        with contextlib.suppress(OSError):
            client, _ = listener.accept()
            client.settimeout(10)
            if authority:
                client = context.wrap_socket(client, server_side=True)
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                head += client.recv(1)
            port = int(head.split()[1].rpartition(b":")[2])
            with client, socket.create_connection(("127.0.0.1", port)) as server:
                client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                other = threading.Thread(target=copy, args=(server, client))
                other.start()
                copy(client, server)
                other.join()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def test_a_missing_file_of_ca_certificates_is_named(authority: Authority, tmp_path: Path) -> None:
    path = tmp_path / "ca.pem"
    with serving(authority, "usual") as port:
        path.write_bytes(authority.path("stranger").read_bytes())
        about = settings(port, path)
        assert "the CA certificate that it needs" in of_issuer(about)
        path.unlink()
        assert of_issuer(about) == (
            f"the CA certificates of {path} cannot be read (No such file or directory); correct "
            "that file, or set SSL_CERT_FILE"
        )
        # The CA file may be replaced while the refresher runs.
        path.write_bytes(authority.path("ca").read_bytes())
        assert of_issuer(about) == ""
