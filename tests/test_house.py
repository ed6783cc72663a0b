"""What imports what: a file opens without the trainer, commands are no libraries, no circles."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from adavipro_fast.export import onnx_export
from adavipro_fast.export.onnx_export import OnnxConfig
from adavipro_fast.files.checkpoint import checkpoint_of
from adavipro_fast.method.config import PromptConfig
from adavipro_fast.method.model import AdaViPro

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


@pytest.fixture(scope="module")
def exported(demo_clip, tmp_path_factory):
    encoder, text = demo_clip
    names, folder = ("ring", "star"), tmp_path_factory.mktemp("exported")
    model = AdaViPro(encoder, text.class_embeddings(names, ["{}"]), PromptConfig(embed_dim=4))
    checkpoint_of(model, names).save(folder / "checkpoint.safetensors")
    config = OnnxConfig(folder / "checkpoint.safetensors", folder / "f.onnx", input="uint8")
    onnx_export.export(config)
    return config.output


@pytest.mark.parametrize("module", ["predict", "serve"])
def test_classifying_with_an_exported_file_needs_no_open_clip(module, exported, tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "photo.jpg")
    program = (
        f"import sys, adavipro_fast.{module}\n"
        f"artifact = adavipro_fast.open_artifact({str(exported)!r}, device='cpu')\n"
        f"artifact.classify({str(tmp_path / 'photo.jpg')!r})\n"
        "print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True
    )
    loaded = set(done.stdout.split())
    assert loaded & {"onnxruntime", "openvino"}
    assert not loaded & {"open_clip", "torchvision", "timm", "transformers"}


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


PAGE = (ROOT / "docs" / "pages" / "architecture.md").read_text()
SHARED = ("cores", "device", "errors")


def package_of(module):
    """Return what docs/pages/architecture.md calls the package of a module."""
    names = module.split(".")
    if module in BENCHES or names[0] == "lib":
        return "bench"
    if module in COMMANDS or names[-1] == "__main__":
        return "commands"
    return "shared" if names[1] in SHARED else names[1]


def imported_packages():
    """Return which of our packages each one imports."""
    found = {}
    for module, imported in arrows().items():
        package = package_of(module)
        found.setdefault(package, set()).update(map(package_of, imported))
    return {package: imported - {package} for package, imported in found.items()}


def test_the_table_of_packages_has_the_imports_of_the_code():
    table = re.findall(r"^\| `(\w+)` \| .* \|(?: ([\w, ]+))? \|$", PAGE, re.MULTILINE)
    listed = {package: set(names.split(", ")) - {""} for package, names in table}
    found = imported_packages()
    assert not found["shared"]
    assert listed == {package: imported - {"shared"} for package, imported in found.items()}


def test_imports_point_downwards_in_the_drawing_of_packages():
    (drawing,) = re.findall(r"^```text\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    lines = [line.split() for line in drawing.splitlines() if line.strip() != "|"]
    height = {package: -number for number, line in enumerate(lines) for package in line}
    found = imported_packages()
    assert height.keys() == found.keys()
    for package, imported in found.items():
        assert all(height[name] < height[package] for name in imported), package


def test_commands_are_no_libraries():
    for name, imported in arrows().items():
        # The benches measure the commands; only `make demo` runs a bench after another.
        assert name in BENCHES or name.startswith("lib.") or not imported & COMMANDS, name
        assert imported & BENCHES.keys() <= ({"latency"} if name == "demo" else set()), name
