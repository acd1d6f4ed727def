"""The log: a line an event, that never blocks, never contains a secret, and cannot be forged."""

import datetime
import itertools
import json
import logging
import os
import pty
import re
import select
import subprocess
import sys

import pytest

from xaiproxy import log

logger = logging.getLogger("xaiproxy.some.module")
ACCESS = "eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJ4In0.c2lnbmF0dXJl"
# 86 characters of base64url.
REFRESH = "r-" * 43
KEY = "xaip_AbCdEfGh123"
FILLING = "x " * 50


class Pipe:
    """The log on a real pipe; read() returns the lines written since."""

    def __init__(self, format: str, level: str = "debug", flags: int = 0, **how):
        self.read_end, self.write_end = os.pipe2(flags)
        os.set_blocking(self.read_end, False)
        log.setup("test", level, format, self.write_end, **how)

    def read(self) -> list[str]:
        content = b""
        try:
            while chunk := os.read(self.read_end, 1 << 20):
                content += chunk
        except BlockingIOError:
            pass
        assert content == b"" or content.endswith(b"\n")
        lines = content.decode("utf-8", "strict").split("\n")[:-1]
        assert all(len(line.encode()) + 1 < select.PIPE_BUF for line in lines)
        return lines

    def close(self):
        for fd in {self.read_end, self.write_end}:
            os.close(fd)


@pytest.fixture(autouse=True)
def restored():
    root = logging.getLogger("xaiproxy")
    before = root.handlers[:], root.level, root.propagate, log._handler
    yield
    root.handlers[:], root.level, root.propagate, log._handler = before


@pytest.fixture(params=["text", "json"])
def pipe(request):
    pipe = Pipe(request.param)
    yield pipe
    pipe.close()


@pytest.fixture
def json_pipe():
    pipe = Pipe("json")
    yield pipe
    pipe.close()


@pytest.fixture
def text_pipe():
    pipe = Pipe("text")
    yield pipe
    pipe.close()


# a line


def test_a_json_line_has_the_fields_of_the_record(json_pipe):
    logger.info(
        "it is %s",
        "done",
        extra={"fields": {"status": 200, "path": "/v1", "ok": True, "none": None, "s": 0.5}},
    )
    [line] = json_pipe.read()
    entry = json.loads(line)
    time = datetime.datetime.fromisoformat(entry.pop("time").replace("Z", "+00:00"))
    assert abs(datetime.datetime.now(datetime.timezone.utc) - time) < datetime.timedelta(seconds=10)
    assert entry == {
        "level": "info",
        "process": "test",
        "message": "it is done",
        "status": 200,
        "path": "/v1",
        "ok": True,
        "none": None,
        "s": 0.5,
    }


def test_a_value_with_a_space_forges_no_field_in_a_text_line(text_pipe):
    logger.info("x", extra={"fields": {"status": 401, "user_agent": 'a status=200 key="b"'}})
    logger.info("x", extra={"fields": {"a": "plain/1.0", "b": "", "c": None}})
    first, second = text_pipe.read()
    assert first.endswith('x status=401 user_agent="a status=200 key=\\"b\\""')
    assert second.endswith('x a=plain/1.0 b="" c=None')


def test_a_text_line_has_time_level_and_message(text_pipe):
    logger.warning("it is %s", "done", extra={"fields": {"status": 200, "path": "/v1"}})
    [line] = text_pipe.read()
    assert re.fullmatch(
        r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d\d\dZ WARNING test: it is done status=200 path=/v1",
        line,
    )


def test_a_traceback_is_one_line(pipe):
    try:
        raise ValueError("at\nfault")
    except ValueError:
        logger.exception("it broke")
    [line] = pipe.read()
    assert "it broke" in line and "ValueError: at\\nfault" in line and "test_log.py" in line


def test_the_level_and_only_our_own_loggers_count():
    pipe = Pipe("text", "warning")
    logger.info("not this")
    logger.warning("this")
    logging.getLogger("urllib3").warning("nor this")
    assert [line.split("test: ")[1] for line in pipe.read()] == ["this"]
    pipe.close()


def test_setting_up_twice_does_not_double_the_lines():
    first, second = Pipe("text"), Pipe("text")
    logger.info("once")
    assert first.read() == [] and len(second.read()) == 1
    first.close(), second.close()


def test_auto_is_text_on_a_terminal_and_json_otherwise():
    terminal, its_end = pty.openpty()
    log.setup("test", "info", "auto", its_end)
    logger.info("hello")
    assert b" INFO test: hello" in os.read(terminal, 1000)
    os.close(terminal), os.close(its_end)
    pipe = Pipe("auto")
    logger.info("hello")
    assert json.loads(pipe.read()[0])["message"] == "hello"
    pipe.close()


