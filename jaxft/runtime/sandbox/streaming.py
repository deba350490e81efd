"""The beginnings of a conversation, read off one rendering of the whole.

Most templates write the messages one after the other and something behind them. The text of the first k messages is
then what the whole has been written when message k is done, and that something: n renderings become one. It is so
where the program has asked nothing, until then, whose answer depends on how many messages there are, and where what
it writes behind them depends on none. Both are watched while the whole is rendered, by calls put into the program:

    for message in messages     one loop outside of macros and captured blocks; where each message begins is noted
    loop.nextitem               asks ahead: the beginning that ends with this message is not known
    loop.last                   likewise, but for a program that keeps no state from message to message: each is then
                                written a second time as if it were the last
    messages[i]                 asks for a message: nothing is known of beginnings without it
    other uses of messages, of loop, or (behind the loop) of a name that the program made: nothing is known

What is not known is rendered; a template that is watched for nothing is only slower.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jinja2
from jinja2 import nodes

from jaxft.runtime.sandbox.template import rendered, sandbox

MESSAGES = "messages"
# Names that mean the same behind the loop however many messages there are.
GIVEN = {"tools", "documents", "raise_exception", "strftime_now", "namespace", "range"}
GIVEN |= {"add_generation_prompt"} | {
    f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
}
REFUSED = (nodes.Extends, nodes.Include, nodes.Import, nodes.FromImport, nodes.Block)
STATEFUL = {"cycler", "joiner", "lipsum"}  # things that remember, or draw
BEHIND = {"index", "index0", "first", "previtem", "cycle", "changed", "depth"}
AHEAD = {"last": "last", "nextitem": "asks_ahead"}  # the calls that watch them
INDEX = (nodes.Const, nodes.Name, nodes.Getattr, nodes.Add, nodes.Sub)


class Watch:
    """What a rendering asks of the messages.

    Attributes:
        known: whether anything is.
        need: beginnings of fewer messages are not known.
        ends: the characters that were written before each message of the loop, and behind the last.
        ahead: the messages of the loop, counted from 1, that asked for what follows them.
        offset: messages before those of the loop.
    """

    def __init__(self, messages: list[Any], all_last: bool = False) -> None:
        self._messages, self._phase, self._all_last = messages, "before", all_last
        self._blocks, self._read, self._length = list[str](), 0, 0
        self.known, self.need, self.offset = True, 1, 0
        self.ends, self.ahead = list[int](), set[int]()

    def calls(self) -> dict[str, Any]:
        """The functions that a watched program calls, by their names there."""
        names = ("enter", "step", "leave", "last", "asks_ahead", "unknown", "later", "at", "some")
        return {f"jaxft_{name}": getattr(self, name) for name in names}

    def watch(self, blocks: list[str]) -> None:
        """Takes the list into which the text is written."""
        self._blocks = blocks

    def enter(self, items: Any) -> Any:
        """The loop begins."""
        if self._phase != "before" or not self._is_rest(items):
            return self.unknown(items)
        self._phase, self.offset = "loop", len(self._messages) - len(items)
        return items

    def step(self) -> None:
        """A message of the loop begins."""
        self.ends.append(self._written())

    def leave(self) -> None:
        """The loop is done."""
        self.ends.append(self._written())
        self._phase = "behind"

    def asks_ahead(self, value: Any) -> Any:
        """The message asks whether another follows, or which."""
        self.ahead.add(len(self.ends))
        return value

    def last(self, value: Any) -> Any:
        """The message asks whether it is the last."""
        return True if self._all_last else self.asks_ahead(value)

    def unknown(self, value: Any) -> Any:
        """The messages are used in a way that is not followed."""
        self.known = False
        return value

    def later(self, value: Any) -> Any:
        """A name is used that may have another value after fewer messages."""
        self.known &= self._phase != "behind"
        return value

    def at(self, items: Any, index: Any) -> Any:
        """One of the messages is used."""
        if not self._is_rest(items) or type(index) is not int or index < 0:
            return self.unknown(items)
        index = len(self._messages) - len(items) + index
        if self._phase != "loop":
            self.need = max(self.need, index + 1)
            return items
        current = self.offset + len(self.ends) - 1
        if index == current + 1:
            return self.asks_ahead(items)
        return items if index <= current else self.unknown(items)

    def some(self, items: Any) -> Any:
        """Whether there are any is asked."""
        if not self._is_rest(items):
            return self.unknown(items)
        self.need = max(self.need, len(self._messages) - len(items) + 1)
        return items

    def _is_rest(self, items: Any) -> bool:
        """Whether these are the messages, from one of them to the last."""
        if not isinstance(items, list) or len(items) > len(self._messages):
            return False
        rest = self._messages[len(self._messages) - len(items) :]
        return not items or (items[0] is rest[0] and items[-1] is rest[-1])

    def _written(self) -> int:
        self._length += sum(map(len, self._blocks[self._read :]))
        self._read = len(self._blocks)
        return self._length


@dataclasses.dataclass(frozen=True)
class Stream:
    """The beginnings of a conversation that are known.

    Attributes:
        text: of the whole.
        beginnings: by the number of messages, how many characters of the text come first, and what follows them.
    """

    text: str
    beginnings: Mapping[int, tuple[int, str]]


def stream(source: str, variables: Mapping[str, Any]) -> Stream | None:
    """The beginnings of a conversation, `variables["messages"]`, as far as they are known; None if none is.

    >>> turn = {"role": "user", "content": "ab"}
    >>> source = "{% for m in messages %}{{ m.content }};{% endfor %}."
    >>> stream(source, {"messages": [turn, turn], "add_generation_prompt": False})
    Stream(text='ab;ab;.', beginnings={1: (3, '.'), 2: (6, '.')})
    """
    template, stateless = watched(source)
    run = None if template is None else _run(template, variables)
    if template is None or run is None:
        return None
    text, watch = run
    tail, found = text[watch.ends[-1] :], dict[int, tuple[int, str]]()
    for number, end in enumerate(watch.ends[1:], start=1):
        if number not in watch.ahead:
            found[watch.offset + number] = end, tail
    if watch.ahead and stateless and (other := _run(template, variables, all_last=True)):
        last, seen = other
        for number in watch.ahead - seen.ahead:
            start, end = seen.ends[number - 1], seen.ends[number]
            rest = last[start:end] + last[seen.ends[-1] :]
            found[watch.offset + number] = watch.ends[number - 1], rest
    return Stream(text, {count: start for count, start in found.items() if count >= watch.need})


def _run(
    template: jinja2.Template, variables: Mapping[str, Any], all_last: bool = False
) -> tuple[str, Watch] | None:
    """The text and what was asked meanwhile; None if nothing is known by it."""
    watch = Watch(variables[MESSAGES], all_last)
    try:
        text, _ = rendered(template, {**variables, **watch.calls()}, watch.watch)
    except (MemoryError, RecursionError):
        raise
    except Exception:  # a template may refuse to ask for an answer here
        return None
    whole = len(watch.ends) == len(variables[MESSAGES]) - watch.offset + 1
    return (text, watch) if watch.known and whole else None


@functools.lru_cache(maxsize=16)
def watched(source: str) -> tuple[jinja2.Template | None, bool]:
    """The template, changed to call a `Watch`, and whether it keeps no state; None if watching it cannot help."""
    environment = sandbox()
    tree = environment.parse(source)
    filters = {node.name for node in tree.find_all(nodes.Filter)}
    names = {node.name for node in tree.find_all(nodes.Name)}
    if next(tree.find_all(REFUSED), None) or "random" in filters or names & STATEFUL:
        return None, False
    asked = {node.attr for node in tree.find_all(nodes.Getattr)}
    stateless = next(tree.find_all(nodes.NSRef), None) is None and "changed" not in asked
    program = _Program(tree)
    tree.body = list(program.statements(tree.body))
    if not program.loops:
        return None, False
    code = environment.compile(tree)
    return jinja2.Template.from_code(environment, code, environment.make_globals(None)), stateless


class _Program:
    """Puts the calls into a template's tree.

    Attributes:
        loops: the loops over the messages that are watched.
    """

    def __init__(self, tree: nodes.Template) -> None:
        self.loops = 0
        sets = [
            (node.target.name, node.node)
            for node in tree.find_all(nodes.Assign)
            if isinstance(node.target, nodes.Name)
        ]
        self._aliases = {MESSAGES}
        for _ in sets:
            self._aliases |= {name for name, value in sets if self._is_rest(value)}
        fixed = collections.Counter(name for name, value in sets if isinstance(value, nodes.Const))
        named = [node.name for node in tree.find_all(nodes.Name) if node.ctx != "load"]
        told = collections.Counter(named)
        self._given = GIVEN | {name for name in fixed if fixed[name] == told[name]}

    def statements(self, body: list[nodes.Node]) -> Iterator[nodes.Node]:
        """The statements outside of loops, macros and captured blocks, the loop over the messages with its calls."""
        for node in body:
            if isinstance(node, nodes.If):
                node.test = self._condition(node.test)
                node.body = list(self.statements(node.body))
                for other in node.elif_:
                    other.test = self._condition(other.test)
                    other.body = list(self.statements(other.body))
                node.else_ = list(self.statements(node.else_))
                yield node
            elif isinstance(node, nodes.For) and self._is_loop(node):
                self.loops += 1
                node.iter = _call("enter", node.iter)
                inside = [self._inside(part) for part in node.body]
                node.body = [nodes.ExprStmt(_call("step")), *inside]
                yield node
                yield nodes.ExprStmt(_call("leave"))
            else:
                yield self._outside(node)

    def _is_loop(self, node: nodes.For) -> bool:
        return self._is_rest(node.iter) and not (node.recursive or node.test or node.else_)

    def _is_rest(self, node: nodes.Node) -> bool:
        """Whether the expression is the messages, or those from one on."""
        if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
            start = node.arg.start
            counted = isinstance(start, nodes.Const) and type(start.value) is int
            if not counted or start.value < 0 or node.arg.stop or node.arg.step:  # type: ignore[union-attr]
                return False
            node = node.node
        return isinstance(node, nodes.Name) and node.name in self._aliases

    def _condition(self, node: Any, loop: bool = False) -> Any:
        """An expression of which only the truth counts."""
        if isinstance(node, nodes.Name) and node.name in self._aliases:
            return _call("some", node)
        if isinstance(node, nodes.Not):
            node.node = self._condition(node.node, loop)
            return node
        if isinstance(node, nodes.And | nodes.Or):
            node.left = self._condition(node.left, loop)
            node.right = self._condition(node.right, loop)
            return node
        return self._expression(node, loop, outside=not loop)

    def _outside(self, node: Any) -> Any:
        return self._expression(node, loop=False, outside=True)

    def _inside(self, node: Any) -> Any:
        return self._expression(node, loop=True, outside=False)

    def _expression(self, node: Any, loop: bool, outside: bool) -> Any:
        """Any node, with the calls in it.

        Args:
            node: it is changed.
            loop: whether `loop` is that of the messages.
            outside: whether it may be run behind the loop.
        """
        walk = functools.partial(self._expression, loop=loop, outside=outside)
        if isinstance(node, nodes.Name) and node.ctx == "load":
            return self._name(node, loop, outside)
        if (
            isinstance(node, nodes.Test)
            and node.name == "defined"
            and isinstance(node.node, nodes.Name)
        ):
            return node if node.node.name in {*self._aliases, *GIVEN} else _walked(node, walk)
        if isinstance(node, nodes.Assign) and isinstance(node.target, nodes.Name):
            return node if self._is_rest(node.node) else _walked(node, walk)
        if isinstance(node, nodes.If | nodes.CondExpr):
            node.test = self._condition(node.test, loop)
            return _walked(node, walk, but=("test",))
        if isinstance(node, nodes.Getitem) and self._is_message(node):
            index = walk(node.arg)
            return nodes.Getitem(_call("at", node.node, index), index, node.ctx)
        if loop and isinstance(node, nodes.Getattr) and _is_loop_name(node.node):
            if node.attr in BEHIND:
                return node
            return _call(AHEAD.get(node.attr, "unknown"), node)
        if isinstance(node, nodes.For):  # another loop: `loop` is that one's in its body
            node.iter, node.else_ = walk(node.iter), [walk(part) for part in node.else_]
            inner = functools.partial(self._expression, loop=False, outside=outside)
            return _walked(node, inner, but=("iter", "else_"))
        return _walked(node, walk)

    def _is_message(self, node: nodes.Getitem) -> bool:
        """Whether the expression is one of the messages, by an index that may be asked for twice."""
        named = isinstance(node.node, nodes.Name) and node.node.name in self._aliases
        parts = [node.arg, *node.arg.find_all(nodes.Node)]
        return named and all(isinstance(part, INDEX) for part in parts)

    def _name(self, node: nodes.Name, loop: bool, outside: bool) -> nodes.Node:
        if node.name in self._aliases or (loop and node.name == "loop"):
            return _call("unknown", node)
        return _call("later", node) if outside and node.name not in self._given else node


def _is_loop_name(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Name) and node.name == "loop"


def _walked(node: nodes.Node, walk: Any, but: tuple[str, ...] = ()) -> nodes.Node:
    """The node, with `walk` of each of its parts but one in their order."""
    for name, value in node.iter_fields():
        if name in but:
            continue
        if isinstance(value, nodes.Node):
            setattr(node, name, walk(value))
        elif isinstance(value, list):
            parts = [walk(part) if isinstance(part, nodes.Node) else part for part in value]
            setattr(node, name, parts)
    return node


def _call(name: str, *arguments: Any) -> nodes.Call:
    return nodes.Call(nodes.Name(f"jaxft_{name}", "load"), list(arguments), [], None, None)
