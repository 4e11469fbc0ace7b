"""Reads the text of PTX, NVIDIA's virtual instruction set, into instructions.

It covers what LLVM writes for one kernel, with the inline assembly in it, and no more: no functions that are called, no
constants in memory. Source: PTX ISA, https://docs.nvidia.com/cuda/parallel-thread-execution/.
"""

import dataclasses
import itertools
import re

_DIRECTIVE_LINE = re.compile(r"^[ \t]*\.(?:loc|file|section|version|target|address_size)\b.*$", re.MULTILINE)
_ENTRY = re.compile(r"\.entry\s+(?P<name>[\w$]+)\s*\((?P<parameters>[^)]*)\)[^{;]*\{")
_SHARED = re.compile(r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.b8\s+([\w$]+)\[(\d*)\]")
_LABEL = re.compile(r"([\w$%]+)\s*:(?!:)")
_GUARD = re.compile(r"@(!?)([\w$%]+)\s+")
_NAME = re.compile(r"[\w$%]+")


class PtxError(Exception):
    """A kernel did what it must not do, or what is not covered."""


@dataclasses.dataclass(frozen=True)
class Address:
    """A memory operand: what `base`, a register or a symbol, holds plus `offset` bytes."""

    base: str
    offset: int = 0


# A register, symbol or literal; those of a vector; or a place in memory.
Operand = str | tuple[str, ...] | Address


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        opcode: with its modifiers and types, as "ld.global.v4.b32".
        operands: destinations first.
        guard: predicate register of the threads that execute it; of those that don't, if `negated`.
        line: of the PTX file, from 1.
    """

    opcode: str
    operands: tuple[Operand, ...]
    guard: str | None
    negated: bool
    line: int

    @property
    def name(self) -> str:
        """The opcode without modifiers and types."""
        return self.opcode.partition(".")[0]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel.

    Attributes:
        name: of its entry.
        parameters: names, in order.
        registers: the type by the name of each.
        shared: bytes and alignment of each shared variable by name, 0 bytes for the one that a launch sizes.
        instructions: in order.
        labels: indices of instructions.
    """

    name: str
    parameters: tuple[str, ...]
    registers: dict[str, str]
    shared: dict[str, tuple[int, int]]
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]


def parse_kernel(text: str) -> Kernel:
    """The one kernel of a PTX file.

    Raises:
        PtxError: it has none or several, or a statement is not understood.
    """
    text = re.sub(r"//.*", "", text)
    text = _DIRECTIVE_LINE.sub("", text)
    entries = list(_ENTRY.finditer(text))
    if len(entries) != 1:
        raise PtxError(f"{len(entries)} kernels in one PTX file, not 1")
    (entry,) = entries
    parameters = re.findall(r"([\w$]+)\s*(?:,|$)", entry["parameters"].strip())
    shared = {name: (int(size or 0), int(align or 1)) for align, name, size in _SHARED.findall(text)}
    body = _Body(text, entry.end())
    return Kernel(
        entry["name"], tuple(parameters), body.registers, shared, tuple(body.instructions), body.labels
    )


class _Body:
    """Statements between the braces of a kernel; registers of inner braces get names of their own."""

    def __init__(self, text: str, start: int) -> None:
        self.registers: dict[str, str] = {}
        self.labels: dict[str, int] = {}
        self.instructions: list[Instruction] = []
        scopes: list[dict[str, str]] = [{}]
        numbers = itertools.count(1)
        place, line, counted = start, text.count("\n", 0, start) + 1, start
        while scopes:
            place += len(text[place:]) - len(text[place:].lstrip()) if text[place].isspace() else 0
            line += text.count("\n", counted, place)
            counted = place
            if text[place] == "{":
                scopes.append({})
                place += 1
            elif text[place] == "}":
                scopes.pop()
                place += 1
            elif label := _LABEL.match(text, place):
                self.labels[label[1]] = len(self.instructions)
                place = label.end()
            else:
                end = text.index(";", place)
                statement = " ".join(text[place:end].split())
                place = end + 1
                if statement.startswith(".reg"):
                    self._declare(statement, scopes, numbers)
                elif statement and not statement.startswith((".shared", ".pragma")):
                    self.instructions.append(_instruction(_rename(statement, scopes), line))

    def _declare(self, statement: str, scopes: list[dict[str, str]], numbers: "itertools.count[int]") -> None:
        _, kind, names = statement.split(maxsplit=2)
        for name in names.split(","):
            if many := re.fullmatch(r"\s*([\w$%]+)<(\d+)>\s*", name):
                declared = [f"{many[1]}{i}" for i in range(int(many[2]))]
            else:
                declared = [name.strip()]
            for register in declared:
                unique = register if len(scopes) == 1 else f"{register}${next(numbers)}"
                scopes[-1][register] = unique
                self.registers[unique] = kind.removeprefix(".")


def _rename(statement: str, scopes: list[dict[str, str]]) -> str:
    inner = {old: new for scope in scopes[1:] for old, new in scope.items()}
    return _NAME.sub(lambda name: inner.get(name[0], name[0]), statement) if inner else statement


def _instruction(statement: str, line: int) -> Instruction:
    guard, negated = None, False
    if match := _GUARD.match(statement):
        guard, negated = match[2], bool(match[1])
        statement = statement[match.end() :]
    opcode, _, rest = statement.partition(" ")
    if not re.fullmatch(r"[a-z][\w.:]*", opcode):
        raise PtxError(f"line {line}: not understood: {statement}")
    operands = tuple(_operand(text) for text in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", rest))
    return Instruction(opcode, operands, guard, negated, line)


def _operand(text: str) -> Operand:
    text = text.strip()
    if text.startswith("{"):
        return tuple(part.strip() for part in text[1:-1].split(","))
    if text.startswith("["):
        base, plus, offset = text[1:-1].partition("+")
        return Address(base.strip(), int(offset, 0) if plus else 0)
    return text
