"""xai-login: sign in, look at the login and all it needs, sign out."""
