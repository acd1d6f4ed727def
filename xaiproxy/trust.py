"""Trusted certificates: one TLS context for requests to the issuer and to upstream.

The flags are those of curl. The defaults of Python 3.13, and of urllib3 there, add
VERIFY_X509_STRICT, which rejects certificates that many corporate CAs issue: those without an
authority key identifier, and CA certificates without key usage.
"""

import ssl

from xaiproxy.egress import Egress

FLAGS = ssl.VERIFY_X509_TRUSTED_FIRST | ssl.VERIFY_X509_PARTIAL_CHAIN
# X509_V_ERR_*: codes of <openssl/x509_vfy.h>
UNKNOWN_CA = frozenset((2, 18, 19, 20, 21))
TIME = frozenset((9, 10))  # not yet valid, expired
NAME = frozenset((62, 63, 64))  # host name, e-mail, IP address


def context(egress: Egress) -> ssl.SSLContext:
    """Return a client's context with the CA certificates of `egress`.

    Raises OSError if the file is unusable.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.verify_flags = FLAGS
    # Some releases of Python, such as 3.11.2 of Debian 12, set it: a response that anybody on the
    # network cuts off would look complete (RFC 9112 section 9.8).
    context.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF
    context.load_verify_locations(egress.ca_file)
    return context


def refusal(error: ssl.SSLCertVerificationError, egress: Egress) -> str:
    """Why a certificate was rejected, in parentheses, and what to do."""
    return f"({error.verify_message.rstrip('.')}); {_advice(error.verify_code, egress)}"


def _advice(code: int, egress: Egress) -> str:
    if code in NAME:
        return (
            "another server, or a proxy of your network, answers in its place: check the network "
            "and DNS"
        )
    if code in TIME:
        return (
            "check this machine's clock; if that is right, the server's certificate must be renewed"
        )
    if code not in UNKNOWN_CA:
        return (
            "the server, or a proxy of your network that answers in its place, needs another "
            "certificate"
        )
    if egress.ca_from:
        return (
            f"the CA certificate that it needs is not in {egress.ca_file} ({egress.ca_from}): if a "
            "proxy of your network answers in its place, add that proxy's CA certificate there"
        )
    return (
        "if a proxy of your network answers in its place, set SSL_CERT_FILE to a file with that "
        "proxy's CA certificate"
    )
