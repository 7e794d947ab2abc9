"""`top` over system ports: what it prints, and workers that are away or are none."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from rich.console import Console

from tests.e2e.stack import free_port
from tests.top.test_figures import Pd
from trtllm_mm_cache.cli.top.run import History, run_top
from trtllm_mm_cache.cli.top.sources import make_source
from trtllm_mm_cache.cli.top.view import draw
from trtllm_mm_cache.settings import TopSettings


class Port:
    """A system port that serves whatever `text` is."""

    def __init__(self, text: str) -> None:
        self.text = text
        port = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = port.text.encode()
                self.send_response(200 if self.path == "/metrics" else 404)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *arguments: object) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        self.address = f"127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def pd() -> Pd:
    pd = Pd()
    for key in "aab":
        pd.look_up(key)
    return pd


@pytest.fixture
def port(pd: Pd) -> Iterator[Port]:
    port = Port(pd.exposition.render())
    yield port
    port.close()


def settings(*urls: str, **changes: object) -> TopSettings:
    return TopSettings.model_validate({"url": urls, "interval_s": 0.01, "timeout_s": 2} | changes)


def test_one_plain_frame_where_the_output_is_no_terminal(
    port: Port, capsys: pytest.CaptureFixture[str]
) -> None:
    run_top(settings(port.address))
    output = capsys.readouterr().out
    assert "\x1b" not in output
    assert output.isascii()
    assert "PD workers 1, encode workers 0" in output
    assert "33.3 %" in output
    assert "time to first token" in output


def test_as_many_frames_as_asked_for(port: Port, capsys: pytest.CaptureFixture[str]) -> None:
    run_top(settings(f"http://{port.address}/metrics", count=3))
    assert capsys.readouterr().out.count("PD workers 1") == 3


def test_a_worker_that_is_away_is_named_and_the_others_are_shown(
    port: Port, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = f"127.0.0.1:{free_port()}"
    run_top(settings(nowhere, port.address))
    output = capsys.readouterr().out
    assert f"away: {nowhere}: ConnectError" in output
    assert "PD workers 1" in output


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("no metrics { at all", "no Prometheus metrics"),
        ("# TYPE up gauge\nup 1\n", "no metrics of a PD or encode worker"),
    ],
)
def test_what_is_no_worker_of_ours_is_said(capsys: pytest.CaptureFixture[str], text: str, says: str) -> None:
    port = Port(text)
    try:
        run_top(settings(port.address))
    finally:
        port.close()
    assert says in capsys.readouterr().out


async def test_a_worker_that_comes_and_goes(pd: Pd, port: Port) -> None:
    source = make_source(settings(port.address))
    history = History(window_s=60)
    try:
        await history.add(source)
        for key in "bbbb":
            pd.look_up(key)
        port.text = pd.exposition.render()
        await history.add(source)
        frame = history.frame()
        assert frame.cache is not None
        assert frame.cache.hit_ratio == 1.0, "of the window, not since the start"
        port.text = "gone {"
        await history.add(source)
        assert history.frame().cache is None
        assert history.frame().away
    finally:
        await source.close()


async def test_on_a_terminal_it_is_drawn_with_colours(port: Port) -> None:
    source = make_source(settings(port.address))
    history = History(window_s=60)
    await history.add(source)
    await source.close()
    console = Console(force_terminal=True, width=120, color_system="standard")
    with console.capture() as captured:
        console.print(draw(history.frame(), plain=False))
    assert "\x1b[" in captured.get()
