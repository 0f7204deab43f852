"""Tokens looked up word by word are open_clip's, and items made ahead by a thread are the items."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import open_clip
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer

from raybd.data.ahead import ahead
from raybd.data.tokens import WordTokens, remembering


@pytest.fixture(scope="module")
def tokenizer() -> SimpleTokenizer:
    found: SimpleTokenizer = open_clip.get_tokenizer("RN50")
    return found


words = st.one_of(
    st.sampled_from(
        ["dog", "Dog's", "&amp;", "<end_of_text>", "3rd", "don't,", "a", "“curly”", "naïve", "_", "\t", "…"]
    ),
    st.text(max_size=6),
)


@given(texts=st.lists(st.lists(words, max_size=30).map(" ".join), max_size=5))
@example(texts=["a photo of a dog", "a &lt; b &amp;amp; c", "<b>", "x" * 300, "w " * 100, "", "a\x1bb", "é e\u0301"])
@settings(deadline=None, max_examples=60)
def test_tokens_are_open_clips_whether_words_are_known_or_not(tokenizer: SimpleTokenizer, texts: list[str]) -> None:
    ours = remembering(tokenizer)
    assert isinstance(ours, WordTokens)
    theirs = tokenizer(texts)
    assert theirs.dtype == torch.int64
    for _ in range(2):
        assert torch.equal(ours(texts), theirs)


def test_a_word_is_tokenised_once(tokenizer: SimpleTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, asked = WordTokens(tokenizer), list[str]()
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text: asked.append(text) or encode(text))
    ours(["a dog", "a cat", "dog a"])
    assert asked == ["a", "dog", "cat"]


def test_other_tokenizers_are_left_as_they_are() -> None:
    masking = SimpleTokenizer(context_length=8, reduction_mask="simple")

    def own(texts: list[str]) -> torch.Tensor:
        return torch.zeros(len(texts), 1)

    assert remembering(masking) is masking
    assert remembering(own) is own


def test_items_come_in_order_and_errors_where_they_happen() -> None:
    def items() -> Iterator[int]:
        yield from range(5)
        raise ValueError("broken")

    found = ahead(items())
    assert [next(found) for _ in range(5)] == list(range(5))
    with pytest.raises(ValueError, match="broken"):
        next(found)
    assert list(ahead(range(100))) == list(range(100))


def test_no_more_is_made_than_asked_for_and_closing_ends_the_thread() -> None:
    made, enough = list[int](), threading.Event()

    def items() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            if len(made) == 4:
                enough.set()
            yield number

    found = ahead(items(), most=2)
    assert next(found) == 0
    assert enough.wait(10), "two in the queue, one in hand"
    found.close()
    assert len(made) == 4
    assert not [thread for thread in threading.enumerate() if thread.name == "raybd-ahead"]
