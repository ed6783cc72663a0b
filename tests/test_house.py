"""What imports what: a file opens without the trainer, commands are no libraries, no circles."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
WINGS = {"adavipro_fast": ROOT / "adavipro_fast"}
WINGS |= {
    f"adavipro_fast.{path.parent.name}": path.parent
    for path in ROOT.glob("adavipro_fast/*/__init__.py")
}
WINGS |= {f"adavipro_fast.{name}": ROOT / name for name in ("kernels", "export")}
WINGS["lib"] = ROOT / "bench" / "lib"
BENCHES = {path.stem: path for path in (ROOT / "bench").glob("*.py")}
COMMANDS = {
    f"{wing}.{path.stem}"
    for wing in ("adavipro_fast", "adavipro_fast.export")
    for path in WINGS[wing].glob("*.py")
    if "def main(" in path.read_text() and path.stem not in ("cli", "__main__")
}


def test_opening_a_file_loads_neither_trainer_nor_scikit_learn_nor_tensorboard():
    program = "import sys, adavipro_fast.artifact; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True
    )
    loaded = set(done.stdout.split())
    unwanted = {"sklearn", "tensorboard", "matplotlib", "onnx", "onnxruntime", "tensorrt"}
    unwanted |= {f"adavipro_fast.{name}" for name in ("training", "data.sets", "cli")} | COMMANDS
    assert not loaded & unwanted


def arrows():
    """Return which of our modules each one imports, at its top or later."""
    files = {
        f"{wing}.{path.stem}": path for wing, root in WINGS.items() for path in root.glob("*.py")
    } | BENCHES
    found = {}
    for name, path in files.items():
        imported = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {a.name for a in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
        found[name] = imported & files.keys() - {name}
    return found


def test_no_module_comes_back_to_itself():
    found = arrows()
    for start in found:
        seen, waiting = set(), [start]
        while waiting:
            for name in found[waiting.pop()] - seen:
                assert name != start, f"{start} imports itself through others"
                seen.add(name)
                waiting.append(name)


def test_commands_are_no_libraries():
    for name, imported in arrows().items():
        # The benches measure the commands; only `make demo` runs a bench after another.
        assert name in BENCHES or name.startswith("lib.") or not imported & COMMANDS, name
        assert imported & BENCHES.keys() <= ({"latency"} if name == "demo" else set()), name
