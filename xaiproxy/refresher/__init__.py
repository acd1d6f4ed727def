"""Process 2: keeps the login alive, in plain Python. The only one that spends the refresh token."""
