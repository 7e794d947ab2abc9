"""The lines of whole processes: whoever wrote them, and however the process ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import pytest

from trtllm_mm_cache.observability.log_relay import dynamo_level

LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (DEBUG|INFO|WARNING|ERROR|CRITICAL) +[\w.]+: ")
START = """
import ctypes, logging, os, signal, subprocess, sys, threading, time
from trtllm_mm_cache.observability.logs import configure_logging, say
log = logging.getLogger("trtllm_mm_cache.test")
configure_logging("INFO", "{}")
relay = int(open("/proc/self/task/%d/children" % os.getpid()).read())
"""
FORGED = r'"a\n2026-01-01 00:00:00,000 ERROR   forged: b\r\x1b[2J http://u:s@h/p?token=s"'


def run(
    script: str, log_format: str = "text", *, status: int = 0, dyn_log: str = "warn"
) -> subprocess.CompletedProcess[str]:
    """Run a script behind a configured log, and return it with what it wrote."""
    ended = subprocess.run(
        [sys.executable, "-c", START.format(log_format) + textwrap.dedent(script)],
        env={**os.environ, "DYN_LOG": dyn_log},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        start_new_session=True,
    )
    assert ended.returncode == status, ended.stderr
    assert not ended.stdout, "all goes to standard error"
    return ended


def lines(script: str, *, status: int = 0, dyn_log: str = "warn") -> list[str]:
    written = run(script, status=status, dyn_log=dyn_log).stderr.splitlines()
    assert all(LINE.match(line) or line.startswith("  | ") for line in written), written
    return written


def records(script: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in run(script, "json").stderr.splitlines()]


def messages(written: Sequence[str]) -> list[str]:
    return [LINE.sub("", line) for line in written]


def test_a_message_that_quotes_a_client_is_one_line() -> None:
    (line,) = lines(f"log.info('%s', {FORGED})")
    assert line.endswith(
        r"trtllm_mm_cache.test: a\n2026-01-01 00:00:00,000 ERROR   forged: b\r\x1b[2J http://…@h/p?…"
    )


def test_a_traceback_stays_readable_and_begins_no_line_of_the_log() -> None:
    first, *rest = lines(
        f"""
        try:
            raise ValueError({FORGED})
        except ValueError:
            log.exception("failed")
        """
    )
    assert first.endswith("failed")
    assert rest[0] == "  | Traceback (most recent call last):"
    assert rest[-3:] == [
        "  | ValueError: a",
        "  | 2026-01-01 00:00:00,000 ERROR   forged: b",
        r"  | \x1b[2J http://…@h/p?…",
    ]


def test_in_json_every_text_is_one_line() -> None:
    first, second = records(
        f"""
        log.info("%s", {FORGED}, extra={{"keys": ("a\\nb", "c"), "n": 1}})
        try:
            raise ValueError({FORGED})
        except ValueError:
            log.exception("failed")
        """
    )
    assert (first["level"], first["logger"], first["n"]) == ("INFO", "trtllm_mm_cache.test", 1)
    assert first["keys"] == [r"a\nb", "c"]
    for text in (str(first["message"]), *str(second["exc_info"]).split("\n")):
        assert text.isprintable()
        assert "token=s" not in text


NATIVE = f"""
text = ({FORGED} + "\\n").encode()
os.write(2, text)
os.write(1, text)
ctypes.CDLL(None).puts({FORGED}.encode())
ctypes.CDLL(None).fflush(None)
print({FORGED})
subprocess.run([sys.executable, "-c", "import os; os.write(2, " + repr(text) + ")"], check=True)
"""


def test_what_native_code_and_children_write_is_marked_and_escaped() -> None:
    written = lines(NATIVE)
    assert len(written) == 10, "the newline of a foreign writer ends a line; what follows is marked too"
    assert all(" output: " in line for line in written)
    assert sum(r"forged: b\r\x1b[2J http://…@h/p?…" in line for line in written) == 5


def test_what_native_code_writes_is_json_where_the_log_is() -> None:
    written = records(NATIVE)
    assert len(written) == 10
    assert {record["logger"] for record in written} == {"output"}


def test_the_level_of_a_foreign_line_is_the_one_it_names() -> None:
    written = lines(
        r"""
        os.write(2, b"2026-01-01T00:00:00.0Z ERROR dynamo_runtime: WARN a\n")
        os.write(2, b"[1.2] [host:1:0] ucp.c:1 UCX  WARN b\n[INFO] c\nterminate called\n")
        """
    )
    assert [line[24:32].strip() for line in written] == ["ERROR", "WARNING", "INFO", "WARNING"]


SPANS = r"""
for level in (b"DEBUG", b" INFO", b" WARN", b"ERROR"):
    os.write(2, b"2026-01-01T00:00:00.0Z " + level + b" http-request:router.route: request_span: x\n")
    os.write(2, b"2026-01-01T00:00:00.0Z " + level + b" dynamo_llm: of request_span: y\n")
