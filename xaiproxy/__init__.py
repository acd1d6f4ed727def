"""An OpenAI-compatible endpoint on loopback for a SuperGrok login.

`xai-login` signs in once, `xai-refresher` keeps the login alive, `xai-proxy` adds its access token to
every request and streams every answer back; supervisord runs the last two. This package imports
nothing here, so that `__main__` can let gevent patch the standard library before anything uses it.
"""

__version__ = "0.1.0"
