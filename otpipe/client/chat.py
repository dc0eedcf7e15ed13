"""A conversation: each turn feeds the model only what it does not know yet, where that is possible.

What was generated stays in the cache, and with private weights in the ranks' shares of it, so a
turn costs slots for its own tokens. Where the template writes earlier turns in other tokens than
the model generated, or the session has ended, the whole conversation is fed again.
"""

from __future__ import annotations

from collections.abc import Iterator

from otpipe.client.client import Client
from otpipe.client.sampling import SamplingParams
from otpipe.errors import ConnectionLost


class Chat:
    """One conversation with the model of a client.

    Attributes:
        history: (role, text) of every turn so far, "user" and "assistant".
    """

    def __init__(
        self, client: Client, max_new_tokens: int = 256, params: SamplingParams | None = None
    ) -> None:
        """
        Args:
            max_new_tokens: of one answer.
            params: sampling; None is greedy.
        """
        self._client = client
        self._max_new_tokens = max_new_tokens
        self._params = params or SamplingParams()
        self._text = client.new_text()
        self.history: list[tuple[str, str]] = []

    def say(self, text: str) -> Iterator[str]:
        """Take the user's turn; yields the answer piece by piece.

        Raises:
            UsageError: the conversation is longer than the model's context.
            ConnectionLost: the server stayed away. With private weights its shares of the
                conversation are gone: the next turn feeds all of it again.
        """
        prompt_ids = self._encode(text)
        known = self._text.token_ids
        if prompt_ids[: len(known)] != known or len(prompt_ids) <= len(known):
            self._text = self._client.new_text()
        pieces = self._client.generate_text(
            prompt_ids, self._max_new_tokens, self._params, text=self._text
        )
        answer = ""
        try:
            for piece in pieces:
                answer += piece
                yield piece
        except ConnectionLost:
            self._text = self._client.new_text()
            raise
        self.history += [("user", text), ("assistant", answer)]

    def _encode(self, text: str) -> list[int]:
        """The conversation and the user's turn; without a template, one text that goes on."""
        if self._client.has_chat_template:
            return self._client.encode(text, history=self.history)
        before = "".join(said for _, said in self.history)
        return self._client.encode(before + text, raw=True)
