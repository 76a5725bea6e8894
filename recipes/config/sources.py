"""Where Hydra finds our configuration files, and what those files may contain."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from omegaconf import OmegaConf

from edit.inputs.trust import read_yaml
from recipes.config.schema import Root


class Files(FileConfigSource):
    """The YAML files of a folder, each checked before Hydra reads it."""

    def load_config(self, config_path: str) -> ConfigResult:
        file = Path(self.path, self._normalize_file_name(config_path))
        try:
            if file.exists():
                read_yaml(file)
            return super().load_config(config_path)
        except RecursionError as error:
            raise ValueError(f"{file} is nested too deep: no settings need that") from error


def register() -> None:
    """Make `root_schema` available to defaults lists, and replace Hydra's file source by `Files`.

    Files cannot read the environment: its values would be written into config.yaml and reports.
    """
    ConfigStore.instance().store(name="root_schema", node=Root)
    Plugins.instance()  # registers Hydra's own sources, one of which is replaced
    SourcesRegistry.instance().types[Files.scheme()] = Files
    OmegaConf.register_new_resolver("oc.env", _refuse_environment, replace=True)


def _refuse_environment(*names: Any) -> NoReturn:
    raise ValueError(
        f"oc.env:{','.join(map(str, names))} reads the environment, which would be written into config.yaml and "
        f'reports: write the value, or let the shell put it in, as in key="${names[0]}"'
    )
