"""The check of --doctor that asks the API: whether it accepts the token, and lists models."""

import re
from collections.abc import Callable, Iterator

from xaiproxy import errors, provider, token_store, tokens
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
    settings = store.settings
    of_xai = provider.is_xai(settings.client_id, settings.issuer)
    api = XaiApi(settings.upstream) if of_xai else Api(settings.upstream)
    try:
        if login is None:
            yield api.without_token(session.get(api.first, DEADLINE))
            return
        answer = session.get(api.first, DEADLINE, _bearer(login))
        if api.is_refusal(answer):
            # As in the proxy: the API may refuse a new token at first, or the file may have
            # another one by now.
            pause(1)
            login = _reloaded(store, login)
            answer = session.get(api.first, DEADLINE, _bearer(login))
        yield api.of_first(answer)
        if of_xai and not api.is_refusal(answer):
            yield api.of_models(session.get(api.models, DEADLINE, _bearer(login)))
    except errors.IssuerUnavailable as error:
        yield failure(error.exit_code, str(error))


def _bearer(login: tokens.Login) -> dict[str, str]:
    return {"Authorization": f"Bearer {login.access_token}"}


def _reloaded(store: token_store.TokenStore, login: tokens.Login) -> tokens.Login:
    try:
        return store.load()
    except errors.LoginUnusable:
        return login


class Api:
    """An OpenAI-compatible API of which no more is known. `first`: the URL that is asked first."""

    status_page = ""
    account_page = provider.ITS_PAGES

    def __init__(self, url: str):
        self.url = url
        self.models = self.first = f"{url}/v1/models"

    def is_refusal(self, answer: Answer) -> bool:
        return answer.status == 401

    def without_token(self, answer: Answer) -> Finding:
        if answer.status < 500 and not answer.is_html:
            return ok(f"{self.url} answers; no token was sent, since none is valid")
        return self.explain(self.first, answer)

    def of_first(self, answer: Answer) -> Finding:
        if answer.status == 200:
            return self.of_models(answer)
        if answer.status in (403, 404, 405) and not answer.is_html:
            return warning(
                f"{self.first} answered HTTP {answer.status}: not every API lists models, so only "
                "a request of a client shows whether this one accepts the token"
            )
        return self.explain(self.first, answer)

    def of_models(self, answer: Answer) -> Finding:
        models = (answer.json() or {}).get("data") if answer.status == 200 else None
        if not isinstance(models, list):
            return self.explain(self.models, answer)
        if not models:
            return warning(
                f"{self.models} lists no models, as for some accounts that can use them even so; "
                "set the model's name in the client"
            )
        return ok(f"{self.models} lists {count(len(models), 'model')}")

    def explain(self, url: str, answer: Answer) -> Finding:
        """The failure of the login, the account or the network that an error response shows."""
        code = (answer.json() or {}).get("code")
        known = isinstance(code, str) and re.fullmatch(r"[a-z0-9:_-]{1,60}", code)
        response = f"{url} answered HTTP {answer.status}{f', {code}' if known else ''}"
        if answer.status == 429:
            when = "later" if answer.retry_after is None else f"in {duration(answer.retry_after)}"
            return failure(
                errors.EXIT_TRY_AGAIN,
                f"{response}: too many requests, or the account's quota is used up; try again "
                f"{when}",
            )
        if answer.status >= 500:
            return failure(
                errors.EXIT_UNAVAILABLE,
                f"{response}: a failure of the API; try again later{self.status_page}",
            )
        if answer.is_html or b"error code:" in answer.body[:200]:
            return failure(
                errors.EXIT_UNAVAILABLE,
                f"{response} with an HTML page: Cloudflare, or a proxy of your network, blocks "
                "this machine; try another network, or set HTTPS_PROXY",
            )
        if self.is_refusal(answer):
            return failure(
                errors.EXIT_SIGN_IN,
                f"{response}: it refuses the access token, which has not expired; unless a request "
                f"through the proxy gets it renewed, {errors.SIGN_IN}",
            )
        if answer.status in (402, 403):
            return failure(
                errors.EXIT_SIGN_IN,
                f"{response}: the login is valid, but the account's plan or credit does not allow "
                f"this; see {self.account_page}, since signing in again does not help",
            )
        return failure(
            errors.EXIT_UNAVAILABLE,
            f"{response}, which is not a response of the API; check XAI_PROXY_UPSTREAM",
        )


class XaiApi(Api):
    status_page = " (https://status.x.ai)"
    account_page = "https://grok.com"

    def __init__(self, url: str):
        super().__init__(url)
        self.first = f"{url}/v1/me"

    def is_refusal(self, answer: Answer) -> bool:
        return super().is_refusal(answer) or (
            answer.status == 403 and tokens.is_refusal(answer.body)
        )

    def without_token(self, answer: Answer) -> Finding:
        if answer.status not in (200, 401, 403) or answer.json() is None:
            return self.explain(self.first, answer)
        return super().without_token(answer)

    def of_first(self, answer: Answer) -> Finding:
        account = answer.json() if answer.status == 200 else None
        if account is None:
            return self.explain(self.first, answer)
        if account.get("team_blocked") is True:
            return failure(
                errors.EXIT_SIGN_IN,
                f"{self.first} accepts the token, but the account is blocked; see "
                "https://console.x.ai, since signing in again does not help",
            )
        return ok(f"{self.first} accepts the token")
