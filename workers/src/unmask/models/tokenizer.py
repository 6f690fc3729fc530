"""Text to token ids and back, and conversations to text: what a model folder says about its vocabulary.

A folder holds ``tokenizer.json`` (read by the ``tokenizers`` library) and, optionally,
``tokenizer_config.json`` with the special tokens' names and the chat template (``chat_template``, or a file
``chat_template.jinja`` beside it, which wins). Training and serving read both through this module, so a
model is asked in the form it was taught in.

Invariants:

* No token is added that the text does not hold: no beginning or end of text, no padding, no truncation.
* The text of a special token encodes to that token, since chat templates write them so. A mask token's id
  in a prompt is therefore text like any other; what is masked is never decided by comparing ids.
* A chat template comes with the weights, so it is untrusted: one that asks for Python's inner attributes
  (``__class__`` and the like) is refused, and any runs in jinja2's immutable sandbox.

This module imports no torch.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn, Self

import jinja2
import jinja2.ext
import tokenizers
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from unmask.errors import ModelError, UsageError
from unmask.models.conversation import Tool, Turn
from unmask.models.folder import exists_inside, read_inside, read_json_inside

__all__ = ["Tokenizer"]

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
KNOWN_FILES = (TOKENIZER_FILE, CONFIG_FILE, TEMPLATE_FILE, "special_tokens_map.json")
SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "mask_token", "unk_token")


class Tokenizer:
    """The vocabulary of one model folder; immutable, and safe to use from several threads.

    Attributes:
        files: The tokenizer's files in its folder: what to copy when a model is exported.
        bos_token_id, eos_token_id, pad_token_id, mask_token_id: The ids of the tokens that
            ``tokenizer_config.json`` names; None where it names none.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str],
        chat_template: str | None,
        files: Sequence[Path] = (),
    ) -> None:
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self._special_tokens = dict(special_tokens)
        self._template = None if chat_template is None else _compile(chat_template)
        self._template_text = chat_template
        self.files = tuple(files)
        self.bos_token_id = self._special_id("bos_token")
        self.eos_token_id = self._special_id("eos_token")
        self.pad_token_id = self._special_id("pad_token")
        self.mask_token_id = self._special_id("mask_token")

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read a model folder's tokenizer.

        Raises:
            ModelError: A file is missing or cannot be parsed, or names a token the vocabulary lacks.
        """
        folder = Path(folder)
        path = folder / TOKENIZER_FILE
        if not exists_inside(folder, TOKENIZER_FILE):
            raise ModelError(f"{path}: no such file; a tokenizer folder holds {TOKENIZER_FILE}")
        content = _text(folder, TOKENIZER_FILE)
        try:
            backend = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # the library raises bare Exception for whatever it cannot parse
            raise ModelError(f"{path}: not a tokenizer file: {_one_line(error)}") from error
        config = read_json_inside(folder, CONFIG_FILE) if exists_inside(folder, CONFIG_FILE) else {}
        try:
            return cls(
                backend,
                _special_tokens(config),
                _chat_template(folder, config),
                [folder / name for name in KNOWN_FILES if exists_inside(folder, name)],
            )
        except ModelError as error:
            raise ModelError(f"{folder}: {error}") from error

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides which tokens a text or a conversation becomes."""
        parts = (
            self._backend.to_str(),
            json.dumps(self._special_tokens, sort_keys=True),
            self._template_text,
        )
        return hashlib.sha256("\0".join(part or "" for part in parts).encode()).hexdigest()

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest token id, added tokens included: the embedding needs this many rows."""
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def has_chat_template(self) -> bool:
        """Whether the folder says how a conversation is written out."""
        return self._template is not None

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, none added.

        Raises:
            UsageError: The text is not valid Unicode (a lone surrogate, as JSON escapes can make).
            ModelError: The tokenizer's own parts contradict each other, so that it cannot encode the text.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UsageError(
                f"the text has a lone surrogate at character {error.start}: remove it"
            ) from error
        try:
            return list(self._backend.encode(text, add_special_tokens=False).ids)
        except Exception as error:  # the backend raises bare Exception, and only when a text meets the flaw
            raise ModelError(
                f"the tokenizer cannot encode a text of {len(text)} characters: {_one_line(error)}; "
                f"repair tokenizer.json, or take it again from the checkpoint it came with"
            ) from error

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """:meth:`encode` of each text, on all processors; raises for the first that cannot be encoded."""
        try:
            return [list(one.ids) for one in self._backend.encode_batch_fast(texts, add_special_tokens=False)]
        except Exception:  # one of them is flawed: which, the slow way says
            return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ``ids``; an incomplete UTF-8 sequence shows as U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def render_chat(
        self, messages: Sequence[Turn], add_generation_prompt: bool, *, tools: Sequence[Tool] = ()
    ) -> str:
        """Write a conversation out as the text the model was taught to read.

        Args:
            messages: Turns in order, as :mod:`~unmask.models.conversation` makes them.
            add_generation_prompt: End with the opening of an assistant's turn, for the model to go on from.
            tools: Functions that the model may call; whether and how they are written is up to the template.

        Raises:
            ModelError: The folder has no chat template.
            UsageError: The template refuses these messages.
        """
        if self._template is None:
            raise ModelError(
                f"the tokenizer has no chat template; send text, or add {TEMPLATE_FILE} to the model's folder"
            )
        try:
            return self._template.render(
                **self._special_tokens,
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                tools=list(tools) or None,
            )
        except jinja2.TemplateError as error:
            raise UsageError(f"the chat template refuses the messages: {_one_line(error)[:300]}") from error
        except Exception as error:  # it is a program and may fail in any way; what Python says quotes values
            text = f"the chat template refuses the messages: it fails with {type(error).__name__}"
            raise UsageError(text) from error

    def unused_special_id(self, token: str) -> int:
        """The id of ``token``, which no text encodes to unless it says so: fit to become the mask.

        Raises:
            UsageError: There is no such special token, or it begins, ends or pads texts.
        """
        special = {
            added.content: token_id
            for token_id, added in self._backend.get_added_tokens_decoder().items()
            if added.special
        }
        taken = {name for name, text in self._special_tokens.items() if text == token} - {"mask_token"}
        if token not in special or taken:
            free = sorted(special.keys() - set(self._special_tokens.values()))
            why = f"is the {min(taken)}" if taken else "is no special token of the tokenizer"
            raise UsageError(f"{token!r} {why}; unused are {', '.join(free) or 'none'}")
        return special[token]

    def contents(self, *, mask_token_id: int | None) -> dict[str, bytes]:
        """The tokenizer's files by name, as they go with a model that masks with ``mask_token_id``.

        They are as they were read, but that ``tokenizer_config.json`` names the mask token.
        """
        contents = {path.name: read_inside(path.parent, path.name) for path in self.files}
        token = None if mask_token_id is None else self._backend.id_to_token(mask_token_id)
        if token is not None and mask_token_id != self.mask_token_id:
            config = {**json.loads(contents.get(CONFIG_FILE, b"{}")), "mask_token": token}
            contents[CONFIG_FILE] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
        return contents

    def save(self, folder: str | Path) -> None:
        """Copy the tokenizer's files, byte for byte, into an existing folder."""
        for path in self.files:
            (Path(folder) / path.name).write_bytes(read_inside(path.parent, path.name))

    def _special_id(self, name: str) -> int | None:
        token = self._special_tokens.get(name)
        if token is None:
            return None
        token_id = self._backend.token_to_id(token)
        if token_id is None:
            raise ModelError(
                f"{CONFIG_FILE}: {name} is {token!r}, which {TOKENIZER_FILE} lacks; correct the name"
            )
        return token_id


