"""Configurations that older versions wrote, with the import paths of today."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf, flag_override

from edit.moved import COMMANDS, current


def bring_up_to_date(cfg: DictConfig) -> None:
    """Replace, in place, each former path in a `_target_`, and each former command in `before` and `after`."""
    _rename_classes(cfg)
    for when in ("before", "after"):
        stages = cfg[when] if when in cfg else None
        if isinstance(stages, ListConfig):
            for index in range(len(stages)):
                _rename_command(stages[index])


def _rename_classes(node: Any) -> None:
    if isinstance(node, DictConfig):
        with flag_override(node, "readonly", False):
            for key in node:
                if key == "_target_" and isinstance(path := node._get_node(key)._value(), str):
                    node[key] = current(path)
                elif not OmegaConf.is_missing(node, key) and not OmegaConf.is_interpolation(node, key):
                    _rename_classes(node[key])
    elif isinstance(node, ListConfig):
        for index in range(len(node)):
            if not OmegaConf.is_missing(node, index) and not OmegaConf.is_interpolation(node, index):
                _rename_classes(node[index])


def _rename_command(stage: Any) -> None:
    """`stage`: the words of one command, or a name with them; the first word may name a module."""
    if isinstance(stage, DictConfig) and len(stage) == 1:
        stage = stage._get_node(next(iter(stage)))
    if isinstance(stage, ListConfig) and len(stage):
        word = stage._get_node(0)._value()
        if isinstance(word, str) and word in COMMANDS:
            with flag_override(stage, "readonly", False):
                stage[0] = COMMANDS[word]
