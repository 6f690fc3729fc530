"""What every family's configuration has in common. No torch is needed here."""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from unmask.errors import ModelError

__all__ = ["ModelConfig"]


class ModelConfig(BaseModel):
    """A ``config.json``: the published keys under their published names.

    Keys that we do not use are kept and written back. A key whose value would change the
    computation in a way that we do not implement is refused, never ignored.
    """

    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())

    architecture: ClassVar[str]
    """The name in ``architectures`` that selects the family."""

    architectures: tuple[str, ...]
    model_type: str
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    head_dim: PositiveInt
    max_position_embeddings: PositiveInt
    rms_norm_eps: float = Field(default=1e-6, gt=0)
    initializer_range: float = Field(default=0.02, gt=0)
    mask_token_id: int = Field(ge=0)
    """The embedding row that stands at masked positions."""
    eos_token_id: int = Field(ge=0)
    pad_token_id: int = Field(ge=0)

    @classmethod
    def parse(cls, data: Mapping[str, Any], *, source: str) -> Self:
        """Validate a ``config.json``'s content.

        Raises:
            ModelError: Naming ``source``, the key, what it holds and what is allowed.
        """
        try:
            return cls.model_validate(dict(data))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"]) or "config"
            message = first["msg"].removeprefix("Value error, ")
            got = f" (got {first['input']!r})" if first["loc"] and first["type"] != "missing" else ""
            raise ModelError(f"{source}: {key}: {message}{got}") from None

    def to_json_dict(self) -> dict[str, Any]:
        """The content of ``config.json``: every key, published names."""
        return self.model_dump(mode="json")
