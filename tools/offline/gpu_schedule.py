"""The instructions of a GPU kernel and of its loops, read from the disassembly of what ptxas made.

A scheduler of a streaming multiprocessor issues one instruction of a warp a cycle, and each kind of instruction has its
unit. So what a pass of a loop executes at least bounds its time from below, and is the same on every machine. It says
nothing of waiting.
"""

import collections
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence

# Opcodes by the unit that executes them, as their first words; longer ones go first.
KINDS = {
    "tensor": "HMMA IMMA QMMA OMMA BMMA DMMA HGMMA IGMMA QGMMA BGMMA UTCHMMA UTCIMMA UTCQMMA UTCOMMA",
    "fma": "FFMA FFMA2 FFMA32I FMUL FMUL2 FMUL32I FADD FADD2 FADD32I HFMA2 HFMA2_32I HMUL2 HMUL2_32I HADD2 HADD2_32I "
    "IMAD IDP IDP4A",
    "alu": "LOP3 SHF SHL SHR PRMT LEA IADD IADD3 VIADD IABS IMNMX VIMNMX VIMNMX3 VIADDMNMX FMNMX FMNMX3 HMNMX2 VHMNMX "
    "ISETP FSETP HSETP2 FSET HSET2 PLOP3 SEL FSEL SGXT BMSK F2FP I2FP I2IP MOV P2R R2P",
    "special": "MUFU F2F F2I I2F FRND FCHK POPC FLO BREV",
    "shared": "LDS STS LDSM STSM ATOMS",
    "shuffle": "SHFL VOTE MATCH REDUX MOVM",
    "global": "LDG STG LDGSTS LD ST ATOM ATOMG RED REDG UTMALDG UTMASTG UBLKCP",
    "local": "LDL STL",
    "barrier": "BAR SYNCS DEPBAR LDGDEPBAR MEMBAR FENCE ERRBAR WARPSYNC WARPGROUP",
    "control": "BRA BSSY BSYNC BREAK EXIT CALL NOP YIELD",
}
_KIND = {opcode: kind for kind, opcodes in KINDS.items() for opcode in opcodes.split()}

