"""List the commands: `python -m adavipro_fast`."""

import ast
from importlib.resources import files
from importlib.resources.abc import Traversable

COMMANDS = (
    *("train", "compare", "evaluate", "predict", "tasks", "serve", "app"),
    *("push", "cache", "demo"),
)
EXPORTERS = ("to-onnx", "to-tensorrt", "to-triton", "to-task", "relabel", "verify")


def main() -> None:
    """Print each command with the first line of its module."""
    for name in COMMANDS:
        print(f"python -m adavipro_fast.{name:<10} {purpose(files('adavipro_fast'), name)}")
    # In a clone, export/ is beside the package's folder.
    export = files("adavipro_fast.export")
    for name in EXPORTERS:
        print(f"adavipro-{name:<25} {purpose(export, name.replace('-', '_'))}")


def purpose(folder: Traversable, name: str) -> str:
    """Return the first line of a module's docstring, without the command line."""
    module = ast.parse((folder / f"{name}.py").read_text())
    return (ast.get_docstring(module) or "").splitlines()[0].split(": `")[0]


if __name__ == "__main__":
    main()
