"""README, CONTRIBUTING and docs/pages say what works: code runs, flags exist, files are there."""

import importlib
import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest

from adavipro_fast import cli, train
from adavipro_fast.compare import CompareConfig
from adavipro_fast.training.run import start_run

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs/pages").glob("*.md"))]
# In a fence, in an indented block or between backticks; `...` stands for more flags.
COMMAND = re.compile(
    r"(?:^(?:\$ |    )|`)(?:\.venv/bin/)?"
    r"((?:python|torchrun|adavipro-)\S* ?[^`\n]*?)(?= *(?:\.\.\.|#.*)?(?:$|`))",
    re.MULTILINE,
)
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
# These run where their page has Python, in the page's order; the others are parsed alone.
RUN = ("evaluate", "to_onnx", "to_task", "relabel", "verify", "predict")


def blocks(page):
    """Return a page's Python."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def commands(page):
    """Return a page's commands: the module, and its arguments."""
    found = []
    for line in COMMAND.findall(page.read_text()):
        words = shlex.split(line)
        if words[0] in SCRIPTS:
            found.append((SCRIPTS[words[0]].split(":")[0], words[1:]))
        elif "-m" in words:
            at = words.index("-m") + 1
            found.append((words[at], words[at + 1 :]))
        elif words[0] == "python" and len(words) > 1:
            script = Path(words[1])
            assert (ROOT / script).is_file(), line
            folder = "adavipro_fast.export." if script.parent.name == "export" else ""
            found.append((folder + script.stem, words[2:]))
    return found


def call(module, arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    # A package's own command lies in its __main__.
    importlib.import_module(
        "adavipro_fast.__main__" if module == "adavipro_fast" else module
    ).main()


@pytest.fixture(scope="module")
def workplace(small, folder, tmp_path_factory):
    """The folder in which a reader of the pages would be: images, and one trained run."""
    root = tmp_path_factory.mktemp("reader")
    for name in ("my_images", "my_folder", "flowers", "signs"):
        (root / name).symlink_to(folder)
    (root / "photo.jpg").symlink_to(next((folder / "test").rglob("*.jpg")))
    start_run(small(root / "runs" / "mine", epochs=1))
    for task in ("a", "b"):
        (root / "runs" / task).symlink_to("mine")
    return root


@pytest.fixture(scope="module")
def results():
    """Last lines of the commands that ran, for a page may show another one's."""
    return {}


def parsed(module, arguments, monkeypatch):
    """Parse a command line by the command's own parser, and run nothing."""
    monkeypatch.setattr(cli, "run", lambda *_, **__: None)
    try:
        if module == "adavipro_fast.train":
            monkeypatch.setattr(sys, "argv", [module, *arguments])
            train.parse()
        elif module == "adavipro_fast.compare":
            cli.parse(CompareConfig, None, arguments)
        else:
            call(module, arguments, monkeypatch)
    except SystemExit as stop:
        pytest.fail(f"{module} {shlex.join(arguments)} exits with {stop.code}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_line_has_flags_that_exist(page, monkeypatch, capsys):
    for module, arguments in commands(page):
        parsed(module, arguments, monkeypatch)


def test_a_flag_that_does_not_exist_is_found(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text(
        "Try `python -m adavipro_fast.cache --clean`, or:\n\n    adavipro-cache --clean\n"
    )
    assert commands(page) == [("adavipro_fast.cache", ["--clean"])] * 2
    with pytest.raises(pytest.fail.Exception, match="cache --clean"):
        parsed(*commands(page)[0], monkeypatch)


def keys(text):
    return set(re.findall(r'"(\w+)":', text))


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem
)
def test_code_runs_and_commands_print_the_keys_that_the_page_shows(
    page, workplace, results, monkeypatch, capsys
):
    monkeypatch.chdir(workplace)
    for module, arguments in commands(page):
        if module.split(".")[-1] not in RUN:
            continue
        line = shlex.join(arguments).replace("'", "")
        if (module, line) not in results:
            # As a shell does.
            expanded = [
                name for word in arguments for name in sorted(map(str, Path().glob(word))) or [word]
            ]
            call(module, expanded, monkeypatch)
            results[module, line] = capsys.readouterr().out.splitlines()[-1]
        if not re.search(rf"^\$ .*{re.escape(line)}$", page.read_text(), re.MULTILINE):
            # Within a sentence or a table it only has to run.
            continue
        shown = re.search(rf"{re.escape(line)}\n(\{{.*\}})$", page.read_text(), re.MULTILINE)
        assert shown, f"{page.name} shows no result of {module} {line}"
        assert keys(shown[1]) <= keys(results[module, line])
    namespace = {}
    for block in blocks(page):
        exec(compile(block, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_named_files_exist(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", text):
        assert (page.parent / link).is_file(), link
    for name in re.findall(r"`((?:adavipro_fast|bench|docs|export|kernels|tests)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), name
    phony = re.search(r"\.PHONY: (.*)", (ROOT / "Makefile").read_text())[1].split()
    assert set(re.findall(r"(?:`|    )make (\w+)", text)) <= set(phony)


@pytest.mark.parametrize("shell", ["bash", "zsh"])
@pytest.mark.parametrize("module", sorted({path.split(":")[0] for path in SCRIPTS.values()}))
def test_shell_completion_knows_a_commands_own_flags(module, shell, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["adavipro", "--tyro-print-completion", shell])
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(module).main()
    assert not stop.value.code
    flag = {"train": "--prompt-init", "cache": "--clear", "evaluate": "--batch-size"}
    assert flag.get(module.split(".")[-1], "--") in capsys.readouterr().out
