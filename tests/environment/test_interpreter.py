"""What the interpreter itself takes in of a shell: locale, encodings, where it looks for modules."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from rich.console import Console
from shells import TINY, settings, start

from megatron_async_rlhf.errors import CheckpointError
from megatron_async_rlhf.generator.vllm.live_weights import LiveWeights
from megatron_async_rlhf.launch.display import Display

CHARMAPS = ("ISO-8859-1", "EUC-JP")
PROMPTS = ["Grüße, 世界\u2028 naïve", "ß" * 3, "№ 5", "emoji 🙂"]


@pytest.fixture(scope="module")
def locales(tmp_path_factory) -> Path:
    """A directory with locales that are not UTF-8, for LOCPATH."""
    directory = tmp_path_factory.mktemp("locales")
    for charmap in CHARMAPS:
        _make_locale(directory, charmap)
    return directory


def _make_locale(directory: Path, charmap: str) -> None:
    if shutil.which("localedef") is None or not Path("/usr/share/i18n/charmaps", f"{charmap}.gz").exists():
        pytest.skip("needs localedef and the charmaps of glibc's package `locales`")
    command = ["localedef", "-i", "POSIX", "-f", charmap, str(directory / f"x.{charmap}")]
    subprocess.run(command, capture_output=True, timeout=120, check=False)  # 1 if it has warned of anything
    assert (directory / f"x.{charmap}/LC_CTYPE").exists()


def dry_run(directory: Path, variables: dict[str, str]) -> str:
    """Of a configuration that names files with letters of many alphabets, in a directory that has such a name too."""
    place = directory / "daß 目录"
    place.mkdir(exist_ok=True)
    lines = [
        json.dumps({"prompt": f"{p} {n}?", "answer": f"#### {n}"}, ensure_ascii=False)
        for n, p in enumerate(PROMPTS * 3)
    ]
    (place / "fragen 世界.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    config = TINY.read_text(encoding="utf-8").replace("  train_prompts: 64\n  eval_prompts: 50", "  eval_prompts: 4")
    config = config.replace(
        "data:\n", f"data:\n  train: {place}/fragen 世界.jsonl\n  solution_field: answer  # für die Prüfung\n"
    )
    config = config.replace("tokenizer: bpe\n  vocab_size: 301", "tokenizer: bytes") + "reward:\n  type: gsm8k\n"
    (place / "lauf.yaml").write_text(config, encoding="utf-8")
    overrides = settings(f"run.dir={place}/läufe/1", "model.context_length=128")
    told = start(
        ["train", str(place / "lauf.yaml"), *overrides, "--dry-run"], directory, variables, without=("LANG", "LC_ALL")
    )
    assert told.returncode == 0, told.stdout
    return told.stdout


def test_every_locale_reads_and_writes_the_same(tmp_path: Path, locales: Path):
    """In the last one Python's own way out of the C locale is closed."""
    hostile = [{"LC_ALL": name, "LOCPATH": str(locales)} for name in ("POSIX", "nowhere.UTF-8")]
    hostile += [{"LC_ALL": f"x.{charmap}", "LOCPATH": str(locales)} for charmap in CHARMAPS]
    hostile.append({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"})
    told = {dry_run(tmp_path, variables) for variables in ({"LC_ALL": "C.UTF-8"}, *hostile)}
    assert len(told) == 1


@pytest.mark.thorough
def test_so_does_gb18030(tmp_path: Path):
    """Whose locale takes a quarter of a minute to make."""
    _make_locale(tmp_path, "GB18030")
    variables = {"LC_ALL": "x.GB18030", "LOCPATH": str(tmp_path)}
    assert dry_run(tmp_path, variables) == dry_run(tmp_path, {"LC_ALL": "C.UTF-8"})


def test_a_terminal_that_cannot_show_a_character_is_no_error(tmp_path: Path):
    told = start(["train", "nirgends/läufe 世界.yaml"], tmp_path, {"PYTHONIOENCODING": "ascii"})
    assert told.returncode == 2
    assert told.stdout == "error: config file nirgends/l\\xe4ufe \\u4e16\\u754c.yaml does not exist\n"


def test_modules_where_the_user_stands_are_not_ours(tmp_path: Path):
    names = (
        "random",
        "queue",
        "statistics",
        "yaml",
        "rich",
        "typer",
        "zmq",
        "numpy",
        "tokenizers",
        "datasets",
        "config",
    )
    for name in names:
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('the wrong module')", encoding="utf-8")
    command = ["train", str(TINY), *settings(f"run.dir={tmp_path / 'run'}"), "--dry-run"]
    told = start(command, tmp_path)
    assert told.returncode == 0, told.stdout


def test_the_command_itself_is_not_changed_by_python_s_variables(tmp_path: Path):
    variables = {"PYTHONWARNINGS": "error", "PYTHONOPTIMIZE": "2", "PYTHONDEVMODE": "1", "PYTHONHASHSEED": "7"}
    command = ["train", str(TINY), *settings(f"run.dir={tmp_path / 'run'}"), "--dry-run"]
    clean = start(command, tmp_path)
    assert start(command, tmp_path, variables).stdout == clean.stdout and clean.returncode == 0


def test_a_home_in_a_configuration(tmp_path: Path):
    overrides = settings("run.dir=~/läufe/1")
    told = start(["train", str(TINY), *overrides, "--dry-run"], tmp_path, {"HOME": str(tmp_path / "home")}).stdout
    assert f"--run-dir {tmp_path}/home/läufe/1 --learner" in told and not (tmp_path / "~").exists()


def test_a_directory_that_is_gone_is_one_line(tmp_path: Path):
    gone = tmp_path / "gone"
    gone.mkdir()
    told = start(["train", str(TINY), "-s", "run.dir=x"], gone, prepare=lambda: os.rmdir(gone))
    assert told.returncode == 2 and told.stdout.count("\n") == 1, told.stdout
    assert told.stdout.startswith("error: the working directory")


class _Generator(BaseHTTPRequestHandler):
    """A generator whose workers hold one number."""

    def do_POST(self) -> None:
        worker = {"exact": True, "dtype": "float32", "shapes": [["w", [1]]], "boxes": [["w", 0, 1, 0, 1, "00" * 16]]}
        body = json.dumps({"results": [worker]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "all_proxy"])
def test_a_generator_is_asked_without_a_proxy(monkeypatch, name: str):
    with socket.create_server(("127.0.0.1", 0)) as unused:
        dead = unused.getsockname()[1]
    for other in ("no_proxy", "NO_PROXY", "REQUEST_METHOD"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, f"http://127.0.0.1:{dead}")
    with HTTPServer(("127.0.0.1", 0), _Generator) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert list(LiveWeights(url).tensors) == ["w"]
        server.shutdown()
    with pytest.raises(CheckpointError, match=f"127.0.0.1:{dead}: no generator answers there"):
        LiveWeights(f"http://127.0.0.1:{dead}")


def test_forced_colours_do_not_hide_the_steps(tmp_path: Path):
    """CI services set FORCE_COLOR; a log is no terminal for all that."""
    step = {"event": "step", "step": 1, "steps": 4, "reward": 0.5, "staleness": 0.0, "samples_per_s": 1.0}
    with (tmp_path / "log").open("w", encoding="utf-8") as log:
        Display(Console(file=log, force_terminal=True, highlight=False, width=200)).show(step)
    assert "step 1/4  reward 0.500" in (tmp_path / "log").read_text(encoding="utf-8")


def test_it_starts_again_once(tmp_path: Path):
    """With the very bytes of its command line."""
    program = "import sys; from megatron_async_rlhf.interpreter import use_utf8; use_utf8(); print(sys.flags.utf8_mode, ascii(sys.argv[1]))"
    variables = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PATH": os.environ["PATH"]}
    for flag, mode in (("-E", "1"), ("-I", "1"), ("-B", "1")):
        told = subprocess.run(
            [sys.executable, flag, "-c", program, "a ü \n"], env=variables, capture_output=True, timeout=60, check=True
        )
        assert told.stdout.decode().split(" ", 1) == [mode, "'a \\xfc \\n'\n"]
