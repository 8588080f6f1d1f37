"""What `--help` says, and what it costs to say it."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib

import pytest

from classer.data.extras import install_command
from classer.tools.cli.main import COMMANDS, RENAMED, main

from ..conftest import LAUNCHER, ROOT, Classer

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
# With room for a busy machine; alone each takes less than one.
HEAVY = "import sys; sys.stderr.write(' '.join({'jax', 'tensorflow', 'aqt', 'flax', 'grpc'} & sys.modules.keys()))"


def described(help_text: str) -> dict[str, str]:
    """What a help text says of each option and positional argument, without its type and default."""
    text = " ".join(line.strip("│ ") for line in help_text.splitlines() if line.startswith("│"))
    parts = re.split(r"(?:^| )((?:-h, )?--[a-z-]+(?:, --no-[a-z-]+)?|BUNDLE|\[TEXT …\])(?= )", text)
    described = zip(parts[1::2], parts[2::2], strict=True)
    return {name: re.sub(r"^ ([A-Z]+|\{.*?\}\S*) |\((default: .*?|required)\)", "", words) for name, words in described}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_the_command_and_describes_every_option(command: str, classer: Classer) -> None:
    done = classer(command, "--help", COLUMNS="80")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: classer {command} ")
    options = described(done.stdout)
    assert set(re.findall(r"^│ (--[a-z-]+)", done.stdout, re.MULTILINE)) <= {name.split(",")[0] for name in options}
    for name, words in options.items():
        assert len(words.split()) >= 2, name


def test_the_list_of_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    usage = capsys.readouterr().out
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == usage
    for name, command in COMMANDS.items():
        assert (command.load(name).__doc__ or "").splitlines()[0] == command.summary
        assert command.extra in {"", *EXTRAS}
        assert re.search(rf"^  {name} +[A-Z].{{10,}}\.$", usage, re.MULTILINE)
    assert main(["--version"]) == 0
    assert re.fullmatch(r"classer \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


def test_a_former_name_of_a_command_still_works_and_says_its_new_one(capsys: pytest.CaptureFixture[str]) -> None:
    for old, new in RENAMED.items():
        assert main([old, "--data", "nothing.csv", "--out", "nowhere", "--tokens", "1"]) == 2
        deprecation, error = capsys.readouterr().err.splitlines()
        assert deprecation == f"classer: `classer {old}` is deprecated and will be removed; use `classer {new}`."
        assert error.startswith("classer: error: tokens is 1; conversion needs")


def test_help_of_the_launcher_names_its_targets_and_points_to_train(classer: Classer) -> None:
    text = classer("--help", command=LAUNCHER).stdout
    for word in (
        "--target",
        "local",
        "slurm",
        "kubernetes",
        "--devices-per-process",
        "--dry-run",
        "classer train --help",
    ):
        assert word in text, word


def test_the_presets_are_named(classer: Classer) -> None:
    help_text = classer("train", "--help").stdout.replace("\n", " ")
    assert "--preset NAME starts from a preset: banking77, imdb, multitask." in help_text


def loaded_by(*arguments: str) -> set[str]:
    code = f"import sys, atexit\natexit.register(lambda: exec({HEAVY!r}))\n"
    code += "from classer.tools.cli.main import main\nsys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


def test_help_of_classify_loads_nothing_heavy() -> None:
    assert loaded_by("classify", "--help") == set()
    assert "jax" in loaded_by("train", "--help")  # the probe can see what is loaded


def test_classify_loads_neither_jax_nor_tensorflow(server: str) -> None:
    assert loaded_by("classify", "rain", "--server", server) == {"grpc"}


def test_classify_with_a_bundle_and_only_the_base_installed_names_the_extra() -> None:
    code = "import sys\nsys.modules['jax'] = None  # as if it were not installed\n"
    code += "from classer.tools.cli.main import main\nsys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "classify", "rain", "--bundle", "bundle"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(f"needs jax, not installed here: {install_command('local')}")
    assert "Traceback" not in done.stderr