"""


@pytest.mark.parametrize(
    ("dyn_log", "spans"), [("off", 0), ("error", 1), ("warn", 2), ("warn,a=debug", 2), ("info", 3), ("", 3)]
)
def test_dynamos_spans_of_requests_obey_its_level_as_the_rest_does(dyn_log: str, spans: int) -> None:
    written = messages(lines(SPANS, dyn_log=dyn_log))
    assert sum(line.endswith("x") for line in written) == spans
    assert sum(line.endswith("y") for line in written) == 4, "of all else Dynamo decides itself"


def test_an_answer_whose_reader_has_left_is_no_error_line() -> None:
    written = lines(
        r"""
        time = b"2026-01-01T00:00:00.0Z "
        target = b"ERROR handle_payload: dynamo_runtime::pipeline::network::ingress::push_handler: "
        os.write(2, time + target + b"Failed to publish complete final for stream 1 request_id=1\n")
        os.write(2, time + target + b"Failed to publish response for stream 1\n")
        os.write(2, b"ERROR a: Failed to publish complete final for stream 1\n")
        """
    )
    assert [line.rpartition("Failed to publish ")[2] for line in written] == [
        "response for stream 1",
        "complete final for stream 1",
    ]


def test_the_last_directive_without_a_target_is_dynamos_level() -> None:
    levels = {
        "": "INFO",
        "warn": "WARNING",
        "a=debug": "INFO",
        "info, warn ,a=off": "WARNING",
        "trace": "DEBUG",
        "off": "OFF",
    }
    assert {text: dynamo_level(text) for text in levels} == levels


ENDS = {
    "return": ("", 0),
    "exit": ("sys.exit(3)", 3),
    "exception": ("1 / 0", 1),
    "os._exit": ("os._exit(4)", 4),
    "abort": ("os.abort()", -signal.SIGABRT),
    "killed": ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
    "segmentation fault": ("ctypes.string_at(0)", -signal.SIGSEGV),
}


@pytest.mark.parametrize("how", ENDS)
def test_no_line_is_lost_however_the_process_ends(how: str) -> None:
    script, status = ENDS[how]
    written = run(
        f"""
        for number in range(3000):
            log.info("ours %d", number)
            os.write(2, b"theirs %d" % number + bytes([10]))
        os.write(2, b"last words")
        {script}
        """,
        status=status,
    ).stderr.splitlines()
    said = messages(written)
    assert [line for line in said if line.startswith("ours ")] == [f"ours {n}" for n in range(3000)]
    assert [line for line in said if line.startswith("theirs ")] == [f"theirs {n}" for n in range(3000)]
    assert any(line.startswith("last words") for line in said)
    assert any("Segmentation fault" in line for line in written) == (how == "segmentation fault")


def test_the_lines_are_there_when_the_process_has_ended(tmp_path: Path) -> None:
    """Though a child still holds its standard error."""
    log = tmp_path / "log"
    script = """
    subprocess.Popen(["sleep", "30"])
    os.write(2, b"theirs\\n" * 20_000)  # the relay is still busy with them when this process has ended
    log.info("last of ours")
    os.write(2, b"last of theirs\\n")
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", START.format("text") + textwrap.dedent(script)],
            stderr=output,
            start_new_session=True,
        )
        assert process.wait(60) == 0
    try:
        text = log.read_text()
        assert "last of ours" in text
        assert "last of theirs" in text
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # the child


