"""Tokens of captions, looked up word by word: captions are made of few words, and their views of the same ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

Tokenize = Callable[[list[str]], Tensor]
_MOST_WORDS = 1 << 18


class WordTokens:
    """open_clip's byte-pair tokenizer with a memory: the same tokens, many times faster.

    Its tokens never reach across a blank. Its cleaning may, but it leaves printable ASCII without `&` alone, so only
    such texts are taken apart.
    """

    def __init__(self, tokenizer: SimpleTokenizer) -> None:
        self._tokenizer, self._words = tokenizer, dict[str, list[int]]()

    def __call__(self, texts: list[str]) -> Tensor:
        """Return tokens of texts, int64 [N, L]; texts too long are cut as open_clip cuts them."""
        length, end = self._tokenizer.context_length, self._tokenizer.eot_token_id
        found_NL = np.zeros((len(texts), length), dtype=np.int64)
        for i, text in enumerate(texts):
            tokens = [self._tokenizer.sot_token_id, *self._encode(text), end]
            if len(tokens) > length:
                tokens = [*tokens[: length - 1], end]
            found_NL[i, : len(tokens)] = tokens
        return torch.from_numpy(found_NL)

    def _encode(self, text: str) -> list[int]:
        if not (text.isascii() and text.isprintable()) or "&" in text:
            return list(self._tokenizer.encode(text))
        found: list[int] = []
        for word in text.split():
            tokens = self._words.get(word)
            if tokens is None:
                tokens = self._tokenizer.encode(word)
                if len(self._words) < _MOST_WORDS:
                    self._words[word] = tokens
            found += tokens
        return found


@lru_cache(maxsize=4)
def remembering(tokenizer: Tokenize) -> Tokenize:
    """Return a tokenizer that gives the same tokens, faster where that is possible."""
    found: Any = tokenizer
    if type(found) is SimpleTokenizer and found.reduction_fn is None:
        return WordTokens(found)
    return tokenizer
