"""The benchmark: xaiproxy beside nginx and LiteLLM, between one load client and one upstream.

docs/performance.md says what is measured and how.
"""