def _text(folder: Path, name: str) -> str:
    try:
        return read_inside(folder, name).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(f"{folder / name}: not UTF-8: {_one_line(error)}") from error


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Names of the special tokens; published files write a token as its text or as {"content": text, ...}."""
    found = {}
    for name in SPECIAL_TOKENS:
        token = config.get(name)
        if isinstance(token, Mapping):
            token = token.get("content")
        if token is None:
            continue
        if not isinstance(token, str):
            raise ModelError(f"{CONFIG_FILE}: {name} must be a string, got {type(token).__name__}")
        found[name] = token
    return found


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    if exists_inside(folder, TEMPLATE_FILE):
        return _text(folder, TEMPLATE_FILE)
    template = config.get("chat_template")
    if isinstance(template, list):  # several named ones: the one called "default" is for conversations
        template = {entry.get("name"): entry.get("template") for entry in template}.get("default")
    if template is not None and not isinstance(template, str):
        raise ModelError(f"{CONFIG_FILE}: chat_template must be a string, got {type(template).__name__}")
    return template


class _Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's, in which merely to ask for an unsafe attribute is an error; its own gives undefined."""

    def unsafe_undefined(self, obj: object, attribute: str) -> NoReturn:
        raise SecurityError(f"access to attribute {attribute!r} of {type(obj).__name__!r} object is unsafe.")


def _compile(template: str) -> jinja2.Template:
    """Compile with the settings and the few functions that published templates rely on."""
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    try:
        for line, name in _names_asked_for(environment.parse(template)):
            if name.startswith("__"):
                raise ModelError(
                    f"the chat template tries to run other code: line {line} asks for {ascii(name)[:40]}"
                )
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise ModelError(f"the chat template, line {error.lineno}: {_one_line(error)}") from error
    except RecursionError as error:
        raise ModelError("the chat template is nested too deeply") from error


def _names_asked_for(template: nodes.Template) -> Iterator[tuple[int, str]]:
    """Line and name of each attribute or item that the template names as it stands."""
    for node in template.find_all((nodes.Getattr, nodes.Getitem, nodes.Filter)):
        if isinstance(node, nodes.Getattr):
            yield node.lineno, node.attr
            continue
        # A filter such as attr("name") or map(attribute="name") names one too.
        named = [node.arg] if isinstance(node, nodes.Getitem) else []
        if isinstance(node, nodes.Filter):
            named = [*node.args, *(pair.value for pair in node.kwargs)]
        for value in named:
            if isinstance(value, nodes.Const) and isinstance(value.value, str):
                yield node.lineno, value.value


def _to_json(value: object, indent: int | None = None) -> str:
    """JSON as a model reads it: jinja2's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    """What a template calls to refuse its input."""
    raise jinja2.TemplateError(message)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
