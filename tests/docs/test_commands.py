"""Every documented command could be typed: program, flags, values, variables and targets are there."""

from __future__ import annotations

from pathlib import PurePosixPath

import pytest

from tests.docs.documents import Document, parse_document, present_documents
from tests.docs.programs import problem_of
from tests.docs.shell import commands, parse


@pytest.mark.parametrize("document", present_documents(), ids=lambda document: str(document.path))
def test_every_command_could_be_typed(document: Document) -> None:
    found = [(command, problem_of(command)) for command in commands(document)]
    assert not [f"{command}: {problem}" for command, problem in found if problem]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("trtllm-mm-cache pd --model-path m --http-cache-mb 5", None),
        ("mpirun -n 2 trtllm-mm-cache pd --model-path … &", None),
        ("DYN_SYSTEM_PORT=1 .venv/bin/trtllm-mm-cache top --url HOST:PORT # watch", None),
        ("trtllm-mm-cache serve", "no command serve"),
        ("trtllm-mm-cache ROLE --log-lever DEBUG", "no flag --log-lever"),
        ("trtllm-mm-cache pd --model-path m --http-cache-gb 5", "--http-cache-gb"),
        ("trtllm-mm-cache pd --http-cache-mb 5", "Missing option '--model-path'"),
        ("trtllm-mm-cache pd --model-path m --http-cache-mb big", "--http-cache-mb"),
        ("trtllm-mm-cache pd --model-path m --http-cache-mb -5", "http_cache_mb"),
        ("echo x; cat salt | trtllm-mm-cache drop --slat", "--slat"),
        ("mpirun -n 2 trtllm-mm-cache pd --ranks 2 …", "--ranks"),
        ("PD_RANKS=2 ./launch/disagg_e_pd.sh --max-images-per-request 2", None),
        ("PD_RANK=2 ./launch/disagg_e_pd.sh", "no variable PD_RANK"),
        ("KEY_SCHEME=2 ./launch/disagg_e_pd.sh", "no variable KEY_SCHEME"),
        ("export PD_RANK=2", "no variable PD_RANK"),
        ("./launch/disagg_e_pd.sh --max-images 2", "--max-images"),
        ("ENCODE_EXTRA_ARGS='--max-batch-image 1' launch/disagg_e_pd.sh", "ENCODE_EXTRA_ARGS"),
        ("make chaos CHAOS_SECONDS=60", None),
        ("make chaoss", "No rule to make target"),
        ("make chaos SECONDS=60", "no variable SECONDS"),
        ("python -m benchmarks.burst --rounds 2", None),
        ("python -m benchmarks.burst --round 2", "no argument --round"),
        ("python -m benchmarks.burst --rounds two", "--rounds"),
        ("python -m benchmarks.bursts", "benchmarks/bursts.py is not there"),
        ("python -m trtllm_mm_cache.cli.ask", "trtllm_mm_cache.cli.ask is no program"),
        ("python -m trtllm_mm_cache.cli.main pd --modelpath m", "--modelpath"),
        ("python tools/demo.py --seed 1", None),
        ("python tools/make_tiny_model.py", "--out"),
        ("python tools/demos.py", "tools/demos.py is not there"),
        ("launch/setup_venv.sh .venv transformer --dev", "no extra transformer"),
        ("pip install 'trtllm-mm-cache[mpi,traces]'", "no extra traces"),
        ("RUN pip install -e '.[gpu]'", "no extra gpu"),
        ("RUN pip install '/opt/trtllm-mm-cache[trtlm]'", "no extra trtlm"),
        ("pytest -m 'gpus and long' tests", "no marker gpus"),
    ],
)
def test_a_wrong_command_is_found(line: str, problem: str | None) -> None:
    [command] = parse(line, "here")
    found = problem_of(command)
    assert found == problem or problem in (found or "")


def test_commands_are_found_wherever_they_stand() -> None:
    text = """
`trtllm-mm-cache one` and ``RUN_DIR=x launch/disagg_e_pd.sh``

    $ trtllm-mm-cache two \\
        --three   # four

```bash
echo 'over
two lines'; trtllm-mm-cache five "six
seven"
```

```console
$ trtllm-mm-cache '6
6'
it's trtllm-mm-cache output
$ trtllm-mm-cache seven
```

```dockerfile
RUN python -m pip install x && pip install y
```

```yaml
spec:
  containers:
    - {name: pd, command: [mpirun, -n, 2, trtllm-mm-cache], args: [eight, "--nine=a b"]}
---
services: {pd: {command: trtllm-mm-cache ten}}
```
"""
    document = parse_document(PurePosixPath("here.md"), text)
    found = [(command.program, command.arguments) for command in commands(document)]
    assert found == [
        ("trtllm-mm-cache", ("two", "--three")),
        ("trtllm-mm-cache", ("five", "six\nseven")),
        ("trtllm-mm-cache", ("6\n6",)),
        ("trtllm-mm-cache", ("seven",)),
        ("python", ("-m", "pip", "install", "x")),
        ("pip", ("install", "y")),
        ("trtllm-mm-cache", ("eight", "--nine=a b")),
        ("trtllm-mm-cache", ("ten",)),
        ("trtllm-mm-cache", ("one",)),
        ("disagg_e_pd.sh", ()),
    ]
