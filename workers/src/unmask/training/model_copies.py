"""Models in object stores, as a job's first weights or tokenizer: copied here before they are read.

Each machine copies a model once, whatever the number of its processes, and again only when an object has
changed. Weights are copied when they are needed: a run that goes on from a checkpoint needs none but those
beside which adapters learn. What is damaged is found when it is read, by the model's ``checksums.json``.
"""

import hashlib
import json
import logging
from collections.abc import Collection, Mapping
from pathlib import Path

from unmask.errors import ModelError, UnmaskError
from unmask.models.registry import CONFIG
from unmask.training.mirror import node_lock
from unmask.training.object_store import ObjectStore
from unmask_api.places import in_store, model_copies
from unmask_api.train_job import TrainSpec

__all__ = ["ModelCopies"]

_log = logging.getLogger(__name__)

_WEIGHTS = ".safetensors"
_REMEDY = "see to the object store and its credentials"


class ModelCopies:
    """Copies of the models that a job names in object stores; every process calls the same methods."""

    def __init__(self, spec: TrainSpec, environment: Mapping[str, str]) -> None:
        """Copy what ``spec`` names to the folder that ``environment`` does; nothing is copied yet."""
        self._spec, self._folder = spec, model_copies(environment)
        self._copies: dict[str, _Copy] = {}

    def described(self) -> TrainSpec:
        """The job with folders of this machine for models in object stores, which lack their weights yet.

        Raises:
            ModelError: There is no model.
            UsageError: The package for such stores is not installed.
            UnmaskError: The store does not answer.
        """
        model = self._spec.model
        if model.init.uri is not None and in_store(model.init.uri):
            path = self._copy(model.init.uri, needs=CONFIG)
            model = model.model_copy(update={"init": model.init.model_copy(update={"uri": str(path)})})
        if model.tokenizer is not None and in_store(model.tokenizer.uri):
            path = self._copy(model.tokenizer.uri, needs="tokenizer.json")
            model = model.model_copy(
                update={"tokenizer": model.tokenizer.model_copy(update={"uri": str(path)})}
            )
        if self._spec.lora is not None:  # which is told from others by its weights
            self.complete()
        return self._spec.model_copy(update={"model": model})

    def complete(self) -> None:
        """Copy the weights that the run starts from, too.

        Raises:
            UnmaskError: The store does not answer.
        """
        uri = self._spec.model.init.uri
        if uri in self._copies:
            self._copies[uri].bring(weights=True)

    def _copy(self, uri: str, *, needs: str) -> Path:
        if uri not in self._copies:
            self._copies[uri] = _Copy(uri, self._folder)
        copy = self._copies[uri]
        if needs not in copy.versions:
            raise ModelError(
                f"{uri}: holds no {needs}, so it is no model, or one that is not complete; correct the uri, "
                "or copy the model anew"
            )
        copy.bring(weights=False)
        return copy.path


class _Copy:
    """A copy of one model."""

    def __init__(self, uri: str, folder: Path) -> None:
        self._store = ObjectStore(uri)
        try:
            names = [name for name in self._store.sizes() if "/" not in name and not name.startswith(".")]
            self.versions = {name: self._store.version(name) for name in sorted(names)}
        except OSError as error:
            raise UnmaskError(f"{error}; {_REMEDY}") from error
        about = json.dumps([self._store.uri, self.versions])
        self.path = folder / hashlib.sha256(about.encode()).hexdigest()[:16]

    def bring(self, *, weights: bool) -> None:
        names = [name for name in self.versions if weights or not name.endswith(_WEIGHTS)]
        with node_lock(self.path, "fetch"):
            missing = [name for name in names if not (self.path / name).exists()]
            if missing:
                _log.info("copying %s (%d files) to %s", self._store.uri, len(missing), self.path)
            self._bring(missing)

    def _bring(self, names: Collection[str]) -> None:
        for name in names:
            scratch = self.path / f".{name}.part"
            try:
                self._store.download(name, scratch)
                scratch.replace(self.path / name)
            except OSError as error:
                raise UnmaskError(f"{error}; {_REMEDY}") from error
            finally:
                scratch.unlink(missing_ok=True)
