"""The process that renders chat templates: a JSON object per line on stdin and stdout, with limits of time and memory.

Templates are programs that come with models and servers. Jinja's sandbox keeps them from Python's internals, but not
from loops without end or texts of gigabytes. This file imports nothing but Jinja, so that the process starts at once.
"""

import json
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace


class Generation(Extension):
    """{% generation %}, which marks what the model is trained to write, and is rendered as if it were not there."""

    tags = {"generation"}  # noqa: RUF012 (declared so by Jinja)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_as_it_is"), [], [], body).set_lineno(line)

    def _as_it_is(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """`dict` of templates, without what else hangs on the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _PlainNamespace(Namespace):
    """`namespace` of templates, without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # Jinja's own way to allow a keyword `self`
        self, args = args[0], args[1:]
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace has no attribute {name!r}")


def environment() -> ImmutableSandboxedEnvironment:
    """Jinja as transformers sets it up for chat templates (utils/chat_template_utils.py), in a sandbox."""
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = _to_json
    functions: dict[str, Any] = {
        "raise_exception": _raise,
        "strftime_now": _now,
        "dict": _Dict(),
        "namespace": _PlainNamespace,
    }
    made.globals.update(functions)
    return made


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _now(layout: str) -> str:
    return datetime.now().strftime(layout)


def limit_memory(nbytes: int) -> None:
    """Keep this process's memory below `nbytes`, where the system can."""
    try:
        import resource
    except ImportError:  # Windows
        return
    try:
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        within = nbytes if hard == resource.RLIM_INFINITY else min(nbytes, hard)
        resource.setrlimit(resource.RLIMIT_AS, (within, hard))
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    except (OSError, ValueError):  # macOS refuses some limits
        return


def limit_time(seconds: float) -> None:
    """End this process when it has computed for `seconds` more, where the system can; 0 takes the limit away.

    The one that reads its answers has a limit too, but may have been killed.
    """
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def answer(environment: ImmutableSandboxedEnvironment, request: dict[str, Any]) -> dict[str, str]:
    """What is sent back: the `text`, or the `error` in one line, and its `kind`."""
    try:
        text = environment.from_string(request["template"]).render(request["variables"])
        if len(text) > request["most"]:
            return {"kind": "Limit", "error": f"its output has {len(text):,} characters, {request['most']:,} are read"}
        return {"text": text}
    except MemoryError:
        return {"kind": "Limit", "error": "it takes too much memory"}
    except RecursionError:
        return {"kind": "Limit", "error": "it is nested too deeply"}
    except Exception as error:
        return {"kind": type(error).__name__, "error": str(error)[:2000]}


def main() -> None:
    seconds, nbytes = float(sys.argv[1]), int(sys.argv[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's, which is meant for the one that started this
    limit_memory(nbytes)
    jinja = environment()
    for line in sys.stdin:
        limit_time(seconds)
        found = json.dumps(answer(jinja, json.loads(line)))
        limit_time(0)
        print(found, flush=True)


if __name__ == "__main__":
    main()
