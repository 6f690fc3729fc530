"""A tokenizer's files once its model masks: which token stands for what is not yet known.

A model needs an embedding row for masked positions, and that row's token must be one that
text never uses: a reserved one, or one more at the end. Ling 2.0's tokenizer is special, for
LLaDA2.0 gave some of its reserved tokens a meaning. No torch is needed here.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from unmask.errors import ModelError, UsageError
from unmask.models.folder import parse_json_object
from unmask.models.tokenizer import CONFIG_FILE, TEMPLATE_FILE, TOKENIZER_FILE

__all__ = ["MaskChoice", "with_mask_token"]

_SPECIAL_MAP_FILE = "special_tokens_map.json"
_DEFAULT_TEXT = {
    "LLaDA2MoeModelLM": "<|mask|>",
    "SDARForCausalLM": "<|MASK|>",
    "SDARMoeForCausalLM": "<|MASK|>",
}
"""What published models of an architecture call their mask token."""
_LING_END_OF_TEXT = (156_892, "<|endoftext|>")
_LING_ROLE = (157_151, "<role>")
_LLADA2_MASK = 156_895
_LLADA2_ROLE_END = (156_900, "<|role_end|>")


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskChoice:
    """Which token becomes the mask; what is None is left to the architecture."""

    token: str | None = None
    token_id: int | None = None


def with_mask_token(
    files: Mapping[str, bytes], architecture: str, choice: MaskChoice, *, default_id: int | None, rows: int
) -> tuple[dict[str, bytes], int]:
    """The tokenizer's files with a mask token, and its id.

    Args:
        files: ``tokenizer.json`` and what goes with it, by name; may be empty.
        architecture: That the model is converted to.
        choice: A token that the tokenizer has, or a new name for the id.
        default_id: The architecture's own mask, if it has one.
        rows: Of the model's embedding.

    Raises:
        ModelError: If the files cannot be used, or are those of a Ling model that has been taught to chat.
        UsageError: If no token is chosen, or one that cannot be the mask.
    """
    if TOKENIZER_FILE not in files:
        return dict(files), _in_range(_chosen_id(choice, default_id, "no tokenizer to look in"), rows)
    vocabulary = _Vocabulary.parse(files)
    if architecture == "LLaDA2MoeModelLM" and vocabulary.is_of_ling:
        _become_llada2(vocabulary)
    mask_id = _in_range(_place(vocabulary, choice, default_id, _DEFAULT_TEXT.get(architecture)), rows)
    return vocabulary.files(), mask_id


def _become_llada2(vocabulary: "_Vocabulary") -> None:
    """Name the tokens that LLaDA2.0 took from Ling's reserved ones, and write conversations as it does."""
    role_end_id, role_end = _LLADA2_ROLE_END
    if vocabulary.text(_LLADA2_MASK) == role_end:
        raise ModelError(
            f"{TOKENIZER_FILE}: id {_LLADA2_MASK}, LLaDA2.0's mask, is {role_end}: this is a Ling model "
            "that was taught to chat; convert the base model (Ling-mini-base-2.0, Ling-flash-base-2.0)"
        )
    vocabulary.name(_LLADA2_MASK, "<|mask|>")
    vocabulary.name(role_end_id, role_end)
    template = resources.files("unmask.models.llada2_moe").joinpath("chat_template.jinja")
    vocabulary.config.update(
        eos_token=_LING_END_OF_TEXT[1],
        pad_token=_LING_END_OF_TEXT[1],
        chat_template=template.read_text(encoding="ascii"),
    )
    vocabulary.others.pop(TEMPLATE_FILE, None)


def _place(
    vocabulary: "_Vocabulary", choice: MaskChoice, default_id: int | None, default_text: str | None
) -> int:
    """Give the mask token its id and its name; returns the id."""
    known = None if choice.token is None else vocabulary.id_of(choice.token)
    if known is not None:
        if choice.token_id not in (None, known):
            raise UsageError(f"mask token {choice.token!r} has id {known}, not {choice.token_id}")
        mask_id = known
    elif choice.token is not None and choice.token_id is None and default_id is None:
        mask_id = vocabulary.next_id
    else:
        free = ", ".join(vocabulary.reserved()) or "none"
        mask_id = _chosen_id(choice, default_id, f"special tokens that texts may never use: {free}")
    text = choice.token or vocabulary.text(mask_id) or default_text
    if choice.token is None and vocabulary.text(mask_id) is None and mask_id != vocabulary.next_id:
        text = None  # a row beyond what the tokenizer can name; no text needs its name
    if text is not None:
        vocabulary.name(mask_id, text)
        vocabulary.config["mask_token"] = text
    return mask_id


def _chosen_id(choice: MaskChoice, default_id: int | None, hint: str) -> int:
    chosen = default_id if choice.token_id is None else choice.token_id
    if chosen is None:
        raise UsageError(f"which token is the mask? give --mask-token or --mask-token-id ({hint})")
    return chosen


