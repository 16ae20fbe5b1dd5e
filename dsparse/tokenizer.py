"""The tokenizer that stands beside a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from dsparse.errors import DsparseError


class Tokenizer:
    """Text to token ids and back, from `tokenizer.json`; conversations through the chat template, if there is one.

    Without a chat template, conversations follow the published one of DeepSeek-V2: system text and a blank line, then
    "User: ..." and a blank line, then "Assistant: ..." and the end-of-sequence token.
    """

    def __init__(self, folder: str | Path):
        """folder: of the checkpoint.

        Raises:
            DsparseError: it has no readable tokenizer.json.
        """
        import tokenizers

        self.folder = Path(folder)
        file = self.folder / "tokenizer.json"
        if not file.is_file():
            raise DsparseError(f"{file}: not found; text needs a tokenizer (token arrays, .npy, do not)")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise DsparseError(f"{file}: not a tokenizer ({error})") from error
        self._chat = None

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids; `special` adds what the tokenizer puts around a sequence, such as a first token.

        Raises:
            DsparseError: the text holds half a character (a lone surrogate, as JSON can spell it).
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DsparseError(f"text cannot be encoded: {text[error.start]!r} at character {error.start}") from error
        return self._tokenizer.encode(text, add_special_tokens=special).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def encode_chat(self, messages: Sequence[Mapping[str, str]], eos: int) -> tuple[list[int], list[bool]]:
        """Token ids of a conversation, and which of them the assistant says (what a model learns from).

        Raises:
            DsparseError: a message has no role or content, or the chat template changes earlier turns as others follow.
        """
        for message in messages:
            if not isinstance(message, Mapping) or not all(
                isinstance(message.get(k), str) for k in ("role", "content")
            ):
                raise DsparseError("every entry of messages needs a role and a content, both text")
        template = self._chat_template()
        parts = _published_turns(messages) if template is None else _templated_turns(template, messages)
        ids, spoken = [], []
        for text, assistant in parts:
            new = self.encode(text, special=template is None and not ids)
            if assistant and template is None:
                new = [*new, eos]
            ids += new
            spoken += [assistant] * len(new)
        return ids, spoken

    def _chat_template(self):
        """transformers' renderer of the folder's chat template, or None."""
        if self._chat is None:
            config = self.folder / "tokenizer_config.json"
            stated = config.is_file() and '"chat_template"' in config.read_text(encoding="utf-8")
            if not stated and not (self.folder / "chat_template.jinja").is_file():
                return None
            from transformers import AutoTokenizer

            self._chat = AutoTokenizer.from_pretrained(str(self.folder)).apply_chat_template
        return self._chat


def _published_turns(messages: Sequence[Mapping[str, str]]) -> list[tuple[str, bool]]:
    parts = []
    for message in messages:
        if message["role"] == "assistant":
            parts += [("Assistant:", False), (f" {message['content']}", True)]
        else:
            name = "" if message["role"] == "system" else "User: "
            parts.append((f"{name}{message['content']}\n\n", False))
    return parts


def _templated_turns(template, messages: Sequence[Mapping[str, str]]) -> list[tuple[str, bool]]:
    """The rendered conversation cut where the assistant starts and stops speaking."""
    parts, rendered = [], ""
    for count, message in enumerate(messages, start=1):
        assistant = message["role"] == "assistant"
        steps = [(messages[: count - 1], True), (messages[:count], False)] if assistant else [(messages[:count], False)]
        for turns, prompt in steps:
            text = template(list(turns), tokenize=False, add_generation_prompt=prompt) if turns or prompt else ""
            if not text.startswith(rendered):
                raise DsparseError(
                    "the chat template changes earlier turns as others follow; write one example an assistant turn"
                )
            parts.append((text[len(rendered) :], assistant and not prompt))
            rendered = text
    return [part for part in parts if part[0]]
