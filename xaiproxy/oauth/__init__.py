"""The OAuth client, for public clients without a secret, in plain Python over requests.

web = session.Session(settings)
metadata = discovery.discover(web, settings.issuer)
then one of
    device_authorization.request(...) and .poll(...)       RFC 8628
    authorization_code, with the redirect received by a
        loopback.Listener                                  RFC 6749 section 4.1, RFC 7636, RFC 8252
    token_endpoint.refresh(...)                            RFC 6749 section 6
    revocation.revoke(...)                                 RFC 7009
"""
