"""`jaxft train` as a process of its own, which tells how many bytes of weights it copied and dies when it is told to.

process.py DIE_AFTER WORDS...    DIE_AFTER: the update after which the process kills itself; 0: never
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from jaxft import cli
from jaxft.formats import huggingface
from jaxft.training import loop


def main(die_after: int, words: list[str]) -> int:
    """The command's exit status."""
    copied, log, copy = [0], loop.Loop.read, huggingface.copy_blocks

    def counting(source: Any, destination: Any) -> None:
        copied[0] += source.nbytes
        copy(source, destination)

    def mortal(self: Any) -> None:
        if die_after and self.step > die_after:
            self.saves.wait()
            os.kill(os.getpid(), signal.SIGKILL)
        log(self)

    huggingface.copy_blocks, loop.Loop.read = counting, mortal
    status = cli.main(words)
    print(f"copied {copied[0]} bytes", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
