"""The benchmark: xaiproxy beside other proxies, between one load client and one upstream.

docs/performance.md describes what is measured and how.
"""
