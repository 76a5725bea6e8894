import logging

from small_runs import config

from recipes.runtime.trainer import make_trainer


def test_lightning_s_advice_stays_away_although_its_import_turns_its_messages_on(tmp_path):
    logger = logging.getLogger("lightning.pytorch")
    before = logger.level
    logger.setLevel(logging.INFO)  # as its import does, which comes after ours
    try:
        make_trainer(config(tmp_path).trainer, tmp_path, [], [])
        assert not logger.isEnabledFor(logging.INFO) and logger.isEnabledFor(logging.WARNING)
    finally:
        logger.setLevel(before)
