"""The dependency order of the package, read from its source: what may import what, and what may need torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import megatron_async_rlhf

NAME = megatron_async_rlhf.__name__
ROOT = Path(megatron_async_rlhf.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# Lowest first: a module imports from its own package and the rows above it here, so no two packages import each other.
ORDER = [
    [
        "types",
        "errors",
        "clock",
        "devices",
        "environment",
        "orphans",
        "limits",
        "suggestions",
        "options",
        "algorithms",
        "evaluation",
    ],
    ["user_functions", "run_secret"],
    ["run_tls"],
    ["config", "hub", "installed", "interpreter", "json_lines"],
    ["models", "data", "serving", "telemetry", "usage", "pages"],
    ["formats", "rewards"],
    ["weights", "estimate"],
    ["generator", "learner"],
    ["scheduler", "doctor"],
    ["checkpoint"],
    ["converter", "jobs"],
    ["simulate"],
    ["launch"],
    ["plan", "sweep", "pipeline", "report", "api"],
    ["compare", "first_config"],
    ["cli"],
    ["entry"],
    ["__main__"],
]
ROW_OF = {name: row for row, names in enumerate(ORDER) for name in names}
# Modules that only their owners may import, because they bring a heavy library along.
HEAVY = {
    "megatron": "learner.megatron",
    "transformer_engine": "learner.megatron",
    "vllm": "generator.vllm",
    "nemo_run": "launch.nemo",
    "invoke": "launch.nemo",
}
NAMES_THAT_SAY_NOTHING = {"utils", "util", "helpers", "helper", "common", "misc"}
LONGEST_FUNCTION, LONGEST_FILE = 60, 400
# "path under the package[:function]" -> why it is better long
LONG_FOR_A_REASON: dict[str, str] = {}


def module_of(path: Path) -> str:
    """Dotted name below the package; the package itself is the empty name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def package_of(module: str) -> str:
    return module.partition(".")[0]


def imports_of(path: Path) -> Iterator[tuple[str, int]]:
    """Absolute dotted name and line of everything imported anywhere in the file, inside functions too."""
    package = [NAME, *path.relative_to(ROOT).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:
                inner = f"{source}.{alias.name}".removeprefix(f"{NAME}.")
                yield (f"{NAME}.{inner}" if inner in MODULES else source), node.lineno


def own_imports_of(path: Path) -> Iterator[tuple[str, int]]:
    for name, line in imports_of(path):
        if name.startswith(f"{NAME}."):
            yield name.removeprefix(f"{NAME}."), line


def test_the_package_is_found():
    assert {"types", "errors", "config.load", "learner.megatron.learner", "weights.plan"} <= set(MODULES)


def test_every_package_has_a_place_in_the_order():
    assert {package_of(name) for name in MODULES if name} == set(ROW_OF)


def test_no_module_imports_upwards():
    upward = [
        f"{path.relative_to(ROOT)}:{line} imports {imported}"
        for name, path in MODULES.items()
        for imported, line in own_imports_of(path)
        if name
        and package_of(imported) != package_of(name)
        and ROW_OF[package_of(imported)] >= ROW_OF[package_of(name)]
    ]
    assert not upward


def test_heavy_libraries_stay_behind_their_seams():
    outside = [
        f"{path.relative_to(ROOT)}:{line} imports {imported}"
        for name, path in MODULES.items()
        for imported, line in imports_of(path)
        if (owner := HEAVY.get(imported.split(".")[0])) and not f"{name}.".startswith(f"{owner}.")
    ]
    assert not outside


def test_only_the_jobs_with_generators_know_their_client():
    users = {
        name for name, path in MODULES.items() for imported, _ in own_imports_of(path)
        if imported == "generator.vllm.client"
    }  # fmt: skip
    assert users <= {"jobs.train", "jobs.evaluate"}


def test_every_module_name_says_what_is_inside():
    assert not [name for name in MODULES if NAMES_THAT_SAY_NOTHING & set(name.split("."))]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import megatron.core", ["megatron.core"]),
        ("def f():\n    from vllm import LLM", ["vllm"]),
        ("from megatron_async_rlhf import types", ["megatron_async_rlhf.types"]),
        ("from ..errors import ConfigError", ["megatron_async_rlhf.errors"]),
        ("from . import load", ["megatron_async_rlhf.config.load"]),
    ],
)
def test_imports_are_read_in_every_form(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str, expected: list[str]
):
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "probe.py").write_text(source)
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert [name for name, _ in imports_of(tmp_path / "config" / "probe.py")] == expected


