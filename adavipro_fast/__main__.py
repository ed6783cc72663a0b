"""List the commands: `python -m adavipro_fast`."""

import ast
from importlib.resources import files
from importlib.resources.abc import Traversable

COMMANDS = (
    *("train", "compare", "evaluate", "predict", "tasks", "serve", "app"),
    *("push", "cache"),
)
EXPORTERS = ("to-onnx", "to-tensorrt", "to-triton", "to-task", "relabel", "verify")


def main() -> None:
    """Print each command with the first line of its module."""
    # In a clone, export/ is beside the package's folder.
    package, export = files("adavipro_fast"), files("adavipro_fast.export")
    for name in COMMANDS:
        print(f"adavipro-{name:<20} {purpose(package, name)}")
    for name in EXPORTERS:
        print(f"adavipro-{name:<20} {purpose(export, name.replace('-', '_'))}")
    print(f"python -m adavipro_fast.demo  {purpose(package, 'demo')}")


def purpose(folder: Traversable, name: str) -> str:
    """Return the first line of a module's docstring, without the command line."""
    module = ast.parse((folder / f"{name}.py").read_text())
    return (ast.get_docstring(module) or "").splitlines()[0].split(": `")[0]


if __name__ == "__main__":
    main()
