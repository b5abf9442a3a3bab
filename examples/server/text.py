"""Tokens become text while they come: whole characters only, and nothing of what ends the text."""

from __future__ import annotations

from typing import Any

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer writes for bytes that are no character yet


class Text:
    """The text of tokens that are added one by one; the pieces that ``add`` and ``end`` return are the whole of it.

    A token may be a part of a character, and a space may depend on the token before: a piece is what tokens add to the
    text of those before them, held back while it ends in an unfinished character, or in what may become a stop string.
    """

    def __init__(self, tokenizer: Any, stops: tuple[str, ...] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._tokens: list[int] = []
        self._before = self._read = 0  # tokens[before:read] are read, and kept for what comes before a new one
        self._held = ""
        self.stopped = False  # by a stop string

    def add(self, token: int) -> str:
        """What may be shown since the last call."""
        self._tokens.append(token)
        new = self._new()
        if not new or new.endswith(UNFINISHED):
            return ""
        self._before, self._read = self._read, len(self._tokens)
        return self._show(new)

    def end(self) -> str:
        """What was held back; the bytes of a character that never ended are dropped."""
        if self.stopped:
            return ""
        shown = self._show(self._new().rstrip(UNFINISHED))
        if not self.stopped:
            shown, self._held = shown + self._held, ""
        return shown

    def _new(self) -> str:
        before = self._decode(self._tokens[self._before : self._read])
        return self._decode(self._tokens[self._before :])[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _show(self, new: str) -> str:
        text = self._held + new
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for held in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-held:]) for stop in self._stops):
                self._held = text[-held:]
                return text[:-held]
        self._held = ""
        return text