# any message

NASTY = [
    "",
    "x" * 100000,
    "é" * 100000,
    "\U0001f600" * 5000,
    '"' * 3000,
    "\\" * 3000,
    "\x00" * 3000,
    "\x9b" * 3000,
    'a\nb\r\n{"level": "error"}',
    "\x1b[31mred\x1b[0m",
    "\x9b2J",
    "\x7f\x85\u2028\u2029",
    "\ud800 lone",
    "%s %d %",
    "\n" + "a" * 90,
    "\x01" + "b" * 90,
    "\\u" + "c" * 90,
    '"' + "d" * 90,
    "eyJ" * 3000,
]


@pytest.mark.parametrize("text", NASTY, ids=range(len(NASTY)))
def test_any_text_is_one_short_line_without_controls(text, pipe):
    # Without pytest's handler, which cannot pass a lone surrogate to another process.
    logging.getLogger("xaiproxy").handlers[:] = [log._handler]
    logger.info("%s", text)
    logger.info(
        "request",
        extra={
            "fields": {
                "path": text,
                "object": [text],
                "a": text,
                "b": text,
                "c": text,
                "d": text,
                **{f"more{number}": text for number in range(40)},
            }
        },
    )
    try:
        raise ValueError(text)
    except ValueError:
        logger.exception("it broke %s", text)
    lines = pipe.read()
    assert len(lines) == 3
    for line in lines:
        assert not re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", line)
        if line.startswith("{"):
            assert json.loads(line)["process"] == "test"


def test_a_line_that_fits_is_not_cut(json_pipe):
    logger.info("m " * 500, extra={"fields": {"path": "p q" * 170}})
    logger.info("m " * 501, extra={"fields": {"path": "p q" * 171}})
    entries = [json.loads(line) for line in json_pipe.read()]
    assert [(len(entry["message"]), len(entry["path"])) for entry in entries] == [
        (1000, 510),
        (1000, 512),
    ]


# secrets


@pytest.mark.parametrize("secret", [ACCESS, REFRESH, KEY, "Bearer abc+def/ghi="])
@pytest.mark.parametrize("before", ["", "token=", "\n", "\x01", '"', "x" * 960 + " ", "\\"])
def test_a_secret_is_redacted_wherever_it_comes(secret, before, pipe):
    logger.info("%s", before + secret)
    logger.info(
        "request",
        extra={
            "fields": {"path": before[-400:] + secret + "\n", "object": [before[-400:] + secret]}
        },
    )
    try:
        raise ValueError(before + secret)
    except ValueError:
        logger.exception("it broke")
    lines = pipe.read()
    assert len(lines) == 3
    for line in lines:
        assert "[secret]" in line
        for piece in (secret.removeprefix("Bearer ")[:20], secret[-8:]):
            assert piece not in line
        if line.startswith("{"):
            json.loads(line)


def test_text_that_is_no_secret_is_not_redacted(text_pipe):
    logger.info("a path /home/%s and a fingerprint %s", "long" * 15, "f" * 64)
    assert "[secret]" not in text_pipe.read()[0]


# never blocking


def test_lines_wait_for_a_full_pipe_and_too_many_are_dropped_and_counted(pipe):
    # If logging blocked, pytest's alarm would fail the test.
    for number in range(5000):
        logger.info("line %d %s", number, FILLING)
    lines = pipe.read()
    assert 100 < len(lines) < 1000
    while more := (log.flush(), pipe.read())[1]:
        lines += more
    counted = lines.pop()
    kept = len(lines)
    assert [int(re.search(r"line (\d+)", line)[1]) for line in lines] == list(
        range(kept)
    ) and kept > 1000
    assert (
        f"{5000 - kept} log lines were dropped: the log was not read in time" in counted
        and "warning" in counted.lower()
    )
    logger.info("and no more of that")
    assert len(pipe.read()) == 1


def test_lines_dropped_while_the_count_is_logged_are_counted_too():
    pipe = Pipe("text")
    lines = []
    for _ in range(3):
        for _ in range(5000):
            logger.info(FILLING)
        lines += pipe.read()
    while more := (log.flush(), pipe.read())[1]:
        lines += more
    dropped = [
        int(match[1]) for line in lines if (match := re.search(r"(\d+) log lines were", line))
    ]
    assert len(dropped) == 3 and sum(dropped) + sum(FILLING in line for line in lines) == 15000
    pipe.close()


