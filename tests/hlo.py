"""Optimised HLO as text: which arrays a Pallas kernel reads itself, and what is copied."""

import dataclasses
import math
import re
from collections.abc import Iterator

# Of Pallas' lowerings to Mosaic and to Triton.
KERNELS = 'custom_call_target="tpu_custom_call"', 'custom_call_target="__gpu$xla.gpu.triton"'
# What only names an array anew.
_SAME_ARRAY = {"bitcast", "optimization-barrier"}
_MOVES = {"copy", "copy-done", "pad", "reshape", "transpose"}

_COMPUTATION = re.compile(r"(ENTRY )?%?(\S+) \(.*\) -> .*\{")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%(\S+) = ((?:\(.*?\)|\S+)) ([\w-]+)\((.*)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    computation: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    text: str

    def called(self, attribute: str) -> str | None:
        match = re.search(rf"\b{attribute}=%?([\w.-]+)", self.text)
        return match and match[1]

    @property
    def index(self) -> int:
        """Of a parameter or a tuple's element."""
        number = re.search(
            r"index=(\d+)" if self.opcode == "get-tuple-element" else r"parameter\((\d+)\)", self.text
        )
        return int(number[1])

    @property
    def array(self) -> tuple[str, int]:
        """Dtype and size of an array, or of a tuple's first."""
        dtype, dimensions = re.search(r"(\w+)\[([\d,]*)\]", self.shape).groups()
        return dtype, math.prod(int(dimension) for dimension in dimensions.split(",") if dimension)


class Module:
    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        computation = ""
        for line in text.splitlines():
            if match := _COMPUTATION.match(line):
                computation = match[2]
                self.computations[computation] = {}
                if match[1]:
                    self.entry = computation
            elif match := _INSTRUCTION.match(line):
                name, shape, opcode, rest = match.groups()
                arguments = re.split(r"\)(?:, [a-z_]+=|$)", rest)[0]
                operands = tuple(re.findall(r"%([\w.-]+)", arguments))
                instruction = Instruction(name, computation, shape, opcode, operands, line)
                self.computations[computation][name] = instruction
        self.loops = {
            instruction.called("body"): instruction
            for instruction in self.instructions()
            if instruction.opcode == "while"
        }

    def instructions(self) -> Iterator[Instruction]:
        for computation in self.computations.values():
            yield from computation.values()

    def operand(self, instruction: Instruction, index: int) -> Instruction:
        return self.computations[instruction.computation][instruction.operands[index]]

    def kernels(self) -> list[Instruction]:
        return [
            x
            for x in self.instructions()
            if x.opcode == "custom-call" and any(kernel in x.text for kernel in KERNELS)
        ]

    def origin(self, instruction: Instruction) -> Instruction:
        """Where an array comes from unchanged: an argument of the program, or what computes it or lays it out anew.

        What a loop carries comes from before the loop, and what XLA fetches into faster memory from where it was.
        """
        elements: list[int] = []
        while True:
            if source := self._fetched_from(instruction):
                instruction = source
            elif instruction.opcode in _SAME_ARRAY:
                instruction = self.operand(instruction, 0)
            elif instruction.opcode == "get-tuple-element":
                elements.append(instruction.index)
                instruction = self.operand(instruction, 0)
            elif instruction.opcode == "tuple" and elements:
                instruction = self.operand(instruction, elements.pop())
            elif instruction.opcode == "while" and elements:
                instruction = self.operand(instruction, 0)
            elif instruction.opcode == "parameter" and instruction.computation in self.loops:
                instruction = self.operand(self.loops[instruction.computation], 0)
            else:
                return instruction

    def _fetched_from(self, instruction: Instruction) -> Instruction | None:
        """The source of a copy, perhaps in slices, that differs from it in nothing but the memory, S(n)."""
        steps = {"copy": 1, "copy-done": 2}.get(instruction.opcode, 0)
        if "ConcatBitcast" in instruction.text:
            steps = 3  # of slice-done, of slice-start
        source = instruction
        for _ in range(steps):
            source = self.operand(source, 0)
        while source.opcode == "bitcast":  # slices are cut from bytes
            source = self.operand(source, 0)
        places = {re.sub(r"S\(\d+\)", "", x.shape) for x in (instruction, source)}
        return source if steps and len(places) == 1 else None

    def arguments_read(self, kernel: Instruction) -> set[str]:
        """The program's arguments, by the names that JAX gives them, that `kernel` gets as they are."""
        origins = (self.origin(self.operand(kernel, i)) for i in range(len(kernel.operands)))
        return {
            re.search(r'op_name="([^"]*)"', origin.text)[1]
            for origin in origins
            if origin.opcode == "parameter" and origin.computation == self.entry
        }

    def moves_in_loops(self) -> list[Instruction]:
        """What loops copy, pad or transpose, alone or fused with nothing else; not fetches into faster memory."""
        return [
            instruction
            for body in self.loops
            for instruction in self.computations[body].values()
            if self._only_moves(instruction) and not self._fetched_from(instruction)
        ]

    def _only_moves(self, instruction: Instruction) -> bool:
        if instruction.opcode != "fusion":
            return instruction.opcode in _MOVES
        fused = {x.opcode for x in self.computations[instruction.called("calls")].values()}
        return bool(fused & _MOVES) and fused <= _MOVES | _SAME_ARRAY | {"parameter", "constant"}
