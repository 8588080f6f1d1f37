"""API keys: the stored entries, authentication, rates and quotas."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import json
import os
from pathlib import Path

import pytest

from classer.data.errors import InputError
from classer.serve.ops import keys as keys_module
from classer.serve.ops.keys import Allowance, ApiKey, KeyRing, make_key, read_keys, write_keys
from classer.serve.wire.errors import Overloaded, Unauthenticated


class Clock:
    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def test_what_is_stored_is_a_hash_and_what_is_shown_is_not_stored(tmp_path: Path) -> None:
    entry, key = make_key("team-a", rate=5, per_day=100)
    write_keys(tmp_path / "keys.json", [entry])
    content = (tmp_path / "keys.json").read_text()
    secret = key.split("_", 2)[2]
    assert secret not in content
    assert entry.sha256 == hashlib.sha256(secret.encode()).hexdigest()
    assert len(secret) == 43  # 256 bits
    assert (tmp_path / "keys.json").stat().st_mode & 0o777 == 0o600
    assert read_keys(tmp_path / "keys.json") == [entry]
    assert make_key("team-a")[1] != key
    assert os.listdir(tmp_path) == ["keys.json"]


def test_only_the_whole_key_is_accepted(tmp_path: Path) -> None:
    (entry, key), (other, _) = make_key("a"), make_key("b")
    write_keys(tmp_path / "keys.json", [entry, other])
    ring = KeyRing(tmp_path / "keys.json")
    assert ring.find(key).entry == entry
    _, key_id, secret = key.split("_", 2)
    bad = ["", None, key[:-1], key + "x", key.upper(), secret, f"ck_{other.id}_{secret}", f"ck_{key_id}_", "ck__", "é"]
    for presented in bad:
        with pytest.raises(Unauthenticated) as refused:
            ring.find(presented)
        if presented:
            assert presented not in str(refused.value)


def test_keys_are_compared_in_constant_time_known_or_not(tmp_path: Path, monkeypatch) -> None:
    entry, key = make_key("a")
    write_keys(tmp_path / "keys.json", [entry])
    compared, compare = [], hmac.compare_digest

    def spy(a: str, b: str) -> bool:
        compared.append((len(a), len(b)))
        return compare(a, b)

    monkeypatch.setattr(keys_module.hmac, "compare_digest", spy)
    ring = KeyRing(tmp_path / "keys.json")
    ring.find(key)
    for presented in ("ck_unknown_secret", "nonsense"):
        with pytest.raises(Unauthenticated):
            ring.find(presented)
    assert compared == [(64, 64)] * 3


def test_the_rate_holds_on_average_and_no_call_is_too_large() -> None:
    clock = Clock()
    entry = dataclasses.replace(make_key("a")[0], rate=10.0)
    allowance = Allowance(entry, clock=clock)
    allowance.take(50)  # five seconds' worth at once, on what a second saved up
    with pytest.raises(Overloaded) as refused:
        allowance.take(1)
    assert refused.value.reason == "RATE_LIMITED"
    assert refused.value.retry_seconds == pytest.approx(4.1)
    clock.now += 4.05
    with pytest.raises(Overloaded):
        allowance.take(1)
    clock.now += 0.06
    allowance.take(1)
    # Over a long time no more than the rate and what was saved up gets through.
    passed = 0
    for _ in range(2000):
        clock.now += 0.01
        try:
            allowance.take(1)
            passed += 1
        except Overloaded:
            pass
    assert 199 <= passed <= 202


def test_the_quota_ends_with_the_day() -> None:
    now = Clock(86_400 * 100 + 10.0)
    allowance = Allowance(dataclasses.replace(make_key("a")[0], per_day=100), now=now)
    allowance.take(60)
    with pytest.raises(Overloaded, match="leaves 40, fewer") as refused:
        allowance.take(41)
    assert refused.value.retry_seconds == pytest.approx(86_390)
    assert refused.value.reason == "QUOTA_EXCEEDED"
    allowance.take(40)
    now.now += 86_400
    allowance.take(100)


def test_a_share_of_the_limits_is_granted_by_each_of_several_processes() -> None:
    clock = Clock()
    entry = dataclasses.replace(make_key("a")[0], rate=10.0, per_day=100)
    allowance = Allowance(entry, share=0.25, clock=clock)
    allowance.take(2)
    with pytest.raises(Overloaded):
        allowance.take(1)
    clock.now += 10
    with pytest.raises(Overloaded, match="quota of 25"):
        allowance.take(24)


def test_a_changed_file_counts_at_once_and_a_broken_one_not_at_all(tmp_path: Path, caplog) -> None:
    path, clock = tmp_path / "keys.json", Clock()
    (first, first_key), (second, second_key) = make_key("first", per_day=10), make_key("second")
    write_keys(path, [first])
    ring = KeyRing(path, clock=clock)
    ring.find(first_key).take(8)
    write_keys(path, [first, second])
    clock.now += 2
    assert ring.find(second_key).entry.name == "second"
    with pytest.raises(Overloaded):  # what was used stays used
        ring.find(first_key).take(3)
    path.write_text("{")
    clock.now += 2
    assert ring.find(second_key)
    assert "keys stay what they were" in caplog.text
    write_keys(path, [first])
    clock.now += 2
    with pytest.raises(Unauthenticated, match="revoked"):
        ring.find(second_key)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "not valid JSON"),
        ("[]", 'no list "keys"'),
        ('{"keys": [{"name": "a"}]}', "key 1: an object with name, id and sha256"),
        ('{"keys": [{"name": "a", "id": "b", "sha256": "c"}]}', "64 hexadecimal"),
        (json.dumps({"keys": [{"name": "a", "id": "b", "sha256": "é" * 64}]}), "64 hexadecimal"),
        (json.dumps({"keys": [{"name": "a", "id": "b", "sha256": "A" * 64}]}), "in lower case"),
        ('{"keys": [{"name": "a", "id": 1, "sha256": "c"}]}', "key 1: the field 'id'"),
        (None, "cannot be read"),
    ],
)
def test_a_bad_file_is_refused_with_a_sentence(tmp_path: Path, content: str | None, says: str) -> None:
    path = tmp_path / "keys.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=says):
        KeyRing(path)


def test_a_file_that_others_can_write_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    write_keys(path, [])
    path.chmod(0o622)
    with pytest.raises(InputError, match="chmod go-w"):
        read_keys(path)


def test_names_and_ids_are_unique(tmp_path: Path) -> None:
    entry = make_key("a")[0]
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"keys": [dataclasses.asdict(entry), dataclasses.asdict(make_key("a")[0])]}))
    with pytest.raises(InputError, match="two keys have the name 'a'"):
        read_keys(path)


@pytest.mark.parametrize("name", ["", "a b", "é", "x" * 65, "a\n"])
def test_names_are_plain(name: str) -> None:
    with pytest.raises(InputError, match="1 to 64"):
        make_key(name)


def test_an_entry_needs_no_more_than_its_hash() -> None:
    assert ApiKey("a", "b", "0" * 64).rate is None
