"""The launch script as a person meets it: it stops what it started, and says what is wrong."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.stack import REPOSITORY, Process, free_port, launched, wait_until

SCRIPT = str(REPOSITORY / "launch/disagg_e_pd.sh")


def run_to_the_end(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the launch script when it is expected to end by itself."""
    variables = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RUN_DIR": str(tmp_path / "run"),
        "DYN_HTTP_PORT": str(free_port()),
        "HF_HUB_OFFLINE": "1",
    }
    return subprocess.run(
        [SCRIPT, *arguments],
        env={**os.environ, **variables, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def shared_memory_of(processes: list[Process]) -> set[str]:
    """Return the names of the arenas in shared memory that these processes made: torch_<pid>_..."""
    folder = Path("/dev/shm")  # noqa: S108 - where the arenas are, not a temporary file
    pids = {str(process.pid) for process in processes}
    return {path.name for path in folder.glob("torch_*") if path.name.split("_")[1] in pids}


def test_ctrl_c_stops_every_process_and_removes_the_shared_memory(tmp_path: Path, model_dir: Path) -> None:
    with launched(tmp_path / "run", MODEL_PATH=str(model_dir)) as stack:
        processes = stack.processes
        assert len(processes) == 3
        assert all(process.alive() for process in processes)
        assert shared_memory_of(processes)
        assert stack.stop() == 130
        assert not any(process.alive() for process in processes)
    wait_until(lambda: not shared_memory_of(processes), 10, "shared memory was left behind")
    text = (tmp_path / "run" / "launch.log").read_text()
    assert "curl -s http://127.0.0.1:" in text
    assert "ask --url http://127.0.0.1:" in text
    for name in ("encode-worker-1", "PD-worker-1"):
        log = (tmp_path / "run" / f"{name}.log").read_text()
        assert "worker ended" in log, log
        assert "Traceback" not in log, log


def test_without_a_model_path_the_printed_lines_answer_truly_and_find_the_workers(tmp_path: Path) -> None:
    with launched(tmp_path / "run", MODEL_PATH="", ENCODE_ENDPOINT="dyn://dynamo.towers.encode") as stack:
        assert stack.model == "shapes-qwen2-vl"
        lines = [line.strip() for line in stack.log.read_text().splitlines()]
        curl = next(line for line in lines if line.startswith("curl "))
        answer = subprocess.run(["bash", "-c", curl], capture_output=True, text=True, timeout=30, check=True)
        content = json.loads(answer.stdout)["choices"][0]["message"]["content"]
        assert content == "top right", answer.stdout
        ask = next(line for line in lines if " ask " in line)
        asked = subprocess.run(
            ["bash", "-c", ask],
            env={**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert asked.stdout.strip() == "top right"
        assert "first token after" in asked.stderr
        visit = next(line for line in lines if line.startswith("export "))
        line = next(line for line in lines if line.endswith(".cli drop --all"))
        done = subprocess.run(
            ["bash", "-c", f"{visit}; {line}"],
            env={**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert "dropped 1 embedding" in done.stdout
        assert not done.stderr, "Dynamo's log would bury what the command prints"


@pytest.mark.parametrize(
    ("arguments", "environment", "says"),
    [
        (["--modl-path", "x"], {}, "Did you mean '--model-path'?"),
        ([], {"ENGINE": "onnx"}, "ENGINE=onnx is unknown; set trtllm or transformers"),
        ([], {"ENGINE": "trtllm"}, "needs the Python package tensorrt_llm"),
        ([], {"PD_ENGINE_ARGS": "/nowhere/pd.yaml"}, "no engine configuration /nowhere/pd.yaml"),
        (["--multimodal-embedding-cache-capacity-gb", "4000"], {}, "shared memory"),
        ([], {"MODEL_PATH": "/nowhere/model"}, "is not a directory"),
    ],
    ids=["flag", "engine", "missing-engine", "yaml-path", "capacity", "model"],
)
def test_a_mistake_is_named_and_nothing_is_left_running(
    tmp_path: Path, model_dir: Path, arguments: list[str], environment: dict[str, str], says: str
) -> None:
    ended = run_to_the_end(tmp_path, *arguments, **{"MODEL_PATH": str(model_dir), **environment})
    assert ended.returncode == 1
    assert says in ended.stderr, ended.stderr
    started = tmp_path / "run" / "processes.tsv"
    pids = [line.split("\t")[1] for line in started.read_text().splitlines()] if started.exists() else []
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_an_unknown_yaml_key_is_named_with_its_file(tmp_path: Path, model_dir: Path) -> None:
    wrong = tmp_path / "pd.yaml"
    wrong.write_text("torch_treads: 1\n")
    ended = run_to_the_end(tmp_path, MODEL_PATH=str(model_dir), PD_ENGINE_ARGS=str(wrong))
    assert ended.returncode == 1
    assert f"{wrong}: unknown key 'torch_treads'" in ended.stderr


def test_a_taken_port_is_named(tmp_path: Path, model_dir: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        ended = run_to_the_end(tmp_path, MODEL_PATH=str(model_dir), DYN_HTTP_PORT=port)
    assert ended.returncode == 1
    assert f"port {port} is taken; set DYN_HTTP_PORT" in ended.stderr
