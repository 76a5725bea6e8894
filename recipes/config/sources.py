"""Where Hydra finds our configuration files, and what those files may contain."""

from __future__ import annotations

import functools
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.config_store import ConfigStore
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from omegaconf import OmegaConf

from edit.inputs.trust import read_yaml
from recipes.config import composed
from recipes.config.schema import Root


class Files(FileConfigSource):
    """The YAML files of a folder, each looked at before Hydra reads it, and the choices composed of them."""

    def load_config(self, config_path: str) -> ConfigResult:
        file = Path(self.path, self._normalize_file_name(config_path))
        try:
            if (made := composed.made(Path(self.path), config_path)) is not None:
                header = {"package": made.package}
                return ConfigResult(self.provider, self.full_path(), OmegaConf.create(made.content), header)
            if not file.exists():
                return super().load_config(config_path)  # Hydra says what is missing
            state = file.stat()
            known = _loaded(file, state.st_mtime_ns, state.st_size)
        except RecursionError as error:
            raise ValueError(f"{file} is nested too deep: no settings need that") from error
        config = deepcopy(known.config)
        composed.finish(config_path, config)
        return replace(known, provider=self.provider, path=self.full_path(), config=config, header=dict(known.header))

    def is_config(self, config_path: str) -> bool:
        return super().is_config(config_path) or composed.made(Path(self.path), config_path) is not None

    def is_group(self, config_path: str) -> bool:
        return super().is_group(config_path) or (config_path == "size" and bool(composed.families(Path(self.path))))

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        if config_path == "size":
            return [] if results_filter == ObjectType.GROUP else composed.names(Path(self.path), "size")
        own = super().list(config_path, results_filter)
        group = not config_path and results_filter != ObjectType.CONFIG and self.is_group("size")
        return sorted({*own, *(["size"] if group else [])})


@functools.lru_cache(maxsize=512)
def _loaded(file: Path, changed: int, length: int) -> ConfigResult:
    """A file that Hydra reads once as long as it stays as it is: a launch composes twice, a sweep for each job."""
    read_yaml(file)
    return FileConfigSource("file", str(file.parent)).load_config(file.name)


def register() -> None:
    """Make `root_schema` available to defaults lists, and replace Hydra's file source by `Files`.

    Files cannot read the environment: its values would be written into config.yaml and reports.
    """
    if "root_schema.yaml" not in ConfigStore.instance().repo:  # 20 ms
        ConfigStore.instance().store(name="root_schema", node=Root)
    Plugins.instance()  # registers Hydra's own sources, one of which is replaced
    SourcesRegistry.instance().types[Files.scheme()] = Files
    OmegaConf.register_new_resolver("oc.env", _refuse_environment, replace=True)


def _refuse_environment(*names: Any) -> NoReturn:
    raise ValueError(
        f"oc.env:{','.join(map(str, names))} reads the environment, which would be written into config.yaml and "
        f'reports: write the value, or let the shell put it in, as in key="${names[0]}"'
    )
