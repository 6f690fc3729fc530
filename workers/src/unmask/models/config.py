"""What every family's configuration has in common. No torch is needed here."""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from unmask.errors import ModelError

__all__ = ["ModelConfig"]


class ModelConfig(BaseModel):
    """A ``config.json``: the published keys under their published names.

    Keys that we do not use are kept and written back. A key whose value would change the
    computation in a way that we do not implement is refused, never ignored.
    """

    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=(), allow_inf_nan=False)

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
    mask_token_id: int | None = Field(default=None, ge=0)
    """The embedding row that stands at masked positions; a diffusion model has one."""
    eos_token_id: int = Field(ge=0)
    pad_token_id: int = Field(ge=0)

    @model_validator(mode="before")
    @classmethod
    def _null_means_absent(cls, data: Any) -> Any:
        """Published configs write ``null`` for ids and options that they leave to the class."""
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if value is not None}

    @model_validator(mode="after")
    def _check_heads_and_ids(self) -> Self:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        for name in ("mask_token_id", "eos_token_id", "pad_token_id"):
            token_id = getattr(self, name)
            if token_id is not None and token_id >= self.vocab_size:
                raise ValueError(f"{name} {token_id} is outside the vocabulary of {self.vocab_size}")
        return self

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
