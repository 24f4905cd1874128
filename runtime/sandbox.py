"""What a stranger's file has us compute, templates and regular expressions, is first tried in a process with limits."""
import os
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

SECONDS, GB = 1, 1


def try_out(works: Iterable[str]) -> tuple[str, str]:
    """Do some works in a fork, each of which gives its name before it begins.

    Returns the name of the one that raised something or took more than the limits, and the fault; "" if all ended.
    Only what they were tried with is known to end. Nothing is tried outside Linux, where a fork is not safe.
    """
    if sys.platform != "linux":
        return "", ""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        _do(works, theirs)
    os.close(theirs)
    with open(ours, encoding="utf-8", errors="replace") as pipe:
        name, _, fault = pipe.read().rpartition("\0")[2].partition("\n")
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return ("", "") if code == 0 else (name, fault or f"takes more than {SECONDS} s or {GB} GB")


def _do(works: Iterable[str], pipe: int) -> NoReturn:
    """In the fork: names go into the pipe, and behind the last what was raised."""
    import resource  # Windows has none: load_config says so

    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # where the tokenizers library writes when it panics
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(60)  # what waits for a thread that the fork does not have takes no CPU
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        for limit, most in ((resource.RLIMIT_AS, size + GB * 2**30), (resource.RLIMIT_CPU, SECONDS)):
            hard = resource.getrlimit(limit)[1]
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(limit, (most, most))
        for name in works:
            os.write(pipe, f"\0{name}\n".encode())
        code = 0
    except MemoryError:
        pass
    except BaseException as error:  # the same library raises nothing narrower
        os.write(pipe, (str(error) or type(error).__name__).encode("utf-8", "replace")[:1000])
    finally:
        os._exit(code)
