"""Configs as text that is not made pretty, for as long as this process lives.

mmengine writes a config's text several times in each run, and in each checkpoint. Formatting it
takes a second each time, which is most of what the smallest training takes.
"""

import sys

from yapf.yapflib import yapf_api


def _as_it_is(text: str, *_, **__) -> tuple[str, bool]:
    return text, False


# Where mmengine will take it from, or has taken it to.
yapf_api.FormatCode = _as_it_is
if "mmengine.config.config" in sys.modules:
    sys.modules["mmengine.config.config"].FormatCode = _as_it_is
