"""Sentences and parts of sentences about a login, its times and its renewal."""

import datetime

from xaiproxy import errors, log, tokens


def account_name(login: tokens.Login) -> str:
    return login.account or "an unnamed account"


def validity(login: tokens.Login, now: float) -> str:
    """Until when the access token is valid, in a sentence."""
    left, end = login.expires_at - now, local_time(login.expires_at)
    if left > 0:
        return f"The access token is valid until {end}, for another {duration(left)}."
    return f"The access token expired at {end}, {duration(-left)} ago."


def last_failure(login: tokens.Login) -> list[str]:
    """Sentences about the last refresh, if it failed."""
    failure = login.refresh_error
    if failure is None:
        return []
    why = printable(failure.description or failure.code)
    sentences = [f"The last refresh failed at {local_time(failure.at)}: {why}."]
    if failure.terminal:
        sentences.append(f"It will not be tried again; {errors.SIGN_IN}.")
    elif failure.retry_at:
        sentences.append(f"The next try is due at {local_time(failure.retry_at)}.")
    return sentences


def outlook(login: tokens.Login, refresher_alive: bool, now: float) -> str:
    """Whether the login is renewed, in a sentence."""
    if refresher_alive and login.refresh_token is not None:
        return "The refresher is running and renews it."
    verb = "lapses" if login.expires_at > now else "lapsed"
    end = f"the login {verb} at {local_time(login.expires_at)}"
    if login.refresh_token is None:
        return f"It has no refresh token and cannot be renewed: {end}."
    return f"No refresher is running: {end}, unless {errors.SERVE} is started."


def local_time(unix_time: float) -> str:
    """Such as "2026-11-23 14:05 CET"."""
    return datetime.datetime.fromtimestamp(unix_time).astimezone().strftime("%Y-%m-%d %H:%M %Z")


def duration(seconds: float) -> str:
    """Such as "5 h 59 min"."""
    minutes = int(seconds) // 60
    if minutes < 1:
        return f"{int(seconds)} s"
    if minutes < 60:
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h {minutes % 60} min" if hours < 48 else f"{hours // 24} days"


def count(number: int, noun: str) -> str:
    """Such as "1 model" and "2 models"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def printable(text: str) -> str:
    """Text from a file, without the characters that control a terminal."""
    return log.CONTROLS.sub(" ", text)
