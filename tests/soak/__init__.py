"""The soak: xaiproxy for long, while things go wrong. bin/soak --help says what is run and counted."""