def _in_range(token_id: int, rows: int) -> int:
    if not 0 <= token_id < rows:
        raise UsageError(f"mask token id {token_id} is outside the {rows} rows of the model's embedding")
    return token_id


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """The content of a tokenizer's files, to be changed."""

    tokenizer: dict[str, Any]
    """``tokenizer.json``."""
    config: dict[str, Any]
    """``tokenizer_config.json``."""
    others: dict[str, bytes]
    """Other files, which stay as they are."""
    special_map: dict[str, Any] | None
    """``special_tokens_map.json``, where there is one."""
    ids: dict[str, int] = field(default_factory=dict)
    """Every token's id."""

    @classmethod
    def parse(cls, files: Mapping[str, bytes]) -> "_Vocabulary":
        others = dict(files)
        tokenizer = parse_json_object(others.pop(TOKENIZER_FILE), source=TOKENIZER_FILE)
        config = parse_json_object(others.pop(CONFIG_FILE, b"{}"), source=CONFIG_FILE)
        special = others.pop(_SPECIAL_MAP_FILE, None)
        special_map = None if special is None else parse_json_object(special, source=_SPECIAL_MAP_FILE)
        found = cls(tokenizer, config, others, special_map)
        try:
            found.ids.update(found._read_ids())
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ModelError(f"{TOKENIZER_FILE}: not a tokenizer file: {error!r}") from None
        if not all(type(text) is str and type(token_id) is int for text, token_id in found.ids.items()):
            raise ModelError(
                f"{TOKENIZER_FILE}: not a tokenizer file: tokens are texts, and their ids numbers"
            )
        return found

    def _read_ids(self) -> Iterator[tuple[str, int]]:
        vocab = self.tokenizer["model"]["vocab"]
        if isinstance(vocab, list):  # of a unigram model: [text, score], the place being the id
            yield from ((entry[0], token_id) for token_id, entry in enumerate(vocab))
        else:
            yield from vocab.items()
        for added in self._added:
            yield added["content"], added["id"]

    @property
    def _added(self) -> list[dict[str, Any]]:
        added: list[dict[str, Any]] = self.tokenizer.setdefault("added_tokens", [])
        return added

    @property
    def is_of_ling(self) -> bool:
        """Whether this is a tokenizer of Ling 2.0."""
        return all(self.ids.get(text) == token_id for token_id, text in (_LING_END_OF_TEXT, _LING_ROLE))

    @property
    def next_id(self) -> int:
        """The first id behind all tokens."""
        return max(self.ids.values(), default=-1) + 1

    def text(self, token_id: int) -> str | None:
        """The token with that id."""
        return next((text for text, known in self.ids.items() if known == token_id), None)

    def id_of(self, text: str) -> int | None:
        """The id of that token."""
        return self.ids.get(text)

    def reserved(self) -> list[str]:
        """Special tokens that have no role."""
        return [added["content"] for added in self._added if added["content"] not in self._roles()]

    def _roles(self) -> dict[str, str]:
        """Token -> what it is for; a token is written as its text or as {"content": text, ...}."""
        found = {}
        for role in ("bos_token", "eos_token", "pad_token", "unk_token"):
            token = self.config.get(role)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                found[token] = role
        return found

    def name(self, token_id: int, text: str) -> None:
        """Make ``text`` the special token with that id, be the id new or that of another special token.

        Raises:
            UsageError: If text can hold the token, it has another role, or its id cannot be made.
        """
        known = self.ids.get(text)
        if known not in (None, token_id):
            raise UsageError(f"token {text!r} has id {known} already, not {token_id}")
        old = self.text(token_id)
        if old is None:
            self._add(token_id, text)
            return
        entry = next((added for added in self._added if added["id"] == token_id), None)
        if entry is None:
            raise UsageError(f"token id {token_id} is {old!r}, which texts use; choose a special token")
        role = self._roles().get(old)
        if role is not None:
            raise UsageError(f"token id {token_id} is {old!r}, the {role}; choose one without a role")
        entry |= {"content": text, "special": True, "normalized": False}
        vocab = self.tokenizer["model"]["vocab"]
        if isinstance(vocab, dict) and old in vocab:
            vocab[text] = vocab.pop(old)
        self.ids[text] = self.ids.pop(old)
        self._rename_in_config(token_id, old, text)

    def _add(self, token_id: int, text: str) -> None:
        if token_id != self.next_id:
            raise UsageError(
                f"token id {token_id} cannot be named: the tokenizer ends at {self.next_id - 1}, and a new "
                "token must follow"
            )
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        self._added.append({"id": token_id, "content": text, **flags, "special": True})
        self.ids[text] = token_id

    def _rename_in_config(self, token_id: int, old: str, text: str) -> None:
        decoder = self.config.get("added_tokens_decoder")
        if isinstance(decoder, dict) and isinstance(decoder.get(str(token_id)), dict):
            decoder[str(token_id)] |= {"content": text, "special": True}
        for settings in (self.config, self.special_map or {}):
            for key in ("additional_special_tokens", "extra_special_tokens"):
                if isinstance(settings.get(key), list):
                    settings[key] = [text if token == old else token for token in settings[key]]

    def files(self) -> dict[str, bytes]:
        """The files' new content, by name."""
        written = {TOKENIZER_FILE: self.tokenizer, CONFIG_FILE: self.config}
        if self.special_map is not None:
            roles = {
                key: self.config[key]
                for key in ("eos_token", "pad_token", "mask_token")
                if key in self.config
            }
            written[_SPECIAL_MAP_FILE] = self.special_map | roles
        return self.others | {name: _json(content) for name, content in written.items()}


def _json(content: object) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
