"""List the commands: `python -m adavipro_fast`."""

import ast
from importlib.resources import files

COMMANDS = (
    *("train", "compare", "evaluate", "predict", "tasks", "serve", "app"),
    *("push", "cache", "demo"),
)


def main() -> None:
    """Print each command with the first line of its module."""
    for name in COMMANDS:
        module = ast.parse((files("adavipro_fast") / f"{name}.py").read_text())
        purpose = (ast.get_docstring(module) or "").splitlines()[0].split(": `")[0]
        print(f"python -m adavipro_fast.{name:<10} {purpose}")


if __name__ == "__main__":
    main()