def test_a_reader_that_stands_still_holds_up_neither_our_lines_nor_native_ones() -> None:
    """Nobody reads standard error until all is written: far more than pipes and relay hold."""
    reads, writes = os.pipe()
    script = """
    for number in range(15_000):
        log.info("ours %d %s", number, "x" * 1000)
        os.write(2, b"theirs %d " % number + b"x" * 1000 + bytes([10]))
    os.close(int(sys.argv[1]))
    """
    done_reads, done_writes = os.pipe()
    with subprocess.Popen(
        [sys.executable, "-c", START.format("text") + textwrap.dedent(script), str(done_writes)],
        stderr=writes,
        pass_fds=[done_writes],
    ) as process:
        for end in (writes, done_writes):
            os.close(end)
        assert os.read(done_reads, 1) == b"", "the process has written all its lines"
        os.close(done_reads)
        with os.fdopen(reads, "rb") as stderr:
            written = stderr.read().decode().splitlines()
        assert process.wait(60) == 0
    assert len(written) < 30_000
    assert all(LINE.match(line) for line in written)


def test_lost_lines_are_counted() -> None:
    """The relay stands still while more is logged than its pipe holds."""
    written = lines(
        """
        os.kill(relay, signal.SIGSTOP)
        for number in range(4000):
            log.info("ours %d %s", number, "x" * 1000)
        os.kill(relay, signal.SIGCONT)
        while logging.getLogger().handlers[0].lost:
            time.sleep(0.01)
            log.info("after")
        """
    )
    ours = [line for line in messages(written) if line.startswith("ours ")]
    (notice,) = [line for line in messages(written) if "were lost" in line]
    assert int(notice.split()[0]) >= 4000 - len(ours) > 0


def test_a_killed_relay_is_reported_and_the_log_goes_on() -> None:
    written = run(
        """
        os.kill(relay, signal.SIGKILL)
        watch, = [each for each in threading.enumerate() if each.name == "log relay"]
        watch.join()
        log.info("ours")
        os.write(2, b"theirs\\n")
        """
    ).stderr
    assert "the process that writes the log has ended (status -9)" in written
    assert "trtllm_mm_cache.test: ours\n" in written
    assert written.endswith("theirs\n")


def test_signals_to_the_whole_process_group_leave_the_relay_to_its_end() -> None:
    """Those of a terminal go to the group, a supervisor's to each process."""
    written = lines(
        """
        def ignores(number):
            status = open(f"/proc/{relay}/status").read()
            return int(status.partition("SigIgn:")[2].split()[0], 16) >> number - 1 & 1

        while not ignores(signal.SIGUSR2):
            time.sleep(0.01)
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
            signal.signal(signal.Signals[name], lambda number, _: log.info("got %d", number))
            os.killpg(0, signal.Signals[name])
            os.kill(relay, signal.Signals[name])
        os.write(2, b"theirs\\n")
        """
    )
    assert sum("got " in line for line in written) == 4
    assert written[-1].endswith("theirs")


def test_what_a_command_says_is_plain_in_text_and_an_error_in_json() -> None:
    script = r"say('error: a\nb http://u:s@h')"
    assert run(script).stderr == "error: a\\nb http://…@h\n"
    (record,) = records(script)
    assert (record["level"], record["message"]) == ("ERROR", r"error: a\nb http://…@h")
