"""The command-line arguments of Chromium in tests."""

ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-proxy-server",
    # One process for pages of all sites. What a page may read is decided without isolation, too.
    "--disable-site-isolation-trials",
]
