"""What a model's folder brings that has to be run: in a process of its own, which the kernel keeps small.

A chat template is a program, and a regular expression can be one. Jinja's sandbox and Python's `re`
stop neither an endless loop nor a giant string, and no check inside this process could: one call of
a C function (`"a" * 10**10`, `"%9999999999d"`, a list nested in itself forty times, `(a+)+$`) holds
the interpreter until it is done. So both are handed to a child process with hard limits: processor
time by an interval timer whose signal ends the process, memory by RLIMIT_AS, and no file, socket or
process that it could open (an audit hook, RLIMIT_FSIZE). Whatever the template does, the answer is its
text, or one UserError within about a second and 256 MB. Where the system does not honour a limit of
memory (macOS), time alone bounds it.

The child is started when it is first needed (50 ms), shared by all threads, and serves a whole
conversation in one exchange (some 0.1 ms); one that was ended is replaced at the next request. Many
conversations go in portions of bounded length, and the beginnings of one, of which its turns are
found, do not leave the child (`turns`), or are not even rendered (`streaming`).

Code of a grader is somebody's whole Python: it is run by another child, which forks a process for every answer that
is judged (`running`), where the kernel forbids besides what a grader has no need of (`kernel`).
"""

from jaxft.runtime.sandbox.client import (
    TooMuch,
    assistant_turns,
    call_function,
    first_matches,
    render_conversations,
    verdicts,
)
from jaxft.runtime.sandbox.moment import check_moment, today

__all__ = [
    "TooMuch",
    "assistant_turns",
    "call_function",
    "check_moment",
    "first_matches",
    "render_conversations",
    "today",
    "verdicts",
]
