"""Configs as text that is not made pretty, for as long as this process lives.

mmengine writes a config's text several times in each run, and in each checkpoint. Formatting it
takes a second each time, which is most of what the smallest training takes.
"""

from mmengine.config import config


def _as_it_is(text: str, *_, **__) -> tuple[str, bool]:
    return text, False


config.FormatCode = _as_it_is
