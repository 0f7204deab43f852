"""How large the things in shards, tables and class files may be: what is larger is refused before it takes memory.

Broken or hostile files promise what they do not hold, or hold a few kilobytes that unpack to gigabytes.
"""

from __future__ import annotations

import re

MAX_PIXELS = 64_000_000  # of an image, before and after resizing
MAX_IMAGE_BYTES = 64 << 20  # of an image file
MAX_TEXT_BYTES = 1 << 20  # of a caption's file or a sample's JSON, and of a line of a CSV
MAX_CAPTION = 10_000  # characters of a caption, a class name or a template: tokenizers take long over more
MAX_NAME = 255  # characters of a file's name in a shard
MAX_HEADER_BYTES = 1 << 20  # of a tar header that is written as a file: long names, pax records
MAX_CLASS_FILE_BYTES = 16 << 20
MAX_SHARDS = 1_000_000  # that the patterns of a study stand for
# A packed shard is taken for a bomb where it unpacks to more than both.
MAX_RATIO = 200
MAX_UNPACKED_BYTES = 256 << 20


def caption_problem(*captions: str) -> str:
    """Return why the captions of an image cannot be used, "" if they can."""
    for caption in captions:
        if not caption:
            return "no caption"
        if len(caption) > MAX_CAPTION:
            return f"caption too long: {len(caption)} characters, at most {MAX_CAPTION} expected"
        if re.search("[\ud800-\udfff]", caption):
            return "caption is not Unicode text"
    return ""