def test_a_closed_reader_is_no_error():
    pipe = Pipe("text")
    os.close(pipe.read_end)
    logger.info("to a closed pipe")
    logger.info("to a closed pipe")
    pipe.read_end = pipe.write_end
    pipe.close()


def test_a_process_with_an_unread_stderr_continues():
    code = (
        "import logging; from xaiproxy import log; log.setup('p', 'info', 'json')\n"
        "for number in range(20000): logging.getLogger('xaiproxy').info('%s', 'x ' * 100)\n"
        "print('done', flush=True)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline() == b"done\n"
    assert process.wait(10) == 0
    process.stdout.close(), process.stderr.close()


def test_a_stopped_terminal_does_not_block():
    terminal, its_end = pty.openpty()
    log.setup("test", "info", "text", its_end)
    for _ in range(5000):
        logger.info(FILLING)
    assert logging.getLogger("xaiproxy").handlers[0].writer.dropped > 0
    os.close(terminal), os.close(its_end)


# lines of one turn of the event loop


class Deferred(Pipe):
    """The log on a pipe that keeps one write apart from the next, written by turn()."""

    def __init__(self, format: str):
        self.due = []
        super().__init__(format, flags=os.O_DIRECT, defer=self.due.append)

    def turn(self):
        # There is one write a turn, for any number of lines.
        [write] = self.due
        self.due.clear()
        write()

    def writes(self) -> list[bytes]:
        found = []
        try:
            while data := os.read(self.read_end, 1 << 20):
                found.append(data)
        except BlockingIOError:
            pass
        return found


@pytest.fixture(params=["text", "json"])
def deferred(request):
    pipe = Deferred(request.param)
    yield pipe
    pipe.close()


def numbers(data: bytes) -> list[int]:
    return [int(number) for number in re.findall(rb"line (\d+)", data)]


@pytest.mark.parametrize("length", [1, 50, 900])
def test_lines_of_one_turn_are_written_together_and_in_order(deferred, length):
    for number in range(60):
        if number % 2:
            logger.info("line %d %s", number, "x " * (number % 7 * length // 14))
        else:
            log.event(
                logger, logging.INFO, f"line {number}", {"path": "x " * (number % 5 * length // 10)}
            )
    assert deferred.writes() == []
    deferred.turn()
    writes = deferred.writes()
    assert numbers(b"".join(writes)) == list(range(60))
    assert all(write.endswith(b"\n") and len(write) < select.PIPE_BUF for write in writes)
    # There are as few writes as possible.
    for write, following in itertools.pairwise(writes):
        assert len(write) + following.index(b"\n") + 1 >= select.PIPE_BUF
    logger.info("line 60")
    deferred.turn()
    assert numbers(b"".join(deferred.writes())) == [60]


def test_lines_of_a_turn_that_does_not_end_are_written(deferred):
    """So the reader keeps up, even if the event loop is blocked."""
    for number in range(10 * log.BATCH):
        logger.info("line %d", number)
        if number % log.BATCH == log.BATCH - 1:
            assert numbers(b"".join(deferred.writes()))[-1] == number
    logger.info("the last")
    assert deferred.writes() == []
    for write in deferred.due:
        write()
    assert b"the last" in b"".join(deferred.writes())


def test_lines_of_a_turn_are_split_at_the_length_of_an_atomic_write(deferred):
    """At the limit and one byte beyond."""
    logger.info("line 0")
    deferred.turn()
    [plain] = deferred.writes()
    for beyond in (0, 1):
        sizes = [900, 900, 900, 900, select.PIPE_BUF - 1 - 3600 + beyond]
        for number, size in enumerate(sizes):
            logger.info("line %d %s", number, "." * (size - len(plain) - 1))
        deferred.turn()
        writes = deferred.writes()
        assert [len(write) for write in writes] == ([3600, 496] if beyond else [4095])
        assert numbers(b"".join(writes)) == [0, 1, 2, 3, 4]


def test_unread_lines_of_many_turns_are_counted(deferred):
    data = b""
    for _ in range(3):
        for turn in range(100):
            for number in range(30):
                logger.info("line %d %s", turn * 30 + number, FILLING)
            deferred.turn()
        data += b"".join(deferred.writes())
    while more := (log.flush(), b"".join(deferred.writes()))[1]:
        data += more
    dropped = [int(number) for number in re.findall(rb"(\d+) log lines were dropped", data)]
    assert sum(dropped) > 1000 and sum(dropped) + len(numbers(data)) == 3 * 3000


def test_lines_that_wait_are_written_once_there_is_room():
    """`when_writable` is called for that, and not called while all is written."""
    asked = []
    pipe = Pipe("json", when_writable=lambda fd, callback: asked.append((fd, callback)))
    logger.info("line 0")
    assert asked == []
    for number in range(1, 1000):
        logger.info("line %d %s", number, FILLING)
    lines = []
    while asked:
        lines += pipe.read()
        fd, callback = asked.pop()
        asked.clear()
        assert fd == pipe.write_end
        callback()
    assert numbers("".join(lines + pipe.read()).encode()) == list(range(1000))
    pipe.close()


def test_lines_of_the_last_turn_are_written_at_the_end():
    code = (
        "import logging; from xaiproxy import log\n"
        "log.setup('p', 'info', 'json', defer=lambda write: None)\n"
        "for number in range(100): logging.getLogger('xaiproxy').info('line %d', number)"
    )
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, timeout=20)
    assert numbers(done.stderr) == list(range(100)) and done.returncode == 0


def test_at_the_end_of_a_process_a_slow_reader_gets_the_waiting_lines():
    code = (
        "import logging; from xaiproxy import log\n"
        "log.setup('p', 'info', 'json')\n"
        "for number in range(1000):\n"
        "    logging.getLogger('xaiproxy').info('line %d %s', number, 'x ' * 70)\n"
        "print('done', flush=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        # Most lines wait at this point.
        assert process.stdout.readline() == b"done\n"
        assert numbers(process.stderr.read()) == list(range(1000)) and process.wait(10) == 0


def test_an_event_has_the_same_line_as_a_record(deferred):
    for fields in (
        {"status": 200, "path": "/v1/x", "key": None, "seconds": 0.5, "ok": True},
        {},
        {"path": f"/v1/{ACCESS}?{KEY}", "method": "x" * 3000, "object": [REFRESH]},
        {"path": "a\n\x1b\ud800"},
    ):
        log.event(logger, logging.WARNING, "line 1", fields)
        logger.warning("line 1", extra={"fields": fields})
        log.event(logger, logging.NOTSET, "not this", fields)
        deferred.turn()
        of_event, of_record = b"".join(deferred.writes()).splitlines()
        stamp = re.compile(rb"20\d\d-\d\d-\d\dT[0-9:.]+Z")
        assert stamp.sub(b"", of_event) == stamp.sub(b"", of_record)


def test_a_long_field_is_cut_in_a_short_line_too(pipe):
    logging.getLogger("xaiproxy.x").info("request", extra={"fields": {"path": "/v1/" + "y " * 300}})
    (line,) = pipe.read()
    assert line.count("y") == (512 - len("/v1/")) // 2


LINES = """
import select, sys
select.PIPE_BUF = 512
from xaiproxy import log
line = log.line_format("proxy", sys.argv[1], 1)
fields = {
    "method": "POST",
    "path": "/v1/chat/completions",
    "status": 502,
    "request_bytes": 123456,
    "bytes": 198,
    "first_byte_ms": None,
    "duration_ms": 10000.5,
    "ended_by": "proxy",
    "key": None,
    "client": "127.0.0.1",
    "user_agent": "Mozilla/5.0 (X11; Linux x86_64) " * 4,
    "request_id": "01234567-89ab-cdef-0123-456789abcdef",
    "upstream_request_id": None,
    "error": "upstream_unreachable",
    "reason": "no connection to api.x.ai: Connection refused, and no other address is left",
}
message = "POST /v1/chat/completions 502 upstream_unreachable"
lines = [
    line(0, "WARNING", message, fields),
    line(0, "WARNING", "\\x1b" * 1000, {"reason": "\\x1b\\U0001f600" * 500, "n": 1}),
    line(0, "WARNING", "\\U0001f600" * 1000, {f"field_{n}": "x" * 1000 for n in range(40)}),
]
assert all(len(line) < 512 and line.endswith(b"\\n") for line in lines)
sys.stdout.buffer.write(b"".join(lines))
"""


@pytest.mark.parametrize("format", ["json", "text"])
def test_lines_fit_in_the_pipe_buffer_of_macos(format):
    """Half a kilobyte: the line of a failed request keeps its fields, and shortens long texts."""
    first, *others = subprocess.run(
        [sys.executable, "-c", LINES, format], capture_output=True, check=True, timeout=20
    ).stdout.splitlines()
    assert len(others) == 2
    if format == "json":
        entry = json.loads(first)
        assert (entry["status"], entry["bytes"], entry["error"]) == (
            502,
            198,
            "upstream_unreachable",
        )
        assert entry["reason"].startswith("no connection to api.x.ai")
        assert [json.loads(line)["level"] for line in others] == ["warning"] * 2
