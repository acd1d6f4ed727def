"""An OpenAI-compatible endpoint on loopback for a SuperGrok login.

`xai-login` signs in once, `xai-refresher` keeps the login alive, and `xai-proxy` adds its access
token to every request and streams every response back. supervisord runs the last two.

Nothing is imported here, so that `__main__` can have gevent patch the standard library before
anything uses it.
"""

__version__ = "0.1.0"
