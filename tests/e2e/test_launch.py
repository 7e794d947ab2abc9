"""The launch script as a person meets it: it stops what it started, and says what is wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import openai
import pytest

from tests.e2e.cards import Deal
from tests.e2e.stack import REPOSITORY, Stack, arenas_of, free_port, launched, wait_until

SCRIPT = str(REPOSITORY / "launch/disagg_e_pd.sh")
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def run_to_the_end(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the launch script when it is expected to end by itself."""
    variables = {
        "PATH": PATH,
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


def test_ctrl_c_stops_every_process_and_removes_the_shared_memory(tmp_path: Path, model_dir: Path) -> None:
    with launched(tmp_path / "run", MODEL_PATH=str(model_dir)) as stack:
        processes = stack.processes
        assert len(processes) == 3
        assert all(process.alive() for process in processes)
        assert arenas_of(process.pid for process in processes)
        mapped = Path(f"/proc/{stack.launcher.pid}/maps").read_text()
        assert "python" in mapped
        assert "libtorch" not in mapped, "what only watches has no use for 200 MB and a second's start"
        assert stack.stop() == 130
        assert not any(process.alive() for process in processes)
    wait_until(
        lambda: not arenas_of(process.pid for process in processes), 10, "shared memory was left behind"
    )
    text = (tmp_path / "run" / "launch.log").read_text()
    assert "curl -s http://127.0.0.1:" in text
    assert "ask --url http://127.0.0.1:" in text
    assert all(len(line) < 400 for line in text.splitlines()), "lines to copy are short"
    assert "Killed" not in text
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
            env={**os.environ, "PATH": PATH},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert asked.stdout.strip() == "top right"
        assert "first token after" in asked.stderr
        visit = next(line for line in lines if line.startswith("export "))
        line = next(line for line in lines if line.endswith("trtllm-mm-cache drop --all"))
        done = subprocess.run(
            ["bash", "-c", f"{visit}; {line}"],
            env={**os.environ, "PATH": PATH},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert "dropped 1 embedding" in done.stdout
        assert not done.stderr, "Dynamo's log would bury what the command prints"


def test_killing_the_launcher_ends_everything(tmp_path: Path, model_dir: Path) -> None:
    with launched(tmp_path / "run", MODEL_PATH=str(model_dir)) as stack:
        processes = stack.processes
        assert arenas_of(process.pid for process in processes)
        stack.launcher.kill()
        wait_until(lambda: not any(process.alive() for process in processes), 10, "a process still runs")
        with pytest.raises(openai.APIConnectionError):
            stack.client.models.list()
    pids = [process.pid for process in processes]
    wait_until(lambda: not arenas_of(pids), 10, "shared memory was left behind")


def test_what_ends_by_itself_is_started_again(tmp_path: Path, model_dir: Path, deal: Deal) -> None:
    with launched(tmp_path / "run", MODEL_PATH=str(model_dir)) as stack:
        before = stack.processes
        asked = deal()
        assert stack.ask(*asked.parts) == asked.answer
        for process in before:
            os.kill(process.pid, signal.SIGKILL)
        text = "is ready again"
        wait_until(lambda: stack.log.read_text().count(text) == 3, 60, "not all are back")
        after = stack.processes
        assert [each.name for each in after] == [each.name for each in before]
        assert [each.system_port for each in after] == [each.system_port for each in before]
        assert not {each.pid for each in after} & {each.pid for each in before}

        def serves() -> bool:
            try:
                return stack.ask(*asked.parts) == asked.answer
            except openai.APIError:  # its discovery takes a moment
                return False

        wait_until(serves, 30, "nothing is served after the restart")
        said = stack.log.read_text()
        assert "PD worker 1 was killed by SIGKILL; it is started again now" in said
        assert "encode worker 1 was killed by SIGKILL; it is started again now" in said


def test_a_worker_that_cannot_start_again_ends_everything_with_its_log(
    tmp_path: Path, model_dir: Path
) -> None:
    """Its model is gone: the first tries may be chance, the last one is said with the reason."""
    model = tmp_path / "model"
    shutil.copytree(model_dir, model)
    with launched(tmp_path / "run", MODEL_PATH=str(model)) as stack:
        (pd,) = stack.workers("PD")
        (model / "config.json").unlink()
        os.kill(pd.pid, signal.SIGKILL)
        assert stack.launcher.wait(60) == 1
        said = stack.log.read_text()
        assert said.count("PD worker 1 has ended with status 2; it is started again") == 4
        assert said.count("the model's config.json cannot be used") == 2, (
            "at the first failure and at the end"
        )
        assert said.rstrip().endswith("error: PD worker 1 has ended with status 2")
        assert not any(process.alive() for process in stack.processes)


def test_a_worker_that_cannot_start_ends_everything_with_its_log(tmp_path: Path, model_dir: Path) -> None:
    """What no check before the start can see: weights that are not those of the configuration."""
    model = tmp_path / "model"
    shutil.copytree(model_dir, model)
    (model / "model.safetensors").write_bytes(b"no weights")
    ended = run_to_the_end(tmp_path, MODEL_PATH=str(model))
    assert ended.returncode == 1
    assert "the model's weights cannot be read" in ended.stderr
    assert "has ended with status 2 before it was ready" in ended.stderr.splitlines()[-1]


def test_the_run_folder_is_closed_and_holds_a_secret_of_its_own(stack: Stack) -> None:
    for path in (stack.run_dir, *stack.run_dir.rglob("*")):
        if path != stack.log:  # the test's own
            assert path.stat().st_mode & 0o077 == 0, path
    secret = stack.run_dir / "discovery/secret"
    assert len(secret.read_text().strip()) == 64
    assert f"DYN_FILE_KV={secret.parent}" in stack.log.read_text()


def test_a_second_stack_in_a_terminal_of_the_first_is_refused(
    stack: Stack, tmp_path: Path, model_dir: Path
) -> None:
    export = next(line for line in stack.log.read_text().splitlines() if "export DYN" in line)
    variables = dict(word.split("=", 1) for word in export.split()[1:])
    variables["DYN_HTTP_PORT"] = str(free_port())
    ended = run_to_the_end(tmp_path / "second", MODEL_PATH=str(model_dir), **variables)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: DYN_FILE_KV="), ended.stderr
    assert "belongs to a stack that runs" in ended.stderr
    assert "unset DYN_FILE_KV" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    assert stack.ask("Hello there!")


def test_a_proxy_in_the_environment_is_not_asked_for_loopback(tmp_path: Path, model_dir: Path) -> None:
    with socket.socket() as proxy:
        proxy.bind(("127.0.0.1", 0))
        proxy.listen()
        proxy.setblocking(False)
        url = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        variables = {"http_proxy": url, "HTTP_PROXY": url, "all_proxy": url, "no_proxy": "", "NO_PROXY": ""}
        with launched(tmp_path / "run", MODEL_PATH=str(model_dir), **variables) as stack:
            lines = [line.strip() for line in stack.log.read_text().splitlines()]
            visit = next(line for line in lines if line.startswith("export "))
            card = REPOSITORY / "models/card.png"
            for command in (f'ask {card} "Where is the yellow cross?"', "drop --all"):
                done = subprocess.run(
                    ["bash", "-c", f"{visit}; trtllm-mm-cache {command}"],
                    env={**os.environ, **variables, "PATH": PATH},
                    capture_output=True,
                    text=True,
                    timeout=60,
                    check=False,
                )
                assert done.returncode == 0, done.stderr
        with pytest.raises(BlockingIOError):
            proxy.accept()


@pytest.mark.parametrize(
    ("arguments", "environment", "says"),
    [
        (["--modl-path", "x"], {}, "Did you mean one of: '--encode-python', '--model-path'?"),
        ([], {"DYN_HTTP_PORT": "abc"}, "DYN_HTTP_PORT"),
        ([], {"DYN_HTTP_PORT": "99999"}, "99999 is not in the range"),
        ([], {"DYN_HTTP_HOST": "203.0.113.1"}, "203.0.113.1"),
        ([], {"ENCODE_WORKERS": "two"}, "ENCODE_WORKERS"),
        ([], {"PD_WORKERS": "0"}, "PD_WORKERS"),
        ([], {"ENCODE_EXTRA_ARGS": "--max-batch-image 1"}, "ENCODE_EXTRA_ARGS: No such option"),
        ([], {"ENGINE": "onnx"}, "'onnx' is not one of 'transformers', 'trtllm'"),
        ([], {"ENGINE": "trtllm"}, "needs the Python package tensorrt_llm"),
        ([], {"PD_ENGINE_ARGS": "/nowhere/pd.yaml"}, "no engine configuration /nowhere/pd.yaml"),
        (
            ["--multimodal-embedding-cache-capacity-gb", "4000"],
            {},
            "the arenas need 4000.38 GB (4000.00 GB by",
        ),
        ([], {"MODEL_PATH": "/nowhere/model"}, "MODEL_PATH=/nowhere/model is not a directory"),
    ],
    ids=lambda value: "-".join([*value, *value.values()]) if isinstance(value, dict) else None,
)
def test_a_mistake_is_said_in_one_line_before_anything_starts(
    tmp_path: Path, model_dir: Path, arguments: list[str], environment: dict[str, str], says: str
) -> None:
    ended = run_to_the_end(tmp_path, *arguments, **{"MODEL_PATH": str(model_dir), **environment})
    assert ended.returncode == 2
    assert says in ended.stderr, ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    assert not ended.stdout
    assert not (tmp_path / "run").exists(), "nothing was started"


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        ("tokenizer.json", "has no tokenizer (tokenizer.json or"),
        ("preprocessor_config.json", "has no image processor"),
        ("config.json", "has no config.json"),
        ("model.safetensors", "has no weights"),
    ],
)
def test_a_missing_part_of_the_model_is_named(
    tmp_path: Path, model_dir: Path, missing: str, says: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(model_dir, model)
    for name in (missing, *(["processor_config.json"] if missing == "preprocessor_config.json" else [])):
        (model / name).unlink()
    ended = run_to_the_end(tmp_path, MODEL_PATH=str(model))
    assert ended.returncode == 2
    assert f"MODEL_PATH={model}" in ended.stderr
    assert says in ended.stderr
    assert not (tmp_path / "run").exists(), "nothing was started"


def test_an_unknown_yaml_key_is_named_with_its_file(tmp_path: Path, model_dir: Path) -> None:
    wrong = tmp_path / "pd.yaml"
    wrong.write_text("torch_treads: 1\n")
    ended = run_to_the_end(tmp_path, MODEL_PATH=str(model_dir), PD_ENGINE_ARGS=str(wrong))
    assert ended.returncode == 2
    assert f"{wrong}: unknown key 'torch_treads'" in ended.stderr


def test_a_taken_port_is_named(tmp_path: Path, model_dir: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        ended = run_to_the_end(tmp_path, MODEL_PATH=str(model_dir), DYN_HTTP_PORT=port)
    assert ended.returncode == 2
    assert f"port {port} is taken; set DYN_HTTP_PORT" in ended.stderr


@pytest.mark.skipif(not Path("/usr/bin/python3").exists(), reason="needs a Python of the system's own")
def test_in_a_fresh_clone_the_script_sets_up_what_the_package_needs(tmp_path: Path) -> None:
    """Any Python finds the package in the repository's folder, and not what it imports."""
    (tmp_path / "launch").mkdir()
    shutil.copy(REPOSITORY / "launch/disagg_e_pd.sh", tmp_path / "launch")
    (tmp_path / "trtllm_mm_cache").symlink_to(REPOSITORY / "trtllm_mm_cache")
    setup = tmp_path / "launch/setup_venv.sh"
    setup.write_text("#!/bin/sh\necho setting up $*\nexit 1\n")
    setup.chmod(0o755)
    ended = subprocess.run(
        ["launch/disagg_e_pd.sh"],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "RUN_DIR": str(tmp_path / "run")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 1
    assert f"setting up {tmp_path}/.venv transformers" in ended.stdout
    assert "the set-up failed" in ended.stderr
