"""Checkpoints that are damaged, half written, or cannot be written; and their state on other numbers of devices."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from classer.model.classifier import TextClassifier
from classer.model.config import EncoderConfig
from classer.tests.helpers import printed, with_devices
from classer.tests.processes import run_all
from classer.train.checkpoints import Checkpoints, Progress
from classer.train.step import TrainState, abstract_state, init_state

CONFIG = EncoderConfig(vocab_size=20, num_layers=1, d_model=16, num_heads=2, d_ff=32, max_positions=16)
MODEL, OPTIMIZER = TextClassifier(CONFIG, 3), optax.adam(1e-3)
TIMEOUT = 240
HELPER = Path(__file__).with_name("checkpoint_worker.py")


def state_at(step: int) -> TrainState:
    shapes = abstract_state(MODEL, OPTIMIZER).params
    params = jax.tree.map(lambda leaf: np.full(leaf.shape, step, leaf.dtype), shapes)
    return init_state(params, OPTIMIZER)._replace(step=jnp.asarray(step, jnp.int32))


def progress_at(step: int, best: int = 1) -> Progress:
    return Progress(step, {"next_step": step}, 0.5 - 0.1 * (step - best), 0.5, best, step - best)


def save_steps(folder: Path, *steps: int) -> None:
    with Checkpoints(folder, config={"seed": 7}) as checkpoints:
        for step in steps:
            checkpoints.save(state_at(step), progress_at(step))


def restored(folder: Path) -> tuple[int, int] | None:
    """(what the parameters say, what the progress says) of the newest checkpoint."""
    with Checkpoints(folder) as checkpoints:
        found = checkpoints.restore_latest(abstract_state(MODEL, OPTIMIZER))
    if found is None:
        return None
    state, progress = found
    values = {float(leaf.flat[0]) for leaf in map(np.asarray, jax.tree.leaves(state.params))}
    assert values == {float(state.step)}
    return int(state.step), progress.data["next_step"]


def largest_file(folder: Path) -> Path:
    return max((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def test_the_last_two_and_the_best_are_kept_with_checksums_and_config(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2, 3, 4)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["1", "3", "4"]
    assert sorted(path.name for path in tmp_path.glob("checksums-*")) == [
        f"checksums-{step}.json" for step in (1, 3, 4)
    ]
    assert json.loads((tmp_path / "4" / "config" / "metadata").read_text()) == {"seed": 7}
    assert restored(tmp_path) == (4, 4)


@pytest.mark.parametrize("damage", ["a byte", "the end", "a file", "a file of metadata"])
def test_a_damaged_newest_checkpoint_is_put_aside_and_the_one_before_is_used(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "checkpoints"
    save_steps(folder, 1, 2, 3)
    victim = largest_file(folder / "3")
    content = victim.read_bytes()
    if damage == "a byte":
        middle = len(content) // 2
        victim.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif damage == "the end":
        victim.write_bytes(content[: len(content) // 2])
    elif damage == "a file":
        victim.unlink()
    else:
        (folder / "3" / "progress" / "metadata").write_text("{")
    found, said = printed(lambda: restored(folder))
    assert found == (2, 2)
    assert "the checkpoint of step 3 is damaged (its file" in said[0]
    assert "going on from step 2" in said[0]
    assert (tmp_path / "checkpoints-damaged" / "3").is_dir()
    save_steps(folder, 3)
    assert restored(folder) == (3, 3)


def test_damage_that_no_checksum_tells_of_is_found_in_reading(tmp_path: Path) -> None:
    """A run may be killed after a checkpoint has become whole and before its checksums are written."""
    folder = tmp_path / "checkpoints"
    save_steps(folder, 1, 2)
    (folder / "checksums-2.json").unlink()
    victim = largest_file(folder / "2")
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    found, said = printed(lambda: restored(folder))
    assert found == (1, 1)
    assert "the checkpoint of step 2 is damaged" in said[0]


def test_a_damaged_checkpoint_is_one_sentence_and_no_traceback(tmp_path: Path) -> None:
    """Orbax and asyncio log a traceback for each array that they could not read."""
    folder = tmp_path / "checkpoints"
    save_steps(folder, 1, 2)
    (folder / "checksums-2.json").unlink()
    for file in (folder / "2" / "state").rglob("d/*"):
        file.write_bytes(b"")
    done = run_helper("noisy", folder)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    (line,) = done.stdout.splitlines()
    assert "the checkpoint of step 2 is damaged (it cannot be read: " in line
    assert len(line) < 300 + 2 * len(str(folder))


def test_a_half_written_checkpoint_is_passed_over(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    (tmp_path / "2").rename(tmp_path / "3.orbax-checkpoint-tmp-7")
    found, said = printed(lambda: restored(tmp_path))
    assert found == (1, 1)
    assert said == [
        "Warning: a checkpoint was half written when the run ended (3.orbax-checkpoint-tmp-7); it is passed over."
    ]
    assert not list(tmp_path.glob("*tmp*"))
    assert printed(lambda: restored(tmp_path)) == ((1, 1), [])


def test_when_all_are_damaged_the_run_begins_anew(tmp_path: Path) -> None:
    save_steps(tmp_path / "checkpoints", 1)
    largest_file(tmp_path / "checkpoints" / "1").write_bytes(b"")
    found, said = printed(lambda: restored(tmp_path / "checkpoints"))
    assert found is None
    assert "there is none before it, so the run begins anew" in said[0]


def test_where_the_best_checkpoint_is_lost_the_best_to_come_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_steps(tmp_path / "checkpoints", 1, 2, 3)
    largest_file(tmp_path / "checkpoints" / "1").unlink()
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        found = checkpoints.restore_latest(abstract_state(MODEL, OPTIMIZER))
    assert found is not None
    assert (found[1].best_score, found[1].best_step) == (-1.0, 3)
    assert "the best epoch is lost" in capsys.readouterr().out.splitlines()[1]


def run_helper(*arguments: object, devices: int = 1) -> subprocess.CompletedProcess[str]:
    return run_all([[sys.executable, HELPER, *arguments]], [with_devices(devices)])[0]


def run_two(*arguments: object) -> list[subprocess.CompletedProcess[str]]:
    """Two processes of one device each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    job = with_devices(1) | {"CLASSER_COORDINATOR": coordinator, "CLASSER_NUM_PROCESSES": "2"}
    environments = [job | {"CLASSER_PROCESS_ID": str(rank)} for rank in range(2)]
    done = run_all([[sys.executable, HELPER, *arguments]] * 2, environments)
    assert [one.returncode for one in done] == [0, 0], [one.stderr[-3000:] for one in done]
    return done


