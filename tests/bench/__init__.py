"""The benchmark: xaiproxy beside nginx (and LiteLLM), between one load client and one upstream. See docs/performance.md."""
