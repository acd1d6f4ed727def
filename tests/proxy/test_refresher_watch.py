"""The proxy's warning about a missing refresher, and the end of it."""

from __future__ import annotations

from pathlib import Path

from proxy_process import ProxyProcess


def test_a_missing_refresher_and_its_return_are_logged_once_each(tmp_path: Path) -> None:
    with ProxyProcess(tmp_path) as proxy:
        proxy.sign_in()
        proxy.wait_for_log(lambda line: "no refresher; the login lapses at" in line["message"])
        proxy.refresher_lives()
        proxy.wait_for_log(lambda line: line["message"] == "the refresher is back")
        messages = [line["message"] for line in proxy.log_lines()]
    for text in ("no refresher", "is back"):
        assert sum(text in message for message in messages) == 1