def test_damage_that_one_of_two_processes_meets_is_heard_by_both(tmp_path: Path) -> None:
    """Each reads its own half; nothing but the reading tells, because there are no checksums yet."""
    folder = tmp_path / "checkpoints"
    run_two("save", folder, 2, 1)
    (folder / "checksums-5.json").unlink()
    for file in (folder / "5" / "state" / "ocdbt.process_1" / "d").iterdir():
        file.write_bytes(b"")
    first, second = run_two("check", folder, 2, 1, 4)
    assert "the checkpoint of step 5 is damaged" in first.stdout
    assert "Traceback" not in first.stderr + second.stderr
    assert (tmp_path / "checkpoints-damaged" / "5").is_dir()


def test_a_full_disk_is_a_clear_error_and_the_checkpoint_before_stays_whole(tmp_path: Path) -> None:
    """Files may not grow beyond a limit, which fails in writing as a full disk does; a real one is the slow test."""
    save_steps(tmp_path, 1)
    done = run_helper("limited", tmp_path)
    assert done.returncode == 2, done.stderr
    assert "could not be written" in done.stdout
    assert "The checkpoints before it are whole: make room" in done.stdout
    assert restored(tmp_path) == (1, 1)


@pytest.mark.slow
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """A file system of 1 MB in a mount namespace of its own, which ends with the process."""
    inside = f"mount -t tmpfs -o size=1m none {tmp_path} && exec {sys.executable} {HELPER} full {tmp_path}"
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("skipped: this system lets nobody mount a file system of his own")
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", inside],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "No space left" in done.stdout
    step = int(done.stdout.splitlines()[-1].removeprefix("the newest whole one is of step "))
    assert step >= 1


@pytest.mark.slow
def test_a_checkpoint_of_8_devices_is_read_on_4_2_and_1(tmp_path: Path) -> None:
    """Every parameter and moment is the same, and lies as the layout of those devices says."""
    for action, devices, fsdp, tensor in (
        ("save", 8, 2, 2),
        ("check", 4, 4, 1),
        ("check", 2, 1, 2),
        ("check", 1, 1, 1),
    ):
        done = run_helper(action, tmp_path, fsdp, tensor, devices=devices)
        assert done.returncode == 0, done.stdout + done.stderr
