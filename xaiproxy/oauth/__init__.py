"""The OAuth client, for public clients without a secret, in plain Python over requests.

    web = session.Session(settings)
    metadata = discovery.discover(web, settings.issuer)
    then one of
        device_authorization.request(...) and .poll(...)     RFC 8628
        loopback.Listener, authorization_code.authorization_url(...) and .exchange(...)     RFC 6749 4.1, 7636, 8252
        token_endpoint.refresh(...)     RFC 6749 6
        revocation.revoke(...)     RFC 7009
"""
