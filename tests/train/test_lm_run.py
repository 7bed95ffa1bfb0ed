"""What a second start of the same command means."""

import json

import pytest

from pipeline.errors import UserError
from pipeline.train import lm_loop, lm_run
from pipeline.train.lm_run import REPORT
from tests.train.tiny_lm import SETTINGS, TINY, tiny_model


def test_training_does_not_go_on_with_other_tokens(tmp_path):
    work = lm_run.start(tmp_path / "lm", SETTINGS)
    work.data = "one text"
    model = tiny_model()
    work.save(4, model, lm_loop.build_optimizer(model, TINY))
    work.data = "another"
    with pytest.raises(UserError, match=r"other tokens.*remove .*\.lm\.training"):
        work.resume(model, lm_loop.build_optimizer(model, TINY))


def test_a_second_start_names_what_differs_and_keeps_what_there_is(tmp_path):
    to = tmp_path / "lm"
    model = tiny_model()
    work = lm_run.start(to, SETTINGS)
    work.save(4, model, lm_loop.build_optimizer(model, TINY))
    with pytest.raises(UserError, match=r"another process .* is making .*lm; wait"):
        lm_run.start(to, SETTINGS)
    work.release()
    other = {
        "lm": {"seed": 1, "checkpoint_every": 7},
        "dataset": {"context": 10},
        "source": {"dataset": {"sha256": "b"}},
    }
    with pytest.raises(UserError, match=r"lm\.seed=1 \(was 0\), the dataset's files have changed; go on with those"):
        lm_run.start(to, other)
    assert lm_run.start(to, {**SETTINGS, "lm": {"seed": 0, "checkpoint_every": 7}}).checkpoint.name == "step_4"


def test_what_was_begun_without_a_checkpoint_gives_way_to_other_settings(tmp_path):
    work = lm_run.start(tmp_path / "lm", SETTINGS)
    work.tokenizer.mkdir()
    work.release()
    kept = lm_run.start(tmp_path / "lm", SETTINGS)
    assert kept.tokenizer.exists()
    kept.release()
    new = lm_run.start(tmp_path / "lm", {**SETTINGS, "lm": {"seed": 1}})
    assert not new.tokenizer.exists()


def test_a_finished_model_is_there_or_in_the_way(tmp_path):
    to = tmp_path / "lm"
    to.mkdir()
    with pytest.raises(UserError, match="was not made by clt pretrain; choose another to="):
        lm_run.start(to, SETTINGS)
    (to / REPORT).write_text(json.dumps({**SETTINGS, "command": "clt pretrain"}))
    assert lm_run.start(to, SETTINGS) is None
    with pytest.raises(UserError, match=r"lm\.seed=1 \(was 0\); choose another to="):
        lm_run.start(to, {**SETTINGS, "lm": {"seed": 1}})
    assert [path.name for path in tmp_path.iterdir()] == ["lm"]