def functions_of(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_functions_and_files_stay_short():
    lengths = {str(path.relative_to(ROOT)): (len(path.read_text().splitlines()), LONGEST_FILE) for path in FILES}
    for path in FILES:
        for function in functions_of(path):
            key = f"{path.relative_to(ROOT)}:{function.name}"
            length = function.end_lineno - function.lineno + 1
            lengths[key] = max(lengths.get(key, (0, 0)), (length, LONGEST_FUNCTION))
    too_long = {key: length for key, (length, limit) in lengths.items() if length > limit}
    assert {key: length for key, length in too_long.items() if key not in LONG_FOR_A_REASON} == {}
    assert set(LONG_FOR_A_REASON) <= set(too_long), "no longer long: remove the exemption"


CONTROLLER = (
    "scheduler",
    "simulate",
    "estimate",
    "launch",
    "jobs",
    "sweep",
    "cli",
)
WITHOUT_TORCH = [
    "types", "errors", "config.load", "models.layout_rules", "data.source", "data.pairs", "data.packing", "rewards.registry", "learner.protocol", "models.flops",
    "generator.protocol", "generator.seeds", "weights.plan", "weights.roster", *(name for name in MODULES if name.split(".")[0] in CONTROLLER and not name.startswith("launch.nemo.")),
]  # fmt: skip


def test_the_controllers_side_does_not_load_torch():
    """A laptop checks a cluster's configuration, and the controller's process stays small."""
    program = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    if 'torch' in sys.modules: sys.exit(f'{name} loads torch')\n"
    )
    names = [f"{NAME}.{name}" for name in WITHOUT_TORCH]
    command = [sys.executable, "-c", program, *names]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr


def _without_encoding(tree: ast.AST) -> Iterator[int]:
    """Lines that read or write text, and leave the encoding to the locale."""
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        keys = {keyword.arg: keyword.value for keyword in call.keywords}
        if _is_text(ast.unparse(call.func), call.args, keys) and "encoding" not in keys:
            yield call.lineno


def _is_text(called: str, arguments: list[ast.expr], keys: dict[str | None, ast.expr]) -> bool:
    name = called.rpartition(".")[2]
    if name in {"read_text", "write_text"}:
        return True
    if name == "NamedTemporaryFile":
        default, place = "w+b", 0
    elif called in ("open", "io.open", "os.fdopen"):
        default, place = "r", 1
    elif name == "open" and called not in ("os.open", "self.open") and not (arguments and not _mode(arguments[0])):
        default, place = "r", 0  # of a path; what is opened with something that is no mode is no file
    else:
        switch = keys.get("text") or keys.get("universal_newlines")
        return isinstance(switch, ast.Constant) and bool(switch.value)
    given = keys.get("mode") or (arguments[place] if len(arguments) > place else None)
    return "b" not in (default if given is None else _mode(given))


def _mode(node: ast.expr) -> str:
    is_mode = isinstance(node, ast.Constant) and isinstance(node.value, str) and set(node.value) <= set("rwxabt+")
    return node.value if is_mode else ""


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("path.read_text()", 1),
        ("path.write_text('x')", 1),
        ("path.write_text('x', encoding='utf-8')", 0),
        ("open(path)", 1),
        ("open(path, 'rb')", 0),
        ("open(path, mode='a')", 1),
        ("path.open()", 1),
        ("path.open('ab')", 0),
        ("path.open('w', encoding='utf-8')", 0),
        ("os.fdopen(number, 'wb')", 0),
        ("os.open(path, os.O_RDONLY)", 0),
        ("self.open(name)", 0),
        ("tempfile.NamedTemporaryFile()", 0),
        ("tempfile.NamedTemporaryFile('w')", 1),
        ("subprocess.run(a, text=True)", 1),
        ("subprocess.run(a, text=False)", 0),
        ("subprocess.run(a, encoding='utf-8')", 0),
    ],
)
def test_text_without_an_encoding_is_seen(source, expected):
    assert len(list(_without_encoding(ast.parse(source)))) == expected


def test_no_text_is_left_to_the_locale():
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in FILES
        for line in _without_encoding(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not found, 'say encoding="utf-8"'
