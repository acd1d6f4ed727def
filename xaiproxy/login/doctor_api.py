"""The check of --doctor that asks the API: whether it accepts the token, and lists models."""

import re
from collections.abc import Callable, Iterator

from xaiproxy import errors, token_store, tokens
from xaiproxy.login.doctor_network import DEADLINE
from xaiproxy.login.finding import Finding, failure, ok, warning
from xaiproxy.login.wording import count, duration
from xaiproxy.oauth.session import Answer, Session


def upstream(
    session: Session,
    store: token_store.TokenStore,
    login: tokens.Login | None,
    pause: Callable[[float], object],
) -> Iterator[Finding]:
    """`login`: a login whose access token has not expired, or None."""
    url = store.settings.upstream
    me, models = f"{url}/v1/me", f"{url}/v1/models"
    try:
        if login is None:
            yield _without_token(url, session.get(me, DEADLINE))
            return
        answer = session.get(me, DEADLINE, _bearer(login))
        if _is_refused(answer):
            # As in the proxy: the API may refuse a new token at first, or the file may have
            # another one by now.
            pause(1)
            login = _reloaded(store, login)
            answer = session.get(me, DEADLINE, _bearer(login))
        yield _of_account(me, answer)
        if not _is_refused(answer):
            yield _of_models(models, session.get(models, DEADLINE, _bearer(login)))
    except errors.IssuerUnavailable as error:
        yield failure(error.exit_code, str(error))


def _bearer(login: tokens.Login) -> dict[str, str]:
    return {"Authorization": f"Bearer {login.access_token}"}


def _reloaded(store: token_store.TokenStore, login: tokens.Login) -> tokens.Login:
    try:
        return store.load()
    except errors.LoginUnusable:
        return login


def _is_refused(answer: Answer) -> bool:
    return answer.status == 401 or (answer.status == 403 and tokens.is_refusal(answer.body))


def _without_token(url: str, answer: Answer) -> Finding:
    if answer.status in (200, 401, 403) and answer.json() is not None:
        return ok(f"{url} answers; no token was sent, since none is valid")
    return _explain(f"{url}/v1/me", answer)


def _of_account(url: str, answer: Answer) -> Finding:
    account = answer.json() if answer.status == 200 else None
    if account is None:
        return _explain(url, answer)
    if account.get("team_blocked") is True:
        return failure(
            errors.EXIT_SIGN_IN,
            f"{url} accepts the token, but the account is blocked; see https://console.x.ai, "
            "since signing in again does not help",
        )
    return ok(f"{url} accepts the token")


def _of_models(url: str, answer: Answer) -> Finding:
    models = (answer.json() or {}).get("data") if answer.status == 200 else None
    if not isinstance(models, list):
        return _explain(url, answer)
    if not models:
        return warning(
            f"{url} lists no models, as for some accounts that can use them even so; set the "
            "model's name in the client"
        )
    return ok(f"{url} lists {count(len(models), 'model')}")


def _explain(url: str, answer: Answer) -> Finding:
    """The failure of the login, the account or the network that an error response shows."""
    code = (answer.json() or {}).get("code")
    code = f", {code}" if isinstance(code, str) and re.fullmatch(r"[a-z0-9:_-]{1,60}", code) else ""
    response = f"{url} answered HTTP {answer.status}{code}"
    if answer.status == 429:
        when = "later" if answer.retry_after is None else f"in {duration(answer.retry_after)}"
        return failure(
            errors.EXIT_TRY_AGAIN,
            f"{response}: too many requests, or the account's quota is used up; try again {when}",
        )
    if answer.status >= 500:
        return failure(
            errors.EXIT_UNAVAILABLE,
            f"{response}: a failure of the API; try again later (https://status.x.ai)",
        )
    if answer.is_html or b"error code:" in answer.body[:200]:
        return failure(
            errors.EXIT_UNAVAILABLE,
            f"{response} with an HTML page: Cloudflare, or a proxy of your network, blocks this "
            "machine; try another network, or set HTTPS_PROXY",
        )
    if _is_refused(answer):
        return failure(
            errors.EXIT_SIGN_IN,
            f"{response}: it refuses the access token, which has not expired; unless a request "
            f"through the proxy gets it renewed, {errors.SIGN_IN}",
        )
    if answer.status in (402, 403):
        return failure(
            errors.EXIT_SIGN_IN,
            f"{response}: the login is valid, but the account's plan or credit does not allow "
            "this; see https://grok.com, since signing in again does not help",
        )
    return failure(
        errors.EXIT_UNAVAILABLE,
        f"{response}, which is not a response of the API; check XAI_PROXY_UPSTREAM",
    )
