"""Texts of others made harmless for a screen or a page: captions, class names, error messages, ids."""

from __future__ import annotations

import re

# What steers a terminal or the order of letters, and shows nothing itself: control characters but tab and new line,
# marks and overrides of direction, invisible ones, separators that break lines, halves of surrogate pairs, tags.
_STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff"
    "\ufff9-\ufffb\U000e0000-\U000e007f]"
)


def plain(text: object) -> str:
    """Return a text that shows all there is in it: what would steer a terminal or turn letters round is escaped.

    `\\x1b` stands for the escape character, and so on. Lines and tabs stay.
    """
    return _STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))
