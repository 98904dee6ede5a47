"""The text: what can be learnt, and which batch belongs to a step."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.ranks import UserError
from launch.task import read_corpus


def test_folders_without_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "picture").write_bytes(b"\0" * 1000)
    (tmp_path / ".hidden").write_text("text " * 100)
    with pytest.raises(UserError, match="0 bytes of text in it, and a sequence takes 34"):
        read_corpus(tmp_path, context=32)
    with pytest.raises(UserError, match="no such folder"):
        read_corpus(tmp_path / "nowhere", context=32)


def test_a_batch_is_a_function_of_seed_and_step(text: Path) -> None:
    corpus = read_corpus(text, context=8)
    batch = corpus.batch(seed=1, step=5, size=4, context=8)
    assert batch.shape == (4, 9)
    assert batch.equal(read_corpus(text, context=8).batch(1, 5, 4, 8))
    assert not batch.equal(corpus.batch(1, 6, 4, 8))
    assert not batch.equal(corpus.batch(2, 5, 4, 8))


def test_a_share_of_the_batches_is_noise(text: Path) -> None:
    """The same steps in each run, and the others as they are without."""
    corpus = read_corpus(text, context=8)
    clean = [corpus.batch(1, step, 4, 8) for step in range(400)]
    noisy = [corpus.batch(1, step, 4, 8, corrupt=0.1) for step in range(400)]
    changed = [not a.equal(b) for a, b in zip(clean, noisy, strict=True)]
    assert 20 <= sum(changed) <= 60
    assert all(b.equal(corpus.batch(1, step, 4, 8, 0.1)) for step, b in enumerate(noisy))
    assert not any(corpus.batch(1, step, 4, 8, 1.0).equal(clean[step]) for step in range(5))