_LABEL = re.compile(r"\s*\.(L_\w+):")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z]\w*)([.\w]*)\s*(.*?)\s*;")
_TARGET = re.compile(r"`\(\.(L_\w+)\)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One of the disassembly.

    Attributes:
        opcode: up to the first point.
        modifiers: from there.
        guarded: a predicate decides whether it has an effect. It takes its cycle all the same.
    """

    opcode: str
    modifiers: str
    operands: str
    guarded: bool

    @property
    def kind(self) -> str:
        """One of `KINDS`, "uniform" if it is of the unit that all threads of a warp share, or "other"."""
        uniform = self.opcode.startswith("U") or self.opcode in ("R2UR", "S2UR")
        return _KIND.get(self.opcode, "uniform" if uniform else "other")


@dataclasses.dataclass(frozen=True)
class Loop:
    """One loop of a kernel, or the kernel outside of loops, without the loops inside it.

    Attributes:
        depth: how many loops it is in, itself included; 0 for the kernel outside of loops.
        opcodes: how often each occurs on the shortest way through a loop, and outside of loops everywhere.
        kinds: the same by kind; see `Instruction.kind`.
        skipped: other instructions, which only some passes execute, as for the tokens that a mask cuts off.
    """

    depth: int
    opcodes: Mapping[str, int]
    kinds: Mapping[str, int]
    skipped: int

    @classmethod
    def of(cls, depth: int, instructions: Sequence[Instruction], skipped: int) -> "Loop":
        opcodes = collections.Counter(instruction.opcode for instruction in instructions)
        kinds = collections.Counter(instruction.kind for instruction in instructions)
        return cls(depth, dict(opcodes.most_common()), dict(kinds.most_common()), skipped)

    @property
    def instructions(self) -> int:
        return sum(self.opcodes.values())

    def around(self, inner: "Loop", passes: int) -> "Loop":
        """This loop together with so many passes of another that is inside it."""

        def add(own: Mapping[str, int], others: Mapping[str, int]) -> dict[str, int]:
            return {name: own.get(name, 0) + passes * others.get(name, 0) for name in {**own, **others}}

        opcodes, kinds = add(self.opcodes, inner.opcodes), add(self.kinds, inner.kinds)
        return Loop(self.depth, opcodes, kinds, self.skipped + passes * inner.skipped)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A kernel's instructions.

    Attributes:
        loops: the kernel outside of loops, then its loops in the order of the program.
    """

    loops: tuple[Loop, ...]


def read_schedule(sass: str) -> Schedule:
    """The schedule of the only kernel in the output of `nvdisasm --print-code`.

    Raises:
        ValueError: there is none, or it branches in a way that this reader doesn't know.
    """
    code, labels = _read_code(sass)
    if not code:
        raise ValueError("expected the disassembly of a kernel")
    following = [list(_following(code, i, labels)) for i in range(len(code))]
    reached, loops = _find_loops(following)
    # An outer loop comes before those inside it, which may begin where it does.
    spans = [_Span(0, reached), *sorted(loops, key=lambda span: (span.head, -len(span.body)))]
    read = []
    for span in spans:
        inside = set().union(*(other.body for other in spans if other.body < span.body))
        depth = sum(span.body <= other.body for other in spans) - 1
        own = span.body - inside
        way = own & span.shortest_way(following) if depth else own
        read.append(Loop.of(depth, [code[i] for i in sorted(way)], len(own - way)))
    return Schedule(tuple(read))


def _read_code(sass: str) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions, and before which of them each label is."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if match := _LABEL.match(line):
            labels[match[1]] = len(code)
        elif match := _INSTRUCTION.match(line):
            guard, opcode, modifiers, operands = match.groups()
            code.append(Instruction(opcode, modifiers, operands, guard is not None))
    return code, labels


def _following(code: Sequence[Instruction], i: int, labels: Mapping[str, int]) -> Iterator[int]:
    """What may come after instruction `i`.

    Threads of a warp that have come apart go to code out of line and back, by BRA.DIV, which is left out; and so are
    functions that are called, which are traps.
    """
    instruction = code[i]
    if instruction.opcode in ("BRX", "JMP", "JMX"):
        raise ValueError(f"a kernel that branches by {instruction.opcode} is not known here")
    branches = instruction.opcode == "BRA" and ".DIV" not in instruction.modifiers
    if branches:
        yield labels[_TARGET.search(instruction.operands)[1]]
    # A branch may have its condition before the label.
    always = not instruction.guarded and (
        instruction.opcode in ("EXIT", "RET") or (branches and instruction.operands.startswith("`"))
    )
    if not always and i + 1 < len(code):
        yield i + 1


@dataclasses.dataclass(frozen=True)
class _Span:
    """A loop's instructions, the first of which is `head`."""

    head: int
    body: set[int]

    def shortest_way(self, following: Sequence[Sequence[int]]) -> set[int]:
        """Blocks on the shortest way from the loop's head back to it."""
        came_from: dict[int, int] = {}
        ways = collections.deque([self.head])
        while self.head not in came_from:
            i = ways.popleft()
            for to in following[i]:
                if to in self.body and to not in came_from:
                    came_from[to] = i
                    ways.append(to)
        way = [came_from[self.head]]
        while way[-1] != self.head:
            way.append(came_from[way[-1]])
        return set(way)


def _find_loops(following: Sequence[Sequence[int]]) -> tuple[set[int], list[_Span]]:
    """What is reached from instruction 0, and the loops: all between a way back and where it leads."""
    before: dict[int, set[int]] = {0: set()}
    back: dict[int, set[int]] = {}
    path, ways = [0], [iter(following[0])]
    on_path = {0}
    while path:
        i = path[-1]
        to = next(ways[-1], None)
        if to is None:
            on_path.remove(path.pop())
            ways.pop()
            continue
        seen = to in before
        before.setdefault(to, set()).add(i)
        if to in on_path:
            back.setdefault(to, set()).add(i)
        elif not seen:
            path.append(to)
            ways.append(iter(following[to]))
            on_path.add(to)
    loops = []
    for head, ends in back.items():
        body, rest = {head}, list(ends)
        while rest:
            if (i := rest.pop()) not in body:
                body.add(i)
                rest += before[i]
        loops.append(_Span(head, body))
    return set(before), loops
