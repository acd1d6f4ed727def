"""xai-login: sign in, show and check the login, sign out."""
