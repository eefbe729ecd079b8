"""All interleavings of programs over one store, by the real code: a small model checker.

A program is a function that reaches storage through `tasks.storage`. It is run from its start with
the answers that it was given so far, and stops where it asks the next question; so a state is the
store, the answers that each program has, and the writes that are under way. Nothing is modelled but
the store: single requests are atomic, and besides

- a program may rest for ever at any place (that is a crash, and a slow write);
- a write may time out: the program is told so, and the write lands later or never;
- a conditional write may be repeated by the client after its answer was lost.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tasks.storage import files

Op = tuple[Any, ...]
Contents = tuple[tuple[str, bytes], ...]
WRITES = ("put", "create", "remove")


class Pause(BaseException):
    """The program asks what it has no answer to yet."""


class Place:
    """The file system that `tasks.storage` sees; every method is one request."""

    def __init__(self, answer: Callable[[Op], Any]) -> None:
        self._answer = answer

    def _ask(self, *op: Any) -> Any:
        found = self._answer(op)
        if isinstance(found, type):
            raise found(op[1])
        return found

    def cat_file(self, path: str) -> bytes:
        return self._ask("read", path)

    def pipe_file(self, path: str, data: bytes, mode: str = "put") -> None:
        self._ask("create" if mode == "create" else "put", path, data)

    def rm_file(self, path: str) -> None:
        self._ask("remove", path)

    def info(self, path: str) -> dict[str, Any]:
        return {"type": "file", "size": len(self._ask("read", path))}

    def find(self, path: str, detail: bool) -> dict[str, dict[str, Any]]:
        found: tuple[tuple[str, int], ...] = self._ask("list", path)
        return {name: {"size": size, "created": 0.0} for name, size in found}


def apply(store: dict[str, bytes], op: Op) -> Any:
    """Do one request; the answer is a value or a class of exception."""
    kind, path = op[:2]
    if kind == "list":
        names = sorted(name for name in store if name.startswith(path + "/"))
        return tuple((name, len(store[name])) for name in names)
    if kind in ("read", "remove") and path not in store:
        return FileNotFoundError
    if kind == "create" and path in store:
        return FileExistsError
    if kind == "read":
        return store[path]
    if kind == "remove":
        del store[path]
    else:
        store[path] = op[2]
    return None


@dataclass(frozen=True)
class State:
    """Where the world stands.

    Attributes:
        answers: of each program.
        under_way: writes that have timed out and may still land.
        faults: that may still happen.
    """

    store: Contents
    answers: tuple[tuple[Any, ...], ...]
    under_way: tuple[Op, ...]
    faults: int


@dataclass
class Checker:
    """Programs over a store.

    Args:
        programs: by name; deterministic.
        faults: timed out and repeated writes on one path, at most.
        name: told before a program's code runs, so that it may name its files.
    """

    programs: dict[str, Callable[[], Any]]
    faults: int
    name: Callable[[str], None]

    def __post_init__(self) -> None:
        self._known: dict[tuple[int, tuple[Any, ...]], Op | None] = {}
        self._names = list(self.programs)

    def states(self, start: dict[str, bytes]) -> Iterator[tuple[State, State]]:
        """Every step that can be taken from the start, once: the state before and after."""
        first = State(freeze(start), ((),) * len(self.programs), (), self.faults)
        seen, waiting = {first}, [first]
        yield first, first
        while waiting:
            state = waiting.pop()
            for after in self._steps(state):
                yield state, after
                if after not in seen:
                    seen.add(after)
                    waiting.append(after)

    def _steps(self, state: State) -> Iterator[State]:
        for at, op in enumerate(state.under_way):
            store = dict(state.store)
            apply(store, op)
            rest = state.under_way[:at] + state.under_way[at + 1 :]
            yield State(freeze(store), state.answers, rest, state.faults)
        for index in range(len(self.programs)):
            op = self._next(index, state.answers[index])
            if op is None:
                continue
            store = dict(state.store)
            answer = apply(store, op)
            done = freeze(store)
            yield self._answered(state, index, answer, done, state.under_way, 0)
            if not state.faults or op[0] not in WRITES:
                continue
            late = (*state.under_way, op)
            yield self._answered(state, index, TimeoutError, state.store, late, 1)
            if op[0] == "create":
                yield self._answered(state, index, FileExistsError, done, state.under_way, 1)

    def _answered(
        self,
        state: State,
        index: int,
        answer: Any,
        store: Contents,
        under_way: tuple[Op, ...],
        cost: int,
    ) -> State:
        mine = (*state.answers[index], answer)
        answers = (*state.answers[:index], mine, *state.answers[index + 1 :])
        return State(store, answers, under_way, state.faults - cost)

    def _next(self, index: int, answers: tuple[Any, ...]) -> Op | None:
        """What the program asks after these answers; None when it has ended."""
        key = (index, answers)
        if key not in self._known:
            self._known[key] = self._run(index, answers)
        return self._known[key]

    def _run(self, index: int, answers: tuple[Any, ...]) -> Op | None:
        given = iter(answers)

        def answer(op: Op) -> Any:
            try:
                return next(given)
            except StopIteration:
                raise Pause(op) from None

        self.name(self._names[index])
        try:
            with mounted(answer):
                self.programs[self._names[index]]()
        except Pause as pause:
            return pause.args[0]
        except files.RefineryError:
            return None
        return None


def freeze(store: dict[str, bytes]) -> Contents:
    return tuple(sorted(store.items()))


class mounted:  # a context manager by class: cheaper, and entered a million times
    """Inside, every URI of `tasks.storage` lies on a store that gives these answers."""

    current: Place

    def __init__(self, answer: Callable[[Op], Any]) -> None:
        self._place = Place(answer)

    def __enter__(self) -> None:
        mounted.current = self._place

    def __exit__(self, *_: object) -> None:
        del mounted.current


def open_filesystem(uri: str) -> tuple[Place, str]:
    """Stands in for `tasks.storage.files.open_filesystem`."""
    return mounted.current, "/" + uri.split("://", 1)[1].strip("/")
